"""What the metrics of features share: a tap into a named layer, sums over classes, and samples of pixels.

A feature metric asks how well the target's labels separate the features that a source network gives the target's
images. Features are N x D, one vector a sample, or N x D x *spatial, one vector a pixel. `MomentMetric` needs sums
only; `SampleMetric` needs the vectors themselves, all of them or a seeded sample of each patient's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.inferers import Inferer, SimpleInferer
from monai.utils import CommonKeys, convert_to_tensor

from medtl_ext._validation import InputError
from medtl_ext.metrics._checks import IGNORED, as_plain_tensor, check_labels
from medtl_ext.metrics.base import TransferMetric
from medtl_ext.networks import tap_features

# Rows that are worked on at a time, so that float64 copies stay small.
BLOCK = 2**16

# What "auto" draws of each class of each patient where features lie on a grid.
DENSE_PIXELS = 400


class Samples(NamedTuple):
    """Feature vectors with their labels and patients.

    Attributes:
        features: M x D, float64.
        labels: M, int64.
        groups: M, int64, the index in ``names`` of the patient that each sample comes from.
        names: the patients.
    """

    features: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    names: tuple[Hashable, ...]

    def resampled(self, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels with every patient as often as ``counts`` says, one number for each of ``names``.

        >>> samples = Samples(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]), ("ann", "bob"))
        >>> samples.resampled([0, 2])
        (tensor([[2.],
                [2.]]), tensor([1, 1]))
        """
        times = torch.as_tensor(counts, device=self.groups.device)
        if times.shape != (len(self.names),):
            raise InputError(f"counts has shape {tuple(times.shape)}; expected {(len(self.names),)}, one per patient.")
        rows = torch.arange(len(self.labels), device=times.device).repeat_interleave(times[self.groups])
        return self.features[rows], self.labels[rows]


def check_features(
    features: Any, target_labels: Any, *, ignore_index: int | None = None, minimum: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return M x D features in float64 and M labels, every pixel a sample, those with ``ignore_index`` left out.

    Args:
        features: N x D or N x D x *spatial, finite, of any dtype and layout.
        target_labels: N or N x *spatial class indices; a channel axis of length one is dropped.
        ignore_index: label of samples to leave out.
        minimum: how many samples there must be.

    Raises:
        InputError: NaN or Inf, nothing left, fewer samples than ``minimum``, shapes that do not fit, bad labels.

    >>> features, labels = check_features([[1, 2], [3, 4], [5, 6]], [0, 1, 9], ignore_index=9)
    >>> features.dtype, labels
    (torch.float64, tensor([0, 1]))
    """
    rows, labels, _ = _rows(*checked_samples(features, target_labels, ignore_index))
    if len(labels) < minimum:
        left = " after ignore_index is left out" if ignore_index is not None else ""
        raise InputError(f"features holds {len(labels)} sample(s){left}; expected at least {minimum}.")
    return rows.double(), labels


def content_keys(features: torch.Tensor, *, seed: int = 0, exact: bool = False) -> torch.Tensor:
    """One pseudo-random int64 per row that depends on the row's values and the seed alone.

    Rows are rounded to eight bits of precision first (unless ``exact``), so that the float noise between two batch
    sizes or devices hardly ever changes a key. Sorting by keys shuffles the rows in a way that neither their order nor
    their division into batches and processes has any part in.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = (torch.randint(2**62, (features.shape[1],), generator=generator) * 2 + 1).to(features.device)
    keys = [torch.zeros(0, dtype=torch.int64, device=features.device)]
    for block in features.split(BLOCK):
        block = block.double() + 0.0  # -0.0 is 0.0
        bits = block.view(torch.int64) if exact else block.to(torch.bfloat16).view(torch.int16).long()
        keys.append((bits * odd).sum(1))
    return _mixed(torch.cat(keys) + seed)


def canonical_order(features: torch.Tensor, labels: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """A pseudo-random permutation of the samples (M x D and M) that depends on their content alone.

    Whatever is random or depends on the order of the samples is done in this order, and so gives the same value for any
    permutation of the samples, any division into batches, and any number of processes.

    >>> features, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0])
    >>> turned = features.flip(0), labels.flip(0)
    >>> torch.equal(features[canonical_order(features, labels)], turned[0][canonical_order(*turned)])
    True
    """
    order = torch.argsort(labels, stable=True)
    for exact in (True, False):  # the rounded key last, which makes it the first to count
        order = order[torch.argsort(content_keys(features[order], seed=seed, exact=exact), stable=True)]
    return order


def feature_sums(features: torch.Tensor, labels: torch.Tensor, needs: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Sums over the samples of each class, in float64: the state of a `MomentMetric`.

    Args:
        features: M x D.
        labels: M class indices; C is the largest plus one.
        needs: which sums beside ``count`` (C) and ``total`` (C x D): ``"gram"`` (D x D, the sum of x x'), ``"squares"``
            (C x D, of x ** 2), ``"class_gram"`` (C x D x D, x x' by class) and ``"norms"`` (``cubic``, D, the sum of
            ||x||^2 x, and ``quartic``, 1, of ||x||^4).

    >>> sums = feature_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 0]), ["gram"])
    >>> sums["count"].tolist(), sums["total"].tolist(), sums["gram"].tolist()
    ([2.0], [[4.0, 6.0]], [[10.0, 14.0], [14.0, 20.0]])
    """
    needs = set(needs)
    n_classes, width = int(labels.max()) + 1, features.shape[1]
    empty = features.new_zeros(0, dtype=torch.float64)
    sums = {
        "count": torch.bincount(labels, minlength=n_classes).double(),
        "total": empty.new_zeros(n_classes, width),
        **({"gram": empty.new_zeros(width, width)} if "gram" in needs else {}),
        **({"squares": empty.new_zeros(n_classes, width)} if "squares" in needs else {}),
        **({"class_gram": empty.new_zeros(n_classes, width, width)} if "class_gram" in needs else {}),
        **({"cubic": empty.new_zeros(width), "quartic": empty.new_zeros(1)} if "norms" in needs else {}),
    }
    for part, classes in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        rows = part.double()
        sums["total"].index_add_(0, classes, rows)
        if "squares" in needs:
            sums["squares"].index_add_(0, classes, rows**2)
        if "gram" in needs:
            sums["gram"] += gram(rows)
        if "norms" in needs:
            squared = torch.linalg.vecdot(rows, rows)
            sums["cubic"] += squared @ rows
            sums["quartic"] += squared @ squared
        if "class_gram" in needs:
            for label in classes.unique().tolist():
                sums["class_gram"][label] += gram(rows[classes == label])
    return sums


def gram(rows: torch.Tensor) -> torch.Tensor:
    """The D x D sum of x x' over the rows, in their dtype."""
    if rows.is_cuda:
        return rows.T @ rows
    array = rows.detach().numpy()
    return torch.from_numpy(array.T @ array)  # numpy sees that it is symmetric, and computes half of it


class FeatureMetric(TransferMetric):
    """Base of the metrics of features: reads a layer of the network, flattens pixels, knows patients.

    By hand: ``metric.update(features, target_labels)``. Attached to a MONAI evaluator it takes the features from the
    evaluator's network as it runs::

        "additional_metrics": {"h_score": {"_target_": "medtl_ext.metrics.HScore", "layer": "upcat_1"}}

    and the labels from ``engine.state.output``. Where labels have no grid (classification) features are averaged over
    theirs; where the two grids differ, labels are taken to the features' grid by nearest neighbour. The inferer has to
    run the network once per batch (``SimpleInferer`` over slices, say): windows would not line up with the labels.

    Args:
        layer: name of a module of the network (as in ``network.named_modules()``) whose output is the features; None:
            the penultimate features, which are the input of the last linear or convolution layer.
        pixels: keep at most so many samples of each class of each patient (`subject` in the engine's batch), drawn by
            a seeded, streaming reservoir in which neither order nor batches nor processes play a part. None keeps all.
            "auto" draws 400 when attached to an engine whose features lie on a grid, if the metric needs samples; else
            it keeps all.
        body: leave out background pixels where the image is exactly zero, as it is outside the body after
            `medtl_ext.transforms.NormalizeBodyd`. When attached only.
        seed: of the reservoir.
        ignore_index: samples with this label are left out.
        output_transform: turns ``engine.state.output`` into features, labels and (or not) patients, in place of all
            that.
    """

    inputs = ("features", "target_labels")

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
        if pixels not in (None, "auto") and (not isinstance(pixels, int) or pixels < 1):
            raise InputError(f"pixels is {pixels!r}; expected a number per class and patient, None or 'auto'.")
        self.layer, self.pixels, self.body, self.seed, self.ignore_index = layer, pixels, body, seed, ignore_index
        self._tapped = output_transform is None
        super().__init__(output_transform=output_transform)

    @staticmethod
    def default_output_transform(output: Any) -> Any:
        return output

    def update(self, features: Any, target_labels: Any, groups: Sequence[Hashable] | None = None) -> None:
        """Add a batch: N x D (x *spatial) features, N (x *spatial) labels, and the patient of each of the N or None."""
        self._take(*checked_samples(features, target_labels, self.ignore_index), groups)

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        """Add a batch that has been checked; labels are `IGNORED` where a pixel is left out."""
        if groups is not None and len(groups) != len(features):
            raise InputError(f"groups names {len(groups)} patients for {len(features)} samples; expected one for each.")
        rows, labels, owners = _rows(features, labels)
        if self._samples is not None:
            self._samples.add(rows, labels, owners, groups)
        elif len(rows):
            self._add_rows(rows, labels, owners, groups)

    def _add_rows(
        self, rows: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, groups: Sequence[Hashable] | None
    ) -> None:
        self._add(**self._sums_of(rows, labels))

    def _sums_of(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def reset(self) -> None:
        super().reset()
        self._samples = self._new_store()

    def _new_store(self) -> SampleStore | None:
        return SampleStore(self.pixels, self.seed) if isinstance(self.pixels, int) else None

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        if self._samples is not None:
            self._samples.merge(other._samples)

    def samples(self) -> Samples:
        """The samples kept by all processes, in canonical order.

        Raises:
            InputError: nothing was seen, or the metric keeps sums only (``pixels=None``).
        """
        if self._samples is None:
            raise InputError(f"{type(self).__name__} keeps sums, not samples; give pixels=... to draw samples.")
        return self._samples.gathered(type(self).__name__)

    def attach(self, engine: Engine, name: str, *args: Any, **kwargs: Any) -> None:
        """Attach to an engine (called by MONAI's evaluators), and tap its network."""
        super().attach(engine, name, *args, **kwargs)
        if self._tapped:  # when the run starts: a MONAI engine has no network yet while it attaches its metrics
            engine.add_event_handler(Events.STARTED, lambda: TappedInferer.of(engine).layers.add(self.layer))

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Update from the tapped layer and the engine's current output."""
        if not self._tapped:
            super().iteration_completed(engine)
            return
        features = TappedInferer.of(engine).features[self.layer]
        labels, images = _read_output(engine.state.output)
        groups = _read_subjects(engine.state.batch)
        features, labels, images = _aligned(features, labels, images if self.body else None)
        features, labels = checked_samples(features, labels, self.ignore_index)
        if self._samples is not None and self.pixels == "auto" and features.ndim > 2:
            self._samples.limit = DENSE_PIXELS
        if images is not None:
            labels = labels.masked_fill((images == 0) & (labels == 0), IGNORED)
        self._take(features, labels, groups)


class MomentMetric(FeatureMetric):
    """A feature metric of sums over classes, ``needs`` of `feature_sums`: memory does not grow with the samples."""

    needs: ClassVar[tuple[str, ...]] = ()

    def _sums_of(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return feature_sums(features, labels, self.needs)

    def compute(self) -> Any:
        if self._samples is None:
            return super().compute()
        samples = self.samples()
        return self._evaluate(self._sums_of(samples.features, samples.labels))


class SampleMetric(FeatureMetric):
    """A feature metric of the samples themselves: memory grows with them, unless ``pixels`` draws some."""

    def _new_store(self) -> SampleStore:
        return SampleStore(self.pixels if isinstance(self.pixels, int) else None, self.seed)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> Any:
        """Return the value for M x D features in float64 and M labels, in canonical order."""
        raise NotImplementedError

    def compute(self) -> Any:
        """Return the value over everything seen by all processes; updates may go on afterwards."""
        samples = self.samples()
        return self._score(samples.features, samples.labels)


class FeatureSamples(SampleMetric):
    """The samples themselves, from which every ``compute_*`` function of features can be had without another pass.

    ``compute()`` returns `Samples`. Draw the same for every metric, and resample patients from them::

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
    """Samples of each class of each patient: all of them, or those with the ``limit`` lowest content keys.

    The lowest keys of a union are among the lowest keys of its parts, so stores merge without any loss: every division
    of the data gives the same sample.
    """

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit, self.seed = limit, seed
        self._kept: dict[tuple[Hashable, int], list[torch.Tensor]] = {}

    def add(
        self, rows: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, groups: Sequence[Hashable] | None
    ) -> None:
        """Add M x D rows with labels; ``owners`` are their indices in ``groups``, the patients' names."""
        width = {kept[0].shape[1] for kept in self._kept.values()}
        if width and width != {rows.shape[1]}:
            raise InputError(f"features has {rows.shape[1]} channels here, {width.pop()} before; use one layer.")
        # Several samples of a batch may belong to one patient.
        names = [""] if groups is None else list(dict.fromkeys(groups))
        if groups is None:
            owners = torch.zeros_like(owners)
        else:
            owners = torch.tensor([names.index(name) for name in groups], device=rows.device)[owners]
        for owner, label in torch.unique(torch.stack([owners, labels], 1), dim=0).tolist():
            self._keep((names[owner], label), rows[(owners == owner) & (labels == label)])

    def merge(self, other: SampleStore) -> None:
        """Add all samples of another store, which may know already that features lie on a grid."""
        self.limit = self.limit or other.limit
        for stratum, parts in other._kept.items():
            for rows in list(parts):
                self._keep(stratum, rows)

    def _keep(self, stratum: tuple[Hashable, int], rows: torch.Tensor) -> None:
        held = self._kept.setdefault(stratum, [])
        # Batches are joined when they are needed, or when there are enough to choose from.
        held.append(rows.clone())
        if self.limit is not None and sum(map(len, held)) > 2 * self.limit:
            held[:] = [self._chosen(torch.cat([part.to(held[0].device) for part in held]))]

    def _chosen(self, rows: torch.Tensor) -> torch.Tensor:
        if self.limit is None or len(rows) <= self.limit:
            return rows
        order = canonical_order(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), seed=self.seed)
        return rows[order[: self.limit]]

    def gathered(self, owner: str) -> Samples:
        """The samples of all processes in canonical order."""
        store = self
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shares: list[Any] = [None] * dist.get_world_size()
            own = SampleStore(self.limit, self.seed)
            own._kept = {stratum: [part.cpu() for part in parts] for stratum, parts in self._kept.items()}
            dist.all_gather_object(shares, own)
            store = SampleStore(None, self.seed)
            for share in shares:
                store.limit = store.limit or share.limit  # a process without data does not know the grid
                store.merge(share)
        if not store._kept:
            raise InputError(
                f"{owner} has seen no sample; call update() before compute(), or look for an empty data loader."
            )
        names = tuple(sorted({name for name, _ in store._kept}, key=str))
        device = next(iter(store._kept.values()))[0].device
        columns: list[tuple[torch.Tensor, ...]] = []
        for (name, label), parts in store._kept.items():
            rows = store._chosen(torch.cat([part.to(device) for part in parts])).double()
            filled = [rows.new_full((len(rows),), value, dtype=torch.int64) for value in (label, names.index(name))]
            columns.append((rows, *filled))
        features, labels, groups = (torch.cat(column) for column in zip(*columns, strict=True))
        order = canonical_order(features, labels, seed=self.seed)
        return Samples(features[order], labels[order], groups[order], names)


class TappedInferer(Inferer):
    """An engine's inferer that also hands over what came out of some layers, for all metrics attached to the engine."""

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self.layers: set[str | None] = set()
        self.features: dict[str | None, torch.Tensor] = {}

    @classmethod
    def of(cls, engine: Engine) -> TappedInferer:
        """The tap of an engine, put in place when there is none yet."""
        if getattr(engine, "network", None) is None:
            raise InputError(
                f"{type(engine).__name__} has no network whose layers could be read; attach to a MONAI "
                "SupervisedEvaluator, or give an output_transform that returns features and labels."
            )
        if not isinstance(engine.inferer, cls):
            engine.inferer = cls(engine.inferer or SimpleInferer())
        return engine.inferer

    def __call__(self, inputs: torch.Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with tap_features(network, self.layers) as tapped:
            result = self.inferer(inputs, network, *args, **kwargs)
        for layer, outputs in tapped.items():
            if len(outputs) != 1 or len(outputs[0]) != len(inputs):
                raise InputError(
                    f"layer {layer or 'penultimate'} ran {len(outputs)} times for one batch: its features do not line "
                    "up with the labels; use SimpleInferer (over slices or patches from the data loader)."
                )
        self.features = {layer: outputs[0] for layer, outputs in tapped.items()}
        return result


def checked_samples(features: Any, target_labels: Any, ignore_index: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features N x D x *spatial, finite, and labels N x *spatial on their device, `IGNORED` where left out."""
    features = as_plain_tensor("features", features)
    if features.ndim < 2:
        raise InputError(f"features has shape {tuple(features.shape)}; expected N x D or N x D x *spatial.")
    if features.numel() == 0:
        raise InputError(f"features is empty (shape {tuple(features.shape)}); expected at least one sample.")
    if features.is_complex():
        raise InputError("features is complex; expected real numbers.")
    if not features.is_floating_point():
        features = features.double()
    # aminmax hands NaN on, and asks for the data once.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(features))).all()):
        raise InputError("features holds NaN or Inf; look for a diverged network or a float16 overflow.")
    labels = check_labels("target_labels", target_labels, ignore_index=ignore_index)
    grid = tuple(features.shape[2:])
    if tuple(labels.shape[1:]) == (1, *grid):
        labels = labels.squeeze(1)
    if tuple(labels.shape) != (len(features), *grid):
        raise InputError(
            f"target_labels has shape {tuple(labels.shape)}, which does not fit features {tuple(features.shape)}; "
            f"expected {(len(features), *grid)} (class indices, not one-hot)."
        )
    return features, labels.to(features.device)


def _rows(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """M x D rows of the valid pixels, their labels, and which of the N samples each belongs to."""
    owners = torch.arange(len(labels), device=labels.device)
    owners = owners.view(-1, *(1 for _ in labels.shape[1:])).expand(labels.shape)
    rows = features.movedim(1, -1).reshape(-1, features.shape[1])
    labels, owners = labels.reshape(-1), owners.reshape(-1)
    valid = labels != IGNORED
    return (rows, labels, owners) if bool(valid.all()) else (rows[valid], labels[valid], owners[valid])


def _mixed(keys: torch.Tensor) -> torch.Tensor:
    """Spread the bits of int64 keys (the finaliser of the splitmix64 generator)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        keys = (keys ^ ((keys >> shift) & (2 ** (64 - shift) - 1))) * factor
    return keys ^ ((keys >> 31) & (2**33 - 1))


def _read_output(output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels and images of a MONAI engine's output: a dictionary, or the list of them that decollation makes of it."""
    items = [output] if isinstance(output, Mapping) else output
    if not (isinstance(items, Sequence) and items and all(isinstance(item, Mapping) for item in items)):
        raise InputError(
            f"engine.state.output is {type(output).__name__}; expected MONAI's dictionaries with "
            f"'{CommonKeys.LABEL}': give an output_transform that returns features and labels."
        )
    if any(item.get(CommonKeys.LABEL) is None for item in items):
        raise InputError(
            f"engine.state.output has no '{CommonKeys.LABEL}', only {', '.join(sorted(map(str, items[0])))}; "
            "give an output_transform that returns features and labels."
        )

    def batch(key: str) -> torch.Tensor | None:
        values = [item.get(key) for item in items]
        if any(value is None for value in values):
            return None
        values = [convert_to_tensor(value) for value in values]
        return values[0] if isinstance(output, Mapping) else torch.stack(values)

    return batch(CommonKeys.LABEL), batch(CommonKeys.IMAGE)


def _read_subjects(batch: Any) -> list[Hashable] | None:
    """The patients' names in an engine's batch (of its scans where it names no patients), or None."""
    if isinstance(batch, Mapping):
        subjects = batch.get("patient", batch.get("subject"))
    else:
        subjects = [i.get("patient", i.get("subject")) if isinstance(i, Mapping) else None for i in batch]
    known = isinstance(subjects, Sequence) and not isinstance(subjects, str) and None not in subjects
    return list(subjects) if known else None


def _aligned(
    features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Bring features, labels and the largest magnitude over the images' channels to one grid."""
    labels = as_plain_tensor("label", labels)
    if labels.ndim > 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim == 1:
        return features.flatten(2).double().mean(2) if features.ndim > 2 else features, labels, None
    if images is not None:
        images = as_plain_tensor("image", images).abs().amax(1)
        images = images if images.shape == labels.shape else None
    grid = features.shape[2:]
    if len(grid) == labels.ndim - 1 and labels.shape[1:] != grid:
        labels, images = (value if value is None else _nearest(value, grid) for value in (labels, images))
    return features, labels, images


def _nearest(values: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    indices = [
        torch.as_tensor(np.floor((np.arange(size) + 0.5) * length / size).astype(int), device=values.device)
        for size, length in zip(grid, values.shape[1:], strict=True)
    ]
    for axis, index in enumerate(indices, start=1):
        values = values.index_select(axis, index)
    return values
