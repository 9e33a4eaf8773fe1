"""Scores of patients in their own space, empty masks, post-processing, and probabilities."""

import itertools
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import RISK_MAP, refused
from monai.data import MetaTensor
from monai.utils import ensure_tuple
from PIL import Image
from scipy.spatial.distance import cdist
from skimage.measure import label, regionprops
from skimage.segmentation import find_boundaries

from medtl_ext import InputError
from medtl_ext._io import suffix_of
from medtl_ext.data import load_collection, write_collection
from medtl_ext.data.files import Part
from medtl_ext.data.plan import BODY
from medtl_ext.data.sample import write_sample
from medtl_ext.metrics import compute_segmentation_scores
from medtl_ext.transforms import CleanSegmentationd

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")
MEASURED = ["hd95_mm", "assd_mm", "lesion_recall", "lesion_precision", "volume_ml", "truth_ml"]
TILT = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=0.3, y=-0.2, x=0.4), [9.0, -4.0, 30.0])
AFFINES = {
    "pixels": np.eye(4),
    "anisotropic": np.diag([0.4, 0.4, 6.0, 1.0]),
    "flipped": np.diag([-1.5, 1.0, -3.0, 1.0]),
    "oblique": TILT @ np.diag([0.7, 1.9, 4.0, 1.0]),
}
SHAPES = {"volume": (9, 8, 7), "one slice": (9, 8, 1), "sagittal slice": (1, 9, 8), "picture": (11, 9)}


# Numbers, by scikit-image


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face to the outside of the mask or of the image; flat axes do not count."""
    padded = np.pad(mask, [(int(size > 1),) * 2 for size in mask.shape])
    return np.argwhere(find_boundaries(padded, connectivity=1, mode="inner")).astype(float)


def by_scikit_image(found: np.ndarray, real: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """All numbers from scikit-image's surfaces and components, and all distances of two voxels."""
    size = np.sqrt((affine[:3, :3] ** 2).sum(0))[: found.ndim]
    pairs = cdist(*(surface(mask) * size for mask in (found, real)))
    ways = [pairs.min(1), pairs.min(0)]
    shares = [
        np.mean([part.intensity_max for part in regionprops(label(mask), intensity_image=other)])
        for mask, other in ((real, found), (found, real))
    ]
    x, y, z = affine[:3, :3].T
    volumes = [mask.sum() * abs(np.dot(np.cross(x, y), z)) / 1000 for mask in (found, real)]
    values = [max(np.quantile(way, 0.95) for way in ways), np.concatenate(ways).mean(), *shares, *volumes]
    return dict(zip(MEASURED, values, strict=True))


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_number_is_that_of_scikit_image(shape, affine):
    generator = np.random.default_rng(len(shape))
    for share in (0.1, 0.3):
        found, real = generator.random((2, *shape)) < share
        expected = by_scikit_image(found, real, affine)
        assert compute_segmentation_scores(found, real, affine) == pytest.approx(expected, rel=1e-6)
        assert 0 < expected["lesion_recall"] <= 1


def test_a_shift_is_as_far_as_the_voxel_is_long():
    """hd95 is the larger of both directions: a second part is far from the truth, but the truth is near the first."""
    real = np.zeros((30, 10, 4), dtype=bool)
    real[2:6, 2:6, 1:3] = True
    affine = AFFINES["oblique"]
    for axis, size in enumerate((0.7, 1.9, 4.0)):
        scores = compute_segmentation_scores(np.roll(real, 1, axis), real, affine)
        assert scores["hd95_mm"] == pytest.approx(size, rel=1e-6)
    far = real.copy()
    far[15:19, 2:6, 1:3] = True
    one, other = compute_segmentation_scores(far, real, affine), compute_segmentation_scores(real, far, affine)
    assert one["hd95_mm"] == other["hd95_mm"] > 0.7 * 9
    assert one["assd_mm"] == pytest.approx(other["assd_mm"])
    assert (one["lesion_recall"], one["lesion_precision"]) == (1.0, 0.5)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 1), (6, 5), (1, 1, 1)])
def test_what_is_empty_follows_one_rule(shape):
    affine, none, some = AFFINES["anisotropic"], np.zeros(shape), np.ones(shape)
    both = compute_segmentation_scores(none, none, affine)
    assert list(both) == MEASURED
    assert list(both.values()) == [0, 0, 1, 1, 0, 0]
    sizes = [size * mm for size, mm in zip(shape, (0.4, 0.4, 6.0), strict=False) if size > 1] or [0.4]
    volume = some.sum() * 0.4 * 0.4 * 6 / 1000
    diagonal = pytest.approx(np.sqrt(np.square(sizes).sum()))
    missed = compute_segmentation_scores(none, some, affine)
    assert list(missed.values()) == [diagonal, diagonal, 0, 0, 0, pytest.approx(volume)]
    invented = compute_segmentation_scores(some, none, affine)
    assert list(invented.values()) == [diagonal, diagonal, 0, 0, pytest.approx(volume), 0]
    assert list(compute_segmentation_scores(some, some, affine).values())[:4] == [0, 0, 1, 1]


def test_two_grids_are_refused():
    with pytest.raises(InputError, match=r"segmentation \(2, 2\) and truth \(2, 3\) differ in shape"):
        compute_segmentation_scores(np.ones((2, 2)), np.ones((2, 3)), np.eye(4))


# Three runs, against the files that inference wrote


def from_files(written: Path, label: Path, values: tuple[int, ...], number: int) -> dict[str, float]:
    """All scores of class ``number``, whose values in the label file are ``values``."""
    if label.suffix == ".png":
        found, real = (np.array(Image.open(path)) for path in (written, label))
        affine = np.eye(4)
    else:
        found, real = (np.asarray(nib.load(path).dataobj) for path in (written, label))
        affine = nib.load(label).affine
    found, real = found == number, np.isin(real, values)
    total, both = found.sum() + real.sum(), (found & real).sum()
    overlap = {"dice": 2 * both / total, "iou": both / (total - both)} if total else {"dice": 1, "iou": 1}
    return overlap | compute_segmentation_scores(found, real, affine)  # which is held against a count by hand above


def of_the_phantom(folder: Path, collection: Path) -> Path:
    """The phantom with oblique affines and anisotropic voxels."""
    made = shutil.copytree(collection.parent, folder / "phantom") / collection.name
    for file in made.parent.rglob("17-*/*.nii.gz"):
        image = nib.load(file)
        stretched = TILT @ np.diag([0.9, 1.1, 1.6, 1.0]) @ image.affine
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), stretched), file)
    return made


def of_hippocampi(folder: Path, collection: Path) -> Path:
    return write_sample("hippocampus", folder / "sample")


def of_retinas(folder: Path, collection: Path) -> Path:
    return write_sample("retina", folder / "sample")


RUNS = {
    "phantom": (of_the_phantom, "17-T2-FeTS", [6.0, 6.0, 8.0], [32, 32], None, 0.1),
    "hippocampus": (of_hippocampi, "Vanderbilt-T1-Parts", [2.0, 2.0, 2.0], [32, 32], [(1,), (2,)], "largest"),
    "retina": (of_retinas, "Diabetic-R+G+B-Vessel", [2.0, 2.0, 1.0], [160, 160], [(255,)], None),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_table_says_of_a_patient_what_its_written_segmentation_says(name, collection, tmp_path):
    made, task, spacing, roi, values, clean = RUNS[name]
    path = made(tmp_path, collection)
    grid = {"spacing": spacing, "roi_size": roi, "clean": clean}
    out, found = tmp_path / "out", load_collection(path)
    told = {"collection": str(path), "target_task": task, "epochs": 6, "iterations_per_epoch": 10, "normalize": BODY}
    RISK_MAP.run("scratch", **told | grid | {"output_dir": str(out), "learning_rate": 0.01})
    values = values or [tuple(one) for one in found.label_values(task)]
    tested = found.datalist(task, "test")
    options = {"task": task, "ckpt": str(out / "model.pt"), "n_classes": len(values) + 1, **grid}
    (tmp_path / "in").mkdir()
    for one in tested:
        (file,) = {Part.parse(name).path for name in ensure_tuple(one["image"])}
        shutil.copy(file, tmp_path / "in" / (one["subject"] + suffix_of(file)))
    folders = {"input_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "seg")}
    RISK_MAP.run(base="inference", **folders | options)
    table = pd.read_csv(out / "metrics.csv").query("split == 'test'").set_index(["subject", "class"])
    assert table["dice"].between(0.01, 0.99).any()
    for one, (number, name) in itertools.product(tested, enumerate(found.class_names(task), start=1)):
        (written,) = (tmp_path / "seg").glob(f"{one['subject']}_seg.*")
        expected = from_files(written, Path(one["label"]), values[number - 1], number)
        row = table.loc[one["subject"], name]
        assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert set(expected) == {"dice", "iou", *MEASURED}
        assert row["empty"] == (expected["volume_ml"] == expected["truth_ml"] == 0)


# Post-processing


def test_parts_go_by_class_by_size_in_ml_and_over_corners():
    classes = np.zeros((8, 8, 3), dtype=np.uint8)
    classes[0:2, 0:2], classes[2, 2, 2], classes[6, 6] = 1, 1, 1  # 13 voxels, joined by a corner, and 3
    classes[2:4, 4], classes[0, 7, 0] = 2, 2  # 6 voxels, and 1
    affine = torch.as_tensor(TILT @ np.diag([1.0, 2.0, 2.5, 1.0]))  # 0.005 ml
    given = MetaTensor(torch.from_numpy(classes)[None], affine=affine)

    def kept(how) -> list[int]:
        cleaned = CleanSegmentationd("pred", how)({"pred": given})["pred"]
        assert cleaned.dtype == given.dtype
        assert torch.equal(cleaned.affine, given.affine)
        return [int((cleaned == number).sum()) for number in (1, 2)]

    assert kept(None) == [16, 7]
    assert kept("largest") == [13, 6]
    assert kept(0.015) == [16, 6]
    assert kept(0.016) == [13, 6]
    assert kept(0.05) == [13, 0]
    assert int((given > 0).sum()) == 23, "what came in stays"
    for wrong in ("biggest", 0, -1.0, True):
        with pytest.raises(InputError, match="clean"):
            CleanSegmentationd("pred", wrong)


def patients(folder: Path, *, val: int, test: int, specks: bool) -> dict[str, str]:
    """A collection with one patient per split, with so many bright lesions, and bright specks that are no lesions."""
    subjects = []
    for split, lesions in (("val", val), ("test", test)):
        label = np.zeros((24, 24, 8), dtype=np.uint8)
        for number in range(lesions):
            label[3 + 9 * number : 9 + 7 * number, 4:10, 2:6] = 1
        image = label.astype(np.float32)
        image[2:20:6, 20:22, 3] = specks  # 0.032 ml each
        files = {name: f"{split}_{name}.nii.gz" for name in ("T2", "tumour")}
        for name, array in (("T2", image), ("tumour", label)):
            folder.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 4.0, 1.0])), folder / files[name])
        subject = {"id": split, "institution": "A", "split": split, "images": {"T2": files["T2"]}}
        subjects.append(subject | {"labels": {"tumour": files["tumour"]}})
    content = {"name": "specks", "labels": {"tumour": {"ED": 1}}, "subjects": subjects}
    content["objectives"] = {"ED": {"label": "tumour", "values": [1]}}
    network = {"weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1), "bias": torch.tensor([0.0, -0.5])}
    torch.save(network, folder / "bright.pt")
    return {"collection": str(write_collection(folder / "c.json", content)), "source": str(folder / "bright.pt")}


BRIGHT = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}
GRID = {"spacing": [2.0, 2.0, 4.0], "roi_size": [24, 24], "network_def": BRIGHT}


def scored(folder: Path, given: dict[str, str], *overlays: str, **options) -> tuple[pd.Series, str]:
    """Dice by split of a network that segments what is bright, and the content of ``clean.txt``."""
    steps = RISK_MAP.content("train")["train"]["deterministic_transforms"]
    plain = [step for step in steps if step != "$@grid.intensities"]
    asked = GRID | {"train#deterministic_transforms": plain, "target_task": "A-T2-ED", "output_dir": str(folder)}
    RISK_MAP.run(*(overlays or ["zero_shot"]), **given | asked | options)
    said = (folder / "clean.txt").read_text() if (folder / "clean.txt").exists() else ""
    return pd.read_csv(folder / "metrics.csv").set_index("split")["dice"], said


@pytest.mark.parametrize(
    ("lesions", "specks", "chosen"), [(1, True, "largest"), (2, True, 0.1), (1, False, None), (0, True, 0.1)]
)
def test_validation_patients_choose_and_test_patients_cannot(lesions, specks, chosen, tmp_path, capfd):
    """The lesions of the test patients have no influence on the choice."""
    said = {}
    for test in (1, 2):
        given = patients(tmp_path / str(test), val=lesions, test=test, specks=specks)
        dice, said[test] = scored(tmp_path / f"out{test}", given, clean="validation")
        plain, nothing = scored(tmp_path / f"plain{test}", given)
        assert nothing == ""
        if chosen is None:
            pd.testing.assert_series_equal(dice, plain)
        else:
            expected, _ = scored(tmp_path / f"again{test}", given, clean=chosen)
            pd.testing.assert_series_equal(dice, expected)
            assert dice["val"] > plain["val"]
        if test == 2 and chosen == "largest":
            assert dice["test"] < plain["test"], "the test patients would have chosen otherwise"
    assert said[1] == said[2]
    how = f"--clean {chosen}" if chosen else "none"
    assert said[1].startswith(f"Post-processing chosen on the val patients: {how}.")
    assert said[1] in capfd.readouterr().out
    assert "nothing 1.000, largest 1.000" in said[1] or specks


def test_nobody_but_validation_patients_may_choose(tmp_path):
    given = patients(tmp_path / "data", val=1, test=2, specks=True)
    for split in ("train", "test"):
        with pytest.raises(InputError, match="clean 'validation' chooses on validation patients, and there are none"):
            CleanSegmentationd("pred", "validation", split)
    said = refused(lambda: scored(tmp_path / "a", given, clean="validation", val_split="test"))
    assert "clean 'validation' chooses on validation patients" in said
    scored(tmp_path / "plain", given)
    alone = {"clean": "validation", "ckpt": str(tmp_path / "plain" / "model.pt"), "freeze": None}
    said = refused(lambda: scored(tmp_path / "b", given, "evaluate", **alone))
    assert "needs patients of split 'val', who are not here; give what a training chose" in said


def test_inference_takes_what_was_chosen_and_chooses_nothing(tmp_path):
    """All bundles for segmentation have the same ``inference.json`` (see `test_bundles.py`)."""
    given = patients(tmp_path / "data", val=1, test=2, specks=True)
    options = {"base": "inference", "ckpt": given["source"], "output_dir": str(tmp_path / "out"), **GRID}
    options |= {"datalist": [{"image": str(tmp_path / "data" / "test_T2.nii.gz")}]}
    said = refused(lambda: RISK_MAP.run(clean="validation", **options))
    assert "give the choice of a training with such patients" in said
    assert "expected largest, a number of ml" in refused(lambda: RISK_MAP.run(clean="big", **options))


# The space of the scores, and probabilities


def test_there_are_two_spaces_and_the_training_grid_is_named(tmp_path, capfd):
    given = patients(tmp_path / "data", val=1, test=2, specks=True)
    coarse = {"spacing": [2.0, 2.0, 12.0], "score_space": "training", "figures": True, "n_jobs": 1}
    scored(tmp_path / "grid", given, **coarse)
    grid = pd.read_csv(tmp_path / "grid" / "metrics.csv").set_index("split")
    assert "on the training grid over 1 test patients" in capfd.readouterr().out
    assert "measured on the training grid" in (tmp_path / "grid" / "report.html").read_text()
    scored(tmp_path / "own", given, **coarse | {"score_space": "patient"})
    assert "on the training grid" not in capfd.readouterr().out
    assert "measured on the training grid" not in (tmp_path / "own" / "report.html").read_text()
    own = pd.read_csv(tmp_path / "own" / "metrics.csv").set_index("split")
    truth = nib.load(tmp_path / "data" / "test_tumour.nii.gz").get_fdata()
    assert own.loc["test", "truth_ml"] == pytest.approx(truth.sum() * 0.016)
    assert grid.loc["test", "truth_ml"] != pytest.approx(truth.sum() * 0.016)  # of 12 mm instead of 4
    assert (grid.loc["test", "truth_ml"] / 0.048).round(6).is_integer()
    said = refused(lambda: scored(tmp_path / "none", given, score_space="patients"))
    assert "option --score_space 'patients' is unknown; did you mean 'patient'?" in said


def test_probabilities_are_written_in_the_patients_space_and_make_the_segmentation(tmp_path):
    given = patients(tmp_path / "data", val=1, test=2, specks=True)
    image = tmp_path / "data" / "test_T2.nii.gz"
    picture = Image.fromarray((nib.load(image).get_fdata()[:20, :, 3] * 255).astype(np.uint8))
    picture.save(tmp_path / "data" / "flat.png")
    for file, ending in ((image, ".nii.gz"), (tmp_path / "data" / "flat.png", ".png")):
        options = {"ckpt": given["source"], "output_dir": str(tmp_path / "out"), "datalist": [{"image": str(file)}]}
        steps = [one for one in RISK_MAP.content("inference")["transforms"] if one != "$@grid.intensities"]
        options |= {"spacing": [3.0, 3.0, 4.0], "transforms": steps, "save_probabilities": True}
        RISK_MAP.run(base="inference", **GRID | options)
        name = file.name.removesuffix(ending)
        probs = nib.load(tmp_path / "out" / f"{name}_prob.nii.gz")
        assert probs.get_data_dtype() == np.float32
        values = np.asarray(probs.dataobj)
        np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
        if ending == ".png":
            written = np.array(Image.open(tmp_path / "out" / f"{name}_seg.png")).T[..., None]
        else:
            written = np.asarray(nib.load(tmp_path / "out" / f"{name}_seg.nii.gz").dataobj)
            np.testing.assert_allclose(probs.affine, nib.load(image).affine, atol=1e-5)
        assert values.shape == (*written.shape, 2)
        assert ((values[..., 1] > values[..., 0]) == (written == 1)).all()
        assert (written == 1).any()
    assert len(list((tmp_path / "out").iterdir())) == 4
