"""Look at every file of a collection before anything long runs on it."""

from __future__ import annotations

import gzip
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

import joblib
import nibabel
import numpy as np
import pandas as pd
from tqdm import tqdm

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError
from medtl_ext.data.collection import Collection, Subject, Task

__all__ = ["IntegrityReport", "Issue", "check_collection", "require_volumes"]

# Every thread holds a volume or two: more of them would read no faster and could fill the memory of a large machine.
_MAX_THREADS = 8

# Headers keep affines in float32, so two tools rarely agree to the last digit.
_SAME_AFFINE_MM = 1e-3


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong with the data, and what to do about it.

    An error spoils training or evaluation; a warning may be as it should be. ``subject`` and ``file`` are empty where
    the issue is about more than one subject.
    """

    severity: Literal["error", "warning"]
    subject: str
    file: str
    problem: str
    advice: str

    def __str__(self) -> str:
        found = ": ".join(part for part in (self.severity, self.subject, self.file, self.problem) if part)
        return f"{found}; {self.advice}"


@dataclass(frozen=True)
class IntegrityReport:
    """What `check_collection` found; ``str()`` gives a line for every issue below a summary."""

    path: Path
    n_subjects: int
    n_files: int
    issues: list[Issue]

    @property
    def errors(self) -> list[Issue]:
        return [issue for issue in self.issues if issue.severity == "error"]

    @property
    def warnings(self) -> list[Issue]:
        return [issue for issue in self.issues if issue.severity == "warning"]

    def __str__(self) -> str:
        summary = (
            f"{self.path}: {self.n_subjects} subjects, {self.n_files} files read, "
            f"errors: {len(self.errors)}, warnings: {len(self.warnings)}"
        )
        return "\n".join([summary, *map(str, self.errors + self.warnings)])

    def raise_for_errors(self) -> None:
        """Raise an `InputError` of one line if there is any error; warnings pass."""
        if self.errors:
            raise InputError(
                f"{self.path}: the data check found errors ({len(self.errors)}), the first: {self.errors[0]}. "
                f"See all of them: python -m medtl_ext.data check {self.path}"
            )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the issues as a table: severity, subject, file, problem, advice."""
        with atomic_path(path) as temporary:
            pd.DataFrame(self.issues, columns=[column.name for column in fields(Issue)]).to_csv(temporary, index=False)


def check_collection(
    collection: Collection, tasks: Iterable[Task | str] | None = None, *, progress: bool = True
) -> IntegrityReport:
    """Read every file of a collection in full and report what would spoil training or evaluation.

    Errors: a file that is missing, unreadable or truncated, or not a single 3D volume; NaN or infinite values; a label
    with fractional or undeclared values, or on another grid than an image; one image under two subjects of different
    splits; no training subject with foreground. Warnings: one image under two subjects of the same split, an image of
    one value, and a subject without foreground.

    Args:
        collection: from `load_collection`.
        tasks: check only the files of these tasks; None checks all.
        progress: show a progress bar on a terminal.

    Returns:
        The report. Problems are reported, never raised: call its ``raise_for_errors()`` before long work.

    Raises:
        InputError: a task the collection does not know.
    """
    chosen = collection.tasks() if tasks is None else [Task(str(task)) for task in tasks]
    files = _list_files(collection, None if tasks is None else chosen)
    scans = _for_each(lambda file: _scan(file, collection.labels), files, progress=progress)
    readable = [scan for scan in scans if scan.shape is not None]
    issues = [
        *(_issue(collection, scan.file, *problem) for scan in scans for problem in scan.problems),
        *_grid_issues(collection, readable),
        *_duplicate_issues(collection, readable),
        *_foreground_issues(collection, chosen, readable),
    ]
    return IntegrityReport(collection.path, len({file.subject.id for file in files}), len(files), issues)


def require_volumes(paths: Sequence[Path], *, progress: bool = False) -> None:
    """Refuse files that are not each one 3D volume, before a long run meets them; every byte is read.

    Raises:
        InputError: some are unreadable, truncated or of another shape; it names the first.
    """

    def problem(path: Path) -> str | None:
        try:
            _usable_volume(path)
        except _Unusable as reason:
            return f"{path}: {'; '.join(reason.args)}"
        return None

    problems = [found for found in _for_each(problem, paths, progress=progress) if found]
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)


def _for_each(read: Callable[[Any], Any], files: Sequence[Any], *, progress: bool) -> list[Any]:
    """What ``read`` returns of each file, several read at a time."""
    threads = joblib.Parallel(min(_MAX_THREADS, joblib.cpu_count()), require="sharedmem", return_as="generator")
    jobs = threads(joblib.delayed(read)(file) for file in files)
    return list(tqdm(jobs, "checking files", total=len(files), unit="file", disable=None if progress else True))


@dataclass(frozen=True)
class _File:
    """A file of the collection; ``name`` is the modality of an image or the name of a label."""

    subject: Subject
    kind: Literal["image", "label"]
    name: str
    path: Path


@dataclass
class _Scan:
    """What is kept of a file that was read: never the voxels."""

    file: _File
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # severity, problem, advice
    shape: tuple[int, ...] | None = None  # of a 3D volume that could be read
    affine: np.ndarray | None = None
    values: frozenset[float] | None = None  # of a label
    digest: str | None = None  # of an image, unless it is constant


def _list_files(collection: Collection, tasks: Sequence[Task] | None) -> list[_File]:
    """All files of the collection, or those that the tasks use."""
    files = [
        _File(subject, kind, name, path)
        for subject in collection.subjects
        for kind, paths in (("image", subject.images), ("label", subject.labels))
        for name, path in paths.items()
    ]
    if tasks is None:
        return files
    wanted = {
        (subject.id, *used)
        for task in tasks
        for subject in collection.subjects_of(task)
        for used in (("image", task.modality), ("label", collection.objectives[task.objective].label))
    }
    return [file for file in files if (file.subject.id, file.kind, file.name) in wanted]


def _issue(collection: Collection, file: _File, severity: str, problem: str, advice: str) -> Issue:
    path = file.path
    if path.is_relative_to(collection.path.parent):
        path = path.relative_to(collection.path.parent)
    return Issue(severity, file.subject.id, str(path), problem, advice)


def _read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine, every byte of the file read."""
    image = nibabel.load(path)
    if path.suffix == ".gz":
        # nibabel stops at the last voxel; decompressing everything also compares the checksum behind it.
        image = image.from_bytes(gzip.decompress(path.read_bytes()))
    voxels = np.asanyarray(image.dataobj)
    if voxels.shape[3:] == (1,):  # as Analyze files often have it; MONAI takes it as the channel
        voxels = voxels[..., 0]
    return voxels, image.affine


class _Unusable(Exception):
    """The problem, and what to do about it."""


def _usable_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a file that holds one 3D volume of numbers."""
    if not path.is_file():
        raise _Unusable("the file does not exist", "correct its path in the collection, or restore it")
    try:
        voxels, affine = _read_volume(path)
    except Exception as error:  # a broken file fails in a dozen ways, and none of them may end the check
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _Unusable(f"the file cannot be read ({reason})", "copy or convert it again") from error
    if voxels.ndim != 3 or voxels.size == 0 or voxels.dtype.kind not in "biuf":
        problem = f"the volume has shape {voxels.shape} and voxels of type {voxels.dtype}"
        raise _Unusable(problem, "store one 3D volume of numbers a file")
    return voxels, affine


def _scan(file: _File, labels: Mapping[str, Mapping[str, int]]) -> _Scan:
    """Read one file and look at it by itself."""
    scan = _Scan(file)
    try:
        voxels, scan.affine = _usable_volume(file.path)
    except _Unusable as reason:
        scan.problems.append(("error", *reason.args))
        return scan
    scan.shape = voxels.shape
    if not np.isfinite(voxels).all():
        scan.problems.append(("error", "it holds NaN or infinite values", "replace them, or leave the subject out"))
    elif file.kind == "image":
        _scan_image(scan, voxels)
    else:
        _scan_label(scan, voxels, labels[file.name])
    return scan


def _scan_image(scan: _Scan, voxels: np.ndarray) -> None:
    if voxels.min() == voxels.max():
        problem = f"every voxel of the image is {voxels.flat[0]:g}"
        scan.problems.append(("warning", problem, "look at it, and leave the subject out if it is empty"))
    else:
        scan.digest = joblib.hash(np.asarray(voxels, dtype=np.float32))


def _scan_label(scan: _Scan, voxels: np.ndarray, declared: Mapping[str, int]) -> None:
    scan.values = frozenset(np.unique(voxels).tolist())
    fractional = sorted(value for value in scan.values if value != round(value))
    undeclared = sorted(scan.values - {0, *declared.values()} - set(fractional))
    if fractional:
        problem = f"the label holds fractional values, such as {fractional[0]:g}"
        scan.problems.append(("error", problem, "resample labels with nearest-neighbour interpolation"))
    if undeclared:
        problem = f"the label holds undeclared values {_list(undeclared)} (declared: {dict(declared)})"
        scan.problems.append(("error", problem, f"declare them under labels '{scan.file.name}', or correct the file"))


def _list(values: Sequence[float], most: int = 5) -> str:
    return ", ".join(f"{value:g}" for value in values[:most]) + (", ..." if len(values) > most else "")


def _grid_issues(collection: Collection, scans: Sequence[_Scan]) -> Iterator[Issue]:
    """Every image is compared with every label of its subject."""
    by_subject = defaultdict(lambda: {"image": [], "label": []})
    for scan in scans:
        by_subject[scan.file.subject.id][scan.file.kind].append(scan)
    advice = "resample one onto the grid of the other"
    for kinds in by_subject.values():
        for image, label in product(kinds["image"], kinds["label"]):
            against = f"of label '{label.file.name}'"
            if image.shape != label.shape:
                problem = f"image shape {image.shape} differs from shape {label.shape} {against}"
                yield _issue(collection, image.file, "error", problem, advice)
            elif not np.allclose(image.affine, label.affine, atol=_SAME_AFFINE_MM):
                apart = np.abs(image.affine - label.affine).max()
                problem = f"the image's affine differs from that {against} by up to {apart:.3g} mm"
                yield _issue(collection, image.file, "error", problem, advice)


def _duplicate_issues(collection: Collection, scans: Sequence[_Scan]) -> Iterator[Issue]:
    """The same voxels under two subject ids, each later one against the first."""
    first: dict[str, _File] = {}
    for scan in scans:
        if scan.digest is None:
            continue
        file, twin = scan.file, first.setdefault(scan.digest, scan.file)
        if file.subject.id == twin.subject.id:
            continue
        shared = file.subject.split == twin.subject.split
        where = f"both in {file.subject.split}" if shared else f"in {twin.subject.split} and {file.subject.split}"
        problem = f"the image is identical to {twin.name} of subject {twin.subject.id} ({where})"
        advice = "list a patient once, or all its scans in one split"
        yield _issue(collection, file, "warning" if shared else "error", problem, advice)


def _foreground_issues(collection: Collection, tasks: Sequence[Task], scans: Sequence[_Scan]) -> Iterator[Issue]:
    """Subjects without foreground, and objectives that no training subject of an institution shows."""
    for institution, name in dict.fromkeys((task.institution, task.objective) for task in tasks):
        objective = collection.objectives[name]
        foreground = {value for group in objective.values for value in group}
        labels = [
            scan
            for scan in scans
            if scan.values is not None
            and (scan.file.name, scan.file.subject.institution) == (objective.label, institution)
        ]
        for scan in labels:
            if not foreground & scan.values:
                advice = f"nothing to do if {name} is absent in this patient"
                yield _issue(collection, scan.file, "warning", f"no voxel of objective {name}", advice)
        train = [scan for scan in labels if scan.file.subject.split == "train"]
        if train and not any(foreground & scan.values for scan in train):
            problem = f"none of the {len(train)} training subjects of institution {institution} shows objective {name}"
            yield Issue(
                "error", "", "", problem, "correct the objective's values, or move subjects that show it to train"
            )
