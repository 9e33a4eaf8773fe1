r"""OTCE, the conditional entropy of target labels given source labels under optimal transport of the features.

OTCE (Tan et al., *OTCE: A transferability metric for cross-domain cross-task representations*, CVPR 2021; for
segmentation *Efficient prediction of model transferability in semantic segmentation tasks*, ICIP 2023) moves the
source's features onto the target's at least squared Euclidean cost, and asks how well the source's labels tell the
target's in the plan P that does it:

.. math::
    P = \arg\min_{P \ge 0} \sum_{ij} P_{ij} \lVert s_i - t_j \rVert^2 - \varepsilon H(P), \qquad
    P(y_s, y_t) = \sum_{ij} 1[y_i = y_s]\, 1[y_j = y_t]\, P_{ij}, \qquad
    \mathrm{OTCE} = -H(Y_t | Y_s)

with uniform weights on both sides. In one dimension, and so for the softmax of two channels, the exact plan joins the
quantiles of the two sides, and P(y_s, y_t) follows from sorting alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from medtl_ext._validation import InputError, require_choice
from medtl_ext.metrics._checks import as_plain_tensor, check_labels
from medtl_ext.metrics.base import probabilities_and_labels
from medtl_ext.metrics.features import SampleMetric, canonical_order, check_features

SOLVERS = ("auto", "sinkhorn", "emd", "sorted")

# Mass that Sinkhorn may leave in the wrong place.
TOLERANCE = 1e-6
ITERATIONS = 10_000

# Rows of a plan that are worked on at a time.
PLAN_ROWS = 32


def compute_otce(
    source_features: Any,
    source_labels: Any,
    target_features: Any,
    target_labels: Any,
    *,
    solver: str = "auto",
    epsilon: float = 0.1,
    n_samples: int = 10_000,
    repeats: int = 10,
    seed: int = 0,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """OTCE between a source's and a target's features, both from the source network; every pixel is a sample.

    The score depends on how frequent the target's labels are, so it compares sources for one target, never targets.

    Args:
        source_features: N x D or N x D x *spatial, the features of the source's own data; by the paper the softmax.
        source_labels: N or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        target_features: M x D or M x D x *spatial, the features that the same network gives the target's data.
        target_labels: M or M x *spatial class indices.
        solver: "sinkhorn" is entropic transport at ``epsilon``; "emd" is exact; "sorted" is exact and fast for
            one-dimensional features (D = 1, or two softmax channels), and takes all samples. "auto" takes "sorted"
            where it can, else "emd" where the features are so large that ``epsilon`` is less than 1e-4 of the mean cost
            and Sinkhorn would hardly converge, else "sinkhorn".
        epsilon: weight of the entropy, in units of squared feature distance.
        n_samples: "sinkhorn" and "emd" draw so many samples of a side that has more. They hold a few n_samples x
            n_samples tables of float64 (0.8 GB each at 10,000, which take some 15 s a draw on one core).
        repeats: how often they are drawn; the score is the mean. Without a side to draw from there is one solution.
        seed: of the draws, which do not depend on the order of the samples.
        ignore_index: samples with this label are left out, on both sides.

    Returns:
        The score in nats, a float64 scalar in [-H(Y_t), 0]; higher predicts better transfer. One target label in a
        sample (no foreground) gives 0, the best value, and one source label gives -H(Y_t), the worst: both with a
        `UserWarning`, for they say nothing about transfer. Constant features give -H(Y_t). A `UserWarning` also tells
        when Sinkhorn did not reach the marginals to 1e-6, and when ``epsilon`` drowns the cost.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> source_features = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
        >>> target_features = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
        >>> compute_otce(source_features, [0, 0, 1, 1], target_features, [0, 0, 0, 1])
        tensor(-0.3466, dtype=torch.float64)

    Reference: Tan et al., CVPR 2021; Li et al., *Finding the most transferable tasks for brain image segmentation*,
    BIBM 2022, eq. 4. Deviations: the entropy is subtracted (eq. 4 prints a plus, whose minimum is not a smoothed plan);
    samples with equal features share what they send and receive in equal parts, so that their order plays no part (the
    entropic plan demands it, exact plans leave it open); Sinkhorn runs until the marginals are met.
    """
    return _otce(
        _checked("source", source_features, source_labels, ignore_index),
        _checked("target", target_features, target_labels, ignore_index),
        _Settings.checked(solver, epsilon, n_samples, repeats, seed),
    )


def label_transport(plan: Any, source_labels: Any, target_labels: Any) -> torch.Tensor:
    """Sum a transport plan over the samples of each pair of labels: the table P(y_s, y_t) of OTCE.

    Args:
        plan: N x M, the mass that goes from each source sample to each target sample.
        source_labels: N class indices.
        target_labels: M class indices.

    Returns:
        C_s x C_t, float64, on the plan's device, where C is the side's largest label plus one; it sums to what the plan
        sums to.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> label_transport([[0.5, 0.0], [0.125, 0.375]], source_labels=[0, 1], target_labels=[1, 0])
        tensor([[0.0000, 0.5000],
                [0.3750, 0.1250]], dtype=torch.float64)
    """
    plan = as_plain_tensor("plan", plan).double()
    if plan.ndim != 2 or plan.numel() == 0:
        raise InputError(f"plan is not a transport plan: its shape is {tuple(plan.shape)}; expected N x M.")
    source = check_labels("source_labels", source_labels).flatten().to(plan.device)
    target = check_labels("target_labels", target_labels).flatten().to(plan.device)
    if (len(source), len(target)) != tuple(plan.shape):
        raise InputError(
            f"plan has shape {tuple(plan.shape)}; expected one row for each of the {len(source)} source_labels and one "
            f"column for each of the {len(target)} target_labels."
        )
    rows, lowest = plan.new_zeros(int(source.max()) + 1, plan.shape[1]), []
    # A few rows at a time, which are still in the processor's cache when they are added.
    for part, labels in zip(plan.split(PLAN_ROWS), source.split(PLAN_ROWS), strict=True):
        lowest.append(part.amin())
        rows.index_add_(0, labels, part)
    if not bool((torch.stack(lowest) >= 0).all() & rows.isfinite().all()):
        raise InputError("plan is not a transport plan; expected numbers that are finite and nowhere negative.")
    return plan.new_zeros(len(rows), int(target.max()) + 1).index_add_(1, target, rows)


class OTCE(SampleMetric):
    """`compute_otce` over batches of the target: ``compute()`` returns a float64 scalar in [-H(Y_t), 0].

    Attached to an engine it takes the softmax of the network's logits, as the paper does, unless ``layer`` names a
    layer. The source's samples come from the same network and the same place. Softmax for softmax::

        source = FeatureSamples(output_transform=medtl_ext.metrics.base.probabilities_and_labels)

    attached to the evaluator that runs over the source's data; after its run ``OTCE(source.compute())``.

    The score depends on how frequent the labels are, and ``pixels`` draws as many samples of a rare class as of a
    frequent one: give the source the same ``pixels`` as the target.

    Args:
        source: the source's features and labels, a pair as in `compute_otce`, or `Samples`.
        solver, epsilon, n_samples, repeats: as in `compute_otce`.
        options: layer, pixels, body, seed, ignore_index, output_transform, see `FeatureMetric`; ``layer=None`` is the
            softmax of the output, of which all pixels are kept unless ``pixels`` is a number of each class.

    >>> source_features = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    >>> metric = OTCE((source_features, [0, 0, 1, 1]))
    >>> metric.update(torch.tensor([[0.8, 0.2], [0.7, 0.3]]), torch.tensor([0, 0]))
    >>> metric.update(torch.tensor([[0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 1]))
    >>> metric.compute()
    tensor(-0.3466, dtype=torch.float64)
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        solver: str = "auto",
        epsilon: float = 0.1,
        n_samples: int = 10_000,
        repeats: int = 10,
        **options: Any,
    ) -> None:
        if not isinstance(source, (tuple, list)) or len(source) < 2:
            raise InputError(f"source is {type(source).__name__}; expected the source's features and labels, a pair.")
        if options.get("layer") is None and options.get("output_transform") is None:
            options["output_transform"] = probabilities_and_labels
        super().__init__(**options)
        self._settings = _Settings.checked(solver, epsilon, n_samples, repeats, self.seed)
        self._source = _checked("source", source[0], source[1], self.ignore_index)

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        _require_width(self._source, features)
        super()._take(features, labels, groups)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        source = _Side(*(value.to(features.device) for value in self._source))
        return _otce(source, _Side(features, labels), self._settings)


class _Side(NamedTuple):
    """The source or the target."""

    features: torch.Tensor  # N x D, float64
    labels: torch.Tensor  # N, int64


class _Settings(NamedTuple):
    """How the plan is found."""

    solver: str
    epsilon: float
    n_samples: int
    repeats: int
    seed: int

    @classmethod
    def checked(cls, solver: str, epsilon: float, n_samples: int, repeats: int, seed: int) -> _Settings:
        require_choice("solver", solver, SOLVERS)
        if not 0 < epsilon < float("inf"):
            raise InputError(f"epsilon is {epsilon!r}; expected a positive number (solver='emd' is its limit at zero).")
        for name, value in (("n_samples", n_samples), ("repeats", repeats)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a whole number, 1 or more.")
        return cls(solver, float(epsilon), n_samples, repeats, seed)


def _checked(name: str, features: Any, labels: Any, ignore_index: int | None) -> _Side:
    try:
        return _Side(*check_features(features, labels, ignore_index=ignore_index))
    except InputError as error:
        message = str(error).replace("target_labels", f"{name}_labels")
        raise InputError(re.sub(r"\bfeatures\b", f"{name}_features", message)) from None


def _require_width(source: _Side, target_features: torch.Tensor) -> None:
    if source.features.shape[1] != target_features.shape[1]:
        raise InputError(
            f"target_features has {target_features.shape[1]} channels, source_features {source.features.shape[1]}; "
            "expected the same layer of the same network."
        )


def _otce(source: _Side, target: _Side, settings: _Settings) -> torch.Tensor:
    _require_width(source, target.features)
    device = source.features.device
    sides = [_Side(side.features.to(device), _renumbered(side.labels.to(device))) for side in (source, target)]
    del source, target
    solver = _pick(settings, *sides)
    if solver == "sorted":
        # Popped, so that the features of a million pixels are gone before the table is made.
        tables = [_sorted_table(_by_value(sides.pop(0)), _by_value(sides.pop(0)))]
    else:
        tables = [_solved_table(*pair, solver, settings.epsilon) for pair in _draws(*sides, settings)]
    _warn_of_one_class(tables)
    return torch.stack([_negative_conditional_entropy(table) for table in tables]).mean()


def _renumbered(labels: torch.Tensor) -> torch.Tensor:
    """Labels without the classes that do not occur, so that no table has more rows than it needs."""
    present = torch.bincount(labels) > 0
    return (present.cumsum(0) - 1)[labels]


def _pick(settings: _Settings, source: _Side, target: _Side) -> str:
    if settings.solver in ("auto", "sorted"):
        if all(_on_a_line(side.features) for side in (source, target)):
            return "sorted"
        if settings.solver == "sorted":
            raise InputError(
                "solver 'sorted' needs one-dimensional features, D = 1 or the softmax of two channels; here D = "
                f"{source.features.shape[1]}, and source_features or target_features is neither (try 'emd')."
            )
    if settings.solver == "emd":
        return "emd"
    # The mean squared distance between the sides is that between their means plus their variances.
    distance = source.features.mean(0) - target.features.mean(0)
    spread = sum(side.features.var(0, correction=0).sum() for side in (source, target))
    cost = float(distance.square().sum() + spread)
    if settings.solver == "auto" and settings.epsilon < 1e-4 * cost:
        return "emd"
    if cost < 1e-3 * settings.epsilon:
        warnings.warn(
            f"the mean cost of transport is {cost:.1e}, epsilon {settings.epsilon:g}: the plan hardly heeds the "
            "features and OTCE is close to -H(Y_t), its worst value; lower epsilon or scale the features up.",
            UserWarning,
            stacklevel=4,
        )
    return "sinkhorn"


def _on_a_line(features: torch.Tensor) -> bool:
    if features.shape[1] != 2:
        return features.shape[1] == 1
    # Half-precision probabilities sum to one within about 0.01.
    low, high = torch.aminmax(features.sum(1))
    return bool((features.min() >= 0) & (low > 0.99) & (high < 1.01))


def _positions(side: _Side) -> torch.Tensor:
    """Where the features lie on their line, up to a factor (only their order matters to the plan)."""
    if side.features.shape[1] == 1:
        return side.features[:, 0]
    # The difference keeps apart what one channel rounds to 1 as well as what it rounds to 0.
    return side.features[:, 1] - side.features[:, 0]


class _Ordered(NamedTuple):
    """Samples in the order of their positions on a line."""

    labels: torch.Tensor  # N
    sizes: torch.Tensor  # K, how many samples share each distinct position


def _by_value(side: _Side) -> _Ordered:
    positions, order = _positions(side).sort()
    _, sizes = torch.unique_consecutive(positions, return_counts=True)
    return _Ordered(side.labels[order], sizes)


def _sorted_table(source: _Ordered, target: _Ordered) -> torch.Tensor:
    """P(y_s, y_t) of the monotone plan: each distinct source value takes its interval of the target's quantiles."""
    stop, share = _upper_quantiles(source.sizes, target.sizes)
    last = target.sizes.cumsum(0) - 1
    columns = []
    for label in range(int(target.labels.max()) + 1):
        # How much of this target label lies below the end of each source value's interval.
        below = (target.labels == label).cumsum(0)[last].double()
        below = torch.lerp(torch.where(stop > 0, below[stop - 1], 0), below[stop], share)
        received = below.diff(prepend=below.new_zeros(1)).clamp(min=0) / source.sizes
        columns.append(torch.bincount(source.labels, weights=received.repeat_interleave(source.sizes)))
    return torch.stack(columns, 1) / len(target.labels)


def _upper_quantiles(sizes: torch.Tensor, target_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the interval of each source value ends: at which target value, and at what share of that one's mass."""
    n, m = sizes.sum(), target_sizes.sum()
    # Masses in units of 1 / (n m) are whole numbers, so that quantiles which meet do so exactly.
    ends, knots = sizes.cumsum(0) * m, target_sizes.cumsum(0) * n
    stop = torch.searchsorted(knots, ends)
    return stop, 1 - (knots[stop] - ends) / (target_sizes.double() * n)[stop]


def _draws(source: _Side, target: _Side, settings: _Settings) -> Iterator[tuple[_Side, _Side]]:
    """The two sides, or pairs of samples of them where they are larger than ``n_samples``."""
    sides = (source, target)
    if all(len(side.labels) <= settings.n_samples for side in sides):
        yield sides
        return
    orders = [canonical_order(*side, seed=settings.seed) for side in sides]
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.repeats):
        chosen = [
            order[torch.randperm(len(order), generator=generator)[: settings.n_samples].to(order.device)]
            if len(order) > settings.n_samples
            else order
            for order in orders
        ]
        yield tuple(_Side(side.features[rows], side.labels[rows]) for side, rows in zip(sides, chosen, strict=True))


def _solved_table(source: _Side, target: _Side, solver: str, epsilon: float) -> torch.Tensor:
    # Importing POT takes longer than most transports.
    import ot

    centre = source.features.mean(0)  # the cost is a difference of squares, which a large mean would drown
    source_points, source_weights, source_shares = _distinct(_Side(source.features - centre, source.labels))
    target_points, target_weights, target_shares = _distinct(_Side(target.features - centre, target.labels))
    cost = ot.dist(source_points, target_points)
    if solver == "emd":
        # The simplex takes very small costs for zero.
        plan = ot.emd(source_weights, target_weights, cost / cost.max().clamp(min=1e-300), numItermax=10**7)
    else:
        plan = _sinkhorn(source_weights, target_weights, cost, epsilon)
    return source_shares.T @ plan @ target_shares


def _distinct(side: _Side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K distinct feature vectors, their weights, and K x C, how each one's weight is shared among the classes."""
    points, index = torch.unique(side.features, dim=0, return_inverse=True)
    n_classes = int(side.labels.max()) + 1
    counts = torch.bincount(index * n_classes + side.labels, minlength=len(points) * n_classes).view(-1, n_classes)
    totals = counts.sum(1, keepdim=True).double()
    return points, totals[:, 0] / totals.sum(), counts / totals


def _sinkhorn(
    source_weights: torch.Tensor, target_weights: torch.Tensor, cost: torch.Tensor, epsilon: float
) -> torch.Tensor:
    import ot

    # exp(-cost / epsilon) and its scalings stay within float64 up to here, and one matrix product is many times faster
    # than one log-sum-exp.
    method = "sinkhorn" if float(cost.max()) < 300 * epsilon else "sinkhorn_log"
    # POT stops by the Euclidean norm of the marginals' error; this bounds the sum of its magnitudes.
    threshold = TOLERANCE / len(target_weights) ** 0.5
    plan, log = ot.sinkhorn(
        source_weights,
        target_weights,
        cost,
        epsilon,
        method=method,
        numItermax=ITERATIONS,
        stopThr=threshold,
        warn=False,
        log=True,
    )
    misplaced = float((plan.sum(1) - source_weights).abs().sum() + (plan.sum(0) - target_weights).abs().sum())
    if not misplaced < 2 * TOLERANCE:
        warnings.warn(
            f"Sinkhorn did not converge at epsilon {epsilon:g}: after {log['niter'] + 1} iterations {misplaced:.1e} of "
            f"the mass is misplaced (tolerance {TOLERANCE:g}); raise epsilon, scale the features down, or take "
            "solver='emd'.",
            UserWarning,
            stacklevel=5,
        )
    return plan


def _warn_of_one_class(tables: Sequence[torch.Tensor]) -> None:
    for axis, side, value in ((0, "target", "0, its best value"), (1, "source", "-H(Y_t), its worst value")):
        lone = sum(int((table.sum(axis) > 0).sum()) < 2 for table in tables)
        if lone:
            where = "" if lone == len(tables) else f" in {lone} of {len(tables)} draws"
            warnings.warn(
                f"{side}_labels holds one class only{where}, so OTCE is {value}, and says nothing about transfer; "
                "draw more samples or look for missing foreground.",
                UserWarning,
                stacklevel=4,
            )


def _negative_conditional_entropy(table: torch.Tensor) -> torch.Tensor:
    """-H(Y_t | Y_s) of a table of masses, within its bounds whatever was rounded."""
    joint = table / table.sum()
    source, target = joint.sum(1), joint.sum(0)
    value = torch.xlogy(joint, joint).sum() - torch.xlogy(source, source).sum()
    return value.clamp(torch.xlogy(target, target).sum(), torch.zeros_like(value))
