"""The parts of sequential_transfer: affinities of tasks, plans, arms, weights, and the text of a study."""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from itertools import combinations, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from bundle_runs import REPOSITORY, SEQUENTIAL, refused
from monai.bundle import ConfigParser

from medtl_ext import InputError
from medtl_ext.affinity import pairwise_context, pairwise_ssim, pairwise_wasserstein, task_affinity, task_context
from medtl_ext.graph import task_graph
from medtl_ext.ranking import paired_comparison
from medtl_ext.sequential_transfer import PlanPath, SourceGraph, TaskVolumes, affinities, affinity_name, study
from medtl_ext.sequential_transfer.affinities import ContextAffinity, SeqTranAffinity, affinity_costs, find_affinity
from medtl_ext.sequential_transfer.chain import Chains, arms_of, second_step_text, steps_of
from medtl_ext.sequential_transfer.plan import task_volumes
from medtl_ext.sequential_transfer.study import differences, fit_text, fit_to_transfers, gains, study_text
from medtl_ext.transfer import Run, SegmentationTask
from medtl_ext.visualize import plot_task_graph

TASKS = ["14-T2-ED", "14-T2-ET", "14-FLAIR-ED", "14-FLAIR-ET"]


@pytest.fixture(scope="module")
def volumes(collection) -> dict[str, TaskVolumes]:
    tasks = [SegmentationTask(task, collection=str(collection)) for task in [*TASKS, "17-T2-ED"]]
    return {task.name: task_volumes(task, patients=2) for task in tasks}


@pytest.fixture
def run_of(tmp_path) -> Callable[..., Run]:
    """A run of the bundle whose config has these options."""

    def make(**options) -> Run:
        config = SEQUENTIAL.content("train") | {"bundle_root": str(SEQUENTIAL.root), **options}
        config |= {"output_dir": str(tmp_path / "out"), "progress": False}
        return ConfigParser(config).get_parsed_content("here")

    return make


def arrays(task: TaskVolumes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images and labels, read by nibabel only; the phantom is in RAS already."""
    images = [nib.load(image).get_fdata(dtype=np.float32) for image in task.image_files()]
    values = [value for group in task.label_values for value in group]
    return images, [np.isin(np.asarray(nib.load(label).dataobj), values) for _, label in task.items]


class TestAffinities:
    @pytest.mark.parametrize("form", ["seqtran", "seqtran_multivariate"])
    def test_seqtran_is_the_mean_over_pairs_of_patients(self, volumes, form):
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        (images_a, labels_a), (images_b, labels_b) = arrays(a), arrays(b)
        how = {"standardize": False, "multivariate": form != "seqtran"}
        distance = pairwise_wasserstein(images_a, images_b, **how).mean()
        expected = float(task_affinity(distance, pairwise_ssim(labels_a, labels_b).mean()))
        affinity = find_affinity(form)
        affinity(a, a)  # a stored cost of one pair is not used for another
        assert affinity(a, b) == pytest.approx(expected, rel=1e-6)
        assert find_affinity(form)(b, a) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("affinity", [SeqTranAffinity(alpha=1, beta=0), ContextAffinity()])
    def test_channels_count_by_their_names_or_so_that_the_mean_is_least(self, collection, affinity):
        def cost(one: str, other: str) -> float:
            tasks = (SegmentationTask(name, collection=str(collection)) for name in (f"14-{one}-ED", f"17-{other}-ED"))
            return affinity(*(task_volumes(task, patients=2) for task in tasks))

        same, crossed = (np.mean([cost("T1", a), cost("T2", b)]) for a, b in (("T1", "T2"), ("T2", "T1")))
        assert cost("T1+T2", "T2+T1") == pytest.approx(same, rel=1e-6) != pytest.approx(crossed, rel=1e-6)
        ways = [np.mean([cost("T1", a), cost("T2", b)]) for a, b in (("FLAIR", "T2"), ("T2", "FLAIR"))]
        assert cost("T1+T2", "FLAIR+T2") == pytest.approx(min(ways), rel=1e-6)
        assert cost("T2", "T1+T2") == pytest.approx(min(cost("T2", "T1"), cost("T2", "T2")), rel=1e-6)

    def test_context_is_that_of_the_volumes(self, volumes):
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        assert np.allclose(a.spacing(), np.abs(nib.load(a.image_files()[0]).header.get_zooms()))
        contexts = [[task_context(*arrays(task), spacing=task.spacing())] for task in (a, b)]
        expected = float(pairwise_context(*contexts))
        assert ContextAffinity()(a, b) == pytest.approx(expected, rel=1e-5)

    def test_what_is_shared_is_read_once(self, volumes, monkeypatch):
        read = []
        load = TaskVolumes._load
        monkeypatch.setattr(TaskVolumes, "_load", lambda self, files: read.append(files) or load(self, files))
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
            with pytest.raises(InputError, match=r"or context, an affinity_weights.json"):
                find_affinity(wrong)

    def test_fitted_weights_are_an_affinity(self, volumes, tmp_path):
        file = tmp_path / "affinity_weights.json"
        file.write_text(json.dumps({"alpha": 0.0, "beta": 0.25, "standardize": False, "multivariate": False}))
        a, b = volumes["14-T2-ED"], volumes["17-T2-ED"]
        found = find_affinity(str(file))
        assert found(a, b) == pytest.approx(0.25 * (1 - found.similarity(a, b)))
        assert affinity_name(str(file)) == "seqtran_0_0.25"
        with pytest.raises(InputError, match=r"holds no weights .*No such file.* give the affinity_weights\.json"):
            find_affinity(str(tmp_path / "other.json"))
        for alpha, beta in ((None, 1), (-1, 1), (0, 0)):
            file.write_text(json.dumps({"alpha": alpha, "beta": beta, "standardize": False, "multivariate": False}))
            with pytest.raises(InputError, match="holds no weights of an affinity"):
                find_affinity(str(file))

    def test_equal_affinities_have_equal_names(self):
        assert affinity_name(SeqTranAffinity()) == affinity_name("seqtran") == "seqtran"
        assert affinity_name(SeqTranAffinity(alpha=1, standardize=True)) == "seqtran_1_2.4756_standardized"
        multivariate = SeqTranAffinity(multivariate=True)
        assert affinity_name(multivariate) == affinity_name("seqtran_multivariate") == "seqtran_multivariate"
        assert affinity_name(ContextAffinity()) == affinity_name("context") == "context"
        assert affinity_name("operator.sub") == "operator.sub"
        assert affinity_name(max) == "max"


class TestTargets:
    """The training patients of a task."""

    def patients(self, path, count, seed=3) -> list[str]:
        task = SegmentationTask("17-T2-ED", collection=str(path), train_patients=count, seed=seed)
        return [item["subject"] for item in task.datalist("train")]

    def test_larger_draws_hold_the_smaller_ones_and_all_scans_of_a_patient(self, collection):
        content = json.loads(collection.read_text())
        all_ = [of | {"split": "train", "patient": of["id"]} for of in content["subjects"]]
        content["subjects"] = all_ + [of | {"id": f"{of['id']} again"} for of in all_]
        file = collection.with_name("twice.json")
        file.write_text(json.dumps(content))
        draws = [self.patients(file, count) for count in range(1, 11)]
        for count, draw in enumerate(draws, start=1):
            firsts = [name for name in draw if not name.endswith("again")]
            assert draw == [*firsts, *(f"{name} again" for name in firsts)]  # in the order of the file
            assert len(firsts) == count
        assert all(set(small) < set(large) for small, large in pairwise(draws))
        assert self.patients(file, None) == draws[-1]
        assert self.patients(file, 3) == draws[2]
        assert len({str(self.patients(file, 3, seed)) for seed in range(9)}) > 1

    @pytest.mark.parametrize("wrong", [0, True, 1.5])
    def test_patients_are_counted(self, collection, wrong):
        with pytest.raises(InputError, match="expected a whole number, 1 or more"):
            self.patients(collection, wrong)

    def test_other_splits_are_whole(self, collection):
        few, all_ = (SegmentationTask("17-T2-ED", collection=str(collection), train_patients=n) for n in (1, None))
        assert few.datalist("test") == all_.datalist("test")


def near_to(place: float):
    """An affinity by the order of names; the target is at ``place`` in this order."""
    return lambda a, b: abs(np.subtract(*(TASKS.index(of.name) if of.name in TASKS else place for of in (a, b))))


class TestPlans:
    @pytest.fixture
    def graph(self, run_of, collection) -> Callable[..., SourceGraph]:
        def make(sources=TASKS, affinity=None, task_graph=None, **options) -> SourceGraph:
            given = {"collection": str(collection), "affinity_patients": 2, "n_clusters": 1}
            run = run_of(**given | {"source_patients": 2, "stage_patients": 1} | options)
            return SourceGraph(here=run, sources=sources, affinity=affinity or near_to(1.2), task_graph=task_graph)

        return make

    def plan(self, graph: SourceGraph) -> PlanPath:
        target = SegmentationTask("17-T2-ED", collection=graph.here.config["collection"], train_patients=1)
        return PlanPath(graph=graph, target=target)

    def test_path_and_single_source(self, graph):
        plan = self.plan(graph())
        assert plan.costs == pytest.approx({"14-T2-ED": 1.2, "14-T2-ET": 0.2, "14-FLAIR-ED": 0.8})
        assert plan.single == "14-T2-ET"
        assert plan.path == ("14-FLAIR-ED", "14-T2-ED")
        assert plan.paths[0].cost == pytest.approx(0.8 + 2 + 1.2)
        assert "4 source tasks, 4 pairs joined, in 1 clusters: 14-FLAIR-ED and 3 more." in plan.graph.text
        assert "Best path: 14-FLAIR-ED -> 14-T2-ED -> 17-T2-ED, cost 4.000." in plan.text
        assert "Nearest single source: 14-T2-ET, cost 0.200." in plan.text

    def test_without_a_path_the_plan_says_why(self, graph):
        plan = self.plan(graph(n_clusters=4))
        assert plan.path is None
        assert plan.single == "14-T2-ET"
        assert "For 17-T2-ED there is no path" in plan.text
        assert "ask for fewer clusters" in plan.text
        assert second_step_text(pd.DataFrame(), plan) == "There is no second step."

    def test_the_affinity_looks_at_joined_tasks_and_the_patients_that_are_trained_on(self, graph):
        pairs = []
        plan = self.plan(graph(affinity=lambda *pair: pairs.append(pair) or 1.0, affinity_patients=1))
        assert plan.single in TASKS
        names = {frozenset(task.name for task in pair) for pair in pairs}
        apart = [{TASKS[0], TASKS[3]}, {TASKS[1], TASKS[2]}, {TASKS[3], "17-T2-ED"}]
        assert names == {frozenset(pair) for pair in combinations([*TASKS, "17-T2-ED"], 2) if set(pair) not in apart}
        seen = {task.name: task for pair in pairs for task in pair}
        assert list(seen["17-T2-ED"].image_files()) == [item["image"] for item in plan.target.datalist("train")]
        assert {(len(seen[task].items), seen[task].size) for task in TASKS} == {(1, 4)}

    def test_a_plan_says_how_often_it_is_chosen_again(self, graph):
        """Four tasks in a ring of equal costs: names or chance decide which edges are cut, and which path is best."""
        made = graph(affinity=lambda a, b: 1.0, n_clusters=2)
        assert len(made.clusterings) == 100
        assert max(made.kept) < 1
        assert "Ties between edges matter: broken at random, they give" in made.text
        plan = self.plan(made)
        best = plan.survival.loc["path", "ties"]
        assert best.sum() == pytest.approx(1)
        chosen = best.get(" -> ".join(plan.path), 0.0)
        assert f"The best is chosen again in {chosen:.0%} of random ways to break ties between edges" in plan.text
        assert "draws of the patients" not in plan.text  # such an affinity gives no cost per pair of patients
        assert graph(affinity=near_to(1.2)).kept == [1.0]

    def test_patients_are_drawn_anew(self, graph):
        class Crossed:
            """The first patients of both tasks have a small distance, all others a larger one."""

            def __call__(self, a, b):
                return float(self.pairs(a, b).mean())

            def pairs(self, a, b):
                firsts = np.add.outer(np.arange(len(a.items)), np.arange(len(b.items)))
                return firsts * (1.0 + TASKS.index(a.name) * 0.1)

        plan = self.plan(graph(affinity=Crossed()))
        drawn = plan.survival["patients"]
        assert drawn["path"].sum() == pytest.approx(1) == drawn["single"].sum()
        assert drawn["path", " -> ".join(plan.path)] > 0.9
        assert drawn["single", plan.single] == 1
        assert "of draws of the patients. Nearest" in plan.text

    def test_a_draw_keeps_the_mean_and_counts_nobody_twice_against_himself(self):
        tasks = [TaskVolumes(name, tuple((("i",), str(n)) for n in range(4)), ((1,),), 4) for name in TASKS]
        away = dataclasses.replace(tasks[0], name="17-T2-ED")
        costs = np.random.default_rng(0).uniform(size=(4, 4))
        for one, other in ((tasks[0], tasks[1]), (tasks[0], away)):
            drawn = [affinities.redrawn(costs, one, other, draw) for draw in range(4000)]
            assert np.mean(drawn) == pytest.approx(costs.mean(), abs=0.01)
            assert np.std(drawn) > 0.01
        apart = 1 - np.eye(4)
        assert [affinities.redrawn(apart, *tasks[:2], draw) for draw in range(5)] == pytest.approx([0.75] * 5)

    def test_an_unreachable_target_is_refused(self, graph):
        with pytest.raises(InputError, match="no source shares modality or objective with the target 17-T2-ED"):
            assert self.plan(graph(["14-FLAIR-ET"])).single

    def test_a_graph_is_made_once_for_any_target(self, graph, monkeypatch):
        made = graph(affinity="seqtran")
        made.write()
        folder = made.here.folder
        names = {file.name for file in folder.iterdir()}
        graphs = {f"task_graph.{suffix}" for suffix in ("json", "graphml", "png", "svg")}
        assert names == {"answer.txt", "clusters.csv"} | graphs
        file = {"task_graph": str(folder / "task_graph.json")}
        with pytest.raises(InputError, match="made with the affinity seqtran, whose costs have another scale"):
            assert graph(affinity="context", **file).graph
        with pytest.raises(InputError, match="differ in 14-FLAIR-ET"):
            assert graph(TASKS[:3], affinity="seqtran", **file).graph
        monkeypatch.setattr(SeqTranAffinity, "__call__", lambda *_: pytest.fail("costs again"))
        again = graph(affinity="seqtran", **file)
        assert again.clusters == made.clusters
        costs = [{frozenset(e[:2]): e[2] for e in of.graph.edges(data="weight")} for of in (made, again)]
        assert costs[0] == costs[1]

    def test_one_source_is_a_graph_too(self, graph):
        made = graph(TASKS[:1], n_clusters=3)
        with pytest.warns(UserWarning, match="n_clusters is 3, but there are 1 source tasks: each is its own cluster"):
            assert made.clusters == [[TASKS[0]]]
        assert self.plan(made).single == TASKS[0]

    @pytest.mark.parametrize("wrong", [None, 0, 1.5, True])
    def test_clusters_are_counted(self, graph, wrong):
        with pytest.raises(InputError, match="expected a whole number, 1 or more"):
            assert graph(n_clusters=wrong).clusters


def test_the_figure_shows_clusters_sizes_and_the_path():
    costs = np.abs(np.subtract.outer(np.arange(4), np.arange(4))).astype(float)
    graph = task_graph(TASKS, costs, sizes={task: 10 - n for n, task in enumerate(TASKS)})
    options = {"path": TASKS[:2], "target": "17-T2-ED", "target_costs": {"14-T2-ED": 1.0, "14-T2-ET": 0.2}}
    clusters, ringed = [TASKS[:2], TASKS[2:]], [TASKS[0], TASKS[2]]
    figure = plot_task_graph(graph, clusters, representatives=ringed, synthetic=True, **options)
    axes = figure.axes[0]
    assert {*TASKS, "17-T2-ED"} <= {text.get_text() for text in axes.texts}
    assert len([text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]) == 2
    dots = [points for points in axes.collections if len(points.get_offsets()) == 2 and hasattr(points, "get_sizes")]
    assert len({matplotlib.colors.to_hex(points.get_facecolor()[0]) for points in dots}) == 2
    assert dots[0].get_sizes()[0] > dots[0].get_sizes()[1]
    assert "synthetic phantom" in figure.get_supxlabel()


class TestArms:
    def plan(self, path=("A-T1-ED", "B-T1-ED"), single="C-T1-ED"):
        return SimpleNamespace(path=path, single=single)

    @pytest.fixture
    def chains(self, run_of, tmp_path) -> Callable[..., Chains]:
        def make(source_patients=10, stage_patients=3, train_patients=3) -> Chains:
            run = run_of(source_patients=source_patients, stage_patients=stage_patients)
            target = SimpleNamespace(name="T-T1-ED", train_patients=train_patients)
            folders = {"folder": tmp_path / "arms", "stage_dir": tmp_path / "stages", "source_dir": str(tmp_path)}
            return Chains(here=run, target=target, pool_seed=5, **folders)

        return make

    def test_one_step_and_two_with_decoder_and_all(self, chains):
        arms = {arm.name: arm for arm in arms_of(chains(), self.plan())}
        ways = {"single": "C-T1-ED", "sequential": "A-T1-ED -> B-T1-ED", "direct": "A-T1-ED"}
        assert set(arms) == {f"{way}{kind}" for way, kind in product(ways, ("", "_full"))} | {"zero_shot", "scratch"}
        for (way, tasks), kind in product(ways.items(), ("", "_full")):
            assert steps_of(arms[way + kind])[0] == f"{tasks} -> T-T1-ED"
            assert all(("freeze" in job.overrides) == (kind == "_full") for job in arms[way + kind].jobs[1:])
        assert arms["single_full"].last.overrides["freeze"] is None
        steps = [job.overrides for job in arms["sequential"].jobs]
        first, *later = (step["source"] for step in steps)
        assert [first, *(source["task"] for source in later)] == ["A-T1-ED", "A-T1-ED", "B-T1-ED"]
        assert [source["checkpoint"] for source in later] == [job.model for job in arms["sequential"].jobs[:-1]]
        assert [step["seed"] for step in steps] == [5, 0, 0]
        assert arms["zero_shot"].last.overrides["epochs"] == 0
        first = [job.output_dir for job in arms["zero_shot"].jobs[:1]]
        assert first == [job.output_dir for job in arms["single"].jobs[:1]]  # trained once

    @pytest.mark.parametrize(
        ("changed", "names"),
        [
            ({"single": "A-T1-ED"}, {"single", "sequential"}),
            ({"path": None}, {"single"}),
            ({"path": ("A-T1-ED",)}, {"single", "direct"}),
            ({"path": ("C-T1-ED",)}, {"single"}),
        ],
    )
    def test_what_is_the_same_is_trained_once(self, chains, changed, names):
        arms = arms_of(chains(), self.plan(**changed), zero_shot=False)
        assert {arm.name for arm in arms} == {"scratch"} | names | {f"{name}_full" for name in names}

    @pytest.mark.parametrize(
        ("spent", "expected"),
        [((10, 3, 3), ["3", "10", "10 + 3", "7 + 3 + 3"]), ((None, 3, 5), ["5", "all", "all + 5", "all + 3 + 5"])],
    )
    def test_the_patients_that_an_arm_spends_are_said(self, chains, spent, expected):
        arms = {arm.name: arm for arm in arms_of(chains(*spent), self.plan())}
        assert [steps_of(arms[name])[1] for name in ("scratch", "zero_shot", "single", "sequential")] == expected

    def test_a_joint_training_on_fewer_patients_is_another(self, chains):
        """Studies share the pool; two may have the same total number of patients, but divided differently."""

        def joint(source_patients, stage_patients):
            return chains(source_patients, stage_patients).arm("both", "A-T1-ED", "B-T1-ED", joint=True).jobs[0]

        assert joint(10, 3).output_dir != joint(12, 5).output_dir
        assert joint(None, 3).output_dir != joint(None, 5).output_dir
        assert joint(10, 3).output_dir == joint(10, 3).output_dir
        assert joint(10, 3).overrides["joint_patients"] == 3
        assert joint(10, 3).config["train_patients"] == 7

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
        one = second_step_text(self.rows(gain, 8, noise), self.plan(path=("A-T1-ED",)))
        assert one == "There is no second step: max_intermediates is 0."

    @pytest.mark.parametrize("patients", [1, 2, 3, 4])
    def test_few_patients_do_not_settle_it(self, patients):
        """Two patients with nearly the same large gain have a narrow interval."""
        text = second_step_text(self.rows(0.2, patients, 0.0001), self.plan())
        assert ("the second step helps" in text) == (patients == 4)
        assert ("cannot decide whether a second step helps; this needs at least 4;" in text) == (patients < 4)
        assert "the path against the better single source (single_full) is +0.200 Dice" in text


class TestStudy:
    def scores(self, gain: float) -> pd.DataFrame:
        """Dice of six patients for two targets of one institution, two seeds, and every way to choose."""
        ways = {("none", "scratch"): -0.1, ("single", "random"): -0.05, ("single", "near"): 0.0}
        ways |= {("single", "near: head of its path"): -0.02, ("path", "random"): -0.05, ("path", "near"): gain}
        ways |= {("joint", "near"): 0.0}
        rng = np.random.default_rng(0)
        rows = []
        for target, seed in product(["B-T1-ED", "B-T2-ED"], [0, 1]):
            base = {f"p{i}": rng.uniform(0.4, 0.6) for i in range(6)}
            for ((steps, how), more), (patient, value) in product(ways.items(), base.items()):
                rows.append((target, seed, steps, how, patient, value + more + rng.normal(0, 0.005)))
        return pd.DataFrame(rows, columns=["target", "seed", "steps", "how", "patient", "dice"])

    def compared(self, scores: pd.DataFrame, pair=("path, near", "single, near")) -> pd.Series:
        return differences(scores, ["near"]).set_index(["first", "second"]).loc[pair]

    def text(self, scores: pd.DataFrame) -> str:
        choices = scores.groupby(["target", "seed", "steps", "how"], sort=False)["dice"].mean().reset_index()
        return study_text(*self.table(), choices, scores, ["near"], synthetic=True, trained="at equal numbers")

    def table(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Arms of one target, and their patients."""
        dice = {"A-T1-ED": 0.5, "A-T2-ED": 0.3, "A-T2-ED > A-T1-ED": 0.45, "A-T1-ED > A-T2-ED": 0.4}
        rows = [("B-T1-ED", 0, arm, 1 + (">" in arm), value) for arm, value in dice.items()]
        table = pd.DataFrame(rows, columns=["target", "seed", "arm", "steps", "dice"])
        names = pd.DataFrame({"patient": [f"p{n}" for n in range(6)]})
        patients = table.drop(columns="steps").merge(names, how="cross")
        return table, patients.assign(dice=patients["dice"] + np.random.default_rng(0).normal(0, 0.01, 24))

    def test_differences_are_paired_over_patients_each_once(self):
        scores = self.scores(gain=0.1)
        row = self.compared(scores)
        assert row[["patients", "pairs", "left out"]].tolist() == [6, 4, ""]  # both targets are of institution B
        assert float(row["difference"]) == pytest.approx(0.1, abs=0.01)
        assert row["p"] == "0.0312"  # 2 / 2^6: all six gain
        assert float(self.compared(scores, ("path, random", "single, random"))["p"]) > 0.05

    def test_a_patient_of_several_targets_is_one_patient(self):
        """The interval is that of the differences per patient; the number of targets does not matter."""
        gain = {"p1": 0.10, "p2": 0.02, "p3": -0.01, "p4": 0.05}
        runs = product(["B-T1-ED", "B-T2-ED", "B-T2-ET"], [0, 1], [("single", 0), ("path", 1)], gain.items())
        rows = [(*run, steps, "near", name, 0.5 + more * value) for *run, (steps, more), (name, value) in runs]
        row = self.compared(pd.DataFrame(rows, columns=["target", "seed", "steps", "how", "patient", "dice"]))
        expected = paired_comparison(gain, dict.fromkeys(gain, 0.0))
        assert row["interval"] == f"{expected.low:+.3f} to {expected.high:+.3f}"
        assert row["patients"] == 4

    def test_a_patient_of_two_institutions_is_one_patient(self):
        """In a collection, the name of a patient belongs to one person only."""
        elsewhere = self.scores(gain=0.1).replace({"B-T2-ED": "C-T2-ED"})
        assert set(differences(elsewhere, ["near"])["patients"]) == {6}
        there = elsewhere["target"] == "C-T2-ED"
        elsewhere.loc[there, "patient"] = "C" + elsewhere.loc[there, "patient"]
        assert set(differences(elsewhere, ["near"])["patients"]) == {12}

    def test_only_what_both_sides_have_is_compared(self):
        """Seed 1 of B-T2-ED is harder by 0.2 and has no path; this must not look like a gain of the path."""
        scores = self.scores(gain=0.1)
        hard = (scores["target"] == "B-T2-ED") & (scores["seed"] == 1)
        scores.loc[hard, "dice"] -= 0.2
        of_path = (scores["steps"].isin(["path", "joint"])) & (scores["how"] == "near")
        fewer = scores[~(hard & of_path)]
        row = self.compared(fewer)
        assert float(row["difference"]) == pytest.approx(0.1, abs=0.01)
        assert row[["patients", "pairs", "left out"]].tolist() == [6, 3, "B-T2-ED (seed 1)"]
        assert self.compared(fewer, ("single, near", "single, random"))["pairs"] == 4
        rows = {tuple(line.split(" | ")[:2]): line for line in self.text(fewer).splitlines()}
        assert rows["| path, near", "single, near"].endswith("| 6 | 3 | B-T2-ED (seed 1) |")
        assert rows["| path", "near"].endswith("| 3 |")
        assert rows["| single", "near"].endswith("| 4 |")
        row = self.compared(scores[~(of_path & (scores["target"] == "B-T2-ED"))])
        assert row[["pairs", "left out"]].tolist() == [2, "B-T2-ED"]  # all seeds of it
        first = of_path & (scores["target"] == "B-T1-ED") & (scores["seed"] == 0)
        row = self.compared(scores[~(first & ~scores["patient"].isin(["p0", "p1"]))])
        assert row[["patients", "pairs", "left out"]].tolist() == [6, 4, "of a pair: 4 patients"]

    def test_an_affinity_without_any_path_is_compared_all_the_same(self):
        scores = self.scores(gain=0.1)
        without = scores[~(scores["steps"].isin(["path", "joint"]) | scores["how"].str.contains("head"))]
        assert self.compared(without, ("single, near", "single, random"))["patients"] == 6

    def test_the_spread_of_seeds_is_over_the_same_targets(self):
        """A seed without a path to the easier target would look like a spread of 0.2."""
        runs = product({"B-T1-ED": 0.8, "B-T2-ED": 0.4}.items(), (0, 1))
        rows = [(target, seed, "path", "near", "p", dice) for (target, dice), seed in runs]
        scores = pd.DataFrame(rows[1:], columns=["target", "seed", "steps", "how", "patient", "dice"])
        assert "| path | near | 0.800 | 0.400 | 0.600 | 0.000 | 3 |" in self.text(scores)

    def test_gains_are_against_the_paths_own_sources(self):
        table, patients = self.table()
        found = gains(table, patients).set_index(["second step", "target"])
        assert list(found) == ["paths", "against the first", "interval", "against the better"]
        figures = ["paths", "against the first", "against the better"]
        assert found.loc[("brings the target's modality", "all"), figures].tolist() == pytest.approx([1, 0.15, -0.05])
        assert found.loc[("any other", "B-T1-ED"), figures].tolist() == pytest.approx([1, -0.1, -0.1])
        of = {arm: rows.set_index("patient")["dice"].to_dict() for arm, rows in patients.groupby("arm")}
        expected = paired_comparison(of["A-T2-ED > A-T1-ED"], of["A-T2-ED"])
        interval = f"{expected.low:+.3f} to {expected.high:+.3f}"
        assert found.loc[("brings the target's modality", "all"), "interval"] == interval
        # Two paths with the same six patients do not give twelve patients.
        twice = gains(*(pd.concat([rows, rows.assign(seed=1)]) for rows in (table, patients)))
        assert twice["interval"].tolist() == found["interval"].tolist()
        assert twice["paths"].tolist() == (2 * found["paths"]).tolist()

    def test_the_page_holds_every_way_to_choose(self):
        scores = self.scores(gain=0.0)
        text = self.text(scores)
        for steps, how in scores[["steps", "how"]].drop_duplicates().itertuples(index=False):
            assert f"| {steps} | {how} |" in text
        assert "**Synthetic**" in text
        assert "at equal numbers" in text


def test_the_published_paths_gain_where_the_modality_is_not_ideal():
    """Table 3 of the paper, which gives the best single source and the best path of each target in percent."""
    table = pd.read_csv(REPOSITORY / "docs" / "results" / "papers" / "sequential_transfer_table3.csv")
    best = table.set_index("target").set_axis(["single", "path"], axis=1)
    _, ideal, said = study.ideal_modality(best / 100)
    assert ideal.set_index("objective").idxmax(axis=1).to_dict() == {
        "16, ED": "Flair", "16, ET": "T1ce", "16, NCR": "T1ce", "iSeg, WM": "T1", "iSeg, GM": "T1", "iSeg, CSF": "T1"
    }  # fmt: skip
    assert "on 1 of 6 in the ideal modality (-0.016), on 12 of 12 in another (+0.025)" in said
    assert study.ideal_modality(best[-3:]) == []  # WMH on FLAIR alone


class TestSeries:
    """fit.json and study.json, with the sources in their own collection file, which lacks the targets' hospital."""

    @pytest.fixture
    def series(self, collection, tmp_path, no_determinism_left_behind) -> Callable[..., Path]:
        content = json.loads(collection.read_text())
        for name in ("14", "17"):
            subjects = [subject for subject in content["subjects"] if subject["institution"] == name]
            collection.with_name(f"{name}.json").write_text(json.dumps(content | {"subjects": subjects}))
        settings = {f"{of}collection": str(collection.with_name(f"{n}.json")) for of, n in (("", 17), ("source_", 14))}
        settings |= {"affinity_patients": 1, "source_patients": 2, "stage_patients": 1, "train_patients": 1}
        settings |= {"source_dir": str(tmp_path / "pool"), "n_clusters": 1}
        own = {"fit": {"targets": ["17-T2-ED"]}, "study": {"seeds": [0], "affinities": ["context"]}}
        own["study"]["targets"] = ["17-T2-ED", "17-FLAIR-ED"]

        def run(config: str, *, out: str = "out", **changed) -> Path:
            asked = {"sources": TASKS[:3], "output_dir": str(tmp_path / out)} | own[config]
            asked |= {name: value for name, value in changed.items() if name in SEQUENTIAL.content(config)}
            options = {name: value for name, value in changed.items() if name not in asked}
            SEQUENTIAL.run(base=config, settings=settings | options, **asked)
            return tmp_path / out

        return run

    def measured(self, folder: Path, **changed) -> str:
        rows = {"source": TASKS[:3], "target": "17-T2-ED", "dice": [0.5, 0.3, 0.45]} | changed
        pd.DataFrame(rows).to_csv(folder / "measured.csv", index=False)
        return str(folder / "measured.csv")

    def test_weights_are_fitted_to_two_files_as_to_one(self, series, collection, tmp_path):
        shared = {"transfers": self.measured(tmp_path)}
        one = series("fit", **shared, out="one", collection=str(collection), source_collection="@collection")
        weights = [(folder / "affinity_weights.json").read_text() for folder in (one, series("fit", **shared))]
        assert weights[0] == weights[1]

    @pytest.mark.parametrize(
        ("config", "changed", "message"),
        [
            ("fit", {"sources": TASKS[:1]}, "a fit needs at least three transfers; from"),
            ("fit", {"targets": ["14-T2-ED"], "sources": TASKS[:1]}, "to ['14-T2-ED'] there are 0."),
            ("fit", {"sources": [*TASKS[:2], "14-T2-EDD"]}, "objective 'EDD' is unknown"),
            ("fit", {"source_patients": 99}, "task 14-T2-ED has 4 training patients, fewer than the 99"),
            ("fit", {"train_patients": 99}, "task 17-T2-ED has 4 training patients, fewer than the 99"),
            ("fit", {"sources": [*TASKS[:2], TASKS[0]]}, "sources names 14-T2-ED twice"),
            ("fit", {"transfers": "nowhere.csv"}, "nowhere.csv cannot be read"),
            ("study", {"targets": ["17-T2-ED"]}, "a study needs two targets or more"),
            ("study", {"targets": ["17-T2-ED", "17-T2-ED"]}, "targets names 17-T2-ED twice"),
            ("study", {"seeds": [0, 0]}, "seeds names 0 twice"),
            ("study", {"sources": ["14-FLAIR-ET"]}, "with the target 17-T2-ED; add such"),
            ("study", {"source_patients": None, "stage_patients": 99}, "task 14-T2-ED has 4 training patients, fewer"),
            ("study", {"source_patients": 3, "stage_patients": 3}, "3 patients leave none to pre-train on"),
            ("study", {"stage_patients": None}, "stage_patients is None; expected a whole number, 1 or more"),
            ("study", {"max_intermediates": 2}, "max_intermediates, which must be 1 in a study"),
        ],
    )
    def test_what_makes_no_sense_is_refused_before_training(self, config, changed, message, series, no_training):
        assert message in refused(lambda: series(config, **changed))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"dice": [0.5, math.inf, 0.4]}, "line 3 has no dice between 0 and 1"),
            ({"dice": [0.5, 55, 0.4]}, "line 3 has no dice between 0 and 1"),
            ({"dice": [0.5, "", 0.4]}, "line 3 has no dice between 0 and 1"),
            ({"target": ["17-T2-ED", TASKS[1], "17-T2-ED"]}, "line 3 is from a task to itself"),
            ({"source": TASKS[:2], "dice": [0.5, 0.4]}, "needs at least three transfers"),
        ],
    )
    def test_transfers_that_cannot_be_are_named(self, changed, message, series, tmp_path):
        assert message in refused(lambda: series("fit", transfers=self.measured(tmp_path, **changed)))

    def test_a_file_of_transfers_has_its_columns(self, series, tmp_path):
        (tmp_path / "bad.csv").write_text("source,target\na,b\n")
        assert "lacks the column(s) dice" in refused(lambda: series("fit", transfers=str(tmp_path / "bad.csv")))

    def test_a_study_says_what_each_way_to_choose_picks(self, series, monkeypatch):
        asked = []

        def train_arms(_, arms, what):
            """Two patients differ by 0.1. Later arms get a higher Dice, but a lower LEEP."""
            asked.extend(arms)
            for place, arm in enumerate(arms):
                dice = {"p0": 0.1 + place / 100, "p1": 0.2 + place / 100}
                rows = [(0, "test", name, "ED", value, 0.5) for name, value in dice.items()]
                rows += [(0, "val", name, "ED", 1 - value, 0.5) for name, value in dice.items()]
                table = pd.DataFrame(rows, columns=["seed", "split", "subject", "class", "dice", "iou"])
                arm.last.output_dir.mkdir(parents=True)
                table.assign(method=arm.name).to_csv(arm.last.output_dir / "metrics.csv", index=False)
                if len(arm.jobs) > 1:
                    (arm.last.output_dir / "leep.json").write_text(json.dumps({"leep": -place}))

        monkeypatch.setattr(Run, "train_arms", train_arms)
        folder = series("study", seeds=[0, 1])

        jobs = [job for arm in asked for job in arm.jobs]
        used = {(job.overrides["target_task"][:2], job.overrides.get("collection", "the target's")) for job in jobs}
        assert {(of, Path(where).name) for of, where in used} == {("14", "14.json"), ("17", "the target's")}
        seeds = {(arm.last.output_dir.parent.name, f"seed{job.overrides['seed']}") for arm in asked for job in arm.jobs}
        assert seeds == {("seed0", "seed0"), ("seed1", "seed1")}
        trained = {job.output_dir: str(sorted(job.overrides.items())) for job in jobs}
        assert all(str(sorted(job.overrides.items())) == trained[job.output_dir] for job in jobs)

        tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("study", "choices", "patients")}
        mine = {name: of[(of["target"] == "17-T2-ED") & (of["seed"] == 1)] for name, of in tables.items()}
        arms = mine["study"].set_index("arm")
        picks = mine["choices"].set_index(["steps", "how"])["pick"]
        steps = {kind: arms[arms["steps"] == kind] for kind in (-1, 0, 1, 2)}
        assert {kind: len(of) for kind, of in steps.items()} == {-1: 1, 0: 1, 1: 3, 2: 4}
        assert picks["single", "best in hindsight"] == steps[1].index[-1] == steps[1]["dice"].idxmax()
        assert picks["single", "LEEP"] == steps[1].index[0]
        assert picks["path", "best in hindsight"] == steps[2].index[-1]
        assert (picks["single", "random"], picks["path", "random"]) == ("mean of 3", "mean of 4")
        assert picks["none", "scratch"] == "scratch"
        first, second = picks["path", "context"].split(" > ")
        assert picks["single", "context: head of its path"] == first
        assert picks["joint", "context"] == f"{first} + {second}" == steps[-1].index[0]
        dice = mine["choices"].set_index(["steps", "how"])["dice"]
        assert dice["path", "random"] == pytest.approx(steps[2]["dice"].mean())
        of_patients = mine["patients"].pivot(index="arm", columns="patient", values="dice")
        assert of_patients.mean(axis=1).to_dict() == pytest.approx(arms["dice"].to_dict())
        assert np.allclose(of_patients["p1"] - of_patients["p0"], 0.1)
        assert "| path | context |" in (folder / "study.md").read_text()

        asked.clear()
        folder = series("study", draws=2, full=False, out="drawn")
        trained = [arm.name for arm in asked if arm.last.overrides["target_task"] == "17-T2-ED"]
        choices = pd.read_csv(folder / "choices.csv").set_index(["target", "steps", "how"]).loc["17-T2-ED"]
        assert choices.loc[("path", "random"), "pick"] == choices.loc[("single", "random"), "pick"] == "mean of 2"
        assert len([name for name in trained if ">" in name]) in (2, 3)  # and the chosen one, if it is not drawn
        assert choices.loc[("path", "context"), "pick"] in trained
        assert {arm.last.overrides.get("freeze", "its own") for arm in asked if len(arm.jobs) > 1} == {"its own"}
        assert "random: the mean of 2 draws" in (folder / "study.md").read_text()


class TestFit:
    """Six transfers to each of several targets, whose Dice and distance from everything differ."""

    @staticmethod
    def transfers(effect, targets: str = "abc") -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for place, (target, level) in enumerate(zip(targets, np.linspace(0.9, 0.2, len(targets)), strict=True)):
            distance, similarity = rng.uniform(10, 20, 6), rng.uniform(0.5, 0.9, 6)
            dice = level + effect(place, distance, similarity) + rng.normal(0, 1e-4, 6)
            # A target that is far from everything, but easy: between targets, the cost has the wrong sign.
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
        assert "of 3 targets left out, 3 have a negative correlation, and on 3 it is lower" in fit_text(found)
        assert "No evidence" in fit_text(found)
        assert "fewer than 5 cannot show it" in fit_text(found)

    def test_five_targets_that_agree_are_evidence(self):
        found = fit_to_transfers(self.transfers(lambda _, d, s: -0.01 * d - 0.4 * (1 - s), "abcde"))
        assert [found[f"targets_{kind}"] for kind in ("left_out", "predicted", "better")] == [5, 5, 5]
        assert "Prefer these weights to the published ones" in fit_text(found)

    def test_both_weights_are_judged_by_the_mean_over_targets(self):
        """Dice varies most for target a, so a correlation over all rows would be that of a."""
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
            table = pd.DataFrame({"target": np.repeat(range(targets), 6), "dice": rng.uniform(0.4, 0.8, 6 * targets)})
            table["distance"], table["similarity"] = (rng.uniform(*ends, len(table)) for ends in ((5, 40), (0.2, 0.9)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                preferred += "No evidence" not in fit_text(fit_to_transfers(table))
        assert preferred <= 3

    def test_evidence_takes_both_signs_and_a_lead(self):
        shared = {"alpha": 1.0, "beta": 1.0, "transfers": 30, "targets_left_out": 5, "correlation": -0.9}
        good = {"correlation_left_out": -0.5, "correlation_published": -0.3}
        good |= {"targets_predicted": 5, "targets_better": 5}
        assert "Prefer" in fit_text(shared | good)
        for wrong in ({"correlation_published": -0.6}, {"targets_predicted": 4}, {"targets_better": 4}):
            assert "No evidence" in fit_text(shared | good | wrong)

    @pytest.mark.filterwarnings("ignore:No weights")
    def test_a_similarity_that_is_the_same_within_targets_says_nothing(self):
        """Centring 0.1 and 0.7 leaves 1e-17, which is no reason for a weight of 1e15."""
        for seed in range(20):
            rng = np.random.default_rng(seed)
            table = pd.DataFrame({"target": np.repeat([*"abc"], 5), "dice": rng.uniform(0.4, 0.8, 15)})
            table["distance"], table["similarity"] = rng.uniform(5, 40, 15), np.repeat(rng.uniform(0.2, 0.95, 3), 5)
            assert fit_to_transfers(table)["beta"] == 0

    def test_says_when_the_weights_do_not_carry_over(self):
        table = self.transfers(lambda place, distance, _: (0.01, -0.01, 0.01)[place] * distance)
        with pytest.warns(UserWarning, match="closest ones"):
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
        assert "unknown on targets left out" in fit_text(found)
        assert "No evidence" in fit_text(found)
