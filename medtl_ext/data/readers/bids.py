"""BIDS: segmentations among the derivatives, and the images that lie in the same space."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from medtl_ext._validation import InputError
from medtl_ext.data.collection import PathLike, read_json
from medtl_ext.data.readers._draft import (
    INSTITUTION_COLUMNS,
    SUBJECT_COLUMNS,
    Draft,
    Reading,
    clean,
    objectives,
    parse_labels,
    read_table,
)

_MODALITIES = {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR", "PDw": "PD", "CT": "CT"}
_LABELS = ("dseg", "mask")
_NATIVE = {None, "T1w", "orig", "individual"}  # spaces of the scanner


def read_bids(root: PathLike, out: PathLike, **options: Any) -> Reading:
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
    described = read_json(draft.root / "dataset_description.json")
    try:
        layout = BIDSLayout(draft.root, validate=False, derivatives=(draft.root / "derivatives").is_dir())
    except Exception as error:  # pybids has an exception of its own for every fault of a dataset
        raise InputError(f"{draft.root} is not a BIDS dataset: {' '.join(str(error).split())}") from error
    about = {
        "name": clean(str(described.get("Name") or draft.root.name)),
        "license": str(described.get("License") or ""),
        "labels": {},
        "objectives": {},
    }
    sites = _sites(draft.root / "participants.tsv")
    images = layout.get(extension=[".nii", ".nii.gz"], datatype="anat")
    used = sorted((file for file in images if _role(file)), key=_place)
    for (subject, session, space), group in groupby(used, key=_place):
        files = list(group)
        # The label's own dataset comes first: it may hold the images as they were when the label was drawn.
        datasets = {_dataset(file, draft.root) for file in files if file.entities["suffix"] in _LABELS}
        chosen: dict[str, Any] = {}
        for file in sorted(files, key=lambda file: (_dataset(file, draft.root) not in datasets, file.path)):
            if chosen.setdefault(_role(file), file) is not file:
                problem = f"{chosen[_role(file)].filename} is there too"
                draft.note(f"sub-{subject}", Path(file.path), problem, "the file is not used")
        paths: dict[bool, dict[str, Path]] = {True: {}, False: {}}  # of labels, and of images
        for role, file in chosen.items():
            paths[file.entities["suffix"] in _LABELS][role] = Path(file.path)
            if file.entities["suffix"] in _LABELS and role not in about["labels"]:
                _declare(about, role, file, layout)
        parts = [f"sub-{subject}", session and f"ses-{session}", space and f"space-{space}"]
        institution = sites.get(f"sub-{subject}") or about["name"]
        draft.add("_".join(filter(None, parts)), institution, paths[False], paths[True], patient=f"sub-{subject}")
    return draft.write("anat/sub-01_T1w.nii.gz and a derivative such as sub-01_label-lesion_mask.nii.gz", **about)


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


def _declare(about: dict[str, Any], label: str, file: Any, layout: Any) -> None:
    """Declare a label and its objectives."""
    values = {label: 1}
    if file.entities["suffix"] == "dseg":
        own = file.entities.items()
        tables = layout.get(suffix="dseg", extension=".tsv")
        tables = [table for table in tables if table.entities.items() - {("extension", ".tsv")} <= own]
        if not tables:
            raise InputError(f"no dseg.tsv names the values of {file.path}; add one with columns index and name.")
        nearest = Path(max(tables, key=lambda table: len(table.entities)).path)  # holds for all with its entities
        rows = read_table(nearest, {"name": ("name",), "value": ("index",)})
        values = parse_labels(dict(zip(rows.name, rows.value, strict=True)), nearest)
    part = objectives(label, values)
    about["labels"] |= part["labels"]
    for name, objective in part["objectives"].items():
        about["objectives"][f"{label}_{name}" if name in about["objectives"] else name] = objective


def _sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    table = read_table(path, {"subject": SUBJECT_COLUMNS}, {"institution": INSTITUTION_COLUMNS})
    known = table[table.institution.str.lower() != "n/a"]  # how BIDS writes a missing value
    return dict(zip(known.subject, known.institution, strict=True))
