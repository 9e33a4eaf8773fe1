"""What a study says of its verdicts, and what a ranker knows that ignores the target: against counts made by hand."""

import pandas as pd
import pytest

from medtl_ext.ranking import agreement_over_targets, known_elsewhere, verdict_claim

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
    """No draw decides between them, which would be a ranking of nothing."""
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
