"""`fastreg convert`."""

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, error, images, nibabel, points, ras, save, xyz

from fastreg import cli, convert, io


def run(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.fixture
def nifty(tmp_path):
    array = xyz((U + points(FIXED)) * FLIP)[:, :, :, None]
    return save(tmp_path / "def.nii.gz", array, ras(FIXED), code=1007, name="NREG_TRANS", p1=0)


def test_says_what_it_recognised_and_converts(tmp_path, nifty, capsys):
    assert run(nifty, tmp_path / "out.nii.gz", "--to", "itk") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "recognised  NiftyReg deformation (RAS positions, mm), 22x18x14"
    assert said[1].startswith(f"written to  {tmp_path / 'out.nii.gz'} (displacements in mm, LPS")
    u, own = io.read_displacement(tmp_path / "out.nii.gz")
    assert own.matches(FIXED)
    assert error(u) < 0.2
    # Of what a format may hold, what this file does.
    assert run(nifty, tmp_path / "again.nii.gz", "--to", "niftyreg") == 0
    assert "again.nii.gz (displacements in mm, RAS; " in capsys.readouterr().out
    assert run(nifty, tmp_path / "quiet.nii.gz", "--quiet") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "to", ["itk", "fsl", "freesurfer", "niftyreg", "mrtrix", "learn2reg", "voxelmorph", "surfa"]
)
def test_to_each_and_back(tmp_path, nifty, to, capsys):
    fixed, moving = images(tmp_path)
    one = ("learn2reg", "voxelmorph")  # they count voxels of one grid
    other = fixed if to in one else moving
    assert run(nifty, tmp_path / "a.nii.gz", "--to", to, "--moving", other) == 0
    source = ["--from", to] if to in (*one, "mrtrix") else []
    like = ["--like", fixed] if to in one else []
    back = ["--moving", other, *source, *like]
    assert run(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", *back) == 0
    assert capsys.readouterr().err == ""
    assert error(io.read_displacement(tmp_path / "b.nii.gz")[0]) < 0.2
    moved = ["apply", tmp_path / "a.nii.gz"]
    if to not in one:
        field = ["--field", str(tmp_path / "a.nii.gz"), str(moving), *source, "-o", str(tmp_path / "o")]
        assert cli.main([moved[0], *field]) == 0
        result, _ = io.read_image(tmp_path / "o" / "moved.nii.gz")
        truth, _ = io.read_image(fixed)
        inside = result > result.min()
        assert np.median(np.abs(result - truth)[inside]) < 0.2


def test_refuses(tmp_path, nifty, capsys):
    out = tmp_path / "out.nii.gz"
    fixed, _ = images(tmp_path)
    for arguments, message in (
        ([nifty], "convert takes a transform and the file to make"),
        ([nifty, out, "--to", "dipy"], "DIPY write_mapping is not written"),
        ([nifty, out, "--to", "other"], "format must be one of itk"),
        ([nifty, tmp_path / "out.txt"], "itk must be written as"),
        ([nifty, out, "--from", "itk"], "says that it is niftyreg"),
        ([nifty, out, "--to", "fsl"], "give --moving MOVING"),
        ([nifty, nifty, "--force"], "is an input, and the output would replace it"),
        ([nifty, fixed], "exists; give another name, or --force"),
        ([fixed, out], "must be a displacement field"),
        ([tmp_path / "none.nii.gz", out], "no such file"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not out.exists()
    assert run(nifty, fixed, "--force") == 0


def test_undefined_voxels_go_to_what_can_say_so(tmp_path, capsys):
    array = (U + points(FIXED)) * FLIP
    array[:2] = np.nan
    path = save(tmp_path / "m.nii.gz", xyz(array), ras(FIXED))
    assert run(path, tmp_path / "o.nii.gz", "--from", "mrtrix") == 2
    assert "not defined in 792 of 5544 voxels, and itk cannot say so (mrtrix can)" in capsys.readouterr().err
    assert run(path, tmp_path / "o.nii.gz", "--from", "mrtrix", "--to", "mrtrix") == 0
    assert np.isnan(nibabel.load(tmp_path / "o.nii.gz").get_fdata()).sum() == 3 * 792
    _, moving = images(tmp_path)
    io.write_landmarks(tmp_path / "p.csv", FIXED.to_physical([[0.0, 5, 5], [5, 6, 7]]))
    field = ["--field", str(path), str(moving), "--from", "mrtrix", "--points", str(tmp_path / "p.csv")]
    assert cli.main(["apply", *field, "-o", str(tmp_path / "applied")]) == 0
    assert "1 of 2 points lie where" in capsys.readouterr().err
    moved, _ = io.read_image(tmp_path / "applied" / "moved.nii.gz")
    assert (moved[:2] == io.read_image(moving)[0].min()).all()
    rows = (tmp_path / "applied" / "points.csv").read_text().splitlines()
    assert rows[1] == "nan,nan,nan"
    assert "nan" not in rows[2]


def test_a_list_with_one_that_does_not_say(tmp_path):
    """--from is for the field; the matrix says what it is."""
    import SimpleITK as sitk

    path = save(tmp_path / "m.nii.gz", xyz((U + points(FIXED)) * FLIP), ras(FIXED))
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(tmp_path / "t.tfm"))
    files = [path, tmp_path / "t.tfm"]
    u, _, what = convert.read_transform(files, format="mrtrix")
    assert what.startswith("MRtrix deformation")
    assert np.abs(u[0].movedim(0, -1).double().numpy() @ FIXED.matrix.T - U - (1, 2, 3)).max() < 1e-4
    with pytest.raises(io.InputError, match="niftyreg was asked for"):
        convert.read_transform(files, format="niftyreg")
