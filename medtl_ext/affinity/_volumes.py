"""Reading and checking the arguments of all functions of this package."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_numpy
from numpy.typing import ArrayLike

from medtl_ext._validation import InputError

NamedVolume = tuple[str, np.ndarray]


class Reader:
    """Reads the arguments of one call. It remembers the dimension of the volumes and their device."""

    _device = torch.device("cpu")
    _first: tuple[str, int] | None = None

    def arrays(self, *, rows: bool = False, allow_nan: bool = False, **given: ArrayLike) -> list[np.ndarray]:
        """Float64 arrays of the same shape or, with ``rows``, matrices with the same number of columns."""
        arrays = {name: self._numbers(name, value).astype(np.float64) for name, value in given.items()}
        for name, array in arrays.items():
            bad = np.isinf(array) if allow_nan else ~np.isfinite(array)
            if bad.any():
                raise InputError(f"{name} holds {array[bad].flat[0]}; expected finite numbers.")
            if rows and (array.ndim != 2 or array.size == 0):
                raise InputError(f"{name} has shape {array.shape}; expected at least one row and one column.")
        if len({array.shape[int(rows) :] for array in arrays.values()}) > 1:
            shapes = ", ".join(str(array.shape) for array in arrays.values())
            expected = "the same number of columns" if rows else "the same shape"
            raise InputError(f"{', '.join(given)} have the shapes {shapes}; expected {expected}.")
        return list(arrays.values())

    def volumes(self, name: str, volumes: Any) -> Iterator[NamedVolume]:
        """Yield the volumes one by one, each with its name."""
        if isinstance(volumes, (str, bytes, Mapping)) or not isinstance(volumes, Iterable):
            raise InputError(f"{name} is {type(volumes).__name__}; expected a list, or any iterable, of volumes.")
        index = -1
        for index, volume in enumerate(volumes):
            yield f"{name}[{index}]", self._volume(f"{name}[{index}]", volume)
        if index < 0:
            raise InputError(f"{name} is empty; expected at least one volume.")

    def pairs(self, **given: Any) -> Iterator[tuple[NamedVolume, NamedVolume]]:
        """Yield pairs of volumes of two arguments, in the same order and with the same shapes."""
        (a, volumes_a), (b, volumes_b) = given.items()
        for first, second in zip_longest(self.volumes(a, volumes_a), self.volumes(b, volumes_b)):
            if first is None or second is None:
                more, fewer = (a, b) if second is None else (b, a)
                raise InputError(f"{more} has more volumes than {fewer}; expected the same number and order.")
            if first[1].shape != second[1].shape:
                found = f"{second[0]} has shape {second[1].shape}, {first[0]} {first[1].shape}"
                raise InputError(f"{found}; expected the same shape.")
            yield first, second

    def tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64).to(self._device)

    def _numbers(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, torch.Tensor):
            if self._device.type == "cpu":
                self._device = value.device
            if value.dtype == torch.bfloat16:
                value = value.float()  # NumPy has no bfloat16
        try:
            array = np.asarray(convert_to_numpy(value, wrap_sequence=True))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} cannot be read as one array ({error}); give an array or a tensor.") from error
        if array.dtype.kind not in "buif":
            raise InputError(f"{name} holds {array.dtype}; expected real numbers.")
        return array

    def _volume(self, name: str, value: Any) -> np.ndarray:
        given = self._numbers(name, value)
        volume = given[0] if given.ndim in (3, 4) and len(given) == 1 else given
        if volume.ndim not in (2, 3) or volume.size < 2:
            expected = "each item of a list to be one 2D or 3D volume of at least two voxels, without channels"
            raise InputError(f"{name} has shape {given.shape}; expected {expected}.")
        self._first = self._first or (name, volume.ndim)
        if volume.ndim != self._first[1]:
            raise InputError(f"{name} is {volume.ndim}D, but {self._first[0]} is {self._first[1]}D; expected the same.")
        return volume


def voxel_size(spacing: ArrayLike, index: int, ndim: int) -> np.ndarray:
    """Voxel size of volume ``index`` in mm along each axis."""
    sizes = np.asarray(spacing, dtype=np.float64)
    if sizes.ndim == 2 and index < len(sizes):
        sizes = sizes[index]
    if sizes.shape not in ((), (ndim,)) or not (np.isfinite(sizes) & (sizes > 0)).all():
        expected = f"mm > 0: a number, {ndim} of them, or a row of {ndim} for each volume"
        raise InputError(f"spacing is {spacing}; expected {expected}.")
    return np.broadcast_to(sizes, ndim)


def binary(name: str, volume: np.ndarray) -> np.ndarray:
    """The volume as uint8, without a copy if it is uint8 or bool."""
    if volume.dtype == bool:
        return volume.view(np.uint8)
    if volume.dtype == np.uint8 and volume.max() <= 1:
        return volume
    ones = volume == 1
    other = volume[~ones & (volume != 0)]
    if other.size:
        raise InputError(f"{name} holds {other[0]:g}; expected 0 and 1 only, one class at a time (labels == value).")
    return ones.view(np.uint8)


def finite(name: str, image: np.ndarray) -> np.ndarray:
    """A float64 copy."""
    image = image.astype(np.float64)
    if not np.isfinite(image).all():
        raise InputError(f"{name} holds NaN or Inf; expected finite intensities.")
    return image


def standardized(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The values' distance from the mean of the reference, in standard deviations of the reference."""
    return (values - reference.mean()) / (reference.std() if np.ptp(reference) > 0 else 1.0)


def bounding_box(mask: np.ndarray, margin: ArrayLike = 0) -> tuple[slice, ...] | None:
    """The box around the non-zero voxels plus a margin (in voxels, cut at the border); None if all are zero."""
    box = []
    for axis, more in enumerate(np.broadcast_to(margin, mask.ndim)):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not occupied.size:
            return None
        box.append(slice(max(int(occupied[0] - more), 0), int(occupied[-1] + more) + 1))
    return tuple(box)
