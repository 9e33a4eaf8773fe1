"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import seed_torch

from medtl_ext.transfer import jobs

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def same_draws_at_every_run():
    seed_torch()


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


@pytest.fixture
def no_determinism_left_behind():
    """A bundle run in this process makes torch deterministic, which other tests need not be."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_this_process(monkeypatch) -> list[Path]:
    """Trainings run in this process, for speed; the folders of those that ran."""
    trained: list[Path] = []

    def run_here(waiting, **how):
        for job in waiting:
            if not job.done:
                trained.append(job.output_dir)
                job.run()

    monkeypatch.setattr(jobs, "run_jobs", run_here)
    return trained


@pytest.fixture
def no_training(monkeypatch):
    """A test fails when a training begins that is not done."""

    def run_none(waiting, **how):
        if not all(job.done for job in waiting):
            pytest.fail("training started")

    monkeypatch.setattr(jobs, "run_jobs", run_none)
