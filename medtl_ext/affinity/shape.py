"""Shape and place of the region of interest in a few numbers, and how alike two tasks are in them."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage, special

from medtl_ext._validation import InputError, warn
from medtl_ext.affinity._volumes import Reader, binary, bounding_box, voxel_size

#: What `shape_descriptors` measures, in 2D and in 3D.
SHAPE_DESCRIPTORS = {
    2: ("log_volume", "log_components", "elongation", "compactness", "centre_0", "centre_1"),
    3: ("log_volume", "log_components", "elongation", "flatness", "compactness", "centre_0", "centre_1", "centre_2"),
}

#: The difference in each descriptor that counts as one in `shape_similarity`: on 38 tasks of the phantom, the standard
#: deviation between the means of tasks or that between the patients of one task, whichever is larger, rounded.
SHAPE_SCALES = {"log_volume": 2.0, "log_components": 1.5, "elongation": 0.1, "flatness": 0.1, "compactness": 1.5}
SHAPE_SCALES |= dict.fromkeys(("centre_0", "centre_1", "centre_2"), 0.1)


def shape_descriptors(labels: Iterable[ArrayLike], spacing: ArrayLike = 1.0) -> torch.Tensor:
    r"""A few numbers on the shape and place of what each volume labels, in columns that `SHAPE_DESCRIPTORS` names.

    With :math:`\lambda_1 \ge \lambda_2 \ge \lambda_3` the principal variances of its extent in mm (each voxel a box):

    - ``log_volume``: ln of the volume in mm3 (in 2D, of the area in mm2);
    - ``log_components``: ln of the number of connected components; voxels that share a corner are connected;
    - ``elongation``: :math:`\ln \sqrt{\lambda_1 / \lambda_2}`, 0 for a ball or a disc;
    - ``flatness``, in 3D: :math:`\ln \sqrt{\lambda_2 / \lambda_3}`, 0 for a ball or a rod;
    - ``compactness``: ln of the volume over that of the solid ellipsoid with the same variances: 0 for that ellipsoid,
      -0.12 for a cube, lower for a shell, and lowest for scattered parts;
    - ``centre_0`` and so on: where the centre of mass is along each axis, from the middle of the volume, in units of
      the volume's extent.

    Args:
        labels: N label volumes of 0 and 1, 2D or 3D, read one at a time.
        spacing: size of a voxel in mm: a number, one per axis, or N rows of one per axis.

    Returns:
        N x 6 (2D) or N x 8 (3D), float64. A volume without labelled voxel has no shape: its row is NaN, with a
        `UserWarning`, and `shape_similarity` leaves it out.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> label = np.zeros((8, 8))
        >>> label[2:6, 4:6] = 1  # 2 mm x 1 mm, right of the middle
        >>> shape_descriptors([label], spacing=0.5).numpy().round(3)
        array([[ 0.693,  0.   ,  0.693, -0.046,  0.   ,  0.125]])
    """
    reader, rows, empty = Reader(), [], []
    for index, (name, volume) in enumerate(reader.volumes("labels", labels)):
        label = binary(name, volume)
        if label.any():
            rows.append(_describe(label, voxel_size(spacing, index, label.ndim)))
        else:
            rows.append(np.full(len(SHAPE_DESCRIPTORS[label.ndim]), np.nan))
            empty.append(name)
    if empty:
        warn(f"Nothing is labelled in {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}: no shape there, NaN.")
    return reader.tensor(np.stack(rows))


def shape_similarity(descriptors_a: ArrayLike, descriptors_b: ArrayLike) -> torch.Tensor:
    r"""How alike the mean shapes of two tasks are.

    .. math:: \exp \left( -\tfrac1D \textstyle\sum_j |\bar a_j - \bar b_j| / s_j \right)

    with the scales s of `SHAPE_SCALES`.

    Args:
        descriptors_a: Na x D, from `shape_descriptors`. Rows with NaN, of volumes without RoI, are left out.
        descriptors_b: Nb x D.

    Returns:
        A float64 scalar in (0, 1], higher is more alike, 1 for equal means; 0, with a `UserWarning`, if a side has no
        shape at all.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> cube, rod = np.zeros((9, 9, 9)), np.zeros((9, 9, 9))
        >>> cube[3:6, 3:6, 3:6] = 1
        >>> rod[4, 4] = 1
        >>> shape_similarity(shape_descriptors([cube]), shape_descriptors([cube, rod]))
        tensor(0.2447, dtype=torch.float64)
    """
    reader = Reader()
    a, b = reader.arrays(rows=True, allow_nan=True, descriptors_a=descriptors_a, descriptors_b=descriptors_b)
    names = {len(names): names for names in SHAPE_DESCRIPTORS.values()}.get(a.shape[1])
    if names is None:
        raise InputError(f"descriptors_a has {a.shape[1]} columns; expected those of shape_descriptors.")
    a, b = (rows[~np.isnan(rows).any(axis=1)] for rows in (a, b))
    if not len(a) or not len(b):
        warn(f"descriptors_{'b' if len(a) else 'a'} describes no shape at all, so the similarity is 0.")
        return reader.tensor(0.0)
    scales = [SHAPE_SCALES[name] for name in names]
    return reader.tensor(np.exp(-np.mean(np.abs(a.mean(axis=0) - b.mean(axis=0)) / scales)))


def _describe(label: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    ndim, box = label.ndim, bounding_box(label)
    voxels = np.argwhere(label[box])
    variances = np.atleast_2d(np.cov(voxels * spacing, rowvar=False, ddof=0)) + np.diag(spacing**2 / 12)
    radii = np.sqrt((ndim + 2) * np.linalg.eigvalsh(variances)[::-1])
    volume = len(voxels) * np.prod(spacing)
    ellipsoid = np.pi ** (ndim / 2) / special.gamma(ndim / 2 + 1) * np.prod(radii)
    components = ndimage.label(label[box], structure=np.ones((3,) * ndim))[1]
    centre = voxels.mean(axis=0) + 0.5 + [side.start for side in box]
    descriptors = [
        np.log([volume, components]),
        np.log(radii[:-1] / radii[1:]),
        np.log([volume / ellipsoid]),
        centre / label.shape - 0.5,
    ]
    return np.concatenate(descriptors)
