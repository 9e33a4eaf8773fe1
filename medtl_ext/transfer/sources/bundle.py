"""Read the folder of a MONAI bundle into a source card, without running any of its code."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from monai.bundle import ConfigParser

from medtl_ext._validation import InputError, first_line, require_number
from medtl_ext.transfer.sources.allowed import (
    ALLOWED,
    TRUST,
    checked_network,
    importing,
    inside,
    kind_of_transform,
    read_mapping,
    transforms_of,
)

CONFIGS = ("inference", "evaluate", "train")
SUFFIXES = (".json", ".yaml", ".yml")
NETWORK = ("network_def", "network", "net")
PARTS = ("{}", "validate#{}", "val_{}", "val#{}")  # places of the parts of the inference in configs
WEIGHTS = ("models/model.pt", "models/model.pth", "models/model.safetensors")
PROGRAM = "models/model.ts"
REFERENCE = re.compile(r"\s*[@%](\w+(?:(?:#|::)\w+)*)\s*")
LABEL = re.compile(r"label|seg|mask|target", re.IGNORECASE)
OURS = ("keys", "allow_missing_keys", "lazy", "meta_keys", "meta_key_postfix", "source_key", "start_coord_key")
OURS += ("end_coord_key", "dtype", "_desc_", "_requires_", "_disabled_", "_mode_")
ONE_A_KEY = ("mode", "padding_mode", "align_corners", "anti_aliasing")
UNSAID = (None, "none", "regular")  # values of modality that mean nothing
MOST_VALUES = 100_000  # in a config: nested YAML aliases could otherwise fill the memory
MOST_CHANNELS = 10_000


def bundle_card(folder: str | os.PathLike[str], trust: bool = False) -> dict[str, Any]:
    """Describe a MONAI bundle as a source card.

    The network comes from ``inference``, ``evaluate`` or ``train`` (.json, .yaml), with its references resolved.
    Channels, classes and facts about the data come from ``metadata.json``, the window from the inferer, and the
    preprocessing from the inference. Loading and the choice of channels and labels are left out, because our bundles do
    them. Transforms that draw channels from clicks or labels are left out too: the target must bring these channels as
    files.

    Args:
        folder: contains ``configs/`` and ``models/``.
        trust: allow expressions to be evaluated, code of the bundle to run, and TorchScript.

    Returns:
        The keys of a card, all plain values. ``checkpoint`` is an absolute path; ``file.py:Class`` in ``network`` is
        relative to ``folder``, as `built_network` expects.

    Raises:
        InputError: the bundle cannot be used; the message says why, in one line.
    """
    try:
        return _card(Path(folder), trust)
    except InputError:
        raise
    except Exception as error:  # a foreign config may hold anything
        raise InputError(f"it cannot be read as a bundle ({type(error).__name__}: {first_line(error):.200})") from error


def _card(folder: Path, trust: bool) -> dict[str, Any]:
    if not inside(folder, "configs").is_dir():
        raise InputError(f"{folder} is no MONAI bundle; expected a folder with configs/ in it")
    metadata = read_mapping(folder, "configs/metadata.json") if (folder / "configs" / "metadata.json").exists() else {}
    formats = metadata.get("network_data_format") or {}
    inputs, outputs = formats.get("inputs") or {}, formats.get("outputs") or {}
    card = {"name": folder.resolve().name} | _about(metadata, inputs)
    if (folder / "LICENSE").is_file():
        card.setdefault("licence", "see its LICENSE")
    image, (picked, output) = _image(inputs), _output(outputs)
    for part in (image, output):
        require_number("num_channels of its metadata.json", part.get("num_channels", 1), 1, MOST_CHANNELS, whole=True)
    names = [f"configs/{name}{suffix}" for name in CONFIGS for suffix in SUFFIXES]
    configs = [_Config(folder, name, trust) for name in names if (folder / name).exists()]
    try:
        card |= {"network": _network(configs, folder, trust), "checkpoint": _weights(folder)}
    except InputError:
        if not (trust and inside(folder, PROGRAM).is_file()):
            raise
        card |= {"checkpoint": str(inside(folder, PROGRAM))}
    network, shape = card.get("network", {}), list(image.get("spatial_shape") or ())
    dims = network.get("spatial_dims", network.get("dimensions", len(shape)))
    if dims in (2, 3):
        card["dimensions"] = dims
    card |= _window(configs, dims)
    steps, keys, drawn = _preprocessing(configs, image.get("num_channels"))
    if keys is not None:
        card["preprocessing"] = steps
    per_image = list(output.get("spatial_shape") or ())[:1] == [1]
    if (drawn or image.get("is_patch_data")) and not per_image and shape and all(type(one) is int for one in shape):
        card.setdefault("window", shape)
    if channels := _channels(image, keys or [], dims):
        card["channels"] = channels
    if len(outputs) > 1:
        card["pick"] = picked
    return card | _classes(configs, output, per_image)


def _about(metadata: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata say about the data, as keys of a card."""
    modality = next((one["modality"] for one in inputs.values() if one.get("modality") not in UNSAID), None)
    names = {"description": "description", "trained_on": "data_source", "licence": "license"}
    about = {ours: metadata.get(theirs) for ours, theirs in names.items()} | {"modality": modality}
    return {key: value for key, value in about.items() if isinstance(value, str) and value}


def _image(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The input of a network, which must be one image."""
    if len(inputs) > 1:
        raise InputError(f"its network takes {len(inputs)} inputs ({', '.join(inputs)}); expected one image")
    for name, one in inputs.items():
        if str(one.get("type")) in ("noise", "tuples"):
            raise InputError(f"its network takes {name} ({one['type']}); expected an image")
    return next(iter(inputs.values()), {})


def _output(outputs: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The first output with class scores, and its name."""
    found = next((one for one in outputs.items() if one[1].get("format") in (*ALLOWED["outputs"], None)), None)
    if outputs and found is None:
        given = ", ".join(f"{name} ({one.get('type')}, {one.get('format')})" for name, one in outputs.items())
        raise InputError(f"its network gives {given}; expected class scores")
    return found or ("", {})


def _names(part: Mapping[str, Any]) -> list[str]:
    """The names of the channels in a part of the metadata, in order; some bundles call them label_def."""
    given = part.get("channel_def") or part.get("label_def") or {}
    return [str(given[key]) for key in sorted(given, key=int)]


def _channels(image: Mapping[str, Any], keys: Sequence[str], dims: int) -> list[str]:
    """The names of a network's channels; many bundles give one name, "image", for several channels."""
    names, number = _names(image), image.get("num_channels")
    if number in (None, len(names)):
        return names
    if len(keys) == number:
        return list(keys)
    return ["R", "G", "B"] if (number, dims) == (3, 2) else [f"channel {one}" for one in range(number)]


def _network(configs: Sequence["_Config"], folder: Path, trust: bool) -> dict[str, Any]:
    """The definition of the network, in plain values."""
    for config in configs:
        for key in NETWORK:
            value = config.follow(config.content.get(key))
            if isinstance(value, str) and key == NETWORK[0]:
                raise InputError(f"its {key} is the expression {value!r:.100}, not a definition; write a card for it")
            if isinstance(value, Mapping) and "_target_" in value:
                kept = {name: one for name, one in value.items() if not re.fullmatch(r"_(?!target)\w+_", name)}
                off = {name: bool(config.follow(one)) for name, one in kept.items() if name in ALLOWED["off"]}
                found = config.plain(f"its {key}", kept | off)
                target = str(found["_target_"])
                file = "/".join(target.split(".")[:-1]) + ".py"
                if "/" in file and ".py:" not in target and (folder / file).is_file():
                    found["_target_"] = f"{file}:{target.rpartition('.')[2]}"
                checked_network(found, folder, trust)
                return found
    raise InputError("none of its configs (inference, evaluate, train) defines a network (network_def with a _target_)")


def _weights(folder: Path) -> str:
    found = next((path for name in WEIGHTS if (path := inside(folder, name)).is_file()), None)
    if found is None:
        only = f"; {PROGRAM} is code that would have to run, {TRUST}" if (folder / PROGRAM).exists() else ""
        raise InputError(f"it has no weights ({' or '.join(WEIGHTS)}){only}")
    return str(found)


def _window(configs: Sequence["_Config"], dims: int) -> dict[str, Any]:
    """Window, overlap and blending of the inferer."""
    config, inferer = _part(configs, "inferer")
    if inferer is None:
        return {}
    target = str(inferer.get("_target_")) if isinstance(inferer, Mapping) else f"{inferer!r:.100}"
    if target.removeprefix("monai.inferers.") not in ALLOWED["inferers"]:
        raise InputError(f"its inferer is {target}; expected one of whole images or of sliding windows")
    known = {"roi_size", "overlap", "mode", "spatial_dim"} & inferer.keys()
    given = {key: config.plain(f"its inferer, {key}", inferer[key]) for key in known}
    if target.endswith("SliceInferer") and given.get("spatial_dim", 0) != 2:
        raise InputError(f"it takes slices along axis {given.get('spatial_dim', 0)}; expected the last axis, 2")
    if "roi_size" not in given:
        return {}
    size = given["roi_size"] if isinstance(given["roi_size"], list) else [given["roi_size"]] * dims
    blending = {"overlap": given.get("overlap", 0.25), "blending": given.get("mode", "constant")}
    whole = not size or not all(type(one) is int and one > 0 for one in size)  # -1 and 0 mean the whole axis
    return blending | ({} if whole else {"window": size})


def _preprocessing(
    configs: Sequence["_Config"], n_channels: int | None
) -> tuple[list[dict[str, Any]], list[str] | None, bool]:
    """The transforms of an image, the keys of its files (None: no preprocessing), and whether some channels are drawn.

    Drawn channels are made from clicks or labels. Intensity transforms before that step do not act on them.
    """
    config, steps = _part(configs, "preprocessing")
    if steps is None:
        return [], None, False
    if not isinstance(steps, list):
        raise InputError(f"its preprocessing is {steps!r:.100}, which would have to be evaluated")
    found: list[dict[str, Any]] = []
    images, out, drawn = ["image"], "image", False
    for step in map(config.follow, steps):
        if not isinstance(step, Mapping) or not isinstance(step.get("_target_"), str):
            raise InputError(f"its preprocessing holds {step!r:.100}, no definition of a transform")
        target, short = step["_target_"], step["_target_"].rpartition(".")[2]
        kind, where = kind_of_transform(target), f"its {short}"
        if config.plain(where, step.get("_disabled_", False)) in (True, "true"):
            continue
        keys = config.plain(where, step.get("keys", []))
        keys = [keys] if isinstance(keys, str) else keys
        if short == "LoadImaged":
            images = [key for key in keys if not LABEL.search(key)] or images
        if kind == "channels":
            out = config.plain(where, step.get("keys_out", step.get("name", out)))
            own = ALLOWED["channels"].get(target, ALLOWED["channels"].get(short))
            if isinstance(own, str):
                own = (n_channels or 0) - config.plain(where, step.get(own, 1))
            if own and n_channels:
                drawn = True
                for one in found:
                    if kind_of_transform(one["_target_"]) == "intensity":
                        one.setdefault("channels", list(range(n_channels - own)))
        if kind in ("dropped", "gone", "channels") or (keys and not {*images, out} & set(keys)):
            continue
        if kind is None:
            raise InputError(f"its preprocessing uses {target:.100}, which is not on the list (see docs/sources.md)")
        if out not in keys and not set(images) <= set(keys):
            raise InputError(f"its preprocessing differs between channels ({target} for {', '.join(keys)} only)")
        at = next(at for at, key in enumerate(keys) if key in (*images, out))
        given = {key: config.plain(f"{where}, {key}", value) for key, value in step.items() if key not in OURS}
        listed = {key: value for key, value in given.items() if key in ONE_A_KEY and isinstance(value, list)}
        found.append(given | {key: value[at if at < len(value) else 0] for key, value in listed.items()})
    transforms_of(found)
    return found, images, drawn


def _classes(configs: Sequence["_Config"], output: Mapping[str, Any], per_image: bool) -> dict[str, Any]:
    """The kind of the network's output, and its classes.

    Bundles apply softmax or sigmoid in the postprocessing, so their networks give logits. The exception is a
    postprocessing that only applies a threshold between 0 and 1: then the network gives probabilities.
    """
    config, steps = _part(configs, "postprocessing")
    steps = [config.follow(step) for step in steps] if isinstance(steps, list) else []
    steps = [step for step in steps if isinstance(step, Mapping)]
    last = {str(step.get("_target_")).rpartition(".")[2]: step for step in reversed(steps)}
    sigmoid = config is not None and config.follow(last.get("Activationsd", {}).get("sigmoid")) is True
    threshold = last.get("AsDiscreted", {}).get("threshold") if "Activationsd" not in last else None
    kind = "sigmoid" if isinstance(threshold, float) and 0 < threshold < 1 else "logits"
    number, names = output.get("num_channels"), _names(output)
    if number is None or (names and len(names) != number):
        return {"output": kind}
    names = names or [str(one) for one in range(number)]
    single = number == 1 or ((sigmoid or threshold is not None) and not per_image)
    if single and not re.search("background", names[0], re.IGNORECASE):
        names = ["background", *names]
    return {"output": kind, "classes": names}


def _part(configs: Sequence["_Config"], name: str) -> tuple["_Config | None", Any]:
    """A part of the inference, from the first config that has it."""
    for config in configs:
        for place in PARTS:
            value = config.get(place.format(name), None)
            if value is not None:
                value = config.follow(value)
                composed = isinstance(value, Mapping) and "transforms" in value
                return config, config.follow(value["transforms"]) if composed else value
    return None, None


class _Config:
    """A config whose parts are read as plain values."""

    def __init__(self, folder: Path, name: str, trust: bool) -> None:
        self.folder, self.trust, self.left = folder, trust, MOST_VALUES
        self.content = read_mapping(folder, name) | {"bundle_root": str(folder)}

    def get(self, place: str, *default: Any) -> Any:
        """The value at ``a#b#0``; some bundles use such a path as one key."""
        if place in self.content:
            return self.content[place]
        value: Any = self.content
        for key in re.split("#|::", place):
            value = self.follow(value)
            known = isinstance(value, Mapping) and key in value
            if not known and not (isinstance(value, list) and key.isdigit() and int(key) < len(value)):
                if default:
                    return default[0]
                raise InputError(f"its config refers to {place}, which is not defined")
            value = value[key] if known else value[int(key)]
        return value

    def follow(self, value: Any) -> Any:
        """Resolve a reference; also ``$@a``, and ``$@a + @b`` for lists, which need no evaluation."""
        if not isinstance(value, str):
            return value
        self._count()
        found = [REFERENCE.fullmatch(part) for part in value.removeprefix("$").split("+")]
        if not all(found) or (len(found) > 1 and not value.startswith("$")):
            return value
        parts = [self.follow(self.get(one[1])) for one in found]
        if len(parts) == 1:
            return parts[0]
        return list(chain(*parts)) if all(isinstance(part, list) for part in parts) else value

    def plain(self, where: str, value: Any) -> Any:
        """The value with references resolved; expressions are refused, or evaluated if trusted."""
        self._count()
        value = self.follow(value)
        if isinstance(value, Mapping):
            return {str(key): self.plain(where, one) for key, one in value.items() if key != "_desc_"}
        if isinstance(value, list):
            return [self.plain(where, one) for one in value]
        if isinstance(value, str) and value.startswith("$"):
            if value[1:].strip() in ALLOWED["constants"]:
                return ALLOWED["constants"][value[1:].strip()]
            if not self.trust:
                raise InputError(f"{where}: {value!r:.100} would have to be evaluated, {TRUST}")
            return self._evaluated(where, value)
        if isinstance(value, str) and value.startswith(("@", "%")):
            raise InputError(f"{where} refers to {value!r:.100}, which is not in the same config file")
        return value

    def _evaluated(self, where: str, value: str) -> Any:
        old = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # bundles were written when torch.load unpickled
        try:
            with importing(self.folder), patch.dict(os.environ, old):
                found = ConfigParser(self.content | {"_asked_": value}).get_parsed_content("_asked_")
                return json.loads(json.dumps(found, default=_as_plain))
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise InputError(f"{where}: {value!r:.100} cannot be evaluated ({reason:.200})") from error

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InputError("its config refers in circles or is too large")


def _as_plain(value: Any) -> Any:
    """Turn a result of an expression into something that JSON can hold."""
    if isinstance(value, np.ndarray):
        return {"_target_": "numpy.array", "object": value.tolist()}
    if isinstance(value, torch.Tensor):
        return {"_target_": "torch.tensor", "data": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.device):
        return "cpu"  # sources are built on the CPU and moved later
    raise InputError(f"it is a {type(value).__name__}, which a card cannot hold")
