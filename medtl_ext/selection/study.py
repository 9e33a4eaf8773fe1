"""Source selection studied: several targets and seeds, every source fine-tuned, and what the rankings were worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, run_jobs, study_config
from medtl_ext.ranking import agreement_over_targets, friedman_nemenyi, verdict_claim
from medtl_ext.report import markdown_table
from medtl_ext.selection.pipeline import patient_dice
from medtl_ext.selection.plots import plot_priors_against_dice
from medtl_ext.selection.scores import LABELS
from medtl_ext.selection.truth import PRIORS, SPLIT, TOP, agreement_table, finetunings
from medtl_ext.studies import open_collection, pretraining_job
from medtl_ext.visualize import plot_critical_difference, save_figure


def study_selection(
    *,
    output_dir: str,
    targets: Sequence[str],
    sources: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    n_jobs: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Score and fine-tune every source on several targets, with several seeds, and say what the rankings were worth.

    A seed draws the pool's training, the target's slices and the fine-tuning. Runs that are done are kept: a
    study may grow by targets and seeds, not by sources, which every ranking compares. Writes
    ``study.csv`` (one row per target, seed and source), ``agreement.csv``, ``study.md`` and figures.

    Args:
        output_dir: gets ``runs/`` and the results.
        targets, sources: names of tasks; a target is never its own source.
        seeds: the repetitions.
        settings: options of ``train.json`` for all runs.
        n_jobs: runs at a time; one per core by default.
        backend: see `medtl_ext.bundle.run_jobs`.
    """
    if len(targets) < 2:
        raise InputError(f"a study needs two targets or more; found {list(targets)}.")
    config = study_config(output_dir, settings, sources=list(sources))
    config |= {"check_data": False, "settle": False, "sources": list(sources)}
    configs = {seed: config | {"pool_seed": seed, "seed": seed} for seed in seeds}
    pool = {
        (task, seed): pretraining_job(configs[seed], config["source_dir"], task, seed=seed)
        for task, seed in product(sources, seeds)
    }
    for task in {*targets, *sources}:  # phantoms are made here, not by several processes at once
        open_collection(config["collection"], task, subjects=config["phantom_subjects"])
    run_jobs(list(pool.values()), n_jobs=n_jobs, backend=backend, description="pre-training the pool")
    runs = Path(output_dir) / "runs"
    selections = {
        (target, seed): Job(
            configs[seed],
            runs / target / f"seed{seed}" / "selection",
            overrides={"target_task": target, "n_jobs": 1},
            result="answer.txt",
        )
        for target, seed in product(targets, seeds)
    }
    run_jobs(list(selections.values()), n_jobs=n_jobs, backend=backend, description="scoring")
    rows = {key: _selection_rows(job.output_dir) for key, job in selections.items()}
    tuned = {
        (target, seed): finetunings(configs[seed], runs / target / f"seed{seed}" / "finetune", ready, target, seed)
        for (target, seed), ready in rows.items()
    }
    flat = [job for jobs in tuned.values() for job in jobs.values()]
    run_jobs(flat, n_jobs=n_jobs, backend=backend, description="fine-tuning every source")
    table = pd.concat(
        [
            rows[target, seed]
            .reindex([*rows[target, seed].index, "scratch"])
            .assign(dice={name: _mean_dice(job) for name, job in jobs.items()})
            .reset_index()
            .assign(target=target, seed=seed)
            for (target, seed), jobs in tuned.items()
        ],
        ignore_index=True,
    )
    synthetic = open_collection(config["collection"], targets[0], subjects=config["phantom_subjects"]).synthetic
    verdicts = {key: json.loads((job.output_dir / "ranking.json").read_text()) for key, job in selections.items()}
    study_report(table, verdicts, output_dir, synthetic=synthetic)
    return table


def _mean_dice(job: Job) -> float:
    return float(np.mean(list(patient_dice(job.output_dir, SPLIT).values())))


def _selection_rows(folder: Path) -> pd.DataFrame:
    """The sources of a finished selection with their scores."""
    table = pd.read_csv(folder / "ranking.csv").set_index("source")
    return table[table["status"].isin(["ranked", "dropped"])].drop(columns=["status", "reason"])


def study_report(
    table: pd.DataFrame,
    verdicts: Mapping[tuple[str, int], Mapping[str, Any]],
    output_dir: str | Path,
    *,
    synthetic: bool = False,
) -> pd.DataFrame:
    """What the rankings of a study were worth over its targets; see `study_selection` for the files.

    Args:
        table: one row per target, seed and source (and ``scratch``) with ``dice``, scores and priors.
        verdicts: (target, seed) -> what the selection's ``ranking.json`` says.
        output_dir: where the files go.
        synthetic: the data are synthetic.

    Returns:
        The agreement of every ranker on every target and seed.
    """
    folder = Path(output_dir)
    sources = table[table["source"] != "scratch"]
    agreement = agreement_over_targets(sources, agreement_table, outcome="dice")
    # A ranker that scores all sources alike, as size may, chooses at random: its expected tau is 0, in each seed.
    tau = agreement["tau"].mask(agreement["tau"].isna() & (agreement["candidates"] > 1), 0.0)
    by_target = agreement.assign(tau=tau).groupby(["ranker", "prior", "target"], sort=False)
    mean = by_target[["tau", "regret", *(f"footrule_{k}" for k in TOP)]].mean().reset_index()
    plain = mean[mean["prior"] == "none"].fillna({"tau": 0.0})
    tau = plain.pivot(index="target", columns="ranker", values="tau")
    friedman = friedman_nemenyi(tau)
    claims = [
        *_ranker_claims(plain, friedman.text),
        *_prior_claims(mean),
        _modality_claim(sources),
        *_similarity_claims(sources),
        _scratch_claim(table),
        verdict_claim(sources, verdicts, outcome="dice", unit="Dice"),
    ]
    write_csv(folder / "study.csv", table)
    write_csv(folder / "agreement.csv", agreement)
    summary = mean.groupby(["ranker", "prior"], sort=False)[["tau", "regret", *(f"footrule_{k}" for k in TOP)]].mean()
    write_text(folder / "study.md", _study_page(table, summary, claims, synthetic))
    title = "Rankers over targets, by weighted Kendall"
    figure = plot_critical_difference(
        friedman.average_ranks.to_dict(),
        critical_difference=friedman.critical_difference,
        groups=friedman.groups,
        title=title,
        synthetic=synthetic,
    )
    save_figure(figure, folder / "critical_difference.png")
    save_figure(plot_priors_against_dice(sources, synthetic=synthetic), folder / "priors.png")
    print("\n".join(claims))
    return agreement


def _ranker_claims(plain: pd.DataFrame, friedman: str) -> list[str]:
    """Which score, if any, beats the baselines."""
    means = plain.groupby("ranker")[["tau", "regret"]].mean()
    claims = [f"**Do rankers differ?** By weighted Kendall: {friedman}"]
    tau = plain.pivot(index="target", columns="ranker", values="tau")
    baselines = [name for name in ("static", "source size", "source's own Dice") if name in tau]
    scores = [label for label in LABELS.values() if label in tau]
    winners = [
        f"{score} ({means.loc[score, 'tau']:.2f})"
        for score in scores
        if all((tau[score] > tau[baseline]).all() for baseline in baselines)
    ]
    best = means.loc[scores, "tau"].idxmax()
    text = f"Best mean tau: {best}, {means.loc[best, 'tau']:.2f} (regret {means.loc[best, 'regret']:.3f}); baselines: "
    text += ", ".join(f"{name} {means.loc[name, 'tau']:.2f} ({means.loc[name, 'regret']:.3f})" for name in baselines)
    text += f". Ahead of every baseline on every target: {', '.join(winners) or 'no score'}."
    return [*claims, f"**Does a score beat the static and size baselines?** {text}"]


def _prior_claims(mean: pd.DataFrame) -> list[str]:
    """Does prior knowledge lower the footrule, over rankers and targets, and what does it cost?"""
    scores = mean[mean["ranker"].isin(LABELS.values())].set_index(["ranker", "target"])
    without = scores[scores["prior"] == "none"]
    claims = []
    for prior in PRIORS[1:]:
        given = scores[scores["prior"] == prior]
        said = []
        for k in TOP:
            pair = pd.concat([without[f"footrule_{k}"], given[f"footrule_{k}"]], axis=1, keys=["a", "b"]).dropna()
            if len(pair):
                lower, higher = int((pair["b"] < pair["a"]).sum()), int((pair["b"] > pair["a"]).sum())
                said.append(
                    f"top {k}: {pair['a'].mean():.2f} to {pair['b'].mean():.2f} (lower in {lower}, higher in "
                    f"{higher} of {len(pair)})"
                )
        regret = pd.concat([without["regret"], given["regret"]], axis=1, keys=["a", "b"]).dropna()
        claims.append(
            f"**Does prior knowledge ({prior}) lower the footrule?** {'; '.join(said)}; regret of the first choice "
            f"{regret['a'].mean():.3f} to {regret['b'].mean():.3f}. Counts are of score x target, seeds averaged."
        )
    return claims


def _modality_claim(sources: pd.DataFrame) -> str:
    """PriorSel, Table I: a source of the same modality is better than one of the same task."""
    flags = sources.assign(
        modality=sources["same_modality"].astype(float) > 0, objective=sources["same_objective"].astype(float) > 0
    )
    modality = flags[flags["modality"] & ~flags["objective"]].groupby("target")["dice"].mean()
    objective = flags[~flags["modality"] & flags["objective"]].groupby("target")["dice"].mean()
    both = pd.concat([modality, objective], axis=1, keys=["modality", "objective"]).dropna()
    if both.empty:
        return "**Same modality or same task?** No target has sources of both kinds."
    difference = both["modality"] - both["objective"]
    won, alike = int((difference > 0).sum()), int((difference == 0).sum())
    test = "no sign test"
    if alike < len(both):  # ties say nothing of the sign
        test = f"sign test p {stats.binomtest(won, len(both) - alike).pvalue:.2g}"
    test += f" without the {alike} alike" if 0 < alike < len(both) else ""
    return (
        f"**Same modality or same task (PriorSel, Table I)?** Same modality and other objective: mean Dice "
        f"{both['modality'].mean():.3f}; other modality and same objective: {both['objective'].mean():.3f}; same "
        f"modality is better on {won} of {len(both)} targets ({test}, mean difference "
        f"{difference.mean():+.3f})."
    )


def _similarity_claims(sources: pd.DataFrame) -> list[str]:
    """PriorSel, Table II: a source whose regions are more like the target's gives a higher Dice."""
    names = {"ssim": "label SSIM", "roi_dice": "Dice of mean label maps", "roi_shape": "shape descriptors"}
    said = []
    for column, label in names.items():
        for where, group in (
            ("all sources", sources),
            ("within the modality", sources[sources["same_modality"].astype(float) > 0]),
        ):
            taus = group.groupby(["target", "seed"])[[column, "dice"]].apply(
                lambda rows, column=column: stats.kendalltau(rows[column], rows["dice"]).statistic
            )
            per_target = taus.groupby("target").mean().dropna()
            if len(per_target):
                said.append(
                    f"{label}, {where}: {per_target.mean():+.2f} (positive on {int((per_target > 0).sum())} of "
                    f"{len(per_target)} targets)"
                )
    return [
        f"**Does higher RoI similarity go with higher Dice (PriorSel, Table II)?** Kendall's tau: {'; '.join(said)}."
    ]


def _scratch_claim(table: pd.DataFrame) -> str:
    dice = table.groupby(["target", "source"])["dice"].mean().unstack()
    scratch, best = dice["scratch"], dice.drop(columns="scratch").max(axis=1)
    said = ", ".join(f"{target} {scratch[target]:.3f} against {best[target]:.3f}" for target in dice.index)
    return (
        f"**And scratch?** Training from scratch (all parameters, Dice + cross-entropy, augmentation) is better "
        f"than the best source with a frozen encoder on {int((scratch > best).sum())} of {len(dice)} targets "
        f"({said}): no score "
        "says so."
    )


def _study_page(table: pd.DataFrame, summary: pd.DataFrame, claims: Sequence[str], synthetic: bool) -> str:
    targets, seeds = table["target"].unique(), table["seed"].unique()
    n_sources = table.loc[table["source"] != "scratch", "source"].nunique()
    head = (
        f"{len(targets)} targets x {n_sources} sources x {len(seeds)} seeds; Dice of test patients after fine-tuning "
    )
    head += "with a frozen encoder and cross-entropy (PriorSel's protocol)."
    if synthetic:
        head += " **Synthetic phantom: these numbers say nothing about a clinic.**"
    dice = table.groupby(["source", "target"], sort=False)["dice"].mean().unstack()
    return (
        "\n\n".join(
            [
                "# Source selection studied",
                head,
                *[f"- {claim}" for claim in claims],
                "## Rankers, mean over targets\n\nFootrule of the top k: 0 is perfect. Tau: weighted Kendall over the "
                "candidates "
                "that are left. Empty: fewer candidates than k.",
                markdown_table(summary.reset_index()),
                "## Dice, mean over seeds",
                markdown_table(dice.reset_index()),
            ]
        )
        + "\n"
    )
