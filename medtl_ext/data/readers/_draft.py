"""Shared by all readers: find files, note what is left out, write the collection and check it."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter
from tqdm import tqdm

from medtl_ext._io import suffix_of
from medtl_ext._validation import InputError, whole_labels
from medtl_ext.data.collection import Collection, PathLike, count_splits, load_collection
from medtl_ext.data.files import FORMATS, NIFTI, read_channels
from medtl_ext.data.integrity import IntegrityReport, Issue, check_collection
from medtl_ext.data.splits import write_splits

_PREFERENCE = (".nii.gz", ".nii")  # before all others
_PARTNERS = {".hdr": ".img", ".img": ".hdr", ".HDR": ".IMG", ".IMG": ".HDR"}  # of the Analyze format
_CLASS_VALUES = TypeAdapter(int | list[int])
_ALIASES = {
    "subject": ("subject", "subject_id", "participant_id", "id"),
    "institution": ("institution", "partition_id", "site", "center", "centre"),
}
LEFT_OUT = "the subject is left out"


@dataclass(frozen=True)
class Reading:
    """What `read_collection` did: the files it wrote, what it left out and why, and the data check."""

    paths: list[Path]
    left_out: list[Issue]
    check: IntegrityReport | None
    told: Sequence[str] = ()  # what the reader inferred, which the user should check

    @property
    def collection(self) -> Collection:
        """The collection (with folds: of the first fold)."""
        return load_collection(self.paths[0])

    def __str__(self) -> str:
        collection = self.collection
        first, objective = collection.subjects[0], next(iter(collection.objectives))
        task = f"{first.institution}-{next(iter(first.images))}-{objective}"
        notes = [(f"{issue.problem}; {issue.advice}", issue.subject or issue.file) for issue in self.left_out]
        names = pd.DataFrame(notes, columns=["note", "name"]).groupby("note", sort=False).name.agg(list)
        lines = [
            f"{len(collection.subjects)} subjects ({count_splits(collection.subjects)}) of "
            f"{len(collection.institutions)} institutions, modalities {', '.join(collection.modalities)}, "
            f"objectives {', '.join(collection.objectives)}",
            *self.told,
            *(f"Collection written to {path}" for path in self.paths),
            f"A task to ask it: {task} (institution-modality-objective)",
            f"Noted while reading: {len(self.left_out)}",
            *(f"{note}: {_first(found, 5)}" for note, found in names.items()),
        ]
        return "\n".join([*lines, str(self.check or "The files were not checked.")])

    def to_csv(self, path: PathLike) -> None:
        """Write what was left out and what the check found as a table: severity, subject, file, problem, advice."""
        found = self.left_out + (self.check.issues if self.check else [])
        IntegrityReport(self.paths[0], 0, 0, found).to_csv(path)


def _first(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


@dataclass
class Draft:
    """A collection that is being written: readers add one file at a time, and this class does the rest.

    Its options are those of all readers, see `read_collection`.
    """

    root: PathLike
    out: PathLike
    institutions: PathLike | None = None
    split: Sequence[float] | None = None
    folds: int | None = None
    seed: int = 0
    keep_test: bool = False
    check: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self.subjects: dict[str, dict[str, Any]] = {}  # by their `comparable` names
        self.left_out: list[Issue] = []
        self.told: list[str] = []
        self.found = "none"  # what was found, in a few words, for the error if there is no subject
        self.root = Path(os.path.abspath(self.root))
        if not self.root.is_dir():
            raise InputError(f"root {self.root} is not a folder; give the folder of the dataset.")

    def note(self, subject: str, path: Path | str, problem: str, consequence: str) -> None:
        """Add a row to what was left out; a path below the root is written relative to it."""
        if isinstance(path, Path) and path.is_relative_to(self.root):
            path = path.relative_to(self.root).as_posix()
        self.left_out.append(Issue("warning", subject, str(path), problem, consequence))

    def add(self, subject: str, kind: str, name: str, path: Path | None, place: str = "", **known: str | None) -> None:
        """Add a file to a subject. If the subject has this image or label already, the file is noted and not used.

        Args:
            subject: its name; upper and lower case are the same.
            kind: ``images`` or ``labels``.
            name: of the modality, or of the label.
            path: of the file; None if none was found.
            place: all files of a subject must come from one place, so that two copies of a subject are never mixed.
            **known: the subject's ``institution`` and, if known, its ``patient`` and ``split``.
        """
        known = {"id": subject} | {key: value for key, value in known.items() if value}
        entry = self.subjects.setdefault(
            comparable(subject), {"known": known, "place": place, "images": {}, "labels": {}}
        )
        if entry["place"] != place or entry[kind].setdefault(name, path) != path:
            self.note(subject, path or "", f"the subject has this {kind[:-1]} already", "the file is not used")

    def find_images(self, formats: Sequence[str] = NIFTI, below: Path | None = None) -> Iterator[Path]:
        """The files of these formats below the root or another folder; hidden files are skipped.

        An Analyze pair is its ``.img`` file. A folder with a series of DICOM files is one image.
        """

        def unreadable(error: OSError) -> None:
            self.note("", str(error.filename), f"cannot be listed ({error.strerror})", "what is in it is not used")

        walk = os.walk(below or self.root, onerror=unreadable, followlinks=True)
        for folder, folders, names in tqdm(walk, "reading", unit="folder", disable=None if self.progress else True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = [name for name in names if not name.startswith(".") and suffix_of(name) in formats]
            if any(suffix_of(name) == ".dcm" for name in names):
                folders[:] = []
                yield Path(folder)
                continue
            for name in sorted(names):
                path = Path(folder, name)
                partner = path.with_suffix(_PARTNERS.get(path.suffix, path.suffix))
                if not partner.is_file():
                    self.note("", path, f"no {partner.suffix} beside it", "the file is not used")
                elif path.suffix.lower() != ".hdr":
                    yield path

    def match(
        self, pattern: str, ignore: str = "(?!)", formats: Sequence[str] = NIFTI
    ) -> list[tuple[re.Match[str], dict[str, Any]]]:
        """The images whose names match a pattern, sorted by subject; ``.nii.gz`` comes before other formats.

        Args:
            pattern: must match the whole path below the root, without suffix and in any case. It has the group
                ``subject``. The ``place`` of a file (see `add`) is the group of this name, or the path up to the
                subject.
            ignore: matches files that belong to the dataset but are not wanted; other files are noted.
            formats: file endings to look at.

        Returns:
            For every file the match, and the arguments ``path`` and ``place`` of `add`.
        """
        paths, found = list(self.find_images(formats)), []
        for path in sorted(paths, key=lambda path: [suffix_of(path) != suffix for suffix in _PREFERENCE]):
            name = path.relative_to(self.root).with_name(stem(path)).as_posix()
            if match := re.fullmatch(pattern, name, re.IGNORECASE):
                place = match.groupdict().get("place") or name[: match.start("subject")]
                found.append((match, {"path": path, "place": comparable(place)}))
            elif not re.fullmatch(ignore, name, re.IGNORECASE):
                self.note("", path, "the name is not one of this dataset's", "the file is not used")
        self.found = f"{len(paths)} image files" + (f", such as {paths[0].relative_to(self.root)}" if paths else "")
        return sorted(found, key=lambda file: comparable(file[0]["subject"]))

    def write(self, layout: str, modalities: Sequence[str] = (), **about: Any) -> Reading:
        """Split and write the collection, then check every file of it.

        Args:
            layout: what the reader expects, in a few words, for the error if there is no subject.
            modalities: those that every subject should have.
            **about: the keys of the collection, without its subjects.
        """
        if self.institutions is not None:
            self._assign_institutions(Path(self.institutions))
        subjects = self._usable({"images": modalities, "labels": [*about["labels"]]})
        if not subjects:
            reasons = [f"{issue.subject}: {issue.problem}" for issue in self.left_out if issue.subject]
            found = f"{self.found}{'; left out: ' + _first(reasons, 2) if reasons else ''}"
            raise InputError(f"no subject found below {self.root}; expected {layout}, found {found}. Check --root.")
        content = {"synthetic": False, **about, "subjects": subjects}
        draw = {"fractions": self.split, "folds": self.folds, "seed": self.seed, "keep_test": self.keep_test}
        paths = write_splits(content, self.out, self.root, **draw)
        report = check_collection(load_collection(paths[0]), progress=self.progress) if self.check else None
        return Reading(paths, self.left_out, report, self.told)

    def _assign_institutions(self, path: Path) -> None:
        """Take the institutions from a table of subjects; subjects of the table without files are noted."""
        table = read_table(path, ("subject", "institution"), ("patient",))
        key = table.subject.map(comparable)
        sites = table.institution.groupby(key).unique()
        if (sites.map(len) > 1).any():
            raise InputError(f"{path} lists a subject for two institutions; list every subject once.")
        patients = dict(zip(key, table.patient, strict=True))
        for name, entry in self.subjects.items():
            entry["known"]["institution"] = sites[name][0] if name in sites else ""
            if patient := patients.get(name):
                entry["known"]["patient"] = patient
        met = {comparable(issue.subject) for issue in self.left_out} | self.subjects.keys()
        for subject in table.subject[~key.isin(met)]:
            self.note(subject, "", f"listed in {path.name}, but has no files", LEFT_OUT)

    def _usable(self, expected: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """The subjects with an institution, an image and a label; everything that is missing is noted."""
        usable = []
        for entry in self.subjects.values():
            known, wanted = entry["known"], {kind: entry[kind] for kind in expected}
            wanted["images"] = dict.fromkeys(expected["images"]) | entry["images"]
            there = {
                kind: {name: str(path) for name, path in files.items() if path and path.exists()}
                for kind, files in wanted.items()
            }
            whole = known.get("institution") and all(there.values())
            if not known.get("institution"):
                self.note(known["id"], "", "has no institution", LEFT_OUT)
            for kind, files in wanted.items():
                for name, path in (files or {" or ".join(expected[kind]): None}).items():
                    if name not in there[kind]:
                        lost = f"no {kind[:-1]} {name}".rstrip()
                        self.note(known["id"], path or "", lost, "kept without it" if whole else LEFT_OUT)
            if whole:
                usable.append(known | there)
        return usable


def comparable(name: str) -> str:
    """A name in one case and one Unicode form, for comparison: file systems and tables may differ in both."""
    return unicodedata.normalize("NFC", name).casefold()


def stem(path: Path) -> str:
    """The name of a file without its suffix, or the name of a folder that is one image."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix in FORMATS else path.name


def held_values(name: str) -> set[int]:
    """The values of a label file without 0; empty for a broken file, which the data check reports."""
    try:
        return {*np.unique(whole_labels(read_channels([name])[0])[0]).tolist()} - {0}
    except InputError:
        return set()


def clean(name: str) -> str:
    """Make a name that can be part of a task: white space, hyphens and slashes become ``_``.

    >>> clean("non-enhancing tumour ")
    'non_enhancing_tumour'
    """
    return re.sub(r"[\s/-]+", "_", name.strip())


def objectives(label: str, values: Mapping[str, int | list[int]], together: str = "All") -> dict[str, Any]:
    """The entries ``labels`` and ``objectives`` of a collection: one objective per class, and one for all ``together``.

    A region (several values under one name) is one class. Regions may overlap, so they are not put together.

    >>> objectives("tissue", {"GM": 150, "WM": 250})["objectives"]["All"]
    {'label': 'tissue', 'values': [150, 250]}
    """
    declared = {name: value for name, value in values.items() if isinstance(value, int)}
    regions = {name: value for name, value in values.items() if name not in declared}
    asked = {name: [regions[name]] if name in regions else [value] for name, value in values.items()}
    if len(declared) > 1 and not regions:
        asked.setdefault(together, list(declared.values()))
    rest = sorted({value for region in regions.values() for value in region} - set(declared.values()))
    return {
        "labels": {label: declared | {f"value{value}": value for value in rest}},
        "objectives": {name: {"label": label, "values": classes} for name, classes in asked.items()},
    }


def parse_labels(labels: Any, path: Path) -> dict[str, int | list[int]]:
    """Values by name, from ``{"1": "tumour"}`` or ``{"tumour": 1}``; a region has a list of values."""
    try:
        items = [(v, k) if str(k).isdigit() and isinstance(v, str) else (k, v) for k, v in labels.items()]
        values = [(clean(name), _CLASS_VALUES.validate_python(value)) for name, value in items]
    except (AttributeError, ValueError) as error:
        raise InputError(f"{path}: labels must map names to whole numbers; found {labels!r}.") from error
    foreground = [(name, value) for name, value in values if value != 0]
    if len(dict(foreground)) < len(foreground) or "background" in dict(foreground):
        problem = "labels give one name two values, or give background a value other than 0"
        raise InputError(f"{path}: {problem}: {labels!r}; rename one.")
    return dict(foreground)


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Some columns of a CSV or TSV file, as text; column names may be in any case, and have the usual aliases.

    An optional column that is missing is empty.
    """
    if not path.is_file():
        raise InputError(f"table {path} does not exist; correct its path.")
    try:
        head = path.read_text(encoding="utf-8-sig").partition("\n")[0]
        separator = max(",;\t", key=head.count)
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:  # neither UTF-8 nor a table
        raise InputError(f"{path} cannot be read as a table ({error}); save it as UTF-8 with commas.") from error
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(f"{path} has rows with more fields than its header, such as a comma at the end; remove them.")
    table = table.rename(columns=lambda column: column.strip().lower()).apply(lambda column: column.str.strip())
    for name in (*required, *optional):
        aliases = _ALIASES.get(name, (name,))
        present = [alias for alias in aliases if alias in table]
        if not present and name in required:
            raise InputError(f"{path} has no column '{name}' ({' or '.join(aliases)}); found: {', '.join(table)}.")
        table[name] = table[present[0]] if present else ""
    return table[[*required, *optional]]
