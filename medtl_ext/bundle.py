"""What the bundles' configs call: where they are, whether the command line makes sense, and many runs of one config.

MONAI evaluates a config lazily and knows neither its own folder nor a misspelled option: the functions here find the
`monai.bundle.ConfigWorkflow` that is evaluating them by walking up the call stack.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed
from monai.bundle import ConfigWorkflow
from tqdm import tqdm

from medtl_ext._io import write_json
from medtl_ext._validation import InputError
from medtl_ext.data.collection import load_collection

__all__ = [
    "Job",
    "bundle_root",
    "claim_output",
    "current_config",
    "deciding_parts",
    "kept_model",
    "require_option",
    "run_command",
    "run_jobs",
    "shell_word",
    "short_path",
    "start",
    "study_config",
]

logger = logging.getLogger(__name__)

# Settings that may differ between two runs of the same work.
HOW_NOT_WHAT = frozenset(
    [
        "bundle_root",
        "output_dir",
        "source_dir",
        "audit",
        "settle",
        "figures",
        "progress",
        "check_data",
        "n_jobs",
        "num_workers",
        "device",
        "rank",
        "imports",
        "initialize",
        "run",
        "finalize",
    ]
)
# Settings with parts, which also decide what a run computes.
DECIDING = (
    "architecture",
    "network_def",
    "loss",
    "optimizer",
    "lr_scheduler",
    "early_stopping",
    "weight_map",
    "train#deterministic_transforms",
    "train#random_transforms",
)
# The same, of some bundles only: without them, names of pre-trained sources stay as they are.
DECIDING_WHERE_PRESENT = ("loss_def", "region_loss", "leep")
LEAST = {"seed": 0, "pool_seed": 0, "num_workers": 0, "epochs": 0, "pool_epochs": 1, "patience": 1}
LEAST |= {"batch_size": 1, "iterations_per_epoch": 1, "val_interval": 1}
# Options that may name a file, of which the content counts and not the place.
WHAT_IS_IN = dict.fromkeys(("collection", "source_collection"), "patients, splits or files")
WHAT_IS_IN |= {"affinity": "weights"}
# What the command line leaves as text, where a config would have a value.
JSON_WORDS = {"true": True, "false": False, "null": None}


def current_workflow() -> ConfigWorkflow | None:
    """The `ConfigWorkflow` that is evaluating the calling expression, or None outside of one."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigWorkflow):
            return owner
        frame = frame.f_back
    return None


def bundle_root() -> str:
    """Absolute path of the bundle whose config is being evaluated: the parent of its ``configs`` folder.

    Makes ``"bundle_root": "$bundle.bundle_root()"`` right from the repository root, from inside the bundle and in a
    copy elsewhere. Outside of a `ConfigWorkflow` (a bare `ConfigParser`) it is the current folder.
    """
    workflow = current_workflow()
    if workflow is None:
        return str(Path.cwd())
    folder = Path(workflow.config_root_path).resolve()
    return str(folder.parent if folder.name == "configs" else folder)


def start() -> None:
    """First line of every ``initialize``: read ``--audit false`` as JSON would, and refuse misspelled options.

    Also lets an `InputError` end the program with one line instead of a traceback, and silences MONAI's own warnings of
    deprecation.

    Raises:
        InputError: a top-level key is neither declared nor used by any config of the bundle, which is what a misspelled
            ``--option`` becomes; an option that is a number, or true or false, in the bundle's configs is none here; no
            epoch would be validated; a config for several processes runs in one that torchrun did not start.
    """
    _show_input_errors_as_one_line()
    torch.set_num_threads(_threads(1))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"monai\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"monai\.")
    workflow = current_workflow()
    if workflow is None:
        return
    for key, value in workflow.parser.get().items():
        if isinstance(value, str) and value in JSON_WORDS:
            workflow.parser[key] = JSON_WORDS[value]
    config = workflow.parser.get()
    _check_names(config, Path(workflow.config_root_path))
    _check_kinds(config, Path(workflow.config_root_path))
    _check_validation(config)
    if "RANK" not in os.environ and any("init_process_group" in text for text in _strings(config.get("initialize"))):
        raise InputError(
            "a multi_gpu config is for several processes; start it by `torchrun --nproc_per_node=2 -m monai.bundle run "
            "...`, one process a GPU, or leave it out."
        )


def _declared_options(folder: Path) -> dict[str, set[str]]:
    """The top-level keys of each config of a bundle: a key that an overlay sets to nothing is still an option."""
    contents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: {key.split("#")[0] for key in content} for name, content in contents.items()}


def _check_names(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse options that nothing in this run uses: misspelled ones, and those of another config.

    MONAI does not say which files a config was read from: those whose keys are all in it may be among them.
    """
    declared = _declared_options(folder)
    used = {name for text in _strings(config) for name in re.findall(r"[@%]([A-Za-z_]\w*)", text)}
    known = used.union(*(keys for keys in declared.values() if keys <= config.keys()))
    for key in config:
        if key in known or key.startswith("_"):
            continue
        if files := [name for name, keys in declared.items() if key in keys and name != "metadata.json"]:
            inside = ", which the trainings here take from --settings" if "settings" in config else ""
            raise InputError(f"option --{key} does nothing here; it is one of {', '.join(files)}{inside}.")
        near = get_close_matches(key, sorted(known), n=1)
        hint = f"did you mean --{near[0]}?" if near else "see the bundle's docs/README.md for the options it has."
        raise InputError(f"option --{key} is not used by this bundle; {hint}")


def _check_kinds(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse text where the bundle's own configs have numbers, and the like."""
    kinds: dict[str, set[type]] = {}
    for path in sorted(folder.glob("*.json")):
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            if value is not None and not _is_expression(value):
                kinds.setdefault(key, set()).add(type(value))
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    for key, value in config.items():
        known = kinds.get(key, set())
        if not known & names.keys() or value is None or _is_expression(value):
            continue
        fits = type(value) in known or (type(value) is int and float in known)
        if not fits:
            expected = " or ".join(name for kind, name in names.items() if kind in known)
            raise InputError(f"option --{key} is {value!r}; expected {expected}.")
        if key in LEAST and isinstance(value, int | float) and value < LEAST[key]:
            raise InputError(f"option --{key} is {value}; expected at least {LEAST[key]}.")


def _check_validation(config: Mapping[str, Any]) -> None:
    """Refuse a training that would end before its first validation, and so without a best network to score."""
    interval, epochs = (_number(config, name) for name in ("val_interval", "epochs"))
    if interval is not None and epochs is not None and interval > epochs > 0:
        raise InputError(
            f"--val_interval is {interval}, --epochs {epochs}: no epoch would be validated; give at most --epochs."
        )


def _number(config: Mapping[str, Any], name: str) -> float | None:
    """The number that a setting is or refers to (``@epochs``); None if it is neither, as an expression."""
    value = config.get(name)
    for _ in config:  # so many references at most
        if not (isinstance(value, str) and value.startswith("@")):
            break
        value = config.get(value[1:])
    return value if isinstance(value, int | float) else None


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from _strings(value)
    elif isinstance(config, Sequence):
        for value in config:
            yield from _strings(value)


def _show_input_errors_as_one_line() -> None:
    """On the command line, print an `InputError` without the traceback of the config machinery around it."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or program.name != "monai.bundle.__main__":
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        cause = _innermost_or_input_error(error)
        if isinstance(cause, InputError):
            print(f"\nerror: {cause}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


def _innermost_or_input_error(error: BaseException) -> BaseException:
    """What a chain of errors began with, or what we say of it, where we do."""
    while not isinstance(error, InputError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def current_config() -> dict[str, Any]:
    """The config being evaluated as plain JSON content, with every override in it and ``bundle_root`` made absolute.

    Raises:
        InputError: called outside of a `ConfigWorkflow`, or an override is not a JSON value.
    """
    workflow = current_workflow()
    if workflow is None:
        raise InputError("a run inside a run needs a ConfigWorkflow: start it with `python -m monai.bundle run`.")
    root = Path(workflow.config_root_path).resolve()
    content = {key: value for key, value in workflow.parser.get().items() if key != "_meta_"}
    content["bundle_root"] = workflow.parser.get_parsed_content("bundle_root")
    content.setdefault("bundle_root", str(root.parent))
    try:
        return json.loads(json.dumps(content))
    except TypeError as error:
        raise InputError(
            f"the config holds a value that is no JSON ({error}); pass overrides as JSON values."
        ) from error


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plain settings of a config that decide what a run computes: its options, without how and where it runs."""
    plain = (str, int, float, bool, list, type(None))
    return {k: v for k, v in sorted(config.items()) if isinstance(v, plain) and k not in HOW_NOT_WHAT and k[:1] != "_"}


def deciding_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with parts that decide what a run computes: network, loss, optimizer, transforms."""
    found = {}
    for name in DECIDING:
        value: Any = config
        for part in name.split("#"):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[name] = value
    return found | {name: config[name] for name in DECIDING_WHERE_PRESENT if config.get(name) is not None}


def claim_output(output_dir: str | os.PathLike[str]) -> Path:
    """Make ``output_dir`` ready for this run and no other, and leave the run's config in it as ``config.json``.

    An interrupted or finished run with the same settings is continued; one with other settings is never overwritten,
    unless it stopped before it wrote anything, as bad input makes it.

    Raises:
        InputError: the folder cannot be written to, or holds a run with other settings.
    """
    folder = _writable(output_dir)
    config = current_config()
    config["_content_"] = _content(config)
    record = folder / "config.json"
    if record.is_file() and any(path != record for path in folder.glob("[!.]*")):
        recorded = json.loads(record.read_text(encoding="utf-8"))
        before, now = (settings_of(one) | deciding_parts(one) | {"grid": one.get("grid")} for one in (recorded, config))
        _require_same(f"output folder {folder} holds a run", before, now, (recorded, config))
    elif int(os.environ.get("RANK", 0)) == 0:
        theirs = [name for name in ("model.pt", "last.pt", "metrics.csv") if (folder / name).exists()]
        if theirs and not record.is_file():
            raise InputError(
                f"output folder {folder} holds {theirs[0]} of no run that is known here, which would be replaced; give "
                "another folder with --output_dir."
            )
        write_json(record, config)
    return folder


def _require_same(
    holds: str, before: Mapping[str, Any], now: Mapping[str, Any], records: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> None:
    """Refuse settings other than those of before; collections are compared by the ``_content_`` of both records."""
    contents = [record.get("_content_", {}) for record in records]  # none of a run of an earlier version
    for name in sorted(before.keys() | now.keys()):
        if all(name in content for content in contents):
            if contents[0][name] != contents[1][name]:
                raise InputError(
                    f"{holds} on another {name}, with other {WHAT_IS_IN[name]} than {now[name]} has now; give another "
                    "folder with --output_dir, or delete that one."
                )
        elif before.get(name) != now.get(name):
            raise InputError(
                f"{holds} with {name}={before.get(name)!r}, this one has {now.get(name)!r}; give another folder with "
                "--output_dir, or delete that one."
            )


def _content(config: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of the collections and weights that a config names, which are the same wherever these lie."""
    named = {name: config.get(name) for name in WHAT_IS_IN}
    files = {name: Path(path) for name, path in named.items() if isinstance(path, str) and Path(path).is_file()}
    return {name: _fingerprint(name, path) for name, path in files.items()}


def _fingerprint(name: str, path: Path) -> str:
    if name == "affinity":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return load_collection(path).fingerprint


def _writable(output_dir: str | os.PathLike[str]) -> Path:
    """The folder, made where it is not there."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written to ({error.strerror}); give another one with --output_dir."
        ) from error
    return folder


def study_config(output_dir: str | os.PathLike[str], settings: Mapping[str, Any], **decided: Any) -> dict[str, Any]:
    """Content of the bundle's ``train.json`` with the ``settings`` of a study in it, which all its runs share.

    A study may grow: more targets, seeds or methods in the same folder find the runs there done. Its settings may not
    change once it has runs: they are kept as ``settings.json``.

    Args:
        output_dir: of the study.
        settings: options of ``train.json``.
        decided: what else all runs share.

    Raises:
        InputError: settings that are none of the bundle's options, or others than those of the study in the folder.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"settings is {settings!r}; expected options of train.json by name.")
    root = Path(current_config()["bundle_root"])
    known = set().union(*_declared_options(root / "configs").values())
    for name in settings:
        if name.split("#")[0] not in known:
            near = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise InputError(f"settings holds {name}, which is no option of this bundle{hint}")
    record = Path(output_dir) / "settings.json"
    now = {"settings": {name: value for name, value in settings.items() if name not in HOW_NOT_WHAT}, **decided}
    now = json.loads(json.dumps(now | {"_content_": _content(settings)}))
    if record.is_file() and (Path(output_dir) / "runs").is_dir():
        recorded = json.loads(record.read_text(encoding="utf-8"))
        records = recorded, now
        before, after = ({**one["settings"], **{name: one.get(name) for name in decided}} for one in records)
        _require_same(f"output folder {output_dir} holds a study", before, after, records)
    try:
        write_json(record, now)
    except OSError as error:
        raise InputError(
            f"output folder {output_dir} cannot be written to ({error.strerror}); give another one with --output_dir."
        ) from error
    train = json.loads((root / "configs" / "train.json").read_text(encoding="utf-8"))
    return train | {"source_dir": str(root / "models" / "sources")} | dict(settings) | {"bundle_root": str(root)}


def require_option(name: str, value: Any) -> None:
    """Refuse a run without an option that it cannot do without.

    Raises:
        InputError: the value is None.
    """
    if value is None:
        raise InputError(f"--{name} is not given, and this config starts from it; give it.")


@dataclass(frozen=True)
class Job:
    """One run of a config in its own folder.

    Args:
        config: content of the config to run, e.g. of `current_config`.
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

    def run(self, threads: int | None = None) -> None:
        """Run the config in this process, on so many threads; whoever runs it meanwhile is waited for.

        The lock is not that of `kept_model`, which is held by another process while the job runs.
        """
        lock = FileLock(_writable(self.output_dir) / ".run.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process, which is running %s", self.output_dir)
            lock.acquire()
        try:
            if not self.done:
                self._run(threads)
        finally:
            lock.release()

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


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
    n_jobs = max(1, min(n_jobs or cpu_count(), len(waiting)))
    threads = _threads(n_jobs)
    # Never 1: joblib would then run the job in this process, which may be a rank of a distributed run.
    pool = Parallel(max(n_jobs, 2), backend=backend or "loky", return_as="generator_unordered", pre_dispatch=n_jobs)
    outcomes = pool(delayed(_attempt)(job, threads) for job in waiting) if waiting else ()
    failures = [
        outcome
        for outcome in tqdm(outcomes, desc=description, total=len(jobs), initial=len(jobs) - len(waiting), unit="run")
        if outcome
    ]
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(jobs)} runs failed; the first: {failures[0]}")


def _threads(n_jobs: int) -> int:
    """Threads for each of several runs: never all cores, for OpenMP threads that wait for a busy core cost far more
    than the last core gives (measured: 30 times slower on two cores with one busy).
    """
    return max(1, cpu_count() // max(n_jobs, 2))


def _attempt(job: Job, threads: int) -> str | None:
    """Run a job; a failure is returned, so that one bad run costs itself only.

    What a run says of its results would only tear the progress bar of the series apart: warnings and errors are heard.
    """
    try:
        with redirect_stdout(io.StringIO()):
            job.run(threads)
    except Exception as error:  # whatever a user's config raises
        return f"{job.output_dir}: {_innermost_or_input_error(error)}"
    return None


def kept_model(job: Job, *, result: str = "model.pt") -> str:
    """The model a job trains, trained once and kept: other processes that ask meanwhile wait for it."""
    job.output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(job.output_dir / ".lock"):
        if not job.done:
            logger.info("training %s, once; it is kept in %s", job.output_dir.name, job.output_dir)
            run_jobs([job], n_jobs=1, description="pre-training")
    return str(job.output_dir / result)


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

    >>> print(run_command([Path("train.json"), Path("full.json")], {"roi_size": [64, 64], "audit": False}))
    python -m monai.bundle run --config_file "['train.json', 'full.json']" --roi_size '[64, 64]' --audit false
    """
    names = [str(short_path(file)) for file in files]
    words = ["--config_file", shell_word(names[0] if len(names) == 1 else str(names))]
    for name, value in options.items():
        plain = isinstance(value, str | Sequence | Mapping)
        words += [f"--{name}", shell_word(str(value) if plain else json.dumps(value))]
    return " ".join(["python -m monai.bundle run", *words])
