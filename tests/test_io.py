"""Atomic writes, and hashes of files."""

import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from medtl_ext import _io
from medtl_ext._io import atomic_path, content_hashes

KILLED = """
import os, sys
from medtl_ext._io import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    path = tmp_path / "table [1].csv"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert [one.name[:14] for one in tmp_path.iterdir()] == [".table [1].csv"]
    with atomic_path(path) as mine:
        mine.touch()
        with atomic_path(path) as other:  # of a process that runs
            other.touch()
        assert mine.is_file()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ["nii.gz", "hdr"])
def test_a_label_corrected_in_place_has_another_hash(tmp_path, monkeypatch, ending):
    label, hashes = np.zeros((4, 4, 4), np.uint8), []
    for value in (1, 2, 1):
        label[0, 0, 0] = value
        kind = nibabel.AnalyzeImage if ending == "hdr" else nibabel.Nifti1Image
        nibabel.save(kind(label, None), tmp_path / f"l.{ending}")
        hashes.append(content_hashes([tmp_path / f"l.{ending}"])[tmp_path / f"l.{ending}"])
    assert hashes[0] == hashes[2] != hashes[1]
    assert len(hashes[0]) == (2 if ending == "hdr" else 1)


def test_large_files_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setattr(_io, "MUCH", 3)
    (file := tmp_path / "large").write_bytes(b"1234")
    first = content_hashes([file])
    assert (tmp_path / "cache" / "hashes.json").is_file()
    _io._known_hashes.cache_clear()  # as in another process
    monkeypatch.setattr("hashlib.file_digest", None)
    assert content_hashes([file]) == first
    for clock in (None, (0, 0)):  # a clock that goes back makes a file older than its hash
        os.utime(file, clock)
        with pytest.raises(TypeError):
            content_hashes([file])
