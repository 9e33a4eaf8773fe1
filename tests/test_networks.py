"""Freezing leaves no trace; loading says what it did and refuses a poor fit."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet
from torch import nn

from medtl_ext import InputError
from medtl_ext.networks import freeze, initialized, load_weights, read_weights, trainable_parameters


def unet(out_channels=2, features=(4, 4, 8, 8, 16, 4), spatial_dims=2):
    return BasicUNet(spatial_dims, 1, out_channels, features=features, norm="batch", upsample="deconv")


def dynunet():
    return DynUNet(
        3,
        1,
        2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 4, 8],
        norm_name="batch",
    )


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
    import re

    frozen = {name for name in before if re.match(pattern, name)}
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert frozen
    assert not changed & frozen
    assert any("running_mean" in name for name in changed)  # the rest did train
    assert any("weight" in name for name in changed)


def test_adapt_norm_lets_statistics_follow_but_not_parameters():
    network = freeze(unet(), "conv_0", adapt_norm=True)
    before = copy.deepcopy(network.state_dict())
    network.train()(torch.rand(2, 1, 32, 32) + 5)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("conv_0") and "running_mean" in name for name in changed)
    assert not any(name.startswith("conv_0") and name.endswith("weight") for name in changed)


def test_a_copy_of_a_frozen_network_is_frozen_too():
    network = copy.deepcopy(freeze(unet(), "conv_0"))
    network.train()(torch.rand(2, 1, 32, 32) + 5)
    assert torch.equal(network.conv_0.conv_0.adn.N.running_mean, torch.zeros(4))
    assert len(list(trainable_parameters(network))) < len(list(network.parameters()))


def test_a_pattern_that_matches_nothing_names_the_parts():
    with pytest.raises(InputError, match=r"freeze pattern 'encoder' matches no parameter.*conv_0"):
        freeze(unet(), "encoder")


def test_no_pattern_freezes_nothing():
    assert all(parameter.requires_grad for parameter in freeze(unet(), None).parameters())


def test_a_head_of_another_size_keeps_its_fresh_values():
    source, target = unet(4), unet(2)
    head = target.final_conv.weight.clone()
    report = load_weights(target, source.state_dict())
    assert set(report.mismatched) == {"final_conv.weight", "final_conv.bias"}
    assert torch.equal(target.final_conv.weight, head)
    assert torch.equal(target.conv_0.conv_0.conv.weight, source.conv_0.conv_0.conv.weight)
    assert "2 of another shape (final_conv.weight: (4, 4, 1, 1) in the file, (2, 4, 1, 1) here)" in str(report)


def test_weights_of_another_architecture_raise_and_change_nothing():
    network = unet()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=r"does not fit this BasicUNet: .* expected at least 90%"):
        load_weights(network, unet(features=(8, 8, 16, 16, 32, 8)).state_dict())
    with pytest.raises(InputError, match=r"0 of .* tensors copied"):
        load_weights(network, dynunet().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_source_with_more_classes_than_declared_raises():
    with pytest.raises(InputError, match="number of classes"):
        initialized(unet(2), unet(4).state_dict(), min_share=1.0)


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"state_dict": state}]
)
def test_reads_the_usual_checkpoint_forms(tmp_path, wrap):
    network = nn.Linear(2, 1)
    torch.save(wrap({f"module.{k}": v for k, v in network.state_dict().items()}), tmp_path / "model.pt")
    assert torch.equal(read_weights(tmp_path / "model.pt")["weight"], network.weight)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be read"), (b"not a checkpoint", "cannot be read"), (None, "does not exist")]
)
def test_a_missing_or_damaged_checkpoint_says_so(tmp_path, content, message):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def test_a_truncated_checkpoint_says_so(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(unet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    torch.save({"model": unet()}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_weights(tmp_path / "model.pt")


def test_a_checkpoint_without_tensors_says_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds no network weights"):
        read_weights(tmp_path / "model.pt")
