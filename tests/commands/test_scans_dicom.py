"""DICOM: one even volume lies where its positions say, anything else is refused by what it looks like."""

import re
import shutil

import numpy as np
import pytest
import scans

from fastreg import io
from fastreg.cli import main
from fastreg.data.pairs import find_pairs, read_case
from fastreg.io import InputError, Reading

pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")


def read(path, reading=Reading()):
    said = []
    array, grid = io.read_image(path, reading, said.append)
    return array, grid, said


def turned(angle=0.3):
    """Directions of a row and a column, and the normal."""
    c, s = np.cos(angle), np.sin(angle)
    row, column = np.array([c, s, 0]), np.array([-s * c, c * c, s])
    return row, column, np.cross(row, column)


@pytest.mark.parametrize("decimals", [12, 3])
@pytest.mark.parametrize("way", [1, -1])
def test_an_even_series_lies_where_it_says(tmp_path, decimals, way):
    row, column, normal = turned()
    origin, step = np.array([-100.123, 5.5, 30.25]), 0.6249 * way
    positions = [np.round(origin + k * step * normal, decimals) for k in range(10)]
    array = scans.series(
        tmp_path / "a",
        positions=positions,
        orientation=(*row, *column),
        each=lambda k: {"InstanceNumber": 100 - k * 7 % 10},
    )
    if way < 0:  # the other way round: positions count
        array, origin = array[::-1], origin + 9 * step * normal
    again, grid, said = read(tmp_path / "a")
    assert said == []
    np.testing.assert_array_equal(again, array)
    np.testing.assert_allclose(grid.spacing, (1.25, 1.5, 0.6249), atol=1e-3)
    for index in ([0, 0, 0], [9, 0, 0], [3, 8, 7]):
        k, j, i = index
        point = origin + k * 0.6249 * normal + j * 1.5 * column + i * 1.25 * row
        np.testing.assert_allclose(grid.to_physical(index), point, atol=2e-3)


MISSING = [
    ({"keep": [0, 1, 2, 5, 6, 7, 8, 9]}, "slices 4 to 5 of 10 are missing: the step is 2.5 mm but for one of 7.5 mm between z = 35 mm and z = 42.5 mm"),
    ({"keep": [0, 1, 2, 3, 4, 5, 6, 8, 9]}, "slice 8 of 10 is missing: the step is 2.5 mm but for one of 5 mm"),
    ({"keep": [0, 2, 3, 4, 6, 7, 8, 9]}, "slices 2, 6 of 10 are missing"),
    ({"positions": [(0, 0, z) for z in (0, 2.5, 5, 7.5, 10, 12.5, 17.5, 22.5, 27.5, 32.5)]}, "two steps, 2.5 mm and 5 mm, which begins between z = 12.5 mm"),
    ({"positions": [(0, 0, z) for z in (0, 2, 4, 6, 8, 10, 12.5, 15, 17, 19)], "each": lambda k: {"SliceThickness": 2.5 if k > 5 else 2}}, "slices of 2 and 2.5 mm thickness are mixed"),
    ({"positions": [(0, 0, z) for z in (0, 2, 4, 6, 8.3, 10, 12, 14, 16, 19)]}, "not one even step apart: it is 1.7 to 3 mm"),
    ({"positions": [(x, 0, 2 * k) for k, x in enumerate((0, 0, 0, 1, 1, 1, 0, 0, 0, 0))]}, "shifted sideways against each other, unevenly, by up to 1 mm"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "message"), MISSING, ids=[m[:28] for _, m in MISSING])
def test_uneven_slices_are_refused(tmp_path, how, message):
    scans.series(tmp_path / "a", **how)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(tmp_path / "a")
    assert "\n" not in str(error.value)
    assert "an even part of it" in str(error.value)


def test_slightly_uneven_slices_are_read_with_a_word(tmp_path):
    positions = [(0, 0, round(2.5 * k, 2) + (0.01 if k == 4 else 0)) for k in range(10)]
    scans.series(tmp_path / "a", positions=positions)
    assert read(tmp_path / "a")[2] == [
        f"{tmp_path / 'a'}: slices lie up to 0.01 mm off even steps of 2.5 mm, and are read as even"
    ]


def test_positions_of_two_decimals(tmp_path):
    scans.series(tmp_path / "a", positions=[(0, 0, round(0.625 * k, 2)) for k in range(10)])
    _, grid, said = read(tmp_path / "a")
    assert grid.spacing[2] == pytest.approx(0.625, abs=1e-3)
    assert len(said) == 1
    off = [(0, 0, 2.5 * k + (0.08 if k == 4 else 0)) for k in range(10)]
    scans.series(tmp_path / "b", positions=off)
    with pytest.raises(InputError, match=r"slices lie up to 0.08 mm off even steps of 2.5 mm"):
        read(tmp_path / "b")


def texture(points):
    """Linear in the plane, so that linear interpolation is exact; anything along z."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 3 * x - 2 * y + 5 * np.cos(z)


@pytest.mark.parametrize("lean", [0.6, -1.7])
def test_a_tilt_is_refused_or_resampled(tmp_path, lean):
    step, origin = np.array([0.25, lean, 2.5]), np.array([-10.0, 5, 30])
    k, j, i = np.meshgrid(*map(np.arange, scans.SHAPE), indexing="ij")
    points = origin + k[..., None] * step + np.stack([i * 1.25, j * 1.5, 0 * k], -1)
    slope = {"RescaleSlope": 0.01, "RescaleIntercept": -100}
    scans.series(tmp_path / "a", np.round((texture(points) + 100) / 0.01), step=step, **slope)
    angle = np.degrees(np.arctan2(np.hypot(0.25, lean), 2.5))
    with pytest.raises(
        InputError, match=rf"mostly along y.*gantry tilt of {angle:.3g} degrees\); --tilt resample"
    ):
        read(tmp_path / "a")
    array, grid, said = read(tmp_path / "a", Reading(tilt="resample"))
    assert said == []
    assert grid.direction == tuple(np.eye(3).ravel())
    np.testing.assert_allclose(grid.spacing, (1.25, 1.5, 2.5))
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    there = grid.to_physical(index)
    # Within its own slice, half a pixel at the rim aside, a voxel has the value of its place.
    own = there[..., :2] - (origin + index[..., :1] * step)[..., :2]
    inside = ((own > -1e-6) & (own < np.array([7 * 1.25, 8 * 1.5]) + 1e-6)).all(-1)
    assert inside.sum() > 0.7 * np.prod(scans.SHAPE)
    np.testing.assert_allclose(array[inside], texture(there)[inside], atol=0.02)
    # nothing is cut off
    corners = grid.to_index(points.reshape(-1, 3))
    assert grid.contains(corners).all()


def test_a_rounded_direction_is_no_tilt(tmp_path):
    row, column, normal = turned(0.7)
    each = np.round((*row, *column), 3)
    scans.series(tmp_path / "a", orientation=each, step=2.5 * normal)
    _, grid, said = read(tmp_path / "a")
    np.testing.assert_allclose(
        grid.to_physical([9, 0, 0]), np.array([-10, 5, 30]) + 9 * 2.5 * normal, atol=0.05
    )
    assert len(said) <= 1


def two(folder):
    scans.series(folder, scans.values(seed=1), SeriesDescription="first", SeriesNumber=3)
    other = {"SeriesInstanceUID": "1.2.3.9", "SeriesDescription": "second", "SeriesNumber": 2}
    return scans.series(folder, scans.values(seed=2), prefix="t", origin=(0, 0, 0), **other)


def test_one_series_of_two_is_chosen(tmp_path):
    second = two(tmp_path / "a")
    with pytest.raises(InputError) as error:
        read(tmp_path / "a")
    assert "\n" not in str(error.value)
    assert re.search(
        r"holds 2 DICOM series or volumes, choose one, as .*a#1: #1: CT, 'second', 10 slices of 8x9, 1.25 x 1.5 x 2.5 mm, 1.2.3.9; #2: CT, 'first'",
        str(error.value),
    )
    for which in ("1", "1.2.3.9"):
        array, grid, _ = read(f"{tmp_path / 'a'}#{which}")
        np.testing.assert_array_equal(array, second)
        assert grid.origin == (0, 0, 0)
    with pytest.raises(InputError, match="has no #7, but holds 2 DICOM series"):
        read(f"{tmp_path / 'a'}#7")
    with pytest.raises(InputError, match="b#1: no such file"):
        read(f"{tmp_path / 'b'}#1")
    # a name that holds the sign is a name
    shutil.copytree(tmp_path / "a", tmp_path / "c#1")
    with pytest.raises(InputError, match=r"c#1: holds 2"):
        read(tmp_path / "c#1")
    np.testing.assert_array_equal(read(f"{tmp_path / 'c#1'}#1")[0], second)


def test_a_choice_in_a_csv_and_on_the_command_line(tmp_path, capsys):
    two(tmp_path / "a")
    (tmp_path / "pairs.csv").write_text("fixed,moving\na#1,a#1.2.3.4\n")
    (pair,) = find_pairs(tmp_path / "pairs.csv")
    case = read_case(pair)
    assert case.fixed_grid.origin == (0, 0, 0)
    assert case.moving_grid.origin == (-10, 5, 30)
    out = tmp_path / "out"
    assert main(["register", str(tmp_path / "a"), f"{tmp_path / 'a'}#2", "-o", str(out)]) == 2
    assert "choose one" in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("fixed,moving\na#1,b#2\n")
    with pytest.raises(InputError, match="no such file"):
        find_pairs(tmp_path / "pairs.csv")


SERIES_OF_TWO = {
    "acquisitions": lambda v: {"AcquisitionNumber": v + 1},
    "phases": lambda v: {"TemporalPositionIdentifier": v + 1, "AcquisitionNumber": 1},
    "echoes": lambda v: {"EchoNumbers": v + 1},
    "instance numbers": lambda v: {},
}


@pytest.mark.parametrize("kind", SERIES_OF_TWO)
def test_volumes_of_one_series_are_told_apart(tmp_path, kind):
    arrays = [
        scans.series(
            tmp_path / "a", scans.values(seed=v), prefix=f"{1 - v}_",
            each=lambda k, v=v: {"InstanceNumber": 1 + 10 * v + k, **SERIES_OF_TWO[kind](v)},
        )
        for v in (0, 1)
    ]  # fmt: skip
    with pytest.raises(
        InputError, match=r"holds 2 DICOM series or volumes, .*#1: CT, 10 slices.*#2: CT, 10 slices"
    ):
        read(tmp_path / "a")
    for v in (0, 1):
        np.testing.assert_array_equal(read(f"{tmp_path / 'a'}#{v + 1}")[0], arrays[v])
    with pytest.raises(InputError, match="choose one"):
        read(f"{tmp_path / 'a'}#1.2.3.4")


def test_copies_of_files_count_once(tmp_path):
    array = scans.series(tmp_path / "a")
    for k in (2, 3):
        shutil.copy(tmp_path / "a" / f"s{k:03}.dcm", tmp_path / "a" / f"copy{k}.dcm")
    again, _, said = read(tmp_path / "a")
    np.testing.assert_array_equal(again, array)
    assert len(said) == 1
    assert "2 files are copies" in said[0]


def test_a_localizer_or_another_size_is_another_volume(tmp_path):
    scans.series(tmp_path / "a")
    scans.series(tmp_path / "a", keep=[0], prefix="loc", orientation=(1, 0, 0, 0, 0, -1), InstanceNumber=99)
    scans.series(
        tmp_path / "a", scans.values((2, 5, 5)), prefix="small", each=lambda k: {"InstanceNumber": 200 + k}
    )
    with pytest.raises(
        InputError, match=r"holds 3 .*#1: CT, 10 slices of 8x9.*#2: CT, 1 slice of.*#3: CT, 2 slices of 5x5"
    ):
        read(tmp_path / "a")
    assert read(f"{tmp_path / 'a'}#1")[1].size == (8, 9, 10)


def test_what_is_no_slice_is_left_out(tmp_path):
    array = scans.series(tmp_path / "a")
    scans.save(
        scans.dataset(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT"),
        tmp_path / "a" / "rt.dcm",
    )
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    again, _, said = read(tmp_path / "a")
    np.testing.assert_array_equal(again, array)
    assert said == []
    picture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT", "SeriesInstanceUID": "1.2.8"}
    scans.save(scans.dataset(scans.values((30, 30)), **picture), tmp_path / "a" / "dose.dcm")
    assert read(tmp_path / "a")[2] == [
        f"{tmp_path / 'a'}: 1 pictures without a position are left out, such as dose.dcm"
    ]


def cut(folder, k=-1):
    file = sorted(folder.iterdir())[k]
    file.write_bytes(file.read_bytes()[:-40])


def test_what_may_be_a_slice_is_not_left_out(tmp_path):
    scans.series(tmp_path / "a")
    cut(tmp_path / "a")
    with pytest.raises(InputError, match=r"s009.dcm: is no DICOM image that can be read, or damaged"):
        read(tmp_path / "a")
    (tmp_path / "a" / "s009.dcm").write_bytes(b"")
    with pytest.raises(InputError, match=r"s009.dcm: is empty"):
        read(tmp_path / "a")


def test_other_dicom_is_named(tmp_path):
    path = tmp_path / "rt.dcm"
    scans.save(scans.dataset(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT"), path)
    with pytest.raises(InputError, match=r"rt.dcm: is an RT structure set"):
        read(path)
    with pytest.raises(InputError, match="holds no DICOM image, but an RT structure set"):
        read(tmp_path)
    (tmp_path / "study" / "empty").mkdir(parents=True)
    scans.series(tmp_path / "study" / "s1")
    with pytest.raises(InputError, match="holds no DICOM image; give one of the folders in it: s1"):
        read(tmp_path / "study")
    scans.series(tmp_path / "mosaic", ImageType=["ORIGINAL", "PRIMARY", "MOSAIC"])
    with pytest.raises(InputError, match="a Siemens mosaic"):
        read(tmp_path / "mosaic")
    scans.series(tmp_path / "deep" / "1" / "s1")
    with pytest.raises(InputError, match=r"holds no DICOM image; give one of the folders in it: 1/s1"):
        read(tmp_path / "deep")
    io.write_image(
        tmp_path / "study" / "empty" / "ct.nii", np.zeros((3, 3, 3)), io.Geometry.of((3, 3, 3), (1, 1, 1))
    )
    with pytest.raises(InputError, match=r"holds no DICOM image; give the image itself: ct.nii"):
        read(tmp_path / "study" / "empty")
    scans.series(tmp_path / "zero", PixelSpacing=[0, 1])
    with pytest.raises(InputError, match="pixels must have a size, got 1 x 0 mm"):
        read(tmp_path / "zero")
    scans.series(tmp_path / "pixels", PixelSpacing=None)
    with pytest.raises(InputError, match="does not say how large its pixels are"):
        read(tmp_path / "pixels")


def test_slopes_of_each_slice_count(tmp_path):
    array = scans.series(tmp_path / "a", each=lambda k: {"RescaleSlope": 1 if k == 0 else 0.5 + k / 8})
    again = read(tmp_path / "a")[0]
    slopes = np.array([1, *(0.5 + np.arange(1, 10) / 8)])
    np.testing.assert_allclose(again, array * slopes[:, None, None])


def enhanced(folder, depths, **tags):
    import pydicom

    def item(**values):
        data = pydicom.Dataset()
        for name, value in values.items():
            setattr(data, name, value)
        return data

    array = scans.values((len(depths), 9, 8))
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-10, 5, z])],
            FrameContentSequence=[item(TemporalPositionIndex=t, StackID="1")],
        )
        for z, t in depths
    ]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[1.5, 1.25], SliceThickness=2.5)],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-7, RescaleType="US")],
    )
    data = scans.dataset(
        array, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames=len(array), RescaleSlope=None, RescaleIntercept=None,
        PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=[shared], **tags,
    )  # fmt: skip
    folder.mkdir()
    scans.save(data, folder / "e.dcm")
    return array - 7


def test_enhanced_multi_frame(tmp_path):
    array = enhanced(tmp_path / "up", [(30 + 2.5 * k, 1) for k in range(6)])
    for path in ("up", "up/e.dcm"):
        again, grid, said = read(tmp_path / path)
        np.testing.assert_array_equal(again, array)
        assert (grid.spacing, grid.origin, said) == ((1.25, 1.5, 2.5), (-10, 5, 30), [])
    array = enhanced(tmp_path / "down", [(30 - 2.5 * k, 1) for k in range(6)])
    again, grid, _ = read(tmp_path / "down")
    np.testing.assert_array_equal(again, array[::-1])
    assert grid.origin == (-10, 5, 17.5)
    enhanced(tmp_path / "gap", [(z, 1) for z in (0, 2.5, 5, 10, 12.5)])
    with pytest.raises(InputError, match="slice 4 of 6 is missing"):
        read(tmp_path / "gap")
    array = enhanced(tmp_path / "two", [(2.5 * (k // 2), 1 + k % 2) for k in range(8)])
    with pytest.raises(InputError, match="TemporalPositionIndex 1"):
        read(tmp_path / "two" / "e.dcm")
    np.testing.assert_array_equal(read(f"{tmp_path / 'two' / 'e.dcm'}#2")[0], array[1::2])


def test_a_single_file_of_a_series(tmp_path):
    array = scans.series(tmp_path / "a")
    again, grid, said = read(tmp_path / "a" / "s003.dcm")
    np.testing.assert_array_equal(again, array[3:4])
    assert (grid.size, grid.spacing, grid.origin) == ((8, 9, 1), (1.25, 1.5, 2.5), (-10, 5, 37.5))
    assert len(said) == 1
    assert "is one of 10 slices of its series; to read all of them give the folder" in said[0]
    # a radiograph has no place
    scans.series(tmp_path / "x", keep=[0], ImagePositionPatient=None, Modality="CR")
    _, grid, said = read(tmp_path / "x" / "s000.dcm")
    assert (grid.size, grid.spacing) == ((8, 9), (1.25, 1.5))
    assert "read as a 2D image" in said[0]


def test_a_film_beside_a_series_is_left_out(tmp_path):
    array = scans.series(tmp_path / "a")
    film = scans.dataset(
        scans.values((3, 5, 5)), SOPClassUID="1.2.840.10008.5.1.4.1.1.3.1", NumberOfFrames=3, Modality="US"
    )
    scans.save(film, tmp_path / "a" / "film.dcm")
    again, _, said = read(tmp_path / "a")
    np.testing.assert_array_equal(again, array)
    assert len(said) == 1
    assert "1 file is left out" in said[0]
    assert "a film, not a volume" in said[0]
    with pytest.raises(InputError, match="3 frames that do not say where they lie"):
        read(tmp_path / "a" / "film.dcm")


def test_a_dose_grid(tmp_path):
    for name, offsets, message in (
        ("even", [0, 2, 4, 6], None),
        ("gap", [0, 2, 6, 8], "slice 3 of 5 is missing"),
    ):
        array = scans.values((4, 9, 8))
        scans.save(
            scans.dataset(
                array, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE", NumberOfFrames=4, PixelSpacing=[1.5, 1.25],
                GridFrameOffsetVector=offsets, ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                FrameIncrementPointer=0x3004000C, DoseGridScaling=1.0, RescaleSlope=None, RescaleIntercept=None,
            ),
            tmp_path / f"{name}.dcm",
        )  # fmt: skip
        if message:
            with pytest.raises(InputError, match=message):
                read(tmp_path / f"{name}.dcm")
        else:
            again, grid, _ = read(tmp_path / f"{name}.dcm")
            np.testing.assert_array_equal(again, array)
            assert (grid.spacing, grid.origin) == ((1.25, 1.5, 2), (1, 2, 3))


def test_folders_that_are_no_series_of_even_steps_do_not_hide_behind_one_tag(tmp_path):
    # Each slice has its own acquisition number, as step-and-shoot scans have, and two are missing.
    scans.series(tmp_path / "a", keep=[0, 1, 2, 5, 6], each=lambda k: {"AcquisitionNumber": k})
    with pytest.raises(InputError, match="slices 4 to 5 of 7 are missing"):
        read(tmp_path / "a")
    # Two blocks of two acquisitions are two volumes.
    scans.series(tmp_path / "b", keep=[0, 1, 2, 5, 6], each=lambda k: {"AcquisitionNumber": 1 + k // 4})
    with pytest.raises(InputError, match=r"#1: CT, 3 slices.*AcquisitionNumber 1.*#2: CT, 2 slices"):
        read(tmp_path / "b")


def test_volumes_between_each_other_are_told(tmp_path):
    scans.series(tmp_path / "a", each=lambda k: {"AcquisitionNumber": 1 + k % 2})
    assert read(tmp_path / "a")[2] == [
        f"{tmp_path / 'a'}: slices alternate between AcquisitionNumber 1 and 2, and are read as one volume"
    ]
    scans.series(tmp_path / "b", each=lambda k: {"AcquisitionNumber": 1 + k // 5})
    assert read(tmp_path / "b")[2] == []
    # One after the other, and nothing but the numbers says it.
    scans.series(tmp_path / "c", each=lambda k: {"InstanceNumber": 1 + k // 2 + 5 * (k % 2)})
    assert read(tmp_path / "c")[2] == [
        f"{tmp_path / 'c'}: slices alternate between InstanceNumber 1 to 5 and 6 to 10, and are read as one volume"
    ]


def test_two_frames_of_reference_are_two_volumes(tmp_path):
    scans.series(tmp_path / "a", each=lambda k: {"FrameOfReferenceUID": f"1.2.{1 + k // 5}"})
    with pytest.raises(InputError, match=r"#1: CT, 5 slices.*#2: CT, 5 slices"):
        read(tmp_path / "a")
