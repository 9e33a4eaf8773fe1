r"""LEEP, the log expected empirical prediction, as one number, as a map over a common grid, and as a map per image.

LEEP (Nguyen et al., *LEEP: A new measure to evaluate transferability of learned representations*, ICML 2020) asks how
well the labels y of the target can be told from the source network's class probabilities p(z), if all one may do is
rename source classes to target classes:

.. math::
    J(y, z) = \sum_i 1[y_i = y]\, p_i(z), \qquad
    P(y | z) = J(y, z) / \textstyle\sum_y J(y, z), \qquad
    \mathrm{LEEP} = \tfrac1n \sum_i \ln \textstyle\sum_z P(y_i | z)\, p_i(z)

Each sample's prediction is needed twice, for J and then under P(y|z). The streaming classes ask the network only once:
they keep J in memory, and the predictions, in their own dtype, in a `PredictionSpool` that moves to disk when it grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from medtl_ext._validation import (
    InputError,
    as_plain_tensor,
    check_labels_of,
    check_samples,
    require_choice,
    require_number,
    warn,
)
from medtl_ext.metrics._spool import PredictionSpool
from medtl_ext.metrics.base import TransferMetric, all_reduce_sums

ESTIMATORS = ("local", "global")

# One logarithm of a product is quicker than eight. No factor is below 1 / (Z N), see `_likelihoods`, so that no product
# of eight leaves the range of float64 before Z N is 1e38.
FACTORS = 8


def compute_leep(source_probs: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """LEEP of a source network's predictions on target samples; in segmentation every pixel is a sample.

    Args:
        source_probs: N x Z, or N x Z x *spatial, the source's class probabilities (not logits). With Z = 1 they are a
            sigmoid head's s, which counts as [1 - s, s].
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: samples with this label are left out; their probabilities must be valid all the same.

    Returns:
        The score in nats, a float64 scalar <= 0; higher predicts better transfer. One label only gives 0 with a
        `UserWarning`: it says nothing about transfer.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> source_probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])
        >>> compute_leep(source_probs, torch.tensor([0, 0, 1, 1]))
        tensor(-0.4700, dtype=torch.float64)

    Reference: Nguyen et al., ICML 2020, eq. 2. A source class that no sample is given any probability of is left out
    (0/0 in the usual implementation).
    """
    return LEEP(ignore_index=ignore_index).of(source_probs, target_labels)


def compute_leep_map(
    source_probs: Any,
    target_labels: Any,
    *,
    stride: int = 1,
    estimator: str = "local",
    smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """LEEP at every pixel coordinate, over N images that share a grid (in 2D or 3D).

    Args:
        source_probs: N x Z x *spatial, the source's class probabilities (not logits); Z = 1 is a sigmoid head.
        target_labels: N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        stride: pools the pixels of stride x stride patches (x stride in 3D) into one map cell; patches at the far edges
            are smaller where the grid is not divisible.
        estimator: "local" estimates P(y|z) in each cell from its own pixels, as the paper does; "global" estimates it
            once from all pixels.
        smoothing: pseudo-counts of the global table added to each local one. With few images a local table fits its own
            few pixels and the map is too optimistic; some 5 to 20 pull it back.
        ignore_index: pixels with this label are left out.

    Returns:
        The map, float64, spatial size divided by the stride and rounded up; values <= 0, higher is easier to transfer
        to, NaN where no pixel is valid. One label only gives zeros with a `UserWarning`.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> source_probs = torch.tensor([[[0.75, 0.5]], [[0.25, 0.5]]])  # 2 images of 1 x 2 pixels, a sigmoid head
        >>> compute_leep_map(source_probs[:, None], torch.tensor([[[1, 1]], [[0, 0]]]))
        tensor([[-0.4700, -0.6931]], dtype=torch.float64)

    Reference: Duan et al., *Transfer Risk Map*, eq. 4; stride 4 is Tan et al., ICIP 2023.
    """
    metric = LEEPMap(stride=stride, estimator=estimator, smoothing=smoothing, ignore_index=ignore_index)
    return metric.of(source_probs, target_labels)


def compute_leep_image_maps(
    source_probs: Any, target_labels: Any, *, ignore_index: int | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """One map per image, ``ln sum_z P(y|z) p(z)`` at each of its pixels, with P(y|z) from all pixels of all images.

    The mean of all maps over all pixels is `compute_leep`. Other than a `compute_leep_map` this needs no common grid.

    Args:
        source_probs: N x Z x *spatial, the source's class probabilities (not logits); Z = 1 is a sigmoid head. A list
            of N tensors Z x *spatial where the images differ in size.
        target_labels: N x *spatial (a channel axis of length one is dropped), or a list of N tensors *spatial.
        ignore_index: pixels with this label are left out.

    Returns:
        N x *spatial, float64, when all images have one size, else a list of N maps; values <= 0, higher is easier to
        transfer to, NaN at ignored pixels. One label only gives zeros with a `UserWarning`.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> source_probs = torch.tensor([[[0.75, 0.25]], [[0.75, 0.75]]])
        >>> compute_leep_image_maps(source_probs[:, None], torch.tensor([[[1, 0]], [[1, 0]]])).squeeze(1)
        tensor([[-0.6286, -0.5108],
                [-0.6286, -0.7621]], dtype=torch.float64)
    """
    if not isinstance(source_probs, (list, tuple)):
        batches = [_Batch.checked(source_probs, target_labels, ignore_index)]
    elif not 0 < len(source_probs) == len(target_labels):
        raise InputError(f"target_labels lists {len(target_labels)} images, source_probs {len(source_probs)}.")
    else:
        batches = [
            _Batch.checked(
                as_plain_tensor("source_probs", probs)[None],
                as_plain_tensor("target_labels", labels)[None],
                ignore_index,
            )
            for probs, labels in zip(source_probs, target_labels, strict=True)
        ]
    metric = LEEPImageMaps()
    for batch in batches:
        metric._add(**metric._batch_sums(batch))
    return _image_maps(batches, _conditional(metric._sums["joint"]))


class _StreamingLEEP(TransferMetric):
    """What the three streaming classes share: J in memory, the predictions in a spool until P(y|z) is known."""

    def reset(self) -> None:
        super().reset()
        self._spool = PredictionSpool()

    def update(self, source_probs: Any, target_labels: Any) -> None:
        """Add a batch: N x Z x *spatial probabilities and N x *spatial labels, as in the one-shot function."""
        batch = _Batch.checked(source_probs, target_labels, self.ignore_index)
        self._add(**self._batch_sums(batch))
        self._spool.append(batch.probs, batch.labels.to(torch.int16))

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        for batch in other._spool:
            self._spool.append(*batch)

    def of(self, source_probs: Any, target_labels: Any) -> torch.Tensor:
        """The value of these samples alone, whatever was seen before; arguments as of the one-shot function."""
        batch = _Batch.checked(source_probs, target_labels, self.ignore_index)
        return _mean(sum(self._log_sums(self._batch_sums(batch), [batch])))

    def _batch_sums(self, batch: _Batch) -> dict[str, torch.Tensor]:
        return {"joint": _joint(batch)}

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> Any:
        # Those of the batches of this process, then those of all processes.
        total = sum(self._log_sums(sums, self._batches(sums["joint"].device)))
        return _mean(all_reduce_sums({"log_sums": total} if isinstance(total, torch.Tensor) else {})["log_sums"])

    def _log_sums(self, sums: dict[str, torch.Tensor], batches: Iterable[_Batch]) -> Iterator[torch.Tensor]:
        """Of each batch the sum of the log-likelihoods and their number, 2 (x *cells)."""
        raise NotImplementedError

    def _batches(self, device: torch.device) -> Iterator[_Batch]:
        return (_Batch.of(probs.to(device), labels.to(device)) for probs, labels in self._spool)


class LEEP(_StreamingLEEP):
    """`compute_leep` over batches: ``compute()`` returns a float64 scalar <= 0, higher is better.

    Memory: the C x Z sums, and 256 MiB of predictions before they go to disk. See `TransferMetric` for how to attach,
    merge and distribute it.

    Args:
        ignore_index: samples with this label are left out.
        output_transform: see `TransferMetric`.

    >>> metric = LEEP()
    >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> metric.compute()
    tensor(-0.4700, dtype=torch.float64)
    """

    def _log_sums(self, sums: dict[str, torch.Tensor], batches: Iterable[_Batch]) -> Iterator[torch.Tensor]:
        table = _conditional(sums["joint"])
        return (_log_sums(batch, table).view(2, -1).sum(1) for batch in batches)


class LEEPMap(_StreamingLEEP):
    """`compute_leep_map` over batches of images on one grid: ``compute()`` returns the float64 map.

    Memory: C x Z numbers a map cell, and 256 MiB of predictions before they go to disk.

    A map is no scalar, so it cannot be an evaluator's key metric (MONAI warns and skips the comparison). Attach it
    beside one, in a bundle's JSON::

        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "key_val_metric": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}},
            "additional_metrics": {"leep_map": {"_target_": "medtl_ext.metrics.LEEPMap", "stride": 4}}
        }

    after which the map is ``evaluator.state.metrics["leep_map"]``. MONAI takes additional metrics only beside a key
    metric; without one, ``LEEPMap().attach(evaluator, "leep_map")`` does it.

    Args:
        stride, estimator, smoothing: as in `compute_leep_map`.
        options: ignore_index and output_transform, see `TransferMetric`.

    >>> metric = LEEPMap()
    >>> metric.update(torch.tensor([[[[0.75, 0.5]]]]), torch.tensor([[[1, 1]]]))
    >>> metric.update(torch.tensor([[[[0.25, 0.5]]]]), torch.tensor([[[0, 0]]]))
    >>> metric.compute()
    tensor([[-0.4700, -0.6931]], dtype=torch.float64)
    """

    def __init__(self, *, stride: int = 1, estimator: str = "local", smoothing: float = 0.0, **options: Any) -> None:
        self.stride = require_number("stride", stride, 1, whole=True)
        self.estimator = require_choice("estimator", estimator, ESTIMATORS)
        self.smoothing = require_number("smoothing", smoothing, 0)
        if smoothing and estimator == "global":
            raise InputError("smoothing pulls local tables towards the global one; with estimator='global' leave it 0.")
        super().__init__(**options)

    def _batch_sums(self, batch: _Batch) -> dict[str, torch.Tensor]:
        if batch.labels.ndim < 2:
            raise InputError(f"source_probs has shape {tuple(batch.probs.shape)}; a map needs N x Z x *spatial.")
        joint = _joint(batch) if self.estimator == "global" else self._pool(_joint(batch, located=True), leading=2)
        # Of no other use than its shape, which sums of other images must have, too.
        return {"joint": joint, "grid": joint.new_zeros(1, *batch.labels.shape[1:])}

    def _log_sums(self, sums: dict[str, torch.Tensor], batches: Iterable[_Batch]) -> Iterator[torch.Tensor]:
        table = self._table(sums["joint"], sums["grid"].shape[1:])
        return (self._pool(_log_sums(batch, table), leading=1) for batch in batches)

    def _table(self, joint: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """P(y|z), C x Z x *grid, or C x Z for the global estimator."""
        if self.estimator == "global":
            return _conditional(joint)
        if self.smoothing:
            pooled = joint.flatten(2).sum(2)
            joint = joint + self.smoothing * (pooled / pooled.sum()).view(*pooled.shape, *(1 for _ in grid))
        table = _conditional(joint)
        if self.stride > 1:
            for axis, length in enumerate(grid, start=2):
                table = table.index_select(axis, torch.arange(length, device=table.device) // self.stride)
        return table

    def _pool(self, sums: torch.Tensor, *, leading: int) -> torch.Tensor:
        """Add up the pixels of each cell; the axes after the ``leading`` ones are spatial."""
        if self.stride == 1:
            return sums
        for axis in range(leading, sums.ndim):
            length = sums.shape[axis]
            shape = [*sums.shape[:axis], -(-length // self.stride), *sums.shape[axis + 1 :]]
            cell = torch.arange(length, device=sums.device) // self.stride
            sums = sums.new_zeros(shape).index_add_(axis, cell, sums)
        return sums


class LEEPImageMaps(_StreamingLEEP):
    """`compute_leep_image_maps` over batches: ``compute()`` returns one map per image, in the order they were seen.

    N x *spatial, float64, when all images have one size, else a list. Under torch.distributed P(y|z) comes from all
    processes, and each gets the maps of its own images. Memory: as `LEEP`, and the maps.

    Args:
        ignore_index: pixels with this label are left out.
        output_transform: see `TransferMetric`.

    >>> metric = LEEPImageMaps()
    >>> metric.update(torch.tensor([[[0.75, 0.25]]]), torch.tensor([[1, 0]]))
    >>> metric.update(torch.tensor([[[0.75, 0.75]]]), torch.tensor([[1, 0]]))
    >>> metric.compute()
    tensor([[-0.6286, -0.5108],
            [-0.6286, -0.7621]], dtype=torch.float64)
    """

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        table = _conditional(sums["joint"])
        return _image_maps(self._batches(table.device), table)


def check_probabilities(name: str, value: Any) -> torch.Tensor:
    """Return N x Z x *spatial class probabilities in a floating dtype; one channel s of a sigmoid becomes [1 - s, s].

    >>> check_probabilities("source_probs", [[0.25], [1.0]])
    tensor([[0.7500, 0.2500],
            [0.0000, 1.0000]])
    """
    probs = check_samples(name, value, channels="Z")
    tolerance = 1e-2 if torch.finfo(probs.dtype).bits < 32 else 2e-3
    if probs.shape[1] == 2 and probs.element_size() >= 4:
        total = probs[:, 0] + probs[:, 1]  # a third of the time of a sum over an axis of two
    else:
        total = probs.sum(1, dtype=torch.promote_types(probs.dtype, torch.float32))
    # aminmax hands NaN on, so these four numbers decide everything with one wait for the device.
    low, high, low_total, high_total = (
        torch.stack([bound.to(total.dtype) for tensor in (probs, total) for bound in torch.aminmax(tensor)])
    ).tolist()
    if not (torch.finfo(total.dtype).min <= low <= high <= torch.finfo(total.dtype).max):
        raise InputError(f"{name} holds NaN or Inf; look for a diverged network or a broken input image.")
    if low < 0 or high > 1 + tolerance:
        raise InputError(
            f"{name} ranges from {low:.4g} to {high:.4g}; expected probabilities in [0, 1] "
            "(logits need a softmax first)."
        )
    if probs.shape[1] == 1:
        return torch.cat([1 - probs, probs], dim=1).clamp_(min=0)
    if low_total < 1 - tolerance or high_total > 1 + tolerance:
        raise InputError(
            f"{name} sums to between {low_total:.4g} and {high_total:.4g} over its {probs.shape[1]} channels; "
            "expected probabilities that sum to one (several independent sigmoids are several tasks)."
        )
    return probs


class _Batch(NamedTuple):
    """Checked predictions and labels, and what is asked of the labels more than once."""

    probs: torch.Tensor
    labels: torch.Tensor
    n_classes: int
    ignoring: bool  # some label is IGNORED

    @classmethod
    def checked(cls, source_probs: Any, target_labels: Any, ignore_index: int | None) -> _Batch:
        probs = check_probabilities("source_probs", source_probs)
        return cls.of(probs, check_labels_of("source_probs", probs, target_labels, ignore_index=ignore_index))

    @classmethod
    def of(cls, probs: torch.Tensor, labels: torch.Tensor) -> _Batch:
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        return cls(probs, labels, max(high, 0) + 1, low < 0)


class _Block(NamedTuple):
    """A part of a batch, small enough to stay in the processor's cache while it is worked on."""

    images: slice
    pixels: slice
    weights: torch.Tensor  # Z x samples, the probabilities in float64
    cells: torch.Tensor  # samples, where in a flattened C x *cells table each one looks
    valid: torch.Tensor | None  # images x pixels, False where the label is ignored; None: nowhere


def _blocks(batch: _Batch, *, located: bool) -> Iterator[_Block]:
    probs = batch.probs.reshape(*batch.probs.shape[:2], -1)
    labels = batch.labels.reshape(len(probs), -1)
    n_images, n_source, n_pixels = probs.shape
    n_samples = max(2**12, (2**24 if probs.is_cuda else 2**18) // n_source)
    # Many images and few pixels: what is looked up in the tables, and added to them, stays in the cache too.
    columns = max(1, min(n_pixels, n_samples // min(n_images, FACTORS)))
    rows = n_samples // columns
    location = torch.arange(n_pixels, device=probs.device)
    for row in range(0, n_images, rows):
        for column in range(0, n_pixels, columns):
            images, pixels = slice(row, row + rows), slice(column, column + columns)
            part = probs[images, :, pixels].movedim(1, 0)
            weights = torch.empty(part.shape, dtype=torch.float64, device=probs.device).copy_(part)
            cells = labels[images, pixels].long()
            valid = cells >= 0 if batch.ignoring else None
            if batch.ignoring:
                cells = cells.clamp(min=0)
            if located:
                cells = torch.add(location[pixels], cells, alpha=n_pixels)
            yield _Block(images, pixels, weights.flatten(1), cells.flatten(), valid)


def _joint(batch: _Batch, *, located: bool = False) -> torch.Tensor:
    """Sum J(y, z) over the samples: C x Z, or C x Z x *spatial with one table for every pixel location."""
    grid = batch.labels.shape[1:] if located else torch.Size()
    n_source, n_classes = batch.probs.shape[1], batch.n_classes
    joint = torch.zeros(n_source, n_classes * grid.numel(), dtype=torch.float64, device=batch.probs.device)
    for block in _blocks(batch, located=located):
        weights, cells = block.weights, block.cells
        if block.valid is not None:
            keep = block.valid.flatten()
            weights, cells = weights[:, keep], cells[keep]
        for row, weight in zip(joint, weights, strict=True):
            row.scatter_add_(0, cells, weight)
    return joint.view(n_source, n_classes, *grid).transpose(0, 1)


def _conditional(joint: torch.Tensor) -> torch.Tensor:
    """P(y|z) from J, zero for a source class without mass (no sample that looks it up gives it any weight)."""
    samples = joint.flatten(1).sum(1)
    if not bool(samples.sum() > 0):
        raise InputError("target_labels holds no valid sample: every label equals ignore_index.")
    if int((samples > 0).sum()) == 1:
        warn("target_labels holds one class only, so LEEP is 0, its best value, and says nothing about transfer.")
    mass = joint.sum(0)
    return joint / torch.where(mass > 0, mass, 1)


def _likelihoods(batch: _Batch, table: torch.Tensor) -> Iterator[tuple[_Block, torch.Tensor]]:
    """Yield sum_z P(y|z) p(z) block by block, images x pixels; meaningless where a pixel is ignored.

    A sample is part of the table it looks in, so that P(y|z) >= p(z) / N and the sum is at least 1 / (Z N).
    """
    located = table.ndim > 2
    rows = table.transpose(0, 1).flatten(1)
    for block in _blocks(batch, located=located):
        expected = rows[0].index_select(0, block.cells).mul_(block.weights[0])
        for row, weight in zip(rows[1:], block.weights[1:], strict=True):
            expected.addcmul_(row.index_select(0, block.cells), weight)
        yield block, expected.view(len(batch.labels[block.images]), -1)


def _log_sums(batch: _Batch, table: torch.Tensor) -> torch.Tensor:
    """Over the images of a batch, at each pixel: the sum of the log-likelihoods, and their number; 2 x *spatial."""
    sums = torch.zeros(2, batch.labels[0].numel(), dtype=torch.float64, device=table.device)
    for block, likelihood in _likelihoods(batch, table):
        if block.valid is None:
            sums[1, block.pixels] += len(likelihood)
        else:
            likelihood = torch.where(block.valid, likelihood, 1)
            sums[1, block.pixels] += block.valid.sum(0)
        whole = len(likelihood) // FACTORS * FACTORS
        products = likelihood[:whole].view(-1, FACTORS, likelihood.shape[1]).prod(1)
        sums[0, block.pixels] += products.log_().sum(0) + likelihood[whole:].prod(0).log_()
    return sums.view(2, *batch.labels.shape[1:])


def _image_maps(batches: Iterable[_Batch], table: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """The log-likelihoods themselves, NaN where a pixel is ignored."""
    maps: list[torch.Tensor] = []
    for batch in batches:
        labels = batch.labels
        found = torch.empty(len(labels), labels[0].numel(), dtype=torch.float64, device=table.device)
        for block, likelihood in _likelihoods(batch, table):
            if block.valid is not None:
                likelihood = torch.where(block.valid, likelihood, torch.nan)
            found[block.images, block.pixels] = likelihood.log_().clamp_(max=0)
        maps.extend(found.view(labels.shape))
    return torch.stack(maps) if len({image.shape for image in maps}) == 1 else maps


def _mean(log_sums: torch.Tensor) -> torch.Tensor:
    # Probabilities that sum to a hair more than one can leave the score a hair above 0; 0/0 is the NaN of a cell
    # without valid pixels.
    return (log_sums[0] / log_sums[1]).clamp(max=0)
