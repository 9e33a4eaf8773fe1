"""Candidate sources ranked for one target, with a patient bootstrap, baseline rankers, and a verdict.

A transferability score is computed from the target's patients, so another handful of patients would have given another
ranking. `bootstrap_ranking` draws patients with replacement, the **same** draw for all sources, and ranks them anew.
The draws are balanced: over all of them every patient comes up equally often.

- Resamples hold patients twice, which inflates scores that grow as independent samples get fewer (H-score, LogME): the
  more features, the more. Each source's resampled scores are therefore moved so that their mean is its score. In
  simulated pairs of sources with 8 and 24 features this took wrong calls (win probability .95 or more for the worse
  source) from 20 % to 9 % with 6 patients and from 8 % to 3 % with 12. A mean over patients is left as it is.
- Even so a bootstrap over patients is over-confident: it knows nothing of what the score does not measure. In a study
  of 16 brain segmentation sources it called 9 of 10 leaders, and fine-tuning bore out 4. The gap between two scores as
  a share of the range of all candidates told right from wrong better: the order of pairs closer than .05 was chance,
  that of pairs .15 to .3 apart right in 70 %, of pairs more than .6 apart in 90 %. So a source is preferred only when
  **both** its win probability and its gap are large.
- Literature and measurements agree that source size or a fixed "good source" is a hard baseline for many scores:
  `baseline_rankings` puts what they would have picked beside every ranking.
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
from medtl_ext.ranking._words import SYNTHETIC, listed, number_of_patients
from medtl_ext.ranking.paired import CONFIDENCE, MINIMUM_PATIENTS

ScoreOfCounts = Callable[[np.ndarray], Any]
"""From how often each patient was drawn, an integer array, to one source's score."""
PoolOfCounts = Callable[[np.ndarray], Mapping[str, Any]]
"""The same for all sources at once: source -> score."""
Scores = PoolOfCounts | Mapping[str, ScoreOfCounts | Mapping[str, float] | ArrayLike]
COLUMNS = ["score", "low", "high", "rank", "rank_low", "rank_high", "rank_mean"]
COLUMNS += ["p_best", "leader_wins", "gap", "undefined"]


@dataclass(frozen=True)
class SourceRanking:
    """The outcome of `bootstrap_ranking`.

    Attributes:
        recommendation: the source there is evidence to prefer, or None.
        tied: the sources that cannot be told from the leader, which comes first (the leader alone when recommended):
            the ones worth a short fine-tuning.
        default: the recommendation, else the best guess; None with too few patients, without any score, or where
            several have the highest.
        patients: number of patients.
        resamples: number of resamples behind the intervals; 0 with fewer than 3 patients.
        text: one paragraph in plain English.
        table: one row per source, best first: ``source, score, low, high`` (bootstrap interval), ``rank`` (1 is best,
            equal scores share it), ``rank_low, rank_high, rank_mean`` over resamples, ``p_best`` (share of resamples
            in which it ranks first, shared among equals), ``leader_wins`` (share in which the leader is ahead of it,
            ties counted half), ``gap`` (leader's score minus its own over the range of all scores), ``undefined``
            (share of resamples without a score), and ``<baseline>_rank`` for each baseline.
        baselines: one row per baseline: ``baseline, pick``, and that source's ``score, rank, leader_wins, gap``.
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
    """How rankers that never look at the target would order the sources.

    Args:
        sources: names of the candidates.
        sizes: source -> its number of training subjects, largest first; NaN where it is not known, which comes last.
        other_targets: other target -> source -> what the source gave there (Dice after fine-tuning, or a score),
            higher is better. The static ranker sorts by the mean of a source's relative ranks, 0 for the best to 1 for
            the worst candidate of each target; a source on no other target comes last. Leave the target itself out.
        seed: of the random ranker, which also orders sources that are equal for the others.

    Returns:
        A row per source and a column per ranker, ``random``, and ``source_size`` and ``static`` where their input is
        given: the rank, 1 for the source it would pick. What a random choice is *expected* to give, rather than what
        one draw gives, follows from constant scores in `spearman_footrule`.

    Raises:
        InputError: no source, one named twice, or one without a size.

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
    shuffled = np.random.default_rng(seed).permutation(sorted(sources))  # sorted: the order of the list decides nothing
    chance = pd.Series(np.arange(len(sources)), shuffled)[sources].to_numpy()
    costs = {"random": chance}
    if sizes is not None:
        if missing := [source for source in sources if source not in sizes]:
            raise InputError(f"sizes has no entry for {listed(missing, 5)}; give NaN where the size is not known.")
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
    """Rank the candidate sources of one target, say how sure that is, and which one to prefer if any.

    Args:
        scores: higher is better, in one of three forms. Source -> one value per patient, whose mean is the score: a
            list in one order of patients, or patient -> value (a DataFrame of patients by sources will do). Or source
            -> function of the counts, an integer array saying how often each patient was drawn. Or one function of the
            counts that returns source -> score, for scores that depend on the whole pool (a mean of ranks, LP times
            FU, NCTI). NaN is no score: the source ranks last, and is never preferred nor tied.
        patients: number of patients; needed only when ``scores`` holds nothing but functions. They must all count the
            patients in one order.
        baselines: what `baseline_rankings` returned, or any table of ranks with a row per source and a column per
            ranker; shown beside the ranking.
        minimum_win: share of resamples in which the leader must be ahead of another source to be preferred to it.
        minimum_gap: difference of their scores, as a share of the range of all scores, that it must have besides.
        n_resamples: resamples of the patients.
        seed: of the resampling; the same scores and seed give the same result.
        metric: what the score is called in the text.
        synthetic: the text says that the data are synthetic.

    Returns:
        The ranking. A source is recommended when against every other scored one it wins at least ``minimum_win`` of
        the resamples **and** leads by at least ``minimum_gap``. There is no verdict with fewer than 4 patients, with
        one source, or with one scored source, and there are no intervals (NaN) with fewer than 3 patients. With two
        sources the gap is the whole range and checks nothing, and the text says so: one of two sources that differ by
        noise only is preferred about one time in five, one of four in 5 %, one of eight in 1 %.
        Resamples that a function refuses with an `InputError` (say, all of their patients lack the region) are left
        out for all sources; warnings about single resamples are not shown.

    Raises:
        InputError: no source, patients that differ between sources, a score that is infinite, ``patients`` missing,
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
    # A win probability of one half or less would prefer the loser of a pair.
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
    first = scored["score"] >= scored["score"].max() - 1e-12 * scored["score"].abs().max()  # equal but for rounding
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
        default = tied[0] if first.sum() == 1 else None  # the order of the list is no reason
        demanded = f"{_percent(minimum_win)} and {_percent(minimum_gap)}"
        text = _undecided_text(scored, alike, scored.index[first], metric, on_patients, demanded)
    refused = len(resampled) and n_resamples - len(resampled)
    text += _remarks(table, picks, patients, f"{refused} of {n_resamples}" if refused else "")
    text += SYNTHETIC[bool(synthetic)]
    table = table.join(ranks.add_suffix("_rank")).rename_axis("source").reset_index()
    return SourceRanking(recommendation, tied, default, patients, len(resampled), text, table, picks)


def mean_relative_rank(sources: Sequence[str], other_targets: Mapping[str, Mapping[str, float]]) -> pd.Series:
    """Mean over the other targets of each source's rank there, from 0, the best, to 1; NaN where it is on none."""
    relative = []
    for values in other_targets.values():
        known = pd.Series({source: float(values[source]) for source in sources if source in values}, dtype=float)
        if len(known) > 1:  # a source alone on a target was compared with nothing
            relative.append((known.rank(ascending=False, na_option="bottom") - 1) / (len(known) - 1))
    return pd.DataFrame(relative).reindex(columns=sources).mean().astype(float).round(9)


def _as_pool(scores: Scores, patients: int | None) -> tuple[PoolOfCounts, int]:
    """One function of the counts to all scores, whatever form they came in, and the number of patients."""
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
        functions[source] = partial(np.average, vector, None)  # by weight
    count = int(require_number("patients", patients, 1, whole=True))
    return lambda counts: {source: score(counts) for source, score in functions.items()}, count


def _per_patient(source: str, values: Mapping[str, float] | ArrayLike) -> pd.Series:
    """The values in an order of patients that does not depend on the order they came in."""
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
        raise InputError(f"the score of {infinite[0]} is infinite; expected a number, or NaN where there is none.")
    return scores


def _resampled(pool: PoolOfCounts, patients: int, observed: pd.Series, n_resamples: int, seed: int) -> pd.DataFrame:
    """Scores of all sources (columns) in each usable resample (rows), each source's mean moved to its score.

    Over all resamples every patient is drawn equally often: the mean of a resampled mean is then exactly the mean, so
    that moving resampled scores to their score leaves it be.
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
    # Rounding keeps equal scores equal, which the last bit of the shift would tell apart.
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
        # Half of what is left of the confidence, at either end.
        ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        table["low"], table["high"] = resampled.quantile(ends).to_numpy()
        table["rank_low"], table["rank_high"] = np.quantile(ranks, ends, axis=0, method="inverted_cdf")
        table["rank_mean"] = ranks.mean()
        table["p_best"] = first.div(first.sum(axis=1), axis=0).mean()
        table["leader_wins"] = np.heaviside(ranks.sub(ranks[leader], axis=0), 0.5).mean()
        table.loc[leader, "leader_wins"] = np.nan  # against itself
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
    """What has to be known besides the verdict."""
    unscored = table.index[table["score"].isna()]
    text = f" No score: {listed(unscored, 6)}." if 0 < len(unscored) < len(table) else ""
    if len(table) - len(unscored) == 2 and patients >= MINIMUM_PATIENTS:
        text += " With two scores the gap is all of the range and checks nothing: "
        text += "the bootstrap alone, which is over-confident, decides."
    if refused:
        text += f" {refused} resamples of the patients could not be scored."
    if len(picks) and len(table) > 1:
        names = {"random": "chance", "source_size": "source size", "static": "a static ranking"}
        said = [f"{names.get(row.baseline, row.baseline)} would pick {row.pick}" for row in picks.itertuples()]
        text += f" Without looking at the target, {listed(said)}."
    return f"{text} None of this says that a transfer beats training from scratch."


def _named(scored: pd.DataFrame) -> str:
    return listed([f"{source} {_number(score)}" for source, score in scored["score"].items()], 6)


def _number(value: float) -> str:
    """Three decimals, or three digits where that would hide the number."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Whole per cents, rounded towards the middle: 100 % is said only of what never failed."""
    return f"{min(100 * share, 99) if share < 1 else 100:.0f} %"
