"""The ground truth: every source fine-tuned on the target, and what the rankings were worth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
from ignite.engine import Events
from matplotlib.figure import Figure
from monai.data import DataLoader
from monai.engines import Evaluator, Trainer
from monai.handlers import EarlyStopHandler

from medtl_ext._io import write_csv, write_text
from medtl_ext._validation import InputError
from medtl_ext.bundle import Job, current_config, run_jobs
from medtl_ext.datasets.scoring import LABELS, Seen, score_table
from medtl_ext.datasets.sources import Source, dataset_name
from medtl_ext.networks import load_weights
from medtl_ext.ranking import weighted_kendall
from medtl_ext.report import markdown_table
from medtl_ext.visualize import save_figure

logger = logging.getLogger(__name__)

GRID_KEYS = ("learning_rate", "momentum", "weight_decay")
N_RESAMPLES = 500
BLUE, GREY = "#0072B2", "#6b6b6b"


def train(trainer: Trainer, *, evaluator: Evaluator, early_stopping: EarlyStopHandler) -> None:
    """Train until the validation AUC has not improved for a while, or the epochs are over."""
    early_stopping.set_trainer(trainer)
    early_stopping.attach(evaluator)
    logging.getLogger("ignite.handlers.early_stopping.EarlyStopping").setLevel(logging.WARNING)  # says it twice
    trainer.run()
    evaluator.remove_event_handler(early_stopping, Events.EPOCH_COMPLETED)
    logger.info("trained for %d of at most %d epochs", trainer.state.epoch, trainer.state.max_epochs)


def score_images(
    evaluator: Evaluator,
    loaders: Mapping[str, DataLoader],
    *,
    checkpoint: str,
    output_dir: str,
    method: str,
    seed: int,
) -> pd.DataFrame:
    """Score a trained network on the images of each split; write ``predictions.csv`` and, last, ``metrics.csv``.

    Args:
        evaluator: MONAI evaluator whose metric ``auc`` keeps its details (probabilities and one-hot labels).
        loaders: split name -> its images, unshuffled, of a dataset whose ``data`` are the datalist.
        checkpoint: weights of the evaluator's network.
        output_dir, method, seed: where the tables go, and what their columns say.

    Returns:
        The content of ``metrics.csv``: ``method, seed, split, images, auc`` (one class against the rest, the mean over
        classes) and ``accuracy``.
    """
    idist.barrier()  # the checkpoint is written by one process
    load_weights(getattr(evaluator.network, "module", evaluator.network), checkpoint, min_share=1.0)
    rows, tables = [], []
    for split, loader in loaders.items():
        evaluator.data_loader = loader
        evaluator.state.epoch_length = len(loader)
        evaluator.run()
        probs, labels = (tensor.cpu().numpy() for tensor in evaluator.state.metric_details["auc"])
        labels = labels.argmax(1)
        # Several processes take images in turn, and their results come one process after the other.
        items, world = loader.dataset.data, idist.get_world_size()
        order = np.concatenate([np.arange(rank, len(items), world) for rank in range(world)])
        table = pd.DataFrame({key: [items[place][key] for place in order] for key in ("subject", "name")})
        table = table.assign(split=split, label=labels)
        table[[f"p{label}" for label in range(probs.shape[1])]] = probs
        tables.append(table)
        auc, accuracy = image_auc(table), float((probs.argmax(1) == labels).mean())
        rows.append({"split": split, "images": len(labels), "auc": auc, "accuracy": accuracy})
        logger.info("%s: AUC %.3f over %d %s images", method, auc, len(labels), split)
    metrics = pd.DataFrame(rows)
    metrics.insert(0, "seed", seed)
    metrics.insert(0, "method", method)
    if idist.get_rank() == 0:
        written = pd.concat(tables)
        for column in _probabilities(written):  # in full: six digits make those near 1 equal
            written[column] = [str(value) for value in written[column]]
        write_csv(Path(output_dir) / "predictions.csv", written)
        write_csv(Path(output_dir) / "metrics.csv", metrics)
    return metrics


def image_auc(table: pd.DataFrame) -> float:
    """Area under the ROC curve, one class against the rest, the mean over the classes that are there."""
    every_image_once = np.ones((1, len(table)))
    return float(_resampled_auc(table, np.arange(len(table)), every_image_once)[0])


def auc_interval(table: pd.DataFrame, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of `image_auc` over patients, or over images where patients are not known."""
    groups, names = pd.factorize(table["subject"])
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), N_RESAMPLES)
    low, high = np.nanquantile(_resampled_auc(table, groups, draws), [0.025, 0.975])
    return float(low), float(high)


def _resampled_auc(table: pd.DataFrame, groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUC with every group of images as often as ``counts`` (resamples x groups) says: the share of pairs won."""
    labels, weights, values = table["label"].to_numpy(), counts[:, groups].astype(float), []
    for column in _probabilities(table):
        own, probs = labels == int(column[1:]), table[column].to_numpy()
        if own.all() or not own.any():
            continue
        order = np.argsort(probs)
        others = np.where(own, 0, weights)
        below = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(others[:, order], axis=1)], axis=1)
        ends = [np.searchsorted(probs, probs[own], side, sorter=order) for side in ("left", "right")]
        beaten = (below[:, ends[0]] + below[:, ends[1]]) / 2  # equal ones count half
        with np.errstate(invalid="ignore"):  # a resample without the class
            values.append((weights[:, own] * beaten).sum(1) / (weights[:, own].sum(1) * others.sum(1)))
    return np.nanmean(values, axis=0) if values else np.full(len(counts), np.nan)


def _probabilities(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column[0] == "p" and column[1:].isdigit()]


def settings_of_grid(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the grid's values.

    >>> len(settings_of_grid({"learning_rate": [0.1, 0.01], "momentum": [0.9], "weight_decay": [0, 1e-4]}))
    4
    """
    if set(grid) != set(GRID_KEYS) or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"grid is {grid!r}; expected a list of values for each of {', '.join(GRID_KEYS)}.")
    return [dict(zip(GRID_KEYS, values, strict=True)) for values in product(*(grid[key] for key in GRID_KEYS))]


def finetuning_jobs(
    config: Mapping[str, Any], folder: Path, source: Source | None, grid: Mapping[str, Sequence[float]], **options: Any
) -> list[Job]:
    """Runs of ``finetune.json`` from a source, or of ``scratch.json`` (None): one for each setting of the grid."""
    overlay = Path(config["bundle_root"]) / "configs" / ("finetune.json" if source else "scratch.json")
    overrides = {"source_task": source and source.name, "source_ckpt": source and source.checkpoint, **options}
    if source and source.network:
        overrides["network_def"] = dict(source.network)
    return [
        Job(config, folder / "_".join(f"{value:g}" for value in one.values()), [overlay], overrides | one)
        for one in settings_of_grid(grid)
    ]


def best_of(jobs: Sequence[Job]) -> Job:
    """The run of the best validation AUC; the first of equal ones."""
    return max(jobs, key=lambda job: _auc(job, "val"))


def _auc(job: Job, split: str) -> float:
    return float(pd.read_csv(job.output_dir / "metrics.csv").set_index("split").loc[split, "auc"])


def evaluate_ranking(
    scores: pd.DataFrame,
    pool: Sequence[Source],
    *,
    grid: Mapping[str, Sequence[float]],
    output_dir: str,
    synthetic: bool,
    seed: int,
    n_jobs: int | None = None,
    figures: bool = True,
) -> pd.DataFrame | None:
    """Fine-tune all of every source on the target, and train from scratch beside, and say what every score was worth.

    Writes ``truth.csv`` (AUC of the test images per source, with all scores), ``agreement.csv`` (per score: weighted
    Kendall, the source it picks and the AUC that loses), ``agreement.md`` and ``agreement.png``.

    Args:
        scores, pool: of `medtl_ext.datasets.score_table` and `train_pool`; the target's own model is left out.
        grid: values of learning rate, momentum and weight decay; the best on validation images counts.
        output_dir, synthetic: where the files go, and whether the data are synthetic.
        seed, n_jobs: of the trainings, and how many at a time.
        figures: draw ``agreement.png``.

    Returns:
        The agreement of each score; None in all but the first of several processes.
    """
    if idist.get_rank() != 0:
        return None
    config, folder = current_config(), Path(output_dir)
    candidates = {source.name: source for source in pool if not source.own} | {"scratch": None}
    jobs = {
        name: finetuning_jobs(config, folder / "finetune" / name, source, grid, seed=seed)
        for name, source in candidates.items()
    }
    if waiting := [job for runs in jobs.values() for job in runs if not job.done]:
        run_jobs(waiting, n_jobs=n_jobs, description="fine-tuning every source")
    truth = truth_table({name: best_of(runs) for name, runs in jobs.items()})
    table = truth.join(scores.drop(columns=["own", "checkpoint"]))
    agreement = agreement_table(scores[~scores["own"].astype(bool)], truth["auc"].drop("scratch"))
    write_csv(folder / "truth.csv", table.reset_index())
    write_csv(folder / "agreement.csv", agreement)
    target = dataset_name(config["target_task"])
    text = _evaluation_text(target, truth, agreement, synthetic)
    page = [f"# What the scores were worth for {target}", text, "AUC of the test images:"]
    page += [markdown_table(truth.reset_index()), "Tau: weighted Kendall, 1 is perfect, empty: all scores are equal."]
    write_text(folder / "agreement.md", "\n\n".join([*page, markdown_table(agreement)]))
    if figures:
        figure = plot_scores_against_auc(table.drop("scratch"), truth.loc["scratch", "auc"], synthetic=synthetic)
        save_figure(figure, folder / "agreement.png")
    print(text)
    return agreement


def _predictions(job: Job) -> pd.DataFrame:
    """A patient may be called NA: only what is empty is missing."""
    text = {"subject": str, "name": str}
    return pd.read_csv(job.output_dir / "predictions.csv", dtype=text, keep_default_na=False, na_values=[""])


def truth_table(jobs: Mapping[str, Job]) -> pd.DataFrame:
    """Source -> AUC of the test images, as it was measured, with its interval, best first."""
    rows = {}
    for name, job in jobs.items():
        table = _predictions(job)
        table = table[table["split"] == "test"]
        low, high = auc_interval(table)
        rows[name] = {"auc": _auc(job, "test"), "auc_low": low, "auc_high": high, "val_auc": _auc(job, "val")}
        rows[name] |= {"test_images": len(table)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("source").sort_values("auc", ascending=False)


def rankers(ready: pd.DataFrame, static: Mapping[str, float] | None = None) -> dict[str, pd.Series]:
    """Ranker -> source -> score, higher is better: the metrics, and rankers that never look at the target."""
    found = {LABELS[metric]: ready[metric] for metric in LABELS if metric in ready}
    found |= {"source's own AUC": ready["own_auc"], "source size": ready["images"]}
    if static is not None:
        found["static"] = pd.Series(static).reindex(ready.index)
    return {name: values.astype(float) for name, values in found.items() if values.notna().any()}


def agreement_table(ready: pd.DataFrame, truth: pd.Series, static: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Each ranker against the truth: ``ranker, pick, regret`` (AUC that its first choice loses to the best source, the
    mean over sources of equal score) and ``tau`` (weighted Kendall; NaN where all scores are equal).
    """
    rows = []
    chance = {"random": pd.Series(0.0, ready.index)}
    for name, values in (rankers(ready, static) | chance).items():
        first = values.index[values == values.max()]
        pick = first[0] if len(first) == 1 else f"{len(first)} alike"
        regret = float(truth.max() - truth[first].mean())
        tau = weighted_kendall(values.to_dict(), truth.to_dict())
        rows.append({"ranker": name, "pick": pick, "regret": regret, "tau": tau})
    return pd.DataFrame(rows)


def _evaluation_text(target: str, truth: pd.DataFrame, agreement: pd.DataFrame, synthetic: bool) -> str:
    sources, scratch = truth.drop("scratch"), truth.loc["scratch", "auc"]
    by = agreement.set_index("ranker")
    least = by["regret"].idxmin()
    text = (
        f"Fine-tuned on {target} (all parameters), the best of {len(sources)} sources is {sources.index[0]}: AUC "
        f"{sources['auc'].iloc[0]:.3f} (95 % interval {sources['auc_low'].iloc[0]:.3f} to "
        f"{sources['auc_high'].iloc[0]:.3f}) on {int(truth['test_images'].iloc[0])} test images, the worst has "
        f"{sources['auc'].iloc[-1]:.3f}, training from scratch {scratch:.3f}, better than "
        f"{int((sources['auc'] < scratch).sum())} of them. {least} has the smallest regret, "
        f"{by.loc[least, 'regret']:.3f}; a random choice loses {by.loc['random', 'regret']:.3f} on average."
    )
    return text + (" These are synthetic data, which say nothing about a clinic." if synthetic else "")


def plot_scores_against_auc(table: pd.DataFrame, scratch: float, *, title: str = "", synthetic: bool = False) -> Figure:
    """A panel for each score: score (x) against AUC after fine-tuning (y), one dot per source; dashed: scratch."""
    scores = [name for name in LABELS if name in table and np.isfinite(table[name].astype(float)).any()]
    columns = min(4, len(scores))
    figure = Figure(figsize=(2.6 * columns, 2.3 * -(-len(scores) // columns) + 0.7), layout="constrained")
    axes = figure.subplots(-(-len(scores) // columns), columns, squeeze=False, sharey=True)
    for panel, name in zip(axes.flat, scores, strict=False):
        panel.scatter(table[name].astype(float), table["auc"], s=22, color=BLUE, linewidths=0)
        panel.axhline(scratch, color=GREY, linestyle="--", linewidth=0.8)
        panel.set_title(LABELS[name], loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    for panel in axes.flat[len(scores) :]:
        panel.axis("off")
    for panel in axes[:, 0]:
        panel.set_ylabel("AUC")
    figure.suptitle(title or "Score against AUC after fine-tuning", fontsize=11, fontweight="bold", x=0.01, ha="left")
    note = ("synthetic phantom; " if synthetic else "") + "dashed: training from scratch"
    figure.supxlabel(note, fontsize=7, color=GREY, x=0.01, ha="left")
    return figure


def rank_own_model(
    pool: Sequence[Source],
    observed: Mapping[str, Seen],
    *,
    metrics: Sequence[str],
    cross_domain: bool,
    output_dir: str,
) -> pd.DataFrame | None:
    """Where each score would rank the target's own model, had it been a candidate; ``own_model.csv``.

    A score of feature quality alone finds no better source for a data set than the data set itself. LP x FU is 0 for
    a model that need not change (the paper's point). None where no source is the target's own model.
    """
    own = [source.name for source in pool if source.own]
    if not own or idist.get_rank() != 0:
        return None
    table = score_table(pool, observed, metrics=metrics, cross_domain=cross_domain, with_own=True)
    ranks = table[list(metrics)].rank(ascending=False, method="min", na_option="bottom").loc[own[0]]
    found = pd.DataFrame({"score": [LABELS[name] for name in ranks.index], "rank": ranks.to_numpy(int)})
    found["candidates"] = len(table)
    write_csv(Path(output_dir) / "own_model.csv", found)
    return found
