"""The voxel grid of a phantom scan, and the random fields drawn on it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Grid:
    """A RAS voxel grid in MNI space: all lengths in mm.

    The default field of view holds every brain of the phantom in plane, and the slices from the temporal poles up.

    >>> Grid().affine[:3, 3].tolist()
    [-95.0, -112.0, -36.0]
    """

    shape: tuple[int, int, int] = (96, 96, 28)
    spacing: tuple[float, float, float] = (2.0, 2.0, 4.0)
    origin: tuple[float, float, float] = (-95.0, -112.0, -36.0)

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to MNI position."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = self.origin
        return affine

    def points(self) -> np.ndarray:
        """MNI position of every voxel, (3, X, Y, Z) float32."""
        sampling = zip(self.origin, self.spacing, self.shape, strict=True)
        axes = (start + step * np.arange(n) for start, step, n in sampling)
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def random_stream(*key: int | str) -> np.random.Generator:
    """A random generator that depends on ``key`` alone, on every machine and in every process.

    >>> print(random_stream(0, "13", 2, "T1").integers(1000000))
    244045
    """
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence(entropy))


def smooth_noise(stream: np.random.Generator, grid: Grid, length: float) -> np.ndarray:
    """Smooth Gaussian noise with features about ``length`` mm wide, mean 0 and standard deviation 1, float32.

    White noise on knots ``length`` mm apart, spread by a Gaussian along each axis in turn: as smooth as a filtered
    white image, at a fraction of the price for wide kernels.
    """
    kernels = [_knot_kernel(n, step, length) for n, step in zip(grid.shape, grid.spacing, strict=True)]
    field = stream.standard_normal([kernel.shape[1] for kernel in kernels], dtype=np.float32)
    for kernel in kernels:  # takes the first axis (knots) and appends its voxels: three times restore the order
        field = np.tensordot(field, kernel, axes=(0, 1))
    return (field - field.mean()) / field.std()


@lru_cache(maxsize=128)
def _knot_kernel(n_voxels: int, spacing: float, length: float) -> np.ndarray:
    """Weight of every knot (columns) at every voxel (rows) of one axis."""
    extent = n_voxels * spacing
    knots = np.arange(-length, extent + 2 * length, length)
    distance = spacing * np.arange(n_voxels)[:, None] - knots
    return np.exp(-0.5 * (distance / (0.55 * length)) ** 2).astype(np.float32)
