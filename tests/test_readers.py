"""Every reader, on a folder with the documented layout and on damaged ones."""

import hashlib
import json
import shutil

import nibabel
import numpy as np
import pandas as pd
import pytest
from bundle_runs import mnist_arrays
from monai.transforms import LoadImaged
from PIL import Image

from medtl_ext import InputError
from medtl_ext.data import Task, load_collection, read_collection
from medtl_ext.data.__main__ import main
from medtl_ext.data.classification import load_classification
from medtl_ext.data.files import read_channels
from medtl_ext.data.readers._pairs import Name, learn_pairs
from medtl_ext.data.sample import SAMPLES

SHAPE = (6, 5, 4)
OLD, NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")
FETS = "MICCAI_FeTS2022_TrainingData"
SEVENTH = "imagesTr/prostate_02_0007.nii.gz"


def save(path, values=None, shape=SHAPE):
    """Save an image, or with ``values`` a label that holds all of them; every path gives other voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(int(hashlib.sha256(str(path).encode()).hexdigest()[:8], 16))
    voxels = random.normal(100, 20, shape).astype(np.float32)
    if values is not None:
        voxels = np.resize(random.permutation([0, *values]), shape).astype(np.uint8)
    kind = nibabel.AnalyzeImage if path.suffix == ".img" else nibabel.Nifti1Image
    nibabel.save(kind(voxels, None if path.suffix == ".img" else np.diag([-1.0, 1, 2, 1])), path)


def picture(path, *values, colour=False):
    """Save a picture of noise or, with ``values`` (numbers or colours), a mask that holds all of them and 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(str(path)))
    pixels = random.integers(0, 256, (6, 5, 3) if colour else (6, 5))
    if values:
        table = np.array([np.zeros_like(values[0]), *values])
        pixels = table[np.resize(np.arange(len(table)), (6, 5))]
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit(path, **changes):
    """Change keys of a JSON file, or remove them (None)."""
    content = json.loads(path.read_text()) | changes
    write(path, {key: value for key, value in content.items() if value is not None})


def listed(**changes):
    return lambda root: edit(root / "dataset.json", **changes)


def tabled(change):
    """Change the table by a function of its data frame."""
    return lambda root: change(pd.read_csv(root / "liste.csv", sep=";")).to_csv(root / "liste.csv", index=False)


def rewritten(name, text):
    return lambda root: (root / name).write_text(text)


def lost(pattern):
    return lambda root: [path.unlink() for path in sorted(root.rglob(pattern))]


def saved(*names, **options):
    """Save more files, or replace the files that match a pattern."""

    def change(root):
        for name in names:
            for path in list(root.glob(name)) or [root / name]:
                save(path, **options)

    return change


def tumours(root, subjects, separator="_", roles=OLD, values=(1, 2, 4), suffix=".nii.gz"):
    for subject in subjects:
        for role in roles:
            save(root / subject / f"{subject}{separator}{role}{suffix}")
        save(root / subject / f"{subject}{separator}seg{suffix}", values)


def fets(root):
    names = [f"FeTS2022_{number:05d}" for number in range(6)]
    tumours(root / FETS, names)
    table = pd.DataFrame({"Partition_ID": [1, 1, 1, 18, 18, 18], "Subject_ID": names})
    for number in (1, 2):
        table.to_csv(root / f"{FETS}/partitioning_{number}.csv", index=False)
    (root / f"{FETS}/README.txt").write_text("about")


def brats2020(root):
    tumours(root, [f"BraTS20_Training_{number:03d}" for number in (1, 2, 3)], suffix=".nii")


def brats2021(root):
    tumours(root, [f"BraTS2021_{number:05d}" for number in (0, 2, 3)])


def brats2023(root):
    names = [f"BraTS-GLI-{number:05d}-{visit:03d}" for number, visit in ((0, 0), (0, 1), (2, 0), (3, 0), (5, 0))]
    tumours(root / "TrainingData", names, "-", NEW, (1, 2, 3))


def iseg(root):
    for number in (1, 2, 3):
        for role, values in (("T1", None), ("T2", None), ("label", (10, 150, 250))):
            save(root / f"iSeg-2019-Training/subject-{number}-{role}.img", values)


def wmh(root):
    sites = {"training/Utrecht": (0, 2), "training/Singapore": (50, 51), "training/Amsterdam/GE3T": (100, 101)}
    sites |= {"test/Utrecht": (1,), "test/Singapore": (60,), "test/Amsterdam/GE3T": (120,)}
    sites |= {"test/Amsterdam/Philips_VU .PETMR_01.": (161,)}
    for folder in (root / site / str(number) for site, numbers in sites.items() for number in numbers):
        for name in ("pre/FLAIR", "pre/T1", "pre/3DT1", "orig/FLAIR", "orig/T1", "orig/3DT1"):
            save(folder / f"{name}.nii.gz")
        save(folder / "wmh.nii.gz", (1, 2))
    save(root / "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz", (1, 2))


def msd(root):
    cases = [f"la_{number:03d}.nii.gz" for number in (3, 4, 5, 7)]
    for case in cases:
        save(root / "imagesTr" / case)
        save(root / "labelsTr" / case, (1,))
    content = {"name": "LeftAtrium", "description": "Left atrium segmentation", "licence": "CC-BY-SA 4.0", "test": []}
    content |= {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}}
    content["training"] = [{"image": f"./imagesTr/{case}", "label": f"./labelsTr/{case}"} for case in cases]
    write(root / "dataset.json", content)


def datalist(root):
    """A folder per case with one file per modality, as in MONAI's lists for BraTS; three sections."""
    content = {"labels": {"core": 1, "oedema": 2}, "modality": ["FLAIR", "T1 Gd"]}
    for number, section in enumerate(("training", "training", "validation", "test")):
        for name, values in (("flair", None), ("t1ce", None), ("seg", (1, 2))):
            save(root / f"case{number}/{name}.nii.gz", values)
        images = [f"case{number}/flair.nii.gz", f"case{number}/t1ce.nii.gz"]
        content.setdefault(section, []).append({"image": images, "label": f"case{number}/seg.nii.gz"})
    write(root / "dataset.json", content)


def nnunet(root):
    for case in ("prostate_0001", "prostate_02", "prostate_04"):
        for channel in (0, 1):
            save(root / f"imagesTr/{case}_{channel:04d}.nii.gz")
        save(root / f"labelsTr/{case}.nii.gz", (1, 2))
    content = {"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "PZ": 1, "TZ": 2}}
    write(root / "dataset.json", content | {"numTraining": 3, "file_ending": ".nii.gz"})


def bids(root):
    raw = {"Name": "Two sites", "BIDSVersion": "1.8.0"}
    write(root / "dataset_description.json", raw)
    derived = raw | {"DatasetType": "derivative", "GeneratedBy": [{"Name": "seg"}]}
    write(root / "derivatives/seg/dataset_description.json", derived)
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


def folders(root):
    for number in (1, 2, 3, 11):
        save(root / f"images/case_{number}.nii.gz")
        save(root / f"labels/case_{number}_seg.nii.gz", (1, 2))


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


FOLDER = "Dataset005_Prostate"
AMSTERDAM = ["Amsterdam-GE3T", "Amsterdam-Philips_VU_.PETMR_01."]

# name of the tree: how it is made, the reader and its options, a task and its subjects, its values, the institutions
TREES = {
    "fets": (fets, "fets", {}, "18-T1CE-ET", 3, [[4]], ["1", "18"]),
    "brats2020": (brats2020, "brats", {}, "BraTS-FLAIR-FeTS", 3, [[2], [4], [1]], ["BraTS"]),
    "brats2021": (brats2021, "brats", {}, "BraTS-T2-NCR", 3, [[1]], ["BraTS"]),
    "brats2023": (brats2023, "brats", {}, "BraTS-T1-FeTS", 5, [[2], [3], [1]], ["BraTS"]),
    "iseg": (iseg, "iseg", {}, "iSeg-T2-All", 3, [[10], [150], [250]], ["iSeg"]),
    "wmh": (wmh, "wmh", {}, "Amsterdam-GE3T-FLAIR-WMH", 3, [[1]], [*AMSTERDAM, "Singapore", "Utrecht"]),
    "msd": (msd, "msd", {}, "LeftAtrium-MRI-left_atrium", 4, [[1]], ["LeftAtrium"]),
    "datalist": (datalist, "datalist", {}, "dataset-T1_Gd-oedema", 4, [[2]], ["dataset"]),
    "nnunet": (nnunet, "nnunet", {}, "Prostate-ADC-TZ", 3, [[2]], ["Prostate"]),
    "bids": (bids, "bids", {}, "Tromsø-T1CE-All", 3, [[1], [2]], ["Oslo", "Tromsø"]),
    "folders": (folders, "images", {"values": {"a": 1, "b": 2}}, "Dataset005_Prostate-grey-b", 4, [[2]], [FOLDER]),
    "csv": (table, "csv", {"labels": {"lesion": 1}}, "St-Olav-FLAIR-lesion", 4, [[1]], ["St-Olav"]),
}
FOLDERS = ["fets", "brats2020", "brats2023", "iseg", "wmh"]  # recognised by file names only


@pytest.fixture
def make(tmp_path):
    """Make a dataset below a folder with spaces and characters that are not ASCII."""

    def build(name):
        root = tmp_path / "données d'été 数据" / FOLDER
        root.mkdir(parents=True)
        TREES[name][0](root)
        return root

    return build


def read(name, root, *, check=False, **options):
    _, reader, defaults, *_ = TREES.get(name, (None, name, {}))
    out = options.pop("out", root.parent / "collection.json")
    return read_collection(reader, root, out, progress=False, check=check, **{**defaults, **options})


def rows(reading):
    return [f"{issue.subject}|{issue.file}|{issue.problem}|{issue.advice}" for issue in reading.left_out]


def splits_of(reading):
    return [subject.split for subject in reading.collection.subjects]


def refuses(message, name, root, **options):
    with pytest.raises(InputError, match=message) as caught:
        read(name, root, **options)
    assert "\n" not in str(caught.value)
    assert not list(root.parent.glob("*.json")), "nothing is written"


@pytest.mark.parametrize("name", TREES)
class TestEveryReader:
    def test_a_sound_tree(self, make, name):
        root = make(name)
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        reading = read(name, root, check=True)
        _, _, _, task, count, values, institutions = TREES[name]
        collection = reading.collection
        assert (rows(reading), reading.check.issues) == ([], [])
        assert Task(task) in collection.tasks()
        assert (collection.label_values(task), sorted(collection.institutions)) == (values, institutions)
        datalist = [entry for split in ("train", "val", "test") for entry in collection.datalist(task, split)]
        assert len(datalist) == count
        item = LoadImaged(["image", "label"], reader="NibabelReader", ensure_channel_first=True)(datalist[0])
        assert item["image"].shape == item["label"].shape == (1, *SHAPE)
        after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert after == before, "no file is written, copied or changed below the root"
        assert "Noted while reading: 0" in str(reading)

    def test_paths_move_with_the_data_and_are_absolute_elsewhere(self, make, name, tmp_path):
        root = make(name)
        far = read(name, root, out=tmp_path / "out/c.json").collection
        assert all(path.is_relative_to(root) for subject in far.subjects for path in subject.labels.values())
        reading = read(name, root)
        assert str(tmp_path) not in reading.paths[0].read_text(encoding="utf-8")
        assert reading.collection.subjects == far.subjects
        shutil.move(root.parent, tmp_path / "elsewhere")
        moved = load_collection(tmp_path / "elsewhere/collection.json")
        assert all(path.is_file() for subject in moved.subjects for path in subject.images.values())

    def test_wrong_root(self, tmp_path, name):
        for root in (tmp_path / "none", tmp_path):
            refuses(r"root|folder", name, root)

    def test_a_lost_label_is_said(self, make, name):
        root = make(name)
        victim = read(name, root).collection.subjects[-1]
        for path in victim.labels.values():
            path.unlink()
        reading = read(name, root)
        assert victim.id not in [subject.id for subject in reading.collection.subjects]
        assert any(row.startswith(f"{victim.id}|") and "no label" in row for row in rows(reading))
        assert victim.id in str(reading)

    def test_a_lost_image_is_said(self, make, name):
        if name == "bids":  # BIDS does not say which modalities are expected
            return
        root = make(name)
        victim = read(name, root).collection.subjects[0]
        modality, path = next(iter(victim.images.items()))
        path.unlink()
        reading = read(name, root)
        consequence = "kept without it" if len(victim.images) > 1 else "the subject is left out"
        told = f"no image {modality}|{consequence}"
        assert any(row.startswith(f"{victim.id}|") and told in row for row in rows(reading))
        kept = [subject.images for subject in reading.collection.subjects if subject.id == victim.id]
        assert [len(images) for images in kept] == [len(victim.images) - 1] * (len(victim.images) > 1)


@pytest.mark.parametrize("name", FOLDERS)
class TestTreesOfNames:
    @pytest.fixture
    def tree(self, make, name):
        """The root, and the first subject."""
        root = make(name)
        return root, read(name, root).collection.subjects[0]

    def test_upper_case(self, tree, name):
        root, _ = tree
        expected = read(name, root).collection
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".gz", ".nii", ".hdr", ".img", ".csv"):
                path.rename(path.with_name(path.name.upper()))
        reading = read(name, root, check=True)
        assert (rows(reading), reading.check.errors) == ([], [])
        assert reading.collection.tasks() == expected.tasks()
        assert len(reading.collection.subjects) == len(expected.subjects)

    def test_nii_beside_nii_gz(self, tree, name):
        root, victim = tree
        modality, image = next(iter(victim.images.items()))
        stem = image.name.split(".")[0]
        for suffix in (".nii", ".nii.gz"):
            save(image.with_name(stem + suffix))
        reading = read(name, root)
        assert reading.collection.subjects[0].images[modality].name == stem + ".nii.gz"
        assert any(f"{stem}.nii|the subject has this image already|the file is not" in row for row in rows(reading))

    def test_extra_files(self, tree, name):
        root, victim = tree
        folder = next(iter(victim.images.values())).parent.parent
        save(folder / "W39_1998.09.19_Segm.nii", (1, 2))  # the name of a label in BraTS 2020
        save(folder / ".hidden_t1.nii.gz")
        save(folder / ".hidden/t1.nii.gz")
        (folder / "notes.txt").write_text("not an image")
        (row,) = rows(read(name, root))
        assert "W39_1998.09.19_Segm.nii|the name is not one of this dataset's|the file is not used" in row

    def test_a_copy_of_a_subject(self, tree, name):
        root, victim = tree
        first = next(iter(victim.images.values())).relative_to(root).parts[0]
        shutil.copytree(root / first, root / "copy" / first, ignore=shutil.ignore_patterns("*.csv"))
        reading = read(name, root)
        assert sum("has this image already" in row for row in rows(reading)) >= len(victim.images)
        next(iter(reading.collection.subjects[0].images.values())).unlink()
        subject = read(name, root).collection.subjects[0]
        files = [*subject.images.values(), *subject.labels.values()]
        assert len(subject.images) == len(victim.images) - 1
        assert len({path.relative_to(root).parts[0] for path in files}) == 1, "never a mixture of the two"


class TestTumours:
    def test_the_other_partitioning(self, make):
        root = make("fets")
        path = root / f"{FETS}/partitioning_2.csv"
        path.write_text(path.read_text().replace("18,", "18_1,"))
        collection = read("fets", root, institutions=path).collection
        assert collection.institutions == ["1", "18_1"]
        assert collection.modalities == ["T1", "T1CE", "T2", "FLAIR"]
        assert collection.class_names("1-T1-FeTS") == ["ED", "ET", "NCR"]

    def test_fets_has_the_names_until_2022(self, make):
        root = make("brats2023")
        (root / "sites.csv").write_text("subject,institution\nnobody,1\n")
        refuses("no subject found.*found 25 image files", "fets", root, institutions=root / "sites.csv")

    def test_visits_stay_together(self, make):
        first, second, *_ = read("brats2023", make("brats2023")).collection.subjects
        assert first.id[:-4] == second.id[:-4] == first.patient
        assert first.split == second.split


NCR_ED_ET = {"NCR": 1, "ED": 2, "ET": 3}
NETC_SNFH_ET = {"NETC": 1, "SNFH": 2, "ET": 3}
UNTOLD = "hold the values .* whose meaning is ambiguous .*; give --challenge"


@pytest.mark.parametrize(
    ("code", "files", "options", "expected"),
    [
        ("", [(1, 2), (1, 2, 4)], {}, {"NCR": 1, "ED": 2, "ET": 4}),
        ("", [(1, 2, 4), (1, 2, 3)], {}, r"1_seg.nii.gz holds .* \[1, 2, 3\] \(1 of 2 .*, but .* 4 ET; .* --labels"),
        ("", [(1, 2, 3)], {"labels": NCR_ED_ET}, NCR_ED_ET),
        ("GLI", [(1, 2), (1, 2, 3)], {}, NCR_ED_ET),
        ("GLI", [(1, 2, 3), (1, 2, 4), (1, 2, 3, 4)], {}, NETC_SNFH_ET | {"RC": 4}),
        ("GLI", [(1, 2, 4)], {}, UNTOLD),  # ET as until 2022, or a cavity
        ("GLI", [(1, 2, 3), (1, 2, 4)], {}, UNTOLD),
        ("GLI", [(1, 2, 4)], {"challenge": "GLI-2017"}, {"NCR": 1, "ED": 2, "ET": 4}),
        ("GLI", [(1, 2, 4)], {"challenge": "GLI-2024"}, NETC_SNFH_ET | {"RC": 4}),
        ("GLI", [(1, 2, 3)], {"challenge": "PED-2024"}, "challenge of files with these names 'PED-2024' is unknown"),
        ("SSA", [(1, 2, 3)], {}, NCR_ED_ET),
        ("MEN", [(1, 2, 3)], {}, NETC_SNFH_ET),
        ("MEN", [(1, 2, 3), (1, 2, 3, 4)], {}, r"holds the values \[1, 2, 3, 4\] .*, but expected .* MEN-2023"),
        ("MET", [(1, 2, 3)], {}, NETC_SNFH_ET),
        ("MET", [(1, 2, 3), (1, 4)], {}, NETC_SNFH_ET | {"RC": 4}),
        ("PED", [(1, 2, 3), (1, 2, 3, 4)], {}, {"ET": 1, "NET": 2, "CC": 3, "ED": 4}),
        ("PED", [(1, 2), (1, 2, 3)], {}, "PED-2023: 1 NC, 2 ED, 3 ET; PED-2024: 1 ET, 2 NET, 3 CC, 4 ED"),
        ("PED", [(1, 2, 3)], {"challenge": "PED-2023"}, {"NC": 1, "ED": 2, "ET": 3}),
        ("PED", [(1, 2, 3)], {"challenge": "PED-2024"}, {"ET": 1, "NET": 2, "CC": 3, "ED": 4}),
        ("GoAT", [(1, 2, 3)], {}, UNTOLD),
        ("GoAT", [(1, 2, 3)], {"challenge": "GLI-2023"}, NCR_ED_ET),
        ("GoAT", [(1, 7)], {"labels": {"core": 1, "rest": 7}}, {"core": 1, "rest": 7}),
        ("GoAT", [(1, 7)], {"labels": {"core": 1}}, r"holds the values \[1, 7\]"),
    ],
)
def test_names_and_all_label_files_say_whose_labels_they_are(tmp_path, code, files, options, expected):
    root = tmp_path / "tree"
    for number, values in enumerate(files):
        name, how = (f"BraTS-{code}-{number:05d}-000", ("-", NEW)) if code else (f"BraTS2021_{number:05d}", ("_", OLD))
        tumours(root, [name], *how, values=values)
    if isinstance(expected, str):
        return refuses(expected, "brats", root, **options)
    reading = read("brats", root, check=True, **options)
    assert reading.collection.labels == {"tumour": expected}
    assert not [issue for issue in reading.check.errors if "undeclared" in issue.problem]
    together = "FeTS" if set(expected) == set(NCR_ED_ET) else "All"
    assert reading.collection.label_values(f"BraTS-T1CE-{together}") == [[expected[key]] for key in sorted(expected)]


class TestInfants:
    @pytest.mark.parametrize("lost", [".hdr", ".img"])
    def test_half_an_analyze_pair(self, make, lost):
        root = make("iseg")
        (root / f"iSeg-2019-Training/subject-2-T1{lost}").unlink()
        first, second = rows(read("iseg", root))
        assert f"no {lost} beside it|the file is not used" in first
        assert "no image T1|kept without it" in second

    def test_a_last_axis_of_length_one(self, make):
        """The challenge stores images as 144 x 192 x 256 x 1."""
        root = make("iseg")
        for path in root.rglob("*.img"):
            save(path, (10, 150, 250) if "label" in path.name else None, shape=(*SHAPE, 1))
        reading = read("iseg", root, check=True)
        load = LoadImaged("image", reader="NibabelReader", ensure_channel_first=True)
        assert load(reading.collection.datalist("iSeg-T1-WM", "train")[0])["image"].shape == (1, *SHAPE)
        assert reading.check.issues == []

    def test_institutions_of_ones_own(self, make):
        root = make("iseg")
        path = root / "sites.csv"
        path.write_text("subject,institution\nSUBJECT-1,I1\nsubject-2,I2\nsubject-3,I2\n")
        assert read("iseg", root, institutions=path).collection.institutions == ["I1", "I2"]


class TestWMH:
    TEST = frozenset({"Utrecht-1", "Singapore-60", "Amsterdam-GE3T-120", "Amsterdam-Philips_VU_.PETMR_01.-161"})

    def test_splits_and_labels(self, make):
        collection = read("wmh", make("wmh")).collection
        assert {subject.id for subject in collection.subjects if subject.split == "test"} == self.TEST
        assert {subject.split for subject in collection.subjects} == {"train", "val", "test"}
        assert collection.labels["wmh"] == {"WMH": 1, "Other": 2}

    def test_folds_that_keep_the_test_set(self, make):
        reading = read("wmh", make("wmh"), folds=2, keep_test=True, seed=1)
        assert [path.name for path in reading.paths] == ["collection_fold0.json", "collection_fold1.json"]
        splits = [{s.id: s.split for s in load_collection(path).subjects} for path in reading.paths]
        assert all({name for name, split in found.items() if split == "test"} == self.TEST for found in splits)
        chosen_on = sorted(name for found in splits for name, split in found.items() if split == "val")
        assert chosen_on == sorted(set(splits[0]) - self.TEST)

    @pytest.mark.parametrize("at_the_top", [False, True])
    def test_the_training_set_alone_and_the_scanners_of_amsterdam_at_the_top(self, make, at_the_top):
        folder = make("wmh") / "training"
        if at_the_top:
            (folder / "Amsterdam/GE3T").rename(folder / "GE3T")
            (folder / "Amsterdam").rmdir()
        assert read("wmh", folder).collection.institutions == ["Amsterdam-GE3T", "Singapore", "Utrecht"]


class TestLists:
    def test_sections_are_splits(self, make):
        reading = read("datalist", make("datalist"))
        assert splits_of(reading) == ["train", "train", "val", "test"]
        assert reading.collection.subjects[0].id == "case0_flair"

    def test_an_entry_names_itself(self, make):
        root = make("datalist")
        first, second = json.loads((root / "dataset.json").read_text())["training"]
        names = {"subject": 0, "institution": "Oslo", "patient": 7}
        edit(root / "dataset.json", training=[first | names, second | {"subject": None, "institution": ""}])
        one, two, *_ = read("datalist", root).collection.subjects
        assert (one.id, one.institution, one.patient) == ("0", "Oslo", "7")
        assert (two.id, two.institution, two.patient) == ("case1_flair", "dataset", None)

    def test_what_a_list_leaves_out_can_be_given(self, make):
        root = make("msd")
        edit(root / "dataset.json", modality=None, labels=None)
        path = (root / "dataset.json").rename(root / "list.json")
        reading = read("msd", root, labels={"LA": 1}, modalities=["T1"], file=path)
        assert "LeftAtrium-T1-LA" in map(str, reading.collection.tasks())

    def test_channels_of_one_file(self, make):
        """Brain tumours of the Decathlon are 4D, with the channels along the last axis."""
        root = make("msd")
        saved("imagesTr/*", shape=(*SHAPE, 3))(root)
        edit(root / "dataset.json", modality={"1": "T1w", "0": "FLAIR", "2": "T2w"})
        collection = read("msd", root).collection
        assert collection.modalities == ["FLAIR", "T1w", "T2w"]
        (item, *_) = collection.datalist("LeftAtrium-T2w+FLAIR-left_atrium", "train")
        whole = nibabel.load(item["image"][0].partition("#")[0]).get_fdata()
        np.testing.assert_array_equal(read_channels(item["image"])[0], np.moveaxis(whole, -1, 0)[[2, 0]])


class TestNnUNet:
    def test_a_case_that_ends_like_a_channel(self, make):
        collection = read("nnunet", make("nnunet")).collection
        assert [subject.id for subject in collection.subjects] == ["prostate_0001", "prostate_02", "prostate_04"]
        assert collection.modalities == ["T2", "ADC"]

    def test_regions_and_ignore(self, make):
        root = make("nnunet")
        edit(root / "dataset.json", labels={"background": 0, "whole": [1, 2], "TZ": 2, "ignore": 3})
        reading = read("nnunet", root, check=True)
        assert reading.collection.label_values("Prostate-T2-whole") == [[1, 2]]
        assert reading.collection.label_values("Prostate-T2-TZ") == [[2]]
        assert list(reading.collection.objectives) == ["whole", "TZ"]
        assert reading.collection.labels["label"]["ignore"] == 3
        assert reading.check.errors == []
        assert any("value 3 is 'ignore'" in row for row in rows(reading))

    @pytest.mark.parametrize("ending", [".png", ".PNG", ".bmp", ".tif", ".nrrd"])
    def test_every_format_that_is_read(self, tmp_path, ending):
        """The reader accepts every format; the data check says if one cannot be read."""
        root = tmp_path / "Dataset007_Skin"
        for name in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a", "imagesTs/b_0000", "imagesTs/b_0001"):
            picture(root / f"{name}.png", *([1] if "labels" in name else []))
            (root / f"{name}.png").rename(root / f"{name}{ending}")
        save(root / "imagesTr/a_0000.nii.gz")  # not the format of the dataset
        labels = {"background": 0, "lesion": 1}
        write(root / "dataset.json", {"channel_names": {"0": "A", "1": "B"}, "labels": labels, "file_ending": ending})
        reading = read("nnunet", root, split=[1, 0, 0])
        assert rows(reading) == ["b||no label label|the subject is left out"]
        (subject,) = reading.collection.subjects
        names = {key: path.name for key, path in subject.images.items()}
        assert names == {"A": f"a_0000{ending}", "B": f"a_0001{ending}"}

    def test_one_colour_picture_a_case(self, tmp_path):
        for case in "abc":
            picture(tmp_path / f"imagesTr/{case}_0000.png", colour=True)
            picture(tmp_path / f"labelsTr/{case}.png", 1)
        names = {"0": "R", "1": "G", "2": "B"}
        write(tmp_path / "dataset.json", {"channel_names": names, "labels": {"road": 1}, "file_ending": ".png"})
        reading = read("nnunet", tmp_path, out=tmp_path / "c.json")
        assert rows(reading) == []
        assert [[*subject.images] for subject in reading.collection.subjects] == [["R+G+B"]] * 3

    def test_version_one(self, make):
        root = make("nnunet")
        labels = {"0": "background", "1": "PZ", "2": "TZ"}
        edit(root / "dataset.json", labels=labels, channel_names=None, modality={"0": "T2", "1": "ADC"})
        assert list(read("nnunet", root).collection.objectives) == ["PZ", "TZ", "All"]

    def test_a_test_set_with_labels(self, make):
        root = make("nnunet")
        for name in ("08_0000", "08_0001", "09_0000", "09_0001"):
            save(root / f"imagesTs/prostate_{name}.nii.gz")
        save(root / "labelsTs/prostate_08.nii.gz", (1, 2))
        reading = read("nnunet", root)
        assert [s.id for s in reading.collection.subjects if s.split == "test"] == ["prostate_08"]
        assert rows(reading) == ["prostate_09||no label label|the subject is left out"]


class TestBids:
    def test_labels_sessions_and_spaces(self, make):
        root = make("bids")
        anat = root / "derivatives/seg/sub-01/ses-2/anat"
        for name, values in (("T1w", None), ("label-lesion_mask", (1,))):
            save(anat / f"sub-01_ses-2_space-MNI_{name}.nii.gz", values)
        save(root / "sub-01/anat/sub-01_run-2_T1w.nii.gz")
        save(root / "derivatives/seg/sub-02/anat/sub-02_T1w.nii.gz")
        reading = read("bids", root)
        collection = reading.collection
        assert collection.labels == {"lesion": {"lesion": 1}, "tissue": {"GM": 1, "WM": 2}}
        assert sorted(collection.objectives) == ["All", "GM", "WM", "lesion"]
        splits = {subject.id: subject.split for subject in collection.subjects}
        assert splits["sub-01"] == splits["sub-01_ses-2_space-MNI"], "a patient stays in one split"
        image = next(subject.images["T1"] for subject in collection.subjects if subject.id == "sub-02")
        assert "derivatives" in image.parts, "the image of the label's own dataset"
        first, second = rows(reading)
        assert first.startswith("sub-01|sub-01/anat/sub-01")
        assert second.startswith("sub-02|sub-02/anat/sub-02_T1w.nii.gz|the subject has this image already")

    @pytest.mark.parametrize("name", ["label-lesion_roi", "desc-lesion_mask", "T1w_label-lesion_mask"])
    def test_a_label_beside_its_image(self, make, name):
        root = make("bids")
        shutil.rmtree(root / "derivatives")
        for number in range(1, 7):
            save(root / f"sub-{number:02d}/anat/sub-{number:02d}_{name}.nii.gz", (1,))
        reading = read("bids", root, check=True)
        assert (rows(reading), reading.check.issues) == ([], [])
        assert reading.collection.labels == {"lesion": {"lesion": 1}}
        assert reading.collection.label_values("Oslo-FLAIR-lesion") == [[1]]


class TestImages:
    """All files together tell which image a mask belongs to and what its values mean; otherwise the user is asked."""

    @pytest.fixture
    def make(self, tmp_path):
        """Save pictures with these names and mask values; ``{}`` is replaced by each of six numbers."""

        def build(images="{}.png", masks="{}_mask.png", values=(255,), colour=False, folders=("images", "labels")):
            root = tmp_path / "Eyes"
            for number in (1, 2, 3, 11, 12, 21):
                picture(root / folders[0] / images.format(number), colour=colour)
                if masks:
                    picture(root / folders[1] / masks.format(number), *values)
            return root

        return build

    @staticmethod
    def pairs(reading):
        """The names of each subject's files."""
        subjects = reading.collection.subjects
        return {s.id: [path.name for path in (*s.images.values(), *s.labels.values())] for s in subjects}

    @pytest.mark.parametrize(
        ("images", "masks", "learnt"),
        [
            ("{}.png", "{}.png", "names: NAME with mask NAME"),
            ("Image_{}L.bmp", "image_{}l_1stHO.png", "names: NAME with mask NAME_1stho"),
            ("{}_training.tif", "{}_manual1.png", "names: NAME_training with mask NAME_manual1"),
            ("image{}.png", "mask{}.tif", "names: imageNAME with mask maskNAME"),
            ("p_{}.png", "p_label_{}.png", "names: p_NAME with mask p_label_NAME"),
            ("benign ({}).png", "benign ({})_mask.png", "names: NAME with mask NAME_mask"),
            ("{}/image.png", "{}/mask.png", "folders"),
        ],
    )
    def test_what_names_of_pairs_have_besides_is_learnt(self, make, images, masks, learnt):
        root = make(images, masks)
        reading = read("images", root)
        assert rows(reading) == []
        assert f"Paired by {learnt}, 6 of them" in str(reading)
        found = {str(s.images["grey"]): str(s.labels["mask"]) for s in reading.collection.subjects}
        assert found == {
            str(root / "images" / images.format(number)): str(root / "labels" / masks.format(number))
            for number in (1, 2, 3, 11, 12, 21)
        }

    def test_folders_tell_where_names_repeat(self, make):
        root = make("a/{}.png", "a/{}_mask.png")
        make("b/{}.png", "b/{}_mask.png")
        subjects = read("images", root).collection.subjects
        assert {s.id[0] + s.labels["mask"].parent.name for s in subjects} == {"aa", "bb"}
        assert len(subjects) == 12

    def test_what_has_no_partner_is_said(self, make):
        root = make()
        (root / "labels/3_mask.png").unlink()
        (root / "images/11.png").unlink()
        picture(root / "labels/overview.png", 1)
        reading = read("images", root)
        left_out = "the subject is left out"
        told = {"3": "no label mask", "11": "no image grey", "overview": "no image grey"}
        assert {*rows(reading)} == {f"{name}||{what}|{left_out}" for name, what in told.items()}
        assert [*self.pairs(reading)] == ["1", "12", "2", "21"]

    def test_images_and_masks_in_one_folder(self, make):
        root = make(folders=("all", "all"))
        picture(root / "all/7.png")
        picture(root / "all/8_mask.png", 255)
        reading = read("images", root, images="all", labels="all")
        assert self.pairs(reading)["11"] == ["11.png", "11_mask.png"]
        assert [row[:18] for row in rows(reading)] == ["7||no label mask|t", "8||no image grey|t"]
        assert self.pairs(read("images", root, images="all", labels="all/*_mask.png")) == self.pairs(reading)

    @pytest.mark.parametrize(("first", "second"), [("{}_T1.png", "{}_ce-T1.png"), ("{}_0000.png", "{}_0001.png")])
    def test_several_files_a_patient(self, make, first, second):
        root = make(first, "{}_seg.png", folders=("all", "all"))
        make(second, None, folders=("all", "all"))
        (root / "all" / second.format(12)).unlink()
        picture(root / "all/note_5.png")
        reading = read("images", root, images="all", labels="all", modalities=["T1", "ce-T1"], values={"V": 255})
        assert self.pairs(reading)["11"] == [first.format(11), second.format(11), "11_seg.png"]
        assert reading.collection.modalities == ["T1", "ce_T1"]
        assert "12||no image ce_T1|kept without it" in rows(reading)
        assert "note_5||no label mask|the subject is left out" not in rows(reading)
        assert "note_5||no image T1|the subject is left out" in rows(reading)

    def test_colour_pictures_have_three_channels(self, make):
        reading = read("images", make(colour=True))
        assert reading.collection.modalities == ["R", "G", "B"]
        (item, *_) = reading.collection.datalist("Eyes-B+R-foreground", "train")
        pixels = np.asarray(Image.open(item["image"][0].partition("#")[0]))
        np.testing.assert_array_equal(read_channels(item["image"])[0][..., 0], pixels.T[[2, 0]])

    def test_channels_that_only_you_know(self, make):
        reading = read("images", make(colour=True), modalities=["actin", "nuclei", "none"], institution="St-Olav")
        assert [*reading.collection.subjects[0].images] == ["actin+nuclei+none"]
        assert reading.collection.institutions == ["St-Olav"]

    def test_visits_of_a_patient(self, make):
        root = make()
        table = pd.DataFrame({"subject": ["1", "2", "3", "11"], "institution": "A", "patient": "p"})
        table.to_csv(root / "sites.csv", index=False)
        reading = read("images", root, institutions=root / "sites.csv")
        assert {subject.patient for subject in reading.collection.subjects} == {"p"}
        assert {*splits_of(reading)} == {"train"}

    @pytest.mark.parametrize(
        ("values", "given", "expected"),
        [
            ((255,), None, {"foreground": 255}),
            ((1,), {"left atrium": 1}, {"left_atrium": 1}),
            ((255, 128), {"a": 128, "b": 255}, {"a": 128, "b": 255}),
            (((0, 9, 0),), None, {"foreground": [0, 9, 0]}),
            (((255, 0, 0), (0, 9, 0)), {"a": [0, 9, 0], "b": [255, 0, 0]}, {"a": [0, 9, 0], "b": [255, 0, 0]}),
        ],
    )
    def test_what_values_mean(self, make, values, given, expected):
        reading = read("images", make(values=values), values=given)
        collection = reading.collection
        assert json.loads(reading.paths[0].read_text())["labels"] == {"mask": expected}
        assert [*collection.objectives] == [*expected] + ["All"] * (len(expected) > 1)
        assert ("is called foreground" in str(reading)) == (given is None)
        assert f"A task to ask it: Eyes-grey-{next(iter(expected))} (" in str(reading)
        (item, *_) = collection.datalist(f"Eyes-grey-{[*collection.objectives][-1]}", "train")
        declared = {*collection.labels["mask"].values()}
        assert {*np.unique(read_channels([item["label"]])[0])} == {0, *declared}

    def test_one_file_has_another_value(self, make):
        root = make()
        picture(root / "labels/12_mask.png", 255, 7)
        refuses("the masks hold the values 7, 255 besides 0; .*: --values NAME=7 NAME=255", "images", root)

    @pytest.mark.parametrize(
        ("tree", "more", "options", "message"),
        [
            ({"masks": "{}_gt.jpg"}, {}, {}, "_gt.jpg is a JPEG, which changes the values"),
            ({"values": ((255, 0, 0), (0, 9, 0))}, {}, {}, "--values NAME=0,9,0 NAME=255,0,0"),
            (
                {"values": range(1, 30)},
                {},
                {},
                "29 values besides 0 .1, 2, 3, ....: were they smoothed, or are objects numbered",
            ),
            ({"values": [0]}, {}, {}, "no mask holds a value besides 0"),
            ({}, {"labels/3_mask.png": [(0, 9, 0)]}, {}, "3_mask.png is a mask in colours, but .* numbers"),
            ({}, {"labels/3_mask_1.png": [255]}, {}, r"3_mask and with 3_mask_1; .* 'DIR/\*_mask.\*'"),
            ({}, {"images/3.bmp": []}, {}, "3.bmp and .*3.png have one name"),
            ({"colour": True}, {}, {"modalities": ["fundus"]}, "png has 3 channels; name them with --modalities"),
            ({}, {}, {"labels": "none"}, "none is not a folder"),
            ({}, {}, {"labels": "labels/*.tif"}, "no mask .* in folder"),
            ({"masks": None}, {}, {"labels": "images"}, "no mask in images, .* is named like another file there"),
        ],
    )
    def test_is_asked_in_one_line(self, make, tree, more, options, message):
        root = make(**tree)
        for name, values in more.items():
            picture(root / name, *values)
        refuses(message, "images", root, **options)

    def test_two_readers_of_every_image(self, make):
        root = make("{}.png", "{}_1stHO.png")
        make("{}.png", "{}_2ndHO.png")
        refuses("could go with 1_1stHO and with 1_2ndHO .and 5 more like this", "images", root)
        reading = read("images", root, labels="labels/*_2ndHO.*")
        assert self.pairs(reading)["1"] == ["1.png", "1_2ndHO.png"]

    def test_command_line(self, make, monkeypatch, capsys):
        monkeypatch.chdir(make(values=((255, 0, 0),), folders=("scans", "masks")))
        words = ["read", "images", "--images", "scans", "--labels", "masks", "--out", "c.json", "--no-check"]
        assert main(words) == 0
        assert "called foreground" in capsys.readouterr().out
        assert main([*words[:5], "masks/1_mask.png", *words[5:]]) == 2
        assert "one pattern in quotes" in capsys.readouterr().err
        assert main([*words, "--values", "vessel=255,0,0", "--institution", "CHASE"]) == 0
        collection = load_collection("c.json")
        assert (str(collection.tasks()[0]), collection.labels) == ("CHASE-grey-vessel", {"mask": {"vessel": 0xFF0000}})


@pytest.mark.parametrize(
    ("images", "masks", "pairs", "alone"),
    [
        ("p1 p2", "p1 p2 p1_2", "p1:p1 p2:p2", "p1_2"),  # the mask of a lost image
        ("p1 p2 p3", "p1_m p2_m p3_old", "p1:p1_m p2:p2_m", "p3_old"),  # one pair teaches nothing
        ("p1", "p1_m", "p1:p1_m", ""),  # except if it is the only pair
        ("p1 p2 p3 p4", "p1 p2 p3_m p4_m", "p1:p1 p2:p2 p3:p3_m p4:p4_m", ""),
        ("p1 p2 p3 p4 p5", "p1_m p2_m p3_m p4_s p5_s", "p1:p1_m p2:p2_m p3:p3_m p4:p4_s p5:p5_s", ""),
        ("p1 p2 p1_2", "p1_m p2_m p2_2_m", "p1:p1_m p2:p2_m", "p2_2"),
        ("p1 p1_m p2 p2_m p3_m p4_m p3_m_x p4_m_x", None, "p1:p1_m p2:p2_m", "p3 p4"),
        ("p1 p2", "p1 p2 p1_b p2_b", "p1 could go with p1 and with p1_b .and 1 more", None),
        ("p1 p2 p1_2", "p1_m p2_m p1_2_m p1_2_b", "p1_2 could go with p1_2_m and with p1_2_b; .* 'DIR/._m", None),
    ],
)
def test_names_that_pair(images, masks, pairs, alone):
    images = [Name.of(text) for text in images.split()]
    masks, together = ([Name.of(text) for text in masks.split()], False) if masks else (images, True)
    if alone is None:
        with pytest.raises(InputError, match=pairs):
            learn_pairs(images, masks)
        return
    found = learn_pairs(images, masks, together=together)
    assert sorted(f"{image.text}:{mask.text}" for mask, image in found.images.items()) == pairs.split()
    assert sorted(name.text for name in found.alone.values()) == alone.split()


def test_splits_and_patients_of_a_table(make):
    root = make("csv")
    tabled(lambda frame: frame.assign(Patient=list("aabbccdd")))(root)
    assert splits_of(read("csv", root)) == ["train", "train", "val", "test"]
    frame = pd.read_csv(root / "liste.csv").drop(columns="Split").assign(Patient="one")
    frame.to_csv(root / "old.csv", index=False, encoding="utf-8-sig", sep="\t")
    with pytest.raises(InputError, match="2 CSV files"):
        read("csv", root)
    reading = read("csv", root, file=root / "old.csv")
    assert (reading.collection.name, set(splits_of(reading))) == ("old", {"train"})


def with_cell(row, column, value):
    return tabled(lambda frame: frame.assign(**{column: frame[column].where(~frame.index.isin(row), value)}))


def other_subjects(root):
    tumours(root / FETS, ["FeTS2022_00099"])
    shutil.rmtree(root / FETS / "FeTS2022_00000")


def uneven(root):
    first, second = json.loads((root / "dataset.json").read_text())["training"]
    edit(root / "dataset.json", training=[first | {"fold": 0}, second | {"image": second["image"][:1]}])


def unlabelled(root):
    save(root / "imagesTs/la_001.nii.gz")
    edit(root / "dataset.json", test=["./imagesTs/la_001.nii.gz"])


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fets", other_subjects, "FeTS2022_00000||listed in partitioning_1.csv, but has no files|LEFT_OUT"),
        ("fets", other_subjects, "FeTS2022_00099||has no institution|LEFT_OUT"),
        ("msd", unlabelled, "la_001||no label label|LEFT_OUT"),
        ("datalist", uneven, "case1_flair||1 images for 2 modalities|LEFT_OUT"),
        ("datalist", uneven, "|dataset.json|the list's own folds are not used|draw splits or folds"),
        ("nnunet", saved(SEVENTH), f"prostate_02|{SEVENTH}|the channel is not in dataset.json|the file is not used"),
        ("csv", with_cell([1], "Modality", "T1"), "p0|liste.csv|two images of T1|LEFT_OUT"),
        ("csv", with_cell([0, 1], "Modality", "T1-w"), "p0|liste.csv|two images of T1_w|LEFT_OUT"),
        ("csv", with_cell([2, 3], "Institution", ""), "p1||has no institution|LEFT_OUT"),
        ("csv", with_cell([2, 3], "Subject", ""), "|liste.csv|rows that name no subject|LEFT_OUT"),
    ],
)
def test_what_is_left_out_is_said(make, name, change, expected):
    root = make(name)
    change(root)
    noted = rows(read(name, root))
    assert expected.replace("LEFT_OUT", "the subject is left out") in noted
    assert len(noted) == (2 if change in (other_subjects, uneven) else 1)


def pediatric(root):
    tumours(root, ["BraTS-PED-00001-000"], "-", NEW, (1, 2, 3))


def other_meaning(root):
    folder = root / "derivatives/seg/sub-02/anat"
    (folder / "sub-02_desc-tissue_dseg.tsv").write_text("index\tname\n1\tCSF\n")


PARTITIONING = f"{FETS}/partitioning_1.csv"
TWICE = "Partition_ID,Subject_ID\n1,FeTS2022_00000\n2,FETS2022_00000\n"
CASE = "training must hold the paths of 'image' and 'label' files"


@pytest.mark.parametrize(
    ("name", "change", "options", "message"),
    [
        ("fets", lost("partitioning_1.csv"), {}, "0 files partitioning_1.csv"),
        ("fets", rewritten(PARTITIONING, "Institution,Name\n1,a\n"), {}, "has no column 'subject'"),
        ("fets", rewritten(PARTITIONING, TWICE), {}, "for two institutions"),
        ("fets", lost("*seg*"), {}, "no subject found.*FeTS2022_00000: no label tumour"),
        ("brats2023", lost("*seg*"), {}, r"expected SUBJECT/SUBJECT_\{t1,.*found 20 image files"),
        ("brats2023", brats2021, {}, "mixes the names of BraTS until 2022 .*read one of the two at a time"),
        ("brats2023", pediatric, {}, "mixes files of GLI and PED"),
        ("bids", other_meaning, {}, "values of label 'tissue' are {'CSF': 1}, but elsewhere {'GM': 1, 'WM': 2}"),
        ("msd", listed(labels=None), {}, "names no labels"),
        ("msd", listed(modality=None), {"labels": {"LA": 1}}, "every modality its own name"),
        ("msd", listed(training=[{"image": "a.nii.gz", "label": 3}]), {}, CASE),
        ("msd", listed(training=[{"image": [1]}]), {}, CASE),
        ("msd", listed(training=[{"image": []}]), {}, CASE),
        ("msd", listed(training=[{"label": "b"}]), {}, CASE),
        ("msd", listed(training=[1]), {}, CASE),
        ("msd", rewritten("dataset.json", "{"), {}, "dataset.json is not valid JSON"),
        ("msd", rewritten("dataset.json", "[]"), {}, "dataset.json must hold an object"),
        ("msd", listed(labels={"a": "b"}), {}, "dataset.json: labels must map names to whole numbers"),
        ("nnunet", listed(file_ending=".gif"), {}, "file_ending is '.gif'; expected one of .nii, .* convert"),
        ("nnunet", listed(channel_names={}), {}, "every modality its own name"),
        ("bids", lost("*.tsv"), {}, "no dseg.tsv names the values"),
        ("csv", tabled(lambda frame: frame.drop(columns="Image")), {}, "no column 'image'"),
        ("csv", with_cell([0], "Split", "val"), {}, "subject 'p0' has several values of split"),
        ("csv", with_cell([6, 7], "Split", ""), {}, "have no 'split'"),
        ("csv", with_cell([6, 7], "Split", "valid"), {}, "split must be 'train', 'val' or 'test'; found 'valid'"),
        ("csv", tabled(lambda frame: frame.assign(Patient="one")), {}, "patient 'one' .* in splits 'train' and 'val'"),
        ("csv", rewritten("liste.csv", "subject,site\na,b,\n"), {}, "more fields than its header"),
        ("csv", rewritten("liste.csv", ""), {}, "cannot be read as a table"),
        ("csv", lost("*.csv"), {}, "0 CSV files"),
        ("csv", lost("none"), {"labels": None}, "give --labels"),
        ("csv", lost("none"), {"labels": {"left atrium": 1, "left-atrium": 2}}, "one name two values"),
        ("csv", lost("none"), {"labels": {"background": 1, "lesion": 2}}, "or give background a value other than 0"),
        ("csv", lost("none"), {"labels": {"lesion": 1.7}}, "labels must map names to whole numbers"),
        ("iseg", lost("none"), {"labels": {"WM": 3}}, "option of reader 'iseg' 'labels' is unknown"),
        ("fest", lost("none"), {}, "reader 'fest' is unknown; did you mean 'fets'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, make, name, change, options, message):
    root = make(name) if name in TREES else tmp_path
    change(root)
    refuses(message, name, root, **options)


class TestMedMNIST:
    """One file of arrays: the JSON file says where it is and how its classes are called."""

    @pytest.fixture
    def folder(self, tmp_path):
        np.savez(tmp_path / "lung mnist.npz", **mnist_arrays(counts=(4, 4, 4)))
        return tmp_path

    def test_is_read_as_it_is(self, folder, capsys):
        out, csv = folder / "lungs.json", folder / "counts.csv"
        words = ["read", "medmnist", "--root", str(folder), "--out", str(out), "--csv", str(csv)]
        for _ in range(2):  # its own file may be replaced
            assert main([*words, "--labels", "healthy=0", "ill=1"]) == 0
        assert "12 grey images of 28 x 28" in capsys.readouterr().out
        dataset = load_classification(out)
        assert dataset.class_names == ("healthy", "ill")
        assert dataset.counts("val") == [2, 2]
        assert json.loads(out.read_text())["medmnist"] == "lung mnist.npz"
        assert pd.read_csv(csv).val.tolist() == [2, 2]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"file": "other.npz"}, "other.npz does not exist"),
            ({"labels": {"ill": 2}, "file": "lung mnist.npz"}, "--labels gives ill the number 2"),
            ({"folds": 3}, "folds"),
            ({"out": "lung mnist.npz"}, "is not a description of a MedMNIST file, so it is not replaced"),
            ({}, "should hold one .npz file; found lung mnist.npz, second.npz"),
        ],
    )
    def test_refuses(self, folder, options, message):
        (folder / ("sub" if "out" in options else "second.npz")).write_bytes(b"")
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(InputError, match=message):
            read_collection("medmnist", folder, folder / options.pop("out", "out.json"), **options)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize(
        ("names", "file", "message"),
        [
            (["a", "b"], None, "describes no MedMNIST file"),
            (["a", "b"], "none.npz", "none.npz does not exist"),
            (["a"], "lung mnist.npz", "names 1 classes"),
        ],
    )
    def test_a_wrong_description_is_refused(self, folder, names, file, message):
        write(folder / "bad.json", {"name": "x", "medmnist": file, "class_names": names})
        with pytest.raises(InputError, match=message):
            load_classification(folder / "bad.json")


class TestCommandLine:
    @pytest.fixture
    def words(self, make):
        """The words of a command that reads a dataset."""

        def build(name, *more):
            root = make(name)
            return root, ["read", TREES[name][1], "--root", str(root), "--out", str(root.parent / "c.json"), *more]

        return build

    def test_read(self, words, capsys):
        root, command = words("fets", "--seed", "3")
        (root / f"{FETS}/FeTS2022_00001/FeTS2022_00001_t2.nii.gz").unlink()
        assert main([*command, "--csv", str(root.parent / "issues.csv")]) == 0
        printed = capsys.readouterr().out
        for line in ("6 subjects", "no image T2; kept without it: FeTS2022_00001", "errors: 0"):
            assert line in printed
        assert pd.read_csv(root.parent / "issues.csv").subject.tolist() == ["FeTS2022_00001"]
        assert json.loads((root.parent / "c.json").read_text())["drawn"] == {"fractions": [0.5, 0.25, 0.25], "seed": 3}

    def test_options(self, words, capsys):
        root, command = words("csv", "--labels", "lesion=1", "--no-check", "--split", "0.5", "0.5", "0")
        assert main(command) == 0
        assert "were not checked" in capsys.readouterr().out
        assert {subject.split for subject in load_collection(root.parent / "c.json").subjects} == {"train", "val"}
        for words_of_labels, message in (
            ("lesion", "not of the form NAME=VALUE"),
            ("a=1 a=2", "a is given two values"),
        ):
            assert main([*command, "--labels", *words_of_labels.split()]) == 2
            assert message in capsys.readouterr().err
        assert main(["read", "csv", "--out", str(root.parent / "d.json")]) == 2
        assert "give the folder of the dataset with --root" in capsys.readouterr().err

    def test_the_challenge(self, words, capsys):
        _, command = words("brats2023", "--no-check", "--challenge", "GLI-2024")
        assert main(command) == 0
        assert "objectives ET, NETC, RC, SNFH, All" in capsys.readouterr().out

    def test_a_report_replaces_nothing_but_a_report(self, words, capsys):
        root, command = words("csv", "--labels", "lesion=1", "--csv")
        before = (root / "liste.csv").read_bytes()
        assert main([*command, str(root / "liste.csv")]) == 2
        assert "is not a report of issues" in capsys.readouterr().err
        assert (root / "liste.csv").read_bytes() == before
        assert main([*command, str(root.parent / "c.json")]) == 2
        assert not (root.parent / "c.json").exists()
        assert [main([*command, str(root.parent / "report.csv")]) for _ in range(2)] == [0, 0]

    def test_errors_in_files_are_1_and_what_cannot_be_read_or_written_is_2_and_one_line(self, words, capsys):
        root, command = words("iseg")
        save(root / "iSeg-2019-Training/subject-1-label.img", (10, 99))
        assert main(command) == 1
        assert "undeclared values 99" in capsys.readouterr().out
        out = root.parent / "d.json"
        for change, message in ((["wmh"], "no subject found"), (["iseg", "--out", str(root.parent / "c.json/d")], "")):
            assert main(["read", *change[:1], *command[2:4], "--out", str(out), *change[1:]]) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith(f"Error: {message}")
            assert "\n" not in error
        assert not out.exists()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_written_with_its_card_and_what_to_do_next(tmp_path, capsys, name):
    assert main(["sample", name, "--out", str(tmp_path / name)]) == 0
    printed = capsys.readouterr().out
    for told in ("collection.json", "License CC BY", "README.md", "Next: python -m medtl_ext.data check"):
        assert told in printed
    collection = load_collection(tmp_path / name / "collection.json")
    assert collection.license in (tmp_path / name / "README.md").read_text()
    assert {subject.split for subject in collection.subjects} == {"train", "val", "test"}
    assert main(["sample", name, "--out", str(tmp_path / name)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
