"""GBC: against reference vectors, against integrals of densities, and against what must hold."""

from __future__ import annotations

from itertools import permutations
from math import prod

import numpy as np
import pytest
import torch
from drawing import torch_generator
from scipy.integrate import quad
from scipy.stats import norm

from medtl_ext import InputError
from medtl_ext.metrics import GBC, compute_gbc

COVARIANCES = ["spherical", "diagonal"]


def draw(grid=(), *, n=60, width=3, n_classes=3):
    """Random features that depend on the labels."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    labels.view(-1)[: 2 * n_classes] = torch.arange(2 * n_classes) % n_classes
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    spread = torch.rand(n_classes, width, generator=generator, dtype=torch.float64) + 0.5
    features = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64) * spread[labels]
    return (features + centres[labels]).movedim(-1, 1), labels


def overlap(first, second):
    """The integral over the real line of the square root of two normal densities' product."""
    (m, s), (n, t) = first, second
    near, wide = (m + n) / 2, abs(m - n) + 20 * max(s, t)
    return quad(lambda x: np.sqrt(norm.pdf(x, m, s) * norm.pdf(x, n, t)), near - wide, near + wide, points=[m, n])[0]


def integrated(features, labels, covariance):
    """The score by the definition: minus the Bhattacharyya coefficients, integrated numerically."""
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    gaussians = []
    for label in np.unique(y):
        deviations = x[y == label].std(0)
        if covariance == "spherical":
            deviations[:] = np.sqrt((deviations**2).mean())
        gaussians.append(list(zip(x[y == label].mean(0), deviations, strict=True)))
    return -sum(prod(map(overlap, a, b)) for a, b in permutations(gaussians, 2))


def streamed(metric, features, labels, sizes):
    for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


@pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
@pytest.mark.parametrize(
    ("covariance", "key"), [("spherical", "gbc_spherical_fulllogdet"), ("diagonal", "gbc_diagonal")]
)
def test_reference_vectors(vectors, name, covariance, key):
    data = vectors(name)
    score = compute_gbc(data["features"], data["labels"], covariance=covariance)
    assert score.item() == pytest.approx(data[key], abs=1e-11)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("grid", [(), (2, 3)])
def test_integrals(covariance, grid):
    features, labels = draw(grid)
    expected = integrated(features.movedim(1, -1).reshape(-1, 3), labels.flatten(), covariance)
    assert compute_gbc(features, labels, covariance=covariance).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("covariance", COVARIANCES)
class TestInvariants:
    def test_bounds(self, covariance):
        features, labels = draw()
        assert -6 <= compute_gbc(features, labels, covariance=covariance) <= 0
        assert compute_gbc(features + 1e3 * labels[:, None], labels, covariance=covariance) == 0
        same = features[:20].repeat(3, 1), torch.arange(3).repeat_interleave(20)
        assert compute_gbc(*same, covariance=covariance).item() == pytest.approx(-6, abs=1e-12)

    def test_farther_apart_is_better(self, covariance):
        features, labels = draw()
        means = torch.stack([features[labels == label].mean(0) for label in range(3)])
        scores = [
            compute_gbc(features + far * means[labels], labels, covariance=covariance).item() for far in (0, 0.5, 1, 2)
        ]
        assert scores == sorted(scores)

    def test_shift_scale_and_reflection(self, covariance):
        features, labels = draw()
        expected = compute_gbc(features, labels, covariance=covariance).item()
        for moved in (features + 100, features * 1e8, -features, features.flip(1)):
            assert compute_gbc(moved, labels, covariance=covariance).item() == pytest.approx(expected, abs=1e-9)

    def test_names_of_classes_order_and_number_of_samples(self, covariance):
        features, labels = draw()
        expected = compute_gbc(features, labels, covariance=covariance).item()
        order = torch.randperm(60)
        assert compute_gbc(features[order], labels[order], covariance=covariance).item() == pytest.approx(expected)
        renamed = torch.tensor([8, 0, 3])[labels]
        assert compute_gbc(features, renamed, covariance=covariance).item() == pytest.approx(expected)
        twice = features.repeat(2, 1), labels.repeat(2)
        assert compute_gbc(*twice, covariance=covariance).item() == pytest.approx(expected)

    def test_any_split_in_any_order(self, covariance):
        features, labels = draw((2, 2))
        labels[:10] %= 2  # the first batches have seen fewer classes
        expected = compute_gbc(features, labels, covariance=covariance).item()
        for scale in (1, 1e8):
            for sizes in ([1] * 60, [13, 47]):
                score = streamed(GBC(covariance=covariance), features * scale, labels, sizes)
                assert score.item() == pytest.approx(expected, abs=1e-9)
        parts = [GBC(covariance=covariance) for _ in range(3)]
        for metric, x, y in zip(parts, features.split(25), labels.split(25), strict=True):
            metric.update(x, y)
        total = GBC(covariance=covariance)
        for k in torch.randperm(3).tolist():
            total.merge(parts[k])
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)

    def test_ignored_samples_might_as_well_not_be_there(self, covariance):
        features, labels = draw()
        labels[::4] = 255
        expected = compute_gbc(features[labels < 255], labels[labels < 255], covariance=covariance)
        assert compute_gbc(features, labels, covariance=covariance, ignore_index=255).item() == pytest.approx(
            expected.item()
        )


class TestDegenerate:
    def test_one_class(self):
        features, labels = draw()
        metric = GBC()
        metric.update(features, labels * 0 + 4)
        for compute in (metric.compute, lambda: compute_gbc(features, labels * 0)):
            with pytest.warns(UserWarning, match="one class only"):
                assert compute() == 0

    @pytest.mark.parametrize("covariance", COVARIANCES)
    @pytest.mark.parametrize("scale", [0.0, 1e-8])
    def test_constant_and_tiny_features_are_all_overlap(self, covariance, scale):
        features, labels = draw()
        score = compute_gbc(features * scale + 0.1, labels, covariance=covariance)
        assert score.item() == pytest.approx(-6, abs=1e-6)

    def test_class_of_one_sample_has_the_least_variance(self):
        features = torch.tensor([[0.0], [2.0], [1.0]])
        pooled, least = (1 + 1e-4) / 2, 1e-4
        expected = -2 * np.exp(-0.5 * np.log(pooled / np.sqrt(least)))
        assert compute_gbc(features, [0, 0, 1]).item() == pytest.approx(expected, abs=1e-12)

    def test_more_dimensions_than_samples(self):
        features, labels = draw(n=9, width=400)
        assert torch.isfinite(compute_gbc(features, labels))


class TestInputs:
    def test_one_sample_and_none(self):
        metric = GBC()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.compute()
        metric.update([[1.0]], [0])
        for compute in (metric.compute, lambda: compute_gbc([[1.0]], [0])):
            with pytest.raises(InputError, match="expected at least 2"):
                compute()

    def test_covariance_by_a_wrong_name(self):
        for make in (GBC, lambda covariance: compute_gbc([[1.0], [2.0]], [0, 1], covariance=covariance)):
            with pytest.raises(InputError, match="did you mean 'diagonal'"):
                make(covariance="diag")
