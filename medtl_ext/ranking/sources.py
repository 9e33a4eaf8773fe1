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

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from tqdm import tqdm

from medtl_ext._validation import InputError
from medtl_ext.ranking._words import listed
from medtl_ext.ranking.paired import MINIMUM_PATIENTS

__all__ = ["SourceRanking", "baseline_rankings", "bootstrap_ranking"]

ScoreOfCounts = Callable[[np.ndarray], Any]
"""From how often each patient was drawn, an integer array, to one source's score."""
PoolOfCounts = Callable[[np.ndarray], Mapping[str, Any]]
"""The same for all sources at once: source -> score."""
BATCH = 100
"""Resamples handed at a time to functions that take several."""


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
    if not sources:
        raise InputError("sources is empty; expected the names of the candidates.")
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise InputError(f"sources names {twice[0]} twice; give every source its own name.")
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
    scores: PoolOfCounts | Mapping[str, ScoreOfCounts | Mapping[str, float] | ArrayLike],
    *,
    patients: int | None = None,
    batched: bool = False,
    baselines: pd.DataFrame | None = None,
    minimum_win: float = 0.95,
    minimum_gap: float = 0.15,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    metric: str = "score",
    synthetic: bool = False,
    progress: bool = False,
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
        batched: the functions take resamples x patients and give a score for each row, which is faster for
            ``lambda counts: scores.resampled(counts)["logme"]`` with a `medtl_ext.metrics.PatientScores`.
        baselines: what `baseline_rankings` returned, or any table of ranks with a row per source and a column per
            ranker; shown beside the ranking.
        minimum_win: share of resamples in which the leader must be ahead of another source to be preferred to it.
        minimum_gap: difference of their scores, as a share of the range of all scores, that it must have besides.
        confidence: of the intervals of score and rank.
        n_resamples: resamples of the patients.
        seed: of the resampling; the same scores and seed give the same result.
        metric: what the score is called in the text.
        synthetic: the text says that the data are synthetic.
        progress: show a progress bar on a terminal.

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
    _check_options(minimum_win, minimum_gap, confidence, n_resamples)
    pool, patients = _as_pool(scores, patients, batched)
    found = _called(pool, np.ones((1, patients), dtype=np.int64))
    if not found:
        raise InputError("scores returned no source; expected at least one candidate.")
    observed = pd.Series({source: score[0] for source, score in found.items()}, pd.Index(list(found), dtype=object))
    ranks = _checked_baselines(baselines, observed.index)
    if patients < 3:
        resampled = np.full((0, len(observed)), np.nan)
    else:
        draws = _balanced_draws(patients, n_resamples, seed)
        resampled = _resample(pool, draws, observed, BATCH if batched else 1, progress)
    table = _ranking_table(observed, resampled, ranks, confidence)

    scored = table[table["score"].notna()]
    first = _equal_to_first(scored["score"])
    behind = (scored["leader_wins"] >= minimum_win) & (scored["gap"] >= minimum_gap) & ~first
    tied = tuple(scored.loc[~behind, "source"])
    picks = _picks(table, ranks)
    words = _Words(table, picks, patients, confidence, minimum_win, minimum_gap, metric)
    recommendation, default = None, tied[0] if tied else None
    if not len(scored):
        sentences = [words.nothing()]
    elif len(scored) == 1:
        sentences = [words.alone()]
    elif patients < MINIMUM_PATIENTS:
        default, tied, sentences = None, tuple(scored["source"]), [words.too_few()]
    elif len(tied) == 1:
        recommendation, sentences = default, [words.recommended()]
    else:
        default = default if first.sum() == 1 else None  # the order of the list is no reason
        sentences = [words.undecided(tied, list(scored.loc[first, "source"]))]
    sentences += words.remarks(n_resamples - len(resampled) if len(resampled) else 0, n_resamples)
    if synthetic:
        sentences.append("These are synthetic data, which say nothing about a clinic.")
    text = " ".join(sentences)
    return SourceRanking(recommendation, tied, default, patients, len(resampled), text, table, picks)


def _equal_to_first(scores: pd.Series) -> pd.Series:
    """Which scores, best first, are equal to the first but for rounding."""
    if not len(scores):
        return pd.Series([], scores.index, bool)
    rounding = 1e-12 * np.abs(scores[np.isfinite(scores)]).max()
    return pd.Series(np.isclose(scores, scores.iloc[0], rtol=0, atol=rounding), scores.index, bool)


def _check_options(minimum_win: float, minimum_gap: float, confidence: float, n_resamples: int) -> None:
    # A win probability of one half or less would prefer the loser of a pair.
    if not 0.5 < minimum_win <= 1:
        raise InputError(f"minimum_win must lie above 0.5 and at most at 1; found {minimum_win:g}.")
    if not 0 <= minimum_gap <= 1:
        raise InputError(f"minimum_gap must lie in [0, 1]; found {minimum_gap:g}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1; found {confidence:g}.")
    if n_resamples < 1:
        raise InputError(f"n_resamples must be at least 1; found {n_resamples}.")


def mean_relative_rank(sources: Sequence[str], other_targets: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """Mean over the other targets of each source's rank there, from 0, the best, to 1; NaN where it is on none."""
    relative = []
    for values in other_targets.values():
        known = {source: float(values[source]) for source in sources if source in values}
        if len(known) > 1:  # a source alone on a target was compared with nothing
            ranks = stats.rankdata(_losing(np.array(list(known.values()))))
            relative.append(pd.Series((ranks - 1) / (len(known) - 1), list(known)))
    if not relative:
        return np.full(len(sources), np.nan)
    return pd.concat(relative, axis=1).reindex(sources).mean(axis=1).to_numpy()


def _as_pool(
    scores: PoolOfCounts | Mapping[str, ScoreOfCounts | Mapping[str, float] | ArrayLike],
    patients: int | None,
    batched: bool,
) -> tuple[PoolOfCounts, int]:
    """One function from resamples x patients to all scores, whatever form they came in, and the number of patients."""
    if callable(scores):
        patients = _checked_patients(patients, {})
        return scores if batched else lambda counts: _in_rows(scores(counts[0])), patients
    if not (scores := dict(scores)):
        raise InputError("scores holds no source; expected at least one candidate.")
    aligned = _aligned({source: dict(values) for source, values in scores.items() if hasattr(values, "keys")})
    functions, lengths = {}, {}
    for source, values in scores.items():
        if callable(values):
            functions[source] = values if batched else partial(_of_one, values)
            continue
        try:
            vector = np.asarray(aligned.get(source, values), dtype=float)
        except (TypeError, ValueError):
            found = type(values).__name__
            raise InputError(f"scores of {source} must be numbers or a function of counts; found {found}.") from None
        if vector.ndim != 1 or not vector.size:
            raise InputError(f"scores of {source} must be one number per patient; found shape {vector.shape}.")
        functions[source], lengths[source] = partial(_weighted_mean, vector), len(vector)
    patients = _checked_patients(patients, lengths)
    return lambda counts: {source: score(counts) for source, score in functions.items()}, patients


def _in_rows(scores: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {source: [score] for source, score in scores.items()}


def _of_one(score: ScoreOfCounts, counts: np.ndarray) -> list[Any]:
    return [score(counts[0])]


def _aligned(keyed: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """The values of each source in one order of patients, which does not depend on the order they came in."""
    aligned = {}
    for source, values in keyed.items():
        first = next(iter(keyed))
        if unpaired := sorted(map(str, values.keys() ^ keyed[first].keys())):
            raise InputError(
                f"scores of {source} and {first} are not of the same patients; only one has {listed(unpaired, 5)}. "
                "Score every source on the same patients."
            )
        aligned[source] = [values[patient] for patient in sorted(values, key=str)]
    return aligned


def _weighted_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ values / counts.sum(axis=-1)


def _checked_patients(patients: int | None, lengths: Mapping[str, int]) -> int:
    found = dict(lengths) if patients is None else {"patients": patients, **lengths}
    if not found:
        raise InputError("patients is needed where scores are functions: the number of patients they count.")
    if len(set(found.values())) > 1:
        counts = [f"{name} {count}" for name, count in found.items()]
        raise InputError(f"scores must be of the same patients; found the numbers {listed(counts, 5)}.")
    number = next(iter(found.values()))
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
        raise InputError(f"patients must be an integer of at least 1; found {number!r}.")
    return int(number)


def _called(pool: PoolOfCounts, counts: np.ndarray) -> dict[str, list[float]]:
    """Source -> score in each resample, checked."""
    scores = {}
    for source, values in pool(counts).items():
        scores[source] = [float(value) for value in values]
        if len(scores[source]) != len(counts):
            raise InputError(f"the function of {source} gave {len(scores[source])} scores for {len(counts)} resamples.")
        if any(map(math.isinf, scores[source])):
            raise InputError(f"the score of {source} is infinite; expected a number, or NaN where there is none.")
    return scores


def _balanced_draws(patients: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each patient (columns) is in each resample (rows); over all resamples every one equally often.

    The mean of a resampled mean is then exactly the mean, so that moving resampled scores to their score leaves it be.
    """
    drawn = np.random.default_rng(seed).permutation(np.tile(np.arange(patients), n_resamples))
    cells = np.repeat(np.arange(n_resamples), patients) * patients + drawn
    return np.bincount(cells, minlength=n_resamples * patients).reshape(n_resamples, patients)


def _resample(pool: PoolOfCounts, draws: np.ndarray, observed: pd.Series, batch: int, progress: bool) -> np.ndarray:
    """Scores of all sources (columns) in each usable resample (rows), each source's mean moved to its score."""
    resampled = _scored(pool, draws, observed.index, batch, progress)
    resampled[:, observed.isna()] = np.nan
    valid = np.isfinite(resampled)
    means = np.where(valid, resampled, 0).sum(axis=0) / np.maximum(valid.sum(axis=0), 1)
    resampled += observed.to_numpy() - means
    # Rounding keeps equal scores equal, which the last bit of the shift would tell apart.
    unit = observed.abs().max() if observed.any() else 1.0
    return np.round(resampled / unit, 12) * unit


def _scored(pool: PoolOfCounts, draws: np.ndarray, sources: pd.Index, batch: int, progress: bool) -> np.ndarray:
    rows, refusal = [], None
    waiting = deque(draws[start : start + batch] for start in range(0, len(draws), batch))
    bar = tqdm(desc="resampling patients", total=len(draws), unit="resample", disable=None if progress else True)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        while waiting:
            counts = waiting.popleft()
            try:
                scores = _called(pool, counts)
            except InputError as error:
                refusal = error
                if len(counts) > 1:  # which of them it was
                    waiting.extendleft(reversed(np.split(counts, len(counts))))
                    continue
            else:
                nothing = [np.nan] * len(counts)
                rows.append(np.column_stack([scores.get(source, nothing) for source in sources]))
            bar.update(len(counts))
    usable = sum(map(len, rows))
    if usable < len(draws) / 2:
        raise InputError(f"only {usable} of {len(draws)} resamples of the patients have scores: {refusal}")
    return np.concatenate(rows)


def _ranking_table(
    observed: pd.Series, resampled: np.ndarray, baselines: pd.DataFrame, confidence: float
) -> pd.DataFrame:
    order = np.argsort(_losing(observed.to_numpy()), kind="stable")
    score, resampled = observed.to_numpy()[order], resampled[:, order]
    table = pd.DataFrame({"source": observed.index[order], "score": score})
    # Half of what is left of the confidence, at either end.
    ends = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    ranks = stats.rankdata(_losing(resampled), axis=1) if len(resampled) else resampled
    table["low"], table["high"] = _quantiles(resampled, ends, "linear")
    table["rank"] = stats.rankdata(_losing(score), method="min").astype(int)
    table["rank_low"], table["rank_high"] = _quantiles(ranks, ends, "inverted_cdf")
    table["rank_mean"] = ranks.mean(axis=0) if len(ranks) else np.nan
    table["p_best"] = _share_of_first(resampled) if len(ranks) else np.nan
    ahead = np.heaviside(ranks - ranks[:, :1], 0.5)
    table["leader_wins"] = ahead.mean(axis=0) if len(ranks) else np.nan
    spread = np.ptp(score[np.isfinite(score)]) if np.isfinite(score[0]) else np.nan
    table["gap"] = (score[0] - score) / (spread or 1.0)
    table.loc[0, "leader_wins"] = np.nan  # against itself
    table["undefined"] = np.isnan(resampled).mean(axis=0) if len(ranks) else np.nan
    for name in baselines:
        table[f"{name}_rank"] = baselines.loc[table["source"], name].to_numpy()
    return table


def _losing(scores: np.ndarray) -> np.ndarray:
    """Turned so that the smallest is best, and no score is worst."""
    return np.where(np.isnan(scores), np.inf, -scores)


def _quantiles(values: np.ndarray, ends: np.ndarray, method: str) -> np.ndarray:
    """Of each column, over what is no NaN."""
    columns = [column[~np.isnan(column)] for column in values.T]
    return np.array([np.quantile(c, ends, method=method) if len(c) else [np.nan] * 2 for c in columns]).T


def _share_of_first(resampled: np.ndarray) -> np.ndarray:
    losing = _losing(resampled)
    first = losing == losing.min(axis=1, keepdims=True)
    return (first / first.sum(axis=1, keepdims=True)).mean(axis=0)


def _checked_baselines(baselines: pd.DataFrame | None, sources: pd.Index) -> pd.DataFrame:
    if baselines is None:
        return pd.DataFrame(index=sources)
    baselines = pd.DataFrame(baselines).reindex(sources)
    if (unranked := baselines.isna().any(axis=1)).any():
        missing = [str(source) for source in sources[unranked]]
        raise InputError(f"baselines has no rank for {listed(missing, 5)}; give it the same sources as scores.")
    return baselines


def _picks(table: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    chosen = [baselines[name].idxmin() for name in baselines]
    rows = table.set_index("source").loc[chosen, ["score", "rank", "leader_wins", "gap"]].reset_index(names="pick")
    rows.insert(0, "baseline", list(baselines))
    return rows


@dataclass(frozen=True)
class _Words:
    """The sentences of a verdict."""

    table: pd.DataFrame
    picks: pd.DataFrame
    patients: int
    confidence: float
    minimum_win: float
    minimum_gap: float
    metric: str

    @property
    def scored(self) -> pd.DataFrame:
        return self.table[self.table["score"].notna()]

    def on_patients(self) -> str:
        return f"{self.patients} target patient{'s' if self.patients > 1 else ''}"

    def named(self, sources: Sequence[str]) -> str:
        scores = self.table.set_index("source")["score"]
        return listed([f"{source} {_number(scores[source])}" for source in sources], 6)

    def nothing(self) -> str:
        return f"No verdict: no source has a score ({self.metric}) on {self.on_patients()}."

    def alone(self) -> str:
        pool = "the only candidate" if len(self.table) == 1 else "the only candidate with a score"
        return (
            f"{self.named([self.scored['source'].iloc[0]])} is {pool}: by {self.metric} there is nothing to compare it "
            "with, and no evidence to prefer it."
        )

    def too_few(self) -> str:
        return (
            f"{self.on_patients()} cannot settle this: a verdict needs at least {MINIMUM_PATIENTS}. "
            f"By {self.metric} the order was {self.named(self.scored['source'])}."
        )

    def recommended(self) -> str:
        leader, others = self.scored.iloc[0], self.scored.iloc[1:]
        wins = others["leader_wins"].min()
        return (
            f"Transfer from {leader['source']}: its {self.metric} of {_number(leader['score'])} "
            f"({100 * self.confidence:g} % interval {_number(leader['low'])} to {_number(leader['high'])}) is the "
            f"highest of {len(self.scored)} sources on {self.on_patients()}. It is ahead of each of the others in "
            f"{'all' if wins == 1 else f'at least {_percent(wins)} of the'} patient resamples and by at least "
            f"{_percent(others['gap'].min())} of the candidates' range; the next is {self.named(others['source'][:1])}."
        )

    def undecided(self, tied: Sequence[str], first: Sequence[str]) -> str:
        next_one = self.scored.iloc[1]
        rest = len(self.scored) - len(tied)
        text = f"No evidence to prefer: by {self.metric}, {self.named(tied)} cannot be told apart "
        text += f"on {self.on_patients()}"
        text += f"; the other {'source is' if rest == 1 else f'{rest} sources are'} worse. " if rest else ". "
        settle = (
            f" Short fine-tunings of the {len(tied)}, finished and compared on validation patients, would settle it."
        )
        if len(first) > 1:
            return f"{text}There is no best guess: {listed(first, 6)} have the same score.{settle}"
        return text + (
            f"The best guess is {tied[0]}, which has the highest {self.metric}: it is ahead of {next_one['source']} in "
            f"{_percent(next_one['leader_wins'])} of the patient resamples and by {_percent(next_one['gap'])} of the "
            f"candidates' range, where a preference takes {_percent(self.minimum_win)} and "
            f"{_percent(self.minimum_gap)}.{settle}"
        )

    def remarks(self, refused: int, n_resamples: int) -> list[str]:
        """What has to be known besides the verdict."""
        remarks = []
        unscored = self.table.loc[self.table["score"].isna(), "source"]
        if len(unscored) and len(self.scored):
            remarks.append(f"No score: {listed(list(unscored), 6)}.")
        if len(self.scored) == 2 and self.patients >= MINIMUM_PATIENTS:
            remarks.append(
                "With two scores the gap is all of the range and checks nothing: the bootstrap alone, which is "
                "over-confident, decides."
            )
        if refused:
            remarks.append(f"{refused} of {n_resamples} resamples of the patients could not be scored.")
        if len(self.picks) and len(self.table) > 1:
            names = {"random": "chance", "source_size": "source size", "static": "a static ranking"}
            said = [f"{names.get(row.baseline, row.baseline)} would pick {row.pick}" for row in self.picks.itertuples()]
            remarks.append(f"Without looking at the target, {listed(said)}.")
        remarks.append("None of this says that a transfer beats training from scratch.")
        return remarks


def _number(value: float) -> str:
    """Three decimals, or three digits where that would hide the number."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    """Whole per cents, rounded towards the middle: 100 % is said only of what never failed."""
    return f"{min(100 * share, 99) if share < 1 else 100:.0f} %"
