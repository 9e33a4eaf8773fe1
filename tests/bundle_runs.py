"""How the tests of the bundles run a bundle: in this process, or as users start it."""

import glob
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fire.parser import DefaultParseValue  # how the command line reads a word
from monai.bundle import ConfigWorkflow
from monai.networks.nets import UNet

from medtl_ext import InputError
from medtl_ext.data import write_collection
from medtl_ext.transfer import Job, Source
from medtl_ext.transfer.sources.pool import pretraining_job

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bundle:
    """A bundle of the repository, with the small settings that its ``train.json`` gets in tests.

    ``whole`` is what a run has that leaves nothing out.
    """

    name: str
    tiny: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def root(self) -> Path:
        return REPOSITORY / "bundles" / self.name

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    def content(self, config: str) -> dict[str, Any]:
        return json.loads((self.configs / f"{config}.json").read_text())

    def workflow(self, *overlays: str, base: str = "train", **options: Any) -> ConfigWorkflow:
        files = [str(self.configs / f"{name}.json") for name in (base, *overlays)]
        settings = {**self.tiny, **options} if base == "train" else options
        kind = "infer" if base == "inference" else "train"
        return ConfigWorkflow(config_file=files, workflow_type=kind, **settings)

    def run(self, *overlays: str, base: str = "train", **options: Any) -> ConfigWorkflow:
        workflow = self.workflow(*overlays, base=base, **options)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        return workflow

    def start(self, files: Sequence[str], options: Mapping[str, Any], **how: int) -> Popen:
        """Run the command of a user inside the bundle's folder; see `command`."""
        return start(files, options, cwd=self.root, **how)

    def settings(self, **options: Any) -> dict[str, Any]:
        """The small settings in the form of a study: those of the network are inside ``network``."""
        network, plain = self.content("train")["network_def"], {}
        for name, value in (dict(self.tiny) | options).items():
            part, _, key = name.partition("#")
            if part == "network_def":
                network[key] = value
            elif not key and name not in ("sources", "target_task"):
                plain[name] = value
        return plain | {"network_def": network}

    def pool_job(self, task: str, *overlays: str, network: Mapping[str, Any] | None = None, **options: Any) -> Job:
        """The pre-training of a source task with these options."""
        config = self.workflow(*overlays, **options).parser.get() | {"bundle_root": str(self.root)}
        entry = {"task": task, "network": network}
        return pretraining_job(config, "sources", Source(task, "task", entry=entry, task=task), seed=0)


ALL = [Bundle(path.name) for path in sorted((REPOSITORY / "bundles").iterdir())]
SEGMENTATION = {
    "spacing": [6.2, 6.2, 8.0],
    "roi_size": [32, 32],
    "epochs": 1,
    "batch_size": 4,
    "n_jobs": 1,
    "figures": False,
    "progress": False,
    "check_data": False,
}
ARMS = ["zero_shot", "scratch", "full"]
RECIPES = ["warmup", "discriminative", "surgical_first", "surgical_last", "affine", "adabn", "lp_ft", "ema", "swa"]
RECIPES += ["l2_sp", "bss", "distillation", "joint", "wise_ft", "tversky", "focal", "lora", "spatial_adapter"]
OF_SEEDS = ["soup", "ensemble"]
"""Overlays of risk_map that are ways of the field to fine-tune."""
RISK_MAP = Bundle(
    "risk_map",
    SEGMENTATION | {"iterations_per_epoch": 2, "train_slices": 8, "audit#arms": [], "audit#folds": 0},
    whole={"figures": True, "check_data": True, "audit#arms": ARMS},
)
SOURCE_SELECTION = Bundle(
    "source_selection",
    SEGMENTATION
    | {
        "sources": ["14-T2-ED", "14-FLAIR-ED", "14-T2-ET"],
        "network_def#features": [4, 4, 8, 8, 8, 4],
        "pool_epochs": 1,
        "iterations_per_epoch": 4,
        "train_slices": 16,
        "pixels": 40,
        "n_resamples": 50,
    },
    whole={"figures": True, "check_data": True},
)
SETTLED = replace(
    SOURCE_SELECTION,
    whole={
        "figures": True,
        "settle": True,
        "minimum_gap": 1.0,
        "metrics": ["h_score"],
    },
)
"""The best of three sources does not lead the second by the whole range: these two and scratch are fine-tuned."""
SEQUENTIAL = Bundle(
    "sequential_transfer",
    SEGMENTATION
    | {
        "target_task": "17-T2-ED",
        "sources": ["14-T2-ED", "14-FLAIR-ED", "14-T2-ET"],
        "affinity": "context",
        "affinity_patients": 2,
        "n_clusters": 1,
        "source_patients": 3,
        "stage_patients": 1,
        "network_def#features": [4, 4, 8, 8, 8, 4],
        "pool_epochs": 1,
        "iterations_per_epoch": 4,
    },
    whole={"figures": True, "check_data": True},
)
DATASETS = Bundle(
    "dataset_transferability",
    {
        "target_task": "17-T2-tumour",
        "sources": ["14-T2-tumour", "14-FLAIR-level", "14-ALL-modality"],
        "image_size": 32,
        "network_def#layers": [1, 1, 1, 1],
        "network_def#block_inplanes": [16, 16, 32, 32],
        "train_per_class": 24,
        "val_per_class": 8,
        "pool_epochs": 2,
        "epochs": 1,
        "iterations_per_epoch": 2,
        "batch_size": 16,
        "n_resamples": 40,
        "n_jobs": 1,
        "figures": False,
        "progress": False,
    },
    whole={"figures": True},
)


def toy_collection(folder: Path) -> Path:
    """A collection of two institutions, A and B, whose files are never opened."""
    files = {"images": dict.fromkeys(("T1", "T2", "FLAIR"), "i"), "labels": {"tumour": "l"}}
    subjects = [
        {"id": f"{institution}{number}", "institution": institution, "split": split} | files
        for institution in "AB"
        for number, split in enumerate(["train", "train", "val", "test"])
    ]
    objectives = {"ED": {"label": "tumour", "values": [1]}, "both": {"label": "tumour", "values": [1, 2]}}
    content = {"name": "toy", "labels": {"tumour": {"ED": 1, "ET": 2}}, "objectives": objectives, "subjects": subjects}
    return write_collection(folder / "collection.json", content)


def collection_of_one_class(folder: Path, subjects: Sequence[Mapping[str, Any]], label: str = "tumour") -> Path:
    """A collection whose label files have one class, ED, of value 1."""
    objectives = {"ED": {"label": label, "values": [1]}}
    content = {"name": "small", "labels": {label: {"ED": 1}}, "objectives": objectives, "subjects": list(subjects)}
    return write_collection(folder / "collection.json", content)


def mnist_arrays(shape=(28, 28), counts=(12, 8, 8), n_classes: int = 2, seed: Any = 0) -> dict[str, np.ndarray]:
    """The arrays of a MedMNIST file: noise whose brightness is the class."""
    generator, arrays = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        labels = np.arange(count) % n_classes
        noise = generator.integers(0, 100, (count, *shape)) + 60 * labels.reshape(-1, *[1] * len(shape))
        arrays |= {f"{split}_images": noise.astype(np.uint8), f"{split}_labels": labels[:, None]}
    return arrays


def bundle_of_a_stranger(folder: Path, config: Any, weights: Any = None) -> None:
    """A MONAI bundle that has only a config (its content, or its text) and weights."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        torch.save(weights, folder / "models" / "model.pt")


def card_of_a_unet(folder: Path, dimensions: int, classes: list[str], **network: Any) -> str:
    """The card of another person's untrained network, with its own preprocessing and grid."""
    torch.manual_seed(0)
    shape = {"in_channels": 1, "out_channels": len(classes), "channels": [4, 8], "strides": [2], **network}
    torch.save(UNet(spatial_dims=dimensions, **shape).state_dict(), folder / "theirs.pt")
    steps = [{"_target_": "Spacingd", "pixdim": [3, 3, 4]}, {"_target_": "NormalizeIntensityd", "nonzero": True}]
    content = {"checkpoint": "theirs.pt", "network": {"_target_": "UNet", "spatial_dims": dimensions, **shape}}
    content |= {"preprocessing": steps, "window": [32, 32, 8][:dimensions], "classes": classes, "encoder": "model.0"}
    (folder / "theirs.json").write_text(json.dumps(content))
    return str(folder / "theirs.json")


def command(
    files: Sequence[str], options: Mapping[str, Any], *, processes: int = 0, node: int | None = None
) -> list[str]:
    """The command that a user types. Lists and dictionaries are written as in Python, because they are read so.

    With torchrun: on several processes of one machine, or as one of two machines.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    if node is not None:
        at = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", "--master_port=29517"]
        launcher = ["-m", "torch.distributed.run", *at]
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", str(value) if isinstance(value, str | list | dict) else json.dumps(value)]
    config = files[0] if len(files) == 1 else str(list(files))
    return [sys.executable, *launcher, "-m", "monai.bundle", "run", "--config_file", config, *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def start(files: Sequence[str], options: Mapping[str, Any], *, cwd: Path = REPOSITORY, **how: int) -> Popen:
    return Popen(
        command(files, options, **how),
        cwd=cwd,
        env=environment(),
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        start_new_session=True,  # the workers of its jobs can be killed with it
    )


def finish(process: Popen) -> str:
    """Wait for success; returns what was printed."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    return output


def kill_once_there(process: Popen, pattern: str | Path, *, seconds: float = 300) -> None:
    """Kill a process and its workers as soon as a file matches the pattern; this must be before the process ends.

    Uses the module ``glob``: if a temporary folder disappears during the search, ``Path.glob`` raises an error.
    """
    began = time.monotonic()
    while not glob.glob(str(pattern), recursive=True):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() - began < seconds, f"no {pattern} after {seconds} s"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trainings(folder: Path) -> dict[Path, int]:
    """Every training below the folder, and when its last epoch was saved: unchanged if nothing was trained again."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("last.pt")}


def refused(action: Callable[[], Any]) -> str:
    """The text of the `InputError` that the call raises; it must be one line."""
    with pytest.raises((InputError, RuntimeError)) as caught:
        action()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None, "no InputError among the causes"
    assert "\n" not in str(error)
    return str(error)


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def ranking_of(folder: str | Path) -> pd.DataFrame:
    return pd.read_csv(Path(folder) / "ranking.csv").set_index("source")


def next_command(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The config that a ranking recommends to run next, and its options as the command line reads them."""
    return command_in(read_json(Path(folder) / "ranking.json")["command"])


def command_in(page: str) -> tuple[str, dict[str, Any]]:
    """The same for the first command on a page."""
    words = shlex.split(next(line for line in page.splitlines() if line.startswith("python -m")))
    assert words[:5] == ["python", "-m", "monai.bundle", "run", "--config_file"]
    given = {name[2:]: DefaultParseValue(value) for name, value in zip(words[6::2], words[7::2], strict=True)}
    return words[5], given
