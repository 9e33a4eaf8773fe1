"""Figures: brain slices with labels, risk maps, overlays, and plots of an audit, a comparison or a ranking.

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

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
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
    "plot_ranking",
    "plot_risk_maps",
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
GROUP_COLOURS = {"baseline": "#0072B2", "weighting": "#D55E00", "control": "#009E73", "all parameters": "#CC79A7"}

SPLIT_NAMES = {"train": "training", "val": "validation"}

Colour = tuple[float, ...]

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
}
_RANKING_COLOURS = {True: GROUP_COLOURS["weighting"], False: GROUP_COLOURS["baseline"]}
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
        _row_label(axes[i, 0], row)
    _mark_sides(axes[0, 0])
    for column, names in (class_names or {}).items():
        handles = _class_handles(names)
        axes[-1, columns.index(column)].legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            fontsize=7,
            handlelength=0.9,
            ncols=len(handles),
            columnspacing=0.9,
            handletextpad=0.4,
        )
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
    for name, of in {"images": images, "truths": truths, **predictions}.items():
        if len(of) != len(subjects):
            raise InputError(f"plot_overlay has {len(subjects)} subjects but {len(of)} slices in '{name}'.")
    figure, axes = _slices_grid(len(subjects), 2 + len(predictions), size=2.1, height=0.5 + 0.25 * len(subjects))
    for i, subject in enumerate(subjects):
        outlines = {"image": None, "truth": truths[i], **{name: of[i] for name, of in predictions.items()}}
        for panel, (name, labels) in zip(axes[i], outlines.items(), strict=True):
            _show_panel(panel, np.asarray(images[i], dtype=float))
            heading = name if i == 0 else ""
            if labels is not None:
                _outline(panel, labels, len(class_names))
            if name in predictions:
                dice = _slice_dice(truths[i], labels, len(class_names))
                figures = "nothing to segment" if np.isnan(dice) else f"Dice of the slice {dice:.2f}"
                heading = f"{heading}\n{figures}".strip()
            panel.set_title(heading, loc="center")
        _row_label(axes[i, 0], subject)
    _mark_sides(axes[0, 0])
    figure.legend(handles=_class_handles(class_names), loc="outside right upper", fontsize=8, handlelength=1)
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
    decisive = table[table["split"] == splits[0]].reset_index(drop=True)
    arms = list(decisive["arm"])
    figure = Figure(figsize=(3.0 * (len(splits) + 1) + 0.6, 1.7 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(splits) + 1, sharey=True, squeeze=False)[0]
    scores, differences = [panels[0], *panels[2:]], panels[1]
    for panel, split in zip(scores, splits, strict=True):
        _arm_scores(panel, patients[patients["split"] == split], table[table["split"] == split].set_index("arm"), arms)
        name = SPLIT_NAMES.get(split, split)
        count = patients.loc[patients["split"] == split, "subject"].nunique()
        panel.set_title(f"{name}: {count} patient{'s' if count > 1 else ''}")
        panel.set_xlabel("mean Dice over classes")
    limits = _common_limits(scores)
    for panel in scores:
        panel.set_xlim(*limits)
    _arm_differences(differences, decisive, arms)
    differences.set_title(f"{SPLIT_NAMES.get(splits[0], splits[0])}: difference to the best")
    differences.set_xlabel("Dice, arm minus best")
    _name_rows(panels[0], arms, bold={recommended})
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

    figure = Figure(figsize=(3.2 + 2.7 * len(pairs), 1.5 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    offsets = np.linspace(-0.17, 0.17, len(sizes)) if len(sizes) > 1 else [0.0]
    for panel, pair in zip(panels, pairs, strict=True):
        for rank, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            cell = summary[(summary["pair"] == pair) & (summary["slices"] == size)].set_index("method")
            if reference in cell.index:
                panel.axvline(cell.loc[reference, "mean"], color=_GREY, linestyle="--", linewidth=0.8, zorder=0)
            for method, row in cell.iterrows():
                colour = GROUP_COLOURS[method_group(method)]
                face = _tint(colour, rank, len(sizes))
                _method_dot(panel, row, rows.index(method) + offset, colour=colour, face=face)
        panel.set_title(pair)
        panel.set_xlabel("mean Dice")
        panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    _name_rows(panels[0], rows, bold={reference})
    _comparison_legend(figure, groups, sizes)
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
    figure = Figure(figsize=(9.2, 1.9 + 0.3 * len(names)), layout="constrained")
    scores, ranks, firsts = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 1.3])
    for place, row in table.iterrows():
        colour = _RANKING_COLOURS[row["source"] in tied]
        if np.isfinite(row["score"]):
            _interval(scores, row["score"], row["low"], row["high"], place, colour)
            raised = place - 0.15 if baselines else place
            _interval(ranks, row["rank"], row["rank_low"], row["rank_high"], raised, colour)
        else:
            scores.text(0.02, place, "no score", transform=scores.get_yaxis_transform(), va="center", color=_GREY)
        for style, column in zip(cycle(_BASELINE_MARKS), baselines, strict=False):
            ranks.plot([row[column]], [place + 0.2], **style)
        firsts.barh(place, np.nan_to_num(row["p_best"]), height=0.55, color=colour)
    scores.set(title=metric, xlabel="higher is better")
    ranks.set(title="rank", xlabel="1 is best", xlim=(0.4, len(names) + 0.6))
    ranks.xaxis.set_major_locator(MaxNLocator(integer=True))
    firsts.set(title="ranked first", xlabel="share of resamples", xlim=(0, 1))
    for panel in (scores, ranks, firsts):
        panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    _name_rows(scores, names, bold=set(tied))
    lead = "preferred" if recommended else "tied at the top" if len(tied) > 1 else "best guess"
    shown = ([(lead, True)] if tied else []) + ([("others", False)] if len(tied) < len(names) else [])
    _ranking_legend(figure, shown, [column.removesuffix("_rank") for column in baselines])
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
    ranks = dict(sorted(dict(average_ranks).items(), key=lambda item: item[1]))
    if len(ranks) < 2:
        raise InputError(f"A critical-difference diagram needs at least two methods; found {len(ranks)}.")
    if unknown := [method for group in groups for method in group if method not in ranks]:
        raise InputError(f"groups names {unknown[0]}, which has no average rank. Known: {', '.join(ranks)}.")
    names, drop = list(ranks), 0.35 * len(groups)
    rows = (len(names) + 1) // 2
    inches = 0.9 + 0.08 * max(len(name) for name in names)  # what a name and its number take, beside 4.5 for the axis
    margin = inches * (len(names) - 1) / 4.5
    figure = Figure(figsize=(4.5 + 2 * inches, 0.7 + 0.27 * (rows + drop + 3)), layout="constrained")
    panel = figure.subplots()
    panel.set(xlim=(1 - margin, max(len(names) + margin, 1.1 + critical_difference)), ylim=(-drop - rows - 0.4, 2.6))
    panel.axis("off")
    _rank_axis(panel, len(names), critical_difference)
    for place, group in enumerate(groups):
        ends = [f([ranks[method] for method in group]) for f in (min, max)]
        panel.plot(ends, [-0.4 - 0.35 * place] * 2, color=_GREY, linewidth=4, solid_capstyle="round")
    for place, (name, rank) in enumerate(ranks.items()):
        left = place < rows
        row = place if left else len(names) - 1 - place  # the outermost method ends highest, so that no lines cross
        _rank_label(panel, name, rank, left=left, count=len(names), height=-drop - 0.8 - row, best=place == 0)
    note = "average rank over targets, 1 is best; a bar joins what cannot be told apart"
    return _finish(figure, title, synthetic, note)


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
    colours = ListedColormap(["black", *CLASS_COLOURS])
    # More classes than colours share the last one; a label panel is for a handful of classes.
    norm = BoundaryNorm(np.arange(len(CLASS_COLOURS) + 2) - 0.5, colours.N, clip=True)
    panel.imshow(to_display(array.astype(int)), cmap=colours, norm=norm, interpolation="nearest")


def _outline(panel: Axes, labels: ArrayLike, n_classes: int) -> None:
    picture = to_display(labels)
    for index in range(1, n_classes + 1):
        if (mask := picture == index).any():
            colour = CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]
            panel.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=1.1)


def _slice_dice(truth: ArrayLike, prediction: ArrayLike, n_classes: int) -> float:
    """Mean Dice over the classes in either slice; NaN where there is none."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    scores = [
        2 * np.sum((truth == index) & (prediction == index)) / total
        for index in range(1, n_classes + 1)
        if (total := np.sum(truth == index) + np.sum(prediction == index))
    ]
    return float(np.mean(scores)) if scores else np.nan


def _middle_slice(array: ArrayLike) -> np.ndarray:
    array = np.asarray(array, dtype=float)
    return array[..., array.shape[-1] // 2] if array.ndim == 3 else array


def _row_label(panel: Axes, text: str) -> None:
    panel.set_ylabel(text, fontsize=9)


def _mark_sides(panel: Axes) -> None:
    for x, side in ((0.03, "R"), (0.97, "L")):
        panel.text(
            x,
            0.5,
            side,
            transform=panel.transAxes,
            color="white",
            fontsize=7,
            va="center",
            ha="center",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "black", "edgecolor": "none", "alpha": 0.6},
        )


def _class_handles(class_names: Sequence[str]) -> list[Patch]:
    return [Patch(color=CLASS_COLOURS[i % len(CLASS_COLOURS)], label=name) for i, name in enumerate(class_names)]


def _comparison_legend(figure: Figure, groups: Sequence[str], sizes: Sequence[int]) -> None:
    def dot(label: str, colour: str, face: Colour, line: str) -> Line2D:
        return Line2D([], [], color=colour, marker="o", markersize=5, markerfacecolor=face, linestyle=line, label=label)

    handles = [dot(group, GROUP_COLOURS[group], to_rgb(GROUP_COLOURS[group]), "-") for group in groups]
    if len(sizes) > 1:
        for rank, size in enumerate(sizes):
            handles.append(dot(f"{size} slices", _GREY, _tint(_GREY, rank, len(sizes)), "none"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def _arm_scores(panel: Axes, patients: pd.DataFrame, table: pd.DataFrame, arms: Sequence[str]) -> None:
    jitter = np.random.default_rng(0)
    for row, arm in enumerate(arms):
        dice = patients.loc[patients["method"] == arm, "dice"]
        height = row + 0.05 + jitter.uniform(0.05, 0.25, len(dice))
        panel.scatter(dice, height, s=11, color=_GREY, alpha=0.55, linewidths=0)
        mean, low, high = table.loc[arm, ["mean", "low", "high"]]
        _interval(panel, mean, low, high, row - 0.08, _arm_colour(arm))
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)


def _arm_differences(panel: Axes, table: pd.DataFrame, arms: Sequence[str]) -> None:
    panel.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    for row, arm in enumerate(arms):
        difference, low, high = table.loc[row, ["difference", "difference_low", "difference_high"]]
        _interval(panel, difference, low, high, row, _arm_colour(arm))
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)


def _arm_colour(arm: str) -> str:
    return GROUP_COLOURS[method_group(arm)]


def _interval(panel: Axes, centre: float, low: float, high: float, row: float, colour: str) -> None:
    """A diamond and its bar; no bar where the interval is NaN."""
    panel.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
    panel.plot([centre], [row], marker="D", color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)


def _method_dot(panel: Axes, row: pd.Series, height: float, *, colour: str, face: Colour) -> None:
    if np.isfinite(row["sd"]):
        panel.plot([row["mean"] - row["sd"], row["mean"] + row["sd"]], [height, height], color=colour, linewidth=1.3)
    panel.plot([row["mean"]], [height], marker="o", color=colour, markerfacecolor=face, markersize=4.8)
    if row["p_holm"] < 0.05:
        end = row["mean"] + np.nan_to_num(row["sd"])
        panel.annotate("*", (end, height), xytext=(2, -4), textcoords="offset points")


def _ranking_legend(figure: Figure, sources: Sequence[tuple[str, bool]], baselines: Sequence[str]) -> None:
    handles = [
        Line2D([], [], marker="D", color=_RANKING_COLOURS[leads], linestyle="none", label=label)
        for label, leads in sources
    ]
    for style, name in zip(cycle(_BASELINE_MARKS), baselines, strict=False):
        handles.append(Line2D([], [], label=f"by {name.replace('_', ' ')}", **style))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def _rank_axis(panel: Axes, count: int, critical_difference: float) -> None:
    panel.plot([1, count], [0, 0], color="black", linewidth=1)
    for rank in range(1, count + 1):
        panel.plot([rank, rank], [0, 0.15], color="black", linewidth=1)
        panel.text(rank, 0.25, str(rank), ha="center", va="bottom")
    end = 1 + critical_difference
    panel.plot([1, end], [1.5, 1.5], color="black", linewidth=1.5, marker="|", markersize=6)
    panel.text((1 + end) / 2, 1.65, f"critical difference {critical_difference:.2f}", ha="center", va="bottom")


def _rank_label(panel: Axes, name: str, rank: float, *, left: bool, count: int, height: float, best: bool) -> None:
    """A line from the rank on the axis down and out to the name, left or right."""
    colour, side, gap = _RANKING_COLOURS[best], 1 if left else count, 0.015 * (count - 1)
    panel.plot([rank, rank, side], [0, height, height], color=colour, linewidth=1.1)
    panel.text(
        side - gap if left else side + gap,
        height,
        f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}",
        ha="right" if left else "left",
        va="center",
        color=colour,
        fontweight="bold" if best else "normal",
    )


def _tint(colour: str, rank: int, count: int) -> Colour:
    """White for the first of several, the full colour for the last."""
    strength = rank / (count - 1) if count > 1 else 1.0
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _name_rows(panel: Axes, names: Sequence[str], *, bold: set[str | None]) -> None:
    """Name the rows on the shared vertical axis, first row at the top."""
    named = [(row, name) for row, name in enumerate(names) if name]
    panel.set_yticks([row for row, _ in named], [name for _, name in named])
    panel.set_ylim(len(names) - 0.4, -0.6)
    for tick in panel.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in bold else "normal")


def _common_limits(panels: Sequence[Axes]) -> tuple[float, float]:
    limits = [panel.dataLim for panel in panels]
    low, high = min(limit.x0 for limit in limits), max(limit.x1 for limit in limits)
    space = 0.04 * (high - low) or 0.05
    return low - space, high + space
