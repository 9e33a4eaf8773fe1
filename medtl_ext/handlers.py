"""Ignite handlers of the bundles: the weight map before training, resumable checkpoints, scores per patient."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import set_rnd
from monai.engines import Evaluator, Trainer
from monai.handlers import TensorBoardStatsHandler, from_engine
from monai.utils import evenly_divisible_all_gather, string_list_all_gather
from torch import Tensor

from medtl_ext._io import atomic_path, write_csv
from medtl_ext._validation import InputError
from medtl_ext.losses import RiskWeightedLoss, repeat_cells
from medtl_ext.metrics import compute_segmentation_scores
from medtl_ext.networks import read_checkpoint
from medtl_ext.ranking import late_gain

__all__ = ["EpochSeed", "ResumableCheckpoint", "SubjectTable", "TensorBoardCurves", "TrainingLength", "WeightMap"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class WeightMap:
    """Weigh the loss by a map that is computed when training starts, from the frozen source or from the labels.

    At `Events.STARTED` an evaluator passes once over the target's training images with the frozen source network, its
    metric (such as `medtl_ext.metrics.LEEPMap`) gives the transferability of each pixel, and ``to_weight`` turns that
    into weights (such as `medtl_ext.losses.risk_map`). One map for all images becomes a buffer of the loss; one map per
    image becomes the key ``weight`` of the dataset, so that it follows its image through flips and rotations.
    At `Events.COMPLETED` the same pass with the fine-tuned network shows what training changed (RiskMap, Fig. 2).

    In a distributed run every process makes the whole pass, and so holds the same map without sending it around.

    Args:
        dataset: the training set, a `medtl_ext.data.SliceDataset` for maps per image.
        loss: gets the map if there is one for all images.
        to_weight: from the metric's value (or from the labels, N x *spatial) to weights of the same spatial shape.
        evaluator: a MONAI evaluator over the training images without random transforms. None: the weights come from
            the labels alone, as in the controls that never see the source.
        metric: name of the metric in ``evaluator.state.metrics``.
        output_dir: gets ``leep_before.nii.gz``, ``weight.nii.gz`` and ``leep_after.nii.gz`` of a map for all images,
            ``weight_<subject>.nii.gz`` of maps per image. None writes nothing.
    """

    dataset: Any
    loss: RiskWeightedLoss
    to_weight: Callable[[Tensor], Tensor]
    evaluator: Evaluator | None = None
    metric: str = "leep_map"
    output_dir: str | Path | None = None

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.STARTED, self.before)
        if self.evaluator is not None and self.output_dir is not None:
            engine.add_event_handler(Events.COMPLETED, self.after)

    def before(self, engine: Trainer) -> None:
        """Compute the map and hand it to the loss or to the dataset."""
        labels = torch.stack([torch.as_tensor(item["label"])[0] for item in self.dataset.plain()])
        value = labels if self.evaluator is None else self._transferability()
        weight = self.to_weight(value)
        if isinstance(weight, Tensor) and weight.ndim == labels.ndim - 1:
            if self.dataset[0]["label"].shape[1:] == labels.shape[1:]:
                self.loss.set_weight(weight.to(engine.state.device))
            else:  # the training draws patches, each of which needs its part of the map
                self.dataset.set_map("weight", repeat_cells(weight, labels.shape[1:]).expand_as(labels))
            self._save("weight.nii.gz", weight)
            if self.evaluator is not None:
                self._save("leep_before.nii.gz", value)
        else:
            self.dataset.set_map("weight", weight)
            self._save_per_subject(weight)
        flat = torch.stack(list(weight)).flatten()
        logger.info("weights: mean %.2f, from %.2f to %.2f", flat.mean(), flat.min(), flat.max())

    def after(self, engine: Trainer) -> None:
        """The same pass with the network as it is after training."""
        source, self.evaluator.network = self.evaluator.network, engine.network
        try:
            value = self._transferability()
        finally:
            self.evaluator.network = source
        if isinstance(value, Tensor) and value.ndim == self.dataset[0]["label"].ndim - 1:
            self._save("leep_after.nii.gz", value)

    def _transferability(self) -> Tensor:
        self.evaluator.run()
        return self.evaluator.state.metrics[self.metric]

    def _save(self, name: str, values: Tensor) -> None:
        """Write a map as NIfTI on the grid of the first training volume; a 2D map is repeated along its slices."""
        subject = self.dataset[0]["subject"]
        shape = self.dataset.geometry[subject][1]
        array = repeat_cells(values.detach().cpu(), shape[: values.ndim]).numpy()  # of a map with a stride
        self._write(name, np.broadcast_to(array[..., None] if array.ndim == 2 else array, shape), subject)

    def _save_per_subject(self, weights: Tensor) -> None:
        """Write each patient's weights as a volume on the patient's grid, 1 where no slice was trained on."""
        volumes: dict[str, np.ndarray] = {}
        for item, weight in zip(self.dataset.plain(), weights, strict=True):
            shape = self.dataset.geometry[item["subject"]][1]
            volume = volumes.setdefault(item["subject"], np.ones(shape, np.float32))
            volume[..., item["slice"] if weight.ndim == 2 else slice(None)] = weight.detach().cpu().numpy()
        for subject, volume in volumes.items():
            self._write(f"weight_{subject}.nii.gz", volume, subject)

    def _write(self, name: str, volume: np.ndarray, subject: str) -> None:
        if self.output_dir is not None and idist.get_rank() == 0:
            with atomic_path(Path(self.output_dir, name)) as temporary:
                nib.save(nib.Nifti1Image(volume.astype(np.float32), self.dataset.geometry[subject][0]), temporary)


@dataclass(kw_only=True, eq=False)
class ResumableCheckpoint:
    """Keep the best network as ``model.pt`` and everything needed to go on as ``last.pt``; go on from it when there.

    ``model.pt`` is a plain ``state_dict``. It is replaced only by a network with a better key metric, and the best
    value so far is kept in ``last.pt`` too: a resumed run knows it. Files are written whole or not at all, ``last.pt``
    first, which holds what ``model.pt`` is made of: a run may be killed at any time. List it after the validation
    handler in ``train#handlers``.

    Args:
        save_dir: where the two files are.
        evaluator: the validation engine whose key metric decides. None: every epoch's network replaces the last.
        save_dict: what to go on with beside the engine's own epoch, by name: network, optimizer, schedule.
    """

    save_dir: str | Path
    save_dict: Mapping[str, Any]
    evaluator: Evaluator | None = None
    best: float = field(default=float("-inf"), init=False)
    best_epoch: int = field(default=-1, init=False)

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.keep_untrained)

    def keep_untrained(self, engine: Trainer) -> None:
        """A run of no epochs, which scores the source as it is, leaves its network like any other."""
        if engine.state.epoch == 0 and idist.get_rank() == 0:
            self._save_network()

    def resume(self, engine: Trainer) -> None:
        """Continue from ``last.pt`` if there is one."""
        last = Path(self.save_dir, "last.pt")
        if not last.is_file():
            return
        try:
            state = read_checkpoint(last)
        except InputError as error:
            raise InputError(f"{last} is damaged; delete it, and the training begins anew.") from error
        try:
            for name, item in self.save_dict.items():
                _unwrapped(item).load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{last} is of another run ({reason}); give another --output_dir.") from error
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if self.best_epoch == state["epoch"] and idist.get_rank() == 0:
            self._save_network()  # which a run that was killed after last.pt has not done
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        if engine.state.epoch < engine.state.max_epochs:
            logger.info("resuming after epoch %d of %d", engine.state.epoch, engine.state.max_epochs)

    def save(self, engine: Trainer) -> None:
        """Save the state after an epoch, and the network if it is the best yet.

        Raises:
            InputError: weights are not finite: what the epoch before left stays.
        """
        weights = _unwrapped(self.save_dict["network"]).state_dict().values()
        if not all(bool(value.isfinite().all()) for value in weights):
            raise InputError(
                f"the training broke down in epoch {engine.state.epoch}: its weights are not finite, and are not kept; "
                "lower --learning_rate, or check the intensities of your images (`python -m medtl_ext.data check`)."
            )
        epoch, value, better = engine.state.epoch, 0.0, self.evaluator is None
        if self.evaluator is not None and self.evaluator.state.epoch == epoch:  # validated in this epoch
            value = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
            value = float("-inf") if np.isnan(value) else value  # no case could be scored
            better = value > self.best or self.best_epoch < 0
        if better:
            self.best, self.best_epoch = value, epoch
        if idist.get_rank() != 0:
            return
        state = {name: _unwrapped(item).state_dict() for name, item in self.save_dict.items()}
        self._save("last.pt", state | {"epoch": epoch, "best": self.best, "best_epoch": self.best_epoch})
        if better:
            self._save_network()

    def _save_network(self) -> None:
        state = _unwrapped(self.save_dict["network"]).state_dict()
        self._save("model.pt", {name: value.cpu() for name, value in state.items()})

    def _save(self, name: str, content: Any) -> None:
        with atomic_path(Path(self.save_dir, name)) as temporary:
            torch.save(content, temporary)


def _unwrapped(item: Any) -> Any:
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item


@dataclass(kw_only=True, eq=False)
class EpochSeed:
    """Seed every epoch by its number, so that a run resumed after an epoch gives what it would have given in one go.

    Args:
        dataset: the training set, whose random transforms are seeded too.
        seed: of the run.
    """

    dataset: Any
    seed: int

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Trainer) -> None:
        seed = int(np.random.SeedSequence([self.seed, engine.state.epoch]).generate_state(1)[0])
        torch.manual_seed(seed)
        set_rnd(self.dataset, seed)
        engine.set_data(engine.state.dataloader)  # a new order of samples, from its beginning


@dataclass(kw_only=True, eq=False)
class TrainingLength:
    """How long a training is, and when it validates: so many epochs, or as many as fit into some minutes here.

    After the first epoch the log says how long the training takes on this machine. With ``minutes``, it then trains
    for as many epochs as that time allows, validations apart, and the schedule is stretched to them. Writes
    ``curve.csv``, a row for each validation: ``epoch, steps, minutes`` (of training) and the evaluator's key metric. It
    belongs before `ResumableCheckpoint`, whose ``save_dict`` keeps it.

    Args:
        evaluator: MONAI engine that validates.
        lr_scheduler: one with a number of epochs, ``total_iters``.
        save_dir: of ``curve.csv``.
        interval: epochs from one validation to the next; None: five times in all.
        minutes: of training, at least one epoch; None: the trainer's own number of epochs.
        settings: gets that number as ``epochs``, for the trainings that are compared with this one.
    """

    evaluator: Evaluator
    lr_scheduler: Any
    save_dir: str | Path
    interval: int | None = None
    minutes: float | None = None
    settings: dict[str, Any] | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"epochs": None, "minutes": 0.0, "curve": []}, init=False)

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.skip_first)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as long as was decided before."""
        self.state = copy.deepcopy(dict(state))
        self._write_curve()
        if self.minutes is not None:
            self._train_for(self.state["epochs"])

    def begin(self, engine: Trainer) -> None:
        self._began, self._steps = perf_counter(), engine.state.epoch_length

    def skip_first(self, engine: Trainer) -> None:
        """Do not count the first step of all, which sets up what the others use."""
        if engine.state.iteration == 1 and self._steps > 1:
            self._began, self._steps = perf_counter(), self._steps - 1

    def end(self, engine: Trainer) -> None:
        """Decide after the first epoch, and validate where that is due."""
        seconds = (perf_counter() - self._began) / self._steps
        epoch, length = engine.state.epoch, engine.state.epoch_length
        self.state["minutes"] += seconds * length / 60
        if self.state["epochs"] is None:
            seconds = idist.broadcast(seconds, 0)
            if self.minutes is not None:
                self._train_for(max(1, int(60 * self.minutes / (seconds * length))))
            self.state["epochs"] = engine.state.max_epochs
            steps = length * self.state["epochs"]
            logger.info("%d training steps, about %.1f minutes (%.2f s each)", steps, steps * seconds / 60, seconds)
        epochs = self.state["epochs"]
        due = epoch % self.interval == 0 if self.interval else epoch * 5 // epochs > (epoch - 1) * 5 // epochs
        if due or epoch == epochs:
            self.evaluator.run(epoch)
            name = self.evaluator.state.key_metric_name
            row = {"epoch": epoch, "steps": epoch * length, "minutes": round(self.state["minutes"], 4)}
            self.state["curve"].append(row | {name: float(self.evaluator.state.metrics[name])})
            self._write_curve()
            if epoch == epochs and (gain := late_gain(pd.DataFrame(self.state["curve"]))) >= 0.01:
                logger.info("validation %s still gained %.3f in the last two fifths of the training", name, gain)

    def _write_curve(self) -> None:
        if idist.get_rank() == 0 and self.state["curve"]:
            write_csv(Path(self.save_dir) / "curve.csv", pd.DataFrame(self.state["curve"]))

    def _train_for(self, epochs: int) -> None:
        self._engine.state.max_epochs = self.lr_scheduler.total_iters = epochs
        if self.settings is not None:
            self.settings |= {"epochs": epochs, "minutes": None}


class TensorBoardCurves(TensorBoardStatsHandler):
    """A training's loss by iteration and its validation scores by epoch, for TensorBoard.

    Args:
        log_dir: where TensorBoard finds them.
        validator: the validation engine. What it scores after the training is no point of a curve.
    """

    def __init__(self, *, log_dir: str | Path, validator: Evaluator) -> None:
        def write_validation(engine: Engine, writer: Any) -> None:
            if validator.state.epoch == engine.state.epoch:  # validated in this epoch
                for name, value in validator.state.metrics.items():
                    writer.add_scalar(f"validation {name}", value, engine.state.epoch)

        loss = from_engine(["loss"], first=True)
        super().__init__(
            log_dir=str(log_dir), tag_name="loss", output_transform=loss, epoch_event_writer=write_validation
        )


@dataclass(kw_only=True, eq=False)
class SubjectTable:
    """Scores per patient and class of an evaluator's last pass, as the table ``evaluator.state.subject_table``.

    Columns: subject, patient (where the data say whose scan it is), class, one per metric, those of
    `medtl_ext.metrics.compute_segmentation_scores`, which states the rule for what is empty, and ``empty``: the class
    is neither in the truth nor in the segmentation.

    The evaluator's output has ``pred`` and ``label``, one-hot and, as their spacing is in their affine, MetaTensors.

    Args:
        class_names: names of the foreground classes, in order.
        metrics: names under which the evaluator's metrics keep their details per case.
    """

    class_names: Sequence[str]
    metrics: Sequence[str] = ("dice", "iou")

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.tabulate)

    def reset(self, engine: Evaluator) -> None:
        self._subjects: list[str] = []
        self._patients: list[str] = []
        self._scores: list[list[list[float]]] = []

    def collect(self, engine: Evaluator) -> None:
        """Note who is in the batch, and score the foreground classes."""
        self._subjects += [item["subject"] for item in engine.state.batch]
        self._patients += [item.get("patient", "") for item in engine.state.batch]
        for item in engine.state.output:
            affine, pair = item["label"].affine, (item[key][1:].cpu().numpy() for key in ("pred", "label"))
            scores = [compute_segmentation_scores(*masks, affine) for masks in zip(*pair, strict=True)]
            self._scores.append([list(one.values()) for one in scores])
            self._names = list(scores[0])

    def tabulate(self, engine: Evaluator) -> None:
        """Join subjects and scores; with several processes the metrics' details come gathered in rank order."""
        subjects, patients = string_list_all_gather(self._subjects), string_list_all_gather(self._patients)
        scores = evenly_divisible_all_gather(torch.tensor(self._scores, dtype=torch.float64, device=idist.device()))
        known = [{"subject": s} | ({"patient": p} if p else {}) for s, p in zip(subjects, patients, strict=True)]
        columns = {"class": np.tile(self.class_names, len(subjects))}
        columns |= {name: engine.state.metric_details[name].flatten().tolist() for name in self.metrics}
        columns |= dict(zip(self._names, scores.flatten(0, 1).T.tolist(), strict=True))
        columns["empty"] = scores[..., -2:].eq(0).all(-1).flatten().tolist()  # both volumes
        table = pd.DataFrame(known).loc[np.repeat(np.arange(len(known)), len(self.class_names))].assign(**columns)
        engine.state.subject_table = table.drop_duplicates(["subject", "class"], ignore_index=True)
