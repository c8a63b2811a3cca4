"""What FORMATS says is what the page prints."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch
from convert.scene import nibabel  # noqa: F401

from fastreg import convert

PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"


def test_the_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8")
    _, _, rest = text.partition("test_formats.py -->\n")
    assert rest.partition("<!-- formats end -->")[0].strip() == convert.table().strip()


def test_every_format_is_read_or_says_what_to_do():
    for name, format in convert.FORMATS.items():
        assert format.name == name
        assert format.read or format.instead
        assert bool(format.write) == bool(format.suffixes)


@pytest.mark.parametrize("function", [convert.read_transform, convert.write_transform])
def test_help_names_every_argument_and_its_example_is_true(function):
    doc = inspect.getdoc(function)
    section = re.split(r"^(?:Returns|Raises|Example):$", doc.partition("Args:\n")[2], flags=re.M)[0]
    assert set(inspect.signature(function).parameters) == set(
        re.findall(r"(?:^    |\. )(\w+) \(", section, re.M)
    )
    (test,) = doctest.DocTestFinder(recurse=False).find(function, globs={"torch": torch})
    runner, log = doctest.DocTestRunner(), []
    runner.run(test, out=log.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(log)
