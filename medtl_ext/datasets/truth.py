"""The ground truth: every source fine-tuned on the target, and what the rankings were worth, for one target or many."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from medtl_ext.datasets.sources import Source, dataset_name, dataset_path, find_sources, pretraining_job
from medtl_ext.networks import load_weights
from medtl_ext.ranking import baseline_rankings, friedman_nemenyi, weighted_kendall
from medtl_ext.report import markdown_table
from medtl_ext.visualize import plot_critical_difference, save_figure

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
        write_csv(Path(output_dir) / "predictions.csv", pd.concat(tables))
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
    for column in [column for column in table if column[0] == "p" and column[1:].isdigit()]:
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


def truth_table(jobs: Mapping[str, Job]) -> pd.DataFrame:
    """Source -> AUC of the test images with its interval, best first."""
    rows = {}
    for name, job in jobs.items():
        table = pd.read_csv(job.output_dir / "predictions.csv", dtype={"subject": str, "name": str})
        table = table[table["split"] == "test"]
        low, high = auc_interval(table)
        rows[name] = {"auc": image_auc(table), "auc_low": low, "auc_high": high, "val_auc": _auc(job, "val")}
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


def study_datasets(
    *,
    output_dir: str,
    targets: Sequence[str],
    sources: Sequence[str],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[float]],
    settings: Mapping[str, Any],
    n_jobs: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Score and fine-tune every source on several targets, with several seeds, and say what the rankings were worth.

    A seed draws the target's images and the fine-tuning; the pool is the same. A target that is among the sources is
    scored as its own model, and never ranked. Runs that are done are kept. Writes ``study.csv`` (a row per target, seed
    and source), ``agreement.csv``, ``study.md`` and ``critical_difference.png``.

    Args:
        output_dir: gets ``runs/`` and the results.
        targets, sources: datasets, see `medtl_ext.datasets.open_dataset`.
        seeds: the repetitions.
        grid: see `evaluate_ranking`.
        settings: options of ``train.json`` for all runs.
        n_jobs: runs at a time; one per core by default.
        backend: see `medtl_ext.bundle.run_jobs`.
    """
    if len(targets) < 2:
        raise InputError(f"a study needs two targets or more; found {list(targets)}.")
    root = Path(current_config()["bundle_root"])
    train = json.loads((root / "configs" / "train.json").read_text())
    config = train | {"source_dir": str(root / "models" / "sources")} | dict(settings)
    config |= {"bundle_root": str(root), "sources": list(sources)}
    where = {key: config[name] for key, name in (("collection", "collection"), ("subjects", "phantom_subjects"))}
    for data in targets:
        dataset_path(data, **where)  # phantoms are made here, not by several processes at once
    found = find_sources(sources, target="", image_size=config["image_size"], **where)
    jobs = {
        source.name: pretraining_job(config, config["source_dir"], source, seed=config["pool_seed"]) for source in found
    }
    run_jobs(list(jobs.values()), n_jobs=n_jobs, backend=backend, description="pre-training the pool")
    pool = [replace(one, checkpoint=str(jobs[one.name].output_dir / "model.pt")) for one in found]
    scorings, finetunings = {}, []
    for target, seed in product(targets, seeds):
        folder = Path(output_dir) / "runs" / Path(target).stem / f"seed{seed}"
        options = {"target_task": target, "seed": seed}
        for source in [source for source in pool if source.data != target] + [None]:
            place = folder / "finetune" / (source.name if source else "scratch")
            finetunings += finetuning_jobs(config, place, source, grid, **options)
        overlay, overrides = [root / "configs" / "evaluate.json"], options | {"grid": dict(grid)}
        scorings[Path(target).stem, seed] = Job(config, folder, overlay, overrides, result="agreement.md")
    run_jobs(finetunings, n_jobs=n_jobs, backend=backend, description="fine-tuning every source")
    # The runs of evaluate.json find all their trainings done.
    run_jobs(list(scorings.values()), n_jobs=n_jobs, backend=backend, description="scoring")
    tables = {name: _read_all(scorings, f"{name}.csv") for name in ("truth", "own_model")}
    verdicts = {key: json.loads((job.output_dir / "ranking.json").read_text()) for key, job in scorings.items()}
    synthetic = any(verdict["synthetic"] for verdict in verdicts.values())
    study_report(tables["truth"], tables["own_model"], verdicts, output_dir, synthetic=synthetic)
    return tables["truth"]


def _read_all(jobs: Mapping[tuple[str, int], Job], name: str) -> pd.DataFrame:
    """A table of every run, where it is, with the run's target and seed."""
    tables = [
        pd.read_csv(job.output_dir / name).assign(target=target, seed=seed)
        for (target, seed), job in jobs.items()
        if (job.output_dir / name).is_file()
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def study_report(
    table: pd.DataFrame,
    own_model: pd.DataFrame,
    verdicts: Mapping[tuple[str, int], Mapping[str, Any]],
    output_dir: str | Path,
    *,
    synthetic: bool = False,
) -> pd.DataFrame:
    """What the rankings of a study were worth over its targets; see `study_datasets` for the files.

    Args:
        table: a row per target, seed and source (and ``scratch``) with ``auc`` and the scores.
        own_model: of `rank_own_model`, with ``target`` and ``seed``; may be empty.
        verdicts: (target, seed) -> what ``ranking.json`` says.
        output_dir: where the files go.
        synthetic: the data are synthetic.

    Returns:
        The agreement of every ranker on every target and seed.
    """
    sources = table[table["source"] != "scratch"]
    parts = []
    for (target, seed), group in sources.groupby(["target", "seed"], sort=False):
        ready = group.set_index("source")
        part = agreement_table(ready, ready["auc"], static=_static(sources, target, seed))
        parts.append(part.assign(target=target, seed=seed))
    agreement = pd.concat(parts, ignore_index=True)
    # A ranker that scores all sources alike chooses at random: its expected tau is 0.
    mean = (
        agreement.fillna({"tau": 0.0}).groupby(["ranker", "target"], sort=False)[["tau", "regret"]].mean().reset_index()
    )
    test = friedman_nemenyi(mean.pivot(index="target", columns="ranker", values="tau"))
    claims = [f"**Do the rankers differ?** By weighted Kendall: {test.text}", _baseline_claim(mean)]
    claims += [_scratch_claim(table), _verdict_claim(sources, verdicts)]
    claims += [_own_claim(own_model)] if len(own_model) else []
    folder = Path(output_dir)
    write_csv(folder / "study.csv", table)
    write_csv(folder / "agreement.csv", agreement)
    summary = mean.groupby("ranker", sort=False)[["tau", "regret"]].mean().sort_values("tau", ascending=False)
    write_text(folder / "study.md", _study_page(table, summary, claims, synthetic))
    figure = plot_critical_difference(
        test.average_ranks.to_dict(),
        critical_difference=test.critical_difference,
        groups=test.groups,
        title="Rankers over targets, by weighted Kendall",
        synthetic=synthetic,
    )
    save_figure(figure, folder / "critical_difference.png")
    print("\n".join(claims))
    return agreement


def _static(sources: pd.DataFrame, target: str, seed: int) -> dict[str, float]:
    """How well each source did on the other targets, as minus its rank: what a ranker knows that ignores the target."""
    others = sources[(sources["target"] != target) & (sources["seed"] == seed)]
    known = {name: group.set_index("source")["auc"].to_dict() for name, group in others.groupby("target")}
    names = sorted(sources.loc[(sources["target"] == target) & (sources["seed"] == seed), "source"])
    return (-baseline_rankings(names, other_targets=known)["static"]).to_dict()


def _baseline_claim(mean: pd.DataFrame) -> str:
    means = mean.groupby("ranker")[["tau", "regret"]].mean()
    tau = mean.pivot(index="target", columns="ranker", values="tau")
    baselines = [name for name in ("static", "source size", "source's own AUC", "random") if name in tau]
    scores = [label for label in LABELS.values() if label in tau]
    winners = [score for score in scores if all((tau[score] > tau[baseline]).all() for baseline in baselines)]
    best, least = means.loc[scores, "tau"].idxmax(), means.loc[scores, "regret"].idxmin()
    said = ", ".join(f"{name} {means.loc[name, 'tau']:.2f} ({means.loc[name, 'regret']:.3f})" for name in baselines)
    return (
        f"**Does a score beat the baselines?** Best mean tau: {best}, {means.loc[best, 'tau']:.2f}; least regret: "
        f"{least}, {means.loc[least, 'regret']:.3f} AUC. Baselines, tau and regret: {said}. Ahead of every baseline on "
        f"every target: {', '.join(winners) or 'no score'}."
    )


def _scratch_claim(table: pd.DataFrame) -> str:
    auc = table.groupby(["target", "source"])["auc"].mean().unstack()
    scratch, rest = auc["scratch"], auc.drop(columns="scratch")
    best, worst = rest.max(axis=1), rest.min(axis=1)
    worse, pairs = int(rest.lt(scratch, axis=0).to_numpy().sum()), int(rest.notna().to_numpy().sum())
    return (
        f"**And scratch?** Training from scratch is better than the best source on {int((scratch > best).sum())} of "
        f"{len(auc)} targets, and better than {worse} of {pairs} fine-tuned sources: no score says so. The best and "
        f"the worst source are {(best - worst).mean():.3f} AUC apart on average."
    )


def _verdict_claim(sources: pd.DataFrame, verdicts: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    truth = {key: group.set_index("source")["auc"] for key, group in sources.groupby(["target", "seed"])}
    called = {key: verdict["recommendation"] for key, verdict in verdicts.items() if verdict["recommendation"]}
    right = sum(truth[key].idxmax() == source for key, source in called.items())
    held = sum(truth[key].idxmax() in verdict["tied"] for key, verdict in verdicts.items())
    regret = [
        truth[key].max() - truth[key][verdict["default"]] for key, verdict in verdicts.items() if verdict["default"]
    ]
    sizes = [len(verdict["tied"]) for verdict in verdicts.values()]
    return (
        f"**Is the verdict calibrated?** Of {len(verdicts)} rankings {len(called)} name one source, {right} of them "
        f"the best one; the tied set (mean size {np.mean(sizes):.1f}) holds the best source in {held}; the best guess "
        f"loses {np.mean(regret) if regret else np.nan:.3f} AUC on average."
    )


def _own_claim(own_model: pd.DataFrame) -> str:
    first = own_model.assign(first=own_model["rank"] == 1).groupby("score", sort=False)["first"].agg(["sum", "count"])
    said = ", ".join(f"{name} {row['sum']} of {row['count']}" for name, row in first.iterrows())
    return (
        f"**Is a target its own best source?** Ranked first among the candidates had it been one (the paper's argument "
        f"against scores of feature quality alone): {said}."
    )


def _study_page(table: pd.DataFrame, summary: pd.DataFrame, claims: Sequence[str], synthetic: bool) -> str:
    targets, seeds = table["target"].nunique(), table["seed"].nunique()
    n_sources = table.loc[table["source"] != "scratch", "source"].nunique()
    head = (
        f"{targets} targets, {n_sources} sources, {seeds} seeds; AUC of the test images after fine-tuning everything."
    )
    head += " **Synthetic phantom: these numbers say nothing about a clinic.**" if synthetic else ""
    auc = table.groupby(["source", "target"], sort=False)["auc"].mean().unstack()
    parts = ["# Dataset transferability studied", head, *[f"- {claim}" for claim in claims]]
    parts += ["## Rankers, mean over targets", markdown_table(summary.reset_index())]
    return "\n\n".join([*parts, "## AUC, mean over seeds", markdown_table(auc.reset_index())]) + "\n"
