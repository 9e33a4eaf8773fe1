"""Tests of the bundle sequential_transfer only: arms along a path, and its steps, graph and weights."""

import ast
import shlex
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import SEQUENTIAL, command_in, finish, kill_once_there, read_json, trainings

from medtl_ext.graph import read_task_graph

SOURCES = SEQUENTIAL.tiny["sources"]
run, start = SEQUENTIAL.run, SEQUENTIAL.start

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def answered(folder: str | Path) -> str:
    return (Path(folder) / "answer.txt").read_text()


# The whole of train.json


def test_the_whole_run_says_what_each_arm_is_and_gives(whole_run):
    folder = whole_run(SEQUENTIAL)
    plan, arms = read_json(folder / "plan.json"), pd.read_csv(folder / "arms.csv")
    first, middle = plan["paths"][0]["tasks"]
    assert arms.groupby("split")["dice"].apply(lambda dice: dice.is_monotonic_decreasing).all()
    test = arms[arms["split"] == "test"].set_index("method")
    assert {"zero_shot", "scratch", "single", "single_full", "sequential", "sequential_full"} <= set(test.index)
    assert test.loc["sequential", "path"] == f"{first} -> {middle} -> 17-T2-ED"
    assert test.loc["single", "path"] == f"{plan['single']} -> 17-T2-ED"
    for arm in test.index:
        rows = pd.read_csv(folder / "arms" / arm / "metrics.csv")
        mean = rows[rows["split"] == "test"]["dice"].mean()
        assert test.loc[arm, "dice"] == pytest.approx(mean, abs=1e-5)
    assert read_json(folder / "arms" / "sequential" / "leep.json")["leep"] <= 0
    assert read_json(folder / "audit.json")["text"] in answered(folder)


def test_arms_spend_as_many_labelled_patients_and_start_from_each_other(whole_run):
    arms, plan = whole_run(SEQUENTIAL) / "arms", read_json(whole_run(SEQUENTIAL) / "plan.json")
    first, middle = plan["paths"][0]["tasks"]

    def before(folder: Path) -> Path:
        return Path(read_json(folder / "config.json")["source"]["checkpoint"]).parent

    def spent(folder: Path) -> tuple[str, int]:
        config = read_json(folder / "config.json")
        return config["target_task"], config["train_patients"]

    stage, single = before(arms / "sequential"), before(arms / "single")
    assert [spent(folder) for folder in (arms / "sequential", stage, before(stage), single)] == [
        ("17-T2-ED", 1),
        (middle, 1),
        (first, 2),
        (plan["single"], 3),
    ]
    encoder = "conv_0.conv_0.conv.weight"
    assert torch.equal(weights(before(stage))[encoder], weights(arms / "sequential")[encoder])  # frozen at every step
    assert not torch.equal(weights(before(stage))[encoder], weights(arms / "sequential_full")[encoder])
    assert torch.equal(weights(arms / "zero_shot")[encoder], weights(single)[encoder])


def test_only_what_is_lost_is_done_again(options, in_this_process):
    options |= {"n_clusters": 3}
    run(**options)
    folder, before = options["output_dir"], list(in_this_process)
    answer, lost = answered(folder), Path(folder, "arms/single")
    (lost / "metrics.csv").unlink()
    run(**options)
    assert in_this_process == [*before, lost]
    assert answered(folder) == answer


@pytest.mark.parametrize(
    ("source_patients", "spent"),
    [(3, "at equal numbers of labelled patients (3 of sources)"), (None, "each with all patients of its first source")],
)
def test_without_a_path_one_step_is_taken(options, in_this_process, capsys, source_patients, spent):
    run(**options, n_clusters=3, source_patients=source_patients)
    folder = Path(options["output_dir"])
    assert f"On the test patients, {spent}:" in capsys.readouterr().out
    assert "one task each" in read_json(folder / "plan.json")["no_path"]
    assert set(pd.read_csv(folder / "arms.csv")["method"]) == {"zero_shot", "scratch", "single", "single_full"}
    assert "There is no second step" in answered(folder)


def test_the_command_for_own_data_finds_a_path(options, collection):
    """The command of the README, with its tasks and clusters, on two institutions A and B with T1 and FLAIR."""
    text = (SEQUENTIAL.root / "docs" / "README.md").read_text()
    text = text.split("--collection my/collection.json")[1].split("```")[0]
    words = dict(pairwise(shlex.split(text.replace("\\\n", " "))))
    content = collection.read_text()
    for ours, theirs in (("14", "A"), ("17", "B")):
        content = content.replace(f'"institution": "{ours}"', f'"institution": "{theirs}"')
    own = collection.with_name("own.json")
    own.write_text(content)
    named = {"target_task": words["--target_task"], "sources": ast.literal_eval(words["--sources"])}
    run("select", **options | named | {"collection": str(own)}, n_clusters=int(words["--n_clusters"]))
    assert len(read_json(Path(options["output_dir"]) / "plan.json")["paths"][0]["tasks"]) == 2


def test_without_patients_to_validate_on_nothing_is_decided(options, in_this_process):
    run(**options, n_clusters=3, val_split="train")
    folder = Path(options["output_dir"])
    assert "nothing is decided" in answered(folder)
    assert set(pd.read_csv(folder / "arms.csv")["split"]) == {"train", "test"}
    assert not (folder / "audit.json").exists()


def test_two_tasks_together_have_labels_of_their_own(options):
    def training(*overlays, task: str, patients: int, **asked):
        asked |= {"source": task, "target_task": task, "train_patients": patients}
        parser = SEQUENTIAL.workflow("pretrain", *overlays, **options, **asked).parser
        return parser.get_parsed_content("train#dataloader#dataset")

    both = training("joint", task="14-T2-ED", patients=2, joint_task="14-T2-ET", joint_patients=1)
    alone = training(task="14-T2-ED", patients=2), training(task="14-T2-ET", patients=1)
    for ours, theirs in zip(both.datasets, alone, strict=True):
        for one, other in zip(ours.plain(), theirs.plain(), strict=True):
            assert torch.equal(one["label"], other["label"])


def test_an_overlay_reaches_every_step(options, in_this_process):
    run("risk_map", **options)
    folder = Path(options["output_dir"])
    stages = [path.parent for path in folder.glob("stages/**/config.json")]
    assert stages
    for path in [*stages, folder / "arms" / "sequential_full"]:
        assert list(path.glob("weight_*.nii.gz")), path
    assert not list((folder / "arms" / "scratch").glob("weight_*.nii.gz"))


def test_the_regime_of_the_paper_is_one_config(options, in_this_process, tmp_path):
    """84 sources, 21 targets, 63 patients; and a complete study of two targets with the paper's network, made tiny."""
    paper, whole = SEQUENTIAL.content("paper"), SEQUENTIAL.workflow("paper_study", base="study").parser
    assert whole.get("settings") == {name: value for name, value in paper.items() if name != "_desc_"}
    assert len(set(whole.get_parsed_content("sources"))) == 84
    targets = Counter(task.rsplit("-", 1)[1] for task in whole.get("targets"))
    assert targets == {"ED": 4, "ET": 4, "NCR": 4, "WM": 2, "GM": 2, "CSF": 2, "WMH": 3}

    folder = Path(options.pop("output_dir"))
    small = dict(SEQUENTIAL.tiny) | options | {"roi_size": [32, 32, 16], "batch_size": 1, "score_space": "training"}
    small |= {"source_dir": str(tmp_path / "pool"), "network_def#filters": [8] * 5}
    small = {f"settings#{name}": small[name] for name in small.keys() - {"sources", "target_task", "affinity"}}
    del small["settings#network_def#features"]
    asked = {"targets": ["17-T2-ED", "17-FLAIR-ED"], "sources": SOURCES, "draws": 1, "output_dir": str(folder)}
    study = run("paper_study", base="study", **asked, **small).parser.get_parsed_content("study")
    assert [set(plan["seqtran"].graph.graph) for plan in study.plans.values()] == [set(SOURCES)] * 2  # joined or not
    table = pd.read_csv(folder / "study.csv")
    assert table["arm"].str.contains(r" \+ ").any()  # joint training of a path's two tasks
    assert np.isfinite(table[["dice", "iou"]]).all(axis=None)
    assert "only the decoder trained at every step" in (folder / "study.md").read_text()
    assert "Which modality is ideal for an objective?" in (folder / "study.md").read_text()

    step = read_json(next((folder / "runs" / "17-T2-ED" / "seed0").glob("*>*")) / "config.json")
    assert (step["learning_rate"], step["lr_scheduler"]["patience"]) == (0.01, 3)
    before, after = weights(Path(step["source"]["checkpoint"]).parent), weights(Path(step["output_dir"]))
    same = {name.split(".")[0] for name in after if torch.equal(after[name], before[name])}
    assert {"input_block", "downsamples", "bottleneck"} <= same
    assert not {"upsamples", "output_block"} & same


def test_three_dimensions(options, in_this_process):
    run(**options | {"roi_size": [32, 32, 16], "batch_size": 1, "n_clusters": 3})
    assert len(pd.read_csv(Path(options["output_dir"]) / "arms.csv")) == 8


# Parts of it


def test_the_graph_alone_serves_any_target(options, no_training, tmp_path, capsys):
    run("graph", **options)
    graph = Path(options["output_dir"]) / "task_graph.json"
    assert set(read_task_graph(graph)) == set(SOURCES)
    assert "3 source tasks, 2 pairs joined, in 1 clusters" in capsys.readouterr().out
    for target in ("17-T2-ED", "17-FLAIR-ED"):
        out = str(tmp_path / target)
        run("select", **options | {"output_dir": out}, target_task=target, task_graph=str(graph))
        assert read_json(Path(out) / "plan.json")["target"] == target
        table = pd.read_csv(Path(out) / "paths.csv")
        assert table.groupby("kind")["cost"].apply(lambda cost: cost.is_monotonic_increasing).all()


@pytest.mark.parametrize("val_split", ["val", "train"])
def test_weights_are_fitted_to_transfers(options, in_this_process, tmp_path, val_split):
    folder = Path(options.pop("output_dir"))
    settings = SEQUENTIAL.settings(**options, val_split=val_split)

    def fitted(folder: Path, **transfers: str) -> list[float]:
        asked = {"sources": SOURCES, "targets": ["17-T2-ED"], "settings": settings, "output_dir": str(folder)}
        run(base="fit", **asked | transfers)
        return [read_json(folder / "affinity_weights.json")[name] for name in ("alpha", "beta")]

    fitted(folder)
    before, table = list(in_this_process), pd.read_csv(folder / "transfers.csv")
    assert list(table["source"]) == SOURCES

    # The networks are too small to segment anything, so two Dice values are written by hand.
    alpha, beta = 0.3 / table["distance"].max(), 0.3
    dice = 0.9 - alpha * table["distance"] - beta * (1 - table["similarity"])
    for source, value in zip(table["source"], dice, strict=True):
        metrics = folder / "runs" / "17-T2-ED" / "seed0" / source / "metrics.csv"
        rows = pd.read_csv(metrics)
        assert set(rows["split"]) == {val_split, "test"}
        rows.assign(dice=np.where(rows["split"] == val_split, value, 0.5)).to_csv(metrics, index=False)
        metrics.with_name(".run.sums").unlink()  # otherwise the job with changed tables would be scored again
    assert fitted(folder) == pytest.approx((alpha, beta), rel=1e-3)
    measured = pd.read_csv(folder / "transfers.csv")[["source", "target", "dice"]]
    measured.to_csv(tmp_path / "measured.csv", index=False)
    again = fitted(tmp_path / "again", transfers=str(tmp_path / "measured.csv"))
    assert again == pytest.approx((alpha, beta), rel=1e-3)
    assert in_this_process == before


# As users start it


@pytest.mark.slow
def test_killed_at_any_step_the_next_run_gives_the_same(options, tmp_path):
    """Killed during the pre-training, between two epochs, and again on the target; with workers that load images."""
    long = dict(SEQUENTIAL.tiny) | {"pool_epochs": 6, "epochs": 3, "collection": options["collection"]}
    whole = long | {"source_dir": str(tmp_path / "pool0"), "output_dir": str(tmp_path / "whole")}
    finish(start(["configs/train.json"], whole))
    cut = long | {"source_dir": str(tmp_path / "pool1"), "output_dir": str(tmp_path / "cut"), "num_workers": 2}
    for pattern in ("pool1/*/last.pt", "cut/stages/**/last.pt", "cut/arms/*/last.pt"):
        kill_once_there(start(["configs/train.json"], cut), tmp_path / pattern)
        assert not (tmp_path / "cut" / "answer.txt").exists()
    finish(start(["configs/train.json"], cut))
    assert answered(tmp_path / "cut") == answered(tmp_path / "whole")
    for arm in (tmp_path / "whole" / "arms").iterdir():
        ours, theirs = weights(tmp_path / "cut" / "arms" / arm.name), weights(arm)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), arm.name


@pytest.mark.slow
def test_a_step_on_two_processes(options, tmp_path):
    run("pretrain", **options | {"output_dir": str(tmp_path / "head")}, source=SOURCES[0], train_patients=3)
    files = [f"configs/{name}.json" for name in ("train", "stage", "multi_gpu_train")]
    step = {"source": str(tmp_path / "head" / "model.pt"), "train_patients": 2}
    finish(start(files, dict(SEQUENTIAL.tiny) | options | step, processes=2))
    rows = pd.read_csv(Path(options["output_dir"]) / "metrics.csv")
    assert set(rows["split"]) == {"val", "test"}
    assert np.isfinite(rows["dice"]).all()
    scored = {"ckpt": str(Path(options["output_dir"]) / "model.pt"), "output_dir": str(tmp_path / "scored")}
    files = [f"configs/{name}.json" for name in ("train", "evaluate", "multi_gpu_evaluate")]
    finish(start(files, dict(SEQUENTIAL.tiny) | options | scored, processes=2))
    again = pd.read_csv(tmp_path / "scored" / "metrics.csv").set_index("subject")["dice"]
    before = rows[rows["split"] == "test"].set_index("subject")["dice"]
    pd.testing.assert_series_equal(again.sort_index(), before.sort_index(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_study_runs_end_to_end_and_is_continued(options, tmp_path):
    folder = Path(options.pop("output_dir"))
    settings = SEQUENTIAL.settings(**options | {"source_dir": str(tmp_path / "pool")})
    whole = {"targets": ["17-T2-ED", "17-FLAIR-ED"], "sources": SOURCES, "seeds": [0], "settings": settings}
    finish(start(["configs/study.json"], whole | {"output_dir": str(folder)}))
    table, before = pd.read_csv(folder / "study.csv"), trainings(tmp_path)
    steps = table[table["target"] == "17-T2-ED"]["steps"].value_counts()
    assert (steps[1], steps[2]) == (3, 4)  # two joined pairs, in either order
    assert np.isfinite(table[["dice", "iou"]]).all(axis=None)
    assert (table["leep"].dropna() <= 0).all()
    page = (folder / "study.md").read_text()
    assert "| path | context |" in page
    file, given = command_in(page)
    more = {"target_task": "17-T2-ED"} if Path(file).stem == "train" else {"seeds": [0, 1, 2], "settings": settings}
    assert given.items() >= (more | {"sources": SOURCES}).items()
    finish(start(["configs/study.json"], whole | {"output_dir": str(folder)}))
    assert before
    assert trainings(tmp_path) == before


def test_what_is_trained_together_is_cut_alike(tmp_path):
    """Also if only the images of the second task are larger than the network's window."""
    grid = {"_target_": "medtl_ext.data.plan.Grid", "spacing": [6.2, 6.2, 8], "roi_size": [16] * 3, "frame": [16] * 3}
    tasks = {"source": "14-T2-ED", "joint_task": "13-T2-ED", "phantom_subjects": 6}
    workflow = SEQUENTIAL.workflow("pretrain", "joint", grid=grid, output_dir=str(tmp_path), **tasks)
    workflow.initialize()
    assert workflow.parser.get_parsed_content("joint_dataset")[0]["label"].shape == (1, 16, 16, 16)
