"""The average brain the phantom is made from: the MNI152 template and tissue maps that nilearn carries in its wheel.

ICBM 2009 nonlinear symmetric template, Fonov et al., NeuroImage 54 (2011) 313-327. Nothing is downloaded.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

MARGIN = 12  # mm (and voxels) of empty space around the brain, so that a deformed brain finds background there


@dataclass(frozen=True)
class ScalarMap:
    """A 3D map with isotropic voxels; ``spacing`` and ``origin`` (centre of voxel 0, 0, 0) in MNI mm."""

    values: np.ndarray
    spacing: float
    origin: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """Linear interpolation at MNI positions ``points`` (3, ...); the border value outside the map."""
        origin = np.reshape(self.origin, (3,) + (1,) * (points.ndim - 1)).astype(np.float32)
        coordinates = (points - origin) / np.float32(self.spacing)
        return ndimage.map_coordinates(self.values, coordinates, order=1, mode="nearest", output=np.float32)


@dataclass(frozen=True)
class Atlas:
    """Tissue fractions of grey and white matter, and signed distances in mm (negative inside)."""

    grey: ScalarMap
    white: ScalarMap
    to_brain: ScalarMap
    to_ventricles: ScalarMap


@lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Read the template and derive the distance maps, once per process (about a second)."""
    from nilearn import datasets  # slow to import, and only generating needs it

    template = datasets.load_mni152_template(resolution=1)
    tissues = datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1)
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in (template, *tissues))

    (inside,) = ndimage.find_objects((t1 > 0.1).astype(np.uint8))
    box = tuple(slice(max(part.start - MARGIN, 0), part.stop + MARGIN) for part in inside)
    origin = template.affine[:3, 3] + [part.start for part in box]
    t1, grey, white = (np.ascontiguousarray(values[box]) for values in (t1, grey, white))

    # Distances are smooth, so every second voxel is enough for them and eight times cheaper.
    t1_2mm, tissue_2mm = t1[::2, ::2, ::2], (grey + white)[::2, ::2, ::2]
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(t1_2mm > 0.1))
    to_brain = _signed_distance(brain, spacing=2.0)
    fluid = brain & (tissue_2mm < 0.5) & (t1_2mm < 0.55)
    ventricles = _ventricles(fluid & (to_brain < -6), origin)
    to_ventricles = _signed_distance(ventricles, spacing=2.0)
    tissues = (ScalarMap(values, 1.0, origin) for values in (grey, white))
    distances = (ScalarMap(values, 2.0, origin) for values in (to_brain, to_ventricles))
    return Atlas(*tissues, *distances)


def _signed_distance(mask: np.ndarray, spacing: float) -> np.ndarray:
    """Distance to the boundary of ``mask`` in mm, negative inside; smoothed a little so that contours have no steps."""
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    return ndimage.gaussian_filter((spacing * (outside - inside)).astype(np.float32), 0.5)


def _ventricles(deep_fluid: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """The part of the deep fluid that is ventricle: by position, without cisterns and stray voxels (2 mm grid)."""
    x, y, z = np.ogrid[tuple(slice(0, n) for n in deep_fluid.shape)]
    x, y, z = (2 * index + start for index, start in zip((x, y, z), origin, strict=True))
    around_ventricles = (abs(x) < 40) & (y > -62) & (y < 45) & (z > -22) & (z < 34)
    quadrigeminal_cistern = (abs(x) < 13) & (y < -22) & (z < 16)
    parts, n_parts = ndimage.label(deep_fluid & around_ventricles & ~quadrigeminal_cistern)
    sizes = np.bincount(parts.ravel(), minlength=n_parts + 1)
    sizes[0] = 0
    return (sizes > 20)[parts]
