"""Arms: ways to use the labels that are trained to the end and compared; and the audit of the common ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from medtl_ext._validation import require_number
from medtl_ext.ranking import Verdict, late_gain
from medtl_ext.transfer.jobs import Arm, Job, Run
from medtl_ext.transfer.report import audit_report
from medtl_ext.transfer.sources import SingleSource, Source
from medtl_ext.transfer.tasks import SegmentationTask

__all__ = ["TransferAudit", "arm_rows", "finetuning_job"]

logger = logging.getLogger(__name__)

UNTRAINED = "zero_shot"
"""The arm that is the source as it is: it has no seeds, no folds and no curve."""


def finetuning_job(
    run: Run, folder: Path, source: Source | None, *, overlay: str = "finetune", **overrides: Any
) -> Job:
    """The run of a fine-tuning overlay from a source, or of ``scratch.json`` (None), in a folder."""
    overrides = {"seed": run.seed} | ({"check_data": False} if "check_data" in run.config else {}) | overrides
    if source is None:
        return run.job(folder, "scratch", source=None, **overrides)
    return run.job(folder, overlay, source=source.option, **overrides)


def arm_rows(arms: Sequence[Arm]) -> pd.DataFrame:
    """The scores of all arms in one table, whose column ``method`` is the arm."""
    return pd.concat([arm.last.read().assign(method=arm.name) for arm in arms], ignore_index=True)


@dataclass(kw_only=True, eq=False)
class TransferAudit:
    """A step that finishes the other ways to use the labels, compares all on validation patients, and says what to do.

    Each training is a run of its own below ``audit`` in the output folder, and is kept: ``audit/ARM`` with the run's
    own seed, ``audit/ARM/seed1`` with the next. Writes the files of `medtl_ext.transfer.audit_report`. Without patients
    to validate on there is no audit.

    Args:
        here, target: the run (its option ``method`` is one of the arms), and the target task.
        source: where arms start from. The untouched source is left out where its classes are not the target's.
        arms: names of overlay configs; none leaves the audit out.
        seeds: trainings of each arm. With several, what is said of a difference holds for other trainings too.
    """

    here: Run
    target: SegmentationTask
    source: SingleSource
    arms: Sequence[str]
    seeds: int = 1

    def check(self) -> None:
        """Say what it will train, before anything is trained."""
        if self._wanted:
            others = [name for name in self._names if name not in (UNTRAINED, self.here.config["method"])]
            count = (len(others) + 1) * self.seeds - 1
            logger.info("the audit takes %d training%s besides this one", count, "s" * (count != 1))

    def run(self) -> Verdict | None:
        """Train, compare, and write it down; None where there is nothing to compare."""
        if not self._wanted:
            return None
        folder, method = self.here.folder, self.here.config["method"]
        jobs = {name: self._jobs(name) for name in self._names}
        self.here.train([job for of in jobs.values() for job in of], "transfer audit")
        rows = pd.concat([job.read().assign(method=name) for name, of in jobs.items() for job in of], ignore_index=True)
        curves = {name: [_curve(job) for job in of] for name, of in jobs.items()}
        said = {
            "late_gains": {name: late_gain(of[0]) for name, of in curves.items()},
            "minutes": {name: sum(curve["minutes"].max() for curve in of) for name, of in curves.items()},
        }
        verdict = audit_report(rows, folder, method=method, synthetic=self.target.synthetic, **said)
        logger.info("%s", verdict.text)
        return verdict

    @cached_property
    def _wanted(self) -> bool:
        require_number("audit#seeds", self.seeds, 1, whole=True)
        return bool(self.here.leads and self.arms and self.here.config["val_split"] == "val")

    @cached_property
    def _names(self) -> list[str]:
        """The arms, the run's own method first."""
        names = list(dict.fromkeys([self.here.config["method"], *self.arms]))
        if self.source.unasked and UNTRAINED in names:
            logger.info("audit without zero-shot: %s", self.source.unasked)
            names.remove(UNTRAINED)
        return names

    def _jobs(self, name: str) -> list[Job]:
        """The trainings of an arm, that of the run's own seed first."""
        own, folder = name == self.here.config["method"], self.here.folder / "audit" / name
        overlays, options = [] if own else [name], {"audit#arms": [], "check_data": False}
        if name == "scratch" and not own and self.source.card is not None and self.source.card.is_program:
            options["source"] = None  # a program has no fresh form
        first = self.here.job(self.here.folder if own else folder, *overlays, **options)
        others = range(1, 1 if name == UNTRAINED else self.seeds)
        seeds = [self.here.job(folder / f"seed{k}", *overlays, seed=self.here.seed + k, **options) for k in others]
        return [first, *seeds]


def _curve(job: Job) -> pd.DataFrame:
    """The learning curve of a training; of what was not trained one that took no time."""
    found = (job.output_dir / "curve.csv").is_file()
    return job.read("curve.csv") if found else pd.DataFrame({"steps": [0], "minutes": [0.0], "dice": [0.0]})
