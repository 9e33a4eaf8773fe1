"""NCE, the negative conditional entropy of target labels given source labels."""

from typing import Any

import torch

from medtl_ext._validation import IGNORED, InputError, check_labels, warn
from medtl_ext.metrics.base import TransferMetric, probabilities_and_labels


def compute_nce(source_labels: Any, target_labels: Any, *, ignore_index: int | None = None) -> torch.Tensor:
    """Negative conditional entropy ``-H(Y|Z)`` of the target labels given the source's predicted labels.

    Args:
        source_labels: integer tensor of any shape, the class that the source network predicts for each sample (or
            pixel).
        target_labels: integer tensor of the same shape, the target's class.
        ignore_index: samples with this target label are left out.

    Returns:
        The score in nats, a float64 scalar in [-H(Y), 0]; higher predicts better transfer. It is 0 with a `UserWarning`
        if there is one target label only.

    Raises:
        InputError: invalid input; the message names the argument.

    Example:
        >>> compute_nce(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2]))
        tensor(-0.3466, dtype=torch.float64)

    Reference: Tran et al., *Transferability and hardness of supervised classification tasks*, ICCV 2019.
    """
    return _nce(_counts(source_labels, target_labels, ignore_index))


class NCE(TransferMetric):
    """`compute_nce` over batches: ``compute()`` returns a float64 scalar <= 0, higher is better.

    Attached to an engine, it uses the most probable class of the network's logits (see `TransferMetric`).

    Args:
        ignore_index: samples with this target label are left out.
        output_transform: see `TransferMetric`.

    >>> metric = NCE()
    >>> metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]))
    >>> metric.update(torch.tensor([1, 1]), torch.tensor([2, 2]))
    >>> metric.compute()
    tensor(-0.3466, dtype=torch.float64)
    """

    inputs = ("source_labels", "target_labels")
    growing_axes = 2

    @staticmethod
    def default_output_transform(output: Any) -> tuple[Any, Any]:
        """The most probable class of `pred`, with a channel axis of length one, and `label`, as lists of samples."""
        probs, labels = probabilities_and_labels(output)
        classes = [(one > 0.5).long() if len(one) == 1 else one.argmax(0, keepdim=True) for one in probs]
        return classes, labels

    def update(self, source_labels: Any, target_labels: Any) -> None:
        """Add a batch of predicted source classes and target classes, two integer tensors of the same shape."""
        self._add(counts=_counts(source_labels, target_labels, self.ignore_index))

    def _evaluate(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        return _nce(sums["counts"])


def _counts(source_labels: Any, target_labels: Any, ignore_index: int | None) -> torch.Tensor:
    """Number of samples of each target class (row) with each predicted source class (column)."""
    source = check_labels("source_labels", source_labels)
    target = check_labels("target_labels", target_labels, ignore_index=ignore_index).to(source.device)
    # One of the two may have a channel axis of length one.
    if [n for n in source.shape if n != 1] != [n for n in target.shape if n != 1]:
        raise InputError(
            f"target_labels has shape {tuple(target.shape)}; expected source_labels' {tuple(source.shape)}."
        )
    source, target = source.flatten(), target.flatten()
    if ignore_index is not None:
        source, target = source[target != IGNORED], target[target != IGNORED]
    shape = (int(target.max()) + 1, int(source.max()) + 1) if len(target) else (1, 1)
    cells = torch.bincount(target * shape[1] + source, minlength=shape[0] * shape[1])
    return cells.double().view(shape)


def _nce(counts: torch.Tensor) -> torch.Tensor:
    if not bool(counts.sum() > 0):
        raise InputError("target_labels holds no valid sample: every label equals ignore_index; change ignore_index.")
    if int((counts.sum(1) > 0).sum()) == 1:
        warn("target_labels holds one class only, so NCE is 0, its best value, and says nothing about transfer.")
    return negative_conditional_entropy(counts.T)


def negative_conditional_entropy(table: torch.Tensor) -> torch.Tensor:
    """-H(Y_t | Y_s) of a table of masses, source classes x target classes, clamped to [-H(Y_t), 0]."""
    joint = table / table.sum()
    source, target = joint.sum(1), joint.sum(0)
    # sum_st P(s, t) ln P(t|s), as a difference of two sums of p ln p, in which empty cells are 0.
    value = torch.xlogy(joint, joint).sum() - torch.xlogy(source, source).sum()
    return value.clamp(torch.xlogy(target, target).sum(), torch.zeros_like(value))
