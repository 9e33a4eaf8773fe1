"""NLEEP: against scikit-learn's mixtures, and in its limits."""

import numpy as np
import pytest
from metric_cases import draw
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from medtl_ext.metrics import NLEEP, FeatureSamples, compute_nleep


def direct_leep(responsibilities, labels):
    """LEEP by the definition."""
    joint = np.eye(3)[labels].T @ responsibilities
    mass = joint.sum(0)
    return np.log(((joint / np.where(mass > 0, mass, 1))[labels] * responsibilities).sum(1)).mean()


@pytest.mark.parametrize(("n", "width", "n_classes"), [(60, 9, 2), (45, 60, 3)])
@pytest.mark.parametrize("scale", [1.0, 2.0**27, 2.0**-27])
def test_mean_over_ten_mixtures(n, width, n_classes, scale):
    features, labels = draw(n=n, width=width, n_classes=n_classes)
    samples = FeatureSamples(seed=3)  # whose order the starting points depend on
    samples.update(features * scale, labels)
    x, y, *_ = samples.compute()
    # Components as exact, and as rounded, as they can be: their last bit may decide where a mixture ends.
    x = (x - x.mean(0)).numpy()
    solver = "covariance_eigh" if n >= width else "full"
    scores = PCA(0.8, svd_solver=solver).fit_transform(x / np.abs(x).max())
    scores /= np.sqrt(scores.var(0).mean())
    values = []
    for start in range(30, 40):
        mixture = GaussianMixture(
            min(5 * n_classes, n // 2), covariance_type="diag", reg_covar=1e-5, random_state=start
        ).fit(scores)
        values.append(direct_leep(mixture.predict_proba(scores), y))
    assert len(set(values)) > 1
    assert compute_nleep(features * scale, labels, seed=3).item() == pytest.approx(np.mean(values), abs=1e-9)


class TestLimits:
    def test_seed(self):
        features, labels = draw(signal=0.3)
        metric = NLEEP(seed=1)
        metric.update(features, labels)
        values = [compute_nleep(features, labels, seed=seed).item() for seed in (0, 0, 1)]
        assert values[0] == values[1] != values[2] == metric.compute().item()
        assert values[2] == pytest.approx(values[0], rel=0.5)

    @pytest.mark.parametrize(("n", "n_gaussians"), [(2, 1), (7, 3), (19, 9)])
    def test_few_samples(self, n, n_gaussians):
        with pytest.warns(UserWarning, match=f"has {n_gaussians} Gaussians in place of 10"):
            value = compute_nleep(*draw(n=n, width=400, n_classes=2))
        assert -1 < value.item() <= 0
        if n == 2:
            assert value.item() == pytest.approx(-np.log(2))
