"""A collection is one JSON file beside the images; a task is a question asked of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from medtl_ext._io import write_json
from medtl_ext._validation import InputError, require_choice

__all__ = ["SPLITS", "Collection", "Objective", "Subject", "Task", "load_collection", "write_collection"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, order=True)
class Task:
    """The question "find this objective, on this modality, at this institution", written ``13-T1-ED``.

    The name is read from the right, so an institution may contain hyphens; a modality or an objective may not.

    Raises:
        InputError: the name does not have three parts.

    >>> task = Task("St-Olav-T1-ED")
    >>> task.institution, task.modality, task.objective
    ('St-Olav', 'T1', 'ED')
    >>> Task.of("13", "FLAIR", "WMH") == Task("13-FLAIR-WMH")
    True
    """

    name: str

    def __post_init__(self) -> None:
        parts = self.name.rsplit("-", 2) if isinstance(self.name, str) else []
        if len(parts) != 3 or not all(parts):
            raise InputError(f"task {self.name!r} is not of the form institution-modality-objective, such as 13-T1-ED.")

    @classmethod
    def of(cls, institution: str, modality: str, objective: str) -> Task:
        """Build the task from its parts."""
        task = cls(f"{institution}-{modality}-{objective}")
        if (task.modality, task.objective) != (modality, objective):
            raise InputError(f"modality {modality!r} and objective {objective!r} must not contain '-'; rename them.")
        return task

    @property
    def institution(self) -> str:
        return self.name.rsplit("-", 2)[0]

    @property
    def modality(self) -> str:
        return self.name.rsplit("-", 2)[1]

    @property
    def objective(self) -> str:
        return self.name.rsplit("-", 2)[2]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Subject:
    """One scan of a patient: where the images (by modality) and label files (by name) are.

    ``patient`` is who it is of, where the collection says so; otherwise every subject is a patient.
    """

    id: str
    institution: str
    split: str
    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    patient: str | None = None


@dataclass(frozen=True)
class Objective:
    """What to segment: a label file, and for every foreground class its name and its values in that file."""

    label: str
    class_names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collection:
    """Subjects with images and labels, and the objectives that can be asked of them; made by `load_collection`.

    ``labels`` maps each label file's name to its declared values, as ``{"tumour": {"ED": 1, "ET": 2}}``.
    """

    path: Path
    name: str
    description: str
    license: str
    synthetic: bool
    labels: Mapping[str, Mapping[str, int]]
    objectives: Mapping[str, Objective]
    subjects: tuple[Subject, ...]

    @property
    def institutions(self) -> list[str]:
        return list(dict.fromkeys(subject.institution for subject in self.subjects))

    @property
    def modalities(self) -> list[str]:
        return list(dict.fromkeys(modality for subject in self.subjects for modality in subject.images))

    @cached_property
    def fingerprint(self) -> str:
        """Twelve characters that change with the file's content or with the size of any image or label."""
        files = (file for subject in self.subjects for file in (*subject.images.values(), *subject.labels.values()))
        sizes = [file.stat().st_size if file.is_file() else None for file in files]
        return hashlib.sha256(self.path.read_bytes() + json.dumps(sizes).encode()).hexdigest()[:12]

    def tasks(self) -> list[Task]:
        """Every task that at least one subject has both the image and the label file for."""
        return [
            Task.of(institution, modality, objective)
            for institution in self.institutions
            for modality in self.modalities
            for objective in self.objectives
            if self.subjects_of(Task.of(institution, modality, objective))
        ]

    def subjects_of(self, task: Task | str) -> list[Subject]:
        """The subjects of the task's institution that have its modality and its label file, in all splits.

        Raises:
            InputError: the collection does not know the institution, the modality or the objective.
        """
        task = Task(str(task))
        require_choice("institution", task.institution, self.institutions)
        require_choice("modality", task.modality, self.modalities)
        label = self._objective(task).label
        return [
            subject
            for subject in self.subjects
            if (subject.institution == task.institution and task.modality in subject.images and label in subject.labels)
        ]

    def datalist(self, task: Task | str, split: str) -> list[dict[str, str]]:
        """The task's subjects in one split, as MONAI transforms take them.

        Args:
            task: such as ``13-T1-ED``.
            split: ``train``, ``val`` or ``test``.

        Returns:
            One dictionary a subject: ``image`` and ``label`` (absolute paths), ``subject`` and ``institution``; where
            the collection names patients also ``patient``, whom scores are averaged over and resampled by.

        Raises:
            InputError: an unknown task or split, or no subject in it.
        """
        require_choice("split", split, SPLITS)
        task, subjects = Task(str(task)), self.subjects_of(task)
        modality, label = task.modality, self._objective(task).label
        named = any(subject.patient for subject in self.subjects)
        datalist = [
            {
                "image": str(subject.images[modality]),
                "label": str(subject.labels[label]),
                "subject": subject.id,
                "institution": subject.institution,
            }
            | ({"patient": subject.patient or subject.id} if named else {})
            for subject in subjects
            if subject.split == split
        ]
        if not datalist:
            counts = Counter(subject.split for subject in subjects)
            found = ", ".join(f"{name} {counts[name]}" for name in SPLITS)
            raise InputError(
                f"task {task} has no subject in split '{split}' of {self.path} (subjects with {modality} and label "
                f"'{label}': {found}); choose another task or split, or add subjects."
            )
        return datalist

    def class_names(self, task: Task | str) -> list[str]:
        """Names of the foreground classes in order; an objective of one class lends it its own name."""
        return list(self._objective(task).class_names)

    def n_classes(self, task: Task | str) -> int:
        """Number of classes including the background."""
        return len(self._objective(task).values) + 1

    def label_values(self, task: Task | str) -> list[list[int]]:
        """For every foreground class its values in the label file, as `SelectLabelsd` takes them."""
        return [list(group) for group in self._objective(task).values]

    def _objective(self, task: Task | str) -> Objective:
        return self.objectives[require_choice("objective", Task(str(task)).objective, self.objectives)]


def load_collection(path: str | os.PathLike[str]) -> Collection:
    """Read and validate a collection file. Images and labels are not opened: that is `check_collection`'s work.

    Where no subject has a ``split``, one is drawn patient-wise in every institution: a half to train, a quarter each to
    val and test. It depends on the subject ids alone, not on their order.

    Args:
        path: the JSON file; paths in it are absolute or relative to its folder.

    Raises:
        InputError: the file is missing, is not JSON, or breaks the format; one line names the file and the key.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise InputError(f"collection file {path} does not exist; give the path of a collection's JSON file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError(f"collection file {path} is not valid JSON ({error}); correct it there.") from error
    return _parse(content, path)


def write_collection(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Validate a collection's content and write its file, whole or not at all. Images are never copied or touched.

    Args:
        path: the JSON file to write.
        content: the collection in the documented format.

    Returns:
        The absolute path of the file.

    Raises:
        InputError: the content breaks the format; nothing is written.
    """
    path = Path(path).absolute()
    _parse(content, path)
    write_json(path, content)
    return path


def _parse(content: Any, path: Path) -> Collection:
    where = str(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: the file must hold an object with 'name', 'labels', 'objectives' and 'subjects'.")
    labels = {
        name: _parse_label(name, values, f"{where}: labels '{name}'")
        for name, values in _get(content, "labels", Mapping, where).items()
    }
    objectives = {
        name: _parse_objective(name, entry, labels, f"{where}: objective '{name}'")
        for name, entry in _get(content, "objectives", Mapping, where).items()
    }
    entries = _get(content, "subjects", Sequence, where)
    if not entries or not objectives:
        raise InputError(f"{where}: 'subjects' and 'objectives' must hold at least one entry each; add it.")
    splits = _parse_splits(entries, where)
    return Collection(
        path=path,
        name=_get(content, "name", str, where),
        description=_get(content, "description", str, where, default=""),
        license=_get(content, "license", str, where, default=""),
        synthetic=_get(content, "synthetic", bool, where, default=False),
        labels=labels,
        objectives=objectives,
        subjects=tuple(_parse_subject(entry, splits, labels, path) for entry in entries),
    )


_KINDS = {Mapping: "an object", Sequence: "a list", str: "text", bool: "true or false"}
_REQUIRED = object()


def _get(entry: Any, key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """Return ``entry[key]`` if it has the right kind; ``where`` begins the error message."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} must be an object; found {entry!r}.")
    if key not in entry:
        if default is _REQUIRED:
            raise InputError(f"{where}: key '{key}' is missing; it must be {_KINDS[kind]}.")
        return default
    value = entry[key]
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        raise InputError(f"{where}: '{key}' must be {_KINDS[kind]}; found {value!r}.")
    if value == "" and default is _REQUIRED:
        raise InputError(f"{where}: '{key}' must not be empty.")
    return value


def _parse_label(name: str, values: Any, where: str) -> dict[str, int]:
    if not isinstance(values, Mapping) or not values:
        raise InputError(f'{where} must map names to values, such as {{"{name}": 1}}; found {values!r}.')
    for value in values.values():
        if type(value) is not int or value < 1:
            raise InputError(f"{where}: every value must be a whole number from 1 (0 is background); found {value!r}.")
    if len(set(values.values())) < len(values):
        raise InputError(f"{where}: two names share a value in {dict(values)}; give every name its own.")
    return dict(values)


def _parse_objective(name: str, entry: Any, labels: Mapping[str, Mapping[str, int]], where: str) -> Objective:
    _refuse_hyphen(name, where)
    label = require_choice(f"{where}: label", _get(entry, "label", str, where), labels)
    groups = [
        tuple(group) if isinstance(group, Sequence) and not isinstance(group, str) else (group,)
        for group in _get(entry, "values", Sequence, where)
    ]
    names = {value: value_name for value_name, value in labels[label].items()}
    flat = [value for group in groups for value in group]
    for value in flat:
        if type(value) is not int or value not in names:
            raise InputError(f"{where}: value {value!r} is not declared for label '{label}' ({dict(labels[label])}).")
    if not flat or not all(groups) or len(set(flat)) < len(flat):
        raise InputError(f"{where}: 'values' must name label values, each once, such as [1, [2, 3]]; found {groups}.")
    merged = ("+".join(names[value] for value in group) for group in groups)
    return Objective(label=label, class_names=(name,) if len(groups) == 1 else tuple(merged), values=tuple(groups))


def _parse_subject(
    entry: Mapping[str, Any], splits: Mapping[str, str], labels: Mapping[str, Any], path: Path
) -> Subject:
    where = f"{path}: subject '{entry['id']}'"
    files: dict[str, dict[str, Path]] = {}
    for kind in ("images", "labels"):
        names = _get(entry, kind, Mapping, where)
        files[kind] = {name: path.parent / _get(names, name, str, f"{where}: {kind}") for name in names}
    for modality in files["images"]:
        _refuse_hyphen(modality, f"{where}: modality '{modality}'")
    for label in files["labels"]:
        require_choice(f"{where}: label", label, labels)
    patient = entry.get("patient") or None
    return Subject(entry["id"], entry["institution"], splits[entry["id"]], files["images"], files["labels"], patient)


def _refuse_hyphen(name: str, where: str) -> None:
    if not name or "-" in name:
        raise InputError(f"{where}: the name must not be empty or contain '-', which separates the parts of a task.")


def _parse_splits(entries: Sequence[Any], where: str) -> dict[str, str]:
    """The split of every subject id, as written or, where none is written, drawn."""
    written: dict[str, str | None] = {}
    patients: dict[str, str] = {}
    institutions: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        subject = _get(entry, "id", str, f"{where}: subjects[{number}]")
        subject_where = f"{where}: subject '{subject}'"
        split = _get(entry, "split", str, subject_where, default=None)
        if split is not None:
            require_choice(f"{subject_where}: split", split, SPLITS)
        if subject in written and written[subject] != split:
            raise InputError(f"{subject_where} is in splits '{written[subject]}' and '{split}'; keep it in one split.")
        if subject in written:
            raise InputError(f"{subject_where} is listed twice; give every subject its own id, and list it once.")
        written[subject] = split
        patients[subject] = _get(entry, "patient", str, subject_where, default=None) or subject
        institutions.setdefault(_get(entry, "institution", str, subject_where), []).append(subject)
    of_patient: dict[str, str | None] = {}
    for subject, split in written.items():
        if of_patient.setdefault(patients[subject], split) != split:
            raise InputError(
                f"{where}: patient '{patients[subject]}' (subject '{subject}') is in splits "
                f"'{of_patient[patients[subject]]}' and '{split}'; keep all of a patient in one split."
            )
    without = [subject for subject, split in written.items() if split is None]
    if not without:
        return {subject: str(split) for subject, split in written.items()}
    if len(without) < len(written):
        raise InputError(
            f"{where}: {len(without)} of {len(written)} subjects have no 'split' (first: '{without[0]}'); "
            "write it for all of them, or for none to have one drawn."
        )
    drawn: dict[str, str] = {}  # a patient seen at two institutions stays where it was drawn first
    for ids in institutions.values():
        drawn = _draw_splits(list(dict.fromkeys(patients[subject] for subject in ids))) | drawn
    return {subject: drawn[patients[subject]] for subject in written}


def _draw_splits(ids: Sequence[str]) -> dict[str, str]:
    """Deal the subjects out in the order of a hash of their ids: the same on every machine, whatever their order."""
    shuffled = sorted(ids, key=lambda subject: hashlib.sha256(f"split 0 {subject}".encode()).digest())
    return dict(zip(shuffled, cycle(("train", "val", "test", "train")), strict=False))
