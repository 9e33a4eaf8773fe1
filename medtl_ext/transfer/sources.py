"""Sources: tasks on which a network is trained here, checkpoints with their network named, and folders of bundles.

A bundle found in a folder is somebody else's program. Its configs are read as JSON, and nothing in them is evaluated
unless the user says so: a network is taken only if it is a class of MONAI's or torch's with arguments that are plain
values. What cannot be used is left out with the reason, never guessed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from monai.bundle import ConfigParser
from monai.networks import nets
from torch import nn

from medtl_ext._validation import InputError, require_choice
from medtl_ext.data import load_collection
from medtl_ext.networks import load_weights, read_weights
from medtl_ext.transfer.config import identity
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.tasks import ClassificationTask, SegmentationTask, content_of, dataset_name

__all__ = ["SingleSource", "Source", "find_sources", "pretraining_job", "train_sources"]

TargetTask = SegmentationTask | ClassificationTask
KINDS = {"name": str, "task": str, "checkpoint": str, "network": Mapping, "n_classes": int, "encoder": str}
KINDS |= {"convolutions": Sequence} | dict.fromkeys(SegmentationTask.tags, str)
WORDS = {str: "text", Mapping: "a definition with _target_", int: "a whole number", Sequence: "a list of two names"}
RESERVED = {
    "scratch": "training without one",
    "zero_shot": "a source that is used as it is",
    "full": "a fine-tuning of all parameters",
}
TRUSTED_PACKAGES = ("monai.networks.", "torch.nn.")
CHANNEL_KEYS = ("n_input_channels", "in_channels")


@dataclass(frozen=True)
class Source:
    """A network that may be transferred from.

    Attributes:
        name: what tables call it.
        kind: "task", "checkpoint" or "bundle".
        task: the task or dataset it was trained on, or will be; None where that is not known.
        tags: what is known of its data: some of ``institution, modality, objective``.
        checkpoint: its weights; None until they are trained.
        network: a MONAI definition (``_target_`` and plain arguments); None: the bundle's own.
        n_classes: channels of its head.
        size: training scans or images, None where that is not known.
        encoder: names of the parameters to freeze in a fine-tuning, a regular expression; None: the bundle's own for
            its own network, and nothing is frozen in another.
        convolutions: names of the two convolutions that FU compares; None finds the first two.
        own: it was trained on the target itself, so it is scored but never ranked.
        left_out: why it cannot be used; None: it can.
        job: its training, None where it was not trained here.
    """

    name: str
    kind: str
    task: str | None = None
    tags: Mapping[str, str] | None = None
    checkpoint: str | None = None
    network: Mapping[str, Any] | None = None
    n_classes: int = 2
    size: int | None = None
    encoder: str | None = None
    convolutions: tuple[str, str] | None = None
    own: bool = False
    left_out: str | None = None
    job: Job | None = None

    def build(self, network_def: Mapping[str, Any], *, image_shape: Sequence[int], per_pixel: bool) -> nn.Module:
        """The network with its weights, in eval mode, which takes the target's images.

        Args:
            network_def: the bundle's own definition, for sources that name none.
            image_shape: channels x *spatial of the target's images.
            per_pixel: it is to give class scores for each pixel, not one for each image.

        Raises:
            InputError: it cannot be built, the weights are not its own, or it does not take such images.
        """
        try:
            network = self._with_weights(network_def, image_shape)
            with torch.no_grad():
                output = network.eval()(torch.zeros(1, *image_shape))
        except InputError as error:
            raise InputError(f"source {self.name}: {error}") from error
        except Exception as error:  # whatever a network raises on images it was not made for
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"source {self.name}: its network refuses the target's images ({reason})") from error
        found = tuple(getattr(output, "shape", ()))
        if per_pixel and found[2:] != tuple(image_shape[1:]):
            raise InputError(f"source {self.name}: its network does not give one prediction per pixel")
        if not per_pixel and found != (1, self.n_classes):
            raise InputError(f"source {self.name}: its network does not give {self.n_classes} class scores an image")
        return network

    def _with_weights(self, network_def: Mapping[str, Any], image_shape: Sequence[int]) -> nn.Module:
        in_channels, dims = image_shape[0], len(image_shape) - 1
        definition = filled(self.network or network_def, n_classes=self.n_classes, in_channels=in_channels)
        declared = definition.get("spatial_dims", definition.get("dimensions", dims))
        if declared != dims:
            raise InputError(f"its network is {declared}D, the target's images are {dims}D")
        channels = next((definition[key] for key in CHANNEL_KEYS if key in definition), in_channels)
        if channels == in_channels == 1:  # the definition may take them from the target; the weights do not
            weights = read_weights(self.checkpoint).values()
            first = next((tuple(value.shape) for value in weights if value.ndim == dims + 2), (0, 1))
            channels = 3 if first[1] == 3 else 1
        if channels != in_channels:
            hint = "; give --in_channels 3, which repeats grey images" if channels == 3 else ""
            raise InputError(f"its network takes {channels} channels, the target's images have {in_channels}{hint}")
        network = built(definition)
        load_weights(network, self.checkpoint, min_share=1.0)
        return network


def filled(definition: Mapping[str, Any], *, n_classes: int, in_channels: int) -> dict[str, Any]:
    """The definition with the two references that belong to it filled in."""
    known = {"@n_classes": n_classes, "@in_channels": in_channels}
    return {key: known.get(value, value) if isinstance(value, str) else value for key, value in definition.items()}


def find_sources(
    entries: Sequence[str | Mapping[str, Any]],
    target: TargetTask,
    *,
    collection: str | None = None,
    trust_bundles: bool = False,
    mark_own: bool = True,
) -> list[Source]:
    """The sources that a list means.

    Args:
        entries: each a task or dataset, on which a network is trained here; or a mapping with ``name``, ``checkpoint``
            (already trained) or ``task`` (train on it), and, as needed, ``network`` (a MONAI definition, in which
            ``"@n_classes"`` stands for the size of its head), ``n_classes``, ``encoder``, ``convolutions`` and what is
            known of its data; or ``{"bundles": FOLDER}``, a folder of MONAI bundles.
        target: which is never ranked as its own source.
        collection: where source tasks are described; None: the phantom.
        trust_bundles: evaluate the expressions in the bundles' configs, which may run any code.
        mark_own: a source of the target's own data is its own model; false: the sources are for any target.

    Raises:
        InputError: no source, two of one name, an entry of no known form, or a task that cannot be had.
    """
    if not entries or isinstance(entries, str):
        raise InputError(f"sources is {entries!r}; give a list with at least one source task, checkpoint or folder.")
    found: list[Source] = []
    for entry in entries:
        if isinstance(entry, Mapping) and "bundles" in entry:
            found += _bundles(Path(entry["bundles"]), trust_bundles)
        else:
            entry = {"task": entry} if isinstance(entry, str) else entry
            found.append(_source(entry, target, collection, mark_own))
    names = [source.name for source in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"sources names {twice[0]} twice; give every source its own name.")
    for name in names:
        if name in RESERVED:
            raise InputError(f"a source is named {name}, which means {RESERVED[name]}; give it another name.")
    if all(source.own for source in found):
        raise InputError(f"no source is left: {', '.join(names)} is the target's own model, which is never ranked.")
    return found


def source_name(entry: str | Mapping[str, Any]) -> str:
    """What tables call an entry of ``sources``."""
    if isinstance(entry, str):
        return dataset_name(entry)
    return str(entry.get("name") or dataset_name(entry.get("task") or Path(entry["checkpoint"]).stem))


def _source(entry: Mapping[str, Any], target: TargetTask, collection: str | None, mark_own: bool) -> Source:
    if not isinstance(entry, Mapping) or not ("task" in entry or "checkpoint" in entry):
        raise InputError(f'source {entry!r} is no task, {{"name": ..., "checkpoint": FILE}} or {{"bundles": FOLDER}}.')
    where = f"source {entry.get('name', entry)}"
    for key, value in entry.items():
        kind = KINDS[require_choice(f"{where}: key", key, KINDS)]
        wrong = not isinstance(value, kind) or (kind is Sequence and (isinstance(value, str) or len(value) != 2))
        if value is not None and wrong:
            raise InputError(f"{where}: {key} is {value!r}; expected {WORDS[kind]}.")
    task, name = entry.get("task"), source_name(entry)
    own = mark_own and task is not None and target.is_same(task)
    known = None if task is None else target.other(task, collection=collection)
    tags = {tag: getattr(known, tag) for tag in target.tags} if known else {}
    return Source(
        name,
        "checkpoint" if "checkpoint" in entry else "task",
        task=task,
        tags=tags | {tag: entry[tag] for tag in SegmentationTask.tags if tag in entry},
        checkpoint=entry.get("checkpoint"),
        network=entry.get("network"),
        n_classes=entry.get("n_classes", known.n_classes if known else 2),
        size=known.size if known else None,
        encoder=entry.get("encoder"),
        convolutions=tuple(entry["convolutions"]) if entry.get("convolutions") else None,
        own=own,
        left_out="it is the target itself" if own and not target.scores_own_model else None,
    )


def _bundles(folder: Path, trust: bool) -> list[Source]:
    if not folder.is_dir():
        raise InputError(f"folder of bundles {folder} does not exist; give a folder whose folders are MONAI bundles.")
    paths = sorted(path for path in folder.iterdir() if (path / "configs").is_dir())
    if not paths:
        raise InputError(f"folder {folder} holds no MONAI bundle, which is a folder with configs/ in it.")
    return [_bundle(path, trust) for path in paths]


def _bundle(path: Path, trust: bool) -> Source:
    weights = path / "models" / "model.pt"
    source = Source(path.name, "bundle", tags={}, checkpoint=str(weights))
    try:
        definition, config = _definition(path)
        definition = _evaluated(path, definition, config) if trust else _literal(definition, config)
        if not weights.is_file():
            raise InputError("it comes without weights (models/model.pt)")
        load_weights(built(definition), weights, min_share=1.0)
    except InputError as error:
        return replace(source, left_out=str(error).rstrip("."))
    return replace(source, network=definition)


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


def _evaluated(path: Path, definition: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The definition with its expressions evaluated: runs whatever the bundle's author wrote."""
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


def pretraining_job(config: Mapping[str, Any], folder: str | Path, source: Source, *, seed: int) -> Job:
    """The run of ``pretrain.json`` on a source's data; its folder's name holds a hash of all settings that matter.

    Of a collection or of files it holds the content, wherever they lie: other patients, splits or files give another.

    Raises:
        InputError: the collection is missing or breaks the format.
    """
    overlay = Path(config["bundle_root"]) / "configs" / "pretrain.json"
    overrides: dict[str, Any] = {"source_task": source.task, "target_task": source.task, "seed": seed}
    overrides |= {"source_ckpt": None, "collection": source_collection(config)}
    overrides |= {"source_collection": overrides["collection"]} if "source_collection" in config else {}
    overrides |= {"check_data": True} if "check_data" in config else {}
    overrides |= {"network_def": dict(source.network)} if source.network else {}
    if overrides["collection"] is not None:
        load_collection(overrides["collection"])  # a missing one has no content
    merged = {**config, **json.loads(overlay.read_text(encoding="utf-8")), **overrides}
    path = Path(source.task)
    key = identity(merged, without=("weight_map", "leep", "grid")) | {
        "data": content_of(path) if path.exists() else None
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return Job(config, Path(folder) / f"{source.name}_{digest}", overlays=[overlay], overrides=overrides)


def source_collection(config: Mapping[str, Any]) -> str | None:
    """The collection file that a bundle's sources are in; None: the phantom."""
    named = config.get("source_collection", "@collection")
    return config.get("collection") if named == "@collection" else named


def train_sources(
    sources: Sequence[Source], run: Run, target: TargetTask, *, folder: str, seed: int, check: bool = True
) -> list[Source]:
    """Train the networks of the sources that have no checkpoint yet, and keep them.

    Each is a run of ``pretrain.json`` in a folder of its own, several at a time; an interrupted pool is continued.

    Args:
        sources: of `find_sources`.
        run: whose config is trained.
        target: of the same kind.
        folder, seed: where the pool is kept, and the seed of its trainings.
        check: read every file before anything is trained.

    Returns:
        The sources, with the checkpoints of all that can be used.
    """
    jobs = {
        source.name: pretraining_job(run.config, folder, source, seed=seed)
        for source in sources
        if source.checkpoint is None and source.left_out is None
    }
    tasks = {source.name: source.task for source in sources}
    if not all(job.done for job in jobs.values()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".pool.lock"):  # other processes find the pool done
            for name, job in jobs.items():
                if check and not job.done:
                    splits = {"train", run.config.get("val_split", "val"), "test"}
                    target.other(tasks[name], collection=source_collection(run.config)).check(splits)
            run.train(list(jobs.values()), "pre-training")
    return [
        replace(source, checkpoint=jobs[source.name].model, job=jobs[source.name]) if source.name in jobs else source
        for source in sources
    ]


@dataclass(kw_only=True, eq=False)
class SingleSource:
    """The one source of a fine-tuning: a checkpoint, or a network that is trained on a task here, once, when needed.

    Args:
        here, target: see `train_sources`.
        task: what it was trained on, or will be.
        checkpoint: its weights, if there are.
        classes: of its head; None: those of the task.
        folder, check: see `train_sources`; no folder: nothing is trained here, so that a checkpoint has to be given.
    """

    here: Run
    target: TargetTask
    task: str | None
    checkpoint: str | None
    folder: str
    classes: int | None = None
    check: bool = True

    @cached_property
    def n_classes(self) -> int:
        if self.classes is not None:
            return self.classes
        return self.target.other(self.task, collection=source_collection(self.here.config)).n_classes

    @cached_property
    def file(self) -> str:
        """Its weights, which are trained if there are none yet."""
        if self.checkpoint is not None:
            return self.checkpoint
        if self.task is None or self.folder is None:
            what = "--source_ckpt" if self.folder is None else "--source_task (or --source_ckpt)"
            raise InputError(f"{what} is not given, and this config starts from it; give it.")
        source = Source(dataset_name(self.task), "task", task=self.task)
        (trained,) = train_sources([source], self.here, self.target, folder=self.folder, seed=0, check=self.check)
        return trained.checkpoint

    def network(self, image_shape: Sequence[int]) -> nn.Module:
        """The untouched source; see `Source.build`."""
        source = Source(self.task or "given", "checkpoint", checkpoint=self.file, n_classes=self.n_classes)
        definition = self.here.config["network_def"]
        return source.build(definition, image_shape=image_shape, per_pixel=self.target.per_pixel)
