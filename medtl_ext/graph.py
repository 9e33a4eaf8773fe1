r"""Task graph, its clusters, and the best path of sources to a target task (SeqTran).

A node is a task ``institution-modality-objective`` with the number of its labelled samples. An edge joins two tasks
that share the modality or the objective. Its weight is a cost >= 0, such as that of `medtl_ext.affinity.task_affinity`;
lower means more similar. Graphs are `networkx.Graph` and are never changed here. All results are reproducible: ties are
broken by name, or at random with a seed.

Reference: Yang et al., *Selecting the Best Sequential Transfer Path for Medical Image Segmentation with Limited Labeled
Data*.
"""

import heapq
import json
import math
import os
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.csgraph import connected_components, dijkstra

from medtl_ext._io import atomic_path, write_json
from medtl_ext._validation import InputError, require_choice, require_number

RULES = ("size", "weighted_centroid")
# Relative differences below which two paths are equally short, and two betweennesses are equal.
SAME, TIE = 1e-12, 1e-9
# Smallest length of an edge, relative to the longest: far above `SAME`.
LEAST = 1e-6


class NoPathError(InputError):
    """No path leads to the target."""


class TransferPath(NamedTuple):
    """A path of sources that leads to the target. The target itself is not in it.

    Attributes:
        cost: see `optimal_transfer_path`.
        tasks: the tasks to train on before the target, in order: first a representative, then intermediate tasks.
    """

    cost: float
    tasks: tuple[str, ...]


def task_graph(tasks: Sequence[str], costs: ArrayLike, *, sizes: Mapping[str, int]) -> nx.Graph:
    """Join the tasks that share the modality or the objective, with the given costs.

    Args:
        tasks: n names ``institution-modality-objective``.
        costs: n x n, symmetric, >= 0, lower means more similar; the diagonal is not used. Pairs that share neither
            modality nor objective are not joined, and may be NaN.
        sizes: task -> number of its labelled samples, 1 or more.

    Returns:
        A graph with ``institution, modality, objective, size`` at its nodes and ``weight`` at its edges.

    Raises:
        InputError: a name of another form or given twice, a task without size, or costs that have another shape, are
            not symmetric, negative, or not finite where two tasks are joined.

    >>> costs = [[0, 1, 5], [1, 0, 2], [5, 2, 0]]
    >>> graph = task_graph(["13-T1-ED", "13-T2-ED", "13-T2-ET"], costs, sizes=dict.fromkeys(
    ...     ["13-T1-ED", "13-T2-ED", "13-T2-ET"], 20))
    >>> sorted(graph.edges(data="weight"))
    [('13-T1-ED', '13-T2-ED', 1.0), ('13-T2-ED', '13-T2-ET', 2.0)]
    """
    costs = np.asarray(costs, dtype=float)
    if costs.shape != (len(tasks), len(tasks)):
        raise InputError(f"costs has shape {costs.shape}; expected {len(tasks)} x {len(tasks)}, one row for each task.")
    graph = nx.Graph()
    for task in tasks:
        if task in graph:
            raise InputError(f"tasks names {task} twice; give every task once.")
        parts = task.rsplit("-", 2)
        if len(parts) != 3 or not all(parts):
            raise InputError(f"task {task!r} is not of the form institution-modality-objective, such as 13-T1-ED.")
        size = int(require_number(f"size of {task}", sizes.get(task), 1, whole=True))
        graph.add_node(task, institution=parts[0], modality=parts[1], objective=parts[2], size=size)
    for (i, a), (j, b) in combinations(enumerate(tasks), 2):
        if any(graph.nodes[a][tag] == graph.nodes[b][tag] for tag in ("modality", "objective")):
            if not math.isclose(costs[i, j], costs[j, i], rel_tol=1e-6, abs_tol=1e-12) and not np.isnan(costs[i, j]):
                raise InputError(f"costs of {a} and {b} are {costs[i, j]:g} and {costs[j, i]:g}; expected the same.")
            graph.add_edge(a, b, weight=float(costs[i, j]))
    _check_graph(graph)
    return graph


def girvan_newman_clusters(
    graph: nx.Graph, n_clusters: int, *, weight: str | None = "weight", rng: np.random.Generator | None = None
) -> list[set[Hashable]]:
    """Girvan-Newman clustering: remove the edge of highest betweenness until the graph has ``n_clusters`` components.

    Betweenness (the number of shortest paths along an edge) is computed again after every removal. 84 tasks and 1,722
    edges take about a second.

    Args:
        graph: undirected. Its components, if there are several, are separate clusters from the start.
        n_clusters: number of clusters, from 1 to the number of nodes. There are more only if the graph has more
            components from the start.
        weight: the edges' attribute that is a distance, >= 0. None counts edges, as SeqTran's code does. A weight below
            a millionth of the largest, such as 0, counts as a millionth.
        rng: breaks ties between edges at random; None breaks them by name. Ties are frequent even if all weights
            differ, because betweenness counts paths: see `tied_clusterings`.

    Returns:
        The clusters, largest first; clusters of equal size by name.

    Raises:
        InputError: not an undirected simple graph, ``n_clusters`` out of range, or a weight that is missing, negative
            or NaN.

    >>> graph = nx.barbell_graph(3, 0)
    >>> girvan_newman_clusters(graph, 2, weight=None)
    [{0, 1, 2}, {3, 4, 5}]

    Reference: Girvan and Newman, PNAS 2002; the weighted shortest paths are Brandes', 2008.
    """
    return _clustered(graph, n_clusters, weight, rng)[0]


def tied_clusterings(
    graph: nx.Graph, n_clusters: int, *, weight: str | None = "weight", draws: int = 100
) -> list[list[set[Hashable]]]:
    """Results of `girvan_newman_clusters` with ties between edges broken at random, ``draws`` times.

    Args:
        graph, n_clusters, weight: as in `girvan_newman_clusters`.
        draws: number of draws, with the seeds 0, 1, 2, ...

    Returns:
        The clusters of every draw. If no two edges ever tie, there is one result only.

    >>> [len(tied_clusterings(graph, 2, weight=None)) for graph in (nx.cycle_graph(4), nx.barbell_graph(3, 0))]
    [100, 1]
    """
    clusters, tied = _clustered(graph, n_clusters, weight)
    seeds = range(draws if tied else 0)
    rngs = map(np.random.default_rng, seeds)
    return [_clustered(graph, n_clusters, weight, rng)[0] for rng in rngs] or [clusters]


def _clustered(
    graph: nx.Graph, n_clusters: int, weight: str | None, rng: np.random.Generator | None = None
) -> tuple[list[set[Hashable]], bool]:
    """The clusters, and whether two edges tied for the highest betweenness at any step."""
    _check_graph(graph, weight)
    require_number("n_clusters", n_clusters, 1, len(graph), whole=True)
    names, tied = sorted(graph, key=str), False
    lengths = nx.to_numpy_array(graph, nodelist=names, weight=weight, nonedge=np.inf)
    longest = lengths[np.isfinite(lengths)].max(initial=0.0) or 1.0
    lengths = np.maximum(lengths / longest, LEAST)
    flow = _flow(lengths, np.arange(len(names)))
    while (found := connected_components(np.isfinite(lengths), directed=False))[0] < n_clusters:
        betweenness = np.triu(flow.sum(axis=0))  # the matrix is symmetric
        highest = np.argwhere(betweenness >= betweenness.max() * (1 - TIE))
        tied |= len(highest) > 1
        u, v = highest[0 if rng is None else rng.integers(len(highest))]
        lengths[u, v] = lengths[v, u] = np.inf
        changed = np.flatnonzero(flow[:, u, v] + flow[:, v, u])  # sources with a shortest path along this edge
        flow[changed] = _flow(lengths, changed)
    parts = [{names[place] for place in np.flatnonzero(found[1] == part)} for part in range(found[0])]
    return sorted(parts, key=lambda part: (-len(part), min(map(str, part)))), tied


def _flow(lengths: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Number of shortest paths from each source along each edge (sources x n x n), by Brandes' dependencies.

    As in networkx, but for all sources at once. It is a hundred times faster, and does not depend on the order of
    nodes.
    """
    n = len(lengths)
    reach = dijkstra(lengths, indices=sources)
    tails, heads = np.nonzero(np.isfinite(lengths))
    # Infinite on both sides, and so False, between components.
    on_path = reach[:, tails] + lengths[tails, heads] < reach[:, heads] * (1 + SAME)
    source, edge = np.nonzero(on_path)
    # One index for each pair of source and node.
    before, after = source * n + tails[edge], source * n + heads[edge]
    starts = np.eye(n)[sources].ravel()
    counts = _settled(lambda paths: starts + np.bincount(after, paths[before], starts.size), starts)
    share = counts[before] / counts[after]
    demand = _settled(lambda below: 1 + np.bincount(before, share * below[after], starts.size), np.ones(starts.size))
    flow = np.zeros((len(sources), n, n))
    flow[source, tails[edge], heads[edge]] = share * demand[after]
    return flow


def _settled(step: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """Repeat ``step`` until nothing changes: as many times as the longest path has edges."""
    while not np.array_equal(values, changed := step(values)):
        values = changed
    return values


def _rounded(cost: float) -> float:
    """Round a cost for comparisons: sums in another order differ in their last bits."""
    return float(f"{cost:.12g}")


def cluster_representatives(
    graph: nx.Graph, clusters: Sequence[Collection[Hashable]], *, rule: str = "size"
) -> list[Hashable]:
    """Select the task of every cluster from which paths start, in the order of the clusters.

    Args:
        graph: from `task_graph`, with ``size`` at its nodes and ``weight`` at its edges.
        clusters: from `girvan_newman_clusters`.
        rule: "size" takes the task with most samples. Among equal sizes it takes the smallest mean cost to its
            neighbours in the cluster, then the first name. "weighted_centroid", as in SeqTran's code, takes the
            smallest mean cost to its neighbours in the cluster, weighted by their sizes, then the first name.

    Raises:
        InputError: an unknown rule, an empty cluster, or a task that is not in the graph, is in two clusters, or has no
            size.

    >>> graph = nx.Graph([("a", "b", {"weight": 1.0}), ("b", "c", {"weight": 2.0})])
    >>> nx.set_node_attributes(graph, {"a": 20, "b": 20, "c": 5}, "size")
    >>> cluster_representatives(graph, [{"a", "b", "c"}])
    ['a']
    """
    require_choice("rule", rule, RULES)
    _check_graph(graph)
    _check_clusters(graph, clusters)
    sizes = graph.nodes(data="size")
    for node, size in sizes:
        if not (size or 0) > 0:
            raise InputError(f"task {node} has size {size!r}; expected its number of samples, 1 or more.")

    def order(node: Hashable, cluster: Collection[Hashable]) -> tuple[float, float, str]:
        near = [other for other in graph[node] if other in cluster and other != node]
        weights = None if rule == "size" else [sizes[other] for other in near]
        cost = np.average([graph[node][other]["weight"] for other in near], weights=weights) if near else math.inf
        return -sizes[node] if rule == "size" else 0, _rounded(cost), str(node)

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

    The cost of a path r -> i -> t is ``w(r, t) + w(r, i) + w(i, t)``. With more intermediate tasks it is w(r, t) plus
    the sum of all edges. A missing edge has infinite cost. Every cost contains w(r, t), so a path is never cheaper than
    the direct step to the target. Only fine-tuning can show whether an intermediate step helps.

    Args:
        graph: from `task_graph`, without the target.
        target_costs: task -> cost to the target, >= 0. A task that is missing, or has infinite cost, is not joined to
            the target.
        clusters: from `girvan_newman_clusters`.
        representatives: one task of each cluster, in the same order.
        max_intermediates: largest number of intermediate tasks; paths have at least one. 0 allows direct steps only.
        k: largest number of paths.

    Returns:
        The cheapest paths, at most ``k``, best first, ties by name.

    Raises:
        NoPathError: there is no path; the message says why.
        InputError: a negative or NaN cost, or representatives that do not fit the clusters.

    >>> graph = nx.Graph([("a", "b", {"weight": 1.0}), ("b", "c", {"weight": 2.0})])
    >>> optimal_transfer_path(graph, {"a": 3.0, "b": 0.5, "c": 0.1}, [{"a", "b", "c"}], ["a"])
    [TransferPath(cost=4.5, tasks=('a', 'b'))]
    >>> optimal_transfer_path(graph, {"a": 3.0, "c": 0.1}, [{"a", "b", "c"}], ["a"], max_intermediates=2)[0].tasks
    ('a', 'b', 'c')

    Reference: SeqTran, eq. 9, and eq. 8 for longer paths.
    """
    _check_graph(graph)
    _check_clusters(graph, clusters)
    if len(representatives) != len(clusters) or any(r not in c for r, c in zip(representatives, clusters, strict=True)):
        raise InputError(f"representatives is {list(representatives)}; expected one task of each of the clusters.")
    require_number("max_intermediates", max_intermediates, 0, whole=True)
    require_number("k", k, 1, whole=True)
    for task, cost in target_costs.items():
        if not cost >= 0:
            raise InputError(f"target_costs says {cost} for {task}; expected a cost of 0 or more.")
        if task not in graph:
            raise InputError(f"target_costs names {task}, which is not in the graph; expected a task of the graph.")

    cluster_of = dict(zip(representatives, clusters, strict=True))
    # Costs grow along a path, so the first complete paths from the heap are the cheapest.
    heap: list[tuple[float, bool, tuple[str, ...], tuple[Hashable, ...], float]] = []

    def push(tasks: tuple[Hashable, ...], cost: float, *, complete: bool) -> None:
        if math.isfinite(cost):
            heapq.heappush(heap, (_rounded(cost), complete, tuple(map(str, tasks)), tasks, cost))

    for r in representatives:
        push((r,), float(target_costs.get(r, math.inf)), complete=max_intermediates == 0)
    found: list[TransferPath] = []
    while heap and len(found) < k:
        _, complete, _, tasks, cost = heapq.heappop(heap)
        if complete:
            found.append(TransferPath(cost, tasks))
            continue
        if len(tasks) > 1:
            push(tasks, cost + target_costs.get(tasks[-1], math.inf), complete=True)
        if len(tasks) <= max_intermediates:
            for task in set(graph[tasks[-1]]) & set(cluster_of[tasks[0]]) - set(tasks):
                push((*tasks, task), cost + graph[tasks[-1]][task]["weight"], complete=False)
    if not found:
        raise NoPathError(
            "there is no path to the target: it is joined to no representative whose cluster has an intermediate task "
            "that is joined to both (clusters of one task each have none). Use the nearest single source, add source "
            "tasks, or ask for fewer clusters."
        )
    return found


def write_task_graph(
    graph: nx.Graph, path: str | os.PathLike[str], *, clusters: Sequence[Collection[Hashable]] = ()
) -> None:
    """Write the graph as GraphML (``.graphml``, for Gephi, Cytoscape, yEd) or as node-link JSON (``.json``).

    Args:
        graph: from `task_graph`.
        path: of the file, which is written atomically.
        clusters: the index of a task's cluster, from 0, is written as its attribute ``cluster``.

    Raises:
        InputError: another ending, or a cluster with a task that is not in the graph.
    """
    path = Path(path)
    require_choice("ending of the graph's file", path.suffix, [".graphml", ".json"])
    _check_clusters(graph, clusters)
    graph = graph.copy()
    for number, cluster in enumerate(clusters):
        nx.set_node_attributes(graph, dict.fromkeys(cluster, number), "cluster")
    if path.suffix == ".json":
        write_json(path, nx.node_link_data(graph, edges="edges"))
    else:
        with atomic_path(path) as temporary:
            nx.write_graphml(graph, temporary)


def read_task_graph(path: str | os.PathLike[str]) -> nx.Graph:
    """Read the graph from a ``.json`` file of `write_task_graph`.

    Raises:
        InputError: the file is missing, or holds no task graph.
    """
    path, hint = Path(path), "give the task_graph.json of a finished run."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        graph = nx.node_link_graph(content, edges="edges")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, nx.NetworkXError) as error:
        raise InputError(f"{path} holds no task graph ({error}); {hint}") from error
    _check_graph(graph)
    if len(graph) < len(content["nodes"]):
        raise InputError(f"{path} names a task twice; {hint}")
    if without := [task for task, size in graph.nodes(data="size") if size is None]:
        raise InputError(f"{path} has no size of {without[0]}; {hint}")
    return graph


def _check_graph(graph: nx.Graph, weight: str | None = "weight") -> None:
    if not isinstance(graph, nx.Graph) or graph.is_directed() or graph.is_multigraph():
        raise InputError(f"graph is {type(graph).__name__}; expected an undirected networkx.Graph.")
    if len(graph) == 0:
        raise InputError("graph has no task; expected at least one.")
    for a, b, value in graph.edges(data=weight) if weight else ():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
            raise InputError(f"the edge between {a} and {b} has weight {value!r}; expected a finite number >= 0.")


def _check_clusters(graph: nx.Graph, clusters: Sequence[Collection[Hashable]]) -> None:
    members = [node for cluster in clusters for node in cluster]
    if not all(clusters) or len(set(members)) < len(members) or not set(members) <= set(graph):
        rule = "expected sets of the graph's tasks, none empty, no task in two"
        raise InputError(f"clusters is {list(clusters)}; {rule}.")
