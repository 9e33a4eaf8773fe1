"""MedMNIST: write a small JSON file that names the ``.npz`` and its classes, for the classification bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medtl_ext._io import write_csv, write_json
from medtl_ext._validation import InputError
from medtl_ext.data.classification import ClassificationDataset, load_classification, load_medmnist
from medtl_ext.data.collection import SPLITS, PathLike, read_json, refuse_to_replace
from medtl_ext.data.readers._draft import Draft


@dataclass(frozen=True)
class ClassificationReading:
    """What `read_medmnist` did: the file it wrote, and the dataset, of which every image was read."""

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
    draft: Draft, *, file: str | None = None, labels: Mapping[str, int] | None = None
) -> ClassificationReading:
    """Describe a MedMNIST file (``NAME.npz``, ``NAME_64.npz``, ...) and read all of it. Its own splits are kept.

    Args:
        draft: its root is the folder of the ``.npz``.
        file: name of the ``.npz``, if the folder has several.
        labels: names of the classes and their numbers from 0; by default the numbers are the names.

    Raises:
        InputError: no such file, several files, or what `medtl_ext.data.load_medmnist` refuses, such as volumes.
    """
    out = Path(draft.out).absolute()
    found = sorted(draft.root.glob("*.npz")) if file is None else [draft.root / file]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{draft.root} should hold one .npz file; found {names}. Choose one with --file.")
    path = found[0]
    refuse_to_replace(out, lambda path: "medmnist" in read_json(path), "description of a MedMNIST file")
    names = list(load_medmnist(path).class_names)
    for name, label in (labels or {}).items():
        if not 0 <= label < len(names):
            raise InputError(f"--labels gives {name} the number {label}; {path.name} has 0 to {len(names) - 1}.")
        names[label] = name
    relative = path.relative_to(out.parent) if path.is_relative_to(out.parent) else path
    write_json(out, {"name": path.stem, "medmnist": str(relative), "class_names": names})
    return ClassificationReading(out, load_classification(out))
