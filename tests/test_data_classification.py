"""Classification datasets: MedMNIST files, folders of images, draws per class, and tasks cut from the phantom."""

import json
import logging
from functools import partial

import nibabel
import numpy as np
import pytest
from bundle_runs import mnist_arrays
from PIL import Image

from medtl_ext import InputError
from medtl_ext.data import generate_phantom
from medtl_ext.data.classification import ClassificationDataset, load_image_folder, load_medmnist, sample_per_class
from medtl_ext.data.phantom import classification as tasks
from medtl_ext.data.phantom.classification import phantom_classification

SPLITS = ("train", "val", "test")


def content(*shape):
    return mnist_arrays(shape or (28, 28), (6, 4, 2))


@pytest.fixture
def write(tmp_path):
    def write(**changed):
        arrays = content() | changed
        np.savez(tmp_path / "tinymnist.npz", **{key: value for key, value in arrays.items() if value is not None})
        return tmp_path / "tinymnist.npz"

    return write


# MedMNIST files


@pytest.mark.parametrize("size", [28, 224])
@pytest.mark.parametrize("channels", [None, 3])
def test_a_file_of_any_size_grey_or_rgb(write, size, channels):
    arrays = content(size, size, *([] if channels is None else [channels]))
    data = load_medmnist(write(**arrays))
    assert (data.name, data.class_names) == ("tinymnist", ("0", "1"))
    assert data.channels == (channels or 1)
    assert [sum(data.counts(split)) for split in SPLITS] == [6, 4, 2]
    item = data.datalist("val")[1]
    expected = arrays["val_images"][1]
    np.testing.assert_array_equal(item["image"], expected[None] if channels is None else expected.transpose(2, 0, 1))
    assert (item["label"], item["name"], item["subject"]) == (1, "val/1", "image val/1")


def test_the_pneumonia_file(shared_data):
    data = load_medmnist(shared_data / "medmnist" / "pneumoniamnist.npz")
    assert data.images.shape == (3882 + 524 + 624, 28, 28)
    assert data.counts("train") == [388, 3494]
    assert data.counts("test") == [234, 390]
    assert data.subjects is None
    assert not data.synthetic


def test_grey_images_are_repeated_for_an_rgb_network_and_not_the_other_way_round(write):
    grey = load_medmnist(write())
    image = grey.datalist("train", channels=3)[0]["image"]
    assert image.shape == (3, 28, 28)
    np.testing.assert_array_equal(image[0], image[2])
    with pytest.raises(InputError, match=r"tinymnist has RGB images, the network takes 1 channel\(s\); give --in_chan"):
        load_medmnist(write(**content(28, 28, 3))).datalist("train", channels=1)


def test_patients_and_class_names_where_the_file_has_them(write):
    subjects = {f"{split}_subjects": np.array([f"{split}{n // 2}" for n in range(9)]) for split in SPLITS}
    subjects = {key: names[:count] for (key, names), count in zip(subjects.items(), (6, 4, 2), strict=True)}
    data = load_medmnist(write(**subjects, class_names=np.array(["healthy", "ill"])))
    assert data.class_names == ("healthy", "ill")
    assert [item["subject"] for item in data.datalist("val")] == ["val0", "val0", "val1", "val1"]
    subjects["test_subjects"] = np.array(["test0", "train0"])
    with pytest.raises(InputError, match="subject 'train0' in 'train' and 'test'"):
        load_medmnist(write(**subjects))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, "has no 'val_labels'; found the keys test_images"),
        ({"train_images": np.zeros((6, 28, 28, 28), np.uint8)}, r"N x H x W x 3 \(instead of organmnist3d use organam"),
        ({"train_images": np.zeros((6, 28, 28, 3, 1), np.uint8)}, "N x H x W x 3"),
        ({"train_images": np.zeros((6, 28, 28), np.float32)}, "of float32"),
        ({"train_images": np.zeros((6, 28), np.uint8)}, r"uint8 and shape \(6, 28\)"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "multi-label data such as ChestMNIST"),
        ({"train_labels": np.zeros((5, 1), np.uint8)}, "5 train_labels for 6 images"),
        ({"train_labels": np.full((6, 1), -1)}, "expected classes 0, 1, 2"),
        ({"train_labels": np.full((6, 1), 0.5)}, "float64 values"),
        ({"val_labels": np.array([[0], [1], [2], [0]])}, "has label 2, but 2 classes"),
        ({"class_names": np.array(["a"])}, "has label 1, but 1 classes"),
        ({"class_names": np.array(["a", "=b()"])}, r"class_names: '=b\(\)' cannot be part of a file's name"),
        (
            {f"{split}_labels": np.zeros(n, int) for split, n in zip(SPLITS, (6, 4, 2), strict=True)},
            "at least two classes",
        ),
        ({"train_labels": np.array([0, 2, 0, 2, 0, 2])}, "training images of 2 of its 3 class"),
        ({f"{split}_subjects": np.array(["a"]) for split in SPLITS}, "3 subjects for 12 images"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_bad_file_is_refused_in_one_line(write, changed, message):
    with pytest.raises(InputError, match=message) as caught:
        load_medmnist(write(**changed))
    assert "\n" not in str(caught.value)
    assert "tinymnist.npz" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip file")
    for name, message in (("nowhere", "does not exist"), ("text", r"cannot be read as a \.npz file")):
        with pytest.raises(InputError, match=message):
            load_medmnist(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("place", [6, 60])  # the flags of an entry, the compressed array
def test_a_damaged_archive_is_one_line(tmp_path, place):
    np.savez_compressed(path := tmp_path / "x.npz", **content())
    raw = bytearray(path.read_bytes())
    raw[place : place + 90] = b"\xff" * 90
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"cannot be read as a .npz file of plain arrays \(.+\); copy it again"):
        load_medmnist(path)


# Folders of images


def put(path, value=0, mode="L", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode in ("L", "I;16") else (value,) * len(mode)
    Image.new(mode, size, colour).save(path)


def test_a_folder_with_splits(tmp_path):
    for place, split in enumerate(SPLITS):
        for label, name in enumerate(("cat", "dog")):
            put(tmp_path / split / name / "one.png", 10 * place + label)
    data = load_image_folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.images.shape == (6, 10, 12)
    item = data.datalist("test")[1]
    assert (item["image"][0, 0, 0], item["label"]) == (21, 1)
    assert item["name"].replace("\\", "/") == "test/dog/one.png"


def test_one_class_to_validate_on_gives_no_auc():
    images, labels = np.zeros((9, 4, 4), np.uint8), np.array([0, 1, 0, 0, 0, 0, 1, 0, 1])
    data = ClassificationDataset("nine", images, labels, np.repeat(["train", "val", "test"], 3), ("a", "b"))
    with pytest.raises(InputError, match="nine has val images of the class a only"):
        sample_per_class(data)


def test_a_folder_without_splits_gets_a_stratified_one(tmp_path):
    for name in ("cat", "dog"):
        for number in range(8):
            put(tmp_path / name / f"{number}.png", number)
    data = load_image_folder(tmp_path)
    assert [data.counts(split) for split in SPLITS] == [[4, 4], [2, 2], [2, 2]]
    np.testing.assert_array_equal(data.splits, load_image_folder(tmp_path).splits)
    assert data.splits[data.labels == 0].tolist() != data.splits[data.labels == 1].tolist()  # not by the order of names


def test_sizes_and_colours_are_brought_to_one_only_where_that_is_asked(tmp_path):
    for split in SPLITS:
        put(tmp_path / split / "cat" / "a.png", 7)
        put(tmp_path / split / "dog" / "b.jpg", 9, "RGB", (20, 30))
    with pytest.raises(InputError, match="several sizes"):
        load_image_folder(tmp_path)
    data = load_image_folder(tmp_path, size=16)
    assert data.images.shape == (6, 16, 16, 3)
    assert (data.images[data.labels == 0] == 7).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "at least two classes"),
        (["cat/1.png"], "training images of 1 of its 1 class"),
        (["train/cat/1.png", "test/cat/1.png"], "test, train but not all splits; name the splits train, val, test"),
        (["train/cat/1.png", "valid/cat/1.png", "test/cat/1.png"], "but not all splits"),
        (["Train/cat/1.png", "Val/cat/1.png", "Test/cat/1.png"], "but not all splits"),
        (["cat/1.png", "dog/1.png", "dog/text.png"], "text.png cannot be read as an image"),
        (["cat/1.png", "dog/1.png", "dog/deep.png"], "deep.png is of mode I;16; expected 8 bit"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(tmp_path, files, message):
    with pytest.raises(InputError, match="does not exist"):
        load_image_folder(tmp_path / "nowhere")
    for file in files:
        put(tmp_path / file, 100, "I;16" if "deep" in file else "L")
        if "text" in file:
            (tmp_path / file).write_text("expected an image")
    with pytest.raises(InputError, match=message):
        load_image_folder(tmp_path)


# A number of images per class


def dataset(counts, subjects=None):
    labels = np.concatenate([np.repeat(np.arange(len(counts)), counts)] * 3)
    splits = np.repeat(SPLITS, sum(counts))
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    names = tuple("abcdef"[: len(counts)])
    return ClassificationDataset("d", images, labels, splits, names, subjects and tuple(subjects(len(labels))))


def test_the_draw_is_stratified_seeded_and_leaves_the_test_images(caplog):
    data = dataset([20, 5])
    with caplog.at_level(logging.INFO):
        drawn = sample_per_class(data, train=10, val=3)
    assert (drawn.counts("train"), drawn.counts("val"), drawn.counts("test")) == ([10, 5], [3, 3], [20, 5])
    assert "class b has 5 train images, 10 asked" in caplog.text
    again, other = sample_per_class(data, train=10, val=3), sample_per_class(data, train=10, val=3, seed=1)
    np.testing.assert_array_equal(drawn.images, again.images)
    assert (drawn.images != other.images).any()
    smaller = sample_per_class(data, train=4, val=3)
    small, large = (set(d.images[d.splits == "train"][:, 0, 0].tolist()) for d in (smaller, drawn))
    assert small <= large
    assert len(set(drawn.labels[drawn.splits == "train"][:8].tolist())) == 2  # in random order


def test_all_images_where_no_number_is_given():
    assert sample_per_class(dataset([20, 5]), train=None, val=None).counts("train") == [20, 5]
    with pytest.raises(InputError, match="expected at least 1"):
        sample_per_class(dataset([20, 5]), train=0)


def test_patients_take_turns():
    data = dataset([16], subjects=lambda count: [f"p{(place % 16) // 4}" for place in range(count)])
    drawn = sample_per_class(data, train=6, val=4)
    training = [item["subject"] for item in drawn.datalist("train")]
    counts = {name: training.count(name) for name in training}
    assert sorted(counts.values()) == [1, 1, 2, 2]


# The phantom's tasks


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "collection"
    return generate_phantom(folder, institutions=["17"], subjects=6, n_jobs=1, progress=False)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", ["T1-tumour", "T2-enhancing", "FLAIR-load", "T1CE-level", "ALL-modality"])
def test_a_task_of_the_phantom(phantom, name, monkeypatch):
    load = tasks.OBJECTIVES["load"]  # two training patients have no large one
    monkeypatch.setitem(tasks.OBJECTIVES, "load", load._replace(classes_of=partial(load.classes_of, large=100)))
    data = load_medmnist(phantom_classification(f"17-{name}", collection=phantom))
    assert data.synthetic
    assert data.class_names == tasks.OBJECTIVES[name.split("-")[-1]].class_names
    assert data.images.dtype == np.uint8
    assert data.images.shape[1:] == (96, 96)
    by_split = [{item["subject"] for item in data.datalist(split)} for split in SPLITS]
    assert set.union(*by_split) == {f"17-00{number}" for number in range(6)}
    assert sum(map(len, by_split)) == 6  # no patient is in two splits


@pytest.mark.parametrize("task", ["17-T1-tumour", "17-T2-enhancing"])
def test_labels_are_what_the_label_files_say(phantom, task):
    data = load_medmnist(phantom_classification(task, collection=phantom))
    subject = json.loads(phantom.read_text())["subjects"][0]
    modality, objective = task.split("-")[1:]
    volume = np.asarray(nibabel.load(phantom.parent / subject["labels"]["tumour"]).dataobj)
    image = np.asarray(nibabel.load(phantom.parent / subject["images"][modality]).dataobj)
    pixels = ((volume > 0) if objective == "tumour" else (volume == 2)).sum((0, 1))
    kept = ((image != 0).sum((0, 1)) >= 400) & ((pixels == 0) | (pixels >= 20))
    items = [item for item in data.datalist("train") if item["subject"] == subject["id"]]
    assert [item["label"] for item in items] == (pixels[kept] >= 20).astype(int).tolist()
    front_up = image[:, :, np.flatnonzero(kept)[3]].T[::-1]
    np.testing.assert_array_equal(items[3]["image"][0] > 0, front_up > 0)


def test_each_slice_is_asked_about_in_one_modality(phantom):
    data = load_medmnist(phantom_classification("17-ALL-modality", collection=phantom))
    image = np.asarray(nibabel.load(phantom.parent / "17-000" / "T1.nii.gz").dataobj)
    kept = np.flatnonzero((image != 0).sum((0, 1)) >= 400)
    found = [item for item in data.datalist("train") if item["subject"] == "17-000"]
    for item, z in zip(found, sorted(kept, key=lambda z: (z % 4, z)), strict=True):
        assert item["label"] == z % 4
        np.testing.assert_array_equal(item["image"][0] > 0, image[:, :, z].T[::-1] > 0)


def test_three_modalities_are_a_colour_image(phantom):
    colour = load_medmnist(phantom_classification("17-T2+T1+FLAIR-tumour", collection=phantom))
    for place, modality in enumerate(("T2", "T1", "FLAIR")):
        grey = load_medmnist(phantom_classification(f"17-{modality}-tumour", collection=phantom))
        if place == 0:  # the label says which slices can be used
            assert (colour.images[..., 0] == grey.images).all()
        first = colour.datalist("train", channels=3)[0]["image"][place]
        assert first.shape == grey.datalist("train")[0]["image"][0].shape
        np.testing.assert_array_equal(first, grey.datalist("train")[0]["image"][0])


def test_a_task_is_kept_whole_and_not_made_again(phantom, monkeypatch):
    def broken(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as failing:
        failing.setattr(np, "savez_compressed", broken)
        with pytest.raises(OSError, match="disk full"):
            phantom_classification("17-T1-tumour", collection=phantom)
    assert not list(tasks.cache_root().glob("classification/*.npz"))
    file = phantom_classification("17-T1-tumour", collection=phantom)
    monkeypatch.setattr(tasks, "_write", lambda *arguments: pytest.fail("made again"))
    assert phantom_classification("17-T1-tumour", collection=phantom) == file


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("17-T1-tumor", "did you mean 'tumour'"),
        ("17-T1", "not of the form"),
        ("17-T1-modality", "the modality is ALL for the objective 'modality'"),
        ("17-ALL-tumour", "the modality is ALL for the objective 'modality'"),
        ("17-T3-tumour", "modality 'T3' is unknown"),
        ("17-T1+T2-tumour", "has 2 channels; give one modality, or three that become colours"),
        ("19-T1-tumour", "institution '19' is unknown"),
    ],
)
def test_an_unknown_task_is_refused(phantom, task, message):
    with pytest.raises(InputError, match=message):
        phantom_classification(task, collection=phantom)
