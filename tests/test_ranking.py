"""Paired statistics compared with SciPy and with hand calculations, and error rates of the verdict by simulation."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from medtl_ext import InputError
from medtl_ext.ranking import audit_verdict, bootstrap_interval, holm, paired_comparison

PATIENTS = [f"p{i}" for i in range(6)]


def scores(values):
    return dict(zip(PATIENTS[: len(values)], values, strict=True))


def simulated(rng, effects, patients=6, spread=0.05):
    """Arms that share each patient's difficulty and differ by their effect and by noise."""
    difficulty = rng.normal(0.5, 0.1, patients)
    return {
        f"arm{k}": {f"p{i}": value for i, value in enumerate(difficulty + effect + rng.normal(0, spread, patients))}
        for k, effect in enumerate(effects)
    }


class TestBootstrapInterval:
    def test_is_scipys_interval_and_reproducible(self):
        values = np.random.default_rng(0).random(9)
        expected = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        assert bootstrap_interval(values) == (expected.low, expected.high)
        assert bootstrap_interval(values) == bootstrap_interval(list(values))

    @pytest.mark.parametrize(("values", "end"), [([0.5], np.nan), ([0.5, 0.6], np.nan), ([0.4, 0.4, 0.4], 0.4)])
    def test_too_few_values_have_no_interval_and_equal_ones_no_width(self, values, end):
        assert bootstrap_interval(values) == (pytest.approx(end, nan_ok=True), pytest.approx(end, nan_ok=True))


class TestPairedComparison:
    def test_agrees_with_scipy_whatever_the_order_of_subjects(self):
        rng = np.random.default_rng(1)
        a, b = rng.random(6), rng.random(6)
        shuffled = dict(reversed(scores(b).items()))
        result = paired_comparison(scores(a), shuffled)
        test = stats.ttest_rel(a, b)
        assert result.patients == 6
        assert result.difference == pytest.approx((a - b).mean())
        assert (result.low, result.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert result.p == pytest.approx(test.pvalue)
        assert result.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)

    def test_win_counts_the_bootstraps(self):
        """Two of three patients are ahead by 1, one behind by 3: the mean is positive when nobody draws the third."""
        result = paired_comparison(scores([1, 1, 0]), scores([0, 0, 3]), n_resamples=20000)
        assert result.win == pytest.approx((2 / 3) ** 3, abs=0.01)

    def test_equal_differences_have_no_spread_despite_float_noise(self):
        a, b = scores([0.3, 0.4, 0.8]), scores([0.2, 0.3, 0.7])
        same, better = paired_comparison(a, a), paired_comparison(a, b)
        assert (same.difference, same.low, same.high, same.p, same.p_wilcoxon, same.win) == (0, 0, 0, 1, 1, 0.5)
        assert (better.low, better.high, better.p, better.win) == (pytest.approx(0.1), pytest.approx(0.1), 0, 1)

    def test_one_patient_says_nothing(self):
        result = paired_comparison(scores([0.5]), scores([0.4]))
        assert np.isnan([result.low, result.high, result.p, result.win]).all()


class TestHolm:
    @pytest.mark.parametrize(
        ("p_values", "adjusted"),
        [
            ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
            ([0.02, np.nan, 0.03], [0.04, np.nan, 0.04]),  # NaN passes through and is not counted
            ([0.8, 0.9], [1, 1]),
            ([], []),
        ],
    )
    def test_by_hand(self, p_values, adjusted):
        assert holm(p_values) == pytest.approx(adjusted, nan_ok=True)


class TestAuditVerdict:
    LOW = (0.30, 0.36, 0.25, 0.41, 0.33, 0.28)
    HIGH = (0.50, 0.54, 0.47, 0.62, 0.52, 0.49)
    HIGH_TOO = (0.52, 0.52, 0.48, 0.60, 0.53, 0.48)

    @pytest.mark.parametrize(
        ("best", "words"),
        [
            ("zero_shot", "Use the source as it is"),
            ("scratch", "Do not transfer this source"),
            ("full", "Fine-tune with full"),
            ("risk_map", "Fine-tune with risk_map"),
        ],
    )
    def test_recommends_a_clear_winner_in_words(self, best, words):
        rng = np.random.default_rng(0)
        arms = {arm: scores(self.LOW + rng.normal(0, 0.01, 6)) for arm in ("zero_shot", "scratch", "full", "risk_map")}
        verdict = audit_verdict(arms | {best: scores(self.HIGH)})
        assert (verdict.recommendation, verdict.default, verdict.tied) == (best, best, (best,))
        assert best not in verdict.negative_transfer
        assert verdict.text.startswith(words)
        assert "6 validation patients" in verdict.text
        assert "One training run per arm" in verdict.text
        assert "synthetic" not in verdict.text

    def test_tied_arms_name_the_cheapest_and_what_it_may_cost(self):
        arms = {"full": self.HIGH, "scratch": self.HIGH_TOO, "zero_shot": self.LOW, "other": self.LOW}
        verdict = audit_verdict({arm: scores(values) for arm, values in arms.items()}, synthetic=True)
        assert (verdict.recommendation, verdict.default, verdict.tied) == (None, "scratch", ("scratch", "full"))
        gap = paired_comparison(scores(self.HIGH), scores(self.HIGH_TOO))
        assert verdict.text.startswith(
            "No evidence to prefer: full 0.523 and scratch 0.522 mean Dice cannot be told apart on 6 validation "
            "patients; zero_shot 0.322 and other 0.322 are worse. The best guess is training from scratch, which costs "
            f"less: its mean is within {gap.difference:.3f} of full (95 % interval {gap.low:.3f} to {gap.high:.3f}). "
        )
        assert verdict.text.endswith("These are synthetic data, which say nothing about a clinic.")

    def test_a_tie_never_advises_a_clearly_lower_mean(self):
        noisy = [value + shift for value, shift in zip(self.HIGH, (-0.5, 0.3, -0.4, 0.2, -0.3, 0.1), strict=True)]
        verdict = audit_verdict({"full": scores(self.HIGH), "zero_shot": scores(noisy)})
        assert (verdict.recommendation, verdict.default, verdict.tied) == (None, "full", ("zero_shot", "full"))
        assert "best guess is fine-tuning with full, which has the highest mean" in verdict.text

    def test_no_arm_wins_a_tie(self):
        nothing = audit_verdict({arm: scores([0.0] * 6) for arm in ("full", "scratch", "zero_shot")})
        assert nothing.tied == ("zero_shot", "scratch", "full")
        assert "highest mean" not in nothing.text
        equal = audit_verdict({"full": scores(self.HIGH), "other": scores(self.HIGH)})
        assert "no arm has a higher mean. One" in equal.text
        all_zero = audit_verdict({"full": scores([0.0] * 6), "other": scores([0.0] * 6)})
        assert "no arm has a higher mean. Every mean is 0: no arm has found anything. One" in all_zero.text

    def test_a_certain_but_tiny_gap_is_no_reason(self):
        tiny = {"zero_shot": scores(self.HIGH), "full": scores(np.add(self.HIGH, 0.005))}
        assert audit_verdict(tiny).tied == ("zero_shot", "full")
        assert audit_verdict(tiny, margin=0.001).recommendation == "full"
        assert "differ by less than 0.01, which is not worth acting on, on " in audit_verdict(tiny).text

    def test_says_negative_transfer_when_scratch_beats_a_fine_tuned_arm(self):
        arms = {"scratch": self.HIGH, "risk_map": self.LOW, "full": self.HIGH_TOO, "zero_shot": self.LOW}
        verdict = audit_verdict({arm: scores([[value] * 3 for value in values]) for arm, values in arms.items()})
        assert verdict.negative_transfer == ("risk_map",)
        assert "risk_map is worse than scratch by 0.202 (95 % interval" in verdict.text
        assert "negative transfer" in verdict.text
        assert "3 training runs per arm: intervals and tests are over patients and trainings." in verdict.text
        assert "One training run" not in verdict.text

    def test_three_patients_settle_nothing_and_give_a_weak_guess(self):
        verdict = audit_verdict({"scratch": scores([0.1, 0.1, 0.1]), "full": scores([0.9, 0.8, 0.0])})
        assert (verdict.recommendation, verdict.default, verdict.negative_transfer) == (None, "full", ())
        assert verdict.text.startswith("3 validation patients cannot settle this: a verdict needs at least 4, small")
        assert "Mean Dice was full 0.567 and scratch 0.100. The best guess is fine-tuning with full" in verdict.text
        assert "which is weak: it is ahead of scratch in 2 of 3 (+0.467). Of two equal arms, one would" in verdict.text
        assert "in 25 % of cases" in verdict.text
        one = audit_verdict({"scratch": scores([0.5]), "full": scores([0.4]), "zero_shot": scores([0.495])})
        assert one.default == "zero_shot"
        assert "ahead of scratch in 0 of 1 (-0.005) and of full in 1 of 1 (+0.095)" in one.text
        assert len(verdict.table) == 2

    def test_a_lead_that_another_training_turns_round_is_no_evidence(self):
        """The second training of full fails, so the lead of the first is no evidence."""
        arms = {"full": [[value, value - 0.3] for value in self.HIGH], "scratch": [[v, v + 0.01] for v in self.LOW]}
        once = audit_verdict({arm: scores([of[0] for of in values]) for arm, values in arms.items()})
        twice = audit_verdict({arm: scores(values) for arm, values in arms.items()})
        assert (once.recommendation, twice.recommendation) == ("full", None)
        table = twice.table.set_index("arm")
        assert table["trainings"].tolist() == [2, 2]
        assert table["spread"].to_dict() == pytest.approx({"full": 0.3 / 2**0.5, "scratch": 0.01 / 2**0.5})
        assert table.loc["full", "low"] < np.mean(self.HIGH) - 0.3 + 0.05

    def test_table_holds_the_numbers(self):
        arms = {"full": scores(self.HIGH), "scratch": scores(self.HIGH_TOO), "zero_shot": scores(self.LOW)}
        table = audit_verdict(arms).table.set_index("arm")
        assert list(table.index) == ["full", "scratch", "zero_shot"]
        gap = paired_comparison(arms["full"], arms["zero_shot"])
        row = table.loc["zero_shot"]
        assert row["mean"] == pytest.approx(np.mean(self.LOW))
        assert row["difference"] == pytest.approx(-gap.difference)
        assert (row["difference_low"], row["difference_high"]) == pytest.approx((-gap.high, -gap.low))
        assert (row["low"], row["high"]) == bootstrap_interval(self.LOW)[:2]
        assert table["p_holm"].tolist() == pytest.approx(holm(table["p"]), nan_ok=True)
        assert row["best_wins"] == 1
        assert np.isnan(table.loc["full", "p"])


@pytest.mark.parametrize(
    ("effects", "audits", "preferred", "share"),
    [
        ([0, 0, 0, 0], 200, None, 0.95),  # equal arms are seldom told apart
        ([0.3, 0.3, 0, 0], 200, None, 0.91),  # nor two at the top: nominal .95, three sd below
        ([0, 0.2, 0, 0], 100, "arm1", 0.9),  # a large gap is found
    ],
)
def test_verdicts_are_as_honest_as_they_sound(effects, audits, preferred, share):
    rng = np.random.default_rng(0)
    verdicts = [audit_verdict(simulated(rng, effects), n_resamples=300) for _ in range(audits)]
    assert np.mean([verdict.recommendation == preferred for verdict in verdicts]) > share


def test_several_trainings_are_compared_by_the_mean_squares_of_the_crossed_design():
    """Patients x trainings, both random: statsmodels' analysis of variance, Satterthwaite's degrees of freedom."""
    rng, (n, k) = np.random.default_rng(3), (7, 3)
    values = 0.02 + rng.normal(0, 0.05, (n, 1)) + rng.normal(0, 0.04, (1, k)) + rng.normal(0, 0.02, (n, k))
    cells = pd.DataFrame([(p, t, values[p, t]) for p in range(n) for t in range(k)], columns=["p", "t", "y"])
    table = anova_lm(ols("y ~ C(p) + C(t)", cells).fit())
    squares, free = table["mean_sq"].to_numpy(), table["df"].to_numpy()
    variance = (squares[0] + squares[1] - squares[2]) / (n * k)
    freedom = variance**2 / ((squares / (n * k)) ** 2 / free).sum()
    found = paired_comparison({f"p{p}": values[p] for p in range(n)}, {f"p{p}": [0.0] * k for p in range(n)})
    expected = stats.t.interval(0.95, freedom, values.mean(), variance**0.5)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(values.mean()) / variance**0.5, freedom))


@pytest.mark.parametrize(("trainings", "patients", "spread"), [(2, 6, 0.05), (3, 6, 0.06), (5, 12, 0.04)])
def test_an_interval_over_patients_and_trainings_holds_the_truth(trainings, patients, spread):
    """Both arms are equal; their trainings spread as real ones do. Averaging the trainings first is over-confident."""
    rng, names = np.random.default_rng(0), [f"p{i}" for i in range(patients)]
    covered = []
    for _ in range(300):
        arms = rng.normal(0, 0.05, (2, patients, 1)) + rng.normal(0, spread, (2, 1, trainings))
        arms += rng.normal(0, 0.03, arms.shape)
        both = [
            paired_comparison(*(dict(zip(names, arm, strict=True)) for arm in pair), n_resamples=1)
            for pair in (arms, arms.mean(axis=2))
        ]
        covered.append([found.low <= 0 <= found.high for found in both])
    crossed, averaged = np.mean(covered, axis=0)
    assert crossed >= 0.92
    assert averaged < 0.89


def of_arms(**arms):
    return audit_verdict({arm: scores(values) for arm, values in arms.items()})


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        *((partial(bootstrap_interval, wrong), "values") for wrong in ([], [[0.1, 0.2]], [0.1, np.nan, 0.3])),
        (lambda: paired_comparison(scores([0.5, 0.6, 0.7]), scores([0.5, 0.6])), "only one side has p2"),
        (partial(holm, [0.2, 1.2]), r"\[0, 1\]"),
        (partial(of_arms, full=[0.5] * 6), "at least two arms; found full"),
        (partial(of_arms, full=[0.5] * 6, scratch=[0.5] * 5), "same subjects on both sides; only one side has p5"),
        (partial(of_arms, full=[[0.5, 0.6]] * 6, scratch=[[0.5] * 3] * 6), "as many trainings on .* found 2 and 3"),
        (partial(of_arms, full=[[0.5, 0.6], [0.5]], scratch=[0.5, 1]), "full has patients with 1 and 2 trainings"),
        (partial(of_arms, full=[np.nan, 1], scratch=[0.5, 1]), "scores of full must be finite"),
        (partial(of_arms, full=[], scratch=[]), "scores of full must be finite numbers, .* at least one; found none"),
    ],
)
def test_what_makes_no_sense_is_refused(ask, message):
    with pytest.raises(InputError, match=message):
        ask()
