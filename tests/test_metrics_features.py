"""Shared parts of the feature metrics: sums over classes, samples of pixels, reading a network's layers."""

from functools import partial

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from metric_cases import draw, evaluate, small_unet
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import resnet18
from torch import nn

from medtl_ext import InputError
from medtl_ext.metrics import FeatureSamples, HScore, MomentMetric, Samples


class Sums(MomentMetric):
    """A metric whose value is its sums."""

    def __init__(self, *needs, **options):
        self.needs = needs
        super().__init__(**options)

    def _evaluate(self, sums):
        return sums


def fed(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


class TestSums:
    def test_equal_numpy(self):
        features, labels = draw(n=500)
        sums = fed(Sums("gram", "squares", "class_gram", "norms"), (features.float(), labels))
        x, y = features.float().double().numpy(), labels.numpy()
        norms = (x**2).sum(1)
        indicators = np.eye(3)[y]
        assert sums["count"].tolist() == np.bincount(y).tolist()
        np.testing.assert_allclose(sums["total"], indicators.T @ x, atol=1e-11)
        np.testing.assert_allclose(sums["squares"], indicators.T @ x**2, atol=1e-11)
        np.testing.assert_allclose(sums["class_gram"], np.einsum("nc,nd,ne->cde", indicators, x, x), atol=1e-10)
        np.testing.assert_allclose(sums["gram"], np.einsum("nd,ne->de", x, x), atol=1e-10)
        np.testing.assert_allclose(sums["cubic"], norms @ x, rtol=1e-9)
        np.testing.assert_allclose(sums["quartic"], [(norms**2).sum()], rtol=1e-9)

    def test_hold_only_what_is_asked_for(self):
        metric = Sums()
        assert set(fed(metric, draw())) == {"count", "total"}
        with pytest.raises(InputError, match="keeps sums, not samples"):
            metric.samples()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: fed(HScore(ignore_index=9), (torch.zeros(3, 2), [9, 9, 1])), "holds 1 sample"),
        (lambda: FeatureSamples().update(torch.zeros(3, 2), [0, 1, 0], ["a", "b"]), "groups names 2 patients for 3"),
        (lambda: fed(FeatureSamples(), *((torch.zeros(3, n), [0, 1, 0]) for n in (2, 3))), "3 channels here, 2 before"),
        (lambda: TWO_PATIENTS.resampled([1, 2, 3]), "one per patient"),
        *((partial(FeatureSamples, pixels=wrong), "pixels is") for wrong in (0, -1, 2.5, "all")),
    ],
)
def test_what_makes_no_sense_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()


TWO_PATIENTS = Samples(torch.arange(3.0)[:, None], torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), ("a", "b"))


def test_a_patient_counts_as_often_as_drawn():
    found = [column.flatten().tolist() for column in TWO_PATIENTS.resampled([1, 2])]
    assert found == [[0, 1, 1, 2, 2], [0, 1, 1, 0, 0]]


class TestReservoir:
    def data(self):
        features, labels = draw((8, 9), n=12, n_classes=2)
        labels[:3] = 0  # a patient without foreground
        return features, labels, ["a"] * 3 + ["b"] * 4 + ["c"] * 5

    def test_keeps_so_many_of_each_class_of_each_patient(self):
        features, labels, groups = self.data()
        samples = fed(FeatureSamples(pixels=20), (features, labels, groups))
        counts = torch.bincount(samples.groups * 2 + samples.labels).tolist()
        assert counts == [20, 0, 20, 20, 20, 20]
        assert samples.names == ("a", "b", "c")
        owners = torch.tensor([samples.names.index(name) for name in groups]).view(-1, 1, 1).expand(labels.shape)
        pixel = (samples.features[:, None] == features.movedim(1, -1).reshape(-1, 5)).all(2).long().argmax(1)
        assert torch.equal(owners.flatten()[pixel], samples.groups)
        assert torch.equal(labels.flatten()[pixel], samples.labels)

    @pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7]])
    @pytest.mark.parametrize("pixels", [20, None])
    def test_any_split_and_order_draws_the_same(self, sizes, pixels):
        features, labels, groups = self.data()
        whole = fed(FeatureSamples(pixels=pixels), (features, labels, groups))
        total = FeatureSamples(pixels=pixels)
        for index in torch.randperm(12).split(sizes):
            part = FeatureSamples(pixels=pixels)
            part.update(features[index], labels[index], [groups[i] for i in index])
            total.merge(part)
        for drawn, expected in zip(total.compute(), whole, strict=True):
            assert torch.equal(drawn, expected) if isinstance(drawn, torch.Tensor) else drawn == expected

    def test_is_a_fair_sample(self):
        features, labels, _ = self.data()
        rows = features.movedim(1, -1)[labels == 0]
        means = []
        for seed in range(200):
            samples = fed(FeatureSamples(pixels=50, seed=seed), (features, labels))
            means.append(samples.features[samples.labels == 0].mean(0))
        error = (torch.stack(means).mean(0) - rows.mean(0)) / rows.std(0)
        assert error.abs().max() < 4 / 50**0.5 / 200**0.5  # four standard errors

    def test_float_noise_hardly_changes_it(self):
        features, labels = draw(n=2000, width=16)
        noisy = features * (1 + 1e-7 * torch.randn_like(features))
        drawn, again = (fed(FeatureSamples(pixels=100), (x, labels)).features for x in (features, noisy))
        assert (torch.cdist(drawn, again).amin(1) < 1e-4).double().mean() > 0.95

    @pytest.mark.parametrize("scale", [1e8, 1, 1e-8])
    def test_order_follows_content(self, scale):
        features, labels = draw(n=300, width=1)
        features[100:200] = features[:100]  # duplicates, with other labels
        features *= scale
        order = torch.randperm(300)
        samples, again = (fed(FeatureSamples(), of) for of in [(features, labels), (features[order], labels[order])])
        assert torch.equal(samples.features, again.features)
        assert torch.equal(samples.labels, again.labels)
        assert samples.features.flatten().diff().sign().sum().abs() < 100  # and not their size either
        assert not torch.equal(samples.features, features)

    def test_negative_zero_is_zero(self):
        zeros, ones = torch.zeros(4, 1), torch.ones(4, 1)
        signed = [(torch.cat([sign * zeros, ones]), torch.arange(8)) for sign in (1, -1)]
        assert torch.equal(*(fed(FeatureSamples(), one).labels for one in signed))


def slices(n=4, size=32):
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(n):
        image = torch.randn(1, size, size, generator=generator)
        image[:, :, : size // 2] = 0  # outside the body
        label = torch.zeros(1, size, size)
        label[0, 10:14, 20 : 20 + i] = 1  # none in the first
        label[0, 0, 0] = 1  # a pixel of foreground is inside, whatever the image
        items.append({"image": image, "label": label, "subject": f"p{i // 2}"})
    return items


def run(metric, *others, network=None, items=None, **how):
    named = {f"other {k}": other for k, other in enumerate(others)}
    evaluate(items or slices(), network, how=how, metric=metric, **named)
    return metric.samples()


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


class TestEngine:
    @pytest.mark.parametrize("decollate", [True, False])
    def test_scans_of_a_patient_are_resampled_together(self, decollate):
        items = [item | {"patient": "p"} for item in slices()]
        assert run(FeatureSamples(pixels=None), items=items, decollate=decollate).names == ("p",)

    @pytest.mark.parametrize("layer", ["upcat_1", None])
    def test_reads_the_penultimate_features_inside_the_body(self, layer):
        network, seen = small_unet(), []
        samples = run(FeatureSamples(layer=layer, pixels=None), network=network)
        assert hooks(network) == 0
        images, labels = (torch.stack([item[key] for item in slices()])[:, 0] for key in ("image", "label"))
        network.upcat_1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            network(images[:, None])
        inside = (images != 0) | (labels > 0)
        expected = seen[0].movedim(1, -1)[inside].double()
        np.testing.assert_allclose(samples.features.sum(0), expected.sum(0), rtol=1e-5)
        assert len(samples.labels) == int(inside.sum())
        assert int(samples.labels.sum()) == int(labels.sum()) == 28
        assert samples.names == ("p0", "p1")

    def test_a_layer_whose_output_is_overwritten_in_place(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
        features = run(FeatureSamples(layer="0", pixels=None), network=network).features
        assert features.min() < 0

    def test_inside_the_body_any_channel_is_not_zero(self):
        image = torch.zeros(2, 32, 32)
        image[1, :, :20] = -1
        items = [{"image": image, "label": torch.zeros(1, 32, 32), "subject": "p"}]
        network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1))
        assert len(run(FeatureSamples(pixels=None), network=network, items=items).labels) == 32 * 20

    def test_several_metrics_share_one_tap(self):
        network, ran = small_unet(), []
        network.down_1.register_forward_hook(lambda module, inputs, output: ran.append(1))
        others = FeatureSamples(pixels=5), HScore(layer="down_1")
        assert len(run(FeatureSamples(pixels=5), *others, network=network).labels) == 20
        assert len(others[0].samples().labels) == 20
        assert others[1].compute() > 0
        assert len(ran) == 2  # once a batch

    def test_coarse_layer_takes_nearest_labels(self):
        samples = run(FeatureSamples(layer="down_1", pixels=None, body=False))
        assert len(samples.labels) == 4 * 16 * 16
        labels = torch.stack([item["label"][0] for item in slices()])[:, 1::2, 1::2]
        assert int(samples.labels.sum()) == int(labels.sum()) > 0

    def test_samples_are_drawn_from_dense_features_by_default(self):
        samples = run(FeatureSamples())
        assert torch.bincount(samples.groups[samples.labels == 0]).tolist() == [400, 400]

    def test_classification_averages_over_the_grid(self):
        network = resnet18(spatial_dims=2, n_input_channels=1, num_classes=3).eval()
        items = [{"image": torch.randn(1, 32, 32), "label": i % 3} for i in range(4)]
        last_block = FeatureSamples(layer="layer4")
        penultimate = run(FeatureSamples(), last_block, network=network, items=items)
        assert penultimate.features.shape == (4, 512)
        torch.testing.assert_close(penultimate.features, last_block.samples().features, rtol=1e-5, atol=1e-6)

    def test_output_transform_replaces_the_tap(self):
        metric = FeatureSamples(output_transform=lambda output: [[i[key] for i in output] for key in ("pred", "label")])
        assert run(metric).features.shape == (4 * 32 * 32, 2)

    def test_hooks_are_gone_after_an_error(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(7, 3))  # the second layer does not fit
        with pytest.raises(RuntimeError):
            run(FeatureSamples(layer="0"), network=network)
        assert hooks(network) == 0

    def test_what_cannot_be_tapped(self):
        with pytest.raises(InputError, match="did you mean 'upcat_1'"):
            run(FeatureSamples(layer="upcat1"))
        with pytest.raises(InputError, match="use SimpleInferer"):
            run(FeatureSamples(layer="upcat_1"), items=slices(size=64), inferer=SlidingWindowInferer(32))

    def test_an_engine_without_network(self):
        engine = Engine(lambda engine, batch: batch)
        FeatureSamples().attach(engine, "samples")
        with pytest.raises(InputError, match="has no network"):
            engine.run([1])
