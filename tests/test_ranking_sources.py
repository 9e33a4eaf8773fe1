"""Patient bootstrap of a source ranking compared with all possible resamples, its verdict, and baseline rankers."""

import warnings
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from medtl_ext import InputError
from medtl_ext.ranking import baseline_rankings, bootstrap_ranking
from medtl_ext.ranking._words import ONLY_A_SCORE

RNG = np.random.default_rng(0)
DIFFICULTY = RNG.normal(0, 0.1, 10)
NOISE = RNG.normal(0, 0.01, (5, 10))


def source(mean, index=0, patients=10):
    """A source of the given level whose patients share their difficulty with the others."""
    values = DIFFICULTY + NOISE[index]
    return (mean + values - values[:patients].mean())[:patients]


SIZES = {"a": 30, "b": 50, "c": np.nan, "d": 10}
CLEAR = {"a": source(0.3, 0), "b": source(0.8, 1), "c": source(0.5, 2), "d": source(0.1, 3)}
CLOSE = {"a": source(0.795, 0), "b": source(0.8, 1), "c": source(0.5, 2), "d": source(0.1, 3)}


def row(result, name):
    return result.table.set_index("source").loc[name]


def mean_of(values, counts):
    """What a metric's ``resampled`` returns: a tensor without dimensions."""
    return torch.tensor(float(np.average(values, weights=counts)), dtype=torch.float64)


class TestBootstrap:
    def test_equals_the_count_of_all_resamples(self):
        """For four patients there are 4 ** 4 resamples, so exact shares can be computed."""
        scores = {"a": [0.3, 0.9, 0.2, 0.8], "b": [0.6, 0.5, 0.4, 0.65], "c": [0.4, 0.4, 0.5, 0.3]}
        result = bootstrap_ranking(scores, n_resamples=20000)
        assert result.table["source"].tolist() == ["a", "b", "c"]
        values = np.array(list(scores.values()))
        means = np.array([values[:, list(draw)].mean(axis=1) for draw in product(range(4), repeat=4)]).round(12)
        first = means == means.max(axis=1, keepdims=True)
        exact = {
            "score": values.mean(axis=1),
            "p_best": (first / first.sum(axis=1, keepdims=True)).mean(axis=0),
            "rank_mean": stats.rankdata(-means, axis=1).mean(axis=0),
            "low": np.quantile(means, 0.025, axis=0),
            "high": np.quantile(means, 0.975, axis=0),
            "leader_wins": [np.nan, *np.heaviside(means[:, :1] - means[:, 1:], 0.5).mean(axis=0)],
        }
        for column, expected in exact.items():
            assert result.table[column].to_numpy() == pytest.approx(expected, abs=0.015, nan_ok=True), column

    def test_three_forms_of_input_agree(self):
        vectors = bootstrap_ranking(CLOSE)
        functions = {name: partial(mean_of, values) for name, values in CLOSE.items()}
        others = [
            bootstrap_ranking(functions, patients=10),
            bootstrap_ranking(lambda counts: {name: of(counts) for name, of in functions.items()}, patients=10),
            bootstrap_ranking(pd.DataFrame(CLOSE, index=[f"p{i}" for i in range(10)])),
            bootstrap_ranking({**CLOSE, "c": functions["c"]}),
        ]
        for other in others:
            pd.testing.assert_frame_equal(other.table, vectors.table)
            assert other == vectors

    def test_patients_are_paired_by_name_whatever_the_order(self):
        patients = [f"p{i}" for i in range(10)]
        keyed = {name: dict(zip(patients, values, strict=True)) for name, values in CLOSE.items()}
        shuffled = {name: dict(sorted(v.items(), key=lambda item: item[1])) for name, v in reversed(keyed.items())}
        pd.testing.assert_frame_equal(bootstrap_ranking(shuffled).table, bootstrap_ranking(keyed).table)

    def test_every_source_gets_the_same_balanced_counts(self):
        seen = {"a": [], "b": []}

        def score(name, counts):
            seen[name].append(counts.tolist())
            return float(counts[0])

        bootstrap_ranking({name: partial(score, name) for name in seen}, patients=5, n_resamples=20)
        assert seen["a"] == seen["b"]
        everybody, *draws = seen["a"]
        assert everybody == [1] * 5
        assert [sum(counts) for counts in draws] == [5] * 20  # and no score is computed twice
        assert np.sum(draws, axis=0).tolist() == [20] * 5  # every patient as often as any other
        assert all(isinstance(count, int) for counts in draws for count in counts)

    def test_a_score_inflated_by_repeated_patients_is_moved_back(self):
        """A score that grows as fewer patients differ must not push a worse source to the top."""

        def inflated(level, strength, counts):
            return level + strength * (np.square(counts).mean() - 1) + 0.001 * counts[0]

        scores = {"steady": partial(inflated, 0.6, 0.0), "inflated": partial(inflated, 0.5, 0.3)}
        result = bootstrap_ranking(scores, patients=12)
        table = result.table.set_index("source")
        assert (table["low"] < table["score"]).all()
        assert (table["score"] < table["high"]).all()
        assert table.loc["inflated", "leader_wins"] > 0.8

    def test_seed_decides_and_inputs_are_left_alone(self):
        values = {name: vector.copy() for name, vector in CLOSE.items()}
        first, again, other = (bootstrap_ranking(values, seed=seed).table for seed in (0, 0, 1))
        pd.testing.assert_frame_equal(first, again)
        assert not first.equals(other)
        assert all(np.array_equal(values[name], CLOSE[name]) for name in CLOSE)

    @pytest.mark.parametrize("scale", [1e-8, 1e8])
    def test_scale_and_shift_change_nothing_but_the_scores(self, scale):
        moved = bootstrap_ranking({name: scale * (values - 3) for name, values in CLOSE.items()}).table
        moved[["score", "low", "high"]] = moved[["score", "low", "high"]] / scale + 3
        pd.testing.assert_frame_equal(moved, bootstrap_ranking(CLOSE).table)

    def test_equal_sources_share_everything(self):
        result = bootstrap_ranking({"a": CLOSE["a"], "b": CLOSE["a"].copy(), "c": CLOSE["a"].copy()})
        assert result.table["p_best"].tolist() == pytest.approx([1 / 3] * 3)
        for column, expected in {"rank": [1, 1, 1], "rank_mean": [2, 2, 2], "gap": [0, 0, 0]}.items():
            assert result.table[column].tolist() == expected
        assert result.table["leader_wins"].tolist()[1:] == [0.5, 0.5]
        assert (result.recommendation, result.tied) == (None, ("a", "b", "c"))

    def test_no_spread_and_zero_scores(self):
        result = bootstrap_ranking({"a": np.zeros(6), "b": np.full(6, -0.5)})
        assert result.table[["low", "high"]].to_numpy().tolist() == [[0, 0], [-0.5, -0.5]]
        assert result.recommendation == "a"


class TestScoresThatAreNot:
    def test_a_source_without_score_is_last_and_never_tied(self):
        result = bootstrap_ranking({"none": [np.nan] * 10, **CLEAR, "hole": [np.nan, *CLEAR["a"][1:]]})
        assert (result.recommendation, result.tied) == ("b", ("b",))
        assert result.table["source"].tolist()[-2:] == ["none", "hole"]
        assert result.table["rank"].tolist() == [1, 2, 3, 4, 5, 5]
        last = row(result, "none")
        assert last[["score", "low", "high", "gap"]].isna().all()
        assert last[["p_best", "rank_low", "leader_wins", "undefined"]].tolist() == [0, 5.5, 1, 1]
        assert "No score: none and hole." in result.text
        assert row(result, "d")["gap"] == pytest.approx(1)

    def test_undefined_resamples_rank_last_and_are_counted(self):
        def without_first(counts):
            return 0.9 + 0.01 * counts[1] if counts[0] else np.nan

        result = bootstrap_ranking({"shaky": without_first, "firm": lambda counts: 0.5}, patients=6, n_resamples=4000)
        missing = (5 / 6) ** 6
        shaky = row(result, "shaky")
        assert shaky["undefined"] == pytest.approx(missing, abs=0.03)
        assert shaky["p_best"] == pytest.approx(1 - missing, abs=0.03)
        assert row(result, "firm")["leader_wins"] == pytest.approx(1 - missing, abs=0.03)
        assert np.isfinite([shaky["low"], shaky["high"]]).all()
        assert result.recommendation is None

    def test_refused_resamples_are_left_out_for_all_and_said(self):
        def picky(counts):
            if not counts[0]:
                raise InputError("no label")
            return 0.9

        result = bootstrap_ranking({"picky": picky, "firm": lambda counts: 0.5}, patients=6)
        assert 600 < result.resamples < 730
        assert f"{1000 - result.resamples} of 1000 resamples of the patients could not be scored." in result.text
        assert result.table["undefined"].tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("fails", "message"),
        [
            (lambda counts: (counts == 0).any(), "resamples of the patients have scores: patient p3 lacks a label"),
            (lambda counts: True, "^patient p3 lacks a label"),  # in the full data
        ],
    )
    def test_mostly_refused_is_an_error_that_says_why(self, fails, message):
        def hopeless(counts):
            if fails(counts):
                raise InputError("patient p3 lacks a label")
            return 1.0

        with pytest.raises(InputError, match=message):
            bootstrap_ranking({"a": hopeless, "b": hopeless}, patients=5, n_resamples=50)

    def test_only_the_full_data_warn(self):
        def warns(counts):
            warnings.warn(f"one label only, {counts.max()}", UserWarning, stacklevel=2)
            return float(counts[0])

        with pytest.warns(UserWarning, match="one label only") as caught:
            bootstrap_ranking({"a": warns, "b": warns}, patients=5, n_resamples=30)
        assert {str(warning.message) for warning in caught} == {"one label only, 1"}

    def test_no_source_has_a_score(self):
        result = bootstrap_ranking({"a": [np.nan] * 6, "b": [np.nan] * 6}, metric="PARC")
        assert (result.recommendation, result.default, result.tied) == (None, None, ())
        assert result.text.startswith("No verdict: no source has a score (PARC) on 6 target patients. This is about")
        assert result.table["rank"].tolist() == [1, 1]


class TestVerdict:
    def test_prefers_a_clear_leader(self):
        result = bootstrap_ranking(CLEAR, metric="H-score")
        assert (result.recommendation, result.default, result.tied) == ("b", "b", ("b",))
        assert row(result, "c")["gap"] == pytest.approx((0.8 - 0.5) / (0.8 - 0.1))
        best = row(result, "b")
        assert result.text.startswith(
            f"Transfer from b: its H-score of 0.800 (95 % interval {best['low']:.3f} to {best['high']:.3f}) is the "
            "highest of 4 sources on 10 target patients. It is ahead of each of the others in all patient resamples "
            "and by at least 43 % of the candidates' range; the next is c 0.500."
        )
        assert result.text.endswith(ONLY_A_SCORE)

    @pytest.mark.parametrize(
        ("values", "lowest_win", "highest_win", "gap", "enough"),
        [
            (CLEAR["b"] - 0.05, 1, 1, 0.05 / 0.7, {"minimum_gap": 0.05}),  # certain but close
            (CLEAR["b"] - 0.2 + [-2, 2] * 5, 0.55, 0.94, 0.2 / 0.7, {"minimum_win": 0.55}),  # far but uncertain
        ],
    )
    def test_a_preference_takes_wins_and_a_gap(self, values, lowest_win, highest_win, gap, enough):
        result = bootstrap_ranking({**CLEAR, "a": values})
        assert lowest_win <= row(result, "a")["leader_wins"] <= highest_win
        assert row(result, "a")["gap"] == pytest.approx(gap)
        assert (result.recommendation, result.default, result.tied) == (None, "b", ("b", "a"))
        assert bootstrap_ranking({**CLEAR, "a": values}, **enough).recommendation == "b"

    @pytest.mark.parametrize("names", ["abc", "bac", "cba"])
    @pytest.mark.parametrize("minimum_gap", [0, 0.15])
    def test_equal_leaders_are_no_best_guess(self, names, minimum_gap):
        """The order of the list does not matter."""
        values = {"a": [0.5] * 40, "b": [0.5] * 40, "c": source(0.1, 0, 10).tolist() * 4}
        result = bootstrap_ranking({name: values[name] for name in names}, minimum_gap=minimum_gap)
        assert result.recommendation is result.default is None
        assert sorted(result.tied) == ["a", "b"]
        first = [name for name in names if name != "c"]
        assert f"There is no best guess: {first[0]} and {first[1]} have the same score." in result.text
        assert "Short fine-tunings of the 2" in result.text

    def test_a_score_that_loses_most_resamples_is_not_behind_its_equal(self):
        values = {"a": [0.0] * 200, "b": [-199.0] + [1.0] * 199}
        for names in ("ab", "ba"):
            result = bootstrap_ranking({n: values[n] for n in names}, minimum_win=0.6, minimum_gap=0, n_resamples=400)
            assert (result.recommendation, result.default, sorted(result.tied)) == (None, None, ["a", "b"])

    def test_text_of_a_tie_offers_to_settle_it(self):
        result = bootstrap_ranking(CLOSE, metric="LEEP", synthetic=True)
        wins = row(result, "a")["leader_wins"]
        assert result.text.startswith(
            "No evidence to prefer: by LEEP, b 0.800 and a 0.795 cannot be told apart on 10 target patients; the other "
            "2 sources are worse. The best guess is b, which has the highest LEEP: it is ahead of a in "
            f"{min(100 * wins, 99):.0f} % of the patient resamples and by 1 % of the candidates' range, where a "
            "preference takes 95 % and 15 %. Short fine-tunings of the 2, finished and compared on validation "
            "patients, would settle it."
        )
        assert result.text.endswith("These are synthetic data, which say nothing about a clinic.")

    @pytest.mark.parametrize(("patients", "word"), [(1, "1 target patient "), (3, "3 target patients ")])
    def test_few_patients_settle_nothing(self, patients, word):
        result = bootstrap_ranking({name: values[:patients] for name, values in CLEAR.items()}, metric="GBC")
        assert result.recommendation is result.default is None
        assert set(result.tied) == set(CLEAR)
        assert result.text.startswith(f"{word}cannot settle this: a verdict needs at least 4. By GBC the order was b ")
        assert result.table["source"].tolist() == list("bcad")
        assert result.table["rank"].tolist() == [1, 2, 3, 4]
        assert result.table["gap"].iloc[[0, 3]].tolist() == [0, 1]
        columns = ["low", "high", "rank_low", "rank_high", "rank_mean", "p_best", "leader_wins", "undefined"]
        assert result.table[columns].isna().all(axis=None) == (patients < 3)
        assert result.resamples == (0 if patients < 3 else 1000)

    def test_four_patients_are_enough(self):
        assert bootstrap_ranking({name: values[:4] for name, values in CLEAR.items()}).recommendation == "b"

    def test_a_pool_of_one_is_no_choice(self):
        result = bootstrap_ranking({"only": CLEAR["a"]}, metric="LogME", baselines=baseline_rankings(["only"]))
        assert (result.recommendation, result.default, result.tied) == (None, "only", ("only",))
        assert result.text == (
            "only 0.300 is the only candidate: by LogME there is nothing to compare it with, and no evidence to prefer "
            f"it. {ONLY_A_SCORE}"
        )
        assert row(result, "only")["low"] < 0.3 < row(result, "only")["high"]
        result = bootstrap_ranking({"a": [np.nan] * 10, "b": CLEAR["b"]})
        assert (result.recommendation, result.default, result.tied) == (None, "b", ("b",))
        assert result.text.startswith("b 0.800 is the only candidate with a score: by score there")
        assert "No score: a." in result.text

    def test_two_sources_are_told_that_the_gap_checks_nothing(self):
        result = bootstrap_ranking({"a": CLEAR["a"], "b": CLEAR["b"]})
        assert result.recommendation == "b"
        assert row(result, "a")["gap"] == 1
        assert "With two scores the gap is always the whole range" in result.text
        assert "With two scores" not in bootstrap_ranking(CLEAR).text

    def test_a_long_tie_is_cut_short_and_small_numbers_stay_visible_in_the_text(self):
        noise = np.random.default_rng(0).normal(0, 1, (12, 6))
        result = bootstrap_ranking({f"s{i}": values - values.mean() + i / 100 for i, values in enumerate(noise)})
        assert len(result.tied) == 12
        assert "and 6 more cannot be told apart" in result.text
        assert "its score of 8e-07" in bootstrap_ranking({name: 1e-6 * values for name, values in CLEAR.items()}).text

    def test_no_true_difference_is_seldom_a_preference(self):
        """For 8 sources that differ by noise only, a preference is rare."""
        rng = np.random.default_rng(1)
        draws = [{f"s{i}": values for i, values in enumerate(rng.normal(0, 1, (8, 10)))} for _ in range(60)]
        called = [bootstrap_ranking(scores, n_resamples=200).recommendation for scores in draws]
        assert np.mean([name is not None for name in called]) < 0.08


class TestBaselines:
    def test_source_size_and_the_mean_relative_rank_elsewhere(self):
        others = {
            "t1": {"a": 0.9, "b": 0.5, "c": 0.7},  # relative ranks 0, 1, .5
            "t2": {"a": 0.1, "b": 0.2, "c": 0.9, "x": 1.0},  # 1, .5, 0; x is no candidate
            "t3": {"b": np.nan, "c": 0.3},  # 1, 0
            "t4": {"b": 9.0},  # compared with nothing
        }
        ranks = baseline_rankings(list("abcd"), sizes=SIZES, other_targets=others)
        assert ranks["source_size"].to_dict() == {"a": 2, "b": 1, "c": 4, "d": 3}  # unknown last
        assert ranks["static"].to_dict() == {"c": 1, "a": 2, "b": 3, "d": 4}

    def test_columns_are_orders_whatever_ties(self):
        ranks = baseline_rankings(list("abcd"), sizes=dict.fromkeys("abcd", 5), other_targets={})
        assert list(ranks) == ["random", "source_size", "static"]
        for name in ranks:
            assert sorted(ranks[name]) == [1, 2, 3, 4]
        assert (ranks["source_size"] == ranks["random"]).all()  # equal sources stand in the random order

    def test_random_is_seeded_fair_and_blind_to_the_order_of_the_list(self):
        assert baseline_rankings(list("abcd"), seed=3).equals(baseline_rankings(list("dcba"), seed=3).loc[list("abcd")])
        firsts = [baseline_rankings(list("abcd"), seed=seed)["random"].idxmin() for seed in range(400)]
        counts = pd.Series(firsts).value_counts()
        assert stats.chisquare(counts.reindex(list("abcd"), fill_value=0)).pvalue > 0.01

    def test_beside_a_ranking(self):
        others = {"t1": {"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.1}}
        baselines = baseline_rankings(list("abcd"), sizes=SIZES, other_targets=others, seed=1)
        result = bootstrap_ranking(CLEAR, baselines=baselines)
        table = result.table.set_index("source")
        assert table["source_size_rank"].to_dict() == baselines["source_size"].to_dict()
        picks = result.baselines.set_index("baseline")
        assert picks["pick"].to_dict() == {"random": baselines["random"].idxmin(), "source_size": "b", "static": "a"}
        static = picks.loc["static", ["score", "rank", "leader_wins", "gap"]].astype(float)
        assert static.tolist() == pytest.approx([0.3, 3, 1, 5 / 7])
        assert np.isnan(picks.loc["source_size", "leader_wins"])  # the leader itself
        said = f"chance would pick {picks.loc['random', 'pick']}, source size would pick b and a static ranking would"
        assert f"Without looking at the target, {said} pick a." in result.text

    def test_any_table_of_ranks_will_do_and_none_is_an_empty_one(self):
        result = bootstrap_ranking(CLEAR, baselines={"modality tags": {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}})
        assert result.baselines["pick"].tolist() == ["a"]
        assert "modality tags would pick a" in result.text
        assert result.table["modality tags_rank"].tolist() == [2, 3, 1, 4]
        without = bootstrap_ranking(CLEAR)
        assert list(without.baselines) == ["baseline", "pick", "score", "rank", "leader_wins", "gap"]
        assert without.baselines.empty
        assert "Without looking" not in without.text


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, "no source"),
        (lambda counts: {}, {"patients": 4}, "no source"),
        ({"a": [0.1, 0.2], "b": [0.1]}, {}, "scores of b and a must be of the same patients"),
        ({"a": {"p1": 1, "p2": 2}, "b": {"p1": 1, "p3": 2}}, {}, "scores of b and a .* only one has p2 and p3"),
        ({"a": [0.1, 0.2]}, {"patients": 3}, "of 2 patients; patients says 3"),
        ({"a": ["high", "low"]}, {}, "scores of a must be numbers, one per patient; found list"),
        ({"a": []}, {}, "patients is 0; expected a whole number, 1 or more"),
        ({"a": 0.1}, {}, "numbers, one per patient; found float"),
        ({"a": [0.1, np.inf]}, {}, "the score of a is infinite"),
        ({"a": lambda counts: 1.0}, {}, "patients is None"),
        (CLEAR, {"minimum_win": 0.5}, "minimum_win is 0.5; expected a number above 0.5"),
        (CLEAR, {"minimum_gap": -0.1}, "minimum_gap"),
        (CLEAR, {"n_resamples": 0}, "n_resamples"),
        (CLEAR, {"baselines": {"size": {"a": 1, "b": 2}}}, "no rank for c and d"),
        ([], {"sizes": None}, "at least one candidate"),
        (["a", "b", "a"], {"sizes": None}, "none twice; found a, b and a"),
        (["a", "b"], {"sizes": {"a": 3}}, "sizes has no entry for b"),
    ],
)
def test_bad_input(scores, options, message):
    with pytest.raises(InputError, match=message):
        (baseline_rankings if "sizes" in options else bootstrap_ranking)(scores, **options)
