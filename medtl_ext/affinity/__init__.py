r"""How similar two tasks are, from their labels and images only. No network is trained or run.

- `labels`: structural similarity of label volumes, all pairs as one matrix product (SeqTran, PriorSel); Dice of two
  tasks' mean label maps; shape descriptors of the regions of interest (RoI) of two tasks, and their similarity.
- `images`: distance of image volumes by their principal components (SeqTran), with one principal component analysis and
  one sort per image, not per pair.
- `tasks`: combines both into one cost (lower means more similar), and fits its weights to measured transfers.
- `context`: a cost from intensities in and around the RoI, its shape, and intensities of the body.

Volumes are X x Y x Z or X x Y, arrays or tensors, all 2D or all 3D in one call. A leading channel axis of length one is
dropped. A set of volumes is any iterable; with a generator that reads from disk, only one image is in memory at a time.
Voxels are compared by index, so all volumes should have the same orientation. Labels hold 0 and 1 only, one class at a
time: SSIM assumes the range 1.

SeqTran: Yang et al., *Selecting the Best Sequential Transfer Path for Medical Image Segmentation with Limited Labeled
Data*. PriorSel: Li et al., *Finding the Most Transferable Tasks for Brain Image Segmentation*, BIBM 2022.
"""

from medtl_ext.affinity.context import TaskContext, pairwise_context, task_context
from medtl_ext.affinity.images import image_quantiles, pairwise_wasserstein, quantile_distance
from medtl_ext.affinity.labels import (
    SHAPE_DESCRIPTORS,
    SHAPE_SCALES,
    mean_label_dice,
    pairwise_ssim,
    shape_descriptors,
    shape_similarity,
)
from medtl_ext.affinity.tasks import PUBLISHED_WEIGHTS, fit_affinity_weights, task_affinity

__all__ = [
    "PUBLISHED_WEIGHTS",
    "SHAPE_DESCRIPTORS",
    "SHAPE_SCALES",
    "TaskContext",
    "fit_affinity_weights",
    "image_quantiles",
    "mean_label_dice",
    "pairwise_context",
    "pairwise_ssim",
    "pairwise_wasserstein",
    "quantile_distance",
    "shape_descriptors",
    "shape_similarity",
    "task_affinity",
    "task_context",
]
