"""What SimpleITK does not say of a NIfTI or Analyze image."""

import gzip
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


def _nifti_files(path: Path) -> tuple[Path, Path] | None:
    """(header, data) of a NIfTI or Analyze image, one file or two; None: it is none."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return path, path
    stem = path.name[:-3] if name.endswith(".gz") else path.name
    stem, suffix = os.path.splitext(stem)
    if suffix.lower() not in (".hdr", ".img"):
        return None
    found = []
    for wanted in (".hdr", ".img"):
        wanted = wanted.upper() if suffix.isupper() else wanted
        files = [path.with_name(stem + wanted + gz) for gz in ("", ".gz", ".GZ")]
        found += [file for file in files if file.exists()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def not_finite(path: Path, image: Any) -> int:
    """How many values of a NIfTI or Analyze image are NaN or infinite; EOFError where it is cut short.

    SimpleITK reads both without a word, as zeros, so the bytes have to be looked at.
    """
    files = _nifti_files(path)
    if files is None:
        return 0
    fields = ("vox_offset", "bitpix", "datatype")
    offset, bits, kind = (int(float(image.GetMetaData(f))) if image.HasMetaDataKey(f) else 0 for f in fields)
    missing = math.prod(image.GetSize()) * image.GetNumberOfComponentsPerPixel() * bits // 8
    bad = 0
    header, data = ((gzip.open if f.name.lower().endswith(".gz") else open, f) for f in files)
    with header[0](header[1], "rb") as stream:
        order = "<" if int.from_bytes(stream.read(4), "little") in (348, 540) else ">"
    with data[0](data[1], "rb") as stream:
        stream.read(offset)
        dtype = {16: f"{order}f4", 64: f"{order}f8"}.get(kind)
        while block := stream.read(1 << 22):
            if dtype and missing > 0:
                values = np.frombuffer(block[:missing], dtype, min(len(block), missing) // (bits // 8))
                bad += values.size - int(np.count_nonzero(np.isfinite(values)))
            missing -= len(block)
    if missing > 0:
        raise EOFError
    return bad
