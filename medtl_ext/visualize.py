"""Figures: brain slices with labels, risk maps, overlays, and plots of audits, comparisons, rankings and their worth.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so it needs no display and leaves no global
state; `save_figure` writes it, with values to point at. Slices come in as (X, Y) arrays in RAS (x to the patient's
right, y to the front) and are shown the radiological way: front up, the patient's right on the left of the picture.
Colours are those of Okabe and Ito, which readers with any colour vision tell apart.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import Collection, LineCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from medtl_ext._io import atomic_path, write_text
from medtl_ext._validation import InputError, require_choice

CLASS_COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#009E73", "#CC79A7", "#0072B2", "#E69F00")
METHOD_GROUPS = dict.fromkeys(("zero_shot", "scratch", "vanilla", "placebo", "dice_ce", "full"), "baseline")
METHOD_GROUPS |= dict.fromkeys(("frequency", "prior_image", "prior_shift"), "control")
"""Methods that are not loss weightings: baselines, and controls that weight without having seen the source."""
BLUE, ORANGE = "#0072B2", "#D55E00"
GROUP_COLOURS = {"baseline": BLUE, "weighting": ORANGE, "control": "#009E73", "all parameters": "#CC79A7"}

SPLIT_NAMES = {"train": "training", "val": "validation"}
OUTCOME_NAMES = {"dice": "Dice", "auc": "AUC", "gain": "Dice less the target's mean"}

_GREY = "#6b6b6b"
_STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "legend.fontsize": 8,
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "black"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
_LEADING_COLOURS = {True: ORANGE, False: BLUE}
_BASELINE_MARKS = [
    {"marker": marker, "markersize": size, "color": _GREY, "markerfacecolor": "none", "linestyle": "none"}
    for marker, size in (("s", 8.5), ("o", 5.0), ("^", 6.5), ("v", 6.5), ("P", 6.5), ("X", 6.5))
]
"""Of different sizes: where two baselines agree, one shows inside the other."""
_CLUSTER_COLOURS = (*CLASS_COLOURS, "#999999", "#8c510a", "#b2df8a")  # SeqTran's graph has nine clusters
_MOST_EDGES = 400  # more would be a grey disc: then only the shortest are drawn
_MOST_MARKS = 2000  # more would fill a page: then they are pixels, which say nothing
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RADIOLOGICAL = "radiological view: the patient's right (R) is on the left"
_SIDES = {"RL": _RADIOLOGICAL, "AP": "seen from the side: the patient's front (A) is on the left", "": ""}
_SMALL = 0.03  # foreground of less than this share of the body is zoomed in


def method_group(method: str) -> str:
    """The group a method is drawn in: ``baseline``, ``weighting``, ``control`` or ``all parameters`` (``full_*``).

    >>> [method_group(name) for name in ("scratch", "risk_map", "prior_image", "full_risk_map")]
    ['baseline', 'weighting', 'control', 'all parameters']
    """
    return "all parameters" if method.startswith("full_") else METHOD_GROUPS.get(method, "weighting")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure at 150 dots per inch, whole or not at all; the suffix of ``path`` chooses the format.

    A PNG without images in it has an SVG of its name beside it, whose marks say in a browser what they are.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    if Path(path).suffix == ".png" and not any(panel.images for panel in figure.axes):
        write_text(Path(path).with_suffix(".svg"), _svg(figure, Path(path).stem))


def _svg(figure: Figure, name: str) -> str:
    """A figure as SVG, without a background. Ids are made from the name, so that several may stand on one page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn := StringIO(), format="svg", transparent=True, dpi=150, metadata={"Date": None})
    for prefix, space in {"": _SVG, "xlink": _LINK}.items():
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(drawn.getvalue())
    root.remove(root.find(f"{{{_SVG}}}metadata"))
    root.set("xml:space", "preserve")  # a space keeps a word off a line
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)
    for mark in list(root.iter(f"{{{_SVG}}}a")):  # matplotlib's only way to attach words to each mark of many is a link
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text, mark.tag, mark.attrib = mark.get(f"{{{_LINK}}}href"), f"{{{_SVG}}}g", {"role": "img"}
        mark.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def to_display(array: ArrayLike, *, photograph: bool = False) -> np.ndarray:
    """Turn an (X, Y) slice in RAS into picture rows: front at the top, the patient's right on the left.

    A photograph is turned into its own rows. Colours are a third axis of three.

    >>> to_display([[1, 2], [3, 4]]).tolist()  # x = 1, y = 1 is right and front: it goes to the top left
    [[4, 2], [3, 1]]
    """
    array = np.asarray(array)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise InputError(f"A picture needs one slice, shape (X, Y); found {array.shape}. Take a channel and a slice.")
    rows = array.swapaxes(0, 1)
    return rows if photograph else rows[::-1, ::-1]


@matplotlib.rc_context(_STYLE)
def plot_montage(
    images: Mapping[str, Mapping[str, ArrayLike]],
    *,
    class_names: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    synthetic: bool = False,
    photographs: bool = False,
) -> Figure:
    """A grid of slices, such as subjects by modalities and labels.

    Args:
        images: row name -> column name -> (X, Y) slice. Floating arrays are shown in grey, or (X, Y, 3) in colour,
            stretched between their 1st and 99th percentile; integer arrays as label panels with one colour per class,
            0 black. A missing panel stays empty.
        class_names: label column -> names of its classes 1, 2, ..., listed below that column.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
        photographs: they have no patient's right and left, and are shown in their own rows.

    >>> figure = plot_montage({"13-000": {"T1": np.random.rand(8, 9), "label": np.eye(8, 9, dtype=int)}})
    >>> len(figure.axes)
    2
    """
    columns = list(dict.fromkeys(column for row in images.values() for column in row))
    if not columns:
        raise InputError("plot_montage needs at least one image; found none.")
    figure, axes = _slices_grid(list(images), len(columns), height=0.9, sides=[""] if photographs else ["RL"])
    for i, panels in enumerate(images.values()):
        for j, column in enumerate(columns):
            if column in panels:
                _show_panel(axes[i, j], np.asarray(panels[column]), photographs)
            if i == 0:
                axes[i, j].set_title(column, loc="center")
    for column, names in (class_names or {}).items():
        style = {"fontsize": 7, "ncols": len(names), "handlelength": 0.9, "columnspacing": 0.9, "handletextpad": 0.4}
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        axes[-1, columns.index(column)].legend(handles=_class_handles(names), **below, **style)
    return _finish(figure, title, synthetic, "" if photographs else _RADIOLOGICAL)


@matplotlib.rc_context(_STYLE)
def plot_risk_maps(
    before: ArrayLike,
    after: ArrayLike | Mapping[str, ArrayLike],
    *,
    image: ArrayLike | None = None,
    quantity: str = "weight",
    title: str = "",
    synthetic: bool = False,
    photographs: bool = False,
) -> Figure:
    """A map before and after fine-tuning on one colour scale (RiskMap Fig. 2): bright where transfer is hard.

    Args:
        before, after: (X, Y) slices, after several ways of fine-tuning by their names; NaN (no valid pixel) is drawn in
            grey. The scale runs from the 0.5th to the 99.5th percentile of all, so that one extreme pixel does not
            darken the rest.
        image: slice of the same shape (or with three colours), shown beside the maps.
        quantity: ``"weight"`` (risk map, high is hard) or ``"leep"`` (LEEP map, low is hard).
        title: above the figure.
        synthetic, photographs: see `plot_montage`.

    Raises:
        InputError: shapes differ, or nothing is finite.

    >>> figure = plot_risk_maps(np.full((8, 9), 1.5), np.ones((8, 9)))
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['before fine-tuning\\nmean 1.50', 'after fine-tuning\\nmean 1.00']
    """
    require_choice("quantity", quantity, ["weight", "leep"])
    named = after if isinstance(after, Mapping) else {"fine-tuning": after}
    panels = {"image": image, "before fine-tuning": before} | {f"after {name}": one for name, one in named.items()}
    panels = {name: np.asarray(array, dtype=float) for name, array in panels.items() if array is not None}
    if len(shapes := {array.shape[:2] for array in panels.values()}) > 1:
        raise InputError(f"before, after and image must have one shape; found {sorted(shapes)}.")
    finite = np.concatenate([array[np.isfinite(array)] for name, array in panels.items() if name != "image"])
    if finite.size == 0:
        raise InputError("before and after hold no finite value; nothing to show.")
    low, high = np.percentile(finite, [0.5, 99.5])
    colours = matplotlib.colormaps["inferno" if quantity == "weight" else "inferno_r"].with_extremes(bad="#c8c8c8")

    figure, axes = _slices_grid([""], len(panels), size=2.6, height=0.7, sides=[""] if photographs else ["RL"])
    for panel, (name, array) in zip(axes[0], panels.items(), strict=True):
        if name == "image":
            _show_panel(panel, array, photographs)
            panel.set_title("\nimage", loc="center")
        else:
            rows = to_display(array, photograph=photographs)
            drawn = panel.imshow(rows, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            panel.set_title(f"{name}\nmean {np.nanmean(array):.2f}", loc="center")
    label = "risk weight (high: hard to transfer)" if quantity == "weight" else "LEEP (low: hard to transfer)"
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[finite.min() < low, finite.max() > high]
    figure.colorbar(drawn, ax=list(axes[0]), label=label, extend=extend, shrink=0.8, pad=0.02)
    return _finish(figure, title, synthetic, "" if photographs else _RADIOLOGICAL)


@matplotlib.rc_context(_STYLE)
def plot_overlay(
    images: Sequence[ArrayLike],
    truths: Sequence[ArrayLike],
    predictions: Mapping[str, Sequence[ArrayLike]],
    *,
    subjects: Sequence[str],
    class_names: Sequence[str],
    aspects: Sequence[float] | None = None,
    sides: Sequence[str] | None = None,
    title: str = "",
    synthetic: bool = False,
    photographs: bool = False,
) -> Figure:
    """Target slices with the outlines of truth and predictions: one row per subject, one column per prediction.

    Where the truth is less than 3 % of the body in its slice, the row is zoomed in to it and says so.

    Args:
        images: one (X, Y) slice per subject, or (X, Y, 3) in colour.
        truths: one (X, Y) label slice per subject, class 0 background.
        predictions: column name (a method) -> one (X, Y) label slice per subject. The Dice of this slice, averaged over
            the classes in it, stands above each; it is not the Dice of the volume.
        subjects: row names.
        class_names: names of classes 1, 2, ...
        aspects: of each subject, how much longer a pixel is along Y than along X; None: as long.
        sides: of each subject, ``"RL"`` where X goes to the patient's right, and ``"AP"`` where it goes to the front;
            None: to the right.
        title: above the figure.
        synthetic, photographs: see `plot_montage`.

    Raises:
        InputError: not one image, truth and prediction per subject.

    >>> label = np.eye(8, dtype=int)
    >>> figure = plot_overlay([np.random.rand(8, 8)], [label], {"full": [label]}, subjects=["p1"], class_names=["ED"])
    >>> [axes.get_title() for axes in figure.axes]
    ['image', 'truth', 'full\\nDice of the slice 1.00']
    """
    from sklearn.metrics import f1_score  # of pixels: Dice; slow to import

    for name, of in {"images": images, "truths": truths, **predictions}.items():
        if len(of) != len(subjects):
            raise InputError(f"plot_overlay has {len(subjects)} subjects but {len(of)} slices in '{name}'.")
    height = 0.5 + 0.25 * len(subjects)
    aspects, sides = aspects or [1.0] * len(subjects), [""] if photographs else sides or ["RL"] * len(subjects)
    figure, axes = _slices_grid(subjects, 2 + len(predictions), size=2.1, height=height, sides=sides)
    classes = np.arange(len(class_names)) + 1
    for i in range(len(subjects)):
        image, truth = np.asarray(images[i], dtype=float), np.asarray(truths[i])
        box = _box(image, truth > 0, aspects[i])
        if image[box].shape != image.shape:
            axes[i, 0].set_ylabel(f"{subjects[i]}\nzoomed in")
        outlines = {"image": None, "truth": truth, **{name: of[i] for name, of in predictions.items()}}
        for panel, (name, labels) in zip(axes[i], outlines.items(), strict=True):
            _show_panel(panel, image[box], photographs)
            panel.set_aspect(aspects[i])
            heading = [name] if i == 0 else []
            if labels is not None:
                _outline(panel, np.asarray(labels)[box], classes, photographs)
            if name in predictions:
                pair = np.ravel(truths[i]), np.ravel(labels)
                dice = f1_score(*pair, labels=classes, average="macro", zero_division=np.nan)
                heading.append("nothing to segment" if np.isnan(dice) else f"Dice of the slice {dice:.2f}")
            panel.set_title("\n".join(heading), loc="center")
    figure.legend(handles=_class_handles(class_names), loc="outside right upper", handlelength=1)
    return _finish(figure, title, synthetic, "; ".join(_SIDES[side] for side in dict.fromkeys(sides)))


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
    tables = dict(list(table.set_index("arm").groupby("split", sort=False)))
    (decided_by, decisive), *_ = tables.items()
    arms = list(decisive.index)
    rows, colours = np.arange(len(arms)), [GROUP_COLOURS[method_group(arm)] for arm in arms]
    size = (3.0 * (len(tables) + 1) + 0.6, 1.7 + 0.42 * len(arms))
    figure, (first, differences, *others) = _row_panels(arms, len(tables) + 1, size, {recommended})
    for panel, split in zip([first, *others], tables, strict=True):
        dots = patients[(patients["split"] == split) & patients["method"].isin(arms)]
        heights = dots["method"].map(arms.index) + np.random.default_rng(0).uniform(0.1, 0.3, len(dots))
        drawn = panel.scatter(dots["dice"], heights, s=11, color=_GREY, alpha=0.55, linewidths=0)
        _say(drawn, dots.set_index("subject")[["method", "dice"]])
        _intervals(panel, tables[split].loc[arms, ["mean", "low", "high"]], rows - 0.08, colours)
        count = dots["subject"].nunique()
        panel.set_title(f"{SPLIT_NAMES.get(split, split)}: {count} patient{'s' if count > 1 else ''}")
        panel.set_xlabel("mean Dice over classes")
    for panel in others:
        panel.sharex(first)
    differences.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    _intervals(differences, decisive[["difference", "difference_low", "difference_high"]], rows, colours)
    differences.set_title(f"{SPLIT_NAMES.get(decided_by, decided_by)}: difference to the best")
    differences.set_xlabel("Dice, arm minus best")
    note = "dots: patients; diamonds: mean with 95 % bootstrap interval; differences: 95 % paired t interval"
    return _finish(figure, title, synthetic, note)


@matplotlib.rc_context(_STYLE)
def plot_comparison(
    summary: pd.DataFrame, *, reference: str = "vanilla", title: str = "", synthetic: bool = False
) -> Figure:
    """Methods compared on one panel per pair: mean Dice with its spread over runs, grouped by kind of method.

    Args:
        summary: the table of `medtl_ext.transfer.compare_report`: columns ``pair, slices, method, mean, sd, run_means,
            differs``. Slice numbers are drawn from hollow (the smallest) to filled.
        reference: method marked by a dashed line per slice number.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    pairs, sizes = summary.groupby("pair", sort=False), sorted(summary["slices"].unique())
    groups = [group for group in GROUP_COLOURS if group in set(summary["method"].map(method_group))]
    rows: list[str] = []
    for group in groups:  # a blank row keeps the groups apart
        rows += [*([""] if rows else []), *(m for m in dict.fromkeys(summary["method"]) if method_group(m) == group)]

    figure, panels = _row_panels(rows, len(pairs), (3.2 + 2.7 * len(pairs), 1.5 + 0.26 * len(rows)), {reference})
    several = len(sizes) > 1
    strengths = dict(zip(sizes, np.linspace(0, 1, len(sizes)) if several else [1.0], strict=True))
    for panel, (pair, cells) in zip(panels, pairs, strict=True):
        for mean in cells.loc[cells["method"] == reference, "mean"]:
            panel.axvline(mean, color=_GREY, linestyle="--", linewidth=0.8, zorder=0)
        strength, mean, spread = cells["slices"].map(strengths), cells["mean"], cells["sd"]
        heights = cells["method"].map(rows.index) + (0.34 * (strength - 0.5) if several else 0.0)
        colours = [GROUP_COLOURS[method_group(method)] for method in cells["method"]]
        bars = panel.hlines(heights, mean - spread, mean + spread, colours, linewidth=1.3)
        runs = cells.assign(run=cells["run_means"], height=heights, colour=colours).explode("run").set_index("method")
        ticks = {"marker": "|", "s": 49, "c": runs["colour"], "linewidths": 0.8}
        _say(panel.scatter(runs["run"].astype(float), runs["height"], **ticks), runs[["slices", "run"]])
        dots = panel.scatter(mean, heights, s=24, c=list(map(_tint, colours, strength)), edgecolors=colours, zorder=3)
        for drawn in (bars, dots):
            _say(drawn, cells.set_index("method")[["slices", "mean", "sd"]])
        ends = pd.DataFrame({"end": mean + spread.fillna(0), "height": heights})
        for end in ends[cells["differs"]].to_numpy():
            panel.annotate("*", end, xytext=(2, -4), textcoords="offset points")
        panel.set(title=pair, xlabel="mean Dice")
    keys = [(group, GROUP_COLOURS[group], 1.0) for group in groups]
    keys += [(f"{slices} slices", _GREY, strength) for slices, strength in strengths.items() if several]
    dot = {"marker": "o", "markersize": 5, "linestyle": "none"}
    handles = [Line2D([], [], label=k, color=c, markerfacecolor=_tint(c, strength), **dot) for k, c, strength in keys]
    figure.legend(handles=handles, loc="outside right upper")
    note = f"dots: mean, bars: sd over runs, ticks: runs; vertical line: {reference}; *: differs from {reference} "
    note += "(t test over patients and runs, Holm, p < .05)"
    return _finish(figure, title, synthetic, note)


@matplotlib.rc_context(_STYLE)
def plot_ranking(ranking: Any, *, metric: str = "score", title: str = "", synthetic: bool = False) -> Figure:
    """A ranking of sources: score and rank with their intervals, what baselines would say, and how often each is first.

    Args:
        ranking: a `medtl_ext.ranking.SourceRanking`. The rows of its table are drawn from the top, baselines as hollow
            marks beside the ranks; a source without a score has its baseline ranks only. The leader and the sources
            that cannot be told from it are coloured, in bold, unless there were too few patients to tell.
        metric: what the score is called.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    >>> from medtl_ext.ranking import bootstrap_ranking
    >>> ranking = bootstrap_ranking({"13-T1-ED": [0.6, 0.5, 0.7, 0.6], "17-T1-ET": [0.4, 0.3, 0.5, 0.4]})
    >>> figure = plot_ranking(ranking, metric="LEEP")
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['LEEP', 'rank', 'ranked first']
    """
    table, tied = ranking.table.set_index("source"), ranking.tied if ranking.resamples else ()
    names, places = list(table.index), np.arange(len(table))
    marks = dict(zip(table.filter(like="_rank"), cycle(_BASELINE_MARKS), strict=False))
    figure, (scores, ranks, firsts) = _row_panels(names, 3, (9.2, 1.9 + 0.3 * len(names)), set(tied), [3, 3, 1.3])
    colours = [_LEADING_COLOURS[name in tied] for name in names]
    scored = table.where(table["score"].notna())
    _intervals(scores, scored[["score", "low", "high"]], places, colours)
    _intervals(ranks, scored[["rank", "rank_low", "rank_high"]], places - (0.15 if marks else 0), colours)
    for column, style in marks.items():
        mark = {"marker": style["marker"], "s": style["markersize"] ** 2, "facecolors": "none", "edgecolors": _GREY}
        _say(ranks.scatter(table[column], places + 0.2, **mark), table[[column]])
    for place in places[table["score"].isna()]:
        scores.text(0.02, place, "no score", transform=scores.get_yaxis_transform(), va="center", color=_GREY)
    bars = firsts.barh(places, table["p_best"].fillna(0), height=0.55, color=colours)
    for bar, name, share in zip(bars, names, table["p_best"], strict=True):
        bar.set_url(f"{name}: first in {share:.1%} of the resamples")
    scores.set(title=metric, xlabel="higher is better")
    ranks.set(title="rank", xlabel="1 is best", xlim=(0.4, len(names) + 0.6))
    ranks.locator_params(axis="x", integer=True, nbins=10)
    firsts.set(title="ranked first", xlabel="share of resamples", xlim=(0, 1))
    lead = "preferred" if ranking.recommendation else "tied at the top" if len(tied) > 1 else "best guess"
    key = ({lead: ORANGE} if tied else {}) | ({"others": BLUE} if len(tied) < len(names) else {})
    handles = [Line2D([], [], marker="D", linestyle="none", color=colour, label=label) for label, colour in key.items()]
    for column, style in marks.items():
        handles.append(Line2D([], [], label=f"by {column.removesuffix('_rank').replace('_', ' ')}", **style))
    figure.legend(handles=handles, loc="outside right upper")
    note = "diamonds: score and rank on all patients; bars: patient bootstrap interval"
    return _finish(figure, title, synthetic, f"{note}; hollow: rank by a baseline" if marks else note)


@matplotlib.rc_context(_STYLE)
def plot_critical_difference(test: Any, *, title: str = "", synthetic: bool = False) -> Figure:
    """Nemenyi diagram: methods along an axis of average ranks, bars over those that cannot be told apart.

    Args:
        test: a `medtl_ext.ranking.FriedmanNemenyi`, whose critical difference is drawn to scale above the axis.
        title: above the figure.
        synthetic: print "synthetic phantom" below.

    Reference: Demšar, JMLR 7, 2006, Fig. 1.

    >>> from medtl_ext.ranking import friedman_nemenyi
    >>> table = pd.DataFrame({"LEEP": [0.2, 0.3, 0.1, 0.4], "LogME": [0.5, 0.4, 0.6, 0.5], "SFDA": [0, 0, 0, 0.1]})
    >>> figure = plot_critical_difference(friedman_nemenyi(table))
    >>> [text.get_text().strip() for text in figure.axes[0].texts]
    ['LogME  1.00', 'LEEP  2.00', '3.00  SFDA', 'critical difference 1.66']
    """
    from scikit_posthocs import critical_difference_diagram  # slow to import

    ranks, groups, critical_difference = test.average_ranks, test.groups, test.critical_difference
    alike = pd.DataFrame(0.0, ranks.index, ranks.index)
    for group in groups:
        alike.loc[list(group), list(group)] = 1.0
    inches = 0.9 + 0.08 * max(len(name) for name in ranks.index)  # what a name and its number take beside the axis
    figure = Figure(figsize=(4.5 + 2 * inches, 1.7 + 0.27 * (len(ranks) / 2 + len(groups))), layout="constrained")
    panel = figure.subplots()
    drawn = critical_difference_diagram(
        ranks,
        alike,
        ax=panel,
        color_palette={name: _LEADING_COLOURS[name == ranks.index[0]] for name in ranks.index},
        label_fmt_left="{label}  {rank:.2f} ",
        label_fmt_right=" {rank:.2f}  {label}",
        elbow_props={"linewidth": 1.1, "clip_on": False},
        marker_props={"s": 12, "clip_on": False},
        crossbar_props={"color": _GREY, "linewidth": 4, "solid_capstyle": "round"},
    )
    drawn["labels"][0].set_fontweight("bold")
    for dot, elbow, label in zip(drawn["markers"], drawn["elbows"], drawn["labels"], strict=True):
        dot.set_urls([label.get_text().strip()])
        elbow.set_url(label.get_text().strip())
    for (bar,) in drawn["crossbars"]:
        joined = ranks.index[ranks.between(min(bar.get_xdata()), max(bar.get_xdata()))]
        bar.set_url(f"cannot be told apart: {', '.join(joined)}")
    end = 1 + critical_difference
    panel.set(xlim=(1, max(len(ranks), end)), ylim=(None, 2.3), xticks=range(1, len(ranks) + 1))
    panel.spines["top"].set(visible=True, bounds=(1, len(ranks)))
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
    scratch: float | None = None,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """A panel for each score: score (x) against what fine-tuning gave (y), one dot per source.

    Args:
        table: one row per source (the index) with the scores and the outcome; with ``same_modality``, that is the
            colour.
        scores: column -> what it is called. One without a value, or not in the table, gets no panel.
        outcome: column of the truth, ``dice`` or ``auc``; or ``gain``, the Dice less its mean over the sources of the
            same ``target`` and ``seed``.
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
    if outcome == "gain":
        table = table.assign(gain=table["dice"] - table.groupby(["target", "seed"])["dice"].transform("mean"))
    across = min(4, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(2.6 * across + 0.4, 2.4 * down + 0.8), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    figure.supylabel(OUTCOME_NAMES[outcome], fontsize=9)
    colours, notes = BLUE, []
    if "same_modality" in table:
        colours = [_LEADING_COLOURS[same > 0] for same in table["same_modality"].astype(float)]
        notes.append("orange: same modality as the target, blue: another")
    if scratch is not None:
        notes.append("dashed: training from scratch")
    for panel, (column, name) in zip(panels.flat, found.items(), strict=False):
        values = table[[column, outcome]].astype(float)
        _say(panel.scatter(*values.to_numpy().T, s=22, color=colours, alpha=0.8, linewidths=0), values)
        panel.set_title(name)
        if scratch is not None:
            panel.axhline(scratch, color=_GREY, linestyle="--", linewidth=0.8)
    for panel in panels.flat[len(found) :]:
        panel.remove()
    return _finish(figure, title, synthetic, "; ".join(notes))


@matplotlib.rc_context(_STYLE)
def plot_task_graph(
    graph: nx.Graph,
    clusters: Sequence[Sequence[str]],
    *,
    representatives: Sequence[str] = (),
    path: Sequence[str] | None = None,
    target: str | None = None,
    target_costs: Mapping[str, float] | None = None,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """Tasks near each other where their cost is low, coloured by cluster, as large as their samples are many.

    Args:
        graph: of `medtl_ext.graph.task_graph`.
        clusters: tasks of each cluster; representatives have a black ring.
        representatives: one task of each cluster.
        path: source tasks in order, drawn in bold on to the ``target``.
        target: a star, placed by its costs.
        target_costs: source task -> cost to the target.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    drawn = graph.copy()
    if target is not None:
        drawn.add_node(target)
        drawn.add_weighted_edges_from((target, task, cost) for task, cost in (target_costs or {}).items())
    places = _spring_layout(drawn)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    edges = sorted(graph.edges(data="weight"), key=lambda edge: edge[2])[:_MOST_EDGES]
    pairs = [edge[:2] for edge in edges]
    lines = nx.draw_networkx_edges(graph, places, edgelist=pairs, ax=axes, edge_color=_GREY, alpha=0.15)
    if pairs:
        _say(lines, pd.DataFrame({"cost": [edge[2] for edge in edges]}, [" - ".join(pair) for pair in pairs]))
    largest = max(size for _, size in graph.nodes(data="size"))
    for number, cluster in enumerate(clusters):
        colour = _CLUSTER_COLOURS[number % len(_CLUSTER_COLOURS)]
        ringed = np.isin(list(cluster), list(representatives))
        ring = {"edgecolors": np.where(ringed, "black", "white"), "linewidths": np.where(ringed, 1.6, 0.6)}
        samples = np.array([graph.nodes[task]["size"] for task in cluster])
        ring |= {"s": 60 + 340 * samples / largest, "c": colour}
        dots = axes.scatter(*np.transpose([places[task] for task in cluster]), zorder=2, **ring)
        _say(dots, pd.DataFrame({"cluster": number, "labelled samples": samples}, list(cluster)))
        axes.scatter([], [], s=64, c=colour, label=f"cluster {number}")
    if target is not None:
        axes.scatter(*places[target], s=480, c="black", marker="*", zorder=2).set_urls([f"{target}: the target"])
        axes.scatter([], [], s=121, c="black", marker="*", label="target")
    if path:
        axes.plot([], [], color="black", linewidth=2.4, label="best path")
    arrow = {"arrowstyle": "-|>", "linewidth": 2.4, "shrinkA": 9, "shrinkB": 9, "mutation_scale": 16}
    for a, b in pairwise([*(path or ()), *([target] if path and target else [])]):
        drawn = axes.annotate("", xy=places[b], xytext=places[a], arrowprops={"color": "black", **arrow})
        drawn.arrow_patch.set_url(f"best path: {a} to {b}")
    outline = [withStroke(linewidth=2.5, foreground="white")]
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "path_effects": outline}
    for task, place in places.items():
        weight = "bold" if task in {*(path or ()), target} else "normal"
        axes.annotate(task, place, (0, -17), fontweight=weight, **style)
    figure.legend(loc="outside right upper")
    note = "size: labelled samples; near: low cost; black ring: representative of its cluster"
    return _finish(figure, title, synthetic, note)


def _finish(figure: Figure, title: str, synthetic: bool, note: str) -> Figure:
    """Title and small print, wrapped: an inch holds 10 bold or 19 small characters, a legend takes 1.3 inches."""
    width, left = figure.get_figwidth(), {"x": 0.01, "ha": "left"}
    if title:
        figure.suptitle(textwrap.fill(title, max(20, int(10 * (width - 1.3)))), fontsize=11, fontweight="bold", **left)
    note = "; ".join(filter(None, ["synthetic phantom" if synthetic else "", note]))
    figure.supxlabel(textwrap.fill(note, int(19 * width)), fontsize=7, color=_GREY, **left)
    return figure


def _slices_grid(
    rows: Sequence[str], columns: int, *, size: float = 1.7, height: float, sides: Sequence[str]
) -> tuple[Figure, np.ndarray]:
    """Empty panels whose rows are named, the patient's sides marked in the first ones."""
    figure = Figure(figsize=(size * columns + 0.4, size * len(rows) + height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.05, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for panel, row in zip(axes[:, 0], rows, strict=True):
        panel.set_ylabel(row)
    box = {"boxstyle": "square,pad=0.15", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
    style = {"color": "white", "fontsize": 7, "bbox": box}
    for panel, marks in zip(axes[:, 0], sides, strict=False):
        for x, side in zip((0.03, 0.97), marks, strict=False):
            panel.text(x, 0.5, side, va="center", ha="center", transform=panel.transAxes, **style)
    return figure, axes


def _show_panel(panel: Axes, array: np.ndarray, photograph: bool) -> None:
    rows = to_display(array, photograph=photograph)
    if array.ndim == 3:
        low, high = np.nanpercentile(array, [1, 99], axis=(0, 1))
        panel.imshow(np.clip((rows - low) / np.where(high > low, high - low, 1), 0, 1))
        return
    if np.issubdtype(array.dtype, np.floating):
        low, high = np.nanpercentile(array, [1, 99])
        panel.imshow(rows, cmap="gray", vmin=low, vmax=high if high > low else low + 1)
        return
    # More classes than colours share the last one; a label panel is for a handful of classes.
    colours = ListedColormap(["black", *CLASS_COLOURS])
    panel.imshow(rows, cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, interpolation="nearest")


def _box(image: np.ndarray, mask: np.ndarray, aspect: float) -> tuple[slice, ...]:
    """What of a slice is shown: all, or the surroundings of a small mask."""
    signal = np.abs(image if image.ndim == 2 else image.mean(2))
    body = (signal > 0.05 * signal.max()).sum()  # without the noise around it
    if not 0 < mask.sum() < _SMALL * body:
        return (slice(None), slice(None))
    places, unit = np.argwhere(mask), np.array([1.0, aspect])
    first, last = places.min(0), places.max(0) + 1
    reach = np.ceil((0.75 * ((last - first) * unit).max() + 12 * unit.max()) / unit)
    low, high = (first + last) / 2 - reach, (first + last) / 2 + reach
    return tuple(slice(int(max(start, 0)), int(np.ceil(end))) for start, end in zip(low, high, strict=True))


def _outline(panel: Axes, labels: np.ndarray, classes: np.ndarray, photograph: bool) -> None:
    """The edges of each class's pixels, so that a single one has four."""
    rows = to_display(labels, photograph=photograph)
    width = float(np.clip(110 / max(rows.shape), 0.4, 1.1))  # else the outlines of fine vessels fill them
    for index in np.intersect1d(rows.astype(int), classes):
        mask = np.pad(rows == index, 1)
        ends = [np.argwhere(np.diff(mask, axis=axis))[:, ::-1] - 0.5 for axis in (0, 1)]
        lines = [np.stack([end - step, end], axis=1) for end, step in zip(ends, ([1, 0], [0, 1]), strict=True)]
        colour = CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]
        panel.add_collection(LineCollection(np.concatenate(lines), colors=colour, linewidths=width, capstyle="round"))


def _class_handles(class_names: Sequence[str]) -> list[Patch]:
    return [Patch(color=CLASS_COLOURS[i % len(CLASS_COLOURS)], label=name) for i, name in enumerate(class_names)]


def _row_panels(
    names: Sequence[str], columns: int, size: tuple[float, float], bold: set, widths: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """Panels side by side whose shared vertical axis names the rows, first row at the top."""
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False, width_ratios=widths)[0]
    named = [(row, name) for row, name in enumerate(names) if name]
    panels[0].set_yticks([row for row, _ in named], [name for _, name in named])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for tick in panels[0].get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in bold else "normal")
    for panel in panels:
        panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    return figure, panels


def _intervals(panel: Axes, table: pd.DataFrame, heights: np.ndarray, colours: Sequence[str]) -> None:
    """Of three columns the first as diamonds, the others as ends of bars; NaN is not drawn."""
    centre, low, high = table.to_numpy(dtype=float).T
    diamond = {"s": 40, "marker": "D", "edgecolors": "white", "linewidths": 0.6, "zorder": 3}
    _say(panel.hlines(heights, low, high, colours, linewidth=2, capstyle="round"), table)
    _say(panel.scatter(centre, heights, c=colours, **diamond), table)


def _say(marks: Collection, table: pd.DataFrame) -> None:
    """What each mark says where the pointer is: its name, which is the index, and the values of its row."""
    rows = table.rename(columns=lambda column: column.replace("_", " ")).to_dict("records")
    words = [[f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items() if v == v] for row in rows]
    marks.set_urls([f"{name}: {', '.join(of)}" for name, of in zip(table.index, words, strict=True)])
    marks.set_rasterized(len(table) > _MOST_MARKS)


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    """From white (0) to the full colour (1)."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _spring_layout(graph: nx.Graph) -> dict[str, np.ndarray]:
    """Springs that pull as the cost is low; the same picture in every run."""
    costs = np.array([cost for *_, cost in graph.edges(data="weight")])
    unit = float(np.median(costs[costs > 0])) if (costs > 0).any() else 1.0
    pulled = nx.Graph()
    pulled.add_nodes_from(sorted(graph))
    pulled.add_weighted_edges_from((a, b, 1 / (0.2 + cost / unit)) for a, b, cost in graph.edges(data="weight"))
    return nx.spring_layout(pulled, seed=0, iterations=200, k=2.2 / np.sqrt(len(pulled)))
