"""Which path of sources leads to a target? Task graph, clusters, best path, and the single sources beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product

import networkx as nx
import pandas as pd

from medtl_ext import graph as graphs
from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError, require_number
from medtl_ext.data import Task
from medtl_ext.sequential_transfer.affinities import Affinity, TaskVolumes, affinity_costs, affinity_name, find_affinity
from medtl_ext.transfer import Run, SegmentationTask
from medtl_ext.transfer.study import require_lists
from medtl_ext.transfer.tasks import draw_patients, patients_of
from medtl_ext.visualize import plot_task_graph, save_figure


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


def task_volumes(task: SegmentationTask, *, patients: int | None = None) -> TaskVolumes:
    """A task's training patients, at most ``patients`` of them, for its affinity to others."""
    items = task.datalist("train")
    files = tuple((item["image"], item["label"]) for item in draw_patients(items, patients, seed=0))
    return TaskVolumes(task.name, files, tuple(map(tuple, task.label_values)), len(patients_of(items)))


def first_share(source_patients: int | None, stage_patients: int, n_later: int) -> int | None:
    """Labelled patients of a path's first task: what the later ones leave, so that all arms spend as many.

    Raises:
        InputError: they leave none.
    """
    if source_patients is None:
        return None
    left = source_patients - n_later * stage_patients
    if left < 1:
        raise InputError(
            f"source_patients is {source_patients}, of which {n_later} intermediate tasks of {stage_patients} patients "
            "leave none to pre-train on; raise source_patients, or give null to use all."
        )
    return left


@dataclass(kw_only=True, eq=False)
class SourceGraph:
    """The source tasks, joined where they share modality or objective, in clusters with a representative each.

    Args:
        here: where it writes.
        sources: names of tasks.
        collection, phantom_subjects: where they are described, see `medtl_ext.transfer.SegmentationTask`.
        affinity: see `find_affinity`.
        affinity_patients: training patients of each task that the affinity looks at; None: all.
        n_clusters, cluster_weight: see `medtl_ext.graph.girvan_newman_clusters`; of fewer tasks each is a cluster.
        representative_rule: see `medtl_ext.graph.cluster_representatives`.
        task_graph: a ``task_graph.json`` made before, for other targets: no cost between sources is computed then.
    """

    here: Run
    sources: Sequence[str]
    collection: str | None
    phantom_subjects: int
    affinity: str | Affinity
    affinity_patients: int | None
    n_clusters: int
    cluster_weight: str | None
    representative_rule: str
    task_graph: str | None = None

    def open(self, source: str, *, train_patients: int | None = None) -> SegmentationTask:
        """A source task by its name."""
        where = {"collection": self.collection, "phantom_subjects": self.phantom_subjects}
        return SegmentationTask(source, train_patients=train_patients, **where)

    def volumes(self, sources: Iterable[str]) -> list[TaskVolumes]:
        """What the affinity looks at."""
        return [task_volumes(self.open(source), patients=self.affinity_patients) for source in sources]

    @cached_property
    def cost(self) -> Affinity:
        """Found once, as it keeps what it has read."""
        return find_affinity(self.affinity)

    @cached_property
    def graph(self) -> nx.Graph:
        """See `medtl_ext.graph.task_graph`."""
        require_lists(sources=self.sources)
        require_number("n_clusters", self.n_clusters, 1, whole=True)
        name = affinity_name(self.affinity)
        if self.task_graph is None:
            tasks = self.volumes(self.sources)
            costs = affinity_costs(self._joined_only, tasks, progress=self.here.progress)
            joined = graphs.task_graph(self.sources, costs, sizes={task.name: task.size for task in tasks})
            joined.graph["affinity"] = name
            return joined
        joined = graphs.read_task_graph(self.task_graph)
        if other := sorted(set(joined) ^ set(self.sources)):
            raise InputError(
                f"task graph {self.task_graph} and sources differ in {other[0]}; give the graph's own tasks as sources."
            )
        if joined.graph.get("affinity", name) != name:
            raise InputError(
                f"task graph {self.task_graph} was made with the affinity {joined.graph['affinity']}, whose costs are "
                f"on another scale than those of {name}; give the affinity it was made with, or make the graph anew."
            )
        return joined

    def _joined_only(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """Spare the pairs that no edge will join."""
        return self.cost(a, b) if shares(a.name, b.name) else 0.0

    @cached_property
    def clusters(self) -> list[list[str]]:
        asked, count = self.n_clusters, min(self.n_clusters, len(self.graph))
        if asked > count:
            warnings.warn(f"n_clusters is {asked}, of {count} source tasks: each is its own cluster.", stacklevel=2)
        return list(map(sorted, graphs.girvan_newman_clusters(self.graph, count, weight=self.cluster_weight)))

    @cached_property
    def representatives(self) -> list[str]:
        return graphs.cluster_representatives(self.graph, self.clusters, rule=self.representative_rule)

    @property
    def synthetic(self) -> bool:
        return self.open(self.sources[0]).synthetic

    @property
    def text(self) -> str:
        """The graph in words."""
        clusters = [
            f"{first} and {len(cluster) - 1} more" if len(cluster) > 1 else first
            for cluster, first in zip(self.clusters, self.representatives, strict=True)
        ]
        return (
            f"{len(self.graph)} source tasks, {self.graph.number_of_edges()} pairs joined, in {len(clusters)} "
            f"clusters: {'; '.join(clusters)}."
        )

    def write(self, plan: Plan | None = None) -> None:
        """Write ``task_graph.json``, ``task_graph.graphml``, ``clusters.csv`` and ``task_graph.png``, and say it.

        The picture shows clusters in colours, sizes of tasks, and the path of a plan in bold.
        """
        if not self.here.leads:
            return
        folder, sizes = self.here.folder, self.graph.nodes(data="size")
        for name in ("task_graph.json", "task_graph.graphml"):
            graphs.write_task_graph(self.graph, folder / name, clusters=self.clusters)
        rows = [
            {"cluster": number, "task": task, "size": sizes[task], "representative": task == first}
            for number, (cluster, first) in enumerate(zip(self.clusters, self.representatives, strict=True))
            for task in cluster
        ]
        write_csv(folder / "clusters.csv", pd.DataFrame(rows))
        if self.here.figures:
            shown = {"representatives": self.representatives, "synthetic": self.synthetic, "title": "Task graph"}
            if plan:
                shown |= {"path": plan.path, "target": plan.target, "target_costs": plan.costs}
                shown["title"] += f" and the path to {plan.target}" if plan.path else ""
            figure = plot_task_graph(self.graph, self.clusters, **shown)
            save_figure(figure, folder / "task_graph.png")
        print(self.text)


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
    paths: list[graphs.TransferPath]
    single: str
    no_path: str | None = None

    @property
    def path(self) -> tuple[str, ...] | None:
        """The tasks of the best path, without the target."""
        return self.paths[0].tasks if self.paths else None

    @property
    def text(self) -> str:
        """Paths, expected costs, and the nearest single source in words."""
        best = zip(("Best path", "Next"), self.paths, strict=False)
        said = [f"{what}: {' -> '.join((*path.tasks, self.target))}, cost {path.cost:.3f}." for what, path in best]
        return (
            f"{' '.join(said) or f'For {self.target} {self.no_path}'} Nearest single source: {self.single}, cost "
            f"{self.costs[self.single]:.3f}. Costs rank paths among themselves and single sources among themselves; "
            "whether a second step pays is settled by training."
        )


@dataclass(kw_only=True, eq=False)
class PlanPath:
    """A step that finds the cheapest paths to the target, and beside them the nearest single source.

    Writes ``plan.json`` and ``paths.csv``, and the files of `SourceGraph`, with the path in the picture.

    Args:
        graph: of the sources.
        target: of its training patients only those that will be trained on are looked at.
        max_intermediates: see `medtl_ext.graph.optimal_transfer_path`.
        source_patients, stage_patients: labelled patients that every arm is to spend on its sources in all, and on an
            intermediate task.
    """

    graph: SourceGraph
    target: SegmentationTask
    max_intermediates: int
    source_patients: int | None
    stage_patients: int

    def check(self) -> None:
        """Refuse what cannot work before anything long runs.

        Raises:
            InputError: no labelled training patient of the target, the target among the sources, numbers of patients
                that leave none to pre-train on, or a task with fewer patients than it is to give.
        """
        sources, target = self.graph.sources, self.target
        require_lists(sources=sources)
        if target.name in sources:
            raise InputError(f"the target {target.name} is one of the sources; leave it out of sources.")
        require_number("max_intermediates", self.max_intermediates, 0, whole=True)
        require_number("stage_patients", self.stage_patients, 1, whole=True)
        first_share(self.source_patients, self.stage_patients, self.max_intermediates)
        target.datalist("train")
        spent = [self.source_patients, self.stage_patients] if self.max_intermediates else [self.source_patients]
        for source, patients in product(sources, spent):
            self.graph.open(source, train_patients=patients).datalist("train")

    @cached_property
    def plan(self) -> Plan:
        """The costs and paths.

        Raises:
            InputError: the target shares neither modality nor objective with any source.
        """
        sources = self.graph
        near = joined_to(self.target.name, sources.graph)
        goal, progress = [task_volumes(self.target)], sources.here.progress
        costs = affinity_costs(sources.cost, sources.volumes(near), goal, progress=progress)[:, 0]
        to_target = dict(zip(near, costs.tolist(), strict=True))
        plan = Plan(self.target.name, to_target, [], single=min(to_target, key=lambda task: (to_target[task], task)))
        parts = (sources.graph, to_target, sources.clusters, sources.representatives)
        try:
            return replace(plan, paths=graphs.optimal_transfer_path(*parts, max_intermediates=self.max_intermediates))
        except graphs.NoPathError as reason:
            return replace(plan, no_path=str(reason))

    @property
    def text(self) -> str:
        """Graph and plan in words."""
        return f"{self.graph.text} {self.plan.text}"

    def run(self) -> None:
        """Find them, write them down, and say it."""
        if not self.graph.here.leads:
            return
        plan, folder = self.plan, self.graph.here.folder
        self.graph.write(plan)
        paths = [{"cost": path.cost, "tasks": list(path.tasks)} for path in plan.paths]
        content = asdict(plan) | {"paths": paths, "text": self.text, "synthetic": self.target.synthetic}
        write_json(folder / "plan.json", content)
        steps = [("path", " -> ".join(path.tasks), path.cost) for path in plan.paths]
        steps += sorted((("single", *item) for item in plan.costs.items()), key=lambda step: (step[2], step[1]))
        write_csv(folder / "paths.csv", pd.DataFrame(steps, columns=["kind", "tasks", "cost"]))
        print(plan.text)
