"""Transferability metrics. Each file has one metric: a pure ``compute_*`` function and a streaming class."""

from medtl_ext.metrics.base import TransferMetric, probabilities_and_labels
from medtl_ext.metrics.ccfv import CCFV, compute_ccfv
from medtl_ext.metrics.feature_update import FeatureUpdate, compute_feature_update
from medtl_ext.metrics.features import (
    FeatureMetric,
    FeatureSamples,
    MomentMetric,
    SampleMetric,
    Samples,
    tap_features,
)
from medtl_ext.metrics.gbc import GBC, compute_gbc
from medtl_ext.metrics.h_score import HScore, HScoreMap, compute_h_score, compute_h_score_map
from medtl_ext.metrics.label_prediction import LabelPrediction, combine_lp_fu, compute_label_prediction
from medtl_ext.metrics.leep import (
    LEEP,
    LEEPImageMaps,
    LEEPMap,
    compute_leep,
    compute_leep_image_maps,
    compute_leep_map,
)
from medtl_ext.metrics.logme import LogME, compute_logme
from medtl_ext.metrics.nce import NCE, compute_nce
from medtl_ext.metrics.ncti import NCTI, NCTITerms, combine_ncti, compute_ncti
from medtl_ext.metrics.nleep import NLEEP, compute_nleep
from medtl_ext.metrics.otce import OTCE, compute_otce, label_transport
from medtl_ext.metrics.parc import PARC, compute_parc
from medtl_ext.metrics.patients import PatientScores, PatientSums
from medtl_ext.metrics.segmentation import compute_segmentation_scores
from medtl_ext.metrics.sfda import SFDA, compute_sfda
from medtl_ext.metrics.transrate import TransRate, compute_transrate

__all__ = [
    "CCFV",
    "GBC",
    "LEEP",
    "NCE",
    "NCTI",
    "NLEEP",
    "OTCE",
    "PARC",
    "SFDA",
    "FeatureMetric",
    "FeatureSamples",
    "FeatureUpdate",
    "HScore",
    "HScoreMap",
    "LEEPImageMaps",
    "LEEPMap",
    "LabelPrediction",
    "LogME",
    "MomentMetric",
    "NCTITerms",
    "PatientScores",
    "PatientSums",
    "SampleMetric",
    "Samples",
    "TransRate",
    "TransferMetric",
    "combine_lp_fu",
    "combine_ncti",
    "compute_ccfv",
    "compute_feature_update",
    "compute_gbc",
    "compute_h_score",
    "compute_h_score_map",
    "compute_label_prediction",
    "compute_leep",
    "compute_leep_image_maps",
    "compute_leep_map",
    "compute_logme",
    "compute_nce",
    "compute_ncti",
    "compute_nleep",
    "compute_otce",
    "compute_parc",
    "compute_segmentation_scores",
    "compute_sfda",
    "compute_transrate",
    "label_transport",
    "probabilities_and_labels",
    "tap_features",
]
