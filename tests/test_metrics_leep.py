"""LEEP, its maps and NCE: compared with reference vectors and the definition, and in limiting cases."""

import numpy as np
import pytest
import torch
from metric_cases import draw, streamed

from medtl_ext import InputError
from medtl_ext.metrics import (
    LEEP,
    LEEPImageMaps,
    LEEPMap,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
    compute_nce,
)

FUNCTIONS = (compute_leep, compute_leep_map, compute_leep_image_maps)
MAP_OPTIONS = [
    {},
    {"stride": 4},
    {"smoothing": 7.0},
    {"stride": 3, "smoothing": 2.5},
    {"estimator": "global"},
    {"estimator": "global", "stride": 4},
]


def predictions(grid=(), *, n=12, n_source=3):
    """Random predictions that depend on the labels, of four classes."""
    features, labels = draw(grid, n=n, width=n_source, n_classes=4)
    return (2 * features).softmax(1), labels


def samples_of(probs, labels):
    """The probabilities and labels of all samples but those labelled 255."""
    rows, valid = probs.movedim(1, -1).reshape(-1, probs.shape[1]), labels.flatten() != 255
    return rows[valid].double().numpy(), labels.flatten()[valid].numpy()


def conditional(*weighted):
    """P(y|z) by the definition, from pairs of a weight and samples."""
    joint = sum(weight * np.eye(5)[labels].T @ rows for weight, (rows, labels) in weighted)
    return joint / joint.sum(0)


def logs(table, rows, labels):
    return np.log((table[labels] * rows).sum(1))


def direct_leep(*images):
    samples = samples_of(*images)
    return logs(conditional((1, samples)), *samples).mean()


def direct_map(probs, labels, *, stride=1, estimator="local", smoothing=0.0):
    """The map by the definition, one cell after the other."""
    everything = samples_of(probs, labels)
    leep_map = np.empty(tuple(-(-length // stride) for length in labels.shape[1:]))
    for cell in np.ndindex(*leep_map.shape):
        window = tuple(slice(k * stride, (k + 1) * stride) for k in cell)
        samples = samples_of(probs[(..., *window)], labels[(..., *window)])
        own = everything if estimator == "global" else samples
        table = conditional((1, own), (smoothing / len(everything[1]), everything))
        leep_map[cell] = logs(table, *samples).mean()
    return leep_map


class TestReferenceVectors:
    @pytest.fixture
    def seg(self, vectors):
        return {name: torch.from_numpy(value) for name, value in vectors("seg_binary").items()}

    @pytest.fixture
    def edge(self, vectors):
        return vectors("edge_leep")

    def test_pooled(self, seg):
        logits, labels = seg["logits"], seg["labels"]
        double = compute_leep(logits.double().softmax(1), labels).item()
        assert double == pytest.approx(seg["leep_pooled_f64"].item(), abs=1e-12)
        assert compute_leep(logits.softmax(1), labels).item() == pytest.approx(seg["leep_pooled"].item(), abs=1e-8)
        assert compute_nce(logits.argmax(1), labels).item() == pytest.approx(seg["nce_pooled"].item(), abs=1e-12)

    @pytest.mark.parametrize("stride", [1, 4])
    def test_map(self, seg, stride):
        leep_map = compute_leep_map(seg["logits"].double().softmax(1), seg["labels"], stride=stride)
        np.testing.assert_allclose(leep_map, seg[f"leep_map_stride{stride}_f64"], atol=1e-12)

    def test_edges(self, edge):
        for probs, labels, expected in (
            ("probs_zero_column", "labels", "leep_expected_zero_column"),  # a source class without mass is dropped
            ("probs_lonely", "labels_lonely", "leep_lonely"),
            ("hard_probs", "hard_labels", "leep_hard"),
        ):
            assert compute_leep(edge[probs], edge[labels]).item() == pytest.approx(float(edge[expected]), abs=1e-12)
        with pytest.warns(UserWarning, match="one class only"):
            assert compute_leep(edge["single_probs"], edge["single_label"]).item() == pytest.approx(0, abs=1e-15)
        with pytest.warns(UserWarning, match="one class only"):
            assert compute_nce(edge["single_probs"].argmax(1), edge["single_label"]) == edge["nce_single"]


class TestAgainstDefinition:
    """A second computation, straight from the definition."""

    @pytest.mark.parametrize("grid", [(), (2, 3, 4)])
    def test_pooled(self, grid):
        probs, labels = predictions(grid)
        assert compute_leep(probs, labels).item() == pytest.approx(direct_leep(probs, labels), abs=1e-12)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("options", MAP_OPTIONS, ids=str)
    @pytest.mark.parametrize(("grid", "ignoring"), [((8, 11), True), ((5, 4, 6), False)], ids=["2D, ignoring", "3D"])
    def test_map(self, grid, ignoring, options):
        probs, labels = predictions(grid, n=4)
        if ignoring:
            labels[:, :4, :4] = labels[2, 5:] = 255  # of the first cells nothing is left
        expected, ignored = direct_map(probs, labels, **options), {"ignore_index": 255} if ignoring else {}
        assert np.isnan(expected).any() == ignoring
        for value in (
            compute_leep_map(probs, labels, **options, **ignored),
            streamed(LEEPMap(**options, **ignored), probs, labels, [1, 2, 1]),
        ):
            np.testing.assert_allclose(value, expected, atol=1e-12)

    def test_images_of_several_sizes(self):
        images = [predictions(grid, n=1) for grid in [(4, 5), (6, 3), (4, 5)]]
        metric = LEEPImageMaps()
        for image in images:
            metric.update(*image)
        table = conditional(*((1, samples_of(*image)) for image in images))
        one_shot = compute_leep_image_maps([probs[0] for probs, _ in images], [labels[0] for _, labels in images])
        for maps in (one_shot, metric.compute()):
            for found, (probs, labels) in zip(maps, images, strict=True):
                expected = logs(table, *samples_of(probs, labels)).reshape(labels.shape[1:])
                np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_images_larger_than_a_block(self):
        probs, labels = predictions((600, 600), n=2)
        leep_map = compute_leep_map(probs, labels)
        for x, y in [(0, 5), (123, 4), (300, 300), (421, 0), (599, 17)]:
            expected = direct_leep(probs[:, :, x, y], labels[:, x, y])
            assert leep_map[x, y].item() == pytest.approx(expected, abs=1e-12)
        # The same pixels as one long list of samples without a grid.
        expected = compute_leep(probs.movedim(1, 3).reshape(-1, 3), labels.flatten())
        assert compute_leep(probs, labels).item() == pytest.approx(expected.item(), abs=1e-12)


class TestLimits:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_never_above_zero(self, dtype):
        probs, labels = predictions((9, 9))
        probs = probs.to(dtype)
        for function in FUNCTIONS:
            assert (function(probs, labels) <= 0).all()
        # One sample a cell is told perfectly, and probabilities may sum to a hair more than one.
        assert (compute_leep_map(probs[:1], labels[:1]) <= 0).all()
        assert (compute_leep_image_maps(probs, labels * 0 + torch.arange(12).view(-1, 1, 1) // 11) <= 0).all()

    def test_a_sigmoid_head_is_a_softmax_of_two(self):
        probs, labels = predictions((5, 6), n_source=2)
        for function in FUNCTIONS:
            torch.testing.assert_close(function(probs[:, 1:], labels), function(probs, labels))

    def test_the_smallest_likelihoods_there_are(self):
        """If every sample has another label, each likelihood is 1 / N."""
        probs, labels = torch.full((3003, 2), 0.5), torch.arange(3003)
        for value in (compute_leep(probs, labels), streamed(LEEP(), probs, labels, 1001)):
            assert value.item() == pytest.approx(-np.log(3003), rel=1e-12)


class TestBadInput:
    def test_negative_label_beside_a_negative_ignore_index(self):
        with pytest.raises(InputError, match="negative label -2"):
            compute_leep(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([-1, -2, 0]), ignore_index=-1)

    def test_images_on_two_grids(self):
        metric, other = LEEPMap(stride=4), LEEPMap(stride=4)  # both grids have 2 x 2 cells
        probs, labels = predictions((7, 8))
        metric.update(probs, labels)
        other.update(*predictions((8, 8)))
        for refused in (lambda: metric.update(*predictions((8, 8))), lambda: metric.merge(other)):
            with pytest.raises(InputError, match="one grid"):
                refused()
        assert torch.equal(metric.compute(), compute_leep_map(probs, labels, stride=4))

    def test_number_of_source_classes_changes(self):
        metric = LEEP()
        metric.update(*predictions(n_source=3))
        with pytest.raises(InputError, match="source_probs differs between batches"):
            metric.update(*predictions(n_source=2))

    def test_lists_of_images(self):
        probs, labels = predictions((4, 5), n=2)
        for images, masks, message in (
            (list(probs), list(labels)[:1], "target_labels lists 1 images"),
            ([], [], "target_labels lists 0 images"),
            ([probs[0], probs[1, :1]], list(labels), "numbers of channels|differs between"),
        ):
            with pytest.raises(InputError, match=message):
                compute_leep_image_maps(images, masks)
