"""Task affinity: compared with reference vectors, libraries and plain loops."""

from itertools import product

import numpy as np
import ot
import pytest
import torch
from drawing import numpy_generator
from metric_cases import DEVICES
from monai.data import MetaTensor
from scipy import optimize, stats
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from skimage.measure import regionprops
from skimage.metrics import structural_similarity
from skimage.transform import resize
from sklearn.decomposition import PCA

from medtl_ext import InputError
from medtl_ext.affinity import (
    PUBLISHED_WEIGHTS,
    SHAPE_DESCRIPTORS,
    TaskContext,
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


@pytest.fixture
def rng():
    return numpy_generator()


def ball(shape, centre, radius):
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2


def box(shape, *sides):
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(*side) for side in sides)] = 1
    return label


def blobs(rng, n, shape):
    """Labels with some extent, of very different sizes, some touching the border."""
    volumes = [ball(shape, rng.uniform(0, shape), rng.uniform(1.5, 0.4 * min(shape))) for _ in range(n)]
    for volume in volumes:
        volume[tuple(rng.integers(0, shape))] = True  # never empty
    return [volume.astype(np.uint8) for volume in volumes]


def images_of(rng, n, shape, background=True):
    images = [rng.normal(100, 30, shape).cumsum(-1) * rng.uniform(0.5, 2) for _ in range(n)]
    for image in images if background else ():
        image[: shape[0] // 4] = image[shape[0] // 2] = 0  # around the body, and in it
    return images


def head(rng, shape=(24, 26, 20), lesion=3.0, level=200.0, bright=150.0, n=3, offset=0):
    """Images of a noisy ellipsoid, brighter towards the top, with a bright ball in it, and the ball's labels."""
    images, labels, tissue = [], [], level * np.linspace(1, 2, shape[-1])
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    inside = sum((2 * (x - s / 2) / (0.9 * s)) ** 2 for x, s in zip(axes, shape, strict=True)) < 1
    for _ in range(n):
        centre = np.divide(shape, 2) + rng.uniform(-2, 2, len(shape))
        centre[0] += offset
        labels.append(ball(shape, centre, lesion))
        images.append(np.where(inside, rng.normal(tissue, 0.1 * level, shape) + bright * labels[-1], 0))
    return images, labels


class TestReferenceVectors:
    @pytest.mark.parametrize(("name", "how"), [("K0.3", {}), ("skimage_win7", {"k1": 0.01, "k2": 0.03, "window": 7})])
    def test_ssim(self, vectors, name, how):
        data = vectors("seqtran")
        labels = [data[f"lab{i}"] for i in range(5)]
        np.testing.assert_allclose(pairwise_ssim(labels, labels, **how), data[f"ssim_{name}"], rtol=0, atol=1e-13)

    def test_wasserstein(self, vectors):
        data = vectors("seqtran")
        images = [data[f"vol{i}"] for i in range(3)]
        distances = pairwise_wasserstein(images, images, standardize=False)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert distances[i, j].item() == pytest.approx(data[f"wass_{i}_{j}"], rel=1e-6)


def plain_ssim(a, b, k1=0.3, k2=0.3):
    mean_a, mean_b, both = a.mean(), b.mean(), (a.astype(bool) & b.astype(bool)).mean()
    covariance = (both - mean_a * mean_b) * a.size / (a.size - 1)
    luminance = (2 * mean_a * mean_b + k1**2) / (mean_a**2 + mean_b**2 + k1**2)
    return luminance * (2 * covariance + k2**2) / (mean_a * (1 - mean_a) + mean_b * (1 - mean_b) + k2**2)


def small_wasserstein(a, b):
    return pairwise_wasserstein(a, b, size=8, standardize=False)


class TestVolumes:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("shape", [(8, 7, 6), (8, 7)])
    @pytest.mark.parametrize("function", [pairwise_ssim, small_wasserstein])
    def test_of_any_kind(self, rng, device, shape, function):
        labels = blobs(rng, 3, shape)
        expected = function(labels, labels).to(device)
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
            values = function(given, tensors)
            assert type(values) is torch.Tensor, kind
            assert torch.equal(values, expected), kind

    def test_stay_as_they_are(self, rng):
        labels, images = blobs(rng, 3, (8, 7, 6)), images_of(rng, 2, (10, 9, 8), background=False)
        for volume in (*labels, *images):
            volume.flags.writeable = False
        pairwise_ssim(labels, labels, window=3)
        pairwise_wasserstein(images, images, size=10)


class TestGlobalSSIM:
    @pytest.mark.parametrize("shape", [(11, 9, 8), (13, 17)])
    def test_equals_a_plain_loop(self, rng, shape):
        a = blobs(rng, 4, shape)
        b = [*blobs(rng, 3, shape), a[0]]  # with itself it is more than 1
        k1, k2 = rng.uniform(0.01, 0.5, 2)
        expected = [[plain_ssim(x, y, k1, k2) for y in b] for x in a]
        np.testing.assert_allclose(pairwise_ssim(a, b, k1=k1, k2=k2), expected, rtol=0, atol=1e-13)

    def test_counts_are_exact_in_blocks_and_beyond_float32(self, rng):
        """Float32 has no odd number above 2 ** 24; one voxel more or less would show in the seventh digit."""
        shape = (3, 2**23)
        a, b = (rng.integers(0, 20, shape, dtype=np.uint8) > 0 for _ in range(2))
        a[0, 0] = b[0, 0] = True
        b[0, 0] = np.count_nonzero(a & b) % 2
        assert np.count_nonzero(a & b) > 2**24
        assert pairwise_ssim([a], [b]).item() == pytest.approx(plain_ssim(a, b), rel=1e-9)

    def test_symmetric(self, rng):
        a, b = blobs(rng, 4, (11, 9, 8)), blobs(rng, 3, (11, 9, 8))
        assert torch.equal(pairwise_ssim(b, a), pairwise_ssim(a, b).T)
        itself = pairwise_ssim(a, a)
        assert torch.equal(itself, itself.T)
        assert torch.equal(itself, pairwise_ssim(a, list(a)))

    def test_empty_and_full_volumes(self):
        volumes = [np.zeros((4, 5)), np.ones((4, 5))]
        values = pairwise_ssim(volumes, volumes)
        np.testing.assert_allclose(values, [[1, 0.09 / 1.09], [0.09 / 1.09, 1]], rtol=1e-13)

    def test_different_shapes_are_resampled_with_a_warning(self, rng):
        sides = blobs(rng, 2, (6, 10, 4)), blobs(rng, 2, (9, 5, 8))
        grid = (9, 10, 8)
        with pytest.warns(UserWarning, match=r"2 different shapes.*\(9, 10, 8\), nearest"):
            values = pairwise_ssim(*sides)
        how = {"order": 0, "anti_aliasing": False, "preserve_range": True}
        on_grid = [[resize(label, grid, **how) for label in labels] for labels in sides]
        np.testing.assert_allclose(values, pairwise_ssim(*on_grid), rtol=1e-13)
        mixed = [*sides[0], *sides[1]]
        with pytest.warns(UserWarning, match="different shapes"):
            assert torch.equal(pairwise_ssim(mixed, mixed)[2:, :2], values.T)
        assert [label.shape for label in mixed] == [(6, 10, 4)] * 2 + [(9, 5, 8)] * 2


class TestWindowedSSIM:
    @pytest.mark.parametrize("window", [3, 13])
    @pytest.mark.parametrize("shape", [(19, 13, 16), (31, 24)])
    def test_equals_scikit_image(self, rng, window, shape):
        a, b = blobs(rng, 4, shape), blobs(rng, 3, shape)
        k1, k2 = rng.uniform(0.01, 0.5, 2)
        how = {"win_size": window, "data_range": 1, "K1": k1, "K2": k2}
        expected = [[structural_similarity(x.astype(float), y.astype(float), **how) for y in b] for x in a]
        np.testing.assert_allclose(pairwise_ssim(a, b, k1=k1, k2=k2, window=window), expected, rtol=0, atol=1e-12)


class TestMeanLabelDice:
    def test_equals_the_formula(self, rng):
        a, b = blobs(rng, 4, (9, 8)), blobs(rng, 3, (9, 8))
        mean_a, mean_b = np.mean(a, axis=0), np.mean(b, axis=0)
        expected = 2 * (mean_a * mean_b).sum() / (mean_a**2 + mean_b**2).sum()
        assert mean_label_dice(a, iter(b)).item() == pytest.approx(expected)
        assert mean_label_dice(b, a) == mean_label_dice(a, b)

    def test_1_for_equal_means_and_0_for_labels_apart(self, rng):
        labels = blobs(rng, 5, (9, 8, 7))
        assert mean_label_dice(labels, labels[::-1]) == 1
        assert mean_label_dice([box((4, 6), (4,), (3,))], [box((4, 6), (4,), (3, 6))]) == 0

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
        image[image != 0] = stats.zscore(image[image != 0])
    rows = resize(image, (size,) * image.ndim, order=1).reshape(-1, size)
    loadings = PCA(variance, svd_solver="full").fit(rows).components_
    signs = [np.sign(max(loading, key=abs)) for loading in loadings]
    return (rows - rows.mean(0)) @ loadings.T * signs


def reference_distances(a, b, *how):
    a, b = ([reference_scores(image, *how).ravel() for image in images] for images in (a, b))
    return np.array([[stats.wasserstein_distance(x, y) for y in b] for x in a])


def padded(*clouds):
    most = max(cloud.shape[1] for cloud in clouds)
    return [np.pad(cloud, [(0, 0), (0, most - cloud.shape[1])]) for cloud in clouds]


class TestWasserstein:
    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize(("shapes", "size"), [(((20, 26, 9), (12, 9, 17)), 16), (((40, 25), (21, 30)), 24)])
    def test_equals_the_libraries(self, rng, standardize, shapes, size):
        a, b = ([*images_of(rng, 1, shape), *images_of(rng, 1, shape, background=False)] for shape in shapes)
        expected = reference_distances(a, b, size, 0.6, standardize)
        result = pairwise_wasserstein(a, b, size=size, variance=0.6, standardize=standardize)
        np.testing.assert_allclose(result, expected, rtol=1e-3)  # few scores; see the next test
        assert (result.numpy() <= np.multiply(expected, 1 + 1e-9)).all()

    def test_images_that_differ_much_or_have_many_scores(self, rng):
        a, b = ([unit * image for image in images_of(rng, 2, (40, 30, 35), background=False)] for unit in (1, 5))
        result = pairwise_wasserstein(a, b, size=40, standardize=False)
        np.testing.assert_allclose(result, reference_distances(a, b, 40, 0.75, False), rtol=1e-6)

    def test_a_metric_of_quantiles_that_average_to_zero(self, rng):
        images = [*images_of(rng, 2, (10, 9, 8)), *images_of(rng, 2, (7, 9, 8))]
        values = pairwise_wasserstein(images, images, size=8)
        assert (values.diagonal() == 0).all()
        assert torch.equal(values, values.T)
        kept = image_quantiles(iter(images), size=8)
        assert kept.shape == (4, 16384)
        assert kept.diff(dim=1).min() > -1e-10
        np.testing.assert_allclose(kept.mean(1), 0, atol=1e-10)
        assert torch.equal(quantile_distance(kept[:1], kept), pairwise_wasserstein(images[:1], images, size=8))

    def test_scale(self, rng):
        sides = images_of(rng, 2, (10, 9, 8)), images_of(rng, 2, (10, 9, 8))
        for factor in (1e8, 1e-8):
            scaled = [[factor * image for image in images] for images in sides]
            for standardize, unit in ((True, 1), (False, factor)):
                how = {"size": 8, "standardize": standardize}
                expected = unit * pairwise_wasserstein(*sides, **how)
                np.testing.assert_allclose(pairwise_wasserstein(*scaled, **how), expected)

    def test_an_offset_does_not_matter(self, rng):
        images = images_of(rng, 2, (10, 9, 8), background=False)
        shifted = [image + 1e8 for image in images]
        np.testing.assert_allclose(small_wasserstein(shifted, shifted), small_wasserstein(images, images), rtol=1e-5)

    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize("level", [0.0, 7.0, 1e8])
    def test_without_contrast(self, rng, level, standardize):
        images = images_of(rng, 1, (10, 9, 8))
        with pytest.warns(UserWarning, match=r"images_a\[0\] has no contrast"):
            value = pairwise_wasserstein([np.full((10, 9, 8), level)], images, size=8, standardize=standardize)
        expected = image_quantiles(images, size=8, standardize=standardize).abs().mean()
        np.testing.assert_allclose(value.item(), expected.item())


class TestMultivariateWasserstein:
    """Equation 2 as printed."""

    @pytest.mark.parametrize("standardize", [True, False])
    def test_is_that_of_the_best_pairing_of_points(self, rng, standardize):
        a, b = list(rng.gamma(1.0, size=(2, 20, 26, 9))), [rng.gamma(2.0, size=(12, 9, 17)), np.zeros((5, 5, 5))]
        how = {"size": 12, "variance": 0.6, "standardize": standardize, "multivariate": True}
        with pytest.warns(UserWarning, match="no contrast"):
            found = pairwise_wasserstein(a, b, **how)
        for place, image in enumerate(a):
            x, y = padded(*(reference_scores(one, 12, 0.6, standardize) for one in (image, b[0])))
            assert x.shape[1] > 1
            pairs = cdist(x, y)
            assert found[place, 0].item() == pytest.approx(pairs[optimize.linear_sum_assignment(pairs)].mean())
            assert found[place, 1].item() == pytest.approx(np.linalg.norm(x, axis=1).mean())
        assert (pairwise_wasserstein(a, a, **how).diagonal() == 0).all()

    def test_of_many_points_it_is_sliced(self, rng):
        """Close to POT's sliced distance; and exact if all mass moves along rays."""
        a, b = (images_of(rng, 1, (50, 55, 40), background=False)[0] for _ in range(2))
        found = pairwise_wasserstein([a], [b, 2 * a], size=50, standardize=False, multivariate=True)[0]
        x, y = padded(*(reference_scores(one, 50, 0.75, False) for one in (a, b)))
        theta = np.random.default_rng(0).normal(size=(x.shape[1], 4000))
        theta /= np.linalg.norm(theta, axis=0)
        sliced = ot.sliced_wasserstein_distance(x, y, projections=theta, p=1) / np.abs(theta).mean()
        assert found[0].item() == pytest.approx(sliced, rel=0.1)
        assert found[1].item() == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=0.05)

    def test_the_two_forms_order_pairs_the_other_way_round(self):
        """A second component with the histogram of the first changes no pooled score, but moves every point."""
        first, second = np.where(np.indices((8, 8)) % 2, 1.0, -1.0)
        one, two, fainter = np.zeros((3, 8, 8, 8))
        one[..., 0], fainter[..., 0] = first, 0.5 * first
        two[..., 0], two[..., 1] = 1.0001 * first, second
        how = {"size": 8, "standardize": False}
        pooled, points = (pairwise_wasserstein([one], [two, fainter], multivariate=m, **how)[0] for m in (False, True))
        assert pooled.tolist() == pytest.approx([0, 0.5], abs=1e-3)
        assert points.tolist() == pytest.approx([1, 0.5], abs=1e-3)


class TestTaskAffinity:
    def test_formula(self, rng):
        distance, similarity = rng.uniform(0, 300, (4, 5)), rng.uniform(-1, 1, (4, 5))
        expected = 0.0044 * distance - 2.4756 * similarity + 2.4756
        np.testing.assert_allclose(task_affinity(distance, torch.from_numpy(similarity)), expected, rtol=1e-12)
        np.testing.assert_allclose(task_affinity(distance, similarity, alpha=2, beta=0), 2 * distance)
        assert task_affinity(10.0, 0.5, alpha=1, beta=2).item() == 11

    def test_no_cost_is_negative(self):
        """The SSIM of a volume with itself is slightly above 1."""
        assert task_affinity([0.0, 1.0], [1.01, 1.01]).tolist() == [0, 0.0044]


class TestFitWeights:
    @pytest.mark.parametrize("unit", [1, 1e8, 1e-8])
    def test_weights_of_least_squares_in_any_unit(self, rng, unit):
        distance, similarity = rng.uniform(0, 300, (3, 5)), rng.uniform(0, 1, (3, 5))
        performance = 0.8 - 0.002 * distance - 0.7 * (1 - similarity) + rng.normal(0, 0.02, (3, 5))
        columns = np.stack([distance.ravel(), 1 - similarity.ravel(), np.ones(15)], axis=1)
        alpha, beta, _ = -np.linalg.lstsq(columns, performance.ravel())[0]
        assert fit_affinity_weights(unit * distance, similarity, performance) == pytest.approx((alpha / unit, beta))
        scaled = fit_affinity_weights(distance, similarity, unit * performance)
        assert scaled == pytest.approx((unit * alpha, unit * beta))

    @pytest.mark.parametrize("trial", range(8))
    @pytest.mark.filterwarnings("ignore:No weights")
    def test_no_other_direction_is_better(self, rng, trial):
        """For random performance, the best unconstrained weights may be negative: both, one, or none."""
        distance, similarity, performance = rng.uniform(0, 50, 12), rng.uniform(0, 1, 12), rng.uniform(0, 1, 12)

        def correlation(alpha, beta):
            return np.corrcoef(alpha * distance + beta * (1 - similarity), performance)[0, 1]

        weights = fit_affinity_weights(distance, similarity, performance)
        assert min(weights) >= 0
        found = correlation(*weights)
        for angle in np.linspace(0, np.pi / 2, 500):
            assert found <= correlation(np.cos(angle) / 50, np.sin(angle)) + 1e-9

    def test_where_none_predicts_the_nearest_come_with_a_warning(self):
        distance, worse = np.array([1.0, 2, 3, 4, 2, 3]), np.array([0.5, 0.1, 0.9, 0.5, 0.8, 0.3])
        with pytest.warns(UserWarning, match="No weights >= 0"):
            weights = fit_affinity_weights(distance, 1 - worse, distance + worse)
        assert min(weights) >= 0 < max(weights)

    @pytest.mark.parametrize("rounding", [0, 1e-16])
    def test_what_is_constant_but_for_rounding(self, rng, rounding):
        varies, noise = rng.uniform(0, 1, 6), np.array([0, 1, -1, 2, 0, -2]) * rounding
        assert fit_affinity_weights(300 + 1e3 * noise, varies, 2 * varies) == pytest.approx((0, 2))
        assert fit_affinity_weights(varies, 0.3 + noise, 5 - 2 * varies) == pytest.approx((2, 0))
        for constant in ((varies, varies, 0.1 + noise), (0.1 + noise, 0.7 + noise, varies)):
            with pytest.warns(UserWarning, match="published ones"):
                assert fit_affinity_weights(*constant) == PUBLISHED_WEIGHTS


def described(label, spacing=1.0):
    row = shape_descriptors([label], spacing)[0].tolist()
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

    def test_components_share_corners(self):
        label = np.diag([1, 1, 0, 0, 1, 0])
        assert described(label)["log_components"] == pytest.approx(np.log(2))

    def test_resolution_and_axes(self, rng):
        label = blobs(rng, 1, (10, 12, 9))[0]
        fine = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        assert described(fine, 0.5) == pytest.approx(described(label))
        slices = label.repeat(3, 2)
        assert described(slices, (1, 1, 1 / 3)) == pytest.approx(described(label))
        rows = shape_descriptors([label, label.transpose(2, 0, 1)])
        np.testing.assert_allclose(rows[1], rows[0, [0, 1, 2, 3, 4, 7, 5, 6]])

    def test_one_voxel(self):
        found = described(box((5, 5, 5), (2, 3), (2, 3), (2, 3)))
        assert np.isfinite(list(found.values())).all()
        assert found["log_volume"] == 0

    def test_nothing_labelled_and_spacing_per_volume(self):
        labels = [np.zeros((4, 4)), np.eye(4)]
        with pytest.warns(UserWarning, match=r"Nothing is labelled in labels\[0\]"):
            rows = shape_descriptors(labels, [(1, 2), (3, 4)])
        assert rows[0].isnan().all()
        assert torch.equal(rows[1:], shape_descriptors(labels[1:], (3, 4)))


class TestShapeSimilarity:
    @pytest.mark.parametrize("columns", [6, 8])
    def test_by_hand(self, columns):
        a, b = np.zeros((1, columns)), np.zeros((2, columns))
        b[:, 0] = (2, 6)  # on average two units of 2 away
        b[:, 1], b[:, -1] = (1, 2), 0.1  # one unit of 1.5, and one of 0.1
        assert shape_similarity(a, b).item() == pytest.approx(np.exp(-(2 + 1 + 1) / columns))
        assert shape_similarity(b, a) == shape_similarity(a, b)
        assert shape_similarity(b, b[::-1].copy()) == 1

    def test_patients_without_roi_are_left_out(self, rng):
        a, b = rng.normal(0, 1, (3, 6)), rng.normal(0, 1, (2, 6))
        with_empty = np.vstack([a, np.full((1, 6), np.nan)])
        assert shape_similarity(with_empty, b) == shape_similarity(a, b)
        with pytest.warns(UserWarning, match="descriptors_b has NaN in every row"):
            assert shape_similarity(a, with_empty[3:]) == 0


def context_cost(a, b, *, spacings=(1.0, 1.0), **options):
    """Between two tasks, from their images and labels."""
    contexts = [[task_context(*task, spacing=spacing)] for task, spacing in zip((a, b), spacings, strict=True)]
    return pairwise_context(*contexts, **options).item()


class TestContext:
    def test_each_term(self, rng):
        """Contrast, size, position and tissue each change the intended term only."""
        images, labels = head(rng, n=1)
        (image,), (label,) = images, labels
        intensity, shape, body = np.eye(3)

        def term(weights, other_image, other_label):
            return context_cost((images, labels), ([other_image], [other_label]), weights=weights)

        assert term(intensity, image + 200 * label, label) > 0.5
        assert term(shape, image + 200 * label, label) == 0
        assert 0 < term(shape, image, binary_erosion(label)) <= 1
        assert term(body, image, binary_erosion(label)) == 0
        moved = [np.roll(volume, 2, axis=1) for volume in (image, label)]
        assert term(shape, *moved) == pytest.approx(0, abs=1e-12)
        assert term((1, 1, 1), *moved) == pytest.approx(0, abs=1e-9)
        assert term(body, image**2, label) > 0
        assert term((1, 1, 1), 3 * image, label) == pytest.approx(0, abs=1e-9)

    def test_intensity_by_scipy(self, rng):
        """One patient, slices of 4 mm, RoI at the rim of the body: distances between the voxels of each part."""
        tasks, spacing = [head(rng, n=1, offset=8), head(rng, n=1, offset=8, bright=60, lesion=4)], np.array([2, 2, 4])

        def parts(images, labels):
            (image,), (label,) = images, labels
            inside = image != 0
            scores = (image - image[inside].mean()) / image[inside].std()
            around = np.argwhere(inside & ~label)
            roi = np.argwhere(label) * spacing
            near = np.array([np.sqrt(((roi - place * spacing) ** 2).sum(1).min()) <= 6 for place in around])
            return scores[label], scores[tuple(around[near].T)], scores[inside]

        found, expected = [task_context(*task, spacing=spacing) for task in tasks], [parts(*task) for task in tasks]
        for context, voxels in zip(found, expected, strict=True):
            means = [context.roi.mean(), context.ring.mean(), context.body.mean()]
            assert means == pytest.approx([part.mean() for part in voxels])
        distances = [stats.wasserstein_distance(*part) for part in zip(*expected, strict=True)]
        value = pairwise_context(found[:1], found[1:], weights=(0.5, 0, 0.25)).item()
        assert value == pytest.approx(sum(distances) / 4, rel=0.02)

    def test_beyond_the_border_there_is_no_roi(self, rng):
        images, labels = head(rng, n=1, offset=11)
        assert labels[0][-1].any()
        padded = [[np.pad(volume, 7)] for volume in (images[0], labels[0])]
        assert context_cost((images, labels), padded, weights=(1, 1, 1)) == pytest.approx(0, abs=1e-12)

    def test_shape_by_hand(self):
        """Squares of 64 and 32 mm a side around one centre, at two resolutions: Dice is 2 * 16 / (64 + 16)."""
        image = np.arange(1.0, 4097).reshape(64, 64)
        a, b = box((64, 64), (10, 42), (20, 52)), box((64, 64), (12, 44), (15, 31))
        value = context_cost(([image], [a]), ([image], [b]), spacings=(2, [(1, 2)]), weights=(0, 1, 0))
        assert value == pytest.approx(1 - 0.4, abs=0.01)

    def test_pairs_of_tasks(self, rng):
        """Rows belong to the first list; a task has cost 0 to itself, also if its patients are reordered."""
        tasks = [head(rng), head(rng, lesion=5, bright=-80), head(rng, shape=(20, 20, 24))]
        contexts = [task_context(*task) for task in tasks]
        values = pairwise_context(contexts[:2], contexts)
        assert values.diagonal().tolist() == [0, 0]
        for i, j in product(range(2), range(3)):
            assert values[i, j] == pairwise_context([contexts[j]], [contexts[i]])
            assert values[i, j] > 0 or i == j
        again = [task_context(iter(images[::-1]), iter(labels[::-1])) for images, labels in tasks]
        np.testing.assert_allclose(pairwise_context(contexts, again), pairwise_context(contexts, contexts), atol=1e-12)

    def test_the_crop_reaches_48_mm(self):
        """Two regions on both sides of their common centre, 49 mm or 46 mm away."""
        image = np.arange(1.0, 100 * 4 * 4 + 1).reshape(100, 4, 4)
        beyond, within = (task_context([image], [box(image.shape, side)]) for side in ((0, 100, 99), (3, 97, 93)))
        assert not beyond.crop.any()
        assert within.crop.any()
        assert pairwise_context([beyond], [beyond, within], weights=(0, 1, 0)).tolist() == [[0, 1]]

    def test_a_patient_without_roi_counts_for_the_body_only(self, rng):
        images, labels = head(rng)
        other, _ = head(rng, n=1, level=50)
        less, more = task_context(images, labels), task_context([*images, *other], [*labels, np.zeros(other[0].shape)])
        for part in ("roi", "ring", "crop"):
            np.testing.assert_array_equal(getattr(less, part), getattr(more, part))
        assert not np.array_equal(less.body, more.body)


EYE, ONES = np.eye(4), np.ones((4, 4))
SOME = [0.1, 0.2, 0.3]
IMAGE = np.arange(1.0, 401.0).reshape(20, 20)
TASK = [IMAGE], [IMAGE > 390]
FLAT, DEEP = (TaskContext(*np.zeros((3, 256)), np.zeros((48,) * ndim)) for ndim in (2, 3))


class TestBadInput:
    """The error names the argument."""

    @pytest.mark.parametrize("function", [pairwise_ssim, mean_label_dice])
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (iter(()), "labels_b is empty"),
            (None, "labels_b is NoneType"),
            ("labels.nii.gz", "labels_b is str"),
            ([EYE, EYE * 4], r"labels_b\[1\] holds 4; expected 0 and 1 only, one class"),
            ([EYE * 0.5], r"labels_b\[0\] holds 0.5"),
            ([EYE * np.nan], r"labels_b\[0\] holds nan; expected 0 and 1 only"),
            ([EYE.astype(np.uint8) * 3], r"labels_b\[0\] holds 3"),
            ([np.zeros((4, 4, 4))], r"labels_b\[0\] is 3D, but labels_a\[0\] is 2D"),
            ([np.zeros((2, 2, 4, 4))], r"labels_b\[0\] has shape \(2, 2, 4, 4\)"),
            (EYE, r"labels_b\[0\] has shape \(4,\).*each item of a list"),
            ([np.zeros((1, 1, 1))], r"labels_b\[0\] has shape \(1, 1, 1\).*two voxels"),
            ([[[0, 1], [1]]], r"labels_b\[0\] cannot be read"),
            ([EYE * 1j], r"labels_b\[0\] holds complex"),
        ],
    )
    def test_labels(self, function, labels, message):
        with pytest.raises(InputError, match=message):
            function([EYE, ONES], labels)

    @pytest.mark.parametrize(
        ("function", "arguments", "options", "message"),
        [
            (pairwise_ssim, ([EYE], [EYE]), {"k1": 0}, "k1 is 0"),
            (pairwise_ssim, ([EYE], [EYE]), {"window": 4}, "window is 4; expected an odd number"),
            (pairwise_ssim, ([EYE], [EYE]), {"window": 5}, r"window is 5; expected a whole number from 3 to 4"),
            (pairwise_wasserstein, ([IMAGE], [EYE * np.nan]), {}, r"images_b\[0\] holds NaN or Inf"),
            (pairwise_wasserstein, ([IMAGE], [np.ones((4, 4, 4))]), {}, r"images_b\[0\] is 3D, but images_a\[0\] is"),
            (pairwise_wasserstein, ([IMAGE], [EYE]), {"size": 1}, "size is 1"),
            (image_quantiles, ([IMAGE],), {"variance": 0}, "variance is 0"),
            (
                quantile_distance,
                (np.zeros((2, 3)), np.zeros((2, 2))),
                {},
                r"\(2, 2\); expected the same number of columns",
            ),
            (quantile_distance, (np.zeros(3), np.zeros((2, 3))), {}, "quantiles_a has shape"),
            (quantile_distance, ([[np.nan]], [[1.0]]), {}, "quantiles_a holds nan"),
            (task_affinity, ([1.0], [0.5]), {"alpha": -1}, "alpha is -1"),
            (task_affinity, ([1.0], [0.5]), {"beta": np.inf}, "beta is inf"),
            (task_affinity, ([-1.0], [0.5]), {}, "image_distance .* below 0"),
            (task_affinity, ([], []), {}, "image_distance is empty"),
            (task_affinity, ([np.nan], [0.5]), {}, "image_distance holds nan"),
            (task_affinity, ([1.0], [0.5, 0.4]), {}, r"label_similarity have the shapes \(1,\), \(2,\)"),
            (fit_affinity_weights, (SOME, SOME, SOME[:2]), {}, r"performance have the shapes \(3,\), \(3,\), \(2,\)"),
            (fit_affinity_weights, (SOME[:2], SOME[:2], SOME[:2]), {}, "at least three transfers"),
            (shape_descriptors, ([EYE * 2],), {}, r"labels\[0\] holds 2"),
            (shape_descriptors, ([EYE], 0), {}, "spacing is 0"),
            (shape_descriptors, ([EYE], (1, 1, 1)), {}, "spacing is .*a row of 2 for each"),
            (shape_similarity, (np.zeros((1, 5)), np.zeros((1, 5))), {}, "descriptors_a has 5 columns"),
            (shape_similarity, (np.zeros((1, 6)), np.full((1, 6), np.inf)), {}, "descriptors_b holds inf"),
            (task_context, ([IMAGE, IMAGE], [EYE]), {}, r"labels\[0\] has shape \(4, 4\), images\[0\] \(20, 20\)"),
            (task_context, ([IMAGE, IMAGE], TASK[1]), {}, "images has more volumes than labels"),
            (task_context, (TASK[0], TASK[1] * 2), {}, "labels has more volumes than images"),
            (task_context, ([0 * IMAGE], TASK[1]), {}, r"images\[0\] is zero everywhere"),
            (task_context, (TASK[0], [0 * IMAGE]), {}, "labels has no labelled voxel in any volume"),
            (task_context, (TASK[0], [np.ones_like(IMAGE)]), {}, "labels has no RoI with body within 6 mm"),
            (task_context, ([IMAGE * np.nan], TASK[1]), {}, r"images\[0\] holds NaN"),
            (task_context, (TASK[0], [2 * (IMAGE > 390)]), {}, r"labels\[0\] holds 2"),
            (pairwise_context, ([FLAT], [DEEP]), {}, "mix tasks in 2D and in 3D"),
            (pairwise_context, ([FLAT], []), {}, "contexts_b must list"),
            (pairwise_context, (["13-T1-ED"], [FLAT]), {}, "contexts_a must list"),
            (pairwise_context, ([FLAT], [FLAT]), {"weights": (1, 2)}, "weights is"),
            (pairwise_context, ([FLAT], [FLAT]), {"weights": (1, -1, 0)}, "weights is"),
        ],
    )
    def test_others(self, function, arguments, options, message):
        with pytest.raises(InputError, match=message):
            function(*arguments, **options)
