"""Phantom collections on disk: a folder per subject and a ``collection.json``, like any real dataset."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import joblib
import nibabel
import numpy as np
from filelock import FileLock
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from medtl_ext._io import atomic_path, cache_root, write_json
from medtl_ext._validation import InputError, require_choices, require_number
from medtl_ext.data.phantom.anatomy import TISSUE_LABELS, deform, grow_brain
from medtl_ext.data.phantom.atlas import Atlas, load_atlas
from medtl_ext.data.phantom.contrast import acquire, render
from medtl_ext.data.phantom.fields import AFFINE, random_stream, smooth_noise
from medtl_ext.data.phantom.lesions import (
    TUMOUR_LABELS,
    WMH_LABELS,
    add_tumour,
    add_white_matter_hyperintensities,
    place_tumour,
)
from medtl_ext.data.phantom.scanner import INSTITUTIONS, MODALITIES, Institution

GENERATOR_VERSION = 1  # raise it when the same settings give other images, so that no old cache is read

LABELS = {"tumour": TUMOUR_LABELS, "tissue": TISSUE_LABELS, "wmh": WMH_LABELS}
_ASKED = {label: {name: [value] for name, value in values.items()} for label, values in LABELS.items()}
_ASKED["tumour"]["FeTS"] = [1, 2, 3]
OBJECTIVES = {name: {"label": label, "values": v} for label, asked in _ASKED.items() for name, v in asked.items()}
# 40 % train, 25 % val, 35 % test, spread evenly: the first three subjects already cover all splits.
SPLIT_CYCLE = ("train", "test", "val", "train", "test", "val", "train", "test", "train", "val",
               "test", "train", "test", "train", "val", "test", "train", "val", "test", "train")  # fmt: skip

DESCRIPTION = (
    "SYNTHETIC brain MRI: no patient was scanned. Deformed from the MNI152 atlas, with simulated lesions, contrasts "
    "and scanners; the institutions do not exist. Nothing measured on it says how a method does on patients."
)
LICENSE = (
    "Derived from the ICBM 2009 (MNI152) nonlinear symmetric template and tissue maps as shipped by nilearn: "
    "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
    "University. Permission to use, copy, modify, and distribute for any purpose and without fee, provided that this "
    "copyright notice appears in all copies; provided as is, without warranty."
)


def generate_phantom(
    out: str | os.PathLike[str],
    *,
    institutions: Sequence[str],
    subjects: int,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a synthetic collection of brain MRI and return the path of its ``collection.json``.

    Images are skull-stripped, 96 x 96 x 28 voxels of 2 x 2 x 4 mm in RAS orientation and MNI position, int16 in raw
    scanner units (0 outside the brain, up to about 1000); labels are uint8. A subject depends only on the seed, its
    institution and its number, not on what else is generated.

    =========================================  ===============================================  ======================
    institutions                               who                                              label files
    =========================================  ===============================================  ======================
    01, 04, 06, 13, 14, 17, 18, 20             adults with a tumour                             tumour, tissue, wmh
    S, U                                       older adults with white-matter hyperintensities  tissue, wmh
    I1, I2                                     infants of six months: little grey-white         tissue
                                               contrast
    =========================================  ===============================================  ======================

    Label values: tumour 1 oedema (ED), 2 enhancing (ET), 3 necrosis (NCR); tissue 1 CSF, 2 GM, 3 WM; wmh 1. Inside a
    tumour, tissue and wmh are 0. Every institution has its own contrast, blur, noise, bias field and annotators.

    Args:
        out: folder to create. If it holds a phantom of the same settings, it is reused; other content is refused.
        institutions: names from the table.
        subjects: number per institution. About 40 % are for training, 25 % for validation and 35 % for testing.
        seed: draws other subjects; the institutions keep their character.
        n_jobs: number of subjects made at a time (threads); by default the number of cores.
        progress: show a progress bar.

    Raises:
        InputError: an institution is unknown, nothing is asked for, or ``out`` holds something else.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> path = generate_phantom(folder, institutions=["I1"], subjects=1, progress=False)
    >>> sorted(file.name for file in (path.parent / "I1-000").iterdir())
    ['FLAIR.nii.gz', 'T1.nii.gz', 'T1CE.nii.gz', 'T2.nii.gz', 'tissue.nii.gz']
    """
    content = _collection(institutions, subjects, seed)
    out = Path(out)
    if _already_made(out, content["generator"]):
        return out / "collection.json"
    with atomic_path(out) as folder:
        folder.mkdir()
        _write_subjects(folder, content, n_jobs=n_jobs, progress=progress)
        write_json(folder / "collection.json", content)
    return out / "collection.json"


def cached_phantom(*, institutions: Sequence[str], subjects: int, seed: int = 0, **how: Any) -> Path:
    """`generate_phantom` into a cache shared by all runs: made once, then only looked up. Same arguments, but ``out``.

    The cache is the folder ``phantom`` of ``$MONAI_DATA_DIRECTORY``, else ``$XDG_CACHE_HOME/medtl`` or
    ``~/.cache/medtl``. Processes that ask for the same phantom at once wait for the first of them to make it.
    """
    settings = _collection(institutions, subjects, seed)["generator"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{'+'.join(settings['institutions'])}_{subjects}-subjects_seed-{seed}_{digest}"
    folder = cache_root() / "phantom"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        return generate_phantom(folder / name, institutions=institutions, subjects=subjects, seed=seed, **how)


def _collection(institutions: Sequence[str], subjects: int, seed: int) -> dict[str, Any]:
    """The content of ``collection.json``, with the labels and objectives that some subject has.

    The entry ``generator`` holds the checked settings; an existing phantom is recognised by it.
    """
    institutions = require_choices("institution", institutions, INSTITUTIONS)
    require_number("subjects", subjects, 1, whole=True)
    require_number("seed", seed, 0, whole=True)
    settings = {
        "version": GENERATOR_VERSION,
        "institutions": [name for name in INSTITUTIONS if name in institutions],
        "subjects": int(subjects),
        "seed": int(seed),
        "modalities": list(MODALITIES),
    }
    entries = [
        {
            "id": f"{institution}-{index:03d}",
            "institution": institution,
            "split": SPLIT_CYCLE[index % len(SPLIT_CYCLE)],
            "images": {name: f"{institution}-{index:03d}/{name}.nii.gz" for name in MODALITIES},
            "labels": {name: f"{institution}-{index:03d}/{name}.nii.gz" for name in INSTITUTIONS[institution].labels},
        }
        for institution in settings["institutions"]
        for index in range(subjects)
    ]
    present = {label for entry in entries for label in entry["labels"]}
    return {
        "name": "phantom",
        "description": DESCRIPTION,
        "license": LICENSE,
        "synthetic": True,
        "generator": settings,
        "labels": {name: values for name, values in LABELS.items() if name in present},
        "objectives": {name: objective for name, objective in OBJECTIVES.items() if objective["label"] in present},
        "subjects": entries,
    }


def _already_made(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds a phantom of these settings; an InputError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "collection.json").read_text(encoding="utf-8"))["generator"]
        other = [f"{key} {found[key]} there, {value} asked" for key, value in settings.items() if found[key] != value]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} exists and is not a phantom; give a new folder, nothing is overwritten.") from None
    if other:
        raise InputError(f"{out} holds another phantom ({'; '.join(other)}); give a new folder or delete that one.")
    return True


def _write_subjects(folder: Path, content: dict[str, Any], *, n_jobs: int | None, progress: bool) -> None:
    """Make all subjects, several at a time.

    Threads, because nearly all the time is spent in NumPy, SciPy and zlib, which release the lock. Threads share the
    atlas and start at once; processes would first import everything. When one fails, the others finish before the
    error is raised, so that none writes into a folder that is being removed.
    """
    atlas, settings, subjects = load_atlas(), content["generator"], content["subjects"]

    def write(entry: dict[str, Any], index: int) -> None:
        target = folder / entry["id"]
        target.mkdir()
        made = make_subject(atlas, Institution(entry["institution"]), index, seed=settings["seed"])
        for name, values in made.items():
            _write_nifti(target / f"{name}.nii.gz", values)

    # One thread per matrix product: then the images do not depend on the number of subjects made at a time.
    with threadpool_limits(1), ThreadPoolExecutor(n_jobs or joblib.cpu_count()) as pool:
        made = pool.map(write, subjects, cycle(range(settings["subjects"])))
        for _ in tqdm(made, "phantom", total=len(subjects), unit="subject", disable=None if progress else True):
            pass


def _write_nifti(path: Path, values: np.ndarray) -> None:
    image = nibabel.Nifti1Image(values, AFFINE)
    image.set_sform(AFFINE, code="mni")
    image.set_qform(AFFINE, code="mni")
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def make_subject(atlas: Atlas, institution: Institution, index: int, *, seed: int) -> dict[str, np.ndarray]:
    """Images (int16, by modality) and labels (uint8, by label file) of subject ``index`` of an institution.

    Every part has its own random stream, so that a change of one part leaves the others as they are.
    """

    def stream(part: str) -> np.random.Generator:
        return random_stream(seed, institution.name, index, part)

    cohort, shape, lesions = institution.cohort, stream("anatomy"), stream("tumour")
    points = deform(shape, size=cohort.size)
    if "tumour" in cohort.labels:
        points, *core = place_tumour(atlas, points, lesions, core_radius=institution.core_radius)
    anatomy = grow_brain(atlas, points, shape, atrophy=institution.atrophy)

    labels = {"tissue": anatomy.tissue_label()}
    if "wmh" in cohort.labels:
        labels["wmh"] = add_white_matter_hyperintensities(anatomy, stream("wmh"), load=institution.wmh_load)
    if "tumour" in cohort.labels:
        labels["tumour"] = add_tumour(anatomy, *core, lesions, institution)
        for name in ("tissue", "wmh"):  # tissue under a tumour cannot be seen, so it has no label
            labels[name][labels["tumour"] > 0] = 0

    texture = stream("texture")
    textures = [smooth_noise(texture, length) for length in (4, 7)]
    images = {}
    for modality in MODALITIES:
        noise = stream(modality)
        ideal = render(anatomy, institution, modality, textures, noise)
        images[modality] = acquire(ideal, anatomy.brain, institution.scanners[modality], noise)
    return images | labels
