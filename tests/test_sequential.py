"""The parts of sequential_transfer: affinities of tasks, plans, draws, arms, and what a study says of its numbers."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise, product
from pathlib import Path

import matplotlib.colors
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medtl_ext import InputError
from medtl_ext.affinity import pairwise_context, pairwise_ssim, pairwise_wasserstein, task_affinity, task_context
from medtl_ext.data import generate_phantom, load_collection
from medtl_ext.graph import TransferPath, task_graph
from medtl_ext.ranking import paired_comparison
from medtl_ext.sequential import (
    Arm,
    ContextAffinity,
    Plan,
    SeqTranAffinity,
    SourceGraph,
    TaskVolumes,
    affinity_costs,
    affinity_name,
    arms_of,
    draw_patients,
    find_affinity,
    fit_weights,
    plan_path,
    plan_text,
    plot_task_graph,
    second_step_text,
    source_graph,
    study_paths,
    task_volumes,
    write_plan,
)
from medtl_ext.sequential.chain import Chains
from medtl_ext.sequential.fit import fit_text, fit_to_transfers
from medtl_ext.sequential.plan import require_patients
from medtl_ext.sequential.study import differences, gains, study_text

TASKS = ["14-T2-ED", "14-T2-ET", "14-FLAIR-ED", "14-FLAIR-ET"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return generate_phantom(
        tmp_path_factory.mktemp("phantom") / "collection",
        institutions=["14", "17"],
        subjects=6,
        modalities=["T2", "FLAIR"],
        n_jobs=1,
        progress=False,
    )


@pytest.fixture(scope="module")
def volumes(path) -> dict[str, TaskVolumes]:
    collection = load_collection(path)
    return {task: task_volumes(collection, task, patients=2) for task in [*TASKS, "17-T2-ED"]}


def arrays(task: TaskVolumes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images and labels by nibabel alone; the phantom lies RAS already."""
    images = [nib.load(image).get_fdata(dtype=np.float32) for image, _ in task.items]
    values = [value for group in task.label_values for value in group]
    return images, [np.isin(np.asarray(nib.load(label).dataobj), values) for _, label in task.items]


class TestAffinities:
    def test_seqtran_is_the_mean_over_pairs_of_patients(self, volumes):
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        (images_a, labels_a), (images_b, labels_b) = arrays(a), arrays(b)
        distance = pairwise_wasserstein(images_a, images_b, standardize=False).mean()
        expected = float(task_affinity(distance, pairwise_ssim(labels_a, labels_b).mean()))
        affinity = SeqTranAffinity()
        affinity(a, a)  # what is kept of one pair is not that of another
        assert affinity(a, b) == pytest.approx(expected, rel=1e-6)
        assert SeqTranAffinity()(b, a) == pytest.approx(expected, rel=1e-6)

    def test_context_is_that_of_the_volumes(self, volumes):
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        assert np.allclose(a.spacing(), np.abs(nib.load(a.items[0][0]).header.get_zooms()))
        contexts = [[task_context(*arrays(task), spacing=task.spacing())] for task in (a, b)]
        expected = float(pairwise_context(*contexts))
        assert ContextAffinity()(a, b) == pytest.approx(expected, rel=1e-5)

    def test_what_is_shared_is_read_once(self, volumes, monkeypatch):
        read = []
        load = TaskVolumes._load
        monkeypatch.setattr(
            TaskVolumes, "_load", lambda self, files: read.append(tuple(files.items())) or load(self, files)
        )
        affinity_costs(SeqTranAffinity(), [volumes[task] for task in TASKS], progress=False)
        # Two patients: an image for each of two modalities, a label file for each of two objectives.
        assert len(read) == 8

    def test_costs_are_symmetric_with_an_empty_diagonal(self, volumes):
        costs = affinity_costs(lambda a, b: len(a.name) + len(b.name), list(volumes.values()), progress=False)
        assert np.array_equal(costs, costs.T)
        assert np.diag(costs).tolist() == [0] * 5

    @pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
    def test_a_cost_is_finite_and_not_negative(self, volumes, cost):
        with pytest.raises(InputError, match="the affinity of 14-T2-ED and 14-T2-ET is"):
            affinity_costs(lambda a, b: cost, [volumes[task] for task in TASKS], progress=False)

    def test_any_function_will_do(self):
        assert find_affinity("operator.sub")(5, 3) == 2
        assert find_affinity(max) is max
        assert isinstance(find_affinity("context"), ContextAffinity)
        for wrong in ("seqtra", "no.such.function", "math.pi"):
            with pytest.raises(InputError, match=r"expected seqtran or context, an affinity_weights.json"):
                find_affinity(wrong)

    def test_fitted_weights_are_an_affinity(self, volumes, tmp_path):
        file = tmp_path / "affinity_weights.json"
        file.write_text(json.dumps({"alpha": 0.0, "beta": 0.25, "standardize": False, "transfers": 12}))
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        found = find_affinity(str(file))
        assert found(a, b) == pytest.approx(0.25 * (1 - found.similarity(a, b)))
        assert affinity_name(str(file)) == "seqtran_0_0.25"
        with pytest.raises(InputError, match=r"holds no weights .*No such file.* give the affinity_weights\.json"):
            find_affinity(str(tmp_path / "other.json"))
        for content in (
            {},
            {"alpha": -1, "beta": 1, "standardize": False},
            {"alpha": 0, "beta": 0, "standardize": False},
        ):
            file.write_text(json.dumps(content))
            with pytest.raises(InputError, match="holds no weights of an affinity"):
                find_affinity(str(file))

    def test_equal_affinities_have_equal_names(self):
        assert affinity_name(SeqTranAffinity()) == affinity_name("seqtran") == "seqtran"
        assert affinity_name(SeqTranAffinity(alpha=1, standardize=True)) == "seqtran_1_2.4756_standardized"
        assert affinity_name(ContextAffinity()) == affinity_name("context") == "context"
        assert affinity_name("operator.sub") == "operator.sub"
        assert affinity_name(max) == "max"


def test_tasks_that_cannot_give_as_many_patients_are_refused(path):
    tasks = dict.fromkeys(TASKS, load_collection(path))
    require_patients(tasks, None)
    require_patients(tasks, 2)
    with pytest.raises(InputError, match=r"14-T2-ED has \d training patients, fewer than source_patients, 6"):
        require_patients(tasks, 6)
    with pytest.raises(InputError, match="train_patients is 0; expected at least one patient, or null"):
        require_patients(tasks, 0, option="train_patients")


class TestDraws:
    def test_larger_draws_hold_the_smaller_ones(self):
        patients = [{"subject": str(i)} for i in range(12)]
        draws = [draw_patients(patients, n, seed=3) for n in range(1, 13)]
        for small, large in pairwise(draws):
            assert all(patient in large for patient in small)
        assert [len(draw) for draw in draws] == list(range(1, 13))
        assert draw_patients(patients, None, seed=3) == patients
        assert draw_patients(patients, 3, seed=3) == draw_patients(patients, 3, seed=3)
        assert len({str(draw_patients(patients, 3, seed=seed)) for seed in range(9)}) > 1

    def test_at_least_one(self):
        with pytest.raises(InputError, match="0 patients were asked for"):
            draw_patients([{"subject": "a"}], 0, seed=0)


def graph_of(tasks=TASKS, clusters=None) -> SourceGraph:
    costs = np.abs(np.subtract.outer(np.arange(len(tasks)), np.arange(len(tasks)))).astype(float)
    graph = task_graph(tasks, costs, sizes={task: 10 - n for n, task in enumerate(tasks)})
    clusters = clusters or [list(tasks)]
    return SourceGraph(graph, clusters, [cluster[0] for cluster in clusters])


def near_to(place: float):
    """An affinity by the order of names, with the target somewhere among them."""
    return lambda a, b: abs(([*TASKS].index(a.name) if a.name in TASKS else place) - place)


class TestPlans:
    def options(self, path, **changed):
        given = {"collection": str(path), "subjects": 6, "affinity": near_to(1.2), "patients": 2, "progress": False}
        return given | changed

    def plan(self, path, sources=None, **changed):
        return plan_path(
            sources or graph_of(),
            target=load_collection(path),
            target_task="17-T2-ED",
            target_patients=2,
            max_intermediates=1,
            seed=0,
            **self.options(path, **changed),
        )

    def test_path_and_single_source(self, path):
        plan = self.plan(path)
        assert plan.costs == pytest.approx({"14-T2-ED": 1.2, "14-T2-ET": 0.2, "14-FLAIR-ED": 0.8})
        assert plan.single == "14-T2-ET"
        assert plan.path == ("14-T2-ED", "14-T2-ET")
        assert plan.paths[0].cost == pytest.approx(1.2 + 1 + 0.2)
        text = plan_text(graph_of(), plan)
        assert "Best path: 14-T2-ED -> 14-T2-ET -> 17-T2-ED, cost 2.400." in text
        assert "Nearest single source: 14-T2-ET, cost 0.200." in text

    def test_without_a_path_the_plan_says_why(self, path):
        plan = self.plan(path, graph_of(clusters=[[task] for task in TASKS]))
        assert plan.path is None
        assert plan.single == "14-T2-ET"
        assert "ask for fewer clusters" in plan_text(graph_of(), plan)
        assert "One step is all there is" in second_step_text(pd.DataFrame(), plan)

    def test_an_unreachable_target_is_refused(self, path):
        with pytest.raises(InputError, match="no source shares modality or objective with the target 17-T2-ED"):
            self.plan(path, graph_of(["14-FLAIR-ET", "14-T1-NCR"]))

    def test_a_graph_is_made_once_for_any_target(self, path, tmp_path, monkeypatch):
        options = {"n_clusters": 1, "cluster_weight": "weight", "representative_rule": "size"}
        made = source_graph(TASKS, **self.options(path, affinity="seqtran"), **options)
        write_plan(made, None, output_dir=tmp_path, figures=True, synthetic=True)
        graph = {"graph": str(tmp_path / "task_graph.json")}
        with pytest.raises(InputError, match="made with the affinity seqtran, whose costs are on another scale"):
            source_graph(TASKS, **self.options(path, affinity="context"), **options, **graph)
        monkeypatch.setattr("medtl_ext.sequential.plan.affinity_costs", lambda *_, **__: pytest.fail("costs again"))
        again = source_graph(TASKS, **self.options(path, affinity="seqtran"), **options, **graph)
        assert again.clusters == made.clusters
        assert {frozenset(e[:2]): e[2]["weight"] for e in again.graph.edges(data=True)} == {
            frozenset(e[:2]): e[2]["weight"] for e in made.graph.edges(data=True)
        }
        names = {file.name for file in tmp_path.iterdir()}
        assert names == {"task_graph.json", "task_graph.graphml", "clusters.csv", "task_graph.png"}
        with pytest.raises(InputError, match="differ in 14-FLAIR-ET"):
            source_graph(TASKS[:3], **self.options(path), **options, graph=str(tmp_path / "task_graph.json"))

    def test_one_source_is_a_graph_too(self, path):
        options = {"n_clusters": 3, "cluster_weight": None, "representative_rule": "size"}
        with pytest.warns(UserWarning, match="n_clusters is 3, of 1 source task: each is a cluster of its own"):
            made = source_graph(TASKS[:1], **self.options(path), **options)
        assert made.clusters == [[TASKS[0]]]
        assert self.plan(path, made).single == TASKS[0]
        for wrong in (None, 0, 1.5, True):
            with pytest.raises(InputError, match="expected a whole number, 1 or more"):
                source_graph(TASKS, **self.options(path), **options | {"n_clusters": wrong})


def test_the_figure_shows_clusters_sizes_and_the_path(path):
    sources = graph_of(clusters=[TASKS[:2], TASKS[2:]])
    figure = plot_task_graph(
        sources.graph,
        sources.clusters,
        representatives=sources.representatives,
        path=TASKS[:2],
        target="17-T2-ED",
        target_costs={"14-T2-ED": 1.0, "14-T2-ET": 0.2},
        synthetic=True,
    )
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {*TASKS, "17-T2-ED"} <= set(texts)
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == 2
    dots = [points for points in axes.collections if len(points.get_offsets()) == 2 and hasattr(points, "get_sizes")]
    colours = {matplotlib.colors.to_hex(points.get_facecolor()[0]) for points in dots}
    assert len(colours) == 2
    assert dots[0].get_sizes()[0] > dots[0].get_sizes()[1]
    assert "synthetic phantom" in figure.get_supxlabel()


class TestArms:
    def plan(self, path=("a", "b"), single="c"):
        paths = [TransferPath(1.0, path)] if path else []
        return Plan("t", {"a": 1.0, "b": 0.5, "c": 0.1}, paths, single, None if path else "there is no path")

    def test_one_step_and_two_with_decoder_and_all(self):
        arms = {arm.name: arm for arm in arms_of(self.plan())}
        ways = {"single": ("c",), "sequential": ("a", "b"), "direct": ("a",)}
        expected = {f"{way}{kind}" for way, kind in product(ways, ("", "_full"))} | {"zero_shot", "scratch"}
        assert set(arms) == expected
        assert all(arms[way].tasks == arms[f"{way}_full"].tasks == tasks for way, tasks in ways.items())
        assert [arms["single"].full, arms["single_full"].full] == [False, True]
        assert arms["zero_shot"] == Arm("zero_shot", ("c",), epochs=0)

    def test_what_is_the_same_is_trained_once(self):
        assert "direct" not in {arm.name for arm in arms_of(self.plan(single="a"))}
        assert {arm.name for arm in arms_of(self.plan(path=None), zero_shot=False)} == {
            "scratch",
            "single",
            "single_full",
        }

    def test_a_path_of_one_task_is_a_single_step(self):
        plan = self.plan(path=("a",))
        names = {arm.name for arm in arms_of(plan)}
        assert names == {"zero_shot", "scratch", "single", "single_full", "direct", "direct_full"}
        assert "direct" not in {arm.name for arm in arms_of(self.plan(path=("c",)))}
        assert second_step_text(self.rows(0.2, 8), plan) == "One step is all there is: max_intermediates is 0."

    @staticmethod
    def rows(gain: float, patients: int, noise: float = 0.01) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for patient in range(patients):
            base = rng.uniform(0.4, 0.5)
            for suffix in ("", "_full"):
                dice = {"direct": base - 0.3, "single": base, "sequential": base + gain + rng.normal(0, noise)}
                row = {"seed": 0, "split": "val", "subject": patient, "class": "ED", "iou": 0.5}
                rows += [row | {"method": name + suffix, "dice": value} for name, value in dice.items()]
        return pd.DataFrame(rows)

    @pytest.mark.parametrize(
        ("gain", "noise", "words"),
        [
            (0.2, 0.01, "the second step helps"),
            (0.012, 0.0001, "the second step helps"),
            (0.008, 0.0001, "the second step gains less than 0.01, one is enough"),
            (0.0, 0.01, "no evidence for a second step, one is enough"),
            (-0.2, 0.01, "the second step harms"),
        ],
    )
    def test_the_second_step_is_judged_against_the_better_single_one(self, gain, noise, words):
        text = second_step_text(self.rows(gain, 8, noise), self.plan())
        assert f"All parameters: {words}, the path against the better single source (single_full)" in text
        assert f"decoder only: {words}" in text

    @pytest.mark.parametrize("patients", [1, 2, 3, 4])
    def test_few_patients_do_not_settle_it(self, patients):
        """Two patients with nearly the same large gain have a narrow interval."""
        text = second_step_text(self.rows(0.2, patients, 0.0001), self.plan())
        assert ("the second step helps" in text) == (patients == 4)
        assert ("cannot settle whether a second step helps, which takes at least 4;" in text) == (patients < 4)
        assert "the path against the better single source (single_full) is +0.200 Dice" in text


def test_a_joint_training_on_fewer_patients_is_another(tmp_path):
    """The pool is shared by studies, which may have the same sum of patients in other parts."""
    root = Path(__file__).resolve().parent.parent / "bundles" / "sequential_transfer"
    train = json.loads((root / "configs" / "train.json").read_text()) | {"bundle_root": str(root)}
    arm = Arm("both", ("13-T1-ED", "13-T1-ET"), joint=True)
    folders = {"folder": tmp_path / "arms", "stage_dir": tmp_path / "stages", "source_dir": tmp_path / "pool"}

    def joint(source_patients, stage_patients):
        config = train | {"source_patients": source_patients, "stage_patients": stage_patients}
        (job,) = Chains(config, **folders, seed=0, pool_seed=0).sources(arm)
        return job

    assert joint(10, 3).output_dir != joint(12, 5).output_dir
    assert joint(None, 3).output_dir != joint(None, 5).output_dir
    assert joint(10, 3).output_dir == joint(10, 3).output_dir
    assert joint(10, 3).overrides["joint_patients"] == 3


@pytest.mark.parametrize(
    ("source_patients", "train_patients", "expected"),
    [(10, "@stage_patients", ["3", "10", "10 + 3", "7 + 3 + 3"]), (None, 5, ["5", "all", "all + 5", "all + 3 + 5"])],
)
def test_the_patients_that_an_arm_spends_are_said(source_patients, train_patients, expected, tmp_path):
    config = {"source_patients": source_patients, "stage_patients": 3, "train_patients": train_patients}
    config |= {"bundle_root": str(tmp_path), "collection": None, "source_collection": None}
    chains = Chains(config, folder=tmp_path, stage_dir=tmp_path, source_dir=tmp_path, seed=0, pool_seed=0)
    one = ("13-T1-ED",)
    arms = [Arm("scratch"), Arm("zero_shot", one, epochs=0), Arm("single", one), Arm("sequential", (*one, "13-T1-ET"))]
    assert [chains.spends(arm) for arm in arms] == expected


class TestStudy:
    def choices(self, gain: float) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for target, seed in product(["B-T1-ED", "B-T2-ED"], [0, 1]):
            base = {f"p{i}": rng.uniform(0.4, 0.6) for i in range(6)}
            for (steps, how), more in {
                ("none", "scratch"): -0.1,
                ("single", "random"): -0.05,
                ("single", "near"): 0.0,
                ("single", "near: head of its path"): -0.02,
                ("path", "random"): -0.05,
                ("path", "near"): gain,
                ("joint", "near"): 0.0,
            }.items():
                patients = {name: value + more + rng.normal(0, 0.005) for name, value in base.items()}
                dice = float(np.mean(list(patients.values())))
                row = {"target": target, "seed": seed, "steps": steps, "how": how, "pick": "x", "patients": patients}
                rows.append(row | {"dice": dice, "iou": dice})
        return pd.DataFrame(rows)

    def test_differences_are_paired_over_patients_each_once(self):
        table = differences(self.choices(gain=0.1)).set_index(["first", "second"])
        row = table.loc[("path, near", "single, near")]
        assert row[["patients", "pairs", "left out"]].tolist() == [6, 4, ""]  # both targets are of institution B
        assert float(row["difference"]) == pytest.approx(0.1, abs=0.01)
        assert row["p"] == "0.0312"  # 2 / 2^6: all six gain
        assert float(table.loc[("path, random", "single, random"), "p"]) > 0.05

    def test_a_patient_of_several_targets_is_one_patient(self):
        """The interval is that of the patients' own differences, however many targets ask them."""
        gain = {"p1": 0.10, "p2": 0.02, "p3": -0.01, "p4": 0.05}
        rows = []
        for target, seed in product(["B-T1-ED", "B-T2-ED", "B-T2-ET"], [0, 1]):
            for steps, how, more in (("single", "near", 0), ("path", "near", 1)):
                patients = {name: 0.5 + more * value for name, value in gain.items()}
                rows.append({"target": target, "seed": seed, "steps": steps, "how": how, "patients": patients})
        row = differences(pd.DataFrame(rows)).iloc[0]
        expected = paired_comparison(gain, dict.fromkeys(gain, 0.0))
        assert row["interval"] == f"{expected.low:+.3f} to {expected.high:+.3f}"
        assert row["patients"] == 4

    def test_a_patient_of_two_institutions_is_one_patient(self):
        """A collection has a name of a subject or of a patient for one person only."""
        choices = self.choices(gain=0.1)
        elsewhere = choices.replace({"B-T2-ED": "C-T2-ED"})
        assert set(differences(elsewhere)["patients"]) == {6}
        there = elsewhere["target"] == "C-T2-ED"
        elsewhere.loc[there, "patients"] = elsewhere.loc[there, "patients"].map(
            lambda of: {f"C{name}": value for name, value in of.items()}
        )
        assert set(differences(elsewhere)["patients"]) == {12}

    def test_only_what_both_sides_have_is_compared(self):
        """Seed 1 of B-T2-ED is harder by 0.2 and has no path: that is not the path's merit."""
        choices = self.choices(gain=0.1)
        hard = (choices["target"] == "B-T2-ED") & (choices["seed"] == 1)
        choices.loc[hard, "patients"] = choices.loc[hard, "patients"].map(
            lambda of: {name: value - 0.2 for name, value in of.items()}
        )
        gone = hard & (choices["steps"].isin(["path", "joint"]) & (choices["how"] == "near"))
        text = study_text(self.table(), choices[~gone], synthetic=True, source_patients=10)
        table = differences(choices[~gone]).set_index(["first", "second"])
        row = table.loc[("path, near", "single, near")]
        assert float(row["difference"]) == pytest.approx(0.1, abs=0.01)
        assert row[["patients", "pairs", "left out"]].tolist() == [6, 3, "B-T2-ED (seed 1)"]
        assert table.loc[("single, near", "single, random"), "pairs"] == 4
        assert "| 6 | 3 | B-T2-ED (seed 1) |" in next(
            line for line in text.splitlines() if line.startswith("| path, near | single, near |")
        )
        one = choices.index[(choices["steps"] == "path") & (choices["how"] == "near")][0]
        choices.at[one, "patients"] = {"p0": 0.5, "p1": 0.6}
        found = differences(choices).set_index(["first", "second"]).loc[("path, near", "single, near")]
        assert found[["patients", "pairs", "left out"]].tolist() == [6, 4, "of a pair: 4 patients"]

    def test_rows_say_how_many_targets_and_seeds_they_stand_for(self):
        choices = self.choices(gain=0.1)
        gone = (choices["target"] == "B-T2-ED") & (choices["steps"] == "path") & (choices["how"] == "near")
        text = study_text(self.table(), choices[~gone], synthetic=True, source_patients=10)
        rows = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()}
        assert rows["| path", "near"].endswith("| 2 |")
        assert rows["| single", "near"].endswith("| 4 |")
        assert "B-T2-ED |" in next(line for line in text.splitlines() if line.startswith("| path, near | single, near"))

    def test_the_spread_of_seeds_is_over_the_same_targets(self):
        """A seed without a path to the easier target would look like a spread of 0.2."""
        rows = [
            {"target": target, "seed": seed, "steps": "path", "how": "near", "dice": dice, "patients": {"p": dice}}
            for target, dice in {"B-T1-ED": 0.8, "B-T2-ED": 0.4}.items()
            for seed in (0, 1)
        ]
        text = study_text(self.table(), pd.DataFrame(rows[1:]), synthetic=True, source_patients=10)
        assert "| path | near | 0.800 | 0.400 | 0.600 | 0.000 | 3 |" in text

    @pytest.mark.parametrize(("source_patients", "equal"), [(10, True), (None, False)])
    def test_numbers_are_equal_only_where_they_are_set(self, source_patients, equal):
        text = study_text(self.table(), self.choices(gain=0.0), synthetic=True, source_patients=source_patients)
        assert text.count("at equal numbers of labelled patients") == 2 * equal
        assert text.count("each with all patients of its first source") == 2 * (not equal)

    def test_an_affinity_without_any_path_is_compared_all_the_same(self):
        choices = self.choices(gain=0.1)
        without = choices[~(choices["steps"].isin(["path", "joint"]) | choices["how"].str.contains("head"))]
        found = differences(without).set_index(["first", "second"])
        assert found.loc[("single, near", "single, random"), "patients"] == 6

    def table(self) -> pd.DataFrame:
        dice = {"A-T1-ED": 0.5, "A-T2-ED": 0.3, "A-T2-ED > A-T1-ED": 0.45, "A-T1-ED > A-T2-ED": 0.4}
        rows = [{"target": "B-T1-ED", "seed": 0, "arm": arm, "dice": value} for arm, value in dice.items()]
        rng = np.random.default_rng(0)
        patients = [
            {f"p{i}": value + noise for i, noise in enumerate(rng.normal(0, 0.01, 6))} for value in dice.values()
        ]
        return pd.DataFrame(rows).assign(steps=[1, 1, 2, 2], patients=patients)

    def test_gains_are_against_the_paths_own_sources(self):
        table = self.table()
        found = gains(table).set_index(["second step", "target"])
        figures = ["paths", "against the first", "against the better"]
        assert found.loc[("brings the target's modality", "all"), figures].tolist() == pytest.approx([1, 0.15, -0.05])
        assert found.loc[("any other", "B-T1-ED"), figures].tolist() == pytest.approx([1, -0.1, -0.1])
        of = table.set_index("arm")["patients"]
        expected = paired_comparison(of["A-T2-ED > A-T1-ED"], of["A-T2-ED"])
        interval = f"{expected.low:+.3f} to {expected.high:+.3f}"
        assert found.loc[("brings the target's modality", "all"), "interval"] == interval

    def test_a_gain_averages_a_patients_paths(self):
        """Two paths of the same patients are no twelve patients."""
        table = self.table()
        again = table.assign(seed=1)
        once, twice = (gains(rows).set_index(["second step", "target"]) for rows in (table, pd.concat([table, again])))
        assert once["interval"].tolist() == twice["interval"].tolist()
        assert (twice["paths"] == 2 * once["paths"]).all()

    def test_the_page_holds_every_way_to_choose(self):
        choices = self.choices(gain=0.0)
        text = study_text(self.table(), choices, synthetic=True, source_patients=10)
        for steps, how in choices[["steps", "how"]].drop_duplicates().itertuples(index=False):
            assert f"| {steps} | {how} |" in text
        assert "**Synthetic**" in text


class TestTwoCollections:
    """Sources in a file of their own, which does not know the target's institution."""

    @pytest.fixture
    def settings(self, path, tmp_path, monkeypatch) -> dict[str, str]:
        root = Path(__file__).resolve().parent.parent / "bundles" / "sequential_transfer"
        monkeypatch.setattr("medtl_ext.bundle.current_config", lambda: {"bundle_root": str(root)})
        content = json.loads(path.read_text())
        for name in ("14", "17"):
            subjects = [subject for subject in content["subjects"] if subject["institution"] == name]
            path.with_name(f"{name}.json").write_text(json.dumps(content | {"subjects": subjects}))
        one = {"affinity_patients": 1, "source_patients": None, "source_dir": str(tmp_path / "pool"), "n_clusters": 1}
        files = {"collection": str(path.with_name("17.json")), "source_collection": str(path.with_name("14.json"))}
        return one | files

    def test_weights_are_fitted(self, settings, path, tmp_path):
        transfers = pd.DataFrame({"source": TASKS[:3], "target": "17-T2-ED", "dice": [0.5, 0.3, 0.45]})
        transfers.to_csv(tmp_path / "measured.csv", index=False)
        given = {"transfers": str(tmp_path / "measured.csv"), "targets": [], "sources": [], "standardize": False}
        found = fit_weights(**given, settings=settings, output_dir=str(tmp_path / "two"))
        whole = settings | {"collection": str(path), "source_collection": "@collection"}
        assert found == fit_weights(**given, settings=whole, output_dir=str(tmp_path / "one"))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"sources": TASKS[:1]}, r"a fit needs three transfers or more; those from .* are 1\."),
            ({"targets": ["14-T2-ED"], "sources": TASKS[:1]}, r"are 0\."),
            ({"sources": [*TASKS[:2], "14-T2-EDD"]}, "objective 'EDD' is unknown"),
            ({"source_patients": 99}, "fewer than source_patients, 99"),
            ({"train_patients": 99}, "task 17-T2-ED has .* fewer than train_patients, 99"),
            ({"sources": [*TASKS[:2], TASKS[0]]}, "sources names 14-T2-ED twice"),
        ],
    )
    def test_what_cannot_be_fitted_is_not_trained(self, changed, message, settings, path, tmp_path, monkeypatch):
        monkeypatch.setattr("medtl_ext.sequential.chain.run_jobs", lambda *_, **__: pytest.fail("training started"))
        whole = settings | {"collection": str(path), "source_collection": "@collection", "train_patients": 1}
        whole |= {"stage_patients": 1}
        asked = {"targets": ["17-T2-ED"], "sources": TASKS[:3]}
        asked |= {name: value for name, value in changed.items() if name in asked}
        whole |= {name: value for name, value in changed.items() if name not in asked}
        with pytest.raises(InputError, match=message):
            fit_weights(transfers=None, **asked, settings=whole, standardize=False, output_dir=str(tmp_path / "fit"))

    @pytest.mark.parametrize(
        ("dice", "target", "message"),
        [
            (math.inf, "17-T2-ED", "line 3 has no dice between 0 and 1"),
            (55, "17-T2-ED", "line 3 has no dice between 0 and 1"),
            ("", "17-T2-ED", "line 3 has no dice between 0 and 1"),
            (0.3, TASKS[1], "line 3 is from a task to itself"),
        ],
    )
    def test_transfers_that_cannot_be_are_named(self, dice, target, message, settings, tmp_path):
        rows = {"source": TASKS[:3], "target": ["17-T2-ED", target, "17-T2-ED"], "dice": [0.5, dice, 0.4]}
        pd.DataFrame(rows).to_csv(tmp_path / "measured.csv", index=False)
        given = {"transfers": str(tmp_path / "measured.csv"), "targets": [], "sources": [], "standardize": False}
        with pytest.raises(InputError, match=message):
            fit_weights(**given, settings=settings, output_dir=str(tmp_path / "fit"))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"targets": ["17-T2-ED", "17-T2-ED"]}, "targets names 17-T2-ED twice"),
            ({"seeds": [0, 0]}, "seeds names 0 twice"),
            (
                {"stage_patients": 99, "train_patients": 1},
                r"99: .* Give --stage_patients \d or less\.$",
            ),
            ({"stage_patients": None, "train_patients": 1}, "stage_patients is None; expected at least one patient"),
            ({"max_intermediates": 2}, "max_intermediates, which is 1 in a study"),
            (
                {"sources": ["14-FLAIR-ET"], "targets": ["17-FLAIR-ED", "17-T2-ED"]},
                "with the target 17-T2-ED; add such",
            ),
        ],
    )
    def test_what_cannot_be_studied_is_not_trained(self, changed, message, settings, tmp_path, monkeypatch):
        monkeypatch.setattr("medtl_ext.sequential.study.run_jobs", lambda *_, **__: pytest.fail("training started"))
        asked = {"targets": ["17-T2-ED", "17-FLAIR-ED"], "sources": TASKS[:3], "seeds": [0], "affinities": ["context"]}
        settings |= {"source_patients": 2, "stage_patients": 1}
        settings |= {name: value for name, value in changed.items() if name not in asked}
        asked |= {name: value for name, value in changed.items() if name in asked}
        with pytest.raises(InputError, match=message):
            study_paths(output_dir=str(tmp_path / "study"), settings=settings, **asked)

    def test_a_study_trains_each_task_on_its_own(self, settings, tmp_path, monkeypatch):
        first = []

        def run_jobs(jobs, **how):
            first.extend(jobs)
            raise StopIteration

        monkeypatch.setattr("medtl_ext.sequential.study.run_jobs", run_jobs)
        with pytest.raises(StopIteration):
            study_paths(
                output_dir=str(tmp_path / "study"),
                targets=["17-T2-ED", "17-FLAIR-ED"],
                sources=TASKS[:3],
                seeds=[0],
                affinities=["seqtran"],
                settings=settings | {"source_patients": 2, "stage_patients": 1},
            )
        used = {(job.overrides["target_task"][:2], job.overrides.get("collection", "the target's")) for job in first}
        assert used == {("14", settings["source_collection"]), ("17", "the target's")}


class TestFit:
    """Six transfers to each of several targets, whose Dice and distance from everything differ."""

    @staticmethod
    def transfers(effect, targets: str = "abc") -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for place, (target, level) in enumerate(zip(targets, np.linspace(0.9, 0.2, len(targets)), strict=True)):
            distance, similarity = rng.uniform(10, 20, 6), rng.uniform(0.5, 0.9, 6)
            dice = level + effect(place, distance, similarity) + rng.normal(0, 1e-4, 6)
            # A target that is far from everything and easy all the same: between targets the cost has the wrong sign.
            distance = distance + 300 * level
            columns = {"dice": dice, "distance": distance, "similarity": similarity}
            rows.append(pd.DataFrame(columns).assign(target=target))
        return pd.concat(rows, ignore_index=True)

    def test_recovers_the_weights_within_targets(self):
        table = self.transfers(lambda _, distance, similarity: -0.01 * distance - 0.4 * (1 - similarity))
        found = fit_to_transfers(table)
        assert (found["alpha"], found["beta"]) == pytest.approx((0.01, 0.4), rel=0.02)
        assert found["correlation"] < -0.99
        assert found["correlation_left_out"] < -0.99
        assert found["correlation"] < found["correlation_published"]
        assert "of 3 targets left out, 3 have the predicting sign, and 3 are predicted better" in fit_text(found)
        assert "No evidence" in fit_text(found)
        assert "fewer than 5 cannot show it" in fit_text(found)

    def test_five_targets_that_agree_are_evidence(self):
        found = fit_to_transfers(self.transfers(lambda _, d, s: -0.01 * d - 0.4 * (1 - s), "abcde"))
        assert [found[f"targets_{kind}"] for kind in ("left_out", "predicted", "better")] == [5, 5, 5]
        assert "Prefer these weights to the published ones" in fit_text(found)

    def test_both_weights_are_judged_by_the_mean_over_targets(self):
        """Target a has most of the spread of Dice, so a correlation over all rows is that of a."""
        table = self.transfers(lambda place, _, s: (1.0, 0.001, -0.001)[place] * s, "abc")
        found = fit_to_transfers(table)
        expected = [
            np.corrcoef(0.0044 * of["distance"] - 2.4756 * of["similarity"], of["dice"])[0, 1]
            for _, of in table.groupby("target")
        ]
        assert found["correlation_published"] == pytest.approx(np.mean(expected))

    @pytest.mark.parametrize("targets", [2, 3, 6])
    def test_noise_is_no_evidence(self, targets):
        rng, preferred = np.random.default_rng(targets), 0
        for _ in range(60):
            table = pd.DataFrame(
                {"target": np.repeat(np.arange(targets), 6), "dice": rng.uniform(0.4, 0.8, 6 * targets)}
            )
            table["distance"], table["similarity"] = (rng.uniform(*ends, len(table)) for ends in ((5, 40), (0.2, 0.9)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                preferred += "No evidence" not in fit_text(fit_to_transfers(table))
        assert preferred <= 3

    def test_evidence_takes_both_signs_and_a_lead(self):
        shared = {"alpha": 1.0, "beta": 1.0, "transfers": 30, "targets_left_out": 5, "correlation": -0.9}
        good = {
            "correlation_left_out": -0.5,
            "correlation_published": -0.3,
            "targets_predicted": 5,
            "targets_better": 5,
        }
        assert "Prefer" in fit_text(shared | good)
        for wrong in ({"correlation_published": -0.6}, {"targets_predicted": 4}, {"targets_better": 4}):
            assert "No evidence" in fit_text(shared | good | wrong)

    @pytest.mark.filterwarnings("ignore:No weights")
    def test_a_similarity_that_is_the_same_within_targets_says_nothing(self):
        """Centring 0.1 and 0.7 leaves 1e-17, which is no reason for a weight of 1e15."""
        for seed in range(20):
            rng = np.random.default_rng(seed)
            parts = [
                pd.DataFrame({"dice": rng.uniform(0.4, 0.8, 5), "distance": rng.uniform(5, 40, 5)}).assign(
                    target=target, similarity=rng.uniform(0.2, 0.95)
                )
                for target in "abc"
            ]
            assert fit_to_transfers(pd.concat(parts, ignore_index=True))["beta"] == 0

    def test_says_when_the_weights_do_not_carry_over(self):
        table = self.transfers(lambda place, distance, _: (0.01, -0.01, 0.01)[place] * distance)
        with pytest.warns(UserWarning, match="nearest"):
            found = fit_to_transfers(table)
        assert found["correlation_left_out"] > 0
        assert "No evidence to prefer these weights" in fit_text(found)

    def test_a_target_left_out_is_not_in_its_fit(self):
        table = self.transfers(lambda place, d, s: (-0.01 * d, 0.4 * s)[place], "ab")
        expected = []
        for target, own in table.groupby("target"):
            others = fit_to_transfers(table[table["target"] != target])
            cost = others["alpha"] * own["distance"] - others["beta"] * own["similarity"]
            expected.append(np.corrcoef(cost, own["dice"])[0, 1])
        assert fit_to_transfers(table)["correlation_left_out"] == pytest.approx(np.mean(expected))

    def test_one_target_leaves_nothing_out(self):
        table = self.transfers(lambda _, distance, __: -0.01 * distance)
        found = fit_to_transfers(table[table["target"] == "a"])
        assert found["correlation_left_out"] is None
        assert found["correlation"] < -0.99
        assert "at unknown on targets left out" in fit_text(found)
        assert "No evidence" in fit_text(found)
