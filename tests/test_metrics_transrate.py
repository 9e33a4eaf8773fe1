"""TransRate: against reference vectors, against singular values, and against what must hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from drawing import torch_generator

from medtl_ext import InputError
from medtl_ext.metrics import TransRate, compute_transrate


def draw(grid=(), *, n=60, width=5, n_classes=3, balanced=False):
    """Random features that depend on the labels."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    if balanced:
        labels = torch.arange(n) % n_classes
    labels.view(-1)[:n_classes] = torch.arange(n_classes)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    features = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64) + centres[labels]
    return features.movedim(-1, 1), labels


def by_singular_values(features, labels, eps=1e-4):
    """The score from the singular values of the N x D matrices, which see no D x D matrix."""
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    x = x - x.mean(0)

    def rate(rows):
        return 0.5 * np.log1p(np.linalg.svd(rows, compute_uv=False) ** 2 / (len(rows) * eps)).sum()

    return rate(x) - np.mean([rate(x[y == label]) for label in np.unique(y)])


def streamed(metric, features, labels, sizes):
    for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


@pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
def test_reference_vectors(vectors, name):
    data = vectors(name)
    score = compute_transrate(data["features"], data["labels"])
    assert score.item() == pytest.approx(data["transrate_tllib"], abs=1e-9)


class TestSingularValues:
    @pytest.mark.parametrize("grid", [(), (2, 3)])
    @pytest.mark.parametrize("eps", [1e-4, 1.0])
    @pytest.mark.parametrize("width", [1, 5, 25])
    def test_function_and_class(self, grid, eps, width):
        features, labels = draw(grid, width=width)
        expected = by_singular_values(features.movedim(1, -1).reshape(-1, width), labels.flatten(), eps)
        assert compute_transrate(features, labels, eps=eps).item() == pytest.approx(expected, abs=1e-9)
        assert streamed(TransRate(eps=eps), features, labels, 20).item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("scale", [1e8, 1.0, 1e-8])
    @pytest.mark.parametrize(("n", "width"), [(60, 5), (20, 90)])
    def test_any_scale_with_and_without_full_rank(self, scale, n, width):
        features, labels = draw(n=n, width=width)
        expected = by_singular_values(features * scale, labels)
        for score in (
            compute_transrate(features * scale, labels),
            streamed(TransRate(), features * scale, labels, 7 * [n // 7] + [n % 7]),
        ):
            assert score.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


class TestInvariants:
    def test_between_zero_and_the_rate_for_balanced_classes(self):
        features, labels = draw(balanced=True)
        centred = features - features.mean(0)
        rate = 0.5 * torch.logdet(torch.eye(5) + centred.T @ centred / (60 * 1e-4))
        assert 0 <= compute_transrate(features, labels) <= rate
        assert compute_transrate(features, torch.arange(60) % 2) > -1e-9

    def test_shift_rotation_and_scale_with_eps(self):
        features, labels = draw()
        expected = compute_transrate(features, labels).item()
        rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
        assert compute_transrate(features @ rotation + 10, labels).item() == pytest.approx(expected, abs=1e-9)
        assert compute_transrate(3 * features, labels, eps=9e-4).item() == pytest.approx(expected, abs=1e-9)

    def test_names_of_classes_order_and_number_of_samples(self):
        features, labels = draw()
        expected = compute_transrate(features, labels).item()
        order = torch.randperm(60)
        assert compute_transrate(features[order], labels[order]).item() == pytest.approx(expected, abs=1e-9)
        renamed = torch.tensor([8, 0, 3])[labels]
        assert compute_transrate(features, renamed).item() == pytest.approx(expected, abs=1e-9)
        assert streamed(TransRate(), features, renamed, 20).item() == pytest.approx(expected, abs=1e-9)
        assert compute_transrate(features.repeat(2, 1), labels.repeat(2)).item() == pytest.approx(expected, abs=1e-9)

    def test_any_split_in_any_order(self):
        features, labels = draw((2, 2))
        labels[:10] %= 2  # the first batches have seen fewer classes
        expected = compute_transrate(features, labels).item()
        for sizes in ([1] * 60, [13, 47]):
            assert streamed(TransRate(), features, labels, sizes).item() == pytest.approx(expected, abs=1e-9)
        parts = [TransRate() for _ in range(3)]
        for metric, x, y in zip(parts, features.split(25), labels.split(25), strict=True):
            metric.update(x, y)
        total = TransRate()
        for k in torch.randperm(3).tolist():
            total.merge(parts[k])
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)

    def test_ignored_samples_might_as_well_not_be_there(self):
        features, labels = draw()
        labels[::4] = 255
        expected = compute_transrate(features[labels < 255], labels[labels < 255]).item()
        assert compute_transrate(features, labels, ignore_index=255).item() == pytest.approx(expected, abs=1e-9)
        metric = TransRate(ignore_index=255)
        assert streamed(metric, features, labels, 20).item() == pytest.approx(expected, abs=1e-9)


class TestDegenerate:
    def test_one_class(self):
        features, labels = draw()
        metric = TransRate()
        metric.update(features, labels * 0 + 4)
        for compute in (metric.compute, lambda: compute_transrate(features, labels * 0)):
            with pytest.warns(UserWarning, match="one class only"):
                assert compute() == 0

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
    def test_constant_features(self, constant):
        features, labels = draw()
        features = torch.full_like(features, constant)
        metric = TransRate()
        metric.update(features, labels)
        for compute in (metric.compute, lambda: compute_transrate(features, labels)):
            with pytest.warns(UserWarning, match="features are constant"):
                assert compute() == 0

    def test_a_constant_feature_changes_nothing(self):
        features, labels = draw()
        more = torch.cat([features, torch.full((60, 1), 0.3)], 1)
        expected = compute_transrate(features, labels).item()
        for score in (compute_transrate(more, labels), streamed(TransRate(), more, labels, 20)):
            assert score.item() == pytest.approx(expected, abs=1e-9)

    def test_class_of_one_sample(self):
        features, labels = draw()
        labels[labels == 2] = 1
        labels[0] = 2
        expected = by_singular_values(features, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compute_transrate(features, labels).item() == pytest.approx(expected, abs=1e-9)


class TestInputs:
    def test_one_sample_and_none(self):
        metric = TransRate()
        with pytest.raises(InputError, match="has seen no sample"):
            metric.compute()
        metric.update([[1.0]], [0])
        for compute in (metric.compute, lambda: compute_transrate([[1.0]], [0])):
            with pytest.raises(InputError, match="expected at least 2"):
                compute()

    @pytest.mark.parametrize("eps", [0, -1e-4, float("nan"), float("inf")])
    def test_eps(self, eps):
        for make in (TransRate, lambda eps: compute_transrate([[1.0], [2.0]], [0, 1], eps=eps)):
            with pytest.raises(InputError, match="eps is"):
                make(eps=eps)
