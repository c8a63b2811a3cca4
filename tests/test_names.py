"""One op, one name in every layer."""

from pathlib import Path

import pytest

import fastreg

ROOT = Path(__file__).parents[1]
# Beside the ops: what others share, and benches of uses of an op.
OTHERS = {
    "fastreg/ops": set(),
    "tests/ops": {"contract"},
    "bench": {"register", "warp_affine"},
}


@pytest.mark.parametrize(
    ("folder", "prefix"), [("fastreg/ops", ""), ("tests/ops", "test_"), ("bench", "bench_")]
)
def test_every_op_has_a_file_of_its_name(folder, prefix):
    names = {
        p.stem.removeprefix(prefix)
        for p in (ROOT / folder).glob(f"{prefix}*.py")
        if prefix or p.stem[0] != "_"
    }
    assert names - OTHERS[folder] == set(fastreg.ops.__all__)


def test_ops_are_those_of_the_package_and_of_nn():
    assert set(fastreg.ops.__all__) <= set(fastreg.__all__)
    modules = {name.lower(): getattr(fastreg.nn, name).op for name in fastreg.nn.__all__}
    assert modules == {op.replace("_", ""): getattr(fastreg, op) for op in fastreg.ops.__all__}
