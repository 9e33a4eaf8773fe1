"""Which path of sources leads to my target, and is it worth it? What the bundle ``sequential_transfer`` is made of."""

from medtl_ext.sequential_transfer.affinities import (
    Affinity,
    ContextAffinity,
    SeqTranAffinity,
    TaskVolumes,
    affinity_costs,
    affinity_name,
    find_affinity,
)
from medtl_ext.sequential_transfer.chain import Arm, Chains, arms_of, follow_path, for_task, note_leep, second_step_text
from medtl_ext.sequential_transfer.fit import fit_weights
from medtl_ext.sequential_transfer.plan import (
    Plan,
    SourceGraph,
    check_options,
    draw_patients,
    graph_text,
    plan_path,
    plan_text,
    shares,
    source_graph,
    task_volumes,
    write_plan,
)
from medtl_ext.sequential_transfer.plots import plot_task_graph
from medtl_ext.sequential_transfer.study import study_paths, study_text

__all__ = [
    "Affinity",
    "Arm",
    "Chains",
    "ContextAffinity",
    "Plan",
    "SeqTranAffinity",
    "SourceGraph",
    "TaskVolumes",
    "affinity_costs",
    "affinity_name",
    "arms_of",
    "check_options",
    "draw_patients",
    "find_affinity",
    "fit_weights",
    "follow_path",
    "for_task",
    "graph_text",
    "note_leep",
    "plan_path",
    "plan_text",
    "plot_task_graph",
    "second_step_text",
    "shares",
    "source_graph",
    "study_paths",
    "study_text",
    "task_volumes",
    "write_plan",
]
