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

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import blas, cho_factor, cho_solve

from medtl_ext._validation import InputError
from medtl_ext.metrics._spool import PredictionSpool
from medtl_ext.metrics.base import TransferMetric, all_reduce_sums
from medtl_ext.metrics.features import SampleMetric, Samples, SampleStore, check_features

# Samples, labels and the index of each sample's patient.
Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Adds named sums up over all processes.
Reduction = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

# Rows of a block: enough for a product of matrices, few enough for the cache.
BLOCK = 2**10

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
    rows, labels = check_features(features, target_labels, ignore_index=ignore_index, minimum=2)
    classes, labels = labels.unique(return_inverse=True)
    centre = rows.mean(0)

    def centred() -> Iterator[Block]:
        for part, own in zip(rows.split(BLOCK), labels.split(BLOCK), strict=True):
            yield part - centre, own, torch.zeros_like(own)

    posterior, count = _posterior_sums(centred, len(classes), n_owners=1, reduce=dict)[0]
    return posterior / count


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

    @property
    def patients(self) -> tuple[Hashable, ...]:
        """The patients seen by all processes, in the order of ``counts``; call it on all of them."""
        return tuple(self._by_patient())

    def compute(self) -> torch.Tensor:
        """Return the value over everything seen by all processes; updates may go on afterwards."""
        posterior, count = torch.stack(list(self._by_patient().values())).sum(0)
        return posterior / count

    def resampled(self, counts: ArrayLike) -> torch.Tensor:
        """The mean posterior of patients as often as ``counts`` says, under the discriminants of all patients.

        These stay as they are, because they would need another look at all samples for every resample: the values tell
        how much the score depends on which patients are judged, not on which ones the discriminants come from.

        Args:
            counts: one integer for each of `patients`, or resamples x patients.

        Returns:
            The value, or one for each resample.

        Raises:
            InputError: counts has another length than `patients`, is negative, or draws nobody.
        """
        sums = torch.stack(list(self._by_patient().values()))
        counts = torch.as_tensor(np.asarray(counts))
        if counts.shape[-1:] != (len(sums),):
            raise InputError(f"counts has shape {tuple(counts.shape)}; expected {len(sums)} numbers, one per patient.")
        if counts.is_floating_point() or int(counts.min()) < 0 or not bool((counts.sum(-1) > 0).all()):
            raise InputError("counts holds numbers that are not whole, negative ones, or draws nobody.")
        posterior, count = (counts.to(sums.device).double() @ sums).unbind(-1)
        return posterior / count

    def reset(self) -> None:
        super().reset()
        self._result: dict[str, torch.Tensor] | None = None

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        self._result = None

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        super()._take(features, labels, groups)
        self._result = None

    def _new_store(self) -> _SpooledStore:
        return _SpooledStore(self.pixels if isinstance(self.pixels, int) else None, self.seed)

    def _by_patient(self) -> dict[str, torch.Tensor]:
        """Patient -> sum of the posteriors and number of samples, kept until any process has new samples."""
        store, reduce = self._samples, all_reduce_sums
        state = {"drawn": store.limit is not None, "stale": self._result is None}
        state = all_reduce_sums({name: torch.tensor([float(value)]) for name, value in state.items()})
        if state["stale"] > 0:
            if state["drawn"] > 0:  # every process then has the samples of all
                store, reduce = _SpooledStore(None, self.seed), dict
                store.add(*self.samples())
            self._result = store.posterior_sums(reduce)
        if not self._result:
            raise InputError(
                "SFDA has seen no sample; call update() before compute(), or look for an empty data loader."
            )
        return self._result


class _SpooledStore(SampleStore):
    """A store whose samples are in a `PredictionSpool` as long as all of them are kept."""

    def __init__(self, limit: int | None, seed: int) -> None:
        super().__init__(limit, seed)
        self.n_classes = 0
        self.names: dict[Hashable, int] = {}
        self._spool = PredictionSpool()
        self._width: int | None = None
        self._device = torch.device("cpu")

    def add(
        self, rows: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, groups: Sequence[Hashable] | None
    ) -> None:
        if self.limit is not None:
            super().add(rows, labels, owners, groups)
        elif len(rows):
            if self._width not in (None, rows.shape[1]):
                raise InputError(f"features has {rows.shape[1]} channels here, {self._width} before; use one layer.")
            self._width, self._device = rows.shape[1], rows.device
            self.n_classes = max(self.n_classes, int(labels.max()) + 1)
            groups = [""] * (int(owners.max()) + 1) if groups is None else groups
            patients = [self.names.setdefault(name, len(self.names)) for name in groups]
            owners = torch.tensor(patients, device=owners.device)[owners]
            self._spool.append(rows, labels.to(torch.int16), owners.to(torch.int32))

    def blocks(self) -> Iterator[Block]:
        """All samples, with the indices of their patients in ``names``."""
        for batch in self._spool:
            for rows, labels, owners in zip(*(part.split(BLOCK) for part in batch), strict=True):
                yield rows.to(self._device), labels.to(self._device).long(), owners.to(self._device).long()

    def posterior_sums(self, reduce: Reduction) -> dict[str, torch.Tensor]:
        """`_posterior_sums` of each patient by name, over all processes; none without samples."""
        n_classes = len(reduce({"classes": torch.ones(self.n_classes)})["classes"])
        means = reduce(self._class_sums(n_classes))
        if not means:
            return {}
        present = means["count"] > 0
        centre, position = means["total"].sum(0) / means["count"].sum(), present.cumsum(0) - 1

        def centred() -> Iterator[Block]:
            for rows, labels, owners in self.blocks():
                yield rows.double() - centre, position[labels], owners

        sums = _posterior_sums(centred, int(present.sum()), len(self.names), reduce)
        return dict(sorted(reduce({str(name): row for name, row in zip(self.names, sums, strict=True)}).items()))

    def _class_sums(self, n_classes: int) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for rows, labels, _ in self.blocks():
            if not sums:
                total = rows.new_zeros(n_classes, rows.shape[1], dtype=torch.float64)
                sums = {"count": total.new_zeros(n_classes), "total": total}
            sums["count"] += torch.bincount(labels, minlength=n_classes)
            sums["total"].index_add_(0, labels, rows.double())
        return sums

    def merge(self, other: SampleStore) -> None:
        self.limit = self.limit or other.limit
        super().merge(other)
        for rows, labels, owners in list(other.blocks()) if other is self else other.blocks():
            self.add(rows, labels, owners, list(other.names))

    def gathered(self, owner: str) -> Samples:
        plain = SampleStore(self.limit, self.seed)
        plain._kept = {stratum: list(parts) for stratum, parts in self._kept.items()}
        for rows, labels, owners in self.blocks():
            plain.add(rows, labels, owners, list(self.names))
        return plain.gathered(owner)


def _posterior_sums(
    blocks: Callable[[], Iterable[Block]], n_classes: int, n_owners: int, reduce: Reduction
) -> torch.Tensor:
    """Sum of the second discriminant's posteriors of the true class and number of samples, for each patient.

    Args:
        blocks: gives this process's samples, centred, with labels 0 to K - 1, every time it is called.
        n_classes: K; all of them have samples in some process.
        n_owners: how many patients this process has samples of.
        reduce: see `Reduction`.
    """
    sums = reduce(_sums(blocks(), n_classes))
    if (n := int(sums["count"].sum())) < 2:
        raise InputError(f"features holds {n} sample(s); expected at least 2.")
    if n_classes == 1:
        warnings.warn(
            "target_labels holds one class only, so SFDA is 1, its best value, and says nothing about transfer.",
            UserWarning,
            stacklevel=3,
        )
    first = _Discriminant(**sums)
    others = (first.means.sum(0) - first.means) / max(n_classes - 1, 1)

    shares = []

    def mixed() -> Iterator[Block]:
        for rows, labels, owners in blocks():
            shares.append(first.scores(rows).softmax(1).softmax(1).gather(1, labels[:, None]))
            yield others[labels].lerp_(rows, shares[-1]), labels, owners

    second = _Discriminant(**reduce(_sums(mixed(), n_classes)), shrinkage=first.shrinkage)
    result = first.means.new_zeros(n_owners, 2)
    # Scores are linear, so that those of a mixture are the mixture of scores.
    for (rows, labels, owners), share in zip(blocks(), shares, strict=True):
        scores = torch.lerp(second.scores(others)[labels], second.scores(rows), share)
        posterior = scores.softmax(1).gather(1, labels[:, None])
        result.index_add_(0, owners, torch.cat([posterior, torch.ones_like(posterior)], 1))
    return result


def _sums(blocks: Iterable[Block], n_classes: int) -> dict[str, torch.Tensor]:
    """Number of samples and sum of x by class, and sum of x x' over all; none without samples."""
    sums: dict[str, torch.Tensor] = {}
    for rows, labels, _ in blocks:
        if not sums:
            total = rows.new_zeros(n_classes, rows.shape[1])
            sums = {"count": total.new_zeros(n_classes), "total": total, "gram": rows.new_zeros(2 * rows.shape[1:])}
        sums["count"] += torch.bincount(labels, minlength=n_classes)
        sums["total"].index_add_(0, labels, rows)
        _add_gram(sums["gram"], rows)
    if sums:
        sums["gram"] = sums["gram"].triu() + sums["gram"].triu(1).T
    return sums


def _add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the sum of x x' over the rows x to the upper triangle of a D x D total, in place."""
    if rows.is_cuda:
        total.addmm_(rows.T, rows)
    else:  # half of the work of a product of two matrices; BLAS counts columns first, hence lower for upper
        blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=total.numpy().T, overwrite_c=True, lower=True)


class _Discriminant:
    """A shrunk linear discriminant, from the sums over centred samples of K classes.

    Args:
        count, total, gram: number of samples (K) and sum of x (K x D) by class, and sum of x x' (D x D).
        shrinkage: lambda; None: from the largest variance within the classes.
    """

    def __init__(
        self, count: torch.Tensor, total: torch.Tensor, gram: torch.Tensor, shrinkage: torch.Tensor | None = None
    ) -> None:
        n, width = count.sum(), len(gram)
        mean, self.means = total.sum(0) / n, total / count[:, None]
        within = (gram - self.means.T @ total) / n
        self.shrinkage = _shrinkage(within) if shrinkage is None else shrinkage
        # Where every class is constant there is no variance within: a ridge above the rounding then keeps the inverse.
        ridge = torch.maximum(self.shrinkage * within.trace() / width, 16 * EPSILON * gram.trace() / n)
        shrunk = (1 - self.shrinkage) * within
        shrunk.diagonal().add_(torch.where(ridge > 0, ridge, 1))
        factor = cho_factor(shrunk.cpu().numpy(), check_finite=False)
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
