"""Feature update: against reference vectors, loops over triplets and plain backward passes, and what must hold."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from drawing import torch_generator
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import BasicUNet, resnet18
from torch import nn

from medtl_ext import InputError
from medtl_ext.metrics import feature_update
from medtl_ext.metrics.feature_update import FeatureUpdate, compute_feature_update, triplet_margin_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def tiny_network(n_features=5, dtype=torch.float32):
    """Two convolutions with batch norm and dropout, features, and a head."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 25, n_features),
        nn.Linear(n_features, 2),
    ).to(dtype)
    network[1].running_mean.uniform_(-1, 1)
    return network


def draw(n=24, n_classes=3):
    """Images and labels."""
    generator = torch_generator()
    labels = torch.arange(n) % n_classes
    images = torch.randn(n, 1, 9, 9, generator=generator) + labels.view(n, 1, 1, 1) * 0.2
    return images, labels


def loop_loss(features, labels, margin=0.05):
    """The mean over triplets with a positive loss, one triplet after the other, by PyTorch's own loss of a triplet."""
    unit = features / features.norm(dim=1, keepdim=True)
    loss = nn.TripletMarginLoss(margin=margin, eps=0)
    losses = [
        loss(unit[a : a + 1], unit[p : p + 1], unit[n : n + 1])
        for a, p, n in product(range(len(labels)), repeat=3)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    positive = [value for value in losses if value > 0]
    return torch.stack(positive).mean() if positive else None


def loop_update(network, images, labels, batch_size, first=0, second=3, last=8):
    """FU by plain backward passes through a copy of the network."""
    network = copy.deepcopy(network).double().eval()
    norms = [0.0, 0.0]
    for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        network.zero_grad()
        loss = loop_loss(network[:last](batch.double()), batch_labels)
        if loss is not None:
            loss.backward()
            norms = [
                total + network[k].weight.grad.norm().item() for total, k in zip(norms, (first, second), strict=True)
            ]
    return norms[1] / norms[0]


@pytest.fixture(scope="module")
def tiny(vectors):
    """The reference's network with a head, and its images and labels."""
    data = {name: torch.from_numpy(value) for name, value in vectors("fu_tinycnn").items() if value.ndim}
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.Linear(10, 3),
    )
    names = [f"{layer}_{part}" for layer in ("conv1", "conv2", "fc") for part in ("weight", "bias")]
    network[:7].load_state_dict(dict(zip(network[:7].state_dict(), map(data.get, names), strict=True)))
    return network, data["images"], data["labels"], data["emb_all"]


class TestReferenceVectors:
    def test_network_is_the_reference(self, tiny):
        network, images, _, features = tiny
        torch.testing.assert_close(network[:7](images), features, atol=1e-6, rtol=0)

    def test_feature_update(self, tiny, vectors):
        network, images, labels, _ = tiny
        expected = vectors("fu_tinycnn")["fu"]
        assert compute_feature_update(network, images, labels).item() == pytest.approx(expected, abs=1e-5)
        # Without a head, when the features' layer is named.
        value = compute_feature_update(network[:7], images, labels, layer="6", convolutions=("0", "2"))
        assert value.item() == pytest.approx(expected, abs=1e-5)

    def test_triplet_loss(self, tiny, vectors):
        _, _, labels, features = tiny
        data = vectors("fu_tinycnn")
        assert triplet_margin_loss(features[:6], labels[:6]).item() == pytest.approx(data["triplet_batch0"], abs=1e-6)
        assert triplet_margin_loss(features, labels).item() == pytest.approx(data["triplet_all36"], abs=1e-6)


class TestTripletLoss:
    @pytest.mark.parametrize("n_classes", [2, 3, 12])
    @pytest.mark.parametrize("margin", [0.05, 0.7])
    def test_value_and_gradient(self, n_classes, margin):
        images, labels = draw(14, n_classes)
        features = images.flatten(1)[:, :4].double().requires_grad_()
        expected = loop_loss(features, labels, margin)
        loss = triplet_margin_loss(features, labels, margin=margin)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        (gradient,) = torch.autograd.grad(loss, features)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0], atol=1e-12, rtol=1e-9)

    @pytest.mark.parametrize("anchors", [1, 5, 14])
    def test_blocks_of_anchors(self, anchors, monkeypatch):
        images, labels = draw(14)
        features = images.flatten(1)[:, :4].double()
        expected = triplet_margin_loss(features, labels)
        monkeypatch.setattr(feature_update, "ANCHORS", anchors)
        assert triplet_margin_loss(features, labels).item() == pytest.approx(expected.item(), abs=1e-14)

    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    def test_scale(self, scale):
        images, labels = draw(14)
        features = images.flatten(1)[:, :4]
        expected = triplet_margin_loss(features, labels).item()
        assert triplet_margin_loss(features * scale, labels).item() == pytest.approx(expected, abs=1e-6)

    def test_without_a_triplet(self):
        features = torch.randn(4, 3, requires_grad=True)
        for labels in (torch.zeros(4), torch.arange(4)):
            loss = triplet_margin_loss(features, labels)
            assert loss.item() == 0
            assert torch.autograd.grad(loss, features)[0].abs().max() == 0
        # All positives nearer than all negatives, by more than the margin.
        apart = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
        assert triplet_margin_loss(apart, torch.tensor([0, 0, 1, 1])).item() == 0

    def test_duplicates(self):
        features = torch.ones(6, 3, requires_grad=True)
        loss = triplet_margin_loss(features, torch.arange(6) % 2)
        assert loss.item() == pytest.approx(0.05)
        assert torch.isfinite(torch.autograd.grad(loss, features)[0]).all()

    def test_many(self):
        # 2,000 samples have two billion triplets.
        labels = torch.arange(2000) % 4
        features = torch.randn(2000, 3)
        sampled = triplet_margin_loss(features[:400], labels[:400]).item()
        assert triplet_margin_loss(features, labels).item() == pytest.approx(sampled, rel=0.05)


class TestAgainstLoops:
    @pytest.mark.parametrize(
        ("n", "batch_size", "default"), [(24, 4, True), (20, 4, True), (13, 3, True), (24, 10, False)]
    )
    def test_batches(self, n, batch_size, default):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw(n, n_classes=2)
        value = compute_feature_update(network, images, labels, batch_size=None if default else batch_size)
        assert value.item() == pytest.approx(loop_update(network, images, labels, batch_size), rel=1e-9)

    def test_single_precision(self):
        network, (images, labels) = tiny_network(), draw()
        value = compute_feature_update(network, images, labels)
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(loop_update(network, images, labels, 4), rel=1e-4)

    def test_layer_by_name(self):
        network, (images, labels) = tiny_network(), draw()
        value = compute_feature_update(network, images, labels, layer="6")
        assert value.item() == pytest.approx(loop_update(network, images, labels, 4, last=7), rel=1e-4)
        # Features on a grid are averaged over it.
        pooled = nn.Sequential(*network[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        value = compute_feature_update(network, images, labels, layer="4")
        assert value.item() == pytest.approx(loop_update(pooled, images, labels, 4, last=7), rel=1e-4)

    def test_order_in_which_convolutions_run(self):
        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(3, 2)
                self.last = nn.Conv2d(4, 3, 3)
                self.unused = nn.Conv2d(1, 1, 1)
                self.second = nn.Conv2d(2, 4, 3)
                self.first = nn.Conv2d(1, 2, 3)

            def forward(self, images):
                return self.head(self.last(self.second(self.first(images).tanh()).tanh()).mean((2, 3)))

        network, (images, labels) = Turned().double(), draw()
        found = compute_feature_update(network, images, labels)
        named = compute_feature_update(network, images, labels, convolutions=["first", "second"])
        assert found == named != compute_feature_update(network, images, labels, convolutions=["second", "last"])

    @pytest.mark.parametrize("spatial_dims", [1, 2, 3])
    def test_resnet(self, spatial_dims):
        network = resnet18(spatial_dims=spatial_dims, n_input_channels=1, num_classes=2)
        labels = torch.arange(12) % 2
        images = torch.randn(12, 1, *[16] * spatial_dims)
        value = compute_feature_update(network, images, labels, batch_size=6)
        named = compute_feature_update(
            network, images, labels, batch_size=6, convolutions=("conv1", "layer1.0.conv1"), layer="avgpool"
        )
        assert value.item() == pytest.approx(named.item(), rel=1e-6)
        assert 0 < value.item() < math.inf


class TestWhatMustHold:
    def test_permutation_within_a_batch_and_names(self):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw()
        expected = compute_feature_update(network, images, labels).item()
        order = torch.cat([torch.randperm(4) + start for start in range(0, 24, 4)])
        assert compute_feature_update(network, images[order], labels[order]).item() == pytest.approx(expected)
        renamed = torch.tensor([9, 0, 4])[labels]
        assert compute_feature_update(network, images, renamed).item() == pytest.approx(expected)

    def test_images_in_batches(self):
        network, (images, labels) = tiny_network(), draw(22)
        expected = compute_feature_update(network, images, labels, batch_size=4)
        parts, label_parts = images.split(4), labels.split(4)
        for given in (
            (list(parts), labels),
            (list(parts), list(label_parts)),
            (iter(parts), labels.tolist()),
            (DataLoader(Dataset(list(images)), batch_size=4), iter(label_parts)),
        ):
            assert compute_feature_update(network, *given).item() == pytest.approx(expected.item(), rel=1e-9)
        assert compute_feature_update(network, images.numpy(), labels.numpy(), batch_size=4) == expected
        assert compute_feature_update(network, images, labels[:, None], batch_size=4) == expected

    def test_streaming(self):
        network, (images, labels) = tiny_network(), draw()
        expected = compute_feature_update(network, images, labels).item()
        parts = []
        for batch, batch_labels in zip(images.split(4), labels.split(4), strict=True):
            parts.append(FeatureUpdate(network))
            parts[-1].update(batch, batch_labels)
        total = pickle.loads(pickle.dumps(parts[0]))
        for part in reversed(parts[1:]):
            total.merge(part)
        assert total.compute().item() == pytest.approx(expected, rel=1e-9)
        total.reset()
        with pytest.raises(InputError, match="seen no sample"):
            total.compute()

    def test_attached_to_an_evaluator(self):
        network, (images, labels) = tiny_network(), draw()
        data = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(data), batch_size=4),
            network=network,
            key_val_metric={"fu": FeatureUpdate(network)},
        )
        evaluator.run()
        expected = compute_feature_update(network, images, labels).item()
        assert evaluator.state.metrics["fu"] == pytest.approx(expected, rel=1e-6)

    def test_engine_without_images(self):
        engine = Engine(lambda engine, batch: batch)
        FeatureUpdate(tiny_network()).attach(engine, "fu")
        with pytest.raises(InputError, match="no 'image'"):
            engine.run([{"label": torch.zeros(2)}])


class TestNetworkIsLeftAsItWas:
    def test_modes_flags_gradients_buffers_and_hooks(self):
        network, (images, labels) = tiny_network().train(), draw()
        network[1].eval()
        network[0].weight.requires_grad_(False)
        network[7].bias.requires_grad_(False)
        network[3].weight.grad = torch.ones_like(network[3].weight)
        before = copy.deepcopy(network)
        before[3].weight.grad = torch.ones_like(network[3].weight)  # which a copy leaves behind
        expected = compute_feature_update(copy.deepcopy(network).requires_grad_().eval(), images, labels)
        assert compute_feature_update(network, images, labels) == expected  # no dropout, no batch statistics
        self.same(network, before)

    def test_after_an_error(self):
        network, (images, labels) = tiny_network().train(), draw()
        network[0].weight.requires_grad_(False)
        before = copy.deepcopy(network)
        with pytest.raises(InputError, match="do not depend on both"):
            compute_feature_update(network, images, labels, layer="1")
        with pytest.raises(RuntimeError):
            compute_feature_update(network, images[..., :4], labels)
        self.same(network, before)

    @staticmethod
    def same(network, before):
        for module, old in zip(network.modules(), before.modules(), strict=True):
            assert module.training == old.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        for parameter, old in zip(network.parameters(), before.parameters(), strict=True):
            assert torch.equal(parameter, old)
            assert parameter.requires_grad == old.requires_grad
            assert (parameter.grad is None) == (old.grad is None)
            assert parameter.grad is None or torch.equal(parameter.grad, old.grad)
        for buffer, old in zip(network.buffers(), before.buffers(), strict=True):
            assert torch.equal(buffer, old)

    @pytest.mark.parametrize(
        "context",
        [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")],
        ids=["no_grad", "inference", "amp"],
    )
    def test_called_from_anywhere(self, context):
        network, (images, labels) = tiny_network(), draw()
        expected = compute_feature_update(network, images, labels)
        with context():
            value = compute_feature_update(network, images + 0, labels + 0)
        assert value == expected
        assert not value.requires_grad

    def test_images_that_the_network_would_change(self):
        network = nn.Sequential(nn.ReLU(inplace=True), *tiny_network())
        images, labels = draw()
        before = images.clone().requires_grad_()
        assert compute_feature_update(network, before, labels) == compute_feature_update(network, images, labels)
        assert torch.equal(images, before)
        assert before.grad is None

    def test_wrapped_network(self):
        network, (images, labels) = tiny_network(), draw()
        wrapped = compute_feature_update(nn.DataParallel(network), images, labels)
        assert wrapped == compute_feature_update(network, images, labels)

    @pytest.mark.parametrize("device", DEVICES)
    def test_device(self, device):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw()
        expected = compute_feature_update(network, images, labels).item()
        value = compute_feature_update(network.to(device), images, labels)
        assert value.device.type == device
        assert value.item() == pytest.approx(expected, rel=1e-6)

    def test_dtype_of_the_images(self):
        network, (images, labels) = tiny_network(), draw()
        images = (images * 20).round().clamp(0, 255)
        expected = compute_feature_update(network, images, labels)
        for dtype in (torch.uint8, torch.int64, torch.float64, torch.float16):
            assert compute_feature_update(network, images.to(dtype), labels) == expected


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x.index_fill(0, torch.tensor([5]), math.nan), y), "images .* NaN or Inf"),
            (lambda x, y: (x.index_fill(0, torch.tensor([5]), math.inf), y), "images .* NaN or Inf"),
            (lambda x, y: (x[:0], y), "labels holds 24 labels for 0 images"),
            (lambda x, y: (x, y[:0]), "labels is empty"),
            (lambda x, y: (x, y[:-1]), "labels holds"),
            (lambda x, y: (x[:-1], y), "labels holds 24 labels for 23 images"),
            (lambda x, y: (list(x.split(6)), y[:-1]), "labels holds"),
            (lambda x, y: (list(x.split(6))[:-1], y), "labels holds 24 labels for 18 images"),
            (lambda x, y: (x, y - 1), "labels holds the negative label"),
            (lambda x, y: (x, y + 0.5), "labels holds non-integer"),
            (lambda x, y: (x, x.long().clamp(0)), "labels has shape .* one class index for each image"),
            (lambda x, y: (x, []), "labels is empty"),
        ],
    )
    def test_named(self, change, message):
        with pytest.raises(InputError, match=message):
            compute_feature_update(tiny_network(), *change(*draw()))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 2}, "batch_size is 2"),
            ({"batch_size": 4.0}, "batch_size is 4.0"),
            ({"layer": "head"}, "layer 'head' is unknown"),
            ({"convolutions": ("0", "conv2")}, "convolutions 'conv2' is unknown"),
            ({"convolutions": ("0", "4")}, "names 4, which has no weight"),
            ({"convolutions": ("0",)}, "names of two modules"),
            ({"convolutions": ("0", "0")}, "names of two modules"),
            ({"convolutions": "03"}, "names of two modules"),
            ({"layer": "2"}, "do not depend on both convolutions"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            compute_feature_update(tiny_network(), *draw(), **options)

    def test_batch_size_beside_batches(self):
        images, labels = draw()
        with pytest.raises(InputError, match="comes in batches already"):
            compute_feature_update(tiny_network(), list(images.split(6)), labels, batch_size=6)

    def test_fewer_than_two_convolutions(self):
        images, labels = draw()
        for network, n in (
            (nn.Sequential(nn.Flatten(), nn.Linear(81, 4), nn.Linear(4, 4), nn.Linear(4, 2)), 0),
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(98, 4), nn.Linear(4, 2)), 1),
        ):
            with pytest.raises(InputError, match=f"ran {n} convolution.* convolutions=\\(first, second\\)"):
                compute_feature_update(network, images, labels)
        # As the message says.
        assert compute_feature_update(network, images, labels, convolutions=("0", "2")).item() > 0

    def test_network_without_parameters(self):
        with pytest.raises(InputError, match="no parameters"):
            FeatureUpdate(nn.Flatten())

    def test_features_that_are_no_vector_for_each_image(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(0), nn.Linear(1, 1))
        network[2].forward = lambda x: x.flatten(0)[:, None]
        with pytest.raises(InputError, match="for each image"):
            compute_feature_update(network, *draw())

    def test_broken_weights(self):
        network = tiny_network()
        network[7].weight.data[0, 0] = math.nan
        with pytest.raises(InputError, match="features of the network hold NaN"):
            compute_feature_update(network, *draw())

    def test_refused_batch_leaves_no_trace(self):
        network, (images, labels) = tiny_network(), draw()
        metric = FeatureUpdate(network)
        metric.update(images[:6], labels[:6])
        expected = metric.compute()
        with pytest.raises(InputError):
            metric.update(images[6:12], labels[6:11])
        with pytest.raises(InputError):
            metric.update(images[6:12] * math.nan, labels[6:12])
        assert metric.compute() == expected


class TestDegenerateInput:
    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda x, y: (x, y * 0), "one class"),
            (lambda x, y: (x, torch.arange(24)), "all singletons"),
            (lambda x, y: (x, y.sort().values), "sorted by label"),
            (lambda x, y: (x[:2], y[:2]), "two images"),
            (lambda x, y: (x[:1], y[:1]), "one image"),
            (lambda x, y: (torch.ones_like(x), y), "constant images"),
        ],
    )
    def test_nan_with_a_warning(self, change, what):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw()
        with pytest.warns(UserWarning, match="no gradient .* FU is NaN"):
            assert compute_feature_update(network, *change(images, labels)).isnan(), what

    def test_dead_first_convolution(self):
        network, (images, labels) = tiny_network(), draw()
        network[1].bias.data.fill_(-1e6)
        with pytest.warns(UserWarning, match="FU is NaN"):
            assert compute_feature_update(network, images, labels).isnan()

    def test_batches_without_a_triplet_do_not_count(self):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw()
        labels[4:8] = 0
        rest = torch.cat([images[:4], images[8:]]), torch.cat([labels[:4], labels[8:]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = compute_feature_update(network, images, labels, batch_size=4)
            assert value.item() == pytest.approx(compute_feature_update(network, *rest, batch_size=4).item())

    @pytest.mark.parametrize("scale", [1e8, 1e-8])
    def test_scale_of_the_features(self, scale):
        network, (images, labels) = tiny_network(dtype=torch.float64), draw()
        expected = compute_feature_update(network, images, labels).item()
        network[7].weight.data *= scale
        network[7].bias.data *= scale
        assert compute_feature_update(network, images, labels).item() == pytest.approx(expected, rel=1e-6)

    def test_segmentation_network_needs_a_layer_with_one_output(self):
        network = BasicUNet(spatial_dims=2, features=(4, 4, 4, 4, 4, 4), out_channels=2)
        images, labels = torch.randn(12, 1, 32, 32), torch.arange(12) % 2
        assert compute_feature_update(network, images, labels, layer="down_4", batch_size=6).item() > 0
