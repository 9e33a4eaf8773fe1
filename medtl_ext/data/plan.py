"""What a training needs to know of its data: the grid of its images, slices or volumes, intensities, all with reasons.

The rules are those of nnU-Net's fingerprint (Isensee et al., Nature Methods 2021) where it has one, kept small: median
spacing, windows as large as images and memory allow, CT by the percentiles of its foreground.
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
"""Of a window: a training step of the bundles then takes a processor one second in 3D, five in 2D."""
FLATTEST, FEWEST_SLICES = 1.5, 16
"""Slices thicker than wide by more than this, or fewer of them, are trained on as slices."""
STEP_BYTES = 1200
"""A training step of the bundles' network holds about so much for a voxel (measured)."""
SAMPLE, HEADERS = 16, 200
"""So many patients' voxels are read, and so many patients' headers."""
LOWEST_CT = -500
"""An image that goes below is in Hounsfield units: air."""
SAME_SPACING = 1e-3
LOW_CEILING, MOST_LOST = 0.9, 0.05
COARSE, LESS_ALIKE = 16, 0.1
"""Mirrored images are compared on so many voxels along an axis, and may be so much less alike (cosine)."""
BODY = {"_target_": "medtl_ext.transforms.NormalizeBodyd", "keys": "image"}
PATCHES_WITHOUT_FOREGROUND = 1 / 3


@dataclass(frozen=True)
class Ceiling:
    """What a grid leaves of labels: scores of the truth with itself after the grid and back.

    Attributes:
        dice: of each patient, the mean over the classes that the patient has.
        parts, lost: connected parts of the foreground, and how many of them have no voxel left; of images that are not
            resampled they are not counted.
    """

    dice: tuple[float, ...]
    parts: int = 0
    lost: int = 0

    def __str__(self) -> str:
        if not self.parts:
            return "nothing is lost"
        patients = f"{len(self.dice)} patient{'s'[: len(self.dice) != 1]}"
        found = f"Dice {np.mean(self.dice):.3f} over {patients}, {min(self.dice):.3f} at worst"
        return f"{found}; {self.lost} of {self.parts} connected parts vanish"

    @property
    def low(self) -> bool:
        """It is below 0.9, or more than 5 % of the connected parts vanish."""
        return bool(np.mean(self.dice) < LOW_CEILING or self.lost > MOST_LOST * self.parts)


@dataclass(frozen=True)
class Grid:
    """How the bundles' own networks see images. ``grid.json`` is laid over any config of a bundle to use it again.

    Attributes:
        spacing: mm of a voxel, along the axes that ``axcodes`` turns an image to.
        roi_size: voxels that a network sees at once: two numbers of a slice, three of a volume.
        normalize: definition of the transform of intensities.
        background_share: of training slices, or patches, without foreground.
        axcodes: orientation that images are turned to.
        flip_axes: along which a training may flip images at random.
        frame: voxels of the largest training image on this grid.
        native: it is the grid of all training images, so that nothing is resampled.
        mirror: a prediction is the mean over images mirrored along ``flip_axes``.
        why: a line for each choice.
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
        """What a training set is cut into; see `SliceDataset`."""
        return "volume" if self.dims == 3 else "foreground"

    @cached_property
    def intensities(self) -> Transform:
        """The transform of intensities."""
        return ConfigParser({"normalize": dict(self.normalize)}).get_parsed_content("normalize")

    @property
    def patch(self) -> Transform:
        """What a network sees at once of an image, drawn at random."""
        keys, shares = ["image", "label", "weight"], {"pos": 1 - self.background_share, "neg": self.background_share}
        return RandCropByPosNegLabeld(keys, "label", self.roi_size, **shares, allow_missing_keys=True)

    @property
    def cropping(self) -> list[Transform]:
        """What a training adds: a patch, where images are larger than one."""
        whole = all(most <= seen for most, seen in zip(self.frame, self.roi_size, strict=False))
        return [] if whole else [self.patch]

    @property
    def flips(self) -> list[Transform]:
        """Of training images, with their labels and weights."""
        keys = ["image", "label", "weight"]
        return [RandFlipd(keys, 0.5, spatial_axis=axis, allow_missing_keys=True) for axis in self.flip_axes]

    @property
    def inferer(self) -> Inferer:
        """Of whole volumes."""
        inferer: Inferer = SlidingWindowInferer(self.roi_size, sw_batch_size=1, overlap=0.5, mode="gaussian")
        if self.dims == 2:
            inferer = SliceInferer(spatial_dim=2, roi_size=self.roi_size, sw_batch_size=16)
        how = {"inferer": inferer, "axes": self.flip_axes}
        return instantiate("medtl_ext.engines.MirroredInferer", "default", **how) if self.mirror else inferer

    @property
    def options(self) -> dict[str, Any]:
        """The options of a config that give this grid."""
        options = {"spacing": list(self.spacing), "roi_size": list(self.roi_size), "normalize": dict(self.normalize)}
        options |= {"background_share": self.background_share, "axcodes": self.axcodes}
        return options | {"flip_axes": list(self.flip_axes)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Leave it as a file, with the reasons."""
        write_json(path, self.options | {"_why_": list(self.why), "_mirror_": self.mirror})


def stored_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of a ``grid.json``; none where there is no file.

    Raises:
        InputError: the file is another one.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
        options = {name: value for name, value in stored.items() if not name.startswith("_")}
        mirror = {"mirror": True} if stored.get("_mirror_") else {}  # which no overlay can set
        return Grid(**options).options | mirror if options else {}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no grid.json of a training ({error}); put that one there.") from error


def no_grid(path: str | os.PathLike[str]) -> InputError:
    """That a network's grid is not known, as one sentence."""
    advice = "put it there, or give --spacing and --roi_size as they were in the training"
    return InputError(f"{path}, which a training leaves beside its network, is not there; {advice}.")


def read_grid(path: str | os.PathLike[str], **given: Any) -> Grid:
    """A grid from its ``grid.json``, and what is given (not "auto") in its place.

    Raises:
        InputError: the file is not there, and spacing and size are not given; or it is another one.
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
    """Plan what is not given from the images of a datalist, and say why.

    Args:
        items: the training patients: ``image``, one file a channel, and ``label``.
        label_values: of each class of the objective; see `medtl_ext.transforms.SelectLabelsd`.
        channels: their names.
        spacing: three numbers in mm, or "auto": the median of the patients.
        roi_size: two numbers (slices) or three (volumes); "2d", "3d": as large as the images or as a step takes; or
            "auto": volumes where voxels are about as thick as wide.
        normalize: a transform's definition, or "auto": CT by its foreground, colours to 0..1, else standardised inside
            the body.
        background_share: of training slices or patches; or "auto".
        axcodes: orientation of the grid; "auto": RAS.
        flip_axes: along which a training flips; "auto": where mirrored images look like the others.
        mirror: true: predict mirrored images too; see `Grid`.

    Raises:
        InputError: no items, a file that cannot be read, or numbers that are no grid.
    """
    if not len(items):
        raise InputError("no patient to plan a grid from; give --spacing and --roi_size.")
    axcodes = "RAS" if axcodes == AUTO else axcodes
    some = [items[place] for place in np.linspace(0, len(items) - 1, min(len(items), HEADERS)).astype(int)]
    found = [_voxels(item["image"], axcodes) for item in some]
    sizes = np.array([size for size, _ in found])
    why = []
    if spacing == AUTO:
        spacing = np.median(sizes, 0).round(4).tolist()
        same = np.ptp(sizes, 0).max() < SAME_SPACING
        those = f"of all {len(some)} training images" if same else f"the median of {len(some)} training images"
        between = "" if same else f", which are from {in_times(sizes.min(0))} to {in_times(sizes.max(0))} mm"
        why.append(f"spacing {in_times(spacing)} mm: {those}{between}")
    spacing = _numbers("spacing", spacing, (3,))
    native = bool(np.abs(sizes - spacing).max() < SAME_SPACING)
    shapes = [np.round((shape - 1) * size / spacing + 1) for size, shape in found]  # as MONAI's Spacing has them
    frame = np.max(shapes, 0).astype(int)
    if isinstance(roi_size, str):
        dims, reason = _dimensions(roi_size, frame, spacing)
        window = _window(frame[:dims])
        whole = "whole images" if (window >= frame[:dims]).all() else "patches: more would take too long a step"
        memory = prod(window) * (8 if dims == 2 else 2) * STEP_BYTES / 2**20
        why.append(f"{dims}D, {reason}")
        why.append(f"windows of {in_times(window)} voxels, {whole}; a training step holds about {memory:.0f} MiB")
        roi_size = window.tolist()
    roi_size = tuple(int(size) for size in _numbers("roi_size", roi_size, (2, 3)))
    if normalize == AUTO:
        normalize, reason = _intensities(some, channels, label_values)
        why.append(f"intensities {reason}")
    if background_share == AUTO:
        patches = any(most > seen for most, seen in zip(frame, roi_size, strict=False))
        background_share = PATCHES_WITHOUT_FOREGROUND if patches else 0.0
        around = (
            f"{1 - background_share:.0%} of patches lie around it" if patches else "all that is trained on has some"
        )
        why.append(f"foreground: {around}")
    if flip_axes == AUTO:
        flip_axes, reason = _flip_axes(some, axcodes, len(roi_size))
        why.append(reason)
    options = {"normalize": normalize, "background_share": background_share, "axcodes": axcodes}
    options["mirror"] = mirror in (True, "true")  # a command line has words
    frame = tuple(frame.tolist())
    return Grid(spacing, roi_size, **options, flip_axes=tuple(flip_axes), frame=frame, native=native, why=tuple(why))


def label_ceiling(items: Sequence[Mapping[str, Any]], steps: Sequence[Callable], *, n_classes: int) -> Ceiling:
    """What is left of labels on a grid: at most 16 patients' go there and back as probabilities do.

    Args:
        items: of a datalist.
        steps: the deterministic transforms, of ``image`` and ``label``, which also leave the label as it came from the
            file, under ``truth``.
        n_classes: with the background.

    >>> label = MetaTensor(np.ones((1, 4, 4, 4), dtype=np.uint8))
    >>> turned = Orientationd(["image", "label"], "LPS", labels=None)
    >>> print(label_ceiling([{"image": label, "label": label, "truth": label}], [turned], n_classes=2))
    Dice 1.000 over 1 patient, 1.000 at worst; 0 of 1 connected parts vanish
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
    """Load an image with its label, and keep the label as it is in the file as ``truth``.

    Transforms stand beside this room, so that steps name them as a config does.
    """
    keys = ["image", "label", "truth"]
    return [
        CopyItemsd("label", names="truth"),
        LoadImaged(keys, reader="medtl_ext.data.ChannelReader", ensure_channel_first=True),
        instantiate("medtl_ext.transforms.SelectLabelsd", "default", keys=["label", "truth"], values=label_values),
    ]


def grid_steps(grid: Grid, *, label_values: Sequence[Sequence[int]]) -> list[Callable]:
    """The way to a grid, as the bundles go it."""
    keys = ["image", "label"]
    return [
        *truth_steps(label_values),
        Orientationd(keys, grid.axcodes, labels=None),
        instantiate("medtl_ext.transforms.AreaSpacingd", "default", keys=keys, pixdim=grid.spacing),
    ]


def _voxels(names: str | Sequence[str], axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """Size (mm) and number of an image's voxels along the axes of the grid, from its header."""
    first = ensure_tuple(names)[0]
    try:
        affine, shape = affine_of(first), shape_of(first)
    except Exception:  # a broken file fails in a dozen ways
        read_channels([first])  # says what is wrong with it
        raise
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    order = np.argsort(turn[:, 0])
    return nib.affines.voxel_sizes(affine)[order], np.array(shape)[order]


def _dimensions(wanted: str, frame: np.ndarray, spacing: Sequence[float]) -> tuple[int, str]:
    if wanted != AUTO:
        if wanted not in ("2d", "3d"):
            raise InputError(f"roi_size is {wanted!r}; expected numbers of voxels, 'auto', '2d' or '3d'.")
        return int(wanted[0]), "as it is asked for"
    flat = max(spacing) / min(spacing)
    if frame[2] == 1:
        return 2, "the images are"
    if frame[2] < FEWEST_SLICES:
        return 2, f"slice by slice: there are {frame[2]} slices at most"
    if flat > FLATTEST:
        return 2, f"slice by slice: voxels are {flat:.2g} times longer one way than the other"
    return 3, f"volumes: there are up to {frame[2]} slices, about as thick as pixels are wide"


def _window(frame: np.ndarray) -> np.ndarray:
    """The frame in multiples that the network halves, cut where it is longest until a step takes it."""
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
        return scale | {"a_min": 0, "a_max": high, "b_min": 0, "b_max": 1}, f"of colours from 0..{high} to 0..1"
    if len(channels) == 1 and (channels[0].upper() == "CT" or first.min() <= LOWEST_CT):
        foreground = []
        values = [value for group in label_values for value in np.atleast_1d(group)]
        for item in items[:SAMPLE]:
            image, label = (read_channels(ensure_tuple(item[key]))[0] for key in ("image", "label"))
            if image.shape != label.shape:
                raise InputError(f"{item['label']} has another size than its image; give them on one grid.")
            foreground.append(image[np.isin(label, values)])
        of = np.concatenate(foreground)
        if of.size:
            low, high = np.percentile(of, [0.5, 99.5])
            mean, sd = float(of.mean()), max(float(of.std()), 1e-3)
            ends = {"a_min": float(low), "a_max": float(high), "b_min": (low - mean) / sd, "b_max": (high - mean) / sd}
            reason = (
                f"of CT clipped to {low:.0f}..{high:.0f}, which holds 99 % of the foreground, and standardised by it"
            )
            return scale | {name: round(float(value), 4) for name, value in ends.items()} | {"clip": True}, reason
    return BODY, "standardised inside the body"


def _flip_axes(items: Sequence[Mapping[str, Any]], axcodes: str, dims: int) -> tuple[list[int], str]:
    """Those along which a mirrored image is about as like another patient's as they are without: a brain has sides."""
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
    return axes, f"flips: {said}; images are alike by {plain:.2f}, and by {of_each} when one is mirrored"


def _numbers(name: str, values: Any, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) not in counts or min(found) <= 0:
        raise InputError(f"{name} is {values!r}; expected {' or '.join(map(str, counts))} positive numbers, or 'auto'.")
    return found
