"""What no metric may stumble over, every case by its name, for all of them."""

from __future__ import annotations

import warnings

import pytest
import torch

from medtl_ext import InputError
from medtl_ext.metrics import (
    compute_ccfv,
    compute_gbc,
    compute_h_score,
    compute_h_score_map,
    compute_label_prediction,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
    compute_logme,
    compute_ncti,
    compute_nleep,
    compute_otce,
    compute_parc,
    compute_sfda,
    compute_transrate,
)


def by_case(features, labels, **options):
    """CC-FV of two cases that take turns."""
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if len(features) != len(labels):
        return compute_ccfv([[features, features]], [[labels, labels]], **options)
    cases = [slice(0, None, 2), slice(1, None, 2)]
    return compute_ccfv(
        [[features[case] for case in cases]], [[labels[case] for case in cases]], include_background=True, **options
    )


def from_a_source(features, labels, **options):
    """OTCE from a source whose features are spread like the target's."""
    features = torch.as_tensor(features)
    spread = torch.nan_to_num(features.detach().double()).std() if features.numel() > 1 else torch.tensor(1.0)
    source = torch.randn(30, features.shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return compute_otce(source * spread, torch.arange(30) % 3, features, labels, solver="emd", **options)


def at_one_pixel(features, labels, **options):
    """The H-score map of images of one pixel."""
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    return compute_h_score_map(features[..., None], labels[:, None], **options)


OF_FEATURES = {
    "h_score": compute_h_score,
    "h_score_shrunk": lambda x, y, **options: compute_h_score(x, y, shrinkage="ledoit_wolf", **options),
    "h_score_map": at_one_pixel,
    "logme": compute_logme,
    "nleep": compute_nleep,
    "gbc": compute_gbc,
    "gbc_diagonal": lambda x, y, **options: compute_gbc(x, y, covariance="diagonal", **options),
    "transrate": compute_transrate,
    "parc": compute_parc,
    "sfda": compute_sfda,
    "ncti": compute_ncti,
    "otce": from_a_source,
    "ccfv": by_case,
    "label_prediction": compute_label_prediction,
}
OF_PROBABILITIES = {
    "leep": compute_leep,
    "leep_map": lambda p, y, **options: compute_leep_map(p[..., None], torch.as_tensor(y)[:, None], **options),
    "leep_image_maps": lambda p, y, **options: compute_leep_image_maps(
        p[..., None], torch.as_tensor(y)[:, None], **options
    ),
}

of_features = pytest.mark.parametrize("compute", OF_FEATURES.values(), ids=OF_FEATURES)
of_probabilities = pytest.mark.parametrize("compute", OF_PROBABILITIES.values(), ids=OF_PROBABILITIES)
of_all = pytest.mark.parametrize(
    "compute", (OF_FEATURES | OF_PROBABILITIES).values(), ids=OF_FEATURES | OF_PROBABILITIES
)


def problem(n=48, width=5):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 3
    features = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return features.softmax(1) if width == 3 else features + labels[:, None], labels


def data_for(compute):
    return problem(width=3 if compute in OF_PROBABILITIES.values() else 5)


def values_of(result):
    return torch.stack(
        [torch.as_tensor(value).double().mean() for value in result] if isinstance(result, tuple) else [result.mean()]
    )


def quiet(compute, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return values_of(compute(*arguments, **options))


@of_all
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf(compute, bad):
    features, labels = data_for(compute)
    features[5, 1] = bad
    with pytest.raises(InputError, match=r"NaN or Inf|\[0, 1\]"):
        quiet(compute, features, labels)


@of_all
def test_empty(compute):
    features, labels = data_for(compute)
    with pytest.raises(InputError, match=r"empty|holds 0|at least"):
        quiet(compute, features[:0], labels[:0])


@of_all
def test_mismatched_lengths(compute):
    features, labels = data_for(compute)
    with pytest.raises(InputError, match=r"shape|fit|expected"):
        quiet(compute, features, labels[:-1])


@of_all
def test_negative_and_fractional_labels(compute):
    features, labels = data_for(compute)
    with pytest.raises(InputError, match="negative label -1"):
        quiet(compute, features, labels - 1)
    with pytest.raises(InputError, match="non-integer"):
        quiet(compute, features, labels + 0.5)


@of_all
def test_one_class(compute):
    features, labels = data_for(compute)
    with pytest.warns(UserWarning, match=r"one class|one target|label"):
        assert values_of(compute(features, torch.zeros_like(labels))).isfinite().all()


@of_all
def test_singleton_class(compute):
    features, labels = data_for(compute)
    labels = labels % 2
    labels[7] = 2
    assert quiet(compute, features, labels).isfinite().all()


@of_all
def test_label_gap(compute):
    features, labels = data_for(compute)
    whole = quiet(compute, features, labels)
    torch.testing.assert_close(quiet(compute, features, torch.tensor([0, 3, 7])[labels]), whole, rtol=1e-9, atol=1e-9)


@of_all
def test_ignore_index(compute):
    features, labels = data_for(compute)
    marked = labels.clone()
    marked[40:] = 255
    ignored = quiet(compute, features, marked, ignore_index=255)
    if compute is not OF_PROBABILITIES["leep_image_maps"]:  # whose mean is NaN where a pixel is ignored
        torch.testing.assert_close(ignored, quiet(compute, features[:40], labels[:40]), rtol=1e-9, atol=1e-9)
    else:
        assert ignored.isnan().all()


@of_features
def test_constant_feature(compute):
    features, labels = problem()
    features[:, 2] = 4.0
    assert quiet(compute, features, labels).isfinite().all()


@of_features
def test_all_features_constant(compute):
    features, labels = problem()
    assert quiet(compute, torch.full_like(features, 4.0), labels).isfinite().all()


@of_features
def test_many_more_dimensions_than_samples(compute):
    assert quiet(compute, *problem(24, 200)).isfinite().all()


@of_features
def test_perfectly_separable(compute):
    _, labels = problem()
    assert quiet(compute, torch.eye(3, 5)[labels] * 100.0, labels).isfinite().all()


@of_features
def test_float16_overflow(compute):
    features, labels = problem()
    half = (features * 15000).half()  # the squares are far beyond 65504
    assert half.isfinite().all()
    assert torch.isinf(half**2).any()
    torch.testing.assert_close(
        quiet(compute, half, labels), quiet(compute, half.double(), labels), rtol=1e-9, atol=1e-9
    )


@of_probabilities
def test_underflowed_softmax(compute):
    features, labels = problem(width=4)
    probs = (features[:, :3].float() * 400).softmax(1)
    assert (probs == 0).any()
    assert quiet(compute, probs, labels).isfinite().all()


@of_all
def test_non_contiguous(compute):
    features, labels = data_for(compute)
    strided = torch.stack([features, features], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(quiet(compute, strided, labels), quiet(compute, features, labels), rtol=1e-9, atol=1e-9)


@of_all
def test_requires_grad(compute):
    features, labels = data_for(compute)
    value = quiet(compute, features.clone().requires_grad_(), labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, quiet(compute, features, labels), rtol=1e-9, atol=1e-9)


@of_features
@pytest.mark.parametrize("scale", [1e8, 1e-8], ids=["huge", "tiny"])
def test_feature_scale(compute, scale):
    features, labels = problem()
    assert quiet(compute, features * scale, labels).isfinite().all()
    assert quiet(compute, (features * scale).float(), labels).isfinite().all()
