"""Transferability scores by name, all from one pass of each source over the target's training images.

A score is a function of how often each target patient counts. So the same code gives the table (every patient once) and
the bootstrap over patients.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import SpatialResample
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from medtl_ext import metrics
from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError
from medtl_ext.data import SliceDataset
from medtl_ext.data.collection import read_arrays
from medtl_ext.metrics.base import TransferMetric, probabilities_and_labels
from medtl_ext.metrics.features import Samples
from medtl_ext.networks import load_weights
from medtl_ext.ranking import mean_auc
from medtl_ext.transfer.sources.pool import Source

PIXELS_FILE = "pixels.npz"
# Enough that the ten samples of 10,000 pixels that OTCE draws differ.
KEPT_PIXELS = 50_000


class Predictions(TransferMetric):
    """Keeps the source's probabilities for every image, for scores that need them more than once.

    ``compute()`` returns the `Samples` of all processes, sorted by subject and slice: features are the probabilities,
    N x Z (x *spatial), float32; labels are N (x *spatial). Memory: one float32 per class and pixel of the training
    slices.
    """

    def reset(self) -> None:
        super().reset()
        self._kept: list[tuple[str, int, str, torch.Tensor, torch.Tensor]] = []

    def update(self, source_probs: torch.Tensor, target_labels: torch.Tensor, images: Sequence[Any] = ()) -> None:
        for number, (probs, labels) in enumerate(zip(source_probs, target_labels, strict=True)):
            subject, place, patient = images[number] if len(images) else ("", len(self._kept), "")
            labels = labels[0] if labels.ndim == probs.ndim else labels
            self._kept.append((str(subject), int(place), str(patient), probs.float().cpu(), labels.long().cpu()))

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        batch = engine.state.batch
        if not isinstance(batch, dict):
            batch = {key: [item[key] for item in batch] for key in ("subject", "patient", "slice") if key in batch[0]}
        subjects = batch.get("subject")
        if subjects is None:
            raise InputError("the data loader's items have no 'subject'; add it: scores are resampled by patient.")
        probs, labels = probabilities_and_labels(engine.state.output)
        patients = batch.get("patient", subjects)
        if (onto := getattr(engine, "onto", None)) is not None:
            for number, subject in enumerate(subjects):
                places, *found = onto(subject, probs[number], batch["image"][number].affine)
                self.update(*found, [(subject, place, patients[number]) for place in places])
            return
        places = batch.get("slice", range(len(subjects)))
        self.update(probs, labels, list(zip(subjects, places, patients, strict=True)))

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        self._kept += other._kept

    def compute(self) -> Samples:
        """The images of all processes."""
        kept = sorted((image for share in idist.all_gather(self._kept) for image in share), key=lambda image: image[:2])
        if not kept:
            raise InputError("Predictions has seen no image; check that the data loader is not empty.")
        _, _, patients, probs, labels = zip(*kept, strict=True)
        names, groups = np.unique(patients, return_inverse=True)
        return Samples(torch.stack(probs), torch.stack(labels), torch.from_numpy(groups), tuple(names.tolist()))


@dataclass(frozen=True)
class Observation:
    """The outputs of one source for the target's training images.

    Attributes:
        samples: penultimate features; for segmentation of a balanced sample of pixels.
        maps: its probabilities for every image, see `Predictions`.
        fu: its gradient ratio (FU); NaN if it was not asked for.
        source_pixels: softmax and labels of pixels of the source's own data; None if not known.
    """

    samples: Samples
    maps: Samples
    fu: float = float("nan")
    source_pixels: tuple[torch.Tensor, torch.Tensor] | None = None


class TargetSlices:
    """Resamples a patient's probabilities from a source's grid to the target's slices, where sources are compared.

    Args:
        slices: the target's slices, with labels.
    """

    def __init__(self, slices: SliceDataset) -> None:
        self.slices = slices
        self.items: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for item in slices:
            self.items[item["subject"]].append((item["slice"], item["label"]))

    def __call__(
        self, subject: str, probs: torch.Tensor, affine: torch.Tensor
    ) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The patient's slice numbers, N x Z (x *spatial) probabilities, and N x 1 (x *spatial) labels.

        Args:
            subject: the subject's name in the datalist.
            probs: Z x *spatial, on the source's grid.
            affine: of this grid, 4 x 4, voxels to mm.
        """
        wanted, shape = self.slices.geometry[subject]
        image = MetaTensor(probs.float().cpu(), affine=affine)
        moved = SpatialResample(padding_mode="zeros")(image, dst_affine=wanted, spatial_size=shape).as_tensor()
        moved[0] += 1 - moved.sum(0)  # outside the source's field of view everything is background
        places, labels = zip(*self.items[subject], strict=True)
        whole = labels[0].ndim == moved.ndim
        found = [moved if whole else moved[..., place] for place in places]
        return list(places), torch.stack(found), torch.stack(labels)


ScoreOfCounts = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class Score:
    """A transferability score.

    Attributes:
        label: its name in tables and figures.
        of: gives an observation's value as a function of how often each patient counts.
        combine: scales the values over all sources, for a score that is relative to a pool; its second argument is
            ``cross_domain``.
        resamples: the largest number of resamples: small if a model is fitted each time, 0 if it cannot be resampled.
    """

    label: str
    of: Callable[[Observation, int], ScoreOfCounts]
    combine: Callable[[Mapping[str, Any], bool], dict[str, float]] | None = None
    resamples: int = 10**9


def observe(
    source: Source,
    network: nn.Module,
    evaluator: SupervisedEvaluator,
    *,
    with_fu: bool = False,
    onto: TargetSlices | None = None,
) -> Observation:
    """Pass a source over the target's training images, once, with the evaluator.

    Args:
        source: the source; its training may have saved pixels of its own data.
        network: from `Source.build`.
        evaluator: with the metrics ``samples`` and ``predictions``; its network is replaced.
        with_fu: also run the network backwards, for FU.
        onto: resamples to the target's slices, if the evaluator's images are on another grid.

    Raises:
        InputError: FU does not find two convolutions in the network.
    """
    evaluator.onto = onto
    found = _run(evaluator, network, source if with_fu else None)
    seen = Observation(found["samples"], found["predictions"], found.get("fu", float("nan")))
    return replace(seen, source_pixels=own_pixels(source))


def own_pixels(source: Source) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Softmax and labels that `KeepPixels` left of a source's own data."""
    if source.job is None or not (file := source.job.output_dir / PIXELS_FILE).is_file():
        return None
    content = read_arrays(file)
    return torch.from_numpy(content["probs"]), torch.from_numpy(content["labels"]).long()


def kept_pass(file: Path, source: Source, observed: Callable[[], Observation]) -> Observation:
    """What a source makes of the target, from the file that an equal pass left, or by a pass that leaves one.

    Args:
        file: whose name says what the pass depends on, ``.npz``.
        source: as for `observe`.
        observed: makes the pass.
    """
    with suppress(InputError):  # there is none, or it was damaged since
        content = read_arrays(file)
        samples, maps = (
            Samples(*(torch.from_numpy(content[f"{part} {name}"]) for name in Samples._fields[:3]), names)
            for part in ("samples", "maps")
            for names in [tuple(content[f"{part} names"].tolist())]
        )
        return Observation(samples, maps, float(content["fu"]), own_pixels(source))
    seen, arrays = observed(), {}
    for part in ("samples", "maps"):
        for name, value in getattr(seen, part)._asdict().items():
            arrays[f"{part} {name}"] = np.array(value) if name == "names" else value.cpu().numpy()
    with suppress(OSError), atomic_path(file) as temporary:  # that it cannot be kept costs time only
        np.savez(temporary, fu=seen.fu, **arrays)
    return seen


def _run(evaluator: SupervisedEvaluator, network: nn.Module, for_fu: Source | None = None) -> dict[str, Any]:
    """The evaluator's metrics of a network, and FU if asked for, which also runs the network backwards."""
    evaluator.network = network.eval().to(evaluator.state.device)
    update = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            if for_fu is not None:
                prefix = "net." if for_fu.card.foreign else ""
                named = for_fu.card.convolutions and [prefix + name for name in for_fu.card.convolutions]
                update = metrics.FeatureUpdate(evaluator.network, convolutions=named)
                update.attach(evaluator, "fu")
            evaluator.run()
        except InputError as error:
            if for_fu is None:
                raise
            hint = "; name them as 'convolutions' of the source" if "convolution" in str(error) else ""
            raise InputError(f"source {for_fu.name}: {str(error).rstrip('.')}{hint}.") from error
        finally:
            if update is not None:
                update.detach(evaluator)
    return {name: float(value) if name == "fu" else value for name, value in evaluator.state.metrics.items()}


@dataclass(kw_only=True, eq=False)
class KeepPixels:
    """A step that writes softmax and labels of pixels of a network's own training data to ``pixels.npz``, for OTCE.

    The pixels are drawn uniformly, because OTCE depends on the frequencies of the labels.

    Args:
        evaluator: with the metric ``predictions``, over the training images.
        network, output_dir: the trained network, and the folder of the run.
        seed: of the draw.
    """

    evaluator: SupervisedEvaluator
    network: nn.Module
    output_dir: str
    seed: int = 0

    def run(self) -> None:
        network = getattr(self.network, "module", self.network)
        load_weights(network, f"{self.output_dir}/model.pt", min_share=1.0)
        probs, labels = _pixels(*_run(self.evaluator, network)["predictions"][:2])
        chosen = np.random.default_rng(self.seed).permutation(len(labels))[:KEPT_PIXELS]
        kept = {"probs": probs[chosen].numpy(), "labels": labels[chosen].numpy().astype(np.uint8)}
        if idist.get_rank() == 0:
            with atomic_path(Path(self.output_dir) / PIXELS_FILE) as temporary:
                np.savez_compressed(temporary, **kept)


def _pixels(probs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (M x Z) and labels (M) of all pixels."""
    return probs.movedim(1, -1).flatten(0, -2), labels.flatten()


def _h_score_map(probs: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of the map over all pixels; a pixel where only one label occurs counts as 0."""
    probs, labels = probs.flatten(2), labels.flatten(1)
    several = labels.amin(0) != labels.amax(0)
    if not bool(several.any()):
        return 0.0
    return float(metrics.compute_h_score_map(probs[..., several], labels[:, several]).nansum()) / labels.shape[1]


def _otce(seen: Observation, seed: int) -> ScoreOfCounts:
    def value(counts: Sequence[int]) -> float:
        if seen.source_pixels is None:
            return float("nan")
        probs, labels = _pixels(*seen.maps.resampled(counts))
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: len(seen.source_pixels[1])]
        # Two channels of a softmax lie on a line, so transport needs only sorting; more channels are slower.
        size = {"n_samples": 10_000, "repeats": 10} if probs.shape[1] == 2 else {"n_samples": 1_000, "repeats": 3}
        return float(metrics.compute_otce(*seen.source_pixels, probs[chosen], labels[chosen], **size))

    return value


def _of_sums(metric: metrics.MomentMetric, seen: Observation, seed: int) -> ScoreOfCounts:
    """For scores of sums: the sums of every patient are added as often as the patient counts, which is fast."""
    sums = metrics.PatientSums.of(seen.samples, {"score": metric})
    return lambda counts: sums.resampled(counts)["score"]


def _of(part: str, compute: Callable[..., Any]) -> Callable[[Observation, int], ScoreOfCounts]:
    """For scores that are computed anew from the ``samples`` or the ``maps`` of every resample."""
    return lambda seen, seed: lambda counts: compute(*getattr(seen, part).resampled(counts))


def _probe_auc(seen: Observation, seed: int) -> ScoreOfCounts:
    """AUC of a linear probe of the features; each patient's pixels are predicted by a probe without this patient."""
    features, labels, groups = (tensor.cpu().numpy() for tensor in seen.samples[:3])
    classes, labels = np.unique(labels, return_inverse=True)
    probs = np.full((len(labels), len(classes)), np.nan)
    for patient in np.unique(groups):
        out = groups == patient
        present = np.unique(labels[~out])
        if len(present) > 1:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(features[~out], labels[~out])
            probs[out] = 0
            probs[np.ix_(out, present)] = probe.predict_proba(features[out])
    known = ~np.isnan(probs[:, 0])
    return lambda counts: mean_auc(labels[known], probs[known], np.asarray(counts)[groups[known]])


def _lp_and_fu(seen: Observation, seed: int) -> ScoreOfCounts:
    return lambda counts: (float(metrics.compute_label_prediction(*seen.samples.resampled(counts))), seen.fu)


def _combine_lp_fu(values: Mapping[str, tuple[float, float]], cross_domain: bool) -> dict[str, float]:
    lp, fu = ({name: pair[place] for name, pair in values.items()} for place in (0, 1))
    return metrics.combine_lp_fu(lp, fu, cross_domain=cross_domain)


def _nleep(seen: Observation, seed: int) -> ScoreOfCounts:
    return _of("samples", partial(metrics.compute_nleep, seed=seed))(seen, seed)


def _nce(probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return metrics.compute_nce(probs.argmax(1), labels)


SLOW, FITTED = 200, 100
SCORES: dict[str, Score] = {
    "h_score": Score("shrunk H-score", partial(_of_sums, metrics.HScore(shrinkage="ledoit_wolf"))),
    "logme": Score("LogME", partial(_of_sums, metrics.LogME())),
    "gbc": Score("GBC", partial(_of_sums, metrics.GBC())),
    "transrate": Score("TransRate", partial(_of_sums, metrics.TransRate())),
    "probe_auc": Score("linear-probe AUC", _probe_auc),
    "leep": Score("LEEP", _of("maps", metrics.compute_leep), resamples=SLOW),
    "nce": Score("NCE", _of("maps", _nce), resamples=SLOW),
    "h_score_map": Score("H-score map", _of("maps", _h_score_map), resamples=SLOW),
    "otce": Score("OTCE", _otce, resamples=SLOW),
    "sfda": Score("SFDA", _of("samples", metrics.compute_sfda), resamples=FITTED),
    "nleep": Score("NLEEP", _nleep, resamples=FITTED),
    "parc": Score("PARC", _of("samples", metrics.compute_parc), resamples=FITTED),
    "ncti": Score("NCTI", _of("samples", metrics.compute_ncti), lambda terms, _: metrics.combine_ncti(terms), FITTED),
    # LP learns a map of the features, and FU runs the network backwards: both are too slow for resampling.
    "lp": Score("LP", _of("samples", metrics.compute_label_prediction), resamples=0),
    "fu": Score("FU", lambda seen, seed: lambda counts: seen.fu, resamples=0),
    "lp_fu": Score("LP x FU", _lp_and_fu, _combine_lp_fu, 0),
}
"""Every score by its name in configs and tables."""


def resampled_scores(
    name: str, seen: Mapping[str, Observation], *, seed: int = 0, cross_domain: bool = False
) -> Callable[[Sequence[int]], dict[str, float]]:
    """A score of all sources as a function of how often each target patient counts, for `bootstrap_ranking`.

    Args:
        name: a name in `SCORES`.
        seen: source -> result of `observe`.
        seed: of NLEEP's mixture models.
        cross_domain: see `medtl_ext.metrics.combine_lp_fu`, for LP x FU.
    """
    score = SCORES[name]
    functions = {source: score.of(one, seed) for source, one in seen.items()}

    def values(counts: Sequence[int]) -> dict[str, float]:
        found = {source: function(counts) for source, function in functions.items()}
        if score.combine is not None:
            return score.combine(found, cross_domain)
        return {source: float(value) for source, value in found.items()}

    return values


def patients_of(seen: Mapping[str, Observation]) -> int:
    """Number of patients, which is the length of ``counts``."""
    return len(next(iter(seen.values())).maps.names)


def score_values(names: Sequence[str], seen: Mapping[str, Observation], **options: Any) -> dict[str, dict[str, float]]:
    """Score -> source -> value, with every patient counted once; for the options see `resampled_scores`."""
    everybody = np.ones(patients_of(seen), dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return {name: resampled_scores(name, seen, **options)(everybody) for name in names}
