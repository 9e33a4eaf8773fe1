"""Random inputs of tests. They are the same at every run, so only the code decides if a test passes.

What a test claims must hold for other inputs as well: ``MEDTL_TEST_SEED=random pytest`` draws others, and prints the
number that repeats them (``MEDTL_TEST_SEED=1234``) with each test that fails.
"""

import os
import secrets
import zlib
from collections import Counter

import numpy as np
import torch

SETTING = os.environ.get("MEDTL_TEST_SEED", "0")
RUN_SEED = secrets.randbelow(2**31) if SETTING == "random" else int(SETTING)
_draws: Counter[str] = Counter()


def torch_generator() -> torch.Generator:
    """A generator of its own for every test, and for every draw within a test."""
    return torch.Generator().manual_seed(_next_seed())


def numpy_generator() -> np.random.Generator:
    """As `torch_generator`, for NumPy."""
    return np.random.default_rng(_next_seed())


def seed_torch() -> None:
    """Draws without a generator are also the same at every run; they do not depend on other tests."""
    torch.manual_seed(zlib.crc32(f"{RUN_SEED}, {_test()}".encode()))


def _test() -> str:
    return os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]  # without the phase


def _next_seed() -> int:
    _draws[_test()] += 1
    print(f"drawn with MEDTL_TEST_SEED={RUN_SEED}")  # pytest shows it when the test fails
    return zlib.crc32(f"{RUN_SEED}, {_test()}, {_draws[_test()]}".encode())
