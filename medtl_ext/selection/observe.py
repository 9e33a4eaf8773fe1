"""One pass of each source over the target's training set: what the scores are computed from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from torch import nn
from tqdm import tqdm

from medtl_ext._io import atomic_path
from medtl_ext._validation import InputError
from medtl_ext.metrics.base import TransferMetric, probabilities_and_labels
from medtl_ext.metrics.features import Samples
from medtl_ext.networks import load_weights
from medtl_ext.selection.candidates import Candidate, input_misfit, usable

logger = logging.getLogger(__name__)

PIXELS_FILE = "pixels.npz"
# Enough for the ten samples of 10,000 that OTCE draws to differ.
KEPT_PIXELS = 50_000


class Maps(NamedTuple):
    """Predictions of a source and labels of the target on one grid, in the order of patient and slice.

    Attributes:
        probs: N x Z x *spatial, float32.
        labels: N x *spatial, int64.
        groups: N, int64, the index in ``names`` of each image's patient.
        names: the patients.
    """

    probs: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    names: tuple[Hashable, ...]

    def resampled(self, counts: Sequence[int]) -> Maps:
        """The images with every patient as often as ``counts`` says."""
        times = torch.as_tensor(np.asarray(counts))
        rows = torch.arange(len(self.labels)).repeat_interleave(times[self.groups])
        return Maps(self.probs[rows], self.labels[rows], self.groups[rows], self.names)


class Predictions(TransferMetric):
    """Keeps the source's probabilities of every image, for scores that need them more than once.

    ``compute()`` returns `Maps` of all processes, in the order of subject and slice whatever the order they came in.
    Memory: one float32 per class and pixel of the training slices, which the dataset holds in memory as well.
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
            raise InputError("the data loader's items have no 'subject'; scores are resampled by patient.")
        places = batch.get("slice", range(len(subjects)))
        images = zip(subjects, places, batch.get("patient", subjects), strict=True)
        self.update(*probabilities_and_labels(engine.state.output), list(images))

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        self._kept += other._kept

    def compute(self) -> Maps:
        """The images of all processes."""
        kept = self._kept
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, kept)
            kept = [image for share in shares for image in share]
        if not kept:
            raise InputError("Predictions has seen no image; look for an empty data loader.")
        kept = sorted(kept, key=lambda image: image[:2])
        names = tuple(sorted({image[2] for image in kept}))
        number = {name: place for place, name in enumerate(names)}
        groups = torch.tensor([number[image[2]] for image in kept])
        return Maps(torch.stack([i[3] for i in kept]), torch.stack([i[4] for i in kept]), groups, names)


@dataclass(frozen=True)
class Observation:
    """What one source makes of the target's training set.

    Attributes:
        samples: penultimate features of balanced pixels.
        maps: its probabilities of every image.
        leep, nce: as the evaluator's metrics gave them.
        source_pixels: softmax and labels of pixels of the source's own data, None where there are none.
    """

    samples: Samples
    maps: Maps
    leep: float
    nce: float
    source_pixels: tuple[torch.Tensor, torch.Tensor] | None = None


class Observed(NamedTuple):
    """What `observe` returns.

    Attributes:
        seen: source -> what it makes of the target.
        left_out: source -> why its network cannot take the target's images.
    """

    seen: dict[str, Observation]
    left_out: dict[str, str]


def observe(
    pool: Sequence[Candidate],
    *,
    evaluator: SupervisedEvaluator,
    architecture: Callable[..., nn.Module],
    in_channels: int,
    roi_size: Sequence[int],
    progress: bool = True,
) -> Observed:
    """Pass every usable source over the target's training set with the evaluator.

    A bundle's network that does not take the target's images is left out with the reason.

    Args:
        pool: the candidates.
        evaluator: with the metrics ``samples``, ``predictions``, ``leep`` and ``nce``; its network is replaced.
        architecture: makes the network of candidates that name none, from ``out_channels``.
        in_channels, roi_size: of the target's images.

    Raises:
        InputError: a source task's or checkpoint's network does not fit its weights or the target's images.
    """
    seen, left_out = {}, {}
    candidates = usable(pool)
    if not candidates:
        reasons = "; ".join(f"{candidate.name}: {candidate.left_out}" for candidate in pool)
        raise InputError(f"no source can be used ({reasons}).")
    for candidate in tqdm(candidates, "scoring", unit="source", disable=None if progress else True):
        network = candidate.build(architecture).to(evaluator.state.device)
        misfit = input_misfit(network, candidate, in_channels=in_channels, roi_size=roi_size)
        if misfit and candidate.kind != "bundle":
            raise InputError(f"source {candidate.name}: {misfit}.")
        if misfit:
            left_out[candidate.name] = misfit
            logger.warning("source %s is left out: %s", candidate.name, misfit)
            continue
        seen[candidate.name] = _observation(candidate, network, evaluator)
    if not seen:
        raise InputError("no source's network takes the target's images; see the warnings above.")
    return Observed(seen, left_out)


def _observation(candidate: Candidate, network: nn.Module, evaluator: SupervisedEvaluator) -> Observation:
    found = _run(evaluator, network)
    pixels = None
    if candidate.job is not None and (file := candidate.job / PIXELS_FILE).is_file():
        with np.load(file) as content:
            pixels = torch.from_numpy(content["probs"]), torch.from_numpy(content["labels"]).long()
    return Observation(found["samples"], found["predictions"], float(found["leep"]), float(found["nce"]), pixels)


def _run(evaluator: SupervisedEvaluator, network: nn.Module) -> dict[str, Any]:
    evaluator.network = network.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*key metric.*")
        evaluator.run()
    return dict(evaluator.state.metrics)


def keep_pixels(
    evaluator: SupervisedEvaluator, network: nn.Module, *, checkpoint: str, output_dir: str, seed: int = 0
) -> None:
    """Write the softmax and labels of pixels of a network's own training data to ``pixels.npz``, for OTCE.

    The pixels are drawn from all pixels alike, for OTCE depends on how frequent labels are.
    """
    network = getattr(network, "module", network)
    load_weights(network, checkpoint, min_share=1.0)
    maps = _run(evaluator, network)["predictions"]
    probs = maps.probs.movedim(1, -1).flatten(0, -2)
    labels = maps.labels.flatten()
    chosen = np.random.default_rng(seed).permutation(len(labels))[:KEPT_PIXELS]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        with atomic_path(Path(output_dir) / PIXELS_FILE) as temporary:
            np.savez_compressed(temporary, probs=probs[chosen].numpy(), labels=labels[chosen].numpy().astype(np.uint8))
