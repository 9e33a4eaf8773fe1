"""Which source should I transfer from? The steps of the bundle ``source_selection``, in the order of its ``run``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
from filelock import FileLock

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_choice, require_choices
from medtl_ext.bundle import Job, current_config, current_workflow, run_command, run_jobs
from medtl_ext.data import Collection
from medtl_ext.ranking import SourceRanking, audit_verdict, baseline_rankings, bootstrap_ranking
from medtl_ext.report import patient_table
from medtl_ext.selection.candidates import Candidate, usable
from medtl_ext.selection.observe import Observed
from medtl_ext.selection.priors import filter_by_priors, prior_table, require_top_k
from medtl_ext.selection.scores import LABELS, METRICS, all_scores, score_of_counts, why_no_score
from medtl_ext.studies import check_data as check_task
from medtl_ext.studies import open_collection, pretraining_job
from medtl_ext.visualize import plot_ranking, save_figure

logger = logging.getLogger(__name__)

METHODS = {"pooled": "h_score", "paper": "h_score_map"}
"""Method -> the score that decides unless ``decide_by`` says otherwise."""
# Resamples of scores that look at every image again each time.
SLOW_RESAMPLES = 200


def check_options(
    *,
    target: Collection,
    target_task: str,
    method: str,
    metrics: Sequence[str],
    decide_by: str | None,
    minimum_win: float,
    minimum_gap: float,
    n_resamples: int,
) -> None:
    """Refuse what cannot work before anything long runs.

    Raises:
        InputError: an unknown method or metric, a number out of range, no labelled training patient of the target, or
            ties to settle without validation patients.
    """
    target.datalist(target_task, "train")
    require_choice("method", method, METHODS)
    require_choices("metric", metrics, METRICS)
    if decide_by is not None:
        require_choice("decide_by", decide_by, METRICS)
    if not 0.5 < minimum_win <= 1 or not 0 <= minimum_gap <= 1:
        raise InputError(
            f"minimum_win is {minimum_win} and minimum_gap {minimum_gap}; they must lie in (0.5, 1] and in [0, 1]."
        )
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1.")
    if current_workflow() is not None:
        config = current_config()
        require_top_k(config["top_k"])
        if config["settle"]:
            _require_validation(config)


def _require_validation(config: Mapping[str, Any]) -> None:
    """Refuse to settle by validation patients where there are none."""
    if config["val_split"] != "val":
        raise InputError(
            f"--settle compares validation patients, and --val_split {config['val_split']} leaves none; give --settle "
            "false, or patients to validate on."
        )


def train_pool(
    candidates: Sequence[Candidate], *, folder: str, seed: int, n_jobs: int | None, check_data: bool
) -> list[Candidate]:
    """Train the networks of the source tasks that are not trained yet, and keep them.

    Each is a run of ``pretrain.json`` in a folder of its own, several at a time; an interrupted pool is continued.

    Returns:
        The candidates, with the checkpoints of all that can be used.
    """
    config = current_config()
    jobs = {
        candidate.name: pretraining_job(config, folder, candidate.task, seed=seed)
        for candidate in usable(candidates)
        if candidate.checkpoint is None
    }
    for name, job in jobs.items():
        if check_data and not job.done and idist.get_rank() == 0:
            source = open_collection(job.overrides["collection"], name, subjects=config["phantom_subjects"])
            check_task(source, name, {"train", config["val_split"], "test"})
    folders = {name: job.output_dir for name, job in jobs.items()}
    if not all(job.done for job in jobs.values()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(folder) / ".pool.lock"):  # other processes find the pool done
            run_jobs(list(jobs.values()), n_jobs=n_jobs, description="pre-training the pool")
    return [
        replace(candidate, checkpoint=str(folders[candidate.name] / "model.pt"), job=folders[candidate.name])
        if candidate.name in folders
        else candidate
        for candidate in candidates
    ]


def score_sources(
    pool: Sequence[Candidate],
    observed: Observed,
    *,
    target: Collection,
    target_task: str,
    source_collection: str | None,
    subjects: int,
    metrics: Sequence[str],
    spacing: Sequence[float],
    roi_size: Sequence[int],
) -> pd.DataFrame:
    """One row per candidate: what is known of it beforehand, every score, and why it was left out if it was."""
    metrics = require_choices("metric", metrics, METRICS)
    table = prior_table(
        usable(pool),
        target=target,
        target_task=target_task,
        source_collection=source_collection,
        subjects=subjects,
        spacing=spacing,
        roi_size=roi_size,
    )
    scores = pd.DataFrame.from_dict(all_scores(metrics, observed.seen), orient="index", columns=metrics)
    table = table.join(scores)
    table["left_out"] = pd.Series(observed.left_out, dtype=object).reindex(table.index)
    out = [c for c in pool if c.left_out is not None]
    rows = [{"source": c.name, "kind": c.kind, "left_out": c.left_out, **c.tags} for c in out]
    return pd.concat([table, pd.DataFrame(rows).set_index("source")]) if rows else table


def select_source(
    scores: pd.DataFrame,
    observed: Observed,
    *,
    method: str,
    decide_by: str | None,
    minimum_ssim: float | None,
    top_k: int | None,
    n_resamples: int,
    minimum_win: float,
    minimum_gap: float,
    settle: bool,
    output_dir: str,
    synthetic: bool,
    seed: int,
    n_jobs: int | None,
    figures: bool = True,
) -> SourceRanking | None:
    """Rank the sources, say which to use and how sure that is, and write it all down.

    Writes ``ranking.csv``, ``ranking.json``, ``ranking.png`` and ``answer.txt``, and prints the answer.

    Args:
        scores: of `score_sources`.
        observed: of `observe`.
        method: "pooled" ranks all sources by the shrunk H-score; "paper" filters by modality and label SSIM first and
            ranks what is left by the H-score map (PriorSel).
        decide_by: the score that decides, in place of the method's own.
        minimum_ssim, top_k: see `filter_by_priors`.
        n_resamples, minimum_win, minimum_gap, seed: see `medtl_ext.ranking.bootstrap_ranking`.
        settle: fine-tune the tied sources and train from scratch, and decide by the validation patients.
        output_dir, synthetic: where the files go, and whether the data are synthetic.
        n_jobs: fine-tunings at a time.
        figures: draw ``ranking.png``.

    Returns:
        The ranking; None in all but the first of several processes.
    """
    if idist.get_rank() != 0:
        return None
    metric = decide_by or METHODS[method]
    ready = scores[scores["left_out"].isna()]
    priors = filter_by_priors(ready, minimum_ssim=minimum_ssim, top_k=top_k)
    kept = list(ready.index[priors["kept"]]) if method == "paper" else list(ready.index)
    functions = {name: score_of_counts(metric, observed.seen[name]) for name in ready.index}
    fast = metric in ("h_score", "logme", "gbc", "transrate", "probe_auc")
    options = {
        "patients": len(next(iter(observed.seen.values())).samples.names),
        "minimum_win": minimum_win,
        "minimum_gap": minimum_gap,
        "n_resamples": n_resamples if fast else min(n_resamples, SLOW_RESAMPLES),
        "seed": seed,
        "metric": LABELS[metric],
        "synthetic": synthetic,
    }

    def ranked(names: Sequence[str]) -> SourceRanking:
        baselines = _baselines(ready.loc[names], seed)
        return bootstrap_ranking({name: functions[name] for name in names}, baselines=baselines, **options)

    ranking = ranked(kept)
    table = _ranking_table(scores, priors, ranking, method=method, metric=metric, observed=observed)
    sentences = [ranking.text]
    if method == "paper":
        sentences.append(_without_priors(ranking, ranked(list(ready.index))))
    sentences += [_scratch_sentence(), _left_out_sentence(scores)]
    folder = Path(output_dir)
    verdict = None
    if settle:
        verdict = settle_by_training(
            ranking.tied or tuple(kept),
            scores,
            output_dir=folder / "settle",
            seed=seed,
            n_jobs=n_jobs,
            synthetic=synthetic,
        )
        sentences.append(f"Settled by fine-tuning: {verdict['text']}")
    answer = " ".join(filter(None, sentences))
    winner = (verdict or {}).get("source", ranking.default or ranking.recommendation)
    command = None if winner in (None, "scratch") else next_command(scores.loc[winner], winner)
    if figures:
        figure = plot_ranking(
            ranking.table,
            tied=ranking.tied,
            recommended=ranking.recommendation,
            metric=LABELS[metric],
            title="Which source to transfer from",
            synthetic=synthetic,
        )
        save_figure(figure, folder / "ranking.png")
    _write(folder, table, ranking, answer, command, verdict, method=method, metric=metric, synthetic=synthetic)
    print(answer)
    if command:
        print(f"To use it:\n{command}")
    return ranking


def _baselines(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rankers that never look at the target; the static one goes by how well each source does its own task."""
    sizes = table["size"].astype(float).to_dict()
    own = table["own_dice"].astype(float).dropna().to_dict()
    known = {"its own task": own} if own else None
    return baseline_rankings(list(table.index), sizes=sizes, other_targets=known, seed=seed)


def _ranking_table(
    scores: pd.DataFrame, priors: pd.DataFrame, ranking: SourceRanking, *, method: str, metric: str, observed: Observed
) -> pd.DataFrame:
    """The ranked sources, best first, then those that were dropped or left out, and scratch."""
    table = ranking.table.set_index("source").join(scores, how="right")
    filtered = "kept" if method == "paper" else "advice"
    status, reason = [], []
    for source in table.index:
        if pd.notna(table.loc[source, "left_out"]):
            status.append("left out")
            reason.append(table.loc[source, "left_out"])
            continue
        note = priors.loc[source, "reason"]
        status.append("ranked" if source in set(ranking.table["source"]) else "dropped")
        if np.isnan(table.loc[source, metric] if metric in table else 0.0):
            note = f"{why_no_score(metric, observed.seen[source])}; {note}"
        reason.append(note if filtered == "kept" else f"all are ranked; PriorSel's filters would say: {note}")
    table.insert(0, "status", status)
    table.insert(1, "reason", reason)
    table = table.sort_values("rank", kind="stable", na_position="last").drop(columns="left_out")
    table = table.reindex([*table.index, "scratch"])
    table.loc["scratch", "status"] = "no score"
    table.loc["scratch", "reason"] = "training from scratch has no score: settle it by training"
    return table.rename_axis("source").reset_index()


def _without_priors(ranking: SourceRanking, everything: SourceRanking) -> str:
    first, other = ranking.default, everything.default
    if other is None:
        return f"Without prior knowledge there would be no best guess{' either' if first is None else ''}."
    if first == other:
        return f"Without prior knowledge the first choice is the same, {other}."
    return f"Without prior knowledge the first choice would be {other}."


def _scratch_sentence() -> str:
    return (
        "Training from scratch is a candidate that no score can judge: finish both runs and compare validation "
        "patients (--settle true, or the audit of risk_map)."
    )


def _left_out_sentence(scores: pd.DataFrame) -> str:
    out = scores["left_out"].dropna()
    return "Left out: " + "; ".join(f"{name} ({reason})" for name, reason in out.items()) + "." if len(out) else ""


def _write(
    folder: Path,
    table: pd.DataFrame,
    ranking: SourceRanking,
    answer: str,
    command: str | None,
    verdict: Mapping[str, Any] | None,
    *,
    method: str,
    metric: str,
    synthetic: bool,
) -> None:
    write_csv(folder / "ranking.csv", table)
    content = {
        "method": method,
        "decided_by": metric,
        "recommendation": ranking.recommendation,
        "tied": list(ranking.tied),
        "default": ranking.default,
        "patients": ranking.patients,
        "resamples": ranking.resamples,
        "synthetic": synthetic,
        "answer": answer,
        "command": command,
        "settled": verdict,
        "baselines": json.loads(ranking.baselines.to_json(orient="records")),
        "table": json.loads(table.to_json(orient="records", double_precision=10)),
    }
    write_json(folder / "ranking.json", content)
    write_text(folder / "answer.txt", answer + (f"\n\nTo use it:\n{command}" if command else ""))


def next_command(row: pd.Series, source: str) -> str:
    """What to type next: ``risk_map`` with the winner, or this bundle's own fine-tuning for another architecture."""
    config = current_config()
    root = Path(config["bundle_root"])
    defaults = {"collection": None, "source_collection": "@collection", "phantom_subjects": 24, "train_slices": 50}
    defaults |= {"spacing": [2.0, 2.0, 4.0], "roi_size": [96, 96]}
    options = {"target_task": config["target_task"], "source_ckpt": row["checkpoint"]}
    options |= {key: config[key] for key, default in defaults.items() if config[key] != default}
    files = [root.parent / "risk_map" / "configs" / "train.json"]
    if isinstance(row["network"], Mapping):
        files = [root / "configs" / name for name in ("train.json", "finetune.json")]
        options |= {
            "source_task": source,
            "network_def": _with_classes(row["network"]),
            "freeze": _known(row["encoder"]),
        }
    elif _known(row["task"]) is not None:
        options["source_task"] = row["task"]
    else:
        options |= {"source_task": config["target_task"], "source_classes": int(row["n_classes"])}
    return run_command(files, options)


def _with_classes(network: Mapping[str, Any]) -> dict[str, Any]:
    """The definition with a head for the target's classes, where the definition says how many there are."""
    return dict(network) | ({"out_channels": "@n_classes"} if "out_channels" in network else {})


def _known(value: Any) -> Any:
    """None for what a table holds where nothing is known."""
    return None if isinstance(value, float) and np.isnan(value) else value


def finetuning_job(
    config: Mapping[str, Any], folder: Path, candidate: Mapping[str, Any] | None, *, target_task: str, seed: int
) -> Job:
    """The run of ``finetune.json`` from a source (a row of `score_sources`), or of ``scratch.json`` (None)."""
    configs = Path(config["bundle_root"]) / "configs"
    overrides: dict[str, Any] = {"target_task": target_task, "seed": seed, "check_data": False}
    if candidate is None:
        return Job(config, folder, [configs / "scratch.json"], overrides | {"source_task": None, "source_ckpt": None})
    overrides |= {"source_task": _known(candidate["task"]), "source_ckpt": str(candidate["checkpoint"])}
    if isinstance(candidate.get("network"), Mapping):
        # The head is fresh if the target has other classes; what is not this bundle's encoder is not frozen blindly.
        overrides["network_def"] = _with_classes(candidate["network"])
        overrides["freeze"] = _known(candidate["encoder"])
    return Job(config, folder, [configs / "finetune.json"], overrides)


def settle_by_training(
    tied: Sequence[str],
    scores: pd.DataFrame,
    *,
    output_dir: Path,
    seed: int,
    n_jobs: int | None,
    synthetic: bool,
) -> dict[str, Any]:
    """Finish a short fine-tuning of each tied source, and training from scratch, and compare validation patients.

    Returns:
        ``source`` (what to use, None where the patients cannot tell and there is no guess), ``text``, and the Dice of
        each.

    Raises:
        InputError: no patient is left to validate on.
    """
    config = current_config()
    _require_validation(config)
    target = config["target_task"]
    jobs = {
        name: finetuning_job(config, output_dir / name, scores.loc[name].to_dict(), target_task=target, seed=seed)
        for name in tied
    }
    jobs["scratch"] = finetuning_job(config, output_dir / "scratch", None, target_task=target, seed=seed)
    run_jobs(list(jobs.values()), n_jobs=n_jobs, description="fine-tuning what is tied")
    dice = {name: patient_dice(job.output_dir, "val") for name, job in jobs.items()}
    verdict = audit_verdict(dice, synthetic=synthetic)
    return {
        "source": verdict.recommendation or verdict.default,
        "text": verdict.text,
        "dice": {name: float(np.mean(list(values.values()))) for name, values in dice.items()},
    }


def patient_dice(folder: Path, split: str) -> dict[str, float]:
    """Patient -> Dice, averaged over classes, of a finished run."""
    patients = patient_table(pd.read_csv(folder / "metrics.csv"))
    return patients[patients["split"] == split].set_index("subject")["dice"].to_dict()
