r"""SFDA: how well a linear discriminant separates the classes after samples were moved towards the other classes.

With class means m_c, priors P_c = N_c / N and the covariance S within the classes (divided by N), a discriminant gives

.. math::
    \Sigma = (1 - \lambda) S + \lambda \tfrac{\mathrm{tr} S}{D} I, \quad
    p(c | x) = \mathrm{softmax}_c\left(m_c' \Sigma^{-1} x - \tfrac12 m_c' \Sigma^{-1} m_c + \ln P_c\right), \quad
    \lambda = \max(e^{-5 \sigma_{\max}(S)}, 10^{-10})

Each sample x of class y is then mixed with the mean of the other classes' means: ``p x + (1 - p) mean_{c != y} m_c``,
where p is the value of y in the softmax of the sample's posteriors. A second discriminant, with the same lambda, is
fitted to the mixed samples. The score is its mean posterior of the true class.

The samples are read four times, block by block (means, covariance, covariance of the mixed samples, posteriors). The
streaming class runs the network once and keeps the samples in a `PredictionSpool`, which moves to disk when it grows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from scipy.linalg import cho_factor, cho_solve

from medtl_ext._validation import warn
from medtl_ext.metrics.base import all_reduce_sums
from medtl_ext.metrics.features import MomentMetric, SampleMetric, feature_sums, require_samples

# Samples and labels; and a function that returns the batches of this process whenever it is called.
Block = tuple[torch.Tensor, torch.Tensor]
Batches = Callable[[], Iterable[Sequence[torch.Tensor]]]

# Adds up named sums over all processes.
Reduction = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

# Rows per block: enough for fast matrix products, and few enough for the cache.
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
        The score, a float64 scalar in [0, 1]; higher predicts better transfer. 1 with a `UserWarning` for one class
        only. Constant features give the sum of the squared class frequencies. The features' scale matters: lambda is
        1e-10 if their largest variance within the classes is above 5, and close to 1 if it is far below 1.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.0, -1.0], [1.6, 0.0]])
        >>> compute_sfda(features, torch.tensor([0, 0, 1, 1, 0]))
        tensor(0.8158, dtype=torch.float64)

    Reference: Shao et al., *Not all models are equal: predicting model transferability in a self-challenging Fisher
    space*, ECCV 2022. The largest eigenvalue in lambda is approximated by six power iterations from the row sums of S,
    as in the authors' code (the exact one changes the score by up to 1e-3 if variances are below 5). It is exact if the
    row sums are 0, as for probabilities. A Cholesky factor replaces the authors' eigenvectors, with the same
    posteriors.
    """
    return SFDA(ignore_index=ignore_index).of(features, target_labels)


class SFDA(SampleMetric):
    """`compute_sfda` over batches: ``compute()`` returns a float64 scalar in [0, 1], higher is better.

    Memory: D x D and C x D numbers, a block of samples, 8 bytes for every sample, and up to 256 MiB of samples in their
    own dtype; more samples go to disk.

    Args:
        options: see `FeatureMetric`. With ``pixels`` only the drawn samples count.

    >>> metric = SFDA()
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0, 1.0]]), torch.tensor([0, 0, 1]))
    >>> metric.update(torch.tensor([[3.0, -1.0], [1.6, 0.0]]), torch.tensor([1, 0]))
    >>> metric.compute()
    tensor(0.8158, dtype=torch.float64)
    """

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._mean_posterior(lambda: [(features, labels)], reduce=dict)

    def compute(self) -> torch.Tensor:
        """Return the value over everything seen by all processes. Further updates are possible afterwards."""
        drawn = all_reduce_sums({"drawn": torch.tensor([float(self._samples.limit is not None)])})["drawn"]
        # Drawn samples are gathered from all processes.
        return super().compute() if drawn > 0 else self._mean_posterior(self._samples.batches, all_reduce_sums)

    def _mean_posterior(self, batches: Batches, reduce: Reduction) -> torch.Tensor:
        """Mean posterior of the true class by the second discriminant."""
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
        # Scores are linear: the score of a mixture is the mixture of the scores.
        for (rows, labels), share in zip(centred(), shares, strict=True):
            scores = torch.lerp(second.scores(others)[labels], second.scores(rows), share)
            total += scores.softmax(1).gather(1, labels[:, None]).sum()
        return reduce({"total": total[None]})["total"].squeeze(0) / n


def _sums(blocks: Iterable[Sequence[torch.Tensor]], *needs: str) -> dict[str, torch.Tensor]:
    """`feature_sums` over blocks; empty without samples."""
    metric = MomentMetric()
    for rows, labels, *_ in blocks:
        metric._add(**feature_sums(rows, labels, needs))
    return metric._sums


class Discriminant:
    """A shrunk linear discriminant, from the sums over centred samples of K classes.

    Args:
        count, total, gram: number of samples (K) and sum of x (K x D) by class, and sum of x x' (D x D).
        shrinkage: lambda. None computes it from the largest variance within the classes.
        least: smallest share of the total variance that is added to every direction. It keeps the covariance invertible
            if every class is constant.
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
        # A shift does not change the posteriors, and centring about the mean avoids cancellation.
        centred = self.means - mean
        weights = cho_solve(factor, centred.T.cpu().numpy(), check_finite=False)
        self.weights = torch.from_numpy(weights).to(gram.device)
        self.offsets = (count / n).log() - (centred * self.weights.T).sum(1) / 2 - mean @ self.weights

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Logarithms of the posteriors of M x D samples, M x K, up to a constant for each sample."""
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
