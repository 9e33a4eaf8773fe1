"""The two weights of SeqTran's affinity, fitted to transfers, and their worth on a target they have not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.affinity import PUBLISHED_WEIGHTS, fit_affinity_weights
from medtl_ext.affinity.tasks import ROUNDING
from medtl_ext.sequential_transfer.affinities import SeqTranAffinity, TaskVolumes
from medtl_ext.sequential_transfer.plan import task_volumes
from medtl_ext.sequential_transfer.study import study_chains, study_target
from medtl_ext.transfer.config import study_config
from medtl_ext.transfer.jobs import Run, shell_word, short_path
from medtl_ext.transfer.sources import source_collection
from medtl_ext.transfer.study import require_lists
from medtl_ext.transfer.tasks import SegmentationTask

PAIR = ["source", "target"]


class FitWeights:
    """A step that fits ``alpha`` and ``beta`` of SeqTran's affinity to what transfers gave.

    An affinity is to rank the sources of one target, so distance, similarity and Dice each count less their mean over
    the target's sources. Trainings have the options of ``train.json`` in the config's ``settings``. Writes
    ``transfers.csv`` (source, target, distance, similarity, dice) and ``affinity_weights.json``, which says too what
    the weights are worth on a target that is left out of the fit.

    Args:
        run: where it writes, and how its trainings are carried out.
        transfers: a CSV file with the columns ``source, target, dice``; None: fine-tune every source on every target.
        targets, sources: tasks, where ``transfers`` is None.
        standardize: see `SeqTranAffinity`.
    """

    def __init__(
        self, *, run: Run, transfers: str | None, targets: Sequence[str], sources: Sequence[str], standardize: bool
    ) -> None:
        self.here, self.transfers, self.targets, self.sources = run, transfers, targets, sources
        self.standardize = standardize

    def run(self) -> tuple[float, float]:
        """Train what is to be trained, fit, write it down, and say it; the two weights."""
        folder = self.here.folder
        config = study_config(folder, self.here.config["settings"]) | {"check_data": False}
        table = self._asked() if self.transfers is None else _read_transfers(Path(self.transfers))
        targets = {name: study_target(config, name, config["seed"]) for name in table["target"].unique()}
        any_target, where = next(iter(targets.values())), source_collection(config)
        if self.transfers is None:
            for source in self.sources:
                any_target.other(source, collection=where, train_patients=config["source_patients"]).datalist("train")
            table["dice"] = self._measured(config, table, targets)

        def volumes(column: str, collection: str | None) -> list[TaskVolumes]:
            tasks = {name: any_target.other(name, collection=collection) for name in table[column].unique()}
            found = {name: task_volumes(task, patients=config["affinity_patients"]) for name, task in tasks.items()}
            return [found[name] for name in table[column]]

        affinity = SeqTranAffinity(standardize=self.standardize)
        pairs = list(zip(volumes("source", where), volumes("target", config["collection"]), strict=True))
        table["distance"] = [affinity.distance(*pair) for pair in pairs]
        table["similarity"] = [affinity.similarity(*pair) for pair in pairs]
        content = fit_to_transfers(table) | {"standardize": self.standardize}
        write_csv(folder / "transfers.csv", table)
        weights = folder / "affinity_weights.json"
        write_json(weights, content)
        print(f"{fit_text(content)} To use them: --affinity {shell_word(str(short_path(weights)))}")
        return content["alpha"], content["beta"]

    def _asked(self) -> pd.DataFrame:
        require_lists(targets=self.targets, sources=self.sources)
        asked = [(source, target) for target, source in product(self.targets, self.sources) if source != target]
        if len(asked) < 3:
            lists = f"{list(self.sources)} to {list(self.targets)}"
            raise InputError(f"a fit needs three transfers or more; those from {lists} are {len(asked)}.")
        return pd.DataFrame(asked, columns=PAIR)

    def _measured(
        self, config: Mapping[str, Any], table: pd.DataFrame, targets: Mapping[str, SegmentationTask]
    ) -> list[float]:
        """Dice of each transfer on the patients that trainings are validated on."""
        run, split = self.here.seeded(config, config["seed"]), config["val_split"]
        for target in targets.values():
            target.datalist("train")
        chains = {name: study_chains(run, target) for name, target in targets.items()}
        arms = [chains[target].arm(source, source) for source, target in table[PAIR].itertuples(index=False)]
        self.here.train_arms(arms, "transfers")
        return [float(np.mean(list(SegmentationTask.patients(arm.last, split).values()))) for arm in arms]


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
    alpha, beta = _fit(table)
    rows = pd.DataFrame([_of_target(table, target, (alpha, beta)) for target in table["target"].unique()], dtype=float)
    known = rows.dropna()
    compared = known if len(known) else rows
    means = {kind: None if np.isnan(value) else float(value) for kind, value in compared.mean().items()}
    return {
        "alpha": alpha,
        "beta": beta,
        "transfers": len(table),
        **means,
        "targets_left_out": len(known),
        "targets_predicted": int((known["correlation_left_out"] < 0).sum()),
        "targets_better": int((known["correlation_left_out"] < known["correlation_published"] - ROUNDING).sum()),
    }


def _of_target(table: pd.DataFrame, target: str, weights: tuple[float, float]) -> dict[str, float | None]:
    """The three correlations on one target; that with the others' weights is None where those cannot be had."""
    rows, others = table[table["target"] == target], table[table["target"] != target]
    left_out = None
    if len(others) >= 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the whole fit it is said
            left_out = _correlation(rows, _fit(others))
    return {
        "correlation": _correlation(rows, weights),
        "correlation_left_out": left_out,
        "correlation_published": _correlation(rows, PUBLISHED_WEIGHTS),
    }


def _within_targets(table: pd.DataFrame) -> pd.DataFrame:
    """Without what differs between targets: how hard they are, how far from all sources.

    What is the same for all sources of a target becomes 0, not what rounding leaves of it.
    """
    columns = ["dice", "distance", "similarity"]
    groups = table.groupby("target")[columns]
    spread = groups.transform("max") - groups.transform("min")
    scale = table[columns].abs().groupby(table["target"]).transform("max")
    return (table[columns] - groups.transform("mean")).where(spread > ROUNDING * scale, 0.0)


def _fit(table: pd.DataFrame) -> tuple[float, float]:
    rows = _within_targets(table)
    return fit_affinity_weights(rows["distance"] - rows["distance"].min(), rows["similarity"], rows["dice"])


def _correlation(table: pd.DataFrame, weights: tuple[float, float]) -> float | None:
    """Of cost and Dice within targets; None where either is constant."""
    rows = _within_targets(table)
    cost = weights[0] * rows["distance"] - weights[1] * rows["similarity"]
    if not cost.any() or not rows["dice"].any():
        return None
    return float(cost.corr(rows["dice"]))


def _clear_majority(count: int, of: int) -> bool:
    """Whether so many heads are more than a fair coin gives (one-sided sign test at 5 %): 5 of 5, 7 of 8."""
    return of > 0 and stats.binomtest(count, of, alternative="greater").pvalue <= 0.05


def fit_text(content: Mapping[str, Any]) -> str:
    """What `fit_to_transfers` says, and whether to prefer its weights."""
    kinds = ("correlation", "correlation_left_out", "correlation_published")
    fitted, left_out, published = ("unknown" if content[kind] is None else f"{content[kind]:+.2f}" for kind in kinds)
    targets, predicted, better = (content[f"targets_{kind}"] for kind in ("left_out", "predicted", "better"))
    text = (
        f"alpha {content['alpha']:.4g}, beta {content['beta']:.4g} of {content['transfers']} transfers. Cost and Dice "
        f"of a target's sources correlate, in the mean over targets, at {fitted} with these weights, which have seen "
        f"them; at {left_out} on targets left out of the fit; at {published} with the published weights. Lower is "
        f"better. "
    )
    found = (
        f"of {targets} targets left out, {predicted} have the predicting sign, and {better} are predicted better than "
        "by the published weights"
    )
    ahead = targets > 0 and content["correlation_left_out"] < content["correlation_published"]
    if ahead and _clear_majority(predicted, targets) and _clear_majority(better, targets):
        return f"{text}Prefer these weights to the published ones for further targets of this kind: {found}."
    few = ", and fewer than 5 cannot show it" if targets < 5 else ""
    return f"{text}No evidence to prefer these weights to the published ones on another target: {found}{few}."


def _read_transfers(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"transfers file {path} does not exist; give a CSV file with columns source, target, dice.")
    try:
        table = pd.read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"transfers file {path} cannot be read as CSV ({error}).") from error
    if missing := {"source", "target", "dice"} - set(table):
        raise InputError(f"transfers file {path} lacks the column(s) {', '.join(sorted(missing))}.")
    table["dice"] = pd.to_numeric(table["dice"], errors="coerce")
    wrong = {
        "has no dice between 0 and 1": ~table["dice"].between(0, 1),
        "is from a task to itself": table["source"] == table["target"],
    }
    for what, where in wrong.items():
        if where.any():
            raise InputError(
                f"transfers file {path}: line {np.flatnonzero(where)[0] + 2} {what}; mend it, or leave it out."
            )
    if len(table) < 3:
        raise InputError(f"transfers file {path} needs three transfers or more; found {len(table)}.")
    return table[[*PAIR, "dice"]]
