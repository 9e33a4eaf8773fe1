"""Volumes for the viewer of a report: what is kept of them, and how small they are."""

import base64
import gzip
import json
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import RISK_MAP, SEQUENTIAL, SETTLED

from medtl_ext.transfer.viewer import packed

GRID = (60, 50, 40)


def unpacked(view: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The image's channels, and the layers by name."""
    raw = np.frombuffer(gzip.decompress(base64.b64decode(view["data"])), np.uint8)
    volumes = [one.reshape(view["shape"], order="F") for one in np.split(raw, view["channels"] + len(view["layers"]))]
    layers = zip(view["layers"], volumes[view["channels"] :], strict=True)
    return np.stack(volumes[: view["channels"]]), {layer["name"]: volume for layer, volume in layers}


@pytest.fixture
def volume():
    image = np.random.default_rng(0).normal(size=(1, *GRID))
    truth = np.zeros(GRID, int)
    truth[20:30, 20:60, 2:6] = 2
    return image, {"truth": truth, "full": np.roll(truth, 25, axis=0)}


def test_what_is_kept_is_the_region_of_the_truth_and_what_is_not_is_told(volume):
    image, labels = volume
    view = packed(image, labels, spacing=[1, 1, 3])
    assert view["shape"] == [26, 38, 14]  # a margin of 8, or less where the image ends
    shown, layers = unpacked(view)
    box = np.s_[12:38, 12:50, :14]
    np.testing.assert_array_equal(layers["truth"], labels["truth"][box])
    assert np.corrcoef(shown[0].ravel(), image[0][box].ravel())[0, 1] > 0.99
    outside = 1 - labels["full"][box].astype(bool).sum() / labels["full"].astype(bool).sum()
    assert [layer["outside"] for layer in view["layers"]] == pytest.approx([0, outside])
    assert outside > 0.1


@pytest.mark.parametrize("most", [60_000, 5_000])
def test_volumes_get_coarser_until_they_fit(most, volume):
    image, labels = volume
    view = packed(image, labels | {"truth": np.ones(GRID, int)}, spacing=[1, 1, 3], most=most)
    assert most / 4 < len(view["data"]) <= most
    assert view["step"][2] < view["step"][0]  # the thick slices last
    assert view["spacing"] == [step * size for step, size in zip(view["step"], [1, 1, 3], strict=True)]
    assert view["shape"] == [size // step for size, step in zip(GRID, view["step"], strict=True)]
    assert unpacked(view)[1]["full"].max() == 2


def test_a_map_tells_its_range_and_where_it_is_not(volume):
    values = np.linspace(-2, 0, np.prod(GRID)).reshape(GRID)
    values[0, 0, 0] = np.nan
    view = packed(volume[0], {}, maps={"LEEP": values}, spacing=[1, 1, 1], most=10**6)
    shown = unpacked(view)[1]["LEEP"]
    assert (shown[0, 0, 0], shown[0, 0, 1], shown[-1, -1, -1]) == (0, 1, 255)
    assert (view["layers"][0]["low"], view["layers"][0]["high"]) == pytest.approx((-2, 0), abs=1e-4)


@pytest.mark.parametrize(
    ("bundle", "folder", "without"),
    [
        (SEQUENTIAL, "arms", {"scratch", "single", "sequential_full"}),
        (SETTLED, "settle", {"14-FLAIR-ED", "scratch"}),
    ],
    ids=["sequential_transfer", "source_selection"],
)
def test_arms_of_other_bundles_are_shown_too(bundle, folder, without, whole_run):
    run = whole_run(bundle)
    content = json.loads((run / "viewer.json").read_text())
    arms = {path.parent.name for path in (run / folder).glob("*/model.pt")}
    assert arms >= without
    assert content["left_out"] == []
    assert (run / "overlay.png").is_file()
    for view in content["views"]:
        shown = {layer["name"]: layer["dice"] for layer in view["layers"] if "dice" in layer}
        assert set(shown) == arms
        for arm, dice in shown.items():
            scores = pd.read_csv(run / folder / arm / "metrics.csv", dtype={"subject": str}).query("split == 'test'")
            assert dice == pytest.approx(scores.set_index("subject").loc[view["name"], "dice"], abs=1e-4)


def test_an_arm_that_was_scored_otherwise_is_named_and_not_shown(whole_run, places, tmp_path):
    """Its picture would not be what its Dice is of; nor is one of another network shown."""
    whole = whole_run(SETTLED)
    shutil.copytree(whole, run := tmp_path / "run")
    scores = pd.read_csv(run / "settle" / "scratch" / "metrics.csv")
    scores.assign(dice=(scores["dice"] + 0.3) % 1).to_csv(run / "settle" / "scratch" / "metrics.csv", index=False)
    torch.save({"other": torch.zeros(3)}, run / "settle" / "14-FLAIR-ED" / "model.pt")
    workflow = SETTLED.workflow(**places | SETTLED.whole | {"output_dir": str(run)})
    workflow.parser.get_parsed_content("pictures").run()
    assert json.loads((run / "viewer.json").read_text())["left_out"] == ["14-FLAIR-ED", "scratch"]


def test_what_a_run_shows_is_what_it_scored(whole_run):
    """Worst, median and best by the arm that is advised; the Dice of what is shown is that of the tables."""
    folder = whole_run(RISK_MAP)
    *patients, trained_on = json.loads((folder / "viewer.json").read_text())["views"]
    assert [layer["kind"] for layer in trained_on["layers"]] == ["map", "map"]
    advised = json.loads((folder / "audit.json").read_text())["default"] or "risk_map"
    places = {arm: folder / "audit" / arm for arm in RISK_MAP.whole["audit#arms"]} | {"risk_map": folder}
    tables = {arm: pd.read_csv(place / "metrics.csv", dtype={"subject": str}) for arm, place in places.items()}
    scored = {arm: of[of["split"] == "test"].set_index("subject")["dice"] for arm, of in tables.items()}
    ranked = scored[advised].sort_values().to_numpy()
    shown = [scored[advised][view["name"]] for view in patients]
    assert shown == [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    assert patients[0]["rank"] == f"worst of {len(ranked)}"
    assert f"by the Dice of {advised}." in (folder / "report.html").read_text()
    for view in patients:
        _, layers = unpacked(view)
        assert set(layers) == {"truth", *places, "LEEP of zero_shot"}
        assert view["step"] == [1, 1, 1]
        leep = view["layers"].pop()
        assert (leep["kind"], leep["low"] < leep["high"] <= 0) == ("map", True)
        foreground = layers["truth"] > 0
        assert layers[leep["name"]][foreground].mean() < layers[leep["name"]][~foreground].mean()  # where it is hard
        for layer in view["layers"][1:]:
            truth, segmented = layers["truth"] > 0, layers[layer["name"]] > 0
            whole = segmented.sum() / max(1 - layer["outside"], 1e-9)
            dice = 2 * (truth & segmented).sum() / (truth.sum() + whole)
            assert dice == pytest.approx(layer["dice"], abs=1e-3)
            assert layer["dice"] == pytest.approx(scored[layer["name"]][view["name"]], abs=1e-4)
