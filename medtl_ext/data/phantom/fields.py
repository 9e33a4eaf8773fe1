"""The voxel grid of a phantom scan, and the random fields drawn on it. All lengths in mm, in MNI space."""

import zlib
from functools import lru_cache

import nibabel
import numpy as np

# The field of view holds every brain of the phantom in plane, and the slices from the temporal poles up.
SHAPE = (96, 96, 28)
SPACING = (2.0, 2.0, 4.0)
AFFINE = nibabel.affines.from_matvec(np.diag(SPACING), [-95.0, -112.0, -36.0])  # voxel index to MNI position, RAS


def grid_points() -> np.ndarray:
    """MNI position of every voxel, (3, X, Y, Z) float32."""
    axes = (start + step * np.arange(n) for start, step, n in zip(AFFINE[:3, 3], SPACING, SHAPE, strict=True))
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def random_stream(*key: int | str) -> np.random.Generator:
    """A random generator that depends only on ``key``: the same on every machine and in every process.

    >>> print(random_stream(0, "13", 2, "T1").integers(1000000))
    244045
    """
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence(entropy))


def smooth_noise(stream: np.random.Generator, length: float) -> np.ndarray:
    """Smooth Gaussian noise with features about ``length`` mm wide, mean 0 and standard deviation 1, float32.

    White noise on knots ``length`` mm apart is spread by a Gaussian along each axis in turn. This is as smooth as
    filtering a white image, and much faster for wide kernels.
    """
    kernels = [_knot_kernel(n, step, length) for n, step in zip(SHAPE, SPACING, strict=True)]
    field = stream.standard_normal([kernel.shape[1] for kernel in kernels], dtype=np.float32)
    for kernel in kernels:  # contracts the first axis and appends the new one: after three, the order is restored
        field = np.tensordot(field, kernel, axes=(0, 1))
    return (field - field.mean()) / field.std()


@lru_cache(maxsize=128)
def _knot_kernel(n_voxels: int, spacing: float, length: float) -> np.ndarray:
    """Weight of every knot (columns) at every voxel (rows) of one axis."""
    knots = np.arange(-length, n_voxels * spacing + 2 * length, length)
    distance = spacing * np.arange(n_voxels)[:, None] - knots
    return np.exp(-0.5 * (distance / (0.55 * length)) ** 2).astype(np.float32)
