"""Reports on tables small enough to work out by hand, and on what they must refuse or say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medtl_ext import InputError
from medtl_ext.ranking import holm
from medtl_ext.transfer.report import ALL_PAIRS, audit_report, compare_report, patient_table


def make_rows(dice, **fixed):
    """Rows from a mapping (subject, class) -> Dice of one run."""
    keys = pd.DataFrame(list(dice), columns=["subject", "class"])
    return keys.assign(dice=list(dice.values()), iou=[d / (2 - d) for d in dice.values()], **fixed)


def run(values, *, prefix="p", **fixed):
    """One run of one class, a value per patient."""
    return make_rows({(f"{prefix}{i}", "ED"): value for i, value in enumerate(values)}, **fixed)


@pytest.fixture
def two_runs():
    """Two seeds, two patients, two classes."""
    first = {("p0", "ED"): 0.8, ("p0", "ET"): 0.6, ("p1", "ED"): 0.4, ("p1", "ET"): 1.0}
    second = {("p0", "ED"): 0.9, ("p0", "ET"): 0.7, ("p1", "ED"): 0.5, ("p1", "ET"): 0.9}
    tables = [make_rows(dice, method="full", seed=seed, split="val") for seed, dice in enumerate([first, second])]
    return pd.concat(tables, ignore_index=True).assign(empty=[False, False, True, True, False, False, False, False])


class TestTables:
    def test_classes_are_averaged_within_a_patient(self, two_runs):
        table = patient_table(two_runs)
        assert table["dice"].tolist() == pytest.approx([0.7, 0.7, 0.8, 0.7])
        assert table["empty"].tolist() == [0, 2, 0, 0]
        assert list(table.columns) == ["split", "method", "seed", "subject", "dice", "iou", "empty"]

    def test_scans_of_a_patient_are_one_patient(self, two_runs):
        table = patient_table(two_runs.assign(patient="p"))
        assert table["subject"].tolist() == ["p", "p"]
        assert table["dice"].tolist() == pytest.approx([0.7, 0.75])
        assert table["empty"].tolist() == [2, 0]

    def test_a_subject_without_a_patient_is_one(self, two_runs):
        table = patient_table(two_runs.assign(patient=np.where(two_runs["subject"] == "p0", "a", None)))
        assert table["subject"].tolist() == ["a", "p1"] * 2

    def test_patients_then_runs(self, two_runs):
        (row,) = summarize(two_runs).to_dict("records")
        assert row["mean"] == pytest.approx(0.725)
        assert row["sd"] == pytest.approx(np.std([0.70, 0.75], ddof=1))
        assert (row["runs"], row["patients"]) == (2, 2)
        assert np.isnan(summarize(two_runs[two_runs["seed"] == 0])["sd"].item())

    def test_source_checkpoints_are_runs_and_scratch_needs_none(self):
        rows = [run([0.5, 0.7], method="vanilla", seed=0, source_seed=s, split="test") for s in (0, 1)]
        rows.append(run([0.6, 0.6], method="scratch", seed=0, source_seed=np.nan, split="test"))
        table = summarize(pd.concat(rows, ignore_index=True)).set_index("method")
        assert table["runs"].to_dict() == {"vanilla": 2, "scratch": 1}

    def test_survives_csv(self, two_runs, tmp_path):
        two_runs.to_csv(tmp_path / "rows.csv", index=False)
        pd.testing.assert_frame_equal(summarize(pd.read_csv(tmp_path / "rows.csv")), summarize(two_runs))

    def test_refuses_missing_columns_duplicates_nan_and_nothing(self, two_runs):
        twice = pd.concat([two_runs, two_runs.head(1)], ignore_index=True)
        for rows, said in [
            (two_runs.drop(columns="subject"), r"lack the column.*subject"),
            (twice, "full, seed 0, patient p0, class ED twice in split val"),
            (two_runs.assign(dice=two_runs["dice"].drop(3)), r"1 of 8 results are not finite.*patient p1, class ET"),
            (two_runs.head(0), "empty"),
        ]:
            with pytest.raises(InputError, match=said):
                patient_table(rows)


VALIDATION = {
    "zero_shot": [0.20, 0.25, 0.22, 0.30, 0.18],
    "scratch": [0.62, 0.66, 0.60, 0.71, 0.59],
    "full": [0.52, 0.55, 0.49, 0.62, 0.50],
    "risk_map": [0.42, 0.44, 0.40, 0.53, 0.37],
}


@pytest.fixture
def audit_rows():
    validation = [run(values, method=arm, seed=0, split="val") for arm, values in VALIDATION.items()]
    test = [run(values[::-1], prefix="t", method=arm, seed=0, split="test") for arm, values in VALIDATION.items()]
    return pd.concat([*validation, *test], ignore_index=True)


class TestAudit:
    def test_no_arm_wins_where_nothing_is_found(self, audit_rows, tmp_path):
        text = audit_report(audit_rows.assign(dice=0.0), tmp_path, method="risk_map").text
        assert "Every mean is 0: no arm has found anything." in text
        assert "no arm is ahead of zero_shot there" in text
        assert "highest mean" not in text

    def test_says_do_not_transfer_and_writes_it_down(self, audit_rows, tmp_path):
        verdict = audit_report(audit_rows, tmp_path, method="risk_map", synthetic=True)
        assert verdict.recommendation == "scratch"
        assert verdict.text.startswith("Do not transfer this source")
        assert "full is worse than scratch by 0.100" in verdict.text
        assert "risk_map is worse than scratch by 0.204" in verdict.text
        assert "Check on 5 test patients" in verdict.text
        assert "scratch has the highest mean there too" in verdict.text
        assert "synthetic" in verdict.text
        assert sorted(file.name for file in tmp_path.iterdir()) == ["audit.csv", "audit.json", "audit.png"]
        assert (tmp_path / "audit.png").stat().st_size > 5000

    def test_visits_do_not_make_patients(self, audit_rows, tmp_path):
        """Two patients who were scanned three times each are too few, however clear the six scans."""
        scans = audit_rows[audit_rows["subject"].isin(["p0", "p1", "t0", "t1"])]
        rows = [scans.assign(subject=scans["subject"] + f"-visit{n}", patient=scans["subject"]) for n in range(3)]
        verdict = audit_report(pd.concat(rows, ignore_index=True), tmp_path, method="risk_map", synthetic=True)
        assert verdict.recommendation is None
        assert "2 validation patients cannot settle this" in verdict.text

    def test_its_files_are_strict_and_complete(self, audit_rows, tmp_path):
        verdict = audit_report(audit_rows, tmp_path, method="risk_map")
        text = (tmp_path / "audit.json").read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert content["recommendation"] == content["default"] == "scratch"
        assert content["negative_transfer"] == ["full", "risk_map"]
        assert content["text"] == verdict.text
        assert (content["method"], content["decided_on"], content["runs_per_arm"]) == ("risk_map", "val", 1)
        assert content["synthetic"] is False
        assert [row["arm"] for row in content["tables"]["val"]] == ["scratch", "full", "risk_map", "zero_shot"]
        assert content["tables"]["val"][0]["p"] is None
        assert content["tables"]["test"][1]["difference"] == pytest.approx(-0.1)
        table = pd.read_csv(tmp_path / "audit.csv")
        assert table["split"].value_counts().to_dict() == {"val": 4, "test": 4}
        assert table["mean"].iloc[0] == pytest.approx(np.mean(VALIDATION["scratch"]))

    def test_validation_decides_and_test_disagrees_aloud(self, audit_rows, tmp_path):
        flipped = audit_rows["split"].eq("test")
        audit_rows.loc[flipped, "method"] = audit_rows.loc[flipped, "method"].map(
            {"scratch": "full", "full": "scratch", "risk_map": "risk_map", "zero_shot": "zero_shot"}
        )
        verdict = audit_report(audit_rows, tmp_path, method="risk_map")
        assert verdict.recommendation == "scratch"
        assert "scratch is 0.100 (95 % interval 0.0" in verdict.text
        assert "behind full there" in verdict.text

    def test_counts_empty_cases(self, audit_rows, tmp_path):
        verdict = audit_report(audit_rows.assign(empty=audit_rows.index < 3), tmp_path, method="risk_map")
        assert "In 3 of 40 cases a class is absent from truth and prediction" in verdict.text
        assert "absent" not in audit_report(audit_rows, tmp_path, method="risk_map").text

    def test_seeds_are_averaged_and_counted(self, audit_rows, tmp_path):
        trained = audit_rows[audit_rows["method"] != "zero_shot"].assign(seed=1, dice=lambda rows: rows["dice"] + 0.02)
        verdict = audit_report(pd.concat([audit_rows, trained], ignore_index=True), tmp_path, method="risk_map")
        assert verdict.table["mean"].iloc[0] == pytest.approx(np.mean(VALIDATION["scratch"]) + 0.01)
        assert "One training run" not in verdict.text

    def test_three_validation_patients_cannot_settle_it(self, audit_rows, tmp_path):
        few = audit_rows[audit_rows["subject"].isin(["p0", "p1", "p2"])]
        verdict = audit_report(few, tmp_path, method="risk_map")
        assert verdict.recommendation is None
        assert "3 validation patients cannot settle this" in verdict.text
        one = audit_rows[audit_rows["subject"].isin(["p0", "t0"])]  # as many as a small clinic may have
        assert "1 validation patient cannot settle" in audit_report(one, tmp_path, method="risk_map").text

    def test_refuses_other_splits_methods_and_patients(self, audit_rows, tmp_path):
        for rows, method, said in [
            (audit_rows[audit_rows["split"] == "test"], "risk_map", "decided on split 'val'; found test"),
            (audit_rows, "trs_map", "no results of 'trs_map'; found zero_shot, scratch"),
            (audit_rows.drop(index=0), "risk_map", "same subjects"),
        ]:
            with pytest.raises(InputError, match=said):
                audit_report(rows, tmp_path, method=method)
        assert not list(tmp_path.iterdir())


METHODS = {"vanilla": 0.0, "risk_map": 0.05, "prior_image": 0.05, "scratch": -0.1}


@pytest.fixture
def compare_rows():
    """Two pairs, eight patients each; in the second, training from scratch is far ahead."""
    rng = np.random.default_rng(0)
    tables = []
    for pair, scratch in (("A", -0.1), ("B", 0.2)):
        difficulty = rng.normal(0.5, 0.1, 8)
        for method, effect in (METHODS | {"scratch": scratch}).items():
            for seed in (0, 1):
                for source_seed in (np.nan,) if method == "scratch" else (0, 1):
                    values = difficulty + effect + rng.normal(0, 0.005, 8)
                    keys = {"pair": pair, "slices": 50, "method": method, "seed": seed, "source_seed": source_seed}
                    tables.append(run(values, prefix=pair, split="test", **keys))
    return pd.concat(tables, ignore_index=True)


class TestComparison:
    def test_patients_are_the_unit(self, compare_rows, tmp_path):
        table = compare_report(compare_rows, tmp_path).set_index(["pair", "method"])
        values = compare_rows[compare_rows["pair"] == "A"].pivot_table(index="subject", columns="method", values="dice")
        others = ["risk_map", "prior_image", "scratch"]
        p = [stats.wilcoxon(values[method], values["vanilla"]).pvalue for method in others]
        assert table.loc["A"].loc[others, "p"].tolist() == pytest.approx(p)
        assert table.loc["A"].loc[others, "p_holm"].tolist() == pytest.approx(holm(p))
        row = table.loc[("A", "risk_map")]
        assert row["difference"] == pytest.approx((values["risk_map"] - values["vanilla"]).mean())
        assert (row["runs"], row["patients"], row["runs_ahead"], row["runs_matched"]) == (4, 8, 4, 4)

    def test_scratch_without_source_is_matched_by_seed(self, compare_rows, tmp_path):
        table = compare_report(compare_rows, tmp_path).set_index(["pair", "method"])
        assert table.loc[("A", "scratch"), ["runs", "runs_ahead", "runs_matched"]].tolist() == [2, 0, 2]
        assert table.loc[("B", "scratch"), ["runs", "runs_ahead", "runs_matched"]].tolist() == [2, 2, 2]

    def test_untouched_source_is_matched_by_checkpoint(self, compare_rows, tmp_path):
        untouched = compare_rows[compare_rows["method"].eq("vanilla") & compare_rows["seed"].eq(0)]
        untouched = untouched.assign(method="zero_shot", seed=np.nan, dice=untouched["dice"] - 0.1)
        rows = pd.concat([compare_rows, untouched], ignore_index=True)
        table = compare_report(rows, tmp_path).set_index(["pair", "method"])
        assert table.loc[("A", "zero_shot"), ["runs", "runs_ahead", "runs_matched"]].tolist() == [2, 0, 2]

    def test_all_pairs_pool_the_patients(self, compare_rows, tmp_path):
        table = compare_report(compare_rows, tmp_path).set_index(["pair", "method"])
        pooled = table.loc[(ALL_PAIRS, "risk_map")]
        assert pooled["patients"] == 16
        assert pooled["mean"] == pytest.approx(table.loc[[("A", "risk_map"), ("B", "risk_map")], "mean"].mean())
        single = compare_report(compare_rows[compare_rows["pair"] == "A"], tmp_path)
        assert ALL_PAIRS not in set(single["pair"])

    def test_a_patient_of_two_pairs_counts_once(self, compare_rows, tmp_path):
        compare_rows["subject"] = compare_rows["subject"].str.replace("B", "A")
        table = compare_report(compare_rows, tmp_path)
        assert table.loc[table["pair"] == ALL_PAIRS, "patients"].tolist() == [8] * 4

    @staticmethod
    def text(rows, folder):
        compare_report(rows, folder)
        return (folder / "comparison.md").read_text(encoding="utf-8")

    def test_text_says_what_the_numbers_show(self, compare_rows, tmp_path):
        text = self.text(compare_rows, tmp_path)
        assert "all pairs, 50 slices: better than vanilla (corrected p < .05): risk_map (+0.0" in text
        assert "risk_map against the controls that never saw the source: prior_image" in text
        assert "no evidence that knowing the source adds" in text
        assert "B, 50 slices: training from scratch is best, ahead of" in text
        assert "do not transfer this source with these methods" in text
        assert "A, 50 slices: training from scratch" not in text

    def test_text_admits_a_risk_map_that_beats_its_controls(self, compare_rows, tmp_path):
        compare_rows.loc[compare_rows["method"] == "risk_map", "dice"] += 0.05
        assert "it beats all of them" in self.text(compare_rows, tmp_path)

    def test_text_says_when_tests_cannot_speak(self, compare_rows, tmp_path):
        few = compare_rows[compare_rows["subject"].isin(["A0", "A1", "A2", "A3", "A4"])]
        said = "Too few patients for any corrected p to reach .05, whatever the Dice: A (at least 0.19)"
        assert said in self.text(few, tmp_path)

    def test_files(self, compare_rows, tmp_path):
        table = compare_report(compare_rows, tmp_path, synthetic=True)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["comparison.csv", "comparison.md", "comparison.png"]
        assert len(pd.read_csv(tmp_path / "comparison.csv")) == len(table) == 12
        page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
        assert "All data are synthetic" in page
        assert "seeds 0, 1; source checkpoints 0, 1" in page
        section = page.split("## B, 50 slices")[1].split("##")[0]
        bold = [line for line in section.splitlines() if "**" in line]
        assert [line.split("|")[1].strip() for line in bold] == ["scratch"]
        assert "| prior_image | control |" in section
        assert "| reference |" in section
        assert "2 of 2" in section

    def test_refuses_missing_columns_reference_and_split(self, compare_rows, tmp_path):
        without = compare_rows[(compare_rows["pair"] == "A") | (compare_rows["method"] != "vanilla")]
        for rows, said in [
            (compare_rows.drop(columns="source_seed"), r"lack the column.*source_seed"),
            (without, "Pair B with 50 slices has no results of the reference 'vanilla'"),
            (compare_rows.assign(split="val"), "No results for split 'test'; found val"),
        ]:
            with pytest.raises(InputError, match=said):
                compare_report(rows, tmp_path)
        assert not list(tmp_path.iterdir())
