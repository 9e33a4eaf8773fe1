"""Steps around a training: read the data before it, train, and score every patient or image after it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import Evaluator, Trainer
from monai.handlers import EarlyStopHandler

from medtl_ext._io import atomic_path, write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.data.plan import Grid, label_ceiling
from medtl_ext.networks import load_weights
from medtl_ext.transfer.sources.network import SourceNetwork
from medtl_ext.transfer.sources.pool import SingleSource, TargetTask
from medtl_ext.transfer.tasks import PROBABILITIES, image_auc
from medtl_ext.transforms import CleanSegmentationd

logger = logging.getLogger(__name__)

CLEANINGS = ("largest", 0.01, 0.1, 1.0)
"""What "validation" tries, sizes in ml."""
LEAST_GAIN = 1e-3
"""In mean Dice; less is nothing."""


def own_weights(folder: Path, method: str) -> Path:
    """What a run trained itself: an audit keeps it with the other arms, for ``model.pt`` is then of the advised one."""
    kept = folder / "audit" / method / "model.pt"
    return kept if kept.is_file() else folder / "model.pt"


@dataclass(kw_only=True, eq=False)
class DataCheck:
    """A step that reads every file of a task before anything long runs.

    Args:
        task: the task.
        splits: those that will be used.
        enabled: false leaves it out.
        grid: says why it is as it is, and what it loses of the labels on the way there and back.
        transforms: the way there, of a volume with its label and its ``truth``.
        origin: whose grid it is, where a source brings its own.
    """

    task: TargetTask
    splits: Sequence[str]
    enabled: bool = True
    grid: Grid | None = None
    transforms: Sequence[Callable] = ()
    origin: SingleSource | None = None

    def run(self) -> None:
        """Raise an `InputError` on the first error, log the warnings."""
        if not self.enabled:
            return
        self.task.check(dict.fromkeys(self.splits))
        if self.grid is None or idist.get_rank() != 0:
            return
        card = None if self.origin is None else self.origin.card
        whose = self.origin.given.name if card is not None and card.preprocessing is not None else None
        for reason in self.grid.why if whose is None else ():
            logger.info("%s", reason)
        if whose is None and self.grid.native:
            return  # nothing is resampled
        items = self.task.datalist("train" if "train" in self.task.splits else self.task.splits[0])
        ceiling = label_ceiling(items, self.transforms, n_classes=self.task.n_classes)
        logger.info("ceiling: labels resampled to the grid of %s and back: %s", whose or "the run", ceiling)
        if ceiling.low:
            remedy = f"with {whose} no network can do better" if whose else "give a finer --spacing, or --spacing auto"
            logger.warning("this grid loses much of what is to be found; %s.", remedy)


@dataclass(kw_only=True, eq=False)
class StoppedTraining:
    """A step that trains until validation has not improved for a while, or the epochs are over.

    Args:
        trainer, evaluator: MONAI engines; the trainer validates by the evaluator.
        early_stopping: gets the trainer, which does not exist yet when a config makes it.
    """

    trainer: Trainer
    evaluator: Evaluator
    early_stopping: EarlyStopHandler

    def run(self) -> None:
        self.early_stopping.set_trainer(self.trainer)
        self.early_stopping.attach(self.evaluator)
        logging.getLogger("ignite.handlers.early_stopping.EarlyStopping").setLevel(logging.WARNING)  # says it twice
        self.trainer.run()
        self.evaluator.remove_event_handler(self.early_stopping, Events.EPOCH_COMPLETED)
        logger.info("trained for %d of at most %d epochs", self.trainer.state.epoch, self.trainer.state.max_epochs)


@dataclass(kw_only=True, eq=False)
class ScorePatients:
    """A step that scores a trained network on the patients of each split and writes ``metrics.csv``.

    Columns: ``method, seed, split``, and those of the evaluator's `medtl_ext.handlers.SubjectTable`.

    Args:
        evaluator: MONAI evaluator with that handler.
        splits: their names.
        loaders: of each split, unshuffled.
        output_dir, method, seed: where the table goes and what its columns of these names say.
        space: ``"training"`` where the evaluator scores on the training grid, which the log says.
        clean: of the evaluator; where it leaves the choice to validation patients, they make it here, before anybody
            else is scored, and ``clean.txt`` says it.
        checkpoint: weights of the evaluator's network; None: those that the run trained (`own_weights`). A network that
            was not trained leaves its own here. Of somebody else's network its card is written beside.
        grid: of the run, left beside too: what has no preprocessing of its own is used on it.
    """

    evaluator: Evaluator
    splits: Sequence[str]
    loaders: Sequence[DataLoader]
    output_dir: str
    method: str
    seed: int
    space: str = "patient"
    clean: CleanSegmentationd | None = None
    checkpoint: str | None = None
    grid: Grid | None = None

    def run(self) -> pd.DataFrame:
        """Score, write, and return the table."""
        idist.barrier()  # the checkpoint is written by one process
        network = getattr(self.evaluator.network, "module", self.evaluator.network)
        weights = own_weights(Path(self.output_dir), self.method)
        if idist.get_rank() == 0 and self.checkpoint is None:
            if not weights.is_file():
                with atomic_path(weights) as temporary:
                    torch.save({name: value.cpu() for name, value in network.state_dict().items()}, temporary)
            if isinstance(network, SourceNetwork):
                network.write_card(weights.parent)
            if self.grid is not None:
                self.grid.write(weights.with_name("grid.json"))
        idist.barrier()
        load_weights(network, self.checkpoint or weights, min_share=1.0)
        if self.clean is not None and self.clean.how == "validation":
            self._choose(self.clean)
        parts = []
        for split, loader in zip(self.splits, self.loaders, strict=True):
            self._evaluate(loader)
            parts.append(self._scored(split, loader))
        table = pd.concat(parts, ignore_index=True)
        table.insert(0, "seed", self.seed)
        table.insert(0, "method", self.method)
        if idist.get_rank() == 0:
            self._write(table)
        return table

    def _evaluate(self, loader: DataLoader) -> None:
        self.evaluator.data_loader = loader
        self.evaluator.state.epoch_length = len(loader)
        self.evaluator.run()

    def _dice(self) -> pd.Series:
        """Mean Dice of each patient that was evaluated last."""
        table = self.evaluator.state.subject_table
        patients = table["patient"].fillna(table["subject"]) if "patient" in table else table["subject"]
        return table.groupby(patients)["dice"].mean()

    def _choose(self, clean: CleanSegmentationd) -> None:
        """Keep what is best for the validation patients, or nothing, and say so."""
        if clean.split not in self.splits:
            choose = "give what a training chose (clean.txt in its folder): largest, a number of ml, or nothing"
            raise InputError(f"clean 'validation' needs patients of split {clean.split!r}, who are not here; {choose}.")
        found, loader = {}, self.loaders[self.splits.index(clean.split)]
        for clean.how in (None, *CLEANINGS):
            self._evaluate(loader)
            found[clean.how] = self._dice().mean()
        best = max(found, key=found.__getitem__)
        clean.how = best if found[best] - found[None] >= LEAST_GAIN else None
        tried = ", ".join(f"{'nothing' if how is None else how} {dice:.3f}" for how, dice in found.items())
        said = "none" if clean.how is None else f"--clean {clean.how}"
        text = f"Post-processing chosen on the {clean.split} patients: {said}. Mean Dice of {tried}. "
        text += "inference.json gets none either." if clean.how is None else f"Give inference.json {said} too."
        logger.info("%s: %s", self.method, text)
        if idist.get_rank() == 0:
            write_text(Path(self.output_dir) / "clean.txt", text)

    def _scored(self, split: str, loader: DataLoader) -> pd.DataFrame:
        table, dice = self.evaluator.state.subject_table, self._dice()
        table.insert(0, "split", split)
        where = " on the training grid" if self.space == "training" else ""
        logger.info("%s: Dice %.3f%s over %d %s patients", self.method, dice.mean(), where, len(dice), split)
        return table

    def _write(self, table: pd.DataFrame) -> None:
        write_csv(Path(self.output_dir) / "metrics.csv", table, digits=None)


class ScoreImages(ScorePatients):
    """The same for classification: writes ``predictions.csv`` (probabilities of all images) and, last, ``metrics.csv``.

    Columns of ``metrics.csv``: ``method, seed, split, images, auc`` (one class against the rest, the mean over classes)
    and ``accuracy``.

    Args:
        evaluator: MONAI evaluator whose metric ``auc`` keeps its details (probabilities and one-hot labels).
        options: see `ScorePatients`; the loaders' datasets have their datalist in ``data``.
    """

    def _scored(self, split: str, loader: DataLoader) -> pd.DataFrame:
        probs, labels = (tensor.cpu().numpy() for tensor in self.evaluator.state.metric_details["auc"])
        # Several processes take images in turn, and their results come one process after the other.
        items, world = loader.dataset.data, idist.get_world_size()
        order = np.concatenate([np.arange(rank, len(items), world) for rank in range(world)])
        table = pd.DataFrame({key: [items[place][key] for place in order] for key in ("subject", "name")})
        table = table.assign(split=split, label=labels.argmax(1))
        table[[f"p{label}" for label in range(probs.shape[1])]] = probs
        logger.info("%s: AUC %.3f over %d %s images", self.method, image_auc(table), len(table), split)
        return table

    def _write(self, table: pd.DataFrame) -> None:
        rows = []
        for split, of in table.groupby("split", sort=False):
            right = of.filter(regex=PROBABILITIES).to_numpy().argmax(1) == of["label"]
            row = {"method": self.method, "seed": self.seed, "split": split, "images": len(of)}
            rows.append(row | {"auc": image_auc(of), "accuracy": float(right.mean())})
        # In full: six digits make probabilities near 1 equal.
        write_csv(Path(self.output_dir) / "predictions.csv", table.drop(columns=["method", "seed"]), digits=None)
        write_csv(Path(self.output_dir) / "metrics.csv", pd.DataFrame(rows))
