"""Tests of the bundle dataset_transferability only: rankings, own models, real files, and refused input."""

import base64
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import DATASETS, Bundle, finish, next_command, ranking_of, read_json, refused
from PIL import Image

from medtl_ext._validation import InputError
from medtl_ext.dataset_transferability import DatasetStudy
from medtl_ext.transfer.tasks import POOLED, ClassificationTask, image_auc
from medtl_ext.transfer.truth import settings_of_grid

SOURCES = DATASETS.tiny["sources"]
run = DATASETS.run
pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


def content_of(folder: Path | str) -> dict:
    return read_json(Path(folder) / "ranking.json")


def test_the_next_command_is_one_that_the_bundle_takes(options, whole_run, tmp_path):
    config, given = next_command(whole_run(DATASETS))
    assert "finetune.json" in config
    assert Path(given["source"]["checkpoint"]).is_file()
    assert given["image_size"] == 32
    assert given["network_def"]["block_inplanes"] == [16, 16, 32, 32]
    given |= {"output_dir": str(tmp_path / "tuned"), "network_def#layers": [1, 1, 1, 1], "figures": True}
    run("finetune", **options | given)
    metrics = pd.read_csv(tmp_path / "tuned" / "metrics.csv").set_index("split")
    predictions = pd.read_csv(tmp_path / "tuned" / "predictions.csv")
    assert metrics["auc"].between(0, 1).all()
    assert metrics.loc["test", "images"] == (predictions["split"] == "test").sum()
    np.testing.assert_allclose(predictions[["p0", "p1"]].sum(axis=1), 1, atol=1e-4)
    assert predictions["subject"].str.startswith("17-").all()
    truth_of_test = image_auc(predictions[predictions["split"] == "test"])
    assert metrics.loc["test", "auc"] == pytest.approx(truth_of_test, abs=1e-4)
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert f"AUC {truth_of_test:.3f} (95 % interval" in page
    assert "Classify images of yours:" in page
    assert set(pd.read_csv(tmp_path / "tuned" / "images.csv")) == {"name", "subject", "class", "finetune"}


def test_a_report_shows_what_the_networks_say_of_test_images(whole_run, options):
    """Of a ranking the untouched sources, whose classes are read as the target's."""
    content = read_json(whole_run(DATASETS) / "pictures.json")
    table = pd.read_csv(whole_run(DATASETS) / "images.csv").set_index("name")
    target = ClassificationTask("17-T2-tumour", collection=options["collection"], image_size=32)
    items = {item["name"]: item for item in target.datalist("test")}
    assert content["untrained"]
    assert len(content["images"]) == 12
    worst, median, best, *others = content["images"]
    assert [one["rank"].split(" of ")[0] for one in (worst, median, best, others[0])] == [
        "worst",
        "median",
        "best",
        "number 2",
    ]
    assert table[content["by"]].is_monotonic_increasing
    assert set(table.index) == set(items)
    for one in content["images"]:
        item, row = items[one["name"]], table.loc[one["name"]]
        assert one["class"] == row["class"] == target.class_names[item["label"]]
        assert {arm for arm, *_ in one["said"]} == set(SOURCES)
        for arm, said, probability, right in one["said"]:
            assert right == (said == one["class"])
            assert row[arm] == pytest.approx(probability if right else 1 - probability, abs=1e-5)  # of two classes
        shown = np.asarray(Image.open(BytesIO(base64.b64decode(one["data"]))), dtype=float)
        assert np.abs(shown - item["image"][0]).mean() < 3


def test_the_evaluation_compares_scores_with_the_truth_and_leaves_the_own_model_out(options, in_this_process):
    sources = [*SOURCES[:2], "17-T2-tumour"]
    grid = {"learning_rate": [0.01, 0.1], "momentum": [0.9], "weight_decay": [0.0]}
    run("evaluate", **options, sources=sources, grid=grid, figures=True)
    folder = Path(options["output_dir"])
    table = ranking_of(folder)
    assert table.loc["17-T2-tumour", "status"] == "own model"
    assert np.isnan(table.loc["17-T2-tumour", "lp_fu"])
    assert np.isfinite(table.loc["17-T2-tumour", "lp"])
    true = pd.read_csv(folder / "truth.csv").set_index("source")
    assert set(true.index) == {*SOURCES[:2], "scratch"}
    images = pd.read_csv(folder / "images.csv")
    for name in true.index:  # of the grid, the best on validation images
        paths = sorted((folder / "finetune" / name).glob("*/metrics.csv"))
        runs = [pd.read_csv(path).set_index("split") for path in paths]
        assert len(runs) == 2
        best = max(runs, key=lambda one: one.loc["val", "auc"])
        assert true.loc[name, "auc"] == pytest.approx(best.loc["test", "auc"], abs=1e-4)
        accuracies = [one.loc["test", "accuracy"] for one in runs]
        assert np.isclose((images[name] > 0.5).mean(), accuracies, atol=1e-4).any()
    agreement = pd.read_csv(folder / "agreement.csv").set_index("ranker")
    assert {"LP x FU", "LEEP", "shrunk H-score", "source size", "random"} <= set(agreement.index)
    assert agreement["regret"].ge(0).all()
    own = pd.read_csv(folder / "own_model.csv")
    assert len(own) == 11
    assert (own["candidates"] == 3).all()
    assert (folder / "agreement.png").is_file()
    assert "| LP x FU |" in (folder / "agreement.md").read_text()


def test_architectures_are_ranked_by_the_same_path(options, in_this_process):
    entries = DATASETS.content("architectures")["sources"]
    assert len({json.dumps(entry.get("network")) for entry in entries}) == len(entries) >= 4
    entries = [dict(entry, task="14-T2-tumour") for entry in entries if entry["name"] in ("ResNet18", "DenseNet")]
    run("architectures", **options, sources=entries)
    table = ranking_of(options["output_dir"])
    assert {"ResNet18", "DenseNet", "scratch"} == set(table.index)
    assert np.isfinite(table.loc[["ResNet18", "DenseNet"], ["lp", "fu", "leep", "lp_fu"]].to_numpy(float)).all()
    config = json.loads((Path(options["output_dir"]) / "config.json").read_text())
    assert config["cross_domain"] is True
    if (winner := content_of(options["output_dir"])["default"]) == "DenseNet":
        assert "--network_def" in content_of(options["output_dir"])["command"], winner


def test_the_grid_of_the_paper_and_its_augmentation(options, in_this_process):
    grid = DATASETS.content("paper_grid")["grid"]
    assert len(settings_of_grid(grid)) == 6 * 2 * 5
    whole = Bundle("dataset_transferability").workflow("evaluate", "paper_grid").parser.get()
    assert [whole[name] for name in ("epochs", "patience", "image_size", "in_channels")] == [400, 50, 224, 3]
    one = {"learning_rate": [0.001], "momentum": [0.0], "weight_decay": [0.000001]}
    few = {"network_def#widen_factor": 0.25, "in_channels": 3, "image_size": 32, "iterations_per_epoch": 2}
    run("evaluate", "paper_grid", **options | few | {"sources": SOURCES[:1], "grid": one, "metrics": ["logme"]})
    assert set(pd.read_csv(Path(options["output_dir"]) / "truth.csv")["source"]) == {SOURCES[0], "scratch"}


# Several datasets as one source


def test_a_list_of_datasets_is_one_source_without_the_target(options, in_this_process):
    pool = {"name": "all", "task": ["17-T2-tumour", "14-T2-tumour", "14-FLAIR-level"]}
    run("evaluate", **options, sources=[pool, SOURCES[0]])
    table = ranking_of(options["output_dir"])
    assert table.loc["all", "data"] == "14-T2-tumour + 14-FLAIR-level"
    assert table.loc["all", "status"] == "ranked"
    weights = torch.load(table.loc["all", "checkpoint"], weights_only=True)
    assert weights["fc.weight"].shape[0] == 2 + 4  # the classes of both
    parts = [ClassificationTask(name, collection=options["collection"]) for name in ("14-T2-tumour", "14-FLAIR-level")]
    assert table.loc["all", "images"] == sum(part.size for part in parts)
    assert "all" in set(pd.read_csv(Path(options["output_dir"]) / "truth.csv")["source"])
    workflow = DATASETS.workflow("finetune", source=pool["task"][1:])
    assert workflow.parser.get_parsed_content("output_dir").endswith("finetune_14-T2-tumour+14-FLAIR-level")


def test_a_study_holds_a_pool_against_single_datasets():
    pooled = f"a{POOLED}b"
    rows = [("t", "a", "a", 0.6), ("t", "b", "b", 0.8), ("t", "ab", pooled, 0.75), ("t", "scratch", None, 0.9)]
    rows += [("u", "a", "a", 0.5), ("u", "b", "b", 0.6), ("u", "ab", pooled, 0.65), ("u", "scratch", None, 0.5)]
    table = pd.DataFrame(rows, columns=["target", "source", "data", "auc"]).assign(seed=0)
    (claim,) = DatasetStudy.claims(None, table, table, {})
    assert "mean of the single datasets +0.075 (higher on 2 of 2 targets)" in claim
    assert "best of them +0.000 (higher on 1;" in claim
    assert DatasetStudy.claims(None, table[table["source"] != "ab"], table, {}) == []


def test_datasets_of_several_forms_are_pooled(mnist):
    grey, colour = mnist("grey"), mnist("colour", n_classes=3, shape=(14, 20, 3), counts=(9, 6, 6))
    task = ClassificationTask(f"{grey} + {colour}", in_channels=3, image_size=16)
    assert (task.name, task.n_classes) == ("grey+colour", 5)
    assert task.class_names == ("grey: 0", "grey: 1", "colour: 0", "colour: 1", "colour: 2")
    items = task.datalist("train")
    assert len(items) == 12 + 9
    assert {(item["image"].shape, item["label"] > 1) for item in items} == {((3, 16, 16), False), ((3, 16, 16), True)}
    first = next(item for item in items if item["name"].startswith("grey/train/"))
    assert (first["image"] == first["image"][:1]).all()
    with pytest.raises(InputError, match="the pooled datasets have images of"):
        ClassificationTask(f"{grey} + {colour}", in_channels=3)


def test_a_pool_of_nothing_but_the_target_is_refused(options, no_training):
    message = refused(lambda: run(**options, sources=[["17-T2-tumour"], SOURCES[0]]))
    assert "holds only the target's own dataset" in message


# Real files


def test_a_medmnist_file_as_target_and_as_source(options, in_this_process, mnist):
    target = mnist("brightmnist", counts=(40, 16, 16))
    run(**options | {"target_task": target, "sources": ["14-T2-tumour", mnist("other")]})
    content = content_of(options["output_dir"])
    assert (content["target"], content["patients_known"], content["synthetic"]) == ("brightmnist", False, False)
    assert content["units"] == 40
    assert "every image counts as a patient of its own" in content["answer"]
    assert {"14-T2-tumour", "other"} <= set(ranking_of(options["output_dir"]).index)


def test_an_rgb_target_takes_three_channels(options, in_this_process, no_training, mnist):
    path = mnist("rgbmnist", shape=(28, 28, 3))
    message = refused(lambda: run(**options | {"target_task": path}))
    assert message.startswith("rgbmnist has RGB images, the network takes 1 channel(s); give --in_channels 3")
    settings = {"phantom_subjects": 8, "source_dir": options["source_dir"]}
    asked = {"targets": [path, "17-T2-tumour"], "sources": [path, "17-T2-tumour"], "settings": settings}
    message = refused(lambda: run(base="study", output_dir=options["output_dir"], **asked))
    assert message.startswith("rgbmnist has RGB images")  # and not that a run of a source has failed


def test_inference_writes_a_probability_for_each_image(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    run(base="inference", input_dir=str(tmp_path / "images"), output_dir=str(tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", header=None)
    assert table[0].tolist() == ["0.png", "1.png", "2.png"]
    np.testing.assert_allclose(table[[1, 2]].sum(axis=1), 1, atol=1e-5)


# Bad input


def test_a_class_with_fewer_images_than_asked_uses_what_there_is(options, in_this_process, mnist, capsys):
    path = mnist("brightmnist", counts=(10, 16, 16))
    run(**options | {"target_task": path, "train_per_class": 100, "sources": SOURCES[:1], "n_resamples": 5})
    assert "brightmnist: class 0 has 5 train images, 100 asked" in capsys.readouterr().out
    assert "validation images by class: 0 5 and 8, 1 5 and 8." in content_of(options["output_dir"])["answer"]


@pytest.mark.slow
def test_two_processes_train_one_network(options, tmp_path):
    files = ["configs/train.json", "configs/scratch.json", "configs/multi_gpu_train.json"]
    run_options = dict(DATASETS.tiny) | options | {"output_dir": str(tmp_path / "two")}
    finish(DATASETS.start(files, {key: value for key, value in run_options.items() if key != "sources"}, processes=2))
    metrics = pd.read_csv(tmp_path / "two" / "metrics.csv").set_index("split")
    predictions = pd.read_csv(tmp_path / "two" / "predictions.csv")
    workflow = DATASETS.workflow(**options)
    workflow.initialize()
    target = workflow.parser.get_parsed_content("target")
    labels = {item["name"]: item["label"] for item in target.datalist("test")}
    test = predictions[predictions["split"] == "test"].set_index("name")["label"]
    assert test.to_dict() == labels  # every image once, with its own label
    assert metrics.loc["test", "images"] == len(labels)
