"""nnU-Net v2 folders become source cards; none of their code runs; a card gives the same results as nnU-Net."""

import copy
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged
from monai.utils import convert_to_dst_type
from safetensors.torch import save_file
from torch import nn

from medtl_ext import InputError
from medtl_ext.networks import read_checkpoint, read_weights
from medtl_ext.transfer.sources.allowed import built_network, transforms_of
from medtl_ext.transfer.sources.card import read_card
from medtl_ext.transfer.sources.network import untouched
from medtl_ext.transfer.sources.nnunet import (
    CropNonzerod,
    NormalizeNonzerod,
    ResampleSpacingd,
    nnunet_card,
    nnunet_folders,
    sliding_window,
)

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "nnunet.py"
UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
needs_architectures = pytest.mark.skipif(
    find_spec("dynamic_network_architectures") is None, reason="pip install 'medtl[nnunet]' for this test"
)
ARCHITECTURE = {
    "network_class_name": UNET,
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [2, 4],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2,
        "strides": [[1, 1, 1], [1, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
CONFIGURATION = {
    "preprocessor_name": "DefaultPreprocessor",
    "patch_size": [4, 8, 16],
    "spacing": [3.0, 1.0, 0.5],
    "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
    "use_mask_for_norm": [True, True],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "architecture": ARCHITECTURE,
}
FLAT = json.loads(json.dumps(CONFIGURATION).replace("3d", "2d").replace("[3, 3, 3]", "[3, 3]"))
FLAT |= {"patch_size": [8, 16], "spacing": [1.0, 0.5]}
FLAT["architecture"]["arch_kwargs"]["strides"] = [[1, 1], [2, 2]]
CT = {"mean": 100.0, "std": 50.0, "percentile_00_5": -20.0, "percentile_99_5": 300.0}
PLANS = {
    "dataset_name": "Dataset007_Tiny",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [2, 0, 1],  # slices lie along x
    "foreground_intensity_properties_per_channel": {"0": CT},
    "configurations": {
        "3d_fullres": CONFIGURATION,
        "2d": FLAT,
        "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [6.0, 2.0, 1.0]},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}
DATASET = {
    "channel_names": {"1": "T1", "0": "CT"},
    "labels": {"background": 0, "tumour": 2, "organ": 1, "ignore": 3},
    "numTraining": 4,
}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


class Payload:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("payload_was_run",)


def changed(content, path, value):
    """A copy of nested mappings with another value at ``a/b/c``; None removes it."""
    content = copy.deepcopy(content)
    *parents, last = path.split("/")
    inner = content
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return content


def write(folder, plans=PLANS, dataset=DATASET, configuration="3d_fullres", weights=None, fold="fold_0", **more):
    """A results folder of nnU-Net; ``weights`` are those in its checkpoint."""
    results = folder / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (results / fold).mkdir(parents=True, exist_ok=True)
    for name, content in (("plans", plans), ("dataset", dataset)):
        (results / f"{name}.json").write_text(json.dumps(content))
    checkpoint = {
        "network_weights": weights or {},
        "init_args": {"configuration": configuration, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "_best_ema": np.float32(0.5),
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint | more, results / fold / "checkpoint_final.pth")
    return results


def weights_of(arguments=ARCHITECTURE["arch_kwargs"], classes=3):
    definition = {"_target_": UNET, **arguments, "input_channels": 2, "num_classes": classes}
    return built_network(definition | {"deep_supervision": True}).state_dict()


# The card


@needs_architectures
def test_a_folder_becomes_a_card(tmp_path):
    results = write(tmp_path, weights=(weights := weights_of()))
    card = nnunet_card(results)
    assert card == nnunet_card(tmp_path) == nnunet_card(results / "fold_0")
    assert (card["name"], card["channels"]) == ("Dataset007_Tiny_3d_fullres", ["CT", "T1"])
    assert card["classes"] == ["background", "organ", "tumour"]  # in the order of their labels, without ignored ones
    # nnU-Net's z, y, x with its third axis first: x, z, y
    assert card["axes"] == [0, 2, 1]
    assert card["window"] == [4, 16, 8]
    assert card["mirror"] == [0, 2]
    assert card["dimensions"] == 3
    crop, within, scale, resample = card["preprocessing"]
    assert crop == {"_target_": "medtl_ext.transfer.sources.nnunet.CropNonzerod"}
    assert within == {"_target_": "medtl_ext.transfer.sources.nnunet.NormalizeNonzerod", "only": [1]}
    assert scale["channels"] == [0]
    (scale,) = transforms_of([scale], ["image"])
    image = torch.tensor([[-500.0, 100.0, 250.0, 500.0], [-500.0, 100.0, 250.0, 500.0]])
    torch.testing.assert_close(scale({"image": image})["image"], torch.stack([torch.tensor([-2.4, 0, 3, 4]), image[1]]))
    assert (resample["pixdim"], resample["mode"], resample["separate"]) == ([3.0, 0.5, 1.0], 3, None)
    assert json.loads(json.dumps(card)) == card
    network = built_network(card["network"])
    assert isinstance(network.encoder.stages[0][0].convs[0].conv, nn.Conv3d)
    network.load_state_dict(read_weights(card["checkpoint"]))
    assert torch.equal(network.state_dict()["decoder.seg_layers.0.bias"], weights["decoder.seg_layers.0.bias"])
    assert network(torch.rand(1, 2, 4, 8, 16)).shape == (1, 3, 4, 8, 16)


def test_a_network_of_slices_says_along_which_axis_they_lie(tmp_path):
    card = nnunet_card(write(tmp_path, configuration="2d"))
    assert card["description"].endswith("on slices along axis 0 of the image")
    assert (card["dimensions"], card["axes"], card["window"], card["mirror"]) == (2, [0, 2, 1], [16, 8], [1, 2])
    assert card["preprocessing"][-1]["pixdim"] == [-1, 0.5, 1.0]


def test_regions_are_classes_of_one_channel_each(tmp_path):
    dataset = DATASET | {"labels": REGIONS, "regions_class_order": [1, 2]}
    card = nnunet_card(write(tmp_path, dataset=dataset))
    assert card["classes"] == ["background", "whole", "core"]
    assert card["network"]["num_classes"] == 2


@needs_architectures
def test_the_plans_of_older_releases_are_read(tmp_path):
    old = {key: value for key, value in CONFIGURATION.items() if key != "architecture"}
    old |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 2, "unet_max_num_features": 320}
    old |= {"n_conv_per_stage_encoder": [1, 1], "n_conv_per_stage_decoder": [1], "num_pool_per_axis": [0, 1, 1]}
    old |= {"conv_kernel_sizes": [[3, 3, 3]] * 2, "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2]]}
    plans = changed(PLANS, "configurations/3d_fullres", old)
    network = built_network(nnunet_card(write(tmp_path, plans, weights=weights_of()))["network"])
    assert network.state_dict().keys() == weights_of().keys()


def test_other_readers_folds_and_resampling_are_told(tmp_path):
    plans = changed(PLANS, "image_reader_writer", "NibabelIOWithReorient")
    plans = changed(plans, "configurations/3d_fullres/resampling_fn_data", "resample_torch_fornnunet")
    plans = changed(plans, "configurations/3d_fullres/resampling_fn_data_kwargs", {"force_separate_z": False})
    for fold in ("fold_0", "fold_1", "fold_all"):
        card = nnunet_card(write(tmp_path, plans, fold=fold))
        assert Path(card["checkpoint"]).parent.name == ("fold_all" if fold == "fold_all" else "fold_0")
    assert card["preprocessing"][0] == {"_target_": "Orientationd", "axcodes": "RAS"}
    assert (card["preprocessing"][-1]["mode"], card["preprocessing"][-1]["separate"]) == (1, False)
    given = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_1"
    assert Path(nnunet_card(given)["checkpoint"]).parent == given


@needs_architectures
def test_weights_of_another_network_are_refused(tmp_path):
    for other, message in (
        (weights_of(ARCHITECTURE["arch_kwargs"] | {"features_per_stage": [3, 5]}), "does not fit this PlainConvUNet"),
        (weights_of(classes=5), "its network gives 5 channels, but its card names 3 classes"),
    ):
        with pytest.raises(InputError, match=message):
            untouched(read_card(nnunet_card(write(tmp_path, weights=other))), channels=2)


# What is left out, before anything is built


HOSTILE = {
    "configurations/3d_fullres/architecture/arch_kwargs/conv_op": ("os.system", "os.system is not on the list"),
    "configurations/3d_fullres/architecture/arch_kwargs/norm_op": ("torch.nn.init", "torch.nn.init is not on the list"),
    "configurations/3d_fullres/architecture/network_class_name": ("os.system", "network os.system is not on the list"),
    "configurations/3d_fullres/preprocessor_name": ("Own", "preprocessor 'Own' is unknown. Known: DefaultPreprocessor"),
    "configurations/3d_fullres/resampling_fn_data": ("mine", "it resamples by mine"),
    "configurations/3d_fullres/normalization_schemes": (["Own", "Own"], "it normalises by Own; known: CT"),
    "configurations/3d_fullres/patch_size": (None, "does not have nnU-Net v2's format .lacks 'patch_size'"),
    "configurations/3d_fullres/inherits_from": ("3d_lowres", "does not have nnU-Net v2's format .maximum recursion"),
    "image_reader_writer": ("Own", "its reader 'Own' is unknown. Known: SimpleITKIO"),
    "transpose_forward": ("abc", "does not have nnU-Net v2's format"),
    "foreground_intensity_properties_per_channel": ({}, "does not have nnU-Net v2's format"),
}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=needs_architectures) if path.endswith("_op") else path for path in HOSTILE]
)
def test_plans_that_are_not_nnunets_own_are_refused(tmp_path, path):
    value, message = HOSTILE[path]
    with pytest.raises(InputError, match=message):
        untouched(read_card(nnunet_card(write(tmp_path, changed(PLANS, path, value)))), channels=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"organ": 1}, "gives label 0 to 0 classes"),
        ({"background": 0, "organ": 2}, "expected 0, 1, 2, ... without gaps"),
        (REGIONS, r"its regions_class_order is \(\); expected one label for each of \['whole', 'core'\]"),
    ],
)
def test_labels_that_make_no_classes_are_refused(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        nnunet_card(write(tmp_path, dataset=DATASET | {"labels": labels}))


def test_a_cascade_is_refused(tmp_path):
    with pytest.raises(InputError, match="3d_cascade_fullres is the second stage of a cascade"):
        nnunet_card(write(tmp_path, configuration="3d_cascade_fullres"))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = write(tmp_path, logging=Payload())
    with pytest.raises(InputError, match="holds more than tensors"):
        nnunet_card(results)
    assert not Path("payload_was_run").exists()


def test_missing_files_are_named(tmp_path):
    results = write(tmp_path)
    (results / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(InputError, match=r"has no fold with a checkpoint_final\.pth; expected fold_0"):
        nnunet_card(results)
    with pytest.raises(InputError, match="does not exist"):
        nnunet_card(results / "fold_3")
    for name in ("dataset.json", "plans.json"):
        results = write(tmp_path)
        (results / name).write_text("{")
        with pytest.raises(InputError, match=f"its {name} is no JSON"):
            nnunet_card(results)
        (results / name).unlink()
        with pytest.raises(InputError, match=f"its {name} does not exist|is no nnU-Net"):
            nnunet_card(results)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    results = write(tmp_path / "a")
    (results / "plans.json").rename(tmp_path / "elsewhere.json")
    (results / "plans.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="is outside the source's folder"):
        nnunet_card(results)


def test_a_folder_of_none_or_several_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no nnU-Net v2 folder; expected TRAINER__PLANS__CONFIGURATION"):
        nnunet_card(tmp_path)
    both = [write(tmp_path, configuration=configuration) for configuration in ("2d", "3d_fullres")]
    assert nnunet_folders(tmp_path) == both
    with pytest.raises(InputError, match=r"holds several networks .*__2d, .*__3d_fullres\): give one of these"):
        nnunet_card(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, UNET.partition(".")[0], None)
    with pytest.raises(InputError, match=re.escape("pip install 'medtl[nnunet]'")):
        built_network({"_target_": UNET})


@needs_architectures
@pytest.mark.parametrize("name", ["unet.nn", "unet.Union", "nothing.Here", "__init__.PlainConvUNet2"])
def test_only_classes_of_the_package_are_built(name):
    with pytest.raises(InputError, match="is not on the list of what may be built"):
        built_network({"_target_": f"dynamic_network_architectures.architectures.{name}"})


# Checkpoints


def test_numpys_numbers_are_read_from_checkpoints_of_both_its_releases(tmp_path):
    content = {"network_weights": {"weight": torch.ones(2)}, "best": [np.float64(0.5), np.int64(3), np.bool_(True)]}
    torch.save(content, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for name in ("new.pth", "old.pth"):
        assert read_checkpoint(tmp_path / name)["best"] == [0.5, 3, True]
        assert torch.equal(read_weights(tmp_path / name)["weight"], torch.ones(2))


def test_safetensors_are_read(tmp_path):
    save_file({"module.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(read_weights(tmp_path / "model.safetensors")["weight"], torch.ones(2))
    (tmp_path / "model.safetensors").write_bytes(b"not such a file")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "model.safetensors")


def test_arrays_and_objects_of_numpy_are_not_read(tmp_path):
    for value in (np.array([None, 1], dtype=object), np.random.default_rng()):
        torch.save({"weight": torch.ones(1), "other": value}, tmp_path / "model.pt")
        with pytest.raises(InputError, match="holds more than tensors"):
            read_weights(tmp_path / "model.pt")


# Preprocessing; that it is nnU-Net's is shown by the slow test below


def test_the_mask_of_a_normalisation_is_of_all_channels_and_without_holes():
    image = torch.zeros(2, 7, 7)
    image[0, 1:6, 1:6] = torch.arange(1, 26).reshape(5, 5).float()
    image[1, 2, 2] = 3
    image[0, 3, 3] = 0
    found = NormalizeNonzerod("image", [0, 1])({"image": image})
    for channel, before in zip(found["image"], image, strict=True):
        assert channel[1:6, 1:6].mean().item() == pytest.approx(0, abs=1e-6)
        assert channel[1:6, 1:6].std(correction=0).item() == pytest.approx(1, abs=1e-6)
        assert not channel[0].any()
        assert torch.equal(before[0], torch.zeros(7))


def test_an_image_of_zeros_stays_whole_and_finite():
    data = {"image": torch.zeros(1, 3, 4)}
    assert CropNonzerod("image", "image")(data)["image"].shape == (1, 3, 4)
    assert not NormalizeNonzerod("image", [0])(data)["image"].any()


def test_resampling_follows_the_affine_and_has_an_inverse():
    affine = torch.diag(torch.tensor([0.8, -0.8, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(1, 10, 12, 5), affine=affine)
    label = MetaTensor((image > 0.5).float(), affine=affine)
    step = {"_target_": "medtl_ext.transfer.sources.nnunet.ResampleSpacingd", "pixdim": [1.6, 0.4, -1]}
    resample = Compose(transforms_of([step]))
    done = resample({"image": image, "label": label})
    assert done["image"].shape == done["label"].shape == (1, 5, 24, 5)
    torch.testing.assert_close(done["image"].pixdim, torch.tensor([1.6, 0.4, 4.0]).double())
    assert set(done["label"].unique().tolist()) == {0, 1}
    assert torch.equal(done["label"][..., 1::2, :], done["label"][..., ::2, :])
    corners = [torch.tensor([-0.5] * 3 + [1.0]).double(), torch.tensor([4.5, 23.5, 4.5, 1.0]).double()]
    for corner, before in zip(corners, ([-0.5] * 3, [9.5, 11.5, 4.5]), strict=True):  # borders stay where they are
        torch.testing.assert_close(done["image"].affine @ corner, affine @ torch.tensor([*before, 1.0]).double())
    back = resample.inverse(done)
    assert back["image"].shape == image.shape
    torch.testing.assert_close(back["image"].affine, affine)
    assert not back["image"].applied_operations


def test_thick_slices_are_resampled_by_themselves():
    affine = torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.arange(4.0).expand(1, 3, 3, 4).clone(), affine=affine)
    done = ResampleSpacingd("image", [1, 1, 2.5])({"image": image})["image"]
    assert done[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    smooth = ResampleSpacingd("image", [1, 1, 2.5], mode=1, separate=False)({"image": image})["image"]
    assert smooth[0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_windows_lie_evenly_and_cover_small_and_large_images():
    places = []

    def network(patch):
        places.append(patch[0, 0].flatten()[0].item())
        return patch, 2 * patch

    image = torch.arange(110.0)[None, None]
    one, two = sliding_window(image, [64], network)
    assert places == [0, 23, 46]  # the example in nnU-Net's source
    torch.testing.assert_close(torch.cat([one, two]), torch.cat([image, 2 * image]))
    small = torch.rand(2, 1, 3, 9)
    torch.testing.assert_close(sliding_window(small, [8, 4], network)[0], small)


# The same predictions as nnU-Net


@needs_architectures
@pytest.mark.parametrize("patient", ["oasis_1000_L", "oasis_1006_L"])
def test_a_trained_folder_gives_the_probabilities_that_nnunet_gave(shared_data, patient):
    folder = shared_data / "real" / "networks" / "nnunet_hippocampus"
    if not folder.is_dir():
        pytest.skip("reference data (../shared/data/real) is not beside this checkout")
    files = {"image": shared_data / "real" / "hippocampus" / "oasis" / f"{patient}_T1.nii.gz"}
    card = read_card(nnunet_card(folder))
    steps = Compose([LoadImaged("image", ensure_channel_first=True), *transforms_of(card.preprocessing, ["image"])])
    image = steps(files)["image"]
    with torch.no_grad():
        found = untouched(card, channels=1)(image[None])[0].softmax(0)
    found = steps.inverse({"image": convert_to_dst_type(found, image)[0]})["image"].numpy()
    found[0] += 1 - found.sum(0)  # where the image is zero all is background
    expected = np.load(folder / "reference_probabilities.npz")[patient].transpose(0, 3, 2, 1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("nnunetv2") is None, reason="pip install nnunetv2 for this test")
def test_networks_trained_here_predict_as_nnunet_does(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, tmp_path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"image ([\d.e+-]+) logits ([\d.e+-]+) probabilities ([\d.e+-]+)", done.stdout)
    assert len(rows) == 6
    assert np.all(np.array(rows, dtype=float) < 1e-3)
