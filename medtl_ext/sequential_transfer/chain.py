"""Fine-tuning along a path as a chain of ordinary trainings, compared with fine-tuning in one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
from monai.engines import Evaluator

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext.ranking import MINIMUM_PATIENTS, PairedComparison, paired_comparison
from medtl_ext.sequential_transfer.plan import PlanPath, first_share
from medtl_ext.transfer import Arm, Job, Run, SegmentationTask, Source, Study, audit_report, patient_table
from medtl_ext.transfer.arms import arm_rows, finetuning_job
from medtl_ext.transfer.report import ALSO
from medtl_ext.transfer.sources.pool import pretraining_job, source_collection

MARGIN = 0.01
"""The smallest difference in mean Dice that matters, for the audit and for a second step."""


@dataclass(kw_only=True, eq=False)
class Chains:
    """Arms that lead to a target. A training that several arms share runs once, in its own folder.

    Args:
        here: the run. ``source_patients`` of its config is the number of patients of all sources of an arm together;
            ``stage_patients`` of them are for each intermediate task. Its seed is used for every fine-tuning and draw.
        target: the target, with the patients to train on.
        folder, stage_dir: folders of the trainings on the target, and on intermediate tasks.
        source_dir, pool_seed: folder and seed of the pre-trainings, which later runs reuse.
    """

    here: Run
    target: SegmentationTask
    folder: Path
    stage_dir: Path
    source_dir: str
    pool_seed: int
    _pretrainings: dict[tuple[str, int | None], Job] = field(default_factory=dict)

    def arm(self, name: str, *tasks: str, full: bool = True, joint: bool = False, **options: Any) -> Arm:
        """Pre-train on the first task, fine-tune on the other tasks in order, then on the target.

        Args:
            name: of the arm.
            tasks: the sources, first to last; without any, train from scratch.
            full: train all parameters at every step, not only the decoder.
            joint: train on the two sources together, not one after the other.
            options: of the last step.
        """
        folder, options = self.folder / name, options | {"train_patients": self.target.train_patients}
        if not tasks:
            return Arm(name, (finetuning_job(self.here, folder, None, target_task=self.target.name, **options),))
        jobs = [self._pretraining(tasks[0], len(tasks) - 1)]
        if joint:
            jobs = [self._joint(jobs[0], *tasks[1:])]
        config, how = self.here.config, f"{'full' if full else 'decoder'}_seed{self.here.seed}"
        where = {"collection": source_collection(config), "train_patients": config["stage_patients"]}
        for n, task in enumerate(() if joint else tasks[1:], start=2):
            stage = self.stage_dir / jobs[0].output_dir.name / "_".join(tasks[1:n]) / how
            jobs.append(self._step(stage, task, jobs[-1], full=full, **where))
        return Arm(name, (*jobs, self._step(folder, self.target.name, jobs[-1], full=full, method=name, **options)))

    def _step(self, folder: Path, task: str, before: Job, *, full: bool, **options: Any) -> Job:
        trained = before.overrides["target_task"]
        source = Source(trained, "task", entry=trained, job=before)
        options |= {"freeze": None} if full else {}
        return finetuning_job(self.here, folder, source, overlay="stage", target_task=task, **options)

    def _pretraining(self, task: str, n_later: int) -> Job:
        """The pre-training on a task; it is kept, because making it reads every file of a collection."""
        config = self.here.config
        patients = first_share(config["source_patients"], config["stage_patients"], n_later)
        if (task, patients) not in self._pretrainings:
            config, source = config | {"train_patients": patients}, Source(task, "task", task=task)
            self._pretrainings[task, patients] = pretraining_job(config, self.source_dir, source, seed=self.pool_seed)
        return self._pretrainings[task, patients]

    def _joint(self, first: Job, second: str) -> Job:
        """One network trained on the patients of both tasks together."""
        patients = self.here.config["stage_patients"]
        folder = first.output_dir.with_name(f"{first.output_dir.name}_with_{second}_{patients}")
        overrides = {**first.overrides, "joint_task": second, "joint_patients": patients}
        overlays = [*first.overlays, self.here.configs / "joint.json"]
        return replace(first, output_dir=folder, overlays=overlays, overrides=overrides)


def chains_to(study: Study, name: str, seed: int) -> Chains:
    """The chains of a study: its trainings are below ``runs``, its pre-trainings in the pool of the seed."""
    run, runs = study.here.seeded(study.here.config, seed), study.here.folder / "runs"
    patients = run.config["train_patients"]
    patients = run.config["stage_patients"] if patients == "@stage_patients" else patients
    target = study.open(name, train_patients=patients, seed=seed)
    folders = {"folder": runs / name / f"seed{seed}", "stage_dir": runs / "stages"}
    return Chains(here=run, target=target, **folders, source_dir=run.config["source_dir"], pool_seed=seed)


def steps_of(arm: Arm) -> tuple[str, str]:
    """The tasks of an arm's steps, and the labelled patients of each: ``a -> b -> target``, ``7 + 3 + 3``."""
    settings = [{**job.config, **job.overrides} for job in arm.jobs]
    patients = [of["train_patients"] for of in settings if of["epochs"] != 0]
    path = " -> ".join(of["target_task"] for of in settings)
    return path, " + ".join("all" if count is None else str(count) for count in patients)


def arms_of(chains: Chains, plan: PlanPath, *, zero_shot: bool = True) -> list[Arm]:
    """The arms that test a plan: one step and two, with the decoder only and with all parameters, and no source.

    ``zero_shot`` adds the untouched source; it must be False if the source's classes are not the target's.
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


@dataclass(kw_only=True, eq=False)
class NoteLEEP:
    """A step that writes ``leep.json``: LEEP of the source network on the images of the fine-tuning.

    Args:
        evaluator: with the metric ``leep``.
        output_dir: folder of the file.
    """

    evaluator: Evaluator
    output_dir: str

    def run(self) -> None:
        self.evaluator.run()
        if idist.get_rank() == 0:
            write_json(Path(self.output_dir) / "leep.json", {"leep": float(self.evaluator.state.metrics["leep"])})


@dataclass(kw_only=True, eq=False)
class FollowPath:
    """A step that trains along the path, and all other arms with the same number of labelled patients.

    Writes the files of `medtl_ext.transfer.audit_report`, ``arms.csv`` (Dice and IoU of each arm) and ``answer.txt``,
    and prints the answer. The folder of each training is kept, so that an interrupted run continues where it stopped.

    Args:
        plan: has the path.
        source_dir, pool_seed: folder of pre-trained networks, and the seed of their training.
    """

    plan: PlanPath
    source_dir: str
    pool_seed: int

    def run(self) -> None:
        """Train, compare and write the results."""
        here, target, plan = self.plan.graph.here, self.plan.target, self.plan
        if not here.leads:
            return
        folders = {"folder": here.folder / "arms", "stage_dir": here.folder / "stages", "source_dir": self.source_dir}
        chains = Chains(here=here, target=target, pool_seed=self.pool_seed, **folders)
        arms = arms_of(chains, plan, zero_shot=plan.graph.open(plan.single).n_classes == target.n_classes)
        here.train_arms(arms, f"paths to {target.name}")
        rows, spent = arm_rows(arms), spent_text(here.config["source_patients"])
        table = arms_table(rows, arms)
        write_csv(here.folder / "arms.csv", table)
        answer = "There are no validation patients, so nothing is decided; give patients for --val_split val."
        if "val" in set(rows["split"]):
            method = "sequential_full" if "sequential_full" in set(rows["method"]) else "single_full"
            said = {"title": f"Ways to {target.name}, {spent}", "synthetic": target.synthetic}
            verdict = audit_report(rows, here.folder, method=method, margin=MARGIN, **said)
            answer = f"{second_step_text(rows, plan)} {verdict.text}"
        write_text(here.folder / "answer.txt", f"{answer} {plan.text} {plan.graph.text}")
        shown = table[table["split"] == "test"].drop(columns="split")
        print(f"On the test patients, {spent}:\n{shown.to_string(index=False, float_format='{:.3f}'.format)}\n{answer}")


def spent_text(source_patients: int | None) -> str:
    """The number of labelled source patients of each arm, for a title."""
    if source_patients is None:
        return "each with all patients of its first source"
    return f"at equal numbers of labelled patients ({source_patients} of sources)"


def arms_table(rows: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """Mean scores of every arm on each split, best first, and the labelled patients of its steps."""
    patients = patient_table(rows)
    measured = [name for name in ("dice", "iou", *ALSO) if name in patients]
    scores = patients.groupby(["split", "method"])[measured].mean()
    steps = pd.DataFrame({arm.name: steps_of(arm) for arm in arms}, index=["path", "patients"]).T
    table = scores.reset_index().join(steps, on="method").sort_values(["split", "dice"], ascending=[True, False])
    return table[["split", "method", "path", "patients", *measured]]


def second_step_text(rows: pd.DataFrame, plan: PlanPath) -> str:
    """Whether the intermediate task was worth it on the validation patients, against one step of the same kind."""
    if plan.path is None:
        return "There is no second step."  # the plan says why
    if len(plan.path) == 1:
        return "There is no second step: max_intermediates is 0."
    patients = patient_table(rows)
    patients = patients[patients["split"] == "val"].pivot_table(index="subject", columns="method", values="dice")
    sentences = []
    if len(patients) < MINIMUM_PATIENTS:
        count = f"{len(patients)} validation patient{'s' if len(patients) > 1 else ''}"
        sentences = [f"{count} cannot decide whether a second step helps; this needs at least {MINIMUM_PATIENTS}"]
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
    """What the difference between the path and one step says about the second step."""
    if gap.low > 0 and gap.difference >= MARGIN:
        return "the second step helps"
    if gap.low > 0:
        return f"the second step gains less than {MARGIN:g}, one is enough"
    return "the second step harms" if gap.high < 0 else "no evidence for a second step, one is enough"
