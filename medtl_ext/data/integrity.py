"""Look at every file of a collection before anything long runs on it."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import joblib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

from medtl_ext._io import suffix_of, write_csv
from medtl_ext._validation import InputError, whole_labels
from medtl_ext.data.collection import Collection, Colour, Subject, Task, channels_of
from medtl_ext.data.duplicates import near_identical, thumbnail
from medtl_ext.data.files import LOSSY, PICTURES, SAME_AFFINE_MM, Unusable, for_each, read_channels

MOST_APART = 3.0
"""The largest ratio of voxel sizes between patients of one institution and modality."""
LARGEST_MM, LARGEST_VIEW_MM = 50.0, 3000.0
NO_MM = (1e-6, 1000.0)
"""Smaller or larger voxels would fill all memory when images are resampled to one grid."""
LARGEST_VALUE = 1e15


class Issue(NamedTuple):
    """One thing that is wrong with the data, and what to do about it.

    An error spoils training or evaluation; a warning may be harmless. ``subject`` and ``file`` are empty if the issue
    is about several subjects.
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
    """What `check_collection` found; ``str()`` gives a summary and then one line per issue."""

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
            first = f"found errors ({len(self.errors)}), the first: {self.errors[0]}"
            raise InputError(f"{self.path}: the data check {first}. All: python -m medtl_ext.data check {self.path}")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the issues as a table: severity, subject, file, problem, advice."""
        write_csv(path, pd.DataFrame(self.issues, columns=Issue._fields))


def check_collection(
    collection: Collection, tasks: Iterable[Task | str] | None = None, *, progress: bool = True
) -> IntegrityReport:
    """Read every file of a collection in full and report what would spoil training or evaluation.

    Errors: a file that is missing, unreadable, truncated or refused by `ChannelReader`; NaN in an image, infinity,
    values above 1e15; a label with fractional or undeclared values, in a lossy format, or on another grid than an
    image; a label used as an image; the same image for subjects of different splits; voxels above a metre; no training
    subject with foreground.

    Warnings: labels that are rounded; the same image for two subjects of one split, or twice in a subject; almost the
    same image (perhaps mirrored) for patients of two splits; an image of one value; a subject without foreground;
    implausible voxel sizes; patients of one institution and modality whose voxel sizes differ by more than three times.

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
    scans = for_each(lambda file: _scan(file, collection.labels), files, progress=progress)
    readable = [scan for scan in scans if scan.shape is not None]
    _compare_grids(readable)
    _find_twins(readable)
    of_many = [*_find_foreground(collection, chosen, readable), *_find_odd_sizes(readable)]
    issues = [*chain.from_iterable(scan.issues for scan in scans), *of_many]
    return IntegrityReport(collection.path, len({scan.subject.id for scan in scans}), len(scans), issues)


@dataclass
class _Scan:
    """A file of the collection, and what is kept after it was read (never the voxels)."""

    subject: Subject
    kind: Literal["image", "label"]
    name: str  # of the modality or the channels of the file, or of the label
    path: Path
    parts: list[str]  # as `read_channels` takes them
    shown: str  # the path below the collection's folder
    issues: list[Issue] = field(default_factory=list)
    shape: tuple[int, ...] | None = None  # None: the file could not be read
    affine: np.ndarray | None = None
    values: frozenset[float] | None = None  # of a label
    digest: str | None = None  # None: all voxels are equal
    thumbnail: np.ndarray | None = None

    def note(self, severity: Literal["error", "warning"], problem: str, advice: str) -> None:
        self.issues.append(Issue(severity, self.subject.id, self.shown, problem, advice))


def _list_files(collection: Collection, tasks: Sequence[Task] | None) -> list[_Scan]:
    """All files of the collection, or those that the tasks use."""
    folder = collection.path.parent
    wanted = {
        (subject.id, *used)
        for task in tasks or ()
        for subject in collection.subjects_of(task)
        for used in (
            *(("image", name) for name in subject.images if not {*channels_of(name)}.isdisjoint(task.channels)),
            ("label", collection.objectives[task.objective].label),
        )
    }
    found = []
    for subject in collection.subjects:
        channels = subject.channels()
        parts = {("image", name): [channels[one] for one in channels_of(name)] for name in subject.images}
        parts |= {("label", name): [collection.label_file(subject, name)] for name in subject.labels}
        for (kind, name), of_file in parts.items():
            path = (subject.images if kind == "image" else subject.labels)[name]
            shown = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
            if tasks is None or (subject.id, kind, name) in wanted:
                found.append(_Scan(subject, kind, name, path, of_file, shown))
    return found


def _scan(scan: _Scan, labels: Mapping[str, Mapping[str, int]]) -> _Scan:
    """Read one file and look at it by itself."""
    try:
        voxels, meta = read_channels(scan.parts, every_byte=True)
    except Unusable as error:
        scan.note("error", error.problem, error.advice)
        return scan
    scan.shape, scan.affine = voxels.shape[1:], meta["affine"]
    if scan.kind == "label" and suffix_of(scan.path) in LOSSY:
        scan.note("error", "a JPEG changes the values of a mask", "draw it again, or export it as PNG")
    if scan.kind == "image" and meta.get("mode") == "P":
        scan.note("error", "its pixels are numbers of a palette", "save it as grey or RGB")
    if np.isinf(voxels).any() or (scan.kind == "image" and np.isnan(voxels).any()):
        scan.note("error", "it holds NaN or infinite values", "replace them, or leave the subject out")
    elif scan.kind == "label":
        voxels, note = whole_labels(voxels)
        if note is not None:
            scan.note(*note)
        declared, scan.values = labels[scan.name], frozenset(np.unique(voxels).tolist())
        shown = Colour if scan.parts[0].endswith("#rgb") else "{:g}".format
        undeclared = sorted(value for value in scan.values - {0, *declared.values()} if value == round(value))
        if undeclared:
            found = ", ".join(str(shown(value)) for value in undeclared[:5]) + (", ..." if len(undeclared) > 5 else "")
            problem = f"the label holds undeclared values {found} (declared: {declared})"
            scan.note("error", problem, f"declare them under labels '{scan.name}', or correct the file")
        scan.digest = _digest(voxels) if len(scan.values) > 1 else None
    elif voxels.min() == voxels.max():
        problem = f"every voxel of the image is {voxels.flat[0]:g}"
        scan.note("warning", problem, "look at it, and leave the subject out if it is empty")
    else:
        if (largest := np.abs(voxels).max()) > LARGEST_VALUE:
            scan.note("error", f"it holds values up to {largest:.3g}, which no scanner measures", "correct the file")
        scan.digest, scan.thumbnail = _digest(voxels), thumbnail(voxels.mean(0))
    return scan


def _digest(voxels: np.ndarray) -> str:
    return joblib.hash(np.asarray(voxels[0] if len(voxels) == 1 else voxels, dtype=np.float32))


def _compare_grids(scans: Sequence[_Scan]) -> None:
    """Every image is compared with every label of its subject."""
    labels = defaultdict(list)
    for scan in scans:
        if scan.kind == "label":
            labels[scan.subject.id].append(scan)
    advice = "resample one onto the grid of the other"
    for image in scans:
        for label in labels[image.subject.id] if image.kind == "image" else ():
            against = f"of label '{label.name}'"
            if image.shape != label.shape:
                image.note("error", f"image shape {image.shape} differs from shape {label.shape} {against}", advice)
            elif not np.allclose(image.affine, label.affine, atol=SAME_AFFINE_MM):
                apart = np.abs(image.affine - label.affine).max()
                image.note("error", f"the image's affine differs from that {against} by up to {apart:.3g} mm", advice)


def _find_twins(scans: Sequence[_Scan]) -> None:
    """Note images with the same voxels, and images of two splits that are almost the same."""
    labels = {scan.digest: scan for scan in scans if scan.kind == "label" and scan.digest}
    first: dict[str, _Scan] = {}
    for scan in scans:
        if scan.kind == "label" or scan.digest is None:
            continue
        if label := labels.get(scan.digest):
            scan.note("error", f"the image is label {label.shown} of subject {label.subject.id}", "give the image")
        twin = first.setdefault(scan.digest, scan)
        if scan.subject.id != twin.subject.id:
            one, other = twin.subject.split, scan.subject.split
            severity, where = ("warning", f"both in {one}") if one == other else ("error", f"in {one} and {other}")
            problem = f"the image is identical to {twin.name} of subject {twin.subject.id} ({where})"
            scan.note(severity, problem, "list a patient once, or all its scans in one split")
        elif scan is not twin:
            scan.note("warning", f"{scan.name} is identical to {twin.name}", "give each its own file")
    by_name = defaultdict(list)
    for scan in first.values():
        by_name[scan.name].append(scan)
    for images in by_name.values():
        pairs = near_identical([scan.thumbnail for scan in images], [scan.subject.group for scan in images])
        for one, other, correlation, mirrored in sorted(pairs, key=lambda pair: -pair[2]):
            scan, twin = images[other], images[one]
            if scan.subject.split != twin.subject.split:
                where = f"{twin.shown} of subject {twin.subject.id} (in {twin.subject.split} and {scan.subject.split})"
                how = f"thumbnails{', one mirrored,' if mirrored else ''} correlate by {correlation:.3f}"
                problem = f"the image is almost the same as {where}; {how}"
                scan.note("warning", problem, "look at both: if it is one patient, give both the same 'patient'")


def _find_foreground(collection: Collection, tasks: Sequence[Task], scans: Sequence[_Scan]) -> Iterator[Issue]:
    """Note subjects without foreground; yield objectives that no training subject of an institution shows."""
    for institution, name in dict.fromkeys((task.institution, task.objective) for task in tasks):
        objective = collection.objectives[name]
        foreground = {value for group in objective.values for value in group}
        of = [scan for scan in scans if (scan.name, scan.subject.institution) == (objective.label, institution)]
        labels = [scan for scan in of if scan.values is not None]
        for scan in labels:
            if not foreground & scan.values:
                advice = f"nothing to do if {name} is absent in this patient"
                scan.note("warning", f"no voxel of objective {name}", advice)
        training = [scan for scan in labels if scan.subject.split == "train"]
        if training and not any(foreground & scan.values for scan in training):
            shown = f"training subjects of institution {institution} shows objective {name}"
            advice = "correct the objective's values, or move subjects that show it to train"
            yield Issue("error", "", "", f"none of the {len(training)} {shown}", advice)


def _find_odd_sizes(scans: Sequence[_Scan]) -> Iterator[Issue]:
    """Note impossible voxel sizes; yield axes along which the patients' sizes differ much. Pictures are skipped."""
    alike = defaultdict(list)
    for scan in scans:
        flat = scan.shape[2:] == (1,) and np.array_equal(scan.affine, np.eye(4))
        if scan.kind == "label" or flat or suffix_of(scan.path) in PICTURES:
            continue
        sizes = voxel_sizes(scan.affine)
        view = (sizes * scan.shape).max()
        impossible = not NO_MM[0] < sizes.min() <= sizes.max() < NO_MM[1]
        if impossible or sizes.max() > LARGEST_MM or view > LARGEST_VIEW_MM:
            problem = f"its header says voxels of up to {sizes.max():.3g} mm, and a length of {view / 1000:.3g} m"
            scan.note("error" if impossible else "warning", problem, "correct the header's units or spacing")
        along = sizes[io_orientation(scan.affine)[:, 0].argsort()]  # the axes of the body
        alike[scan.subject.institution, scan.name].append((along, scan.subject.id))
    for (institution, name), found in alike.items():
        for axis, where in enumerate(("left to right", "back to front", "bottom to top")):
            by_size = sorted((along[axis], subject) for along, subject in found)
            (low, one), (high, other) = by_size[0], by_size[-1]
            if high > MOST_APART * low:
                range_ = f"{low:.3g} mm in subject {one} and {high:.3g} mm in {other}"
                problem = f"from {where}, voxels of {name} are {range_}"
                advice = "correct the wrong header, or list the two protocols as two institutions"
                yield Issue("warning", "", "", f"institution {institution}: {problem}", advice)
