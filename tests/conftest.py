import os
import signal

# Before torch loads OpenMP: processes side by side must not spin while they wait.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import backends
import pytest
import torch
import torch._functorch.config
import torch._inductor.config

# nohup and & leave them ignored, and commands respect that; tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
backends.install()
# Side by side they have one each; tests of threads ask for theirs.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# A cached graph would call ops by a schema that an edit has changed since.
torch._inductor.config.fx_graph_cache = False
torch._functorch.config.enable_autograd_cache = False


def pytest_collection_modifyitems(config, items):
    """FASTREG_TEST_CASES=n takes n cases of each parametrised test: for lanes that repeat what another has tested in full.
    Triton's interpreter needs seconds for one, so it takes two unless told otherwise ("all").
    """
    count = os.environ.get("FASTREG_TEST_CASES") or ("2" if backends.BACKEND == "triton" else "all")
    if count == "all":
        return
    cases = {}
    for item in items:
        # The contract has every op in one function: some cases of each.
        op = (
            item.callspec.id.split("-")[0]
            if item.get_closest_marker("contract") and hasattr(item, "callspec")
            else ""
        )
        cases.setdefault((item.path, getattr(item, "originalname", item.name), op), []).append(item)
    kept = set()
    for some in cases.values():
        n = min(int(count), len(some))
        for k in range(n):
            # One of each n-th part, each time at another place: parameters come in cycles that equal steps would keep to.
            begin, end = k * len(some) // n, (k + 1) * len(some) // n
            kept.add(some[begin + int((k + 1) * 0.618 % 1 * (end - begin))])
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = [i for i in items if i in kept]


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory (torch.empty and at::empty in C++) holds NaN, so an unwritten output cannot pass.

    FASTREG_TEST_POISON=0 runs without, because the same switch also asks for deterministic algorithms.
    """
    on = os.environ.get("FASTREG_TEST_POISON", "1") == "1"
    torch.use_deterministic_algorithms(on, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def reproducible(poison):
    """A GPU scatters gradients with the same bits in every run under deterministic algorithms alone."""
    if backends.BACKEND != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
