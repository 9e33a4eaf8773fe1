"""Every segmentation bundle on real MRI: another collection file and its tasks are all that changes.

Two patients of a public dataset of multiple sclerosis lesions, one to train on. Whether the chain holds is the question
here; source and target are modalities of the same patients, so that the scores mean nothing.
"""

import nibabel as nib
import pandas as pd
import pytest
from bundle_runs import SEGMENTATION, Bundle

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_determinism_left_behind")]
TINY = SEGMENTATION | {"target_task": "MS-FLAIR-WMH", "val_split": "train", "iterations_per_epoch": 2}
SOURCES = ["MS-T1-WMH", "MS-T2-WMH", "MS-T1CE-WMH"]
BUNDLES = {
    "risk_map": {"source": "MS-T2-WMH", "train_slices": 8},
    "source_selection": {"sources": SOURCES[:2], "pool_epochs": 1, "n_resamples": 20, "pixels": 40, "train_slices": 8},
    "sequential_transfer": {"sources": SOURCES, "affinity": "context", "n_clusters": 1, "pool_epochs": 1},
}
BUNDLES["sequential_transfer"] |= {"source_patients": None, "stage_patients": 1, "score_space": "training"}


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_takes_another_collection(name, open_ms, tmp_path):
    folders = {"output_dir": str(tmp_path / "out"), "source_dir": str(tmp_path / "pool")}
    Bundle(name, TINY | BUNDLES[name]).run(collection=str(open_ms), **folders)
    said = {"risk_map": "metrics.csv", "source_selection": "answer.txt", "sequential_transfer": "arms.csv"}
    assert (tmp_path / "out" / said[name]).is_file()
    tables = [*(tmp_path / "out").glob("**/metrics.csv"), *(tmp_path / "pool").glob("**/metrics.csv")]
    assert tables
    for path in tables:
        scores = pd.read_csv(path)
        assert set(scores["subject"]) == {"patient19", "patient07"}
        assert scores["dice"].between(0, 1).all()


@pytest.mark.parametrize("name", BUNDLES)
def test_a_segmentation_lies_on_the_patients_own_grid(name, shared_data, tmp_path):
    folder = shared_data / "open_ms" / "patient07"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "FLAIR.nii.gz").symlink_to(folder / "FLAIR.nii.gz")
    bundle = Bundle(name, {})
    bundle.run(base="inference", input_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "out"))
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    image, found = nib.load(folder / "FLAIR.nii.gz"), nib.load(written)
    assert found.shape == image.shape
    assert (found.affine == image.affine).all()
