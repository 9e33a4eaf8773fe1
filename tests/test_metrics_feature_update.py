"""Feature update: compared with reference vectors, loops over triplets, and plain backward passes."""

import copy
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from drawing import torch_generator
from metric_cases import DEVICES, evaluate
from monai.data import DataLoader, Dataset
from monai.networks.nets import resnet18
from torch import nn

from medtl_ext import InputError
from medtl_ext.metrics import FeatureUpdate, compute_feature_update
from medtl_ext.metrics.feature_update import triplet_margin_loss


def tiny_network(dtype=torch.float64):
    """Two convolutions with batch norm and dropout, features, and a head."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 25, 5),
        nn.Linear(5, 2),
    ).to(dtype)
    network[1].running_mean.uniform_(-1, 1)
    return network


def draw(n=24, n_classes=3):
    """Images and labels."""
    labels = torch.arange(n) % n_classes
    images = torch.randn(n, 1, 9, 9, generator=torch_generator()) + labels.view(n, 1, 1, 1) * 0.2
    return images, labels


def loop_loss(features, labels):
    """Mean loss over the triplets with positive loss, one by one, by PyTorch's triplet loss."""
    unit = features / features.norm(dim=1, keepdim=True)
    loss = nn.TripletMarginLoss(margin=0.05, eps=0)
    losses = [
        loss(unit[a : a + 1], unit[p : p + 1], unit[n : n + 1])
        for a, p, n in product(range(len(labels)), repeat=3)
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]
    ]
    positive = [value for value in losses if value > 0]
    return torch.stack(positive).mean() if positive else None


def loop_update(network, images, labels, batch_size, last=8):
    """FU by plain backward passes through a copy of the network."""
    network = copy.deepcopy(network).double().eval()
    for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        loss = loop_loss(network[:last](batch.double()), batch_labels)
        if loss is not None:
            gradients = torch.autograd.grad(loss, [network[0].weight, network[3].weight])
            yield torch.stack([gradient.norm() for gradient in gradients])


def by_loops(*how, **options):
    first, second = sum(loop_update(*how, **options))
    return (second / first).item()


def test_reference_vectors(vectors):
    data = {name: torch.from_numpy(value) for name, value in vectors("fu_tinycnn").items()}
    network = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10), nn.Linear(10, 3)),
    )
    names = [f"{layer}_{part}" for layer in ("conv1", "conv2", "fc") for part in ("weight", "bias")]
    network[:7].load_state_dict(dict(zip(network[:7].state_dict(), map(data.get, names), strict=True)))
    images, labels = data["images"], data["labels"]
    torch.testing.assert_close(network[:7](images), data["emb_all"], atol=1e-6, rtol=0)
    for loss in (loop_loss, triplet_margin_loss):
        assert loss(data["emb_all"][:6], labels[:6]).item() == pytest.approx(data["triplet_batch0"].item(), abs=1e-6)
        assert loss(data["emb_all"], labels).item() == pytest.approx(data["triplet_all36"].item(), abs=1e-6)
    assert compute_feature_update(network, images, labels).item() == pytest.approx(data["fu"].item(), abs=1e-5)
    # Without a head, when the features' layer is named.
    value = compute_feature_update(network[:7], images, labels, layer="6", convolutions=("0", "2"))
    assert value.item() == pytest.approx(data["fu"].item(), abs=1e-5)


def test_memory_is_that_of_the_distances():
    """The backward pass stores the distances of pairs, but no intermediate results of counting triplets."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda _: _):
        triplet_margin_loss(torch.rand(100, 3, requires_grad=True), torch.arange(100) % 2)
    assert sum(kept) < 3 * 8 * 100**2


class TestAgainstLoops:
    @pytest.mark.parametrize(
        ("n", "n_classes", "batch_size", "given"),
        [(24, 2, 4, None), (20, 2, 4, None), (13, 2, 3, None), (24, 2, 10, 10), (24, 3, 24, 24), (14, 12, 14, 14)],
    )
    def test_batches(self, n, n_classes, batch_size, given):
        network, (images, labels) = tiny_network(), draw(n, n_classes)
        expected = by_loops(network, images, labels, batch_size)
        for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            value = compute_feature_update(network.to(dtype), images, labels, batch_size=given)
            assert value.dtype == torch.float64
            assert value.item() == pytest.approx(expected, rel=near)

    def test_layer_by_name(self):
        network, (images, labels) = tiny_network(), draw()
        value = compute_feature_update(network, images, labels, layer="6")
        assert value.item() == pytest.approx(by_loops(network, images, labels, 4, last=7), rel=1e-9)
        # Features on a grid are averaged over it.
        pooled = nn.Sequential(*network[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        value = compute_feature_update(network, images, labels, layer="4")
        assert value.item() == pytest.approx(by_loops(pooled, images, labels, 4, last=7), rel=1e-9)

    def test_order_in_which_convolutions_run(self):
        class Backwards(nn.Sequential):
            def forward(self, images):
                return nn.Sequential(*reversed(self))(images)

        network, (images, labels) = tiny_network(), draw()
        expected = compute_feature_update(network, images, labels)
        backwards = Backwards(*reversed(network))
        assert compute_feature_update(backwards, images, labels) == expected
        other = compute_feature_update(backwards, images, labels, convolutions=["5", "8"])
        assert other.item() == pytest.approx(1 / expected.item())

    def test_resnet(self):
        network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=2)
        images, labels = torch.randn(6, 1, 16, 16, 16), torch.arange(6) % 2
        named = {"convolutions": ("conv1", "layer1.0.conv1"), "layer": "avgpool"}
        values = [compute_feature_update(network, images, labels, batch_size=6, **how).item() for how in ({}, named)]
        assert values == [pytest.approx(values[1], rel=1e-6)] * 2
        assert 0 < values[0] < math.inf

    def test_many_images_of_which_most_are_the_same(self):
        # 2,000 samples have two billion triplets; here those of 40 samples, each many times over.
        network, (images, labels) = tiny_network(), draw(40, 2)
        expected = compute_feature_update(network, images.repeat(2, 1, 1, 1), labels.repeat(2), batch_size=80)
        value = compute_feature_update(network, images.repeat(50, 1, 1, 1), labels.repeat(50), batch_size=2000)
        assert value.item() == pytest.approx(expected.item(), rel=0.05)


class TestWhatMustHold:
    def test_permutation_within_a_batch_names_and_scale(self):
        network, (images, labels) = tiny_network(), draw()
        expected = compute_feature_update(network, images, labels).item()
        order = torch.cat([torch.randperm(4) + start for start in range(0, 24, 4)])
        assert compute_feature_update(network, images[order], labels[order]).item() == pytest.approx(expected)
        renamed = torch.tensor([9, 0, 4])[labels]
        assert compute_feature_update(network, images, renamed).item() == pytest.approx(expected)
        for scale in (1e8, 1e-16):  # of the features
            for parameter in network[7].parameters():
                parameter.data *= scale
            assert compute_feature_update(network, images, labels).item() == pytest.approx(expected, rel=1e-6)

    def test_images_in_batches(self):
        network, (images, labels) = tiny_network(torch.float32), draw(22)
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
        total = FeatureUpdate(network)
        for batch in zip(images.split(4), labels.split(4), strict=True):
            part = FeatureUpdate(network)
            part.update(*batch)
            total.merge(pickle.loads(pickle.dumps(part)))
        assert total.compute().item() == pytest.approx(expected, rel=1e-9)

    def test_attached_to_an_evaluator(self):
        network, (images, labels) = tiny_network(torch.float32), draw()
        data = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        evaluator = evaluate(data, network, batch_size=4, fu=FeatureUpdate(network))
        expected = compute_feature_update(network, images, labels).item()
        assert evaluator.state.metrics["fu"] == pytest.approx(expected, rel=1e-6)


class TestNetworkIsLeftAsItWas:
    @pytest.fixture
    def mixed(self):
        """A network with modules in both modes, frozen weights, and a weight with a gradient."""
        network = tiny_network().train()
        network[1].eval()
        network[0].weight.requires_grad_(False)
        network[7].bias.requires_grad_(False)
        network[3].weight.grad = torch.ones_like(network[3].weight)
        return network

    @staticmethod
    def state(network):
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in network.modules()]
        flags = [(parameter.requires_grad, parameter.grad is None) for parameter in network.parameters()]
        tensors = [*network.state_dict().values(), network[3].weight.grad]
        return [module.training for module in network.modules()], hooks, flags, [tensor.tolist() for tensor in tensors]

    def test_after_a_value(self, mixed):
        images, labels = draw()
        before = self.state(mixed)
        expected = compute_feature_update(copy.deepcopy(mixed).requires_grad_().eval(), images, labels)
        assert compute_feature_update(mixed, images, labels) == expected  # no dropout, no batch statistics
        assert self.state(mixed) == before

    def test_after_an_error(self, mixed):
        images, labels = draw()
        before = self.state(mixed)
        with pytest.raises(InputError, match="do not depend on both"):
            compute_feature_update(mixed, images, labels, layer="1")
        with pytest.raises(RuntimeError):
            compute_feature_update(mixed, images[..., :4], labels)
        assert self.state(mixed) == before

    @pytest.mark.parametrize(
        "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")], ids=["no_grad", "inf", "amp"]
    )
    def test_called_from_anywhere(self, context):
        network, (images, labels) = tiny_network(torch.float32), draw()
        expected = compute_feature_update(network, images, labels)
        with context():
            value = compute_feature_update(network, images + 0, labels + 0)
        assert value == expected
        assert not value.requires_grad

    def test_images_that_the_network_would_change(self):
        network = nn.Sequential(nn.ReLU(inplace=True), *tiny_network(torch.float32))
        images, labels = draw()
        before = images.clone().requires_grad_()
        assert compute_feature_update(network, before, labels) == compute_feature_update(network, images, labels)
        assert torch.equal(images, before)
        assert before.grad is None

    @pytest.mark.parametrize("device", DEVICES)
    def test_device_and_wrapper(self, device):
        network, (images, labels) = tiny_network(), draw()
        expected = compute_feature_update(network, images, labels).item()
        for given in (network.to(device), nn.DataParallel(network)):
            value = compute_feature_update(given, images, labels)
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
        ("change", "options", "message"),
        [
            (lambda x, y: (x * math.nan, y), {}, "images .* NaN or Inf"),
            (lambda x, y: (x[:0], y), {}, "labels holds 24 labels for 0 images"),
            (lambda x, y: (x[:-1], y), {}, "labels holds 24 labels for 23 images"),
            (lambda x, y: (list(x.split(6)), y[:-1]), {}, "labels holds"),
            (lambda x, y: (list(x.split(6))[:-1], y), {}, "labels holds 24 labels for 18 images"),
            (lambda x, y: (x, y - 1), {}, "labels holds the negative label"),
            (lambda x, y: (x, x.long().clamp(0)), {}, "labels holds 1944 labels for 24 images"),
            (lambda x, y: (x, []), {}, "labels is empty"),
            (lambda x, y: (list(x.split(6)), y), {"batch_size": 6}, "but images comes in batches"),
            *((lambda *xy: xy, {"batch_size": value}, f"batch_size is {value}") for value in (2, 4.0)),
            (lambda *xy: xy, {"layer": "head"}, "layer 'head' is unknown"),
            (lambda *xy: xy, {"convolutions": ("0", "conv2")}, "convolutions 'conv2' is unknown"),
            (lambda *xy: xy, {"convolutions": ("0", "4")}, "names 4, which has no weight"),
            *((lambda *xy: xy, {"convolutions": n}, "names of two modules") for n in (("0",), ("0", "0"), "03")),
        ],
    )
    def test_named(self, change, options, message):
        with pytest.raises(InputError, match=message):
            compute_feature_update(tiny_network(), *change(*draw()), **options)

    def test_networks(self):
        with pytest.raises(InputError, match="no parameters"):
            FeatureUpdate(nn.Flatten())
        head = nn.Flatten(), nn.Linear(98, 4), nn.Linear(4, 2)
        one = nn.Sequential(nn.Conv2d(1, 2, 3), *head)
        two = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
        flat = nn.Sequential(*two, nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
        broken = tiny_network()
        broken[7].weight.data[0, 0] = math.nan
        for network, message in (
            (nn.Sequential(nn.Flatten(), nn.Linear(81, 98), *head), "ran 0 convolution"),
            (one, r"ran 1 convolution.* convolutions=\(first, second\)"),
            (flat, "for each image"),
            (broken, "features of the network hold NaN"),
        ):
            with pytest.raises(InputError, match=message):
                compute_feature_update(network, *draw())
        # As the message says.
        assert compute_feature_update(one, *draw(), convolutions=("0", "2")).item() > 0

    def test_refused_batch_leaves_no_trace(self):
        network, (images, labels) = tiny_network(), draw()
        metric = FeatureUpdate(network)
        metric.update(images[:6], labels[:6])
        expected = metric.compute()
        with pytest.raises(InputError):
            metric.update(images[6:12], labels[6:11])
        assert metric.compute() == expected


class TestDegenerateInput:
    @pytest.mark.parametrize(
        "change",
        [
            lambda x, y: (x, y * 0),
            lambda x, y: (x, torch.arange(24)),
            lambda x, y: (x, y.sort().values),
            lambda x, y: (x[:2], y[:2]),
            lambda x, y: (x[:1], y[:1]),
            lambda x, y: (torch.ones_like(x), y),
        ],
        ids=["one class", "all singletons", "sorted by label", "two images", "one image", "constant images"],
    )
    def test_nan_with_a_warning(self, change):
        with pytest.warns(UserWarning, match="no gradient .* FU is NaN"):
            assert compute_feature_update(tiny_network(), *change(*draw())).isnan()

    def test_dead_first_convolution_and_classes_far_apart(self):
        network, (images, labels) = tiny_network(), draw(n_classes=2)
        apart = (labels * 2.0 - 1).view(-1, 1, 1, 1) * torch.ones(9, 9) + 1e-3 * images
        with pytest.warns(UserWarning, match="FU is NaN"):  # all positives nearer than all negatives
            assert compute_feature_update(nn.Sequential(*network[:1], *network[3:]), apart, labels).isnan()
        network[1].bias.data.fill_(-1e6)
        with pytest.warns(UserWarning, match="FU is NaN"):
            assert compute_feature_update(network, images, labels).isnan()

    def test_batches_without_a_triplet_do_not_count(self):
        network, (images, labels) = tiny_network(), draw()
        labels[4:8] = 0
        rest = torch.cat([images[:4], images[8:]]), torch.cat([labels[:4], labels[8:]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = compute_feature_update(network, images, labels, batch_size=4)
            assert value.item() == pytest.approx(compute_feature_update(network, *rest, batch_size=4).item())
