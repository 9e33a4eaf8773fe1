"""Candidates, scores, filters and the ground truth of source selection, without training anything."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import Begun, begin
from monai.networks.nets import BasicUNet, UNet
from monai.transforms import ResizeWithPadOrCrop
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_ext import InputError, bundle
from medtl_ext._validation import require_choices
from medtl_ext.data import load_collection, write_collection
from medtl_ext.metrics.features import Samples
from medtl_ext.metrics.gbc import compute_gbc
from medtl_ext.metrics.h_score import compute_h_score, compute_h_score_map
from medtl_ext.metrics.leep import compute_leep
from medtl_ext.metrics.logme import compute_logme
from medtl_ext.metrics.nce import compute_nce
from medtl_ext.metrics.transrate import compute_transrate
from medtl_ext.selection import (
    Maps,
    Observation,
    Predictions,
    filter_by_priors,
    find_candidates,
    pipeline,
    score_of_counts,
    study,
)
from medtl_ext.selection.candidates import built, input_misfit
from medtl_ext.selection.priors import prior_table, roi_similarity
from medtl_ext.selection.scores import METRICS, score
from medtl_ext.selection.study import study_report
from medtl_ext.selection.truth import agreement_table, rankers

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "source_selection"
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
        ([{"name": "scratch", "checkpoint": "x.pt"}], "named scratch, which means training without one"),
        ([{"name": "zero_shot", "checkpoint": "x.pt"}], "named zero_shot"),
        (["B-T2-ED", {"checkpoint": "full.pt"}], "named full"),
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


def bundle_in(folder: Path, config, *, weights=None) -> Path:
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
    bundle_in(tmp_path / "zoo" / "good", config, weights=weights_of(SMALL))
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
    bundle_in(tmp_path / "zoo" / "bad", {"network_def": definition}, weights=weights_of(SMALL))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection)
    assert reason in one.left_out


def test_damaged_bundles_are_left_out_with_the_reason(tmp_path, collection):
    bundle_in(tmp_path / "zoo" / "a", "{", weights=weights_of(SMALL))
    bundle_in(tmp_path / "zoo" / "b", {"network_def": SMALL})
    (bundle_in(tmp_path / "zoo" / "c", {"network_def": SMALL}) / "models" / "model.pt").write_bytes(b"no weights")
    reasons = [one.left_out for one in find([{"bundles": str(tmp_path / "zoo")}], collection)]
    for reason, part in zip(reasons, ["no JSON", "without weights", "cannot be read"], strict=True):
        assert part in reason


def test_expressions_are_evaluated_when_the_user_trusts_the_bundle(tmp_path, collection):
    bundle_in(tmp_path / "zoo" / "one", {"network_def": SMALL | {"channels": "$[4, 4 + 4]"}}, weights=weights_of(SMALL))
    (one,) = find([{"bundles": str(tmp_path / "zoo")}], collection, trust_bundles=True)
    assert one.left_out is None
    assert one.network["channels"] == [4, 8]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"in_channels": 4}, "takes 4 channels"), ({"spatial_dims": 3}, "is 3D"), ({}, None)],
)
def test_a_network_that_does_not_take_the_images_is_found_out(change, reason, tmp_path, collection):
    definition = SMALL | change
    bundle_in(tmp_path / "zoo" / "one", {"network_def": definition}, weights=weights_of(definition))
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
    images = [("b", 3, "p1"), ("a", 1, "p2"), ("a", 0, "p2"), ("c", 0, "p1"), ("b", 1, "p1")]
    whole, parts = Predictions(), Predictions()
    whole.update(probs, labels, images)
    for index in (4, 0, 3, 1, 2):
        parts.update(probs[[index]], labels[[index]], [images[index]])
    for one, other in zip(whole.compute()[:3], parts.compute()[:3], strict=True):
        assert torch.equal(one, other)
    assert whole.compute().groups.tolist() == [1, 1, 0, 0, 0]  # two scans of p1
    assert torch.equal(whole.compute().probs[0], probs[2])


# Priors

LEFT, RIGHT = slice(2, 8), slice(12, 18)


@pytest.fixture
def regions(tmp_path) -> str:
    """Institution A has T1 of patients with a region on the left, and T2 of others with one on the right."""

    def volume(name: str, side: slice) -> str:
        array = np.zeros((20, 20, 10), np.float32)
        array[side, side, 2:8] = 1
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
        return name

    subjects = []
    for site, modality, side in (("A", "T1", LEFT), ("A", "T2", RIGHT), ("B", "T1", LEFT)):
        for split in ("train", "val", "test"):
            name = f"{site}-{modality}-{split}"
            files = {"images": {modality: volume(f"{name}.nii", side)}, "labels": {"t": volume(f"{name}-l.nii", side)}}
            subjects.append({"id": name, "institution": site, "split": split, **files})
    objectives = {"ED": {"label": "t", "values": [1]}}
    content = {"name": "c", "labels": {"t": {"ED": 1}}, "objectives": objectives, "subjects": subjects}
    return str(write_collection(tmp_path / "collection.json", content))


def prior_columns(names: list[str], path: str) -> pd.DataFrame:
    target, candidates = "B-T1-ED", find_candidates(names, target="B-T1-ED", collection=path)
    options = {"source_collection": path, "subjects": 24, "spacing": [1.0, 1.0, 1.0], "roi_size": [20, 20]}
    return prior_table(candidates, target=load_collection(path), target_task=target, **options)


@pytest.mark.parametrize("names", [["A-T1-ED", "A-T2-ED"], ["A-T2-ED", "A-T1-ED"]], ids=str)
def test_every_source_has_the_regions_of_its_own_patients(names, regions):
    table = prior_columns(names, regions)
    assert table.loc["A-T1-ED", ["ssim", "roi_dice"]].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert table.loc["A-T2-ED", "roi_dice"] == 0
    assert table.loc["A-T2-ED", "ssim"] < 0.95


@pytest.mark.parametrize("depths", [(10, 20), (9, 10), (10, 11), (11, 16)], ids=str)
def test_the_same_regions_are_alike_in_any_number_of_slices(depths):
    fewer = torch.zeros(20, 20, depths[0], dtype=torch.bool)
    fewer[5:15, 5:15, 3:7] = True
    more = ResizeWithPadOrCrop([20, 20, depths[1]])(fewer[None])[0].bool()
    empty = torch.zeros(20, 20, 21, dtype=torch.bool)  # a patient with more slices moves the others alike
    for source, target in (([fewer], [more]), ([fewer], [fewer]), ([more], [fewer])):
        found = roi_similarity(source, target, spacing=[1, 1, 1])
        assert (found["ssim"], found["roi_dice"]) == pytest.approx((1, 1), abs=1e-3)
    # The mean map is 1/2 in the region, against 1: 2 * 1/2 / (1/4 + 1).
    assert roi_similarity([fewer, empty], [fewer], spacing=[1, 1, 1])["roi_dice"] == pytest.approx(0.8)


@pytest.mark.parametrize(("split", "expected"), [("val", 0.5), ("train", 0.9), (None, 0.5)])
def test_a_sources_own_dice_is_on_the_patients_it_was_validated_on(split, expected, tmp_path, regions):
    rows = [("val", "1a", "1", 0.3), ("val", "1b", "1", 0.5), ("val", "2", "2", 0.6), ("train", "3", "3", 0.9)]
    rows = pd.DataFrame([*rows, ("test", "4", "4", 0.1)], columns=["split", "subject", "patient", "dice"])
    rows = rows.assign(**{"method": "full", "seed": 0, "class": "ED", "iou": 0.5})
    rows.to_csv(tmp_path / "metrics.csv", index=False)  # two scans of one patient count as one
    if split is not None:
        (tmp_path / "config.json").write_text(json.dumps({"val_split": split}))
    (one,) = find_candidates(["A-T1-ED"], target="B-T1-ED", collection=regions)
    options = {"source_collection": regions, "subjects": 24, "spacing": [1.0, 1.0, 1.0], "roi_size": [20, 20]}
    one = replace(one, job=tmp_path)
    table = prior_table([one], target=load_collection(regions), target_task="B-T1-ED", **options)
    assert table.loc["A-T1-ED", "own_dice"] == pytest.approx(expected)


def test_nothing_is_settled_without_validation_patients(monkeypatch, tmp_path):
    config = {"target_task": "A-T2-ED", "val_split": "train", "bundle_root": str(tmp_path)}
    monkeypatch.setattr(pipeline, "current_config", lambda: config)
    monkeypatch.setattr(pipeline, "run_jobs", lambda *_, **__: pytest.fail("training started"))
    scores = pd.DataFrame({"task": ["B-T2-ED"], "checkpoint": ["x.pt"]}, index=["B-T2-ED"])
    options = {"output_dir": tmp_path, "seed": 0, "n_jobs": 1, "synthetic": True}
    message = refused(lambda: pipeline.settle_by_training(["B-T2-ED"], scores, **options))
    assert "--val_split train leaves none; give --settle false" in message
    assert "\n" not in message


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


def test_a_threshold_and_a_number_both_filter():
    table = priors(modality=["T2"] * 4, ssim=[0.9, 0.85, 0.8, 0.7])
    result = filter_by_priors(table, minimum_ssim=0.75, top_k=2)
    assert result["kept"].tolist() == [True, True, False, False]
    assert "dropped (keeps at least 0.75, of these the best 2 of 3)" in result.loc["s2", "reason"]
    assert filter_by_priors(table, minimum_ssim=0.87, top_k=2)["kept"].tolist() == [True, False, False, False]
    for wrong in (0, -1, 1.5, True):
        assert "at least 1" in refused(lambda wrong=wrong: filter_by_priors(table, top_k=wrong))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]], ids=str)
def test_equal_regions_are_kept_or_dropped_together(order):
    table = priors(modality=["T2"] * 4, ssim=[0.9, 0.9, 0.9, 0.8]).iloc[order]
    for top_k in (None, 1, 2):
        kept = filter_by_priors(table, top_k=top_k)["kept"]
        assert sorted(kept.index[kept]) == ["s0", "s1", "s2"]


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


def test_a_study_has_the_sources_it_began_with(monkeypatch, tmp_path):
    """Rankings that are done compare what was there: another source would be left out of them without a word."""
    monkeypatch.setattr(bundle, "current_config", lambda: {"bundle_root": str(BUNDLE)})
    monkeypatch.setattr(study, "open_collection", lambda *_, **__: None)
    monkeypatch.setattr(study, "run_jobs", begin)
    begun = {"output_dir": str(tmp_path), "targets": ["17-T2-ED", "17-T1-ED"], "sources": ["13-T2-ED"], "seeds": [0]}
    begun |= {"settings": {"source_dir": str(tmp_path / "pool")}}
    with pytest.raises(Begun):
        study.study_selection(**begun)
    (tmp_path / "runs").mkdir()
    for grown in ({"targets": ["17-T2-ED", "17-T1-ED", "17-T2-ET"]}, {"seeds": [0, 1]}):
        with pytest.raises(Begun):
            study.study_selection(**begun | grown)
    for sources in (["13-T2-ED", "14-T2-ED"], ["14-T2-ED"]):
        assert "holds a study with" in refused(
            lambda sources=sources: study.study_selection(**begun | {"sources": sources})
        )


def test_a_study_has_the_patients_it_began_with(monkeypatch, tmp_path, regions):
    """Runs that are done would be compared with others on new patients, perhaps on those the sources were tested on."""
    monkeypatch.setattr(bundle, "current_config", lambda: {"bundle_root": str(BUNDLE)})
    monkeypatch.setattr(study, "run_jobs", begin)

    def started(collection):
        asked = {"targets": ["B-T1-ED", "A-T2-ED"], "sources": ["A-T1-ED"], "seeds": [0]}
        asked |= {"settings": {"collection": collection}}
        study.study_selection(**asked, output_dir=str(tmp_path / "study"))

    with pytest.raises(Begun):
        started(regions)
    (tmp_path / "study" / "runs").mkdir()
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-moved")) / "collection.json"
    with pytest.raises(Begun):
        started(str(moved))
    content = json.loads(moved.read_text())
    content["subjects"][0]["split"], content["subjects"][2]["split"] = "test", "train"
    moved.write_text(json.dumps(content))
    assert "holds a study on another collection, with other patients, splits or files" in refused(
        lambda: started(str(moved))
    )


def test_a_seed_in_which_a_score_is_constant_counts_as_chance(tmp_path):
    """Not left out: the mean of a perfect ranking and of none is no perfect ranking."""
    rows = []
    for number, (target, seed) in enumerate(product(["A", "B"], [0, 1])):
        table = sources_table(seed=number)
        dice = table["h_score"]
        table = table.assign(dice=dice, target=target, seed=seed, h_score=dice if seed else 0.3)
        rows += [
            table.reset_index(),
            pd.DataFrame([{"source": "scratch", "dice": 0.5, "target": target, "seed": seed}]),
        ]
    verdicts = {("A", 0): {"recommendation": None, "tied": ["s0"], "default": None}}
    agreement = study_report(pd.concat(rows, ignore_index=True), verdicts, tmp_path)
    tau = agreement.set_index(["ranker", "prior", "target", "seed"])["tau"]["shrunk H-score", "none", "A"]
    assert np.isnan(tau[0])  # the table of single rankings says what was measured
    assert tau[1] == pytest.approx(1)
    page = (tmp_path / "study.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| shrunk H-score | none | 0.500 |")]


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.1, 0.1, 0.1, 0.0, 0.0, 0.0], "on 3 of 6 targets (sign test p 0.25 without the 3 alike, mean difference"),
        ([0.1, 0.1, 0.1, -0.1], "on 3 of 4 targets (sign test p 0.62, mean difference"),
        ([0.0, 0.0], "on 0 of 2 targets (no sign test, mean difference"),
    ],
)
def test_ties_have_no_part_in_the_sign_test(differences, said):
    rows = [
        {
            "target": f"t{number}",
            "source": source,
            "same_modality": modality,
            "same_objective": not modality,
            "dice": dice,
        }
        for number, difference in enumerate(differences)
        for source, modality, dice in (("m", True, 0.5 + difference), ("o", False, 0.5))
    ]
    assert said in study._modality_claim(pd.DataFrame(rows))


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
