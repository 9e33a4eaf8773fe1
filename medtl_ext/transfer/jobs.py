"""Runs of a config in folders of their own, through joblib: on this machine, or on a cluster."""

import copy
import io
import json
import logging
import multiprocessing
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import ignite.distributed as idist
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed
from monai.bundle import ConfigWorkflow
from tqdm import tqdm

from medtl_ext.transfer.config import claim_output, current_config, innermost_or_input_error, threads_for, writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of a config in its own folder.

    Args:
        config: content of the config to run, e.g. of `medtl_ext.transfer.config.current_config`.
        output_dir: the run's own folder.
        overlays: config files laid over it, in order.
        overrides: options that win over everything, as on the command line.
        result: the file in ``output_dir`` that the run writes last; where it exists, the job is done.
    """

    config: Mapping[str, Any]
    output_dir: Path
    overlays: Sequence[Path] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    result: str = "metrics.csv"

    @property
    def done(self) -> bool:
        return (self.output_dir / self.result).is_file()

    @property
    def model(self) -> str:
        """The network that it trains."""
        return str(self.output_dir / "model.pt")

    def read(self, name: str = "metrics.csv") -> pd.DataFrame:
        """A table that it wrote; a patient 007 is not 7, and one called NA is there."""
        return read_table(self.output_dir / name)

    def run(self, threads: int | None = None) -> None:
        """Run the config in this process, on so many threads; whoever runs it meanwhile is waited for."""
        lock = FileLock(writable(self.output_dir) / ".run.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process, which is running %s", self.output_dir)
            held = lock.acquire()
        with held:
            if not self.done:
                self._run(threads)

    def _run(self, threads: int | None) -> None:
        if "RANK" in os.environ:
            _be_the_only_rank()
        configs = Path(self.config["bundle_root"]) / "configs"
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "config.json"
            base.write_text(json.dumps(dict(self.config)))
            logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # where the config lies is no news
            workflow = ConfigWorkflow(
                config_file=[str(base), *map(str, self.overlays)],
                meta_file=str(configs / "metadata.json"),
                logging_file=str(configs / "logging.conf"),
                workflow_type="train",
                **{"output_dir": str(self.output_dir), "progress": False, "figures": False, **self.overrides},
            )
            logging.getLogger().setLevel(logging.WARNING)
            try:
                workflow.initialize()
                if threads:
                    torch.set_num_threads(threads)
                workflow.run()
            finally:
                workflow.finalize()


def _be_the_only_rank() -> None:
    """Make this process, started by a rank of a distributed run, a distributed run of one: its config expects one."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any port that is free


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A table that a run wrote; a patient 007 is not 7, and one called NA is there."""
    text = dict.fromkeys(("subject", "patient", "name"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def run_jobs(
    jobs: Sequence[Job], *, n_jobs: int | None = None, backend: str | None = None, description: str = "runs"
) -> None:
    """Run the jobs that are not done yet, several at a time, with a progress bar.

    Args:
        jobs: each writes its own folder, so that an interrupted series continues where it stopped.
        n_jobs: how many at a time; by default one per core. The cores are shared between them.
        backend: joblib's: None for processes on this machine (``loky``), or the name of a registered backend such as
            ``"dask"`` or ``"ray"`` for many machines.
        description: what the progress bar says.

    Raises:
        RuntimeError: some jobs failed; the others were finished first, and are kept.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    n_jobs = max(1, min(n_jobs or cpu_count(), len(waiting)))
    # Never 1: joblib would then run the job in this process, which may be a rank of a distributed run.
    pool = Parallel(max(n_jobs, 2), backend=backend or "loky", return_as="generator_unordered", pre_dispatch=n_jobs)
    outcomes = pool(delayed(_attempt)(job, threads_for(n_jobs)) for job in waiting)
    bar = tqdm(outcomes, desc=description, total=len(jobs), initial=len(jobs) - len(waiting), unit="run")
    if failures := [outcome for outcome in bar if outcome]:
        raise RuntimeError(f"{len(failures)} of {len(jobs)} runs failed; the first: {failures[0]}")


def _attempt(job: Job, threads: int) -> str | None:
    """Run a job; a failure is returned, so that one bad run costs itself only.

    What a run says of its results would only tear the progress bar of the series apart: warnings and errors are heard.
    """
    multiprocessing.set_start_method(None, force=True)  # the platform's: loky's own cannot start a loader's workers
    try:
        with redirect_stdout(io.StringIO()):
            job.run(threads)
    except Exception as error:  # whatever a user's config raises
        return f"{job.output_dir}: {innermost_or_input_error(error)}"
    return None


@dataclass(frozen=True)
class Arm:
    """One way to use the labels, which is compared with others: trainings that start from each other, the last on the
    target.
    """

    name: str
    jobs: tuple[Job, ...]

    @property
    def last(self) -> Job:
        return self.jobs[-1]


@dataclass(eq=False)
class Run:
    """What every step of a config needs to know of its run: where it writes, and how its trainings are carried out.

    In a bundle's JSON: ``"here": {"_target_": "medtl_ext.transfer.Run", "output_dir": "@output_dir", ...}``.

    Args:
        output_dir: the folder of the run, which belongs to it alone.
        seed: of everything that is drawn.
        n_jobs, backend: trainings at a time, and where; see `run_jobs`.
        figures, progress: whether to draw figures and the report, and to show progress bars.
    """

    output_dir: str | os.PathLike[str]
    seed: int = 0
    n_jobs: int | None = None
    backend: str | None = None
    figures: bool = True
    progress: bool = True
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = current_config()

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def leads(self) -> bool:
        """Whether this is the first of several processes, or the only one."""
        return idist.get_rank() == 0

    @cached_property
    def configs(self) -> Path:
        """The folder of the bundle's configs."""
        return Path(self.config["bundle_root"]) / "configs"

    def start(self) -> None:
        """Claim the output folder; see `medtl_ext.transfer.config.claim_output`."""
        claim_output(self.folder)

    def end(self) -> None:
        """Say where the results are."""
        if self.leads:
            print("results are in", self.folder)

    def seeded(self, config: Mapping[str, Any], seed: int) -> Self:
        """The same for trainings of another config and seed, one run of many, without progress bars of its own."""
        run = copy.copy(self)
        run.seed, run.config, run.progress = seed, {**config, "seed": seed}, False
        return run

    def job(self, folder: Path, *overlays: str, result: str = "metrics.csv", **overrides: Any) -> Job:
        """A run of this config with others of the bundle laid over it."""
        return Job(self.config, folder, [self.configs / f"{name}.json" for name in overlays], overrides, result)

    def train(self, jobs: Sequence[Job], description: str) -> None:
        """Run the jobs that are not done yet."""
        run_jobs(jobs, n_jobs=self.n_jobs, backend=self.backend, description=description)

    def train_arms(self, arms: Sequence[Arm], description: str) -> None:
        """Train what is not trained yet: all first steps, then all second ones, what several arms share once."""
        for step, jobs in enumerate(zip_longest(*(arm.jobs for arm in arms)), start=1):
            distinct = {job.output_dir: job for job in jobs if job is not None}
            several = f", step {step}" if max(len(arm.jobs) for arm in arms) > 1 else ""
            self.train(list(distinct.values()), description + several)


def short_path(path: Path) -> Path:
    """As a user would type it: relative to the current folder where it lies below."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def shell_word(text: str) -> str:
    """One word of a command line, in the quotes that a person would use.

    >>> print(shell_word("17-T2-ED"), shell_word("two words"), shell_word("['train.json', 'finetune.json']"))
    17-T2-ED 'two words' "['train.json', 'finetune.json']"
    """
    return f'"{text}"' if "'" in text and not set('"$`!\\') & set(text) else shlex.quote(text)


def run_command(files: Sequence[Path], options: Mapping[str, Any]) -> str:
    """What a user types to run configs with options.

    Lists and dictionaries are written as Python writes them, for that is how the command line reads what is in them;
    other values as JSON does.

    >>> print(run_command([Path("train.json"), Path("full.json")], {"roi_size": [64, 64], "figures": False}))
    python -m monai.bundle run --config_file "['train.json', 'full.json']" --roi_size '[64, 64]' --figures false
    """
    names = [str(short_path(file)) for file in files]
    words = ["--config_file", shell_word(names[0] if len(names) == 1 else str(names))]
    for name, value in options.items():
        plain = isinstance(value, str | Sequence | Mapping)
        words += [f"--{name}", shell_word(str(value) if plain else json.dumps(value))]
    return " ".join(["python -m monai.bundle run", *words])
