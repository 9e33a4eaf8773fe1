"""Patient-wise splits and folds, written into the collection: everybody who uses the file has the same split."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from medtl_ext._validation import InputError
from medtl_ext.data.collection import (
    SPLITS,
    PathLike,
    load_collection,
    read_json,
    refuse_to_replace,
    shuffled,
    write_collection,
)

FRACTIONS = (0.5, 0.25, 0.25)  # of train, val and test


def draw_splits(
    subjects: Sequence[Mapping[str, Any]], *, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> list[dict[str, Any]]:
    """Draw a split for every subject, patient by patient, in the same proportions at every institution.

    An institution with enough patients has at least one patient in every split, however small the fraction, because
    every task needs patients for training, validation and test. The other patients follow the fractions. The draw
    depends on the seed and the patients' names, not on their order. Institutions do not influence each other.

    Args:
        subjects: entries of a collection, each with ``id``, ``institution`` and, where a patient was scanned more than
            once, ``patient``. Patients with an entry whose ``split`` is ``test`` stay in test, with all their scans;
            the other patients are then divided between train and val.
        fractions: of the patients in train, val and test; they sum to 1.
        seed: of the draw.

    Returns:
        The entries in their order, each with its ``split``.

    Raises:
        InputError: the fractions or the seed are impossible.

    >>> subjects = [{"id": f"p{number}", "institution": "13"} for number in range(4)]
    >>> [entry["split"] for entry in draw_splits(subjects, fractions=(0.5, 0.25, 0.25), seed=1)]
    ['train', 'test', 'val', 'train']
    """
    shares = np.asarray(fractions, dtype=float)
    if shares.shape != (3,) or (shares < 0).any() or shares[0] == 0 or not np.isclose(shares.sum(), 1):
        raise InputError(f"split fractions {list(fractions)} must be three of 0 or more that sum to 1, train above 0.")
    held_out, strata = _patients(subjects, seed)
    if held_out:
        shares = np.array([*shares[:2], 0]) / shares[:2].sum()
    splits = dict.fromkeys(held_out, "test")
    for patients in strata.values():
        splits |= dict(zip(patients, _deal(len(patients), shares), strict=True))
    return [{**entry, "split": splits[_patient(entry)]} for entry in subjects]


def draw_folds(subjects: Sequence[Mapping[str, Any]], *, folds: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Draw k folds of patients, stratified by institution, for cross-validation.

    In turn k, fold k is the test set, the next fold is val, and the other folds are train: every patient is tested
    once. If some entries are already in ``test``, they stay there; then fold k is val and the others are train.

    Args:
        subjects: entries of a collection, as `draw_splits` takes them.
        folds: their number, at least 3 (2 where the test set is kept).
        seed: another seed is another draw.

    Returns:
        The entries of every turn, each with its ``split`` and its ``fold`` (None for a test set that was kept).

    Raises:
        InputError: too few folds, or more folds than the largest institution has patients.

    >>> subjects = [{"id": f"p{number}", "institution": "13"} for number in range(6)]
    >>> turns = draw_folds(subjects, folds=3)
    >>> [sum(entry["split"] == "test" for entry in turn) for turn in turns]
    [2, 2, 2]
    """
    held_out, strata = _patients(subjects, seed)
    most = max(map(len, strata.values()), default=0)
    least = 2 if held_out else 3
    if not least <= folds <= most:
        limits = f"give --folds from {least} to the number of patients of the largest institution ({most})"
        raise InputError(f"{folds} folds cannot be drawn; {limits}.")
    patients = [patient for members in strata.values() for patient in members]
    institutions = [institution for institution, members in strata.items() for _ in members]
    with warnings.catch_warnings():  # an institution with fewer patients than folds is documented, not an accident
        warnings.filterwarnings("ignore", message="The least populated class")
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        parts = [held for _, held in splitter.split(patients, institutions)]
    fold = {patients[place]: number for number, part in enumerate(parts) for place in part}
    roles = {0: "val"} if held_out else {0: "test", 1: "val"}

    def place(patient: str, turn: int) -> dict[str, Any]:
        if patient in held_out:
            return {"split": "test", "fold": None}
        return {"split": roles.get((fold[patient] - turn) % folds, "train"), "fold": fold[patient]}

    return [[{**entry, **place(_patient(entry), turn)} for entry in subjects] for turn in range(folds)]


def split_collection(path: PathLike, out: PathLike, **draw: Any) -> list[Path]:
    """Draw new splits, or folds, for a collection and write them with the collection to new files.

    Args:
        path: a collection file; it is not changed.
        out: the file to write. With ``folds``, one file per fold: ``out_fold0.json``, ``out_fold1.json``, ...
        **draw: ``fractions`` of train, val and test, see `draw_splits` (default: 0.5, 0.25, 0.25); or ``folds``, see
            `draw_folds`; ``seed`` (0); and ``keep_test`` (False), to keep the present test set.

    Returns:
        The files written. The key ``drawn`` in each file records the draw.

    Raises:
        InputError: the collection is broken, or the draw is impossible; nothing is written.
    """
    collection = load_collection(path)
    if draw.get("folds") is None and Path(out).exists() and os.path.samefile(out, collection.path):
        raise InputError(f"{path} is the collection itself, which is never changed; give another file with --out.")
    content = read_json(collection.path)
    drawn = {subject.id: subject.split for subject in collection.subjects}  # also if the file has no splits
    content["subjects"] = [{**entry, "split": drawn[entry["id"]]} for entry in content["subjects"]]
    if draw.get("folds") is None:
        draw["fractions"] = draw.get("fractions") or FRACTIONS
    return write_splits(content, out, collection.path.parent, **draw)


def write_splits(
    content: Mapping[str, Any],
    out: PathLike,
    folder: Path,
    *,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    seed: int = 0,
    keep_test: bool = False,
) -> list[Path]:
    """Write a collection's content with splits or folds, and with paths that are valid in the folder of ``out``.

    Without ``fractions`` and ``folds``, existing splits are kept. If only a test set exists, the others are drawn.

    Args:
        content: of a collection, in the documented format.
        out: as for `split_collection`.
        folder: where relative paths in ``content`` start. Files below the folder of ``out`` are written relative to
            it, so that data and collection can be moved together; other paths are absolute.
        fractions, folds, seed, keep_test: as for `split_collection`.

    Raises:
        InputError: fractions and folds are both given, or the draw is impossible; nothing is written.
    """
    if folds is not None and fractions is not None:
        raise InputError("split fractions and folds exclude each other; give --split or --folds.")
    out = Path(os.path.abspath(out))
    subjects = [_relocate(entry, folder, out.parent) for entry in content["subjects"]]
    if fractions is not None or folds is not None:
        for entry in subjects:
            entry.pop("fold", None)
            if not keep_test:
                entry.pop("split", None)
    elif {entry.get("split") for entry in subjects} in ({None}, {None, "test"}):
        fractions = FRACTIONS
    if keep_test and not any(entry.get("split") == "test" for entry in subjects):
        raise InputError("there is no test set to keep; draw one with --split, or leave out --keep-test.")
    drawn = [(out, {}, subjects)]
    if fractions is not None:
        how = {"fractions": list(fractions), "seed": seed}
        drawn = [(out, {"drawn": how}, draw_splits(subjects, fractions=fractions, seed=seed))]
    elif folds is not None:
        turns = enumerate(draw_folds(subjects, folds=folds, seed=seed))
        how = {"folds": folds, "seed": seed}
        drawn = [(out.with_stem(f"{out.stem}_fold{n}"), {"drawn": how | {"fold": n}}, turn) for n, turn in turns]
    for path, *_ in drawn:
        refuse_to_replace(path, load_collection, "collection")
    return [write_collection(path, {**content, **how, "subjects": entries}) for path, how, entries in drawn]


def _relocate(entry: Mapping[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    """The entry with paths that are valid in ``folder``; relative paths in it start from ``source``."""

    def rewrite(name: str) -> str:
        path = source / name
        # After a symbolic link, ".." means the folder above the link's target, so the link must be resolved.
        path = path.parent.resolve() / path.name if ".." in path.parts else Path(os.path.abspath(path))
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    files = {kind: {name: rewrite(path) for name, path in entry[kind].items()} for kind in ("images", "labels")}
    return {**entry, **files}


def _patient(entry: Mapping[str, Any]) -> str:
    return entry.get("patient") or entry["id"]


def _patients(subjects: Sequence[Mapping[str, Any]], seed: int) -> tuple[set[str], dict[str, list[str]]]:
    """The patients fixed in test, and the other patients of every institution in an order given by hashes.

    A patient of two institutions belongs to the one whose name comes first.
    """
    if seed < 0:
        raise InputError(f"seed must be at least 0; got {seed}.")
    scans = [(_patient(entry), entry["institution"], entry.get("split") == "test") for entry in subjects]
    patients = pd.DataFrame(scans, columns=["name", "home", "held"]).groupby("name").agg({"home": "min", "held": "any"})
    free = patients[~patients.held].loc[lambda table: shuffled(table.index, seed)]
    return {*patients.index[patients.held]}, {home: list(group.index) for home, group in free.groupby("home")}


def _deal(count: int, shares: np.ndarray) -> list[str]:
    """The splits of ``count`` patients: first one patient per split, then always the split that lacks most.

    >>> _deal(6, np.array([0.6, 0.2, 0.2]))
    ['train', 'val', 'test', 'train', 'train', 'train']
    """
    dealt = np.flatnonzero(shares)[:count].tolist()
    while len(dealt) < count:
        dealt.append(int(np.argmax(shares * count - np.bincount(dealt, minlength=3))))
    return [SPLITS[place] for place in dealt]
