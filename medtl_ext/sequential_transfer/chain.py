"""Fine-tuning along a path, as a chain of ordinary trainings of the bundle, and what it is worth beside one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
from monai.engines import Evaluator

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError
from medtl_ext.ranking import MINIMUM_PATIENTS, PairedComparison, Verdict, paired_comparison
from medtl_ext.sequential_transfer.plan import Plan, PlanPath
from medtl_ext.transfer.arms import arm_rows, finetuning_job
from medtl_ext.transfer.jobs import Arm, Job, Run
from medtl_ext.transfer.report import audit_report, patient_table
from medtl_ext.transfer.sources import Source, pretraining_job, source_collection
from medtl_ext.transfer.tasks import SegmentationTask

MARGIN = 0.01
"""The smallest difference in mean Dice worth acting on, of the audit and of a second step."""


class Chains:
    """Arms that lead to a target: each training once, in a folder of its own, however many arms share it.

    Args:
        run: its config's ``source_patients`` are spent on the sources of an arm in all, ``stage_patients`` of them on
            each intermediate task; its seed is of every fine-tuning and draw of patients.
        target: with the patients that it trains on.
        folder, stage_dir: of the trainings on the target, and on intermediate tasks.
        source_dir, pool_seed: of the pre-trainings, which later runs find there.
    """

    def __init__(
        self,
        run: Run,
        target: SegmentationTask,
        *,
        folder: Path,
        stage_dir: Path,
        source_dir: str,
        pool_seed: int,
    ) -> None:
        self.here, self.target, self.folder, self.stage_dir = run, target, folder, stage_dir
        self.source_dir, self.pool_seed = source_dir, pool_seed
        self.each = run.config["stage_patients"]
        self._pretrainings: dict[tuple[str, int | None], Job] = {}

    def arm(self, name: str, *tasks: str, full: bool = True, joint: bool = False, **options: Any) -> Arm:
        """Pre-train on the first task, fine-tune on the others in turn, then on the target.

        Args:
            name: of the arm.
            tasks: the sources, first to last; none to train from scratch.
            full: train all parameters at every step, not the decoder alone.
            joint: train on the sources together, not one after the other.
            options: of the last step.
        """
        jobs = self._joint(*tasks) if joint else self._sources(tasks, full=full)
        options |= {"train_patients": self.target.train_patients}
        if not jobs:
            last = finetuning_job(self.here, self.folder / name, None, target_task=self.target.name, **options)
        else:
            last = self._step(self.folder / name, self.target.name, jobs[-1], full=full, method=name, **options)
        return Arm(name, (*jobs, last))

    def _sources(self, tasks: Sequence[str], *, full: bool) -> list[Job]:
        jobs = [self._pretraining(tasks[0], len(tasks) - 1)] if tasks else []
        for n, task in enumerate(tasks[1:], start=2):
            folder = self.stage_dir / jobs[0].output_dir.name / "_".join(tasks[1:n])
            folder /= f"{'full' if full else 'decoder'}_seed{self.here.seed}"
            where = {"collection": source_collection(self.here.config), "train_patients": self.each}
            jobs.append(self._step(folder, task, jobs[-1], full=full, **where))
        return jobs

    def _step(self, folder: Path, task: str, before: Job, *, full: bool, **options: Any) -> Job:
        source = Source(before.overrides["target_task"], "task", checkpoint=before.model)
        options |= {"target_task": task} | ({"freeze": None} if full else {})
        return finetuning_job(self.here, folder, source, overlay="stage", **options)

    def _pretraining(self, task: str, n_later: int) -> Job:
        """On the patients that the later tasks leave, so that all arms spend as many; made once, for it reads files."""
        total = self.here.config["source_patients"]
        patients = None if total is None else total - n_later * self.each
        if patients is not None and patients < 1:
            raise InputError(
                f"source_patients is {total}, of which {n_later} intermediate tasks of {self.each} patients leave none "
                "to pre-train on; raise source_patients."
            )
        if (task, patients) not in self._pretrainings:
            config, source = self.here.config | {"train_patients": patients}, Source(task, "task", task=task)
            self._pretrainings[task, patients] = pretraining_job(config, self.source_dir, source, seed=self.pool_seed)
        return self._pretrainings[task, patients]

    def _joint(self, first: str, second: str) -> list[Job]:
        """One network trained on the patients of both tasks together."""
        job = self._pretraining(first, 1)
        folder = job.output_dir.with_name(f"{job.output_dir.name}_with_{second}_{self.each}")
        overlays = [*job.overlays, self.here.configs / "joint.json"]
        overrides = {**job.overrides, "joint_task": second, "joint_patients": self.each}
        return [replace(job, output_dir=folder, overlays=overlays, overrides=overrides)]


def steps_of(arm: Arm) -> Iterator[tuple[str, str]]:
    """Task and labelled patients of each step of an arm, those of the target last; None where nothing is trained."""
    for job in arm.jobs:
        settings = {**job.config, **job.overrides}
        patients = settings["train_patients"]
        yield settings["target_task"], None if settings["epochs"] == 0 else "all" if patients is None else str(patients)


def arms_of(chains: Chains, plan: Plan, *, zero_shot: bool = True) -> list[Arm]:
    """What a plan is compared by: one step and two, the decoder alone and all parameters, no step and no source.

    Without ``zero_shot`` the untouched source is left out, as it has to be where its classes are not the target's.
    """
    arms = [chains.arm("zero_shot", plan.single, epochs=0, val_interval=1)] if zero_shot else []
    arms.append(chains.arm("scratch"))
    ways = {"single": (plan.single,)}
    if plan.path is not None:
        if len(plan.path) > 1:
            ways["sequential"] = plan.path
        if plan.path[0] != plan.single:
            ways["direct"] = plan.path[:1]
    for name, tasks in ways.items():
        arms += [chains.arm(name, *tasks, full=False), chains.arm(f"{name}_full", *tasks)]
    return arms


class NoteLEEP:
    """A step that writes ``leep.json``: LEEP of the source network on the images that it will be fine-tuned on.

    Args:
        evaluator: whose metric ``leep`` it is.
        output_dir: where it goes.
    """

    def __init__(self, *, evaluator: Evaluator, output_dir: str) -> None:
        self.evaluator, self.file = evaluator, Path(output_dir) / "leep.json"

    def run(self) -> None:
        self.evaluator.run()
        if idist.get_rank() == 0:
            write_json(self.file, {"leep": float(self.evaluator.state.metrics["leep"])})


class FollowPath:
    """A step that trains along the path, and all that it is compared with at as many labelled patients.

    Writes the files of `medtl_ext.transfer.audit_report`, ``arms.csv`` (Dice and IoU of each arm) and ``answer.txt``,
    and prints the answer. The folder of each training is kept, so that an interrupted run goes on where it stopped.

    Args:
        plan: which path.
        source_dir, pool_seed: where pre-trained networks are kept, and the seed of their training.
    """

    def __init__(self, *, plan: PlanPath, source_dir: str, pool_seed: int) -> None:
        self.here, self.plan, self.source_dir, self.pool_seed = plan.here, plan, source_dir, pool_seed

    def run(self) -> Verdict | None:
        """The verdict of the validation patients; None without any, and in all but the first of several processes."""
        if not self.here.leads:
            return None
        folder, target, plan = self.here.folder, self.plan.target, self.plan.plan
        chains = Chains(
            self.here,
            target,
            folder=folder / "arms",
            stage_dir=folder / "stages",
            source_dir=self.source_dir,
            pool_seed=self.pool_seed,
        )
        arms = arms_of(chains, plan, zero_shot=self.plan.graph.open(plan.single).n_classes == target.n_classes)
        self.here.train_arms(arms, f"paths to {target.name}")
        rows, spent = arm_rows(arms), spent_text(self.plan.source_patients)
        table = arms_table(rows, arms)
        write_csv(folder / "arms.csv", table)
        verdict, answer = None, "No patient is left to validate on, so nothing is decided: --val_split val needs some."
        if "val" in set(rows["split"]):
            method = "sequential_full" if "sequential_full" in set(rows["method"]) else "single_full"
            title = f"Ways to {target.name}, {spent}"
            verdict = audit_report(rows, folder, method=method, synthetic=target.synthetic, margin=MARGIN, title=title)
            answer = f"{second_step_text(rows, plan)} {verdict.text}"
        write_text(folder / "answer.txt", f"{self.plan.text} {answer}")
        shown = table[table["split"] == "test"].drop(columns="split")
        print(f"On the test patients, {spent}:\n{shown.to_string(index=False, float_format='{:.3f}'.format)}\n{answer}")
        return verdict


def spent_text(source_patients: int | None) -> str:
    """What labelled patients of their sources arms spend, for a title."""
    if source_patients is None:
        return "each with all patients of its first source"
    return f"at equal numbers of labelled patients ({source_patients} of sources)"


def arms_table(rows: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """Dice and IoU of every arm on each split, the best first, and the labelled patients that its steps spent."""
    scores = patient_table(rows).groupby(["split", "method"])[["dice", "iou"]].mean().reset_index()
    steps = {arm.name: list(zip(*steps_of(arm), strict=True)) for arm in arms}
    scores.insert(2, "path", [" -> ".join(steps[name][0]) for name in scores["method"]])
    scores.insert(3, "patients", [" + ".join(filter(None, steps[name][1])) for name in scores["method"]])
    return scores.sort_values(["split", "dice"], ascending=[True, False])


def second_step_text(rows: pd.DataFrame, plan: Plan) -> str:
    """Whether the intermediate task was worth it on the validation patients, against one step in the same way."""
    if plan.path is None:
        return "One step is all there is."  # the plan says why
    if len(plan.path) == 1:
        return "One step is all there is: max_intermediates is 0."
    patients = patient_table(rows)
    patients = patients[patients["split"] == "val"].pivot_table(index="subject", columns="method", values="dice")
    sentences = []
    if len(patients) < MINIMUM_PATIENTS:
        count = f"{len(patients)} validation patient{'s' if len(patients) > 1 else ''}"
        sentences = [f"{count} cannot settle whether a second step helps, which takes at least {MINIMUM_PATIENTS}"]
    for suffix, what in (("_full", "all parameters"), ("", "decoder only")):
        one = patients.filter([f"single{suffix}", f"direct{suffix}"]).mean().idxmax()
        gap = paired_comparison(patients[f"sequential{suffix}"].to_dict(), patients[one].to_dict(), n_resamples=999)
        figures = f"the path against the better single source ({one}) is {gap.difference:+.3f} Dice"
        if gap.patients >= MINIMUM_PATIENTS:
            figures = f"{_judgement(gap)}, {figures} (95 % interval {gap.low:+.3f} to {gap.high:+.3f})"
        sentences.append(f"{what}: {figures}")
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _judgement(gap: PairedComparison) -> str:
    """What the path's lead over one step says of the second step."""
    if gap.low > 0 and gap.difference >= MARGIN:
        return "the second step helps"
    if gap.low > 0:
        return f"the second step gains less than {MARGIN:g}, one is enough"
    return "the second step harms" if gap.high < 0 else "no evidence for a second step, one is enough"
