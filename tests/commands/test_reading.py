"""What is chosen of how files are read: one record from the flags to where a file is opened."""

import argparse

import pytest

from fastreg.commands.options import add_reading, reading_given, reading_of
from fastreg.io import InputError, Reading
from fastreg.training import Settings
from fastreg.training.settings import merged


def given(*flags):
    parser = argparse.ArgumentParser()
    add_reading(parser)
    return parser.parse_args(flags)


def test_flags_are_fields():
    assert reading_of(given()) == Reading()
    assert reading_of(given("--affine-source", "sform")) == Reading(affine_source="sform")
    assert reading_given(given()) is None
    with pytest.raises(InputError, match="affine_source must be one of qform, sform, got 'best'"):
        Reading(affine_source="best")
    with pytest.raises(InputError, match="reading must be of affine_source"):
        Reading.of({"colour": 3})


def test_a_training_goes_on_as_it_began():
    before = Settings(method="voxelmorph", pairs="p.csv", reading={"affine_source": "sform"}).plain()
    saved = {"settings": before}
    for reading in (None, reading_given(given("--affine-source", "sform"))):
        assert Settings(**merged("run", {"reading": reading}, saved)).reading["affine_source"] == "sform"
    with pytest.raises(
        InputError, match="was started with --affine-source sform, and cannot be resumed with qform"
    ):
        merged("run", {"reading": reading_given(given("--affine-source", "qform"))}, saved)
    older = {name: value for name, value in before.items() if name != "reading"}
    assert Reading.of(merged("run", {}, {"settings": older})["reading"]) == Reading()
