r"""Task graph, its clusters, and the best path of sources to a target task (SeqTran).

A node is a task ``institution-modality-objective`` with the number of its labelled samples, an edge joins two tasks
that share the modality or the objective, and its weight is a cost such as `medtl_ext.affinity.task_affinity` gives:
>= 0, lower is nearer. Graphs are `networkx.Graph`, never changed here, and every result is the same in every run: ties
are broken by name.

Reference: Yang et al., *Selecting the Best Sequential Transfer Path for Medical Image Segmentation with Limited Labeled
Data*.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike

from medtl_ext._io import atomic_path, write_json
from medtl_ext._validation import InputError, require_choice

__all__ = [
    "NoPathError",
    "TransferPath",
    "cluster_representatives",
    "girvan_newman_clusters",
    "optimal_transfer_path",
    "read_task_graph",
    "task_graph",
    "write_task_graph",
]

RULES = ("size", "weighted_centroid")
# Shortest paths whose lengths differ by less, relatively, are equally short; betweennesses, equally high.
SAME, TIE = 1e-12, 1e-9
# Least length of an edge, relative to the longest: far above what counts as the same.
LEAST = 1e-6


class NoPathError(InputError):
    """No path leads to the target."""


class TransferPath(NamedTuple):
    """A path of sources to the target, which is not named in it.

    Attributes:
        cost: see `optimal_transfer_path`.
        tasks: what to train on before the target, in this order: first a representative, then intermediate tasks.
    """

    cost: float
    tasks: tuple[str, ...]


def task_graph(tasks: Sequence[str], costs: ArrayLike, *, sizes: Mapping[str, int]) -> nx.Graph:
    """Join the tasks that share the modality or the objective, at the given costs.

    Args:
        tasks: n names ``institution-modality-objective``.
        costs: n x n, symmetric, >= 0, lower is nearer; the diagonal is not looked at. Pairs that share neither modality
            nor objective are not joined and may be NaN.
        sizes: task -> number of its labelled samples, 1 or more.

    Returns:
        A graph with ``institution, modality, objective, size`` at its nodes and ``weight`` at its edges.

    Raises:
        InputError: a name of another form or given twice, a task without size, costs of another shape, not symmetric,
            negative, or not finite where two tasks are joined.

    >>> costs = [[0, 1, 5], [1, 0, 2], [5, 2, 0]]
    >>> graph = task_graph(["13-T1-ED", "13-T2-ED", "13-T2-ET"], costs, sizes=dict.fromkeys(
    ...     ["13-T1-ED", "13-T2-ED", "13-T2-ET"], 20))
    >>> sorted(graph.edges(data="weight"))
    [('13-T1-ED', '13-T2-ED', 1.0), ('13-T2-ED', '13-T2-ET', 2.0)]
    """
    costs = np.asarray(costs, dtype=float)
    if costs.shape != (len(tasks), len(tasks)):
        raise InputError(f"costs has shape {costs.shape}; expected {len(tasks)} x {len(tasks)}, one row for each task.")
    if twice := [task for task in tasks if list(tasks).count(task) > 1]:
        raise InputError(f"tasks names {twice[0]} twice; give every task once.")
    graph = nx.Graph()
    for task in tasks:
        parts = task.rsplit("-", 2)
        if len(parts) != 3 or not all(parts):
            raise InputError(f"task {task!r} is not of the form institution-modality-objective, such as 13-T1-ED.")
        if not (isinstance(sizes.get(task), (int, np.integer)) and sizes[task] >= 1):
            raise InputError(f"sizes says {sizes.get(task)!r} for {task}; expected its number of samples, 1 or more.")
        graph.add_node(task, institution=parts[0], modality=parts[1], objective=parts[2], size=int(sizes[task]))
    for (i, a), (j, b) in combinations(enumerate(tasks), 2):
        if any(graph.nodes[a][tag] == graph.nodes[b][tag] for tag in ("modality", "objective")):
            if not math.isclose(costs[i, j], costs[j, i], rel_tol=1e-6, abs_tol=1e-12) and not np.isnan(costs[i, j]):
                raise InputError(f"costs of {a} and {b} are {costs[i, j]:g} and {costs[j, i]:g}; expected the same.")
            graph.add_edge(a, b, weight=float(costs[i, j]))
    _check_graph(graph, "weight")
    return graph


def girvan_newman_clusters(graph: nx.Graph, n_clusters: int, *, weight: str | None = "weight") -> list[set[Hashable]]:
    """Clusters that are left when the edges most shortest paths run through are removed, one after the other.

    Removes the edge of highest betweenness, counts betweenness again, and so on, until the graph has fallen into
    ``n_clusters`` parts or more. Only shortest paths that ran through the removed edge are looked for again, so that 84
    tasks and 1,722 edges take a second or two.

    Args:
        graph: undirected; may have several components, which are clusters to begin with.
        n_clusters: parts to reach, from 1 to the number of nodes. A graph can fall into more at once only if it had
            more from the start.
        weight: the edges' attribute that is a distance, >= 0; None counts edges, as SeqTran's code does. A weight
            below a millionth of the largest, such as 0, counts as that.

    Returns:
        The clusters, the largest first, those of one size by name. Ties between edges are broken by name.

    Raises:
        InputError: no undirected simple graph, ``n_clusters`` out of range, a weight that is missing, negative or NaN.

    >>> graph = nx.barbell_graph(3, 0)
    >>> girvan_newman_clusters(graph, 2, weight=None)
    [{0, 1, 2}, {3, 4, 5}]

    Reference: Girvan and Newman, PNAS 2002; the weighted shortest paths are Brandes', 2008.
    """
    weights = _check_graph(graph, weight)
    whole = isinstance(n_clusters, Integral) and not isinstance(n_clusters, bool)
    if not whole or not 1 <= n_clusters <= max(len(graph), 1):
        raise InputError(f"n_clusters is {n_clusters!r}; expected a whole number from 1 to {len(graph)}, the tasks.")
    names = sorted(graph, key=str)
    index = {name: i for i, name in enumerate(names)}
    lengths = np.full((len(names), len(names)), np.inf)
    smallest = LEAST * max(weights.values(), default=1.0) or 1.0
    for (a, b), value in weights.items():
        if a != b:
            lengths[index[a], index[b]] = lengths[index[b], index[a]] = max(value, smallest)
    paths = _ShortestPaths(lengths)
    while len(parts := paths.parts()) < n_clusters:
        before = len(parts)
        while paths.cut_busiest_edge() and paths.n_parts == before:
            pass
    clusters = [{names[i] for i in part} for part in parts]
    return sorted(clusters, key=lambda part: (-len(part), min(map(str, part))))


class _ShortestPaths:
    """All shortest paths of a graph, kept up to date while edges are removed.

    Attributes:
        lengths: n x n, of the edges, inf where there is none.
        distances: n x n.
        flow: n x n x n, ``flow[s, v, w]``: how many targets' worth of shortest paths from s go along v -> w.
        betweenness: n x n, the sum of all flows along v -> w.
        n_parts: number of connected components.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        n = len(lengths)
        self.lengths = lengths
        self.distances = np.where(np.eye(n, dtype=bool), 0.0, np.inf)
        self._shorten(*np.nonzero(~np.eye(n, dtype=bool)))
        self.flow = self._flow_from(np.arange(n))
        self.betweenness = self.flow.sum(0)
        self.n_parts = len(self.parts())

    def parts(self) -> list[np.ndarray]:
        """Indices of the nodes of each connected component."""
        first = np.isfinite(self.distances).argmax(axis=1)
        return [np.flatnonzero(first == root) for root in np.unique(first)]

    def cut_busiest_edge(self) -> bool:
        """Remove the edge of highest betweenness, the first by name of several; False where there is no edge."""
        shared = np.triu(self.betweenness + self.betweenness.T)
        if not shared.any():
            return False
        u, v = np.unravel_index((shared >= shared.max() * (1 - TIE)).argmax(), shared.shape)
        length, reach = self.lengths[u, v], self.distances
        self.lengths[u, v] = self.lengths[v, u] = np.inf
        with np.errstate(invalid="ignore"):  # inf - inf between components
            over = np.minimum(reach[:, [u]] + reach[[v], :], reach[:, [v]] + reach[[u], :]) + length
            lost = _same(over, reach)
        self._shorten(*np.nonzero(lost))
        sources = np.flatnonzero(lost.any(axis=1))
        self.betweenness -= self.flow[sources].sum(0)
        self.flow[sources] = self._flow_from(sources)
        self.betweenness += self.flow[sources].sum(0)
        if not np.isfinite(self.distances[u, v]):
            self.n_parts += 1
            self.betweenness = self.flow.sum(0)  # forget what rounding has left behind
        return True

    def _shorten(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Find the distances between these pairs anew; those of all other pairs are right."""
        self.distances[starts, ends] = np.inf
        into = self.lengths[:, ends].T
        while True:
            found = (self.distances[starts] + into).min(axis=1, initial=np.inf)
            if (found >= self.distances[starts, ends]).all():
                return
            self.distances[starts, ends] = found

    def _flow_from(self, sources: np.ndarray) -> np.ndarray:
        """Flow along all edges of the shortest paths that start at these nodes (Brandes' dependencies)."""
        reach = self.distances[sources]
        with np.errstate(invalid="ignore"):
            on_path = _same(reach[:, :, None] + self.lengths, reach[:, None, :]).astype(float)
        start = (reach == 0).astype(float)
        counts = start
        for _ in range(len(self.lengths)):  # no path has more edges
            before, counts = counts, start + (counts[:, None, :] @ on_path)[:, 0]
            if np.array_equal(before, counts):
                break
        share = on_path * counts[:, :, None] / np.where(counts > 0, counts, 1)[:, None, :]
        demand = np.ones_like(counts)
        for _ in range(len(self.lengths)):
            before, demand = demand, 1 + (share @ demand[:, :, None])[:, :, 0]
            if np.array_equal(before, demand):
                break
        return share * demand[:, None, :]


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether finite lengths are equal but for rounding."""
    return np.isfinite(a) & (np.abs(a - b) <= SAME * b)


def _rounded(cost: float) -> float:
    """A cost as far as it can be compared: sums in another order differ in their last bits."""
    return float(f"{cost:.12g}")


def cluster_representatives(
    graph: nx.Graph, clusters: Sequence[Collection[Hashable]], *, rule: str = "size"
) -> list[Hashable]:
    """One task of every cluster to start a path from, in the order of the clusters.

    Args:
        graph: of `task_graph`: ``size`` at its nodes, ``weight`` at its edges.
        clusters: of `girvan_newman_clusters`.
        rule: "size" takes the task with most samples, of several the one with least mean cost to the tasks of its
            cluster it is joined to, of several the first by name; "weighted_centroid", as SeqTran's code does, the task
            with least mean cost to the others of its cluster, weighted by their sizes, then the first by name.

    Raises:
        InputError: an unknown rule, an empty cluster, or a task that is not in the graph, in two clusters, or without
            size.

    >>> graph = nx.Graph([("a", "b", {"weight": 1.0}), ("b", "c", {"weight": 2.0})])
    >>> nx.set_node_attributes(graph, {"a": 20, "b": 20, "c": 5}, "size")
    >>> cluster_representatives(graph, [{"a", "b", "c"}])
    ['a']
    """
    require_choice("rule", rule, RULES)
    weights = _check_graph(graph, "weight")
    _check_clusters(graph, clusters)
    for node in graph:
        if not graph.nodes[node].get("size", 0) > 0:
            raise InputError(f"task {node} has size {graph.nodes[node].get('size')!r}; expected its number of samples.")

    def cost(node: Hashable, cluster: Collection[Hashable], weighted: bool) -> float:
        near = [other for other in graph[node] if other in cluster and other != node]
        shares = [graph.nodes[other]["size"] if weighted else 1 for other in near]
        joined = [weights.get((node, other), weights.get((other, node))) for other in near]
        return _rounded(float(np.average(joined, weights=shares))) if near else math.inf

    def order(node: Hashable, cluster: Collection[Hashable]) -> tuple[Any, ...]:
        if rule == "size":
            return (-graph.nodes[node]["size"], cost(node, cluster, False), str(node))
        return (cost(node, cluster, True), str(node))

    return [min(cluster, key=lambda node: order(node, cluster)) for cluster in clusters]


def optimal_transfer_path(
    graph: nx.Graph,
    target_costs: Mapping[Hashable, float],
    clusters: Sequence[Collection[Hashable]],
    representatives: Sequence[Hashable],
    *,
    max_intermediates: int = 1,
    k: int = 5,
) -> list[TransferPath]:
    r"""The cheapest paths from a representative r over intermediate tasks of its cluster to the target t.

    A path r -> i -> t costs ``w(r, t) + w(r, i) + w(i, t)``; one over more intermediate tasks, w(r, t) and the sum of
    all its edges. No edge is an infinite cost. As every path's cost begins with w(r, t), none is cheaper than going
    straight to the target: whether a detour pays is for fine-tuning, not for this sum, to say.

    Args:
        graph: of `task_graph`; the target is not in it.
        target_costs: task -> cost to the target, >= 0; a task left out, or with an infinite cost, is not joined to it.
        clusters: of `girvan_newman_clusters`.
        representatives: one task of each cluster, in the same order.
        max_intermediates: paths have 1 to so many intermediate tasks; 0: none, straight from a representative.
        k: how many paths at most.

    Returns:
        The cheapest paths, at most ``k``, best first, ties by name.

    Raises:
        NoPathError: no path at all, with the reason.
        InputError: a negative or NaN cost; representatives that are not of their
            clusters.

    >>> graph = nx.Graph([("a", "b", {"weight": 1.0}), ("b", "c", {"weight": 2.0})])
    >>> optimal_transfer_path(graph, {"a": 3.0, "b": 0.5, "c": 0.1}, [{"a", "b", "c"}], ["a"])
    [TransferPath(cost=4.5, tasks=('a', 'b'))]
    >>> optimal_transfer_path(graph, {"a": 3.0, "c": 0.1}, [{"a", "b", "c"}], ["a"], max_intermediates=2)[0].tasks
    ('a', 'b', 'c')

    Reference: SeqTran, eq. 9, and eq. 8 for longer paths.
    """
    weights = _check_graph(graph, "weight")
    _check_clusters(graph, clusters)
    if len(representatives) != len(clusters) or any(r not in c for r, c in zip(representatives, clusters, strict=True)):
        raise InputError(f"representatives is {list(representatives)}; expected one task of each of the clusters.")
    for name, value, least in (("max_intermediates", max_intermediates, 0), ("k", k, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; expected a whole number, {least} or more.")
    for task, cost in target_costs.items():
        if not cost >= 0:
            raise InputError(f"target_costs says {cost} for {task}; expected a cost of 0 or more.")
        if task not in graph:
            raise InputError(f"target_costs names {task}, which is not in the graph.")

    def step(a: Hashable, b: Hashable) -> float:
        return weights.get((a, b), weights.get((b, a), math.inf))

    cluster_of = dict(zip(representatives, clusters, strict=True))
    # Costs only grow along a path, so the first complete ones to come off the heap are the cheapest.
    heap: list[tuple[float, bool, tuple[str, ...], tuple[Hashable, ...], float]] = []

    def push(cost: float, complete: bool, names: tuple[str, ...], tasks: tuple[Hashable, ...]) -> None:
        heapq.heappush(heap, (_rounded(cost), complete, names, tasks, cost))

    for r in representatives:
        push(float(target_costs.get(r, math.inf)), False, (str(r),), (r,))
    found: list[TransferPath] = []
    while heap and len(found) < k:
        _, complete, names, tasks, cost = heapq.heappop(heap)
        if math.isinf(cost):
            break
        if complete:
            found.append(TransferPath(cost, tasks))
            continue
        if len(tasks) > 1:
            push(cost + target_costs.get(tasks[-1], math.inf), True, names, tasks)
        elif max_intermediates == 0:
            push(cost, True, names, tasks)
        if len(tasks) <= max_intermediates:
            for task in set(graph[tasks[-1]]) & set(cluster_of[tasks[0]]) - set(tasks):
                push(cost + step(tasks[-1], task), False, (*names, str(task)), (*tasks, task))
    if not found:
        raise NoPathError(_why_no_path(graph, target_costs, clusters, representatives))
    return found


def _why_no_path(
    graph: nx.Graph,
    target_costs: Mapping[Hashable, float],
    clusters: Sequence[Collection[Hashable]],
    representatives: Sequence[Hashable],
) -> str:
    joined = {task for task, cost in target_costs.items() if math.isfinite(cost)}
    if not joined:
        reason = "the target is joined to no task: no cost to it is finite"
    elif not joined & set(representatives):
        reason = f"the target is joined to none of the representatives ({', '.join(map(str, representatives))})"
    elif all(len(cluster) == 1 for r, cluster in zip(representatives, clusters, strict=True) if r in joined):
        reason = "the clusters the target can be reached from have one task each"
        if len(clusters) > nx.number_connected_components(graph):
            reason += "; ask for fewer clusters"
    else:
        reason = "no task joined to a representative within its cluster is joined to the target"
    return f"there is no path to the target: {reason}. Use the nearest single source, or more source tasks."


def write_task_graph(
    graph: nx.Graph, path: str | os.PathLike[str], *, clusters: Sequence[Collection[Hashable]] = ()
) -> None:
    """Write the graph as GraphML (``.graphml``, for Gephi, Cytoscape, yEd) or as node-link JSON (``.json``).

    Args:
        graph: of `task_graph`.
        path: of the file; written whole or not at all.
        clusters: each task's place among them is written as its ``cluster``, from 0.

    Raises:
        InputError: another ending, or a cluster with a task that is not in the graph.
    """
    path = Path(path)
    require_choice("ending of the graph's file", path.suffix, [".graphml", ".json"])
    _check_clusters(graph, clusters)
    graph = graph.copy()
    for number, cluster in enumerate(clusters):
        for node in cluster:
            graph.nodes[node]["cluster"] = number
    if path.suffix == ".json":
        write_json(path, nx.node_link_data(graph, edges="edges"))
    else:
        with atomic_path(path) as temporary:
            nx.write_graphml(graph, temporary)


def read_task_graph(path: str | os.PathLike[str]) -> nx.Graph:
    """The graph of a ``.json`` file that `write_task_graph` wrote.

    Raises:
        InputError: the file is missing, or holds no task graph.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"task graph {path} does not exist; give the task_graph.json of a finished run.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        graph = nx.node_link_graph(content, edges="edges")
    except (ValueError, KeyError, TypeError, AttributeError, nx.NetworkXError) as error:
        raise InputError(
            f"{path} holds no task graph ({error}); give the task_graph.json of a finished run."
        ) from error
    _check_graph(graph, "weight")
    if len(graph) < len(content["nodes"]):
        raise InputError(f"{path} names a task twice; give the task_graph.json of a finished run.")
    if without := [task for task, size in graph.nodes(data="size") if size is None]:
        raise InputError(f"{path} has no size of {without[0]}; give the task_graph.json of a finished run.")
    return graph


def _check_graph(graph: nx.Graph, weight: str | None) -> dict[tuple[Hashable, Hashable], float]:
    """The edges' weights (1 each without), or an error that names the first bad one."""
    if not isinstance(graph, nx.Graph) or graph.is_directed() or graph.is_multigraph():
        raise InputError(f"graph is {type(graph).__name__}; expected an undirected networkx.Graph.")
    if len(graph) == 0:
        raise InputError("graph has no task; expected at least one.")
    weights = {(a, b): 1.0 if weight is None else values.get(weight) for a, b, values in graph.edges(data=True)}
    for (a, b), value in weights.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
            raise InputError(f"the edge between {a} and {b} has weight {value!r}; expected a finite number >= 0.")
    return {edge: float(value) for edge, value in weights.items()}


def _check_clusters(graph: nx.Graph, clusters: Sequence[Collection[Hashable]]) -> None:
    seen: set[Hashable] = set()
    for cluster in clusters:
        if not cluster:
            raise InputError("clusters holds an empty one; expected at least one task in each.")
        for node in cluster:
            if node not in graph or node in seen:
                raise InputError(f"clusters names {node} {'twice' if node in seen else 'which is not in the graph'}.")
            seen.add(node)
