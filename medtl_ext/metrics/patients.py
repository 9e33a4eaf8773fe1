"""Several feature metrics from one pass, with the sums of every patient: bootstraps need no second look at the data."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import ArrayLike

from medtl_ext._validation import InputError
from medtl_ext.metrics.base import all_reduce_sums
from medtl_ext.metrics.features import FeatureMetric, MomentMetric, feature_sums

# Between a patient's name and that of a sum: no name holds it.
SEPARATOR = "\x1f"


class PatientScores(FeatureMetric):
    """Metrics of class sums, together, from one pass, for all patients and for any resample of them.

    The sums of a resample are the sums of its patients, each as often as it was drawn. So ``resampled(counts)`` gives
    exactly what the metrics would say of that resample, and a thousand of them cost no pass over the data. It is the
    function of counts that `medtl_ext.ranking.bootstrap_ranking` asks for. In a bundle::

        "key_val_metric": {"scores": {
            "_target_": "medtl_ext.metrics.PatientScores",
            "metrics": {
                "h_score": {"_target_": "medtl_ext.metrics.HScore", "shrinkage": "ledoit_wolf"},
                "logme": {"_target_": "medtl_ext.metrics.LogME"}
            }
        }}

    ``compute()`` returns a dictionary, name -> value. Memory: for each patient O(D ** 2 + C D), times C with
    TransRate, whose sums are by class.

    Args:
        metrics: name -> a `MomentMetric` (`HScore`, `LogME`, `GBC`, `TransRate` or your own), of which only what it
            makes of sums is used.
        options: see `FeatureMetric`; those of ``metrics`` are not used.

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
            raise InputError("metrics is empty; name at least one metric of sums, such as HScore or LogME.")
        if others := [name for name, metric in metrics.items() if not isinstance(metric, MomentMetric)]:
            raise InputError(f"{others[0]} is no MomentMetric; attach it by itself, or use FeatureSamples.")
        self.metrics = dict(metrics)
        super().__init__(**options)

    @property
    def patients(self) -> tuple[Hashable, ...]:
        """The patients seen by all processes, in the order of ``counts``; call it on all of them."""
        return tuple(self._by_patient())

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        if groups is None:
            raise InputError(
                "groups is missing: resampling patients needs the patient of each sample; give update(..., groups), or "
                "a data loader whose items have a 'subject'."
            )
        super()._take(features, labels, groups)

    def _add_rows(
        self, rows: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, groups: Sequence[Hashable]
    ) -> None:
        for name in dict.fromkeys(groups):
            own = torch.tensor([group == name for group in groups], device=owners.device)[owners]
            if bool(own.any()):
                self._add(**{_key(name, what): sums for what, sums in self._sums_of(rows[own], labels[own]).items()})

    def _sums_of(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return feature_sums(features, labels, self._needs)

    @property
    def _needs(self) -> set[str]:
        needs = {need for metric in self.metrics.values() for need in metric.needs}
        # The sums by class hold the other two.
        return needs - {"gram", "squares"} if "class_gram" in needs else needs

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "class_gram" in sums:
            sums = sums | {
                "gram": sums["class_gram"].sum(0),
                "squares": sums["class_gram"].diagonal(dim1=1, dim2=2),
            }
        return {name: metric._evaluate(sums) for name, metric in self.metrics.items()}

    def compute(self) -> dict[str, torch.Tensor]:
        """Return name -> value over everything seen by all processes."""
        everybody = torch.ones(1, len(self.patients), dtype=torch.int64)
        return {name: values[0] for name, values in self.resampled(everybody).items()}

    def resampled(self, counts: ArrayLike, *, n_jobs: int = 1) -> dict[str, torch.Tensor]:
        """What the metrics say of the patients as often as ``counts`` says.

        Args:
            counts: one integer for each of `patients`, or resamples x patients.
            n_jobs: threads that evaluate resamples at a time.

        Returns:
            Name -> value, or one value for each resample.

        Raises:
            InputError: counts has another length than `patients`, is negative, or draws nobody.
        """
        held = self._by_patient()
        counts = torch.as_tensor(np.asarray(counts))
        if counts.shape[-1:] != (len(held),):
            raise InputError(f"counts has shape {tuple(counts.shape)}; expected {len(held)} numbers, one per patient.")
        if counts.is_floating_point() or int(counts.min()) < 0 or not bool((counts.sum(-1) > 0).all()):
            raise InputError("counts holds numbers that are not whole, negative ones, or draws nobody.")
        pooled = _stacked(list(held.values()))
        rows = counts.reshape(-1, len(held)).double()
        # A few resamples at a time read the sums of the patients once for all of them.
        parts = rows.split(max(1, 2**25 // max(value[0].numel() for value in pooled.values())))
        values = [value for part in parts for value in self._evaluated(part, pooled, n_jobs)]
        columns = {name: torch.stack([value[name] for value in values]) for name in self.metrics}
        return columns if counts.ndim > 1 else {name: column[0] for name, column in columns.items()}

    def _evaluated(
        self, counts: torch.Tensor, pooled: Mapping[str, torch.Tensor], n_jobs: int
    ) -> list[dict[str, torch.Tensor]]:
        resamples = {
            what: (counts.to(sums.device) @ sums.flatten(1)).view(len(counts), *sums.shape[1:])
            for what, sums in pooled.items()
        }

        return Parallel(n_jobs, backend="threading")(
            delayed(self._evaluate)({what: values[index] for what, values in resamples.items()})
            for index in range(len(counts))
        )

    def _by_patient(self) -> dict[str, dict[str, torch.Tensor]]:
        """Patient -> sums, over all processes."""
        if self._samples is not None:
            samples = self.samples()
            store = PatientScores(self.metrics, pixels=None)
            store._add_rows(samples.features, samples.labels, samples.groups, samples.names)
            return store._by_patient()
        held: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in all_reduce_sums(self._sums).items():
            name, what = key.rsplit(SEPARATOR, 1)
            held.setdefault(name, {})[what] = value
        if not held:
            raise InputError(
                "PatientScores has seen no sample; call update() before compute(), or look for an empty data loader."
            )
        return dict(sorted(held.items()))


def _key(name: Hashable, what: str) -> str:
    return f"{name}{SEPARATOR}{what}"


def _stacked(held: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sums of all patients in one tensor each, patients first, with room for every class."""
    n_classes = max(len(sums["count"]) for sums in held)
    stacked = {}
    for what, first in held[0].items():
        shape = first.shape if what in ("gram", "cubic", "quartic") else (n_classes, *first.shape[1:])
        stacked[what] = first.new_zeros(len(held), *shape)
        for row, sums in zip(stacked[what], held, strict=True):
            row[: len(sums[what])] = sums[what]
    return stacked
