"""Ignite handlers of the bundles: the weight map before training, resumable checkpoints, scores per patient."""

import copy
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
from medtl_ext.losses import RiskWeightedLoss, repeat_cells
from medtl_ext.metrics import compute_segmentation_scores
from medtl_ext.networks import all_but, keep_in_eval_mode, layers, read_checkpoint, read_weights, trainable_parameters
from medtl_ext.ranking import late_gain

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class WeightMap:
    """Weigh the loss by a map that is computed when training starts, from the frozen source or from the labels.

    At `Events.STARTED` an evaluator passes once over the target's training images with the frozen source network. Its
    metric (such as `medtl_ext.metrics.LEEPMap`) gives the transferability of each pixel. ``to_weight`` (such as
    `medtl_ext.losses.risk_map`) turns that into weights. One map for all images becomes a buffer of the loss. One map
    per image becomes the key ``weight`` of the dataset, so that it follows its image through flips and rotations.
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

    ``model.pt`` is a plain ``state_dict`` of the network that is validated. It is replaced only by one of a better key
    metric, and the best value so far is kept in ``last.pt`` too: a resumed run knows it. Files are written whole or not
    at all, ``last.pt`` first, which holds what ``model.pt`` is made of: a run may be killed at any time. List it after
    the validation handler in ``train#handlers``.

    Args:
        save_dir: where the two files are.
        evaluator: the validation engine whose key metric decides. None: every epoch's network replaces the last.
        save_dict: what to go on with beside the engine's own epoch, by name: network, optimizer, schedule. What has no
            ``state_dict`` has nothing to go on with, as a recipe that only asks which step it is.
    """

    save_dir: str | Path
    save_dict: Mapping[str, Any]
    evaluator: Evaluator | None = None
    best: float = field(default=float("-inf"), init=False)
    best_epoch: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        # Of a handler without a state, such as MONAI's of a schedule, the schedule's.
        items = {name: getattr(item, "lr_scheduler", item) for name, item in self.save_dict.items()}
        items |= {name: item for name, item in self.save_dict.items() if hasattr(item, "state_dict")}
        self.save_dict = {name: item for name, item in items.items() if hasattr(item, "state_dict")}

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
            advice = "lower --learning_rate, or check your images (`python -m medtl_ext.data check`)"
            raise InputError(f"the training broke down in epoch {engine.state.epoch}: weights not finite; {advice}.")
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
        state = _unwrapped(getattr(self.evaluator, "network", self.save_dict["network"])).state_dict()
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


# Recipes of fine-tuning: what the option ``recipe`` adds to a training


@dataclass(kw_only=True, eq=False)
class LayerwiseRates:
    """A learning rate for each layer, which falls by the same factor from one layer to the next towards the image.

    Args:
        network, optimizer: of the training; the optimizer has all parameters in one group.
        image: a training image, see `medtl_ext.networks.layers`.
        lowest: the rate of the first layer as a share of that of the head, which is the optimizer's.

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
    """Train the head alone for the first part of the steps, then everything (LP-FT).

    Meanwhile the rest is as if frozen: no parameter moves, and no statistics of batch norm. Its gradients are computed
    and dropped, so that several processes agree on what they exchange.

    Args:
        network: that is trained, all of it.
        image: a training image, see `medtl_ext.networks.layers`.
        share: of the training's steps.

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
        """An optimizer passes over a parameter without a gradient."""
        for name, parameter in self.network.named_parameters():
            if self.probing and re.match(self._pattern, name):
                parameter.grad = None

    def _keep_statistics(self, network: nn.Module, inputs: object) -> None:
        if self.probing:
            keep_in_eval_mode(self._pattern, network, inputs)


@dataclass(kw_only=True, eq=False)
class WeightAveraging:
    """Average the weights over the steps of a training; the average is what is validated, saved and used.

    The running statistics of batch norm are averaged alike. The training itself is unchanged.

    Args:
        network, evaluator: that is trained, and what validates it.
        decay: what of the average each step keeps (EMA); None: all steps weigh the same (SWA).
        start: share of the training's steps before the average begins; until then it is the network itself.

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
        """Take the network of this step in."""
        if _in_first(self.start, engine):
            self._average.n_averaged.zero_()  # the next network is copied
        self._average.update_parameters(self.network)


@dataclass(kw_only=True, eq=False)
class Penalty:
    """The form of a recipe that adds ``strength`` times a penalty to the loss, before the backward pass.

    Args:
        network: that is trained; has the source's weights when the trainer is made.
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
        """From now on what went into the network's head last, N x C x *spatial."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[:] = inputs[:1]

        network.get_submodule(self._head).register_forward_pre_hook(keep)
        return seen


class StartingPoint(Penalty):
    """Pull the weights towards those that the training starts from, and the head's towards 0 (L2-SP).

    The penalty is ``(||w - w0||^2 + ||h||^2) / 2``, h the head: the target's classes may be its own.

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
    """Shrink the smallest singular value of each batch's features, which is said to transfer worst (BSS).

    Features are what goes into the head, pixels x channels. The penalty is the square of the value, over the number of
    pixels. The paper has a vector an image and no such divisor: its 0.001, of 48 images, is 0.05 here.

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
    """Keep what goes into the head near to what the untouched source has there, on the same images.

    The penalty is the squared distance of both at a pixel, the mean over pixels. This is DELTA without its attention,
    which weighs channels by what the source loses without them, and without its decay of the head.

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
    """Train on the source's images too: each batch is drawn from both.

    Args:
        source: its training set, whose items are as the target's, best as many of them.
        seed: of the run.

    Raises:
        InputError: one of several processes trains, which would all draw the same.
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
class WeightInterpolation:
    """After the training, keep the point between its start and its end that is best for the validation (WiSE-FT).

    Weights and statistics of batch norm alike are ``(1 - c) start + c end``, end being the best network of the
    training, which stays as ``finetuned.pt``. Writes ``interpolation.csv``: ``coefficient`` and the evaluator's key
    metric. Of a head that is fresh the start says nothing; then the end will be the best.

    Args:
        network, evaluator: that is trained, and what validates it.
        save_dir: where `ResumableCheckpoint` keeps ``model.pt``, which is replaced.
        coefficients: to try; of equal ones the first is kept.

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
        """Validate each, and keep the best; a run that is killed meanwhile begins with the same end."""
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
        logger.info("%g of the way from the start to the end of the training is best for the validation", best)
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
    """Whether the step is in the first part of a training, which also one that is resumed knows."""
    return engine.state.iteration <= share * engine.state.max_epochs * engine.state.epoch_length


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
