"""Splits and folds: by patient, at every institution, the same on every machine, written into the file."""

import json
import random
from collections import Counter, defaultdict

import pytest
from bundle_runs import collection_of_one_class

from medtl_ext import InputError
from medtl_ext.data import load_collection, write_collection
from medtl_ext.data.__main__ import main
from medtl_ext.data.splits import draw_folds, draw_splits, split_collection

FRACTIONS = (0.6, 0.2, 0.2)


def subjects(visits=1, **institutions):
    """This number of subjects per institution; with several ``visits`` per patient, subjects name their patient."""
    return [
        {"id": f"{name}-{number:03d}", "institution": name}
        | ({"patient": f"{name}-p{number // visits}"} if visits > 1 else {})
        for name, count in institutions.items()
        for number in range(count)
    ]


def by_id(entries):
    return {entry["id"]: entry["split"] for entry in entries}


def counts(entries):
    """Numbers of train, val and test by institution."""
    found = defaultdict(Counter)
    for entry in entries:
        found[entry["institution"]][entry["split"]] += 1
    return {name: tuple(split[key] for key in ("train", "val", "test")) for name, split in found.items()}


def patients_are_whole(entries):
    return len({(entry["patient"], entry["split"]) for entry in entries}) == len({e["patient"] for e in entries})


class TestDrawSplits:
    @pytest.mark.parametrize(
        ("institutions", "fractions", "expected"),
        [
            ({"A": 50, "B": 10, "C": 5}, FRACTIONS, {"A": (30, 10, 10), "B": (6, 2, 2), "C": (3, 1, 1)}),
            ({"A": 1, "B": 2, "C": 3}, (0.9, 0.05, 0.05), {"A": (1, 0, 0), "B": (1, 1, 0), "C": (1, 1, 1)}),
            ({"A": 4, "B": 20}, (0.9, 0.05, 0.05), {"A": (2, 1, 1), "B": (18, 1, 1)}),
            ({"A": 4}, (0.5, 0, 0.5), {"A": (2, 0, 2)}),
        ],
    )
    def test_proportions_at_institutions_and_all_splits_while_patients_last(self, institutions, fractions, expected):
        assert counts(draw_splits(subjects(**institutions), fractions=fractions)) == expected

    def test_order_does_not_matter_and_institutions_do_not_disturb_each_other(self):
        entries = subjects(A=20, B=7)
        drawn = by_id(draw_splits(entries, seed=4))
        assert by_id(draw_splits(random.Random(0).sample(entries, 27), seed=4)) == drawn
        alone = by_id(draw_splits(subjects(B=7, C=30), seed=4))
        assert {name: split for name, split in alone.items() if name.startswith("B")}.items() <= drawn.items()

    def test_known_draw(self):
        """A fixed result: a seed gives the same patients in every version and on every machine."""
        drawn = draw_splits(subjects(A=6), fractions=FRACTIONS, seed=0)
        assert [entry["split"] for entry in drawn] == ["train", "test", "train", "val", "train", "train"]
        assert len({tuple(by_id(draw_splits(subjects(A=30), seed=seed)).values()) for seed in range(5)}) == 5

    def test_scans_of_a_patient_stay_together_also_at_another_institution(self):
        entries = [*subjects(visits=10, A=60), {"id": "B-000", "institution": "B", "patient": "A-p0"}]
        assert patients_are_whole(draw_splits(entries, fractions=FRACTIONS))
        entries[13] |= {"split": "test"}
        drawn = draw_splits(entries, fractions=FRACTIONS)
        assert patients_are_whole(drawn)
        assert by_id(drawn)["A-010"] == "test", "all scans of a patient who has one in the test set"
        both = [{"id": f"{name}-x", "institution": name, "patient": "x"} for name in "BA"]
        assert set(by_id(draw_splits([*subjects(A=2), *both])).values()) == {"train", "val", "test"}, "counts at A"

    def test_a_test_set_is_kept_and_nothing_else_of_an_entry_changes(self):
        entries = [entry | {"images": {"T1": "x"}} for entry in subjects(A=10, B=4)]
        for entry in (entries[0], entries[3]):
            entry |= {"split": "test"}
        before = json.dumps(entries)
        drawn = draw_splits(entries, fractions=(0.5, 0.25, 0.25))
        assert counts(drawn) == {"A": (5, 3, 2), "B": (3, 1, 0)}
        assert by_id(drawn)["A-000"] == by_id(drawn)["A-003"] == "test"
        assert json.dumps(entries) == before
        assert [entry | {"split": "test"} for entry in drawn] == [entry | {"split": "test"} for entry in entries]


class TestDrawFolds:
    def test_every_patient_is_tested_once(self):
        entries = subjects(A=12, B=7, C=2)
        turns = draw_folds(entries, folds=4, seed=1)
        for role in ("test", "val"):
            drawn = Counter(entry["id"] for turn in turns for entry in turn if entry["split"] == role)
            assert drawn == Counter(entry["id"] for entry in entries)
        assert len({tuple(entry["fold"] for entry in turn) for turn in turns}) == 1, "the folds are the same in all"
        assert all(entry["split"] == "test" for n, turn in enumerate(turns) for entry in turn if entry["fold"] == n)

    def test_stratified(self):
        for turn in draw_folds(subjects(A=20, B=10), folds=5):
            assert counts(turn) == {"A": (12, 4, 4), "B": (6, 2, 2)}

    def test_patients_and_order(self):
        entries = subjects(visits=10, A=100)
        turns = draw_folds(entries, folds=3)
        assert all(map(patients_are_whole, turns))
        assert by_id(draw_folds(entries[::-1], folds=3)[1]) == by_id(turns[1])

    def test_a_test_set_is_kept(self):
        entries = subjects(A=10)
        entries[4] |= {"split": "test"}
        turns = draw_folds(entries, folds=3)
        assert {entry["id"] for turn in turns for entry in turn if entry["split"] == "test"} == {"A-004"}
        assert sum(entry["split"] == "val" for turn in turns for entry in turn) == 9


@pytest.fixture
def collection(tmp_path):
    """Without written splits, `load_collection` draws them: a half and two quarters of each institution."""
    entries = [
        entry | {"images": {"T1": f"scans/{entry['id']}.nii.gz"}, "labels": {"t": f"/labels/{entry['id']}.nii.gz"}}
        for entry in subjects(A=8, B=4)
    ]
    return collection_of_one_class(tmp_path / "data", entries, "t")


def of_split(path, split):
    return {subject.id for subject in load_collection(path).subjects if subject.split == split}


class TestSplitCollection:
    def test_written_into_the_file(self, collection, tmp_path):
        before = collection.read_bytes()
        (path,) = split_collection(collection, tmp_path / "data/out.json", fractions=FRACTIONS, seed=7)
        assert collection.read_bytes() == before
        assert json.loads(path.read_text())["drawn"] == {"fractions": [0.6, 0.2, 0.2], "seed": 7}
        expected = by_id(draw_splits(subjects(A=8, B=4), fractions=FRACTIONS, seed=7))
        assert {subject.id: subject.split for subject in load_collection(path).subjects} == expected
        (again,) = split_collection(path, tmp_path / "data/again.json", fractions=FRACTIONS, seed=7)
        assert again.read_bytes() == path.read_bytes()
        (other,) = split_collection(path, tmp_path / "data/again.json")
        assert json.loads(other.read_text())["drawn"] == {"fractions": [0.5, 0.25, 0.25], "seed": 0}

    def test_paths_hold_in_another_folder(self, collection, tmp_path):
        (path,) = split_collection(collection, tmp_path / "elsewhere/out.json")
        moved, old = load_collection(path).subjects[0], load_collection(collection).subjects[0]
        assert (moved.images, moved.labels) == (old.images, old.labels)
        (path,) = split_collection(path, tmp_path / "up.json")
        assert json.loads(path.read_text())["subjects"][0]["images"]["T1"] == "data/scans/A-000.nii.gz"

    def test_a_link_and_the_folder_above_it(self, collection, tmp_path):
        """``link/..`` is the parent of the folder that the link points to, not of the link itself."""
        (tmp_path / "far/scans").mkdir(parents=True)
        (tmp_path / "data/link").symlink_to(tmp_path / "far/scans")
        content = json.loads(collection.read_text())
        content["subjects"][0]["images"]["T1"] = "link/../a.nii.gz"
        (path,) = split_collection(write_collection(collection, content), tmp_path / "up.json")
        assert json.loads(path.read_text())["subjects"][0]["images"]["T1"] == "far/a.nii.gz"

    def test_folds_are_files(self, collection, tmp_path):
        paths = split_collection(collection, tmp_path / "cv.json", folds=4, seed=2)
        assert [path.name for path in paths] == [f"cv_fold{turn}.json" for turn in range(4)]
        tested = [name for path in paths for name in of_split(path, "test")]
        assert sorted(tested) == [entry["id"] for entry in subjects(A=8, B=4)]
        assert json.loads(paths[3].read_text())["drawn"] == {"folds": 4, "fold": 3, "seed": 2}
        (path,) = split_collection(paths[3], tmp_path / "plain.json")
        assert "fold" not in json.loads(path.read_text())["subjects"][0], "what was drawn before is forgotten"

    def test_keep_test(self, collection, tmp_path):
        (drawn,) = split_collection(collection, tmp_path / "a.json", fractions=(0.5, 0.25, 0.25), seed=1)
        for options in ({"seed": 9}, {"fractions": (0.8, 0.2, 0)}, {"folds": 3}):
            for path in split_collection(drawn, tmp_path / "b.json", keep_test=True, **options):
                assert of_split(path, "test") == of_split(drawn, "test")
        (without,) = split_collection(drawn, tmp_path / "c.json", fractions=(0.5, 0.5, 0))
        with pytest.raises(InputError, match="no test set to keep"):
            split_collection(without, tmp_path / "d.json", keep_test=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *(({"fractions": split}, "sum to 1") for split in [(0.5, 0.5), (1, 1, 1), (0, 0.5, 0.5), (1.5, -0.5, 0)]),
            ({"fractions": (float("nan"), 0, 0)}, "sum to 1"),
            ({"folds": 2}, "2 folds cannot be drawn; give --folds from 3"),
            ({"folds": 9}, r"9 folds cannot be drawn.*\(8\)"),
            ({"folds": 3, "fractions": FRACTIONS}, "exclude each other"),
            ({"folds": 3, "seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_refusals_write_nothing(self, collection, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            split_collection(collection, tmp_path / "out.json", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    def test_nothing_else_is_overwritten(self, collection, tmp_path):
        before = collection.read_bytes()
        with pytest.raises(InputError, match="the collection itself"):
            split_collection(collection, collection)
        other = tmp_path / "dataset.json"
        other.write_text('{"training": []}')
        with pytest.raises(InputError, match="not a collection, so it is not replaced; give another file"):
            split_collection(collection, other)
        assert (other.read_text(), collection.read_bytes()) == ('{"training": []}', before)
        for _ in range(2):  # a collection of one's own may be drawn again
            split_collection(collection, tmp_path / "out.json")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--split", "0.25", "0.5", "0.25", "--seed", "1"], ["out.json: train 3, val 6, test 3"]),
        (["--folds", "3"], [f"out_fold{turn}.json: train 4, val 4, test 4" for turn in range(3)]),
        (["--folds", "3", "--keep-test"], [f"out_fold{turn}.json: train 6, val 3, test 3" for turn in range(3)]),
    ],
)
def test_command_line(collection, tmp_path, capsys, options, expected):
    assert main(["split", str(collection), "--out", str(tmp_path / "out.json"), *options]) == 0
    assert all(line.endswith(end) for line, end in zip(capsys.readouterr().out.splitlines(), expected, strict=True))
    assert main(["split", str(collection), "--out", str(tmp_path / "out.json"), "--folds", "1"]) == 2
    assert "Error: 1 folds cannot be drawn" in capsys.readouterr().err
