"""What a user may choose of how files are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastreg._files import InputError

Warn = Callable[[str], object]


def ignore(message: str) -> None:
    """A Warn for those who do not want to know."""


# Field: (its values, the first one is the default; what --help says).
CHOICES = {
    "affine_source": (
        ("qform", "sform"),
        "where a NIfTI image lies, if its header says two things: qform (as SimpleITK and ANTs), sform (as nibabel and FSL)",
    ),
    "tilt": (
        ("refuse", "resample"),
        "DICOM slices that are shifted against each other evenly (gantry tilt): refuse, or resample on a straight grid",
    ),
    "nan": (
        ("refuse", "mask"),
        "NaN and infinity in the images of a pair: refuse, or mask: such voxels count nothing",
    ),
    "landmarks_space": (
        ("file", "LPS", "RAS", "voxel"),
        "what the numbers of landmarks and points are: as their file says, and LPS (mm) where it does not; LPS, RAS (mm); "
        "voxel: the index in their own image, x y z",
    ),
}


@dataclass(frozen=True)
class Reading:
    """How files are read: one for all files of a command, of a Case or of a training. The flags of the command line, by name.

    affine_source: "qform" or "sform", of a NIfTI image whose two do not agree. tilt: "refuse" or "resample", of a
    DICOM series whose slices are sheared. landmarks_space: "file", "LPS", "RAS" or "voxel", of landmarks and points.
    nan: "refuse" or "mask", of images of a pair. InputError for other values.
    """

    affine_source: str = "qform"
    tilt: str = "refuse"
    landmarks_space: str = "file"
    nan: str = "refuse"

    def __post_init__(self) -> None:
        for name, (values, _) in CHOICES.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Reading":
        """From fields by name; those that are not given, or None, are the defaults. InputError for unknown ones."""
        given = dict(given or {})
        unknown = given.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(
                f"reading must be of {', '.join(f.name for f in fields(cls))}, got {min(map(str, unknown))!r}"
            )
        return cls(**{name: value for name, value in given.items() if value is not None})
