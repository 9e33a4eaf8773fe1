"""Datasets that a list describes: a Decathlon or MONAI ``dataset.json``, nnU-Net's, or a plain table."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from medtl_ext._validation import InputError
from medtl_ext.data.collection import SPLITS, PathLike, read_json
from medtl_ext.data.files import FORMATS, NIFTI, PICTURES
from medtl_ext.data.readers._draft import (
    LEFT_OUT,
    Draft,
    Reading,
    clean,
    objectives,
    parse_labels,
    read_table,
    stem,
)

_SECTIONS = {"training": "train", "validation": "val", "testing": "test", "test": "test"}
_Text = Annotated[str | None, Field(coerce_numbers_to_str=True)]
_Files = Annotated[list[str], BeforeValidator(lambda files: [files] if isinstance(files, str) else files)]


class _Case(BaseModel):
    """An entry of a list."""

    image: Annotated[_Files, Field(min_length=1)]
    label: str | None = None
    split: str
    subject: _Text = None
    institution: _Text = None
    patient: _Text = None
    fold: Any = None


def read_datalist(
    draft: Draft,
    *,
    file: PathLike | None = None,
    labels: Mapping[str, int] | None = None,
    modalities: Sequence[str] | None = None,
) -> Reading:
    """A Decathlon task or a MONAI datalist: ``training``, ``validation`` and ``test`` list ``image`` and ``label``.

    ``image`` is a list with one file per modality, or one file that holds all modalities as channels
    (Task01_BrainTumour, Task05_Prostate). If several sections have labelled cases, the sections are the splits. An
    entry may name its ``subject`` and ``institution``; by default these are the name of its image and of the list.

    Args:
        draft: its root is the folder that paths in the list start from.
        file: the list; by default ``dataset.json`` in the root.
        labels: values by name; by default ``labels`` of the list.
        modalities: in the order of the images, or of the channels in an image; by default ``modality`` of the list.
    """
    path = draft.root / "dataset.json" if file is None else Path(file)
    content = read_json(path)
    labels = labels or content.get("labels")
    if not labels:
        raise InputError(f"{path} names no labels; give them with their values, such as --labels lesion=1.")
    about = _about(content, clean(str(content.get("name") or path.stem)), parse_labels(labels, path))
    names = _parse_modalities(modalities or content.get("modality"), path)
    cases = [
        _parse_case(entry, split, f"{path}: {section}")
        for section, split in _SECTIONS.items()
        for entry in content.get(section) or []
    ]
    if all(len(case.image) == 1 for case in cases):
        names = ["+".join(names)]
    # Without labelled cases for validation, train is divided into train and val.
    fixed = SPLITS if any(case.split == "val" and case.label for case in cases) else ("test",)
    for case, subject in zip(cases, _subjects(cases), strict=True):
        images = [draft.root / image for image in case.image]
        if len(images) != len(names):
            draft.note(subject, "", f"{len(images)} images for {len(names)} modalities", LEFT_OUT)
            continue
        of = {"institution": case.institution or about["name"], "patient": case.patient, "place": str(images)}
        of["split"] = case.split if case.split in fixed else None
        draft.add(subject, "labels", "label", draft.root / case.label if case.label else None, **of)
        for name, image in zip(names, images, strict=True):
            draft.add(subject, "images", name, image, **of)
    if any(case.fold is not None for case in cases):
        draft.note("", path, "the list's own folds are not used", "draw splits or folds")
    return draft.write("entries with image and label under training", **about)


def _about(content: Mapping[str, Any], name: str, labels: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """The collection that a ``dataset.json`` describes, without its subjects."""
    return {
        "name": name,
        "description": str(content.get("description") or ""),
        "license": str(content.get("licence") or content.get("license") or "as agreed with the provider"),
        **objectives("label", labels),
    }


def _parse_modalities(listed: Any, path: Path) -> list[str]:
    """Names by channel, from ``{"0": "T1", "1": "T2"}`` or a list."""
    try:
        names = [listed[number] for number in sorted(listed, key=int)] if isinstance(listed, Mapping) else list(listed)
        names = [clean(name) for name in names]
    except (AttributeError, TypeError, ValueError):
        names = []
    if not names or isinstance(listed, str) or len(set(names)) < len(names):
        raise InputError(f"{path} must give every modality its own name, such as T1; found {listed!r}.")
    return names


def _parse_case(entry: Any, split: str, where: str) -> _Case:
    """Read an entry; in the Decathlon, cases without label are plain paths."""
    try:
        return _Case.model_validate((entry if isinstance(entry, dict) else {"image": entry}) | {"split": split})
    except ValidationError as error:
        raise InputError(f"{where} must hold the paths of 'image' and 'label' files; found {entry!r}.") from error


def _subjects(cases: Sequence[_Case]) -> list[str]:
    """The entries' own names, or those of their first image, with folders if the names alone are not unique."""
    paths = [Path(case.image[0]) for case in cases]
    short = [case.subject or stem(path) for case, path in zip(cases, paths, strict=True)]
    if len(set(short)) == len(short):
        return short
    long = [path.with_name(stem(path)).as_posix().replace("/", "_") for path in paths]
    return [case.subject or name for case, name in zip(cases, long, strict=True)]


def read_nnunet(draft: Draft) -> Reading:
    """A dataset in nnU-Net's raw format, version 1 or 2: ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``.

    ``file_ending`` may be any format that can be read. If a case has one colour picture only (``_0000``), its colours
    are the channels. If there is ``labelsTs``, ``imagesTs`` is the test split. A region (several values under one name)
    becomes an objective that merges the values. The value ``ignore`` is declared but no objective, so it counts as
    background.

    Args:
        draft: its root is the dataset's folder, such as ``Dataset005_Prostate``. All subjects are of one institution,
            the dataset's name, unless ``institutions`` is given.
    """
    path = draft.root / "dataset.json"
    content = read_json(path)
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending.lower() not in FORMATS:
        known = f"expected one of {', '.join(FORMATS)}: convert the files first"
        raise InputError(f"{path}: file_ending is '{ending}'; {known}.")
    modalities = _parse_modalities(content.get("channel_names") or content.get("modality"), path)
    values = parse_labels(content.get("labels") or {}, path)
    ignored = values.pop("ignore", None)
    about = _about(content, clean(re.sub(r"^(Dataset|Task)\d+_", "", draft.root.name)), values)
    if ignored is not None:
        about["labels"]["label"]["ignore"] = ignored
        draft.note("", path, f"value {ignored} is 'ignore', which a collection cannot express", "it is background")
    roles = {"": ("labels", "label")} | {f"_{number:04d}": ("images", name) for number, name in enumerate(modalities)}
    labels_or_images = r"(?:(?P<images>images)|labels)(?P<place>T[rs])"
    pattern = rf"{labels_or_images}/(?P<subject>.+?)(?P<role>(?(images)_\d{{4}}|))"
    found = draft.match(pattern, formats=NIFTI if ending.lower() in NIFTI else [ending.lower()])
    if ending.lower() in PICTURES and {match["role"] for match, _ in found} <= {"", "_0000"}:
        modalities = ["+".join(modalities)]
        roles["_0000"] = ("images", modalities[0])
    for match, file in found:
        if match["role"] not in roles:
            draft.note(match["subject"], file["path"], "the channel is not in dataset.json", "the file is not used")
            continue
        split = "test" if match["place"].lower() == "ts" else None
        draft.add(match["subject"], *roles[match["role"]], **file, institution=about["name"], split=split)
    return draft.write(f"imagesTr/CASE_0000{ending} and labelsTr/CASE{ending}", modalities, **about)


def read_csv(draft: Draft, *, file: PathLike | None = None, labels: Mapping[str, int] | None = None) -> Reading:
    """A table with the columns subject, institution, modality, image and label, and optionally split and patient.

    There is one row per image. All rows of a subject must agree on institution, split, patient and label; empty cells
    are allowed if another row has the value. Columns are separated by commas, semicolons or tabs.

    Args:
        draft: its root is the folder that paths in the table start from.
        file: the table; the only CSV file in the root if not given.
        labels: the values in the label files by name, such as ``{"lesion": 1}``; required.
    """
    tables = [Path(file)] if file is not None else sorted(draft.root.glob("*.csv"))
    if len(tables) != 1:
        raise InputError(f"{len(tables)} CSV files in {draft.root}; give the table with --file.")
    if not labels:
        raise InputError("a table does not say what the label values mean; give --labels, such as lesion=1.")
    path = tables[0]
    table = read_table(path, ("subject", "institution", "modality", "image", "label"), ("split", "patient"))
    table = table.assign(modality=table.modality.map(clean))
    for subject, rows in table.groupby("subject", sort=False):
        known = {column: sorted({*rows[column]} - {""}) for column in ("institution", "label", "split", "patient")}
        for column, values in known.items():
            if len(values) > 1:
                raise InputError(f"{path}: subject '{subject}' has several values of {column}: {values}; keep one.")
        twice = sorted(rows.modality[rows.modality.duplicated()])
        if twice or not subject:
            problem = f"two images of {twice[0]}" if subject else "rows that name no subject"
            draft.note(subject, path, problem, LEFT_OUT)
            continue
        of = {column: "".join(values) for column, values in known.items()}
        label = of.pop("label")
        draft.add(subject, "labels", "label", draft.root / label if label else None, **of)
        for row in rows.itertuples():
            draft.add(subject, "images", row.modality, draft.root / row.image if row.image else None, **of)
    about = {"name": clean(path.stem), "license": "", **objectives("label", parse_labels(labels, path))}
    return draft.write("rows with subject, institution, modality, image and label", **about)
