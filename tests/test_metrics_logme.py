"""LogME: against reference vectors, against maximising the density of all samples, and against what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawing import torch_generator
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from medtl_ext import InputError
from medtl_ext.metrics import LogME, compute_logme
from medtl_ext.metrics.logme import _spectrum


def draw(grid=(), *, n=60, width=6, n_classes=3, signal=1.0):
    """Random features that depend on the labels."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    labels.view(-1)[:n_classes] = torch.arange(n_classes)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    features = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64) + signal * centres[labels]
    return features.movedim(-1, 1), labels


def log_density(features, target, alpha, beta):
    """Density of all N targets at once: the weights are integrated out by adding covariances."""
    covariance = np.eye(len(target)) / beta + features @ features.T / alpha
    return multivariate_normal(np.zeros(len(target)), covariance).logpdf(target)


def dense(features, labels):
    """The score from scikit-learn's alpha and beta and the density of N samples, without any eigenvalue of F'F."""
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    evidences = []
    for label in np.unique(y):
        target = (y == label).astype(float)
        flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
        model = BayesianRidge(fit_intercept=False, tol=1e-10, max_iter=5000, **flat).fit(x, target)
        evidences.append(log_density(x, target, model.lambda_, model.alpha_) / len(y))
    return np.mean(evidences)


def streamed(metric, features, labels, sizes):
    for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


@pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
def test_reference_vectors(vectors, name):
    data = vectors(name)
    score = compute_logme(data["features"], data["labels"])
    # These stop when t changes by less than a hundredth.
    assert score.item() == pytest.approx(data["logme"], abs=1e-5)
    assert score.item() == pytest.approx(data["indep_logme"], abs=1e-5)


class TestDensityOfAllSamples:
    @pytest.mark.parametrize(
        ("n", "width", "signal"),
        [(60, 6, 1.0), (60, 6, 0.3), (60, 1, 1.0), (60, 60, 1.0), (30, 100, 1.0), (30, 100, 0.5)],
    )
    def test_function_and_class(self, n, width, signal):
        features, labels = draw(n=n, width=width, signal=signal)
        expected = dense(features, labels)
        assert compute_logme(features, labels).item() == pytest.approx(expected, abs=1e-7)
        assert streamed(LogME(), features, labels, n // 2).item() == pytest.approx(expected, abs=1e-7)

    def test_pixels(self):
        features, labels = draw((2, 3), n=10)
        expected = dense(features.movedim(1, -1).reshape(-1, 6), labels.flatten())
        assert compute_logme(features, labels).item() == pytest.approx(expected, abs=1e-7)

    @pytest.mark.parametrize(("n", "width"), [(60, 6), (30, 100)])
    def test_no_alpha_and_beta_are_better(self, n, width):
        features, labels = draw(n=n, width=width)
        tried = [(alpha, beta) for alpha in np.geomspace(0.1, 1e3, 15) for beta in np.geomspace(0.5, 1e4, 15)]
        targets = np.equal.outer(range(3), labels.numpy()).astype(float)
        best = np.mean([max(log_density(features.numpy(), y, *pair) for pair in tried) for y in targets]) / n
        assert best <= compute_logme(features, labels).item() + 1e-9

    @pytest.mark.parametrize("width", [1, 2, 3, 40])
    def test_spectrum(self, width):
        rows = torch.randn(2 * width, width, dtype=torch.float64)
        vectors = torch.randn(5, width, dtype=torch.float64)
        before = vectors.clone()
        eigenvalues, squares = _spectrum(rows.T @ rows, vectors)
        expected, directions = np.linalg.eigh((rows.T @ rows).numpy())
        np.testing.assert_allclose(eigenvalues, expected, atol=1e-9)
        np.testing.assert_allclose(squares, (vectors.numpy() @ directions) ** 2, atol=1e-9)
        assert torch.equal(vectors, before)


class TestInvariants:
    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    @pytest.mark.parametrize(("n", "width"), [(60, 6), (30, 30), (20, 90)])
    def test_scale(self, scale, n, width):
        features, labels = draw(n=n, width=width)
        expected = compute_logme(features, labels).item()
        assert compute_logme(features * scale, labels).item() == pytest.approx(expected, abs=1e-7)
        assert streamed(LogME(), features * scale, labels, n // 2).item() == pytest.approx(expected, abs=1e-7)

    def test_scale_where_the_evidence_has_several_maxima(self):
        # From far away the iteration would climb another one than from near by.
        for _ in range(30):
            features, labels = draw(n=12, width=12, signal=0)
            features = features * torch.randn(12).mul(1.5).exp()
            expected = compute_logme(features, labels).item()
            for scale in (1e8, 1e-8):
                assert compute_logme(features * scale, labels).item() == pytest.approx(expected, abs=1e-7)

    def test_rotation_and_more_features_of_zeros(self):
        features, labels = draw()
        expected = compute_logme(features, labels).item()
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        assert compute_logme(features @ rotation, labels).item() == pytest.approx(expected, abs=1e-9)
        for zeros in (2, 200):
            more = torch.cat([features, features.new_zeros(60, zeros)], 1)
            assert compute_logme(more, labels).item() == pytest.approx(expected, abs=1e-9)

    def test_names_of_classes_and_order_of_samples(self):
        features, labels = draw()
        expected = compute_logme(features, labels).item()
        order = torch.randperm(60)
        assert compute_logme(features[order], labels[order]).item() == pytest.approx(expected, abs=1e-9)
        renamed = torch.tensor([8, 0, 3])[labels]
        assert compute_logme(features, renamed).item() == pytest.approx(expected, abs=1e-12)
        assert streamed(LogME(), features, renamed, 20).item() == pytest.approx(expected, abs=1e-9)

    def test_features_that_tell_the_classes_are_better(self):
        features, labels = draw(signal=0)
        centres = torch.randn(3, 6, dtype=torch.float64)
        scores = [compute_logme(features + far * centres[labels], labels).item() for far in (0, 2, 5, 20)]
        assert scores == sorted(scores)

    @pytest.mark.parametrize("width", [6, 90])
    def test_any_split_in_any_order(self, width):
        features, labels = draw((2,), n=40, width=width)
        labels[:10] %= 2  # the first batches have seen fewer classes
        expected = compute_logme(features, labels).item()
        for sizes in ([1] * 40, [13, 27]):
            assert streamed(LogME(), features, labels, sizes).item() == pytest.approx(expected, abs=1e-9)
        parts = [LogME() for _ in range(3)]
        for metric, x, y in zip(parts, features.split(15), labels.split(15), strict=True):
            metric.update(x, y)
        total = LogME()
        for k in torch.randperm(3).tolist():
            total.merge(parts[k])
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)

    def test_ignored_samples_might_as_well_not_be_there(self):
        features, labels = draw()
        labels[::4] = 255
        expected = compute_logme(features[labels < 255], labels[labels < 255]).item()
        assert compute_logme(features, labels, ignore_index=255).item() == pytest.approx(expected, abs=1e-9)
        assert streamed(LogME(ignore_index=255), features, labels, 20).item() == pytest.approx(expected, abs=1e-9)


class TestDegenerate:
    def test_one_class(self):
        features, labels = draw()
        metric = LogME()
        metric.update(features, labels * 0 + 4)
        for compute in (metric.compute, lambda: compute_logme(features, labels * 0)):
            with pytest.warns(UserWarning, match="one class only"):
                assert compute().isfinite()

    def test_zeros_leave_noise_alone(self):
        labels = torch.tensor([0, 0, 1, 1, 1, 1])
        expected = np.mean([log_density(np.zeros((6, 1)), np.eye(6)[0] * np.sqrt(k), 1, 6 / k) / 6 for k in (2, 4)])
        for width in (1, 3, 10):
            features = torch.zeros(6, width)
            assert compute_logme(features, labels).item() == pytest.approx(expected, abs=1e-9)
            assert streamed(LogME(), features, labels, 3).item() == pytest.approx(expected, abs=1e-9)

    def test_a_class_without_any_correlation(self):
        # The features of class 0 are all zero, so that its alpha is infinite.
        features, labels = draw()
        features = features * (labels > 0)[:, None]
        score = compute_logme(features, labels)
        assert score.isfinite()
        assert streamed(LogME(), features, labels, 20).item() == pytest.approx(score.item(), abs=1e-9)

    @pytest.mark.parametrize("constant", [0.1, 1e8])
    def test_constant_features(self, constant):
        _, labels = draw()
        ones = compute_logme(torch.ones(60, 1), labels).item()
        assert compute_logme(torch.full((60, 4), constant), labels).item() == pytest.approx(ones, abs=1e-6)

    def test_perfect_separation(self):
        labels = torch.arange(60) % 3
        for scale in (1, 1e8, 1e-8):
            score = compute_logme(torch.eye(3)[labels] * scale, labels)
            assert 1 < score < 10  # without a least error there is no bound
            assert streamed(LogME(), torch.eye(3)[labels] * scale, labels, 20).item() == pytest.approx(score.item())

    def test_class_of_one_sample_and_one_sample(self):
        features, labels = draw()
        labels[labels == 2] = 1
        labels[0] = 2
        assert compute_logme(features, labels).item() == pytest.approx(dense(features, labels), abs=1e-6)
        with pytest.warns(UserWarning, match="one class only"):
            assert compute_logme([[1.0, 2.0]], [0]).isfinite()


class TestInputs:
    def test_nothing(self):
        with pytest.raises(InputError, match="has seen no sample"):
            LogME().compute()
        with pytest.raises(InputError, match="expected at least 1"):
            compute_logme([[1.0], [2.0]], [3, 3], ignore_index=3)
