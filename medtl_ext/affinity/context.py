"""A cost between tasks that looks at intensities in and around the region of interest, its shape, and the body."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage

from medtl_ext._validation import InputError
from medtl_ext.affinity._volumes import _binary, _bounding_box, _finite, _Partners, _Reader, _Spacing
from medtl_ext.affinity.images import _mass_quantiles, _mean_distances
from medtl_ext.affinity.labels import _soft_dice
from medtl_ext.transforms import body_mask

__all__ = ["TaskContext", "context_affinity", "pairwise_context", "task_context"]

CONTEXT_QUANTILES = 256  # parts of equal mass in which intensities in a task's context are kept
CROP_SAMPLES = 48  # along each side of the box around an RoI


@dataclass(frozen=True, eq=False)
class TaskContext:
    """What `context_affinity` knows of a task: means over its patients, made by `task_context`.

    Attributes:
        roi, ring, body: 256 quantiles each of the intensity in the RoI, in a ring around it, and in the whole body, as
            distance from the body's mean in standard deviations of the body.
        crop: how often each place in a box around the RoI's centre of mass belongs to the RoI, 48 samples a side.
    """

    roi: np.ndarray
    ring: np.ndarray
    body: np.ndarray
    crop: np.ndarray


def task_context(
    images: Iterable[ArrayLike],
    labels: Iterable[ArrayLike],
    *,
    spacing: ArrayLike = 1.0,
    ring: float = 6.0,
    crop: float = 96.0,
) -> TaskContext:
    """Intensities in and around the RoI, its shape, and intensities of the body: means over a task's patients.

    Intensities are standardised by their mean and standard deviation inside `medtl_ext.transforms.body_mask`. In one
    dimension the mean of quantiles is the Wasserstein barycentre: the distribution of a typical patient.

    Args:
        images: N images of one modality, 2D or 3D, zero or nearly so outside the body. Read one at a time.
        labels: N label volumes of 0 and 1, of the same shapes.
        spacing: size of a voxel in mm: a number, one per axis, or N rows of one per axis.
        ring: how far from the RoI the ring around it reaches, in mm; it stays inside the body.
        crop: side of the box around the RoI, in mm. What lies outside it is not seen.

    Returns:
        The task's summary, some hundred kilobytes. A patient without RoI counts for the body only.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it; no patient has an RoI, or none has
            body around it; an image is zero everywhere.

    Example:
        >>> image = np.arange(1.0, 82.0).reshape(9, 9)
        >>> context = task_context([image], [image > 70], ring=2)
        >>> context.roi.shape, context.crop.shape
        ((256,), (48, 48))
        >>> bool(context.roi.mean() > context.ring.mean() > context.body.mean())
        True
    """
    around = _Surroundings.checked(ring, crop)
    return around.summarize(_Reader(), ("images", images), ("labels", labels), _Spacing("spacing", spacing))


def pairwise_context(
    contexts_a: Sequence[TaskContext],
    contexts_b: Sequence[TaskContext],
    *,
    weights: Sequence[float] = (0.5, 0.25, 0.25),
) -> torch.Tensor:
    """`context_affinity` between every task of one list and every one of another, from their summaries.

    Args:
        contexts_a: Na tasks, from `task_context`.
        contexts_b: Nb tasks, made with the same settings.
        weights: of intensity, shape and body, as in `context_affinity`.

    Returns:
        Na x Nb costs, float64, >= 0, lower is nearer; 0 between a task and itself.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> image = np.arange(1.0, 82.0).reshape(9, 9)
        >>> tasks = [task_context([image], [image > 70], ring=2), task_context([image], [image < 10], ring=2)]
        >>> pairwise_context(tasks, tasks)
        tensor([[0.0000, 1.5323],
                [1.5323, 0.0000]], dtype=torch.float64)
    """
    share = np.asarray(weights, dtype=float)
    if share.shape != (3,) or not (np.isfinite(share) & (share >= 0)).all():
        raise InputError(f"weights is {weights}; expected three finite numbers >= 0: of intensity, shape and body.")
    sides = list(contexts_a), list(contexts_b)
    for name, contexts in zip(("contexts_a", "contexts_b"), sides, strict=True):
        if not contexts or not all(isinstance(context, TaskContext) for context in contexts):
            raise InputError(f"{name} must list at least one task, each as task_context returns it.")
    if len({context.crop.shape for contexts in sides for context in contexts}) > 1:
        raise InputError("contexts_a and contexts_b mix tasks in 2D and in 3D; expected one of the two.")
    roi, ring, body, crop = (
        [np.stack([getattr(context, part) for context in contexts]) for contexts in sides]
        for part in ("roi", "ring", "body", "crop")
    )
    intensity = (_mean_distances(*roi) + _mean_distances(*ring)) / 2
    costs = np.stack([intensity, 1 - _soft_dice(*crop), _mean_distances(*body)])
    return torch.from_numpy(np.tensordot(share, costs, axes=1))


def context_affinity(
    images_a: Iterable[ArrayLike],
    labels_a: Iterable[ArrayLike],
    images_b: Iterable[ArrayLike],
    labels_b: Iterable[ArrayLike],
    *,
    spacing_a: ArrayLike = 1.0,
    spacing_b: ArrayLike = 1.0,
    ring: float = 6.0,
    crop: float = 96.0,
    weights: Sequence[float] = (0.5, 0.25, 0.25),
) -> torch.Tensor:
    """Cost between two tasks from the context of their RoI; lower is nearer.

    The weighted sum of three terms, each 0 between a task and itself:

    1. intensity: the Wasserstein distance between intensities inside the two RoI, and that between intensities in rings
       around them, halved. Bright in dark is far from dark in bright. In standard deviations of the body;
    2. shape: 1 - Dice (as in `mean_label_dice`) of the mean RoI, each centred on its centre of mass: the same size and
       shape, wherever in the body. In [0, 1];
    3. body: the Wasserstein distance between intensities in the whole body: the same modality. In standard deviations.

    Intensities are standardised in each image, and quantiles are averaged over patients (see `task_context`). For more
    than two tasks `task_context` and `pairwise_context` read each task once.

    Args:
        images_a, labels_a: one task's images, and its label volumes of 0 and 1, as in `task_context`.
        images_b, labels_b: the other's. Sizes may differ, but both are in 2D or both in 3D.
        spacing_a, spacing_b: size of a voxel in mm: a number, one per axis, or such a row for each volume.
        ring, crop: as in `task_context`.
        weights: of intensity, shape and body, >= 0. The default served well in a small study on synthetic MRI and was
            not tuned.

    Returns:
        The cost, a float64 scalar >= 0. The order of the tasks does not matter.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> image = np.arange(1.0, 82.0).reshape(9, 9)
        >>> context_affinity([image], [image > 70], [image], [image < 10], ring=2)
        tensor(1.5323, dtype=torch.float64)
    """
    around, reader = _Surroundings.checked(ring, crop), _Reader()
    a = around.summarize(reader, ("images_a", images_a), ("labels_a", labels_a), _Spacing("spacing_a", spacing_a))
    b = around.summarize(reader, ("images_b", images_b), ("labels_b", labels_b), _Spacing("spacing_b", spacing_b))
    return reader.tensor(pairwise_context([a], [b], weights=weights)[0, 0])


@dataclass(frozen=True)
class _Surroundings:
    """What is looked at around an RoI, in mm."""

    ring: float
    crop: float

    @classmethod
    def checked(cls, ring: float, crop: float) -> _Surroundings:
        for name, value in (("ring", ring), ("crop", crop)):
            if not 0 < value < np.inf:
                raise InputError(f"{name} is {value}; expected a finite length in mm > 0.")
        return cls(ring, crop)

    def summarize(
        self, reader: _Reader, images: tuple[str, Any], labels: tuple[str, Any], spacing: _Spacing
    ) -> TaskContext:
        found: dict[str, list[np.ndarray]] = {"roi": [], "ring": [], "body": [], "crop": []}
        partners = _Partners(reader, *labels)
        for index, (name, image) in enumerate(reader.volumes(*images)):
            label = _binary(*partners.next(name, image.shape))
            scores = _finite(name, image)
            body = body_mask(scores)
            if not body.any():
                raise InputError(f"{name} is zero everywhere; expected an image.")
            inside = scores[body]
            scores = (scores - inside.mean()) / (inside.std() if np.ptp(inside) > 0 else 1.0)
            found["body"].append(_mass_quantiles(scores[body], CONTEXT_QUANTILES))
            if label.any():
                self._look_around(found, scores, label, body, spacing.of(index, image.ndim))
        partners.end(images[0])
        if not found["roi"]:
            raise InputError(f"{labels[0]} has no labelled voxel in any volume; expected a task with an RoI.")
        if not found["ring"]:
            raise InputError(f"ring is {self.ring} mm, within which no RoI of {labels[0]} has body around it.")
        return TaskContext(**{part: np.mean(values, axis=0) for part, values in found.items()})

    def _look_around(
        self,
        found: dict[str, list[np.ndarray]],
        scores: np.ndarray,
        label: np.ndarray,
        body: np.ndarray,
        spacing: np.ndarray,
    ) -> None:
        margins = np.ceil(self.ring / spacing).astype(int)
        near = tuple(
            slice(max(side.start - margin, 0), side.stop + margin)
            for side, margin in zip(_bounding_box(label), margins, strict=True)
        )
        scores, label, body = scores[near], label[near], body[near]
        distance = ndimage.distance_transform_edt(label == 0, sampling=spacing)
        around = scores[(distance > 0) & (distance <= self.ring) & body]
        found["roi"].append(_mass_quantiles(scores[label == 1], CONTEXT_QUANTILES))
        if around.size:
            found["ring"].append(_mass_quantiles(around, CONTEXT_QUANTILES))
        found["crop"].append(self._cropped(label, spacing))

    def _cropped(self, label: np.ndarray, spacing: np.ndarray) -> np.ndarray:
        steps = ((np.arange(CROP_SAMPLES) + 0.5) / CROP_SAMPLES - 0.5) * self.crop
        axes = [centre + steps / side for centre, side in zip(np.argwhere(label).mean(axis=0), spacing, strict=True)]
        places = np.meshgrid(*axes, indexing="ij")
        return ndimage.map_coordinates(label.astype(np.float64), places, order=1, mode="grid-constant")
