"""What a file is by what it holds, whatever its name says; and what to do where we do not read it."""

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._nifti import Header

READ = ""  # SimpleITK reads it, under its own name
TRANSFORM = "no image; apply it with fastreg apply --field, or turn it into a field with fastreg convert"


@dataclass(frozen=True)
class Kind:
    """name: with its article. todo: what a user can do, READ where SimpleITK reads it. suffixes: of files of this kind."""

    name: str
    todo: str
    suffixes: tuple[str, ...] = ()


def _starts(*begins: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(begins)


def _text(pattern: str) -> Callable[[bytes], bool]:
    compiled = re.compile(pattern.encode(), re.I | re.S)
    return lambda head: compiled.match(head.lstrip(b"\xef\xbb\xbf \t\r\n")) is not None


def _nifti(version: int) -> Callable[[bytes], bool]:
    def is_it(head: bytes) -> bool:
        header = Header.of(head)
        return header is not None and header.version == version

    return is_it


def _cifti(head: bytes) -> bool:
    header = Header.of(head)
    return header is not None and header.version == 2 and 3000 <= header.intent < 3100


# (whether a file's first bytes, unpacked from gzip, are of it, the kind): the first that is counts.
KINDS: list[tuple[Callable[[bytes], bool], Kind]] = [
    (_cifti, Kind("a CIFTI file", "it holds surfaces, not an image")),
    (_nifti(1), Kind("NIfTI-1", READ, (".nii", ".nii.gz", ".hdr", ".img", ".img.gz", ".hdr.gz"))),
    (_nifti(2), Kind("NIfTI-2", "save it as NIfTI-1, or install nibabel to read it")),
    (_nifti(0), Kind("Analyze 7.5", READ, (".hdr", ".hdr.gz"))),
    (lambda h: h[128:132] == b"DICM", Kind("a DICOM file", READ, (".dcm", ".ima", ".dicom"))),
    (_starts(b"version https://git-lfs"), Kind("a git-lfs pointer, not the file itself", "fetch it: git lfs pull")),
    (_text(r"(\.\./)*\.git/annex/objects|/annex/objects"), Kind("a git-annex pointer, not the file itself", "fetch it: git annex get")),
    (_text(r"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype\s+)?html"), Kind("a web page", "the download went wrong; its text may say why")),
    (_text(r"<\?xml.*<gifti"), Kind("a GIFTI surface", "it is no image")),
    (_text(r"<\?xml.*<vtkfile"), Kind("a VTK file", "save it as .nii.gz or .mha")),
    (_text(r"<\?xml|<[a-z]+[ >]"), Kind("an XML file", "it is no image; perhaps a failed download")),
    (_text(r"\{\s*\""), Kind("a JSON file", "it is no image; is the image beside it meant?")),
    (_starts(b"#Insight Transform File"), Kind("an ITK transform", TRANSFORM, (".tfm", ".txt"))),
    (_text(r"\(Transform "), Kind("an elastix transform", TRANSFORM)),
    (lambda h: b"Transform_" in h[:80] and h[:1] in b"\0\n", Kind("an ITK transform (ANTs .mat)", TRANSFORM)),
    (_text(r"([-+\d.e]+[ \t]+){3}[-+\d.e]+\s+([-+\d.e]+\s+){11}[-+\d.e]+\s*$"), Kind("a matrix of 4x4 numbers (FSL .mat?)", TRANSFORM)),
    (_text(r"(#[^\n]*\n\s*)*type\s*=\s*[01]\b"), Kind("a FreeSurfer transform (.lta)", TRANSFORM)),
    (_starts(b"MATLAB 5.0"), Kind("a MATLAB file", "save the image as .nii.gz")),
    (_starts(b"mrtrix image"), Kind("an MRtrix image", "convert it: mrconvert IN.mif OUT.nii.gz")),
    (_starts(b"mrtrix tracks", b"TRACK\0"), Kind("a file of fibre tracks", "it is no image")),
    (_starts(b"\x93NUMPY"), Kind("a NumPy array", "it does not say where it lies: save it as .nii.gz with its spacing")),
    (_starts(b"\x89HDF\r\n\x1a\n"), Kind("an HDF5 file", "a transform of ITK goes to fastreg apply --field; save an image as .nii.gz")),
    (_starts(b"CDF\x01", b"CDF\x02"), Kind("a MINC-1 or netCDF file", "convert it: mnc2nii, or mincconvert -2")),
    (_text(r"type\s*=\s*(string|integer|float)-attribute"), Kind("an AFNI header", "convert it: 3dAFNItoNIFTI")),
    (_starts(b"NRRD000"), Kind("a NRRD image", READ, (".nrrd", ".nhdr"))),
    (_text(r"(ObjectType|NDims|Comment)\s*="), Kind("a MetaImage", READ, (".mha", ".mhd"))),
    (_starts(b"# vtk DataFile"), Kind("a VTK file", READ, (".vtk",))),
    (_starts(b"\x89PNG\r\n"), Kind("a PNG picture", READ, (".png",))),
    (_starts(b"\xff\xd8\xff"), Kind("a JPEG picture", READ, (".jpg", ".jpeg"))),
    (_starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), Kind("a TIFF picture", READ, (".tif", ".tiff"))),
    (_starts(b"BM"), Kind("a BMP picture", READ, (".bmp",))),
    (_starts(b"GIF8"), Kind("a GIF picture", "save it as .png")),
    (_starts(b"%PDF"), Kind("a PDF document", "it is no image")),
    (_starts(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), Kind("a Python pickle", "it is not read, for it could run anything: save the image as .nii.gz")),
    (_starts(b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"), Kind("an archive", "unpack it first")),
    (lambda h: h[257:262] == b"ustar", Kind("a tar archive", "unpack it first")),
    (lambda h: len(h) > 284 and h[:4] == b"\0\0\0\x01" and h[20:24] in (b"\0\0\0\0", b"\0\0\0\x01", b"\0\0\0\x03", b"\0\0\0\x04", b"\0\0\0\x0a"),
     Kind("FreeSurfer MGH", "convert it: mri_convert IN.mgz OUT.nii.gz, or install nibabel to read it")),
    (lambda h: not h.strip(b"\0"), Kind("nothing but zeros", "it was not copied whole")),
]  # fmt: skip


def _zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return Kind("a zip archive that is damaged", "copy it again")
    if any(name.endswith(".npy") for name in names):
        todo = "they do not say where they lie: save the image as .nii.gz with its spacing"
        return Kind(f"a NumPy archive of {', '.join(n[:-4] for n in names[:6])}", todo)
    if any(name.endswith("data.pkl") for name in names):
        return Kind("a PyTorch file", "it is no image (fastreg apply --weights takes checkpoints)")
    return Kind("a zip archive", "unpack it first")


def recognise(path: Path) -> Kind | None:
    """What a file that exists holds; None: not known."""
    with open(path, "rb") as stream:
        head = stream.read(4096)
    if not head:
        return Kind("empty", "it was not copied or written whole")
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        try:
            with gzip.open(path, "rb") as inside:
                head = inside.read(4096)
        except (OSError, EOFError, zlib.error):
            return Kind("packed by gzip, and damaged or cut short", "copy it again")
    return next((kind for is_it, kind in KINDS if is_it(head)), None)


def refusal(path: Path) -> str:
    """The message for a file that could not be read: what it is, and what to do."""
    kind = recognise(path)
    if kind is None:
        return f"{path}: not an image SimpleITK can read, or damaged"
    name = path.name.lower()
    if kind.todo:
        return f"{path}: is {kind.name}: {kind.todo}"
    if not name.endswith(kind.suffixes):
        return f"{path}: is {kind.name} under another name: rename it to end in {kind.suffixes[0]}"
    return f"{path}: is {kind.name} that SimpleITK cannot read, or damaged"
