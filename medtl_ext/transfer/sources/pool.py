"""Sources: tasks on which a network is trained here, and other people's networks.

The card of a source describes its network. Other people's files are read as data; none of their code runs unless the
user allows it. A source that cannot be used is left out, with the reason.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from monai.inferers import SimpleInferer
from monai.transforms import CopyItemsd, EnsureTyped, LoadImaged, RandSpatialCropd, SpatialPadd
from torch import nn

from medtl_ext._validation import InputError, first_line
from medtl_ext.data import Collection, SliceDataset, Task, load_collection
from medtl_ext.data.plan import Grid, read_grid
from medtl_ext.networks import holding, load_weights
from medtl_ext.transfer.config import current_config, identity
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.sources.allowed import built_network, transforms_of
from medtl_ext.transfer.sources.bundle import bundle_card
from medtl_ext.transfer.sources.card import PROGRAMS, Card, channel_order, read_card
from medtl_ext.transfer.sources.network import (
    SourceNetwork,
    adapted,
    answering,
    meaning,
    untouched,
    warn_of_other_order,
)
from medtl_ext.transfer.sources.nnunet import nnunet_card, nnunet_folders
from medtl_ext.transfer.tasks import POOLED, ClassificationTask, SegmentationTask, content_of, dataset_name
from medtl_ext.transforms import PickChannelsd, SelectLabelsd

TargetTask = SegmentationTask | ClassificationTask
RESERVED = {
    "scratch": "training without one",
    "zero_shot": "a source that is used as it is",
    "full": "a fine-tuning of all parameters",
}
LOADING = (CopyItemsd, EnsureTyped, LoadImaged, SelectLabelsd)
"""The bundle's transforms that are also needed for a source with its own preprocessing."""
MOST_CHANNELS = 8  # of images; a first layer with more inputs does not take the image itself
WEIGHTS = (".pt", ".pth", ".safetensors", *PROGRAMS)
KINDS = "a card, a checkpoint, a MONAI bundle or an nnU-Net folder"


@dataclass(frozen=True)
class Source:
    """A network that may be transferred from.

    Attributes:
        name: its name in tables.
        kind: "task", "checkpoint", "card", "bundle" or "nnunet".
        card: describes its network; the card of a task has weights once the task is trained.
        entry: its value in the option ``--source`` or ``--sources``.
        task: the task or dataset it was trained on, or will be; None: not known.
        size: number of training scans or images; None: not known.
        own: it was trained on the target itself, so it is scored but never ranked.
        left_out: why it cannot be used; None: it can be used.
        job: its training; None: it was not trained here.
    """

    name: str
    kind: str
    card: Card = field(default_factory=Card)
    entry: str | Mapping[str, Any] | None = None
    task: str | None = None
    size: int | None = None
    own: bool = False
    left_out: str | None = None
    job: Job | None = None

    @property
    def option(self) -> str | Mapping[str, Any]:
        """The value of ``--source`` that names it, with its weights if it was trained here."""
        given = self.entry if isinstance(self.entry, Mapping) else {"task": self.entry}
        return self.entry if self.job is None else {**given, "checkpoint": self.job.model}

    def refusal(self) -> InputError:
        """The error that says why it cannot be used."""
        end = "" if str(self.left_out).endswith("?") else "."
        return InputError(f"source {self.name} cannot be used: {self.left_out}{end}")

    def channels(self, target: TargetTask) -> tuple[list[int | None], list[int]]:
        """Which channels of the target it takes, and which are left; see `channel_order`."""
        return channel_order(self.card.channels, target.channels, fill=self.card.fill)

    def build(self, network_def: Mapping[str, Any], target: TargetTask, image_shape: Sequence[int]) -> nn.Module:
        """Build the network with its weights, in evaluation mode, for the images of the target.

        Args:
            network_def: the bundle's own definition, for sources without one.
            target: the target task.
            image_shape: channels x *spatial of the images for the bundle's own networks.

        Raises:
            InputError: the network cannot be built, the weights do not fit, or it refuses the target's images.
        """
        try:
            if self.card.foreign:
                return untouched(self.card, channels=len(self.channels(target)[0]), per_pixel=target.per_pixel)
            return self._own_network(network_def, target, image_shape)
        except InputError as error:
            raise InputError(f"source {self.name}: {error}") from error

    def _own_network(self, network_def: Mapping[str, Any], target: TargetTask, image_shape: Sequence[int]) -> nn.Module:
        """The bundle's own network with this source's weights."""
        in_channels, dims = image_shape[0], len(image_shape) - 1
        weights, n_classes = self.card.weights(), self.own_classes(network_def, target)
        first = next((tuple(value.shape) for value in weights.values() if value.ndim == dims + 2), (0, in_channels))
        takes = first[1] if first[1] <= MOST_CHANNELS else in_channels
        if takes != in_channels:
            hint = "; give --in_channels 3, which repeats grey images" if takes == 3 and not target.per_pixel else ""
            said = f"{takes} channel{'s'[: takes != 1]}"
            raise InputError(f"its network takes {said}, but the target's images have {in_channels}{hint}")
        network = built_network(_filled(network_def, n_classes, in_channels))
        load_weights(network, weights, min_share=1.0)
        try:
            with torch.no_grad():
                output = network.eval()(torch.zeros(1, *image_shape))
        except Exception as error:  # a network may raise any error for unsuitable images
            raise InputError(f"its network refuses the target's images ({first_line(error)})") from error
        found = tuple(getattr(output, "shape", ()))
        if target.per_pixel and found[2:] != tuple(image_shape[1:]):
            raise InputError("its network does not give one prediction per pixel")
        if not target.per_pixel and found != (1, n_classes):
            raise InputError(f"its network does not give {n_classes} class scores per image")
        return network

    def own_classes(self, network_def: Mapping[str, Any], target: TargetTask) -> int:
        """Number of classes of a network of the bundle's own: from the card, or from the weights."""
        if self.card.n_classes is not None or self.card.checkpoint is None:
            return self.card.n_classes or target.n_classes
        weights = self.card.weights()
        own = built_network(_filled(network_def, target.n_classes, target.n_channels)).state_dict()
        other = {weights[k].shape[0] for k, v in own.items() if k in weights and weights[k].shape[:1] != v.shape[:1]}
        return other.pop() if len(other) == 1 else target.n_classes


def _filled(definition: Mapping[str, Any], n_classes: int, in_channels: int) -> dict[str, Any]:
    """The definition of a network, with its references to classes and channels filled in."""
    known = {"@n_classes": n_classes, "@in_channels": in_channels}
    return {key: known.get(value, value) if isinstance(value, str) else value for key, value in definition.items()}


def find_sources(
    entries: Sequence[str | Mapping[str, Any]],
    target: TargetTask,
    *,
    collection: str | None = None,
    trust: bool = False,
    mark_own: bool = True,
) -> list[Source]:
    """Find the sources that a list names.

    Args:
        entries: each entry has one of three forms. (1) A task or dataset: a network is trained on it here. (2) A path
            to a card, to weights (with a card beside them, or of the bundle's own network), to a MONAI bundle, to an
            nnU-Net folder, or to a folder of these. (3) A mapping of a card's keys, with ``task`` (the task it was or
            will be trained on) or ``card`` (a path as in (2); the other keys win over this card). For classification,
            a list of datasets (also as ``task``) is one source, trained on all of them except the target.
        target: the target, which is never ranked as its own source.
        collection: the collection of source tasks; None: the phantom.
        trust: allow code in a source to run: expressions, programs, Python files.
        mark_own: mark a source of the target's own data as its own model; False: the sources are for any target.

    Raises:
        InputError: no source, two sources of one name, an entry of unknown form, or an unknown task.
    """
    if not entries or isinstance(entries, str):
        raise InputError(f"sources is {entries!r}; give a list with at least one task, card, checkpoint or folder.")
    found = [source for entry in entries for source in _meant(entry, target, collection, trust)]
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"sources names {name} twice; give every source its own name.")
        if name in RESERVED:
            raise InputError(f"a source is named {name}, which means {RESERVED[name]}; give it another name.")
    own = {source.name for source in found if mark_own and source.task and target.is_same(source.task)}
    if len(own) == len(found):
        own_only = f"{', '.join(names)} is the target's own model, which is never ranked"
        raise InputError(f"no source is left: {own_only}; give other --sources.")
    reason = "it is the target itself" if target.per_pixel else None
    return [replace(one, own=True, left_out=reason) if one.name in own else one for one in found]


def source_name() -> str:
    """A short name for the config's option ``source``, used as the name of a folder."""
    entry = current_config().get("source")
    if isinstance(entry, Mapping):
        entry = entry.get("name") or entry.get("task") or entry.get("card") or entry.get("checkpoint")
    return dataset_name((POOLED.join(entry) if isinstance(entry, list) else str(entry)).rstrip("/\\"))


def _meant(entry: str | Mapping[str, Any], target: TargetTask, collection: str | None, trust: bool) -> list[Source]:
    """The sources of one entry."""
    if isinstance(entry, list):
        entry = {"task": entry}
    if isinstance(entry, Mapping) and isinstance(entry.get("task"), list):
        entry = {**entry, "task": _jointly(entry["task"], target)}
    if isinstance(entry, str):
        if (kind := _kind(Path(entry))) is None:
            if "/" in entry or entry.endswith(".json"):  # no task has such a name
                _require_dataset(Path(entry), target)
            return [_described({"task": entry}, entry, target, collection, trust)]
        if kind == "shelf":
            paths = [path for path in sorted(Path(entry).iterdir()) if _kind(path, shelf=False)]
            described = {_weights_of(path) for path in paths if _kind(path) == "card"}
            return [_on_shelf(path, target, trust) for path in paths if path.resolve() not in described]
        return [_on_shelf(Path(entry), target, trust)]
    if not isinstance(entry, Mapping) or not {"task", "card", "checkpoint"} & entry.keys():
        forms = '{"name": ..., "checkpoint": FILE} or {"card": PATH}'
        raise InputError(f"source {entry!r} is unknown; give a task, a path of a card, checkpoint or folder, {forms}.")
    return [_described(entry, entry, target, collection, trust)]


def _jointly(names: Sequence[str], target: TargetTask) -> str:
    """All datasets of a list except the target, as one task."""
    if target.per_pixel:
        raise InputError(f"source {names!r} is a list; only datasets of classification are pooled: give one source.")
    if not (kept := [name for name in names if not target.is_same(name)]):
        raise InputError(f"source {names!r} holds only the target's own dataset; add other datasets.")
    return POOLED.join(kept)


def _require_dataset(path: Path, target: TargetTask) -> None:
    if not path.exists():
        raise InputError(f"source {path} does not exist; correct its path.")
    if target.per_pixel:
        raise InputError(f"source {path} is of no known kind; expected {KINDS}, or a folder of these.")


def _kind(path: Path, *, shelf: bool = True) -> str | None:
    """The kind of source at a path, or None. A "shelf" is a folder of sources; it cannot hold other shelves."""
    if path.suffix in WEIGHTS:
        return "checkpoint"
    if not path.is_dir():
        return "card" if path.suffix == ".json" and _is_card(path) else None
    if (path / "configs").is_dir():
        return "bundle"
    if len(nnunet_folders(path)) == 1:
        return "nnunet"
    return "shelf" if shelf and any(_kind(child, shelf=False) for child in path.iterdir()) else None


def _is_card(path: Path) -> bool:
    """True if a JSON file names weights or a network, as a card does and the description of a dataset does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not {"checkpoint", "network"}.isdisjoint(content)


def _weights_of(card: Path) -> Path:
    return (card.parent / str(json.loads(card.read_text(encoding="utf-8")).get("checkpoint", ""))).resolve()


def _on_shelf(path: Path, target: TargetTask, trust: bool) -> Source:
    """The source at a path; if it cannot be used, it is left out with the reason."""
    kind, where = _kind(path), str(path)
    name = path.name if path.is_dir() else path.parent.name if path.stem == "model" else path.stem
    try:
        card = card_at(path, trust)
        return _fitting(Source(card.name or name, kind, card, where), target)
    except InputError as error:
        return Source(name, kind, Card(), where, left_out=str(error).rstrip("."))


def card_at(path: Path, trust: bool) -> Card:
    """The card of the source at a path.

    Raises:
        InputError: there is no source, or its card cannot be read.
    """
    kind = _kind(path)
    if kind in ("bundle", "nnunet"):
        return read_card(bundle_card(path, trust) if kind == "bundle" else nnunet_card(path), trust=trust, folder=path)
    if kind == "card":
        return read_card(path, trust=trust)
    if kind == "checkpoint":
        beside = path.with_suffix(".json")
        card = read_card(beside, trust=trust) if beside.is_file() and _is_card(beside) else Card()
        return card.model_copy(update={"checkpoint": str(path)})
    raise InputError(f"{path} is of no known kind; expected {KINDS}.")


def _described(
    entry: Mapping[str, Any], given: str | Mapping[str, Any], target: TargetTask, collection: str | None, trust: bool
) -> Source:
    """The source of a mapping: a task, or keys of a card, which win over those of a card in a file."""
    keys = {key: value for key, value in entry.items() if value is not None}
    task, base = keys.pop("task", None), Card()
    kind = "checkpoint" if "checkpoint" in keys else "task"
    if "card" in keys:
        path = Path(keys.pop("card"))
        kind, base = _kind(path) or "card", card_at(path, trust)
    size = left_out = None
    if task is not None:
        known = target.other(task, collection=collection)
        tags = {tag: getattr(known, tag) for tag in target.tags}
        keys = {"classes": known.n_classes} | tags | keys
        size = known.size if "train" in known.splits else None
        if target.per_pixel and known.n_channels != target.n_channels:
            left_out = f"it is for {known.modality}, but the target's images are {target.modality}"
    over = read_card(keys, trust=trust)
    laid = {"name": base.name or over.name} | {key: getattr(over, key) for key in keys}
    card = base.model_copy(update=laid | {"trusted": trust})
    if card.network is not None:
        network = _filled(card.network, card.n_classes or target.n_classes, target.n_channels)
        card = card.model_copy(update={"network": network})
    name = keys.get("name") or dataset_name(task or card.name or "")
    source = Source(str(name), kind, card, given, task, size, left_out=left_out)
    return source if task is not None and card.checkpoint is None else _fitting(source, target)


def _fitting(source: Source, target: TargetTask) -> Source:
    """The source, left out with the reason if its network cannot be built or refuses weights or images."""
    if not source.card.foreign:
        return source
    try:
        transforms_of(source.card.preprocessing or ())
        network = source.build({}, target, ())
        if target.flat and network.dimensions == 3:
            raise InputError("its network is 3D, but the target's images are 2D")
    except InputError as error:
        return replace(source, left_out=str(error).removeprefix(f"source {source.name}: ").rstrip("."))
    found = {"dimensions": network.dimensions, "classes": source.card.classes or network.n_classes}
    return replace(source, card=source.card.model_copy(update=found))


def pretraining_job(config: Mapping[str, Any], folder: str | Path, source: Source, *, seed: int) -> Job:
    """The run of ``pretrain.json`` on a source's data; its folder's name has a hash of all settings that matter.

    The hash includes the content of the task's files, but not their place. So other patients, splits or files of the
    task give another folder; patients of other institutions do not.

    Raises:
        InputError: the collection is missing or breaks the format.
    """
    overlay, collection = Path(config["bundle_root"]) / "configs" / "pretrain.json", source_collection(config)
    overrides: dict[str, Any] = dict(config.get("pretraining", {}))  # these win over pretrain.json
    overrides |= {"source": source.task, "target_task": source.task, "seed": seed, "collection": collection}
    also = {"source_collection": collection, "check_data": True, "trust_sources": False, "clean": None}
    overrides |= {name: value for name, value in also.items() if name in config}
    if isinstance(source.entry, Mapping) and source.entry.get("network"):
        overrides["network_def"] = dict(source.entry["network"])
    known = None if collection is None else load_collection(collection)
    merged = {**config, **json.loads(overlay.read_text(encoding="utf-8")), **overrides}
    without = ("weight_map", "recipe", "leep", "grid", "splits", "collection", "source_collection")
    key = identity(merged, without=without)
    data = [_content(name, known) for name in source.task.split(POOLED)]
    key["data"] = data[0] if len(data) == 1 else data
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return Job(config, Path(folder) / f"{source.name}_{digest}", overlays=[overlay], overrides=overrides)


def _content(task: str, known: Collection | None) -> str | None:
    """A hash of a task's data: of a dataset's files, or of the task in a collection."""
    if Path(task).exists():
        return content_of(Path(task))
    if known is None:
        return None
    segmented = Task(task).objective in known.objectives  # otherwise images to classify are cut from the collection
    return known.fingerprint_of(task) if segmented else known.fingerprint


def source_collection(config: Mapping[str, Any]) -> str | None:
    """The collection file of a bundle's sources; None: the phantom."""
    named = config.get("source_collection", "@collection")
    return config.get("collection") if named == "@collection" else named


def train_sources(
    sources: Sequence[Source], run: Run, target: TargetTask, *, folder: str, seed: int, check: bool = True
) -> list[Source]:
    """Train the networks of all sources that have no checkpoint yet.

    Each training is a run of ``pretrain.json`` in its own folder, several at a time; an interrupted pool is continued.

    Args:
        sources: from `find_sources`.
        run: gives the config of the trainings.
        target: a task of the same kind (segmentation or classification).
        folder, seed: folder of the pool, and seed of its trainings.
        check: read every file before a training starts.

    Returns:
        The sources, with checkpoints if they can be used.
    """
    jobs = {
        source.name: pretraining_job(run.config, folder, source, seed=seed)
        for source in sources
        if source.card.checkpoint is None and source.left_out is None
    }
    if not all(job.done for job in jobs.values()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".pool.lock"):  # other processes wait, and then find the pool done
            for job in jobs.values():
                if check and not job.done:
                    task = target.other(job.overrides["source"], collection=source_collection(run.config))
                    task.check({"train", run.config.get("val_split", "val"), "test"})
            run.train(list(jobs.values()), "pre-training")
    return [
        replace(one, card=one.card.model_copy(update={"checkpoint": job.model}), job=job)
        if (job := jobs.get(one.name))
        else one
        for one in sources
    ]


def keys_of(target: TargetTask) -> tuple[str, ...]:
    """The keys of an item that are transformed: for classification only the image."""
    return ("image", "label") if target.per_pixel else ("image",)


def source_transforms(
    card: Card, channels: Sequence[str], own: Sequence[Callable], *, keys: Sequence[str] = ("image", "label")
) -> list[Callable]:
    """The deterministic transforms for a source that brings its own network, applied to a target's files.

    The bundle's transforms load the files and choose the labels. Channels are put into the order of the source; other
    channels come last. Then come the transforms of the card, or of the bundle if the card has none.

    Args:
        card: of the source.
        channels: names of the target's channels.
        own: the bundle's transforms.
        keys: keys to transform: of the image, and perhaps of the label.
    """
    loading = [transform for transform in own if isinstance(transform, LOADING)]
    steps = [transform for transform in own if transform not in loading]
    wanted, others = channel_order(card.channels, channels, fill=card.fill)
    order = [*wanted, *others]
    pick = [] if order == list(range(len(channels))) else [PickChannelsd("image", order)]
    if card.preprocessing is not None:
        steps = transforms_of(card.preprocessing, keys=keys)
    pad = [SpatialPadd(keys, [*card.window, -1][:3])] if card.window else []
    return [*loading, *pick, *steps, *pad]


@dataclass(kw_only=True, eq=False)
class Checkpoint:
    """A network for inference: the one of a card beside the weights, or the bundle's own.

    Args:
        path: the weights; ``NAME.json`` beside ``NAME.pt`` is their card, which a fine-tuning writes.
        channels: names of the images' channels.
        trust: allow its code to run.
    """

    path: str
    channels: Sequence[str]
    trust: bool = False

    def grid(self, **given: Any) -> Grid:
        """The grid of the training, from ``grid.json`` beside the weights; ``given`` values win, see `read_grid`."""
        if not Path(self.path).is_file() or (self.card is not None and self.card.preprocessing is not None):
            return Grid((2.0, 2.0, 4.0), (96, 96))  # not used: the card has its own, or loading will report the path
        return read_grid(Path(self.path).with_name("grid.json"), **given)

    @cached_property
    def card(self) -> Card | None:
        card = card_at(Path(self.path), self.trust)
        return card if card.foreign else None

    def network(self, own: nn.Module) -> nn.Module:
        """The network with its weights: the bundle's ``own``, or the one of the card."""
        if self.card is not None:
            wanted, _ = channel_order(self.card.channels, self.channels, fill=self.card.fill)
            return untouched(self.card, channels=len(wanted))
        own = holding(own, self.path)
        load_weights(own, self.path, min_share=1.0)
        return own

    def preprocessing(self, own: Sequence[Callable]) -> list[Callable]:
        """The transforms of an image: the bundle's ``own``, or the card's."""
        return list(own) if self.card is None else source_transforms(self.card, self.channels, own, keys=("image",))

    def inferer(self, own: Any) -> Any:
        """The bundle's ``own``; the network of a card does its own sliding windows."""
        return own if self.card is None else SimpleInferer()


@dataclass(kw_only=True, eq=False)
class CheckChannels:
    """A step that warns if a foreign network's channels seem to be in another order than its card says.

    Args:
        origin: the source.
        training: the target's training set.
    """

    origin: "SingleSource"
    training: SliceDataset

    def run(self) -> None:
        if self.origin.card is not None:
            items = self.training.plain()
            told = [place for place, item in enumerate(items) if item["label"].any()]  # slices with foreground
            warn_of_other_order(self.origin.untouched(()), [items[place] for place in {*told[:1], *told[-1:]}])


@dataclass(kw_only=True, eq=False)
class SingleSource:
    """The source of a fine-tuning (option ``source``), and everything that a config takes from it.

    The network of a task is trained here once, when its weights are needed. A source that brings its own network also
    brings its own preprocessing, so it is scored and fine-tuned on its own grid.

    Args:
        here, target: see `train_sources`.
        folder, check: see `train_sources`; without a folder nothing is trained here, so weights must be given.
        trust: see `find_sources`.
    """

    here: Run
    target: TargetTask
    folder: str | None = None
    check: bool = True
    trust: bool = False

    @cached_property
    def given(self) -> Source | None:
        """The source that the option names; None if it is not given."""
        entry = self.here.config.get("source")
        if entry is None:
            return None
        where = {"collection": source_collection(self.here.config), "trust": self.trust, "mark_own": False}
        try:
            found = find_sources([entry], self.target, **where)
        except InputError as error:  # who gave none has to learn that there is a default
            raise error if str(entry) in str(error) else InputError(f"--source {entry}: {error}") from error
        if len(found) > 1:
            raise InputError(f"--source {entry} holds {len(found)} sources; give the path of one.")
        if found[0].left_out and found[0].kind != "task":
            raise found[0].refusal()
        return found[0]

    @property
    def _known(self) -> Card:
        """What is known about its network without opening a task, which a training from scratch does not need."""
        entry = self.here.config.get("source")
        unknown = entry is None or (isinstance(entry, str) and _kind(Path(entry)) is None)
        return Card() if unknown else self.given.card

    @property
    def card(self) -> Card | None:
        """The card of a source that brings its own network; None for the bundle's own network."""
        return self._known if self._known.foreign else None

    @cached_property
    def source(self) -> Source:
        """The source with its weights, which are trained now if there are none."""
        if self.given is None or (self.given.card.checkpoint is None and self.folder is None):
            raise InputError("--source is not given or has no weights, but this config needs them; give a source.")
        (trained,) = train_sources([self.given], self.here, self.target, folder=self.folder, seed=0, check=self.check)
        if trained.left_out:
            raise trained.refusal()
        return trained

    # What a config needs

    @property
    def checkpoint(self) -> str | None:
        """Weights of the bundle's own network, if the option gives them."""
        return None if self._known.foreign else self._known.checkpoint

    @property
    def weights(self) -> str | dict[str, torch.Tensor]:
        """The start of a fine-tuning: a file, or the tensors of a foreign network that is adapted to the target."""
        return self.source.card.checkpoint if self.card is None else self._adapted().state_dict()

    def architecture(self, own: nn.Module) -> nn.Module:
        """The network to train, without the source's weights: the bundle's ``own``, or the source's."""
        return own if self.card is None else self._adapted(fresh=not self.card.is_program)

    def _adapted(self, *, fresh: bool = False) -> SourceNetwork:
        wanted, others = self.given.channels(self.target)
        names = [*(self.card.channels or self.target.channels), *(self.target.channels[place] for place in others)]
        how = {"wanted": len(wanted), "channels": names, "fresh": fresh}
        return adapted(self.card, self.target.answers, per_pixel=self.target.per_pixel, **how)

    def untouched(self, image_shape: Sequence[int]) -> nn.Module:
        """The unchanged network with its own classes; see `Source.build`."""
        return self.source.build(self.here.config["network_def"], self.target, image_shape)

    @cached_property
    def unasked(self) -> str | None:
        """Why the untouched source cannot segment the target's classes; None: it can."""
        if self.card is not None:
            return None if meaning(self.card, self.target.answers) else "it does not know the target's classes"
        if self.given is None:
            return None
        same = self.given.own_classes(self.here.config["network_def"], self.target) == self.target.n_classes
        return None if same else "source and target have different numbers of classes"

    def answering(self, image_shape: Sequence[int]) -> nn.Module:
        """The untouched network, which gives the target's classes.

        Raises:
            InputError: it does not know these classes.
        """
        if self.card is None:
            if self.unasked:
                raise InputError(f"source {self.source.name}: {self.unasked}.")
            return self.untouched(image_shape)
        return answering(self.card, self.target.answers, channels=len(self.given.channels(self.target)[0]))

    def preprocessing(self, own: Sequence[Callable]) -> list[Callable]:
        """The deterministic transforms: the bundle's ``own``, or the source's."""
        if self.card is None:
            return list(own)
        return source_transforms(self.card, self.target.channels, own, keys=keys_of(self.target))

    @cached_property
    def task(self) -> TargetTask:
        """The task that it was trained on, for a training that goes on with its images.

        Raises:
            InputError: it is none, or asks for another number of classes.
        """
        name = None if self.given is None else self.given.task
        if name is None:
            raise InputError("joint trains on the source's images too; give --source a task, or a card with its task.")
        task = self.target.other(name, collection=source_collection(self.here.config))
        if task.n_classes != self.target.n_classes:
            asked = f"{name} has {task.n_classes} classes, the target {self.target.n_classes}"
            raise InputError(f"joint trains one head on both tasks: {asked}; take a source of the target's objective.")
        return task

    def relabelled(self, steps: Sequence[Callable]) -> list[Callable]:
        """Transforms of the target's images as those of the source's task."""
        own = SelectLabelsd("label", self.task.label_values)
        return [own if isinstance(step, SelectLabelsd) else step for step in steps]

    def cropping(self, own: Sequence[Callable] = ()) -> list[Callable]:
        """Cropping for a training: the bundle's ``own``, or a random patch of the size of the source's window."""
        if self.card is None or self.card.window is None:
            return [] if self.card else list(own)
        keys = ["image", "label", "weight"]
        return [RandSpatialCropd(keys, roi_size=self.card.window, random_size=False, allow_missing_keys=True)]

    def slices(self, own: str) -> str:
        """The option ``slices`` of `medtl_ext.data.SliceDataset`."""
        if self.card is None:
            return own
        first = self.card.axes[0] if self.card.axes and len(self.card.axes) == 3 else 2
        if self.card.dimensions == 2 and first != 2 and not self.target.flat:
            problem = f"takes slices along axis {first} of the image; a training here can only use the last axis, 2"
            raise InputError(f"source {self.card.name} {problem}.")
        return "volume" if self.card.dimensions == 3 else "foreground"

    def inferer(self, own: Any) -> Any:
        """The inferer of a validation: a foreign network does its own sliding windows."""
        return own if self.card is None else SimpleInferer()

    def batch(self, own: int, *, training: bool = False) -> int:
        """The batch size: in training at most that of the card; for whole images 1."""
        if self.card is None:
            return own
        return min(own, self.card.batch_size or own) if training else 1

    def frozen(self, pattern: str | Callable[[nn.Module], str] | None) -> str | Callable[[nn.Module], str] | None:
        """The pattern of parameters to freeze, if the method freezes any: the encoder that the card names."""
        if self.card is None or not isinstance(pattern, str):
            return pattern
        return self.card.encoder and f"net\\.(?:{self.card.encoder})"
