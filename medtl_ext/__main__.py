"""What there is: ``python -m medtl_ext``; the options of a bundle: ``python -m medtl_ext BUNDLE --help``.

Both are read from the bundles themselves, their ``train.json`` and ``docs/README.md``.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from medtl_ext import __version__

PROGRAMS = {
    "medtl_ext.data": "check a collection, plan its grid, make one of your images, or write a sample",
    "medtl_ext.report": "one page over many runs: asked, advised, best on test patients",
}


def bundles() -> dict[str, Path]:
    """The bundles by name: those of the checkout that this package is in, else those in or below the current folder."""
    for top in (Path(__file__).parents[1], Path.cwd(), Path.cwd().parent):
        if found := sorted((top / "bundles").glob("*/configs/train.json")):
            return {path.parents[1].name: path.parents[1] for path in found}
    return {}


def _command(bundle: Path) -> str:
    config = bundle / "configs" / "train.json"
    shown = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    return f"python -m monai.bundle run --config_file {shown}"


def _plain(markdown: str) -> str:
    """Without links, code marks and emphasis; ``|`` in a table is escaped."""
    return re.sub(r"\*\*|`", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)).replace("\\|", "|").strip()


def _part(config: Any, name: str) -> Any:
    """Such as that of ``audit#arms``."""
    for key in name.split("#"):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def options(bundle: Path) -> Iterator[tuple[str, str]]:
    """Options with their defaults, those of ``train.json`` where it has a value, and what the README's table says."""
    config = json.loads((bundle / "configs" / "train.json").read_text(encoding="utf-8"))
    page = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    for row in table[1].splitlines() if table else ():
        names, default, meaning = re.split(r"(?<!\\)\|", row.strip("|"), maxsplit=2)
        names = re.findall(r"--([\w#]+)", names)
        values = [_part(config, name) for name in names]
        if all(value is not None and str(value)[:1] not in "$@" and value != "auto" for value in values):
            default = ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
        yield ", ".join(f"--{name}" for name in names) + f"  (default: {_plain(default) or 'none'})", _plain(meaning)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and return the exit status."""
    found = bundles()
    parser = argparse.ArgumentParser(prog="python -m medtl_ext", add_help=False)
    parser.add_argument("bundle", nargs="?", choices=found)
    parser.add_argument("-h", "--help", action="store_true")
    chosen = parser.parse_args(arguments).bundle
    if chosen:
        print(f"{_command(found[chosen])} [--OPTION VALUE ...]")
        for names, meaning in options(found[chosen]):
            print(f"\n{names}\n{fill(meaning, 100, initial_indent='    ', subsequent_indent='    ')}")
        return 0
    print(f"MedTL {__version__}: transfer learning for medical images\n")
    for module, what in PROGRAMS.items():
        print(f"python -m {module}  {what}")
    if not found:
        print("\nNo bundles here: they are not in the package but in its repository; go to a checkout of it.")
    for name, bundle in found.items():
        page = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
        question = re.search(r"\*\*Question it answers:\*\*\s+(.+?)\n\n", page, re.DOTALL)
        said = " ".join(question[1].replace("*", "").split()) if question else ""
        print(f"\n{name}\n{fill(said, 100, initial_indent='    ', subsequent_indent='    ')}")
        print(f"    {_command(bundle)}\n    python -m medtl_ext {name} --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
