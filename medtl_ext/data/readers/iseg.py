"""Infant brain MRI: iSeg-2019 (and 2017, which has the same layout)."""

from __future__ import annotations

import os
from typing import Any

from medtl_ext.data.readers._draft import Draft, Reading, objectives


def read_iseg(root: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Reading:
    """iSeg-2019: ``subject-1-T1``, ``-T2`` and ``-label`` as Analyze pairs (``.hdr`` and ``.img``) or NIfTI.

    Args:
        root: ``iSeg-2019-Training`` or a folder above it.
        out: the collection file to write.
        **options: as `read_collection` tells. The institution is ``iSeg`` unless ``institutions`` is given.
    """
    draft = Draft(root, out, **options)
    draft.layout = "subject-1-T1, subject-1-T2 and subject-1-label, each .hdr and .img"
    for match, files in draft.group(r"(?:.*/)?(?P<subject>subject-\d+)-(?P<role>t1|t2|label)"):
        images = {"T1": files.get("t1"), "T2": files.get("t2")}
        draft.add(match["subject"], "iSeg", images, {"tissue": files.get("label")})
    draft.about = {
        "name": "iSeg",
        "description": "Brain MRI of infants of six months (iSeg-2019 challenge)",
        "license": "as agreed with the provider",
        **objectives("tissue", {"CSF": 10, "GM": 150, "WM": 250}),
    }
    return draft.write()
