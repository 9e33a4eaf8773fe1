"""What is known of a source before its network is looked at: tags, size, and how alike the regions of interest are."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.transforms import Compose, LoadImaged, Orientationd, ResizeWithPadOrCrop, Spacingd

from medtl_ext._validation import InputError
from medtl_ext.affinity import mean_label_dice, pairwise_ssim, shape_descriptors, shape_similarity
from medtl_ext.data import Collection, Task
from medtl_ext.report import patient_table
from medtl_ext.selection.candidates import Candidate
from medtl_ext.studies import open_collection
from medtl_ext.transforms import SelectLabelsd

logger = logging.getLogger(__name__)

TAGS = ("modality", "objective", "institution")


def region_labels(
    collection: Collection, task: str, *, spacing: Sequence[float], roi_size: Sequence[int]
) -> list[torch.Tensor]:
    """The task's training labels on the common grid, bool, True in any foreground class.

    Slices are as many as a volume has, where ``roi_size`` does not say.
    """
    prepare = Compose(
        [
            LoadImaged(keys="label", reader="NibabelReader", ensure_channel_first=True),
            Orientationd(keys="label", axcodes="RAS", labels=None),
            Spacingd(keys="label", pixdim=spacing, mode="nearest"),
            SelectLabelsd(keys="label", values=collection.label_values(task)),
        ]
    )
    pad = ResizeWithPadOrCrop(spatial_size=[*roi_size, -1][:3])
    labels = [prepare({"label": item["label"]})["label"] for item in collection.datalist(task, "train")]
    return [torch.as_tensor(pad(label))[0] > 0 for label in labels]


def prior_table(
    candidates: Sequence[Candidate],
    *,
    target: Collection,
    target_task: str,
    source_collection: str | None,
    subjects: int,
    spacing: Sequence[float],
    roi_size: Sequence[int],
) -> pd.DataFrame:
    """One row per candidate: tags, whether they are the target's, size, and similarity of the regions of interest.

    Columns ``kind``, ``modality``, ``objective``, ``institution``, ``same_<tag>`` (NaN where a tag is not known),
    ``size`` (training subjects), ``own_dice`` (on the patients its training was validated on), ``ssim`` (mean over all
    pairs of label volumes), ``roi_dice`` (Dice of the mean label maps) and ``roi_shape`` (similarity of shape
    descriptors).
    """
    goal = Task(target_task)
    own = region_labels(target, target_task, spacing=spacing, roi_size=roi_size)

    rows = []
    # Tasks of several modalities may have the same label files, though not need to: subjects may lack a modality.
    regions: dict[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], dict[str, float]] = {}
    for candidate in candidates:
        row: dict[str, Any] = {"source": candidate.name, "kind": candidate.kind, "size": candidate.size}
        row |= {"task": candidate.task, "checkpoint": candidate.checkpoint}
        row |= {"network": candidate.network, "n_classes": candidate.n_classes, "encoder": candidate.encoder}
        for tag in TAGS:
            row[tag] = candidate.tags.get(tag)
            row[f"same_{tag}"] = None if row[tag] is None else row[tag] == getattr(goal, tag)
        row["own_dice"] = _own_dice(candidate.job)
        row |= dict.fromkeys(("ssim", "roi_dice", "roi_shape"), np.nan)
        if candidate.task is not None:
            source = open_collection(source_collection, candidate.task, subjects=subjects)
            files = tuple(item["label"] for item in source.datalist(candidate.task, "train"))
            key = (files, tuple(map(tuple, source.label_values(candidate.task))))
            if key not in regions:
                labels = region_labels(source, candidate.task, spacing=spacing, roi_size=roi_size)
                regions[key] = roi_similarity(labels, own, spacing=spacing[: labels[0].ndim])
            row |= regions[key]
        rows.append(row)
    return pd.DataFrame(rows).set_index("source")


def roi_similarity(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], *, spacing: Sequence[float]
) -> dict[str, float]:
    """How alike two sets of label volumes (bool, of any number of slices) are, in three ways; higher is more alike.

    All volumes are laid centre on centre.
    """
    depth = max(volume.shape[-1] for volume in (*source, *target))
    first, second = _stacked(source, depth), _stacked(target, depth)
    shapes = (shape_descriptors(labels, spacing=spacing) for labels in (first, second))
    return {
        "ssim": float(pairwise_ssim(first, second).mean()),
        "roi_dice": float(mean_label_dice(first, second)),
        "roi_shape": float(shape_similarity(*shapes).mean()),
    }


def _stacked(volumes: Sequence[torch.Tensor], depth: int) -> torch.Tensor:
    """N x *spatial, uint8: volumes with as many empty slices on either end as bring them to one depth."""
    pad = ResizeWithPadOrCrop(spatial_size=[*volumes[0].shape[:-1], depth])
    return torch.stack([torch.as_tensor(pad(volume[None].to(torch.uint8)))[0] for volume in volumes])


def _own_dice(job: Path | None) -> float:
    if job is None or not (job / "metrics.csv").is_file():
        return np.nan
    scores, config = patient_table(pd.read_csv(job / "metrics.csv").dropna(subset=["dice", "iou"])), job / "config.json"
    split = json.loads(config.read_text(encoding="utf-8")).get("val_split", "val") if config.is_file() else "val"
    return float(scores[scores["split"] == split]["dice"].mean())


def filter_by_priors(
    table: pd.DataFrame, *, minimum_ssim: float | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """PriorSel's two filters: the target's modality, then the regions most alike; what is left is to be ranked.

    Args:
        table: see `prior_table`; the candidates that can be used.
        minimum_ssim: keep sources with at least this SSIM of labels.
        top_k: keep so many of these with the highest, and what is equal to the last of them. With neither, the better
            half (rounded up) is kept.

    Returns:
        Columns ``kept`` (bool) and ``reason``, one row per source. A source of which a tag or the labels are not known
        is kept. A filter that would leave nothing warns and filters nothing.

    Raises:
        InputError: ``top_k`` would keep nothing.
    """
    require_top_k(top_k)
    result = pd.DataFrame({"kept": True, "reason": ""}, index=table.index)
    reasons: dict[str, list[str]] = {source: [] for source in table.index}
    wrong = table["same_modality"].map(lambda same: same is False or same == False)  # noqa: E712 (numpy bools)
    if wrong.all():
        _fall_back("no source has the target's modality", reasons)
    else:
        for source in table.index:
            modality = table.loc[source, "modality"]
            reasons[source].append(
                f"modality {modality}: {'dropped' if wrong[source] else 'same'}"
                if isinstance(modality, str)
                else "modality not known"
            )
        result.loc[wrong, "kept"] = False
    left = table.index[result["kept"]]
    ssim = table.loc[left, "ssim"].astype(float)
    known = ssim.dropna().sort_values(ascending=False, kind="stable")
    good, rules = known, []
    if minimum_ssim is not None:
        good = good[good >= minimum_ssim]
        rules.append(f"at least {minimum_ssim:g}")
    if top_k is not None or minimum_ssim is None:
        count = top_k if top_k is not None else (len(known) + 1) // 2
        rules.append(f"the best {count} of {len(good)}")
        good = good[_highest(good, count)]
    rule = ", of these ".join(rules)
    if len(known) and not len(good) and len(known) == len(left):
        _fall_back(f"no source has a label SSIM of {rule}", {source: reasons[source] for source in left})
    else:
        for source in left:
            if source not in known.index:
                reasons[source].append("label SSIM not known")
                continue
            kept = source in good.index
            result.loc[source, "kept"] = kept
            reasons[source].append(f"label SSIM {ssim[source]:.3f}: {'kept' if kept else 'dropped'} (keeps {rule})")
    result["reason"] = ["; ".join(reasons[source]) for source in table.index]
    return result


def require_top_k(top_k: int | None) -> None:
    """Refuse to keep fewer than one source."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k is {top_k!r}; give a whole number of at least 1, or null for the better half.")


def _highest(values: pd.Series, count: int) -> pd.Index:
    """The ``count`` highest and those that are equal to the last of them, but for rounding; values come sorted."""
    if count >= len(values):
        return values.index
    return values.index[values.round(9) >= values.round(9).iloc[count - 1]]


def _fall_back(why: str, reasons: Mapping[str, list[str]]) -> None:
    warnings.warn(f"{why}: this filter would leave nothing, so it is not applied.", UserWarning, stacklevel=3)
    logger.warning("%s: this filter would leave nothing, so it is not applied", why)
    for notes in reasons.values():
        notes.append(f"filter not applied ({why})")
