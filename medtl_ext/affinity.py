r"""How near two tasks are, from their labels and images alone: no network is trained or run.

- `pairwise_ssim`: structural similarity of label volumes, all pairs as one matrix product (SeqTran, PriorSel).
- `pairwise_wasserstein`: distance of image volumes through their principal components (SeqTran), with one principal
  component analysis and one sort per image, not per pair.
- `task_affinity` puts the two into one cost, lower is nearer; `fit_affinity_weights` fits its weights to transfers that
  were measured.
- `mean_label_dice`, `shape_descriptors` and `shape_similarity` compare the regions of interest (RoI) of two tasks.
- `context_affinity` is a cost that looks at intensities in and around the RoI, at its shape, and at the body.

Volumes are X x Y x Z or X x Y, arrays or tensors, all of one call in 2D or all in 3D; a channel axis of length one in
front is dropped. A set of volumes is any iterable; one that reads from disk as it goes, such as a generator, never has
more than one image in memory. Voxels are compared by their index, so volumes should be oriented alike. Labels hold 0
and 1 only, one class at a time: SSIM takes their range to be 1.

SeqTran: Yang et al., *Selecting the Best Sequential Transfer Path for Medical Image Segmentation with Limited Labeled
Data*. PriorSel: Li et al., *Finding the Most Transferable Tasks for Brain Image Segmentation*, BIBM 2022.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_numpy
from numpy.typing import ArrayLike
from scipy import linalg, ndimage, optimize, sparse, special, stats
from scipy.spatial.distance import cdist
from skimage.transform import resize

from medtl_ext._validation import InputError, require_choice
from medtl_ext.transforms import body_mask

__all__ = [
    "PUBLISHED_WEIGHTS",
    "SHAPE_DESCRIPTORS",
    "SHAPE_SCALES",
    "TaskContext",
    "context_affinity",
    "fit_affinity_weights",
    "image_quantiles",
    "mean_label_dice",
    "pairwise_context",
    "pairwise_ssim",
    "pairwise_wasserstein",
    "quantile_distance",
    "shape_descriptors",
    "shape_similarity",
    "task_affinity",
    "task_context",
]

#: SeqTran's weights of the Wasserstein distance and of 1 - SSIM.
PUBLISHED_WEIGHTS = (0.0044, 2.4756)

#: What `shape_descriptors` measures, in 2D and in 3D.
SHAPE_DESCRIPTORS = {
    2: ("log_volume", "log_components", "elongation", "compactness", "centre_0", "centre_1"),
    3: ("log_volume", "log_components", "elongation", "flatness", "compactness", "centre_0", "centre_1", "centre_2"),
}

#: The difference in each descriptor that counts as one in `shape_similarity`: on 38 tasks of the phantom, the standard
#: deviation between the means of tasks or that between the patients of one task, whichever is larger, rounded.
SHAPE_SCALES = {
    "log_volume": 2.0,
    "log_components": 1.5,
    "elongation": 0.1,
    "flatness": 0.1,
    "compactness": 1.5,
    "centre_0": 0.1,
    "centre_1": 0.1,
    "centre_2": 0.1,
}

QUANTILES = 2**14  # parts of equal mass in which the distribution of an image's scores is kept
CONTEXT_QUANTILES = 256  # ... and that of intensities in a task's context
CROP_SAMPLES = 48  # along each side of the box around an RoI
GAUSSIAN_SIGMA, GAUSSIAN_TRUNCATE = 1.5, 3.5  # of SSIM's window, as scikit-image has them
TRIALS = 100  # of the Bayesian search

# 16 MiB of float32 labels at a time: enough for the matrix product to be fast, and it stays near the processor. Beyond
# 2**24 voxels in one block float32 would no longer count exactly.
_BLOCK = 2**22


# Labels, voxel by voxel


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


# Images


def pairwise_wasserstein(
    images_a: Iterable[ArrayLike],
    images_b: Iterable[ArrayLike],
    *,
    size: int = 128,
    variance: float = 0.75,
    standardize: bool = True,
) -> torch.Tensor:
    """Wasserstein distance between the principal component scores of every image of one set and of another.

    Each volume is resized to ``size`` voxels a side and read as a matrix of size * size rows and size columns, the last
    axis. The scores of the rows on the leading components are pooled into one distribution, and the distance between
    two such distributions is the result. Everything that an image needs for that is done once per image: where the same
    images come up in several calls, keep their `image_quantiles` and compare these by `quantile_distance`.

    Args:
        images_a: Na images, 2D or 3D, each of any size, read one at a time.
        images_b: Nb images.
        size: voxels a side that every image is resized to: linearly, after a Gaussian filter if it shrinks.
        variance: the components kept are the fewest that explain more than this share of the image's variance, in
            (0, 1).
        standardize: bring the non-zero voxels of each image to mean 0 and standard deviation 1 first; zero ones stay 0.
            False compares raw intensities, as the paper does, in which scanners differ for reasons of their own.

    Returns:
        Na x Nb, float64, >= 0, lower is nearer; in units of intensity, or of standard deviations of an image. An image
        has distance 0 to itself, order does not matter, and the triangle inequality holds. An image without contrast
        counts as all zeros, with a `UserWarning`.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> ramp = np.arange(64.0).reshape(4, 4, 4)
        >>> pairwise_wasserstein([ramp, 2 * ramp], [ramp], size=8, standardize=False)
        tensor([[ 0.0000],
                [39.9515]], dtype=torch.float64)

    Reference: SeqTran, whose eq. 2 is a distance between multivariate distributions; its code has this one. It depends
    on the signs of the components, which an eigensolver leaves open: here the loading of largest magnitude is positive.
    """
    reader, settings = _Reader(), _Components.checked(size, variance, standardize)
    a = settings.quantiles(reader, "images_a", images_a)
    b = a if images_b is images_a else settings.quantiles(reader, "images_b", images_b)
    return reader.tensor(_mean_distances(a, b))


def image_quantiles(
    images: Iterable[ArrayLike], *, size: int = 128, variance: float = 0.75, standardize: bool = True
) -> torch.Tensor:
    """What `pairwise_wasserstein` has to know of each image: the distribution of its scores in 16,384 equal parts.

    128 KiB an image whatever its size, so that of 84 tasks of 60 volumes all fit in 630 MiB.

    Args:
        images, size, variance, standardize: as in `pairwise_wasserstein`.

    Returns:
        N x 16384, float64: row i holds the mean of each successive 16,384th of the sorted scores of image i. They
        average to 0.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> image_quantiles([np.arange(64.0).reshape(4, 4, 4)]).shape
        torch.Size([1, 16384])
    """
    reader = _Reader()
    return reader.tensor(_Components.checked(size, variance, standardize).quantiles(reader, "images", images))


def quantile_distance(quantiles_a: ArrayLike, quantiles_b: ArrayLike) -> torch.Tensor:
    """One-dimensional Wasserstein distances between distributions that are given by their quantiles.

    In one dimension the distance is the mean difference between quantile functions. Means over parts of equal mass give
    it exactly, but for parts in which the two functions cross, where they fall short: with 16,384 parts by at most 2e-5
    of the distance on six brain MRI volumes, raw and standardised.

    Args:
        quantiles_a: Na x Q, from `image_quantiles`.
        quantiles_b: Nb x Q, made with the same settings.

    Returns:
        Na x Nb, float64, >= 0, lower is nearer.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> quantile_distance([[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0], [0.5, 1.5, 4.0]])
        tensor([[0., 1.]], dtype=torch.float64)
    """
    reader = _Reader()
    a, b = reader.matrix("quantiles_a", quantiles_a), reader.matrix("quantiles_b", quantiles_b)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"quantiles_b has {b.shape[1]} columns, quantiles_a {a.shape[1]}; expected as many.")
    return reader.tensor(_mean_distances(a, b))


# SeqTran's cost


def task_affinity(
    image_distance: ArrayLike,
    label_similarity: ArrayLike,
    *,
    alpha: float = PUBLISHED_WEIGHTS[0],
    beta: float = PUBLISHED_WEIGHTS[1],
) -> torch.Tensor:
    """Cost ``alpha * image_distance + beta * (1 - label_similarity)`` between tasks; lower is nearer.

    Args:
        image_distance: `pairwise_wasserstein` or means of it, any shape, >= 0.
        label_similarity: `pairwise_ssim` or means of it, the same shape. What exceeds 1, as the global SSIM of a volume
            with itself does by a hair, counts as 1, so that no cost is negative.
        alpha, beta: weights >= 0, such as `fit_affinity_weights` returns. The default is the published pair, which was
            fitted to raw intensities (``standardize=False``).

    Returns:
        The cost, float64, >= 0, of the same shape.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> task_affinity([100.0, 100.0], [1.0, 0.5])
        tensor([0.4400, 1.6778], dtype=torch.float64)

    Reference: SeqTran, eq. 5, which adds a distance and a similarity and minimises the sum. Its published constants
    resolve that: 0.0044 W - 2.4756 SSIM + 2.4756.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < np.inf:
            raise InputError(f"{name} is {value}; expected a finite number >= 0.")
    reader = _Reader()
    distance, similarity = _distance_and_similarity(reader, image_distance, label_similarity)
    return reader.tensor(alpha * distance + beta * np.maximum(1 - similarity, 0))


def fit_affinity_weights(
    image_distance: ArrayLike, label_similarity: ArrayLike, performance: ArrayLike, *, method: str = "closed_form"
) -> tuple[float, float]:
    """Weights for `task_affinity` whose cost goes best with the losses of performance in transfers that were measured.

    Only beta / alpha matters to a correlation. The scale is that of least squares: where the cost predicts well, a cost
    higher by one goes with a performance lower by one.

    Args:
        image_distance: distance between source and target of each transfer, any shape, >= 0.
        label_similarity: similarity of their labels, the same shape.
        performance: what each transfer gave, such as Dice, the same shape; higher is better.
        method: "closed_form" makes Pearson's correlation of cost and performance as negative as it gets, by
            non-negative least squares; "bayes" does so with Spearman's rank correlation, by a Bayesian search of 100
            seeded trials, and needs Optuna.

    Returns:
        The pair (alpha, beta), >= 0, not both 0. Where no weights give a negative correlation, the pair that comes
        nearest, with a `UserWarning`. Where performance, or both distance and similarity, are constant, the published
        pair, with a `UserWarning`.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it; less than three transfers; "bayes"
            without Optuna.

    Example:
        >>> distance, similarity = np.array([10.0, 20.0, 30.0, 20.0]), np.array([0.9, 0.8, 0.9, 0.4])
        >>> alpha, beta = fit_affinity_weights(distance, similarity, 0.9 - 0.01 * distance - 0.5 * (1 - similarity))
        >>> round(alpha, 6), round(beta, 6)
        (0.01, 0.5)

    Reference: SeqTran, which fits both by Bayesian optimisation.
    """
    require_choice("method", method, ["closed_form", "bayes"])
    reader = _Reader()
    distance, similarity = _distance_and_similarity(reader, image_distance, label_similarity)
    loss = -reader.array("performance", performance)
    if loss.shape != distance.shape or loss.size < 3:
        raise InputError(
            f"performance has shape {loss.shape}, image_distance {distance.shape}; expected the same, and at least "
            "three transfers."
        )
    terms, scales = _standardized(np.stack([distance.ravel(), -similarity.ravel()], axis=1))
    loss, spread = _standardized(loss.reshape(-1, 1))
    if not spread.any() or not scales.any():
        _warn("The transfers are all alike and say nothing about the weights: the published ones are returned.")
        return PUBLISHED_WEIGHTS
    weights, correlation = (_fit_pearson if method == "closed_form" else _fit_spearman)(terms, loss[:, 0])
    if correlation <= 0:
        _warn("No weights >= 0 make the cost anti-correlate with performance: those that come nearest are returned.")
    cost = terms @ weights
    slope = cost @ loss[:, 0] / (cost @ cost)
    weights = weights * (slope if slope > 0 else 1 / np.linalg.norm(cost)) * spread
    alpha, beta = np.divide(weights, scales, out=np.zeros(2), where=scales > 0)
    return float(alpha), float(beta)


# Shape of the RoI


def shape_descriptors(
    labels: Iterable[ArrayLike], spacing: ArrayLike = 1.0, *, bodies: Iterable[ArrayLike] | None = None
) -> torch.Tensor:
    r"""A few numbers on the shape and place of what each volume labels, in columns that `SHAPE_DESCRIPTORS` names.

    With :math:`\lambda_1 \ge \lambda_2 \ge \lambda_3` the principal variances of its extent in mm (each voxel a box):

    - ``log_volume``: ln of the volume in mm3 (in 2D, of the area in mm2);
    - ``log_components``: ln of the number of connected components; voxels that share a corner are connected;
    - ``elongation``: :math:`\ln \sqrt{\lambda_1 / \lambda_2}`, 0 for a ball or a disc;
    - ``flatness``, in 3D: :math:`\ln \sqrt{\lambda_2 / \lambda_3}`, 0 for a ball or a rod;
    - ``compactness``: ln of the volume over that of the solid ellipsoid with the same variances: 0 for that ellipsoid,
      -0.12 for a cube, lower for a shell, and lowest for scattered parts;
    - ``centre_0`` and so on: where the centre of mass is along each axis, from the middle of the body, in units of the
      body's extent.

    Args:
        labels: N label volumes of 0 and 1, 2D or 3D, read one at a time.
        spacing: size of a voxel in mm: a number, one per axis, or N rows of one per axis.
        bodies: N masks of the body, of the same shapes, whose bounding boxes are the frames of ``centre_*``; None takes
            the whole volume.

    Returns:
        N x 6 (2D) or N x 8 (3D), float64. A volume without labelled voxel has no shape: its row is NaN, with a
        `UserWarning`, and `shape_similarity` leaves it out.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> label = np.zeros((8, 8))
        >>> label[2:6, 4:6] = 1  # 2 mm x 1 mm, right of the middle
        >>> shape_descriptors([label], spacing=0.5).numpy().round(3)
        array([[ 0.693,  0.   ,  0.693, -0.046,  0.   ,  0.125]])
    """
    reader, spacing = _Reader(), _Spacing("spacing", spacing)
    frames = None if bodies is None else _Partners(reader, "bodies", bodies)
    rows, empty = [], []
    for index, (name, volume) in enumerate(reader.volumes("labels", labels)):
        label = _binary(name, volume)
        frame = tuple(slice(0, n) for n in label.shape)
        if frames is not None:
            body, mask = frames.next(name, label.shape)
            frame = _bounding_box(mask != 0)
            if frame is None:
                raise InputError(f"{body} is zero everywhere; expected a mask of the body.")
        if label.any():
            rows.append(_describe(label, spacing.of(index, label.ndim), frame))
        else:
            rows.append(np.full(len(SHAPE_DESCRIPTORS[label.ndim]), np.nan))
            empty.append(name)
    if frames is not None:
        frames.end("labels")
    if empty:
        _warn(f"Nothing is labelled in {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}: no shape there, NaN.")
    return reader.tensor(np.stack(rows))


def shape_similarity(
    descriptors_a: ArrayLike, descriptors_b: ArrayLike, *, scales: ArrayLike | None = None
) -> torch.Tensor:
    r"""How alike the mean shapes of two tasks are.

    .. math:: \exp \left( -\tfrac1D \textstyle\sum_j |\bar a_j - \bar b_j| / s_j \right)

    Args:
        descriptors_a: Na x D, from `shape_descriptors`. Rows with NaN, of volumes without RoI, are left out.
        descriptors_b: Nb x D.
        scales: the D differences s that count as one each, > 0, such as the standard deviations between the tasks of a
            pool. None takes `SHAPE_SCALES`.

    Returns:
        A float64 scalar in (0, 1], higher is more alike, 1 for equal means; 0, with a `UserWarning`, if a side has no
        shape at all.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> cube, rod = np.zeros((9, 9, 9)), np.zeros((9, 9, 9))
        >>> cube[3:6, 3:6, 3:6] = 1
        >>> rod[4, 4] = 1
        >>> shape_similarity(shape_descriptors([cube]), shape_descriptors([cube, rod]))
        tensor(0.2447, dtype=torch.float64)
    """
    reader = _Reader()
    a = reader.matrix("descriptors_a", descriptors_a, allow_nan=True)
    b = reader.matrix("descriptors_b", descriptors_b, allow_nan=True)
    names = {len(names): names for names in SHAPE_DESCRIPTORS.values()}.get(a.shape[1], ())
    if a.shape[1] != b.shape[1] or (scales is None and not names):
        raise InputError(
            f"descriptors_a has {a.shape[1]} columns, descriptors_b {b.shape[1]}; expected those of shape_descriptors, "
            "both in 2D or both in 3D."
        )
    unit = np.array([SHAPE_SCALES[name] for name in names]) if scales is None else reader.array("scales", scales)
    if unit.shape != (a.shape[1],) or not (unit > 0).all():
        raise InputError(f"scales is {unit.tolist()}; expected {a.shape[1]} numbers > 0, one per descriptor.")
    a, b = (rows[~np.isnan(rows).any(axis=1)] for rows in (a, b))
    if not len(a) or not len(b):
        _warn(f"descriptors_{'b' if len(a) else 'a'} describes no shape at all, so the similarity is 0.")
        return reader.tensor(0.0)
    return reader.tensor(np.exp(-np.mean(np.abs(a.mean(axis=0) - b.mean(axis=0)) / unit)))


# Context of the RoI


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


# Reading


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


class _Reader:
    """Reads the arguments of one call; remembers what its volumes must share, and the device they came from."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._first: tuple[str, int] | None = None

    def array(self, name: str, value: Any, *, allow_nan: bool = False) -> np.ndarray:
        """``value`` as finite float64."""
        array = self._numbers(name, value).astype(np.float64)
        bad = np.isinf(array) if allow_nan else ~np.isfinite(array)
        if bad.any():
            raise InputError(f"{name} holds {array[bad].flat[0]}; expected finite numbers.")
        return array

    def matrix(self, name: str, value: Any, *, allow_nan: bool = False) -> np.ndarray:
        array = self.array(name, value, allow_nan=allow_nan)
        if array.ndim != 2 or array.size == 0:
            raise InputError(f"{name} has shape {array.shape}; expected at least one row and one column.")
        return array

    def volumes(self, name: str, volumes: Any) -> Iterator[tuple[str, np.ndarray]]:
        """One volume after the other, with its name."""
        if isinstance(volumes, (str, bytes, Mapping)) or not isinstance(volumes, Iterable):
            raise InputError(f"{name} is {type(volumes).__name__}; expected a list, or any iterable, of volumes.")
        index = -1
        for index, volume in enumerate(volumes):
            yield f"{name}[{index}]", self._volume(f"{name}[{index}]", volume)
        if index < 0:
            raise InputError(f"{name} is empty; expected at least one volume.")

    def tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64).to(self._device)

    def _numbers(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, torch.Tensor):
            if self._device.type == "cpu":
                self._device = value.device
            if value.dtype == torch.bfloat16:
                value = value.float()  # numpy has no such type
        try:
            array = np.asarray(convert_to_numpy(value, wrap_sequence=True))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} cannot be read as one array ({error}); give an array or a tensor.") from error
        if array.dtype.kind not in "buif":
            raise InputError(f"{name} holds {array.dtype}; expected real numbers.")
        return array

    def _volume(self, name: str, value: Any) -> np.ndarray:
        given = self._numbers(name, value)
        volume = given[0] if given.ndim in (3, 4) and len(given) == 1 else given
        if volume.ndim not in (2, 3) or volume.size < 2:
            raise InputError(
                f"{name} has shape {given.shape}; expected each item of a list to be one 2D or 3D volume of at least "
                "two voxels, without channels."
            )
        self._first = self._first or (name, volume.ndim)
        if volume.ndim != self._first[1]:
            raise InputError(f"{name} is {volume.ndim}D, but {self._first[0]} is {self._first[1]}D; expected the same.")
        return volume


class _Partners:
    """Volumes that come in the same order as those of another argument."""

    def __init__(self, reader: _Reader, name: str, volumes: Any) -> None:
        self._name = name
        self._volumes = reader.volumes(name, volumes)

    def next(self, partner: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        name, volume = next(self._volumes, (None, None))
        if volume is None:
            raise InputError(f"{self._name} has no volume for {partner}; expected as many, in the same order.")
        if volume.shape != shape:
            raise InputError(f"{name} has shape {volume.shape}, {partner} {shape}; expected the same.")
        return name, volume

    def end(self, partners: str) -> None:
        if next(self._volumes, None) is not None:
            raise InputError(f"{self._name} has more volumes than {partners}; expected as many, in the same order.")


@dataclass(frozen=True)
class _Spacing:
    name: str
    value: ArrayLike

    def of(self, index: int, ndim: int) -> np.ndarray:
        """Size in mm of the voxels of volume ``index`` along each axis."""
        sizes = np.asarray(self.value, dtype=np.float64)
        if sizes.ndim == 2 and index < len(sizes):
            sizes = sizes[index]
        if sizes.shape not in ((), (ndim,)) or not (np.isfinite(sizes) & (sizes > 0)).all():
            raise InputError(
                f"{self.name} is {self.value}; expected mm > 0: a number, {ndim} of them, or a row of {ndim} for each "
                "volume."
            )
        return np.broadcast_to(sizes, ndim)


def _binary(name: str, volume: np.ndarray) -> np.ndarray:
    """The volume as uint8; no copy is made of what is that, or bool, already."""
    if volume.dtype == bool:
        return volume.view(np.uint8)
    if volume.dtype == np.uint8 and volume.max() <= 1:
        return volume
    ones = volume == 1
    other = ~ones & (volume != 0)
    if other.any():
        value = volume[other][0]
        advice = "" if not np.isfinite(value) else f", one class at a time (labels == {value:g})"
        raise InputError(f"{name} holds {value:g}; expected 0 and 1 only{advice}.")
    return ones.view(np.uint8)


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


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


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
    # 2 ab = a^2 + b^2 - (a - b)^2, so that equal maps have exactly 1.
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    return np.maximum(1 - cdist(a, b, "sqeuclidean") / squares, 0)


# Distribution of principal component scores


@dataclass(frozen=True)
class _Components:
    """How an image becomes a distribution of scores."""

    size: int
    variance: float
    standardize: bool

    @classmethod
    def checked(cls, size: int, variance: float, standardize: bool) -> _Components:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 2:
            raise InputError(f"size is {size}; expected a whole number of voxels, at least 2.")
        if not 0 < variance < 1:
            raise InputError(f"variance is {variance}; expected a share of the variance in (0, 1).")
        return cls(int(size), variance, standardize)

    def quantiles(self, reader: _Reader, name: str, images: Iterable[ArrayLike]) -> np.ndarray:
        return np.stack(
            [_mass_quantiles(self._scores(item, image), QUANTILES) for item, image in reader.volumes(name, images)]
        )

    def _scores(self, name: str, image: np.ndarray) -> np.ndarray:
        box = _bounding_box(image != 0)
        scores = None
        if box is not None:
            part = _finite(name, image[box])  # zeros around the body add nothing to what follows
            if self.standardize:
                inside = part != 0
                part[inside] = _standard_scores(part[inside])
            sides = zip(image.shape, box, strict=True)
            scores = self._leading_scores(part, [_resizing(n, self.size)[:, side] for n, side in sides])
        if scores is None:
            _warn(f"{name} has no contrast, so its distances say nothing about transfer.")
            return np.zeros(1)
        return scores

    def _leading_scores(self, part: np.ndarray, resizing: list[sparse.csr_array]) -> np.ndarray | None:
        """Scores of the resized image's rows on its leading components, None if it has no contrast."""
        *leading, last = resizing
        rows = _resized(part, leading)
        peak = np.abs(rows).max()
        rows -= rows.mean(axis=0)
        variances, loadings = linalg.eigh(last @ (last @ (rows.T @ rows)).T)
        variances, loadings = variances[::-1].clip(min=0), loadings[:, ::-1]
        if variances.sum() <= rows.size * (1e-12 * peak) ** 2:
            return None
        explained = np.cumsum(variances) / variances.sum()
        loadings = loadings[:, : 1 + np.searchsorted(explained, self.variance, side="right")]
        largest = np.take_along_axis(loadings, np.abs(loadings).argmax(axis=0)[None], axis=0)
        return rows @ (last.T @ (loadings * np.sign(largest)))


def _finite(name: str, image: np.ndarray) -> np.ndarray:
    """A float64 copy."""
    image = image.astype(np.float64)
    if not np.isfinite(image).all():
        raise InputError(f"{name} holds NaN or Inf; expected finite intensities.")
    return image


def _standard_scores(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() if np.ptp(values) > 0 else 1.0)


@lru_cache(maxsize=256)
def _resizing(old: int, new: int) -> sparse.csr_array:
    """Resizing along one axis as a matrix: what scikit-image makes of the identity."""
    return sparse.csr_array(resize(np.eye(old), (new, old), order=1))


def _resized(part: np.ndarray, leading: list[sparse.csr_array]) -> np.ndarray:
    """A matrix of the image resized along all axes but the last, which becomes its columns.

    Interpolation, and the filter before it, are linear and treat one axis after the other. So the last axis, which
    would cost as much as the others, can stay as it is: its matrix goes into the covariance and into the loadings.
    """
    first, *second = leading
    image = (first @ part.reshape(len(part), -1)).reshape(-1, *part.shape[1:])
    for matrix in second:
        image = np.stack([matrix @ plane for plane in image])
    return image.reshape(-1, part.shape[-1])


def _mass_quantiles(values: np.ndarray, parts: int) -> np.ndarray:
    """Means of successive parts of equal mass of the sorted values, of which there may be fewer than parts."""
    values = np.sort(values, axis=None)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    edges = np.linspace(0, len(values), parts + 1)
    return np.diff(np.interp(edges, np.arange(len(sums)), sums)) * (parts / len(values))


def _mean_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return cdist(a, b, "cityblock") / a.shape[1]


# Fitting weights


def _distance_and_similarity(
    reader: _Reader, image_distance: ArrayLike, label_similarity: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    distance = reader.array("image_distance", image_distance)
    similarity = reader.array("label_similarity", label_similarity)
    if distance.size == 0 or distance.min() < 0:
        found = f"{distance.min():g}" if distance.size else "nothing"
        raise InputError(f"image_distance holds {found}; expected distances >= 0.")
    if distance.shape != similarity.shape:
        raise InputError(
            f"label_similarity has shape {similarity.shape}, image_distance {distance.shape}; expected the same."
        )
    return distance, similarity


def _standardized(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 and norm 1, and what they were divided by; constant ones become 0, and their scale is 0."""
    centred = np.where(np.ptp(columns, axis=0) > 0, columns - columns.mean(axis=0), 0.0)
    scales = np.linalg.norm(centred, axis=0)
    return centred / np.where(scales > 0, scales, 1.0), scales


def _fit_pearson(terms: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights >= 0 of the standardised terms whose sum correlates best with the loss, and that correlation.

    The nearest point of a cone has the smallest angle of all its points, unless it is the tip: then an edge has.
    """
    weights, _ = optimize.nnls(terms, loss)
    if not weights.any():
        correlations = np.where(terms.any(axis=0), terms.T @ loss, -np.inf)
        weights = np.eye(2)[correlations.argmax()]
    cost = terms @ weights
    return weights, float(cost @ loss / np.linalg.norm(cost))


def _fit_spearman(terms: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, float]:
    """The same for the rank correlation, by Optuna, over the angle between the two weights."""
    try:
        import optuna
    except ImportError as error:
        raise InputError("method 'bayes' needs Optuna: pip install optuna, or use 'closed_form'.") from error

    def weights(angle: float) -> np.ndarray:
        return np.array([np.cos(angle), np.sin(angle)]) * terms.any(axis=0)

    def correlation(angle: float) -> float:
        cost = terms @ weights(angle)
        return float(stats.spearmanr(cost, loss).statistic) if np.ptp(cost) > 0 else -1.0

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        start, _ = _fit_pearson(terms, loss)
        for angle in (np.arctan2(start[1], start[0]), 0.0, np.pi / 2):
            study.enqueue_trial({"angle": float(angle)})
        study.optimize(lambda trial: correlation(trial.suggest_float("angle", 0.0, np.pi / 2)), n_trials=TRIALS)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return weights(study.best_params["angle"]), study.best_value


# Shape and context


def _describe(label: np.ndarray, spacing: np.ndarray, frame: tuple[slice, ...]) -> np.ndarray:
    ndim, box = label.ndim, _bounding_box(label)
    voxels = np.argwhere(label[box])
    variances = np.atleast_2d(np.cov(voxels * spacing, rowvar=False, ddof=0)) + np.diag(spacing**2 / 12)
    principal = np.linalg.eigvalsh(variances)[::-1]
    volume = len(voxels) * np.prod(spacing)
    radii = np.sqrt((ndim + 2) * principal)
    ellipsoid = np.pi ** (ndim / 2) / special.gamma(ndim / 2 + 1) * np.prod(radii)
    components = ndimage.label(label[box], structure=np.ones((3,) * ndim))[1]
    centre = voxels.mean(axis=0) + 0.5 + [side.start for side in box]
    middle = np.array([(side.start + side.stop) / 2 for side in frame])
    extent = np.array([side.stop - side.start for side in frame])
    return np.array(
        [
            np.log(volume),
            np.log(components),
            *np.log(radii[:-1] / radii[1:]),
            np.log(volume / ellipsoid),
            *(centre - middle) / extent,
        ]
    )


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
