"""What every metric asks of its inputs, checked once per batch in as few passes over the data as possible."""

from __future__ import annotations

from typing import Any

import torch
from monai.utils import convert_to_tensor

from medtl_ext._validation import InputError

#: What `check_labels` writes wherever a label equals ``ignore_index``.
IGNORED = -1

# Labels are kept as int16 between the two looks a metric takes at them.
LARGEST_LABEL = torch.iinfo(torch.int16).max


def as_plain_tensor(name: str, value: Any) -> torch.Tensor:
    """Return ``value`` (a tensor of any kind, an array, a list) as a detached tensor without MONAI's metadata.

    >>> as_plain_tensor("target_labels", [0, 1])
    tensor([0, 1])
    """
    try:
        tensor = convert_to_tensor(value, wrap_sequence=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as one tensor ({error}); give a tensor or an array.") from error
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} is {type(value).__name__}; expected a tensor or an array.")
    return tensor.detach()


def check_probabilities(name: str, value: Any) -> torch.Tensor:
    """Return N x Z x *spatial class probabilities in a floating dtype; one channel s of a sigmoid becomes [1 - s, s].

    >>> check_probabilities("source_probs", [[0.25], [1.0]])
    tensor([[0.7500, 0.2500],
            [0.0000, 1.0000]])
    """
    probs = as_plain_tensor(name, value)
    if probs.ndim < 2:
        raise InputError(f"{name} has shape {tuple(probs.shape)}; expected N x Z or N x Z x *spatial.")
    if probs.numel() == 0:
        raise InputError(f"{name} is empty (shape {tuple(probs.shape)}); expected at least one sample.")
    if probs.is_complex():
        raise InputError(f"{name} is complex; expected probabilities.")
    if not probs.is_floating_point():
        probs = probs.float()

    tolerance = 1e-2 if torch.finfo(probs.dtype).bits < 32 else 2e-3
    if probs.shape[1] == 2 and probs.element_size() >= 4:
        total = probs[:, 0] + probs[:, 1]  # a third of the time of a sum over an axis of two
    else:
        total = probs.sum(1, dtype=torch.promote_types(probs.dtype, torch.float32))
    # aminmax hands NaN on, so these four numbers decide everything with one wait for the device.
    low, high, low_total, high_total = (
        torch.stack([bound.to(total.dtype) for tensor in (probs, total) for bound in torch.aminmax(tensor)])
    ).tolist()
    if not (torch.finfo(total.dtype).min <= low <= high <= torch.finfo(total.dtype).max):
        raise InputError(f"{name} holds NaN or Inf; look for a diverged network or a broken input image.")
    if low < 0 or high > 1 + tolerance:
        raise InputError(
            f"{name} ranges from {low:.4g} to {high:.4g}; expected probabilities in [0, 1] "
            "(logits need a softmax first)."
        )
    if probs.shape[1] == 1:
        return torch.cat([1 - probs, probs], dim=1).clamp_(min=0)
    if low_total < 1 - tolerance or high_total > 1 + tolerance:
        raise InputError(
            f"{name} sums to between {low_total:.4g} and {high_total:.4g} over its {probs.shape[1]} channels; "
            "expected probabilities that sum to one (several independent sigmoids are several tasks)."
        )
    return probs


def check_labels(name: str, value: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """Return integer class labels as int64, `IGNORED` wherever they equal ``ignore_index``.

    >>> check_labels("target_labels", [0.0, 2.0, 255.0], ignore_index=255)
    tensor([ 0,  2, -1])
    """
    given = as_plain_tensor(name, value)
    if given.numel() == 0:
        raise InputError(f"{name} is empty (shape {tuple(given.shape)}); expected at least one sample.")
    labels = given.long()
    if given.is_floating_point() and not torch.equal(labels.to(given.dtype), given):
        raise InputError(f"{name} holds non-integer values; expected class indices 0, 1, 2, ...")
    if ignore_index is not None:
        ignored = labels == ignore_index
        labels = labels.masked_fill(ignored, 0)
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0:
        hint = (
            "set ignore_index to leave such samples out" if ignore_index is None else f"ignore_index is {ignore_index}"
        )
        raise InputError(f"{name} holds the negative label {low}; expected class indices 0, 1, 2, ... ({hint}).")
    if high > LARGEST_LABEL:
        raise InputError(f"{name} holds the label {high}; at most {LARGEST_LABEL} is supported (is this an image?).")
    return labels if ignore_index is None else labels.masked_fill_(ignored, IGNORED)


def check_predictions(
    source_probs: Any, target_labels: Any, *, ignore_index: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return N x Z x *spatial probabilities and N x *spatial labels on the same device, or raise `InputError`.

    Labels may carry a channel axis of length one, as MONAI's do.
    """
    probs = check_probabilities("source_probs", source_probs)
    labels = check_labels("target_labels", target_labels, ignore_index=ignore_index)
    grid = tuple(probs.shape[2:])
    if tuple(labels.shape[1:]) == (1, *grid):
        labels = labels.squeeze(1)
    if tuple(labels.shape) != (len(probs), *grid):
        raise InputError(
            f"target_labels has shape {tuple(labels.shape)}, which does not fit source_probs {tuple(probs.shape)}; "
            f"expected {(len(probs), *grid)} (class indices, not one-hot)."
        )
    return probs, labels.to(probs.device)
