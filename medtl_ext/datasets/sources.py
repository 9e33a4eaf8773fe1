"""Datasets by name or path, candidate sources, and the pool of networks that are trained on them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from filelock import FileLock
from torch import nn

from medtl_ext._validation import InputError, require_choice
from medtl_ext.bundle import Job, current_config, deciding_parts, run_jobs, settings_of
from medtl_ext.data import load_collection
from medtl_ext.data.classification import SUFFIXES, ClassificationDataset, load_classification, read_image
from medtl_ext.networks import load_weights, read_weights
from medtl_ext.selection.candidates import built, require_source_names

logger = logging.getLogger(__name__)

PHANTOM_SUBJECTS = 24
SOURCE_KEYS = ("name", "data", "checkpoint", "network", "n_classes", "convolutions")
CHANNEL_KEYS = ("n_input_channels", "in_channels")


def dataset_path(where: str, *, collection: str | None = None, subjects: int = PHANTOM_SUBJECTS) -> Path:
    """Where a dataset lies: an ``.npz`` or ``.json`` file, a folder, or the file of a phantom task, made if need be.

    Raises:
        InputError: neither a file nor a folder that exists nor a task.
    """
    path = Path(where)
    if path.suffix in (".npz", ".json") or path.is_dir():
        return path
    if path.suffix or "/" in where or "\\" in where:
        raise InputError(f"dataset {where} is no .npz file, no folder of images, and no task such as 17-T1-tumour.")
    from medtl_ext.data.phantom.classification import phantom_classification  # brings nilearn

    return phantom_classification(where, collection=collection, subjects=subjects)


def open_dataset(
    where: str, *, collection: str | None = None, subjects: int = PHANTOM_SUBJECTS, image_size: int | None = None
) -> ClassificationDataset:
    """A classification dataset by its name or path.

    Args:
        where: a MedMNIST file (``.npz``, or the ``.json`` that describes one), a folder of images, or a phantom task
            such as ``17-T1-tumour``.
        collection, subjects: see `medtl_ext.data.phantom.classification.phantom_classification`.
        image_size: what images of a folder are brought to.
    """
    path = dataset_path(where, collection=collection, subjects=subjects)
    dataset = load_classification(path, size=image_size)
    return dataset if path.is_dir() else replace(dataset, name=dataset_name(where))


def dataset_name(where: str) -> str:
    """What tables call it: the task, or the name of the file or folder."""
    path = Path(where)
    return path.stem if path.suffix in (".npz", ".json") else path.name


@dataclass(frozen=True)
class Source:
    """A network that may be transferred from.

    Attributes:
        name: what tables call it.
        data: the dataset it was trained on or will be, as `open_dataset` takes it; None where that is not known.
        network: a MONAI definition (``_target_`` and plain arguments); None: the bundle's own.
        checkpoint: its weights; None until the pool is trained.
        n_classes: of its head.
        images: how many it was trained on, None where that is not known.
        convolutions: names of the two convolutions that FU compares; None finds the first two.
        own: it was trained on the target itself, so it is scored but never ranked.
        job: folder of its training, None where it was not trained here.
    """

    name: str
    data: str | None = None
    network: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    n_classes: int = 2
    images: int | None = None
    convolutions: tuple[str, str] | None = None
    own: bool = False
    job: Path | None = None

    def build(self, network_def: Mapping[str, Any], *, in_channels: int, image_size: int) -> nn.Module:
        """The network with its weights, in eval mode.

        Args:
            network_def: the bundle's own definition, for sources that name none.
            in_channels, image_size: of the target's images, which it must take.

        Raises:
            InputError: it cannot be built, the weights are not its own, or it does not take such images.
        """
        definition = _filled(self.network or network_def, n_classes=self.n_classes, in_channels=in_channels)
        channels = next((definition[key] for key in CHANNEL_KEYS if key in definition), in_channels)
        if channels != in_channels:
            hint = " give --in_channels 3, which repeats grey images." if channels == 3 else " it cannot be a source."
            raise InputError(
                f"source {self.name}: its network takes {channels} channel(s), the images have {in_channels};{hint}"
            )
        try:
            network = built(definition)
            weights = read_weights(self.checkpoint)
            shape = next((value.shape for value in weights.values() if value.ndim == 4), None)
            if shape is not None and in_channels == 1 and shape[1] == 3:
                raise InputError(
                    "its weights take 3 channels, the images have 1; give --in_channels 3, which repeats grey images."
                )
            load_weights(network, self.checkpoint, min_share=1.0)
        except InputError as error:
            raise InputError(f"source {self.name}: {error}") from error
        try:
            with torch.no_grad():
                output = network.eval()(torch.zeros(1, in_channels, image_size, image_size))
        except Exception as error:  # whatever a network raises on images it was not made for
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"source {self.name}: its network refuses the target's images ({reason}).") from error
        if not isinstance(output, torch.Tensor) or output.shape != (1, self.n_classes):
            raise InputError(f"source {self.name}: its network does not give {self.n_classes} class scores an image.")
        return network


def _filled(definition: Mapping[str, Any], *, n_classes: int, in_channels: int) -> dict[str, Any]:
    """The definition with the two references that belong to it filled in."""
    known = {"@n_classes": n_classes, "@in_channels": in_channels}
    return {key: known.get(value, value) if isinstance(value, str) else value for key, value in definition.items()}


def find_sources(
    sources: Sequence[str | Mapping[str, Any]],
    *,
    target: str,
    collection: str | None = None,
    subjects: int = PHANTOM_SUBJECTS,
    image_size: int | None = None,
) -> list[Source]:
    """The candidates that a list of sources means.

    Args:
        sources: each a dataset as `open_dataset` takes it; or a mapping with ``name`` and ``data`` (train on it) or
            ``checkpoint`` (already trained; then ``n_classes`` unless ``data`` is known), and, as needed, ``network``
            (a MONAI definition, ``"@n_classes"`` for the size of its head) and ``convolutions``.
        target: the target dataset; a source of the same data is its own model.
        collection, subjects, image_size: see `open_dataset`.

    Raises:
        InputError: no source, two of one name, an entry of no known form, or data that cannot be read.
    """
    if not sources or isinstance(sources, str):
        raise InputError(f"sources is {sources!r}; give a list with at least one dataset or checkpoint.")
    found = [_source(entry, target, collection, subjects, image_size) for entry in sources]
    names = [source.name for source in found]
    require_source_names(names)
    if all(source.own for source in found):
        raise InputError(f"no source is left: {', '.join(names)} is the target's own model, which is never ranked.")
    return found


def source_name(entry: str | Mapping[str, Any]) -> str:
    """What tables call an entry of ``sources``."""
    if isinstance(entry, str):
        return dataset_name(entry)
    data = entry.get("data")
    return str(entry.get("name") or (dataset_name(data) if data else Path(entry["checkpoint"]).stem))


def is_same_data(first: str, second: str, *, collection: str | None = None, subjects: int = PHANTOM_SUBJECTS) -> bool:
    """Whether two names or paths mean the same images, if only by another path, a copy or a description."""
    if not first or not second or first == second:
        return first == second
    if not all(Path(where).exists() for where in (first, second)):
        return False  # a phantom task has one name
    return _content(Path(first)) == _content(Path(second))


def _content(path: Path) -> str:
    """A hash of a dataset's images and labels: of the file, of the one that a description names, of all in a folder."""
    if path.suffix == ".json":
        try:
            path = path.parent / str(json.loads(path.read_text(encoding="utf-8"))["medmnist"])
        except (OSError, ValueError, KeyError, TypeError):
            return str(path.resolve())  # what is wrong with it is said when it is read
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.glob("**/*")):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            digest.update(str(file.relative_to(path)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _source(
    entry: str | Mapping[str, Any], target: str, collection: str | None, subjects: int, image_size: int | None
) -> Source:
    entry = {"data": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not ("data" in entry or "checkpoint" in entry):
        raise InputError(f'source {entry} is neither a dataset nor {{"name": ..., "checkpoint": FILE}}.')
    for key in entry:
        require_choice(f"source {entry.get('name', entry)}: key", key, SOURCE_KEYS)
    data, checkpoint = entry.get("data"), entry.get("checkpoint")
    convolutions = entry.get("convolutions")
    _require_kinds(entry)
    source = Source(
        name=source_name(entry),
        data=data,
        network=entry.get("network"),
        checkpoint=checkpoint,
        n_classes=int(entry.get("n_classes", 2)),
        convolutions=tuple(convolutions) if convolutions else None,
        own=data is not None and is_same_data(data, target, collection=collection, subjects=subjects),
    )
    if data is None:
        return source
    dataset = open_dataset(data, collection=collection, subjects=subjects, image_size=image_size)
    n_classes = source.n_classes if "n_classes" in entry else dataset.n_classes
    return replace(source, n_classes=n_classes, images=sum(dataset.counts("train")))


def _require_kinds(entry: Mapping[str, Any]) -> None:
    """Refuse values of a source that are of another kind than the field holds."""
    kinds = {"name": str, "data": str, "checkpoint": str, "network": Mapping, "n_classes": int}
    words = {str: "text", Mapping: "a definition with _target_", int: "a whole number"}
    for key, kind in kinds.items():
        if entry.get(key) is not None and not isinstance(entry[key], kind):
            raise InputError(f"source {entry.get('name', entry)}: {key} is {entry[key]!r}; expected {words[kind]}.")
    names = entry.get("convolutions")
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise InputError(f"source {entry.get('name', entry)}: convolutions is {names!r}; expected a list of two names.")


def train_pool(sources: Sequence[Source], *, folder: str, seed: int, n_jobs: int | None = None) -> list[Source]:
    """Train the networks of the sources that have no checkpoint yet, and keep them.

    Each is a run of ``pretrain.json`` in a folder of its own, several at a time; an interrupted pool is continued.

    Returns:
        The sources, all with a checkpoint.
    """
    config = current_config()
    jobs = {
        source.name: pretraining_job(config, folder, source, seed=seed)
        for source in sources
        if source.checkpoint is None
    }
    if not all(job.done for job in jobs.values()) and idist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".pool.lock"):  # other processes find the pool done
            run_jobs(list(jobs.values()), n_jobs=n_jobs, description="pre-training the pool")
    idist.barrier()
    return [
        replace(source, checkpoint=str(jobs[source.name].output_dir / "model.pt"), job=jobs[source.name].output_dir)
        if source.name in jobs
        else source
        for source in sources
    ]


def pretraining_job(config: Mapping[str, Any], folder: str | Path, source: Source, *, seed: int) -> Job:
    """The run of ``pretrain.json`` on a source's data; its folder's name holds a hash of all settings that matter.

    Of a collection or of files it holds the content, wherever they lie.
    """
    overlay = Path(config["bundle_root"]) / "configs" / "pretrain.json"
    overrides: dict[str, Any] = {"source_task": source.data, "target_task": source.data, "seed": seed}
    if source.network:
        overrides["network_def"] = dict(source.network)
    merged = {**config, **json.loads(overlay.read_text()), **overrides}
    path = Path(source.data)
    content = _content(path) if path.exists() else None
    settings = settings_of(merged)
    if settings.get("collection") is not None:
        settings["collection"] = load_collection(settings["collection"]).fingerprint
    key = json.dumps([settings, deciding_parts(merged), content], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return Job(config, Path(folder) / f"{source.name}_{digest}", overlays=[overlay], overrides=overrides)


def initialized(network: nn.Module, weights: str | None) -> nn.Module:
    """The network with a source's weights in all but its head, which stays fresh: the target has classes of its own.

    Args:
        network: changed in place; its head is its last linear or convolution layer.
        weights: a checkpoint, or None to train from scratch.

    Raises:
        InputError: fewer than nine in ten of the other tensors fit.
    """
    if weights is None:
        return network
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    head = [name for name, module in network.named_modules() if isinstance(module, kinds)][-1]
    body = {name: value for name, value in read_weights(weights).items() if not name.startswith(f"{head}.")}
    load_weights(network, body)
    return network


def images_to_classify(
    input_dir: str | None, task: str, *, in_channels: int, image_size: int, subjects: int = PHANTOM_SUBJECTS
) -> list[dict[str, Any]]:
    """The images of a folder, of a MedMNIST file's test split, or (None) the phantom's test images of ``task``.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if input_dir is None or str(input_dir).endswith(".npz"):
        dataset = open_dataset(input_dir or task, subjects=subjects)
        return dataset.datalist("test", channels=in_channels)
    files = sorted(path for path in Path(input_dir).glob("**/*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"no image ({', '.join(SUFFIXES)}) in {input_dir}; give their folder with --input_dir.")
    items = []
    for file in files:
        image = read_image(file, image_size)
        channels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        if len(channels) > in_channels:
            raise InputError(f"{file} is RGB, the network takes grey images; convert it first.")
        name = str(file.relative_to(input_dir))
        items.append({"image": channels.repeat(in_channels // len(channels), axis=0), "name": name})
    return items
