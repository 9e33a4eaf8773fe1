"""Readers write a collection for a dataset as it was downloaded. They copy no image and change none."""

import inspect
from typing import Any

from medtl_ext._validation import require_choice
from medtl_ext.data.collection import PathLike
from medtl_ext.data.readers._draft import Draft, Reading
from medtl_ext.data.readers.bids import read_bids
from medtl_ext.data.readers.challenges import CHALLENGES, read_brats, read_fets, read_iseg, read_wmh
from medtl_ext.data.readers.images import read_images
from medtl_ext.data.readers.lists import read_csv, read_datalist, read_nnunet
from medtl_ext.data.readers.medmnist import ClassificationReading, read_medmnist

_CHALLENGES = (read_fets, read_brats, read_iseg, read_wmh)
_ALL = (read_images, *_CHALLENGES, read_datalist, read_nnunet, read_bids, read_csv, read_medmnist)
READERS = {reader.__name__.removeprefix("read_"): reader for reader in _ALL} | {"msd": read_datalist}
__all__ = ["CHALLENGES", "READERS", "Reading", "read_collection"]


def read_collection(name: str, root: PathLike, out: PathLike, **options: Any) -> Reading | ClassificationReading:
    """Write a collection for a dataset in its own layout, and check every file of it.

    Nothing is skipped silently. A subject without label or files is left out; a subject without one of the modalities
    is kept. The result has a row with the reason for each.

    Args:
        name: the layout, one of `READERS`; the function of that name documents what it expects.
        root: the folder of the dataset.
        out: the collection file to write. Paths in it are relative if the files lie below its folder, else absolute.
        **options: those of the reader, and those of all readers:
            ``institutions``: a CSV file with the columns subject and institution, which replaces the reader's own;
            ``split`` (fractions of train, val and test) or ``folds`` (their number): drawn patient-wise and stratified
            by institution with ``seed`` (0), see `medtl_ext.data.splits`. By default the dataset's own splits are kept,
            or 0.5, 0.25 and 0.25 drawn;
            ``keep_test`` (False): keep the dataset's own test set when drawing;
            ``check`` (True): read every file and report what is wrong with it (with folds, for the first fold);
            ``progress`` (True): show a progress bar on a terminal.

    Returns:
        The files written, what was left out and why, and the data check; ``str()`` of it is a report.

    Raises:
        InputError: an unknown reader or option, a wrong root, or data that the collection format cannot express.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import nibabel, numpy as np
    >>> root = Path(tempfile.mkdtemp())
    >>> for number in (1, 2, 3):
    ...     for role in ("T1", "T2", "label"):
    ...         voxels = np.random.default_rng(number).choice([0, 10, 150, 250], (4, 4, 4)).astype(np.uint8)
    ...         nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / f"subject-{number}-{role}.nii.gz")
    >>> reading = read_collection("iseg", root, root / "iseg.json", check=False, progress=False)
    >>> [str(task) for task in reading.collection.tasks()][:3]
    ['iSeg-T1-CSF', 'iSeg-T1-GM', 'iSeg-T1-WM']
    """
    reader = READERS[require_choice("reader", name, READERS)]
    own = inspect.signature(reader).parameters.keys() - {"draft"}
    common = {"progress"} if reader is read_medmnist else inspect.signature(Draft).parameters.keys() - {"root", "out"}
    for option in options:
        require_choice(f"option of reader '{name}'", option, sorted(own | common))
    draft = Draft(root, out, **{option: options.pop(option) for option in common & options.keys()})
    return reader(draft, **options)
