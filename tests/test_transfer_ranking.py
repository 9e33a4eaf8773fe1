"""The ranking of sources and its text, the truth, and the text of a study, on invented scores without training."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import SOURCE_SELECTION, refused, toy_collection
from monai.data import DataLoader, Dataset
from scipy import stats
from sklearn.metrics import roc_auc_score

from medtl_ext import source_selection
from medtl_ext.data.classification import ClassificationDataset
from medtl_ext.data.plan import Grid
from medtl_ext.dataset_transferability import RankDatasets, RankOwnModel
from medtl_ext.metrics.features import Samples
from medtl_ext.ranking import CEILING
from medtl_ext.source_selection import SelectionStudy
from medtl_ext.transfer import Card, ClassificationTask, Job, ScoreImages, SegmentationTask, Source, jobs, rank
from medtl_ext.transfer.scores import Observation
from medtl_ext.transfer.tasks import auc_interval, image_auc
from medtl_ext.transfer.truth import agreement_table, rankers, settings_of_grid

# A ranking


def ranking(scores: dict[str, float], folder: Path, *, decide_by="logme", subjects=True, own=(), **options):
    """Sources whose features separate two classes; the higher their number, the better."""
    generator, labels = np.random.default_rng(0), np.arange(40) % 2
    names, images = tuple(f"p{place // 2}" for place in range(40)), np.zeros((40, 4, 4), np.uint8)
    parts = images, labels, np.repeat(["train", "val"], 20), ("a", "b"), names if subjects else None
    target = SimpleNamespace(name="t", dataset=ClassificationDataset("t", *parts), synthetic=False, per_pixel=False)
    for attribute in ("own_task", "own_size", "own_outcome", "outcome", "unit"):
        setattr(target, attribute, getattr(ClassificationTask, attribute))
    config = {"target_task": "t.npz", "network_def": {}} | dict.fromkeys(RankDatasets.carried)
    (folder / "train.json").write_text(json.dumps(config))
    where = {"folder": folder, "configs": folder, "config": config}
    here = SimpleNamespace(**where, seed=0, figures=True, progress=False, leads=True)
    here.job = lambda folder, *names, **overrides: Job(config, folder, [], overrides)
    settings = {"n_resamples": 60, "minimum_win": 0.95, "minimum_gap": 0.15, "source_dir": "", "pool_seed": 0}
    settings |= {"metrics": ["lp_fu", "lp", "fu", "logme", "ncti"], "image_shape": [1, 32, 32], "evaluator": None}
    found = RankDatasets(here=here, target=target, decide_by=decide_by, **settings | options)
    found.pool = {
        name: Source(name, "checkpoint", Card(checkpoint=f"{name}.pt"), entry=f"{name}.pt", own=name in own)
        for name in scores
    }
    found.seen, groups = {}, torch.arange(20) // 2
    for name, shift in scores.items():
        features = torch.from_numpy(generator.normal(size=(20, 3)) + shift * labels[:20, None])
        samples = Samples(features, torch.from_numpy(labels[:20]), groups, names[:20:2])
        found.seen[name] = Observation(samples, Samples(torch.full((20, 2), 0.5), *samples[1:]), float(shift))
    return found


def content(folder: Path) -> dict:
    return json.loads((folder / "ranking.json").read_text())


def test_a_clear_winner_is_recommended(tmp_path):
    ranking({"good": 6, "poor": 0, "own": 9}, tmp_path, own=["own"]).run()
    found = content(tmp_path)
    assert found["recommendation"] == "good"
    assert found["answer"].startswith("Transfer from good")
    assert "own is the target's own model: scored, not ranked." in found["answer"]
    table = pd.read_csv(tmp_path / "ranking.csv").set_index("source")
    assert table["status"].to_dict() == {"good": "ranked", "poor": "ranked", "own": "own model", "scratch": "no score"}
    assert np.isnan(table.loc["own", "rank"])
    assert np.isfinite(table.loc["own", ["lp", "fu", "logme"]].to_numpy(float)).all()
    assert table.loc["own", ["lp_fu", "ncti"]].isna().all()  # it has no part in what is scaled over the pool
    assert table.loc[["good", "poor"], "lp_fu"].tolist() == [1, 0]
    assert "--source good.pt" in found["command"]
    assert (tmp_path / "answer.txt").read_text() == f"{found['answer']}\n\nTo use good:\n{found['command']}\n"
    assert (tmp_path / "ranking.png").stat().st_size > 1000


def test_a_score_that_cannot_be_resampled_gives_an_order_and_no_verdict(tmp_path):
    ranking({"good": 6, "poor": 0}, tmp_path, decide_by="lp_fu").run()
    found = content(tmp_path)
    assert (found["recommendation"], found["default"], found["patients"]) == (None, "good", 0)
    assert found["answer"].startswith("No evidence to prefer: LP x FU has no interval over patients")
    assert "good 1.000 and poor 0.000" in found["answer"]
    ranking({"good": 6, "poor": 0}, tmp_path, decide_by="lp_fu", cross_domain=True).run()
    assert "good 0.000" in content(tmp_path)["answer"]  # the least FU is first then


def test_equal_scores_rank_nothing(tmp_path, capsys):
    ranking({"one": 0, "two": 0}, tmp_path, decide_by="fu").run()
    found = content(tmp_path)
    assert "All sources have the same FU: it ranks nothing here." in found["answer"]
    assert "There is no best guess: one and two have the same score." in found["answer"]
    assert (found["recommendation"], found["default"], found["command"]) == (None, None, None)
    assert "To use" not in capsys.readouterr().out
    ranking({"one": 5, "two": 5, "poor": 0}, tmp_path).run()
    assert "LP x FU would pick one and two (all alike)." in content(tmp_path)["answer"]


def test_what_nobody_knows_is_said_and_picks_nothing(tmp_path):
    ranking({"one": 0, "two": 1}, tmp_path, subjects=False).run()
    found = content(tmp_path)
    assert "every image counts as a patient of its own" in found["answer"]
    assert found["patients_known"] is False
    assert "source size would pick" not in found["answer"]


def test_a_model_that_need_not_change_is_last_by_lp_fu_and_first_by_lp(tmp_path):
    found = ranking({"a": 1, "b": 2, "own": 9}, tmp_path, own=["own"], metrics=["lp", "lp_fu"])
    for name, fu in {"a": 1.2, "b": 0.9, "own": 0.1}.items():
        found.seen[name] = replace(found.seen[name], fu=fu)
    ranks = RankOwnModel(ranking=found).run().set_index("score")["rank"]
    assert ranks["LP"] == 1
    assert ranks["LP x FU"] >= 2
    assert pd.read_csv(tmp_path / "own_model.csv")["candidates"].tolist() == [3, 3]
    assert RankOwnModel(ranking=ranking({"a": 1, "b": 2}, tmp_path)).run() is None


# The truth


def predictions(n=60, n_classes=3):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, n_classes, n)
    probs = generator.dirichlet(np.ones(n_classes), n) + 0.5 * np.eye(n_classes)[labels]
    table = pd.DataFrame(probs / probs.sum(1, keepdims=True), columns=[f"p{label}" for label in range(n_classes)])
    return table.assign(label=labels, subject=[f"s{place // 4}" for place in range(n)])


def test_the_auc_is_scikit_learns_and_its_interval_holds_it():
    table = predictions()
    columns = ["p0", "p1", "p2"]
    assert image_auc(table) == pytest.approx(roc_auc_score(table["label"], table[columns], multi_class="ovr"))
    low, high = auc_interval(table)
    assert 0 < low < image_auc(table) < high <= 1
    narrow = auc_interval(table.assign(subject=np.arange(60)))
    assert narrow[1] - narrow[0] < 1.5 * (high - low)
    binary = predictions(n_classes=2)
    assert image_auc(binary) == pytest.approx(roc_auc_score(binary["label"], binary["p1"]))
    assert np.isnan(image_auc(table[table["label"] == 0]))


@pytest.mark.parametrize("margin", [4, 12, 14])
def test_the_truth_is_the_auc_of_probabilities_that_were_not_rounded(margin, tmp_path, monkeypatch):
    """With six digits, the probabilities of a confident network would be equal, and its AUC would change."""
    labels = torch.arange(30) % 3
    noise = torch.rand(30, 3, generator=torch.Generator().manual_seed(1))
    probs = (torch.nn.functional.one_hot(labels, 3) * margin + noise).softmax(1)
    evaluator = SimpleNamespace(network=torch.nn.Linear(1, 1), state=SimpleNamespace(), run=lambda: None)
    evaluator.state.metric_details = {"auc": (probs, torch.nn.functional.one_hot(labels, 3))}
    torch.save(evaluator.network.state_dict(), tmp_path / "model.pt")
    loader = DataLoader(Dataset([{"subject": f"s{place}", "name": f"{place}.png"} for place in range(30)]))
    loaders = {"splits": ["val", "test"], "loaders": [loader, loader]}
    ScoreImages(evaluator=evaluator, output_dir=str(tmp_path), method="m", seed=0, **loaders).run()
    found = ClassificationTask.measure(Job({}, tmp_path), "test")
    expected = roc_auc_score(labels, probs.double(), multi_class="ovr")
    assert found["auc"] == pytest.approx(expected, abs=1e-6)
    assert found["auc_low"] <= found["auc"] <= found["auc_high"]
    assert (found["test_images"], found["val_auc"]) == (30, found["auc"])
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert list(metrics) == ["method", "seed", "split", "images", "auc", "accuracy"]
    assert metrics["accuracy"].tolist() == [1, 1]


@pytest.mark.parametrize(("split", "expected"), [("val", 0.5), ("train", 0.9), (None, 0.5)])
def test_a_sources_own_dice_is_on_the_patients_it_was_validated_on(split, expected, tmp_path):
    rows = [("val", "1a", "1", 0.3), ("val", "1b", "1", 0.5), ("val", "2", "2", 0.6), ("train", "3", "3", 0.9)]
    rows = pd.DataFrame([*rows, ("test", "4", "4", 0.1)], columns=["split", "subject", "patient", "dice"])
    rows = rows.assign(**{"method": "full", "seed": 0, "class": "ED", "iou": 0.5})
    rows.to_csv(tmp_path / "metrics.csv", index=False)  # two scans of one patient count as one
    if split is not None:
        (tmp_path / "config.json").write_text(json.dumps({"val_split": split}))
    assert SegmentationTask.own(Job({}, tmp_path)) == pytest.approx(expected)
    found = SegmentationTask.measure(Job({}, tmp_path), "val")
    assert (found["dice"], found["patients"]) == (pytest.approx(0.5), 2)


def test_a_grid_that_makes_no_sense_is_refused():
    for grid in ({"learning_rate": [0.1]}, {"learning_rate": 0.1, "momentum": [0], "weight_decay": [0]}):
        assert "expected a list of values" in refused(lambda grid=grid: settings_of_grid(grid))


# What rankings were worth


def sources_table(seed: int = 0, n: int = 8) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    same = np.arange(n) % 2 == 0
    columns = {name: random.random(n) for name in ("own_dice", "ssim", "roi_dice", "roi_shape", "h_score")}
    table = pd.DataFrame(columns, index=pd.Index([f"s{number}" for number in range(n)], name="source"))
    table = table.assign(modality=np.where(same, "T2", "FLAIR"), same_modality=same, size=10, leep=-random.random(n))
    return table.assign(same_objective=np.arange(n) < n // 2, same_institution=np.arange(n) % 3 == 0)


def test_agreement_is_perfect_for_the_truth_and_chance_for_constants():
    ready = sources_table()
    truth = ready["h_score"].rename("dice")
    groups = source_selection.groups_by_priors(ready, minimum_ssim=None, top_k=None)
    table = agreement_table(ready, truth, target=SegmentationTask, groups=groups).set_index(["ranker", "prior"])
    perfect = table.loc[("shrunk H-score", "none")]
    assert (perfect["tau"], perfect["regret"]) == (pytest.approx(1), 0)
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


def test_rankers_that_ignore_the_target_are_there():
    found = rankers(sources_table(), SegmentationTask, static={"s0": 1.0})
    assert {"tags (modality, objective)", "RoI SSIM", "source size", "source's own Dice", "LEEP"} <= set(found)
    assert found["random"].nunique() == 1
    assert found["static"]["s0"] == 1


def study_of(targets: list, seeds: list, folder: Path, monkeypatch) -> SelectionStudy:
    """A study in a folder, as if its trainings had ended."""
    monkeypatch.setattr(jobs, "current_config", lambda: {"bundle_root": str(SOURCE_SELECTION.root)})
    (folder / "settings.json").write_text('{"settings": {}}')
    return SelectionStudy(here=jobs.Run(folder), targets=targets, sources=["a", "b", "c"], seeds=seeds)


def test_the_noise_ceiling_stands_beside_the_rankers_and_competes_with_none(tmp_path, monkeypatch):
    names, rows, arms = ["a", "b", "c", "scratch"], [], []
    for target, seed in product(["A-T1-ED", "A-T2-ED"], [0, 1]):
        folder = tmp_path / target / str(seed)
        folder.mkdir(parents=True)
        (folder / "ranking.json").write_text('{"recommendation": null, "tied": ["a"], "default": "a"}')
        arms.append(({"target": target, "seed": seed}, SimpleNamespace(last=SimpleNamespace(output_dir=folder))))
        for place, name in enumerate(names):
            row = {"target": target, "seed": seed, "source": name, "dice": 0.005 * (place == 3) or 0.5 + 0.1 * place}
            rows.append(row | {"h_score": -place, "logme": place, "same_modality": True, "same_objective": True})
    study = study_of(["A-T1-ED", "A-T2-ED"], [0, 1], tmp_path, monkeypatch)
    for name in ("claims", "figures"):  # of shapes, which these sources have none of
        monkeypatch.setattr(study, name, lambda *_: [])
    monkeypatch.setattr(study, "groups", lambda ready: {"none": ready.index})
    study.report(pd.DataFrame(rows), arms)
    page = (tmp_path / "study.md").read_text()
    assert "mean weighted tau of 1.00; ICC 1.00." in page
    assert "4 of 16 trainings found nothing" in page
    table = pd.read_csv(tmp_path / "agreement.csv")
    assert CEILING in set(table["ranker"])
    (compared,) = re.findall(r"the (\d+) methods differ", page)
    assert int(compared) == table["ranker"].nunique() - 1


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Starts a study of source selection, until its first training, on a collection whose files are never opened."""
    collection = toy_collection(tmp_path / "c")

    def start(**changed) -> None:
        asked = {"targets": ["A-T1-ED", "A-T2-ED"], "sources": ["B-T1-ED"], "seeds": [0], "settings": {}} | changed
        settings = {"collection": str(collection)} | asked.pop("settings")
        config = {"bundle_root": str(SOURCE_SELECTION.root), "settings": settings}
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "run_jobs", Mock(side_effect=InterruptedError))
            patch.setattr(SelectionStudy, "_plan", Mock())
            for module in ("jobs", "config"):
                patch.setattr(f"medtl_ext.transfer.{module}.current_config", lambda: config)
            study = SelectionStudy(here=jobs.Run(tmp_path / "study"), **asked)
            with pytest.raises(InterruptedError):
                study.run()
        (tmp_path / "study" / "runs").mkdir(exist_ok=True)

    start.collection = collection
    return start


def test_a_study_grows_by_targets_and_seeds_but_not_by_sources(started):
    """Finished rankings do not contain a source that is added later; so this must be refused."""
    started()
    started(targets=["A-T1-ED", "A-T2-ED", "B-T2-ED"])
    started(seeds=[0, 1])
    for sources in (["B-T1-ED", "B-T2-ED"], ["B-T2-ED"]):
        assert "holds a study with sources=" in refused(lambda sources=sources: started(sources=sources))
    assert "holds a study with epochs=" in refused(lambda: started(settings={"epochs": 3}))


def test_a_study_has_the_patients_it_began_with(started, tmp_path):
    """Finished runs would be compared with runs on other patients, maybe on test patients of the sources."""
    started()
    moved = tmp_path / "moved.json"
    moved.write_bytes(started.collection.read_bytes())
    settings = {"collection": str(moved)}
    started(settings=settings)
    other = json.loads(moved.read_text())
    other["subjects"][0]["split"], other["subjects"][2]["split"] = "test", "train"
    moved.write_text(json.dumps(other))
    message = refused(lambda: started(settings=settings))
    assert "holds a study on another collection, with other patients, splits or files" in message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": ["A-T1-ED"]}, "needs two targets or more"),
        ({"targets": "A-T1-ED"}, "give a list with at least one"),
        ({"targets": ["A-T1-ED", "A-T1-ED"]}, "targets names A-T1-ED twice"),
        ({"seeds": []}, "seeds is []"),
        ({"settings": {"epoch": 1}}, "did you mean epochs?"),
    ],
    ids=str,
)
def test_a_study_says_what_is_wrong_with_it(started, wrong, message):
    assert message in refused(lambda: started(**wrong))


def reported(tables: dict, verdicts: dict, folder: Path, monkeypatch, *, synthetic=False) -> pd.DataFrame:
    """What a study writes for invented outcomes: (target, seed) -> sources with their Dice."""
    study = study_of(*(sorted(set(part)) for part in zip(*tables, strict=True)), folder, monkeypatch)
    study.synthetic = synthetic
    rows = [table.reset_index().assign(target=target, seed=seed) for (target, seed), table in tables.items()]
    done = {}
    for key, verdict in verdicts.items():
        done[key] = Job({}, folder / f"{key[0]}{key[1]}")
        done[key].output_dir.mkdir()
        (done[key].output_dir / "ranking.json").write_text(json.dumps(verdict))
    arms = [({"target": target, "seed": seed}, jobs.Arm("scored", (job,))) for (target, seed), job in done.items()]
    study.report(pd.concat(rows, ignore_index=True), arms)
    return pd.read_csv(folder / "agreement.csv")


def with_scratch(table: pd.DataFrame, dice: float) -> pd.DataFrame:
    return pd.concat([table, pd.DataFrame({"dice": [dice]}, index=pd.Index(["scratch"], name="source"))])


def test_a_seed_in_which_a_score_is_constant_counts_as_chance(tmp_path, monkeypatch):
    """The seed is not left out; otherwise the mean would be that of the one perfect ranking."""
    tables = {}
    for number, (target, seed) in enumerate(product("AB", [0, 1])):
        table = sources_table(seed=number)
        dice = table["h_score"]
        tables[target, seed] = with_scratch(table.assign(dice=dice, h_score=dice if seed else 0.3), 0.5)
    verdicts = {("A", 0): {"recommendation": None, "tied": ["s0"], "default": None}}
    agreement = reported(tables, verdicts, tmp_path, monkeypatch)
    tau = agreement.set_index(["ranker", "prior", "target", "seed"])["tau"]["shrunk H-score", "none", "A"]
    assert np.isnan(tau[0])  # the table of single rankings says what was measured
    assert tau[1] == pytest.approx(1)
    page = (tmp_path / "study.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| shrunk H-score | none | 0.500 |")]


def test_a_study_says_what_was_planted(tmp_path, monkeypatch, capsys):
    tables, verdicts = {}, {}
    for number, (target, seed) in enumerate(product("ABCD", [0, 1])):
        table = sources_table(seed=10 * number)
        dice = 0.4 + 0.2 * table["h_score"] + 0.3 * table["same_modality"]
        tables[target, seed] = with_scratch(table.assign(dice=dice), 0.99)
        verdicts[target, seed] = {"recommendation": dice.idxmax(), "tied": [dice.idxmax()], "default": dice.idxmax()}
    agreement = reported(tables, verdicts, tmp_path, monkeypatch, synthetic=True)
    page = (tmp_path / "study.md").read_text()
    assert "same modality is better on 4 of 4 targets (sign test p 0.12, mean difference" in page
    assert "on 4 of 4 targets (A 0.990" in page
    assert "8 name one source, 8 of them the best one" in page
    assert "Synthetic" in page
    assert "same modality is better on 4 of 4 targets" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"study.csv", "agreement.csv", "critical_difference.png", "priors.png"} <= names
    tau = agreement[(agreement["ranker"] == "shrunk H-score") & (agreement["prior"] == "modality")]["tau"]
    assert tau.to_numpy() == pytest.approx(1)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.1, 0.1, 0.1, 0.0, 0.0, 0.0], "on 3 of 6 targets (sign test p 0.25 without the 3 alike, mean difference"),
        ([0.1, 0.1, 0.1, -0.1], "on 3 of 4 targets (sign test p 0.62, mean difference"),
        ([0.0, 0.0], "on 0 of 2 targets (no sign test, mean difference"),
    ],
)
def test_ties_have_no_part_in_the_sign_test(differences, said, tmp_path, monkeypatch):
    tables = {}
    for number, difference in enumerate(differences):
        table = sources_table(n=4).assign(dice=0.5, same_modality=[True, True, False, False])
        table = table.assign(same_objective=[False, False, True, True])
        table.loc[table["same_modality"], "dice"] += difference
        tables[f"t{number}", 0] = with_scratch(table, 0.1)
    verdicts = {("t0", 0): {"recommendation": None, "tied": ["s0"], "default": None}}
    reported(tables, verdicts, tmp_path, monkeypatch)
    assert said in (tmp_path / "study.md").read_text()


def test_a_source_of_another_grid_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rank, "observe", Mock())
    grid = Grid((1, 1, 1), (32, 32))
    grid.write(tmp_path / "grid.json")
    source = Source("a", "checkpoint", Card(checkpoint=str(tmp_path / "model.pt")))
    for options in (grid.options, grid.options | {"spacing": [2, 2, 4]}):
        assert "another grid" not in caplog.text
        ranking = SimpleNamespace(here=SimpleNamespace(config=options), evaluator=SimpleNamespace(data_loader=None))
        rank.RankSources.observed(ranking, source, None, False)
    assert "source a is scored on another grid than it was trained on" in caplog.text
    assert "give it by --spacing [1, 1, 1]" in caplog.text
