"""Arms: ways to use the labels that are trained to the end and compared; and the audit of the common ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medtl_ext.ranking import Verdict, late_gain
from medtl_ext.transfer.jobs import Arm, Job, Run
from medtl_ext.transfer.report import audit_report
from medtl_ext.transfer.sources import SingleSource, Source
from medtl_ext.transfer.tasks import SegmentationTask

__all__ = ["TransferAudit", "arm_rows", "finetuning_job"]

logger = logging.getLogger(__name__)


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

    Each arm is a run of its own below ``audit`` in the output folder, and is kept. Writes the files of
    `medtl_ext.transfer.audit_report`. Without patients to validate on there is no audit.

    Args:
        here, target: the run (its option ``method`` is one of the arms), and the target task.
        source: where arms start from. The untouched source is left out where its classes are not the target's.
        arms: names of overlay configs; none leaves the audit out.
    """

    here: Run
    target: SegmentationTask
    source: SingleSource
    arms: Sequence[str]

    def run(self) -> Verdict | None:
        """Train, compare, and write it down; None where there is nothing to compare."""
        config, folder = self.here.config, self.here.folder
        if not (self.here.leads and self.arms and config["val_split"] == "val"):
            return None
        method, names = config["method"], list(self.arms)
        if self.source.unasked and "zero_shot" in names:
            logger.info("audit without zero-shot: %s", self.source.unasked)
            names.remove("zero_shot")
        options = {name: {"audit#arms": [], "check_data": False} for name in names}
        if self.source.card is not None and self.source.card.is_program and "scratch" in names:
            options["scratch"]["source"] = None  # a program has no fresh form
        jobs = [self.here.job(folder / "audit" / name, name, **options[name]) for name in names if name != method]
        arms = [Arm(method, (self.here.job(folder),)), *(Arm(job.output_dir.name, (job,)) for job in jobs)]
        self.here.train_arms(arms, "transfer audit")
        trained = [arm for arm in arms if (arm.last.output_dir / "curve.csv").is_file()]
        gains = {arm.name: late_gain(arm.last.read("curve.csv")) for arm in trained}
        verdict = audit_report(arm_rows(arms), folder, method=method, synthetic=self.target.synthetic, late_gains=gains)
        logger.info("%s", verdict.text)
        return verdict
