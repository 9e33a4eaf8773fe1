"""A plain table: one row an image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtl_ext._validation import InputError
from medtl_ext.data.readers._draft import (
    INSTITUTION_COLUMNS,
    SUBJECT_COLUMNS,
    Draft,
    Reading,
    clean,
    objectives,
    parse_labels,
    read_table,
)


def read_csv(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    file: str | os.PathLike[str] | None = None,
    labels: Mapping[str, int] | None = None,
    **options: Any,
) -> Reading:
    """A table with the columns subject, institution, modality, image and label, and, if wanted, split and patient.

    One row an image. A subject's rows agree on its institution, split and patient, and on its label, which one of them
    has to name. Columns are separated by commas, semicolons or tabs.

    Args:
        root: the folder that paths in the table start from.
        out: the collection file to write.
        file: the table; the only CSV file in the root if not given.
        labels: the values in the label files by name, such as ``{"lesion": 1}``; required.
        **options: as `read_collection` tells.
    """
    draft = Draft(root, out, **options)
    tables = [Path(file)] if file is not None else sorted(draft.root.glob("*.csv"))
    if len(tables) != 1:
        raise InputError(f"{len(tables)} CSV files in {draft.root}; give the table with file.")
    if not labels:
        raise InputError("a table does not say what its label files hold; give labels, such as lesion=1.")
    columns = {"subject": SUBJECT_COLUMNS, "institution": INSTITUTION_COLUMNS}
    columns |= {name: (name,) for name in ("modality", "image", "label")}
    table = read_table(tables[0], columns, {"split": ("split",), "patient": ("patient",)})
    draft.layout = "rows with subject, institution, modality, image and label"
    for subject, rows in table.groupby("subject", sort=False):
        own = {}
        for column in ("institution", "label", "split", "patient"):
            values = sorted(set(rows[column]) - {""})
            if len(values) > 1:
                raise InputError(
                    f"{tables[0]}: subject '{subject}' has several values of {column}: {values}; keep one."
                )
            own[column] = values[0] if values else None
        modalities = rows.modality.map(clean)
        twice = modalities[modalities.duplicated()]
        if not subject or not own["institution"] or len(twice):
            problem = f"two images of {twice.iloc[0]}" if len(twice) else "no subject or no institution"
            draft.note(str(subject), tables[0], problem, "the subject is left out")
            continue
        images = {clean(row.modality): draft.root / row.image if row.image else None for row in rows.itertuples()}
        target = {"label": draft.root / own["label"] if own["label"] else None}
        draft.add(subject, own["institution"], images, target, split=own["split"], patient=own["patient"])
    draft.about = {"name": clean(tables[0].stem), "license": "", **objectives("label", parse_labels(labels, tables[0]))}
    return draft.write()
