"""DICOM files: what kind each is, and the slices that it holds."""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastreg._files import InputError
from fastreg._refusals import Missing

from ._sitk import sitk

# SOP classes that hold no slices of a scan: what they are. A name that ends in "." begins several.
NO_IMAGES = {
    "1.2.840.10008.1.3.10": "a DICOMDIR, an index (give the folder of a series)",
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT structure set",
    "1.2.840.10008.5.1.4.1.1.481.": "an RT plan or record",
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.104.": "a document",
    "1.2.840.10008.5.1.4.1.1.66.": "a segmentation or registration (convert it to NIfTI first, with dcmqi or 3D Slicer)",
    "1.2.840.10008.5.1.4.1.1.66": "raw data",
    "1.2.840.10008.5.1.4.1.1.9.": "a waveform",
    "1.2.840.10008.5.1.4.1.1.4.2": "a spectrum",
}
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"


@dataclass(frozen=True)
class Slice:
    """axes (2, 3): directions of a row and a column; position (3,), mm; None: it does not say. spacing: x, y, mm, or None."""

    file: str
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    position: np.ndarray | None
    axes: np.ndarray | None
    tags: dict[str, str] = field(default_factory=dict)
    frame: int = 0

    def __getitem__(self, tag: str) -> str:
        return self.tags.get(tag, "").strip()

    @property
    def uid(self) -> str:
        return self["0020|000e"]

    def beside(self, other: "Slice") -> bool:
        """Whether both can be slices of one volume."""
        if (self.uid, self.size) != (other.uid, other.size):
            return False
        frames = (
            self["0020|0052"],
            other["0020|0052"],
        )  # positions of two frames of reference have nothing to do with each other
        if all(frames) and frames[0] != frames[1]:
            return False
        for name, off in (("spacing", 1e-4), ("axes", 1e-3)):
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None) or (a is not None and not np.allclose(a, b, rtol=off, atol=off)):
                return False
        return True


def number(text: str) -> float:
    """Infinity where it is none."""
    try:
        return float(text)
    except ValueError:
        return np.inf


def _vector(text: str, n: int) -> np.ndarray | None:
    values = np.array([number(v) for v in text.split("\\")])
    return values if values.shape == (n,) and np.isfinite(values).all() else None


def sop_class(file: str) -> str | None:
    """Of a DICOM file, "" where it does not say; None: not one, or one without the preamble."""
    return _of_header(file, b"\x02\x00\x02\x00UI")


def _of_header(file: str, tag: bytes) -> str | None:
    with open(file, "rb") as stream:
        head = stream.read(1024)
    if head[128:132] != b"DICM":
        return None
    # The file's own header is explicit little endian whatever the rest is, and at its beginning.
    begin = head.find(tag, 132)
    if begin < 0:
        return ""
    length = int.from_bytes(head[begin + 6 : begin + 8], "little")
    return head[begin + 8 : begin + 8 + length].decode("ascii", "replace").strip("\0 ")


def unreadable(file: str) -> str:
    """What to say of a file that GDCM does not read."""
    if os.path.getsize(file) == 0:
        return f"{file}: is empty"
    syntax = _of_header(file, b"\x02\x00\x10\x00UI") or ""
    packed = syntax.startswith("1.2.840.10008.1.2.")
    packed = packed and syntax not in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
    more = (
        f", or packed in a way that is not supported (transfer syntax {syntax}): unpack it, with gdcmconv --raw"
        if packed
        else ""
    )
    return f"{file}: is no DICOM image that can be read, or damaged{more}"


def no_image(class_: str) -> str | None:
    """What files of a SOP class hold instead of an image; None: an image, as far as we know."""
    if class_ == DOSE:
        return None
    names = [name for name in NO_IMAGES if class_ == name or (name[-1] == "." and class_.startswith(name))]
    return NO_IMAGES[max(names, key=len)] if names else None


def _axes(directions: np.ndarray, file: str) -> np.ndarray:
    axes = directions.reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(axes[0] @ axes[1]) > 1e-2:
        raise InputError(f"{file}: its rows and columns (ImageOrientationPatient) are not at right angles")
    row = axes[0] / lengths[0]
    column = axes[1] - (axes[1] @ row) * row
    return np.array([row, column / np.linalg.norm(column)])


def slices_of(file: str) -> list[Slice]:
    """The slices of a file; none where GDCM cannot read it. InputError where they are no scan; Missing: needs pydicom."""
    reader = sitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return []
    tags = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    size, spacing = tuple(reader.GetSize()), reader.GetSpacing()[:2]
    if "MOSAIC" in tags.get("0008|0008", ""):
        raise InputError(
            f"{file}: a Siemens mosaic, slices side by side in one picture: convert it to NIfTI, with dcm2niix"
        )
    position, directions = _vector(tags.get("0020|0032", ""), 3), _vector(tags.get("0020|0037", ""), 6)
    axes = None if directions is None else _axes(directions, file)
    if len(size) > 2 and size[2] > 1:
        if tags.get("0008|0016", "").strip("\0 ") == DOSE and position is not None and axes is not None:
            offsets = _vector(tags.get("3004|000c", ""), size[2])
            if offsets is not None:
                positions = position + (offsets - offsets[0])[:, None] * np.cross(axes[0], axes[1])
                return [Slice(file, size[:2], spacing, p, axes, tags, k) for k, p in enumerate(positions)]
        return _frames(file, size, tags)
    if (said := _vector(tags.get("0028|0030", ""), 2)) is not None:
        spacing = (float(said[1]), float(said[0]))  # GDCM makes 1 of 0
    elif spacing == (1.0, 1.0):
        spacing = None  # nobody said so
    if position is None or axes is None:
        position = axes = None
    return [Slice(file, size[:2], spacing, position, axes, tags)]


def _frames(file: str, size: tuple[int, ...], tags: dict[str, str]) -> list[Slice]:
    """The frames of an enhanced multi-frame file, whose places stand in sequences."""
    try:
        import pydicom
    except ImportError as error:
        raise Missing("pydicom", f"{file}: reading DICOM of many frames") from error
    data = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    shared = data.get("SharedFunctionalGroupsSequence") or [None]
    frames = data.get("PerFrameFunctionalGroupsSequence") or []
    if len(frames) != size[2]:
        raise InputError(f"{file}: {size[2]} frames that do not say where they lie: a film, not a volume")

    def first(frame: Any, sequence: str, name: str) -> Any:
        """A value of a functional group, of this frame's or of all."""
        for group in (frame, shared[0]):
            items = None if group is None else group.get(sequence)
            if items and items[0].get(name) is not None:
                return items[0].get(name)
        return None

    found, rescales = [], set()
    for k, frame in enumerate(frames):
        position = first(frame, "PlanePositionSequence", "ImagePositionPatient")
        directions = first(frame, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = first(frame, "PixelMeasuresSequence", "PixelSpacing")
        if position is None or directions is None or spacing is None:
            raise InputError(f"{file}: {size[2]} frames, of which number {k + 1} does not say where it lies")
        content = "FrameContentSequence"
        own = {
            "0020|0012": first(frame, content, "FrameAcquisitionNumber"),
            "0020|9128": first(frame, content, "TemporalPositionIndex"),
            "0020|9056": first(frame, content, "StackID"),
            "0018|0081": first(frame, "MREchoSequence", "EffectiveEchoTime"),
            "0018|9087": first(frame, "MRDiffusionSequence", "DiffusionBValue"),
            "0018|1060": first(frame, "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
            "0018|0050": first(frame, "PixelMeasuresSequence", "SliceThickness"),
            "0020|0013": k + 1,
        }
        for kind in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
            if (value := first(frame, kind, "FrameType")) is not None:
                own["0008|0008"] = "\\".join(value)
        own = {tag: str(value) for tag, value in own.items() if value is not None}
        # GDCM takes the first frame's for all.
        sequence = "PixelValueTransformationSequence"
        rescales.add((first(frame, sequence, "RescaleSlope"), first(frame, sequence, "RescaleIntercept")))
        axes = _axes(np.array(directions, dtype=np.float64), file)
        xy = (float(spacing[1]), float(spacing[0]))
        position = np.array(position, dtype=np.float64)
        found.append(Slice(file, (size[0], size[1]), xy, position, axes, {**tags, "0018|0050": "", **own}, k))
    if len(rescales) > 1:
        raise InputError(
            f"{file}: its frames are scaled differently (RescaleSlope): convert it to NIfTI, with dcm2niix"
        )
    return found


def suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()
