"""Tests of the bundle source_selection only: rankings, filters, settling ties, candidates, and refused input."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import (
    RISK_MAP,
    SEGMENTATION,
    SETTLED,
    SOURCE_SELECTION,
    Bundle,
    bundle_of_a_stranger,
    next_command,
    ranking_of,
    read_json,
    refused,
)

from medtl_ext.transfer import rank
from medtl_ext.transfer.sources.allowed import built_network

SOURCES = SOURCE_SELECTION.tiny["sources"]
FEATURES = SOURCE_SELECTION.tiny["network_def#features"]
NETWORK = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": FEATURES}
run = SOURCE_SELECTION.run
pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


def test_the_command_for_risk_map_is_one_that_risk_map_takes(whole_run):
    _, given = next_command(whole_run(SOURCE_SELECTION))
    workflow = RISK_MAP.workflow(**given | {"network_def#features": FEATURES})
    workflow.initialize()  # refuses options that risk_map does not have
    source = workflow.parser.get_parsed_content("source_network")
    weights = torch.load(given["source"]["checkpoint"], weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


def test_scans_of_a_patient_are_resampled_together(options, collection, in_this_process, tmp_path):
    """Here the target's four training scans come from two patients."""
    numbers = iter(range(100))

    def damage(folder, subject):
        if subject["institution"] == "17" and subject["split"] == "train":
            subject["patient"] = f"17-p{next(numbers) % 2}"

    twice = damaged(collection, tmp_path / "twice", damage)
    run(**options | {"collection": twice, "source_collection": options["collection"]}, metrics=["h_score"])
    assert read_json(Path(options["output_dir"]) / "ranking.json")["patients"] == 2


def test_the_method_of_the_paper_says_what_each_filter_did(options, in_this_process):
    run(**options, method="paper", metrics=["h_score_map", "otce"])
    table = ranking_of(options["output_dir"])
    assert table.loc["14-FLAIR-ED", "status"] == "dropped"
    assert "modality FLAIR: dropped" in table.loc["14-FLAIR-ED", "reason"]
    assert sorted(table.loc[["14-T2-ED", "14-T2-ET"], "status"]) == ["dropped", "ranked"]
    assert table.loc[["14-T2-ED", "14-T2-ET"], "reason"].str.contains("label SSIM").all()
    content = read_json(Path(options["output_dir"]) / "ranking.json")
    assert content["decided_by"] == "h_score_map"
    assert "Without prior knowledge" in content["answer"]
    assert "only candidate" in content["answer"]


PAPER = Bundle("source_selection", SEGMENTATION | {"batch_size": 20})


@pytest.mark.parametrize(("training", "epochs"), [("pretrain", "@pool_epochs"), ("finetune", 10)])
def test_the_setting_of_the_paper_reaches_every_training(training, epochs):
    config = Bundle("source_selection").workflow("paper", training).parser.get()
    optimizer = {key: config["optimizer"][key] for key in ("_target_", "lr", "weight_decay")}
    assert optimizer == {"_target_": "torch.optim.Adam", "lr": 1e-4, "weight_decay": 5e-5}
    assert (config["loss"]["lambda_dice"], config["lr_scheduler"]["power"], config["batch_size"]) == (0, 0, 20)
    assert (config["train"]["random_transforms"], config["flip_axes"]) == ([], [])
    assert (config["epochs"], config["pool_epochs"], config["iterations_per_epoch"]) == (epochs, 100, 100)


def test_the_paper_runs_a_few_iterations(options, in_this_process):
    few = {"pool_epochs": 1, "epochs": 1, "iterations_per_epoch": 2, "n_resamples": 5, "pixels": 40}
    PAPER.run("paper", **options | few | {"sources": SOURCES[:1], "metrics": ["h_score_map"], "train_slices": 16})
    table, config = ranking_of(options["output_dir"]), read_json(Path(options["output_dir"]) / "config.json")
    assert config["network_def"]["features"] == [64, 128, 256, 512, 1024, 64]
    weights = torch.load(table.loc["14-T2-ED", "checkpoint"], weights_only=True)
    assert sum(value.numel() for value in weights.values()) > 28e6
    assert table.loc["14-T2-ED", "status"] == "ranked"


def test_ties_are_settled_by_finished_fine_tunings(whole_run):
    folder = whole_run(SETTLED)
    content = read_json(folder / "ranking.json")
    assert set(content["settled"]["dice"]) == {*content["tied"], "scratch"}
    assert "Settled by fine-tuning" in content["answer"]
    winner = content["settled"]["source"]
    assert ("scratch.json" if winner == "scratch" else f"--source {winner}") in content["command"]
    encoder = "conv_0.conv_0.conv.weight"
    for name in content["tied"]:  # the encoder is frozen
        tuned = torch.load(folder / "settle" / name / "model.pt", weights_only=True)
        row = ranking_of(folder).loc[name]
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


def test_another_source_costs_one_pass(options, in_this_process, tmp_path, monkeypatch):
    """The stored result of a pass is used in later rankings, unless its file is damaged."""
    passes, pool = Mock(wraps=rank.observe), tmp_path / "pool"
    monkeypatch.setattr(rank, "observe", passes)
    run(**options, metrics=["h_score"])  # trains what is still missing
    shutil.copytree(options["source_dir"], pool, ignore=shutil.ignore_patterns("passes"))
    seen = {}
    for name, sources, seed, expected in [
        ("two", SOURCES[:2], 0, 2),
        ("three", SOURCES, 0, 1),
        ("again", SOURCES, 0, 0),
        ("other patients", SOURCES[:1], 1, 1),
        ("damaged", SOURCES, 0, 3),
    ]:
        if name == "damaged":
            for file in (pool / "passes").iterdir():
                file.write_bytes(file.read_bytes()[:-100])
        passes.reset_mock()
        run(**options | {"source_dir": str(pool), "output_dir": str(tmp_path / name)}, sources=sources, seed=seed)
        assert passes.call_count == expected
        seen[name] = [(tmp_path / name / file).read_bytes() for file in ("ranking.csv", "ranking.json")]
    assert seen["three"] == seen["again"] == seen["damaged"]


# Other candidates


def test_checkpoints_and_bundles_are_ranked_beside_tasks(options, in_this_process, tmp_path):
    torch.save(built_network(NETWORK).state_dict(), tmp_path / "ours.pt")
    for name, network in {"fits": NETWORK, "four": NETWORK | {"in_channels": 4}}.items():
        bundle_of_a_stranger(tmp_path / "zoo" / name, {"network_def": network}, built_network(network).state_dict())
    sources = [
        "14-T2-ED",
        {"name": "ours", "checkpoint": str(tmp_path / "ours.pt"), "network": NETWORK, "modality": "T2"},
        str(tmp_path / "zoo"),
    ]
    run("evaluate", **options, sources=sources, metrics=["h_score", "otce"])
    table = ranking_of(options["output_dir"])
    assert table.loc[["14-T2-ED", "ours", "fits"], "h_score"].notna().all()
    assert table.loc[["ours", "fits"], "otce"].isna().all()
    assert table.loc["four", "status"] == "left out"
    assert "4 channels" in table.loc["four", "reason"]
    assert "four (its network" in (Path(options["output_dir"]) / "answer.txt").read_text()
    scores = pd.read_csv(Path(options["output_dir"]) / "truth.csv").set_index("source")
    assert set(scores.index) == {"14-T2-ED", "ours", "fits", "scratch"}


def test_the_command_for_another_network_is_one_that_bundles_take(options, in_this_process, tmp_path):
    network = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8]}
    network |= {"strides": [2], "norm": ["batch", {"affine": True}]}
    torch.save(built_network(network).state_dict(), tmp_path / "ours.pt")
    ours = {"name": "ours", "checkpoint": str(tmp_path / "ours.pt"), "network": network}
    run(**options, sources=[ours], metrics=["h_score"])
    _, given = next_command(options["output_dir"])
    assert given["source"] == ours
    for bundle, overlays in ((RISK_MAP, []), (SOURCE_SELECTION, ["finetune"])):
        out = tmp_path / bundle.name
        asked = options | given | {"output_dir": str(out)}
        bundle.run(*overlays, **{key: value for key, value in asked.items() if key != "sources"})
        assert len(pd.read_csv(out / "metrics.csv")) > 0
        assert read_json(out / "model.json")["network"] == network | {"out_channels": 2}  # a source like any other


# Bad input


def test_a_checkpoint_of_another_network_is_refused(options, no_training, tmp_path):
    torch.save(built_network(NETWORK | {"features": [4] * 6}).state_dict(), tmp_path / "x.pt")
    message = refused(lambda: run(**options, sources=[{"name": "ours", "checkpoint": str(tmp_path / "x.pt")}]))
    assert message.startswith("source ours: ")
    assert "does not fit" in message


def damaged(collection: Path, folder: Path, damage) -> str:
    """A changed copy of the collection file; changed labels get their own files."""
    folder.mkdir()
    content = json.loads(collection.read_text())
    for subject in content["subjects"]:
        for kind in ("images", "labels"):
            subject[kind] = {key: str(collection.parent / path) for key, path in subject[kind].items()}
        damage(folder, subject)
    (folder / "collection.json").write_text(json.dumps(content))
    return str(folder / "collection.json")


def test_a_target_without_labels_or_foreground_is_refused(options, collection, no_training, tmp_path):
    def unlabelled(folder, subject):
        if subject["institution"] == "17":
            subject["labels"].pop("tumour")

    def empty(folder, subject):
        if subject["institution"] == "17":
            image = nib.load(subject["labels"]["tumour"])
            subject["labels"]["tumour"] = str(folder / f"{subject['id']}.nii.gz")
            nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), subject["labels"]["tumour"])

    broken = damaged(collection, tmp_path / "one", unlabelled)
    assert "no subject in split 'train'" in refused(lambda: run(**options | {"collection": broken}))
    broken = damaged(collection, tmp_path / "two", empty)
    message = refused(lambda: run(**options | {"collection": broken, "check_data": True}))
    assert "training subjects" in message or "foreground" in message
