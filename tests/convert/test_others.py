"""Formats that are recognised and not read: each says what to do."""

import h5py
import pytest

from fastreg import convert, io

pytest.importorskip("SimpleITK")

MATRIX = "0.99 0.01 0 3\n-0.01 0.99 0 -2.5e0\n0 0 1 1\n0 0 0 1\n"
FILES = [
    (
        "TransformParameters.0.txt",
        '(Transform "BSplineTransform")\n(NumberOfParameters 3)\n',
        "transformix -def all",
    ),
    ("t.txt", '// made by elastix\n\n(Transform "EulerTransform")\n', "transformix -def all -tp t.txt"),
    ("t.toml", 'NumberOfParameters = 3\nTransform = "BSplineTransform"\n', "transformix -def all -tp t.toml"),
    ("bsp.txt", "MGH_GPUIT_BSP <experimental>\nimg_origin = 0 0 0\n", "plastimatch xf-convert"),
    ("flirt.mat", MATRIX, "give --from ras-matrix for one of greedy or"),
    ("aff.txt", "#comment\n" + MATRIX, "is a matrix of 4 x 4 numbers, as FSL flirt"),
    ("a.lta", "type      = 1\nnxforms   = 1\n", "lta_convert --inlta a.lta --outitk"),
    ("a.xfm", "MNI Transform File\nTransform_Type = Linear;\n", "MINC .xfm is not read"),
    ("w.mif", "mrtrix image\n", "mrconvert"),
    ("w.m3z", "anything", "mri_warp_convert"),
    ("w.mgz", "anything", "save the warp as .nii.gz"),
    ("some.txt", "a recipe\n", "is no transform of ITK, nor one that is recognised"),
    ("some.mat", "MATLAB 5.0 MAT-file", "is no transform of ITK, nor one that is recognised"),
]


@pytest.mark.parametrize(("name", "text", "message"), FILES, ids=[f[0] for f in FILES])
def test_is_refused_by_name(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(io.InputError, match=message) as caught:
        convert.read_transform(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_x5(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["Format"] = "X5"
        file.create_group("TransformGroup")
    with pytest.raises(io.InputError, match="NiTransforms X5 is not read"):
        convert.read_transform(tmp_path / "x.h5")


def test_folders(tmp_path):
    with pytest.raises(io.InputError, match="is a folder"):
        convert.read_transform(tmp_path)
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(io.InputError, match=r"OME-Zarr .* is not read"):
        convert.read_transform(tmp_path)


def test_formats_that_are_not_there_or_not_written(tmp_path):
    with pytest.raises(io.InputError, match=r"format must be one of itk, .* got 'nifty'"):
        convert.read_transform(tmp_path / "x", format="nifty")
    with pytest.raises(io.InputError, match=r"elastix .* is not written"):
        convert.require_written("elastix", "x.txt")
