"""Give the package broken and hostile files and full disks, and count what it does with them.

    python benchmarks/faults.py [collections nifti sources tables hostile runs] [--tries 60] [--seed 0]

Each attempt is a fork with ten seconds (a whole run: two minutes, or five times what it takes undisturbed) and 3 GiB.
It is *handled* where one line says what is wrong, *right* where what comes out is as it should be, or else a traceback,
a hang, out of memory, or *wrongly accepted*: what passed the check cannot be loaded, other numbers come out, or it
should have been refused. No string of a file may be executed, which a canary would tell. All other outcomes are
printed; ends with 1 if there is one.
"""

import argparse
import copy
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
from kills import SETTINGS, content, visible
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose

import medtl_ext.data.__main__ as cli
from medtl_ext.data import load_collection
from medtl_ext.data.classification import load_medmnist
from medtl_ext.data.plan import Grid, grid_steps
from medtl_ext.transfer.config import in_one_line
from medtl_ext.transfer.sources.allowed import built_network, transforms_of
from medtl_ext.transfer.sources.network import untouched
from medtl_ext.transfer.sources.pool import card_at

KINDS = ("handled", "right", "traceback", "hang", "out of memory", "wrongly accepted")
CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "risk_map" / "configs"
UNET = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [4] * 6}
STEPS = [{"_target_": "Spacingd", "pixdim": [1, 1, 1]}, {"_target_": "ScaleIntensityd"}]
CARD = {"checkpoint": "net.pt", "network": UNET, "classes": ["background", "lesion"], "preprocessing": STEPS}
NAMES = [
    "../../x",
    "/dev/zero",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 10**6,
    "",
    "<script>alert(1)</script>",
    "=cmd()",
    "-rf",
]
ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    float("nan"),
    2**70,
    [],
    {},
    [[]],
    [None],
    {"": ""},
    "@a",
    "%a",
    "fifo.nii",
    *NAMES,
]
# Of a NIfTI header: sizes, type, voxels, offset, scale, codes, affine.
HEADER = dict.fromkeys((40, 42, 44, 48, 70, 72, 252, 254), "<h") | dict.fromkeys(
    (76, 80, 88, 108, 112, 116, 280, 320), "<f"
)
NUMBERS = {"<h": [0, -1, 1, 4, 8, 16, 512, 30000], "<f": [0.0, -1.0, np.nan, np.inf, 1e38, 1e-38, 1e6, 353.0, 2.0]}
Attempts = Iterator[tuple[str, Callable[[], object]]]


class WronglyAcceptedError(Exception):
    """Nobody refused what is wrong."""


def outcome(action: Callable[[], object], log: Path, seconds: float) -> tuple[str, str]:
    """What became of an action in a fork of this process, and what it said last."""
    process, end = os.fork(), time.monotonic() + seconds
    if process == 0:
        os.setsid()
        sys.stdout = sys.stderr = file = log.open("w", errors="backslashreplace", buffering=1)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            code = 1 if action() else 0
        except WronglyAcceptedError as error:
            code = KINDS.index("wrongly accepted")
            print(error)
        except BaseException as error:
            known = in_one_line(error)  # as the command line says it
            one_line = known is not None and "\n" not in known and len(known) < 2000
            code = 1 if one_line else KINDS.index("traceback")
            print(f"error: {known}") if one_line else traceback.print_exc()
        os._exit(code)
    why, most = "", resident(process) + 3 * 2**30
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        why = "hang" if time.monotonic() > end else "out of memory" if resident(process) > most else ""
        if why:
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.005)
    said = log.read_text(errors="replace").strip()[-800:]
    kind = "traceback" if not os.WIFEXITED(ended[1]) else KINDS[(1, 0, *range(2, 6))[os.WEXITSTATUS(ended[1])]]
    return why or kind, said


def resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def mutated(drawn: random.Random, raw: bytes) -> bytes:
    """With a bit or a byte changed, a piece cut out, doubled or zeroed, or without its end."""
    at, length, kind = drawn.randrange(len(raw)), drawn.randrange(1, 40), drawn.randrange(6)
    piece, byte = raw[at : at + length], raw[at]
    new = [bytes([byte ^ 1 << drawn.randrange(8)]), bytes([drawn.randrange(256)]), b"", 2 * piece, bytes(length), b""]
    return raw[:at] + new[kind] + raw[at + (1 if kind < 2 else length) :] if kind < 5 else raw[:at]


def mutated_json(drawn: random.Random, value: object) -> bytes:
    """Text with another value, without a key or with one twice, or with other bytes."""
    whole, places = copy.deepcopy(value), []

    def walk(part: object) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(whole)
    (part, key), kind = drawn.choice(places), drawn.randrange(5)
    if kind < 3:
        part[key] = drawn.choice(ODD)
    elif kind == 3:
        part[drawn.choice(NAMES) if isinstance(part, dict) else slice(0, 0)] = (
            part.pop(key) if isinstance(part, dict) else []
        )
    text = json.dumps(whole).encode()
    return mutated(drawn, text) if kind == 4 else text


def collection_in(folder: Path) -> dict:
    """Six patients on a small grid, in two files each, of which one is compressed; its content."""
    drawn, subjects = np.random.default_rng(0), []
    for number in range(6):
        label = np.zeros((12, 14, 6), np.uint8)
        label[3:7, 4:9, 2:4] = 1
        image = (drawn.normal(100, 20, label.shape) + 40 * label).astype(np.float32)
        files = {"image": f"{number}.nii.gz" if number % 2 else f"{number}.nii", "label": f"{number}-label.nii.gz"}
        for name, array in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([2, 2, 4, 1])), folder / files[name])
        who = {
            "id": f"p{number}",
            "patient": f"p{number}",
            "institution": "A",
            "split": ["train", "val", "test"][number % 3],
        }
        subjects.append(who | {"images": {"T1": files["image"]}, "labels": {"lesion": files["label"]}})
    objectives = {"WMH": {"label": "lesion", "values": [1]}}
    return {"name": "faults", "labels": {"lesion": {"WMH": 1}}, "objectives": objectives, "subjects": subjects}


def used(path: Path) -> int:
    """Check a collection, and load what passes as the bundles do."""
    if status := cli.main(["check", str(path)]):
        return status
    of = load_collection(path)
    for task in of.tasks():
        steps = Compose(grid_steps(Grid((2, 2, 4), (16, 16)), label_values=of.label_values(task)))
        for split in {subject.split for subject in of.subjects_of(task)}:
            for item in map(steps, of.datalist(task, split)):
                if item["image"].shape != item["label"].shape or not item["image"].isfinite().all():
                    raise WronglyAcceptedError(item["subject"])
    return 0


def refused(action: Callable[[], object]) -> int:
    """For what nobody should accept."""
    if status := action():
        return int(status)
    raise WronglyAcceptedError


def collections(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    good, path = collection_in(folder), folder / "collection.json"
    for _ in range(tries):
        path.write_bytes(raw := mutated_json(drawn, good))
        yield repr(raw[:2000]), lambda: used(path)


def nifti(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    path = folder / "collection.json"
    path.write_text(json.dumps(collection_in(folder)))
    for _ in range(tries):
        file = drawn.choice(sorted(folder.glob("*.nii*")))
        whole, packed = file.read_bytes(), file.suffix == ".gz"
        raw = bytearray(gzip.decompress(whole) if packed else whole)
        kind, changed = drawn.randrange(4), {}
        for place in drawn.sample(list(HEADER), k=drawn.randrange(1, 3)) if kind < 2 else ():
            changed[place] = drawn.choice(NUMBERS[HEADER[place]])
            struct.pack_into(HEADER[place], raw, place, changed[place])
        raw = mutated(drawn, bytes(raw)) if kind == 2 else bytes(raw)
        packed_again = gzip.compress(raw, mtime=0) if packed else raw
        file.write_bytes(mutated(drawn, packed_again) if kind == 3 else packed_again)
        yield f"{file.name}: kind {kind}, {changed}", lambda: used(path)
        file.write_bytes(whole)


def sources(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    card, weights = folder / "net.json", folder / "net.pt"
    bundle = folder / "bundle"
    for part in ("configs", "models"):
        (bundle / part).mkdir(parents=True)
    torch.save(state := built_network(UNET).state_dict(), weights)
    shutil.copy(weights, bundle / "models" / "model.pt")
    whole = weights.read_bytes()

    def build(path: Path) -> None:
        found = card_at(path, False)
        transforms_of(found.preprocessing or ())
        network = untouched(found, channels=1)
        if path == weights and any(not torch.equal(value, state[name]) for name, value in found.weights().items()):
            raise WronglyAcceptedError
        network(torch.zeros(1, 1, 32, 32))

    for _ in range(tries):
        card.write_text(json.dumps(CARD))
        weights.write_bytes(whole)
        config = {"network_def": UNET, "preprocessing": [{**step, "keys": "image"} for step in STEPS]}
        (bundle / "configs" / "inference.json").write_text(json.dumps(config))
        (bundle / "configs" / "metadata.json").write_text("{}")
        which = drawn.choice([card, weights, bundle / "configs" / "inference.json"])
        which.write_bytes(
            raw := mutated(drawn, whole) if which == weights else mutated_json(drawn, json.loads(which.read_text()))
        )
        yield f"{which.name}: {raw[:1000]!r}", lambda which=which: build(bundle if "configs" in which.parts else which)


def tables(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    collection_in(folder)
    rows = [f"p{n},A,T1,{n}.nii{'.gz' * (n % 2)},{n}-label.nii.gz,{['train', 'val', 'test'][n % 3]}" for n in range(6)]
    table = "\n".join(["subject,institution,modality,image,label,split", *rows]).encode() + b"\n"
    images, labels, arrays = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4), np.array([[0], [1]] * 3), {}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez_compressed(folder / "good.npz", **arrays)
    out, file = folder / "out.json", folder / "mnist.npz"
    read = [
        "read",
        "csv",
        "--root",
        str(folder),
        "--file",
        str(folder / "table.csv"),
        "--labels",
        "WMH=1",
        "--out",
        str(out),
    ]

    def load() -> None:
        found = load_medmnist(file)
        if not (np.array_equal(found.images, np.tile(images, (3, 1, 1))) and np.array_equal(found.labels, [0, 1] * 9)):
            raise WronglyAcceptedError

    for number in range(tries):
        out.unlink(missing_ok=True)
        raw = mutated(drawn, (folder / "good.npz").read_bytes() if number % 2 else table)
        (file if number % 2 else folder / "table.csv").write_bytes(raw)
        yield repr(raw[:1000]), load if number % 2 else lambda: cli.main(read) or used(out)


def hostile(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    """What should be refused, whatever the seed."""
    good, path = collection_in(folder), folder / "collection.json"
    os.mkfifo(folder / "fifo.nii"), os.symlink("loop.nii", folder / "loop.nii")
    raw = bytearray(gzip.decompress((folder / "1.nii.gz").read_bytes()))
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(bytes(raw) + bytes(2**28)))
    struct.pack_into("<3h", raw, 42, 30000, 30000, 30000)
    (folder / "large.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    (folder / "wide.nii").write_bytes(raw)
    for file in ("fifo.nii", "loop.nii", "bomb.nii.gz", "large.nii.gz", "wide.nii", "..", "/proc/self/mem", "none.nii"):
        good["subjects"][1]["images"]["T1"] = file
        path.write_text(json.dumps(good))
        yield f"image {file}", lambda: refused(lambda: used(path))
    good["subjects"][1]["images"]["T1"] = "1.nii.gz"
    for key in ("id", "institution", "patient"):
        for name in [*filter(None, NAMES), f"$__import__('os').system('touch {folder}/canary')", "@a", "%a"]:
            other = copy.deepcopy(good)
            other["subjects"][1][key] = name
            path.write_text(json.dumps(other))
            yield f"{key} {name[:40]!r}", lambda name=name, key=key: refused(lambda: used(path))
    shutil.copy(os.fsencode(folder / "1.nii.gz"), os.fsencode(folder) + b"/\xff.nii.gz")
    good["subjects"][1]["images"]["T1"] = "\udcff.nii.gz"
    path.write_text(json.dumps(good))
    yield "a name that is not UTF-8", lambda: used(path)
    text = json.dumps(good)
    for what, bad in {
        "deeply nested": text[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "a key twice": text[:-1] + ', "name": "x"}',
        "a key twice inside": text.replace('"WMH": 1', '"WMH": 1, "WMH": 2'),
    }.items():
        path.write_text(bad)
        yield f"JSON: {what}", lambda: refused(lambda: used(path))
        (folder / "net.json").write_text(bad.replace('"labels"', '"checkpoint": "net.pt", "labels"'))
        yield f"card: {what}", lambda: refused(lambda: card_at(folder / "net.json", False) and 0)


def run(folder: Path, data: Path, **options: object) -> None:
    os.environ["MONAI_DATA_DIRECTORY"] = str(data)
    settings = SETTINGS["risk_map"] | {
        "audit#arms": ["full"],
        "audit#folds": 0,
        "figures": False,
        "progress": False,
        "n_jobs": 1,
    }
    places = {"output_dir": str(folder / "out"), "source_dir": str(folder / "sources")}
    files = {"config_file": "train.json", "meta_file": "metadata.json", "logging_file": "logging.conf"}
    files = {name: str(CONFIGS / file) for name, file in files.items()}
    workflow = ConfigWorkflow(**files, **settings | places | options)
    workflow.initialize()
    workflow.run()


def runs(folder: Path, drawn: random.Random, tries: int) -> Attempts:
    """Damage to a finished run, a clock that goes back, too little memory, a full disk, a folder that goes away."""
    place, kept, data = folder / "run", folder / "kept", folder / "data"
    yield "undisturbed", lambda: run(place, data)
    shutil.copytree(place, kept)
    expected = visible(kept)

    def again(where: Path = place, but: str = "", **options: object) -> None:
        run(where, data, **options)
        found = visible(where)
        for name in expected.keys() - {but}:
            if name not in found or content(found[name], where) != content(expected[name], place):
                raise WronglyAcceptedError(name)

    damages = [(name, how) for name in expected for how in ("half", "flipped")]
    for name, how in drawn.sample(damages, min(tries, len(damages))):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        raw = (place / name).read_bytes()
        text = name.endswith((".csv", ".json"))  # another digit is still a table
        at = drawn.choice([found.start() for found in re.finditer(rb"\d" if text else rb"(?s).", raw)])
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        (place / name).write_bytes(raw[: len(raw) // 2] if how == "half" else flipped)
        unread = name if Path(name).parent.name != "out" or name.endswith(("last.pt", "config.json")) else ""
        yield f"{name}, {how} ({at})", lambda unread=unread: again(but=unread)
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    for path in place.rglob("*"):
        os.utime(path, (time.time() + 10**8,) * 2)
    yield "the clock went back by three years", again
    for megabytes in (16, 64, 256):
        most = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + megabytes * 2**20
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (most, most))
        alone = partial(again, folder / f"memory{megabytes}")
        yield f"{megabytes} MB of memory besides", lambda limit=limit, alone=alone: (limit(), alone())[1]
        yield "the same, then enough", alone
    for _ in range(min(tries, 4)):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept / "sources", place / "sources")
        gone = threading.Timer(drawn.uniform(1, 8), shutil.rmtree, (place / "out",), {"ignore_errors": True})
        yield "the output folder is deleted", lambda gone=gone: (gone.start(), again())[1]
    disk = folder / "disk"
    disk.mkdir()
    for kilobytes in (64, 256, 512, 1024):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", disk], capture_output=True
        ).returncode:
            return
        try:
            yield f"a disk of {kilobytes} kB", lambda: again(disk)
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            yield "the same, then enough", lambda: again(disk)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            yield "a folder that is read-only", lambda: refused(lambda: again(disk))
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


GROUPS = {function.__name__: function for function in (collections, nifti, sources, tables, hostile, runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), choices=[*GROUPS, []])
    parser.add_argument("--tries", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given, rows = parser.parse_args(), []
    torch.set_num_threads(1)
    for group in given.groups:
        counts = dict.fromkeys(KINDS, 0)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "inside"
            folder.mkdir()
            seconds = 600 if group == "runs" else 10
            for what, action in GROUPS[group](folder, random.Random(given.seed), given.tries):
                began = time.monotonic()
                kind, said = outcome(action, Path(temporary) / "said.txt", seconds)
                counts[kind] += 1
                if what == "undisturbed":
                    seconds = max(120, 5 * (time.monotonic() - began))
                if kind not in KINDS[:2]:
                    print(f"{kind}: {what}\n    {said}", flush=True)
            canaries = len(list(Path(temporary).rglob("canary")))
        rows.append({"group": group, "tried": sum(counts.values()), **counts, "canaries": canaries})
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    sys.exit(any(row[kind] for row in rows for kind in (*KINDS[2:], "canaries")))


if __name__ == "__main__":
    main()
