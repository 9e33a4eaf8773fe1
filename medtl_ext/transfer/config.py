"""What bundles' configs need of themselves: where they are, whether the options make sense, and whose folder this is.

MONAI evaluates a config lazily and knows neither its own folder nor a misspelled option: the functions here find the
`monai.bundle.ConfigWorkflow` that is evaluating them by walking up the call stack.
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
from medtl_ext._validation import InputError, require_choice
from medtl_ext.data.collection import load_collection, read_json

Evaluating = TypeVar("Evaluating", ConfigWorkflow, ConfigParser)
# Settings that say how and where a run is carried out, not what it computes.
HOW_NOT_WHAT = {"bundle_root", "output_dir", "source_dir", "settle", "figures", "progress", "check_data", "n_jobs"}
HOW_NOT_WHAT |= {"trust_sources", "num_workers", "device", "rank", "imports", "initialize", "run", "finalize"}
# Settings with parts, which also decide what a run computes.
DECIDING = ("network_def", "loss", "loss_def", "region_loss", "leep", "optimizer", "lr_scheduler", "early_stopping")
DECIDING += ("weight_map", "grid", "normalize", "source", "train#deterministic_transforms", "train#random_transforms")
DECIDING += ("pretraining", "recipe")
LEAST = {"seed": 0, "pool_seed": 0, "num_workers": 0, "epochs": 0, "pool_epochs": 1, "patience": 1}
LEAST |= {"batch_size": 1, "iterations_per_epoch": 1, "val_interval": 1}
CHOICES = {"score_space": ("patient", "training")}
# Options that may name a file, of which the content counts and not the place.
WHAT_IS_IN = dict.fromkeys(("collection", "source_collection"), "patients, splits or files")
WHAT_IS_IN |= {"affinity": "weights"}
CONTENT = "content "
LOG = "log.txt"
"""What a run that is a job of another said, in its folder."""
# What the command line leaves as text, where a config would have a value.
JSON_WORDS = {"true": True, "false": False, "null": None}
WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def _evaluating(kind: type[Evaluating]) -> Evaluating | None:
    """The `ConfigWorkflow` or `ConfigParser` that is evaluating the calling expression, or None outside of one."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def bundle_root() -> str:
    """Absolute path of the bundle whose config is being evaluated: the parent of its ``configs`` folder.

    Makes ``"bundle_root": "$bundle.bundle_root()"`` right from the repository root, from inside the bundle and in a
    copy elsewhere. Outside of a `ConfigWorkflow` (a bare `ConfigParser`) it is the current folder.
    """
    workflow = _evaluating(ConfigWorkflow)
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
    _end_in_one_line()
    torch.set_num_threads(threads_for(1))
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"monai\.")
    warnings.filterwarnings("ignore", "A worker stopped while")  # joblib's: one that has grown by 300 MB is replaced
    workflow = _evaluating(ConfigWorkflow)
    parser, folder = workflow.parser, Path(workflow.config_root_path)
    for key, value in parser.get().items():
        if isinstance(value, str) and value in JSON_WORDS:
            parser[key] = JSON_WORDS[value]
    _check_options(parser.get(), _declared(folder))
    interval = parser.get_parsed_content("val_interval", default=None)
    epochs = None if interval is None else parser.get_parsed_content("epochs", default=None)
    if epochs is not None and interval > epochs > 0:  # it would end without a best network
        asked = f"--val_interval is {interval}, --epochs {epochs}"
        raise InputError(f"{asked}: no epoch would be validated; give at most --epochs.")
    if "RANK" not in os.environ and "init_process_group" in str(parser.get("initialize")):
        raise InputError("start a multi_gpu config by `torchrun --nproc_per_node=2 -m monai.bundle run ...`.")


def _declared(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of each config of a bundle."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _options(content: Mapping[str, Any]) -> set[str]:
    """Its top-level keys, parts of which an overlay may set: what it sets to nothing is still an option."""
    return {key.split("#")[0] for key in content}


def _check_options(config: Mapping[str, Any], declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that nothing in this run uses, as misspelled ones, and values of a kind that no config has.

    MONAI does not say which files a config was read from: those whose keys are all in it may be among them.
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
                inside = ", which the trainings here take from --settings" if "settings" in config else ""
                raise InputError(f"option --{key} does nothing here; it is one of {', '.join(others)}{inside}.")
            docs = "; see the bundle's docs/README.md for the options it has."
            raise InputError(f"option --{key} is not used by this bundle{_hint(key, known, docs, '--')}")
        if value is None or _is_expression(value):
            continue
        kind, given = kinds[key], type(value)
        if kind == {dict} != {given}:
            near = _hint(key, kinds.keys() - {key}, "", "--")
            raise InputError(f"option --{key} is a part with settings of its own, such as --{key}#NAME{near}")
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
    """Whether the program is ``python -m monai.bundle``."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    return program is not None and program.name == "monai.bundle.__main__"


def _end_in_one_line() -> None:
    """On the command line, print an `InputError` or OSError without the traceback of the config machinery around it.

    Ctrl-C and SIGTERM too are one line, with the exit codes that shells give them.
    """
    if not on_command_line():
        return
    process = os.getpid()

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        cause = innermost_or_input_error(error)
        if isinstance(cause, InputError):
            print(f"\nerror: {cause}", file=sys.stderr)
        elif isinstance(cause, OSError):  # a full disk, a folder that somebody deleted
            print(f"\nerror: {cause}; put that right, and type the same command again", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a loader's worker, forked with this
            os.kill(os.getpid(), number)
        while frame.f_back:
            frame = frame.f_back
        if frame.f_globals["__name__"] == "threading":  # the run is over, and nobody is left to catch an exit
            os._exit(128 + number)
        logging.disable()  # what libraries say of it
        print(f"\nstopped by {signal.Signals(number).name}; type the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + number)

    sys.excepthook = hook
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def innermost_or_input_error(error: BaseException) -> BaseException:
    """What a chain of errors began with, or what we say of it, where we do."""
    while not isinstance(error, InputError | OSError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def current_config() -> dict[str, Any]:
    """The config being evaluated as plain JSON content, with every override in it and ``bundle_root`` made absolute.

    Raises:
        InputError: called while no config is evaluated, or an override is not a JSON value.
    """
    parser = _evaluating(ConfigParser)
    if parser is None:
        raise InputError("a run needs a config that is being evaluated: start it with `python -m monai.bundle run`.")
    content = {key: value for key, value in parser.get().items() if key != "_meta_"}
    content["bundle_root"] = parser.get_parsed_content("bundle_root")
    try:
        return json.loads(json.dumps(content))
    except TypeError as error:
        raise InputError(f"the config holds what is no JSON ({error}); pass overrides as JSON values.") from error


def identity(config: Mapping[str, Any], *, without: Container[str] = ()) -> dict[str, Any]:
    """What decides what a run of a config computes: its plain settings, and network, loss, optimizer, transforms.

    Of a collection or a file of weights that a setting names it is the content, wherever the file lies.

    Args:
        config: see `current_config`.
        without: names of settings that do not count.
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
    """Make ``output_dir`` ready for this run and no other, and leave the run's config in it as ``config.json``.

    An interrupted or finished run with the same settings is continued; one with other settings is never overwritten,
    unless it stopped before it wrote anything, as bad input makes it.

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
            raise InputError(f"{folder} holds {theirs[0]} of no run that is known here; give another --output_dir.")
        write_json(record, config | {"_identity_": now})
    return folder


def _require_same(holds: str, record: Path, now: Mapping[str, Any]) -> None:
    """Refuse what has another identity than the record of before."""
    before = read_json(record).get("_identity_", {})
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        what = f"{holds} with {name}={one!r}, this one has {other!r}"
        if name in WHAT_IS_IN and all(str(value).startswith(CONTENT) for value in (one, other)):
            what = f"{holds} on another {name}, with other {WHAT_IS_IN[name]} than this one has"
        raise InputError(f"{what}; give another folder with --output_dir, or delete that one.")


def writable(output_dir: str | os.PathLike[str]) -> Path:
    """The folder, made where it is not there."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be written to ({error.strerror}); give another.") from error
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
    known = set().union(*map(_options, _declared(root / "configs").values()))
    for name in settings:
        if name.split("#")[0] not in known:
            raise InputError(f"settings holds {name}, which is no option of this bundle{_hint(name, known, '.')}")
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
    """Threads for each of several runs: never all cores, for OpenMP threads that wait for a busy core cost far more
    than the last core gives (measured: 30 times slower on two cores with one busy).
    """
    return max(1, cpu_count() // max(n_jobs, 2))
