"""Scores of a displacement, where a case has landmarks and labels."""

import numpy as np
import pytest
import torch

from fastreg import evaluation
from fastreg.data.pairs import Case
from fastreg.io import Geometry

FIXED = Geometry.of((6, 8, 10), (2.0, 1.0, 1.0))
MOVING = Geometry.of((4, 8, 8), (3.0, 1.5, 1.0))


def case(moving):
    """The fixed landmarks are those of moving, voxels of MOVING, 0.8 mm further in x (the last axis)."""
    images = np.zeros(FIXED.shape), FIXED, np.zeros(MOVING.shape), MOVING
    points = MOVING.to_physical(moving)
    return Case("two", *images, fixed_landmarks=points + np.array([0.8, 0, 0]), moving_landmarks=points)


def test_snapped_errors_are_of_the_moving_images_voxels():
    u = torch.zeros(1, 3, *FIXED.shape)
    voxels = np.array([[1.0, 2, 3], [2, 4, 5]])
    found = evaluation.scores(case(voxels), u)["tre"]
    assert found["after"]["mean"] == pytest.approx(0.8)
    assert found["after"]["per_axis"] == pytest.approx((0, 0, 0.8))
    # Of 1 mm along x: they land on the next one. 3 mm along z do not matter.
    assert found["snapped"]["mean"] == pytest.approx(1)
    u[:, 2] = -0.4
    found = evaluation.scores(case(voxels), u)["tre"]
    assert (found["after"]["max"], found["snapped"]["max"]) == pytest.approx((0.4, 0), abs=1e-6)


def test_landmarks_that_are_no_voxels_are_not_snapped():
    u = torch.zeros(1, 3, *FIXED.shape)
    assert "snapped" not in evaluation.scores(case(np.array([[1.0, 2, 3], [2, 4.3, 5]])), u)["tre"]
    # Rounded to 0.01 mm in a file, they still are.
    assert "snapped" in evaluation.scores(case(np.array([[1.0, 2, 3], [2.003, 4, 5.01]])), u)["tre"]
