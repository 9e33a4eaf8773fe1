"""Write files atomically, and identify files by their content."""

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

MUCH = 2**27  # bytes; if more are read, hashes are cached on disk


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. It is renamed to ``path`` if the block succeeds, and deleted if it fails.

    The temporary name keeps the suffixes (``.nii.gz``), because writers choose the format by them. Temporary files that
    a killed process left for the same path are deleted.

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
    except PermissionError:  # it runs, and belongs to another user
        pass
    return True


def cache_root() -> Path:
    """Folder for what is expensive to compute: ``$MONAI_DATA_DIRECTORY``, or ``medtl`` in the user's cache."""
    if data := os.environ.get("MONAI_DATA_DIRECTORY"):
        return Path(data)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medtl"


def content_hashes(paths: Iterable[Path]) -> dict[Path, list[str]]:
    """SHA-256 hashes of each path: of the file, of both files of an Analyze pair, or of all files in a folder.

    A missing path has no hash. A file is read again only if its size, times or inode have changed.

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
        with suppress(OSError):  # without a writable cache, the next call only takes longer
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
    if suffix_of(path) in (".hdr", ".img", ".mhd"):  # header and voxels are two files
        return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [path] if path.is_file() else []


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The extension of a file in lower case; ``.nii.gz`` counts as one extension."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` and one line end, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")


def write_csv(path: str | os.PathLike[str], table: pd.DataFrame, *, digits: int | None = 6) -> None:
    """Write a table without its index, atomically. ``digits`` are significant digits; None writes numbers in full."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format=digits and f"%.{digits}g")
