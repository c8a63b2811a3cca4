"""Whether a file holds what it says it holds: its size, the checksums of its streams, what memory it takes.

Readers do not ask: ITK's of MetaImage does not look at what zlib says of the data, that of NRRD stops before the
checksum, and all allocate what a header claims before they miss the data.
"""

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastreg import _memory
from fastreg._files import InputError, require_regular

from ._nifti import _nifti_files, header_of, packed
from ._sitk import silent_stderr, sitk

BLOCK = 1 << 20
DEFLATE = 1032  # no stream of zlib or gzip holds more bytes for one of its own


@dataclass
class Data:
    """Where the voxels of a file are: files, each from an offset on. coding: raw, deflate (zlib, gzip), other."""

    files: list[tuple[Path, int]]
    coding: str


def check(path: Path) -> None:
    """Of a file to be read as an image: before memory is taken for it.

    Raises:
        InputError: its header claims more than the files hold, or than memory does; a file of its data is none.
        EOFError, zlib.error, RuntimeError, OSError: damaged.
    """
    data = _data(path)
    for file, _ in data.files if data else ():
        require_regular(file)
    claimed, needed = _claims(path)
    if data is not None and data.coding != "other":
        holds = sum(max(0, file.stat().st_size - offset) for file, offset in data.files)
        # What a stream begins and ends with, and a header of its own, count for nothing.
        most = DEFLATE * holds + 4096 if data.coding == "deflate" else holds
        if claimed > most:
            raise InputError(
                f"{path}: cut short, or damaged: its header claims {claimed} bytes of voxels, and {holds} are there"
            )
    free = _memory.available()
    if free is not None and needed > free:
        raise InputError(
            f"{path}: an image of {claimed / 1e9:.2f} GB needs {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free"
        )
    if data is not None and data.coding == "deflate" and not isinstance(data, Nifti):
        if sum(_inflated(file, offset) for file, offset in data.files) < claimed:
            raise EOFError


def require_streams(path: Path) -> None:
    """Of an image that another library reads: EOFError, zlib.error where a file of gzip is not what its checksum says."""
    for file in dict.fromkeys((path, *(_nifti_files(path) or ()))):
        if packed(file):
            _inflated(file, 0)


def require_written(path: Path, image: Any) -> None:
    """That a file holds the image: not all writers notice that the disk is full.

    Raises: EOFError, zlib.error, RuntimeError, OSError: it does not.
    """
    itk = sitk()
    data = _data(path)
    if data is None or data.coding == "other":
        with silent_stderr():
            again = itk.ReadImage(str(path))
        lossy = path.suffix.lower() in (".jpg", ".jpeg")
        ours, read = (itk.GetArrayViewFromImage(one) for one in (image, again))
        if path.suffix.lower() == ".bmp" and read.ndim > ours.ndim:  # a palette of greys
            read = read[..., 0]
        if not (lossy or np.array_equal(ours, read, equal_nan=ours.dtype.kind == "f")):
            raise EOFError
        return
    values = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel()
    wanted = values * image.GetSizeOfPixelComponent()
    deflate = data.coding == "deflate"
    if wanted > sum(_inflated(*file) if deflate else file[0].stat().st_size - file[1] for file in data.files):
        raise EOFError


def _claims(path: Path) -> tuple[int, int]:
    """Bytes of the voxels in the file, and of memory to read them: as an image, and as an array."""
    itk = sitk()
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    with silent_stderr():
        reader.ReadImageInformation()
    values = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
    bits = int((re.search(r"(\d+)-bit", kind) or (0, "64"))[1])
    needed = 2 * values * bits // 8
    if reader.HasMetaDataKey("bitpix"):  # NIfTI: what is scaled is read as floats
        bits, kinds = (int(float(reader.GetMetaData(f))) for f in ("bitpix", "datatype"))
        if kinds in (32, 128, 1792, 2304):  # complex, RGB, RGBA: those bits hold all components
            values //= reader.GetNumberOfComponents()
    return values * bits // 8, needed


def _inflated(path: Path, offset: int) -> int:
    """How many bytes are in the zlib or gzip stream that begins there; zlib.error, EOFError: not what its checksum says."""
    total = 0
    with open(path, "rb") as stream:
        stream.seek(offset)
        piece = stream.read(BLOCK)
        while True:
            inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
            while not inflate.eof:
                if not piece and not (piece := stream.read(BLOCK)):
                    raise EOFError
                total += len(inflate.decompress(piece, BLOCK))
                piece = inflate.unconsumed_tail
            piece = inflate.unused_data or stream.read(BLOCK)
            if piece[:2] != b"\x1f\x8b":  # no further member of a gzip file
                return total


# Where formats have their data


def _data(path: Path) -> Data | None:
    return _meta(path) or _nrrd(path) or _nifti(path) or _plain(path)


class Nifti(Data):
    """Whose streams are looked at with their values."""


def _nifti(path: Path) -> Data | None:
    files = _nifti_files(path)
    if files is None:
        return None
    for file in files:
        require_regular(file)
    header = header_of(path)
    begin = max(352, header.offset) if header is not None and files[0] == files[1] else 0
    return Nifti([(files[1], 0 if packed(files[1]) else begin)], "deflate" if packed(files[1]) else "raw")


def _lines(stream: IO[bytes], most: int = 10000) -> Iterator[str]:
    for _ in range(most):
        line = stream.readline(1 << 16)
        if not line:
            return
        yield line.decode("latin-1").rstrip("\r\n")


def _meta(path: Path) -> Data | None:
    """MetaImage: its data in itself, in one file or in several."""
    with open(path, "rb") as stream:
        if path.suffix.lower() not in (".mha", ".mhd") and not stream.read(10) == b"ObjectType":
            return None
        stream.seek(0)
        fields = {}
        for line in _lines(stream):
            key, _, value = line.partition("=")
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
        named = fields.get("ElementDataFile", "")
        if not named:  # cut within its header
            return None
        if named.upper() == "LOCAL":
            files = [(path, stream.tell())]
        elif named.split(" ")[0].upper() == "LIST":
            files = [(path.parent / line.strip(), 0) for line in _lines(stream) if line.strip()]
        elif "%" in named:
            return Data([(path.parent / name, 0) for name in _numbered(named)], "other")
        else:
            files = [(path.parent / named, 0)]
    if fields.get("BinaryData", "True")[:1] not in "Tt1":
        return Data(files, "other")
    return Data(files, "deflate" if fields.get("CompressedData", "F")[:1] in "Tt1" else "raw")


def _nrrd(path: Path) -> Data | None:
    with open(path, "rb") as stream:
        if stream.read(7) != b"NRRD000":
            return None
        fields, files = {}, []
        for line in _lines(stream):
            key, _, value = line.partition(":")
            if not line:
                break
            fields[key.strip().lower().replace(" ", "")] = value.strip()
            if key.strip().lower().replace(" ", "") == "datafile" and value.split()[:1] == ["LIST"]:
                files = [(path.parent / name.strip(), 0) for name in _lines(stream) if name.strip()]
        here = stream.tell()
    named = fields.get("datafile")
    if named is None:
        files = [(path, here)]
    elif not files:
        files = [(path.parent / name, 0) for name in (_numbered(named) if "%" in named else [named])]
    coding = fields.get("encoding", "").lower()
    skips = any(fields.get(f, "0") not in ("0", "-1") for f in ("lineskip", "byteskip"))
    deflate = coding in ("gzip", "gz") and not skips
    return Data(files, "deflate" if deflate else "raw" if coding == "raw" and not skips else "other")


def _plain(path: Path) -> Data | None:
    """GIPL, MRC and legacy VTK, whose readers take what is in memory for what is not in the file."""
    name = path.name.lower()
    if not name.endswith((".gipl", ".gipl.gz", ".mrc", ".rec", ".vtk")):
        return None
    if packed(path):
        return Data([(path, 0)], "deflate")
    begin = 256
    with open(path, "rb") as stream:
        head = stream.read(4096)
    if name.endswith((".mrc", ".rec")):
        begin = 1024 + int.from_bytes(head[92:96], "little" if head[212:213] != b"\x11" else "big")
    if name.endswith(".vtk"):
        data = re.search(rb"\n(LOOKUP_TABLE|VECTORS|TENSORS|NORMALS|COLOR_SCALARS|FIELD)[^\n]*\n", head)
        if data is None or head.split(b"\n")[2].strip().upper() != b"BINARY":
            return Data([(path, 0)], "other")
        begin = data.end()
    return Data([(path, begin)], "raw")


def _numbered(text: str) -> list[str]:
    """`slice%03d.raw 1 9 2`: files by number."""
    form, *numbers = text.split()
    try:
        first, last, *step = (int(n) for n in numbers[:3])
        return [form % n for n in range(first, last + 1, step[0] if step else 1)][:100_000]
    except (ValueError, TypeError) as error:
        raise EOFError from error
