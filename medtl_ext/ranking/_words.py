"""Lists as a sentence needs them."""

from __future__ import annotations

from collections.abc import Sequence


def listed(parts: Sequence[str], most: int | None = None) -> str:
    """Join with commas and an "and"; beyond ``most`` the rest is only counted.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], 2)
    ('a, b and c', 'a, b and 2 more')
    """
    parts = list(parts)
    if most is not None and len(parts) > most + 1:
        parts = [*parts[:most], f"{len(parts) - most} more"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
