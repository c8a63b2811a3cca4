"""A sample of the faults that .ci/faults plants in full; and that it finds what is planted."""

import signal

import pytest

from fastreg import _exchange
from fastreg.io import _integrity

pytest.importorskip("SimpleITK")
faults = pytest.importorskip("bench.faults", reason="not in a checkout")
if not hasattr(signal, "SIGKILL"):
    pytest.skip("a system without signals", allow_module_level=True)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(_exchange, "sync", _exchange.sync)


def silent(folder, kind, share, only=""):
    cases = faults.Cases(folder, share)
    rows = [cases.run(*named) for named in faults.KINDS[kind](cases) if only in named[1]]
    assert rows
    return sum(row["silent"] for row in rows)


@pytest.mark.parametrize(("kind", "share"), [("writers", 0.1), ("kills", 0.2), ("twice", 0.5)])
def test_nothing_is_lost_without_a_word(tmp_path, kind, share):
    assert silent(tmp_path, kind, share) == 0


def test_a_cut_file_that_nobody_notices_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_integrity, "require_written", lambda *_: None)
    assert silent(tmp_path, "writers", 1, "write_image .nii.gz")


def test_a_folder_that_nobody_mends_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_exchange, "sweep", lambda *_: None)
    assert silent(tmp_path, "kills", 1, "--force, by a journal")


def test_two_that_write_at_once_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_exchange, "hold", lambda *_, **__: None)
    assert silent(tmp_path, "twice", 1)
