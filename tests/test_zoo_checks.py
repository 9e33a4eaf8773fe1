"""The checks of a bundle that the MONAI model zoo makes before it accepts one."""

import json
import re
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from bundle_runs import ALL, REPOSITORY, Bundle, mnist_arrays, refused
from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out
from monai.networks.nets import BasicUNet

from medtl_ext.data import generate_phantom

CONFIGS = ["metadata.json", "train.json", "evaluate.json", "inference.json", "multi_gpu_train.json", "logging.conf"]
REQUIRED = ["LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt", *(f"configs/{n}" for n in CONFIGS)]

pytestmark = pytest.mark.parametrize("bundle", ALL, ids=str)
WORKFLOWS = pytest.mark.parametrize(("base", "overlays"), [("train", []), ("train", ["evaluate"]), ("inference", [])])


def is_segmentation(bundle: Bundle) -> bool:
    return bundle.content("metadata")["network_data_format"]["outputs"]["pred"]["format"] == "segmentation"


def test_required_files_are_there(bundle):
    assert all((bundle.root / name).stat().st_size < 25e6 for name in REQUIRED), "larger files go to large_files.yml"


def test_metadata_follow_the_schema(bundle, shared_data, tmp_path):
    schema = shutil.copy(shared_data / "meta_schema_20240725.json", tmp_path)
    verify_metadata(meta_file=str(bundle.configs / "metadata.json"), filepath=str(schema))


def test_the_version_is_in_the_changelog(bundle):
    metadata = bundle.content("metadata")
    assert metadata["version"] in metadata["changelog"]
    assert {"image"} == set(metadata["network_data_format"]["inputs"])
    assert {"pred"} == set(metadata["network_data_format"]["outputs"])


def test_the_versions_are_those_that_are_tested(bundle):
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if re.match(r"[\w.-]+==", line))
    metadata = bundle.content("metadata")
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
        meta_file=str(bundle.configs / "metadata.json"),
        config_file=str(bundle.configs / f"{name}.json"),
        device="cpu",
        p=1,
        n=1,
        any=1,
        # Otherwise the phantom would be made, to count patients and to plan the grid.
        **({"n_classes": 2, "network_def#spatial_dims": 2} if name == "train" else {}),
    )


def test_the_weights_fit_and_are_exported(bundle, tmp_path):
    torch.load(bundle.root / "models" / "model.pt", weights_only=True)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle.root / "models" / "model.pt"),
        meta_file=str(bundle.configs / "metadata.json"),
        config_file=str(bundle.configs / "inference.json"),
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


@WORKFLOWS
def test_initialize_is_cheap_and_may_run_twice(bundle, base, overlays, no_phantom):
    workflow, began = bundle.workflow(*overlays, base=base), time.process_time()
    workflow.initialize()
    workflow.initialize()
    assert time.process_time() - began < 5


def test_a_config_for_several_processes_says_how_to_start_it(bundle):
    overlays = [path.stem for path in bundle.configs.glob("multi_gpu_*.json")]
    assert overlays
    for overlay in overlays:
        said = refused(bundle.workflow(overlay).initialize)
        assert "torchrun --nproc_per_node=2 -m monai.bundle run" in said


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[bool, dict[str, dict]]:
    """Options of each workflow, with existing data and weights, because the check of a property builds it."""
    folder = tmp_path_factory.mktemp("small")
    settings = {"subjects": 7, "n_jobs": 1, "progress": False}  # three to train on
    collection = generate_phantom(folder / "phantom", institutions=["17"], **settings)
    torch.save(BasicUNet(2, 1, 2, features=[4] * 6, norm="batch").state_dict(), folder / "source.pt")
    train = {"collection": str(collection), "source": str(folder / "source.pt")}
    train |= {"network_def#features": [4] * 6, "spacing": [2, 2, 4], "roi_size": [96, 96], "progress": False}
    inference = {"input_dir": str(collection.parent / "17-000")}
    segmentation = {"train": train, "inference": inference}
    np.savez(folder / "tiny.npz", **mnist_arrays(counts=(4, 4, 4)))
    tiny = str(folder / "tiny.npz")
    classification = {"train": {"target_task": tiny, "progress": False}, "inference": {"input_dir": tiny}}
    return {True: segmentation, False: classification}


@WORKFLOWS
def test_the_workflow_has_its_properties(bundle, base, overlays, small):
    workflow = bundle.workflow(*overlays, base=base, **small[is_segmentation(bundle)][base])
    workflow.initialize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not workflow.check_properties()
    assert not [str(one.message) for one in caught if "propert" in str(one.message).lower()]


def test_configs_are_json_without_a_machines_paths(bundle):
    for path in (bundle.configs).glob("*.json"):
        json.loads(path.read_text())
        assert not re.search(r'"(/|~|[A-Za-z]:\\)|/home/|/tmp/', path.read_text()), path.name
