"""What every reader shares: finding files, noting what was left out, writing the collection and checking it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter
from tqdm import tqdm

from medtl_ext._validation import InputError
from medtl_ext.data.collection import Collection, PathLike, count_splits, load_collection
from medtl_ext.data.integrity import IntegrityReport, Issue, check_collection
from medtl_ext.data.splits import write_splits

_SUFFIX = re.compile(r"\.(nii\.gz|nii|img|hdr)$", re.IGNORECASE)
_PREFERENCE = (".nii.gz", ".nii", ".img")
_PARTNERS = {".hdr": ".img", ".img": ".hdr", ".HDR": ".IMG", ".IMG": ".HDR"}  # of the Analyze format
_CLASS_VALUES = TypeAdapter(int | list[int])
SUBJECT_COLUMNS = ("subject", "subject_id", "participant_id", "id")
INSTITUTION_COLUMNS = ("institution", "partition_id", "site", "center", "centre")


@dataclass(frozen=True)
class Reading:
    """What `read_collection` did: the files it wrote, what it left out and why, and the data check."""

    paths: list[Path]
    left_out: list[Issue]
    check: IntegrityReport | None

    @property
    def collection(self) -> Collection:
        """The collection, of the first fold where folds were drawn."""
        return load_collection(self.paths[0])

    @property
    def issues(self) -> list[Issue]:
        """What was left out, and what the data check found."""
        return self.left_out + (self.check.issues if self.check else [])

    def __str__(self) -> str:
        collection, rows = self.collection, defaultdict(list)
        for issue in self.left_out:
            rows[f"{issue.problem}; {issue.advice}"].append(issue.subject or issue.file)
        lines = [
            f"{len(collection.subjects)} subjects ({count_splits(collection.subjects)}) of "
            f"{len(collection.institutions)} institutions, modalities {', '.join(collection.modalities)}, "
            f"objectives {', '.join(collection.objectives)}",
            *(f"Collection written to {path}" for path in self.paths),
            f"Noted while reading: {len(self.left_out)}",
            *(f"{problem}: {_first(names, 5)}" for problem, names in rows.items()),
        ]
        return "\n".join([*lines, str(self.check or "The files were not checked.")])

    def to_csv(self, path: PathLike) -> None:
        """Write the issues as a table: severity, subject, file, problem, advice."""
        IntegrityReport(self.paths[0], 0, 0, self.issues).to_csv(path)


def _first(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


@dataclass
class Draft:
    """A collection in the making. Its options are those that every reader takes, as `read_collection` tells."""

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
        self.subjects: list[dict[str, Any]] = []
        self.left_out: list[Issue] = []
        self.found = "none"  # in a few words, for the message when no subject is
        self._names: set[str] = set()
        self.root = Path(os.path.abspath(self.root))
        if not self.root.is_dir():
            raise InputError(f"root {self.root} is not a folder; give the folder of the dataset.")

    def note(self, subject: str, path: Path | str, problem: str, consequence: str) -> None:
        """Add a row to what was left out; a path below the root is written relative to it."""
        if isinstance(path, Path) and path.is_relative_to(self.root):
            path = path.relative_to(self.root).as_posix()
        self.left_out.append(Issue("warning", subject, str(path), problem, consequence))

    def add(
        self,
        subject: str,
        institution: str,
        images: Mapping[str, Path | None],
        labels: Mapping[str, Path | None],
        **more: str | None,
    ) -> None:
        """Add a subject, or note why not. A file is None where none was found; ``more`` may name patient and split."""
        if comparable(subject) in self._names:
            self.note(subject, "", "the subject is there twice", "the second is left out")
            return
        self._names.add(comparable(subject))
        entry = {"id": subject, "institution": institution, **{key: value for key, value in more.items() if value}}
        wanted = {"images": images, "labels": labels}
        for kind, files in wanted.items():
            entry[kind] = {name: str(path) for name, path in files.items() if path is not None and path.is_file()}
        usable = entry["images"] and entry["labels"]
        for kind, files in wanted.items():
            for name, path in (files or {"": None}).items():
                if name not in entry[kind]:
                    problem = f"no {kind.removesuffix('s')} {name}".rstrip()
                    consequence = "kept without it" if usable else "the subject is left out"
                    self.note(subject, path or "", problem, consequence)
        if usable:
            self.subjects.append(entry)

    def find_images(self) -> Iterator[Path]:
        """NIfTI and Analyze files below the root, of a header and its image the image; hidden ones are skipped."""

        def unreadable(error: OSError) -> None:
            self.note("", str(error.filename), f"cannot be listed ({error.strerror})", "what is in it is not used")

        walk = os.walk(self.root, onerror=unreadable, followlinks=True)
        for folder, folders, names in tqdm(walk, "reading", unit="folder", disable=None if self.progress else True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".") and _SUFFIX.search(name)):
                path = Path(folder, name)
                partner = path.with_suffix(_PARTNERS.get(path.suffix, path.suffix))
                if partner != path and not partner.is_file():
                    self.note("", path, f"no {partner.suffix} beside it", "the file is not used")
                elif path.suffix.lower() != ".hdr":
                    yield path

    def group(self, pattern: str, ignore: str = "(?!)") -> list[tuple[re.Match[str], dict[str, Path]]]:
        """Sort the images into subjects by their names.

        Args:
            pattern: matches paths below the root without their suffix, in any case, from start to end, and names the
                groups ``subject`` and ``role``. Files of one subject have the same ``place``, if the pattern has such a
                group, or the same beginning up to the subject.
            ignore: matches files that belong to the dataset and are not wanted; all other files are noted.

        Returns:
            For every subject the match of one of its files, and the file of each role (in lower case).
        """

        def place(match: re.Match[str]) -> str:
            return comparable(match.groupdict().get("place") or match.string[: match.start("subject")])

        found: dict[str, tuple[re.Match[str], dict[str, Path]]] = {}
        paths = list(self.find_images())
        for path in sorted(paths, key=lambda path: _PREFERENCE.index(_SUFFIX.search(path.name)[0].lower())):
            name = _SUFFIX.sub("", path.relative_to(self.root).as_posix())
            match = re.fullmatch(pattern, name, re.IGNORECASE)
            if not match:
                if not re.fullmatch(ignore, name, re.IGNORECASE):
                    self.note("", path, "the name is not one of this dataset's", "the file is not used")
                continue
            first, files = found.setdefault(comparable(match["subject"]), (match, {}))
            if place(match) != place(first) or files.setdefault(match["role"].lower(), path) is not path:
                self.note(match["subject"], path, "the subject has this image already", "the file is not used")
        self.found = f"{len(paths)} image files" + (f", such as {paths[0].relative_to(self.root)}" if paths else "")
        return [found[key] for key in sorted(found)]

    def write(self, layout: str, **about: Any) -> Reading:
        """Split and write the collection, then check every file of it.

        Args:
            layout: what the reader expects, in a few words, for the message when there is no subject.
            **about: the collection but for its subjects.
        """
        if self.institutions is not None and self.subjects:
            self._assign_institutions(Path(self.institutions))
        if not self.subjects:
            reasons = [f"{issue.subject}: {issue.problem}" for issue in self.left_out if issue.subject]
            raise InputError(
                f"no subject found below {self.root}; expected {layout}, found {self.found}"
                f"{'; left out: ' + _first(reasons, 2) if reasons else ''}. Check the root and the reader's name."
            )
        content = {"synthetic": False, **about, "subjects": self.subjects}
        draw = {"fractions": self.split, "folds": self.folds, "seed": self.seed, "keep_test": self.keep_test}
        paths = write_splits(content, self.out, self.root, **draw)
        report = check_collection(load_collection(paths[0]), progress=self.progress) if self.check else None
        return Reading(paths, self.left_out, report)

    def _assign_institutions(self, path: Path) -> None:
        """Take the institutions from a table of subjects; both ways, who is not in the other is noted."""
        table = read_table(path, {"subject": SUBJECT_COLUMNS, "institution": INSTITUTION_COLUMNS})
        sites = table.groupby(table.subject.map(comparable)).institution.agg(["first", "nunique"])
        if sites["nunique"].max() > 1:
            raise InputError(f"{path} lists a subject at two institutions; list every subject once.")
        met = {comparable(issue.subject) for issue in self.left_out} | self._names
        for subject in table.subject[~table.subject.map(comparable).isin(met)]:
            self.note(subject, "", f"listed in {path.name}, but has no files", "the subject is left out")
        subjects, self.subjects = self.subjects, []
        for entry in subjects:
            if institution := sites["first"].get(comparable(entry["id"])):
                self.subjects.append(entry | {"institution": institution})
            else:
                self.note(entry["id"], "", f"has no institution in {path.name}", "the subject is left out")


def comparable(name: str) -> str:
    """A name as it is compared: in one case and one Unicode form, which file systems and tables do not share."""
    return unicodedata.normalize("NFC", name).casefold()


def stem(path: Path) -> str:
    """The file's name without its suffix."""
    return _SUFFIX.sub("", path.name)


def clean(name: str) -> str:
    """A name that can be part of a task's: white space, hyphens and slashes become ``_``.

    >>> clean("non-enhancing tumour ")
    'non_enhancing_tumour'
    """
    return re.sub(r"[\s/-]+", "_", name.strip())


def objectives(label: str, values: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """The entries ``labels`` and ``objectives`` of a collection: each class, and all of them at once.

    A class of several values (a region) is one class of the objective; regions may overlap, so there is no ``All``.

    >>> objectives("tissue", {"GM": 150, "WM": 250})["objectives"]["All"]
    {'label': 'tissue', 'values': [150, 250]}
    """
    groups = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    declared = {name: group[0] for name, group in groups.items() if len(group) == 1}
    rest = sorted({value for group in groups.values() for value in group} - set(declared.values()))
    asked = {name: group if len(group) == 1 else [group] for name, group in groups.items()}
    if 1 < len(groups) == len(declared):
        asked.setdefault("All", list(declared.values()))
    return {
        "labels": {label: declared | {f"value{value}": value for value in rest}},
        "objectives": {name: {"label": label, "values": classes} for name, classes in asked.items()},
    }


def parse_labels(labels: Any, path: Path) -> dict[str, int | list[int]]:
    """Values by name, from either form: ``{"1": "tumour"}`` or ``{"tumour": 1}``, where a region lists its values."""
    try:
        items = [(v, k) if str(k).isdigit() and isinstance(v, str) else (k, v) for k, v in labels.items()]
        values = [(clean(name), _CLASS_VALUES.validate_python(value)) for name, value in items]
    except (AttributeError, ValueError) as error:
        raise InputError(f"{path}: labels must map names to whole numbers; found {labels!r}.") from error
    foreground = [(name, value) for name, value in values if value != 0]
    if len(dict(foreground)) < len(foreground) or "background" in dict(foreground):
        raise InputError(f"{path}: labels give one name two values, or background one besides 0: {labels!r}; rename.")
    return dict(foreground)


def read_table(
    path: Path, required: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]] | None = None
) -> pd.DataFrame:
    """The columns asked for of a CSV or TSV file, as text; each is found by any of its names, in any case.

    An optional column that is not there is empty.
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
        raise InputError(f"{path} has rows with more fields than its header, such as a last comma; remove them.")
    names = {str(column).strip().lower(): column for column in table.columns}
    columns = {}
    for name, aliases in {**required, **(optional or {})}.items():
        present = [names[alias] for alias in aliases if alias in names]
        if not present and name in required:
            raise InputError(f"{path} has no column '{name}' ({' or '.join(aliases)}); found: {', '.join(names)}.")
        columns[name] = table[present[0]].str.strip() if present else ""
    return pd.DataFrame(columns, index=table.index)
