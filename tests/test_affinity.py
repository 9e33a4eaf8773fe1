"""Task affinity: against reference vectors, libraries and plain loops, and what must hold."""

from __future__ import annotations

import sys
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import stats
from scipy.ndimage import binary_erosion
from skimage.measure import regionprops
from skimage.metrics import structural_similarity
from skimage.transform import resize
from sklearn.decomposition import PCA

from medtl_ext import InputError
from medtl_ext.affinity import (
    PUBLISHED_WEIGHTS,
    SHAPE_DESCRIPTORS,
    SHAPE_SCALES,
    context_affinity,
    fit_affinity_weights,
    image_quantiles,
    mean_label_dice,
    pairwise_context,
    pairwise_ssim,
    pairwise_wasserstein,
    quantile_distance,
    shape_descriptors,
    shape_similarity,
    task_affinity,
    task_context,
)
from medtl_ext.affinity.images import QUANTILES, _Components, _mass_quantiles
from medtl_ext.affinity.labels import _overlaps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"drawn with seed {seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def blobs(rng, n, shape):
    """Labels with some extent, of very different sizes, some touching the border."""
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    volumes = []
    for _ in range(n):
        centre = rng.uniform(0, shape)
        radius = rng.uniform(1.5, 0.4 * min(shape))
        volumes.append(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2)
        volumes[-1][tuple(rng.integers(0, shape))] = True  # never empty
    return [volume.astype(np.uint8) for volume in volumes]


def images_of(rng, n, shape, background=True):
    images = [rng.normal(100, 30, shape).cumsum(-1) * rng.uniform(0.5, 2) for _ in range(n)]
    if background:
        for image in images:
            image[: shape[0] // 4] = 0
    return images


def head(rng, shape=(24, 26, 20), lesion=3.0, level=200.0, bright=150.0, n=3, offset=0):
    """Images of a noisy ellipsoid with a bright ball in it, and the ball's labels."""
    images, labels = [], []
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    for _ in range(n):
        centre = [side / 2 + rng.uniform(-2, 2) for side in shape]
        centre[0] += offset
        inside = sum((2 * (x - s / 2) / (0.9 * s)) ** 2 for x, s in zip(axes, shape, strict=True)) < 1
        label = sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)) < lesion**2
        images.append(np.where(inside, rng.normal(level, 0.1 * level, shape) + bright * label, 0))
        labels.append(label)
    return images, labels


class TestReferenceVectors:
    @pytest.fixture
    def data(self, vectors):
        return vectors("seqtran")

    @pytest.fixture
    def labels(self, data):
        return [data[f"lab{i}"] for i in range(5)]

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ssim_K0.3", {}),
            # This one has the same divisor in variances and covariances.
            ("ssim_K0.01_0.03", {"k1": 0.01, "k2": 0.03, "covariance_ddof": 0}),
            ("ssim_skimage_win7", {"k1": 0.01, "k2": 0.03, "window": 7}),
        ],
    )
    def test_ssim(self, data, labels, name, options):
        np.testing.assert_allclose(pairwise_ssim(labels, labels, **options), data[name], rtol=0, atol=1e-13)

    def test_wasserstein(self, data):
        images = [data[f"vol{i}"] for i in range(3)]
        distances = pairwise_wasserstein(images, images, standardize=False)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert distances[i, j].item() == pytest.approx(data[f"wass_{i}_{j}"], rel=1e-6)
        for i, image in enumerate(images):
            settings = _Components(128, 0.75, False)
            assert settings._scores("", image).shape == (128**2, data[f"pca_k{i}"])


def plain_ssim(a, b, k1, k2, ddof):
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    covariance = np.cov(a, b, ddof=ddof)[0, 1]
    luminance = (2 * a.mean() * b.mean() + k1**2) / (a.mean() ** 2 + b.mean() ** 2 + k1**2)
    return luminance * (2 * covariance + k2**2) / (a.var() + b.var() + k2**2)


class TestGlobalSSIM:
    @pytest.mark.parametrize("shape", [(11, 9, 8), (13, 17)])
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_equals_a_plain_loop(self, rng, shape, ddof):
        a, b = blobs(rng, 4, shape), blobs(rng, 3, shape)
        k1, k2 = rng.uniform(0.01, 0.5, 2)
        expected = [[plain_ssim(x, y, k1, k2, ddof) for y in b] for x in a]
        result = pairwise_ssim(a, b, k1=k1, k2=k2, covariance_ddof=ddof)
        assert result.dtype == torch.float64
        np.testing.assert_allclose(result, expected, rtol=1e-12)

    def test_blocks_do_not_show(self, rng, monkeypatch):
        a, b = blobs(rng, 4, (11, 9, 8)), blobs(rng, 3, (11, 9, 8))
        whole = pairwise_ssim(a, b)
        monkeypatch.setattr("medtl_ext.affinity.labels._BLOCK", 7 * 50)
        assert torch.equal(pairwise_ssim(a, b), whole)

    def test_counts_are_exact_beyond_float32(self):
        """An odd number above 2 ** 24 is none that float32 has."""
        label = np.ones((3, 2**23), dtype=np.uint8)
        label[0, 0] = 0
        assert _overlaps([label], [label]) == 3 * 2**23 - 1

    def test_symmetric_and_permutes_with_its_lists(self, rng):
        a, b = blobs(rng, 4, (11, 9, 8)), blobs(rng, 3, (11, 9, 8))
        values = pairwise_ssim(a, b)
        assert torch.equal(pairwise_ssim(b, a), values.T)
        order = rng.permutation(4)
        assert torch.equal(pairwise_ssim([a[i] for i in order], b), values[order])
        itself = pairwise_ssim(a, a)
        assert torch.equal(itself, itself.T)
        assert torch.equal(itself, pairwise_ssim(a, list(a)))

    def test_bounds_and_the_value_with_itself(self, rng):
        labels = blobs(rng, 6, (7, 6, 5))
        n = labels[0].size
        values = pairwise_ssim(labels, labels)
        assert values.min() > -1
        assert values.max() <= 1 + 1 / (n - 1)
        variance = np.array([label.var() for label in labels])
        own = (2 * variance * n / (n - 1) + 0.09) / (2 * variance + 0.09)
        np.testing.assert_allclose(values.diagonal(), own, rtol=1e-13)
        assert (own > 1).all()
        textbook = pairwise_ssim(labels, labels, covariance_ddof=0)
        np.testing.assert_allclose(textbook.diagonal(), 1, rtol=1e-13)
        assert textbook.max() < 1 + 1e-13

    def test_empty_and_full_volumes(self):
        empty, full = np.zeros((4, 5)), np.ones((4, 5))
        values = pairwise_ssim([empty, full], [empty, full])
        np.testing.assert_allclose(values, [[1, 0.09 / 1.09], [0.09 / 1.09, 1]], rtol=1e-13)

    @pytest.mark.parametrize("device", DEVICES)
    def test_any_kind_of_volume(self, rng, device):
        labels = blobs(rng, 3, (8, 7, 6))
        expected = pairwise_ssim(labels, labels).to(device)
        tensors = [torch.from_numpy(label).to(device) for label in labels]
        kinds = {
            "iterator": (label for label in labels),
            "array": np.stack(labels),
            "bool": [label.astype(bool) for label in labels],
            "half": [tensor.half() for tensor in tensors],
            "bfloat16": [tensor.bfloat16() for tensor in tensors],
            "int64": [tensor.long() for tensor in tensors],
            "nested lists": [label.tolist() for label in labels],
            "channel": [MetaTensor(tensor[None]) for tensor in tensors],
            "strided": [np.asfortranarray(label) for label in labels],
            "gradients": [tensor.float().requires_grad_() for tensor in tensors],
        }
        for kind, given in kinds.items():
            values = pairwise_ssim(given, tensors)
            assert type(values) is torch.Tensor, kind
            assert torch.equal(values, expected), kind

    def test_a_2d_image_may_have_a_channel(self, rng):
        labels = blobs(rng, 3, (8, 7))
        assert torch.equal(pairwise_ssim([label[None] for label in labels], labels), pairwise_ssim(labels, labels))

    def test_inputs_stay_as_they_are(self, rng):
        labels = blobs(rng, 3, (8, 7, 6))
        for label in labels:
            label.flags.writeable = False
        pairwise_ssim(labels, labels, window=3)

    def test_different_shapes_are_resampled_with_a_warning(self, rng):
        small, large = blobs(rng, 2, (6, 10, 4)), blobs(rng, 2, (9, 5, 8))
        grid = (9, 10, 8)
        with pytest.warns(UserWarning, match=r"2 different shapes.*\(9, 10, 8\), nearest"):
            values = pairwise_ssim(small, large)
        on_grid = [
            [resize(label, grid, order=0, anti_aliasing=False, preserve_range=True) for label in labels]
            for labels in (small, large)
        ]
        np.testing.assert_allclose(values, pairwise_ssim(*on_grid), rtol=1e-13)
        with pytest.warns(UserWarning, match="different shapes"):
            assert torch.equal(pairwise_ssim(large, small), values.T)


class TestWindowedSSIM:
    @pytest.mark.parametrize("window", [3, 7, "gaussian"])
    @pytest.mark.parametrize("shape", [(19, 13, 16), (31, 24)])
    def test_equals_scikit_image(self, rng, window, shape):
        a, b = blobs(rng, 4, shape), blobs(rng, 3, shape)
        k1, k2 = rng.uniform(0.01, 0.5, 2)
        how = {"win_size": window}
        if window == "gaussian":
            how = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
        expected = [
            [structural_similarity(x.astype(float), y.astype(float), data_range=1, K1=k1, K2=k2, **how) for y in b]
            for x in a
        ]
        np.testing.assert_allclose(pairwise_ssim(a, b, k1=k1, k2=k2, window=window), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("window", [7, "gaussian"])
    def test_labels_at_every_border(self, window):
        """The window has to look as far as the border lets it, and no farther."""
        shape = (15, 14, 13)
        labels = []
        for corner in product((0, -1), repeat=3):
            labels.append(np.zeros(shape))
            labels[-1][corner] = 1
        how = {"win_size": 7} if window == 7 else {"gaussian_weights": True, "use_sample_covariance": False}
        expected = [[structural_similarity(x, y, data_range=1, **how) for y in labels] for x in labels]
        result = pairwise_ssim(labels, labels, k1=0.01, k2=0.03, window=window)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)

    def test_symmetric_and_1_with_itself(self, rng):
        labels = [*blobs(rng, 4, (12, 11, 9)), np.zeros((12, 11, 9))]
        values = pairwise_ssim(labels, labels, window=5)
        np.testing.assert_allclose(values.diagonal(), 1, rtol=1e-12)
        np.testing.assert_allclose(values, pairwise_ssim(labels, list(labels), window=5), rtol=1e-12)
        assert torch.equal(values, values.T)
        assert values.max() <= 1 + 1e-12


class TestMeanLabelDice:
    def test_one_volume_a_side_is_dice(self, rng):
        a, b = blobs(rng, 1, (9, 8, 7)), blobs(rng, 1, (9, 8, 7))
        expected = 2 * (a[0] & b[0]).sum() / (a[0].sum() + b[0].sum())
        assert mean_label_dice(a, b).item() == pytest.approx(expected)

    def test_equals_a_plain_loop(self, rng):
        a, b = blobs(rng, 4, (9, 8)), blobs(rng, 3, (9, 8))
        above = below = 0.0
        for place in np.ndindex(9, 8):
            mean_a, mean_b = sum(int(v[place]) for v in a) / 4, sum(int(v[place]) for v in b) / 3
            above += 2 * mean_a * mean_b
            below += mean_a**2 + mean_b**2
        assert mean_label_dice(a, iter(b)).item() == pytest.approx(above / below)
        assert mean_label_dice(b, a) == mean_label_dice(a, b)

    def test_1_for_equal_means_and_0_for_labels_apart(self, rng):
        labels = blobs(rng, 5, (9, 8, 7))
        assert mean_label_dice(labels, labels[::-1]) == 1
        left, right = np.zeros((4, 6)), np.zeros((4, 6))
        left[:, :3], right[:, 3:] = 1, 1
        assert mean_label_dice([left], [right]) == 0

    def test_shapes_may_differ_within_a_set(self, rng):
        small, large = blobs(rng, 2, (4, 10)), blobs(rng, 3, (8, 5))
        doubled = [np.repeat(label, 2, axis=0) for label in small], [np.repeat(label, 2, axis=1) for label in large]
        together = mean_label_dice([*doubled[0], *doubled[1]], doubled[0])
        with pytest.warns(UserWarning, match="2 different shapes"):
            assert mean_label_dice([*small, *large], small).item() == pytest.approx(together.item())

    def test_nothing_labelled(self):
        empty, label = np.zeros((4, 4)), np.eye(4)
        assert mean_label_dice([empty], [label]) == 0
        with pytest.warns(UserWarning, match="no labelled voxel"):
            assert mean_label_dice([empty], [empty, empty]) == 1


def reference_scores(image, size, variance, standardize):
    """SeqTran's steps by the libraries, one after the other."""
    image = np.array(image, dtype=float)
    if standardize:
        inside = image != 0
        image[inside] = stats.zscore(image[inside])
    rows = resize(image, (size,) * image.ndim, order=1).reshape(-1, size)
    components = PCA(variance, svd_solver="full").fit(rows)
    loadings = components.components_
    signs = [np.sign(max(loading, key=abs)) for loading in loadings]
    return ((rows - rows.mean(0)) @ loadings.T * signs).ravel()


class TestWasserstein:
    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize(("shapes", "size"), [(((20, 26, 9), (12, 9, 17)), 16), (((40, 25), (21, 30)), 24)])
    def test_equals_the_libraries(self, rng, standardize, shapes, size):
        a, b = ([*images_of(rng, 1, shape), *images_of(rng, 1, shape, background=False)] for shape in shapes)
        scores = [[reference_scores(image, size, 0.6, standardize) for image in images] for images in (a, b)]
        expected = [[stats.wasserstein_distance(x, y) for y in scores[1]] for x in scores[0]]
        result = pairwise_wasserstein(a, b, size=size, variance=0.6, standardize=standardize)
        np.testing.assert_allclose(result, expected, rtol=2e-3)  # few scores; see the next test
        assert (result.numpy() <= np.multiply(expected, 1 + 1e-9)).all()

    def test_images_that_differ_much_or_have_many_scores(self, rng):
        a, b = images_of(rng, 2, (40, 30, 35)), [5 * image for image in images_of(rng, 2, (40, 30, 35))]
        scores = [[reference_scores(image, 40, 0.75, False) for image in images] for images in (a, b)]
        expected = [[stats.wasserstein_distance(x, y) for y in scores[1]] for x in scores[0]]
        result = pairwise_wasserstein(a, b, size=40, standardize=False)
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_quantiles_are_exact_but_where_functions_cross(self, rng):
        for n, m in ((16384, 16384), (3 * 16384, 16384), (3000, 20000)):
            x, y = rng.normal(0, 1, n), rng.normal(0.1, 1.5, m)
            quantiles = [_mass_quantiles(values, QUANTILES)[None] for values in (x, y)]
            exact = stats.wasserstein_distance(x, y)
            assert quantile_distance(*quantiles).item() == pytest.approx(exact, rel=1e-4)
            shifted = _mass_quantiles(x + 10, QUANTILES)[None]
            assert quantile_distance(quantiles[0], shifted).item() == pytest.approx(10, rel=1e-12)

    def test_quantiles_average_to_zero(self, rng):
        quantiles = image_quantiles(images_of(rng, 2, (10, 9, 8)), size=8)
        assert quantiles.shape == (2, QUANTILES)
        assert quantiles.diff(dim=1).min() > -1e-10
        np.testing.assert_allclose(quantiles.mean(1), 0, atol=1e-10)

    def test_a_metric(self, rng):
        images = images_of(rng, 4, (10, 9, 8))
        values = pairwise_wasserstein(images, images, size=8)
        assert (values.diagonal() == 0).all()
        assert torch.equal(values, values.T)
        assert (values[0, 1] + values[1, 2] >= values[0, 2] - 1e-12).all()
        order = rng.permutation(4)
        other = pairwise_wasserstein([images[i] for i in order], images, size=8)
        np.testing.assert_allclose(other, values[order], rtol=1e-12)

    def test_kept_quantiles_give_the_same(self, rng):
        a, b = images_of(rng, 2, (10, 9, 8)), images_of(rng, 3, (7, 9, 8))
        kept = image_quantiles(iter(a), size=8), image_quantiles(iter(b), size=8)
        assert torch.equal(quantile_distance(*kept), pairwise_wasserstein(a, b, size=8))

    def test_scale(self, rng):
        a, b = images_of(rng, 2, (10, 9, 8)), images_of(rng, 2, (10, 9, 8))
        raw = pairwise_wasserstein(a, b, size=8, standardize=False)
        for factor in (1e8, 1e-8):
            scaled = [[factor * image for image in images] for images in (a, b)]
            np.testing.assert_allclose(pairwise_wasserstein(*scaled, size=8, standardize=False), factor * raw)
            np.testing.assert_allclose(pairwise_wasserstein(*scaled, size=8), pairwise_wasserstein(a, b, size=8))

    def test_an_offset_goes_away(self, rng):
        images = images_of(rng, 2, (10, 9, 8), background=False)
        shifted = [image + 1e8 for image in images]
        values = pairwise_wasserstein(images, images, size=8, standardize=False)
        np.testing.assert_allclose(pairwise_wasserstein(shifted, shifted, size=8, standardize=False), values, rtol=1e-5)

    @pytest.mark.parametrize("device", DEVICES)
    def test_any_kind_of_image(self, rng, device):
        images = [np.rint(image / 10) for image in images_of(rng, 2, (10, 9, 8))]
        expected = pairwise_wasserstein(images, images, size=8, standardize=False).to(device)
        tensors = [torch.from_numpy(image).to(device) for image in images]
        for given in (
            (tensor for tensor in tensors),
            [tensor.half() for tensor in tensors],  # whose squares overflow
            [MetaTensor(tensor[None]).requires_grad_() for tensor in tensors],
            [tensor.int() for tensor in tensors],
            [np.asfortranarray(image) for image in images],
        ):
            values = pairwise_wasserstein(given, tensors, size=8, standardize=False)
            assert values.device == expected.device
            np.testing.assert_allclose(values.cpu(), expected.cpu(), rtol=1e-10)

    def test_inputs_stay_as_they_are(self, rng):
        images = images_of(rng, 2, (10, 9, 8), background=False)
        copies = [image.copy() for image in images]
        pairwise_wasserstein(images, images, size=10)
        assert all(np.array_equal(image, copy) for image, copy in zip(images, copies, strict=True))

    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize("level", [0.0, 7.0, 1e8])
    def test_without_contrast(self, rng, level, standardize):
        images = images_of(rng, 1, (10, 9, 8))
        with pytest.warns(UserWarning, match=r"images_a\[0\] has no contrast"):
            value = pairwise_wasserstein([np.full((10, 9, 8), level)], images, size=8, standardize=standardize)
        expected = image_quantiles(images, size=8, standardize=standardize).abs().mean()
        np.testing.assert_allclose(value.item(), expected.item())


class TestTaskAffinity:
    def test_formula(self, rng):
        distance, similarity = rng.uniform(0, 300, (4, 5)), rng.uniform(-1, 1, (4, 5))
        expected = 0.0044 * distance - 2.4756 * similarity + 2.4756
        np.testing.assert_allclose(task_affinity(distance, torch.from_numpy(similarity)), expected, rtol=1e-12)
        np.testing.assert_allclose(task_affinity(distance, similarity, alpha=2, beta=0), 2 * distance)
        assert task_affinity(10.0, 0.5, alpha=1, beta=2).item() == 11

    def test_no_cost_is_negative(self, rng):
        labels = blobs(rng, 3, (8, 7, 6))
        similarity = pairwise_ssim(labels, labels)
        assert similarity.max() > 1
        assert task_affinity(torch.zeros_like(similarity), similarity).min() == 0


def correlation(cost, performance):
    return np.corrcoef(cost, performance)[0, 1]


class TestFitWeights:
    def test_recovers_weights(self, rng):
        distance, similarity = rng.uniform(0, 300, (6, 5)), rng.uniform(0, 1, (6, 5))
        performance = 0.8 - 0.002 * distance - 0.7 * (1 - similarity)
        assert fit_affinity_weights(distance, similarity, performance) == pytest.approx((0.002, 0.7))

    @pytest.mark.parametrize("trial", range(8))
    @pytest.mark.filterwarnings("ignore:No weights")
    def test_no_other_direction_is_better(self, rng, trial):
        """Also where both weights, or one, would have to be negative: random performance has all four cases."""
        distance, similarity, performance = rng.uniform(0, 50, 12), rng.uniform(0, 1, 12), rng.uniform(0, 1, 12)
        weights = fit_affinity_weights(distance, similarity, performance)
        assert min(weights) >= 0
        found = correlation(np.dot(weights, [distance, 1 - similarity]), performance)
        for angle in np.linspace(0, np.pi / 2, 500):
            cost = np.cos(angle) * distance / 50 + np.sin(angle) * (1 - similarity)
            assert found <= correlation(cost, performance) + 1e-9

    def test_each_sign(self):
        distance, similarity = np.array([1.0, 2, 3, 4, 2, 3]), np.array([0.5, 0.9, 0.1, 0.5, 0.2, 0.7])
        worse = 1 - similarity
        assert fit_affinity_weights(distance, similarity, -distance + 0.1 * worse)[1] == 0
        assert fit_affinity_weights(distance, similarity, 0.1 * distance - worse)[0] == 0
        with pytest.warns(UserWarning, match="No weights >= 0"):
            weights = fit_affinity_weights(distance, similarity, distance + worse)
        assert min(weights) >= 0
        assert max(weights) > 0

    def test_units_do_not_matter(self, rng):
        distance, similarity = rng.uniform(0, 300, 9), rng.uniform(0, 1, 9)
        performance = 0.8 - 0.002 * distance - 0.7 * (1 - similarity) + rng.normal(0, 0.1, 9)
        alpha, beta = fit_affinity_weights(distance, similarity, performance)
        for unit in (1e8, 1e-8):
            assert fit_affinity_weights(unit * distance, similarity, performance) == pytest.approx((alpha / unit, beta))
            assert fit_affinity_weights(distance, similarity, unit * performance) == pytest.approx(
                (unit * alpha, unit * beta)
            )

    def test_something_constant(self, rng):
        varies = rng.uniform(0, 1, 6)
        assert fit_affinity_weights(np.full(6, 3.1), varies, 2 * varies) == pytest.approx((0, 2))
        assert fit_affinity_weights(varies, np.full(6, 0.3), 5 - 2 * varies) == pytest.approx((2, 0))
        for constant in ((varies, varies, np.full(6, 0.1)), (np.full(6, 0.1), np.full(6, 0.7), varies)):
            with pytest.warns(UserWarning, match="published ones"):
                assert fit_affinity_weights(*constant) == PUBLISHED_WEIGHTS

    def test_what_varies_by_rounding_alone_is_constant(self, rng):
        varies, noise = rng.uniform(0, 1, 6), np.array([0, 1, -1, 2, 0, -2]) * 1e-16
        assert fit_affinity_weights(varies, 0.3 + noise, 5 - 2 * varies) == pytest.approx((2, 0))
        assert fit_affinity_weights(300 + 1e3 * noise, varies, 2 * varies) == pytest.approx((0, 2))
        with pytest.warns(UserWarning, match="published ones"):
            assert fit_affinity_weights(varies, varies, 0.1 + noise) == PUBLISHED_WEIGHTS

    def test_rank_correlation(self, rng):
        pytest.importorskip("optuna")
        distance, similarity = rng.uniform(0, 300, 15), rng.uniform(0, 1, 15)
        cost = 0.01 * distance + 1 - similarity
        performance = np.exp(-3 * cost)  # monotone, far from linear
        weights = fit_affinity_weights(distance, similarity, performance, method="bayes")
        assert weights == fit_affinity_weights(distance, similarity, performance, method="bayes")
        rank = [
            stats.spearmanr(np.dot(w, [distance, 1 - similarity]), performance).statistic
            for w in (weights, fit_affinity_weights(distance, similarity, performance))
        ]
        assert rank[0] <= rank[1]
        assert rank[0] < -0.97

    def test_rank_correlation_with_one_constant(self, rng):
        pytest.importorskip("optuna")
        varies = rng.uniform(0, 1, 6)
        assert fit_affinity_weights(np.full(6, 3.1), varies, 2 * varies, method="bayes") == pytest.approx((0, 2))

    def test_without_optuna(self, rng, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(InputError, match="needs Optuna: pip install optuna"):
            fit_affinity_weights(rng.uniform(0, 1, 5), rng.uniform(0, 1, 5), rng.uniform(0, 1, 5), method="bayes")


def box(shape, *sides):
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(*side) for side in sides)] = 1
    return label


def described(label, spacing=1.0, **options):
    row = shape_descriptors([label], spacing, **options)[0].tolist()
    return dict(zip(SHAPE_DESCRIPTORS[np.ndim(label)], row, strict=True))


class TestShapeDescriptors:
    def test_by_hand(self):
        """A box of 4 x 8 x 6 mm: a side of length L has the variance L^2 / 12."""
        found = described(box((10, 10, 10), (1, 3), (2, 6), (4, 7)), (2, 2, 2))
        expected = {
            "log_volume": np.log(4 * 8 * 6),
            "log_components": 0,
            "elongation": np.log(8 / 6),
            "flatness": np.log(6 / 4),
            "compactness": -np.log(4 / 3 * np.pi * (5 / 12) ** 1.5),
            "centre_0": (2 - 5) / 10,
            "centre_1": (4 - 5) / 10,
            "centre_2": (5.5 - 5) / 10,
        }
        assert found == pytest.approx(expected)

    def test_equals_regionprops(self, rng):
        label = blobs(rng, 1, (30, 40))[0]
        region = regionprops(label)[0]
        found = described(label)
        major, minor = np.sqrt(np.array(region.inertia_tensor_eigvals) + 1 / 12)  # scikit-image's pixels are points
        assert found["elongation"] == pytest.approx(np.log(major / minor))
        ellipse = np.pi * 4 * major * minor
        assert found["compactness"] == pytest.approx(np.log(region.area / ellipse))
        assert found["centre_1"] == pytest.approx((region.centroid[1] + 0.5) / 40 - 0.5)

    def test_shapes_are_told_apart(self):
        axes = np.meshgrid(*[np.arange(41) - 20] * 3, indexing="ij")
        radius = np.sqrt(sum(axis**2 for axis in axes))
        ball, shell = described(radius < 15), described((radius < 15) & (radius > 12))
        rod, plate = (
            described(box((41,) * 3, (19, 22), (5, 35), (19, 22))),
            described(box((41,) * 3, (5, 35), (5, 35), (19, 22))),
        )
        assert ball["compactness"] == pytest.approx(0, abs=0.01)
        assert shell["compactness"] < ball["compactness"] - 0.5
        assert ball["elongation"] == pytest.approx(0, abs=1e-9)
        assert rod["elongation"] > 2
        assert rod["flatness"] == pytest.approx(0, abs=1e-9)
        assert plate["flatness"] > 2
        assert plate["elongation"] == pytest.approx(0, abs=1e-9)

    def test_components_share_corners(self):
        label = np.zeros((6, 6), dtype=bool)
        label[0, 0] = label[1, 1] = label[4, 4] = True
        assert described(label)["log_components"] == pytest.approx(np.log(2))

    def test_resolution_and_axes(self, rng):
        label = blobs(rng, 1, (10, 12, 9))[0]
        fine = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        assert described(fine, 0.5) == pytest.approx(described(label))
        slices = label.repeat(3, 2)
        assert described(slices, (1, 1, 1 / 3)) == pytest.approx(described(label))
        turned = described(label.transpose(2, 0, 1))
        for name, value in described(label).items():
            other = {"centre_0": "centre_1", "centre_1": "centre_2", "centre_2": "centre_0"}.get(name, name)
            assert turned[other] == pytest.approx(value)

    def test_place_in_the_body(self):
        label = box((20, 20), (6, 8), (12, 14))
        body = box((20, 20), (4, 14), (5, 15))
        found = described(label, bodies=[body])
        assert (found["centre_0"], found["centre_1"]) == pytest.approx((-0.2, 0.3))

    def test_one_voxel(self):
        found = described(box((5, 5, 5), (2, 3), (2, 3), (2, 3)))
        assert np.isfinite(list(found.values())).all()
        assert found["log_volume"] == 0

    def test_nothing_labelled(self):
        labels = [np.zeros((4, 4)), np.eye(4)]
        with pytest.warns(UserWarning, match=r"Nothing is labelled in labels\[0\]"):
            rows = shape_descriptors(labels)
        assert rows[0].isnan().all()
        assert torch.equal(rows[1:], shape_descriptors(labels[1:]))

    def test_spacing_per_volume(self, rng):
        labels = blobs(rng, 2, (6, 7))
        rows = shape_descriptors(labels, [(1, 2), (3, 4)])
        assert torch.equal(rows[1], shape_descriptors(labels[1:], (3, 4))[0])


class TestShapeSimilarity:
    def test_by_hand(self):
        a, b = np.zeros((1, 6)), np.zeros((2, 6))
        b[:, 0] = (2, 6)  # on average two units of 2 away
        b[:, 5] = (0.1, 0.1)  # one unit of 0.1
        assert shape_similarity(a, b).item() == pytest.approx(np.exp(-(2 + 1) / 6))
        assert shape_similarity(b, a) == shape_similarity(a, b)
        assert shape_similarity(a, b, scales=np.ones(6)).item() == pytest.approx(np.exp(-(4 + 0.1) / 6))

    def test_falls_with_every_difference(self, rng):
        a = rng.normal(0, 1, (4, 8))
        assert shape_similarity(a, a[::-1].copy()).item() == pytest.approx(1)
        values = [shape_similarity(a, a + step).item() for step in (0, 0.1, 0.5, 2)]
        assert all(first > second for first, second in pairwise(values))
        assert values[-1] > 0

    def test_every_descriptor_has_a_scale(self):
        assert set(SHAPE_DESCRIPTORS[2]) < set(SHAPE_DESCRIPTORS[3]) == set(SHAPE_SCALES)

    def test_patients_without_roi_are_left_out(self, rng):
        a, b = rng.normal(0, 1, (3, 6)), rng.normal(0, 1, (2, 6))
        with_empty = np.vstack([a, np.full((1, 6), np.nan)])
        assert shape_similarity(with_empty, b) == shape_similarity(a, b)
        with pytest.warns(UserWarning, match="descriptors_b describes no shape"):
            assert shape_similarity(a, with_empty[3:]) == 0


class TestContext:
    def test_0_with_itself_and_symmetric(self, rng):
        a, b = head(rng), head(rng, lesion=5, bright=-80)
        assert context_affinity(*a, *a) == 0
        assert context_affinity(*a, *b) == context_affinity(*b, *a) > 0

    def test_each_term(self, rng):
        """A change of contrast, of size, of place and of tissue, seen by the term that is to see it."""
        images, labels = head(rng, n=1)
        brighter = [image + 200 * label for image, label in zip(images, labels, strict=True)]
        inner = [binary_erosion(label) for label in labels]
        moved = [np.roll(volume, 2, axis=1) for volume in (images[0], labels[0])]

        def term(weights, *other):
            return context_affinity(images, labels, *other, weights=weights).item()

        intensity, shape, body = np.eye(3)
        assert term(intensity, brighter, labels) > 0.5
        assert term(shape, brighter, labels) == 0
        assert 0 < term(shape, images, inner) <= 1
        assert term(body, images, inner) == 0
        assert term(shape, [moved[0]], [moved[1]]) == pytest.approx(0, abs=1e-12)
        assert term((1, 1, 1), [moved[0]], [moved[1]]) == pytest.approx(0, abs=1e-9)
        assert term(body, [image**2 for image in images], labels) > 0
        scaled = [3 * image for image in images]
        assert term((1, 1, 1), scaled, labels) == pytest.approx(0, abs=1e-9)

    def test_intensity_by_scipy(self, rng):
        """One patient, slices of 2 mm, RoI at the rim of the body: distances between the voxels of each part."""
        (a,), (label_a,) = head(rng, n=1, offset=8)
        (b,), (label_b,) = head(rng, n=1, offset=8, bright=60, lesion=4)

        def parts(image, label):
            inside = image != 0
            scores = (image - image[inside].mean()) / image[inside].std()
            around = np.argwhere(inside & ~label)
            roi = np.argwhere(label) * (1, 1, 2)
            near = np.array([np.sqrt(((roi - place * (1, 1, 2)) ** 2).sum(1).min()) <= 3 for place in around])
            return scores[label], scores[tuple(around[near].T)], scores[inside]

        expected = [stats.wasserstein_distance(x, y) for x, y in zip(parts(a, label_a), parts(b, label_b), strict=True)]
        spacings = {"spacing_a": (1, 1, 2), "spacing_b": (1, 1, 2)}
        value = context_affinity([a], [label_a], [b], [label_b], **spacings, ring=3, weights=(0.5, 0, 0.25)).item()
        assert value == pytest.approx(0.25 * (expected[0] + expected[1]) + 0.25 * expected[2], rel=0.02)

    def test_beyond_the_border_there_is_no_roi(self, rng):
        images, labels = head(rng, n=1, offset=11)
        assert labels[0][-1].any()
        padded = [[np.pad(volume, 3)] for volume in (images[0], labels[0])]
        assert context_affinity(images, labels, *padded, weights=(1, 1, 1)).item() == pytest.approx(0, abs=1e-12)

    def test_shape_by_hand(self):
        """Squares of 8 and 4 mm a side around one centre, at two resolutions: Dice is 2 * 16 / (64 + 16)."""
        image = np.arange(1.0, 4097).reshape(64, 64)
        a, b = box((64, 64), (10, 42), (20, 52)), box((64, 64), (12, 44), (15, 47))
        spacings = {"spacing_a": 0.25, "spacing_b": [(0.125, 0.125)]}
        value = context_affinity([image], [a], [image], [b], **spacings, ring=1, crop=12, weights=(0, 1, 0)).item()
        assert value == pytest.approx(1 - 0.4, abs=0.01)

    def test_pairs_equal_single_calls(self, rng):
        tasks = [head(rng), head(rng, lesion=5, bright=-80), head(rng, shape=(20, 20, 24))]
        contexts = [task_context(*task) for task in tasks]
        values = pairwise_context(contexts[:2], contexts)
        assert values.shape == (2, 3)
        for (i, a), (j, b) in product(enumerate(tasks[:2]), enumerate(tasks)):
            assert values[i, j].item() == pytest.approx(context_affinity(*a, *b).item())
        again = [task_context(iter(images[::-1]), iter(labels[::-1])) for images, labels in tasks]
        np.testing.assert_allclose(pairwise_context(contexts, again), pairwise_context(contexts, contexts), atol=1e-12)

    def test_regions_outside_the_crop(self, rng):
        """Two regions so far apart that neither lies in the box around their middle."""
        image = np.arange(1.0, 60 * 4 * 4 + 1).reshape(60, 4, 4)
        far = np.zeros(image.shape, bool)
        far[[0, -1]] = True
        near = np.zeros(image.shape, bool)
        near[28:32] = True
        options = {"spacing_a": 4, "spacing_b": 4, "crop": 96, "weights": (0, 1, 0)}
        assert context_affinity([image], [far], [image], [far], **options) == 0
        assert context_affinity([image], [far], [image], [near], **options).item() == pytest.approx(1)

    def test_a_patient_without_roi_counts_for_the_body_only(self, rng):
        images, labels = head(rng)
        other, _ = head(rng, n=1, level=50)
        less, more = task_context(images, labels), task_context([*images, *other], [*labels, np.zeros(other[0].shape)])
        for part in ("roi", "ring", "crop"):
            np.testing.assert_array_equal(getattr(less, part), getattr(more, part))
        assert not np.array_equal(less.body, more.body)

    def test_2d_and_tensors(self, rng):
        images, labels = head(rng, shape=(24, 30))
        expected = task_context(images, labels)
        tensors = task_context(map(torch.from_numpy, images), [torch.from_numpy(label)[None] for label in labels])
        np.testing.assert_array_equal(tensors.crop, expected.crop)
        np.testing.assert_array_equal(tensors.roi, expected.roi)


class TestBadInput:
    """Each is refused with the name of the argument."""

    good = [np.eye(4), np.ones((4, 4))]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([], "labels_b is empty"),
            (iter(()), "labels_b is empty"),
            (None, "labels_b is NoneType"),
            ("labels.nii.gz", "labels_b is str"),
            ([np.eye(4), np.eye(4) * 4], r"labels_b\[1\] holds 4; expected 0 and 1 only, one class.*labels == 4"),
            ([np.eye(4) * 0.5], r"labels_b\[0\] holds 0.5"),
            ([-np.eye(4)], r"labels_b\[0\] holds -1"),
            ([np.eye(4) * np.nan], r"labels_b\[0\] holds nan; expected 0 and 1 only\."),
            ([np.eye(4, dtype=np.uint8) * 3], r"labels_b\[0\] holds 3"),
            ([np.zeros((4, 4, 4))], r"labels_b\[0\] is 3D, but labels_a\[0\] is 2D"),
            ([np.zeros((2, 2, 4, 4))], r"labels_b\[0\] has shape \(2, 2, 4, 4\)"),
            (np.eye(4), r"labels_b\[0\] has shape \(4,\).*each item of a list"),
            ([np.zeros((0, 4))], r"labels_b\[0\] has shape \(0, 4\)"),
            ([np.zeros((1, 1, 1))], r"labels_b\[0\] has shape \(1, 1, 1\).*two voxels"),
            ([[[0, 1], [1]]], r"labels_b\[0\] cannot be read"),
            ([np.eye(4) * 1j], r"labels_b\[0\] holds complex"),
        ],
    )
    def test_labels(self, labels, message):
        with pytest.raises(InputError, match=message):
            pairwise_ssim(self.good, labels)
        if not hasattr(labels, "__next__"):
            with pytest.raises(InputError, match=message):
                mean_label_dice(self.good, labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k1": 0}, "k1 is 0"),
            ({"k2": np.nan}, "k2 is nan"),
            ({"window": 4}, "window is 4; expected None, an odd number"),
            ({"window": 1}, "window is 1"),
            ({"window": 3.0}, "window is 3.0"),
            ({"window": True}, "window is True"),
            ({"window": "gauss"}, "did you mean 'gaussian'"),
            ({"window": 5}, r"window is 5 voxels wide, but the labels are \(4, 4\)"),
            ({"window": "gaussian"}, "window is 11 voxels wide"),
            ({"covariance_ddof": 2}, "covariance_ddof is 2"),
            ({"covariance_ddof": 0, "window": 3}, "covariance_ddof is 0; .* with a window"),
        ],
    )
    def test_ssim_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            pairwise_ssim(self.good, self.good, **options)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "images_b is empty"),
            ([np.eye(4) * np.nan], r"images_b\[0\] holds NaN or Inf"),
            ([np.eye(4), np.diag([1, 2, np.inf, 4])], r"images_b\[1\] holds NaN or Inf"),
            ([np.zeros((4, 4, 4))], r"images_b\[0\] is 3D, but images_a\[0\] is 2D"),
            ([np.zeros(4)], r"images_b\[0\] has shape \(4,\)"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.* has no contrast")
    def test_images(self, images, message):
        with pytest.raises(InputError, match=message):
            pairwise_wasserstein(self.good[:1], images, size=4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 1}, "size is 1"),
            ({"size": 8.0}, "size is 8.0"),
            ({"variance": 0}, "variance is 0"),
            ({"variance": 1.0}, "variance is 1.0"),
        ],
    )
    def test_component_settings(self, options, message):
        for function in (image_quantiles, lambda images, **how: pairwise_wasserstein(images, images, **how)):
            with pytest.raises(InputError, match=message):
                function(self.good, **options)

    def test_quantiles(self):
        with pytest.raises(InputError, match="quantiles_b has 2 columns, quantiles_a 3"):
            quantile_distance(np.zeros((2, 3)), np.zeros((2, 2)))
        with pytest.raises(InputError, match="quantiles_a has shape"):
            quantile_distance(np.zeros(3), np.zeros((2, 3)))

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (([1.0], [0.5]), {"alpha": -1}, "alpha is -1"),
            (([1.0], [0.5]), {"beta": np.inf}, "beta is inf"),
            (([-1.0], [0.5]), {}, "image_distance holds -1"),
            (([], []), {}, "image_distance holds nothing"),
            (([np.nan], [0.5]), {}, "image_distance holds nan"),
            (([1.0], [np.inf]), {}, "label_similarity holds inf"),
            (([1.0], [0.5, 0.4]), {}, r"label_similarity has shape \(2,\), image_distance \(1,\)"),
        ],
    )
    def test_cost(self, arguments, options, message):
        with pytest.raises(InputError, match=message):
            task_affinity(*arguments, **options)

    def test_fit(self):
        some = [0.1, 0.2, 0.3]
        with pytest.raises(InputError, match="did you mean 'bayes'"):
            fit_affinity_weights(some, some, some, method="bayse")
        with pytest.raises(InputError, match=r"performance has shape \(2,\)"):
            fit_affinity_weights(some, some, some[:2])
        with pytest.raises(InputError, match="at least three transfers"):
            fit_affinity_weights(some[:2], some[:2], some[:2])
        with pytest.raises(InputError, match="performance holds nan"):
            fit_affinity_weights(some, some, [0.1, np.nan, 0.2])

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (([np.eye(4) * 2],), {}, r"labels\[0\] holds 2"),
            (([],), {}, "labels is empty"),
            (([np.eye(4)], 0), {}, "spacing is 0"),
            (([np.eye(4)], (1, 1, 1)), {}, "spacing is .*a row of 2 for each"),
            (([np.eye(4), np.eye(4)], [(1, 1)]), {}, "spacing is"),
            (([np.eye(4)], (1, np.nan)), {}, "spacing is"),
            (([np.eye(4)],), {"bodies": [np.zeros((4, 4))]}, r"bodies\[0\] is zero everywhere"),
            (([np.eye(4)],), {"bodies": [np.eye(3)]}, r"bodies\[0\] has shape \(3, 3\), labels\[0\] \(4, 4\)"),
            (([np.eye(4), np.eye(4)],), {"bodies": [np.eye(4)]}, r"bodies has no volume for labels\[1\]"),
            (([np.eye(4)],), {"bodies": [np.eye(4), np.eye(4)]}, "bodies has more volumes than labels"),
        ],
    )
    def test_shapes(self, arguments, options, message):
        with pytest.raises(InputError, match=message):
            shape_descriptors(*arguments, **options)

    @pytest.mark.parametrize(
        ("a", "b", "scales", "message"),
        [
            (np.zeros((1, 6)), np.zeros((1, 8)), None, "descriptors_a has 6 columns, descriptors_b 8"),
            (np.zeros((1, 5)), np.zeros((1, 5)), None, "descriptors_a has 5 columns"),
            (np.zeros(6), np.zeros((1, 6)), None, "descriptors_a has shape"),
            (np.zeros((1, 6)), np.full((1, 6), np.inf), None, "descriptors_b holds inf"),
            (np.zeros((1, 6)), np.zeros((1, 6)), np.zeros(6), "scales is"),
            (np.zeros((1, 6)), np.zeros((1, 6)), [1.0], "scales is .* expected 6 numbers > 0"),
        ],
    )
    def test_similarity_of_shapes(self, a, b, scales, message):
        with pytest.raises(InputError, match=message):
            shape_similarity(a, b, scales=scales)

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (lambda i, y: (i, y[:-1]), {}, r"labels has no volume for images\[2\]"),
            (lambda i, y: (i[:-1], y), {}, "labels has more volumes than images"),
            (lambda i, y: (i, [y[0][1:]]), {}, r"labels\[0\] has shape"),
            (lambda i, y: ([0 * i[0]], y[:1]), {}, r"images\[0\] is zero everywhere"),
            (lambda i, y: (i, [0 * label for label in y]), {}, "labels has no labelled voxel in any volume"),
            (lambda i, y: (i, [np.ones_like(label) for label in y]), {}, "ring is 6.0 mm, within which no RoI"),
            (lambda i, y: ([i[0] * np.nan], y[:1]), {}, r"images\[0\] holds NaN"),
            (lambda i, y: (i, [2 * label.astype(int) for label in y]), {}, r"labels\[0\] holds 2"),
            (lambda i, y: (i, y), {"ring": 0}, "ring is 0"),
            (lambda i, y: (i, y), {"crop": np.inf}, "crop is inf"),
            (lambda i, y: (i, y), {"spacing": (1, 1)}, "spacing is"),
        ],
    )
    def test_context(self, rng, change, options, message):
        with pytest.raises(InputError, match=message):
            task_context(*change(*head(rng)), **options)

    def test_pairs_of_contexts(self, rng):
        flat, deep = task_context(*head(rng, shape=(20, 20))), task_context(*head(rng))
        with pytest.raises(InputError, match="mix tasks in 2D and in 3D"):
            pairwise_context([flat], [deep])
        with pytest.raises(InputError, match="contexts_b must list"):
            pairwise_context([flat], [])
        with pytest.raises(InputError, match="contexts_a must list"):
            pairwise_context(["13-T1-ED"], [flat])
        for weights in ((1, 2), (1, -1, 0), (1, np.nan, 0)):
            with pytest.raises(InputError, match="weights is"):
                pairwise_context([flat], [flat], weights=weights)
        with pytest.raises(InputError, match=r"images_b\[0\] is 3D, but images_a\[0\] is 2D"):
            context_affinity(*head(rng, shape=(20, 20)), *head(rng))
