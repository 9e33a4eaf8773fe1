"""Limiting cases of the feature metrics, and scores over several models; shared tests are in `test_metrics.py`."""

import math

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed
from test_metrics_references import log_density, over_pairs

from medtl_ext import InputError, metrics
from medtl_ext.metrics import NCTITerms, combine_lp_fu, combine_ncti

# GBC


@pytest.mark.parametrize("covariance", ["spherical", "diagonal"])
class TestGBC:
    def test_far_apart_and_the_same(self, covariance):
        features, labels = draw()
        assert metrics.compute_gbc(features + 1e3 * labels[:, None], labels, covariance=covariance) == 0
        same = features[:20].repeat(3, 1), torch.arange(3).repeat_interleave(20)
        assert metrics.compute_gbc(*same, covariance=covariance).item() == pytest.approx(-6, abs=1e-12)


def test_class_of_one_sample_has_the_least_variance():
    pooled, least = (1 + 1e-4) / 2, 1e-4
    expected = -2 * np.exp(-0.5 * np.log(pooled / np.sqrt(least)))
    assert metrics.compute_gbc([[0.0], [2.0], [1.0]], [0, 0, 1]).item() == pytest.approx(expected, abs=1e-12)


# LogME


def both(features, labels):
    yield metrics.compute_logme(features, labels).item()
    yield streamed(metrics.LogME(), features, labels, 7).item()


class TestLogME:
    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    @pytest.mark.parametrize(("n", "width"), [(30, 30), (20, 90)])
    def test_with_few_samples(self, scale, n, width):
        features, labels = draw(n=n, width=width)
        expected = metrics.compute_logme(features, labels).item()
        for value in both(features * scale, labels):
            assert value == pytest.approx(expected, abs=1e-7)

    def test_where_the_evidence_has_several_maxima(self):
        # From far away the iteration would climb another one than from near by.
        for _ in range(30):
            features, labels = draw(n=12, width=12, signal=0)
            features = features * torch.randn(12).mul(1.5).exp()
            expected = metrics.compute_logme(features, labels).item()
            for scale in (1e8, 1e-8):  # Newton's last step may stop a millionth apart
                assert metrics.compute_logme(features * scale, labels).item() == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize("width", [1, 3, 10])
    def test_zeros_leave_noise_alone(self, width):
        labels = torch.tensor([0, 0, 1, 1, 1, 1])
        expected = np.mean([log_density(np.zeros((6, 1)), np.eye(6)[0] * np.sqrt(k), 1, 6 / k) / 6 for k in (2, 4)])
        for value in both(torch.zeros(6, width), labels):
            assert value == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("constant", [0.1, 1e8])
    def test_constant_features(self, constant):
        _, labels = draw()
        ones = metrics.compute_logme(torch.ones(60, 1), labels).item()
        assert metrics.compute_logme(torch.full((60, 4), constant), labels).item() == pytest.approx(ones, abs=1e-6)

    def test_a_class_without_any_correlation(self):
        # The features of class 0 are all zero, so that its alpha is infinite.
        features, labels = draw()
        one_shot, of_sums = both(features * (labels > 0)[:, None], labels)
        assert np.isfinite(one_shot)
        assert of_sums == pytest.approx(one_shot, abs=1e-9)

    @pytest.mark.parametrize("scale", [1, 1e8, 1e-8])
    def test_perfect_separation(self, scale):
        labels = torch.arange(60) % 3
        one_shot, of_sums = both(torch.eye(3)[labels] * scale, labels)
        assert 1 < one_shot < 10  # without a least error there is no bound
        assert of_sums == pytest.approx(one_shot)


# PARC


def test_parc_of_many_samples_draws_them_by_content(monkeypatch):
    monkeypatch.setattr("medtl_ext.metrics.parc.MAX_SAMPLES", 30)
    features, labels = draw()
    order = torch.randperm(60)
    values = [metrics.compute_parc(features, labels, seed=seed).item() for seed in range(3)]
    assert len(set(values)) == 3
    assert metrics.compute_parc(features[order], labels[order], seed=1).item() == pytest.approx(values[1], abs=1e-9)
    samples = metrics.FeatureSamples(seed=1)  # which come in the order of the draw
    samples.update(features, labels)
    drawn = [column[:30] for column in samples.compute()[:2]]
    assert values[1] == pytest.approx(over_pairs(drawn[0].numpy(), drawn[1].numpy(), 5), abs=1e-8)
    monkeypatch.setattr("medtl_ext.metrics.parc.MAX_SAMPLES", 60)
    assert metrics.compute_parc(features, labels, seed=1).item() not in values


def test_parc_at_best_and_at_worst():
    features = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    assert metrics.compute_parc(features, [5, 5, 2, 2], n_components=None).item() == pytest.approx(100)
    assert -100 <= metrics.compute_parc(features, [5, 2, 5, 2], n_components=None).item() < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x, y: (x, torch.arange(60)), "no two samples of one"), (lambda x, y: (x[:, :1], y), "same distance")],
    ids=["singletons", "one feature"],
)
@pytest.mark.parametrize("n_components", [None, 32])
def test_parc_that_is_undefined(change, message, n_components):
    with pytest.warns(UserWarning, match=message):
        assert metrics.compute_parc(*change(*draw()), n_components=n_components).item() == 0


# NCTI


class TestNCTI:
    @pytest.mark.parametrize(("n", "width", "n_classes"), [(2, 5, 2), (20, 400, 3), (40, 300, 20)])
    def test_fewer_samples_than_dimensions(self, n, width, n_classes):
        with pytest.warns(UserWarning, match="no more than their .* together"):
            terms = metrics.compute_ncti(torch.randn(n, width), torch.arange(n) % n_classes)
        assert all(map(math.isfinite, terms))
        assert terms.ncc.item() == pytest.approx(1, abs=1e-3)

    def test_collapsed_classes_are_the_best(self):
        labels = torch.arange(30) % 3
        terms = metrics.compute_ncti(torch.eye(3)[labels], labels)
        assert terms.ncc.item() == pytest.approx(1)
        assert terms.vc.item() == pytest.approx(math.log(3 * math.sqrt(10)))
        assert 1e6 < terms.seli.item() < math.inf


class TestCombineNCTI:
    def test_by_hand(self):
        terms = {
            "a": NCTITerms(torch.tensor(10.0), torch.tensor(0.5), torch.tensor(2.0)),
            "b": NCTITerms(torch.tensor(20.0), torch.tensor(0.6), torch.tensor(4.0)),
            "c": NCTITerms(torch.tensor(15.0), torch.tensor(0.9), torch.tensor(3.5)),
        }
        assert combine_ncti(terms) == pytest.approx({"a": 0 + 0 - 0, "b": 0.25 + 1 - 1, "c": 1 + 0.5 - 0.75}, abs=1e-6)

    def test_terms_that_are_the_same_for_all(self):
        assert combine_ncti({"a": NCTITerms(1, 1, 2), "b": NCTITerms(1, 1, 3)}) == {"a": 1.0, "b": 0.0}
        assert combine_ncti({"a": NCTITerms(1, 1, 2)}) == {"a": 0.5}

    @pytest.mark.parametrize(
        ("terms", "message"),
        [
            ({}, "terms is empty"),
            ({"a": (1, 2)}, "terms of a are"),
            ({"a": (1, 2, math.nan)}, "terms of a are"),
            ({"a": (1, 2, 3), "b": (1, 2, math.inf)}, "terms of b are"),
        ],
    )
    def test_bad(self, terms, message):
        with pytest.raises(InputError, match=message):
            combine_ncti(terms)


# NLEEP


class TestNLEEP:
    def test_seed(self):
        features, labels = draw(signal=0.3)
        metric = metrics.NLEEP(seed=1)
        metric.update(features, labels)
        values = [metrics.compute_nleep(features, labels, seed=seed).item() for seed in (0, 0, 1)]
        assert values[0] == values[1] != values[2] == metric.compute().item()
        assert values[2] == pytest.approx(values[0], rel=0.5)

    @pytest.mark.parametrize(("n", "n_gaussians"), [(2, 1), (7, 3), (19, 9)])
    def test_few_samples(self, n, n_gaussians):
        with pytest.warns(UserWarning, match=f"has {n_gaussians} Gaussians instead of 10"):
            value = metrics.compute_nleep(*draw(n=n, width=400, n_classes=2))
        assert -1 < value.item() <= 0
        if n == 2:
            assert value.item() == pytest.approx(-np.log(2))


# SFDA


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
def test_sfda_of_classes_that_are_points(scale):
    labels = torch.arange(60) % 3
    points = scale * (1 + torch.eye(3)[labels])
    for value in (metrics.compute_sfda(points, labels), streamed(metrics.SFDA(), points, labels, 20)):
        assert value.item() == pytest.approx(1, abs=1e-9)
    features, labels = draw()
    assert metrics.compute_sfda(features + 1e12 * labels[:, None], labels).item() == pytest.approx(1)


# Label prediction, and its combination with feature update

LP = {"a": 0.5, "b": 0.7, "c": 0.9}
FU = {"a": 2.0, "b": 1.5, "c": 1.0}


class TestLabelPrediction:
    @pytest.mark.parametrize("width", [1, 3])
    def test_more_classes_than_dimensions(self, width):
        # NCA then starts from discriminant directions, of which there are none when classes have collapsed to points,
        # or have one mean.
        points = torch.randn(8, width)
        labels = torch.arange(8).repeat(6)
        assert metrics.compute_label_prediction(points[labels], labels).item() == 1
        assert (
            0.2 <= metrics.compute_label_prediction(points.repeat_interleave(8, 0), torch.arange(64) % 8).item() < 0.6
        )

    def test_duplicates_do_not_hide_a_sample_from_itself(self):
        features = torch.zeros(20, 2)
        features[10:, 0] = 1.0
        labels = torch.arange(20) % 10  # ten classes, each once in either heap of ten
        assert metrics.compute_label_prediction(features, labels).item() >= 0.2

    def test_many_samples_are_drawn_by_content(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.metrics.label_prediction.MAX_SAMPLES", 25)
        features, labels = draw()
        order = torch.randperm(len(labels))
        values = [metrics.compute_label_prediction(features, labels, seed=seed).item() for seed in range(4)]
        assert len(set(values)) > 1
        assert all(value * 5 * 25 == pytest.approx(round(value * 5 * 25)) for value in values)
        assert metrics.compute_label_prediction(features[order], labels[order], seed=1).item() == pytest.approx(
            values[1]
        )

    @pytest.mark.parametrize(
        ("change", "message", "value", "honest"),
        [
            (lambda x, y: (x, torch.arange(len(y))), "no two samples of one class", 0.2, 0),
            (lambda x, y: (x[:4], torch.tensor([0, 1, 1, 1])), "each other's neighbours", 2.5 / 4, 0.5),
            (lambda x, y: (x[:2], torch.tensor([3, 1])), "each other's neighbours", 0.5, 0),
        ],
        ids=["singletons", "four samples", "two samples"],
    )
    def test_few_samples(self, change, message, value, honest):
        for leave_one_out, expected in ((False, value), (True, honest)):
            with pytest.warns(UserWarning, match=message):
                found = metrics.compute_label_prediction(*change(*draw()), leave_one_out=leave_one_out)
            assert found.item() == pytest.approx(expected)


class TestCombineLPFU:
    """The published table of the combination is in `test_papers_tables.py`."""

    def test_product_of_the_scaled(self):
        scores = combine_lp_fu({name: torch.tensor(value) for name, value in LP.items()}, FU)
        assert scores == pytest.approx({"a": 0, "b": 0.25, "c": 0})
        assert {type(value) for value in scores.values()} == {float}
        assert combine_lp_fu(LP, {"a": 1.0, "b": 1.5, "c": 2.0}) == pytest.approx({"a": 0, "b": 0.25, "c": 1})

    def test_cross_domain(self):
        fu = {"a": 1.0, "b": 1.25, "c": 2.0}
        assert combine_lp_fu(LP, fu, cross_domain=True) == pytest.approx({"a": 1, "b": 0.5 * 0.75, "c": 0})

    @pytest.mark.parametrize("exclude", ["own", ["own"], {"own", "own2"}])
    def test_excluded_are_not_in_the_ranges(self, exclude):
        others = ["own"] if exclude != {"own", "own2"} else ["own", "own2"]
        lp, fu = LP | dict.fromkeys(others, 7.0), FU | dict.fromkeys(others, 0.0)
        assert combine_lp_fu(lp, fu, exclude=exclude) == combine_lp_fu(LP, FU)
        assert combine_lp_fu(LP | dict.fromkeys(others, math.nan), fu, exclude=exclude) == combine_lp_fu(LP, FU)
        if exclude == "own":  # which may lack a value
            assert combine_lp_fu(LP, fu, exclude=exclude) == combine_lp_fu(LP, FU)

    def test_all_equal(self):
        assert combine_lp_fu(dict.fromkeys("abc", 0.4), FU) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0})
        assert combine_lp_fu({"a": 0.4}, {"a": 0.4}) == {"a": 0.25}

    def test_nan_has_no_part_in_its_range(self):
        scores = combine_lp_fu(LP | {"d": 1.3}, FU | {"d": math.nan})  # LP scales to 0, 1/4, 1/2 and 1
        assert math.isnan(scores.pop("d"))
        assert scores == pytest.approx({"a": 0, "b": 0.25 * 0.5, "c": 0})
        assert all(map(math.isnan, combine_lp_fu(LP, dict.fromkeys("abc", math.nan)).values()))

    @pytest.mark.parametrize(
        ("lp", "fu", "exclude", "message"),
        [
            (LP, {"a": 1.0, "b": 2.0}, None, r"different sources \(c"),
            ({"a": 1.0}, {"b": 1.0}, None, r"different sources \(a, b"),
            (LP, FU, "d", "exclude names d"),
            (LP, FU, ["a", "b", "c"], "no candidate source"),
            ({}, {}, None, "no candidate source"),
            (LP, FU | {"a": math.inf}, None, "fu holds Inf"),
        ],
    )
    def test_bad(self, lp, fu, exclude, message):
        with pytest.raises(InputError, match=message):
            combine_lp_fu(lp, fu, exclude=exclude)
