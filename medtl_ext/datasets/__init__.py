"""Dataset transferability: which source dataset for a classification target? The steps of that bundle's configs.

- `sources`: datasets by name or path, candidate sources, and the pool of networks trained on them.
- `scoring`: one evaluator pass of each source over the target's training images, and all scores from it.
- `pipeline`: the ranking, its verdict and the files of a run.
- `truth`: every source fine-tuned on the target, and what the rankings were worth.
- `study`: the same for several targets and seeds.
- `published`: the paper's Table 2 from its published raw scores.
"""

from medtl_ext.data.classification import sample_per_class
from medtl_ext.datasets.pipeline import check_options, rank_sources
from medtl_ext.datasets.published import reproduce_table2
from medtl_ext.datasets.scoring import METRICS, observe, score_table
from medtl_ext.datasets.sources import (
    Source,
    dataset_path,
    find_sources,
    images_to_classify,
    initialized,
    open_dataset,
    train_pool,
)
from medtl_ext.datasets.study import study_datasets
from medtl_ext.datasets.truth import evaluate_ranking, rank_own_model, score_images, train

__all__ = [
    "METRICS",
    "Source",
    "check_options",
    "dataset_path",
    "evaluate_ranking",
    "find_sources",
    "images_to_classify",
    "initialized",
    "observe",
    "open_dataset",
    "rank_own_model",
    "rank_sources",
    "reproduce_table2",
    "sample_per_class",
    "score_images",
    "score_table",
    "study_datasets",
    "train",
    "train_pool",
]
