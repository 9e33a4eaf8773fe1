"""How the tests of the bundles run a bundle: in this process, or as users start it."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from medtl_ext import InputError

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Bundle:
    """A bundle of the repository, with the small settings that its ``train.json`` gets in tests."""

    name: str
    tiny: Mapping[str, Any]

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

    def start(self, files: Sequence[str], options: Mapping[str, Any], *, processes: int = 0) -> subprocess.Popen:
        """As a user does, from inside the bundle; on several processes by torchrun."""
        return start(files, options, cwd=self.root, processes=processes)


def command(files: Sequence[str], options: Mapping[str, Any], *, processes: int = 0) -> list[str]:
    """What a user types; lists and dictionaries as Python writes them, for that is how they are read."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", str(value) if isinstance(value, str | list | dict) else json.dumps(value)]
    config = files[0] if len(files) == 1 else str(list(files))
    return [sys.executable, *launcher, "-m", "monai.bundle", "run", "--config_file", config, *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def start(
    files: Sequence[str], options: Mapping[str, Any], *, cwd: Path = REPOSITORY, processes: int = 0
) -> subprocess.Popen:
    return subprocess.Popen(
        command(files, options, processes=processes),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the workers of its jobs can be killed with it
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for success; what was printed."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    return output


def kill_once_there(process: subprocess.Popen, pattern: str | Path, *, seconds: float = 300) -> None:
    """Kill it and its workers as soon as a file of this pattern is there, which must be before it ends.

    By the module ``glob``, which passes over a temporary folder that goes while it looks; ``Path.glob`` raises.
    """
    began = time.monotonic()
    while not glob.glob(str(pattern), recursive=True):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() - began < seconds, f"no {pattern} after {seconds} s"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trainings(folder: Path) -> dict[Path, int]:
    """Every training below the folder, and when its last epoch was saved: equal if nothing was trained since."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("last.pt")}


def refused(action: Callable[[], Any]) -> str:
    """The text of the `InputError` that stopped it, which is one line."""
    with pytest.raises((InputError, RuntimeError)) as caught:
        action()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None, "no InputError among the causes"
    assert "\n" not in str(error)
    return str(error)
