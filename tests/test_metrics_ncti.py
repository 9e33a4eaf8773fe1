"""NCTI: against reference vectors, against scikit-learn's discriminant analysis, and against what must hold."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from drawing import torch_generator
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from medtl_ext import InputError
from medtl_ext.metrics.ncti import NCTI, NCTITerms, combine_ncti, compute_ncti

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def draw(n=90, width=9, n_classes=3):
    """Features that tell the classes apart in part."""
    generator = torch_generator()
    labels = torch.randint(n_classes, (n,), generator=generator) * torch.randint(2, (n,), generator=generator)
    labels[: 2 * n_classes] = torch.arange(2 * n_classes) % n_classes
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


def library_ncti(features, labels):
    """The three terms from scikit-learn's analysis, and singular values one matrix after the other."""
    features, labels = np.asarray(features), np.asarray(labels)
    pca = PCA(min(64, *features.shape), svd_solver="full")
    scores = pca.fit_transform(features)
    shrinkage = math.exp(-pca.explained_variance_[:32].sum())
    if shrinkage > 1e-10:
        analysis = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage)
    else:
        analysis = LinearDiscriminantAnalysis(solver="svd")
    projected = analysis.fit_transform(scores, labels)
    posterior = analysis.predict_proba(scores)
    column = {label: k for k, label in enumerate(analysis.classes_)}
    seli = np.linalg.svd(projected - projected.mean(0), compute_uv=False).sum()
    ncc = np.mean([row[column[label]] for row, label in zip(posterior, labels, strict=True)])
    nuclear = sum(np.linalg.svd(posterior[labels == label], compute_uv=False).sum() for label in column)
    return seli, ncc, math.log(nuclear)


def values(terms):
    return [term.item() for term in terms]


class TestReferenceVectors:
    @pytest.mark.parametrize("name", ["cls_basic", "cls_binary"])
    def test_terms(self, vectors, name):
        data = vectors(name)
        terms = compute_ncti(data["features"], data["labels"])
        for term in NCTITerms._fields:
            assert getattr(terms, term).item() == pytest.approx(data[f"ncti_{term}"], rel=1e-6)


class TestAgainstLibrary:
    @pytest.mark.parametrize("n_classes", [2, 3, 6])
    @pytest.mark.parametrize(("n", "width"), [(90, 9), (200, 100)])
    # Small features are shrunk much, large ones not at all.
    @pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 10.0])
    def test_terms(self, n, width, n_classes, scale):
        features, labels = draw(n, width, n_classes)
        terms = values(compute_ncti(features * scale, labels))
        np.testing.assert_allclose(terms, library_ncti(features * scale, labels), rtol=1e-6)

    def test_pixels_and_ignored_ones(self):
        features, labels = draw(60, 5, 4)
        kept = labels != 2
        expected = library_ncti(features[kept], labels[kept])
        terms = compute_ncti(features.view(4, 3, 5, 5).permute(0, 3, 1, 2), labels.view(4, 3, 5), ignore_index=2)
        np.testing.assert_allclose(values(terms), expected, rtol=1e-6)


class TestWhatMustHold:
    def test_permutation_names_rotation_and_shift(self):
        features, labels = draw()
        expected = values(compute_ncti(features, labels))
        order = torch.randperm(len(labels))
        rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
        for same in (
            (features[order], labels[order]),
            (features, torch.tensor([4, 0, 9])[labels]),
            (features @ rotation, labels),
            (features + 1e5, labels),
        ):
            np.testing.assert_allclose(values(compute_ncti(*same)), expected, rtol=1e-7)

    def test_every_sample_twice(self):
        # Sums and means double or stay, but for the variance's degree of freedom, which moves the shrinkage by a hair.
        features, labels = draw()
        once = compute_ncti(features * 5, labels)
        twice = compute_ncti(features.repeat(2, 1) * 5, labels.repeat(2))
        assert twice.seli.item() == pytest.approx(once.seli.item() * math.sqrt(2))
        assert twice.ncc.item() == pytest.approx(once.ncc.item())
        assert twice.vc.item() == pytest.approx(once.vc.item() + math.log(2) / 2)

    def test_bounds(self):
        features, labels = draw()
        terms = compute_ncti(features, labels)
        assert terms.seli > 0
        assert 0 < terms.ncc < 1
        # The nuclear norm lies between the Frobenius norm of even posteriors and the square root of ranks times it.
        n = torch.bincount(labels).double()
        assert math.log((n / 3).sqrt().sum()) <= terms.vc <= math.log((3 * n).sqrt().sum())

    def test_streaming(self):
        features, labels = draw()
        expected = values(compute_ncti(features, labels))
        for sizes in ([1] * 90, [50, 40]):
            total = NCTI()
            for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
                metric = NCTI()
                metric.update(part, part_labels)
                total.merge(metric)
            assert isinstance(total.compute(), NCTITerms)
            np.testing.assert_allclose(values(total.compute()), expected, rtol=1e-9)


class TestCombine:
    def test_by_hand(self):
        terms = {
            "a": NCTITerms(torch.tensor(10.0), torch.tensor(0.5), torch.tensor(2.0)),
            "b": NCTITerms(torch.tensor(20.0), torch.tensor(0.6), torch.tensor(4.0)),
            "c": NCTITerms(torch.tensor(15.0), torch.tensor(0.9), torch.tensor(3.5)),
        }
        assert combine_ncti(terms) == pytest.approx({"a": 0 + 0 - 0, "b": 0.25 + 1 - 1, "c": 1 + 0.5 - 0.75}, abs=1e-6)

    def test_variability_counts_against_a_model(self):
        assert combine_ncti({"a": NCTITerms(1, 1, 2), "b": NCTITerms(1, 1, 3)}) == {"a": 1.0, "b": 0.0}

    def test_one_model(self):
        assert combine_ncti({"a": NCTITerms(1, 1, 2)}) == {"a": 0.5}

    @pytest.mark.parametrize(
        ("terms", "message"),
        [
            ({}, "terms is empty"),
            ({"a": (1, 2)}, "terms of a are"),
            ({"a": (1, 2, math.nan)}, "terms of a are"),
            ({"a": (1, 2, 3), "b": (1, 2, math.inf)}, "terms of b are"),
        ],
    )
    def test_bad(self, terms, message):
        with pytest.raises(InputError, match=message):
            combine_ncti(terms)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_dtype(self, device):
        features, labels = draw()
        terms = compute_ncti(features.to(device), labels)
        assert {(term.device.type, term.dtype, term.ndim) for term in terms} == {(device, torch.float64, 0)}
        np.testing.assert_allclose(values(terms), values(compute_ncti(features, labels)), rtol=1e-7)

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
            compute_ncti(features, labels)


class TestDegenerateInput:
    @pytest.mark.parametrize("n", [1, 90])
    def test_one_class(self, n):
        features, labels = draw()
        with pytest.warns(UserWarning, match="one class only"):
            terms = compute_ncti(features[:n], labels[:n] * 0)
        assert values(terms) == pytest.approx([0, 1, math.log(n) / 2])

    def test_constant_features(self):
        features, labels = draw()
        with pytest.warns(UserWarning, match="constant"):
            terms = compute_ncti(torch.full_like(features, 0.1), labels)
        n = torch.bincount(labels).double()
        share = n / n.sum()
        assert values(terms) == pytest.approx(
            [0, (share**2).sum().item(), (n.sqrt().sum() * share.norm()).log().item()]
        )

    @pytest.mark.parametrize(("n", "width", "n_classes"), [(2, 5, 2), (20, 400, 3), (40, 300, 20)])
    def test_fewer_samples_than_dimensions(self, n, width, n_classes):
        features = torch.randn(n, width)
        with pytest.warns(UserWarning, match="no more than their components and classes"):
            terms = compute_ncti(features, torch.arange(n) % n_classes)
        assert all(map(math.isfinite, values(terms)))
        assert terms.ncc.item() == pytest.approx(1, abs=1e-3)

    def test_collapsed_classes_are_the_best(self):
        labels = torch.arange(30) % 3
        terms = compute_ncti(torch.eye(3)[labels], labels)
        assert terms.ncc.item() == pytest.approx(1)
        assert terms.vc.item() == pytest.approx(math.log(3 * math.sqrt(10)))
        assert 1e6 < terms.seli.item() < math.inf

    def test_finite_without_a_warning(self):
        features, labels = draw()
        lonely = torch.where(torch.arange(90) == 0, 3, labels)
        duplicates = features[:4].repeat(20, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in [
                (features, lonely),
                (features * 1e8, labels),
                (features * 1e-8, labels),
                (features * 1e150, labels),
                (features + 1e4 * labels[:, None], labels),
                (duplicates, labels[:80]),
                (features[:, :1], labels),
            ]:
                assert all(map(math.isfinite, values(compute_ncti(x, y))))
