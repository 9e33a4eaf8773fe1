"""nnU-Net v2 folders as sources: read plans, labels and weights into a source card; nnU-Net's own preprocessing.

No code of a folder runs. Only JSON and tensors are read, and only what is on the list of `allowed` is built.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import CropForegroundd, InvertibleTransform
from monai.transforms.utils import scale_affine
from monai.utils import convert_to_dst_type, convert_to_numpy
from scipy.ndimage import binary_fill_holes, gaussian_filter
from skimage.transform import resize
from torch import nn

from medtl_ext._validation import InputError, require_choice
from medtl_ext.networks import read_checkpoint
from medtl_ext.transfer.sources.allowed import inside, read_mapping
from medtl_ext.transforms import EachKeyd

PLANS, DATASET, CHECKPOINT = "plans.json", "dataset.json", "checkpoint_final.pth"
READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO", "Tiff3DIO")
RESAMPLING_ORDER = {"resample_data_or_seg_to_shape": 3, "resample_torch_fornnunet": 1}
NORMALISATIONS = {
    "ZScoreNormalization": {"_target_": "NormalizeIntensityd"},
    "RescaleTo01Normalization": {"_target_": "ScaleIntensityd"},
    "RGBTo01Normalization": {"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 255, "b_min": 0, "b_max": 1},
    "NoNormalization": None,
}
ANISOTROPIC = 3.0  # with a larger ratio of spacings, slices are resampled separately
WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)


def nnunet_folders(folder: str | Path) -> list[Path]:
    """The results folders (``TRAINER__PLANS__CONFIGURATION``) in a folder.

    Args:
        folder: a results folder, a fold in it, or the folder of the dataset; any other folder gives an empty list.
    """
    folder = Path(folder)
    for one in (folder, folder.parent if folder.name.startswith("fold_") else folder):
        if (one / PLANS).is_file() or one.name.count("__") == 2:
            return [one]
    return sorted(path.parent for path in folder.glob(f"*__*__*/{PLANS}"))


def nnunet_card(folder: str | Path) -> dict[str, Any]:
    """The source card of an nnU-Net v2 folder.

    Args:
        folder: see `nnunet_folders`. Of several folds, ``fold_all`` or else the first is used.

    Returns:
        The keys of the card. ``axes`` has three entries for a 2D network too; its slices lie along the first of them.
        With regions, each channel is the sigmoid of one region; the classes are the background and the regions.

    Raises:
        InputError: no such folder, or several; a cascade; or a reader, preprocessor, normalisation or resampling that
            is not nnU-Net's own.
    """
    found, fold = nnunet_folders(folder), Path(folder).name
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        what = f"holds several networks ({names}): give one of these folders" if found else "is no nnU-Net v2 folder"
        raise InputError(f"{folder} {what}; expected TRAINER__PLANS__CONFIGURATION with {PLANS} and {DATASET}.")
    results = found[0].resolve()
    if not fold.startswith("fold_"):
        folds = sorted(path.parent.name for path in results.glob(f"fold_*/{CHECKPOINT}"))
        if not folds:
            raise InputError(f"{results} has no fold with a {CHECKPOINT}; expected fold_0/{CHECKPOINT} or another.")
        fold = "fold_all" if "fold_all" in folds else folds[0]
    try:
        return _card(results, fold, read_mapping(results, PLANS), read_mapping(results, DATASET))
    except InputError:
        raise
    except WRONG as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        advice = "give the folder as nnU-Net wrote it"
        raise InputError(f"{results} does not have nnU-Net v2's format ({problem}); {advice}.") from error


def _card(results: Path, fold: str, plans: dict, dataset: dict) -> dict[str, Any]:
    path = inside(results, f"{fold}/{CHECKPOINT}")
    checkpoint = read_checkpoint(path)
    name = checkpoint["init_args"]["configuration"]
    configuration = _configuration(plans, name)
    if configuration.get("previous_stage"):
        raise InputError(f"{name} is the second stage of a cascade, which needs the first; give a single-stage network")
    require_choice("its preprocessor", configuration["preprocessor_name"], ["DefaultPreprocessor"])
    require_choice("its reader", plans["image_reader_writer"], READERS)
    channel_names = dataset.get("channel_names", dataset.get("modality"))
    channels = [channel_names[key] for key in sorted(channel_names, key=int)]
    classes, regions = _classes(dataset)
    # nnU-Net's readers give z, y, x, which the plans may transpose; everything here is in the file's order x, y, z.
    axes = [2 - axis for axis in plans["transpose_forward"]]
    patch = configuration["patch_size"]
    taken = axes[len(axes) - len(patch) :]
    spacing = dict(zip(taken, configuration["spacing"], strict=True))
    slices = f", on slices along axis {axes[0]} of the image" if len(patch) == 2 else ""
    own = {"input_channels": len(channels), "num_classes": len(classes) - regions, "deep_supervision": False}
    return {
        "name": f"{plans['dataset_name']}_{name}",
        "description": f"nnU-Net v2, {results.name}, {fold}{slices}",
        "trained_on": f"{plans['dataset_name']}, {dataset.get('numTraining', '?')} cases",
        "licence": str(dataset.get("licence", dataset.get("license", "unknown"))),
        "checkpoint": str(path),
        "network": _architecture(configuration) | own,
        "channels": channels,
        "preprocessing": [
            *([{"_target_": "Orientationd", "axcodes": "RAS"}] if "Reorient" in plans["image_reader_writer"] else []),
            {"_target_": f"{__name__}.CropNonzerod"},
            *_normalisation(plans, configuration, len(channels)),
            _resampling(configuration) | {"pixdim": [spacing.get(axis, -1) for axis in range(3)]},
        ],
        "axes": axes,
        "window": [size for _, size in sorted(zip(taken, patch, strict=True))],
        "blending": "nnunet",
        "mirror": sorted(taken[axis] for axis in checkpoint.get("inference_allowed_mirroring_axes") or ()),
        "dimensions": len(patch),
        "classes": classes,
        "encoder": "encoder",
        "batch_size": configuration.get("batch_size", 2),
    }


def _configuration(plans: dict, name: str) -> dict[str, Any]:
    """A configuration of the plans, with the values that it inherits."""
    own = plans["configurations"][name]
    return _configuration(plans, own["inherits_from"]) | own if "inherits_from" in own else own


def _classes(dataset: dict) -> tuple[list[str], bool]:
    """Names of the background and of all classes, in the order of the channels; and whether they are regions."""
    labels = {label: np.atleast_1d(value).tolist() for label, value in dataset["labels"].items() if label != "ignore"}
    background = [label for label, values in labels.items() if set(values) == {0}]
    foreground = [label for label in labels if label not in background]
    if len(background) != 1:
        raise InputError(f"dataset.json gives label 0 to {len(background)} classes; expected one, the background")
    if any(len(values) > 1 for values in labels.values()):
        if len(order := dataset.get("regions_class_order") or ()) != len(foreground):
            raise InputError(f"its regions_class_order is {order}; expected one label for each of {foreground}")
        return background + foreground, True
    foreground.sort(key=labels.__getitem__)
    if [labels[label] for label in foreground] != [[1 + place] for place in range(len(foreground))]:
        raise InputError(f"its labels are {labels}; expected 0, 1, 2, ... without gaps")
    return background + foreground, False


def _architecture(configuration: dict) -> dict[str, Any]:
    """The definition of the network; before nnU-Net 2.3 the plans had other keys."""
    if given := configuration.get("architecture"):
        return {"_target_": given["network_class_name"], **given["arch_kwargs"]}
    target, stages = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
    dims, base = len(configuration["patch_size"]), configuration["UNet_base_num_features"]
    most = configuration["unet_max_num_features"]
    return {
        "_target_": f"dynamic_network_architectures.architectures.unet.{target}",
        "n_stages": len(stages),
        "features_per_stage": [min(base * 2**index, most) for index in range(len(stages))],
        "conv_op": f"torch.nn.Conv{dims}d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage" if target == "PlainConvUNet" else "n_blocks_per_stage": stages,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _normalisation(plans: dict, configuration: dict, channels: int) -> list[dict[str, Any]]:
    """nnU-Net's normalisations as steps of a card.

    Those inside the body come first: the body is where a channel is not 0, and the other steps may change zeros.
    """
    given = list(zip(configuration["normalization_schemes"], configuration["use_mask_for_norm"], strict=True))
    body = [place for place in range(channels) if given[place] == ("ZScoreNormalization", True)]
    steps = [{"_target_": f"{__name__}.NormalizeNonzerod", "only": body}] if body else []
    for channel in (place for place in range(channels) if place not in body):
        scheme, known = given[channel][0], plans["foreground_intensity_properties_per_channel"]
        if scheme == "CTNormalization":
            low, high, mean, std = (
                float(known[str(channel)][key]) for key in ("percentile_00_5", "percentile_99_5", "mean", "std")
            )
            limits = {"b_min": (low - mean) / max(std, 1e-8), "b_max": (high - mean) / max(std, 1e-8)}
            step = {"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high, **limits, "clip": True}
        elif scheme in NORMALISATIONS:
            step = NORMALISATIONS[scheme]
        else:
            known = ", ".join(["CTNormalization", *NORMALISATIONS])
            raise InputError(f"it normalises by {scheme}; known: {known}")
        if step is not None:
            steps.append(step | {"channels": [channel]})
    return steps


def _resampling(configuration: dict) -> dict[str, Any]:
    function, options = configuration["resampling_fn_data"], configuration["resampling_fn_data_kwargs"]
    if function not in RESAMPLING_ORDER or options.get("order_z", 0) != 0:
        known = f"{', '.join(RESAMPLING_ORDER)}, with order_z 0"
        raise InputError(f"it resamples by {function} with {options}; known: {known}")
    how = {"mode": options.get("order", RESAMPLING_ORDER[function]), "separate": options.get("force_separate_z")}
    return {"_target_": f"{__name__}.ResampleSpacingd", **how}


def sliding_window(
    batch: torch.Tensor,
    window: Sequence[int],
    network: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    overlap: float = 0.5,
) -> tuple[torch.Tensor, ...]:
    """The network's outputs for a large image, from windows that are placed and weighted as in nnU-Net.

    MONAI's inferer uses a fixed step, so that the last window overlaps more. Here all steps are equal, up to one voxel.
    An image smaller than the window is padded with zeros.

    Args:
        batch: N x C x *spatial.
        window: its size along each spatial axis.
        network: maps N x C x window to outputs of N x K x window.
        overlap: smallest share of a window that overlaps with the next one, in [0, 1).

    Returns:
        N x K x *spatial: means weighted by a Gaussian around the middle of each window.

    >>> sliding_window(torch.ones(1, 1, 7, 3), (4, 4), lambda patch: (2 * patch,))[0].unique()
    tensor([2.])
    """
    missing = [max(0, least - size) for least, size in zip(window, batch.shape[2:], strict=True)]
    sides = [(count // 2, count - count // 2) for count in missing]
    padded = nn.functional.pad(batch, [count for pair in reversed(sides) for count in pair])
    size = padded.shape[2:]
    weight = np.zeros(tuple(window))
    weight[tuple(length // 2 for length in window)] = 1
    weight = gaussian_filter(weight, [length / 8 for length in window], mode="constant")
    weight = torch.from_numpy(np.maximum(weight, weight[weight > 0].min()) / weight.max()).to(batch)
    starts = []
    for length, extent in zip(window, size, strict=True):
        steps = math.ceil((extent - length) / (length * (1 - overlap)))
        starts.append(np.linspace(0, extent - length, steps + 1).round().astype(int))
    totals, weights = (), torch.zeros(size).to(batch)
    for corner in itertools.product(*starts):
        place = (..., *[slice(start, start + length) for start, length in zip(corner, window, strict=True)])
        outputs = network(padded[place])
        totals = totals or tuple(output.new_zeros(*output.shape[:2], *size) for output in outputs)
        for total, output in zip(totals, outputs, strict=True):
            total[place] += output * weight
        weights[place] += weight
    inner = [slice(low, low + count) for (low, _), count in zip(sides, batch.shape[2:], strict=True)]
    return tuple((total / weights)[(..., *inner)] for total in totals)


class CropNonzerod(CropForegroundd):
    """Crop to the smallest box around all voxels in which a channel is not 0; an image of zeros is not cropped.

    Args:
        keys, source_key, mode, start_coord_key, end_coord_key: see `CropForegroundd`, which looks for values above 0.

    >>> image = torch.zeros(1, 5, 5)
    >>> image[0, 1:3, 2] = -7
    >>> CropNonzerod("image", "image")({"image": image})["image"].shape
    torch.Size([1, 2, 1])
    """

    def __init__(
        self,
        keys: KeysCollection,
        source_key: str,
        mode: str | Sequence[str] = "constant",
        start_coord_key: str | None = None,
        end_coord_key: str | None = None,
    ) -> None:
        coordinates = {"start_coord_key": start_coord_key, "end_coord_key": end_coord_key}
        super().__init__(keys, source_key, select_fn=_not_zero, mode=mode, **coordinates)


def _not_zero(image: torch.Tensor) -> torch.Tensor:
    return image != 0 if image.any() else image == 0


class NormalizeNonzerod(EachKeyd):
    """Give channels mean 0 and standard deviation 1 inside the body: where any channel is not 0, and in its holes.

    Args:
        keys: images, C x *spatial.
        only: the channels to normalise; other channels, and voxels outside the body, do not change.

    >>> image = torch.tensor([[0.0, 4.0, 8.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    >>> NormalizeNonzerod("image", [0])({"image": image})["image"]
    tensor([[-1.2247,  0.0000,  1.2247,  0.0000],
            [ 1.0000,  0.0000,  1.0000,  0.0000]])
    """

    def __init__(self, keys: KeysCollection, only: Sequence[int]) -> None:
        super().__init__(keys)
        self.only = only

    def changed(self, given: NdarrayOrTensor) -> NdarrayOrTensor:
        image = convert_to_numpy(given).astype(np.float32)
        body = binary_fill_holes((image != 0).any(0))
        for channel in (image[place] for place in self.only):
            values = channel[body]
            channel[body] = (values - values.mean()) / max(values.std(), 1e-8) if values.size else values
        return convert_to_dst_type(image, given, dtype=torch.float32)[0]


class ResampleSpacingd(EachKeyd, InvertibleTransform):
    """Resample to a spacing as nnU-Net does; the inverse interpolates linearly, as nnU-Net does for predictions.

    Unlike MONAI's `Spacingd`, the borders of the image stay where they are, because the ratio of the sizes sets the
    scale. If the old or new spacing is more than three times larger along one axis, slices across this axis are
    resampled in plane, and then repeated along it.

    Args:
        keys: C x X x Y (x Z), with an affine; without one the spacing is 1.
        pixdim: mm along each axis; 0 or less keeps the image's own.
        mode: order of the splines, 0 to 3, or ``"nearest"``.
        separate: resample slices in plane only; None: by the rule above.

    >>> image = MetaTensor(torch.rand(1, 4, 4, 6), affine=torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])))
    >>> ResampleSpacingd("image", [1, 1, 1])({"image": image})["image"].shape
    torch.Size([1, 8, 8, 6])
    """

    def __init__(
        self, keys: KeysCollection, pixdim: Sequence[float], mode: int | str = 3, separate: bool | None = None
    ) -> None:
        super().__init__(keys)
        self.pixdim, self.separate, self.order = pixdim, separate, 0 if mode == "nearest" else mode

    def changed(self, image: torch.Tensor) -> torch.Tensor:
        size = image.shape[1:]
        found = image.pixdim if isinstance(image, MetaTensor) else [1.0] * len(size)
        before = [float(f"{value:.6g}") for value in found]  # the affine may give 0.50000001 for 0.5
        after = [new if new > 0 else old for new, old in zip(self.pixdim, before, strict=False)]
        new_size = [round(old / new * n) for old, new, n in zip(before, after, size, strict=True)]
        resampled = self._resampled(image, new_size, self.order, self._axis(before, after))
        back = {"order": min(self.order, 1), "axis": self._axis(after, before)}
        affine = scale_affine(list(size), new_size)
        self.push_transform(resampled, orig_size=tuple(size), affine=affine, extra_info=back)
        return resampled

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            done = self.pop_transform(data[key])
            size, new_size, how = list(data[key].shape[1:]), list(done["orig_size"]), done["extra_info"]
            data[key] = self._resampled(data[key], new_size, how["order"], how["axis"])
            data[key].affine = data[key].affine @ torch.as_tensor(scale_affine(size, new_size))
        return data

    def _axis(self, first: Sequence[float], then: Sequence[float]) -> int | None:
        """The axis across which slices are resampled separately; None: there is no such axis."""
        if self.separate is False or len(first) < 3:
            return None
        for spacing in (first, then):
            if self.separate or max(spacing) / min(spacing) > ANISOTROPIC:
                axes = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
                return axes[0] if len(axes) == 1 else None
        return None

    def _resampled(self, image: torch.Tensor, size: Sequence[int], order: int, axis: int | None) -> torch.Tensor:
        array = convert_to_numpy(image).astype(np.float64)
        if array.shape[1:] != tuple(size):
            resized = partial(resize, order=order, mode="edge", anti_aliasing=False)
            if axis is None:
                array = np.stack([resized(channel, size) for channel in array])
            else:
                plane, old, new = [n for i, n in enumerate(size) if i != axis], array.shape[axis + 1], size[axis]
                nearest = ((np.arange(new) + 0.5) * old / new).astype(int)
                slices = np.moveaxis(array, axis + 1, 1)
                slices = [[resized(channel[index], plane) for index in range(old)] for channel in slices]
                array = np.moveaxis(np.asarray(slices)[:, nearest], 1, axis + 1)
        return convert_to_dst_type(array, image, dtype=image.dtype)[0]
