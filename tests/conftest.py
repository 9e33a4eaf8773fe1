"""Fixtures shared by all tests."""

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import REPOSITORY, Bundle, mnist_arrays
from drawing import seed_torch

from medtl_ext.data import generate_phantom
from medtl_ext.transfer import jobs


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
    """A bundle that runs in this process makes torch deterministic; this is undone for other tests."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def collection(tmp_path_factory) -> Path:
    """Two institutions with ten synthetic patients each. Four are for training, the minimum for a verdict."""
    folder = tmp_path_factory.mktemp("phantom") / "collection"
    return generate_phantom(folder, institutions=["14", "17"], subjects=10, n_jobs=1, progress=False)


@pytest.fixture(scope="session")
def kept(tmp_path_factory) -> Path:
    """The folder of pre-trained networks and phantom tasks; the first test that needs one makes it."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def places(collection, kept, tmp_path, monkeypatch) -> dict[str, str]:
    """The options that say where a bundle finds its data and its pool, and where it writes."""
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(kept / "cache"))
    pool, out = kept / "pool", tmp_path / "out"
    return {"collection": str(collection), "source_dir": str(pool), "output_dir": str(out)}


@pytest.fixture
def options(places) -> dict[str, str]:
    """The places, to which a file of tests may add options of its own."""
    return places


@pytest.fixture
def mnist(tmp_path) -> Callable[..., str]:
    """Writes MedMNIST files of noise; the brightness shows the class. Another name gives other noise."""

    def write(name: str = "tinymnist", **how) -> str:
        np.savez(tmp_path / f"{name}.npz", **mnist_arrays(seed=list(name.encode()), **how))
        return str(tmp_path / f"{name}.npz")

    return write


@pytest.fixture
def in_this_process(monkeypatch) -> list[Path]:
    """Run trainings in this process, for speed; gives the folders of those that ran."""
    trained: list[Path] = []

    def run_here(waiting, **how):
        for job in waiting:
            if not job.done:
                trained.append(job.output_dir)
                job.run()

    monkeypatch.setattr(jobs, "run_jobs", run_here)
    return trained


@pytest.fixture
def whole_run(kept, places, in_this_process) -> Callable[[Bundle], Path]:
    """The results folder of a bundle's complete ``train.json``, which runs once; the output is stored beside it."""

    def run(bundle: Bundle) -> Path:
        folder = kept / "_".join([bundle.name, *bundle.whole]).replace("#", "_")  # which MONAI reads as ::
        if not folder.with_suffix(".txt").exists():
            with redirect_stdout(StringIO()) as printed:
                bundle.run(**places | bundle.whole | {"output_dir": str(folder)})
            folder.with_suffix(".txt").write_text(printed.getvalue())
        return folder

    return run


@pytest.fixture
def no_training(monkeypatch):
    """A test fails if a new training begins."""

    def run_none(waiting, **how):
        if not all(job.done for job in waiting):
            pytest.fail("training started")

    monkeypatch.setattr(jobs, "run_jobs", run_none)
