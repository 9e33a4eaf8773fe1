"""The ground truth of source selection: every source fine-tuned on the target, and what each ranking was worth."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, current_config, run_jobs
from medtl_ext.ranking import (
    baseline_rankings,
    bootstrap_interval,
    friedman_nemenyi,
    spearman_footrule,
    weighted_kendall,
)
from medtl_ext.report import markdown_table
from medtl_ext.selection.pipeline import finetuning_job, patient_dice
from medtl_ext.selection.plots import plot_priors_against_dice, plot_score_against_dice
from medtl_ext.selection.priors import filter_by_priors
from medtl_ext.selection.scores import LABELS, METRICS
from medtl_ext.studies import open_collection, pretraining_job
from medtl_ext.visualize import plot_critical_difference, save_figure

logger = logging.getLogger(__name__)

TOP = (1, 2, 3, 4)
SPLIT = "test"


def evaluate_selection(
    scores: pd.DataFrame,
    *,
    minimum_ssim: float | None,
    top_k: int | None,
    output_dir: str,
    synthetic: bool,
    seed: int,
    n_jobs: int | None,
) -> pd.DataFrame | None:
    """Fine-tune every source on the target, and training from scratch beside, and say what every ranking was worth.

    Writes ``truth.csv`` (Dice of the test patients per source, with all scores), ``agreement.csv``, ``agreement.md``
    (PriorSel's Table VI: footrule of the top 1 to 4 with and without prior knowledge, weighted Kendall, regret) and
    ``agreement.png``.

    Args:
        scores: of `medtl_ext.selection.score_sources`.
        minimum_ssim, top_k: of PriorSel's second filter, see `filter_by_priors`.
        output_dir, synthetic: where the files go, and whether the data are synthetic.
        seed, n_jobs: of the fine-tunings, and how many at a time.

    Returns:
        The agreement of each ranker; None in all but the first of several processes.
    """
    if idist.get_rank() != 0:
        return None
    config, folder = current_config(), Path(output_dir)
    ready = scores[scores["left_out"].isna()]
    jobs = _finetunings(config, folder / "finetune", ready, config["target_task"], seed)
    run_jobs(list(jobs.values()), n_jobs=n_jobs, description="fine-tuning every source")
    patients = {name: patient_dice(job.output_dir, SPLIT) for name, job in jobs.items()}
    truth = _truth_table(patients)
    table = truth.join(ready.drop(columns=["network", "encoder", "left_out"]))
    agreement = agreement_table(ready, truth["dice"].drop("scratch"), minimum_ssim=minimum_ssim, top_k=top_k)
    write_csv(folder / "truth.csv", table.reset_index())
    write_csv(folder / "agreement.csv", agreement)
    text = _evaluation_text(config["target_task"], truth, agreement, synthetic)
    write_text(folder / "agreement.md", _evaluation_page(config["target_task"], text, truth, agreement))
    figure = plot_score_against_dice(
        table.drop("scratch"),
        scratch=truth.loc["scratch", "dice"],
        title=f"{config['target_task']}: score against Dice after fine-tuning",
        synthetic=synthetic,
    )
    save_figure(figure, folder / "agreement.png")
    print(text)
    return agreement


def _finetunings(
    config: Mapping[str, Any], folder: Path, ready: pd.DataFrame, target: str, seed: int
) -> dict[str, Job]:
    jobs = {
        name: finetuning_job(config, folder / name, row.to_dict(), target_task=target, seed=seed)
        for name, row in ready.iterrows()
    }
    return jobs | {"scratch": finetuning_job(config, folder / "scratch", None, target_task=target, seed=seed)}


def _truth_table(patients: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    rows = []
    for name, values in patients.items():
        low, high, _ = bootstrap_interval(list(values.values()))
        mean = float(np.mean(list(values.values())))
        rows.append({"source": name, "dice": mean, "dice_low": low, "dice_high": high, "patients": len(values)})
    return pd.DataFrame(rows).set_index("source").sort_values("dice", ascending=False, kind="stable")


PRIORS = ("none", "modality", "modality + SSIM")
"""What is ranked: all sources, those of the target's modality, or what both of PriorSel's filters leave."""


def rankers(ready: pd.DataFrame, static: Mapping[str, float] | None = None) -> dict[str, pd.Series]:
    """Ranker -> source -> score, higher is better: the metrics, the priors as rankers, and baselines.

    ``random`` scores all sources alike, from which footrule and regret follow as expectations. ``static`` is the
    relative rank on other targets, where it is given.
    """
    found = {LABELS[metric]: ready[metric] for metric in METRICS if metric in ready}
    same = ready[["same_modality", "same_objective"]].astype(float)
    found |= {
        "tags (modality, objective)": same.sum(axis=1),
        "RoI SSIM": ready["ssim"],
        "RoI Dice": ready["roi_dice"],
        "RoI shape": ready["roi_shape"],
        "source's own Dice": ready["own_dice"],
        "source size": ready["size"],
        "random": pd.Series(0.0, ready.index),
    }
    if static is not None:
        found["static"] = pd.Series(static).reindex(ready.index)
    return {name: values.astype(float) for name, values in found.items()}


def agreement_table(
    ready: pd.DataFrame,
    truth: pd.Series,
    *,
    minimum_ssim: float | None = None,
    top_k: int | None = None,
    static: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Each ranker against the truth, with and without prior knowledge.

    Args:
        ready: sources with their scores and priors.
        truth: source -> Dice after fine-tuning.
        minimum_ssim, top_k: see `filter_by_priors`.
        static: see `rankers`.

    Returns:
        Columns ``ranker, prior, candidates, pick, regret`` (Dice that the first choice loses to the best of all
        sources, the mean over sources of equal score), ``tau`` (weighted Kendall over the candidates) and
        ``footrule_1`` to ``footrule_4`` (NaN where fewer candidates are left).
    """
    filtered = filter_by_priors(ready, minimum_ssim=minimum_ssim, top_k=top_k)
    right = ready.index[ready["same_modality"].astype(float).fillna(1) > 0]
    groups = dict(zip(PRIORS, (ready.index, right, ready.index[filtered["kept"]]), strict=True))
    rows = []
    for (name, values), (prior, group) in product(rankers(ready, static).items(), groups.items()):
        if len(group) == 0 or values[group].isna().all():
            continue
        chosen = values[group]
        first = group[chosen == chosen.max()]
        row = {"ranker": name, "prior": prior, "candidates": len(group)}
        row["pick"] = first[0] if len(first) == 1 else f"{len(first)} alike"
        row["regret"] = float(truth.max() - truth[first].mean())
        row["tau"] = weighted_kendall(chosen.to_dict(), truth.to_dict())
        for k in TOP:
            fits = k <= len(group)
            row[f"footrule_{k}"] = spearman_footrule(chosen.to_dict(), truth.to_dict(), k) if fits else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _evaluation_text(target: str, truth: pd.DataFrame, agreement: pd.DataFrame, synthetic: bool) -> str:
    sources = truth.drop("scratch")
    best, scratch = sources.index[0], truth.loc["scratch", "dice"]
    without = agreement[agreement["prior"] == "none"]
    least = without.loc[without["regret"].idxmin()]
    beaten = int((sources["dice"] < scratch).sum())
    text = (
        f"Fine-tuned on {target} (frozen encoder), the best of {len(sources)} sources is {best} with Dice "
        f"{sources['dice'].iloc[0]:.3f} on {int(truth['patients'].iloc[0])} test patients; the worst has "
        f"{sources['dice'].iloc[-1]:.3f}, training from scratch (all parameters, Dice + cross-entropy, augmentation) "
        f"{scratch:.3f}, better than {beaten} of {len(sources)} sources. {least['ranker']} has the smallest regret, "
        f"{least['regret']:.3f}; a random choice loses "
        f"{without.set_index('ranker').loc['random', 'regret']:.3f} on average."
    )
    return text + (" These are synthetic data, which say nothing about a clinic." if synthetic else "")


def _evaluation_page(target: str, text: str, truth: pd.DataFrame, agreement: pd.DataFrame) -> str:
    return (
        "\n\n".join(
            [
                f"# Source selection for {target}: what the rankings were worth",
                text,
                "Dice of the test patients after fine-tuning:",
                markdown_table(truth.reset_index()),
                "Footrule of the top k: 0 is perfect. Tau: weighted Kendall, 1 is perfect. Regret: Dice lost by the "
                "first "
                "choice. "
                "Empty: fewer candidates than k are left, or all scores are equal.",
                markdown_table(agreement),
            ]
        )
        + "\n"
    )


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

    A seed draws the pool's training, the target's slices and the fine-tuning. Runs that are done are kept. Writes
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
    root = Path(current_config()["bundle_root"])
    train = json.loads((root / "configs" / "train.json").read_text())
    config = train | {"source_dir": str(root / "models" / "sources")} | dict(settings)
    config |= {"bundle_root": str(root), "check_data": False, "settle": False, "sources": list(sources)}
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
    finetunings = {
        (target, seed): _finetunings(configs[seed], runs / target / f"seed{seed}" / "finetune", ready, target, seed)
        for (target, seed), ready in rows.items()
    }
    flat = [job for jobs in finetunings.values() for job in jobs.values()]
    run_jobs(flat, n_jobs=n_jobs, backend=backend, description="fine-tuning every source")
    table = pd.concat(
        [
            rows[target, seed]
            .reindex([*rows[target, seed].index, "scratch"])
            .assign(
                dice={name: np.mean(list(patient_dice(job.output_dir, SPLIT).values())) for name, job in jobs.items()}
            )
            .reset_index()
            .assign(target=target, seed=seed)
            for (target, seed), jobs in finetunings.items()
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
    parts = []
    for (target, seed), group in sources.groupby(["target", "seed"], sort=False):
        ready = group.set_index("source")
        part = agreement_table(ready, ready["dice"], static=_static(sources, target, seed))
        parts.append(part.assign(target=target, seed=seed))
    agreement = pd.concat(parts, ignore_index=True)
    by_target = agreement.groupby(["ranker", "prior", "target"], sort=False)
    mean = by_target[["tau", "regret", *(f"footrule_{k}" for k in TOP)]].mean().reset_index()
    # A ranker that scores all sources alike, as size may, chooses at random: its expected tau is 0.
    plain = mean[mean["prior"] == "none"].fillna({"tau": 0.0})
    tau = plain.pivot(index="target", columns="ranker", values="tau")
    friedman = friedman_nemenyi(tau)
    claims = [
        *_ranker_claims(plain, friedman.text),
        *_prior_claims(mean),
        _modality_claim(sources),
        *_similarity_claims(sources),
        _scratch_claim(table),
        _verdict_claim(sources, verdicts),
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


def _static(sources: pd.DataFrame, target: str, seed: int) -> dict[str, float] | None:
    """How well each source did on the other targets, as minus its rank: what a ranker knows that ignores the target."""
    others = sources[(sources["target"] != target) & (sources["seed"] == seed)]
    known = {name: group.set_index("source")["dice"].to_dict() for name, group in others.groupby("target")}
    names = sorted(set(sources.loc[(sources["target"] == target) & (sources["seed"] == seed), "source"]))
    if not known:
        return None
    return (-baseline_rankings(names, other_targets=known)["static"]).to_dict()


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
    won = int((difference > 0).sum())
    p = stats.binomtest(won, len(both)).pvalue
    return (
        f"**Same modality or same task (PriorSel, Table I)?** Same modality and other objective: mean Dice "
        f"{both['modality'].mean():.3f}; other modality and same objective: {both['objective'].mean():.3f}; same "
        f"modality is better on {won} of {len(both)} targets (sign test p {p:.2g}, mean difference "
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


def _verdict_claim(sources: pd.DataFrame, verdicts: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    truth = {key: group.set_index("source")["dice"] for key, group in sources.groupby(["target", "seed"])}
    called = {key: v["recommendation"] for key, v in verdicts.items() if v["recommendation"]}
    right = sum(truth[key].idxmax() == source for key, source in called.items())
    held = sum(truth[key].idxmax() in v["tied"] for key, v in verdicts.items())
    regret = [truth[key].max() - truth[key][v["default"]] for key, v in verdicts.items() if v["default"]]
    sizes = [len(v["tied"]) for v in verdicts.values()]
    return (
        f"**Is the verdict calibrated?** Of {len(verdicts)} selections {len(called)} name one source, {right} of them "
        f"the best one; the tied set (mean size {np.mean(sizes):.1f}) holds the best source in {held}; the best guess "
        f"loses {np.mean(regret) if regret else np.nan:.3f} Dice on average."
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
