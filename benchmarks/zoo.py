"""Which bundles of a folder can be sources, and why the others cannot.

The folder is what users download, here for MONAI's model zoo: ``python benchmarks/zoo.py FOLDER [--trust]``. Weights
are made up (random ones, in a temporary copy), so configs are enough: a bundle is usable if its network builds offline,
its weights load, its preprocessing consists of what is on the list, and an image of its window's size with its channels
gives class scores, one per pixel or one per image. With ``--trust`` expressions and the bundles' own files are run.
"""

import argparse
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medtl_ext import InputError
from medtl_ext.networks import load_weights
from medtl_ext.sources.allowed import built_network, transforms_of
from medtl_ext.sources.bundle import bundle_card

COLUMNS = ("bundle", "usable", "dimensions", "channels", "classes", "per", "executed", "reason")
CHANNELS = ("in_channels", "input_channels", "n_input_channels")
SPARE = 64  # pixels of an image for networks that take any
STAY = [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]  # of DiNTS: each block keeps its resolution


def made_up(bundle: Path) -> Path:
    """The weights' file, and what searched architectures are read from, which the downloaded bundle would hold."""
    models = bundle / "models"
    models.mkdir(exist_ok=True)
    codes = {"node_a": np.ones((13, 4)), "arch_code_a": np.tile(STAY, (12, 1)), "arch_code_c": np.ones((12, 10))}
    for listed in (line for file in bundle.glob("large_files.y*ml") for line in file.read_text().splitlines()):
        if search := re.search(r"models/(search_code\w*\.pt)", listed):
            torch.save(codes, models / search[1])
    (models / "model.pt").touch()
    return models / "model.pt"


def tried(bundle: Path, trust: bool) -> dict[str, Any]:
    """A row of the table; what is refused raises."""
    weights = made_up(bundle)
    card = bundle_card(bundle, trust)
    network = built_network(card["network"], bundle, trust)
    torch.save(network.state_dict(), weights)
    load_weights(network, card["checkpoint"], min_share=1.0)
    steps = transforms_of(card.get("preprocessing", ()), keys=["image"])
    channels = card.get("channels") or ["?"] * next(
        (card["network"][key] for key in CHANNELS if key in card["network"]), 1
    )
    image = {"image": 255 * torch.rand(len(channels), *shape_of(bundle, card))}
    for step in steps:
        image = step(image)
    crop = image["image"].as_tensor() if hasattr(image["image"], "as_tensor") else image["image"]
    if "window" in card:
        crop = torch.nn.functional.interpolate(crop[None], card["window"])[0]
    with torch.no_grad():
        output = network.eval()(crop[None])
    output = output[card["pick"]] if "pick" in card else output
    output = output[0] if isinstance(output, list | tuple) else output
    if not isinstance(output, torch.Tensor):
        raise InputError(f"its network gives {type(output).__name__}, no class scores")
    spatial = tuple(output.shape[2:])
    pixel = spatial == tuple(crop.shape[1:])
    if not pixel and set(spatial) - {1}:
        raise InputError(f"its network gives {spatial} pixels for an image of {tuple(crop.shape[1:])}")
    classes, scores = card.get("classes"), output.shape[1]
    if classes and len(classes) not in (scores, scores + 1):
        raise InputError(f"its network gives {scores} scores, its metadata name {len(classes)} classes")
    return {
        "dimensions": card.get("dimensions", len(spatial)),
        "channels": len(channels),
        "classes": len(classes or range(scores)),
        "per": "pixel" if pixel else "image",
        "executed": executed(bundle, card) if trust else "nothing",
    }


def shape_of(bundle: Path, card: Mapping[str, Any]) -> Sequence[int]:
    """Of an image: the window, else what the metadata say, else any."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]
    said = next(iter(metadata.values()))["spatial_shape"]
    return card.get("window") or [one if isinstance(one, int) else SPARE for one in said]


def executed(bundle: Path, card: Mapping[str, Any]) -> str:
    try:
        bundle_card(bundle)
        return "nothing"
    except InputError:
        return "its scripts" if ".py:" in card["network"]["_target_"] else "its expressions"


def row(bundle: Path, trust: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle, Path(folder) / bundle.name, symlinks=True))
        try:
            return {"bundle": bundle.name, "usable": "yes"} | tried(copy, trust)
        except InputError as error:
            return {"bundle": bundle.name, "usable": "no", "reason": str(error).replace(folder, "")}
        except Exception as error:  # whatever a network raises on images it was not made for
            reason = f"its network refuses such an image ({type(error).__name__}: {error})"
            return {"bundle": bundle.name, "usable": "no", "reason": reason.splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trust", action="store_true", help="evaluate expressions and run the bundles' own files")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bundles = sorted(path for path in given.folder.iterdir() if (path / "configs").is_dir())
    rows = [row(path, given.trust) for path in tqdm(bundles, file=sys.stderr)]
    print("|".join(("", *COLUMNS, "")) + "\n" + "|---" * len(COLUMNS) + "|")
    for one in rows:
        print("| " + " | ".join(str(one.get(column, "")) for column in COLUMNS) + " |")
    usable = sum(one["usable"] == "yes" for one in rows)
    print(f"\n{usable} of {len(rows)} bundles are usable {'with' if given.trust else 'without'} trust.")


if __name__ == "__main__":
    main()
