"""MONAI engines, where the stock ones lack what transfer needs."""

from functools import partial
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer

__all__ = ["WeightedTrainer"]


class WeightedTrainer(SupervisedTrainer):
    """A `SupervisedTrainer` whose loss also gets the per-pixel weights of the batch, when the batch has them.

    A weight map per image has to follow the image through flips and rotations, so it travels in the batch under the
    key ``weight`` and reaches the loss as its keyword argument of that name. Everything else (mixed precision,
    gradient accumulation, compilation) is the stock iteration.

    Example:
        In a bundle config: ``"trainer": {"_target_": "medtl_ext.engines.WeightedTrainer", ...}`` with the arguments of
        `monai.engines.SupervisedTrainer` and a loss such as `medtl_ext.losses.RiskWeightedLoss`.
    """

    weight_key = "weight"

    def run(self) -> None:
        """Train; with ``max_epochs=0`` the network stays the untouched source, and only ``COMPLETED`` is fired."""
        if self.state.max_epochs == 0:
            self.fire_event(Events.COMPLETED)
        else:
            super().run()

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]) -> dict[str, Any]:
        if batchdata is None or self.weight_key not in batchdata:
            return super()._iteration(engine, batchdata)
        weight = batchdata[self.weight_key].to(engine.state.device, non_blocking=engine.non_blocking)
        loss_function = engine.loss_function
        engine.loss_function = partial(loss_function, weight=weight)
        try:
            return super()._iteration(engine, batchdata)
        finally:
            engine.loss_function = loss_function
