"""Paired statistics against scipy and hand counts, and the verdict's honesty by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

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
        low, high, reason = bootstrap_interval(values, seed=3)
        expected = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(3)).confidence_interval
        assert (low, high, reason) == (expected.low, expected.high, "")
        assert bootstrap_interval(values, seed=3) == (low, high, "")

    def test_lower_confidence_is_narrower(self):
        values = np.random.default_rng(0).random(9)
        wide, narrow = bootstrap_interval(values), bootstrap_interval(values, confidence=0.5)
        assert wide.low < narrow.low < values.mean() < narrow.high < wide.high

    @pytest.mark.parametrize("values", [[0.5], [0.5, 0.6]])
    def test_too_few_values_give_nan_and_a_reason(self, values):
        interval = bootstrap_interval(values)
        assert np.isnan(interval.low)
        assert np.isnan(interval.high)
        assert "too few" in interval.reason

    def test_equal_values_have_no_width(self):
        assert bootstrap_interval([0.4, 0.4, 0.4]) == (pytest.approx(0.4), pytest.approx(0.4), "all values are equal")

    @pytest.mark.parametrize("values", [[], [[0.1, 0.2]], [0.1, np.nan, 0.3]])
    def test_refuses_what_is_not_a_list_of_numbers(self, values):
        with pytest.raises(InputError, match="values"):
            bootstrap_interval(values)


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

    def test_wilcoxon_is_exact_for_six_patients(self):
        better = paired_comparison(scores([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), scores([0.4, 0.4, 0.4, 0.4, 0.4, 0.4]))
        assert better.p_wilcoxon == pytest.approx(2 / 2**6)
        assert better.win == 1

    def test_win_counts_the_bootstraps(self):
        """Two of three patients are ahead by 1, one behind by 3: the mean is positive when nobody draws the third."""
        result = paired_comparison(scores([1, 1, 0]), scores([0, 0, 3]), n_resamples=20000)
        assert result.win == pytest.approx((2 / 3) ** 3, abs=0.01)

    def test_no_difference(self):
        same = paired_comparison(scores([0.5, 0.6, 0.7]), scores([0.5, 0.6, 0.7]))
        assert (same.difference, same.low, same.high) == (0, 0, 0)
        assert (same.p, same.p_wilcoxon, same.win) == (1, 1, 0.5)

    def test_equal_differences_have_no_spread_despite_float_noise(self):
        result = paired_comparison(scores([0.3, 0.4, 0.8]), scores([0.2, 0.3, 0.7]))
        assert (result.low, result.high, result.p) == (pytest.approx(0.1), pytest.approx(0.1), 0)

    def test_one_patient_says_nothing(self):
        result = paired_comparison(scores([0.5]), scores([0.4]))
        assert np.isnan([result.low, result.high, result.p, result.win]).all()

    def test_refuses_different_patients_and_names_them(self):
        with pytest.raises(InputError, match="only one side has p2"):
            paired_comparison(scores([0.5, 0.6, 0.7]), scores([0.5, 0.6]))


class TestHolm:
    def test_by_hand(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_nan_passes_through_and_is_not_counted(self):
        assert holm([0.02, np.nan, 0.03]) == pytest.approx([0.04, np.nan, 0.04], nan_ok=True)

    def test_never_above_one_and_empty_is_fine(self):
        assert holm([0.8, 0.9]).tolist() == [1, 1]
        assert holm([]).size == 0

    def test_refuses_what_is_no_probability(self):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            holm([0.2, 1.2])


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
        assert verdict.recommendation == verdict.default == best
        assert verdict.tied == (best,)
        assert best not in verdict.negative_transfer
        assert verdict.text.startswith(words)
        assert "6 validation patients" in verdict.text
        assert "One training run per arm" in verdict.text
        assert "synthetic" not in verdict.text

    def test_tied_arms_name_the_cheapest_and_what_it_may_cost(self):
        verdict = audit_verdict(
            {"full": scores(self.HIGH), "scratch": scores(self.HIGH_TOO), "zero_shot": scores(self.LOW)}, synthetic=True
        )
        assert verdict.recommendation is None
        assert verdict.tied == ("scratch", "full")
        assert verdict.default == "scratch"
        assert "No evidence to prefer" in verdict.text
        assert "zero_shot 0.322 is worse" in verdict.text
        assert "synthetic" in verdict.text
        gap = paired_comparison(scores(self.HIGH), scores(self.HIGH_TOO))
        assert f"best guess is training from scratch, which costs less: its mean is within {gap.difference:.3f}" in (
            verdict.text
        )

    def test_a_tie_never_advises_a_clearly_lower_mean(self):
        noisy = [value + shift for value, shift in zip(self.HIGH, (-0.5, 0.3, -0.4, 0.2, -0.3, 0.1), strict=True)]
        verdict = audit_verdict({"full": scores(self.HIGH), "zero_shot": scores(noisy)})
        assert verdict.recommendation is None
        assert set(verdict.tied) == {"full", "zero_shot"}
        assert verdict.default == "full"
        assert "best guess is fine-tuning with full, which has the highest mean" in verdict.text

    def test_no_arm_wins_a_tie(self):
        nothing = {arm: scores([0.0] * 6) for arm in ("full", "scratch", "zero_shot")}
        text = audit_verdict(nothing).text
        assert "highest mean" not in text
        assert (
            audit_verdict({"full": scores(self.HIGH), "other": scores(self.HIGH)}).text.count(
                "no arm has a higher mean"
            )
            == 1
        )

    def test_a_certain_but_tiny_gap_is_no_reason(self):
        tiny = {"zero_shot": scores(self.HIGH), "full": scores(np.add(self.HIGH, 0.005))}
        assert audit_verdict(tiny).tied == ("zero_shot", "full")
        assert audit_verdict(tiny, margin=0.001).recommendation == "full"

    def test_says_negative_transfer_when_scratch_beats_a_fine_tuned_arm(self):
        arms = {"scratch": self.HIGH, "risk_map": self.LOW, "full": self.HIGH_TOO, "zero_shot": self.LOW}
        verdict = audit_verdict({arm: scores(values) for arm, values in arms.items()}, runs=3)
        assert verdict.negative_transfer == ("risk_map",)
        assert "risk_map is worse than scratch by 0.202 (95 % interval" in verdict.text
        assert "negative transfer" in verdict.text
        assert "One training run" not in verdict.text

    def test_three_patients_settle_nothing(self):
        verdict = audit_verdict({"scratch": scores([0.1, 0.1, 0.1]), "full": scores([0.9, 0.8, 0.9])})
        assert verdict.recommendation is verdict.default is None
        assert verdict.text.startswith("3 validation patients cannot settle this")
        assert verdict.negative_transfer == ()
        assert len(verdict.table) == 2

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

    def test_identical_arms_are_tied(self):
        verdict = audit_verdict({arm: scores(self.LOW) for arm in ("full", "scratch", "zero_shot")})
        assert verdict.tied == ("zero_shot", "scratch", "full")

    def test_refuses_one_arm_and_unpaired_patients(self):
        with pytest.raises(InputError, match="at least two arms"):
            audit_verdict({"full": scores(self.LOW)})
        with pytest.raises(InputError, match="same subjects"):
            audit_verdict({"full": scores(self.LOW), "scratch": scores(self.LOW[:5])})
        with pytest.raises(InputError, match="scores of full must be finite"):
            audit_verdict({"full": scores([np.nan, 1]), "scratch": scores([0.5, 1])})


def test_a_preference_between_equal_arms_is_rare():
    rng = np.random.default_rng(0)
    verdicts = [audit_verdict(simulated(rng, [0, 0, 0, 0]), n_resamples=300) for _ in range(200)]
    assert np.mean([verdict.recommendation is not None for verdict in verdicts]) < 0.05


def test_two_arms_tied_at_the_top_are_seldom_told_apart():
    rng = np.random.default_rng(1)
    verdicts = [audit_verdict(simulated(rng, [0.3, 0.3, 0, 0]), n_resamples=300) for _ in range(200)]
    assert np.mean([verdict.recommendation is not None for verdict in verdicts]) < 0.09  # nominal .05, three sd above


def test_a_large_gap_is_found():
    rng = np.random.default_rng(2)
    verdicts = [audit_verdict(simulated(rng, [0, 0.2, 0, 0]), n_resamples=300) for _ in range(100)]
    assert np.mean([verdict.recommendation == "arm1" for verdict in verdicts]) > 0.9
