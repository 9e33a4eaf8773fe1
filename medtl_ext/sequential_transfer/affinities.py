"""How similar two tasks are, from images and labels of their training patients; you can use a function of your own."""

import json
import math
import pkgutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import LoadImaged, Orientationd
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from medtl_ext import affinity as measures
from medtl_ext._validation import InputError
from medtl_ext.data import Task
from medtl_ext.data.files import affine_of
from medtl_ext.transforms import SelectLabelsd

ALPHA, BETA = measures.PUBLISHED_WEIGHTS

Affinity = Callable[["TaskVolumes", "TaskVolumes"], float]
"""Cost between two tasks, >= 0 and symmetric; lower is more similar.

An affinity that is a mean over pairs of patients may have a method ``pairs(a, b)`` that returns the cost of each pair.
Patients are then resampled, to see how stable a plan is.
"""


@dataclass(frozen=True)
class TaskVolumes:
    """A task's training patients; their volumes are read from disk each time they are used.

    Attributes:
        name: of the task.
        items: image files (one per channel) and label file of each patient, see `medtl_ext.data.Collection.datalist`.
        label_values: the values of each class in the label file.
        size: number of labelled training patients of the task; `items` may be a part of them.
    """

    name: str
    items: tuple[tuple[tuple[str, ...], str], ...]
    label_values: tuple[tuple[int, ...], ...]
    size: int

    @property
    def channels(self) -> tuple[str, ...]:
        return Task(self.name).channels

    def image_files(self, channel: int = 0) -> tuple[str, ...]:
        return tuple(images[channel] for images, _ in self.items)

    @property
    def regions(self) -> tuple[Any, ...]:
        """Identifies the labels of the task; tasks of other modalities may share them."""
        return tuple(label for _, label in self.items), self.label_values

    def images(self, channel: int = 0) -> Iterator[torch.Tensor]:
        """X x Y x Z, oriented RAS."""
        for image in self.image_files(channel):
            yield self._load({"image": image})["image"][0]

    def labels(self) -> Iterator[torch.Tensor]:
        """X x Y x Z, uint8, 1 in the foreground classes."""
        for _, label in self.items:
            yield (self._load({"label": label})["label"][0] > 0).to(torch.uint8)

    def spacing(self) -> np.ndarray:
        """Patients x 3: the voxel sizes of `images` in mm, from the files' headers."""
        affines = [affine_of(image) for image in self.image_files()]
        axes = (np.argsort(nib.io_orientation(affine)[:, 0]) for affine in affines)
        return np.stack([nib.affines.voxel_sizes(affine)[order] for affine, order in zip(affines, axes, strict=True)])

    def _load(self, files: dict[str, str]) -> dict[str, Any]:
        load = LoadImaged(list(files), reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)
        turn = Orientationd(list(files), "RAS", labels=None)
        select = SelectLabelsd("label", values=self.label_values, allow_missing_keys=True)
        return select(turn(load(files)))


Tasks = Sequence[TaskVolumes]


def mean_over_channels(a: TaskVolumes, b: TaskVolumes, cost: Callable[[int, int], ArrayLike]) -> np.ndarray:
    """The mean cost over pairs of channels of two tasks.

    Channels are paired by name, or, if the names differ, so that the mean is as small as possible. If the costs are
    matrices (patients x patients), so is their mean.
    """
    if set(a.channels) == set(b.channels):
        pairs = [(place, b.channels.index(channel)) for place, channel in enumerate(a.channels)]
        return np.mean([cost(*pair) for pair in pairs], axis=0)
    costs = np.array([[cost(i, j) for j in range(len(b.channels))] for i in range(len(a.channels))])
    means = costs.reshape(*costs.shape[:2], -1).mean(axis=2)
    return costs[linear_sum_assignment(means)].mean(axis=0)


def redrawn(costs: np.ndarray, a: TaskVolumes, b: TaskVolumes, draw: int) -> float:
    """The mean of costs (patients x patients) in one draw of the Bayesian bootstrap, with a random weight per patient.

    Tasks of one institution with the same number of patients are assumed to have the same patients, with the same
    weights. The total weight of pairs of a patient with himself or herself does not change: these pairs cost almost
    nothing, so more weight on them would look like similarity.

    Reference: Rubin, *The Bayesian bootstrap*, Annals of Statistics 1981.
    """
    rows, columns = (_shares(task, draw) for task in (a, b))
    weights = np.outer(rows, columns)
    if len(rows) > 1 and np.array_equal(rows, columns):
        np.fill_diagonal(weights, 0)
        weights *= (1 - 1 / len(rows)) / weights.sum()
        np.fill_diagonal(weights, rows / len(rows))
    return float((weights * costs).sum())


def _shares(task: TaskVolumes, draw: int) -> np.ndarray:
    institution = zlib.crc32(Task(task.name).institution.encode())
    return np.random.default_rng([draw, institution]).dirichlet(np.ones(len(task.items)))


class SeqTranAffinity:
    """The affinity of the paper: ``alpha W + beta (1 - SSIM)``, both means over all pairs of patients of the two tasks.

    Images and labels that several tasks share are read once. A pair of image sets, or of label sets, is compared once,
    also if several pairs of tasks need it.

    Args:
        alpha, beta: the published weights, or those of `medtl_ext.affinity.fit_affinity_weights`.
        standardize, multivariate: see `medtl_ext.affinity.image_quantiles`; the published weights are for raw
            intensities.
    """

    def __init__(
        self, *, alpha: float = ALPHA, beta: float = BETA, standardize: bool = False, multivariate: bool = False
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.images = {"standardize": standardize, "multivariate": multivariate}
        self._kept: dict[Any, Any] = {}  # what was read of images and labels, and the results for pairs of them

    @property
    def name(self) -> str:
        """``seqtran``, with its weights if they are not the published ones, and with how images are compared."""
        weights = "" if (self.alpha, self.beta) == (ALPHA, BETA) else f"_{self.alpha:g}_{self.beta:g}"
        multivariate, standardized = (self.images[name] for name in ("multivariate", "standardize"))
        return f"seqtran{'_multivariate' * multivariate}{weights}{'_standardized' * standardized}"

    def __call__(self, a: TaskVolumes, b: TaskVolumes) -> float:
        return float(self.pairs(a, b).mean())

    def pairs(self, a: TaskVolumes, b: TaskVolumes) -> np.ndarray:
        """The cost between each patient of one task and each of the other; its mean is the cost between the tasks."""
        weights = {"alpha": self.alpha, "beta": self.beta}
        return measures.task_affinity(self._distances(a, b), self._similarities(a, b), **weights).numpy()

    def distance(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """Mean Wasserstein distance of images, channel by channel; see `mean_over_channels`."""
        return float(self._distances(a, b).mean())

    def similarity(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """Mean structural similarity of labels."""
        return float(self._similarities(a, b).mean())

    def _distances(self, a: TaskVolumes, b: TaskVolumes) -> np.ndarray:
        def between(i: int, j: int) -> np.ndarray:
            distances = partial(measures.quantile_distance, self._quantiles(a, i), self._quantiles(b, j))
            return self._of_pair(a.image_files(i), b.image_files(j), distances)

        return mean_over_channels(a, b, between)

    def _similarities(self, a: TaskVolumes, b: TaskVolumes) -> np.ndarray:
        return self._of_pair(a.regions, b.regions, lambda: measures.pairwise_ssim(*map(self._labels, (a, b))))

    def _quantiles(self, task: TaskVolumes, channel: int) -> torch.Tensor:
        files = task.image_files(channel)
        return self._once(files, lambda: measures.image_quantiles(task.images(channel), **self.images))

    def _labels(self, task: TaskVolumes) -> Iterator[np.ndarray]:
        """Labels are kept as one bit per voxel: about 70 MB for 60 volumes of 240 x 240 x 155."""
        packed = self._once(task.regions, lambda: [(tuple(one.shape), np.packbits(one)) for one in task.labels()])
        for shape, bits in packed:
            yield np.unpackbits(bits, count=math.prod(shape)).reshape(shape)

    def _of_pair(self, a: Any, b: Any, find: Callable[[], torch.Tensor]) -> np.ndarray:
        if (b, a) in self._kept:
            return self._kept[b, a].T
        return self._once((a, b), lambda: find().numpy())

    def _once(self, what: Any, find: Callable[[], Any]) -> Any:
        if what not in self._kept:
            self._kept[what] = find()
        return self._kept[what]


class ContextAffinity:
    """`medtl_ext.affinity.pairwise_context`: intensity in and around the RoI, its shape, and the body's intensities.

    Channel by channel; see `mean_over_channels`.
    """

    name = "context"

    def __init__(self) -> None:
        self._context = cache(_context)

    def __call__(self, a: TaskVolumes, b: TaskVolumes) -> float:
        def cost(i: int, j: int) -> float:
            return float(measures.pairwise_context([self._context(a, i)], [self._context(b, j)]))

        return float(mean_over_channels(a, b, cost))


def _context(task: TaskVolumes, channel: int) -> measures.TaskContext:
    return measures.task_context(task.images(channel), task.labels(), spacing=task.spacing())


def affinity_name(affinity: str | Affinity) -> str:
    """The name of an affinity in records and folders; it depends on the weights, not on the place of their file.

    >>> affinity_name("seqtran"), affinity_name(SeqTranAffinity(alpha=0, beta=0.25))
    ('seqtran', 'seqtran_0_0.25')
    """
    found = find_affinity(affinity)
    own = affinity if isinstance(affinity, str) else getattr(found, "__name__", type(found).__name__)
    return str(getattr(found, "name", own))


AFFINITIES: dict[str, Callable[[], Affinity]] = {
    "seqtran": SeqTranAffinity,
    "seqtran_multivariate": partial(SeqTranAffinity, multivariate=True),
    "context": ContextAffinity,
}


def find_affinity(affinity: str | Affinity) -> Affinity:
    """Find an affinity by its name, by a file of fitted weights, or by the import path of a function.

    Args:
        affinity: "seqtran", "seqtran_multivariate", "context", an ``affinity_weights.json`` of `FitWeights`, or any
            function of two `TaskVolumes`, or its import path such as ``"my_package.nearness"``.

    Raises:
        InputError: not a known name, a file with weights, or a function that can be imported.
    """
    if callable(affinity):
        return affinity
    if affinity in AFFINITIES:
        return AFFINITIES[affinity]()
    if str(affinity).endswith(".json"):
        return _of_fitted_weights(Path(affinity))
    try:
        found = pkgutil.resolve_name(str(affinity))
    except (ImportError, ValueError, AttributeError):
        found = None
    if not callable(found):
        files = f"{' or '.join(AFFINITIES)}, an affinity_weights.json of fit.json"
        raise InputError(f"affinity is {affinity!r}; expected {files}, or an import path such as my_package.nearness.")
    return found


def _of_fitted_weights(path: Path) -> SeqTranAffinity:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        alpha, beta = float(content["alpha"]), float(content["beta"])
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
            raise ValueError(f"alpha {alpha}, beta {beta}")
        # Older files have no "multivariate": there was only one form of eq. 2.
        images = {"standardize": bool(content["standardize"]), "multivariate": bool(content.get("multivariate"))}
        return SeqTranAffinity(alpha=alpha, beta=beta, **images)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{path} holds no weights of an affinity ({error!r})"
        raise InputError(f"{problem}; give the affinity_weights.json that fit.json writes.") from error


def affinity_costs(
    affinity: Affinity, tasks: Tasks, others: Tasks | None = None, *, progress: bool = True
) -> np.ndarray:
    """Costs between all pairs of tasks (n x n) or, with ``others``, between each task and each other (n x m).

    Raises:
        InputError: the affinity gave a cost that is negative or not finite.
    """
    columns = tasks if others is None else others
    costs = np.zeros((len(tasks), len(columns)))
    pairs = [(i, j) for i, j in np.ndindex(*costs.shape) if others is not None or i < j]
    for i, j in tqdm(pairs, "task affinity", unit="pair", disable=None if progress else True):
        a, b = tasks[i], columns[j]
        costs[i, j] = affinity(a, b)
        if not 0 <= costs[i, j] < np.inf:
            raise InputError(f"the affinity of {a.name} and {b.name} is {costs[i, j]}; expected a finite cost >= 0.")
    return costs + costs.T if others is None else costs
