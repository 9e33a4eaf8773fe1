"""Runs of a config in folders of their own, through joblib: on this machine, or on a cluster."""

import copy
import hashlib
import json
import logging
import multiprocessing
import os
import shlex
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import ignite.distributed as idist
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from monai.bundle import ConfigWorkflow
from tqdm import tqdm

from medtl_ext._io import write_text
from medtl_ext._validation import InputError, first_line
from medtl_ext.transfer.config import LOG, claim_output, current_config, innermost_or_input_error, threads_for, writable

logger = logging.getLogger(__name__)

SUMS = ".run.sums"
"""Of the tables that a finished job left, as ``sha256sum --check`` reads them."""


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
        """Whether its result is there, and its tables are what it wrote."""
        record = self.output_dir / SUMS
        sums = record.read_text(encoding="utf-8") if record.is_file() else None
        return (self.output_dir / self.result).is_file() and sums in (None, self._sums())

    def _sums(self) -> str:
        tables = [path for path in sorted(self.output_dir.glob("*.[cj]s*")) if path.name != "config.json"]
        return "\n".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in tables) + "\n"

    @property
    def model(self) -> str:
        """The network that it trains."""
        return str(self.output_dir / "model.pt")

    def read(self, name: str = "metrics.csv") -> pd.DataFrame:
        """A table that it wrote; a patient 007 is not 7, and one called NA is there."""
        return read_table(self.output_dir / name)

    def run(self, threads: int | None = None) -> None:
        """Run the config in this process, on so many threads; whoever runs it meanwhile is waited for."""
        lock = _lock(writable(self.output_dir), wait=True)
        try:
            if not self.done:
                self._run(threads)
        finally:
            lock.release(force=True)  # which the run itself may have taken too

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
            try:
                workflow.initialize()
                if threads:
                    torch.set_num_threads(threads)
                workflow.run()
            finally:
                workflow.finalize()
        write_text(self.output_dir / SUMS, self._sums())


def _lock(folder: Path, *, wait: bool) -> FileLock:
    """The lock of a folder, which is held until it is released or forgotten, or the process ends, however it does."""
    lock, holder = FileLock(folder / ".run.lock", is_singleton=True), folder / ".run.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
        if not wait:
            raise InputError(f"{folder} is in use by {who}; wait until it is done, or give another folder.") from None
        logger.warning("waiting for %s, which is running %s", who, folder)
        lock.acquire()
    write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
    return lock


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
    """Run the jobs that are not done yet, several at a time, with a progress bar, or lines where there is no terminal.

    Args:
        jobs: each writes its own folder, so that an interrupted series continues where it stopped, and what it has to
            say into ``log.txt`` there.
        n_jobs: how many at a time; by default one per core. The cores are shared between them.
        backend: joblib's: None for processes on this machine (``loky``), the address of a Dask scheduler
            (``tcp://HOST:8786``) or ``"dask"``, which takes it from ``$DASK_SCHEDULER_ADDRESS``, for the workers of
            that cluster, or the name of a registered backend.
        description: what the progress bar says.

    Raises:
        InputError: some jobs failed; the others were finished first, and are kept.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    here = backend in (None, "loky")
    most = cpu_count() if here else len(waiting)
    n_jobs = max(1, min(n_jobs or most, most, len(waiting)))
    with _workers(backend or "loky"):
        # Never 1: joblib would then run the job in this process, which may be a rank of a distributed run.
        pool = Parallel(max(n_jobs, 2), return_as="generator_unordered", pre_dispatch=n_jobs)
        outcomes = pool(delayed(_attempt)(job, threads_for(n_jobs) if here else None) for job in waiting)
        shown = {"total": len(jobs), "initial": len(jobs) - len(waiting), "unit": "run", "disable": None}
        bar = tqdm(outcomes, description, **shown)
        try:
            failures = [outcome for outcome in _told(bar, description, len(waiting)) if outcome]
        except TerminatedWorkerError as error:
            said = "a process that ran one of the jobs was killed, perhaps for its memory"
            raise InputError(f"{said}; type the same command again to go on, with fewer --n_jobs.") from error
    if failures:
        raise InputError(f"{len(failures)} of {len(jobs)} runs failed; the first: {failures[0]}")


def _told(bar: tqdm, what: str, runs: int) -> Iterator[Any]:
    """What a progress bar goes over; where there is no terminal to draw it on, lines at both ends and one a minute."""
    began = last = time.monotonic()
    if bar.disable:
        logger.info("%s: %d runs to go", what, runs)
    for done, outcome in enumerate(bar, start=1):
        yield outcome
        now = time.monotonic()
        if bar.disable and (done == runs or now - last > 60):
            last, minutes = now, (now - began) / 60
            left = f", about {minutes / done * (runs - done):.0f} minutes left" if done < runs else ""
            logger.info("%s: %d of %d runs done in %.1f minutes%s", what, done, runs, minutes, left)


@contextmanager
def _workers(backend: str) -> Iterator[None]:
    """What joblib sends jobs to."""
    if backend != "dask" and "://" not in backend:
        # Before anything is imported a worker may be without its parent, and then waits for a job for ever.
        ending = {"initializer": _end_with, "initargs": (os.getpid(),)} if backend == "loky" else {}
        with parallel_config(backend, **ending):
            yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("--backend dask needs Dask; pip install 'medtl[dask]', on the workers too.") from error
    address = backend if "://" in backend else os.environ.get("DASK_SCHEDULER_ADDRESS")
    if not address:
        raise InputError("--backend dask needs the scheduler's address; give --backend tcp://HOST:8786.")
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {address} ({first_line(error)}); start it first.") from error
    with client, parallel_config("dask", client=client):
        yield


_ONE_AT_A_TIME = threading.RLock()  # of a worker's threads: seeds, threads and standard output are the process's


def _attempt(job: Job, threads: int | None) -> str | None:
    """Run a job; a failure is returned, so that one bad run costs itself only.

    What a run says of its results would only tear the progress bar of the series apart: it goes into a file.

    Args:
        job: what to run.
        threads: None: as many as whoever started the worker gave it.
    """
    with _ONE_AT_A_TIME:
        multiprocessing.set_start_method(None, force=True)  # the platform's: loky's cannot start a loader's workers
        try:
            with open(writable(job.output_dir) / LOG, "a+", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
                try:
                    job.run(threads or int(os.environ.get("OMP_NUM_THREADS", 1)))
                except Exception as error:  # whatever a user's config raises
                    log.seek(0)
                    line = 1 + sum(1 for _ in log)
                    traceback.print_exc(file=log)
                    record = job.output_dir / "config.json"
                    alone = f"; alone: {run_command([record], {})}" if record.is_file() else ""
                    return f"{job.output_dir}: {innermost_or_input_error(error)} (line {line} of its {LOG}{alone})"
        except InputError as error:  # of the folder itself
            return str(error)
    return None


def _end_with(parent: int) -> None:
    """End this worker when who started it is gone; Ctrl-C, which all of a terminal get, is the parent's to answer."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        self.config, self.folder = current_config(), Path(self.output_dir)

    @property
    def leads(self) -> bool:
        """Whether this is the first of several processes, or the only one."""
        return idist.get_rank() == 0

    @property
    def configs(self) -> Path:
        """The folder of the bundle's configs."""
        return Path(self.config["bundle_root"]) / "configs"

    def start(self) -> None:
        """Claim the output folder; see `medtl_ext.transfer.config.claim_output`.

        Raises:
            InputError: also where another process is writing to it.
        """
        if self.leads:
            self._held = _lock(writable(self.folder), wait=False)  # until this object is forgotten
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
