"""The runs around a run: pre-train the source, score, audit the transfer, compare methods."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader
from monai.engines import Evaluator, SupervisedEvaluator
from torch import Tensor
from torch.utils.data import Dataset

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError, require_choice
from medtl_ext.bundle import Job, current_config, deciding_parts, kept_model, run_jobs, settings_of, study_config
from medtl_ext.data import Collection, SliceDataset, Task, cached_phantom, check_collection, load_collection
from medtl_ext.data.collection import SPLITS
from medtl_ext.data.integrity import require_volumes
from medtl_ext.networks import load_weights
from medtl_ext.report import audit_report, compare_report
from medtl_ext.visualize import plot_montage, plot_overlay, plot_risk_maps, save_figure

__all__ = [
    "check_data",
    "compare_methods",
    "draw_results",
    "images_to_segment",
    "open_collection",
    "pretrained_source",
    "score",
    "transfer_audit",
]

logger = logging.getLogger(__name__)

PHANTOM_SUBJECTS = 24
AUDIT_ARMS = ("zero_shot", "scratch", "full")


def open_collection(path: str | None, task: str, *, subjects: int = PHANTOM_SUBJECTS) -> Collection:
    """The collection to find ``task`` in: a file, or (None) ``subjects`` phantoms of the task's institution."""
    if path is None:
        path = cached_phantom(institutions=[Task(task).institution], subjects=subjects, seed=0)
    return load_collection(path)


def check_data(collection: Collection, task: str, splits: Iterable[str] = SPLITS) -> None:
    """Read every file of a task before anything long runs; raise on the first error, log the warnings."""
    for split in splits:
        collection.datalist(task, split)  # raises where a split has no subject
    report = check_collection(collection, [Task(task)], progress=False)
    report.raise_for_errors()
    for issue in report.warnings:
        logger.warning("%s", issue)


def pretrained_source(folder: str, task: str, *, seed: int = 0) -> str:
    """Path of a network trained on ``task`` by ``pretrain.json`` of the same bundle; trained once and kept."""
    job = pretraining_job(current_config(), folder, task, seed=seed)
    if not job.done:
        splits = {"train", job.config["val_split"], "test"}
        source = open_collection(job.overrides["collection"], task, subjects=job.config["phantom_subjects"])
        check_data(source, task, splits)
    return kept_model(job)


def pretraining_job(config: Mapping[str, Any], folder: str | Path, task: str, *, seed: int) -> Job:
    """The run of ``pretrain.json`` on ``task``; its folder's name holds a hash of all settings that matter.

    Of a collection it holds the content, wherever it lies: other patients, splits or files give another folder.

    Raises:
        InputError: the collection is missing or breaks the format.
    """
    overlay = Path(config["bundle_root"]) / "configs" / "pretrain.json"
    source_collection = config.get("source_collection")
    if source_collection == "@collection":
        source_collection = config.get("collection")
    overrides = {
        "source_task": task,
        "target_task": task,
        "collection": source_collection,
        "source_collection": source_collection,
        "source_ckpt": None,
        "seed": seed,
        "check_data": True,
    }
    merged = {**config, **json.loads(overlay.read_text()), **overrides}
    need_a_source = ("weight_map", "leep")
    parts = {name: part for name, part in deciding_parts(merged).items() if name not in need_a_source}
    settings = settings_of(merged)
    if source_collection is not None:
        content = load_collection(source_collection).fingerprint
        settings |= {"collection": content, "source_collection": content}
    key = json.dumps([settings, parts], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return Job(config, Path(folder) / f"{task}_{digest}", overlays=[overlay], overrides=overrides)


def score(
    evaluator: Evaluator,
    loaders: Mapping[str, DataLoader],
    *,
    checkpoint: str,
    output_dir: str,
    method: str,
    seed: int,
) -> pd.DataFrame:
    """Score a trained network on the patients of each split and write ``metrics.csv``.

    Args:
        evaluator: MONAI evaluator with a `medtl_ext.handlers.SubjectTable`.
        loaders: split name -> the split's patients, in order of appearance in the table.
        checkpoint: weights of the evaluator's network to score.
        output_dir, method, seed: where the table goes and what its columns of these names say.

    Returns:
        The table: method, seed, split, subject, class, dice, iou, empty.
    """
    idist.barrier()  # the checkpoint is written by one process
    load_weights(getattr(evaluator.network, "module", evaluator.network), checkpoint, min_share=1.0)
    tables = []
    for split, loader in loaders.items():
        evaluator.data_loader = loader
        evaluator.state.epoch_length = len(loader)
        evaluator.run()
        table = evaluator.state.subject_table
        table.insert(0, "split", split)
        tables.append(table)
    rows = pd.concat(tables, ignore_index=True)
    rows.insert(0, "seed", seed)
    rows.insert(0, "method", method)
    for split, of in rows.groupby("split", sort=False):
        patients = of["patient"].fillna(of["subject"]) if "patient" in of else of["subject"]
        dice = of.groupby(patients)["dice"].mean()
        logger.info("%s: Dice %.3f over %d %s patients", method, dice.mean(), len(dice), split)
    if idist.get_rank() == 0:
        with atomic_path(Path(output_dir) / "metrics.csv") as temporary:
            rows.to_csv(temporary, index=False)
    return rows


def transfer_audit(*, method: str, output_dir: str, same_classes: bool, synthetic: bool, n_jobs: int | None) -> None:
    """Finish the other ways to use the labels, compare all on the validation patients, and say what to do.

    The other ways are the untouched source (if its classes can be read as the target's), training from scratch, and
    fine-tuning all parameters with Dice + cross-entropy and augmentation. Each is a run of its own below
    ``output_dir/audit`` and is kept.
    """
    if idist.get_rank() != 0:
        return
    config = current_config()
    folder = Path(output_dir)
    configs = Path(config["bundle_root"]) / "configs"
    arms = [arm for arm in AUDIT_ARMS if arm != method and (same_classes or arm != "zero_shot")]
    if not same_classes:
        logger.info("audit without zero-shot: source and target have different numbers of classes")
    overrides = {"audit": False, "check_data": False}
    jobs = [Job(config, folder / "audit" / arm, [configs / f"{arm}.json"], overrides) for arm in arms]
    run_jobs(jobs, n_jobs=n_jobs, description="transfer audit")
    tables = [pd.read_csv(path / "metrics.csv") for path in (folder, *(job.output_dir for job in jobs))]
    verdict = audit_report(pd.concat(tables, ignore_index=True), folder, method=method, synthetic=synthetic)
    logger.info("%s", verdict.text)


def draw_results(
    *,
    evaluator: SupervisedEvaluator,
    training: SliceDataset,
    patients: Dataset,
    method: str,
    class_names: Sequence[str],
    output_dir: str,
    synthetic: bool,
    n_patients: int = 3,
) -> None:
    """Draw the weights of the loss (``maps.png``) and segmented slices of test patients (``overlay.png``).

    Args:
        evaluator: its network and inferer segment the patients, with the weights of this run and of its audit.
        training: the slices trained on, with their weight maps if they have their own.
        patients: volumes with ``image``, ``label`` and ``subject``; the first few are drawn, each in the slice that
            holds most foreground.
        method, class_names, output_dir, synthetic: what was run, of which the pictures are.
        n_patients: how many rows.
    """
    if idist.get_rank() != 0:
        return
    folder = Path(output_dir)
    maps = [folder / f"leep_{when}.nii.gz" for when in ("before", "after")]
    if all(path.is_file() for path in maps):
        image = torch.stack([item["image"][0] for item in training.plain()]).mean(0)
        before, after = (nib.load(path).get_fdata()[..., 0] for path in maps)
        figure = plot_risk_maps(before, after, image=image, quantity="leep", title=method, synthetic=synthetic)
        save_figure(figure, folder / "maps.png")
    elif "weight" in training.plain()[0]:
        items = [training.plain()[i] for i in np.linspace(0, len(training) - 1, n_patients).astype(int)]
        rows = {f"{item['subject']}, slice {item['slice']}": _panels(item) for item in items}
        save_figure(plot_montage(rows, title=method, synthetic=synthetic), folder / "maps.png")

    arms = {arm: folder / "audit" / arm / "model.pt" for arm in AUDIT_ARMS} | {method: folder / "model.pt"}
    arms = {arm: path for arm, path in arms.items() if path.is_file()}
    items = [patients[i] for i in range(min(n_patients, len(patients)))]
    places = [int(item["label"][0].flatten(0, 1).gt(0).sum(0).argmax()) for item in items]
    figure = plot_overlay(
        [item["image"][0, ..., z] for item, z in zip(items, places, strict=True)],
        [item["label"][0, ..., z] for item, z in zip(items, places, strict=True)],
        {arm: _segment(evaluator, path, items, places) for arm, path in arms.items()},
        subjects=[item["subject"] for item in items],
        class_names=class_names,
        synthetic=synthetic,
    )
    save_figure(figure, folder / "overlay.png")


def _panels(item: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"image": item["image"][0], "label": item["label"][0].int(), "weight": item["weight"][0]}


def _segment(evaluator: SupervisedEvaluator, path: Path, items: Sequence[Any], places: Sequence[int]) -> list[Tensor]:
    """Labels of one slice of each volume by the evaluator's network with the weights of a checkpoint."""
    load_weights(evaluator.network, path, min_share=1.0)
    evaluator.network.eval()
    device = evaluator.state.device
    with torch.no_grad():
        logits = (evaluator.inferer(item["image"][None].to(device), evaluator.network)[0] for item in items)
        return [volume[..., z].argmax(0).cpu() for volume, z in zip(logits, places, strict=True)]


def compare_methods(
    *,
    output_dir: str,
    pairs: Sequence[Sequence[str]],
    methods: Sequence[str],
    runs: Sequence[Mapping[str, int]],
    train_slices: Sequence[int],
    settings: Mapping[str, Any],
    n_jobs: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Fine-tune with every method on every pair, sample size, source checkpoint and seed, and report on test patients.

    Runs that are done are kept, so an interrupted comparison continues. Training from scratch needs no source, and the
    untouched source no seed: they run once for each distinct result.

    Args:
        output_dir: gets ``runs/``, ``comparison.csv``, ``comparison.md`` and ``comparison.png``.
        pairs: (source task, target task) each.
        methods: names of overlay configs beside ``train.json``.
        runs: the repetitions, ``{"seed": ..., "source_seed": ...}`` each. A seed draws target slices, fresh weights and
            batches; a source seed stands for another pre-trained source checkpoint.
        train_slices: numbers of labelled target slices.
        settings: options of ``train.json`` for all runs.
        n_jobs: runs at a time; one per core by default.
        backend: see `medtl_ext.bundle.run_jobs`.
    """
    config = study_config(output_dir, settings) | {"audit": False}
    root = Path(config["bundle_root"])
    for method in methods:
        require_choice("method", method, sorted(path.stem for path in (root / "configs").glob("*.json")))
    for target in dict.fromkeys(target for _, target in pairs):
        collection = open_collection(config["collection"], target, subjects=config["phantom_subjects"])
        check_data(collection, target, {"train", config["val_split"], "test"})
    sources = {
        (task, seed): pretraining_job(config, config["source_dir"], task, seed=seed)
        for task, seed in product({source for source, _ in pairs}, {run["source_seed"] for run in runs})
    }
    run_jobs(list(sources.values()), n_jobs=n_jobs, backend=backend, description="pre-training")

    jobs: dict[Path, Job] = {}
    rows: dict[Path, dict[str, Any]] = {}
    for slices, run, (source, target), method in product(train_slices, runs, pairs, methods):
        seed, source_seed = run["seed"], run["source_seed"]
        folder = Path(output_dir) / "runs" / f"{source}_to_{target}" / str(slices) / method
        row = {"pair": f"{source} -> {target}", "slices": slices, "method": method}
        if method != "scratch":
            folder /= f"source{source_seed}"
            row["source_seed"] = source_seed
        if method != "zero_shot":
            folder /= f"seed{seed}"
            row["seed"] = seed
        overrides = {
            "source_task": source,
            "target_task": target,
            "source_ckpt": str(sources[source, source_seed].output_dir / "model.pt"),
            "train_slices": slices,
            "seed": seed,
            "check_data": False,
        }
        if folder not in rows:
            jobs[folder] = Job(config, folder, [root / "configs" / f"{method}.json"], overrides)
            rows[folder] = {"seed": np.nan, "source_seed": np.nan} | row
    run_jobs(list(jobs.values()), n_jobs=n_jobs, backend=backend, description="comparison")

    scores = {folder: pd.read_csv(folder / "metrics.csv").drop(columns=["method", "seed"]) for folder in jobs}
    table = pd.concat([scores[folder].assign(**row) for folder, row in rows.items()], ignore_index=True)
    synthetic = open_collection(config["collection"], pairs[0][1], subjects=config["phantom_subjects"]).synthetic
    compare_report(table, output_dir, synthetic=synthetic)
    return table


def images_to_segment(input_dir: str | None, task: str) -> list[dict[str, str]]:
    """The NIfTI images in a folder, or (None) those of the phantom's test patients of ``task``.

    Raises:
        InputError: there is no such folder, no NIfTI file in it, or one that is not a single 3D volume.
    """
    if input_dir is None:
        return [{"image": item["image"]} for item in open_collection(None, task).datalist(Task(task), "test")]
    path = Path(input_dir)
    files = [path] if path.is_file() else sorted(path.glob("*"))
    images = [file for file in files if file.name.lower().endswith((".nii", ".nii.gz"))]
    if not images:
        raise InputError(f"no NIfTI image (*.nii, *.nii.gz) in {input_dir}; give an image or their folder.")
    stems = [file.name.split(".nii")[0] for file in images]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise InputError(f"{input_dir} holds two images called {twice[0]}, whose segmentations would be one file.")
    require_volumes(images, progress=True)
    return [{"image": str(image)} for image in images]
