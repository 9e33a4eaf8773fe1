"""How near two tasks are, from the images and labels of their training patients: a part that can be exchanged."""

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
"""Cost between two tasks, >= 0, lower is nearer, the same in either order.

One that is the mean over pairs of patients may say what it is of each pair, in a method ``pairs(a, b)``: patients are
then drawn anew, to see how firm a plan is.
"""


@dataclass(frozen=True)
class TaskVolumes:
    """A task's training patients, whose volumes are read from disk whenever they are asked for.

    Attributes:
        name: of the task.
        items: image files, one a channel, and label file of each patient, as in `medtl_ext.data.Collection.datalist`.
        label_values: for every class its values in the label file.
        size: how many labelled training patients the task has; `items` may be some of them.
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
        """What tells the labels of one task from those of another: other modalities of a patient have the same."""
        return tuple(label for _, label in self.items), self.label_values

    def images(self, channel: int = 0) -> Iterator[torch.Tensor]:
        """X x Y x Z, oriented RAS."""
        for image in self.image_files(channel):
            yield self._load({"image": image})["image"][0]

    def labels(self) -> Iterator[torch.Tensor]:
        """X x Y x Z, uint8, 1 in any foreground class."""
        for _, label in self.items:
            yield (self._load({"label": label})["label"][0] > 0).to(torch.uint8)

    def spacing(self) -> np.ndarray:
        """Patients x 3, the size of a voxel of `images` in mm, from the files' headers."""
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
    """The mean cost of channels of two tasks: those of one name or, where the names differ, so that it is least.

    Where the costs of channels are matrices, patients x patients, so is their mean.
    """
    if set(a.channels) == set(b.channels):
        pairs = [(place, b.channels.index(channel)) for place, channel in enumerate(a.channels)]
        return np.mean([cost(*pair) for pair in pairs], axis=0)
    costs = np.array([[cost(i, j) for j in range(len(b.channels))] for i in range(len(a.channels))])
    means = costs.reshape(*costs.shape[:2], -1).mean(axis=2)
    return costs[linear_sum_assignment(means)].mean(axis=0)


def redrawn(costs: np.ndarray, a: TaskVolumes, b: TaskVolumes, draw: int) -> float:
    """The mean of patients x patients costs in a draw of the Bayesian bootstrap, in which each counts more or less.

    All tasks of an institution that show as many patients show the same, who count alike. One is compared with himself
    as often as without a draw: that costs next to nothing, and more of it would look like nearness.

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
    """The paper's: ``alpha W + beta (1 - SSIM)``, both means over all pairs of patients of the two tasks.

    Images are read once for all tasks that share them, and so are labels; a pair of image sets, or of label sets, is
    compared once, however many pairs of tasks it stands for.

    Args:
        alpha, beta: the published pair, or one of `medtl_ext.affinity.fit_affinity_weights`.
        standardize, multivariate: see `medtl_ext.affinity.image_quantiles`; the published weights are for raw
            intensities.
    """

    def __init__(
        self, *, alpha: float = ALPHA, beta: float = BETA, standardize: bool = False, multivariate: bool = False
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.images = {"standardize": standardize, "multivariate": multivariate}
        self._kept: dict[Any, Any] = {}  # what was read of images and of labels, and what was found for a pair of them

    @property
    def name(self) -> str:
        """``seqtran``, with the weights where they are not the published ones, and how images are compared."""
        weights = "" if (self.alpha, self.beta) == (ALPHA, BETA) else f"_{self.alpha:g}_{self.beta:g}"
        multivariate, standardized = (self.images[name] for name in ("multivariate", "standardize"))
        return f"seqtran{'_multivariate' * multivariate}{weights}{'_standardized' * standardized}"

    def __call__(self, a: TaskVolumes, b: TaskVolumes) -> float:
        return float(self.pairs(a, b).mean())

    def pairs(self, a: TaskVolumes, b: TaskVolumes) -> np.ndarray:
        """The cost between every patient of one task and every one of the other, whose mean is the tasks'."""
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
        """One bit a voxel stays in memory: some 70 MB for 60 volumes of 240 x 240 x 155."""
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
    """For records and folders: equal for equal weights, wherever a file with them lies.

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
    """The affinity of a name, of a file of fitted weights, of a function's import path, or the function itself.

    Args:
        affinity: "seqtran", "seqtran_multivariate", "context", an ``affinity_weights.json`` of `fit_weights`, or any
            function of two `TaskVolumes`, such as ``"my_package.nearness"``.

    Raises:
        InputError: neither a known name, nor a file with weights, nor a function that can be imported.
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
        # Files of before there were two forms of eq. 2 do not name theirs.
        images = {"standardize": bool(content["standardize"]), "multivariate": bool(content.get("multivariate"))}
        return SeqTranAffinity(alpha=alpha, beta=beta, **images)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"holds no weights of an affinity ({error!r}); give the affinity_weights.json of fit.json"
        raise InputError(f"{path} {what}.") from error


def affinity_costs(
    affinity: Affinity, tasks: Tasks, others: Tasks | None = None, *, progress: bool = True
) -> np.ndarray:
    """Costs between every two tasks (n x n) or, with ``others``, between each of both (n x m).

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
