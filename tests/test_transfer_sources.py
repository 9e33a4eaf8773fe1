"""Sources: what a list means, what a network must fit, what a run takes from a source, when a pool is used again."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bundle_runs import DATASETS, SOURCE_SELECTION, bundle_of_a_stranger, refused, toy_collection
from monai.networks.nets import BasicUNet, ResNet
from torch import nn

from medtl_ext.transfer import Card, ClassificationTask, SegmentationTask, SingleSource, Source, read_card
from medtl_ext.transfer.sources.allowed import built_network
from medtl_ext.transfer.sources.pool import find_sources, train_sources

UNET = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
OWN = {"_target_": "BasicUNet", "spatial_dims": 2, "features": [4] * 6}
OWN |= {"in_channels": "@in_channels", "out_channels": "@n_classes"}
RESNET = {"_target_": "ResNet", "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8]}
RESNET |= {"spatial_dims": 2, "n_input_channels": "@in_channels", "num_classes": "@n_classes"}


def unet(**changed) -> dict:
    return UNET | changed


def own_unet(n_classes=2, in_channels=1) -> BasicUNet:
    return BasicUNet(2, in_channels, n_classes, features=[4] * 6)


@pytest.fixture
def collection(tmp_path) -> str:
    return str(toy_collection(tmp_path / "toy"))


@pytest.fixture
def target(collection, monkeypatch) -> SegmentationTask:
    """The dimensions are set, because the files of a toy collection are no volumes."""
    monkeypatch.setattr("medtl_ext.transfer.tasks.shape_of", lambda name: (8, 8, 8))
    return SegmentationTask("A-T2-ED", collection=collection)


@pytest.fixture
def find(target, collection):
    return lambda *entries, **options: find_sources(list(entries), target, collection=collection, **options)


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a network."""

    def write(network, name="net"):
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
        return str(tmp_path / f"{name}.pt")

    return write


@pytest.fixture
def card(tmp_path):
    """Writes a card."""

    def write(name="card", **content):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path / f"{name}.json")

    return write


# What a list means


def test_a_task_brings_its_tags_size_and_classes(find):
    one, two = find("B-FLAIR-ED", "B-T2-both")
    assert one.card.tags == {"institution": "B", "modality": "FLAIR", "objective": "ED"}
    assert (one.kind, one.size, one.card.n_classes, two.card.n_classes) == ("task", 2, 2, 3)
    assert (one.card.foreign, one.card.checkpoint, one.entry) == (False, None, "B-FLAIR-ED")


def test_a_checkpoint_takes_what_it_is_given(find):
    (one,) = find({"name": "ours", "checkpoint": "x.pt", "task": "B-T2-both", "modality": "T2star", "encoder": "conv"})
    assert one.card.tags == {"institution": "B", "modality": "T2star", "objective": "both"}
    assert (one.kind, one.card.n_classes, one.size, one.card.encoder) == ("checkpoint", 3, 2, "conv")
    (one,) = find({"checkpoint": "some/where.pt", "classes": 4, "convolutions": ["a", "b"]})
    assert (one.name, one.card.n_classes, one.size, one.card.convolutions) == ("where", 4, None, ("a", "b"))
    (one,) = find({"checkpoint": "x.pt", "classes": ["background", "oedema"]})
    assert (one.card.n_classes, one.card.class_names) == (2, ("background", "oedema"))


def test_a_source_is_its_path(find, weights, card, tmp_path):
    bare = weights(own_unet(), "bare")
    written = card("written", checkpoint="bare.pt", modality="T2", classes=["background", "ED"])
    shutil.copy(bare, tmp_path / "paired.pt")
    card("paired", checkpoint="paired.pt", modality="FLAIR")
    one, two, three = find(bare, written, str(tmp_path / "paired.pt"))
    assert [(source.name, source.kind) for source in (one, two, three)] == [
        ("bare", "checkpoint"),
        ("written", "card"),
        ("paired", "checkpoint"),
    ]
    assert one.card.checkpoint == two.card.checkpoint == bare  # relative to the card
    assert (one.card.tags, two.card.tags, three.card.tags) == ({}, {"modality": "T2"}, {"modality": "FLAIR"})
    assert three.card.checkpoint == str(tmp_path / "paired.pt")  # the card beside weights speaks of them
    assert all(source.left_out is None and not source.card.foreign for source in (one, two, three))


def test_keys_are_laid_over_a_card(find, weights, card):
    weights(own_unet())
    path = card(checkpoint="net.pt", modality="T2", objective="ED", encoder="conv")
    (one,) = find({"card": path, "name": "ours", "modality": "T1"})
    assert (one.name, one.kind, one.card.encoder) == ("ours", "card", "conv")
    assert one.card.tags == {"modality": "T1", "objective": "ED"}
    assert Path(one.card.checkpoint).name == "net.pt"
    assert one.option == {"card": path, "name": "ours", "modality": "T1"}  # what --source is given for it


def test_a_folder_of_sources_is_a_shelf(find, weights, card, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("bare", "broken", "carded"):
        shutil.copy(weights(own_unet()), shelf / f"{name}.pt")
    (shelf / "carded.json").write_text(json.dumps({"checkpoint": "carded.pt", "modality": "T2"}))
    (shelf / "broken.json").write_text(json.dumps({"checkpoint": "broken.pt", "modalty": "T2"}))
    (shelf / "collection.json").write_text(json.dumps({"name": "no card", "subjects": []}))
    (shelf / "notes.txt").write_text("no source")
    found = find(str(shelf))
    assert sorted(source.name for source in found) == ["bare", "broken", "carded"]
    by_name = {source.name: source for source in found}
    assert by_name["carded"].card.modality == "T2"
    assert "did you mean 'modality'" in by_name["broken"].left_out
    assert by_name["bare"].left_out is None


def test_the_target_is_not_its_own_source(find):
    own, other = find("A-T2-ED", "B-T2-ED")
    assert (own.own, own.left_out) == (True, "it is the target itself")
    assert (other.own, other.left_out) == (False, None)
    own, other = find("A-T2-ED", "B-T2-ED", mark_own=False)  # sources for any target
    assert (own.own, own.left_out) == (False, None)


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
    assert (found[0].name, found[0].card.n_classes, found[0].size) == ("tinymnist", 3, 12)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one task, card, checkpoint or folder"),
        (["B-T2-ED", "B-T2-ED"], "names B-T2-ED twice"),
        (["B-T2-ED", {"name": "B-T2-ED", "checkpoint": "x.pt"}], "names B-T2-ED twice"),
        ([{"name": "scratch", "checkpoint": "x.pt"}], "named scratch, which means training without one"),
        ([{"name": "zero_shot", "checkpoint": "x.pt"}], "named zero_shot"),
        (["B-T2-ED", {"checkpoint": "full.pt"}], "named full"),
        ([{"weights": "x.pt"}], "is unknown; give a task"),
        ([3], "is unknown; give a task"),
        ([{"bundles": "zoo"}], "is unknown; give a task"),
        ([{"checkpoint": "x.pt", "modalty": "T2"}], "did you mean 'modality'"),
        ([{"checkpoint": "x.pt", "n_classes": 2}], "n_classes"),
        ([{"checkpoint": "x.pt", "classes": "two"}], "classes must be"),
        ([{"checkpoint": "x.pt", "convolutions": "stem"}], "convolutions must be"),
        ([{"checkpoint": 3}], "checkpoint must be a valid string; found 3"),
        (["B-T2-EDD"], "did you mean 'ED'"),
        (["A-T2-ED"], "no source is left: A-T2-ED is the target's own model"),
        ([{"card": "nowhere.json"}], "nowhere.json"),
        (["./nowhere"], "source nowhere does not exist"),
        (["nowhere.json"], "source nowhere.json does not exist"),
        (["/proc/self/task"], "source /proc/self/task is of no known kind; expected a card, a checkpoint"),
    ],
    ids=str,
)
def test_sources_that_make_no_sense_are_refused(entries, message, find):
    assert message in refused(lambda: find(*entries))


def test_datasets_that_cannot_be_had_are_refused(mnist):
    assert ClassificationTask(mnist()).name == "tinymnist"
    wrong = {"wrong.csv": "is of no known kind; expected a .npz", "tinymnist": "not of the form", "x.npz": "exist"}
    for where, message in wrong.items():
        assert message in refused(lambda where=where: ClassificationTask(where))


@pytest.mark.parametrize("channels", [["T1"], ["T1", "T2"]], ids=str)
def test_a_task_of_other_channels_is_left_out(channels, find):
    (other, _) = find("B-T1+T2-ED", "B-T2-ED")
    assert other.left_out == "it is for T1+T2, but the target's images are T2"


# What a network must fit


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        (BasicUNet(2, 1, 2, features=(4,) * 6), {"network": UNET}, "does not fit this UNet"),
        (
            built_network(unet(in_channels=4)),
            {"network": unet(in_channels=4), "channels": ["a", "b", "c", "T2"]},
            "takes channels a, b, c, T2, but the target's images have T2: a, b, c are missing",
        ),
        (built_network(unet(in_channels=4)), {"network": unet(in_channels=4)}, "refuses images of 1 x"),
        (ResNet("basic", [1] * 4, [4] * 4, 2, 1, num_classes=2), {"own": RESNET}, "one prediction per pixel"),
        (own_unet(in_channels=3), {}, "takes 3 channels, but the target's images have 1"),
        (BasicUNet(2, 1, 2, features=[8] * 6), {}, "does not fit this BasicUNet"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_segmentation_source_that_does_not_fit_is_refused_in_one_line(network, given, message, weights, target):
    own = {"block_inplanes": [4] * 4} | given.pop("own") if "own" in given else OWN
    own = own | ({"block_inplanes": [4] * 4} if own["_target_"] == "ResNet" else {})
    one = Source("ours", "checkpoint", read_card({"checkpoint": weights(network), **given}))
    text = refused(lambda: one.build(own, target, [1, 32, 32]))
    assert text.startswith("source ours: ")
    assert message in text
    if one.card.foreign:  # and so it is no candidate, with the reason
        (found,) = find_sources([{"name": "ours", "checkpoint": one.card.checkpoint} | given], target)
        assert message in found.left_out


def test_a_network_for_volumes_does_not_take_slices(weights, target, monkeypatch):
    network = unet(spatial_dims=3)
    entry = {"name": "ours", "checkpoint": weights(built_network(network)), "network": network}
    (one,) = find_sources([entry], target)
    assert (one.left_out, one.card.dimensions) == (None, 3)  # the target's are volumes
    monkeypatch.setattr("medtl_ext.transfer.tasks.shape_of", lambda name: (8, 8, 1))
    (one,) = find_sources([entry], SegmentationTask(target.name, collection=target.collection.path))
    assert one.left_out == "its network is 3D, but the target's images are 2D"


def test_the_classes_of_a_network_of_the_bundles_own_are_read_from_its_weights(weights, target):
    four, two = (Source("s", "checkpoint", Card(checkpoint=weights(own_unet(n), f"{n}"))) for n in (4, 2))
    assert [one.own_classes(OWN, target) for one in (four, two)] == [4, 2]
    assert four.build(OWN, target, [1, 32, 32])(torch.zeros(1, 1, 32, 32)).shape[1] == 4
    said = Source("s", "checkpoint", Card(checkpoint=two.card.checkpoint, classes=4))
    assert "does not fit" in refused(lambda: said.build(OWN, target, [1, 32, 32]))


def test_a_foreign_network_takes_the_targets_images(weights, target):
    net = built_network(unet(in_channels=2, out_channels=3))
    given = {"network": unet(in_channels=2, out_channels=3), "channels": ["T2", "T1"], "fill": "mean"}
    (one,) = find_sources([{"name": "ours", "checkpoint": weights(net), **given}], target)
    assert (one.left_out, one.card.foreign, one.card.n_classes) == (None, True, 3)
    network = one.build({}, target, ())
    assert not network.training
    image = torch.rand(1, 2, 16, 16)
    torch.testing.assert_close(network(image), net.eval()(image))


def test_a_classification_source_that_does_not_fit_is_refused_in_one_line(weights, mnist):
    target = ClassificationTask(mnist())

    def build(network=None, checkpoint=None, n_classes=2):
        path = checkpoint or weights(built_network(RESNET | {"num_classes": 2, "n_input_channels": 1}))
        source = Source("ours", "checkpoint", Card(checkpoint=path, network=network, classes=n_classes))
        return source.build(RESNET, target, [1, 32, 32])

    assert not build().training
    rgb = weights(built_network(RESNET | {"num_classes": 2, "n_input_channels": 3}), "rgb")
    asked = (
        "its network takes 3 channels, but the target's images have 1; give --in_channels 3, which repeats grey images"
    )
    assert asked in refused(lambda: build(checkpoint=rgb))  # the definition takes its channels from the target
    assert "does not fit this ResNet" in refused(lambda: build(n_classes=3))
    dense = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [4] * 6}
    path = weights(built_network(dense), "unet")
    assert "does not give one prediction per image" in refused(lambda: build(dense, path))


def test_a_bundle_is_one_of_a_shelf(find, tmp_path):
    for name, network in {"fits": UNET, "poor": unet(channels=[4, 16])}.items():
        bundle_of_a_stranger(tmp_path / "zoo" / name, {"network_def": network}, built_network(UNET).state_dict())
    fits, poor = find(str(tmp_path / "zoo"))
    assert (fits.name, fits.kind, fits.left_out) == ("fits", "bundle", None)
    assert "does not fit" in poor.left_out


# What a run takes of its one source


@pytest.fixture
def single(target, collection):
    """The source of a run's option."""

    def make(source, **options):
        config = {"source": source, "collection": collection, "network_def": OWN}
        return SingleSource(here=SimpleNamespace(config=config), target=target, **options)

    return make


def test_a_source_of_the_bundles_own_network_changes_nothing_else(single, weights):
    path = weights(own_unet())
    origin, own, steps = single(path), own_unet(), [nn.Identity()]
    assert origin.weights == path
    assert origin.architecture(own) is own
    assert origin.preprocessing(steps) == steps
    assert origin.inferer(own) is own
    assert (origin.cropping(), origin.slices("foreground")) == ([], "foreground")
    assert (origin.batch(8), origin.frozen("conv")) == (8, "conv")
    assert origin.unasked is None
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(origin.answering([1, 32, 32])(image), origin.untouched([1, 32, 32])(image))


def test_a_source_of_other_classes_is_not_asked(single, weights):
    origin = single(weights(own_unet(4)))
    assert origin.unasked == "source and target have different numbers of classes"
    assert "different numbers of classes" in refused(lambda: origin.answering([1, 32, 32]))
    assert origin.untouched([1, 32, 32])(torch.zeros(1, 1, 32, 32)).shape[1] == 4


def test_a_foreign_source_brings_its_network_its_grid_and_its_head(single, weights):
    net = built_network(unet(out_channels=3))
    keys = {"network": unet(out_channels=3), "classes": ["background", "cyst", "ED"], "name": "theirs"}
    keys |= {"window": [16, 16], "batch_size": 3, "encoder": "model.0"}
    origin = single({"checkpoint": weights(net), **keys})
    assert origin.unasked is None  # it knows ED
    image = torch.rand(1, 1, 16, 16)
    ours, theirs = origin.answering([1, 32, 32])(image).softmax(1), net.eval()(image).softmax(1)
    torch.testing.assert_close(ours[:, 1], theirs[:, 2])
    trained = origin.architecture(own_unet())
    assert not isinstance(trained, BasicUNet)
    trained.load_state_dict(origin.weights)
    assert trained.eval()(image).shape[1] == 2
    (crop,) = origin.cropping()
    assert crop({"image": torch.rand(1, 20, 24), "label": torch.rand(1, 20, 24)})["image"].shape == (1, 16, 16)
    assert origin.frozen("conv_0") == "net\\.(?:model.0)"
    assert (origin.slices("volume"), origin.batch(8)) == ("foreground", 1)  # whatever our grid would be
    assert [origin.batch(own, training=True) for own in (8, 2)] == [3, 2]


def test_a_run_needs_a_source_with_weights(single, weights, tmp_path):
    for origin in (single(None), single("B-T2-ED")):
        assert "--source is not given or has no weights" in refused(lambda origin=origin: origin.weights)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in "ab":
        shutil.copy(weights(own_unet()), shelf / f"{name}.pt")
    assert f"--source {shelf} holds 2 sources; give the path of one" in refused(lambda: single(str(shelf)).weights)
    assert "--source B-T2-EDX: objective 'EDX' is unknown" in refused(lambda: single("B-T2-EDX").weights)


def test_what_a_ranking_hands_on_is_the_source_with_its_weights(target, collection, tmp_path):
    """A task is given by its name and its present weights; other sources as they were given."""
    run = SOURCE_SELECTION.workflow(collection=collection).parser.get() | {"bundle_root": str(SOURCE_SELECTION.root)}
    done = SimpleNamespace(config=run, train=lambda waiting, what: None)
    entry = {"name": "b", "task": "B-FLAIR-ED", "network": UNET}
    plain, named = find_sources(["B-T2-ED", entry], target, collection=collection)
    found = train_sources([plain, named], done, target, folder=str(tmp_path), seed=0, check=False)
    assert [one.option["checkpoint"] for one in found] == [one.job.model for one in found]
    assert found[0].option == {"task": "B-T2-ED", "checkpoint": found[0].card.checkpoint}
    assert found[1].option == entry | {"checkpoint": found[1].card.checkpoint}
    assert found[1].job.overrides["network_def"] == UNET


# What a pool is kept for


def test_a_pool_is_trained_again_when_its_collection_or_its_training_change(collection, tmp_path):
    """A network that was trained on other patients, or in another way, is never used instead."""

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
    for institution, same in (("A", True), ("B", False)):
        next(each for each in content["subjects"] if each["institution"] == institution)["split"] = "test"
        moved.write_text(json.dumps(content))
        assert (folder(moved) == before) is same
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
