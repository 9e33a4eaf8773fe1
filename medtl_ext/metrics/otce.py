r"""OTCE, the conditional entropy of target labels given source labels under optimal transport of the features.

OTCE (Tan et al., *OTCE: A transferability metric for cross-domain cross-task representations*, CVPR 2021; for
segmentation *Efficient prediction of model transferability in semantic segmentation tasks*, ICIP 2023) computes the
optimal transport plan P from the source's to the target's features, at squared Euclidean cost. It measures how well the
source's labels predict the target's labels under this plan:

.. math::
    P = \arg\min_{P \ge 0} \sum_{ij} P_{ij} \lVert s_i - t_j \rVert^2 - \varepsilon H(P), \qquad
    P(y_s, y_t) = \sum_{ij} 1[y_i = y_s]\, 1[y_j = y_t]\, P_{ij}, \qquad
    \mathrm{OTCE} = -H(Y_t | Y_s)

with uniform weights on both sides. In one dimension (such as the softmax of two channels) the exact plan joins the
quantiles of the two sides, so sorting gives P(y_s, y_t).
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from medtl_ext._validation import InputError, as_plain_tensor, check_labels, require_choice, require_number, warn
from medtl_ext.metrics.base import probabilities_and_labels
from medtl_ext.metrics.features import SampleMetric, canonical_order, check_features
from medtl_ext.metrics.nce import negative_conditional_entropy

SOLVERS = ("auto", "sinkhorn", "emd", "sorted")

# Largest error of the marginals, as a share of the mass, that Sinkhorn may leave.
TOLERANCE = 1e-6
ITERATIONS = 10_000

# Block sizes: rows of a plan, and pairs of a plan in one dimension.
PLAN_ROWS, PLAN_PAIRS = 32, 2**15

# Features, N x D in float64, and labels, N, of the source or the target.
Side = tuple[torch.Tensor, torch.Tensor]


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

    The score depends on the frequencies of the target's labels. Use it to compare sources for one target, not targets.

    Args:
        source_features: N x D or N x D x *spatial, the network's features of the source's data; in the paper, softmax.
        source_labels: N or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        target_features: M x D or M x D x *spatial, the same network's features of the target's data.
        target_labels: M or M x *spatial class indices.
        solver: "sinkhorn" is entropic transport with ``epsilon``. "emd" is exact. "sorted" is exact and fast for
            one-dimensional features (D = 1, or two softmax channels), and uses all samples. "auto" takes "sorted" if
            possible. Else it takes "emd" if ``epsilon`` is below 1e-4 of the mean cost, because Sinkhorn would hardly
            converge, and otherwise "sinkhorn".
        epsilon: weight of the entropy, in units of squared feature distance.
        n_samples: "sinkhorn" and "emd" draw this many samples from a larger side. They hold a few n_samples x n_samples
            tables of float64 (at 10,000: 0.8 GB each, and about 15 s per draw on one core).
        repeats: number of draws; the score is their mean. If neither side is larger than n_samples, nothing is drawn.
        seed: of the draws, which do not depend on the order of the samples.
        ignore_index: samples with this label are left out, on both sides.

    Returns:
        The score in nats, a float64 scalar in [-H(Y_t), 0]; higher predicts better transfer. One target label only (no
        foreground) gives 0, the best value. One source label only gives -H(Y_t), the worst. Both come with a
        `UserWarning`, since they say nothing about transfer. Constant features give -H(Y_t). There is also a
        `UserWarning` if Sinkhorn did not reach the marginals to 1e-6, and if ``epsilon`` is large compared with the
        cost.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> source_features = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
        >>> target_features = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
        >>> compute_otce(source_features, [0, 0, 1, 1], target_features, [0, 0, 0, 1])
        tensor(-0.3466, dtype=torch.float64)

    Reference: Tan et al., CVPR 2021; Li et al., *Finding the most transferable tasks for brain image segmentation*,
    BIBM 2022, eq. 4. Differences: the entropy is subtracted (eq. 4 prints a plus, which does not smooth the plan).
    Samples with equal features share their mass equally, so that their order does not matter (the entropic plan
    requires this, exact plans leave it open). Sinkhorn runs until it reaches the marginals.
    """
    metric = OTCE(
        (source_features, source_labels),
        solver=solver,
        epsilon=epsilon,
        n_samples=n_samples,
        repeats=repeats,
        seed=seed,
        ignore_index=ignore_index,
    )
    return metric.of(target_features, target_labels)


def label_transport(plan: Any, source_labels: Any, target_labels: Any) -> torch.Tensor:
    """Sum a transport plan over the samples of each pair of labels: the table P(y_s, y_t) of OTCE.

    Args:
        plan: N x M, the mass that moves from each source sample to each target sample.
        source_labels: N class indices.
        target_labels: M class indices.

    Returns:
        C_s x C_t, float64, on the plan's device, where C is the side's largest label plus one. Its sum is that of the
        plan.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> label_transport([[0.5, 0.0], [0.125, 0.375]], source_labels=[0, 1], target_labels=[1, 0])
        tensor([[0.0000, 0.5000],
                [0.3750, 0.1250]], dtype=torch.float64)
    """
    plan = as_plain_tensor("plan", plan).double()
    shape = tuple(plan.shape)
    if plan.ndim != 2 or plan.numel() == 0:
        raise InputError(f"plan is not a transport plan: it has shape {shape}; expected N x M.")
    source = check_labels("source_labels", source_labels).flatten().to(plan.device)
    target = check_labels("target_labels", target_labels).flatten().to(plan.device)
    if (len(source), len(target)) != shape:
        raise InputError(f"plan has shape {shape}; expected {len(source)} source_labels x {len(target)} target_labels.")
    rows, lowest = plan.new_zeros(int(source.max()) + 1, plan.shape[1]), []
    # A few rows at a time, so that they are still in the processor's cache when they are added.
    for part, labels in zip(plan.split(PLAN_ROWS), source.split(PLAN_ROWS), strict=True):
        lowest.append(part.amin())
        rows.index_add_(0, labels, part)
    if not bool((torch.stack(lowest) >= 0).all() & rows.isfinite().all()):
        raise InputError("plan is not a transport plan; expected finite numbers, none of them negative.")
    return plan.new_zeros(len(rows), int(target.max()) + 1).index_add_(1, target, rows)


class OTCE(SampleMetric):
    """`compute_otce` over batches of the target: ``compute()`` returns a float64 scalar in [-H(Y_t), 0].

    Attached to an engine, it uses the softmax of the network's logits, as in the paper, unless ``layer`` names a layer.
    The source's samples must come from the same layer of the same network. For the softmax, attach ::

        source = FeatureSamples(output_transform=medtl_ext.metrics.base.probabilities_and_labels)

    to the evaluator that runs over the source's data. After its run, make ``OTCE(source.compute())``.

    The score depends on the frequencies of the labels, and ``pixels`` draws the same number from rare and frequent
    classes: set the same ``pixels`` for source and target.

    Args:
        source: the source's features and labels: a pair as in `compute_otce`, or `Samples`.
        solver, epsilon, n_samples, repeats: as in `compute_otce`.
        options: layer, pixels, body, seed, ignore_index, output_transform, see `FeatureMetric`. ``layer=None`` is the
            softmax of the output; it keeps all pixels unless ``pixels`` is a number.

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
        self.solver = require_choice("solver", solver, SOLVERS)
        self.epsilon = float(require_number("epsilon", epsilon, 0, above=True))
        self.n_samples = require_number("n_samples", n_samples, 1, whole=True)
        self.repeats = require_number("repeats", repeats, 1, whole=True)
        self._source = _checked("source", *source[:2], self.ignore_index)

    def of(self, features: Any, target_labels: Any) -> torch.Tensor:
        features, labels = _checked("target", features, target_labels, self.ignore_index)
        self._require_width(features)
        return self._score(features, labels)

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        self._require_width(features)
        super()._take(features, labels, groups)

    def _require_width(self, features: torch.Tensor) -> None:
        if (width := self._source[0].shape[1]) != features.shape[1]:
            found = f"target_features has {features.shape[1]} channels, source_features {width}"
            raise InputError(f"{found}; use the same layer of the same network for both.")

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        source, target = tuple(value.to(features.device) for value in self._source), (features, labels)
        solver = self._pick(source[0], features)
        if solver == "sorted":
            tables = [_sorted_table(source, target)]
        else:
            tables = [_solved_table(*pair, solver, self.epsilon) for pair in self._draws(source, target)]
        _warn_of_one_class(tables)
        return torch.stack([negative_conditional_entropy(table) for table in tables]).mean()

    def _pick(self, source: torch.Tensor, target: torch.Tensor) -> str:
        if self.solver in ("auto", "sorted"):
            if _on_a_line(source) and _on_a_line(target):
                return "sorted"
            if self.solver == "sorted":
                needs = "one-dimensional features, D = 1 or the softmax of two channels"
                raise InputError(f"solver 'sorted' needs {needs}; found D = {source.shape[1]}: try solver='emd'.")
        if self.solver == "emd":
            return "emd"
        # The mean squared distance between the sides is the squared distance of their means plus their variances.
        distance = (source.mean(0) - target.mean(0)).square().sum()
        cost = float(distance + sum(features.var(0, correction=0).sum() for features in (source, target)))
        if self.solver == "auto" and self.epsilon < 1e-4 * cost:
            return "emd"
        if cost < 1e-3 * self.epsilon:
            what = f"the mean cost of transport is {cost:.1e}, epsilon {self.epsilon:g}: the plan"
            warn(f"{what} hardly depends on the features, and OTCE is close to its worst value; lower epsilon.")
        return "sinkhorn"

    def _draws(self, *sides: Side) -> Iterator[Sequence[Side]]:
        """Yield the two sides; if one is larger than ``n_samples``, yield ``repeats`` pairs of random subsets."""
        if all(len(labels) <= self.n_samples for _, labels in sides):
            yield sides
            return
        orders = [canonical_order(*side, seed=self.seed) for side in sides]
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.repeats):
            drawn = []
            for (features, labels), order in zip(sides, orders, strict=True):
                if len(order) > self.n_samples:
                    order = order[torch.randperm(len(order), generator=generator)[: self.n_samples].to(order.device)]
                drawn.append((features[order], labels[order]))
            yield drawn


def _checked(side: str, features: Any, labels: Any, ignore_index: int | None) -> Side:
    try:
        return check_features(features, labels, ignore_index=ignore_index)
    except InputError as error:
        raise InputError(re.sub(r"\b(target_)?(features|labels)\b", rf"{side}_\2", str(error))) from None


def _on_a_line(features: torch.Tensor) -> bool:
    if features.shape[1] != 2:
        return features.shape[1] == 1
    # Probabilities in half precision sum to 1 within about 0.01.
    low, high = torch.aminmax(features.sum(1))
    return bool((features.min() >= 0) & (low > 0.99) & (high < 1.01))


def _points(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K distinct feature vectors of a side, ascending; for each, the number of samples and the classes' shares."""
    points, index = torch.unique(features, dim=0 if features.ndim > 1 else None, return_inverse=True)
    present = labels.bincount() > 0
    n_classes = int(present.sum())
    cells = index.mul_(n_classes).add_((present.cumsum(0) - 1)[labels])
    shares = torch.bincount(cells, minlength=len(points) * n_classes).view(len(points), -1).double()
    counts = shares.sum(1)
    return points, counts, shares.div_(counts[:, None])


def _sorted_table(*sides: Side) -> torch.Tensor:
    """P(y_s, y_t) of the exact plan in one dimension, which joins quantiles."""
    from ot.lp import emd_1d_sorted

    # Only the order of the places matters. For a softmax, the difference of both channels is precise near 0 and near 1.
    places, counts, shares = zip(
        *(_points(x[:, 1] - x[:, 0] if x.shape[1] == 2 else x[:, 0], labels) for x, labels in sides), strict=True
    )
    # In units of 1 / (n m) masses are whole numbers, so that equal quantiles are exactly equal.
    masses = counts[0].mul_(len(sides[1][1])), counts[1].mul_(len(sides[0][1]))
    found = emd_1d_sorted(*(value.cpu().numpy() for value in (*masses, *places)))
    mass, pairs = (torch.from_numpy(value).to(places[0].device).split(PLAN_PAIRS) for value in found[:2])
    table = 0
    for part, (rows, columns) in zip(mass, (block.T for block in pairs), strict=True):
        table += (shares[0][rows] * part[:, None]).T @ shares[1][columns]
    return table


def _solved_table(source: Side, target: Side, solver: str, epsilon: float) -> torch.Tensor:
    """P(y_s, y_t) of a plan in several dimensions."""
    import ot  # here, because importing POT is slow

    centre = source[0].mean(0)  # the cost is a difference of squares, which loses digits if the mean is large
    places, counts, shares = zip(*(_points(x - centre, labels) for x, labels in (source, target)), strict=True)
    weights = [count / count.sum() for count in counts]
    cost = ot.dist(*places)
    if solver == "emd":
        # The simplex algorithm treats very small costs as zero.
        plan = ot.emd(*weights, cost / cost.max().clamp(min=1e-300), numItermax=10**7)
    else:
        plan = _sinkhorn(*weights, cost, epsilon)
    return shares[0].T @ plan @ shares[1]


def _sinkhorn(
    source_weights: torch.Tensor, target_weights: torch.Tensor, cost: torch.Tensor, epsilon: float
) -> torch.Tensor:
    import ot

    plan, log = ot.sinkhorn(
        source_weights,
        target_weights,
        cost,
        epsilon,
        # Up to this cost, exp(-cost / epsilon) stays within float64, and is much faster than the log domain.
        method="sinkhorn" if float(cost.max()) < 300 * epsilon else "sinkhorn_log",
        numItermax=ITERATIONS,
        # POT compares the Euclidean norm of the marginals' error; this bounds the sum of the absolute errors.
        stopThr=TOLERANCE / len(target_weights) ** 0.5,
        warn=False,
        log=True,
    )
    misplaced = float((plan.sum(1) - source_weights).abs().sum() + (plan.sum(0) - target_weights).abs().sum())
    if not misplaced < 2 * TOLERANCE:
        what = f"after {log['niter'] + 1} iterations {misplaced:.1e} of the mass is misplaced (tolerance {TOLERANCE:g})"
        warn(f"Sinkhorn did not converge at epsilon {epsilon:g}: {what}; raise epsilon, or set solver='emd'.")
    return plan


def _warn_of_one_class(tables: Sequence[torch.Tensor]) -> None:
    for axis, side, value in ((0, "target", "0, its best value"), (1, "source", "-H(Y_t), its worst value")):
        lone = sum(int((table.sum(axis) > 0).sum()) < 2 for table in tables)
        if lone:
            where = "" if lone == len(tables) else f" in {lone} of {len(tables)} draws"
            said = f"{side}_labels holds one class only{where}, so OTCE is {value}, and says nothing about transfer"
            warn(f"{said}; raise n_samples, or look for missing foreground.")
