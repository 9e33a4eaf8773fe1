"""Task graph, clusters, representatives and paths: compared with brute force on small graphs, and invalid input."""

import json
import math
import time
from functools import partial
from itertools import combinations, pairwise, permutations, product

import networkx as nx
import numpy as np
import pytest
from drawing import numpy_generator

from medtl_ext import InputError
from medtl_ext.graph import (
    NoPathError,
    cluster_representatives,
    girvan_newman_clusters,
    optimal_transfer_path,
    read_task_graph,
    task_graph,
    tied_clusterings,
    write_task_graph,
)

DRAWS = 40


@pytest.fixture(params=range(DRAWS))
def rng(request) -> np.random.Generator:
    return numpy_generator()


def small_graph(rng: np.random.Generator, *, weights: str = "real") -> nx.Graph:
    """Two to seven tasks, some of them joined; whole weights make many paths equally short."""
    graph = nx.gnp_random_graph(int(rng.integers(2, 8)), float(rng.uniform(0.3, 1)), seed=int(rng.integers(2**31)))
    graph = nx.relabel_nodes(graph, {i: f"{'cbadgfe'[i]}-T1-ED" for i in graph})
    for a, b in graph.edges:
        graph[a][b]["weight"] = float(rng.uniform(0.1, 3)) if weights == "real" else float(rng.integers(1, 4))
    nx.set_node_attributes(graph, {node: int(rng.integers(1, 4)) for node in graph}, "size")
    return graph


def brute_force_clusters(graph: nx.Graph, n_clusters: int, weight: str | None) -> set[frozenset[str]]:
    """Remove the edge with the highest betweenness by networkx; if several tie, the first by name."""
    graph = graph.copy()
    while nx.number_connected_components(graph) < n_clusters:
        found = {tuple(sorted(e)): v for e, v in nx.edge_betweenness_centrality(graph, weight=weight).items()}
        graph.remove_edge(*min(edge for edge, value in found.items() if value >= max(found.values()) * (1 - 1e-9)))
    return set(map(frozenset, nx.connected_components(graph)))


def graph_of(*edges: tuple[str, float], size: int | None = None) -> nx.Graph:
    """A graph of tasks with names of one letter, such as ``("ab", 1.0)``."""
    graph = nx.Graph()
    graph.add_weighted_edges_from((a, b, weight) for (a, b), weight in edges)
    nx.set_node_attributes(graph, {} if size is None else dict.fromkeys(graph, size), "size")
    return graph


def snapshot(graph: nx.Graph) -> tuple:
    return dict(graph.nodes(data=True)), {frozenset(e[:2]): e[2] for e in graph.edges(data=True)}


class TestClusters:
    @pytest.mark.parametrize(("weights", "weight"), [("real", "weight"), ("whole", "weight"), ("real", None)])
    def test_are_those_of_brute_force(self, rng, weights, weight):
        graph = small_graph(rng, weights=weights)
        for n_clusters in range(1, len(graph) + 1):
            found = girvan_newman_clusters(graph, n_clusters, weight=weight)
            assert set(map(frozenset, found)) == brute_force_clusters(graph, n_clusters, weight)

    @pytest.mark.parametrize("largest", [1e-3, 1.0, 1e9])
    def test_a_cost_too_small_to_make_a_path_longer_counts_as_a_millionth_of_the_largest(self, rng, largest):
        graph = small_graph(rng)
        for a, b in graph.edges:
            graph[a][b]["weight"] = float(rng.choice([0.0, 1e-3, 1.0, largest]))
        longest = max((weight for *_, weight in graph.edges(data="weight")), default=0.0) or 1.0
        whole = graph.copy()  # whole numbers, whose sums networkx finds equal
        for a, b, weight in graph.edges(data="weight"):
            whole[a][b]["weight"] = max(round(weight / longest * 1e6), 1)
        for n_clusters in range(1, len(graph) + 1):
            found = girvan_newman_clusters(graph, n_clusters)
            assert set(map(frozenset, found)) == brute_force_clusters(whole, n_clusters, "weight")

    def test_order_of_nodes_and_edges_plays_no_part_and_the_graph_stays(self, rng):
        graph = small_graph(rng, weights="whole")
        before = snapshot(graph)
        shuffled = nx.Graph()
        shuffled.add_nodes_from(rng.permutation(list(graph)).tolist())
        edges = list(graph.edges(data="weight"))
        for a, b, weight in (edges[place] for place in rng.permutation(len(edges))):
            shuffled.add_edge(b, a, weight=weight)
        n_clusters = int(rng.integers(1, len(graph) + 1))
        assert girvan_newman_clusters(graph, n_clusters) == girvan_newman_clusters(shuffled, n_clusters)
        assert snapshot(graph) == before

    def test_components_are_clusters_and_stay_apart(self):
        graph = nx.disjoint_union(nx.complete_graph(3), nx.complete_graph(2))
        for n_clusters in (1, 2):
            assert girvan_newman_clusters(graph, n_clusters, weight=None) == [{0, 1, 2}, {3, 4}]

    @pytest.mark.parametrize("rungs", [6, 9, 11])
    def test_edges_that_only_rounding_tells_apart_go_by_name(self, rungs):
        ring = nx.relabel_nodes(nx.circular_ladder_graph(rungs), "{:02}".format)
        for n_clusters in (2, 3, 4):
            found = girvan_newman_clusters(ring, n_clusters, weight=None)
            assert set(map(frozenset, found)) == brute_force_clusters(ring, n_clusters, None)

    def test_ties_are_broken_at_random_where_that_is_asked(self):
        """A ring of six can be cut at any edge; the next cut is opposite."""
        found = tied_clusterings(nx.cycle_graph(6), 2, weight=None)
        assert len(found) == 100
        halves = [{frozenset({k, k + 1, k + 2}), frozenset(range(6)) - {k, k + 1, k + 2}} for k in (1, 2, 3)]
        assert {frozenset(map(frozenset, of)) for of in found} == set(map(frozenset, halves))
        assert girvan_newman_clusters(nx.cycle_graph(6), 2, weight=None) in found
        assert tied_clusterings(nx.barbell_graph(4, 0), 2, weight=None) == [[{0, 1, 2, 3}, {4, 5, 6, 7}]]

    def test_eighty_four_tasks_in_nine_clusters(self):
        """The size of the paper's graph: a few seconds, where networkx alone would take minutes."""
        names = ["-".join(p) for p in product("0123456", ("T1", "T1CE", "T2", "FLAIR"), ("ED", "ET", "NCR"))]
        points = np.random.default_rng(0).normal(size=(84, 3))
        costs = np.linalg.norm(points[:, None] - points, axis=-1)
        graph = task_graph(names, costs, sizes=dict.fromkeys(names, 60))
        assert graph.number_of_edges() == 1722
        start = time.process_time()
        clusters = girvan_newman_clusters(graph, 9)
        assert time.process_time() - start < 4
        assert len(clusters) == 9
        assert set().union(*clusters) == set(names)

    def test_one_task_is_one_cluster(self):
        graph = nx.Graph()
        graph.add_node("13-T1-ED", size=3)
        assert girvan_newman_clusters(graph, 1) == [{"13-T1-ED"}]
        assert cluster_representatives(graph, [{"13-T1-ED"}]) == ["13-T1-ED"]


def brute_force_paths(graph, target_costs, clusters, representatives, longest) -> list[tuple[float, tuple[str, ...]]]:
    """Every path there is, with its cost by the definition."""
    found = []
    for first, cluster in zip(representatives, clusters, strict=True):
        others = [task for task in cluster if task != first]
        for n in range(1 if longest else 0, longest + 1):
            for tail in permutations(others, n):
                tasks = (first, *tail)
                if all(graph.has_edge(a, b) for a, b in pairwise(tasks)) and {first, tasks[-1]} <= set(target_costs):
                    along = sum(graph[a][b]["weight"] for a, b in pairwise(tasks))
                    end = target_costs[tasks[-1]] if n else 0.0
                    found.append((target_costs[first] + along + end, tasks))
    return sorted(found)


class TestPaths:
    @pytest.mark.parametrize("longest", [0, 1, 2, 3])
    def test_are_those_of_brute_force(self, rng, longest):
        graph = small_graph(rng)
        clusters = girvan_newman_clusters(graph, int(rng.integers(1, min(4, len(graph) + 1))))
        first = cluster_representatives(graph, clusters)
        costs = {node: float(rng.uniform(0, 3)) for node in graph if rng.uniform() < 0.8}
        expected = brute_force_paths(graph, costs, clusters, first, longest)
        if not expected:
            with pytest.raises(NoPathError):
                optimal_transfer_path(graph, costs, clusters, first, max_intermediates=longest)
            return
        found = optimal_transfer_path(graph, costs, clusters, first, max_intermediates=longest, k=4)
        assert [path.tasks for path in found] == [tasks for _, tasks in expected[:4]]
        assert [path.cost for path in found] == pytest.approx([cost for cost, _ in expected[:4]])

    @pytest.mark.parametrize("turned", [False, True])
    def test_sums_that_differ_in_their_last_bit_are_ties(self, turned):
        """0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1."""
        graph = graph_of(("ax", 0.2), ("by", 0.2))
        costs = {"a": 0.1, "x": 0.3, "b": 0.3, "y": 0.1}
        if turned:
            costs = {"a": 0.3, "x": 0.1, "b": 0.1, "y": 0.3}
        paths = optimal_transfer_path(graph, costs, [{"a", "x"}, {"b", "y"}], ["a", "b"])
        assert [path.tasks for path in paths] == [("a", "x"), ("b", "y")]

    def test_ties_go_by_name(self):
        graph = graph_of(("ac", 1.0), ("ab", 1.0), ("bc", 1.0))
        found = optimal_transfer_path(graph, dict.fromkeys("abc", 1.0), [set("cab")], ["a"])
        assert [path.tasks for path in found] == [("a", "b"), ("a", "c")]

    @pytest.mark.parametrize("costs", [{}, {"a": math.inf, "b": math.inf}, {"b": 1.0}, {"a": 1.0}, {"c": 1.0}])
    def test_there_may_be_none(self, costs):
        graph = graph_of(("ab", 1.0))
        graph.add_node("c")
        with pytest.raises(NoPathError, match=r"to no representative .* one task each"):
            optimal_transfer_path(graph, costs, [{"a", "b"}, {"c"}], ["a", "c"])


class TestRepresentatives:
    def test_by_size_then_cost_then_name(self):
        graph = graph_of(("ab", 3.0), ("bc", 1.0), ("ac", 3.0), ("de", 1.0))
        sizes = {"a": 9, "b": 9, "c": 1, "d": 2, "e": 2, "f": 1}
        graph.add_node("f")
        nx.set_node_attributes(graph, sizes, "size")
        assert cluster_representatives(graph, [set("abc"), set("ed"), {"f"}]) == ["b", "d", "f"]

    @pytest.mark.parametrize("rule", ["size", "weighted_centroid"])
    def test_symmetric_tasks_go_by_name_in_whatever_order_they_came(self, rule):
        costs = {"ab": 0.1, "ac": 0.2, "ad": 0.3, "bc": 0.3, "bd": 0.2, "cd": 0.1}
        for order in permutations("abcd"):
            graph = graph_of(*((a + b, costs["".join(sorted(a + b))]) for a, b in combinations(order, 2)), size=5)
            assert cluster_representatives(graph, [set("abcd")], rule=rule) == ["a"]

    def test_centroid_weighs_the_others_by_size(self):
        graph = graph_of(("ab", 1.0), ("ac", 2.0), ("bc", 4.0))
        nx.set_node_attributes(graph, {"a": 100, "b": 1, "c": 1}, "size")
        # a: (1 + 2) / 2; b: (100 + 4) / 101, where the mean without sizes is 2.5; c: (200 + 4) / 101
        assert cluster_representatives(graph, [set("abc")], rule="weighted_centroid") == ["b"]


NAMES = ("13-T1-ED", "13-T2-ED", "14-T2-ET", "14-FLAIR-NCR")


def build(**change):
    return task_graph(**{"tasks": NAMES, "costs": np.ones((4, 4)), "sizes": dict.fromkeys(NAMES, 5)} | change)


class TestTaskGraph:
    def test_joins_what_shares_modality_or_objective(self):
        costs = np.full((4, 4), np.nan)
        costs[0, 1] = costs[1, 0] = costs[1, 2] = costs[2, 1] = 2.0
        assert sorted(build(costs=costs).edges) == [("13-T1-ED", "13-T2-ED"), ("13-T2-ED", "14-T2-ET")]

    def test_is_read_back_as_it_was_written(self, tmp_path):
        graph = build()
        write_task_graph(graph, tmp_path / "g.json", clusters=[set(NAMES[:2]), set(NAMES[2:])])
        read = read_task_graph(tmp_path / "g.json")
        assert {node: data.pop("cluster") for node, data in read.nodes(data=True)}["14-T2-ET"] == 1
        assert snapshot(read) == snapshot(graph)
        write_task_graph(graph, tmp_path / "g.graphml", clusters=[set(NAMES)])
        assert nx.read_graphml(tmp_path / "g.graphml").nodes["13-T1-ED"]["cluster"] == 0
        assert snapshot(graph) == snapshot(build())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "holds no task graph .*No such file"),
            ("{", "holds no task graph"),
            ("[]", "holds no task graph"),
            ("{}", "holds no task graph"),
            ([{"id": "a", "size": 1}] * 2, "names a task twice"),
            ([{"id": "a"}], "has no size of a"),
        ],
    )
    def test_what_is_no_task_graph_is_refused(self, content, message, tmp_path):
        if isinstance(content, list):
            content = json.dumps({"directed": False, "multigraph": False, "graph": {}, "nodes": content, "edges": []})
        if content is not None:
            (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_task_graph(tmp_path / "bad.json")


def clustered(graph, n_clusters=1, weight=None):
    return girvan_newman_clusters(graph, n_clusters, weight=weight)


def paths(**change):
    given = {"target_costs": {"a": 1.0, "b": 1.0}, "clusters": [{"a", "b"}], "representatives": ["a"]} | change
    return optimal_transfer_path(graph_of(("ab", 1.0)), **given)


def represented(rule="size", size=None):
    return cluster_representatives(graph_of(("ab", 1.0), size=size), [{"a", "b"}], rule=rule)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        *((partial(clustered, nx.path_graph(3), n), "n_clusters is .* 1 to 3") for n in (0, 4)),
        *(
            (partial(clustered, nx.Graph([("a", "b", {"weight": wrong})]), 1, "weight"), "edge between a and b has wei")
            for wrong in (-1.0, math.nan, math.inf, None, "far")
        ),
        *((partial(clustered, g), "^graph ") for g in (nx.DiGraph([(0, 1)]), nx.MultiGraph([(0, 1)]), "", nx.Graph())),
        (partial(paths, target_costs={"a": -1.0}), "target_costs says -1.0 for a"),
        (partial(paths, target_costs={"z": 1.0}), "target_costs names z"),
        (partial(paths, representatives=["z"]), "expected one task of each of the clusters"),
        (partial(paths, representatives=[]), "expected one task of each of the clusters"),
        (partial(paths, clusters=[{"a", "z"}]), "expected sets of the graph's tasks"),
        (partial(paths, clusters=[{"a"}, {"a"}], representatives=["a", "a"]), "no task in two"),
        (partial(paths, clusters=[set()]), "none empty"),
        (partial(paths, max_intermediates=-1), "max_intermediates is -1"),
        (partial(paths, k=0), "k is 0"),
        (represented, "task a has size None"),
        (partial(represented, rule="largest", size=1), "rule"),
        (partial(build, costs=np.ones((3, 3))), r"costs has shape \(3, 3\); expected 4 x 4"),
        (partial(build, costs=np.arange(16.0).reshape(4, 4)), "are 1 and 4; expected the same"),
        (partial(build, costs=-np.ones((4, 4))), "has weight -1.0"),
        (partial(build, costs=np.full((4, 4), np.nan)), "has weight nan"),
        (partial(build, tasks=["13-T1-ED"] * 4), "13-T1-ED twice"),
        (partial(build, tasks=["13-T1-ED", "13-T2-ED", "14-T2-ET", "nonsense"]), "'nonsense' is not of the form"),
        (partial(build, sizes={}), "size of 13-T1-ED is None"),
        (lambda: write_task_graph(build(), "g.png"), "ending"),
    ],
)
def test_what_makes_no_sense_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()
