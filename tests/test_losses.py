"""Pixel weights and the weighted loss: compared with reference vectors and formulas, also in two processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from medtl_ext import InputError
from medtl_ext.losses import (
    RiskWeightedLoss,
    class_weights,
    frequency_map,
    log_prior,
    prior_image_maps,
    risk_map,
    trs_map,
)
from medtl_ext.metrics import compute_leep_map

NORMALIZATIONS = ["foreground", "mean", "weights"]


def cross_entropy(**options):
    return nn.CrossEntropyLoss(reduction="none", **options)


def draw(grid=(5, 6), *, n=3, n_classes=3, dtype=torch.float32):
    labels = torch.randint(n_classes, (n, 1, *grid))
    labels[0].flatten()[0] = 1
    return torch.randn(n, n_classes, *grid, dtype=dtype), labels, 1 + 9 * torch.rand(grid, dtype=dtype)


def over_foreground(pixel, labels):
    return pixel.sum() / (labels > 0).sum()


@pytest.fixture(scope="module")
def seg(vectors):
    return {name: torch.as_tensor(value) for name, value in vectors("seg_binary").items()}


class TestRiskMap:
    @pytest.mark.parametrize("stride", [1, 4])
    @pytest.mark.parametrize(("options", "name"), [({}, "text"), ({"direction": "literal"}, "literal")])
    def test_reference(self, seg, stride, options, name):
        leep_map = compute_leep_map(seg["logits"].double().softmax(1), seg["labels"], stride=stride)
        np.testing.assert_allclose(risk_map(leep_map, **options), seg[f"risk_stride{stride}_{name}"], atol=1e-6)

    def test_hard_pixels_weigh_most(self):
        leep_map = -torch.rand(6, 7)
        weights = risk_map(leep_map, base=5.0)
        assert (weights.min(), weights.max()) == (1, 5)
        assert torch.equal(weights.flatten().argsort(), leep_map.flatten().argsort(descending=True))
        assert_close(weights * risk_map(leep_map, base=5.0, direction="literal"), torch.full((6, 7), 5.0).double())

    @pytest.mark.parametrize("direction", ["hardness", "literal"])
    @pytest.mark.parametrize(
        ("leep", "hardness", "literal"),
        [
            ([-0.3, -0.3], [1, 1], [1, 1]),
            ([-0.3, -0.3 - 1e-16], [1, 1], [1, 1]),  # which differ by rounding
            ([math.nan, math.nan], [1, 1], [1, 1]),
            ([0.0, math.nan, -2.0], [1, 1, 10], [10, 1, 1]),
        ],
    )
    def test_constant_and_nan(self, leep, hardness, literal, direction):
        weights = risk_map(torch.tensor(leep, dtype=torch.float64), direction=direction)
        assert weights.tolist() == {"hardness": hardness, "literal": literal}[direction]

    def test_clipping_an_outlier(self):
        leep_map = torch.linspace(-1, 0, 1001)
        leep_map[500] = -1000.0
        assert risk_map(leep_map).mean() < 1.02
        clipped = risk_map(leep_map, clip=(1, 99))
        low, high = np.percentile(leep_map.double().numpy(), (1, 99))
        expected = 10 ** ((high - leep_map.double().clamp(low, high)) / (high - low))
        assert_close(clipped, expected, atol=1e-9, rtol=0)
        assert clipped[500] == 10

    def test_all_images_share_one_scale(self):
        maps = -torch.rand(3, 4, 5)
        maps[1] *= 0.1
        weights = risk_map(maps)
        assert weights[1].max() < weights.max() == 10
        several_sizes = [maps[0], maps[1].flatten()[:3], maps[1].flatten()[3:], maps[2]]
        for given, found in ((list(maps), weights[2]), (several_sizes, weights[2])):
            listed = risk_map(given)
            assert_close(listed[-1], found, rtol=1e-14, atol=0)  # vectorised pow rounds by position
            assert_close(torch.cat([one_map.flatten() for one_map in listed]), weights.flatten(), rtol=1e-14, atol=0)

    def test_size_undoes_the_stride(self):
        leep_map = compute_leep_map(torch.rand(2, 1, 10, 9), torch.randint(2, (2, 10, 9)), stride=4)
        assert leep_map.shape == (3, 3)
        expected = risk_map(leep_map)[torch.arange(10) // 4][:, torch.arange(9) // 3]
        assert torch.equal(risk_map(leep_map, size=(10, 9)), expected)  # nine pixels in three cells: three each
        assert risk_map(leep_map.expand(5, 3, 3), size=(12, 12)).shape == (5, 12, 12)


class TestBaselines:
    def test_trs_map(self, seg):
        weights = trs_map(seg["leep_map_stride4"])
        # ICIP23 uses exp(LEEP) as the transferability of a cell, and its inverse as the weight.
        np.testing.assert_allclose(weights, 1 / seg["icip_map_exp_leep"], atol=1e-6)
        interpolated = F.interpolate(weights[None, None], size=(24, 32), mode="nearest")[0, 0]
        assert torch.equal(trs_map(seg["leep_map_stride4"], size=(24, 32)), interpolated)
        assert trs_map(torch.tensor([torch.nan, 0.0])).tolist() == [1, 1]

    @pytest.mark.parametrize("grid", [(4, 5), (3, 4, 5)])
    def test_frequency_map(self, grid):
        labels = torch.randint(3, (6, *grid))
        expected = 10 ** (labels > 0).double().mean(0)
        dataset_items = (MetaTensor(item.unsqueeze(0).float()) for item in labels)
        for given in (labels, labels.unsqueeze(1).float(), list(labels), dataset_items):
            assert_close(frequency_map(given), expected)
        labels[:, 0, 0], labels[0, 1, 0] = 255, 255
        expected[0, 0], expected[1, 0] = 1, 10 ** (labels[1:, 1, 0] > 0).double().mean(0)
        assert_close(frequency_map(labels, ignore_index=255), expected)

    def test_prior_image_maps(self):
        labels = torch.tensor([[[0, 0, 0, 1]], [[0, 0, 1, 2]]])
        weight = {0: 1.0, 1: 10 ** (math.log(5 / 2) / math.log(5)), 2: 10.0}  # P(y) is 5/8, 2/8, 1/8
        expected = torch.tensor([weight[int(label)] for label in labels.flatten()]).view(2, 1, 4).double()
        assert_close(prior_image_maps(labels), expected, rtol=1e-6, atol=0)
        assert_close(prior_image_maps(labels.unsqueeze(1).float()), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("power", [0, 0.5, 1, 2])
    def test_class_weights(self, power):
        labels = torch.tensor([0] * 12 + [1] * 3 + [3] * 1)
        weights = class_weights(labels, n_classes=5, power=power)
        assert weights.dtype == torch.float32
        assert weights[labels].mean().item() == pytest.approx(1)
        assert (weights[[1, 3]] / weights[0]).tolist() == pytest.approx([4**power, 12**power])
        assert weights[2] == weights[4] == 1  # absent
        items = (part.float().view(1, 2, 4) for part in labels.split(8))
        assert_close(class_weights(items, n_classes=5, power=power), weights)

    def test_log_prior(self):
        prior = log_prior(torch.tensor([[0, 0, 0, 1]]), n_classes=3)
        assert_close(prior, torch.tensor([0.75, 0.25, 0.25]).log())
        assert_close(log_prior([0, 1, 9], n_classes=2, ignore_index=9), torch.tensor([0.5, 0.5]).log())


class TestRiskWeightedLoss:
    def test_reference(self, seg):
        loss = RiskWeightedLoss(cross_entropy(), seg["risk_stride1_text"])
        given, classes = seg["target_logits"], seg["labels"]
        for logits, labels in ((given.double(), classes), (given, classes[:, None])):
            assert loss(logits, labels).item() == pytest.approx(seg["weighted_loss_text"].item(), rel=1e-6)
            plain = RiskWeightedLoss(cross_entropy())(logits, labels)
            assert plain.item() == pytest.approx(seg["ce_sum_over_fg"].item(), rel=1e-6)

    @pytest.mark.parametrize("grid", [(5, 6), (3, 4, 5)], ids=["2D", "3D"])
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_gradient_by_hand(self, grid, normalization):
        logits, labels, weights = draw(grid, dtype=torch.float64)
        loss = RiskWeightedLoss(cross_entropy(), weights, normalization=normalization)
        weights = loss.weight.double()  # the buffer is float32
        divisors = {"foreground": (labels > 0).sum(), "mean": labels.numel(), "weights": weights.sum() * len(labels)}
        logits.requires_grad_()
        loss(logits, labels).backward()
        one_hot = F.one_hot(labels.squeeze(1)).movedim(-1, 1)
        by_hand = weights * (logits.softmax(1) - one_hot) / divisors[normalization]
        assert_close(logits.grad, by_hand.detach())

    def test_map_of_every_shape(self):
        logits, labels, shared = draw()
        per_sample = 1 + torch.rand(labels.squeeze(1).shape)
        pixel = F.cross_entropy(logits, labels.squeeze(1), reduction="none")
        loss = RiskWeightedLoss(cross_entropy(), shared)
        assert_close(loss(logits, labels), over_foreground(pixel * shared, labels))
        expected = over_foreground(pixel * per_sample, labels)
        assert_close(loss(logits, labels, per_sample), expected)
        assert_close(loss(logits, labels, weight=MetaTensor(per_sample.unsqueeze(1).double())), expected)
        assert_close(RiskWeightedLoss(cross_entropy(), per_sample)(logits, labels), expected)
        for normalization in ("mean", "weights"):
            assert_close(RiskWeightedLoss(cross_entropy(), normalization=normalization)(logits, labels), pixel.mean())

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
    def test_labels_of_every_dtype(self, dtype):
        logits, labels, weights = draw()
        loss = RiskWeightedLoss(cross_entropy(), weights)
        assert loss(logits, labels.to(dtype)) == loss(logits, labels)
        assert type(loss(MetaTensor(logits), MetaTensor(labels.to(dtype)))) is torch.Tensor

    def test_other_base_losses(self):
        logits, labels, weights = draw(n_classes=2)
        binary = RiskWeightedLoss(nn.BCEWithLogitsLoss(reduction="none"), weights)
        pixel = F.binary_cross_entropy_with_logits(logits[:, :1], labels.float(), reduction="none").squeeze(1)
        assert_close(binary(logits[:, :1], labels), over_foreground(pixel * weights, labels))
        expected = RiskWeightedLoss(cross_entropy(), weights)(logits, labels)
        focal = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=0, reduction="none")
        assert_close(RiskWeightedLoss(focal, weights)(logits, labels), expected)
        likelihood = RiskWeightedLoss(nn.NLLLoss(reduction="none"), weights)
        assert_close(likelihood(logits.log_softmax(1), labels), expected)
        per_class = class_weights(labels, n_classes=2)
        pixel = F.cross_entropy(logits, labels.squeeze(1), reduction="none") * per_class[labels.squeeze(1)]
        found = RiskWeightedLoss(cross_entropy(weight=per_class), weights)(logits, labels)
        assert_close(found, over_foreground(pixel * weights, labels))

    def test_ignored_pixels_count_nowhere(self):
        logits, labels, weights = draw()
        labels[:, :, 2] = 255
        keep = labels.squeeze(1) != 255
        pixel = F.cross_entropy(logits.movedim(1, -1)[keep], labels.squeeze(1)[keep], reduction="none")
        weight = weights.expand(3, -1, -1)[keep]
        divisors = {"foreground": (labels.squeeze(1)[keep] > 0).sum(), "mean": keep.sum(), "weights": weight.sum()}
        for normalization, divisor in divisors.items():
            loss = RiskWeightedLoss(cross_entropy(ignore_index=255), weights, normalization=normalization)
            assert_close(loss(logits, labels), (pixel * weight).sum() / divisor)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_batch_without_foreground_is_finite(self, normalization):
        logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 1, 4, 4)
        RiskWeightedLoss(cross_entropy(), torch.zeros(4, 4), normalization=normalization)(logits, labels).backward()
        assert torch.isfinite(logits.grad).all()
        plain = RiskWeightedLoss(cross_entropy(), normalization=normalization)(logits, labels)
        assert_close(plain, F.cross_entropy(logits, labels.squeeze(1).long()))  # of the size of other batches' losses

    def test_region_loss_is_added(self):
        logits, labels, weights = draw()
        dice = DiceLoss(to_onehot_y=True, softmax=True)
        both = RiskWeightedLoss(cross_entropy(), weights, region_loss=dice)(logits, labels.squeeze(1))
        assert_close(both, RiskWeightedLoss(cross_entropy(), weights)(logits, labels) + dice(logits, labels))
        unweighted = RiskWeightedLoss(cross_entropy(), normalization="mean", region_loss=dice)
        assert_close(unweighted(logits, labels), DiceCELoss(to_onehot_y=True, softmax=True)(logits, labels))

    def test_half_precision(self):
        logits, labels, weights = draw()
        loss = RiskWeightedLoss(cross_entropy(), weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(logits.bfloat16(), labels)
        assert value.dtype == torch.float32
        assert_close(value, loss(logits.bfloat16().float(), labels))

    def test_the_map_is_a_buffer_outside_the_state_dict(self):
        logits, labels, weights = draw()
        loss = RiskWeightedLoss(cross_entropy())
        assert dict(loss.named_buffers()) == {}
        loss.set_weight(weights)
        assert list(dict(loss.named_buffers())) == ["weight"]
        assert loss.state_dict() == {}
        loss.load_state_dict({})
        assert loss.to("meta").weight.device.type == "meta"
        given = torch.full_like(weights, 3)
        first, again = (RiskWeightedLoss(cross_entropy(), map_) for map_ in (given, weights))
        again.set_weight(given)
        given.zero_()  # the loss keeps a copy
        for one in (first, again):
            assert_close(one(logits, labels), 3 * RiskWeightedLoss(cross_entropy())(logits, labels))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_gpu(self):
        logits, labels, weights = draw()
        loss = RiskWeightedLoss(cross_entropy(), weights)
        expected = loss(logits, labels)
        assert_close(loss(logits.cuda(), labels.cuda()).cpu(), expected)  # the buffer follows
        assert loss.weight.is_cuda


def weighted(weight, *, channels=1):
    return RiskWeightedLoss(cross_entropy(), weight)(torch.zeros(3, 3, 5, 6), torch.zeros(3, channels, 5, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: risk_map(torch.tensor([0.0, -torch.inf])), "leep_map holds Inf"),
        (lambda: risk_map(torch.tensor([])), "leep_map is empty"),
        (lambda: risk_map(torch.zeros(3), base=0.5), "base is 0.5"),
        (lambda: risk_map(torch.zeros(3), direction="easiness"), "direction 'easiness' is unknown"),
        (lambda: risk_map(torch.zeros(3), clip=(99, 1)), "clip is"),
        (lambda: risk_map(torch.zeros(3, 3), size=(100, 2)), "size .* does not fit"),
        (lambda: risk_map(torch.zeros(3), size=(9, 9)), "size .* does not fit"),
        (lambda: frequency_map([torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)]), "one grid"),
        (lambda: frequency_map([]), "target_labels is empty"),
        (lambda: frequency_map(torch.zeros(2, 3, 3), base=0), "base is 0"),
        (lambda: class_weights(torch.tensor([0, 4]), n_classes=3), "holds the label 4, but n_classes is 3"),
        (lambda: log_prior([], n_classes=3), "holds no valid pixel"),
        (lambda: class_weights(torch.tensor([0]), n_classes=0), "n_classes is 0"),
        (lambda: log_prior(torch.tensor([0.5]), n_classes=3), "non-integer"),
        (lambda: class_weights(torch.tensor([0]), n_classes=1, power=-1), "power is -1"),
        (lambda: RiskWeightedLoss(nn.CrossEntropyLoss()), "base_loss has reduction='mean'"),
        (lambda: RiskWeightedLoss(cross_entropy(), normalization="forground"), "did you mean 'foreground'"),
        (lambda: weighted(-torch.ones(5, 6)), "weight is empty, negative or not finite"),
        (lambda: weighted(torch.full((5, 6), torch.nan)), "weight is empty, negative or not finite"),
        (lambda: weighted(torch.zeros(0, 6)), "weight is empty, negative or not finite"),
        (lambda: weighted(torch.ones(3, 6)), r"weight has shape \(3, 6\)"),
        (lambda: weighted(None, channels=3), "target has shape"),
        (lambda: RiskWeightedLoss(DiceLoss(to_onehot_y=True, reduction="none"))(*draw()[:2]), "returned shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def distributed_batch():
    """Five images. The first two, which one process gets, have almost no foreground."""
    torch.manual_seed(0)
    images, labels = torch.randn(5, 1, 6, 7), torch.randint(2, (5, 1, 6, 7))
    labels[:2] = 0
    labels[0, 0, 0, 0] = 1
    return images, labels, 1 + torch.rand(5, 6, 7)


def one_of_two_processes(rank, rendezvous, results):
    """Save the loss and the gradient of the logits, and the loss of an evaluation, which must not wait for others."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, labels, weights = (part.split([2, 3])[rank] for part in distributed_batch())
    found = {}
    for normalization in NORMALIZATIONS:
        logits = torch.cat([images, -images], 1).requires_grad_()
        loss = RiskWeightedLoss(cross_entropy(), normalization=normalization)(logits, labels, weights)
        loss.backward()
        found[normalization] = loss.detach(), logits.grad
    if rank == 0:
        with torch.no_grad():
            found["alone"] = RiskWeightedLoss(cross_entropy())(logits, labels, weights)
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_average_to_one(tmp_path):
    arguments = str(tmp_path / "rendezvous"), str(tmp_path / "found")
    torch.multiprocessing.start_processes(one_of_two_processes, arguments, nprocs=2, start_method="fork")
    images, labels, weights = distributed_batch()
    first, second = (torch.load(tmp_path / f"found.{rank}") for rank in range(2))
    for normalization in NORMALIZATIONS:
        logits = torch.cat([images, -images], 1).requires_grad_()
        expected = RiskWeightedLoss(cross_entropy(), normalization=normalization)(logits, labels, weights)
        expected.backward()
        (loss, gradient), (other_loss, other_gradient) = first[normalization], second[normalization]
        assert_close((loss + other_loss) / 2, expected.detach())
        assert_close(torch.cat([gradient, other_gradient]) / 2, logits.grad)  # as averaged over processes
    assert_close(first["alone"], RiskWeightedLoss(cross_entropy())(logits[:2].detach(), labels[:2], weights[:2]))
