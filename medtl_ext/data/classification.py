"""2D classification datasets in memory: MedMNIST files and folders of images, and a few images per class of them.

Everything that asks "which class is this image of?" is one `ClassificationDataset`, whatever it was read from. MONAI
takes it from there: `ClassificationDataset.datalist` gives the dictionaries that its transforms and datasets expect.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel
from tqdm import tqdm

from medtl_ext._validation import InputError, require_choice, require_name
from medtl_ext.data.collection import SPLITS, Name, read_arrays
from medtl_ext.data.files import PICTURES

logger = logging.getLogger(__name__)

SPLIT_WORDS = ("train", "training", "val", "valid", "validation", "test", "testing")
# A single 16-bit image does not tell which range of values the dataset has.
MODES = {"L": "L", "1": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


@dataclass(frozen=True)
class ClassificationDataset:
    """Images of one size, each with a class and a split.

    Attributes:
        name: what tables call it.
        images: uint8, N x H x W (grey) or N x H x W x 3 (RGB).
        labels: N class indices, int64.
        splits: N of "train", "val" and "test".
        class_names: names of the classes in order.
        subjects: the patient of each image, or None where that is not known.
        names: N names of the images, such as file names; None numbers them.
        synthetic: no patient was scanned.

    >>> images, splits = np.zeros((2, 8, 8), np.uint8), np.array(["train", "test"])
    >>> data = ClassificationDataset("two", images, np.array([0, 1]), splits, ("healthy", "ill"))
    >>> data.n_classes, data.channels, data.counts("train")
    (2, 1, [1, 0])
    >>> data.datalist("train")[0]["image"].shape, data.datalist("train", channels=3)[0]["image"].shape
    ((1, 8, 8), (3, 8, 8))
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    class_names: tuple[str, ...]
    subjects: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    synthetic: bool = False

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return 1 if self.images.ndim == 3 else 3

    def counts(self, split: str) -> list[int]:
        """Number of images of each class in a split."""
        return np.bincount(self.labels[self.splits == split], minlength=self.n_classes).tolist()

    def select(self, rows: np.ndarray) -> Self:
        """A dataset of some of the images, given by a mask or by indices in the order wanted."""
        places = np.arange(len(self.labels))[rows]
        return replace(
            self,
            images=self.images[places],
            labels=self.labels[places],
            splits=self.splits[places],
            subjects=self.subjects and tuple(self.subjects[place] for place in places),
            names=tuple(self.names[place] if self.names else str(place) for place in places),
        )

    def datalist(self, split: str, *, channels: int | None = None) -> list[dict[str, Any]]:
        """The images of a split, as MONAI transforms take them.

        Args:
            split: ``train``, ``val`` or ``test``.
            channels: 3 repeats grey images; None keeps what there is.

        Returns:
            One dictionary an image: ``image`` (C x H x W, uint8), ``label`` (int), ``subject`` (the image's own name
            where the patient is not known) and ``name``.

        Raises:
            InputError: RGB images for a network of one channel, or no image in the split.
        """
        require_choice("split", split, SPLITS)
        channels = channels or self.channels
        if channels not in (self.channels, 3):
            takes = f"the network takes {channels} channel(s); give --in_channels 3, which repeats grey images"
            raise InputError(f"{self.name} has RGB images, {takes}.")
        rows = np.flatnonzero(self.splits == split)
        if not len(rows):
            raise InputError(f"{self.name} has no image in split '{split}' ({len(self.labels)} images in all).")
        items = []
        for row in rows:
            image = self.images[row][None] if self.channels == 1 else np.moveaxis(self.images[row], -1, 0)
            image = np.repeat(image, channels // len(image), axis=0)
            name = self.names[row] if self.names else str(row)
            subject = self.subjects[row] if self.subjects else f"image {name}"
            items.append({"image": image, "label": int(self.labels[row]), "subject": subject, "name": name})
        return items


def load_medmnist(path: str | os.PathLike[str]) -> ClassificationDataset:
    """Read a MedMNIST ``.npz`` file (2D, grey or RGB, of any of the published sizes), or any file of its form.

    The form is: ``train_images``, ``val_images``, ``test_images`` (N x H x W or N x H x W x 3, uint8) and
    ``train_labels``, ``val_labels``, ``test_labels`` (N x 1 or N, 0, 1, 2, ...). Files of your own may also have
    ``<split>_subjects`` (N strings, the patients) and ``class_names``, which MedMNIST's do not.

    Raises:
        InputError: no such file, other keys, 3D images, labels out of range, several labels an image (ChestMNIST), or
            a class without a training image.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "tiny.npz"
    >>> arrays = {f"{split}_images": np.zeros((2, 28, 28), np.uint8) for split in SPLITS}
    >>> np.savez(file, **arrays, **{f"{split}_labels": np.array([[0], [1]]) for split in SPLITS})
    >>> load_medmnist(file).counts("val")
    [1, 1]

    Reference: Yang et al., *MedMNIST v2*, Scientific Data 10, 2023.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a MedMNIST .npz file.")
    content = read_arrays(path)
    for fault in _faults(content):
        raise InputError(f"{path} {fault}.")
    for key in ("class_names", *(f"{split}_subjects" for split in SPLITS)):
        for name in {*map(str, content.get(key, ()))}:
            require_name(f"{path}: {key}:", name)
    parts = [content[f"{split}_labels"].reshape(-1).astype(np.int64) for split in SPLITS]
    subjects = [str(name) for split in SPLITS for name in content.get(f"{split}_subjects", ())]
    return ClassificationDataset(
        name=path.stem,
        images=np.concatenate([content[f"{split}_images"] for split in SPLITS]),
        labels=np.concatenate(parts),
        splits=np.repeat(SPLITS, [len(part) for part in parts]),
        class_names=tuple(map(str, content.get("class_names", range(parts[0].max() + 1)))),
        subjects=tuple(subjects) if len(subjects) == sum(map(len, parts)) else None,
        names=tuple(f"{split}/{n}" for split, part in zip(SPLITS, parts, strict=True) for n in range(len(part))),
        synthetic=bool(content.get("synthetic", False)),
    )


def _faults(content: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What is wrong with the arrays of a MedMNIST file. Only the first fault is reliable: later checks assume it."""
    needed = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
    if missing := [key for key in needed if key not in content]:
        found = ", ".join(sorted(content)) or "none"
        yield f"has no '{missing[0]}'; found the keys {found}, expected {', '.join(needed)}"
    labels = {split: content[f"{split}_labels"].reshape(-1) for split in SPLITS}
    for split, part in labels.items():
        images = content[f"{split}_images"]
        if images.ndim < 3 or images.shape[3:] not in ((), (3,)) or images.dtype != np.uint8:
            expected = "expected uint8, N x H x W or N x H x W x 3 (instead of organmnist3d use organamnist, or slices)"
            yield f"holds {split}_images of {images.dtype} and shape {images.shape}; {expected}"
        if len(part) != len(images):
            expected = "expected one for each (multi-label data such as ChestMNIST: give a checkpoint as a source)"
            yield f"holds {len(part)} {split}_labels for {len(images)} images; {expected}"
        if part.size and (not np.issubdtype(part.dtype, np.integer) or part.min() < 0):
            yield f"holds {split}_labels of {part.dtype} values from {part.min()}; expected classes 0, 1, 2, ..."
    names = content.get("class_names", range(int(labels["train"].max(initial=0)) + 1))
    highest = max(part.max(initial=0) for part in labels.values())
    if highest >= len(names):
        yield f"has label {highest}, but {len(names)} classes by its class_names or training labels; correct it"
    yield from _class_faults(labels["train"], len(names))
    if all(f"{split}_subjects" in content for split in SPLITS):
        patients = pd.concat({split: pd.Series(content[f"{split}_subjects"]) for split in SPLITS}, names=["split"])
        n_images = sum(map(len, labels.values()))
        if len(patients) != n_images:
            yield f"has {len(patients)} subjects for {n_images} images; expected one for each"
        held = patients.reset_index("split").groupby(0).split.unique()
        for subject, splits in held[held.map(len) > 1].items():
            yield f"has subject '{subject}' in {' and '.join(map(repr, splits))}; keep it in one split"


def _class_faults(training: np.ndarray, n_classes: int) -> Iterator[str]:
    present = len(np.unique(training))
    if not 2 <= present == n_classes:
        found = f"training images of {present} of its {n_classes} class(es)"
        yield f"has {found}; expected images of every class, and at least two classes"


def load_image_folder(path: str | os.PathLike[str], *, size: int | None = None) -> ClassificationDataset:
    """Read a folder ``split/class/image.png``, or ``class/image.png`` with a split drawn at random, always the same.

    A drawn split is stratified: half of each class's images to train, a quarter each to val and test. It does not know
    the patients: if a patient has several images, sort the images into split folders yourself.

    Args:
        path: folder of ``train``, ``val`` and ``test`` folders, or of classes. PNG, JPEG, BMP and TIFF with 8 bits.
        size: resize all images to ``size`` x ``size`` pixels; None: they must all have one size already.

    Raises:
        InputError: no such folder, fewer than two classes, a damaged image or one without 8 bits, or several sizes.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"folder {path} does not exist; give a folder of split/class/image or class/image files.")
    folders = {folder.name for folder in path.iterdir() if folder.is_dir()}
    has_splits = folders >= set(SPLITS)
    if not has_splits and (odd := sorted(name for name in folders if name.lower() in SPLIT_WORDS)):
        hint = f"name the splits {', '.join(SPLITS)}, or give a folder of classes alone"
        raise InputError(f"{path} has the folder(s) {', '.join(odd)} but not all splits; {hint}.")
    roots = [path / split for split in SPLITS] if has_splits else [path]
    classes = sorted({folder.name for root in roots for folder in root.iterdir() if folder.is_dir()})
    files = [
        (file, label, root.name)
        for root in roots
        for label, name in enumerate(classes)
        for file in sorted((root / name).glob("**/*"))
        if file.suffix.lower() in PICTURES
    ]
    labels = np.array([label for _, label, _ in files], dtype=np.int64)
    splits = np.array([split for *_, split in files], dtype=str) if has_splits else _drawn_splits(labels)
    for fault in _class_faults(labels[splits == "train"], len(classes)):
        raise InputError(f"{path} {fault}.")
    images = [read_image(file, size) for file, *_ in tqdm(files, "reading images", disable=None)]
    if len({image.shape[:2] for image in images}) > 1:
        raise InputError(f"{path} holds images of several sizes; give size=... (--image_size of the bundle).")
    if len({image.ndim for image in images}) > 1:
        images = [np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image for image in images]
    names = tuple(str(file.relative_to(path)) for file, *_ in files)
    return ClassificationDataset(path.name, np.stack(images), labels, splits, tuple(classes), names=names)


def load_classification(path: str | os.PathLike[str], *, size: int | None = None) -> ClassificationDataset:
    """Load a MedMNIST ``.npz``, a folder of images, or a ``.json`` that ``data read medmnist`` wrote.

    Args:
        path: of the file or folder.
        size: the images of a folder are resized to ``size`` x ``size`` pixels.

    Raises:
        InputError: what `load_medmnist` and `load_image_folder` refuse; a JSON file of another form.
    """
    path = Path(path)
    if path.is_dir():
        return load_image_folder(path, size=size)
    if path.suffix != ".json":
        return load_medmnist(path)
    try:
        described = _Described.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        hint = "write one with python -m medtl_ext.data read medmnist"
        raise InputError(f"{path} describes no MedMNIST file; {hint}.") from error
    names, file = described.class_names, path.parent / described.medmnist
    dataset = load_medmnist(file)
    if len(names) != dataset.n_classes:
        raise InputError(f"{path} names {len(names)} classes, {file} has {dataset.n_classes}; correct the names.")
    return replace(dataset, name=described.name, class_names=tuple(names))


def pool_datasets(datasets: Sequence[ClassificationDataset], *, size: int | None = None) -> ClassificationDataset:
    """Join several datasets, with all their classes, so that one network is trained on all of them.

    Grey images become RGB if any dataset is RGB. No class is shared: pneumonia in two datasets makes two classes.

    Args:
        datasets: each with its own name.
        size: images are resized to ``size`` x ``size`` pixels if they do not all have one size.

    Raises:
        InputError: images of several sizes, and no ``size``.

    >>> images, labels, splits = np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), np.array(["train", "train"])
    >>> parts = [ClassificationDataset(name, images, labels, splits, ("no", "yes")) for name in ("ct", "mri")]
    >>> pooled = pool_datasets(parts)
    >>> pooled.name, pooled.class_names, pooled.labels.tolist()
    ('ct+mri', ('ct: no', 'ct: yes', 'mri: no', 'mri: yes'), [0, 1, 2, 3])

    Reference: Juodelyte et al., arXiv 2412.20172, whose source "MedMNIST" is all of its datasets but the target.
    """
    images = [one.images for one in datasets]
    if len(shapes := {one.shape[1:3] for one in images}) > 1:
        if size is None:
            raise InputError(f"the pooled datasets have images of {sorted(shapes)}; give size=... (--image_size).")
        images = [np.stack([_sized(image, size) for image in one]) for one in images]
    if len({one.ndim for one in images}) > 1:
        images = [np.repeat(one[..., None], 3, axis=-1) if one.ndim == 3 else one for one in images]
    starts = np.cumsum([0, *(one.n_classes for one in datasets)])
    known = all(one.subjects is not None for one in datasets)
    numbers = [one.names or [str(row) for row in range(len(one.labels))] for one in datasets]
    return ClassificationDataset(
        name="+".join(one.name for one in datasets),
        images=np.concatenate(images),
        labels=np.concatenate([one.labels + start for one, start in zip(datasets, starts, strict=False)]),
        splits=np.concatenate([one.splits for one in datasets]),
        class_names=tuple(f"{one.name}: {name}" for one in datasets for name in one.class_names),
        subjects=tuple(f"{one.name}: {name}" for one in datasets for name in one.subjects) if known else None,
        names=tuple(f"{one.name}/{n}" for one, names in zip(datasets, numbers, strict=True) for n in names),
        synthetic=all(one.synthetic for one in datasets),
    )


def _sized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


class _Described(BaseModel):
    """What ``data read medmnist`` writes."""

    name: Name
    medmnist: str
    class_names: list[Name]


def _drawn_splits(labels: np.ndarray) -> np.ndarray:
    splits = np.empty(len(labels), dtype="<U5")
    cycle = np.array(["train", "val", "test", "train"])
    generator = np.random.default_rng(0)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        splits[rows] = cycle[np.arange(len(rows)) % len(cycle)]
    return splits


def read_image(file: Path, size: int | None = None) -> np.ndarray:
    """Read an 8-bit image as H x W (grey) or H x W x 3, resized to ``size`` x ``size`` pixels if ``size`` is given."""
    try:
        with Image.open(file) as image:
            if image.mode not in MODES:
                raise InputError(f"{file} is of mode {image.mode}; expected 8 bit grey or RGB: convert it first.")
            image = image.convert(MODES[image.mode])
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR) if size else image)
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{file} cannot be read as an image ({error}); replace or remove it.") from error


def sample_per_class(
    dataset: ClassificationDataset, *, train: int | None = 100, val: int | None = 25, seed: int = 0
) -> ClassificationDataset:
    """Draw a number of training and validation images of each class; all test images stay.

    The images come in random order, so that a batch holds several classes. If patients are known, they take turns: no
    patient gives a second image of a class before every patient gave one. A class with too few images gives all of
    them, and the log says so.

    Args:
        dataset: what to draw from; it is not changed.
        train, val: number of images of each class (100 and 25 in the paper); None keeps all.
        seed: of the draw. With the same seed, a larger draw contains the smaller one.

    Raises:
        InputError: ``train`` or ``val`` is below 1; the validation or test images are of one class only.

    >>> images, labels = np.zeros((8, 4, 4), np.uint8), np.array([0, 1] * 4)
    >>> data = ClassificationDataset("eight", images, labels, np.repeat(["train", "val"], 4), ("a", "b"))
    >>> sample_per_class(data, train=1, val=2).counts("train")
    [1, 1]

    Reference: Juodelyte et al., arXiv 2412.20172, Section 4, for the numbers.
    """
    for split in ("val", "test"):
        present = [name for name, count in zip(dataset.class_names, dataset.counts(split), strict=True) if count]
        if len(present) == 1 < dataset.n_classes:
            found = f"{split} images of the class {present[0]} only"
            raise InputError(f"{dataset.name} has {found}, so AUC is not defined; give images of two classes or more.")
    chosen = [np.flatnonzero(dataset.splits == "test")]
    for split, number in (("train", train), ("val", val)):
        if number is not None and number < 1:
            raise InputError(f"{split} images per class is {number}; expected at least 1, or None for all.")
        generator = np.random.default_rng((seed, SPLITS.index(split)))
        drawn = []
        for label, name in enumerate(dataset.class_names):
            rows = np.flatnonzero((dataset.splits == split) & (dataset.labels == label))
            if number is not None and len(rows) < number:
                logger.info("%s: class %s has %d %s images, %d asked", dataset.name, name, len(rows), split, number)
            rows = generator.permutation(rows)
            if dataset.subjects is not None:  # every patient once before any twice
                patients = pd.Series([dataset.subjects[row] for row in rows])
                rows = rows[np.argsort(patients.groupby(patients).cumcount().to_numpy(), kind="stable")]
            drawn.append(rows[:number])
        chosen.append(generator.permutation(np.concatenate(drawn)))
    return dataset.select(np.concatenate(chosen))
