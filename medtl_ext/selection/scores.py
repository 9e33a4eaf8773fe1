"""Transferability scores by name, for all target patients and for any resample of them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_ext.metrics.features import MomentMetric, Samples, feature_sums
from medtl_ext.metrics.gbc import GBC
from medtl_ext.metrics.h_score import HScore, compute_h_score_map
from medtl_ext.metrics.leep import compute_leep
from medtl_ext.metrics.logme import LogME
from medtl_ext.metrics.nce import compute_nce
from medtl_ext.metrics.otce import compute_otce
from medtl_ext.metrics.transrate import TransRate
from medtl_ext.selection.observe import Observation

MOMENTS = {
    "h_score": lambda: HScore(shrinkage="ledoit_wolf"),
    "logme": LogME,
    "gbc": GBC,
    "transrate": TransRate,
}
"""Scores of class sums, which a resample of patients costs next to nothing."""
OF_SAMPLES = {"sfda": "sfda", "nleep": "nleep", "parc": "parc"}
"""Scores of the balanced pixels' features, by the module that has their ``compute_<name>``."""

ScoreOfCounts = Callable[[Sequence[int]], float]


def _leep(seen: Observation) -> float:
    return float(compute_leep(seen.maps.probs, seen.maps.labels))


def _nce(seen: Observation) -> float:
    return float(compute_nce(seen.maps.probs.argmax(1), seen.maps.labels))


def _h_score_map(seen: Observation) -> float:
    """The mean of the map over all pixels; where one label only occurs the map is 0."""
    probs, labels = seen.maps.probs.flatten(2), seen.maps.labels.flatten(1)
    several = labels.amin(0) != labels.amax(0)
    if not bool(several.any()):
        return 0.0
    return float(compute_h_score_map(probs[..., several], labels[:, several]).nansum()) / labels.shape[1]


def _otce(seen: Observation) -> float:
    if seen.source_pixels is None:
        return float("nan")
    probs = seen.maps.probs.movedim(1, -1).flatten(0, -2)
    labels = seen.maps.labels.flatten()
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: len(seen.source_pixels[1])]
    # Two channels of a softmax lie on a line, where transport is a matter of sorting; more take a plan.
    size = {"n_samples": 10_000, "repeats": 10} if probs.shape[1] == 2 else {"n_samples": 1_000, "repeats": 3}
    return float(compute_otce(*seen.source_pixels, probs[chosen], labels[chosen], **size))


OF_PREDICTIONS: dict[str, Callable[[Observation], float]] = {
    "leep": _leep,
    "nce": _nce,
    "h_score_map": _h_score_map,
    "otce": _otce,
}
"""Scores of the source's predictions."""
METRICS = (*MOMENTS, "probe_auc", *OF_PREDICTIONS, *OF_SAMPLES)
LABELS = {
    "h_score": "shrunk H-score",
    "logme": "LogME",
    "gbc": "GBC",
    "transrate": "TransRate",
    "probe_auc": "linear-probe AUC",
    "leep": "LEEP",
    "nce": "NCE",
    "h_score_map": "H-score map",
    "otce": "OTCE",
    "sfda": "SFDA",
    "nleep": "NLEEP",
    "parc": "PARC",
}


@dataclass(frozen=True)
class Probe:
    """Held-out class probabilities of a linear probe, each patient's by a probe that never saw the patient.

    Attributes:
        probs: M x K, for the classes in order; NaN rows where the other patients had one class only.
        labels, groups: M each.
        classes: K.
    """

    probs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    classes: np.ndarray

    @classmethod
    def fit(cls, seen: Observation) -> Probe:
        """Logistic regression on standardised features, leaving one patient out at a time."""
        features, labels, groups = (tensor.cpu().numpy() for tensor in seen.samples[:3])
        classes = np.unique(labels)
        probs = np.full((len(labels), len(classes)), np.nan)
        for patient in np.unique(groups):
            out = groups == patient
            present = np.unique(labels[~out])
            if len(present) < 2:
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
            probe.fit(features[~out], labels[~out])
            rows = np.zeros((out.sum(), len(classes)))
            rows[:, np.searchsorted(classes, present)] = probe.predict_proba(features[out])
            probs[out] = rows
        return cls(probs, labels, groups, classes)

    def auc(self, counts: Sequence[int] | None = None) -> float:
        """Area under the ROC curve over all patients' pixels; of several classes the mean of one against the rest."""
        weights = np.ones(len(self.labels)) if counts is None else np.asarray(counts, float)[self.groups]
        known = ~np.isnan(self.probs[:, 0]) & (weights > 0)
        labels, probs, weights = self.labels[known], self.probs[known], weights[known]
        places = [1] if len(self.classes) == 2 else range(len(self.classes))
        values = [
            roc_auc_score(labels == self.classes[place], probs[:, place], sample_weight=weights)
            for place in places
            if 0 < (labels == self.classes[place]).sum() < len(labels)
        ]
        return float(np.mean(values)) if values else float("nan")


def score_of_counts(metric: str, seen: Observation, *, seed: int = 0) -> ScoreOfCounts:
    """One source's score as a function of how often each target patient counts.

    NaN where a source has no such score: OTCE without pixels of the source's own. The seed is that of NLEEP's mixtures.
    """
    if metric in MOMENTS:
        return _moment_score(MOMENTS[metric](), seen.samples)
    if metric == "probe_auc":
        return Probe.fit(seen).auc
    if metric in OF_PREDICTIONS:
        return lambda counts: OF_PREDICTIONS[metric](replace(seen, maps=seen.maps.resampled(counts)))
    module = importlib.import_module(f"medtl_ext.metrics.{OF_SAMPLES[metric]}")
    compute = getattr(module, f"compute_{metric}")
    options = {"seed": seed} if metric == "nleep" else {}
    return lambda counts: float(compute(*seen.samples.resampled(counts), **options))


def _moment_score(metric: MomentMetric, samples: Samples) -> ScoreOfCounts:
    """Sums of every patient, added up as often as the patient counts.

    `medtl_ext.metrics.PatientScores` does the same over processes; here the samples of all have been gathered already.
    """
    held = [
        feature_sums(samples.features[samples.groups == group], samples.labels[samples.groups == group], metric.needs)
        for group in range(len(samples.names))
    ]
    n_classes = max(len(sums["count"]) for sums in held)
    by_class = {"count", "total", "squares", "class_gram"}
    stacked = {
        what: torch.stack([_padded(sums[what], n_classes) if what in by_class else sums[what] for sums in held])
        for what in held[0]
    }

    def value(counts: Sequence[int]) -> float:
        weights = torch.as_tensor(np.asarray(counts), dtype=torch.float64, device=samples.features.device)
        return float(metric._evaluate({what: torch.tensordot(weights, sums, 1) for what, sums in stacked.items()}))

    return value


def _padded(sums: torch.Tensor, n_classes: int) -> torch.Tensor:
    grown = sums.new_zeros(n_classes, *sums.shape[1:])
    grown[: len(sums)] = sums
    return grown


def score(metric: str, seen: Observation) -> float:
    """One source's score on all target patients."""
    if metric == "leep":
        return seen.leep
    if metric == "nce":
        return seen.nce
    patients = len(seen.maps.names if metric in OF_PREDICTIONS else seen.samples.names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return score_of_counts(metric, seen)(np.ones(patients, dtype=int))


def all_scores(metrics: Sequence[str], observed: Mapping[str, Observation]) -> dict[str, dict[str, float]]:
    """Source -> metric -> score."""
    return {name: {metric: score(metric, seen) for metric in metrics} for name, seen in observed.items()}


def why_no_score(metric: str, seen: Observation) -> str:
    """The reason of a NaN, for the table."""
    if metric == "otce" and seen.source_pixels is None:
        return "no OTCE: the source's own images are not known"
    return f"no {LABELS[metric]}"
