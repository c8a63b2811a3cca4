"""The planted faults follow the sources: whether the tests find them is asked by .ci/mutants."""

import difflib
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, Misplaced, place

from fastreg import ops


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_stands_in_one_file_and_changes_one_line(mutant):
    path, text = place(mutant)
    before = (ROOT / path).read_text(encoding="utf-8").splitlines()
    changed = [d for d in difflib.ndiff(before, text.splitlines()) if d[0] in "+-"]
    assert 1 <= len(changed) <= 2, changed
    for name in mutant.tests.split():
        assert list(ROOT.glob(f"tests/**/test_{name}.py")), f"no tests are called {name}"


def test_every_op_has_a_mutant():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    tested = {name for m in MUTANTS for name in m.tests.split()}
    assert set(ops.__all__) <= tested


def test_a_text_that_is_gone_or_doubled_is_an_error(tmp_path):
    mutant = MUTANTS[0]
    source = Path(tmp_path, place(mutant)[0])
    source.parent.mkdir(parents=True)
    source.write_text("")
    with pytest.raises(Misplaced, match=f"{mutant.name}: its text must stand once, stands in no file of"):
        place(mutant, tmp_path)
    source.write_text(2 * f"{mutant.old}\n")
    with pytest.raises(Misplaced, match=r"must stand once, stands in csrc/cpu/\w+\.cpp, csrc/cpu/"):
        place(mutant, tmp_path)
