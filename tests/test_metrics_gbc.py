"""GBC: against integrals of densities, and in its limits."""

from itertools import permutations
from math import prod

import numpy as np
import pytest
import torch
from metric_cases import draw
from scipy.integrate import quad
from scipy.stats import norm

from medtl_ext.metrics import compute_gbc

COVARIANCES = ["spherical", "diagonal"]


def overlap(first, second):
    """The integral over the real line of the square root of two normal densities' product."""
    (m, s), (n, t) = first, second
    near, wide = (m + n) / 2, abs(m - n) + 20 * max(s, t)
    return quad(lambda x: np.sqrt(norm.pdf(x, m, s) * norm.pdf(x, n, t)), near - wide, near + wide, points=[m, n])[0]


def integrated(features, labels, covariance):
    """The score by the definition: minus the Bhattacharyya coefficients, integrated numerically."""
    x, y = np.asarray(features), np.asarray(labels)
    gaussians = []
    for label in np.unique(y):
        deviations = x[y == label].std(0)
        if covariance == "spherical":
            deviations[:] = np.sqrt((deviations**2).mean())
        gaussians.append(list(zip(x[y == label].mean(0), deviations, strict=True)))
    return -sum(prod(map(overlap, a, b)) for a, b in permutations(gaussians, 2))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_integrals(covariance):
    features, labels = draw(width=3)
    features *= (torch.rand(3, 3, dtype=torch.float64) + 0.5)[labels]  # classes of different spread
    expected = integrated(features, labels, covariance)
    assert compute_gbc(features, labels, covariance=covariance).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("covariance", COVARIANCES)
class TestLimits:
    def test_far_apart_and_the_same(self, covariance):
        features, labels = draw()
        assert compute_gbc(features + 1e3 * labels[:, None], labels, covariance=covariance) == 0
        same = features[:20].repeat(3, 1), torch.arange(3).repeat_interleave(20)
        assert compute_gbc(*same, covariance=covariance).item() == pytest.approx(-6, abs=1e-12)

    def test_tiny_features_are_all_overlap(self, covariance):
        features, labels = draw()
        assert compute_gbc(features * 1e-8 + 0.1, labels, covariance=covariance).item() == pytest.approx(-6, abs=1e-6)


def test_class_of_one_sample_has_the_least_variance():
    pooled, least = (1 + 1e-4) / 2, 1e-4
    expected = -2 * np.exp(-0.5 * np.log(pooled / np.sqrt(least)))
    assert compute_gbc([[0.0], [2.0], [1.0]], [0, 0, 1]).item() == pytest.approx(expected, abs=1e-12)
