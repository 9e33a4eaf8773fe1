"""White-matter hyperintensities: the WMH segmentation challenge."""

from __future__ import annotations

import os
from typing import Any

from medtl_ext.data.readers._draft import Draft, Reading

# A scanner of Amsterdam is no plain number; some copies have its scanners at the top.
_SCANNER = r"(?<!Amsterdam/)(?P<scanner>GE3T|GE1T5|Philips[^/]*)"
_SITE = rf"(?P<site>Utrecht|Singapore|Amsterdam(?:/[^/]*[^/\d][^/]*)?|{_SCANNER})"


def read_wmh(root: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Reading:
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
    draft.layout = "Utrecht/0/pre/FLAIR.nii.gz, Utrecht/0/pre/T1.nii.gz and Utrecht/0/wmh.nii.gz"
    found = draft.group(
        rf"(?P<part>.*/|)(?P<subject>{_SITE}/[^/]+)/(?P<role>pre/FLAIR|pre/T1|wmh)",
        ignore=r"(?:.*/)?(?:orig|pre|additional_annotations)/.*",
    )
    for match, files in found:
        images = {"FLAIR": files.get("pre/flair"), "T1": files.get("pre/t1")}
        site = f"Amsterdam/{match['site']}" if match["scanner"] else match["site"]
        institution = site.replace("/", "-").replace(" ", "_")
        split = "test" if "test" in match["part"].lower().split("/") else None
        subject = match["subject"].replace("/", "-").replace(" ", "_")
        draft.add(subject, institution, images, {"wmh": files.get("wmh")}, split=split)
    draft.about = {
        "name": "WMH",
        "description": "White-matter hyperintensities on MRI of three sites (Kuijf et al. 2019)",
        "license": "as agreed with the provider (doi:10.34894/AECRSD)",
        "labels": {"wmh": {"WMH": 1, "Other": 2}},
        "objectives": {"WMH": {"label": "wmh", "values": [1]}},
    }
    return draft.write()
