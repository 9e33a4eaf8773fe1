"""H-score and its map: compared with reference vectors and canonical correlations, and in limiting cases."""

import warnings

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed
from scipy.linalg import orth
from sklearn.covariance import LedoitWolf

from medtl_ext import InputError
from medtl_ext.metrics import HScoreMap, compute_h_score, compute_h_score_map


def correlated(features, labels):
    """Pillai's trace, the sum of the squared canonical correlations of features and indicators of the classes."""
    x = np.asarray(features, dtype=float)
    indicators = np.equal.outer(np.asarray(labels), np.unique(labels)).astype(float)
    bases = [orth(value - value.mean(0), rcond=1e-6) for value in (x, indicators)]
    return (np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2).sum()


def shrunk(features, labels):
    """The regularised score with scikit-learn's estimate of the shrinkage and of the covariance."""
    x, y = np.asarray(features, dtype=float), np.asarray(labels)
    estimate = LedoitWolf().fit(x)
    means = np.stack([x[y == label].mean(0) for label in y])
    between = (1 - estimate.shrinkage_) * np.atleast_2d(np.cov(means, rowvar=False))
    return np.trace(np.linalg.solve(estimate.covariance_, between))


def loop_map(features, labels, *, ignore_index=None):
    scores = np.zeros(labels.shape[1:])
    for pixel in np.ndindex(*scores.shape):
        x, y = features[(slice(None), slice(None), *pixel)], labels[(slice(None), *pixel)]
        x, y = x[y != ignore_index], y[y != ignore_index]
        scores[pixel] = np.nan if not len(y) else correlated(x, y) if len(y.unique()) > 1 else 0
    return scores


class TestReferenceVectors:
    @pytest.fixture
    def seg(self, vectors):
        return vectors("seg_binary")

    def test_pixels_pooled(self, seg):
        score = compute_h_score(seg["logits"], seg["labels"])
        assert score.item() == pytest.approx(seg["hscore_pooled_logits_f64"], abs=1e-10)

    def test_map(self, seg):
        h_map = compute_h_score_map(seg["logits"], seg["labels"])
        np.testing.assert_allclose(h_map, seg["hscore_pixel_map"], atol=1e-10)
        metric = HScoreMap()
        metric.update(seg["logits"], seg["labels"])
        np.testing.assert_array_equal(metric.multi_label(), seg["hscore_pixel_n_labels"] > 1)

    def test_softmax_in_single_precision_stays_within_the_bounds(self, seg):
        # Its second direction is rounding noise: inverted, it gives the printed values outside [0, 1].
        probs, labels = torch.from_numpy(seg["logits"]).softmax(1), torch.from_numpy(seg["labels"])
        h_map = compute_h_score_map(probs, labels)
        assert ((h_map >= 0) & (h_map <= 1)).all()
        # One of two probabilities says it all.
        torch.testing.assert_close(h_map, compute_h_score_map(probs[:, 1:], labels), atol=1e-4, rtol=0)


class TestAgainstAnotherRoute:
    @pytest.mark.parametrize("width", [1, 2, 3, 20])
    def test_canonical_correlations(self, width):
        features, labels = draw(width=width, n_classes=4)
        labels[30:] %= 3  # classes of different sizes
        assert compute_h_score(features, labels).item() == pytest.approx(correlated(features, labels), abs=1e-9)

    @pytest.mark.parametrize(("n", "width"), [(60, 6), (60, 1), (30, 100), (500, 12)])
    def test_ledoit_wolf(self, n, width):
        features, labels = draw(n=n, width=width, n_classes=4, signal=0.7)
        value = compute_h_score(features, labels, shrinkage="ledoit_wolf").item()
        assert value == pytest.approx(shrunk(features, labels), abs=1e-9)

    @pytest.mark.parametrize("width", [1, 2, 5])
    @pytest.mark.parametrize("grid", [(6, 5), (3, 4, 2)], ids=["2D", "3D"])
    def test_map(self, grid, width):
        features, labels = draw(grid, n=20, width=width)
        labels[torch.rand(labels.shape) < 0.2] = 9
        labels[:, 0] = 1  # one label only
        labels[:, 0, :2] = 9
        labels[:12][labels[:12] < 9] %= 2
        expected = loop_map(features, labels, ignore_index=9)
        for h_map in (
            compute_h_score_map(features, labels, ignore_index=9),
            streamed(HScoreMap(ignore_index=9), features, labels, 7),
        ):
            np.testing.assert_allclose(h_map, expected, atol=1e-9)

    def test_map_of_more_pixels_than_a_block(self):
        features, labels = draw((130, 129), n=8, width=2, n_classes=2)
        labels[:, 128, :60] = 0  # in the second block; (127, 0) is the last pixel of the first
        h_map = compute_h_score_map(features, labels)
        assert (h_map[128, :60] == 0).all()
        for pixel in [(0, 0), (39, 128), (127, 0), (128, 70), (129, 128)]:
            where = (slice(None), slice(None), *pixel)
            expected = correlated(features[where], labels[:, pixel[0], pixel[1]])
            assert h_map[pixel].item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("width", [2, 5])
    def test_map_of_regular_and_singular_pixels(self, width):
        features, labels = draw((12,), n=20, width=width)
        features[:, -1, ::2] = features[:, 0, ::2]  # singular
        features[:, 0, :3] *= torch.tensor([1e-2, 1e-4, 1e4])  # on either side of the cutoff
        expected = []
        for x, y in zip(features.unbind(2), labels.T, strict=True):
            means = torch.stack([x[y == label].mean(0) for label in y])
            inverse = np.linalg.pinv(np.cov(x.T), rcond=1e-6, hermitian=True)
            expected.append(np.trace(inverse @ np.cov(means.T)))
        np.testing.assert_allclose(compute_h_score_map(features, labels), expected, rtol=1e-7)


class TestLimits:
    @pytest.mark.parametrize(("share", "kept"), [(2e-7, False), (5e-6, True)])
    @pytest.mark.parametrize("width", [2, 4])
    def test_directions_of_little_variance(self, width, share, kept):
        # The last feature tells the classes, but has this share of the others' variance.
        labels = torch.arange(400) % 2
        features = torch.randn(400, width, dtype=torch.float64)
        features = features / features.std(0)
        features[:, -1] = share**0.5 * (2.0 * labels - 1)
        expected = 1 if kept else correlated(features[:, :-1], labels)
        for value in (compute_h_score(features, labels), compute_h_score_map(features[..., None], labels[:, None])):
            assert value.item() == pytest.approx(expected, abs=1e-4)

    def test_map_of_a_saturated_softmax(self):
        # Deviations of 1e-9 around one: of raw sums nothing would be left after taking off the square of the mean.
        features, labels = draw((4, 3), n=20, width=2)
        saturated = 1 + 1e-9 * features
        expected = compute_h_score_map(features, labels)
        for value in (compute_h_score_map(saturated, labels), streamed(HScoreMap(), saturated, labels, 1)):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)

    def test_no_more_samples_than_dimensions(self):
        features, labels = draw(n=20, width=50, n_classes=4)
        with pytest.warns(UserWarning, match="20 samples of 50 dimensions"):
            assert compute_h_score(features, labels).item() == pytest.approx(3, abs=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert 0 < compute_h_score(features, labels, shrinkage="ledoit_wolf") < 3
        images, labels = draw((2, 2), n=4, width=4, n_classes=2)
        with pytest.warns(UserWarning, match="4 images of 4 channels"):
            compute_h_score_map(images, labels)


class TestMap:
    def test_multi_label(self):
        metric = HScoreMap(ignore_index=5)
        with pytest.raises(InputError, match="has seen no sample"):
            metric.multi_label()
        metric.update(torch.randn(2, 1, 1, 4), torch.tensor([[[0, 1, 0, 5]], [[0, 1, 1, 5]]]))
        metric.update(torch.randn(2, 1, 1, 4), torch.tensor([[[1, 1, 0, 5]], [[0, 1, 5, 0]]]))
        assert metric.multi_label().tolist() == [[True, False, True, False]]
        h_map = metric.compute()
        assert (h_map[0, 1], h_map[0, 3]) == (0, 0)
        assert h_map.nanmean() == pytest.approx(h_map[metric.multi_label()].sum().item() / 4)

    @pytest.mark.parametrize("other", [{"grid": (2, 3)}, {"grid": (3, 2), "width": 4}, {"grid": (3, 2, 1)}], ids=str)
    def test_images_of_another_form(self, other):
        metric = HScoreMap()
        metric.update(*draw((3, 2)))
        before = metric.compute()
        with pytest.raises(InputError, match="differs between batches"):
            metric.update(*draw(**other))
        assert torch.equal(metric.compute(), before)
