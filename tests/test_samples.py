"""Every bundle on the real samples of the package, in colour and in 3D, and on several channels of the phantom."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import DATASETS, RISK_MAP, SEQUENTIAL, SOURCE_SELECTION
from PIL import Image

from medtl_ext.data import load_collection
from medtl_ext.data.files import read_channels
from medtl_ext.data.sample import write_sample

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")
PHOTOGRAPHS = {"spacing": [1.0, 1.0, 1.0], "roi_size": [64, 64], "figures": True, "check_data": True}
CROPS = {"spacing": [2.0, 2.0, 2.0], "roi_size": [32, 32], "figures": True, "check_data": True}


@pytest.fixture(scope="module")
def retina(tmp_path_factory) -> Path:
    return write_sample("retina", tmp_path_factory.mktemp("samples") / "retina")


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory) -> Path:
    return write_sample("hippocampus", tmp_path_factory.mktemp("samples") / "hippocampus")


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    return {"output_dir": str(tmp_path / "out"), "source_dir": str(tmp_path / "pool")}


def patients_of(folder: str) -> set[str]:
    table = pd.read_csv(Path(folder) / "metrics.csv")
    assert table["dice"].between(0, 1).all()
    return set(table.loc[table["split"] == "test", "subject"])


def test_risk_map_on_colour_photographs(retina, places):
    tasks = {"source": "Healthy-R+G+B-Vessel", "target_task": "Diabetic-R+G+B-Vessel"}
    RISK_MAP.run(collection=str(retina), **tasks, **PHOTOGRAPHS, **places)
    tested = [one.id for one in load_collection(retina).subjects_of(tasks["target_task"]) if one.split == "test"]
    assert patients_of(places["output_dir"]) == set(tested)
    weights = torch.load(Path(places["output_dir"]) / "model.pt")
    assert next(value for value in weights.values() if value.ndim == 4).shape[1] == 3
    for name in ("maps.png", "overlay.png"):
        pixels = np.asarray(Image.open(Path(places["output_dir"]) / name).convert("RGB")).astype(int)
        assert (np.ptp(pixels, axis=-1) > 60).mean() > 0.05  # in colour


def test_source_selection_on_colour_photographs(retina, places):
    """A source with other channels is left out, with the reason."""
    sources = ["Healthy-R+G+B-Vessel", {"name": "green", "task": "Healthy-G-Vessel"}]
    options = {"sources": sources, "target_task": "Diabetic-R+G+B-Vessel"}
    SOURCE_SELECTION.run(collection=str(retina), **options, **PHOTOGRAPHS, **places)
    table = pd.read_csv(Path(places["output_dir"]) / "ranking.csv").set_index("source")
    assert table.loc["Healthy-R+G+B-Vessel", "status"] == "ranked"
    assert table.loc["green", "reason"] == "it is for G, but the target's images are R+G+B"
    assert not list(Path(places["source_dir"]).glob("green*"))  # nor trained


def test_dataset_transferability_on_colour_photographs(retina, places, tmp_path):
    """Healthy or not, from one folder per class; one half of the photographs is the target, the other the source."""
    for place, subject in enumerate(load_collection(retina).subjects):
        for half in ("left", "right"):
            folder = tmp_path / half / ("train", "val", "test")[place % 3] / subject.institution
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.open(subject.images["R+G+B"])
            picture.crop((0, 0, 160, 320) if half == "left" else (160, 0, 320, 320)).save(folder / f"{subject.id}.png")
    chosen = {"target_task": str(tmp_path / "left"), "sources": [str(tmp_path / "right")], "in_channels": 3}
    DATASETS.run(**chosen, **places, train_per_class=None, val_per_class=None, batch_size=4)
    table = pd.read_csv(Path(places["output_dir"]) / "ranking.csv").set_index("source")
    assert table.loc["right", "status"] == "ranked"


def test_sequential_transfer_on_crops(hippocampus, places):
    sources = [f"Vanderbilt-T1-{name}" for name in ("Anterior", "Hippocampus", "Parts")]
    options = {"sources": sources, "target_task": "Vanderbilt-T1-Posterior"}
    SEQUENTIAL.run(collection=str(hippocampus), **options, **CROPS, **places)
    assert pd.read_csv(Path(places["output_dir"]) / "arms.csv")["dice"].between(0, 1).all()


@pytest.mark.parametrize("bundle", [RISK_MAP, SEQUENTIAL], ids=str)
def test_four_channels_of_the_phantom(bundle, collection, places):
    target, source = (f"{institution}-T1+T1CE+T2+FLAIR-FeTS" for institution in ("17", "14"))
    chosen = {"source": source} if bundle is RISK_MAP else {"sources": [source, "14-T1+T1CE+T2+FLAIR-ED"]}
    bundle.run(collection=str(collection), target_task=target, **chosen, **places)
    (table, *_) = sorted(Path(places["output_dir"]).rglob("metrics.csv"))
    assert set(pd.read_csv(table)["class"]) == {"ED", "ET", "NCR"}


@pytest.mark.parametrize(("axcodes", "axis"), [("ASR", 0), ("RSA", 1), ("RAS", 2)])
def test_slices_are_taken_along_any_axis(hippocampus, axcodes, axis):
    task = "Vanderbilt-T1-Hippocampus"
    grid = {"axcodes": axcodes, "spacing": [1.0, 1.0, 1.0], "roi_size": [64, 64], "train_slices": None}
    workflow = RISK_MAP.workflow("scratch", collection=str(hippocampus), target_task=task, **grid)
    workflow.initialize()
    dataset = workflow.parser.get_parsed_content("train#dataset").plain()
    (patient, *_) = load_collection(hippocampus).datalist(task, "train")
    label = nib.as_closest_canonical(nib.load(patient["label"])).get_fdata() > 0
    sizes = label.sum(tuple({0, 1, 2} - {axis}))
    found = {item["slice"]: int(item["label"].sum()) for item in dataset if item["subject"] == patient["subject"]}
    assert found == {place: size for place, size in enumerate(sizes) if size}


def test_pictures_and_volumes_give_the_same(retina, places, tmp_path):
    """The photographs as PNG, and as NIfTI with one file per channel."""
    content = json.loads(retina.read_text())
    for entry in content["subjects"]:
        names = [f"{retina.parent / entry['images']['R+G+B']}#{number}/3" for number in range(3)]
        mask, _ = read_channels([str(retina.parent / entry["labels"]["vessel"])])
        for name, array in (*zip("RGB", read_channels(names)[0], strict=True), ("vessel", mask[0])):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{entry['id']}_{name}.nii.gz")
        entry["images"] = {name: f"{entry['id']}_{name}.nii.gz" for name in "RGB"}
        entry["labels"] = {"vessel": f"{entry['id']}_vessel.nii.gz"}
    (tmp_path / "collection.json").write_text(json.dumps(content))
    options = {"target_task": "Diabetic-R+G+B-Vessel", "spacing": [1.0, 1.0, 1.0], "roi_size": [64, 64]}
    for kind, path in (("png", retina), ("nifti", tmp_path / "collection.json")):
        RISK_MAP.run("scratch", collection=str(path), **options, output_dir=str(tmp_path / kind))
    first, second = ((tmp_path / kind / "metrics.csv").read_bytes() for kind in ("png", "nifti"))
    assert first == second
