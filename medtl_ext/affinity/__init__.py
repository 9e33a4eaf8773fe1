r"""How near two tasks are, from their labels and images alone: no network is trained or run.

- `labels`: structural similarity of label volumes, all pairs as one matrix product (SeqTran, PriorSel), the Dice of two
  tasks' mean label maps, and descriptors of the regions of interest (RoI) of two tasks with their similarity.
- `images`: distance of image volumes through their principal components (SeqTran), with one principal component
  analysis and one sort per image, not per pair.
- `tasks`: the two put into one cost, lower is nearer, and its weights fitted to transfers that were measured.
- `context`: a cost that looks at intensities in and around the RoI, at its shape, and at the body.

Volumes are X x Y x Z or X x Y, arrays or tensors, all of one call in 2D or all in 3D; a channel axis of length one in
front is dropped. A set of volumes is any iterable; one that reads from disk as it goes, such as a generator, never has
more than one image in memory. Voxels are compared by their index, so volumes should be oriented alike. Labels hold 0
and 1 only, one class at a time: SSIM takes their range to be 1.

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
