"""Classification tasks from slices of the phantom: what is in this slice, where is it, how was it scanned?

A task is called *institution-modality-objective*, as for segmentation. It is written once, as a MedMNIST file that also
names the patients, and read back like any real file.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from medtl_ext._io import atomic_path, cache_root
from medtl_ext._validation import InputError, require_choice, whole_labels
from medtl_ext.data.collection import SPLITS, Collection, Task, load_collection
from medtl_ext.data.files import read_channels
from medtl_ext.data.phantom.generate import cached_phantom
from medtl_ext.data.phantom.scanner import MODALITIES

VERSION = 2  # raise it when the same task gives other images or patients, so that no old file is read
ALL = "ALL"  # the modality of a task that asks for the modality
# Slices with fewer pixels of the class, or of brain, are hard to judge and left out.
LEAST_PIXELS = 20
LEAST_BRAIN = 400
# A lesion load of more pixels (4 square millimetres each) is large.
LARGE_LOAD = 300


class Objective(NamedTuple):
    """What to ask of a slice: a label file (None: none is needed), the class names, and a function.

    ``classes_of`` takes a label and an image, X x Y x Z, and gives the class of each slice; -1 leaves the slice out.
    """

    label: str | None
    class_names: tuple[str, ...]
    classes_of: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _amount(label: np.ndarray, image: np.ndarray, *, values: tuple[int, ...] = (), large: float = np.inf) -> np.ndarray:
    """0: the slice has none of the ``values`` (default: of any foreground); 1: some; 2: a large area."""
    pixels = (np.isin(label, values) if values else label > 0).sum((0, 1))
    return np.select([pixels == 0, pixels < LEAST_PIXELS, pixels <= large], [0, -1, 1], 2)


def _level(label: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Quarters of the brain's height."""
    brain = np.flatnonzero((image != 0).sum((0, 1)) >= LEAST_BRAIN)
    height = (np.arange(image.shape[-1]) - brain[0]) / (brain[-1] - brain[0] + 1)
    return np.clip((4 * height).astype(int), 0, 3)


OBJECTIVES = {
    "tumour": Objective("tumour", ("no tumour", "tumour"), partial(_amount, values=(1, 2, 3))),
    "enhancing": Objective("tumour", ("not enhancing", "enhancing"), partial(_amount, values=(2,))),
    "load": Objective("tumour", ("no tumour", "small", "large"), partial(_amount, large=LARGE_LOAD)),
    "WMH": Objective("wmh", ("no WMH", "WMH"), partial(_amount, values=(1,))),
    "level": Objective(None, ("cerebellum", "base", "ventricles", "vertex"), _level),
    "modality": Objective(None, MODALITIES, lambda label, image: np.zeros(image.shape[-1], int)),
}


def phantom_classification(task: str, *, collection: str | os.PathLike[str] | None = None, subjects: int = 24) -> Path:
    """The ``.npz`` file of a classification task, which is made on first use and kept in the phantom's cache.

    ============= ============================================== ========================================
    objective     question                                       institutions
    ============= ============================================== ========================================
    ``tumour``    is there tumour in this slice?                 01, 04, 06, 13, 14, 17, 18, 20
    ``enhancing`` is there enhancing tumour?                     the same
    ``load``      no tumour, a small or a large area of it?      the same
    ``WMH``       are there white-matter hyperintensities?       S, U, and those with a tumour
    ``level``     which quarter of the brain's height is it?     all
    ``modality``  which modality is it? (``17-ALL-modality``)    all
    ============= ============================================== ========================================

    Three modalities become a colour image (``17-T1+T2+FLAIR-tumour``, with ``--in_channels 3``). The slices are axial,
    96 x 96 pixels of 2 mm, uint8 (scaled to the range of each volume). Slices with hardly any brain, or with fewer than
    20 pixels of the class, are left out. All slices of a patient are in one split.

    Args:
        task: such as ``17-T1-tumour``.
        collection: a collection file with these modalities and the label file ``tumour`` or ``wmh``; None: the phantom.
        subjects: number of phantoms of the institution, if no collection is given.

    Raises:
        InputError: an unknown task, or no subject with the images and labels it needs.
    """
    parts = Task(task)
    objective = OBJECTIVES[require_choice("objective", parts.objective, OBJECTIVES)]
    if (parts.modality == ALL) != (parts.objective == "modality"):
        raise InputError(f"task {task}: the modality is {ALL} for the objective 'modality', and only then.")
    path = collection or cached_phantom(institutions=[parts.institution], subjects=subjects, seed=0)
    found = load_collection(path)
    folder = cache_root() / "classification"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task}_{found.fingerprint}_{VERSION}.npz"
    with FileLock(folder / f"{file.stem}.lock"):
        if not file.is_file():
            _write(file, found, parts, objective)
    return file


def _write(file: Path, collection: Collection, task: Task, objective: Objective) -> None:
    require_choice("institution", task.institution, collection.institutions)
    channels = MODALITIES if task.modality == ALL else task.channels
    looks = [(one,) for one in MODALITIES] if task.modality == ALL else [channels]
    for channel in channels:
        require_choice("modality", channel, MODALITIES)
    if len(looks[0]) not in (1, 3):
        raise InputError(f"{task} has {len(channels)} channels; give one modality, or three that become colours.")
    needed = {objective.label} - {None}
    held: dict[str, list[np.ndarray]] = defaultdict(list)
    for subject in collection.subjects:
        files = subject.channels()
        there = files.keys() >= set(channels) and subject.labels.keys() >= needed
        if subject.institution != task.institution or not there:
            continue
        label = np.zeros(1)
        if needed:
            label, _ = whole_labels(read_channels([str(subject.labels[objective.label])])[0][0])
        for place, look in enumerate(looks):
            images, _ = read_channels([files[channel] for channel in look])
            classes = objective.classes_of(label, images[0])
            usable = (classes >= 0) & ((images[0] != 0).sum((0, 1)) >= LEAST_BRAIN)
            if task.modality == ALL:  # each slice in one modality only, so that anatomy does not give the answer
                usable &= np.arange(len(classes)) % len(looks) == place
                classes = np.full(len(classes), place)
            slices = np.stack([_slices(image)[usable] for image in images], -1)
            held[f"{subject.split}_images"].append(slices[..., 0] if len(look) == 1 else slices)
            held[f"{subject.split}_labels"].append(classes[usable])
            held[f"{subject.split}_subjects"].append(np.full(usable.sum(), subject.group))
    if missing := [split for split in SPLITS if f"{split}_labels" not in held]:
        asked = " and ".join([*channels, *needed])
        raise InputError(f"task {task} has no subject in split '{missing[0]}' with {asked}; choose another task.")
    arrays = {key: np.concatenate(parts) for key, parts in held.items()}
    arrays |= {"class_names": np.array(objective.class_names), "synthetic": np.array(collection.synthetic)}
    with atomic_path(file) as temporary:
        np.savez_compressed(temporary, **arrays)


def _slices(image: np.ndarray) -> np.ndarray:
    """Z x Y x X in 256 grey levels, turned as a radiologist sees a slice: the front is up."""
    inside = image[image != 0]
    low, high = np.percentile(inside, [0.5, 99.5]) if len(inside) else (0, 1)
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 254 + 1
    grey = np.where(image != 0, grey, 0).astype(np.uint8)
    return np.flip(grey.T, axis=1)
