"""Scores of the segmentation of one class of one patient, besides Dice: surfaces, lesions and volumes."""

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance
from numpy.typing import ArrayLike
from scipy import ndimage

from medtl_ext._validation import InputError


def compute_segmentation_scores(segmentation: ArrayLike, truth: ArrayLike, affine: ArrayLike) -> dict[str, float]:
    """Surface distances, detected lesions, and volumes of one class of one patient.

    Empty masks follow one rule, also for Dice and IoU (MONAI's ``ignore_empty=False``). If truth and segmentation are
    both empty, every score has its best value (1; distances 0). If only one is empty, every score has its worst value
    (0; distances are the diagonal of the image).

    Args:
        segmentation, truth: masks of the class, *spatial. Axes of one voxel have no surface and count for volume only.
        affine: 4 x 4, from voxels to mm. It gives the spacing along each axis for surfaces, and the determinant for
            volumes. With the identity, as for pictures, mm are pixels, and ml are thousands of pixels.

    Returns:
        ``hd95_mm``: 95th percentile of the Hausdorff distance, the larger of both directions. ``assd_mm``: average
        symmetric surface distance, the mean over the voxels of both surfaces. ``lesion_recall``, ``lesion_precision``:
        share of the connected components (corners connect) of the truth, and of the segmentation, that overlap the
        other mask by at least a voxel. ``volume_ml``, ``truth_ml``: volumes of segmentation and truth.

    Raises:
        InputError: segmentation and truth differ in shape.

    Example:
        >>> truth, found = np.zeros((8, 8, 1)), np.zeros((8, 8, 1))
        >>> truth[1:3, 1:3], truth[6, 6], found[1:3, 2:4] = 1, 1, 1
        >>> scores = compute_segmentation_scores(found, truth, np.diag([2, 2, 5, 1]))
        >>> {name: round(value, 2) for name, value in scores.items() if name != "volume_ml"}
        {'hd95_mm': 8.4, 'assd_mm': 2.0, 'lesion_recall': 0.5, 'lesion_precision': 1.0, 'truth_ml': 0.1}

    Reference: Maier-Hein et al., *Metrics reloaded: recommendations for image analysis validation*, Nature Methods,
    2024.
    """
    found, real, affine = np.asarray(segmentation) > 0, np.asarray(truth) > 0, np.asarray(affine, dtype=float)
    if found.shape != real.shape:
        raise InputError(f"segmentation {found.shape} and truth {real.shape} differ in shape; expected the same grid.")
    axes = [axis for axis, size in enumerate(found.shape) if size > 1] or [0]
    spacing, shape = np.linalg.norm(affine[:-1, axes], axis=0), [found.shape[axis] for axis in axes]
    found, real = found.reshape(shape), real.reshape(shape)
    voxel_ml = abs(np.linalg.det(affine[:-1, :-1])) / 1000
    volumes = {"volume_ml": float(found.sum() * voxel_ml), "truth_ml": float(real.sum() * voxel_ml)}
    if not (found.any() and real.any()):
        best = not (found.any() or real.any())
        far = 0.0 if best else float(np.linalg.norm(spacing * shape))
        shares = dict.fromkeys(("lesion_recall", "lesion_precision"), float(best))
        return dict.fromkeys(("hd95_mm", "assd_mm"), far) | shares | volumes
    (box,) = ndimage.find_objects((found | real).astype(np.uint8))
    found, real = found[box], real[box]
    edges = get_mask_edges(found, real)
    distances = [get_surface_distance(*pair, spacing=spacing).astype(float) for pair in (edges, edges[::-1])]
    hd95 = max(float(np.percentile(one, 95)) for one in distances)
    scores = {"hd95_mm": hd95, "assd_mm": float(np.concatenate(distances).mean())}
    return scores | {"lesion_recall": _share(real, found), "lesion_precision": _share(found, real)} | volumes


def _share(mask: np.ndarray, other: np.ndarray) -> float:
    """Share of the connected components of a mask that overlap the other mask."""
    parts, count = ndimage.label(mask, np.ones([3] * mask.ndim))
    return len(np.unique(parts[mask & other])) / count
