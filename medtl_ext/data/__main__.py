"""Command line of the data room: ``python -m medtl_ext.data``, then ``check``, ``phantom``, ``read`` or ``split``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medtl_ext._validation import InputError
from medtl_ext.data.collection import SPLITS, load_collection
from medtl_ext.data.integrity import check_collection
from medtl_ext.data.readers import READERS, read_collection
from medtl_ext.data.splits import FRACTIONS, split_collection


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medtl_ext.data", description="Check a collection, or make one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="read every file of a collection and list what is wrong with it",
        description="Read every file of a collection and list what is wrong with it. Nothing is changed. "
        "Exit status: 0 without errors (warnings are allowed), 1 with errors, 2 when the collection cannot be used.",
    )
    check.add_argument("collection", metavar="COLLECTION.json", help="the collection file")
    check.add_argument("--task", nargs="+", metavar="TASK", help="check only these tasks' files, such as 13-T1-ED")
    check.add_argument("--csv", metavar="FILE", help="also write the issues as a table")
    check.set_defaults(run=_check)

    phantom = commands.add_parser(
        "phantom",
        help="generate a synthetic brain MRI collection",
        description="Generate a synthetic brain MRI collection: NIfTI images and labels of every modality and "
        "objective. The same seed gives the same images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    phantom.add_argument("--out", required=True, metavar="DIR", help="folder to write into", default=argparse.SUPPRESS)
    phantom.add_argument("--institutions", nargs="+", default=["13", "14", "17"], metavar="NAME", help="scanner sites")
    phantom.add_argument("--subjects", type=int, default=12, metavar="N", help="subjects of each institution")
    phantom.add_argument("--seed", type=int, default=0, metavar="N", help="seed of anatomy, lesions and scanners")
    phantom.set_defaults(run=_phantom)

    _add_read(commands)
    split = commands.add_parser(
        "split",
        help="draw splits or folds for a collection",
        description="Draw patient-wise splits or folds, stratified by institution, and write the collection with them "
        "to a new file. Who has the file trains on the same patients.",
        argument_default=argparse.SUPPRESS,
    )
    split.add_argument("path", metavar="COLLECTION.json", help="the collection file; it is not changed")
    _add_split_options(split)
    split.set_defaults(run=_split)
    return parser


def _add_read(commands: argparse._SubParsersAction) -> None:
    read = commands.add_parser(
        "read",
        help="write a collection for a public or your own dataset",
        description="Write a collection for a dataset in its own layout, then check every file of it. No image is "
        "copied or changed. Exit status: 0 without errors, 1 with errors in the files, 2 when nothing can be written.",
        argument_default=argparse.SUPPRESS,
    )
    read.add_argument("name", metavar="NAME", help=f"the layout: {', '.join(READERS)}")
    read.add_argument("--root", required=True, metavar="DIR", help="folder of the dataset")
    _add_split_options(read)
    read.add_argument("--institutions", metavar="FILE", help="CSV file with columns subject and institution")
    read.add_argument("--file", metavar="FILE", help="csv, datalist, medmnist: the list or the .npz to read")
    read.add_argument(
        "--labels", nargs="+", type=_label, metavar="NAME=VALUE", help="csv, datalist, medmnist: what labels mean"
    )
    read.add_argument("--modalities", nargs="+", metavar="NAME", help="datalist: of the images, in their order")
    read.add_argument("--et-label", type=int, choices=(3, 4), help="fets, brats: the value of enhancing tumour")
    read.add_argument("--no-check", dest="check", action="store_false", help="do not read every file")
    read.add_argument("--csv", metavar="FILE", help="also write what was left out, and the issues, as a table")
    read.set_defaults(run=_read)


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="the collection file to write")
    parser.add_argument(
        "--split",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VAL", "TEST"),
        help=f"fractions of patients; {' '.join(map(str, FRACTIONS))} where the data have no splits",
    )
    parser.add_argument("--folds", type=int, metavar="K", help="draw folds instead, and write K files FILE_fold0, ...")
    parser.add_argument("--seed", type=int, metavar="N", help="another seed is another draw (default: 0)")
    parser.add_argument("--keep-test", action="store_true", help="leave the test set as it is")


def _label(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE, such as lesion=1")
    return name, int(value)


def _refuse_other_table(path: str, *others: str) -> None:
    """A report replaces a report, and nothing else: ``--csv`` is easily taken for the table to read."""
    if any(Path(path).absolute() == Path(other).absolute() for other in others):
        raise InputError(f"--csv {path} is the collection; give another file for the report.")
    if Path(path).exists():
        with open(path, "rb") as file:
            if not file.readline().startswith((b"severity,subject,", b"class,")):
                raise InputError(
                    f"--csv {path} exists and is no report of issues, so it is not replaced; give another file, or "
                    "--file for a table to read."
                )


def _check(arguments: argparse.Namespace) -> int:
    if arguments.csv:
        _refuse_other_table(arguments.csv, arguments.collection)
    report = check_collection(load_collection(arguments.collection), arguments.task)
    print(report)
    if arguments.csv:
        report.to_csv(arguments.csv)
        print(f"Issues written to {arguments.csv}")
    return 1 if report.errors else 0


def _phantom(arguments: argparse.Namespace) -> int:
    from medtl_ext.data.phantom import generate_phantom  # brings nilearn, which the check does not need

    path = generate_phantom(
        arguments.out, institutions=arguments.institutions, subjects=arguments.subjects, seed=arguments.seed
    )
    print(f"Synthetic collection written to {path}")
    print(f"Next: python -m medtl_ext.data check {path}")
    return 0


def _read(arguments: argparse.Namespace) -> int:
    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "run", "csv")}
    if "labels" in options:
        options["labels"] = dict(options["labels"])
    if "csv" in arguments:
        _refuse_other_table(arguments.csv, arguments.out)
    reading = read_collection(**options)
    print(reading)
    if "csv" in arguments:
        reading.to_csv(arguments.csv)
        print(f"Issues written to {arguments.csv}")
    return 1 if reading.check and reading.check.errors else 0


def _split(arguments: argparse.Namespace) -> int:
    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "run", "split")}
    for path in split_collection(**options, fractions=getattr(arguments, "split", None)):
        splits = Counter(subject.split for subject in load_collection(path).subjects)
        print(f"Collection written to {path}: {', '.join(f'{split} {splits[split]}' for split in SPLITS)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input is printed as one line."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
    except OSError as error:  # a folder that cannot be read or written, a name that is too long
        print(f"Error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
