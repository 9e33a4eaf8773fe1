"""Which source dataset should I transfer from? The steps of ``train.json``, in the order of its ``run``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_choice, require_choices
from medtl_ext.bundle import current_config, run_command
from medtl_ext.data.classification import ClassificationDataset
from medtl_ext.datasets.scoring import (
    LABELS,
    METRICS,
    NO_INTERVAL,
    SLOW,
    SLOW_RESAMPLES,
    Seen,
    resampled_scores,
)
from medtl_ext.datasets.sources import source_name
from medtl_ext.ranking import SourceRanking, baseline_rankings, bootstrap_ranking, listed
from medtl_ext.visualize import plot_ranking, save_figure

# What a fine-tuning must share with the ranking.
CARRIED = (
    "collection",
    "phantom_subjects",
    "train_per_class",
    "val_per_class",
    "image_size",
    "in_channels",
    "network_def",
    "seed",
)


def check_options(
    *,
    target: ClassificationDataset,
    in_channels: int,
    image_size: int,
    metrics: Sequence[str],
    decide_by: str,
    minimum_win: float,
    minimum_gap: float,
    n_resamples: int,
) -> None:
    """Refuse what cannot work before anything long runs.

    Raises:
        InputError: an unknown metric, a number out of range, RGB images for a network of one channel, or a split of
            the target without an image.
    """
    require_choices("metric", metrics, METRICS)
    if require_choice("decide_by", decide_by, METRICS) not in metrics:
        raise InputError(f"decide_by is {decide_by}, which is not in metrics; add it there: {', '.join(metrics)}.")
    if not 0.5 < minimum_win <= 1 or not 0 <= minimum_gap <= 1:
        raise InputError(
            f"minimum_win is {minimum_win} and minimum_gap {minimum_gap}; they must lie in (0.5, 1] and in [0, 1]."
        )
    if n_resamples < 1 or in_channels not in (1, 3) or image_size < 16:
        raise InputError(
            f"n_resamples is {n_resamples}, in_channels {in_channels}, image_size {image_size}; expected at least 1, 1 "
            "or 3, and at least 16."
        )
    for split in ("train", "val", "test"):
        target.datalist(split, channels=in_channels)


def rank_sources(
    scores: pd.DataFrame,
    observed: Mapping[str, Seen],
    *,
    target: ClassificationDataset,
    decide_by: str,
    cross_domain: bool,
    n_resamples: int,
    minimum_win: float,
    minimum_gap: float,
    seed: int,
    output_dir: str,
    figures: bool = True,
) -> SourceRanking | None:
    """Rank the sources, say which to use and how sure that is, and write it all down.

    Writes ``ranking.csv``, ``ranking.json``, ``ranking.png`` and ``answer.txt``, and prints the answer.

    Args:
        scores: of `score_table`; the target's own model is in it, and is never ranked.
        observed: of `observe`.
        target: the target's images, as they were sampled.
        decide_by: the score that decides. LP, FU and LP x FU have no interval, and so no verdict.
        cross_domain: LP x FU was turned round, which the answer says.
        n_resamples, minimum_win, minimum_gap, seed: see `medtl_ext.ranking.bootstrap_ranking`.
        output_dir: where the files go.
        figures: draw ``ranking.png``.

    Returns:
        The ranking; None in all but the first of several processes.
    """
    if idist.get_rank() != 0:
        return None
    ready = scores[~scores["own"].astype(bool)]
    units = len(next(iter(observed.values())).samples.names)
    options = {"minimum_win": minimum_win, "minimum_gap": minimum_gap, "seed": seed, "metric": LABELS[decide_by]}
    options |= {"baselines": _baselines(ready, seed), "synthetic": target.synthetic}
    if decide_by in NO_INTERVAL:
        ranking = _without_interval(ready[decide_by].to_dict(), options)
    else:
        resamples = min(n_resamples, SLOW_RESAMPLES) if decide_by in SLOW else n_resamples
        functions = resampled_scores(decide_by, observed, list(ready.index), seed=seed)
        ranking = bootstrap_ranking(functions, patients=units, n_resamples=resamples, **options)
    answer = " ".join(_sentences(ranking, scores, target, decide_by=decide_by, cross_domain=cross_domain))
    winner = ranking.default
    command = None if winner is None else next_command(winner, scores.loc[winner, "checkpoint"])
    content = {
        "target": target.name,
        "decided_by": decide_by,
        "recommendation": ranking.recommendation,
        "tied": list(ranking.tied),
        "default": ranking.default,
        "units": units,
        "patients_known": target.subjects is not None,
        "resamples": ranking.resamples,
        "synthetic": target.synthetic,
        "answer": answer,
        "command": command,
        "baselines": json.loads(ranking.baselines.to_json(orient="records")),
    }
    _write(Path(output_dir), ranking, scores, content, figures=figures)
    print(answer)
    if command:
        print(f"To use it:\n{command}")
    return ranking


def _write(
    folder: Path, ranking: SourceRanking, scores: pd.DataFrame, content: Mapping[str, object], *, figures: bool
) -> None:
    table = ranking.table.set_index("source").join(scores, how="right")
    table.insert(0, "status", np.where(table["own"].astype(bool), "own model", "ranked"))
    table = table.sort_values("rank", kind="stable", na_position="last").drop(columns="own")
    table.loc["scratch", "status"] = "no score"
    table = table.rename_axis("source").reset_index()
    write_csv(folder / "ranking.csv", table)
    rows = json.loads(table.to_json(orient="records", double_precision=10))
    write_json(folder / "ranking.json", {**content, "table": rows})
    if figures:
        figure = plot_ranking(
            ranking.table,
            tied=ranking.tied if ranking.resamples else (),
            recommended=ranking.recommendation,
            metric=LABELS[content["decided_by"]],
            title=f"Which source to transfer from, for {content['target']}",
            synthetic=content["synthetic"],
        )
        save_figure(figure, folder / "ranking.png")
    command = content["command"]
    write_text(folder / "answer.txt", content["answer"] + (f"\n\nTo use it:\n{command}" if command else ""))


def _baselines(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rankers that never look at the target; the static one goes by how well each source does its own task."""
    own = table["own_auc"].astype(float).dropna().to_dict()
    known = {"its own task": own} if own else None
    images = table["images"].astype(float)
    sizes = None if images.isna().all() else images.to_dict()
    return baseline_rankings(list(table.index), sizes=sizes, other_targets=known, seed=seed)


def _without_interval(scores: Mapping[str, float], options: Mapping[str, object]) -> SourceRanking:
    """The order by a score that cannot be resampled, and no verdict."""
    ranking = bootstrap_ranking({name: [score] for name, score in scores.items()}, **options)
    order = [f"{row.source} {row.score:.3f}" for row in ranking.table.itertuples()]
    table = ranking.table
    first = list(table.loc[table["score"] == table["score"].max(), "source"])
    default = first[0] if len(first) == 1 else None
    best = f"The best guess is {default}."
    if default is None:
        reason = f"{listed(first)} have the same score" if first else "no source has a score"
        best = f"There is no best guess: {reason}."
    text = (
        f"No evidence to prefer: {options['metric']} has no interval over patients, so no verdict can be had from it. "
        f"By its value the order is {listed(order, 8)}. {best} None of this says that a transfer beats training from "
        "scratch."
    )
    if options["synthetic"]:
        text += " These are synthetic data, which say nothing about a clinic."
    return replace(ranking, recommendation=None, default=default, text=text, patients=0)


def _sentences(
    ranking: SourceRanking, scores: pd.DataFrame, target: ClassificationDataset, *, decide_by: str, cross_domain: bool
) -> list[str]:
    ready = scores[~scores["own"].astype(bool)]
    said = [ranking.text]
    if len(ready) > 1 and ready[decide_by].nunique(dropna=True) == 1:
        said.append(f"All sources have the same {LABELS[decide_by]}: it ranks nothing here.")
    if target.subjects is None and ranking.resamples:
        said.append(
            "Which images are of one patient is not known, so every image counts as a patient of its own: if some "
            "share one, the intervals are too narrow."
        )
    if decide_by != "lp_fu" and "lp_fu" in ready and ready["lp_fu"].notna().any():
        turned = " (turned round for sources of another domain)" if cross_domain else ""
        first = list(ready.index[ready["lp_fu"] == ready["lp_fu"].max()])
        alike = " (all alike)" if len(first) > 1 else ""
        said.append(f"The paper's LP x FU{turned} would pick {listed(first)}{alike}.")
    if own := list(scores.index[scores["own"].astype(bool)]):
        said.append(f"{listed(own)} is the target's own model: scored, not ranked.")
    counts = {split: target.counts(split) for split in ("train", "val")}
    images = ", ".join(
        f"{name} {train} and {val}" for name, train, val in zip(target.class_names, *counts.values(), strict=True)
    )
    said.append(f"Training and validation images by class: {images}.")
    return said


def next_command(source: str, checkpoint: str) -> str:
    """What to type next: the fine-tuning of the target from the winner."""
    config = current_config()
    root = Path(config["bundle_root"])
    default = json.loads((root / "configs" / "train.json").read_text(encoding="utf-8"))
    options = {"target_task": config["target_task"], "source_task": source, "source_ckpt": checkpoint}
    options |= {key: config[key] for key in CARRIED if config[key] != default[key]}
    for entry in config["sources"]:
        if isinstance(entry, Mapping) and source_name(entry) == source and entry.get("network"):
            options["network_def"] = entry["network"]
    return run_command([root / "configs" / name for name in ("train.json", "finetune.json")], options)
