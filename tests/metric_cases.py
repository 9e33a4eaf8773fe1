"""A table of all transferability metrics for `test_metrics.py`, and random inputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from drawing import torch_generator
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import BasicUNet

from medtl_ext import metrics
from medtl_ext.metrics import TransferMetric

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
CLS = ("cls_basic", "cls_smallD", "cls_binary")


def draw(
    grid: Sequence[int] = (), *, n: int = 60, width: int = 5, n_classes: int = 3, signal: float = 1.0, generator=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of overlapping classes, and labels; every pixel has every class at least twice."""
    generator = generator or torch_generator()
    labels = torch.randint(n_classes, (n, *grid), generator=generator)
    first = min(2 * n_classes, n)
    labels.view(n, -1)[:first] = (torch.arange(first) % n_classes)[:, None]
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64) * signal
    noise = torch.randn(n, *grid, width, generator=generator, dtype=torch.float64)
    return (noise + centres[labels]).movedim(-1, 1).contiguous(), labels


def streamed(metric: TransferMetric, values: torch.Tensor, labels: torch.Tensor, sizes: int | list[int]) -> Any:
    for batch in zip(values.split(sizes), labels.split(sizes), strict=True):
        metric.update(*batch)
    return metric.compute()


def small_unet() -> BasicUNet:
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4, 4, 4, 4, 4, 4)).eval()


def evaluate(
    items: Sequence[Any],
    network: Any = None,
    *,
    batch_size: int = 2,
    how: Mapping[str, Any] = MappingProxyType({}),
    **metrics: TransferMetric,
) -> SupervisedEvaluator:
    """A MONAI evaluator after its run over the items; the first metric is its key metric."""
    first, *others = metrics
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(list(items)), batch_size=batch_size),
        network=network or small_unet(),
        key_val_metric={first: metrics[first]},
        additional_metrics={name: metrics[name] for name in others},
        **how,
    )
    evaluator.run()
    return evaluator


def tensors(value: Any) -> list[torch.Tensor]:
    """A value's parts: the three terms of NCTI, the image maps, or the value itself."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


def shares(labels: Any) -> torch.Tensor:
    """Frequencies of the classes that occur."""
    count = torch.as_tensor(labels).flatten().bincount().double()
    return count[count > 0] / count.sum()


def negative_entropy(labels: Any) -> float:
    return torch.xlogy(shares(labels), shares(labels)).sum().item()


@dataclass(frozen=True)
class Case:
    """A metric with its options and properties.

    Attributes:
        compute: the one-shot function of (values, labels).
        make: makes the streaming class.
        kind: "features", "probabilities" or "classes", what the values are.
        n: how many samples, or images, are drawn.
        grid: of the images in a batch, where the metric needs images; per_sample: it gives one entry for each.
        minimum: how many samples there must be.
        vectors: (key of the reference's value, or keys of its terms; the data sets that have it; how near it is).
        invariant: name of a change of the inputs (see `test_metrics.py`) -> how near the value stays.
        bounds: of the value, or what makes them of the labels.
        one_class: the value where there is one class only, or what makes it of the labels; None: anything finite.
        constant: the value of constant features, as above; None: anything within the bounds.
        constant_warns: what the warning about them says; "" where there is none.
    """

    name: str
    compute: Callable[..., Any]
    make: Callable[..., TransferMetric]
    kind: str = "features"
    n: int = 60
    grid: tuple[int, ...] = ()
    per_sample: bool = False
    minimum: int = 1
    vectors: Sequence[tuple[str | Sequence[str], Sequence[str], Mapping[str, float]]] = ()
    invariant: Mapping[str, float] = field(default_factory=lambda: SAME)
    bounds: Any = (-torch.inf, torch.inf)
    one_class: Any = None
    constant: Any = None
    constant_warns: str = ""

    def draw(self, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = draw(self.grid, **{"n": self.n} | how)
        if self.kind == "features":
            return features, labels
        return (features[:, :4] * 2).softmax(1) if self.kind == "probabilities" else features.argmax(1), labels


def ccfv_of_images(features: Any, labels: Any, ignore_index: int | None = None, **options: Any) -> torch.Tensor:
    """CC-FV with each image as a case; ignored images are left out."""
    kept = [k for k in range(len(labels)) if ignore_index is None or bool((labels[k] != ignore_index).any())]
    images = kept if len(features) == len(labels) else range(len(features))
    sides = [features[k : k + 1] for k in images], [labels[k : k + 1] for k in kept]
    options |= {"include_background": True, "ignore_index": ignore_index}
    return metrics.compute_ccfv(*([side] for side in sides), **options)


def ccfv(**options: Any) -> metrics.CCFV:
    return metrics.CCFV(include_background=True, **options)


def source_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(n=30, width=width, generator=torch.Generator().manual_seed(9))


def otce_from_a_source(features: Any, labels: Any, **options: Any) -> torch.Tensor:
    width = 5 if isinstance(features, str) or features.ndim < 2 else features.shape[1]
    return metrics.compute_otce(*source_of(width), features, labels, **options)


def otce(**options: Any) -> metrics.OTCE:
    return metrics.OTCE(source_of(5), **options)


def up_to_classes(labels: torch.Tensor) -> tuple[float, float]:
    return 0, len(labels.unique()) - 1


def all_overlap(labels: torch.Tensor) -> float:
    return -len(labels.unique()) * (len(labels.unique()) - 1)


def up_to_overlap(labels: torch.Tensor) -> tuple[float, float]:
    return all_overlap(labels), 0


def up_to_entropy(labels: torch.Tensor) -> tuple[float, float]:
    return negative_entropy(labels), 0


def chance(labels: torch.Tensor) -> float:
    return shares(labels).square().sum().item()


def ncti_of_one_class(labels: torch.Tensor) -> list[float]:
    return [0, 1, math.log(len(labels)) / 2]


def ncti_of_constants(labels: torch.Tensor) -> list[float]:
    roots = (shares(labels) * len(labels)).sqrt().sum()
    return [0, chance(labels), (roots * shares(labels).norm()).log().item()]


def case(name: str, options: Mapping[str, Any], function: Callable[..., Any], metric: Any, **what: Any) -> Case:
    return Case(name, partial(function, **options), partial(metric, **options), **what)


SAME = {"order": 1e-9, "names": 1e-9}
TWICE = SAME | {"twice": 1e-9}
UNDEFINED = {"one_class": 0, "constant": 0}
H_SCORE = UNDEFINED | {"minimum": 2, "bounds": up_to_classes, "constant_warns": "features are constant"}
GBC = {"minimum": 2, "bounds": up_to_overlap, "one_class": 0, "constant": all_overlap}
PARC = UNDEFINED | {"bounds": (-100, 100), "constant_warns": "same distance"}
PARC_STAYS = SAME | {"scale": 1e-6, "extreme scale": 1e-6, "constant feature": 1e-8}
NEIGHBOURS = {"invariant": {"order": 1e-12, "names": 1e-12}, "one_class": 1, "constant_warns": "features are constant"}
LEEP = {"kind": "probabilities", "invariant": TWICE | {"channels": 1e-9}, "bounds": (-torch.inf, 0), "one_class": 0}

CCFV = {"n": 12, "grid": (6, 5), "minimum": 2, "constant": 0, "constant_warns": "all cases have equal features"}

CASES = [
    case(
        *("h_score", {}, metrics.compute_h_score, metrics.HScore),
        vectors=[("hscore", CLS, {"abs": 1e-10})],
        invariant=TWICE | {"affine": 1e-8, "scale": 1e-9, "constant feature": 1e-9, "features twice": 1e-9},
        **H_SCORE,
    ),
    case(
        *("h_score_shrunk", {"shrinkage": "ledoit_wolf"}, metrics.compute_h_score, metrics.HScore),
        vectors=[("hscore_reg", CLS, {"abs": 1e-10})],
        invariant=SAME | {"rotation and shift": 1e-9, "scale": 1e-9},
        **H_SCORE,
    ),
    case(
        *("h_score_map", {}, metrics.compute_h_score_map, metrics.HScoreMap),
        n=12,
        grid=(4, 3),
        invariant=TWICE | {"affine": 1e-8, "scale": 1e-9},
        **UNDEFINED | {"bounds": up_to_classes},
    ),
    case(
        *("logme", {}, metrics.compute_logme, metrics.LogME),
        vectors=[(key, CLS, {"abs": 1e-5}) for key in ("logme", "indep_logme")],  # which stop a little early
        invariant=SAME | {"scale": 1e-7, "rotation": 1e-9, "features of zeros": 1e-9},
    ),
    case(
        *("gbc", {}, metrics.compute_gbc, metrics.GBC),
        vectors=[("gbc_spherical_fulllogdet", CLS, {"abs": 1e-11})],
        invariant=TWICE | {"rotation and shift": 1e-9, "reflection": 1e-9, "scale up": 1e-9},
        **GBC,
    ),
    case(
        *("gbc_diagonal", {"covariance": "diagonal"}, metrics.compute_gbc, metrics.GBC),
        vectors=[("gbc_diagonal", CLS, {"abs": 1e-11})],
        invariant=TWICE | {"shift": 1e-9, "reflection": 1e-9, "scale up": 1e-9},
        **GBC,
    ),
    case(
        *("transrate", {}, metrics.compute_transrate, metrics.TransRate),
        minimum=2,
        vectors=[("transrate_tllib", CLS, {"abs": 1e-9})],
        invariant=TWICE | {"rotation and shift": 1e-9, "constant feature": 1e-9},
        **UNDEFINED | {"constant_warns": "features are constant"},
    ),
    case(
        *("sfda", {}, metrics.compute_sfda, metrics.SFDA),
        minimum=2,
        vectors=[("sfda", CLS, {"abs": 1e-10})],
        invariant=TWICE | {"shift": 1e-9, "reflection": 1e-9},
        bounds=(0, 1),
        one_class=1,
        constant=chance,
    ),
    case(
        *("parc", {}, metrics.compute_parc, metrics.PARC),
        invariant=PARC_STAYS | {"large shift": 1e-6},
        **PARC,
    ),
    case(
        *("parc_of_features", {"n_components": None}, metrics.compute_parc, metrics.PARC),
        vectors=[("parc_nopca", ("cls_basic", "cls_binary"), {"abs": 1e-6})],
        invariant=PARC_STAYS | {"each feature": 1e-9},
        **PARC,
    ),
    case(
        *("ncti", {}, metrics.compute_ncti, metrics.NCTI),
        vectors=[(("ncti_seli", "ncti_ncc", "ncti_vc"), ("cls_basic", "cls_binary"), {"rel": 1e-6})],
        invariant={"order": 1e-7, "names": 1e-7, "rotation and shift": 1e-7, "large shift": 1e-7},
        bounds=(0, torch.inf),
        one_class=ncti_of_one_class,
        constant=ncti_of_constants,
        constant_warns="features are constant",
    ),
    case(
        *("nleep", {}, metrics.compute_nleep, metrics.NLEEP),
        vectors=[("nleep_google", CLS, {"rel": 0.05})],  # one spherical mixture, against our mean of ten diagonal ones
        n=36,
        bounds=up_to_entropy,
        one_class=0,
        constant=negative_entropy,
        constant_warns="features are constant",
    ),
    case(
        *("label_prediction", {}, metrics.compute_label_prediction, metrics.LabelPrediction),
        vectors=[("lp_nca", ("cls_basic", "cls_binary"), {"abs": 0.02})],
        bounds=(0.2, 1),
        **NEIGHBOURS,
    ),
    case(
        *("lp_of_others", {"leave_one_out": True}, metrics.compute_label_prediction, metrics.LabelPrediction),
        bounds=(0, 1),
        **NEIGHBOURS,
    ),
    case(
        *("otce", {"solver": "emd"}, otce_from_a_source, otce),
        invariant=TWICE,
        bounds=up_to_entropy,
        one_class=0,
        constant=negative_entropy,
    ),
    case(
        *("otce_auto", {"epsilon": 1.0}, otce_from_a_source, otce),
        invariant=TWICE,
        bounds=(-torch.inf, 0),
        one_class=0,
    ),
    case(
        *("otce_drawn", {"solver": "emd", "n_samples": 25, "repeats": 3, "seed": 2}, otce_from_a_source, otce),
        bounds=(-torch.inf, 0),
        one_class=0,
    ),
    case("ccfv", {}, ccfv_of_images, ccfv, invariant=SAME | {"rotation and shift": 1e-9}, **CCFV),
    case("leep", {}, metrics.compute_leep, metrics.LEEP, vectors=[("leep", CLS, {"abs": 1e-12})], **LEEP),
    *(
        case(f"leep_map{options}", options, metrics.compute_leep_map, metrics.LEEPMap, n=12, grid=(6, 7), **LEEP)
        for options in ({}, {"stride": 4}, {"estimator": "global", "stride": 4})
    ),
    case(
        *("leep_map_smoothed", {"stride": 3, "smoothing": 2.5}, metrics.compute_leep_map, metrics.LEEPMap),
        n=12,
        grid=(6, 7),
        **LEEP | {"invariant": SAME | {"channels": 1e-9}},
    ),
    case(
        *("leep_image_maps", {}, metrics.compute_leep_image_maps, metrics.LEEPImageMaps),
        n=12,
        grid=(4, 3),
        per_sample=True,
        **LEEP,
    ),
    case(
        *("nce", {}, metrics.compute_nce, metrics.NCE),
        kind="classes",
        vectors=[("nce", CLS, {"abs": 1e-12})],
        invariant=TWICE,
        bounds=up_to_entropy,
        one_class=0,
    ),
]
OF_FEATURES = [case for case in CASES if case.kind == "features"]
