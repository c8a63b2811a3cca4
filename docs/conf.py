"""Builds docs/ with Sphinx: make docs."""

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastreg.cli  # noqa: E402
import fastreg.ops  # noqa: E402
from fastreg._version import __version__  # noqa: E402

project = "fastreg"
author = "fastreg maintainers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fastreg"
html_static_path = ["_static"]
html_css_files = ["fastreg.css"]
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"

# Before autodoc: to preserve defaults it puts their source text in the signatures that the help is made of.
_PARSER = fastreg.cli._parser()
fastreg.cli._parser = lambda: _PARSER

_CODE = re.compile(r"(``.*?``|`[^`]+`)")
_FIELD = re.compile(r"\w[\w, ]* \([^)]+\): ")


def _plain(app, what, name, obj, options, lines):
    """Docstrings are written for help(): outside of code, `*spatial` is a shape and `|x|` a size, not markup; a class's fields need no
    heading."""
    first = next((i for i, line in enumerate(lines) if _FIELD.match(line)), None)
    if what == "class" and first is not None:
        end = next((i for i in range(first, len(lines)) if not lines[i].strip()), len(lines))
        lines[first:end] = ["", "Attributes:", *(f"    {line}" for line in lines[first:end])]
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if example:
            continue
        parts = _CODE.split(line)
        parts[::2] = [p.replace("*", r"\*").replace("|", r"\|") for p in parts[::2]]
        lines[i] = "".join(parts)


def _signature(app, what, name, obj, options, signature, annotation):
    """A model's own arguments; its base passes them on."""
    if what == "class" and signature == "(*args, **options)":
        return str(inspect.signature(obj)), annotation
    return None


def _list_ops(app, docname, source):
    if docname == "ops/index":
        source[0] = source[0].replace("   OPS\n", "".join(f"   {op}\n" for op in fastreg.ops.__all__))


def _align_usage(app, doctree):
    """A second usage begins below the first."""
    for block in doctree.findall(nodes.literal_block):
        if "sphinx-argparse-cli-wrap" in block["classes"]:
            block[:] = [nodes.Text(re.sub(r"\n +(?=fastreg )", "\n", block.astext()))]


def setup(app):
    app.connect("autodoc-process-docstring", _plain, priority=400)  # before napoleon
    app.connect("source-read", _list_ops)
    app.connect("doctree-read", _align_usage)
    app.connect("autodoc-process-signature", _signature)
