"""LEEP, its maps and NCE: against reference vectors, against a second computation, and against what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawing import torch_generator
from monai.data import MetaTensor

from medtl_ext import InputError
from medtl_ext.metrics import (
    LEEP,
    NCE,
    LEEPImageMaps,
    LEEPMap,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
    compute_nce,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
MAP_OPTIONS = [
    {},
    {"stride": 4},
    {"smoothing": 7.0},
    {"stride": 3, "smoothing": 2.5},
    {"estimator": "global"},
    {"estimator": "global", "stride": 4},
]


def draw(grid=(), *, n=12, n_source=3, n_target=4, seed=None, dtype=torch.float64):
    """Random predictions that depend on the labels."""
    generator = torch_generator() if seed is None else torch.Generator().manual_seed(seed)
    labels = torch.randint(n_target, (n, *grid), generator=generator)
    logits = torch.randn(n, n_source, *grid, generator=generator, dtype=torch.float64) * 2
    logits[:, 0] += labels
    return logits.softmax(1).to(dtype), labels


def loop_conditional(samples):
    """P(y|z) by the definition, from a list of (label, probabilities)."""
    joint = {}
    for label, probs in samples:
        for z, p in enumerate(probs):
            joint[label, z] = joint.get((label, z), 0.0) + p
    return {(y, z): value / sum(joint.get((k, z), 0.0) for k in range(10)) for (y, z), value in joint.items() if value}


def loop_log(table, label, probs):
    return np.log(sum(table.get((label, z), 0.0) * p for z, p in enumerate(probs)))


def loop_leep(samples):
    table = loop_conditional(samples)
    return np.mean([loop_log(table, label, probs) for label, probs in samples])


def samples_of(probs, labels, *, ignore_index=None):
    """All valid samples as a list of (label, probabilities)."""
    rows = probs.movedim(1, -1).reshape(-1, probs.shape[1]).tolist()
    pairs = zip(labels.flatten().tolist(), rows, strict=True)
    return [(label, row) for label, row in pairs if label != ignore_index]


def loop_map(probs, labels, *, stride=1, estimator="local", smoothing=0.0):
    """The map by the definition, one cell after the other."""
    everything = samples_of(probs, labels)
    pooled = {}
    for label, row in everything:
        for z, p in enumerate(row):
            pooled[label, z] = pooled.get((label, z), 0.0) + p / len(everything)
    cells = tuple(-(-length // stride) for length in labels.shape[1:])
    leep_map = np.empty(cells)
    for cell in np.ndindex(*cells):
        window = tuple(slice(k * stride, (k + 1) * stride) for k in cell)
        samples = samples_of(probs[(..., *window)], labels[(..., *window)])
        joint = {}
        for label, row in everything if estimator == "global" else samples:
            for z, p in enumerate(row):
                joint[label, z] = joint.get((label, z), 0.0) + p
        for key, value in pooled.items():
            joint[key] = joint.get(key, 0.0) + smoothing * value
        table = {(y, z): v / sum(joint.get((k, z), 0.0) for k in range(10)) for (y, z), v in joint.items() if v}
        leep_map[cell] = np.mean([loop_log(table, label, row) for label, row in samples])
    return leep_map


def streamed(metric, probs, labels, sizes):
    for part, part_labels in zip(probs.split(sizes), labels.split(sizes), strict=True):
        metric.update(part, part_labels)
    return metric.compute()


@pytest.fixture(scope="module")
def seg(vectors):
    return vectors("seg_binary")


@pytest.fixture(scope="module")
def edge(vectors):
    return vectors("edge_leep")


class TestReferenceVectors:
    def test_pooled(self, seg):
        logits, labels = torch.from_numpy(seg["logits"]), torch.from_numpy(seg["labels"])
        assert compute_leep(logits.double().softmax(1), labels).item() == pytest.approx(
            seg["leep_pooled_f64"], abs=1e-12
        )
        assert compute_leep(logits.softmax(1), labels).item() == pytest.approx(seg["leep_pooled"], abs=1e-8)

    @pytest.mark.parametrize("stride", [1, 4])
    def test_map(self, seg, stride):
        probs = torch.from_numpy(seg["logits"]).double().softmax(1)
        leep_map = compute_leep_map(probs, torch.from_numpy(seg["labels"]), stride=stride)
        np.testing.assert_allclose(leep_map, seg[f"leep_map_stride{stride}_f64"], atol=1e-12)

    @pytest.mark.parametrize("name", ["cls_basic", "cls_smallD", "cls_binary"])
    def test_classification(self, vectors, name):
        data = vectors(name)
        leep = compute_leep(source_probs=data["source_probs"], target_labels=data["labels"])
        assert leep.item() == pytest.approx(data["leep"], abs=1e-12)
        assert compute_nce(data["source_argmax"], data["labels"]).item() == pytest.approx(data["nce"], abs=1e-12)

    def test_nce_of_pixels(self, seg):
        nce = compute_nce(seg["logits"].argmax(1), seg["labels"])
        assert nce.item() == pytest.approx(seg["nce_pooled"], abs=1e-12)

    def test_source_class_without_mass_is_dropped(self, edge):
        leep = compute_leep(edge["probs_zero_column"], edge["labels"])
        assert leep.item() == pytest.approx(edge["leep_expected_zero_column"], abs=1e-12)

    def test_lonely_sample(self, edge):
        leep = compute_leep(edge["probs_lonely"], edge["labels_lonely"])
        assert leep.item() == pytest.approx(edge["leep_lonely"], abs=1e-12)

    def test_perfect_predictions(self, edge):
        assert compute_leep(edge["hard_probs"], edge["hard_labels"]) == 0

    def test_one_label_warns(self, edge):
        with pytest.warns(UserWarning, match="one class only"):
            assert compute_leep(edge["single_probs"], edge["single_label"]).item() == pytest.approx(0, abs=1e-15)
        with pytest.warns(UserWarning, match="one class only"):
            assert compute_nce(edge["single_probs"].argmax(1), edge["single_label"]) == edge["nce_single"]


class TestAgainstLoops:
    """A second computation, straight from the definition."""

    @pytest.mark.parametrize("grid", [(), (5,), (4, 6), (2, 3, 4)])
    def test_pooled(self, grid):
        probs, labels = draw(grid)
        assert compute_leep(probs, labels).item() == pytest.approx(loop_leep(samples_of(probs, labels)), abs=1e-12)

    @pytest.mark.parametrize("options", MAP_OPTIONS, ids=str)
    @pytest.mark.parametrize("grid", [(7, 9), (5, 4, 6)], ids=["2D", "3D"])
    def test_map(self, grid, options):
        probs, labels = draw(grid, n=4)
        np.testing.assert_allclose(
            compute_leep_map(probs, labels, **options), loop_map(probs, labels, **options), atol=1e-12
        )

    @pytest.mark.parametrize("grid", [(7, 9), (3, 4, 5)], ids=["2D", "3D"])
    def test_image_maps(self, grid):
        probs, labels = draw(grid, n=3)
        samples = samples_of(probs, labels)
        table = loop_conditional(samples)
        expected = np.reshape([loop_log(table, label, row) for label, row in samples], labels.shape)
        maps = compute_leep_image_maps(probs, labels)
        np.testing.assert_allclose(maps, expected, atol=1e-12)
        assert maps.mean().item() == pytest.approx(compute_leep(probs, labels).item(), abs=1e-12)

    def test_nce(self):
        probs, labels = draw()
        hard = torch.nn.functional.one_hot(probs.argmax(1), 3).double()
        # With hard predictions LEEP is the empirical conditional log-likelihood, which is NCE.
        assert compute_nce(probs.argmax(1), labels).item() == pytest.approx(
            compute_leep(hard, labels).item(), abs=1e-12
        )

    @pytest.mark.parametrize("grid", [(), (6, 5)])
    def test_ignored_samples_might_as_well_not_be_there(self, grid):
        probs, labels = draw(grid)
        labels[torch.rand(labels.shape) < 0.3] = 255
        expected = loop_leep(samples_of(probs, labels, ignore_index=255))
        assert compute_leep(probs, labels, ignore_index=255).item() == pytest.approx(expected, abs=1e-12)
        assert compute_nce(probs.argmax(1), labels, ignore_index=255).item() == pytest.approx(
            compute_nce(probs.argmax(1)[labels != 255], labels[labels != 255]).item(), abs=1e-12
        )

    @pytest.mark.parametrize("options", MAP_OPTIONS, ids=str)
    def test_cells_without_a_valid_pixel_are_nan(self, options):
        probs, labels = draw((8, 12), n=5)
        labels[:, :4, :4] = -1
        labels[2, 5:] = -1
        leep_map = compute_leep_map(probs, labels, ignore_index=-1, **options)
        empty = torch.zeros_like(leep_map, dtype=torch.bool)
        stride = options.get("stride", 1)
        empty[: 4 // stride, : 4 // stride] = True
        assert torch.equal(leep_map.isnan(), empty)
        if options == {}:
            expected = loop_leep(samples_of(probs[:, :, 6, 7], labels[:, 6, 7], ignore_index=-1))
            assert leep_map[6, 7].item() == pytest.approx(expected, abs=1e-12)

    def test_ignored_pixels_of_an_image_are_nan(self):
        probs, labels = draw((4, 5), n=3)
        labels[1, 2] = 9
        maps = compute_leep_image_maps(probs, labels, ignore_index=9)
        assert torch.equal(maps.isnan(), labels == 9)
        assert maps.nanmean().item() == pytest.approx(compute_leep(probs, labels, ignore_index=9).item(), abs=1e-12)


class TestInvariants:
    def test_never_above_zero(self):
        for dtype in (torch.float16, torch.float32, torch.float64):
            probs, labels = draw((9, 9), dtype=dtype)
            assert compute_leep(probs, labels) <= 0
            assert (compute_leep_map(probs, labels) <= 0).all()
            assert (compute_leep_image_maps(probs, labels) <= 0).all()
            # One sample a cell is told perfectly, and probabilities may sum to a hair more than one.
            assert (compute_leep_map(probs[:1], labels[:1]) <= 0).all()
            assert (compute_leep_image_maps(probs, labels * 0 + torch.arange(12).view(-1, 1, 1) // 11) <= 0).all()

    def test_order_of_samples(self):
        probs, labels = draw((6, 7))
        order = torch.randperm(len(labels))
        assert compute_leep(probs[order], labels[order]).item() == pytest.approx(compute_leep(probs, labels).item())
        torch.testing.assert_close(compute_leep_map(probs[order], labels[order]), compute_leep_map(probs, labels))

    def test_names_of_source_and_target_classes(self):
        probs, labels = draw((6, 7))
        renamed = torch.tensor([7, 0, 30, 2])[labels]
        renumbered = probs[:, torch.randperm(probs.shape[1])]
        assert compute_leep(renumbered, renamed).item() == pytest.approx(compute_leep(probs, labels).item(), abs=1e-12)
        torch.testing.assert_close(compute_leep_map(renumbered, renamed), compute_leep_map(probs, labels))

    def test_every_sample_twice(self):
        probs, labels = draw((6, 7))
        twice = probs.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1)
        assert compute_leep(*twice).item() == pytest.approx(compute_leep(probs, labels).item(), abs=1e-12)
        torch.testing.assert_close(compute_leep_map(*twice), compute_leep_map(probs, labels))

    def test_merging_source_classes_of_equal_meaning_changes_nothing(self):
        probs, labels = draw((6, 7))
        halves = torch.cat([probs / 2, probs / 2], dim=1)
        assert compute_leep(halves, labels).item() == pytest.approx(compute_leep(probs, labels).item(), abs=1e-12)

    def test_stride_as_large_as_the_image_is_pooled_leep(self):
        probs, labels = draw((6, 7))
        assert compute_leep_map(probs, labels, stride=7).item() == pytest.approx(compute_leep(probs, labels).item())

    def test_much_smoothing_is_the_global_estimator(self):
        probs, labels = draw((6, 7))
        smoothed = compute_leep_map(probs, labels, smoothing=1e12)
        torch.testing.assert_close(smoothed, compute_leep_map(probs, labels, estimator="global"), atol=1e-9, rtol=0)

    def test_uninformative_source_scores_the_label_entropy(self):
        _, labels = draw(n=200)
        frequency = labels.bincount() / len(labels)
        leep = compute_leep(torch.full((200, 3), 1 / 3), labels)
        assert leep.item() == pytest.approx((frequency * frequency.log()).sum().item(), abs=1e-6)

    def test_the_smallest_likelihoods_there_are(self):
        """A label of its own for every sample: each likelihood is 1 / N, and they are multiplied in groups."""
        n = 3003
        found = compute_leep(torch.full((n, 2), 0.5), torch.arange(n))
        assert found.item() == pytest.approx(-np.log(n), rel=1e-12)

    def test_images_larger_than_a_block(self):
        probs, labels = draw((600, 600), n=2)
        leep_map = compute_leep_map(probs, labels)
        for x, y in [(0, 5), (123, 4), (300, 300), (421, 0), (599, 17)]:
            expected = loop_leep(samples_of(probs[:, :, x, y], labels[:, x, y]))
            assert leep_map[x, y].item() == pytest.approx(expected, abs=1e-12)
        # The same pixels as one long list of samples without a grid.
        expected = compute_leep(probs.movedim(1, 3).reshape(-1, 3), labels.flatten())
        assert compute_leep(probs, labels).item() == pytest.approx(expected.item(), abs=1e-12)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_same_device(self, device):
        probs, labels = draw((5, 6))
        for function in (compute_leep, compute_leep_map, compute_leep_image_maps):
            value = function(probs.to(device), labels.to(device))
            assert value.device.type == device
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.cpu(), function(probs, labels), atol=1e-12, rtol=0)
        for metric in (LEEP(), LEEPMap(), LEEPImageMaps()):
            metric.update(probs.to(device), labels)
            assert metric.compute().device.type == device

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str
    )
    def test_dtype(self, dtype, tolerance):
        probs, labels = draw((5, 6))
        for metric, function in [(LEEP(), compute_leep), (LEEPMap(), compute_leep_map)]:
            value = function(probs.to(dtype), labels)
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, function(probs, labels), atol=tolerance, rtol=0)
            metric.update(probs.to(dtype), labels)
            torch.testing.assert_close(metric.compute(), value, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float16])
    def test_label_dtype_and_channel_axis(self, dtype):
        probs, labels = draw((5, 6))
        expected = compute_leep_map(probs, labels)
        assert torch.equal(compute_leep_map(probs, labels.unsqueeze(1).to(dtype)), expected)

    def test_sigmoid_head(self):
        probs, labels = draw((5, 6), n_source=2)
        foreground = probs[:, 1:]
        torch.testing.assert_close(compute_leep_map(foreground, labels), compute_leep_map(probs, labels))
        torch.testing.assert_close(
            compute_leep(foreground[:, :, 0, 0], labels[:, 0, 0]), compute_leep(probs[:, :, 0, 0], labels[:, 0, 0])
        )

    def test_non_contiguous_numpy_metatensor_and_gradient(self):
        probs, labels = draw((5, 6))
        expected = compute_leep_map(probs, labels)
        channels_last = probs.to(memory_format=torch.channels_last)
        transposed = probs.transpose(2, 3).contiguous().transpose(2, 3)
        for same in (channels_last, transposed, probs.numpy(), MetaTensor(probs), probs.clone().requires_grad_()):
            value = compute_leep_map(same, labels)
            assert type(value) is torch.Tensor
            assert not value.requires_grad
            assert torch.equal(value, expected)

    def test_images_of_several_sizes(self):
        images = [draw((4, 5), n=1), draw((6, 3), n=1), draw((4, 5), n=1)]
        probs, labels = [p[0] for p, _ in images], [y[0] for _, y in images]
        maps = compute_leep_image_maps(probs, labels)
        assert [tuple(one_map.shape) for one_map in maps] == [(4, 5), (6, 3), (4, 5)]
        samples = [pair for image in images for pair in samples_of(*image)]
        table = loop_conditional(samples)
        expected = np.reshape([loop_log(table, label, row) for label, row in samples_of(*images[1])], (6, 3))
        np.testing.assert_allclose(maps[1], expected, atol=1e-12)
        metric = LEEPImageMaps()
        for image in images:
            metric.update(*image)
        for one_map, streamed_map in zip(maps, metric.compute(), strict=True):
            torch.testing.assert_close(streamed_map, one_map, atol=1e-12, rtol=0)

    def test_inputs_are_left_as_they_were(self):
        probs, labels = draw((5, 6))
        labels[0] = 255
        before = probs.clone(), labels.clone()
        compute_leep_map(probs, labels, ignore_index=255, stride=2, smoothing=1.0)
        compute_leep_image_maps(probs[:, :1], labels, ignore_index=255)
        assert torch.equal(probs, before[0])
        assert torch.equal(labels, before[1])


class TestStreaming:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("grid", [(), (6, 7), (3, 4, 5)])
    def test_any_split_is_the_one_shot_value(self, grid, dtype):
        probs, labels = draw(grid, dtype=dtype)
        labels[:3] %= 2  # the first batches have seen fewer classes
        pairs = [(LEEP, compute_leep, {})]
        if grid:
            pairs += [(LEEPImageMaps, compute_leep_image_maps, {})]
            pairs += [(LEEPMap, compute_leep_map, options) for options in MAP_OPTIONS]
        for cls, function, options in pairs:
            for sizes in ([1] * 12, [3, 4, 5], [12]):
                value = streamed(cls(**options), probs, labels, sizes)
                torch.testing.assert_close(value, function(probs, labels, **options), atol=1e-12, rtol=0)

    def test_any_split_with_ignored_pixels(self):
        probs, labels = draw((6, 7))
        labels[torch.rand(labels.shape) < 0.3] = 255
        labels[2] = labels[:, 0, 0] = 255
        for cls, function in [
            (LEEP, compute_leep),
            (LEEPMap, compute_leep_map),
            (LEEPImageMaps, compute_leep_image_maps),
        ]:
            value = streamed(cls(ignore_index=255), probs, labels, [1] * 12)
            expected = function(probs, labels, ignore_index=255)
            torch.testing.assert_close(value, expected, atol=1e-12, rtol=0, equal_nan=True)

    def test_merged_in_any_order(self):
        probs, labels = draw((6, 7))
        labels[:4] = labels[:4].clamp(max=1)
        for cls, function in [(LEEP, compute_leep), (LEEPMap, compute_leep_map)]:
            parts = [cls() for _ in range(4)]
            for metric, part, part_labels in zip(parts, probs.split([4, 3, 5]), labels.split([4, 3, 5]), strict=False):
                metric.update(part, part_labels)
            total = cls()
            for k in torch.randperm(4).tolist():  # the fourth has seen nothing
                total.merge(parts[k])
            torch.testing.assert_close(total.compute(), function(probs, labels), atol=1e-12, rtol=0)
            torch.testing.assert_close(parts[1].compute(), function(probs[4:7], labels[4:7]), atol=1e-12, rtol=0)

    def test_merged_image_maps_follow_the_own_ones(self):
        probs, labels = draw((6, 7))
        first, second = LEEPImageMaps(), LEEPImageMaps()
        first.update(probs[:5], labels[:5])
        second.update(probs[5:], labels[5:])
        first.merge(second)
        torch.testing.assert_close(first.compute(), compute_leep_image_maps(probs, labels))

    def test_nce_grows_on_both_sides(self):
        source, target = torch.tensor([0, 1, 0, 5, 2]), torch.tensor([0, 0, 1, 0, 3])
        metric = NCE()
        for k in range(5):
            metric.update(source[k : k + 1], target[k : k + 1])
        torch.testing.assert_close(metric.compute(), compute_nce(source, target))


class TestBadInput:
    """Each is refused with the name of the argument, by the function and by the streaming class, which stays intact."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p, y: (p.index_fill(0, torch.tensor([1]), float("nan")), y), "source_probs holds NaN or Inf"),
            (lambda p, y: (p.index_fill(0, torch.tensor([1]), float("inf")), y), "source_probs holds NaN or Inf"),
            (lambda p, y: (p.log(), y), r"source_probs ranges from -.* softmax"),
            (lambda p, y: (p * 1.5, y), "source_probs (ranges|sums)"),
            (lambda p, y: (p * 0.5, y), "source_probs sums to between 0.5 and 0.5"),
            (lambda p, y: (p[:0], y[:0]), "source_probs is empty"),
            (lambda p, y: (p, y[:0]), "target_labels is empty"),
            (lambda p, y: (p, y[:-1]), "target_labels has shape .* does not fit source_probs"),
            (lambda p, y: (p, y[:, :-1]), "target_labels has shape .* does not fit source_probs"),
            (lambda p, y: (p, torch.stack([y, y], 1)), "target_labels has shape .* one-hot"),
            (lambda p, y: (p, y - 1), "target_labels holds the negative label -1.*ignore_index"),
            (lambda p, y: (p, y + 0.5), "target_labels holds non-integer"),
            (lambda p, y: (p, y * float("nan")), "target_labels holds non-integer"),
            (lambda p, y: (p, y + 100_000), "target_labels holds the label 10000"),
            (lambda p, y: (p[:, 0, 0, 0], y[:, 0, 0]), "source_probs has shape"),
            (lambda p, y: ("probabilities", y), "source_probs is str"),
        ],
    )
    def test_named(self, change, message):
        probs, labels = draw((4, 5))
        changed = change(probs, labels)
        for function in (compute_leep, compute_leep_map, compute_leep_image_maps):
            with pytest.raises(InputError, match=message):
                function(*changed)
        metric = LEEPMap()
        metric.update(probs, labels)
        with pytest.raises(ValueError, match=message):
            metric.update(*changed)
        assert torch.equal(metric.compute(), compute_leep_map(probs, labels))

    def test_everything_ignored(self):
        probs, labels = draw((4, 5))
        for function in (compute_leep, compute_leep_map, compute_leep_image_maps):
            with pytest.raises(InputError, match="target_labels holds no valid sample"):
                function(probs, torch.zeros_like(labels), ignore_index=0)

    def test_negative_label_beside_a_negative_ignore_index(self):
        with pytest.raises(InputError, match="negative label -2"):
            compute_leep(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([-1, -2, 0]), ignore_index=-1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stride": 0}, "stride is 0"),
            ({"stride": 1.5}, "stride is 1.5"),
            ({"estimator": "locl"}, "did you mean 'local'"),
            ({"smoothing": -1.0}, "smoothing is -1.0"),
            ({"smoothing": float("nan")}, "smoothing is nan"),
            ({"smoothing": 1.0, "estimator": "global"}, "smoothing .* leave it 0"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            LEEPMap(**options)
        with pytest.raises(InputError, match=message):
            compute_leep_map(*draw((4, 5)), **options)

    def test_map_without_pixels(self):
        with pytest.raises(InputError, match="a map needs"):
            compute_leep_map(*draw())
        metric = LEEPMap()
        with pytest.raises(InputError, match="a map needs"):
            metric.update(*draw())
        metric.update(*draw((4, 5)))  # what was refused left no trace

    def test_images_on_two_grids(self):
        metric = LEEPMap(stride=4)  # both grids have 2 x 2 cells
        metric.update(*draw((7, 8)))
        with pytest.raises(InputError, match="one grid"):
            metric.update(*draw((8, 8)))

    def test_number_of_source_classes_changes(self):
        metric = LEEP()
        metric.update(*draw(n_source=3))
        with pytest.raises(InputError, match="source_probs differs between batches"):
            metric.update(*draw(n_source=2))

    def test_lists_of_different_length(self):
        probs, labels = draw((4, 5), n=2)
        with pytest.raises(InputError, match="target_labels lists 1 images"):
            compute_leep_image_maps(list(probs), list(labels)[:1])
        with pytest.raises(InputError, match="target_labels lists 0 images"):
            compute_leep_image_maps([], [])
        with pytest.raises(InputError, match="differs between batches"):
            compute_leep_image_maps([probs[0], probs[1, :1]], list(labels))

    def test_nce(self):
        with pytest.raises(InputError, match="source_labels holds the negative"):
            compute_nce([0, -1], [0, 1])
        with pytest.raises(InputError, match="target_labels has shape"):
            compute_nce([0, 1, 1], [0, 1])
        with pytest.raises(InputError, match="no valid sample"):
            compute_nce([0, 1], [3, 3], ignore_index=3)
