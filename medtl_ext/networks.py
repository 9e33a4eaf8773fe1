"""Start from somebody else's weights, and keep frozen what should stay frozen."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medtl_ext._validation import InputError

__all__ = [
    "LoadReport",
    "freeze",
    "initialized",
    "load_weights",
    "read_weights",
    "trainable_parameters",
]

logger = logging.getLogger(__name__)

NORMALIZATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: names of the network's tensors, and of those in the file that it has no place for."""

    copied: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (shape in the file, shape in the network)
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        total = len(self.copied) + len(self.mismatched) + len(self.missing)
        text = f"{len(self.copied)} of {total} tensors copied"
        if self.mismatched:
            name, (found, expected) = next(iter(self.mismatched.items()))
            text += f", {len(self.mismatched)} of another shape ({name}: {found} in the file, {expected} here)"
        if self.missing:
            text += f", {len(self.missing)} not in the file ({self.missing[0]})"
        if self.unexpected:
            text += f", {len(self.unexpected)} in the file without a place here ({self.unexpected[0]})"
        return text


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a network from a checkpoint file, without running any code the file may hold.

    Understands a plain ``state_dict``, one under the key ``model``, ``network``, ``net`` or ``state_dict``, and names
    with the ``module.`` prefix that `torch.nn.parallel.DistributedDataParallel` adds.

    Raises:
        InputError: the file does not exist, is damaged, holds more than tensors and plain values, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"checkpoint {path} does not exist; give the path of a .pt file. If it is of a training that was finished, "
            "delete its folder, and the same command trains it again."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read as weights ({_first_line(error)}); expected a file written by "
            "torch.save(network.state_dict(), path)."
        ) from error
    for key in ("model", "network", "net", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"checkpoint {path} holds no network weights; expected a state_dict, found {type(content)}.")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # what torch says of it advises to read it unsafely
        return "it is damaged, or holds more than tensors"
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_weights(
    network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor], *, min_share: float = 0.9
) -> LoadReport:
    """Copy every tensor that fits by name and shape into ``network``, say what was done, and refuse a poor fit.

    A head of another number of classes does not fit and keeps its fresh values: that is what transfer needs. Weights of
    another architecture fit hardly anywhere: that is a mistake, and raises.

    Args:
        network: the network to fill, in place.
        weights: a checkpoint file (see `read_weights`) or a ``state_dict``.
        min_share: least share of the network's tensors that must have been copied, in [0, 1]. 1 asks for all of them.

    Raises:
        InputError: fewer tensors fit than ``min_share`` asks for. The network is then unchanged.

    >>> network, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> print(load_weights(network, other.state_dict()))
    2 of 2 tensors copied
    """
    where = "the given weights" if isinstance(weights, Mapping) else str(weights)
    found = weights if isinstance(weights, Mapping) else read_weights(weights)
    own = network.state_dict()
    fitting = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    report = LoadReport(
        copied=list(fitting),
        mismatched={
            name: (tuple(found[name].shape), tuple(own[name].shape))
            for name in own
            if name in found and name not in fitting
        },
        missing=[name for name in own if name not in found],
        unexpected=[name for name in found if name not in own],
    )
    if len(fitting) < min_share * len(own):
        raise InputError(
            f"{where} does not fit this {type(network).__name__}: {report}; expected at least {min_share:.0%}. "
            "Was it trained with another architecture or number of classes?"
        )
    network.load_state_dict(fitting, strict=False)
    logger.info("%s: %s", where, report)
    return report


def initialized(
    network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor] | None, *, min_share: float = 0.9
) -> nn.Module:
    """`load_weights` for a config: returns the network itself. None leaves the fresh weights (train from scratch)."""
    if weights is not None:
        load_weights(network, weights, min_share=min_share)
    return network


class _KeepFrozen:
    """Forward pre-hook that puts the frozen modules back into eval mode, whatever ``network.train()`` did to them."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __call__(self, network: nn.Module, inputs: object) -> None:
        for name, module in network.named_modules():
            if name in self.names:
                module.training = False


def freeze(network: nn.Module, pattern: str | None, *, adapt_norm: bool = False) -> nn.Module:
    """Freeze every parameter whose name matches ``pattern``, so that training leaves no trace in that part.

    Without gradients alone, batch normalisation would still move its running statistics, because a trainer calls
    ``network.train()`` at each iteration: so the matching modules also stay in eval mode during every forward pass.
    Their parameters and buffers are bit-identical after training.

    Args:
        network: changed in place. Freeze before wrapping it in `DistributedDataParallel`.
        pattern: regular expression, matched from the start of the names, e.g. ``"conv_0|down_"`` for the encoder of
            MONAI's `BasicUNet`. None freezes nothing.
        adapt_norm: let the running statistics of frozen normalisation layers follow the target data.

    Returns:
        The same network.

    Raises:
        InputError: nothing matches ``pattern``.

    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> _ = freeze(network, "0|1").train()
    >>> _ = network(torch.rand(2, 1, 8, 8))
    >>> network[1].running_mean.tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    if pattern is None:
        return network
    matches = re.compile(pattern).match
    frozen = [parameter for name, parameter in network.named_parameters() if matches(name)]
    if not frozen:
        children = ", ".join(name for name, _ in network.named_children())
        raise InputError(f"freeze pattern '{pattern}' matches no parameter; the network's parts are: {children}.")
    for parameter in frozen:
        parameter.requires_grad_(False)
    names = frozenset(
        name
        for name, module in network.named_modules()
        if matches(name) and not (adapt_norm and isinstance(module, NORMALIZATION))
    )
    network.register_forward_pre_hook(_KeepFrozen(names))
    return network


def trainable_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters an optimizer should get: those that are not frozen."""
    return (parameter for parameter in network.parameters() if parameter.requires_grad)
