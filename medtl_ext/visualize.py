"""Figures: brain slices with labels, risk maps, overlays, and plots of audits, comparisons, rankings and their worth.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so it needs no display and leaves no global
state; `save_figure` writes it. Slices come in as (X, Y) arrays in RAS (x to the patient's right, y to the front) and
are shown the radiological way: front up, the patient's right on the left of the picture. Colours are those of Okabe and
Ito, which readers with any colour vision tell apart.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError, require_choice

__all__ = [
    "method_group",
    "plot_audit",
    "plot_comparison",
    "plot_critical_difference",
    "plot_montage",
    "plot_overlay",
    "plot_priors_against_dice",
    "plot_ranking",
    "plot_risk_maps",
    "plot_scores_against_outcome",
    "save_figure",
    "to_display",
]

CLASS_COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#009E73", "#CC79A7", "#0072B2", "#E69F00")
METHOD_GROUPS = {
    "zero_shot": "baseline",
    "scratch": "baseline",
    "vanilla": "baseline",
    "dice_ce": "baseline",
    "full": "baseline",
    "frequency": "control",
    "prior_image": "control",
    "prior_shift": "control",
}
"""Methods that are not loss weightings: baselines, and controls that weight without having seen the source."""
BLUE, ORANGE = "#0072B2", "#D55E00"
GROUP_COLOURS = {"baseline": BLUE, "weighting": ORANGE, "control": "#009E73", "all parameters": "#CC79A7"}

SPLIT_NAMES = {"train": "training", "val": "validation"}
OUTCOME_NAMES = {"dice": "Dice", "auc": "AUC"}
PRIOR_NAMES = {"ssim": "label SSIM", "roi_dice": "Dice of mean label maps", "roi_shape": "shape similarity"}

_GREY = "#6b6b6b"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "xtick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.color": _GREY,
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
}
_LEADING_COLOURS = {True: ORANGE, False: BLUE}
_BASELINE_MARKS = [
    {"marker": marker, "markersize": size, "color": _GREY, "markerfacecolor": "none", "linestyle": "none"}
    for marker, size in (("s", 8.5), ("o", 5.0), ("^", 6.5), ("v", 6.5), ("P", 6.5), ("X", 6.5))
]
"""Of different sizes: where two baselines agree, one shows inside the other."""
_RADIOLOGICAL = "radiological view: the patient's right (R) is on the left"


def method_group(method: str) -> str:
    """The group a method is drawn in: ``baseline``, ``weighting``, ``control`` or ``all parameters`` (``full_*``).

    >>> [method_group(name) for name in ("scratch", "risk_map", "prior_image", "full_risk_map")]
    ['baseline', 'weighting', 'control', 'all parameters']
    """
    if method.startswith("full_"):
        return "all parameters"
    return METHOD_GROUPS.get(method, "weighting")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure at 150 dots per inch, whole or not at all; the suffix of ``path`` chooses the format."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def to_display(array: ArrayLike) -> np.ndarray:
    """Turn an (X, Y) slice in RAS into picture rows: front at the top, the patient's right on the left.

    >>> to_display([[1, 2], [3, 4]]).tolist()  # x = 1, y = 1 is right and front: it goes to the top left
    [[4, 2], [3, 1]]
    """
    array = np.asarray(array)
    if array.ndim != 2:
        raise InputError(
            f"A picture needs one slice, shape (X, Y); found shape {array.shape}. Take a channel and a slice."
        )
    return array.T[::-1, ::-1]


@matplotlib.rc_context(_STYLE)
def plot_montage(
    images: Mapping[str, Mapping[str, ArrayLike]],
    *,
    class_names: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A grid of slices, such as subjects by modalities and labels.

    Args:
        images: row name -> column name -> (X, Y) slice. Floating arrays are shown in grey, stretched between their 1st
            and 99th percentile; integer arrays as label panels with one colour per class, 0 black. A missing panel
            stays empty.
        class_names: label column -> names of its classes 1, 2, ..., listed below that column.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    >>> figure = plot_montage({"13-000": {"T1": np.random.rand(8, 9), "label": np.eye(8, 9, dtype=int)}})
    >>> len(figure.axes)
    2
    """
    columns = list(dict.fromkeys(column for row in images.values() for column in row))
    if not columns:
        raise InputError("plot_montage needs at least one image; found none.")
    figure, axes = _slices_grid(len(images), len(columns), height=0.9)
    for i, (row, panels) in enumerate(images.items()):
        for j, column in enumerate(columns):
            if column in panels:
                _show_panel(axes[i, j], np.asarray(panels[column]))
            if i == 0:
                axes[i, j].set_title(column, loc="center")
        axes[i, 0].set_ylabel(row)
    _mark_sides(axes[0, 0])
    for column, names in (class_names or {}).items():
        legend = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "fontsize": 7, "ncols": len(names)}
        legend |= {"handlelength": 0.9, "columnspacing": 0.9, "handletextpad": 0.4}
        axes[-1, columns.index(column)].legend(handles=_class_handles(names), **legend)
    return _finish(figure, title, synthetic, _RADIOLOGICAL)


@matplotlib.rc_context(_STYLE)
def plot_risk_maps(
    before: ArrayLike,
    after: ArrayLike,
    *,
    image: ArrayLike | None = None,
    quantity: str = "weight",
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A map before and after fine-tuning on one colour scale (RiskMap Fig. 2): bright where transfer is hard.

    Args:
        before, after: (X, Y), or (X, Y, Z) of which the middle slice is shown; NaN (no valid pixel) is drawn in grey.
            The scale runs from the 0.5th to the 99.5th percentile of both, so that one extreme pixel does not darken
            the rest.
        image: slice or volume of the same shape, shown beside the maps.
        quantity: ``"weight"`` (risk map, high is hard) or ``"leep"`` (LEEP map, low is hard).
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    Raises:
        InputError: shapes differ, or nothing is finite.

    >>> figure = plot_risk_maps(np.full((8, 9), 1.5), np.ones((8, 9)))
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['before fine-tuning\\nmean 1.50', 'after fine-tuning\\nmean 1.00']
    """
    require_choice("quantity", quantity, ["weight", "leep"])
    panels = {"image": image, "before fine-tuning": before, "after fine-tuning": after}
    panels = {name: _middle_slice(array) for name, array in panels.items() if array is not None}
    if len(shapes := {array.shape for array in panels.values()}) > 1:
        raise InputError(f"before, after and image must have one shape; found {sorted(shapes)}.")
    maps = [panels["before fine-tuning"], panels["after fine-tuning"]]
    finite = np.concatenate([array[np.isfinite(array)] for array in maps])
    if finite.size == 0:
        raise InputError("before and after hold no finite value; nothing to show.")
    low, high = np.percentile(finite, [0.5, 99.5])
    colours = matplotlib.colormaps["inferno" if quantity == "weight" else "inferno_r"].with_extremes(bad="#c8c8c8")

    figure, axes = _slices_grid(1, len(panels), size=2.6, height=0.7)
    for panel, (name, array) in zip(axes[0], panels.items(), strict=True):
        if name == "image":
            _show_panel(panel, array.astype(float))
            panel.set_title("\nimage", loc="center")
            continue
        drawn = panel.imshow(to_display(array), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        panel.set_title(f"{name}\nmean {np.nanmean(array):.2f}", loc="center")
    _mark_sides(axes[0, 0])
    label = "risk weight (high: hard to transfer)" if quantity == "weight" else "LEEP (low: hard to transfer)"
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[finite.min() < low, finite.max() > high]
    figure.colorbar(drawn, ax=list(axes[0]), label=label, extend=extend, shrink=0.8, pad=0.02)
    return _finish(figure, title, synthetic, _RADIOLOGICAL)


@matplotlib.rc_context(_STYLE)
def plot_overlay(
    images: Sequence[ArrayLike],
    truths: Sequence[ArrayLike],
    predictions: Mapping[str, Sequence[ArrayLike]],
    *,
    subjects: Sequence[str],
    class_names: Sequence[str],
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """Target slices with the outlines of truth and predictions: one row per subject, one column per prediction.

    Args:
        images: one (X, Y) slice per subject.
        truths: one (X, Y) label slice per subject, class 0 background.
        predictions: column name (a method) -> one (X, Y) label slice per subject. The Dice of this slice, averaged over
            the classes in it, stands above each; it is not the Dice of the volume.
        subjects: row names.
        class_names: names of classes 1, 2, ...
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    Raises:
        InputError: not one image, truth and prediction per subject.

    >>> label = np.eye(8, dtype=int)
    >>> figure = plot_overlay([np.random.rand(8, 8)], [label], {"full": [label]}, subjects=["p1"], class_names=["ED"])
    >>> [axes.get_title() for axes in figure.axes]
    ['image', 'truth', 'full\\nDice of the slice 1.00']
    """
    from sklearn.metrics import f1_score  # slow to import

    for name, of in {"images": images, "truths": truths, **predictions}.items():
        if len(of) != len(subjects):
            raise InputError(f"plot_overlay has {len(subjects)} subjects but {len(of)} slices in '{name}'.")
    figure, axes = _slices_grid(len(subjects), 2 + len(predictions), size=2.1, height=0.5 + 0.25 * len(subjects))
    for i, subject in enumerate(subjects):
        outlines = {"image": None, "truth": truths[i], **{name: of[i] for name, of in predictions.items()}}
        for panel, (name, labels) in zip(axes[i], outlines.items(), strict=True):
            _show_panel(panel, np.asarray(images[i], dtype=float))
            heading = [name] if i == 0 else []
            if labels is not None:
                _outline(panel, labels, len(class_names))
            if name in predictions:
                pixels = np.ravel(truths[i]), np.ravel(labels)
                classes = range(1, len(class_names) + 1)
                dice = f1_score(*pixels, labels=classes, average="macro", zero_division=np.nan)  # F1 of pixels is Dice
                heading.append("nothing to segment" if np.isnan(dice) else f"Dice of the slice {dice:.2f}")
            panel.set_title("\n".join(heading), loc="center")
        axes[i, 0].set_ylabel(subject)
    _mark_sides(axes[0, 0])
    figure.legend(handles=_class_handles(class_names), loc="outside right upper", handlelength=1)
    return _finish(figure, title, synthetic, _RADIOLOGICAL)


@matplotlib.rc_context(_STYLE)
def plot_audit(
    patients: pd.DataFrame,
    table: pd.DataFrame,
    *,
    recommended: str | None = None,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A transfer audit: each patient's score and the interval of the mean per arm, and the differences that decide.

    Args:
        patients: columns ``split, method, subject, dice``, one row per patient and arm.
        table: columns ``split`` and those of `medtl_ext.ranking.Verdict.table`. The first split is the one that
            decides: its differences to the best arm are drawn between it and the others.
        recommended: the arm to print in bold.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    splits = list(dict.fromkeys(table["split"]))
    tables = {split: table[table["split"] == split].set_index("arm") for split in splits}
    arms = list(tables[splits[0]].index)
    size = (3.0 * (len(splits) + 1) + 0.6, 1.7 + 0.42 * len(arms))
    figure, (first, differences, *others) = _row_panels(arms, len(splits) + 1, size, bold={recommended})
    for panel, split in zip([first, *others], splits, strict=True):
        of, jitter = patients[patients["split"] == split], np.random.default_rng(0)
        for row, arm in enumerate(arms):
            dice = of.loc[of["method"] == arm, "dice"]
            height = row + 0.05 + jitter.uniform(0.05, 0.25, len(dice))
            panel.scatter(dice, height, s=11, color=_GREY, alpha=0.55, linewidths=0)
            _interval(panel, tables[split].loc[arm, ["mean", "low", "high"]], row - 0.08, _method_colour(arm))
        count = of["subject"].nunique()
        title_of = f"{SPLIT_NAMES.get(split, split)}: {count} patient{'s' if count > 1 else ''}"
        panel.set(title=title_of, xlabel="mean Dice over classes")
        if panel is not first:
            panel.sharex(first)
    differences.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    columns = ["difference", "difference_low", "difference_high"]
    for row, arm in enumerate(arms):
        _interval(differences, tables[splits[0]].loc[arm, columns], row, _method_colour(arm))
    title_of = f"{SPLIT_NAMES.get(splits[0], splits[0])}: difference to the best"
    differences.set(title=title_of, xlabel="Dice, arm minus best")
    note = "dots: patients; diamonds: mean with 95 % bootstrap interval; differences: 95 % paired t interval"
    return _finish(figure, title, synthetic, note)


@matplotlib.rc_context(_STYLE)
def plot_comparison(
    summary: pd.DataFrame,
    *,
    reference: str = "vanilla",
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """Methods compared on one panel per pair: mean Dice with its spread over runs, grouped by kind of method.

    Args:
        summary: the table of `medtl_ext.report.compare_report`: columns ``pair, slices, method, mean, sd, difference,
            p_holm``. Slice numbers are drawn from hollow (the smallest) to filled.
        reference: method marked by a dashed line per slice number.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    pairs, sizes = list(dict.fromkeys(summary["pair"])), sorted(summary["slices"].unique())
    groups = [group for group in GROUP_COLOURS if group in set(summary["method"].map(method_group))]
    rows: list[str] = []
    for group in groups:  # a blank row keeps the groups apart
        rows += [*([""] if rows else []), *(m for m in dict.fromkeys(summary["method"]) if method_group(m) == group)]

    size = (3.2 + 2.7 * len(pairs), 1.5 + 0.26 * len(rows))
    figure, panels = _row_panels(rows, len(pairs), size, bold={reference})
    strengths = np.linspace(0, 1, len(sizes)) if len(sizes) > 1 else [1.0]
    for panel, pair in zip(panels, pairs, strict=True):
        for slices, strength in zip(sizes, strengths, strict=True):
            cell = summary[(summary["pair"] == pair) & (summary["slices"] == slices)].set_index("method")
            if reference in cell.index:
                panel.axvline(cell.loc[reference, "mean"], color=_GREY, linestyle="--", linewidth=0.8, zorder=0)
            for method, row in cell.iterrows():
                height = rows.index(method) + (0.34 * (strength - 0.5) if len(sizes) > 1 else 0.0)
                style = _dot(_method_colour(method), strength)
                panel.errorbar(row["mean"], height, xerr=row["sd"], elinewidth=1.3, **style)
                if row["p_holm"] < 0.05:
                    end = row["mean"] + np.nan_to_num(row["sd"])
                    panel.annotate("*", (end, height), xytext=(2, -4), textcoords="offset points")
        panel.set(title=pair, xlabel="mean Dice")
    handles = [Line2D([], [], label=group, **_dot(GROUP_COLOURS[group])) for group in groups]
    if len(sizes) > 1:
        shades = zip(sizes, strengths, strict=True)
        handles += [Line2D([], [], label=f"{slices} slices", **_dot(_GREY, strength)) for slices, strength in shades]
    figure.legend(handles=handles, loc="outside right upper")
    note = (
        f"dots: mean, bars: sd over runs; vertical line: {reference}; "
        f"*: differs from {reference} (Wilcoxon over patients, Holm, p < .05)"
    )
    return _finish(figure, title, synthetic, note)


@matplotlib.rc_context(_STYLE)
def plot_ranking(
    table: pd.DataFrame,
    *,
    tied: Sequence[str] = (),
    recommended: str | None = None,
    metric: str = "score",
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A ranking of sources: score and rank with their intervals, what baselines would say, and how often each is first.

    Args:
        table: the table of `medtl_ext.ranking.SourceRanking`: columns ``source, score, low, high, rank, rank_low,
            rank_high, p_best``, one row per source, drawn from the top; each column ``<baseline>_rank`` is a baseline,
            shown as hollow marks beside the ranks. A source without a score has its baseline ranks only.
        tied: the leader and the sources that cannot be told from it; coloured, in bold.
        recommended: the source that is preferred, if one is; the key says so.
        metric: what the score is called.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    >>> from medtl_ext.ranking import bootstrap_ranking
    >>> ranking = bootstrap_ranking({"13-T1-ED": [0.6, 0.5, 0.7, 0.6], "17-T1-ET": [0.4, 0.3, 0.5, 0.4]})
    >>> figure = plot_ranking(ranking.table, tied=ranking.tied, recommended=ranking.recommendation, metric="LEEP")
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['LEEP', 'rank', 'ranked first']
    """
    table = table.reset_index(drop=True)
    names = list(table["source"])
    baselines = [column for column in table if column.endswith("_rank")]
    size = (9.2, 1.9 + 0.3 * len(names))
    figure, panels = _row_panels(names, 3, size, bold=set(tied), width_ratios=[3, 3, 1.3])
    scores, ranks, firsts = panels
    marks = list(zip(cycle(_BASELINE_MARKS), baselines, strict=False))
    for place, row in table.iterrows():
        colour = _LEADING_COLOURS[row["source"] in tied]
        if np.isfinite(row["score"]):
            raised = place - 0.15 if baselines else place
            _interval(scores, row[["score", "low", "high"]], place, colour)
            _interval(ranks, row[["rank", "rank_low", "rank_high"]], raised, colour)
        else:
            scores.text(0.02, place, "no score", transform=scores.get_yaxis_transform(), va="center", color=_GREY)
        for style, column in marks:
            ranks.plot([row[column]], [place + 0.2], **style)
        firsts.barh(place, np.nan_to_num(row["p_best"]), height=0.55, color=colour)
    scores.set(title=metric, xlabel="higher is better")
    ranks.set(title="rank", xlabel="1 is best", xlim=(0.4, len(names) + 0.6))
    ranks.xaxis.set_major_locator(MaxNLocator(integer=True))
    firsts.set(title="ranked first", xlabel="share of resamples", xlim=(0, 1))
    lead = "preferred" if recommended else "tied at the top" if len(tied) > 1 else "best guess"
    shown = ([(lead, True)] if tied else []) + ([("others", False)] if len(tied) < len(names) else [])
    diamond = {"marker": "D", "linestyle": "none"}
    handles = [Line2D([], [], label=label, color=_LEADING_COLOURS[leads], **diamond) for label, leads in shown]
    for style, column in marks:
        handles.append(Line2D([], [], label=f"by {column.removesuffix('_rank').replace('_', ' ')}", **style))
    figure.legend(handles=handles, loc="outside right upper")
    note = "diamonds: score and rank on all patients; bars: patient bootstrap interval"
    return _finish(figure, title, synthetic, f"{note}; hollow: rank by a baseline" if baselines else note)


@matplotlib.rc_context(_STYLE)
def plot_critical_difference(
    average_ranks: Mapping[str, float],
    *,
    critical_difference: float,
    groups: Sequence[Sequence[str]],
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """Nemenyi diagram: methods along an axis of average ranks, bars over those that cannot be told apart.

    Args:
        average_ranks: method -> average rank over targets, 1 is best.
        critical_difference: drawn to scale above the axis.
        groups: sets of methods joined by a bar.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    All three numbers are attributes of `medtl_ext.ranking.FriedmanNemenyi`.

    Raises:
        InputError: fewer than two methods, or a group names one that has no rank.

    Reference: Demšar, JMLR 7, 2006, Fig. 1.

    >>> ranks = {"LogME": 1.2, "LEEP": 1.9, "SFDA": 2.9}
    >>> figure = plot_critical_difference(ranks, critical_difference=1.1, groups=[("LogME", "LEEP"), ("LEEP", "SFDA")])
    >>> [text.get_text() for text in figure.axes[0].texts][:4]
    ['1', '2', '3', 'critical difference 1.10']
    """
    from scikit_posthocs import critical_difference_diagram  # slow to import

    ranks = pd.Series(average_ranks).sort_values(kind="stable")
    if len(ranks) < 2:
        raise InputError(f"A critical-difference diagram needs at least two methods; found {len(ranks)}.")
    alike = pd.DataFrame(0.0, ranks.index, ranks.index)
    for group in groups:
        if unknown := [method for method in group if method not in ranks]:
            raise InputError(f"groups names {unknown[0]}, which has no average rank. Known: {', '.join(ranks.index)}.")
        alike.loc[list(group), list(group)] = 1.0
    inches = 0.9 + 0.08 * max(len(name) for name in ranks.index)  # what a name and its number take beside the axis
    figure = Figure(figsize=(4.5 + 2 * inches, 3), layout="constrained")
    panel = figure.subplots()
    drawn = critical_difference_diagram(
        ranks,
        alike,
        ax=panel,
        color_palette={name: _LEADING_COLOURS[name == ranks.index[0]] for name in ranks.index},
        label_fmt_left="{label}  {rank:.2f}",
        label_fmt_right="{rank:.2f}  {label}",
        text_h_margin=0.015 * (len(ranks) - 1),
        elbow_props={"linewidth": 1.1, "clip_on": False},
        marker_props={"s": 12, "clip_on": False},
        crossbar_props={"color": _GREY, "linewidth": 4, "solid_capstyle": "round"},
    )
    drawn["labels"][0].set_fontweight("bold")
    lowest = min(label.get_position()[1] for label in drawn["labels"])
    figure.set_figheight(0.7 + 0.27 * (3 - lowest))
    panel.set(xlim=(1, len(ranks)), ylim=(lowest - 0.5, 2.3), xticks=range(1, len(ranks) + 1))
    panel.spines["top"].set_visible(True)
    end = 1 + critical_difference
    panel.plot([1, end], [1.6, 1.6], color="black", linewidth=1.5, marker="|", markersize=6, clip_on=False)
    panel.text((1 + end) / 2, 1.75, f"critical difference {critical_difference:.2f}", ha="center", va="bottom")
    note = "average rank over targets, 1 is best; a bar joins what cannot be told apart"
    return _finish(figure, title, synthetic, note)


@matplotlib.rc_context(_STYLE)
def plot_scores_against_outcome(
    table: pd.DataFrame,
    *,
    scores: Mapping[str, str],
    outcome: str,
    scratch: float,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A panel for each score: score (x) against what fine-tuning gave (y), one dot per source.

    Args:
        table: one row per source with the scores and the outcome; with ``same_modality``, that is the colour.
        scores: column -> what it is called. One without a value, or not in the table, gets no panel.
        outcome: column of the truth, ``dice`` or ``auc``.
        scratch: outcome of training from scratch, a dashed line.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    >>> table = pd.DataFrame({"leep": [-0.4, -0.3], "gbc": [np.nan, np.nan], "auc": [0.7, 0.8]}, index=["a", "b"])
    >>> scores = {"leep": "LEEP", "gbc": "GBC", "parc": "PARC"}
    >>> figure = plot_scores_against_outcome(table, scores=scores, outcome="auc", scratch=0.6)
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['LEEP']
    """
    found = {column: name for column, name in scores.items() if column in table and table[column].notna().any()}
    figure, note = _scatter_panels(table, found, table[outcome], OUTCOME_NAMES[outcome])
    for panel in figure.axes:
        panel.axhline(scratch, color=_GREY, linestyle="--", linewidth=0.8)
    title = title or f"Score against {OUTCOME_NAMES[outcome]} after fine-tuning"
    return _finish(figure, title, synthetic, f"{note}dashed: training from scratch")


@matplotlib.rc_context(_STYLE)
def plot_priors_against_dice(sources: pd.DataFrame, *, synthetic: bool = False) -> Figure:
    """Similarity of the regions of interest against Dice less the target's mean, one dot per source, target and seed.

    Args:
        sources: columns ``target, seed, dice, same_modality, ssim, roi_dice, roi_shape``.
        synthetic: print "synthetic phantom" below.
    """
    gain = sources["dice"] - sources.groupby(["target", "seed"])["dice"].transform("mean")
    figure, note = _scatter_panels(sources, PRIOR_NAMES, gain, "Dice less the target's mean")
    title = "Similarity of the region of interest and Dice after transfer"
    return _finish(figure, title, synthetic, note.removesuffix("; "))


def _finish(figure: Figure, title: str, synthetic: bool, note: str) -> Figure:
    """Title and small print, wrapped: an inch holds 10 bold or 19 small characters, a legend takes 1.3 inches."""
    width = figure.get_figwidth()
    if title:
        figure.suptitle(
            textwrap.fill(title, max(20, int(10 * (width - 1.3)))), fontsize=11, fontweight="bold", x=0.01, ha="left"
        )
    note = f"synthetic phantom; {note}" if synthetic else note
    figure.supxlabel(textwrap.fill(note, int(19 * width)), fontsize=7, color=_GREY, x=0.01, ha="left")
    return figure


def _slices_grid(n_rows: int, n_columns: int, *, size: float = 1.7, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(size * n_columns + 0.4, size * n_rows + height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.05, wspace=0.01, hspace=0.01)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, axes


def _show_panel(panel: Axes, array: np.ndarray) -> None:
    if np.issubdtype(array.dtype, np.floating):
        low, high = np.nanpercentile(array, [1, 99])
        panel.imshow(to_display(array), cmap="gray", vmin=low, vmax=high if high > low else low + 1)
        return
    # More classes than colours share the last one; a label panel is for a handful of classes.
    colours = ListedColormap(["black", *CLASS_COLOURS])
    panel.imshow(to_display(array), cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, interpolation="nearest")


def _outline(panel: Axes, labels: ArrayLike, n_classes: int) -> None:
    picture = to_display(labels)
    for index in range(1, n_classes + 1):
        if (mask := picture == index).any():
            colour = CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]
            panel.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=1.1)


def _middle_slice(array: ArrayLike) -> np.ndarray:
    array = np.asarray(array, dtype=float)
    return array[..., array.shape[-1] // 2] if array.ndim == 3 else array


def _mark_sides(panel: Axes) -> None:
    box = {"boxstyle": "square,pad=0.15", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
    style = {"transform": panel.transAxes, "color": "white", "fontsize": 7, "bbox": box}
    for x, side in ((0.03, "R"), (0.97, "L")):
        panel.text(x, 0.5, side, va="center", ha="center", **style)


def _class_handles(class_names: Sequence[str]) -> list[Patch]:
    return [Patch(color=CLASS_COLOURS[i % len(CLASS_COLOURS)], label=name) for i, name in enumerate(class_names)]


def _row_panels(
    names: Sequence[str], columns: int, size: tuple[float, float], *, bold: set[str | None], **options: Any
) -> tuple[Figure, np.ndarray]:
    """Panels side by side whose shared vertical axis names the rows, first row at the top."""
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False, **options)[0]
    named = [(row, name) for row, name in enumerate(names) if name]
    panels[0].set_yticks([row for row, _ in named], [name for _, name in named])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for tick in panels[0].get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in bold else "normal")
    for panel in panels:
        panel.grid(axis="x")
    return figure, panels


def _scatter_panels(
    table: pd.DataFrame, columns: Mapping[str, str], outcome: pd.Series, label: str
) -> tuple[Figure, str]:
    """A panel for each column of the table against the outcome, and what the colours mean."""
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.6 * across + 0.4, 2.4 * down + 0.8), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    known = "same_modality" in table
    colours = [_LEADING_COLOURS[same > 0] for same in table["same_modality"].astype(float)] if known else BLUE
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    for panel, (column, name) in zip(panels.flat, columns.items(), strict=False):
        panel.scatter(table[column].astype(float), outcome, s=22, color=colours, alpha=0.8, linewidths=0)
        panel.set_title(name)
    for panel in panels.flat[len(columns) :]:
        panel.remove()
    return figure, "orange: same modality as the target, blue: another; " if known else ""


def _method_colour(method: str) -> str:
    return GROUP_COLOURS[method_group(method)]


def _interval(panel: Axes, ends: Sequence[float], row: float, colour: str) -> None:
    """A diamond at the first of three numbers and a bar between the others; no bar where they are NaN."""
    centre, low, high = ends
    panel.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
    panel.plot([centre], [row], marker="D", color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)


def _dot(colour: str, strength: float = 1.0) -> dict[str, Any]:
    """A circle filled from white (0) to the full colour (1)."""
    face = tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))
    return {"color": colour, "marker": "o", "markerfacecolor": face, "markersize": 4.8, "linestyle": "none"}
