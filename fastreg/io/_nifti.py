"""What SimpleITK does not say of a NIfTI or Analyze image: its two places, its units, values that are no numbers."""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from fastreg._files import Name

from ._geometry import Geometry
from ._reading import Reading, Warn

LPS = np.diag([-1.0, -1.0, 1.0])  # NIfTI's axes are RAS


def _fields(places: dict[str, tuple[str, int]], size: int) -> np.dtype:
    formats, offsets = zip(*places.values(), strict=True)
    return np.dtype({"names": list(places), "formats": formats, "offsets": offsets, "itemsize": size})


NIFTI1 = _fields(
    {
        "size": ("<i4", 0), "dim": ("8<i2", 40), "intent": ("<i2", 68), "kind": ("<i2", 70), "bits": ("<i2", 72),
        "pixdim": ("8<f4", 76), "offset": ("<f4", 108), "scale": ("2<f4", 112), "units": ("u1", 123), "codes": ("2<i2", 252), "quaternion": ("3<f4", 256),
        "shift": ("3<f4", 268), "rows": ("(3,4)<f4", 280), "magic": ("S4", 344),
    },
    348,
)  # fmt: skip
NIFTI2 = _fields(
    {
        "size": ("<i4", 0), "magic": ("S8", 4), "kind": ("<i2", 12), "bits": ("<i2", 14), "dim": ("8<i8", 16),
        "pixdim": ("8<f8", 104), "offset": ("<i8", 168), "scale": ("2<f8", 176), "codes": ("2<i4", 344), "quaternion": ("3<f8", 352),
        "shift": ("3<f8", 376), "rows": ("(3,4)<f8", 400), "units": ("<i4", 500), "intent": ("<i4", 504),
    },
    540,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """version: 0 is Analyze 7.5. order: "<" or ">". kind: of the values, bits of one of them, offset of the first.

    scale: (slope, intercept) of the values, (1, 0): none. stray: an intercept without a slope, which counts for nothing.
    forms: by name, "qform" and "sform", those that it has: (3, 4), voxel (x, y, z) -> mm, LPS.
    """

    version: int
    order: str
    kind: int
    bits: int
    offset: int
    dim: tuple[int, ...]
    intent: int
    scale: tuple[float, float]
    pixdim: np.ndarray
    unit: float
    forms: dict[str, np.ndarray]
    rough: float
    stray: float = 0.0

    @classmethod
    def of(cls, head: bytes) -> "Header | None":
        """Of a file's first 540 bytes; None: it is none."""
        for layout, versions in ((NIFTI1, (0, 1)), (NIFTI2, (2,))):
            if len(head) < layout.itemsize:
                continue
            orders: tuple[Literal["<", ">"], ...] = ("<", ">")
            for order in orders:
                raw = np.frombuffer(head, layout.newbyteorder(order), 1)[0]
                magic = bytes(raw["magic"])
                version = versions[-1] if magic[:3] in (b"n+1", b"ni1", b"n+2", b"ni2") else versions[0]
                if raw["size"] == layout.itemsize and 1 <= raw["dim"][0] <= 7 and raw["bits"] > 0:
                    return cls._of(raw, version, order)
        return None

    @classmethod
    def _of(cls, raw: Any, version: int, order: str) -> "Header":
        pixdim = np.asarray(raw["pixdim"], dtype=np.float64)
        dim = tuple(int(n) for n in raw["dim"][1 : 1 + raw["dim"][0]])
        codes = raw["codes"] if version else (0, 0)
        unit = {1: 1e3, 3: 1e-3}.get(int(raw["units"]) & 7, 1.0) if version else 1.0
        forms, rough = {}, 0.0
        if codes[0] > 0:
            quaternion = np.asarray(raw["quaternion"], dtype=np.float64)
            forms["qform"], rough = _qform(quaternion, np.asarray(raw["shift"], dtype=np.float64), pixdim)
        if codes[1] > 0:
            forms["sform"] = np.asarray(raw["rows"], dtype=np.float64)
        forms = {name: LPS @ form * unit for name, form in forms.items()}
        kind, bits, offset, intent = (int(raw[name]) for name in ("kind", "bits", "offset", "intent"))
        slope, intercept = (float(v) for v in raw["scale"])
        scaled = version and math.isfinite(slope) and slope != 0
        scale = (slope, intercept) if scaled else (1.0, 0.0)
        stray = intercept if version and not scaled and math.isfinite(intercept) else 0.0
        return cls(version, order, kind, bits, offset, dim, intent, scale, pixdim, unit, forms, rough, stray)


def _qform(quaternion: np.ndarray, shift: np.ndarray, pixdim: np.ndarray) -> tuple[np.ndarray, float]:
    """((3, 4) RAS, radians that the rotation may be off for what single precision keeps of the quaternion)."""
    b, c, d = quaternion
    rest = 1 - b * b - c * c - d * d
    if rest < 1e-7:  # as in nifti1_io: half a turn
        b, c, d = quaternion / math.sqrt(1 - rest)
        rest = 0.0
    a = math.sqrt(rest)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    sizes = np.abs(np.where(pixdim[1:4] == 0, 1.0, pixdim[1:4]))  # as in nifti1_io and nibabel
    sizes[2] *= -1 if pixdim[0] < 0 else 1
    return np.column_stack([rotation * sizes, shift]), 2.5e-7 / max(a, 3e-4)


# Files


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


def packed(path: Path) -> bool:
    """Whether a file is gzip's, whatever its name is."""
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def opened(path: Path) -> IO[bytes]:
    """What a file holds, unpacked where it is packed."""
    function: Callable[..., Any] = gzip.open if packed(path) else open
    return function(path, "rb")


def header_of(path: Path) -> Header | None:
    """Of a NIfTI or Analyze image; None: it is none."""
    files = _nifti_files(path)
    if files is None:
        return None
    try:
        with opened(files[0]) as stream:
            return Header.of(stream.read(540))
    except (OSError, EOFError, zlib.error):
        return None


def not_finite(path: Path, header: Header) -> int:
    """How many values of a NIfTI or Analyze image are NaN or infinite; EOFError where it is cut short.

    SimpleITK reads both without a word, as zeros, so the bytes have to be looked at.
    """
    return sum(int(np.count_nonzero(bad)) for bad in _not_finite(path, header))


def where_not_finite(path: Path, header: Header) -> np.ndarray:
    """The same as bool of each value, in the order of the file."""
    return np.concatenate(list(_not_finite(path, header)))


def _not_finite(path: Path, header: Header) -> Iterator[np.ndarray]:
    files = _nifti_files(path)
    assert files is not None
    missing = math.prod(header.dim) * header.bits // 8
    with opened(files[1]) as stream:
        stream.read(header.offset)
        dtype = {16: f"{header.order}f4", 64: f"{header.order}f8"}.get(header.kind)
        while block := stream.read(1 << 22):
            if dtype and missing > 0:
                values = np.frombuffer(block[:missing], dtype, min(len(block), missing) // (header.bits // 8))
                yield ~np.isfinite(values)
            missing -= len(block)
    if missing > 0:
        raise EOFError


# Where it lies


def grid_of(form: np.ndarray, size: tuple[int, ...]) -> Geometry:
    """The grid of (nd, nd + 1), voxel (x, y, z) -> mm, whose axes need not be at right angles."""
    spacing = np.linalg.norm(form[:, :-1], axis=0)
    direction = form[:, :-1] / np.where(spacing > 0, spacing, 1)
    numbers = spacing, form[:, -1], direction.ravel()
    return Geometry(size, *(tuple(n.tolist()) for n in numbers))


def _invertible(form: np.ndarray) -> bool:
    lengths = np.linalg.norm(form[:, :3], axis=0)
    return bool(np.isfinite(form).all() and np.abs(np.linalg.det(form[:, :3])) > 1e-6 * np.prod(lengths) > 0)


def chosen(path: Name, header: Header, reading: Reading, warn: Warn) -> np.ndarray | None:
    """The form (3, 4) that says where an image lies; None: it does not say. Warns of what others may read differently."""
    if not header.version:
        warn(
            f"{path}: Analyze 7.5 does not say where the image lies, nor which side is left: taken as SimpleITK does"
        )
        return None
    forms = header.forms
    if header.unit != 1:
        unit = "metres" if header.unit > 1 else "microns"
        warn(
            f"{path}: its header is in {unit}, and read as such; tools that do not look (nibabel) take it for mm"
        )
    if (header.pixdim[1 : 1 + min(3, len(header.dim))] <= 0).any() and set(forms) != {"sform"}:
        sizes = ", ".join(f"{v:g}" for v in header.pixdim[1:4])
        warn(f"{path}: voxel sizes (pixdim) must be positive, got {sizes}: read without the sign, 0 as 1")
    if not forms:
        warn(
            f"{path}: does not say where it lies (qform and sform codes are 0): taken as SimpleITK does, from 0 along the axes"
        )
        return None
    if (
        len(forms) == 2
        and (usable := {n: f for n, f in forms.items() if _invertible(f)})
        and len(usable) == 1
    ):
        (good,) = usable
        warn(
            f"{path}: its {(set(forms) - {good}).pop()} is no place in space, and left out; read by the {good}"
        )
        forms = usable
    if len(forms) == 1:
        return next(iter(forms.values()))
    size = (*header.dim, 1, 1)[:3]
    grids = {name: grid_of(form, size) for name, form in forms.items()}
    apart = grids["qform"].apart(grids["sform"])
    extent = float(np.linalg.norm(np.multiply(size, grids["qform"].spacing)))
    if not apart > 1e-3 * min(grids["qform"].spacing) + header.rough * extent:
        return forms["sform"]
    if reading.affine_source == "qform":
        warn(
            f"{path}: its qform and its sform place it differently, by {apart:.3g} mm; read by the qform, --affine-source sform takes the other"
        )
    return forms[reading.affine_source]
