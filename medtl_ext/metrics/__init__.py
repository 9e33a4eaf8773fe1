"""Transferability metrics: one file a metric, a pure ``compute_*`` function and the streaming class beside it."""

from medtl_ext.metrics.base import TransferMetric, probabilities_and_labels
from medtl_ext.metrics.leep import (
    LEEP,
    LEEPImageMaps,
    LEEPMap,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
)
from medtl_ext.metrics.nce import NCE, compute_nce

__all__ = [
    "LEEP",
    "NCE",
    "LEEPImageMaps",
    "LEEPMap",
    "TransferMetric",
    "compute_leep",
    "compute_leep_image_maps",
    "compute_leep_map",
    "compute_nce",
    "probabilities_and_labels",
]
