"""report.html: what is on the page, that it needs nothing else, and that every bundle's run makes one."""

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
from monai.bundle import ConfigWorkflow
from monai.networks.nets import BasicUNet

from medtl_ext import InputError
from medtl_ext.data import generate_phantom
from medtl_ext.transfer import html_report
from medtl_ext.transfer.config import identity
from medtl_ext.visualize import save_figure

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
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
    assert codes[0] == "python -m monai.bundle run --x 'y'"
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
    assert [text for tag, text in page.texts if tag == "li"] == ["a | b is best", " is not"]
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


# The bundles

FEATURES = [4, 4, 4, 4, 4, 4]
TINY = {
    "target_task": "17-T2-ED",
    "spacing": [6.0, 6.0, 8.0],
    "roi_size": [32, 32],
    "network_def#features": FEATURES,
    "train_slices": 8,
    "epochs": 2,
    "iterations_per_epoch": 2,
    "batch_size": 4,
    "val_interval": 1,
    "n_jobs": 1,
    "check_data": False,
    "progress": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Options for one patient a split, and a network that has learnt nothing."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"subjects": 3, "modalities": ["T2"], "n_jobs": 1, "progress": False}
    collection = generate_phantom(folder / "phantom", institutions=["17"], **settings)
    torch.save(BasicUNet(2, 1, 2, features=FEATURES, norm="batch").state_dict(), folder / "source.pt")
    return TINY | {"collection": str(collection), "source_ckpt": str(folder / "source.pt")}


@pytest.fixture(autouse=True)
def no_determinism_left_behind():
    yield
    torch.use_deterministic_algorithms(False)


def run(bundle: str, *names: str, **options) -> Path:
    files = [str(BUNDLES / bundle / "configs" / f"{name}.json") for name in names]
    workflow = ConfigWorkflow(files, workflow_type="train", **options)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return Path(options["output_dir"])


def risk_map(*names: str, data: dict, folder: Path, **options) -> Path:
    options = (
        data | {"source_task": "17-T2-ED", "audit#arms": [], "figures": False, "output_dir": str(folder)} | options
    )
    return run("risk_map", "train", *names, **options)


def test_risk_map_reports(data, tmp_path):
    folder = risk_map(data=data, folder=tmp_path / "out", figures=True)
    page = Page(folder / "report.html")
    assert len(page.named("img")) == 2
    assert "Synthetic data." in page.text
    assert "17-T2-ED to 17-T2-ED: risk_map" in page.text

    ckpt = {"ckpt": str(folder / "model.pt"), "figures": True}
    page = Page(risk_map("evaluate", data=data, folder=tmp_path / "again", **ckpt) / "report.html")
    assert "patients it never saw" in page.text
    assert ["train_slices", "8"] in page.tables[-1]


@pytest.mark.parametrize("quiet", [{"figures": False}, {"figures": True, "rank": 1}], ids=str)
def test_no_report_of_inner_runs_and_other_ranks(quiet, data, tmp_path):
    folder = risk_map("vanilla", data=data, folder=tmp_path / "out", **quiet)
    assert not (folder / "report.html").exists()
    assert not (folder / "tensorboard").exists()


def test_source_selection_reports(data, tmp_path):
    settings = {key: value for key, value in data.items() if key != "source_ckpt"}
    settings |= {"sources": [{"name": f"s{i}", "checkpoint": data["source_ckpt"], "n_classes": 2} for i in range(2)]}
    settings |= {"pixels": 20, "n_resamples": 5, "metrics": ["leep"], "decide_by": "leep"}
    folder = run("source_selection", "train", output_dir=str(tmp_path / "out"), **settings)
    page = Page(folder / "report.html")
    assert "Source selection for 17-T2-ED" in page.text
    assert (folder / "answer.txt").read_text().split()[0] in page.text
    assert {row[0] for row in page.tables[0][1:]} == {"s0", "s1", "scratch"}
    assert len(page.named("img")) == 1


@pytest.mark.parametrize(
    ("bundle", "name", "step", "text"),
    [
        ("risk_map", "compare", "studies.compare_methods", "comparison.md"),
        ("source_selection", "study", "selection.study_selection", "study.md"),
    ],
)
def test_comparisons_and_studies_report(bundle, name, step, text, data, tmp_path, monkeypatch):
    """What they compute is for their own tests: here the step leaves a page, as it does."""

    def leave_a_page(*, output_dir, **settings):
        Path(output_dir).mkdir()
        (Path(output_dir) / text).write_text("# What\n\n- dice_ce is best\n")

    monkeypatch.setattr(f"medtl_ext.{step}", leave_a_page)
    tasks = {"pairs": [["17-T2-ED", "17-T2-ED"]]} if bundle == "risk_map" else {"targets": ["17-T2-ED"]}
    settings = {"collection": data["collection"]}
    page = Page(run(bundle, name, output_dir=str(tmp_path / "out"), settings=settings, **tasks) / "report.html")
    assert "dice_ce is best" in page.text
    assert "Synthetic data." in page.text
    assert ["settings", json.dumps(settings)] in page.tables[-1]


@pytest.mark.parametrize("bundle", ["risk_map", "source_selection"])
def test_the_report_is_the_last_step_before_the_last_line(bundle):
    for path in (BUNDLES / bundle / "configs").glob("*.json"):
        steps = [step for step in json.loads(path.read_text()).get("run", []) if "print(" not in step]
        reports = ["html_report" in step for step in steps]
        assert not any(reports[:-1]), path.name
        if path.name in ("train.json", "evaluate.json", "compare.json", "study.json"):
            assert reports[-1], path.name


# Tracking


def curves(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [one.step for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_loss_and_the_validations_only(data, tmp_path):
    """The scoring of validation and test patients after the training is no point of the curve."""
    folder = risk_map("vanilla", data=data, folder=tmp_path / "out", progress=True, epochs=4, val_interval=2)
    expected = {"loss": list(range(1, 9)), "validation dice": [2, 4], "validation iou": [2, 4]}
    assert curves(folder) == expected


def test_tensorboard_of_a_fine_tuning_in_source_selection(data, tmp_path):
    settings = data | {"source_task": "17-T2-ED", "progress": True, "output_dir": str(tmp_path / "out")}
    folder = run("source_selection", "train", "finetune", **settings)
    assert curves(folder) == {"loss": [1, 2, 3, 4], "validation dice": [1, 2], "validation iou": [1, 2]}


@pytest.mark.parametrize("bundle", ["risk_map", "source_selection"])
def test_mlflow_tracks_a_training_once(bundle, data, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    method = "vanilla" if bundle == "risk_map" else "finetune"
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    settings = data | {"source_task": "17-T2-ED", "progress": True, "figures": False, "mlflow#tracking_uri": uri}
    settings |= {"output_dir": str(tmp_path / "out")} | ({"audit#arms": []} if bundle == "risk_map" else {})
    for _ in range(2):  # a finished run is not tracked again
        run(bundle, "train", method, "mlflow", **settings)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(bundle)
    (tracked,) = client.search_runs(experiment.experiment_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["method"] == method
    steps = {key: [one.step for one in client.get_metric_history(tracked.info.run_id, key)] for key in ("loss", "dice")}
    assert steps == {"loss": [1, 2, 3, 4], "dice": [1, 2]}


@pytest.mark.parametrize("bundle", sorted(path.name for path in BUNDLES.iterdir()))
def test_the_overlay_of_mlflow_changes_nothing_that_a_run_computes(bundle):
    """Else sources would be trained again for it, and a run be taken for another."""
    configs = [str(BUNDLES / bundle / "configs" / f"{name}.json") for name in ("train", "mlflow")]
    plain, tracked = (ConfigWorkflow(files, workflow_type="train").parser.get() for files in (configs[:1], configs))
    assert identity(tracked) == identity(plain)
