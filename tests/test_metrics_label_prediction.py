"""Label prediction and its combination with feature update: against scikit-learn, and in their limits."""

import math

import numpy as np
import pytest
import torch
from metric_cases import draw
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis

from medtl_ext import InputError
from medtl_ext.metrics import combine_lp_fu, compute_label_prediction

LP = {"a": 0.5, "b": 0.7, "c": 0.9}
FU = {"a": 2.0, "b": 1.5, "c": 1.0}


def nca(features, labels):
    features = np.asarray(features)
    analysis = NeighborhoodComponentsAnalysis(min(50, features.shape[1]), random_state=42)
    return analysis.fit_transform(features - features.mean(0), np.asarray(labels))


class TestAgainstLibrary:
    """NCA's fifty steps amplify the rounding of another order of the samples: a neighbour may change places."""

    @pytest.mark.parametrize(("n", "width", "n_classes"), [(60, 6, 3), (40, 70, 2), (50, 12, 20)])
    def test_classifier(self, n, width, n_classes):
        features, labels = draw(n=n, width=width, n_classes=n_classes)
        mapped = nca(features, labels)
        expected = KNeighborsClassifier(5).fit(mapped, labels).predict_proba(mapped)[np.arange(n), labels].mean()
        assert compute_label_prediction(features, labels).item() == pytest.approx(expected, abs=0.02)

    @pytest.mark.parametrize("n", [60, 4])
    def test_leave_one_out(self, n):
        features, labels = draw(n=n, width=6, n_classes=2)
        mapped = nca(features, labels)
        shares = []
        for k in range(n):
            distance = np.linalg.norm(mapped - mapped[k], axis=1)
            others = [i for i in np.argsort(distance) if i != k][:5]
            shares.append(np.mean([bool(labels[i] == labels[k]) for i in others]))
        value = compute_label_prediction(features, labels, leave_one_out=True)
        assert value.item() == pytest.approx(np.mean(shares), abs=0.02)


class TestLimits:
    @pytest.mark.parametrize("width", [1, 3])
    def test_more_classes_than_dimensions(self, width):
        # NCA then starts from discriminant directions, of which there are none when classes have collapsed to points,
        # or have one mean.
        points = torch.randn(8, width)
        labels = torch.arange(8).repeat(6)
        assert compute_label_prediction(points[labels], labels).item() == 1
        assert 0.2 <= compute_label_prediction(points.repeat_interleave(8, 0), torch.arange(64) % 8).item() < 0.6

    def test_duplicates_do_not_hide_a_sample_from_itself(self):
        features = torch.zeros(20, 2)
        features[10:, 0] = 1.0
        labels = torch.arange(20) % 10  # ten classes, each once in either heap of ten
        assert compute_label_prediction(features, labels).item() >= 0.2

    def test_many_samples_are_drawn_by_content(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.metrics.label_prediction.MAX_SAMPLES", 25)
        features, labels = draw()
        order = torch.randperm(len(labels))
        values = [compute_label_prediction(features, labels, seed=seed).item() for seed in range(4)]
        assert len(set(values)) > 1
        assert all(value * 5 * 25 == pytest.approx(round(value * 5 * 25)) for value in values)
        assert compute_label_prediction(features[order], labels[order], seed=1).item() == pytest.approx(values[1])

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
                found = compute_label_prediction(*change(*draw()), leave_one_out=leave_one_out)
            assert found.item() == pytest.approx(expected)


class TestCombine:
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
