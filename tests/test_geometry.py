"""Segmentations and maps lie on their image: oblique, permuted, flipped and anisotropic."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import RISK_MAP, SEQUENTIAL, Bundle, collection_of_one_class
from matplotlib.figure import Figure
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, LoadImaged, Orientationd
from nibabel.affines import apply_affine, voxel_sizes
from PIL import Image
from scipy import ndimage

from medtl_ext.data import generate_phantom
from medtl_ext.transfer import pictures
from medtl_ext.transforms import AreaSpacingd

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")

SPACING, ROI = [3.0, 3.0, 4.0], [64, 64]
GRID = {"spacing": SPACING, "roi_size": ROI}


def obliquely(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The same head as another scanner stores it: other axes, every second row, and a tilted field of view."""
    start, end = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(("P", "L", "I"))
    image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    affine = image.affine @ np.diag([1, 2, 1, 1])
    tilt = nib.eulerangles.euler2mat(z=0.2, y=-0.15, x=0.25)
    affine = nib.affines.from_matvec(tilt, [12.5, -30.25, 7.0]) @ affine
    values = np.asarray(image.dataobj)[:, ::2]
    tilted = nib.Nifti1Image(values, affine)
    tilted.set_sform(affine, code=4)
    tilted.set_qform(affine, code=2)
    tilted.header.set_xyzt_units("mm", "sec")
    return tilted


@pytest.fixture(scope="module")
def oblique(tmp_path_factory) -> Path:
    """A collection with one patient per split; all files are stored obliquely."""
    how = {"n_jobs": 1, "progress": False}
    path = generate_phantom(tmp_path_factory.mktemp("oblique") / "data", institutions=["17"], subjects=3, **how)
    for file in path.parent.rglob("*.nii.gz"):
        nib.save(obliquely(nib.load(file)), file)
    return path


# Segmentations

PIXELWISE = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}


def finds_what_is_above(threshold: float, folder: Path, steep: float = 1.0) -> str:
    """Weights of a network that segments everything brighter than a threshold."""
    weights = {"weight": torch.tensor([0.0, steep]).reshape(2, 1, 1, 1), "bias": torch.tensor([0, -steep * threshold])}
    torch.save(weights, folder / "bright.pt")
    return str(folder / "bright.pt")


@pytest.fixture(scope="module")
def pair(oblique, tmp_path_factory) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """An image, and its segmentation by a network that segments bright voxels."""
    folder = tmp_path_factory.mktemp("segmented")
    image = oblique.parent / "17-000" / "T2.nii.gz"
    options = {"ckpt": finds_what_is_above(0.7, folder), "network_def": PIXELWISE, "output_dir": str(folder)}
    RISK_MAP.run(base="inference", datalist=[{"image": str(image)}], **GRID | options)
    return nib.load(image), nib.load(folder / "T2_seg.nii.gz")


def test_the_image_is_a_hard_one(oblique):
    image = nib.load(oblique.parent / "17-000" / "T2.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("P", "L", "I")
    assert len(set(voxel_sizes(image.affine).round(3))) > 1
    cosines = np.abs(image.affine[:3, :3] / voxel_sizes(image.affine))
    assert cosines.max() < 0.99, "no axis is along an axis of the world"


def test_a_segmentation_has_the_space_of_its_image(pair):
    image, found = pair
    assert found.shape == image.shape
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    np.testing.assert_allclose(found.get_qform(), image.get_qform(), atol=1e-4)
    np.testing.assert_allclose(found.header.get_zooms(), image.header.get_zooms(), atol=1e-5)
    assert found.get_data_dtype() == np.uint8
    assert found.header.get_xyzt_units() == image.header.get_xyzt_units()
    for key in ("sform_code", "qform_code"):
        assert found.header[key] == image.header[key], key


def test_a_segmentation_lies_where_its_image_is_bright(pair):
    image, found = pair
    values, labels = image.get_fdata(), np.asarray(found.dataobj) == 1
    assert 0.02 < labels.mean() < 0.5
    bright = values > np.quantile(values, 1 - labels.mean())
    here = dice(labels, bright)
    for axis in range(3):
        assert here > dice(np.flip(labels, axis), bright) + 0.1
        assert here > max(dice(np.roll(labels, step, axis), bright) for step in (-1, 1)) + 0.05


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


# Scores


STEEP, THRESHOLD = 9.0, 0.53
SIZES = (0.8, 1.0, 1.5)  # of a voxel, along the file's axes


@pytest.fixture(scope="module", params=["upright", "tilted"])
def fine(request, tmp_path_factory) -> Path:
    """One test patient with voxels of half the grid's size; its label is only in the planes that the grid samples."""
    folder = tmp_path_factory.mktemp(request.param)
    image = ndimage.gaussian_filter(np.random.default_rng(3).random((33, 41, 9)), (2, 2, 1))
    image = (image - image.min()) / np.ptp(image)
    label = (image > THRESHOLD).astype(np.uint8)
    label[1::2] = 0
    tilt = nib.eulerangles.euler2mat(z=0.2, y=-0.15, x=0.25) if request.param == "tilted" else np.eye(3)
    turned = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(("P", "L", "I")), label.shape)
    affine = nib.affines.from_matvec(tilt, [12.5, -30.25, 7.0]) @ turned @ np.diag([*SIZES, 1])
    for name, array in (("T2", image.astype(np.float32)), ("tumour", label)):
        nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    return one_patient(folder, ".nii.gz")


def one_patient(folder: Path, ending: str) -> Path:
    """A collection of a test patient, with an image T2 and a label tumour."""
    files = {"images": {"T2": f"T2{ending}"}, "labels": {"tumour": f"tumour{ending}"}}
    return collection_of_one_class(folder, [{"id": "p", "institution": "A", "split": "test", **files}])


def without_normalisation(bundle: Bundle, config: str, key: str) -> dict:
    """The transforms without that of intensities: the network gets the values of the file."""
    steps = bundle.content(config)
    for part in key.split("#"):
        steps = steps[part]
    return {key: [step for step in steps if step != "$@grid.intensities"]}


@pytest.mark.parametrize(("bundle", "how"), [(RISK_MAP, "zero_shot"), (RISK_MAP, "evaluate"), (SEQUENTIAL, "evaluate")])
def test_dice_is_measured_in_the_patients_own_space(bundle, how, fine, tmp_path):
    """Dice of the label in the file and of probabilities, averaged over two voxels and interpolated to its grid."""
    given = finds_what_is_above(THRESHOLD, tmp_path, STEEP)
    right, back, up = (2 * SIZES[place] for place in (1, 0, 2))  # of the grid, which is RAS
    grid = {"spacing": [right, back, up], "roi_size": [28, 24], "network_def": PIXELWISE}
    plain = {name: value for name, value in bundle.tiny.items() if not name.startswith("network_def#")}
    asked = grid | {"collection": str(fine), "output_dir": str(tmp_path / "out"), "target_task": "A-T2-ED"}
    asked |= without_normalisation(bundle, "train", "train#deterministic_transforms")
    asked |= {"source": given} if how == "zero_shot" else {"ckpt": given, "freeze": None, "val_split": "test"}
    Bundle(bundle.name, plain).run(how, **asked)
    scores = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert list(scores["split"]) == ["test"]

    image, label = (nib.load(fine.parent / f"{name}.nii.gz").get_fdata() for name in ("T2", "tumour"))
    covered, there = image, np.ones(image.shape)  # what a voxel of the grid covers: one and two halves
    for axis in range(3):
        covered, there = (ndimage.convolve1d(one, [0.25, 0.5, 0.25], axis, mode="constant") for one in (covered, there))
    coarse = 1 / (1 + np.exp(-STEEP * ((covered / there)[::2, ::2, ::2] - THRESHOLD)))
    factors = np.array(image.shape) / coarse.shape
    expected = ndimage.zoom(coarse, factors, order=1) > 0.5
    truth = label == 1
    assert dice(coarse > 0.5, truth[::2, ::2, ::2]) > 0.8, "good, where the grid has its voxels"
    assert 0.6 < dice(expected, truth) < 0.7

    options = without_normalisation(bundle, "inference", "transforms") | grid
    options |= {"ckpt": given, "output_dir": str(tmp_path / "segmented"), "task": "A-T2-ED"}
    bundle.run(base="inference", datalist=[{"image": str(fine.parent / "T2.nii.gz")}], **options)
    written = np.asarray(nib.load(tmp_path / "segmented" / "T2_seg.nii.gz").dataobj) == 1
    assert scores["dice"].item() == pytest.approx(dice(written, truth), abs=1e-6)
    if "upright" in fine.parent.name:  # of a tilted one the grid is MONAI's to lay: by up to half a voxel elsewhere
        assert scores["dice"].item() == pytest.approx(dice(expected, truth), abs=1e-4)
        assert (written == expected).mean() > 0.9999


# Pictures


VIEW = np.array([40, 48, 36])  # mm, from left to right, back to front, bottom to top
STORED = {  # sizes of voxels along these axes, how the file stores them, whether tilted, its ending
    "RAS": ((1, 1, 1), "RAS", False, ".nii.gz"),
    "LPI": ((1, 1.5, 2), "LPI", False, ".nii.gz"),
    "oblique": ((1, 1.5, 2), "PSR", True, ".nii.gz"),
    "thick": ((0.4, 0.4, 6), "LPS", False, ".nii.gz"),
    "sagittal": ((6, 0.4, 0.8), "PIR", True, ".nii.gz"),
    "coronal": ((0.5, 4, 1), "RSA", False, ".nii.gz"),
    "one slice": ((0.5, 1, 36), "LPS", False, ".nii.gz"),
    "2D": ((1, 1, 36), "RAS", False, ".nii"),
    "picture": ((1, 1, 36), "RAS", False, ".png"),
}


@pytest.fixture(scope="module", params=STORED)
def stored(request, tmp_path_factory) -> tuple[Path, tuple[float, ...], np.ndarray]:
    """A collection of one patient with a crooked bright structure, the voxels' sizes, and its label in RAS."""
    sizes, codes, tilted, ending = STORED[request.param]
    x, y, z = (np.indices((VIEW / sizes).round().astype(int)).T * sizes + np.divide(sizes, 2)).T
    label = (y > 10) & (z > 8) & (z < 26) & np.where(y < 20, (x > 8) & (x < 32), (x > 8) & (x < 18) & (y < 38))
    image = 200 * label + np.random.default_rng(0).integers(0, 30, label.shape)
    folder = tmp_path_factory.mktemp("stored")
    for name, array in (("T2", image), ("tumour", label)):
        array = array.astype(np.uint8)
        if ending == ".png":
            Image.fromarray(array[..., 0].T).save(folder / f"{name}.png")
            continue
        kept = nib.Nifti1Image(array if ending == ".nii.gz" else array[..., 0], np.diag([*sizes, 1.0]))
        if ending == ".nii.gz":
            ends = [nib.orientations.axcodes2ornt(code) for code in ("RAS", codes)]
            kept = kept.as_reoriented(nib.orientations.ornt_transform(*ends))
            tilt = nib.eulerangles.euler2mat(z=0.2, y=-0.15, x=0.25) if tilted else np.eye(3)
            kept = nib.Nifti1Image(np.asarray(kept.dataobj), nib.affines.from_matvec(tilt, [12, -30, 7]) @ kept.affine)
        nib.save(kept, folder / f"{name}{ending}")
    return one_patient(folder, ending), sizes, label


def test_contours_lie_on_the_patients_own_image(stored, tmp_path, monkeypatch):
    path, sizes, label = stored
    asked = {"collection": str(path), "source": finds_what_is_above(1.0, tmp_path, 9.0), "figures": True}
    asked |= {"target_task": "A-T2-ED", "network_def": PIXELWISE, "output_dir": str(tmp_path / "out")}
    asked |= {"spacing": [1.5 * sizes[0], 1.5 * sizes[1], sizes[2]], "roi_size": [72, 88]}
    drawn = []
    monkeypatch.setattr(pictures, "plot_overlay", lambda *given, **named: drawn.append((given, named)) or Figure())
    RISK_MAP.run("zero_shot", **asked)
    ((((image,), (truth,), segmented), named),) = drawn
    axis = int(np.argmax(np.add(sizes, [0, 0, 1e-3])))
    plane = label.take(label.sum(tuple({0, 1, 2} - {axis})).argmax(), axis)
    np.testing.assert_array_equal(truth, plane)
    np.testing.assert_array_equal(image > 100, plane)  # in full, as in the file
    ((found,),) = segmented.values()
    assert dice(np.asarray(found) == 1, plane) > 0.9
    flat = path.parent.joinpath("T2.png").exists()
    assert named["aspects"] == pytest.approx([1 if flat else np.delete(sizes, axis)[1] / np.delete(sizes, axis)[0]])
    assert named["sides"] == ("AP" if axis == 0 else "RL",)
    assert named["photographs"] == flat


def test_a_label_goes_to_the_grid_and_back(stored):
    path, sizes, _ = stored
    (file,) = path.parent.glob("tumour.*")
    load = LoadImaged("label", reader="medtl_ext.data.ChannelReader", ensure_channel_first=True)
    prepare = Compose([Orientationd("label", "RAS", labels=None), AreaSpacingd("label", 1.5 * np.array(sizes))])
    item = load({"label": str(file)})
    back = prepare.inverse(prepare(item))["label"]
    assert back.shape == item["label"].shape
    assert dice(back.numpy() == 1, item["label"].numpy() == 1) > 0.85


# Maps


def train(method: str, oblique: Path, folder: Path) -> Path:
    """Runs risk_map on the only training patient; returns the folder of its maps."""
    source = BasicUNet(2, 1, 2, features=[4] * 6, norm=("BATCH", {}), act=("RELU", {}))
    torch.save(source.state_dict(), folder / "source.pt")
    asked = {"collection": str(oblique), "source": str(folder / "source.pt")}
    asked |= {"network_def#features": [4] * 6, "train_slices": None, "iterations_per_epoch": 1}
    RISK_MAP.run(method, **GRID | asked, output_dir=str(folder / "out"))
    return folder / "out"


def patient(oblique: Path) -> tuple[str, nib.Nifti1Image]:
    """Name and label of the only training patient; oedema has value 1."""
    subjects = json.loads(oblique.read_text())["subjects"]
    (name,) = [subject["id"] for subject in subjects if subject["split"] == "train"]
    return name, nib.load(oblique.parent / name / "tumour.nii.gz")


def is_the_grid_of(map_: nib.Nifti1Image, image: nib.Nifti1Image) -> None:
    """The image's own axes, turned to the nearest axes of RAS, with the requested spacing, around its centre."""
    canonical = nib.as_closest_canonical(image).affine
    np.testing.assert_allclose(voxel_sizes(map_.affine), SPACING, atol=1e-4)
    cosines = [affine[:3, :3] / voxel_sizes(affine) for affine in (map_.affine, canonical)]
    np.testing.assert_allclose(*cosines, atol=1e-4)
    centres = [apply_affine(one.affine, (np.array(one.shape[:3]) - 1) / 2) for one in (map_, image)]
    assert np.abs(centres[0] - centres[1]).max() < max(SPACING)


def at(map_: nib.Nifti1Image, points: np.ndarray) -> np.ndarray:
    """Values of a map at points in mm; points outside the map are left out."""
    places = apply_affine(np.linalg.inv(map_.affine), points).round().astype(int)
    places = places[((places >= 0) & (places < map_.shape)).all(axis=1)]
    return map_.get_fdata()[tuple(places.T)]


def test_maps_for_all_images_lie_on_the_grid_of_the_first(oblique, tmp_path):
    folder = train("risk_map", oblique, tmp_path)
    _, label = patient(oblique)
    lesion = apply_affine(label.affine, np.argwhere(np.asarray(label.dataobj) == 1))
    maps = {name: nib.load(folder / f"{name}.nii.gz") for name in ("weight", "leep_before", "leep_after")}
    for map_ in maps.values():
        assert map_.shape[:2] == tuple(ROI)
        is_the_grid_of(map_, label)
    # Where no slice has foreground the transfer is easy; a shifted or mirrored map would miss the lesion.
    assert (at(maps["weight"], lesion) > 1.01).mean() > 0.9
    assert (at(maps["leep_before"], lesion) < -1e-3).mean() > 0.9
    assert (maps["weight"].get_fdata() > 1.01).mean() < 0.25


def test_a_map_per_image_lies_on_its_patient(oblique, tmp_path):
    folder = train("prior_image", oblique, tmp_path)
    name, label = patient(oblique)
    weight = nib.load(folder / f"weight_{name}.nii.gz")
    is_the_grid_of(weight, label)
    lesion = apply_affine(label.affine, np.argwhere(np.asarray(label.dataobj) == 1))
    everywhere = weight.get_fdata()
    assert np.median(at(weight, lesion)) > 3 * np.median(everywhere)
