"""TransRate: against singular values, and within its bounds."""

import numpy as np
import pytest
from metric_cases import draw, streamed

from medtl_ext.metrics import TransRate, compute_transrate


def by_singular_values(features, labels, eps=1e-4):
    """The score from the singular values of the N x D matrices, which see no D x D matrix."""
    x, y = np.asarray(features), np.asarray(labels)
    x = x - x.mean(0)

    def rate(rows):
        return 0.5 * np.log1p(np.linalg.svd(rows, compute_uv=False) ** 2 / (len(rows) * eps)).sum()

    return rate(x) - np.mean([rate(x[y == label]) for label in np.unique(y)])


@pytest.mark.parametrize(("n", "width"), [(60, 1), (60, 5), (60, 25), (20, 90)])
@pytest.mark.parametrize(("scale", "eps"), [(1.0, 1e-4), (1.0, 1.0), (1e8, 1e-4), (1e-8, 1e-4)])
def test_singular_values(n, width, scale, eps):
    features, labels = draw(n=n, width=width)
    labels[n // 2 :] %= 2  # classes of different sizes
    expected = by_singular_values(features * scale, labels, eps)
    value = compute_transrate(features * scale, labels, eps=eps).item()
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)
    value = streamed(TransRate(eps=eps), features * scale, labels, 7).item()  # which sees D x D matrices
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_class_of_one_sample():
    features, labels = draw(n_classes=2)
    labels[0] = 2
    assert compute_transrate(features, labels).item() == pytest.approx(by_singular_values(features, labels), abs=1e-9)
