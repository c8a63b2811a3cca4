from pathlib import Path

import pytest
from common import BACKEND


def pytest_collection_modifyitems(items):
    """Tests of an op are of its kernels; of the contract, those marked there."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("contract"):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes 0.1 s a program of any size."""
    if BACKEND == "triton":
        monkeypatch.setattr("fastreg.kernels.warp._TILE", (8, 16, 64))
