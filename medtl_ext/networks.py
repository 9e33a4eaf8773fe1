"""Load weights of a source, freeze parts of a network, and adapt its batch normalisation."""

import copy
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from medtl_ext._validation import InputError, first_line

logger = logging.getLogger(__name__)

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
PASSES = 10
"""Passes over the training images for the statistics of batch norm (an image may give another random patch each
time)."""

# Trainers store best scores and the like next to the weights. Loading NumPy scalars of these types runs no code.
_scalar, _number_types = np.float64(0).__reduce__()[0], "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]
NUMBERS = [np.dtype, *{type(np.dtype(code)) for code in _number_types}]
NUMBERS += [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
READING_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError)
READING_ERRORS += (safetensors.SafetensorError, zipfile.BadZipFile)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read the content of a checkpoint file without running any code that the file may hold.

    Args:
        path: a ``.safetensors`` file, or a file of `torch.save` with tensors, plain Python values and NumPy numbers.

    Raises:
        InputError: the file does not exist, is damaged, or holds other objects.
    """
    if not Path(path).is_file():
        hint = "give a .pt file; if a finished training lost its file, delete its folder and train again"
        raise InputError(f"checkpoint {path} does not exist; {hint}.")
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch compares no checksum
            raise ValueError(f"its part {part} is damaged")
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except READING_ERRORS as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's own message recommends unsafe loading
            reason = "it is damaged, or holds more than tensors"
        expected = "expected a file written by torch.save(network.state_dict(), path)"
        raise InputError(f"checkpoint {path} cannot be read as weights ({reason}); {expected}.") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a network from a checkpoint file without running any code that the file may hold.

    Accepts a plain ``state_dict``, or one under the key ``model``, ``network``, ``net``, ``state_dict`` or nnU-Net's
    ``network_weights``; names with the ``module.`` prefix of `torch.nn.parallel.DistributedDataParallel`; and
    ``.safetensors`` files.

    Raises:
        InputError: as in `read_checkpoint`, or the file holds no tensors.
    """
    content = read_checkpoint(path)
    for key in ("model", "network", "net", "state_dict", "network_weights"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"checkpoint {path} holds no network weights; expected a state_dict, found {type(content)}.")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def load_weights(
    network: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    min_share: float = 0.9,
    name: str = "the given weights",
) -> str:
    """Copy every tensor with the same name and shape into ``network``, and report what was copied.

    A head with another number of classes does not fit and keeps its initial values, as transfer learning requires.
    Weights of another architecture hardly fit, and raise an error.

    Args:
        network: changed in place.
        weights: a checkpoint file (see `read_weights`) or a ``state_dict``.
        min_share: smallest share of the network's tensors that must fit, in [0, 1]. 1 requires all.
        name: name of a ``state_dict`` in messages.

    Returns:
        A sentence: how many tensors were copied, have another shape, are missing, or have no counterpart in the
            network.

    Raises:
        InputError: fewer tensors fit than ``min_share`` requires. The network is then unchanged.

    >>> network, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> print(load_weights(network, other.state_dict()))
    2 of 2 tensors copied
    """
    where = name if isinstance(weights, Mapping) else str(weights)
    found = weights if isinstance(weights, Mapping) else read_weights(weights)
    # Predictions do not need this counter of batch normalisation, and published weights often lack it.
    own = {k: v for k, v in network.state_dict().items() if k in found or not k.endswith("num_batches_tracked")}
    shared = {name: (tuple(found[name].shape), tuple(own[name].shape)) for name in own if name in found}
    fitting = {name: found[name] for name, (theirs, ours) in shared.items() if theirs == ours}
    others = {
        "of another shape": [f"{n}: {a} in the file, {b} here" for n, (a, b) in shared.items() if n not in fitting],
        "not in the file": [name for name in own if name not in found],
        "in the file without a place here": [name for name in found if name not in own],
    }
    report = f"{len(fitting)} of {len(own)} tensors copied"
    report += "".join(f", {len(names)} {what} ({names[0]})" for what, names in others.items() if names)
    if len(fitting) < min_share * len(own):
        expected = f"expected at least {min_share:.0%}. Was it trained with another architecture or number of classes?"
        raise InputError(f"{where} does not fit this {type(network).__name__}: {report}; {expected}")
    network.load_state_dict(fitting, strict=False)
    logger.log(logging.INFO if any(others.values()) else logging.DEBUG, "%s: %s", where, report)  # else no news
    return report


def freeze(network: nn.Module, pattern: str | Callable[[nn.Module], str] | None) -> nn.Module:
    """Freeze every parameter whose name matches ``pattern``: training does not change this part of the network.

    Disabling gradients is not enough: a trainer calls ``network.train()`` at each iteration, and batch normalisation
    would update its running statistics. So the matching modules also stay in eval mode during every forward pass. Their
    parameters and buffers are bit-identical after training.

    Args:
        network: changed in place. Freeze before wrapping it in `DistributedDataParallel`.
        pattern: regular expression, matched from the start of the names, such as ``"conv_0|down_"`` for the encoder of
            MONAI's `BasicUNet`; or a function of the network that returns one, such as `all_but`. None freezes nothing.

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
    pattern = pattern(network) if callable(pattern) else pattern
    frozen = [parameter for name, parameter in network.named_parameters() if re.match(pattern, name)]
    if not frozen:
        children = ", ".join(name for name, _ in network.named_children())
        raise InputError(f"freeze pattern '{pattern}' matches no parameter; give a pattern of the parts: {children}.")
    for parameter in frozen:
        parameter.requires_grad_(False)
    network.register_forward_pre_hook(partial(keep_in_eval_mode, pattern))
    return network


def keep_in_eval_mode(pattern: str, network: nn.Module, _: object) -> None:
    """Put the frozen modules into eval mode before a forward pass, because ``network.train()`` affects them too."""
    for name, module in network.named_modules():
        if re.match(pattern, name):
            module.training = False


def layers(network: nn.Module, image: Tensor) -> list[list[str]]:
    """Names of a network's modules, grouped into layers in the order in which they run (their names do not tell it).

    A layer begins with a convolution or a linear layer, and includes the normalisation after it. Every module with its
    own parameters or buffers is in one layer. A module that never runs, such as a head for deep supervision, is in the
    layer of the module before it in ``named_modules()``.

    Args:
        network: runs once on the image, in eval mode.
        image: a training image, C x *spatial.

    Raises:
        InputError: no layers can be separated, as in a TorchScript program.

    >>> layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), torch.rand(1, 8, 8))
    [['0', '1'], ['2']]
    """
    ran: list[str] = []
    own = {
        name: module
        for name, module in network.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        and not isinstance(module, torch.jit.ScriptModule)
    }
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, module in own.items()]
    training, device = network.training, next(network.parameters()).device
    try:
        with torch.no_grad():
            network.eval()(torch.as_tensor(image)[None].to(device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    found: list[list[str]] = [[]]
    for name in dict.fromkeys(ran):
        if isinstance(own[name], WEIGHTED) and any(isinstance(own[before], WEIGHTED) for before in found[-1]):
            found.append([])
        found[-1].append(name)
    if len(found) < 2:
        raise InputError(f"the layers of this {type(network).__name__} cannot be found; fine-tune all of it (full).")
    place = {name: number for number, names in enumerate(found) for name in names}
    before = 0
    for name in own:
        before = place.get(name, before)
        if name not in place:
            found[before].append(name)
    return found


def all_but(image: Tensor, *, first: float = 0.0, last: float = 0.0, norms: bool = False) -> Callable[[nn.Module], str]:
    """A pattern for `freeze` that freezes all but the head and, optionally, the first or last layers or normalisations.

    The head (the last layer to run) is always trained, because the target may have other classes.

    Args:
        image: see `layers`.
        first, last: share of the layers at the input, and at the output, that are trained. Unless 0, at least one
            layer.
        norms: train the affine parameters of all normalisations, which also adapt to the target's statistics.

    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    >>> _ = freeze(network, all_but(torch.rand(1, 8, 8), first=0.1))
    >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    ['0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias']
    """

    def pattern(network: nn.Module) -> str:
        found = layers(network, image)
        at_image = max(1, round(first * len(found))) if first else 0
        at_prediction = max(1, round(last * len(found)))
        frozen = list(chain.from_iterable(found[at_image:-at_prediction]))
        if norms:
            frozen = [name for name in frozen if "Norm" not in type(network.get_submodule(name)).__name__]
        return rf"(?:{'|'.join(map(re.escape, frozen))})(?:\.[^.]*)?$"

    return pattern


def low_rank(image: Tensor, *, rank: int = 8) -> Callable[[nn.Module], str]:
    """What `freeze` takes to train additions of low rank to all linear layers (LoRA, by `peft`), and the head.

    `medtl_ext.handlers.MergedAdapters` keeps what is trained as plain weights.

    Args:
        image: see `layers`.
        rank: of the additions, which start as 0.

    Raises:
        InputError: `peft` is not installed, or the network has no linear layer but, perhaps, its head.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.
    """

    def pattern(network: nn.Module) -> str:
        head = layers(network, image)[-1][0]
        linear = [name for name, part in network.named_modules() if type(part) is nn.Linear and name != head]
        if not linear:
            raise InputError(f"LoRA adapts linear layers, and this {type(network).__name__} has none; take affine.")
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError("LoRA needs peft; pip install 'medtl[lora]'.") from error
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), network)
        network.requires_grad_(True)
        return rf"(?!$|{re.escape(head)}\.|.*\.lora_)"

    return pattern


def merge_adapters(network: nn.Module) -> nn.Module:
    """Put the additions of `low_rank` into the weights, in place: the network is as it was built."""
    for name, layer in [*network.named_modules()]:
        if hasattr(layer, "get_base_layer"):
            layer.merge()
            network.set_submodule(name, layer.get_base_layer())
    return network


class SpatialAdapter(nn.Module):
    """A convolution as head, and two before it whose result is added to its input; they start as 0.

    >>> head = nn.Conv2d(4, 2, 1)
    >>> features = torch.rand(1, 4, 8, 8)
    >>> torch.equal(SpatialAdapter(head)(features), head(features))
    True
    """

    def __init__(self, head: nn.modules.conv._ConvNd, *, width: int = 32) -> None:
        super().__init__()
        first = type(head)(head.in_channels, width, 3, padding=1)
        last = type(head)(width, head.in_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.adapter, self.head = nn.Sequential(first, nn.ReLU(), last), head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features + self.adapter(features))


def spatial_adapter(image: Tensor, *, width: int = 32) -> Callable[[nn.Module], str]:
    """What `freeze` takes to train nothing but a `SpatialAdapter`, which it puts in the place of the head.

    Args:
        image: see `layers`.
        width: channels between its two convolutions.

    Raises:
        InputError: the head is no convolution.

    Reference: after Silva-Rodriguez et al., *Towards Foundation Models and Few-Shot Parameter-Efficient Fine-Tuning for
    Volumetric Organ Segmentation*, Medical Image Analysis 2025.
    """

    def pattern(network: nn.Module) -> str:
        name = layers(network, image)[-1][0]
        head = network.get_submodule(name)
        if type(head) not in (nn.Conv2d, nn.Conv3d):
            raise InputError(f"the head of this {type(network).__name__} is a {type(head).__name__}; take affine.")
        network.set_submodule(name, SpatialAdapter(head, width=width))
        return rf"(?!$|{re.escape(name)}(?:\.|$))"

    return pattern


def adapt_batch_norm(
    network: nn.Module, batches: Iterable[Mapping[str, Tensor]], device: str | torch.device
) -> nn.Module:
    """Replace the statistics of a network's batch normalisations by those of other images (AdaBN). Weights stay as is.

    Args:
        network: changed in place, and moved to the device.
        batches: training batches with ``image``, N x C x *spatial; they are read several times.
        device: where to compute.

    Reference: Li et al., *Revisiting Batch Normalization for Practical Domain Adaptation*, 2016.

    >>> network = adapt_batch_norm(nn.BatchNorm2d(1), [{"image": torch.full((2, 1, 4, 4), 3.0)}], "cpu")
    >>> round(float(network.running_mean), 3)
    3.0
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        logger.warning("this network has no batch normalisation to adapt: it stays as it is")
    update_bn((batch["image"] for _ in range(PASSES) for batch in batches), network.to(device), device)
    return network


def soup(members: Sequence[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """The mean of the weights of several trainings from one start, statistics of batch norm alike.

    Args:
        members: their files, two or more.

    Raises:
        InputError: they are too few, or of different networks.

    Reference: Wortsman et al., *Model Soups*, ICML 2022 (uniform).
    """
    states = [read_weights(path) for path in _several(members)]
    if len({tuple((name, value.shape) for name, value in sorted(state.items())) for state in states}) > 1:
        raise InputError(f"the networks of {', '.join(map(str, members))} differ; expected trainings of one.")
    means = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    return {name: value.to(states[0][name].dtype) for name, value in means.items()}


class Ensemble(nn.Module):
    """Several networks as one: its softmax is the mean of theirs. It takes as long as all of them.

    >>> one, other = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
    >>> image = torch.rand(1, 1, 4, 4)
    >>> mean = (one(image).softmax(1) + other(image).softmax(1)) / 2
    >>> torch.allclose(Ensemble([one, other])(image).softmax(1), mean)
    True
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([member(image).log_softmax(1) for member in self.members]).logsumexp(0)


def ensemble(network: nn.Module, members: Sequence[str | os.PathLike[str]]) -> Ensemble:
    """As many copies of a network as there are files of weights, two or more."""
    return Ensemble(prepared(copy.deepcopy(network), weights=one, min_share=1.0) for one in _several(members))


def holding(network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """The network, or what of it the weights are of: one with a `SpatialAdapter`, or an `Ensemble` of copies."""
    found = weights if isinstance(weights, Mapping) else read_weights(weights)
    own = network.state_dict()
    for name in [name for name in found if name.endswith(".adapter.0.weight") and name not in own]:
        network, head = copy.deepcopy(network), name.removesuffix(".adapter.0.weight")
        network.set_submodule(head, SpatialAdapter(network.get_submodule(head), width=len(found[name])))
    count = len({name.split(".")[1] for name in found if name.startswith("members.") and name not in own})
    return Ensemble(copy.deepcopy(network) for _ in range(count)) if count else network


def _several(members: Sequence[str | os.PathLike[str]] | None) -> Sequence[str | os.PathLike[str]]:
    if isinstance(members, str) or len(members or ()) < 2:
        asked = "expected files of weights of two trainings or more; arms of an audit with --audit#seeds get them"
        raise InputError(f"members is {members!r}; {asked}.")
    return members


_freeze = freeze  # `prepared` has an argument of that name


def prepared(
    network: nn.Module,
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    freeze: str | Callable[[nn.Module], str] | None = None,
    device: str | torch.device = "cpu",
    memory_format: torch.memory_format | None = None,
    min_share: float = 0.9,
    replace_head: bool = False,
) -> nn.Module:
    """Prepare a network in one call, for a config: load weights, freeze, move to the device.

    In a bundle's JSON, with ``"$import medtl_ext.networks as networks"`` among the imports::

        "network": "$networks.prepared(@network_def, weights=@source_ckpt, freeze='conv_0|down_', device=@device)"

    Args:
        network: changed in place.
        weights: see `load_weights`. None keeps the initial weights, to train from scratch.
        freeze: the pattern of `freeze`. None freezes nothing.
        device: where to move the network.
        memory_format: such as ``torch.channels_last`` (for 3D networks, its 3D version is used). None changes nothing.
        min_share: smallest share of the network's tensors that must fit; 1 for a source that is used untouched.
        replace_head: keep the initial values of the head (the last linear or convolution layer), even if the source's
            head would fit, because the target has other classes.

    Returns:
        The same network.

    Raises:
        InputError: as in `load_weights` and `freeze`.

    >>> source, target = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(2))
    >>> _ = prepared(target, weights=source.state_dict(), freeze="0", min_share=0.5, replace_head=True)
    >>> torch.equal(target[0].weight, source[0].weight), torch.equal(target[1].weight, source[1].weight)
    (True, False)
    """
    if weights is not None and replace_head:
        head = [name for name, module in network.named_modules() if isinstance(module, WEIGHTED)][-1]
        found = weights if isinstance(weights, Mapping) else read_weights(weights)
        weights = {name: value for name, value in found.items() if not name.startswith(f"{head}.")}
    if weights is not None:
        load_weights(network, weights, min_share=min_share)
    if memory_format is torch.channels_last and any(parameter.ndim == 5 for parameter in network.parameters()):
        memory_format = torch.channels_last_3d
    return _freeze(network, freeze).to(device, memory_format=memory_format)


def trainable_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters for the optimizer: those that are not frozen."""
    return (parameter for parameter in network.parameters() if parameter.requires_grad)
