"""Reports on tables small enough to work out by hand, and on what they must refuse or say."""

import json

import numpy as np
import pandas as pd
import pytest
from bundle_runs import refused

from medtl_ext.ranking import holm, paired_comparison
from medtl_ext.transfer.report import ALL_PAIRS, audit_report, compare_report, patient_table


def run(values, *, prefix="p", classes=("ED",), **fixed):
    """One run, a value per patient and class."""
    keys = pd.MultiIndex.from_product([[f"{prefix}{i}" for i in range(len(values) // len(classes))], classes])
    table = pd.DataFrame(list(keys), columns=["subject", "class"])
    return table.assign(dice=values, iou=[value / (2 - value) for value in values], **fixed)


# Patients


@pytest.fixture
def two_runs():
    """Two seeds, two patients, two classes."""
    values = [[0.8, 0.6, 0.4, 1.0], [0.9, 0.7, 0.5, 0.9]]
    runs = [run(v, classes=("ED", "ET"), method="full", seed=seed, split="val") for seed, v in enumerate(values)]
    return pd.concat(runs, ignore_index=True).assign(empty=[False, False, True, True, False, False, False, False])


def test_classes_are_averaged_within_a_patient(two_runs):
    table = patient_table(two_runs)
    assert table["dice"].tolist() == pytest.approx([0.7, 0.7, 0.8, 0.7])
    assert table["empty"].tolist() == [0, 2, 0, 0]
    assert list(table.columns) == ["split", "method", "seed", "subject", "dice", "iou", "empty"]


def test_scans_of_a_patient_are_one_patient_and_a_subject_without_is_one(two_runs):
    table = patient_table(two_runs.assign(patient="p"))
    assert table["subject"].tolist() == ["p", "p"]
    assert table["dice"].tolist() == pytest.approx([0.7, 0.75])
    assert table["empty"].tolist() == [2, 0]
    table = patient_table(two_runs.assign(patient=np.where(two_runs["subject"] == "p0", "a", None)))
    assert table["subject"].tolist() == ["a", "p1"] * 2


def test_tables_that_make_no_sense_are_refused(two_runs):
    twice = pd.concat([two_runs, two_runs.head(1)], ignore_index=True)
    for rows, said in [
        (two_runs.drop(columns="subject"), "lack the column(s) subject"),
        (twice, "full, seed 0, patient p0, class ED twice in split val"),
        (
            two_runs.assign(dice=two_runs["dice"].drop(3)),
            "1 of 8 results are not finite, the first for full, patient p1",
        ),
        (two_runs.head(0), "empty"),
    ]:
        assert said in refused(lambda rows=rows: patient_table(rows))


# Audits

VALIDATION = {
    "zero_shot": [0.20, 0.25, 0.22, 0.30, 0.18],
    "scratch": [0.62, 0.66, 0.60, 0.71, 0.59],
    "full": [0.52, 0.55, 0.49, 0.62, 0.50],
    "risk_map": [0.42, 0.44, 0.40, 0.53, 0.37],
}


@pytest.fixture
def audited():
    validation = [run(values, method=arm, seed=0, split="val") for arm, values in VALIDATION.items()]
    test = [run(values[::-1], prefix="t", method=arm, seed=0, split="test") for arm, values in VALIDATION.items()]
    return pd.concat([*validation, *test], ignore_index=True)


def of_patients(rows, *numbers):
    return rows[rows["subject"].str[1:].astype(int).isin(numbers)]


def visits(rows):
    """Two patients who were scanned three times each."""
    rows = of_patients(rows, 0, 1)
    scans = [rows.assign(subject=rows["subject"] + f"-visit{n}", patient=rows["subject"]) for n in range(3)]
    return pd.concat(scans, ignore_index=True)


def disagreeing(rows):
    """On the test patients full is ahead of scratch."""
    turned = {"scratch": "full", "full": "scratch"}
    return rows.assign(method=rows["method"].where(rows["split"] == "val", rows["method"].replace(turned)))


def seeds(rows):
    again = rows[rows["method"] != "zero_shot"]
    return pd.concat([rows, again.assign(seed=1, dice=again["dice"] + 0.02)], ignore_index=True)


PLAIN = [
    "Do not transfer this source",
    "full is worse than scratch by 0.100",
    "risk_map is worse than scratch by 0.204",
]
PLAIN += ["Check on 5 test patients", "scratch has the highest mean there too", "synthetic", "One training run"]
NOTHING = ["Every mean is 0: no arm has found anything.", "no arm is ahead of zero_shot there"]
EMPTY = ["In 3 of 40 cases a class is absent from truth and prediction"]


@pytest.mark.parametrize(
    ("change", "recommended", "said", "never"),
    [
        (lambda rows: rows, "scratch", PLAIN, "absent"),
        (disagreeing, "scratch", ["scratch is 0.100 (95 % interval 0.0", "behind full there"], "there too"),
        (seeds, "scratch", ["2 training runs per arm: intervals and tests are over patients and"], "One training run"),
        (visits, None, ["2 validation patients cannot settle this"], "Do not"),
        (lambda rows: of_patients(rows, 0, 1, 2), None, ["3 validation patients cannot settle this"], "Do not"),
        (
            lambda rows: of_patients(rows, 0),
            None,
            ["1 validation patient cannot settle", "guess is training"],
            "Do not",
        ),
        (lambda rows: rows.assign(dice=0.0), None, NOTHING, "highest mean"),
        (lambda rows: rows.assign(empty=rows.index < 3), "scratch", EMPTY, "cannot settle"),
    ],
    ids=["plain", "test disagrees", "seeds", "visits", "three", "one", "nothing found", "empty"],
)
def test_an_audit_says_what_the_numbers_show(change, recommended, said, never, audited, tmp_path):
    verdict = audit_report(change(audited), tmp_path, method="risk_map", synthetic=True)
    assert verdict.recommendation == recommended
    assert [part for part in said if part not in verdict.text] == []
    assert never not in verdict.text
    if change is seeds:
        assert verdict.table["mean"].iloc[0] == pytest.approx(np.mean(VALIDATION["scratch"]) + 0.01)
        assert verdict.table["spread"].iloc[0] == pytest.approx(0.02 / 2**0.5)
        assert dict(zip(verdict.table["arm"], verdict.table["trainings"], strict=True))["zero_shot"] == 1


def test_an_audit_names_the_arms_that_were_not_trained_to_the_end(audited, tmp_path):
    gains = {"full": 0.004, "scratch": 0.031, "risk_map": float("nan")}
    text = audit_report(audited, tmp_path, method="risk_map", late_gains=gains).text
    assert "end: scratch gained 0.031 in the last two fifths of the training; compare with more --epochs." in text
    assert "trained to the end" not in audit_report(audited, tmp_path, method="risk_map").text


def test_a_cross_validated_audit_says_so_and_shows_what_the_arms_took(audited, tmp_path):
    took = {"scratch": 12.0, "full": 8.0}
    text = audit_report(audited, tmp_path, method="risk_map", folds=5, minutes=took).text
    assert "on 5 labelled patients is 0.636" in text
    assert "Cross-validation in 5 folds, 5 trainings per arm: none saw the patients it scored." in text
    assert "One training run per arm" not in text
    table = pd.read_csv(tmp_path / "audit.csv")
    assert table[table["split"] == "val"].set_index("arm")["minutes"].dropna().to_dict() == took
    content = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert (content["folds"], content["tables"]["val"][0]["minutes"]) == (5, 12.0)


def test_the_files_of_an_audit_are_strict_and_complete(audited, tmp_path):
    verdict = audit_report(audited, tmp_path, method="risk_map")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["audit.csv", "audit.json", "audit.png", "audit.svg"]
    assert (tmp_path / "audit.png").stat().st_size > 5000
    text = (tmp_path / "audit.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = {"recommendation": "scratch", "default": "scratch", "negative_transfer": ["full", "risk_map"]}
    expected |= {"text": verdict.text, "method": "risk_map", "decided_on": "val", "runs_per_arm": 1, "synthetic": False}
    assert {key: content[key] for key in expected} == expected
    assert [row["arm"] for row in content["tables"]["val"]] == ["scratch", "full", "risk_map", "zero_shot"]
    assert content["tables"]["val"][0]["p"] is None
    assert content["tables"]["test"][1]["difference"] == pytest.approx(-0.1)
    table = pd.read_csv(tmp_path / "audit.csv")
    assert table["split"].value_counts().to_dict() == {"val": 4, "test": 4}
    assert table["mean"].iloc[0] == pytest.approx(np.mean(VALIDATION["scratch"]))


def test_an_audit_shows_distance_and_lesions_beside_dice_where_they_were_measured(audited, tmp_path):
    rows = audited.assign(hd95_mm=10 - 5 * audited["dice"], lesion_recall=audited["dice"] / 2)
    audit_report(rows, tmp_path, method="risk_map")
    table = pd.read_csv(tmp_path / "audit.csv")
    np.testing.assert_allclose(table["hd95_mm"], 10 - 5 * table["mean"])
    np.testing.assert_allclose(table["lesion_recall"], table["mean"] / 2)


def test_other_splits_methods_and_patients_are_refused(audited, tmp_path):
    for rows, method, said in [
        (audited[audited["split"] == "test"], "risk_map", "decided on split 'val'; found test"),
        (audited, "trs_map", "no results of 'trs_map'; found zero_shot, scratch"),
        (audited.drop(index=0), "risk_map", "same subjects"),
    ]:
        assert said in refused(lambda rows=rows, method=method: audit_report(rows, tmp_path, method=method))
    assert not list(tmp_path.iterdir())


# Comparisons


@pytest.fixture
def compared():
    """Two pairs, eight patients each; in the second, training from scratch is far ahead."""
    rng, tables = np.random.default_rng(0), []
    for pair, scratch in (("A", -0.1), ("B", 0.2)):
        difficulty = rng.normal(0.5, 0.1, 8)
        for method, effect in {"vanilla": 0.0, "risk_map": 0.05, "prior_image": 0.05, "scratch": scratch}.items():
            for seed in (0, 1):
                for source_seed in (np.nan,) if method == "scratch" else (0, 1):
                    values = difficulty + effect + rng.normal(0, 0.005, 8)
                    keys = {"pair": pair, "slices": 50, "method": method, "seed": seed, "source_seed": source_seed}
                    tables.append(run(values, prefix=pair, split="test", **keys))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def report(tmp_path):
    """The table of a comparison by pair and method, and the page; through a file, as a run keeps its rows."""

    def compare(rows, **options) -> tuple[pd.DataFrame, str]:
        rows.to_csv(tmp_path / "rows.csv", index=False)
        table = compare_report(pd.read_csv(tmp_path / "rows.csv"), tmp_path / "out", **options)
        return table.set_index(["pair", "method"]), (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")

    return compare


def test_patients_are_the_unit(compared, report):
    table = report(compared)[0].loc["A"]
    own = compared[compared["pair"] == "A"]
    values = own.pivot_table(index="subject", columns="method", values="dice")
    others = ["risk_map", "prior_image", "scratch"]
    keys = {name: ["seed", "source_seed"] for name in others} | {"scratch": ["seed"]}
    p = []
    for method in others:
        two = own[own["method"].isin([method, "vanilla"])].groupby("method")
        sides = [two.get_group(name).pivot_table("dice", "subject", keys[method]) for name in (method, "vanilla")]
        p.append(paired_comparison(*(dict(zip(of.index, of.to_numpy().tolist(), strict=True)) for of in sides)).p)
    assert table.loc[others, "p"].tolist() == pytest.approx(p)
    assert table.loc[others, "p_holm"].tolist() == pytest.approx(holm(p))
    row = table.loc["risk_map"]
    assert row["difference"] == pytest.approx((values["risk_map"] - values["vanilla"]).mean())
    runs = own[own["method"] == "risk_map"].groupby(["seed", "source_seed"])[["dice", "iou"]].mean()
    assert row[["mean", "iou"]].tolist() == pytest.approx(runs.mean().tolist())
    assert row["sd"] == pytest.approx(np.std(runs["dice"], ddof=1))
    assert (row["runs"], row["patients"], row["runs_ahead"], row["runs_matched"]) == (4, 8, 4, 4)
    single = report(own[own["seed"].eq(0) & ~own["source_seed"].eq(1)])[0]
    assert single["sd"].isna().all()


def test_what_differs_would_do_so_in_other_trainings_too(compared, report):
    """A placebo, the same arm with other seeds, has patients on its side in half of all comparisons; runs tell."""
    found = report(compared)[0].loc["A", "differs"]
    assert found.to_dict() == {"vanilla": False, "risk_map": True, "prior_image": True, "scratch": True}
    one_run = compared["method"].eq("risk_map") & compared["seed"].eq(0) & compared["source_seed"].eq(1)
    other = report(compared.assign(dice=compared["dice"] - 0.12 * one_run))[0].loc[("A", "risk_map")]
    assert other["difference"] > 0.01
    assert not other["differs"]
    alone = report(compared[compared["seed"].eq(0) & ~compared["source_seed"].eq(1)])[0].loc[("A", "risk_map")]
    assert alone["differs"]  # of single runs the patients alone are asked
    doubtful = compared[compared["method"].eq("vanilla") & compared["pair"].eq("A")]
    gap = doubtful["subject"].str[-1].astype(int).map(dict(enumerate(np.linspace(-0.004, 0.018, 8))))
    rows = [
        compared[compared["pair"].eq("A")],
        *(doubtful.assign(method=name, dice=doubtful["dice"] + gap) for name in ("dice_ce", "full")),
    ]
    weak = report(pd.concat(rows, ignore_index=True))[0].loc[("A", "full")]
    assert weak["p"] < 0.05 < weak["p_holm"]
    assert not weak["differs"]


def test_what_depends_on_no_source_or_no_seed_is_matched_by_the_other(compared, report):
    untouched = compared[compared["method"].eq("vanilla") & compared["seed"].eq(0)]
    untouched = untouched.assign(method="zero_shot", seed=np.nan, dice=untouched["dice"] - 0.1)
    table, _ = report(pd.concat([compared, untouched], ignore_index=True))
    runs = table[["runs", "runs_ahead", "runs_matched"]]
    assert runs.loc[[("A", "scratch"), ("B", "scratch"), ("A", "zero_shot")]].to_numpy().tolist() == [
        [2, 0, 2],
        [2, 2, 2],
        [2, 0, 2],
    ]


def test_all_pairs_pool_the_patients_and_one_of_two_pairs_counts_once(compared, report):
    table, _ = report(compared)
    pooled = table.loc[(ALL_PAIRS, "risk_map")]
    assert pooled["patients"] == 16
    assert pooled["mean"] == pytest.approx(table.loc[[("A", "risk_map"), ("B", "risk_map")], "mean"].mean())
    assert ALL_PAIRS not in report(compared[compared["pair"] == "A"])[0].index
    shared = compared.assign(subject=compared["subject"].str.replace("B", "A"))
    assert report(shared)[0].loc[ALL_PAIRS, "patients"].tolist() == [8] * 4


def test_sources_of_a_target_are_trainings_and_of_all_targets_a_mean(compared, report):
    """As in a matrix: each target is a source of the other too, so no training belongs to the patients of all."""
    others = {"A": "B", "B": "A"}
    rows = [compared.assign(source=source) for source in ("C", compared["pair"].map(others))]
    rows[1]["dice"] += 0.02 * rows[1]["method"].eq("risk_map")
    rows = pd.concat(rows, ignore_index=True)
    scratch = rows["method"].eq("scratch")
    rows = rows[~scratch | rows["source"].eq("C")].assign(source=lambda all: all["source"].mask(scratch))
    table, page = report(rows)
    assert "source checkpoints 0, 1 of 3 sources" in page
    assert table.loc[("A", "risk_map"), ["runs", "runs_matched"]].tolist() == [8, 8]
    assert table.loc[("A", "scratch"), "runs_matched"] == 2
    pooled = table.loc[(ALL_PAIRS, "risk_map")]
    assert pooled[["patients", "runs", "runs_matched"]].tolist() == [16, 4, 4]
    assert pooled["difference"] == pytest.approx(table.loc[[("A", "risk_map"), ("B", "risk_map")], "difference"].mean())


BETTER = "better than vanilla (corrected p < .05): risk_map (+0.0"
FOUND = [f"all pairs, 50 slices: {BETTER}", "All data are synthetic"]
FOUND += ["risk_map against the controls that never saw the source: prior_image", "seeds 0, 1; source checkpoints 0, 1"]
FOUND += ["no evidence that knowing the source adds", "B, 50 slices: training from scratch is best, ahead of"]


@pytest.mark.parametrize(
    ("change", "said", "never"),
    [
        (lambda rows: rows, [*FOUND, "do not transfer this source with these methods"], "A, 50 slices: training from"),
        (
            lambda rows: rows.assign(dice=rows["dice"] + 0.05 * rows["method"].eq("risk_map")),
            ["it beats all"],
            "no evid",
        ),
    ],
    ids=["plain", "beats its controls"],
)
def test_a_comparison_says_what_the_numbers_show(change, said, never, compared, report):
    _, page = report(change(compared), synthetic=True)
    assert [part for part in said if part not in page] == []
    assert never not in page


@pytest.mark.parametrize(
    ("change", "preferred", "verdict"),
    [
        (
            lambda rows: rows.assign(dice=rows["dice"] + 0.05 * rows["method"].eq("risk_map")),
            "risk_map",
            "Prefer risk_map to vanilla, by mean Dice of test patients (all pairs, 50 slices: risk_map is best, 0.",
        ),
        (
            lambda rows: rows.replace({"method": {"risk_map": "placebo"}}).query("method in ('placebo', 'vanilla')"),
            None,
            "No evidence to prefer one method to vanilla, by mean Dice of test patients (all pairs, 50 slices: placebo",
        ),
        (
            lambda rows: rows.assign(dice=rows["dice"] + 0.5 * rows["method"].eq("vanilla")),
            None,
            "No evidence to prefer one method to vanilla, by mean Dice of test patients (all pairs, 50 slices: vanilla",
        ),
    ],
    ids=["firm", "a placebo", "the reference"],
)
def test_the_verdict_of_a_comparison_is_first_and_then_what_to_type(change, preferred, verdict, compared, report):
    _, page = report(change(compared), what_next=lambda method: f"To go on with {method}:\npython -m x")
    title, first, then, *_ = page.split("\n\n")
    assert title == "# Methods compared"
    assert first.startswith(verdict)
    assert then == f"To go on with {preferred}:\npython -m x"


def test_the_files_of_a_comparison(compared, report, tmp_path):
    table, page = report(compared)
    assert sorted(file.stem for file in (tmp_path / "out").iterdir()) == ["comparison"] * 4  # the picture twice
    assert len(pd.read_csv(tmp_path / "out" / "comparison.csv")) == len(table) == 12
    section = page.split("## B, 50 slices")[1].split("##")[0]
    bold = [line for line in section.splitlines() if "**" in line]
    assert [line.split("|")[1].strip() for line in bold] == ["scratch"]
    assert all(part in section for part in ("| prior_image | control |", "| reference |", "2 of 2"))


def test_missing_columns_reference_and_split_are_refused(compared, tmp_path):
    without = compared[(compared["pair"] == "A") | (compared["method"] != "vanilla")]
    for rows, said in [
        (compared.drop(columns="source_seed"), "lack the column(s) source_seed"),
        (without, "Pair B with 50 slices has no results of the reference 'vanilla'"),
        (compared.assign(split="val"), "No results for split 'test'; found val"),
    ]:
        assert said in refused(lambda rows=rows: compare_report(rows, tmp_path))
    assert not list(tmp_path.iterdir())
