r"""NLEEP: LEEP with clusters of the features instead of the source's classes.

NLEEP (Li et al., *Ranking neural checkpoints*, CVPR 2021) needs no classifier head. A mixture of Gaussians v, five for
each target class, models the principal components that explain 80 % of the variance. The responsibilities P(v | x) of
each sample replace the source's class probabilities:

.. math::
    \mathrm{NLEEP} = \tfrac1n \sum_i \ln \textstyle\sum_v P(y_i | v)\, P(v | x_i)
"""

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from medtl_ext._validation import InputError, warn
from medtl_ext.metrics.features import SampleMetric, canonical_order
from medtl_ext.metrics.leep import compute_leep
from medtl_ext.metrics.parc import principal_components

EXPLAINED = 0.8
GAUSSIANS_PER_CLASS = 5
REGULARISATION = 1e-5

# On a few hundred samples, the start of k-means changes the score of one mixture by 3 to 4 %, as much as models differ.
MIXTURES = 10


def compute_nleep(features: Any, target_labels: Any, *, seed: int = 0, ignore_index: int | None = None) -> torch.Tensor:
    """NLEEP: LEEP of the responsibilities of a Gaussian mixture over the features.

    Args:
        features: N x D, or N x D x *spatial with each pixel a sample.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        seed: of the mixtures' starting points.
        ignore_index: samples with this label are left out.

    Returns:
        The score in nats, a float64 scalar <= 0; higher predicts better transfer. With a `UserWarning`: 0 for one class
        only; -H(Y), the score without any information, for constant features; and a value that is too high if there are
        fewer than two samples per Gaussian (the number of Gaussians is then reduced).

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(60) % 2
        >>> compute_nleep(torch.randn(60, 8, generator=generator) + 9 * labels[:, None], labels).abs() < 1e-6
        tensor(True)

    Reference: Li et al., CVPR 2021. The score is the mean over ten mixtures with different starts. The paper takes one,
    whose start changes the score by some percent. Covariances are diagonal (one public implementation has spherical
    ones, and another omits the logarithm). They are regularised by 1e-5 of the mean variance, so that the scale of the
    features hardly matters.
    """
    return NLEEP(seed=seed, ignore_index=ignore_index).of(features, target_labels)


class NLEEP(SampleMetric):
    """`compute_nleep` over batches: ``compute()`` returns a float64 scalar <= 0, higher is better.

    Memory: the samples; limit them by `pixels`.

    Args:
        options: layer, pixels, body, ignore_index, output_transform, see `FeatureMetric`.
        seed: of the mixtures, and of the samples that `pixels` draws.

    >>> generator = torch.Generator().manual_seed(0)
    >>> metric = NLEEP()
    >>> for label in (0, 1):
    ...     metric.update(torch.randn(30, 8, generator=generator) + 9 * label, torch.full((30,), label))
    >>> metric.compute().abs() < 1e-6
    tensor(True)
    """

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**32 // MIXTURES:
            raise InputError(f"seed is {seed!r}; expected a whole number from 0 to {2**32 // MIXTURES - 1}.")
        super().__init__(seed=seed, **options)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        order = canonical_order(features, labels, seed=self.seed)
        features, labels = features[order], labels[order]
        n_classes = len(labels.unique())
        if n_classes == 1:
            warn("target_labels holds one class only, so NLEEP is 0, its best value, and says nothing about transfer.")
            return torch.zeros((), dtype=torch.float64, device=labels.device)
        scores, _ = principal_components(features, EXPLAINED)
        if scores.shape[1] == 0:
            warn("features are constant, so NLEEP is -H(Y), the score without any information.")
            return compute_leep(torch.ones(len(labels), 1), labels.cpu()).to(labels.device)
        n_gaussians = min(GAUSSIANS_PER_CLASS * n_classes, len(labels) // 2)
        if n_gaussians < GAUSSIANS_PER_CLASS * n_classes:
            few = f"NLEEP has {n_gaussians} Gaussians instead of {GAUSSIANS_PER_CLASS * n_classes}, and is too high"
            warn(f"features holds {len(labels)} samples for {n_classes} classes: {few}.")
        scores /= np.sqrt(scores.var(0).mean())
        values = [
            compute_leep(_responsibilities(scores, n_gaussians, self.seed * MIXTURES + start), labels.cpu())
            for start in range(MIXTURES)
        ]
        return torch.stack(values).mean().to(labels.device)


def _responsibilities(scores: np.ndarray, n_gaussians: int, seed: int) -> np.ndarray:
    mixture = GaussianMixture(n_gaussians, covariance_type="diag", reg_covar=REGULARISATION, random_state=seed)
    with warnings.catch_warnings():
        # scikit-learn warns if there are fewer distinct samples than Gaussians, and if the fit has not quite converged.
        # The responsibilities are good enough in both cases.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(scores).predict_proba(scores)
