"""The sequential_transfer bundle on a tiny phantom: what it leaves, what it refuses, and how it goes on when killed."""

from __future__ import annotations

import ast
import json
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import Bundle, finish, kill_once_there, refused, trainings

from medtl_ext.data import generate_phantom
from medtl_ext.graph import read_task_graph
from medtl_ext.transfer import Source
from medtl_ext.transfer.sources import pretraining_job

SOURCES = ["14-T2-ED", "14-FLAIR-ED", "14-T2-ET"]
TINY = {
    "target_task": "17-T2-ED",
    "sources": SOURCES,
    "affinity": "context",
    "affinity_patients": 2,
    "n_clusters": 1,
    "source_patients": 3,
    "stage_patients": 1,
    "spacing": [6.0, 6.0, 8.0],
    "roi_size": [32, 32],
    "network_def#features": [4, 4, 8, 8, 8, 4],
    "pool_epochs": 1,
    "epochs": 1,
    "iterations_per_epoch": 4,
    "batch_size": 4,
    "n_jobs": 1,
    "figures": False,
    "progress": False,
    "check_data": False,
}
BUNDLE = Bundle("sequential_transfer", TINY)
run, start = BUNDLE.run, BUNDLE.start
SETTINGS = {key: value for key, value in TINY.items() if "#" not in key and key not in ("sources", "target_task")}

pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


@pytest.fixture(scope="session")
def path_collection(tmp_path_factory) -> Path:
    """Two institutions of eight synthetic patients: four to train on, two each to validate and test."""
    folder, modalities = tmp_path_factory.mktemp("phantom") / "collection", ["T2", "FLAIR"]
    return generate_phantom(
        folder, institutions=["14", "17"], subjects=8, modalities=modalities, n_jobs=1, progress=False
    )


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    """Where pre-trained networks are kept, trained by the first test that needs them."""
    return tmp_path_factory.mktemp("pool")


@pytest.fixture
def options(path_collection, pool, tmp_path) -> dict:
    return {"collection": str(path_collection), "source_dir": str(pool), "output_dir": str(tmp_path / "out")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


# The whole of train.json


def test_the_whole_run_leaves_what_it_promises(options, in_this_process, capsys):
    run(**options, figures=True, **{"check_data": True})
    folder = Path(options["output_dir"])
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == f"results are in {folder}"
    names = {path.name for path in folder.iterdir()}
    plan_files = {"plan.json", "paths.csv", "clusters.csv", "task_graph.json", "task_graph.graphml", "task_graph.png"}
    audit_files = {"audit.csv", "audit.json", "audit.png", "arms.csv", "answer.txt"}
    assert names == {"config.json", "report.html", "arms", "stages"} | plan_files | audit_files
    plan = json.loads((folder / "plan.json").read_text())
    first, middle = plan["paths"][0]["tasks"]
    arms = pd.read_csv(folder / "arms.csv")
    test = arms[arms["split"] == "test"].set_index("method")
    assert {"zero_shot", "scratch", "single", "single_full", "sequential", "sequential_full"} <= set(test.index)
    assert test.loc["sequential", "path"] == f"{first} -> {middle} -> 17-T2-ED"
    assert test.loc["single", "path"] == f"{plan['single']} -> 17-T2-ED"
    for arm in test.index:
        rows = pd.read_csv(folder / "arms" / arm / "metrics.csv")
        mean = rows[rows["split"] == "test"]["dice"].mean()
        assert test.loc[arm, "dice"] == pytest.approx(mean, abs=1e-5)
    leep = json.loads((folder / "arms" / "sequential" / "leep.json").read_text())["leep"]
    assert leep <= 0
    assert json.loads((folder / "audit.json").read_text())["text"] in (folder / "answer.txt").read_text()


def test_arms_spend_as_many_labelled_patients_and_start_from_each_other(options, in_this_process):
    run(**options)
    folder = Path(options["output_dir"])
    plan = json.loads((folder / "plan.json").read_text())
    first, middle = plan["paths"][0]["tasks"]

    def config(path: Path) -> dict:
        return json.loads((path / "config.json").read_text())

    final = config(folder / "arms" / "sequential")
    assert final["train_patients"] == 1
    stage = Path(final["source_ckpt"]).parent
    assert (config(stage)["target_task"], config(stage)["train_patients"]) == (middle, 1)
    head = Path(config(stage)["source_ckpt"]).parent
    assert (config(head)["source_task"], config(head)["train_patients"]) == (first, 2)
    single = Path(config(folder / "arms" / "single")["source_ckpt"]).parent
    assert (config(single)["source_task"], config(single)["train_patients"]) == (plan["single"], 3)
    encoder = "conv_0.conv_0.conv.weight"
    before, after = weights(head)[encoder], weights(folder / "arms" / "sequential")[encoder]
    assert torch.equal(before, after)  # frozen at every step
    assert not torch.equal(before, weights(folder / "arms" / "sequential_full")[encoder])
    assert torch.equal(weights(folder / "arms" / "zero_shot")[encoder], weights(single)[encoder])


def test_what_is_done_is_not_done_again(options, in_this_process):
    run(**options)
    before = list(in_this_process)
    answer = (Path(options["output_dir"]) / "answer.txt").read_text()
    run(**options)
    assert in_this_process == before
    assert (Path(options["output_dir"]) / "answer.txt").read_text() == answer
    lost = Path(options["output_dir"]) / "arms" / "single"
    (lost / "metrics.csv").unlink()
    run(**options)
    assert in_this_process == [*before, lost]
    assert (Path(options["output_dir"]) / "answer.txt").read_text() == answer


@pytest.mark.parametrize(
    ("source_patients", "spent"),
    [(3, "at equal numbers of labelled patients (3 of sources)"), (None, "each with all patients of its first source")],
)
def test_without_a_path_one_step_is_taken(options, in_this_process, capsys, source_patients, spent):
    run(**options, n_clusters=3, source_patients=source_patients)
    folder = Path(options["output_dir"])
    assert f"On the test patients, {spent}:" in capsys.readouterr().out
    assert "one task each" in json.loads((folder / "plan.json").read_text())["no_path"]
    assert set(pd.read_csv(folder / "arms.csv")["method"]) == {"zero_shot", "scratch", "single", "single_full"}
    assert "One step is all there is" in (folder / "answer.txt").read_text()


def test_the_command_for_own_data_finds_a_path(options, path_collection):
    """The README's: its tasks and clusters, on two institutions A and B with T1 and FLAIR."""
    text = (BUNDLE.root / "docs" / "README.md").read_text().split("--collection my/collection.json")[1].split("```")[0]
    words = dict(pairwise(shlex.split(text.replace("\\\n", " "))))
    content = path_collection.read_text().replace('"T2":', '"T1":')
    for ours, theirs in (("14", "A"), ("17", "B")):
        content = content.replace(f'"institution": "{ours}"', f'"institution": "{theirs}"')
    own = path_collection.with_name("own.json")
    own.write_text(content)
    options["collection"] = str(own)
    named = {"target_task": words["--target_task"], "sources": ast.literal_eval(words["--sources"])}
    run("select", **options | named, n_clusters=int(words["--n_clusters"]))
    plan = json.loads((Path(options["output_dir"]) / "plan.json").read_text())
    assert len(plan["paths"][0]["tasks"]) == 2


def test_without_intermediate_tasks_one_step_is_all_there_is(options, in_this_process):
    run(**options, max_intermediates=0)
    folder = Path(options["output_dir"])
    assert len(json.loads((folder / "plan.json").read_text())["paths"][0]["tasks"]) == 1
    assert not pd.read_csv(folder / "arms.csv")["method"].str.startswith("sequential").any()
    assert "One step is all there is: max_intermediates is 0." in (folder / "answer.txt").read_text()


def test_without_patients_to_validate_on_nothing_is_decided(options, in_this_process):
    run(**options, n_clusters=3, val_split="train")
    folder = Path(options["output_dir"])
    assert "nothing is decided" in (folder / "answer.txt").read_text()
    assert set(pd.read_csv(folder / "arms.csv")["split"]) == {"train", "test"}
    assert not (folder / "audit.json").exists()


def test_two_tasks_together_have_labels_of_their_own(options):
    def training(*overlays, task: str, patients: int, **asked):
        asked |= {"source_task": task, "target_task": task, "train_patients": patients}
        parser = BUNDLE.workflow("pretrain", *overlays, **options, **asked).parser
        return parser.get_parsed_content("train#dataloader#dataset")

    both = training("joint", task="14-T2-ED", patients=2, joint_task="14-T2-ET", joint_patients=1)
    alone = training(task="14-T2-ED", patients=2), training(task="14-T2-ET", patients=1)
    for ours, theirs in zip(both.datasets, alone, strict=True):
        for one, other in zip(ours.plain(), theirs.plain(), strict=True):
            assert torch.equal(one["label"], other["label"])


def test_the_pool_does_not_depend_on_target_or_path(options):
    def folder(**changed):
        config = BUNDLE.workflow(**options | changed).parser.get()
        config |= {"bundle_root": str(BUNDLE.root), "train_patients": 2}
        return pretraining_job(config, "sources", Source("14-T2-ED", "task", task="14-T2-ED"), seed=0).output_dir

    for changed in ({"target_task": "17-FLAIR-ET"}, {"affinity": "seqtran"}, {"sources": SOURCES[:1]}, {"epochs": 3}):
        assert folder(**changed) == folder(), changed
    assert folder(pool_epochs=2) != folder()


@pytest.mark.parametrize("overlay", ["risk_map", "paper"])
def test_overlays_reach_every_step(options, in_this_process, overlay, path_collection):
    run(overlay, **options, batch_size=4)
    folder = Path(options["output_dir"])
    stages = [path.parent for path in folder.glob("stages/**/config.json")]
    assert stages
    for path in [*stages, folder / "arms" / "sequential_full"]:
        if overlay == "risk_map":
            assert list(path.glob("weight_*.nii.gz")), path
        else:
            assert json.loads((path / "config.json").read_text())["learning_rate"] == 0.01
    assert not list((folder / "arms" / "scratch").glob("weight_*.nii.gz"))


def test_three_dimensions(options, in_this_process):
    small = {"network_def#filters": [4, 4, 8, 8], "roi_size": [32, 32, 24], "batch_size": 1}
    tiny = {key: value for key, value in TINY.items() if key != "network_def#features"} | small | {"n_clusters": 3}
    Bundle("sequential_transfer", tiny).run("3d", **options)
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
        assert json.loads((Path(out) / "plan.json").read_text())["target"] == target
        table = pd.read_csv(Path(out) / "paths.csv")
        assert table.groupby("kind")["cost"].apply(lambda cost: cost.is_monotonic_increasing).all()


@pytest.mark.parametrize("val_split", ["val", "train"])
def test_weights_are_fitted_to_transfers(options, in_this_process, path_collection, tmp_path, val_split):
    settings = SETTINGS | {"collection": str(path_collection), "source_dir": options["source_dir"]}
    settings |= {"val_split": val_split}
    shared = {"base": "fit", "sources": SOURCES, "targets": ["17-T2-ED"], "settings": settings}
    settings["network_def"] = BUNDLE.content("train")["network_def"] | {"features": TINY["network_def#features"]}
    folder = Path(options["output_dir"])
    run(**shared, output_dir=str(folder))
    table = pd.read_csv(folder / "transfers.csv")
    assert list(table["source"]) == SOURCES
    before = list(in_this_process)

    # The networks are too small to segment anything, so the Dice of two weights is planted.
    alpha, beta = 0.3 / table["distance"].max(), 0.3
    dice = 0.9 - alpha * table["distance"] - beta * (1 - table["similarity"])
    for source, value in zip(table["source"], dice, strict=True):
        metrics = folder / "runs" / "17-T2-ED" / "seed0" / source / "metrics.csv"
        rows = pd.read_csv(metrics)
        assert set(rows["split"]) == {val_split, "test"}
        rows["dice"] = np.where(rows["split"] == val_split, value, 0.5)
        rows.to_csv(metrics, index=False)
    run(**shared, output_dir=str(folder))
    fitted = json.loads((folder / "affinity_weights.json").read_text())
    assert (fitted["alpha"], fitted["beta"]) == pytest.approx((alpha, beta), rel=1e-3)

    table = pd.read_csv(folder / "transfers.csv")
    table[["source", "target", "dice"]].to_csv(tmp_path / "measured.csv", index=False)
    run(**shared, output_dir=str(tmp_path / "again"), transfers=str(tmp_path / "measured.csv"))
    assert in_this_process == before
    again = json.loads((tmp_path / "again" / "affinity_weights.json").read_text())
    assert (again["alpha"], again["beta"]) == pytest.approx((alpha, beta), rel=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"affinity": "seqtrann"}, "expected seqtran or context"),
        ({"sources": []}, "sources is []; give a list"),
        ({"sources": ["14-T2-ED", "14-T2-ED"]}, "names 14-T2-ED twice"),
        ({"sources": ["14-T2-EDD"]}, "did you mean 'ED'"),
        ({"sources": [*SOURCES, "17-T2-ED"]}, "is one of the sources"),
        ({"sources": ["14-FLAIR-ET"]}, "no source shares modality or objective"),
        ({"target_task": "17-T2-EDD"}, "did you mean 'ED'"),
        ({"target_task": "17-T1-ED"}, "modality 'T1' is unknown"),
        ({"stage_patients": 0}, "expected a whole number, 1 or more"),
        ({"stage_patients": 9, "source_patients": None}, "fewer than the 9 that are to be spent"),
        ({"train_patients": 9}, "task 17-T2-ED has 3 training patients, fewer than the 9"),
        ({"source_patients": 1}, "leave none to pre-train on"),
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"max_intermediates": 1, "representative_rule": "siz"}, "did you mean 'size'"),
        ({"task_graph": "nowhere.json"}, "nowhere.json does not exist"),
        ({"collection": "nowhere.json"}, "does not exist"),
        ({"affinty": "context"}, "did you mean --affinity"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_option_is_refused_before_training(wrong, message, options, no_training):
    assert message in refused(lambda: run(**options | wrong))


def test_a_step_without_its_checkpoint_is_refused(options, tmp_path):
    def stage(checkpoint: Path) -> str:
        step = {"source_task": SOURCES[0], "source_ckpt": str(checkpoint), "train_patients": 1}
        return refused(lambda: run("stage", **options | {"output_dir": str(tmp_path / "stage")}, **step))

    assert "--source_ckpt is not given" in refused(lambda: run("stage", **options, source_task=SOURCES[0]))
    assert "missing.pt" in stage(tmp_path / "missing.pt")
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "does not fit" in stage(tmp_path / "other.pt")


# The configs agree


def test_inference_prepares_images_as_training_did():
    train = BUNDLE.content("train")
    inference = BUNDLE.content("inference")
    for key in ("spacing", "roi_size"):
        assert inference[key] == train[key]
    assert inference["network_def"] == train["network_def"]
    images = [step for step in train["train"]["deterministic_transforms"] if "image" in step["keys"]]
    steps = inference["preprocessing"]["transforms"]
    assert [step["_target_"] for step in steps] == [step["_target_"] for step in images]


def test_the_default_graph_is_as_large_as_promised():
    train = BUNDLE.content("train")
    parts = [source.split("-") for source in train["sources"]]
    assert len(parts) >= 24
    assert [len({part[place] for part in parts}) for place in range(3)] == [4, 3, 2]
    assert train["target_task"].split("-")[0] not in {part[0] for part in parts}


# As users start it


@pytest.mark.slow
def test_killed_at_any_step_the_next_run_gives_the_same(options, tmp_path):
    """Killed once in the pre-training, between two of its epochs, and once on the target."""
    long = TINY | {"pool_epochs": 6, "epochs": 3, "collection": options["collection"]}
    whole = long | {"source_dir": str(tmp_path / "pool0"), "output_dir": str(tmp_path / "whole")}
    finish(start(["configs/train.json"], whole))
    cut = long | {"source_dir": str(tmp_path / "pool1"), "output_dir": str(tmp_path / "cut")}
    for pattern in ("pool1/*/last.pt", "cut/stages/**/last.pt", "cut/arms/*/last.pt"):
        kill_once_there(start(["configs/train.json"], cut), tmp_path / pattern)
        assert not (tmp_path / "cut" / "answer.txt").exists()
    finish(start(["configs/train.json"], cut))
    assert (tmp_path / "cut" / "answer.txt").read_text() == (tmp_path / "whole" / "answer.txt").read_text()
    for arm in (tmp_path / "whole" / "arms").iterdir():
        ours, theirs = weights(tmp_path / "cut" / "arms" / arm.name), weights(arm)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), arm.name


@pytest.mark.slow
def test_a_step_on_two_processes(options, tmp_path):
    run("pretrain", **options | {"output_dir": str(tmp_path / "head")}, source_task=SOURCES[0], train_patients=3)
    files = [f"configs/{name}.json" for name in ("train", "stage", "multi_gpu_train")]
    step = {"source_task": SOURCES[0], "source_ckpt": str(tmp_path / "head" / "model.pt"), "train_patients": 2}
    finish(start(files, TINY | options | step, processes=2))
    rows = pd.read_csv(Path(options["output_dir"]) / "metrics.csv")
    assert set(rows["split"]) == {"val", "test"}
    assert np.isfinite(rows["dice"]).all()
    scored = {"ckpt": str(Path(options["output_dir"]) / "model.pt"), "output_dir": str(tmp_path / "scored")}
    files = [f"configs/{name}.json" for name in ("train", "evaluate", "multi_gpu_evaluate")]
    finish(start(files, TINY | options | scored, processes=2))
    again = pd.read_csv(tmp_path / "scored" / "metrics.csv").set_index("subject")["dice"]
    before = rows[rows["split"] == "test"].set_index("subject")["dice"]
    pd.testing.assert_series_equal(again.sort_index(), before.sort_index(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_study_runs_end_to_end_and_is_continued(options, tmp_path, path_collection):
    network = BUNDLE.content("train")["network_def"] | {"features": TINY["network_def#features"]}
    settings = SETTINGS | {"collection": str(path_collection), "network_def": network, "n_clusters": 1}
    settings |= {"source_dir": str(tmp_path / "pool")}
    whole = {
        "targets": ["17-T2-ED", "17-FLAIR-ED"],
        "sources": SOURCES,
        "seeds": [0],
        "affinities": ["seqtran", "context"],
        "settings": settings,
        "output_dir": str(tmp_path / "study"),
    }
    finish(start(["configs/study.json"], whole))
    table = pd.read_csv(tmp_path / "study" / "study.csv")
    steps = table[table["target"] == "17-T2-ED"]["steps"].value_counts()
    assert (steps[1], steps[2]) == (3, 4)  # two joined pairs, in either order
    assert np.isfinite(table[["dice", "iou"]]).all(axis=None)
    assert (table["leep"].dropna() <= 0).all()
    assert "| path | context |" in (tmp_path / "study" / "study.md").read_text()
    before = trainings(tmp_path)
    finish(start(["configs/study.json"], whole))
    assert before
    assert trainings(tmp_path) == before
