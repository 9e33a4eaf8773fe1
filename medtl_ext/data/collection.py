"""A collection is one JSON file beside the images; a task is a question asked of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import cycle, product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    WrapValidator,
    model_validator,
)

from medtl_ext._io import content_hashes, write_json
from medtl_ext._validation import InputError, first_line, require_choice, require_name, shown

Split = Literal["train", "val", "test"]
SPLITS = get_args(Split)
PathLike = str | os.PathLike[str]
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, order=True)
class Task:
    """The question "find this objective, on this modality, at this institution", written ``13-T1-ED``.

    An institution may contain hyphens; a modality or an objective may not. Several channels are joined by ``+``, in the
    order in which a network gets them: ``13-T1+FLAIR-ED``.

    Raises:
        InputError: the name does not have three parts, or a channel is named twice.

    >>> task = Task("St-Olav-T1-ED")
    >>> task.institution, task.modality, task.objective
    ('St-Olav', 'T1', 'ED')
    >>> Task("CHASE-R+G+B-Vessel").channels
    ('R', 'G', 'B')
    >>> Task.of("13", "FLAIR", "WMH") == Task("13-FLAIR-WMH")
    True
    """

    name: str

    def __post_init__(self) -> None:
        parts = str(self.name).rsplit("-", 2)
        if len(parts) != 3 or not all(parts):
            name = shown.repr(self.name)
            raise InputError(f"task {name} is not of the form institution-modality-objective, such as 13-T1-ED.")
        require_name("task", self.name)
        try:
            channels_of(parts[1])
        except ValueError as error:
            raise InputError(f"task {self.name!r}: {error}") from error

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
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that a network gets: one for ``T1``, three for ``R+G+B``."""
        return channels_of(self.modality)

    @property
    def objective(self) -> str:
        return self.name.rsplit("-", 2)[2]

    def __str__(self) -> str:
        return self.name


@cache
def channels_of(name: str) -> tuple[str, ...]:
    """The channels in a name such as ``T1+FLAIR``, of a task or of a file that holds several channels."""
    channels = tuple(name.split("+"))
    if not all(channels) or len(set(channels)) < len(channels):
        raise ValueError(f"channels {name} must each have a name of its own, such as R+G+B.")
    return channels


def _part_of_a_task(name: str) -> str:
    if "-" in name:
        raise ValueError("the name must not contain '-', which separates the parts of a task.")
    return name


def _channels_once(images: dict[str, Path]) -> dict[str, Path]:
    channels = [channel for name in images for channel in channels_of(name)]
    if twice := [channel for channel in channels if channels.count(channel) > 1]:
        raise ValueError(f"two files hold channel {twice[0]}; name every channel once.")
    return images


class Colour(int):
    """A colour in a mask, as one number: red x 65536 + green x 256 + blue."""

    @classmethod
    def of(cls, rgb: Any) -> Colour:
        if len(rgb) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in rgb) or not any(rgb):
            raise ValueError(f"a colour must be [red, green, blue], each 0 to 255, and not black; found {rgb}.")
        return cls(rgb[0] << 16 | rgb[1] << 8 | rgb[2])

    def __repr__(self) -> str:
        return str([self >> 16, self >> 8 & 255, self & 255])


def _colour_or(value: Any, number: Callable[[Any], int]) -> int:
    return Colour.of(value) if isinstance(value, list | tuple) else number(value)


def _beside_the_collection(file: Any, info: Any) -> Path:
    if not isinstance(file, str) or not file or _CONTROL.search(file):
        raise ValueError(f"must be the path of a file; found {shown.repr(file)}.")
    return Path(os.path.join(info.context, file))  # twice as fast as `/`, which matters for 100,000 files


def _of_different_values(label: dict[str, int]) -> dict[str, int]:
    if len(set(label.values())) < len(label):
        raise ValueError(f"two names share a value in {label}; give every name its own.")
    if len({type(value) for value in label.values()}) > 1:
        raise ValueError(f"{label} mixes numbers and colours; declare one kind only, as the file has it.")
    return label


_Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(partial(require_name, "the name"))]
_Part = Annotated[Name, AfterValidator(_part_of_a_task)]
_File = Annotated[Path, BeforeValidator(_beside_the_collection)]
_Value = Annotated[StrictInt, Field(ge=1)]  # 0 is background
_ValueOrName = Annotated[
    _Value, WrapValidator(lambda value, number: value if isinstance(value, str) else number(value))
]
_AsGroup = BeforeValidator(lambda values: values if isinstance(values, list | tuple) else [values])
_Group = Annotated[list[_ValueOrName], _AsGroup, Field(min_length=1)]
_Declared = Annotated[_Value, WrapValidator(_colour_or)]
_Label = Annotated[dict[Name, _Declared], Field(min_length=1), AfterValidator(_of_different_values)]


class Subject(BaseModel, frozen=True):
    """One scan of a patient, with its image files (by modality) and label files (by name).

    A name such as ``R+G+B`` says which channels a file holds. ``patient`` names the patient; without it, every subject
    counts as a patient of its own.
    """

    id: Name
    institution: Name
    split: Split | None = None  # never None in a collection that was loaded
    images: Annotated[dict[_Part, _File], AfterValidator(_channels_once)]
    labels: dict[str, _File]
    patient: Annotated[str | None, AfterValidator(lambda name: name and require_name("the name", name))] = None

    @property
    def group(self) -> str:
        """The patient: all scans of a patient stay in one split."""
        return self.patient or self.id

    def channels(self) -> dict[str, str]:
        """Channel -> file name for `ChannelReader`; if a file holds several channels, with the channel's number."""
        return {
            channel: f"{path}#{number}/{len(names)}" if len(names) > 1 else str(path)
            for path, names in ((path, channels_of(name)) for name, path in self.images.items())
            for number, channel in enumerate(names)
        }


class Objective(BaseModel, frozen=True):
    """What to segment: a label file, and for every foreground class its values in that file, or their names."""

    label: str
    values: Annotated[list[_Group], Field(min_length=1)]


def _settle_splits(subjects: list[Subject]) -> list[Subject]:
    """The subjects with their splits, drawn if none is written; every patient must be in one split only."""
    ids: set[str] = set()
    written: dict[str, str | None] = {}
    institutions: dict[str, dict[str, None]] = {}
    for subject in subjects:
        patient, split = subject.group, subject.split
        if written.setdefault(patient, split) != split:
            splits = f"'{written[patient]}' and '{split}'; keep all scans of a patient in one split"
            raise InputError(f"patient '{patient}' (subject '{subject.id}') is in splits {splits}.")
        if subject.id in ids:
            raise InputError(f"subject '{subject.id}' is listed twice; give every subject its own id, once.")
        ids.add(subject.id)
        institutions.setdefault(subject.institution, {})[patient] = None
    without = [subject.id for subject in subjects if subject.split is None]
    if not without:
        return subjects
    if len(without) < len(subjects):
        some = f"{len(without)} of {len(subjects)} subjects have no 'split' (first: '{without[0]}')"
        raise InputError(f"{some}; write it for all of them, or for none to have one drawn.")
    drawn: dict[str, str] = {}  # a patient seen at two institutions stays where it was drawn first
    for patients in institutions.values():
        drawn = dict(zip(shuffled(patients), cycle(("train", "val", "test", "train")), strict=False)) | drawn
    return [subject.model_copy(update={"split": drawn[subject.group]}) for subject in subjects]


def count_splits(subjects: Iterable[Subject]) -> str:
    """Such as ``train 6, val 3, test 3``."""
    counts = Counter(subject.split for subject in subjects)
    return ", ".join(f"{split} {counts[split]}" for split in SPLITS)


def shuffled(names: Iterable[str], seed: int = 0) -> list[str]:
    """Sort names by their hashes: the same order on every machine, and for any order of the input."""
    return sorted(names, key=lambda name: hashlib.sha256(f"split {seed} {name}".encode()).digest())


class Collection(BaseModel, frozen=True):
    """Subjects with images and labels, and the objectives that can be asked of them; made by `load_collection`.

    ``labels`` maps the name of each label file to its values, as ``{"tumour": {"ED": 1, "ET": 2}}``, or to its colours.
    ``missing`` says what to do with a subject that has only some channels of a task: refuse or skip.
    """

    path: Path
    name: _Text
    description: str = ""
    license: str = ""
    synthetic: StrictBool = False
    missing: Literal["refuse", "skip"] = "refuse"
    labels: dict[Name, _Label]
    objectives: Annotated[dict[_Part, Objective], Field(min_length=1)]
    subjects: Annotated[list[Subject], Field(min_length=1), AfterValidator(_settle_splits)]

    @model_validator(mode="after")
    def _labels_are_declared(self) -> Collection:
        for name, objective in self.objectives.items():
            where = f"objective '{name}'"
            declared = self.labels[require_choice(f"{where}: label", objective.label, self.labels)]
            groups = [[declared.get(value, value) for value in group] for group in objective.values]
            self.objectives[name] = objective.model_copy(update={"values": groups})
            values = [value for group in groups for value in group]
            if not set(values) <= set(declared.values()) or len(set(values)) < len(values):
                rule = f"for label '{objective.label}' ({declared}), and each be there once, or by their names"
                raise InputError(f"{where}: values must be declared {rule}; found {objective.values}.")
        for subject in self.subjects:
            for label in subject.labels:
                require_choice(f"subject '{subject.id}': label", label, self.labels)
        return self

    @property
    def institutions(self) -> list[str]:
        return list(dict.fromkeys(subject.institution for subject in self.subjects))

    @property
    def modalities(self) -> list[str]:
        """All channels, each of which at least one subject has."""
        return list(dict.fromkeys(channel for names in self._names() for channel in channels_of(names)))

    def _names(self) -> dict[str, None]:
        return dict.fromkeys(name for subject in self.subjects for name in subject.images)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve characters that change when the collection file or any image or label file changes."""
        files = [file for subject in self.subjects for file in (*subject.images.values(), *subject.labels.values())]
        hashes = list(content_hashes(files).values())
        return hashlib.sha256(self.path.read_bytes() + json.dumps(hashes).encode()).hexdigest()[:12]

    def fingerprint_of(self, task: Task | str) -> str:
        """Twelve characters that change when the task's objective, subjects, splits or files change.

        Other parts of the collection do not matter.
        """
        seen, subjects = [self.missing, self.synthetic, self._objective(task).model_dump()], self.subjects_of(task)
        hashes = content_hashes(path for of in subjects for path in (of.images | of.labels).values())
        for subject in subjects:
            files = {name: (path, hashes[path]) for name, path in (subject.images | subject.labels).items()}
            seen.append([subject.id, subject.split, subject.patient, files])
        folder = str(self.path.parent)
        text = json.dumps(seen, sort_keys=True, default=lambda path: str(path).removeprefix(folder))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def tasks(self) -> list[Task]:
        """All tasks of one channel for which at least one subject has the image and the label file."""
        tasks = (Task.of(*parts) for parts in product(self.institutions, self.modalities, self.objectives))
        return [task for task in tasks if self.subjects_of(task)]

    def subjects_of(self, task: Task | str) -> list[Subject]:
        """The subjects of the task's institution that have its modality and its label file, in all splits.

        Raises:
            InputError: an unknown institution, channel or objective; or a subject with only some of the task's
                channels, unless the collection says ``"missing": "skip"``.
        """
        task = Task(str(task))
        require_choice("institution", task.institution, self.institutions)
        for channel in task.channels:
            self._require_channel(channel)
        label, channels = self._objective(task).label, set(task.channels)
        subjects, partly = [], []
        for subject in self.subjects:
            if subject.institution != task.institution or label not in subject.labels:
                continue
            missing = channels.difference(*map(channels_of, subject.images))
            if not missing:
                subjects.append(subject)
            elif missing < channels:
                partly.append(f"subject '{subject.id}' has no {' and no '.join(sorted(missing))}")
        if partly and self.missing == "refuse":
            more = f" (and {len(partly) - 1} more subjects lack a channel)" if len(partly) > 1 else ""
            advice = f'add the files to {self.path}, or write "missing": "skip" there to leave such subjects out'
            raise InputError(f"{partly[0]}, which task {task} needs{more}; {advice}.")
        return subjects

    def _require_channel(self, channel: str) -> None:
        known = self.modalities
        files = [] if channel in known else [name for name in self._names() if len(channel) == 1 and channel in name]
        if files:  # asked for R, but the file is called RGB
            advice = "if that is one file of several channels, name each, such as R+G+B"
            raise InputError(f"modality '{channel}' is unknown; the collection holds {', '.join(files)}: {advice}.")
        require_choice("modality", channel, known)

    def datalist(self, task: Task | str, split: str) -> list[dict[str, str]]:
        """The task's subjects in one split, as MONAI transforms take them.

        Args:
            task: such as ``13-T1-ED``.
            split: ``train``, ``val`` or ``test``.

        Returns:
            One dictionary per subject: ``image`` (an absolute path; a list for several channels) and ``label``, both
            for `ChannelReader`; ``subject`` and ``institution``; and ``patient`` if the collection names patients.
            Scores are averaged and resampled by patient.

        Raises:
            InputError: an unknown task or split, or no subject in it.
        """
        require_choice("split", split, SPLITS)
        task, subjects = Task(str(task)), self.subjects_of(task)
        label = self._objective(task).label
        named = any(subject.patient for subject in self.subjects)
        datalist = [
            {
                "image": _one_or_all([subject.channels()[channel] for channel in task.channels]),
                "label": self.label_file(subject, label),
                "subject": subject.id,
                "institution": subject.institution,
            }
            | ({"patient": subject.group} if named else {})
            for subject in subjects
            if subject.split == split
        ]
        if not datalist:
            has = f"of {self.path} (with {task.modality} and label '{label}': {count_splits(subjects)})"
            raise InputError(f"task {task} has no subject in split '{split}' {has}; choose another or add subjects.")
        return datalist

    def label_file(self, subject: Subject, label: str) -> str:
        """The name of a label file for `ChannelReader`."""
        colours = any(isinstance(value, Colour) for value in self.labels[label].values())
        return f"{subject.labels[label]}{'#rgb' if colours else ''}"

    def class_names(self, task: Task | str) -> list[str]:
        """Names of the foreground classes, in order; a single class has the name of the objective."""
        objective = self._objective(task)
        if len(objective.values) == 1:
            return [Task(str(task)).objective]
        names = {value: name for name, value in self.labels[objective.label].items()}
        return ["+".join(names[value] for value in group) for group in objective.values]

    def label_values(self, task: Task | str) -> list[list[int]]:
        """The values of each foreground class in the label file, for `SelectLabelsd`."""
        return [list(group) for group in self._objective(task).values]

    def _objective(self, task: Task | str) -> Objective:
        return self.objectives[require_choice("objective", Task(str(task)).objective, self.objectives)]


def _one_or_all(files: list[str]) -> str | list[str]:
    return files if len(files) > 1 else files[0]


def load_collection(path: PathLike) -> Collection:
    """Read and validate a collection file. Images and labels are not opened: that is `check_collection`'s work.

    If no subject has a ``split``, splits are drawn patient by patient in every institution: half to train, a quarter
    each to val and test. The draw depends on the names only, not on their order.

    Args:
        path: the JSON file; paths in it are absolute or relative to its folder.

    Raises:
        InputError: the file is missing, is not JSON, or breaks the format; one line names the file and the key.
    """
    path = Path(path).absolute()
    return _validate(read_json(path), path)


def write_collection(path: PathLike, content: Mapping[str, Any]) -> Path:
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
    _validate(content, path)
    write_json(path, content)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; correct the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_key_once)
    except RecursionError as error:
        raise InputError(f"{path} is JSON that is nested too deeply; correct the file.") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError(f"{path} is not valid JSON ({error}); correct the file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold an object of JSON; found a {type(content).__name__}.")
    return content


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # a broken archive fails in a dozen ways
        problem = f"cannot be read as a .npz file of plain arrays ({first_line(error)})"
        raise InputError(f"{path} {problem}; copy it again, or delete it if a run made it.") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dictionary; Python's own reader would silently keep the last of two equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"key {shown.repr(twice)} is given twice in one object")
    return content


def refuse_to_replace(path: PathLike, recognise: Callable[[Path], Any], kind: str) -> None:
    """Refuse to overwrite a file of another kind, such as the list that a reader reads."""
    try:
        ours = not Path(path).exists() or recognise(Path(path))
    except ValueError:  # which an `InputError` is too
        ours = False
    if not ours:
        raise InputError(f"{path} exists and is not a {kind}, so it is not replaced; give another file to write.")


def _validate(content: Mapping[str, Any], path: Path) -> Collection:
    """Validate a file's content; the error names the first fault in one line."""
    try:
        return Collection.model_validate({**content, "path": path}, context=str(path.parent))
    except ValidationError as error:
        raise first_fault(str(path), error, content) from None


def first_fault(where: str, error: ValidationError, content: Mapping[str, Any]) -> InputError:
    """The first fault that pydantic found in a file's content, as an error of one line."""
    first = error.errors()[0]
    loc = [part for part in first["loc"] if part not in ("[key]", "int", "str") and "tuple[" not in str(part)]
    place = [shown.repr(part).strip("'") for part in loc]
    if len(place) > 2 and place[0] == "subjects" and (subject := content["subjects"][int(place[1])].get("id")):
        place[:2] = [f"subject {shown.repr(subject)}"]
    where = ": ".join([where, *place])
    if first["type"] == "value_error":
        return InputError(f"{where}: {first['ctx']['error']}")
    if first["type"] == "missing":
        return InputError(f"{where} is missing; add it.")
    must = re.sub(r" or instance of \w+| after validation.*", "", re.sub(r"^\w+ should", "must", first["msg"]))
    return InputError(f"{where} {must}; found {reprlib.repr(first['input'])}.")
