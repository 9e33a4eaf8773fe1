"""PARC: against scipy over all pairs, and its best and worst."""

import numpy as np
import pytest
import torch
from metric_cases import draw
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from medtl_ext.metrics import FeatureSamples, compute_parc


def pairwise_parc(features, labels):
    """PARC by the definition: every pair's two distances, and scipy's rank correlation."""
    features, labels = np.asarray(features), np.asarray(labels)
    features = (features - features.mean(0)) / features.std(0)
    first, second = np.triu_indices(len(labels), 1)
    distance = 1 - np.corrcoef(features)[first, second]
    # Equal distances differ in the last bits, which scipy would rank.
    return 100 * spearmanr(np.round(distance, 12), labels[first] != labels[second]).statistic


def exact(features, n_components):
    return PCA(n_components, svd_solver="full").fit_transform(np.asarray(features))


class TestReferenceVectors:
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
        approximate = PCA(32, svd_solver="randomized", iterated_power=1, random_state=1919)
        value = compute_parc(approximate.fit_transform(data["features"]), data["labels"], n_components=None)
        assert value.item() == pytest.approx(data["parc_32"], abs=1e-6)
        value = compute_parc(data["features"], data["labels"]).item()
        assert value == pytest.approx(pairwise_parc(exact(data["features"], 32), data["labels"]), abs=1e-6)
        assert value == pytest.approx(data["parc_32"], rel=0.1)


class TestAgainstPairs:
    @pytest.mark.parametrize(("width", "n_classes"), [(9, 2), (9, 3), (9, 7), (2, 3)])
    def test_without_components(self, width, n_classes):
        features, labels = draw(width=width, n_classes=n_classes)  # of two features there are two distances only
        value = compute_parc(features, labels, n_components=None)
        assert value.item() == pytest.approx(pairwise_parc(features, labels), abs=1e-8)

    @pytest.mark.parametrize(("n", "width", "asked", "there"), [(70, 9, 5, 5), (20, 50, 5, 5), (20, 50, 32, 19)])
    def test_components(self, n, width, asked, there):
        features, labels = draw(n=n, width=width)
        value = compute_parc(features + 1e6, labels, n_components=asked)
        assert value.item() == pytest.approx(pairwise_parc(exact(features, there), labels), abs=1e-6)

    def test_ties(self):
        features, labels = draw(width=3)
        features = features.round()  # few distinct rows
        assert len(features.unique(dim=0)) < 60
        value = compute_parc(features, labels, n_components=None)
        assert value.item() == pytest.approx(pairwise_parc(features, labels), abs=1e-5)  # rounding may tie a pair more

    def test_many_samples_are_drawn_by_content(self, monkeypatch):
        monkeypatch.setattr("medtl_ext.metrics.parc.MAX_SAMPLES", 30)
        features, labels = draw()
        order = torch.randperm(60)
        values = [compute_parc(features, labels, seed=seed).item() for seed in range(3)]
        assert len(set(values)) == 3
        assert compute_parc(features[order], labels[order], seed=1).item() == pytest.approx(values[1], abs=1e-9)
        samples = FeatureSamples(seed=1)  # which come in the order of the draw
        samples.update(features, labels)
        drawn = [column[:30] for column in samples.compute()[:2]]
        assert values[1] == pytest.approx(pairwise_parc(exact(drawn[0], 5), drawn[1]), abs=1e-8)
        monkeypatch.setattr("medtl_ext.metrics.parc.MAX_SAMPLES", 60)
        assert compute_parc(features, labels, seed=1).item() not in values


def test_best_and_worst():
    features = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    assert compute_parc(features, [5, 5, 2, 2], n_components=None).item() == pytest.approx(100)
    assert -100 <= compute_parc(features, [5, 2, 5, 2], n_components=None).item() < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x, y: (x, torch.arange(60)), "no two samples of one"), (lambda x, y: (x[:, :1], y), "same distance")],
    ids=["singletons", "one feature"],
)
@pytest.mark.parametrize("n_components", [None, 32])
def test_undefined(change, message, n_components):
    with pytest.warns(UserWarning, match=message):
        assert compute_parc(*change(*draw()), n_components=n_components).item() == 0
