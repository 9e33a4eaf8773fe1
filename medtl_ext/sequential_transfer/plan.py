"""Which path of sources leads to a target? Task graph, clusters, best path, and the single sources beside it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from monai.utils import ensure_tuple

from medtl_ext import graph as graphs
from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError, require_number, warn
from medtl_ext.data import Task
from medtl_ext.sequential_transfer.affinities import (
    Affinity,
    TaskVolumes,
    affinity_costs,
    affinity_name,
    find_affinity,
    redrawn,
)
from medtl_ext.transfer import Run, SegmentationTask
from medtl_ext.transfer.sources.pool import source_collection
from medtl_ext.transfer.study import require_lists
from medtl_ext.transfer.tasks import draw_patients, patients_of
from medtl_ext.visualize import plot_task_graph, save_figure

DRAWS = 100
"""Number of random ways to break ties, and of resamples of patients, in which a plan is made again."""


def shares(a: str, b: str) -> bool:
    """True if two tasks have the same modality or the same objective."""
    return Task(a).modality == Task(b).modality or Task(a).objective == Task(b).objective


def joined_to(target: str, sources: Iterable[str]) -> list[str]:
    """The sources, other than the target itself, that share its modality or objective.

    Raises:
        InputError: there is no such source.
    """
    near = [source for source in sources if shares(source, target) and source != target]
    if not near:
        raise InputError(f"no source shares modality or objective with the target {target}; add such tasks to sources.")
    return near


def task_volumes(task: SegmentationTask, *, patients: int | None = None) -> TaskVolumes:
    """A task's training patients, at most ``patients`` of them, for its affinity to other tasks."""
    items = task.datalist("train")
    drawn = draw_patients(items, patients, seed=0)
    files = tuple((ensure_tuple(item["image"]), item["label"]) for item in drawn)
    return TaskVolumes(task.name, files, tuple(map(tuple, task.label_values)), len(patients_of(items)))


def first_share(source_patients: int | None, stage_patients: int, n_later: int) -> int | None:
    """Number of labelled patients for the first task of a path: those that the later tasks leave.

    So all arms use the same number of source patients.

    Raises:
        InputError: no patient is left.
    """
    if source_patients is None:
        return None
    left = source_patients - n_later * stage_patients
    if left < 1:
        stages = f"but {n_later} intermediate tasks of {stage_patients} patients leave none to pre-train on"
        raise InputError(f"source_patients is {source_patients}, {stages}; raise it, or give null to use all.")
    return left


@dataclass(kw_only=True, eq=False)
class SourceGraph:
    """A graph of the source tasks, with an edge between tasks that share modality or objective, and its clusters.

    Args:
        here: the run. Its config has the number of patients for the affinity (``affinity_patients``), and how clusters
            are found (``n_clusters``, ``cluster_weight``; with fewer tasks, each task is a cluster) and represented
            (``representative_rule``): see `medtl_ext.graph`.
        sources: names of tasks.
        affinity: see `find_affinity`.
        task_graph: an existing ``task_graph.json``; then no cost between sources is computed.
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
        """The patients of each source for the affinity."""
        return [task_volumes(self.open(source), patients=self.here.config["affinity_patients"]) for source in sources]

    @cached_property
    def cost(self) -> Affinity:
        """The affinity; the same object is used throughout, because it keeps what it has read."""
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
            problem = f"task graph {self.task_graph} and --sources differ in {other[0]}"
            raise InputError(f"{problem}; give the graph's own tasks, or make the graph again.")
        if joined.graph.get("affinity", name) != name:
            other = f"the affinity {joined.graph['affinity']}, whose costs have another scale than those of {name}"
            raise InputError(f"task graph {self.task_graph} was made with {other}; give that, or make the graph again.")
        return joined

    def _joined_only(self, a: TaskVolumes, b: TaskVolumes) -> float:
        """The cost, or 0 for a pair that gets no edge."""
        return self.cost(a, b) if shares(a.name, b.name) else 0.0

    @cached_property
    def how(self) -> dict[str, Any]:
        """How the graph is cut into clusters."""
        asked = self.here.config["n_clusters"]
        if asked > len(self.graph):
            warn(f"n_clusters is {asked}, but there are {len(self.graph)} source tasks: each is its own cluster.")
        return {"n_clusters": min(asked, len(self.graph)), "weight": self.here.config["cluster_weight"]}

    @cached_property
    def clusters(self) -> list[list[str]]:
        return list(map(sorted, graphs.girvan_newman_clusters(self.graph, **self.how)))

    @cached_property
    def clusterings(self) -> list[list[set[str]]]:
        """The clusters with ties broken at random; see `medtl_ext.graph.tied_clusterings`."""
        return graphs.tied_clusterings(self.graph, **self.how, draws=DRAWS)

    @cached_property
    def kept(self) -> list[float]:
        """For each cluster, the share of `clusterings` that contain it: below 1 if it depends on a tie."""
        return [float(np.mean([set(one) in found for found in self.clusterings])) for one in self.clusters]

    @cached_property
    def representatives(self) -> list[str]:
        return self.represented(self.graph, self.clusters)

    def represented(self, graph: nx.Graph, clusters: Sequence[Iterable[str]]) -> list[str]:
        return graphs.cluster_representatives(graph, clusters, rule=self.here.config["representative_rule"])

    def draws(self, target: TaskVolumes) -> Iterator[tuple[nx.Graph, dict[str, float]]]:
        """The graph and the costs to a target, for resamples of the patients.

        If the graph was read from a file, its costs between sources do not change.
        """
        tasks = {task.name: task for task in self.volumes(self.graph)}
        edges = [] if self.task_graph else list(self.graph.edges)
        between = {(a, b): self.cost.pairs(tasks[a], tasks[b]) for a, b in edges}
        leading = {a: self.cost.pairs(tasks[a], target) for a in joined_to(target.name, tasks)}
        for draw in range(DRAWS):
            graph = self.graph.copy()
            for (a, b), costs in between.items():
                graph[a][b]["weight"] = redrawn(costs, tasks[a], tasks[b], draw)
            yield graph, {a: redrawn(costs, tasks[a], target, draw) for a, costs in leading.items()}

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
        ties = [
            f"{first} in {share:.0%}" for first, share in zip(self.representatives, self.kept, strict=True) if share < 1
        ]
        hung = f" Ties between edges matter: broken at random, they give the cluster of {', '.join(ties)} of draws."
        return (
            f"{len(self.graph)} source tasks, {self.graph.number_of_edges()} pairs joined, in {len(clusters)} "
            f"clusters: {'; '.join(clusters)}.{hung if ties else ''}"
        )

    def write(self, **shown: Any) -> None:
        """Write ``clusters.csv`` and ``task_graph`` (``.json``, ``.graphml``, ``.png``, ``.svg``); print a summary.

        The figure shows the clusters in colours, the sizes of tasks, and the options ``shown`` of `plot_task_graph`.
        Without these options, ``answer.txt`` is written too.
        """
        if not self.here.leads:
            return
        folder, sizes = self.here.folder, self.graph.nodes(data="size")
        for name in ("task_graph.json", "task_graph.graphml"):
            graphs.write_task_graph(self.graph, folder / name, clusters=self.clusters)
        rows = [
            {"cluster": number, "task": task, "size": sizes[task], "representative": task == first, "kept": share}
            for number, (cluster, first, share) in enumerate(
                zip(self.clusters, self.representatives, self.kept, strict=True)
            )
            for task in cluster
        ]
        write_csv(folder / "clusters.csv", pd.DataFrame(rows))
        if self.here.figures:
            how = {"title": "Task graph", "synthetic": self.synthetic} | shown
            figure = plot_task_graph(self.graph, self.clusters, representatives=self.representatives, **how)
            save_figure(figure, folder / "task_graph.png")
        if not shown:  # no plan follows, so the graph is the answer
            write_text(folder / "answer.txt", self.text)
        print(self.text)


def _nearest(costs: Mapping[str, float]) -> str:
    return min(costs, key=lambda task: (costs[task], task))


@dataclass(kw_only=True, eq=False)
class PlanPath:
    """A step that finds the cheapest paths to the target, and the nearest single source.

    Writes ``plan.json`` and ``paths.csv``, and the files of `SourceGraph`, with the path in the figure.

    The config says how many intermediate tasks are allowed (``max_intermediates``), and the number of labelled patients
    of all sources of an arm (``source_patients``) and of each intermediate task (``stage_patients``).

    Args:
        graph: of the sources.
        target: the target; only the patients that will be trained on are used.
    """

    graph: SourceGraph
    target: SegmentationTask
    no_path: str | None = field(default=None, init=False)

    def check(self) -> None:
        """Refuse what cannot work before anything long runs.

        Raises:
            InputError: the target has no labelled training patient or is one of the sources; no patient is left to
                pre-train on; or a task has fewer patients than are asked for.
        """
        config, sources, target = self.graph.here.config, self.graph.sources, self.target
        in_all, stage, most = (config[name] for name in ("source_patients", "stage_patients", "max_intermediates"))
        require_lists(sources=sources)
        if target.name in sources:
            raise InputError(f"the target {target.name} is one of the sources; leave it out of --sources.")
        require_number("max_intermediates", most, 0, whole=True)
        require_number("stage_patients", stage, 1, whole=True)
        first_share(in_all, stage, most)
        target.datalist("train")
        for source, patients in product(sources, [in_all, stage] if most else [in_all]):
            self.graph.open(source, train_patients=patients).datalist("train")

    @cached_property
    def costs(self) -> dict[str, float]:
        """Source -> affinity cost to the target, for sources that share its modality or objective.

        Raises:
            InputError: there is no such source.
        """
        near, goal = joined_to(self.target.name, self.graph.graph), [task_volumes(self.target)]
        progress = self.graph.here.progress
        costs = affinity_costs(self.graph.cost, self.graph.volumes(near), goal, progress=progress)[:, 0]
        return dict(zip(near, costs.tolist(), strict=True))

    @property
    def single(self) -> str:
        """The source with the smallest cost."""
        return _nearest(self.costs)

    @cached_property
    def paths(self) -> list[graphs.TransferPath]:
        """The best paths, best first; if there is none, ``no_path`` says why."""
        try:
            return self._paths(self.graph.graph, self.costs, self.graph.clusters)
        except graphs.NoPathError as reason:
            self.no_path = str(reason)
            return []

    def _paths(
        self, graph: nx.Graph, costs: Mapping[str, float], clusters: Sequence[Iterable[str]]
    ) -> list[graphs.TransferPath]:
        most = self.graph.here.config["max_intermediates"]
        parts = (graph, costs, clusters, self.graph.represented(graph, clusters))
        return graphs.optimal_transfer_path(*parts, max_intermediates=most)

    def _best(self, *parts: Any) -> tuple[str, str]:
        try:
            return "path", " -> ".join(self._paths(*parts)[0].tasks)
        except graphs.NoPathError:
            return "path", ""

    @cached_property
    def survival(self) -> pd.DataFrame:
        """How often paths and single sources are chosen again, by ``kind`` and ``tasks`` as in ``paths.csv``.

        ``ties``: the share of random ways to break ties between edges. ``patients``: the share of resamples of the
        patients, with ties broken at random too; only if the affinity gives its cost for each pair of patients.
        """
        cut = [self._best(self.graph.graph, self.costs, clusters) for clusters in self.graph.clusterings]
        chosen = {"ties": pd.Series(Counter(cut)) / len(cut)}
        if hasattr(self.graph.cost, "pairs"):
            drawn = []
            for seed, (graph, costs) in enumerate(self.graph.draws(task_volumes(self.target))):
                clusters = graphs.girvan_newman_clusters(graph, **self.graph.how, rng=np.random.default_rng(seed))
                drawn += [self._best(graph, costs, clusters), ("single", _nearest(costs))]
            chosen["patients"] = pd.Series(Counter(drawn)) / DRAWS
        return pd.DataFrame(chosen).rename_axis(["kind", "tasks"]).fillna(0.0)

    def _chosen_again(self, path: graphs.TransferPath) -> dict[str, float]:
        return self.survival.reindex([("path", " -> ".join(path.tasks))], fill_value=0.0).iloc[0].to_dict()

    @property
    def path(self) -> tuple[str, ...] | None:
        """The tasks of the best path, without the target."""
        return self.paths[0].tasks if self.paths else None

    @property
    def text(self) -> str:
        """The paths, their costs, how stable they are, and the nearest single source, in words."""
        name = self.target.name
        best = zip(("Best path", "Next"), self.paths, strict=False)
        said = [f"{what}: {' -> '.join((*path.tasks, name))}, cost {path.cost:.3f}." for what, path in best]
        return (
            f"{' '.join(said) or f'For {name} {self.no_path}'} {self._firm()}Nearest single source: {self.single}, "
            f"cost {self.costs[self.single]:.3f}. Costs of paths and costs of single sources cannot be compared; "
            "only training shows whether a second step pays."
        )

    def _firm(self) -> str:
        """How often the best path is chosen again, and what follows from it."""
        if not self.paths:
            return ""
        shares = self._chosen_again(self.paths[0])
        of = {"ties": "random ways to break ties between edges", "patients": "draws of the patients"}
        said = " and in ".join(f"{share:.0%} of {of[what]}" for what, share in shares.items())
        doubt = "" if min(shares.values()) > 0.5 else ", so other paths may be as good"
        return f"The best is chosen again in {said}{doubt}. "

    def run(self) -> None:
        """Find the paths, write the files and print a summary."""
        if not self.graph.here.leads:
            return
        folder, target, paths = self.graph.here.folder, self.target, self.paths
        title = f"Task graph and the path to {target.name}" if paths else "Task graph"
        self.graph.write(title=title, path=self.path, target=target.name, target_costs=self.costs)
        content = {
            "target": target.name,
            "costs": self.costs,
            "paths": [path._asdict() | {"chosen_again": self._chosen_again(path)} for path in paths],
            "single": self.single,
            "no_path": self.no_path,
            "text": f"{self.text} {self.graph.text}",
            "synthetic": target.synthetic,
        }
        write_json(folder / "plan.json", content)
        steps = [("path", " -> ".join(path.tasks), path.cost) for path in paths]
        steps += sorted((("single", *item) for item in self.costs.items()), key=lambda step: (step[2], step[1]))
        table = pd.DataFrame(steps, columns=["kind", "tasks", "cost"]).join(self.survival, on=["kind", "tasks"])
        table = table.fillna(dict.fromkeys(self.survival, 0.0))
        table["ties"] = table["ties"].where(table["kind"] == "path")
        write_csv(folder / "paths.csv", table)
        print(self.text)
