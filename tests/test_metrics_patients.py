"""Sums by patient give the same values as all samples, for all patients and for resamples; SFDA of drawn pixels."""

import pytest
import torch
from metric_cases import CASES, draw

from medtl_ext import InputError
from medtl_ext.metrics import LEEP, SFDA, FeatureSamples, MomentMetric, PatientScores, Samples, compute_sfda

OF_SUMS = {case.name: case for case in CASES if isinstance(case.make(), MomentMetric)}
PATIENTS = ["ann", "bob", "cid", "dot"]


def metrics():
    return {name: case.make() for name, case in OF_SUMS.items()}


def problem():
    features, labels = draw(n=200, width=6, generator=torch.Generator().manual_seed(0))
    owners = torch.arange(200) * 7 % 4
    labels[owners == 3] = 0  # a patient without the other classes
    return features, labels, owners


def filled(*sizes, **options):
    """Merged scores of parts with these sizes."""
    features, labels, owners = problem()
    total = PatientScores(metrics(), **options)
    for part in torch.arange(200).split(sizes or 200):
        scores = PatientScores(metrics(), **options)
        scores.update(features[part], labels[part], [PATIENTS[k] for k in owners[part]])
        total.merge(scores)
    return total


def agree(values, expected):
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-9
    )


def one_shot(features, labels):
    return {name: case.compute(features, labels) for name, case in OF_SUMS.items()}


@pytest.mark.parametrize("sizes", [(), (25,) * 8, (90, 110)])
def test_everybody_is_the_one_shot_value(sizes):
    scores = filled(*sizes)
    assert scores.patients == tuple(PATIENTS)
    agree(scores.compute(), one_shot(*problem()[:2]))


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 3, 1], [0, 4, 0, 0]])
def test_a_resample_is_the_one_shot_value_of_its_samples(counts):
    drawn = Samples(*problem(), tuple(PATIENTS)).resampled(counts)
    agree(filled().resampled(counts), one_shot(*drawn))


def test_many_resamples_at_once():
    counts = torch.randint(1, 3, (7, 4))
    scores = filled()
    together = scores.resampled(counts, n_jobs=2)
    for row, single in enumerate(counts.tolist()):
        agree({name: values[row] for name, values in together.items()}, scores.resampled(single))


def test_a_reservoir():
    features, labels, owners = problem()
    kept = FeatureSamples(pixels=5)
    kept.update(features, labels, [PATIENTS[k] for k in owners])
    samples, scores = kept.compute(), filled(90, 110, pixels=5)
    assert scores.patients == samples.names
    agree(scores.resampled([1, 2, 0, 1]), one_shot(*samples.resampled([1, 2, 0, 1])))


@pytest.mark.parametrize("name", OF_SUMS)
def test_metrics_of_one_kind_alone(name):
    features, labels, owners = problem()
    scores = PatientScores({name: OF_SUMS[name].make()})
    scores.update(features, labels, [PATIENTS[k] for k in owners])
    agree(scores.compute(), {name: OF_SUMS[name].compute(features, labels)})


def test_a_patient_without_a_labelled_sample_is_none():
    scores = PatientScores(metrics(), ignore_index=9)
    scores.update(torch.tensor([[0.0], [1.0], [3.0]]), [0, 1, 9], ["ann", "ann", "bob"])
    assert scores.patients == ("ann",)


def test_bad_input():
    with pytest.raises(InputError, match="metrics is empty"):
        PatientScores({})
    with pytest.raises(InputError, match="leep is not a MomentMetric"):
        PatientScores({"leep": LEEP()})
    with pytest.raises(InputError, match="has seen no sample"):
        PatientScores(metrics()).compute()
    with pytest.raises(InputError, match="groups is missing"):
        PatientScores(metrics()).update(torch.zeros(3, 2), [0, 1, 0])
    scores = filled()
    with pytest.raises(InputError, match="4 numbers, one per patient"):
        scores.resampled([1, 1])
    for counts in ([1, -1, 1, 1], [0, 0, 0, 0], [0.5, 1, 1, 1]):
        with pytest.raises(InputError, match="fractions or negative numbers, or is all 0"):
            scores.resampled(counts)


def test_sfda_of_drawn_pixels():
    features, _ = draw((4,), n=12)
    labels = (torch.arange(12)[:, None] // 3 + torch.arange(4)) % 3  # five of each class or more for each patient
    metric, other = SFDA(pixels=3), SFDA(pixels=3)
    for one in (metric, other):
        for part in (slice(0, 5), slice(5, 12)):
            one.update(features[part], labels[part], (["bob", "ann", "cid"] * 4)[part])
    samples = metric.samples()
    assert len(samples.labels) == 27
    expected = compute_sfda(samples.features, samples.labels).item()
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)
    total = SFDA(pixels="auto")  # as a worker's that has not seen a grid yet
    total.merge(metric)
    total.merge(other)
    assert len(total.samples().labels) == 27
    assert 0 < total.compute() < 1
