r"""How well a ranking of sources agrees with the truth, and whether ranking methods differ over several targets.

The truth is the performance of every source after fine-tuning (Dice, AUC). Only the order of the scores counts, so
scores with different units can be compared:

- `spearman_footrule` (PriorSel, Table VI) uses the first k sources: 0 is a perfect choice.
- `weighted_kendall` (DatasetTr, Table 2) uses all pairs and weighs the top ones most: 1 is perfect, 0 is chance.
- `friedman_nemenyi` (Demšar, JMLR 2006) tests whether methods differ over targets, and which ones.
- `ranker_table` computes these for several rankers, with or without prior knowledge of the sources.
- `agreement_over_targets` and `verdict_claim` evaluate rankings over the targets and seeds of a study in which every
  source was fine-tuned on every target. `known_elsewhere` is a ranking that ignores the target. `noise_ceiling` is the
  best that a ranking can reach, because the truth changes with the seed.

In the first three functions NaN, which some metrics give for an undefined score, ranks last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from medtl_ext._validation import InputError, require_number
from medtl_ext.ranking._words import listed
from medtl_ext.ranking.sources import mean_relative_rank

ALPHA = 0.05
TOP = (1, 2, 3, 4)
"""The values of k for which the footrule is computed."""
CEILING = "other seeds (noise ceiling)"
"""The ranker that knows the results of fine-tuning with the other seeds."""
TRUSTED = 0.8
"""A study can tell rankings apart if the weighted tau of its noise ceiling is at least this."""


def spearman_footrule(scores: Mapping[str, float], truth: Mapping[str, float], k: int) -> float:
    r"""Distance between the first k places of a ranking and the true ranks of the sources at these places.

    .. math:: F_k = \sum_{i=1}^{k} \left| i - \mathrm{rank}_{truth}(s_i) \right|

    where :math:`s_i` is the i-th best candidate by score. Its true rank is among **all** sources: the best has rank 1,
    and equal sources share the better rank.

    Args:
        scores: source -> predicted transferability, higher is better, NaN ranks last. It may hold only some of the
            sources, such as those selected by prior knowledge.
        truth: source -> true performance, higher is better, for at least the sources of ``scores``.
        k: number of places, 1 to the number of candidates.

    Returns:
        The distance, >= 0, lower is better. If candidates have equal scores, it is the mean over their possible orders.
        So constant scores give the expected distance of a random choice.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> truth = {"ED-T1": 0.66, "ED-T2": 0.70, "NCR-T1": 0.61, "NCR-T2": 0.68}
        >>> spearman_footrule({"ED-T1": 0.4, "ED-T2": 0.3, "NCR-T1": 0.1, "NCR-T2": 0.2}, truth, k=2)
        3.0
        >>> spearman_footrule({"ED-T2": 0.3, "NCR-T2": 0.2}, truth, k=2)  # with prior knowledge: T2 only
        0.0

    Reference: Li et al., *Finding the Most Transferable Tasks for Brain Image Segmentation*, BIBM 2022, Table VI.
    """
    scores, truth = _same_sources(scores, truth)
    require_number("k", k, 1, len(scores), whole=True)
    true_ranks = truth.rank(ascending=False, method="min")[scores.index]
    distance = 0.0
    for first, group in true_ranks.groupby(scores.rank(ascending=False, method="min", na_option="bottom")):
        places = np.arange(first, min(first + len(group), k + 1))
        # Each source of a group of equal scores is equally likely at each place of the group.
        distance += np.abs(places[:, None] - group.to_numpy()).mean(axis=1).sum()
    return float(distance)


def weighted_kendall(scores: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Kendall's tau with the largest weights at the top of the ranking (Vigna 2015): `scipy.stats.weightedtau`.

    The weight of a pair of sources is the sum of 1 / (rank + 1) of both, with ranks from 0. The result is the mean of
    two values, with ranks by score and with ranks by truth.

    Args:
        scores: source -> predicted transferability, higher is better; NaN counts as the smallest. It may hold only some
            of the sources; the others are left out.
        truth: source -> true performance, higher is better, for at least the sources of ``scores``.

    Returns:
        The correlation in [-1, 1], higher is better. NaN (not 0) if nothing is ranked: all scores or all truths are
        equal, or there is one source. `friedman_nemenyi` ranks NaN last.

    Raises:
        InputError: invalid input; the message names the argument.

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
    return float(stats.weightedtau(scores.fillna(-np.inf), truth[scores.index]).statistic)


def mean_auc(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve, one class against the rest, averaged over the classes that occur.

    Args:
        labels: M class indices.
        probs: M x K class probabilities.
        weights: M, how often each sample counts; 0 leaves it out. None gives all the same weight.

    Returns:
        In [0, 1], higher is better, 0.5 is chance; NaN for one class only.

    >>> mean_auc(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.5, 0.5]]))
    0.75
    """
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    labels, probs, weights = (values[weights > 0] for values in (labels, probs, weights))
    there = [place for place in np.unique(labels) if 0 < (labels == place).sum() < len(labels)]
    values = [roc_auc_score(labels == place, probs[:, place], sample_weight=weights) for place in there]
    return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class FriedmanNemenyi:
    """The outcome of `friedman_nemenyi`.

    Attributes:
        chi_square, p: Friedman's test of the hypothesis that all methods have the same rank.
        critical_difference: methods whose average ranks differ by less cannot be told apart (Nemenyi).
        average_ranks: method -> average rank, best first (1 is best).
        table: the rank of every method (columns) on every target (rows). Equal values share their mean rank.
    """

    chi_square: float
    p: float
    critical_difference: float
    average_ranks: pd.Series = field(compare=False, repr=False)
    table: pd.DataFrame = field(compare=False, repr=False)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The largest sets of methods that cannot be told apart, best first. A method in no set differs from all."""
        ranks, groups = self.average_ranks, []
        for best in ranks:
            group = tuple(ranks.index[(ranks >= best) & (ranks < best + self.critical_difference)])
            if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
                groups.append(group)
        return tuple(groups)

    @property
    def text(self) -> str:
        """One paragraph in plain English."""
        count, best, lowest = len(self.average_ranks), self.average_ranks.index[0], self.average_ranks.iloc[0]
        test = f"over {len(self.table)} targets (Friedman chi-square {self.chi_square:.3f}, p {self.p:.2g})"
        lead = f"{best} has the best average rank, {lowest:.2f}"
        if self.p >= ALPHA:
            return f"No evidence that the {count} methods differ {test}. {lead}, which may be chance."
        behind = {f"{method} {rank:.2f}": rank - lowest for method, rank in self.average_ranks.iloc[1:].items()}
        worse = [method for method, gap in behind.items() if gap >= self.critical_difference]
        alike = [method for method in behind if method not in worse]
        text = (
            f"The {count} methods differ {test}. {lead}; with a critical difference of {self.critical_difference:.2f}"
        )
        text += f" it is better than {listed(worse) or 'none of them'}"
        return text + (f" and cannot be told from {listed(alike)}." if alike else ".")


def friedman_nemenyi(table: pd.DataFrame, *, higher_is_better: bool = True) -> FriedmanNemenyi:
    r"""Friedman's test over targets (`scipy.stats.friedmanchisquare`), and Nemenyi's critical difference at level .05.

    Average ranks of k methods on N targets that differ by less than

    .. math:: CD = q_\alpha(k) \sqrt{\frac{k (k + 1)}{6 N}}

    cannot be told apart; :math:`q_\alpha(k)` is the quantile of the studentized range of k means (infinite degrees of
    freedom) over :math:`\sqrt 2`.

    Args:
        table: one row per target, one column per method; NaN ranks last.
        higher_is_better: False for a table of ranks, or of distances such as the footrule.

    Returns:
        The test, the ranks, and a text. If all ranks are equal, chi-square is 0 and p is 1. With fewer than about ten
        targets, chi-square is only approximate.

    Raises:
        InputError: fewer than two targets or three methods (compare two with `paired_comparison`), a duplicate name, or
            a value that is not a number.

    Example:
        >>> table = pd.DataFrame({"LEEP": [0.2, 0.3, 0.1, 0.4], "LogME": [0.5, 0.4, 0.6, 0.5], "SFDA": [0, 0, 0, 0.1]})
        >>> result = friedman_nemenyi(table)
        >>> print(f"{result.chi_square:.2f}, p {result.p:.3f}, CD {result.critical_difference:.3f}")
        8.00, p 0.018, CD 1.657
        >>> result.average_ranks.to_dict()
        {'LogME': 1.0, 'LEEP': 2.0, 'SFDA': 3.0}
        >>> result.groups
        (('LogME', 'LEEP'), ('LEEP', 'SFDA'))

    Reference: Demšar, *Statistical comparisons of classifiers over multiple data sets*, JMLR 7, 2006. For 7 methods on
    11 targets, DatasetTr prints the critical difference 2.792, with q for 8 methods; the correct value is 2.716.
    """
    ranks = _checked_table(table).rank(axis=1, ascending=not higher_is_better, na_option="bottom")
    n_targets, n_methods = ranks.shape
    all_equal = (ranks.nunique(axis=1) == 1).all()
    chi_square, p = (0.0, 1.0) if all_equal else stats.friedmanchisquare(*ranks.to_numpy().T)
    q = stats.studentized_range.ppf(1 - ALPHA, n_methods, np.inf) / np.sqrt(2)
    critical = float(q * np.sqrt(n_methods * (n_methods + 1) / (6 * n_targets)))
    average = ranks.mean().sort_values(kind="stable").rename("average_rank")
    return FriedmanNemenyi(float(chi_square), float(p), critical, average, ranks)


def ranker_table(rankers: Mapping[str, pd.Series], truth: pd.Series, *, groups: Mapping[str, pd.Index]) -> pd.DataFrame:
    """How good each ranker's order of a target's sources is, with and without prior knowledge.

    Args:
        rankers: ranker -> source -> value, higher is better. A ranker with equal values chooses at random: its regret
            and footrule are the expected ones of a random order.
        truth: source -> outcome of fine-tuning, higher is better.
        groups: kind of prior knowledge -> the sources that it selects.

    Returns:
        Columns ``ranker, prior, candidates, pick, regret`` (how far the first choice is below the best of all sources;
        the mean over sources of equal value), ``tau`` (weighted Kendall over the candidates; NaN if all values are
        equal) and ``footrule_1`` to ``footrule_4`` (NaN if there are fewer candidates).

    Example:
        >>> truth = pd.Series({"a": 0.9, "b": 0.8, "c": 0.7})
        >>> rankers = {"LEEP": pd.Series({"a": -0.3, "b": -0.1, "c": -0.5}), "random": pd.Series(0.0, truth.index)}
        >>> table = ranker_table(rankers, truth, groups={"none": truth.index})
        >>> table[["ranker", "pick", "regret", "footrule_1"]].round(3).to_numpy().tolist()
        [['LEEP', 'b', 0.1, 1.0], ['random', '3 alike', 0.1, 1.0]]
    """
    rows = []
    for (name, values), (prior, group) in product(rankers.items(), groups.items()):
        chosen = values[group]
        if chosen.isna().all():
            continue
        first = chosen.index[chosen == chosen.max()]
        row = {"ranker": name, "prior": prior, "candidates": len(group)}
        row["pick"] = first[0] if len(first) == 1 else f"{len(first)} alike"
        row["regret"] = float(truth.max() - truth[first].mean())
        row["tau"] = weighted_kendall(chosen.to_dict(), truth.to_dict())
        for k in TOP:
            fits = k <= len(group)
            row[f"footrule_{k}"] = spearman_footrule(chosen.to_dict(), truth.to_dict(), k) if fits else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def agreement_over_targets(sources: pd.DataFrame, judge: Callable[..., pd.DataFrame], *, outcome: str) -> pd.DataFrame:
    """Compare every ranker with the truth, for each target and seed of a study.

    Args:
        sources: a row per ``target``, ``seed`` and ``source``, with scores and the outcome of fine-tuning.
        judge: function of one target's sources, their outcome, and ``static`` (from `known_elsewhere`). It returns a
            table with a row per ranker.
        outcome: column of the truth, higher is better.

    Returns:
        The rows of ``judge``, with ``target`` and ``seed``.
    """
    parts = []
    for (target, seed), group in sources.groupby(["target", "seed"], sort=False):
        ready = group.set_index("source")
        static = known_elsewhere(sources, target, seed, outcome=outcome)
        parts.append(judge(ready, ready[outcome], static=static).assign(target=target, seed=seed))
    return pd.concat(parts, ignore_index=True)


def known_elsewhere(sources: pd.DataFrame, target: str, seed: int, *, outcome: str) -> dict[str, float] | None:
    """How well each source did on the study's other targets: the values of a ranker that ignores the target.

    Args:
        sources: a row per ``target``, ``seed`` and ``source``, with the outcome of fine-tuning.
        target, seed: of the ranking.
        outcome: column of the outcome, higher is better (``dice``, ``auc``).

    Returns:
        Source -> minus its rank by the mean over the other targets. Equal sources share their mean rank. None if the
        seed has no other target.

    Example:
        >>> rows = [("t1", "a", 0.8), ("t1", "b", 0.6), ("t2", "a", 0.5), ("t2", "b", 0.7)]
        >>> table = pd.DataFrame(rows, columns=["target", "source", "dice"]).assign(seed=0)
        >>> known_elsewhere(table, "t2", 0, outcome="dice")
        {'a': -1.0, 'b': -2.0}
    """
    sources = sources[sources["seed"] == seed]
    others = sources[sources["target"] != target].groupby("target")
    if not (known := {name: group.set_index("source")[outcome] for name, group in others}):
        return None
    costs = mean_relative_rank(sorted(set(sources.loc[sources["target"] == target, "source"])), known)
    return (-costs.rank(na_option="bottom")).to_dict()  # sources on no other target rank last


def noise_ceiling(sources: pd.DataFrame, *, outcome: str) -> tuple[pd.DataFrame, str]:
    """How well the mean truth of the other seeds ranks the truth of one seed: the best that a score can reach.

    Args:
        sources: see `known_elsewhere`.
        outcome: the column of the truth, higher is better.

    Returns:
        The rows of `ranker_table` for this ranker, with ``target`` and ``seed`` (no rows for a target with one seed);
        and a sentence, with the intraclass correlation ICC(1) of the outcomes. ICC is the share of the variance within
        a target that is due to the sources: 1 if seeds do not matter.

    Example:
        >>> rows = [(seed, name, value + 0.01 * seed) for seed in (0, 1) for name, value in (("a", 0.8), ("b", 0.6))]
        >>> table = pd.DataFrame(rows, columns=["seed", "source", "dice"]).assign(target="t")
        >>> rows, said = noise_ceiling(table, outcome="dice")
        >>> (float(rows["tau"].mean()), said[-10:])
        (1.0, ' ICC 1.00.')
    """
    parts, shares = [], []
    for target, group in sources.groupby("target", sort=False):
        wide = group.pivot(index="source", columns="seed", values=outcome).dropna()
        if wide.shape[1] < 2 or len(wide) < 2:
            continue
        for seed in wide:
            known = {CEILING: wide.drop(columns=seed).mean(axis=1)}
            parts.append(ranker_table(known, wide[seed], groups={"none": wide.index}).assign(target=target, seed=seed))
        between, within = wide.shape[1] * wide.mean(axis=1).var(), wide.var(axis=1).mean()
        shares.append((between - within) / (between + (wide.shape[1] - 1) * within))
    lead = "**What could a ranking reach?** "
    if not parts:
        return pd.DataFrame(), f"{lead}One seed: so it is not known how well the truth agrees with itself."
    rows = pd.concat(parts, ignore_index=True)
    tau = rows["tau"].mean()
    said = f"{lead}The other seeds rank the truth of one seed with a mean weighted tau of {tau:.2f}; "
    said += f"ICC {np.mean(shares):.2f}."
    return rows, said + (
        f" Below {TRUSTED}: this study cannot tell good rankings apart." if round(tau, 2) < TRUSTED else ""
    )


def verdict_claim(
    sources: pd.DataFrame, verdicts: Mapping[tuple[str, int], Mapping[str, Any]], *, outcome: str, unit: str
) -> str:
    """A sentence that says how often the verdicts were right.

    Args:
        sources: see `known_elsewhere`.
        verdicts: (target, seed) -> ``recommendation`` (None for no evidence), ``tied`` and ``default`` of its ranking.
        outcome: the column of the truth, higher is better.
        unit: name of the outcome in the sentence.
    """
    truth = {key: group.set_index("source")[outcome] for key, group in sources.groupby(["target", "seed"])}
    called = {key: verdict["recommendation"] for key, verdict in verdicts.items() if verdict["recommendation"]}
    right = sum(truth[key].idxmax() == source for key, source in called.items())
    held = sum(truth[key].idxmax() in verdict["tied"] for key, verdict in verdicts.items())
    regret = [truth[key].max() - truth[key][told["default"]] for key, told in verdicts.items() if told["default"]]
    sizes = [len(verdict["tied"]) for verdict in verdicts.values()]
    return (
        f"**Is the verdict calibrated?** Of {len(verdicts)} rankings {len(called)} name one source, {right} of them "
        f"the best one; the tied set (mean size {np.mean(sizes):.1f}) holds the best source in {held}; the best guess "
        f"loses {np.mean(regret) if regret else np.nan:.3f} {unit} on average."
    )


def _same_sources(scores: Mapping[str, float], truth: Mapping[str, float]) -> tuple[pd.Series, pd.Series]:
    found = []
    for name, values in (("scores", scores), ("truth", truth)):
        series = pd.Series({source: float(value) for source, value in dict(values).items()}, dtype=float)
        if series.empty:
            raise InputError(f"{name} is empty; expected a value for each source.")
        bad = series[np.isinf(series) if name == "scores" else ~np.isfinite(series)]
        if len(bad):
            raise InputError(f"{name} of source {bad.index[0]} is {bad.iloc[0]}; expected a finite number.")
        found.append(series)
    scores, truth = found
    if unknown := [source for source in scores.index if source not in truth.index]:
        raise InputError(f"truth has no value for {listed(unknown, 5)}; expected one for every source in scores.")
    return scores, truth


def _checked_table(table: pd.DataFrame) -> pd.DataFrame:
    try:
        values = pd.DataFrame(table).astype(float)
    except (TypeError, ValueError) as error:
        raise InputError(f"table must hold numbers only; {error}.") from None
    if values.shape[0] < 2 or values.shape[1] < 3:
        raise InputError(f"table must have at least 2 targets (rows) and 3 methods (columns); found {values.shape}.")
    for what, names in (("target", values.index), ("method", values.columns)):
        if names.has_duplicates:
            raise InputError(f"table has {what} {names[names.duplicated()][0]} twice; keep one row per target.")
    if np.isinf(values).any(axis=None):
        raise InputError("table holds an infinite value; give NaN for a method without a value on a target.")
    return values
