r"""Feature update (FU): ratio of the gradients in the second and the first convolution of the source network.

Juodelyte et al. (*On dataset transferability in medical image classification*, arXiv 2412.20172) compute the gradient
of a loss of the target's labels with respect to the source network's early layers. The loss needs no classifier. It is
a mean over triplets in a batch: an anchor a, a positive p of the same class, and a negative n of another class. With
the penultimate features f scaled to unit length,

.. math::
    L = \underset{(a, p, n):\, \cdot > 0}{\mathrm{mean}} \big( \|f_a - f_p\| - \|f_a - f_n\| + 0.05 \big), \qquad
    \mathrm{FU} = \textstyle\sum_B \| \partial L_B / \partial W_2 \|\, \big/ \sum_B \| \partial L_B / \partial W_1 \|

where W_1 and W_2 are the weights of the network's first two convolutions, and B are the batches, about six.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.utils import CommonKeys
from torch import nn
from torch.func import functional_call

from medtl_ext._validation import InputError, as_plain_tensor, check_labels, require_choice, require_number, warn
from medtl_ext.metrics.base import TransferMetric, read_output
from medtl_ext.metrics.features import tap_features

MARGIN = 0.05
N_BATCHES = 6

# A batch of fewer images has no triplet.
LEAST_BATCH = 3

# A smaller gradient of the first convolution counts as zero.
LEAST_GRADIENT = 1e-12

# Anchors per block in which triplets are counted.
ANCHORS = 1024


def compute_feature_update(
    network: nn.Module,
    images: Any,
    labels: Any,
    *,
    batch_size: int | None = None,
    layer: str | None = None,
    convolutions: Sequence[str] | None = None,
) -> torch.Tensor:
    """FU: gradient norm of the network's second convolution divided by that of its first, on the target's images.

    The network runs in eval mode, on its own device and in its own dtype. Afterwards it is as before: training flags,
    ``requires_grad``, ``.grad`` and buffers.

    Args:
        network: a source network whose first two convolutions and penultimate features are used.
        images: N x channels x *spatial, in random order (a batch with one class only has no triplet); or an iterable of
            such batches.
        labels: N class indices 0, 1, 2, ..., one for each image; or an iterable of batches of them.
        batch_size: images per batch, 3 or more. None makes six batches. Leave it out if ``images`` comes in batches.
            The value depends on the division into batches.
        layer: name of the module (as in ``network.named_modules()``) whose output is the features; a grid is averaged.
            None takes the input of the last linear (or convolution) layer.
        convolutions: names of the two modules whose weights are compared. None takes the first two convolutions that
            run.

    Returns:
        The ratio, a float64 scalar >= 0 on the network's device; higher predicts better transfer (see `combine_lp_fu`).
        NaN with a `UserWarning` if the mean gradient norm of the first convolution is below 1e-12. Causes: one class
        only, no triplet in any batch, dead or saturated units.

    Raises:
        InputError: fewer than two convolutions, an unknown layer, features that do not depend on a convolution, NaN or
            Inf in images or features, or labels that do not fit the images.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 25, 2)
        ... )
        >>> bool(compute_feature_update(network, torch.rand(24, 1, 9, 9), torch.arange(24) % 2) > 0)
        True

    Reference: Juodelyte et al., arXiv 2412.20172, as in the authors' code: norms are averaged over the batches before
    the division, and distances are Euclidean, not squared.
    """
    metric = FeatureUpdate(network, layer=layer, convolutions=convolutions)
    for batch in _batches(images, labels, batch_size):
        metric.update(*batch)
    return metric._evaluate(metric._sums)


class FeatureUpdate(TransferMetric):
    """`compute_feature_update` over batches: ``compute()`` returns a float64 scalar >= 0, higher is better.

    Unlike the other metrics it runs the network itself, with gradients. Its value depends on the batches, because
    triplets are formed within a batch: give it about six batches, with the images in random order. Attached to a MONAI
    evaluator it reads `image` and `label` from ``engine.state.output``, and runs the network a second time::

        "additional_metrics": {"fu": {"_target_": "medtl_ext.metrics.FeatureUpdate", "network": "@network"}}

    Memory: two sums, and the graph of one batch. Merged metrics and several processes add up.

    Args:
        network, layer, convolutions: as in `compute_feature_update`.
        output_transform: see `TransferMetric`.

    >>> network = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 5, 2))
    >>> images, labels = torch.rand(12, 1, 9), torch.arange(12) % 2
    >>> metric = FeatureUpdate(network)
    >>> metric.update(images[:6], labels[:6])
    >>> metric.update(images[6:], labels[6:])
    >>> torch.isclose(metric.compute(), compute_feature_update(network, images, labels, batch_size=6)).item()
    True
    """

    inputs = ("images", "labels")

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: str | None = None,
        convolutions: Sequence[str] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        # The hooks of DistributedDataParallel do not work with torch.autograd.grad.
        wrapped = isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        self.network = network.module if wrapped else network
        if convolutions is not None:
            _require_weights(convolutions, dict(self.network.named_modules()))
        if next(self.network.parameters(), None) is None:
            raise InputError(f"network, a {type(self.network).__name__}, has no parameters; expected a source network.")
        self.layer, self.convolutions = layer, convolutions
        super().__init__(output_transform=output_transform)

    @staticmethod
    def default_output_transform(output: Any) -> tuple[Any, Any]:
        """`image` and `label` of a MONAI engine's output."""
        return tuple(read_output(output, CommonKeys.IMAGE, CommonKeys.LABEL))

    def update(self, images: Any, labels: Any) -> None:
        """Add one batch: N x channels x *spatial images and N class indices."""
        images, labels = as_plain_tensor("images", images), _image_labels(labels)
        if images.numel() == 0 or images.ndim < 2 or not bool(torch.isfinite(images).all()):
            raise InputError("images is empty, has no batch axis, or holds NaN or Inf; look for a broken image.")
        _require_one_each(len(images), labels)
        parameter = next(self.network.parameters())
        # A copy, because images may be inference tensors, and the first layer may work in place.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(parameter.device.type, enabled=False):
            images = images.to(parameter.device, parameter.dtype, copy=True)
            norms = self._gradient_norms(images, labels.to(parameter.device))
        self._add(gradient=norms, batches=norms.new_ones(1))

    def _gradient_norms(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The norms of the gradients of the two weights, float64."""
        with _eval_mode(self.network):
            if self.convolutions is None:
                self.convolutions = _first_convolutions(self.network, images)
            modules = dict(self.network.named_modules())
            # Copies that require gradients, because the network's own weights may be frozen.
            weights = [modules[name].weight.detach().requires_grad_() for name in self.convolutions]
            named = {f"{name}.weight": weight for name, weight in zip(self.convolutions, weights, strict=True)}
            with tap_features(self.network, [self.layer]) as tapped:
                functional_call(self.network, named, (images,))
                features = _one_output(tapped[self.layer], len(images))
                loss = triplet_margin_loss(features, labels)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None]
        if any(gradient is None for gradient in gradients):
            advice = f"({', '.join(self.convolutions)}); set convolutions to an earlier pair, or layer to a later one"
            raise InputError(f"features of {self.layer or 'penultimate'} do not depend on both convolutions {advice}.")
        return torch.stack([gradient.double().norm() for gradient in gradients])

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        first, second = sums["gradient"]
        if bool(first < LEAST_GRADIENT * sums["batches"]):
            what = f"the first convolution gets no gradient (norm {float(first / sums['batches']):.1e}), so FU is NaN"
            warn(f"{what}: look for one class only, images sorted by label, or dead units in the network.")
            return torch.full_like(first, math.nan)
        return second / first


def triplet_margin_loss(features: torch.Tensor, labels: torch.Tensor, *, margin: float = MARGIN) -> torch.Tensor:
    """Mean of ``|f_a - f_p| - |f_a - f_n| + margin`` over all triplets for which it is positive; 0 if there is none.

    The distance of a pair enters once for each such triplet that contains the pair. Sorting finds these numbers in
    N log N steps per anchor, although an anchor has up to N^2 / 4 triplets. Memory: the N x N distances.

    Args:
        features: N x D; they are scaled to unit length.
        labels: N class indices.
        margin: how much farther away a negative should be than a positive.

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]])
    >>> triplet_margin_loss(features, torch.tensor([0, 0, 1]))
    tensor(0.7557, dtype=torch.float64)
    """
    unit = nn.functional.normalize(features.double(), dim=1)
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    anchors = torch.arange(len(labels), device=labels.device).split(ANCHORS)
    blocks = zip(distance.detach().split(ANCHORS), anchors, strict=True)
    weight = torch.cat([_pair_weights(block, labels, block_anchors, margin) for block, block_anchors in blocks])
    n_triplets = weight.clamp(min=0).sum()
    total = (weight * distance).sum() + margin * n_triplets
    return total / n_triplets.clamp(min=1)


def _pair_weights(distance: torch.Tensor, labels: torch.Tensor, anchors: torch.Tensor, margin: float) -> torch.Tensor:
    """Number of triplets with positive loss that contain each pair: > 0 as a positive, < 0 as a negative."""
    negative = labels[anchors, None] != labels
    positive = (~negative).scatter_(1, anchors[:, None], False)
    reach = distance + margin
    negatives = distance.masked_fill(~negative, math.inf).sort(1).values
    positives = reach.masked_fill(~positive, math.inf).sort(1).values
    n_nearer = torch.searchsorted(negatives, reach)
    n_reaching = positive.sum(1, keepdim=True) - torch.searchsorted(positives, distance, right=True)
    return (n_nearer * positive - n_reaching * negative).double()


def _batches(images: Any, labels: Any, batch_size: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    labels = _image_labels(labels)
    if isinstance(images, (torch.Tensor, np.ndarray)):
        images = as_plain_tensor("images", images)
        _require_one_each(len(images), labels)
        size = max(LEAST_BATCH, -(-len(images) // N_BATCHES)) if batch_size is None else batch_size
        images = images.split(require_number("batch_size", size, LEAST_BATCH, whole=True))
    elif batch_size is not None:
        raise InputError("batch_size is given, but images comes in batches; leave batch_size out, or give one tensor.")
    start = 0
    for batch in images:
        yield batch, labels[start : start + len(batch)]
        start += len(batch)
    _require_one_each(start, labels)


def _image_labels(labels: Any) -> torch.Tensor:
    """N labels, from one tensor or from batches of them."""
    parts = [labels] if hasattr(labels, "shape") else list(labels) or [[]]
    return torch.cat([check_labels("labels", part).flatten() for part in parts])


def _require_one_each(n_images: int, labels: torch.Tensor) -> None:
    if n_images != len(labels):
        raise InputError(f"labels holds {len(labels)} labels for {n_images} images; expected one for each.")


def _require_weights(convolutions: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    if isinstance(convolutions, str) or len(convolutions) != 2 or len(set(convolutions)) != 2:
        raise InputError(f"convolutions is {convolutions!r}; expected the names of two modules of the network.")
    for name in convolutions:
        module = modules[require_choice("convolutions", name, modules)]
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise InputError(f"convolutions names {name}, which has no weight; expected two convolution layers.")


def _first_convolutions(network: nn.Module, images: torch.Tensor) -> tuple[str, str]:
    """Names of the first two convolutions that run."""
    layers = [name for name, module in network.named_modules() if name and isinstance(module, nn.modules.conv._ConvNd)]
    with torch.no_grad(), tap_features(network, layers) as tapped:
        network(images[:1])
    names = list(tapped)
    if len(names) < 2:
        raise InputError(f"network ran {len(names)} convolution(s); name two modules: convolutions=(first, second).")
    return names[0], names[1]


def _one_output(outputs: Sequence[torch.Tensor], n_images: int) -> torch.Tensor:
    if len(outputs) != 1 or outputs[0].ndim < 2 or len(outputs[0]) != n_images:
        expected = "expected one, with a vector or a grid of vectors for each image; set layer to another one"
        raise InputError(f"the layer of the features gave {len(outputs)} outputs for {n_images} images; {expected}.")
    features = outputs[0] if outputs[0].ndim == 2 else outputs[0].flatten(2).mean(2)
    if not bool(torch.isfinite(features).all()):
        raise InputError("features of the network hold NaN or Inf; look for broken weights or a float16 overflow.")
    return features


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and restore the mode of each one at the end."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
