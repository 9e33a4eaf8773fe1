"""Every reader against a tree with the documented layout, and against the ways such trees break."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from monai.transforms import LoadImaged

from medtl_ext import InputError
from medtl_ext.data import Task, load_collection
from medtl_ext.data.__main__ import main
from medtl_ext.data.readers import read_collection
from medtl_ext.datasets import open_dataset

SHAPE = (6, 5, 4)
OLD, NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")
needs_pybids = pytest.mark.skipif(find_spec("bids") is None, reason="pybids is not installed")


def save(path, values=None, shape=SHAPE):
    """An image, or with ``values`` a label that holds all of them, different for every path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(int(hashlib.sha256(str(path).encode()).hexdigest()[:8], 16))
    voxels = random.normal(100, 20, shape).astype(np.float32)
    if values is not None:
        voxels = np.resize(random.permutation([0, *values]), shape).astype(np.uint8)
    kind = nibabel.AnalyzeImage if path.suffix == ".img" else nibabel.Nifti1Image
    nibabel.save(kind(voxels, None if path.suffix == ".img" else np.diag([-1.0, 1, 2, 1])), path)


def tumours(root, subjects, separator, roles, values, suffix=".nii.gz"):
    for subject in subjects:
        for role in roles:
            save(root / subject / f"{subject}{separator}{role}{suffix}")
        save(root / subject / f"{subject}{separator}seg{suffix}", values)


def fets(root):
    names = [f"FeTS2022_{number:05d}" for number in range(6)]
    tumours(root / "MICCAI_FeTS2022_TrainingData", names, "_", OLD, (1, 2, 4))
    table = pd.DataFrame({"Partition_ID": [1, 1, 1, 18, 18, 18], "Subject_ID": names})
    for number in (1, 2):
        table.to_csv(root / f"MICCAI_FeTS2022_TrainingData/partitioning_{number}.csv", index=False)
    (root / "MICCAI_FeTS2022_TrainingData/README.txt").write_text("about")


def brats2020(root):
    tumours(root, [f"BraTS20_Training_{number:03d}" for number in (1, 2, 3)], "_", OLD, (1, 2, 4), ".nii")


def brats2021(root):
    tumours(root, [f"BraTS2021_{number:05d}" for number in (0, 2, 3)], "_", OLD, (1, 2, 4))


def brats2023(root):
    names = [f"BraTS-GLI-{number:05d}-{visit:03d}" for number, visit in ((0, 0), (0, 1), (2, 0), (3, 0), (5, 0))]
    tumours(root / "TrainingData", names, "-", NEW, (1, 2, 3))


def iseg(root):
    for number in (1, 2, 3):
        for role in ("T1", "T2"):
            save(root / f"iSeg-2019-Training/subject-{number}-{role}.img")
        save(root / f"iSeg-2019-Training/subject-{number}-label.img", (10, 150, 250))


def wmh(root):
    sites = {"training/Utrecht": (0, 2), "training/Singapore": (50, 51), "training/Amsterdam/GE3T": (100, 101)}
    sites |= {"test/Utrecht": (1,), "test/Singapore": (60,), "test/Amsterdam/GE3T": (120,)}
    sites |= {"test/Amsterdam/Philips_VU .PETMR_01.": (161,)}
    for site, numbers in sites.items():
        for number in numbers:
            for name in ("pre/FLAIR", "pre/T1", "pre/3DT1", "orig/FLAIR", "orig/T1", "orig/3DT1"):
                save(root / f"{site}/{number}/{name}.nii.gz")
            save(root / f"{site}/{number}/wmh.nii.gz", (1, 2))
    save(root / "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz", (1, 2))


def msd(root):
    cases = [f"la_{number:03d}" for number in (3, 4, 5, 7)]
    for case in cases:
        save(root / f"imagesTr/{case}.nii.gz")
        save(root / f"labelsTr/{case}.nii.gz", (1,))
    content = {
        "name": "LeftAtrium",
        "description": "Left atrium segmentation",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium"},
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def datalist(root):
    """One file a modality in a folder of its own, as MONAI's own lists for BraTS have it; three sections."""
    content = {"labels": {"core": 1, "oedema": 2}, "modality": ["FLAIR", "T1 Gd"]}
    for section, numbers in {"training": (0, 1), "validation": (2,), "test": (3,)}.items():
        for number in numbers:
            for name, values in (("flair", None), ("t1ce", None), ("seg", (1, 2))):
                save(root / f"case{number}/{name}.nii.gz", values)
        content[section] = [
            {"image": [f"case{n}/flair.nii.gz", f"case{n}/t1ce.nii.gz"], "label": f"case{n}/seg.nii.gz"}
            for n in numbers
        ]
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def nnunet(root, labels=None):
    for case in ("prostate_0001", "prostate_02", "prostate_04"):
        for channel in (0, 1):
            save(root / f"imagesTr/{case}_{channel:04d}.nii.gz")
        save(root / f"labelsTr/{case}.nii.gz", (1, 2))
    content = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": labels or {"background": 0, "PZ": 1, "TZ": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def bids(root):
    raw = {"Name": "Two sites", "BIDSVersion": "1.8.0"}
    segmentations = {**raw, "DatasetType": "derivative", "GeneratedBy": [{"Name": "seg"}]}
    for folder, content in ((root, raw), (root / "derivatives/seg", segmentations)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset_description.json").write_text(json.dumps(content))
    subjects = [f"sub-{number:02d}" for number in range(1, 7)]
    table = pd.DataFrame({"participant_id": subjects, "site": ["Oslo"] * 3 + ["Tromsø"] * 3})
    table.to_csv(root / "participants.tsv", sep="\t", index=False)
    for subject in subjects:
        for name in ("FLAIR", "T1w", "ce-gadolinium_T1w"):
            save(root / subject / f"anat/{subject}_{name}.nii.gz")
        anat = root / "derivatives/seg" / subject / "anat"
        save(anat / f"{subject}_space-T1w_label-lesion_mask.nii.gz", (1,))
        save(anat / f"{subject}_desc-tissue_dseg.nii.gz", (1, 2))
    (root / "derivatives/seg/desc-tissue_dseg.tsv").write_text("index\tname\n0\tbackground\n1\tGM\n2\tWM\n")


def table(root):
    rows = []
    for number, split in enumerate(("train", "train", "val", "test")):
        save(root / f"scans/{number}/lesion.nii.gz", (1,))
        for modality in ("T1", "FLAIR"):
            save(root / f"scans/{number}/{modality}.nii.gz")
            image, label = (f"scans/{number}/{name}.nii.gz" for name in (modality, "lesion"))
            rows.append((f"p{number}", "St-Olav", modality, image, label, split))
    columns = ["Subject", "Institution", "Modality", "Image", "Label", "Split"]
    pd.DataFrame(rows, columns=columns).to_csv(root / "liste.csv", index=False, sep=";")


# name of the tree: how it is made, the reader, its options, a task, and the subjects of that task
TREES = {
    "fets": (fets, "fets", {}, "18-T1CE-ET", 3),
    "brats2020": (brats2020, "brats", {}, "BraTS-FLAIR-FeTS", 3),
    "brats2021": (brats2021, "brats", {}, "BraTS-T2-ED", 3),
    "brats2023": (brats2023, "brats", {}, "BraTS-T1CE-ET", 5),
    "iseg": (iseg, "iseg", {}, "iSeg-T2-WM", 3),
    "wmh": (wmh, "wmh", {}, "Amsterdam-GE3T-FLAIR-WMH", 3),
    "msd": (msd, "msd", {}, "LeftAtrium-MRI-left_atrium", 4),
    "datalist": (datalist, "datalist", {}, "dataset-T1_Gd-oedema", 4),
    "nnunet": (nnunet, "nnunet", {}, "Prostate-ADC-TZ", 3),
    "bids": (bids, "bids", {}, "Tromsø-T1CE-lesion", 3),
    "csv": (table, "csv", {"labels": {"lesion": 1}}, "St-Olav-FLAIR-lesion", 4),
}
FOLDERS = [name for name in TREES if name in ("fets", "brats2020", "brats2023", "iseg", "wmh")]  # told by names alone


@pytest.fixture
def make(tmp_path):
    """Make a tree, below a folder with spaces and characters that are not ASCII."""

    def build(name, **options):
        root = tmp_path / "données d'été 数据" / "Dataset005_Prostate"
        root.mkdir(parents=True)
        TREES[name][0](root, **options)
        return root

    return build


def read(name, root, **options):
    _, reader, defaults, *_ = TREES.get(name, (None, name, {}))
    out = options.pop("out", root.parent / "collection.json")
    return read_collection(reader, root, out, progress=False, **{**defaults, **options})


def contents(root):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def rows(reading):
    return [f"{issue.subject}|{issue.file}|{issue.problem}|{issue.advice}" for issue in reading.left_out]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[needs_pybids] if n == "bids" else []) for n in TREES])
class TestEveryReader:
    def test_a_sound_tree(self, make, name):
        root = make(name)
        before = contents(root)
        reading = read(name, root)
        task, count = Task(TREES[name][3]), TREES[name][4]
        collection = reading.collection
        assert rows(reading) == []
        assert reading.check.issues == []
        assert task in collection.tasks()
        assert len(collection.subjects_of(task)) == count
        datalist = [entry for split in ("train", "val", "test") for entry in collection.datalist(task, split)]
        assert len(datalist) == count
        item = LoadImaged(["image", "label"], reader="NibabelReader", ensure_channel_first=True)(datalist[0])
        assert item["image"].shape == item["label"].shape == (1, *SHAPE)
        assert contents(root) == before, "no file is written, copied or changed below the root"
        assert "Noted while reading: 0" in str(reading)

    def test_paths_move_with_the_data(self, make, name, tmp_path):
        root = make(name)
        reading = read(name, root, check=False)
        assert reading.check is None
        text = reading.paths[0].read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        shutil.move(root.parent, tmp_path / "elsewhere")
        moved = load_collection(tmp_path / "elsewhere/collection.json")
        assert all(path.is_file() for subject in moved.subjects for path in subject.images.values())

    def test_files_elsewhere_have_absolute_paths(self, make, name, tmp_path):
        root = make(name)
        reading = read(name, root, check=False, out=tmp_path / "out/c.json")
        files = [path for subject in reading.collection.subjects for path in subject.labels.values()]
        assert all(path.is_file() and path.is_relative_to(root) for path in files)

    def test_wrong_root(self, tmp_path, name):
        for root in (tmp_path / "none", tmp_path):
            with pytest.raises(InputError, match=r"root|folder") as caught:
                read(name, root)
            assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir()), "nothing is written"

    def test_a_lost_label_is_said(self, make, name):
        root = make(name)
        victim = load_collection(read(name, root, check=False).paths[0]).subjects[-1]
        for path in victim.labels.values():
            path.unlink()
        reading = read(name, root, check=False)
        assert victim.id not in [subject.id for subject in reading.collection.subjects]
        assert any(row.startswith(f"{victim.id}|") and "no label" in row for row in rows(reading))
        assert victim.id in str(reading)

    def test_a_lost_image_is_said(self, make, name):
        root = make(name)
        victim = read(name, root, check=False).collection.subjects[0]
        modality, path = next(iter(victim.images.items()))
        path.unlink()
        if name == "bids":  # does not say which modalities there should be
            return
        reading = read(name, root, check=False)
        kept = {subject.id: subject for subject in reading.collection.subjects}.get(victim.id)
        consequence = "kept without it" if len(victim.images) > 1 else "the subject is left out"
        assert any(
            row.startswith(f"{victim.id}|") and f"no image {modality}|{consequence}" in row for row in rows(reading)
        )
        assert (modality not in kept.images) if kept else len(victim.images) == 1


@pytest.mark.parametrize("name", FOLDERS)
class TestTreesOfNames:
    def test_upper_case(self, make, name):
        root = make(name)
        expected = read(name, root).collection
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".gz", ".nii", ".hdr", ".img", ".csv"):
                path.rename(path.with_name(path.name.upper()))
        reading = read(name, root)
        assert rows(reading) == []
        assert reading.check.errors == []
        assert reading.collection.tasks() == expected.tasks()
        assert len(reading.collection.subjects) == len(expected.subjects)

    def test_nii_beside_nii_gz(self, make, name):
        root = make(name)
        image = next(path for path in read(name, root, check=False).collection.subjects[0].images.values())
        stem = image.name.split(".")[0]
        for suffix in (".nii", ".nii.gz"):
            save(image.with_name(stem + suffix))
        reading = read(name, root)
        assert reading.collection.subjects[0].images
        taken = next(
            path for path in reading.collection.subjects[0].images.values() if path.name.startswith(stem + ".")
        )
        assert taken.name == stem + ".nii.gz"
        assert any(
            f"{stem}.nii|" in row and "has this image already|the file is not used" in row for row in rows(reading)
        )

    def test_extra_files(self, make, name):
        root = make(name)
        folder = next(iter(read(name, root, check=False).collection.subjects[0].images.values())).parent.parent
        save(folder / "W39_1998.09.19_Segm.nii", (1, 2))  # so is a label of BraTS 2020 called
        save(folder / ".hidden_t1.nii.gz")
        (folder / "notes.txt").write_text("not an image")
        (row,) = rows(read(name, root))
        assert "W39_1998.09.19_Segm.nii|the name is not one of this dataset's|the file is not used" in row

    def test_a_copy_of_a_subject(self, make, name):
        root = make(name)
        victim = read(name, root, check=False).collection.subjects[0]
        parts = next(iter(victim.images.values())).relative_to(root).parts
        shutil.copytree(root / parts[0], root / "copy" / parts[0], ignore=shutil.ignore_patterns("*.csv"))
        reading = read(name, root, check=False)
        assert sum("has this image already" in row for row in rows(reading)) >= len(victim.images)
        next(iter(reading.collection.subjects[0].images.values())).unlink()
        subject = read(name, root, check=False).collection.subjects[0]
        files = [*subject.images.values(), *subject.labels.values()]
        assert len(subject.images) == len(victim.images) - 1
        assert len({path.relative_to(root).parts[0] for path in files}) == 1, "never a mixture of the two"


class TestTumours:
    def test_labels_and_objectives(self, make):
        collection = read("fets", make("fets"), check=False).collection
        assert collection.institutions == ["1", "18"]
        assert collection.modalities == ["T1", "T1CE", "T2", "FLAIR"]
        assert collection.labels == {"tumour": {"NCR": 1, "ED": 2, "ET": 4}}
        assert collection.class_names("1-T1-FeTS") == ["ED", "ET", "NCR"]
        assert collection.label_values("1-T1-FeTS") == [[2], [4], [1]]

    def test_the_other_partitioning(self, make):
        root = make("fets")
        path = root / "MICCAI_FeTS2022_TrainingData/partitioning_2.csv"
        path.write_text(path.read_text().replace("18,", "18_1,"))
        assert read("fets", root, check=False, institutions=path).collection.institutions == ["1", "18_1"]

    def test_the_table_and_the_folders_differ(self, make):
        root = make("fets")
        data = root / "MICCAI_FeTS2022_TrainingData"
        tumours(data, ["FeTS2022_00099"], "_", OLD, (1, 2, 4))
        shutil.rmtree(data / "FeTS2022_00000")
        reading = read("fets", root)
        assert sorted(rows(reading)) == [
            "FeTS2022_00000||listed in partitioning_1.csv, but has no files|the subject is left out",
            "FeTS2022_00099||has no institution in partitioning_1.csv|the subject is left out",
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "0 files partitioning_1.csv"),
            ("Institution,Name\n1,a\n", "has no column 'subject'"),
            ("Partition_ID,Subject_ID\n1,FeTS2022_00000\n2,FETS2022_00000\n", "at two institutions"),
        ],
    )
    def test_broken_tables(self, make, text, message):
        root = make("fets")
        path = root / "MICCAI_FeTS2022_TrainingData/partitioning_1.csv"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(InputError, match=message):
            read("fets", root)

    @pytest.mark.parametrize(("name", "found", "expected"), [("fets", 3, 4), ("brats2021", 3, 4), ("brats2023", 4, 3)])
    def test_the_other_value_of_et(self, make, name, found, expected):
        root = make(name)
        for path in root.rglob("*seg*"):
            save(path, (1, 2, found))
        with pytest.raises(InputError, match=f"holds the value {found}, where {expected} was expected") as caught:
            read(name, root, check=False)
        assert f"give et_label {found}" in str(caught.value)
        reading = read(name, root, et_label=found)
        assert reading.check.issues == []
        assert reading.collection.labels["tumour"]["ET"] == found

    def test_the_other_value_in_one_file(self, make):
        root = make("brats2021")
        save(sorted(root.rglob("*seg*"))[-1], (1, 2, 3))
        (error,) = read("brats2021", root).check.errors
        assert (error.subject, "undeclared values 3" in error.problem) == ("BraTS2021_00003", True)

    def test_names_of_another_year(self, make):
        root = make("brats2023")
        with pytest.raises(InputError, match=r"no subject found.*expected SUBJECT/SUBJECT_\{t1,.*found 25 image files"):
            read("fets", root, institutions=root / "partitioning_1.csv")
        brats2021(root)
        with pytest.raises(InputError, match=r"mixes the names of BraTS until 2022 .*read one of them at a time"):
            read("brats2023", root)

    def test_visits_stay_together(self, make):
        splits = read("brats2023", make("brats2023"), check=False).collection.subjects
        assert splits[0].id[:-4] == splits[1].id[:-4]
        assert splits[0].split == splits[1].split

    def test_no_labels_at_all(self, make):
        root = make("fets")
        for path in root.rglob("*seg*"):
            path.unlink()
        with pytest.raises(InputError, match=r"no subject found.*FeTS2022_00000: no label tumour"):
            read("fets", root)


class TestAnalyze:
    def test_classes(self, make):
        collection = read("iseg", make("iseg"), check=False).collection
        assert collection.labels == {"tissue": {"CSF": 10, "GM": 150, "WM": 250}}
        assert collection.label_values("iSeg-T1-All") == [[10], [150], [250]]

    @pytest.mark.parametrize("lost", [".hdr", ".img"])
    def test_half_a_pair(self, make, lost):
        root = make("iseg")
        (root / f"iSeg-2019-Training/subject-2-T1{lost}").unlink()
        found = rows(read("iseg", root))
        assert any(f"no {lost} beside it|the file is not used" in row for row in found)
        assert any("no image T1|kept without it" in row for row in found)

    def test_a_last_axis_of_length_one(self, make):
        """As the challenge stores it: 144 x 192 x 256 x 1."""
        root = make("iseg")
        for path in root.rglob("*.img"):
            save(path, (10, 150, 250) if "label" in path.name else None, shape=(*SHAPE, 1))
        reading = read("iseg", root)
        item = LoadImaged("image", reader="NibabelReader", ensure_channel_first=True)(
            reading.collection.datalist("iSeg-T1-WM", "train")[0]
        )
        assert item["image"].shape == (1, *SHAPE)
        assert reading.check.issues == []


class TestWMH:
    TEST = ("Utrecht-1", "Singapore-60", "Amsterdam-GE3T-120", "Amsterdam-Philips_VU_.PETMR_01.-161")

    def test_sites_and_splits(self, make):
        collection = read("wmh", make("wmh"), check=False).collection
        names = ["Amsterdam-GE3T", "Amsterdam-Philips_VU_.PETMR_01.", "Singapore", "Utrecht"]
        assert sorted(collection.institutions) == names
        assert {subject.id for subject in collection.subjects if subject.split == "test"} == set(self.TEST)
        assert {subject.split for subject in collection.subjects} == {"train", "val", "test"}

    def test_folds_that_keep_the_test_set(self, make):
        reading = read("wmh", make("wmh"), folds=2, keep_test=True, seed=1, check=False)
        assert [path.name for path in reading.paths] == ["collection_fold0.json", "collection_fold1.json"]
        splits = [{s.id: s.split for s in load_collection(path).subjects} for path in reading.paths]
        assert all({name for name, split in found.items() if split == "test"} == set(self.TEST) for found in splits)
        assert sorted(n for found in splits for n, s in found.items() if s == "val") == sorted(
            set(splits[0]) - set(self.TEST)
        )

    def test_other_pathology_is_declared_and_not_asked_for(self, make):
        collection = read("wmh", make("wmh"), check=False).collection
        assert collection.labels["wmh"] == {"WMH": 1, "Other": 2}
        assert collection.label_values("Utrecht-FLAIR-WMH") == [[1]]

    def test_the_training_set_alone(self, make):
        collection = read("wmh", make("wmh") / "training", check=False).collection
        assert collection.institutions == ["Amsterdam-GE3T", "Singapore", "Utrecht"]

    def test_the_scanners_of_amsterdam_at_the_top(self, make):
        folder = make("wmh") / "training"
        for scanner in (folder / "Amsterdam").iterdir():
            scanner.rename(folder / scanner.name)
        (folder / "Amsterdam").rmdir()
        collection = read("wmh", folder, check=False).collection
        assert collection.institutions == ["Amsterdam-GE3T", "Singapore", "Utrecht"]


class TestLists:
    def edit(self, root, **changes):
        content = json.loads((root / "dataset.json").read_text())
        content = {key: value for key, value in (content | changes).items() if value is not None}
        (root / "dataset.json").write_text(json.dumps(content))

    def test_sections_are_splits(self, make):
        collection = read("datalist", make("datalist"), check=False).collection
        assert [subject.split for subject in collection.subjects] == ["train", "train", "val", "test"]
        assert collection.subjects[0].id == "case0_flair"
        assert collection.labels == {"label": {"core": 1, "oedema": 2}}

    def test_test_images_without_labels(self, make):
        root = make("msd")
        save(root / "imagesTs/la_001.nii.gz")
        self.edit(root, test=["./imagesTs/la_001.nii.gz"])
        assert rows(read("msd", root)) == ["la_001||no label label|the subject is left out"]

    @pytest.mark.parametrize(
        ("modality", "shape"), [({"0": "FLAIR", "1": "T1w"}, (*SHAPE, 2)), ({"0": "MRI"}, (*SHAPE, 3))]
    )
    def test_channels_in_one_file_are_refused(self, make, modality, shape):
        root = make("msd")
        self.edit(root, modality=modality)
        for path in (root / "imagesTr").iterdir():
            save(path, shape=shape)
        with pytest.raises(
            InputError, match=r"several modalities in one file .*nnUNetv2_convert_MSD_dataset"
        ) as caught:
            read("msd", root)
        assert "\n" not in str(caught.value)

    def test_what_a_list_leaves_out_can_be_given(self, make):
        root = make("msd")
        self.edit(root, modality=None, labels=None)
        with pytest.raises(InputError, match="names no labels"):
            read("msd", root)
        with pytest.raises(InputError, match="every modality"):
            read("msd", root, labels={"LA": 1})
        (root / "dataset.json").rename(root.parent / "list.json")
        reading = read("msd", root, labels={"LA": 1}, modalities=["T1"], file=root.parent / "list.json")
        assert "LeftAtrium-T1-LA" in map(str, reading.collection.tasks())

    def test_folds_and_uneven_entries_are_said(self, make):
        root = make("datalist")
        content = json.loads((root / "dataset.json").read_text())
        first, second = content["training"]
        self.edit(root, training=[first | {"fold": 0}, second | {"image": second["image"] * 2}])
        found = rows(read("datalist", root, check=False))
        assert "case1_flair||4 images for 2 modalities|the subject is left out" in found
        assert any("the list's own folds are not used" in row for row in found)

    @pytest.mark.parametrize(
        "entry", [{"image": "a.nii.gz", "label": 3}, {"image": [1]}, {"image": []}, {"label": "b"}, 1]
    )
    def test_entries_of_another_kind(self, make, entry):
        root = make("msd")
        self.edit(root, training=[entry])
        with pytest.raises(InputError, match=r"training must hold the paths of 'image' and 'label' files"):
            read("msd", root)

    @pytest.mark.parametrize("text", ["{", "[]", '{"labels": {"a": "b"}, "modality": {"0": "T1"}}'])
    def test_broken_lists(self, make, text):
        root = make("msd")
        (root / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json"):
            read("msd", root)


class TestNnUNet:
    def test_a_case_that_ends_like_a_channel(self, make):
        collection = read("nnunet", make("nnunet"), check=False).collection
        assert [subject.id for subject in collection.subjects] == ["prostate_0001", "prostate_02", "prostate_04"]
        assert collection.modalities == ["T2", "ADC"]

    def test_regions_and_ignore(self, make):
        reading = read("nnunet", make("nnunet", labels={"background": 0, "whole": [1, 2], "TZ": 2, "ignore": 3}))
        assert reading.collection.label_values("Prostate-T2-whole") == [[1, 2]]
        assert reading.collection.label_values("Prostate-T2-TZ") == [[2]]
        assert list(reading.collection.objectives) == ["whole", "TZ"]
        assert reading.check.errors == []
        assert any("value 3 is to be ignored" in row for row in rows(reading))

    def test_version_one(self, make):
        root = make("nnunet", labels={"0": "background", "1": "PZ", "2": "TZ"})
        content = json.loads((root / "dataset.json").read_text())
        content["modality"] = content.pop("channel_names")
        (root / "dataset.json").write_text(json.dumps(content))
        assert list(read("nnunet", root).collection.objectives) == ["PZ", "TZ", "All"]

    def test_a_test_set_with_labels(self, make):
        root = make("nnunet")
        for case in ("prostate_08", "prostate_09"):
            for channel in (0, 1):
                save(root / f"imagesTs/{case}_{channel:04d}.nii.gz")
        save(root / "labelsTs/prostate_08.nii.gz", (1, 2))
        reading = read("nnunet", root)
        splits = {subject.id: subject.split for subject in reading.collection.subjects}
        assert [name for name, split in splits.items() if split == "test"] == ["prostate_08"]
        assert rows(reading) == ["prostate_09||no label label|the subject is left out"]

    def test_an_undeclared_channel(self, make):
        root = make("nnunet")
        save(root / "imagesTr/prostate_02_0007.nii.gz")
        (row,) = rows(read("nnunet", root))
        assert "prostate_02_0007.nii.gz|the channel is not in dataset.json" in row

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"file_ending": ".png"}, "Convert them"), ({"channel_names": {}}, "every modality")],
    )
    def test_what_cannot_be_read(self, make, change, message):
        root = make("nnunet")
        content = json.loads((root / "dataset.json").read_text()) | change
        (root / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            read("nnunet", root)


class TestBids:
    @needs_pybids
    def test_labels_sessions_and_spaces(self, make):
        root = make("bids")
        anat = root / "derivatives/seg/sub-01/ses-2/anat"
        for name, values in (("T1w", None), ("label-lesion_mask", (1,))):
            save(anat / f"sub-01_ses-2_space-MNI_{name}.nii.gz", values)
        save(root / "sub-01/anat/sub-01_run-2_T1w.nii.gz")
        reading = read("bids", root)
        collection = reading.collection
        assert collection.labels == {"lesion": {"lesion": 1}, "tissue": {"GM": 1, "WM": 2}}
        assert sorted(collection.objectives) == ["All", "GM", "WM", "lesion"]
        splits = {subject.id: subject.split for subject in collection.subjects}
        assert splits["sub-01"] == splits["sub-01_ses-2_space-MNI"], "a patient stays in one split"
        (row,) = rows(reading)
        assert row.startswith("sub-01|")
        assert "is there too|the file is not used" in row

    @needs_pybids
    def test_segmentations_without_names(self, make):
        root = make("bids")
        (root / "derivatives/seg/desc-tissue_dseg.tsv").unlink()
        with pytest.raises(InputError, match=r"no dseg\.tsv names the values"):
            read("bids", root)

    def test_without_pybids(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "bids", None)
        with pytest.raises(InputError, match="pip install pybids"):
            read("bids", tmp_path)


class TestTable:
    def test_splits_and_patients(self, make):
        root = make("csv")
        collection = read("csv", root, check=False).collection
        assert [subject.split for subject in collection.subjects] == ["train", "train", "val", "test"]
        frame = pd.read_csv(root / "liste.csv", sep=";").drop(columns="Split").assign(Patient="one")
        frame.to_csv(root / "liste.csv", index=False, encoding="utf-8-sig")
        assert {subject.split for subject in read("csv", root, check=False).collection.subjects} == {"train"}

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda frame: frame.drop(columns="Image"), "no column 'image'"),
            (lambda frame: frame.assign(Split=["train", "val"] * 4), "several values of split"),
            (lambda frame: frame.assign(Split=["train"] * 6 + [""] * 2), "have no 'split'"),
            (lambda frame: frame.assign(Split="valid"), "did you mean 'val'"),
        ],
    )
    def test_refused(self, make, edit, message):
        root = make("csv")
        edit(pd.read_csv(root / "liste.csv", sep=";")).to_csv(root / "liste.csv", index=False)
        with pytest.raises(InputError, match=message):
            read("csv", root)

    def test_a_patient_of_two_subjects_stays_in_one_split(self, make):
        root = make("csv")
        pd.read_csv(root / "liste.csv", sep=";").assign(Patient="one").to_csv(root / "liste.csv", index=False)
        with pytest.raises(InputError, match=r"patient 'one' .* is in splits 'train' and 'val'"):
            read("csv", root)

    def test_names_that_become_one_are_two_images_of_it(self, make):
        root = make("csv")
        frame = pd.read_csv(root / "liste.csv", sep=";")
        frame.loc[0:1, "Modality"] = ["T1-w", "T1 w"]
        frame.to_csv(root / "liste.csv", index=False)
        assert [row.split("|")[2] for row in rows(read("csv", root, check=False))] == ["two images of T1_w"]

    def test_rows_longer_than_the_header_are_refused(self, make):
        root = make("csv")
        lines = (root / "liste.csv").read_text(encoding="utf-8-sig").splitlines()
        (root / "liste.csv").write_text("\n".join([lines[0], *(f"{line};" for line in lines[1:])]))
        with pytest.raises(InputError, match="more fields than its header"):
            read("csv", root)

    @pytest.mark.parametrize(
        "labels", [{"left atrium": 1, "left-atrium": 2}, {"lesion": 1.7}, {"background": 1, "lesion": 2}]
    )
    def test_labels_that_would_be_lost_are_refused(self, make, labels):
        with pytest.raises(InputError, match="labels"):
            read("csv", make("csv"), labels=labels)

    def test_left_out(self, make):
        root = make("csv")
        frame = pd.read_csv(root / "liste.csv", sep=";")
        frame.loc[1, "Modality"] = "T1"
        frame.loc[2:3, "Institution"] = ""
        frame.to_csv(root / "liste.csv", index=False)
        found = rows(read("csv", root, check=False))
        assert [row.split("|")[2] for row in found] == ["two images of T1", "no subject or no institution"]

    def test_which_table_and_which_labels(self, make):
        root = make("csv")
        with pytest.raises(InputError, match="give labels"):
            read("csv", root, labels=None)
        shutil.copy(root / "liste.csv", root / "old.csv")
        with pytest.raises(InputError, match="2 CSV files"):
            read("csv", root)
        assert read("csv", root, file=root / "old.csv", check=False).collection.name == "old"


def test_unknown_names(make):
    root = make("iseg")
    with pytest.raises(InputError, match="reader 'fest' is unknown; did you mean 'fets'"):
        read_collection("fest", root, root / "c.json")
    with pytest.raises(InputError, match="option of reader 'iseg' 'et_label' is unknown"):
        read("iseg", root, et_label=3)


def test_institutions_of_ones_own(make):
    root = make("iseg")
    path = root / "sites.csv"
    path.write_text("subject,institution\nSUBJECT-1,I1\nsubject-2,I2\nsubject-3,I2\n")
    assert read("iseg", root, institutions=path, check=False).collection.institutions == ["I1", "I2"]


class TestCommandLine:
    def test_read(self, make, capsys):
        root = make("fets")
        (root / "MICCAI_FeTS2022_TrainingData/FeTS2022_00001/FeTS2022_00001_t2.nii.gz").unlink()
        out, csv = root.parent / "c.json", root.parent / "issues.csv"
        assert main(["read", "fets", "--root", str(root), "--out", str(out), "--csv", str(csv), "--seed", "3"]) == 0
        printed = capsys.readouterr().out
        assert "6 subjects" in printed
        assert "no image T2; kept without it: FeTS2022_00001" in printed
        assert "errors: 0" in printed
        assert pd.read_csv(csv).subject.tolist() == ["FeTS2022_00001"]
        assert json.loads(out.read_text())["drawn"] == {"fractions": [0.5, 0.25, 0.25], "seed": 3}

    def test_options(self, make, capsys):
        root = make("csv")
        arguments = ["read", "csv", "--root", str(root), "--out", str(root.parent / "c.json")]
        arguments += ["--labels", "lesion=1", "--no-check", "--split", "0.5", "0.5", "0"]
        assert main(arguments) == 0
        assert "were not checked" in capsys.readouterr().out
        assert {subject.split for subject in load_collection(root.parent / "c.json").subjects} == {"train", "val"}

    def test_a_report_replaces_nothing_but_a_report(self, make, capsys):
        root = make("csv")
        table, out = root / "liste.csv", root.parent / "c.json"
        before = table.read_bytes()
        words = ["read", "csv", "--root", str(root), "--out", str(out), "--labels", "lesion=1", "--csv"]
        assert main([*words, str(table)]) == 2
        assert "is no report of issues" in capsys.readouterr().err
        assert table.read_bytes() == before
        assert main([*words, str(out)]) == 2
        assert not out.exists()
        report = root.parent / "report.csv"
        assert [main([*words, str(report)]) for _ in range(2)] == [0, 0]

    def test_a_folder_that_cannot_be_written_is_one_line(self, make, capsys):
        root = make("csv")
        (root.parent / "file").write_text("")
        words = ["read", "csv", "--root", str(root), "--labels", "lesion=1", "--no-check"]
        assert main([*words, "--out", str(root.parent / "file" / "c.json")]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("Error: ")
        assert "\n" not in error

    def test_errors(self, make, capsys):
        root = make("iseg")
        save(root / "iSeg-2019-Training/subject-1-label.img", (10, 99))
        assert main(["read", "iseg", "--root", str(root), "--out", str(root.parent / "c.json")]) == 1
        assert "undeclared values 99" in capsys.readouterr().out
        assert main(["read", "wmh", "--root", str(root), "--out", str(root.parent / "d.json")]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("Error: no subject found")
        assert "\n" not in error
        assert not (root.parent / "d.json").exists()
        with pytest.raises(SystemExit):
            main(["read", "csv", "--root", str(root), "--out", "x.json", "--labels", "lesion"])


class TestMedMNIST:
    """One file of arrays: what is written says where it lies and what its classes are called."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        arrays = {f"{split}_images": np.full((4, 28, 28), 7, np.uint8) for split in ("train", "val", "test")}
        labels = {f"{split}_labels": np.array([[0], [1], [1], [0]]) for split in ("train", "val", "test")}
        np.savez(tmp_path / "lung mnist.npz", **arrays, **labels)
        return tmp_path

    def test_is_read_as_it_is(self, folder, capsys):
        out = folder / "lungs.json"
        words = ["read", "medmnist", "--root", str(folder), "--out", str(out), "--labels", "healthy=0", "ill=1"]
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "12 grey images of 28 x 28" in printed
        assert "healthy" in printed
        dataset = open_dataset(str(out))
        assert dataset.class_names == ("healthy", "ill")
        assert dataset.counts("val") == [2, 2]
        assert json.loads(out.read_text())["medmnist"] == "lung mnist.npz"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"file": "other.npz"}, "other.npz does not exist"),
            ({"labels": {"ill": 2}}, "labels gives ill the number 2"),
            ({"folds": 3}, "folds"),
        ],
    )
    def test_refuses(self, folder, options, message):
        with pytest.raises(InputError, match=message):
            read_collection("medmnist", folder, folder / "out.json", **options)
        assert not (folder / "out.json").exists()

    def test_nothing_but_a_description_is_replaced(self, folder):
        npz = folder / "lung mnist.npz"
        before = npz.read_bytes()
        with pytest.raises(InputError, match="describes no MedMNIST file, so it is not replaced"):
            read_collection("medmnist", folder, npz)
        assert npz.read_bytes() == before
        for _ in range(2):
            read_collection("medmnist", folder, folder / "out.json")

    def test_several_files_have_to_be_chosen_from(self, folder):
        (folder / "second.npz").write_bytes(b"")
        with pytest.raises(InputError, match=r"should hold one .npz file; found lung mnist.npz, second.npz"):
            read_collection("medmnist", folder, folder / "out.json")
        assert read_collection("medmnist", folder, folder / "out.json", file="lung mnist.npz").dataset.n_classes == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "describes no MedMNIST file"),
            ('{"name": "x", "medmnist": "none.npz", "class_names": ["a", "b"]}', "none.npz does not exist"),
            ('{"name": "x", "medmnist": "lung mnist.npz", "class_names": ["a"]}', "names 1 classes"),
        ],
    )
    def test_a_wrong_description_is_refused(self, folder, content, message):
        (folder / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            open_dataset(str(folder / "bad.json"))
