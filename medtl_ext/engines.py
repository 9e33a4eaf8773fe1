"""MONAI trainer and inferer, extended by what transfer learning needs."""

from collections.abc import Sequence
from functools import cache, partial
from itertools import chain, combinations
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medtl_ext._validation import InputError


class MixedPrecisionInferer(SimpleInferer):
    """Forward pass in bfloat16 on CPUs that compute in it; the logits are returned in float32.

    This doubles the steps per second on CPUs with AVX-512 BF16 or AMX. Weights, loss and optimizer stay in float32. On
    other CPUs, and on a GPU (where the trainer's own ``amp`` decides), it is a `SimpleInferer`. A 3D convolution over
    fewer slices than its kernel spans stays in float32: in bfloat16 the gradient of its weights reads uninitialised
    memory, and is sometimes NaN (PyTorch 2.13, oneDNN).

    Example:
        In a bundle config: ``"inferer": {"_target_": "medtl_ext.engines.MixedPrecisionInferer"}`` of a trainer.

    >>> MixedPrecisionInferer()(torch.rand(1, 1, 8, 8), torch.nn.Conv2d(1, 2, 3)).dtype
    torch.float32
    """

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if inputs.device.type != "cpu":
            return super().__call__(inputs, network, *args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()), _ThinMapsInFloat32():
            return super().__call__(inputs, network, *args, **kwargs).float()


DILATION = {torch.conv3d: 5, torch.conv_transpose3d: 7}  # position of this argument


class _ThinMapsInFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in DILATION:
            dilation = args[DILATION[func]]
            if args[0].shape[-3] <= dilation[0] * (args[1].shape[-3] - 1):
                with torch.autocast("cpu", enabled=False):
                    return func(*(part if part is None else part.float() for part in args[:3]), *args[3:])
        return func(*args, **(kwargs or {}))


@cache
def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, rather than only storing it."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.6 lacks this function
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


class MirroredInferer(Inferer):
    """Average the logits over an image and its mirror images; each prediction is mirrored back first.

    Args:
        inferer: makes each prediction.
        axes: spatial axes to mirror, in all combinations: two axes need four predictions.

    Raises:
        InputError: ``axes`` is empty.

    >>> left = torch.eye(2)[None, None]
    >>> MirroredInferer(SimpleInferer(), [1])(left, lambda image: image * torch.tensor([1.0, 0.0]))[0, 0].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int]) -> None:
        super().__init__()
        if not axes:
            raise InputError("mirror is true, but flip_axes names no axis; give --flip_axes, or leave mirror out.")
        sides = chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1))
        self.inferer, self.sides = inferer, [[2 + axis for axis in side] for side in sides]

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        found = (self.inferer(inputs.flip(side), network, *args, **kwargs).flip(side) for side in self.sides)
        return sum(found) / len(self.sides)


class WeightedTrainer(SupervisedTrainer):
    """A `SupervisedTrainer` that passes the batch's per-pixel weights, if it has any, to the loss.

    A weight map per image must follow its image through flips and rotations. It is therefore part of the batch, under
    the key ``weight``, and reaches the loss as the keyword argument ``weight``. Everything else (mixed precision,
    gradient accumulation, compilation) is the stock iteration.

    Example:
        In a bundle config: ``"trainer": {"_target_": "medtl_ext.engines.WeightedTrainer", ...}`` with the arguments of
        `monai.engines.SupervisedTrainer` and a loss such as `medtl_ext.losses.RiskWeightedLoss`.
    """

    weight_key = "weight"

    def run(self) -> None:
        """Train. With ``max_epochs=0`` the network stays as it is, and only ``COMPLETED`` is fired."""
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
