"""The ground truth: every source fine-tuned on the target, scratch beside, and what the rankings were worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import ranker_table
from medtl_ext.ranking._words import SYNTHETIC
from medtl_ext.transfer.arms import finetuning_job
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.rank import RankSources
from medtl_ext.transfer.report import markdown_table
from medtl_ext.transfer.scores import SCORES
from medtl_ext.transfer.sources.pool import Source, TargetTask
from medtl_ext.visualize import plot_scores_against_outcome, save_figure

NOTE = "Footrule of the top k: 0 is perfect. Tau: weighted Kendall"
GRID_KEYS = ("learning_rate", "momentum", "weight_decay")
EVERY = "none"
"""The group of sources that no prior knowledge has thinned out."""


@dataclass(kw_only=True, eq=False)
class FineTuneSources:
    """A step that fine-tunes every source on the target, trains from scratch too, and says what each score was worth.

    Writes ``truth.csv`` (the score of the test patients per source, with all transferability scores), ``agreement.csv``
    (each ranker against it), ``agreement.md`` and ``agreement.png``.

    Args:
        ranking: which sources, and their scores.
        grid: values of ``learning_rate``, ``momentum`` and ``weight_decay``, of which the best by validation counts;
            None: as the config says.

    Attributes:
        best: what was trained from each source that counts, and from scratch.
    """

    ranking: RankSources
    grid: Mapping[str, Sequence[float]] | None = None
    best: dict[str, Job] = field(init=False, default_factory=dict)

    def run(self) -> None:
        """Train, compare, and write it down."""
        here, target = self.ranking.here, self.ranking.target
        ready = self.ranking.table.loc[self.ranking.ranked]
        if not here.leads:
            return
        folder, name = here.folder, target.name
        jobs = finetunings(here, folder / "finetune", [self.ranking.pool[one] for one in ready.index], self.grid)
        here.train([job for runs in jobs.values() for job in runs], "fine-tuning every source")
        self.best = {one: best_of(runs, target) for one, runs in jobs.items()}
        rows = {one: target.measure(job, "test") for one, job in self.best.items()}
        truth = pd.DataFrame.from_dict(rows, orient="index").rename_axis("source")
        truth = truth.sort_values(target.outcome, ascending=False, kind="stable")
        table = truth.join(ready.drop(columns=["left_out", "checkpoint", "network", "encoder"], errors="ignore"))
        sources = truth[target.outcome].drop("scratch")
        agreement = agreement_table(ready, sources, target=target, groups=self.ranking.groups(ready))
        text = _text(name, truth, agreement, target) + (f" {SYNTHETIC}" if target.synthetic else "")
        write_csv(folder / "truth.csv", table.reset_index())
        write_csv(folder / "agreement.csv", agreement)
        note = f"{NOTE}, 1 is perfect. Regret: {target.unit} lost by the first choice. Empty: fewer candidates than k "
        parts = [f"# What the rankings were worth for {name}", text, f"{target.unit} of the test patients:"]
        parts += [truth.reset_index(), f"{note}are left, or all scores are equal.", agreement]
        write_text(folder / "agreement.md", page(*parts))
        if here.figures:
            figure = plot_scores_against_outcome(
                table.drop("scratch"),
                outcome=target.outcome,
                scores={metric: score.label for metric, score in SCORES.items()},
                scratch=truth.loc["scratch", target.outcome],
                title=f"{name}: score against {target.unit} after fine-tuning",
                synthetic=target.synthetic,
            )
            save_figure(figure, folder / "agreement.png")
        print(text)


def page(*parts: str | pd.DataFrame) -> str:
    """Paragraphs and tables as Markdown."""
    return "\n\n".join(markdown_table(part) if isinstance(part, pd.DataFrame) else part for part in parts)


def finetunings(
    run: Run, folder: Path, sources: Sequence[Source], grid: Mapping[str, Sequence[float]] | None, **overrides: Any
) -> dict[str, list[Job]]:
    """The trainings from each source and from scratch: one, or one for each setting of a grid."""
    starts: dict[str, Source | None] = {source.name: source for source in sources} | {"scratch": None}
    found: dict[str, list[Job]] = {name: [] for name in starts}
    for (name, source), setting in product(starts.items(), [{}] if grid is None else settings_of_grid(grid)):
        place = folder / name / "_".join(f"{value:g}" for value in setting.values())
        found[name].append(finetuning_job(run, place, source, **overrides, **setting))
    return found


def settings_of_grid(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the grid's values.

    >>> len(settings_of_grid({"learning_rate": [0.1, 0.01], "momentum": [0.9], "weight_decay": [0, 1e-4]}))
    4
    """
    if set(grid) != set(GRID_KEYS) or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"grid is {grid!r}; expected a list of values for each of {', '.join(GRID_KEYS)}.")
    return [dict(zip(GRID_KEYS, values, strict=True)) for values in product(*(grid[key] for key in GRID_KEYS))]


def best_of(jobs: Sequence[Job], target: TargetTask) -> Job:
    """The training that is best by validation; the first of equal ones."""
    if len(jobs) == 1:
        return jobs[0]
    return max(jobs, key=lambda job: target.measure(job, "val")[target.outcome])


def rankers(ready: pd.DataFrame, target: TargetTask, static: Mapping[str, float] | None = None) -> dict[str, pd.Series]:
    """Ranker -> source -> value, higher is better: the scores, and rankers that never look at the target.

    ``random`` values all sources alike, from which footrule and regret follow as expectations. ``static`` is the
    rank on other targets, where it is given.
    """
    found = {score.label: ready[metric] for metric, score in SCORES.items() if metric in ready}
    if "same_modality" in ready:
        found["tags (modality, objective)"] = ready[["same_modality", "same_objective"]].astype(float).sum(axis=1)
    priors = {"ssim": "RoI SSIM", "roi_dice": "RoI Dice", "roi_shape": "RoI shape"}
    priors |= {target.own_outcome: f"source's own {target.unit}", target.own_size: "source size"}
    found |= {label: ready[column] for column, label in priors.items() if column in ready}
    found["random"] = pd.Series(0.0, ready.index)
    if static is not None:
        found["static"] = pd.Series(static).reindex(ready.index)
    return {name: values.astype(float) for name, values in found.items() if values.notna().any()}


def agreement_table(
    ready: pd.DataFrame,
    truth: pd.Series,
    *,
    target: TargetTask,
    groups: Mapping[str, pd.Index],
    static: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Each ranker against the truth, of all sources and of those that prior knowledge leaves.

    Args:
        ready: sources with their scores and priors.
        truth: source -> score after fine-tuning, higher is better.
        target: whose sources they are.
        groups: kind of prior knowledge -> the sources that it leaves.
        static: see `rankers`.

    Returns:
        See `medtl_ext.ranking.ranker_table`.
    """
    return ranker_table(rankers(ready, target, static), truth, groups=groups)


def _text(name: str, truth: pd.DataFrame, agreement: pd.DataFrame, target: TargetTask) -> str:
    column = target.outcome
    sources, scratch = truth.drop("scratch"), truth.loc["scratch", column]
    best, worst = sources.iloc[0], sources.iloc[-1]
    by = agreement[agreement["prior"] == EVERY].set_index("ranker")["regret"]
    return (
        f"Fine-tuned on {name}, the best of {len(sources)} sources is {sources.index[0]}: {target.unit} "
        f"{best[column]:.3f} (95 % interval {best[f'{column}_low']:.3f} to {best[f'{column}_high']:.3f}) on "
        f"{int(best[target.counted])} test {'patients' if target.per_pixel else 'images'}; the worst has "
        f"{worst[column]:.3f}, training from scratch {scratch:.3f}, better than "
        f"{int((sources[column] < scratch).sum())} of {len(sources)} sources. {by.idxmin()} has the smallest regret, "
        f"{by.min():.3f}; a random choice loses {by['random']:.3f} on average."
    )
