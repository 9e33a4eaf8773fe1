"""When is a second step worth it? Every single source and every path to several targets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, run_jobs, study_config
from medtl_ext.data import Collection, Task
from medtl_ext.ranking import paired_comparison
from medtl_ext.report import markdown_table, patient_table
from medtl_ext.sequential.affinities import Affinity, find_affinity
from medtl_ext.sequential.chain import Arm, Chains, source_collection, spent_text, target_patients
from medtl_ext.sequential.plan import (
    Plan,
    joined_to,
    plan_path,
    require_patients,
    require_stage_patients,
    shares,
    source_graph,
)
from medtl_ext.studies import open_collection

Jobs = dict[tuple[str, int, str], Job]
"""(target, seed, arm) -> the arm's last training."""


def study_paths(
    *,
    output_dir: str,
    targets: Sequence[str],
    sources: Sequence[str],
    seeds: Sequence[int],
    affinities: Sequence[str],
    settings: Mapping[str, Any],
    n_jobs: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Train from every single source, along every path of two, and on both sources of a path together, for each target.

    From these, what every way to choose is worth: at random, by LEEP, by each affinity, in hindsight (the paper's
    Table 4); scratch, one step and two (its Tables 1 and 3). Runs that are done are kept. Writes ``study.csv`` (one row
    per target, seed and arm), ``patients.csv`` (one per patient of these), ``choices.csv`` and ``study.md``.

    Args:
        output_dir: gets ``runs/`` and the results.
        targets, sources: names of tasks; all sources must be joined to each target by modality or objective, or are
            left out for it.
        seeds: the repetitions: of the pool's training, the draw of patients and the fine-tuning.
        affinities: names or import paths.
        settings: options of ``train.json`` for all runs.
        n_jobs, backend: see `medtl_ext.bundle.run_jobs`.
    """
    if len(targets) < 2:
        raise InputError(f"a study needs two targets or more; found {list(targets)}.")
    require_lists(targets=targets, sources=sources, seeds=seeds, affinities=affinities)
    config = study_config(output_dir, settings) | {"check_data": False}
    if config["max_intermediates"] != 1:
        raise InputError(
            "settings holds max_intermediates, which is 1 in a study: it trains every path of two sources."
        )
    folder = Path(output_dir)
    require_stage_patients(config["stage_patients"])
    collections, of = collections_with_patients(config, targets, sources)
    require_patients(of, config["stage_patients"], option="stage_patients")
    found = {name: find_affinity(name) for name in affinities}  # each reads a task's volumes once
    plans = {
        (target, seed, name): _plan(config, sources, target, collections[target], found[name], seed)
        for target, seed, name in product(targets, seeds, affinities)
    }
    arms = {
        (target, seed): _arms(sources, target, [plans[target, seed, affinity] for affinity in affinities])
        for target, seed in product(targets, seeds)
    }
    jobs: Jobs = {}
    for seed in seeds:
        waves: list[dict[Path, Job]] = []
        for target in targets:
            chains = chains_to(config, folder, target, seed)
            for arm in arms[target, seed]:
                steps = [*chains.sources(arm), chains.target(arm, target)]
                jobs[target, seed, arm.name] = steps[-1]
                for n, job in enumerate(steps):
                    waves += [{}] * (n + 1 - len(waves))
                    waves[n] = waves[n] | {job.output_dir: job}
        for n, wave in enumerate(waves):
            run_jobs(list(wave.values()), n_jobs=n_jobs, backend=backend, description=f"seed {seed}, step {n + 1}")
    table = _results(jobs, arms)
    choices = pd.concat(
        [_choices(of, target, seed, plans, affinities) for (target, seed), of in table.groupby(["target", "seed"])],
        ignore_index=True,
    )
    synthetic = collections[targets[0]].synthetic
    write_csv(folder / "study.csv", table.drop(columns="patients"))
    write_csv(folder / "choices.csv", choices.drop(columns="patients"))
    write_csv(folder / "patients.csv", _patients_table(table))
    text = study_text(table, choices, synthetic=synthetic, source_patients=config["source_patients"])
    write_text(folder / "study.md", text)
    print(text)
    return choices


def require_lists(**lists: Sequence[Any]) -> None:
    """Refuse options that are no list, an empty one, or name something twice."""
    for name, values in lists.items():
        if isinstance(values, str) or not values:
            raise InputError(f"{name} is {values!r}; give a list with at least one.")
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise InputError(f"{name} names {twice[0]} twice; give each once.")


def collections_of(
    config: Mapping[str, Any], targets: Iterable[str], sources: Iterable[str]
) -> tuple[dict[str, Collection], dict[str, Collection]]:
    """The collection of each target and of each source; phantoms are made here, not by several processes at once."""

    def opened(path: str | None, tasks: Iterable[str]) -> dict[str, Collection]:
        return {task: open_collection(path, task, subjects=config["phantom_subjects"]) for task in dict.fromkeys(tasks)}

    return opened(config["collection"], targets), opened(source_collection(config), sources)


def collections_with_patients(
    config: Mapping[str, Any], targets: Sequence[str], sources: Sequence[str]
) -> tuple[dict[str, Collection], dict[str, Collection]]:
    """The same, if all tasks can give the patients that one step asks them for."""
    to, of = collections_of(config, targets, sources)
    require_patients(of, config["source_patients"])
    require_patients(to, target_patients(config), option="train_patients")
    return to, of


def chains_to(config: Mapping[str, Any], folder: Path, target: str, seed: int) -> Chains:
    return Chains(
        config,
        folder=folder / "runs" / target / f"seed{seed}",
        stage_dir=folder / "runs" / "stages",
        source_dir=config["source_dir"],
        seed=seed,
        pool_seed=seed,
    )


def _plan(
    config: Mapping[str, Any],
    sources: Sequence[str],
    target: str,
    collection: Collection,
    affinity: Affinity,
    seed: int,
) -> Plan:
    near = joined_to(target, sources)
    options = {"collection": source_collection(config), "subjects": config["phantom_subjects"], "affinity": affinity}
    options |= {"patients": config["affinity_patients"], "progress": False}
    keys = ("n_clusters", "cluster_weight", "representative_rule")
    graph = source_graph(near, **options, **{key: config[key] for key in keys})
    return plan_path(
        graph,
        target=collection,
        target_task=target,
        target_patients=target_patients(config),
        max_intermediates=1,
        seed=seed,
        **options,
    )


def _arms(sources: Sequence[str], target: str, plans: Sequence[Plan]) -> list[Arm]:
    """Every single source, every path of two joined ones, and joint training where an affinity chose the path."""
    near = joined_to(target, sources)
    arms = [Arm("scratch"), *(Arm(source, (source,)) for source in near)]
    arms += [Arm(f"{a} > {b}", (a, b)) for a, b in product(near, near) if a != b and shares(a, b)]
    chosen = dict.fromkeys(plan.path for plan in plans if plan.path)
    return arms + [Arm(f"{' + '.join(path)}", path, joint=True) for path in chosen]


def _results(jobs: Jobs, arms: Mapping[tuple[str, int], Sequence[Arm]]) -> pd.DataFrame:
    """One row per target, seed and arm; ``patients`` maps the test patients to their Dice."""
    rows = []
    for (target, seed), of in arms.items():
        for arm in of:
            folder = jobs[target, seed, arm.name].output_dir
            scores = patient_table(pd.read_csv(folder / "metrics.csv"))
            test = scores[scores["split"] == "test"]
            leep = folder / "leep.json"
            rows.append(
                {
                    "target": target,
                    "seed": seed,
                    "arm": arm.name,
                    "steps": -1 if arm.joint else len(arm.tasks),
                    "dice": test["dice"].mean(),
                    "iou": test["iou"].mean(),
                    "leep": json.loads(leep.read_text())["leep"] if leep.is_file() else np.nan,
                    "patients": dict(zip(test["subject"], test["dice"], strict=True)),
                }
            )
    return pd.DataFrame(rows)


def _patients_table(table: pd.DataFrame) -> pd.DataFrame:
    """Dice of every test patient in every arm, from which all intervals come."""
    rows = [
        {"target": row.target, "seed": row.seed, "arm": row.arm, "patient": patient, "dice": dice}
        for row in table.itertuples()
        for patient, dice in row.patients.items()
    ]
    return pd.DataFrame(rows)


def _choices(
    table: pd.DataFrame, target: str, seed: int, plans: Mapping[tuple[str, int, str], Plan], affinities: Sequence[str]
) -> pd.DataFrame:
    """What each way to choose gives for one target and seed: its pick (None: the mean of all) and Dice."""
    one, two = table[table["steps"] == 1], table[table["steps"] == 2]
    picks: dict[tuple[str, str], pd.DataFrame] = {
        ("none", "scratch"): table[table["steps"] == 0],
        ("single", "random"): one,
        ("single", "LEEP"): one.nlargest(1, "leep"),
        ("single", "best in hindsight"): one.nlargest(1, "dice"),
        ("path", "random"): two,
        ("path", "best in hindsight"): two.nlargest(1, "dice"),
    }
    for affinity in affinities:
        plan = plans[target, seed, affinity]
        picks["single", affinity] = one[one["arm"] == plan.single]
        if plan.path:
            picks["single", f"{affinity}{HEAD}"] = one[one["arm"] == plan.path[0]]
            picks["path", affinity] = two[two["arm"] == " > ".join(plan.path)]
            picks["joint", affinity] = table[table["arm"] == " + ".join(plan.path)]
    rows = []
    for (steps, how), chosen in picks.items():
        if len(chosen):
            patients = pd.DataFrame(list(chosen["patients"])).mean().to_dict()
            pick = chosen["arm"].iloc[0] if len(chosen) == 1 else f"mean of {len(chosen)}"
            row = {"target": target, "seed": seed, "steps": steps, "how": how, "pick": pick, "patients": patients}
            rows.append(row | {"dice": chosen["dice"].mean(), "iou": chosen["iou"].mean()})
    return pd.DataFrame(rows)


HEAD = ": head of its path"
NO_AFFINITY = ("random", "LEEP", "best in hindsight")
"""Ways to choose a single source that are no affinity."""

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
"""What is compared with what, over the test patients of all targets; {} is each affinity in turn."""


def study_text(table: pd.DataFrame, choices: pd.DataFrame, *, synthetic: bool, source_patients: int | None) -> str:
    """The study as a Markdown page: Dice of every way to choose, and what all its paths of two sources gained."""
    spent = spent_text(source_patients)
    lines = ["# Sequential transfer: is a second step worth it?", ""]
    seeds, targets = choices["seed"].nunique(), choices["target"].nunique()
    lines += [
        f"Mean Dice of test patients over {targets} targets and {seeds} seeds, all parameters trained at every step, "
        f"{spent}." + (" **Synthetic** data (brain phantom), which say nothing about a clinic." if synthetic else ""),
        "",
        markdown_table(_means_table(choices)),
        "",
        f"pairs: target-seed pairs that a row stands for, of {seeds * targets}. Rows with fewer, where a way to choose "
        "has no path, are means over other targets or seeds and do not compare; the differences below do.",
        "",
        "Differences in Dice, paired over patients (each averaged over the targets and seeds that both sides have, so "
        "that one who is a patient of several targets counts once), with 95 % t intervals; p: Wilcoxon, not corrected; "
        "left out: what one of the two lacks:",
        "",
        markdown_table(differences(choices)),
        "",
        "Gain of every path of two, whoever would choose it, against its first source alone, and against the better of "
        f"its two sources alone, {spent}. The interval is of the gain against the first source: 95 % t, over patients, "
        "each averaged over the paths, targets and seeds of the row:",
        "",
        markdown_table(gains(table)),
    ]
    return "\n".join(lines) + "\n"


def differences(choices: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of `PAIRS`, over the patients, targets and seeds that both sides have.

    Targets of one institution share their test patients, so a patient's Dice is averaged over targets and seeds before
    patients are compared: each counts once.

    Returns:
        One row per comparison; ``pairs`` counts the target-seed pairs compared, ``left out`` names the others.
    """
    single = choices["how"][choices["steps"] == "single"].unique()
    affinities = [how for how in single if how not in NO_AFFINITY and not how.endswith(HEAD)]
    scores: dict[tuple[str, str], dict[tuple[str, int, Any], float]] = {}
    for row in choices.itertuples():
        of = scores.setdefault((row.steps, row.how), {})
        of |= {(row.target, row.seed, subject): dice for subject, dice in row.patients.items()}
    asked = set(zip(choices["target"], choices["seed"], strict=True))
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for (first, second), affinity in product(PAIRS, affinities):
        a, b = ((steps, how.format(affinity)) for steps, how in (first, second))
        both = [key for key in scores.get(a, {}) if key in scores.get(b, {})]
        if (a, b) in rows or not both:
            continue
        found = paired_comparison(_per_patient(scores[a], both), _per_patient(scores[b], both), n_resamples=999)
        compared = {key[:2] for key in both}
        lacking = {key[2] for key in scores[a].keys() ^ scores[b].keys() if key[:2] in compared}
        left_out = [_pairs_text(asked - compared, asked), f"of a pair: {len(lacking)} patients" if lacking else ""]
        rows[a, b] = {
            "first": ", ".join(a),
            "second": ", ".join(b),
            "difference": f"{found.difference:+.3f}",
            "interval": "" if np.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}",
            "p": f"{found.p_wilcoxon:.3g}",
            "patients": found.patients,
            "pairs": len(compared),
            "left out": "; ".join(filter(None, left_out)),
        }
    return pd.DataFrame(list(rows.values()))


def _per_patient(
    scores: Mapping[tuple[str, int, Any], float], keys: Sequence[tuple[str, int, Any]]
) -> dict[Any, float]:
    """Mean of each patient over the targets and seeds of ``keys``."""
    values: dict[Any, list[float]] = {}
    for target, seed, subject in keys:
        values.setdefault(subject, []).append(scores[target, seed, subject])
    return {patient: float(np.mean(of)) for patient, of in values.items()}


def _pairs_text(pairs: Set[tuple[str, int]], asked: Set[tuple[str, int]]) -> str:
    """Target-seed pairs in words: a target's name alone where it is all its seeds."""
    texts = []
    for target in sorted({target for target, _ in pairs}):
        seeds = [seed for of, seed in sorted(pairs) if of == target]
        every = len(seeds) == sum(of == target for of, _ in asked)
        texts.append(target if every else f"{target} (seed {', '.join(map(str, seeds))})")
    return "; ".join(texts)


def _means_table(choices: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of every way to choose per target and over them, and how many target-seed pairs that stands for."""
    means = choices.pivot_table(index=["steps", "how"], columns="target", values="dice", sort=False)
    means["mean"] = means.mean(axis=1)
    by_seed = choices.pivot_table(index=["steps", "how", "target"], columns="seed", values="dice", sort=False)
    by_seed = by_seed.reindex(columns=choices["seed"].unique()).dropna()  # targets that have every seed
    means["sd over seeds"] = by_seed.groupby(["steps", "how"]).mean().std(axis=1)
    means["pairs"] = choices.groupby(["steps", "how"]).size()
    return means.reset_index()


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """What a second step gains, by whether it brings the target's modality to a network that has not seen it.

    Args:
        table: columns ``target, seed, arm, steps, dice, patients`` of `study_paths`.

    Returns:
        One row per kind of path and target, and one over all targets: paths, mean gain over paths against the path's
        first source and against the better of its two, and the interval of the former over patients.
    """
    alone = table[table["steps"] == 1].set_index(["target", "seed", "arm"])
    one, of_patients = alone["dice"], alone["patients"]
    rows = []
    for path in table[table["steps"] == 2].itertuples():
        first, second = path.arm.split(" > ")
        singles = [one[path.target, path.seed, source] for source in (first, second)]
        start = of_patients[path.target, path.seed, first]
        modality = Task(path.target).modality
        brings = Task(first).modality != modality == Task(second).modality
        row = {"second step": "brings the target's modality" if brings else "any other", "target": path.target}
        row |= {"against the first": path.dice - singles[0], "against the better": path.dice - max(singles)}
        rows.append(row | {"gains": {patient: dice - start[patient] for patient, dice in path.patients.items()}})
    columns = ["against the first", "against the better"]
    found = pd.DataFrame(rows, columns=["second step", "target", *columns, "gains"])
    found = pd.concat([found, found.assign(target="all")])
    grouped = found.groupby(["second step", "target"], sort=False)
    intervals = grouped["gains"].agg(_gain_interval).rename("interval")
    found = grouped.size().rename("paths").to_frame().join(grouped[columns].mean()).join(intervals)
    return found[["paths", columns[0], "interval", columns[1]]].reset_index()


def _gain_interval(gains_of_paths: pd.Series) -> str:
    """Of the mean over patients, each averaged over the paths that have him or her."""
    gain = pd.DataFrame(list(gains_of_paths)).mean().to_dict()
    found = paired_comparison(gain, dict.fromkeys(gain, 0.0), n_resamples=999)
    return "" if np.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}"
