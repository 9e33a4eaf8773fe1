"""Kill the four bundles' main jobs at random moments, type the same command again, and compare with undisturbed runs.

    python benchmarks/kills.py [BUNDLE ...] [--kills 6] [--seed 0] [--keep FOLDER]

Each bundle runs once undisturbed, then in other folders of its own (outputs, sources and phantom): there it gets
SIGKILL, all its processes or the parent alone, or SIGTERM, at a random moment, or while a file is being written, up to
three times, and ends by itself. Prints a table of counts, and ends with 1 unless every file is the same bit for bit,
but for how long things took, and nothing is left behind: no process after ten seconds, no half-written file.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SEGMENTATION = {
    "spacing": [6.2, 6.2, 8.0],
    "roi_size": [32, 32],
    "epochs": 3,
    "iterations_per_epoch": 4,
    "batch_size": 4,
}
SEGMENTATION |= {"network_def#features": [4, 4, 8, 8, 8, 4], "target_task": "17-T2-ED", "phantom_subjects": 8}
POOL = {"sources": ["14-T2-ED", "14-FLAIR-ED", "14-T2-ET"], "pool_epochs": 3}
SETTINGS = {
    "risk_map": SEGMENTATION | {"train_slices": 12, "source": "14-FLAIR-ED"},
    "source_selection": SEGMENTATION | POOL | {"train_slices": 16, "pixels": 40, "n_resamples": 50},
    "sequential_transfer": SEGMENTATION
    | POOL
    | {"affinity": "context", "affinity_patients": 2, "n_clusters": 1, "source_patients": 3, "stage_patients": 1},
    "dataset_transferability": {
        "target_task": "17-T2-tumour",
        "sources": ["14-T2-tumour", "14-FLAIR-level", "14-ALL-modality"],
        "phantom_subjects": 8,
        "image_size": 32,
        "network_def#layers": [1, 1, 1, 1],
        "network_def#block_inplanes": [16, 16, 32, 32],
        "train_per_class": 24,
        "val_per_class": 8,
        "pool_epochs": 3,
        "iterations_per_epoch": 4,
        "batch_size": 16,
        "n_resamples": 40,
    },
}
MARK = "MEDTL_KILLS"  # names the run in the environment of all its processes
MOST = 3  # kills of a run, which may then end


def start(bundle: str, folder: Path) -> subprocess.Popen:
    """The same command each time, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    options = SETTINGS[bundle] | {
        "seed": 0,
        "progress": False,
        "output_dir": folder / "out",
        "source_dir": folder / "sources",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", typed(value))]
    config = REPOSITORY / "bundles" / bundle / "configs" / "train.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), *words]
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    here = {"MONAI_DATA_DIRECTORY": str(folder / "data"), MARK: str(folder), "PYTHONPATH": paths}
    with (folder / "said.txt").open("a") as log:
        where = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, env=os.environ | here | {"OMP_NUM_THREADS": "1"}, **where)


def typed(value: object) -> str:
    return str(value) if isinstance(value, str | list | Path) else json.dumps(value)


def alive(folder: Path) -> list[int]:
    """Processes of a run that are still there."""
    found = []
    for process in filter(lambda path: path.name.isdigit(), Path("/proc").iterdir()):
        try:
            ours = f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes()
            if ours and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(process.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def disturb(running: subprocess.Popen, folder: Path, drawn: random.Random, seconds: float) -> str | None:
    """Kill the run in one of the ways; which, or None where it had ended before."""
    how = drawn.choice(["all", "all", "parent", "SIGTERM"])
    at, writing = time.monotonic() + drawn.uniform(0, seconds), drawn.random() < 0.3
    while running.poll() is None:
        if time.monotonic() > at and (not writing or any(folder.rglob("[.]*.[!l]*/*"))):
            if how == "all":
                os.killpg(running.pid, signal.SIGKILL)
            else:
                running.send_signal(signal.SIGKILL if how == "parent" else signal.SIGTERM)
            running.wait()
            return how
        time.sleep(0.005)
    return None


def visible(folder: Path) -> dict[str, Path]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    plain = {
        name: path for name, path in files.items() if not re.search(r"(^|/)\.|tensorboard/|(log|said)\.txt$", name)
    }
    return dict(sorted(plain.items()))


def content(path: Path, folder: Path) -> object:
    """What has to be the same in both runs: not how long things took, nor where they are."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        return repr(flat(without_minutes(state)))
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=str).drop(columns="minutes", errors="ignore").to_csv()
    raw = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
    if path.suffix == ".json":
        return without_minutes(json.loads(raw))
    if path.suffix == ".html":
        return re.sub(rb"(?s)<table[^>]*>(?:(?!</table>).)*?>minutes<.*?</table>", b"", raw)
    return raw


def without_minutes(state: object) -> object:
    if isinstance(state, dict):
        return {name: without_minutes(value) for name, value in state.items() if name != "minutes"}
    return [without_minutes(value) for value in state] if isinstance(state, list) else state


def flat(state: object) -> object:
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {name: flat(value) for name, value in state.items()}
    return [flat(value) for value in state] if isinstance(state, list) else state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", default=list(SETTINGS))
    parser.add_argument("--kills", type=int, default=6, help="of each bundle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where runs are made and kept; else a temporary folder")
    given = parser.parse_args()
    drawn, rows = random.Random(given.seed), []
    for bundle in given.bundles:
        home = Path(given.keep or tempfile.mkdtemp()) / bundle
        began = time.monotonic()
        if start(bundle, home / "undisturbed").wait():
            sys.exit(f"{bundle} fails undisturbed: see {home}/undisturbed/said.txt")
        seconds = time.monotonic() - began
        row = dict.fromkeys(("kills", "runs", "same", "other files", "left over", "tracebacks", "processes left"), 0)
        while row["kills"] < given.kills:
            folder = home / str(row["runs"])
            row["runs"] += 1
            for kill in range(MOST + 1):
                running = start(bundle, folder)
                how = disturb(running, folder, drawn, seconds) if kill < MOST else running.wait() and None
                if how is None:
                    break
                row["kills"] += 1
                end = time.monotonic() + 10
                while (left := alive(folder)) and time.monotonic() < end:
                    time.sleep(0.1)
                row["processes left"] += len(left)
                for process in left:
                    os.kill(process, signal.SIGKILL)
            one, two = visible(home / "undisturbed"), visible(folder)
            other = [
                name
                for name in one.keys() | two.keys()
                if not (name in one and name in two)
                or content(one[name], home / "undisturbed") != content(two[name], folder)
            ]
            hidden = [path for path in folder.rglob(".*") if path.is_dir()]
            row["same"] += not other and running.returncode == 0
            row["other files"] += len(other)
            row["left over"] += len(hidden)
            row["tracebacks"] += "Traceback" in (folder / "said.txt").read_text()
            if other or hidden or running.returncode:
                print(f"{bundle}: {folder.name} ended with {running.returncode}; {other}, {hidden}", flush=True)
        rows.append({"bundle": bundle, "seconds": round(seconds)} | row)
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
        if not given.keep:
            shutil.rmtree(home.parent)
    bad = any(
        row["same"] < row["runs"] or row["left over"] or row["tracebacks"] or row["processes left"] for row in rows
    )
    sys.exit(bad)


if __name__ == "__main__":
    main()
