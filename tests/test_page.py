"""report.html: what is on the page, and that it needs nothing else."""

from __future__ import annotations

import base64
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from medtl_ext import InputError
from medtl_ext.transfer import html_report
from medtl_ext.visualize import save_figure

VOID = {"meta", "img", "br"}
EVIL = "<script>alert('\"&')</script>"


class Page(HTMLParser):
    """A page as its elements: refuses tags that are not closed in order, and keeps what a test asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"{self.open} are never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip("\n")

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag != "style").split())

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path, **changed) -> Page:
    settings = {"title": "A title", "question": "A question?", "synthetic": False} | changed
    return Page(html_report(folder, **settings))


@pytest.fixture
def finished(tmp_path) -> Path:
    """What a run leaves: text, figure, table, config."""
    (tmp_path / "answer.txt").write_text("No evidence to prefer.\n\nTo use it:\npython -m monai.bundle run --x 'y'\n")
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    save_figure(figure, tmp_path / "ranking.png")
    pd.DataFrame({"source": ["a", "b"], "rank": [1.0, np.nan], "score": [0.12345, 2e-5]}).to_csv(
        tmp_path / "scores.csv", index=False
    )
    config = {"epochs": 3, "task": "17-T2-ED", "roi": [8, 8], "off": None, "same": "@epochs", "run": ["x"]}
    config |= {"built": "$1 + 1", "network": {"_target_": "UNet"}, "list": ["$x"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# The page


def test_the_page_needs_nothing_else(finished):
    page = page_of(finished, synthetic=True)
    assert not page.named("script")
    assert not page.named("link")
    assert len(page.named("style")) == 1
    addresses = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "srcset")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    style = next(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert page.named("html") == [{"lang": "en"}]


def test_verdict_then_figures_then_tables_then_how_it_was_made(finished):
    text = page_of(finished, synthetic=True).text
    order = [
        "A title",
        "A question?",
        "Synthetic data.",
        "No evidence to prefer.",
        "Figures",
        "Tables",
        "How it was made",
    ]
    places = [text.rindex(part) for part in order]
    assert places == sorted(places)


def test_what_an_answer_quotes_is_not_said_twice(finished):
    for name, text in {"audit": "No evidence to prefer.", "plan": "The best path."}.items():
        (finished / f"{name}.json").write_text(json.dumps({"text": text}))
    text = page_of(finished).text
    assert text.count("No evidence to prefer.") == 1
    assert text.count("The best path.") == 1


def test_only_synthetic_data_are_called_synthetic(finished):
    assert "Synthetic data" not in page_of(finished, synthetic=False).text


def test_the_figure_is_in_the_page(finished):
    (image,) = page_of(finished).named("img")
    assert base64.b64decode(image["src"].split(",")[1]) == (finished / "ranking.png").read_bytes()
    assert image["alt"]


def test_the_command_and_the_options_are_shown(finished):
    page = page_of(finished)
    codes = [text for tag, text in page.texts if tag == "code"]
    assert codes[0].strip() == "python -m monai.bundle run --x 'y'"
    assert codes[1] == f"python -m monai.bundle run --config_file {finished / 'config.json'} --output_dir again"
    assert page.tables[-1] == [["option", "value"], ["epochs", "3"], ["task", "17-T2-ED"], ["roi", "[8, 8]"]]
    assert f"torch {torch.__version__}" in page.text


def test_numbers_are_rounded_and_whole_numbers_stay_whole(finished):
    table = pd.DataFrame(
        {"rank": [1.0, 12.0, np.nan], "dice": [0.12345, 0.0, 1.0], "p": [2e-5, 0.25, np.nan], "e": np.nan}
    )
    table.to_csv(finished / "scores.csv", index=False)
    expected = [["rank", "dice", "p"], ["1", "0.123", "2.0e-05"], ["12", "0.000", "0.250"], ["", "1.000", ""]]
    assert page_of(finished).tables[0] == expected


def test_a_wide_table_is_shown_on_its_side(finished):
    pd.DataFrame({f"column_{i}": ["a", "b"] for i in range(20)}).to_csv(finished / "scores.csv", index=False)
    table = page_of(finished).tables[0]
    assert table[:2] == [["column 0", "a", "b"], ["column 1", "a", "b"]]
    assert len(table) == 20


def test_a_long_table_is_folded_and_cut_with_a_word(finished):
    pd.DataFrame({"n": range(1000)}).to_csv(finished / "scores.csv", index=False)
    page = page_of(finished)
    assert len(page.tables[0]) == 301
    assert page.named("details")[0] == {}
    assert "700 more rows are in scores.csv" in page.text


def test_scores_of_patients_are_averaged_above(finished):
    rows = {"method": "full", "split": ["val", "test", "test"], "subject": ["001", "002", "003"], "class": "ED"}
    pd.DataFrame(rows | {"dice": [0.5, 0.4, 0.8]}).to_csv(finished / "metrics.csv", index=False)
    means = page_of(finished).tables[0]
    assert means[0] == ["method", "split", "class", "patients", "dice", "dice sd"]
    assert means[2] == ["full", "test", "ED", "2", "0.600", "0.283"]
    assert page_of(finished).tables[1][1] == ["full", "val", "001", "ED", "0.500"]
    scans = pd.DataFrame(rows | {"patient": ["a", "b", "c"], "dice": [0.5, 0.4, 0.8]})
    again = scans.tail(1).assign(subject="004", dice=0.4)  # c has two scans, of 0.6 in the mean
    pd.concat([scans, again]).to_csv(finished / "metrics.csv", index=False)
    assert page_of(finished).tables[0][2] == ["full", "test", "ED", "2", "0.500", "0.141"]


def test_a_report_in_markdown_is_shown_as_one(finished):
    lines = ["# Methods", "Means over **3** runs.", "## What it shows", "- a | b is best", "- **c** is not"]
    lines += ["## The pair", "| method | Dice |\n|---|---|\n| full | **0.5 ± 0.1** |\n| none |  |"]
    (finished / "comparison.md").write_text("\n\n".join(lines) + "\n")
    (finished / "comparison.csv").write_text("method,mean\nfull,0.5\n")
    page = page_of(finished)
    assert page.tables[0] == [["method", "Dice"], ["full", "0.5 ± 0.1"], ["none", ""]]
    assert len(page.named("li")) == 2
    assert "a | b is best c is not" in page.text
    assert [text for tag, text in page.texts if tag == "strong"][:2] == ["3", "c"]
    assert "comparison.csv)" not in page.text
    assert page.text.index("is not") < page.text.index("Figures") < page.text.index("The pair")
    assert "Methods " not in page.text


def test_what_was_typed_is_shown_as_a_shell_takes_it(finished, monkeypatch):
    (finished / "config.json").unlink()
    (finished / "answer.txt").unlink()
    typed = ["run", "--config_file", "['a b.json', 'c.json']", "--x", "it's $HOME", "--y", "1"]
    monkeypatch.setattr("sys.argv", ["monai/bundle/__main__.py", *typed])
    assert not [tag for tag, _ in page_of(finished).texts if tag == "code"], "not started by monai.bundle"
    monkeypatch.setattr("__main__.__spec__", SimpleNamespace(name="monai.bundle.__main__"))
    (command,) = [text for tag, text in page_of(finished).texts if tag == "code"]
    assert shlex.split(command) == ["python", "-m", "monai.bundle", *typed]
    assert "\"['a b.json', 'c.json']\"" in command


def test_everything_is_escaped(finished):
    (finished / "answer.txt").write_text(f"Use {EVIL}.\n\npython -m {EVIL}")
    (finished / "audit.json").write_text(json.dumps({"text": EVIL}))
    (finished / "study.md").write_text(f"# x\n\n- {EVIL}\n\n## **{EVIL}**\n\n| {EVIL} |\n|---|\n| **{EVIL}** |\n")
    (finished / "config.json").write_text(json.dumps({"collection": EVIL, EVIL: 1}))
    pd.DataFrame({EVIL: [EVIL]}).to_csv(finished / "scores.csv", index=False)
    (finished / "ranking.png").rename(finished / "a\" onerror='x'.png")
    page = page_of(finished, title=EVIL, question=EVIL)
    assert not page.named("script")
    assert all(set(image) == {"src", "alt"} for image in page.named("img"))
    assert page.text.count(EVIL) >= 12


def test_a_page_is_written_whole_or_not_at_all(finished):
    before = html_report(finished, title="1", question="", synthetic=False).read_text()
    names = {path.name for path in finished.iterdir()}
    (finished / "audit.json").write_text("{ broken")
    with pytest.raises(json.JSONDecodeError):
        html_report(finished, title="2", question="", synthetic=False)
    assert (finished / "report.html").read_text() == before
    assert {path.name for path in finished.iterdir()} == names | {"audit.json"}


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no text, table or figure"):
        html_report(tmp_path, title="", question="", synthetic=False)
    assert not (tmp_path / "report.html").exists()
