"""Candidate sources: tasks of a collection, checkpoints with their network named, and MONAI bundles in a folder.

A bundle found in a folder is somebody else's program. Its configs are read as JSON, and nothing in them is evaluated
unless the user says so: a network is taken only if it is a class of MONAI's or torch's with arguments that are plain
values. What cannot be used is left out with the reason, never guessed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks import nets
from torch import nn

from medtl_ext._validation import InputError, require_choice
from medtl_ext.data import Task
from medtl_ext.networks import load_weights
from medtl_ext.studies import PHANTOM_SUBJECTS, open_collection

TAGS = ("institution", "modality", "objective")
CHECKPOINT_KEYS = ("name", "checkpoint", "network", "n_classes", "task", "encoder", *TAGS)
RESERVED = {
    "scratch": "training without one",
    "zero_shot": "a source that is used as it is",
    "full": "a fine-tuning of all parameters",
}
TRUSTED_PACKAGES = ("monai.networks.", "torch.nn.")


@dataclass(frozen=True)
class Candidate:
    """A source that may be transferred from.

    Attributes:
        name: what tables call it.
        kind: "task", "checkpoint" or "bundle".
        task: the task it was trained on, where it is one of the collection's.
        tags: what is known of its data: some of ``institution, modality, objective``.
        checkpoint: its weights; None until the pool is trained.
        network: a MONAI definition (``_target_`` and plain arguments); None: the bundle's own architecture.
        n_classes: channels of its head.
        size: training subjects, None where that is not known.
        encoder: names of the parameters to freeze in a fine-tuning, a regular expression; None: the bundle's own for
            its own architecture, and nothing is frozen in another.
        left_out: why it cannot be used; None: it can.
        job: folder of its pre-training, None where it was not trained here.
    """

    name: str
    kind: str
    task: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    network: Mapping[str, Any] | None = None
    n_classes: int = 2
    size: int | None = None
    encoder: str | None = None
    left_out: str | None = None
    job: Path | None = None

    def build(self, architecture: Callable[..., nn.Module]) -> nn.Module:
        """The network with its weights, in eval mode.

        Raises:
            InputError: the network cannot be built, or the weights are not its own.
        """
        try:
            network = built(self.network) if self.network else architecture(out_channels=self.n_classes)
            load_weights(network, self.checkpoint, min_share=1.0)
        except InputError as error:
            raise InputError(f"source {self.name}: {error}") from error
        return network.eval()


def find_candidates(
    sources: Sequence[str | Mapping[str, Any]],
    *,
    target: str,
    collection: str | None = None,
    subjects: int = PHANTOM_SUBJECTS,
    trust_bundles: bool = False,
) -> list[Candidate]:
    """The candidates that a list of sources means.

    Args:
        sources: each the name of a task; or ``{"name": ..., "checkpoint": FILE, "network": DEFINITION}`` with, where
            they are known, ``task`` or ``modality``, ``objective`` and ``institution``, ``n_classes`` (without a
            network), and ``encoder``; or ``{"bundles": FOLDER}``, a folder of MONAI bundles.
        target: the target task, which is never its own source.
        collection: where tasks are described; None: the phantom of ``subjects`` a site.
        trust_bundles: evaluate the expressions in the bundles' configs, which may run any code.

    Raises:
        InputError: no source, two of one name, an entry of no known form, or a task the collection does not have.
    """
    if not sources or isinstance(sources, str):
        raise InputError(f"sources is {sources!r}; give a list with at least one source task, checkpoint or folder.")
    found: list[Candidate] = []
    for source in sources:
        if isinstance(source, str):
            found.append(_task(source, target, collection, subjects))
        elif isinstance(source, Mapping) and "bundles" in source:
            found += _bundles(Path(source["bundles"]), trust_bundles)
        elif isinstance(source, Mapping) and "checkpoint" in source:
            found.append(_checkpoint(source, collection, subjects))
        else:
            raise InputError(
                f'source {source!r} is no task, {{"name": ..., "checkpoint": FILE}} or {{"bundles": FOLDER}}.'
            )
    require_source_names([candidate.name for candidate in found])
    return found


def require_source_names(names: Sequence[str]) -> None:
    """Refuse two sources of one name, and names that tables and verdicts have for something else.

    Raises:
        InputError: such a name.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"sources names {twice[0]} twice; give every source its own name.")
    for name in names:
        if name in RESERVED:
            raise InputError(f"a source is named {name}, which means {RESERVED[name]}; give it another name.")


def _task(name: str, target: str, collection: str | None, subjects: int) -> Candidate:
    task = Task(name)
    source = open_collection(collection, name, subjects=subjects)
    size = len(source.datalist(task, "train"))
    return Candidate(
        name,
        "task",
        task=name,
        tags={key: getattr(task, key) for key in TAGS},
        n_classes=source.n_classes(task),
        size=size,
        left_out="it is the target itself" if name == target else None,
    )


def _checkpoint(entry: Mapping[str, Any], collection: str | None, subjects: int) -> Candidate:
    for key in entry:
        require_choice(f"source {entry.get('name', entry['checkpoint'])}: key", key, CHECKPOINT_KEYS)
    tags = {key: str(entry[key]) for key in TAGS if key in entry}
    candidate = Candidate(
        str(entry.get("name", Path(entry["checkpoint"]).stem)),
        "checkpoint",
        tags=tags,
        checkpoint=str(entry["checkpoint"]),
        network=entry.get("network"),
        n_classes=int(entry.get("n_classes", 2)),
        encoder=entry.get("encoder"),
    )
    if "task" not in entry:
        return candidate
    known = _task(str(entry["task"]), "", collection, subjects)
    classes = candidate.n_classes if "n_classes" in entry else known.n_classes
    return replace(candidate, task=known.task, tags={**known.tags, **tags}, n_classes=classes, size=known.size)


def _bundles(folder: Path, trust: bool) -> list[Candidate]:
    if not folder.is_dir():
        raise InputError(f"folder of bundles {folder} does not exist; give a folder whose folders are MONAI bundles.")
    paths = sorted(path for path in folder.iterdir() if (path / "configs").is_dir())
    if not paths:
        raise InputError(f"folder {folder} holds no MONAI bundle, which is a folder with configs/ in it.")
    return [_bundle(path, trust) for path in paths]


def _bundle(path: Path, trust: bool) -> Candidate:
    candidate = Candidate(path.name, "bundle", checkpoint=str(path / "models" / "model.pt"))
    try:
        if trust:
            definition = _evaluated(path)
        else:
            definition = _literal(*_definition(path))
    except InputError as error:
        return replace(candidate, left_out=str(error))
    return replace(candidate, network=definition, left_out=_misfit(path, definition))


def _definition(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's definition in a bundle's config as it is written, and the config."""
    for name in ("inference.json", "train.json"):
        file = path / "configs" / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"its {name} is no JSON ({error})") from error
        for key in ("network_def", "network"):
            if isinstance(config, dict) and isinstance(config.get(key), dict) and "_target_" in config[key]:
                return config[key], config
    raise InputError("no inference.json or train.json of its defines a network (network_def with a _target_)")


def _literal(definition: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The definition with references to plain values filled in; refuses whatever would have to be evaluated."""

    def filled(value: Any, depth: int = 0) -> Any:
        if isinstance(value, str) and value.startswith("$"):
            raise InputError(f"its network needs {value!r} evaluated, which --trust_bundles true would do")
        if isinstance(value, str) and value.startswith(("@", "%")):
            if depth > 8 or value[1:] not in config:
                raise InputError(f"its network refers to {value!r}, which its config does not hold")
            return filled(config[value[1:]], depth + 1)
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise InputError(f"its network is made of a {value['_target_']}, which would have to be built")
            return {key: filled(inner, depth) for key, inner in value.items()}
        return [filled(inner, depth) for inner in value] if isinstance(value, list) else value

    target = definition["_target_"]
    if not isinstance(target, str) or target.startswith(("$", "@", "%")):
        raise InputError(f"its network is of class {target!r}, which would have to be evaluated")
    arguments = {key: filled(value) for key, value in definition.items() if not re.fullmatch(r"_\w+_", key)}
    if "pretrained" in arguments:  # a download; the bundle's own weights are loaded anyway
        arguments["pretrained"] = False
    return {"_target_": target, **arguments}


def _evaluated(path: Path) -> dict[str, Any]:
    """The definition with its expressions evaluated: runs whatever the bundle's author wrote."""
    definition, config = _definition(path)
    parser = ConfigParser(config)
    parser["bundle_root"] = str(path)
    parser["network_def"] = definition
    try:
        resolved = parser.get_parsed_content("network_def", instantiate=False)
        resolved = dict(resolved.get_config())
    except Exception as error:  # whatever somebody else's config raises
        raise InputError(f"its network cannot be evaluated ({error})") from error
    return _literal(resolved, {})


def network_class(target: str) -> type[nn.Module]:
    """The class a definition's ``_target_`` names: one of MONAI's or torch's networks, nothing else.

    >>> network_class("BasicUNet").__name__
    'BasicUNet'
    >>> network_class("os.system")
    Traceback (most recent call last):
    medtl_ext._validation.InputError: network os.system is not one of monai.networks.nets or torch.nn
    """
    name = target.rsplit(".", 1)[-1]
    found = None
    if "." not in target:
        found = getattr(nets, target, None)
    elif target.startswith(TRUSTED_PACKAGES):
        try:
            found = getattr(importlib.import_module(target.rsplit(".", 1)[0]), name, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"network {target} is not one of monai.networks.nets or torch.nn")
    return found


def built(definition: Mapping[str, Any]) -> nn.Module:
    """A fresh network of a definition, without evaluating anything in it.

    Raises:
        InputError: no network of MONAI's or torch's, or arguments it does not take.
    """
    if not isinstance(definition, Mapping) or "_target_" not in definition:
        raise InputError(f"network is {definition!r}; expected a definition with a _target_, such as BasicUNet")
    arguments = {key: value for key, value in definition.items() if key != "_target_"}
    try:
        return network_class(str(definition["_target_"]))(**arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"network {definition['_target_']} cannot be built from its arguments ({error})") from error


def _misfit(path: Path, definition: Mapping[str, Any]) -> str | None:
    """Why a bundle's network and weights do not belong together, or None."""
    file = path / "models" / "model.pt"
    if not file.is_file():
        return "it comes without weights (models/model.pt)"
    try:
        load_weights(built(definition), file, min_share=1.0)
    except InputError as error:
        return str(error).rstrip(".")
    return None


def expected_input(definition: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Channels and spatial dimensions a definition asks for, None where it does not say."""
    return definition.get("in_channels"), definition.get("spatial_dims", definition.get("dimensions"))


def input_misfit(network: nn.Module, candidate: Candidate, *, in_channels: int, roi_size: Sequence[int]) -> str | None:
    """Why a network cannot take the target's images, or None."""
    channels, dims = expected_input(candidate.network or {})
    if dims is not None and dims != len(roi_size):
        return f"its network is {dims}D, the target's images are {len(roi_size)}D"
    if channels is not None and channels != in_channels:
        return f"its network takes {channels} channels, the target's images have {in_channels}"
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, in_channels, *roi_size, device=device))
    except Exception as error:  # whatever a network raises on images it was not made for
        return f"its network refuses the target's images ({next(iter(str(error).splitlines()), type(error).__name__)})"
    if not isinstance(output, torch.Tensor) or output.shape[2:] != tuple(roi_size):
        return "its network does not give one prediction per pixel"
    return None


def usable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are not left out."""
    return [candidate for candidate in candidates if candidate.left_out is None]
