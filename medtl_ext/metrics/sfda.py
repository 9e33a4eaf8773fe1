r"""SFDA: how well a linear discriminant still tells the classes after the easy samples were pulled towards the others.

With class means m_c, priors P_c = N_c / N and the covariance within the classes S (divided by N), a discriminant gives

.. math::
    \Sigma = (1 - \lambda) S + \lambda \tfrac{\mathrm{tr} S}{D} I, \quad
    p(c | x) = \mathrm{softmax}_c\left(m_c' \Sigma^{-1} x - \tfrac12 m_c' \Sigma^{-1} m_c + \ln P_c\right), \quad
    \lambda = \max(e^{-5 \sigma_{\max}(S)}, 10^{-10})

Every sample x of class y is then mixed with the mean of the other classes' means, by the share p that the softmax of
its posteriors gives y: ``p x + (1 - p) mean_{c != y} m_c``. A second discriminant, of the mixed samples with the same
lambda, is the judge: the score is the mean posterior of the true class.

The samples are looked at four times (means, covariance, covariance of the mixed samples, posteriors), block by block.
The streaming class asks the network once and puts the samples aside in a `PredictionSpool`, which moves to disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from scipy.linalg import cho_factor, cho_solve

from medtl_ext._validation import warn
from medtl_ext.metrics.base import all_reduce_sums
from medtl_ext.metrics.features import MomentMetric, SampleMetric, feature_sums, require_samples

# Samples and labels; what gives those of this process every time it is called.
Block = tuple[torch.Tensor, torch.Tensor]
Batches = Callable[[], Iterable[Sequence[torch.Tensor]]]

# Adds named sums up over all processes.
Reduction = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

# Rows of a block: enough for a product of matrices, few enough for the cache.
BLOCK = 2**12

LEAST_SHRINKAGE = 1e-10

EPSILON = torch.finfo(torch.float64).eps


def compute_sfda(features: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """Self-challenging Fisher discriminant analysis: mean posterior of the true class, after a confidential mixing.

    Args:
        features: N x D, or N x D x *spatial, in which every pixel is a sample; at least two samples.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [0, 1]; higher predicts better transfer. 1 with a `UserWarning` when there is one
        class only. Constant features give the sum of the squared class frequencies. The features' scale matters: lambda
        is 1e-10 where their largest variance within a class is above 5, and near 1 where it is far below 1.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.0, -1.0], [1.6, 0.0]])
        >>> compute_sfda(features, torch.tensor([0, 0, 1, 1, 0]))
        tensor(0.8158, dtype=torch.float64)

    Reference: Shao et al., *Not all models are equal: predicting model transferability in a self-challenging Fisher
    space*, ECCV 2022. The largest eigenvalue in lambda is what six steps of a power iteration from the row
    sums of S make of it, as in the authors' code (the exact one moves the score by up to 1e-3 where variances are below
    5); where the row sums vanish, as they do for probabilities, it is exact. A Cholesky factor in place of the authors'
    eigenvectors gives the same posteriors.
    """
    return SFDA(ignore_index=ignore_index).of(features, target_labels)


class SFDA(SampleMetric):
    """`compute_sfda` over batches: ``compute()`` returns a float64 scalar in [0, 1], higher is better.

    Memory: D x D numbers, C x D, a block of samples, 8 bytes for every sample, and 256 MiB of samples in their own
    dtype before they go to disk.

    Args:
        options: see `FeatureMetric`; with ``pixels`` only the samples drawn count.

    >>> metric = SFDA()
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0]]), torch.tensor([0, 0, 1]))
    >>> metric.update(torch.tensor([[3.0, -1.0], [1.6, 0.0]]), torch.tensor([1, 0]))
    >>> metric.compute()
    tensor(0.8158, dtype=torch.float64)
    """

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._mean_posterior(lambda: [(features, labels)], reduce=dict)

    def compute(self) -> torch.Tensor:
        """Return the value over everything seen by all processes; updates may go on afterwards."""
        drawn = all_reduce_sums({"drawn": torch.tensor([float(self._samples.limit is not None)])})["drawn"]
        # Of what is drawn every process has the samples of all.
        return super().compute() if drawn > 0 else self._mean_posterior(self._samples.batches, all_reduce_sums)

    def _mean_posterior(self, batches: Batches, reduce: Reduction) -> torch.Tensor:
        """Of the true class, by the second discriminant."""
        means = self._require_seen(reduce(_sums(batches())))
        n, present = means["count"].sum(), means["count"] > 0
        centre, position, n_classes = means["total"].sum(0) / n, present.cumsum(0) - 1, int(present.sum())
        require_samples(n)
        if n_classes == 1:
            warn("target_labels holds one class only, so SFDA is 1, its best value, and says nothing about transfer.")

        def centred() -> Iterator[Block]:
            for rows, labels, *_ in batches():
                for part, of_part in zip(rows.split(BLOCK), labels.split(BLOCK), strict=True):
                    yield part.double() - centre, position[of_part]

        first = Discriminant(**reduce(_sums(centred(), "gram")))
        others = (first.means.sum(0) - first.means) / max(n_classes - 1, 1)
        shares = []

        def mixed() -> Iterator[Block]:
            for rows, labels in centred():
                shares.append(first.scores(rows).softmax(1).softmax(1).gather(1, labels[:, None]))
                yield others[labels].lerp_(rows, shares[-1]), labels

        second = Discriminant(**reduce(_sums(mixed(), "gram")), shrinkage=first.shrinkage)
        total = first.means.new_zeros(())
        # Scores are linear, so that those of a mixture are the mixture of scores.
        for (rows, labels), share in zip(centred(), shares, strict=True):
            scores = torch.lerp(second.scores(others)[labels], second.scores(rows), share)
            total += scores.softmax(1).gather(1, labels[:, None]).sum()
        return reduce({"total": total[None]})["total"].squeeze(0) / n


def _sums(blocks: Iterable[Sequence[torch.Tensor]], *needs: str) -> dict[str, torch.Tensor]:
    """`feature_sums` over blocks; none without samples."""
    metric = MomentMetric()
    for rows, labels, *_ in blocks:
        metric._add(**feature_sums(rows, labels, needs))
    return metric._sums


class Discriminant:
    """A shrunk linear discriminant, from the sums over centred samples of K classes.

    Args:
        count, total, gram: number of samples (K) and sum of x (K x D) by class, and sum of x x' (D x D).
        shrinkage: lambda; None: from the largest variance within the classes.
        least: share of the total variance that is added to every direction at least. Where every class is constant
            there is no variance within: a ridge above the rounding then keeps the inverse.
    """

    def __init__(
        self,
        count: torch.Tensor,
        total: torch.Tensor,
        gram: torch.Tensor,
        shrinkage: torch.Tensor | float | None = None,
        least: float = 16 * EPSILON,
    ) -> None:
        n, width = count.sum(), len(gram)
        mean, self.means = total.sum(0) / n, total / count[:, None]
        within = (gram - self.means.T @ total) / n
        self.shrinkage = _shrinkage(within) if shrinkage is None else shrinkage
        ridge = torch.maximum(self.shrinkage * within.trace() / width, least * gram.trace() / n)
        self.covariance = (1 - self.shrinkage) * within
        self.covariance.diagonal().add_(torch.where(ridge > 0, ridge, 1))
        factor = cho_factor(self.covariance.cpu().numpy(), check_finite=False)
        # A shift changes no posterior, and about the mean there is less to cancel.
        centred = self.means - mean
        weights = cho_solve(factor, centred.T.cpu().numpy(), check_finite=False)
        self.weights = torch.from_numpy(weights).to(gram.device)
        self.offsets = (count / n).log() - (centred * self.weights.T).sum(1) / 2 - mean @ self.weights

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """M x K, the logarithms of the posteriors of M x D samples, up to a constant for each sample."""
        return rows @ self.weights + self.offsets


def _shrinkage(within: torch.Tensor) -> torch.Tensor:
    """``max(exp(-5 s), 1e-10)`` with s the largest eigenvalue of the covariance within the classes."""
    direction = within.sum(1)
    norm = direction.norm()
    if norm <= 1e-6 * len(within) ** 0.5 * within.norm():
        largest = torch.linalg.eigvalsh(within)[-1].clamp(min=0)
    else:
        for _ in range(6):
            direction = within @ (direction / norm)
            largest = norm = direction.norm()
    return (-5 * largest).exp().clamp(min=LEAST_SHRINKAGE)
