"""Paired statistics over patients, and the verdict of a transfer audit.

The unit is the patient, not the slice. Slices of one patient are similar, and treating them as independent makes every
difference look certain. An arm consists of one training or several. With several, patients and trainings are crossed
random factors: a difference must hold for other patients and for other trainings. Transfer learning usually has few
validation patients. Three facts then decide how each statistic is used:

- A **bootstrap** of patients (and of trainings, if there are several) is over-confident. Its 95 % intervals contain the
  truth about 85-90 % of the time with 6 patients, and 67-86 % with 2 or 3 trainings that spread widely. It is shown
  (its intervals respect the range of Dice), but used only together with a test.
- **Wilcoxon's** smallest two-sided p is ``2 / 2 ** n``: 0.031 for 6 patients, and 0.094 after Holm's correction for
  three comparisons. With fewer than 7 patients it can never decide an audit of four arms. So it is only reported.
- The **paired t test** keeps its level with few patients and detects clear differences. So it decides. With several
  trainings it is the test of the crossed analysis of variance, with Satterthwaite's degrees of freedom, as for readers
  and cases in diagnostic studies. In a simulation (4 to 12 patients; 2 to 5 trainings with a spread of 0 to 0.06, where
  patients' differences have 0.05) its 95 % intervals contain the truth 89-98 % of the time. If trainings are averaged
  first, it is 41-96 %; with one training, 32-96 %.

With one training per arm the spread between trainings is unknown: the intervals are then over patients only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from medtl_ext._validation import InputError
from medtl_ext.ranking._words import SYNTHETIC, listed, number_of_patients

MINIMUM_PATIENTS = 4
"""With fewer validation patients there is no verdict: three differences have equal signs by chance in 25 % of cases."""
CONFIDENCE = 0.95
Scores = Mapping[str, float | Sequence[float]]
"""Subject -> value of an arm (a dict or a pandas Series), higher is better. For several trainings, one value each."""
COST = {"zero_shot": 0, "scratch": 1}
"""Order of costs: zero_shot needs no training, scratch needs no source, and all other arms need both."""
ADVICE = {
    "zero_shot": "Use the source as it is",
    "scratch": "Do not transfer this source, training from scratch is better",
}
GUESS = {"zero_shot": "using the source as it is (zero_shot)", "scratch": "training from scratch"}


def bootstrap_interval(values: ArrayLike, *, n_resamples: int = 9999) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % bootstrap interval of a mean over patients.

    Args:
        values: one number per patient, shape (n,).
        n_resamples: number of bootstrap samples. The seed is fixed: equal values give equal intervals.

    Returns:
        Lower and upper end. NaN for fewer than three values; zero width if all values are equal. With few patients the
        true coverage is lower (about .88 for n = 6).

    Raises:
        InputError: ``values`` is not one-dimensional, is empty, or is not finite.

    >>> low, high = bootstrap_interval([0.61, 0.55, 0.72, 0.64, 0.58, 0.70])
    >>> round(low, 2), round(high, 2)
    (0.59, 0.68)
    """
    values = _finite_vector("values", values)
    if len(values) < 3:
        return np.nan, np.nan
    if np.ptp(values) < 1e-12:
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=n_resamples, rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """Two arms compared on the same patients. Differences are first minus second: positive favours the first.

    Attributes:
        patients: number of patients.
        difference: mean difference.
        low, high: paired t interval of the difference over patients and trainings (NaN for one patient).
        p: two-sided paired t test.
        p_wilcoxon: two-sided Wilcoxon signed-rank test of the patients' means over trainings, exact for few patients. 1
            if all differences are 0.
        win: share of bootstraps (of patients, and of trainings if there are several) in which the first arm has the
            higher mean. Ties count half. NaN for fewer than three patients.
    """

    patients: int
    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    win: float


def paired_comparison(a: Scores, b: Scores, *, n_resamples: int = 9999) -> PairedComparison:
    """Compare two arms patient by patient, and training by training if there are several.

    Args:
        a, b: the same subjects in any order, with the same number of trainings, in the same order of seeds. One of the
            two may have a single value, such as a source that is not trained.
        n_resamples: number of bootstraps for ``win``.

    Raises:
        InputError: the subjects or the numbers of trainings differ, there is no subject, or a value is not finite.

    >>> full = {"p1": 0.62, "p2": 0.58, "p3": 0.71, "p4": 0.66}
    >>> scratch = {"p4": 0.60, "p3": 0.66, "p2": 0.55, "p1": 0.55}
    >>> result = paired_comparison(full, scratch)
    >>> print(f"{result.difference:.4f} ({result.low:.3f} to {result.high:.3f}), p {result.p:.3f}, win {result.win}")
    0.0525 (0.025 to 0.080), p 0.009, win 1.0
    >>> twice = {"p1": [0.62, 0.56], "p2": [0.58, 0.54], "p3": [0.71, 0.63], "p4": [0.66, 0.63]}
    >>> result = paired_comparison(twice, scratch)  # the second training is no better than scratch
    >>> print(f"{result.difference:.4f} ({result.low:.3f} to {result.high:.3f}), p {result.p:.3f}")
    0.0263 (-0.222 to 0.275), p 0.494
    """
    a, b = dict(a), dict(b)
    if unpaired := sorted(map(str, a.keys() ^ b.keys())):
        raise InputError(f"expected the same subjects on both sides; only one side has {listed(unpaired, 5)}.")
    first, second = (_patients_by_trainings("an arm of a comparison", [of[subject] for subject in a]) for of in (a, b))
    if len(counts := {first.shape[1], second.shape[1]} - {1}) > 1:
        raise InputError(f"expected as many trainings on both sides; found {listed(sorted(counts))}.")
    differences = np.round(first - second, 12)  # so that float noise does not break ties
    count, mean = len(differences), float(differences.mean())
    low = high = p = win = np.nan
    if count > 1 and np.ptp(differences) == 0:  # no variance, so no t test
        low, high, p = mean, mean, float(mean == 0)
    elif count > 1:
        error, freedom = _standard_error(differences)
        low, high = (float(end) for end in stats.t.interval(CONFIDENCE, freedom, mean, error))
        p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    if count > 2:
        win = float(np.heaviside(_resampled_means(differences, n_resamples), 0.5).mean())
    of_patients = differences.mean(axis=1)
    p_wilcoxon = float(stats.wilcoxon(of_patients).pvalue) if of_patients.any() else 1.0
    return PairedComparison(count, mean, low, high, p, p_wilcoxon, win)


def _standard_error(differences: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean over patients and trainings, both random, and its degrees of freedom."""
    patients, trainings = differences.shape
    between = differences.mean(axis=1).var(ddof=1) / patients
    if trainings == 1:
        return float(np.sqrt(between)), patients - 1
    again = differences.mean(axis=0).var(ddof=1) / trainings
    rest = differences - differences.mean(axis=1, keepdims=True) - differences.mean(axis=0) + differences.mean()
    cells = (patients - 1) * (trainings - 1)
    within = (rest**2).sum() / cells / differences.size  # both other terms contain it
    variance = max(between + again - within, between, again, within)
    parts = between**2 / (patients - 1) + again**2 / (trainings - 1) + within**2 / cells
    return float(np.sqrt(variance)), float(variance**2 / parts)


def _resampled_means(values: np.ndarray, n_resamples: int) -> np.ndarray:
    """Bootstrap of the mean: patients and trainings are drawn independently."""
    rng = np.random.default_rng(0)
    patients, trainings = (rng.multinomial(n, np.full(n, 1 / n), n_resamples) / n for n in values.shape)
    return np.round((patients @ values * trainings).sum(axis=1), 12)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), in the given order. NaN stays NaN and is not counted.

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
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """The outcome of `audit_verdict`.

    Attributes:
        recommendation: the arm with evidence that it is better than every other arm, or None.
        tied: the arms that cannot be told from the best, cheapest first. Only the best, if it is recommended.
        default: the recommendation, or else the best guess, even if it is weak.
        negative_transfer: fine-tuned arms that are worse than training from scratch, each in its own comparison.
        text: one paragraph in plain English.
        table: one row per arm, best first: ``arm, patients, trainings, mean, low, high`` (bootstrap interval of the
            mean), ``spread`` (standard deviation of the mean over trainings), ``difference, difference_low,
            difference_high`` (arm minus best, paired t interval), ``p, p_holm, p_wilcoxon``, and ``best_wins`` (share
            of bootstraps in which the best arm is ahead).
    """

    recommendation: str | None
    tied: tuple[str, ...]
    default: str
    negative_transfer: tuple[str, ...]
    text: str
    table: pd.DataFrame = field(compare=False, repr=False)


def audit_verdict(
    scores: Mapping[str, Scores],
    *,
    margin: float = 0.01,
    split: str = "validation",
    folds: int = 0,
    synthetic: bool = False,
    n_resamples: int = 9999,
) -> Verdict:
    """Say which arm of a transfer audit to use, if there is enough evidence.

    The arm with the highest mean is recommended if three conditions hold against **every** other arm: the Holm-adjusted
    p of the paired t test is below .05, it is ahead in at least 95 % of the bootstraps, and its mean is ahead by at
    least ``margin``. If a condition fails for an arm, this arm is tied with the best, and there is no evidence to
    prefer. The best guess is then the cheapest arm within ``margin`` of the highest mean (zero_shot, then scratch, then
    the others in the given order). With fewer than four patients there is only a guess, and the text says how weak it
    is. The winner must beat all others, so choosing the best of several arms does not inflate the error. With 6
    patients a wrong preference occurs in under 1 % of audits of four equal arms, and in 5 % if two arms tie at the top.

    Args:
        scores: arm -> subject -> value, higher is better (mean Dice over classes), or one value for each training of
            the arm; see `paired_comparison`. With one training, the text says that the spread between seeds is unknown.
            The arms ``zero_shot`` and ``scratch`` have a special meaning; all others are fine-tuned from the source.
        margin: smallest relevant difference of means, in units of the score.
        split: name of the patients' split in the text.
        folds: number of folds of a cross-validation, for the text; 0 without cross-validation.
        synthetic: the text says that the data are synthetic.
        n_resamples: number of bootstraps.

    Raises:
        InputError: fewer than two arms, arms with different subjects or numbers of trainings, or a value that is not
            finite.

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
    table = _audit_table(scores, n_resamples)
    arms = table.set_index("arm")
    patients = int(table["patients"][0])
    is_beaten = (arms["p_holm"] < 1 - CONFIDENCE) & (arms["best_wins"] >= CONFIDENCE) & (arms["difference"] <= -margin)
    by_cost = sorted(scores, key=lambda arm: COST.get(arm, 2))
    on_patients = number_of_patients(patients, split)
    recommendation, tied, harmed = None, tuple(by_cost), {}
    # All arms are already trained, so cost decides only between means that are practically equal.
    default = next(arm for arm in by_cost if arms["mean"].max() - arms.loc[arm, "mean"] <= margin)
    if patients < MINIMUM_PATIENTS:
        text = (
            f"{on_patients} cannot settle this: a verdict needs at least {MINIMUM_PATIENTS}, small differences more. "
        )
        text += f"Mean Dice was {_named(arms)}. {_weak_guess(scores, default)}"
    else:
        tied = tuple(arm for arm in by_cost if not is_beaten[arm])
        if len(tied) == 1:
            recommendation = default = arms.index[0]
            text = _preferred_text(arms, on_patients)
        else:
            worse = [arm for arm in scores if is_beaten[arm]]
            text = _undecided_text(arms, arms.loc[list(tied)], arms.loc[worse], default, on_patients, margin)
        if "scratch" in scores:  # a warning, so without correction for several comparisons
            tuned = [arm for arm in scores if arm not in COST]
            found = {arm: paired_comparison(scores["scratch"], scores[arm], n_resamples=n_resamples) for arm in tuned}
            harmed = {arm: comparison for arm, comparison in found.items() if comparison.low > 0}
    if harmed:
        gaps = [f"{arm} is worse than scratch by {_gap(c.difference, c.low, c.high)}" for arm, c in harmed.items()]
        text += f" {listed(gaps)}: negative transfer."
    runs = int(arms["trainings"].max())
    if folds:
        text += (
            f" Cross-validation in {folds} folds, {runs * folds} trainings per arm: none saw the patients it scored."
        )
    elif runs == 1:
        text += " One training run per arm: the spread between seeds is not in these figures, which are over patients."
    else:
        text += f" {runs} training runs per arm: intervals and tests are over patients and trainings."
    text += f" {SYNTHETIC}" * bool(synthetic)
    return Verdict(recommendation, tied, default, tuple(harmed), text, table)


def _finite_vector(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        found = listed(np.ravel(values[~np.isfinite(values)] if values.ndim == 1 else values).tolist(), 5) or "none"
        raise InputError(f"{name} must be finite numbers, one per patient and at least one; found {found}.")
    return values


def _patients_by_trainings(name: str, values: Sequence[float | Sequence[float]]) -> np.ndarray:
    """An arm's values, patients x trainings."""
    rows = [np.atleast_1d(value) for value in values]
    if len(counts := {len(row) for row in rows}) > 1:
        raise InputError(f"{name} has patients with {listed(sorted(counts))} trainings; score all by every training.")
    shape = (len(rows), *counts)
    return _finite_vector(name, np.concatenate(rows) if rows else []).reshape(shape)


def _audit_table(scores: Mapping[str, Scores], n_resamples: int) -> pd.DataFrame:
    """A row per arm, highest mean first; see `Verdict`."""
    values = {a: _patients_by_trainings(f"the scores of {a}", list(dict(of).values())) for a, of in scores.items()}
    best = max(values, key=lambda arm: values[arm].mean())
    records = []
    for arm, of in values.items():
        (patients, trainings), spread = of.shape, np.nan
        low, high = bootstrap_interval(of.mean(axis=1), n_resamples=n_resamples)
        if trainings > 1:
            spread = of.mean(axis=0).std(ddof=1)
            if patients > 2:
                low, high = np.quantile(_resampled_means(of, n_resamples), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
        record = {"arm": arm, "patients": patients, "trainings": trainings, "mean": of.mean(), "low": low, "high": high}
        record |= {"spread": spread, "difference": 0.0}
        if arm != best:
            found = paired_comparison(scores[best], scores[arm], n_resamples=n_resamples)
            record |= {"difference": -found.difference, "difference_low": -found.high, "difference_high": -found.low}
            record |= {"p": found.p, "p_holm": np.nan, "p_wilcoxon": found.p_wilcoxon, "best_wins": found.win}
        records.append(record)
    table = pd.DataFrame(records).sort_values("mean", ascending=False, kind="stable", ignore_index=True)
    return table.assign(p_holm=holm(table["p"]))


def _gap(difference: float, low: float, high: float, over: str = "") -> str:
    return f"{difference:.3f}{over} ({100 * CONFIDENCE:g} % interval {low:.3f} to {high:.3f})"


def _behind(arm: pd.Series, over: str = "") -> str:
    return _gap(-arm["difference"], -arm["difference_high"], -arm["difference_low"], over)


def _named(arms: pd.DataFrame) -> str:
    return listed([f"{arm} {mean:.3f}" for arm, mean in arms["mean"].items()])


def _weak_guess(scores: Mapping[str, Scores], guess: str) -> str:
    """The guess from too few patients, and how weak it is."""
    means = pd.DataFrame({arm: pd.Series(dict(of)).map(np.mean) for arm, of in scores.items()})
    gaps, count = means.drop(columns=guess).rsub(means[guess], axis=0), len(means)
    said = listed(f"of {arm} in {(gap > 0).sum()} of {count} ({gap.mean():+.3f})" for arm, gap in gaps.items())
    return (
        f"The best guess is {GUESS.get(guess, f'fine-tuning with {guess}')}, which is weak: it is ahead {said}. Of two "
        f"equal arms, one would be ahead in all {count} in {100 * 2 ** (1 - count):g} % of cases."
    )


def _preferred_text(arms: pd.DataFrame, on_patients: str) -> str:
    best, others = arms.index[0], arms.iloc[1:]
    lead = ADVICE.get(best, f"Fine-tune with {best}")
    gaps = [f"{arm} by {_behind(row)}" for arm, row in others.iterrows()]
    return f"{lead}: its mean Dice on {on_patients} is {arms['mean'].iloc[0]:.3f}, ahead of {listed(gaps)}."


def _undecided_text(
    arms: pd.DataFrame, tied: pd.DataFrame, worse: pd.DataFrame, default: str, on_patients: str, margin: float
) -> str:
    best, means = arms.index[0], arms["mean"]
    ranked = tied.sort_values("mean", ascending=False, kind="stable")
    others = tied.drop(best)
    small = ((others["difference"] > -margin) & (others["difference_high"] < 0)).all()
    said = f"differ by less than {margin:g}, which is not worth acting on," if small else "cannot be told apart"
    text = f"No evidence to prefer: {_named(ranked)} mean Dice {said} on {on_patients}"
    text += f"; {_named(worse)} {'is' if len(worse) == 1 else 'are'} worse. " if len(worse) else ". "
    text += f"The best guess is {GUESS.get(default, f'fine-tuning with {default}')}"
    if default != best:
        return f"{text}, which costs less: its mean is within {_behind(arms.loc[default], f' of {best}')}."
    text += ": no arm has a higher mean." if means.eq(means.max()).sum() > 1 else ", which has the highest mean."
    return text if means.any() else f"{text} Every mean is 0: no arm has found anything."


def late_gain(curve: pd.DataFrame) -> float:
    """Gain of the validation score in the last two fifths of a training; NaN without a validation before them.

    Args:
        curve: ``steps``, and the score as last column, as `medtl_ext.handlers.TrainingLength` writes it.

    >>> late_gain(pd.DataFrame({"steps": [200, 600, 1000], "dice": [0.5, 0.75, 1.0]}))
    0.25
    """
    steps, score = curve["steps"], curve.iloc[:, -1]
    before = score[steps <= 0.6 * steps.iloc[-1]]
    return float(score.iloc[-1] - before.iloc[-1]) if len(before) else float("nan")
