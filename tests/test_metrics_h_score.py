"""H-score and its map: against reference vectors, against a second computation, and against what must hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from drawing import torch_generator
from scipy.linalg import orth
from sklearn.covariance import LedoitWolf

from medtl_ext import InputError
from medtl_ext.metrics import HScore, HScoreMap, compute_h_score, compute_h_score_map
from medtl_ext.metrics.features import feature_sums
from medtl_ext.metrics.h_score import CUTOFF, _quadratic_forms

SHRINKAGES = [None, "ledoit_wolf"]


def draw(grid=(), *, n=60, width=6, n_classes=4, seed=None):
    """Random features that depend on the labels."""
    generator = torch_generator() if seed is None else torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    labels.view(n, -1)[:n_classes] = torch.arange(n_classes)[:, None]  # every class occurs at every pixel
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    features = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64) + 0.7 * centres[labels]
    return features.movedim(-1, 1), labels


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


def loop_map(features, labels):
    scores = np.zeros(labels.shape[1:])
    for pixel in np.ndindex(*scores.shape):
        x, y = features[(slice(None), slice(None), *pixel)], labels[(slice(None), *pixel)]
        if len(y.unique()) > 1:
            scores[pixel] = correlated(x, y)
    return scores


def streamed(metric, features, labels, sizes):
    for part, part_labels in zip(features.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


class TestReferenceVectors:
    @pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
    def test_classification(self, vectors, name):
        data = vectors(name)
        plain = compute_h_score(data["features"], data["labels"])
        assert plain.item() == pytest.approx(data["hscore"], abs=1e-10)
        regularised = compute_h_score(data["features"], data["labels"], shrinkage="ledoit_wolf")
        assert regularised.item() == pytest.approx(data["hscore_reg"], abs=1e-10)

    def test_pixels_pooled(self, vectors):
        seg = vectors("seg_binary")
        score = compute_h_score(seg["logits"], seg["labels"])
        assert score.item() == pytest.approx(seg["hscore_pooled_logits_f64"], abs=1e-10)

    def test_map(self, vectors):
        seg = vectors("seg_binary")
        h_map = compute_h_score_map(seg["logits"], seg["labels"])
        np.testing.assert_allclose(h_map, seg["hscore_pixel_map"], atol=1e-10)
        metric = HScoreMap()
        metric.update(seg["logits"], seg["labels"])
        np.testing.assert_array_equal(metric.multi_label(), seg["hscore_pixel_n_labels"] > 1)

    def test_softmax_in_single_precision_stays_within_the_bounds(self, vectors):
        # Its second direction is rounding noise: inverted, it gives the printed values outside [0, 1].
        seg = vectors("seg_binary")
        probs, labels = torch.from_numpy(seg["logits"]).softmax(1), torch.from_numpy(seg["labels"])
        h_map = compute_h_score_map(probs, labels)
        assert (h_map >= 0).all()
        assert (h_map <= 1).all()
        # One of two probabilities says it all.
        torch.testing.assert_close(h_map, compute_h_score_map(probs[:, 1:], labels), atol=1e-4, rtol=0)


class TestAgainstAnotherRoute:
    @pytest.mark.parametrize("grid", [(), (4, 3)])
    @pytest.mark.parametrize("width", [1, 2, 3, 20])
    def test_canonical_correlations(self, grid, width):
        features, labels = draw(grid, width=width)
        expected = correlated(features.movedim(1, -1).reshape(-1, width), labels.flatten())
        assert compute_h_score(features, labels).item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(("n", "width"), [(60, 6), (60, 1), (30, 100), (500, 12)])
    def test_ledoit_wolf(self, n, width):
        features, labels = draw(n=n, width=width)
        score = compute_h_score(features, labels, shrinkage="ledoit_wolf")
        assert score.item() == pytest.approx(shrunk(features, labels), abs=1e-9)

    @pytest.mark.parametrize("width", [1, 2, 5])
    @pytest.mark.parametrize("grid", [(6, 5), (3, 4, 2)], ids=["2D", "3D"])
    def test_map(self, grid, width):
        features, labels = draw(grid, n=20, width=width, n_classes=3)
        labels[:, 0] = 1  # one label only
        h_map = compute_h_score_map(features, labels)
        np.testing.assert_allclose(h_map, loop_map(features, labels), atol=1e-9)
        assert (h_map[0] == 0).all()

    def test_map_of_more_pixels_than_a_block(self):
        features, labels = draw((130, 129), n=8, width=2, n_classes=2)
        labels[:, 40:60] = 0
        h_map = compute_h_score_map(features, labels)
        for pixel in [(0, 0), (39, 128), (50, 3), (61, 7), (129, 128)]:
            where = (slice(None), slice(None), *pixel)
            expected = correlated(features[where], labels[:, pixel[0], pixel[1]]) if pixel[0] != 50 else 0
            assert h_map[pixel].item() == pytest.approx(expected, abs=1e-9)

    def test_ignored_samples_might_as_well_not_be_there(self):
        features, labels = draw((4, 3), n=30)
        labels[torch.rand(labels.shape) < 0.3] = 255
        rows, valid = features.movedim(1, -1)[labels != 255], labels[labels != 255]
        assert compute_h_score(features, labels, ignore_index=255).item() == pytest.approx(
            correlated(rows, valid), abs=1e-9
        )
        h_map = compute_h_score_map(features, labels, ignore_index=255)
        keep = labels[:, 2, 1] != 255
        expected = correlated(features[keep, :, 2, 1], labels[keep, 2, 1])
        assert h_map[2, 1].item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("width", [2, 5])
    def test_quadratic_forms_of_regular_and_singular_matrices(self, width):
        rows = torch.randn(40, 3 * width, width, dtype=torch.float64)
        rows[::2, :, -1] = rows[::2, :, 0]  # singular: these take the way over eigenvectors
        rows[5] = 0
        rows[6:9, :, 0] *= torch.tensor([1e-2, 1e-4, 1e4])[:, None]  # on either side of the cutoff
        matrices, vectors = rows.mT @ rows, torch.randn(40, 3, width, dtype=torch.float64)
        forms = _quadratic_forms(matrices, vectors, CUTOFF)
        inverses = np.linalg.pinv(matrices.numpy(), rcond=CUTOFF, hermitian=True)
        expected = np.einsum("bkd,bde,bke->b", vectors, inverses, vectors)
        np.testing.assert_allclose(forms, expected, rtol=1e-7)


class TestInvariants:
    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    def test_bounds(self, shrinkage):
        for width, spread in [(2, 0.0), (3, 1.0), (6, 100.0)]:
            features, labels = draw(width=width)
            features = features + spread * labels[:, None]
            assert 0 <= compute_h_score(features, labels, shrinkage=shrinkage) <= min(3, width) + 1e-12

    def test_classes_that_are_points_score_the_bound(self):
        labels = torch.arange(40) % 4
        assert compute_h_score(torch.eye(4)[labels], labels).item() == pytest.approx(3, abs=1e-9)

    def test_any_affine_map_of_the_features(self):
        features, labels = draw()
        turned = features @ torch.randn(6, 6, dtype=torch.float64) + 10 * torch.randn(6, dtype=torch.float64)
        assert compute_h_score(turned, labels).item() == pytest.approx(
            compute_h_score(features, labels).item(), abs=1e-8
        )

    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    def test_scale(self, scale, shrinkage):
        features, labels = draw((3, 2))
        expected = compute_h_score(features, labels, shrinkage=shrinkage)
        for value in (
            compute_h_score(features * scale, labels, shrinkage=shrinkage),
            streamed(HScore(shrinkage=shrinkage), features * scale, labels, 20),
        ):
            assert value.item() == pytest.approx(expected.item(), abs=1e-9)
        if shrinkage is None:
            h_map = compute_h_score_map(features, labels)
            torch.testing.assert_close(compute_h_score_map(features * scale, labels), h_map, atol=1e-9, rtol=0)
            torch.testing.assert_close(streamed(HScoreMap(), features * scale, labels, 20), h_map, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    def test_names_of_classes_and_order_of_samples(self, shrinkage):
        features, labels = draw()
        expected = compute_h_score(features, labels, shrinkage=shrinkage).item()
        order = torch.randperm(len(labels))
        assert compute_h_score(features[order], labels[order], shrinkage=shrinkage).item() == pytest.approx(expected)
        renamed = torch.tensor([7, 0, 30, 2])[labels]
        assert compute_h_score(features, renamed, shrinkage=shrinkage).item() == pytest.approx(expected, abs=1e-12)
        assert streamed(HScore(shrinkage=shrinkage), features, renamed, 7 * [8] + [4]).item() == pytest.approx(expected)

    def test_every_sample_and_every_feature_twice(self):
        features, labels = draw()
        expected = compute_h_score(features, labels).item()
        assert compute_h_score(features.repeat(2, 1), labels.repeat(2)).item() == pytest.approx(expected, abs=1e-9)
        assert compute_h_score(features.repeat(1, 2), labels).item() == pytest.approx(expected, abs=1e-9)

    def test_another_feature_never_lowers_it(self):
        features, labels = draw(width=8)
        scores = [compute_h_score(features[:, :width], labels).item() for width in range(1, 9)]
        assert scores == sorted(scores)

    @pytest.mark.parametrize(("share", "kept"), [(2e-7, False), (5e-6, True)])
    @pytest.mark.parametrize("width", [2, 4])
    def test_directions_of_little_variance(self, width, share, kept):
        # The last feature tells the classes, but has this share of the others' variance.
        labels = torch.arange(400) % 2
        features = torch.randn(400, width, dtype=torch.float64)
        features = features / features.std(0)
        features[:, -1] = share**0.5 * (2.0 * labels - 1)
        expected = 1 if kept else correlated(features[:, :-1], labels)
        assert compute_h_score(features, labels).item() == pytest.approx(expected, abs=1e-4)
        h_map = compute_h_score_map(features[..., None], labels[:, None])
        assert h_map.item() == pytest.approx(expected, abs=1e-4)

    def test_a_grid_of_one_pixel_is_the_score(self):
        features, labels = draw((1,), n=40)
        h_map = compute_h_score_map(features, labels)
        assert h_map.item() == pytest.approx(compute_h_score(features, labels).item(), abs=1e-10)


class TestStreaming:
    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    def test_any_split_in_any_order(self, shrinkage):
        features, labels = draw((2, 2))
        labels[:10] %= 2  # the first batches have seen fewer classes
        expected = compute_h_score(features, labels, shrinkage=shrinkage).item()
        for sizes in ([1] * 60, [13, 47], [60]):
            assert streamed(HScore(shrinkage=shrinkage), features, labels, sizes).item() == pytest.approx(
                expected, abs=1e-9
            )
        parts = [HScore(shrinkage=shrinkage) for _ in range(4)]
        for metric, x, y in zip(parts, features.split(25), labels.split(25), strict=False):
            metric.update(x, y)
        total = HScore(shrinkage=shrinkage)
        for k in torch.randperm(4).tolist():  # the fourth has seen nothing
            total.merge(parts[k])
        assert total.compute().item() == pytest.approx(expected, abs=1e-9)

    def test_sums_of_a_resample_are_its_score(self):
        features, labels = draw()
        times = torch.randint(3, (60,))
        drawn = torch.arange(60).repeat_interleave(times)
        for shrinkage, needs in [(None, ["gram"]), ("ledoit_wolf", ["gram", "norms"])]:
            whole = [feature_sums(features[k : k + 1], labels[k : k + 1], needs) for k in drawn.tolist()]
            padded = [
                {
                    name: torch.cat([value, value.new_zeros(4 - len(value), *value.shape[1:])])
                    if name in ("count", "total")
                    else value
                    for name, value in sums.items()
                }
                for sums in whole
            ]
            sums = {name: sum(part[name] for part in padded) for name in padded[0]}
            expected = compute_h_score(features[drawn], labels[drawn], shrinkage=shrinkage)
            assert HScore(shrinkage=shrinkage)._evaluate(sums).item() == pytest.approx(expected.item(), abs=1e-9)

    @pytest.mark.parametrize("width", [2, 4])
    def test_map_in_any_split_and_order(self, width):
        features, labels = draw((5, 4), n=30, width=width)
        labels[torch.rand(labels.shape) < 0.2] = 9
        labels[:, 0, :2] = 9
        labels[:12][labels[:12] < 9] %= 2
        expected = compute_h_score_map(features, labels, ignore_index=9)
        assert expected[0, :2].isnan().all()
        for sizes in ([1] * 30, [7, 23], [30]):
            value = streamed(HScoreMap(ignore_index=9), features, labels, sizes)
            torch.testing.assert_close(value, expected, atol=1e-9, rtol=0, equal_nan=True)
        parts = [HScoreMap(ignore_index=9) for _ in range(4)]
        for metric, x, y in zip(parts, features.split(11), labels.split(11), strict=False):
            metric.update(x, y)
        total = HScoreMap(ignore_index=9)
        for k in torch.randperm(4).tolist():
            total.merge(parts[k])
        torch.testing.assert_close(total.compute(), expected, atol=1e-9, rtol=0, equal_nan=True)
        first = compute_h_score_map(features[:11], labels[:11], ignore_index=9)
        torch.testing.assert_close(parts[0].compute(), first, atol=1e-9, rtol=0, equal_nan=True)

    def test_map_of_a_saturated_softmax(self):
        # Deviations of 1e-9 around one: of raw sums nothing would be left after taking off the square of the mean.
        features, labels = draw((4, 3), n=20, width=2)
        saturated = 1 + 1e-9 * features
        expected = compute_h_score_map(features, labels)
        for value in (
            compute_h_score_map(saturated, labels),
            streamed(HScoreMap(), saturated, labels, [1] * 20),
        ):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)

    def test_multi_label(self):
        metric = HScoreMap(ignore_index=5)
        metric.update(torch.randn(2, 1, 1, 4), torch.tensor([[[0, 1, 0, 5]], [[0, 1, 1, 5]]]))
        metric.update(torch.randn(2, 1, 1, 4), torch.tensor([[[1, 1, 0, 5]], [[0, 1, 5, 0]]]))
        assert metric.multi_label().tolist() == [[True, False, True, False]]
        h_map = metric.compute()
        assert (h_map[0, 1], h_map[0, 3]) == (0, 0)
        assert h_map.nanmean() == pytest.approx(h_map[metric.multi_label()].sum().item() / 4)


def _share(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    features, labels = draw((5, 4), n=30, width=2, seed=3)
    shared, lonely = HScoreMap(), HScoreMap()
    shared.update(1e4 + features[rank::2], labels[rank::2] % (2 + 2 * rank))
    if rank == 0:  # the other process has no data
        lonely.update(features, labels)
    torch.save((shared.compute(), shared.multi_label(), lonely.compute()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_one_map(tmp_path):
    torch.multiprocessing.spawn(_share, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    features, labels = draw((5, 4), n=30, width=2, seed=3)
    alone = compute_h_score_map(features, labels)
    labels[::2] %= 2
    expected = compute_h_score_map(1e4 + features, labels)
    for rank in range(2):
        h_map, several, lonely = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(h_map, expected, atol=1e-9, rtol=0)
        assert several.all()
        torch.testing.assert_close(lonely, alone, atol=1e-12, rtol=0)


class TestDegenerate:
    def test_one_class(self):
        features, labels = draw((3, 2))
        for function in (compute_h_score, compute_h_score_map):
            with pytest.warns(UserWarning, match="one class only"):
                assert (function(features, labels * 0) == 0).all()
        for metric in (HScore(), HScoreMap()):
            metric.update(features, labels * 0)
            with pytest.warns(UserWarning, match="one class only"):
                assert (metric.compute() == 0).all()

    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
    def test_constant_features(self, shrinkage, constant):
        features, labels = draw((3, 2))
        features = torch.full_like(features, constant)
        with pytest.warns(UserWarning, match="features are constant"):
            assert compute_h_score(features, labels, shrinkage=shrinkage) == 0
        metric = HScore(shrinkage=shrinkage)
        metric.update(features, labels)
        with pytest.warns(UserWarning, match="features are constant"):
            assert metric.compute() == 0
        assert (compute_h_score_map(features, labels) == 0).all()
        assert (streamed(HScoreMap(), features, labels, [1] * 60) == 0).all()

    def test_a_constant_feature_changes_nothing(self):
        features, labels = draw()
        more = torch.cat([features, torch.full((60, 1), 3.3)], 1)
        for value in (compute_h_score(more, labels), streamed(HScore(), more, labels, 20)):
            assert value.item() == pytest.approx(compute_h_score(features, labels).item(), abs=1e-9)

    def test_no_more_samples_than_dimensions(self):
        features, labels = draw(n=20, width=50)
        with pytest.warns(UserWarning, match="20 samples of 50 dimensions"):
            assert compute_h_score(features, labels).item() == pytest.approx(3, abs=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert 0 < compute_h_score(features, labels, shrinkage="ledoit_wolf") < 3
        images, labels = draw((2, 2), n=4, width=4, n_classes=2)
        with pytest.warns(UserWarning, match="4 images of 4 channels"):
            compute_h_score_map(images, labels)

    def test_class_of_one_sample(self):
        features, labels = draw()
        labels[labels == 3] = 2
        labels[0] = 3
        assert compute_h_score(features, labels).item() == pytest.approx(correlated(features, labels), abs=1e-9)

    def test_half_precision_does_not_overflow(self):
        features, labels = draw((2, 2))
        features = (features * 1e4).clamp(-6e4, 6e4).half()
        expected = correlated(features.double().movedim(1, -1).reshape(-1, 6), labels.flatten())
        assert compute_h_score(features, labels).item() == pytest.approx(expected, abs=1e-9)
        h_map = compute_h_score_map(features, labels)
        np.testing.assert_allclose(h_map, loop_map(features.double(), labels), atol=1e-9)
        torch.testing.assert_close(streamed(HScoreMap(), features, labels, 20), h_map, atol=1e-9, rtol=0)


class TestInputs:
    def test_are_left_as_they_were(self):
        features, labels = draw((3, 2))
        before = features.clone(), labels.clone()
        compute_h_score(features, labels, shrinkage="ledoit_wolf")
        compute_h_score_map(features, labels, ignore_index=2)
        HScoreMap().update(features, labels)
        assert torch.equal(features, before[0])
        assert torch.equal(labels, before[1])

    def test_of_every_kind(self):
        features, labels = draw((3, 2))
        expected = compute_h_score_map(features, labels)
        strided = torch.stack([features, features], -1)[..., 0]
        channels_last = features.to(memory_format=torch.channels_last)
        for same in (strided, channels_last, features.numpy(), features.clone().requires_grad_()):
            h_map = compute_h_score_map(same, labels.unsqueeze(1).to(torch.uint8))
            assert h_map.dtype == torch.float64
            assert not h_map.requires_grad
            torch.testing.assert_close(h_map, expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x.index_fill(0, torch.tensor([1]), float("nan")), y), "features holds NaN or Inf"),
            (lambda x, y: (x.index_fill(0, torch.tensor([1]), float("inf")), y), "features holds NaN or Inf"),
            (lambda x, y: (x[:0], y[:0]), "features is empty"),
            (lambda x, y: (x, y[:-1]), "target_labels has shape"),
            (lambda x, y: (x, y - 1), "negative label -1"),
            (lambda x, y: (x, y + 0.5), "non-integer"),
        ],
    )
    def test_bad_ones_are_named_and_leave_no_trace(self, change, message):
        features, labels = draw((3, 2))
        changed = change(features, labels)
        for function in (compute_h_score, compute_h_score_map):
            with pytest.raises(InputError, match=message):
                function(*changed)
        for metric in (HScore(), HScoreMap()):
            metric.update(features, labels)
            before = metric.compute()
            with pytest.raises(InputError, match=message):
                metric.update(*changed)
            assert torch.equal(metric.compute(), before)

    def test_nothing_left(self):
        features, labels = draw((3, 2))
        with pytest.raises(InputError, match="expected at least 2"):
            compute_h_score(features, labels * 0, ignore_index=0)
        with pytest.raises(InputError, match="no valid sample"):
            compute_h_score_map(features, labels * 0, ignore_index=0)
        metric = HScoreMap(ignore_index=0)
        metric.update(features, labels * 0)
        with pytest.raises(InputError, match="no valid sample"):
            metric.compute()

    def test_one_sample(self):
        with pytest.raises(InputError, match="expected at least 2"):
            compute_h_score([[1.0, 2.0]], [0])
        metric = HScore()
        metric.update([[1.0, 2.0]], [0])
        with pytest.raises(InputError, match="expected at least 2"):
            metric.compute()

    def test_shrinkage_by_a_wrong_name(self):
        for make in (HScore, lambda shrinkage: compute_h_score([[1.0], [2.0]], [0, 1], shrinkage=shrinkage)):
            with pytest.raises(InputError, match="did you mean 'ledoit_wolf'"):
                make(shrinkage="ledoitwolf")

    def test_map_without_pixels(self):
        features, labels = draw()
        with pytest.raises(InputError, match="a map needs"):
            compute_h_score_map(features, labels)
        metric = HScoreMap()
        with pytest.raises(InputError, match="a map needs"):
            metric.update(features, labels)
        metric.update(*draw((3, 2)))  # what was refused left no trace

    @pytest.mark.parametrize("other", [{"grid": (2, 3)}, {"grid": (3, 2), "width": 5}, {"grid": (3, 2, 1)}], ids=str)
    def test_images_of_another_form(self, other):
        metric = HScoreMap()
        metric.update(*draw((3, 2)))
        before = metric.compute()
        with pytest.raises(InputError, match="differs between batches"):
            metric.update(*draw(**other))
        assert torch.equal(metric.compute(), before)

    def test_compute_before_update(self):
        for method in (HScore().compute, HScoreMap().compute, HScoreMap().multi_label):
            with pytest.raises(InputError, match="has seen no sample"):
                method()
