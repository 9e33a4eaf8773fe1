"""The task graph as a picture: clusters, sizes, and the chosen path in bold (SeqTran, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import networkx as nx
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from medtl_ext.visualize import CLASS_COLOURS

GREY, BOLD = "#6b6b6b", "#000000"
CLUSTER_COLOURS = (*CLASS_COLOURS, "#999999", "#8c510a", "#b2df8a")  # the paper's graph has nine clusters
MOST_EDGES = 400  # more would be a grey disc: then only the shortest are drawn


def plot_task_graph(
    graph: nx.Graph,
    clusters: Sequence[Sequence[str]],
    *,
    representatives: Sequence[str] = (),
    path: Sequence[str] | None = None,
    target: str | None = None,
    target_costs: Mapping[str, float] | None = None,
    title: str = "",
    synthetic: bool = False,
) -> Figure:
    """Tasks near each other where their cost is low, coloured by cluster, as large as their samples are many.

    Args:
        graph: of `medtl_ext.graph.task_graph`.
        clusters: tasks of each cluster; representatives have a black ring.
        representatives: one task of each cluster.
        path: source tasks in order, drawn in bold on to the ``target``.
        target: a star, placed by its costs.
        target_costs: source task -> cost to the target.
        title: above the figure.
        synthetic: print "synthetic phantom" below.
    """
    drawn = graph.copy()
    if target is not None:
        drawn.add_node(target)
        drawn.add_weighted_edges_from((target, task, cost) for task, cost in (target_costs or {}).items())
    places = _layout(drawn)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    edges = sorted(graph.edges(data="weight"), key=lambda edge: edge[2])[:MOST_EDGES]
    nx.draw_networkx_edges(graph, places, edgelist=[e[:2] for e in edges], ax=axes, edge_color=GREY, alpha=0.15)
    largest = max(size for _, size in graph.nodes(data="size"))
    for number, cluster in enumerate(clusters):
        colour = CLUSTER_COLOURS[number % len(CLUSTER_COLOURS)]
        ringed = np.isin(list(cluster), list(representatives))
        ring = {"edgecolors": np.where(ringed, "black", "white"), "linewidths": np.where(ringed, 1.6, 0.6)}
        sizes = [60 + 340 * graph.nodes[task]["size"] / largest for task in cluster]
        axes.scatter(*np.transpose([places[task] for task in cluster]), s=sizes, c=colour, zorder=2, **ring)
        axes.scatter([], [], s=64, c=colour, label=f"cluster {number}")
    if target is not None:
        axes.scatter(*places[target], s=480, c=BOLD, marker="*", zorder=2)
        axes.scatter([], [], s=121, c=BOLD, marker="*", label="target")
    if path:
        axes.plot([], [], color=BOLD, linewidth=2.4, label="best path")
    for a, b in pairwise([*(path or ()), *([target] if path and target else [])]):
        arrow = {"arrowstyle": "-|>", "color": BOLD, "linewidth": 2.4, "shrinkA": 9, "shrinkB": 9, "mutation_scale": 16}
        axes.annotate("", xy=places[b], xytext=places[a], arrowprops=arrow)
    outline = [withStroke(linewidth=2.5, foreground="white")]
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "path_effects": outline}
    for task, place in places.items():
        weight = "bold" if task in {*(path or ()), target} else "normal"
        axes.annotate(task, place, (0, -17), fontweight=weight, **style)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    note = "size: labelled samples; near: low cost; black ring: representative of its cluster"
    figure.supxlabel(f"synthetic phantom; {note}" if synthetic else note, fontsize=7, color=GREY, x=0.01, ha="left")
    return figure


def _layout(graph: nx.Graph) -> dict[str, np.ndarray]:
    """Springs that pull as the cost is low; the same picture in every run."""
    costs = np.array([cost for *_, cost in graph.edges(data="weight")])
    unit = float(np.median(costs[costs > 0])) if (costs > 0).any() else 1.0
    pulled = nx.Graph()
    pulled.add_nodes_from(sorted(graph))
    pulled.add_weighted_edges_from((a, b, 1 / (0.2 + cost / unit)) for a, b, cost in graph.edges(data="weight"))
    return nx.spring_layout(pulled, seed=0, iterations=200, k=2.2 / np.sqrt(len(pulled)))
