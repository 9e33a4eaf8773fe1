"""The source cards of public networks: the definitions fit the published weights, and give the expected scores."""

import json
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Resized, ScaleIntensityRanged

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples" / "sources"
CARDS = sorted(FOLDER.glob("*.json"))
KEYS = {"name", "description", "trained_on", "licence", "checkpoint", "network", "channels", "fill", "preprocessing"}
KEYS |= {"axes", "window", "overlap", "blending", "mirror", "dimensions", "output", "classes", "pick", "layer"}
KEYS |= {"encoder", "convolutions", "batch_size", "institution", "modality", "objective"}
MESHNETS = ["mindgrab", "model11_gw_ae", "model18cls", "model20chan3cls", "model21_104class", "model30chan18cls"]
MESHNETS += ["model30chan50cls", "model5_gw_ae"]


def definition(target: str):
    file, name = target.split(":")
    return runpy.run_path(str(FOLDER / file))[name]


def of_card(card: dict) -> torch.nn.Module:
    arguments = dict(card["network"])
    return definition(arguments.pop("_target_"))(**arguments).eval()


@pytest.fixture(scope="module")
def real(shared_data) -> Path:
    if not (shared_data / "real" / "networks").is_dir():
        pytest.skip("the public networks are not among the reference data (../shared/data/real)")
    return shared_data / "real"


@pytest.fixture(scope="module")
def weights(real):
    return lambda name: torch.load(real / "networks" / name, weights_only=True)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
class TestCard:
    def test_says_what_a_source_is(self, path):
        card = json.loads(path.read_text())
        assert card.keys() <= KEYS
        assert {"description", "trained_on", "licence", "checkpoint", "network", "channels", "classes"} <= card.keys()
        assert card["output"] in {"logits", "softmax", "sigmoid"}
        assert not any("keys" in transform for transform in card["preprocessing"])

    def test_the_network_gives_a_map_of_its_classes(self, path):
        card = json.loads(path.read_text())
        sides = (8, 16, 12)[: card["dimensions"]]
        with torch.no_grad():
            found = of_card(card)(torch.rand(1, len(card["channels"]), *sides))
        assert found.shape[2:] == sides
        assert found.shape[1] in {len(card["classes"]), len(card["classes"]) - 1}

    def test_the_weights_are_its_own(self, path, weights):
        card = json.loads(path.read_text())
        of_card(card).load_state_dict(weights(card["checkpoint"]), strict=True)


class TestPublishedWeights:
    """Also of networks without a card."""

    @pytest.mark.parametrize("name", MESHNETS)
    def test_meshnet(self, name, weights, real):
        known = json.loads((real / "networks" / "info.json").read_text())[f"meshnet_{name}"]
        arguments = known["classes"], known["channels"], known["dilations"], known["activations"][0]
        network = definition("meshnet.py:MeshNet")(1, *arguments)
        network.load_state_dict(weights(f"meshnet_{name}.pt"), strict=True)

    @pytest.mark.parametrize("name", ["lesion_patch_1", "lesion_patch_2"])
    def test_lesion_patch(self, name, weights):
        definition("lesion_patch.py:LesionNetwork")().load_state_dict(weights(f"{name}.pt"), strict=True)


class TestLesionNetwork:
    @pytest.fixture
    def volume(self):
        return torch.randn(2, 2, 7, 6, 5)

    def test_a_voxel_has_the_logits_of_its_patch(self, volume):
        network = definition("lesion_patch.py:LesionNetwork")(batch_size=7).eval()
        volume[1, 1, 3, 2, 4] = 3.0
        with torch.no_grad():
            found = network(volume)[1, :, 3, 2, 4]
            patch = torch.nn.functional.pad(volume[1:], [5] * 6)[:, :, 3:14, 2:13, 4:15]
            expected = network.head(network.features(patch).flatten(1))[0]
        torch.testing.assert_close(found, expected)

    def test_dark_voxels_are_background(self, volume):
        with torch.no_grad():
            found = definition("lesion_patch.py:LesionNetwork")().eval()(volume)
        dark = found.movedim(1, -1)[volume[:, 1] <= 0.5]
        assert (dark == torch.tensor([10.0, 0.0])).all()

    def test_a_volume_without_candidates(self):
        found = definition("lesion_patch.py:LesionNetwork")().eval()(torch.zeros(1, 2, 4, 5, 6))
        assert (found.argmax(1) == 0).all()

    def test_the_second_decides_where_the_first_is_convinced(self, volume):
        torch.manual_seed(0)
        cascade = definition("lesion_patch.py:LesionNetwork")(cascade=True).eval()
        first = definition("lesion_patch.py:LesionNetwork")().eval()
        first.load_state_dict({k: v for k, v in cascade.state_dict().items() if not k.startswith("second.")})
        second = definition("lesion_patch.py:LesionNetwork")().eval()
        second.load_state_dict(cascade.second.state_dict())
        with torch.no_grad():
            found, one, two = (network(volume) for network in (cascade, first, second))
        convinced = (one[:, 1] > one[:, 0])[:, None]
        torch.testing.assert_close(found, torch.where(convinced, two, one))

    def test_it_can_be_trained(self, volume):
        network = definition("lesion_patch.py:LesionNetwork")(cascade=True)
        network(volume).square().mean().backward()
        assert network.head[3].weight.grad.abs().sum() > 0


def test_the_vessels_of_a_photograph_that_the_wnet_never_saw(real, weights):
    """Photographs from another city and camera: Dice 0.80 on average, 0.78 on this one."""
    card = json.loads((FOLDER / "wnet_vessel_drive.json").read_text())
    network = of_card(card)
    network.load_state_dict(weights(card["checkpoint"]))
    folder = real / "retina_vessels" / "chase_02L"
    image = np.stack([np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj, np.float32) for name in "RGB"])
    vessel = np.asarray(nib.load(folder / "vessel.nii.gz").dataobj) > 0
    known = {"ScaleIntensityRanged": ScaleIntensityRanged, "Resized": Resized}
    transforms = [dict(transform) for transform in card["preprocessing"]]
    preprocessing = Compose([known[one.pop("_target_")](keys="image", **one) for one in transforms])
    item = preprocessing({"image": MetaTensor(torch.from_numpy(image))})
    with torch.no_grad():
        item["image"].set_array(torch.sigmoid(network(item["image"].as_tensor()[None, ..., 0]))[0, ..., None])
    found = preprocessing.inverse(item)["image"].numpy()[0] > 0.5
    assert 2 * (found & vessel).sum() / (found.sum() + vessel.sum()) > 0.7
