"""One pass of each source over the target's training images, and every score from it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from monai.engines import SupervisedEvaluator
from tqdm import tqdm

from medtl_ext._validation import InputError, require_choices
from medtl_ext.datasets.sources import Source
from medtl_ext.metrics.feature_update import FeatureUpdate
from medtl_ext.metrics.features import Samples
from medtl_ext.metrics.label_prediction import combine_lp_fu
from medtl_ext.metrics.ncti import combine_ncti, compute_ncti
from medtl_ext.selection.observe import Maps, Observation
from medtl_ext.selection.scores import score_of_counts

logger = logging.getLogger(__name__)

LABELS = {
    "lp_fu": "LP x FU",
    "lp": "LP",
    "fu": "FU",
    "leep": "LEEP",
    "nleep": "NLEEP",
    "logme": "LogME",
    "parc": "PARC",
    "sfda": "SFDA",
    "ncti": "NCTI",
    "gbc": "GBC",
    "h_score": "shrunk H-score",
}
METRICS = tuple(LABELS)
# LP learns a map of the features and FU runs the network backwards: no thousand resamples of that.
NO_INTERVAL = ("lp", "fu", "lp_fu")
# Scores that fit a model, or sort all pairs, in each resample.
SLOW = ("nleep", "parc", "sfda", "ncti")
SLOW_RESAMPLES = 100


@dataclass(frozen=True)
class Seen:
    """What one source makes of the target's training images.

    Attributes:
        samples: penultimate features, with labels and patients.
        maps: its predictions of each image.
        values: metric -> what the evaluator's metrics gave; of ``ncti`` its three terms.
    """

    samples: Samples
    maps: Maps
    values: Mapping[str, Any] = field(default_factory=dict)


def observe(
    pool: Sequence[Source],
    *,
    evaluator: SupervisedEvaluator,
    network_def: Mapping[str, Any],
    in_channels: int,
    image_size: int,
    metrics: Sequence[str],
    progress: bool = True,
) -> dict[str, Seen]:
    """Pass every source over the target's training images, once, with the evaluator and its metrics.

    FU is attached here, because it runs a network itself: the source's, forwards and backwards.

    Args:
        pool: the sources, all with a checkpoint.
        evaluator: with the metrics ``samples`` and ``predictions`` and the scores; its network is replaced.
        network_def, in_channels, image_size: see `Source.build`.
        metrics: what will be asked for: FU is left out where nothing needs it.

    Raises:
        InputError: a source that does not fit its weights or the images, or whose convolutions cannot be found.
    """
    needs_fu = {"fu", "lp_fu"} & set(metrics)
    seen = {}
    for source in tqdm(pool, "scoring", unit="source", disable=None if progress else True):
        network = source.build(network_def, in_channels=in_channels, image_size=image_size)
        evaluator.network = network.to(evaluator.state.device)
        update = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                if needs_fu:
                    update = FeatureUpdate(network, convolutions=source.convolutions)
                    update.attach(evaluator, "fu")
                evaluator.run()
            except InputError as error:
                hint = "; name them as 'convolutions' of the source" if "convolution" in str(error) else ""
                raise InputError(f"source {source.name}: {str(error).rstrip('.')}{hint}.") from error
            finally:
                if update is not None:
                    update.detach(evaluator)
        found = dict(evaluator.state.metrics)
        seen[source.name] = Seen(found.pop("samples"), found.pop("predictions"), found)
    return seen


def score_table(
    pool: Sequence[Source],
    observed: Mapping[str, Seen],
    *,
    metrics: Sequence[str],
    cross_domain: bool = False,
    with_own: bool = False,
) -> pd.DataFrame:
    """One row per source: what is known of it, and every score (NaN where there is none).

    Scores that are scaled over the candidates (LP x FU, NCTI) leave the target's own model out, unless ``with_own``
    asks what they would say of it.
    """
    metrics, rows = require_choices("metric", metrics, METRICS), {}
    for source in pool:
        values = observed[source.name].values
        scores = {name: float(values[name]) for name in METRICS if name in values and name != "ncti"}
        rows[source.name] = {
            "data": source.data,
            "own": source.own,
            "images": source.images,
            "own_auc": own_auc(source),
            "checkpoint": source.checkpoint,
            **scores,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    ranked = [name for name in table.index if with_own or not table.loc[name, "own"]]
    if "ncti" in metrics:
        terms = {name: observed[name].values["ncti"] for name in ranked}
        table["ncti"] = pd.Series(combine_ncti(terms))
    if "lp_fu" in metrics:
        lp, fu = (table.loc[ranked, name].to_dict() for name in ("lp", "fu"))
        table["lp_fu"] = pd.Series(combine_lp_fu(lp, fu, cross_domain=cross_domain))
    known = [column for column in table if column not in METRICS]
    asked = [metric for metric in METRICS if metric in metrics]
    if missing := [metric for metric in asked if metric not in table]:
        raise InputError(f"metric {missing[0]} was not measured; put it back into score#additional_metrics.")
    return table[known + asked].rename_axis("source")


def own_auc(source: Source) -> float:
    """Validation AUC of a source on its own task, NaN where it was not trained here."""
    if source.job is None:
        return math.nan
    table = pd.read_csv(source.job / "metrics.csv").set_index("split")
    return float(table.loc["val", "auc"])


def resampled_scores(
    metric: str, observed: Mapping[str, Seen], sources: Sequence[str], *, seed: int = 0
) -> Callable[[np.ndarray], dict[str, float]]:
    """All sources' scores as a function of how often each target patient counts, for `bootstrap_ranking`.

    The seed is that of the scores in the table, which NLEEP depends on.
    """
    if metric == "ncti":
        return lambda counts: combine_ncti(
            {name: compute_ncti(*observed[name].samples.resampled(counts)) for name in sources}
        )
    functions = {
        name: score_of_counts(
            metric, Observation(observed[name].samples, observed[name].maps, math.nan, math.nan), seed=seed
        )
        for name in sources
    }
    return lambda counts: {name: function(counts) for name, function in functions.items()}
