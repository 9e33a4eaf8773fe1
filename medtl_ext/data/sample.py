"""Small real collections that ship with the package, to try things on."""

import os
import shutil
from pathlib import Path

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError, require_choice

SAMPLES = {
    "retina": "vessels in colour photographs of the retina, PNG (HRF, CC BY 4.0)",
    "hippocampus": "parts of the hippocampus in 3D T1-weighted MRI, NIfTI (Decathlon, CC BY-SA 4.0)",
}


def write_sample(name: str, out: str | os.PathLike[str]) -> Path:
    """Copy a sample into a new folder and return the path of its ``collection.json``.

    ``README.md`` beside it says where the images are from, what was done to them, their licence and whom to cite.

    Raises:
        InputError: there is no such sample, or ``out`` is there already.

    >>> import tempfile
    >>> path = write_sample("retina", tempfile.mkdtemp() + "/retina")
    >>> sorted(file.name for file in path.parent.iterdir())[:2]
    ['README.md', 'collection.json']
    """
    source = Path(__file__).parent / "samples" / require_choice("sample", name, SAMPLES)
    if Path(out).exists():
        raise InputError(f"{out} exists, and nothing is overwritten; give a new folder.")
    with atomic_path(out) as folder:
        shutil.copytree(source, folder)
    return Path(out) / "collection.json"
