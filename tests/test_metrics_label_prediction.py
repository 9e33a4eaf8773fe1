"""Label prediction and its combination with feature update: vectors, the published table, and what must hold."""

from __future__ import annotations

import csv
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from drawing import numpy_generator, torch_generator
from scipy.stats import weightedtau
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis

from medtl_ext import InputError
from medtl_ext.metrics import label_prediction
from medtl_ext.metrics.label_prediction import LabelPrediction, combine_lp_fu, compute_label_prediction, min_max

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def draw(n=60, width=6, n_classes=3, separation=1.0):
    """Features that tell the classes apart in part."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n,), generator=generator)
    labels[:n_classes] = torch.arange(n_classes)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64) * separation
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


def nca(features, labels):
    features = np.asarray(features)
    analysis = NeighborhoodComponentsAnalysis(min(50, features.shape[1]), random_state=42)
    return analysis.fit_transform(features - features.mean(0), np.asarray(labels))


class TestReferenceVectors:
    @pytest.mark.parametrize("name", ["cls_basic", "cls_binary"])
    def test_label_prediction(self, vectors, name):
        data = vectors(name)
        value = compute_label_prediction(data["features"], data["labels"])
        assert value.item() == pytest.approx(data["lp_nca"], abs=0.02)


class TestAgainstLibrary:
    @pytest.mark.parametrize(("n", "width", "n_classes"), [(60, 6, 3), (40, 70, 2), (50, 12, 20)])
    def test_classifier(self, n, width, n_classes):
        features, labels = draw(n, width, n_classes)
        mapped = nca(features, labels)
        classifier = KNeighborsClassifier(5).fit(mapped, labels)
        column = torch.searchsorted(torch.from_numpy(classifier.classes_), labels)
        expected = classifier.predict_proba(mapped)[np.arange(n), column].mean()
        # NCA's fifty steps amplify the rounding of another order of the samples: a neighbour may change places.
        assert compute_label_prediction(features, labels).item() == pytest.approx(expected, abs=0.02)

    @pytest.mark.parametrize("n", [60, 4])
    def test_leave_one_out(self, n):
        features, labels = draw(n, 6, 2)
        mapped = nca(features, labels)
        shares = []
        for k in range(n):
            distance = np.linalg.norm(mapped - mapped[k], axis=1)
            others = [i for i in np.argsort(distance) if i != k][:5]
            shares.append(np.mean([bool(labels[i] == labels[k]) for i in others]))
        value = compute_label_prediction(features, labels, leave_one_out=True)
        assert value.item() == pytest.approx(np.mean(shares), abs=0.02)

    def test_pixels_and_ignored_ones(self):
        features, labels = draw(60, 5, 3)
        kept = labels != 2
        expected = compute_label_prediction(features[kept], labels[kept])
        pixels = features.view(4, 3, 5, 5).permute(0, 3, 1, 2)
        value = compute_label_prediction(pixels, labels.view(4, 3, 5), ignore_index=2)
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)


class TestWhatMustHold:
    def test_permutation_and_names(self):
        features, labels = draw()
        order = torch.randperm(len(labels))
        for options in ({}, {"leave_one_out": True}):
            expected = compute_label_prediction(features, labels, **options).item()
            value = compute_label_prediction(features[order], labels[order], **options)
            assert value.item() == pytest.approx(expected, abs=1e-12)
            value = compute_label_prediction(features, torch.tensor([4, 0, 9])[labels], **options)
            assert value.item() == pytest.approx(expected, abs=1e-12)

    def test_leave_one_out_is_lower(self):
        features, labels = draw(separation=0.1)
        value = compute_label_prediction(features, labels).item()
        honest = compute_label_prediction(features, labels, leave_one_out=True).item()
        # The sample itself takes the place of its fifth neighbour.
        assert max(honest, 0.2) < value <= min(honest + 0.2, 1) + 1e-12

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

    def test_separated(self):
        features, labels = draw(separation=100.0)
        assert compute_label_prediction(features, labels[:, None]).item() == 1
        # The labels say nothing: three classes by chance.
        features, _ = draw(n=300, separation=0.0)
        value = compute_label_prediction(features, torch.arange(300) % 3, leave_one_out=True)
        assert 0.2 < value.item() < 0.6

    def test_many_samples_are_drawn_by_content(self, monkeypatch):
        monkeypatch.setattr(label_prediction, "MAX_SAMPLES", 25)
        features, labels = draw()
        order = torch.randperm(len(labels))
        values = [compute_label_prediction(features, labels, seed=seed).item() for seed in range(4)]
        assert len(set(values)) > 1
        assert all(value * 5 * 25 == pytest.approx(round(value * 5 * 25)) for value in values)
        assert compute_label_prediction(features[order], labels[order], seed=1).item() == pytest.approx(values[1])

    @pytest.mark.parametrize("sizes", [[1] * 60, [30, 30]])
    def test_streaming(self, sizes):
        features, labels = draw()
        for leave_one_out in (False, True):
            total = LabelPrediction(leave_one_out=leave_one_out)
            for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
                metric = LabelPrediction()
                metric.update(part, part_labels)
                total.merge(metric)
            expected = compute_label_prediction(features, labels, leave_one_out=leave_one_out)
            assert total.compute().item() == pytest.approx(expected.item(), abs=1e-12)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_dtype(self, device):
        features, labels = draw()
        value = compute_label_prediction(features.to(device), labels)
        assert (value.device.type, value.dtype, value.ndim) == (device, torch.float64, 0)
        assert value.item() == pytest.approx(compute_label_prediction(features, labels).item(), abs=0.02)

    @pytest.mark.parametrize(
        ("features", "labels", "message"),
        [
            ([[1.0, float("nan")]] * 2, [0, 1], "features holds NaN or Inf"),
            (torch.zeros(0, 3), torch.zeros(0), "features is empty"),
            ([[1.0], [2.0]], [0, 1, 1], "target_labels has shape"),
            ([[1.0], [2.0]], [0, -1], "target_labels holds the negative label"),
        ],
    )
    def test_bad(self, features, labels, message):
        with pytest.raises(InputError, match=message):
            compute_label_prediction(features, labels)


class TestDegenerateInput:
    @pytest.mark.parametrize(
        ("change", "message", "value", "honest"),
        [
            (lambda x, y: (x, y * 0), "one class only", 1, 1),
            (lambda x, y: (x[:1], y[:1]), "one class only", 1, 1),
            (lambda x, y: (x, torch.arange(len(y))), "no two samples of one class", 0.2, 0),
            (lambda x, y: (x[:4], torch.tensor([0, 1, 1, 1])), "each other's neighbours", 2.5 / 4, 0.5),
            (lambda x, y: (x[:2], torch.tensor([3, 1])), "each other's neighbours", 0.5, 0),
        ],
        ids=["one class", "one sample", "singletons", "four samples", "two samples"],
    )
    def test_value_and_warning(self, change, message, value, honest):
        for leave_one_out, expected in ((False, value), (True, honest)):
            with pytest.warns(UserWarning, match=message):
                found = compute_label_prediction(*change(*draw()), leave_one_out=leave_one_out)
            assert found.item() == pytest.approx(expected)

    def test_constant_features(self):
        features, labels = draw()
        with pytest.warns(UserWarning, match="constant"):
            assert 0.2 <= compute_label_prediction(torch.full_like(features, 0.1), labels).item() < 0.9

    def test_finite_without_a_warning(self):
        features, labels = draw()
        lonely = torch.where(torch.arange(60) == 0, 3, labels)
        duplicates = features[:4].repeat(15, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in [
                draw(12, 300),
                (features, lonely),
                (features * 1e8, labels),
                (features * 1e-8, labels),
                (duplicates, labels),
                (features[:, :1], labels),
                (features[:6], torch.tensor([0, 1, 1, 1, 1, 1])),
            ]:
                assert 0.2 <= compute_label_prediction(x, y).item() <= 1


def number(text):
    return float(text) if text else math.nan


class TestPublishedTable:
    """DatasetTr's Table 2: weighted Kendall of the combination with the AUC after fine-tuning, over 14 sources."""

    def test_ours(self, shared_data):
        with open(shared_data / "papers" / "004_scores_dataset.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        with open(shared_data / "papers" / "004_table2_dataset.csv", newline="") as file:
            printed = {row["target"]: float(row["wtau"]) for row in csv.DictReader(file) if row["method"] == "Ours"}
        assert len(printed) == 11
        found = {}
        for target in printed:
            name = f"{target.lower()}mnist"
            lp, fu, auc = (
                {row["source"]: number(row[column]) for row in rows if row["target"] == name}
                for column in ("lp", "fu", "auc")
            )
            assert len(lp) == 15
            scores = combine_lp_fu(lp, fu, exclude=name)
            assert list(scores) == [source for source in lp if source != name]
            found[target] = weightedtau([scores[source] for source in scores], [auc[source] for source in scores])[0]
        assert {target: round(value, 2) for target, value in found.items()} == printed


LP = {"a": 0.5, "b": 0.7, "c": 0.9}
FU = {"a": 2.0, "b": 1.5, "c": 1.0}


class TestCombine:
    def test_product_of_the_scaled(self):
        assert combine_lp_fu(LP, FU) == pytest.approx({"a": 0, "b": 0.25, "c": 0})
        assert combine_lp_fu(LP, {"a": 1.0, "b": 1.5, "c": 2.0}) == pytest.approx({"a": 0, "b": 0.25, "c": 1})

    def test_cross_domain(self):
        fu = {"a": 1.0, "b": 1.25, "c": 2.0}
        assert combine_lp_fu(LP, fu, cross_domain=True) == pytest.approx({"a": 1, "b": 0.5 * 0.75, "c": 0})

    @pytest.mark.parametrize("exclude", ["own", ["own"], {"own", "own2"}])
    def test_excluded_are_not_in_the_ranges(self, exclude):
        lp, fu = LP | {"own": 1.0, "own2": 7.0}, FU | {"own": 0.0, "own2": 0.0}
        if exclude != {"own", "own2"}:
            del lp["own2"], fu["own2"]
        assert combine_lp_fu(lp, fu, exclude=exclude) == combine_lp_fu(LP, FU)

    def test_an_excluded_source_may_lack_a_value(self):
        expected = combine_lp_fu(LP, FU)
        assert combine_lp_fu(LP, FU | {"own": 0.3}, exclude="own") == expected
        assert combine_lp_fu(LP | {"own": math.nan}, FU | {"own": 0.3}, exclude="own") == expected

    def test_order_scale_and_shift_change_nothing(self):
        generator = numpy_generator()
        lp, fu = (dict(zip("abcdef", generator.random(6), strict=True)) for _ in range(2))
        expected = combine_lp_fu(lp, fu)
        turned = combine_lp_fu(dict(reversed(lp.items())), {name: 3 * value - 7 for name, value in fu.items()})
        assert list(turned) == list(reversed(lp))
        assert {name: turned[name] for name in expected} == pytest.approx(expected)
        assert all(0 <= value <= 1 for value in expected.values())

    def test_all_equal(self):
        assert combine_lp_fu(dict.fromkeys("abc", 0.4), FU) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0})
        assert combine_lp_fu({"a": 0.4}, {"a": 0.4}) == {"a": 0.25}

    def test_nan(self):
        scores = combine_lp_fu(LP | {"d": 9.9}, FU | {"d": math.nan})
        assert math.isnan(scores["d"])
        lp_scaled = min_max(LP | {"d": 9.9})
        fu_scaled = min_max(FU)
        for name in LP:
            assert scores[name] == pytest.approx(lp_scaled[name] * fu_scaled[name])
        assert all(map(math.isnan, combine_lp_fu(LP, dict.fromkeys("abc", math.nan)).values()))

    def test_tensors(self):
        lp = {name: torch.tensor(value, dtype=torch.float64) for name, value in LP.items()}
        scores = combine_lp_fu(lp, FU)
        assert scores == combine_lp_fu(LP, FU)
        assert {type(value) for value in scores.values()} == {float}

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((LP, {"a": 1.0, "b": 2.0}), {}, "different sources \\(c"),
            (({"a": 1.0}, {"b": 1.0}), {}, "different sources \\(a, b"),
            ((LP, FU), {"exclude": "d"}, "exclude names d"),
            ((LP, FU), {"exclude": ["a", "b", "c"]}, "no candidate source"),
            (({}, {}), {}, "no candidate source"),
            ((LP, FU | {"a": math.inf}), {}, "fu holds Inf"),
        ],
    )
    def test_bad(self, arguments, options, message):
        with pytest.raises(InputError, match=message):
            combine_lp_fu(*arguments, **options)

    def test_min_max(self):
        for values in itertools.permutations([1.0, 2.0, 5.0]):
            scaled = min_max(dict(zip("abc", values, strict=True)))
            assert scaled == {name: (value - 1) / 4 for name, value in zip("abc", values, strict=True)}
