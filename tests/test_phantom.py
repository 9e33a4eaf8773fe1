"""The brain phantom: reproducible, aligned with its atlas, well labelled, and safe to generate."""

from __future__ import annotations

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
from medtl_ext.data import check_collection, load_collection
from medtl_ext.data.phantom import INSTITUTIONS, MODALITIES, cached_phantom, generate, generate_phantom
from medtl_ext.data.phantom.atlas import load_atlas
from medtl_ext.data.phantom.fields import Grid, random_stream, smooth_noise
from medtl_ext.data.phantom.scanner import get_institution
from medtl_ext.data.phantom.subject import make_subject

MILLILITRES = 2 * 2 * 4 / 1000  # per voxel
SITES = ("13", "17", "I1", "S")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Three subjects at each of four sites, made two at a time."""
    return generate_phantom(
        tmp_path_factory.mktemp("phantom") / "made", institutions=SITES, subjects=3, n_jobs=2, progress=False
    )


@pytest.fixture(scope="module")
def content(phantom):
    return json.loads(phantom.read_text())


def array(path):
    return np.asarray(nibabel.load(path).dataobj)


@cache
def subject(institution, index=0, *, seed=0, modalities=MODALITIES):
    return make_subject(load_atlas(), get_institution(institution), index, seed=seed, modalities=modalities)


# --- the same subject, always


def test_random_stream_is_stable_across_processes_and_versions():
    assert random_stream(0, "13", 2, "T1").integers(10**6) == 244045


def test_same_seed_gives_the_same_subject_and_another_seed_another():
    first, again, other = subject("17"), subject.__wrapped__("17"), subject("17", seed=1)
    for name, values in {**first.images, **first.labels}.items():
        assert np.array_equal(values, {**again.images, **again.labels}[name]), name
        assert not np.array_equal(values, {**other.images, **other.labels}[name]), name


def test_fewer_modalities_give_the_same_images_and_labels():
    every, one = subject("13"), subject("13", modalities=("FLAIR",))
    assert np.array_equal(every.images["FLAIR"], one.images["FLAIR"])
    assert all(np.array_equal(every.labels[name], one.labels[name]) for name in every.labels)


def test_files_do_not_depend_on_the_company_nor_on_n_jobs(phantom, tmp_path):
    alone = generate_phantom(tmp_path / "alone", institutions=["17"], subjects=2, n_jobs=1, progress=False)
    files = sorted((alone.parent / "17-001").iterdir())
    assert len(files) == len(MODALITIES) + 3
    for file in files:
        assert file.read_bytes() == (phantom.parent / "17-001" / file.name).read_bytes()


# --- geometry


def test_smooth_noise_is_standardised_and_smoother_with_length():
    stream = random_stream(0)
    fine, coarse = (smooth_noise(stream, Grid(), length) for length in (6, 30))
    for field in (fine, coarse):
        assert field.shape == Grid().shape
        assert field.mean() == pytest.approx(0, abs=1e-4)
        assert field.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(coarse, axis=0)).mean() < 0.5 * np.abs(np.diff(fine, axis=0)).mean()


def test_files_are_ras_and_in_millimetres(phantom):
    image = nibabel.load(phantom.parent / "13-000" / "T1.nii.gz")
    assert image.shape == (96, 96, 28)
    assert image.header.get_zooms() == (2, 2, 4)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.get_data_dtype() == np.int16
    assert nibabel.load(phantom.parent / "13-000" / "tumour.nii.gz").get_data_dtype() == np.uint8


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
        brain = subject(institution, index, modalities=("T1",)).images["T1"] > 0
        edge = np.ones(brain.shape, bool)
        edge[1:-1, 1:-1] = False
        assert brain.any(axis=2).sum() > 3000
        assert (brain & edge).sum() < 20


# --- images and labels


def test_images_are_raw_and_skull_stripped(phantom):
    for name in ("13-000", "I1-000"):
        images = {modality: array(phantom.parent / name / f"{modality}.nii.gz") for modality in MODALITIES}
        brain = images["T1"] > 0
        assert 0.1 < brain.mean() < 0.6
        for image in images.values():
            assert np.array_equal(image > 0, brain)  # 0 outside the brain, never inside
            assert 150 < image[brain].mean() < image.max() < 2500


def test_labels_are_declared_nested_and_disjoint(phantom, content):
    for entry in content["subjects"]:
        labels = {name: array(phantom.parent / path) for name, path in entry["labels"].items()}
        for name, label in labels.items():
            assert set(np.unique(label)) <= {0, *content["labels"][name].values()}
        if "tumour" in labels:
            tumour = labels["tumour"] > 0
            assert not labels["tissue"][tumour].any()
            assert not labels["wmh"][tumour].any()
            # Necrosis lies inside the rim, the core inside the oedema: growing the inner one meets no bare brain.
            core = ndimage.binary_closing(labels["tumour"] > 1)
            assert (ndimage.binary_dilation(core) & tumour).sum() > 0.8 * ndimage.binary_dilation(core).sum()


def test_each_lesion_shows_where_it_should():
    made = subject("13")
    parts = {name: made.labels["tumour"] == value for name, value in (("ED", 1), ("ET", 2), ("NCR", 3))}
    white = made.labels["tissue"] == 3
    mean = {
        modality: {name: image[part].mean() for name, part in parts.items()} for modality, image in made.images.items()
    }
    assert mean["T1CE"]["ET"] > 1.2 * mean["T1CE"]["ED"]
    assert mean["T1CE"]["ET"] > 1.2 * mean["T1CE"]["NCR"]
    assert mean["FLAIR"]["ED"] > 1.2 * made.images["FLAIR"][white].mean()
    older = subject("U")
    assert (
        older.images["FLAIR"][older.labels["wmh"] > 0].mean()
        > 1.2 * older.images["FLAIR"][older.labels["tissue"] == 3].mean()
    )


def test_lesion_volumes_are_plausible():
    tumours = [subject(name, index, modalities=()).labels["tumour"] for name in ("06", "17") for index in range(5)]
    oedema, enhancing, necrosis = (
        np.mean([(label == value).sum() * MILLILITRES for label in tumours]) for value in (1, 2, 3)
    )
    assert 20 < oedema < 70
    assert 6 < enhancing < 22
    assert 3 < necrosis < 16
    hyperintense = [subject("U", index, modalities=()).labels["wmh"].sum() * MILLILITRES for index in range(5)]
    assert 8 < np.mean(hyperintense) < 25


def test_infants_have_little_grey_white_contrast():
    def contrast(made):
        tissue, image = made.labels["tissue"], made.images["T1"]
        return image[tissue == 3].mean() / image[tissue == 2].mean()

    infant = contrast(subject("I1", modalities=("T1",)))
    adult = contrast(subject("13"))
    assert 1 < infant < 1 + 0.8 * (adult - 1)


# --- institutions


def character(made):
    """Ratios of a subject's images that do not depend on its anatomy, and how grainy each image is."""
    tissue = made.labels["tissue"]
    white, fluid, grey = (
        ndimage.binary_erosion(tissue == value) if value == 3 else tissue == value for value in (3, 1, 2)
    )
    values = []
    for image in made.images.values():
        scale = np.median(image[white])
        grain = image - ndimage.uniform_filter(image.astype(float), (3, 3, 1))
        values += [np.median(image[fluid]) / scale, np.median(image[grey]) / scale, 3 * grain[white].std() / scale]
    return np.array(values)


def test_an_institution_has_a_character_of_its_own():
    features = np.array([[character(subject(name, index)) for index in range(3)] for name in ("06", "13", "20")])
    between = features.mean(axis=1).std(axis=0, ddof=1)
    within = features.std(axis=1, ddof=1).mean(axis=0)
    assert np.median(between / within) > 1.3  # about 0.6 if all had the same scanner


def test_every_institution_can_be_asked_for():
    assert len(INSTITUTIONS) >= 10
    characters = {json.dumps(get_institution(name).scanners["T1"].protocol_shift) for name in INSTITUTIONS}
    assert len(characters) == len(INSTITUTIONS)


# --- the collection


def test_collection_is_read_and_checked_like_any_other(phantom):
    collection = load_collection(phantom)
    assert collection.synthetic
    assert not check_collection(collection, progress=False).errors
    assert {"13-T1-ED", "17-FLAIR-FeTS", "I1-T2-WM", "S-FLAIR-WMH"} <= {str(task) for task in collection.tasks()}


def test_collection_says_what_it_is(content):
    assert content["synthetic"] is True
    assert "SYNTHETIC" in content["description"]
    assert "ICBM 2009" in content["license"]
    assert [entry["id"] for entry in content["subjects"][:3]] == ["13-000", "13-001", "13-002"]


def test_only_what_some_subject_has_is_declared(tmp_path):
    path = generate_phantom(tmp_path / "infants", institutions=["I2"], subjects=1, modalities=["T2"], progress=False)
    content = json.loads(path.read_text())
    assert list(content["labels"]) == ["tissue"]
    assert set(content["objectives"]) == {"CSF", "GM", "WM"}
    assert list(content["subjects"][0]["images"]) == ["T2"]


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
        ({"modalities": ["T1ce"]}, "modality 'T1ce' is unknown"),
        ({"institutions": []}, "No institution"),
        ({"subjects": 0}, "at least one subject"),
        ({"seed": -1}, "must not be negative"),
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

    def fail_late(path, values, grid):
        if path.parent.name == "I1-001":
            failed.set()
            raise interruption
        under_way.add(path)
        failed.wait(10)
        time.sleep(0.3)  # others are still writing when one fails
        write(path, values, grid)
        under_way.remove(path)

    monkeypatch.setattr(generate, "_write_nifti", fail_late)
    with pytest.raises(type(interruption)):
        generate_phantom(tmp_path / "out", institutions=["I1"], subjects=3, modalities=["T1"], n_jobs=2, progress=False)
    assert not under_way  # or a folder that is being removed gets new files
    assert not any(tmp_path.iterdir())


def test_cache_is_made_once_even_when_asked_for_twice_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    made = []
    write = generate._write_subjects
    monkeypatch.setattr(generate, "_write_subjects", lambda *args, **kwargs: (made.append(1), write(*args, **kwargs)))

    def ask(_):
        return cached_phantom(institutions=["I1"], subjects=1, modalities=["T1"], progress=False)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first == second
    assert first.is_file()
    assert tmp_path in first.parents
    assert len(made) == 1


def test_cache_folder_without_monai_data_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MONAI_DATA_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert generate.cache_root() == tmp_path / "medtl"
