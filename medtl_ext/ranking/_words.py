"""Words shared by the sentences of several verdicts."""

from collections.abc import Iterable

SYNTHETIC = "These are synthetic data, which say nothing about a clinic."
ONLY_A_SCORE = (
    "This is about the score: fine-tuning may order the sources otherwise, and training from scratch may beat them all."
)


def listed(parts: Iterable[object], most: int | None = None) -> str:
    """Join with commas and "and". Items beyond ``most`` are only counted.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], 2)
    ('a, b and c', 'a, b and 2 more')
    """
    parts = [str(part) for part in parts]
    if most is not None and len(parts) > most + 1:
        parts = [*parts[:most], f"{len(parts) - most} more"]
    return "".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def number_of_patients(count: int, split: str) -> str:
    return f"{count} {split} patient{'s' if count > 1 else ''}"
