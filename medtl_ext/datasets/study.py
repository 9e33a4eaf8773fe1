"""Dataset transferability studied: several targets and seeds, every source fine-tuned, what the rankings were worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, run_jobs, study_config
from medtl_ext.datasets.scoring import LABELS
from medtl_ext.datasets.sources import dataset_name, dataset_path, find_sources, is_same_data, pretraining_job
from medtl_ext.datasets.truth import agreement_table, finetuning_jobs
from medtl_ext.ranking import agreement_over_targets, friedman_nemenyi, verdict_claim
from medtl_ext.report import markdown_table
from medtl_ext.visualize import plot_critical_difference, save_figure


def study_datasets(
    *,
    output_dir: str,
    targets: Sequence[str],
    sources: Sequence[str],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[float]],
    settings: Mapping[str, Any],
    n_jobs: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Score and fine-tune every source on several targets, with several seeds, and say what the rankings were worth.

    A seed draws the target's images and the fine-tuning; the pool is the same. A target that is among the sources is
    scored as its own model, and never ranked. Runs that are done are kept: a study may grow by targets and seeds,
    not by sources, which every ranking compares. Writes ``study.csv`` (a row per target, seed and source),
    ``agreement.csv``, ``study.md`` and ``critical_difference.png``.

    Args:
        output_dir: gets ``runs/`` and the results.
        targets, sources: datasets, see `medtl_ext.datasets.open_dataset`.
        seeds: the repetitions.
        grid: see `evaluate_ranking`.
        settings: options of ``train.json`` for all runs.
        n_jobs: runs at a time; one per core by default.
        backend: see `medtl_ext.bundle.run_jobs`.
    """
    if isinstance(targets, str) or len(targets) < 2:
        raise InputError(f"a study needs a list of two targets or more; found {targets!r}.")
    names = [dataset_name(target) for target in targets]
    if len(set(names)) < len(names):
        raise InputError(f"two targets are called alike: {', '.join(names)}; rename a file.")
    if isinstance(seeds, str) or not seeds or not isinstance(settings, Mapping):
        raise InputError(f"seeds is {seeds!r}, settings {settings!r}; expected a list of numbers, and options by name.")
    config = study_config(output_dir, settings, grid=dict(grid), sources=list(sources)) | {"sources": list(sources)}
    root = Path(config["bundle_root"])
    where = {key: config[name] for key, name in (("collection", "collection"), ("subjects", "phantom_subjects"))}
    for data in targets:
        dataset_path(data, **where)  # phantoms are made here, not by several processes at once
    found = find_sources(sources, target="", image_size=config["image_size"], **where)
    jobs = {
        source.name: pretraining_job(config, config["source_dir"], source, seed=config["pool_seed"])
        for source in found
        if source.checkpoint is None
    }
    run_jobs(list(jobs.values()), n_jobs=n_jobs, backend=backend, description="pre-training the pool")
    pool = [
        replace(one, checkpoint=str(jobs[one.name].output_dir / "model.pt")) if one.name in jobs else one
        for one in found
    ]
    scorings, finetunings = {}, []
    for target, seed in product(targets, seeds):
        folder = Path(output_dir) / "runs" / dataset_name(target) / f"seed{seed}"
        options = {"target_task": target, "seed": seed}
        for source in [source for source in pool if not is_same_data(source.data or "", target)] + [None]:
            place = folder / "finetune" / (source.name if source else "scratch")
            finetunings += finetuning_jobs(config, place, source, grid, **options)
        overlay, overrides = [root / "configs" / "evaluate.json"], options | {"grid": dict(grid)}
        scorings[dataset_name(target), seed] = Job(config, folder, overlay, overrides, result="agreement.md")
    run_jobs(finetunings, n_jobs=n_jobs, backend=backend, description="fine-tuning every source")
    # The runs of evaluate.json find all their trainings done.
    run_jobs(list(scorings.values()), n_jobs=n_jobs, backend=backend, description="scoring")
    tables = {name: _read_all(scorings, f"{name}.csv") for name in ("truth", "own_model")}
    verdicts = {key: json.loads((job.output_dir / "ranking.json").read_text()) for key, job in scorings.items()}
    synthetic = any(verdict["synthetic"] for verdict in verdicts.values())
    study_report(tables["truth"], tables["own_model"], verdicts, output_dir, synthetic=synthetic)
    return tables["truth"]


def _read_all(jobs: Mapping[tuple[str, int], Job], name: str) -> pd.DataFrame:
    """A table of every run, where it is, with the run's target and seed."""
    tables = [
        pd.read_csv(job.output_dir / name).assign(target=target, seed=seed)
        for (target, seed), job in jobs.items()
        if (job.output_dir / name).is_file()
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def study_report(
    table: pd.DataFrame,
    own_model: pd.DataFrame,
    verdicts: Mapping[tuple[str, int], Mapping[str, Any]],
    output_dir: str | Path,
    *,
    synthetic: bool = False,
) -> pd.DataFrame:
    """What the rankings of a study were worth over its targets; see `study_datasets` for the files.

    Args:
        table: a row per target, seed and source (and ``scratch``) with ``auc`` and the scores.
        own_model: of `rank_own_model`, with ``target`` and ``seed``; may be empty.
        verdicts: (target, seed) -> what ``ranking.json`` says.
        output_dir: where the files go.
        synthetic: the data are synthetic.

    Returns:
        The agreement of every ranker on every target and seed.
    """
    sources = table[table["source"] != "scratch"]
    agreement = agreement_over_targets(sources, agreement_table, outcome="auc")
    # A ranker that scores all sources alike chooses at random: its expected tau is 0.
    mean = (
        agreement.fillna({"tau": 0.0}).groupby(["ranker", "target"], sort=False)[["tau", "regret"]].mean().reset_index()
    )
    test = friedman_nemenyi(mean.pivot(index="target", columns="ranker", values="tau"))
    claims = [f"**Do the rankers differ?** By weighted Kendall: {test.text}", _baseline_claim(mean)]
    claims += [_scratch_claim(table), verdict_claim(sources, verdicts, outcome="auc", unit="AUC")]
    claims += [_own_claim(own_model)] if len(own_model) else []
    folder = Path(output_dir)
    write_csv(folder / "study.csv", table)
    write_csv(folder / "agreement.csv", agreement)
    summary = mean.groupby("ranker", sort=False)[["tau", "regret"]].mean().sort_values("tau", ascending=False)
    write_text(folder / "study.md", _study_page(table, summary, claims, synthetic))
    figure = plot_critical_difference(
        test.average_ranks.to_dict(),
        critical_difference=test.critical_difference,
        groups=test.groups,
        title="Rankers over targets, by weighted Kendall",
        synthetic=synthetic,
    )
    save_figure(figure, folder / "critical_difference.png")
    print("\n".join(claims))
    return agreement


def _baseline_claim(mean: pd.DataFrame) -> str:
    means = mean.groupby("ranker")[["tau", "regret"]].mean()
    tau = mean.pivot(index="target", columns="ranker", values="tau")
    baselines = [name for name in ("static", "source size", "source's own AUC", "random") if name in tau]
    scores = [label for label in LABELS.values() if label in tau]
    winners = [score for score in scores if all((tau[score] > tau[baseline]).all() for baseline in baselines)]
    best, least = means.loc[scores, "tau"].idxmax(), means.loc[scores, "regret"].idxmin()
    said = ", ".join(f"{name} {means.loc[name, 'tau']:.2f} ({means.loc[name, 'regret']:.3f})" for name in baselines)
    return (
        f"**Does a score beat the baselines?** Best mean tau: {best}, {means.loc[best, 'tau']:.2f}; least regret: "
        f"{least}, {means.loc[least, 'regret']:.3f} AUC. Baselines, tau and regret: {said}. Ahead of every baseline on "
        f"every target: {', '.join(winners) or 'no score'}."
    )


def _scratch_claim(table: pd.DataFrame) -> str:
    auc = table.groupby(["target", "source"])["auc"].mean().unstack()
    scratch, rest = auc["scratch"], auc.drop(columns="scratch")
    best, worst = rest.max(axis=1), rest.min(axis=1)
    worse, pairs = int(rest.lt(scratch, axis=0).to_numpy().sum()), int(rest.notna().to_numpy().sum())
    return (
        f"**And scratch?** Training from scratch is better than the best source on {int((scratch > best).sum())} of "
        f"{len(auc)} targets, and better than {worse} of {pairs} fine-tuned sources: no score says so. The best and "
        f"the worst source are {(best - worst).mean():.3f} AUC apart on average."
    )


def _own_claim(own_model: pd.DataFrame) -> str:
    first = own_model.assign(first=own_model["rank"] == 1).groupby("score", sort=False)["first"].agg(["sum", "count"])
    said = ", ".join(f"{name} {row['sum']} of {row['count']}" for name, row in first.iterrows())
    return (
        f"**Is a target its own best source?** Ranked first among the candidates had it been one (the paper's argument "
        f"against scores of feature quality alone): {said}."
    )


def _study_page(table: pd.DataFrame, summary: pd.DataFrame, claims: Sequence[str], synthetic: bool) -> str:
    targets, seeds = table["target"].nunique(), table["seed"].nunique()
    n_sources = table.loc[table["source"] != "scratch", "source"].nunique()
    head = (
        f"{targets} targets, {n_sources} sources, {seeds} seeds; AUC of the test images after fine-tuning everything."
    )
    head += " **Synthetic phantom: these numbers say nothing about a clinic.**" if synthetic else ""
    auc = table.groupby(["source", "target"], sort=False)["auc"].mean().unstack()
    parts = ["# Dataset transferability studied", head, *[f"- {claim}" for claim in claims]]
    parts += ["## Rankers, mean over targets", markdown_table(summary.reset_index())]
    return "\n\n".join([*parts, "## AUC, mean over seeds", markdown_table(auc.reset_index())]) + "\n"
