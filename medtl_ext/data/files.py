"""Image and label files of every format, read by MONAI's own readers as channels on one grid."""

from __future__ import annotations

import gzip
import locale
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import joblib
import nibabel
import numpy as np
from monai.data import ImageReader, ITKReader, NibabelReader, PILReader
from monai.utils import ensure_tuple, optional_import
from nibabel.affines import voxel_sizes
from PIL import Image
from tifffile import imread
from tqdm import tqdm

from medtl_ext._io import suffix_of
from medtl_ext._validation import InputError

NIFTI, PICTURES = (".nii", ".nii.gz", ".hdr", ".img"), (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
BY_ITK = (".nrrd", ".mha", ".mhd", ".dcm")
FORMATS = (*NIFTI, *PICTURES, *BY_ITK)
LOSSY = (".jpg", ".jpeg")
MODES = ("1", "L", "P", "I;16", "I;16B", "I", "F", "RGB")
TURNED_BY = 0x0112  # EXIF's tag of the orientation
SAME_AFFINE_MM = 1e-3  # headers keep affines in float32, so two tools rarely agree to the last digit
MOST_VOXELS = 2**29  # in a file: 4 GiB as 64-bit numbers
MOST_BEHIND = 2**20  # bytes that a compressed file may hold behind its voxels
MAX_THREADS = 8  # every thread holds one or two volumes: more threads fill the memory and read no faster


class Unusable(InputError):
    """A file that cannot be used: what is wrong with it, and what to do."""

    def __init__(self, path: str, problem: str, advice: str) -> None:
        super().__init__(f"{path} {problem}; {advice}.")
        self.problem, self.advice = problem, advice


class Part(NamedTuple):
    """What a name in a datalist means: a whole file, one of its channels (``#1/3``), or its colours (``#rgb``)."""

    path: str
    channel: int | None = None
    of: int = 1
    colours: bool = False

    @classmethod
    def parse(cls, text: str) -> Part:
        """
        >>> Part.parse("p1.png#1/3")
        Part(path='p1.png', channel=1, of=3, colours=False)
        """
        found = re.fullmatch(r"(.*)#(?:(\d+)/(\d+)|rgb)", text, flags=re.DOTALL)
        if found is None:
            return cls(text)
        path, channel, of = found.groups()
        return cls(path, colours=True) if channel is None else cls(path, int(channel), int(of))


class ChannelReader(ImageReader):
    """A reader for `monai.transforms.LoadImage` that gives channels x X x Y x Z from files of any format.

    Formats: NIfTI and Analyze (by `NibabelReader`); PNG, JPEG, BMP and TIFF (by `PILReader`; X x Y x 1, rows along Y,
    voxels of 1 mm); NRRD, MetaImage and a folder with one DICOM series (by `ITKReader`, which needs ``pip install
    'medtl[itk]'``). A list of files gives one channel per file, all on one grid. ``FILE#1/3`` is the second of three
    channels of a colour or 4D file. ``FILE#rgb`` is a mask whose colours become numbers, red x 65536 + green x 256 +
    blue. In a bundle::

        {"_target_": "LoadImaged", "keys": ["image", "label"], "reader": "medtl_ext.data.ChannelReader",
         "ensure_channel_first": true}

    Raises:
        InputError: a file is missing or broken, is rotated by EXIF, has several pages, an alpha channel, or another
            number of channels than expected; or files lie on different grids.
    """

    def verify_suffix(self, filename: Any) -> bool:
        return all(suffix_of(Part.parse(str(name)).path) in FORMATS for name in ensure_tuple(filename))

    def read(self, data: Any, **kwargs: Any) -> tuple[str, ...]:
        """Return the names only: MONAI would replace an error raised here by its own."""
        return tuple(map(str, ensure_tuple(data)))

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        return read_channels(img)


def read_channels(names: Iterable[str], *, every_byte: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Read files as channels x X x Y x Z, with MONAI's metadata of the first file; see `ChannelReader`.

    Args:
        names: as a datalist gives them.
        every_byte: also check the checksum at the end of a compressed file.
    """
    channels, metas = [], []
    for path, parts in groupby(map(Part.parse, names), key=lambda part: part.path):
        parts = list(parts)
        array, meta = _read(path, colour=parts[0].colours or parts[0].of > 1, every_byte=every_byte)
        if parts[0].colours:
            if len(array) != 3:
                raise Unusable(path, "is no colour file, but its label is declared by colours", "declare numbers")
            array = (array[0].astype(np.int32) << 16 | array[1].astype(np.int32) << 8 | array[2])[None]
        elif len(array) != parts[0].of:
            raise Unusable(path, *_miscounted(len(array), parts[0].of))
        wanted = [part.channel for part in parts]
        channels.append(array if wanted in ([None], list(range(len(array)))) else array[wanted])
        metas.append((path, meta))
    for path, meta in metas[1:]:
        _require_one_grid(path, meta, *metas[0])
    array = channels[0] if len(channels) == 1 else np.concatenate(channels)
    return array, metas[0][1] | {"original_channel_dim": 0}


def affine_of(name: str) -> np.ndarray:
    """The affine (voxels to mm, 4 x 4) of a file of a datalist; for NIfTI only the header is read."""
    path = Part.parse(name).path
    return nibabel.load(path).affine if suffix_of(path) in NIFTI else read_channels([name])[1]["affine"]


def shape_of(name: str) -> tuple[int, ...]:
    """The shape X x Y x Z of a file of a datalist; for NIfTI only the header is read."""
    path = Part.parse(name).path
    if suffix_of(path) not in NIFTI:
        return tuple(map(int, read_channels([name])[1]["spatial_shape"]))
    shape = nibabel.load(path).shape
    return (*shape, 1)[:3]


def _miscounted(found: int, expected: int) -> tuple[str, str]:
    if expected == 1:
        key = "R+G+B" if found == 3 else "T1+T2"
        advice = f'name the channels of an image, such as "{key}" as its key in "images", or store one volume per file'
        return f"has {found} channels where one is expected", advice
    return f"has {found} channel{'s'[: found != 1]}, but the collection names {expected}", "name as many"


def _require_one_grid(path: str, meta: dict[str, Any], first: str, meta_of_first: dict[str, Any]) -> None:
    shape, expected = (tuple(map(int, one["spatial_shape"])) for one in (meta, meta_of_first))
    if shape != expected:
        problem = f"has shape {shape}, but {first} has {expected}"
        raise Unusable(path, problem, "resample one onto the grid of the other")
    apart = float(np.abs(meta["affine"] - meta_of_first["affine"]).max())
    if apart > SAME_AFFINE_MM:
        problem = f"and {first} differ in their affines by up to {apart:.3g} mm"
        raise Unusable(path, problem, "resample one onto the grid of the other")


def _read(path: str, *, colour: bool, every_byte: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """Channels x X x Y x Z and the metadata of one file."""
    suffix, folder = suffix_of(path), os.path.isdir(path)
    if not os.path.exists(path):
        raise Unusable(path, "does not exist", "correct its path, or restore it")
    if not folder and not os.path.isfile(path):
        raise Unusable(path, "is neither a file nor a folder", "correct its path")
    if suffix not in FORMATS and not folder:
        raise Unusable(path, f"has no format that can be read ({', '.join(FORMATS)})", "convert it to one of these")
    try:
        if suffix in NIFTI:
            array, meta = _nifti(path, every_byte)
        elif suffix in PICTURES:
            array, meta = _picture(path, colour)
        else:
            array, meta = _by_itk(path, folder)
    except InputError:
        raise
    except Exception as error:  # a broken file fails in a dozen ways
        reason = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise Unusable(path, f"cannot be read ({reason})", "copy or convert it again") from error
    if np.isnan(meta["original_channel_dim"]):
        array = array[None]
    else:
        array = np.moveaxis(array, int(meta["original_channel_dim"]), 0)
    if array.ndim == 3:  # a picture, or a volume of two dimensions
        array = array[..., None]
    if array.ndim != 4 or array.size == 0 or array.dtype.kind not in "biuf":
        problem = f"has shape {array.shape[1:]} and voxels of type {array.dtype}"
        raise Unusable(path, problem, "store one 3D volume of numbers, or one 2D image, per file")
    affine = np.eye(4)
    given = np.asarray(meta.get("affine", affine))
    side = len(given) - 1
    affine[:side, :side], affine[:side, 3] = given[:side, :side], given[:side, side]
    grid = {"affine": affine, "original_affine": affine.copy(), "spatial_shape": np.array(array.shape[1:])}
    return array, meta | grid


def _nifti(path: str, every_byte: bool) -> tuple[np.ndarray, dict[str, Any]]:
    image = nibabel.load(path)  # the header alone
    voxels, sizes, header = prod(image.shape), voxel_sizes(image.affine), np.abs(image.header.get_zooms()[:3])
    if voxels > MOST_VOXELS:
        shape = " x ".join(map(str, image.shape))
        raise Unusable(path, f"claims {shape} voxels; at most {MOST_VOXELS:,} are allowed", "crop or resample it")
    if not abs(np.linalg.det(image.affine)) > 0:
        raise Unusable(path, "has a singular affine", "correct its header")
    if not np.allclose(sizes[: len(header)], header, rtol=SAME_AFFINE_MM, atol=SAME_AFFINE_MM):
        problem = f"has voxels of {in_times(header)} mm by pixdim, but of {in_times(sizes)} mm by its affine"
        raise Unusable(path, problem, "correct the one that is wrong")
    if every_byte and suffix_of(path).endswith(".gz"):  # nibabel stops at the last voxel
        most = image.dataobj.offset + voxels * image.get_data_dtype().itemsize + MOST_BEHIND
        with gzip.open(path) as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise Unusable(path, "holds more data after its last voxel", "copy or convert it again")
        image = type(image).from_bytes(content)
    reader = NibabelReader()
    reader.filenames = (path,)  # its `read` would change the affine if pixdim is rounded; viewers do not
    return reader.get_data(image)


def in_times(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def _picture(path: str, colour: bool) -> tuple[np.ndarray, dict[str, Any]]:
    image = Image.open(path)
    deep_colour = image.mode == "RGB" and any(";16" in str(tile[-1]) for tile in image.tile)  # gone once it is loaded
    if getattr(image, "n_frames", 1) > 1:
        raise Unusable(path, f"has {image.n_frames} pages", "save each page as a file of its own")
    if image.getexif().get(TURNED_BY, 1) != 1:
        advice = "rotate the pixels and remove the entry"
        raise Unusable(path, "is rotated by its EXIF entry, which not every tool obeys", advice)
    if image.mode in ("LA", "RGBA", "PA"):
        raise Unusable(path, "has an alpha channel", "save it without alpha")
    if image.mode not in MODES:
        raise Unusable(path, f"has pixels of mode {image.mode}", "save it as grey or RGB")
    if deep_colour and suffix_of(path) not in (".tif", ".tiff"):
        raise Unusable(path, "has 16 bits per colour, but PIL would keep only 8", "save it as TIFF")
    if deep_colour:
        return imread(path).swapaxes(0, 1), {"original_channel_dim": -1}
    image.load()  # raises for a truncated file
    return PILReader().get_data(image.convert("RGB") if colour and image.mode == "P" else image)


@cache
def _itk() -> Any:
    itk, found = optional_import("itk")
    return itk if found else None


def _by_itk(path: str, folder: bool) -> tuple[np.ndarray, dict[str, Any]]:
    if _itk() is None:
        raise Unusable(path, "needs ITK, which is not installed", "pip install 'medtl[itk]'")
    before = locale.setlocale(locale.LC_ALL)
    try:
        if folder:
            _require_one_series(path)
        reader = ITKReader()
        array, meta = reader.get_data(reader.read(path))
    finally:  # GDCM leaves the process in the locale C, in which text files are no longer UTF-8
        locale.setlocale(locale.LC_ALL, before)
    return np.asarray(array), meta


def _require_one_series(folder: str) -> None:
    """Refuse a folder that does not hold exactly one DICOM series without gaps."""
    itk = _itk()
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(folder)
    series = list(names.GetSeriesUIDs())
    if len(series) != 1:
        what = f"{len(series)} DICOM series" if series else "no DICOM file"
        raise Unusable(folder, f"holds {what}", "give the folder of one series")
    places = []
    for file in names.GetFileNames(series[0]):
        header = itk.GDCMImageIO.New()
        header.SetFileName(file)
        header.ReadImageInformation()
        normal = np.cross(header.GetDirection(0), header.GetDirection(1))
        places.append(float(np.dot(normal, [header.GetOrigin(axis) for axis in range(3)])))
    steps = np.diff(sorted(places))
    if len(steps) and steps.max() > 1.5 * np.median(steps):
        gap = f"{np.median(steps):.3g} mm apart, but {steps.max():.3g} mm in one place"
        raise Unusable(folder, f"lacks slices: they are {gap}", "export the whole series again")


def find_images(where: str, channels: Sequence[str]) -> list[dict[str, Any]]:
    """List the patients in a folder (or the one patient of a file): ``name`` and ``image``, as in a datalist.

    With several channels there are three layouts. Each file name ends in a channel (``p1_T1.nii.gz``, or nnU-Net's
    ``p1_0000.nii.gz``). Or one file holds all channels, such as a colour photograph. Or each patient has a folder, and
    the file names in it are or end in a channel. A folder of ``.dcm`` files is one image.

    Raises:
        InputError: there is no image to read, a patient lacks a channel, or two images would have one name.
    """
    path = Path(where)
    if not path.exists():
        raise InputError(f"{where} does not exist; give an image, or a folder of images.")
    files = [path] if path.is_file() or _is_series(path) else sorted(path.iterdir())
    found: dict[str, dict[str | None, Path]] = {}
    for file in files:
        inside = sorted(file.iterdir()) if file.is_dir() and not _is_series(file) else None
        for image in [file] if inside is None else inside:
            half = suffix_of(image) == ".img" and image.with_suffix(".hdr").is_file()  # of an Analyze pair
            if half or image.name[0] == "." or not (_is_series(image) or suffix_of(image) in FORMATS):
                continue
            stem = image.name[: len(image.name) - len(suffix_of(image))] if image.is_file() else image.name
            name, channel = _named(stem, channels)
            patient = found.setdefault(file.name if inside is not None else name, {})
            if channel in patient:
                twice = f"{channel or 'images'} of {name}"
                raise InputError(f"{where} holds two {twice}: {patient[channel].name} and {image.name}; keep one.")
            patient[channel] = image
    if not found:
        raise InputError(f"no image ({', '.join(FORMATS)}) in {where}; give an image or a folder of images.")
    return [{"name": name, "image": _of_patient(name, files, channels)} for name, files in found.items()]


def require_readable(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read all images to the last byte; return the items, or raise the first fault."""

    def problem(item: dict[str, Any]) -> str | None:
        try:
            read_channels(ensure_tuple(item["image"]), every_byte=True)
        except InputError as error:
            return str(error)
        return None

    if problems := [found for found in for_each(problem, items) if found]:
        raise InputError(problems[0] + (f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""))
    return items


def for_each(read: Callable[[Any], Any], files: Sequence[Any], *, progress: bool = True) -> list[Any]:
    """Call ``read`` on every file, several at a time in threads, and return the results in order."""
    threads = joblib.Parallel(min(MAX_THREADS, joblib.cpu_count()), require="sharedmem", return_as="generator")
    jobs = threads(joblib.delayed(read)(file) for file in files)
    return list(tqdm(jobs, "checking files", total=len(files), unit="file", disable=None if progress else True))


def _is_series(path: Path) -> bool:
    return path.is_dir() and any(suffix_of(file) == ".dcm" for file in path.iterdir())


def _named(stem: str, channels: Sequence[str]) -> tuple[str, str | None]:
    """The patient and the channel of a file (None: it holds all channels, or there is only one)."""
    for number, channel in enumerate(channels if len(channels) > 1 else ()):
        for ending in (channel, f"{number:04d}"):
            if stem == ending or stem.endswith(f"_{ending}"):
                return stem.removesuffix(ending).removesuffix("_"), channel
    return stem, None


def _of_patient(name: str, files: dict[str | None, Path], channels: Sequence[str]) -> str | list[str]:
    if set(files) == {None}:
        path = str(files[None])
        several = [f"{path}#{number}/{len(channels)}" for number in range(len(channels))]
        return several if len(several) > 1 else path
    if missing := [channel for channel in channels if channel not in files]:
        beside, rule = next(iter(files.values())), f"end in a channel ({', '.join(channels)}) or a number (0000, ...)"
        raise InputError(f"{name} has no file of {' and '.join(missing)} beside {beside}; file names must {rule}.")
    return [str(files[channel]) for channel in channels]
