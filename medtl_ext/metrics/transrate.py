r"""TransRate: the coding rate of the features, minus the mean coding rate within the classes.

The coding rate R of N centred features F at distortion eps, and the score, with F_c the N_c features of class c
(centred at the mean of all), are

.. math::
    R(F) = \tfrac12 \ln \det\left(I + \frac{F'F}{N \epsilon}\right), \qquad
    \mathrm{TransRate} = R(F) - \tfrac1K \textstyle\sum_c R(F_c)

It needs the number of samples, the sum of x and the sum of x x' by class: D x D numbers per class.
"""

from typing import Any

import torch

from medtl_ext._validation import require_number, warn
from medtl_ext.metrics.features import MomentMetric, gram, require_samples

EPSILON = torch.finfo(torch.float64).eps


def compute_transrate(
    features: Any, target_labels: Any, *, eps: float = 1e-4, ignore_index: int | None = None
) -> torch.Tensor:
    """Coding rate of the features, minus the mean coding rate of the classes.

    Args:
        features: N x D, or N x D x *spatial, in which every pixel is a sample; at least two samples.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        eps: the distortion, above 0, in squared units of the features: it must fit their scale.
        ignore_index: samples with this label are left out.

    Returns:
        The score in nats, a float64 scalar; higher predicts better transfer. It is in [0, R(F)] if the classes have
        equal numbers of samples. Otherwise it may be negative, because every class has the same weight. 0 with a
        `UserWarning` for one class only, or if all features are constant.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
        >>> compute_transrate(features, torch.tensor([0, 0, 1, 1]), eps=1.0)
        tensor(0., dtype=torch.float64)

    Reference: Huang et al., *Frustratingly easy transferability estimation*, ICML 2022. As in Transfer-Learning-Library
    every class has the same weight. With weights by the number of samples the score could not be negative.
    """
    return TransRate(eps=eps, ignore_index=ignore_index).of(features, target_labels)


class TransRate(MomentMetric):
    """`compute_transrate` over batches: ``compute()`` returns a float64 scalar, higher is better.

    Memory: C x D x D numbers. The sums use raw features. If their mean is s standard deviations away from zero, the
    value loses ``2 log10(s)`` of 16 digits: subtract a constant if s is in the thousands.

    Args:
        eps: as in `compute_transrate`.
        options: see `FeatureMetric`.

    >>> metric = TransRate(eps=1.0)
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([0, 0]))
    >>> metric.update(torch.tensor([[3.0, 1.0], [3.0, -1.0]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(0., dtype=torch.float64)
    """

    needs = ("class_gram",)

    def __init__(self, *, eps: float = 1e-4, **options: Any) -> None:
        self.eps = require_number("eps", eps, 0, above=True)
        super().__init__(**options)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        require_samples(len(labels))
        rows = features - features[0]  # so that constant features are exactly zero
        rows.sub_(rows.mean(0))
        classes = labels.unique()
        if _says_nothing(len(classes), constant=not bool(rows.any())):
            return rows.new_zeros(())
        return self._rate(rows) - torch.stack([self._rate(rows[labels == label]) for label in classes]).mean()

    def _rate(self, rows: torch.Tensor) -> torch.Tensor:
        # With few samples the N x N matrix is smaller, and has the same determinant.
        square = gram(rows.T if len(rows) < rows.shape[1] else rows)
        return _log_determinant(square / (len(rows) * self.eps)) / 2

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        present = sums["count"] > 0
        count, total, grams = (sums[name][present] for name in ("count", "total", "class_gram"))
        n = count.sum()
        require_samples(n)
        mean, overall, rates = total.sum(0) / n, torch.zeros_like(grams[0]), []
        for size, part, square in zip(count, total, grams, strict=True):
            # Scatter about the mean m of all: G - m t' - t m' + N_c m m', with t the sum over the class.
            cross = torch.outer(mean, part - size * mean / 2)
            scatter = square - cross - cross.T
            rates.append(_log_determinant(scatter / (size * self.eps)) / 2)
            overall += scatter
        squares = grams.diagonal(dim1=1, dim2=2).sum()
        if _says_nothing(len(count), constant=bool(overall.trace() <= 1e-14 * squares)):
            return n.new_zeros(())
        return _log_determinant(overall / (n * self.eps)) / 2 - torch.stack(rates).mean()


def _says_nothing(n_classes: int, *, constant: bool) -> bool:
    """Warn and return True if the score is 0 for any network."""
    if n_classes > 1 and not constant:
        return False
    what = "features are constant" if constant else "target_labels holds one class only"
    warn(f"{what}, so TransRate is 0 and says nothing about transfer.")
    return True


def _log_determinant(matrix: torch.Tensor) -> torch.Tensor:
    """``ln det(I + A)`` of a positive semi-definite matrix A.

    Eigenvalues of A that are rounding errors count as zero; in a large matrix they may be larger than I. If there are
    none, a Cholesky factor takes a third of the time of eigenvalues. There are none if A minus the rounding error also
    has a Cholesky factor.
    """
    noise = len(matrix) * EPSILON * matrix.norm()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if noise < 1e-7 or torch.linalg.cholesky_ex(matrix - noise * identity).info == 0:
        return 2 * torch.linalg.cholesky(matrix + identity).diagonal().log().sum()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return torch.log1p(eigenvalues[eigenvalues > noise]).sum()
