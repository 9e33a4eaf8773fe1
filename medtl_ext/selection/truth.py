"""The ground truth of source selection: every source fine-tuned on the target, and what each ranking was worth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext.bundle import Job, current_config, run_jobs
from medtl_ext.ranking import (
    bootstrap_interval,
    spearman_footrule,
    weighted_kendall,
)
from medtl_ext.report import markdown_table
from medtl_ext.selection.pipeline import finetuning_job, patient_dice
from medtl_ext.selection.plots import plot_score_against_dice
from medtl_ext.selection.priors import filter_by_priors
from medtl_ext.selection.scores import LABELS, METRICS
from medtl_ext.visualize import save_figure

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
    jobs = finetunings(config, folder / "finetune", ready, config["target_task"], seed)
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


def finetunings(config: Mapping[str, Any], folder: Path, ready: pd.DataFrame, target: str, seed: int) -> dict[str, Job]:
    jobs = {
        name: finetuning_job(config, folder / name, row.to_dict(), target_task=target, seed=seed)
        for name, row in ready.iterrows()
    }
    return jobs | {"scratch": finetuning_job(config, folder / "scratch", None, target_task=target, seed=seed)}


def _truth_table(patients: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    rows = []
    for name, values in patients.items():
        low, high = bootstrap_interval(list(values.values()))
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
