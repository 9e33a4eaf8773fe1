"""Brain tumours: FeTS 2021 and 2022, and BraTS from 2020 to 2023."""

from __future__ import annotations

import os
import re
from typing import Any

import nibabel
import numpy as np

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import Draft, Reading

_FIRST = {"t1": "T1", "t1ce": "T1CE", "t2": "T2", "flair": "FLAIR"}  # until 2022
_SECOND = {"t1n": "T1", "t1c": "T1CE", "t2w": "T2", "t2f": "FLAIR"}  # from 2023 on
_TIMEPOINT = re.compile(r"(BraTS-\w+-\d{5})-\d{3}", re.IGNORECASE)  # 2023: patient and visit


def read_fets(
    root: str | os.PathLike[str], out: str | os.PathLike[str], *, et_label: int = 4, **options: Any
) -> Reading:
    """FeTS 2021 and 2022: a folder per subject, and the institutions in a table.

    Args:
        root: ``MICCAI_FeTS2022_TrainingData`` or a folder above it: ``SUBJECT/SUBJECT_t1``, ``_t1ce``, ``_t2``,
            ``_flair`` and ``_seg`` ``.nii.gz``.
        out: the collection file to write.
        et_label: the value of enhancing tumour; NCR is 1 and oedema (ED) 2.
        **options: as `read_collection` tells. ``institutions`` is ``partitioning_1.csv`` (by site) if not given;
            ``partitioning_2.csv`` divides the large sites further by tumour size.
    """
    draft = Draft(root, out, **options)
    if draft.institutions is None:
        tables = [path for path in draft.root.rglob("*.[cC][sS][vV]") if path.name.lower() == "partitioning_1.csv"]
        if len(tables) != 1:
            raise InputError(
                f"{len(tables)} files partitioning_1.csv below {draft.root}, but one has to name the institutions; "
                "check the root, or give the table with institutions."
            )
        draft.institutions = tables[0]
    return _read(draft, "FeTS", "Gliomas on MRI of many institutions (FeTS challenge)", _FIRST, et_label)


def read_brats(
    root: str | os.PathLike[str], out: str | os.PathLike[str], *, et_label: int | None = None, **options: Any
) -> Reading:
    """BraTS: ``BraTS20_Training_001_t1ce.nii.gz`` (2020, 2021) or ``BraTS-GLI-00000-000-t1c.nii.gz`` (2023).

    Visits of one patient in the 2023 names (the last three digits) stay together in a split.

    Args:
        root: a folder with the subjects' folders, at any depth, of one naming.
        out: the collection file to write.
        et_label: the value of enhancing tumour: 3 in the names of 2023, else 4, if not given; NCR is 1, oedema (ED) 2.
        **options: as `read_collection` tells. The data do not name institutions: all are ``BraTS`` unless
            ``institutions`` is given.
    """
    draft = Draft(root, out, **options)
    return _read(draft, "BraTS", "Gliomas on MRI (BraTS challenge)", _FIRST | _SECOND, et_label)


def _read(draft: Draft, name: str, description: str, roles: dict[str, str], et: int | None) -> Reading:
    draft.layout = f"SUBJECT/SUBJECT_{{{','.join(roles)},seg}}.nii.gz"
    found = draft.group(rf"(?:.*/)?(?P<subject>[^/]+)[_-](?P<role>{'|'.join(roles)}|seg)")
    second = {role for _, files in found for role in files if role in _SECOND}
    first = {role for _, files in found for role in files if role in _FIRST}
    if first and second:
        raise InputError(
            f"{draft.root} mixes the names of BraTS until 2022 ({', '.join(sorted(first))}) and from 2023 on "
            f"({', '.join(sorted(second))}), whose labels differ; read one of them at a time."
        )
    et = et or (3 if second else 4)
    modalities = _SECOND if second else _FIRST
    for match, files in found:
        subject = match["subject"]
        visit = _TIMEPOINT.fullmatch(subject)
        images = {modality: files.get(role) for role, modality in modalities.items()}
        draft.add(subject, name, images, {"tumour": files.get("seg")}, patient=visit[1] if visit else None)
    _check_convention(draft, et)
    draft.about = {
        "name": name,
        "description": description,
        "license": "as agreed with the provider (Synapse)",
        "labels": {"tumour": {"NCR": 1, "ED": 2, "ET": et}},
        "objectives": {
            "ED": {"label": "tumour", "values": [2]},
            "ET": {"label": "tumour", "values": [et]},
            "NCR": {"label": "tumour", "values": [1]},
            "FeTS": {"label": "tumour", "values": [2, et, 1]},
        },
    }
    return draft.write()


def _check_convention(draft: Draft, et: int) -> None:
    """Refuse labels of the other convention, looking until a label file shows the value of ET in either."""
    other = 7 - et
    for entry in draft.subjects:
        try:
            values = np.unique(np.asanyarray(nibabel.load(entry["labels"]["tumour"]).dataobj))
        except Exception:  # a broken file fails in a dozen ways, and the data check names it
            continue
        if other in values:
            raise InputError(
                f"{entry['labels']['tumour']} holds the value {other}, where {et} was expected for ET (ET is 4 until "
                f"2022 and 3 from 2023 on); if ET is {other} in these files, give et_label {other}."
            )
        if et in values:
            return
