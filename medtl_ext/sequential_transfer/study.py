"""Studies over several targets: when is a second step worth it, and which weights should SeqTran's affinity have?

`StudyPaths` trains from every single source and along every path. `FitWeights` fits the weights to transfers, and tests
them on targets that were not used in the fit.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_number
from medtl_ext.affinity import PUBLISHED_WEIGHTS, fit_affinity_weights
from medtl_ext.affinity.tasks import ROUNDING
from medtl_ext.data import Task
from medtl_ext.ranking import PairedComparison, paired_comparison
from medtl_ext.sequential_transfer.affinities import SeqTranAffinity, find_affinity
from medtl_ext.sequential_transfer.chain import Chains, chains_to, spent_text
from medtl_ext.sequential_transfer.plan import PlanPath, SourceGraph, joined_to, shares, task_volumes
from medtl_ext.transfer import Arm, Study, patient_table
from medtl_ext.transfer.jobs import shell_word, short_path
from medtl_ext.transfer.report import read_columns
from medtl_ext.transfer.study import Arms, Key, require_lists
from medtl_ext.transfer.truth import page

OF_RUN = ["target", "seed"]
OF_ARM = [*OF_RUN, "arm"]
OF_CHOICE = [*OF_RUN, "steps", "how"]

PAIR = ["source", "target"]
CORRELATIONS = ["correlation", "correlation_left_out", "correlation_published"]
HEAD = ": head of its path"
DRAWN = "Only these paths and the chosen ones were trained; the best in hindsight is the best of them."

PAIRS = [
    (("path", "{}"), ("single", "{}")),
    (("path", "{}"), ("single", "{}" + HEAD)),
    (("path", "{}"), ("path", "random")),
    (("path", "{}"), ("joint", "{}")),
    (("path", "{}"), ("none", "scratch")),
    (("path", "best in hindsight"), ("single", "best in hindsight")),
    (("path", "random"), ("single", "random")),
    (("single", "{}"), ("single", "random")),
    (("single", "{}"), ("none", "scratch")),
]
"""The comparisons, over the test patients of all targets; {} stands for each affinity in turn."""


@dataclass(kw_only=True, eq=False)
class StudyPaths(Study):
    """A study that trains from every source, along every path of two sources, and on both sources of a path together.

    It then compares the ways to choose: at random, by LEEP, by each affinity, and in hindsight (the paper's Table 4);
    scratch, one step and two (its Tables 1 and 3); and the ideal modality for an objective (its Table 2). Writes
    ``study.csv`` (one row per target, seed and arm), ``patients.csv`` (one row per patient of these), ``choices.csv``
    and ``study.md``.

    Args:
        targets, sources: tasks. A source that shares neither modality nor objective with a target is not used for it,
            but it is in the graph of all targets.
        seeds: the repetitions; a seed changes the training of the pool, the draw of patients and the fine-tuning.
        affinities: names or import paths.
        draws: "at random" is the mean of this number of single sources and of paths; no other paths are trained, except
            those that an affinity chooses. None: of all.
        full: train all parameters at every step, not only the decoder.
    """

    targets: Sequence[str]
    sources: Sequence[str]
    seeds: Sequence[int]
    affinities: Sequence[str]
    draws: int | None
    full: bool
    plans: dict[Key, dict[str, PlanPath]] = field(default_factory=dict, init=False)
    random: dict[Key, dict[str, list[str]]] = field(default_factory=dict, init=False)

    def check(self) -> dict:
        lists = {"targets": self.targets, "sources": self.sources, "seeds": self.seeds, "affinities": self.affinities}
        require_lists({"targets": 2}, **lists)
        if self.draws is not None:
            require_number("draws", self.draws, 1, whole=True)
        return {}

    def arms(self) -> Arms:
        if self.here.config["max_intermediates"] != 1:
            problem = "--settings holds max_intermediates, which must be 1 in a study of all paths"
            raise InputError(f"{problem}; leave it out.")
        found = {name: find_affinity(name) for name in self.affinities}  # each reads a task's volumes once
        chains = {key: chains_to(self, *key) for key in product(self.targets, self.seeds)}
        graphs: dict[tuple, SourceGraph] = {}  # shared by all targets with the same sources
        for (target, seed), of in chains.items():
            joined_to(target, self.sources)  # raises if there is none
            others = tuple(source for source in self.sources if source != target)
            made = {name: SourceGraph(here=of.here, sources=others, affinity=cost) for name, cost in found.items()}
            self.plans[target, seed] = {
                name: PlanPath(graph=graphs.setdefault((name, seed, others), graph), target=of.target)
                for name, graph in made.items()
            }
            self.plans[target, seed][self.affinities[0]].check()
        return [
            ({"pair": target, "seed": seed, "method": arm.name}, arm)
            for (target, seed), of in chains.items()
            for arm in self._arms_to((target, seed), of)
        ]

    def _arms_to(self, key: Key, chains: Chains) -> list[Arm]:
        """Every single source, paths of two joined sources, and joint training for paths that an affinity chose."""
        sources, rng = joined_to(key[0], self.sources), np.random.default_rng(key[1])
        pairs = [(a, b) for a, b in product(sources, sources) if a != b and shares(a, b)]
        drawn = {"single": sources, "path": pairs}
        if self.draws is not None:
            drawn = {steps: rng.permutation(of)[: self.draws].tolist() for steps, of in drawn.items()}
        chosen = dict.fromkeys(plan.path for plan in self.plans[key].values() if plan.path)
        paths = dict.fromkeys([*map(tuple, drawn["path"]), *chosen])
        self.random[key] = {"single": drawn["single"], "path": [" > ".join(pair) for pair in drawn["path"]]}
        how = {"full": self.full}
        arms = [chains.arm("scratch"), *(chains.arm(source, source, **how) for source in sources)]
        arms += [chains.arm(" > ".join(path), *path, **how) for path in paths]
        return arms + [chains.arm(" + ".join(path), *path, joint=True, **how) for path in chosen]

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        """Write the results of each arm, and of each way to choose an arm."""
        patients = patient_table(table).rename(columns={"pair": "target", "method": "arm", "subject": "patient"})
        patients = patients.loc[patients["split"] == "test", [*OF_ARM, "patient", "dice", "iou"]]
        rows = pd.DataFrame([columns.values() for columns, _ in arms], columns=OF_ARM)
        rows["steps"] = [-1 if "joint_task" in arm.jobs[0].overrides else len(arm.jobs) - 1 for _, arm in arms]
        rows = rows.merge(patients.groupby(OF_ARM)[["dice", "iou"]].mean(), on=OF_ARM)
        files = [arm.last.output_dir / "leep.json" for _, arm in arms]
        rows["leep"] = [json.loads(file.read_text())["leep"] if file.is_file() else np.nan for file in files]
        choices, scores = _choices(rows, patients, self.plans, self.random)
        patients = patients.drop(columns="iou")
        for name, of in {"study": rows, "choices": choices, "patients": patients}.items():
            write_csv(self.here.folder / f"{name}.csv", of)
        trained = "all parameters trained" if self.full else "only the decoder trained"
        trained += f" at every step, {spent_text(self.here.config['source_patients'])}"
        said = {"synthetic": self.synthetic, "trained": trained, "draws": self.draws}
        text = study_text(rows, patients, choices, scores, self.affinities, what_next=self._what_next, **said)
        write_text(self.here.folder / "study.md", text)
        print(text)

    def _what_next(self, worth: bool) -> str:
        """Go over a path, where that was worth it; or study further."""
        if not worth:
            return self.two_more_seeds()
        options = {"target_task": self.targets[0], "sources": list(self.sources), "affinity": self.affinities[0]}
        return f"To go over a path to one target:\n{self.command('train', **options)}"


def _choices(
    table: pd.DataFrame,
    patients: pd.DataFrame,
    plans: Mapping[Key, Mapping[str, PlanPath]],
    random: Mapping[Key, Mapping[str, Sequence[str]]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each way to choose picks for a target and seed, its score (the mean over several picks), and the score of
    each patient.
    """
    rows = []
    for (target, seed), of in table.groupby(OF_RUN):
        one, two = (of[of["steps"] == steps].set_index("arm") for steps in (1, 2))
        picks = {
            ("none", "scratch"): ["scratch"],
            ("single", "random"): random[target, seed]["single"],
            ("single", "LEEP"): one.nlargest(1, "leep").index,
            ("single", "best in hindsight"): one.nlargest(1, "dice").index,
            ("path", "random"): random[target, seed]["path"],
            ("path", "best in hindsight"): two.nlargest(1, "dice").index,
        }
        for name, plan in plans[target, seed].items():
            picks["single", name] = [plan.single]
            if plan.path:
                picks["single", f"{name}{HEAD}"] = [plan.path[0]]
                picks["path", name] = [" > ".join(plan.path)]
                picks["joint", name] = [" + ".join(plan.path)]
        rows += [(target, seed, *choice, arm) for choice, arms in picks.items() for arm in arms]
    picked = pd.DataFrame(rows, columns=[*OF_CHOICE, "arm"])
    groups = picked.merge(table.drop(columns="steps"), on=OF_ARM).groupby(OF_CHOICE, sort=False)
    choices = groups.agg(pick=("arm", _pick_text), dice=("dice", "mean"), iou=("iou", "mean"))
    scores = picked.merge(patients, on=OF_ARM).groupby([*OF_CHOICE, "patient"], sort=False)["dice"].mean()
    return choices.reset_index(), scores.reset_index()


def _pick_text(arms: pd.Series) -> str:
    return arms.iloc[0] if len(arms) == 1 else f"mean of {len(arms)}"


def study_text(
    table: pd.DataFrame,
    patients: pd.DataFrame,
    choices: pd.DataFrame,
    scores: pd.DataFrame,
    affinities: Sequence[str],
    *,
    synthetic: bool,
    trained: str,
    draws: int | None = None,
    what_next: Callable[[bool], str] = lambda worth: "",
) -> str:
    """The study as a Markdown page: Dice of every way to choose, and the gains of all paths of two sources.

    ``what_next`` says what to type next, given whether a second step is worth it; that stands below the verdict.
    """
    seeds, targets = choices["seed"].nunique(), choices["target"].nunique()
    warned = " **Synthetic** data (brain phantom), which say nothing about a clinic." if synthetic else ""
    compared = differences(scores, affinities)
    verdict, worth = _verdict(compared, affinities)
    return page(
        "# Sequential transfer: is a second step worth it?",
        verdict,
        what_next(worth),
        f"Mean Dice of test patients over {targets} targets and {seeds} seeds, {trained}.{warned}",
        _means_table(choices),
        *([f"random: the mean of {draws} draws. {DRAWN}"] if draws else []),
        f"pairs: number of target-seed pairs in a row, of {seeds * targets}. A row has fewer if a way to choose has "
        "no path there. Such a row is a mean over fewer targets or seeds: compare it only by the differences below.",
        "Differences in Dice, paired over patients, with 95 % t intervals. Each patient is averaged over the targets "
        "and seeds that both sides have, so a patient of several targets counts once. p: Wilcoxon, not corrected. "
        "left out: pairs that one of the two sides lacks:",
        compared,
        "Gain of every path of two sources against its first source alone, and against the better of its two sources "
        "alone. The interval belongs to the gain against the first source: 95 % t, over patients, each averaged over "
        "the paths, targets and seeds of the row:",
        gains(table, patients),
        *ideal_modality(_best_of_both(choices)),
    )


def _verdict(compared: pd.DataFrame, affinities: Sequence[str]) -> tuple[str, bool]:
    """One sentence that compares the path of each affinity with its single source; is a second step worth it?"""
    asked = [(f"path, {name}", f"single, {name}") for name in affinities]
    ours = pd.DataFrame([row for row in compared.to_dict("records") if (row["first"], row["second"]) in asked])
    if ours.empty:
        return "No path of two sources was found, so nothing can be said about a second step.", False
    worth = bool(ours["interval"].str.match(r"\+.* to \+").all())
    said = "; ".join(f"{row.first} against {row.second} {row.difference} ({row.interval})" for row in ours.itertuples())
    return f"{'A second step is worth it' if worth else 'No evidence that a second step is worth it'}: {said}.", worth


def _means_table(choices: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of every way to choose, per target and over targets, and the number of target-seed pairs."""
    means = choices.pivot_table(index=["steps", "how"], columns="target", values="dice", sort=False)
    means["mean"] = means.mean(axis=1)
    by_seed = choices.pivot_table(index=["steps", "how", "target"], columns="seed", values="dice", sort=False)
    by_seed = by_seed.reindex(columns=choices["seed"].unique()).dropna()  # targets that have every seed
    means["sd over seeds"] = by_seed.groupby(["steps", "how"]).mean().std(axis=1)
    means["pairs"] = choices.groupby(["steps", "how"]).size()
    return means.reset_index()


def differences(scores: pd.DataFrame, affinities: Sequence[str]) -> pd.DataFrame:
    """The comparisons of `PAIRS`, over the patients, targets and seeds that both sides have.

    Targets of one institution share test patients. So the Dice of each patient is first averaged over targets and
    seeds; then each patient counts once.

    Args:
        scores: columns ``target, seed, steps, how, patient, dice``.
        affinities: names that replace {}.

    Returns:
        One row per comparison; ``pairs`` counts the target-seed pairs compared, ``left out`` names the others.
    """
    wide = scores.pivot(index=[*OF_RUN, "patient"], columns=["steps", "how"], values="dice")
    asked, rows = wide.index.droplevel("patient").unique(), []
    pairs = [
        ((one, how.format(name)), (other, than.format(name)))
        for ((one, how), (other, than)), name in product(PAIRS, affinities)
    ]
    for first, second in dict.fromkeys(pairs):
        both = wide.reindex(columns=[first, second])
        known = both.dropna()
        if known.empty:
            continue
        found = _compared(known[first], known[second])
        compared = known.index.droplevel("patient").unique()
        halves = both.index[both.notna().sum(axis=1) == 1]
        lacking = halves[halves.droplevel("patient").isin(compared)].unique("patient")
        left_out = [_pairs_text(asked.difference(compared), asked)]
        left_out += [f"of a pair: {len(lacking)} patients"] if len(lacking) else []
        rows.append(
            {
                "first": ", ".join(first),
                "second": ", ".join(second),
                "difference": f"{found.difference:+.3f}",
                "interval": _interval(found),
                "p": f"{found.p_wilcoxon:.3g}",
                "patients": found.patients,
                "pairs": len(compared),
                "left out": "; ".join(filter(None, left_out)),
            }
        )
    return pd.DataFrame(rows)


def _best_of_both(choices: pd.DataFrame) -> pd.DataFrame:
    best = choices[choices["how"] == "best in hindsight"]
    return best.pivot_table(index="target", columns="steps", values="dice").reindex(columns=["single", "path"]).dropna()


def ideal_modality(best: pd.DataFrame) -> list[str | pd.DataFrame]:
    """Which modality is ideal for an objective, and what a second step gains with it and with other modalities.

    The ideal modality of an objective at an institution is the one for which the best single source gives the highest
    Dice. Objectives with one modality only are left out.

    Args:
        best: index: target; columns: Dice of the best ``single`` source and of the best ``path``.

    Returns:
        Parts of a page; empty if no objective has two modalities.
    """
    tasks = [Task(name) for name in best.index]
    found = best.assign(modality=[task.modality for task in tasks], gain=best["path"] - best["single"])
    found["objective"] = [f"{task.institution}, {task.objective}" for task in tasks]
    singles = found.groupby("objective")["single"]
    found["ideal"] = found["single"] == singles.transform("max")
    found = found[singles.transform("size") > 1]
    if found.empty:
        return []
    kinds = {"the ideal modality": found.loc[found["ideal"], "gain"], "another": found.loc[~found["ideal"], "gain"]}
    said = [f"{(gain > 0).sum()} of {len(gain)} in {kind} ({gain.mean():+.3f})" for kind, gain in kinds.items()]
    return [
        "Which modality is ideal for an objective? Dice of the best single source by the target's modality:",
        found.pivot_table(index="objective", columns="modality", values="single", sort=False).reset_index(),
        f"The best path is better than the best single source on {', on '.join(said)}. Note: the ideal modality is "
        "chosen by the same Dice from which the gain is computed. So by chance alone, its gain tends to be smaller.",
    ]


def _compared(first: pd.Series, second: pd.Series | float = 0.0) -> PairedComparison:
    """A comparison over patients, each averaged over targets, seeds and paths first."""
    mean = pd.DataFrame({"first": first, "second": second}).groupby("patient").mean()
    return paired_comparison(mean["first"].to_dict(), mean["second"].to_dict(), n_resamples=999)


def _interval(found: PairedComparison) -> str:
    return "" if np.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}"


def _pairs_text(pairs: pd.MultiIndex, asked: pd.MultiIndex) -> str:
    """Target-seed pairs in words; the target alone if all its seeds are there."""
    texts = []
    for target, seeds in pairs.to_frame(index=False).groupby("target")["seed"]:
        every = len(seeds) == (asked.get_level_values("target") == target).sum()
        texts.append(target if every else f"{target} (seed {', '.join(map(str, sorted(seeds)))})")
    return "; ".join(texts)


def gains(table: pd.DataFrame, patients: pd.DataFrame) -> pd.DataFrame:
    """The gain of a second step, by whether it adds the target's modality to a network that has not seen it.

    Args:
        table: columns ``target, seed, arm, steps, dice``.
        patients: columns ``target, seed, arm, patient, dice``.

    Returns:
        One row per kind of path and target, and one over all targets: number of paths, mean gain over paths against the
        first source with its interval over patients, and mean gain against the better of the two sources.
    """
    alone = table.set_index(OF_ARM)["dice"]
    dice = {key: of.set_index("patient")["dice"] for key, of in patients.groupby(OF_ARM)}
    rows = []
    for path in table[table["steps"] == 2].itertuples():
        key, (first, second) = (path.target, path.seed), path.arm.split(" > ")
        one, other = (alone[*key, source] for source in (first, second))
        modality = Task(path.target).modality
        brings = Task(first).modality != modality == Task(second).modality
        row = {"second step": "brings the target's modality" if brings else "any other", "target": path.target}
        row |= {"against the first": path.dice - one, "against the better": path.dice - max(one, other)}
        rows.append(row | {"gain": dice[*key, path.arm] - dice[*key, first]})
    columns = ["against the first", "against the better"]
    found = pd.DataFrame(rows, columns=["second step", "target", *columns, "gain"])
    groups = pd.concat([found, found.assign(target="all")]).groupby(["second step", "target"], sort=False)
    means = groups[columns].mean()
    means.insert(0, "paths", groups.size())
    means.insert(2, "interval", groups["gain"].agg(lambda gain: _interval(_compared(pd.concat(list(gain))))))
    return means.reset_index()


@dataclass(kw_only=True, eq=False)
class FitWeights(Study):
    """A study that fits ``alpha`` and ``beta`` of SeqTran's affinity to the results of transfers.

    An affinity must rank the sources of one target. So the mean over the target's sources is subtracted from distance,
    similarity and Dice. Writes ``transfers.csv`` (source, target, distance, similarity, dice) and
    ``affinity_weights.json``, which also says how well the weights work on a target that is left out of the fit.

    Args:
        transfers: a CSV file with the columns ``source, target, dice``; None: fine-tune every source on every target.
        targets, sources: tasks, used if ``transfers`` is None.
        standardize, multivariate: see `SeqTranAffinity`.
    """

    transfers: str | None
    targets: Sequence[str]
    sources: Sequence[str]
    standardize: bool
    multivariate: bool
    table: pd.DataFrame = field(init=False)

    def check(self) -> dict[str, Any]:
        if self.transfers is None:
            require_lists(targets=self.targets, sources=self.sources)
            self.table = pd.DataFrame([(a, b) for b in self.targets for a in self.sources if a != b], columns=PAIR)
        else:
            self.table = _read_transfers(Path(self.transfers))
        if len(self.table) < 3:
            asked = self.transfers or f"{list(self.sources)} to {list(self.targets)}"
            raise InputError(f"a fit needs at least three transfers; from {asked} there are {len(self.table)}.")
        return {}

    @cached_property
    def pool(self) -> SourceGraph:
        affinity = SeqTranAffinity(standardize=self.standardize, multivariate=self.multivariate)
        return SourceGraph(here=self.here, sources=self.sources, affinity=affinity)

    def arms(self) -> Arms:
        config = self.here.config
        chains = {name: chains_to(self, name, config["seed"]) for name in self.table["target"].unique()}
        if self.transfers is not None:
            return []
        for name in self.sources:
            self.pool.open(name, train_patients=config["source_patients"]).datalist("train")
        for of in chains.values():
            of.target.datalist("train")  # raises if there are fewer patients than asked for
        pairs = self.table.itertuples(index=False)
        return [({"pair": target, "method": source}, chains[target].arm(source, source)) for source, target in pairs]

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        """Fit, write the files and print the result."""
        config, folder, found = self.here.config, self.here.folder, self.table
        if arms:
            scores = patient_table(table)
            scores = scores[scores["split"] == config["val_split"]]
            found["dice"] = scores.groupby(["pair", "method"], sort=False)["dice"].mean().to_numpy()
        whole, limit = map(self.open, found["target"].unique()), config["affinity_patients"]
        targets = {task.name: task_volumes(task, patients=limit) for task in whole}
        sources = {volumes.name: volumes for volumes in self.pool.volumes(found["source"].unique())}
        pairs = [(sources[a], targets[b]) for a, b in found[PAIR].itertuples(index=False)]
        found["distance"] = [self.pool.cost.distance(*pair) for pair in pairs]
        found["similarity"] = [self.pool.cost.similarity(*pair) for pair in pairs]
        content = fit_to_transfers(found) | self.pool.cost.images
        write_csv(folder / "transfers.csv", found)
        weights = folder / "affinity_weights.json"
        write_json(weights, content)
        print(f"{fit_text(content)} To use them: --affinity {shell_word(str(short_path(weights)))}")


def fit_to_transfers(table: pd.DataFrame) -> dict[str, Any]:
    """Fit the weights, and correlate cost and Dice within targets (negative if the cost predicts the Dice).

    Args:
        table: one row per transfer with ``target, dice, distance, similarity``.

    Returns:
        ``alpha``, ``beta``, the number of ``transfers``, and three correlations, each the mean over the same targets,
        or None if nothing varies: ``correlation`` with these weights, on the transfers of the fit;
        ``correlation_left_out`` with weights fitted to the other targets; ``correlation_published`` with the published
        weights. ``targets_left_out`` is the number of targets tested; on ``targets_predicted`` of them the correlation
        is negative, and on ``targets_better`` the weights of the other targets beat the published ones.
    """
    values = table.reset_index(drop=True).set_index("target", append=True)[["dice", "distance", "similarity"]]
    rows = values.groupby("target").transform(_within_target)
    weights = _fit(rows)
    found = []
    for _, own in rows.groupby("target", sort=False):
        others, left_out = rows.drop(own.index), np.nan
        if len(others) >= 3:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # the fit to all targets warns already
                left_out = _correlation(own, _fit(others))
        found.append([_correlation(own, weights), left_out, _correlation(own, PUBLISHED_WEIGHTS)])
    compared = pd.DataFrame(found, columns=CORRELATIONS)
    known = compared.dropna()
    means = (known if len(known) else compared).mean()
    return {
        "alpha": weights[0],
        "beta": weights[1],
        "transfers": len(table),
        **{kind: None if np.isnan(value) else value for kind, value in means.items()},
        "targets_left_out": len(known),
        "targets_predicted": int((known["correlation_left_out"] < 0).sum()),
        "targets_better": int((known["correlation_left_out"] < known["correlation_published"] - ROUNDING).sum()),
    }


def _within_target(values: pd.Series) -> pd.Series:
    """Subtract the mean over a target's sources: how hard the target is, and how far it is from all sources.

    Values that are equal for all sources become exactly 0, without rounding errors.
    """
    varies = values.max() - values.min() > ROUNDING * values.abs().max()
    return values - values.mean() if varies else 0.0 * values


def _fit(rows: pd.DataFrame) -> tuple[float, float]:
    return fit_affinity_weights(rows["distance"] - rows["distance"].min(), rows["similarity"], rows["dice"])


def _correlation(rows: pd.DataFrame, weights: tuple[float, float]) -> float:
    """Correlation of cost and Dice within a target; NaN if one of them is constant."""
    cost = weights[0] * rows["distance"] - weights[1] * rows["similarity"]
    return float(cost.corr(rows["dice"])) if cost.any() and rows["dice"].any() else np.nan


def fit_text(content: Mapping[str, Any]) -> str:
    """The result of `fit_to_transfers` in words, and whether to prefer its weights."""
    said = ["unknown" if content[kind] is None else f"{content[kind]:+.2f}" for kind in CORRELATIONS]
    fitted, left_out, published = said
    targets, predicted, better = (content[f"targets_{kind}"] for kind in ("left_out", "predicted", "better"))
    text = (
        f"alpha {content['alpha']:.4g}, beta {content['beta']:.4g}, fitted to {content['transfers']} transfers. Mean "
        f"correlation of cost and Dice over a target's sources (lower is better): {fitted} on the targets of the fit; "
        f"{left_out} on targets left out of the fit; {published} with the published weights."
    )
    found = f"of {targets} targets left out, {predicted} have a negative correlation, and on {better} it is lower than "
    found += "with the published weights"
    ahead = targets > 0 and content["correlation_left_out"] < content["correlation_published"]
    # One-sided sign tests at 5 %: 5 of 5 targets, or 7 of 8, are significant.
    if ahead and all(stats.binomtest(n, targets, alternative="greater").pvalue <= 0.05 for n in (predicted, better)):
        return f"{text} Prefer these weights to the published ones for further targets of this kind: {found}."
    few = ", and fewer than 5 cannot show it" if targets < 5 else ""
    return f"{text} No evidence to prefer these weights to the published ones on another target: {found}{few}."


def _read_transfers(path: Path) -> pd.DataFrame:
    table = read_columns(path, {*PAIR, "dice"})
    table["dice"] = pd.to_numeric(table["dice"], errors="coerce")
    wrong = {"has no dice between 0 and 1": ~table["dice"].between(0, 1)}
    wrong["is from a task to itself"] = table["source"] == table["target"]
    for what, where in wrong.items():
        if where.any():
            line = where.argmax() + 2
            raise InputError(f"transfers file {path}: line {line} {what}; correct it, or leave it out.")
    return table[[*PAIR, "dice"]]
