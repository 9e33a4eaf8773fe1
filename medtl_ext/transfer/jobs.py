"""Runs of a config, each in its own folder, by joblib: on this machine or on a cluster."""

import copy
import hashlib
import json
import logging
import multiprocessing
import os
import re
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
from joblib.parallel import get_active_backend
from monai.bundle import ConfigWorkflow
from tqdm import tqdm

from medtl_ext._io import write_text
from medtl_ext._validation import InputError, first_line
from medtl_ext.transfer.config import (
    LESS_MEMORY,
    LOG,
    claim_output,
    current_config,
    in_one_line,
    innermost_or_input_error,
    threads_for,
    writable,
)

logger = logging.getLogger(__name__)

HOLDER = ".run.holder"
SUMS = ".run.sums"
"""Checksums of the tables of a finished job, in the format of ``sha256sum --check``."""
LENGTH = re.compile(r"\d+ training steps, about [\d.]+ minutes")
"""What `medtl_ext.handlers.TrainingLength` says after the first epoch."""
MINUTES = ".run.minutes"
"""How many minutes a run took: the sum over all sessions that ended, because a study may grow."""


@dataclass(frozen=True)
class Job:
    """One run of a config in its own folder.

    Args:
        config: content of the config to run, for example from `medtl_ext.transfer.config.current_config`.
        output_dir: the folder of the run.
        overlays: config files that are added on top, in order.
        overrides: options that win over all files, as on the command line.
        result: the file in ``output_dir`` that the run writes last; if it exists, the job is done.
    """

    config: Mapping[str, Any]
    output_dir: Path
    overlays: Sequence[Path] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    result: str = "metrics.csv"

    @property
    def done(self) -> bool:
        """True if its result exists and its tables have not changed since."""
        record = self.output_dir / SUMS
        sums = record.read_text(encoding="utf-8") if record.is_file() else None
        return (self.output_dir / self.result).is_file() and sums in (None, self._sums())

    def _sums(self) -> str:
        tables = [path for path in sorted(self.output_dir.glob("[!.]*.[cj]s*")) if path.name != "config.json"]
        return "\n".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in tables) + "\n"

    @property
    def model(self) -> str:
        """The file of the network that it trains."""
        return str(self.output_dir / "model.pt")

    @property
    def alone(self) -> str:
        """What to type to run it alone, once it has begun."""
        record = self.output_dir / "config.json"
        return f"; alone: {run_command([record], {})}" if record.is_file() else ""

    def read(self, name: str = "metrics.csv") -> pd.DataFrame:
        """A table that it wrote; see `read_table`."""
        return read_table(self.output_dir / name)

    def run(self, threads: int | None = None) -> None:
        """Run the config in this process with ``threads`` threads; wait if another process is running it."""
        lock = _lock(writable(self.output_dir), wait=True)
        try:
            if not self.done:
                self._run(threads)
        finally:
            lock.release(force=True)  # the run itself may have locked it a second time

    def _run(self, threads: int | None) -> None:
        if "RANK" in os.environ:
            _be_the_only_rank()
        configs = Path(self.config["bundle_root"]) / "configs"
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "config.json"
            base.write_text(json.dumps(dict(self.config)))
            logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # it logs the path of every config
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
    """Lock a folder until the lock is released or deleted, or the process ends for any reason."""
    lock = FileLock(folder / ".run.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = _holder(folder)
        if not wait:
            advice = "wait until it is done, or give another folder with --output_dir"
            raise InputError(f"{folder} is in use by {who}; {advice}.") from None
        logger.warning("waiting for %s, which is running %s", who, folder)
        lock.acquire()
    write_text(folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def _holder(folder: Path) -> str:
    """The process that holds the lock of a folder, or held it last."""
    file = folder / HOLDER
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "another process"


def _be_the_only_rank() -> None:
    """Make this process a distributed run of its own: it was started by a rank, and its config expects a group."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any port that is free


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table of a run; names stay text, so that a patient 007 is not 7 and a patient NA is not missing."""
    text = dict.fromkeys(("subject", "patient", "name"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


def run_jobs(
    jobs: Sequence[Job], *, n_jobs: int | None = None, backend: str | None = None, description: str = "runs"
) -> None:
    """Run the jobs that are not done yet, several at a time, with a progress bar (or log lines without a terminal).

    Args:
        jobs: each writes into its own folder, so that an interrupted series continues where it stopped. Printed output
            goes to ``log.txt`` there.
        n_jobs: number of jobs at a time; by default one per core. They share the cores.
        backend: of joblib. None: processes on this machine (``loky``). ``tcp://HOST:8786``: the workers of the Dask
            cluster with this scheduler; ``"dask"`` takes the address from ``$DASK_SCHEDULER_ADDRESS``. ``"ray"``: the
            Ray cluster of ``$RAY_ADDRESS``, or this machine. Other names: registered backends.
        description: text of the progress bar.

    Raises:
        InputError: some jobs failed; the others were finished first and are kept.
    """
    waiting = [job for job in jobs if not job.done]
    if not waiting:
        return
    here = backend in (None, "loky")
    most = cpu_count() if here else len(waiting)
    asked, before = n_jobs, [_holder(job.output_dir) for job in waiting]
    n_jobs = max(1, min(n_jobs or most, most, len(waiting)))
    with _workers(backend or "loky") as cluster:
        if cluster is None:
            as_they_end = get_active_backend()[0].supports_return_generator  # Ray's gives all at the end
            how = {"return_as": "generator_unordered" if as_they_end else "list", "pre_dispatch": n_jobs}
            # Never 1: joblib would then run the job in this process, which may be a rank of a distributed run.
            pool = Parallel(max(n_jobs, 2) if here or asked else -1, **how)  # as many as it has: Ray waits for more
            outcomes = pool(delayed(_attempt)(job, threads_for(n_jobs) if here else None) for job in waiting)
        else:
            outcomes = _of_cluster(cluster, waiting)
        shown = {"total": len(jobs), "initial": len(jobs) - len(waiting), "unit": "run", "disable": None}
        bar = tqdm(outcomes, description, **shown)
        try:
            with _foretold(bar, description, waiting):
                failures = [outcome for outcome in _told(bar, description, len(waiting)) if outcome]
        except TerminatedWorkerError as error:
            with_holders = [(job, who) for job, who in zip(waiting, before, strict=True) if not job.done]
            began = [f"{job.output_dir}{job.alone}" for job, who in with_holders if _holder(job.output_dir) != who]
            said = f"a process was killed, perhaps because memory ran out, while it ran {' or '.join(began) or 'a job'}"
            raise InputError(f"{said}; run the same command again, with a smaller {LESS_MEMORY}.") from error
    if failures:
        raise InputError(f"{len(failures)} of {len(jobs)} runs failed; the first: {failures[0]}")


def _told(bar: tqdm, what: str, runs: int) -> Iterator[Any]:
    """The items of a progress bar; without a terminal, log a line at the start, at the end and once a minute."""
    began = last = time.monotonic()
    if bar.disable:
        logger.info("%s: %d %s to go", what, runs, "run" if runs == 1 else "runs")
    for done, outcome in enumerate(bar, start=1):
        yield outcome
        now = time.monotonic()
        if bar.disable and (done == runs or now - last > 60):
            last, minutes = now, (now - began) / 60
            left = f", about {minutes / done * (runs - done):.1f} minutes left" if done < runs else ""
            logger.info("%s: %d of %d runs done in %.1f minutes%s", what, done, runs, minutes, left)


@contextmanager
def _foretold(bar: tqdm, what: str, jobs: Sequence[Job]) -> Iterator[None]:
    """Inside the block, say how long a run takes as soon as the log of the first training says it."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            logs = (job.output_dir / LOG for job in jobs)
            lines = (line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines())
            if found := next(filter(None, map(LENGTH.search, lines)), None):
                bar.set_postfix_str(found[0])
                if bar.disable:
                    logger.info("%s: each run has %s", what, found[0])
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def _workers(backend: str) -> Iterator[Any]:
    """Set joblib's backend inside the block, or yield the client of a Dask cluster."""
    if backend != "dask" and "://" not in backend:
        # A worker without a parent would wait for jobs forever.
        ending = {"initializer": _end_with, "initargs": (os.getpid(),)} if backend == "loky" else {}
        try:
            if backend == "ray":
                from ray.util.joblib import register_ray

                register_ray()
            config = parallel_config(backend, **ending)
        except (ImportError, ValueError) as error:
            install = "; pip install ray, on the workers too" * (backend == "ray")
            raise InputError(f"--backend {backend} cannot be used ({first_line(error)}){install}.") from error
        with config:
            yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("--backend dask needs Dask; pip install 'medtl[dask]' here and on the workers.") from error
    address = backend if "://" in backend else os.environ.get("DASK_SCHEDULER_ADDRESS")
    if not address:
        raise InputError("--backend dask needs the scheduler's address; give --backend tcp://HOST:8786.")
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        problem = f"no Dask scheduler answers at {address} ({first_line(error)})"
        raise InputError(f"{problem}; start it, or correct --backend.") from error
    with client:
        yield client


def _of_cluster(cluster: Any, jobs: Sequence[Job]) -> Iterator[str | None]:
    """The outcomes of jobs on the workers of a Dask cluster, which may start later.

    joblib gives up after ten seconds without a worker, and runs all jobs in this process where there is only one.
    """
    from distributed import KilledWorker, as_completed

    futures = {cluster.submit(_attempt, job, None, pure=False): job for job in jobs}
    if not cluster.ncores():
        logger.warning("the cluster has no worker yet; %d jobs wait for one", len(jobs))
    for future in as_completed(futures):
        try:
            yield future.result()
        except KilledWorker:
            job, died = futures[future], "several workers died while they ran it, perhaps because memory ran out"
            yield f"{job.output_dir}: {died}{job.alone}; try a smaller {LESS_MEMORY}"


_ONE_AT_A_TIME = threading.RLock()  # seeds, thread counts and standard output belong to the whole process


def _attempt(job: Job, threads: int | None) -> str | None:
    """Run a job and return its failure as text, so that the other jobs continue.

    Printed output goes to a file, because it would break the progress bar of the series.

    Args:
        job: what to run.
        threads: number of threads; None: as the worker's environment says.
    """
    with _ONE_AT_A_TIME:
        multiprocessing.set_start_method(None, force=True)  # loky's own method cannot start a data loader's workers
        try:
            with open(writable(job.output_dir) / LOG, "a+", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
                try:
                    job.run(threads or int(os.environ.get("OMP_NUM_THREADS", 1)))
                except Exception as error:  # a user's config may raise any error
                    log.seek(0)
                    line = 1 + sum(1 for _ in log)
                    traceback.print_exc(file=log)
                    said = in_one_line(error) or innermost_or_input_error(error)
                    return f"{job.output_dir}: {said} (line {line} of its {LOG}{job.alone})"
        except InputError as error:  # of the folder itself
            return str(error)
    return None


def _end_with(parent: int) -> None:
    """End this worker when its parent process is gone; ignore Ctrl-C, which the parent handles."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Arm:
    """One of the compared ways to use the labels: trainings that start from each other, the last one on the target."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def last(self) -> Job:
        return self.jobs[-1]


@dataclass(eq=False)
class Run:
    """What every step of a config must know about its run: where to write, and how to carry out trainings.

    In a bundle's JSON: ``"here": {"_target_": "medtl_ext.transfer.Run", "output_dir": "@output_dir", ...}``.

    Args:
        output_dir: the folder of the run; no other run may use it.
        seed: of all random draws.
        n_jobs, backend: number of trainings at a time, and where they run; see `run_jobs`.
        figures, progress: draw figures and write the report; show progress bars.
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
        self._began, self.ended = time.monotonic(), (self.folder / MINUTES).is_file()

    @property
    def leads(self) -> bool:
        """True if this is the first of several processes, or the only one."""
        return idist.get_rank() == 0

    @property
    def configs(self) -> Path:
        """The folder of the bundle's configs."""
        return Path(self.config["bundle_root"]) / "configs"

    def start(self) -> None:
        """Claim the output folder; see `medtl_ext.transfer.config.claim_output`.

        Raises:
            InputError: also if another process is writing to it.
        """
        if self.leads:
            self._held = _lock(writable(self.folder), wait=False)  # released when this object is deleted
        claim_output(self.folder)

    def end(self) -> None:
        """Note how long it took, and print where the results are."""
        if self.leads:
            if hasattr(self, "_held") and not (self.folder / "config.json").is_file():
                raise InputError(f"output folder {self.folder} was deleted during the run; run the same command again.")
            record = self.folder / MINUTES
            before = float(record.read_text(encoding="utf-8")) if record.is_file() else 0.0
            write_text(record, f"{before + (time.monotonic() - self._began) / 60:.1f}")
            print("results are in", self.folder)

    def seeded(self, config: Mapping[str, Any], seed: int) -> Self:
        """A copy for trainings with another config and seed, as one of many runs, without progress bars."""
        run = copy.copy(self)
        run.seed, run.config, run.progress = seed, {**config, "seed": seed}, False
        return run

    def job(self, folder: Path, *overlays: str, result: str = "metrics.csv", **overrides: Any) -> Job:
        """A run of this config with overlays of the bundle on top."""
        return Job(self.config, folder, [self.configs / f"{name}.json" for name in overlays], overrides, result)

    def train(self, jobs: Sequence[Job], description: str) -> None:
        """Run the jobs that are not done yet."""
        run_jobs(jobs, n_jobs=self.n_jobs, backend=self.backend, description=description)

    def train_arms(self, arms: Sequence[Arm], description: str) -> None:
        """Train what is not trained yet: all first steps, then all second steps; a shared training runs once."""
        for step, jobs in enumerate(zip_longest(*(arm.jobs for arm in arms)), start=1):
            distinct = {job.output_dir: job for job in jobs if job is not None}
            several = f", step {step}" if max(len(arm.jobs) for arm in arms) > 1 else ""
            self.train(list(distinct.values()), description + several)


def short_path(path: Path) -> Path:
    """A path as a user would type it: relative if it is below the current folder."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def shell_word(text: str) -> str:
    """One word of a command line, with the quotes that a person would use.

    >>> print(shell_word("17-T2-ED"), shell_word("two words"), shell_word("['train.json', 'finetune.json']"))
    17-T2-ED 'two words' "['train.json', 'finetune.json']"
    """
    return f'"{text}"' if "'" in text and not set('"$`!\\') & set(text) else shlex.quote(text)


def run_command(files: Sequence[Path], options: Mapping[str, Any]) -> str:
    """The command that runs configs with options.

    Lists and dictionaries are written as in Python, because the command line reads them so; other values as in JSON.

    >>> print(run_command([Path("train.json"), Path("full.json")], {"roi_size": [64, 64], "figures": False}))
    python -m monai.bundle run --config_file "['train.json', 'full.json']" --roi_size '[64, 64]' --figures false
    """
    names = [str(short_path(file)) for file in files]
    words = ["--config_file", shell_word(names[0] if len(names) == 1 else str(names))]
    for name, value in options.items():
        plain = isinstance(value, str | Sequence | Mapping)
        words += [f"--{name}", shell_word(str(value) if plain else json.dumps(value))]
    return " ".join(["python -m monai.bundle run", *words])
