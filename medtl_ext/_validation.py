"""Checks of input: each raises an `InputError` that says in one line what is wrong and what to do."""

from __future__ import annotations

import math
import reprlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

# Importing torch and MONAI takes seconds. Modules without tensors do not wait for them.
if TYPE_CHECKING:
    from torch import Tensor

#: The value that `check_labels` writes where a label equals ``ignore_index``.
IGNORED = -1

# Metrics store labels as int16.
LARGEST_LABEL = 2**15 - 1

# Largest distance of a label's value from a whole number. Scale factors in headers and 32-bit rounding stay below it.
_ROUNDING = 0.01

# File systems allow names of 255 bytes, and we append to names.
LONGEST_NAME = 200
LONGEST_LINE = 500
shown = reprlib.Repr()
"""Shortens a user's value so that it fits on one line of a message: ``shown.repr(name)``."""
shown.maxstring = LONGEST_NAME


class InputError(ValueError):
    """The user's input cannot be used. The message says what was found, what was expected and what to do.

    On the command line the bundles print it as one line, without a traceback.
    """


def require_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise an `InputError` that suggests the most similar one.

    >>> require_choice("direction", "hardness", ["hardness", "literal"])
    'hardness'
    >>> require_choice("direction", "hardnes", ["hardness", "literal"])
    Traceback (most recent call last):
    medtl_ext._validation.InputError: direction 'hardnes' is unknown; did you mean 'hardness'? Known: hardness, literal.
    """
    choices = list(choices)
    if value in choices:
        return value
    near = get_close_matches(str(value)[:LONGEST_NAME], choices, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise InputError(f"{name} {shown.repr(str(value))} is unknown{hint} Known: {', '.join(choices)}.")


def require_choices(name: str, values: Sequence[str], choices: Iterable[str]) -> list[str]:
    """Return the values without duplicates if there is at least one and all are in ``choices``; see `require_choice`.

    >>> require_choices("metric", ["leep", "leep"], ["leep", "h_score"])
    ['leep']
    """
    choices = list(choices)
    if isinstance(values, str) or not values:
        raise InputError(f"{name}s is {values!r}; give a list of at least one of {', '.join(choices)}.")
    return list(dict.fromkeys(require_choice(name, value, choices) for value in values))


def require_number(
    name: str, value: Any, least: float, most: float = math.inf, *, whole: bool = False, above: bool = False
) -> Any:
    """Return ``value`` if it is a finite number in [least, most].

    ``above`` excludes ``least``, and ``whole`` asks for an integer. Booleans do not count as numbers.

    >>> require_number("stride", 4, 1, whole=True)
    4
    >>> require_number("epsilon", 0.0, 0, above=True)
    Traceback (most recent call last):
    medtl_ext._validation.InputError: epsilon is 0.0; expected a number above 0.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and least <= value <= most and value < math.inf and not (above and value == least):
        return value
    allowed = f" above {least}" if above else f", {least} or more" if most == math.inf else f" from {least} to {most}"
    raise InputError(f"{name} is {value!r}; expected a {'whole number' if whole else 'number'}{allowed}.")


def require_name(what: str, name: str) -> str:
    """Return ``name`` if it is safe as part of a file name, in a table and in an HTML page, on every operating system.

    Names come from collections, cards and options, which other people may have written.

    >>> require_name("subject", "olav-001")
    'olav-001'
    >>> require_name("subject", "../x")
    Traceback (most recent call last):
    medtl_ext._validation.InputError: subject '../x' cannot be part of a file's name: it begins with '.'; rename it.
    """
    length = len(name.encode("utf-8", "surrogatepass"))
    odd = next((character for character in name if not character.isprintable() or character in '<>:"/\\|?*'), None)
    for problem, so in {
        "it is empty": not name,
        f"it has {length} bytes, and {LONGEST_NAME} are the most": length > LONGEST_NAME,
        f"it begins with {name[:1]!r}": not (name[:1].isalnum() or name[:1] == "_"),
        "it ends with a space": name != name.rstrip(),
        f"it holds {odd!r}": odd is not None,
    }.items():
        if so:
            raise InputError(f"{what} {shown.repr(name)} cannot be part of a file's name: {problem}; rename it.")
    return name


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the error's class name if the message is empty.

    >>> first_line(ValueError("too small\\nat line 3"))
    'too small'
    >>> len(first_line(ValueError("x" * 10**6)))
    503
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) < LONGEST_LINE else f"{line[:LONGEST_LINE]}..."  # it may repeat a value of a megabyte


def warn(message: str) -> None:
    """Issue a `UserWarning` that points to the caller's line outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "medtl_ext":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def as_plain_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` (a tensor of any kind, an array, a list) as a detached tensor without MONAI's metadata.

    >>> as_plain_tensor("target_labels", [0, 1])
    tensor([0, 1])
    """
    import torch
    from monai.utils import convert_to_tensor

    try:
        tensor = convert_to_tensor(value, wrap_sequence=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as one tensor ({error}); give a tensor or an array.") from error
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} is {type(value).__name__}; expected a tensor or an array.")
    return tensor.detach()


def check_samples(name: str, value: Any, *, channels: str) -> Tensor:
    """Return N x channels (x *spatial) real numbers as floating point; messages call the channel axis ``channels``.

    >>> check_samples("features", [[1, 2]], channels="D")
    tensor([[1., 2.]], dtype=torch.float64)
    """
    tensor = as_plain_tensor(name, value)
    shape = tuple(tensor.shape)
    if tensor.ndim < 2:
        raise InputError(f"{name} has shape {shape}; expected N x {channels} or N x {channels} x *spatial.")
    if tensor.numel() == 0:
        raise InputError(f"{name} is empty (shape {shape}); expected at least one sample.")
    if tensor.is_complex():
        raise InputError(f"{name} is complex; expected real numbers.")
    return tensor if tensor.is_floating_point() else tensor.double()


def check_labels(name: str, value: Any, *, ignore_index: int | None = None) -> Tensor:
    """Return integer class labels as int64, with `IGNORED` where they equal ``ignore_index``.

    >>> check_labels("target_labels", [0.0, 2.0, 255.0], ignore_index=255)
    tensor([ 0,  2, -1])
    """
    import torch

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
        hint = f"expected class indices up to {LARGEST_LABEL} (did you pass an image?)"
        raise InputError(f"{name} holds the label {high}; {hint}.")
    return labels if ignore_index is None else labels.masked_fill_(ignored, IGNORED)


def check_labels_of(name: str, samples: Tensor, target_labels: Any, *, ignore_index: int | None) -> Tensor:
    """Return labels N x *spatial that fit samples N x channels x *spatial, on the device of the samples.

    Messages call the samples ``name``. Labels may have a channel axis of length one, as in MONAI.
    """
    labels = check_labels("target_labels", target_labels, ignore_index=ignore_index)
    expected = (len(samples), *samples.shape[2:])
    if tuple(labels.shape) == (expected[0], 1, *expected[1:]):
        labels = labels.squeeze(1)
    if tuple(labels.shape) != expected:
        fit = f"does not fit {name} {tuple(samples.shape)}; expected {expected} (class indices, not one-hot)"
        raise InputError(f"target_labels has shape {tuple(labels.shape)}, which {fit}.")
    return labels.to(samples.device)


def whole_labels(label: np.ndarray) -> tuple[np.ndarray, tuple[str, str, str] | None]:
    """Round a label map to whole numbers.

    Values within 0.01 of a whole number are rounded. NaN, which some files hold outside the scan, becomes 0.

    Args:
        label: of any shape and real dtype.

    Returns:
        The label, and a note or None: its severity (``warning`` or ``error``), the problem, and what to do. Values
        farther from a whole number are an error and stay as they are.

    >>> whole_labels(np.array([0, 0.99998, 2]))[0]
    array([0., 1., 2.])
    >>> whole_labels(np.array([0, 0.9882]))[1][1]
    'the label holds fractional values, such as 0.9882, which is more than 0.01 off 1'
    """
    whole = np.round(label)
    if label.dtype.kind != "f" or (np.array_equal(whole, label) and np.isfinite(label).all()):
        return label, None
    outside = np.isnan(label)
    whole[outside] = 0
    off = np.abs(np.nan_to_num(label) - whole)
    if (odd := off > _ROUNDING).any():
        value = label[odd].min()
        fractional = f"fractional values, such as {value:g}, which is more than {_ROUNDING:g} off {value:.0f}"
        advice = "resample labels with nearest-neighbour interpolation, and threshold probabilities"
        return np.where(odd, label, whole), ("error", f"the label holds {fractional}", advice)
    shares = {f"up to {off.max():.1g} off a whole number": off > 0, "NaN, which counts as background": outside}
    found = [f"{100 * where.mean():.2g} % of the label are {what}" for what, where in shares.items() if where.any()]
    return whole, ("warning", " and ".join(found), "values are rounded: save labels as integers")
