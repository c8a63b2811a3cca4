"""Pairs of scans in files, what a net is given of them, and pairs whose motion is known."""

from .alignment import find_alignment
from .pairs import Case, Pair, Pairs, find_pairs, read_case
from .preprocessing import Preprocessing
from .sample import Sample
from .series import fixed_of_series

__all__ = [
    "Case",
    "Pair",
    "Pairs",
    "Preprocessing",
    "Sample",
    "find_alignment",
    "find_pairs",
    "fixed_of_series",
    "read_case",
]
