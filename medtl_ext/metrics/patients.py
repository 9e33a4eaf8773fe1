"""Several feature metrics in one pass, with sums per patient, so that bootstraps need no second pass over the data."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from joblib import Parallel, delayed
from numpy.typing import ArrayLike
from torch.nn.utils.rnn import pad_sequence

from medtl_ext._validation import InputError
from medtl_ext.metrics.features import FeatureMetric, MomentMetric, Samples, check_counts, feature_sums

# Separates a patient's name from the name of a sum. No name contains it.
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class PatientSums:
    """Class sums of each patient, from which metrics are computed for any resample of the patients.

    Attributes:
        metrics: name -> a `MomentMetric`, of which only the value for given sums is used.
        names: the patients, in the order of ``counts``.
        sums: the sums of `feature_sums`, stacked over patients.

    >>> from medtl_ext.metrics import GBC
    >>> features, labels = torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1])
    >>> sums = PatientSums.of(Samples(features, labels, torch.tensor([0, 1, 0, 1]), ("a", "b")), {"gbc": GBC()})
    >>> sums.resampled([1, 1])
    {'gbc': tensor(-0.1544, dtype=torch.float64)}
    """

    metrics: Mapping[str, MomentMetric]
    names: tuple[Hashable, ...]
    sums: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, samples: Samples, metrics: Mapping[str, MomentMetric]) -> Self:
        """The sums per patient of the given samples."""
        held = {}
        for group, name in enumerate(samples.names):
            own = samples.groups == group
            held[name] = feature_sums(samples.features[own], samples.labels[own], _needs(metrics))
        return cls.stacked(held, metrics)

    @classmethod
    def stacked(cls, held: Mapping[Hashable, dict[str, torch.Tensor]], metrics: Mapping[str, MomentMetric]) -> Self:
        """From name of the patient -> sums. Patients may have different numbers of classes."""
        columns = {what: [sums[what] for sums in held.values()] for what in next(iter(held.values()))}
        # Sums by class have the classes as first axis, which is padded.
        return cls(metrics, tuple(held), {what: pad_sequence(sums, True) for what, sums in columns.items()})

    def resampled(self, counts: ArrayLike, *, n_jobs: int = 1) -> dict[str, torch.Tensor]:
        """The metrics' values if each patient is repeated ``counts`` times; see `PatientScores.resampled`."""
        counts = check_counts(counts, len(self.names))
        # Several resamples at a time, so that the sums are read once for all of them.
        size = max(1, 2**25 // max(sums[0].numel() for sums in self.sums.values()))
        parts = counts.reshape(-1, len(self.names)).double().split(size)
        values = [value for part in parts for value in self._values(part, n_jobs)]
        columns = {name: torch.stack([value[name] for value in values]) for name in self.metrics}
        return columns if counts.ndim > 1 else {name: column[0] for name, column in columns.items()}

    def _values(self, counts: torch.Tensor, n_jobs: int) -> list[dict[str, torch.Tensor]]:
        resamples = {what: torch.tensordot(counts.to(sums.device), sums, 1) for what, sums in self.sums.items()}
        return Parallel(n_jobs, backend="threading")(
            delayed(self._value)({what: values[index] for what, values in resamples.items()})
            for index in range(len(counts))
        )

    def _value(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "class_gram" in sums:
            squares = sums["class_gram"].diagonal(dim1=1, dim2=2)
            sums = sums | {"gram": sums["class_gram"].sum(0), "squares": squares}
        return {name: metric._evaluate(sums) for name, metric in self.metrics.items()}


def _needs(metrics: Mapping[str, MomentMetric]) -> set[str]:
    needs = {need for metric in metrics.values() for need in metric.needs}
    # The sums by class contain the other two.
    return needs - {"gram", "squares"} if "class_gram" in needs else needs


class PatientScores(FeatureMetric):
    """Several metrics of class sums in one pass, for all patients and for any resample of them.

    The sums of a resample are the sums of its patients, each as often as it was drawn. So ``resampled(counts)`` gives
    exactly the metrics' values for that resample, without a pass over the data. It is the function of counts that
    `medtl_ext.ranking.bootstrap_ranking` takes. In a bundle::

        "key_val_metric": {"scores": {
            "_target_": "medtl_ext.metrics.PatientScores",
            "metrics": {
                "h_score": {"_target_": "medtl_ext.metrics.HScore", "shrinkage": "ledoit_wolf"},
                "logme": {"_target_": "medtl_ext.metrics.LogME"}
            }
        }}

    ``compute()`` returns a dictionary, name -> value. Memory per patient: O(D ** 2 + C D), and C times as much with
    TransRate, whose sums are by class.

    Args:
        metrics: name -> a `MomentMetric` (`HScore`, `LogME`, `GBC`, `TransRate` or your own), of which only the value
            for given sums is used.
        options: see `FeatureMetric`; the options of ``metrics`` are not used.

    >>> from medtl_ext.metrics import GBC
    >>> scores = PatientScores({"gbc": GBC()})
    >>> scores.update(torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]), ["a", "b", "a", "b"])
    >>> scores.update(torch.tensor([[0.5], [2.0]]), torch.tensor([0, 1]), ["c", "c"])
    >>> scores.patients
    ('a', 'b', 'c')
    >>> scores.compute()
    {'gbc': tensor(-0.4796, dtype=torch.float64)}
    >>> scores.resampled([[1, 1, 1], [2, 1, 0]])["gbc"].shape
    torch.Size([2])
    """

    def __init__(self, metrics: Mapping[str, MomentMetric], **options: Any) -> None:
        if not metrics:
            raise InputError("metrics is empty; give at least one MomentMetric, such as HScore or LogME.")
        if others := [name for name, metric in metrics.items() if not isinstance(metric, MomentMetric)]:
            raise InputError(f"{others[0]} is not a MomentMetric; attach it by itself, or use FeatureSamples.")
        self.metrics = dict(metrics)
        super().__init__(**options)

    @property
    def patients(self) -> tuple[Hashable, ...]:
        """The patients seen by all processes, in the order of ``counts``. Call it on all processes."""
        return self._pooled().names

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        if groups is None:
            raise InputError("groups is missing; name the patient of each sample (in a data loader: key 'subject').")
        super()._take(features, labels, groups)

    def _add_rows(
        self, rows: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, groups: Sequence[Hashable]
    ) -> None:
        for name in dict.fromkeys(groups):
            own = torch.tensor([group == name for group in groups], device=owners.device)[owners]
            if bool(own.any()):
                sums = feature_sums(rows[own], labels[own], _needs(self.metrics))
                self._add(**{f"{name}{SEPARATOR}{what}": value for what, value in sums.items()})

    def compute(self) -> dict[str, torch.Tensor]:
        """Return name -> value over everything seen by all processes."""
        pooled = self._pooled()
        return pooled.resampled([1] * len(pooled.names))

    def resampled(self, counts: ArrayLike, *, n_jobs: int = 1) -> dict[str, torch.Tensor]:
        """The metrics' values if each patient is repeated ``counts`` times.

        Args:
            counts: one integer for each of `patients`, or resamples x patients.
            n_jobs: number of threads.

        Returns:
            Name -> value, or one value for each resample.

        Raises:
            InputError: counts has another length than `patients`, a negative number, or only zeros.
        """
        return self._pooled().resampled(counts, n_jobs=n_jobs)

    def _pooled(self) -> PatientSums:
        """The sums per patient over all processes."""
        if self._samples is not None:
            return PatientSums.of(self.samples(), self.metrics)
        held: dict[Hashable, dict[str, torch.Tensor]] = {}
        for key, value in sorted(self._totals().items()):
            name, what = key.rsplit(SEPARATOR, 1)
            held.setdefault(name, {})[what] = value
        return PatientSums.stacked(held, self.metrics)
