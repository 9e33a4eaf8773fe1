"""What the MONAI model zoo checks of a bundle before it accepts one."""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.networks.nets import BasicUNet

from medtl_ext import InputError
from medtl_ext.data import generate_phantom

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
REQUIRED = [
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/multi_gpu_train.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
]

pytestmark = pytest.mark.parametrize("bundle", sorted(BUNDLES.iterdir()), ids=lambda path: path.name)


def metadata_of(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


def is_segmentation(bundle: Path) -> bool:
    return metadata_of(bundle)["network_data_format"]["outputs"]["pred"]["format"] == "segmentation"


@pytest.mark.parametrize("name", REQUIRED)
def test_required_files_are_there(bundle, name):
    assert (bundle / name).is_file()
    assert (bundle / name).stat().st_size < 25e6, "larger files go to large_files.yml"


def test_metadata_follow_the_schema(bundle, shared_data, tmp_path):
    schema = shutil.copy(shared_data / "meta_schema_20240725.json", tmp_path)
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(schema))


def test_the_version_is_in_the_changelog(bundle):
    metadata = metadata_of(bundle)
    assert metadata["version"] in metadata["changelog"]
    assert {"image"} == set(metadata["network_data_format"]["inputs"])
    assert {"pred"} == set(metadata["network_data_format"]["outputs"])


def test_the_versions_are_those_that_are_tested(bundle):
    pinned = dict(
        line.split("==")
        for line in (BUNDLES.parent / "constraints.txt").read_text().splitlines()
        if re.match(r"[\w.-]+==", line)
    )
    metadata = metadata_of(bundle)
    packages = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    packages.pop("medtl")
    assert packages == {name: pinned.get(name, "").split(" ")[0] for name in packages}


@pytest.mark.parametrize("name", ["train", "inference"])
def test_the_network_takes_and_gives_what_the_metadata_say(bundle, name):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / f"{name}.json"),
        device="cpu",
        p=1,
        n=1,
        any=1,
        **({"n_classes": 2} if name == "train" else {}),  # else the phantom would be made to count them
    )


def test_the_weights_fit_and_are_exported(bundle, tmp_path):
    torch.load(bundle / "models" / "model.pt", weights_only=True)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        key_in_ckpt="",
    )
    network = torch.jit.load(tmp_path / "model.ts")
    grid = (32, 32) if is_segmentation(bundle) else ()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 2, *grid)


@pytest.fixture
def no_phantom(monkeypatch):
    def fail(**settings):
        raise AssertionError("data were generated")

    monkeypatch.setattr("medtl_ext.transfer.tasks.cached_phantom", fail)


@pytest.mark.parametrize(
    ("names", "kind"), [(["train"], "train"), (["train", "evaluate"], "train"), (["inference"], "infer")]
)
def test_initialize_is_cheap_and_may_run_twice(bundle, names, kind, no_phantom):
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / f"{name}.json") for name in names], workflow_type=kind
    )
    began = time.process_time()
    workflow.initialize()
    workflow.initialize()
    assert time.process_time() - began < 5


def test_a_config_for_several_processes_says_how_to_start_it(bundle):
    overlays = sorted((bundle / "configs").glob("multi_gpu_*.json"))
    assert overlays
    for overlay in overlays:
        workflow = ConfigWorkflow(config_file=[str(bundle / "configs" / "train.json"), str(overlay)])
        with pytest.raises((InputError, RuntimeError)) as caught:
            workflow.initialize()
        assert "torchrun --nproc_per_node=2 -m monai.bundle run" in str(caught.value.__cause__ or caught.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[bool, dict[str, dict]]:
    """Options of each workflow for data and weights that are there: to check a property is to build it."""
    folder = tmp_path_factory.mktemp("small")
    settings = {"subjects": 7, "modalities": ["T1", "T2"], "n_jobs": 1, "progress": False}  # three to train on
    collection = generate_phantom(folder / "phantom", institutions=["17"], **settings)
    weights = BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4), norm="batch").state_dict()
    torch.save(weights, folder / "source.pt")
    train = {
        "collection": str(collection),
        "source_task": "17-T2-ED",
        "source_ckpt": str(folder / "source.pt"),
        "network_def#features": [4, 4, 4, 4, 4, 4],
        "progress": False,
    }
    segmentation = {"train": train, "infer": {"input_dir": str(collection.parent / "17-000")}}
    images = {f"{split}_images": np.zeros((4, 28, 28), np.uint8) for split in ("train", "val", "test")}
    np.savez(
        folder / "tiny.npz", **images, **{f"{split}_labels": np.arange(4) % 2 for split in ("train", "val", "test")}
    )
    tiny = str(folder / "tiny.npz")
    classification = {"train": {"target_task": tiny, "progress": False}, "infer": {"input_dir": tiny}}
    return {True: segmentation, False: classification}


@pytest.mark.parametrize(
    ("names", "kind"), [(["train"], "train"), (["train", "evaluate"], "train"), (["inference"], "infer")]
)
def test_the_workflow_has_its_properties(bundle, names, kind, small):
    files = [str(bundle / "configs" / f"{name}.json") for name in names]
    workflow = ConfigWorkflow(config_file=files, workflow_type=kind, **small[is_segmentation(bundle)][kind])
    workflow.initialize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not workflow.check_properties()
    assert not [str(one.message) for one in caught if "propert" in str(one.message).lower()]


def test_configs_are_json_without_a_machines_paths(bundle):
    for path in (bundle / "configs").glob("*.json"):
        text = path.read_text()
        json.loads(text)
        assert not re.search(r'"(/|~|[A-Za-z]:\\)', text), path.name
        assert "/home/" not in text
        assert "/tmp/" not in text
