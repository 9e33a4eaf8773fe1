"""Label volumes compared voxel by voxel: all pairs by SSIM, two sets by the Dice of their mean maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial.distance import cdist

from medtl_ext._validation import InputError, require_choice
from medtl_ext.affinity._volumes import _binary, _bounding_box, _Reader, _warn

__all__ = ["mean_label_dice", "pairwise_ssim"]

GAUSSIAN_SIGMA, GAUSSIAN_TRUNCATE = 1.5, 3.5  # of SSIM's window, as scikit-image has them

# 16 MiB of float32 labels at a time: enough for the matrix product to be fast, and it stays near the processor. Beyond
# 2**24 voxels in one block float32 would no longer count exactly.
_BLOCK = 2**22


def pairwise_ssim(
    labels_a: Iterable[ArrayLike],
    labels_b: Iterable[ArrayLike],
    *,
    k1: float = 0.3,
    k2: float = 0.3,
    window: int | str | None = None,
    covariance_ddof: int = 1,
) -> torch.Tensor:
    r"""Structural similarity of every label volume of one set with every one of another.

    .. math::
        \mathrm{SSIM} = \frac{(2 \mu_a \mu_b + k_1^2)(2 \sigma_{ab} + k_2^2)}
        {(\mu_a^2 + \mu_b^2 + k_1^2)(\sigma_a^2 + \sigma_b^2 + k_2^2)}

    over whole volumes (the global form), or in a window around every voxel and then averaged. For labels of 0 and 1
    means and variances follow from the number of labelled voxels, and covariances from the number labelled in both,
    which for all pairs is one matrix product: exact counts, however large the volumes are.

    Args:
        labels_a: Na label volumes of 0 and 1, 2D or 3D.
        labels_b: Nb label volumes. If shapes differ, all are resampled, nearest neighbour, to the largest extent found
            along each axis, with a `UserWarning`.
        k1, k2: stabilisers of the means and of the variances, > 0. SeqTran has 0.3; scikit-image, and the paper that
            introduced SSIM, have 0.01 and 0.03.
        window: None for the global form; an odd number, such as 7, for windows of so many voxels a side; "gaussian" for
            weights that fall off with a standard deviation of 1.5 voxels, up to 5 voxels away.
        covariance_ddof: of the global form, whose variances divide by the number of voxels N: 1 divides covariances by
            N - 1, as SeqTran's code does; 0 divides them by N.

    Returns:
        Na x Nb, float64, > -1, higher is more alike; 1 for two empty volumes. With k1 = k2 = 0.3 labels that fill
        little of their volume are all alike, wherever they lie: lesion maps of 0.02 % and of 0.7 % of the voxels have
        0.93. In the global form the similarity v of a volume with itself is not 1 but
        ``(2 s N / (N - 1) + k2^2) / (2 s + k2^2)``, s being its variance, so 1 <= v <= 1 + 1 / (N - 1). It is 1 with
        ``covariance_ddof=0`` or windows. The same pair gives the same value in either order.

        Memory: one byte per voxel of every volume, and nothing beyond the input where that is uint8 or bool.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> labels = [np.array([[1, 1], [0, 0]]), np.array([[1, 0], [0, 0]]), np.array([[0, 0], [0, 0]])]
        >>> pairwise_ssim(labels, labels)
        tensor([[1.2825, 0.6779, 0.0701],
                [0.6779, 1.2688, 0.1914],
                [0.0701, 0.1914, 1.0000]], dtype=torch.float64)

    Reference: SeqTran, eq. 4, with the constants of its code. With windows it equals
    `skimage.metrics.structural_similarity` with ``data_range=1``, ``K1=k1``, ``K2=k2`` and ``win_size=window``, or
    ``gaussian_weights=True, use_sample_covariance=False``.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if not 0 < value < np.inf:
            raise InputError(f"{name} is {value}; expected a finite number > 0.")
    if covariance_ddof not in (0, 1) or (window is not None and covariance_ddof != 1):
        raise InputError(f"covariance_ddof is {covariance_ddof}; expected 0 or 1, and no other than 1 with a window.")
    reader = _Reader()
    a = [_binary(*named) for named in reader.volumes("labels_a", labels_a)]
    b = None if labels_b is labels_a else [_binary(*named) for named in reader.volumes("labels_b", labels_b)]
    grid = _common_grid({volume.shape for volume in (*a, *(b or ()))})
    a, b = _on_grid(a, grid), b and _on_grid(b, grid)
    if window is None:
        return reader.tensor(_global_ssim(a, b, k1**2, k2**2, covariance_ddof))
    return reader.tensor(_windowed_ssim(a, b, k1**2, k2**2, _Window.checked(window, grid)))


def mean_label_dice(labels_a: Iterable[ArrayLike], labels_b: Iterable[ArrayLike]) -> torch.Tensor:
    r"""Dice of two mean label maps: do two tasks label the same place, in the same shape, as often?

    With m(x) the share of a set's volumes that are labelled at x,

    .. math:: \mathrm{Dice} = 2 \sum_x m_a(x)\, m_b(x) / \textstyle\sum_x (m_a(x)^2 + m_b(x)^2)

    which for one volume a side is the usual Dice, and is 1 for equal maps only.

    Args:
        labels_a: label volumes of 0 and 1, 2D or 3D, of images that are registered to each other.
        labels_b: the same of another task. Different shapes are resampled as in `pairwise_ssim`.

    Returns:
        A float64 scalar in [0, 1], higher is more alike. With no labelled voxel in either set it is 1, with a
        `UserWarning`: that says nothing about transfer. Memory: one map for each shape that occurs.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> mean_label_dice([[[1, 1], [0, 0]], [[1, 0], [0, 0]]], [[[1, 0], [0, 0]]])  # means 1, 0.5 and 1, 0
        tensor(0.8889, dtype=torch.float64)
    """
    reader = _Reader()
    a = _LabelSums.read(reader, "labels_a", labels_a)
    b = a if labels_b is labels_a else _LabelSums.read(reader, "labels_b", labels_b)
    grid = _common_grid({*a.totals, *b.totals})
    mean_a, mean_b = a.mean(grid), b.mean(grid)
    if not mean_a.any() and not mean_b.any():
        _warn("labels_a and labels_b hold no labelled voxel, so their Dice is 1 and says nothing about transfer.")
        return reader.tensor(1.0)
    return reader.tensor(_soft_dice(mean_a[None], mean_b[None])[0, 0])


def _common_grid(shapes: set[tuple[int, ...]]) -> tuple[int, ...]:
    grid = tuple(max(sides) for sides in zip(*shapes, strict=True))
    if len(shapes) > 1:
        warnings.warn(
            f"The label volumes have {len(shapes)} different shapes, such as {min(shapes)} and {max(shapes)}: all are "
            f"resampled to {grid}, nearest neighbour, where they should show the same places.",
            UserWarning,
            stacklevel=3,
        )
    return grid


def _on_grid(volumes: Iterable[np.ndarray], grid: tuple[int, ...]) -> list[np.ndarray]:
    return [volume if volume.shape == grid else _nearest(volume, grid) for volume in volumes]


def _nearest(volume: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """What lies at the centres of the new voxels."""
    sides = zip(volume.shape, grid, strict=True)
    return volume[np.ix_(*(((np.arange(new) + 0.5) * (old / new)).astype(np.intp) for old, new in sides))]


# SSIM and Dice


def _global_ssim(a: list[np.ndarray], b: list[np.ndarray] | None, c1: float, c2: float, ddof: int) -> np.ndarray:
    voxels = a[0].size
    mean_a = _labelled(a)[:, None] / voxels
    mean_b = mean_a.T if b is None else _labelled(b) / voxels
    covariance = (_overlaps(a, b) / voxels - mean_a * mean_b) * (voxels / (voxels - ddof))
    variances = mean_a * (1 - mean_a) + mean_b * (1 - mean_b)
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * (2 * covariance + c2) / (variances + c2)


def _labelled(volumes: list[np.ndarray]) -> np.ndarray:
    return np.array([np.count_nonzero(volume.view(bool)) for volume in volumes], dtype=np.float64)


def _overlaps(a: list[np.ndarray], b: list[np.ndarray] | None) -> np.ndarray:
    """Number of voxels labelled in both, for every pair: one matrix product, a block of voxels at a time."""
    flat_a = [volume.reshape(-1) for volume in a]
    flat_b = flat_a if b is None else [volume.reshape(-1) for volume in b]
    block = max(1, _BLOCK // (len(flat_a) + len(flat_b)))
    total = np.zeros((len(flat_a), len(flat_b)))
    for start in range(0, flat_a[0].size, block):
        left = _float_rows(flat_a, start, block)
        total += left @ (left if b is None else _float_rows(flat_b, start, block)).T
    return total


def _float_rows(rows: list[np.ndarray], start: int, block: int) -> np.ndarray:
    result = np.empty((len(rows), min(block, rows[0].size - start)), dtype=np.float32)
    for target, row in zip(result, rows, strict=True):
        target[:] = row[start : start + block]
    return result


@dataclass(frozen=True)
class _Window:
    """How local means are taken, and how many voxels away from the middle they look."""

    radius: int
    gaussian: bool

    @classmethod
    def checked(cls, window: int | str, grid: tuple[int, ...]) -> _Window:
        gaussian = isinstance(window, str)
        if gaussian:
            require_choice("window", window, ["gaussian"])
            radius = int(GAUSSIAN_TRUNCATE * GAUSSIAN_SIGMA + 0.5)
        elif isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 3 or window % 2 == 0:
            raise InputError(f"window is {window}; expected None, an odd number from 3 on, or 'gaussian'.")
        else:
            radius = int(window) // 2
        if min(grid) <= 2 * radius:
            raise InputError(f"window is {2 * radius + 1} voxels wide, but the labels are {grid}: give a smaller one.")
        return cls(radius, gaussian)

    def mean(self, volume: np.ndarray) -> np.ndarray:
        """Means around every voxel whose window lies inside the volume."""
        if self.gaussian:
            means = ndimage.gaussian_filter(volume, GAUSSIAN_SIGMA, truncate=GAUSSIAN_TRUNCATE)
        else:
            means = ndimage.uniform_filter(volume, 2 * self.radius + 1)
        return means[(slice(self.radius, -self.radius),) * volume.ndim]

    def covariance_factor(self, ndim: int) -> float:
        """scikit-image has sample covariances in uniform windows; in Gaussian ones they would mean nothing."""
        voxels = (2 * self.radius + 1) ** ndim
        return 1.0 if self.gaussian else voxels / (voxels - 1)


def _windowed_ssim(
    a: list[np.ndarray], b: list[np.ndarray] | None, c1: float, c2: float, window: _Window
) -> np.ndarray:
    other = a if b is None else b
    boxes = [_bounding_box(volume) for volume in a]
    other_boxes = boxes if b is None else [_bounding_box(volume) for volume in other]
    result = np.ones((len(a), len(other)))
    for i, j in np.ndindex(*result.shape):
        if b is None and j < i:
            result[i, j] = result[j, i]
        elif (box := _union(boxes[i], other_boxes[j])) is not None:
            result[i, j] = _local_ssim(a[i], other[j], box, c1, c2, window)
    return result


def _union(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    if first is None or second is None:
        return first or second
    return tuple(slice(min(f.start, s.start), max(f.stop, s.stop)) for f, s in zip(first, second, strict=True))


def _local_ssim(a: np.ndarray, b: np.ndarray, box: tuple[slice, ...], c1: float, c2: float, window: _Window) -> float:
    reach, shape = 2 * window.radius, a.shape
    # A window that sees no label has SSIM 1, so only what is near the labels need be looked at.
    near = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
    a, b = a[near].astype(np.float64), b[near].astype(np.float64)
    mean_a, mean_b, both = window.mean(a), window.mean(b), window.mean(a * b)
    factor = window.covariance_factor(a.ndim)
    covariance = factor * (both - mean_a * mean_b)
    variances = factor * (mean_a - mean_a**2 + mean_b - mean_b**2)  # the square of a label is the label
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return 1 + float((values - 1).sum()) / float(np.prod([n - reach for n in shape]))


@dataclass
class _LabelSums:
    """How many volumes label each voxel, for every shape that occurs."""

    totals: dict[tuple[int, ...], np.ndarray]
    count: int

    @classmethod
    def read(cls, reader: _Reader, name: str, labels: Iterable[ArrayLike]) -> _LabelSums:
        totals: dict[tuple[int, ...], np.ndarray] = {}
        count = 0
        for item, volume in reader.volumes(name, labels):
            total = totals.setdefault(volume.shape, np.zeros(volume.shape))
            total += _binary(item, volume)
            count += 1
        return cls(totals, count)

    def mean(self, grid: tuple[int, ...]) -> np.ndarray:
        # Picking voxels commutes with adding volumes, so it could wait until all shapes were known.
        return np.sum(_on_grid(self.totals.values(), grid), axis=0) / self.count


def _soft_dice(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dice of every map in ``a`` with every one in ``b``, which are stacked along the first axis."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    # 2 ab = a^2 + b^2 - (a - b)^2, so that equal maps have exactly 1, two empty ones as well.
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    return np.maximum(1 - cdist(a, b, "sqeuclidean") / np.where(squares > 0, squares, 1), 0)
