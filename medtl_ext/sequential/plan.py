"""Which path of sources leads to a target? Task graph, clusters, best path, and the single sources beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import networkx as nx
import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.data import Collection, Task
from medtl_ext.graph import (
    NoPathError,
    TransferPath,
    cluster_representatives,
    girvan_newman_clusters,
    optimal_transfer_path,
    read_task_graph,
    task_graph,
    write_task_graph,
)
from medtl_ext.sequential.affinities import Affinity, TaskVolumes, affinity_costs, affinity_name, find_affinity
from medtl_ext.sequential.plots import plot_task_graph
from medtl_ext.studies import open_collection
from medtl_ext.visualize import save_figure


@dataclass(frozen=True)
class SourceGraph:
    """The source tasks, joined where they share modality or objective, in clusters with a representative each."""

    graph: nx.Graph
    clusters: list[list[str]]
    representatives: list[str]


@dataclass(frozen=True)
class Plan:
    """What the affinity says of a target, before anything is trained.

    Attributes:
        target: the target task.
        costs: source task -> affinity cost to the target, for those that share its modality or objective.
        paths: the best paths, best first; none where ``no_path`` says why.
        single: the one source with the least cost.
        no_path: why there is no path.
    """

    target: str
    costs: dict[str, float]
    paths: list[TransferPath]
    single: str
    no_path: str | None = None

    @property
    def path(self) -> tuple[str, ...] | None:
        """The tasks of the best path, without the target."""
        return self.paths[0].tasks if self.paths else None


def check_options(
    *,
    target: Collection,
    target_task: str,
    sources: Sequence[str],
    affinity: str | Affinity,
    source_patients: int | None,
    stage_patients: int,
    train_patients: int | None,
    max_intermediates: int,
    collection: str | None,
    subjects: int,
) -> None:
    """Refuse what cannot work before anything long runs.

    Raises:
        InputError: no labelled training patient of the target, the target among the sources, an unknown affinity,
            numbers of patients that leave none to pre-train on, or a task with fewer patients than it is to give.
    """
    target.datalist(target_task, "train")
    if not sources or isinstance(sources, str):
        raise InputError(f"sources is {sources!r}; give a list of source tasks, such as ['13-FLAIR-ED', '13-T2-ED'].")
    if target_task in sources:
        raise InputError(f"the target {target_task} is one of the sources; leave it out of sources.")
    find_affinity(affinity)
    if isinstance(max_intermediates, bool) or not isinstance(max_intermediates, int) or max_intermediates < 0:
        raise InputError(f"max_intermediates is {max_intermediates!r}; expected a whole number, 0 or more.")
    require_stage_patients(stage_patients)
    if source_patients is not None and source_patients <= stage_patients * max_intermediates:
        raise InputError(
            f"source_patients is {source_patients}, of which {max_intermediates} intermediate tasks of "
            f"{stage_patients} patients leave none to pre-train on; raise source_patients, or give null to use all."
        )

    require_patients({target_task: target}, train_patients, option="train_patients")
    opened = {task: open_collection(collection, task, subjects=subjects) for task in sources}
    require_patients(opened, source_patients)
    if max_intermediates:
        require_patients(opened, stage_patients, option="stage_patients")


def require_stage_patients(count: int | None) -> None:
    """Refuse anything but a number of patients for each step."""
    if count is None or count < 1:
        raise InputError(f"stage_patients is {count}; expected at least one patient for each step.")


def require_patients(tasks: Mapping[str, Collection], count: int | None, *, option: str = "source_patients") -> None:
    """Refuse tasks that cannot give the labelled patients that every arm is to spend: arms would not be comparable.

    Args:
        tasks: names of tasks and their collections.
        count: training patients that each must have; None asks for none.
        option: what asks for them.
    """
    if count is not None and count < 1:
        raise InputError(f"{option} is {count}; expected at least one patient, or null for all there are.")
    for task, collection in tasks.items():
        found = len(set(map(_patient, collection.datalist(task, "train"))))
        if count is not None and found < count:
            or_all = "" if option == "stage_patients" else ", or null to use all there are"
            raise InputError(
                f"task {task} has {found} training patients, fewer than {option}, {count}: arms would not spend as "
                f"many. Give --{option} {found} or less{or_all}."
            )


def task_volumes(collection: Collection, task: str, *, patients: int | None, seed: int = 0) -> TaskVolumes:
    """A task's training patients, at most ``patients`` of them, for its affinity to others."""
    items = collection.datalist(task, "train")
    drawn = draw_patients(items, patients, seed=seed)
    return TaskVolumes(
        task,
        tuple((item["image"], item["label"]) for item in drawn),
        tuple(tuple(group) for group in collection.label_values(task)),
        len({_patient(item) for item in items}),
    )


def draw_patients(items: Sequence[dict[str, str]], count: int | None, *, seed: int) -> list[Any]:
    """``count`` of the patients (None: all), drawn at random; a larger draw with the same seed holds the smaller one.

    Args:
        items: a datalist; all scans of a patient come along.
        count: how many; of fewer there are all.
        seed: of the draw.
    """
    if count is not None and count < 1:
        raise InputError(f"{count} patients were asked for; expected at least one, or null for all.")
    patients = list(dict.fromkeys(map(_patient, items)))
    order = np.random.default_rng(seed).permutation(len(patients))
    drawn = {patients[place] for place in order[:count]}
    return [item for item in items if _patient(item) in drawn]


def _patient(item: Mapping[str, str]) -> str:
    return item.get("patient") or item["subject"]


def source_graph(
    sources: Sequence[str],
    *,
    collection: str | None,
    subjects: int,
    affinity: str | Affinity,
    patients: int | None,
    n_clusters: int,
    cluster_weight: str | None,
    representative_rule: str,
    graph: str | None = None,
    progress: bool = True,
) -> SourceGraph:
    """Join the source tasks, cluster them and choose a representative of each cluster.

    Args:
        sources: names of tasks.
        collection: where they are described; None: the phantom of ``subjects`` a site.
        affinity: see `find_affinity`.
        patients: training patients of each task that the affinity looks at; None: all.
        n_clusters, cluster_weight: see `medtl_ext.graph.girvan_newman_clusters`; of fewer tasks each is a cluster.
        representative_rule: see `medtl_ext.graph.cluster_representatives`.
        graph: a ``task_graph.json`` made before, for other targets: no cost between sources is computed then.
        progress: show a progress bar on a terminal.
    """
    if isinstance(n_clusters, bool) or not isinstance(n_clusters, Integral) or n_clusters < 1:
        raise InputError(f"n_clusters is {n_clusters!r}; expected a whole number, 1 or more.")
    name = affinity_name(affinity)
    if graph is None:
        tasks = [
            task_volumes(open_collection(collection, task, subjects=subjects), task, patients=patients)
            for task in sources
        ]
        costs = affinity_costs(_joined_only(find_affinity(affinity)), tasks, progress=progress)
        joined = task_graph(list(sources), costs, sizes={task.name: task.size for task in tasks})
        joined.graph["affinity"] = name
    else:
        joined = read_task_graph(graph)
        if set(joined) != set(sources):
            other = sorted(set(joined) ^ set(sources))[0]
            raise InputError(
                f"task graph {graph} and sources differ in {other}; give the graph's own tasks as sources."
            )
        if joined.graph.get("affinity", name) != name:
            raise InputError(
                f"task graph {graph} was made with the affinity {joined.graph['affinity']}, whose costs are on another "
                f"scale than those of {name}; give the affinity it was made with, or make the graph anew."
            )
    if n_clusters > len(joined):
        tasks_there = f"{len(joined)} source task{'s' if len(joined) > 1 else ''}"
        warnings.warn(f"n_clusters is {n_clusters}, of {tasks_there}: each is a cluster of its own.", stacklevel=2)
        n_clusters = len(joined)
    clusters = girvan_newman_clusters(joined, n_clusters, weight=cluster_weight)
    representatives = cluster_representatives(joined, clusters, rule=representative_rule)
    return SourceGraph(joined, [sorted(cluster) for cluster in clusters], representatives)


def _joined_only(affinity: Affinity) -> Affinity:
    """Spare the pairs that no edge will join."""
    return lambda a, b: affinity(a, b) if shares(a.name, b.name) else 0.0


def shares(a: str, b: str) -> bool:
    """Whether two tasks have the modality or the objective in common."""
    return Task(a).modality == Task(b).modality or Task(a).objective == Task(b).objective


def joined_to(target: str, sources: Iterable[str]) -> list[str]:
    """The sources, other than the target itself, that an edge joins to it.

    Raises:
        InputError: there is none.
    """
    near = [source for source in sources if shares(source, target) and source != target]
    if not near:
        raise InputError(f"no source shares modality or objective with the target {target}; add such tasks to sources.")
    return near


def plan_path(
    sources: SourceGraph,
    *,
    target: Collection,
    target_task: str,
    collection: str | None,
    subjects: int,
    affinity: str | Affinity,
    patients: int | None,
    target_patients: int | None,
    max_intermediates: int,
    seed: int,
    progress: bool = True,
) -> Plan:
    """Cost of every source to the target, the best paths, and the nearest single source.

    Args:
        sources: of `source_graph`.
        target, target_task: the target's collection and task; of its training patients only the ``target_patients``
            that will be trained on (drawn with ``seed``) are looked at.
        collection, subjects, affinity, patients: as in `source_graph`.
        max_intermediates: see `medtl_ext.graph.optimal_transfer_path`.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: the target shares neither modality nor objective with any source.
    """
    near = joined_to(target_task, sources.graph)
    tasks = [
        task_volumes(open_collection(collection, task, subjects=subjects), task, patients=patients) for task in near
    ]
    goal = task_volumes(target, target_task, patients=target_patients, seed=seed)
    costs = affinity_costs(find_affinity(affinity), tasks, [goal], progress=progress)[:, 0]
    target_costs = dict(zip(near, costs.tolist(), strict=True))
    single = min(target_costs, key=lambda task: (target_costs[task], task))
    plan = Plan(target_task, target_costs, [], single)
    try:
        paths = optimal_transfer_path(
            sources.graph,
            target_costs,
            sources.clusters,
            sources.representatives,
            max_intermediates=max_intermediates,
        )
    except NoPathError as reason:
        return replace(plan, no_path=str(reason))
    return replace(plan, paths=paths)


def graph_text(sources: SourceGraph) -> str:
    """The source graph in words."""
    clusters = [
        f"{first} and {len(cluster) - 1} more" if len(cluster) > 1 else first
        for cluster, first in zip(sources.clusters, sources.representatives, strict=True)
    ]
    return (
        f"{len(sources.graph)} source tasks, {sources.graph.number_of_edges()} pairs joined, in {len(clusters)} "
        f"clusters: {'; '.join(clusters)}."
    )


def plan_text(sources: SourceGraph, plan: Plan) -> str:
    """The plan in words: path, expected cost, and the nearest single source."""
    text = graph_text(sources)
    if plan.path is None:
        text += f" For {plan.target} {plan.no_path}"
    else:
        text += f" Best path: {' -> '.join((*plan.path, plan.target))}, cost {plan.paths[0].cost:.3f}."
        if len(plan.paths) > 1:
            next_best = plan.paths[1]
            text += f" Next: {' -> '.join((*next_best.tasks, plan.target))}, {next_best.cost:.3f}."
    return text + (
        f" Nearest single source: {plan.single}, cost {plan.costs[plan.single]:.3f}. Costs rank paths among themselves "
        "and single sources among themselves; whether a second step pays is settled by training."
    )


def write_plan(
    sources: SourceGraph, plan: Plan | None, *, output_dir: str | Path, figures: bool, synthetic: bool
) -> None:
    """Write ``task_graph.json``, ``task_graph.graphml``, ``clusters.csv`` and, of a plan, ``plan.json``, ``paths.csv``.

    ``task_graph.png`` shows clusters in colours, sizes of tasks, and the path in bold.
    """
    if idist.get_rank() != 0:
        return
    folder = Path(output_dir)
    for name in ("task_graph.json", "task_graph.graphml"):
        write_task_graph(sources.graph, folder / name, clusters=sources.clusters)
    rows = [
        {"cluster": number, "task": task, "size": sources.graph.nodes[task]["size"], "representative": task == first}
        for number, (cluster, first) in enumerate(zip(sources.clusters, sources.representatives, strict=True))
        for task in cluster
    ]
    write_csv(folder / "clusters.csv", pd.DataFrame(rows))
    if plan is not None:
        content = asdict(plan) | {"paths": [{"cost": path.cost, "tasks": list(path.tasks)} for path in plan.paths]}
        write_json(folder / "plan.json", content | {"text": plan_text(sources, plan), "synthetic": synthetic})
        steps = [{"kind": "path", "tasks": " -> ".join(path.tasks), "cost": path.cost} for path in plan.paths]
        steps += [
            {"kind": "single", "tasks": task, "cost": cost}
            for task, cost in sorted(plan.costs.items(), key=lambda item: item[::-1])
        ]
        write_csv(folder / "paths.csv", pd.DataFrame(steps))
    if figures:
        figure = plot_task_graph(
            sources.graph,
            sources.clusters,
            representatives=sources.representatives,
            path=plan.path if plan else None,
            target=plan.target if plan else None,
            target_costs=plan.costs if plan else None,
            title="Task graph" + (f" and the path to {plan.target}" if plan and plan.path else ""),
            synthetic=synthetic,
        )
        save_figure(figure, folder / "task_graph.png")
