"""The integrity check finds every kind of damage, says what to do, and stays silent on sound data."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pandas as pd
import pytest

from medtl_ext import InputError
from medtl_ext.data import check_collection, load_collection, write_collection
from medtl_ext.data.__main__ import main

SHAPE = (12, 10, 6)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-2.0, 2, 4, 1]) if affine is None else affine), path)


def image(seed):
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def label():
    values = np.zeros(SHAPE, dtype=np.uint8)
    values[3:6, 3:6, 2:4] = 1
    values[4, 4, 3] = 2
    return values


@pytest.fixture
def collection(tmp_path):
    """Two training subjects and one each to validate and test, all sound."""
    subjects = []
    for number, split in enumerate(("train", "train", "val", "test")):
        name = f"s{number}"
        save(tmp_path / name / "T1.nii.gz", image(10 * number))
        save(tmp_path / name / "T2.nii.gz", image(10 * number + 1))
        save(tmp_path / name / "tumour.nii.gz", label())
        files = {modality: f"{name}/{modality}.nii.gz" for modality in ("T1", "T2")}
        labels = {"tumour": f"{name}/tumour.nii.gz"}
        subjects.append({"id": name, "institution": "13", "split": split, "images": files, "labels": labels})
    content = {
        "name": "mini",
        "labels": {"tumour": {"ED": 1, "ET": 2}},
        "objectives": {"ED": {"label": "tumour", "values": [1]}, "ET": {"label": "tumour", "values": [2]}},
        "subjects": subjects,
    }
    return load_collection(write_collection(tmp_path / "collection.json", content))


def only_issue(collection, **options):
    (issue,) = check_collection(collection, progress=False, **options).issues
    return issue


def test_sound_data(collection):
    report = check_collection(collection, progress=False)
    assert report.issues == []
    assert (report.n_subjects, report.n_files) == (4, 12)
    report.raise_for_errors()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def cut_checksum(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_checksum(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(bytes(content))


def not_an_image(path):
    path.write_bytes(gzip.compress(b"not an image"))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, cut_checksum, flip_checksum, not_an_image, empty])
def test_unreadable_file(collection, tmp_path, damage):
    damage(tmp_path / "s2/T2.nii.gz")
    issue = only_issue(collection)
    assert (issue.severity, issue.subject, issue.file) == ("error", "s2", "s2/T2.nii.gz")
    assert "cannot be read" in issue.problem
    assert "\n" not in str(issue)


def test_missing_file(collection, tmp_path):
    (tmp_path / "s0/tumour.nii.gz").unlink()
    issue = only_issue(collection)
    assert (issue.severity, issue.file, issue.problem) == ("error", "s0/tumour.nii.gz", "the file does not exist")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["T1", "tumour"])
def test_not_finite(collection, tmp_path, name, value):
    voxels = np.zeros(SHAPE, dtype=np.float32)
    voxels[0, 0, 0] = value
    save(tmp_path / f"s0/{name}.nii.gz", voxels)
    assert "NaN" in only_issue(collection).problem


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.ones((*SHAPE, 2), dtype=np.float32), "(12, 10, 6, 2)"),
        (np.ones(SHAPE[:2], dtype=np.float32), "(12, 10)"),
        (np.ones(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "'R'"),
    ],
)
@pytest.mark.parametrize("name", ["T1", "tumour"])
def test_not_a_volume_of_numbers(collection, tmp_path, name, voxels, message):
    save(tmp_path / f"s0/{name}.nii.gz", voxels)
    assert message in only_issue(collection).problem


def test_shape_mismatch(collection, tmp_path):
    save(tmp_path / "s0/T1.nii.gz", image(0)[:-1])
    issue = only_issue(collection)
    assert issue.severity == "error"
    assert "(11, 10, 6) differs from shape (12, 10, 6) of label 'tumour'" in issue.problem


def test_affine_mismatch_but_not_rounding(collection, tmp_path):
    affine = np.diag([-2.0, 2, 4, 1])
    affine[0, 3] = 1e-4
    save(tmp_path / "s0/T1.nii.gz", image(0), affine)
    assert check_collection(collection, progress=False).issues == []
    affine[0, 3] = 1.5
    save(tmp_path / "s0/T1.nii.gz", image(0), affine)
    assert "by up to 1.5 mm" in only_issue(collection).problem


def test_fractional_labels(collection, tmp_path):
    values = label().astype(np.float32)
    values[3, 3, 2] = 0.5
    save(tmp_path / "s0/tumour.nii.gz", values)
    issue = only_issue(collection)
    assert issue.severity == "error"
    assert "0.5" in issue.problem
    assert "nearest" in issue.advice


def test_undeclared_labels(collection, tmp_path):
    values = label()
    values[0, 0, 0] = 4
    save(tmp_path / "s0/tumour.nii.gz", values)
    issue = only_issue(collection)
    assert issue.severity == "error"
    assert "undeclared values 4 (declared: {'ED': 1, 'ET': 2})" in issue.problem


def test_empty_foreground_is_a_warning(collection, tmp_path):
    values = label()
    values[values == 2] = 0
    save(tmp_path / "s0/tumour.nii.gz", values)
    issue = only_issue(collection)
    assert (issue.severity, issue.subject, issue.problem) == ("warning", "s0", "no voxel of objective ET")


def test_no_training_foreground_is_an_error(collection, tmp_path):
    values = label()
    values[values == 2] = 0
    for name in ("s0", "s1"):
        save(tmp_path / name / "tumour.nii.gz", values)
    report = check_collection(collection, progress=False)
    assert len(report.warnings) == 2
    (error,) = report.errors
    assert error.problem == "none of the 2 training subjects of institution 13 shows objective ET"
    assert check_collection(collection, ["13-T1-ED"], progress=False).issues == []


def test_constant_image(collection, tmp_path):
    for name in ("s0", "s3"):
        save(tmp_path / name / "T1.nii.gz", np.full(SHAPE, 7, dtype=np.float32))
    issues = check_collection(collection, progress=False).issues
    assert [issue.problem for issue in issues] == ["every voxel of the image is 7"] * 2, "and no duplicate besides"


@pytest.mark.parametrize(("twin", "severity"), [("s1", "warning"), ("s3", "error")])
def test_duplicate_patients(collection, tmp_path, twin, severity):
    voxels = np.round(image(0)).astype(np.int16)
    save(tmp_path / "s0/T1.nii.gz", voxels)
    save(tmp_path / twin / "T1.nii.gz", voxels.astype(np.float32))  # the same image stored differently
    issue = only_issue(collection)
    assert (issue.severity, issue.subject) == (severity, twin)
    assert "identical to T1 of subject s0" in issue.problem


def test_only_the_files_of_the_tasks(collection, tmp_path):
    truncate(tmp_path / "s2/T2.nii.gz")
    report = check_collection(collection, ["13-T1-ED"], progress=False)
    assert (report.issues, report.n_files) == ([], 8)
    assert only_issue(collection, tasks=["13-T2-ED"]).subject == "s2"
    with pytest.raises(InputError, match="did you mean 'T1'"):
        check_collection(collection, ["13-T11-ED"], progress=False)


def test_report(collection, tmp_path):
    truncate(tmp_path / "s2/T2.nii.gz")
    (tmp_path / "s0/T1.nii.gz").unlink()
    report = check_collection(collection, progress=False)
    first, *lines = str(report).splitlines()
    assert first.endswith("4 subjects, 12 files read, errors: 2, warnings: 0")
    assert lines[0].startswith("error: s0: s0/T1.nii.gz: the file does not exist; ")
    with pytest.raises(InputError, match=r"errors \(2\), the first: error: s0.*medtl_ext\.data check") as caught:
        report.raise_for_errors()
    assert "\n" not in str(caught.value)
    report.to_csv(tmp_path / "issues.csv")
    table = pd.read_csv(tmp_path / "issues.csv")
    assert table.columns.tolist() == ["severity", "subject", "file", "problem", "advice"]
    assert table.subject.tolist() == ["s0", "s2"]


class TestCommandLine:
    def test_sound(self, collection, capsys):
        assert main(["check", str(collection.path)]) == 0
        assert "errors: 0" in capsys.readouterr().out

    def test_errors(self, collection, tmp_path, capsys):
        (tmp_path / "s0/T1.nii.gz").unlink()
        csv = tmp_path / "issues.csv"
        assert main(["check", str(collection.path), "--csv", str(csv)]) == 1
        assert "error: s0: s0/T1.nii.gz" in capsys.readouterr().out
        assert len(pd.read_csv(csv)) == 1
        assert main(["check", str(collection.path), "--task", "13-T2-ED", "13-T2-ET"]) == 0

    @pytest.mark.parametrize("arguments", [["none.json"], ["COLLECTION", "--task", "13-T1"]])
    def test_bad_input_is_one_line(self, collection, capsys, arguments):
        arguments = [str(collection.path) if argument == "COLLECTION" else argument for argument in arguments]
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("Error: ")
        assert "\n" not in error

    def test_help(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["check", "--help"])
        assert "Exit status" in capsys.readouterr().out
