"""MedMNIST: a small file beside the ``.npz`` that names it and its classes, as the classification bundle takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.data.classification import ClassificationDataset, load_classification, load_medmnist
from medtl_ext.data.collection import SPLITS, PathLike, read_json, refuse_to_replace


@dataclass(frozen=True)
class ClassificationReading:
    """What `read_medmnist` did: the file it wrote, and the dataset it describes, every image of which was read."""

    path: Path
    dataset: ClassificationDataset
    check: None = None

    @property
    def counts(self) -> pd.DataFrame:
        """Images by class and split."""
        columns = {split: self.dataset.counts(split) for split in SPLITS}
        return pd.DataFrame({"class": self.dataset.class_names, **columns})

    def __str__(self) -> str:
        height, width = self.dataset.images.shape[1:3]
        kind = "grey" if self.dataset.channels == 1 else "RGB"
        return (
            f"{len(self.dataset.labels)} {kind} images of {height} x {width}:\n{self.counts.to_string(index=False)}\n"
            f"Dataset written to {self.path}\nNext: --target_task {self.path}, in bundles/dataset_transferability"
        )

    def to_csv(self, path: PathLike) -> None:
        """Write `counts` as a table."""
        write_csv(path, self.counts)


def read_medmnist(
    root: PathLike,
    out: PathLike,
    *,
    file: str | None = None,
    labels: Mapping[str, int] | None = None,
    progress: bool = True,
) -> ClassificationReading:
    """Describe a MedMNIST file (``NAME.npz``, ``NAME_64.npz``, ...) and read all of it. Splits are the dataset's own.

    Args:
        root: the folder of the file.
        out: the JSON file to write: name, path of the ``.npz``, names of the classes.
        file: name of the ``.npz``, where the folder has several.
        labels: names of the classes and their numbers from 0; numbers are names otherwise.
        progress: for the sake of the other readers; reading takes no time.

    Raises:
        InputError: no such file, several to choose from, or what `medtl_ext.data.load_medmnist` refuses.
    """
    folder, out = Path(root), Path(out).absolute()
    found = sorted(folder.glob("*.npz")) if file is None else [folder / file]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder} should hold one .npz file; found {names}. Choose one with --file.")
    refuse_to_replace(out, lambda path: "medmnist" in read_json(path), "description of a MedMNIST file")
    dataset = load_medmnist(found[0])
    names, most = list(dataset.class_names), dataset.n_classes - 1
    for name, label in (labels or {}).items():
        if not 0 <= label <= most:
            raise InputError(f"labels gives {name} the number {label}; {found[0].name} has 0 to {most}.")
        names[label] = name
    path = found[0].absolute()
    relative = path.relative_to(out.parent) if path.is_relative_to(out.parent) else path
    write_json(out, {"name": found[0].stem, "medmnist": str(relative), "class_names": names})
    return ClassificationReading(out, load_classification(out))
