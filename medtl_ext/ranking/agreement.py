r"""How well a ranking of sources agrees with the truth, and whether ranking methods differ over several targets.

The truth is what every source really gave after fine-tuning (Dice, AUC). A ranking is judged by the order of its
scores only, so scores of any unit can be compared:

- `spearman_footrule` (PriorSel, Table VI) looks at the k sources it would pick first: 0 is a perfect choice.
- `weighted_kendall` (DatasetTr, Table 2) looks at all pairs, the top ones most: 1 is perfect, 0 is chance.
- `friedman_nemenyi` (Demšar, JMLR 2006) asks whether methods differ over targets, and which ones.

In all three a NaN score, which some metrics give where they cannot tell, ranks last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._validation import InputError
from medtl_ext.ranking._words import listed

__all__ = ["FriedmanNemenyi", "friedman_nemenyi", "spearman_footrule", "weighted_kendall"]


def spearman_footrule(scores: Mapping[str, float], truth: Mapping[str, float], k: int) -> float:
    r"""Distance between the first k places of a ranking and the true ranks of the sources put there.

    .. math:: F_k = \sum_{i=1}^{k} \left| i - \mathrm{rank}_{truth}(s_i) \right|

    where :math:`s_i` is the i-th best candidate by score and its rank is among **all** sources by truth, the best
    having rank 1, equal ones sharing the better rank.

    Args:
        scores: source -> predicted transferability, higher is better, NaN ranks last. Possibly only some of the
            sources, such as those that prior knowledge has left.
        truth: source -> true performance, higher is better, for at least the sources of ``scores``.
        k: how many places count, 1 to the number of candidates.

    Returns:
        The distance, >= 0, lower is better. Candidates of equal score are taken in every order, and the mean is
        returned: constant scores give what a random choice is expected to give.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> truth = {"ED-T1": 0.66, "ED-T2": 0.70, "NCR-T1": 0.61, "NCR-T2": 0.68}
        >>> spearman_footrule({"ED-T1": 0.4, "ED-T2": 0.3, "NCR-T1": 0.1, "NCR-T2": 0.2}, truth, k=2)
        3.0
        >>> spearman_footrule({"ED-T2": 0.3, "NCR-T2": 0.2}, truth, k=2)  # with prior knowledge: T2 only
        0.0

    Reference: Li et al., *Finding the Most Transferable Tasks for Brain Image Segmentation*, BIBM 2022, Table VI.
    """
    scores, truth = _same_sources(scores, truth)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= len(scores):
        raise InputError(f"k must be an integer from 1 to the {len(scores)} candidates in scores; found {k!r}.")
    true_ranks = pd.Series(stats.rankdata(-truth, method="min"), truth.index)[scores.index].to_numpy()
    place = stats.rankdata(_losing(scores), method="min").astype(int)  # of the first of each group of equal scores
    distance = 0.0
    for first in np.unique(place):
        group = true_ranks[place == first]
        places = np.arange(first, min(first + len(group), k + 1))
        # Each member is as likely as any other to stand at each of the group's places.
        distance += float(np.abs(places[:, None] - group).mean(axis=1).sum())
    return distance


def weighted_kendall(scores: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Kendall's tau in which the top of the ranking weighs most (Vigna 2015): `scipy.stats.weightedtau` as it comes.

    A pair of sources weighs the sum of 1 / (rank + 1) of both, ranks from 0, and the mean is taken of ranking by score
    and ranking by truth.

    Args:
        scores: source -> predicted transferability, higher is better; NaN counts as the smallest. Possibly only some
            of the sources; the others are left out.
        truth: source -> true performance, higher is better, for at least the sources of ``scores``.

    Returns:
        The correlation in [-1, 1], higher is better. NaN, not 0, when all scores or all truths are equal or there is
        one source: nothing was ranked. `friedman_nemenyi` counts it as last.

    Raises:
        InputError: a ValueError that names the argument and what is wrong with it.

    Example:
        >>> truth = {"a": 0.90, "b": 0.80, "c": 0.70, "d": 0.60}
        >>> round(weighted_kendall({"a": 4, "b": 3, "c": 1, "d": 2}, truth), 3)  # wrong at the bottom
        0.813
        >>> round(weighted_kendall({"a": 3, "b": 4, "c": 2, "d": 1}, truth), 3)  # wrong at the top
        0.52
        >>> weighted_kendall({"a": 1, "b": 1, "c": 1, "d": 1}, truth)
        nan

    Reference: Juodelyte et al., *On dataset transferability in medical image classification*, Table 2.
    """
    scores, truth = _same_sources(scores, truth)
    if len(scores) < 2:
        return float("nan")
    return float(stats.weightedtau(-_losing(scores), truth[scores.index].to_numpy()).statistic)


@dataclass(frozen=True)
class FriedmanNemenyi:
    """The outcome of `friedman_nemenyi`.

    Attributes:
        chi_square, p: Friedman's test that all methods rank alike.
        critical_difference: average ranks that differ by less cannot be told apart (Nemenyi).
        average_ranks: method -> average rank, best first (1 is best).
        groups: the largest sets of methods that cannot be told apart, best first; a method in none is told from all.
        text: one paragraph in plain English.
        table: the rank of every method (columns) on every target (rows), equal values sharing their mean rank.
    """

    chi_square: float
    p: float
    critical_difference: float
    average_ranks: pd.Series = field(compare=False, repr=False)
    groups: tuple[tuple[str, ...], ...]
    text: str
    table: pd.DataFrame = field(compare=False, repr=False)


def friedman_nemenyi(table: pd.DataFrame, *, higher_is_better: bool = True, alpha: float = 0.05) -> FriedmanNemenyi:
    r"""Friedman's test over targets, and Nemenyi's critical difference between average ranks.

    With :math:`r_{ij}` the rank of method j of k on target i of N, and :math:`R_j` their sum over targets,

    .. math::
        \chi^2 = (k - 1) \frac{\sum_j (R_j - N (k+1)/2)^2}{\sum_{ij} (r_{ij} - (k+1)/2)^2}, \qquad
        CD = q_\alpha(k) \sqrt{\frac{k (k + 1)}{6 N}}

    on k - 1 degrees of freedom, which includes the usual correction for ties; :math:`q_\alpha(k)` is the quantile of
    the studentized range of k means (infinite degrees of freedom) over :math:`\sqrt 2`.

    Args:
        table: one row per target, one column per method; NaN counts as last.
        higher_is_better: False for a table of ranks or of distances such as the footrule.
        alpha: of the text's judgement and of the critical difference, in (0, 1).

    Returns:
        The test, the ranks, and what they say. All ranks equal: chi-square 0, p 1. Fewer than about ten targets leave
        the chi-square approximate.

    Raises:
        InputError: fewer than two targets or methods, a name that is there twice, or a value that is no number.

    Example:
        >>> table = pd.DataFrame({"LEEP": [0.2, 0.3, 0.1, 0.4], "LogME": [0.5, 0.4, 0.6, 0.5], "SFDA": [0, 0, 0, 0.1]})
        >>> result = friedman_nemenyi(table)
        >>> print(f"{result.chi_square:.2f}, p {result.p:.3f}, CD {result.critical_difference:.3f}")
        8.00, p 0.018, CD 1.657
        >>> result.average_ranks.to_dict()
        {'LogME': 1.0, 'LEEP': 2.0, 'SFDA': 3.0}
        >>> result.groups
        (('LogME', 'LEEP'), ('LEEP', 'SFDA'))

    Reference: Demšar, *Statistical comparisons of classifiers over multiple data sets*, JMLR 7, 2006. DatasetTr prints
    the critical difference 2.792 for 7 methods on 11 targets, which takes q for 8; it is 2.716.
    """
    values = _checked_table(table)
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1; found {alpha:g}.")
    losing = -values if higher_is_better else values
    ranks = pd.DataFrame(
        stats.rankdata(losing.fillna(np.inf), axis=1, method="average"), index=values.index, columns=values.columns
    )
    n_targets, n_methods = ranks.shape
    off = ranks.to_numpy() - (n_methods + 1) / 2
    spread = np.sum(off**2)
    chi_square = float((n_methods - 1) * np.sum(off.sum(axis=0) ** 2) / spread) if spread else 0.0
    p = float(stats.chi2.sf(chi_square, n_methods - 1))
    q = stats.studentized_range.ppf(1 - alpha, n_methods, np.inf) / np.sqrt(2)
    critical = float(q * np.sqrt(n_methods * (n_methods + 1) / (6 * n_targets)))
    average = ranks.mean().sort_values(kind="stable").rename("average_rank")
    groups = _indistinct(average, critical)
    text = _friedman_text(chi_square, p, critical, average, n_targets, alpha)
    return FriedmanNemenyi(chi_square, p, critical, average, groups, text, ranks)


def _same_sources(scores: Mapping[str, float], truth: Mapping[str, float]) -> tuple[pd.Series, pd.Series]:
    series = {}
    for name, values in (("scores", scores), ("truth", truth)):
        values = dict(values)
        if not values:
            raise InputError(f"{name} is empty; expected a value per source.")
        array = np.array([float(value) for value in values.values()])
        bad = np.isinf(array) if name == "scores" else ~np.isfinite(array)
        if bad.any():
            source = list(values)[int(np.argmax(bad))]
            raise InputError(f"{name} of source {source} is {array[bad][0]}; expected a finite number.")
        series[name] = pd.Series(array, pd.Index(list(values), dtype=object))
    if unknown := [str(source) for source in series["scores"].index if source not in series["truth"].index]:
        raise InputError(f"truth has no value for {listed(unknown, 5)}; expected one for every source in scores.")
    return series["scores"], series["truth"]


def _losing(scores: pd.Series) -> np.ndarray:
    """Turned so that the smallest is best, NaN worst."""
    return -np.where(np.isnan(scores), -np.inf, scores)


def _checked_table(table: pd.DataFrame) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"table must be a DataFrame of targets by methods; found {type(table).__name__}.")
    if table.shape[0] < 2 or table.shape[1] < 2:
        raise InputError(
            f"table has {table.shape[0]} targets (rows) and {table.shape[1]} methods (columns); at least 2 of each are "
            "needed to compare methods over targets."
        )
    for what, names in (("target", table.index), ("method", table.columns)):
        if names.has_duplicates:
            raise InputError(f"table has {what} {names[names.duplicated()][0]} twice; keep one row per target.")
    try:
        values = table.astype(float)
    except (TypeError, ValueError) as error:
        raise InputError(f"table must hold numbers only; {error}.") from None
    if np.isinf(values.to_numpy()).any():
        raise InputError("table holds an infinite value; give NaN for a method that has no value on a target.")
    return values


def _indistinct(average: pd.Series, critical: float) -> tuple[tuple[str, ...], ...]:
    ranks, groups, reached = average.to_numpy(), [], 0
    for first in range(len(ranks)):
        end = int(np.searchsorted(ranks, ranks[first] + critical))  # one as large as the critical one counts
        if end > max(reached, first + 1):
            groups.append(tuple(average.index[first:end]))
            reached = end
    return tuple(groups)


def _friedman_text(
    chi_square: float, p: float, critical: float, average: pd.Series, n_targets: int, alpha: float
) -> str:
    test = f"over {n_targets} targets (Friedman chi-square {chi_square:.3f}, p {p:.2g})"
    best = average.index[0]
    lead = f"{best} has the best average rank, {average[best]:.2f}"
    if p >= alpha:
        return f"No evidence that the {len(average)} methods differ {test}. {lead}, which may be chance."
    named = {True: [], False: []}
    for method, rank in average.iloc[1:].items():
        named[bool(rank - average[best] < critical)].append(f"{method} {rank:.2f}")
    text = f"The {len(average)} methods differ {test}. {lead}; with a critical difference of {critical:.2f} it "
    text += f"is better than {listed(named[False])}" if named[False] else "is better than none of them"
    return text + (f" and cannot be told from {listed(named[True])}." if named[True] else ".")
