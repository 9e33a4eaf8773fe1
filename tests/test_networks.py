"""Frozen parts do not change; loading reports what was copied, and raises if weights do not fit."""

import copy
import io
import re

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet
from torch import nn

from medtl_ext import InputError
from medtl_ext.networks import freeze, load_weights, prepared, read_weights, trainable_parameters


def unet(out_channels=2, features=(4, 4, 8, 8, 16, 4)):
    return BasicUNet(2, 1, out_channels, features=features, norm="batch", upsample="deconv")


def dynunet():
    options = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 4, 8]}
    return DynUNet(3, 1, 2, norm_name="batch", **options)


def changed(network, before):
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


# Freezing


@pytest.mark.parametrize(
    ("network", "pattern", "image"),
    [
        (unet(), "conv_0|down_", torch.rand(2, 1, 32, 32)),
        (dynunet(), "input_block|downsamples|bottleneck", torch.rand(2, 1, 8, 8, 8)),
    ],
    ids=["BasicUNet", "DynUNet"],
)
def test_frozen_parameters_and_buffers_are_bit_identical_after_training(network, pattern, image):
    freeze(network, pattern)
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        network.train()
        optimizer.zero_grad()
        network(image).square().mean().backward()
        optimizer.step()
    frozen = {name for name in before if re.match(pattern, name)}
    trained = changed(network, before)
    assert frozen
    assert not trained & frozen
    assert any("running_mean" in name for name in trained)
    assert any("weight" in name for name in trained)


def test_a_copy_of_a_frozen_network_is_frozen_too():
    network = copy.deepcopy(freeze(unet(), "conv_0"))
    network.train()(torch.rand(2, 1, 32, 32) + 5)
    assert torch.equal(network.conv_0.conv_0.adn.N.running_mean, torch.zeros(4))
    assert len(list(trainable_parameters(network))) < len(list(network.parameters()))


def test_a_pattern_that_matches_nothing_names_the_parts():
    with pytest.raises(InputError, match=r"freeze pattern 'encoder' matches no parameter.*conv_0"):
        freeze(unet(), "encoder")


# Loading


def test_a_head_of_another_size_keeps_its_fresh_values():
    source, target = unet(4), unet(2)
    before = copy.deepcopy(target.state_dict())
    report = load_weights(target, source.state_dict())
    assert not changed(target, before) & {"final_conv.weight", "final_conv.bias"}
    assert torch.equal(target.conv_0.conv_0.conv.weight, source.conv_0.conv_0.conv.weight)
    assert report.startswith(f"{len(before) - 2} of {len(before)} tensors copied, ")
    assert "2 of another shape (final_conv.weight: (4, 4, 1, 1) in the file, (2, 4, 1, 1) here)" in report


def test_tensors_that_only_one_side_has_are_named():
    report = load_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "scale": torch.ones(1)}, min_share=0.5)
    assert report == "1 of 2 tensors copied, 1 not in the file (bias), 1 in the file without a place here (scale)"


def test_weights_of_another_architecture_raise_and_change_nothing():
    network = unet()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=r"does not fit this BasicUNet: .* expected at least 90%"):
        load_weights(network, unet(features=(8, 8, 16, 16, 32, 8)).state_dict())
    with pytest.raises(InputError, match=r"0 of .* tensors copied"):
        load_weights(network, dynunet().state_dict())
    assert not changed(network, before)


@pytest.mark.parametrize("wrap", [lambda of: of, lambda of: {"model": of}, lambda of: {"state_dict": of}])
def test_reads_the_usual_checkpoint_forms(tmp_path, wrap):
    network = nn.Linear(2, 1)
    torch.save(wrap({f"module.{k}": v for k, v in network.state_dict().items()}), tmp_path / "model.pt")
    assert torch.equal(read_weights(tmp_path / "model.pt")["weight"], network.weight)


def truncated(network):
    torch.save(network.state_dict(), whole := io.BytesIO())
    return whole.getvalue()[:2000]


def with_another_bit(network: nn.Module) -> bytes:
    """A checkpoint with one changed bit in its last tensor, which torch itself does not notice."""
    torch.save(network.state_dict(), whole := io.BytesIO())
    raw, last = whole.getvalue(), [*network.state_dict().values()][-1].numpy().tobytes()
    at = raw.index(last)
    return raw[:at] + bytes([last[0] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (with_another_bit(unet()), r"its part \S+ is damaged"),
        (b"", "cannot be read as weights"),
        (b"not a checkpoint", "cannot be read as weights"),
        (truncated(unet()), "cannot be read as weights"),
        ({"model": nn.Linear(2, 1)}, r"\(it is damaged, or holds more than tensors\)"),  # code in it, which is not run
        ({"epoch": 3}, "holds no network weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        read_weights(path)


# A network as a config asks for it


def test_a_prepared_network_has_its_weights_frozen_where_asked_on_its_device(tmp_path):
    source, target = unet(), unet()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    how = {"freeze": "conv_0|down_", "min_share": 1.0, "memory_format": torch.channels_last}
    assert prepared(target, weights=tmp_path / "source.pt", **how) is target
    assert not changed(target, source.state_dict())
    assert target.conv_0.conv_1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    names = {name for name, parameter in target.named_parameters() if not parameter.requires_grad}
    assert names == {name for name, _ in target.named_parameters() if re.match("conv_0|down_", name)}
    assert next(prepared(target, device="meta").parameters()).is_meta


def test_a_network_prepared_from_nothing_is_fresh_and_trains_in_full():
    network = unet()
    before = copy.deepcopy(network.state_dict())
    assert not changed(prepared(network), before)
    assert len(list(trainable_parameters(network))) == len(list(network.parameters()))


def test_a_head_is_replaced_though_it_would_fit():
    source, target = unet(), unet()
    head = target.final_conv.weight.clone()
    prepared(target, weights=source.state_dict(), replace_head=True)
    assert changed(target, source.state_dict()) == {"final_conv.weight", "final_conv.bias"}
    assert torch.equal(target.final_conv.weight, head)


def test_a_source_with_more_classes_than_declared_raises():
    with pytest.raises(InputError, match="number of classes"):
        prepared(unet(2), weights=unet(4).state_dict(), min_share=1.0)
