"""Command line of the data room: ``python -m medtl_ext.data check`` and ``python -m medtl_ext.data phantom``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from medtl_ext._validation import InputError
from medtl_ext.data.collection import load_collection
from medtl_ext.data.integrity import check_collection


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
    return parser


def _check(arguments: argparse.Namespace) -> int:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; bad input is printed as one line."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
