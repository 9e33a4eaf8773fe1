"""Tasks and the collection file: what is accepted, what is refused, and what is computed from it."""

from __future__ import annotations

import copy
import json
import random

import pytest

from medtl_ext import InputError
from medtl_ext.data import Task, load_collection, write_collection


def subject(name, institution="13", split="train", modalities=("T1", "FLAIR"), labels=("tumour",), **more):
    images, labels = ({file: f"{name}/{file}.nii.gz" for file in files} for files in (modalities, labels))
    entry = {"id": name, "institution": institution, "images": images, "labels": labels, **more}
    return entry | ({"split": split} if split else {})


@pytest.fixture
def content():
    objectives = {"ED": [1], "FeTS": [1, 2, 3], "TC": [[2, 3]], "Nested": [1, [2, 3]]}
    return {
        "name": "mini",
        "labels": {"tumour": {"ED": 1, "ET": 2, "NCR": 3}, "wmh": {"WMH": 1}},
        "objectives": {name: {"label": "tumour", "values": values} for name, values in objectives.items()}
        | {"WMH": {"label": "wmh", "values": [1]}},
        "subjects": [
            subject("a"),
            subject("b", split="val"),
            subject("c", split="test", modalities=("T1",)),
            subject("d", institution="St-Olav", labels=("wmh",)),
        ],
    }


@pytest.fixture
def load(tmp_path):
    def write_and_load(content):
        path = tmp_path / "collection.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return load_collection(path)

    return write_and_load


class TestTask:
    def test_is_its_name_read_from_the_right(self):
        task = Task("St-Olav-T1-ED")
        assert (task.institution, task.modality, task.objective) == ("St-Olav", "T1", "ED")
        assert str(task) == "St-Olav-T1-ED"
        assert len({task, Task.of("St-Olav", "T1", "ED"), Task("14-T1-ED")}) == 2

    @pytest.mark.parametrize("name", ["", "13", "13-T1", "-T1-ED", "13--ED", "13-T1-", None, 13])
    def test_refuses_other_forms(self, name):
        with pytest.raises(InputError, match="institution-modality-objective"):
            Task(name)

    def test_parts_with_hyphens_are_refused(self):
        with pytest.raises(InputError, match="must not contain '-'"):
            Task.of("13", "T1-CE", "ED")


class TestCollection:
    def test_datalist(self, content, load, tmp_path):
        content["subjects"][0]["labels"]["tumour"] = "/labels/a.nii.gz"
        expected = {"image": str(tmp_path / "a/T1.nii.gz"), "label": "/labels/a.nii.gz"}
        collection = load(content)
        assert collection.datalist("13-T1-ED", "train") == [{**expected, "subject": "a", "institution": "13"}]
        assert [item["subject"] for item in collection.datalist(Task("13-T1-ED"), "test")] == ["c"]

    def test_one_named_patient_gives_every_subject_a_patient(self, content, load):
        """Tasks of two institutions may be used in one training, so their items need the same keys."""
        content["subjects"].append(subject("a-later", patient="a"))
        tasks = ("13-T1-ED", "St-Olav-FLAIR-WMH")
        patients = [[item["patient"] for item in load(content).datalist(task, "train")] for task in tasks]
        assert patients == [["a", "a"], ["d"]]

    def test_classes(self, content, load):
        collection = load(content)
        assert collection.class_names("13-T1-ED") == ["ED"]
        assert collection.class_names("13-T1-TC") == ["TC"], "one class takes the objective's name"
        assert collection.class_names("13-T1-FeTS") == ["ED", "ET", "NCR"]
        assert collection.class_names("13-T1-Nested") == ["ED", "ET+NCR"]
        assert collection.label_values("13-T1-Nested") == [[1], [2, 3]]
        assert len(collection.label_values("13-T1-FeTS")) == 3

    def test_tasks_have_a_subject_with_both_files(self, content, load):
        found = {str(task) for task in load(content).tasks()}
        tumours = {f"13-{modality}-{name}" for modality in ("T1", "FLAIR") for name in ("ED", "FeTS", "TC", "Nested")}
        assert found == tumours | {"St-Olav-T1-WMH", "St-Olav-FLAIR-WMH"}

    @pytest.mark.parametrize(
        ("task", "split", "message"),
        [
            ("St-Olaf-T1-ED", "train", "institution 'St-Olaf' is unknown; did you mean 'St-Olav'"),
            ("13-FLIAR-ED", "train", "did you mean 'FLAIR'"),
            ("13-T1-WMHH", "train", "did you mean 'WMH'"),
            ("13-T1-ED", "valid", "split 'valid' is unknown; did you mean 'val'"),
            ("13-FLAIR-ED", "test", "no subject in split 'test'.*train 1, val 1, test 0"),
        ],
    )
    def test_no_datalist(self, content, load, task, split, message):
        with pytest.raises(InputError, match=message):
            load(content).datalist(task, split)

    def test_optional_keys_have_defaults_and_others_are_left_alone(self, content, load):
        collection = load(content | {"drawn": {"seed": 1}})
        assert (collection.name, collection.synthetic, collection.description) == ("mini", False, "")
        assert load(content | {"synthetic": True}).synthetic is True

    def test_fingerprint_follows_the_content_of_all_files(self, content, load, tmp_path):
        before = load(content).fingerprint
        assert load(content).fingerprint == before
        assert load(content | {"name": "other"}).fingerprint != before
        (tmp_path / "a").mkdir()
        (tmp_path / "a/T1.nii.gz").write_bytes(b"1234")
        with_file = load(content).fingerprint
        (tmp_path / "a/T1.nii.gz").write_bytes(b"1235")  # corrected in place, as large as it was
        assert len({before, with_file, load(content).fingerprint}) == 3

    def test_a_tasks_fingerprint_follows_its_own_subjects_alone(self, content, load, tmp_path):
        def of(content):
            return load(content).fingerprint_of("13-T1-ED")

        before = of(content)
        more = [{**content["subjects"][0], "id": "elsewhere", "institution": "X"}]
        assert of(content | {"subjects": content["subjects"] + more, "name": "other"}) == before
        (tmp_path / "a").mkdir()
        (tmp_path / "a/T1.nii.gz").write_bytes(b"1234")
        changed = [of(content), of(content | {"synthetic": True})]
        changed.append(of(content | {"subjects": [*content["subjects"], *[more[0] | {"institution": "13"}]]}))
        assert len({before, *changed}) == 4


class TestSplitsThatAreDrawn:
    def entries(self, n, institution="13"):
        return [subject(f"{institution}-{i:03d}", institution=institution, split=None) for i in range(n)]

    def draw(self, load, content, entries):
        return {subject.id: subject.split for subject in load(content | {"subjects": entries}).subjects}

    def test_per_institution_whatever_the_order(self, content, load):
        entries = self.entries(20) + self.entries(8, "14")
        splits = self.draw(load, content, entries)
        for institution, expected in (("13", (10, 5, 5)), ("14", (4, 2, 2))):
            drawn = [split for name, split in splits.items() if name.startswith(institution)]
            assert tuple(drawn.count(split) for split in ("train", "val", "test")) == expected
        random.Random(0).shuffle(entries)
        assert self.draw(load, content, entries) == splits
        assert "".join(split[1] for split in splits.values())[:8] == "rrraearr", "pinned: the same on every machine"

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
    def test_few_subjects(self, content, load, n):
        splits = list(self.draw(load, content, self.entries(n)).values())
        assert splits.count("train") >= 1
        assert len(set(splits)) == min(n, 3)

    def test_a_patient_stays_together_also_at_another_institution(self, content, load):
        entries = [*self.entries(8), subject("later", institution="14", split=None, patient="13-002")]
        splits = self.draw(load, content, [*entries, *self.entries(4, "14")])
        assert splits["later"] == splits["13-002"]


class TestChannels:
    """Tasks of several channels: one file per channel, or one file for all."""

    @pytest.fixture
    def content(self, content):
        content["subjects"][2] = subject("c", split="test")
        return content

    def test_are_in_the_order_of_the_task(self, content, load):
        collection = load(content)
        (item,) = collection.datalist("13-FLAIR+T1-ED", "train")
        assert item["image"] == [collection.datalist(f"13-{name}-ED", "train")[0]["image"] for name in ("FLAIR", "T1")]

    def test_of_one_file_are_its_numbers(self, content, load):
        for entry in content["subjects"]:
            entry["images"] = {"FLAIR+T1+T2": "all.nii.gz", "PD": "pd.nii.gz"}
        collection = load(content)
        assert collection.modalities == ["FLAIR", "T1", "T2", "PD"]
        (item,) = collection.datalist("13-T2+PD+FLAIR-ED", "train")
        names = [name.removeprefix(f"{collection.path.parent}/") for name in item["image"]]
        assert names == ["all.nii.gz#2/3", "pd.nii.gz", "all.nii.gz#0/3"]

    def test_who_lacks_one_is_named_or_left_out_where_the_collection_says_so(self, content, load):
        del content["subjects"][0]["images"]["T1"]
        with pytest.raises(InputError, match=r"subject 'a' has no T1, which task 13-T1\+FLAIR-ED needs"):
            load(content).subjects_of("13-T1+FLAIR-ED")
        content["missing"] = "skip"
        assert [one.id for one in load(content).subjects_of("13-T1+FLAIR-ED")] == ["b", "c"]
        assert [one.id for one in load(content).subjects_of("13-T1-ED")] == ["b", "c"]  # as ever

    @pytest.mark.parametrize(
        ("images", "task", "message"),
        [
            ({"R+R+B": "x.png"}, None, "channels R.R.B must each have a name of its own"),
            ({"R+": "x.png"}, None, "must each have a name"),
            ({"R+G": "x.png", "R": "y.png"}, None, "two files hold channel R"),
            ({"RGB": "x.png"}, "13-R+G-ED", "modality 'R' is unknown; the collection holds RGB: .* such as R.G.B"),
            ({"R+G+B": "x.png"}, "13-R+R-ED", "a name of its own"),
            ({"R+G+B": "x.png"}, "13-R+X-ED", "modality 'X' is unknown"),
        ],
    )
    def test_refused(self, content, load, images, task, message):
        for entry in content["subjects"]:
            entry["images"] = images
        with pytest.raises(InputError, match=message):
            load(content).datalist(task, "train")


NAMES = ["../../x", "/x", "a/b", "a\\b", "a\nb", "a\0", "x" * 201, "x" * 10**6, " a", "a ", ".", "-rf", "\ud800", ""]
NAMES += ["=cmd|' /C calc'!A0", "+1", "@x", "%x", "$__import__('os').system('x')", "<script>alert(1)</script>", "a|b"]
NAMES += ["a\u2028b"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_name_of_a_file_is_refused_at_its_place(content, load, name):
    """Names are used for folders, tables, pages and options, and a collection may come from a stranger."""
    changes = {
        "id": lambda content: content["subjects"][0].update(id=name),
        "institution": lambda content: content["subjects"][0].update(institution=name),
        "patient": lambda content: content["subjects"][0].update(patient=name or " "),
        "images": lambda content: content["subjects"][0]["images"].update({name: "x.nii"}),
        "objectives": lambda content: content["objectives"].update({name: content["objectives"]["ED"]}),
        "labels": lambda content: content["labels"]["tumour"].update({name: 77}),
    }
    for place, change in changes.items():
        changed = copy.deepcopy(content)
        change(changed)
        with pytest.raises(InputError, match=r"cannot be part of a file's name|must not contain '-'") as caught:
            load(changed)
        said = str(caught.value)
        assert f": {place}" in said
        assert said.isprintable()
        assert len(said) < 900
    with pytest.raises(InputError, match=r"^task .* (is not of the form|cannot be part)"):
        Task(f"{name}-T1-{name}")


@pytest.mark.parametrize("text", ['{"a": 1, "name": "x", "name": "y"}', '{"x": ' + "[" * 10**5 + "]" * 10**5 + "}"])
def test_json_that_is_no_data(tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(
        InputError, match=r"odd\.json is (not valid JSON \(key 'name' is given twice|JSON that is nested)"
    ):
        load_collection(tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("labels.wmh", {"WMH": [255, 0, 256]}, r"a colour must be \[red, green, blue\], each 0 to 255"),
        ("labels.wmh", {"WMH": [0, 0, 0]}, "not black"),
        ("labels.wmh", {"WMH": [9, 0, 0], "Other": 2}, "mixes numbers and colours"),
        ("missing", "ignore", "missing must be 'refuse' or 'skip'"),
        ("name", None, "name is missing"),
        ("labels", None, "labels is missing"),
        ("subjects", "all", "subjects must be a valid list; found 'all'"),
        ("subjects", [], "subjects must have at least 1 item"),
        ("objectives", {}, "objectives must have at least 1 item"),
        ("synthetic", "yes", "synthetic must be a valid boolean; found 'yes'"),
        ("labels.wmh", {}, "labels: wmh must have at least 1 item"),
        ("labels.wmh", {"WMH": 0}, "labels: wmh: WMH must be greater than or equal to 1; found 0"),
        ("labels.wmh", {"WMH": 1.5}, "must be a valid integer; found 1.5"),
        ("labels.wmh", {"WMH": 1, "Other": 1}, "share a value"),
        ("objectives.ED.label", "tumor", "label 'tumor' is unknown; did you mean 'tumour'"),
        ("objectives.ED.label", None, "objectives: ED: label is missing"),
        ("objectives.ED.values", [4], "objective 'ED': values must be declared for label 'tumour' .* found .*4"),
        ("objectives.ED.values", ["oedema"], "values must be declared .* or by their names; found .*oedema"),
        ("objectives.ED.values", [True], "must be a valid integer; found True"),
        ("objectives.ED.values", [], "values must have at least 1 item"),
        ("objectives.ED.values", [[]], "values: 0 must have at least 1 item"),
        ("objectives.ED.values", [1, [1, 2]], "each be there once"),
        ("objectives.E-D", {"label": "wmh", "values": [1]}, "E-D: the name must not contain '-'"),
        ("subjects.0", "a", "subjects: 0 must be a valid dictionary; found 'a'"),
        ("subjects.0.id", None, "subjects: 0: id is missing"),
        ("subjects.0.id", "", "id: the name '' cannot be part of a file's name: it is empty; rename it"),
        ("subjects.0.institution", 13, "subject 'a': institution must be a valid string; found 13"),
        ("subjects.0.split", "valid", "subject 'a': split must be 'train', 'val' or 'test'; found 'valid'"),
        ("subjects.0.split", None, r"1 of 4 subjects have no 'split' \(first: 'a'\)"),
        ("subjects.0.images", None, "subject 'a': images is missing"),
        ("subjects.0.images", {"T1-CE": "x"}, "T1-CE: the name must not contain '-'"),
        ("subjects.0.images", {"T1": ["x"]}, r"images: T1: must be the path of a file; found \['x'\]"),
        ("subjects.0.images", {"T1": ""}, "images: T1: must be the path of a file"),
        ("subjects.0.labels", {"tumor": "x"}, "label 'tumor' is unknown; did you mean 'tumour'"),
        ("subjects.1", subject("a", institution="14"), "subject 'a' is listed twice"),
        ("subjects.1", subject("a", split="test"), r"\(subject 'a'\) is in splits 'train' and 'test'"),
        ("subjects.1", subject("b", split="val", patient="a"), "patient 'a' .* is in splits 'train' and 'val'"),
    ],
)
def test_bad_content_is_one_clear_line(content, load, tmp_path, keys, value, message):
    *above, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    part = content
    for key in above:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    with pytest.raises(InputError, match=message) as caught:
        load(content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "collection.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        (b'{"name": ', "not valid JSON.*line 1"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "must hold an object"),
    ],
)
def test_missing_and_broken_files(tmp_path, text, message):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_collection(path)


def test_write_collection_validates_first(content, tmp_path):
    path = write_collection(tmp_path / "new" / "mini.json", content)
    assert load_collection(path).name == "mini"
    broken = copy.deepcopy(content)
    broken["objectives"]["ED"]["values"] = [9]
    with pytest.raises(InputError, match=r"found .*9"):
        write_collection(path, broken)
    assert json.loads(path.read_text(encoding="utf-8")) == content, "the old file is untouched"
