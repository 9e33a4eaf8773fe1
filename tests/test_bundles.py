"""Tests of all bundles: files, equal results of two runs, one line for bad input, continuing after a kill, configs."""

import json
import os
import pydoc
import re
import runpy
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bundle_runs import (
    ALL,
    DATASETS,
    REPOSITORY,
    RISK_MAP,
    SEQUENTIAL,
    SOURCE_SELECTION,
    Bundle,
    command_in,
    finish,
    kill_once_there,
    ranking_of,
    read_json,
    refused,
    start,
    trainings,
)

from medtl_ext.report import row_of
from medtl_ext.transfer import Job, SegmentationTask
from medtl_ext.transfer.config import identity
from medtl_ext.transfer.truth import best_of

RANKERS = [SOURCE_SELECTION, DATASETS]
RUN_HERE = [RISK_MAP, *RANKERS]

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Bundle) else ""


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.name: pd.read_csv(path) for path in folder.glob("*.csv")}


# The whole of train.json

LEFT = {"config.json", "report.html"}
LEFT_BY_RANKERS = LEFT | {"ranking.csv", "ranking.json", "ranking.png", "ranking.svg", "answer.txt"}
LEFT_BY_RISK_MAP = LEFT | {"curve.csv", "metrics.csv", "model.pt", "last.pt", "grid.json", "maps.png", "overlay.png"}
LEFT_BY_RISK_MAP |= {"viewer.json", "weight.nii.gz", "audit", "MODEL_CARD.md"}
LEFT_BY_RISK_MAP |= {"leep_before.nii.gz", "leep_after.nii.gz", "audit.csv", "audit.json", "audit.png", "audit.svg"}
LEFT_BY_SEQUENTIAL = LEFT | {"plan.json", "paths.csv", "clusters.csv", "task_graph.json", "task_graph.graphml", "arms"}
LEFT_BY_SEQUENTIAL |= {"overlay.png", "viewer.json", "task_graph.png", "task_graph.svg", "stages", "arms.csv"}
LEFT_BY_SEQUENTIAL |= {"audit.csv", "audit.json", "audit.png", "audit.svg", "answer.txt"}


@pytest.mark.parametrize(
    ("bundle", "files", "title"),
    [
        (RISK_MAP, LEFT_BY_RISK_MAP, "14-FLAIR-ED to 17-T2-ED: risk_map"),
        (SEQUENTIAL, LEFT_BY_SEQUENTIAL, "Paths to 17-T2-ED"),
        (SOURCE_SELECTION, LEFT_BY_RANKERS, "Source selection for 17-T2-ED"),
        (DATASETS, LEFT_BY_RANKERS | {"images.csv", "pictures.json"}, "Source datasets for 17-T2-tumour"),
    ],
    ids=name_of,
)
def test_the_whole_run_leaves_what_it_promises(bundle, files, title, whole_run):
    folder = whole_run(bundle)
    assert folder.with_suffix(".txt").read_text().rstrip().splitlines()[-1] == f"results are in {folder}"
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == files
    page = (folder / "report.html").read_text()
    assert title in page
    assert "Synthetic data." in page
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert page.count("<svg ") == len(drawn)
    assert page.count('src="data:image/png') == len({path.stem for path in folder.glob("*.png")} - drawn)


@pytest.mark.parametrize(
    ("bundle", "known", "counted", "said"),
    [
        (SOURCE_SELECTION, ["ssim", "roi_dice", "roi_shape", "own_dice", "size"], {"patients": 4}, "score can judge"),
        (DATASETS, ["own_auc", "images"], {"units": 4, "patients_known": True}, "The paper's LP x FU would pick"),
    ],
    ids=name_of,
)
def test_a_ranking_has_every_score_of_every_source(bundle, known, counted, said, whole_run):
    folder, sources, train = whole_run(bundle), bundle.tiny["sources"], bundle.content("train")
    table, content = ranking_of(folder), read_json(folder / "ranking.json")
    assert set(table.index) == {*sources, "scratch"}
    assert np.isfinite(table.loc[sources, train["metrics"] + known].to_numpy(float)).all()
    assert table["score"].iloc[:-1].is_monotonic_decreasing
    assert table.loc["scratch", "status"] == "no score"
    assert {"random_rank", "source_size_rank", "static_rank", "rank_low", "p_best"} <= set(table.columns)
    assert content.items() >= (counted | {"decided_by": train["decide_by"] or "h_score", "synthetic": True}).items()
    assert said in content["answer"]
    assert (folder / "answer.txt").read_text().startswith(content["answer"])
    assert content["default"] is None or content["default"] in content["command"]


@pytest.mark.parametrize("bundle", [*RUN_HERE, SEQUENTIAL], ids=name_of)
def test_a_second_run_gives_the_same_and_trains_nothing(bundle, whole_run, options, in_this_process):
    first, again = whole_run(bundle), Path(options["output_dir"])
    if trainings(first):  # its trainings are in its own folder
        shutil.copytree(first, again)
    trained, before = list(in_this_process), trainings(again)
    bundle.run(**options | bundle.whole)
    assert in_this_process == trained
    assert trainings(again) == before
    assert tables(first)
    for name, table in tables(first).items():
        ours = tables(again)[name].drop(columns="checkpoint", errors="ignore")
        pd.testing.assert_frame_equal(ours, table.drop(columns="checkpoint", errors="ignore"))


@pytest.mark.parametrize("quiet", [{"figures": False}, {"figures": True, "rank": 1}], ids=str)
def test_inner_runs_and_other_ranks_leave_no_curves(quiet, options):
    RISK_MAP.run("scratch", **options | quiet, progress=quiet["figures"])
    assert not (Path(options["output_dir"]) / "tensorboard").exists()
    assert quiet["figures"] or not (Path(options["output_dir"]) / "report.html").exists()


EACH = [*zip(RUN_HERE, ("dice", "dice", "auc"), strict=True)]
SCORED = pytest.mark.parametrize(("bundle", "score"), EACH, ids=name_of)
FOUR_EPOCHS = {"epochs": 4, "val_interval": 2, "iterations_per_epoch": 2, "progress": True}
STEPS = list(range(1, 9))


@SCORED
def test_curves_have_the_loss_and_the_validations_only(bundle, score, options):
    """The final scores of validation and test patients are not points of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bundle.run("scratch", **options | FOUR_EPOCHS)
    events = EventAccumulator(str(Path(options["output_dir"]) / "tensorboard")).Reload()
    steps = {name: [one.step for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert steps.pop("loss") == STEPS
    assert steps.pop(f"validation {score}") == [2, 4]
    assert all(points == [2, 4] for points in steps.values())


@SCORED
def test_mlflow_tracks_a_training_once(bundle, score, options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    for _ in range(2):  # a finished run is not tracked again
        bundle.run("scratch", "mlflow", **options | FOUR_EPOCHS | {"mlflow#tracking_uri": uri})
    tracked, client = tracked_run(mlflow, uri, bundle)
    assert tracked.data.params["method"] == "scratch"
    history = {name: client.get_metric_history(tracked.info.run_id, name) for name in ("loss", score)}
    assert {name: [one.step for one in steps] for name, steps in history.items()} == {"loss": STEPS, score: [2, 4]}


@pytest.mark.parametrize("bundle", [*RUN_HERE, SEQUENTIAL], ids=name_of)
def test_mlflow_knows_of_a_whole_run_what_the_index_says(bundle, options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    bundle.run("mlflow", **options | bundle.whole | {"progress": True, "mlflow#tracking_uri": uri})
    folder = Path(options["output_dir"])
    tracked, client = tracked_run(mlflow, uri, bundle)  # one: the arms are no runs of their own
    row = row_of(folder, folder.parent)
    known = tracked.data.params | {name: f"{value:.3f}" for name, value in tracked.data.metrics.items()}
    missing = {
        name: value
        for name, value in row.items()
        if value and name not in ("link", "minutes") and known.get(name) != value
    }
    assert missing == {}
    assert {"asked", "advised"} <= {name for name, value in row.items() if value}
    assert tracked.data.metrics["minutes"] == float(row["minutes"])
    assert [file.path for file in client.list_artifacts(tracked.info.run_id)] == ["report.html"]


def tracked_run(mlflow, uri, bundle):
    """The only run that is tracked, which has ended."""
    client = mlflow.MlflowClient(uri)
    (tracked,) = client.search_runs(client.get_experiment_by_name(bundle.name).experiment_id)
    assert tracked.info.status == "FINISHED"
    return tracked, client


# Studies

TWO_TARGETS = {
    SOURCE_SELECTION.name: ["17-T2-ED", "17-FLAIR-ET"],
    DATASETS.name: ["17-T2-tumour", "14-T2-tumour"],  # the second is the first source
}


def study(bundle: Bundle, options: dict[str, str], **settings: Any) -> Path:
    where = {name: options[name] for name in ("collection", "source_dir")}
    whole = {"targets": TWO_TARGETS[bundle.name], "sources": bundle.tiny["sources"], "seeds": [3]}
    bundle.run(base="study", **whole, settings=bundle.settings(**where, **settings), output_dir=options["output_dir"])
    return Path(options["output_dir"])


def plant(metrics: Path, **dice: float) -> None:
    """Replace the Dice of each split, because these networks are too small to find anything."""
    table = pd.read_csv(metrics)
    table.assign(dice=table["split"].map(dice)).to_csv(metrics, index=False)
    metrics.with_name(".run.sums").unlink()  # otherwise the job with changed tables would be scored again


def test_a_study_is_of_the_test_patients_and_is_continued(options, in_this_process, tmp_path, monkeypatch):
    monkeypatch.setattr("medtl_ext.transfer.study._baseline_claim", lambda *_: ("It is.", "Numbers.", ["LEEP"]))
    folder = study(SOURCE_SELECTION, options, metrics=["h_score", "leep"])
    names = {path.name for path in folder.iterdir()}
    assert {"study.csv", "study.md", "agreement.csv", "critical_difference.png", "priors.png", "runs"} <= names
    assert "Synthetic" in (folder / "study.md").read_text()
    pairs = pd.read_csv(folder / "roi_similarity.csv")
    assert list(pairs)[:4] == ["target", "source", "same_institution", "same_modality"]
    assert pairs.groupby("target")["ssim"].apply(lambda ssim: ssim.is_monotonic_decreasing).all()
    assert len(pairs) == 2 * len(SOURCE_SELECTION.tiny["sources"])
    sources, trained = SOURCE_SELECTION.tiny["sources"], list(in_this_process)
    assert {read_json(path)["seed"] for path in folder.glob("runs/*/seed3/finetune/*/config.json")} == {3}
    dice = {name: 0.2 + 0.1 * place for place, name in enumerate([*sources, "scratch"])}
    for metrics in folder.glob("runs/*/seed3/finetune/*/metrics.csv"):
        plant(metrics, val=1 - dice[metrics.parent.name], test=dice[metrics.parent.name])
    for scored in folder.glob("runs/*/seed3/agreement.md"):
        scored.unlink()
    study(SOURCE_SELECTION, options, metrics=["h_score", "leep"])
    assert set(in_this_process[len(trained) :]) == set(folder.glob("runs/*/seed3"))  # scored, none trained
    table = pd.read_csv(folder / "study.csv")
    assert len(table) == 2 * len(dice)
    assert table["dice"].tolist() == pytest.approx(table["source"].map(dice).tolist())
    truth = pd.read_csv(folder / "runs" / "17-T2-ED" / "seed3" / "truth.csv")
    assert truth["source"].tolist() == ["scratch", *reversed(sources)]
    assert truth["dice"].tolist() == pytest.approx(truth["source"].map(dice).tolist())
    file, given = command_in((folder / "study.md").read_text())
    assert (Path(file).name, given["decide_by"], given["sources"]) == ("train.json", "leep", sources)
    SOURCE_SELECTION.run(**given, output_dir=str(tmp_path / "next"))  # what the page says to type next
    assert read_json(tmp_path / "next" / "ranking.json")["decided_by"] == "leep"


def test_a_study_of_datasets_leaves_own_models_out_and_is_continued(options, in_this_process, monkeypatch):
    monkeypatch.setattr("medtl_ext.transfer.study._baseline_claim", lambda *_: ("It is not.", "Numbers.", []))
    folder = study(DATASETS, options)
    names = {path.name for path in folder.iterdir()}
    assert {"study.csv", "study.md", "agreement.csv", "critical_difference.png", "runs", "report.html"} <= names
    assert len(pd.read_csv(folder / "study.csv")) == 4 + 3
    assert not list(folder.glob("runs/14-T2-tumour/seed3/finetune/14-T2-tumour*"))
    assert "Is a target its own best source?" in (folder / "study.md").read_text()
    trained = list(in_this_process)
    study(DATASETS, options)
    assert in_this_process == trained
    file, given = command_in((folder / "study.md").read_text())
    assert given["seeds"].pop() == 5  # one more is enough here
    DATASETS.run(base=Path(file).stem, **given)  # what the page says to type next: more seeds, with what is there
    assert set(pd.read_csv(folder / "study.csv")["seed"]) == {3, 4}
    assert in_this_process[: len(trained)] == trained


def test_a_comparison_runs_each_distinct_method_once_and_is_continued(options, in_this_process, monkeypatch):
    monkeypatch.setattr("medtl_ext.transfer.report._verdict", lambda *_: ("No evidence.", None))  # whatever was trained
    runs = [{"seed": seed, "source_seed": 0} for seed in (0, 1)]
    whole = {"pairs": [["14-FLAIR-ED", "17-T2-ED"]], "methods": ["vanilla", "zero_shot", "scratch"], "runs": runs}
    whole |= {"train_slices": [8], "output_dir": options["output_dir"]}
    settings = RISK_MAP.settings(**{name: options[name] for name in ("collection", "source_dir")})
    RISK_MAP.run(base="compare", **whole, settings=settings)
    folder, trained = Path(options["output_dir"]), list(in_this_process)
    assert {"comparison.csv", "comparison.md", "comparison.png", "report.html"} <= {p.name for p in folder.iterdir()}
    table = pd.read_csv(folder / "comparison.csv").set_index("method")
    assert table["runs"].to_dict() == {"vanilla": 2, "zero_shot": 1, "scratch": 2}
    shared = {str(read_json(path)["normalize"]) for path in folder.glob("runs/**/config.json")}
    assert len(shared) == 1  # though only spacing and size are given: networks of one study see one scale
    assert shared != {"auto"}
    RISK_MAP.run(base="compare", **whole, settings=settings)
    assert in_this_process == trained
    file, given = command_in((folder / "comparison.md").read_text())
    RISK_MAP.run(base=Path(file).stem, **given)  # what the page says to type next: each method twice more
    table = pd.read_csv(folder / "comparison.csv").set_index("method")
    assert table["runs"].to_dict() == {"vanilla": 4, "zero_shot": 3, "scratch": 4}
    assert in_this_process[: len(trained)] == trained


def test_the_best_of_several_trainings_is_that_of_validation(tmp_path):
    """Its Dice is that of the test patients."""
    rows = pd.DataFrame({"method": "full", "seed": 0, "split": ["val", "test"], "subject": ["a", "b"], "class": "ED"})
    jobs = []
    for name, dice in {"first": [0.3, 0.9], "second": [0.8, 0.1], "third": [0.8, 0.7]}.items():
        jobs.append(Job({}, tmp_path / name))
        jobs[-1].output_dir.mkdir()
        rows.assign(dice=dice, iou=dice).to_csv(tmp_path / name / "metrics.csv", index=False)
    best = best_of(jobs, SegmentationTask)
    assert best is jobs[1]  # the first of equal ones
    assert SegmentationTask.measure(best, "test")["dice"] == pytest.approx(0.1)


# As users start it


WRONG = [
    (SEQUENTIAL, {"affinity": "seqtrann"}, "expected seqtran or seqtran_multivariate"),
    (SEQUENTIAL, {"sources": []}, "sources is []; give a list"),
    (SEQUENTIAL, {"sources": ["14-T2-ED", "14-T2-ED"]}, "names 14-T2-ED twice"),
    (SEQUENTIAL, {"sources": ["14-T2-EDD"]}, "did you mean 'ED'"),
    (SEQUENTIAL, {"sources": [*SEQUENTIAL.tiny["sources"], "17-T2-ED"]}, "is one of the sources"),
    (SEQUENTIAL, {"sources": ["14-FLAIR-ET"]}, "no source shares modality or objective"),
    (SEQUENTIAL, {"target_task": "17-T2-EDD"}, "did you mean 'ED'"),
    (SEQUENTIAL, {"stage_patients": 0}, "expected a whole number, 1 or more"),
    (SEQUENTIAL, {"stage_patients": 9, "source_patients": None}, "fewer than the 9 that you ask for"),
    (SEQUENTIAL, {"train_patients": 9}, "task 17-T2-ED has 4 training patients, fewer than the 9"),
    (SEQUENTIAL, {"source_patients": 1}, "leave none to pre-train on"),
    (SEQUENTIAL, {"max_intermediates": 1, "representative_rule": "siz"}, "did you mean 'size'"),
    (SEQUENTIAL, {"task_graph": "nowhere.json"}, "nowhere.json holds no task graph"),
    (SEQUENTIAL, {"collection": "nowhere.json"}, "does not exist"),
    (SOURCE_SELECTION, {"metrics": ["h_scor"]}, "did you mean 'h_score'"),
    (SOURCE_SELECTION, {"decide_by": "logm"}, "did you mean 'logme'"),
    (SOURCE_SELECTION, {"method": "papr"}, "did you mean 'paper'"),
    (SOURCE_SELECTION, {"minimum_win": 0.4}, "minimum_win"),
    (SOURCE_SELECTION, {"n_resamples": 0}, "n_resamples"),
    (SOURCE_SELECTION, {"top_k": 0}, "top_k is 0"),
    (SOURCE_SELECTION, {"settle": True, "val_split": "train"}, "give --settle false"),
    (SOURCE_SELECTION, {"sources": ["14-T2-EDD"]}, "did you mean 'ED'"),
    (SOURCE_SELECTION, {"target_task": "17-T3-ED"}, "modality 'T3' is unknown"),
    (SOURCE_SELECTION, {"collection": "nowhere.json"}, "does not exist"),
    (SOURCE_SELECTION, {"source": SOURCE_SELECTION.tiny["sources"]}, "only datasets of classification are pooled"),
    (DATASETS, {"metrics": ["leap"]}, "did you mean 'leep'"),
    (DATASETS, {"metrics": ["leep"], "decide_by": "logme"}, "not in metrics"),
    (DATASETS, {"sources": ["14-T2-tumor"]}, "did you mean 'tumour'"),
    (DATASETS, {"sources": ["17-T2-tumour"]}, "no source is left"),
    (DATASETS, {"target_task": "nowhere.npz"}, "does not exist"),
    (DATASETS, {"train_per_class": 0}, "expected at least 1"),
    (DATASETS, {"in_channels": 2}, "in_channels is 2"),
    (DATASETS, {"image_size": 8}, "image_size is 8; expected at least 16"),
]


@pytest.mark.parametrize(("bundle", "wrong", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_option_is_refused_before_training(bundle, wrong, message, options, no_training):
    assert message in refused(lambda: bundle.run(**options | wrong))


SLOW = [
    (RISK_MAP, {"collection": "nowhere.json"}, "nowhere.json does not exist"),
    (RISK_MAP, {"source": "nowhere.pt"}, "checkpoint nowhere.pt does not exist"),
    (RISK_MAP, {"output_dir": "/proc/nowhere"}, "cannot be written to"),
    (SOURCE_SELECTION, {"metrics": ["h_scor"]}, "metric 'h_scor' is unknown"),
    (DATASETS, {"target_task": "wrong.npz"}, "has no 'train_images'; found the keys images"),
]


@pytest.mark.parametrize(
    ("bundle", "wrong", "said"),
    [
        (RISK_MAP, {"epoch": 1}, "option --epoch is not used by this bundle; did you mean --epochs?"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
    ids=name_of,
)
def test_the_command_line_shows_one_line_and_no_traceback(bundle, wrong, said, options, tmp_path):
    np.savez(tmp_path / "wrong.npz", images=np.zeros(3))
    changed = {name: str(tmp_path / value) if value == "wrong.npz" else value for name, value in wrong.items()}
    process = bundle.start(["configs/train.json"], dict(bundle.tiny) | options | changed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.rstrip().splitlines()[-1].startswith("error: ")
    assert said in errors.rstrip().splitlines()[-1]
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "cwd", "results"),
    [
        (RISK_MAP, "", "14-FLAIR-ED_to_17-T2-ED/risk_map"),
        (RISK_MAP, "bundles/risk_map", "14-FLAIR-ED_to_17-T2-ED/risk_map"),
        (SOURCE_SELECTION, "elsewhere", "17-T2-ED/pooled"),
        (DATASETS, "", "17-T2-tumour/ranking"),
    ],
    ids=name_of,
)
def test_it_runs_from_anywhere(bundle, cwd, results, options, tmp_path):
    """From the root of the repository, inside the bundle and from another folder; on a copy, which gets the results."""
    root = tmp_path / "bundles" / bundle.name
    shutil.copytree(bundle.root, root, ignore=shutil.ignore_patterns("eval", "sources"))
    (tmp_path / cwd).mkdir(exist_ok=True)
    config = os.path.relpath(root / "configs" / "train.json", tmp_path / cwd)
    settings = dict(bundle.tiny) | {"collection": options["collection"]}
    output = finish(start([config], settings, cwd=tmp_path / cwd))
    assert output.rstrip().splitlines()[-1] == f"results are in {root / 'eval' / results}"
    assert tables(root / "eval" / results)
    assert list(root.glob("models/sources/*/model.pt"))


KILLER = """
import fnmatch, os, signal
when, _, pattern = os.environ.get("KILLED", "").partition(" ")
def replacing(source, target, *more, replace=os.replace, **how):
    there = pattern and fnmatch.fnmatch(target, pattern)
    if not there or when == "after":
        replace(source, target, *more, **how)
    if there:
        os.killpg(0, signal.SIGKILL)
os.replace = replacing
"""
"""The sitecustomize module of a process that kills its group at a write; "before" leaves the new file half-way."""
POINTS = [
    "before */data/*/collection.json",
    "before */sources/*/curve.csv",
    "after */sources/*/last.pt",  # the first epoch of the source
    "before */sources/*/metrics.csv",
    "before */out/weight.nii.gz",
    "after */out/last.pt",
    "after */out/audit/scratch/last.pt",  # in a job
    "before */out/audit.csv",
    "after */out/MODEL_CARD.md",
    "before */out/report.html",
]


@pytest.mark.slow
def test_killed_at_named_points_one_after_the_other_the_files_are_the_same_at_the_end(tmp_path, monkeypatch):
    kills = runpy.run_path(str(REPOSITORY / "benchmarks" / "kills.py"))
    kills["SETTINGS"]["risk_map"] |= {"audit#arms": ["scratch"], "audit#folds": 0}
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert kills["start"]("risk_map", whole).wait() == 0
    for point in POINTS:
        monkeypatch.setenv("KILLED", point)
        assert kills["start"]("risk_map", cut).wait() == -signal.SIGKILL, f"{point} is not reached"
    monkeypatch.delenv("KILLED")
    assert kills["start"]("risk_map", cut).wait() == 0
    expected, found = kills["visible"](whole), kills["visible"](cut)
    assert list(found) == list(expected)
    different = [n for n in found if kills["content"](found[n], cut) != kills["content"](expected[n], whole)]
    assert different == []
    assert [path for path in cut.rglob(".*") if path.is_dir()] == []
    assert "Traceback" not in (cut / "said.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("bundle", RANKERS, ids=name_of)
def test_killed_in_the_middle_the_next_run_continues(bundle, options, tmp_path):
    long = {"source_dir": str(tmp_path / "pool"), "iterations_per_epoch": 60, "val_interval": 1, "epochs": 8}
    long = dict(bundle.tiny) | options | long
    kill_once_there(bundle.start(["configs/train.json"], long), tmp_path / "pool/*/metrics.csv")
    assert not (tmp_path / "out" / "answer.txt").exists()
    finished = [path.parent for path in tmp_path.glob("pool/*/metrics.csv")]
    when = {path: path.stat().st_mtime_ns for folder in finished for path in folder.iterdir()}
    finish(bundle.start(["configs/train.json"], long | {"num_workers": 2}))
    assert finished
    assert {path: path.stat().st_mtime_ns for path in when} == when
    assert len(list(tmp_path.glob("pool/*/metrics.csv"))) == len(bundle.tiny["sources"])
    assert (tmp_path / "out" / "answer.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "unlike", "tolerance"),
    # OTCE sorts pixels, of which rounding in other batches swaps near ties; FU is of triplets within a batch.
    [(SOURCE_SELECTION, "", 1e-5), (DATASETS, "fu", 1e-4)],
    ids=name_of,
)
def test_two_processes_give_the_scores_of_one(bundle, unlike, tolerance, options, tmp_path):
    settings = dict(bundle.tiny) | options | {"source_dir": str(tmp_path / "pool")}
    files = ["configs/train.json", "configs/multi_gpu_train.json"]
    finish(bundle.start(files, settings | {"output_dir": str(tmp_path / "two")}, processes=2))
    finish(bundle.start(files[:1], settings | {"output_dir": str(tmp_path / "one")}))
    one, two = (ranking_of(tmp_path / run).select_dtypes("number") for run in ("one", "two"))
    same = [name for name in one if not (unlike and unlike in name)]
    assert set(bundle.content("train")["metrics"]) - {"fu", "lp_fu"} <= set(same)
    pd.testing.assert_frame_equal(one[same], two[same].loc[one.index], atol=tolerance, rtol=tolerance)
    assert not unlike or two[unlike].dropna().gt(0).all()


# The configs agree

VERB = re.compile(r"\$@(\w+|train#trainer)\.(run|start|check|write|end)\(\)")
CONFIGS = [path for bundle in ALL for path in sorted(bundle.configs.glob("*.json"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]} {path.stem}")
def test_a_run_is_of_steps_that_are_one_verb_of_an_object(path):
    """It begins by claiming its folder, and ends with the report and the place of the results."""
    steps = json.loads(path.read_text()).get("run", [])
    said = path.name == "inference.json" and steps[-1].startswith("$print(")  # where the results are
    assert [step for step in steps[: len(steps) - said] if not VERB.fullmatch(step) or len(step) > 120] == []
    if "$@here.start()" in steps:
        assert all(step.endswith(".check()") for step in steps[: steps.index("$@here.start()")])
        assert steps[-1] == "$@here.end()"
    if path.name in ("train.json", "compare.json", "study.json") or "$@report.write()" in steps:
        assert set(steps[steps.index("$@report.write()") + 1 :]) <= {"$@here.end()"}


@pytest.mark.parametrize("bundle", ALL, ids=name_of)
def test_everything_of_ours_that_configs_name_is_there(bundle):
    text = "\n".join(path.read_text() for path in bundle.configs.glob("*.json"))
    named = set(re.findall(r'"_target_": "(medtl_ext\.[\w.]+)"', text))
    for module, short in set(re.findall(r"\$import (medtl_ext[\w.]*) as (\w+)", text)):
        named |= {f"{module}.{name}" for name in re.findall(rf"(?<![\w.@/]){short}\.(\w+)", text)}
    assert len(named) > 5
    assert not [name for name in named if pydoc.locate(name) is None]


@pytest.mark.parametrize("bundle", ALL, ids=name_of)
def test_inference_prepares_images_as_training_did(bundle):
    train, inference = bundle.content("train"), bundle.content("inference")
    shared = {"axcodes", "spacing", "roi_size", "image_size", "network_def"} & train.keys()
    assert {key: inference[key] for key in shared} == {key: train[key] for key in shared}
    transforms = train["train"]["deterministic_transforms"]
    steps = [step for step in transforms if isinstance(step, str) or "image" in step["keys"]]
    prepared = inference["transforms"] if "transforms" in inference else inference["preprocessing"]["transforms"]
    names = [[step if isinstance(step, str) else step["_target_"] for step in part] for part in (prepared, steps)]
    assert names[0] == names[1]
    for ours, theirs in zip(prepared, steps, strict=True):
        if isinstance(ours, str):
            continue
        same = ours.keys() & theirs.keys() - {"keys", "mode", "spatial_size"}  # of image alone; of a volume
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


@pytest.mark.parametrize("bundle", ALL, ids=name_of)
def test_the_overlay_of_mlflow_changes_nothing_that_a_run_computes(bundle):
    """Otherwise sources would be trained again, and a run would not recognise its own folder."""
    plain, tracked = (bundle.workflow(*overlays).parser.get() for overlays in ((), ("mlflow",)))
    assert identity(tracked) == identity(plain)


def test_blocks_that_several_bundles_hold_are_equal():
    """But for what is listed here, key by key; what only the bundle of classification has otherwise is so elsewhere."""
    asked = {"target_task", "source", "sources", "method", "output_dir", "report#title", "report#question"}
    steps = {"imports", "run", "learning_rate", "augment", "train_slices", "check#splits"}
    weights_of_the_loss = {"train#trainer#_target_", "train#trainer#train_handlers", "loss_def#normalization"}
    weights_of_the_loss |= {"validate#postprocessing#transforms#order"}  # a shift of the logits goes before all else
    weights_of_the_loss |= {"pictures#_target_", "pictures#network"}  # the run itself trains, and there is a map
    own = {"multi_gpu_train": set(), "multi_gpu_evaluate": set(), "inference": {"task"}}
    own["mlflow"] = {"mlflow#experiment"}
    own["train"] = asked | steps | weights_of_the_loss
    affine = ("keys", "mode", "padding_mode", "rotate_range", "scale_range", "translate_range")
    images = {f"train#random_transforms#RandAffined#{key}" for key in affine} | {"image_shape", "in_channels"}
    images |= {f"{part}#dataloader#batch_size" for part in ("score", "test", "validate")}
    images |= {"train#random_transforms#RandShiftIntensityd#offsets", "train#random_transforms#order"}
    images |= {"train#inferer#_target_", "train#dataset#_target_", "train#dataset#progress", "validate#dataset#data"}
    images |= {"train#deterministic_transforms#order", "validate#postprocessing#transforms#AsDiscreted#keys"}
    images |= {"network_def#spatial_dims", "train#preprocessing#transforms", "validate#evaluator#inferer"}  # of a grid
    images |= {"validate#preprocessing#transforms"}  # of a patient the label is loaded as it is, too
    classes = {f"{part}#_target_" for part in ("target", "evaluation", "ranking", "network_def", "loss", "optimizer")}
    classes |= {"evaluation#splits", "ranking#check_data", "metrics", "decide_by", "train#handlers#ProgressBar#desc"}
    classes |= {"train#handlers#order", "pictures#patients"}
    classes |= {"score#evaluator#amp"}  # FU needs gradients in full
    classes |= {"optimizer#params", "start_weights", "epochs", "pool_epochs", "iterations_per_epoch", "batch_size"}
    inference = {"dataloader#batch_size", "dataset_dir", "network_def#spatial_dims", "network_def#_target_"}
    inference |= {"imports", "run", "handlers#order", "handlers#ProgressBar#desc", "in_channels"}
    inference |= {"postprocessing#transforms#order", "network#network"}
    of_classification = {"train": images | classes | {"val_interval"}, "inference": inference}
    segmentation = [bundle for bundle in ALL if bundle.name != DATASETS.name]
    for config, keys in own.items():
        assert differing(config, segmentation) == keys
        assert differing(config, ALL) == keys | of_classification.get(config, set())


def differing(config: str, bundles: list[Bundle]) -> set[str]:
    """Keys that several bundles hold with different values."""
    found: dict[str, set[str]] = defaultdict(set)
    for bundle in bundles:
        if (bundle.configs / f"{config}.json").is_file():
            for key, value in leaves(bundle.content(config)):
                found[key].add(json.dumps(value, sort_keys=True))
    return {key for key, values in found.items() if len(values) > 1}


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a config's innermost parts; objects in a list are identified by class and order."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from leaves(part, f"{key}#{name}".lstrip("#"))
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        names = [part if isinstance(part, str) else part.get("_target_", "").split(".")[-1] for part in value]
        yield f"{key}#order", names
        for place, (name, part) in enumerate(zip(names, value, strict=True)):
            yield from leaves(part, f"{key}#{name}{names[:place].count(name) or ''}")
    else:
        yield key, value
