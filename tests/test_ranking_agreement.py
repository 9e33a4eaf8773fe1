"""Footrule, weighted Kendall, Friedman and Nemenyi compared with brute force, formulas and SciPy, and small studies."""

from itertools import combinations, pairwise, permutations

import numpy as np
import pandas as pd
import pytest
import torch
from scikit_posthocs import posthoc_nemenyi_friedman
from scipy import stats

from medtl_ext import InputError
from medtl_ext.ranking import (
    agreement_over_targets,
    friedman_nemenyi,
    known_elsewhere,
    noise_ceiling,
    spearman_footrule,
    verdict_claim,
    weighted_kendall,
)

SOURCES = ["a", "b", "c", "d", "e", "f"]


def named(values):
    return dict(zip(SOURCES, values, strict=False))


def brute_footrule(scores, truth, k):
    """Mean over every order of the candidates that the scores allow, ranks counted one by one."""
    value = {source: -np.inf if np.isnan(score) else score for source, score in scores.items()}
    distances = []
    for order in permutations(scores):
        if all(value[first] >= value[second] for first, second in pairwise(order)):
            ranks = [1 + sum(other > truth[source] for other in truth.values()) for source in order]
            distances.append(sum(abs(place - rank) for place, rank in enumerate(ranks[:k], start=1)))
    return np.mean(distances)


class TestFootrule:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_brute_force_with_ties_subsets_and_nan(self, seed):
        rng = np.random.default_rng(seed)
        truth = named(rng.integers(0, 5, 6) / 10)
        for kept in (6, 4):
            chosen = rng.choice(SOURCES, kept, replace=False)
            for scores in (rng.random(kept), rng.integers(0, 3, kept), np.where(rng.random(kept) < 0.4, np.nan, 1.0)):
                scores = dict(zip(chosen, scores, strict=True))  # in an order of its own
                for k in range(1, kept + 1):
                    assert spearman_footrule(scores, truth, k) == pytest.approx(brute_footrule(scores, truth, k))

    def test_by_hand(self):
        truth = named([0.9, 0.8, 0.7, 0.6])
        reversed_scores = named([1, 2, 3, 4])
        assert [spearman_footrule(reversed_scores, truth, k) for k in (1, 2, 3, 4)] == [3, 4, 5, 8]
        assert spearman_footrule(truth, truth, 4) == 0
        assert spearman_footrule({"b": 2, "c": 1}, named([0.9, 0.8, 0.8]), 2) == 1 + 0  # equal truths: the better rank

    def test_takes_tensors_and_numpy_integers(self):
        scores = {"a": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor(0.2)}
        assert spearman_footrule(scores, {"a": 1, "b": 0}, np.int64(1)) == 1


class TestWeightedKendall:
    def test_by_hand(self):
        """Ranks from 0 weigh 1, 1/2, 1/3 and a pair the sum of two: (a, b) 3/2, (a, c) 4/3, (b, c) 5/6."""
        truth = named([0.9, 0.8, 0.7])
        assert weighted_kendall(truth, truth) == pytest.approx(1)
        assert weighted_kendall(named([1, 2, 3]), truth) == pytest.approx(-1)
        assert weighted_kendall({"c": 2, "b": 1, "a": 3}, truth) == pytest.approx((3 / 2 + 4 / 3 - 5 / 6) / (11 / 3))

    def test_is_scipys_with_ties(self):
        rng = np.random.default_rng(0)
        scores, truth = rng.integers(0, 3, 6).astype(float), rng.integers(0, 4, 6).astype(float)
        reordered = dict(reversed(named(truth).items()))
        assert weighted_kendall(named(scores), reordered) == stats.weightedtau(scores, truth).statistic

    def test_nan_is_the_smallest(self):
        truth = named([0.9, 0.8, 0.7, 0.6])
        assert weighted_kendall(named([3, np.nan, 2, 1]), truth) == weighted_kendall(named([3, 0, 2, 1]), truth)
        assert np.isnan(weighted_kendall(named([np.nan] * 4), truth))

    def test_nothing_ranked_is_nan(self):
        truth = named([0.9, 0.8, 0.7])
        assert np.isnan(weighted_kendall(named([2.0, 2.0, 2.0]), truth))
        assert np.isnan(weighted_kendall(truth, named([1, 1, 1])))
        assert np.isnan(weighted_kendall({"a": 1}, truth))

    def test_sources_without_score_are_left_out(self):
        truth = named([0.9, 0.8, 0.7, 0.6])
        scores = {"d": 1.0, "a": 0.5, "c": 0.2}
        assert weighted_kendall(scores, truth) == weighted_kendall(scores, {s: truth[s] for s in "acd"})


def table_of(values):
    values = np.asarray(values, dtype=float)
    return pd.DataFrame(values, [f"t{i}" for i in range(len(values))], [f"m{j}" for j in range(values.shape[1])])


class TestFriedmanNemenyi:
    @pytest.mark.parametrize("tied", [False, True])
    def test_friedman_is_the_textbooks_with_ties(self, tied):
        rng = np.random.default_rng(3)
        result = friedman_nemenyi(table_of(rng.integers(0, 4, (9, 5)) if tied else rng.random((9, 5))))
        off = result.table.to_numpy() - 3
        assert result.chi_square == pytest.approx(4 * (off.sum(axis=0) ** 2).sum() / (off**2).sum())
        assert result.p == pytest.approx(stats.chi2.sf(result.chi_square, 4))

    def test_ranks_and_nan_last(self):
        result = friedman_nemenyi(table_of([[0.5, np.nan, 0.7], [0.2, np.nan, np.nan], [0.1, 0.1, 0.3]]))
        assert result.table.to_numpy().tolist() == [[2, 3, 1], [1, 2.5, 2.5], [2.5, 2.5, 1]]
        assert list(result.table.index) == ["t0", "t1", "t2"]
        assert result.average_ranks.to_dict() == pytest.approx({"m2": 4.5 / 3, "m0": 5.5 / 3, "m1": 8 / 3})

    def test_ranks_may_be_given(self):
        table = table_of(np.random.default_rng(0).random((6, 4)))
        table.iloc[2, 1] = np.nan
        scores = friedman_nemenyi(table)
        ranks = friedman_nemenyi(scores.table, higher_is_better=False)
        assert ranks == scores
        assert ranks.table.equals(scores.table)
        # NaN is last there too
        assert friedman_nemenyi(-table, higher_is_better=False).table.equals(scores.table)

    # Demšar 2006, Table 5a: q at .05 for 2 to 10 methods; its third decimal is one off in places
    @pytest.mark.parametrize(
        ("k", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)]
    )
    def test_critical_difference_has_demsars_quantiles(self, k, q):
        result = friedman_nemenyi(table_of(np.random.default_rng(0).random((14, k))))
        assert result.critical_difference / np.sqrt(k * (k + 1) / (6 * 14)) == pytest.approx(q, abs=1e-3)

    @pytest.mark.parametrize("seed", range(4))
    def test_groups_are_the_largest_sets_that_nemenyis_test_cannot_tell(self, seed):
        rng = np.random.default_rng(seed)
        table = table_of(rng.random((8, 7)) + np.linspace(0, 2.5, 7))
        result = friedman_nemenyi(table)
        p = posthoc_nemenyi_friedman(result.table)
        together = {frozenset(pair) for group in result.groups for pair in combinations(group, 2)}
        assert together == {frozenset(pair) for pair in combinations(table, 2) if p.loc[pair] > 0.05}
        assert not any(set(group) <= set(other) for group, other in permutations(result.groups, 2))
        firsts = [result.average_ranks[group[0]] for group in result.groups]
        assert firsts == sorted(firsts)

    def test_a_method_apart_from_all_is_in_no_group(self):
        result = friedman_nemenyi(table_of([[9.0, 1 + 0.1 * (i % 2), 1.05] for i in range(30)]))
        assert [set(group) for group in result.groups] == [{"m1", "m2"}]
        assert result.text.startswith("The 3 methods differ over 30 targets (Friedman chi-square 45.000, p 1.7e-10). ")
        assert "has the best average rank, 1.00; with a critical difference of 0.61 it is better than m" in result.text
        assert "cannot be told" not in result.text

    def test_text_of_who_can_be_told_from_the_best(self):
        result = friedman_nemenyi(table_of([[9.0, 8.9 + 0.2 * (i % 2), 1, 0] for i in range(12)]))
        assert result.text.endswith("it is better than m2 3.00 and m3 4.00 and cannot be told from m1 1.50.")

    @pytest.mark.parametrize("values", [[[1, 2, 3], [3, 1, 2], [2, 3, 1]], np.ones((3, 3))])
    def test_equal_methods_do_not_differ(self, values):
        result = friedman_nemenyi(table_of(values))
        assert (result.chi_square, result.p) == pytest.approx((0, 1))
        assert result.average_ranks.tolist() == [2, 2, 2]
        assert result.text.startswith("No evidence that the 3 methods differ over 3 targets (Friedman chi-square 0.000")
        assert [len(group) for group in result.groups] == [3]


DICE = {
    ("t1", 0): {"a": 0.9, "b": 0.7, "c": 0.5},
    ("t1", 1): {"a": 0.6, "b": 0.7, "c": 0.5},
    ("t2", 0): {"a": 0.2, "b": 0.3, "c": 0.4},
    ("t3", 0): {"a": 0.5, "b": 0.1, "c": 0.3},
}


@pytest.fixture
def sources() -> pd.DataFrame:
    rows = [(*key, source, dice) for key, values in DICE.items() for source, dice in values.items()]
    return pd.DataFrame(rows, columns=["target", "seed", "source", "dice"])


def test_verdicts_are_counted_and_held_against_the_truth(sources):
    verdicts = {
        ("t1", 0): {"recommendation": "a", "tied": ["a"], "default": "a"},  # right
        ("t1", 1): {"recommendation": "a", "tied": ["a"], "default": "a"},  # wrong by 0.1
        ("t2", 0): {"recommendation": None, "tied": ["b", "c"], "default": "b"},  # the best is tied; wrong by 0.1
        ("t3", 0): {"recommendation": None, "tied": ["b", "c"], "default": None},
    }
    text = verdict_claim(sources, verdicts, outcome="dice", unit="Dice")
    assert "Of 4 rankings 2 name one source, 1 of them the best one" in text
    assert "(mean size 1.5) holds the best source in 2" in text
    assert text.endswith("the best guess loses 0.067 Dice on average.")


def test_no_best_guess_leaves_no_regret(sources):
    text = verdict_claim(
        sources, {("t1", 0): {"recommendation": None, "tied": ["a"], "default": None}}, outcome="dice", unit="AUC"
    )
    assert "0 name one source" in text
    assert "loses nan AUC" in text


def test_what_is_known_of_other_targets_leaves_this_one_and_other_seeds_out(sources):
    known = {target: known_elsewhere(sources, target, 0, outcome="dice") for target in ("t1", "t2", "t3")}
    first = {target: max(values, key=values.get) for target, values in known.items()}
    # t2 and t3 rank c 1, 2; a 3, 1; b 2, 3: c leads. Without t2 it is a, first on t1 and on t3.
    assert (first["t1"], first["t2"]) == ("c", "a")
    assert set(known["t3"]) == {"a", "b", "c"}
    assert known_elsewhere(sources, "t1", 1, outcome="dice") is None


def test_sources_that_are_alike_elsewhere_share_their_rank():
    """Ties are not broken at random."""
    rows = [("t1", "a", 0.8), ("t1", "b", 0.6), ("t2", "a", 0.6), ("t2", "b", 0.8), ("t2", "c", 0.1), ("t1", "c", 0.1)]
    rows += [("t3", name, 0.5) for name in "abcde"]
    table = pd.DataFrame(rows, columns=["target", "source", "dice"]).assign(seed=0)
    expected = {"a": -1.5, "b": -1.5, "c": -3, "d": -4.5, "e": -4.5}  # d and e are on no other target
    assert known_elsewhere(table, "t3", 0, outcome="dice") == expected


def test_each_ranking_is_judged_by_its_own_target_with_what_is_known_elsewhere(sources):
    seen = []

    def judge(ready, truth, *, static):
        seen.append((truth.to_dict(), static))
        return pd.DataFrame({"ranker": ["one", "two"], "best": [truth.idxmax(), ready.index[0]]})

    table = agreement_over_targets(sources, judge, outcome="dice")
    assert seen == [(values, known_elsewhere(sources, *key, outcome="dice")) for key, values in DICE.items()]
    assert [static is None for _, static in seen] == [False, True, False, False]  # seed 1 has one target
    assert list(table.columns) == ["ranker", "best", "target", "seed"]
    assert list(zip(table["target"], table["seed"], strict=True)) == [key for key in DICE for _ in range(2)]
    assert table["best"].tolist() == ["a", "a", "b", "a", "c", "a", "a", "a"]


def test_the_noise_ceiling_is_chance_where_seeds_decide_and_one_where_sources_do():
    rng = np.random.default_rng(0)
    keys = pd.MultiIndex.from_product([range(20), range(4), range(8)], names=["target", "seed", "source"])
    noise = pd.Series(rng.normal(0, 1, len(keys)), keys)
    source = pd.Series(rng.normal(0, 1, 8))[keys.get_level_values("source")].to_numpy()
    for share, said in ((0.0, "cannot tell"), (1.0, "ICC 1.00")):
        table = (share * source + (1 - share) * noise).rename("dice").reset_index()
        rows, text = noise_ceiling(table, outcome="dice")
        assert len(rows) == 80
        assert rows["tau"].mean() == pytest.approx(share, abs=0.1)
        assert said in text
    values = noise.unstack("source").loc[0].T  # of one target; independent: sources and seeds as one-way groups
    within = values.var(axis=1).mean()
    icc = (4 * values.mean(axis=1).var() - within) / (4 * values.mean(axis=1).var() + 3 * within)
    one = noise.loc[[0]].rename("dice").reset_index()
    assert f"ICC {icc:.2f}." in noise_ceiling(one, outcome="dice")[1]
    assert "One seed" in noise_ceiling(one[one["seed"] == 0], outcome="dice")[1]


TWO = {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("ask", "given", "message"),
    [
        (spearman_footrule, ({}, {"a": 1}, 1), "scores is empty"),
        (spearman_footrule, ({"a": 1}, {}, 1), "truth is empty"),
        (spearman_footrule, ({"a": 1, "x": 2}, {"a": 1}, 1), "no value for x"),
        (spearman_footrule, (TWO, {"a": 1, "b": np.nan}, 1), "truth of source b is nan"),
        (spearman_footrule, ({"a": np.inf, "b": 2}, TWO, 1), "scores of source a is inf"),
        (spearman_footrule, (TWO, TWO, 0), "k is 0; expected a whole number from 1 to 2"),
        (spearman_footrule, (TWO, TWO | {"c": 3}, 3), "k is 3; expected a whole number from 1 to 2"),
        (spearman_footrule, (TWO, TWO, 1.0), "k is 1.0"),
        (weighted_kendall, (TWO, {"c": 1}), "no value for a and b"),
        (friedman_nemenyi, ([[1, 2], [2, 1]],), "at least 2 targets .rows. and 3 methods .columns.; found .2, 2."),
        (friedman_nemenyi, (pd.DataFrame({"a": [1.0], "b": [2.0], "c": [3.0]}),), "found .1, 3."),
        (friedman_nemenyi, (pd.DataFrame({"a": ["x", "y"], "b": [1, 2], "c": [3, 4]}),), "numbers only"),
        (friedman_nemenyi, (pd.DataFrame({"a": [1, np.inf], "b": [1, 2], "c": [3, 4]}),), "infinite"),
        (friedman_nemenyi, (pd.DataFrame(np.ones((2, 3)), columns=["a", "b", "a"]),), "method a twice"),
        (friedman_nemenyi, (pd.DataFrame(np.ones((2, 3)), index=["t", "t"]),), "target t twice"),
    ],
)
def test_what_makes_no_sense_is_refused(ask, given, message):
    with pytest.raises(InputError, match=message):
        ask(*given)
