"""Challenges whose files are told by their names: FeTS, BraTS, iSeg and WMH."""

from __future__ import annotations

import re
from typing import Any

import nibabel
import numpy as np

from medtl_ext._validation import InputError
from medtl_ext.data.collection import PathLike
from medtl_ext.data.readers._draft import Draft, Reading, objectives

_FIRST = {"t1": "T1", "t1ce": "T1CE", "t2": "T2", "flair": "FLAIR"}  # BraTS until 2022
_SECOND = {"t1n": "T1", "t1c": "T1CE", "t2w": "T2", "t2f": "FLAIR"}  # from 2023 on
_TIMEPOINT = re.compile(r"(BraTS-\w+-\d{5})-\d{3}", re.IGNORECASE)  # 2023: patient and visit

# A scanner of Amsterdam is no plain number; some copies have its scanners at the top.
_SCANNER = r"(?<!Amsterdam/)(?P<scanner>GE3T|GE1T5|Philips[^/]*)"
_SITE = rf"(?P<site>Utrecht|Singapore|Amsterdam(?:/[^/]*[^/\d][^/]*)?|{_SCANNER})"


def read_fets(root: PathLike, out: PathLike, *, et_label: int = 4, **options: Any) -> Reading:
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
    return _read_tumours(draft, "FeTS", "Gliomas on MRI of many institutions (FeTS challenge)", _FIRST, et_label)


def read_brats(root: PathLike, out: PathLike, *, et_label: int | None = None, **options: Any) -> Reading:
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
    return _read_tumours(draft, "BraTS", "Gliomas on MRI (BraTS challenge)", _FIRST | _SECOND, et_label)


def _read_tumours(draft: Draft, name: str, description: str, roles: dict[str, str], et: int | None) -> Reading:
    found = draft.group(rf"(?:.*/)?(?P<subject>[^/]+)[_-](?P<role>{'|'.join(roles)}|seg)")
    present = {role for _, files in found for role in files}
    first, second = sorted(present & set(_FIRST)), sorted(present & set(_SECOND))
    if first and second:
        raise InputError(
            f"{draft.root} mixes the names of BraTS until 2022 ({', '.join(first)}) and from 2023 on "
            f"({', '.join(second)}), whose labels differ; read one of them at a time."
        )
    et = et or (3 if second else 4)
    for match, files in found:
        visit = _TIMEPOINT.fullmatch(match["subject"])
        images = {modality: files.get(role) for role, modality in (_SECOND if second else _FIRST).items()}
        labels = {"tumour": files.get("seg")}
        draft.add(match["subject"], name, images, labels, patient=visit[1] if visit else None)
    _check_convention(draft, et)
    asked = {"ED": [2], "ET": [et], "NCR": [1], "FeTS": [2, et, 1]}
    return draft.write(
        f"SUBJECT/SUBJECT_{{{','.join(roles)},seg}}.nii.gz",
        name=name,
        description=description,
        license="as agreed with the provider (Synapse)",
        labels={"tumour": {"NCR": 1, "ED": 2, "ET": et}},
        objectives={objective: {"label": "tumour", "values": values} for objective, values in asked.items()},
    )


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


def read_iseg(root: PathLike, out: PathLike, **options: Any) -> Reading:
    """iSeg-2019: ``subject-1-T1``, ``-T2`` and ``-label`` as Analyze pairs (``.hdr`` and ``.img``) or NIfTI.

    Args:
        root: ``iSeg-2019-Training`` or a folder above it; iSeg-2017 has the same layout.
        out: the collection file to write.
        **options: as `read_collection` tells. The institution is ``iSeg`` unless ``institutions`` is given.
    """
    draft = Draft(root, out, **options)
    for match, files in draft.group(r"(?:.*/)?(?P<subject>subject-\d+)-(?P<role>t1|t2|label)"):
        images = {"T1": files.get("t1"), "T2": files.get("t2")}
        draft.add(match["subject"], "iSeg", images, {"tissue": files.get("label")})
    return draft.write(
        "subject-1-T1, subject-1-T2 and subject-1-label, each .hdr and .img",
        name="iSeg",
        description="Brain MRI of infants of six months (iSeg-2019 challenge)",
        license="as agreed with the provider",
        **objectives("tissue", {"CSF": 10, "GM": 150, "WM": 250}),
    )


def read_wmh(root: PathLike, out: PathLike, **options: Any) -> Reading:
    """The WMH challenge: ``Utrecht/0/pre/FLAIR.nii.gz``, ``pre/T1.nii.gz`` and ``wmh.nii.gz``.

    The preprocessed images are read (``pre``), not the original ones. Institutions are the sites, with the scanner
    where the folder names one: ``Utrecht``, ``Singapore``, ``Amsterdam-GE3T``. Patients below a folder ``test`` are the
    test split. Value 2 (other pathology) is declared, but not part of the objective: it counts as background.

    Args:
        root: the folder with ``training`` and ``test``, or one of them.
        out: the collection file to write.
        **options: as `read_collection` tells.
    """
    draft = Draft(root, out, **options)
    found = draft.group(
        rf"(?P<part>.*/|)(?P<subject>{_SITE}/[^/]+)/(?P<role>pre/FLAIR|pre/T1|wmh)",
        ignore=r"(?:.*/)?(?:orig|pre|additional_annotations)/.*",
    )
    for match, files in found:
        site = f"Amsterdam/{match['site']}" if match["scanner"] else match["site"]
        subject, institution = (name.replace("/", "-").replace(" ", "_") for name in (match["subject"], site))
        images = {"FLAIR": files.get("pre/flair"), "T1": files.get("pre/t1")}
        split = "test" if "test" in match["part"].lower().split("/") else None
        draft.add(subject, institution, images, {"wmh": files.get("wmh")}, split=split)
    return draft.write(
        "Utrecht/0/pre/FLAIR.nii.gz, Utrecht/0/pre/T1.nii.gz and Utrecht/0/wmh.nii.gz",
        name="WMH",
        description="White-matter hyperintensities on MRI of three sites (Kuijf et al. 2019)",
        license="as agreed with the provider (doi:10.34894/AECRSD)",
        labels={"wmh": {"WMH": 1, "Other": 2}},
        objectives={"WMH": {"label": "wmh", "values": [1]}},
    )
