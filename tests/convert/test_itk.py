"""ITK: fields as images, matrices, lists and composites of both, in ANTs' order."""

import h5py
import numpy as np
import pytest
import torch
from convert.scene import (
    FIXED,
    MOVING,
    U,
    error,
    field,
    grid,
    images,
    mm,
    points,
    ras,
    save,
    sitk,
    turned,
    voxels,
    xyz,
)

from fastreg import cli, convert, io

MATRIX = turned((0.05, -0.08, 0.06)) * 1.03
AFFINE = sitk.AffineTransform(MATRIX.ravel().tolist(), (4.0, -3.0, 2.0))
AFFINE.SetCenter((6.0, 28.0, 14.0))


def affine(p):
    """LPS, by its definition."""
    c = np.array([6.0, 28.0, 14.0])
    return (p - c) @ MATRIX.T + c + (4.0, -3.0, 2.0)


def as_image(vectors, geometry):
    made = sitk.GetImageFromArray(np.asarray(vectors, dtype=np.float64), isVector=True)
    made.SetSpacing(geometry.spacing)
    made.SetOrigin(geometry.origin)
    made.SetDirection(geometry.direction)
    return made


def as_transform(vectors=U, geometry=FIXED):
    return sitk.DisplacementFieldTransform(as_image(vectors, geometry))


def ants(folder):
    """The two files of antsRegistration."""
    save(folder / "a_1Warp.nii.gz", xyz(U)[:, :, :, None], ras(FIXED), code=1007)
    sitk.WriteTransform(AFFINE, str(folder / "a_0GenericAffine.mat"))
    return folder / "a_1Warp.nii.gz", folder / "a_0GenericAffine.mat"


BOTH = affine(points(FIXED) + U) - points(FIXED)


@pytest.mark.parametrize("suffix", ["nii.gz", "mha", "nrrd", "h5"])
def test_fields(tmp_path, suffix):
    path = tmp_path / f"f.{suffix}"
    if suffix == "h5":
        sitk.WriteTransform(as_transform(), str(path))
    else:
        sitk.WriteImage(as_image(U, FIXED), str(path))
    u, own, what = convert.read_transform(path)
    assert own.matches(FIXED)
    assert what == "ITK displacement field (LPS, mm), 22x18x14"
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert error(-u) > 2
    with pytest.raises(io.InputError, match=r"learn2reg was asked for"):
        convert.read_transform(path, format="learn2reg", like=FIXED)


def test_both_of_ants_in_their_order(tmp_path):
    warp, matrix = ants(tmp_path)
    told = []
    u, own, what = convert.read_transform([warp, matrix], warn=told.append)
    assert what == "ITK displacement field (LPS, mm), 22x18x14, then ITK AffineTransform"
    assert told == []
    assert own.matches(FIXED)
    assert np.abs(mm(u) - BOTH).max() < 1e-4
    # the other order is something else, and needs a grid
    with pytest.raises(
        io.InputError, match=r"0GenericAffine.mat: ITK AffineTransform comes first .* --like FIXED"
    ):
        convert.read_transform([matrix, warp])
    other, _, _ = convert.read_transform([matrix, warp], like=FIXED)
    assert np.abs(mm(other) - BOTH).max() > 0.5
    for order in ([warp, matrix], [matrix, warp]):
        got, _, _ = convert.read_transform(order, like=FIXED)
        composite = sitk.CompositeTransform(3)
        for path in reversed(order):
            composite.AddTransform(AFFINE if path == matrix else as_transform(U))
        p = FIXED.to_physical([[5.0, 6.0, 7.0]])[0]
        expected = np.array(composite.TransformPoint(p.tolist())) - p
        assert np.allclose(mm(got)[5, 6, 7], expected, atol=1e-4)


def test_several_matrices_after_a_field(tmp_path):
    warp, matrix = ants(tmp_path)
    rigid = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (3.0, -2.0, 1.0))
    sitk.WriteTransform(rigid, str(tmp_path / "r.tfm"))
    u, _, _ = convert.read_transform([warp, matrix, tmp_path / "r.tfm"])
    for index in ([0, 0, 0], [13, 17, 21], [5, 6, 7]):
        p = FIXED.to_physical(index)
        end = rigid.TransformPoint(affine(p + U[tuple(index)]).tolist())
        assert np.allclose(p + mm(u)[tuple(index)], end, atol=1e-4)


def test_a_warp_without_the_matrix_beside_it_is_told(tmp_path):
    warp, matrix = ants(tmp_path)
    told = []
    convert.read_transform(warp, warn=told.append)
    assert len(told) == 1
    assert "a_0GenericAffine.mat beside it was not given" in told[0]
    assert "a_1Warp.nii.gz a_0GenericAffine.mat" in told[0]
    warp.rename(tmp_path / "a_1InverseWarp.nii.gz")
    told.clear()
    convert.read_transform(tmp_path / "a_1InverseWarp.nii.gz", warn=told.append)
    assert "a_0GenericAffine.mat,1 a_1InverseWarp.nii.gz" in told[0]
    matrix.unlink()
    told.clear()
    convert.read_transform(tmp_path / "a_1InverseWarp.nii.gz", warn=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("warp", "matrix"), [("sub_Warp.nii.gz", "sub_Affine.txt"), ("warp.nii.gz", "affine.mat")]
)
def test_so_is_one_of_old_ants_and_of_greedy(tmp_path, warp, matrix):
    save(tmp_path / warp, xyz(U)[:, :, :, None], ras(FIXED), code=1007)
    (tmp_path / matrix).write_text("")
    told = []
    convert.read_transform(tmp_path / warp, warn=told.append)
    assert len(told) == 1
    assert matrix in told[0]


@pytest.mark.parametrize("suffix", ["mat", "tfm", "txt"])
def test_a_matrix_alone(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    sitk.WriteTransform(AFFINE, str(path))
    u, own, _ = convert.read_transform(path, like=FIXED)
    assert own == FIXED
    assert np.abs(mm(u) - (affine(points(FIXED)) - points(FIXED))).max() < 1e-4
    with pytest.raises(io.InputError, match=r"--like FIXED"):
        convert.read_transform(path)
    for spelling in (f"{path},1", f"[{path},1]"):
        back, _, what = convert.read_transform(spelling, like=FIXED)
        assert what == "ITK AffineTransform (inverted)"
        assert np.allclose(affine(points(FIXED) + mm(back)), points(FIXED), atol=1e-4)
    assert torch.equal(convert.read_transform(f"[{path},0]", like=FIXED)[0], u)


def test_a_singular_matrix_has_no_inverse(tmp_path):
    flat = sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0])
    sitk.WriteTransform(flat, str(tmp_path / "flat.tfm"))
    with pytest.raises(io.InputError, match="is singular and has no inverse"):
        convert.read_transform(f"{tmp_path / 'flat.tfm'},1", like=FIXED)


def test_a_spline_is_one_more_step(tmp_path):
    warp, _ = ants(tmp_path)
    spline = sitk.BSplineTransformInitializer(as_image(U, FIXED), [4, 4, 4])
    spline.SetParameters(np.random.default_rng(0).normal(size=len(spline.GetParameters())).tolist())
    sitk.WriteTransform(spline, str(tmp_path / "s.tfm"))
    u, _, what = convert.read_transform([warp, tmp_path / "s.tfm"])
    assert what.endswith("then ITK BSplineTransform")
    p = FIXED.to_physical([7, 8, 9])
    assert np.allclose(p + mm(u)[7, 8, 9], spline.TransformPoint((p + U[7, 8, 9]).tolist()), atol=1e-4)
    with pytest.raises(io.InputError, match="only a matrix can be inverted"):
        convert.read_transform(f"{tmp_path / 's.tfm'},1", like=FIXED)


def test_the_inverse_of_a_field_is_not_made_up(tmp_path):
    warp, _ = ants(tmp_path)
    sitk.WriteTransform(as_transform(), str(tmp_path / "w.h5"))
    for path in (warp, tmp_path / "w.h5"):
        with pytest.raises(io.InputError, match=r"only a matrix can be inverted by ',1'"):
            convert.read_transform(f"{path},1", like=FIXED)


def test_legacy_ants_and_other_matrices(tmp_path):
    """Text of old ANTs; a rigid transform, a translation."""
    (tmp_path / "a.txt").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 1 2 3\nFixedParameters: 0 0 0\n"
    )
    assert np.allclose(mm(convert.read_transform(tmp_path / "a.txt", like=FIXED)[0]), (1, 2, 3), atol=1e-5)
    rigid = sitk.Euler3DTransform((6.0, 28.0, 14.0), 0.1, -0.05, 0.2, (1.0, 2.0, 3.0))
    for transform in (rigid, sitk.TranslationTransform(3, (1.0, 2.0, 3.0))):
        sitk.WriteTransform(transform, str(tmp_path / "t.tfm"))
        u, _, _ = convert.read_transform(tmp_path / "t.tfm", like=FIXED)
        p = FIXED.to_physical([3, 4, 5])
        assert np.allclose(p + mm(u)[3, 4, 5], transform.TransformPoint(p.tolist()), atol=1e-4)


def write_h5(path, groups, number):
    """By h5py, as ANTs (float) and SimpleITK (double) write it. groups: (type, parameters, fixed), the last one applied first."""
    text = h5py.string_dtype("ascii")
    with h5py.File(path, "w") as file:
        file.create_dataset("HDFVersion", data=["1.12"], dtype=text)
        file.create_dataset("ITKVersion", data=["5.3"], dtype=text)
        kind = {"f4": "float", "f8": "double"}[number]
        composite = file.create_group("TransformGroup/0")
        composite.create_dataset("TransformType", data=[f"CompositeTransform_{kind}_3_3"], dtype=text)
        for k, (name, parameters, fixed) in enumerate(groups, 1):
            group = file.create_group(f"TransformGroup/{k}")
            group.create_dataset("TransformType", data=[f"{name}_{kind}_3_3"], dtype=text)
            group.create_dataset("TransformParameters", data=np.asarray(parameters, number))
            group.create_dataset("TransformFixedParameters", data=np.asarray(fixed, "f8"))


def h5_field(vectors, geometry):
    fixed = [*geometry.size, *geometry.origin, *geometry.spacing, *geometry.direction]
    return "DisplacementFieldTransform", np.asarray(vectors).ravel(), fixed


H5_AFFINE = "AffineTransform", [*MATRIX.ravel(), 4.0, -3.0, 2.0], (6.0, 28.0, 14.0)


@pytest.mark.parametrize("number", ["f4", "f8"])
def test_composite_h5(tmp_path, number):
    write_h5(tmp_path / "c.h5", [H5_AFFINE, h5_field(U, FIXED)], number)
    u, own, what = convert.read_transform(tmp_path / "c.h5")
    assert what == "ITK displacement field (LPS, mm), 22x18x14, then ITK AffineTransform"
    assert own.matches(FIXED)
    assert np.abs(mm(u) - BOTH).max() < 1e-4


def test_composite_of_two_fields(tmp_path):
    """The inner one covers some of where the first leads: ITK moves nothing beyond it."""
    inner = grid((12, 11, 9), (2.0, 2.0, 2.5), (0.3, 0.0, -0.1), (2.0, 27.0, 17.0))
    second = np.full((*inner.shape, 3), (2.0, -3.0, 1.0))
    write_h5(tmp_path / "c.h5", [h5_field(second, inner), h5_field(U, FIXED)], "f8")
    told = []
    u, own, what = convert.read_transform(tmp_path / "c.h5", warn=told.append)
    assert own.matches(FIXED)
    assert what.count("ITK displacement field") == 2
    middle = points(FIXED) + U
    index = inner.to_index(middle)
    inside = ((index >= -0.5) & (index < np.array(inner.shape) - 0.5)).all(-1)
    assert 0.05 < inside.mean() < 0.5
    assert len(told) == 1
    assert "lies beyond its grid" in told[0]
    expected = U + np.where(inside[..., None], (2.0, -3.0, 1.0), 0)
    assert np.abs(mm(u) - expected).max() < 1e-4
    # and points through the chain
    chain = convert.read_chain(tmp_path / "c.h5")
    start = points(FIXED)[4:9, 5:12:3, 3:20:4].reshape(-1, 3)
    assert np.allclose(chain.map(start), start + expected[4:9, 5:12:3, 3:20:4].reshape(-1, 3), atol=1e-6)


def test_points_beyond_the_first_grid_go_as_its_border(tmp_path):
    warp, matrix = ants(tmp_path)
    chain = convert.read_chain([warp, matrix])
    far = FIXED.to_physical([[7.0, 8.0, 90.0]])
    assert np.allclose(chain.map(far), affine(far + U[7, 8, 21]), atol=1e-4)
    assert np.allclose(convert.read_chain(matrix, like=FIXED).map(far), affine(far), atol=1e-9)


def test_a_field_that_does_not_reach_the_image(tmp_path):
    away = io.Geometry(FIXED.size, FIXED.spacing, (500.0, 0.0, 0.0), FIXED.direction)
    sitk.WriteImage(as_image(U, away), str(tmp_path / "away.mha"))
    with pytest.raises(io.InputError, match=r"away.mha: .* does not reach the image"):
        convert.read_transform(tmp_path / "away.mha", like=FIXED)
    with pytest.raises(io.InputError, match=r"away.mha: .* does not reach the image"):
        convert.read_transform([*ants(tmp_path), tmp_path / "away.mha"])


def test_on_another_grid(tmp_path):
    warp, _ = ants(tmp_path)
    small = io.Geometry((8, 7, 6), (2.0, 2.0, 2.0), tuple(FIXED.to_physical([4, 4, 4])), FIXED.direction)
    u, own, _ = convert.read_transform(warp, like=small)
    assert own == small
    assert np.abs(mm(u, small) - field(points(small))).max() < 0.1  # linear between its voxels


def test_other_dimensions(tmp_path):
    flat = sitk.AffineTransform(2)
    sitk.WriteTransform(flat, str(tmp_path / "flat.tfm"))
    warp, _ = ants(tmp_path)
    for arguments in (
        {"paths": [warp, tmp_path / "flat.tfm"]},
        {"paths": tmp_path / "flat.tfm", "like": FIXED},
    ):
        with pytest.raises(io.InputError, match="must have one dimension"):
            convert.read_transform(**arguments)
    plane = io.Geometry((9, 8), (1.5, 2.0), (3.0, 4.0), (0.8, -0.6, 0.6, 0.8))
    flow = torch.randn(1, 2, 8, 9)
    for suffix in ("nii.gz", "mha", "h5"):
        convert.write_transform(tmp_path / f"flat.{suffix}", flow, plane)
        again, own, _ = convert.read_transform(tmp_path / f"flat.{suffix}")
        assert own.matches(plane)
        assert torch.allclose(again, flow, atol=1e-5)


def test_integers_colours_and_nan_are_no_fields(tmp_path):
    for dtype in (np.uint8, np.int16, np.uint16):
        whole = sitk.GetImageFromArray(np.ones((*FIXED.shape, 3), dtype), isVector=True)
        for suffix in ("nii.gz", "mha", "nrrd"):
            sitk.WriteImage(whole, str(tmp_path / f"w.{suffix}"))
            with pytest.raises(io.InputError, match="must hold floating-point numbers"):
                convert.read_transform(tmp_path / f"w.{suffix}")
    pixels = sitk.GetImageFromArray(np.zeros((8, 9, 3), np.uint8), isVector=True)
    sitk.WriteImage(pixels, str(tmp_path / "w.png"))
    with pytest.raises(io.InputError, match="must be a displacement field"):
        convert.read_transform(tmp_path / "w.png")
    bad = U.copy()
    bad[3, 4, 5] = np.nan
    for suffix in ("nii.gz", "mha", "h5"):
        path = tmp_path / f"n.{suffix}"
        write = (sitk.WriteTransform, as_transform) if suffix == "h5" else (sitk.WriteImage, as_image)
        write[0](write[1](bad, FIXED), str(path))
        with pytest.raises(io.InputError, match="must be finite"):
            convert.read_transform(path)


def test_colours_of_nrrd_are_no_field(tmp_path):
    """Of floating-point numbers too, where the header says what they are."""
    header = "NRRD0004\ntype: float\ndimension: 4\nspace: left-posterior-superior\nsizes: 3 2 2 2\n"
    header += "space directions: none (1,0,0) (0,1,0) (0,0,1)\nkinds: RGB-color domain domain domain\n"
    header += "endian: little\nencoding: raw\nspace origin: (0,0,0)\n\n"
    (tmp_path / "c.nrrd").write_bytes(header.encode() + np.ones(24, "<f4").tobytes())
    with pytest.raises(io.InputError, match="is a colour image"):
        convert.read_transform(tmp_path / "c.nrrd")


def test_h5_is_written_as_a_transform(tmp_path):
    for function in (io.write_displacement, convert.write_transform):
        path = tmp_path / f"{function.__name__}.h5"
        function(path, voxels(), FIXED)
        transform = sitk.ReadTransform(str(path))
        assert transform.GetName() == "DisplacementFieldTransform"
        for index in ([1, 2, 3], [7, 8, 9]):
            p = FIXED.to_physical(index)
            assert np.allclose(transform.TransformPoint(p.tolist()), p + U[tuple(index)], atol=1e-4)
        assert error(convert.read_transform(path)[0]) < 0.2


@pytest.mark.parametrize("name", ["x.tfm", "x.png", "x.tif", "x.hdr", "x.vtk", "x", "x.mat", "x.npy"])
def test_suffixes_that_nobody_reads_as_a_field(tmp_path, name):
    with pytest.raises(io.InputError, match=r"written as .nii.gz, .nii, .mha, .nrrd"):
        io.write_displacement(tmp_path / name, voxels(), FIXED)
    with pytest.raises(io.InputError, match=r"itk must be written as"):
        convert.write_transform(tmp_path / name, voxels(), FIXED)
    assert list(tmp_path.iterdir()) == []


def test_an_image_in_h5_is_no_transform(tmp_path):
    sitk.WriteImage(as_image(U, FIXED), str(tmp_path / "i.h5"))
    assert error(convert.read_transform(tmp_path / "i.h5")[0]) < 0.2
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(FIXED.shape)), str(tmp_path / "s.h5"))
    with pytest.raises(io.InputError, match="must be a displacement field"):
        convert.read_transform(tmp_path / "s.h5")


def test_damaged_transforms(tmp_path):
    warp, matrix = ants(tmp_path)
    sitk.WriteTransform(as_transform(), str(tmp_path / "w.h5"))
    for path in (warp, matrix, tmp_path / "w.h5"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(io.InputError, match=str(path)):
            convert.read_transform(path, like=FIXED)
    (tmp_path / "empty.tfm").write_text("")
    with pytest.raises(io.InputError, match="is no transform of ITK"):
        convert.read_transform(tmp_path / "empty.tfm")
    with pytest.raises(io.InputError, match="no such file"):
        convert.read_transform(tmp_path / "none.mat")


def test_without_nibabel(tmp_path, monkeypatch):
    """ITK's own fields need SimpleITK alone; others say what is missing."""
    warp, _ = ants(tmp_path)
    other = save(tmp_path / "n.nii.gz", xyz(U)[:, :, :, None], ras(FIXED), code=1007, name="NREG_TRANS", p1=1)
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    assert error(convert.read_transform(warp)[0]) < 0.2
    with pytest.raises(ImportError, match="needs nibabel"):
        convert.read_transform(other)


def test_apply_takes_a_list(tmp_path, capsys):
    fixed, moving = images(tmp_path)
    warp, matrix = ants(tmp_path)
    io.write_landmarks(tmp_path / "p.csv", FIXED.to_physical([[5.0, 6.0, 7.0], [7.3, 8.2, 9.1]]))
    truth = sitk.CompositeTransform([AFFINE, as_transform()])
    arguments = ["--points", str(tmp_path / "p.csv"), "--force", "-o", str(tmp_path / "out")]
    lists = ["--field", str(warp), str(matrix), str(moving)], [str(moving), "--field", str(warp), str(matrix)]
    for given in lists:
        assert cli.main(["apply", *given, *arguments]) == 0
        assert (
            "recognised  ITK displacement field (LPS, mm), 22x18x14, then ITK Aff" in capsys.readouterr().out
        )
        moved, own = io.read_image(tmp_path / "out" / "moved.nii.gz")
        assert own.matches(FIXED)
        expected = sitk.GetArrayFromImage(
            sitk.Resample(
                sitk.ReadImage(str(moving)), sitk.ReadImage(str(fixed)), truth, sitk.sitkLinear, -1.0
            )
        )
        assert np.abs(moved - expected)[expected != -1].max() < 1e-2
        got = io.read_landmarks(tmp_path / "out" / "points.csv", 3)
        for start, end in zip(io.read_landmarks(tmp_path / "p.csv", 3), got, strict=True):
            assert np.allclose(truth.TransformPoint(start.tolist()), end, atol=1e-4)
    assert cli.main(["apply", "--field", f"{matrix},1", str(moving), "--like", str(fixed), *arguments]) == 0
    assert "(inverted)" in capsys.readouterr().out


def test_invert_takes_a_list(tmp_path, capsys):
    _, moving = images(tmp_path)
    warp, matrix = ants(tmp_path)
    out = tmp_path / "inverse.nii.gz"
    assert cli.main(["invert", str(warp), str(matrix), "-o", str(out), "--like", str(moving)]) == 0
    assert "then ITK AffineTransform" in capsys.readouterr().out
    _, own = io.read_displacement(out)
    assert own.matches(MOVING)
    chain = convert.read_chain([warp, matrix])
    start = FIXED.to_physical([[7.0, 8.0, 9.0], [5.0, 10.0, 12.0]])
    back = convert.read_chain(out).map(chain.map(start))
    assert np.abs(back - start).max() < 0.1
    assert cli.main(["invert", str(warp), "-o", str(out), "--force"]) == 0
    assert "beside it was not given" in capsys.readouterr().err


def test_what_leads_out_of_the_image_is_told(tmp_path, capsys):
    _, moving = images(tmp_path)
    warp, _ = ants(tmp_path)
    for shift, status, text in ((20.0, 0, "% of the result lie inside"), (200.0, 2, "leads nowhere into")):
        sitk.WriteTransform(sitk.TranslationTransform(3, (shift, 0.0, 0.0)), str(tmp_path / "t.tfm"))
        files = [str(warp), str(tmp_path / "t.tfm")]
        assert (
            cli.main(["apply", "--field", *files, str(moving), "-o", str(tmp_path / "o"), "--force"])
            == status
        )
        assert text in capsys.readouterr().err
        out = str(tmp_path / "out.mha")
        assert cli.main(["convert", *files, out, "--moving", str(moving), "--force"]) == status
        assert text in capsys.readouterr().err
