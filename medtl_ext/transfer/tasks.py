"""Tasks as configs use them: the question, the images, and the score of a patient.

Segmentation and classification differ in their dataset, in the output of a network and in the score of a patient. The
two classes here hold all these differences; the rest of the flow works with either.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from medtl_ext._io import suffix_of
from medtl_ext._validation import InputError, require_number
from medtl_ext.data import ClassificationDataset, Task, cached_phantom, check_collection, load_collection
from medtl_ext.data.classification import load_classification, pool_datasets, read_image, sample_per_class
from medtl_ext.data.collection import SPLITS, shuffled
from medtl_ext.data.files import PICTURES, Part, find_images, require_readable, shape_of
from medtl_ext.data.plan import AUTO, Grid, no_grid, plan_grid, stored_options
from medtl_ext.ranking import bootstrap_interval, mean_auc
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.report import patient_table

logger = logging.getLogger(__name__)

PHANTOM_SUBJECTS = 24
N_RESAMPLES = 500
POOLED = " + "
"""Separates the names of datasets on which one network is trained."""
ENDINGS = (".npz", ".json", ".pt", ".pth", ".safetensors", ".ts", ".pt2")
PROBABILITIES = r"^p\d+$"
"""Columns of a table of predictions that hold the probability of each class."""


class SegmentationTask:
    """A question asked of a collection: find this objective, on this modality, at this institution.

    Args:
        name: such as ``17-T2-ED``.
        collection: the collection file; None: phantoms of the task's institution.
        phantom_subjects: number of phantoms.
        train_patients: number of labelled patients to train on, drawn with ``seed``; None: all. With the same seed, a
            larger draw contains the smaller one.
        fold: ``[k, n]``: ``val`` is the k-th (from 0) of n parts of all labelled patients, and ``train`` the others.
            ``[0, 1]``: both are all labelled patients, for a network that is scored and not trained.

    Attributes:
        collection: the `medtl_ext.data.Collection`.
        institution, modality, objective: the parts of its name.
        class_names, label_values: of the foreground classes.
        n_classes, n_channels: number of classes with the background, and of channels of an image.
        channels, answers: names of the channels, and of all classes, the background first.
        folder: folder of the collection.
        synthetic: no patient was scanned.
    """

    outcome, unit, counted = "dice", "Dice", "patients"
    """Column of the score by which sources are compared, its name, and the column with the number of patients."""
    tags = ("institution", "modality", "objective")
    per_pixel = True
    own_task, own_size, own_outcome = "task", "size", "own_dice"
    """Columns of what is known about a source: its own task, its training size, and its score on its own task."""

    def __init__(
        self,
        name: str,
        *,
        collection: str | None = None,
        phantom_subjects: int = PHANTOM_SUBJECTS,
        train_patients: int | None = None,
        seed: int = 0,
        fold: Sequence[int] | None = None,
    ) -> None:
        task = Task(name)
        self.name, self.phantom_subjects, self.fold = name, phantom_subjects, fold
        self.train_patients, self.seed = train_patients, seed
        if collection is None:
            collection = cached_phantom(institutions=[task.institution], subjects=phantom_subjects, seed=0)
        self.collection = load_collection(collection)
        self.institution, self.modality, self.objective = task.institution, task.modality, task.objective
        self.class_names, self.label_values = self.collection.class_names(task), self.collection.label_values(task)
        self.channels, self.answers = task.channels, ("background", *self.class_names)
        self.n_classes, self.n_channels = len(self.answers), len(self.channels)
        self.folder, self.synthetic = str(self.collection.path.parent), self.collection.synthetic

    def other(self, name: str, *, collection: str | None = None, train_patients: int | None = None) -> Self:
        """Another task, of this collection file or of another one."""
        drawn = {"train_patients": train_patients, "seed": self.seed}
        return SegmentationTask(name, collection=collection, phantom_subjects=self.phantom_subjects, **drawn)

    @property
    def photographs(self) -> bool:
        """True if its images are pictures, not scans: they have no left and right of a patient."""
        files = (name for subject in self.collection.subjects_of(self.name) for name in subject.channels().values())
        return suffix_of(Part.parse(next(files)).path) in PICTURES

    @cached_property
    def flat(self) -> bool:
        """True if its images are 2D: they have one slice."""
        subject = self.collection.subjects_of(self.name)[0]
        return shape_of(next(iter(subject.channels().values())))[-1] == 1

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits in which the task has a subject."""
        found = {subject.split for subject in self.collection.subjects_of(self.name)}
        found |= set() if self.fold is None else {"train", "val"}
        return tuple(split for split in SPLITS if split in found)

    @property
    def size(self) -> int:
        """Number of training scans."""
        return len(self.datalist("train"))

    def is_same(self, name: str) -> bool:
        """True if a source of this name was trained on the target's own data."""
        return name == self.name

    @cached_property
    def labelled(self) -> list[dict[str, str]]:
        """The scans of the splits ``train`` and ``val``."""
        there = {subject.split for subject in self.collection.subjects_of(self.name)} & {"train", "val"}
        return [item for split in sorted(there) for item in self.collection.datalist(self.name, split)]

    def datalist(self, split: str) -> list[dict[str, str]]:
        """See `medtl_ext.data.Collection.datalist`."""
        if self.fold is None or split == "test":
            items = self.collection.datalist(self.name, split)
        else:
            place, folds = self.fold
            held = set(shuffled(patients_of(self.labelled))[place::folds])
            items = [item for item in self.labelled if (_patient(item) in held) == (split == "val")] or self.labelled
        if split != "train" or self.train_patients is None:
            return items
        require_number("the number of patients to train on", self.train_patients, 1, whole=True)
        if (found := len(patients_of(items))) < self.train_patients:
            fewer = f"fewer than the {self.train_patients} that you ask for; ask for fewer, or give null to use all"
            raise InputError(f"task {self.name} has {found} training patients, {fewer}.")
        return draw_patients(items, self.train_patients, seed=self.seed)

    def check(self, splits: Iterable[str]) -> None:
        """Read every file before anything long runs; raise the first error, and log warnings."""
        for split in splits:
            self.datalist(split)  # raises if a split has no subject
        report = check_collection(self.collection, [Task(self.name)], progress=False)
        report.raise_for_errors()
        for issue in report.warnings:
            logger.warning("%s", issue)

    @staticmethod
    def patients(job: Job, split: str) -> dict[str, float]:
        """Patient -> Dice of a finished training, averaged over classes."""
        patients = patient_table(job.read())
        return patients[patients["split"] == split].set_index("subject")["dice"].to_dict()

    @classmethod
    def measure(cls, job: Job, split: str) -> dict[str, float]:
        """Mean Dice over the patients of a split, its bootstrap interval, and the number of patients."""
        values = list(cls.patients(job, split).values())
        low, high = bootstrap_interval(values)
        return {"dice": float(np.mean(values)), "dice_low": low, "dice_high": high, "patients": len(values)}

    @staticmethod
    def own(job: Job) -> float:
        """Mean Dice of a source on the validation patients of its own training."""
        table = patient_table(job.read().dropna(subset=["dice", "iou"]))
        record = job.output_dir / "config.json"
        split = json.loads(record.read_text(encoding="utf-8")).get("val_split", "val") if record.is_file() else "val"
        return float(table[table["split"] == split]["dice"].mean())


def planned_grid(here: Run, target: SegmentationTask, *, beside: str | None = None, **options: Any) -> Grid:
    """The grid of a run: given options, and the others planned from the target's training patients.

    Args:
        here: the run; the plan is written into its config, so that its trainings use the same grid.
        target: the target; without training patients, those of another split are used.
        beside: weights of the bundle's own network. It must see the grid of its training again, so the values of
            ``grid.json`` beside the weights are used instead of a plan.
        options: see `medtl_ext.data.plan.plan_grid`.

    Raises:
        InputError: the grid of the weights is neither in ``grid.json`` nor given.
    """
    if beside is not None and Path(beside).is_file():
        stored = stored_options(path := Path(beside).with_name("grid.json"))
        options = {name: stored.get(name, value) if value == AUTO else value for name, value in options.items()}
        if AUTO in (options["spacing"], options["roi_size"]):
            raise no_grid(path)
    items = target.datalist("train" if "train" in target.splits else target.splits[0])
    grid = plan_grid(items, label_values=target.label_values, channels=target.channels, **options)
    network = {key: grid.dims if value == "$@grid.dims" else value for key, value in here.config["network_def"].items()}
    here.config |= grid.options | {"network_def": network}
    return grid


def draw_patients(items: Sequence[dict[str, str]], count: int | None, *, seed: int) -> list[dict[str, str]]:
    """All scans of ``count`` random patients of a datalist; of all patients if ``count`` is None or too large."""
    patients = patients_of(items)
    order = np.random.default_rng(seed).permutation(len(patients))
    drawn = {patients[place] for place in order[:count]}
    return [item for item in items if _patient(item) in drawn]


def patients_of(items: Sequence[Mapping[str, str]]) -> list[str]:
    """The patients of a datalist, each one once."""
    return list(dict.fromkeys(map(_patient, items)))


def _patient(item: Mapping[str, str]) -> str:
    return item.get("patient") or item["subject"]


class ClassificationTask:
    """Which class does this image have? A MedMNIST file, a folder of images, or a task of the phantom.

    Args:
        name: a ``.npz`` file, or the ``.json`` that describes one; a folder of images; or a task such as
            ``17-T1-tumour``, whose images are slices of a collection. Several of these, joined by `POOLED`, make one
            task.
        collection, phantom_subjects: see `medtl_ext.data.phantom.classification.phantom_classification`.
        image_size: images of a folder are resized to this number of pixels along each side.
        in_channels: channels of the networks, 1 or 3; with 3, grey images are repeated.
        train_per_class, val_per_class, seed: number of images drawn of each class, see `sample_per_class`; None: all.

    Attributes:
        name, where: its name in tables; the ``name`` that was given.
        class_names, n_classes, synthetic: of the dataset.
        size: number of training images.
        channels, n_channels, answers, folder: see `SegmentationTask`.
    """

    outcome, unit, counted = "auc", "AUC", "test_images"
    tags = ()
    per_pixel, flat = False, True
    splits = SPLITS
    own_task, own_size, own_outcome = "data", "images", "own_auc"

    def __init__(
        self,
        name: str,
        *,
        collection: str | None = None,
        phantom_subjects: int = PHANTOM_SUBJECTS,
        image_size: int | None = None,
        in_channels: int = 1,
        train_per_class: int | None = None,
        val_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        if in_channels not in (1, 3):
            raise InputError(f"in_channels is {in_channels}; expected 1 (grey images) or 3 (RGB).")
        self.where, self.phantom_subjects = name, phantom_subjects
        self.image_size, self.in_channels, self.n_channels = image_size, in_channels, in_channels
        self.channels = ("R", "G", "B") if in_channels == 3 else ("grey",)
        self.path, *others = (_dataset_path(one, collection, phantom_subjects) for one in name.split(POOLED))
        dataset = load_classification(self.path, size=image_size)
        self.name = dataset.name if self.path.is_dir() and not others else dataset_name(name)
        if others:
            parts = [dataset, *(load_classification(path, size=image_size) for path in others)]
            named = zip(parts, name.split(POOLED), strict=True)
            dataset = pool_datasets([replace(one, name=dataset_name(where)) for one, where in named], size=image_size)
        self.class_names, self.n_classes, self.synthetic = dataset.class_names, dataset.n_classes, dataset.synthetic
        self.answers, self.folder = tuple(self.class_names), str(self.path.parent)
        self.size = sum(dataset.counts("train"))
        self._all = replace(dataset, name=self.name)
        self._drawn = {"train": train_per_class, "val": val_per_class, "seed": seed}

    @cached_property
    def dataset(self) -> ClassificationDataset:
        """The drawn images."""
        return sample_per_class(self._all, **self._drawn)

    def other(self, name: str, *, collection: str | None = None) -> Self:
        """Another dataset, all of it."""
        how = {"image_size": self.image_size, "in_channels": self.in_channels}
        return ClassificationTask(name, collection=collection, phantom_subjects=self.phantom_subjects, **how)

    def is_same(self, name: str) -> bool:
        """True if a name or path means the same images, also by another path, a copy or a description."""
        if name == self.where or not all(Path(where).exists() for where in (name, self.where)):
            return name == self.where  # the name of a phantom task is unique
        return content_of(Path(name)) == content_of(Path(self.where))

    def datalist(self, split: str) -> list[dict[str, Any]]:
        """See `medtl_ext.data.ClassificationDataset.datalist`."""
        return self.dataset.datalist(split, channels=self.in_channels)

    def check(self, splits: Iterable[str]) -> None:
        """Refuse a split without images, and images that the networks cannot take."""
        for split in splits:
            self.datalist(split)

    @staticmethod
    def measure(job: Job, split: str) -> dict[str, float]:
        """AUC of a split with its interval over patients, the validation AUC, and the number of images."""
        predictions, metrics = job.read("predictions.csv"), job.read().set_index("split")["auc"]
        predictions = predictions[predictions["split"] == split]
        low, high = auc_interval(predictions)
        found = {"auc": float(metrics[split]), "auc_low": low, "auc_high": high, "val_auc": float(metrics["val"])}
        return found | {"test_images": len(predictions)}

    @staticmethod
    def own(job: Job) -> float:
        """Validation AUC of a source on its own task."""
        return float(job.read().set_index("split").loc["val", "auc"])


def _dataset_path(where: str, collection: str | None, subjects: int) -> Path:
    path = Path(where)
    if path.suffix in (".npz", ".json") or path.is_dir():
        return path
    if path.suffix or "/" in where or "\\" in where:
        expected = "a .npz or .json file, a folder of images, or a task such as 17-T1-tumour"
        raise InputError(f"dataset {where} is of no known kind; expected {expected}.")
    from medtl_ext.data.phantom.classification import phantom_classification  # brings nilearn

    return phantom_classification(where, collection=collection, subjects=subjects)


def dataset_name(where: str) -> str:
    """The name of data or weights in tables: the task, or the name of the file or folder; joined for several."""
    paths = [Path(one) for one in where.split(POOLED)]
    return "+".join(path.stem if path.suffix in ENDINGS else path.name for path in paths)


def content_of(path: Path) -> str:
    """A hash of a dataset: of the file, of the file that a description names, or of all images in a folder."""
    if path.suffix == ".json":
        try:
            path = path.parent / str(json.loads(path.read_text(encoding="utf-8"))["medmnist"])
        except (OSError, ValueError, KeyError, TypeError):
            return str(path.resolve())  # reading the dataset reports the fault
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.glob("**/*")):
        if file.suffix.lower() in PICTURES and file.is_file():
            digest.update(str(file.relative_to(path)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def image_auc(table: pd.DataFrame, weights: np.ndarray | None = None) -> float:
    """`medtl_ext.ranking.mean_auc` of a table of predictions, with optional weights of the images."""
    return mean_auc(table["label"].to_numpy(), table.filter(regex=PROBABILITIES).to_numpy(), weights)


def auc_interval(table: pd.DataFrame, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of `image_auc` over patients, or over images if patients are not known."""
    groups, names = pd.factorize(table["subject"])
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), N_RESAMPLES)
    low, high = np.nanquantile([image_auc(table, counts[groups]) for counts in draws], [0.025, 0.975])
    return float(low), float(high)


def images_to_segment(input_dir: str | None, task: str) -> list[dict[str, Any]]:
    """The images in a folder with the channels of ``task``, or (None) those of the phantom's test patients.

    See `medtl_ext.data.files.find_images`. Every file is read before anything long runs.
    """
    if input_dir is None:
        items = SegmentationTask(task).datalist("test")
        return [{"image": item["image"], "name": f"{item['subject']}/{Task(task).modality}"} for item in items]
    return require_readable(find_images(input_dir, Task(task).channels))


def images_to_classify(
    input_dir: str | None, task: str, *, in_channels: int, image_size: int, phantom_subjects: int = PHANTOM_SUBJECTS
) -> list[dict[str, Any]]:
    """The images of a folder, of a MedMNIST file's test split, or (None) the phantom's test images of ``task``.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if input_dir is None or str(input_dir).endswith(".npz"):
        where = ClassificationTask(input_dir or task, in_channels=in_channels, phantom_subjects=phantom_subjects)
        return where.datalist("test")
    files = sorted(path for path in Path(input_dir).glob("**/*") if path.suffix.lower() in PICTURES)
    if not files:
        raise InputError(f"no image ({', '.join(PICTURES)}) in {input_dir}; give their folder with --input_dir.")
    items = []
    for file in files:
        image = read_image(file, image_size)
        channels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        if len(channels) > in_channels:
            raise InputError(f"{file} is RGB, but the network takes grey images; convert it first.")
        name = str(file.relative_to(input_dir))
        items.append({"image": channels.repeat(in_channels // len(channels), axis=0), "name": name})
    return items
