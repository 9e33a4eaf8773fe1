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
    """So every figure on it is watched; the two below are about what the papers print."""
    assert (RESULTS / "papers.md").read_text(encoding="utf-8") == papers.page() + "\n"


@pytest.mark.parametrize(("table", "percent"), [("table2_fets", 4.37), ("table1_iseg", 1.81)])
def test_the_papers_headline_is_of_rounded_averages(papers, table, percent):
    dice = papers.read(f"risk_map_{table}")
    mean = dice[dice["source"] == "AVERAGE"].groupby("method")["dice"].mean().round(4)
    assert round(100 * (mean["ours"] / mean["vanilla"] - 1), 2) == percent


def test_the_printed_average_of_wm_t1_is_not_that_of_its_cells(papers):
    name = "risk_map_table1_iseg"
    printed = papers.read(name).query("target == 'WM-T1' and method == 'ours' and source == 'AVERAGE'")["dice"].item()
    assert (printed, papers.cells(name).loc["WM-T1", "ours"].mean().round(4)) == (0.8812, 0.8798)
