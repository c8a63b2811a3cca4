"""A sample of .ci/fuzz: what a change breaks in many places shows here first."""

import fuzz
import pytest
from common import BACKEND, COMPILED


@pytest.mark.parametrize("cases", [range(30), pytest.param(range(30, 300), marks=pytest.mark.slow)])
@pytest.mark.skipif(BACKEND != "cpu" or not COMPILED, reason="compares kernels with references")
def test_a_sample(cases):
    found = []
    for number in cases:
        case = fuzz.made(0, number)
        kind, text = fuzz.verdict(case)
        if kind in ("wrong", "crash"):
            found.append(f"{kind}: .ci/fuzz --seed 0 --case {number}: {case}: {text}")
    assert not found, "\n".join(found)


def test_cases_are_made_again():
    one, other = fuzz.made(3, 14), fuzz.made(3, 14)
    assert str(one) == str(other)
    assert all(
        a is None or a.equal(b) or a.isnan().any()
        for a, b in zip(one.tensors.values(), other.tensors.values(), strict=True)
    )
