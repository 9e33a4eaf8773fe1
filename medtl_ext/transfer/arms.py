"""Arms: ways to use the labels, each trained to the end and compared; and the audit of the common arms."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError, require_number
from medtl_ext.data.collection import read_json
from medtl_ext.data.plan import AUTO
from medtl_ext.ranking import Verdict, late_gain
from medtl_ext.transfer.evaluate import own_weights
from medtl_ext.transfer.jobs import Arm, Job, Run
from medtl_ext.transfer.model_card import write_model_card
from medtl_ext.transfer.report import audit_report
from medtl_ext.transfer.sources.pool import SingleSource, Source
from medtl_ext.transfer.tasks import SegmentationTask, patients_of

logger = logging.getLogger(__name__)

UNTRAINED = "zero_shot"
"""The arm that is the source as it is: it has no seeds, no folds and no learning curve."""
OF_SEEDS, MEMBERS = ("soup", "ensemble"), "full"
"""Arms that train nothing: what several trainings of one arm make together."""
NETWORK = ("grid.json", "model.json", "clean.txt", "model.pt")
"""The files of a network. The weights are written last: if they are there, everything is."""
SCORED = ("metrics.csv", "curve.csv")
ENOUGH, SOME = 6, 5
"""With fewer validation patients than ENOUGH, all labelled ones are cross-validated, in SOME folds if they are more."""


ALONE = {"audit#arms": [], "check_data": False}
HELD = {"val_split": "val", "evaluation#splits": ["val"], "evaluation#loaders": ["@validate#dataloader"]}
"""Options of an arm, and of a fold of it, whose patients are its ``val``."""


def finetuning_job(
    run: Run, folder: Path, source: Source | None, *, overlay: str = "finetune", **overrides: Any
) -> Job:
    """The run of a fine-tuning overlay from a source, or of ``scratch.json`` (None), in a folder."""
    overrides = {"seed": run.seed} | ({"check_data": False} if "check_data" in run.config else {}) | overrides
    if source is None:
        return run.job(folder, "scratch", source=None, **overrides)
    return run.job(folder, overlay, source=source.option, **overrides)


def arm_rows(arms: Iterable[Arm]) -> pd.DataFrame:
    """The scores of all arms in one table; the column ``method`` is the arm."""
    return pd.concat([arm.last.read().assign(method=arm.name) for arm in arms], ignore_index=True)


@dataclass(kw_only=True, eq=False)
class TransferAudit:
    """A step that trains the other arms, compares all arms on validation patients, and says which one to use.

    A few validation patients cannot decide. Then each arm is also cross-validated over all labelled patients. In a
    fold, the last network is scored, because no patient is left to choose a better one.

    Each training is a run below ``audit`` in the output folder and is kept: ``audit/ARM`` has the run's own seed,
    ``audit/ARM/seed1`` the next seed, ``audit/ARM/fold0of5`` is a fold. Writes the files of
    `medtl_ext.transfer.audit_report`. Afterwards ``model.pt`` of the output folder is the network of the advised arm
    (of several seeds, the best by validation), with a ``MODEL_CARD.md``; the run's own network is in ``audit/METHOD``.

    Args:
        here, target: the run (its option ``method`` is one of the arms), and the target task.
        source: the source of the arms. The untouched source is left out if its classes are not the target's.
        arms: names of overlay configs; an empty list turns the audit off.
        seeds: number of trainings per arm. With several, the intervals also include differences between trainings.
        folds: number of folds of the cross-validation; 0 turns it off, and then there is no audit without validation
            patients. "auto": with fewer than six validation patients, one fold per labelled patient if these are at
            most six, else five folds.
    """

    here: Run
    target: SegmentationTask
    source: SingleSource
    arms: Sequence[str]
    seeds: int = 1
    folds: int | str = AUTO

    def check(self) -> None:
        """Log how many trainings it will run, before anything is trained."""
        if self._wanted:
            trained = len({*self._names} - {UNTRAINED, *OF_SEEDS}) * self.seeds
            count, few = trained * (self._folds + 1) - 1, ""
            if self._folds:
                why = f"there are fewer than {ENOUGH} validation patients; " if self.folds == AUTO else ""
                few = f", {trained * self._folds} of them to cross-validate the arms over all "
                few += f"{len(patients_of(self.target.labelled))} labelled patients in {self._folds} folds "
                few += f"({why}--audit#folds 0 turns this off)"
            logger.info("the audit needs %d training%s besides this one%s", count, "s" * (count != 1), few)

    def run(self) -> Verdict | None:
        """Train, compare and write the results; None if there is nothing to compare."""
        if not self._wanted:
            return None
        folder, method = self.here.folder, self.here.config["method"]
        jobs = {name: self._jobs(name) for name in self._names if name not in OF_SEEDS}
        self.here.train([job for whole, folds in jobs.values() for job in whole + folds], "transfer audit")
        jobs |= {name: self._made(name, *jobs[MEMBERS]) for name in self._names if name in OF_SEEDS}
        self.here.train([job for name in jobs if name in OF_SEEDS for job in chain(*jobs[name])], "arms of seeds")
        rows = arm_rows(Arm(name, (job,)) for name, (whole, _) in jobs.items() for job in whole)
        if self._folds:
            held = arm_rows(Arm(name, (job,)) for name, (_, folds) in jobs.items() for job in folds)
            rows = pd.concat([rows[rows["split"] == "test"], held], ignore_index=True)
        curves = {name: [_curve(job) for job in whole + folds] for name, (whole, folds) in jobs.items()}
        said = {
            "folds": self._folds,
            "late_gains": {name: late_gain(of[0]) for name, of in curves.items()},
            "minutes": {name: sum(curve["minutes"].max() for curve in of) for name, of in curves.items()},
        }
        said["minutes"] |= {name: said["minutes"][MEMBERS] for name in jobs if name in OF_SEEDS}
        verdict = audit_report(rows, folder, method=method, synthetic=self.target.synthetic, **said)
        logger.info("%s", verdict.text)
        if own_weights(folder, method) == folder / "model.pt":
            _copy(folder, folder / "audit" / method, *SCORED, *NETWORK)
        best = max(jobs[verdict.default][0], key=self._validated)
        _copy(folder / "audit" / method if best.output_dir == folder else best.output_dir, folder, *NETWORK)
        write_model_card(self.here, self.target, self.source, verdict, seed=best.overrides["seed"])
        return verdict

    def _validated(self, job: Job) -> float:
        return float(np.mean([*self.target.patients(job, self.here.config["val_split"]).values()]))

    @cached_property
    def _wanted(self) -> bool:
        require_number("audit#seeds", self.seeds, 1, whole=True)
        return bool(self.here.leads and self.arms and (self._folds or self.here.config["val_split"] == "val"))

    @cached_property
    def _folds(self) -> int:
        """Number of folds of the cross-validation; 0: there is none."""
        count, validated = len(patients_of(self.target.labelled)), self.here.config["val_split"] == "val"
        if self.folds != AUTO:
            return require_number("audit#folds", self.folds, 2, count, whole=True) if self.folds else 0
        if count < 2 or (validated and len(patients_of(self.target.datalist("val"))) >= ENOUGH):
            return 0
        return count if count <= ENOUGH else SOME

    @cached_property
    def _names(self) -> list[str]:
        """The arms, the run's own method first."""
        names = list(dict.fromkeys([self.here.config["method"], *self.arms]))
        if self.source.unasked and (without := [name for name in names if name in (UNTRAINED, "adabn")]):
            logger.info("audit without %s: %s", " and ".join(without), self.source.unasked)
            names = [name for name in names if name not in without]
        if not (made := [name for name in OF_SEEDS if name in names]):
            return names
        if self.seeds < 2:
            raise InputError(f"an audit makes {' and '.join(made)} of several trainings; give --audit#seeds 2 or more.")
        if "ensemble" in made and self.source.card is not None:
            raise InputError("ensemble is of the bundle's own network, and the source brings its own; take soup.")
        return list(dict.fromkeys([*names, MEMBERS]))

    def _jobs(self, name: str) -> tuple[list[Job], list[Job]]:
        """The trainings of an arm on the given split (the run's own seed first), and those of the folds."""
        own, trained, folder = name == self.here.config["method"], name != UNTRAINED, self.here.folder / "audit" / name
        overlays, options = [] if own else [name], dict(ALONE)
        if name == "scratch" and not own and self.source.card is not None and self.source.card.is_program:
            options["source"] = None  # a program cannot be trained from scratch: use the bundle's network
        held = HELD | ({"val_interval": "@epochs"} if trained else {})
        parts = self._folds if trained else min(self._folds, 1)
        whole, folds = [], []
        for k in range(self.seeds if trained else 1):
            options["seed"] = self.here.seed + k
            place = folder / f"seed{k}" if k else self.here.folder if own else folder
            whole.append(self.here.job(place, *overlays, **options))
            for part in range(parts):
                place = folder / (f"fold{part}of{parts}" + f"_seed{k}" * (k > 0))
                folds.append(self.here.job(place, *overlays, **options, **held, **{"target#fold": [part, parts]}))
        return whole, folds

    def _made(self, name: str, whole: Sequence[Job], folds: Sequence[Job]) -> tuple[list[Job], list[Job]]:
        """The same of an arm of seeds, which is made anew where it has more of them."""
        folder, parts = self.here.folder / "audit" / name, self._folds
        members = [str(own_weights(job.output_dir, MEMBERS)) for job in whole]
        if (record := folder / "config.json").is_file() and read_json(record)["members"] != members:
            shutil.rmtree(folder)
        options = ALONE | {"seed": self.here.seed}
        held = [
            self.here.job(
                folder / f"fold{part}of{parts}",
                name,
                **options | HELD | {"target#fold": [part, parts], "members": [job.model for job in folds[part::parts]]},
            )
            for part in range(parts)
        ]
        return [self.here.job(folder, name, **options, members=members)], held


def _copy(origin: Path, folder: Path, *names: str) -> None:
    """Replace these files in ``folder`` by those of another training, with the code that its card names."""
    for name in [*(path.name for path in origin.glob("*.py")), *names]:
        if not (origin / name).is_file():
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(origin / name, temporary)


def _curve(job: Job) -> pd.DataFrame:
    """The learning curve of a training; for an arm without training, a curve that took no time."""
    found = (job.output_dir / "curve.csv").is_file()
    return job.read("curve.csv") if found else pd.DataFrame({"steps": [0], "minutes": [0.0], "dice": [0.0]})
