"""NCTI: against scikit-learn's discriminant analysis, in its limits, and combined over models."""

import math

import numpy as np
import pytest
import torch
from metric_cases import draw
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from medtl_ext import InputError
from medtl_ext.metrics import NCTITerms, combine_ncti, compute_ncti


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


@pytest.mark.parametrize("n_classes", [2, 3, 6])
@pytest.mark.parametrize(("n", "width"), [(90, 9), (200, 100)])
# Small features are shrunk much, large ones not at all.
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 10.0])
def test_library(n, width, n_classes, scale):
    features, labels = draw(n=n, width=width, n_classes=n_classes)
    labels[n // 2 :] *= torch.arange(n - n // 2) % 2  # classes of different sizes
    features = features * scale
    np.testing.assert_allclose(compute_ncti(features, labels), library_ncti(features, labels), rtol=1e-6)


class TestLimits:
    @pytest.mark.parametrize(("n", "width", "n_classes"), [(2, 5, 2), (20, 400, 3), (40, 300, 20)])
    def test_fewer_samples_than_dimensions(self, n, width, n_classes):
        with pytest.warns(UserWarning, match="no more than their components and classes"):
            terms = compute_ncti(torch.randn(n, width), torch.arange(n) % n_classes)
        assert all(map(math.isfinite, terms))
        assert terms.ncc.item() == pytest.approx(1, abs=1e-3)

    def test_collapsed_classes_are_the_best(self):
        labels = torch.arange(30) % 3
        terms = compute_ncti(torch.eye(3)[labels], labels)
        assert terms.ncc.item() == pytest.approx(1)
        assert terms.vc.item() == pytest.approx(math.log(3 * math.sqrt(10)))
        assert 1e6 < terms.seli.item() < math.inf


class TestCombine:
    def test_by_hand(self):
        terms = {
            "a": NCTITerms(torch.tensor(10.0), torch.tensor(0.5), torch.tensor(2.0)),
            "b": NCTITerms(torch.tensor(20.0), torch.tensor(0.6), torch.tensor(4.0)),
            "c": NCTITerms(torch.tensor(15.0), torch.tensor(0.9), torch.tensor(3.5)),
        }
        assert combine_ncti(terms) == pytest.approx({"a": 0 + 0 - 0, "b": 0.25 + 1 - 1, "c": 1 + 0.5 - 0.75}, abs=1e-6)

    def test_terms_that_are_the_same_for_all(self):
        assert combine_ncti({"a": NCTITerms(1, 1, 2), "b": NCTITerms(1, 1, 3)}) == {"a": 1.0, "b": 0.0}
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
