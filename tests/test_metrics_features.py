"""What the feature metrics share: the tap, sums over classes, the reservoir, engines and processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import BasicUNet, resnet18
from torch import nn

from medtl_ext import InputError
from medtl_ext.metrics.features import (
    FeatureSamples,
    MomentMetric,
    SampleMetric,
    TappedInferer,
    canonical_order,
    check_features,
    content_keys,
    feature_sums,
    tap_features,
)


def test_a_tapped_layer_keeps_what_an_activation_in_place_overwrites():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    inputs = torch.randn(20, 2)
    with tap_features(network, ["0"]) as tapped:
        network(inputs)
    assert torch.equal(tapped["0"][0], network[0](inputs))
    assert float(tapped["0"][0].detach().min()) < 0


class TotalVariance(MomentMetric):
    needs = ("gram", "squares", "class_gram")

    def _evaluate(self, sums):
        mean = sums["total"].sum(0) / sums["count"].sum()
        return sums["gram"].trace() / sums["count"].sum() - mean @ mean


class FirstFeature(SampleMetric):
    def _score(self, features, labels):
        return features[0, 0]


def problem(n=60, width=4, n_classes=3, seed=0, grid=()):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    return torch.randn(n, width, *grid, generator=generator), labels


class TestSums:
    def test_equal_numpy(self):
        features, labels = problem(500)
        sums = feature_sums(features, labels, ["gram", "squares", "class_gram"])
        x, y = features.double().numpy(), labels.numpy()
        for c in range(3):
            members = x[y == c]
            assert sums["count"][c] == len(members)
            np.testing.assert_allclose(sums["total"][c], members.sum(0), atol=1e-12)
            np.testing.assert_allclose(sums["squares"][c], np.einsum("nd,nd->d", members, members), atol=1e-12)
            np.testing.assert_allclose(sums["class_gram"][c], np.einsum("nd,ne->de", members, members), atol=1e-11)
        np.testing.assert_allclose(sums["gram"], np.einsum("nd,ne->de", x, x), atol=1e-11)

    def test_hold_only_what_is_asked_for(self):
        assert set(feature_sums(*problem())) == {"count", "total"}

    @pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 30, 10]])
    def test_any_split_gives_one_shot(self, sizes):
        features, labels = problem()
        whole, parts = TotalVariance(), [TotalVariance() for _ in sizes]
        whole.update(features, labels)
        for metric, x, y in zip(parts, features.split(sizes), labels.split(sizes), strict=True):
            metric.update(x, y)
        for other in parts[1:]:
            parts[0].merge(pickle.loads(pickle.dumps(other)))
        assert parts[0].compute() == pytest.approx(float(whole.compute()), abs=1e-12)
        assert whole.compute() == pytest.approx(float(features.double().var(0, correction=0).sum()), abs=1e-12)


class TestChecks:
    def test_pixels_become_samples(self):
        features, labels = problem(3, grid=(4, 5))
        rows, flat = check_features(features, labels[:, None])
        assert rows.shape == (60, 4)
        assert torch.equal(rows[7], features[0, :, 1, 2].double())
        assert flat[7] == labels[0, 1, 2]

    @pytest.mark.parametrize(
        ("features", "labels", "message"),
        [
            (torch.full((3, 2), torch.nan), [0, 1, 0], "features holds NaN or Inf"),
            (torch.full((3, 2), torch.inf), [0, 1, 0], "features holds NaN or Inf"),
            (torch.zeros(0, 2), [0], "features is empty"),
            (torch.zeros(3), [0, 1, 0], "expected N x D"),
            (torch.zeros(3, 2), [0, 1], "does not fit features"),
            (torch.zeros(3, 2), [0, -1, 0], "negative label -1"),
            (torch.zeros(3, 2), [0, 0.5, 0], "non-integer"),
            (torch.zeros(3, 2, dtype=torch.complex64), [0, 1, 0], "complex"),
        ],
    )
    def test_bad_input_is_named(self, features, labels, message):
        with pytest.raises(InputError, match=message):
            check_features(features, labels)

    def test_too_few_after_ignoring(self):
        with pytest.raises(InputError, match="holds 1 sample"):
            check_features(torch.zeros(3, 2), [9, 9, 1], ignore_index=9, minimum=2)

    def test_groups_for_every_sample(self):
        with pytest.raises(InputError, match="groups names 2 patients for 3 samples"):
            FeatureSamples().update(torch.zeros(3, 2), [0, 1, 0], ["a", "b"])

    def test_one_layer_only(self):
        metric = FeatureSamples()
        metric.update(torch.zeros(3, 2), [0, 1, 0])
        with pytest.raises(InputError, match="3 channels here, 2 before"):
            metric.update(torch.zeros(3, 3), [0, 1, 0])

    @pytest.mark.parametrize("pixels", [0, -1, 2.5, "all"])
    def test_pixels_is_a_number(self, pixels):
        with pytest.raises(InputError, match="pixels is"):
            FeatureSamples(pixels=pixels)

    def test_nothing_seen(self):
        with pytest.raises(InputError, match="has seen no sample"):
            FirstFeature().compute()
        with pytest.raises(InputError, match="keeps sums, not samples"):
            TotalVariance().samples()


class TestKeys:
    def test_survive_float_noise(self):
        features = torch.randn(2000, 16, dtype=torch.float64)
        noisy = features * (1 + 1e-7 * torch.randn_like(features))
        assert (content_keys(features) == content_keys(noisy)).double().mean() > 0.99
        assert not torch.equal(content_keys(features, exact=True), content_keys(noisy, exact=True))

    def test_are_spread_over_the_whole_range(self):
        keys = content_keys(torch.arange(4096.0)[:, None].repeat(1, 2), exact=True).double() / 2**63
        counts, _ = np.histogram(keys.numpy(), bins=16, range=(-1, 1))
        assert counts.min() > 180  # 256 expected, sd 15.5

    @pytest.mark.parametrize("scale", [1e8, 1, 1e-8])
    def test_order_follows_content(self, scale):
        features, labels = problem(300)
        features[100:200] = features[:100]  # duplicates, with other labels
        features = features.double() * scale
        shuffle = torch.randperm(300)
        first, second = canonical_order(features, labels), canonical_order(features[shuffle], labels[shuffle])
        assert torch.equal(features[first], features[shuffle][second])
        assert torch.equal(labels[first], labels[shuffle][second])
        assert not torch.equal(first, torch.arange(300))

    def test_negative_zero_is_zero(self):
        assert torch.equal(content_keys(torch.tensor([[-0.0]])), content_keys(torch.tensor([[0.0]])))


class TestReservoir:
    def data(self):
        features, labels = problem(12, grid=(8, 9), n_classes=2)
        labels[:3] = 0  # a patient without foreground
        return features, labels, ["a"] * 3 + ["b"] * 4 + ["c"] * 5

    def test_keeps_so_many_of_each_class_of_each_patient(self):
        metric = FeatureSamples(pixels=20)
        metric.update(*self.data())
        samples = metric.compute()
        counts = {
            (g, c): int(((samples.groups == g) & (samples.labels == c)).sum()) for g in range(3) for c in range(2)
        }
        assert counts == {(0, 0): 20, (0, 1): 0, (1, 0): 20, (1, 1): 20, (2, 0): 20, (2, 1): 20}
        assert samples.names == ("a", "b", "c")

    @pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7]])
    def test_any_split_and_order_draws_the_same(self, sizes):
        features, labels, groups = self.data()
        whole = FeatureSamples(pixels=20)
        whole.update(features, labels, groups)
        order = torch.randperm(12).split(sizes)
        parts = [FeatureSamples(pixels=20) for _ in order]
        for metric, index in zip(parts, order, strict=True):
            metric.update(features[index], labels[index], [groups[i] for i in index])
        for other in parts[1:]:
            parts[0].merge(other)
        for drawn, expected in zip(parts[0].compute(), whole.compute(), strict=True):
            assert torch.equal(drawn, expected) if isinstance(drawn, torch.Tensor) else drawn == expected

    def test_is_a_fair_sample(self):
        features, labels, _ = self.data()
        means = []
        for seed in range(200):
            metric = FeatureSamples(pixels=50, seed=seed)
            metric.update(features, labels)
            samples = metric.compute()
            means.append(samples.features[samples.labels == 0].mean(0))
        truth = features.movedim(1, -1)[labels == 0].double().mean(0)
        error = torch.stack(means).mean(0) - truth
        assert error.abs().max() < 4 * (1 / 50**0.5) / 200**0.5  # four standard errors of unit-variance features

    def test_moments_of_the_sample(self):
        metric = TotalVariance(pixels=20)
        metric.update(*self.data())
        assert metric.compute() == pytest.approx(float(metric.samples().features.var(0, correction=0).sum()), abs=1e-12)

    def test_compute_leaves_the_metric_as_it_was(self):
        metric = FirstFeature(pixels=5)
        metric.update(*self.data())
        first = metric.compute()
        assert metric.compute() == first
        metric.reset()
        with pytest.raises(InputError, match="seen no sample"):
            metric.compute()


def evaluator(metric, *, network=None, items=None, inferer=None, batch_size=2):
    network = network or BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4))
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items or slices()), batch_size=batch_size),
        network=network,
        inferer=inferer,
        key_val_metric={"metric": metric},
    )


def slices(n=4, size=32):
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(n):
        image = torch.randn(1, size, size, generator=generator)
        image[:, :, : size // 2] = 0  # outside the body
        label = torch.zeros(1, size, size)
        label[0, 10:14, 20 : 20 + i] = 1  # none in the first
        items.append({"image": image, "label": label, "subject": f"p{i // 2}"})
    return items


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


class TestEngine:
    def test_scans_of_a_patient_are_resampled_together(self):
        metric = FeatureSamples(pixels=None)
        evaluator(metric, items=[item | {"patient": "p"} for item in slices()]).run()
        assert metric.samples().names == ("p",)

    @pytest.mark.parametrize("layer", ["upcat_1", None])
    def test_reads_the_penultimate_features_inside_the_body(self, layer):
        network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4)).eval()
        metric = FeatureSamples(layer=layer, pixels=None)
        evaluator(metric, network=network).run()
        samples = metric.samples()
        images = torch.stack([item["image"] for item in slices()])
        labels = torch.stack([item["label"][0] for item in slices()])
        with torch.no_grad(), tap_features(network, ["upcat_1"]) as tapped:
            network(images)
        inside = images[:, 0] != 0
        expected = tapped["upcat_1"][0].movedim(1, -1)[inside].double()
        assert samples.features.sum(0).numpy() == pytest.approx(expected.sum(0).numpy(), rel=1e-5)
        assert len(samples.labels) == int(inside.sum())
        assert int(samples.labels.sum()) == int(labels.sum()) == 24
        assert samples.names == ("p0", "p1")
        assert hooks(network) == 0

    def test_a_pixel_is_inside_the_body_where_any_channel_is_not_zero(self):
        image = torch.zeros(2, 32, 32)
        image[1, :, :20] = -1
        items = [{"image": image, "label": torch.zeros(1, 32, 32), "subject": "p"}]
        network = BasicUNet(spatial_dims=2, in_channels=2, out_channels=2, features=(4, 4, 4, 4, 4, 4))
        metric = FeatureSamples(pixels=None)
        evaluator(metric, network=network, items=items).run()
        assert len(metric.samples().labels) == 32 * 20

    def test_several_metrics_share_one_tap(self):
        metrics = {"a": FeatureSamples(pixels=5), "b": TotalVariance(layer="down_1")}
        engine = evaluator(FirstFeature(pixels=5))
        for name, metric in metrics.items():
            metric.attach(engine, name)
        engine.run()
        assert isinstance(engine.inferer, TappedInferer)
        assert not isinstance(engine.inferer.inferer, TappedInferer)
        assert engine.state.metrics["b"] > 0

    def test_coarse_layer_takes_nearest_labels(self):
        metric = FeatureSamples(layer="down_1", pixels=None, body=False)
        evaluator(metric).run()
        assert len(metric.samples().labels) == 4 * 16 * 16
        labels = torch.stack([item["label"][0] for item in slices()])[:, 1::2, 1::2]
        assert int(metric.samples().labels.sum()) == int(labels.sum()) > 0

    def test_samples_are_drawn_from_dense_features_by_default(self):
        metric = FeatureSamples()
        evaluator(metric).run()
        samples = metric.samples()
        assert [int(((samples.groups == g) & (samples.labels == 0)).sum()) for g in range(2)] == [400, 400]

    def test_classification_averages_over_the_grid(self):
        network = resnet18(spatial_dims=2, n_input_channels=1, num_classes=3).eval()
        items = [{"image": torch.randn(1, 32, 32), "label": i % 3} for i in range(4)]
        penultimate, last_block = FeatureSamples(), FeatureSamples(layer="layer4")
        engine = evaluator(penultimate, network=network, items=items)
        last_block.attach(engine, "last_block")
        engine.run()
        assert penultimate.samples().features.shape == (4, 512)
        torch.testing.assert_close(penultimate.samples().features, last_block.samples().features, rtol=1e-5, atol=1e-6)

    def test_from_a_config_by_target_alone(self):
        config = ConfigParser({"metric": {"_target_": "medtl_ext.metrics.features.FeatureSamples", "pixels": 7}})
        metric = config.get_parsed_content("metric")
        evaluator(metric).run()
        assert len(metric.samples().labels) == 7 + 4 + 7 + 7

    def test_output_transform_replaces_the_tap(self):
        def transform(output):
            return [item["pred"] for item in output], [item["label"] for item in output]

        metric = FeatureSamples(output_transform=transform)
        engine = evaluator(metric)
        engine.run()
        assert metric.samples().features.shape == (4 * 32 * 32, 2)
        assert not isinstance(engine.inferer, TappedInferer)

    def test_unknown_layer_names_the_nearest(self):
        with pytest.raises(InputError, match="did you mean 'upcat_1'"):
            evaluator(FeatureSamples(layer="upcat1")).run()

    def test_hooks_are_gone_after_an_error(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(7, 3))  # the second layer does not fit
        with pytest.raises(RuntimeError):
            evaluator(FeatureSamples(layer="0"), network=network).run()
        assert hooks(network) == 0

    def test_windows_do_not_line_up(self):
        with pytest.raises(InputError, match="use SimpleInferer"):
            evaluator(FeatureSamples(layer="upcat_1"), items=slices(size=64), inferer=SlidingWindowInferer(32)).run()

    def test_an_engine_without_network(self):
        engine = Engine(lambda engine, batch: batch)
        FeatureSamples().attach(engine, "samples")
        with pytest.raises(InputError, match="has no network"):
            engine.run([1])


def _share(rank, world_size, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    features, labels, groups = TestReservoir().data()
    share = slice(rank, None, world_size)
    samples, variance = FeatureSamples(pixels=20), TotalVariance()
    if rank < 2:  # the last process has no data
        share = slice(rank, None, 2)
        samples.update(features[share], labels[share], groups[share])
        variance.update(features[share], labels[share], groups[share])
    torch.save((tuple(samples.compute()), variance.compute()), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_see_the_whole(tmp_path):
    torch.multiprocessing.spawn(_share, (3, tmp_path / "rendezvous", tmp_path), nprocs=3)
    features, labels, groups = TestReservoir().data()
    samples, variance = FeatureSamples(pixels=20), TotalVariance()
    samples.update(features, labels, groups)
    variance.update(features, labels, groups)
    for rank in range(3):
        (x, y, patients, names), value = torch.load(tmp_path / f"{rank}.pt")
        expected = samples.compute()
        assert torch.equal(x, expected.features)
        assert torch.equal(y, expected.labels)
        assert torch.equal(patients, expected.groups)
        assert names == expected.names
        assert value == pytest.approx(float(variance.compute()), abs=1e-9)
