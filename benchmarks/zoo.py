"""Which bundles of a folder can be sources, and why the others cannot.

    python benchmarks/zoo.py FOLDER [--trust]

The folder is what users download, such as MONAI's model zoo. Weights are made up (random ones, in a temporary copy), so
configs are enough: a bundle is usable if its network builds offline, its weights load, its preprocessing consists of
what is on the list, and an image of its window's size with its channels gives class scores, one per pixel or per image.
With ``--trust`` expressions are evaluated and the bundles' own files are run.
"""

import argparse
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medtl_ext import InputError
from medtl_ext.transfer.sources.allowed import built_network, transforms_of
from medtl_ext.transfer.sources.card import Card
from medtl_ext.transfer.sources.network import untouched
from medtl_ext.transfer.sources.pool import card_at

COLUMNS = ("bundle", "usable", "dimensions", "channels", "classes", "per", "executed", "reason")
SPARE = 64  # pixels of an image for networks that take any
STAY = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]  # of DiNTS: each block keeps its resolution


def made_up(bundle: Path) -> Path:
    """The weights' file, and what searched architectures are read from, which the downloaded bundle would hold."""
    models = bundle / "models"
    models.mkdir(exist_ok=True)
    codes = {"node_a": np.ones((13, 4)), "arch_code_a": np.tile(STAY, (12, 1)), "arch_code_c": np.ones((12, 10))}
    for listed in bundle.glob("large_files.y*ml"):
        for name in re.findall(r"models/(search_code\w*\.pt)", listed.read_text()):
            torch.save(codes, models / name)
    (models / "model.pt").touch()
    return models / "model.pt"


def shape_of(bundle: Path, card: Card) -> Sequence[int]:
    """Of an image: the window, else what the metadata say, else any."""
    inputs = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]
    said = next(iter(inputs.values()))["spatial_shape"]
    return card.window or [one if isinstance(one, int) else SPARE for one in said]


def executed(bundle: Path, card: Card) -> str:
    with suppress(InputError):
        return "nothing" if card_at(bundle, trust=False) else ""
    return "its scripts" if ".py:" in card.network["_target_"] else "its expressions"


def tried(bundle: Path, trust: bool) -> dict[str, Any]:
    """A row of the table; what is refused raises."""
    weights = made_up(bundle)
    card = card_at(bundle, trust)
    torch.save(built_network(card.network, card.folder, card.trusted).state_dict(), weights)
    channels, per = len(card.channels), "pixel"
    try:
        network = untouched(card, channels=channels)
    except InputError as error:
        if "per pixel" not in str(error):
            raise
        network, per = untouched(card, channels=channels, per_pixel=False), "image"
    image = {"image": 255 * torch.rand(channels, *shape_of(bundle, card))}
    for step in transforms_of(card.preprocessing or (), keys=["image"]):
        image = step(image)
    image = torch.as_tensor(image["image"])[None]
    with torch.no_grad():
        network(torch.nn.functional.interpolate(image, card.window) if card.window else image)
    numbers = {"dimensions": network.dimensions, "channels": channels, "classes": network.n_classes}
    return numbers | {"per": per, "executed": executed(bundle, card)}


def row(bundle: Path, trust: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle, Path(folder) / bundle.name, symlinks=True))
        try:
            return {"bundle": bundle.name, "usable": "yes"} | tried(copy, trust)
        except InputError as error:
            reason = str(error)
        except Exception as error:  # whatever a network raises on images it was not made for
            reason = f"its network refuses such an image ({type(error).__name__}: {error})".splitlines()[0]
        return {"bundle": bundle.name, "usable": "no", "reason": reason.replace(f"{folder}/", "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust", action="store_true", help="evaluate expressions and run the bundles' own files")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bundles = sorted(path for path in given.folder.iterdir() if (path / "configs").is_dir())
    with redirect_stdout(sys.stderr):  # some networks print
        rows = [row(path, given.trust) for path in tqdm(bundles)]
    print("|".join(("", *COLUMNS, "")) + "\n" + "|---" * len(COLUMNS) + "|")
    for one in rows:
        print("| " + " | ".join(str(one.get(column, "")) for column in COLUMNS) + " |")
    usable = sum(one["usable"] == "yes" for one in rows)
    print(f"\n{usable} of {len(rows)} bundles are usable {'with' if given.trust else 'without'} trust.")


if __name__ == "__main__":
    main()
