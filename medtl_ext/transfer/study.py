"""Studies: arms for several targets and seeds, trained to the end, and what they show.

`Study` is the form of all of them; `SourceStudy` asks what rankings of sources were worth.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, ClassVar

import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import CEILING, TOP, agreement_over_targets, friedman_nemenyi, noise_ceiling, verdict_claim
from medtl_ext.transfer.config import study_config
from medtl_ext.transfer.jobs import Arm, Job, Run, run_command, short_path
from medtl_ext.transfer.scores import SCORES
from medtl_ext.transfer.sources.pool import Source, TargetTask, find_sources, source_collection, train_sources
from medtl_ext.transfer.tasks import SegmentationTask, planned_grid
from medtl_ext.transfer.truth import EVERY, NOTE, agreement_table, finetunings, page
from medtl_ext.visualize import plot_critical_difference, save_figure

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""(target, seed)"""
Arms = list[tuple[dict[str, Any], Arm]]
"""Every arm, and the columns that the table of its last training gets."""


def require_lists(least: Mapping[str, int] | None = None, **lists: Sequence[Any]) -> None:
    """Refuse options that are no list, one that is too short, or one that names something twice."""
    for name, values in lists.items():
        if isinstance(values, str) or not values:
            raise InputError(f"{name} is {values!r}; give a list with at least one.")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise InputError(f"{name} names {twice[0]} twice; give each once.")
        if len(values) < (least or {}).get(name, 1):
            raise InputError(f"a study needs two {name} or more; found {list(values)}.")


@dataclass(kw_only=True, eq=False)
class Study:
    """A step that trains every arm of what is studied, reads their tables, and writes what they show.

    The runs share the options of ``train.json`` in the config's ``settings``. Runs that are done are kept: a study may
    grow, but not by what all its runs share.

    Args:
        here: where it writes, and how its trainings are carried out; its config becomes what all runs share.
    """

    kind: ClassVar[type[TargetTask]] = SegmentationTask
    where: ClassVar[Sequence[str]] = ("collection", "phantom_subjects")
    """Options that say where a target's data are."""
    reads: ClassVar[str] = "metrics.csv"
    """The table that the last training of an arm leaves."""
    config_file: ClassVar[str] = "study.json"

    here: Run
    synthetic: bool = field(default=False, init=False)

    def check(self) -> dict[str, Any]:
        """Refuse what makes no study; what all runs share besides the settings."""
        return {}

    def arms(self) -> Arms:
        """All that is to be trained; raises where that cannot work."""
        raise NotImplementedError

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        """Write what the tables of all arms show."""
        raise NotImplementedError

    def first(self) -> str:
        """The target for which is planned what the settings say nothing of: all runs share one grid."""
        return self.targets[0]

    def command(self, *configs: str, **options: Any) -> str:
        """What to type to run configs with the settings that all runs here share."""
        settings = json.loads((self.here.folder / "settings.json").read_text(encoding="utf-8"))["settings"]
        return run_command([self.here.configs / f"{name}.json" for name in configs], options | settings)

    def larger(self, **more: Any) -> str:
        """What to type for more of this study in the same folder, which finds the runs there done."""
        path = self.here.configs / self.config_file
        default = json.loads(path.read_text(encoding="utf-8"))
        record = json.loads((self.here.folder / "settings.json").read_text(encoding="utf-8"))
        options = {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "here"}
        options |= {"settings": record["settings"]} | more
        changed = {name: value for name, value in options.items() if value != default.get(name)}
        return run_command([path], changed | {"output_dir": str(short_path(self.here.folder))})

    def two_more_seeds(self) -> str:
        """The same, where the study has not said enough."""
        seeds = [*self.seeds, max(self.seeds) + 1, max(self.seeds) + 2]
        return f"To be surer, with two more seeds:\n{self.larger(seeds=seeds)}"

    def _plan(self) -> None:
        config = self.here.config
        names = ("spacing", "roi_size", "normalize", "background_share", "axcodes", "flip_axes")
        options = {name: config[name] for name in names}
        grid = planned_grid(self.here, self.open(self.first()), **options)
        for reason in (f"all runs share the grid of {self.first()}", *grid.why):
            logger.info("%s", reason)

    def open(self, name: str, **drawn: Any) -> TargetTask:
        """A target by its name."""
        target = self.kind(name, **{key: self.here.config[key] for key in self.where}, **drawn)
        self.synthetic |= target.synthetic
        return target

    def run(self) -> None:
        """Train, compare, and write it down."""
        shared = self.check()
        config = study_config(self.here.folder, self.here.config["settings"], **shared) | shared
        self.here.config = config | {name: False for name in ("check_data", "settle") if name in config}
        if "spacing" in config:  # of classification there is no grid
            self._plan()
        arms = self.arms()
        self.here.train_arms([arm for _, arm in arms], "study")
        last = {arm.last.output_dir: arm.last.read(self.reads).assign(**columns) for columns, arm in arms}
        self.report(pd.concat(last.values(), ignore_index=True) if last else pd.DataFrame(), arms)


@dataclass(kw_only=True, eq=False)
class SourceStudy(Study):
    """A study that scores and fine-tunes every source on several targets, with several seeds.

    A seed draws the target's images and the fine-tuning. It may not grow by sources, which every ranking compares.
    Writes ``study.csv`` (one row per target, seed and source), ``agreement.csv``, ``study.md`` and
    ``critical_difference.png``.

    Args:
        targets, sources: a target that is among the sources is not its own source.
        seeds: the repetitions.
        grid: see `medtl_ext.transfer.FineTuneSources`.
    """

    title: ClassVar[str]
    head: ClassVar[str]
    """First line of the page, with ``{targets}``, ``{sources}`` and ``{seeds}`` for how many they are."""
    seeds_pool: ClassVar[bool] = True
    """Whether each seed trains a pool of its own."""
    reads = "truth.csv"

    targets: Sequence[str]
    sources: Sequence[Any]
    seeds: Sequence[int]
    grid: Mapping[str, Sequence[float]] | None = None

    def claims(self, table: pd.DataFrame, mean: pd.DataFrame, jobs: Mapping[Key, Job]) -> list[str]:
        """What else a method's study says; ``mean`` has tau, regret and footrule per ranker, prior and target."""
        return []

    def figures(self, sources: pd.DataFrame) -> None:
        """Further figures of a method's study."""

    def groups(self, ready: pd.DataFrame) -> dict[str, pd.Index]:
        """See `medtl_ext.transfer.RankSources.groups`."""
        return {EVERY: ready.index}

    def check(self) -> dict[str, Any]:
        require_lists({"targets": 2}, targets=self.targets, sources=self.sources, seeds=self.seeds)
        return {"sources": list(self.sources)} | ({} if self.grid is None else {"grid": dict(self.grid)})

    def arms(self) -> Arms:
        """Each fine-tuning, and then the scoring of all sources, which finds them done."""
        # What is made on the way, as phantoms are, is made here, and not by several processes at once.
        targets = {name: self.open(name) for name in self.targets}
        names = [target.name for target in targets.values()]
        if len(set(names)) < len(names):
            raise InputError(f"two targets are called alike: {', '.join(names)}; rename a file.")
        for target, split in product(targets.values(), ("train", "val", "test")):
            target.datalist(split)  # raises where there is none, or none that the networks can take
        options = {"n_jobs": 1} | ({} if self.grid is None else {"grid": dict(self.grid)})
        arms: Arms = []
        for (name, target), seed in product(targets.items(), self.seeds):
            run, pool = self._pool(seed, target)
            folder = self.here.folder / "runs" / target.name / f"seed{run.seed}"
            others = [source for source in pool if not (source.task and target.is_same(source.task))]
            scored = run.job(folder, "evaluate", result="agreement.md", target_task=name, **options)
            for source, jobs in finetunings(run, folder / "finetune", others, self.grid, target_task=name).items():
                columns = {"target": target.name, "seed": run.seed}
                arms += [(columns, Arm(source, (job, scored))) for job in jobs]
        return arms

    def _pool(self, seed: int, target: TargetTask) -> tuple[Run, list[Source]]:
        """The run of a seed, and its trained sources; one of several datasets is trained without the target."""
        run = self.here.seeded(self.here.config | ({"pool_seed": seed} if self.seeds_pool else {}), seed)
        found = find_sources(
            self.sources,
            target,
            collection=source_collection(run.config),
            trust=run.config.get("trust_sources", False),
            mark_own=False,
        )
        where = {"folder": run.config["source_dir"], "seed": run.config["pool_seed"]}
        return run, train_sources(found, run, target, check=False, **where)

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        """Write what the rankings were worth over the targets."""
        folder, kind = self.here.folder, self.kind
        jobs = {(columns["target"], columns["seed"]): arm.last for columns, arm in arms}
        sources = table[table["source"] != "scratch"]

        def judge(ready: pd.DataFrame, truth: pd.Series, static: Mapping[str, float] | None) -> pd.DataFrame:
            return agreement_table(ready, truth, target=kind, groups=self.groups(ready), static=static)

        ceiling, reach = noise_ceiling(sources, outcome=kind.outcome)
        agreement = pd.concat(
            [agreement_over_targets(sources, judge, outcome=kind.outcome), ceiling], ignore_index=True
        )
        # A ranker that scores all sources alike, as size may, chooses at random: its expected tau is 0, in each seed.
        tau = agreement["tau"].mask(agreement["tau"].isna() & (agreement["candidates"] > 1), 0.0)
        columns = ["tau", "regret", *(f"footrule_{k}" for k in TOP)]
        by_target = agreement.assign(tau=tau).groupby(["ranker", "prior", "target"], sort=False)
        mean = by_target[columns].mean().reset_index()
        plain = mean[(mean["prior"] == EVERY) & (mean["ranker"] != CEILING)].fillna({"tau": 0.0})
        test = friedman_nemenyi(plain.pivot(index="target", columns="ranker", values="tau"))
        verdicts = {key: json.loads((job.output_dir / "ranking.json").read_text()) for key, job in jobs.items()}
        verdict, baselines, ahead = _baseline_claim(plain, kind)
        claims = [
            reach,
            f"**Do the rankers differ?** By weighted Kendall: {test.text}",
            baselines,
            *self.claims(table, mean, jobs),
            _scratch_claim(table, kind),
            verdict_claim(sources, verdicts, outcome=kind.outcome, unit=kind.unit),
        ]
        write_csv(folder / "study.csv", table)
        write_csv(folder / "agreement.csv", agreement)
        summary = mean.groupby(["ranker", "prior"], sort=False)[columns].mean().reset_index()
        outcome = table.groupby(["source", "target"], sort=False)[kind.outcome].mean().unstack()
        head = self.head.format(**sources[["target", "source", "seed"]].nunique().add_suffix("s"))
        head += " **Synthetic phantom: these numbers say nothing about a clinic.**" if self.synthetic else ""
        parts = [f"# {self.title}", verdict, self._what_next(ahead), head, *[f"- {claim}" for claim in claims]]
        parts.append("## Rankers, mean over targets")
        parts += [f"{NOTE} over the candidates left. Empty: fewer candidates than k.", summary]
        parts += [f"## {kind.unit}, mean over seeds", outcome.reset_index()]
        write_text(folder / "study.md", page(*parts))
        title = "Rankers over targets, by weighted Kendall"
        figure = plot_critical_difference(test, title=title, synthetic=self.synthetic)
        save_figure(figure, folder / "critical_difference.png")
        self.figures(sources)
        print("\n".join(claims))

    def _what_next(self, ahead: Sequence[str]) -> str:
        """Rank by the score that is worth it; or study further."""
        found = [name for name, score in SCORES.items() if score.label in ahead]
        if not found:
            return self.two_more_seeds()
        options = {"target_task": self.targets[0], "sources": list(self.sources), "decide_by": found[0]}
        return f"To rank the sources for one target by {ahead[0]}:\n{self.command('train', **options)}"


def _baseline_claim(plain: pd.DataFrame, target: type[TargetTask]) -> tuple[str, str, list[str]]:
    """Which score, if any, beats the baselines: in a sentence, with the numbers, and their names."""
    means = plain.groupby("ranker")[["tau", "regret"]].mean()
    tau = plain.pivot(index="target", columns="ranker", values="tau")
    scores = [score.label for score in SCORES.values() if score.label in tau]
    baselines = [name for name in ("static", "source size", f"source's own {target.unit}", "random") if name in tau]
    ahead = [score for score in scores if tau[baselines].lt(tau[score], axis=0).all(axis=None)]
    winners = ", ".join(f"{score} ({means.loc[score, 'tau']:.2f})" for score in ahead)
    best, least = means.loc[scores, "tau"].idxmax(), means.loc[scores, "regret"].idxmin()
    said = ", ".join(f"{name} {means.loc[name, 'tau']:.2f} ({means.loc[name, 'regret']:.3f})" for name in baselines)
    verdict = f"{', '.join(ahead) or 'No score'} is ahead of every baseline on every target."
    numbers = (
        f"**Does a score beat the baselines?** Best mean tau: {best}, {means.loc[best, 'tau']:.2f} (regret "
        f"{means.loc[best, 'regret']:.3f}); least regret: {least}, {means.loc[least, 'regret']:.3f} {target.unit}. "
        f"Baselines, tau and regret: {said}. Ahead of every baseline on every target: {winners or 'no score'}."
    )
    return verdict, numbers, ahead


def _scratch_claim(table: pd.DataFrame, target: type[TargetTask]) -> str:
    collapsed = int(table[target.outcome].lt(0.01).sum()) if target.per_pixel else 0
    outcome = table.groupby(["target", "source"])[target.outcome].mean().unstack()
    scratch, rest = outcome["scratch"], outcome.drop(columns="scratch")
    best, worst = rest.max(axis=1), rest.min(axis=1)
    worse, pairs = int(rest.lt(scratch, axis=0).to_numpy().sum()), int(rest.notna().to_numpy().sum())
    said = ", ".join(f"{name} {scratch[name]:.3f} against {best[name]:.3f}" for name in outcome.index)
    return (
        f"**And scratch?** Training from scratch is better than the best source on {int((scratch > best).sum())} of "
        f"{len(outcome)} targets ({said}), and better than {worse} of {pairs} fine-tuned sources: no score says so. "
        f"The best and the worst source are {(best - worst).mean():.3f} {target.unit} apart on average."
    ) + (f" {collapsed} of {len(table)} trainings found nothing (Dice below 0.01)." if collapsed else "")
