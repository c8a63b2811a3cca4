"""Random pairs: drawn from their numbers alone, with a truth that holds; counted as the page says."""

import numpy as np
import pytest

pytest.importorskip("SimpleITK")

from bench import common, robustness


def test_pairs_are_drawn_from_their_numbers():
    sides, points, _, amplitude, faults = robustness.pair(0, 1)
    again = robustness.pair(0, 1)
    assert (amplitude, faults) == again[3:]
    for (image, grid), (other, of) in zip(sides, again[0], strict=True):
        np.testing.assert_array_equal(image, other)
        assert grid.matches(of)
    np.testing.assert_array_equal(points[0], again[1][0])
    assert robustness.pair(0, 2)[3] != amplitude


def test_the_truth_knows_what_was_cropped():
    rng = np.random.default_rng(3)
    sides, _, _, _, _ = robustness.pair(0, 1)
    image, grid = sides[0]
    part, of = robustness.cropped(rng, image, grid)
    assert part.shape != image.shape
    at = np.round(grid.to_index(of.to_physical(np.zeros((1, 3))))[0]).astype(int)
    inside = tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))
    np.testing.assert_array_equal(part, image[inside])


@pytest.mark.slow
def test_a_pair_is_registered_and_judged(tmp_path):
    row = robustness.row(0, 3, tmp_path, ["--iterations", "5"])
    assert float(row["after"]) < float(row["before"])
    assert row["status"] == "ok"
    assert not robustness.unsaid(row)


def test_the_page_counts_what_got_worse_unsaid(tmp_path):
    base = {
        "date": "2026-01-02", "commit": "abc", "device_name": "CPU", "seed": "0", "pair": "0", "amplitude_mm": "25.0", "faults": "",
        "before": "12", "after": "2", "wall": "3", "folding": "0", "status": "ok", "arguments": "",
    }  # fmt: skip
    rows = [
        {**base, "commit": "old"},
        base,
        {**base, "pair": "1", "faults": "noise, swapped", "after": "13"},
        {**base, "pair": "2", "faults": "noise", "after": "14", "status": "suspect", "folding": "0.002"},
        {**base, "pair": "3", "after": "30", "arguments": "--window 5"},
    ]
    common.append_rows(tmp_path / "robustness.csv", rows, list(base))
    text = robustness.sections(tmp_path)[""]
    assert "| all | 3 | 1 | 2 | 1 | 1 | 12.0 | 13.0 | 3.00 | 0.2 % |" in text
    assert "| none of the faults | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| noise | 2 | 0 | 2 | 1 | 1 |" in text
    assert "| motion of 20 to 30 mm | 3 |" in text
    assert "bias field |" not in text
