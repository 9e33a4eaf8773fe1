"""Tests of the bundle risk_map only: its methods, weight maps, output folders, inference and bad data."""

import gzip
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import ARMS, RECIPES, RISK_MAP, Bundle, card_of_a_unet, command_in, finish, read_json, refused
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.transforms import RandomizableTrait

from medtl_ext import InputError, risk_map
from medtl_ext.transfer import SegmentationTask, TransferAudit, images_to_segment, pictures

CONFIGS = RISK_MAP.configs
METHODS = [
    path.stem
    for path in sorted(CONFIGS.glob("*.json"))
    if path.stem not in ("train", "inference", "pretrain", *RECIPES) and "freeze" in read_json(path)
]
MEASURED = ["hd95_mm", "assd_mm", "lesion_recall", "lesion_precision", "volume_ml", "truth_ml"]
ALL_METHODS = [*METHODS, "zero_shot"]
TINY = RISK_MAP.tiny
SOURCE_TASK = "14-FLAIR-ED"
run, workflow_of = RISK_MAP.run, RISK_MAP.workflow
pytestmark = pytest.mark.usefixtures("no_determinism_left_behind")


@pytest.fixture(scope="session")
def source(collection, tmp_path_factory) -> Path:
    """A source network after a short pre-training by the bundle."""
    folder = tmp_path_factory.mktemp("source")
    run("pretrain", collection=str(collection), output_dir=str(folder), epochs=15, train_slices=None)
    return folder / "model.pt"


@pytest.fixture
def options(options, source) -> dict:
    return options | {"source": {"task": SOURCE_TASK, "checkpoint": str(source)}}


def table(folder: Path | str) -> pd.DataFrame:
    return pd.read_csv(Path(folder) / "metrics.csv").sort_values(["split", "subject", "class"], ignore_index=True)


# Overlays


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_trains_and_scores(method, options):
    run(method, **options)
    scores = table(options["output_dir"])
    assert [*scores] == ["method", "seed", "split", "subject", "class", "dice", "iou", *MEASURED, "empty"]
    assert set(scores.method) == {method}
    assert scores.groupby("split").subject.nunique().to_dict() == {"val": 3, "test": 3}
    assert scores[["dice", "iou"]].stack().between(0, 1).all()
    weights = torch.load(Path(options["output_dir"]) / "model.pt", weights_only=True)
    trained = torch.load(options["source"]["checkpoint"], weights_only=True)
    same = {name for name in weights if torch.equal(weights[name], trained[name])}
    encoder = {name for name in weights if name.startswith(("conv_0", "down_"))}
    if method == "zero_shot":
        assert same == set(weights)
    elif method == "scratch" or method.startswith("full"):
        assert "conv_0.conv_0.conv.weight" not in same
    else:  # parameters and buffers of the encoder untouched, the rest trained
        assert encoder <= same
        assert not {name for name in same - encoder if name.endswith("weight")}


@pytest.mark.parametrize("method", ["class_weight", "frequency", "prior_image", "prior_shift", "risk_map_image"])
def test_weights_are_of_healthy_slices_too(method, options):
    run(method, **options | {"background_share": 0.5, "figures": True})
    assert table(options["output_dir"])["dice"].between(0, 1).all()
    maps = [nib.load(path).get_fdata() for path in Path(options["output_dir"]).glob("weight*.nii.gz")]
    assert len(maps) == {"frequency": 1, "prior_image": 4, "risk_map_image": 4}.get(method, 0)
    if method == "frequency":  # half of the slices are foreground nowhere
        assert 1 < maps[0].max() <= 10**0.5 * (1 + 1e-6)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_takes_somebody_elses_network(method, options, tmp_path):
    given = options | {"source": card_of_a_unet(tmp_path, 2, ["background", "oedema", "ED"]), "epochs": 1}
    run(method, **{key: value for key, value in given.items() if key != "epochs" or method != "zero_shot"})
    scores = table(options["output_dir"])
    assert scores.groupby("split").subject.nunique().to_dict() == {"val": 3, "test": 3}
    assert scores["dice"].between(0, 1).all()
    if method == "zero_shot":
        return  # has the head of the source, which knows more classes
    assert (Path(options["output_dir"]) / "grid.json").is_file()
    card = read_json(Path(options["output_dir"]) / "model.json")
    assert card["classes"] == ["background", "ED"]
    weights = torch.load(Path(options["output_dir"]) / "model.pt", weights_only=True)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    frozen = {name for name in theirs if name.startswith("model.0")}
    if method != "scratch" and not method.startswith("full"):
        assert all(torch.equal(weights[f"net.{name}"], theirs[name]) for name in frozen)


def test_a_fine_tuned_foreign_network_in_3d_is_scored_used_and_a_source_again(options, tmp_path):
    first = options | {"source": card_of_a_unet(tmp_path, 3, ["background", "ED"]), "epochs": 1, "batch_size": 1}
    run("full", **first)
    model = str(Path(options["output_dir"]) / "model.pt")
    again = {"source": model, "output_dir": str(tmp_path / "again")}
    run("zero_shot", **{key: value for key, value in (options | again).items() if key != "epochs"})
    assert np.allclose(table(tmp_path / "again")["dice"], table(options["output_dir"])["dice"])
    scored = {"source": first["source"], "ckpt": model, "output_dir": str(tmp_path / "scored")}
    run("evaluate", **{key: value for key, value in (options | scored).items() if key != "epochs"})
    scores, before = table(tmp_path / "scored"), table(options["output_dir"])
    assert np.allclose(scores["dice"], before[before["split"] == "test"]["dice"])


def test_every_method_is_there_and_sets_the_same_keys_so_that_the_last_one_wins():
    wanted = {"vanilla", "class_weight", "class_weight_sqrt", "trs_map", "risk_map", "risk_map_image", "frequency"}
    wanted |= {"prior_image", "prior_shift", "dice_ce", "zero_shot", "scratch", "full", "full_risk_map"}
    assert wanted | set(RISK_MAP.content("compare")["methods"]) - {"placebo"} <= set(ALL_METHODS)
    assert set(RISK_MAP.content("matrix")["methods"]) - {"placebo"} == set(ALL_METHODS)
    keys = list(RISK_MAP.content("vanilla"))
    for method in [*METHODS, *RECIPES]:
        if method == "adabn":  # as zero_shot, a run without a training
            continue
        overlay = RISK_MAP.content(method)
        own = [key for key in overlay if not key.startswith("leep#") and key not in ("epochs", "val_interval")]
        assert own == keys, method
        assert overlay["method"] == method
        assert overlay["start_weights"] == (None if method == "scratch" else "$@origin.weights")
        if overlay["weight_map"] and "evaluator" in overlay["weight_map"]:
            assert "leep#evaluator#additional_metrics#leep_map" in overlay, method
    train, default = RISK_MAP.content("train"), RISK_MAP.content("risk_map")
    assert {key: train[key] for key in keys} == {key: default[key] for key in keys}


def source_folder(*overlays: str, **options) -> str:
    return RISK_MAP.pool_job("14-FLAIR-ED", *overlays, **options).output_dir.name


def test_every_method_starts_from_the_same_source_but_for_another_loss_of_its_training():
    """The arms of an audit must share one pre-trained source, so no overlay may change the source."""
    folders = {source_folder(method) for method in [*ALL_METHODS, *RECIPES]}
    assert folders == {source_folder(), source_folder(clean="largest")}
    assert source_folder(pretraining={"epochs": 3}) != source_folder()
    assert source_folder(**{"loss_def#base_loss": {"_target_": "monai.losses.FocalLoss"}}) != source_folder()


def test_a_source_is_kept_for_the_content_of_its_collection_wherever_it_lies(collection, tmp_path, monkeypatch):
    there = shutil.copytree(collection.parent, tmp_path / "there")
    before = source_folder(collection=str(collection))
    monkeypatch.chdir(there)
    assert source_folder(collection="collection.json") == before
    (there / "14-000" / "FLAIR.nii.gz").write_bytes(b"another image")
    assert source_folder(collection="collection.json") != before


def test_four_classes(options, tmp_path):
    run("fets", "scratch", **options | {"output_dir": str(tmp_path / "source")})
    run("fets", **options | {"source": str(tmp_path / "source" / "model.pt")})
    assert sorted(set(table(options["output_dir"])["class"])) == ["ED", "ET", "NCR"]


def test_data_loaders_have_workers_in_the_jobs_of_an_audit_too_and_give_the_same(options, tmp_path):
    options |= {"n_jobs": 2, "audit#arms": ["scratch"]}
    folders = [tmp_path / "none", tmp_path / "two"]
    for folder, workers in zip(folders, (0, 2), strict=True):
        run(**options | {"num_workers": workers, "output_dir": str(folder)})
    none, two = (folder / "audit" / "scratch" for folder in folders)
    assert len(table(two)) == 6
    pd.testing.assert_frame_equal(table(two), table(none))
    kept = [torch.load(folder / "model.pt", weights_only=True) for folder in (two, none)]
    assert all(torch.equal(kept[0][name], value) for name, value in kept[1].items())


def test_an_audit_of_several_seeds_grows_by_the_trainings_that_are_missing(options, in_this_process):
    options |= {"audit#arms": ["zero_shot", "scratch"]}
    folder = Path(options["output_dir"])
    run("full", **options)
    assert in_this_process == [folder / "audit" / name for name in ("zero_shot", "scratch")]
    run("full", **options, **{"audit#seeds": 2})
    again = [folder / "audit" / name / "seed1" for name in ("full", "scratch")]
    assert in_this_process[2:] == again
    assert {seed for path in again for seed in table(path)["seed"]} == {1}
    audited = pd.read_csv(folder / "audit.csv").query("split == 'val'").set_index("arm")
    assert audited["trainings"].to_dict() == {"full": 2, "scratch": 2, "zero_shot": 1}
    curves = [pd.read_csv(path / "curve.csv")["minutes"].max() for path in (folder / "audit" / "scratch", again[1])]
    assert audited.loc["scratch", "minutes"] == pytest.approx(sum(curves), rel=1e-3)
    assert audited.loc["zero_shot", "minutes"] == 0
    means = [table(path).query("split == 'val'")["dice"].mean() for path in (folder, again[0])]
    assert audited.loc["full", "mean"] == pytest.approx(np.mean(means), rel=1e-3)
    assert "2 training runs per arm" in read_json(folder / "audit.json")["text"]


@pytest.mark.parametrize(
    ("train", "val", "options", "said"),
    [
        (8, 6, {}, "the audit needs 2 trainings besides this one"),
        (8, 6, {"seeds": 3}, "the audit needs 8 trainings besides this one"),
        (8, 3, {}, "17 trainings besides this one, 15 of them to cross-validate the arms over all 11 labelled"),
        (2, 1, {}, "in 3 folds (there are fewer than 6 validation patients; --audit#folds 0 turns this off)"),
        (2, 0, {"seeds": 2}, "17 trainings besides this one, 12 of them to cross-validate"),
        (8, 3, {"folds": 0}, "the audit needs 2 trainings besides this one"),
        (8, 9, {"folds": 3}, "in 3 folds (--audit#folds 0 turns this off)"),
        (1, 0, {}, None),
        (2, 1, {"folds": 4}, "audit#folds is 4; expected a whole number from 2 to 3"),
        (2, 1, {"seeds": 0}, "audit#seeds is 0; expected a whole number, 1 or more"),
    ],
)
def test_an_audit_says_how_much_it_trains(train, val, options, said, caplog):
    """Three arms are trained: that of the run and two others. With few validation patients, also once per fold."""
    items = [{"subject": f"p{number}"} for number in range(train + val)]
    target = SimpleNamespace(labelled=items, datalist=lambda split: items[train:])
    here = SimpleNamespace(leads=True, config={"method": "risk_map", "val_split": "val" if val else "train"})
    asked = {"source": SimpleNamespace(unasked=None), "arms": ARMS, **options}
    audit = TransferAudit(here=here, target=target, **asked)
    with caplog.at_level("INFO"):
        logged = refused(audit.check) if said and "expected" in said else audit.check() or caplog.text
    assert said in logged if said else not logged


def test_few_validation_patients_are_cross_validated_with_all_labelled_ones(options, collection, in_this_process):
    folder = Path(options["output_dir"])
    run("scratch", **options | {"audit#arms": ["zero_shot"], "audit#folds": 2, "epochs": 2})
    folds = [folder / "audit" / "scratch" / f"fold{place}of2" for place in (0, 1)]
    untrained = folder / "audit" / "zero_shot" / "fold0of1"
    assert set(in_this_process) == {folder / "audit" / "zero_shot", untrained, *folds}
    task = SegmentationTask("17-T2-ED", collection=str(collection))
    labelled = {item["subject"] for split in ("train", "val") for item in task.datalist(split)}
    scored = [set(table(path)["subject"]) for path in folds]
    assert (scored[0] | scored[1], scored[0] & scored[1]) == (labelled, set())
    assert set(table(untrained)["subject"]) == labelled
    assert all(len(pd.read_csv(path / "curve.csv")) == 1 for path in folds)  # no better network was chosen
    audited = read_json(folder / "audit.json")
    assert (audited["folds"], audited["tables"]["val"][0]["patients"]) == (2, 7)
    assert audited["tables"]["test"][0]["patients"] == 3
    assert "on 7 labelled patients" in audited["text"]
    assert "| split val | Cross-validation in 2 folds" in (folder / "MODEL_CARD.md").read_text()

    def weights() -> list[bytes]:
        return [(folder / name / "model.pt").read_bytes() for name in (".", "audit/zero_shot", "audit/scratch")]

    before = weights()
    assert before[0] == before[1] != before[2]  # the advised arm's
    scores = table(folder)
    assert set(scores["method"]) == {"scratch"}
    run("scratch", **options | {"audit#arms": ["zero_shot"], "audit#folds": 2, "epochs": 2})
    assert len(in_this_process) == 4
    assert weights() == before
    pd.testing.assert_frame_equal(table(folder), scores)


def test_the_card_of_somebody_elses_network_comes_along_with_the_advised_weights(
    options, collection, tmp_path, in_this_process
):
    options |= {"source": card_of_a_unet(tmp_path, 2, ["background", "ED"]), "audit#arms": ["zero_shot"]}
    run("full", **options)
    folder = Path(options["output_dir"])
    advised = folder / "audit" / read_json(folder / "audit.json")["default"]
    for name in ("model.pt", "model.json", "grid.json"):
        assert (folder / name).read_bytes() == (advised / name).read_bytes()
    assert "| source | theirs (licence: not said) |" in (folder / "MODEL_CARD.md").read_text()
    for arm in ("full", "zero_shot"):  # as for a program, which has no card
        (folder / "audit" / arm / "model.json").unlink()
        (folder / "audit" / arm / ".run.sums").unlink(missing_ok=True)  # by which it would be written again
    run("full", **options)
    assert (folder / "model.json").is_file() == (advised.name == "full")  # is not that of another network
    assert ("use the source itself" in (folder / "MODEL_CARD.md").read_text()) == (advised.name == "zero_shot")


def test_three_dimensions(options, tmp_path):
    small = {"roi_size": [32, 32, 16], "network_def#features": [4, 4, 8, 8, 8, 4], "train_slices": None}
    run("scratch", **options | small | {"batch_size": 1, "output_dir": str(tmp_path / "source")})
    run(**options | small | {"source": str(tmp_path / "source" / "model.pt")})
    weight = nib.load(Path(options["output_dir"]) / "weight.nii.gz")
    assert weight.shape == (32, 32, 16)
    assert weight.get_fdata().min() == pytest.approx(1)
    assert len(table(options["output_dir"])) == 6


def test_the_papers_setting_is_that_of_the_source_too(places):
    """Two iterations of each training, on tiny images."""
    few = {"epochs": 1, "iterations_per_epoch": 2, "batch_size": 2, "pretraining": {"epochs": 1, "region_loss": None}}
    tuned = run("vanilla", "paper", **places | few | {"source": SOURCE_TASK, "source_dir": places["output_dir"] + "s"})
    (folder,) = Path(places["output_dir"] + "s").glob("*_*")
    trained = ConfigWorkflow(config_file=str(folder / "config.json"), workflow_type="train")
    trained.initialize()
    for parser, decoder_only in [(tuned.parser, True), (trained.parser, False)]:
        network, optimizer, loss = (parser.get_parsed_content(part) for part in ("network", "optimizer", "loss"))
        parameters = {name: parameter.numel() for name, parameter in network.named_parameters()}
        assert sum(parameters.values()) == 31_112_130
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
            count for name, count in parameters.items() if not (decoder_only and re.match("conv_0|down_", name))
        )
        assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-4, 0)}
        assert type(optimizer) is torch.optim.Adam
        assert (loss.region_loss, type(loss.base_loss)) == (None, torch.nn.CrossEntropyLoss)
        steps = parser.get_parsed_content("train#preprocessing").transforms
        assert not any(isinstance(step, RandomizableTrait) for step in steps)
        trainer, scheduler = (parser.get_parsed_content(part) for part in ("train#trainer", "lr_scheduler"))
        assert trainer.state.max_epochs * trainer.state.epoch_length == 2
        for _ in range(3):
            scheduler.step()
        assert scheduler.get_last_lr() == [1e-4]
    paper = RISK_MAP.content("paper")
    assert paper["pretraining"]["epochs"] * paper["iterations_per_epoch"] == 5000
    assert paper["epochs"] * paper["iterations_per_epoch"] == 5000


@pytest.mark.parametrize(("synthetic", "fine_tuning", "source"), [(True, 10, 20), (False, 40, 80)])
def test_real_images_are_trained_on_for_longer_than_phantoms(synthetic, fine_tuning, source, collection, tmp_path):
    described = json.loads(collection.read_text(encoding="utf-8")) | {"synthetic": synthetic}
    path = collection.with_name(f"synthetic_{synthetic}.json")
    path.write_text(json.dumps(described), encoding="utf-8")
    for overlays, epochs in [((), fine_tuning), (("pretrain",), source), (("small",), 10)]:
        parser = Bundle(RISK_MAP.name).workflow(*overlays, collection=str(path)).parser
        assert parser.get_parsed_content("epochs") == epochs


# The whole of train.json


def test_the_whole_run_has_scores_of_all_arms_and_maps_on_the_grid(whole_run):
    folder = whole_run(RISK_MAP)
    arms = {path.name: table(path) for path in (folder / "audit").iterdir()}
    assert set(arms) == {*ARMS, "risk_map"}
    advised = folder / "audit" / read_json(folder / "audit.json")["default"]
    assert (folder / "model.pt").read_bytes() == (advised / "model.pt").read_bytes()
    card = (folder / "MODEL_CARD.md").read_text()
    dice = pd.read_csv(folder / "audit.csv").query("arm == @advised.name").set_index("split")
    scored = [f"| {split} | 3 | 1 | {dice.loc[split, 'mean']:.3f} |" for split in ("val", "test")]
    said = ["| arm | " + advised.name, "synthetic, of no patient", "Anything but trying the software", *scored]
    assert [part for part in said if part not in card] == []
    assert all(set(scores.method) == {arm} for arm, scores in arms.items())
    before, weight = (nib.load(folder / f"{name}.nii.gz") for name in ("leep_before", "weight"))
    np.testing.assert_allclose(before.affine, weight.affine)
    np.testing.assert_allclose(np.abs(np.diag(before.affine)[:3]), TINY["spacing"])
    assert weight.get_fdata().min() == pytest.approx(1)
    assert weight.get_fdata().max() == pytest.approx(10)


def test_pictures_show_a_network_that_evaluates(options, monkeypatch):
    """In training mode its layers would normalise by the only patient that is drawn."""
    modes, load_weights = [], pictures.load_weights

    def in_train_mode(network, *where, **how):
        load_weights(network, *where, **how)
        network.train().register_forward_hook(lambda module, *_: modes.append(module.training))

    monkeypatch.setattr(pictures, "load_weights", in_train_mode)
    run("vanilla", **options | {"figures": True})
    assert modes
    assert not any(modes)


def test_a_map_with_a_stride_lies_on_the_grid_and_is_drawn(options):
    run("trs_map", **options, figures=True)
    folder = Path(options["output_dir"])
    assert {"maps.png", "overlay.png", "report.html"} <= {path.name for path in folder.iterdir()}
    before, weight = (nib.load(folder / f"{name}.nii.gz") for name in ("leep_before", "weight"))
    assert before.shape == weight.shape
    np.testing.assert_allclose(before.affine, weight.affine)
    cells = before.get_fdata()[..., 0]
    np.testing.assert_array_equal(cells[::4, ::4].repeat(4, 0).repeat(4, 1), cells)


def test_files_of_no_known_run_are_not_replaced(options, source, tmp_path):
    shutil.copy(source, tmp_path / "model.pt")
    message = refused(lambda: run("vanilla", **options | {"output_dir": str(tmp_path)}))
    assert "holds a model.pt of an unknown run" in message
    assert (tmp_path / "model.pt").read_bytes() == source.read_bytes()


def test_a_run_belongs_to_the_content_of_its_collection(options, collection, tmp_path):
    there = shutil.copytree(collection.parent, tmp_path / "there") / "collection.json"
    run("zero_shot", **options)
    scores = table(options["output_dir"])
    run("zero_shot", **options | {"collection": str(there)})
    content = read_json(there)
    there.write_text(json.dumps(content | {"subjects": content["subjects"][1:]}))
    message = refused(lambda: run("zero_shot", **options | {"collection": str(there)}))
    assert "holds a run on another collection" in message
    pd.testing.assert_frame_equal(table(options["output_dir"]), scores)


def test_the_settings_of_a_comparison_are_options_and_stay(collection, tmp_path):
    shared = {"base": "compare", "pairs": [["14-T2-ED", "17-T2-ED"]], "methods": ["vanila"]}
    shared |= {"output_dir": str(tmp_path / "out")}
    settings = {"collection": str(collection), "epochs": 1}
    assert "did you mean epochs?" in refused(lambda: run(**shared, settings=settings | {"epoch": 3}))
    assert "method 'vanila' is unknown; did you mean 'vanilla'" in refused(lambda: run(**shared, settings=settings))
    assert "method 'vanila'" in refused(lambda: run(**shared, settings=settings | {"epochs": 2}))  # nothing ran yet
    (tmp_path / "out" / "runs").mkdir()
    assert "holds a study with epochs=2, but this one has 1" in refused(lambda: run(**shared, settings=settings))


def test_a_matrix_has_every_source_of_every_target_with_gains_and_budgets(collection, tmp_path, in_this_process):
    settings = {"collection": str(collection), "source_dir": str(tmp_path / "sources"), "check_data": False}
    settings |= {"spacing": TINY["spacing"], "roi_size": TINY["roi_size"], "network_def#features": [4, 4, 8, 8, 8, 4]}
    once = {"epochs": 1, "augment": False}
    settings |= {"epochs": 1, "iterations_per_epoch": 1, "batch_size": 4, "pretraining": once}
    sources, target, methods = ["14-T2-ED", "14-FLAIR-ED"], "17-T2-ED", ["vanilla", "risk_map", "scratch"]
    asked = {"sources": [*sources, target], "targets": [target], "methods": methods, "train_slices": [8, 4]}
    asked |= {"overlays": ["paper"], "settings": settings}
    run(base="matrix", **asked, output_dir=str(tmp_path / "out"))
    trained, folder = list(in_this_process), tmp_path / "out"
    assert len(trained) == 2 + 2 * (2 * 2 + 1)  # sources; what starts from one; scratch of the target
    configs = [read_json(path / "config.json") for path in trained]
    assert {config["optimizer"]["lr"] for config in configs} == {1e-4}
    assert {str(config["network_def"]["features"]) for config in configs} == {"[4, 4, 8, 8, 8, 4]"}
    assert {config["epochs"] for config in configs} == {1}
    table = pd.read_csv(folder / "matrix.csv").set_index(["slices", "target", "method"])
    assert len(table) == 2 * 3
    assert set(table["sources"]) == {2}
    assert (table.xs("scratch", level="method")[sources].nunique(axis=1) == 1).all()
    (metrics,) = folder.glob("runs/14-T2-ED_to_17-T2-ED/8/risk_map/*/*/metrics.csv")
    expected = pd.read_csv(metrics).query("split == 'test'")["dice"].mean()
    assert table.loc[(8, target, "risk_map"), "14-T2-ED"] == pytest.approx(expected)
    compared = pd.read_csv(folder / "comparison.csv")
    assert set(compared["pair"]) == {target}
    assert dict(zip(compared["method"], compared["runs"], strict=True)) == {"vanilla": 2, "risk_map": 2, "scratch": 1}
    assert "| method | 8 slices | 4 slices |" in (folder / "matrix.md").read_text()
    run(base="matrix", **asked, output_dir=str(folder))
    assert in_this_process == trained


def test_the_published_tables_in_the_layout_of_a_matrix(tmp_path):
    tables = Path(__file__).parent.parent / "docs" / "results" / "papers"
    table = pd.read_csv(tables / "risk_map_table2_fets.csv").query("source != 'AVERAGE'").assign(slices=400)
    table["pair"] = table["source"] + " -> " + table["target"]
    alone = {"slices": 400, "pair": "14-T1", "method": "scratch", "dice": 0.44}
    nothing = {"slices": 400, "pair": "14-T1 -> nothing", "method": "vanilla", "dice": 0.0}
    risk_map.write_matrix(pd.concat([table, pd.DataFrame([alone, nothing])]), tmp_path)
    found = pd.read_csv(tmp_path / "matrix.csv").set_index(["target", "method"])
    assert found.loc[("18-FLAIR", "ours"), ["14-FLAIR", "ahead", "sources"]].to_list() == [0.530, 4, 5]
    assert found.loc[("14-T1", "scratch"), ["13-T1", "18-FLAIR", "ahead", "sources"]].to_list() == [0.44, 0.44, 2, 5]
    page = (tmp_path / "matrix.md").read_text()
    assert "| ours | 0.452 (+4.37%), 29 of 30, 5 of 6 |" in page
    assert "| nothing | vanilla | 0.000, 0 of 1 |" in page
    assert "| 17-T2 | ours | 0.375 (+7.83%), 5 of 5 |" in page


@pytest.mark.parametrize(
    ("risk", "entropy", "top"),
    [([3.0] * 100, 1, 0.05), ([0.0] * 99 + [2.0], 0, 1), ([1.0] * 10 + [0.0] * 90, 0.5, 0.5), ([0.0] * 100, 1, 0.05)],
)
def test_risk_that_is_everywhere_and_risk_in_one_pixel(risk, entropy, top):
    found = risk_map.concentration(torch.tensor([*risk, float("nan")]).reshape(1, 101))
    assert found == pytest.approx({"mean": np.mean(risk), "entropy": entropy, "top": top})


def test_where_the_risk_is_before_and_after_each_method(collection, tmp_path, in_this_process):
    settings = RISK_MAP.settings(collection=str(collection), source_dir=str(tmp_path / "sources"), train_slices=None)
    asked = {"pairs": [["14-FLAIR-ED", "17-T2-ED"]], "methods": ["vanilla", "risk_map"], "train_slices": [8]}
    asked |= {"runs": [{"seed": 0, "source_seed": 0}], "settings": settings, "output_dir": str(tmp_path / "out")}
    said = refused(lambda: run(base="figure2", **asked | {"methods": ["vanilla", "zero_shot"]}))
    assert "methods has zero_shot, which every map shows as 'before'" in said
    run(base="figure2", **asked)
    folder = tmp_path / "out"
    assert {"condensation.md", "condensation.png", "report.html"} <= {path.name for path in folder.iterdir()}
    (trained,) = folder.glob("runs/*/8/risk_map/*/*")
    rows = pd.read_csv(trained / "risk.csv").set_index(["risk", "split", "when"]).sort_index()
    for when in ("before", "after"):  # the maps of all images are those that the training itself left
        leep = nib.load(trained / f"leep_{when}.nii.gz").get_fdata()[..., 0]
        (whole,) = rows.loc[("loss (-LEEP)", "train", when)].query("patient.isna()")["mean"]
        assert whole == pytest.approx(-np.nanmean(leep), rel=1e-4)
        np.testing.assert_allclose(np.load(trained / "risk.npz")[when], leep, atol=1e-6)
    found = pd.read_csv(folder / "condensation.csv").set_index(["risk", "split", "network"])
    assert len(found) == 2 * 2 * 3
    patients = rows.loc[("weight (eq. 5)", "test")].dropna().set_index("patient", append=True)["top"].unstack("when")
    row = found.loc[("weight (eq. 5)", "test", "risk_map")]
    assert row["patients"] == len(patients) == 3
    assert row["top"] == pytest.approx(patients["after"].mean(), rel=1e-4)
    assert row["top_change"] == pytest.approx((patients["after"] - patients["before"]).mean(), abs=1e-5)
    assert row["top_change_low"] <= row["top_change"] <= row["top_change_high"]
    assert found.loc[("weight (eq. 5)", "test", "vanilla"), "top_less_vanilla"] == 0
    low, high = row[["top_less_vanilla_low", "top_less_vanilla_high"]]
    more, less = ("risk_map" if low > 0 else "no method"), ("risk_map" if high < 0 else "no method")
    text = (folder / "condensation.md").read_text()
    assert text.split("\n\n")[1].startswith("14-FLAIR-ED -> 17-T2-ED, 8 slices, test patients, loss (-LEEP): The worst")
    file, given = command_in(text)
    assert (Path(file).name, len(given["runs"])) == ("figure2.json", 3)
    said = text[text.index("## weight (eq. 5): 14-FLAIR-ED -> 17-T2-ED, 8 slices, test") :]
    assert f"after vanilla. They hold more after: {more}; less after: {less} (95" in said.partition("|")[0]


def test_a_comparison_looks_at_its_targets_before_it_trains(collection, tmp_path, no_training):
    settings = {"collection": broken(collection, tmp_path / "bad", truncate)}
    asked = {"pairs": [["14-T2-ED", "17-T2-ED"]], "methods": ["vanilla"], "output_dir": str(tmp_path / "out")}
    assert "17-003" in refused(lambda: run(base="compare", **asked, settings=settings))


def test_evaluation_repeats_the_scores_of_training_in_a_folder_of_its_own(options, tmp_path):
    run("vanilla", **options)
    ckpt, trained = str(Path(options["output_dir"]) / "model.pt"), table(options["output_dir"])
    assert "holds a run with" in refused(lambda: run("vanilla", "evaluate", **options, ckpt=ckpt))
    run("vanilla", "evaluate", **options | {"ckpt": ckpt, "output_dir": str(tmp_path / "again"), "figures": True})
    pd.testing.assert_frame_equal(table(tmp_path / "again"), trained[trained.split == "test"], check_exact=False)
    shown = read_json(tmp_path / "again" / "viewer.json")
    assert ({layer["name"] for layer in shown["views"][0]["layers"]}, shown["left_out"]) == ({"truth", "vanilla"}, [])
    assert '<div class="lead"><p>Mean Dice 0.' in (tmp_path / "again" / "report.html").read_text()


def test_a_source_is_scored_where_all_patients_are_tested(options, collection, source, tmp_path, no_training):
    """The untouched source gives the same scores if there are no training and validation patients."""
    options |= {"source": str(source), "figures": True, "check_data": True}
    tested = broken(collection, tmp_path / "tested", only_tested)
    run("zero_shot", **options | {"collection": tested})
    folder, scores = Path(options["output_dir"]), table(options["output_dir"])
    assert set(scores["split"]) == {"test"}
    assert scores["subject"].nunique() == 10
    assert {"overlay.png", "report.html", "model.pt"} <= {path.name for path in folder.iterdir()}
    assert not {"audit", "last.pt", "maps.png"} & {path.name for path in folder.iterdir()}
    run("zero_shot", **options | {"output_dir": str(tmp_path / "some")})
    some = table(tmp_path / "some").set_index("subject")["dice"]
    pd.testing.assert_series_equal(scores.set_index("subject")["dice"][some.index], some)


def test_a_source_that_does_not_know_the_targets_classes_is_not_scored_as_it_is(options, no_training):
    message = refused(lambda: run("zero_shot", **options | {"target_task": "17-T2-FeTS"}))
    assert "source 14-FLAIR-ED: source and target have different numbers of classes" in message


# Inference


def segment(images: Path, source: Path, out: Path, **options) -> dict[str, nib.Nifti1Image]:
    sizes = {key: TINY[key] for key in ("spacing", "roi_size")}
    run(base="inference", input_dir=str(images), ckpt=str(source), output_dir=str(out), **sizes | options)
    return {path.name.removesuffix("_seg.nii.gz"): nib.load(path) for path in out.glob("*.nii.gz")}


def test_a_network_finds_what_it_was_trained_on_however_the_image_lies(collection, source, tmp_path):
    image, places = nib.load(collection.parent / "14-000" / "FLAIR.nii.gz"), nib.orientations
    turn = places.ornt_transform(places.io_orientation(image.affine), places.axcodes2ornt("PIR"))
    (tmp_path / "in").mkdir()
    nib.save(image, tmp_path / "in" / "upright.nii.gz")
    nib.save(image.as_reoriented(turn), tmp_path / "in" / "turned.nii.gz")
    found = segment(tmp_path / "in", source, tmp_path / "out")
    upright, turned = (np.asarray(nib.as_closest_canonical(found[name]).dataobj) for name in ("upright", "turned"))
    assert (turned == upright).mean() > 0.999
    assert set(np.unique(upright)) == {0, 1}
    truth = np.asarray(nib.load(collection.parent / "14-000" / "tumour.nii.gz").dataobj) == 1
    assert 2 * (truth & (upright == 1)).sum() / (truth.sum() + (upright == 1).sum()) > 0.3


def test_patients_with_files_of_one_name_do_not_overwrite_each_other(collection, source, tmp_path):
    for subject in ("14-000", "14-001"):
        (tmp_path / "in" / subject).mkdir(parents=True)
        shutil.copy(collection.parent / subject / "FLAIR.nii.gz", tmp_path / "in" / subject)
    segment(tmp_path / "in", source, tmp_path / "out", task="14-FLAIR-ED")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["14-000_seg.nii.gz", "14-001_seg.nii.gz"]


def test_inference_looks_at_all_images_before_it_begins(source, tmp_path):
    assert "no image (.nii, " in refused(lambda: segment(tmp_path, source, tmp_path / "out"))
    (tmp_path / "a.nii.gz.json").touch()
    good = nib.Nifti1Image(np.ones((4, 4, 2), np.float32), np.eye(4))
    for name in ("a.nii", "a.nii.gz", "C.NII.GZ"):
        nib.save(good, tmp_path / name)
    one = str(tmp_path / "C.NII.GZ")
    assert images_to_segment(one, "17-T2-ED") == [{"name": "C", "image": one}]
    with pytest.raises(InputError, match="two images of a"):
        images_to_segment(str(tmp_path), "17-T2-ED")
    (tmp_path / "a.nii").unlink()
    assert len(images_to_segment(str(tmp_path), "17-T2-ED")) == 2
    nib.save(nib.Nifti1Image(np.ones((4, 4, 2, 3), np.float32), np.eye(4)), tmp_path / "b.nii.gz")
    message = refused(lambda: images_to_segment(str(tmp_path), "17-T2-ED"))
    assert message.startswith(f"{tmp_path}/b.nii.gz has 3 channels where one is expected")


@pytest.mark.parametrize(
    ("wrong", "message"), [({"ckpt": "nowhere.pt"}, "nowhere.pt does not exist"), ({"n_classes": 4}, "tensors copied")]
)
def test_inference_says_what_is_wrong_with_the_weights(collection, source, tmp_path, wrong, message):
    image = collection.parent / "17-000" / "T2.nii.gz"
    settings = {"input_dir": str(image), "ckpt": str(source), "output_dir": str(tmp_path / "out")}
    assert message in refused(lambda: run(base="inference", **settings | wrong))
    assert not (tmp_path / "out").exists()


# Resuming


def epochs_begun(dies_at: int | None = None, **options) -> list[int]:
    """Lists the epochs that a run begins; the run fails at the start of one of them (None: of no epoch)."""
    workflow, epochs = workflow_of("vanilla", **options), []
    workflow.initialize()

    def note(engine):
        epochs.append(engine.state.epoch)
        if engine.state.epoch == dies_at:
            raise KeyboardInterrupt

    workflow.parser.get_parsed_content("train#trainer").add_event_handler(Events.EPOCH_STARTED, note)
    with pytest.raises(BaseException) if dies_at else nullcontext():  # noqa: PT011
        workflow.run()
    return epochs


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(options):
    options |= {"epochs": 3, "val_interval": 1}
    folder = Path(options["output_dir"])
    assert epochs_begun(dies_at=3, **options) == [1, 2, 3]
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 2
    assert not (folder / "metrics.csv").exists()
    assert epochs_begun(**options) == [3]
    assert epochs_begun(**options) == []


def test_a_resumed_run_never_replaces_a_better_model(options):
    options |= {"epochs": 3, "val_interval": 1}
    folder = Path(options["output_dir"])
    epochs_begun(dies_at=2, **options)
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"best": 2.0}, folder / "last.pt")  # better than any Dice can be
    best = (folder / "model.pt").read_bytes()
    assert epochs_begun(**options) == [2, 3]
    assert (folder / "model.pt").read_bytes() == best


# Bad input


def broken(collection: Path, folder: Path, damage) -> str:
    """A copy of the collection after ``damage(folder, content)``."""
    shutil.copytree(collection.parent, folder)
    content = json.loads((folder / "collection.json").read_text())
    damage(folder, content)
    (folder / "collection.json").write_text(json.dumps(content))
    return str(folder / "collection.json")


def truncate(folder: Path, content: dict, subject: str = "17-003/T2.nii.gz") -> None:
    path = folder / subject
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:5000]))


def empty_test_split(folder: Path, content: dict) -> None:
    content["subjects"] = [s for s in content["subjects"] if (s["institution"], s["split"]) != ("17", "test")]


def only_tested(folder: Path, content: dict) -> None:
    content["subjects"] = [subject | {"split": "test"} for subject in content["subjects"]]


@pytest.fixture
def no_training(no_training, monkeypatch):
    """Bad input must be refused before anything long begins."""
    monkeypatch.setattr("medtl_ext.engines.WeightedTrainer.run", lambda self: pytest.fail("training began"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"collection": "nowhere.json"}, "nowhere.json does not exist"),
        ({"target_task": "17-T2-EDD"}, "did you mean 'ED'"),
        ({"target_task": "17-T3-ED"}, "modality 'T3' is unknown"),
        ({"target_task": "17"}, "institution-modality-objective"),
        ({"source": "14-FLAIR-EDD"}, "did you mean 'ED'"),
        ({"source": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"source": {"task": "14-FLAIR-FeTS"}}, "number of classes"),
        ({"target_task": "17-T2-FeTS", "source": {"task": "14-FLAIR-FeTS"}}, "number of classes"),
        ({"network_def#features": [4, 4, 8, 8, 8, 4]}, "another architecture"),
        ({"freeze": "backbone"}, "matches no parameter"),
        ({"train_slices": 0}, "max_slices must be at least 1"),
        ({"background_share": 1}, "0 <= share < 1"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused_before_training(wrong, message, options, no_training):
    if isinstance(wrong.get("source"), dict):  # what the weights are said to be of
        wrong = wrong | {"source": options["source"] | wrong["source"]}
    assert message in refused(lambda: run(**options | {"check_data": True} | wrong))
    assert not (Path(options["output_dir"]) / "last.pt").exists()


@pytest.mark.parametrize(("damage", "said"), [(truncate, "17-003"), (empty_test_split, "no subject in split 'test'")])
def test_bad_data_are_refused_before_training(damage, said, options, collection, tmp_path, no_training):
    options |= {"collection": broken(collection, tmp_path / "bad", damage), "check_data": True}
    assert said in refused(lambda: run(**options))


def test_bad_source_data_are_refused_before_pretraining(options, collection, tmp_path, no_training):
    bad = broken(collection, tmp_path / "bad", lambda *where: truncate(*where, "14-000/FLAIR.nii.gz"))
    options |= {"collection": bad, "source_dir": str(tmp_path / "sources"), "source": SOURCE_TASK, "check_data": True}
    assert "14-000" in refused(lambda: run(**options))


def test_a_run_that_was_refused_does_not_claim_its_folder(options):
    refused(lambda: run("vanilla", **options | {"target_task": "17-T2-EDD"}))
    run("vanilla", **options)
    assert len(table(options["output_dir"])) == 6


# Several processes


@pytest.mark.slow
def test_two_processes_give_what_one_gives(collection, tmp_path):
    """Every batch is the whole training set and no layer has batch statistics, so only rounding may differ.

    Uses gradient descent: Adam would hide a gradient of the wrong scale and amplify rounding where it should be 0.

    Pre-training and audit run too: each is a separate run that one rank starts.
    """
    options = dict(TINY) | {
        "collection": str(collection),
        "source_dir": str(tmp_path / "sources"),
        "batch_size": 8,
        "network_def#norm": ["INSTANCE", {"affine": True}],
        "optimizer#_target_": "torch.optim.SGD",
        "learning_rate": 0.01,
        "train#inferer": "$monai.inferers.SimpleInferer()",  # bfloat16 rounds at another place in each half of a batch
    }
    files = ["configs/train.json", "configs/multi_gpu_train.json"]
    two = options | {"output_dir": str(tmp_path / "two"), "audit#arms": ARMS}
    finish(RISK_MAP.start(files, two, processes=2))
    run(**options | {"output_dir": str(tmp_path / "one")})
    assert len([path for path in (tmp_path / "sources").iterdir() if path.is_dir()]) == 1
    assert (tmp_path / "two" / "audit.csv").is_file()
    assert {path.name for path in (tmp_path / "two" / "audit").iterdir()} == {*ARMS, "risk_map"}
    network = tmp_path / "two" / "audit" / "risk_map" / "model.pt"

    for name in ("weight", "leep_before"):
        one_map, two_map = (nib.load(tmp_path / run / f"{name}.nii.gz").get_fdata() for run in ("one", "two"))
        np.testing.assert_allclose(one_map, two_map, atol=1e-5)
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "one" / "model.pt", network))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, atol=1e-5, rtol=1e-4, msg=name)
    (source,) = (tmp_path / "sources").glob("*/model.pt")
    source = torch.load(source, weights_only=True)
    assert max((one[name] - source[name]).abs().max() for name in one) > 0.01
    pd.testing.assert_frame_equal(table(tmp_path / "two"), table(tmp_path / "one"), atol=0.01)  # a voxel

    files = ["configs/train.json", "configs/evaluate.json", "configs/multi_gpu_evaluate.json"]
    again = options | {"output_dir": str(tmp_path / "again"), "ckpt": str(network)}
    for process in [RISK_MAP.start(files, again, node=node) for node in (0, 1)]:  # two machines of one process each
        finish(process)
    trained = table(tmp_path / "two")
    expected = trained[trained.split == "test"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table(tmp_path / "again"), expected, atol=1e-5)
