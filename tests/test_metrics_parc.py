"""PARC: against reference vectors, against scipy over all pairs, and against what must hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from drawing import torch_generator
from scipy.stats import spearmanr
from sklearn.decomposition import PCA as LibraryPCA

from medtl_ext import InputError
from medtl_ext.metrics import parc
from medtl_ext.metrics.features import canonical_order
from medtl_ext.metrics.parc import PARC, compute_parc, principal_components

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def draw(n=70, width=9, n_classes=3):
    """Features that tell the classes apart in part."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n,), generator=generator)
    labels[:n_classes] = torch.arange(n_classes)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


def pairwise_parc(features, labels):
    """PARC by the definition: every pair's two distances, and scipy's rank correlation."""
    features, labels = np.asarray(features), np.asarray(labels)
    features = (features - features.mean(0)) / features.std(0)
    first, second = np.triu_indices(len(labels), 1)
    distance = [1 - np.corrcoef(features[i], features[j])[0, 1] for i, j in zip(first, second, strict=True)]
    # Equal distances differ in the last bits, which scipy would rank.
    return 100 * spearmanr(np.round(distance, 12), labels[first] != labels[second]).statistic


class TestReferenceVectors:
    @pytest.mark.parametrize("name", ["cls_basic", "cls_binary"])
    def test_without_components(self, vectors, name):
        data = vectors(name)
        value = compute_parc(data["features"], data["labels"], n_components=None)
        assert value.item() == pytest.approx(data["parc_nopca"], abs=1e-6)

    def test_three_classes(self, vectors):
        # With three classes the reference's one-hot distances of equal labels are 0 or 2e-16, as rounding has it, and
        # it ranks them: so it lies beside the value of the definition, which is what we have.
        data = vectors("cls_smallD")
        value = compute_parc(data["features"], data["labels"], n_components=None).item()
        assert value == pytest.approx(pairwise_parc(data["features"], data["labels"]), abs=1e-6)
        assert value == pytest.approx(data["parc_nopca"], rel=0.02)

    @pytest.mark.parametrize("name", ["cls_basic", "cls_binary"])
    def test_32_components(self, vectors, name):
        data = vectors(name)
        approximate = LibraryPCA(32, svd_solver="randomized", iterated_power=1, random_state=1919)
        value = compute_parc(approximate.fit_transform(data["features"]), data["labels"], n_components=None)
        assert value.item() == pytest.approx(data["parc_32"], abs=1e-6)
        exact = LibraryPCA(32, svd_solver="full").fit_transform(data["features"])
        value = compute_parc(data["features"], data["labels"]).item()
        assert value == pytest.approx(pairwise_parc(exact, data["labels"]), abs=1e-6)
        assert value == pytest.approx(data["parc_32"], rel=0.1)


class TestAgainstPairs:
    @pytest.mark.parametrize("n_classes", [2, 3, 7])
    def test_without_components(self, n_classes):
        features, labels = draw(n_classes=n_classes)
        value = compute_parc(features, labels, n_components=None)
        assert value.item() == pytest.approx(pairwise_parc(features, labels), abs=1e-8)

    @pytest.mark.parametrize(("n", "width"), [(70, 9), (20, 50)])
    def test_components(self, n, width):
        features, labels = draw(n, width)
        components = LibraryPCA(5, svd_solver="full").fit_transform(features.numpy())
        value = compute_parc(features, labels, n_components=5)
        assert value.item() == pytest.approx(pairwise_parc(components, labels), abs=1e-8)

    def test_ties(self):
        features, labels = draw(60, 3)
        features = features.round()  # few distinct rows
        assert len(features.unique(dim=0)) < 60
        value = compute_parc(features, labels, n_components=None)
        assert value.item() == pytest.approx(pairwise_parc(features, labels), abs=1e-5)  # rounding may tie a pair more

    def test_two_features_have_two_distances(self):
        features, labels = draw(60, 2)
        value = compute_parc(features, labels, n_components=None)
        assert value.item() == pytest.approx(pairwise_parc(features, labels), abs=1e-8)

    def test_pixels_and_ignored_ones(self):
        features, labels = draw(60, 5)
        kept = labels != 2
        expected = compute_parc(features[kept], labels[kept])
        value = compute_parc(features.view(4, 3, 5, 5).permute(0, 3, 1, 2), labels.view(4, 3, 5), ignore_index=2)
        assert value.item() == pytest.approx(expected.item(), abs=1e-9)

    @pytest.mark.parametrize(("n", "width"), [(40, 9), (9, 40)])
    def test_principal_components(self, n, width):
        features, _ = draw(n, width)
        pca = LibraryPCA(5, svd_solver="full")
        scores = pca.fit_transform(features.numpy())
        found = principal_components(features + 1e6, 5)
        np.testing.assert_allclose(np.abs(found.scores), np.abs(scores), atol=1e-8)
        np.testing.assert_allclose(found.variance, pca.explained_variance_, rtol=1e-8)
        assert len(principal_components(features, 0.8).variance) == LibraryPCA(0.8).fit(features.numpy()).n_components_
        assert principal_components(features, 32).scores.shape[1] == min(width, n - 1)  # the last has no variance


class TestWhatMustHold:
    def test_permutation_and_names(self):
        features, labels = draw()
        order = torch.randperm(len(labels))
        expected = compute_parc(features, labels).item()
        assert compute_parc(features[order], labels[order]).item() == pytest.approx(expected, abs=1e-9)
        assert compute_parc(features, torch.tensor([4, 0, 9])[labels]).item() == pytest.approx(expected, abs=1e-9)

    def test_scale_and_shift_of_each_feature(self):
        features, labels = draw()
        changed = features * torch.rand(9, dtype=torch.float64).add(0.1) + torch.randn(9)
        expected = compute_parc(features, labels, n_components=None).item()
        assert compute_parc(changed, labels, n_components=None).item() == pytest.approx(expected, abs=1e-9)

    def test_shift_of_all(self):
        features, labels = draw()
        expected = compute_parc(features, labels).item()
        assert compute_parc(features + 1e6, labels).item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("scale", [1e8, 1e-8, 1e150, 1e-150])
    def test_scale_of_all(self, scale):
        features, labels = draw()
        for n_components in (None, 4):
            expected = compute_parc(features, labels, n_components=n_components).item()
            value = compute_parc(features * scale, labels, n_components=n_components)
            assert value.item() == pytest.approx(expected, abs=1e-6)

    def test_best_and_worst(self):
        features = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
        assert compute_parc(features, [5, 5, 2, 2], n_components=None).item() == pytest.approx(100)
        assert -100 <= compute_parc(features, [5, 2, 5, 2], n_components=None).item() < 0

    def test_many_samples_are_drawn_by_content(self, monkeypatch):
        monkeypatch.setattr(parc, "MAX_SAMPLES", 30)
        features, labels = draw()
        order = torch.randperm(len(labels))
        values = [compute_parc(features, labels, seed=seed).item() for seed in range(3)]
        assert len(set(values)) == 3
        drawn = canonical_order(features, labels, seed=1)[:30]
        expected = LibraryPCA(9, svd_solver="full").fit_transform(features[drawn].numpy())
        assert values[1] == pytest.approx(pairwise_parc(expected, labels[drawn]), abs=1e-8)
        assert compute_parc(features[order], labels[order], seed=1).item() == pytest.approx(values[1], abs=1e-9)
        monkeypatch.setattr(parc, "MAX_SAMPLES", 70)
        assert compute_parc(features, labels, seed=1).item() not in values

    @pytest.mark.parametrize("sizes", [[1] * 70, [30, 40]])
    def test_streaming(self, sizes):
        features, labels = draw()
        total = PARC(n_components=4)
        for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
            metric = PARC(n_components=4)
            metric.update(part, part_labels)
            total.merge(metric)
        expected = compute_parc(features, labels, n_components=4)
        assert total.compute().item() == pytest.approx(expected.item(), abs=1e-9)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_dtype(self, device):
        features, labels = draw()
        value = compute_parc(features.to(device), labels)
        assert (value.device.type, value.dtype, value.ndim) == (device, torch.float64, 0)
        assert value.item() == pytest.approx(compute_parc(features, labels).item(), abs=1e-6)

    @pytest.mark.parametrize(
        ("features", "labels", "message"),
        [
            ([[1.0, float("nan")]] * 2, [0, 1], "features holds NaN or Inf"),
            ([[1.0, float("inf")]] * 2, [0, 1], "features holds NaN or Inf"),
            (torch.zeros(0, 3), torch.zeros(0), "features is empty"),
            ([[1.0], [2.0]], [0, 1, 1], "target_labels has shape"),
            ([[1.0], [2.0]], [0, -1], "target_labels holds the negative label"),
            ([[1.0], [2.0]], [0, 0.5], "target_labels holds non-integer"),
        ],
    )
    def test_bad(self, features, labels, message):
        with pytest.raises(InputError, match=message):
            compute_parc(features, labels)
        with pytest.raises(InputError, match=message):
            PARC().update(features, labels)

    @pytest.mark.parametrize("n_components", [0, -1, 2.0, "all"])
    def test_bad_components(self, n_components):
        for make in (lambda: PARC(n_components=n_components), lambda: compute_parc(*draw(), n_components=n_components)):
            with pytest.raises(InputError, match="n_components is"):
                make()


class TestDegenerateInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x, y * 0), "one class only"),
            (lambda x, y: (x[:1], y[:1]), "one class only"),
            (lambda x, y: (x, torch.arange(len(y))), "no two samples of one class"),
            (lambda x, y: (torch.full_like(x, 0.1), y), "same distance"),
            (lambda x, y: (x[:, :1], y), "same distance"),
        ],
        ids=["one class", "one sample", "singletons", "constant", "one feature"],
    )
    @pytest.mark.parametrize("n_components", [None, 32])
    def test_undefined(self, change, message, n_components):
        with pytest.warns(UserWarning, match=message):
            assert compute_parc(*change(*draw()), n_components=n_components).item() == 0

    def test_constant_feature_changes_nothing(self):
        features, labels = draw()
        wider = torch.cat([features, torch.full((70, 2), 0.1, dtype=torch.float64)], 1)
        for n_components in (None, 32):
            expected = compute_parc(features, labels, n_components=n_components).item()
            assert compute_parc(wider, labels, n_components=n_components).item() == pytest.approx(expected, abs=1e-8)

    def test_finite_without_a_warning(self):
        features, labels = draw()
        lonely = torch.where(torch.arange(70) == 0, 8, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in [draw(12, 300), (features, lonely), (features + 1e4 * labels[:, None], labels)]:
                assert -100 <= compute_parc(x, y).item() <= 100
