"""LogME: against maximising the density of all samples, and in its limits."""

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from medtl_ext.metrics import LogME, compute_logme


def log_density(features, target, alpha, beta):
    """Density of all N targets at once: the weights are integrated out by adding covariances."""
    covariance = np.eye(len(target)) / beta + features @ features.T / alpha
    return multivariate_normal(np.zeros(len(target)), covariance).logpdf(target)


def dense(features, labels):
    """The score from scikit-learn's alpha and beta and the density of N samples, without any eigenvalue of F'F."""
    x, y = np.asarray(features), np.asarray(labels)
    evidences = []
    for label in np.unique(y):
        target = (y == label).astype(float)
        flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
        model = BayesianRidge(fit_intercept=False, tol=1e-10, max_iter=5000, **flat).fit(x, target)
        evidences.append(log_density(x, target, model.lambda_, model.alpha_) / len(y))
    return np.mean(evidences)


def both(features, labels):
    yield compute_logme(features, labels).item()
    yield streamed(LogME(), features, labels, 7).item()


class TestDensityOfAllSamples:
    @pytest.mark.parametrize(
        ("n", "width", "signal"),
        [(60, 6, 1), (60, 6, 0.3), (60, 1, 1), (60, 2, 1), (60, 3, 1), (60, 60, 1), (30, 100, 1), (30, 100, 0.5)],
    )
    def test_function_and_class(self, n, width, signal):
        features, labels = draw(n=n, width=width, signal=signal)
        expected = dense(features, labels)
        for value in both(features, labels):
            assert value == pytest.approx(expected, abs=1e-7)

    def test_class_of_one_sample(self):
        features, labels = draw(n_classes=2)
        labels[0] = 2
        assert compute_logme(features, labels).item() == pytest.approx(dense(features, labels), abs=1e-6)


class TestScale:
    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    @pytest.mark.parametrize(("n", "width"), [(30, 30), (20, 90)])
    def test_with_few_samples(self, scale, n, width):
        features, labels = draw(n=n, width=width)
        expected = compute_logme(features, labels).item()
        for value in both(features * scale, labels):
            assert value == pytest.approx(expected, abs=1e-7)

    def test_where_the_evidence_has_several_maxima(self):
        # From far away the iteration would climb another one than from near by.
        for _ in range(30):
            features, labels = draw(n=12, width=12, signal=0)
            features = features * torch.randn(12).mul(1.5).exp()
            expected = compute_logme(features, labels).item()
            for scale in (1e8, 1e-8):  # Newton's last step may stop a millionth apart
                assert compute_logme(features * scale, labels).item() == pytest.approx(expected, abs=2e-6)


class TestLimits:
    @pytest.mark.parametrize("width", [1, 3, 10])
    def test_zeros_leave_noise_alone(self, width):
        labels = torch.tensor([0, 0, 1, 1, 1, 1])
        expected = np.mean([log_density(np.zeros((6, 1)), np.eye(6)[0] * np.sqrt(k), 1, 6 / k) / 6 for k in (2, 4)])
        for value in both(torch.zeros(6, width), labels):
            assert value == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("constant", [0.1, 1e8])
    def test_constant_features(self, constant):
        _, labels = draw()
        ones = compute_logme(torch.ones(60, 1), labels).item()
        assert compute_logme(torch.full((60, 4), constant), labels).item() == pytest.approx(ones, abs=1e-6)

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
