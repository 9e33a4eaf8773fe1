"""SeqTran's cost between tasks, and its weights fitted to transfers that were measured."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize, stats

from medtl_ext._validation import InputError, require_choice
from medtl_ext.affinity._volumes import _Reader, _warn

__all__ = ["PUBLISHED_WEIGHTS", "fit_affinity_weights", "task_affinity"]

#: SeqTran's weights of the Wasserstein distance and of 1 - SSIM.
PUBLISHED_WEIGHTS = (0.0044, 2.4756)

TRIALS = 100  # of the Bayesian search
ROUNDING = 1e-9  # of a column's largest value: what varies by less is constant


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
    """Columns of mean 0 and norm 1, and what they were divided by.

    Columns that are constant but for rounding become 0, and their scale is 0.
    """
    varies = np.ptp(columns, axis=0) > ROUNDING * np.abs(columns).max(axis=0)
    centred = np.where(varies, columns - columns.mean(axis=0), 0.0)
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
