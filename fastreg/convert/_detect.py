"""What a file says it is."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from fastreg._files import InputError, require_regular
from fastreg._refusals import Missing
from fastreg.io._sitk import silent_stderr, sitk

from . import _nifti, dicom

# Of formats whose files do not say; "": others that we do not know may be meant as well.
VOXELS = frozenset({"learn2reg", "voxelmorph"})
FOUR = VOXELS | {"mrtrix"}
HDF5 = b"\x89HDF\r\n\x1a\n"
SUFFIXES: dict[str, str | frozenset[str]] = {
    ".mgz": "mgz",
    ".mgh": "mgz",
    ".m3z": "m3z",
    ".lta": "lta",
    ".npz": VOXELS,
    ".x5": "x5",
}
NUMBER = rb"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
MATRIX = re.compile(rb"\s*(?:#[^\n]*\n\s*)*" + rb"\s+".join([NUMBER] * 16) + rb"\s*$")


def names_of(path: Path) -> frozenset[str]:
    """The names of the formats that a file may be of; one where it says so itself. InputError: none."""
    if path.is_dir():
        return frozenset({_of_folder(path)})
    require_regular(path)
    found = _of_bytes(path) or _of_name(path)
    return found if isinstance(found, frozenset) else frozenset({found})


def _of_folder(path: Path) -> str:
    if any((path / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup")):
        return "ome-zarr"
    raise InputError(f"{path}: is a folder; give the file of a transform")


def _head(path: Path) -> bytes:
    with open(path, "rb") as stream:
        head = stream.read(8192)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path, "rb") as stream:
                return stream.read(8192)
        except (OSError, EOFError, zlib.error):
            return b""
    return head


def _of_bytes(path: Path) -> str | frozenset[str] | None:
    head = _head(path)
    if head.startswith(HDF5):
        if b"X5" in head and b"Format" in head:
            return "x5"
        return "itk-transform" if _has_transform(path) else "itk"
    if head.startswith(b"#Insight Transform File") or _matlab(head):
        return "itk-transform"
    if head[128:132] == b"DICM":
        sop = str(dicom.dataset(path).get("SOPClassUID"))
        known = {dicom.DEFORMABLE: "dicom", "1.2.840.10008.5.1.4.1.1.66.1": "dicom-matrix"}
        if sop in known:
            return known[sop]
        raise InputError(f"{path}: is a DICOM file, but no Deformable Spatial Registration")
    for start, name in (
        (b"MGH_GPUIT_BSP", "plastimatch"),
        (b"mrtrix image", "mif"),
        (b"MNI Transform", "xfm"),
    ):
        if head.startswith(start):
            return name
    if re.search(rb'^\s*(\(Transform\s+|Transform\s*=\s*)"', head, re.M):
        return "elastix"
    if re.match(rb"(?:#[^\n]*\n\s*)*type\s*=\s*\d", head):
        return "lta"
    return frozenset({"ras-matrix", ""}) if MATRIX.match(head) else None


def _matlab(head: bytes) -> bool:
    """Whether it is a MATLAB 4 matrix with the name of an ITK transform."""
    return bool(re.match(rb"[A-Za-z0-9]+_(?:double|float)_\d_\d\0", head[20:84]))


def _has_transform(path: Path) -> bool:
    # An ITK image in HDF5 has a group ITKImage and none of this name.
    with open(path, "rb") as stream:
        return b"TransformGroup" in stream.read(1 << 16)


def _of_name(path: Path) -> str | frozenset[str]:
    name = path.name.lower()
    for suffix, known in SUFFIXES.items():
        if name.endswith(suffix):
            return known
    if name.endswith((".mat", ".tfm", ".txt")):
        raise InputError(f"{path}: is no transform of ITK, nor one that is recognised")
    if name.endswith((".nii", ".nii.gz", ".hdr", ".img", ".img.gz")):
        return _of_nifti(path)
    return "itk"


def _of_nifti(path: Path) -> str | frozenset[str]:
    try:
        image = _nifti.load(path)
    except Missing:
        return _without_nibabel(path)
    code, name, _ = _nifti.intent(image)
    shape = image.shape
    size = "x".join(map(str, shape))
    if name.startswith("NREG"):
        return "niftyreg"
    if code in (1007, 1006):
        if len(shape) != 5:
            raise InputError(
                f"{path}: NIfTI intent {code} says vectors, whose shape must be (X, Y, Z, 1, 3), got {size}"
            )
        if code == 1006:
            return "freesurfer"
        known = {"": "itk", "Mapping": "spm", "Velocity": "spm-flow"}
        return known.get(name, frozenset({"itk", ""}))
    if code == 2006:
        return "fsl"
    if code in (2007, 2008, 2009, 2016):
        return "fsl-coefficients"
    if shape[3:] == (3, 2):
        return "dipy"
    if len(shape) == 4 and shape[3] == 3 and code == 0:
        return FOUR
    if shape[3:] == (1, 3) and code == 0:
        return frozenset({"spm", ""})
    raise InputError(
        f"{path}: must be a displacement field, and is none that is recognised: {size}, NIfTI intent {code}"
    )


def _without_nibabel(path: Path) -> str:
    """Of SimpleITK's metadata: the one format that can be read by SimpleITK alone."""
    reader = sitk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with silent_stderr():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: not an image SimpleITK can read, or damaged") from error
    tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    if tags.get("intent_code") == "1007" and not tags.get("intent_name"):
        return "itk"
    raise Missing("nibabel", f"{path}, which is no ITK field,")


def hint(path: Path) -> str:
    """Of a NIfTI image of vectors, what its values look like: for the text of an error."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return ""
    image = _nifti.load(path)
    if len(image.shape) == 5:
        name = _nifti.intent(image)[1]
        return f" (NIfTI calls it {name!r})" if name else " (ITK's fields have NIfTI intent 1007)"
    array = _nifti.values(path, image, undefined=True)
    index = np.stack(np.meshgrid(*map(np.arange, image.shape[:3]), indexing="ij"), -1)
    apart = array - (index @ image.affine[:3, :3].T + image.affine[:3, 3])
    near = np.nanmean(np.abs(apart)) < 0.2 * np.nanmean(np.abs(array))
    return " (its values lie near their own positions in mm, as MRtrix's do)" if near else ""
