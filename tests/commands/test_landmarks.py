"""Landmarks in the files of other tools, and those that mean something else than they are read as."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastreg import cli, evaluation, io
from fastreg.data.landmarks import better_inside, others, read_pair
from fastreg.data.pairs import Case
from fastreg.io import Geometry, InputError, Reading

# (x, y, z), mm, LPS
POINTS = np.array([[5.25, -6, 4], [-12, 8, -7.5], [10, 11, 9]])
GRID = Geometry((32, 30, 24), (2.0, 1.5, 2.5), (-31.0, -21.75, -28.75), (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
COLUMNS = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"


def rows(points, form, start=""):
    return start + "\n".join(form.format(*p, n=n) for n, p in enumerate(points, 1)) + "\n"


def fcsv(points, version, system=None, end=""):
    said = "" if system is None else f"# CoordinateSystem = {system}\n"
    start = f"# Markups fiducial file version = {version}\n{said}{COLUMNS}"
    return rows(points, 'vtk_{n},{},{},{},0,0,0,1,1,1,0,F-{n},"a, b",' + end, start)


def markup(points, system="LPS", **more):
    names = ("a", "b", "c", "d")
    some = [
        {"id": n, "label": n, "position": list(p), "positionStatus": "defined"}
        for n, p in zip(names, points, strict=False)
    ]
    return {"type": "Fiducial", "coordinateSystem": system, "controlPoints": some, **more}


def mrk(*markups):
    return json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": markups})


RAS = POINTS * [-1, -1, 1]
VOXELS = GRID.to_index(POINTS)[:, ::-1]
OUTPUT = "Point\t{n}\t; InputIndex = [ 1 2 3 ]\t; InputPoint = [ 1.0 2.0 3.0 ]\t; OutputIndexFixed = [ 1 2 3 ]\t; OutputPoint = [ {} {} {} ]\t; Deformation = [ 0 0 0 ]"
FILES = {
    "fcsv 4.10, 0 is RAS": ("p.fcsv", fcsv(RAS, "4.10", "0"), "RAS"),
    "fcsv 4.11, 1 is LPS": ("p.fcsv", fcsv(POINTS, "4.11", "1"), "LPS"),
    "fcsv 5, status": ("p.fcsv", fcsv(POINTS, "5.2", "LPS", ",2,0"), "LPS"),
    "fcsv 5 in RAS, other name": ("p.txt", fcsv(RAS, "5.2", "RAS"), "RAS"),
    "fcsv IJK": ("p.fcsv", fcsv(VOXELS, "4.4", "2"), "voxel"),
    "fcsv of Slicer 3": (
        "p.fcsv",
        rows(RAS, "F-{n},{},{},{},1,1", "# Fiducial List file /a.fcsv\n# name = L\n# columns = label,x,y,z,sel,vis\n"),
        "RAS",
    ),
    "mrk.json": ("p.mrk.json", mrk(markup(POINTS)), "LPS"),
    "mrk.json in RAS, in cm": ("p.json", mrk(markup(RAS / 10, "RAS", coordinateUnits=["cm", "UCUM", "centimeter"])), "RAS"),
    "mrk.json, lists": ("p.mrk.json", mrk(markup(RAS[:1], "RAS"), {"type": "ROI"}, markup(POINTS[1:])), "RAS"),
    "elastix": ("p.txt", rows(POINTS, "{} {} {}", "point\n3\n"), "LPS"),
    "elastix pts, tabs, CRLF": ("p.pts", rows(POINTS, "{}\t{}\t{}", "point\r\n3\r\n"), "LPS"),
    "elastix, index": ("p.txt", rows(VOXELS, "{} {} {}", "index\n3\n"), "voxel"),
    "elastix, neither": ("p.txt", rows(VOXELS, "{} {} {}", "3\n"), "voxel"),
    "transformix": ("outputpoints.txt", rows(POINTS, OUTPUT), "LPS"),
    "csv": ("p.csv", rows(POINTS, "{},{},{}", "x,y,z\n"), "LPS"),
    "csv in RAS": ("p.csv", rows(RAS, "{n},{2},{0},{1}", "label,S,R,A\n"), "RAS"),
    "csv in LPS": ("p.csv", rows(POINTS, "{},{},{}", "L, P, S\n"), "LPS"),
    "csv in LAS": ("p.csv", rows(POINTS * [1, -1, 1], "{},{},{}", "l,a,s\n"), "LPS"),
    "csv of voxels": ("p.csv", rows(VOXELS, "{},{},{},{n}", "i,j,k,label\n"), "voxel"),
    "csv, voxels by unit": ("p.csv", rows(VOXELS, "{};{};{}", "x [vox];y [vox];z [vox]\n"), "voxel"),
    "csv with units": ("p.csv", rows(POINTS / 10, "{};{};{}", "X (cm);Y (cm);Z (cm)\n"), "LPS"),
    "csv, mm beside voxels": ("p.csv", rows(POINTS, "{n},{n},{n},{},{},{}", "i,j,k,x,y,z\n"), "LPS"),
    "csv of ANTs": ("p.csv", rows(POINTS, "{},{},{},0,{n},a", "x,y,z,t,label,comment\n"), "LPS"),
    "tsv": ("p.tsv", rows(POINTS, "{n}\t{}\t{}\t{}", "name\tx\ty\tz\n"), "LPS"),
    "blanks": ("p.txt", rows(POINTS, "{}   {} {}", "x y z\n"), "LPS"),
    "numpy's header": ("p.txt", rows(POINTS, "{},{},{}", "# x,y,z\n"), "LPS"),
    "comments": ("p.csv", rows(POINTS, "{},{},{}", "# by hand\n# today\nx,y,z\n"), "LPS"),
    "table of Slicer": ("p.csv", rows(RAS, "F-{n},{},{},{},1,1,1,0,", "label,r,a,s,defined,selected,visible,locked,description\n"), "RAS"),
    "Excel": ("p.csv", rows(POINTS, "{};{};{};", "sep=;\nx;y;z;\n").replace(".", ","), "LPS"),
    "decimal commas": ("p.csv", rows(POINTS, "{};{};{}", "x;y;z\n").replace(".", ","), "LPS"),
    "quoted decimal commas": ("p.csv", rows(POINTS, '"{}","{}","{}"', "x,y,z\n").replace(".", ","), "LPS"),
}  # fmt: skip


def write(path, content):
    path.write_bytes(content.encode("utf-8"))
    return path


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_tools(tmp_path, kind):
    name, content, space = FILES[kind]
    told = []
    read = io.read_points(write(tmp_path / name, content), 3, GRID, warn=told.append)
    np.testing.assert_allclose(read.points, POINTS, atol=1e-6)
    assert read.space == space
    assert [line.split(": ")[1] for line in told] == (
        ["names no coordinate system, and is read as RAS, as 3D Slicer does"] if "Slicer 3" in kind else []
    )
    # Written with other points it is read as those, in the same format and space.
    moved = POINTS + np.array([1, 2, -3.5])
    read.write(tmp_path / f"again{read.suffix}", moved, GRID)
    again = io.read_points(tmp_path / f"again{read.suffix}", 3, GRID)
    np.testing.assert_allclose(again.points, moved, atol=1e-6)
    assert again.names == read.names
    assert again.suffix == read.suffix
    assert again.space == ("LPS" if read.suffix == ".txt" else space)


def test_what_is_not_known_is_kept(tmp_path):
    """Descriptions, columns, colours: of a file only the positions change."""
    content = mrk(markup(POINTS, display={"color": [1, 0, 0]}))
    io.read_points(write(tmp_path / "p.mrk.json", content), 3).write(tmp_path / "q.mrk.json", POINTS)
    assert json.loads((tmp_path / "q.mrk.json").read_text()) == json.loads(content)
    for name, content in (
        ("p.csv", "x;y;z;t;label\n1;2;3;0;a\n"),
        ("p.fcsv", fcsv(POINTS, "5.2", "LPS", ",2,0")),
    ):
        read = io.read_points(write(tmp_path / name, content), 3)
        read.write(tmp_path / name, read.points)
        assert (tmp_path / name).read_text() == content.replace(".0,", ",")


@pytest.mark.parametrize(("space", "numbers"), [("LPS", POINTS), ("RAS", RAS), ("voxel", VOXELS)])
@pytest.mark.parametrize("header", ["x,y,z\n", ""])
def test_a_space_that_the_user_names(tmp_path, space, numbers, header):
    path = write(tmp_path / "p.csv", rows(numbers, "{},{},{}", header))
    read = io.read_points(path, 3, GRID, Reading(landmarks_space=space))
    np.testing.assert_allclose(read.points, POINTS, atol=1e-9)
    # What is written says it itself.
    read.write(tmp_path / "q.csv", read.points, GRID)
    np.testing.assert_allclose(io.read_landmarks(tmp_path / "q.csv", 3, GRID), POINTS, atol=1e-6)
    for own in ("LPS", "RAS"):
        path = write(tmp_path / "p.fcsv", fcsv(POINTS, "5.2", own))
        if own != space:
            with pytest.raises(
                InputError, match=f"says itself that it is {own}, and --landmarks-space says {space}"
            ):
                io.read_points(path, 3, GRID, Reading(landmarks_space=space))  # fmt: skip


def test_2d(tmp_path):
    grid = Geometry.of((20, 30), (1.0, 2.0))
    for name, content in (
        ("p.csv", "x,y,z,t,label\n4,5,0,0,1\n"),
        ("p.csv", "j;i\n5;2\n"),
        ("p.csv", "x,y,s\n4,5,text\n"),
        ("p.csv", "a,r\n-5,-4\n"),
        ("p.txt", "point\n1\n4 5\n"),
        ("p.fcsv", fcsv([[4, 5, 0]], "5.2", "LPS")),
    ):
        read = io.read_points(write(tmp_path / name, content), 2, grid)
        assert read.points.tolist() == [[4, 5]]
        read.write(tmp_path / name, read.points + 1, grid)
        np.testing.assert_allclose(io.read_landmarks(tmp_path / name, 2, grid), [[5, 6]], atol=1e-6)
    with pytest.raises(InputError, match="holds 3D points, and the image is 2D"):
        io.read_landmarks(write(tmp_path / "p.fcsv", fcsv([[4, 5, 1]], "5.2", "LPS")), 2)


BAD = [
    ("p.csv", "x,y,label\n1,2,a\n", "column z is missing, got 'x,y,label'"),
    ("p.csv", "r,a,label\n1,2,a\n", "column s is missing"),
    ("p.csv", "a,b,c\n1,2,3\n", r"must be x,y,z \(mm, LPS\), or r,a,s, l,p,s or i,j,k \(voxels\), got 'a,b,c'"),
    ("p.csv", "x,y,z\n1,5,2,5,3,5\n", "line 2 has more fields than the header.* decimal commas need ;"),
    ("p.csv", "x;y;z\n1,5;2.5;3\n", "hold both . and ,"),
    ("p.csv", "x;y;z\n1,500,000;2;3\n", "hold both . and ,"),
    ("p.csv", "x,y,z,r,a,s\n1,2,3,4,5,6\n", "names points twice, as x,y,z and r,a,s"),
    ("p.csv", "i,j,k\n1,2,3\n", "holds voxels, which mean something with their image alone"),
    ("p.fcsv", "# Markups fiducial file version = 5.2\n# CoordinateSystem = 7\n", "must be RAS, LPS or IJK"),
    ("p.fcsv", fcsv(POINTS[:0], "5.2", "LPS"), "holds no landmarks"),
    ("p.fcsv", "# Markups fiducial\n# columns = id,x,z\na,1,2\n", "its columns lack y"),
    ("p.fcsv", COLUMNS + "a,1,two,3\n", "line 2 must hold x, y and z"),
    ("p.json", "{", "not JSON"),
    ("p.json", '{"a": 1}', "no markups file of 3D Slicer"),
    ("p.json", mrk({"type": "Line"}), r"holds no point list \(Fiducial\), but Line"),
    ("p.json", mrk(markup(POINTS, "ABC")), "coordinateSystem must be LPS or RAS, got 'ABC'"),
    ("p.json", mrk(markup(POINTS, coordinateUnits="furlong")), "coordinateUnits must be mm"),
    ("p.json", mrk(markup([[1, 2]])), "a position must be 3 numbers"),
    ("p.json", mrk(markup([[1, 2, 3]], controlPoints=[{"positionStatus": "undefined"}])), "holds no landmarks"),
    ("p.txt", "point\n2\n1 2 3\n", "says 2, holds 1"),
    ("p.txt", "point\n1\n1 two 3\n", "3 numbers for each"),
    ("p.vtk", "# vtk DataFile Version 3.0\n", "not a file that landmarks are read from"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as error:
        io.read_landmarks(write(tmp_path / name, content), 3)
    assert "\n" not in str(error.value)


# A pair


def pair(tmp_path, fixed, moving, suffix=".csv"):
    paths = [write(tmp_path / f"{n}{suffix}", c) for n, c in (("fixed", fixed), ("moving", moving))]
    told = []
    points, _, names = read_pair(paths, (GRID, GRID), told.append)
    assert names is None or len(names) == len(points[1])
    return points, told


def named(names, points=POINTS):
    return "label,x,y,z\n" + "".join(
        f"{n},{','.join(map(str, p))}\n" for n, p in zip(names, points, strict=True)
    )


def test_rows_match_by_name(tmp_path):
    order = [2, 0, 1]
    points, told = pair(tmp_path, named("abc"), named("cab", POINTS[order]))
    assert (points[0] == points[1]).all()
    assert len(told) == 1
    assert told[0].endswith("fixed.csv: matched by their names")
    # As they are: the same names, none, names that are not unique, the numbering of two lists.
    for one, other in (
        (named("abc"), named("abc")),
        (named("abc"), rows(POINTS, "{},{},{}", "x,y,z\n")),
        (named("000"), named("111")),
        (named(["f-1", "f-2", "f-3"]), named(["m-1", "m-2", "m-3"])),
    ):
        assert pair(tmp_path, one, other)[1] == []
    points, told = pair(tmp_path, named("abc"), named("abd", POINTS[order]))
    assert (points[1] == POINTS[order]).all()
    assert told[0].endswith("name 1 of 3 landmarks differently ('c' and 'd', row 3): matched by their order")
    assert len(pair(tmp_path, named("abc"), named("def"))[1]) == 1
    # A name that stands twice matches nothing, and yet says that rows are not alike.
    told = pair(tmp_path, named("abc"), named("aab", POINTS[order]))[1]
    assert len(told) == 1
    assert told[0].endswith("a name of its own, and 'b' stands in different rows: matched by their order")
    with pytest.raises(InputError, match=r"moving.csv holds 2; without a partner: b"):
        pair(tmp_path, named("abc"), named("ac", POINTS[:2]))


def test_points_without_a_position_leave_with_their_partners(tmp_path):
    lost = markup(POINTS)
    lost["controlPoints"][1] |= {"positionStatus": "missing", "position": None}
    points, told = pair(tmp_path, mrk(lost), mrk(markup(POINTS)), ".mrk.json")
    assert (points[0] == POINTS[[0, 2]]).all()
    assert (points[1] == points[0]).all()
    assert told[0].endswith("one of them gives no position: b (1 of 3)")
    # Slicer's fcsv says it after the last column that it names
    status = fcsv(POINTS, "5.4", "LPS", ",2,0").replace(",2,0", ",0,0", 1)
    assert len(io.read_landmarks(write(tmp_path / "p.fcsv", status), 3)) == 2
    table = "label,r,a,s,defined\na,1,2,3,1\nb,0,0,0,0\n"
    read = io.read_points(write(tmp_path / "p.csv", table), 3)
    assert np.isnan(read.points).all(1).tolist() == [False, True]
    read.write(tmp_path / "p.csv", read.points)
    assert io.read_landmarks(tmp_path / "p.csv", 3).tolist() == [[-1, -2, 3]]
    # Written without one, they are read without one.
    for name, content in (("p.fcsv", fcsv(POINTS, "5.2", "LPS")), ("p.mrk.json", mrk(markup(POINTS)))):
        read = io.read_points(write(tmp_path / name, content), 3)
        read.write(tmp_path / name, np.where([[True], [False], [True]], POINTS, np.nan))
        assert (io.read_landmarks(tmp_path / name, 3) == POINTS[[0, 2]]).all()


# Meant otherwise

T = np.array([2.5, -2, -1])
MANY = np.random.default_rng(2).uniform(-15, 15, (12, 3))
U = torch.from_numpy(np.linalg.solve(GRID.matrix, T)).float().view(1, 3, 1, 1, 1).expand(1, 3, *GRID.shape)


def case(fixed, moving, grid=GRID):
    image = np.zeros(grid.shape)
    return Case("case", image, grid, image, grid, fixed_landmarks=fixed, moving_landmarks=moving)


MEANT = {
    "voxels": (
        lambda f, m: [g.to_index(p)[:, ::-1] for p, g in ((f, GRID), (m, GRID))],
        r"read as voxels \(--landmarks-space voxel\)",
    ),
    "RAS": (lambda f, m: (f * [-1, -1, 1], m * [-1, -1, 1]), r"read as RAS \(--landmarks-space RAS\)"),
    "exchanged": (lambda f, m: (m, f), "with those of the fixed and the moving image exchanged"),
    "turned": (lambda f, m: (f[:, ::-1], m[:, ::-1]), "read as LPS in the order z,y,x"),
    "moving RAS": (lambda f, m: (f, m * [-1, -1, 1]), "with those of the moving image alone read as RAS"),
    "fixed RAS": (lambda f, m: (f * [-1, -1, 1], m), "with those of the fixed image alone read as RAS"),
}


@pytest.mark.parametrize("kind", MEANT)
def test_what_is_meant_otherwise_is_told(kind):
    change, how = MEANT[kind]
    line = evaluation.doubt(case(*change(MANY, MANY + T)), U)
    assert line is not None
    assert float(line.split("would be ")[1].split()[0]) < 0.01
    assert re.search(f"{how}$", line)


def test_right_landmarks_are_not_doubted():
    """Whatever the registration is worth; near the midline, few, in one place, of scans far apart."""
    rng = np.random.default_rng(0)
    few, midline, cluster = MANY[:1], MANY * [0.05, 1, 1], 0.05 * MANY + [8, 3, -5]
    for points in (MANY, few, midline, cluster, MANY * [1, 0.05, 1]):
        for worth in (1, 0.9, 0.5, 0, -0.1):
            for scale in (0.2, 1, 3):
                moved = points + scale * T + rng.normal(0, 0.1, points.shape)
                assert evaluation.doubt(case(points, moved), worth * scale * U) is None
    far = Geometry(GRID.size, GRID.spacing, (-231.0, 150, 80), GRID.direction)
    one = case(MANY, MANY + far.origin - np.array(GRID.origin))
    one.moving_grid = far
    assert evaluation.doubt(one, 0 * U) is None


def test_in_the_plane_of_a_slice_only_files_may_be_exchanged():
    flat = [Geometry((32, 30), (2.0, 1.5), (-31.0, -21.75), (1.0, 0, 0, 1)) for _ in range(2)]
    points = MANY[:, :2]
    assert len(list(others(points, points, flat, ("RAS", "LPS")))) > 1
    flat = [replace(grid, plane=object()) for grid in flat]
    assert [o.kind for o in others(points, points, flat, ("RAS", "LPS"))] == ["exchanged"]


def test_outside_says_where_it_would_be_inside(tmp_path):
    grid = Geometry.of((24, 30, 32), (2.5, 1.5, 2.0))  # from 0 on: RAS is outside
    inside = MANY + np.array([30, 20, 30])
    assert better_inside(inside, "LPS", grid) == ""
    assert "12 of 12 would, read as RAS" in better_inside(inside * [-1, -1, 1], "LPS", grid)
    grid = Geometry.of((24, 30, 32), (0.2, 0.2, 0.2))
    assert "12 of 12 would, read as voxels" in better_inside(0.4 * MANY + 12, "LPS", grid)
    paths = [write(tmp_path / n, rows(-inside, "{},{},{}", "x,y,z\n")) for n in ("f.csv", "m.csv")]
    with pytest.raises(
        InputError, match=r"f.csv: no landmark lies in the fixed image \(they must be mm, LPS\)"
    ):
        read_pair(paths, (grid, grid))  # fmt: skip
    # A few that are rightly outside are no reason.
    inside[:3] += 100
    assert better_inside(inside, "LPS", Geometry.of((24, 30, 32), (2.5, 1.5, 2.0))) == ""


# The commands


@pytest.fixture
def scans(tmp_path):
    pytest.importorskip("SimpleITK")
    pytest.importorskip("matplotlib")
    index = np.stack(np.meshgrid(*[np.arange(n) for n in GRID.shape], indexing="ij"), -1)
    rng = np.random.default_rng(3)
    blobs = list(zip(rng.uniform(-30, 30, (40, 3)), rng.uniform(4, 8, 40), strict=True))
    for name, shift in (("fixed", 0 * T), ("moving", T)):
        p = GRID.to_physical(index) - shift
        image = sum(np.exp(-((p - c) ** 2).sum(-1) / (2 * s * s)) for c, s in blobs)
        io.write_image(tmp_path / f"{name}.nii.gz", image.astype(np.float32), GRID)
    return tmp_path


def register(scans, fixed, moving, *more):
    images = [str(scans / f"{n}.nii.gz") for n in ("fixed", "moving")]
    options = ["--quiet", "--force", "--iterations", "40,20", "--threads", "1"]
    points = ["--fixed-landmarks", str(fixed), "--moving-landmarks", str(moving)]
    assert cli.main(["register", *images, "-o", str(scans / "out"), *options, *points, *more]) == 0
    return json.loads((scans / "out" / "report.json").read_text(encoding="utf-8"))["tre"]["after"]["mean"]


def test_register_with_the_landmarks_of_slicer(scans, capsys):
    numbers = MANY * [-1, -1, 1], (MANY + T) * [-1, -1, 1]
    tables = [write(scans / n, rows(p, "{},{},{}", "x,y,z\n")) for n, p in zip("fm", numbers, strict=True)]
    wrong = register(scans, *tables)
    assert "read as RAS (--landmarks-space RAS)" in capsys.readouterr().err
    right = register(scans, *tables, "--landmarks-space", "RAS")
    assert right < 0.3 < 4 < wrong
    files = [write(scans / f"{n}.fcsv", fcsv(p, "4.10", "0")) for n, p in zip("fm", numbers, strict=True)]
    assert register(scans, *files, "--inverse") == right
    assert capsys.readouterr().err == ""
    back = (scans / "out" / "moving_landmarks_in_fixed.csv").read_text().splitlines()
    assert back[0] == "x,y,z,label"
    assert back[-1].endswith(",F-12")
    voxels = [
        write(scans / n, rows(GRID.to_index(p)[:, ::-1], "{:.9},{:.9},{:.9}")) for n, p in (("f", MANY), ("m", MANY + T))
    ]  # fmt: skip
    assert register(scans, *voxels, "--landmarks-space", "voxel") == pytest.approx(right, abs=1e-5)


def test_points_come_back_as_they_came(scans, capsys):
    io.write_displacement(scans / "field.nii.gz", U, GRID)
    common = ["apply", "--field", str(scans / "field.nii.gz"), str(scans / "moving.nii.gz"), "--quiet", "--force"]  # fmt: skip

    def moved(name, content, *more):
        out = scans / "moved"
        path = write(scans / name, content)
        assert cli.main([*common, "-o", str(out), "--points", str(path), *more]) == 0
        assert capsys.readouterr().err == ""
        np.testing.assert_allclose(io.read_landmarks(out / "points.csv", 3, GRID), POINTS + T, atol=1e-4)
        return out

    out = moved("p.fcsv", fcsv(RAS, "4.10", "0"))
    assert sorted(f.name for f in out.iterdir()) == ["moved.nii.gz", "points.csv", "points.fcsv"]
    assert "CoordinateSystem = 0" in (out / "points.fcsv").read_text()
    np.testing.assert_allclose(io.read_landmarks(out / "points.fcsv", 3), POINTS + T, atol=1e-4)
    assert (out / "points.csv").read_text().splitlines()[1].endswith(",F-1")
    out = moved("p.csv", rows(RAS, "{n};{};{};{}", "name;r;a;s\n"))
    assert sorted(f.name for f in out.iterdir()) == ["moved.nii.gz", "points.csv"]
    assert (out / "points.csv").read_text().startswith("name;r;a;s\n1;")
    out = moved("p.csv", rows(VOXELS, "{},{},{}"), "--landmarks-space", "voxel")
    assert (out / "points.csv").read_text().startswith("i,j,k\n")
    out = moved("p.txt", rows(POINTS, "{} {} {}", "point\n3\n"))
    assert (out / "points.txt").read_text().startswith("point\n3\n7.75 -8")
    path = write(scans / "p.csv", "x,y,label\n1,2,a\n")
    assert cli.main([*common, "-o", str(out), "--points", str(path)]) == 2
    assert "column z is missing" in capsys.readouterr().err
