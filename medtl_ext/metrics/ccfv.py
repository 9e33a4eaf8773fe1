r"""CC-FV, class consistency with feature variety, over several layers of a segmentation network.

CC-FV (Yang et al., *Pick the best pre-trained model: Towards transferability estimation for medical image
segmentation*, MICCAI 2023) needs no source data. It measures two properties of the features that a source network
computes from the target's cases. Consistency: a class should look alike in all cases, so the distance W between the
Gaussians of one class in two cases should be small. Variety: the cases should differ, so the energy E of their features
should be small:

.. math::
    W(i, j)^2 = \lVert m_i - m_j \rVert^2 + \mathrm{tr}\,A_i + \mathrm{tr}\,A_j
        - 2\, \mathrm{tr}\, (A_i^{1/2} A_j A_i^{1/2})^{1/2}, \qquad
    E = \mathrm{mean}_{i < j}\, (\lVert f_i - f_j \rVert^2 + \mathrm{eps})^{-1/2}, \qquad
    \mathrm{CCFV} = \sum_{\mathrm{layers}} \ln \frac{1 / E}{\mathrm{mean}\, W}

with m and A the mean and covariance of a foreground class in a case, and f the mean of all features of a case.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any
from uuid import uuid4

import torch
from ignite.engine import Engine

from medtl_ext._validation import InputError, require_number, warn
from medtl_ext.metrics.base import TransferMetric
from medtl_ext.metrics.features import SampleMetric, TappedInferer, check_features

# One case's features in one layer, n x D in float64, and its labels.
Case = tuple[torch.Tensor, torch.Tensor]

# Elements per stack of matrices for the singular values.
BLOCK = 2**24


def compute_ccfv(
    features: Sequence[Sequence[Any]],
    target_labels: Sequence[Sequence[Any]],
    *,
    include_background: bool = False,
    eps: float = 1e-3,
    ignore_index: int | None = None,
) -> torch.Tensor:
    """CC-FV of a source network's features of several target cases (patients), in one layer or more.

    The public code draws about the same number of voxels per class. Do the same (an attached `CCFV` does); otherwise
    the background dominates the mean of a case.

    Args:
        features: ``features[layer][case]``, n x D or n x D x *spatial (n slices, or one volume). D may differ between
            layers; n and the grid may differ between cases. Cases without foreground are allowed.
        target_labels: ``target_labels[layer][case]``, n or n x *spatial class indices, 0 for background.
        include_background: also compare class 0 between cases. The variety always includes it.
        eps: softens the energy, in units of squared feature distance. With ``eps=0`` the score does not depend on the
            scale of the features.
        ignore_index: voxels with this label are left out.

    Returns:
        The score, a float64 scalar, positive or negative; higher predicts better transfer. A class counts in a case
        with two or more of its voxels. All classes that two cases share have equal weight. A layer in which no class is
        shared, or all cases are equal (constant features), counts 0 with a `UserWarning`. There is also a `UserWarning`
        for one class only, and if ``eps`` is large compared with the distances between cases.

    Raises:
        InputError: invalid input; the message names argument, layer and case. Also fewer than two cases.

    Example:
        >>> ann = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 2.0]])
        >>> bob = torch.tensor([[0.0, 1.0], [1.0, 2.0], [4.0, 3.0]])
        >>> compute_ccfv([[ann, bob]], [[[0, 1, 1], [0, 1, 1]]])
        tensor(-0.3081, dtype=torch.float64)

    Reference: Yang et al., MICCAI 2023, section 2, and the authors' public code. Differences from that code: distances
    are averaged over pairs and classes (the code adds a mean to the running sum); the numerator is the inverse energy,
    as in the paper (in the code, the energy); covariances may be singular (in the code the matrix root becomes
    complex); labels are resampled to the features' grid (in the code, features to the labels' grid). As in the code,
    the energy is that of the cases' mean features; the paper's text takes the features of one case's voxels, on the
    unit sphere.
    """
    metric = CCFV(include_background=include_background, eps=eps)
    layers = _checked_layers(features, target_labels, ignore_index)
    return torch.stack([metric._layer_score(cases) for cases in layers]).sum()


class CCFV(TransferMetric):
    """`compute_ccfv` over batches: ``compute()`` returns a float64 scalar, higher is better.

    In a bundle's JSON it reads the layers while the evaluator's network runs, and the cases from `subject`::

        "additional_metrics": {"ccfv": {"_target_": "medtl_ext.metrics.CCFV", "layers": ["upcat_2", "upcat_1"]}}

    Labels are resampled to each layer's grid by nearest neighbour. Memory: the samples of every layer. If the layers
    have a grid, these are 400 voxels per class and case, unless ``pixels`` is set. See `TransferMetric` for merging and
    distributed runs, and `FeatureMetric` for reading layers.

    Args:
        layers: names of the network's modules, or one name. None takes the penultimate features.
        include_background, eps: as in `compute_ccfv`.
        output_transform: turns ``engine.state.output`` into the arguments of `update`. Then no layer is read.
        options: pixels, body, seed, ignore_index, see `FeatureMetric`.

    >>> metric = CCFV()
    >>> metric.update(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), ["ann", "ann"])
    >>> metric.update(torch.tensor([[3.0, 2.0], [0.0, 1.0]]), torch.tensor([1, 0]), ["ann", "bob"])
    >>> metric.update(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([1, 1]), ["bob", "bob"])
    >>> metric.compute()
    tensor(-0.3081, dtype=torch.float64)
    """

    inputs = ("features", "target_labels")

    def __init__(
        self,
        *,
        layers: Sequence[str | None] | str | None = None,
        include_background: bool = False,
        eps: float = 1e-3,
        output_transform: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        names = [layers] if layers is None or isinstance(layers, str) else list(layers)
        if not names or len(set(names)) < len(names):
            raise InputError(f"layers is {layers!r}; expected one or more different names of layers.")
        self._layers = [_LayerSamples(layer=name, **options) for name in names]
        self.include_background = include_background
        self.eps = require_number("eps", eps, 0)
        self._tapped = output_transform is None
        super().__init__(output_transform=output_transform)

    def update(self, features: Any, target_labels: Any, groups: Sequence[Hashable] | None = None) -> None:
        """Add a batch.

        Args:
            features: a list of tensors N x D (x *spatial), one per layer. For one layer, the tensor itself.
            target_labels: N (x *spatial) class indices, or a list of such tensors if the layers' grids differ.
            groups: the case (patient) of each of the N images. None makes each image a case.
        """
        features = list(features) if isinstance(features, (list, tuple)) else [features]
        listed = isinstance(target_labels, (list, tuple)) and not isinstance(target_labels[0], (int, float))
        labels = list(target_labels) if listed else [target_labels] * len(features)
        if not len(features) == len(labels) == len(self._layers):
            raise InputError(
                f"features lists {len(features)} layers, target_labels {len(labels)}; expected {len(self._layers)}."
            )
        # All layers take the batch, or none does.
        parts = [_LayerSamples(pixels=None, ignore_index=layer.ignore_index) for layer in self._layers]
        for part, *batch in zip(parts, features, labels, strict=True):
            part.update(*batch, groups)
        self._extend(parts)

    def reset(self) -> None:
        super().reset()
        for layer in self._layers:
            layer.reset()

    def merge(self, other: TransferMetric) -> None:
        super().merge(other)
        if len(other._layers) != len(self._layers):
            raise InputError(f"other has {len(other._layers)} layers; expected {len(self._layers)} to merge with.")
        self._extend(other._layers)

    def _extend(self, parts: Sequence[_LayerSamples]) -> None:
        for layer, part in zip(self._layers, parts, strict=True):
            layer._samples.require_width(part._samples.width)
        for layer, part in zip(self._layers, parts, strict=True):
            layer.merge(part)

    def compute(self) -> torch.Tensor:
        """Return the value over everything seen by all processes. Further updates are possible afterwards."""
        return torch.stack([self._layer_score(layer.cases()) for layer in self._layers]).sum()

    def attach(self, engine: Engine, name: str, *args: Any, **kwargs: Any) -> None:
        """Attach to an engine (MONAI's evaluators call this), and read its network's layers from then on."""
        super().attach(engine, name, *args, **kwargs)
        for layer in self._layers if self._tapped else ():
            TappedInferer.tap(engine, layer.layer)

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Update from the layers' outputs and the engine's current output."""
        if not self._tapped:
            self.update(*self._output_transform(engine.state.output))
            return
        for layer in self._layers:
            layer.iteration_completed(engine)

    def _layer_score(self, cases: Sequence[Case]) -> torch.Tensor:
        """ln(variety / consistency) of one layer, or 0 if the ratio is undefined."""
        if len(cases) < 2:
            raise InputError(f"features holds {len(cases)} case(s); CC-FV compares cases and needs two or more.")
        if len(torch.cat([labels for _, labels in cases]).unique()) == 1:
            warn("target_labels holds one class only, so CC-FV compares whole cases and says nothing about transfer.")
        variety = self._variety(cases)
        consistency = _consistency(cases, self.include_background)
        if variety > 0 and consistency > 0:
            return torch.log(variety / consistency)
        what = "no two cases share a class of two voxels or more, or all cases have equal features"
        warn(f"{what}: the layer counts 0 in CC-FV, which says nothing about transfer.")
        return torch.zeros_like(variety)

    def _variety(self, cases: Sequence[Case]) -> torch.Tensor:
        """The inverse energy of the cases' mean features."""
        squares = torch.pdist(torch.stack([features.mean(0) for features, _ in cases])).square()
        if self.eps > squares.mean():
            what = f"the mean squared distance between cases is {float(squares.mean()):.1e}, eps {self.eps:g}"
            warn(f"{what}: the variety in CC-FV hardly depends on the features; give eps=0 or scale the features up.")
        return 1 / (squares + self.eps).rsqrt().mean()


class _LayerSamples(SampleMetric):
    """The samples of one layer, with their cases."""

    def _take(self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence[Hashable] | None) -> None:
        if groups is None:
            if features.ndim < 3:
                raise InputError("groups is missing; CC-FV compares cases: name the patients (`subject` in a batch).")
            # Random names, so that images of two merged metrics stay different cases.
            groups = [uuid4().hex for _ in features]
        super()._take(features, labels, groups)

    def cases(self) -> list[Case]:
        features, labels, groups, _ = self.samples()
        # In order of appearance, so that the names do not influence the value.
        return [(features[groups == group], labels[groups == group]) for group in dict.fromkeys(groups.tolist())]


def _checked_layers(features: Any, target_labels: Any, ignore_index: int | None) -> list[list[Case]]:
    for name, side in (("features", features), ("target_labels", target_labels)):
        if not (isinstance(side, (list, tuple)) and side and all(isinstance(cases, (list, tuple)) for cases in side)):
            raise InputError(f"{name} is not a list of lists; expected {name}[layer][case].")
    found, expected = ([len(cases) for cases in side] for side in (target_labels, features))
    if found != expected:
        raise InputError(f"target_labels lists {found} cases in its layers, features {expected}; expected the same.")
    layers = []
    for index, layer in enumerate(zip(features, target_labels, strict=True)):
        cases = []
        for number, case in enumerate(zip(*layer, strict=True)):
            try:
                cases.append(check_features(*case, ignore_index=ignore_index))
            except InputError as error:
                raise InputError(f"layer {index}, case {number}: {error}") from None
        if len({rows.shape[1] for rows, _ in cases}) > 1:
            raise InputError(f"features has several numbers of channels in layer {index}; expected the same for all.")
        layers.append(cases)
    return layers


def _consistency(cases: Sequence[Case], include_background: bool) -> torch.Tensor:
    """Mean over the classes of the mean distance between two cases' Gaussians; 0 if no class has two cases."""
    members: dict[int, list[torch.Tensor]] = {}
    for features, labels in cases:
        for label, count in enumerate(labels.bincount().tolist()):
            if count > 1 and (label > 0 or include_background):
                members.setdefault(label, []).append(features[labels == label])
    means = [_pairwise_wasserstein(parts).mean() for _, parts in sorted(members.items()) if len(parts) > 1]
    return torch.stack(means).mean() if means else cases[0][0].new_zeros(())


def _pairwise_wasserstein(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """2-Wasserstein distances between the Gaussians of all pairs of K samples, n x D each: K (K - 1) / 2."""
    means = torch.stack([part.mean(0) for part in parts])
    covariances = torch.stack([part.T.cov().view(len(means[0]), -1) for part in parts])
    values, vectors = torch.linalg.eigh(covariances)
    roots = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    traces, magnitudes = covariances.diagonal(dim1=1, dim2=2).sum(1), means.square().sum(1)
    distances = []
    pairs = torch.tensor(list(combinations(range(len(parts)), 2)), device=means.device)
    for first, second in (block.T for block in pairs.split(max(1, BLOCK // roots[0].numel()))):
        # Singular values of A^1/2 B^1/2: square roots of the eigenvalues of A^1/2 B A^1/2, but more accurate.
        overlap = torch.linalg.svdvals(roots[first] @ roots[second]).sum(1)
        total = traces[first] + traces[second]
        squared = (means[first] - means[second]).square().sum(1) + total - 2 * overlap
        rounding = 1e-14 * total + 1e-28 * (magnitudes[first] + magnitudes[second])
        distances.append(torch.where(squared > rounding, squared, 0).sqrt())
    return torch.cat(distances)
