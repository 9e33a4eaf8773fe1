"""The integrity check finds every kind of damage, says what to do, and reports nothing on sound data."""

import gzip
import os
import shutil
import struct
import tracemalloc
import warnings

import nibabel
import numpy as np
import pandas as pd
import pytest
from monai.transforms import Compose
from PIL import Image

from medtl_ext import InputError
from medtl_ext.data import check_collection, load_collection, write_collection
from medtl_ext.data.__main__ import main
from medtl_ext.data.plan import Grid, grid_steps
from medtl_ext.data.readers._draft import held_values

SHAPE = (12, 10, 6)


def save(path, array, shift=0.0, sizes=(-2.0, 2, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*sizes, 1])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(array, affine, dtype=array.dtype), path)


def image(seed):
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def label(dtype=np.uint8, **changes):
    """A label with ED (1) and ET (2); the value of ET and of the first background voxel can be changed."""
    values = np.zeros(SHAPE, dtype=dtype)
    values[3:6, 3:6, 2:4] = 1
    values[4, 4, 3] = changes.get("et", 2)
    values[0, 0, 0] = changes.get("background", 0)
    return values


@pytest.fixture
def collection(tmp_path):
    """Two training subjects, one for validation and one for test, all sound."""
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


def check(collection, tasks=None):
    return check_collection(collection, tasks, progress=False)


def only_issue(collection, tasks=None):
    (issue,) = check(collection, tasks).issues
    return issue


def test_sound_data(collection, tmp_path):
    save(tmp_path / "s0/T1.nii.gz", image(0), shift=1e-4)  # rounding
    report = check(collection)
    assert (report.issues, report.n_subjects, report.n_files) == ([], 4, 12)
    report.raise_for_errors()


DAMAGES = {
    "truncated": lambda content: content[:-40],
    "no checksum": lambda content: content[:-8],
    "wrong checksum": lambda content: content[:-6] + bytes([content[-6] ^ 0xFF]) + content[-5:],
    "not an image": lambda content: gzip.compress(b"not an image"),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unreadable_file(collection, tmp_path, damage):
    path = tmp_path / "s2/T2.nii.gz"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    issue = only_issue(collection)
    assert (issue.severity, issue.subject, issue.file) == ("error", "s2", "s2/T2.nii.gz")
    assert "cannot be read" in issue.problem
    assert "\n" not in str(issue)


@pytest.mark.parametrize("name", ["T1", "tumour"])
@pytest.mark.parametrize(
    ("voxels", "problem"),
    [
        (label(float, background=np.inf), "infinite"),
        (np.ones((*SHAPE, 2), dtype=np.float32), "2 channels where one is expected"),
        (np.ones((*SHAPE, 2, 2), dtype=np.float32), "(12, 10, 6, 2)"),
        (np.ones(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "'R'"),
    ],
)
def test_not_a_volume_of_numbers(collection, tmp_path, name, voxels, problem):
    save(tmp_path / f"s0/{name}.nii.gz", voxels)
    issue = only_issue(collection)
    assert (issue.severity, issue.file) == ("error", f"s0/{name}.nii.gz")
    assert problem in issue.problem


@pytest.mark.parametrize(
    ("name", "voxels", "shift", "expected"),
    [
        ("T1", image(0)[:-1], 0, "error: image shape (11, 10, 6) differs from shape (12, 10, 6) of label 'tumour'"),
        ("T1", image(0), 1.5, "error: the image's affine differs from that of label 'tumour' by up to 1.5 mm;"),
        ("tumour", label(float, background=0.5), 0, "error: the label holds fractional values, such as 0.5, which"),
        ("tumour", label(background=4), 0, "error: the label holds undeclared values 4 (declared: {'ED': 1, 'ET': 2})"),
        ("tumour", label(et=1), 0, "warning: no voxel of objective ET"),
        ("T1", np.full(SHAPE, 7, np.float32), 0, "warning: every voxel of the image is 7"),
    ],
)
def test_one_issue(collection, tmp_path, name, voxels, shift, expected):
    save(tmp_path / f"s0/{name}.nii.gz", voxels, shift)
    issue = only_issue(collection)
    assert (issue.subject, issue.file) == ("s0", f"s0/{name}.nii.gz")
    assert f"{issue.severity}: {issue.problem}; {issue.advice}".startswith(expected)


def as_scaled_int16(voxels):
    """Some tools store a mask with a scale: when it is read, 1 is 0.99998."""
    voxels = nibabel.Nifti1Image((voxels * 32767 / 2).astype(np.int16), np.diag([-2.0, 2, 4, 1]))
    voxels.header.set_slope_inter(2 / 32768, 0)
    return voxels


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(lambda voxels, kind=kind: voxels.astype(kind), id=kind)
        for kind in ("int8", ">i2", ">f4", "uint16", "int32", "uint32", "int64", "uint64", "float64")
    ]
    + [
        pytest.param(lambda voxels: np.where(voxels == 0, -0.0, voxels), id="signed zero"),
        pytest.param(as_scaled_int16, id="scaled"),
        pytest.param(lambda voxels: np.where(voxels == 0, np.nan, voxels * 0.99998), id="NaN outside"),
    ],
)
def test_labels_of_any_kind_are_their_classes(collection, tmp_path, stored, request):
    path, name = tmp_path / "s0/tumour.nii.gz", request.node.callspec.id
    file = stored(label().astype(float))
    nibabel.save(file, path) if name == "scaled" else save(path, file)
    said = [str(issue).removeprefix("warning: s0: s0/tumour.nii.gz: ") for issue in check(collection).issues]
    assert len(said) == (name in ("scaled", "NaN outside"))
    assert all("% of the label are" in problem for problem in said)
    steps = grid_steps(Grid((2, 2, 4), (16, 16)), label_values=collection.label_values("13-T1-ET"))[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if said else "error")
        item = Compose(steps)(collection.datalist("13-T1-ET", "train")[0])
    assert np.array_equal(np.asarray(item["label"])[0], label() == 2)
    assert held_values(str(path)) == {1, 2}


def test_no_training_foreground_is_an_error(collection, tmp_path):
    for name in ("s0", "s1"):
        save(tmp_path / name / "tumour.nii.gz", label(et=0))
    report = check(collection)
    assert len(report.warnings) == 2
    (error,) = report.errors
    assert error.problem == "none of the 2 training subjects of institution 13 shows objective ET"
    assert check(collection, ["13-T1-ED"]).issues == []


@pytest.mark.parametrize(("twin", "severity"), [("s1", "warning"), ("s3", "error")])
def test_duplicate_patients(collection, tmp_path, twin, severity):
    voxels = np.round(image(0)).astype(np.int16)
    save(tmp_path / "s0/T1.nii.gz", voxels)
    save(tmp_path / twin / "T1.nii.gz", voxels.astype(np.float32))  # the same image stored differently
    issue = only_issue(collection)
    assert (issue.severity, issue.subject) == (severity, twin)
    assert "identical to T1 of subject s0" in issue.problem


def header(path, place, numbers, kind="<f"):
    """Changes numbers in a file's header, as a faulty tool or disk does."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    for number, value in enumerate(numbers):
        struct.pack_into(kind, content, place + number * struct.calcsize(kind), value)
    path.write_bytes(gzip.compress(bytes(content)))


PIXDIM, SHAPES, SFORM, CODES = 80, 42, 280, 252
ODD = {
    "pixdim is not the affine's": (
        lambda path: header(path, PIXDIM, [2, 2, 3]),
        "error: has voxels of 2 x 2 x 3 mm by pixdim, but of 2 x 2 x 4 mm by its affine",
    ),
    "an affine without a volume": (lambda path: header(path, SFORM, [0] * 4), "error: has a singular affine"),
    "more voxels than are sane": (
        lambda path: header(path, SHAPES, [30000] * 3, "<h"),
        "error: claims 30000 x 30000 x 30000 voxels; at most 536,870,912 are allowed",
    ),
    "a gzip bomb": (
        lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**27))),
        "error: holds more data after its last voxel",
    ),
    "one voxel of 1e38": (
        lambda path: save(path, np.where(np.arange(720).reshape(SHAPE) == 5, 1e38, image(0)).astype(np.float32)),
        "error: it holds values up to 1e+38, which no scanner measures",
    ),
    "a label file": (
        lambda path: shutil.copy(path.with_name("tumour.nii.gz"), path),
        "error: the image is label s3/tumour.nii.gz of subject s3",  # which all look alike here
    ),
    "another modality": (lambda path: shutil.copy(path.with_name("T1.nii.gz"), path), "warning: T2 is identical to T1"),
    "a mirrored patient": (
        lambda path: save(path, image(31)[::-1].copy()),
        "warning: the image is almost the same as s0/T2.nii.gz of subject s0 (in train and test); thumbnails, one mirr",
    ),
    "a fifo": (lambda path: (path.unlink(), os.mkfifo(path)), "error: is neither a file nor a folder"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_files_are_named_without_taking_memory(collection, tmp_path, odd):
    change, expected = ODD[odd]
    change(tmp_path / "s0/T2.nii.gz")
    tracemalloc.start()
    issue = only_issue(collection)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{issue.severity}: {issue.problem}".startswith(expected)
    assert issue.subject == ("s3" if odd == "a mirrored patient" else "s0")
    assert peak < 40e6


@pytest.mark.parametrize("size", [1e6, 1e-7])
def test_voxels_that_would_fill_all_memory_are_an_error(collection, tmp_path, size):
    for name in ("T1", "tumour"):
        path = tmp_path / f"s0/{name}.nii.gz"
        save(path, np.asanyarray(nibabel.load(path).dataobj), sizes=(size, 2, 4))
    assert "its header says voxels of up to" in check(collection, ["13-T1-ED"]).errors[0].problem


def test_constant_images_are_no_duplicates(collection, tmp_path):
    for name in ("s0", "s3"):
        save(tmp_path / name / "T1.nii.gz", np.full(SHAPE, 7, dtype=np.float32))
    assert [issue.severity for issue in check(collection).issues] == ["warning"] * 2


class TestPictures:
    """Colour photographs with masks of colours."""

    @pytest.fixture
    def draw(self, tmp_path):
        def save_picture(name, pixels, mode=None):
            picture = Image.fromarray(pixels)
            (picture if mode is None else picture.convert(mode)).save(tmp_path / name)

        return save_picture

    @pytest.fixture
    def collection(self, draw, tmp_path):
        subjects = []
        for number, split in enumerate(("train", "val", "test")):
            coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
            draw(f"{number}.png", np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8))
            draw(f"{number}_mask.png", self.mask())
            files = {"images": {"R+G+B": f"{number}.png"}, "labels": {"vessel": f"{number}_mask.png"}}
            subjects.append({"id": f"s{number}", "institution": "X", "split": split, **files})
        content = {
            "name": "photographs",
            "labels": {"vessel": {"artery": [255, 0, 0]}},
            "objectives": {"Artery": {"label": "vessel", "values": ["artery"]}},
            "subjects": subjects,
        }
        return load_collection(write_collection(tmp_path / "collection.json", content))

    @staticmethod
    def mask(colour=(255, 0, 0)):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[10:20, 10:20] = colour
        return pixels

    def test_sound(self, collection):
        report = check(collection, ["X-G+R-Artery"])
        assert (report.issues, report.n_files) == ([], 6)

    @pytest.mark.parametrize(
        ("name", "pixels", "mode", "expected"),
        [
            ("0.png", mask(), "RGBA", "error: has an alpha channel; save it without alpha"),
            ("0.png", mask(), "L", "error: has 1 channel, but the collection names 3; name as many"),
            ("0_mask.png", mask((0, 9, 255)), None, "error: the label holds undeclared values [0, 9, 255] (declared: "),
            ("0_mask.png", mask((0, 255, 0)), "P", "error: the label holds undeclared values [0, 255, 0] (declared: "),
            ("0_mask.png", mask(), "L", "error: is no colour file, but its label is declared by colours"),
            ("0_mask.png", mask()[:32], None, "error: image shape (64, 64, 1) differs from shape (64, 32, 1)"),
        ],
    )
    def test_one_issue(self, collection, draw, name, pixels, mode, expected):
        draw(name, pixels, mode)
        issue = next(issue for issue in check(collection).issues if issue.severity == "error")
        assert issue.subject == "s0"
        assert f"{issue.severity}: {issue.problem}; {issue.advice}".startswith(expected)

    def test_a_palette_is_no_grey_image(self, collection, draw):
        draw("0.png", self.mask(), "P")
        assert check(collection).errors == []  # as colours
        collection.path.write_text(collection.path.read_text().replace("R+G+B", "G"))
        first = check(load_collection(collection.path)).errors[0]
        assert (first.file, first.problem) == ("0.png", "its pixels are numbers of a palette")

    def test_a_jpeg_is_no_mask(self, collection, tmp_path):
        Image.fromarray(self.mask()).save(tmp_path / "0_mask.jpg", quality=100, subsampling=0)
        text = collection.path.read_text().replace("0_mask.png", "0_mask.jpg")
        collection.path.write_text(text)
        first = check(load_collection(collection.path)).errors[0]
        assert (first.file, first.problem) == ("0_mask.jpg", "a JPEG changes the values of a mask")

    @pytest.mark.parametrize(("same_patient", "found"), [(False, 1), (True, 0)])
    def test_almost_the_same_in_two_splits(self, collection, draw, tmp_path, same_patient, found):
        pixels = np.asarray(Image.open(tmp_path / "0.png"))
        draw("2.png", (pixels * 0.9 + 5).astype(np.uint8))
        if same_patient:
            text = collection.path.read_text().replace('"id"', '"patient": "p", "id"').replace('"val"', '"train"')
            collection.path.write_text(text.replace('"test"', '"train"'))
            collection = load_collection(collection.path)
        issues = [issue for issue in check(collection).issues if "almost the same" in issue.problem]
        assert len(issues) == found
        for issue in issues:
            assert (issue.severity, issue.subject) == ("warning", "s2")
            assert "0.png of subject s0 (in train and test)" in issue.problem


class TestSizes:
    @staticmethod
    def resize(tmp_path, subject, sizes, turned=False):
        """Gives all files of a subject voxels of this size; if turned, they are stored along other axes."""
        for name in ("T1", "T2", "tumour"):
            path = tmp_path / subject / f"{name}.nii.gz"
            save(path, np.asanyarray(nibabel.load(path).dataobj), sizes=sizes)
            if turned:
                other = nibabel.orientations.axcodes2ornt(("S", "P", "L"))
                nibabel.save(nibabel.load(path).as_reoriented(other), path)

    @pytest.mark.parametrize(
        ("sizes", "said"),
        [
            ((2, 2, 60), "voxels of up to 60 mm, and a length of 0.36 m; correct the header's units or spacing"),
            ((400, 2, 4), "voxels of up to 400 mm, and a length of 4.8 m; correct the header's units or spacing"),
        ],
    )
    def test_millimetres_that_cannot_be(self, collection, tmp_path, sizes, said):
        for number in range(4):
            self.resize(tmp_path, f"s{number}", sizes)
        issues = check(collection).issues
        assert [issue.severity for issue in issues] == ["warning"] * 8
        assert str(issues[0]) == f"warning: s0: s0/T1.nii.gz: its header says {said}"

    def test_a_large_field_of_small_voxels(self, collection, tmp_path):
        save(tmp_path / "s0/T1.nii.gz", image(0)[:, 3:4, 2:3].repeat(120, 0), sizes=(2.2, 2, 4))
        save(tmp_path / "s0/tumour.nii.gz", label()[:, 3:4, 2:3].repeat(120, 0), sizes=(2.2, 2, 4))
        (issue,) = check(collection, ["13-T1-ED"]).warnings
        assert "and a length of 3.17 m" in issue.problem

    def test_patients_whose_voxels_differ(self, collection, tmp_path):
        self.resize(tmp_path, "s2", (2, 2, 12.1))
        issues = check(collection).issues
        assert [issue[:3] for issue in issues] == [("warning", "", "")] * 2
        for issue, name in zip(issues, ("T1", "T2"), strict=True):
            said = f"institution 13: from bottom to top, voxels of {name} are 4 mm in subject s0 and 12.1 mm in s2"
            assert issue.problem == said
            assert issue.advice.startswith("correct the wrong header")

    def test_neither_other_axes_nor_three_times_are_odd(self, collection, tmp_path):
        self.resize(tmp_path, "s1", (-2, 2, 4), turned=True)
        self.resize(tmp_path, "s2", (2, -2, 12))
        assert check(collection).issues == []

    def test_other_institutions_may_have_other_voxels(self, collection, tmp_path):
        self.resize(tmp_path, "s2", (2, 2, 20))
        text = collection.path.read_text().replace('"13",\n      "split": "val"', '"14",\n      "split": "val"')
        assert '"14"' in text
        collection.path.write_text(text)
        assert check(load_collection(collection.path)).issues == []

    def test_pictures_and_slices_without_a_space_have_no_millimetres(self, collection, tmp_path):
        for number in range(4):
            for name in ("T1", "T2", "tumour"):
                path = tmp_path / f"s{number}/{name}.nii.gz"
                slice_ = np.asanyarray(nibabel.load(path).dataobj)[..., 3:4]
                save(path, slice_.repeat(300, 0), sizes=(1, 1, 1))  # of 3600 pixels
        assert check(collection).issues == []


def test_only_the_files_of_the_tasks(collection, tmp_path):
    (tmp_path / "s2/T2.nii.gz").write_bytes(b"")
    report = check(collection, ["13-T1-ED"])
    assert (report.issues, report.n_files) == ([], 8)
    assert only_issue(collection, ["13-T2-ED"]).subject == "s2"
    with pytest.raises(InputError, match="did you mean 'T1'"):
        check(collection, ["13-T11-ED"])


def test_report(collection, tmp_path):
    (tmp_path / "s0/T1.nii.gz").unlink()
    save(tmp_path / "s0/tumour.nii.gz", label(et=1))
    (tmp_path / "s2/T2.nii.gz").write_bytes(b"")
    report = check(collection)
    first, *lines = str(report).splitlines()
    assert first.endswith("4 subjects, 12 files read, errors: 2, warnings: 1")
    assert lines[0].startswith("error: s0: s0/T1.nii.gz: does not exist; ")
    assert lines[2].startswith("warning: s0: s0/tumour.nii.gz: no voxel")
    with pytest.raises(InputError, match=r"errors \(2\), the first: error: s0.*medtl_ext\.data check") as caught:
        report.raise_for_errors()
    assert "\n" not in str(caught.value)


class TestCommandLine:
    def test_sound_and_with_errors(self, collection, tmp_path, capsys):
        assert main(["check", str(collection.path)]) == 0
        assert "errors: 0" in capsys.readouterr().out
        (tmp_path / "s0/T1.nii.gz").unlink()
        csv = tmp_path / "issues.csv"
        assert main(["check", str(collection.path), "--csv", str(csv)]) == 1
        assert "error: s0: s0/T1.nii.gz" in capsys.readouterr().out
        table = pd.read_csv(csv)
        assert table.columns.tolist() == ["severity", "subject", "file", "problem", "advice"]
        assert table.subject.tolist() == ["s0"]
        assert main(["check", str(collection.path), "--task", "13-T2-ED", "13-T2-ET"]) == 0
