r"""PARC, the Pearson annotated rank correlation: do samples of one class have similar features?

PARC (Bolya et al., *Scalable diverse model selection for accessible transfer learning*, NeurIPS 2021) correlates the
distance of the features with the distance of the labels, over all pairs of samples:

.. math::
    d_{ij} = 1 - \mathrm{Pearson}(x_i, x_j), \qquad
    e_{ij} = 1 - \mathrm{Pearson}(\mathrm{onehot}(y_i), \mathrm{onehot}(y_j)), \qquad
    \mathrm{PARC} = 100\, \mathrm{Spearman}(d, e)

A one-hot vector has the same distance to all others, so e only says whether two labels differ. The rank correlation
with a binary variable is a standardised difference of two mean ranks, which needs one sort of d:

.. math::
    \mathrm{PARC} = 100\, (\bar r_{\mathrm{different}} - \bar r_{\mathrm{same}}) \sqrt{p (1 - p)}\, / \,\sigma_r

with p the share of pairs with different labels and sigma_r the standard deviation of all ranks.
"""

from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

from medtl_ext._validation import require_number, warn
from medtl_ext.metrics.features import SampleMetric, canonical_order

#: Largest number of samples used: 12.5 million pairs.
MAX_SAMPLES = 5000

# Distances that differ by less are equal up to rounding, and must be ties.
RESOLUTION = 2.0**-40

# A standard deviation below this share of the values, or a variance below this share of the largest, is rounding error.
NEGLIGIBLE = 1e-12


def compute_parc(
    features: Any, target_labels: Any, *, n_components: int | None = 32, seed: int = 0, ignore_index: int | None = None
) -> torch.Tensor:
    """PARC: rank correlation between the distances of features and those of labels, over all pairs of samples.

    Args:
        features: N x D, or N x D x *spatial with each pixel a sample.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        n_components: number of principal components (or fewer, if there are fewer). None keeps the features. Each
            component, or feature, is then standardised.
        seed: for drawing 5,000 samples if there are more.
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [-100, 100]; higher predicts better transfer. It does not depend on the scale of
        the features. 0 with a `UserWarning` if it is undefined: one class only, no two samples of one class, or equal
        distances only (constant features, a single component).

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[1.0, 0, 0], [2.0, 0, 1], [0, 3.0, 1], [0, 2.0, 0], [1.0, 2.0, 4.0]])
        >>> compute_parc(features, torch.tensor([0, 0, 1, 1, 1]), n_components=None)
        tensor(85.2803, dtype=torch.float64)

    Reference: Bolya et al., NeurIPS 2021. Their code approximates the components by a randomised method with one power
    iteration, whose seed changes the score by several percent. Here the components are exact, and those without
    variance are left out. The correlation of two rows depends on the signs of the components; here the largest loading
    is positive. Their one-hot distances differ in the last bit (for three classes, for example), which breaks ties at
    random. Here equal distances are ties.
    """
    return PARC(n_components=n_components, seed=seed, ignore_index=ignore_index).of(features, target_labels)


class PARC(SampleMetric):
    """`compute_parc` over batches: ``compute()`` returns a float64 scalar in [-100, 100], higher is better.

    Memory: the samples; at most 5,000 of them are used.

    Args:
        n_components: as in `compute_parc`.
        options: layer, pixels, body, seed, ignore_index, output_transform, see `FeatureMetric`.

    >>> metric = PARC(n_components=None)
    >>> metric.update(torch.tensor([[1.0, 0, 0], [2.0, 0, 1], [0, 3.0, 1]]), torch.tensor([0, 0, 1]))
    >>> metric.update(torch.tensor([[0, 2.0, 0], [1.0, 2.0, 4.0]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(85.2803, dtype=torch.float64)
    """

    def __init__(self, *, n_components: int | None = 32, **options: Any) -> None:
        if n_components is not None:
            require_number("n_components", n_components, 1, whole=True)
        self.n_components = n_components
        super().__init__(**options)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(labels) > MAX_SAMPLES:
            drawn = canonical_order(features, labels, seed=self.seed)[:MAX_SAMPLES]
            features, labels = features[drawn], labels[drawn]
        if self.n_components is not None:
            scores, _ = principal_components(features, self.n_components)
            features = torch.from_numpy(scores).to(features.device)
        upper = torch.ones(len(labels), len(labels), dtype=torch.bool, device=labels.device).triu_(1)
        different = (labels[:, None] != labels)[upper]
        n_different = int(different.sum())
        if n_different in (0, len(different)):
            which = "one class only" if n_different == 0 else "no two samples of one class"
            return _undefined(labels, f"target_labels holds {which}")
        # Distances in steps of the resolution; the last bit says whether the labels differ, so that one sort is enough.
        distances = ((1 - _row_correlation(features))[upper] / RESOLUTION).round_().long()
        pairs = (distances * 2 + different).sort().values
        _, tie, count = torch.unique_consecutive(pairs >> 1, return_inverse=True, return_counts=True)
        if len(count) == 1:
            return _undefined(labels, "features has the same distance between all samples")
        count = count.double()
        rank = count.cumsum(0) - (count - 1) / 2 - (len(pairs) + 1) / 2  # centred rank of each group of ties
        share = n_different / len(pairs)
        mean_different = (torch.bincount(tie, weights=(pairs & 1).double()) @ rank) / n_different
        # All ranks have mean 0, so ranks of pairs with equal labels have mean -mean_different * share / (1 - share).
        spread = (count @ rank**2 / len(pairs)).sqrt()
        return (100 * mean_different / spread * (share / (1 - share)) ** 0.5).clamp(-100, 100)


def principal_components(features: torch.Tensor, amount: int | float) -> tuple[np.ndarray, np.ndarray]:
    """Exact principal components of M x D features, without those of variance 0.

    Args:
        features: M x D, float64, on any device.
        amount: the largest number of components (1 or more), or the share of the variance to explain (less than 1).

    Returns:
        The centred scores of the samples, M x k; and the k variances, descending, with M - 1 degrees of freedom.

    >>> principal_components(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]), 32)[0].round(6).tolist()
    [[-1.0], [0.0], [1.0]]
    """
    # Centred here, because the library subtracts the squared mean from the squares: a large mean would lose digits.
    centred = (features - features.mean(0)).cpu().numpy()
    magnitude = np.abs(centred).max()
    if magnitude <= NEGLIGIBLE * features.abs().max().item():
        return np.empty((len(features), 0)), np.empty(0)
    # The covariance is much faster than singular values, and accurate enough for `NEGLIGIBLE`.
    solver = "covariance_eigh" if len(features) >= features.shape[1] else "full"
    pca = PCA(min(amount, *features.shape), svd_solver=solver)
    scores = pca.fit_transform(centred / magnitude)
    real = pca.explained_variance_ > NEGLIGIBLE * pca.explained_variance_[0]
    return scores[:, real] * magnitude, pca.explained_variance_[real] * magnitude**2


def _row_correlation(features: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of all rows after each column is standardised; 0 where a row is constant."""
    centred = features - features.mean(0)
    spread = centred.square().mean(0).sqrt()
    varies = spread > NEGLIGIBLE * features.abs().amax(0)
    rows = centred[:, varies] / spread[varies]
    rows = rows - rows.mean(1, keepdim=True) if rows.shape[1] else rows
    norm = rows.norm(dim=1, keepdim=True)
    rows = torch.where(norm > NEGLIGIBLE, rows / norm, 0)
    return rows @ rows.T


def _undefined(labels: torch.Tensor, reason: str) -> torch.Tensor:
    warn(f"{reason}, so PARC is undefined. It is set to 0 and says nothing about transfer.")
    return torch.zeros((), dtype=torch.float64, device=labels.device)
