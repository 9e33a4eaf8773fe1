"""Source selection: candidate sources ranked for a target, filtered as PriorSel does, and held against the truth.

- `candidates`: tasks, checkpoints and MONAI bundles, read without running anything in them.
- `observe`: one evaluator pass of each source over the target's training set.
- `scores`, `priors`: transferability by name; tags, sizes and similarity of the regions of interest.
- `pipeline`: the steps of the bundle ``source_selection``.
- `truth`: every source fine-tuned, and what the rankings were worth.
- `study`: the same for several targets and seeds.
"""

from medtl_ext.selection.candidates import Candidate, find_candidates
from medtl_ext.selection.observe import Maps, Observation, Observed, Predictions, keep_pixels, observe
from medtl_ext.selection.pipeline import check_options, score_sources, select_source, train_pool
from medtl_ext.selection.priors import filter_by_priors, prior_table
from medtl_ext.selection.scores import METRICS, score_of_counts
from medtl_ext.selection.study import study_selection
from medtl_ext.selection.truth import evaluate_selection

__all__ = [
    "METRICS",
    "Candidate",
    "Maps",
    "Observation",
    "Observed",
    "Predictions",
    "check_options",
    "evaluate_selection",
    "filter_by_priors",
    "find_candidates",
    "keep_pixels",
    "observe",
    "prior_table",
    "score_of_counts",
    "score_sources",
    "select_source",
    "study_selection",
    "train_pool",
]
