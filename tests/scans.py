"""Made-up scans: DICOM series written with pydicom."""

from pathlib import Path

import numpy as np

CT = "1.2.840.10008.5.1.4.1.1.2"
SHAPE, SPACING = (10, 9, 8), (2.5, 1.5, 1.25)  # (z, y, x)


def values(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def dataset(pixels, **tags):
    """A slice, or what tags say it is; a tag that is None is left out."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    first = {
        "SOPClassUID": CT, "SOPInstanceUID": generate_uid(), "Modality": "CT", "PatientName": "phantom", "PatientID": "phantom",
        "StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 1, "RescaleSlope": 1, "RescaleIntercept": 0,
    }  # fmt: skip
    if pixels is not None:
        first |= {
            "Rows": pixels.shape[-2],
            "Columns": pixels.shape[-1],
            "PixelData": pixels.astype("<i2").tobytes(),
        }
    for name, value in {**first, **tags}.items():
        if value is not None:
            setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return data


def save(data, path):
    data.save_as(path, enforce_file_format=True)


def series(
    folder, array=None, *, keep=None, step=(0, 0, SPACING[0]), origin=(-10.0, 5.0, 30.0),
    orientation=(1, 0, 0, 0, 1, 0), positions=None, prefix="s", each=lambda k: {}, **tags,
):  # fmt: skip
    """A file a slice; keep: those that are there; step: mm from one to the next; each(k): more tags of slice k."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    array = values() if array is None else array
    for k in range(len(array)) if keep is None else keep:
        position = (np.array(origin) + k * np.array(step)) if positions is None else positions[k]
        own = {
            "InstanceNumber": k + 1, "PixelSpacing": [SPACING[1], SPACING[2]], "SliceThickness": SPACING[0],
            "ImagePositionPatient": [f"{v:.10g}" for v in position],
            "ImageOrientationPatient": [f"{v:.10g}" for v in orientation],
            **tags, **each(k),
        }  # fmt: skip
        save(dataset(array[k], **own), folder / f"{prefix}{k:03d}.dcm")
    return array
