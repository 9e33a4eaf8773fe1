"""How near two tasks are, from the images and labels of their training patients: a part that can be exchanged."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, LoadImaged, Orientationd
from tqdm import tqdm

from medtl_ext._validation import InputError
from medtl_ext.affinity import (
    PUBLISHED_WEIGHTS,
    TaskContext,
    image_quantiles,
    pairwise_context,
    pairwise_ssim,
    quantile_distance,
    task_affinity,
    task_context,
)
from medtl_ext.transforms import SelectLabelsd

Affinity = Callable[["TaskVolumes", "TaskVolumes"], float]
"""Cost between two tasks, >= 0, lower is nearer, the same in either order."""


@dataclass(frozen=True)
class TaskVolumes:
    """A task's training patients, whose volumes are read from disk whenever they are asked for.

    Attributes:
        name: of the task.
        items: image and label file of each patient, as in `medtl_ext.data.Collection.datalist`.
        label_values: for every class its values in the label file.
        size: how many labelled training patients the task has; `items` may be some of them.
    """

    name: str
    items: tuple[tuple[str, str], ...]
    label_values: tuple[tuple[int, ...], ...]
    size: int

    @property
    def image_files(self) -> tuple[str, ...]:
        return tuple(image for image, _ in self.items)

    @property
    def regions(self) -> tuple[Any, ...]:
        """What tells the labels of one task from those of another: other modalities of a patient have the same."""
        return tuple(label for _, label in self.items), self.label_values

    def images(self) -> Iterator[torch.Tensor]:
        """X x Y x Z, oriented RAS."""
        for image, _ in self.items:
            yield self._load({"image": image})["image"][0]

    def labels(self) -> Iterator[torch.Tensor]:
        """X x Y x Z, uint8, 1 in any foreground class."""
        for _, label in self.items:
            yield (self._load({"label": label})["label"][0] > 0).to(torch.uint8)

    def spacing(self) -> np.ndarray:
        """Patients x 3, the size of a voxel of `images` in mm, from the files' headers."""
        rows = []
        for image, _ in self.items:
            affine = nib.load(image).affine
            axes = nib.io_orientation(affine)[:, 0].astype(int)
            rows.append(nib.affines.voxel_sizes(affine)[np.argsort(axes)])
        return np.stack(rows)

    def _load(self, files: dict[str, str]) -> dict[str, Any]:
        steps = [
            LoadImaged(list(files), reader="NibabelReader", ensure_channel_first=True),
            Orientationd(list(files), "RAS", labels=None),
        ]
        if "label" in files:
            steps.append(SelectLabelsd("label", values=self.label_values))
        return Compose(steps)(files)


class SeqTranAffinity:
    """The paper's: ``alpha W + beta (1 - SSIM)``, both means over all pairs of patients of the two tasks.

    Images are read once for all tasks that share them, and so are labels; a pair of image sets, or of label sets, is
    compared once, however many pairs of tasks it stands for.

    Args:
        alpha, beta: the published pair, or one of `medtl_ext.affinity.fit_affinity_weights`.
        standardize: see `medtl_ext.affinity.pairwise_wasserstein`; the published weights are for raw intensities.
    """

    def __init__(
        self, *, alpha: float = PUBLISHED_WEIGHTS[0], beta: float = PUBLISHED_WEIGHTS[1], standardize: bool = False
    ) -> None:
        self.alpha, self.beta, self.standardize = alpha, beta, standardize
        self._quantiles: dict[Any, torch.Tensor] = {}
        self._labels: dict[Any, list[tuple[tuple[int, ...], np.ndarray]]] = {}
        self._found: dict[Any, float] = {}

    @property
    def name(self) -> str:
        """``seqtran``, with the weights where they are not the published ones."""
        weights = "" if (self.alpha, self.beta) == PUBLISHED_WEIGHTS else f"_{self.alpha:g}_{self.beta:g}"
        return f"seqtran{weights}{'_standardized' if self.standardize else ''}"

    def __call__(self, a: TaskVolumes, b: TaskVolumes) -> float:
        return float(task_affinity(self.distance(a, b), self.similarity(a, b), alpha=self.alpha, beta=self.beta))

    def distance(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """Mean Wasserstein distance of images."""

        def compare() -> float:
            return float(quantile_distance(self._image_set(a), self._image_set(b)).mean())

        return self._once((a.image_files, b.image_files), compare)

    def similarity(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """Mean structural similarity of labels."""

        def compare() -> float:
            return float(pairwise_ssim(self._label_set(a), self._label_set(b)).mean())

        return self._once((a.regions, b.regions), compare)

    def _image_set(self, task: TaskVolumes) -> torch.Tensor:
        if task.image_files not in self._quantiles:
            self._quantiles[task.image_files] = image_quantiles(task.images(), standardize=self.standardize)
        return self._quantiles[task.image_files]

    def _label_set(self, task: TaskVolumes) -> Iterator[np.ndarray]:
        """Labels, of which one bit a voxel stays in memory: some 70 MB for 60 volumes of 240 x 240 x 155."""
        if task.regions not in self._labels:
            self._labels[task.regions] = [(tuple(label.shape), np.packbits(label)) for label in task.labels()]
        for shape, bits in self._labels[task.regions]:
            yield np.unpackbits(bits, count=math.prod(shape)).reshape(shape)

    def _once(self, pair: tuple[Any, Any], compare: Callable[[], float]) -> float:
        key = frozenset(pair)
        if key not in self._found:
            self._found[key] = compare()
        return self._found[key]


class ContextAffinity:
    """`medtl_ext.affinity.pairwise_context`: intensity in and around the RoI, its shape, and the body's intensities."""

    name = "context"

    def __init__(self) -> None:
        self._contexts: dict[TaskVolumes, TaskContext] = {}

    def __call__(self, a: TaskVolumes, b: TaskVolumes) -> float:
        return float(pairwise_context([self._context(a)], [self._context(b)]))

    def _context(self, task: TaskVolumes) -> TaskContext:
        if task not in self._contexts:
            self._contexts[task] = task_context(task.images(), task.labels(), spacing=task.spacing())
        return self._contexts[task]


def affinity_name(affinity: str | Affinity) -> str:
    """For records and folders: equal for equal weights, wherever a file with them lies.

    >>> affinity_name("seqtran"), affinity_name(SeqTranAffinity(alpha=0, beta=0.25))
    ('seqtran', 'seqtran_0_0.25')
    """
    found = find_affinity(affinity)
    own = affinity if isinstance(affinity, str) else getattr(found, "__name__", type(found).__name__)
    return str(getattr(found, "name", own))


AFFINITIES: dict[str, Callable[[], Affinity]] = {"seqtran": SeqTranAffinity, "context": ContextAffinity}


def find_affinity(affinity: str | Affinity) -> Affinity:
    """The affinity of a name, of a file of fitted weights, of a function's import path, or the function itself.

    Args:
        affinity: "seqtran", "context", an ``affinity_weights.json`` of `fit_weights`, or any function of two
            `TaskVolumes`, such as ``"my_package.nearness"``.

    Raises:
        InputError: neither a known name, nor a file with weights, nor a function that can be imported.
    """
    if callable(affinity):
        return affinity
    if affinity in AFFINITIES:
        return AFFINITIES[affinity]()
    if str(affinity).endswith(".json"):
        return _of_fitted_weights(Path(affinity))
    module, _, name = str(affinity).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError):
        found = None
    if not callable(found):
        raise InputError(
            f"affinity is {affinity!r}; expected {' or '.join(AFFINITIES)}, an affinity_weights.json of fit.json, or "
            "the import path of a function of two tasks, such as my_package.nearness."
        )
    return found


def _of_fitted_weights(path: Path) -> SeqTranAffinity:
    if not path.is_file():
        raise InputError(f"affinity {path} does not exist; give the affinity_weights.json of a finished fit.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        alpha, beta = float(content["alpha"]), float(content["beta"])
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
            raise ValueError(f"alpha {alpha}, beta {beta}")
        return SeqTranAffinity(alpha=alpha, beta=beta, standardize=bool(content["standardize"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no weights of an affinity ({error!r}); give the affinity_weights.json of fit.json."
        ) from error


def affinity_costs(
    affinity: Affinity,
    tasks: Sequence[TaskVolumes],
    others: Sequence[TaskVolumes] | None = None,
    *,
    progress: bool = True,
) -> np.ndarray:
    """Costs between every two tasks (n x n) or, with ``others``, between each of both (n x m).

    Raises:
        InputError: the affinity gave a cost that is negative or not finite.
    """
    columns = tasks if others is None else others
    costs = np.zeros((len(tasks), len(columns)))
    pairs = [(i, j) for i in range(len(tasks)) for j in range(len(columns)) if others is not None or i < j]
    for i, j in tqdm(pairs, "task affinity", unit="pair", disable=None if progress else True):
        costs[i, j] = affinity(tasks[i], columns[j])
        if not 0 <= costs[i, j] < np.inf:
            raise InputError(
                f"the affinity of {tasks[i].name} and {columns[j].name} is {costs[i, j]}; expected a finite cost >= 0."
            )
        if others is None:
            costs[j, i] = costs[i, j]
    return costs
