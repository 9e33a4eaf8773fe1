"""nnU-Net's raw format: one file a channel, and ``dataset.json``."""

from __future__ import annotations

import os
import re
from typing import Any

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import Draft, Reading, clean, objectives, parse_labels, read_json
from medtl_ext.data.readers.datalist import parse_modalities


def read_nnunet(root: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Reading:
    """A dataset in nnU-Net's raw format, version 1 or 2: ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``.

    ``labelsTs``, where it is there, makes a test split of ``imagesTs``. A region (several values under one name)
    becomes an objective that merges them. The value ``ignore`` is declared but no objective: it counts as background.

    Args:
        root: the dataset's folder, such as ``Dataset005_Prostate``.
        out: the collection file to write.
        **options: as `read_collection` tells. All subjects are of one institution, the dataset's name, unless
            ``institutions`` is given.
    """
    draft = Draft(root, out, **options)
    path = draft.root / "dataset.json"
    content = read_json(path)
    ending = content.get("file_ending", ".nii.gz")
    if ending.lower() not in (".nii.gz", ".nii"):
        raise InputError(f"{path}: files end in {ending}; a collection takes NIfTI. Convert them to .nii.gz first.")
    modalities = parse_modalities(content.get("channel_names") or content.get("modality"), path)
    name = clean(re.sub(r"^(Dataset|Task)\d+_", "", draft.root.name))
    values = parse_labels(content.get("labels") or {}, path)
    ignored = values.pop("ignore", None)
    draft.about = {
        "name": name,
        "description": str(content.get("description") or ""),
        "license": str(content.get("licence") or content.get("license") or "as agreed with the provider"),
        **objectives("label", values),
    }
    if ignored is not None:
        draft.about["labels"]["label"]["ignore"] = ignored
        draft.note("", path, f"value {ignored} is to be ignored, which a collection cannot say", "it is background")
    draft.layout = f"imagesTr/CASE_0000{ending} and labelsTr/CASE{ending}"
    labels_or_images = r"(?:(?P<images>images)|labels)(?P<place>T[rs])"  # a role is what tells channels apart
    for match, files in draft.group(rf"{labels_or_images}/(?P<subject>.+?)(?P<role>(?(images)_\d{{4}}|))"):
        images = {modality: files.pop(f"_{number:04d}", None) for number, modality in enumerate(modalities)}
        split = "test" if match["place"].lower() == "ts" else None
        draft.add(match["subject"], name, images, {"label": files.pop("", None)}, split=split)
        for path in files.values():
            draft.note(match["subject"], path, "the channel is not in dataset.json", "the file is not used")
    return draft.write()
