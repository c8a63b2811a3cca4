"""What FORMATS says is what the page prints."""

from pathlib import Path

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
