"""SFDA: against scikit-learn's discriminant analysis, in its limits, and patient by patient."""

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from medtl_ext import InputError
from medtl_ext.metrics import SFDA, compute_sfda


def power_iteration(matrix):
    vector = matrix.sum(1)
    for _ in range(6):
        vector = matrix @ vector / np.linalg.norm(vector)
    return np.linalg.norm(vector)


def by_scikit_learn(features, labels, largest=power_iteration):
    """The score with scikit-learn's two shrunk discriminants, mixing one sample after the other."""
    x, y = np.asarray(features), np.unique(labels, return_inverse=True)[1]
    means = np.stack([x[y == label].mean(0) for label in range(y.max() + 1)])
    within = (x - means[y]).T @ (x - means[y]) / len(y)
    shrinkage = max(np.exp(-5 * largest(within)), 1e-10)

    def posteriors(rows):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, y)
        return model.predict_proba(rows)

    weights = np.exp(posteriors(x))
    mixed = x.copy()
    for i, label in enumerate(y):
        share = weights[i, label] / weights[i].sum()
        mixed[i] = share * x[i] + (1 - share) * np.delete(means, label, axis=0).mean(0)
    return posteriors(mixed)[np.arange(len(y)), y].mean()


def agree(features, labels, expected, tolerance=1e-8):
    for value in (compute_sfda(features, labels), streamed(SFDA(), features, labels, 20)):
        assert value.item() == pytest.approx(expected, abs=tolerance)


class TestDiscriminantsOfScikitLearn:
    @pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 10.0])
    @pytest.mark.parametrize("n_classes", [2, 3, 5])
    def test_function_and_class(self, n_classes, spread):
        features, labels = draw(n_classes=n_classes)
        agree(features * spread, labels, by_scikit_learn(features * spread, labels))

    def test_several_blocks_of_samples(self):
        features, labels = draw(n=5000)
        expected = by_scikit_learn(features, labels)
        assert compute_sfda(features, labels).item() == pytest.approx(expected, abs=1e-8)
        assert streamed(SFDA(), features, labels, 300 * [1] + [4700]).item() == pytest.approx(expected, abs=1e-8)

    def test_probabilities_whose_covariance_has_no_row_sums(self):
        features, labels = draw()
        probs = features.softmax(1)
        agree(probs, labels, by_scikit_learn(probs, labels, lambda within: np.linalg.eigvalsh(within)[-1]))

    @pytest.mark.filterwarnings("ignore:Only one sample available")
    def test_class_of_one_sample(self):
        features, labels = draw(n_classes=2)
        labels[0] = 2
        agree(features, labels, by_scikit_learn(features, labels))


class TestLimits:
    @pytest.mark.parametrize("scale", [1.0, 1e8, 1e-8])
    def test_classes_that_are_points(self, scale):
        labels = torch.arange(60) % 3
        agree(scale * (1 + torch.eye(3)[labels]), labels, 1, 1e-9)
        features, labels = draw()
        assert compute_sfda(features + 1e12 * labels[:, None], labels).item() == pytest.approx(1)


class TestPatients:
    def fed(self, **options):
        features, _ = draw((4,), n=12)
        labels = (torch.arange(12)[:, None] // 3 + torch.arange(4)) % 3  # five of each class or more for each patient
        metric, names = SFDA(**options), ["bob", "ann", "cid"] * 4
        for part in (slice(0, 5), slice(5, 12)):
            metric.update(features[part], labels[part], names[part])
        return metric, features, labels, names

    def test_resampled(self):
        metric, features, labels, _ = self.fed()
        assert metric.patients == ("ann", "bob", "cid")
        assert metric.resampled([1, 1, 1]).item() == pytest.approx(compute_sfda(features, labels).item(), abs=1e-9)
        alone = metric.resampled(np.eye(3, dtype=int))
        assert metric.resampled([2, 0, 5]).item() == pytest.approx((2 * alone[0] + 5 * alone[2]).item() / 7, abs=1e-12)

    def test_a_patients_own_share(self):
        metric, features, labels, names = self.fed()
        own = torch.tensor([name == "cid" for name in names])
        # How the others are divided into patients and batches makes no difference.
        divided = SFDA()
        for kept, name in ((own, "cid"), (~own, "rest")):
            divided.update(features[kept], labels[kept], [name] * int(kept.sum()))
        assert divided.resampled([1, 0]).item() == pytest.approx(metric.resampled([0, 0, 1]).item(), abs=1e-12)
        assert divided.resampled([1, 1]).item() == pytest.approx(compute_sfda(features, labels).item(), abs=1e-12)

    def test_nothing_is_kept_from_before_an_update(self):
        metric, features, labels, _ = self.fed()
        before = metric.resampled([1, 0, 0])
        metric.update(features[:1] + 9, labels[:1], ["dan"])
        assert metric.patients == ("ann", "bob", "cid", "dan")
        assert metric.resampled([1, 0, 0, 0]) != before
        other = SFDA()
        other.update(features[:1] - 9, labels[:1], ["eve"])
        metric.merge(other)
        assert metric.patients == ("ann", "bob", "cid", "dan", "eve")
        metric.reset()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.resampled([1])

    def test_counts_that_do_not_fit(self):
        metric, *_ = self.fed()
        with pytest.raises(InputError, match="counts"):
            metric.resampled([1, 1])

    def test_drawn_pixels(self):
        metric, *_ = self.fed(pixels=3)
        samples = metric.samples()
        assert len(samples.labels) == 27
        expected = compute_sfda(samples.features, samples.labels).item()
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)
        assert metric.resampled([1, 1, 1]).item() == pytest.approx(expected, abs=1e-12)
        other, *_ = self.fed(pixels=3)
        total = SFDA(pixels="auto")  # as a worker's that has not seen a grid yet
        total.merge(metric)
        total.merge(other)
        assert len(total.samples().labels) == 27
        assert 0 < total.compute() < 1
