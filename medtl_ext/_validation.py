"""What every room needs to refuse bad input in one clear line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what was found, what was expected and what to do.

    The bundles print it as one line on the command line, without the traceback.
    """


def require_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise an `InputError` that names the nearest one.

    >>> require_choice("direction", "hardness", ["hardness", "literal"])
    'hardness'
    >>> require_choice("direction", "hardnes", ["hardness", "literal"])
    Traceback (most recent call last):
    medtl_ext._validation.InputError: direction 'hardnes' is unknown; did you mean 'hardness'? Known: hardness, literal.
    """
    choices = list(choices)
    if value in choices:
        return value
    near = get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise InputError(f"{name} '{value}' is unknown{hint} Known: {', '.join(choices)}.")


def require_choices(name: str, values: Sequence[str], choices: Iterable[str]) -> list[str]:
    """The values, none twice, if there is one and all are among ``choices``; see `require_choice`.

    >>> require_choices("metric", ["leep", "leep"], ["leep", "h_score"])
    ['leep']
    """
    choices = list(choices)
    if isinstance(values, str) or not values:
        raise InputError(f"{name}s is {values!r}; give a list of at least one of {', '.join(choices)}.")
    return list(dict.fromkeys(require_choice(name, value, choices) for value in values))


def require_whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Refuse what is no whole number from ``least`` to ``most``; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        allowed = f", {least} or more" if most == math.inf else f" from {least} to {most}"
        raise InputError(f"{name} is {value!r}; expected a whole number{allowed}.")
