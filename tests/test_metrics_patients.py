"""Sums by patient: the same values as from all samples, for everybody and for every resample."""

from __future__ import annotations

import pytest
import torch

from medtl_ext import InputError
from medtl_ext.metrics import (
    GBC,
    LEEP,
    FeatureSamples,
    HScore,
    LogME,
    PatientScores,
    TransRate,
    compute_gbc,
    compute_h_score,
    compute_logme,
    compute_transrate,
)
from medtl_ext.metrics.features import Samples

ONE_SHOT = {
    "h_score": lambda x, y: compute_h_score(x, y, shrinkage="ledoit_wolf"),
    "plain": compute_h_score,
    "logme": compute_logme,
    "gbc": compute_gbc,
    "diagonal": lambda x, y: compute_gbc(x, y, covariance="diagonal"),
    "transrate": compute_transrate,
}
PATIENTS = ["ann", "bob", "cid", "dot"]


def metrics():
    return {
        "h_score": HScore(shrinkage="ledoit_wolf"),
        "plain": HScore(),
        "logme": LogME(),
        "gbc": GBC(),
        "diagonal": GBC(covariance="diagonal"),
        "transrate": TransRate(),
    }


def problem(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    features = torch.randn(n, 6, generator=generator, dtype=torch.float64) + labels[:, None]
    groups = [PATIENTS[int(i)] for i in torch.randint(4, (n,), generator=generator)]
    labels[[i for i, name in enumerate(groups) if name == "dot"]] = 0  # a patient without the other classes
    return features, labels, groups


def filled(batches=1, **options):
    scores = PatientScores(options.pop("metrics", None) or metrics(), **options)
    features, labels, groups = problem()
    size = len(labels) // batches
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        scores.update(features[part], labels[part], groups[part])
    return scores


@pytest.mark.parametrize("batches", [1, 8])
def test_everybody_is_the_one_shot_value(batches):
    features, labels, _ = problem()
    values = filled(batches).compute()
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        {name: float(compute(features, labels)) for name, compute in ONE_SHOT.items()}, abs=1e-9
    )


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 3, 1], [0, 4, 0, 0]])
def test_a_resample_is_the_one_shot_value_of_its_samples(counts):
    features, labels, groups = problem()
    owners = torch.tensor([PATIENTS.index(name) for name in groups])
    drawn = Samples(features, labels, owners, tuple(PATIENTS)).resampled(counts)
    values = filled().resampled(counts)
    for name, compute in ONE_SHOT.items():
        assert float(values[name]) == pytest.approx(float(compute(*drawn)), abs=1e-9), name


def test_a_patient_without_a_labelled_sample_is_none():
    scores = PatientScores({"gbc": GBC()}, ignore_index=9)
    scores.update(torch.tensor([[0.0], [1.0], [3.0]]), [0, 1, 9], ["ann", "ann", "bob"])
    assert scores.patients == ("ann",)


def test_many_resamples_at_once():
    counts = torch.randint(1, 3, (7, 4))
    scores = filled()
    together = scores.resampled(counts, n_jobs=2)
    for row, single in enumerate(counts.tolist()):
        for name, value in scores.resampled(single).items():
            assert float(together[name][row]) == pytest.approx(float(value), abs=1e-9)


def test_merged_parts_and_a_reservoir():
    features, labels, groups = problem()
    whole, left, right = filled(), PatientScores(metrics()), PatientScores(metrics())
    left.update(features[:90], labels[:90], groups[:90])
    right.update(features[90:], labels[90:], groups[90:])
    left.merge(right)
    for name, value in whole.compute().items():
        assert float(left.compute()[name]) == pytest.approx(float(value), abs=1e-9)
    drawn = filled(pixels=5)
    kept = FeatureSamples(pixels=5)
    kept.update(features, labels, groups)
    samples = kept.compute()
    assert drawn.patients == samples.names
    value = compute_h_score(*samples.resampled([1, 2, 0, 1]))
    assert float(drawn.resampled([1, 2, 0, 1])["plain"]) == pytest.approx(float(value), abs=1e-9)


def test_patients_are_those_seen():
    assert filled().patients == ("ann", "bob", "cid", "dot")
    with pytest.raises(InputError, match="has seen no sample"):
        PatientScores(metrics()).compute()


def test_bad_input():
    with pytest.raises(InputError, match="metrics is empty"):
        PatientScores({})
    with pytest.raises(InputError, match="leep is no MomentMetric"):
        PatientScores({"leep": LEEP()})
    with pytest.raises(InputError, match="groups is missing"):
        PatientScores(metrics()).update(torch.zeros(3, 2), [0, 1, 0])
    scores = filled()
    with pytest.raises(InputError, match="4 numbers, one per patient"):
        scores.resampled([1, 1])
    for counts in ([1, -1, 1, 1], [0, 0, 0, 0], [0.5, 1, 1, 1]):
        with pytest.raises(InputError, match="not whole, negative ones, or draws nobody"):
            scores.resampled(counts)
