r"""GBC: how much the classes overlap in feature space, if each is modelled by a Gaussian.

Let m be the class means and v the variances, one per feature (for ``covariance="spherical"``, their mean). With
v = (v_i + v_j) / 2, the Bhattacharyya distance of two classes and the score are

.. math::
    D_B(i, j) = \tfrac18 \sum_d \frac{(m_{id} - m_{jd})^2}{v_d} + \tfrac12 \sum_d \ln \frac{v_d}{\sqrt{v_{id} v_{jd}}},
    \qquad \mathrm{GBC} = -\sum_{i \ne j} e^{-D_B(i, j)}

It needs the number of samples and the sums of x and of x^2 by class.
"""

from typing import Any

import torch

from medtl_ext._validation import require_choice, warn
from medtl_ext.metrics.features import MomentMetric, require_samples

COVARIANCES = ("spherical", "diagonal")

# Smallest variance of a feature in a class, in the units of the features.
LEAST_VARIANCE = 1e-4


def compute_gbc(
    features: Any, target_labels: Any, *, covariance: str = "spherical", ignore_index: int | None = None
) -> torch.Tensor:
    """Gaussian Bhattacharyya coefficient: minus the sum of the overlaps of all ordered pairs of classes.

    Args:
        features: N x D, or N x D x *spatial, in which every pixel is a sample; at least two samples.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        covariance: "spherical": one variance per class, the mean over the features. "diagonal": one per feature.
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [-K (K - 1), 0] for K classes; higher predicts better transfer. 0 with a
        `UserWarning` for one class only. It depends on the number of classes: compare sources for one target only.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
        >>> compute_gbc(features, torch.tensor([0, 0, 1, 1]))
        tensor(-0.2108, dtype=torch.float64)

    Reference: Pándy et al., *Transferability estimation using Bhattacharyya class separability*, CVPR 2022.
    Variances divide by the number of samples. They are at least 1e-4 in every feature, which is also the variance of a
    class with one sample; scale features up if their standard deviations are around 0.01 or less. A public version
    counts the logarithm of the spherical variance once, although the determinant contains it D times.
    """
    return GBC(covariance=covariance, ignore_index=ignore_index).of(features, target_labels)


class GBC(MomentMetric):
    """`compute_gbc` over batches: ``compute()`` returns a float64 scalar in [-K (K - 1), 0], higher is better.

    Memory: C x D numbers. The sums use raw features. If their mean is s standard deviations away from zero, the value
    loses ``2 log10(s)`` of 16 digits: subtract a constant if s is in the thousands.

    Args:
        covariance: as in `compute_gbc`.
        options: see `FeatureMetric`.

    >>> metric = GBC()
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([0, 0]))
    >>> metric.update(torch.tensor([[3.0, 1.0], [3.0, -1.0]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(-0.2108, dtype=torch.float64)
    """

    needs = ("squares",)

    def __init__(self, *, covariance: str = "spherical", **options: Any) -> None:
        self.covariance = require_choice("covariance", covariance, COVARIANCES)
        super().__init__(**options)

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        present = sums["count"] > 0
        count = sums["count"][present][:, None]
        require_samples(count.sum())
        if len(count) == 1:
            warn("target_labels holds one class only, so GBC is 0, its best value, and says nothing about transfer.")
        means = sums["total"][present] / count
        variances = (sums["squares"][present] / count - means.square()).clamp(min=LEAST_VARIANCE)
        if self.covariance == "spherical":
            variances = variances.mean(1, keepdim=True).expand_as(means)
        logs = variances.log()
        overlap = means.new_zeros(())
        for k in range(len(means) - 1):
            pooled = (variances[k] + variances[k + 1 :]) / 2
            distance = ((means[k] - means[k + 1 :]).square() / pooled).sum(1) / 8
            distance += (pooled.log() - (logs[k] + logs[k + 1 :]) / 2).sum(1) / 2
            overlap += (-distance.clamp(min=0)).exp().sum()
        return 0 - 2 * overlap
