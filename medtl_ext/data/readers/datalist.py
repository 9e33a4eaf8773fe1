"""Lists in JSON: the Medical Segmentation Decathlon's ``dataset.json`` and MONAI datalists, which share their form."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import Draft, Reading, clean, objectives, parse_labels, read_json, stem

_SECTIONS = {"training": "train", "validation": "val", "testing": "test", "test": "test"}


def read_datalist(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    file: str | os.PathLike[str] | None = None,
    labels: Mapping[str, int] | None = None,
    modalities: Sequence[str] | None = None,
    **options: Any,
) -> Reading:
    """A Decathlon task or a MONAI datalist: ``training``, ``validation`` and ``test`` list ``image`` and ``label``.

    ``image`` is one file, or a list with one file a modality. Where labelled cases are in several sections, the
    sections are the splits. An entry may name its ``subject`` and ``institution``; otherwise its image names it, and
    the list is the institution.

    Args:
        root: the folder that paths in the list start from.
        out: the collection file to write.
        file: the list; ``dataset.json`` in the root if not given.
        labels: values by name; those of the list (``labels``) if not given.
        modalities: in the order of the images; those of the list (``modality``) if not given.
        **options: as `read_collection` tells.

    Raises:
        InputError: also where several modalities share one 4D file, as in Task01_BrainTumour and Task05_Prostate: a
            collection takes one 3D file a modality.
    """
    draft = Draft(root, out, **options)
    path = draft.root / "dataset.json" if file is None else Path(file)
    content = read_json(path)
    draft.layout = "entries with image and label under training"
    draft.about = _about(content, path, labels)
    names = parse_modalities(modalities or content.get("modality"), path)
    sections = [(key, entry) for key in _SECTIONS for entry in content.get(key) or []]
    cases = [_case(entry, f"{path}: {key}") for key, entry in sections]
    splits = [_SECTIONS[key] for key, _ in sections]
    fixed = {"test"}  # where no labelled cases are for validation, train is shared out
    if any(split == "val" and case.get("label") for split, case in zip(splits, cases, strict=True)):
        fixed = {"train", "val", "test"}
    for case, split, subject in zip(cases, splits, _subjects(cases), strict=True):
        images = [draft.root / image for image in case["image"]]
        if not draft.subjects:
            _refuse_channels(images, names, path, draft.root)
        if len(images) != len(names):
            draft.note(subject, "", f"{len(images)} images for {len(names)} modalities", "the subject is left out")
            continue
        target = {"label": draft.root / case["label"] if case.get("label") else None}
        institution = str(_given(case, "institution", draft.about["name"]))
        files = dict(zip(names, images, strict=True))
        patient = _given(case, "patient", "") or None
        draft.add(
            subject,
            institution,
            files,
            target,
            split=split if split in fixed else None,
            patient=None if patient is None else str(patient),
        )
    if any("fold" in case for case in cases):
        draft.note("", path, "the list's own folds are not used", "draw splits or folds")
    return draft.write()


def _about(content: Mapping[str, Any], path: Path, labels: Mapping[str, int] | None) -> dict[str, Any]:
    """Everything about the collection but its subjects."""
    values = labels or content.get("labels")
    if not values:
        raise InputError(f"{path} names no labels; give labels with their values, such as lesion=1.")
    return {
        "name": clean(str(content.get("name") or path.stem)),
        "description": str(content.get("description") or ""),
        "license": str(content.get("licence") or content.get("license") or "as agreed with the provider"),
        **objectives("label", parse_labels(values, path)),
    }


def parse_modalities(listed: Any, path: Path) -> list[str]:
    """Names by channel, from ``{"0": "T1", "1": "T2"}`` or a list."""
    try:
        names = [listed[number] for number in sorted(listed, key=int)] if isinstance(listed, Mapping) else list(listed)
        names = [clean(name) for name in names]
    except (AttributeError, TypeError, ValueError):
        names = []
    if not names or isinstance(listed, str) or len(set(names)) < len(names):
        raise InputError(f"{path} must name every modality, each differently, such as T1; found {listed!r}.")
    return names


def _case(entry: Any, where: str) -> dict[str, Any]:
    """An entry as a mapping whose image is a list; unlabelled cases are plain paths in the Decathlon."""
    case = dict(entry) if isinstance(entry, Mapping) else {"image": entry}
    case["image"] = [case["image"]] if isinstance(case.get("image"), str) else case.get("image")
    files = [*(case["image"] if isinstance(case["image"], list) else [None]), case.get("label") or ""]
    if len(files) < 2 or not all(isinstance(file, str) for file in files):
        raise InputError(f"{where} must hold the paths of 'image' and 'label' files; found {entry!r}.")
    return case


def _subjects(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """The entries' own names, else their first image's, with its folders where names alone are not unique."""
    paths = [Path(case["image"][0]) for case in cases]
    names = [str(_given(case, "subject", stem(path))) for case, path in zip(cases, paths, strict=True)]
    if len(set(names)) == len(names):
        return names
    long = [path.with_name(stem(path)).as_posix().replace("/", "_") for path in paths]
    return [str(_given(case, "subject", name)) for case, name in zip(cases, long, strict=True)]


def _given(case: Mapping[str, Any], key: str, default: str) -> Any:
    """What an entry says, if it says anything: 0 is a name too."""
    value = case.get(key)
    return default if value is None or value == "" else value


def _refuse_channels(images: Sequence[Path], names: Sequence[str], path: Path, root: Path) -> None:
    """Refuse several modalities in one file, as the names or the header of an image tell."""
    shape: tuple[int, ...] = ()
    with contextlib.suppress(Exception):  # missing or broken, which is said elsewhere
        shape = nibabel.load(images[0]).shape
    if len(images) == 1 and (len(names) > 1 or max(shape[3:], default=1) > 1):
        raise InputError(
            f"{path}: {images[0].name} (shape {shape}) holds several modalities in one file ({', '.join(names)}), but "
            "a collection takes one 3D file a modality. Write every channel to a file of its own, such as by nnU-Net's "
            f"'nnUNetv2_convert_MSD_dataset -i {root}', and read the result as nnunet."
        )
