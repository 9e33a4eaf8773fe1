"""Figures of the ground truth: scores and priors against the Dice that fine-tuning gave."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medtl_ext.selection.scores import LABELS

SAME, OTHER, GREY = "#D55E00", "#0072B2", "#6b6b6b"
PRIOR_LABELS = {"ssim": "label SSIM", "roi_dice": "Dice of mean label maps", "roi_shape": "shape similarity"}


def plot_score_against_dice(table: pd.DataFrame, *, scratch: float, title: str = "", synthetic: bool = False) -> Figure:
    """A panel for each score: score (x) against Dice after fine-tuning (y), one dot per source.

    Args:
        table: one row per source with ``dice``, ``same_modality`` and the scores.
        scratch: Dice of training from scratch, a dashed line.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    scores = [name for name in LABELS if name in table and np.isfinite(table[name].astype(float)).any()]
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, name in zip(axes.flat, scores, strict=False):
        _dots(panel, table, name)
        panel.axhline(scratch, color=GREY, linestyle="--", linewidth=0.8)
        panel.set_title(LABELS[name], loc="left", fontsize=9)
    for panel in axes.flat[len(scores) :]:
        panel.axis("off")
    for panel in axes[:, 0]:
        panel.set_ylabel("Dice")
    return _finished(figure, title, "dashed: training from scratch", synthetic)


def plot_priors_against_dice(sources: pd.DataFrame, *, synthetic: bool = False) -> Figure:
    """Similarity of the regions of interest against Dice less the target's mean, one dot per source, target and seed.

    Args:
        sources: columns ``target, seed, dice, same_modality, ssim, roi_dice, roi_shape``.
        synthetic: print "synthetic phantom" below.
    """
    sources = sources.assign(dice=sources["dice"] - sources.groupby(["target", "seed"])["dice"].transform("mean"))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(PRIOR_LABELS), sharey=True)
    for panel, (name, label) in zip(axes, PRIOR_LABELS.items(), strict=True):
        _dots(panel, sources, name)
        panel.set_title(label, loc="left", fontsize=9)
    axes[0].set_ylabel("Dice less the target's mean")
    return _finished(figure, "Similarity of the region of interest and Dice after transfer", "", synthetic)


def _dots(panel: Axes, table: pd.DataFrame, column: str) -> None:
    same = table["same_modality"].astype(float).fillna(0) > 0
    for group, colour in ((table[~same], OTHER), (table[same], SAME)):
        panel.scatter(group[column].astype(float), group["dice"], s=22, color=colour, alpha=0.8, linewidths=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _finished(figure: Figure, title: str, note: str, synthetic: bool) -> Figure:
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    parts = ["synthetic phantom" if synthetic else "", "orange: same modality as the target, blue: another", note]
    figure.supxlabel("; ".join(filter(None, parts)), fontsize=7, color=GREY, x=0.01, ha="left")
    return figure
