"""A dataset of slices: each volume is prepared once, and the chosen slices stay in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import joblib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandomizableTrait, Transform
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from medtl_ext._validation import InputError, require_choice
from medtl_ext.data.seeds import ItemSeeds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stack:
    """The chosen slices of one volume; every array is k x channels x X x Y (x Z for whole volumes)."""

    position: int  # in the datalist
    names: dict[str, str]  # of the subject and, if known, the patient
    slices: np.ndarray  # indices: first the slices with foreground, then those without
    counts: np.ndarray  # number of slices of each kind; the second kind only if it is asked for
    arrays: dict[str, torch.Tensor]
    affine: np.ndarray
    shape: tuple[int, ...]

    def keep(self, counts: np.ndarray) -> _Stack:
        """Keep the first ``counts`` slices of each kind, in the order of the volume."""
        kinds = np.split(np.arange(len(self.slices)), self.counts[:1])
        first = np.concatenate([kind[:count] for kind, count in zip(kinds, counts, strict=False)])
        order = first[np.argsort(self.slices[first])]
        arrays = {key: array[order] for key, array in self.arrays.items()}
        return replace(self, slices=self.slices[order], counts=counts, arrays=arrays)

    def framed(self, shape: Sequence[int]) -> _Stack:
        """Pad every slice (or whole volume) with zeros to this shape, the centre in the middle."""
        held = len(shape)  # number of spatial axes: two for slices
        low = [(most - size) // 2 for most, size in zip(shape, self.shape, strict=False)]
        sides = [(before, most - size - before) for before, most, size in zip(low, shape, self.shape, strict=False)]
        if not any(map(any, sides)):
            return self
        flat = [count for pair in reversed(sides) for count in pair]
        affine = self.affine.copy()
        affine[:3, 3] -= self.affine[:3, :held] @ low
        arrays = {key: torch.nn.functional.pad(array, flat) for key, array in self.arrays.items()}
        return replace(self, arrays=arrays, affine=affine, shape=(*shape, *self.shape[held:]))


def _draw(counts: np.ndarray, most: int | None, share: float) -> np.ndarray:
    """How many slices of each kind every volume gives. The next slice comes from the volume that gave fewest so far.

    Args:
        counts: volumes x kinds: number of slices with foreground and, if asked for, without.
        most: draw at most this many.
        share: the largest share of slices without foreground.
    """
    quotas = np.zeros_like(counts)
    for number in range(1, 1 + min(most or counts.sum(), counts.sum())):
        # The tolerance is for 0.29 * 100, which is 28.999999999999996.
        due = int(number * share + 1e-9) > quotas[:, 1:].sum() and (quotas < counts)[:, 1:].any()
        left = (quotas < counts)[:, int(due)]
        if not left.any():
            break
        quotas[np.where(left, quotas.sum(1), np.inf).argmin(), int(due)] += 1
    return quotas


class SliceDataset(ItemSeeds, Dataset):
    """2D slices of volumes, for training and evaluating slice by slice.

    Works like MONAI's `CacheDataset`: the transforms before the first random one run once on each volume, in threads.
    The volume is then cut along its last axis, and the chosen slices are kept in memory as plain tensors (4 bytes per
    pixel of the image and 1 per pixel of the label: 40 MB for 1,000 slices of 96 x 80). The remaining random transforms
    run each time a slice is used, so they see 2D data. All slices are padded with zeros to the size of the largest.

    Args:
        data: a datalist; every entry has ``image``, usually ``label`` and ``subject``, perhaps ``patient``.
        transform: a MONAI `Compose` or a sequence of transforms; those before the first random one must load ``image``
            as C x X x Y x Z and ``label`` as 1 x X x Y x Z. Every other array of the same spatial shape is cut as well.
        slices: ``"foreground"`` keeps the slices in which the label is above 0 anywhere; ``"all"`` keeps all slices;
            ``"volume"`` does not cut: it keeps every volume with foreground whole, for training in 3D.
        max_slices: draw at most this many slices, spread evenly over the volumes: no volume gives a second slice before
            every volume gave its first. With the same seed, a larger draw contains the smaller one.
        background_share: the largest share of slices (or volumes) without foreground among those drawn, 0 <= share < 1.
            They teach a network healthy tissue, which it will see in whole volumes. Slices of constant intensity do not
            count. Without ``max_slices`` they are added to all slices with foreground; if there are too few, more
            slices with foreground are drawn. Not used for ``"all"``.
        seed: of the draw.
        num_workers: threads that prepare volumes; each keeps one volume in memory.
        progress: show a progress bar on a terminal.

    An item is a new dictionary: ``image`` (C x X x Y), ``label`` (1 x X x Y), ``subject`` (str), ``slice`` (int, the
    index along the volume's last axis; 0 for a whole volume) and the maps of `set_map`. Items are sorted as in
    ``data``, then by slice. Seed the random transforms with `medtl_ext.handlers.EpochSeed`, or with
    `monai.utils.set_determinism` and `monai.data.DataLoader`, which seeds its workers.

    Raises:
        InputError: no volume has foreground, an image is not C x X x Y x Z after the volume transforms, or an argument
            is out of range.

    >>> volume = torch.zeros(1, 4, 4, 3)
    >>> volume[..., 1] = 1  # the middle slice has foreground
    >>> dataset = SliceDataset([{"image": volume, "label": volume, "subject": "a"}], [])
    >>> len(dataset), dataset[0]["slice"], dataset[0]["image"].shape
    (1, 1, torch.Size([1, 4, 4]))
    >>> image = torch.rand(1, 4, 4, 3)  # with body everywhere
    >>> healthy = SliceDataset([{"image": image, "label": volume}], [], background_share=0.5)
    >>> [bool(item["label"].any()) for item in healthy].count(False), len(healthy)
    (1, 2)
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose | Sequence[Callable],
        *,
        slices: Literal["foreground", "all", "volume"] = "foreground",
        max_slices: int | None = None,
        background_share: float = 0.0,
        seed: int = 0,
        num_workers: int = 4,
        progress: bool = True,
    ) -> None:
        require_choice("slices", slices, ["foreground", "all", "volume"])
        if max_slices is not None and max_slices < 1:
            raise InputError(f"max_slices must be at least 1, or None for all slices; got {max_slices}.")
        if not 0 <= background_share < 1:
            raise InputError(f"background_share is {background_share}; expected a share of the slices, 0 <= share < 1.")
        self.data = list(data)
        self.transform = transform if isinstance(transform, Compose) else Compose(transform)
        self._random_start = self.transform.get_index_of_first(
            lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
        )
        stacks = list(self._load_stacks(slices, max_slices, background_share > 0, seed, num_workers, progress))
        if not any(stack.counts[0] for stack in stacks):
            hint = "check the objective's values, and the files with python -m medtl_ext.data check"
            raise InputError(f"none of the {len(self.data)} volumes has foreground (label > 0); {hint}.")
        quotas = _draw(np.array([stack.counts for stack in stacks]), max_slices, background_share)
        stacks, quotas = [stacks[volume] for volume in np.flatnonzero(quotas.any(1))], quotas[quotas.any(1)]
        frame = np.max([stack.shape[: 3 if slices == "volume" else 2] for stack in stacks], axis=0).tolist()
        for volume, stack in enumerate(stacks):  # in place, so that each old stack is freed at once
            stacks[volume] = stack.keep(quotas[volume]).framed(frame)
        self._stacks = sorted(stacks, key=lambda stack: stack.position)
        self._index = [(stack, place) for stack in self._stacks for place in range(len(stack.slices))]
        patients = {stack.names.get("patient", stack.names["subject"]) for stack in self._stacks}
        what = "volumes" if slices == "volume" else "slices"
        healthy = sum(not label.any() for stack in self._stacks for label in stack.arrays.get("label", ()))
        logger.info("training on %d %s of %d patients, %d without foreground", len(self), what, len(patients), healthy)

    def _load_stacks(
        self, slices: str, most: int | None, healthy: bool, seed: int, num_workers: int, progress: bool
    ) -> Iterator[_Stack]:
        """The volumes that have slices, in random order, and no more volumes than the draw needs."""
        order = np.random.default_rng(seed).permutation(len(self.data)).tolist()
        given = np.zeros(1 + healthy, dtype=int)  # volumes with slices of each kind
        needed = takewhile(lambda _: given.min() != most, order)  # stop early: one slice per volume is enough
        load = joblib.delayed(self._load_stack)
        threads = joblib.Parallel(num_workers, require="sharedmem", return_as="generator")
        jobs = threads(load(position, slices, most, healthy, seed) for position in needed)
        for stack in tqdm(jobs, "loading volumes", len(order), unit="volume", disable=None if progress else True):
            if len(stack.slices) and given.min() != most:
                given += stack.counts > 0
                yield stack

    def _load_stack(self, position: int, slices: str, most: int | None, healthy: bool, seed: int) -> _Stack:
        """Prepare one volume and keep the slices that may be drawn, in the order of the draw."""
        entry = self.data[position]
        names = {key: str(entry[key]) for key in ("subject", "patient") if entry.get(key) is not None}
        names.setdefault("subject", str(position))
        volume = self.transform(dict(entry), end=self._random_start, threading=True)
        arrays = {
            key: convert_to_tensor(value, track_meta=False)
            for key, value in volume.items()
            if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 4
        }
        needed = ["image"] if slices == "all" else ["image", "label"]
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        if not arrays.keys() >= set(needed) or len({shape[1:] for shape in shapes.values()}) > 1:
            expected = "must be arrays of channels x X x Y x Z on one grid before the first random transform"
            hint = "Load them with LoadImaged(ensure_channel_first=True)"
            whose = f"subject '{names['subject']}': {' and '.join(needed)}"
            raise InputError(f"{whose} {expected}; found {shapes or 'none'}. {hint}.")
        if slices == "volume":  # the whole volume is treated as one slice
            arrays = {key: array[..., None] for key, array in arrays.items()}
        kinds = [torch.ones(shapes["image"][-1]) if slices == "all" else (arrays["label"] > 0).flatten(0, -2).any(0)]
        if healthy and slices != "all":
            pixels = arrays["image"].flatten(1, -2)
            kinds.append(~kinds[0] & (pixels.amin(1) < pixels.amax(1)).any(0))
        draw = np.random.default_rng((seed, position))
        drawn = [draw.permutation(np.flatnonzero(kind))[:most] for kind in kinds]
        candidates, counts = np.concatenate(drawn), np.array([*map(len, drawn)])
        chosen = {key: array[..., candidates].movedim(-1, 0).contiguous() for key, array in arrays.items()}
        affine = np.asarray(getattr(volume["image"], "affine", np.eye(4)), dtype=np.float64)
        return _Stack(position, names, candidates, counts, chosen, affine, shapes["image"][1:])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stack, place = self._index[index]
        # Copies, since a transform may write in place. MetaTensors become tensors, which are faster to batch.
        item = {key: array[place].clone() for key, array in stack.arrays.items()}
        item |= {**stack.names, "slice": int(stack.slices[place])}
        if self._random_start is not None:
            self.seed_item(index)
            item = self.transform(item, start=self._random_start)
            item = item[0] if isinstance(item, list) else item  # a transform that crops patches returns a list
        return {key: value.as_tensor() if isinstance(value, MetaTensor) else value for key, value in item.items()}

    @property
    def geometry(self) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
        """Affine (4 x 4, voxels to mm) and spatial shape of each subject's volume, before it was cut into slices."""
        return {stack.names["subject"]: (stack.affine, stack.shape) for stack in self._stacks}

    def plain(self) -> SliceDataset:
        """The same slices in the same order without the random transforms, for evaluation; memory is shared."""
        view = copy.copy(self)
        view._random_start = None
        return view

    def set_map(self, key: str, maps: Sequence[np.ndarray | torch.Tensor]) -> None:
        """Add one array per slice to the items, such as a weight map; the random transforms are applied to it too.

        List ``key`` in the spatial transforms with ``allow_missing_keys=True``, so that it follows the image. Setting a
        map again replaces it. A `plain` view has it too; `DataLoader` workers that already run do not see it.

        Args:
            key: the key in the items.
            maps: one array for every item in order, X x Y or 1 x X x Y (x Z for whole volumes).

        Raises:
            InputError: a reserved key, a wrong number of maps, or a map whose shape is not that of its slice.

        >>> dataset = SliceDataset([{"image": torch.zeros(1, 2, 2, 1)}], [], slices="all")
        >>> dataset.set_map("weight", [np.ones((2, 2))])
        >>> dataset[0]["weight"].shape
        torch.Size([1, 2, 2])
        """
        if key in ("image", "label", "subject", "patient", "slice"):
            raise InputError(f"map key '{key}' is already used by the slices; choose another key.")
        if len(maps) != len(self):
            raise InputError(f"set_map got {len(maps)} maps for {len(self)} slices; give one map per slice, in order.")
        tensors = [torch.as_tensor(one_map, dtype=torch.float32) for one_map in maps]
        for number, (stack, _) in enumerate(self._index):
            expected = (1, *stack.arrays["image"].shape[2:])
            if tensors[number].shape == expected[1:]:
                tensors[number] = tensors[number][None]
            if tensors[number].shape != expected:
                raise InputError(f"map {number} has shape {tuple(tensors[number].shape)}; its slice needs {expected}.")
        remaining = iter(tensors)
        for stack in self._stacks:
            stack.arrays[key] = torch.stack([next(remaining) for _ in stack.slices])
