"""Command line of the data room: ``python -m medtl_ext.data check``, ``phantom``, ``read``, ``sample`` or ``split``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pandas as pd

from medtl_ext._validation import InputError
from medtl_ext.data.collection import SPLITS, Collection, Task, count_splits, load_collection, refuse_to_replace
from medtl_ext.data.integrity import IntegrityReport, Issue, check_collection
from medtl_ext.data.phantom import generate_phantom
from medtl_ext.data.plan import Ceiling, Grid, grid_steps, label_ceiling, plan_grid, stored_options, truth_steps
from medtl_ext.data.readers import CHALLENGES, READERS, read_collection
from medtl_ext.data.sample import SAMPLES, write_sample
from medtl_ext.data.splits import FRACTIONS, split_collection


def check(collection: str, task: Sequence[str] | None = None, csv: str | None = None) -> int:
    """Read every file of a collection and list what is wrong with it. Nothing is changed.

    Where images differ in spacing, it also says how much of the labels would be lost on the grid that is planned for a
    task. Exit status: 0 without errors (warnings are allowed), 1 with errors, 2 if the collection cannot be used.
    """
    _refuse_other_table(csv, collection)
    of = load_collection(collection)
    report = check_collection(of, task)
    for name in () if report.errors else map(str, task or of.tasks()):
        grid, ceiling = _planned(of, name)
        if ceiling.low:
            advice = f"give a finer grid; see python -m medtl_ext.data plan {collection} {name}"
            report.issues.append(Issue("warning", "", name, f"{grid.why[0]}: {ceiling}", advice))
    return _show(report, report, csv)


def phantom(out: str, **options: Any) -> int:
    """Generate a synthetic brain MRI collection: NIfTI images and labels of every modality and objective.

    The same seed gives the same images.
    """
    path = generate_phantom(out, **options)
    print(f"Synthetic collection written to {path}")
    print(f"Next: python -m medtl_ext.data check {path}")
    return 0


def read(name: str, out: str, root: str | None = None, csv: str | None = None, **options: Any) -> int:
    """Write a collection for a dataset in its own layout, then check every file of it. No image is copied or changed.

    Exit status: 0 without errors, 1 if a file has errors, 2 if no collection can be written.
    """
    if root is None and name != "images":
        raise InputError("give the folder of the dataset with --root.")
    if "labels" in options:
        options["labels"] = (_parse_folder if name == "images" else _parse_values)(options["labels"])
    if "values" in options:
        options["values"] = _parse_values(options["values"])
    _refuse_other_table(csv, out)
    reading = read_collection(name, root or ".", out, **options)
    return _show(reading, reading.check, csv)


def plan(collection: str, task: str, out: str | None = None, source: str | None = None, **options: Any) -> int:
    """Choose spacing, slices or volumes, windows and intensities from a task's training images, and say why.

    Also says how much of the labels survives on this grid: the best Dice that any network could reach, and how many
    connected parts disappear. The bundles make the same plan by themselves. Exit status: 1 if much is lost.
    """
    if len(options.get("roi_size", ())) == 1:
        options["roi_size"] = options["roi_size"][0]
    grid, ceiling = _planned(load_collection(collection), task, source, **options)
    print(*grid.why, sep="\n")
    print(f"ceiling: labels resampled to the grid{f' of {source}' if source else ''} and back: {ceiling}")
    if out:
        grid.write(out)
        print(f"Plan written to {out}: change it as you like, and add it after the configs of a bundle")
    return int(ceiling.low)


def _planned(
    of: Collection,
    task: str,
    source: str | None = None,
    trust_sources: bool = False,
    **options: Any,
) -> tuple[Grid, Ceiling]:
    """The grid of a task, and how much of the labels survives on it (or on the grid of a source)."""
    asked, splits = Task(task), {subject.split for subject in of.subjects_of(task)}
    items = of.datalist(task, next(split for split in SPLITS if split in splits))
    values, card = of.label_values(asked), None
    if source is not None:
        above = "medtl_ext.transfer.sources.pool:"  # found at run time: this folder may not import a higher floor
        card_at, source_transforms = (resolve_name(above + name) for name in ("card_at", "source_transforms"))
        card = card_at(Path(source), trust_sources)
        options = stored_options(Path(source).with_name("grid.json")) | options
    grid = plan_grid(items, label_values=values, channels=asked.channels, **options)
    steps = grid_steps(grid, label_values=values)
    if card is not None and card.preprocessing is not None:
        steps = source_transforms(card, asked.channels, truth_steps(values))
    elif grid.native:
        return grid, Ceiling((1.0,) * len(items))
    return grid, label_ceiling(items, steps, n_classes=len(values) + 1)


def sample(name: str, out: str) -> int:
    """Write a small real collection that ships with the package into a new folder, to try things on."""
    path = write_sample(name, out)
    print(f"Collection written to {path}")
    print(f"License {load_collection(path).license}; where it is from and whom to cite: {path.with_name('README.md')}")
    print(f"Next: python -m medtl_ext.data check {path}")
    return 0


def split(path: str, out: str, split: Sequence[float] | None = None, **options: Any) -> int:
    """Draw patient-wise splits or folds, stratified by institution, and write the collection with them to a new file.

    Everybody who uses this file trains on the same patients.
    """
    for written in split_collection(path, out, fractions=split, **options):
        print(f"Collection written to {written}: {count_splits(load_collection(written).subjects)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medtl_ext.data", description="Check a collection, or make one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., int], summary: str) -> Callable[..., Any]:
        """Add a command that calls ``run``; returns the function that adds an option to it."""
        added = commands.add_parser(
            run.__name__,
            help=summary,
            description=run.__doc__,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        added.set_defaults(run=run)
        return added.add_argument

    option = command(check, "read every file of a collection and list what is wrong with it")
    option("collection", metavar="COLLECTION.json", help="the collection file")
    option("--task", nargs="+", metavar="TASK", help="check only these tasks' files, such as 13-T1-ED")
    option("--csv", metavar="FILE", help="also write the issues as a table")

    option = command(plan, "choose the grid of a training from its images, and say what is lost on it")
    option("collection", metavar="COLLECTION.json", help="the collection file")
    option("task", metavar="TASK", help="such as 13-T1-ED")
    option("--spacing", nargs=3, type=float, metavar="MM", help="size of a voxel along each axis")
    option("--roi_size", nargs="+", metavar="VOXELS", help="two numbers for slices, three for volumes; or 2d, 3d")
    option("--axcodes", help="orientation of the grid (default: RAS)")
    what = "a card, bundle or nnU-Net folder: say what is lost on the grid of this source instead"
    option("--source", metavar="PATH", help=what)
    option("--trust_sources", action="store_true", help="allow code in the source to run")
    option("--out", metavar="FILE", help="write the plan as JSON")

    option = command(phantom, "generate a synthetic brain MRI collection")
    option("--out", required=True, metavar="DIR", help="folder to write into")
    option("--institutions", nargs="+", default=["13", "14", "17"], metavar="NAME", help="scanner sites")
    option("--subjects", type=int, default=12, metavar="N", help="subjects of each institution")
    option("--seed", type=int, default=0, metavar="N", help="seed of anatomy, lesions and scanners")

    option = command(read, "write a collection for a public or your own dataset")
    option("name", metavar="NAME", help=f"the layout: {', '.join(READERS)}")
    option("--root", metavar="DIR", help="folder of the dataset; for images, the current folder by default")
    option("--images", metavar="DIR", help="images: folder of the images, or a pattern such as 'scans/*_flair.nii.gz'")
    _add_split_options(option)
    what = "CSV file with the columns subject and institution, and optionally patient"
    option("--institutions", metavar="FILE", help=what)
    option("--file", metavar="FILE", help="csv, datalist, medmnist: the list or the .npz to read")
    what = "what the label values mean, NAME=VALUE (not for every layout); images: folder or pattern of the masks"
    option("--labels", nargs="+", metavar="NAME=VALUE|DIR", help=what)
    what = "images: what the values in the masks mean, such as vessel=255, or a colour, such as vessel=255,0,0"
    option("--values", nargs="+", metavar="NAME=VALUE", help=what)
    what = "datalist: names of the images, in order; images: endings of the file names, or the channels in order"
    option("--modalities", nargs="+", metavar="NAME", help=what)
    option("--institution", metavar="NAME", help="images: institution of all images (default: name of their folder)")
    option("--challenge", choices=CHALLENGES, help="brats: which challenge's labels, if the files do not say")
    option("--no-check", dest="check", action="store_false", help="do not read every file")
    option("--csv", metavar="FILE", help="also write what was left out, and the issues, as a table")

    option = command(sample, "write a small real collection to try things on")
    option("name", metavar="NAME", help="; ".join(f"{name}: {what}" for name, what in SAMPLES.items()))
    option("--out", required=True, metavar="DIR", help="new folder to write")

    option = command(split, "draw splits or folds for a collection")
    option("path", metavar="COLLECTION.json", help="the collection file; it is not changed")
    _add_split_options(option)
    return parser


def _add_split_options(option: Callable[..., Any]) -> None:
    fractions = f"fractions of patients (default, for data without splits: {' '.join(map(str, FRACTIONS))})"
    option("--out", required=True, metavar="FILE", help="the collection file to write")
    option("--split", nargs=3, type=float, metavar=("TRAIN", "VAL", "TEST"), help=fractions)
    option("--folds", type=int, metavar="K", help="draw K folds instead, and write K files FILE_fold0, ...")
    option("--seed", type=int, metavar="N", help="seed of the draw (default: 0)")
    option("--keep-test", action="store_true", help="keep the present test set")


def _parse_folder(words: Sequence[str]) -> str:
    if len(words) > 1:
        raise InputError("give --labels one folder of masks, or one pattern in quotes; give the values with --values.")
    return words[0]


def _parse_values(words: Sequence[str]) -> dict[str, int | list[int]]:
    """Names and values, such as ``vessel=255``, or for a colour ``vessel=255,0,0``."""
    values = {}
    for word in words:
        name, _, value = word.rpartition("=")
        numbers = value.split(",")
        if not name or not all(number.isdecimal() for number in numbers):
            raise InputError(f"'{word}' is not of the form NAME=VALUE, such as lesion=1.")
        if name in values:
            raise InputError(f"{name} is given two values; give every value its own name.")
        values[name] = [int(number) for number in numbers] if len(numbers) > 1 else int(value)
    return values


def _refuse_other_table(csv: str | None, collection: str) -> None:
    """``--csv`` may replace an older report only: it is easily mistaken for the option of the table to read."""
    if csv and Path(csv).absolute() == Path(collection).absolute():
        raise InputError(f"--csv {csv} is the collection file itself; give another file for the report.")
    if csv:
        reports = (["severity", "subject"], ["class", "train"])
        refuse_to_replace(csv, lambda path: [*pd.read_csv(path, nrows=0)][:2] in reports, "report of issues")


def _show(report: Any, found: IntegrityReport | None, csv: str | None) -> int:
    print(report)
    if csv:
        report.to_csv(csv)
        print(f"Issues written to {csv}")
    return 1 if found and found.errors else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input is printed as one line."""
    options = vars(_parser().parse_args(arguments))
    try:
        return options.pop("run")(**options)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
    except OSError as error:  # a folder that cannot be read or written, a name that is too long
        print(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
