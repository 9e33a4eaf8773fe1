"""What rankings were worth over the targets and seeds of a study, once every source was fine-tuned on every target."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from medtl_ext.ranking.sources import mean_relative_rank


def agreement_over_targets(sources: pd.DataFrame, judge: Callable[..., pd.DataFrame], *, outcome: str) -> pd.DataFrame:
    """Every ranker held against the truth, for each target and seed of a study.

    Args:
        sources: a row per ``target``, ``seed`` and ``source``, with scores and the outcome of fine-tuning.
        judge: from one target's sources, their outcome, and ``static`` (of `known_elsewhere`) to a row per ranker.
        outcome: column of the truth, higher is better.

    Returns:
        The rows of ``judge``, with ``target`` and ``seed``.
    """
    parts = []
    for (target, seed), group in sources.groupby(["target", "seed"], sort=False):
        ready = group.set_index("source")
        static = known_elsewhere(sources, target, seed, outcome=outcome)
        parts.append(judge(ready, ready[outcome], static=static).assign(target=target, seed=seed))
    return pd.concat(parts, ignore_index=True)


def known_elsewhere(sources: pd.DataFrame, target: str, seed: int, *, outcome: str) -> dict[str, float] | None:
    """How well each source did on the study's other targets: what a ranker knows that ignores the target.

    Args:
        sources: a row per ``target``, ``seed`` and ``source``, with the outcome of fine-tuning.
        target, seed: of the ranking.
        outcome: its column, higher is better (``dice``, ``auc``).

    Returns:
        Source -> minus its rank by the mean over them, equal ones sharing their mean rank; None where the seed has no
        other target.

    Example:
        >>> rows = [("t1", "a", 0.8), ("t1", "b", 0.6), ("t2", "a", 0.5), ("t2", "b", 0.7)]
        >>> table = pd.DataFrame(rows, columns=["target", "source", "dice"]).assign(seed=0)
        >>> known_elsewhere(table, "t2", 0, outcome="dice")
        {'a': -1.0, 'b': -2.0}
    """
    sources = sources[sources["seed"] == seed]
    others = sources[sources["target"] != target].groupby("target")
    if not (known := {name: group.set_index("source")[outcome] for name, group in others}):
        return None
    costs = mean_relative_rank(sorted(set(sources.loc[sources["target"] == target, "source"])), known)
    return (-costs.rank(na_option="bottom")).to_dict()  # on no other target: last


def verdict_claim(
    sources: pd.DataFrame, verdicts: Mapping[tuple[str, int], Mapping[str, Any]], *, outcome: str, unit: str
) -> str:
    """Whether the verdicts were right as often as they sounded, in a sentence.

    Args:
        sources: see `known_elsewhere`.
        verdicts: (target, seed) -> ``recommendation`` (None for no evidence), ``tied`` and ``default`` of its ranking.
        outcome: the column of the truth, higher is better.
        unit: what it is called.
    """
    truth = {key: group.set_index("source")[outcome] for key, group in sources.groupby(["target", "seed"])}
    called = {key: verdict["recommendation"] for key, verdict in verdicts.items() if verdict["recommendation"]}
    right = sum(truth[key].idxmax() == source for key, source in called.items())
    held = sum(truth[key].idxmax() in verdict["tied"] for key, verdict in verdicts.items())
    regret = [truth[key].max() - truth[key][told["default"]] for key, told in verdicts.items() if told["default"]]
    sizes = [len(verdict["tied"]) for verdict in verdicts.values()]
    return (
        f"**Is the verdict calibrated?** Of {len(verdicts)} rankings {len(called)} name one source, {right} of them "
        f"the best one; the tied set (mean size {np.mean(sizes):.1f}) holds the best source in {held}; the best guess "
        f"loses {np.mean(regret) if regret else np.nan:.3f} {unit} on average."
    )
