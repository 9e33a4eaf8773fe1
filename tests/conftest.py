"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real MRI, published tables and reference vectors that live beside a developer's checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("reference data (../shared/data) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def vectors(shared_data):
    """Load reference inputs and outputs by name, e.g. ``vectors("seg_binary")``."""
    return lambda name: dict(np.load(shared_data / "vectors" / f"{name}.npz"))
