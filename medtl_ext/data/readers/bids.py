"""BIDS: segmentations in the derivatives, and the images in the same space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medtl_ext._validation import InputError
from medtl_ext.data.collection import read_json
from medtl_ext.data.readers._draft import Draft, Reading, clean, objectives, parse_labels, read_table

_MASKS = {"mask", "roi"}
_MODALITIES = {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR", "PDw": "PD", "CT": "CT"}
_NATIVE = {"T1w", "orig", "individual"}  # spaces of the scanner
_NO_DATA = {"code", "sourcedata", "stimuli"}  # folders whose files are not the dataset's


def read_bids(draft: Draft) -> Reading:
    """A BIDS dataset with labels beside its images or in derivatives, or a derivatives dataset by itself.

    Labels are ``_dseg`` (values named by ``index`` and ``name`` of a ``dseg.tsv``), ``_mask`` and ``_roi`` (value 1,
    named by ``label`` or ``desc``). Images are T1w (T1CE with a ``ce`` entity), T2w, FLAIR, PDw and CT. All files are
    in ``anat``. An image must have the subject, session and space of the label; images of the label's own dataset come
    first. All sessions of a patient are in one split. The institution is the column ``institution`` or ``site`` of
    ``participants.tsv``, or else the dataset's name.

    Args:
        draft: its root is the folder with ``dataset_description.json``.
    """
    described = read_json(draft.root / "dataset_description.json")
    name = clean(str(described.get("Name") or draft.root.name))
    sites = _sites(draft.root / "participants.tsv")
    tables = sorted(draft.root.rglob("*dseg.tsv"))
    files = [file for path in draft.find_images() if (file := _parse(path, draft.root))]
    # The label's own dataset comes first: it may hold the very images on which the label was drawn.
    own = {(file.scan, file.dataset) for file in files if file.kind == "labels"}
    files.sort(key=lambda file: (file.scan, (file.scan, file.dataset) not in own, file.path))
    values: dict[str, dict[str, Any]] = {}
    for file in files:
        of = {"institution": sites.get(file.scan[0], name), "patient": file.scan[0]}
        draft.add("_".join(filter(None, file.scan)), file.kind, file.name, file.path, **of)
        if file.kind == "labels" and (here := _values(file, tables)) != values.setdefault(file.name, here):
            both = f"{here}, but elsewhere {values[file.name]}; give different values different names (label or desc)"
            raise InputError(f"{file.path}: the values of label '{file.name}' are {both}.")
    about: dict[str, Any] = {"labels": {}, "objectives": {}}
    for label, named in values.items():
        part = objectives(label, named)
        about["labels"] |= part["labels"]
        for key, objective in part["objectives"].items():
            about["objectives"][f"{label}_{key}" if key in about["objectives"] else key] = objective
    layout = (
        "anat/sub-01_T1w.nii.gz and a label such as sub-01_label-lesion_roi.nii.gz or sub-01_label-lesion_mask.nii.gz, "
        "beside it or in the same folder of a derivative"
    )
    return draft.write(layout, name=name, license=str(described.get("License") or ""), **about)


class _File(NamedTuple):
    """An image or label, with its subject, session and space (or empty), and its dataset."""

    path: Path
    kind: Literal["images", "labels"]
    name: str
    scan: tuple[str, str, str]
    dataset: tuple[str, ...]


def _entities(path: Path) -> dict[str, str]:
    """Such as ``{"sub": "01", "label": "lesion", "suffix": "mask"}``."""
    *pairs, suffix = path.name.partition(".")[0].split("_")
    return {key: value for key, _, value in (pair.partition("-") for pair in pairs)} | {"suffix": suffix}


def _parse(path: Path, root: Path) -> _File | None:
    """Read the names of a file and its folders; None if it is neither image nor label."""
    entities, folders = _entities(path), path.relative_to(root).parts[:-1]
    suffix = entities["suffix"]
    kind = "labels" if suffix in {"dseg", *_MASKS} else "images"
    name = clean(entities.get("label") or entities.get("desc") or suffix)
    if kind == "images":
        name = "T1CE" if suffix == "T1w" and "ce" in entities else _MODALITIES.get(suffix)
    if name is None or "sub" not in entities or folders[-1:] != ("anat",) or _NO_DATA & {*folders}:
        return None
    session = f"ses-{entities['ses']}" if "ses" in entities else ""
    space = f"space-{entities['space']}" if entities.get("space", "orig") not in _NATIVE else ""
    dataset = folders[:2] if folders[0] == "derivatives" else ()
    return _File(path, kind, name, (f"sub-{entities['sub']}", session, space), dataset)


def _values(file: _File, tables: Sequence[Path]) -> dict[str, Any]:
    """The values of a label: 1 for a mask; otherwise from the nearest table that applies by folder and entities."""
    entities = _entities(file.path)
    if entities["suffix"] in _MASKS:
        return {file.name: 1}
    above = [path for path in tables if file.path.is_relative_to(path.parent)]
    hold = [path for path in above if _entities(path).items() <= entities.items()]
    if not hold:
        raise InputError(f"no dseg.tsv names the values of {file.path}; add one with columns index and name.")
    nearest = max(hold, key=lambda path: (len(path.parts), len(_entities(path))))
    rows = read_table(nearest, ("name", "index"))
    return parse_labels(dict(zip(rows.name, rows["index"], strict=True)), nearest)


def _sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    table = read_table(path, ("subject",), ("institution",))
    known = table[~table.institution.str.lower().isin(("", "n/a"))]  # how BIDS writes a missing value
    return dict(zip(known.subject, known.institution, strict=True))
