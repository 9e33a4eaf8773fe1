"""The two weights of SeqTran's affinity, fitted to transfers, and their worth on a target they have not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.affinity import PUBLISHED_WEIGHTS, fit_affinity_weights
from medtl_ext.bundle import study_config
from medtl_ext.report import patient_table
from medtl_ext.sequential.affinities import SeqTranAffinity
from medtl_ext.sequential.chain import Arm
from medtl_ext.sequential.plan import task_volumes
from medtl_ext.sequential.study import chains_to, collections_of


def fit_weights(
    *,
    transfers: str | None,
    targets: Sequence[str],
    sources: Sequence[str],
    settings: Mapping[str, Any],
    standardize: bool,
    output_dir: str,
    n_jobs: int | None = None,
    backend: str | None = None,
) -> tuple[float, float]:
    """Fit ``alpha`` and ``beta`` of SeqTran's affinity to what transfers gave.

    An affinity is to rank the sources of one target, so distance, similarity and Dice each count less their mean over
    the target's sources. Writes ``transfers.csv`` (source, target, distance, similarity, dice) and
    ``affinity_weights.json``, which says too what the weights are worth on a target that is left out of the fit.

    Args:
        transfers: a CSV file with the columns ``source, target, dice``; None: fine-tune every source on every target.
        targets, sources: tasks, where ``transfers`` is None.
        settings: options of ``train.json``.
        standardize: see `SeqTranAffinity`.
        output_dir: gets the trainings and the results.
        n_jobs, backend: see `medtl_ext.bundle.run_jobs`.
    """
    for name, values in (("targets", targets), ("sources", sources)):
        if transfers is None and (isinstance(values, str) or not values):
            raise InputError(f"{name} is {values!r}; give a list with at least one.")
    config, folder = study_config(output_dir, settings) | {"check_data": False}, Path(output_dir)
    if transfers is None:
        table = _measured_transfers(config, folder, targets, sources, n_jobs=n_jobs, backend=backend)
    else:
        table = _read_transfers(Path(transfers))
    collections = collections_of(config, [*table["source"], *table["target"]])
    tasks = {name: task_volumes(of, name, patients=config["affinity_patients"]) for name, of in collections.items()}
    affinity = SeqTranAffinity(standardize=standardize)
    pairs = [(tasks[a], tasks[b]) for a, b in zip(table["source"], table["target"], strict=True)]
    table["distance"] = [affinity.distance(a, b) for a, b in pairs]
    table["similarity"] = [affinity.similarity(a, b) for a, b in pairs]
    content = fit_to_transfers(table) | {"standardize": standardize}
    write_csv(folder / "transfers.csv", table)
    write_json(folder / "affinity_weights.json", content)
    print(fit_text(content))
    return content["alpha"], content["beta"]


def fit_to_transfers(table: pd.DataFrame) -> dict[str, Any]:
    """The weights, and how cost and Dice correlate within targets (negative where the cost predicts).

    Args:
        table: a row per transfer with ``target, dice, distance, similarity``.

    Returns:
        ``alpha``, ``beta``, the number of ``transfers``, and three correlations, None where nothing varies:
        ``correlation`` with these weights, on the transfers they were fitted to; ``correlation_left_out``, the mean
        over targets with weights fitted to the other targets' transfers; ``correlation_published``.
    """
    alpha, beta = _fit(table)
    return {
        "alpha": alpha,
        "beta": beta,
        "transfers": len(table),
        "correlation": _correlation(table, (alpha, beta)),
        "correlation_left_out": _correlation_left_out(table),
        "correlation_published": _correlation(table, PUBLISHED_WEIGHTS),
    }


def _within_targets(table: pd.DataFrame) -> pd.DataFrame:
    """Without what differs between targets: how hard they are, how far from all sources."""
    columns = ["dice", "distance", "similarity"]
    return table[columns] - table.groupby("target")[columns].transform("mean")


def _fit(table: pd.DataFrame) -> tuple[float, float]:
    rows = _within_targets(table)
    return fit_affinity_weights(rows["distance"] - rows["distance"].min(), rows["similarity"], rows["dice"])


def _correlation(table: pd.DataFrame, weights: tuple[float, float]) -> float | None:
    """Of cost and Dice within targets; None where either is constant."""
    rows = _within_targets(table)
    cost = weights[0] * rows["distance"] - weights[1] * rows["similarity"]
    if np.isclose(cost, 0, atol=1e-12).all() or np.isclose(rows["dice"], 0, atol=1e-12).all():
        return None
    return float(cost.corr(rows["dice"]))


def _correlation_left_out(table: pd.DataFrame) -> float | None:
    """The mean over targets, each with the weights that the others' transfers give; None where that cannot be had."""
    found = []
    for target, rows in table.groupby("target", sort=False):
        others = table[table["target"] != target]
        if len(others) >= 3:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the whole fit it is said
                found.append(_correlation(rows, _fit(others)))
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def fit_text(content: Mapping[str, Any]) -> str:
    """What `fit_to_transfers` says, and whether to prefer its weights."""
    kinds = ("correlation", "correlation_left_out", "correlation_published")
    fitted, left_out, published = ("unknown" if content[kind] is None else f"{content[kind]:+.2f}" for kind in kinds)
    text = (
        f"alpha {content['alpha']:.4g}, beta {content['beta']:.4g} of {content['transfers']} transfers. Cost and Dice, "
        f"each less its target's mean, correlate at {fitted} with these weights, which have seen them; at {left_out} "
        f"on targets left out of the fit; at {published} with the published weights. Lower is better."
    )
    left_out, published = content["correlation_left_out"], content["correlation_published"]
    if left_out is None or left_out >= min(0.0, published or 0.0):
        text += " No evidence to prefer these weights to the published ones on another target."
    return text


def _measured_transfers(
    config: Mapping[str, Any],
    folder: Path,
    targets: Sequence[str],
    sources: Sequence[str],
    *,
    n_jobs: int | None,
    backend: str | None,
) -> pd.DataFrame:
    collections_of(config, [*targets, *sources])
    rows = []
    for target in targets:
        chains = chains_to(config, folder, target, config["seed"])
        arms = [Arm(source, (source,)) for source in sources if source != target]
        jobs = chains.run(arms, target, n_jobs=n_jobs, backend=backend)
        for source, job in jobs.items():
            scores = patient_table(pd.read_csv(job.output_dir / "metrics.csv"))
            dice = scores[scores["split"] == "val"]["dice"].mean()
            rows.append({"source": source, "target": target, "dice": dice})
    return pd.DataFrame(rows)


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
    if len(table) < 3 or table["dice"].isna().any():
        empty = np.flatnonzero(table["dice"].isna())
        bad = f"row {empty[0] + 2} has none" if len(empty) else f"found {len(table)}"
        raise InputError(f"transfers file {path} needs three transfers or more, each with its dice; {bad}.")
    return table[["source", "target", "dice"]]
