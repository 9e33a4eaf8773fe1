r"""Label prediction (LP), and the score of a source data set that combines it with feature update (FU).

Juodelyte et al. (*On dataset transferability in medical image classification*, arXiv 2412.20172) ask two questions
about a source network. Can its features predict the target's labels (LP)? How much would its early features have to
change (FU, in `medtl_ext.metrics.feature_update`)? For LP, neighbourhood components analysis (NCA) learns a linear map
of the features. LP is how often the five nearest neighbours k of a sample i then have its class:

.. math::
    \mathrm{LP} = \tfrac1n \sum_i \tfrac15 \textstyle\sum_{k \in N_5(i)} 1[y_k = y_i]
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.neighbors import NearestNeighbors, NeighborhoodComponentsAnalysis

from medtl_ext._validation import InputError, warn
from medtl_ext.metrics.features import SampleMetric, canonical_order

N_COMPONENTS = 50
N_NEIGHBOURS = 5

#: Largest number of samples used: memory and time of NCA grow with its square.
MAX_SAMPLES = 5000

# Seed of NCA, from the paper's code.
RANDOM_STATE = 42


def compute_label_prediction(
    features: Any,
    target_labels: Any,
    *,
    leave_one_out: bool = False,
    seed: int = 0,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """LP: mean share of the true class among the five nearest neighbours, after NCA to 50 dimensions.

    Args:
        features: N x D, or N x D x *spatial with each pixel a sample. Their scale matters: NCA does not rescale
            distances, and learns nothing if all are far below or far above 1.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        leave_one_out: False counts each sample as one of its own five neighbours, as in the paper's code, which raises
            the score by up to 0.2. True takes five other samples. (NCA has still seen the label.)
        seed: for drawing 5,000 samples if there are more.
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [0.2, 1], or [0, 1] for ``leave_one_out``; higher predicts better transfer. With
        a `UserWarning`: 1 for one class only, the smallest value if no two samples share a class, and chance agreement
        for constant features. With five samples or fewer, all are neighbours, also with a `UserWarning`.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]])
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> compute_label_prediction(features, labels)
        tensor(0.8000, dtype=torch.float64)
        >>> compute_label_prediction(features, labels, leave_one_out=True)
        tensor(0.6000, dtype=torch.float64)

    Reference: Juodelyte et al., arXiv 2412.20172. In the paper's code a sample is its own first neighbour: so 0.2 is
    the smallest value.
    """
    metric = LabelPrediction(leave_one_out=leave_one_out, seed=seed, ignore_index=ignore_index)
    return metric.of(features, target_labels)


class LabelPrediction(SampleMetric):
    """`compute_label_prediction` over batches: ``compute()`` returns a float64 scalar in [0, 1], higher is better.

    Memory: the samples; at most 5,000 of them are used.

    Args:
        leave_one_out: as in `compute_label_prediction`.
        options: layer, pixels, body, seed, ignore_index, output_transform, see `FeatureMetric`.

    >>> metric = LabelPrediction()
    >>> metric.update(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 0, 0, 0]))
    >>> metric.update(torch.tensor([[10.0], [11.0], [12.0], [13.0]]), torch.tensor([1, 1, 1, 1]))
    >>> metric.compute()
    tensor(0.8000, dtype=torch.float64)
    """

    def __init__(self, *, leave_one_out: bool = False, **options: Any) -> None:
        self.leave_one_out = leave_one_out
        super().__init__(**options)

    def _score(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # The canonical order also breaks ties between neighbours.
        drawn = canonical_order(features, labels, seed=self.seed)[:MAX_SAMPLES]
        rows, target = features[drawn].cpu().numpy(), labels[drawn].cpu().numpy()
        if (target == target[0]).all():
            warn("target_labels holds one class only, so LP is 1, its best value; this says nothing about transfer.")
            return torch.ones((), dtype=torch.float64, device=labels.device)
        if len(rows) <= N_NEIGHBOURS:
            warn(f"features holds {len(rows)} samples, all each other's neighbours; LP says nothing about transfer.")
        if (rows == rows[0]).all():
            warn("features are constant, so the nearest neighbours are arbitrary; LP says nothing about transfer.")
        # The sample itself is added by hand, because a duplicate may stand before it among the nearest.
        n_others = min(N_NEIGHBOURS, len(rows) - 1) if self.leave_one_out else min(N_NEIGHBOURS, len(rows)) - 1
        agreeing = _agreeing_neighbours(rows - rows.mean(0), target, n_others)
        share = agreeing / n_others if self.leave_one_out else (agreeing + 1) / (n_others + 1)
        return torch.tensor(share, dtype=torch.float64, device=labels.device)


def combine_lp_fu(
    lp: Mapping[str, float],
    fu: Mapping[str, float],
    *,
    cross_domain: bool = False,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, float]:
    """Score of each candidate source for one target: ``LP_n * FU_n``, both scaled to [0, 1] over the candidates.

    Args:
        lp: source -> `compute_label_prediction` on the target's samples.
        fu: source -> `compute_feature_update` on the target's images, for the same sources.
        cross_domain: for sources from another domain than the target (such as natural images for medical ones). The
            score is then ``(1 - LP_n) * (1 - FU_n)``.
        exclude: source or sources that are not candidates, such as the target's own model. They do not influence the
            scaling and are not in the result.

    Returns:
        Source -> score in [0, 1], higher predicts better transfer, in the order of ``lp``. Values that are equal for
        all candidates scale to 0.5. A candidate with NaN as LP or FU (see `compute_feature_update`) scores NaN and does
        not influence that scaling; rank it last.

    Raises:
        InputError: different sources in ``lp`` and ``fu``, an unknown one in ``exclude``, none left, or Inf.

    Example:
        >>> lp = {"mri": 0.8, "ct": 0.7, "x-ray": 0.6, "own": 1.0}
        >>> fu = {"mri": 0.9, "ct": 1.3, "x-ray": 0.5, "own": 0.1}
        >>> scores = combine_lp_fu(lp, fu, exclude="own")
        >>> {source: round(score, 3) for source, score in scores.items()}
        {'mri': 0.5, 'ct': 0.5, 'x-ray': 0.0}

    Reference: Juodelyte et al., arXiv 2412.20172, eqs. 6 and 8. Their text says sum, but the product of eq. 6 gives
    their Table 2.
    """
    left_out = {exclude} if isinstance(exclude, str) else set(exclude or ())
    if odd := (set(lp) ^ set(fu)) - left_out:
        odd = ", ".join(sorted(odd))
        raise InputError(f"lp and fu name different sources ({odd} in one only); expected both for every source.")
    if unknown := left_out - set(lp) - set(fu):
        raise InputError(f"exclude names {', '.join(sorted(unknown))}; expected sources that lp and fu name.")
    candidates = [source for source in lp if source not in left_out]
    if not candidates:
        raise InputError("lp and fu hold no candidate source; expected at least one source that exclude does not name.")
    table = pd.DataFrame([(float(lp[source]), float(fu[source])) for source in candidates], candidates, ["lp", "fu"])
    if (infinite := np.isinf(table).any()).any():
        raise InputError(f"{infinite.idxmax()} holds Inf; expected finite numbers, or NaN for a missing value.")
    scaled = 1 - table.apply(min_max) if cross_domain else table.apply(min_max)
    return (scaled["lp"] * scaled["fu"]).to_dict()


def min_max(values: pd.Series) -> pd.Series:
    """Scale the values to [0, 1]. Equal values become 0.5, and NaN stays NaN.

    >>> min_max(pd.Series([3.0, 5.0, 4.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    low, high = values.min(), values.max()
    return values * 0 + 0.5 if low == high else (values - low) / (high - low)


def _agreeing_neighbours(rows: np.ndarray, target: np.ndarray, n_others: int) -> float:
    """Mean number of a sample's nearest neighbours that have its class, after NCA."""
    if len(np.unique(target)) == len(target):
        warn("target_labels holds no two samples of one class: no neighbour agrees; LP says nothing about transfer.")
        return 0.0
    mapped = _neighbourhood_components(rows, target)
    others = NearestNeighbors(n_neighbors=n_others).fit(mapped).kneighbors(return_distance=False)
    return float((target[others] == target[:, None]).sum(1).mean())


def _neighbourhood_components(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    analysis = NeighborhoodComponentsAnalysis(min(N_COMPONENTS, rows.shape[1]), random_state=RANDOM_STATE)
    with warnings.catch_warnings():
        # NCA warns after its fifty iterations, which are intended here, and of many classes.
        warnings.simplefilter("ignore")
        try:
            return analysis.fit_transform(rows, target)
        except (ValueError, IndexError):
            # With more classes than dimensions NCA starts from linear discriminants. There are none if all class means
            # are equal, or the classes have no variance.
            return analysis.set_params(init="identity").fit_transform(rows, target)
