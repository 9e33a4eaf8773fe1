"""What our own configs may evaluate and build; MONAI does both without asking."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.transforms
import pytest

CONFIGS = sorted((Path(__file__).parents[1] / "bundles").glob("*/configs/*.json"))
NAMES = {"dict", "int", "len", "max", "min", "os", "print", "str", "torch", "monai"}
MODULES = ("import medtl_ext.", "import os", "import torch.distributed as dist")
# What a whole name begins with; a short one is MONAI's.
TARGETS = ("medtl_ext.", "monai.", "ignite.handlers.", "torch.nn.", "torch.optim.")


def parts(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth."""
    for key, value in content.items() if isinstance(content, dict) else (("", one) for one in content):
        yield key, value
        if isinstance(value, dict | list):
            yield from parts(value)


def faults(content: dict[str, Any]) -> list[str]:
    """Expressions with a name that is neither their own nor on the lists, and targets that are not on the lists."""
    found, names = [], set(NAMES)
    for key, value in parts(content):
        if not isinstance(value, str):
            continue
        if key == "_target_" and not value.startswith(TARGETS) and re.search(r"[^A-Za-z0-9]", value):
            found.append(value)
        if value[0:1] != "$":
            continue
        tree = ast.parse(re.sub(r"[@%][\w#:]+", "REFERENCE", value[1:]).strip())
        nodes = list(ast.walk(tree))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        names |= {alias.asname or alias.name for node in imports for alias in node.names}
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}  # of a lambda, and of what is looped over
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in nodes if isinstance(node, ast.Name)} - own - {"REFERENCE"}
        private = [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr[0] == "_"]
        elsewhere = [node for node in imports if not ast.unparse(node).startswith(MODULES)]
        if elsewhere or private or used - names or re.search(r"\bos\.(?!environ\b|path\b)", value):
            found.append(value)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]} {path.stem}")
def test_configs_evaluate_and_build_what_is_on_the_lists(path):
    content = json.loads(path.read_text())
    below = json.loads((path.parent / "train.json").read_text())  # which an overlay lies over
    first = [one[key] for one in (below, content) for key in ("imports", "initialize") if key in one]
    assert faults({"first": first, **content}) == []
    short = [value for key, value in parts(content) if key == "_target_" and "." not in value and value[-1] == "d"]
    assert not [name for name in short if not hasattr(monai.transforms, name)]


@pytest.mark.parametrize(
    "bad",
    [
        "$__import__('os').system('x')",
        "$import subprocess",
        "$from os import system",
        "$os.system('x')",
        "$torch.nn.Module.__subclasses__()",
        "$[eval for _ in (1,)]",
        "$(lambda: open('x'))()",
        {"_target_": "os.system"},
        {"_target_": "$print"},
    ],
)
def test_the_linter_sees(bad):
    assert len(faults({"a": [{"b": bad}]})) == 1
