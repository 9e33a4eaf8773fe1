"""BIDS: segmentations among the derivatives, and the images that lie in the same space."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import (
    INSTITUTION_COLUMNS,
    SUBJECT_COLUMNS,
    Draft,
    Reading,
    clean,
    objectives,
    parse_labels,
    read_json,
    read_table,
)

_MODALITIES = {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR", "PDw": "PD", "CT": "CT"}
_LABELS = ("dseg", "mask")
_NATIVE = {None, "T1w", "orig", "individual"}  # spaces of the scanner


def read_bids(root: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Reading:
    """A BIDS dataset with derivatives, or a derivatives dataset by itself; needs ``pip install pybids``.

    Labels are ``_dseg`` (values named by the ``index`` and ``name`` of a ``dseg.tsv``) and ``_mask`` (value 1, named by
    its ``label`` or ``desc``). Images are T1w (T1CE with a ``ce`` entity), T2w, FLAIR, PDw and CT in ``anat``, of the
    label's subject, session and space; those of the label's own dataset first. Sessions of a patient stay together in a
    split. Institutions are the column ``institution`` or ``site`` of ``participants.tsv``, else the dataset's name.

    Args:
        root: the folder with ``dataset_description.json``.
        out: the collection file to write.
        **options: as `read_collection` tells.
    """
    try:
        from bids import BIDSLayout
    except ImportError as error:
        raise InputError("reading BIDS needs pybids; install it with: pip install pybids") from error
    draft = Draft(root, out, **options)
    draft.layout = "anat/sub-01_T1w.nii.gz and a derivative such as sub-01_label-lesion_mask.nii.gz"
    described = read_json(draft.root / "dataset_description.json")
    try:
        layout = BIDSLayout(draft.root, validate=False, derivatives=(draft.root / "derivatives").is_dir())
    except Exception as error:  # pybids has an exception of its own for every fault of a dataset
        raise InputError(f"{draft.root} is not a BIDS dataset: {' '.join(str(error).split())}") from error
    name = clean(str(described.get("Name") or draft.root.name))
    about = {"name": name, "license": str(described.get("License") or "")}
    draft.about = about | {"labels": {}, "objectives": {}}
    sites = _sites(draft.root / "participants.tsv")
    places: dict[tuple[str, str, str], list[Any]] = {}
    for file in layout.get(extension=[".nii", ".nii.gz"], datatype="anat"):
        if _role(file):
            places.setdefault(_place(file), []).append(file)
    for (subject, session, space), files in sorted(places.items()):
        # The label's own dataset comes first: it may hold the images as they were when the label was drawn.
        datasets = {_dataset(file, draft.root) for file in files if file.entities["suffix"] in _LABELS}
        chosen: dict[str, Any] = {}
        for file in sorted(files, key=lambda file: (_dataset(file, draft.root) not in datasets, file.path)):
            if chosen.setdefault(_role(file), file) is not file:
                problem = f"{chosen[_role(file)].filename} is there too"
                draft.note(f"sub-{subject}", Path(file.path), problem, "the file is not used")
        labels = {role: file for role, file in chosen.items() if file.entities["suffix"] in _LABELS}
        for label, file in labels.items():
            _declare(draft, label, file, layout)
        parts = [f"sub-{subject}", session and f"ses-{session}", space and f"space-{space}"]
        draft.add(
            "_".join(part for part in parts if part),
            sites.get(f"sub-{subject}") or name,
            {role: Path(file.path) for role, file in chosen.items() if role not in labels},
            {label: Path(file.path) for label, file in labels.items()},
            patient=f"sub-{subject}",
        )
    return draft.write()


def _role(file: Any) -> str:
    """The modality of an image, the name of a label, nothing for any other file."""
    entities = file.entities
    if entities["suffix"] in _LABELS:
        return clean(str(entities.get("label") or entities.get("desc") or entities["suffix"]))
    if entities["suffix"] == "T1w" and "ceagent" in entities:
        return "T1CE"
    return _MODALITIES.get(entities["suffix"], "")


def _place(file: Any) -> tuple[str, str, str]:
    """Subject, session and space, empty where there is none."""
    entities = file.entities
    space = entities.get("space")
    return entities["subject"], entities.get("session", ""), "" if space in _NATIVE else space


def _dataset(file: Any, root: Path) -> tuple[str, ...]:
    """The derivative that a file belongs to, by its folder."""
    parts = Path(file.path).relative_to(root).parts
    return parts[:2] if parts[0] == "derivatives" else ()


def _declare(draft: Draft, label: str, file: Any, layout: Any) -> None:
    """Declare a label and its objectives when it is first seen."""
    if label in draft.about["labels"]:
        return
    values = {label: 1}
    if file.entities["suffix"] == "dseg":
        own = file.entities.items()
        tables = [
            table
            for table in layout.get(suffix="dseg", extension=".tsv")
            if table.entities.items() - {("extension", ".tsv")} <= own
        ]
        if not tables:
            raise InputError(f"no dseg.tsv names the values of {file.path}; add one with columns index and name.")
        nearest = max(tables, key=lambda table: len(table.entities))  # its names hold for all files with its entities
        rows = read_table(Path(nearest.path), {"name": ("name",), "value": ("index",)})
        values = parse_labels(dict(zip(rows.name, rows.value, strict=True)), Path(nearest.path))
    part = objectives(label, values)
    draft.about["labels"] |= part["labels"]
    for name, objective in part["objectives"].items():
        draft.about["objectives"][f"{label}_{name}" if name in draft.about["objectives"] else name] = objective


def _sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    table = read_table(path, {"subject": SUBJECT_COLUMNS}, {"institution": INSTITUTION_COLUMNS})
    known = table[table.institution.str.lower() != "n/a"]  # how BIDS writes a missing value
    return dict(zip(known.subject, known.institution, strict=True))
