"""Studies: several targets and seeds, every source fine-tuned on each, and what the rankings were worth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import agreement_over_targets, friedman_nemenyi, verdict_claim
from medtl_ext.transfer.config import study_config
from medtl_ext.transfer.jobs import Job, Run
from medtl_ext.transfer.report import markdown_table
from medtl_ext.transfer.scores import SCORES
from medtl_ext.transfer.sources import Source, TargetTask, find_sources, source_collection, train_sources
from medtl_ext.transfer.truth import EVERY, TOP, agreement_table, finetunings
from medtl_ext.visualize import plot_critical_difference, save_figure

__all__ = ["Study", "require_lists"]

Key = tuple[str, int]
"""(target, seed)"""


def require_lists(**lists: Sequence[Any]) -> None:
    """Refuse options that are no list, an empty one, or name something twice."""
    for name, values in lists.items():
        if isinstance(values, str) or not values:
            raise InputError(f"{name} is {values!r}; give a list with at least one.")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise InputError(f"{name} names {twice[0]} twice; give each once.")


@dataclass(kw_only=True, eq=False)
class Study:
    """A step that scores and fine-tunes every source on several targets, with several seeds, and writes what it shows.

    The runs share the options of ``train.json`` in the config's ``settings``. A seed draws the target's images and the
    fine-tuning. Runs that are done are kept: a study may grow by targets and seeds, not by sources, which every ranking
    compares. Writes ``study.csv`` (one row per target, seed and source), ``agreement.csv``, ``study.md`` and
    ``critical_difference.png``.

    Args:
        here: where it writes, and how its trainings are carried out.
        targets, sources: a target that is among the sources is not its own source.
        seeds: the repetitions.
        grid: see `medtl_ext.transfer.FineTuneSources`.
    """

    title: ClassVar[str]
    head: ClassVar[str] = "{targets} targets x {sources} sources x {seeds} seeds"
    """First line of the page."""
    seeds_pool: ClassVar[bool] = True
    """Whether each seed trains a pool of its own."""

    here: Run
    targets: Sequence[str]
    sources: Sequence[Any]
    seeds: Sequence[int]
    grid: Mapping[str, Sequence[float]] | None = None
    synthetic: bool = field(default=False, init=False)

    def open(self, name: str, config: Mapping[str, Any]) -> TargetTask:
        """A target by its name."""
        raise NotImplementedError

    def claims(self, table: pd.DataFrame, mean: pd.DataFrame, jobs: Mapping[Key, Job]) -> list[str]:
        """What else a method's study says; ``mean`` has tau, regret and footrule per ranker, prior and target."""
        return []

    def figures(self, sources: pd.DataFrame) -> None:
        """Further figures of a method's study."""

    def run(self) -> pd.DataFrame:
        """Train, score, and write it down; one row per target, seed and source."""
        require_lists(targets=self.targets, sources=self.sources, seeds=self.seeds)
        if len(self.targets) < 2:
            raise InputError(f"a study needs two targets or more; found {list(self.targets)}.")
        decided = {"sources": list(self.sources)} | ({} if self.grid is None else {"grid": dict(self.grid)})
        config = study_config(self.here.folder, self.here.config["settings"], **decided) | decided
        config |= {name: False for name in ("check_data", "settle") if name in config}
        # What is made on the way, as phantoms are, is made here, and not by several processes at once.
        targets = {name: self.open(name, config) for name in self.targets}
        self.synthetic = any(target.synthetic for target in targets.values())
        names = [target.name for target in targets.values()]
        if len(set(names)) < len(names):
            raise InputError(f"two targets are called alike: {', '.join(names)}; rename a file.")
        runs = {seed: self._seeded(config, seed) for seed in self.seeds}
        pools = {seed: self._pool(run, next(iter(targets.values()))) for seed, run in runs.items()}
        jobs: dict[Key, Job] = {}
        trainings = []
        for (name, target), seed in product(targets.items(), self.seeds):
            folder, run = self.here.folder / "runs" / target.name / f"seed{seed}", runs[seed]
            pool = [source for source in pools[seed] if not (source.task and target.is_same(source.task))]
            tuned = finetunings(run, folder / "finetune", pool, self.grid, target_task=name)
            trainings += [job for alternatives in tuned.values() for job in alternatives]
            options = {"target_task": name, "n_jobs": 1} | ({} if self.grid is None else {"grid": dict(self.grid)})
            jobs[target.name, seed] = run.job(folder, "evaluate", result="agreement.md", **options)
        self.here.train(trainings, "fine-tuning every source")
        self.here.train(list(jobs.values()), "scoring")  # these find all their trainings done
        parts = [job.read("truth.csv").assign(target=name, seed=seed) for (name, seed), job in jobs.items()]
        table = pd.concat(parts, ignore_index=True)
        self.report(table, jobs, next(iter(targets.values())))
        return table

    def _seeded(self, config: Mapping[str, Any], seed: int) -> Run:
        return self.here.seeded({**config, "pool_seed": seed} if self.seeds_pool else config, seed)

    def _pool(self, run: Run, target: TargetTask) -> list[Source]:
        found = find_sources(self.sources, target, collection=source_collection(run.config), mark_own=False)
        return train_sources(
            found, run, target, folder=run.config["source_dir"], seed=run.config["pool_seed"], check=False
        )

    def report(self, table: pd.DataFrame, jobs: Mapping[Key, Job], target: TargetTask) -> None:
        """Write what the rankings were worth over the targets."""
        folder, outcome = self.here.folder, target.outcome
        sources = table[table["source"] != "scratch"]

        def judge(ready: pd.DataFrame, truth: pd.Series, static: Mapping[str, float] | None) -> pd.DataFrame:
            return agreement_table(ready, truth, target=target, groups=self.groups(ready), static=static)

        agreement = agreement_over_targets(sources, judge, outcome=outcome)
        # A ranker that scores all sources alike, as size may, chooses at random: its expected tau is 0, in each seed.
        tau = agreement["tau"].mask(agreement["tau"].isna() & (agreement["candidates"] > 1), 0.0)
        columns = ["tau", "regret", *(f"footrule_{k}" for k in TOP)]
        by_target = agreement.assign(tau=tau).groupby(["ranker", "prior", "target"], sort=False)
        mean = by_target[columns].mean().reset_index()
        plain = mean[mean["prior"] == EVERY].fillna({"tau": 0.0})
        test = friedman_nemenyi(plain.pivot(index="target", columns="ranker", values="tau"))
        verdicts = {key: json.loads((job.output_dir / "ranking.json").read_text()) for key, job in jobs.items()}
        claims = [f"**Do the rankers differ?** By weighted Kendall: {test.text}", _baseline_claim(plain, target)]
        claims += [*self.claims(table, mean, jobs), _scratch_claim(table, target)]
        claims.append(verdict_claim(sources, verdicts, outcome=outcome, unit=target.unit))
        write_csv(folder / "study.csv", table)
        write_csv(folder / "agreement.csv", agreement)
        summary = mean.groupby(["ranker", "prior"], sort=False)[columns].mean().reset_index()
        write_text(folder / "study.md", self._page(table, summary, claims, target))
        title = "Rankers over targets, by weighted Kendall"
        figure = plot_critical_difference(test, title=title, synthetic=self.synthetic)
        save_figure(figure, folder / "critical_difference.png")
        self.figures(sources)
        print("\n".join(claims))

    def groups(self, ready: pd.DataFrame) -> dict[str, pd.Index]:
        """See `medtl_ext.transfer.RankSources.groups`."""
        return {EVERY: ready.index}

    def _page(self, table: pd.DataFrame, summary: pd.DataFrame, claims: Iterable[str], target: TargetTask) -> str:
        sources = table.loc[table["source"] != "scratch", "source"].nunique()
        counts = {"targets": table["target"].nunique(), "sources": sources, "seeds": table["seed"].nunique()}
        head = self.head.format(**counts)
        if self.synthetic:
            head += " **Synthetic phantom: these numbers say nothing about a clinic.**"
        outcome = table.groupby(["source", "target"], sort=False)[target.outcome].mean().unstack()
        note = "Footrule of the top k: 0 is perfect. Tau: weighted Kendall over the candidates left. Empty: fewer "
        parts = [f"# {self.title}", head, *[f"- {claim}" for claim in claims]]
        parts += [f"## Rankers, mean over targets\n\n{note}candidates than k.", markdown_table(summary)]
        return "\n\n".join([*parts, f"## {target.unit}, mean over seeds", markdown_table(outcome.reset_index())])


def _baseline_claim(plain: pd.DataFrame, target: TargetTask) -> str:
    """Which score, if any, beats the baselines."""
    means = plain.groupby("ranker")[["tau", "regret"]].mean()
    tau = plain.pivot(index="target", columns="ranker", values="tau")
    baselines = ("static", "source size", f"source's own {target.unit}", "random")
    baselines = [name for name in baselines if name in tau]
    scores = [score.label for score in SCORES.values() if score.label in tau]
    winners = [
        f"{score} ({means.loc[score, 'tau']:.2f})"
        for score in scores
        if all((tau[score] > tau[baseline]).all() for baseline in baselines)
    ]
    best, least = means.loc[scores, "tau"].idxmax(), means.loc[scores, "regret"].idxmin()
    said = ", ".join(f"{name} {means.loc[name, 'tau']:.2f} ({means.loc[name, 'regret']:.3f})" for name in baselines)
    return (
        f"**Does a score beat the baselines?** Best mean tau: {best}, {means.loc[best, 'tau']:.2f} (regret "
        f"{means.loc[best, 'regret']:.3f}); least regret: {least}, {means.loc[least, 'regret']:.3f} {target.unit}. "
        f"Baselines, tau and regret: {said}. Ahead of every baseline on every target: "
        f"{', '.join(winners) or 'no score'}."
    )


def _scratch_claim(table: pd.DataFrame, target: TargetTask) -> str:
    outcome = table.groupby(["target", "source"])[target.outcome].mean().unstack()
    scratch, rest = outcome["scratch"], outcome.drop(columns="scratch")
    best, worst = rest.max(axis=1), rest.min(axis=1)
    worse, pairs = int(rest.lt(scratch, axis=0).to_numpy().sum()), int(rest.notna().to_numpy().sum())
    said = ", ".join(f"{name} {scratch[name]:.3f} against {best[name]:.3f}" for name in outcome.index)
    return (
        f"**And scratch?** Training from scratch is better than the best source on {int((scratch > best).sum())} of "
        f"{len(outcome)} targets ({said}), and better than {worse} of {pairs} fine-tuned sources: no score says so. "
        f"The best and the worst source are {(best - worst).mean():.3f} {target.unit} apart on average."
    )
