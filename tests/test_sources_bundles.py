"""Untrusted bundles: what becomes a source card, that none of their code runs, and what the list allows."""

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai.networks.nets
import monai.transforms
import numpy as np
import pytest
import torch
from bundle_runs import refused
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, MapTransform
from torch import nn

from medtl_ext.networks import load_weights, read_weights
from medtl_ext.transfer.sources.allowed import ALLOWED, built_network, inside, kind_of_transform, transforms_of
from medtl_ext.transfer.sources.bundle import bundle_card

UNET = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [4, 4, 4, 4, 4, 4]}
IMAGE = {"type": "image", "num_channels": 1, "spatial_shape": [32, 32], "channel_def": {"0": "T1"}, "modality": "MR"}
CLASSES = {"0": "background", "1": "lesion"}
SCORES = {"type": "image", "format": "segmentation", "num_channels": 2, "spatial_shape": [32, 32]}
SCORES |= {"channel_def": CLASSES}
STEPS = [{"_target_": "LoadImaged", "keys": "image"}, {"_target_": "ScaleIntensityd", "keys": "image"}]


def formats(image: Mapping[str, Any] = IMAGE, scores: Mapping[str, Any] = SCORES) -> dict[str, Any]:
    return {"network_data_format": {"inputs": {"image": dict(image)}, "outputs": {"pred": dict(scores)}}}


@pytest.fixture
def bundle(tmp_path) -> Callable[..., Path]:
    """Writes a bundle with configs (mappings, or text as it is) and weights of `UNET`."""

    def write(config: Any = None, metadata: Any = None, *, file: str = "inference.json", **parts: Any) -> Path:
        folder = tmp_path / "stranger"
        for part in ("configs", "models"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        content = {"network_def": UNET, "preprocessing": STEPS} | parts if config is None else config
        for name, one in ((file, content), ("metadata.json", formats() if metadata is None else metadata)):
            (folder / "configs" / name).write_text(one if isinstance(one, str) else json.dumps(one))
        torch.save(built_network(UNET).state_dict(), folder / "models" / "model.pt")
        return folder

    return write


@pytest.fixture
def mark(tmp_path) -> Path:
    """Fails a test if hostile code left its mark."""
    file = tmp_path / "ran"
    yield file
    assert not file.exists()


# What becomes a card


def test_a_bundle_becomes_a_card(bundle):
    steps = [
        {"_target_": "LoadImaged", "keys": ["@keys#0", "label"], "reader": "$unknown"},
        {"_target_": "Orientationd", "keys": ["image", "label"], "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": ["image", "label"], "pixdim": "@spacing", "mode": ["bilinear", "nearest"]},
        {"_target_": "AsDiscreted", "keys": "label", "to_onehot": 2},
        {"_target_": "CastToTyped", "keys": "image", "dtype": "$torch.float32"},
    ]
    window = {"_target_": "SlidingWindowInferer", "roi_size": 32}
    folder = bundle(
        spacing=[1, 1],
        keys=["image"],
        first=steps,
        more=[{"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True}],
        preprocessing={"_target_": "Compose", "transforms": "$@first + @more"},
        inferer=window | {"overlap": 0.5, "mode": "gaussian", "device": "$x"},
        postprocessing=[{"_target_": "Activationsd", "keys": "pred", "softmax": True}],
    )
    assert bundle_card(folder) == {
        "name": "stranger",
        "modality": "MR",
        "network": UNET,
        "checkpoint": str(folder / "models" / "model.pt"),
        "dimensions": 2,
        "window": [32, 32],
        "overlap": 0.5,
        "blending": "gaussian",
        "preprocessing": [
            {"_target_": "Orientationd", "axcodes": "RAS"},
            {"_target_": "Spacingd", "pixdim": [1, 1], "mode": "bilinear"},
            {"_target_": "NormalizeIntensityd", "nonzero": True},
        ],
        "channels": ["T1"],
        "output": "logits",
        "classes": ["background", "lesion"],
    }


def test_yaml_and_a_validation_pipeline(bundle):
    text = f"network_def: {json.dumps(UNET)}\nvalidate:\n  preprocessing: {{_target_: Compose, transforms: '%steps'}}\n"
    text += f"steps: {json.dumps(STEPS)}\n"
    assert bundle_card(bundle(text, file="train.yaml"))["preprocessing"] == [{"_target_": "ScaleIntensityd"}]


def test_a_channel_that_is_drawn_is_one_that_the_target_brings(bundle):
    steps = [*STEPS, {"_target_": "AddLabelAsGuidanced", "keys": "image", "source": "label"}]
    names = {"0": "R", "1": "G", "2": "Mask"}
    card = bundle_card(bundle(metadata=formats(IMAGE | {"num_channels": 3, "channel_def": names}), preprocessing=steps))
    assert (card["channels"], card["window"]) == (["R", "G", "Mask"], [32, 32])
    assert card["preprocessing"] == [{"_target_": "ScaleIntensityd", "channels": [0, 1]}]
    image = torch.full((3, 4, 4), 5.0) * torch.arange(16).view(1, 4, 4)
    scaled = Compose(transforms_of(card["preprocessing"]))({"image": MetaTensor(image)})["image"]
    assert scaled[:2].max() == 1
    assert torch.equal(scaled[2].as_tensor(), image[2])


@pytest.mark.parametrize(
    ("names", "step", "expected"),
    [
        (["TC", "WT"], {"_target_": "Activationsd", "sigmoid": True}, ["logits", ["background", "TC", "WT"]]),
        (["Background", "kidney"], {"_target_": "Activationsd", "sigmoid": True}, ["logits", ["Background", "kidney"]]),
        (["lesion"], {"_target_": "AsDiscreted", "threshold": 0.5}, ["sigmoid", ["background", "lesion"]]),
        (["a", "b"], {"_target_": "AsDiscreted", "argmax": True}, ["logits", ["a", "b"]]),
    ],
)
def test_output_and_classes(names, step, expected, bundle):
    scores = SCORES | {"num_channels": len(names), "channel_def": dict(enumerate(names))}
    card = bundle_card(bundle(metadata=formats(scores=scores), postprocessing={"_target_": "C", "transforms": [step]}))
    assert [card["output"], card["classes"]] == expected


# What is refused, and leaves no mark


def hostile(mark: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Configs that would leave a mark if they were executed, and a part of the expected error."""
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    call = {"_target_": "os.system", "command": f"touch {mark}"}
    step, resnet = {"_target_": "ScaleIntensityd", "keys": "image"}, "monai.networks.nets.resnet"
    ran = {"_target_": "subprocess.run", "args": ["touch", str(mark)]}
    return {
        "expression": ({"network_def": UNET | {"features": f"${code}"}}, "--trust_sources true"),
        "expression as target": ({"network_def": {"_target_": f"${code}"}}, "--trust_sources true"),
        "expression as network": ({"network_def": f"${code}"}, "is the expression"),
        "reference to an expression": ({"a": f"${code}", "network_def": UNET | {"features": "@a"}}, "evaluated"),
        "call": ({"network_def": call}, "not on the list"),
        "subprocess": ({"network_def": ran}, "not on the list"),
        "path through a module": ({"network_def": call | {"_target_": "torch.nn.modules.module.os.system"}}, "list"),
        "nested": ({"network_def": UNET | {"act": call}}, "not on the list"),
        "nested in a list": ({"network_def": UNET | {"norm": ["batch", call]}}, "not on the list"),
        "function": ({"network_def": {"_target_": f"{resnet}.get_pretrained_resnet_medicalnet"}}, "list"),
        "script": ({"network_def": {"_target_": "scripts.net.Net"}}, "which needs --trust_sources true"),
        "script by path": ({"network_def": {"_target_": "scripts/net.py:Net"}}, "which needs --trust_sources true"),
        "lambda": ({"preprocessing": [step | {"_target_": "Lambdad", "func": f"$lambda x: {code}"}]}, "Lambdad"),
        "step call": ({"preprocessing": [call | {"keys": "image"}]}, "os.system"),
        "step expression": ({"preprocessing": [step | {"minv": f"${code}"}]}, "evaluated"),
        "step nested": ({"preprocessing": [step | {"minv": call}]}, "would have to be built"),
        "preprocessing": ({"preprocessing": f"${code}"}, "would have to be evaluated"),
        "disabled": ({"preprocessing": [step | {"_disabled_": f"${code}"}]}, "evaluated"),
        "callable": ({"preprocessing": [step | {"_target_": "CropForegroundd", "select_fn": "eval"}]}, "is a function"),
        "inferer": (
            {"inferer": {"_target_": "scripts.net.Inferer"}},
            "expected one of whole images or of sliding windows",
        ),
        "window": ({"inferer": {"_target_": "SlidingWindowInferer", "roi_size": f"${code}"}}, "evaluated"),
        "another file": ({"network_def": "%../../other.json::network"}, "expression"),
        "circle": ({"a": "@b", "b": "@a", "network_def": UNET | {"features": "@a"}}, "RecursionError"),
        "nowhere": ({"network_def": UNET | {"features": "@a#b"}}, "refers to a#b"),
        "unknown argument": ({"network_def": UNET | {"colour": "red"}}, "unexpected keyword argument 'colour'"),
        "unknown argument of a step": ({"preprocessing": [step | {"colour": "red"}]}, "unexpected keyword argument"),
        "unknown argument of a pad": (
            {"preprocessing": [step | {"_target_": "SpatialPadd", "spatial_size": 4, "colour": 1}]},
            "unexpected keyword argument 'colour'",
        ),
        "huge number": ({"network_def": UNET | {"out_channels": 10**100}}, "is too large or no number"),
        "no number": ({"network_def": UNET | {"dropout": float("nan")}}, "is too large or no number"),
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_hostile_configs_leave_no_mark(name, bundle, mark):
    parts, reason = hostile(mark)[name]
    folder = bundle(imports=[f"$open({str(mark)!r}, 'w')"], **parts)
    (folder / "scripts").mkdir()
    for file in ("__init__", "net"):
        (folder / "scripts" / f"{file}.py").write_text(f"open({str(mark)!r}, 'w')")
    message = refused(lambda: bundle_card(folder))
    assert reason in message
    assert "\n" not in message


def test_what_does_not_matter_is_never_looked_at(bundle, mark):
    code = f"$open({str(mark)!r}, 'w')"
    step = {"_target_": "LoadImaged", "keys": "image", "converter": code, "_requires_": code}
    folder = bundle(
        imports=[code],
        initialize=[code],
        preprocessing=[step],
        network_def=UNET | {"_requires_": code, "_mode_": "debug", "_desc_": code},
        network="$@network_def.to(@device)",
    )
    card = bundle_card(folder)
    assert (card["network"], card["preprocessing"]) == (UNET, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON or YAML"),
        ("[" * 100_000, "no JSON or YAML"),
        ('{"a": 1' + "0" * 5000 + "}", "no JSON or YAML"),
        ("[]", "holds no mapping"),
        ("{}", "defines a network"),
        (" " * 2**24 + "{}", "larger than"),
    ],
)
def test_damaged_configs(text, reason, bundle):
    assert reason in refused(lambda: bundle_card(bundle(text)))


def test_yaml_makes_no_objects_and_its_aliases_fill_no_memory(bundle, mark):
    for text in (f"network_def: !!python/object/apply:os.system ['touch {mark}']", "a: " + "[" * 20_000):
        assert "no JSON or YAML" in refused(lambda text=text: bundle_card(bundle(text, file="inference.yaml")))
        (bundle() / "configs" / "inference.yaml").unlink()
    lines = ["l0: &l0 [1, 1]", *(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 40))]
    text = "\n".join([*lines, f"network_def: {json.dumps(UNET | {'features': '@l39'})}"])
    folder = bundle(text, file="inference.yaml")
    (folder / "configs" / "inference.json").unlink()
    assert "too large" in refused(lambda: bundle_card(folder))


@pytest.mark.parametrize("deep", ["network", "preprocessing"])
def test_deep_nesting(deep):
    value: Any = 1
    for _ in range(5000):
        value = [value]
    given = {"_target_": "BasicUNet", "features": value}
    step = {"_target_": "ScaleIntensityd", "minv": value}
    ask = (lambda: built_network(given)) if deep == "network" else (lambda: transforms_of([step]))
    assert "nested too deeply" in refused(ask)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"network_data_format": {"inputs": {"z": {"type": "noise"}}}}, "expected an image"),
        (formats(scores={"type": "tuples", "format": "points"}), "expected class scores"),
        ({"network_data_format": [1]}, "cannot be read as a bundle"),
        (formats(IMAGE | {"num_channels": 10**12}), "num_channels"),
    ],
)
def test_metadata_that_say_no(metadata, reason, bundle):
    assert reason in refused(lambda: bundle_card(bundle(metadata=metadata)))


def test_links_and_paths_that_leave_the_folder(bundle, tmp_path, mark):
    folder, outside = bundle(), tmp_path / "outside"
    outside.mkdir()
    (outside / "net.py").write_text(f"open({str(mark)!r}, 'w')")
    for name in ("models/model.pt", "configs/metadata.json", "configs/inference.json"):
        inner = folder / name
        inner.rename(outside / inner.name)
        inner.symlink_to(outside / inner.name)
        assert f"{name} is outside the source's folder" in refused(lambda: bundle_card(folder))
        inner.unlink()
        (outside / inner.name).rename(inner)
    bundle_card(folder)
    (folder / "net.py").symlink_to(outside / "net.py")
    for file in ("net.py", "../outside/net.py", str(outside / "net.py")):
        definition = {"_target_": f"{file}:Net"}
        assert "is outside" in refused(lambda definition=definition: built_network(definition, folder, trust=True))
    assert inside(folder, "configs/../models/model.pt") == folder / "models" / "model.pt"


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_weights_are_tensors(bundle, mark):
    weights = bundle() / "models" / "model.pt"
    torch.save({"a": torch.zeros(1), "b": _Touch(mark)}, weights)
    assert "holds more than tensors" in refused(lambda: read_weights(weights))
    weights.write_bytes(pickle.dumps(_Touch(mark)))
    assert "cannot be read as weights" in refused(lambda: read_weights(weights))
    with zipfile.ZipFile(weights, "w") as file:
        file.writestr("../../ran", "x")
        file.writestr("archive/data.pkl", pickle.dumps(_Touch(mark)))
    assert "cannot be read as weights" in refused(lambda: read_weights(weights))
    weights.unlink()
    assert "has no weights" in refused(lambda: bundle_card(weights.parent.parent))


def test_nothing_is_downloaded(monkeypatch):
    for name in ("torch.hub.load_state_dict_from_url", "monai.networks.nets.senet.load_state_dict_from_url"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a download"))
    senet = {"_target_": "SEResNet50", "spatial_dims": 2, "in_channels": 3, "num_classes": 2, "pretrained": True}
    assert isinstance(built_network(senet), monai.networks.nets.SEResNet50)
    by_default = {"_target_": "EfficientNetBN", "model_name": "efficientnet-b0", "spatial_dims": 2}
    assert isinstance(built_network(by_default), nn.Module)
    assert "no plain name" in refused(lambda: built_network(by_default | {"model_name": "hf-hub:a/b"}))


@pytest.mark.parametrize("target", ["timm.create_model", "segmentation_models_pytorch.Unet"])
def test_optional_packages(target):
    name = target.partition(".")[0]
    if name not in sys.modules and not any((Path(path) / name).is_dir() for path in sys.path):
        assert f"needs the package {name}" in refused(lambda: built_network({"_target_": target}))
        return
    pytest.importorskip(name, exc_type=Exception)
    arguments = {"model_name": "resnet10t", "pretrained": True} if name == "timm" else {"encoder_name": "resnet18"}
    assert isinstance(built_network({"_target_": target} | arguments), nn.Module)


def test_a_network_that_is_too_large():
    large = UNET | {"features": [100_000] * 6}
    assert "parameters; at most" in refused(lambda: built_network(large))


# With trust


def test_with_trust_expressions_are_evaluated(bundle):
    folder = bundle(
        imports=["$import math"],
        names=["a", "b"],
        network_def=UNET | {"out_channels": "$len(@names)", "features": "$[int(math.sqrt(16))] * 6"},
        preprocessing=[{"_target_": "ScaleIntensityd", "keys": "image", "minv": "$torch.tensor(1.0).numpy().max()"}],
    )
    assert "evaluated" in refused(lambda: bundle_card(folder))
    card = bundle_card(folder, trust=True)
    assert (card["network"], card["preprocessing"]) == (UNET, [{"_target_": "ScaleIntensityd", "minv": 1.0}])
    load_weights(built_network(card["network"]), card["checkpoint"], min_share=1.0)
    weighted = {"_target_": "torch.nn.CrossEntropyLoss", "weight": "$torch.tensor([1.0, 2.0])", "reduction": "sum"}
    definition = bundle_card(bundle(network_def=weighted), trust=True)["network"]
    assert definition["weight"] == {"_target_": "torch.tensor", "data": [1.0, 2.0]}
    assert built_network(definition).weight.tolist() == [1, 2]
    failing = bundle(network_def=UNET | {"out_channels": "$1 / 0"})
    assert "cannot be evaluated (division by zero)" in refused(lambda: bundle_card(failing, trust=True))
    object_ = bundle(network_def=UNET | {"out_channels": "$object()"})
    assert "a card cannot hold" in refused(lambda: bundle_card(object_, trust=True))


def test_with_trust_its_own_files_are_run(bundle, tmp_path):
    folder = bundle(network_def={"_target_": "scripts.net.Net", "width": 3})
    (folder / "scripts").mkdir()
    (folder / "scripts" / "__init__.py").touch()
    (folder / "scripts" / "beside.py").write_text("from torch.nn import Conv2d")
    imports = "from scripts.beside import Conv2d\nfrom .beside import Conv2d as same\nassert same.__name__\n"
    (folder / "scripts" / "net.py").write_text(
        f"{imports}class Net(Conv2d):\n    def __init__(self, width): super().__init__(1, width, 1)"
    )
    card = bundle_card(folder, trust=True)
    assert card["network"] == {"_target_": "scripts/net.py:Net", "width": 3}
    assert built_network(card["network"], folder, trust=True).out_channels == 3
    assert not {"scripts", "scripts.beside"} & sys.modules.keys()
    assert str(folder) not in sys.path
    assert not list(folder.rglob("__pycache__"))
    for wrong, reason in (("Nett", "there is no class"), ("Conv", "there is no class")):
        definition = card["network"] | {"_target_": f"scripts/net.py:{wrong}"}
        assert reason in refused(lambda definition=definition: built_network(definition, folder, trust=True))
    (folder / "scripts" / "net.py").write_text("1 / 0")
    assert "cannot be imported (division by zero)" in refused(lambda: bundle_card(folder, trust=True))


def test_with_trust_a_program_is_a_source(bundle):
    folder = bundle(network_def="$1")
    (folder / "models" / "model.ts").touch()
    assert "is the expression" in refused(lambda: bundle_card(folder))
    card = bundle_card(folder, trust=True)
    assert "network" not in card
    assert card["checkpoint"] == str(folder / "models" / "model.ts")


# The list


@pytest.mark.parametrize("kind", sorted(ALLOWED["transforms"]))
def test_the_list_of_transforms(kind):
    assert ALLOWED["transforms"][kind]
    for name in ALLOWED["transforms"][kind]:
        assert kind_of_transform(name) == kind
        if kind == "gone":
            assert not hasattr(monai.transforms, name)
        elif "." not in name:
            transform = getattr(monai.transforms, name)
            assert issubclass(transform, MapTransform)
            spatial = kind in ("spatial", "resampled", "foreground")
            assert issubclass(transform, InvertibleTransform) or not spatial
            assert kind_of_transform(f"monai.transforms.{name[:-1]}Dict") == kind


EXAMPLES = {
    "Orientationd": {"axcodes": "LPS"},
    "Flipd": {"spatial_axis": 0},
    "Rotate90d": {"k": 1},
    "SpatialPadd": {"spatial_size": [12, 12, 12], "value": -1000},
    "BorderPadd": {"spatial_border": 2},
    "DivisiblePadd": {"k": 7, "mode": "reflect"},
    "ResizeWithPadOrCropd": {"spatial_size": [6, 12, 8]},
    "CenterSpatialCropd": {"roi_size": [6, 6, 6]},
    "CenterScaleCropd": {"roi_scale": 0.5},
    "SpatialCropd": {"roi_start": [1, 1, 1], "roi_end": [8, 8, 8]},
    "Spacingd": {"pixdim": [2, 2, 2], "align_corners": True},
    "Resized": {"spatial_size": [5, 5, 5], "mode": "trilinear", "align_corners": True, "anti_aliasing": True},
    "Zoomd": {"zoom": 0.5, "mode": "trilinear", "keep_size": False},
    "Rotated": {"angle": 0.2, "mode": "bilinear", "keep_size": False},
    "CropForegroundd": {"margin": 1},
    "ShiftIntensityd": {"offset": 1.0},
    "StdShiftIntensityd": {"factor": 1.0},
    "ScaleIntensityRanged": {"a_min": 0, "a_max": 100, "b_min": 0, "b_max": 1, "clip": True},
    "ScaleIntensityRangePercentilesd": {"lower": 1, "upper": 99, "b_min": 0, "b_max": 1},
    "NormalizeIntensityd": {"nonzero": True, "channel_wise": True},
    "ThresholdIntensityd": {"threshold": 5, "above": True, "cval": 0},
    "ClipIntensityPercentilesd": {"lower": 1, "upper": 99},
    "AdjustContrastd": {"gamma": 2.0},
    "MedianSmoothd": {"radius": 1},
    "SavitzkyGolaySmoothd": {"window_length": 3, "order": 1},
    "GaussianSmoothd": {"sigma": 0.5},
    "medtl_ext.transfer.sources.nnunet.ResampleSpacingd": {"pixdim": [2, 2, 2]},
    "medtl_ext.transfer.sources.nnunet.NormalizeNonzerod": {"only": [0]},
}


@pytest.mark.parametrize(
    "step",
    [
        {"_target_": "Resized", "spatial_size": [16, 16, -1], "mode": "bilinear"},
        {"_target_": "Zoomd", "zoom": [0.8, 0.8, 1.0], "keep_size": False, "mode": "bilinear"},
        {"_target_": "Spacingd", "pixdim": [1.25, 1.25, 1.0]},
    ],
    ids=lambda step: step["_target_"],
)
def test_a_label_stays_on_its_image_when_both_are_resampled(step):
    place = torch.arange(20.0).expand(1, 20, 20)[..., None]  # the value is the place
    image, label = (MetaTensor(place.clone(), affine=torch.eye(4)) for _ in range(2))
    item = Compose(transforms_of([step]))({"image": image, "label": label})
    off = (item["label"] - item["image"])[:, :, 1:-1]
    assert abs(float(off.mean())) < 0.1  # with torch's "nearest" of sizes it is 0.4 of a voxel


@pytest.mark.parametrize(
    "name",
    [name for kind in ("spatial", "resampled", "foreground", "intensity") for name in ALLOWED["transforms"][kind]],
)
def test_every_transform_of_the_list_does_as_its_kind_says(name):
    label = torch.zeros(1, 10, 10, 10)
    label[:, 3:7, 3:7, 3:7] = 7
    image = torch.rand(1, 10, 10, 10) * 50 * (label + 1)
    image[:, :2] = 0
    data = {"image": MetaTensor(image.clone()), "label": MetaTensor(label.clone())}  # some of MONAI's work in place
    transforms = transforms_of([{"_target_": name} | EXAMPLES.get(name, {})])
    kind, done = kind_of_transform(name), Compose(transforms)(dict(data))
    if kind == "intensity":
        assert [one.keys for one in transforms] == [("image",)]
        assert done["image"].shape == image.shape
        assert not torch.equal(done["image"].as_tensor(), image)
        assert torch.equal(done["label"].as_tensor(), label)
        return
    assert done["image"].shape == done["label"].shape
    assert set(np.unique(done["label"])) <= {0, 7}
    assert 7 in done["label"]
    back = Compose(transforms).inverse(done)
    assert back["image"].shape == back["label"].shape == image.shape
    assert set(np.unique(back["label"])) <= {0, 7}


def test_channels_and_inferers_of_the_list():
    for name, own in ALLOWED["channels"].items():
        assert kind_of_transform(name) == "channels"
        assert isinstance(own, int | str)
    assert all(hasattr(monai.inferers, name) for name in ALLOWED["inferers"])
    for key, value in ALLOWED["constants"].items():
        assert str(getattr(monai.utils.CommonKeys, key.rpartition(".")[2])) == value


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("Spacingd", "not on the list"),
        ({"_target_": "RandFlipd"}, "RandFlipd is not on the list"),
        ({"_target_": ["Spacingd"]}, "not on the list"),
        ({"_target_": "Flipd", "keys": "image"}, "has the argument keys, which is set elsewhere"),
        ({"_target_": "Flipd", "lazy": True}, "has the argument lazy, which is set elsewhere"),
        ({"_target_": "Spacingd"}, "missing a required argument: 'pixdim'"),
        ({"_target_": "Orientationd", "axcodes": "@axes"}, "is an expression or reference"),
        ({"_target_": "ScaleIntensityd", "channels": [-1]}, "expected a list of numbers from 0"),
        ({"_target_": "Resized", "spatial_size": [8], "size_mode": "x"}, "cannot be built from its arguments"),
    ],
    ids=str,
)
def test_steps_that_are_refused(step, reason):
    assert reason in refused(lambda: transforms_of([step]))


def test_preprocessing_is_a_list():
    assert "expected a list" in refused(lambda: transforms_of({"_target_": "Flipd"}))
    transform = transforms_of([{"_target_": "ScaleIntensityd", "channels": [2]}])[0]
    assert "but the image has 1" in refused(lambda: transform({"image": torch.rand(1, 2, 2)}))


# MONAI's zoo

ZOO = {
    "spleen_ct_segmentation": (3, ["image"], ["background", "spleen"]),
    "endoscopic_inbody_classification": (2, ["R", "G", "B"], ["in body", "out body"]),
    "renalStructures_CECT_segmentation": (3, ["artery", "vein", "excret"], None),
    "ventricular_short_axis_3label": (2, ["image"], ["background", "lv_pool", "myocardium", "rv_pool"]),
    "brats_mri_segmentation": (3, ["T1c", "T1", "T2", "FLAIR"], None),
}
LEFT_OUT = {
    "mednist_gan": "its network takes latent (tuples); expected an image",
    "lung_nodule_ct_detection": "expected class scores",
    "renalStructures_UNEST_segmentation": "scripts/networks/unest.py:UNesT is code",
    "vista3d": "is the expression",
}


@pytest.mark.parametrize("name", [*ZOO, *LEFT_OUT])
def test_bundles_of_the_zoo(name, shared_data, tmp_path):
    source = shared_data / "model_zoo" / name
    if not source.is_dir():
        pytest.skip(f"the zoo's configs are not among the reference data (../shared/data/model_zoo/{name})")
    folder = tmp_path / name
    for file in source.rglob("*"):
        if file.suffix in (".json", ".yaml", ".py"):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (folder / "models").mkdir()
    (folder / "models" / "model.pt").touch()
    if name in LEFT_OUT:
        assert LEFT_OUT[name] in refused(lambda: bundle_card(folder))
        return
    card, (dims, channels, classes) = bundle_card(folder), ZOO[name]
    assert (card["dimensions"], card["channels"]) == (dims, channels)
    assert classes is None or card["classes"] == classes
    transforms_of(card["preprocessing"])
    built_network(card["network"], folder)
