"""The page of published numbers beside baselines: what it says is what the transcribed tables give."""

import importlib.util
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


@pytest.fixture(scope="module")
def papers():
    spec = importlib.util.spec_from_file_location("papers", RESULTS / "papers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_command_prints(papers):
    assert (RESULTS / "papers.md").read_text(encoding="utf-8") == papers.page() + "\n"


@pytest.mark.parametrize(
    ("table", "by_map", "by_source", "elsewhere", "better", "gain", "ahead"),
    [("2_fets", 0.0189, 0.0513, 0.0128, 6, 4.37, (29, 5)), ("1_iseg", 0.0157, 0.0116, 0.0069, 2, 1.77, (30, 6))],
)
def test_a_better_source_is_worth_more_than_the_map_on_fets_and_less_on_iseg(
    papers, table, by_map, by_source, elsewhere, better, gain, ahead
):
    name = f"risk_map_table{table}"
    found, ours = papers.sources(name), papers.methods(name).loc["ours"]
    gained = found.mean() - found["vanilla, random source"].mean()
    assert gained["risk map, random source"] == pytest.approx(by_map, abs=5e-5)
    assert gained["vanilla, best source"] == pytest.approx(by_source, abs=5e-5)
    assert gained["vanilla, best elsewhere"] == pytest.approx(elsewhere, abs=5e-5)
    assert (found["vanilla, best source"] > found["risk map, random source"]).sum() == better
    assert 100 * ours["gain"] == pytest.approx(gain, abs=0.005)
    assert (ours["pairs ahead"], ours["targets with all sources ahead"]) == ahead


@pytest.mark.parametrize(("table", "percent"), [("table2_fets", 4.37), ("table1_iseg", 1.81)])
def test_the_papers_headline_is_of_rounded_averages(papers, table, percent):
    dice = papers.read(f"risk_map_{table}")
    mean = dice[dice["source"] == "AVERAGE"].groupby("method")["dice"].mean().round(4)
    assert round(100 * (mean["ours"] / mean["vanilla"] - 1), 2) == percent


def test_the_printed_average_of_wm_t1_is_not_that_of_its_cells(papers):
    name = "risk_map_table1_iseg"
    printed = papers.read(name).query("target == 'WM-T1' and method == 'ours' and source == 'AVERAGE'")["dice"].item()
    assert (printed, papers.cells(name).loc["WM-T1", "ours"].mean().round(4)) == (0.8812, 0.8798)


def test_fewer_slices(papers):
    assert (100 * papers.slices()["gain"]).round(2).to_dict() == {400: 2.20, 100: 2.12, 50: 2.86}


def test_the_path_gains_less_over_the_nearest_source_than_over_its_own_first_task(papers):
    gains = 100 * papers.path_gains()
    assert gains.loc["direct", "gain on FeTS 2022"] == pytest.approx(6.00, abs=0.005)
    two, others = gains.loc[["direct", "single, ours"]], ["single, LEEP", "multi, best"]
    assert two["mean of the gains"].to_list() == pytest.approx([2.585, 1.230], abs=6e-4)
    assert two["gain of the means"].to_list() == pytest.approx([2.289, 1.117], abs=6e-4)
    assert (gains["ahead"].loc[[*two.index, *others]] / 100).to_list() == [2, 2, 3, 0]


def test_table_3_by_data_set(papers):
    best = papers.best_per_target()
    assert best["path ahead"].to_dict() == {"FeTS 2022": 9, "iSeg-2019": 4, "WMH": 3}
    assert best["single, Table 3"].round(2).to_list() == [72.01, 80.25, 91.63]
