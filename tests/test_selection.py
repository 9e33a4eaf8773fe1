"""Candidates, scores, filters and the ground truth of source selection, without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import BasicUNet, UNet
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_ext import InputError
from medtl_ext._validation import require_choices
from medtl_ext.data import write_collection
from medtl_ext.metrics.features import Samples
from medtl_ext.metrics.gbc import compute_gbc
from medtl_ext.metrics.h_score import compute_h_score, compute_h_score_map
from medtl_ext.metrics.leep import compute_leep
from medtl_ext.metrics.logme import compute_logme
from medtl_ext.metrics.nce import compute_nce
from medtl_ext.metrics.transrate import compute_transrate
from medtl_ext.selection import Maps, Observation, Predictions, filter_by_priors, find_candidates, score_of_counts
from medtl_ext.selection.candidates import built, input_misfit
from medtl_ext.selection.scores import METRICS, score
from medtl_ext.selection.study import study_report
from medtl_ext.selection.truth import agreement_table, rankers

SMALL = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def refused(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    return str(caught.value)


# Candidates


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> str:
    """A collection whose files are never opened."""
    subjects = [
        {
            "id": f"{institution}{number}",
            "institution": institution,
            "split": split,
            "images": {"T2": "i", "FLAIR": "i"},
            "labels": {"tumour": "l"},
        }
        for institution in "AB"
        for number, split in enumerate(["train", "train", "val", "test"])
    ]
    content = {
        "name": "toy",
        "labels": {"tumour": {"ED": 1, "ET": 2}},
        "objectives": {
            "ED": {"label": "tumour", "values": [1]},
            "both": {"label": "tumour", "values": [1, 2]},
        },
        "subjects": subjects,
    }
    return str(write_collection(tmp_path_factory.mktemp("toy") / "collection.json", content))


def find(sources, collection, **options):
    return find_candidates(sources, target="A-T2-ED", collection=collection, **options)


def test_a_task_brings_its_tags_size_and_classes(collection):
    one, two = find(["B-FLAIR-ED", "B-T2-both"], collection)
    assert one.tags == {"institution": "B", "modality": "FLAIR", "objective": "ED"}
    assert (one.size, one.n_classes, two.n_classes) == (2, 2, 3)


def test_the_target_is_not_its_own_source(collection):
    (own, other) = find(["A-T2-ED", "B-T2-ED"], collection)
    assert own.left_out == "it is the target itself"
    assert other.left_out is None


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one source"),
        ("B-T2-ED", "give a list"),
        (["B-T2-ED", "B-T2-ED"], "names B-T2-ED twice"),
        (["B-T2-ED", {"name": "B-T2-ED", "checkpoint": "x.pt"}], "names B-T2-ED twice"),
        ([{"name": "scratch", "checkpoint": "x.pt"}], "named scratch"),
        ([{"weights": "x.pt"}], "is no task"),
        ([{"checkpoint": "x.pt", "modalty": "T2"}], "did you mean 'modality'"),
        (["B-T2-EDD"], "did you mean 'ED'"),
        ([{"bundles": "nowhere"}], "does not exist"),
    ],
)
def test_sources_that_make_no_sense_are_refused(sources, message, collection):
    assert message in refused(lambda: find(sources, collection))


def test_a_checkpoint_takes_the_tags_it_is_given(collection):
    (one,) = find([{"name": "ours", "checkpoint": "x.pt", "task": "B-T2-both", "modality": "T2star"}], collection)
    assert one.tags == {"institution": "B", "modality": "T2star", "objective": "both"}
    assert (one.n_classes, one.size) == (3, 2)


def test_weights_that_are_not_the_networks_are_refused(tmp_path, collection):
    torch.save(BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)).state_dict(), tmp_path / "x.pt")
    (one,) = find([{"name": "ours", "checkpoint": str(tmp_path / "x.pt"), "network": SMALL}], collection)
    message = refused(lambda: one.build(BasicUNet))
    assert "source ours" in message
    assert "does not fit" in message


def test_a_3d_network_on_2d_images_is_named(collection):
    (one,) = find([{"name": "ours", "checkpoint": "x.pt", "network": SMALL | {"spatial_dims": 3}}], collection)
    assert input_misfit(built(one.network), one, in_channels=1, roi_size=[32, 32]) == (
        "its network is 3D, the target's images are 2D"
    )


def bundle(folder: Path, config, *, weights=None) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "configs" / "inference.json").write_text(text)
    if weights is not None:
        torch.save(weights, folder / "models" / "model.pt")
    return folder


def weights_of(definition) -> dict:
    return built(definition).state_dict()


def test_a_bundle_is_read_without_running_it(tmp_path, collection):
    marker = tmp_path / "ran"
    config = {
        "imports": [f"$__import__('pathlib').Path({str(marker)!r}).touch()"],
        "channels": [4, 8],
        "network_def": SMALL | {"channels": "@channels"},
        "network": "$@network_def.to('cpu')",
    }
    bundle(tmp_path / "zoo" / "good", config, weights=weights_of(SMALL))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection)
    assert one.left_out is None
    assert one.network == SMALL
    assert not one.build(None).training
    assert not marker.exists()


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (SMALL | {"channels": "$[4, 8]"}, "--trust_bundles true"),
        (SMALL | {"channels": "@nowhere"}, "does not hold"),
        (SMALL | {"act": {"_target_": "os.system", "command": "true"}}, "would have to be built"),
        ({"_target_": "os.system", "command": "true"}, "not one of monai.networks.nets or torch.nn"),
        ({"_target_": "monai.networks.utils.one_hot"}, "not one of"),
        ({"_target_": "$print"}, "would have to be evaluated"),
        (SMALL | {"channels": 3}, "cannot be built"),
        (SMALL | {"channels": [4, 16]}, "does not fit"),
        ({"unet": 1}, "defines a network"),
    ],
)
def test_a_bundle_that_cannot_be_used_is_left_out_with_the_reason(definition, reason, tmp_path, collection):
    bundle(tmp_path / "zoo" / "bad", {"network_def": definition}, weights=weights_of(SMALL))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection)
    assert reason in one.left_out


def test_damaged_bundles_are_left_out_with_the_reason(tmp_path, collection):
    bundle(tmp_path / "zoo" / "a", "{", weights=weights_of(SMALL))
    bundle(tmp_path / "zoo" / "b", {"network_def": SMALL})
    (bundle(tmp_path / "zoo" / "c", {"network_def": SMALL}) / "models" / "model.pt").write_bytes(b"no weights")
    reasons = [one.left_out for one in find([{"bundles": str(tmp_path / "zoo")}], collection)]
    for reason, part in zip(reasons, ["no JSON", "without weights", "cannot be read"], strict=True):
        assert part in reason


def test_expressions_are_evaluated_when_the_user_trusts_the_bundle(tmp_path, collection):
    bundle(tmp_path / "zoo" / "one", {"network_def": SMALL | {"channels": "$[4, 4 + 4]"}}, weights=weights_of(SMALL))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection, trust_bundles=True)
    assert one.left_out is None
    assert one.network["channels"] == [4, 8]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"in_channels": 4}, "takes 4 channels"), ({"spatial_dims": 3}, "is 3D"), ({}, None)],
)
def test_a_network_that_does_not_take_the_images_is_found_out(change, reason, tmp_path, collection):
    definition = SMALL | change
    bundle(tmp_path / "zoo" / "one", {"network_def": definition}, weights=weights_of(definition))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection)
    misfit = input_misfit(
        UNet(**{k: v for k, v in definition.items() if k != "_target_"}), one, in_channels=1, roi_size=[16, 16]
    )
    assert misfit is None if reason is None else reason in misfit


# Scores


@pytest.fixture
def seen() -> Observation:
    """Five patients; features and predictions that tell the classes apart a little."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 2, 200))
    features = torch.from_numpy(random.normal(size=(200, 6))) + labels[:, None]
    groups = torch.from_numpy(random.integers(0, 5, 200))
    truth = torch.from_numpy((random.random((10, 6, 6)) < 0.4).astype(int))
    logits = torch.from_numpy(random.normal(size=(10, 2, 6, 6))).float()
    logits[:, 1] += truth
    names = tuple("abcde")
    samples = Samples(features, labels, groups, names)
    maps = Maps(logits.softmax(1), truth, torch.arange(10) // 2, names)
    leep = float(compute_leep(maps.probs, truth))
    nce = float(compute_nce(maps.probs.argmax(1), truth))
    return Observation(samples, maps, leep, nce)


@pytest.mark.parametrize(
    ("metric", "compute"),
    [
        ("h_score", lambda x, y: compute_h_score(x, y, shrinkage="ledoit_wolf")),
        ("logme", compute_logme),
        ("gbc", compute_gbc),
        ("transrate", compute_transrate),
    ],
)
def test_the_score_of_a_resample_is_that_of_its_pixels(metric, compute, seen):
    for counts in ([1] * 5, [2, 0, 3, 0, 0]):
        expected = float(compute(*seen.samples.resampled(counts)))
        assert score_of_counts(metric, seen)(counts) == pytest.approx(expected, rel=1e-6)


def test_the_probe_is_scored_on_patients_it_has_not_seen(seen):
    features, labels, groups = (part.numpy() for part in seen.samples[:3])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    probs = cross_val_predict(model, features, labels, groups=groups, cv=LeaveOneGroupOut(), method="predict_proba")
    assert score("probe_auc", seen) == pytest.approx(roc_auc_score(labels, probs[:, 1]))
    counts = [2, 1, 0, 1, 1]
    rows = np.repeat(np.arange(200), np.array(counts)[groups])
    expected = roc_auc_score(labels[rows], probs[rows, 1])
    assert score_of_counts("probe_auc", seen)(counts) == pytest.approx(expected)


def test_scores_of_predictions_are_those_of_the_images(seen):
    counts = [0, 2, 1, 0, 1]
    rows = torch.tensor([2, 3, 2, 3, 4, 5, 8, 9])
    probs, labels = seen.maps.probs[rows], seen.maps.labels[rows]
    assert score_of_counts("leep", seen)(counts) == pytest.approx(float(compute_leep(probs, labels)))
    expected = compute_h_score_map(probs, labels).mean()
    assert score_of_counts("h_score_map", seen)(counts) == pytest.approx(float(expected))
    assert score("leep", seen) == pytest.approx(score_of_counts("leep", seen)([1] * 5))
    assert score("nce", seen) == pytest.approx(score_of_counts("nce", seen)([1] * 5))


def test_otce_needs_the_sources_own_pixels(seen):
    assert np.isnan(score("otce", seen))
    own = seen.maps.probs.movedim(1, -1).flatten(0, -2), seen.maps.labels.flatten()
    assert -np.log(2) <= score("otce", Observation(seen.samples, seen.maps, 0.0, 0.0, own)) <= 0


@pytest.mark.parametrize("metric", METRICS)
def test_every_known_metric_gives_a_number_or_nan(metric, seen):
    assert np.isfinite(score(metric, seen)) or metric == "otce"


def test_unknown_metrics_are_refused_with_the_known_ones():
    message = refused(lambda: require_choices("metric", ["h_score", "logm"], METRICS))
    assert "did you mean 'logme'" in message
    assert all(metric in message for metric in METRICS)
    assert "at least one" in refused(lambda: require_choices("metric", [], METRICS))


def test_predictions_do_not_depend_on_batches_or_their_order():
    probs, labels = torch.rand(5, 2, 3, 3), torch.randint(0, 2, (5, 1, 3, 3))
    images = [("b", 3), ("a", 1), ("a", 0), ("c", 0), ("b", 1)]
    whole, parts = Predictions(), Predictions()
    whole.update(probs, labels, images)
    for index in (4, 0, 3, 1, 2):
        parts.update(probs[[index]], labels[[index]], [images[index]])
    for one, other in zip(whole.compute()[:3], parts.compute()[:3], strict=True):
        assert torch.equal(one, other)
    assert whole.compute().groups.tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(whole.compute().probs[0], probs[2])


# Filters


def priors(**columns) -> pd.DataFrame:
    table = pd.DataFrame(columns, index=[f"s{n}" for n in range(len(columns["modality"]))])
    table["same_modality"] = [None if pd.isna(m) else m == "T2" for m in table["modality"]]
    return table


def test_the_filters_keep_the_modality_and_the_better_half():
    table = priors(modality=["T2", "FLAIR", "T2", "T2"], ssim=[0.9, 0.95, 0.5, 0.8])
    result = filter_by_priors(table)
    assert result["kept"].tolist() == [True, False, False, True]
    assert "modality FLAIR: dropped" in result.loc["s1", "reason"]
    assert "label SSIM 0.500: dropped (keeps the best 2 of 3)" in result.loc["s2", "reason"]
    assert filter_by_priors(table, top_k=1)["kept"].tolist() == [True, False, False, False]
    assert filter_by_priors(table, minimum_ssim=0.4)["kept"].tolist() == [True, False, True, True]


def test_what_is_not_known_is_kept_and_said():
    result = filter_by_priors(priors(modality=["T2", None, "T2"], ssim=[0.9, np.nan, 0.5]))
    assert result["kept"].tolist() == [True, True, False]
    assert result.loc["s1", "reason"] == "modality not known; label SSIM not known"


def test_a_filter_that_would_leave_nothing_falls_back_loudly():
    with pytest.warns(UserWarning, match="no source has the target's modality"):
        result = filter_by_priors(priors(modality=["FLAIR", "T1"], ssim=[0.9, 0.8]), top_k=2)
    assert result["kept"].all()
    assert "filter not applied" in result.loc["s0", "reason"]
    with pytest.warns(UserWarning, match="label SSIM of at least 0.99"):
        result = filter_by_priors(priors(modality=["T2", "T1"], ssim=[0.9, 0.8]), minimum_ssim=0.99)
    assert result["kept"].tolist() == [True, False]


# Ground truth


def sources_table(seed: int = 0, n: int = 8) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    same = np.arange(n) % 2 == 0
    return pd.DataFrame(
        {
            "modality": np.where(same, "T2", "FLAIR"),
            "same_modality": same,
            "same_objective": np.arange(n) < n // 2,
            "size": 10,
            "own_dice": random.random(n),
            "ssim": random.random(n),
            "roi_dice": random.random(n),
            "roi_shape": random.random(n),
            "h_score": random.random(n),
            "leep": -random.random(n),
        },
        index=pd.Index([f"s{number}" for number in range(n)], name="source"),
    )


def test_agreement_is_perfect_for_the_truth_and_chance_for_constants():
    ready = sources_table()
    truth = ready["h_score"].rename("dice")
    table = agreement_table(ready, truth).set_index(["ranker", "prior"])
    perfect = table.loc[("shrunk H-score", "none")]
    assert perfect["tau"] == pytest.approx(1)
    assert perfect["regret"] == 0
    assert perfect[[f"footrule_{k}" for k in (1, 2, 3, 4)]].tolist() == [0, 0, 0, 0]
    chance = table.loc[("random", "none")]
    assert chance["regret"] == pytest.approx(truth.max() - truth.mean())
    assert chance["footrule_1"] == pytest.approx(3.5)
    # With priors the rank of a choice is still among all sources.
    best = truth[ready["same_modality"]].idxmax()
    rank = stats.rankdata(-truth, method="min")[truth.index.get_loc(best)]
    assert table.loc[("shrunk H-score", "modality"), "footrule_1"] == rank - 1
    assert table.loc[("shrunk H-score", "modality"), "candidates"] == 4
    assert table.loc[("shrunk H-score", "modality + SSIM"), "candidates"] == 2
    assert np.isnan(table.loc[("shrunk H-score", "modality + SSIM"), "footrule_3"])


def test_constant_rankers_are_named_alike():
    found = rankers(sources_table(), static={"s0": 1.0})
    assert found["random"].nunique() == 1
    assert found["static"]["s0"] == 1


def test_a_study_says_what_was_planted(tmp_path, capsys):
    rows, verdicts = [], {}
    for number, target in enumerate(["A", "B", "C", "D"]):
        for seed in (0, 1):
            table = sources_table(seed=10 * number + seed)
            dice = 0.4 + 0.2 * table["h_score"] + 0.3 * table["same_modality"]
            rows.append(table.assign(dice=dice, target=target, seed=seed).reset_index())
            rows.append(pd.DataFrame([{"source": "scratch", "dice": 0.99, "target": target, "seed": seed}]))
            best = dice.idxmax()
            verdicts[target, seed] = {"recommendation": best, "tied": [best], "default": best}
    study_report(pd.concat(rows, ignore_index=True), verdicts, tmp_path, synthetic=True)
    page = (tmp_path / "study.md").read_text()
    assert "same modality is better on 4 of 4 targets" in page
    assert "on 4 of 4 targets (A 0.990" in page
    assert "8 name one source, 8 of them the best one" in page
    assert "Synthetic" in page
    assert {"study.csv", "agreement.csv", "critical_difference.png", "priors.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    table = pd.read_csv(tmp_path / "agreement.csv")
    tau = table[(table["ranker"] == "shrunk H-score") & (table["prior"] == "modality")]["tau"]
    assert tau.to_numpy() == pytest.approx(1)
