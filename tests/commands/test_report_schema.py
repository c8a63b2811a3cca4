"""report.json: what every command writes fits its schema, and the schema's page says all of it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fastreg import cli, io
from fastreg.io import Geometry
from fastreg.outcome import SCHEMA as NAME

pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

DOCS = Path(__file__).resolve().parents[2] / "docs"
GRIDS = {
    "3d": Geometry.of((12, 14, 16), (2.0, 1.5, 1.0)),
    "2d": Geometry.of((20, 22), (1.0, 1.5)),
}
OPTIONS = ["--quiet", "--threads", "1"]
NET = ["--method", "voxelmorph", "--steps", "2", "--set", "encoder=4,4,4,4", "--set", "decoder=4,4,4,4,4,4"]
KINDS = {
    "3d": ("3d", ["--iterations", "2", "--inverse"]),
    "2d, affine": ("2d", ["--iterations", "2", "--affine", "--transform", "bspline"]),
    "net": ("2d", NET),
}


@pytest.fixture(scope="module")
def keys():
    spec = importlib.util.spec_from_file_location("report_keys", DOCS / "report_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unknown(report, node, keys, path=""):
    """Keys of a report that the schema does not know."""
    node = keys.resolved(node)
    if isinstance(report, list):
        return [k for entry in report for k in unknown(entry, node.get("items", {}), keys, path + "[]")]
    known = node.get("properties")
    if not isinstance(report, dict) or known is None:
        return []  # a leaf, or names that are data
    some = node.get("patternProperties", {})
    lost = [f"{path}.{k}" for k in report if k not in known and not some]
    return lost + [
        k for name, v in report.items() if name in known for k in unknown(v, known[name], keys, f"{path}.{name}")
    ]  # fmt: skip


def check(report, keys):
    assert report["schema"] == NAME == keys.SCHEMA["title"]
    assert unknown(report, keys.SCHEMA, keys) == [], "keys that report.schema.json and docs/report.md lack"
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(keys.SCHEMA).validate(report)


def write_pair(folder, grid):
    rng = np.random.default_rng(0)
    pair = []
    for name in ("fixed", "moving"):
        image = rng.random(grid.shape, dtype=np.float32)
        io.write_image(folder / f"{name}.nii.gz", image, grid)
        io.write_image(folder / f"{name}_labels.nii.gz", (image > 0.5).astype(np.uint8), grid)
        middle = grid.to_physical([[n / 2 for n in grid.shape], [n / 3 for n in grid.shape]])
        io.write_landmarks(folder / f"{name}.csv", middle)
        for kind, file in (("labels", f"{name}_labels.nii.gz"), ("landmarks", f"{name}.csv")):
            pair += [f"--{name}-{kind}", str(folder / file)]
    return [str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz")], pair


def read(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_register_fits_the_schema(tmp_path, kind, keys):
    grid, options = KINDS[kind]
    images, known = write_pair(tmp_path, GRIDS[grid])
    assert cli.main(["register", *images, "-o", str(tmp_path / "out"), *known, *options, *OPTIONS]) == 0
    check(read(tmp_path / "out"), keys)


def test_apply_fits_the_schema(tmp_path, keys, capsys):
    images, known = write_pair(tmp_path, GRIDS["2d"])
    (tmp_path / "pairs.csv").write_text(f"fixed,moving\n{','.join(images)}\n")
    trained = ["--pairs", str(tmp_path / "pairs.csv"), "-o", str(tmp_path / "run")]
    assert cli.main(["train", *trained, *NET, *OPTIONS]) == 0
    weights = ["--weights", str(tmp_path / "run" / "last.pt")]
    assert (
        cli.main(["apply", *weights, *images, "-o", str(tmp_path / "out"), *known, *OPTIONS, "--html"]) == 0
    )
    check(read(tmp_path / "out"), keys)
    assert "voxelmorph" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    field = [
        "--field",
        str(tmp_path / "out" / "displacement.nii.gz"),
        images[1],
        "-o",
        str(tmp_path / "moved"),
    ]
    assert cli.main(["apply", *field, *OPTIONS, "--html"]) == 2
    assert capsys.readouterr().err.endswith("--html goes with --weights\n")


@pytest.mark.slow
def test_the_demo_fits_the_schema(tmp_path, keys):
    assert cli.main(["demo", "-o", str(tmp_path / "out"), "--iterations", "5,0,0,0", *OPTIONS]) in (0, 1)
    report = read(tmp_path / "out")
    assert report["missed"]
    check(report, keys)


def test_what_does_not_fit_is_found(keys):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(keys.SCHEMA)
    validator.check_schema(keys.SCHEMA)
    assert not validator.is_valid({"schema": NAME})
    tre = {"unit": "mm", "landmarks": 0, "before": {}, "after": {}}
    assert not validator.evolve(schema=keys.SCHEMA["properties"]["tre"]).is_valid(tre)
    assert unknown({"tre": {"medium": 1}, "levels": [{"los": 1}]}, keys.SCHEMA, keys) == [".tre.medium", ".levels[].los"]  # fmt: skip


def test_the_page_is_of_the_schema(keys):
    """python docs/report_keys.py writes it."""
    text = keys.PAGE.read_text(encoding="utf-8")
    assert text == keys.page(text)
    for path, node in keys.keys(keys.SCHEMA):
        assert node.get("description"), path
