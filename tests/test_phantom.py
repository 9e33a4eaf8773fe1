"""The brain phantom: reproducible, aligned with its atlas, well labelled, and safe to generate."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from medtl_ext import InputError
from medtl_ext._io import cache_root
from medtl_ext.data import check_collection, load_collection
from medtl_ext.data.phantom import INSTITUTIONS, MODALITIES, cached_phantom, generate, generate_phantom
from medtl_ext.data.phantom.atlas import load_atlas
from medtl_ext.data.phantom.fields import SHAPE, grid_points, random_stream, smooth_noise
from medtl_ext.data.phantom.generate import make_subject
from medtl_ext.data.phantom.lesions import place_tumour
from medtl_ext.data.phantom.scanner import Institution

MILLILITRES = 2 * 2 * 4 / 1000  # per voxel
SITES = ("13", "17", "I1", "S")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Three subjects at each of four sites, made by two processes."""
    folder = tmp_path_factory.mktemp("phantom") / "made"
    return generate_phantom(folder, institutions=SITES, subjects=3, n_jobs=2, progress=False)


@cache
def subject(institution, index=0, *, seed=0):
    return make_subject(load_atlas(), Institution(institution), index, seed=seed)


# --- the same subject, always


def test_another_seed_gives_another_subject():
    first, other = subject("17"), subject("17", seed=1)
    assert not any(np.array_equal(values, other[name]) for name, values in first.items())


def test_files_depend_neither_on_the_company_nor_on_n_jobs(phantom, tmp_path):
    how = {"institutions": ["17"], "subjects": 2, "n_jobs": 1, "progress": False}
    alone = generate_phantom(tmp_path / "alone", **how)
    files = sorted((alone.parent / "17-001").iterdir())
    assert [file.name for file in files] == [
        f"{name}.nii.gz" for name in (*sorted(MODALITIES), "tissue", "tumour", "wmh")
    ]
    for file in files:
        assert file.read_bytes() == (phantom.parent / "17-001" / file.name).read_bytes()


# --- geometry


def test_smooth_noise_is_standardised_and_smoother_with_length():
    fine, coarse = (smooth_noise(random_stream(0), length) for length in (6, 30))
    for field in (fine, coarse):
        assert field.shape == SHAPE
        assert (field.mean(), field.std()) == pytest.approx((0, 1), abs=1e-4)
    assert np.abs(np.diff(coarse, axis=0)).mean() < 0.5 * np.abs(np.diff(fine, axis=0)).mean()


def test_files_are_ras_and_in_millimetres(phantom):
    image, label = (nibabel.load(phantom.parent / "13-000" / f"{name}.nii.gz") for name in ("T1", "tumour"))
    for file, dtype in ((image, np.int16), (label, np.uint8)):
        assert file.shape == (96, 96, 28)
        assert file.header.get_zooms() == (2, 2, 4)
        assert nibabel.aff2axcodes(file.affine) == ("R", "A", "S")
        assert file.get_data_dtype() == dtype


def test_an_atlas_overlay_lines_up(phantom):
    atlas = load_atlas()
    for name in ("S-000", "I1-001"):
        image = nibabel.load(phantom.parent / name / "T2.nii.gz")
        values = np.asarray(image.dataobj, dtype=float)
        voxels = np.indices(image.shape).reshape(3, -1)
        points = nibabel.affines.apply_affine(image.affine, voxels.T).T.reshape(3, *image.shape).astype(np.float32)
        centre = points[:, values > 0].mean(axis=1)
        expected = points[:, atlas.to_brain.at(points) < 0].mean(axis=1)
        assert np.abs(centre - expected).max() < 6
        # On T2 the ventricles are the brightest part of the deep brain: where the atlas says they are.
        ventricles = values[atlas.to_ventricles.at(points) < -2].mean()
        around = values[(atlas.to_ventricles.at(points) > 10) & (atlas.to_brain.at(points) < -20)].mean()
        assert ventricles > 1.3 * around


@pytest.mark.parametrize("institution", ["04", "20", "U"])
def test_the_brain_is_within_the_field_of_view_in_plane(institution):
    for index in range(3):
        brain = subject(institution, index)["T1"] > 0
        assert brain.any(axis=2).sum() > 3000
        assert brain.sum() - brain[1:-1, 1:-1].sum() < 20


# --- images and labels


def test_images_are_raw_and_skull_stripped():
    for name in ("13", "I1"):
        made = subject(name)
        brain = made["T1"] > 0
        assert 0.1 < brain.mean() < 0.6
        for image in (made[modality] for modality in MODALITIES):
            assert np.array_equal(image > 0, brain)  # 0 outside the brain, never inside
            assert 150 < image[brain].mean() < image.max() < 2500


def test_labels_are_nested_and_disjoint(phantom):
    for entry in load_collection(phantom).subjects:
        labels = {name: np.asarray(nibabel.load(path).dataobj) for name, path in entry.labels.items()}
        if "tumour" in labels:
            tumour = labels["tumour"] > 0
            assert not (labels["tissue"] + labels["wmh"])[tumour].any()
            # Necrosis lies inside the rim, the core inside the oedema: growing the inner one meets no bare brain.
            core = ndimage.binary_closing(labels["tumour"] > 1)
            assert (ndimage.binary_dilation(core) & tumour).sum() > 0.8 * ndimage.binary_dilation(core).sum()


def test_each_lesion_shows_where_it_should():
    made, older = subject("13"), subject("U")
    oedema, enhancing, necrosis = (made["tumour"] == value for value in (1, 2, 3))
    assert made["T1CE"][enhancing].mean() > 1.2 * max(made["T1CE"][part].mean() for part in (oedema, necrosis))
    assert made["FLAIR"][oedema].mean() > 1.2 * made["FLAIR"][made["tissue"] == 3].mean()
    assert older["FLAIR"][older["wmh"] > 0].mean() > 1.2 * older["FLAIR"][older["tissue"] == 3].mean()


def test_lesion_volumes_are_plausible():
    tumours = [subject(name, index)["tumour"] for name in ("06", "17") for index in range(5)]
    for value, low, high in ((1, 20, 70), (2, 6, 22), (3, 3, 16)):  # oedema, enhancing, necrosis
        assert low < np.mean([(label == value).sum() * MILLILITRES for label in tumours]) < high
    hyperintense = [subject("U", index)["wmh"].sum() * MILLILITRES for index in range(5)]
    assert 8 < np.mean(hyperintense) < 25


def test_a_tumour_pushes_what_is_around_it_outwards_and_spares_the_rest():
    points = grid_points()
    pushed, radius, core_radius = place_tumour(load_atlas(), points, random_stream(0), core_radius=12)
    outwards = points - points[:, *np.unravel_index(radius.argmin(), SHAPE)][:, None, None, None]
    around, far = (radius > core_radius) & (radius < 1.5 * core_radius), radius > 6 * core_radius
    moved = ((points - pushed) * outwards).sum(axis=0)  # what lies in a voxel came from nearer to the centre
    assert (moved[around] > 0).mean() > 0.99
    assert np.abs(pushed - points)[:, far].max() < 0.01


def contrast(made):
    return made["T1"][made["tissue"] == 3].mean() / made["T1"][made["tissue"] == 2].mean()


def test_infants_have_little_grey_white_contrast():
    assert 1 < contrast(subject("I1")) < 1 + 0.6 * (contrast(subject("13")) - 1)


def test_a_protocol_shifts_the_signal_of_a_tissue():
    shifted = Institution("13")
    shifted.scanners["T1"].protocol_shift["WM"] += 0.2
    made = make_subject(load_atlas(), shifted, 0, seed=0)
    assert contrast(made) > 1.1 * contrast(subject("13"))


# --- institutions


def character(made):
    """Ratios of a subject's images that do not depend on its anatomy, and the noise of each image."""
    white, fluid, grey = ndimage.binary_erosion(made["tissue"] == 3), made["tissue"] == 1, made["tissue"] == 2
    values = []
    for image in (made[modality] for modality in MODALITIES):
        scale = np.median(image[white])
        grain = image - ndimage.uniform_filter(image.astype(float), (3, 3, 1))
        values += [np.median(image[fluid]) / scale, np.median(image[grey]) / scale, 3 * grain[white].std() / scale]
    return np.array(values)


def test_an_institution_has_a_character_of_its_own():
    features = np.array([[character(subject(name, index)) for index in range(3)] for name in ("06", "13", "20")])
    between = features.mean(axis=1).std(axis=0, ddof=1)
    within = features.std(axis=1, ddof=1).mean(axis=0)
    assert np.median(between / within) > 1.3  # about 0.6 if all had the same scanner


def test_every_institution_has_a_scanner_of_its_own():
    assert len({Institution(name).scanners["T1"].gain for name in INSTITUTIONS}) == len(INSTITUTIONS) == 12


# --- the collection


def test_collection_is_read_and_checked_like_any_other(phantom):
    collection = load_collection(phantom)
    assert collection.synthetic
    assert "SYNTHETIC" in collection.description
    assert "ICBM 2009" in collection.license
    assert [entry.id for entry in collection.subjects[:3]] == ["13-000", "13-001", "13-002"]
    assert not check_collection(collection, progress=False).errors
    assert collection.label_values("17-FLAIR-FeTS") == [[1], [2], [3]]
    assert {"13-T1-ED", "17-FLAIR-FeTS", "I1-T2-WM", "S-FLAIR-WMH"} <= {str(task) for task in collection.tasks()}


def test_only_what_some_subject_has_is_declared(tmp_path):
    path = generate_phantom(tmp_path / "infants", institutions=["I2"], subjects=1, progress=False)
    content = json.loads(path.read_text())
    assert list(content["labels"]) == ["tissue"]
    assert set(content["objectives"]) == {"CSF", "GM", "WM"}
    assert list(content["subjects"][0]["images"]) == list(MODALITIES)


def test_splits_are_by_patient_and_every_beginning_has_all():
    cycle = generate.SPLIT_CYCLE
    assert Counter(cycle) == {"train": 8, "val": 5, "test": 7}
    assert all(len(set(cycle[:n])) == 3 for n in range(3, 21))


# --- writing


def test_the_same_settings_are_reused_and_others_refused(phantom):
    before = phantom.stat().st_mtime_ns
    assert generate_phantom(phantom.parent, institutions=SITES[::-1], subjects=3) == phantom
    assert phantom.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another phantom.*seed 0 there, 5 asked"):
        generate_phantom(phantom.parent, institutions=SITES, subjects=3, seed=5)


def test_a_folder_with_other_content_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="is not a phantom"):
        generate_phantom(tmp_path, institutions=["13"], subjects=1)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"institutions": ["13", "99"]}, "institution '99' is unknown.*Known: 01"),
        ({"institutions": []}, "at least one of 01"),
        ({"subjects": 0}, "subjects is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        generate_phantom(tmp_path / "out", **{"institutions": ["13"], "subjects": 1, **change})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, interruption):
    write = generate._write_nifti
    failed, under_way = threading.Event(), set()

    def fail_late(path, values):
        if path.parent.name == "I1-001":
            failed.set()
            raise interruption
        under_way.add(path)
        failed.wait(10)
        time.sleep(0.3)  # other processes are still writing when one fails
        write(path, values)
        under_way.remove(path)

    monkeypatch.setattr(generate, "_write_nifti", fail_late)
    with pytest.raises(type(interruption)):
        generate_phantom(tmp_path / "out", institutions=["I1"], subjects=3, n_jobs=2, progress=False)
    assert not under_way  # or a folder that is being removed gets new files
    assert not any(tmp_path.iterdir())


def test_cache_is_made_once_even_when_asked_for_twice_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    made = []
    write = generate._write_subjects
    monkeypatch.setattr(generate, "_write_subjects", lambda *args, **kwargs: (made.append(1), write(*args, **kwargs)))

    def ask(_):
        return cached_phantom(institutions=["I1"], subjects=1, progress=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first == second
    assert first.parent == tmp_path / "phantom" / "I1_1-subjects_seed-0_a1f56cca"  # or caches are made anew
    assert first.is_file()
    assert len(made) == 1


def test_cache_folder_without_monai_data_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MONAI_DATA_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "medtl"
