"""Files are written whole or not at all, and known by what is in them."""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd

MUCH = 2**27  # bytes to read, after which hashes are worth keeping


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, renamed to it when the block succeeds and removed when it does not.

    The temporary name keeps the suffixes (``.nii.gz``), which writers choose their format by. What a process that was
    killed left of the same path is cleared away.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("1 2 3")
    >>> target.read_text()
    '1 2 3'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = f".{path.name}.{crc32(socket.gethostname().encode()):x}-"
    for left in path.parent.glob(f"{glob.escape(hidden)}*"):
        if (made_by := re.match(r"\d+", left.name.removeprefix(hidden))) and not _runs(int(made_by[0])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{hidden}{os.getpid()}-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of somebody else
        pass
    return True


def cache_root() -> Path:
    """Where what is expensive to make is kept: ``$MONAI_DATA_DIRECTORY``, or ``medtl`` in the user's cache."""
    if data := os.environ.get("MONAI_DATA_DIRECTORY"):
        return Path(data)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medtl"


def content_hashes(paths: Iterable[Path]) -> dict[Path, list[str]]:
    """What each path holds, as SHA-256: of a file, of both of an Analyze pair, of all in a folder; none of no file.

    A file is read again only where its size, times or inode have changed.

    >>> content_hashes([Path("no such file")])
    {PosixPath('no such file'): []}
    """
    record, bytes_read, found = cache_root() / "hashes.json", 0, {}
    known = _known_hashes(record)
    for path in paths:
        found[path] = []
        for file in _files_of(path):
            of = file.stat()
            stamp, name = [of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino], str(file.resolve())
            if known.get(name, [None])[0] != stamp:
                with open(file, "rb") as content:
                    known[name] = [stamp, hashlib.file_digest(content, "sha256").hexdigest()]
                bytes_read += of.st_size
            found[path].append(known[name][1])
    if bytes_read > MUCH:
        with suppress(OSError):  # a cache that cannot be written to costs time only
            write_json(record, {name: kept for name, kept in known.items() if os.path.exists(name)})
    return found


@cache
def _known_hashes(record: Path) -> dict[str, list[Any]]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if suffix_of(path) in (".hdr", ".img", ".mhd"):  # the voxels are in another one
        return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [path] if path.is_file() else []


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The ending that says what format a file has, in lower case: ``.nii.gz`` is one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` and one line end, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")


def write_csv(path: str | os.PathLike[str], table: pd.DataFrame, *, digits: int | None = 6) -> None:
    """Write a table without its index, whole or not at all; numbers with so many digits, or (None) in full."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format=digits and f"%.{digits}g")
