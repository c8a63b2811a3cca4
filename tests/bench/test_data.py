"""bench.data: what FASTREG_DATA must hold."""

import json
import os

import numpy as np
import pytest

from bench import data


def made(name):
    """The arrays of a file, as small as they can be."""
    lead = (data.SUBJECTS,) if name == "hippocampusmr_msd04" else ()
    kinds = {
        data.IMAGE: np.zeros((*lead, 4, 5, 6), np.float32),
        data.LABELS: np.zeros((*lead, 4, 5, 6), np.uint8),
        data.POINTS: np.ones((7, 3)),
    }
    arrays = {key: kinds[kind] for key, kind in data.FILES[name].items()}
    return {**arrays, "spacing": np.ones(3), "meta": json.dumps({})}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in data.FILES:
        np.savez(tmp_path / f"{name}.npz", **made(name))
    monkeypatch.setenv("FASTREG_DATA", str(tmp_path))
    return tmp_path


def test_as_it_should_be(folder, capsys):
    assert data.main() == 0
    assert capsys.readouterr().out.count("as it should be") == len(data.FILES)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("brainmr_vxm", {"moving": None}, "no moving"),
        ("brainmr_vxm", {"moving": np.zeros((4, 5, 7))}, "moving must have the shape"),
        ("brainmr_vxm", {"fixed_seg": np.zeros((4, 5, 6))}, "fixed_seg must be whole numbers"),
        ("brainmr_vxm", {"fixed": np.full((4, 5, 6), np.nan)}, "fixed must be finite"),
        ("brainmr_vxm", {"spacing": np.array([1.0, 0, 1])}, "spacing must be"),
        ("brainmr_vxm", {"meta": "no"}, "meta must be"),
        ("lungct_dirlab4dct_case1", {"fixed_lm": np.ones((6, 3))}, "a row for each of"),
        ("lungct_dirlab4dct_case1", {"moving_lm": np.full((7, 3), 5.0)}, "lie outside"),
        ("hippocampusmr_msd04", {"images": np.zeros((3, 4, 5, 6))}, "15 images"),
    ],
)
def test_what_is_wrong_is_said(folder, name, change, said, capsys):
    arrays = {key: value for key, value in {**made(name), **change}.items() if value is not None}
    np.savez(folder / f"{name}.npz", **arrays)
    assert data.main() == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "as it should be" not in x]
    assert line.startswith(f"{name}.npz: ")
    assert said in line


def test_missing_damaged_and_no_folder(folder, capsys, monkeypatch):
    (folder / "brainmr_vxm.npz").unlink()
    (folder / "lungmr_proton.npz").write_bytes(b"PK\3\4 and then nothing")
    assert data.main() == 1
    out = capsys.readouterr().out
    assert "brainmr_vxm.npz: not there" in out
    assert "lungmr_proton.npz: cannot be read" in out
    monkeypatch.setenv("FASTREG_DATA", str(folder / "nowhere"))
    assert data.main() == 2
    assert "FASTREG_DATA" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("FASTREG_DATA"), reason="FASTREG_DATA, the folder with the scans, is not set"
)
def test_the_scans_are_as_they_should_be(capsys):
    assert data.main() == 0, capsys.readouterr().out
