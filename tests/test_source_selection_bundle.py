"""The source_selection bundle on a tiny phantom: what it leaves, what it refuses, and every way to start it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import REPOSITORY, Bundle, finish, kill_once_there, refused, trainings
from fire.parser import DefaultParseValue  # how the command line reads a word
from monai.bundle import ConfigWorkflow
from monai.networks.nets import BasicUNet

from medtl_ext.data import generate_phantom
from medtl_ext.transfer.sources import Source, built, pretraining_job

SOURCES = ["14-T2-ED", "14-FLAIR-ED", "14-T2-ET"]
FEATURES = [4, 4, 8, 8, 8, 4]
TINY = {
    "sources": SOURCES,
    "spacing": [6.0, 6.0, 8.0],
    "roi_size": [32, 32],
    "network_def#features": FEATURES,
    "pool_epochs": 1,
    "epochs": 1,
    "iterations_per_epoch": 4,
    "batch_size": 4,
    "train_slices": 16,
    "pixels": 40,
    "n_resamples": 50,
    "n_jobs": 1,
    "figures": False,
    "progress": False,
    "check_data": False,
}

BUNDLE = Bundle("source_selection", TINY)
run, start = BUNDLE.run, BUNDLE.start
pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


@pytest.fixture(scope="session")
def selection_collection(tmp_path_factory) -> Path:
    """Two institutions of ten synthetic patients: four to train on."""
    return generate_phantom(
        tmp_path_factory.mktemp("phantom") / "collection",
        institutions=["14", "17"],
        subjects=10,
        modalities=["T2", "FLAIR"],
        n_jobs=1,
        progress=False,
    )


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    """Where the pool's networks are kept, trained by the first test that needs them."""
    return tmp_path_factory.mktemp("pool")


@pytest.fixture
def options(selection_collection, pool, tmp_path) -> dict:
    return {"collection": str(selection_collection), "source_dir": str(pool), "output_dir": str(tmp_path / "out")}


def ranking_of(folder: Path | str) -> pd.DataFrame:
    return pd.read_csv(Path(folder) / "ranking.csv").set_index("source")


# The whole of train.json


def test_the_whole_run_leaves_what_it_promises(options, in_this_process, capsys):
    run(**options, figures=True, **{"check_data": True})
    folder = Path(options["output_dir"])
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1] == f"results are in {folder}"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "ranking.csv", "ranking.json", "ranking.png", "answer.txt", "report.html"}
    table = ranking_of(folder)
    assert set(table.index) == {*SOURCES, "scratch"}
    metrics = BUNDLE.content("train")["metrics"]
    assert np.isfinite(table.loc[SOURCES, metrics].to_numpy(float)).all()
    assert table.loc[SOURCES, ["ssim", "roi_dice", "roi_shape", "own_dice", "size"]].notna().all(axis=None)
    assert table.loc["scratch", "status"] == "no score"
    assert table["score"].iloc[:-1].is_monotonic_decreasing
    assert {"random_rank", "source_size_rank", "static_rank", "rank_low", "p_best"} <= set(table.columns)
    content = json.loads((folder / "ranking.json").read_text())
    assert content["patients"] == 4
    assert content["decided_by"] == "h_score"
    assert "No score can judge" in content["answer"] or "no score can judge" in content["answer"]
    assert (folder / "answer.txt").read_text().startswith(content["answer"])
    words = shlex.split(content["command"])
    assert content["default"] in words
    assert Path(words[words.index("--source_ckpt") + 1]).is_file()


def test_the_command_for_risk_map_is_one_that_risk_map_takes(options, in_this_process):
    run(**options)
    words = shlex.split(json.loads((Path(options["output_dir"]) / "ranking.json").read_text())["command"])
    given = {name[2:]: DefaultParseValue(value) for name, value in zip(words[6::2], words[7::2], strict=True)}
    root = REPOSITORY / "bundles" / "risk_map" / "configs" / "train.json"
    workflow = ConfigWorkflow(
        config_file=str(root), workflow_type="train", **given | {"network_def#features": FEATURES}
    )
    workflow.initialize()  # refuses options that risk_map does not have
    source = workflow.parser.get_parsed_content("source_network")
    weights = torch.load(given["source_ckpt"], weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


def test_a_second_run_gives_the_same_and_trains_nothing(options, in_this_process, tmp_path):
    run(**options)
    before = list(in_this_process)
    run(**options | {"output_dir": str(tmp_path / "again")})
    assert in_this_process == before
    pd.testing.assert_frame_equal(ranking_of(options["output_dir"]), ranking_of(tmp_path / "again"))


def test_the_pool_does_not_depend_on_the_target_or_the_selection(options):
    def folder(**changed):
        config = BUNDLE.workflow(**options | changed).parser.get() | {"bundle_root": str(BUNDLE.root)}
        return pretraining_job(config, "sources", Source("s", "task", task="14-T2-ED"), seed=0).output_dir

    for changed in ({"target_task": "17-FLAIR-ET"}, {"method": "paper"}, {"sources": ["14-T2-ED"]}, {"pixels": 7}):
        assert folder(**changed) == folder(), changed
    assert folder(pool_epochs=2) != folder()


def test_the_method_of_the_paper_says_what_each_filter_did(options, in_this_process):
    run(**options, method="paper", metrics=["h_score_map", "otce"])
    table = ranking_of(options["output_dir"])
    assert table.loc["14-FLAIR-ED", "status"] == "dropped"
    assert "modality FLAIR: dropped" in table.loc["14-FLAIR-ED", "reason"]
    assert sorted(table.loc[["14-T2-ED", "14-T2-ET"], "status"]) == ["dropped", "ranked"]
    assert table.loc[["14-T2-ED", "14-T2-ET"], "reason"].str.contains("label SSIM").all()
    content = json.loads((Path(options["output_dir"]) / "ranking.json").read_text())
    assert content["decided_by"] == "h_score_map"
    assert "Without prior knowledge" in content["answer"]
    assert "only candidate" in content["answer"]


def test_ties_are_settled_by_finished_fine_tunings(options, in_this_process, capsys):
    run(**options, settle=True, sources=SOURCES[:2], minimum_gap=1.0, metrics=["h_score"])
    content = json.loads((Path(options["output_dir"]) / "ranking.json").read_text())
    assert set(content["settled"]["dice"]) == {*content["tied"], "scratch"}
    assert "Settled by fine-tuning" in content["answer"]
    encoder = "conv_0.conv_0.conv.weight"
    for name in content["tied"]:  # the encoder is frozen
        tuned = torch.load(Path(options["output_dir"]) / "settle" / name / "model.pt", weights_only=True)
        row = ranking_of(options["output_dir"]).loc[name]
        assert torch.equal(tuned[encoder], torch.load(row["checkpoint"], weights_only=True)[encoder])


def test_the_evaluation_compares_rankings_with_the_truth(options, in_this_process):
    run("evaluate", **options, sources=SOURCES[:2], metrics=["h_score", "leep"], figures=True)
    folder = Path(options["output_dir"])
    truth_table = pd.read_csv(folder / "truth.csv").set_index("source")
    assert set(truth_table.index) == {*SOURCES[:2], "scratch"}
    for name in truth_table.index:
        rows = pd.read_csv(folder / "finetune" / name / "metrics.csv")
        mean = rows[rows["split"] == "test"]["dice"].mean()
        assert truth_table.loc[name, "dice"] == pytest.approx(mean, abs=1e-5)
    agreement = pd.read_csv(folder / "agreement.csv")
    assert {"shrunk H-score", "LEEP", "random", "source size"} <= set(agreement["ranker"])
    assert set(agreement["prior"]) == {"none", "modality", "modality + SSIM"}
    assert (folder / "agreement.png").is_file()
    assert "| shrunk H-score | none |" in (folder / "agreement.md").read_text()


# Other candidates


def test_checkpoints_and_bundles_are_ranked_beside_tasks(options, in_this_process, tmp_path):
    network = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": FEATURES}
    arguments = {key: value for key, value in network.items() if key != "_target_"}
    torch.save(BasicUNet(**arguments).state_dict(), tmp_path / "ours.pt")
    for name, definition in {"fits": network, "four": network | {"in_channels": 4}}.items():
        folder = tmp_path / "zoo" / name
        (folder / "configs").mkdir(parents=True)
        (folder / "models").mkdir()
        (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": definition}))
        weights = BasicUNet(**arguments | {"in_channels": definition["in_channels"]}).state_dict()
        torch.save(weights, folder / "models" / "model.pt")
    sources = [
        "14-T2-ED",
        {"name": "ours", "checkpoint": str(tmp_path / "ours.pt"), "network": network, "modality": "T2"},
        {"bundles": str(tmp_path / "zoo")},
    ]
    run("evaluate", **options, sources=sources, metrics=["h_score", "otce"])
    table = ranking_of(options["output_dir"])
    assert table.loc[["14-T2-ED", "ours", "fits"], "h_score"].notna().all()
    assert table.loc[["ours", "fits"], "otce"].isna().all()
    assert table.loc["four", "status"] == "left out"
    assert "4 channels" in table.loc["four", "reason"]
    assert "four (its network takes 4 channels" in (Path(options["output_dir"]) / "answer.txt").read_text()
    scores = pd.read_csv(Path(options["output_dir"]) / "truth.csv").set_index("source")
    assert set(scores.index) == {"14-T2-ED", "ours", "fits", "scratch"}


def test_the_command_for_another_network_is_one_that_this_bundle_takes(options, in_this_process, tmp_path):
    network = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8]}
    network |= {"strides": [2], "norm": ["batch", {"affine": True}]}
    torch.save(built(network).state_dict(), tmp_path / "ours.pt")
    ours = {"name": "ours", "checkpoint": str(tmp_path / "ours.pt"), "network": network}
    run(**options, sources=[ours], metrics=["h_score"])
    words = shlex.split(json.loads((Path(options["output_dir"]) / "ranking.json").read_text())["command"])
    assert "finetune.json" in words[5]
    given = {name[2:]: DefaultParseValue(value) for name, value in zip(words[6::2], words[7::2], strict=True)}
    assert given["network_def"]["norm"] == ["batch", {"affine": True}]
    out = options | given | {"output_dir": str(tmp_path / "tuned")}
    run("finetune", **{key: value for key, value in out.items() if key != "sources"})
    assert len(pd.read_csv(tmp_path / "tuned" / "metrics.csv")) > 0


def test_a_pool_of_one_has_a_verdict_that_says_so(options, in_this_process):
    run(**options, sources=SOURCES[:1], metrics=["h_score"])
    content = json.loads((Path(options["output_dir"]) / "ranking.json").read_text())
    assert content["recommendation"] is None
    assert "the only candidate" in content["answer"]


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metrics": ["h_scor"]}, "did you mean 'h_score'"),
        ({"decide_by": "logm"}, "did you mean 'logme'"),
        ({"method": "papr"}, "did you mean 'paper'"),
        ({"minimum_win": 0.4}, "minimum_win"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"top_k": 0}, "top_k is 0"),
        ({"settle": True, "val_split": "train"}, "give --settle false"),
        ({"sources": []}, "at least one source"),
        ({"sources": ["14-T2-ED", "14-T2-ED"]}, "twice"),
        ({"sources": ["14-T2-EDD"]}, "did you mean 'ED'"),
        ({"target_task": "17-T2-EDD"}, "did you mean 'ED'"),
        ({"target_task": "17-T1-ED"}, "modality 'T1' is unknown"),
        ({"sources": ["17-T2-ED"]}, "no source is left: 17-T2-ED is the target's own model"),
        ({"collection": "nowhere.json"}, "does not exist"),
        ({"source": SOURCES}, "did you mean --sources"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_option_is_refused_before_training(wrong, message, options, no_training):
    assert message in refused(lambda: run(**options | wrong))


def test_a_network_that_does_not_match_its_weights_is_refused(options, no_training, tmp_path):
    torch.save(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)).state_dict(), tmp_path / "x.pt")
    message = refused(lambda: run(**options, sources=[{"name": "ours", "checkpoint": str(tmp_path / "x.pt")}]))
    assert "source ours" in message
    assert "does not fit" in message


def test_a_3d_source_for_2d_slices_is_refused(options, no_training, tmp_path):
    torch.save(BasicUNet(3, 1, 2, features=FEATURES).state_dict(), tmp_path / "x.pt")
    network = {"_target_": "BasicUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": FEATURES}
    sources = [{"name": "ours", "checkpoint": str(tmp_path / "x.pt"), "network": network}]
    assert "source ours: its network is 3D, the target's images are 2D" in refused(
        lambda: run(**options, sources=sources)
    )


def damaged(collection: Path, folder: Path, damage) -> str:
    """A copy of the collection's file, changed, with labels of its own where they are."""
    folder.mkdir()
    content = json.loads(collection.read_text())
    for subject in content["subjects"]:
        for kind in ("images", "labels"):
            subject[kind] = {key: str(collection.parent / path) for key, path in subject[kind].items()}
        damage(folder, subject)
    (folder / "collection.json").write_text(json.dumps(content))
    return str(folder / "collection.json")


def test_a_target_without_labels_is_refused(options, selection_collection, no_training, tmp_path):
    def damage(folder, subject):
        if subject["institution"] == "17":
            subject["labels"].pop("tumour")

    broken = damaged(selection_collection, tmp_path / "bad", damage)
    message = refused(lambda: run(**options | {"collection": broken}))
    assert "no subject in split 'train'" in message


def test_a_target_without_foreground_is_refused(options, selection_collection, no_training, tmp_path):
    def damage(folder, subject):
        if subject["institution"] == "17":
            image = nib.load(subject["labels"]["tumour"])
            empty = folder / f"{subject['id']}.nii.gz"
            nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), empty)
            subject["labels"]["tumour"] = str(empty)

    broken = damaged(selection_collection, tmp_path / "bad", damage)
    message = refused(lambda: run(**options | {"collection": broken, "check_data": True}))
    assert "training subjects" in message or "foreground" in message


# The configs agree


def test_the_default_pool_covers_modalities_institutions_and_objectives():
    sources = BUNDLE.content("train")["sources"]
    parts = [source.split("-") for source in sources]
    assert len(sources) >= 8
    assert all(len({part[place] for part in parts}) == 2 for place in range(3))
    study = BUNDLE.content("study")
    assert len(study["targets"]) >= 4
    assert len(study["sources"]) >= 8
    assert len(study["seeds"]) >= 2


# As users start it


@pytest.mark.slow
def test_a_misspelled_option_gives_one_line(options):
    process = start(["configs/train.json"], TINY | options | {"metrics": ["h_scor"]})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.rstrip().splitlines()[-1].startswith("error: metric 'h_scor' is unknown")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_killed_in_the_middle_of_the_pool_the_next_run_continues(options, tmp_path):
    long = TINY | options | {"source_dir": str(tmp_path / "pool"), "iterations_per_epoch": 60}
    kill_once_there(start(["configs/train.json"], long), tmp_path / "pool/*/metrics.csv")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("*/model.pt")}
    finished = {path.parent for path in (tmp_path / "pool").glob("*/metrics.csv")}
    finish(start(["configs/train.json"], long))
    assert len(list((tmp_path / "pool").glob("*/metrics.csv"))) == len(SOURCES)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items() if path.parent in finished)
    assert (Path(options["output_dir"]) / "answer.txt").is_file()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(options, tmp_path):
    run_options = TINY | options | {"source_dir": str(tmp_path / "pool")}
    files = ["configs/train.json", "configs/multi_gpu_train.json"]
    finish(start(files, run_options | {"output_dir": str(tmp_path / "two")}, processes=2))
    finish(start(files[:1], run_options | {"output_dir": str(tmp_path / "one")}))
    one, two = ranking_of(tmp_path / "one"), ranking_of(tmp_path / "two")
    numbers = one.select_dtypes("number").columns
    pd.testing.assert_frame_equal(one[numbers], two[numbers].loc[one.index], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_a_study_runs_end_to_end_and_is_continued(options, tmp_path):
    settings = {key: value for key, value in TINY.items() if "#" not in key and key not in ("sources", "n_jobs")}
    settings |= {
        "collection": options["collection"],
        "source_dir": str(tmp_path / "pool"),
        "metrics": ["h_score", "leep"],
    }
    study = {
        "targets": ["17-T2-ED", "17-FLAIR-ET"],
        "sources": SOURCES,
        "seeds": [0],
        "settings": settings,
        "output_dir": str(tmp_path / "study"),
    }
    finish(start(["configs/study.json"], study))
    names = {path.name for path in (tmp_path / "study").iterdir()}
    assert {"study.csv", "study.md", "agreement.csv", "critical_difference.png", "priors.png"} <= names
    table = pd.read_csv(tmp_path / "study" / "study.csv")
    assert len(table) == 2 * (len(SOURCES) + 1)
    assert len(list((tmp_path / "pool").glob("*/metrics.csv"))) == len(SOURCES)
    before = trainings(tmp_path)
    finish(start(["configs/study.json"], study))
    assert before
    assert trainings(tmp_path) == before
