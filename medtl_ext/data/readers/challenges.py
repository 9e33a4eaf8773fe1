"""Challenges whose files have fixed names: FeTS, BraTS, iSeg and WMH."""

import re
from collections.abc import Mapping

from medtl_ext._validation import InputError, require_choice
from medtl_ext.data.files import for_each
from medtl_ext.data.readers._draft import Draft, Reading, held_values, objectives, parse_labels

_FIRST = {"t1": "T1", "t1ce": "T1CE", "t2": "T2", "flair": "FLAIR"}  # BraTS until 2022
_SECOND = {"t1n": "T1", "t1c": "T1CE", "t2w": "T2", "t2f": "FLAIR"}  # from 2023 on
_NAME = re.compile(r"(?P<patient>BraTS-(?P<code>[A-Z]+)-\d{5})(?:-\d{3})?", re.IGNORECASE)  # from 2023 on

# What the label values mean, by challenge and first year. If several fit the files, the first is taken, but only if all
# agree on the values that occur.
CHALLENGES = {
    "GLI-2023": {"NCR": 1, "ED": 2, "ET": 3},
    "GLI-2024": {"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4},  # after treatment
    "GLI-2017": {"NCR": 1, "ED": 2, "ET": 4},
    "SSA-2023": {"NCR": 1, "ED": 2, "ET": 3},
    "MEN-2023": {"NETC": 1, "SNFH": 2, "ET": 3},
    "MET-2023": {"NETC": 1, "SNFH": 2, "ET": 3},
    "MET-2025": {"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4},
    "PED-2023": {"NC": 1, "ED": 2, "ET": 3},
    "PED-2024": {"ET": 1, "NET": 2, "CC": 3, "ED": 4},
}
_SAME = {"NETC": "NCR", "SNFH": "ED"}  # new names of the same class

# Amsterdam has folders for scanners, whose names are not plain numbers; some copies have them at the top.
_SCANNER = r"(?<!Amsterdam/)(?P<scanner>GE3T|GE1T5|Philips[^/]*)"
_SITE = rf"(?P<site>Utrecht|Singapore|Amsterdam(?:/[^/]*[^/\d][^/]*)?|{_SCANNER})"


def read_fets(draft: Draft, *, labels: Mapping[str, int] | None = None) -> Reading:
    """FeTS 2021 and 2022: a folder per subject, and the institutions in a table.

    Args:
        draft: its root is ``MICCAI_FeTS2022_TrainingData`` or a folder above it: ``SUBJECT/SUBJECT_t1``, ``_t1ce``,
            ``_t2``, ``_flair`` and ``_seg`` ``.nii.gz``. By default ``institutions`` is ``partitioning_1.csv`` (by
            site); ``partitioning_2.csv`` also divides the large sites by tumour size.
        labels: values by name, if they are not 1 NCR, 2 ED, 4 ET as in the dataset.
    """
    if draft.institutions is None:
        tables = [path for path in draft.root.rglob("*.[cC][sS][vV]") if path.name.lower() == "partitioning_1.csv"]
        if len(tables) != 1:
            raise InputError(f"{len(tables)} files partitioning_1.csv below {draft.root}; give one by --institutions.")
        draft.institutions = tables[0]
    about = {"name": "FeTS", "description": "Gliomas on MRI of many institutions (FeTS challenge)"}
    return _read_tumours(draft, _FIRST, None, labels, **about)


def read_brats(draft: Draft, *, challenge: str | None = None, labels: Mapping[str, int] | None = None) -> Reading:
    """BraTS: ``BraTS20_Training_001_t1ce.nii.gz`` (2020, 2021) or ``BraTS-GLI-00000-000-t1c.nii.gz`` (from 2023 on).

    The meaning of the values differs between challenges and years, see `CHALLENGES`. The challenge is read from the
    file names (``GLI``, ``SSA``, ``MEN``, ``MET``, ``PED``). The year is inferred from the values in all label files,
    if that is possible. From 2023 on, the last three digits of a name are the visit; all visits of a patient are in one
    split.

    Args:
        draft: its root is a folder with the subjects' folders, at any depth, of one challenge and naming. The data do
            not name institutions: all are ``BraTS`` unless ``institutions`` is given.
        challenge: one of `CHALLENGES`, if names and values do not decide.
        labels: values by name, if none of `CHALLENGES` fits.

    Raises:
        InputError: also if the meaning of a value is ambiguous, or a label file holds an unknown value.
    """
    about = {"name": "BraTS", "description": "Brain tumours on MRI (BraTS challenge)"}
    return _read_tumours(draft, _FIRST | _SECOND, challenge, labels, **about)


def _read_tumours(
    draft: Draft, roles: dict[str, str], challenge: str | None, labels: Mapping[str, int] | None, **about: str
) -> Reading:
    found = draft.match(rf"(?:.*/)?(?P<subject>[^/]+)[_-](?P<role>{'|'.join(roles)}|seg)")
    present = {match["role"].lower() for match, _ in found}
    first, second = sorted(present & set(_FIRST)), sorted(present & set(_SECOND))
    if first and second:
        both = f"until 2022 ({', '.join(first)}) and from 2023 on ({', '.join(second)})"
        raise InputError(f"{draft.root} mixes the names of BraTS {both}; read one of the two at a time.")
    codes = set()
    for match, file in found:
        name, role = _NAME.fullmatch(match["subject"]), match["role"].lower()
        codes.add(name["code"].upper() if name else "")
        what = ("labels", "tumour") if role == "seg" else ("images", roles[role])
        of = {"institution": about["name"], "patient": name and name["patient"]}
        draft.add(match["subject"], *what, **file, **of)
    if len(codes) > 1:
        raise InputError(f"{draft.root} mixes files of {' and '.join(sorted(codes))}; read one challenge at a time.")
    values = _values(draft, "GLI-2017" if first else "".join(codes), challenge, labels)
    together = "FeTS" if set(values) == {"ED", "ET", "NCR"} else "All"
    return draft.write(
        f"SUBJECT/SUBJECT_{{{','.join(roles)},seg}}.nii.gz",
        list(_FIRST.values()),
        license="as agreed with the provider (Synapse)",
        **about,
        **objectives("tumour", dict(sorted(values.items())), together),
    )


def _values(draft: Draft, code: str, challenge: str | None, labels: Mapping[str, int] | None) -> dict[str, int]:
    """Names and values of the classes: as given, or by the challenge's ``code`` and the values in all label files."""
    known = {name: values for name, values in CHALLENGES.items() if name.startswith(code)} or CHALLENGES
    if challenge:
        known = {challenge: known[require_choice("challenge of files with these names", challenge, known)]}
    if labels:
        known = {"these labels": parse_labels(labels, draft.root)}
    told = "; ".join(f"{name}: {', '.join(f'{v} {k}' for k, v in values.items())}" for name, values in known.items())
    paths = [str(path) for entry in draft.subjects.values() if entry["images"] for path in entry["labels"].values()]
    held = for_each(held_values, paths, progress=draft.progress)
    fits = [{name for name in known if values <= {*known[name].values()}} for values in held]
    if wrong := [place for place, names in enumerate(fits) if not names]:
        share = f"{len(wrong)} of {len(paths)} label files have unknown values"
        here = f"the values {sorted(held[wrong[0]])} ({share}), but expected are {told}"
        raise InputError(f"{paths[wrong[0]]} holds {here}; correct it, or name the values with --labels NCR=1 ED=2.")
    everywhere = [name for name in known if all(name in names for names in fits)]
    found, possible = set().union(*held), set().union(*fits)
    meanings = {(v, _SAME.get(k, k)) for name in possible for k, v in known[name].items() if v in found}
    proven = [name for name in everywhere if {name} in fits]
    if not everywhere or not (proven or len(meanings) == len(found)):
        hold = f"hold the values {sorted(found)}, whose meaning is ambiguous ({told})"
        raise InputError(f"the label files below {draft.root} {hold}; give --challenge, or --labels.")
    return known[(proven or everywhere)[0]]


def read_iseg(draft: Draft) -> Reading:
    """iSeg-2019: ``subject-1-T1``, ``-T2`` and ``-label`` as Analyze pairs (``.hdr`` and ``.img``) or NIfTI.

    Args:
        draft: its root is ``iSeg-2019-Training`` or a folder above it; iSeg-2017 has the same layout. The institution
            is ``iSeg`` unless ``institutions`` is given.
    """
    for match, file in draft.match(r"(?:.*/)?(?P<subject>subject-\d+)-(?P<role>t1|t2|label)"):
        role = match["role"].lower()
        what = ("labels", "tissue") if role == "label" else ("images", role.upper())
        draft.add(match["subject"], *what, **file, institution="iSeg")
    return draft.write(
        "subject-1-T1, subject-1-T2 and subject-1-label, each .hdr and .img",
        ["T1", "T2"],
        name="iSeg",
        description="Brain MRI of infants of six months (iSeg-2019 challenge)",
        license="as agreed with the provider",
        **objectives("tissue", {"CSF": 10, "GM": 150, "WM": 250}),
    )


def read_wmh(draft: Draft) -> Reading:
    """The WMH challenge: ``Utrecht/0/pre/FLAIR.nii.gz``, ``pre/T1.nii.gz`` and ``wmh.nii.gz``.

    The preprocessed images (``pre``) are read. Institutions are the sites, with the scanner if a folder names it:
    ``Utrecht``, ``Singapore``, ``Amsterdam-GE3T``. Patients below a folder ``test`` are the test split. Value 2 (other
    pathology) is declared but not part of the objective, so it counts as background.

    Args:
        draft: its root is the folder with ``training`` and ``test``, or one of them.
    """
    found = draft.match(
        rf"(?P<part>.*/|)(?P<subject>{_SITE}/[^/]+)/(?P<role>pre/FLAIR|pre/T1|wmh)",
        ignore=r"(?:.*/)?(?:orig|pre|additional_annotations)/.*",
    )
    for match, file in found:
        site = f"Amsterdam/{match['site']}" if match["scanner"] else match["site"]
        subject, institution = (name.replace("/", "-").replace(" ", "_") for name in (match["subject"], site))
        what = {"pre/flair": ("images", "FLAIR"), "pre/t1": ("images", "T1"), "wmh": ("labels", "wmh")}
        split = "test" if "test" in match["part"].lower().split("/") else None
        draft.add(subject, *what[match["role"].lower()], **file, institution=institution, split=split)
    return draft.write(
        "Utrecht/0/pre/FLAIR.nii.gz, Utrecht/0/pre/T1.nii.gz and Utrecht/0/wmh.nii.gz",
        ["FLAIR", "T1"],
        name="WMH",
        description="White-matter hyperintensities on MRI of three sites (Kuijf et al. 2019)",
        license="as agreed with the provider (doi:10.34894/AECRSD)",
        labels={"wmh": {"WMH": 1, "Other": 2}},
        objectives={"WMH": {"label": "wmh", "values": [1]}},
    )
