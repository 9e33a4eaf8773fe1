"""Dataset transferability by parts: sources, scores from one pass, the ranking's words, truth, published numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import Begun, begin
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.networks.nets import DenseNet, ResNet
from sklearn.metrics import roc_auc_score
from torch import nn

from medtl_ext import InputError, bundle
from medtl_ext._validation import require_choices
from medtl_ext.bundle import Job
from medtl_ext.data import write_collection
from medtl_ext.data.classification import ClassificationDataset, sample_per_class
from medtl_ext.datasets import pipeline, scoring, sources, study, truth
from medtl_ext.datasets.published import reproduce_table2
from medtl_ext.datasets.scoring import METRICS, observe, score_table
from medtl_ext.datasets.sources import Source, find_sources, images_to_classify, initialized, open_dataset
from medtl_ext.metrics import NCTITerms, combine_lp_fu, combine_ncti
from medtl_ext.metrics.nleep import compute_nleep

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "dataset_transferability"
NETWORK = {
    "_target_": "ResNet",
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "block_inplanes": [4, 4, 8, 8],
    "spatial_dims": 2,
    "n_input_channels": "@in_channels",
    "num_classes": "@n_classes",
}
FIT = {"in_channels": 1, "image_size": 32}


def built(n_classes=2, in_channels=1):
    arguments = {key: value for key, value in NETWORK.items() if key != "_target_"}
    return ResNet(**arguments | {"num_classes": n_classes, "n_input_channels": in_channels})


@pytest.fixture
def mnist(tmp_path):
    """Writes MedMNIST files of noise whose brightness is the class."""

    def write(name="tinymnist", counts=(12, 8, 8), n_classes=2, shape=(28, 28)):
        generator = np.random.default_rng(list(name.encode()))
        arrays = {}
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            labels = np.arange(count) % n_classes
            noise = generator.integers(0, 100, (count, *shape))
            arrays[f"{split}_images"] = (noise + 60 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)
            arrays[f"{split}_labels"] = labels[:, None]
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return str(tmp_path / f"{name}.npz")

    return write


@pytest.fixture
def checkpoint(tmp_path):
    def write(network, name="net"):
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
        return str(tmp_path / f"{name}.pt")

    return write


# Sources


def test_a_dataset_is_a_file_a_folder_or_a_task(mnist, tmp_path):
    assert open_dataset(mnist()).name == "tinymnist"
    with pytest.raises(InputError, match=r"wrong\.csv is no \.npz file, no folder of images, and no task"):
        open_dataset("wrong.csv")
    with pytest.raises(InputError, match="not of the form institution-modality-objective"):
        open_dataset("tinymnist")


def test_sources_of_all_kinds(mnist, checkpoint):
    path = mnist(n_classes=3)
    entries = [path, {"name": "ours", "checkpoint": checkpoint(built(4)), "n_classes": 4, "convolutions": ["a", "b"]}]
    entries.append({"name": "again", "data": path, "network": NETWORK})
    one, ours, again = find_sources(entries, target="17-T1-tumour")
    assert (one.name, one.n_classes, one.images, one.checkpoint, one.own) == ("tinymnist", 3, 12, None, False)
    assert (ours.n_classes, ours.images, ours.convolutions) == (4, None, ("a", "b"))
    assert again.network == NETWORK


def test_the_targets_own_model_is_known_however_the_path_is_written(mnist, monkeypatch, tmp_path):
    path = mnist()
    monkeypatch.chdir(tmp_path)
    own, other = find_sources(["tinymnist.npz", {"name": "o", "data": mnist("other")}], target=path)
    assert (own.own, other.own) == (True, False)
    with pytest.raises(InputError, match="no source is left: tinymnist is the target's own model"):
        find_sources([path], target=path)
    shutil.copy(path, tmp_path / "copy.npz")
    described = {"name": "described", "medmnist": "tinymnist.npz", "class_names": ["a", "b"]}
    (tmp_path / "described.json").write_text(json.dumps(described))
    found = find_sources(["copy.npz", "described.json", {"name": "o", "data": mnist("other")}], target=path)
    assert [source.own for source in found] == [True, True, False]


def test_a_pool_is_trained_again_when_its_data_or_its_optimizer_change(mnist, tmp_path):
    """A network is never taken for one that was trained on other images or in another way."""
    config = json.loads((BUNDLE / "configs" / "train.json").read_text()) | {"bundle_root": str(BUNDLE)}

    def folder(where, **changes):
        return sources.pretraining_job(config | changes, tmp_path, Source("s", data=str(where)), seed=0).output_dir

    def of_collection(path):
        merged = config | {"collection": str(path)}
        return sources.pretraining_job(merged, tmp_path, Source("s", data="13-T1-ED"), seed=0).output_dir

    subjects = [
        {"id": name, "institution": "13", "split": "train", "images": {"T1": "x.nii"}, "labels": {}} for name in "ab"
    ]
    content = {"name": "c", "labels": {"t": {"ED": 1}}, "objectives": {"ED": {"label": "t", "values": [1]}}}
    (tmp_path / "moved").mkdir()
    here, moved = (
        write_collection(tmp_path / at, content | {"subjects": subjects}) for at in ("c.json", "moved/c.json")
    )
    before = of_collection(here)
    assert of_collection(moved) == before
    subjects[0]["split"] = "test"
    assert of_collection(write_collection(here, content | {"subjects": subjects})) != before
    images = tmp_path / "images" / "cat"
    images.mkdir(parents=True)
    (images / "1.png").write_bytes(b"one")
    before = folder(images.parent)
    assert folder(images.parent) == before
    (images / "1.png").write_bytes(b"two")
    assert folder(images.parent) != before
    path = mnist()
    assert folder(path, optimizer={"_target_": "torch.optim.Adam"}) != folder(path)
    assert folder(path, output_dir="elsewhere") == folder(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "give a list with at least one"),
        ("13-T1-tumour", "give a list with at least one"),
        ([{"name": "x"}], "neither a dataset nor"),
        ([{"data": "x.npz", "chekpoint": "y"}], "did you mean 'checkpoint'"),
        (["nowhere.npz"], "does not exist"),
        ([{"name": "a", "checkpoint": "x.pt"}, {"name": "a", "checkpoint": "y.pt"}], "names a twice"),
        ([{"name": "scratch", "checkpoint": "x.pt"}], "named scratch, which means training without one"),
        ([{"name": "zero_shot", "checkpoint": "x.pt"}], "named zero_shot"),
        ([{"checkpoint": "full.pt"}], "named full"),
    ],
    ids=str,
)
def test_bad_sources_are_refused(entries, message):
    with pytest.raises(InputError, match=message):
        find_sources(entries, target="17-T1-tumour")


def test_a_source_that_does_not_fit_is_refused_in_one_line(checkpoint):
    def build(**options):
        return Source("ours", checkpoint=checkpoint(built()), **options).build(NETWORK, **FIT)

    assert not build().training
    rgb = NETWORK | {"n_input_channels": 3}
    with pytest.raises(
        InputError, match=r"source ours: its network takes 3 channel\(s\), the images have 1; give --in_"
    ):
        build(network=rgb)
    with pytest.raises(InputError, match=r"source ours: .*does not fit this ResNet"):
        build(n_classes=3)
    with pytest.raises(InputError, match=r"source ours: network os\.system is not one of"):
        build(network={"_target_": "os.system"})
    unet = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [4] * 6}
    weights = checkpoint(sources.built(unet), "unet")
    with pytest.raises(InputError, match="does not give 2 class scores an image"):
        Source("ours", network=unet, checkpoint=weights).build(NETWORK, **FIT)


def test_the_head_stays_fresh_even_where_it_would_fit(checkpoint):
    source, target = built(), built()
    head = target.fc.weight.clone()
    initialized(target, checkpoint(source))
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert torch.equal(target.fc.weight, head)
    dense = DenseNet(2, 1, 2, init_features=4, growth_rate=4, block_config=(1, 1))
    fresh = DenseNet(2, 1, 3, init_features=4, growth_rate=4, block_config=(1, 1))
    initialized(fresh, checkpoint(dense, "dense"))  # its head is called otherwise, and is of another size
    assert torch.equal(fresh.features.conv0.weight, dense.features.conv0.weight)
    with pytest.raises(InputError, match="does not fit"):
        initialized(built(), checkpoint(dense, "dense"))
    assert initialized(target, None) is target


def test_images_to_classify(mnist, tmp_path):
    items = images_to_classify(mnist(), "", in_channels=3, image_size=32)
    assert len(items) == 8
    assert items[0]["image"].shape == (3, 28, 28)
    with pytest.raises(InputError, match="no image"):
        images_to_classify(str(tmp_path / "empty"), "", in_channels=1, image_size=32)


# One pass, every score


class Replay(nn.Module):
    """Gives back the features and logits that its 'images' are made of."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.head = width, nn.Linear(width, 1)

    def forward(self, image):
        self.head(image[:, : self.width].float())  # the input of the last layer: the features
        return image[:, self.width :].float()


def score_section(items, batch_size=48):
    """The evaluator of train.json, as it is written there, over other images."""
    config = json.loads((BUNDLE / "configs" / "train.json").read_text())
    parser = ConfigParser({"score": config["score"], "seed": 0, "device": "$torch.device('cpu')"})
    parser["score#dataset"] = Dataset(items)
    parser["score#dataloader#batch_size"] = batch_size
    return parser.get_parsed_content("score#evaluator")


def replayed(features, logits, labels, monkeypatch, metrics=("leep", "logme")):
    images = torch.from_numpy(np.concatenate([features, logits], 1))
    items = [
        {"image": image, "label": int(label), "subject": f"p{place % 12}"}
        for place, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    monkeypatch.setattr(Source, "build", lambda self, *_, **__: Replay(features.shape[1]).eval())
    evaluator = score_section(items)
    return observe(
        [Source("one")],
        evaluator=evaluator,
        network_def={},
        in_channels=1,
        image_size=1,
        metrics=metrics,
        progress=False,
    )["one"]


def test_one_pass_of_the_config_gives_the_reference_values(vectors, monkeypatch):
    data = vectors("cls_basic")
    seen = replayed(data["features"], data["source_logits"], data["labels"], monkeypatch)
    expected = {"leep": "leep", "logme": "indep_logme", "sfda": "sfda", "h_score": "hscore_reg"}
    expected |= {"gbc": "gbc_spherical_fulllogdet"}
    for metric, key in expected.items():  # float32 through the network
        assert float(seen.values[metric]) == pytest.approx(float(data[key]), rel=1e-3), metric
    # The references' components are approximate ones, and their neighbours those of another order of the samples.
    assert float(seen.values["parc"]) == pytest.approx(float(data["parc_32"]), rel=0.1)
    assert float(seen.values["lp"]) == pytest.approx(float(data["lp_nca"]), abs=0.02)
    terms = [float(data[f"ncti_{name}"]) for name in NCTITerms._fields]
    assert [float(term) for term in seen.values["ncti"]] == pytest.approx(terms, rel=1e-3)
    assert np.isfinite(float(seen.values["nleep"]))
    assert len(seen.samples.labels) == 240
    assert seen.samples.names == seen.maps.names
    assert "fu" not in seen.values  # nothing asked for it


def test_feature_update_in_the_pass_equals_the_reference(vectors, monkeypatch):
    data = vectors("fu_tinycnn")
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.Linear(10, 3),
    )
    names = [f"{layer}_{part}" for layer in ("conv1", "conv2", "fc") for part in ("weight", "bias")]
    state = dict(zip(network[:7].state_dict(), (torch.from_numpy(data[name]) for name in names), strict=True))
    network[:7].load_state_dict(state)
    items = [
        {"image": torch.from_numpy(image), "label": int(label), "subject": "p"}
        for image, label in zip(data["images"], data["labels"], strict=True)
    ]
    monkeypatch.setattr(Source, "build", lambda self, *_, **__: network.eval())
    options = {"evaluator": score_section(items, 6), "network_def": {}, "metrics": METRICS, "progress": False}
    seen = observe([Source("one"), Source("two")], **options, **FIT)
    for name in ("one", "two"):  # the second is not scored with the first one's gradients
        assert float(seen[name].values["fu"]) == pytest.approx(float(data["fu"]), abs=1e-5)
    with pytest.raises(InputError, match=r"source three: convolutions 'c1' is unknown.*name them as 'convolutions'"):
        observe([Source("three", convolutions=("c1", "c2"))], **options, **FIT)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 3))
    monkeypatch.setattr(Source, "build", lambda self, *_, **__: linear.eval())
    with pytest.raises(
        InputError, match=r"source four: network ran 0 convolution.*name them as 'convolutions' of the s"
    ):
        observe([Source("four")], **options, **FIT)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric not in scoring.NO_INTERVAL])
def test_every_patient_once_gives_the_score_itself(metric, monkeypatch):
    generator = np.random.default_rng(0)
    seen = {}
    for name in ("one", "two", "three"):
        labels = np.arange(72) % 3
        features = generator.normal(size=(72, 5)) + labels[:, None] * generator.normal(size=5)
        seen[name] = replayed(features, generator.normal(size=(72, 3)), labels, monkeypatch)
    table = score_table([Source(name) for name in seen], seen, metrics=[metric])
    function = scoring.resampled_scores(metric, seen, list(seen))
    same = function(np.ones(12, dtype=int))
    assert same == pytest.approx(table[metric].to_dict(), rel=1e-9)
    assert function(np.array([2, 0] * 6)) != pytest.approx(same, rel=1e-3)


def test_nleep_ranks_by_the_seed_of_the_run(tmp_path, no_command):
    """The score that ranks is the one in the table."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=generator).double()
    labels = (features[:, 0] + torch.randn(200, generator=generator) > 0).long()
    values = {seed: float(compute_nleep(features.abs(), labels, seed=seed)) for seed in (0, 3)}
    assert abs(values[0] - values[3]) > 1e-4
    samples = scoring.Samples(features.abs(), labels, torch.arange(200) // 10, tuple(map(str, range(20))))
    seen = {name: scoring.Seen(samples, None, {"nleep": values[3]}) for name in ("one", "two")}
    table = score_table([Source(name) for name in seen], seen, metrics=["nleep"])
    images = np.zeros((400, 4, 4), np.uint8)
    splits, names = np.repeat(["train", "val"], 200), tuple(str(place // 10) for place in range(400))
    target = ClassificationDataset("t", images, np.tile(labels.numpy(), 2), splits, ("a", "b"), names)
    options = {"cross_domain": False, "n_resamples": 1, "minimum_win": 0.95, "minimum_gap": 0.15, "figures": False}
    ranking = pipeline.rank_sources(
        table, seen, target=target, decide_by="nleep", seed=3, output_dir=str(tmp_path), **options
    )
    assert ranking.table["score"].tolist() == pytest.approx([values[3]] * 2)


def seen_with(**values):
    terms = NCTITerms(*(torch.tensor(float(value)) for value in values.pop("ncti", (1, 2, 3))))
    return scoring.Seen(None, None, {"ncti": terms, **values})


def test_the_own_model_is_scored_and_has_no_part_in_what_is_scaled():
    lp, fu = {"a": 0.6, "b": 0.8, "own": 1.0}, {"a": 1.2, "b": 0.9, "own": 0.1}
    seen = {name: seen_with(lp=lp[name], fu=fu[name], ncti=(place, 1, 2)) for place, name in enumerate(lp)}
    pool = [Source("a"), Source("b"), Source("own", own=True)]
    metrics = ["lp_fu", "lp", "fu", "ncti"]
    with pytest.raises(InputError, match="metric leep was not measured"):
        score_table(pool, seen, metrics=["leep"])
    table = score_table(pool, seen, metrics=metrics)
    assert table.loc["own", ["lp", "fu"]].tolist() == [1.0, 0.1]
    assert table.loc["own", ["lp_fu", "ncti"]].isna().all()
    assert table["lp_fu"].drop("own").to_dict() == combine_lp_fu(lp, fu, exclude="own")
    expected = combine_ncti({name: seen[name].values["ncti"] for name in ("a", "b")})
    assert table["ncti"].drop("own").to_dict() == expected
    turned = score_table(pool, seen, metrics=["lp_fu"], cross_domain=True)
    assert turned["lp_fu"].drop("own").to_dict() == combine_lp_fu(lp, fu, exclude="own", cross_domain=True)


def test_a_model_that_need_not_change_is_last_by_lp_fu_and_first_by_lp(tmp_path):
    lp, fu = {"a": 0.6, "b": 0.8, "own": 1.0}, {"a": 1.2, "b": 0.9, "own": 0.1}
    seen = {name: seen_with(lp=lp[name], fu=fu[name]) for name in lp}
    pool = [Source("a"), Source("b"), Source("own", own=True)]
    options = {"metrics": ["lp", "lp_fu"], "cross_domain": False, "output_dir": str(tmp_path)}
    found = truth.rank_own_model(pool, seen, **options).set_index("score")["rank"]
    assert found.to_dict() == {"LP": 1, "LP x FU": 2}  # as far behind as the one of least LP
    assert truth.rank_own_model(pool[:2], seen, **options) is None


@pytest.mark.parametrize(
    ("metrics", "message"), [(["leap"], "did you mean 'leep'"), ([], "at least one"), ("lp", "list")]
)
def test_unknown_metrics_are_refused(metrics, message):
    with pytest.raises(InputError, match=message):
        require_choices("metric", metrics, scoring.METRICS)


# The ranking


@pytest.fixture
def no_command(monkeypatch):
    monkeypatch.setattr(pipeline, "next_command", lambda *_: "next")


def ranked(scores, tmp_path, *, decide_by="logme", subjects=True, own=()):
    labels, splits = np.arange(40) % 2, np.repeat(["train", "val"], 20)
    names = tuple(f"p{place // 2}" for place in range(40)) if subjects else None
    target = ClassificationDataset("t", np.zeros((40, 4, 4), np.uint8), labels, splits, ("a", "b"), names)
    generator = np.random.default_rng(0)
    observed = {}
    for name, shift in scores.items():
        features = torch.from_numpy(generator.normal(size=(20, 3)) + shift * labels[:20, None])
        groups = torch.arange(20) // 2
        samples = scoring.Samples(features, torch.from_numpy(labels[:20]), groups, tuple(f"p{n}" for n in range(10)))
        values = {metric: float(shift) for metric in METRICS if metric not in ("ncti", "lp_fu")}
        observed[name] = scoring.Seen(samples, None, values)
    table = score_table(
        [Source(name, own=name in own) for name in scores], observed, metrics=["lp_fu", "lp", "fu", "logme"]
    )
    options = {"cross_domain": False, "n_resamples": 60, "minimum_win": 0.95, "minimum_gap": 0.15, "seed": 0}
    pipeline.rank_sources(
        table, observed, target=target, decide_by=decide_by, output_dir=str(tmp_path), figures=True, **options
    )
    return json.loads((tmp_path / "ranking.json").read_text())


def test_a_clear_winner_is_recommended(tmp_path, no_command):
    content = ranked({"good": 6, "poor": 0, "own": 9}, tmp_path, own=["own"])
    assert content["recommendation"] == "good"
    assert content["answer"].startswith("Transfer from good")
    assert "own is the target's own model: scored, not ranked." in content["answer"]
    table = pd.read_csv(tmp_path / "ranking.csv").set_index("source")
    assert table["status"].to_dict() == {"good": "ranked", "poor": "ranked", "own": "own model", "scratch": "no score"}
    assert np.isnan(table.loc["own", "rank"])
    assert (tmp_path / "answer.txt").read_text().endswith("To use it:\nnext\n")
    assert (tmp_path / "ranking.png").stat().st_size > 1000


def test_a_score_that_cannot_be_resampled_gives_an_order_and_no_verdict(tmp_path, no_command):
    content = ranked({"good": 6, "poor": 0}, tmp_path, decide_by="lp_fu")
    assert content["recommendation"] is None
    assert content["default"] == "good"
    assert content["answer"].startswith("No evidence to prefer: LP x FU has no interval over patients")
    assert "good 1.000 and poor 0.000" in content["answer"]


def test_constant_scores_rank_nothing(tmp_path, no_command, capsys):
    content = ranked({"one": 0, "two": 0}, tmp_path, decide_by="lp_fu")
    assert "All sources have the same LP x FU: it ranks nothing here." in content["answer"]
    assert "There is no best guess: one and two have the same score." in content["answer"]
    assert content["recommendation"] is None
    assert content["default"] is None
    assert content["command"] is None
    assert (tmp_path / "answer.txt").read_text().rstrip() == content["answer"]
    assert "To use it" not in capsys.readouterr().out


def test_a_tie_at_the_top_is_no_pick(tmp_path, no_command):
    content = ranked({"one": 5, "two": 5, "poor": 0}, tmp_path)
    assert "LP x FU would pick one and two (all alike)." in content["answer"]


def test_sizes_that_nobody_knows_pick_nothing(tmp_path, no_command):
    assert "source size would pick" not in ranked({"one": 5, "two": 1}, tmp_path)["answer"]


def test_unknown_patients_are_said(tmp_path, no_command):
    content = ranked({"one": 0, "two": 1}, tmp_path, subjects=False)
    assert "every image counts as a patient of its own" in content["answer"]
    assert content["patients_known"] is False


def test_options_are_checked():
    target = sample_per_class(
        ClassificationDataset(
            "t", np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2, np.repeat(["train", "val", "test"], 2), ("a", "b")
        )
    )
    good = {"in_channels": 3, "image_size": 32, "metrics": ["leep"], "decide_by": "leep", "minimum_win": 0.9}
    good |= {"minimum_gap": 0.1, "n_resamples": 10}
    pipeline.check_options(target=target, **good)
    for wrong, message in [
        ({"decide_by": "logme"}, "not in metrics"),
        ({"minimum_win": 0.4}, "minimum_win"),
        ({"image_size": 8}, "image_size 8"),
        ({"in_channels": 1}, "RGB images"),
    ]:
        with pytest.raises(InputError, match=message):
            pipeline.check_options(target=target, **good | wrong)


# The truth


def predictions(n=60, n_classes=3, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_classes, n)
    probs = generator.dirichlet(np.ones(n_classes), n) + 0.5 * np.eye(n_classes)[labels]
    table = pd.DataFrame(probs / probs.sum(1, keepdims=True), columns=[f"p{label}" for label in range(n_classes)])
    return table.assign(label=labels, subject=[f"s{place // 4}" for place in range(n)])


def test_the_auc_is_scikit_learns_and_its_interval_holds_it():
    table = predictions()
    columns = ["p0", "p1", "p2"]
    assert truth.image_auc(table) == pytest.approx(roc_auc_score(table["label"], table[columns], multi_class="ovr"))
    low, high = truth.auc_interval(table)
    assert 0 < low < truth.image_auc(table) < high <= 1
    narrow = truth.auc_interval(table.assign(subject=np.arange(60)))
    assert narrow[1] - narrow[0] < 1.5 * (high - low)
    binary = predictions(n_classes=2)
    assert truth.image_auc(binary) == pytest.approx(roc_auc_score(binary["label"], binary["p1"]))
    assert np.isnan(truth.image_auc(table[table["label"] == 0]))


class Images(list):
    """A loader as `score_images` sees it."""

    def __init__(self, count):
        super().__init__(range(count))
        items = [{"subject": f"s{place}", "name": f"{place}.png"} for place in range(count)]
        self.dataset = SimpleNamespace(data=items)


@pytest.mark.parametrize("margin", [4, 12, 14])
def test_the_truth_is_the_auc_of_probabilities_that_were_not_rounded(margin, tmp_path, monkeypatch):
    """A sure network's probabilities differ from 1 in the seventh digit."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    logits = torch.from_numpy(margin + 3 * (labels - 0.5) + generator.normal(0, 1.5, 200)).float()
    probs = torch.stack([torch.zeros(200), logits], 1).softmax(1)
    details = {"auc": (probs, torch.nn.functional.one_hot(torch.from_numpy(labels), 2))}
    evaluator = SimpleNamespace(network=None, run=lambda: None, state=SimpleNamespace(metric_details=details))
    monkeypatch.setattr(truth, "load_weights", lambda *_, **__: None)
    options = {"checkpoint": "", "output_dir": str(tmp_path), "method": "m", "seed": 0}
    metrics = truth.score_images(evaluator, {"val": Images(200), "test": Images(200)}, **options)
    expected = np.mean([roc_auc_score(labels == label, probs[:, label]) for label in (0, 1)])
    assert metrics.set_index("split").loc["test", "auc"] == pytest.approx(expected)
    row = truth.truth_table({"one": Job({}, tmp_path)}).loc["one"]
    assert row["auc"] == pytest.approx(expected, abs=1e-6)
    assert row["auc_low"] < expected < row["auc_high"]
    written = pd.read_csv(tmp_path / "predictions.csv")
    assert truth.image_auc(written[written["split"] == "test"]) == pytest.approx(expected)


def test_a_patient_may_be_called_na(tmp_path):
    """What pandas takes for a missing value is a name like any other."""
    names = ["NA", "null", "nan", "p4"]
    table = predictions().assign(split="test", subject=[names[place % 4] for place in range(60)])
    named, plain = tmp_path / "named", tmp_path / "plain"
    for folder, content in ((named, table), (plain, table.replace({"subject": dict(zip(names, "abcd", strict=True))}))):
        folder.mkdir()
        content.to_csv(folder / "predictions.csv", index=False)
        pd.DataFrame({"split": ["val", "test"], "auc": [0.5, 0.6]}).to_csv(folder / "metrics.csv", index=False)
    jobs = {folder.name: Job({}, folder) for folder in (named, plain)}
    rows = truth.truth_table(jobs)
    assert rows.loc["named"].equals(rows.loc["plain"])


@pytest.mark.parametrize(
    "grid", [{}, {"learning_rate": [0.1]}, {"learning_rate": 0.1, "momentum": [0], "weight_decay": [0]}]
)
def test_a_bad_grid_is_refused(grid):
    with pytest.raises(InputError, match="expected a list of values for each of learning_rate"):
        truth.settings_of_grid(grid)


def test_the_papers_grid_is_a_grid():
    grid = json.loads((BUNDLE / "configs" / "paper_grid.json").read_text())["grid"]
    assert len(truth.settings_of_grid(grid)) == 24


def study_table():
    names = ["a", "b", "c"]
    rows = []
    for number, target in enumerate(("t1", "t2", "t3")):
        auc = dict(zip(names, (0.9, 0.8, 0.7), strict=True))
        for place, name in enumerate(names):
            scores = {"logme": -place, "leep": place, "own_auc": 0.5, "images": 10}
            rows.append({"source": name, "auc": auc[name] - 0.01 * number, "target": target, "seed": 0, **scores})
        rows.append({"source": "scratch", "auc": 0.85 if number else 0.95, "target": target, "seed": 0})
    return pd.DataFrame(rows)


def test_a_study_has_the_sources_it_began_with(monkeypatch, tmp_path):
    """A source of the same name with other weights would be held for the one that was fine-tuned."""
    monkeypatch.setattr(bundle, "current_config", lambda: {"bundle_root": str(BUNDLE)})
    monkeypatch.setattr(study, "dataset_path", lambda *_, **__: None)
    monkeypatch.setattr(study, "find_sources", lambda *_, **__: [])
    monkeypatch.setattr(study, "run_jobs", begin)
    one, two = {"name": "A", "checkpoint": "a.pt"}, {"name": "B", "checkpoint": "b.pt"}
    begun = {"output_dir": str(tmp_path), "targets": ["17-T2-load", "17-T1-load"], "sources": [one], "seeds": [0]}
    begun |= {"settings": {}, "grid": {"learning_rate": [0.01], "momentum": [0.9], "weight_decay": [0.0]}}
    with pytest.raises(Begun):
        study.study_datasets(**begun)
    (tmp_path / "runs").mkdir()
    for grown in ({"targets": ["17-T2-load", "17-T1-load", "13-T1-load"]}, {"seeds": [0, 1]}):
        with pytest.raises(Begun):
            study.study_datasets(**begun | grown)
    for sources_now in ([one, two], [one | {"checkpoint": "other.pt"}]):
        with pytest.raises(InputError, match="holds a study with"):
            study.study_datasets(**begun | {"sources": sources_now})


def test_a_study_says_what_its_numbers_say(tmp_path):
    table = study_table()
    verdicts = {(target, 0): {"recommendation": "a", "tied": ["a"], "default": "a"} for target in ("t1", "t2", "t3")}
    own = pd.DataFrame({"score": ["LP", "LP x FU"] * 2, "rank": [1, 3, 1, 2], "target": ["t1", "t1", "t2", "t2"]})
    agreement = study.study_report(table, own, verdicts, tmp_path, synthetic=True)
    tau = agreement.set_index(["ranker", "target"])["tau"]
    assert (tau["LogME"] == 1).all()
    assert (tau["LEEP"] < 0).all()
    text = (tmp_path / "study.md").read_text()
    assert "Synthetic phantom" in text
    assert "Training from scratch is better than the best source on 1 of 3 targets" in text
    assert "Of 3 rankings 3 name one source, 3 of them the best one" in text
    assert "LP 2 of 2, LP x FU 0 of 2" in text
    assert "Best mean tau: LogME, 1.00; least regret: LogME, 0.000 AUC" in text
    assert (tmp_path / "critical_difference.png").is_file()


# The paper's Table 2


def test_table_2_from_the_published_numbers(tmp_path, capsys):
    docs = BUNDLE / "docs"
    options = {"scores": str(docs / "published_scores.csv"), "printed": str(docs / "published_table2.csv")}
    table = reproduce_table2(**options, output_dir=str(tmp_path))
    assert table["agrees"].sum() == len(table) == 77
    assert (table["rank"] != table["computed_rank"]).sum() == 2
    text = capsys.readouterr().out
    assert "77 of 77 cells agree" in text
    assert "chi-square 20.766, p 0.00202" in text
    assert "Critical difference 2.716 for 7 methods" in text
    assert "2.792 is printed, which is what the quantile for 8 methods gives (2.792)" in text
    assert "ranks of LogME and NLEEP on Pneumonia are swapped" in text
    assert "Ours 1.91, NLEEP 3.45, LEEP 3.91, LogME 4.00, PARC 4.00, NCTI 4.91, SFDA 5.82" in text


def test_a_changed_number_does_not_agree(tmp_path):
    docs = BUNDLE / "docs"
    raw = pd.read_csv(docs / "published_scores.csv")
    raw.loc[(raw["target"] == "bloodmnist") & (raw["source"] == "imagenet"), "leep"] = -9.0
    raw.to_csv(tmp_path / "changed.csv", index=False)
    options = {"scores": str(tmp_path / "changed.csv"), "printed": str(docs / "published_table2.csv")}
    table = reproduce_table2(**options, output_dir=str(tmp_path))
    wrong = table[~table["agrees"]]
    assert wrong[["target", "method"]].to_numpy().tolist() == [["Blood", "LEEP"]]


def test_the_published_numbers_are_the_transcribed_ones(shared_data):
    for name, original in (("published_scores", "004_scores_dataset"), ("published_table2", "004_table2_dataset")):
        ours, theirs = BUNDLE / "docs" / f"{name}.csv", shared_data / "papers" / f"{original}.csv"
        pd.testing.assert_frame_equal(pd.read_csv(ours), pd.read_csv(theirs))
