"""A target task: what headers and names say about its images, classes and splits."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import toy_collection

from medtl_ext.data import load_collection
from medtl_ext.data.sample import write_sample
from medtl_ext.transfer import ClassificationTask, SegmentationTask


@pytest.fixture
def toy(tmp_path) -> Path:
    return toy_collection(tmp_path / "toy")


def test_channels_and_classes_are_named(toy):
    one, several = (SegmentationTask(name, collection=str(toy)) for name in ("A-T2-ED", "A-FLAIR+T1-both"))
    assert (one.channels, one.answers) == (("T2",), ("background", "ED"))
    assert (several.channels, several.n_channels) == (("FLAIR", "T1"), 2)
    assert several.answers[0] == "background"
    assert len(several.answers) == several.n_classes == 3


def test_splits_are_those_of_the_tasks_own_subjects(toy):
    content = json.loads(toy.read_text())
    for subject in content["subjects"]:
        if subject["institution"] == "A":
            subject["split"] = "test"
        elif subject["split"] == "val":
            del subject["images"]["T2"]
    toy.write_text(json.dumps(content))
    splits = {name: SegmentationTask(name, collection=str(toy)).splits for name in ("A-T2-ED", "B-T2-ED", "B-T1-ED")}
    assert splits == {"A-T2-ED": ("test",), "B-T2-ED": ("train", "test"), "B-T1-ED": ("train", "val", "test")}


def test_folds_leave_out_each_labelled_patient_once_and_never_test_one(toy):
    """If the collection says so, A0 and A1 in ``train`` are scans of one patient."""
    content = json.loads(toy.read_text())

    def subjects(split, *fold):
        task = SegmentationTask("A-T2-ED", collection=str(toy), fold=fold)
        return sorted(item["subject"] for item in task.datalist(split))

    assert [len(subjects("val", place, 3)) for place in range(3)] == [1, 1, 1]
    assert len(subjects("train", 0, 3)) == 2
    for subject in content["subjects"]:
        subject["patient"] = subject["id"].replace("A1", "A0")
    toy.write_text(json.dumps(content))
    held = [subjects("val", place, 2) for place in (0, 1)]
    assert sorted(held) == [["A0", "A1"], ["A2"]]
    assert [subjects("train", place, 2) for place in (0, 1)] == held[::-1]
    assert subjects("val", 0, 1) == subjects("train", 0, 1) == ["A0", "A1", "A2"]
    assert subjects("test", 0, 2) == ["A3"]


@pytest.mark.parametrize(("shape", "flat"), [((4, 5, 3), False), ((4, 5, 1), True), ((4, 5), True)])
def test_images_of_one_slice_are_flat(toy, shape, flat):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), toy.parent / "i.nii.gz")
    toy.write_text(toy.read_text().replace('"i"', '"i.nii.gz"'))
    assert load_collection(toy).subjects[0].images["T2"].name == "i.nii.gz"
    assert SegmentationTask("A-T2-ED", collection=str(toy)).flat is flat


def test_photographs_are_flat_and_of_three_channels(tmp_path):
    target = SegmentationTask("Diabetic-R+G+B-Vessel", collection=str(write_sample("retina", tmp_path / "retina")))
    assert (target.flat, target.channels, target.answers) == (True, ("R", "G", "B"), ("background", "Vessel"))
    assert target.splits == ("train", "val", "test")


def test_images_to_classify_say_the_same_of_themselves(mnist):
    grey, colour = (
        ClassificationTask(mnist(name, shape=shape), in_channels=channels)
        for name, shape, channels in (("grey", (28, 28), 1), ("colour", (28, 28, 3), 3))
    )
    assert (grey.flat, grey.channels, grey.n_channels) == (True, ("grey",), 1)
    assert (colour.channels, colour.n_channels) == (("R", "G", "B"), 3)
    assert grey.answers == tuple(grey.class_names)
    assert len(grey.answers) == grey.n_classes
