"""The two weights of SeqTran's affinity, fitted to transfers, and their worth on a target they have not seen."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.affinity import PUBLISHED_WEIGHTS, fit_affinity_weights
from medtl_ext.affinity.tasks import ROUNDING
from medtl_ext.sequential_transfer.affinities import SeqTranAffinity
from medtl_ext.sequential_transfer.chain import chains_to
from medtl_ext.sequential_transfer.plan import SourceGraph, task_volumes
from medtl_ext.transfer import Study, patient_table
from medtl_ext.transfer.jobs import shell_word, short_path
from medtl_ext.transfer.study import Arms, require_lists

PAIR = ["source", "target"]
CORRELATIONS = ["correlation", "correlation_left_out", "correlation_published"]


@dataclass(kw_only=True, eq=False)
class FitWeights(Study):
    """A study that fits ``alpha`` and ``beta`` of SeqTran's affinity to what transfers gave.

    An affinity is to rank the sources of one target, so distance, similarity and Dice each count less their mean over
    the target's sources. Writes ``transfers.csv`` (source, target, distance, similarity, dice) and
    ``affinity_weights.json``, which says too what the weights are worth on a target that is left out of the fit.

    Args:
        transfers: a CSV file with the columns ``source, target, dice``; None: fine-tune every source on every target.
        targets, sources: tasks, where ``transfers`` is None.
        standardize: see `SeqTranAffinity`.
    """

    transfers: str | None
    targets: Sequence[str]
    sources: Sequence[str]
    standardize: bool
    table: pd.DataFrame = field(init=False)

    def check(self) -> dict[str, Any]:
        if self.transfers is None:
            require_lists(targets=self.targets, sources=self.sources)
            self.table = pd.DataFrame([(a, b) for b in self.targets for a in self.sources if a != b], columns=PAIR)
        else:
            self.table = _read_transfers(Path(self.transfers))
        if len(self.table) < 3:
            asked = self.transfers or f"{list(self.sources)} to {list(self.targets)}"
            raise InputError(f"a fit needs three transfers or more; those from {asked} are {len(self.table)}.")
        return {}

    @cached_property
    def pool(self) -> SourceGraph:
        return SourceGraph(here=self.here, sources=self.sources, affinity=SeqTranAffinity(standardize=self.standardize))

    def arms(self) -> Arms:
        config = self.here.config
        chains = {name: chains_to(self, name, config["seed"]) for name in self.table["target"].unique()}
        if self.transfers is not None:
            return []
        for name in self.sources:
            self.pool.open(name, train_patients=config["source_patients"]).datalist("train")
        for of in chains.values():
            of.target.datalist("train")  # raises where there are fewer patients than are to be spent
        pairs = self.table.itertuples(index=False)
        return [({"pair": target, "method": source}, chains[target].arm(source, source)) for source, target in pairs]

    def report(self, table: pd.DataFrame, arms: Arms) -> None:
        """Fit, write it down, and say it."""
        config, folder, found = self.here.config, self.here.folder, self.table
        if arms:
            scores = patient_table(table)
            scores = scores[scores["split"] == config["val_split"]]
            found["dice"] = scores.groupby(["pair", "method"], sort=False)["dice"].mean().to_numpy()
        whole, limit = map(self.open, found["target"].unique()), config["affinity_patients"]
        targets = {task.name: task_volumes(task, patients=limit) for task in whole}
        sources = {volumes.name: volumes for volumes in self.pool.volumes(found["source"].unique())}
        pairs = [(sources[a], targets[b]) for a, b in found[PAIR].itertuples(index=False)]
        found["distance"] = [self.pool.cost.distance(*pair) for pair in pairs]
        found["similarity"] = [self.pool.cost.similarity(*pair) for pair in pairs]
        content = fit_to_transfers(found) | {"standardize": self.standardize}
        write_csv(folder / "transfers.csv", found)
        weights = folder / "affinity_weights.json"
        write_json(weights, content)
        print(f"{fit_text(content)} To use them: --affinity {shell_word(str(short_path(weights)))}")


def fit_to_transfers(table: pd.DataFrame) -> dict[str, Any]:
    """The weights, and how cost and Dice correlate within targets (negative where the cost predicts).

    Args:
        table: a row per transfer with ``target, dice, distance, similarity``.

    Returns:
        ``alpha``, ``beta``, the number of ``transfers``, and three correlations, each the mean over the same targets,
        None where nothing varies: ``correlation`` with these weights, on the transfers they were fitted to;
        ``correlation_left_out`` with weights fitted to the other targets' transfers; ``correlation_published``. Of the
        ``targets_left_out``, ``targets_predicted`` have the predicting sign, and on ``targets_better`` the weights of
        the others beat the published ones.
    """
    values = table.reset_index(drop=True).set_index("target", append=True)[["dice", "distance", "similarity"]]
    rows = values.groupby("target").transform(_within_target)
    weights = _fit(rows)
    found = []
    for _, own in rows.groupby("target", sort=False):
        others, left_out = rows.drop(own.index), np.nan
        if len(others) >= 3:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of the whole fit it is said
                left_out = _correlation(own, _fit(others))
        found.append([_correlation(own, weights), left_out, _correlation(own, PUBLISHED_WEIGHTS)])
    compared = pd.DataFrame(found, columns=CORRELATIONS)
    known = compared.dropna()
    means = (known if len(known) else compared).mean()
    return {
        "alpha": weights[0],
        "beta": weights[1],
        "transfers": len(table),
        **{kind: None if np.isnan(value) else value for kind, value in means.items()},
        "targets_left_out": len(known),
        "targets_predicted": int((known["correlation_left_out"] < 0).sum()),
        "targets_better": int((known["correlation_left_out"] < known["correlation_published"] - ROUNDING).sum()),
    }


def _within_target(values: pd.Series) -> pd.Series:
    """Without what differs between targets: how hard they are, how far from all sources.

    What is the same for all sources of a target becomes 0, not what rounding leaves of it.
    """
    varies = values.max() - values.min() > ROUNDING * values.abs().max()
    return values - values.mean() if varies else 0.0 * values


def _fit(rows: pd.DataFrame) -> tuple[float, float]:
    return fit_affinity_weights(rows["distance"] - rows["distance"].min(), rows["similarity"], rows["dice"])


def _correlation(rows: pd.DataFrame, weights: tuple[float, float]) -> float:
    """Of cost and Dice within a target; NaN where either is constant."""
    cost = weights[0] * rows["distance"] - weights[1] * rows["similarity"]
    return float(cost.corr(rows["dice"])) if cost.any() and rows["dice"].any() else np.nan


def fit_text(content: Mapping[str, Any]) -> str:
    """What `fit_to_transfers` says, and whether to prefer its weights."""
    said = ["unknown" if content[kind] is None else f"{content[kind]:+.2f}" for kind in CORRELATIONS]
    fitted, left_out, published = said
    targets, predicted, better = (content[f"targets_{kind}"] for kind in ("left_out", "predicted", "better"))
    text = (
        f"alpha {content['alpha']:.4g}, beta {content['beta']:.4g} of {content['transfers']} transfers. Cost and Dice "
        f"of a target's sources correlate, in the mean over targets, at {fitted} with these weights, which have seen "
        f"them; at {left_out} on targets left out of the fit; at {published} with the published weights. Lower is "
        "better."
    )
    found = f"of {targets} targets left out, {predicted} have the predicting sign, and {better} are predicted better"
    found += " than by the published weights"
    ahead = targets > 0 and content["correlation_left_out"] < content["correlation_published"]
    # One-sided sign tests at 5 %: 5 of 5 targets, or 7 of 8, are more than chance.
    if ahead and all(stats.binomtest(n, targets, alternative="greater").pvalue <= 0.05 for n in (predicted, better)):
        return f"{text} Prefer these weights to the published ones for further targets of this kind: {found}."
    few = ", and fewer than 5 cannot show it" if targets < 5 else ""
    return f"{text} No evidence to prefer these weights to the published ones on another target: {found}{few}."


def _read_transfers(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"transfers file {path} cannot be read as CSV ({str(error).strip()}).") from error
    if missing := {"source", "target", "dice"} - set(table):
        raise InputError(f"transfers file {path} lacks the column(s) {', '.join(sorted(missing))}.")
    table["dice"] = pd.to_numeric(table["dice"], errors="coerce")
    wrong = {"has no dice between 0 and 1": ~table["dice"].between(0, 1)}
    wrong["is from a task to itself"] = table["source"] == table["target"]
    for what, where in wrong.items():
        if where.any():
            line = where.argmax() + 2
            raise InputError(f"transfers file {path}: line {line} {what}; mend it, or leave it out.")
    return table[[*PAIR, "dice"]]
