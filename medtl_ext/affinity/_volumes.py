"""How arguments are read, and what is asked of volumes, the same in every function of the package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.utils import convert_to_numpy
from numpy.typing import ArrayLike

from medtl_ext._validation import InputError


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


class _Reader:
    """Reads the arguments of one call; remembers what its volumes must share, and the device they came from."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._first: tuple[str, int] | None = None

    def array(self, name: str, value: Any, *, allow_nan: bool = False) -> np.ndarray:
        """``value`` as finite float64."""
        array = self._numbers(name, value).astype(np.float64)
        bad = np.isinf(array) if allow_nan else ~np.isfinite(array)
        if bad.any():
            raise InputError(f"{name} holds {array[bad].flat[0]}; expected finite numbers.")
        return array

    def matrix(self, name: str, value: Any, *, allow_nan: bool = False) -> np.ndarray:
        array = self.array(name, value, allow_nan=allow_nan)
        if array.ndim != 2 or array.size == 0:
            raise InputError(f"{name} has shape {array.shape}; expected at least one row and one column.")
        return array

    def volumes(self, name: str, volumes: Any) -> Iterator[tuple[str, np.ndarray]]:
        """One volume after the other, with its name."""
        if isinstance(volumes, (str, bytes, Mapping)) or not isinstance(volumes, Iterable):
            raise InputError(f"{name} is {type(volumes).__name__}; expected a list, or any iterable, of volumes.")
        index = -1
        for index, volume in enumerate(volumes):
            yield f"{name}[{index}]", self._volume(f"{name}[{index}]", volume)
        if index < 0:
            raise InputError(f"{name} is empty; expected at least one volume.")

    def tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64).to(self._device)

    def _numbers(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, torch.Tensor):
            if self._device.type == "cpu":
                self._device = value.device
            if value.dtype == torch.bfloat16:
                value = value.float()  # numpy has no such type
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
            raise InputError(
                f"{name} has shape {given.shape}; expected each item of a list to be one 2D or 3D volume of at least "
                "two voxels, without channels."
            )
        self._first = self._first or (name, volume.ndim)
        if volume.ndim != self._first[1]:
            raise InputError(f"{name} is {volume.ndim}D, but {self._first[0]} is {self._first[1]}D; expected the same.")
        return volume


class _Partners:
    """Volumes that come in the same order as those of another argument."""

    def __init__(self, reader: _Reader, name: str, volumes: Any) -> None:
        self._name = name
        self._volumes = reader.volumes(name, volumes)

    def next(self, partner: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        name, volume = next(self._volumes, (None, None))
        if volume is None:
            raise InputError(f"{self._name} has no volume for {partner}; expected as many, in the same order.")
        if volume.shape != shape:
            raise InputError(f"{name} has shape {volume.shape}, {partner} {shape}; expected the same.")
        return name, volume

    def end(self, partners: str) -> None:
        if next(self._volumes, None) is not None:
            raise InputError(f"{self._name} has more volumes than {partners}; expected as many, in the same order.")


@dataclass(frozen=True)
class _Spacing:
    name: str
    value: ArrayLike

    def of(self, index: int, ndim: int) -> np.ndarray:
        """Size in mm of the voxels of volume ``index`` along each axis."""
        sizes = np.asarray(self.value, dtype=np.float64)
        if sizes.ndim == 2 and index < len(sizes):
            sizes = sizes[index]
        if sizes.shape not in ((), (ndim,)) or not (np.isfinite(sizes) & (sizes > 0)).all():
            raise InputError(
                f"{self.name} is {self.value}; expected mm > 0: a number, {ndim} of them, or a row of {ndim} for each "
                "volume."
            )
        return np.broadcast_to(sizes, ndim)


def _binary(name: str, volume: np.ndarray) -> np.ndarray:
    """The volume as uint8; no copy is made of what is that, or bool, already."""
    if volume.dtype == bool:
        return volume.view(np.uint8)
    if volume.dtype == np.uint8 and volume.max() <= 1:
        return volume
    ones = volume == 1
    other = ~ones & (volume != 0)
    if other.any():
        value = volume[other][0]
        advice = "" if not np.isfinite(value) else f", one class at a time (labels == {value:g})"
        raise InputError(f"{name} holds {value:g}; expected 0 and 1 only{advice}.")
    return ones.view(np.uint8)


def _finite(name: str, image: np.ndarray) -> np.ndarray:
    """A float64 copy."""
    image = image.astype(np.float64)
    if not np.isfinite(image).all():
        raise InputError(f"{name} holds NaN or Inf; expected finite intensities.")
    return image


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not occupied.size:
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)
