"""Sources: tasks on which a network is trained here, checkpoints with their network named, and folders of bundles.

A bundle found in a folder is somebody else's program. Its configs are read as JSON, and nothing in them is evaluated
unless the user says so: a network is taken only if it is a class of MONAI's or torch's with arguments that are plain
values. What cannot be used is left out with the reason, never guessed.
"""

import hashlib
import json
import pydoc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from monai.bundle import ConfigExpression, ConfigParser
from torch import nn

from medtl_ext._validation import InputError, require_choice
from medtl_ext.data import load_collection
from medtl_ext.networks import load_weights, read_weights
from medtl_ext.transfer.config import identity
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.tasks import ClassificationTask, SegmentationTask, content_of, dataset_name

__all__ = ["SingleSource", "Source", "find_sources", "pretraining_job", "train_sources"]

TargetTask = SegmentationTask | ClassificationTask
KEYS = {"name": str, "task": str, "checkpoint": str, "network": Mapping, "n_classes": int, "encoder": str}
KEYS |= {"convolutions": Sequence} | dict.fromkeys(SegmentationTask.tags, str)
WORDS = {str: "text", Mapping: "a definition with _target_", int: "a whole number", Sequence: "a list of two names"}
RESERVED = {
    "scratch": "training without one",
    "zero_shot": "a source that is used as it is",
    "full": "a fine-tuning of all parameters",
}
TRUSTED_PACKAGES = ("monai.networks.", "torch.nn.")
CHANNEL_KEYS = ("n_input_channels", "in_channels")
MOST_CHANNELS = 8  # of images; the first layer of a network that splits them otherwise has more


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
    convolutions: Sequence[str] | None = None
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
            network = self._with_weights(network_def, image_shape, grey_is_repeated=not per_pixel)
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

    def _with_weights(
        self, network_def: Mapping[str, Any], image_shape: Sequence[int], *, grey_is_repeated: bool
    ) -> nn.Module:
        in_channels, dims = image_shape[0], len(image_shape) - 1
        known = {"@n_classes": self.n_classes, "@in_channels": in_channels}
        given = dict(self.network or network_def)
        definition = {key: known.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
        declared = definition.get("spatial_dims", definition.get("dimensions", dims))
        if declared != dims:
            raise InputError(f"its network is {declared}D, the target's images are {dims}D")
        channels = next((definition[key] for key in CHANNEL_KEYS if key in definition), in_channels)
        if channels == in_channels:  # the definition may take them from the target; the weights do not
            weights = read_weights(self.checkpoint).values()
            first = next((tuple(value.shape) for value in weights if value.ndim == dims + 2), (0, channels))
            channels = first[1] if first[1] <= MOST_CHANNELS else channels
        if channels != in_channels:
            hint = "; give --in_channels 3, which repeats grey images" if channels == 3 and grey_is_repeated else ""
            takes = f"{channels} channel{'s'[: channels != 1]}"
            raise InputError(f"its network takes {takes}, the target's images have {in_channels}{hint}")
        network = built(definition)
        load_weights(network, self.checkpoint, min_share=1.0)
        return network


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
        entry = {"task": entry} if isinstance(entry, str) else entry
        kind = next((kind for kind in KINDS if isinstance(entry, Mapping) and kind in entry), None)
        if kind is None:
            known = '{"name": ..., "checkpoint": FILE} or {"bundles": FOLDER}'
            raise InputError(f"source {entry!r} is no task, {known}.")
        found += KINDS[kind](entry, target, collection, trust_bundles)
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"sources names {name} twice; give every source its own name.")
        if name in RESERVED:
            raise InputError(f"a source is named {name}, which means {RESERVED[name]}; give it another name.")
    own = {source.name for source in found if mark_own and source.task and target.is_same(source.task)}
    if len(own) == len(found):
        raise InputError(f"no source is left: {', '.join(names)} is the target's own model, which is never ranked.")
    reason = "it is the target itself" if target.per_pixel else None
    return [replace(one, own=True, left_out=reason) if one.name in own else one for one in found]


def _network(entry: Mapping[str, Any], target: TargetTask, collection: str | None, trust: bool) -> list[Source]:
    """A network of a task, which is trained here, or of a checkpoint."""
    where = f"source {entry.get('name', entry)}"
    for key, value in entry.items():
        kind = KEYS[require_choice(f"{where}: key", key, KEYS)]
        wrong = not isinstance(value, kind) or (kind is Sequence and (isinstance(value, str) or len(value) != 2))
        if value is not None and wrong:
            raise InputError(f"{where}: {key} is {value!r}; expected {WORDS[kind]}.")
    given = {key: value for key, value in entry.items() if value is not None}
    tags = {tag: given.pop(tag) for tag in SegmentationTask.tags if tag in given}
    if "task" in given:
        known = target.other(given["task"], collection=collection)
        tags = {tag: getattr(known, tag) for tag in target.tags} | tags
        given = {"n_classes": known.n_classes, "size": known.size} | given
        if target.per_pixel and known.n_channels != target.n_channels:
            given["left_out"] = f"it is of {known.modality}, the target's images are {target.modality}"
    name = str(given.pop("name", "")) or dataset_name(given.get("task") or Path(given["checkpoint"]).stem)
    return [Source(name, "checkpoint" if "checkpoint" in given else "task", tags=tags, **given)]


def _bundles(entry: Mapping[str, Any], target: TargetTask, collection: str | None, trust: bool) -> list[Source]:
    """The networks of a folder of MONAI bundles; what cannot be used is left out with the reason."""
    folder, found = Path(entry["bundles"]), []
    if not folder.is_dir():
        raise InputError(f"folder of bundles {folder} does not exist; give a folder whose folders are MONAI bundles.")
    for path in sorted(path for path in folder.iterdir() if (path / "configs").is_dir()):
        weights = path / "models" / "model.pt"
        source = Source(path.name, "bundle", tags={}, checkpoint=str(weights))
        try:
            source = replace(source, network=_definition(path, trust))
            if not weights.is_file():
                raise InputError("it comes without weights (models/model.pt)")
            load_weights(built(source.network), weights, min_share=1.0)
        except InputError as error:
            source = replace(source, left_out=str(error).rstrip("."), network=None)
        found.append(source)
    if not found:
        raise InputError(f"folder {folder} holds no MONAI bundle, which is a folder with configs/ in it.")
    return found


KINDS: dict[str, Callable[[Mapping[str, Any], TargetTask, str | None, bool], list[Source]]] = {
    "bundles": _bundles,
    "checkpoint": _network,
    "task": _network,
}
"""The key that tells a kind of source -> the sources of such an entry, with collection and trust of `find_sources`."""


def _definition(path: Path, trust: bool) -> dict[str, Any]:
    """The network's definition in a bundle's config, references filled in; evaluates nothing unless it is trusted."""
    for file in (path / "configs" / name for name in ("inference.json", "train.json")):
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise InputError(f"its {file.name} is no JSON ({error})") from error
        for key in ("network_def", "network"):
            if isinstance(config, dict) and isinstance(config.get(key), dict) and "_target_" in config[key]:
                return _plain(config | {"bundle_root": str(path)}, key, trust)
    raise InputError("no inference.json or train.json of its defines a network (network_def with a _target_)")


def _plain(config: dict[str, Any], key: str, trust: bool) -> dict[str, Any]:
    """A part of a config as plain values; refuses whatever would have to be built, or evaluated without trust."""

    def refuse(value: Any) -> None:
        if isinstance(value, ConfigExpression):
            raise InputError(f"its network needs {value.get_config()!r} evaluated, which --trust_bundles true would do")
        raise InputError(f"its network is made of {value!r}, which would have to be built")

    try:
        part = ConfigParser(config).get_parsed_content(key, instantiate=False, eval_expr=trust).get_config()
        found = {name: value for name, value in part.items() if name == "_target_" or not re.fullmatch(r"_\w+_", name)}
        if "pretrained" in found:  # a download; the bundle's own weights are loaded anyway
            found["pretrained"] = False
        return json.loads(json.dumps(found, default=refuse))
    except InputError:
        raise
    except Exception as error:  # whatever somebody else's config raises
        raise InputError(f"its network cannot be read ({error})") from error


def built(definition: Mapping[str, Any]) -> nn.Module:
    """A fresh network of a definition, of MONAI's or torch's classes, without evaluating anything in it.

    Raises:
        InputError: no network of MONAI's or torch's, or arguments it does not take.

    >>> built({"_target_": "os.system", "command": "true"})
    Traceback (most recent call last):
    medtl_ext._validation.InputError: network os.system is not one of monai.networks.nets or torch.nn
    """
    if not isinstance(definition, Mapping) or "_target_" not in definition:
        raise InputError(f"network is {definition!r}; expected a definition with a _target_, such as BasicUNet")
    target = str(definition["_target_"])
    path = target if "." in target else f"monai.networks.nets.{target}"
    network = pydoc.locate(path) if path.startswith(TRUSTED_PACKAGES) else None
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise InputError(f"network {target} is not one of monai.networks.nets or torch.nn")
    try:
        return network(**{key: value for key, value in definition.items() if key != "_target_"})
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise InputError(f"network {target} cannot be built from its arguments ({error})") from error


def pretraining_job(config: Mapping[str, Any], folder: str | Path, source: Source, *, seed: int) -> Job:
    """The run of ``pretrain.json`` on a source's data; its folder's name holds a hash of all settings that matter.

    Of a collection or of files it holds the content, wherever they lie: other patients, splits or files give another.

    Raises:
        InputError: the collection is missing or breaks the format.
    """
    overlay, collection = Path(config["bundle_root"]) / "configs" / "pretrain.json", source_collection(config)
    overrides: dict[str, Any] = {"source_task": source.task, "target_task": source.task, "seed": seed}
    overrides |= {"source_ckpt": None, "collection": collection}
    also = {"source_collection": collection, "check_data": True}
    overrides |= {name: value for name, value in also.items() if name in config}
    overrides |= {"network_def": dict(source.network)} if source.network else {}
    if collection is not None:
        load_collection(collection)  # a missing one has no content
    merged, path = {**config, **json.loads(overlay.read_text(encoding="utf-8")), **overrides}, Path(source.task)
    key = identity(merged, without=("weight_map", "leep", "grid"))
    key["data"] = content_of(path) if path.exists() else None
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
    if not all(job.done for job in jobs.values()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".pool.lock"):  # other processes find the pool done
            for job in jobs.values():
                if check and not job.done:
                    task = target.other(job.overrides["source_task"], collection=source_collection(run.config))
                    task.check({"train", run.config.get("val_split", "val"), "test"})
            run.train(list(jobs.values()), "pre-training")
    trained = {name: {"checkpoint": job.model, "job": job} for name, job in jobs.items()}
    return [replace(source, **trained.get(source.name, {})) for source in sources]


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
        if self.checkpoint is None and (self.task is None or self.folder is None):
            what = "--source_ckpt" if self.folder is None else "--source_task (or --source_ckpt)"
            raise InputError(f"{what} is not given, and this config starts from it; give it.")
        source = Source(dataset_name(self.task or ""), "task", task=self.task, checkpoint=self.checkpoint)
        (trained,) = train_sources([source], self.here, self.target, folder=self.folder, seed=0, check=self.check)
        return trained.checkpoint

    def network(self, image_shape: Sequence[int]) -> nn.Module:
        """The untouched source; see `Source.build`."""
        source = Source(self.task or "given", "checkpoint", checkpoint=self.file, n_classes=self.n_classes)
        definition = self.here.config["network_def"]
        return source.build(definition, image_shape=image_shape, per_pixel=self.target.per_pixel)
