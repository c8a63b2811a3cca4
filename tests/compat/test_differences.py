"""docs/compat.md holds what the modules say; nothing of a peer is imported."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import fastreg

DOCS = Path(fastreg.__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator():
    if not DOCS.exists():
        pytest.skip("not in a checkout")
    spec = importlib.util.spec_from_file_location("compat_differences", DOCS / "compat_differences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated(generator):
    text = generator.PAGE.read_text(encoding="utf-8")
    assert generator.page(text) == text, "run python docs/compat_differences.py"


def test_every_row_names_what_the_module_has(generator):
    for name in generator.modules():
        module = importlib.import_module(f"fastreg.compat.{name}")
        for row in module.DIFFERENCES:
            assert set(row.name.split(", ")) <= set(module.__all__), row
            assert all(row), row


def test_no_peer_is_imported(generator):
    for name in generator.modules():
        source = Path(importlib.import_module(f"fastreg.compat.{name}").__file__).read_text(encoding="utf-8")
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
        roots = {
            (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0] for n in nodes
        }
        assert roots <= {*sys.stdlib_module_names, "numpy", "torch", "fastreg"}
