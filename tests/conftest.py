import os

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory (torch.empty and at::empty in C++) holds NaN, so an unwritten output cannot pass.

    FASTREG_TEST_POISON=0 runs without, because the same switch also asks for deterministic algorithms.
    """
    on = os.environ.get("FASTREG_TEST_POISON", "1") == "1"
    torch.use_deterministic_algorithms(on, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
