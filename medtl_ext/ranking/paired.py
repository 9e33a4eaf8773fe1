"""Paired statistics over patients, and the verdict of a transfer audit.

The unit is the patient, never the slice: slices of one patient resemble each other, and counting them as independent
makes every difference look certain. With the handful of validation patients that transfer learning is made for, three
facts decide which statistic is asked for what:

- A patient **bootstrap** is over-confident: with 6 patients, 95 % intervals hold the truth about 85-90 % of the time.
  It is shown (intervals that respect the range of Dice), and used only together with a test.
- **Wilcoxon's** smallest two-sided p is ``2 / 2 ** n``: 0.031 for 6 patients, 0.094 after Holm's correction for three
  comparisons. With fewer than 7 patients it can never decide an audit of four arms, so it is reported, not relied on.
- The **paired t test** keeps its level with few patients and can still see a clear difference, so it decides.

None of this measures the spread between training seeds: with one run per arm, the intervals are about patients alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from medtl_ext._validation import InputError
from medtl_ext.ranking._words import listed

__all__ = [
    "Interval",
    "PairedComparison",
    "Verdict",
    "audit_verdict",
    "bootstrap_interval",
    "holm",
    "paired_comparison",
]

MINIMUM_PATIENTS = 4
"""With fewer validation patients no verdict is given: three differences agree in sign by chance once in four times."""


class Interval(NamedTuple):
    """Lower and upper end, and the reason where there is something to say (too few values, no spread)."""

    low: float
    high: float
    reason: str = ""


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of a mean over patients.

    Args:
        values: one number per patient, shape (n,).
        confidence: nominal coverage, in (0, 1). With few patients the true coverage is lower (about .88 at n = 6).
        n_resamples: bootstrap samples drawn.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        The interval; NaN at both ends with a reason below three values, of zero width with a reason when all are equal.

    Raises:
        InputError: ``values`` is not one-dimensional, empty or not finite.

    >>> low, high, reason = bootstrap_interval([0.61, 0.55, 0.72, 0.64, 0.58, 0.70])
    >>> round(low, 2), round(high, 2), reason
    (0.59, 0.68, '')
    >>> bootstrap_interval([0.5, 0.6]).reason
    '2 patients are too few for an interval'
    """
    values = _finite_vector("values", values)
    mean = float(values.mean())
    if len(values) < 3:
        count = "1 patient is" if len(values) == 1 else "2 patients are"
        return Interval(np.nan, np.nan, f"{count} too few for an interval")
    if np.ptp(values) < 1e-12:
        return Interval(mean, mean, "all values are equal")
    result = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=n_resamples, rng=np.random.default_rng(seed)
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


@dataclass(frozen=True)
class PairedComparison:
    """What the same patients say about two arms; differences are first minus second, so positive favours the first.

    Attributes:
        patients: number of patients.
        difference: mean difference.
        low, high: paired t interval of the difference (NaN for one patient).
        p: two-sided paired t test.
        p_wilcoxon: two-sided Wilcoxon signed-rank test, exact for few patients; 1 when no patient differs.
        win: share of patient bootstraps in which the first has the higher mean, ties counted half (NaN below three).
    """

    patients: int
    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    win: float


def paired_comparison(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
) -> PairedComparison:
    """Compare two arms patient by patient.

    Args:
        a, b: value per subject (a dict or a pandas Series), higher is better; the same subjects in any order.
        confidence: of the paired t interval.
        n_resamples, seed: of the patient bootstrap behind ``win``.

    Raises:
        InputError: the subjects differ, there are none, or a value is not finite.

    >>> full = {"p1": 0.62, "p2": 0.58, "p3": 0.71, "p4": 0.66}
    >>> scratch = {"p4": 0.60, "p3": 0.66, "p2": 0.55, "p1": 0.55}
    >>> result = paired_comparison(full, scratch)
    >>> print(f"{result.difference:.4f} ({result.low:.3f} to {result.high:.3f}), p {result.p:.3f}, win {result.win}")
    0.0525 (0.025 to 0.080), p 0.009, win 1.0
    """
    a, b = dict(a), dict(b)
    if unpaired := sorted(map(str, a.keys() ^ b.keys())):
        raise InputError(
            f"Paired comparison needs the same subjects on both sides; only one side has {', '.join(unpaired[:5])}"
            f"{' ...' if len(unpaired) > 5 else ''}. Evaluate both on the same split."
        )
    # Rounding removes the float noise that would otherwise break ties between equal differences.
    differences = np.round(np.array([float(a[subject]) - float(b[subject]) for subject in a]), 12)
    differences = _finite_vector("the paired differences", differences)
    mean, low, high, p = _paired_t(differences, confidence)
    return PairedComparison(
        patients=len(differences),
        difference=mean,
        low=low,
        high=high,
        p=p,
        p_wilcoxon=float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0,
        win=_win_probability(differences, n_resamples, seed),
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given; NaN passes through and is not counted.

    Args:
        p_values: raw p-values in [0, 1] or NaN, shape (n,).

    Raises:
        InputError: a p-value lies outside [0, 1].

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=float)
    if np.any((p_values < 0) | (p_values > 1)):
        raise InputError(f"p_values must lie in [0, 1]; found {np.nanmin(p_values):g} to {np.nanmax(p_values):g}.")
    adjusted = np.full_like(p_values, np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1)
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """The outcome of `audit_verdict`.

    Attributes:
        recommendation: the arm shown to be better than every other, or None.
        tied: the arms that cannot be told from the best, cheapest first (the best alone when it is recommended).
        default: the recommendation, else the best guess; None with too few patients.
        negative_transfer: fine-tuned arms that training from scratch beats on their own comparison.
        text: one paragraph in plain English.
        table: one row per arm, best first: ``arm, patients, mean, low, high`` (bootstrap interval of the mean),
            ``difference, difference_low, difference_high`` (arm minus best, paired t interval), ``p, p_holm,
            p_wilcoxon``, and ``best_wins`` (share of patient bootstraps in which the best arm is ahead).
    """

    recommendation: str | None
    tied: tuple[str, ...]
    default: str | None
    negative_transfer: tuple[str, ...]
    text: str
    table: pd.DataFrame = field(compare=False, repr=False)


def audit_verdict(
    scores: Mapping[str, Mapping[str, float]],
    *,
    margin: float = 0.01,
    confidence: float = 0.95,
    split: str = "validation",
    runs: int = 1,
    synthetic: bool = False,
    n_resamples: int = 9999,
    seed: int = 0,
) -> Verdict:
    """Say which arm of a transfer audit to use, if the patients can tell.

    The arm with the highest mean is recommended when, against **every** other arm, the Holm-adjusted paired t test is
    below ``1 - confidence``, it is ahead in at least ``confidence`` of the patient bootstraps, and its mean is ahead by
    at least ``margin``. Otherwise the arms that fail one of the three are tied with it, there is no evidence to prefer,
    and the best guess is the highest mean, or the cheapest arm within ``margin`` of it (zero_shot, then scratch, then
    the others in the order given).
    The winner has to beat all others, so choosing the best of several does not inflate the error: with 6 patients a
    wrong preference comes up in under 1 % of audits of four equal arms, and in 5 % when two arms tie at the top.

    Args:
        scores: arm -> subject -> value, higher is better (mean Dice over classes, averaged over runs). The arms
            ``zero_shot`` and ``scratch`` have a meaning of their own; all others count as fine-tuned from the source.
        margin: smallest difference in mean worth acting on, in units of the score.
        confidence: of all intervals, of the test and of the bootstrap.
        split: what the patients are called in the text.
        runs: training runs averaged per arm; with one, the text says that seeds were not looked at.
        synthetic: the text says that the data are synthetic.
        n_resamples, seed: of the patient bootstrap.

    Raises:
        InputError: fewer than two arms, arms with different subjects, or a value that is not finite.

    >>> patients = ["p1", "p2", "p3", "p4", "p5", "p6"]
    >>> verdict = audit_verdict({
    ...     "scratch": dict(zip(patients, [0.55, 0.50, 0.62, 0.58, 0.49, 0.60])),
    ...     "full": dict(zip(patients, [0.64, 0.60, 0.70, 0.69, 0.60, 0.68])),
    ... })
    >>> verdict.recommendation
    'full'
    >>> print(verdict.text)  # doctest: +ELLIPSIS
    Fine-tune with full: its mean Dice on 6 validation patients is 0.652, ahead of scratch by 0.095 (95 % interval ...
    """
    if len(scores) < 2:
        raise InputError(f"An audit compares at least two arms; found {', '.join(scores) or 'none'}.")
    scores = {arm: dict(values) for arm, values in scores.items()}
    means = {arm: _mean(f"the scores of {arm}", values) for arm, values in scores.items()}
    best = max(means, key=means.__getitem__)
    options = {"confidence": confidence, "n_resamples": n_resamples, "seed": seed}
    against = {arm: paired_comparison(scores[best], scores[arm], **options) for arm in scores if arm != best}
    table = _audit_table(scores, means, best, against, options)

    patients = len(scores[best])
    beaten = {
        arm
        for arm, p_holm in zip(table["arm"], table["p_holm"], strict=True)
        if arm != best
        and p_holm < 1 - confidence
        and against[arm].win >= confidence
        and against[arm].difference >= margin
    }
    by_cost = sorted(scores, key=_cost)
    tied = tuple(arm for arm in by_cost if arm not in beaten)
    harmed = _negative_transfer(scores, options) if patients >= MINIMUM_PATIENTS else {}

    words = _Words(means, against, best, patients, split, confidence)
    if patients < MINIMUM_PATIENTS:
        recommendation, default, tied = None, None, tuple(by_cost)
        sentences = [words.too_few()]
    elif len(tied) == 1:
        recommendation = default = best
        sentences = [words.recommended()]
    else:
        # All arms are trained by now, so cost decides only between means that are the same for all practical purposes.
        recommendation, default = None, next(arm for arm in by_cost if means[best] - means[arm] <= margin)
        sentences = [words.undecided(tied, default)]
    if harmed:
        sentences.append(words.negative_transfer(harmed))
    if runs == 1:
        sentences.append("One training run per arm: the spread between seeds is not in these figures.")
    if synthetic:
        sentences.append("These are synthetic data, which say nothing about a clinic.")
    return Verdict(recommendation, tied, default, tuple(harmed), " ".join(sentences), table)


def _finite_vector(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"{name} must be a list of at least one number, one per patient; found shape {values.shape}.")
    if not np.isfinite(values).all():
        raise InputError(f"{name} must be finite; {np.sum(~np.isfinite(values))} of {values.size} are NaN or infinite.")
    return values


def _mean(name: str, values: Mapping[str, float]) -> float:
    return float(_finite_vector(name, list(values.values())).mean())


def _paired_t(differences: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    """Mean, interval and p of a paired t test; without spread the interval has no width and the sign is certain."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, np.nan, np.nan, np.nan
    if np.ptp(differences) == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    test = stats.ttest_1samp(differences, 0)
    interval = test.confidence_interval(confidence)
    return mean, float(interval.low), float(interval.high), float(test.pvalue)


def _win_probability(differences: np.ndarray, n_resamples: int, seed: int) -> float:
    if len(differences) < 3:
        return np.nan
    if np.ptp(differences) == 0:
        return float(np.heaviside(differences[0], 0.5))
    means = stats.bootstrap(
        (differences,), np.mean, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(seed)
    ).bootstrap_distribution
    return float(np.heaviside(means, 0.5).mean())


def _cost(arm: str) -> int:
    """Nothing to train; nothing to obtain; a source to obtain and to train on."""
    return {"zero_shot": 0, "scratch": 1}.get(arm, 2)


def _audit_table(
    scores: Mapping[str, Mapping[str, float]],
    means: Mapping[str, float],
    best: str,
    against: Mapping[str, PairedComparison],
    options: Mapping[str, float],
) -> pd.DataFrame:
    records = []
    for arm in sorted(means, key=means.__getitem__, reverse=True):
        low, high, _ = bootstrap_interval(list(scores[arm].values()), **options)
        record = {"arm": arm, "patients": len(scores[arm]), "mean": means[arm], "low": low, "high": high}
        if arm == best:
            record |= {"difference": 0.0}
        else:
            other = against[arm]
            record |= {"difference": -other.difference, "difference_low": -other.high, "difference_high": -other.low}
            record |= {"p": other.p, "p_wilcoxon": other.p_wilcoxon, "best_wins": other.win}
        records.append(record)
    table = pd.DataFrame(records)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    return table


def _negative_transfer(
    scores: Mapping[str, Mapping[str, float]], options: Mapping[str, float]
) -> dict[str, PairedComparison]:
    """The fine-tuned arms that scratch beats, each on its own comparison: a warning is not corrected for the others."""
    if "scratch" not in scores:
        return {}
    tuned = [arm for arm in scores if _cost(arm) == 2]
    comparisons = {arm: paired_comparison(scores["scratch"], scores[arm], **options) for arm in tuned}
    return {arm: c for arm, c in comparisons.items() if c.difference > 0 and c.p < 1 - options["confidence"]}


@dataclass(frozen=True)
class _Words:
    """The sentences of a verdict."""

    means: Mapping[str, float]
    against: Mapping[str, PairedComparison]
    best: str
    patients: int
    split: str
    confidence: float

    def interval(self, low: float, high: float) -> str:
        return f"({100 * self.confidence:g} % interval {low:.3f} to {high:.3f})"

    def on_patients(self) -> str:
        return f"{self.patients} {self.split} patient{'s' if self.patients > 1 else ''}"

    def listed(self, arms: Sequence[str]) -> str:
        return listed([f"{arm} {self.means[arm]:.3f}" for arm in arms])

    def too_few(self) -> str:
        arms = sorted(self.means, key=self.means.__getitem__, reverse=True)
        return (
            f"{self.on_patients()} cannot settle this: a verdict needs at least {MINIMUM_PATIENTS}, a fine one more. "
            f"Mean Dice was {self.listed(arms)}."
        )

    def recommended(self) -> str:
        lead = {
            "zero_shot": "Use the source as it is",
            "scratch": "Do not transfer this source, training from scratch is better",
        }.get(self.best, f"Fine-tune with {self.best}")
        gaps = [
            f"{arm} by {c.difference:.3f} {self.interval(c.low, c.high)}"
            for arm, c in sorted(self.against.items(), key=lambda item: item[1].difference)
        ]
        return f"{lead}: its mean Dice on {self.on_patients()} is {self.means[self.best]:.3f}, ahead of {listed(gaps)}."

    def undecided(self, tied: Sequence[str], default: str) -> str:
        ranked = sorted(tied, key=self.means.__getitem__, reverse=True)
        worse = [arm for arm in self.means if arm not in tied]
        text = f"No evidence to prefer: {self.listed(ranked)} mean Dice cannot be told apart on {self.on_patients()}"
        text += f"; {self.listed(worse)} {'is' if len(worse) == 1 else 'are'} worse. " if worse else ". "
        does = {"zero_shot": "using the source as it is (zero_shot)", "scratch": "training from scratch"}.get(
            default, f"fine-tuning with {default}"
        )
        if default == self.best:
            shared = list(self.means.values()).count(self.means[self.best]) > 1
            nothing = " Every mean is 0: no arm has found anything." if not any(self.means.values()) else ""
            ahead = ": no arm has a higher mean." if shared else ", which has the highest mean."
            return f"{text}The best guess is {does}{ahead}{nothing}"
        gap = self.against[default]
        return text + (
            f"The best guess is {does}, which costs less: its mean is within {gap.difference:.3f} of {self.best} "
            f"{self.interval(gap.low, gap.high)}."
        )

    def negative_transfer(self, harmed: Mapping[str, PairedComparison]) -> str:
        gaps = [
            f"{arm} is worse than scratch by {c.difference:.3f} {self.interval(c.low, c.high)}"
            for arm, c in harmed.items()
        ]
        return f"{listed(gaps)}: negative transfer."
