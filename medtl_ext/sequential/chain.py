"""Fine-tuning along a path, as a chain of ordinary trainings of the bundle, and what it is worth beside one step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
from monai.engines import Evaluator
from monai.transforms import Compose

from medtl_ext._io import write_csv, write_json, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, current_config, run_jobs
from medtl_ext.data import Collection
from medtl_ext.ranking import MINIMUM_PATIENTS, PairedComparison, Verdict, paired_comparison
from medtl_ext.report import audit_report, patient_table
from medtl_ext.sequential.plan import Plan, SourceGraph, plan_text
from medtl_ext.studies import open_collection, pretraining_job
from medtl_ext.transforms import SelectLabelsd

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""The smallest difference in mean Dice worth acting on, of the audit and of a second step."""


@dataclass(frozen=True)
class Arm:
    """One way to use the labels: pre-train on the first task, fine-tune on the others in turn, then on the target.

    Attributes:
        name: ``sequential``, ``direct`` (from the path's first task), ``single`` (from the nearest source), the same
            with ``_full`` (all parameters, not the decoder alone), ``scratch`` or ``zero_shot``.
        tasks: the sources, first to last; none for scratch.
        full: train all parameters at every step.
        epochs: of the last step; None: as the config says.
        joint: train on the sources together, not one after the other.
    """

    name: str
    tasks: tuple[str, ...] = ()
    full: bool = True
    epochs: int | None = None
    joint: bool = False


def arms_of(plan: Plan, *, zero_shot: bool = True) -> list[Arm]:
    """What a plan is compared by: one step and two, the decoder alone and all parameters, no step and no source.

    Without ``zero_shot`` the untouched source is left out, as it has to be where its classes are not the target's.
    """
    arms = [Arm("zero_shot", (plan.single,), epochs=0)] if zero_shot else []
    arms.append(Arm("scratch"))
    ways = {"single": (plan.single,)}
    if plan.path is not None:
        if len(plan.path) > 1:
            ways["sequential"] = plan.path
        if plan.path[0] != plan.single:
            ways["direct"] = plan.path[:1]
    for name, tasks in ways.items():
        arms += [Arm(name, tasks, full=False), Arm(f"{name}_full", tasks)]
    return arms


def source_collection(config: Mapping[str, Any]) -> str | None:
    """The collection file that a bundle's sources are in; None: the phantom."""
    named = config.get("source_collection")
    return config.get("collection") if named == "@collection" else named


def target_patients(config: Mapping[str, Any]) -> int | None:
    """How many labelled patients of the target every arm trains on; None: all."""
    patients = config["train_patients"]
    return config["stage_patients"] if patients == "@stage_patients" else patients


class Chains:
    """The trainings that arms need: each once, in a folder of its own, however many arms share it.

    Args:
        config: of the bundle; ``source_patients`` are spent on the sources of an arm in all, ``stage_patients`` of them
            on each intermediate task, and ``train_patients`` are the target's.
        folder: of the trainings on the target.
        stage_dir: of those on intermediate tasks.
        source_dir: of the pre-trainings, which later runs find there.
        seed: of every fine-tuning and draw of patients.
        pool_seed: of the pre-trainings.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        folder: Path,
        stage_dir: Path,
        source_dir: str | Path,
        seed: int,
        pool_seed: int,
    ) -> None:
        self.config = dict(config)
        self.folder, self.stage_dir, self.source_dir = folder, stage_dir, source_dir
        self.seed, self.pool_seed = seed, pool_seed
        self.configs = Path(config["bundle_root"]) / "configs"
        self.patients = target_patients(config)
        self.source_collection = source_collection(config)
        self._pretrainings: dict[tuple[str, int | None], Job] = {}

    def sources(self, arm: Arm) -> list[Job]:
        """The pre-training on the first task of an arm, and the fine-tuning on each further one, in their order."""
        if not arm.tasks:
            return []
        later = arm.tasks[1:]
        patients = self._first_share(len(later))
        jobs = [self._pretraining(arm.tasks[0], patients)]
        if arm.joint:
            return [self._joint(jobs[0], *later)]
        for n, task in enumerate(later, start=1):
            way = "full" if arm.full else "decoder"
            folder = self.stage_dir / jobs[0].output_dir.name / "_".join(later[:n]) / f"{way}_seed{self.seed}"
            overrides = {"collection": self.source_collection, "train_patients": self.config["stage_patients"]}
            jobs.append(self._stage(folder, task, jobs[-1], full=arm.full, **overrides))
        return jobs

    def _pretraining(self, task: str, patients: int | None) -> Job:
        """Made once, as it looks at every file of a collection."""
        if (task, patients) not in self._pretrainings:
            config = self.config | {"train_patients": patients}
            self._pretrainings[task, patients] = pretraining_job(config, self.source_dir, task, seed=self.pool_seed)
        return self._pretrainings[task, patients]

    def _first_share(self, n_later: int) -> int | None:
        """Patients of the first task: what the others leave, so that all arms spend as many."""
        total, each = self.config["source_patients"], self.config["stage_patients"]
        if total is not None and total - n_later * each < 1:
            raise InputError(
                f"source_patients is {total}, of which {n_later} intermediate tasks of {each} patients leave none to "
                "pre-train on; raise source_patients."
            )
        return None if total is None else total - n_later * each

    def _joint(self, first: Job, *others: str) -> Job:
        """One network trained on the patients of all tasks together."""
        if len(others) != 1:
            raise InputError(f"joint training is for two source tasks; found {1 + len(others)}.")
        overlays = [*first.overlays, self.configs / "joint.json"]
        patients = self.config["stage_patients"]
        folder = first.output_dir.with_name(f"{first.output_dir.name}_with_{others[0]}_{patients}")
        overrides = {"joint_task": others[0], "joint_patients": patients}
        return Job(first.config, folder, overlays, {**first.overrides, **overrides})

    def spends(self, arm: Arm) -> str:
        """Labelled patients of each step of an arm, those of the target last: ``7 + 3 + 3``."""
        later = max(len(arm.tasks) - 1, 0)
        counts = [self._first_share(later), *[self.config["stage_patients"]] * later] if arm.tasks else []
        counts += [] if arm.epochs == 0 else [self.patients]
        return " + ".join("all" if count is None else str(count) for count in counts)

    def target(self, arm: Arm, task: str) -> Job:
        """The last step of an arm."""
        folder = self.folder / arm.name
        if not arm.tasks:
            overrides = {"target_task": task, "seed": self.seed, "check_data": False, "train_patients": self.patients}
            return Job(self.config, folder, [self.configs / "scratch.json"], overrides)
        changed = {} if arm.epochs is None else {"epochs": arm.epochs, "val_interval": 1}
        return self._stage(
            folder, task, self.sources(arm)[-1], full=arm.full, method=arm.name, train_patients=self.patients, **changed
        )

    def _stage(self, folder: Path, task: str, before: Job, *, full: bool, **overrides: Any) -> Job:
        source_task = before.overrides["target_task"]
        overrides |= {
            "target_task": task,
            "source_task": source_task,
            "source_ckpt": str(before.output_dir / "model.pt"),
        }
        overrides |= {"seed": self.seed, "check_data": False} | ({"freeze": None} if full else {})
        return Job(self.config, folder, [self.configs / "stage.json"], overrides)

    def run(
        self, arms: Sequence[Arm], target: str, *, n_jobs: int | None, backend: str | None = None
    ) -> dict[str, Job]:
        """Train what is not trained yet: all first steps, then all second ones, and the target last.

        Returns:
            The last job of each arm.

        Raises:
            RuntimeError: trainings failed; what is done is kept.
        """
        chains = [self.sources(arm) for arm in arms]
        for step, jobs in enumerate(zip_longest(*chains)):
            distinct = {job.output_dir: job for job in jobs if job is not None}
            what = f"intermediate task {step}" if step else "pre-training"
            run_jobs(list(distinct.values()), n_jobs=n_jobs, backend=backend, description=what)
        last = {arm.name: self.target(arm, target) for arm in arms}
        run_jobs(list(last.values()), n_jobs=n_jobs, backend=backend, description=f"fine-tuning on {target}")
        return last


def for_task(preprocessing: Compose, collection: Collection, task: str) -> Compose:
    """The transforms of one task with the label values of another."""
    values = collection.label_values(task)
    return Compose(
        [
            SelectLabelsd(step.keys, values=values) if isinstance(step, SelectLabelsd) else step
            for step in preprocessing.transforms
        ]
    )


def note_leep(evaluator: Evaluator, *, output_dir: str) -> None:
    """Write ``leep.json``: LEEP of the network a step starts from, on the images it will be fine-tuned on."""
    evaluator.run()
    if idist.get_rank() == 0:
        write_json(Path(output_dir) / "leep.json", {"leep": float(evaluator.state.metrics["leep"])})


def follow_path(
    sources: SourceGraph,
    plan: Plan,
    *,
    n_classes: int,
    output_dir: str,
    source_dir: str,
    synthetic: bool,
    n_jobs: int | None,
) -> Verdict | None:
    """Train along the path, and everything it should be compared with at as many labelled patients, and say what won.

    Writes the files of `medtl_ext.report.audit_report`, ``arms.csv`` (Dice and IoU of each arm) and ``answer.txt``, and
    prints the answer. The folder of each training is kept, so that an interrupted run goes on where it stopped.

    Args:
        sources: of `medtl_ext.sequential.source_graph`.
        plan: of `medtl_ext.sequential.plan_path`.
        n_classes: of the target, background included.
        output_dir: where the files go.
        source_dir: where pre-trained networks are kept.
        synthetic: the data are synthetic.
        n_jobs: trainings at a time.

    Returns:
        The verdict of the validation patients; None without any, and in all but the first of several processes.
    """
    if idist.get_rank() != 0:
        return None
    config, folder = current_config(), Path(output_dir)
    chains = Chains(
        config,
        folder=folder / "arms",
        stage_dir=folder / "stages",
        source_dir=source_dir,
        seed=config["seed"],
        pool_seed=config["pool_seed"],
    )
    single = open_collection(chains.source_collection, plan.single, subjects=config["phantom_subjects"])
    arms = arms_of(plan, zero_shot=single.n_classes(plan.single) == n_classes)
    jobs = chains.run(arms, plan.target, n_jobs=n_jobs)
    rows = pd.concat([pd.read_csv(job.output_dir / "metrics.csv") for job in jobs.values()], ignore_index=True)
    table = _arms_table(rows, arms, chains, plan.target)
    write_csv(folder / "arms.csv", table)
    verdict, answer = None, "No patient is left to validate on, so nothing is decided: --val_split val needs some."
    if "val" in set(rows["split"]):
        method = "sequential_full" if any(arm.name == "sequential_full" for arm in arms) else "single_full"
        title = f"Ways to {plan.target}, {spent_text(config['source_patients'])}"
        verdict = audit_report(rows, folder, method=method, synthetic=synthetic, margin=MARGIN, title=title)
        answer = f"{second_step_text(rows, plan)} {verdict.text}"
    write_text(folder / "answer.txt", f"{plan_text(sources, plan)} {answer}")
    print(f"{_table_text(table, spent_text(config['source_patients']))}\n{answer}")
    return verdict


def _arms_table(rows: pd.DataFrame, arms: Sequence[Arm], chains: Chains, target: str) -> pd.DataFrame:
    """Dice and IoU of every arm on each split, the best first, and the labelled patients that its steps spent."""
    paths = {arm.name: " -> ".join((*arm.tasks, target)) for arm in arms}
    scores = patient_table(rows).groupby(["split", "method"])[["dice", "iou"]].mean().reset_index()
    scores.insert(2, "path", scores["method"].map(paths))
    scores.insert(3, "patients", scores["method"].map({arm.name: chains.spends(arm) for arm in arms}))
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
    for suffix, what in (("_full", "all parameters"), ("", "decoder only")):
        one = max(
            (name for name in (f"single{suffix}", f"direct{suffix}") if name in patients),
            key=lambda name: patients[name].mean(),
        )
        gap = paired_comparison(patients[f"sequential{suffix}"].to_dict(), patients[one].to_dict(), n_resamples=999)
        figures = f"the path against the better single source ({one}) is {gap.difference:+.3f} Dice"
        if gap.patients >= MINIMUM_PATIENTS:
            figures = f"{_judgement(gap)}, {figures} (95 % interval {gap.low:+.3f} to {gap.high:+.3f})"
        sentences.append(f"{what}: {figures}")
    if len(patients) < MINIMUM_PATIENTS:
        count = f"{len(patients)} validation patient{'s' if len(patients) > 1 else ''}"
        sentences.insert(
            0, f"{count} cannot settle whether a second step helps, which takes at least {MINIMUM_PATIENTS}"
        )
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _judgement(gap: PairedComparison) -> str:
    """What the path's lead over one step says of the second step."""
    if gap.low > 0 and gap.difference >= MARGIN:
        return "the second step helps"
    if gap.low > 0:
        return f"the second step gains less than {MARGIN:g}, one is enough"
    return "the second step harms" if gap.high < 0 else "no evidence for a second step, one is enough"


def spent_text(source_patients: int | None) -> str:
    """What labelled patients of their sources arms spend, for a title."""
    if source_patients is None:
        return "each with all patients of its first source"
    return f"at equal numbers of labelled patients ({source_patients} of sources)"


def _table_text(table: pd.DataFrame, spent: str) -> str:
    shown = table[table["split"] == "test"].drop(columns="split")
    return f"On the test patients, {spent}:\n" + shown.to_string(index=False, float_format="{:.3f}".format)
