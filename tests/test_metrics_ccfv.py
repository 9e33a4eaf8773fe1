"""CC-FV: against reference vectors, against the definition by other libraries, and against what must hold."""

from __future__ import annotations

import pickle
from itertools import combinations

import numpy as np
import ot
import pytest
import torch
from drawing import torch_generator
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import BasicUNet
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from medtl_ext import InputError
from medtl_ext.metrics import ccfv
from medtl_ext.metrics.base import TransferMetric
from medtl_ext.metrics.ccfv import CCFV, compute_ccfv
from medtl_ext.metrics.features import FeatureSamples
from medtl_ext.testing import metric_checks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def draw(widths=(5, 3), n_cases=4, n_classes=3, sizes=(30, 60)):
    """Random ``features[layer][case]`` and labels; cases differ in size, place and shape."""
    generator = torch_generator()
    features, labels = [], []
    for width in widths:
        n = torch.randint(*sizes, (n_cases,), generator=generator).tolist()
        centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64) * 2
        labels.append([torch.randint(n_classes, (k,), generator=generator) for k in n])
        features.append([])
        for case in labels[-1]:
            mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
            noise = torch.randn(len(case), width, generator=generator, dtype=torch.float64) @ mix
            shift = torch.randn(width, generator=generator, dtype=torch.float64)
            features[-1].append(centres[case] + noise + shift)
    return features, labels


def loop_ccfv(features, labels, *, eps=1e-3, variety="cases", classes=(1, 2)):
    """The score by the definition: loops, SciPy's distances, and the square root of A B as it is."""
    score = 0.0
    for layer, layer_labels in zip(features, labels, strict=True):
        of_classes = []
        for c in classes:
            parts = [np.asarray(x)[np.asarray(y) == c] for x, y in zip(layer, layer_labels, strict=True)]
            parts = [part for part in parts if len(part) > 1]
            distances = []
            for a, b in combinations(parts, 2):
                first, second = np.cov(a.T), np.cov(b.T)
                root = sqrtm(first @ second).real
                squared = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
                distances.append(np.sqrt(squared))
            if distances:
                of_classes.append(np.mean(distances))
        if variety == "cases":
            inverse = 1 / np.mean((pdist([np.mean(np.asarray(x), 0) for x in layer]) ** 2 + eps) ** -0.5)
        else:
            units = [np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in layer]
            inverse = np.mean([1 / np.mean((pdist(unit) ** 2 + eps) ** -0.5) for unit in units])
        score += np.log(inverse / np.mean(of_classes))
    return score


def flat(features, labels):
    """One batch of several cases for the streaming class: features of each layer, labels of each, patients."""
    groups = [f"p{k}" for k, case in enumerate(labels[0]) for _ in case]
    return [torch.cat(layer) for layer in features], [torch.cat(layer) for layer in labels], groups


class TestReferenceVectors:
    @pytest.fixture
    def data(self, vectors):
        return vectors("ccfv")

    @pytest.fixture
    def sides(self, data):
        parts = [[[data[f"feat_l{l}_c{c}_case{k}"] for c in range(3)] for k in range(5)] for l in range(2)]  # noqa: E741
        labels = [[np.repeat(range(3), [len(part) for part in case]) for case in layer] for layer in parts]
        return [[np.concatenate(case) for case in layer] for layer in parts], labels

    def test_score(self, data, sides):
        assert compute_ccfv(*sides).item() == pytest.approx(data["ccfv_inverse_energy_mean"], abs=2e-6)

    def test_streamed(self, data, sides):
        features, labels = sides
        metric = CCFV(layers=["first", "second"])
        for k in torch.randperm(5).tolist():
            metric.update([layer[k] for layer in features], labels[0][k], [k] * len(labels[0][k]))
        assert metric.compute().item() == pytest.approx(data["ccfv_inverse_energy_mean"], abs=2e-6)

    @pytest.mark.parametrize("layer", [0, 1])
    def test_terms(self, data, sides, layer):
        cases = [
            (torch.tensor(x).double(), torch.tensor(y))
            for x, y in zip(*map(list, (sides[0][layer], sides[1][layer])), strict=True)
        ]
        distances = torch.cat([ccfv._pairwise_wasserstein([x[y == c] for x, y in cases]) for c in (1, 2)])
        np.testing.assert_allclose(distances, data[f"pairwise_l{layer}"], atol=2e-6)
        if layer == 0:
            assert distances[0].item() == pytest.approx(data["w_distance_0_1"], abs=2e-6)
        # The vector named variety is the energy; the score has its inverse.
        energy = ccfv._energy(torch.stack([x.mean(0) for x, _ in cases]), 1e-3)
        assert energy.item() == pytest.approx(data[f"variety_l{layer}"], abs=2e-6)


class TestAgainstOtherRoutes:
    @pytest.mark.parametrize("variety", ["cases", "voxels"])
    @pytest.mark.parametrize("eps", [1e-3, 0.0, 0.5])
    def test_definition(self, variety, eps):
        features, labels = draw()
        value = compute_ccfv(features, labels, variety=variety, eps=eps)
        assert value.item() == pytest.approx(loop_ccfv(features, labels, variety=variety, eps=eps), abs=1e-6)

    def test_background_between_cases(self):
        features, labels = draw()
        value = compute_ccfv(features, labels, include_background=True)
        assert value.item() == pytest.approx(loop_ccfv(features, labels, classes=(0, 1, 2)), abs=1e-6)

    def test_cases_that_lack_a_class(self):
        features, labels = draw(n_cases=5)
        labels[0][0] = torch.where(labels[0][0] == 2, 1, labels[0][0])  # absent
        labels[1][3] = torch.where(labels[1][3] == 1, 0, labels[1][3])
        labels[1][3][4] = 1  # a single voxel
        for layer in labels:
            layer[2].zero_()  # a patient without any foreground, whose mean still counts in the variety
        assert compute_ccfv(features, labels).item() == pytest.approx(loop_ccfv(features, labels), abs=1e-6)

    @pytest.mark.parametrize(("n", "width"), [(50, 6), (8, 30)], ids=["N > D", "D > N"])
    def test_distance_of_gaussians(self, n, width):
        features, _ = draw((width,), n_cases=3, sizes=(n, n + 20))
        parts = features[0]
        distances = ccfv._pairwise_wasserstein(parts)
        for distance, (a, b) in zip(distances, combinations(parts, 2), strict=True):
            expected = ot.gaussian.bures_wasserstein_distance(a.mean(0), b.mean(0), a.T.cov(), b.T.cov())
            assert distance.item() == pytest.approx(expected.item(), abs=1e-5)

    def test_distance_of_samples_on_a_line(self):
        a, b = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).double(), torch.tensor([[3.0, 7.0], [7.0, 7.0]]).double()
        # Both lie along the first axis: the distance is that of the means and of the standard deviations.
        expected = np.sqrt(4**2 + 7**2 + (np.sqrt(8) - np.sqrt(2)) ** 2)
        assert ccfv._pairwise_wasserstein([a, b]).item() == pytest.approx(expected, abs=1e-9)

    def test_blocks_of_pairs(self, monkeypatch):
        features, labels = draw(n_cases=6)
        expected = compute_ccfv(features, labels)
        monkeypatch.setattr(ccfv, "BLOCK", 60)
        assert compute_ccfv(features, labels).item() == pytest.approx(expected.item(), abs=1e-12)


class TestInvariants:
    def test_layers_add_up(self):
        features, labels = draw((4, 7, 2))
        parts = [compute_ccfv([x], [y]).item() for x, y in zip(features, labels, strict=True)]
        assert compute_ccfv(features, labels).item() == pytest.approx(sum(parts), abs=1e-12)

    @pytest.mark.parametrize("options", [{}, {"variety": "voxels"}, {"variety": "voxels", "n_voxels": 10}], ids=str)
    def test_order_of_cases_and_voxels(self, options):
        features, labels = draw()
        expected = compute_ccfv(features, labels, **options).item()
        order = torch.randperm(4).tolist()
        for layer in range(2):
            mixed = [torch.randperm(len(labels[layer][k])) for k in order]
            features[layer] = [features[layer][k][mix] for k, mix in zip(order, mixed, strict=True)]
            labels[layer] = [labels[layer][k][mix] for k, mix in zip(order, mixed, strict=True)]
        assert compute_ccfv(features, labels, **options).item() == pytest.approx(expected, abs=1e-9)

    def test_names_of_foreground_classes(self):
        features, labels = draw()
        renamed = [[torch.tensor([0, 9, 4])[case] for case in layer] for layer in labels]
        expected = compute_ccfv(features, labels).item()
        assert compute_ccfv(features, renamed).item() == pytest.approx(expected, abs=1e-12)

    def test_shift_and_rotation(self):
        features, labels = draw((5,))
        rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
        moved = [[case @ rotation + 30 for case in layer] for layer in features]
        assert compute_ccfv(moved, labels).item() == pytest.approx(compute_ccfv(features, labels).item(), abs=1e-9)

    @pytest.mark.parametrize("scale", [1e8, 1e-8, 3.0])
    def test_scale_plays_no_part_without_eps(self, scale):
        features, labels = draw()
        scaled = [[case * scale for case in layer] for layer in features]
        value = compute_ccfv(scaled, labels, eps=0)
        assert value.item() == pytest.approx(compute_ccfv(features, labels, eps=0).item(), abs=1e-9)

    def test_consistent_classes_score_higher(self):
        features, labels = draw((6,), n_cases=5, sizes=(200, 300))
        steady = [
            [torch.where((y > 0)[:, None], torch.randn_like(x), x) for x, y in zip(*side, strict=True)]
            for side in zip(features, labels, strict=True)
        ]
        assert compute_ccfv(steady, labels) > compute_ccfv(features, labels)

    def test_draw_of_voxels(self):
        features, labels = draw((4,), sizes=(400, 500))
        whole = compute_ccfv(features, labels, variety="voxels").item()
        drawn = [compute_ccfv(features, labels, variety="voxels", n_voxels=200, seed=k).item() for k in range(2)]
        assert drawn[0] != drawn[1]
        assert drawn == pytest.approx([whole, whole], abs=0.1)


class TestInputsOfEveryKind:
    @pytest.mark.parametrize("device", DEVICES)
    def test_same_device(self, device):
        features, labels = draw()
        value = compute_ccfv([[case.to(device) for case in layer] for layer in features], labels)
        assert value.device.type == device
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert value.item() == pytest.approx(compute_ccfv(features, labels).item(), abs=1e-9)

    def test_voxels_of_a_grid(self):
        features, labels = draw((4,), sizes=(60, 61))
        expected = compute_ccfv(features, labels).item()
        grids = [[case.view(5, 4, 3, 4).movedim(3, 1) for case in features[0]]]
        classes = [[case.view(5, 1, 4, 3).float() for case in labels[0]]]
        assert compute_ccfv(grids, classes).item() == pytest.approx(expected, abs=1e-12)

    def test_lists_arrays_and_gradients(self):
        features, labels = draw()
        expected = compute_ccfv(features, labels)
        for same in (
            [[case.numpy() for case in layer] for layer in features],
            [tuple(case.clone().requires_grad_() for case in layer) for layer in features],
            [[case.T.contiguous().T for case in layer] for layer in features],
        ):
            value = compute_ccfv(same, labels)
            assert value.item() == pytest.approx(expected.item(), abs=1e-12)
            assert not value.requires_grad
        single = [[case.float() for case in layer] for layer in features]
        assert compute_ccfv(single, labels).item() == pytest.approx(expected.item(), abs=1e-5)

    def test_ignored_voxels_might_as_well_not_be_there(self):
        features, labels = draw()
        for case in labels[0] + labels[1]:
            case[::5] = 255
        kept = [[y != 255 for y in layer] for layer in labels]
        expected = compute_ccfv(
            [[x[k] for x, k in zip(*side, strict=True)] for side in zip(features, kept, strict=True)],
            [[y[k] for y, k in zip(*side, strict=True)] for side in zip(labels, kept, strict=True)],
        )
        assert compute_ccfv(features, labels, ignore_index=255) == expected

    def test_inputs_are_left_as_they_were(self):
        features, labels = draw()
        copies = [[case.clone() for case in layer] for layer in (*features, *labels)]
        compute_ccfv(features, labels, variety="voxels", n_voxels=5)
        for layer, copy in zip((*features, *labels), copies, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layer, copy, strict=True))


class TestDegenerateInput:
    def test_no_shared_class(self):
        features, labels = draw((4,), n_cases=2)
        labels[0][0].fill_(1)
        labels[0][1].fill_(2)
        with pytest.warns(UserWarning, match="no two cases share a class"):
            assert compute_ccfv(features, labels) == 0

    def test_no_foreground(self):
        features, labels = draw()
        with pytest.warns(UserWarning, match="no two cases share a class"):
            assert compute_ccfv(features, [[torch.zeros_like(case) for case in layer] for layer in labels]) == 0

    def test_one_class(self):
        features, labels = draw((4,))
        labels = [[torch.ones_like(case) for case in labels[0]]]
        with pytest.warns(UserWarning, match="one class only"):
            value = compute_ccfv(features, labels)
        assert value.item() == pytest.approx(loop_ccfv(features, labels), abs=1e-6)

    @pytest.mark.parametrize("value", [0.0, 1 / 3, 12345.678])
    @pytest.mark.parametrize("variety", ["cases", "voxels"])
    @pytest.mark.filterwarnings("ignore:the mean squared distance")
    def test_constant_features(self, value, variety):
        features, labels = draw()
        constant = [[torch.full_like(case, value) for case in layer] for layer in features]
        with pytest.warns(UserWarning, match="no case differs from another"):
            assert compute_ccfv(constant, labels, variety=variety) == 0

    def test_equal_cases(self):
        features, labels = draw((4,))
        with pytest.warns(UserWarning, match="no case differs from another"):
            assert compute_ccfv([[features[0][0]] * 3], [[labels[0][0]] * 3]) == 0
        with pytest.warns(UserWarning, match="no case differs from another"):
            assert compute_ccfv([[features[0][0]] * 3], [[labels[0][0]] * 3], eps=0) == 0

    def test_more_dimensions_than_voxels(self):
        features, labels = draw((80,), sizes=(12, 20))
        assert compute_ccfv(features, labels).item() == pytest.approx(loop_ccfv(features, labels), abs=1e-4)

    def test_perfect_separation_is_finite(self):
        _, labels = draw((4,))
        features = [[torch.nn.functional.one_hot(case, 3).double() for case in layer] for layer in labels]
        with pytest.warns(UserWarning, match="no case differs from another"):
            assert compute_ccfv(features, labels) == 0

    def test_tiny_scale_warns(self):
        features, labels = draw()
        tiny = [[case * 1e-8 for case in layer] for layer in features]
        with pytest.warns(UserWarning, match=r"eps 0.001: the variety in CC-FV hardly heeds the features"):
            assert compute_ccfv(tiny, labels).isfinite()

    def test_huge_scale_and_half_precision(self):
        features, labels = draw()
        assert compute_ccfv([[case * 1e8 for case in layer] for layer in features], labels).isfinite()
        half = [[(case * 1000).half() for case in layer] for layer in features]
        expected = compute_ccfv(features, labels, eps=0)
        assert compute_ccfv(half, labels).item() == pytest.approx(expected.item(), abs=0.01)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x.index_fill(0, torch.tensor([1]), torch.nan), y), "layer 1, case 2: features holds NaN"),
            (lambda x, y: (x.index_fill(0, torch.tensor([1]), torch.inf), y), "layer 1, case 2: features holds NaN"),
            (lambda x, y: (x[:0], y[:0]), "layer 1, case 2: features is empty"),
            (lambda x, y: (x, y[:-1]), "layer 1, case 2: target_labels has shape"),
            (lambda x, y: (x, y - 1), "layer 1, case 2: target_labels holds the negative label -1"),
            (lambda x, y: (x, y + 0.5), "layer 1, case 2: target_labels holds non-integer"),
            (lambda x, y: (x[:, :2], y), "several numbers of channels in layer 1"),
            (lambda x, y: (x, torch.full_like(y, 255)), "layer 1, case 2: features holds 0 sample"),
        ],
    )
    def test_named(self, change, message):
        features, labels = draw()
        features[1][2], labels[1][2] = change(features[1][2], labels[1][2])
        with pytest.raises(InputError, match=message):
            compute_ccfv(features, labels, ignore_index=255)

    def test_nesting(self):
        features, labels = draw()
        for bad in (features[0], [], torch.zeros(2, 3, 4, 5)):
            with pytest.raises(
                InputError, match=r"features is not a list of lists; expected features\[layer\]\[case\]"
            ):
                compute_ccfv(bad, labels)
        with pytest.raises(InputError, match="target_labels is not a list of lists"):
            compute_ccfv(features, labels[0])
        with pytest.raises(InputError, match=r"target_labels lists \[4\] cases in its layers, features \[4, 4\]"):
            compute_ccfv(features, labels[:1])

    def test_one_case(self):
        features, labels = draw(n_cases=1)
        with pytest.raises(InputError, match="needs two or more"):
            compute_ccfv(features, labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variety": "case"}, "did you mean 'cases'"),
            ({"eps": -1.0}, "eps is -1.0"),
            ({"eps": float("nan")}, "eps is nan"),
            ({"n_voxels": 1}, "n_voxels is 1"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            compute_ccfv(*draw(), **options)
        with pytest.raises(InputError, match=message):
            CCFV(**options)

    @pytest.mark.parametrize("layers", [[], ["a", "a"]])
    def test_layers(self, layers):
        with pytest.raises(InputError, match="layers is"):
            CCFV(layers=layers)


class TestStreaming:
    @pytest.mark.parametrize("options", [{}, {"variety": "voxels", "n_voxels": 15, "seed": 3}], ids=str)
    def test_any_split_is_the_one_shot_value(self, options):
        features, labels = draw()
        labels[1], features[1] = (
            labels[0],
            [x.repeat(5, 1)[: len(y)] for x, y in zip(features[1], labels[0], strict=True)],
        )
        expected = compute_ccfv(features, labels, **options).item()
        batch, classes, groups = flat(features, labels)
        metrics = [CCFV(layers=["a", "b"], **options) for _ in range(3)]
        total = len(groups)
        for metric, rows in zip(metrics, torch.randperm(total).split([1, total - 31, 30]), strict=True):
            metric.update([layer[rows] for layer in batch], classes[0][rows], [groups[row] for row in rows])
        for other in (metrics[2], metrics[1]):
            metrics[0].merge(pickle.loads(pickle.dumps(other)))
        assert metrics[0].compute().item() == pytest.approx(expected, abs=1e-9)

    def test_labels_of_each_layer(self):
        features, labels = draw(n_cases=3, sizes=(60, 61))
        metric = CCFV(layers=["fine", "coarse"], ignore_index=255)
        coarse = [x[:15] for x in features[1]], [y[:15] for y in labels[1]]
        grids = [
            torch.stack(features[0]).view(3, 6, 10, 5).movedim(3, 1),
            torch.stack(coarse[0]).view(3, 3, 5, 3).movedim(3, 1),
        ]
        classes = [torch.stack(labels[0]).view(3, 1, 6, 10), torch.stack(coarse[1]).view(3, 3, 5)]
        metric.update(grids, classes, ["ann", "bob", "cat"])
        expected = compute_ccfv([features[0], coarse[0]], [labels[0], coarse[1]])
        assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-9)

    def test_images_without_patients_are_cases(self):
        features, labels = draw((4,), sizes=(60, 61))
        grids, classes = torch.stack(features[0]).view(4, 6, 10, 4).movedim(3, 1), torch.stack(labels[0]).view(4, 6, 10)
        first, second = CCFV(), CCFV()
        first.update(grids[:2], classes[:2])
        second.update(grids[2:3], classes[2:3])
        second.update(grids[3:], classes[3:])
        first.merge(second)
        assert first.compute().item() == pytest.approx(compute_ccfv(features, labels).item(), abs=1e-9)

    def test_samples_without_patients_are_refused(self):
        with pytest.raises(InputError, match="groups is missing"):
            CCFV().update(torch.zeros(4, 2), [0, 1, 0, 1])

    def test_draws_so_many_of_each_class_of_each_case(self):
        features, labels = draw((4,), sizes=(200, 300))
        metric = CCFV(pixels=20, seed=1)
        reservoir = FeatureSamples(pixels=20, seed=1)
        for k in range(4):
            for target in (metric, reservoir):
                target.update(features[0][k], labels[0][k], [k] * len(labels[0][k]))
        samples = reservoir.compute()
        assert len(samples.labels) == 4 * 3 * 20
        cases = [samples.groups == k for k in range(4)]
        expected = compute_ccfv([[samples.features[k] for k in cases]], [[samples.labels[k] for k in cases]])
        assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-9)

    def test_a_refused_batch_leaves_all_layers_as_they_were(self):
        features, labels = draw(n_cases=3, sizes=(40, 41))
        batch, classes, groups = flat(features, labels)
        metric = CCFV(layers=["a", "b"])
        metric.update(batch, classes, groups)
        expected = metric.compute()
        for bad, message in (
            ([batch[0], batch[1] * torch.nan], "NaN"),
            ([batch[0], batch[1][:, :2]], "2 channels here, 3 before"),
            (batch[:1], "features lists 1 layers"),
        ):
            with pytest.raises(InputError, match=message):
                metric.update(bad, classes, groups)
        with pytest.raises(InputError, match="groups names 3 patients"):
            metric.update(batch, classes, groups[:3])
        assert metric.compute() == expected

    def test_merging_what_does_not_fit(self):
        features, labels = draw((4,))
        metric, wider = CCFV(), CCFV()
        metric.update(*(side[0] for side in flat(features, labels)[:2]), flat(features, labels)[2])
        wider.update(torch.zeros(2, 9), [0, 1], ["a", "b"])
        with pytest.raises(InputError, match="9 channels here, 4 before"):
            metric.merge(wider)
        with pytest.raises(InputError, match="other has 2 layers"):
            metric.merge(CCFV(layers=["a", "b"]))
        assert metric.compute().item() == pytest.approx(compute_ccfv(features, labels).item(), abs=1e-9)

    def test_nothing_seen(self):
        with pytest.raises(InputError, match="seen no sample"):
            CCFV().compute()
        metric = CCFV()
        metric.update(torch.zeros(2, 9), [0, 1], ["a", "b"])
        metric.reset()
        metric.update(torch.zeros(2, 3), [0, 1], ["a", "b"])  # another network


def slices(n=6, size=32):
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(n):
        label = torch.zeros(1, size, size)
        label[0, 4:20, 8:20] = 1
        image = torch.randn(1, size, size, generator=generator) + label * (i // 2)
        items.append({"image": image, "label": label, "subject": f"p{i // 2}"})
    return items


def run(metric, items, batch_size):
    torch.manual_seed(0)
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=batch_size),
        network=BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4)),
        key_val_metric={"ccfv": metric},
    )
    engine.run()
    return engine.state.metrics["ccfv"]


class TestEngine:
    @pytest.mark.parametrize("pixels", ["auto", 30])
    def test_reads_several_layers(self, pixels):
        metric = ConfigParser(
            {"metric": {"_target_": "medtl_ext.metrics.ccfv.CCFV", "layers": ["upcat_2", "upcat_1"], "pixels": pixels}}
        ).get_parsed_content("metric")
        value = run(metric, slices(), batch_size=2)
        layers = []
        for layer in ("upcat_2", "upcat_1"):
            samples = FeatureSamples(layer=layer, pixels=400 if pixels == "auto" else pixels)
            run(samples, slices(), batch_size=3)
            samples = samples.compute()
            members = [samples.groups == group for group in range(3)]
            layers.append(([samples.features[k] for k in members], [samples.labels[k] for k in members]))
        assert [len(case) for case in layers[1][1]] == [30 + 30 if pixels == 30 else 400 + 384] * 3
        assert value == pytest.approx(compute_ccfv(*zip(*layers, strict=True)).item(), abs=1e-5)

    def test_images_are_cases_where_nobody_names_patients(self):
        items = [{key: item[key] for key in ("image", "label")} for item in slices()]
        metric = CCFV()
        run(metric, items, batch_size=2)
        assert len(metric._layers[0].cases()) == 6

    def test_output_transform_replaces_the_tap(self):
        metric = CCFV(
            output_transform=lambda output: (torch.stack([item["pred"] for item in output]), labels_of(output))
        )
        assert isinstance(metric, TransferMetric)
        assert np.isfinite(run(metric, slices(), batch_size=2))


def labels_of(output):
    return torch.stack([item["label"] for item in output])


@pytest.mark.filterwarnings("ignore:the mean squared distance")
@pytest.mark.parametrize(
    ("name", "check"), metric_checks(CCFV, make=lambda: CCFV(include_background=True), grid=(6, 5))
)
def test_conforms(name, check):
    check()
