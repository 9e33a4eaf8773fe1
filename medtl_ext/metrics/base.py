"""The base class of all transferability metrics: sums that add up over batches, processes and machines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.utils import CommonKeys, convert_to_tensor
from torch.nn.functional import pad

from medtl_ext._validation import InputError, as_plain_tensor


class TransferMetric(Metric):
    """Base class of the transferability metrics: takes batches, merges, and adds up over all processes.

    A metric is used in one of three ways. All give the value of its one-shot ``compute_*`` function:

    - by hand: ``metric.update(source_probs, target_labels)`` for every batch, then ``metric.compute()``;
    - split over workers: each fills its own metric, then ``metric.merge(other)`` in any order (metrics can be pickled);
    - attached to an Ignite engine, such as a MONAI evaluator. In a bundle's JSON the class name is enough::

        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "key_val_metric": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}}
        }

    Attached, it reads the network's raw logits and the labels from ``engine.state.output`` (see
    `probabilities_and_labels`), so the evaluator needs no postprocessing. If `pred` already holds probabilities, give
    ``"output_transform": "$monai.handlers.from_engine(['pred', 'label'])"``, which passes them on as they are.

    Under torch.distributed every process sees its share of the data. Call ``compute()`` on all processes, also on those
    without data: each gets the value over all data. Each sample must be seen once only: use MONAI's
    ``DistributedSampler(even_divisible=False)``.

    A new metric defines its sums in ``update`` and its value in ``_evaluate``:

    >>> class MeanConfidence(TransferMetric):
    ...     '''Mean over the samples of the highest probability.'''
    ...     def update(self, source_probs, target_labels):
    ...         self._add(confidence=source_probs.amax(1).sum(), count=torch.tensor(len(source_probs)))
    ...     def _evaluate(self, sums):
    ...         return sums["confidence"] / sums["count"]
    >>> metric = MeanConfidence()
    >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> metric.compute()
    tensor(0.6250, dtype=torch.float64)

    Args:
        ignore_index: samples with this target label are left out.
        output_transform: turns ``engine.state.output`` into the arguments of `update`, as a tuple or as a mapping from
            argument name to value. Lists of tensors are stacked into a batch. None uses the default of the class.

    Attributes:
        higher_is_better: True if a higher value predicts better transfer.
        inputs: names of the arguments of `update`.
        growing_axes: how many leading axes of the sums may differ between batches (they are shorter while a class has
            not been seen). The other axes must agree.
    """

    higher_is_better: bool = True
    inputs: tuple[str, ...] = ("source_probs", "target_labels")
    growing_axes: int = 1

    def __init__(
        self, *, ignore_index: int | None = None, output_transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.ignore_index = ignore_index
        super().__init__(self.default_output_transform if output_transform is None else output_transform)

    @staticmethod
    def default_output_transform(output: Any) -> tuple[Any, Any]:
        """What an attached metric reads from the engine by default: `probabilities_and_labels`."""
        return probabilities_and_labels(output)

    @abstractmethod
    def update(self, source_probs: torch.Tensor, target_labels: torch.Tensor) -> None:
        """Add one batch. If it raises an `InputError`, the metric stays as it was."""

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> Any:
        """Return the value for the sums over all batches of all processes, without changing the sums.

        A metric that needs more than sums overrides `compute` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither _evaluate() nor compute().")

    def compute(self) -> Any:
        """Return the value over everything seen by all processes. Further updates are possible afterwards.

        Raises:
            InputError: no process has seen a sample.
        """
        return self._evaluate(self._totals())

    def _totals(self) -> dict[str, torch.Tensor]:
        """The sums over all processes."""
        return self._require_seen(all_reduce_sums(self._sums, growing_axes=self.growing_axes))

    def _require_seen(self, seen: Any) -> Any:
        if not seen:
            name = type(self).__name__
            raise InputError(f"{name} has seen no sample; call update() before compute(); is the data loader empty?")
        return seen

    def reset(self) -> None:
        """Delete what was seen. An engine does this when an epoch starts."""
        self._sums: dict[str, torch.Tensor] = {}

    def merge(self, other: TransferMetric) -> None:
        """Add what another metric of the same class has seen. The other one stays as it is."""
        if type(other) is not type(self):
            raise InputError(f"other is {type(other).__name__}; expected {type(self).__name__} to merge with.")
        self._add(**other._sums)

    def _add(self, **sums: torch.Tensor) -> None:
        """Add to the named sums, which grow with new classes; they are float64, on the device of the first batch."""
        shapes = {
            name: _common_shape(self.inputs[0], [self._sums.get(name, value).shape, value.shape], self.growing_axes)
            for name, value in sums.items()
        }
        for name, value in sums.items():
            if name not in self._sums:
                self._sums[name] = value.to(torch.float64, copy=True)
                continue
            held = self._sums[name] = grown(self._sums[name], shapes[name])
            held += grown(value.to(held.device), shapes[name])

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Update from the engine's current output. Ignite calls this after every iteration."""
        output = self._output_transform(engine.state.output)
        values = [output[name] for name in self.inputs] if isinstance(output, Mapping) else output
        for batch in _batches(values):
            self.update(*batch)


def probabilities_and_labels(output: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """Read source probabilities and target labels from the output of a MONAI engine.

    Args:
        output: a dictionary of batches, or the list of dictionaries that MONAI's decollation makes of it, with `pred`
            (the network's raw logits, Z x *spatial per sample) and `label`.

    Returns:
        Probabilities and labels, each a list of samples. The probabilities are the softmax of the logits over the
        channels, or their sigmoid if there is one channel.

    Raises:
        InputError: `pred` or `label` is missing, or `pred` does not hold raw logits.
    """
    logits, labels = read_output(output, CommonKeys.PRED, CommonKeys.LABEL)
    logits = [as_plain_tensor(CommonKeys.PRED, sample) for sample in logits]
    _require_logits(logits[0])
    return [_probabilities(sample) for sample in logits], list(labels)


def read_output(output: Any, *keys: str) -> list[Any]:
    """The values of each key in a MONAI engine's output: a batch, or the list of samples that decollation makes."""
    items = [output] if isinstance(output, Mapping) else output
    if not (isinstance(items, Sequence) and items and all(isinstance(item, Mapping) for item in items)):
        expected = f"MONAI's dictionaries with {' and '.join(map(repr, map(str, keys)))}"
        raise InputError(f"engine.state.output is {type(output).__name__}; expected {expected}: give output_transform.")
    for key in keys:
        if missing := [item for item in items if item.get(key) is None]:
            there = ", ".join(sorted(map(str, missing[0])))
            raise InputError(f"engine.state.output has no '{key}', only {there}; give an output_transform.")
    return [output[key] if isinstance(output, Mapping) else [item[key] for item in items] for key in keys]


def _require_logits(sample: torch.Tensor) -> None:
    # A few pixels are enough: values that sum to one everywhere, or are all 0 and 1, are not raw logits.
    pixels = sample.reshape(len(sample), -1)[:, :64]
    if len(pixels) > 1:
        processed = ((pixels >= 0) & ((pixels.sum(0) - 1).abs() < 1e-4)).all()
    else:
        processed = ((pixels == 0) | (pixels == 1)).all()
    if bool(processed) or not sample.is_floating_point():
        advice = "take the activation out of the postprocessing, or give an output_transform of probabilities"
        raise InputError(f"output 'pred' holds probabilities or classes; expected the network's raw logits: {advice}.")


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.float() if logits.element_size() < 4 else logits
    return logits.sigmoid() if len(logits) == 1 else logits.softmax(0)


def _batches(values: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    """Stack lists of samples into one batch, or into batches of one sample if their shapes differ."""
    values = list(values)
    if not all(isinstance(value, (list, tuple)) for value in values):
        return [tuple(values)]
    columns = [[convert_to_tensor(item) for item in value] for value in values]
    if all(len({item.shape for item in column}) == 1 for column in columns):
        return [tuple(torch.stack(column) for column in columns)]
    return zip(*([item.unsqueeze(0) for item in column] for column in columns), strict=True)


def all_gathered(own: Any) -> list[Any]:
    """The objects of all processes of torch.distributed, by rank; without torch.distributed, only this one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return shares


def all_reduce_sums(sums: Mapping[str, torch.Tensor], *, growing_axes: int = 1) -> dict[str, torch.Tensor]:
    """Return the named sums over all processes of torch.distributed; without torch.distributed, the sums themselves.

    Processes may hold different names and shapes (fewer classes, or no data). The result has all names, each in the
    largest shape. ``sums`` stays unchanged.
    """
    shapes = all_gathered({name: tuple(value.shape) for name, value in sums.items()})
    if len(shapes) == 1:
        return dict(sums)
    # NCCL sends GPU memory only, and a process without data has no tensor that names a device.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    reduced = {}
    for name in sorted(set().union(*shapes)):
        shape = _common_shape(name, [held[name] for held in shapes if name in held], growing_axes)
        own = sums.get(name, torch.zeros([0] * len(shape), device=device))
        # all_reduce adds in memory order, which must be the same in all processes.
        total = grown(own.to(device, torch.float64, copy=True), shape).contiguous()
        dist.all_reduce(total)
        reduced[name] = total.to(own.device)
    return reduced


def _common_shape(name: str, shapes: Sequence[Sequence[int]], growing_axes: int) -> tuple[int, ...]:
    fixed = {tuple(shape[growing_axes:]) for shape in shapes}
    if len(fixed) > 1 or len({len(shape) for shape in shapes}) > 1:
        listed = " and ".join(sorted(map(str, fixed)))
        raise InputError(f"{name} differs between batches, {listed}; resample to one grid, or use a metric per group.")
    return tuple(map(max, zip(*shapes, strict=True)))


def grown(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Pad the axes of a tensor with zeros at their ends, up to a larger shape."""
    missing = [n for have, wanted in zip(tensor.shape, shape, strict=True) for n in (wanted - have, 0)]
    return pad(tensor, missing[::-1]) if any(missing) else tensor
