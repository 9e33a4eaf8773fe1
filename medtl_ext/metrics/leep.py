r"""LEEP, the log expected empirical prediction, as one number, as a map over a common grid, and as a map per image.

LEEP (Nguyen et al., *LEEP: A new measure to evaluate transferability of learned representations*, ICML 2020) measures
how well the source network's class probabilities p(z) predict the target's labels y, if each source class z is only
translated to target classes by P(y|z):

.. math::
    J(y, z) = \sum_i 1[y_i = y]\, p_i(z), \qquad
    P(y | z) = J(y, z) / \textstyle\sum_y J(y, z), \qquad
    \mathrm{LEEP} = \tfrac1n \sum_i \ln \textstyle\sum_z P(y_i | z)\, p_i(z)

The predictions are needed twice: first for J, then with P(y|z). The streaming classes run the network only once. They
keep J in memory, and the predictions, in their own dtype, in a `PredictionSpool` that moves to disk when it grows.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

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

# One logarithm of a product of eight is faster than eight logarithms. Each factor is at least 1 / (Z N), see
# `_likelihoods`, so a product stays within float64 unless Z N exceeds 1e38.
FACTORS = 8

# Probabilities N x Z x *spatial, labels N x *spatial, and whether some of them are `IGNORED`.
Batch = tuple[torch.Tensor, torch.Tensor, bool]


def compute_leep(source_probs: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """LEEP of a source network's predictions on target samples; in segmentation every pixel is a sample.

    Args:
        source_probs: N x Z, or N x Z x *spatial, the source's class probabilities (not logits). Z = 1 is the output s
            of a sigmoid head, and becomes [1 - s, s].
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        ignore_index: samples with this label are left out; their probabilities must still be valid.

    Returns:
        The score in nats, a float64 scalar <= 0; higher predicts better transfer. If there is one label only it is 0,
        with a `UserWarning`, and says nothing about transfer.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> source_probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])
        >>> compute_leep(source_probs, torch.tensor([0, 0, 1, 1]))
        tensor(-0.4700, dtype=torch.float64)

    Reference: Nguyen et al., ICML 2020, eq. 2. A source class with probability 0 for all samples is left out (in the
    usual implementation it gives 0/0).
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
    """LEEP at every pixel coordinate, over N images on one grid (2D or 3D).

    Args:
        source_probs: N x Z x *spatial, the source's class probabilities (not logits); Z = 1 is a sigmoid head.
        target_labels: N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        stride: pools patches of stride x stride (x stride in 3D) pixels into one map cell. Patches at the far edges are
            smaller if the stride does not divide the grid.
        estimator: "local" estimates P(y|z) in each cell from the cell's own pixels, as in the paper. "global" estimates
            it once from all pixels.
        smoothing: pseudo-counts of the global table that are added to each local one. With few images a local table
            overfits its few pixels, and the map is too optimistic; 5 to 20 correct this.
        ignore_index: pixels with this label are left out.

    Returns:
        The map, float64, spatial size divided by the stride and rounded up; values <= 0, higher is easier to transfer
        to, NaN where no pixel is valid. If there is one label only the map is 0, with a `UserWarning`.

    Raises:
        InputError: invalid input; the message names the argument.

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

    The mean of all maps over all pixels is `compute_leep`. Unlike `compute_leep_map` this needs no common grid.

    Args:
        source_probs: N x Z x *spatial, the source's class probabilities (not logits); Z = 1 is a sigmoid head. If the
            images differ in size, a list of N tensors Z x *spatial.
        target_labels: N x *spatial (a channel axis of length one is dropped), or a list of N tensors *spatial.
        ignore_index: pixels with this label are left out.

    Returns:
        N x *spatial, float64, if all images have the same size, else a list of N maps. Values <= 0, higher is easier to
        transfer to, NaN at ignored pixels. If there is one label only the maps are 0, with a `UserWarning`.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> source_probs = torch.tensor([[[0.75, 0.25]], [[0.75, 0.75]]])
        >>> compute_leep_image_maps(source_probs[:, None], torch.tensor([[[1, 0]], [[1, 0]]])).squeeze(1)
        tensor([[-0.6286, -0.5108],
                [-0.6286, -0.7621]], dtype=torch.float64)
    """
    pairs = [(source_probs, target_labels)]
    if isinstance(source_probs, (list, tuple)):
        if not 0 < len(source_probs) == len(target_labels):
            found = f"{len(target_labels)} images, source_probs {len(source_probs)}"
            raise InputError(f"target_labels lists {found}; expected one label map for each image.")
        probs = [as_plain_tensor("source_probs", image)[None] for image in source_probs]
        pairs = zip(probs, (as_plain_tensor("target_labels", image)[None] for image in target_labels), strict=True)
    batches, metric = [_checked(*pair, ignore_index) for pair in pairs], LEEPImageMaps()
    for batch in batches:
        metric._add(**metric._batch_sums(*batch))
    return _image_maps(batches, _conditional(metric._sums["joint"]))


class LEEP(TransferMetric):
    """`compute_leep` over batches: ``compute()`` returns a float64 scalar <= 0, higher is better.

    Memory: the C x Z sums J, and up to 256 MiB of predictions; more predictions go to disk. See `TransferMetric` for
    how to attach, merge and distribute it.

    Args:
        ignore_index: samples with this label are left out.
        output_transform: see `TransferMetric`.

    >>> metric = LEEP()
    >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
    >>> metric.compute()
    tensor(-0.4700, dtype=torch.float64)
    """

    def reset(self) -> None:
        super().reset()
        self._spool = PredictionSpool()

    def update(self, source_probs: Any, target_labels: Any) -> None:
        """Add a batch: probabilities N x Z x *spatial and labels N x *spatial, as in the one-shot function."""
        batch = probs, labels, _ = _checked(source_probs, target_labels, self.ignore_index)
        self._add(**self._batch_sums(*batch))
        self._spool.append(probs, labels.to(torch.int16))

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        for batch in other._spool:
            self._spool.append(*batch)

    def of(self, source_probs: Any, target_labels: Any) -> torch.Tensor:
        """The value of these samples alone, independent of earlier updates; arguments as in the one-shot function."""
        batch = _checked(source_probs, target_labels, self.ignore_index)
        return _mean(self._log_sums(self._batch_sums(*batch), [batch]))

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> Any:
        # First the batches of this process, then the sum over all processes.
        own = self._log_sums(sums, self._batches(sums["joint"].device))
        return _mean(all_reduce_sums({"log_sums": own} if isinstance(own, torch.Tensor) else {})["log_sums"])

    def _batches(self, device: torch.device) -> Iterator[Batch]:
        return ((probs.to(device), labels.to(device), bool(labels.min() < 0)) for probs, labels in self._spool)

    def _log_sums(self, sums: dict[str, torch.Tensor], batches: Iterable[Batch]) -> torch.Tensor | int:
        """Sum of the log-likelihoods of all samples, and number of samples: 2 (x *cells), or 0 without batches."""
        table = _conditional(sums["joint"])
        return sum(_log_sums(*batch, table).sum(1) for batch in batches)

    def _batch_sums(self, probs: torch.Tensor, labels: torch.Tensor, ignoring: bool) -> dict[str, torch.Tensor]:
        return {"joint": _joint(probs, labels, ignoring)}


class LEEPMap(LEEP):
    """`compute_leep_map` over batches of images on one grid: ``compute()`` returns the float64 map.

    Memory: C x Z numbers per map cell, and up to 256 MiB of predictions; more predictions go to disk.

    A map is not a scalar, so it cannot be an evaluator's key metric (MONAI warns and skips the comparison). Add it to a
    key metric in a bundle's JSON::

        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "key_val_metric": {"leep": {"_target_": "medtl_ext.metrics.LEEP"}},
            "additional_metrics": {"leep_map": {"_target_": "medtl_ext.metrics.LEEPMap", "stride": 4}}
        }

    The map is then ``evaluator.state.metrics["leep_map"]``. MONAI accepts additional metrics only together with a key
    metric. Without one, call ``LEEPMap().attach(evaluator, "leep_map")``.

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
            raise InputError(f"smoothing is {smoothing}, but estimator='global' has no local tables; leave it 0.")
        super().__init__(**options)

    def _batch_sums(self, probs: torch.Tensor, labels: torch.Tensor, ignoring: bool) -> dict[str, torch.Tensor]:
        if labels.ndim < 2:
            raise InputError(f"source_probs has shape {tuple(probs.shape)}; a map needs N x Z x *spatial.")
        cells, _ = self._cells(labels.shape[1:], labels.device)
        joint = _joint(probs, labels, ignoring, cells if self.estimator == "local" else None)
        # Only the shape of "grid" is used: images of another shape are then refused.
        return {"joint": joint, "grid": joint.new_zeros(1, *labels.shape[1:])}

    def _log_sums(self, sums: dict[str, torch.Tensor], batches: Iterable[Batch]) -> torch.Tensor | int:
        joint = sums["joint"]
        cells, shape = self._cells(sums["grid"].shape[1:], joint.device)
        if self.smoothing:
            pooled = joint.sum(2, keepdim=True)
            joint = joint + self.smoothing * pooled / pooled.sum()
        table, total = _conditional(joint), 0
        for batch in batches:
            of_pixels = _log_sums(*batch, table, cells if self.estimator == "local" else None)
            if self.stride > 1:
                of_pixels = of_pixels.new_zeros(2, prod(shape)).index_add_(1, cells, of_pixels)
            total += of_pixels.view(2, *shape)
        return total

    def _cells(self, grid: Sequence[int], device: torch.device) -> tuple[torch.Tensor, list[int]]:
        """The index of each pixel's map cell, and the shape of the map."""
        cells, shape = torch.zeros((), dtype=torch.int64, device=device), []
        for length in grid:
            shape.append(-(-length // self.stride))
            cells = cells[..., None] * shape[-1] + torch.arange(length, device=device) // self.stride
        return cells.flatten(), shape


class LEEPImageMaps(LEEP):
    """`compute_leep_image_maps` over batches: ``compute()`` returns one map per image, in the order they were seen.

    N x *spatial, float64, if all images have the same size, else a list. Under torch.distributed P(y|z) comes from all
    processes, and each process gets the maps of its own images. Memory: as for `LEEP`, plus the maps.

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
    """Return class probabilities N x Z x *spatial as floating point; one sigmoid channel s becomes [1 - s, s].

    >>> check_probabilities("source_probs", [[0.25], [1.0]])
    tensor([[0.7500, 0.2500],
            [0.0000, 1.0000]])
    """
    probs = check_samples(name, value, channels="Z")
    tolerance = 1e-2 if torch.finfo(probs.dtype).bits < 32 else 2e-3
    if probs.shape[1] == 2 and probs.element_size() >= 4:
        total = probs[:, 0] + probs[:, 1]  # three times as fast as sum(1)
    else:
        total = probs.sum(1, dtype=torch.promote_types(probs.dtype, torch.float32))
    # aminmax keeps NaN, so these four numbers are enough for all checks; the device synchronises only once.
    low, high, low_total, high_total = (
        torch.stack([bound.to(total.dtype) for tensor in (probs, total) for bound in torch.aminmax(tensor)])
    ).tolist()
    if not (torch.finfo(total.dtype).min <= low <= high <= torch.finfo(total.dtype).max):
        raise InputError(f"{name} holds NaN or Inf; look for a diverged network or a broken input image.")
    if low < 0 or high > 1 + tolerance:
        raise InputError(f"{name} ranges from {low:.4g} to {high:.4g}; expected 0 to 1: apply a softmax to logits.")
    if probs.shape[1] == 1:
        return torch.cat([1 - probs, probs], dim=1).clamp_(min=0)
    if low_total < 1 - tolerance or high_total > 1 + tolerance:
        found = f"sums to between {low_total:.4g} and {high_total:.4g} over its {probs.shape[1]} channels"
        raise InputError(f"{name} {found}; expected a softmax, which sums to 1 (several sigmoid outputs do not).")
    return probs


def _checked(source_probs: Any, target_labels: Any, ignore_index: int | None) -> Batch:
    probs = check_probabilities("source_probs", source_probs)
    labels = check_labels_of("source_probs", probs, target_labels, ignore_index=ignore_index)
    return probs, labels, ignore_index is not None and bool(labels.min() < 0)


def _blocks(
    probs: torch.Tensor, labels: torch.Tensor, ignoring: bool, cells: torch.Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """Yield parts of a batch that are small enough for the processor's cache.

    Each part has: a slice of the images and one of the pixels; the probabilities, Z x samples, in float64; the place of
    each sample in a flattened C x cells table; and a mask, images x pixels, False where a label is ignored (or None).
    """
    probs = probs.reshape(*probs.shape[:2], -1)
    labels = labels.reshape(len(probs), -1)
    n_images, n_source, n_pixels = probs.shape
    n_samples = max(2**12, (2**24 if probs.is_cuda else 2**18) // n_source)
    # Many images and few pixels, so that the used parts of the tables also stay in the cache.
    columns = max(1, min(n_pixels, n_samples // min(n_images, FACTORS)))
    rows = n_samples // columns
    for row in range(0, n_images, rows):
        for column in range(0, n_pixels, columns):
            images, pixels = slice(row, row + rows), slice(column, column + columns)
            part = probs[images, :, pixels].movedim(1, 0)
            weights = torch.empty(part.shape, dtype=torch.float64, device=probs.device).copy_(part)
            places = labels[images, pixels].long()
            valid = None
            if ignoring:
                valid, places = places >= 0, places.clamp(min=0)
            if cells is not None:
                places = torch.add(cells[pixels], places, alpha=int(cells[-1]) + 1)
            yield images, pixels, weights.flatten(1), places.flatten(), valid


def _joint(
    probs: torch.Tensor, labels: torch.Tensor, ignoring: bool, cells: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum J(y, z) over the samples of each cell, C x Z x cells. Without ``cells`` there is one cell."""
    n_source, n_classes = probs.shape[1], max(int(labels.max()), 0) + 1
    n_cells = 1 if cells is None else int(cells[-1]) + 1
    joint = torch.zeros(n_source, n_classes * n_cells, dtype=torch.float64, device=probs.device)
    for _, _, weights, places, valid in _blocks(probs, labels, ignoring, cells):
        if valid is not None:
            keep = valid.flatten()
            weights, places = weights[:, keep], places[keep]
        for row, weight in zip(joint, weights, strict=True):
            row.scatter_add_(0, places, weight)
    return joint.view(n_source, n_classes, n_cells).transpose(0, 1)


def _conditional(joint: torch.Tensor) -> torch.Tensor:
    """P(y|z) from J. It is 0 for a source class without mass, whose probability is 0 in all samples."""
    samples = joint.flatten(1).sum(1)
    if not bool(samples.sum() > 0):
        raise InputError("target_labels holds no valid sample: every label equals ignore_index; change ignore_index.")
    if int((samples > 0).sum()) == 1:
        warn("target_labels holds one class only, so LEEP is 0, its best value, and says nothing about transfer.")
    mass = joint.sum(0)
    return joint / torch.where(mass > 0, mass, 1)


def _likelihoods(
    probs: torch.Tensor, labels: torch.Tensor, ignoring: bool, table: torch.Tensor, cells: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor | None]]:
    """Yield sum_z P(y|z) p(z) block by block, images x pixels; the value at an ignored pixel has no meaning.

    Each sample contributes to its own table, so P(y|z) >= p(z) / N, and the sum is at least 1 / (Z N).
    """
    rows = table.transpose(0, 1).flatten(1)
    for images, pixels, weights, places, valid in _blocks(probs, labels, ignoring, cells):
        expected = rows[0].index_select(0, places).mul_(weights[0])
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            expected.addcmul_(row.index_select(0, places), weight)
        yield images, pixels, expected.view(len(labels[images]), -1), valid


def _log_sums(
    probs: torch.Tensor, labels: torch.Tensor, ignoring: bool, table: torch.Tensor, cells: torch.Tensor | None = None
) -> torch.Tensor:
    """At each pixel, over the images of a batch: sum of the log-likelihoods, and number of images; 2 x pixels."""
    sums = torch.zeros(2, labels[0].numel(), dtype=torch.float64, device=table.device)
    for _, pixels, likelihood, valid in _likelihoods(probs, labels, ignoring, table, cells):
        if valid is None:
            sums[1, pixels] += len(likelihood)
        else:
            likelihood = torch.where(valid, likelihood, 1)
            sums[1, pixels] += valid.sum(0)
        whole = len(likelihood) // FACTORS * FACTORS
        products = likelihood[:whole].view(-1, FACTORS, likelihood.shape[1]).prod(1)
        sums[0, pixels] += products.log_().sum(0) + likelihood[whole:].prod(0).log_()
    return sums


def _image_maps(batches: Iterable[Batch], table: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """The log-likelihoods of each image, NaN at ignored pixels."""
    maps: list[torch.Tensor] = []
    for batch in batches:
        labels = batch[1]
        found = torch.empty(len(labels), labels[0].numel(), dtype=torch.float64, device=table.device)
        for images, pixels, likelihood, valid in _likelihoods(*batch, table):
            if valid is not None:
                likelihood = torch.where(valid, likelihood, torch.nan)
            found[images, pixels] = likelihood.log_().clamp_(max=0)
        maps.extend(found.view(labels.shape))
    return torch.stack(maps) if len({image.shape for image in maps}) == 1 else maps


def _mean(log_sums: torch.Tensor) -> torch.Tensor:
    # Rounding can make probabilities sum to slightly more than 1, and the score slightly positive. 0/0 gives the NaN of
    # a cell without valid pixels.
    return (log_sums[0] / log_sums[1]).clamp(max=0)
