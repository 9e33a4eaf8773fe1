"""Shared parts of the feature metrics: reading a layer of the network, sums over classes, and samples of pixels.

A feature metric measures how well the target's labels separate the features that a source network computes from the
target's images. Features are N x D, one vector per sample, or N x D x *spatial, one vector per pixel. `MomentMetric`
needs sums only. `SampleMetric` needs the vectors: all of them, or a seeded sample of each patient's pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer, SimpleInferer
from monai.utils import CommonKeys
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import interpolate

from medtl_ext._validation import (
    IGNORED,
    LARGEST_LABEL,
    InputError,
    as_plain_tensor,
    check_labels_of,
    check_samples,
    require_choice,
    require_number,
)
from medtl_ext.metrics._spool import PredictionSpool
from medtl_ext.metrics.base import TransferMetric, all_gathered, read_output

# Rows per block, so that float64 copies stay small.
BLOCK = 2**16

# How many samples "auto" draws per class and patient if features lie on a grid.
DENSE_PIXELS = 400


class Samples(NamedTuple):
    """Feature vectors with their labels and patients.

    Attributes:
        features: M x D, float64.
        labels: M, int64.
        groups: M, int64, the index in ``names`` of the patient that each sample comes from.
        names: the patients.
    """

    features: Tensor
    labels: Tensor
    groups: Tensor
    names: tuple[Hashable, ...]

    def resampled(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features and labels with each patient repeated ``counts`` times, one count for each of ``names``.

        >>> samples = Samples(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]), ("ann", "bob"))
        >>> samples.resampled([0, 2])
        (tensor([[2.],
                [2.]]), tensor([1, 1]))
        """
        times = check_counts(counts, len(self.names)).to(self.groups.device)[self.groups]
        return self.features.repeat_interleave(times, 0), self.labels.repeat_interleave(times, 0)


def check_counts(counts: ArrayLike, n_patients: int) -> Tensor:
    """Return valid counts of a bootstrap: whole numbers, ``n_patients`` or resamples x ``n_patients``."""
    counts = torch.as_tensor(np.asarray(counts))
    if counts.shape[-1:] != (n_patients,):
        raise InputError(f"counts has shape {tuple(counts.shape)}; expected {n_patients} numbers, one per patient.")
    if counts.is_floating_point() or int(counts.min()) < 0 or not bool((counts.sum(-1) > 0).all()):
        raise InputError("counts holds fractions or negative numbers, or is all 0; expected whole numbers, 0 or more.")
    return counts


def check_features(features: Any, target_labels: Any, *, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Return M x D features in float64 and M labels. Every pixel is a sample; ``ignore_index`` is left out.

    Args:
        features: N x D or N x D x *spatial, finite, of any dtype and layout.
        target_labels: N or N x *spatial class indices; a channel axis of length one is dropped.
        ignore_index: label of samples to leave out.

    Raises:
        InputError: NaN or Inf, no sample left, shapes that do not fit, or invalid labels.

    >>> features, labels = check_features([[1, 2], [3, 4], [5, 6]], [0, 1, 9], ignore_index=9)
    >>> features.dtype, labels
    (torch.float64, tensor([0, 1]))
    """
    rows, labels, _ = _rows(*checked_samples(features, target_labels, ignore_index))
    require_samples(len(labels), 1)
    return rows.double(), labels


def require_samples(n: int | Tensor, minimum: int = 2) -> None:
    """Raise an `InputError` if there are fewer than ``minimum`` samples."""
    if n < minimum:
        raise InputError(f"features holds {int(n)} sample(s) that are not ignored; expected at least {minimum}.")


def content_keys(features: Tensor, *, seed: int = 0, exact: bool = False) -> Tensor:
    """One pseudo-random int64 per row that depends only on the row's values and the seed.

    Rows are first rounded to eight bits of precision (unless ``exact``), so that float noise between two batch sizes or
    devices hardly ever changes a key. Sorting by keys shuffles the rows. The result does not depend on their order, nor
    on how they were divided into batches and processes.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = (torch.randint(2**62, (features.shape[1],), generator=generator) * 2 + 1).to(features.device)
    keys = [torch.zeros(0, dtype=torch.int64, device=features.device)]
    for block in features.split(BLOCK):
        block = block.double() + 0.0  # -0.0 is 0.0
        bits = block.view(torch.int64) if exact else block.to(torch.bfloat16).view(torch.int16).long()
        keys.append((bits * odd).sum(1))
    return _mixed(torch.cat(keys) + seed)


def canonical_order(features: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """A pseudo-random permutation of the samples (M x D and M) that depends only on their content.

    Computations that are random or depend on the order of the samples use this order. They then give the same value for
    any permutation of the samples, any division into batches, and any number of processes.

    >>> features, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0])
    >>> turned = features.flip(0), labels.flip(0)
    >>> torch.equal(features[canonical_order(features, labels)], turned[0][canonical_order(*turned)])
    True
    """
    order = torch.argsort(labels, stable=True)
    for exact in (True, False):  # stable sorts: the last key, the rounded one, decides first
        order = order[torch.argsort(content_keys(features[order], seed=seed, exact=exact), stable=True)]
    return order


def feature_sums(features: Tensor, labels: Tensor, needs: Iterable[str] = ()) -> dict[str, Tensor]:
    """Sums over the samples of each class, in float64: the state of a `MomentMetric`.

    Args:
        features: M x D.
        labels: M class indices; C is the largest plus one.
        needs: sums to compute besides ``count`` (C) and ``total`` (C x D): ``"gram"`` (D x D, the sum of x x'),
            ``"squares"`` (C x D, of x ** 2), ``"class_gram"`` (C x D x D, x x' by class) and ``"norms"`` (``cubic``, D,
            the sum of ||x||^2 x, and ``quartic``, 1, of ||x||^4).

    >>> sums = feature_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 0]), ["gram"])
    >>> sums["count"].tolist(), sums["total"].tolist(), sums["gram"].tolist()
    ([2.0], [[4.0, 6.0]], [[10.0, 14.0], [14.0, 20.0]])
    """
    n_classes, sums = int(labels.max()) + 1, {}
    for part, classes in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        for name, value in _block_sums(part.double(), classes, n_classes, needs):
            sums[name] = sums[name].add_(value) if name in sums else value
    return sums


def _block_sums(rows: Tensor, labels: Tensor, n_classes: int, needs: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    yield "count", torch.bincount(labels, minlength=n_classes).double()
    by_class = rows.new_zeros(n_classes, rows.shape[1])
    yield "total", by_class.index_add(0, labels, rows)
    if "squares" in needs:
        yield "squares", by_class.index_add(0, labels, rows**2)
    if "gram" in needs:
        yield "gram", gram(rows)
    if "norms" in needs:
        squared = torch.linalg.vecdot(rows, rows)
        yield "cubic", squared @ rows
        yield "quartic", (squared @ squared)[None]
    if "class_gram" in needs:
        yield "class_gram", torch.stack([gram(rows[labels == label]) for label in range(n_classes)])


def gram(rows: Tensor) -> Tensor:
    """The D x D sum of x x' over the rows, in their dtype."""
    if rows.is_cuda:
        return rows.T @ rows
    array = rows.detach().numpy()
    return torch.from_numpy(array.T @ array)  # NumPy computes only half of a symmetric product


class FeatureMetric(TransferMetric):
    """Base class of the feature metrics: reads a layer of the network, flattens pixels, keeps track of patients.

    By hand: ``metric.update(features, target_labels)``. Attached to a MONAI evaluator, it reads the features while the
    evaluator's network runs::

        "additional_metrics": {"h_score": {"_target_": "medtl_ext.metrics.HScore", "layer": "upcat_1"}}

    It reads the labels from ``engine.state.output``. If labels have no grid (classification), features are averaged
    over their grid. If the two grids differ, labels are resampled to the features' grid by nearest neighbour. The
    inferer must run the network once per batch (such as ``SimpleInferer`` over slices), because sliding windows do not
    line up with the labels.

    Args:
        layer: name of the module (as in ``network.named_modules()``) whose output is the features. None takes the
            penultimate features: the input of the last linear or convolution layer.
        pixels: keep at most this many samples per class and patient (`subject` in the engine's batch). They are drawn
            by a seeded reservoir; the draw does not depend on the order, the batches or the number of processes. None
            keeps all. "auto" draws 400 if the metric needs samples and is attached to an engine whose features lie on a
            grid; otherwise it keeps all.
        body: leave out background pixels where the image is exactly zero, as it is outside the body after
            `medtl_ext.transforms.NormalizeBodyd`. Only used when attached.
        seed: of the reservoir.
        ignore_index: samples with this label are left out.
        output_transform: turns ``engine.state.output`` into features, labels and, optionally, patients. Then no layer
            is read.
    """

    inputs = ("features", "target_labels")
    keeps_samples: ClassVar[bool] = False

    def __init__(
        self,
        *,
        layer: str | None = None,
        pixels: int | Literal["auto"] | None = "auto",
        body: bool = True,
        seed: int = 0,
        ignore_index: int | None = None,
        output_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.pixels = pixels if pixels in (None, "auto") else require_number("pixels", pixels, 1, whole=True)
        self.layer, self.body, self.seed = layer, body, seed
        self._tapped = output_transform is None
        super().__init__(ignore_index=ignore_index, output_transform=output_transform)

    def update(self, features: Any, target_labels: Any, groups: Sequence[Hashable] | None = None) -> None:
        """Add a batch: features N x D (x *spatial), labels N (x *spatial), and N patients (``groups``) or None."""
        self._take(*checked_samples(features, target_labels, self.ignore_index), groups)

    def _take(self, features: Tensor, labels: Tensor, groups: Sequence[Hashable] | None) -> None:
        """Add a checked batch, whose labels are `IGNORED` where a pixel is left out."""
        if groups is not None and len(groups) != len(features):
            raise InputError(f"groups names {len(groups)} patients for {len(features)} samples; expected one for each.")
        rows, labels, owners = _rows(features, labels)
        add = self._add_rows if self._samples is None else self._samples.add
        if len(rows):
            add(rows, labels, owners, [""] * len(features) if groups is None else groups)

    def of(self, features: Any, target_labels: Any) -> Any:
        """The value of these samples alone, independent of earlier updates; arguments as in the one-shot function."""
        return self._score(*check_features(features, target_labels, ignore_index=self.ignore_index))

    def _score(self, features: Tensor, labels: Tensor) -> Any:
        """Return the value for M x D features in float64 and M labels."""
        raise NotImplementedError

    def compute(self) -> Any:
        """Return the value over everything seen by all processes. Further updates are possible afterwards."""
        return super().compute() if self._samples is None else self._score(*self.samples()[:2])

    def reset(self) -> None:
        super().reset()
        limit = self.pixels if isinstance(self.pixels, int) else None
        self._samples = SampleStore(limit, self.seed) if self.keeps_samples or limit is not None else None

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        if self._samples is not None:
            self._samples.merge(other._samples)

    def samples(self) -> Samples:
        """The samples kept by all processes, in canonical order.

        Raises:
            InputError: no sample was seen, or the metric keeps sums only (``pixels=None``).
        """
        if self._samples is None:
            raise InputError(f"{type(self).__name__} keeps sums, not samples; set pixels to draw samples.")
        return self._require_seen(self._samples.gathered())

    def attach(self, engine: Engine, name: str, *args: Any, **kwargs: Any) -> None:
        """Attach to an engine (MONAI's evaluators call this), and read its network's layer from then on."""
        super().attach(engine, name, *args, **kwargs)
        if self._tapped:
            TappedInferer.tap(engine, self.layer)

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Update from the tapped layer and the engine's current output."""
        if not self._tapped:
            super().iteration_completed(engine)
            return
        labels, images = _read(engine.state.output, CommonKeys.LABEL), None
        if self.body:
            with suppress(InputError):
                images = _read(engine.state.output, CommonKeys.IMAGE)
        features, labels, images = _aligned(TappedInferer.of(engine).features[self.layer], labels, images)
        features, labels = checked_samples(features, labels, self.ignore_index)
        if self._samples is not None and self.pixels == "auto" and features.ndim > 2:
            self._samples.limit = DENSE_PIXELS
        if images is not None:
            labels = labels.masked_fill((images == 0) & (labels == 0), IGNORED)
        self._take(features, labels, _read_subjects(engine.state.batch))


class MomentMetric(FeatureMetric):
    """A feature metric that needs sums over classes only (``needs`` of `feature_sums`): its memory stays constant."""

    needs: ClassVar[tuple[str, ...]] = ()

    def _score(self, features: Tensor, labels: Tensor) -> Any:
        rows = features - features[0]  # so that constant features are exactly zero
        return self._evaluate(feature_sums(rows.sub_(rows.mean(0)), labels, self.needs))

    def _add_rows(self, rows: Tensor, labels: Tensor, owners: Tensor, groups: Sequence[Hashable]) -> None:
        self._add(**feature_sums(rows, labels, self.needs))


class SampleMetric(FeatureMetric):
    """A feature metric that needs the samples: its memory grows with their number, unless ``pixels`` draws some."""

    keeps_samples = True


class FeatureSamples(SampleMetric):
    """Collects the samples, so that every ``compute_*`` function of features can use them without another pass.

    ``compute()`` returns `Samples`. All metrics can share them, and patients can be resampled from them::

        "key_val_metric": {"samples": {"_target_": "medtl_ext.metrics.FeatureSamples", "pixels": 400}}

    >>> metric = FeatureSamples(pixels=1)
    >>> metric.update(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]), ["ann", "ann", "bob"])
    >>> samples = metric.compute()
    >>> sorted(zip(samples.features.flatten().tolist(), samples.labels.tolist(), samples.groups.tolist()))
    [(0.0, 0, 0), (1.0, 1, 0), (2.0, 1, 1)]
    >>> samples.names
    ('ann', 'bob')
    """

    def compute(self) -> Samples:
        """Return the samples of all processes in canonical order."""
        return self.samples()


class SampleStore:
    """Samples per class and patient: all of them, or the ``limit`` samples with the lowest content keys.

    The lowest keys of a union are among the lowest keys of its parts. So stores can be merged, and every division of
    the data gives the same sample. The samples are kept in a `PredictionSpool`, in their own dtype.
    """

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit, self.seed = limit, seed
        self.names: dict[Hashable, int] = {}
        self.width: int | None = None
        self.device = torch.device("cpu")
        self._spool = PredictionSpool()
        self._held = self._drawn_before = 0

    def add(self, rows: Tensor, labels: Tensor, owners: Tensor, groups: Sequence[Hashable]) -> None:
        """Add M x D rows with labels. ``owners`` are indices into ``groups``, the patients' names."""
        self.require_width(rows.shape[1])
        self.width, self.device = rows.shape[1], rows.device
        present, owners = owners.unique(return_inverse=True)
        numbers = [self.names.setdefault(groups[owner], len(self.names)) for owner in present.tolist()]
        self._append(*self._drawn(rows, labels, torch.tensor(numbers, device=rows.device)[owners]))
        if self.limit is not None and self._held > 2 * self._drawn_before + self.limit:
            drawn = self._drawn(*self._all())
            self._spool.close()
            self._spool, self._held, self._drawn_before = PredictionSpool(), 0, len(drawn[0])
            self._append(*drawn)

    def require_width(self, width: int | None) -> None:
        """Raise an `InputError` if earlier rows have another width."""
        if None not in (width, self.width) and width != self.width:
            raise InputError(f"features has {width} channels here, {self.width} before; use one layer of one network.")

    def merge(self, other: SampleStore) -> None:
        """Add all samples of another store, and take over its limit if this store has none yet."""
        self.limit = self.limit or other.limit
        for batch in list(other.batches()) if other is self else other.batches():
            self.add(*batch, list(other.names))

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the stored rows, their labels, and the indices of their patients in ``names``."""
        for rows, labels, owners in self._spool:
            yield rows.to(self.device), labels.to(self.device).long(), owners.to(self.device).long()

    def gathered(self) -> Samples | None:
        """The samples of all processes in canonical order, or None if there are none."""
        store, shares = self, all_gathered(self)
        if len(shares) > 1:
            store = SampleStore(None, self.seed)
            for share in shares:
                share.device = torch.device("cpu")  # not the GPU of the other process
                store.merge(share)
        if not store.names:
            return None
        rows, labels, owners = store._drawn(*store._all())
        rows, names = rows.double(), sorted(store.names, key=str)
        groups = torch.tensor([names.index(name) for name in store.names], device=rows.device)[owners]
        order = canonical_order(rows, labels, seed=self.seed)
        return Samples(rows[order], labels[order], groups[order], tuple(names))

    def _append(self, rows: Tensor, labels: Tensor, owners: Tensor) -> None:
        self._spool.append(rows, labels.to(torch.int16), owners.to(torch.int32))
        self._held += len(rows)

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, labels, owners = (torch.cat(column) for column in zip(*self.batches(), strict=True))
        return rows, labels, owners

    def _drawn(self, rows: Tensor, labels: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The samples with the lowest keys of each class of each patient."""
        if self.limit is None or len(rows) <= self.limit:
            return rows, labels, owners
        order = canonical_order(rows, labels, seed=self.seed)
        stratum, by_stratum = (owners * (LARGEST_LABEL + 1) + labels)[order].sort(stable=True)
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(stratum, stratum)
        kept = order[by_stratum[place < self.limit]]
        return rows[kept], labels[kept], owners[kept]


class TappedInferer(Inferer):
    """Wraps an engine's inferer and keeps the outputs of some layers for all metrics attached to the engine."""

    def __init__(self, inferer: Inferer) -> None:
        self.inferer = inferer
        self.layers: set[str | None] = set()
        self.features: dict[str | None, Tensor] = {}

    @classmethod
    def tap(cls, engine: Engine, layer: str | None) -> None:
        """Keep the output of a layer from the start of the run on: while MONAI attaches metrics there is no network."""
        engine.add_event_handler(Events.STARTED, lambda: cls.of(engine).layers.add(layer))

    @classmethod
    def of(cls, engine: Engine) -> TappedInferer:
        """The wrapped inferer of an engine; it is wrapped at the first call."""
        if getattr(engine, "network", None) is None:
            advice = "attach to a MONAI SupervisedEvaluator, or give an output_transform of features and labels"
            raise InputError(f"{type(engine).__name__} has no network to read layers from; {advice}.")
        if not isinstance(engine.inferer, cls):
            engine.inferer = cls(engine.inferer or SimpleInferer())
        return engine.inferer

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with tap_features(network, self.layers) as tapped:
            result = self.inferer(inputs, network, *args, **kwargs)
        for layer in self.layers:
            if len(tapped[layer]) != 1 or len(tapped[layer][0]) != len(inputs):
                ran = f"ran {len(tapped[layer])} times for one batch; expected once, to match the labels"
                raise InputError(f"layer {layer or 'penultimate'} {ran}; use SimpleInferer over slices or patches.")
            self.features[layer] = tapped[layer][0]
        return result


def checked_samples(features: Any, target_labels: Any, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Finite features N x D x *spatial, and labels N x *spatial on their device, `IGNORED` where left out."""
    features = check_samples("features", features, channels="D")
    # aminmax keeps NaN, and reads the data once.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(features))).all()):
        raise InputError("features holds NaN or Inf; look for a diverged network or a float16 overflow.")
    return features, check_labels_of("features", features, target_labels, ignore_index=ignore_index)


def _rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M x D rows of the valid pixels, their labels, and the index of the sample (of N) that each belongs to."""
    owners = torch.arange(len(labels), device=labels.device)
    owners = owners.view(-1, *(1 for _ in labels.shape[1:])).expand(labels.shape)
    rows = features.movedim(1, -1).reshape(-1, features.shape[1])
    labels, owners = labels.reshape(-1), owners.reshape(-1)
    valid = labels != IGNORED
    return (rows, labels, owners) if bool(valid.all()) else (rows[valid], labels[valid], owners[valid])


def _mixed(keys: Tensor) -> Tensor:
    """Spread the bits of int64 keys (the finaliser of the splitmix64 generator)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        keys = (keys ^ ((keys >> shift) & (2 ** (64 - shift) - 1))) * factor
    return keys ^ ((keys >> 31) & (2**33 - 1))


def _read(output: Any, key: str) -> Tensor:
    """One key of a MONAI engine's output, as a batch."""
    (values,) = read_output(output, key)
    return as_plain_tensor(key, values if isinstance(output, Mapping) else torch.stack([*map(torch.as_tensor, values)]))


def _read_subjects(batch: Any) -> list[Hashable] | None:
    """The patients' names in an engine's batch (or the names of the scans, without patients), or None."""
    if isinstance(batch, Mapping):
        subjects = batch.get("patient", batch.get("subject"))
    else:
        subjects = [i.get("patient", i.get("subject")) if isinstance(i, Mapping) else None for i in batch]
    known = isinstance(subjects, Sequence) and not isinstance(subjects, str) and None not in subjects
    return list(subjects) if known else None


def _aligned(features: Tensor, labels: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring features, labels, and the largest magnitude over the images' channels to one grid."""
    if labels.ndim > 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim == 1:
        return features.flatten(2).double().mean(2) if features.ndim > 2 else features, labels, None
    images = None if images is None or images.shape[2:] != labels.shape[1:] else images.abs().amax(1)
    grid = features.shape[2:]
    if len(grid) == labels.ndim - 1 and labels.shape[1:] != grid:
        labels, images = (
            None if values is None else interpolate(values[:, None].double(), grid, mode="nearest-exact")[:, 0]
            for values in (labels, images)
        )
    return features, labels, images


@contextmanager
def tap_features(network: nn.Module, layers: Iterable[str | None]) -> Iterator[dict[str | None, list[Tensor]]]:
    """Collect the outputs of some layers while the network runs. The hooks are removed at the end of the block.

    Args:
        network: any module; a `torch.nn.parallel.DistributedDataParallel` wrapper is removed.
        layers: names as in ``network.named_modules()``. None stands for the penultimate features: the input of the last
            linear or convolution layer that runs, or the output of the network's own module ``penultimate``.

    Yields:
        Layer -> its outputs, one for each time it ran (for None: each time the network ran), in the order in which the
        layers ran.

    Raises:
        InputError: the network has no such layer, or the output of a layer is not a tensor.

    >>> network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    >>> with tap_features(network, ["1", None]) as tapped:
    ...     _ = network(torch.ones(5, 3))
    >>> tapped["1"][0].shape, torch.equal(tapped["1"][0], tapped[None][0])
    (torch.Size([5, 2]), True)
    """
    network = getattr(network, "module", network)
    modules = {name: module for name, module in network.named_modules() if name}
    tapped: dict[str | None, list[Tensor]] = defaultdict(list)
    last_input: object = None

    def keep(layer: str | None, output: object) -> None:
        if not isinstance(output, Tensor):
            raise InputError(f"layer {layer} returns {type(output).__name__}; choose a layer that returns a tensor.")
        # A copy, because an in-place activation may follow.
        tapped[layer].append(output if layer is None else output.clone())

    def note_input(_: nn.Module, inputs: tuple[object, ...]) -> None:
        nonlocal last_input
        last_input = inputs[0]

    handles = []
    try:
        for layer in layers:
            if layer is None and isinstance(own := getattr(network, "penultimate", None), nn.Module):
                handles.append(own.register_forward_hook(lambda _, __, output: keep(None, output)))
            elif layer is None:
                weighted = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
                handles.extend(module.register_forward_pre_hook(note_input) for module in weighted)
                handles.append(network.register_forward_hook(lambda *_: keep(None, last_input)))
            else:
                module = modules[require_choice("layer", layer, modules)]
                handles.append(module.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output)))
        yield tapped
    finally:
        for handle in handles:
            handle.remove()
