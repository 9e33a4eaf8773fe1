"""Plan a training from its images: spacing, slices or volumes, window, intensities and flips, each with a reason.

The rules follow nnU-Net's fingerprint (Isensee et al., Nature Methods 2021): the median spacing, windows as large as
images and memory allow, CT scaled by the percentiles of its foreground.
"""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer
from monai.networks.utils import one_hot
from monai.transforms import (
    Compose,
    CopyItemsd,
    Invertd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    Transform,
)
from monai.utils import ensure_tuple, instantiate
from scipy.ndimage import label as connected_parts
from torch.nn.functional import adaptive_avg_pool3d, cosine_similarity, interpolate

from medtl_ext._io import write_json
from medtl_ext._validation import InputError
from medtl_ext.data.files import affine_of, in_times, read_channels, shape_of

AUTO = "auto"
MULTIPLE = 16
"""The bundles' U-Net halves an image four times."""
MOST_VOXELS = {2: 512 * 512, 3: 64**3}
"""The largest window. A training step then takes about one second on a CPU in 3D, and five in 2D."""
FLATTEST, FEWEST_SLICES = 1.5, 16
"""Images are trained on as slices if voxels are longer than wide by more than this ratio, or if slices are fewer."""
STEP_BYTES = 1200
"""Memory of a training step per voxel of the window (measured)."""
SAMPLE, HEADERS = 16, 200
"""Number of patients of whom the voxels are read, and of whom the headers are read."""
LOWEST_CT = -500
"""An image with lower values is in Hounsfield units: it shows air."""
SAME_SPACING = 1e-3
LOW_CEILING, MOST_LOST = 0.9, 0.05
COARSE, LESS_ALIKE = 16, 0.1
"""Voxels along an axis on which mirrored images are compared, and the loss of cosine similarity that is allowed."""
BODY = {"_target_": "medtl_ext.transforms.NormalizeBodyd", "keys": "image"}
PATCHES_WITHOUT_FOREGROUND = 1 / 3


@dataclass(frozen=True)
class Ceiling:
    """How much of the labels survives on a grid: the labels are resampled to the grid and back, and then scored.

    Attributes:
        dice: of each patient, the mean over the classes that the patient has.
        parts, lost: number of connected parts of the foreground, and of those without any voxel left; 0 if images are
            not resampled.
    """

    dice: tuple[float, ...]
    parts: int = 0
    lost: int = 0

    def __str__(self) -> str:
        if not self.parts:
            return "nothing is lost"
        patients = f"{len(self.dice)} patient{'s'[: len(self.dice) != 1]}"
        found = f"Dice {np.mean(self.dice):.3f} over {patients}, {min(self.dice):.3f} at worst"
        return f"{found}; {self.lost} of {self.parts} connected parts disappear"

    @property
    def low(self) -> bool:
        """True if the mean Dice is below 0.9, or more than 5 % of the connected parts disappear."""
        return bool(np.mean(self.dice) < LOW_CEILING or self.lost > MOST_LOST * self.parts)


@dataclass(frozen=True)
class Grid:
    """How the bundles' own networks see images. To use it again, add its ``grid.json`` to the configs of a bundle.

    Attributes:
        spacing: size of a voxel in mm, along the axes of ``axcodes``.
        roi_size: voxels that a network sees at once: two numbers for slices, three for volumes.
        normalize: definition of the intensity transform.
        background_share: share of training slices or patches without foreground.
        axcodes: orientation of the images on the grid.
        flip_axes: axes along which a training flips images at random.
        frame: size of the largest training image on this grid, in voxels.
        native: all training images have this grid already, so nothing is resampled.
        mirror: predictions are averaged over images mirrored along ``flip_axes``.
        why: one line for each choice.
    """

    spacing: tuple[float, ...]
    roi_size: tuple[int, ...]
    normalize: Mapping[str, Any] = field(default_factory=lambda: BODY)
    background_share: float = 0.0
    axcodes: str = "RAS"
    flip_axes: tuple[int, ...] = ()
    frame: tuple[int, ...] = ()
    native: bool = False
    mirror: bool = False
    why: tuple[str, ...] = ()

    @property
    def dims(self) -> int:
        """2: slice by slice; 3: volumes."""
        return len(self.roi_size)

    @property
    def slices(self) -> str:
        """The option ``slices`` of `SliceDataset`."""
        return "volume" if self.dims == 3 else "foreground"

    @cached_property
    def intensities(self) -> Transform:
        """The intensity transform."""
        return ConfigParser({"normalize": dict(self.normalize)}).get_parsed_content("normalize")

    @property
    def patch(self) -> Transform:
        """Draws a random patch of an image, as large as a network sees at once."""
        keys, shares = ["image", "label", "weight"], {"pos": 1 - self.background_share, "neg": self.background_share}
        return RandCropByPosNegLabeld(keys, "label", self.roi_size, **shares, allow_missing_keys=True)

    @property
    def cropping(self) -> list[Transform]:
        """The transform that draws a patch, if images are larger than a patch."""
        whole = all(most <= seen for most, seen in zip(self.frame, self.roi_size, strict=False))
        return [] if whole else [self.patch]

    @property
    def flips(self) -> list[Transform]:
        """Random flips of training images, labels and weights."""
        keys = ["image", "label", "weight"]
        return [RandFlipd(keys, 0.5, spatial_axis=axis, allow_missing_keys=True) for axis in self.flip_axes]

    @property
    def inferer(self) -> Inferer:
        """The inferer for whole volumes."""
        inferer: Inferer = SlidingWindowInferer(self.roi_size, sw_batch_size=1, overlap=0.5, mode="gaussian")
        if self.dims == 2:
            inferer = SliceInferer(spatial_dim=2, roi_size=self.roi_size, sw_batch_size=16)
        how = {"inferer": inferer, "axes": self.flip_axes}
        return instantiate("medtl_ext.engines.MirroredInferer", "default", **how) if self.mirror else inferer

    @property
    def options(self) -> dict[str, Any]:
        """The config options that give this grid."""
        options = {"spacing": list(self.spacing), "roi_size": list(self.roi_size), "normalize": dict(self.normalize)}
        options |= {"background_share": self.background_share, "axcodes": self.axcodes}
        return options | {"flip_axes": list(self.flip_axes)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the grid and its reasons as JSON."""
        write_json(path, self.options | {"_why_": list(self.why), "_mirror_": self.mirror})


def stored_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a ``grid.json``; empty if there is no file.

    Raises:
        InputError: the file is not a ``grid.json``.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
        options = {name: value for name, value in stored.items() if not name.startswith("_")}
        mirror = {"mirror": True} if stored.get("_mirror_") else {}  # an overlay cannot set it
        return Grid(**options).options | mirror if options else {}
    except (ValueError, TypeError, AttributeError) as error:
        hint = "replace it by the grid.json that the training wrote"
        raise InputError(f"{path} is no grid.json of a training ({error}); {hint}.") from error


def no_grid(path: str | os.PathLike[str]) -> InputError:
    """The error for a network whose grid is not known."""
    advice = "copy it there, or give --spacing and --roi_size of the training"
    return InputError(f"{path}, which a training writes beside its network, does not exist; {advice}.")


def read_grid(path: str | os.PathLike[str], **given: Any) -> Grid:
    """Read a grid from its ``grid.json``; values in ``given`` that are not "auto" win over the file.

    Raises:
        InputError: spacing or size are neither in the file nor given; or the file is not a ``grid.json``.
    """
    options = stored_options(path) | {name: value for name, value in given.items() if value != AUTO}
    if not {"spacing", "roi_size"} <= options.keys():
        raise no_grid(path)
    _numbers("spacing", options["spacing"], (3,))
    _numbers("roi_size", options["roi_size"], (2, 3))
    return Grid(**options)


def plan_grid(
    items: Sequence[Mapping[str, Any]],
    *,
    label_values: Sequence[Sequence[int]],
    channels: Sequence[str],
    spacing: Sequence[float] | str = AUTO,
    roi_size: Sequence[int] | str = AUTO,
    normalize: Mapping[str, Any] | str = AUTO,
    background_share: float | str = AUTO,
    axcodes: str = AUTO,
    flip_axes: Sequence[int] | str = AUTO,
    mirror: bool | str = False,
) -> Grid:
    """Plan every option that is "auto" from the training images, and say why.

    Args:
        items: the training patients, each with ``image`` (one file per channel) and ``label``.
        label_values: values of each class of the objective; see `medtl_ext.transforms.SelectLabelsd`.
        channels: names of the channels.
        spacing: three numbers in mm; "auto": the median over patients.
        roi_size: two numbers (slices) or three (volumes); "2d" or "3d": as large as images and memory allow; "auto":
            also chooses volumes if voxels are about as long as wide.
        normalize: definition of a transform; "auto": CT is scaled by its foreground, colours to 0..1, other images are
            standardised inside the body.
        background_share: share of training slices or patches without foreground, or "auto".
        axcodes: orientation of the grid; "auto": RAS.
        flip_axes: axes along which a training flips; "auto": those along which mirrored images look like the others.
        mirror: true: average predictions over mirrored images; see `Grid`.

    Raises:
        InputError: no items, a file that cannot be read, or numbers that are no valid grid.
    """
    if not len(items):
        raise InputError("there is no patient to plan a grid from; give --spacing and --roi_size.")
    axcodes = "RAS" if axcodes == AUTO else axcodes
    some = [items[place] for place in np.linspace(0, len(items) - 1, min(len(items), HEADERS)).astype(int)]
    found = [_voxels(item["image"], axcodes) for item in some]
    sizes = np.array([size for size, _ in found])
    why = []
    if spacing == AUTO:
        spacing = np.median(sizes, 0).round(4).tolist()
        same = np.ptp(sizes, 0).max() < SAME_SPACING
        those = f"of all {len(some)} training images" if same else f"the median of {len(some)} training images"
        between = "" if same else f", from {in_times(sizes.min(0))} to {in_times(sizes.max(0))} mm"
        why.append(f"spacing {in_times(spacing)} mm: {those}{between}")
    spacing = _numbers("spacing", spacing, (3,))
    native = bool(np.abs(sizes - spacing).max() < SAME_SPACING)
    shapes = [np.round((shape - 1) * size / spacing + 1) for size, shape in found]  # as MONAI's Spacing has them
    frame = np.max(shapes, 0).astype(int)
    if isinstance(roi_size, str):
        dims, reason = _dimensions(roi_size, frame, spacing)
        window = _window(frame[:dims])
        whole = "whole images" if (window >= frame[:dims]).all() else "patches: a larger step would take too long"
        memory = prod(window) * (8 if dims == 2 else 2) * STEP_BYTES / 2**20
        why.append(f"{dims}D, {reason}")
        why.append(f"windows of {in_times(window)} voxels, {whole}; a training step needs about {memory:.0f} MiB")
        roi_size = window.tolist()
    roi_size = tuple(int(size) for size in _numbers("roi_size", roi_size, (2, 3)))
    if normalize == AUTO:
        normalize, reason = _intensities(some, channels, label_values)
        why.append(f"intensities {reason}")
    if background_share == AUTO:
        patches = any(most > seen for most, seen in zip(frame, roi_size, strict=False))
        background_share = PATCHES_WITHOUT_FOREGROUND if patches else 0.0
        around = f"in {1 - background_share:.0%} of the patches" if patches else "in everything that is trained on"
        why.append(f"foreground: {around}")
    if flip_axes == AUTO:
        flip_axes, reason = _flip_axes(some, axcodes, len(roi_size))
        why.append(reason)
    options = {"normalize": normalize, "background_share": background_share, "axcodes": axcodes}
    options["mirror"] = mirror in (True, "true")  # the command line gives text
    frame = tuple(frame.tolist())
    return Grid(spacing, roi_size, **options, flip_axes=tuple(flip_axes), frame=frame, native=native, why=tuple(why))


def label_ceiling(items: Sequence[Mapping[str, Any]], steps: Sequence[Callable], *, n_classes: int) -> Ceiling:
    """Measure how much of the labels survives on a grid: they are resampled to it and back, for at most 16 patients.

    Args:
        items: of a datalist.
        steps: the deterministic transforms of ``image`` and ``label``, which also keep the label of the file as
            ``truth``.
        n_classes: number of classes, background included.

    >>> label = MetaTensor(np.ones((1, 4, 4, 4), dtype=np.uint8))
    >>> turned = Orientationd(["image", "label"], "LPS", labels=None)
    >>> print(label_ceiling([{"image": label, "label": label, "truth": label}], [turned], n_classes=2))
    Dice 1.000 over 1 patient, 1.000 at worst; 0 of 1 connected parts disappear
    """
    transform = Compose(steps)
    dice, parts, lost = [], 0, 0
    for place in np.linspace(0, len(items) - 1, min(len(items), SAMPLE)).astype(int):
        data = transform(dict(items[place]))
        data["pred"] = MetaTensor(one_hot(data["label"].as_tensor()[None], n_classes)[0].float())
        back = Invertd("pred", transform, "image", nearest_interp=False, to_tensor=True)(data)["pred"]
        truth, back = np.asarray(data["truth"])[0], np.asarray(back.argmax(0))
        classes = [(truth == value, back == value) for value in range(1, n_classes) if (truth == value).any()]
        if classes:
            dice.append(float(np.mean([2 * (one & other).sum() / (one.sum() + other.sum()) for one, other in classes])))
        marked, count = connected_parts(truth > 0, np.ones((3,) * truth.ndim))
        parts, lost = parts + count, lost + count - np.count_nonzero(np.unique(marked[back > 0]))
    return Ceiling(tuple(dice) or (1.0,), parts, int(lost))


def truth_steps(label_values: Sequence[Sequence[int]]) -> list[Callable]:
    """Steps that load an image and its label, and keep a copy of the label as ``truth``.

    `medtl_ext.transforms` is on the same floor as this module, so it is named as in a config instead of imported.
    """
    keys = ["image", "label", "truth"]
    return [
        CopyItemsd("label", names="truth"),
        LoadImaged(keys, reader="medtl_ext.data.ChannelReader", ensure_channel_first=True),
        instantiate("medtl_ext.transforms.SelectLabelsd", "default", keys=["label", "truth"], values=label_values),
    ]


def grid_steps(grid: Grid, *, label_values: Sequence[Sequence[int]]) -> list[Callable]:
    """The steps that bring a patient's files to a grid, as in the bundles."""
    keys = ["image", "label"]
    return [
        *truth_steps(label_values),
        Orientationd(keys, grid.axcodes, labels=None),
        instantiate("medtl_ext.transforms.AreaSpacingd", "default", keys=keys, pixdim=grid.spacing),
    ]


def _voxels(names: str | Sequence[str], axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """Size (mm) and number of voxels of an image along the axes of the grid, from its header."""
    first = ensure_tuple(names)[0]
    try:
        affine, shape = affine_of(first), shape_of(first)
    except Exception:  # a broken file fails in a dozen ways
        read_channels([first])  # its error says what is wrong
        raise
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    order = np.argsort(turn[:, 0])
    return nib.affines.voxel_sizes(affine)[order], np.array(shape)[order]


def _dimensions(wanted: str, frame: np.ndarray, spacing: Sequence[float]) -> tuple[int, str]:
    if wanted != AUTO:
        if wanted not in ("2d", "3d"):
            raise InputError(f"roi_size is {wanted!r}; expected numbers of voxels, 'auto', '2d' or '3d'.")
        return int(wanted[0]), "as you asked"
    flat = max(spacing) / min(spacing)
    if frame[2] == 1:
        return 2, "as the images are"
    if frame[2] < FEWEST_SLICES:
        return 2, f"slice by slice: there are {frame[2]} slices at most"
    if flat > FLATTEST:
        return 2, f"slice by slice: voxels are {flat:.2g} times longer along one axis than along another"
    return 3, f"volumes: there are up to {frame[2]} slices, about as thick as pixels are wide"


def _window(frame: np.ndarray) -> np.ndarray:
    """The frame rounded up to multiples of 16; the longest side is shortened until it fits a training step."""
    window = np.maximum(-(-frame // MULTIPLE), 1) * MULTIPLE
    while prod(window.tolist()) > MOST_VOXELS[len(window)]:
        window[window.argmax()] -= MULTIPLE
    return window


def _intensities(
    items: Sequence[Mapping[str, Any]], channels: Sequence[str], label_values: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], str]:
    scale = {"_target_": "ScaleIntensityRanged", "keys": "image"}
    first, _ = read_channels(ensure_tuple(items[0]["image"]))
    if tuple(channels) == ("R", "G", "B"):
        high = next((high for high in (1, 255, 65535) if first.max() <= high), float(first.max()))
        return scale | {
            "a_min": 0,
            "a_max": high,
            "b_min": 0,
            "b_max": 1,
        }, f"are colours, scaled from 0..{high} to 0..1"
    if len(channels) == 1 and (channels[0].upper() == "CT" or first.min() <= LOWEST_CT):
        foreground = []
        values = [value for group in label_values for value in np.atleast_1d(group)]
        for item in items[:SAMPLE]:
            image, label = (read_channels(ensure_tuple(item[key]))[0] for key in ("image", "label"))
            if image.shape != label.shape:
                raise InputError(f"{item['label']} has another size than its image; resample it to the image's grid.")
            foreground.append(image[np.isin(label, values)])
        of = np.concatenate(foreground)
        if of.size:
            low, high = np.percentile(of, [0.5, 99.5])
            mean, sd = float(of.mean()), max(float(of.std()), 1e-3)
            ends = {"a_min": float(low), "a_max": float(high), "b_min": (low - mean) / sd, "b_max": (high - mean) / sd}
            reason = f"are CT, clipped to {low:.0f}..{high:.0f} (99 % of the foreground) and standardised by foreground"
            return scale | {name: round(float(value), 4) for name, value in ends.items()} | {"clip": True}, reason
    return BODY, "are standardised inside the body"


def _flip_axes(items: Sequence[Mapping[str, Any]], axcodes: str, dims: int) -> tuple[list[int], str]:
    """The axes along which mirrored images are nearly as similar to other patients' as unmirrored ones.

    Anatomy with a left and a right, or a front and a back, is not flipped along that axis.
    """
    read = [
        LoadImaged("image", reader="medtl_ext.data.ChannelReader", ensure_channel_first=True),
        Orientationd("image", axcodes, labels=None),
    ]
    coarse = []
    for item in items[:SAMPLE]:
        image = Compose(read)({"image": item["image"]})["image"].as_tensor().float().mean(0, keepdim=True)
        image = adaptive_avg_pool3d(image, [min(size, COARSE) for size in image.shape[1:]])[0]
        coarse.append(interpolate((image - image.mean())[None, None], (COARSE,) * 3)[0, 0])
    pairs = [*itertools.permutations(coarse, 2)] or [(coarse[0], coarse[0])]

    def likeness(*axes: int) -> float:
        return float(np.mean([cosine_similarity(one.flatten(), two.flip(axes).flatten(), 0) for one, two in pairs]))

    plain, mirrored = likeness(), [likeness(axis) for axis in range(dims)]
    axes = [axis for axis, found in enumerate(mirrored) if found >= plain - LESS_ALIKE]
    of_each = ", ".join(f"{found:.2f} along axis {axis}" for axis, found in enumerate(mirrored))
    said = f"along {' and '.join(map(str, axes))}" if axes else "none"
    return axes, f"flips: {said}; similarity of two patients: {plain:.2f}; with one mirrored: {of_each}"


def _numbers(name: str, values: Any, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) not in counts or min(found) <= 0:
        raise InputError(f"{name} is {values!r}; expected {' or '.join(map(str, counts))} positive numbers, or 'auto'.")
    return found
