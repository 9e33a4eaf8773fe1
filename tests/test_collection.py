"""Tasks, and the collection file: what it accepts, what it refuses, and what is derived from it."""

from __future__ import annotations

import copy
import json
import random

import pytest

from medtl_ext import InputError
from medtl_ext.data import Task, load_collection, write_collection


def subject(name, institution="13", split="train", modalities=("T1", "FLAIR"), labels=("tumour",)):
    entry = {
        "id": name,
        "institution": institution,
        "images": {modality: f"{name}/{modality}.nii.gz" for modality in modalities},
        "labels": {label: f"{name}/{label}.nii.gz" for label in labels},
    }
    return entry | ({"split": split} if split else {})


@pytest.fixture
def content():
    return {
        "name": "mini",
        "labels": {"tumour": {"ED": 1, "ET": 2, "NCR": 3}, "wmh": {"WMH": 1}},
        "objectives": {
            "ED": {"label": "tumour", "values": [1]},
            "FeTS": {"label": "tumour", "values": [1, 2, 3]},
            "TC": {"label": "tumour", "values": [[2, 3]]},
            "Nested": {"label": "tumour", "values": [1, [2, 3]]},
            "WMH": {"label": "wmh", "values": [1]},
        },
        "subjects": [
            subject("a"),
            subject("b", split="val"),
            subject("c", split="test", modalities=("T1",)),
            subject("d", institution="St-Olav", labels=("wmh",)),
        ],
    }


@pytest.fixture
def load(tmp_path):
    def write_and_load(content, name="collection.json"):
        path = tmp_path / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return load_collection(path)

    return write_and_load


class TestTask:
    def test_is_read_from_the_right(self):
        task = Task("St-Olav-T1-ED")
        assert (task.institution, task.modality, task.objective) == ("St-Olav", "T1", "ED")
        assert str(task) == "St-Olav-T1-ED"

    def test_equality_and_hash(self):
        assert Task.of("13", "T1", "ED") == Task("13-T1-ED")
        assert len({Task("13-T1-ED"), Task.of("13", "T1", "ED"), Task("14-T1-ED")}) == 2

    @pytest.mark.parametrize("name", ["", "13", "13-T1", "-T1-ED", "13--ED", "13-T1-", None, 13])
    def test_refuses_other_forms(self, name):
        with pytest.raises(InputError, match="institution-modality-objective"):
            Task(name)

    def test_parts_with_hyphens_are_refused(self):
        with pytest.raises(InputError, match="must not contain '-'"):
            Task.of("13", "T1-CE", "ED")


class TestCollection:
    def test_datalist(self, content, load, tmp_path):
        collection = load(content)
        assert collection.datalist("13-T1-ED", "train") == [
            {
                "image": str(tmp_path / "a/T1.nii.gz"),
                "label": str(tmp_path / "a/tumour.nii.gz"),
                "subject": "a",
                "institution": "13",
            }
        ]
        assert [entry["subject"] for entry in collection.datalist(Task("13-T1-ED"), "test")] == ["c"]

    def test_one_named_patient_gives_every_subject_a_patient(self, content, load):
        """Tasks of two institutions may be trained on together: their items need the same keys."""
        tasks = ("13-T1-ED", "St-Olav-FLAIR-WMH")
        assert all("patient" not in load(content).datalist(task, "train")[0] for task in tasks)
        content["subjects"][0]["patient"] = "p"
        assert [load(content).datalist(task, "train")[0]["patient"] for task in tasks] == ["p", "d"]

    def test_absolute_paths_stay(self, content, load):
        content["subjects"][0]["images"]["T1"] = "/scans/a.nii.gz"
        assert load(content).datalist("13-T1-ED", "train")[0]["image"] == "/scans/a.nii.gz"

    def test_classes(self, content, load):
        collection = load(content)
        assert collection.class_names("13-T1-ED") == ["ED"]
        assert collection.class_names("13-T1-TC") == ["TC"], "one class takes the objective's name"
        assert collection.class_names("13-T1-FeTS") == ["ED", "ET", "NCR"]
        assert collection.class_names("13-T1-Nested") == ["ED", "ET+NCR"]
        assert collection.label_values("13-T1-Nested") == [[1], [2, 3]]
        assert collection.n_classes("13-T1-FeTS") == 4

    def test_tasks_have_a_subject_with_both_files(self, content, load):
        names = [str(task) for task in load(content).tasks()]
        assert "13-T1-ED" in names
        assert "St-Olav-FLAIR-WMH" in names
        assert "13-T1-WMH" not in names
        assert "St-Olav-T1-ED" not in names
        assert len(names) == len(set(names)) == 2 * 4 + 2

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ("St-Olaf-T1-ED", "institution 'St-Olaf' is unknown; did you mean 'St-Olav'"),
            ("13-FLIAR-ED", "did you mean 'FLAIR'"),
            ("13-T1-WMHH", "did you mean 'WMH'"),
        ],
    )
    def test_unknown_names_get_the_nearest(self, content, load, task, message):
        with pytest.raises(InputError, match=message):
            load(content).datalist(task, "train")

    def test_unknown_split(self, content, load):
        with pytest.raises(InputError, match="split 'valid' is unknown; did you mean 'val'"):
            load(content).datalist("13-T1-ED", "valid")

    def test_empty_datalist_says_what_there_is(self, content, load):
        with pytest.raises(InputError, match=r"no subject in split 'test'.*train 1, val 1, test 0"):
            load(content).datalist("13-FLAIR-ED", "test")

    def test_optional_keys_have_defaults(self, content, load):
        collection = load(content)
        assert (collection.name, collection.synthetic, collection.description) == ("mini", False, "")
        assert load(content | {"synthetic": True}).synthetic is True

    def test_fingerprint_follows_content_and_file_sizes(self, content, load, tmp_path):
        before = load(content).fingerprint
        assert load(content).fingerprint == before
        assert load(content | {"name": "other"}).fingerprint != before
        (tmp_path / "a").mkdir()
        (tmp_path / "a/T1.nii.gz").write_bytes(b"1234")
        with_file = load(content).fingerprint
        (tmp_path / "a/T1.nii.gz").write_bytes(b"12345")
        assert len({before, with_file, load(content).fingerprint}) == 3


class TestSplits:
    def entries(self, n, institution="13"):
        return [subject(f"{institution}-{i:03d}", institution=institution, split=None) for i in range(n)]

    def test_drawn_per_institution_whatever_the_order(self, content, load):
        entries = self.entries(20) + self.entries(8, "14")
        splits = {s.id: s.split for s in load(content | {"subjects": entries}).subjects}
        for institution, expected in (("13", (10, 5, 5)), ("14", (4, 2, 2))):
            drawn = [split for name, split in splits.items() if name.startswith(institution)]
            assert tuple(drawn.count(split) for split in ("train", "val", "test")) == expected
        random.Random(0).shuffle(entries)
        assert {s.id: s.split for s in load(content | {"subjects": entries}).subjects} == splits
        assert list(splits.values())[:4] != ["train", "val", "test", "train"], "ids are shuffled before dealing"

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
    def test_few_subjects(self, content, load, n):
        splits = [s.split for s in load(content | {"subjects": self.entries(n)}).subjects]
        assert splits.count("train") >= 1
        assert len(set(splits)) == min(n, 3)

    def test_all_or_none(self, content, load):
        del content["subjects"][1]["split"]
        with pytest.raises(InputError, match=r"1 of 4 subjects have no 'split' \(first: 'b'\)"):
            load(content)

    def test_one_patient_in_two_splits(self, content, load):
        content["subjects"].append(subject("a", split="test"))
        with pytest.raises(InputError, match="subject 'a' is in splits 'train' and 'test'"):
            load(content)

    def test_a_scan_says_whose_it_is(self, content, load):
        task = Task("13-T1-ED")
        assert "patient" not in load(content).datalist(task, "train")[0]
        content["subjects"].append(subject("a-later", split="train") | {"patient": "a"})
        found = {item["subject"]: item["patient"] for item in load(content).datalist(task, "train")}
        assert found["a"] == found["a-later"] == "a"
        assert set(found.values()) == set(found) - {"a-later"}

    def test_duplicate_subject(self, content, load):
        content["subjects"].append(subject("a", institution="14"))
        with pytest.raises(InputError, match="subject 'a' is listed twice"):
            load(content)


def _edit(*keys_and_value):
    *keys, last, value = keys_and_value

    def apply(content):
        for key in keys:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("name", None), "key 'name' is missing"),
        (_edit("labels", None), "key 'labels' is missing"),
        (_edit("subjects", "all"), "'subjects' must be a list"),
        (_edit("subjects", []), "must hold at least one entry"),
        (_edit("objectives", {}), "must hold at least one entry"),
        (_edit("synthetic", "yes"), "'synthetic' must be true or false"),
        (_edit("labels", "wmh", {}), "labels 'wmh' must map names to values"),
        (_edit("labels", "wmh", {"WMH": 0}), "0 is background"),
        (_edit("labels", "wmh", {"WMH": 1.5}), "whole number"),
        (_edit("labels", "wmh", {"WMH": 1, "Other": 1}), "share a value"),
        (_edit("objectives", "ED", "label", "tumor"), "label 'tumor' is unknown; did you mean 'tumour'"),
        (_edit("objectives", "ED", "label", None), "objective 'ED': key 'label' is missing"),
        (_edit("objectives", "ED", "values", [4]), "value 4 is not declared for label 'tumour'"),
        (_edit("objectives", "ED", "values", ["ED"]), "value 'ED' is not declared"),
        (_edit("objectives", "ED", "values", [True]), "value True is not declared"),
        (_edit("objectives", "ED", "values", []), "must name label values"),
        (_edit("objectives", "ED", "values", [[]]), "must name label values"),
        (_edit("objectives", "ED", "values", [1, [1, 2]]), "each once"),
        (_edit("objectives", "E-D", {"label": "wmh", "values": [1]}), "contain '-'"),
        (_edit("subjects", 0, "a"), r"subjects\[0\] must be an object"),
        (_edit("subjects", 0, "id", None), r"subjects\[0\]: key 'id' is missing"),
        (_edit("subjects", 0, "id", ""), "'id' must not be empty"),
        (_edit("subjects", 0, "institution", 13), "subject 'a': 'institution' must be text; found 13"),
        (_edit("subjects", 0, "split", "valid"), "split 'valid' is unknown; did you mean 'val'"),
        (_edit("subjects", 0, "images", None), "subject 'a': key 'images' is missing"),
        (_edit("subjects", 0, "images", {"T1-CE": "x"}), "contain '-'"),
        (_edit("subjects", 0, "images", {"T1": ["x"]}), "images: 'T1' must be text"),
        (_edit("subjects", 0, "labels", {"tumor": "x"}), "label 'tumor' is unknown; did you mean 'tumour'"),
    ],
)
def test_bad_content_is_one_clear_line(content, load, tmp_path, edit, message):
    edit(content)
    with pytest.raises(InputError, match=message) as caught:
        load(content)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "collection.json") in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_collection(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"not valid JSON.*line 1"):
        load_collection(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        load_collection(broken)
    broken.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="must hold an object"):
        load_collection(broken)


def test_write_collection_validates_first(content, tmp_path):
    path = write_collection(tmp_path / "new" / "mini.json", content)
    assert load_collection(path).name == "mini"
    broken = copy.deepcopy(content)
    broken["objectives"]["ED"]["values"] = [9]
    with pytest.raises(InputError, match="value 9"):
        write_collection(path, broken)
    assert json.loads(path.read_text(encoding="utf-8")) == content, "the old file is untouched"
