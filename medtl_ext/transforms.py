"""Dictionary transforms: select a task's classes, resample to a coarser grid, normalise intensities, save results."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, NibabelWriter, PILWriter, get_track_meta
from monai.data.utils import AFFINE_TOL
from monai.transforms import MapTransform, SaveImage, Spacingd
from monai.utils import convert_to_dst_type, convert_to_numpy, convert_to_tensor, ensure_tuple
from scipy.ndimage import binary_fill_holes, convolve1d
from scipy.ndimage import label as connected_parts

from medtl_ext._io import atomic_path, suffix_of
from medtl_ext._validation import InputError, require_number, warn, whole_labels

# Chosen on eight brain-extracted clinical MRI volumes with small positive and negative values around the brain, from
# resampling. 2 % and 5 % give the same brain to within 3 % of its voxels; 10 % loses up to 7 %, mostly CSF.
_BODY_SHARE, _BODY_PERCENTILE = 0.05, 99.0
# Standard scores are clipped here, so that a few bright vessels do not set the range.
_LOWEST, _HIGHEST = -4.0, 6.0


def body_mask(image: NdarrayOrTensor) -> np.ndarray:
    """Mask of the body: voxels whose magnitude exceeds 5 % of the image's 99th percentile, with holes filled.

    For images whose background is (almost) zero: brain-extracted MRI (resampling leaves small positive and negative
    values around the brain) and the phantom. The percentile is over the magnitudes of non-zero voxels, so the amount of
    background does not matter. Filling the holes adds dark ventricles. All separate parts are kept, because low slices
    of a brain have several. Do not standardise an image twice: in a standardised image, tissue near zero can be missed
    (up to 15 % of the brain).

    Args:
        image: one channel, X x Y (x Z).

    Returns:
        Boolean array of the same shape, all False for an image of zeros.

    >>> image = np.zeros((5, 5))
    >>> image[1:4, 1:4] = 100  # a body ...
    >>> image[2, 2] = 0  # with a dark ventricle
    >>> image[0, 0] = -1  # and a trace of resampling
    >>> int(body_mask(image).sum())
    9
    """
    magnitude = np.abs(convert_to_numpy(image))
    signal = magnitude[magnitude > 0]
    if signal.size == 0:
        return np.zeros(magnitude.shape, dtype=bool)
    return binary_fill_holes(magnitude > _BODY_SHARE * np.percentile(signal, _BODY_PERCENTILE))


class EachKeyd(MapTransform):
    """Base class of transforms that change each key independently, by their method ``changed``."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return dict(data) | {key: self.changed(data[key]) for key in self.key_iterator(data)}


class NormalizeBodyd(EachKeyd):
    """Standardise intensities inside the body to mean 0 and standard deviation 1; outside they are exactly 0.

    Values are clipped to [-4, 6], so that a few bright vessels do not set the range. Every channel has its own
    `body_mask`, mean and deviation. A channel that is constant inside the body becomes 0.

    Args:
        keys: images, C x *spatial.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        InputError: an image with NaN or infinite values.

    >>> image = torch.zeros(1, 4, 4)
    >>> image[0, 1:3, 1:3] = torch.tensor([[90.0, 110.0], [90.0, 110.0]])
    >>> NormalizeBodyd("image")({"image": image})["image"][0, 1]
    tensor([ 0., -1.,  1.,  0.])
    """

    def changed(self, given: NdarrayOrTensor) -> NdarrayOrTensor:
        image = convert_to_numpy(given)
        if not np.isfinite(image).all():
            where = getattr(given, "meta", {}).get("filename_or_obj", "the image")
            raise InputError(f"{where} holds NaN or infinite values; expected finite intensities: repair the file.")
        channels = np.stack([self._normalize(channel) for channel in image])
        return convert_to_dst_type(channels, given, dtype=np.float32)[0]

    def _normalize(self, channel: np.ndarray) -> np.ndarray:
        scores = np.zeros(channel.shape, dtype=np.float32)
        mask = body_mask(channel)
        body = channel[mask].astype(np.float64)
        if body.size and body.max() > body.min():
            scores[mask] = ((body - body.mean()) / body.std()).clip(_LOWEST, _HIGHEST)
        return scores


class AreaSpacingd(Spacingd):
    """Resample to a voxel size as MONAI's `Spacingd`, but without aliasing if an axis becomes coarser.

    Then an image is first averaged over the area of a new voxel (at the border, over the part inside the image). Each
    label voxel gets the class that covers most of it; on a tie, the rarer class of this label. If no axis becomes
    coarser, it is `Spacingd`: images are interpolated linearly, and labels by nearest neighbour (a majority over finer
    voxels would only round corners and cut thin lines). Grid, record and inverse are those of `Spacingd`. The inverse
    resamples labels by nearest neighbour.

    Args:
        keys: C x *spatial with an affine. Without an affine voxels have size 1.
        pixdim: millimetres along each axis; the last value is used for further axes. 0 or less keeps the image's value.
        labels: the keys that hold class numbers, each 1 x *spatial. They keep their dtype.
        allow_missing_keys: do not raise when a key is missing.

    >>> label = MetaTensor(torch.tensor([[[0, 0, 1, 1, 0, 0, 0]]], dtype=torch.uint8), affine=torch.eye(3))
    >>> AreaSpacingd("label", [1, 3])({"label": label})["label"].flatten().tolist()  # 2 of 3 voxels around the second
    [0, 1, 0]
    """

    requires_current_data = True  # of a lazy Compose

    def __init__(
        self,
        keys: KeysCollection,
        pixdim: Sequence[float] | float,
        labels: KeysCollection = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        self.labels = ensure_tuple(labels)
        modes = ["nearest" if key in self.labels else "bilinear" for key in ensure_tuple(keys)]
        super().__init__(keys, pixdim, mode=modes, allow_missing_keys=allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        images = {key: self._averaged(data[key]) for key in self.key_iterator(dict(data)) if key not in self.labels}
        done = super().__call__({**data, **images}, lazy=False)
        for key in self.key_iterator(dict(data)):
            if key in self.labels:
                done[key] = self._majority(data[key], done[key])
        return done

    def _factors(self, image: torch.Tensor) -> np.ndarray:
        """How much coarser each axis becomes; 1 if it does not (within MONAI's tolerance)."""
        before = convert_to_numpy(image.pixdim) if isinstance(image, MetaTensor) else np.ones(image.ndim - 1)
        after = np.ravel(self.spacing_transform.pixdim)[: len(before)]
        after = np.pad(after, (0, len(before) - len(after)), mode="edge")
        return np.where(after > before + AFFINE_TOL, after / before, 1.0)

    def _averaged(self, image: torch.Tensor) -> torch.Tensor:
        """Replace each voxel by the mean over a box around it that is as wide as a new voxel."""
        factors = self._factors(image)
        if factors.max() == 1:
            return image
        mean = convert_to_numpy(image).astype(np.float32)
        for axis, factor in enumerate(factors, start=1):
            reach = int(np.ceil((factor - 1) / 2))
            box = ((factor + 1) / 2 - np.abs(np.arange(-reach, reach + 1))).clip(0, 1)  # partial weights at its ends
            if reach:
                inside = convolve1d(np.ones(mean.shape[axis], dtype=np.float32), box, mode="constant")
                mean = convolve1d(mean, box, axis=axis, mode="constant")
                mean /= inside.reshape([-1 if place == axis else 1 for place in range(mean.ndim)])
        return convert_to_dst_type(mean, image, dtype=torch.float32)[0]

    def _majority(self, label: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """The label on the new grid by majority; ``nearest`` is the one by nearest neighbour."""
        found = nearest.to(label.dtype)
        if self._factors(label).max() == 1:
            return found
        classes, counts = np.unique(convert_to_numpy(label), return_counts=True)
        most = torch.zeros(found.shape, device=found.device)
        for number in classes[np.lexsort((-classes.astype(int), counts))]:  # rare classes first: they win ties
            one = self._averaged((label == number).float())
            share = self.spacing_transform(one, output_spatial_shape=found.shape[1:])
            more = share > most + 1e-5  # smaller differences are ties up to rounding
            most[more], found[more] = share[more].float(), number.item()
        return found


class PickChannelsd(EachKeyd):
    """Put the channels of an image into the order that a network expects.

    Args:
        keys: images, C x *spatial.
        channels: index in the image of each channel. None gives a constant channel, the mean of the image.
        allow_missing_keys: do not raise when a key is missing.

    >>> image = torch.tensor([[1.0], [3.0]])
    >>> PickChannelsd("image", [1, None])({"image": image})["image"].flatten().tolist()
    [3.0, 2.0]
    """

    def __init__(self, keys: KeysCollection, channels: Sequence[int | None], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channels = channels

    def changed(self, given: NdarrayOrTensor) -> torch.Tensor:
        image: torch.Tensor = convert_to_tensor(given, track_meta=get_track_meta())
        mean = torch.full_like(image[0], float(image.float().mean()))
        return torch.stack([mean if place is None else image[place] for place in self.channels])


class SelectLabelsd(EachKeyd):
    """Turn the values of a label file into the classes 1 to k of an objective; all other values become 0.

    The first label with values that are not whole numbers, or NaN, is named in a warning; see `whole_labels`.

    Args:
        keys: labels of integer value, 1 x *spatial, of any dtype.
        values: the values of each class in the label file, in order, as `Collection.label_values` gives them:
            ``[[1], [2, 3]]`` makes value 1 class 1, and values 2 and 3 class 2. ``[1, [2, 3]]`` means the same.
        allow_missing_keys: do not raise when a key is missing.

    The result is an unsigned 8-bit tensor: a `MetaTensor` with the label's metadata if MONAI tracks metadata.

    Raises:
        InputError: ``values`` is empty, a value belongs to two classes, or a label has fractional values.

    >>> SelectLabelsd("label", [[1], [2, 3]])({"label": torch.tensor([[0, 1, 2, 3, 4]])})["label"]
    metatensor([[0, 1, 2, 2, 0]], dtype=torch.uint8)
    """

    def __init__(
        self, keys: KeysCollection, values: Sequence[int | Sequence[int]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.warned = False
        self.values = [ensure_tuple(group) for group in values]
        flat = [value for group in self.values for value in group]
        if not flat or len(set(flat)) < len(flat):
            raise InputError(f"values is {values}; expected every label value once, such as [[1], [2, 3]].")

    def changed(self, given: NdarrayOrTensor) -> torch.Tensor:
        given = convert_to_tensor(given, track_meta=get_track_meta())
        label, note = whole_labels(convert_to_numpy(given))
        if note is not None:
            severity, problem, advice = note
            said = f"{getattr(given, 'meta', {}).get('filename_or_obj', 'label')}: {problem}; {advice}."
            if severity == "error":
                raise InputError(said)
            if not self.warned:
                warn(said)
            self.warned = True
        classes = np.zeros(label.shape, dtype=np.uint8)
        for number, group in enumerate(self.values, start=1):
            classes[np.isin(label, group)] = number
        return convert_to_dst_type(classes, given, dtype=torch.uint8)[0]


class CleanSegmentationd(EachKeyd):
    """Remove connected components (corners connect) of each class of a segmentation; they become background.

    Args:
        keys: segmentations by class number, 1 x *spatial, MetaTensors whose affine maps voxels to mm.
        how: None removes nothing. ``"largest"`` keeps the largest component only. A number removes components that are
            smaller, in ml. ``"validation"`` removes nothing here: `medtl_ext.transfer.ScorePatients` chooses later.
        split: the split whose patients are used for this choice. None: there is none.

    Raises:
        InputError: another ``how``, or ``"validation"`` without validation patients.

    >>> found = MetaTensor(torch.tensor([[1, 1, 0, 1, 0, 2]]), affine=torch.eye(4))
    >>> CleanSegmentationd("pred", "largest")({"pred": found})["pred"].tolist()
    [[1, 1, 0, 0, 0, 2]]
    >>> CleanSegmentationd("pred", 0.002)({"pred": found})["pred"].tolist()
    [[1, 1, 0, 0, 0, 0]]
    """

    def __init__(self, keys: KeysCollection, how: str | float | None = None, split: str | None = None) -> None:
        super().__init__(keys)
        if how == "validation" and split in (None, "train", "test"):
            advice = "give the choice of a training with such patients (clean.txt in its folder), or leave clean out"
            raise InputError(f"clean 'validation' chooses on validation patients, and there are none; {advice}.")
        if isinstance(how, str) and how not in ("largest", "validation"):
            raise InputError(f"clean is {how!r}; expected largest, a number of ml, or validation.")
        if not isinstance(how, str | None):
            require_number("clean, the least size in ml,", how, 0, above=True)
        self.how, self.split = how, split

    def changed(self, found: MetaTensor) -> MetaTensor:
        if self.how in (None, "validation"):
            return found
        classes = convert_to_numpy(found)[0].copy()
        voxel_ml = abs(np.linalg.det(convert_to_numpy(found.affine)[:-1, :-1])) / 1000
        for number in np.unique(classes[classes > 0]):
            parts, _ = connected_parts(classes == number, np.ones([3] * classes.ndim))
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            largest = np.arange(len(sizes)) == sizes.argmax()
            # The tolerance covers the rounding of the affine for a component of exactly this size.
            kept = largest if self.how == "largest" else sizes * voxel_ml > self.how * (1 - 1e-6)
            classes[(parts > 0) & ~kept[parts]] = 0
        return convert_to_dst_type(classes[None], found)[0]


class SaveSegmentationd(MapTransform):
    """Write a segmentation in the format, size and affine of its image.

    NIfTI files keep the header's codes and units (MONAI's own writer does not). In a PNG, BMP or TIFF the pixels are
    class numbers, displayed in colours. For a JPEG, whose compression would change them, a PNG is written; for a DICOM
    series, a NIfTI file. Files are written atomically.

    Args:
        keys: segmentations, 1 x X x Y x Z on the grid of the image, with the image's file in MONAI's metadata.
        output_dir: folder for ``NAME_seg.ENDING``, where NAME is the item's ``name`` or else the name of its image.
        probabilities: the keys hold probabilities of C classes, C x X x Y x Z. They are written as
            ``NAME_prob.nii.gz``, X x Y x Z x C, float32.
    """

    def __init__(self, keys: KeysCollection, output_dir: str, probabilities: bool = False) -> None:
        super().__init__(keys)
        self.folder, self.probabilities = Path(output_dir), probabilities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            source = Path(re.sub(r"#\d+/\d+$", "", data[key].meta["filename_or_obj"]))
            suffix = "" if source.is_dir() else suffix_of(source)  # a DICOM folder may be called 1.2.840
            ending = ".nii.gz" if self.probabilities else WRITTEN_AS.get(suffix, suffix)
            kind, dtype = ("prob", np.float32) if self.probabilities else ("seg", np.uint8)
            name = data.get("name") or source.name[: len(source.name) - len(suffix)]
            how = {"output_ext": ending, "output_dtype": dtype, "writer": WRITERS.get(ending), "print_log": False}
            with atomic_path(self.folder / f"{name}_{kind}{ending}") as temporary:
                save, path = SaveImage(self.folder, **how), str(temporary)[: -len(ending)]
                # The writer drops the channel. Without this, MONAI would take the last axis for a channel.
                meta = {**data[key].meta, "original_channel_dim": float("nan")}
                save(MetaTensor(data[key].as_tensor(), meta=meta), filename=path)
        return dict(data)


WRITERS = dict.fromkeys((".nii", ".nii.gz"), "medtl_ext.transforms.HeaderWriter")
WRITERS |= dict.fromkeys((".png", ".bmp", ".tif", ".tiff"), "medtl_ext.transforms.ClassWriter")
WRITTEN_AS = {"": ".nii.gz", ".dcm": ".nii.gz", ".hdr": ".nii.gz", ".img": ".nii.gz", ".jpg": ".png", ".jpeg": ".png"}


class HeaderWriter(NibabelWriter):
    """Keeps the codes and units of the input's NIfTI header. MONAI's writer sets both codes to 1, and no units."""

    KEPT = ("sform_code", "qform_code", "xyzt_units")

    def set_metadata(self, meta_dict: Mapping | None = None, resample: bool = True, **options: Any) -> None:
        super().set_metadata(meta_dict, resample, **options)
        self.kept = {key: int(value) for key, value in (meta_dict or {}).items() if key in self.KEPT}

    def write(self, filename: Any, verbose: bool = False, **options: Any) -> None:
        super().write(filename, verbose, **options)
        for key, value in self.kept.items():
            self.data_obj.header[key] = value
        nib.save(self.data_obj, filename)


class ClassWriter(PILWriter):
    """Writes a picture whose pixels are class numbers, with a colour palette."""

    COLOURS = (0, 0, 0, 230, 159, 0, 86, 180, 233, 0, 158, 115, 240, 228, 66, 0, 114, 178, 213, 94, 0, 204, 121, 167)

    def write(self, filename: Any, verbose: bool = False, **options: Any) -> None:
        picture = self.create_backend_obj(self.data_obj, dtype=np.uint8, scale=None)
        picture.putpalette([*self.COLOURS, *(grey for grey in range(8, 256) for _ in range(3))])
        picture.save(filename)
