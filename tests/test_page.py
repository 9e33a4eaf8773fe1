"""report.html: what is on the page, and that it needs nothing else."""

import base64
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import RISK_MAP, refused
from matplotlib.figure import Figure

from medtl_ext.transfer import Report
from medtl_ext.visualize import save_figure

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
EVIL = "<script>alert('\"&')</script>"
CONFIG = {"epochs": 3, "task": "17-T2-ED", "roi": [8, 8], "off": None, "same": "@epochs", "run": ["x"]}
CONFIG |= {"built": "$1 + 1", "network": {"_target_": "UNet"}, "list": ["$x"]}


def page_of(folder: Path, **changed) -> ElementTree.Element:
    """The page as its elements, of which every one has to be closed in order; scripts without what is in them."""
    here = SimpleNamespace(folder=folder, figures=True, leads=True, config=CONFIG)
    Report(**{"here": here, "title": "A title", "question": "A question?", "synthetic": False} | changed).write()
    text = (folder / "report.html").read_text(encoding="utf-8").replace("<details open>", "<details open=''>")
    text = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", text, flags=re.DOTALL)
    return ElementTree.fromstring(re.sub(r"<((?:meta|img|br)\b[^>]*)>", r"<\1/>", text))


def texts(page: ElementTree.Element, tag: str) -> list[str]:
    return [" ".join("".join(element.itertext()).split()) for element in page.iter(tag)]


def body(page: ElementTree.Element) -> str:
    return " ".join(" ".join(page.find("body").itertext()).split())


def tables(page: ElementTree.Element) -> list[list[list[str]]]:
    return [
        [["".join(cell.itertext()).strip("\n") for cell in row] for row in t.iter("tr")] for t in page.iter("table")
    ]


@pytest.fixture
def finished(tmp_path) -> Path:
    """What a run leaves: text, figure, table, config."""
    (tmp_path / "answer.txt").write_text("No evidence to prefer.\n\nTo use it:\npython -m monai.bundle run --x 'y'\n")
    for name, draw in {"ranking": "plot", "overlay": "imshow"}.items():
        figure = Figure(figsize=(1, 1))
        getattr(figure.subplots(), draw)([[0, 1], [1, 2]])
        save_figure(figure, tmp_path / f"{name}.png")
    (tmp_path / "scores.csv").write_text("source,rank,score\na,1,0.12345\nb,,0.5\n")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


# The page


def test_scores_of_patients_fit_on_the_page(tmp_path):
    row = {"method": "full", "seed": 0, "split": "test", "subject": "p1", "class": "ED", "dice": 0.5, "iou": 0.4}
    row |= {"hd95_mm": 7.25, "assd_mm": 2.5, "lesion_recall": 0.75, "lesion_precision": 0.125, "volume_ml": 3.5}
    rows = [row | {"truth_ml": 4.5, "empty": False}, row | {"subject": "p2", "hd95_mm": 8.25, "truth_ml": 4.5}]
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    means, patients, *_ = tables(page_of(tmp_path))
    shown = dict(zip(*means, strict=True))
    assert [shown[name] for name in ("hd95 mm", "lesion recall", "hd95 mm sd")] == ["7.750", "0.750", "0.707"]
    assert {"dice", "hd95 mm", "lesion recall", "volume ml", "truth ml"} <= set(patients[0])
    assert not {"assd mm", "lesion precision"} & set(patients[0])


def test_the_page_needs_nothing_else(finished):
    page = page_of(finished, synthetic=True)
    assert not list(page.iter("link"))
    (script,) = re.findall("<script>(.*?)</script>", (finished / "report.html").read_text(), flags=re.DOTALL)
    assert not [word for word in ("http", "fetch(", "import", ".src") if word in script]
    attributes = [item for element in page.iter() for item in element.attrib.items()]
    addresses = [value for name, value in attributes if name in ("src", "href", "srcset")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert all(value.startswith("#") for name, value in attributes if name == f"{{{LINK}}}href")
    (style,) = texts(page, "style")
    assert not [word for word in ("url(", "@import") if word in style]
    assert all(word in style for word in ("prefers-color-scheme: dark", "@media print"))
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert viewport in [element.attrib for element in page.iter("meta")]
    assert page.attrib == {"lang": "en"}


def test_verdict_then_figures_then_tables_then_how_it_was_made(finished):
    page = page_of(finished, synthetic=True)
    assert page.find(".//section/div").attrib == {"class": "lead"}
    text = body(page)
    parts = [
        "A title",
        "A question?",
        "Synthetic data.",
        "No evidence to prefer.",
        "What to do next",
        "To use it:",
        "Figures",
        "Tables",
        "How it was made",
    ]
    assert sorted(parts, key=text.rindex) == parts
    assert "Synthetic data" not in body(page_of(finished))


def test_what_an_answer_quotes_is_not_said_twice(finished):
    for name, text in {"graph": "No evidence to prefer.", "plan": "The best path."}.items():
        (finished / f"{name}.json").write_text(json.dumps({"text": text}))
    text = body(page_of(finished))
    assert [text.count(part) for part in ("No evidence to prefer.", "The best path.")] == [1, 1]


def test_figure_command_and_options_are_shown(finished):
    page = page_of(finished)
    (image,), (drawn,) = page.iter("img"), page.iter(f"{{{SVG}}}svg")
    assert base64.b64decode(image.get("src").split(",")[1]) == (finished / "overlay.png").read_bytes()
    assert image.get("alt")
    drawn.tail = None
    assert ElementTree.tostring(drawn) == ElementTree.tostring(ElementTree.parse(finished / "ranking.svg").getroot())
    again = f"python -m monai.bundle run --config_file {finished / 'config.json'} --output_dir again"
    assert texts(page, "code") == ["python -m monai.bundle run --x 'y'", again]
    assert tables(page)[-1] == [["option", "value"], ["epochs", "3"], ["task", "17-T2-ED"], ["roi", "[8, 8]"]]
    assert f"torch {torch.__version__}" in body(page)


PATIENTS = {"method": "full", "split": ["val", "test", "test"], "subject": ["001", "002", "003"], "class": "ED"}
TWICE = {"method": "full", "split": "test", "subject": ["2", "3", "4"], "patient": ["b", "c", "c"], "class": "ED"}
MEANS = ["method", "split", "class", "patients", "dice", "dice sd"]


@pytest.mark.parametrize(
    ("columns", "shown", "length"),
    [
        pytest.param(
            {"rank": [1.0, 12.0, np.nan], "dice": [0.12345, 0.0, 1.0], "p": [2e-5, 0.25, np.nan], "e": np.nan},
            [["rank", "dice", "p"], ["1", "0.123", "2.0e-05"], ["12", "0.000", "0.250"], ["", "1.000", ""]],
            4,
            id="numbers are rounded, whole ones stay whole",
        ),
        pytest.param(
            {f"column_{number}": ["a", "b"] for number in range(20)},
            [["column 0", "a", "b"], ["column 1", "a", "b"]],
            20,
            id="a wide table lies on its side",
        ),
        pytest.param({"n": range(1000)}, [["n"], ["0"]], 301, id="a long table is cut"),
        pytest.param(
            PATIENTS | {"dice": [0.5, 0.4, 0.8]},
            [MEANS, ["full", "val", "ED", "1", "0.500", ""], ["full", "test", "ED", "2", "0.600", "0.283"]],
            3,
            id="means are above scores of patients",
        ),
        pytest.param(
            TWICE | {"dice": [0.4, 0.8, 0.4]},  # two scans of c, of 0.6 in the mean
            [MEANS, ["full", "test", "ED", "2", "0.500", "0.141"]],
            2,
            id="scans of a patient are one patient",
        ),
    ],
)
def test_a_table_is_shown_as_people_read_it(columns, shown, length, finished):
    pd.DataFrame(columns).to_csv(finished / "scores.csv", index=False)
    page = page_of(finished)
    first, second, *_ = tables(page)
    assert first[: len(shown)] == shown
    assert len(first) == length
    assert ("open" in page.find(".//details").attrib) == (length < 300)
    assert ("700 more rows are in scores.csv" in body(page)) == (length == 301)
    if shown[0] == MEANS:
        assert second[1][2] == columns["subject"][0]  # text as it was


# What to do next


@pytest.fixture
def audited(finished) -> Path:
    """An audit of a bundle of this repository, which left the network of the arm that it advises."""
    (finished / "answer.txt").unlink()
    config = {"bundle_root": str(RISK_MAP.root), "target_task": "17-T2-ED", "audit": {"seeds": 1}}
    inference = json.loads((RISK_MAP.configs / "inference.json").read_text())
    config["network_def"] = inference["network_def"] | {"features": [4, 4, 8, 8, 8, 4]}
    (finished / "config.json").write_text(json.dumps(config))
    (finished / "model.pt").touch()
    (finished / "metrics.csv").write_text("class,dice\nED,0.5\nET,0.6\nNCR,0.7\n")
    return finished


@pytest.mark.parametrize(
    ("recommendation", "why", "options"),
    [
        ("full", ["Segment images of yours with full:"], {"--n_classes": "4", "--task": "17-T2-ED"}),
        (None, ["the best guess:", "To tell full and scratch apart:"], {"--audit#seeds": "3"}),
    ],
    ids=["decided", "no evidence"],
)
def test_an_audit_says_what_to_type_next(recommendation, why, options, audited):
    found = {"text": "So it is. More.", "recommendation": recommendation, "default": "full"}
    (audited / "audit.json").write_text(json.dumps(found | {"tied": ["full", "scratch"]}))
    page = page_of(audited)
    said, commands = body(page), [shlex.split(command) for command in texts(page, "code")[: len(why)]]
    assert [part for part in why if part not in said] == []
    words = commands[-1]
    assert {name: words[words.index(name) + 1] for name in options} == options
    first = commands[0]
    assert Path(first[first.index("--config_file") + 1]).resolve() == RISK_MAP.configs / "inference.json"
    assert Path(first[first.index("--ckpt") + 1]).resolve() == (audited / "model.pt").resolve()
    assert first[first.index("--network_def#features") + 1] == "[4, 4, 8, 8, 8, 4]"


def test_a_report_in_markdown_is_shown_as_one(finished):
    lines = ["# Methods", "Means over **3** runs. More.", "To go on:\npython -m x", "## What it shows"]
    lines += ["- a | b is best", "- **c** is not"]
    lines += ["## The pair", "| method | Dice |\n|---|---|\n| full | **0.5 ± 0.1** |\n| none |  |"]
    (finished / "comparison.md").write_text("\n\n".join(lines) + "\n")
    (finished / "comparison.csv").write_text("method,mean\nfull,0.5\n")
    (finished / "answer.txt").unlink()
    page = page_of(finished)
    text = body(page)
    (lead,) = page.findall(".//section/div")
    assert "".join(lead.itertext()).strip() == "Means over 3 runs."
    assert texts(page, "code")[0] == "python -m x"
    assert tables(page)[0] == [["method", "Dice"], ["full", "0.5 ± 0.1"], ["none", ""]]
    assert texts(page, "li") == ["a | b is best", "c is not"]
    assert texts(page, "strong")[:2] == ["3", "c"]
    assert "comparison.csv)" not in text
    assert text.index("is not") < text.index("Figures") < text.index("The pair")
    assert "Methods " not in text


def test_what_was_typed_is_shown_as_a_shell_takes_it(finished, monkeypatch):
    (finished / "config.json").unlink()
    (finished / "answer.txt").unlink()
    typed = ["run", "--config_file", "['a b.json', 'c.json']", "--x", "it's $HOME", "--y", "1"]
    monkeypatch.setattr("sys.argv", ["monai/bundle/__main__.py", *typed])
    assert not texts(page_of(finished), "code"), "not started by monai.bundle"
    monkeypatch.setattr("__main__.__spec__", SimpleNamespace(name="monai.bundle.__main__"))
    (command,) = texts(page_of(finished), "code")
    assert shlex.split(command) == ["python", "-m", "monai.bundle", *typed]
    assert "\"['a b.json', 'c.json']\"" in command


def test_everything_is_escaped(finished, monkeypatch):
    (finished / "answer.txt").write_text(f"Use {EVIL}.\n\npython -m {EVIL}")
    (finished / "plan.json").write_text(json.dumps({"text": EVIL}))
    (finished / "viewer.json").write_text(json.dumps({"classes": [EVIL], "by": EVIL, "views": [{"name": EVIL}]}))
    (finished / "study.md").write_text(f"# x\n\n- {EVIL}\n\n## **{EVIL}**\n\n| {EVIL} |\n|---|\n| **{EVIL}** |\n")
    pd.DataFrame({EVIL: [EVIL]}).to_csv(finished / "scores.csv", index=False)
    (finished / "overlay.png").rename(finished / "a\" onerror='x'.png")
    monkeypatch.setitem(CONFIG, EVIL, EVIL)
    page = page_of(finished, title=EVIL, question=EVIL)
    assert [script.attrib for script in page.iter("script")] == [{"type": "application/json", "id": "volumes"}, {}]
    assert "<script>alert" not in (finished / "report.html").read_text()
    assert all(set(image.attrib) == {"src", "alt"} for image in page.iter("img"))
    assert body(page).count(EVIL) + texts(page, "title").count(EVIL) >= 12


def test_a_page_is_written_whole_or_not_at_all(finished):
    page_of(finished)
    before, names = (finished / "report.html").read_text(), {path.name for path in finished.iterdir()}
    (finished / "plan.json").write_text("{ broken")
    with pytest.raises(json.JSONDecodeError):
        page_of(finished, title="2")
    assert (finished / "report.html").read_text() == before
    assert {path.name for path in finished.iterdir()} == names | {"plan.json"}


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "no text, table or figure" in refused(lambda: page_of(tmp_path))
    assert not (tmp_path / "report.html").exists()
