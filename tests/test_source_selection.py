"""Prior knowledge of sources: how similar regions of interest are, and PriorSel's two filters."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import collection_of_one_class, refused
from monai.transforms import ResizeWithPadOrCrop
from scipy import ndimage
from skimage.metrics import structural_similarity

from medtl_ext._validation import InputError
from medtl_ext.affinity import pairwise_ssim
from medtl_ext.source_selection import SSIM, filter_by_priors, region_labels, roi_similarity
from medtl_ext.transfer import SegmentationTask

# Regions of interest

LEFT, RIGHT = slice(2, 8), slice(12, 18)


@pytest.fixture
def regions(tmp_path) -> str:
    """Institution A has T1 of patients with a region on the left, and T2 of others with one on the right."""

    def volume(name: str, side: slice) -> str:
        array = np.zeros((20, 20, 10), np.float32)
        array[side, side, 2:8] = 1
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
        return name

    subjects = []
    for site, modality, side in (("A", "T1", LEFT), ("A", "T2", RIGHT), ("B", "T1", LEFT)):
        for split in ("train", "val", "test"):
            name = f"{site}-{modality}-{split}"
            files = {"images": {modality: volume(f"{name}.nii", side)}, "labels": {"t": volume(f"{name}-l.nii", side)}}
            subjects.append({"id": name, "institution": site, "split": split, **files})
    return str(collection_of_one_class(tmp_path, subjects, "t"))


@pytest.mark.parametrize("roi_size", [[20, 20], [20, 20, 10]], ids=str)
def test_every_source_has_the_regions_of_its_own_patients(roi_size, regions):
    grid = {"spacing": [1.0, 1.0, 1.0], "roi_size": roi_size}
    tasks = [SegmentationTask(f"{name}-ED", collection=regions) for name in ("B-T1", "A-T1", "A-T2")]
    target, *sources = [region_labels(task, **grid) for task in tasks]
    assert all(volume.shape == (20, 20, 10) for volumes in (target, *sources) for volume in volumes)
    same, other = (roi_similarity(source, target, spacing=[1, 1, 1]) for source in sources)
    assert [same["ssim"], same["roi_dice"]] == pytest.approx([1, 1], abs=1e-3)
    assert other["roi_dice"] == 0
    assert other["ssim"] < 0.95
    assert (same["roi_shape"], other["roi_shape"] < 0.9) == (pytest.approx(1), True)


@pytest.mark.parametrize("depths", [(10, 20), (9, 10), (10, 11), (11, 16)], ids=str)
def test_the_same_regions_are_alike_in_any_number_of_slices(depths):
    fewer = torch.zeros(20, 20, depths[0], dtype=torch.bool)
    fewer[5:15, 5:15, 3:7] = True
    more = ResizeWithPadOrCrop([20, 20, depths[1]])(fewer[None])[0].bool()
    empty = torch.zeros(20, 20, 21, dtype=torch.bool)  # a patient with more slices moves both sides equally
    for source, target in (([fewer], [more]), ([fewer], [fewer]), ([more], [fewer])):
        found = roi_similarity(source, target, spacing=[1, 1, 1])
        assert (found["ssim"], found["roi_dice"]) == pytest.approx((1, 1), abs=1e-3)
    # The mean map is 1/2 in the region, against 1: 2 * 1/2 / (1/4 + 1).
    assert roi_similarity([fewer, empty], [fewer], spacing=[1, 1, 1])["roi_dice"] == pytest.approx(0.8)


@pytest.mark.parametrize("shape", [(24, 31), (14, 12, 3)])
def test_local_ssim_is_that_of_wang_in_each_slice(shape):
    rng = np.random.default_rng(0)
    volumes = [ndimage.gaussian_filter(rng.normal(size=shape), 2) > 0 for _ in range(4)]
    slices = [np.moveaxis(volume[..., None] if volume.ndim == 2 else volume, 2, 0).astype(float) for volume in volumes]
    how = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        [np.mean([structural_similarity(x, y, **how) for x, y in zip(a, b, strict=True)]) for b in slices[2:]]
        for a in slices[:2]
    ]
    found = pairwise_ssim(volumes[:2], volumes[2:], k1=0.01, k2=0.03, window="gaussian")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_one_option_chooses_between_the_two_forms_of_ssim():
    """By hand: in the only window of 11 x 11 pixels, a corner and the middle have different weights."""
    a, b = np.zeros((2, 11, 11, 1))
    a[5, 5], b[5, 5], b[0, 0] = 1, 1, 1
    weight = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mean_a, mean_b = weight[5] ** 2, weight[5] ** 2 + weight[0] ** 2
    both, c1, c2 = mean_a, 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * (both - mean_a * mean_b) + c2)
    value /= (mean_a**2 + mean_b**2 + c1) * (mean_a * (1 - mean_a) + mean_b * (1 - mean_b) + c2)
    volumes = [torch.as_tensor(volume).bool() for volume in (a, b)]
    found = {form: roi_similarity(volumes[:1], volumes[1:], spacing=[1, 1, 1], ssim=form)["ssim"] for form in SSIM}
    assert found["local"] == pytest.approx(value, abs=1e-12)
    assert found["global"] == pytest.approx(float(pairwise_ssim([a[..., 0]], [b[..., 0]])))
    with pytest.raises(InputError, match=r"slices of \(10, 20\); expected at least 11 x 11"):
        pairwise_ssim([np.ones((10, 20))], [np.ones((10, 20))], window="gaussian")


# Filters


def priors(**columns) -> pd.DataFrame:
    table = pd.DataFrame(columns, index=[f"s{n}" for n in range(len(columns["modality"]))])
    table["same_modality"] = [None if pd.isna(m) else m == "T2" for m in table["modality"]]
    return table


@pytest.mark.parametrize(
    ("options", "kept", "said"),
    [
        ({}, ["s0", "s3"], "label SSIM 0.500: dropped (keeps the best 2 of 3)"),
        ({"top_k": 1}, ["s0"], "dropped"),
        ({"minimum_ssim": 0.4}, ["s0", "s2", "s3"], "kept"),
        ({"minimum_ssim": 0.45, "top_k": 2}, ["s0", "s3"], "dropped (keeps at least 0.45, of these the best 2 of 3)"),
        ({"minimum_ssim": 0.85, "top_k": 2}, ["s0"], "dropped"),
    ],
    ids=str,
)
def test_the_filters_keep_the_modality_and_the_better_half(options, kept, said):
    table = priors(modality=["T2", "FLAIR", "T2", "T2"], ssim=[0.9, 0.95, 0.5, 0.8])
    result = filter_by_priors(table, **options)
    assert result.index[result["kept"]].tolist() == kept
    assert "modality FLAIR: dropped" in result.loc["s1", "reason"]
    assert said in result.loc["s2", "reason"]
    for wrong in (0, -1, 1.5, True):
        assert "1 or more" in refused(lambda wrong=wrong: filter_by_priors(table, top_k=wrong))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]], ids=str)
def test_equal_regions_are_kept_or_dropped_together(order):
    table = priors(modality=["T2"] * 4, ssim=[0.9, 0.9, 0.9, 0.8]).iloc[order]
    for top_k in (None, 1, 2):
        kept = filter_by_priors(table, top_k=top_k)["kept"]
        assert sorted(kept.index[kept]) == ["s0", "s1", "s2"]


def test_what_is_not_known_is_kept_and_said():
    result = filter_by_priors(priors(modality=["T2", None, "T2"], ssim=[0.9, np.nan, 0.5]))
    assert result["kept"].tolist() == [True, True, False]
    assert result.loc["s1", "reason"] == "modality not known; label SSIM not known"


def test_a_filter_that_would_leave_nothing_falls_back_loudly():
    with pytest.warns(UserWarning, match="no source has the target's modality"):
        result = filter_by_priors(priors(modality=["FLAIR", "T1"], ssim=[0.9, 0.8]), top_k=2)
    assert result["kept"].all()
    assert "filter not applied" in result.loc["s0", "reason"]
    with pytest.warns(UserWarning, match="label SSIM of at least 0.99"):
        result = filter_by_priors(priors(modality=["T2", "T1"], ssim=[0.9, 0.8]), minimum_ssim=0.99)
    assert result["kept"].tolist() == [True, False]
