"""Candidate sources ranked for one target, with a patient bootstrap, baseline rankers, and a verdict.

A transferability score depends on the target's patients: other patients would give another ranking.
`bootstrap_ranking` draws patients with replacement, the **same** draw for all sources, and ranks the sources again. The
draws are balanced: over all draws every patient occurs equally often.

- A resample contains some patients several times. This inflates scores that grow if there are fewer independent samples
  (H-score, LogME), more so with more features. So the resampled scores of each source are shifted: their mean becomes
  the source's score. In simulated pairs of sources with 8 and 24 features, this reduced wrong decisions (a win
  probability of .95 or more for the worse source) from 20 % to 9 % with 6 patients, and from 8 % to 3 % with 12. For a
  mean over patients the shift is 0.
- A bootstrap over patients is still over-confident, because the score does not measure everything that matters. In a
  study of 16 brain segmentation sources it named a leader in 9 of 10 cases; fine-tuning confirmed 4. The gap between
  two scores, as a share of the range of all candidates, was a better sign: the order of pairs closer than .05 was
  chance, that of pairs .15 to .3 apart was right in 70 %, and that of pairs more than .6 apart in 90 %. So a source is
  preferred only if **both** its win probability and its gap are large.
- Source size, or a fixed "good source", is a strong baseline for many scores, in the literature and in our
  measurements. `baseline_rankings` shows their choice next to every ranking.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from medtl_ext._validation import InputError, require_number
from medtl_ext.ranking._words import ONLY_A_SCORE, SYNTHETIC, listed, number_of_patients
from medtl_ext.ranking.paired import CONFIDENCE, MINIMUM_PATIENTS

ScoreOfCounts = Callable[[np.ndarray], Any]
"""Function of the counts (how often each patient was drawn, an integer array) that returns one source's score."""
PoolOfCounts = Callable[[np.ndarray], Mapping[str, Any]]
"""Function of the counts that returns source -> score."""
Scores = PoolOfCounts | Mapping[str, ScoreOfCounts | Mapping[str, float] | ArrayLike]
COLUMNS = ["score", "low", "high", "rank", "rank_low", "rank_high", "rank_mean"]
COLUMNS += ["p_best", "leader_wins", "gap", "undefined"]


@dataclass(frozen=True)
class SourceRanking:
    """The outcome of `bootstrap_ranking`.

    Attributes:
        recommendation: the source that there is evidence to prefer, or None.
        tied: the sources that cannot be told from the leader, leader first: candidates for a short fine-tuning. Only
            the leader, if it is recommended.
        default: the recommendation, or else the best guess. None with too few patients, without any score, or if
            several sources share the highest score.
        patients: number of patients.
        resamples: number of resamples for the intervals; 0 with fewer than 3 patients.
        text: one paragraph in plain English.
        table: one row per source, best first: ``source, score, low, high`` (bootstrap interval), ``rank`` (1 is best;
            equal scores share it), ``rank_low, rank_high, rank_mean`` over resamples, ``p_best`` (share of resamples
            in which it ranks first, divided among equals), ``leader_wins`` (share in which the leader is ahead of it;
            ties count half), ``gap`` (leader's score minus its score, divided by the range of all scores),
            ``undefined`` (share of resamples without a score), and ``<baseline>_rank`` for each baseline.
        baselines: one row per baseline: ``baseline, pick``, and the ``score, rank, leader_wins, gap`` of the pick.
    """

    recommendation: str | None
    tied: tuple[str, ...]
    default: str | None
    patients: int
    resamples: int
    text: str
    table: pd.DataFrame = field(compare=False, repr=False)
    baselines: pd.DataFrame = field(compare=False, repr=False)


def baseline_rankings(
    sources: Sequence[str],
    *,
    sizes: Mapping[str, float] | None = None,
    other_targets: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The order of the sources by rankers that ignore the target.

    Args:
        sources: names of the candidates.
        sizes: source -> number of training subjects; the largest ranks first. NaN (unknown) ranks last.
        other_targets: other target -> source -> its result there (Dice after fine-tuning, or a score), higher is
            better. The static ranker sorts by a source's mean relative rank, from 0 for the best to 1 for the worst
            candidate of each target. A source on no other target ranks last. Leave out the target itself.
        seed: of the random ranker, which also breaks ties of the others.

    Returns:
        A row per source and a column per ranker: ``random``, and ``source_size`` and ``static`` if their input is
        given. Values are ranks; 1 is the ranker's pick. For the *expected* result of a random choice, give constant
        scores to `spearman_footrule`.

    Raises:
        InputError: no source, a source named twice, or a source without an entry in ``sizes``.

    Example:
        >>> baseline_rankings(
        ...     ["13-T1-ED", "14-T2-ED", "17-T1-ET"],
        ...     sizes={"13-T1-ED": 35, "14-T2-ED": 47, "17-T1-ET": 12},
        ...     other_targets={"18-T1-ED": {"13-T1-ED": 0.61, "14-T2-ED": 0.48, "17-T1-ET": 0.55}},
        ... )
                  random  source_size  static
        13-T1-ED       2            2       1
        14-T2-ED       3            1       3
        17-T1-ET       1            3       2
    """
    sources = list(sources)
    if not sources or len(set(sources)) < len(sources):
        raise InputError(f"sources must name at least one candidate, and none twice; found {listed(sources, 9)}.")
    shuffled = np.random.default_rng(seed).permutation(sorted(sources))  # sorted: the order of the list has no effect
    chance = pd.Series(np.arange(len(sources)), shuffled)[sources].to_numpy()
    costs = {"random": chance}
    if sizes is not None:
        if missing := [source for source in sources if source not in sizes]:
            raise InputError(f"sizes has no entry for {listed(missing, 5)}; give NaN if the size is unknown.")
        costs["source_size"] = np.array([-float(sizes[source]) for source in sources])
    if other_targets is not None:
        costs["static"] = mean_relative_rank(sources, other_targets)
    places = {name: np.lexsort((chance, cost)).argsort() + 1 for name, cost in costs.items()}  # NaN sorts last
    return pd.DataFrame(places, index=pd.Index(sources, dtype=object))


def bootstrap_ranking(
    scores: Scores,
    *,
    patients: int | None = None,
    baselines: pd.DataFrame | None = None,
    minimum_win: float = 0.95,
    minimum_gap: float = 0.15,
    n_resamples: int = 1000,
    seed: int = 0,
    metric: str = "score",
    synthetic: bool = False,
) -> SourceRanking:
    """Rank the candidate sources of one target, with uncertainty, and recommend one if there is enough evidence.

    Args:
        scores: higher is better, in one of three forms. (1) Source -> one value per patient, whose mean is the score: a
            list with the same order of patients for all, or patient -> value (or a DataFrame, patients x sources). (2)
            Source -> function of the counts: an integer array that says how often each patient was drawn. (3) One
            function of the counts that returns source -> score, for scores that depend on all sources (a mean of ranks,
            LP times FU, NCTI). NaN means no score: the source ranks last, and is never preferred or tied.
        patients: number of patients. Needed only if ``scores`` holds functions only. All functions must use the same
            order of patients.
        baselines: from `baseline_rankings`, or any table of ranks with a row per source and a column per ranker. They
            are shown next to the ranking.
        minimum_win: share of resamples in which the leader must be ahead of another source.
        minimum_gap: smallest gap between both scores, as a share of the range of all scores.
        n_resamples: number of resamples of the patients.
        seed: of the resampling.
        metric: name of the score in the text.
        synthetic: the text says that the data are synthetic.

    Returns:
        The ranking. A source is recommended if, against every other source with a score, it wins at least
        ``minimum_win`` of the resamples **and** leads by at least ``minimum_gap``. There is no verdict with fewer than
        4 patients or with fewer than two scores, and there are no intervals (NaN) with fewer than 3 patients. With two
        sources the gap is the whole range and has no effect; the text says so. If sources differ by noise only, one of
        two is preferred in about 20 % of cases, one of four in 5 %, one of eight in 1 %.
        A function may refuse a resample with an `InputError` (for example if none of its patients has the region). The
        resample is then left out for all sources. Warnings about single resamples are not shown.

    Raises:
        InputError: no source, different patients for different sources, an infinite score, missing ``patients``,
            baselines for other sources, options out of range, or more than half of the resamples refused.

    Example:
        >>> ranking = bootstrap_ranking({
        ...     "13-T1-ED": [0.61, 0.55, 0.72, 0.64, 0.58, 0.70],
        ...     "14-T2-ED": [0.60, 0.56, 0.70, 0.66, 0.57, 0.70],
        ...     "17-T1-ET": [0.42, 0.31, 0.55, 0.40, 0.45, 0.47],
        ... }, metric="LEEP")
        >>> ranking.recommendation, ranking.tied
        (None, ('13-T1-ED', '14-T2-ED'))
        >>> print(ranking.text)  # doctest: +ELLIPSIS
        No evidence to prefer: by LEEP, 13-T1-ED 0.633 and 14-T2-ED 0.632 cannot be told apart on 6 target patients; ...
        >>> ranking.table[["source", "rank_low", "rank_high"]].to_dict("list")
        {'source': ['13-T1-ED', '14-T2-ED', '17-T1-ET'], 'rank_low': [1.0, 1.0, 3.0], 'rank_high': [2.0, 2.0, 3.0]}
    """
    # With one half or less, the loser of a pair could be preferred.
    require_number("minimum_win", minimum_win, 0.5, 1, above=True)
    require_number("minimum_gap", minimum_gap, 0, 1)
    require_number("n_resamples", n_resamples, 1, whole=True)
    pool, patients = _as_pool(scores, patients)
    observed = pd.Series(_called(pool, np.ones(patients, dtype=np.int64)), dtype=float)
    if observed.empty:
        raise InputError("scores returned no source; expected at least one candidate.")
    ranks = pd.DataFrame({} if baselines is None else baselines).reindex(observed.index)
    if len(unranked := ranks.index[ranks.isna().any(axis=1)]):
        raise InputError(f"baselines has no rank for {listed(unranked, 5)}; give it the same sources as scores.")
    resampled = _resampled(pool, patients, observed, n_resamples if patients >= 3 else 0, seed)
    table = _ranking_table(observed, resampled)
    picks = table.loc[ranks.idxmin(), ["score", "rank", "leader_wins", "gap"]].reset_index(names="pick")
    picks.insert(0, "baseline", list(ranks))

    scored = table[table["score"].notna()]
    first = scored["score"] >= scored["score"].max() - 1e-12 * scored["score"].abs().max()  # equal up to rounding
    alike = scored[(scored["leader_wins"] < minimum_win) | (scored["gap"] < minimum_gap) | first]
    recommendation, default, tied = None, None, tuple(scored.index)
    on_patients = number_of_patients(patients, "target")
    if scored.empty:
        text = f"No verdict: no source has a score ({metric}) on {on_patients}."
    elif len(scored) == 1:
        default, only = tied[0], "the only candidate" if len(table) == 1 else "the only candidate with a score"
        text = f"{_named(scored)} is {only}: by {metric} there is nothing to compare it with, and no evidence to "
        text += "prefer it."
    elif patients < MINIMUM_PATIENTS:
        text = f"{on_patients} cannot settle this: a verdict needs at least {MINIMUM_PATIENTS}. "
        text += f"By {metric} the order was {_named(scored)}."
    elif len(alike) == 1:
        recommendation, default, tied = tied[0], tied[0], tied[:1]
        text = _preferred_text(scored, metric, on_patients)
    else:
        tied = tuple(alike.index)
        default = tied[0] if first.sum() == 1 else None  # the order of the list must not decide
        demanded = f"{_percent(minimum_win)} and {_percent(minimum_gap)}"
        text = _undecided_text(scored, alike, scored.index[first], metric, on_patients, demanded)
    refused = len(resampled) and n_resamples - len(resampled)
    text += _remarks(table, picks, patients, f"{refused} of {n_resamples}" if refused else "")
    text += f" {SYNTHETIC}" * bool(synthetic)
    table = table.join(ranks.add_suffix("_rank")).rename_axis("source").reset_index()
    return SourceRanking(recommendation, tied, default, patients, len(resampled), text, table, picks)


def mean_relative_rank(sources: Sequence[str], other_targets: Mapping[str, Mapping[str, float]]) -> pd.Series:
    """Each source's mean relative rank on the other targets: 0 is best, 1 is worst, NaN if it is on none."""
    relative = []
    for values in other_targets.values():
        known = pd.Series({source: float(values[source]) for source in sources if source in values}, dtype=float)
        if len(known) > 1:  # a single source has no rank
            relative.append((known.rank(ascending=False, na_option="bottom") - 1) / (len(known) - 1))
    return pd.DataFrame(relative).reindex(columns=sources).mean().astype(float).round(9)


def _as_pool(scores: Scores, patients: int | None) -> tuple[PoolOfCounts, int]:
    """Turn any form of scores into one function of the counts, and find the number of patients."""
    if callable(scores):
        return scores, int(require_number("patients", patients, 1, whole=True))
    functions = dict(scores)
    if not functions:
        raise InputError("scores holds no source; expected at least one candidate.")
    vectors = {source: _per_patient(source, values) for source, values in functions.items() if not callable(values)}
    for source, vector in vectors.items():
        first = next(iter(vectors))
        if len(unpaired := vector.index.symmetric_difference(vectors[first].index)):
            same = f"scores of {source} and {first} must be of the same patients"
            raise InputError(f"{same}; only one has {listed(unpaired, 5)}.")
        if patients not in (None, len(vector)):
            raise InputError(f"scores of {source} are of {len(vector)} patients; patients says {patients}.")
        patients = len(vector)
        functions[source] = partial(np.average, vector, None)  # the counts are the weights
    count = int(require_number("patients", patients, 1, whole=True))
    return lambda counts: {source: score(counts) for source, score in functions.items()}, count


def _per_patient(source: str, values: Mapping[str, float] | ArrayLike) -> pd.Series:
    """The values, sorted by patient if the patients are named."""
    keyed = hasattr(values, "keys")
    try:
        vector = pd.Series(dict(values) if keyed else np.asarray([*values]), dtype=float)
    except (TypeError, ValueError):
        found = type(values).__name__
        raise InputError(f"scores of {source} must be numbers, one per patient; found {found}.") from None
    return vector.sort_index(key=lambda names: names.astype(str)) if keyed else vector


def _called(pool: PoolOfCounts, counts: np.ndarray) -> dict[str, float]:
    scores = {source: float(score) for source, score in pool(counts).items()}
    if infinite := [source for source, score in scores.items() if np.isinf(score)]:
        raise InputError(f"the score of {infinite[0]} is infinite; expected a number, or NaN for no score.")
    return scores


def _resampled(pool: PoolOfCounts, patients: int, observed: pd.Series, n_resamples: int, seed: int) -> pd.DataFrame:
    """Scores of all sources (columns) in each usable resample (rows), shifted so that each mean is the source's score.

    Every patient is drawn equally often over all resamples. So if the score is a mean over patients, the shift is 0.
    """
    drawn = np.random.default_rng(seed).permutation(np.tile(np.arange(patients), n_resamples))
    rows, refusal = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for draw in drawn.reshape(n_resamples, patients):
            try:
                rows.append(_called(pool, np.bincount(draw, minlength=patients)))
            except InputError as error:
                refusal = error
    if len(rows) < n_resamples / 2:
        raise InputError(f"only {len(rows)} of {n_resamples} resamples of the patients have scores: {refusal}")
    resampled = pd.DataFrame(rows, columns=observed.index, dtype=float)
    resampled.loc[:, observed.isna()] = np.nan
    resampled += observed - resampled.mean()
    # Rounding keeps equal scores equal, although the shifts differ in their last bits.
    unit = observed.abs().max() or 1.0
    return (resampled / unit).round(12) * unit


def _ranking_table(observed: pd.Series, resampled: pd.DataFrame) -> pd.DataFrame:
    observed = observed.sort_values(ascending=False, kind="stable")
    table = pd.DataFrame({"score": observed})
    table["rank"] = observed.rank(ascending=False, method="min", na_option="bottom").astype(int)
    table["gap"] = (observed.max() - observed) / ((observed.max() - observed.min()) or 1.0)
    if len(resampled):
        resampled, leader = resampled[observed.index], observed.index[0]
        ranks = resampled.rank(axis=1, ascending=False, na_option="bottom")
        first = ranks.eq(ranks.min(axis=1), axis=0)
        ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        table["low"], table["high"] = resampled.quantile(ends).to_numpy()
        table["rank_low"], table["rank_high"] = np.quantile(ranks, ends, axis=0, method="inverted_cdf")
        table["rank_mean"] = ranks.mean()
        table["p_best"] = first.div(first.sum(axis=1), axis=0).mean()
        table["leader_wins"] = np.heaviside(ranks.sub(ranks[leader], axis=0), 0.5).mean()
        table.loc[leader, "leader_wins"] = np.nan  # compared with itself
        table["undefined"] = resampled.isna().mean()
    return table.reindex(columns=COLUMNS)


def _preferred_text(scored: pd.DataFrame, metric: str, on_patients: str) -> str:
    leader, others = scored.iloc[0], scored.iloc[1:]
    wins = others["leader_wins"].min()
    return (
        f"Transfer from {scored.index[0]}: its {metric} of {_number(leader['score'])} ({100 * CONFIDENCE:g} % interval "
        f"{_number(leader['low'])} to {_number(leader['high'])}) is the highest of {len(scored)} sources on "
        f"{on_patients}. It is ahead of each of the others in "
        f"{'all' if wins == 1 else f'at least {_percent(wins)} of the'} patient resamples and by at least "
        f"{_percent(others['gap'].min())} of the candidates' range; the next is {_named(others[:1])}."
    )


def _undecided_text(
    scored: pd.DataFrame, tied: pd.DataFrame, first: Sequence[str], metric: str, on_patients: str, demanded: str
) -> str:
    rest = len(scored) - len(tied)
    text = f"No evidence to prefer: by {metric}, {_named(tied)} cannot be told apart on {on_patients}"
    text += f"; the other {'source is' if rest == 1 else f'{rest} sources are'} worse. " if rest else ". "
    if len(first) > 1:
        text += f"There is no best guess: {listed(first, 6)} have the same score."
    else:
        runner_up = scored.iloc[1]
        text += (
            f"The best guess is {tied.index[0]}, which has the highest {metric}: it is ahead of {runner_up.name} in "
            f"{_percent(runner_up['leader_wins'])} of the patient resamples and by {_percent(runner_up['gap'])} of the "
            f"candidates' range, where a preference takes {demanded}."
        )
    runs = f"Short fine-tunings of the {len(tied)}, finished and compared on validation patients"
    return f"{text} {runs}, would settle it."


def _remarks(table: pd.DataFrame, picks: pd.DataFrame, patients: int, refused: str) -> str:
    """Remarks that follow the verdict."""
    unscored = table.index[table["score"].isna()]
    text = f" No score: {listed(unscored, 6)}." if 0 < len(unscored) < len(table) else ""
    if len(table) - len(unscored) == 2 and patients >= MINIMUM_PATIENTS:
        text += (
            " With two scores the gap is always the whole range: only the bootstrap decides, which is over-confident."
        )
    if refused:
        text += f" {refused} resamples of the patients could not be scored."
    if len(picks) and len(table) > 1:
        names = {"random": "chance", "source_size": "source size", "static": "a static ranking"}
        said = [f"{names.get(row.baseline, row.baseline)} would pick {row.pick}" for row in picks.itertuples()]
        text += f" Without looking at the target, {listed(said)}."
    return f"{text} {ONLY_A_SCORE}"


def _named(scored: pd.DataFrame) -> str:
    return listed([f"{source} {_number(score)}" for source, score in scored["score"].items()], 6)


def _number(value: float) -> str:
    """Three decimals, or three significant digits for very small and very large numbers."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Whole per cents. 100 % is only written if the share is exactly 1."""
    return f"{min(100 * share, 99) if share < 1 else 100:.0f} %"
