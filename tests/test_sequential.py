"""The parts of sequential_transfer: affinities of tasks, plans, draws, arms, and what a study says of its numbers."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path

import matplotlib.colors
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medtl_ext import InputError
from medtl_ext.affinity import context_affinity, pairwise_ssim, pairwise_wasserstein, task_affinity
from medtl_ext.data import generate_phantom, load_collection
from medtl_ext.graph import TransferPath, task_graph
from medtl_ext.sequential import (
    Arm,
    ContextAffinity,
    Plan,
    SeqTranAffinity,
    SourceGraph,
    TaskVolumes,
    affinity_costs,
    arms_of,
    draw_patients,
    find_affinity,
    plan_path,
    plan_text,
    plot_task_graph,
    second_step_text,
    source_graph,
    task_volumes,
    write_plan,
)
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
        assert SeqTranAffinity()(a, b) == pytest.approx(expected, rel=1e-6)
        assert SeqTranAffinity()(b, a) == pytest.approx(expected, rel=1e-6)

    def test_context_is_that_of_the_volumes(self, volumes):
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        sizes = {"spacing_a": a.spacing(), "spacing_b": b.spacing()}
        assert np.allclose(a.spacing(), np.abs(nib.load(a.items[0][0]).header.get_zooms()))
        expected = float(context_affinity(*arrays(a), *arrays(b), **sizes))
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
            with pytest.raises(InputError, match=r"expected seqtran or context, or the import path"):
                find_affinity(wrong)


def test_sources_that_cannot_give_as_many_patients_are_refused(path):
    options = {"collection": str(path), "subjects": 6}
    require_patients(TASKS, None, **options)
    require_patients(TASKS, 2, **options)
    with pytest.raises(InputError, match=r"14-T2-ED has \d training patients, fewer than source_patients, 6"):
        require_patients(TASKS, 6, **options)


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
        made = source_graph(TASKS[:1], **self.options(path), **options)
        assert made.clusters == [[TASKS[0]]]
        assert self.plan(path, made).single == TASKS[0]


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

    @pytest.mark.parametrize(
        ("gain", "words"),
        [
            (0.2, "the second step helps"),
            (0.0, "no evidence for a second step, one is enough"),
            (-0.2, "the second step harms"),
        ],
    )
    def test_the_second_step_is_judged_against_the_better_single_one(self, gain, words):
        rng = np.random.default_rng(0)
        rows = []
        for patient in range(8):
            base = rng.uniform(0.4, 0.5)
            for suffix in ("", "_full"):
                dice = {"direct": base - 0.3, "single": base, "sequential": base + gain + rng.normal(0, 0.01)}
                rows += [
                    {
                        "method": name + suffix,
                        "seed": 0,
                        "split": "val",
                        "subject": patient,
                        "class": "ED",
                        "dice": value,
                    }
                    for name, value in dice.items()
                ]
        text = second_step_text(pd.DataFrame(rows).assign(iou=0.5), self.plan())
        assert f"All parameters: {words}, the path against the better single source (single_full)" in text
        assert f"decoder only: {words}" in text


class TestStudy:
    def choices(self, gain: float) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for target, seed in product(["t1", "t2"], [0, 1]):
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

    def test_differences_are_paired_over_patients_of_all_targets(self):
        table = differences(self.choices(gain=0.1)).set_index(["first", "second"])
        row = table.loc[("path, near", "single, near")]
        assert row["patients"] == 12
        assert float(row["difference"]) == pytest.approx(0.1, abs=0.01)
        assert float(row["p"]) < 0.01
        assert float(table.loc[("path, random", "single, random"), "p"]) > 0.01

    def table(self) -> pd.DataFrame:
        dice = {"A-T1-ED": 0.5, "A-T2-ED": 0.3, "A-T2-ED > A-T1-ED": 0.45, "A-T1-ED > A-T2-ED": 0.4}
        rows = [{"target": "B-T1-ED", "seed": 0, "arm": arm, "dice": value} for arm, value in dice.items()]
        return pd.DataFrame(rows).assign(steps=[1, 1, 2, 2])

    def test_gains_are_against_the_paths_own_sources(self):
        found = gains(self.table()).set_index(["second step", "target"])
        assert found.loc[("brings the target's modality", "all")].tolist() == pytest.approx([0.15, -0.05, 1])
        assert found.loc[("any other", "B-T1-ED")].tolist() == pytest.approx([-0.1, -0.1, 1])

    def test_the_page_holds_every_way_to_choose(self):
        choices = self.choices(gain=0.0)
        text = study_text(self.table(), choices, synthetic=True)
        for steps, how in choices[["steps", "how"]].drop_duplicates().itertuples(index=False):
            assert f"| {steps} | {how} |" in text
        assert "**Synthetic**" in text


class TestFit:
    """Eighteen transfers to three targets, whose Dice and distance from everything differ."""

    @staticmethod
    def transfers(effect) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for place, (target, level) in enumerate({"a": 0.9, "b": 0.5, "c": 0.2}.items()):
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
        assert "No evidence" not in fit_text(found)

    def test_says_when_the_weights_do_not_carry_over(self):
        table = self.transfers(lambda place, distance, _: (0.01, -0.01, 0.01)[place] * distance)
        with pytest.warns(UserWarning, match="nearest"):
            found = fit_to_transfers(table)
        assert found["correlation_left_out"] > 0
        assert "No evidence to prefer these weights" in fit_text(found)

    def test_one_target_leaves_nothing_out(self):
        table = self.transfers(lambda _, distance, __: -0.01 * distance)
        found = fit_to_transfers(table[table["target"] == "a"])
        assert found["correlation_left_out"] is None
        assert "at unknown on targets left out" in fit_text(found)
        assert "No evidence" in fit_text(found)
