"""SeqTran's cost between tasks, and a fit of its weights to measured transfers."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize

from medtl_ext._validation import InputError, require_number, warn
from medtl_ext.affinity._volumes import Reader

#: SeqTran's weights of the Wasserstein distance and of 1 - SSIM.
PUBLISHED_WEIGHTS = (0.0044, 2.4756)

ROUNDING = 1e-9  # a column that varies by less than this share of its largest value is constant


def task_affinity(
    image_distance: ArrayLike,
    label_similarity: ArrayLike,
    *,
    alpha: float = PUBLISHED_WEIGHTS[0],
    beta: float = PUBLISHED_WEIGHTS[1],
) -> torch.Tensor:
    """Cost ``alpha * image_distance + beta * (1 - label_similarity)`` between tasks; lower means more similar.

    Args:
        image_distance: from `pairwise_wasserstein`, or means of it, any shape, >= 0.
        label_similarity: from `pairwise_ssim`, or means of it, the same shape. Values above 1 count as 1, so that no
            cost is negative (the global SSIM of a volume with itself is slightly above 1).
        alpha, beta: weights >= 0, such as those from `fit_affinity_weights`. The default is the published pair, which
            was fitted to raw intensities (``standardize=False``).

    Returns:
        The cost, float64, >= 0, of the same shape.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> task_affinity([100.0, 100.0], [1.0, 0.5])
        tensor([0.4400, 1.6778], dtype=torch.float64)

    Reference: SeqTran, eq. 5. It minimises the sum of a distance and a similarity. The published constants show what is
    meant: 0.0044 W - 2.4756 SSIM + 2.4756.
    """
    require_number("alpha", alpha, 0)
    require_number("beta", beta, 0)
    reader = Reader()
    distance, similarity = _transfers(reader, image_distance=image_distance, label_similarity=label_similarity)
    return reader.tensor(alpha * distance + beta * np.maximum(1 - similarity, 0))


def fit_affinity_weights(
    image_distance: ArrayLike, label_similarity: ArrayLike, performance: ArrayLike
) -> tuple[float, float]:
    """Fit the weights of `task_affinity` to measured transfers, so that the cost predicts the loss of performance.

    Non-negative least squares makes Pearson's correlation of cost and performance as negative as possible. The
    correlation depends on beta / alpha only. The scale is that of least squares: if the cost predicts well, a cost that
    is higher by 1 means a performance that is lower by 1.

    Args:
        image_distance: distance between source and target of each transfer, any shape, >= 0.
        label_similarity: similarity of their labels, the same shape.
        performance: result of each transfer, such as Dice, the same shape; higher is better.

    Returns:
        The pair (alpha, beta), >= 0, not both 0. If no weights give a negative correlation, the pair with the lowest
        one, with a `UserWarning`. If performance is constant, or both distance and similarity are, the published pair,
        with a `UserWarning`.

    Raises:
        InputError: invalid input, or fewer than three transfers.

    Example:
        >>> distance, similarity = np.array([10.0, 20.0, 30.0, 20.0]), np.array([0.9, 0.8, 0.9, 0.4])
        >>> alpha, beta = fit_affinity_weights(distance, similarity, 0.9 - 0.01 * distance - 0.5 * (1 - similarity))
        >>> round(alpha, 6), round(beta, 6)
        (0.01, 0.5)

    Reference: SeqTran, which fits both by Bayesian optimisation.
    """
    distance, similarity, performance = _transfers(
        Reader(), image_distance=image_distance, label_similarity=label_similarity, performance=performance
    )
    if performance.size < 3:
        raise InputError(f"performance holds {performance.size} value(s); expected at least three transfers.")
    terms, scales = _standardized(np.stack([distance.ravel(), -similarity.ravel()], axis=1))
    loss, spread = _standardized(-performance.ravel())
    if spread == 0 or not scales.any():
        warn("All transfers are equal, so weights cannot be fitted: the published ones are returned.")
        return PUBLISHED_WEIGHTS
    weights, _ = optimize.nnls(terms, loss)
    # The nearest point of a cone has the smallest angle of all its points. If it is the tip, an edge has the smallest.
    if not weights.any():
        warn("No weights >= 0 give a negative correlation of cost and performance: the closest ones are returned.")
        weights = np.eye(2)[np.where(scales > 0, terms.T @ loss, -np.inf).argmax()]
    alpha, beta = np.divide(weights * spread, scales, out=np.zeros(2), where=scales > 0)
    return float(alpha), float(beta)


def _transfers(reader: Reader, **given: ArrayLike) -> list[np.ndarray]:
    arrays = reader.arrays(**given)
    if not arrays[0].size or (arrays[0] < 0).any():
        raise InputError("image_distance is empty, or holds numbers below 0; expected distances >= 0.")
    return arrays


def _standardized(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 and norm 1, and their scales. A constant column (up to rounding) becomes 0, with scale 0."""
    varies = np.ptp(columns, axis=0) > ROUNDING * np.abs(columns).max(axis=0)
    centred = np.where(varies, columns - columns.mean(axis=0), 0.0)
    scales = np.linalg.norm(centred, axis=0)
    return centred / np.where(scales > 0, scales, 1.0), scales
