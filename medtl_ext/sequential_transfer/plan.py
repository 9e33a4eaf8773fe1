"""Which path of sources leads to a target? Task graph, clusters, best path, and the single sources beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import networkx as nx
import pandas as pd
from monai.utils import ensure_tuple

from medtl_ext import graph as graphs
from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError, require_number, warn
from medtl_ext.data import Task
from medtl_ext.sequential_transfer.affinities import Affinity, TaskVolumes, affinity_costs, affinity_name, find_affinity
from medtl_ext.transfer import Run, SegmentationTask
from medtl_ext.transfer.sources import source_collection
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
    drawn = draw_patients(items, patients, seed=0)
    files = tuple((ensure_tuple(item["image"]), item["label"]) for item in drawn)
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
        here: where it writes. Its config says what of each task the affinity looks at (``affinity_patients``), and how
            clusters are found (``n_clusters``, ``cluster_weight``; of fewer tasks each is one) and represented
            (``representative_rule``): see `medtl_ext.graph`.
        sources: names of tasks.
        affinity: see `find_affinity`.
        task_graph: a ``task_graph.json`` made before, for other targets: no cost between sources is computed then.
    """

    here: Run
    sources: Sequence[str]
    affinity: str | Affinity
    task_graph: str | None = None

    def open(self, source: str, *, train_patients: int | None = None) -> SegmentationTask:
        """A source task by its name."""
        config = self.here.config
        where = {"collection": source_collection(config), "phantom_subjects": config["phantom_subjects"]}
        return SegmentationTask(source, train_patients=train_patients, **where)

    def volumes(self, sources: Iterable[str]) -> list[TaskVolumes]:
        """What the affinity looks at."""
        return [task_volumes(self.open(source), patients=self.here.config["affinity_patients"]) for source in sources]

    @cached_property
    def cost(self) -> Affinity:
        """Found once, as it keeps what it has read."""
        return find_affinity(self.affinity)

    @cached_property
    def graph(self) -> nx.Graph:
        """See `medtl_ext.graph.task_graph`."""
        require_lists(sources=self.sources)
        require_number("n_clusters", self.here.config["n_clusters"], 1, whole=True)
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
        asked, weight = (self.here.config[name] for name in ("n_clusters", "cluster_weight"))
        if asked > len(self.graph):
            warn(f"n_clusters is {asked}, of {len(self.graph)} source tasks: each is its own cluster.")
        count = min(asked, len(self.graph))
        return list(map(sorted, graphs.girvan_newman_clusters(self.graph, count, weight=weight)))

    @cached_property
    def representatives(self) -> list[str]:
        rule = self.here.config["representative_rule"]
        return graphs.cluster_representatives(self.graph, self.clusters, rule=rule)

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

    def write(self, **shown: Any) -> None:
        """Write ``task_graph.json``, ``task_graph.graphml``, ``clusters.csv`` and ``task_graph.png``, and say it.

        The picture shows clusters in colours, sizes of tasks, and what else is given to be ``shown`` in it.
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
            shown = {"title": "Task graph", "synthetic": self.synthetic} | shown
            figure = plot_task_graph(self.graph, self.clusters, representatives=self.representatives, **shown)
            save_figure(figure, folder / "task_graph.png")
        print(self.text)


@dataclass(kw_only=True, eq=False)
class PlanPath:
    """A step that finds the cheapest paths to the target, and beside them the nearest single source.

    Writes ``plan.json`` and ``paths.csv``, and the files of `SourceGraph`, with the path in the picture.

    The config says how many intermediate tasks there may be (``max_intermediates``), and the labelled patients that
    every arm is to spend on its sources in all (``source_patients``) and on an intermediate task (``stage_patients``).

    Args:
        graph: of the sources.
        target: of its training patients only those that will be trained on are looked at.
    """

    graph: SourceGraph
    target: SegmentationTask
    no_path: str | None = field(default=None, init=False)

    def check(self) -> None:
        """Refuse what cannot work before anything long runs.

        Raises:
            InputError: no labelled training patient of the target, the target among the sources, numbers of patients
                that leave none to pre-train on, or a task with fewer patients than it is to give.
        """
        config, sources, target = self.graph.here.config, self.graph.sources, self.target
        in_all, stage, most = (config[name] for name in ("source_patients", "stage_patients", "max_intermediates"))
        require_lists(sources=sources)
        if target.name in sources:
            raise InputError(f"the target {target.name} is one of the sources; leave it out of sources.")
        require_number("max_intermediates", most, 0, whole=True)
        require_number("stage_patients", stage, 1, whole=True)
        first_share(in_all, stage, most)
        target.datalist("train")
        for source, patients in product(sources, [in_all, stage] if most else [in_all]):
            self.graph.open(source, train_patients=patients).datalist("train")

    @cached_property
    def costs(self) -> dict[str, float]:
        """Source -> affinity cost to the target, for those that share its modality or objective.

        Raises:
            InputError: there is none.
        """
        near, goal = joined_to(self.target.name, self.graph.graph), [task_volumes(self.target)]
        progress = self.graph.here.progress
        costs = affinity_costs(self.graph.cost, self.graph.volumes(near), goal, progress=progress)[:, 0]
        return dict(zip(near, costs.tolist(), strict=True))

    @property
    def single(self) -> str:
        """The one source with the least cost."""
        return min(self.costs, key=lambda task: (self.costs[task], task))

    @cached_property
    def paths(self) -> list[graphs.TransferPath]:
        """The best paths, best first; none where ``no_path`` then says why."""
        parts = (self.graph.graph, self.costs, self.graph.clusters, self.graph.representatives)
        most = self.graph.here.config["max_intermediates"]
        try:
            return graphs.optimal_transfer_path(*parts, max_intermediates=most)
        except graphs.NoPathError as reason:
            self.no_path = str(reason)
            return []

    @property
    def path(self) -> tuple[str, ...] | None:
        """The tasks of the best path, without the target."""
        return self.paths[0].tasks if self.paths else None

    @property
    def text(self) -> str:
        """Paths, expected costs, and the nearest single source in words."""
        name = self.target.name
        best = zip(("Best path", "Next"), self.paths, strict=False)
        said = [f"{what}: {' -> '.join((*path.tasks, name))}, cost {path.cost:.3f}." for what, path in best]
        return (
            f"{' '.join(said) or f'For {name} {self.no_path}'} Nearest single source: {self.single}, cost "
            f"{self.costs[self.single]:.3f}. Costs rank paths among themselves and single sources among themselves; "
            "whether a second step pays is settled by training."
        )

    def run(self) -> None:
        """Find them, write them down, and say it."""
        if not self.graph.here.leads:
            return
        folder, target, paths = self.graph.here.folder, self.target, self.paths
        title = f"Task graph and the path to {target.name}" if paths else "Task graph"
        self.graph.write(title=title, path=self.path, target=target.name, target_costs=self.costs)
        content = {
            "target": target.name,
            "costs": self.costs,
            "paths": [{"cost": path.cost, "tasks": list(path.tasks)} for path in paths],
            "single": self.single,
            "no_path": self.no_path,
            "text": f"{self.graph.text} {self.text}",
            "synthetic": target.synthetic,
        }
        write_json(folder / "plan.json", content)
        steps = [("path", " -> ".join(path.tasks), path.cost) for path in paths]
        steps += sorted((("single", *item) for item in self.costs.items()), key=lambda step: (step[2], step[1]))
        write_csv(folder / "paths.csv", pd.DataFrame(steps, columns=["kind", "tasks", "cost"]))
        print(self.text)
