"""Which path of sources leads to a target? Task graph, clusters, best path, and the single sources beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import networkx as nx
import pandas as pd

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError, require_whole
from medtl_ext.data import Task
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
from medtl_ext.sequential_transfer.affinities import (
    Affinity,
    TaskVolumes,
    affinity_costs,
    affinity_name,
    find_affinity,
)
from medtl_ext.sequential_transfer.plots import plot_task_graph
from medtl_ext.transfer.jobs import Run
from medtl_ext.transfer.study import require_lists
from medtl_ext.transfer.tasks import SegmentationTask, draw_patients, patients_of
from medtl_ext.visualize import save_figure


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


def require_patients(tasks: Iterable[SegmentationTask], count: int | None, *, option: str = "source_patients") -> None:
    """Refuse tasks that cannot give the labelled patients that every arm is to spend: arms would not be comparable.

    Args:
        tasks: to look at.
        count: training patients that each must have; None asks for none.
        option: what asks for them.
    """
    if count is None:
        return
    require_whole(option, count, 1)
    for task in tasks:
        found = len(patients_of(task.collection.datalist(task.name, "train")))
        if found < count:
            or_all = "" if option == "stage_patients" else ", or null to use all there are"
            raise InputError(
                f"task {task.name} has {found} training patients, fewer than {option}, {count}: arms would not spend "
                f"as many. Give --{option} {found} or less{or_all}."
            )


class SourceGraph:
    """A step that joins the source tasks, clusters them and chooses a representative of each cluster.

    Writes ``task_graph.json``, ``task_graph.graphml``, ``clusters.csv``, and ``task_graph.png`` with clusters in
    colours and sizes of tasks.

    Args:
        run: where it writes.
        sources: names of tasks.
        collection, phantom_subjects: where they are described, see `medtl_ext.transfer.SegmentationTask`.
        affinity: see `find_affinity`.
        affinity_patients: training patients of each task that the affinity looks at; None: all.
        n_clusters, cluster_weight: see `medtl_ext.graph.girvan_newman_clusters`; of fewer tasks each is a cluster.
        representative_rule: see `medtl_ext.graph.cluster_representatives`.
        task_graph: a ``task_graph.json`` made before, for other targets: no cost between sources is computed then.
    """

    def __init__(
        self,
        *,
        run: Run,
        sources: Sequence[str],
        collection: str | None,
        phantom_subjects: int,
        affinity: str | Affinity,
        affinity_patients: int | None,
        n_clusters: int,
        cluster_weight: str | None,
        representative_rule: str,
        task_graph: str | None = None,
    ) -> None:
        self.here, self.sources, self.file = run, sources, task_graph
        self.collection, self.phantom_subjects = collection, phantom_subjects
        self.affinity, self.name, self.patients = find_affinity(affinity), affinity_name(affinity), affinity_patients
        self.n_clusters, self.weight, self.rule = n_clusters, cluster_weight, representative_rule

    def open(self, source: str) -> SegmentationTask:
        """A source task by its name."""
        return SegmentationTask(source, collection=self.collection, phantom_subjects=self.phantom_subjects)

    def volumes(self, sources: Iterable[str]) -> list[TaskVolumes]:
        """What the affinity looks at."""
        return [task_volumes(self.open(source), patients=self.patients) for source in sources]

    @cached_property
    def graph(self) -> nx.Graph:
        """See `medtl_ext.graph.task_graph`."""
        require_lists(sources=self.sources)
        require_whole("n_clusters", self.n_clusters, 1)
        if self.file is not None:
            return self._read()
        tasks = self.volumes(self.sources)

        def joined_only(a: TaskVolumes, b: TaskVolumes) -> float:
            return self.affinity(a, b) if shares(a.name, b.name) else 0.0

        costs = affinity_costs(joined_only, tasks, progress=self.here.progress)
        joined = task_graph(list(self.sources), costs, sizes={task.name: task.size for task in tasks})
        joined.graph["affinity"] = self.name
        return joined

    def _read(self) -> nx.Graph:
        joined = read_task_graph(self.file)
        if other := sorted(set(joined) ^ set(self.sources)):
            raise InputError(
                f"task graph {self.file} and sources differ in {other[0]}; give the graph's own tasks as sources."
            )
        if joined.graph.get("affinity", self.name) != self.name:
            raise InputError(
                f"task graph {self.file} was made with the affinity {joined.graph['affinity']}, whose costs are on "
                f"another scale than those of {self.name}; give the affinity it was made with, or make the graph anew."
            )
        return joined

    @cached_property
    def clusters(self) -> list[list[str]]:
        most = len(self.graph)
        if self.n_clusters > most:
            tasks = f"{most} source task{'s' if most > 1 else ''}"
            warnings.warn(f"n_clusters is {self.n_clusters}, of {tasks}: each is a cluster of its own.", stacklevel=2)
        clusters = girvan_newman_clusters(self.graph, min(self.n_clusters, most), weight=self.weight)
        return [sorted(cluster) for cluster in clusters]

    @cached_property
    def representatives(self) -> list[str]:
        return cluster_representatives(self.graph, self.clusters, rule=self.rule)

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

    def run(self) -> None:
        """Write it down, and say it."""
        if self.here.leads:
            self.write()
            print(self.text)

    def write(self, plan: Plan | None = None) -> None:
        """Write the files, with the path of a plan in bold in the picture."""
        folder = self.here.folder
        for name in ("task_graph.json", "task_graph.graphml"):
            write_task_graph(self.graph, folder / name, clusters=self.clusters)
        sizes = self.graph.nodes(data="size")
        rows = [
            {"cluster": number, "task": task, "size": sizes[task], "representative": task == first}
            for number, (cluster, first) in enumerate(zip(self.clusters, self.representatives, strict=True))
            for task in cluster
        ]
        write_csv(folder / "clusters.csv", pd.DataFrame(rows))
        if self.here.figures:
            figure = plot_task_graph(
                self.graph,
                self.clusters,
                representatives=self.representatives,
                path=plan.path if plan else None,
                target=plan.target if plan else None,
                target_costs=plan.costs if plan else None,
                title="Task graph" + (f" and the path to {plan.target}" if plan and plan.path else ""),
                synthetic=self.synthetic,
            )
            save_figure(figure, folder / "task_graph.png")


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

    @property
    def text(self) -> str:
        """Path, expected cost, and the nearest single source in words."""
        if self.path is None:
            text = f"For {self.target} {self.no_path}"
        else:
            said = [f"{' -> '.join((*path.tasks, self.target))}, {{}}{path.cost:.3f}." for path in self.paths[:2]]
            text = f"Best path: {said[0].format('cost ')}" + "".join(f" Next: {next_.format('')}" for next_ in said[1:])
        return (
            f"{text} Nearest single source: {self.single}, cost {self.costs[self.single]:.3f}. Costs rank paths among "
            "themselves and single sources among themselves; whether a second step pays is settled by training."
        )


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

    def __init__(
        self,
        *,
        graph: SourceGraph,
        target: SegmentationTask,
        max_intermediates: int,
        source_patients: int | None,
        stage_patients: int,
    ) -> None:
        self.here, self.graph, self.target, self.max_intermediates = graph.here, graph, target, max_intermediates
        self.source_patients, self.stage_patients = source_patients, stage_patients

    def check(self) -> None:
        """Refuse what cannot work before anything long runs.

        Raises:
            InputError: no labelled training patient of the target, the target among the sources, numbers of patients
                that leave none to pre-train on, or a task with fewer patients than it is to give.
        """
        sources, target, spent, each = self.graph.sources, self.target, self.source_patients, self.stage_patients
        require_lists(sources=sources)
        if target.name in sources:
            raise InputError(f"the target {target.name} is one of the sources; leave it out of sources.")
        require_whole("max_intermediates", self.max_intermediates, 0)
        require_whole("stage_patients", each, 1)
        if spent is not None and spent <= each * self.max_intermediates:
            raise InputError(
                f"source_patients is {spent}, of which {self.max_intermediates} intermediate tasks of {each} patients "
                "leave none to pre-train on; raise source_patients, or give null to use all."
            )
        require_patients([target], target.train_patients, option="train_patients")
        opened = [self.graph.open(source) for source in sources]
        require_patients(opened, spent)
        if self.max_intermediates:
            require_patients(opened, each, option="stage_patients")

    @cached_property
    def plan(self) -> Plan:
        """The costs and paths.

        Raises:
            InputError: the target shares neither modality nor objective with any source.
        """
        graph, target = self.graph, self.target.name
        near = joined_to(target, graph.graph)
        goal = [task_volumes(self.target)]
        costs = affinity_costs(graph.affinity, graph.volumes(near), goal, progress=self.here.progress)[:, 0]
        to_target = dict(zip(near, costs.tolist(), strict=True))
        plan = Plan(target, to_target, [], single=min(to_target, key=lambda task: (to_target[task], task)))
        many = self.max_intermediates
        try:
            paths = optimal_transfer_path(
                graph.graph, to_target, graph.clusters, graph.representatives, max_intermediates=many
            )
        except NoPathError as reason:
            return replace(plan, no_path=str(reason))
        return replace(plan, paths=paths)

    @property
    def text(self) -> str:
        """Graph and plan in words."""
        return f"{self.graph.text} {self.plan.text}"

    def run(self) -> None:
        """Find them, write them down, and say it."""
        if not self.here.leads:
            return
        plan, folder = self.plan, self.here.folder
        self.graph.write(plan)
        content = asdict(plan) | {"paths": [{"cost": path.cost, "tasks": list(path.tasks)} for path in plan.paths]}
        write_json(folder / "plan.json", content | {"text": self.text, "synthetic": self.target.synthetic})
        steps = [{"kind": "path", "tasks": " -> ".join(path.tasks), "cost": path.cost} for path in plan.paths]
        singles = sorted(plan.costs.items(), key=lambda item: item[::-1])
        steps += [{"kind": "single", "tasks": task, "cost": cost} for task, cost in singles]
        write_csv(folder / "paths.csv", pd.DataFrame(steps))
        print(self.text)
