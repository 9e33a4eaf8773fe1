"""Use somebody else's network like our own: whole images in, class logits out; and adapt it to a target."""

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations, permutations
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn.functional import interpolate, logsigmoid

from medtl_ext._io import write_json
from medtl_ext._validation import InputError, first_line
from medtl_ext.metrics import LEEP
from medtl_ext.metrics.features import tap_features
from medtl_ext.networks import WEIGHTED, holding, load_weights
from medtl_ext.transfer.sources.allowed import built_network
from medtl_ext.transfer.sources.card import Card
from medtl_ext.transfer.sources.nnunet import sliding_window

logger = logging.getLogger(__name__)

AT_A_TIME = 8
"""Number of slices or windows in one batch."""
LEAST_PROBABILITY = 1e-7
FAR_BETTER = 0.8
"""Warn if another order of channels has a LEEP above this share of the given one (LEEP is negative)."""
PROBES = {2: (64, 224), 3: (64, 96)}
"""Side lengths of the noise images that test a network without a window; some networks need large images."""


class SourceNetwork(nn.Module):
    """The network of a card, which takes images of any size and gives one logit per class.

    In training mode it takes patches as they are. In evaluation mode it follows the card: a 2D network sees a volume
    slice by slice, sliding windows are blended, and predictions are averaged over mirrored images. The output becomes
    logits whose softmax are the class probabilities.

    Args:
        net: the network itself.
        card: the images it expects, and its output.
        channels: number of channels it takes: the first ones of the image.
        classes: for each class of the target, the network's own classes with this meaning; their probabilities are
            added. None: the network's own classes.

    Shape: N x C x *spatial to N x K x *spatial, or to N x K for a network that gives one answer per image.

    >>> card = Card(classes=2, window=(8, 8))
    >>> network = SourceNetwork(nn.Conv2d(1, 1, 3, padding=1), card, channels=1).eval()
    >>> network(torch.zeros(1, 1, 20, 12, 3)).shape  # a volume of three slices
    torch.Size([1, 2, 20, 12, 3])
    """

    def __init__(
        self, net: nn.Module, card: Card, *, channels: int, classes: Sequence[Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        self.net, self.card, self.channels, self.classes = net, card, channels, classes
        self.penultimate = nn.Identity()  # feature metrics read the features of the whole image here
        self.dimensions = dimensions_of(card, net)
        self.n_classes = len(classes or ()) or card.n_classes
        axes = card.axes or tuple(range(self.dimensions))
        seen = sorted(axes[-self.dimensions :])  # the axes of the image that the network sees
        if len(seen) < self.dimensions or not set(card.mirror) <= set(seen):
            what = f"axes {list(axes)} and mirror {list(card.mirror)}"
            raise InputError(f"its card gives a {self.dimensions}D network {what}, which do not fit; correct one")
        self.axes = [seen.index(axis) for axis in axes[-self.dimensions :]]
        self.flips = [[2 + seen.index(axis) for axis in some] for some in _subsets(card.mirror)]
        self.along = axes[0] if len(axes) > self.dimensions else 2

    def write_card(self, folder: Path) -> None:
        """Write the card of the present network beside its ``model.pt``, so that it can be used as a source.

        A program (TorchScript or ``torch.export``) gets no card, because a card cannot describe its new last layer.
        """
        if self.card.is_program or self.classes is not None:
            return
        content = self.card.model_dump(mode="json", exclude_defaults=True) | {"checkpoint": "model.pt"}
        target = (self.card.network or {}).get("_target_", "")
        if target.rpartition(":")[0].endswith(".py"):
            file = Path(target.rpartition(":")[0])
            if (there := (Path(self.card.folder) / file).resolve()) != (here := (folder / file.name).resolve()):
                shutil.copy(there, here)
            content["network"] = {**self.card.network, "_target_": f"{file.name}:{target.rpartition(':')[2]}"}
        write_json(folder / "model.json", content)

    def train(self, mode: bool = True) -> "SourceNetwork":
        if self.card.is_program and Path(self.card.checkpoint).suffix == ".pt2":  # an exported program has no modes
            self.training = mode
            return self
        return super().train(mode)

    def forward(self, image: Tensor) -> Tensor:
        image = image.as_tensor() if isinstance(image, MetaTensor) else image
        if 0 in image.shape:
            raise InputError("the preprocessing of the source's card cropped an image to nothing: is the image empty?")
        image = image[:, : self.channels]
        if self.training:
            return self._logits(self._raw(image))
        if self.dimensions == 2 and image.ndim == 5:
            slices = image.movedim(2 + self.along, 1).flatten(0, 1).split(AT_A_TIME)
            parts = [torch.cat(parts) for parts in zip(*map(self._outputs, slices), strict=True)]
            outputs = [part.unflatten(0, (len(image), -1)).movedim(1, 2 + self.along) for part in parts]
        else:
            outputs = self._outputs(image)
        if len(outputs) > 1:
            self.penultimate(outputs[1])
        return self._logits(outputs[0])

    def _outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """The network's output for images of any size, and its features if a hook on `penultimate` asks for them."""
        window = self.card.window
        if window is None or tuple(image.shape[2:]) == window:
            return self._mirrored(image)
        if self.card.blending == "nnunet":
            return sliding_window(image, window, self._mirrored, self.card.overlap)
        how = {"overlap": self.card.overlap, "mode": self.card.blending, "padding_mode": "constant"}
        outputs = sliding_window_inference(image, window, AT_A_TIME // 2, self._mirrored, **how)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def _mirrored(self, image: Tensor) -> tuple[Tensor, ...]:
        tapped = self.penultimate._forward_hooks
        output, *features = self._with_features(image) if tapped else (self._raw(image),)
        for axes in self.flips:
            output = output + self._raw(image.flip(axes)).flip(axes)
        return output / (1 + len(self.flips)), *features

    def _with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.card.is_program:  # its layers cannot be accessed, so the output serves as features
            output = self._raw(image)
            return output, output
        with tap_features(self.net, [self.card.layer]) as tapped:
            output = self._raw(image)
        features = tapped[self.card.layer][-1]
        features = _one(features) if output.ndim == 2 else features
        if features.ndim != output.ndim or len(features) != len(image):
            raise InputError('its features are no maps; name a layer whose output is a map in its card ("layer")')
        features = self._turned(features.float(), _inverse(self.axes))
        if self.card.window is not None and features.shape[2:] != image.shape[2:]:  # windows blend on the image's grid
            features = interpolate(features, image.shape[2:], mode="nearest-exact")
        return output, features

    def _raw(self, image: Tensor) -> Tensor:
        output = self._turned(self._picked(self.net(self._turned(image, self.axes))), _inverse(self.axes))
        return output if output.shape[2:] == image.shape[2:] else _one(output)

    def _picked(self, output: Any) -> Tensor:
        """The output that the card picks, in full precision: in half precision small probabilities become 0."""
        pick = self.card.pick
        if pick is not None and not isinstance(output, Tensor):
            try:
                output = output[pick]
            except (KeyError, IndexError, TypeError) as error:
                raise InputError(f'its network gives no output {pick!r}; correct "pick" in its card') from error
        if not isinstance(output, Tensor):
            several = map(repr, output) if isinstance(output, Mapping) else map(str, range(len(output or ())))
            known = ", ".join(several) or "none"
            raise InputError(f'its network gives a {type(output).__name__}; pick one in its card ("pick"): {known}')
        return output.float()

    @staticmethod
    def _turned(image: Tensor, axes: Sequence[int]) -> Tensor:
        turned = image.ndim > 2 and list(axes) != sorted(axes)
        return image.permute(0, 1, *(2 + axis for axis in axes)) if turned else image

    def _logits(self, output: Tensor) -> Tensor:
        logits = self._class_logits(output)
        if self.classes is None:
            return logits
        scores = logits.log_softmax(1)
        return torch.stack([scores[:, list(members)].logsumexp(1) for members in self.classes], 1)

    def _class_logits(self, output: Tensor) -> Tensor:
        kind, n_classes = self.card.output, self.card.n_classes or max(output.shape[1], 2)
        if output.shape[1] == n_classes and kind != "sigmoid":
            return output if kind == "logits" else output.clamp(min=LEAST_PROBABILITY).log()
        if kind == "sigmoid":
            output = output.logit(LEAST_PROBABILITY)
        if output.shape[1] == n_classes:  # there is a sigmoid of the background too
            return logsigmoid(output)
        # Later classes overwrite earlier ones: a class is where its sigmoid is 1 and all later sigmoids are 0.
        without = logsigmoid(-output)
        later = without.flip(1).cumsum(1).flip(1)
        return torch.cat([later[:, :1], logsigmoid(output) + later - without], 1)


def _one(output: Tensor) -> Tensor:
    """Turn a map of one pixel into N x K, one answer per image."""
    return output.flatten(1) if set(output.shape[2:]) == {1} else output


def _subsets(axes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(axes, size) for size in range(1, len(axes) + 1))


def _inverse(axes: Sequence[int]) -> list[int]:
    return sorted(range(len(axes)), key=axes.__getitem__)


def dimensions_of(card: Card, net: nn.Module) -> int:
    """2 or 3: from the card, or from the network's convolutions."""
    said = card.dimensions or (len(card.window) if card.window else None)
    found = next((len(m.kernel_size) for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    found = found or next((value.ndim - 2 for value in net.state_dict().values() if value.ndim in (4, 5)), None)
    return said or found or 2


def untouched(
    card: Card, *, channels: int, per_pixel: bool = True, classes: Sequence[Sequence[int]] | None = None
) -> SourceNetwork:
    """The network of a card with its weights, unchanged, in evaluation mode.

    Args:
        card: of a network that brings its own definition.
        channels, classes: see `SourceNetwork`.
        per_pixel: expect class scores for each pixel, not for each image.

    Raises:
        InputError: the network cannot be built, the weights do not fit, or the output is not what the card says.
    """
    network = SourceNetwork(_loaded(card), card, channels=channels, classes=classes).eval()
    _try(network, per_pixel=per_pixel)
    return network


def answering(card: Card, class_names: Sequence[str], *, channels: int) -> SourceNetwork:
    """The untouched network for a target's classes (background first), matched by name, or by position if the numbers
    are equal.

    A class that the network does not know is never found; this gives a warning.

    Raises:
        InputError: the network knows none of the classes.
    """
    classes = meaning(card, class_names)
    if classes is None:
        known = ", ".join(card.class_names[1:]) if card.class_names else f"{card.n_classes} classes without names"
        raise InputError(f"it knows {known}, but the target asks for {', '.join(class_names[1:])}")
    if unknown := [name for name, members in zip(class_names, classes, strict=True) if not members]:
        logger.warning("source %s does not know the class %s, so it never finds it", card.name, ", ".join(unknown))
    same = classes == [[place] for place in range(card.n_classes or len(classes))]
    return untouched(card, channels=channels, classes=None if same else classes)


def meaning(card: Card, class_names: Sequence[str]) -> list[list[int]] | None:
    """For each class of the target, the network's own classes with this meaning; None if it knows no class.

    >>> meaning(Card(classes=("background", "wm", "gm")), ["background", "csf", "gm"])
    [[0, 1], [], [2]]
    """
    n_classes = card.n_classes or len(class_names)
    own = [name.casefold() for name in card.class_names or ()]
    places = [own.index(name.casefold()) if name.casefold() in own[1:] else None for name in class_names[1:]]
    if any(place is not None for place in places):
        rest = [place for place in range(n_classes) if place not in places]
        return [rest, *([] if place is None else [place] for place in places)]
    return [[place] for place in range(n_classes)] if n_classes == len(class_names) else None


def adapted(
    card: Card,
    class_names: Sequence[str],
    *,
    wanted: int,
    channels: Sequence[str],
    fresh: bool = False,
    per_pixel: bool = True,
) -> SourceNetwork:
    """The network of a card, adapted to a target: a head for its classes, a first convolution for its channels.

    Rows of the head are copied for classes of the same name; the other rows are fresh. If there are more channels, the
    first convolution keeps its weights for the first ``wanted`` channels, the new channels start from the mean of these
    weights, and all are scaled so that activations keep their size. Predictions are no longer averaged over mirrored
    images, because a training without flips makes the mirrored predictions worse.

    Args:
        card: of a network that brings its own definition.
        class_names: of the target, background first.
        wanted: number of channels that the network takes now.
        channels: names of the channels of the target's images, the network's own first.
        fresh: do not load the card's weights, to train from scratch.
        per_pixel: see `untouched`; a network for whole images always gets a fresh head.
    """
    network, said = SourceNetwork(_loaded(card, fresh=fresh), card, channels=wanted), []
    net, sample = network.net, _try(network, per_pixel=per_pixel)
    own = meaning(card, class_names) if per_pixel else None
    kept = own == [[place] for place in range(card.n_classes or len(class_names))]
    changed: dict[str, Any] = {"mirror": ()} | ({} if kept else {"classes": tuple(class_names)})
    if card.is_program:
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        if not kept:
            net = _Translated(network, len(class_names), per_pixel=per_pixel)
            changed |= {"output": "logits", "pick": None}
            said.append(f"a 1 x 1 convolution from its {network.n_classes} classes to {len(class_names)}: fresh")
    else:
        images, head = _ends(network, sample)
        if not kept:
            layer = net.get_submodule(head)
            rows = _rows(card, class_names, _sizes(layer)[1]) if per_pixel else [None] * len(class_names)
            _replace(net, head, with_outputs(layer, rows))
            copied = sum(row is not None for row in rows)
            said.append(f"head {head} for {len(class_names)} classes: {copied} copied, {len(rows) - copied} fresh")
        if len(channels) != wanted:
            changed["channels"] = tuple(channels)
            for name in images:
                _replace(net, name, with_inputs(net.get_submodule(name), len(channels)))
            copied = f"the first {wanted} copied, the others their mean, all scaled"
            said.append(f"{', '.join(images)} for {', '.join(channels)}: {copied}")
    now = wanted if card.is_program else len(channels)
    network = SourceNetwork(net, card.model_copy(update=changed), channels=now)
    _try(network, per_pixel=per_pixel)
    if said and not fresh:
        logger.info("%s is adapted: %s", card.name, "; ".join(said))
    return network


def _loaded(card: Card, *, fresh: bool = False) -> nn.Module:
    if not card.is_program:
        net = built_network(card.network, card.folder, card.trusted)
        if not fresh:
            weights = card.weights()
            if weights.keys().isdisjoint(net.state_dict()):  # saved by a fine-tuning here, as a part of `SourceNetwork`
                weights = {name.removeprefix("net."): value for name, value in weights.items()}
            net = holding(net, weights)
            _fit_ends(net, weights)
            load_weights(net, weights, min_share=1.0, name=str(card.checkpoint))
        return net
    if not card.trusted:
        raise InputError("it is a program, which would run here; give --trust_sources true to allow it")
    if fresh:
        raise InputError("it is a program, which cannot be trained from scratch; use the bundle's own network for that")
    try:
        if Path(card.checkpoint).suffix == ".ts":
            return torch.jit.load(card.checkpoint, map_location="cpu")
        return torch.export.load(card.checkpoint).module()
    except Exception as error:  # both may raise any error for a damaged file
        raise InputError(f"{card.checkpoint} cannot be read as a program ({first_line(error)})") from error


def _fit_ends(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Resize head and first convolutions to the weights, because a fine-tuning may have changed their sizes."""
    found: dict[str, Sequence[int]] = {}
    inputs, outputs = set(), set()
    for name, layer in net.named_modules():
        weight = weights.get(f"{name}.weight")
        if isinstance(layer, WEIGHTED) and weight is not None and weight.ndim == layer.weight.ndim:
            before, after = _sizes(layer), _sizes(layer, weight)
            if before != after and getattr(layer, "groups", 1) == 1:
                if outputs and after[0] != before[0]:
                    return  # inner layers differ too, so the weights are of another network
                found[name] = after
                inputs |= {after[0]} - {before[0]}
                outputs |= {after[1]} - {before[1]}
    if len(inputs) <= 1 and len(outputs) <= 1:
        for name, sizes in found.items():
            _replace(net, name, _like(net.get_submodule(name), *sizes))


def _try(network: SourceNetwork, *, per_pixel: bool) -> Tensor:
    """Pass noise through the network, compare the output with the card, and return the noise."""
    card, was, dims = network.card, network.training, network.dimensions
    for size in [card.window] if card.window else [(side,) * dims for side in PROBES[dims]]:
        sample = torch.rand(1, network.channels, *size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                output = network.eval()._raw(sample)
            break
        except InputError:
            raise
        except Exception as error:  # a network may raise any error for images of a wrong size
            refused = error
    else:
        takes = " x ".join(map(str, sample.shape[1:]))
        raise InputError(f"its network refuses images of {takes} ({first_line(refused)})") from refused
    network.train(was)
    if output.ndim != (sample.ndim if per_pixel else 2) or (per_pixel and output.shape[2:] != sample.shape[2:]):
        raise InputError(f"its network does not give one prediction per {'pixel' if per_pixel else 'image'}")
    found, expected = output.shape[1], card.n_classes
    network.n_classes = network.n_classes or max(found, 2)
    if expected is not None and found != expected and (found != expected - 1 or card.output == "softmax"):
        raise InputError(f"its network gives {found} channels, but its card names {expected} classes")
    if not bool(output.isfinite().all()):
        raise InputError("its network gives NaN or Inf")
    low, high = output.min(), output.max()
    if card.output != "logits" and (low < -1e-4 or high > 1 + 1e-4):
        raise InputError(f"its card says {card.output}, but its output is from {low:.2g} to {high:.2g}: is it logits?")
    if card.output == "softmax" and float((output.sum(1) - 1).abs().max()) > 1e-2:
        raise InputError("its card says softmax, but its output does not add up to 1: is it sigmoid?")
    return sample


def warn_of_other_order(network: SourceNetwork, images: Sequence[Mapping[str, Tensor]]) -> None:
    """Warn if the network explains the labels far better with the channels in another order.

    Args:
        network: untouched; only networks with two or three channels are tested.
        images: a few items of the target's training set, ``image`` and ``label``.
    """
    if network.channels not in (2, 3) or not images:
        return
    device = next(chain(network.parameters(), network.buffers()), torch.zeros(0)).device
    found = {}
    for order in permutations(range(network.channels)):
        metric = LEEP()
        for item in images:
            with torch.no_grad():
                probs = network(item["image"][None, list(order)].to(device)).softmax(1)
            metric.update(probs, item["label"][None])
        found[order] = float(metric.compute())
    given, best = found[tuple(range(network.channels))], max(found, key=found.get)
    if found[best] > FAR_BETTER * given:
        names = network.card.channels or [str(place) for place in range(network.channels)]
        logger.warning(
            "source %s explains the labels far better with the channels in the order %s (LEEP %.3f instead of %.3f): "
            "are the channels of its card in the right order?",
            network.card.name,
            ", ".join(names[place] for place in best),
            found[best],
            given,
        )


def _ends(network: SourceNetwork, sample: Tensor) -> tuple[list[str], str]:
    """Names of the layers that take the image itself (or else the first layer that runs), and of the last layer."""
    images: list[Tensor] = []
    ran: list[tuple[str, bool]] = []

    def note(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        ran.append((name, inputs[0] is images[0]))

    hooks = [network.net.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))]
    for name, layer in network.net.named_modules():
        if isinstance(layer, WEIGHTED):
            hooks.append(layer.register_forward_pre_hook(partial(note, name)))
    try:
        with torch.no_grad():
            network.eval()._raw(sample)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise InputError("its network has no convolution or linear layer, so there is no head to replace")
    return [name for name, image in ran if image] or [ran[0][0]], ran[-1][0]


def _replace(net: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, layer)


def _rows(card: Card, class_names: Sequence[str], found: int) -> list[int | None]:
    """The row of the head for each class of the target (None: fresh); sigmoids have no row for the background."""
    own = [name.casefold() for name in card.class_names or ()]
    rows = [own.index(name.casefold()) if name.casefold() in own[1:] else None for name in class_names]
    rows[0] = 0 if own else None
    sigmoids = int(found + 1 == card.n_classes)
    return [None if row is None else row - sigmoids for row in rows][sigmoids:]


def with_outputs(layer: nn.Module, rows: Sequence[int | None]) -> nn.Module:
    """A copy of a layer with one output per entry of ``rows``: a copy of that row, or a fresh output for None.

    >>> with_outputs(nn.Conv2d(4, 3, 1), [2, None]).weight.shape
    torch.Size([2, 4, 1, 1])
    """
    new, axis = _like(layer, _sizes(layer)[0], len(rows)), int(getattr(layer, "transposed", False))
    with torch.no_grad():
        for place, row in enumerate(rows):
            if row is not None:
                new.weight.select(axis, place).copy_(layer.weight.select(axis, row))
                if layer.bias is not None:
                    new.bias[place] = layer.bias[row]
    return new


def with_inputs(layer: nn.Module, n: int) -> nn.Module:
    """A copy of a convolution with ``n`` inputs; new ones are the mean of the others; all are scaled by old / new.

    >>> layer = nn.Conv2d(1, 3, 1)
    >>> torch.allclose(with_inputs(layer, 2)(torch.ones(1, 2, 1, 1)), layer(torch.ones(1, 1, 1, 1)))
    True
    """
    old, new = layer.weight, _like(layer, n, _sizes(layer)[1])
    axis = 1 - int(getattr(layer, "transposed", False))
    with torch.no_grad():
        further = [old.mean(axis, keepdim=True)] * (n - old.shape[axis])
        kept = old.narrow(axis, 0, min(n, old.shape[axis]))
        new.weight.copy_(torch.cat([kept, *further], axis) * (old.shape[axis] / n))
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new


def _sizes(layer: nn.Module, weight: Tensor | None = None) -> tuple[int, ...]:
    """Number of inputs and outputs of a layer, or of the layer with other weights."""
    shape = tuple((layer.weight if weight is None else weight).shape[:2])
    return shape if getattr(layer, "transposed", False) else shape[::-1]


def _like(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A fresh layer of the same kind with another size."""
    if getattr(layer, "groups", 1) != 1:
        raise InputError("its first or last layer is a grouped convolution, whose channels cannot be changed")
    new, what = copy.deepcopy(layer), "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(new, f"in_{what}", inputs)
    setattr(new, f"out_{what}", outputs)
    shape = (inputs, outputs) if getattr(layer, "transposed", False) else (outputs, inputs)
    new.weight = nn.Parameter(layer.weight.new_empty(*shape, *layer.weight.shape[2:]))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.new_empty(outputs))
    new.reset_parameters()
    return new


class _Translated(nn.Module):
    """A program, whose head cannot be replaced, followed by a layer that maps its class logits to new ones."""

    def __init__(self, network: SourceNetwork, n_classes: int, *, per_pixel: bool) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[network.dimensions] if per_pixel else nn.Linear
        self.network = network
        self.layer = kind(network.n_classes, n_classes, *([1] if per_pixel else []))

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(self.network._logits(self.network._picked(self.network.net(image))))
