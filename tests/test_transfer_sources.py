"""Sources: what a list of them means, bundles of strangers, what a network must fit, and what a pool is kept for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bundle_runs import DATASETS, SOURCE_SELECTION, bundle_of_a_stranger, refused, toy_collection
from monai.networks.nets import BasicUNet, ResNet

from medtl_ext.transfer import ClassificationTask, SegmentationTask, Source
from medtl_ext.transfer.sources import built, find_sources

UNET = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
RESNET = {
    "_target_": "ResNet",
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "block_inplanes": [4, 4, 8, 8],
    "spatial_dims": 2,
    "n_input_channels": "@in_channels",
    "num_classes": "@n_classes",
}


@pytest.fixture
def collection(tmp_path) -> str:
    return str(toy_collection(tmp_path / "toy"))


@pytest.fixture
def find(collection):
    target = SegmentationTask("A-T2-ED", collection=collection)
    return lambda *entries, **options: find_sources(list(entries), target, collection=collection, **options)


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a network."""

    def write(network, name="net"):
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
        return str(tmp_path / f"{name}.pt")

    return write


# What a list means


def test_a_task_brings_its_tags_size_and_classes(find):
    one, two = find("B-FLAIR-ED", "B-T2-both")
    assert one.tags == {"institution": "B", "modality": "FLAIR", "objective": "ED"}
    assert (one.kind, one.size, one.n_classes, two.n_classes) == ("task", 2, 2, 3)


def test_a_checkpoint_takes_what_it_is_given(find):
    (one,) = find({"name": "ours", "checkpoint": "x.pt", "task": "B-T2-both", "modality": "T2star", "encoder": "conv"})
    assert one.tags == {"institution": "B", "modality": "T2star", "objective": "both"}
    assert (one.kind, one.n_classes, one.size, one.encoder) == ("checkpoint", 3, 2, "conv")
    (one,) = find({"checkpoint": "some/where.pt", "n_classes": 4, "convolutions": ["a", "b"]})
    assert (one.name, one.n_classes, one.size, one.convolutions) == ("where", 4, None, ["a", "b"])


def test_the_target_is_not_its_own_source(find):
    own, other = find("A-T2-ED", "B-T2-ED")
    assert (own.own, own.left_out) == (True, "it is the target itself")
    assert (other.own, other.left_out) == (False, None)


def test_the_targets_own_model_is_known_however_its_path_is_written(mnist, monkeypatch, tmp_path):
    path, other = mnist(n_classes=3), mnist("other")
    target = ClassificationTask(path)
    shutil.copy(path, tmp_path / "copy.npz")
    described = {"name": "described", "medmnist": "tinymnist.npz", "class_names": ["a", "b", "c"]}
    (tmp_path / "described.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    found = find_sources(["tinymnist.npz", "copy.npz", "described.json", {"name": "o", "task": other}], target)
    assert [source.own for source in found] == [True, True, True, False]
    assert all(source.left_out is None for source in found)  # scored, never ranked
    assert (found[0].name, found[0].n_classes, found[0].size) == ("tinymnist", 3, 12)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one source"),
        (["B-T2-ED", "B-T2-ED"], "names B-T2-ED twice"),
        (["B-T2-ED", {"name": "B-T2-ED", "checkpoint": "x.pt"}], "names B-T2-ED twice"),
        ([{"name": "scratch", "checkpoint": "x.pt"}], "named scratch, which means training without one"),
        ([{"name": "zero_shot", "checkpoint": "x.pt"}], "named zero_shot"),
        (["B-T2-ED", {"checkpoint": "full.pt"}], "named full"),
        ([{"weights": "x.pt"}], "is no task"),
        ([3], "is no task"),
        ([{"checkpoint": "x.pt", "modalty": "T2"}], "did you mean 'modality'"),
        ([{"checkpoint": "x.pt", "n_classes": "two"}], "n_classes is 'two'; expected a whole number"),
        ([{"checkpoint": "x.pt", "convolutions": "stem"}], "convolutions is 'stem'; expected a list of two names"),
        (["B-T2-EDD"], "did you mean 'ED'"),
        (["A-T2-ED"], "no source is left: A-T2-ED is the target's own model"),
        ([{"bundles": "nowhere"}], "does not exist"),
    ],
    ids=str,
)
def test_sources_that_make_no_sense_are_refused(entries, message, find):
    assert message in refused(lambda: find(*entries))


def test_datasets_that_cannot_be_had_are_refused(mnist):
    assert ClassificationTask(mnist()).name == "tinymnist"
    for where, message in {
        "wrong.csv": "is no .npz file, no folder",
        "tinymnist": "not of the form",
        "x.npz": "exist",
    }.items():
        assert message in refused(lambda where=where: ClassificationTask(where))


# Bundles of strangers


def unet(**changed) -> dict:
    return UNET | changed


def test_a_bundle_is_read_without_running_it(tmp_path, find):
    marker = tmp_path / "ran"
    config = {
        "imports": [f"$__import__('pathlib').Path({str(marker)!r}).touch()"],
        "channels": [4, 8],
        "network_def": unet(channels="@channels"),
        "network": "$@network_def.to('cpu')",
    }
    bundle_of_a_stranger(tmp_path / "zoo" / "good", config, weights=built(UNET).state_dict())
    (one,) = find({"bundles": str(tmp_path / "zoo")})
    assert (one.left_out, one.network) == (None, UNET)
    assert not one.build({}, image_shape=[1, 16, 16], per_pixel=True).training
    assert not marker.exists()


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (unet(channels="$[4, 8]"), "--trust_bundles true"),
        (unet(channels="@nowhere"), "`@nowhere` is not defined"),
        (unet(act={"_target_": "os.system", "command": "true"}), "would have to be built"),
        ({"_target_": "os.system", "command": "true"}, "not one of monai.networks.nets or torch.nn"),
        ({"_target_": "monai.networks.utils.one_hot"}, "not one of"),
        ({"_target_": "$print"}, "its network needs '$print' evaluated"),
        (unet(channels=3), "cannot be built"),
        (unet(channels=[4, 16]), "does not fit"),
        ({"unet": 1}, "defines a network"),
    ],
    ids=str,
)
def test_a_bundle_that_cannot_be_used_is_left_out_with_the_reason(definition, reason, tmp_path, find):
    bundle_of_a_stranger(tmp_path / "zoo" / "bad", {"network_def": definition}, weights=built(UNET).state_dict())
    (one,) = find({"bundles": str(tmp_path / "zoo")})
    assert reason in one.left_out


def test_damaged_bundles_are_left_out_with_the_reason(tmp_path, find):
    zoo, reasons = tmp_path / "zoo", {"a": "no JSON", "b": "without weights", "c": "cannot be read"}
    for name in reasons:
        bundle_of_a_stranger(zoo / name, "{" if name == "a" else {"network_def": UNET})
    (zoo / "c" / "models" / "model.pt").write_bytes(b"no weights")
    for one in find({"bundles": str(zoo)}):
        assert reasons[one.name] in one.left_out


def test_expressions_are_evaluated_when_the_user_trusts_the_bundle(tmp_path, find):
    config = {"network_def": unet(channels="$[4, 4 + 4]")}
    bundle_of_a_stranger(tmp_path / "zoo" / "one", config, weights=built(UNET).state_dict())
    (one,) = find({"bundles": str(tmp_path / "zoo")}, trust_bundles=True)
    assert (one.left_out, one.network["channels"]) == (None, [4, 8])


# What a network must fit


@pytest.mark.parametrize(
    ("network", "source", "message"),
    [
        (BasicUNet(2, 1, 2, features=(4,) * 6), {"network": UNET}, "does not fit this UNet"),
        (built(unet(in_channels=4)), {"network": unet(in_channels=4)}, "takes 4 channels, the target's images have 1"),
        (built(unet(spatial_dims=3)), {"network": unet(spatial_dims=3)}, "network is 3D, the target's images are 2D"),
        (built(UNET), {"network": {"_target_": "os.system"}}, "network os.system is not one of"),
        (built(UNET), {"network": unet(channels=3)}, "cannot be built"),
        (ResNet("basic", [1] * 4, [4] * 4, 2, 1, num_classes=2), {}, "does not give one prediction per pixel"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_segmentation_source_that_does_not_fit_is_refused_in_one_line(network, source, message, weights):
    own = RESNET | {"num_classes": 2, "block_inplanes": [4] * 4, "n_input_channels": 1}
    one = Source("ours", "checkpoint", checkpoint=weights(network), **source)
    text = refused(lambda: one.build(own, image_shape=[1, 16, 16], per_pixel=True))
    assert text.startswith("source ours: ")
    assert message in text


def test_a_classification_source_that_does_not_fit_is_refused_in_one_line(weights):
    def build(network=None, checkpoint=None, n_classes=2):
        path = checkpoint or weights(built(RESNET | {"num_classes": 2, "n_input_channels": 1}))
        source = Source("ours", "checkpoint", checkpoint=path, network=network, n_classes=n_classes)
        return source.build(RESNET, image_shape=[1, 32, 32], per_pixel=False)

    assert not build().training
    rgb = weights(built(RESNET | {"num_classes": 2, "n_input_channels": 3}), "rgb")
    asked = "its network takes 3 channels, the target's images have 1; give --in_channels 3, which repeats grey images"
    assert asked in refused(lambda: build(RESNET | {"n_input_channels": 3}))
    assert asked in refused(lambda: build(checkpoint=rgb))  # the definition takes its channels from the target
    assert "does not fit this ResNet" in refused(lambda: build(n_classes=3))
    dense = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [4] * 6}
    path = weights(built(dense), "unet")
    assert "does not give 2 class scores an image" in refused(lambda: build(dense, path))


# What a pool is kept for


def test_a_pool_is_trained_again_when_its_collection_or_its_training_change(collection, tmp_path):
    """A network is never taken for one that was trained on other patients, or in another way."""

    def folder(path=collection, **changed):
        return SOURCE_SELECTION.pool_job("B-T2-ED", collection=str(path), **changed).output_dir

    before = folder()
    moved = shutil.copytree(Path(collection).parent, tmp_path / "moved") / "collection.json"
    assert folder(moved) == before
    for changed in ({"pool_epochs": 2}, {"optimizer#_target_": "torch.optim.SGD"}, {"lr_scheduler#power": 2.0}):
        assert folder(**changed) != before, changed
    assert folder(loss={"_target_": "x"}) != before
    for changed in ({"target_task": "A-FLAIR-ED"}, {"method": "paper"}, {"sources": ["x"]}, {"output_dir": "x"}):
        assert folder(**changed, pixels=7) == before, changed
    content = json.loads(moved.read_text())
    content["subjects"][0]["split"] = "test"
    moved.write_text(json.dumps(content))
    assert folder(moved) != before
    assert folder(source_collection=str(moved)) == folder(moved)
    moved.unlink()
    assert "does not exist" in refused(lambda: folder(moved))


def test_a_pool_is_trained_again_when_its_images_change(mnist, tmp_path):
    def folder(where, **changed):
        return DATASETS.pool_job(str(where), **changed).output_dir.name

    images = tmp_path / "images" / "cat"
    images.mkdir(parents=True)
    (images / "1.png").write_bytes(b"one")
    before = folder(images.parent)
    assert folder(images.parent) == before
    (images / "1.png").write_bytes(b"two")
    assert folder(images.parent) != before
    path = mnist()
    before = folder(path)
    same = [{"decide_by": "leep"}, {"train_per_class": 7}, {"grid": {"learning_rate": [1.0]}}, {"target_task": "x"}]
    assert {folder(path, **changed) for changed in (*same, {"sources": ["a"]})} == {before}
    other = [{"pool_epochs": 3}, {"image_size": 64}, {"network_def#widen_factor": 1.0}, {"network": RESNET}]
    assert len({before, *(folder(path, **changed) for changed in other)}) == 5
