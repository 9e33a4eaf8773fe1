"""What there is: ``python -m medtl_ext``; the options of a bundle: ``python -m medtl_ext BUNDLE --help``.

And what another of its configs sets: ``python -m medtl_ext BUNDLE CONFIG --help``. All is read from the bundles: their
configs, the docstrings of the steps in them, and ``docs/README.md``.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc import locate
from textwrap import fill
from typing import Any

from medtl_ext import __version__

PROGRAMS = {
    "medtl_ext.data": "check a collection, plan its grid, make one of your images, or write a sample",
    "medtl_ext.report": "one page over many runs: asked, advised, best on test patients",
}


OF_MONAI = ("imports", "bundle_root", "initialize", "run", "finalize")


def bundles() -> dict[str, Path]:
    """The bundles by name: those of the checkout that this package is in, else those in or below the current folder."""
    for top in (Path(__file__).parents[1], Path.cwd(), Path.cwd().parent):
        if found := sorted((top / "bundles").glob("*/configs/train.json")):
            return {path.parents[1].name: path.parents[1] for path in found}
    return {}


def _command(*files: Path) -> str:
    shown = [str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file) for file in files]
    return f"python -m monai.bundle run --config_file {shown[0] if len(shown) == 1 else json.dumps(str(shown))}"


def _content(bundle: Path, config: str) -> dict[str, Any]:
    return json.loads((bundle / "configs" / f"{config}.json").read_text(encoding="utf-8"))


def _plain(markdown: str) -> str:
    """Without links, code marks and emphasis; ``|`` in a table is escaped."""
    return re.sub(r"\*\*|`", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)).replace("\\|", "|").strip()


def _part(config: Any, name: str) -> Any:
    """Such as that of ``audit#arms``."""
    for key in name.split("#"):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _table(bundle: Path, head: str) -> Iterator[list[str]]:
    """The rows of the README's table whose first column is called so, its cells as plain text."""
    page = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    for row in table[1].splitlines() if table else ():
        yield [_plain(cell) for cell in re.split(r"(?<!\\)\|", row.strip("|"))]


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def options(bundle: Path) -> Iterator[tuple[str, str]]:
    """Options with their defaults, those of ``train.json`` where it has a value, and what the README's table says."""
    config = _content(bundle, "train")
    for said, default, meaning in _table(bundle, "option"):
        names = re.findall(r"--([\w#]+)", said)
        values = [_part(config, name) for name in names]
        if all(value is not None and str(value)[:1] not in "$@" and value != "auto" for value in values):
            default = _shown(values)
        yield f"{', '.join(f'--{name}' for name in names)}  (default: {default or 'none'})", meaning


def settings(bundle: Path, config: str) -> Iterator[tuple[str, str]]:
    """What a config sets, and what its steps' docstrings or the README's table say of that."""
    said = {"settings": "options of train.json that all trainings share"}
    for names, _, meaning in _table(bundle, "option"):
        said |= dict.fromkeys(re.findall(r"--([\w#]+)", names), meaning)
    for whole in (_content(bundle, name) for name in files(bundle, config)):
        for part in (part for part in whole.values() if isinstance(part, dict)):
            for kind in reversed(getattr(locate(part.get("_target_", "")), "__mro__", ())):
                text = inspect.cleandoc(kind.__doc__ or "")
                for names, meaning in re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {8}.+)*)", text, re.MULTILINE):
                    said |= dict.fromkeys(names.split(", "), _plain(" ".join(meaning.split())))
    for name, value in _content(bundle, config).items():
        if name[0] not in "_+" and name not in OF_MONAI and not (isinstance(value, dict) and "_target_" in value):
            yield f"--{name}  (default: {_shown([value])})", said.get(name, "")


def files(bundle: Path, config: str) -> list[str]:
    """The names to give, in this order: one config that runs by itself, or those over which it is laid and then it."""
    content = _content(bundle, config)
    if {"imports", "run"} <= content.keys():
        return [config]
    row = _row(bundle, config)
    over = re.search(r"\(over (\w+)(?: and (\w+))?", row[0]) if row else None
    below = [name for name in over.groups() if name] if over else ["train"]
    return [*below, config]


def _row(bundle: Path, config: str) -> list[str] | None:
    """What the README's table of other configs says of one."""
    rows = [row for head in ("config", "overlay") for row in _table(bundle, head)]
    return next((row for row in rows if config in re.findall(r"\w+", row[0].split(" (")[0])), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, and return the exit status."""
    found = bundles()
    parser = argparse.ArgumentParser(prog="python -m medtl_ext", add_help=False)
    parser.add_argument("bundle", nargs="?", choices=found)
    parser.add_argument("config", nargs="?", default="train")
    parser.add_argument("-h", "--help", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.bundle:
        bundle, config = found[asked.bundle], asked.config
        known = sorted(path.stem for path in (bundle / "configs").glob("*.json") if path.stem != "metadata")
        if config not in known:
            parser.error(f"{asked.bundle} has no config {config}; it has {', '.join(known)}.")
        paths = [bundle / "configs" / f"{name}.json" for name in files(bundle, config)]
        print(f"{_command(*paths)} [--OPTION VALUE ...]")
        if config != "train":
            content, row = _content(bundle, config), _row(bundle, config)
            print(
                fill(content.get("_desc_") or (row[1] if row else content.get("report", {}).get("question", "")), 100)
            )
        for names, meaning in options(bundle) if config == "train" else settings(bundle, config):
            print(f"\n{names}\n{fill(meaning, 100, initial_indent='    ', subsequent_indent='    ')}".rstrip())
        if config == "train":
            print(f"\nOther configs: python -m medtl_ext {asked.bundle} CONFIG --help\n{fill(', '.join(known), 100)}")
        return 0
    print(f"MedTL {__version__}: transfer learning for medical images\n")
    for module, what in PROGRAMS.items():
        print(f"python -m {module}  {what}")
    print("\nA source (--source, --sources) is a task, weights, a card, or the folder of a MONAI bundle or of nnU-Net.")
    if not found:
        print("\nNo bundles here: they are not in the package but in its repository; go to a checkout of it.")
    for name, bundle in found.items():
        page = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
        question = re.search(r"\*\*Question it answers:\*\*\s+(.+?)\n\n", page, re.DOTALL)
        said = " ".join(question[1].replace("*", "").split()) if question else ""
        print(f"\n{name}\n{fill(said, 100, initial_indent='    ', subsequent_indent='    ')}")
        print(f"    {_command(bundle / 'configs' / 'train.json')}\n    python -m medtl_ext {name} --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
