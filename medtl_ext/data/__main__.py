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

    Where images differ in spacing it also says what the grid that is planned for a task would lose. Exit status: 0
    without errors (warnings are allowed), 1 with errors, 2 when the collection cannot be used.
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

    Exit status: 0 without errors, 1 with errors in the files, 2 when nothing can be written.
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

    Also says what the grid leaves of the labels: the best Dice that any network could reach on it, and how many
    connected parts vanish. The bundles plan the same when nothing is given. Exit status: 1 where much is lost.
    """
    if len(options.get("roi_size", ())) == 1:
        options["roi_size"] = options["roi_size"][0]
    grid, ceiling = _planned(load_collection(collection), task, source, **options)
    print(*grid.why, sep="\n")
    print(f"the labels themselves, brought to the grid{f' of {source}' if source else ''} and back: {ceiling}")
    if out:
        grid.write(out)
        print(f"Plan written to {out}: change it as you like, and lay it over a bundle's config")
    return int(ceiling.low)


def _planned(
    of: Collection,
    task: str,
    source: str | None = None,
    trust_sources: bool = False,
    **options: Any,
) -> tuple[Grid, Ceiling]:
    """The grid of a task, and what it, or that of a source, leaves of the labels."""
    asked, splits = Task(task), {subject.split for subject in of.subjects_of(task)}
    items = of.datalist(task, next(split for split in SPLITS if split in splits))
    values, card = of.label_values(asked), None
    if source is not None:
        above = "medtl_ext.transfer.sources.pool:"  # a program stands on the roof, whatever the room it is found in
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

    Who has the file trains on the same patients.
    """
    for written in split_collection(path, out, fractions=split, **options):
        print(f"Collection written to {written}: {count_splits(load_collection(written).subjects)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medtl_ext.data", description="Check a collection, or make one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[..., int], summary: str) -> Callable[..., Any]:
        """Add a command, whose options are the function's; returns what adds one."""
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

    option = command(plan, "choose the grid of a training from its images, and say what it costs")
    option("collection", metavar="COLLECTION.json", help="the collection file")
    option("task", metavar="TASK", help="such as 13-T1-ED")
    option("--spacing", nargs=3, type=float, metavar="MM", help="of a voxel along each axis")
    option("--roi_size", nargs="+", metavar="VOXELS", help="two of a slice, three of a volume; 2d, 3d")
    option("--axcodes", help="orientation of the grid (default: RAS)")
    option("--source", metavar="PATH", help="say what the grid of this source costs: a card, bundle or nnU-Net folder")
    option("--trust_sources", action="store_true", help="run what is code in the source")
    option("--out", metavar="FILE", help="write the plan as JSON")

    option = command(phantom, "generate a synthetic brain MRI collection")
    option("--out", required=True, metavar="DIR", help="folder to write into")
    option("--institutions", nargs="+", default=["13", "14", "17"], metavar="NAME", help="scanner sites")
    option("--subjects", type=int, default=12, metavar="N", help="subjects of each institution")
    option("--seed", type=int, default=0, metavar="N", help="seed of anatomy, lesions and scanners")

    option = command(read, "write a collection for a public or your own dataset")
    option("name", metavar="NAME", help=f"the layout: {', '.join(READERS)}")
    option("--root", metavar="DIR", help="folder of the dataset; of images the current folder if not given")
    option("--images", metavar="DIR", help="images: folder of the images, or a pattern such as 'scans/*_flair.nii.gz'")
    _add_split_options(option)
    option("--institutions", metavar="FILE", help="CSV file with columns subject, institution and, if wanted, patient")
    option("--file", metavar="FILE", help="csv, datalist, medmnist: the list or the .npz to read")
    what = "what values mean, NAME=VALUE; not of all layouts. images: folder of the masks, or a pattern"
    option("--labels", nargs="+", metavar="NAME=VALUE|DIR", help=what)
    what = "images: what the masks' values mean, such as vessel=255, or colours, such as vessel=255,0,0"
    option("--values", nargs="+", metavar="NAME=VALUE", help=what)
    what = "datalist: of the images, in their order; images: what their names end in, or their channels in order"
    option("--modalities", nargs="+", metavar="NAME", help=what)
    option("--institution", metavar="NAME", help="images: where all are from; else the name of their folder")
    option("--challenge", choices=CHALLENGES, help="brats: whose labels they are, where files do not tell")
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
    fractions = f"fractions of patients; {' '.join(map(str, FRACTIONS))} where the data have no splits"
    option("--out", required=True, metavar="FILE", help="the collection file to write")
    option("--split", nargs=3, type=float, metavar=("TRAIN", "VAL", "TEST"), help=fractions)
    option("--folds", type=int, metavar="K", help="draw folds instead, and write K files FILE_fold0, ...")
    option("--seed", type=int, metavar="N", help="another seed is another draw (default: 0)")
    option("--keep-test", action="store_true", help="leave the test set as it is")


def _parse_folder(words: Sequence[str]) -> str:
    if len(words) > 1:
        raise InputError("--labels is one folder of masks, or one pattern in quotes; what values mean is --values.")
    return words[0]


def _parse_values(words: Sequence[str]) -> dict[str, int | list[int]]:
    """Such as ``vessel=255``, or of a colour ``vessel=255,0,0``."""
    values = {}
    for word in words:
        name, _, value = word.rpartition("=")
        numbers = value.split(",")
        if not name or not all(number.isdecimal() for number in numbers):
            raise InputError(f"'{word}' is not of the form NAME=VALUE, such as lesion=1.")
        if name in values:
            raise InputError(f"{name} has two values; give every value a name of its own.")
        values[name] = [int(number) for number in numbers] if len(numbers) > 1 else int(value)
    return values


def _refuse_other_table(csv: str | None, collection: str) -> None:
    """A report replaces a report, and nothing else: ``--csv`` is easily taken for the table to read."""
    if csv and Path(csv).absolute() == Path(collection).absolute():
        raise InputError(f"--csv {csv} is the collection; give another file for the report.")
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
