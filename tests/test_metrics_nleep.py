"""NLEEP: against reference vectors, against loops over scikit-learn's mixtures, and against what must hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from drawing import torch_generator
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from medtl_ext import InputError
from medtl_ext.metrics import nleep
from medtl_ext.metrics.features import canonical_order
from medtl_ext.metrics.nleep import MIXTURES, NLEEP, compute_nleep
from medtl_ext.metrics.parc import principal_components

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def draw(n=60, width=9, n_classes=2, separation=1.0):
    """Features that tell the classes apart in part."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n,), generator=generator)
    labels[:n_classes] = torch.arange(n_classes)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64) * separation
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


def loop_leep(responsibilities, labels):
    """LEEP by the definition, one sample after the other."""
    joint = {}
    for row, label in zip(responsibilities, labels, strict=True):
        for v, r in enumerate(row):
            joint[label, v] = joint.get((label, v), 0.0) + r
    mass = {}
    for (_, v), value in joint.items():
        mass[v] = mass.get(v, 0.0) + value
    total = 0.0
    for row, label in zip(responsibilities, labels, strict=True):
        total += np.log(sum(joint[label, v] / mass[v] * r for v, r in enumerate(row) if mass[v] > 0))
    return total / len(labels)


def entropy(labels):
    share = np.bincount(labels) / len(labels)
    return -sum(p * np.log(p) for p in share if p > 0)


class TestReferenceVectors:
    @pytest.mark.parametrize("name", ["cls_basic", "cls_binary", "cls_smallD"])
    def test_within_5_percent(self, vectors, name):
        # One spherical mixture with one starting point, against our mean of ten diagonal ones.
        data = vectors(name)
        assert compute_nleep(data["features"], data["labels"]).item() == pytest.approx(data["nleep_google"], rel=0.05)


class TestAgainstLoops:
    @pytest.mark.parametrize(("n", "width", "n_classes"), [(60, 9, 2), (45, 60, 3)])
    def test_mean_over_mixtures(self, n, width, n_classes):
        features, labels = draw(n, width, n_classes)
        order = canonical_order(features, labels, seed=3)
        x, y = features[order].numpy(), labels[order].tolist()
        # The last bit of a component may decide where a mixture ends, so the mixtures below are given the very same.
        scores = principal_components(features[order], 0.8).scores
        np.testing.assert_allclose(np.abs(scores), np.abs(PCA(0.8, svd_solver="full").fit_transform(x)), atol=1e-8)
        scores /= np.sqrt(scores.var(0).mean())
        n_gaussians = min(5 * n_classes, n // 2)
        values = []
        for start in range(3 * MIXTURES, 4 * MIXTURES):
            mixture = GaussianMixture(n_gaussians, covariance_type="diag", reg_covar=1e-5, random_state=start).fit(
                scores
            )
            values.append(loop_leep(mixture.predict_proba(scores), y))
        assert len(set(values)) > 1
        assert compute_nleep(features, labels, seed=3).item() == pytest.approx(np.mean(values), abs=1e-9)

    def test_pixels_and_ignored_ones(self):
        features, labels = draw(60, 5, 3)
        kept = labels != 2
        expected = compute_nleep(features[kept], labels[kept])
        value = compute_nleep(features.view(4, 3, 5, 5).permute(0, 3, 1, 2), labels.view(4, 3, 5), ignore_index=2)
        assert value.item() == pytest.approx(expected.item(), abs=1e-9)


class TestWhatMustHold:
    def test_permutation_and_names(self):
        features, labels = draw()
        order = torch.randperm(len(labels))
        expected = compute_nleep(features, labels).item()
        assert compute_nleep(features[order], labels[order]).item() == pytest.approx(expected, abs=1e-9)
        assert compute_nleep(features, torch.tensor([7, 0])[labels]).item() == pytest.approx(expected, abs=1e-9)

    def test_seed(self):
        features, labels = draw(separation=0.3)
        values = [compute_nleep(features, labels, seed=seed).item() for seed in (0, 0, 1)]
        assert values[0] == values[1] != values[2]
        assert values[2] == pytest.approx(values[0], rel=0.5)

    @pytest.mark.parametrize("scale", [2.0**27, 2.0**-27, 2.0**500])
    def test_scale(self, scale, monkeypatch):
        features, labels = draw()
        assert -entropy(labels) <= compute_nleep(features * scale, labels).item() < 0
        # The order of the samples, which the starting points depend on, comes from the features' digits.
        monkeypatch.setattr(nleep, "canonical_order", lambda features, labels, seed: torch.arange(len(labels)))
        expected = compute_nleep(features, labels).item()
        assert compute_nleep(features * scale, labels).item() == pytest.approx(expected, abs=1e-6)

    def test_better_features_score_higher(self):
        scores = [compute_nleep(*draw(120, 6, 2, separation)).item() for separation in (0.0, 1.0, 30.0)]
        assert scores[0] < scores[2] <= 0
        assert scores[1] < scores[2]
        assert scores[2] == pytest.approx(0, abs=1e-6)

    def test_streaming(self):
        features, labels = draw()
        expected = compute_nleep(features, labels, seed=2).item()
        for sizes in ([20, 1, 39], [60]):
            total = NLEEP(seed=2)
            for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
                metric = NLEEP(seed=2)
                metric.update(part, part_labels)
                total.merge(metric)
            assert total.compute().item() == pytest.approx(expected, abs=1e-9)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_dtype(self, device):
        features, labels = draw()
        value = compute_nleep(features.to(device), labels)
        assert (value.device.type, value.dtype, value.ndim) == (device, torch.float64, 0)
        assert value.item() == pytest.approx(compute_nleep(features, labels).item(), abs=1e-6)

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
            compute_nleep(features, labels)

    @pytest.mark.parametrize("seed", [-1, 1.5, None, 2**32])
    def test_bad_seed(self, seed):
        for make in (lambda: NLEEP(seed=seed), lambda: compute_nleep(*draw(), seed=seed)):
            with pytest.raises(InputError, match="seed is"):
                make()


class TestDegenerateInput:
    def test_one_class(self):
        features, labels = draw()
        for n in (1, 60):
            with pytest.warns(UserWarning, match="one class only"):
                assert compute_nleep(features[:n], labels[:n] * 0).item() == 0

    def test_constant_features(self):
        features, labels = draw()
        with pytest.warns(UserWarning, match="constant"):
            value = compute_nleep(torch.full_like(features, 0.1), labels)
        assert value.item() == pytest.approx(-entropy(labels), abs=1e-12)

    @pytest.mark.parametrize(("n", "n_gaussians"), [(2, 1), (7, 3), (19, 9)])
    def test_few_samples(self, n, n_gaussians):
        with pytest.warns(UserWarning, match=f"has {n_gaussians} Gaussians in place of 10"):
            value = compute_nleep(*draw(n, 400))
        assert -1 < value.item() <= 0
        if n == 2:
            assert value.item() == pytest.approx(-np.log(2))

    def test_finite_without_a_warning(self):
        features, labels = draw()
        lonely = torch.where(torch.arange(60) == 0, 2, labels)
        duplicates = features[:4].repeat(15, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in [draw(50, 300), (features, lonely), (duplicates, labels), (features[:, :1], labels)]:
                assert -entropy(y) - 1e-9 <= compute_nleep(x, y).item() <= 0
