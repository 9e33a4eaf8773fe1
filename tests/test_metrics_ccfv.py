"""CC-FV: compared with reference vectors and with the definition by other libraries."""

from itertools import combinations

import numpy as np
import ot
import pytest
import torch
from drawing import torch_generator
from metric_cases import evaluate, small_unet
from monai.bundle import ConfigParser
from scipy.spatial.distance import pdist

from medtl_ext import InputError
from medtl_ext.metrics import CCFV, FeatureSamples, compute_ccfv

NOTHING = "no two cases share a class of two voxels or more, or all cases have equal features"


def draw(widths=(5, 3), n_cases=4, n_classes=3, sizes=(30, 60)):
    """Random ``features[layer][case]`` and labels; cases differ in size, place and shape."""
    generator = torch_generator()
    features, labels = [], []
    n = torch.randint(*sizes, (n_cases,), generator=generator).tolist()
    classes = [torch.randint(n_classes, (k,), generator=generator) for k in n]
    for width in widths:
        centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64) * 2
        labels.append([case.clone() for case in classes])
        features.append([])
        for case in classes:
            mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
            noise = torch.randn(len(case), width, generator=generator, dtype=torch.float64) @ mix
            shift = torch.randn(width, generator=generator, dtype=torch.float64)
            features[-1].append(centres[case] + noise + shift)
    return features, labels


def each(change, features):
    return [[change(case) for case in layer] for layer in features]


def wasserstein(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    return ot.gaussian.bures_wasserstein_distance(a.mean(0), b.mean(0), a.T.cov(), b.T.cov()).item()


def loop_ccfv(features, labels, *, eps=1e-3, classes=(1, 2)):
    """The score by the definition: loops, SciPy's distances of points, and POT's of Gaussians."""
    score = 0.0
    for layer, layer_labels in zip(features, labels, strict=True):
        layer = [np.asarray(x) for x in layer]
        of_classes = []
        for c in classes:
            parts = [x[np.asarray(y) == c] for x, y in zip(layer, layer_labels, strict=True)]
            distances = [wasserstein(a, b) for a, b in combinations([part for part in parts if len(part) > 1], 2)]
            of_classes += [np.mean(distances)] if distances else []
        energy = np.mean((pdist([x.mean(0) for x in layer]) ** 2 + eps) ** -0.5)
        score -= np.log(energy * np.mean(of_classes))
    return score


def flat(features, labels):
    """One batch of several cases for the streaming class: features of each layer, labels, patients."""
    groups = [f"p{k}" for k, case in enumerate(labels[0]) for _ in case]
    return [torch.cat(layer) for layer in features], torch.cat(labels[0]), groups


class TestReferenceVectors:
    @pytest.fixture
    def data(self, vectors):
        return vectors("ccfv")

    @pytest.fixture
    def sides(self, data):
        parts = [[[data[f"feat_l{layer}_c{c}_case{k}"] for c in range(3)] for k in range(5)] for layer in range(2)]
        labels = [[np.repeat(range(3), [len(part) for part in case]) for case in layer] for layer in parts]
        return [[np.concatenate(case) for case in layer] for layer in parts], labels

    def test_score(self, data, sides):
        assert compute_ccfv(*sides).item() == pytest.approx(data["ccfv_inverse_energy_mean"], abs=2e-6)
        features, labels = sides
        metric = CCFV(layers=["first", "second"])
        for k in torch.randperm(5).tolist():
            metric.update([layer[k] for layer in features], labels[0][k], [k] * len(labels[0][k]))
        assert metric.compute().item() == pytest.approx(data["ccfv_inverse_energy_mean"], abs=2e-6)


class TestAgainstOtherRoutes:
    @pytest.mark.parametrize("eps", [1e-3, 0.0, 0.5])
    def test_definition(self, eps):
        features, labels = draw()
        value = compute_ccfv(features, labels, eps=eps)
        assert value.item() == pytest.approx(loop_ccfv(features, labels, eps=eps), abs=1e-6)

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

    def test_more_dimensions_than_voxels(self):
        features, labels = draw((80,), sizes=(12, 20))
        assert compute_ccfv(features, labels).item() == pytest.approx(loop_ccfv(features, labels), abs=1e-5)


class TestInvariants:
    @pytest.mark.parametrize("scale", [1e8, 1e-8, 3.0])
    def test_scale_plays_no_part_without_eps(self, scale):
        features, labels = draw()
        value = compute_ccfv(each(lambda case: case * scale, features), labels, eps=0)
        assert value.item() == pytest.approx(compute_ccfv(features, labels, eps=0).item(), abs=1e-9)


class TestDegenerateInput:
    @pytest.mark.parametrize("value", [0, 1], ids=["no foreground", "no shared class"])
    def test_nothing_shared(self, value):
        features, labels = draw((4,), n_cases=2)
        labels[0][0].fill_(value)
        labels[0][1].fill_(2 * value)
        with pytest.warns(UserWarning, match=NOTHING):
            assert compute_ccfv(features, labels) == 0

    @pytest.mark.parametrize("eps", [1e-3, 0.0])
    def test_equal_cases_and_perfect_separation(self, eps):
        features, labels = draw((4,))
        perfect = each(lambda case: torch.nn.functional.one_hot(case, 3).double(), labels)
        for sides in ([[features[0][0]] * 3], [[labels[0][0]] * 3]), (perfect, labels):
            with pytest.warns(UserWarning, match=NOTHING):
                assert compute_ccfv(*sides, eps=eps) == 0

    def test_tiny_scale_warns(self):
        features, labels = draw()
        with pytest.warns(UserWarning, match=r"eps 0.001: the variety in CC-FV hardly depends on the features"):
            assert compute_ccfv(each(lambda case: case * 1e-8, features), labels).isfinite()


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x * torch.nan, y), "layer 1, case 2: features holds NaN"),
            (lambda x, y: (x, y[:-1]), "layer 1, case 2: target_labels has shape"),
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
        for sides, message in (
            ((features[0], labels), r"features is not a list of lists; expected features\[layer\]\[case\]"),
            (([], labels), "features is not a list of lists"),
            ((torch.zeros(2, 3, 4, 5), labels), "features is not a list of lists"),
            ((features, labels[0]), "target_labels is not a list of lists"),
            ((features, labels[:1]), r"target_labels lists \[4\] cases in its layers, features \[4, 4\]"),
            (draw(n_cases=1), "needs two or more"),
        ):
            with pytest.raises(InputError, match=message):
                compute_ccfv(*sides)

    @pytest.mark.parametrize("layers", [[], ["a", "a"]])
    def test_layers(self, layers):
        with pytest.raises(InputError, match="layers is"):
            CCFV(layers=layers)


class TestStreaming:
    def test_any_split_of_patients_is_the_one_shot_value(self):
        features, labels = draw()
        expected = compute_ccfv(features, labels).item()
        batch, classes, groups = flat(features, labels)
        metrics = [CCFV(layers=["a", "b"]) for _ in range(3)]
        for metric, rows in zip(metrics, torch.randperm(len(groups)).split([1, len(groups) - 31, 30]), strict=True):
            metric.update([layer[rows] for layer in batch], classes[rows], [groups[row] for row in rows])
        for other in (metrics[2], metrics[1]):
            metrics[0].merge(other)
        assert metrics[0].compute().item() == pytest.approx(expected, abs=1e-9)

    def test_labels_of_each_layer(self):
        features, labels = draw(n_cases=3, sizes=(60, 61))
        metric = CCFV(layers=["fine", "coarse"], ignore_index=255)
        coarse = [x[:15] for x in features[1]], [y[:15] for y in labels[1]]
        layers = (features[0], (3, 6, 10, 5)), (coarse[0], (3, 3, 5, 3))
        grids = [torch.stack(cases).view(shape).movedim(3, 1) for cases, shape in layers]
        classes = [torch.stack(labels[0]).view(3, 1, 6, 10), torch.stack(coarse[1]).view(3, 3, 5)]
        metric.update(grids, classes, ["ann", "bob", "cat"])
        expected = compute_ccfv([features[0], coarse[0]], [labels[0], coarse[1]])
        assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-9)

    def test_what_does_not_fit_leaves_all_layers_as_they_were(self):
        features, labels = draw(n_cases=3, sizes=(40, 41))
        batch, classes, groups = flat(features, labels)
        metric, wider = CCFV(layers=["a", "b"]), CCFV(layers=["a", "b"])
        metric.update(batch, classes, groups)
        wider.update([batch[0], batch[1].repeat(1, 3)], classes, groups)
        expected = metric.compute()
        for refused, message in (
            (lambda: metric.update([batch[0], batch[1] * torch.nan], classes, groups), "NaN"),
            (lambda: metric.update([batch[0], batch[1][:, :2]], classes, groups), "2 channels here, 3 before"),
            (lambda: metric.update(batch[:1], classes, groups), "features lists 1 layers"),
            (lambda: metric.update(batch, classes, groups[:3]), "groups names 3 patients"),
            (lambda: metric.update(batch, classes), "groups is missing"),
            (lambda: metric.merge(wider), "9 channels here, 3 before"),
            (lambda: metric.merge(CCFV()), "other has 1 layers"),
        ):
            with pytest.raises(InputError, match=message):
                refused()
            assert metric.compute() == expected
        metric.reset()
        metric.update([batch[1], batch[0]], classes, groups)  # of another network


def slices(n=6, size=32):
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(n):
        label = torch.zeros(1, size, size)
        label[0, 4:20, 8:20] = 1
        image = torch.randn(1, size, size, generator=generator) + label * (i // 2)
        items.append({"image": image, "label": label, "subject": f"p{i // 2}"})
    return items


class TestEngine:
    @pytest.mark.parametrize("pixels", ["auto", 30])
    @pytest.mark.parametrize("named", [True, False], ids=["patients", "images"])
    def test_reads_several_layers(self, pixels, named):
        """The cases are patients, or images if the batch names no patients."""
        kept = ("image", "label", *(["subject"] if named else []))
        items = [{key: item[key] for key in kept} for item in slices()]
        config = {"_target_": "medtl_ext.metrics.CCFV", "layers": ["upcat_2", "upcat_1"], "pixels": pixels}
        network, metric = small_unet(), ConfigParser({"metric": config}).get_parsed_content("metric")
        evaluate(items, network, ccfv=metric)
        layers = []
        for layer in ("upcat_2", "upcat_1"):
            reservoir = FeatureSamples(layer=layer, pixels=400 if pixels == "auto" else pixels)
            evaluate([{"subject": str(k)} | of for k, of in enumerate(items)], network, batch_size=3, drawn=reservoir)
            samples = reservoir.compute()
            members = [samples.groups == group for group in range(3 if named else 6)]
            layers.append(([samples.features[k] for k in members], [samples.labels[k] for k in members]))
        foreground = 384 if named else 192
        assert [len(case) for case in layers[1][1]] == [60 if pixels == 30 else 400 + foreground] * len(members)
        assert metric.compute().item() == pytest.approx(compute_ccfv(*zip(*layers, strict=True)).item(), abs=1e-5)

    def test_output_transform_replaces_the_tap(self):
        metric = CCFV(output_transform=lambda out: [torch.stack([i[key] for i in out]) for key in ("pred", "label")])
        assert np.isfinite(evaluate(slices(), ccfv=metric).state.metrics["ccfv"])
