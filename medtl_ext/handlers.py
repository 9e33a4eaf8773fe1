"""Ignite handlers for training: weight maps, resumable checkpoints, fine-tuning recipes, scores per patient."""

import copy
import hashlib
import logging
import re
import shutil
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
from monai.data import DataLoader, set_rnd
from monai.engines import Evaluator, IterationEvents, Trainer
from monai.handlers import TensorBoardStatsHandler, from_engine
from monai.utils import evenly_divisible_all_gather, string_list_all_gather
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, Dataset

from medtl_ext._io import atomic_path, write_csv
from medtl_ext._validation import InputError
from medtl_ext.data.seeds import ItemSeeds
from medtl_ext.losses import RiskWeightedLoss, repeat_cells
from medtl_ext.metrics import compute_segmentation_scores
from medtl_ext.networks import (
    SpatialAdapter,
    all_but,
    keep_in_eval_mode,
    layers,
    merge_adapters,
    read_checkpoint,
    read_weights,
    trainable_parameters,
)
from medtl_ext.ranking import late_gain

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class WeightMap:
    """Weight the loss by a map that is computed when training starts, from the frozen source or from the labels.

    At `Events.STARTED` an evaluator runs once over the target's training images with the frozen source network. Its
    metric (such as `medtl_ext.metrics.LEEPMap`) measures the transferability of each pixel, and ``to_weight`` (such as
    `medtl_ext.losses.risk_map`) turns it into weights. One map for all images becomes a buffer of the loss. Maps per
    image become the key ``weight`` of the dataset, so that they follow their images through flips and rotations. At
    `Events.COMPLETED` the same pass with the fine-tuned network shows what training changed (RiskMap, Fig. 2).

    In a distributed run every process makes the whole pass, so all have the same map without communication.

    Args:
        dataset: the training set; a `medtl_ext.data.SliceDataset` for maps per image.
        loss: gets the map if there is one for all images.
        to_weight: function of the metric's value (or of the labels, N x *spatial) that returns weights of the same
            spatial shape.
        evaluator: a MONAI evaluator over the training images without random transforms. None computes the weights from
            the labels only, as in the controls without source.
        metric: name of the metric in ``evaluator.state.metrics``.
        output_dir: folder for ``leep_before.nii.gz``, ``weight.nii.gz`` and ``leep_after.nii.gz`` (one map for all
            images) or ``weight_<subject>.nii.gz`` (maps per image). None writes nothing.
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
        """Compute the map and pass it to the loss or to the dataset."""
        labels = torch.stack([torch.as_tensor(item["label"])[0] for item in self.dataset.plain()])
        value = labels if self.evaluator is None else self._transferability()
        weight = self.to_weight(value)
        if isinstance(weight, Tensor) and weight.ndim == labels.ndim - 1:
            if self.dataset[0]["label"].shape[1:] == labels.shape[1:]:
                self.loss.set_weight(weight.to(engine.state.device))
            else:  # training draws patches, which need their part of the map
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
        """Make the same pass with the trained network."""
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
        """Write a map as NIfTI on the grid of the first training volume. A 2D map is repeated along the slices."""
        subject = self.dataset[0]["subject"]
        shape = self.dataset.geometry[subject][1]
        array = repeat_cells(values.detach().cpu(), shape[: values.ndim]).numpy()  # undo a stride
        self._write(name, np.broadcast_to(array[..., None] if array.ndim == 2 else array, shape), subject)

    def _save_per_subject(self, weights: Tensor) -> None:
        """Write each patient's weights as a volume on the patient's grid, with 1 in slices that are not trained on."""
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
    """Save the best network as ``model.pt`` and the state of the training as ``last.pt``; resume from it if it exists.

    ``model.pt`` is a plain ``state_dict`` of the validated network. It is replaced only if the key metric improves. The
    best value is also in ``last.pt``, so that a resumed run knows it. A run may be killed at any time: files are
    written atomically, and ``last.pt``, from which ``model.pt`` can be restored, is written first. List this handler
    after the validation handler in ``train#handlers``.

    Args:
        save_dir: folder of the two files.
        evaluator: the validation engine whose key metric decides. None: every epoch's network replaces the last.
        save_dict: name -> object whose state is saved: network, optimizer, schedule. Objects without ``state_dict`` are
            ignored, such as recipes without a state.
    """

    save_dir: str | Path
    save_dict: Mapping[str, Any]
    evaluator: Evaluator | None = None
    best: float = field(default=float("-inf"), init=False)
    best_epoch: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        # MONAI's handler of a schedule has no state; its schedule has.
        items = {name: getattr(item, "lr_scheduler", item) for name, item in self.save_dict.items()}
        items |= {name: item for name, item in self.save_dict.items() if hasattr(item, "state_dict")}
        self.save_dict = {name: item for name, item in items.items() if hasattr(item, "state_dict")}

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.keep_untrained)

    def keep_untrained(self, engine: Trainer) -> None:
        """Save the network of a run without epochs, which scores the untouched source."""
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
            raise InputError(f"{last} is damaged; delete it to start the training again.") from error
        try:
            for name, item in self.save_dict.items():
                _unwrapped(item).load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{last} is of another run ({reason}); give another --output_dir.") from error
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        if self.best_epoch == state["epoch"] and idist.get_rank() == 0:
            self._save_network()  # the run may have been killed between both files
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        if engine.state.epoch < engine.state.max_epochs:
            logger.info("resuming after epoch %d of %d", engine.state.epoch, engine.state.max_epochs)

    def save(self, engine: Trainer) -> None:
        """Save the state after an epoch, and the network if it is the best so far.

        Raises:
            InputError: weights are not finite. The files of the epoch before are kept.
        """
        weights = _unwrapped(self.save_dict["network"]).state_dict().values()
        if not all(bool(value.isfinite().all()) for value in weights):
            advice = "lower --learning_rate, or check your images (`python -m medtl_ext.data check`)"
            raise InputError(f"the training broke down in epoch {engine.state.epoch}: weights not finite; {advice}.")
        epoch, value, better = engine.state.epoch, 0.0, self.evaluator is None
        if self.evaluator is not None and self.evaluator.state.epoch == epoch:  # validated in this epoch
            value = float(self.evaluator.state.metrics[self.evaluator.state.key_metric_name])
            value = float("-inf") if np.isnan(value) else value  # no patient could be scored
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
        state = _unwrapped(getattr(self.evaluator, "network", self.save_dict["network"])).state_dict()
        self._save("model.pt", {name: value.cpu() for name, value in state.items()})

    def _save(self, name: str, content: Any) -> None:
        with atomic_path(Path(self.save_dir, name)) as temporary:
            torch.save(content, temporary)


def _unwrapped(item: Any) -> Any:
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item


@dataclass(kw_only=True, eq=False)
class EpochSeed:
    """Seed every epoch by its number, so that a resumed run gives the same result as an uninterrupted one.

    Args:
        dataset: the training set; its random transforms are seeded too, those of a `medtl_ext.data.seeds.ItemSeeds` for
            every item: then the number of the loader's workers does not matter.
        seed: of the run.
    """

    dataset: Any
    seed: int

    def attach(self, engine: Trainer) -> None:
        self._seed_items(0)  # before the loader starts its workers
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def _seed_items(self, seed: int) -> None:
        for part in getattr(self.dataset, "datasets", [self.dataset]):
            if isinstance(part, ItemSeeds):
                part.seed_epoch(seed)

    def __call__(self, engine: Trainer) -> None:
        seed = int(np.random.SeedSequence([self.seed, engine.state.epoch]).generate_state(1)[0])
        torch.manual_seed(seed)
        set_rnd(self.dataset, seed)
        self._seed_items(seed)
        engine.set_data(engine.state.dataloader)  # start the loader again, with a new order


@dataclass(kw_only=True, eq=False)
class TrainingLength:
    """Set the length of a training, in epochs or in minutes on this machine, and validate at intervals.

    After the first epoch the log says how long the training takes on this machine. With ``minutes``, the number of
    epochs is chosen to fit this time (without validations), and the schedule is adapted. Writes ``curve.csv`` with a
    row for each validation: ``epoch, steps, minutes`` (of training) and the evaluator's key metric. List this handler
    before `ResumableCheckpoint`, and add it to its ``save_dict``.

    Args:
        evaluator: MONAI engine that validates.
        lr_scheduler: a schedule whose number of epochs is ``total_iters``.
        save_dir: folder of ``curve.csv``.
        interval: epochs between two validations. None validates five times in total.
        minutes: of training, at least one epoch. None keeps the trainer's number of epochs.
        settings: its ``epochs`` is set to the chosen number, for the trainings that are compared with this one.
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
        """Resume with the length that was chosen before."""
        self.state = copy.deepcopy(dict(state))
        self._write_curve()
        if self.minutes is not None:
            self._train_for(self.state["epochs"])

    def begin(self, engine: Trainer) -> None:
        self._began, self._steps = perf_counter(), engine.state.epoch_length

    def skip_first(self, engine: Trainer) -> None:
        """Do not count the very first step, which is slower because of initialisations."""
        if engine.state.iteration == 1 and self._steps > 1:
            self._began, self._steps = perf_counter(), self._steps - 1

    def end(self, engine: Trainer) -> None:
        """Choose the length after the first epoch, and validate if it is due."""
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


# Recipes of fine-tuning: handlers that the option ``recipe`` adds to a training


@dataclass(kw_only=True, eq=False)
class LayerwiseRates:
    """One learning rate per layer: it decreases from layer to layer, by a constant factor, from the head to the input.

    Args:
        network, optimizer: of the training. The optimizer must have one group with all parameters.
        image: a training image, see `medtl_ext.networks.layers`.
        lowest: learning rate of the first layer as a share of the head's, which is the optimizer's.

    Reference: Howard and Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    image: Tensor
    lowest: float = 0.1

    def attach(self, engine: Trainer) -> None:
        (group,) = self.optimizer.param_groups
        self.optimizer.param_groups.clear()
        found = layers(self.network, self.image)
        for number, names in enumerate(found):
            parameters = [p for name in names for p in self.network.get_submodule(name).parameters(recurse=False)]
            rate = group["lr"] * self.lowest ** (1 - number / (len(found) - 1))
            self.optimizer.add_param_group({**group, "params": parameters, "lr": rate})


@dataclass(kw_only=True, eq=False)
class LinearProbe:
    """Train only the head in the first part of the steps, then everything (LP-FT).

    In the first part the rest is frozen: parameters and statistics of batch normalisation do not change. Its gradients
    are computed and dropped, because all processes must exchange the same gradients.

    Args:
        network: the trained network, without frozen parts.
        image: a training image, see `medtl_ext.networks.layers`.
        share: length of the first part, as a share of the training's steps.

    Reference: Kumar et al., *Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution*, ICLR
    2022.
    """

    network: nn.Module
    image: Tensor
    share: float = 0.25

    def attach(self, engine: Trainer) -> None:
        self._pattern, self._engine = all_but(self.image)(self.network), engine
        self.network.register_forward_pre_hook(self._keep_statistics)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.drop_gradients)

    @property
    def probing(self) -> bool:
        return _in_first(self.share, self._engine)

    def drop_gradients(self, engine: Trainer) -> None:
        """Optimizers skip parameters without gradient."""
        for name, parameter in self.network.named_parameters():
            if self.probing and re.match(self._pattern, name):
                parameter.grad = None

    def _keep_statistics(self, network: nn.Module, inputs: object) -> None:
        if self.probing:
            keep_in_eval_mode(self._pattern, network, inputs)


@dataclass(kw_only=True, eq=False)
class WeightAveraging:
    """Average the weights over the steps of a training. The averaged network is validated and saved.

    The running statistics of batch normalisation are averaged too. The training itself does not change.

    Args:
        network, evaluator: the trained network, and the engine that validates it.
        decay: share of the average that each step keeps (EMA). None gives all steps the same weight (SWA).
        start: share of the training's steps before averaging begins. Until then, the network itself is used.

    Reference: Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, UAI 2018.
    """

    network: nn.Module
    evaluator: Evaluator
    decay: float | None = 0.99
    start: float = 0.0

    def attach(self, engine: Trainer) -> None:
        how = None if self.decay is None else get_ema_multi_avg_fn(self.decay)
        self._average = AveragedModel(self.network, multi_avg_fn=how, use_buffers=True)
        self.evaluator.network = self._average.module
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average.load_state_dict(state)

    def update(self, engine: Trainer) -> None:
        """Include the network of this step."""
        if _in_first(self.start, engine):
            self._average.n_averaged.zero_()  # then the network is copied
        self._average.update_parameters(self.network)


@dataclass(kw_only=True, eq=False)
class Penalty:
    """Base class of recipes that add ``strength`` times a penalty to the loss, before the backward pass.

    Args:
        network: the trained network. It must have the source's weights when the trainer is made.
        image: a training image, see `medtl_ext.networks.layers`.
        strength: 0 or more.
    """

    network: nn.Module
    image: Tensor
    strength: float = 0.01

    def attach(self, engine: Trainer) -> None:
        self._head = layers(self.network, self.image)[-1][0]
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.penalise)

    def penalise(self, engine: Trainer) -> None:
        engine.state.output["loss"] = engine.state.output["loss"] + self.strength * self.penalty(engine)

    def features_of(self, network: nn.Module) -> list[Tensor]:
        """A list that holds the latest input of the network's head, N x C x *spatial."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[:] = inputs[:1]

        network.get_submodule(self._head).register_forward_pre_hook(keep)
        return seen


class StartingPoint(Penalty):
    """Penalise the distance of the weights from their initial values, and of the head's weights from 0 (L2-SP).

    The penalty is ``(||w - w0||^2 + ||h||^2) / 2``, where h are the weights of the head, because the target may have
    other classes.

    Reference: Li et al., *Explicit Inductive Bias for Transfer Learning with Convolutional Networks*, ICML 2018.
    """

    def attach(self, engine: Trainer) -> None:
        super().attach(engine)
        head = {*self.network.get_submodule(self._head).parameters()}
        of = trainable_parameters(self.network)
        self._pairs = [(one, torch.zeros_like(one) if one in head else one.detach().clone()) for one in of]

    def penalty(self, engine: Trainer) -> Tensor:
        return sum((parameter - towards).square().sum() for parameter, towards in self._pairs) / 2


class SpectralShrinkage(Penalty):
    """Penalise the smallest singular value of each batch's features, which, by the paper, transfers worst (BSS).

    Features are the input of the head, pixels x channels. The penalty is the squared singular value divided by the
    number of pixels. The paper has one vector per image and no divisor: its strength 0.001 for 48 images is 0.05 here.

    Reference: Chen et al., *Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer
    Learning*, NeurIPS 2019, with k = 1.
    """

    def attach(self, engine: Trainer) -> None:
        super().attach(engine)
        self._features = self.features_of(self.network)

    def penalty(self, engine: Trainer) -> Tensor:
        rows = self._features[0].float().movedim(1, -1).flatten(0, -2)
        return torch.linalg.eigvalsh(rows.T @ rows / len(rows))[0]  # the square of a singular value


class FeatureDistillation(Penalty):
    """Keep the input of the head close to that of the untouched source, on the same images.

    The penalty is the squared distance of both at a pixel, averaged over pixels. This is DELTA without attention (which
    weights channels by the source's loss without them) and without weight decay of the head.

    Reference: Li et al., *DELTA: Deep Learning Transfer using Feature Map with Attention*, ICLR 2019.
    """

    def attach(self, engine: Trainer) -> None:
        super().attach(engine)
        self._source = copy.deepcopy(self.network).eval()
        self._features, self._kept = (self.features_of(network) for network in (self.network, self._source))

    def penalty(self, engine: Trainer) -> Tensor:
        with torch.no_grad():
            engine.inferer(engine.state.output["image"], self._source)
        return (self._features[0].float() - self._kept[0].float()).square().sum(1).mean()


@dataclass(kw_only=True, eq=False)
class JointTraining:
    """Also train on the source's images: each batch is drawn from both training sets.

    Args:
        source: the source's training set, with items like the target's, and best the same number.
        seed: of the run.

    Raises:
        InputError: there are several processes, which would all draw the same images.
    """

    source: Dataset
    seed: int

    def attach(self, engine: Trainer) -> None:
        if idist.get_world_size() > 1:
            raise InputError("joint trains in one process; start it without torchrun.")
        target = engine.data_loader
        how = {"batch_size": target.batch_size, "num_workers": target.num_workers, "shuffle": True}
        engine.data_loader = DataLoader(ConcatDataset([target.dataset, self.source]), **how)
        EpochSeed(dataset=self.source, seed=self.seed).attach(engine)


@dataclass(kw_only=True, eq=False)
class MergedAdapters:
    """Validate, keep and use a network with the additions of `medtl_ext.networks.low_rank` merged into its weights.

    Args:
        network, evaluator: that is trained, and what validates it.
    """

    network: nn.Module
    evaluator: Evaluator

    def attach(self, engine: Trainer) -> None:
        self.merge()
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.merge)
        engine.add_event_handler(Events.COMPLETED, self.end)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The network has been loaded."""
        self.merge()

    def merge(self) -> None:
        self.evaluator.network = merge_adapters(copy.deepcopy(self.network))

    def end(self) -> None:
        """From now on the trained network itself is a plain one."""
        self.evaluator.network = merge_adapters(self.network)


@dataclass(kw_only=True, eq=False)
class CachedFeatures:
    """Pass every image through a frozen network once; then only its `SpatialAdapter` sees the features again.

    Nothing is kept where images come in random patches, where what follows the head changes its answer, or where
    several processes exchange gradients: then each step is a whole one, with the same result.

    Args:
        network: that is trained, of `medtl_ext.networks.spatial_adapter`.
    """

    network: nn.Module

    def attach(self, engine: Trainer) -> None:
        engine.add_event_handler(Events.STARTED, self.begin)

    def begin(self, engine: Trainer) -> None:
        """Take the place of the inferer of the training."""
        self._head = next(part for part in self.network.modules() if isinstance(part, SpatialAdapter))
        self._images, self._kept = len(engine.data_loader.dataset), {}
        self._inferer, self._usable = engine.inferer, idist.get_world_size() == 1
        self._head.register_forward_pre_hook(self._note)
        engine.inferer = self

    def __call__(self, images: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        keys = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in images] if self._usable else []
        if keys and all(key in self._kept for key in keys):
            return self._inferer(torch.stack([self._kept[key] for key in keys]), self._head)
        logits = self._inferer(images, network, *args, **kwargs)
        if self._usable:
            features = self._features.detach().float()
            with torch.no_grad():
                again = self._inferer(features, self._head)
            self._kept |= zip(keys, features, strict=True)
            same = again.shape == logits.shape and torch.allclose(again, logits, atol=1e-2)  # in bfloat16
            self._usable = same and len(self._kept) <= self._images
            self._kept = self._kept if self._usable else {}
        return logits

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


@dataclass(kw_only=True, eq=False)
class WeightInterpolation:
    """Interpolate between the start and the end of a training, and keep what validates best (WiSE-FT).

    Weights and statistics of batch normalisation are ``(1 - c) start + c end``. The end is the best network of the
    training; it is kept as ``finetuned.pt``. Writes ``interpolation.csv``: ``coefficient`` and the evaluator's key
    metric. If the head starts from random weights, the end will be best.

    Args:
        network, evaluator: the trained network, and the engine that validates it.
        save_dir: folder where `ResumableCheckpoint` saves ``model.pt``, which is replaced.
        coefficients: values of c to try. If several validate equally well, the first is kept.

    Reference: Wortsman et al., *Robust Fine-Tuning of Zero-Shot Models*, CVPR 2022.
    """

    network: nn.Module
    evaluator: Evaluator
    save_dir: str | Path
    coefficients: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0)

    def attach(self, engine: Trainer) -> None:
        self._start = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}
        engine.add_event_handler(Events.COMPLETED, self.choose)

    def choose(self, engine: Trainer) -> None:
        """Validate each coefficient, and keep the best. If the run is killed here, it resumes with the same end."""
        model, end = (Path(self.save_dir, name) for name in ("model.pt", "finetuned.pt"))
        if engine.state.epoch == 0:
            return
        if idist.get_rank() == 0 and not end.is_file():
            with atomic_path(end) as temporary:
                shutil.copy(model, temporary)
        idist.barrier()
        tuned, rows = read_weights(end), []
        name = self.evaluator.state.key_metric_name
        for coefficient in self.coefficients:
            self.network.load_state_dict(self._between(tuned, coefficient))
            self.evaluator.run()
            rows.append({"coefficient": coefficient, name: float(self.evaluator.state.metrics[name])})
        table = pd.DataFrame(rows)
        best = float(table["coefficient"][table[name].fillna(-np.inf).idxmax()])
        logger.info("%g of the way from the start to the end of the training validates best", best)
        if idist.get_rank() == 0:
            with atomic_path(model) as temporary:
                torch.save(self._between(tuned, best), temporary)
            write_csv(Path(self.save_dir) / "interpolation.csv", table)

    def _between(self, end: Mapping[str, Tensor], coefficient: float) -> dict[str, Tensor]:
        return {
            name: torch.lerp(self._start[name], value, coefficient) if value.is_floating_point() else value
            for name, value in end.items()
        }


def _in_first(share: float, engine: Trainer) -> bool:
    """Whether the current step is in the first part of the training; also correct in a resumed run."""
    return engine.state.iteration <= share * engine.state.max_epochs * engine.state.epoch_length


class TensorBoardCurves(TensorBoardStatsHandler):
    """A training's loss by iteration and its validation scores by epoch, for TensorBoard.

    Args:
        log_dir: folder for TensorBoard.
        validator: the validation engine. Its scores after the end of the training are not part of the curve.
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

    Columns: subject, patient (if the data name the patient of a scan), class, one per metric, those of
    `medtl_ext.metrics.compute_segmentation_scores` (see there for empty masks), and ``empty``: the class is neither in
    the truth nor in the segmentation.

    The evaluator's output must have ``pred`` and ``label``, one-hot MetaTensors, whose affine gives the spacing.

    Args:
        class_names: names of the foreground classes, in order.
        metrics: names of the evaluator's metrics that have details per case.
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
        """Store the subjects of the batch, and score the foreground classes."""
        self._subjects += [item["subject"] for item in engine.state.batch]
        self._patients += [item.get("patient", "") for item in engine.state.batch]
        for item in engine.state.output:
            affine, pair = item["label"].affine, (item[key][1:].cpu().numpy() for key in ("pred", "label"))
            scores = [compute_segmentation_scores(*masks, affine) for masks in zip(*pair, strict=True)]
            self._scores.append([list(one.values()) for one in scores])
            self._names = list(scores[0])

    def tabulate(self, engine: Evaluator) -> None:
        """Join subjects and scores. With several processes, both are gathered in the order of ranks."""
        subjects, patients = string_list_all_gather(self._subjects), string_list_all_gather(self._patients)
        scores = evenly_divisible_all_gather(torch.tensor(self._scores, dtype=torch.float64, device=idist.device()))
        known = [{"subject": s} | ({"patient": p} if p else {}) for s, p in zip(subjects, patients, strict=True)]
        columns = {"class": np.tile(self.class_names, len(subjects))}
        columns |= {name: engine.state.metric_details[name].flatten().tolist() for name in self.metrics}
        columns |= dict(zip(self._names, scores.flatten(0, 1).T.tolist(), strict=True))
        columns["empty"] = scores[..., -2:].eq(0).all(-1).flatten().tolist()  # both volumes
        table = pd.DataFrame(known).loc[np.repeat(np.arange(len(known)), len(self.class_names))].assign(**columns)
        engine.state.subject_table = table.drop_duplicates(["subject", "class"], ignore_index=True)
