"""Which path of sources leads to my target, and is it worth it? What the bundle ``sequential_transfer`` is made of.

- `affinities`: how near two tasks are, a part that can be exchanged.
- `plan`: source graph and path. `chain`: the trainings along it, and what they are compared with.
- `study`: every path to several targets, and weights of the affinity fitted to transfers.
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
