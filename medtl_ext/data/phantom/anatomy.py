"""One subject's healthy brain: the deformed atlas, and the share of every voxel that each tissue fills."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from medtl_ext.data.phantom.atlas import Atlas
from medtl_ext.data.phantom.fields import grid_points, smooth_noise

TISSUE_LABELS = {"CSF": 1, "GM": 2, "WM": 3}

BRAIN_CENTRE = np.array([0.0, -17.0, 10.0], np.float32)  # mm
ROTATION = (2.5, 3.0, 4.0)  # standard deviation, degrees about x, y, z
TRANSLATION = 0.8  # standard deviation, mm
# The MNI152 brain is larger than most: a typical brain is a few per cent smaller along each axis.
SIZE_SPREAD, SIZE_RANGE = 0.025, (0.95, 1.04)  # of one axis, relative to the cohort's mean size
# Displacement of the elastic deformation at each scale, mm. Stronger ones give lumpy heads.
ELASTIC = ((70.0, 2.2), (30.0, 1.1), (12.0, 0.7))


@dataclass
class Anatomy:
    """A subject's brain. ``fractions`` of all classes sum to 1 in every voxel; distances in mm, negative inside."""

    brain: np.ndarray
    to_brain: np.ndarray
    to_ventricles: np.ndarray
    fractions: dict[str, np.ndarray]

    def replace(self, name: str, share: np.ndarray) -> None:
        """Give class ``name`` a ``share`` (0 to 1) of every voxel, taken from the classes that are there."""
        for fraction in self.fractions.values():
            fraction *= 1 - share
        self.fractions[name] = self.fractions.get(name, 0) + share.astype(np.float32)

    def tissue_label(self) -> np.ndarray:
        """The tissue that fills most of each brain voxel, as `TISSUE_LABELS`; ventricles are CSF; background 0."""
        winner = np.argmax([self.fractions[name] for name in ("CSF", "GM", "WM", "ventricle")], axis=0)
        values = np.array([TISSUE_LABELS[name] for name in ("CSF", "GM", "WM", "CSF")], np.uint8)
        return values[winner] * self.brain


def deform(stream: np.random.Generator, *, size: float) -> np.ndarray:
    """Where in the atlas each voxel of the subject comes from: MNI positions (3, X, Y, Z).

    ``size`` is the mean length of the cohort's brains relative to the atlas.
    """
    rotation = Rotation.from_euler("xyz", stream.normal(0, ROTATION), degrees=True).as_matrix()
    scale = size * np.clip(stream.normal(1, SIZE_SPREAD, 3), *SIZE_RANGE)
    translation = stream.normal(0, TRANSLATION, 3)
    offset = grid_points() - BRAIN_CENTRE[:, None, None, None]
    affine = (rotation / scale).astype(np.float32)  # the inverse scaling: from the subject back to the atlas
    points = np.einsum("ij,jxyz->ixyz", affine, offset)
    points += (BRAIN_CENTRE + translation).astype(np.float32)[:, None, None, None]
    for length, displacement in ELASTIC:
        for axis in range(3):
            points[axis] += displacement * smooth_noise(stream, length)
    return points


def grow_brain(atlas: Atlas, points: np.ndarray, stream: np.random.Generator, *, atrophy: float) -> Anatomy:
    """Tissue fractions at atlas positions ``points``. ``atrophy`` (mm, 1 = the atlas) widens ventricles and sulci."""
    to_brain = atlas.to_brain.at(points)
    widening = 0.8 * (atrophy - 1) + stream.normal(0, 0.6)  # of the ventricles, mm
    to_ventricles = atlas.to_ventricles.at(points) - widening
    rim = 0.8 * atrophy + stream.uniform(0, 1)  # mm of fluid that skull stripping leaves around the brain

    grey, white = atlas.grey.at(points), atlas.white.at(points)
    fluid = np.where(to_brain > 0, 1, np.clip(1 - grey - white, 0, 1))
    # The atlas is an average, so its cortex is blurred. Sharper posteriors and noise of the subject restore the folds.
    sulci, cortex = smooth_noise(stream, 6), smooth_noise(stream, 10)
    scores = np.log(np.clip([fluid, grey, white], 0.005, 1))
    scores[0] += 0.25 * (atrophy - 1)
    scores += [0.35 * sulci, 0.35 * cortex, -0.35 * cortex]
    posteriors = np.exp(1.8 * (scores - scores.max(axis=0)))
    posteriors /= posteriors.sum(axis=0)

    fractions = dict(zip(("CSF", "GM", "WM"), posteriors.astype(np.float32), strict=True))
    anatomy = Anatomy(to_brain < rim, to_brain, to_ventricles, fractions)
    anatomy.replace("ventricle", soft_step(-to_ventricles, width=0.9))
    return anatomy


def soft_step(distance: np.ndarray, *, width: float) -> np.ndarray:
    """0 to 1 as ``distance`` (mm) passes 0, over about four times ``width``: partial volume at a boundary."""
    return (1 / (1 + np.exp(-np.clip(distance / width, -20, 20)))).astype(np.float32)
