r"""Label prediction (LP), and the score for choosing a source data set that combines it with feature update (FU).

Juodelyte et al. (*On dataset transferability in medical image classification*, arXiv 2412.20172) ask two things of a
source network: can the target's labels be predicted from its features (LP), and how much would its early features have
to change (FU, in `medtl_ext.metrics.feature_update`)? LP is how well five nearest neighbours k of a sample predict its
class, after neighbourhood components analysis (NCA) has learnt a linear map of the features for just that:

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

#: Most samples that take part: NCA's memory and time grow with the square of their number.
MAX_SAMPLES = 5000

# Of NCA: that of the paper's code.
RANDOM_STATE = 42


def compute_label_prediction(
    features: Any,
    target_labels: Any,
    *,
    leave_one_out: bool = False,
    seed: int = 0,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """LP: mean probability of the true class among five nearest neighbours, after NCA to 50 dimensions.

    Args:
        features: N x D, or N x D x *spatial with each pixel a sample. Their scale matters: NCA takes distances as they
            are, and can learn nothing where they are all far below or above 1.
        target_labels: N, or N x *spatial (a channel axis of length one is dropped), class indices 0, 1, 2, ...
        leave_one_out: False counts each sample as one of its own five neighbours, as the paper's code does, which is
            too good by up to 0.2. True asks five others. (NCA has seen the label all the same.)
        seed: of the 5,000 samples that are drawn when there are more.
        ignore_index: samples with this label are left out.

    Returns:
        The score, a float64 scalar in [0.2, 1], or [0, 1] for ``leave_one_out``; higher predicts better transfer. With
        a `UserWarning`: 1 for one class only, the least value when no two samples share a class, chance agreement when
        features are constant, and that of all samples as neighbours when there are five or fewer.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]])
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> compute_label_prediction(features, labels)
        tensor(0.8000, dtype=torch.float64)
        >>> compute_label_prediction(features, labels, leave_one_out=True)
        tensor(0.6000, dtype=torch.float64)

    Reference: Juodelyte et al., arXiv 2412.20172. Five in all for the paper's code, so the least value is 0.2.
    """
    metric = LabelPrediction(leave_one_out=leave_one_out, seed=seed, ignore_index=ignore_index)
    return metric.of(features, target_labels)


class LabelPrediction(SampleMetric):
    """`compute_label_prediction` over batches: ``compute()`` returns a float64 scalar in [0, 1], higher is better.

    Memory: the samples; 5,000 of them take part.

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
        # In canonical order, in which ties between neighbours are broken too.
        drawn = canonical_order(features, labels, seed=self.seed)[:MAX_SAMPLES]
        rows, target = features[drawn].cpu().numpy(), labels[drawn].cpu().numpy()
        if (target == target[0]).all():
            warn("target_labels holds one class only, so LP is 1, its best value; this says nothing about transfer.")
            return torch.ones((), dtype=torch.float64, device=labels.device)
        if len(rows) <= N_NEIGHBOURS:
            warn(f"features holds {len(rows)} samples, all each other's neighbours; this says nothing about transfer.")
        if (rows == rows[0]).all():
            warn("features are constant, so the nearest neighbours are arbitrary; this says nothing about transfer.")
        # The sample itself is counted by hand: a duplicate could take its place among the nearest.
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
    """Score of each candidate source for one target: ``LP_n * FU_n``, each scaled to [0, 1] over the candidates.

    Args:
        lp: source -> `compute_label_prediction` of the target's samples.
        fu: source -> `compute_feature_update` of the target's images, for the same sources.
        cross_domain: for sources from another domain than the target (natural images for medical ones):
            ``(1 - LP_n) * (1 - FU_n)``.
        exclude: source or sources that are no candidates, such as the target's own model; left out of the ranges and of
            the result.

    Returns:
        Source -> score in [0, 1], higher predicts better transfer, in the order of ``lp``. Values that are the same for
        all candidates scale to 0.5. A candidate whose LP or FU is NaN (FU is, where the first convolution gets no
        gradient) scores NaN and has no part in that range; a ranking has to put it last.

    Raises:
        InputError: different sources in ``lp`` and ``fu``, an unknown one in ``exclude``, none left, or Inf.

    Example:
        >>> lp = {"mri": 0.8, "ct": 0.7, "x-ray": 0.6, "own": 1.0}
        >>> fu = {"mri": 0.9, "ct": 1.3, "x-ray": 0.5, "own": 0.1}
        >>> scores = combine_lp_fu(lp, fu, exclude="own")
        >>> {source: round(score, 3) for source, score in scores.items()}
        {'mri': 0.5, 'ct': 0.5, 'x-ray': 0.0}

    Reference: Juodelyte et al., arXiv 2412.20172, eqs. 6 and 8. Their text speaks of a sum; the product of eq. 6 is
    what gives their Table 2.
    """
    left_out = {exclude} if isinstance(exclude, str) else set(exclude or ())
    if odd := (set(lp) ^ set(fu)) - left_out:
        odd = ", ".join(sorted(odd))
        raise InputError(f"lp and fu name different sources ({odd} in one only); expected both for every source.")
    if unknown := left_out - set(lp) - set(fu):
        raise InputError(f"exclude names {', '.join(sorted(unknown))}, which lp and fu lack.")
    candidates = [source for source in lp if source not in left_out]
    if not candidates:
        raise InputError("lp and fu hold no candidate source; expected at least one that is not in exclude.")
    table = pd.DataFrame([(float(lp[source]), float(fu[source])) for source in candidates], candidates, ["lp", "fu"])
    if (infinite := np.isinf(table).any()).any():
        raise InputError(f"{infinite.idxmax()} holds Inf; expected finite numbers, or NaN where there is none.")
    scaled = 1 - table.apply(min_max) if cross_domain else table.apply(min_max)
    return (scaled["lp"] * scaled["fu"]).to_dict()


def min_max(values: pd.Series) -> pd.Series:
    """Scale the values to [0, 1]: all the same give 0.5, NaN stays NaN.

    >>> min_max(pd.Series([3.0, 5.0, 4.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    low, high = values.min(), values.max()
    return values * 0 + 0.5 if low == high else (values - low) / (high - low)


def _agreeing_neighbours(rows: np.ndarray, target: np.ndarray, n_others: int) -> float:
    """How many of a sample's nearest others are of its class, on average, after NCA."""
    if len(np.unique(target)) == len(target):
        warn("target_labels holds no two samples of one class: no neighbour agrees; this says nothing about transfer.")
        return 0.0
    mapped = _neighbourhood_components(rows, target)
    others = NearestNeighbors(n_neighbors=n_others).fit(mapped).kneighbors(return_distance=False)
    return float((target[others] == target[:, None]).sum(1).mean())


def _neighbourhood_components(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    analysis = NeighborhoodComponentsAnalysis(min(N_COMPONENTS, rows.shape[1]), random_state=RANDOM_STATE)
    with warnings.catch_warnings():
        # Fifty iterations are the definition here, not a failure, and many classes are no mistake.
        warnings.simplefilter("ignore")
        try:
            return analysis.fit_transform(rows, target)
        except (ValueError, IndexError):
            # With more classes than dimensions it starts from discriminant directions, which there are none of where
            # the classes' means are all the same, or the classes have no variance.
            return analysis.set_params(init="identity").fit_transform(rows, target)
