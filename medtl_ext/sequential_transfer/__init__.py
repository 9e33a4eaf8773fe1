"""Which path of sources leads to my target, and is it worth it? The parts of the bundle ``sequential_transfer``.

- `affinities`: how similar two tasks are; you can replace it by a function of your own.
- `plan`: source graph and path. `chain`: the trainings along the path, and those it is compared with.
- `study`: every path to several targets, and weights of the affinity that are fitted to transfers.
"""

from medtl_ext.sequential_transfer.affinities import TaskVolumes, affinity_name
from medtl_ext.sequential_transfer.chain import FollowPath, NoteLEEP
from medtl_ext.sequential_transfer.plan import PlanPath, SourceGraph
from medtl_ext.sequential_transfer.study import FitWeights, StudyPaths

__all__ = [
    "FitWeights",
    "FollowPath",
    "NoteLEEP",
    "PlanPath",
    "SourceGraph",
    "StudyPaths",
    "TaskVolumes",
    "affinity_name",
]
