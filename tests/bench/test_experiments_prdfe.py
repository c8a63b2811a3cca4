import csv
import math

import pytest

pytest.importorskip("matplotlib")

from bench.experiments import prdfe

TINY = ["--steps", "2", "--seeds", "0", "1", "--pairs", "6", "--tests", "3", "--threads", "2"]


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_table_and_picture(tmp_path):
    methods = ["voxelmorph", "pdfe_scaled", "iprdfe"]
    assert prdfe.main([*TINY, "--methods", *methods, "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "prdfe.csv")
    assert [(r["method"], r["deformation"]) for r in rows] == [
        (m, d) for m in ("identity", *methods) for d in ("small", "medium", "large", "all")
    ]
    for row in rows:
        for key in (
            "image_mse_mean",
            "image_mse_sd",
            "field_mse_mean",
            "field_mse_sd",
            "figures_mse_mean",
            "folding",
        ):
            assert math.isfinite(float(row[key])), (row["label"], key)
        if row["method"] != "identity":
            assert int(row["steps"]) == 2
    # a displacement of zeros is as far from the truth as the truth is long
    assert [float(r["field_mse_mean"]) for r in rows[:3]] == pytest.approx(
        [5**2 / 2, 10**2 / 2, 16**2 / 2], rel=1e-3
    )
    assert float(rows[7]["paper_field_mse"]) == 132.2309
    assert (tmp_path / "prdfe_partial.png").stat().st_size > 10_000


def test_nothing_is_stored_that_was_not_asked_for(tmp_path):
    arguments = ["--methods", "iprdfe", "--results", str(tmp_path), "--no-store"]
    assert prdfe.main([*TINY, *arguments]) == 0
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_one_line(capsys):
    assert prdfe.main(["--methods", "prdfe", "nonsense"]) == 2
    assert "--methods must be of voxelmorph" in capsys.readouterr().err
