"""Risk-weighted fine-tuning: pixel weights from a LEEP map, weights of baselines, and the weighted loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data import MetaTensor
from torch import nn

from medtl_ext._validation import IGNORED, InputError, as_plain_tensor, check_labels, require_choice, require_number

# Relative differences of LEEP below this are rounding errors.
FLAT = 1e-9


def risk_map(
    leep_map: torch.Tensor | Sequence[torch.Tensor],
    *,
    base: float = 10.0,
    direction: str = "hardness",
    clip: tuple[float, float] | None = None,
    size: Sequence[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel weights from 1 to ``base`` that grow with the difficulty of the transfer at a pixel.

    Let t be the LEEP map. Then h = (max t - t) / (max t - min t), and the weight is ``base ** h``. Maps per image
    (N x *spatial, or a list) share the same minimum and maximum, so that difficult images get larger weights than easy
    ones.

    Args:
        leep_map: LEEP values of any shape (see `medtl_ext.metrics.LEEPMap` and `LEEPImageMaps`), or a list of maps.
        base: the largest weight, 1 or more.
        direction: "hardness" gives the pixels of lowest LEEP the weight ``base``, as in the paper's text and figures.
            "literal" is its eq. 5 as printed, with (t - min t): it gives the *easy* pixels the large weights.
        clip: percentiles (low, high), such as (1, 99), at which LEEP is clipped before scaling. Without clipping, one
            outlier sets the scale and can push all other weights close to 1.
        size: spatial size of the result, such as (240, 240): the cells of a map with stride are repeated.

    Returns:
        Weights in [1, base], float64, of the map's shape (or ``size``). They are 1 in NaN cells (without valid pixel),
        and everywhere if the map is constant.

    Raises:
        InputError: Inf in the map, an empty map, or a setting out of range.

    Example:
        >>> risk_map(torch.tensor([0.0, -0.5, -1.0, float("nan")]))
        tensor([ 1.0000,  3.1623, 10.0000,  1.0000], dtype=torch.float64)

    Reference: Duan et al., *Transfer Risk Map*, eq. 5.
    """
    require_choice("direction", direction, ["hardness", "literal"])
    require_number("base", base, 1)
    one_tensor = not isinstance(leep_map, (list, tuple))
    maps = [_checked_map(one_map) for one_map in ([leep_map] if one_tensor else leep_map)]
    low, high = _range(maps, (0, 100) if clip is None else clip)
    easiest, hardest = (high, low) if direction == "hardness" else (low, high)
    weights = []
    for one_map in maps:
        hardness = torch.zeros_like(one_map)
        if high - low > FLAT * max(1, abs(low)):
            hardness = (one_map.clamp(low, high) - easiest) / (hardest - easiest)
        weight = (base**hardness).nan_to_num(nan=1.0)
        weights.append(weight if size is None else repeat_cells(weight, size))
    return weights[0] if one_tensor else weights


def trs_map(leep_map: torch.Tensor, *, size: Sequence[int] | None = None) -> torch.Tensor:
    """Pixel weights ``exp(-LEEP)``, the "Trs map" baseline.

    Args:
        leep_map: LEEP values of any shape; the paper takes `LEEPMap` with ``stride=4``.
        size: spatial size of the result, such as (240, 240): the cells of a map with stride are repeated.

    Returns:
        Weights of 1 or more, float64, of the map's shape (or ``size``); 1 in NaN cells.

    Raises:
        InputError: Inf in the map, an empty map, or a size that does not fit the map with any stride.

    Example:
        >>> trs_map(torch.tensor([[0.0, -0.5]]), size=(2, 4))
        tensor([[1.0000, 1.0000, 1.6487, 1.6487],
                [1.0000, 1.0000, 1.6487, 1.6487]], dtype=torch.float64)

    Reference: Tan et al., *Efficient prediction of model transferability in semantic segmentation tasks*, ICIP 2023.
    """
    weight = (-_checked_map(leep_map)).exp().nan_to_num(nan=1.0)
    return weight if size is None else repeat_cells(weight, size)


def frequency_map(target_labels: Any, *, base: float = 10.0, ignore_index: int | None = None) -> torch.Tensor:
    """Pixel weights ``base ** f``, where f is the share of images with foreground at the pixel: a control without
    source.

    The correlation of a risk map with f is above 0.9. Only its gain over this map is due to the source model.

    Args:
        target_labels: N x *spatial or N x 1 x *spatial class indices (0 is background), or an iterable of N label maps.
        base: the weight of a pixel that is foreground in every image, 1 or more.
        ignore_index: pixels with this label are left out. A pixel that is ignored in all images gets weight 1.

    Returns:
        Weights in [1, base], float64, *spatial.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> frequency_map(torch.tensor([[[0, 1, 2]], [[0, 0, 1]]]))
        tensor([[ 1.0000,  3.1623, 10.0000]], dtype=torch.float64)
    """
    require_number("base", base, 1)
    counts = None
    for labels in _label_maps(target_labels, ignore_index):
        seen = torch.stack([labels > 0, labels != IGNORED]).double()
        if counts is not None and seen.shape != counts.shape:
            shapes = f"{tuple(counts.shape[1:])} and {tuple(labels.shape)}"
            raise InputError(f"target_labels holds maps of shape {shapes}; expected one grid for all images.")
        counts = seen if counts is None else counts + seen
    if counts is None:
        raise InputError("target_labels is empty; expected at least one label map.")
    foreground, valid = counts
    return base ** (foreground / valid.clamp(min=1))


def prior_image_maps(target_labels: torch.Tensor, *, base: float = 10.0) -> torch.Tensor:
    """Pixel weights per image from ``ln P(y)`` of each pixel's class: the control for per-image risk maps.

    It is the risk map of an uninformative source, for which ``P(y|z)`` is ``P(y)``. Rare classes get the largest
    weights. Only the gain of a per-image risk map over this map is due to the source model.

    Args:
        target_labels: N x *spatial or N x 1 x *spatial class indices (0 is background).
        base: the weight of the rarest class, 1 or more.

    Returns:
        Weights in [1, base], float64, N x *spatial.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> prior_image_maps(torch.tensor([[[0, 0, 1]], [[0, 0, 2]]])).squeeze(1)
        tensor([[ 1.,  1., 10.],
                [ 1.,  1., 10.]], dtype=torch.float64)
    """
    labels = torch.stack(list(_label_maps(target_labels, None)))
    return risk_map(log_prior(labels, n_classes=int(labels.max()) + 1).double()[labels], base=base)


def class_weights(
    target_labels: Any, *, n_classes: int, power: float = 1.0, ignore_index: int | None = None
) -> torch.Tensor:
    """Class weights proportional to ``frequency ** -power``, scaled to a mean of 1 over all pixels.

    ``power=1`` is the inverse class frequency (scikit-learn's "balanced"). ``power=0.5`` is its square root, which is
    often better for rare structures. In a bundle's JSON::

        "loss": {
            "_target_": "torch.nn.CrossEntropyLoss",
            "weight": {
                "_target_": "medtl_ext.losses.class_weights",
                "target_labels": "$(item['label'] for item in @train#dataset)",
                "n_classes": 4,
                "power": 0.5
            }
        }

    Args:
        target_labels: integer tensor of any shape, or an iterable of them, which is read once.
        n_classes: number of classes including the background.
        power: 0 or more. 0 gives all classes the weight 1.
        ignore_index: pixels with this label are left out.

    Returns:
        n_classes weights, float32 as losses need it. A class that does not occur gets weight 1, so that the loss stays
        valid if it occurs in other labels.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), n_classes=3)
        tensor([0.6667, 2.0000, 1.0000])
    """
    require_number("power", power, 0)
    counts = _class_counts(target_labels, n_classes, ignore_index)
    frequency = counts / counts.sum()
    present = counts > 0
    weights = torch.where(present, frequency**-power, 0)
    return torch.where(present, weights / (weights * frequency).sum(), 1).float()


def log_prior(target_labels: Any, *, n_classes: int, ignore_index: int | None = None) -> torch.Tensor:
    """Natural logarithm of the class frequencies, for the control that shifts the bias of a network's output.

    Subtract it from the logits of a network trained with plain cross-entropy: this removes the preference for frequent
    classes, without any map or weight.

    Args:
        target_labels: integer tensor of any shape, or an iterable of them.
        n_classes: number of classes including the background.
        ignore_index: pixels with this label are left out.

    Returns:
        n_classes values <= 0, float32. A class that does not occur counts as one pixel, so that its value is finite.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> log_prior(torch.tensor([0, 0, 0, 1]), n_classes=2)
        tensor([-0.2877, -1.3863])
    """
    counts = _class_counts(target_labels, n_classes, ignore_index)
    return (counts.clamp(min=1) / counts.sum()).log().float()


class RiskWeightedLoss(nn.Module):
    """A weighted sum of an elementwise loss over all pixels, divided by the number of foreground pixels in the batch.

    ``sum_i w_i l_i / number of foreground pixels``, with w a map shared by all images or one map per sample. A batch
    without foreground is divided by its number of pixels; otherwise its loss would be thousands of times larger than
    those of other batches. In a bundle's JSON::

        "loss": {
            "_target_": "medtl_ext.losses.RiskWeightedLoss",
            "base_loss": {"_target_": "torch.nn.CrossEntropyLoss", "reduction": "none"}
        }

    When the map is known, call ``loss.set_weight(risk_map(leep_map))`` and ``loss.to(device)``.

    The divisor makes the loss several times larger than a mean. Adam is almost independent of the scale of the loss;
    with SGD it has the effect of a larger learning rate.

    The shared map is a buffer, so ``.to(device)`` moves it. It is not part of the state dict: every run computes it
    from the frozen source, and a checkpoint fits a loss with any map or none.

    Under torch.distributed the divisor is computed over all processes. It is scaled so that the averaged gradient of
    DistributedDataParallel equals that of a single process with the whole batch.

    Args:
        base_loss: elementwise loss (``reduction="none"``) of logits N x C x *spatial. It returns N x *spatial, or
            N x K x *spatial, which is summed over K. `CrossEntropyLoss` and `NLLLoss` get targets N x *spatial (int64).
            Other losses get N x 1 x *spatial in the dtype of the logits, as MONAI's ``to_onehot_y`` losses and
            `BCEWithLogitsLoss` expect. Pixels with the loss's ``ignore_index`` are left out.
        weight: pixel weights *spatial, shared by all images. None gives all pixels weight 1 until `set_weight`.
        normalization: the divisor. "foreground": number of pixels with a label above 0, as in the paper. "mean": number
            of pixels. "weights": sum of the weights.
        region_loss: a loss that is not a sum over pixels, such as MONAI's ``DiceLoss(to_onehot_y=True, softmax=True)``.
            It is added without weights, and gets the logits and N x 1 x *spatial targets.

    Raises:
        InputError: a base loss with a reduction, negative or infinite weights, or shapes that do not fit.

    Example:
        >>> loss = RiskWeightedLoss(nn.CrossEntropyLoss(reduction="none"), torch.tensor([[1.0, 3.0]]))
        >>> loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]]]]))  # ln 2 * (1 + 3) / 1 foreground pixel
        tensor(2.7726)

    Reference: Duan et al., *Transfer Risk Map*, eq. 7.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        base_loss: nn.Module,
        weight: Any | None = None,
        *,
        normalization: str = "foreground",
        region_loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        reduction = getattr(base_loss, "reduction", "none")
        if reduction != "none":
            raise InputError(f"base_loss has reduction='{reduction}'; set reduction='none', to weight every pixel.")
        self.base_loss = base_loss
        self.region_loss = region_loss
        self.normalization = require_choice("normalization", normalization, ["foreground", "mean", "weights"])
        self.register_buffer("weight", None, persistent=False)
        if weight is not None:
            self.set_weight(weight)

    def set_weight(self, weight: Any) -> None:
        """Use these pixel weights (*spatial, finite, 0 or more) for all images from now on."""
        weight = as_plain_tensor("weight", weight).float()
        if weight.numel() == 0 or not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
            raise InputError("weight is empty, negative or not finite; expected pixel weights of 0 or more.")
        self.weight = weight.clone() if self.weight is None else weight.to(self.weight.device, copy=True)

    def forward(self, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted loss, a scalar in float32 (float64 for float64 logits).

        Args:
            input: logits, N x C x *spatial.
            target: class indices of any dtype, N x *spatial or N x 1 x *spatial.
            weight: weights of this batch, N x *spatial or N x 1 x *spatial, instead of the shared map.
        """
        logits = _plain(input)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = _without_channel("target", _plain(target), logits)
        weight = self._weight_of(weight, logits)
        with torch.autocast(logits.device.type, enabled=False):
            loss = self._pixel_loss(logits, labels)
            weighted = loss.sum() if weight is None else (loss * weight).sum()
            weighted = weighted / self._divisor(labels, weight)
            if self.region_loss is not None:
                weighted = weighted + self.region_loss(logits, labels.unsqueeze(1))
        return weighted

    def _weight_of(self, weight: Any | None, logits: torch.Tensor) -> torch.Tensor | None:
        """The weights of this batch in the dtype of the loss, to multiply N x *spatial; None without weights."""
        if weight is None and self.weight is not None:
            weight = self.weight = self.weight.to(logits.device)
        if weight is None:
            return None
        weight = _plain(weight).to(logits)
        return weight if weight.shape == logits.shape[2:] else _without_channel("weight", weight, logits)

    def _pixel_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The base loss of every pixel, N x *spatial."""
        if isinstance(self.base_loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
            loss = self.base_loss(logits, labels.long())
        else:
            loss = self.base_loss(logits, labels.unsqueeze(1).to(logits.dtype))
        if loss.ndim == labels.ndim + 1:
            loss = loss.sum(1)
        if loss.shape != labels.shape:
            raise InputError(f"base_loss returned shape {tuple(loss.shape)}; expected {tuple(labels.shape)}.")
        return loss

    def _divisor(self, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ignore_index = getattr(self.base_loss, "ignore_index", None)
        valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        if self.normalization == "weights" and weight is not None:
            total = (weight * valid).sum()
        else:
            counted = valid & (labels.long() > 0) if self.normalization == "foreground" else valid
            total = counted.sum().to(torch.float32)
        totals, world = torch.stack([total, valid.sum().to(total)]), 1
        # Only in training: in an evaluation the processes may have different numbers of batches.
        if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
            world = dist.get_world_size()
        return torch.where(totals[0] > 0, totals[0], totals[1].clamp(min=1)) / world


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without MONAI's metadata, which would slow down every operation; gradients still flow."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def _without_channel(name: str, pixels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return N x *spatial, one number per pixel."""
    expected = (len(logits), *logits.shape[2:])
    found = pixels.squeeze(1) if pixels.ndim == logits.ndim and pixels.shape[1] == 1 else pixels
    if found.shape != expected:
        what = f"shape {tuple(pixels.shape)}, which does not fit logits of {tuple(logits.shape)}"
        raise InputError(f"{name} has {what}; expected one number per pixel: {expected}, or with one channel.")
    return found


def _checked_map(leep_map: Any) -> torch.Tensor:
    values = as_plain_tensor("leep_map", leep_map).double()
    if values.numel() == 0:
        raise InputError(f"leep_map is empty (shape {tuple(values.shape)}); expected LEEP values.")
    if bool(values.isinf().any()):
        raise InputError("leep_map holds Inf; expected LEEP values: finite, or NaN in cells without valid pixel.")
    return values


def _range(maps: Sequence[torch.Tensor], clip: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles of the values of all maps together; NaN cells are left out."""
    if not (len(clip) == 2 and 0 <= clip[0] < clip[1] <= 100):
        raise InputError(f"clip is {clip!r}; expected two percentiles (low, high) with 0 <= low < high <= 100.")
    values = np.concatenate([one_map[~one_map.isnan()].cpu().numpy() for one_map in maps])
    low, high = np.percentile(values, clip) if values.size else (0, 0)
    return float(low), float(high)


def repeat_cells(cells: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Undo a map's stride: repeat each cell of the last axes for all pixels that were pooled into it."""
    first_axis = cells.ndim - len(size)
    for axis, length in enumerate(size, start=first_axis):
        n_cells = cells.shape[axis] if first_axis >= 0 else 0
        stride = -(-length // n_cells) if n_cells else 0
        if stride < 1 or -(-length // stride) != n_cells:
            raise InputError(f"size {tuple(size)} does not fit a map of {tuple(cells.shape)}; give the images' size.")
        cells = cells.repeat_interleave(stride, axis).narrow(axis, 0, length)
    return cells


def _label_maps(target_labels: Any, ignore_index: int | None) -> Iterator[torch.Tensor]:
    """Yield the label map of each image without channel axis, `IGNORED` where it equals ``ignore_index``."""
    for labels in target_labels:
        labels = check_labels("target_labels", labels, ignore_index=ignore_index)
        yield labels.squeeze(0) if labels.ndim > 2 else labels


def _class_counts(target_labels: Any, n_classes: int, ignore_index: int | None) -> torch.Tensor:
    require_number("n_classes", n_classes, 1, whole=True)
    counts = torch.zeros(n_classes, dtype=torch.float64)
    for labels in [target_labels] if isinstance(target_labels, (torch.Tensor, np.ndarray)) else target_labels:
        labels = check_labels("target_labels", labels, ignore_index=ignore_index)
        found = torch.bincount(labels[labels != IGNORED], minlength=n_classes)
        if len(found) > n_classes:
            raise InputError(f"target_labels holds the label {len(found) - 1}, but n_classes is {n_classes}.")
        counts += found.cpu()
    if not bool(counts.sum() > 0):
        raise InputError("target_labels holds no valid pixel: it is empty, or every label equals ignore_index.")
    return counts
