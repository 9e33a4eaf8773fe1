"""The class all transferability metrics share: sums that add up over batches, processes and machines."""

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
    """Base of the transferability metrics: streams over batches, merges, and adds up over all processes.

    A metric is used in one of three ways, which all give the value of its one-shot ``compute_*`` function:

    - by hand: ``metric.update(source_probs, target_labels)`` for every batch, then ``metric.compute()``;
    - split over workers: each fills its own metric, then ``metric.merge(other)`` in any order (metrics can be pickled);
    - attached to an Ignite engine, which a MONAI evaluator is. In a bundle's JSON the class name is enough::

        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "key_val_metric": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}}
        }

    Attached, it reads the network's raw logits and the labels from ``engine.state.output`` (see
    `probabilities_and_labels`), so the evaluator needs no postprocessing. Where `pred` holds probabilities already, say
    so by ``"output_transform": "$monai.handlers.from_engine(['pred', 'label'])"``, which hands them over as they are.

    Under torch.distributed every process sees its share of the data and ``compute()``, called on all of them, gives all
    of them the value of the whole; processes without data take part. Let each sample be seen once: MONAI's
    ``DistributedSampler(even_divisible=False)``.

    A new metric declares what it sums and what it makes of the sums:

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
            argument name to value; lists of tensors are stacked into a batch. None: the class's own default.

    Attributes:
        higher_is_better: True when a higher value predicts better transfer.
        inputs: names of the arguments of `update`.
        growing_axes: how many leading axes of the sums may differ between batches (a class that is not seen yet makes
            them shorter); the others must agree.
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
        """What is read from an engine when nothing else is said: `probabilities_and_labels`."""
        return probabilities_and_labels(output)

    @abstractmethod
    def update(self, source_probs: torch.Tensor, target_labels: torch.Tensor) -> None:
        """Add one batch. A batch that is refused with an `InputError` leaves the metric as it was."""

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> Any:
        """Return the value that belongs to the sums over all batches of all processes, leaving the sums unchanged.

        A metric whose state is more than sums overrides `compute` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither _evaluate() nor compute().")

    def compute(self) -> Any:
        """Return the value over everything seen by all processes; updates may go on afterwards.

        Raises:
            InputError: nothing was seen, by any process.
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
        """Forget everything; an engine does this when an epoch starts."""
        self._sums: dict[str, torch.Tensor] = {}

    def merge(self, other: TransferMetric) -> None:
        """Add everything another metric of the same class has seen; the other one stays as it is."""
        if type(other) is not type(self):
            raise InputError(f"other is {type(other).__name__}; expected {type(self).__name__} to merge with.")
        self._add(**other._sums)

    def _add(self, **sums: torch.Tensor) -> None:
        """Add to the named sums (kept in float64 on the device of the first), which grow to hold new classes."""
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
        """Update from the engine's current output; attached to the engine by Ignite."""
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
        Probabilities and labels, each a list of samples. The logits go through a softmax over the channels,
        or through a sigmoid when there is one channel.

    Raises:
        InputError: `pred` or `label` is missing, or `pred` is not logits any more.
    """
    logits, labels = read_output(output, CommonKeys.PRED, CommonKeys.LABEL)
    logits = [as_plain_tensor(CommonKeys.PRED, sample) for sample in logits]
    _require_logits(logits[0])
    return [_probabilities(sample) for sample in logits], list(labels)


def read_output(output: Any, *keys: str) -> list[Any]:
    """What a MONAI engine's output has under each key: a batch, or the list of samples that decollation makes of it."""
    items = [output] if isinstance(output, Mapping) else output
    if not (isinstance(items, Sequence) and items and all(isinstance(item, Mapping) for item in items)):
        expected = f"MONAI's dictionaries with {' and '.join(map(repr, map(str, keys)))}"
        raise InputError(f"engine.state.output is {type(output).__name__}; expected {expected}: see output_transform.")
    for key in keys:
        if missing := [item for item in items if item.get(key) is None]:
            there = ", ".join(sorted(map(str, missing[0])))
            raise InputError(f"engine.state.output has no '{key}', only {there}; name keys by an output_transform.")
    return [output[key] if isinstance(output, Mapping) else [item[key] for item in items] for key in keys]


def _require_logits(sample: torch.Tensor) -> None:
    # A few pixels tell: logits that sum to exactly one everywhere, or are all 0 and 1, have been processed already.
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
    """Stack lists of samples into one batch, or into batches of one where the samples' shapes differ."""
    values = list(values)
    if not all(isinstance(value, (list, tuple)) for value in values):
        return [tuple(values)]
    columns = [[convert_to_tensor(item) for item in value] for value in values]
    if all(len({item.shape for item in column}) == 1 for column in columns):
        return [tuple(torch.stack(column) for column in columns)]
    return zip(*([item.unsqueeze(0) for item in column] for column in columns), strict=True)


def all_gathered(own: Any) -> list[Any]:
    """What each process of torch.distributed has, in the order of their ranks; without it, that of this one alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return shares


def all_reduce_sums(sums: Mapping[str, torch.Tensor], *, growing_axes: int = 1) -> dict[str, torch.Tensor]:
    """Return the named sums added up over all processes of torch.distributed, or as they are without it.

    Processes may hold different names and shapes (fewer classes, no data at all): the result has all names, in the
    largest shape. ``sums`` is left unchanged.
    """
    shapes = all_gathered({name: tuple(value.shape) for name, value in sums.items()})
    if len(shapes) == 1:
        return dict(sums)
    # NCCL only moves GPU memory, and a process without data has no device of its own to go by.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    reduced = {}
    for name in sorted(set().union(*shapes)):
        shape = _common_shape(name, [held[name] for held in shapes if name in held], growing_axes)
        own = sums.get(name, torch.zeros([0] * len(shape), device=device))
        # Reduced in the order of memory, which must be the same for all.
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
    """The tensor with zeros at the end of its axes, in a larger shape; itself where it has that shape."""
    missing = [n for have, wanted in zip(tensor.shape, shape, strict=True) for n in (wanted - have, 0)]
    return pad(tensor, missing[::-1]) if any(missing) else tensor
