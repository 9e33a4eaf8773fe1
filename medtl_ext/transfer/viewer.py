"""Volumes of patients, small enough to lie in ``report.html``, where its viewer scrolls through them."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from skimage.measure import block_reduce

__all__ = ["MOST", "packed"]

MOST = {"patient": 300_000, "report": 10_000_000}
"""Characters that the volumes of a patient, and those of all patients, may take on a page of 12 MB with its figures."""
MARGIN = 8
"""Voxels around what is labelled, at least; or a quarter of its length."""


def packed(
    image: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    spacing: Sequence[float],
    maps: Mapping[str, np.ndarray] | None = None,
    truth: str = "truth",
    most: int = MOST["patient"],
) -> dict[str, Any]:
    """An image with what lies over it, as the viewer of a report takes it.

    It is cropped to the region of the truth with a margin, brought to 8 bits, and made coarser along the axis of the
    smallest voxels until it fits: images and maps by their mean, labels by the voxel in the middle.

    Args:
        image: channels (1, or 3 of a colour image) x X x Y x Z, in RAS.
        labels: name -> class numbers, X x Y x Z, below 256.
        spacing: mm of a voxel.
        maps: name -> values, X x Y x Z; NaN is not shown.
        truth: name of the labels whose region is shown. Without it, or where it is empty, all is.
        most: characters that the volumes may take.

    Returns:
        ``shape`` and ``spacing`` of what is kept; how many voxels ``step`` became one; ``channels``; ``layers``, each
        with ``name``, ``kind`` (labels or map), the share of a segmentation that lies ``outside`` of the region, and
        ``low`` and ``high`` of a map; ``data``: gzip in base64 of the channels and layers, a byte a voxel, X fastest.

    >>> label = np.zeros((40, 40, 1), int); label[10:12, 10:12] = 1
    >>> found = packed(np.random.rand(1, 40, 40, 1), {"truth": label, "full": 1 - label}, spacing=[1, 1, 1])
    >>> found["shape"], f"{found['layers'][1]['outside']:.2f}"
    ([18, 18, 1], '0.80')
    """
    maps, region = maps or {}, _region(labels.get(truth), image.shape[1:])
    layers: list[dict[str, Any]] = []
    for name, label in labels.items():
        kept, whole = (np.count_nonzero(one) for one in (label[region], label))
        layers.append({"name": name, "kind": "labels", "outside": 1 - kept / max(whole, 1) if whole else 0.0})
    for name, values in maps.items():
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        layers.append({"name": name, "kind": "map", "low": low, "high": high})
    image, sizes = image[(slice(None), *region)], np.asarray(spacing, float)
    limits = (image.min(), image.max()) if len(image) == 3 else np.percentile(image, [0.5, 99.5])
    shape, step = np.array(image.shape[1:]), np.ones(3, int)
    while True:
        kept = tuple(slice(0, size) for size in shape // step * step)
        middle = tuple(slice(one // 2, cut.stop, one) for one, cut in zip(step, kept, strict=True))
        arrays = [_byte(block_reduce(one[kept], tuple(step), np.mean), *limits) for one in image]
        arrays += [label[region][middle].astype(np.uint8) for label in labels.values()]
        for values, layer in zip(maps.values(), layers[len(labels) :], strict=True):
            arrays.append(
                _byte(block_reduce(values[region][kept], tuple(step), np.mean), layer["low"], layer["high"], 1)
            )
        raw = b"".join(array.tobytes(order="F") for array in arrays)
        data = base64.b64encode(gzip.compress(raw, mtime=0)).decode() if len(raw) < 8 * most else None
        if (data and len(data) <= most) or (shape // step).max() == 1:
            break
        step[np.where(shape // step > 1, sizes * step, np.inf).argmin()] += 1
    what = {"shape": list(arrays[0].shape), "spacing": (sizes * step).tolist(), "step": step.tolist()}
    return what | {"channels": len(image), "layers": layers, "data": data}


def _region(truth: np.ndarray | None, shape: Sequence[int]) -> tuple[slice, ...]:
    if truth is None or not truth.any():
        return tuple(slice(0, size) for size in shape)
    places = np.argwhere(truth)
    first, end = places.min(0), places.max(0) + 1
    margin = np.maximum(MARGIN, (end - first) // 4)
    return tuple(map(slice, np.maximum(first - margin, 0).tolist(), np.minimum(end + margin, shape).tolist()))


def _byte(values: np.ndarray, low: float, high: float, least: int = 0) -> np.ndarray:
    """From low and high to ``least`` and 255; NaN to 0."""
    scaled = (values - low) / (high - low if high > low else 1)
    return np.nan_to_num(least + (255 - least) * np.clip(scaled, 0, 1)).round().astype(np.uint8)
