"""Functions for the bundles' configs: find the bundle's folder, check the options, and claim the output folder.

MONAI evaluates a config lazily. It does not tell a config its own folder, and accepts misspelled options. The functions
here find the `monai.bundle.ConfigWorkflow` that evaluates them by walking up the call stack.
"""

import hashlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Collection, Container, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from joblib import cpu_count
from monai.bundle import ConfigParser, ConfigWorkflow

from medtl_ext._io import write_json
from medtl_ext._validation import InputError, first_line, require_choice
from medtl_ext.data.collection import load_collection, read_json

Evaluating = TypeVar("Evaluating", ConfigWorkflow, ConfigParser)
# Settings that say how and where a run is carried out, but not what it computes.
HOW_NOT_WHAT = {"bundle_root", "output_dir", "source_dir", "settle", "figures", "progress", "check_data", "n_jobs"}
HOW_NOT_WHAT |= {"trust_sources", "num_workers", "device", "rank", "imports", "initialize", "run", "finalize"}
# Settings with parts of their own that also decide what a run computes.
DECIDING = ("network_def", "loss", "loss_def", "region_loss", "leep", "optimizer", "lr_scheduler", "early_stopping")
DECIDING += ("weight_map", "grid", "normalize", "source", "train#deterministic_transforms", "train#random_transforms")
DECIDING += ("pretraining", "recipe")
LEAST = {"seed": 0, "pool_seed": 0, "num_workers": 0, "epochs": 0, "pool_epochs": 1, "patience": 1}
LEAST |= {"batch_size": 1, "iterations_per_epoch": 1, "val_interval": 1}
CHOICES = {"score_space": ("patient", "training")}
# Options that may name a file: its content counts, not its place.
WHAT_IS_IN = dict.fromkeys(("collection", "source_collection"), "patients, splits or files")
WHAT_IS_IN |= {"affinity": "weights"}
CONTENT = "content "
NO_MEMORY = ("allocate memory", "start new thread")  # what PyTorch and Python say
LESS_MEMORY = "--n_jobs, --batch_size or --roi_size"
LOG = "log.txt"
"""The printed output of a job, in its folder."""
# The command line gives these values as text.
JSON_WORDS = {"true": True, "false": False, "null": None}
WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def _evaluating(kind: type[Evaluating]) -> Evaluating | None:
    """The `ConfigWorkflow` or `ConfigParser` that evaluates the calling expression, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def bundle_root() -> str:
    """Absolute path of the bundle whose config is being evaluated: the parent of its ``configs`` folder.

    With ``"bundle_root": "$transfer.bundle_root()"`` a config works from any current folder, and in a copy of the
    bundle. Outside of a `ConfigWorkflow` (with a bare `ConfigParser`) it is the current folder.
    """
    workflow = _evaluating(ConfigWorkflow)
    if workflow is None:
        return str(Path.cwd())
    folder = Path(workflow.config_root_path).resolve()
    return str(folder.parent if folder.name == "configs" else folder)


def start() -> None:
    """First line of every ``initialize``: read true, false and null as JSON does, and refuse misspelled options.

    Also ends the program with one line instead of a traceback for an `InputError`, and silences MONAI's own deprecation
    warnings.

    Raises:
        InputError: an option that no config of the bundle declares or uses; an option of another type than in the
            bundle's configs; no epoch would be validated; or a config for several processes was not started by
            torchrun.
    """
    _end_in_one_line()
    torch.set_num_threads(threads_for(1))
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"monai\.")
    warnings.filterwarnings("ignore", "A worker stopped while")  # joblib replaces workers that have grown by 300 MB
    workflow = _evaluating(ConfigWorkflow)
    parser, folder = workflow.parser, Path(workflow.config_root_path)
    for key, value in parser.get().items():
        if isinstance(value, str) and value in JSON_WORDS:
            parser[key] = JSON_WORDS[value]
    _check_options(parser.get(), _declared(folder))
    interval = parser.get_parsed_content("val_interval", default=None)
    epochs = None if interval is None else parser.get_parsed_content("epochs", default=None)
    if epochs is not None and interval > epochs > 0:  # there would be no best network
        asked = f"--val_interval is {interval}, but --epochs is {epochs}"
        raise InputError(f"{asked}: no epoch would be validated; give --val_interval of at most {epochs}.")
    if "RANK" not in os.environ and "init_process_group" in str(parser.get("initialize")):
        problem = "a multi_gpu config needs several processes"
        raise InputError(f"{problem}; start it by `torchrun --nproc_per_node=2 -m monai.bundle run ...`.")


def _declared(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of each config of a bundle."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _options(content: Mapping[str, Any]) -> set[str]:
    """The names of a config's options: its top-level keys, also of keys such as ``loss#weight``."""
    return {key.split("#")[0] for key in content}


def _check_options(config: Mapping[str, Any], declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that this run does not use, such as misspelled ones, and values of a wrong type.

    MONAI does not say which files a config was read from. We assume every file of the bundle whose keys are all in it.
    """
    files = {name: _options(content) for name, content in declared.items()}
    used = set(re.findall(r"[@%]([A-Za-z_]\w*)", json.dumps(config, default=str)))
    known = used.union(*(keys for keys in files.values() if keys <= config.keys()))
    kinds: dict[str, set[type]] = defaultdict(set, {key: {int} for key in LEAST})
    for key, value in (item for content in declared.values() for item in content.items()):
        if value is not None and not _is_expression(value):
            kinds[key].add(type(value))
    for key, value in config.items():
        if key not in known and key[0] != "_":
            if others := [name for name, keys in files.items() if key in keys and name != "metadata.json"]:
                inside = "; give it inside --settings, for the trainings" if "settings" in config else ""
                raise InputError(f"option --{key} has no effect here; it belongs to {', '.join(others)}{inside}.")
            docs = "; see the bundle's docs/README.md for the options it has."
            raise InputError(f"option --{key} is not used by this bundle{_hint(key, known, docs, '--')}")
        if value is None or _is_expression(value):
            continue
        kind, given = kinds[key], type(value)
        if kind == {dict} != {given}:
            near = _hint(key, kinds.keys() - {key}, "", "--")
            raise InputError(f"option --{key} is a group of settings; give one of them, such as --{key}#NAME{near}")
        if kind & WORDS.keys() and given not in (kind | {int} if float in kind else kind):
            expected = " or ".join(word for one, word in WORDS.items() if one in kind)
            raise InputError(f"option --{key} is {value!r}; expected {expected}.")
        if key in CHOICES:
            require_choice(f"option --{key}", value, CHOICES[key])
        if isinstance(value, int | float) and value < LEAST.get(key, value):
            raise InputError(f"option --{key} is {value}; expected at least {LEAST[key]}.")


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def on_command_line() -> bool:
    """True if the program is ``python -m monai.bundle``."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    return program is not None and program.name == "monai.bundle.__main__"


def _end_in_one_line() -> None:
    """On the command line, print an error in one line, without the traceback of the config machinery around it.

    Ctrl-C and SIGTERM also give one line, and the exit codes that shells use for them.
    """
    if not on_command_line():
        return
    process = os.getpid()

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if (said := in_one_line(error)) is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"\nerror: {said}", file=sys.stderr)

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a data loader's worker, which inherited this handler
            os.kill(os.getpid(), number)
        while frame.f_back:
            frame = frame.f_back
        if frame.f_globals["__name__"] == "threading":  # the interpreter is shutting down: SystemExit has no effect
            os._exit(128 + number)
        logging.disable()  # libraries would log the interruption
        print(f"\nstopped by {signal.Signals(number).name}; run the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + number)

    sys.excepthook = hook
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def in_one_line(error: BaseException) -> str | None:
    """The problem and the solution, where these are known; None: a fault of ours, which needs its traceback."""
    cause, again = innermost_or_input_error(error), "run the same command again"
    if isinstance(cause, InputError):
        return str(cause)
    if isinstance(cause, OSError):  # a full disk, a folder that somebody deleted
        return f"{cause}; solve this, and {again}"
    while error is not None:  # a thread that could not start is hidden behind what came of that
        said = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(one in said for one in NO_MEMORY):
            return f"out of memory ({first_line(error)}); {again} with a smaller {LESS_MEMORY}"
        error = error.__cause__ or error.__context__
    return None


def innermost_or_input_error(error: BaseException) -> BaseException:
    """The first error in a chain of causes, or the first `InputError` or OSError in it."""
    while not isinstance(error, InputError | OSError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def current_config() -> dict[str, Any]:
    """The config that is being evaluated, as plain JSON with all overrides, and with an absolute ``bundle_root``.

    Raises:
        InputError: called while no config is evaluated, or an override is not a JSON value.
    """
    parser = _evaluating(ConfigParser)
    if parser is None:
        raise InputError("a run must be part of a config; start it with `python -m monai.bundle run`.")
    content = {key: value for key, value in parser.get().items() if key != "_meta_"}
    content["bundle_root"] = parser.get_parsed_content("bundle_root")
    try:
        return json.loads(json.dumps(content))
    except TypeError as error:
        raise InputError(f"a value of the config is no JSON ({error}); give overrides as JSON values.") from error


def identity(config: Mapping[str, Any], *, without: Container[str] = ()) -> dict[str, Any]:
    """The settings that decide what a run computes: plain settings, network, loss, optimizer and transforms.

    If a setting names a collection or a file of weights, the content of the file counts, not its place.

    Args:
        config: see `current_config`.
        without: names of settings to leave out.
    """
    plain, parts = (str, int, float, bool, list, type(None)), ConfigParser(dict(config))
    found = {k: v for k, v in config.items() if isinstance(v, plain) and k not in HOW_NOT_WHAT and k[:1] != "_"}
    found |= {name: part for name in DECIDING if (part := parts.get(name)) is not None}
    for name in WHAT_IS_IN:
        path = config.get(name)
        if isinstance(path, str) and Path(path).is_file():
            of = load_collection(path).fingerprint if name != "affinity" else _file_hash(path)
            found[name] = CONTENT + of
    return {name: value for name, value in sorted(found.items()) if name not in without}


def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def claim_output(output_dir: str | os.PathLike[str]) -> Path:
    """Reserve ``output_dir`` for this run, and write the run's config into it as ``config.json``.

    A run with the same settings is continued. A run with other settings is never overwritten, unless it wrote nothing
    yet, for example because of bad input.

    Raises:
        InputError: the folder cannot be written to, or holds a run with other settings.
    """
    folder = writable(output_dir)
    config = current_config()
    now, record = identity(config), folder / "config.json"
    if record.is_file() and any(path.name not in (record.name, LOG) for path in folder.glob("[!.]*")):
        _require_same(f"output folder {folder} holds a run", record, now)
    elif int(os.environ.get("RANK", 0)) == 0:
        theirs = [name for name in ("model.pt", "last.pt", "metrics.csv") if (folder / name).exists()]
        if theirs and not record.is_file():
            raise InputError(f"{folder} holds a {theirs[0]} of an unknown run; give another folder with --output_dir.")
        write_json(record, config | {"_identity_": now})
    return folder


def _require_same(holds: str, record: Path, now: Mapping[str, Any]) -> None:
    """Refuse a run or study whose settings differ from those in the record."""
    before = read_json(record).get("_identity_", {})
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        what = f"{holds} with {name}={one!r}, but this one has {other!r}"
        if name in WHAT_IS_IN and all(str(value).startswith(CONTENT) for value in (one, other)):
            what = f"{holds} on another {name}, with other {WHAT_IS_IN[name]} than this one"
        raise InputError(f"{what}; give another folder with --output_dir, or delete that one.")


def writable(output_dir: str | os.PathLike[str]) -> Path:
    """Make the folder if needed, test that it can be written to, and return it."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"output folder {folder} cannot be written to ({error.strerror})"
        raise InputError(f"{problem}; give another folder with --output_dir.") from error
    return folder


def study_config(output_dir: str | os.PathLike[str], settings: Mapping[str, Any], **decided: Any) -> dict[str, Any]:
    """The bundle's ``train.json`` with the ``settings`` of a study, which all its runs share.

    A study may grow: with more targets, seeds or methods, the finished runs in its folder are reused. Its settings must
    not change once it has runs; they are kept in ``settings.json``.

    Args:
        output_dir: of the study.
        settings: options of ``train.json``.
        decided: further values that all runs share.

    Raises:
        InputError: a setting that is no option of the bundle, or settings that differ from those of the study in the
            folder.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"settings is {settings!r}; expected a mapping of options of train.json to values.")
    root = Path(current_config()["bundle_root"])
    known = set().union(*map(_options, _declared(root / "configs").values()))
    for name in settings:
        if name.split("#")[0] not in known:
            raise InputError(f"--settings holds {name}, which is no option of this bundle{_hint(name, known, '.')}")
    record = writable(output_dir) / "settings.json"
    now = json.loads(json.dumps(identity(settings) | decided))
    if record.is_file() and (record.parent / "runs").is_dir():
        _require_same(f"output folder {output_dir} holds a study", record, now)
    write_json(record, {"settings": dict(settings), **decided, "_identity_": now})
    train = json.loads((root / "configs" / "train.json").read_text(encoding="utf-8"))
    return train | {"source_dir": str(root / "models" / "sources")} | dict(settings) | {"bundle_root": str(root)}


def _hint(name: str, known: Collection[str], otherwise: str, option: str = "") -> str:
    near = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {option}{near[0]}?" if near else otherwise


def threads_for(n_jobs: int) -> int:
    """Number of threads for each of several runs: never all cores.

    OpenMP threads that wait for a busy core cost more than the last core gains (measured: 30 times slower on two cores
    with one busy).
    """
    return max(1, cpu_count() // max(n_jobs, 2))
