"""A cost between tasks from intensities in and around the region of interest, its shape, and the body."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage

from medtl_ext._validation import InputError
from medtl_ext.affinity._volumes import NamedVolume, Reader, binary, bounding_box, finite, standardized, voxel_size
from medtl_ext.affinity.images import mass_quantiles, mean_distances
from medtl_ext.affinity.labels import soft_dice
from medtl_ext.transforms import body_mask

CONTEXT_QUANTILES = 256  # number of parts of equal mass that describe a distribution of intensities
RING, CROP = 6.0, 96.0  # mm: width of the ring around an RoI, and side of the box around its centre of mass
CROP_SAMPLES = 48  # along each side of the box


@dataclass(frozen=True, eq=False)
class TaskContext:
    """Summary of a task for `pairwise_context`: means over its patients, made by `task_context`.

    Attributes:
        roi, ring, body: 256 quantiles each of the intensities in the RoI, in the body up to 6 mm around it, and in the
            whole body. Intensities are standardised by mean and standard deviation of the body.
        crop: how often each place in a box around the RoI's centre of mass belongs to the RoI. A side has 96 mm or 48
            samples; voxels outside are not used.
    """

    roi: np.ndarray
    ring: np.ndarray
    body: np.ndarray
    crop: np.ndarray


def task_context(images: Iterable[ArrayLike], labels: Iterable[ArrayLike], *, spacing: ArrayLike = 1.0) -> TaskContext:
    """Summarise a task by means over its patients: intensities in and around the RoI, its shape, and the body.

    Intensities are standardised by their mean and standard deviation inside `medtl_ext.transforms.body_mask`. In one
    dimension the mean of quantiles is the Wasserstein barycentre: the distribution of a typical patient.

    Args:
        images: N images of one modality, 2D or 3D, (almost) zero outside the body. They are read one at a time.
        labels: N label volumes of 0 and 1, of the same shapes.
        spacing: size of a voxel in mm: one number, one per axis, or N rows with one per axis.

    Returns:
        The task's summary, about a hundred kilobytes. A patient without RoI is used for the body only.

    Raises:
        InputError: invalid input; no patient has an RoI, or none has body around it; an image is zero everywhere.

    Example:
        >>> image = np.arange(1.0, 82.0).reshape(9, 9)
        >>> context = task_context([image], [image > 70], spacing=3)
        >>> context.roi.shape, context.crop.shape
        ((256,), (48, 48))
        >>> bool(context.roi.mean() > context.ring.mean() > context.body.mean())
        True
    """
    found: dict[str, list[np.ndarray]] = {"roi": [], "ring": [], "body": [], "crop": []}
    for index, (image, label) in enumerate(Reader().pairs(images=images, labels=labels)):
        for part, values in _parts(image, label, spacing, index).items():
            found[part].append(values)
    if not found["roi"]:
        raise InputError("labels has no labelled voxel in any volume; expected a task with an RoI.")
    if not found["ring"]:
        raise InputError(f"labels has no RoI with body within {RING:g} mm around it; check spacing, which is in mm.")
    return TaskContext(**{part: np.mean(values, axis=0) for part, values in found.items()})


def pairwise_context(
    contexts_a: Sequence[TaskContext],
    contexts_b: Sequence[TaskContext],
    *,
    weights: Sequence[float] = (0.5, 0.25, 0.25),
) -> torch.Tensor:
    """Cost between all tasks of two lists, from the context of their RoI; lower means more similar.

    It is the weighted sum of three terms. Each is 0 between a task and itself:

    1. intensity: mean of two Wasserstein distances: between intensities inside the two RoI, and between intensities in
       the rings around them. It separates bright RoI in dark tissue from dark RoI in bright tissue. In standard
       deviations of the body;
    2. shape: 1 - Dice (as in `mean_label_dice`) of the mean RoI, each centred on its centre of mass. It compares size
       and shape, independent of the place in the body. In [0, 1];
    3. body: Wasserstein distance between intensities in the whole body. It separates modalities. In standard deviations
       of the body.

    Args:
        contexts_a: Na tasks, from `task_context`.
        contexts_b: Nb tasks, made with the same settings.
        weights: of intensity, shape and body, >= 0. The default worked well in a small study on synthetic MRI; it was
            not tuned.

    Returns:
        Na x Nb costs, float64, >= 0, symmetric in both tasks.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> image = np.arange(1.0, 82.0).reshape(9, 9)
        >>> tasks = [task_context([image], [image > 70], spacing=3), task_context([image], [image < 10], spacing=3)]
        >>> pairwise_context(tasks, tasks)
        tensor([[0.0000, 1.3173],
                [1.3173, 0.0000]], dtype=torch.float64)
    """
    share = np.asarray(weights, dtype=float)
    if share.shape != (3,) or not (np.isfinite(share) & (share >= 0)).all():
        raise InputError(f"weights is {weights}; expected three finite numbers >= 0: of intensity, shape and body.")
    sides = {"contexts_a": list(contexts_a), "contexts_b": list(contexts_b)}
    for name, contexts in sides.items():
        if not contexts or not all(isinstance(context, TaskContext) for context in contexts):
            raise InputError(f"{name} must list at least one task, each as task_context returns it.")
    if len({context.crop.ndim for contexts in sides.values() for context in contexts}) > 1:
        raise InputError("contexts_a and contexts_b mix tasks in 2D and in 3D; expected all in 2D or all in 3D.")

    def stacked(part: str) -> list[np.ndarray]:
        return [np.stack([getattr(context, part) for context in contexts]) for contexts in sides.values()]

    intensity = (mean_distances(*stacked("roi")) + mean_distances(*stacked("ring"))) / 2
    costs = np.stack([intensity, 1 - soft_dice(*stacked("crop")), mean_distances(*stacked("body"))])
    return torch.from_numpy(np.tensordot(share, costs, axes=1))


def _parts(named_image: NamedVolume, named_label: NamedVolume, spacing: ArrayLike, index: int) -> dict[str, np.ndarray]:
    """The parts of a `TaskContext` for one patient."""
    scores, label = finite(*named_image), binary(*named_label)
    body = body_mask(scores)
    if not body.any():
        raise InputError(f"{named_image[0]} is zero everywhere; expected an image.")
    scores = standardized(scores, scores[body])
    parts = {"body": mass_quantiles(scores[body], CONTEXT_QUANTILES)}
    if label.any():
        voxel = voxel_size(spacing, index, label.ndim)
        near = bounding_box(label, margin=np.ceil(RING / voxel).astype(int))
        scores, label, body = scores[near], label[near], body[near]
        distance = ndimage.distance_transform_edt(label == 0, sampling=voxel)
        around = scores[(distance > 0) & (distance <= RING) & body]
        if around.size:
            parts["ring"] = mass_quantiles(around, CONTEXT_QUANTILES)
        parts["roi"] = mass_quantiles(scores[label == 1], CONTEXT_QUANTILES)
        parts["crop"] = _cropped(label, CROP / CROP_SAMPLES / voxel)
    return parts


def _cropped(label: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The label around its centre of mass, sampled every ``step`` voxels; 0 beyond the volume's border."""
    start = np.argwhere(label).mean(axis=0) - step * (CROP_SAMPLES - 1) / 2
    grid = {"offset": start, "output_shape": (CROP_SAMPLES,) * label.ndim, "order": 1, "mode": "grid-constant"}
    return ndimage.affine_transform(label.astype(np.float64), np.diag(step), **grid)
