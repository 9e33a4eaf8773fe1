"""Compare label volumes: all pairs by SSIM, two sets by the Dice of their mean maps, or by shape and position."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage, special
from scipy.spatial.distance import cdist

from medtl_ext._validation import InputError, require_number, warn
from medtl_ext.affinity._volumes import Reader, binary, bounding_box, voxel_size

Volumes = list[np.ndarray]

# Numbers per block (16 MiB of float32): enough for a fast matrix product. Above 2**24 voxels per block, float32 would
# no longer count exactly.
BLOCK = 2**22
GAUSSIAN, GAUSSIAN_SIDE = 1.5, 11  # standard deviation and side of Wang's windows, in pixels

#: The columns of `shape_descriptors`, in 2D and in 3D.
SHAPE_DESCRIPTORS = {
    2: ("log_volume", "log_components", "elongation", "compactness", "centre_0", "centre_1"),
    3: ("log_volume", "log_components", "elongation", "flatness", "compactness", "centre_0", "centre_1", "centre_2"),
}

#: The unit of each descriptor in `shape_similarity`: on 38 tasks of the phantom, the larger of two standard deviations
#: (between the means of tasks, and between the patients of a task), rounded.
SHAPE_SCALES = {"log_volume": 2.0, "log_components": 1.5, "elongation": 0.1, "flatness": 0.1, "compactness": 1.5}
SHAPE_SCALES |= dict.fromkeys(("centre_0", "centre_1", "centre_2"), 0.1)


def pairwise_ssim(
    labels_a: Iterable[ArrayLike],
    labels_b: Iterable[ArrayLike],
    *,
    k1: float = 0.3,
    k2: float = 0.3,
    window: int | str | None = None,
) -> torch.Tensor:
    r"""Structural similarity of every label volume of one set with every one of another.

    .. math::
        \mathrm{SSIM} = \frac{(2 \mu_a \mu_b + k_1^2)(2 \sigma_{ab} + k_2^2)}
        {(\mu_a^2 + \mu_b^2 + k_1^2)(\sigma_a^2 + \sigma_b^2 + k_2^2)}

    over whole volumes (the global form), or averaged over windows around every voxel. For labels of 0 and 1, means and
    variances follow from the number of labelled voxels, and covariances from the number of voxels labelled in both. All
    pairs take one matrix product. Counts are exact for volumes of any size.

    Args:
        labels_a: Na label volumes of 0 and 1, 2D or 3D.
        labels_b: Nb label volumes. If shapes differ, all are resampled by nearest neighbour to the largest extent along
            each axis, with a `UserWarning`.
        k1, k2: stabilisers of the means and of the variances, > 0. SeqTran uses 0.3; scikit-image and the paper that
            introduced SSIM use 0.01 and 0.03.
        window: None for the global form; ``"gaussian"`` for the local windows of Wang 2004, 11 x 11 pixels weighted by
            a Gaussian of 1.5, in each slice along the last axis of a volume; an odd number, such as 7, for plain
            windows with this many voxels per side.

    Returns:
        Na x Nb, float64, > -1, higher means more similar; 1 for two empty volumes. With k1 = k2 = 0.3, small labels are
        similar wherever they are: lesion maps of 0.02 % and of 0.7 % of the voxels have 0.93. SeqTran's code divides
        variances by the number of voxels N, but covariances by N - 1. So in the global form the similarity v of a
        volume with itself is not 1 but ``(2 s N / (N - 1) + k2^2) / (2 s + k2^2)``, where s is its variance:
        1 <= v <= 1 + 1 / (N - 1). With windows it is 1. The matrix is symmetric.

        Memory: one byte per voxel of every volume; nothing besides the input if it is uint8 or bool.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> labels = [np.array([[1, 1], [0, 0]]), np.array([[1, 0], [0, 0]]), np.array([[0, 0], [0, 0]])]
        >>> pairwise_ssim(labels, labels)
        tensor([[1.2825, 0.6779, 0.0701],
                [0.6779, 1.2688, 0.1914],
                [0.0701, 0.1914, 1.0000]], dtype=torch.float64)

    Reference: SeqTran, eq. 4, with the constants of its code; Wang et al., *Image quality assessment: from error
    visibility to structural similarity*, IEEE TIP 13, 2004. With windows it equals
    `skimage.metrics.structural_similarity` with ``data_range=1``, ``K1=k1``, ``K2=k2`` and ``win_size=window``, or, of
    slices, ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``.
    """
    c1, c2 = (require_number(name, value, 0, above=True) ** 2 for name, value in (("k1", k1), ("k2", k2)))
    reader = Reader()
    a = [binary(*named) for named in reader.volumes("labels_a", labels_a)]
    b = a if labels_b is labels_a else [binary(*named) for named in reader.volumes("labels_b", labels_b)]
    grid = _common_grid({volume.shape for volume in (*a, *b)})
    for volumes in (a, b):
        volumes[:] = _on_grid(volumes, grid)
    if window is None:
        return reader.tensor(_global_ssim(a, b, c1, c2))
    if window == "gaussian":
        if min(grid[:2]) < GAUSSIAN_SIDE:
            hint = f"expected at least {GAUSSIAN_SIDE} x {GAUSSIAN_SIDE}, the size of the window"
            raise InputError(f"labels_a and labels_b have slices of {grid[:2]}; {hint}.")
        return reader.tensor(_windowed_ssim(a, b, c1, c2, window, (GAUSSIAN_SIDE, GAUSSIAN_SIDE, 1)[: len(grid)]))
    if require_number("window", window, 3, min(grid), whole=True) % 2 == 0:
        raise InputError(f"window is {window}; expected an odd number.")
    return reader.tensor(_windowed_ssim(a, b, c1, c2, window, (window,) * len(grid)))


def mean_label_dice(labels_a: Iterable[ArrayLike], labels_b: Iterable[ArrayLike]) -> torch.Tensor:
    r"""Dice of two mean label maps: do two tasks label the same voxels with the same frequency?

    With m(x) the share of a set's volumes that are labelled at x,

    .. math:: \mathrm{Dice} = 2 \sum_x m_a(x)\, m_b(x) / \textstyle\sum_x (m_a(x)^2 + m_b(x)^2)

    For one volume on each side this is the usual Dice. It is 1 for equal maps only.

    Args:
        labels_a: label volumes of 0 and 1, 2D or 3D, of images that are registered to each other.
        labels_b: label volumes of another task. Different shapes are resampled as in `pairwise_ssim`.

    Returns:
        A float64 scalar in [0, 1], higher means more similar. Without any labelled voxel in both sets it is 1, with a
        `UserWarning`, and says nothing about transfer. Memory: one map for each shape.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> mean_label_dice([[[1, 1], [0, 0]], [[1, 0], [0, 0]]], [[[1, 0], [0, 0]]])  # means 1, 0.5 and 1, 0
        tensor(0.8889, dtype=torch.float64)
    """
    reader = Reader()
    a = _shares(reader, "labels_a", labels_a)
    b = a if labels_b is labels_a else _shares(reader, "labels_b", labels_b)
    grid = _common_grid({*a, *b})
    # Resampling by nearest neighbour commutes with addition, so it is done after summing the volumes of each shape.
    mean_a, mean_b = (np.sum(_on_grid(shares.values(), grid), axis=0) for shares in (a, b))
    if not mean_a.any() and not mean_b.any():
        warn("labels_a and labels_b hold no labelled voxel, so their Dice is 1 and says nothing about transfer.")
    return reader.tensor(soft_dice(mean_a[None], mean_b[None])[0, 0])


def shape_descriptors(labels: Iterable[ArrayLike], spacing: ArrayLike = 1.0) -> torch.Tensor:
    r"""Shape and position of the labelled region of each volume, in the columns of `SHAPE_DESCRIPTORS`.

    Let :math:`\lambda_1 \ge \lambda_2 \ge \lambda_3` be the principal variances of the region in mm (voxels are boxes):

    - ``log_volume``: ln of the volume in mm3 (in 2D, of the area in mm2);
    - ``log_components``: ln of the number of connected components; voxels that share a corner are connected;
    - ``elongation``: :math:`\ln \sqrt{\lambda_1 / \lambda_2}`, 0 for a ball or a disc;
    - ``flatness``, in 3D: :math:`\ln \sqrt{\lambda_2 / \lambda_3}`, 0 for a ball or a rod;
    - ``compactness``: ln of the volume divided by that of the solid ellipsoid with the same variances. 0 for an
      ellipsoid, -0.12 for a cube, lower for a shell, and lowest for scattered parts;
    - ``centre_0`` and so on: position of the centre of mass along each axis, from the middle of the volume, in units of
      the volume's extent.

    Args:
        labels: N label volumes of 0 and 1, 2D or 3D. They are read one at a time.
        spacing: size of a voxel in mm: one number, one per axis, or N rows with one per axis.

    Returns:
        N x 6 (2D) or N x 8 (3D), float64. The row of a volume without labelled voxel is NaN, with a `UserWarning`;
        `shape_similarity` ignores it.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> label = np.zeros((8, 8))
        >>> label[2:6, 4:6] = 1  # 2 mm x 1 mm, right of the middle
        >>> shape_descriptors([label], spacing=0.5).numpy().round(3)
        array([[ 0.693,  0.   ,  0.693, -0.046,  0.   ,  0.125]])
    """
    reader, rows, empty = Reader(), [], []
    for index, (name, volume) in enumerate(reader.volumes("labels", labels)):
        label = binary(name, volume)
        if label.any():
            rows.append(_describe(label, voxel_size(spacing, index, label.ndim)))
        else:
            rows.append(np.full(len(SHAPE_DESCRIPTORS[label.ndim]), np.nan))
            empty.append(name)
    if empty:
        names = f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
        warn(f"Nothing is labelled in {names}: the shape descriptors are NaN.")
    return reader.tensor(np.stack(rows))


def shape_similarity(descriptors_a: ArrayLike, descriptors_b: ArrayLike) -> torch.Tensor:
    r"""Similarity of the mean shapes of two tasks.

    .. math:: \exp \left( -\tfrac1D \textstyle\sum_j |\bar a_j - \bar b_j| / s_j \right)

    with the scales s of `SHAPE_SCALES`.

    Args:
        descriptors_a: Na x D, from `shape_descriptors`. Rows with NaN, of volumes without RoI, are ignored.
        descriptors_b: Nb x D.

    Returns:
        A float64 scalar in (0, 1], higher means more similar, 1 for equal means. 0 with a `UserWarning` if all rows of
        one side are NaN.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> cube, rod = np.zeros((9, 9, 9)), np.zeros((9, 9, 9))
        >>> cube[3:6, 3:6, 3:6] = 1
        >>> rod[4, 4] = 1
        >>> shape_similarity(shape_descriptors([cube]), shape_descriptors([cube, rod]))
        tensor(0.2447, dtype=torch.float64)
    """
    reader = Reader()
    a, b = reader.arrays(rows=True, allow_nan=True, descriptors_a=descriptors_a, descriptors_b=descriptors_b)
    names = {len(names): names for names in SHAPE_DESCRIPTORS.values()}.get(a.shape[1])
    if names is None:
        raise InputError(f"descriptors_a has {a.shape[1]} columns; expected those of shape_descriptors.")
    a, b = (rows[~np.isnan(rows).any(axis=1)] for rows in (a, b))
    if not len(a) or not len(b):
        warn(f"descriptors_{'b' if len(a) else 'a'} has NaN in every row, so the similarity is 0.")
        return reader.tensor(0.0)
    scales = [SHAPE_SCALES[name] for name in names]
    return reader.tensor(np.exp(-np.mean(np.abs(a.mean(axis=0) - b.mean(axis=0)) / scales)))


def _common_grid(shapes: set[tuple[int, ...]]) -> tuple[int, ...]:
    grid = tuple(max(sides) for sides in zip(*shapes, strict=True))
    if len(shapes) > 1:
        warn(f"The label volumes have {len(shapes)} different shapes: all are resampled to {grid}, nearest neighbour.")
    return grid


def _on_grid(volumes: Iterable[np.ndarray], grid: tuple[int, ...]) -> list[np.ndarray]:
    return [volume if volume.shape == grid else _nearest(volume, grid) for volume in volumes]


def _nearest(volume: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Resample by nearest neighbour: the values at the centres of the new voxels."""
    sides = zip(volume.shape, grid, strict=True)
    return volume[np.ix_(*(((np.arange(new) + 0.5) * (old / new)).astype(np.intp) for old, new in sides))]


# SSIM and Dice


def _ssim(
    mean_a: np.ndarray, mean_b: np.ndarray, both: np.ndarray, c1: float, c2: float, factors: tuple[float, float]
) -> np.ndarray:
    """SSIM from the shares of voxels labelled in a, in b, and in both. ``factors`` scale covariances and variances."""
    covariance = (both - mean_a * mean_b) * factors[0]
    variances = (mean_a * (1 - mean_a) + mean_b * (1 - mean_b)) * factors[1]
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * (2 * covariance + c2) / (variances + c2)


def _global_ssim(a: Volumes, b: Volumes, c1: float, c2: float) -> np.ndarray:
    voxels = a[0].size
    mean_a, mean_b = (np.array([np.count_nonzero(volume.view(bool)) for volume in side]) / voxels for side in (a, b))
    return _ssim(mean_a[:, None], mean_b, _overlaps(a, b) / voxels, c1, c2, (voxels / (voxels - 1), 1.0))


def _overlaps(a: Volumes, b: Volumes) -> np.ndarray:
    """Number of voxels labelled in both volumes of every pair: a matrix product, block by block."""
    rows_a, rows_b = ([volume.reshape(-1) for volume in side] for side in (a, b))
    step = max(1, BLOCK // (len(a) + len(b)))
    total = np.zeros((len(a), len(b)))
    for start in range(0, rows_a[0].size, step):
        left = np.stack([row[start : start + step] for row in rows_a], dtype=np.float32)
        right = left if b is a else np.stack([row[start : start + step] for row in rows_b], dtype=np.float32)
        total += left @ right.T
    return total


def _windowed_ssim(
    a: Volumes, b: Volumes, c1: float, c2: float, window: int | str, sides: tuple[int, ...]
) -> np.ndarray:
    # The SSIM of a window without label is 1, so only windows near labels are computed.
    margin = np.subtract(sides, 1)
    near_a, near_b = ([bounding_box(volume, margin=margin) for volume in side] for side in (a, b))
    windows = np.prod(np.subtract(a[0].shape, margin))
    result = np.ones((len(a), len(b)))
    for i, j in np.ndindex(*result.shape):
        if b is a and j < i:
            result[i, j] = result[j, i]
        elif (near := _union(near_a[i], near_b[j])) is not None:
            result[i, j] -= _missing(a[i][near], b[j][near], c1, c2, window, sides) / windows
    return result


def _missing(a: np.ndarray, b: np.ndarray, c1: float, c2: float, window: int | str, sides: tuple[int, ...]) -> float:
    """Sum of 1 - SSIM over all windows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    inner = tuple(slice(side // 2, size - side // 2) for side, size in zip(sides, a.shape, strict=True))
    if window == "gaussian":
        smooth = partial(ndimage.gaussian_filter, sigma=(GAUSSIAN, GAUSSIAN, 0)[: a.ndim], radius=GAUSSIAN_SIDE // 2)
        factor = 1.0
    else:
        smooth = partial(ndimage.uniform_filter, size=window)
        factor = window**a.ndim / (window**a.ndim - 1)  # unbiased covariances, as in scikit-image
    shares = (smooth(labelled)[inner] for labelled in (a, b, a * b))
    return float((1 - _ssim(*shares, c1, c2, (factor, factor))).sum())


def _union(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    if first is None or second is None:
        return first or second
    return tuple(slice(min(f.start, s.start), max(f.stop, s.stop)) for f, s in zip(first, second, strict=True))


def _shares(reader: Reader, name: str, labels: Iterable[ArrayLike]) -> dict[tuple[int, ...], np.ndarray]:
    """Shape -> for each voxel, the share of all volumes that have this shape and label the voxel."""
    totals: dict[tuple[int, ...], np.ndarray] = {}
    count = 0
    for item, volume in reader.volumes(name, labels):
        totals[volume.shape] = totals.get(volume.shape, 0.0) + binary(item, volume)
        count += 1
    return {shape: total / count for shape, total in totals.items()}


def soft_dice(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dice of all pairs of maps, which are stacked along the first axis of ``a`` and ``b``."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    # 2 ab = a^2 + b^2 - (a - b)^2, so that equal maps have exactly 1, also two empty ones.
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    return np.maximum(1 - cdist(a, b, "sqeuclidean") / np.where(squares > 0, squares, 1), 0)


# Shape


def _describe(label: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    ndim, box = label.ndim, bounding_box(label)
    voxels = np.argwhere(label[box])
    variances = np.atleast_2d(np.cov(voxels * spacing, rowvar=False, ddof=0)) + np.diag(spacing**2 / 12)
    radii = np.sqrt((ndim + 2) * np.linalg.eigvalsh(variances)[::-1])
    volume = len(voxels) * np.prod(spacing)
    ellipsoid = np.pi ** (ndim / 2) / special.gamma(ndim / 2 + 1) * np.prod(radii)
    components = ndimage.label(label[box], structure=np.ones((3,) * ndim))[1]
    centre = voxels.mean(axis=0) + 0.5 + [side.start for side in box]
    descriptors = [
        np.log([volume, components]),
        np.log(radii[:-1] / radii[1:]),
        np.log([volume / ellipsoid]),
        centre / label.shape - 0.5,
    ]
    return np.concatenate(descriptors)
