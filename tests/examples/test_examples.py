"""Every file of examples/ runs as it is printed, on small data, and does what it says."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from common import COMPILED

import fastreg
from fastreg import report

FOLDER = Path(fastreg.__file__).resolve().parents[1] / "examples"
FILES = sorted(p.name for p in FOLDER.glob("*.py"))
pytestmark = pytest.mark.skipif(not FILES, reason="not in a checkout")
SMALL = ["--size", "24", "32", "32"]


@pytest.fixture
def run(monkeypatch, capsys):
    """What a command line prints; as a process would, but with the modules that are loaded already."""

    def call(file, *arguments):
        # As Python does for a script; its neighbours are imported anew.
        monkeypatch.syspath_prepend(str(FOLDER))
        for name in FILES:
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        runpy.run_path(str(FOLDER / file), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("file", FILES)
def test_help_shows_command_lines_that_parse(file, run, capsys):
    if "monai" in file:
        pytest.importorskip("monai")
    with pytest.raises(SystemExit) as status:
        run(file, "--help")
    assert status.value.code == 0
    text = capsys.readouterr().out
    commands = re.findall(rf"^    .*?examples/{file}(.*?)(?: {{3,}}.*)?$", text, re.MULTILINE)
    assert commands
    accepted = set(re.findall(r"(?<!\S)-[-\w]+", text.split("options:")[1]))
    for command in commands:
        assert {a for a in shlex.split(command) if a.startswith("-")} <= accepted
    assert len((FOLDER / file).read_text(encoding="utf-8").splitlines()) <= 80


def test_swap_a_loss(run):
    out = run("swap_a_loss.py", *SMALL, "--steps", 3)
    (first, last), ours = (re.findall(r"loss (\S+) -> (\S+),", line)[0] for line in out.splitlines())
    assert float(last) < float(first)
    assert [float(v) for v in ours] == pytest.approx([float(first), float(last)], abs=3e-4), (
        "the same numbers"
    )


def test_register_in_python(run, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    field = tmp_path / "field.nii.gz"
    size = ["--size", 28, 32, 40]
    out = run("register_in_python.py", *size, "--iterations", 10, "-o", field)
    before, after = map(float, re.search(r"landmarks (\S+) mm -> (\S+) mm", out).groups())
    assert after < before - 1
    # Read as it says, the field moves an image as fastreg.warp does.
    example = runpy.run_path(str(FOLDER / "register_in_python.py"))
    # Nowhere beyond the outermost voxel centres, where ITK's images go on for half a voxel.
    inner = (..., *[slice(2, -2)] * 3)
    u, spacing, image = torch.zeros(1, 3, 9, 10, 11), (2.0, 1.5, 0.5), torch.rand(1, 1, 9, 10, 11)
    u[inner] = 4 * torch.rand(u[inner].shape) - 2
    example["write_itk"](str(field), u, spacing)
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    moving = sitk.GetImageFromArray(image[0, 0].numpy())
    moving.SetSpacing(spacing[::-1])
    moved = torch.from_numpy(sitk.GetArrayFromImage(sitk.Resample(moving, moving, transform)))
    torch.testing.assert_close(moved[inner], fastreg.warp(image, u)[0, 0][inner], rtol=1e-3, atol=1e-3)


def test_train_with_monai(run):
    pytest.importorskip("monai")
    size = ["--size", 16, 32, 32]
    losses = [
        float(v) for v in re.findall(r"step \d: loss (\S+)", run("train_with_monai.py", *size, "--steps", 3))
    ]
    assert len(losses) == 3
    assert all(-1 < v < 0 for v in losses)


def test_train_with_monai_from_files(run, tmp_path):
    pytest.importorskip("monai")
    nibabel = pytest.importorskip("nibabel")
    size = ["--size", 16, 32, 32]
    for name in ("a_fixed", "a_moving"):
        scan = torch.randint(-1000, 500, (20, 30, 40)).short().numpy()
        nibabel.save(nibabel.Nifti1Image(scan, torch.eye(4).numpy()), tmp_path / f"{name}.nii.gz")
    assert "step 1: loss" in run(
        "train_with_monai.py", *size, "--steps", 1, "--pairs", tmp_path / "a_fixed.nii.gz"
    )


@pytest.mark.skipif(not COMPILED, reason="the reference has no saved-tensor hooks")
def test_profile_memory(run):
    volumes = {}
    for option in ([], ["--fastreg"]):
        out = run("profile_memory.py", *SMALL, *option)
        volumes[bool(option)] = float(re.search(r"kept for backward: (\S+) volumes", out)[1])
    assert "swap_a_loss.py:" not in out
    assert re.search(r"profile_memory.py:\d+ velocity = net\(torch.cat\(\[fixed, moving\], 1\)\)", out)
    assert volumes[True] < 0.6 * volumes[False]


def test_own_training_loop(run, tmp_path):
    out = run("own_training_loop.py", *SMALL, "--steps", 12, "--every", 6, "-o", tmp_path / "weights.pt")
    found = [
        re.search(r"lcc (\S+), .* landmarks (\S+) -> (\S+) mm", line).groups() for line in out.splitlines()
    ]
    assert len(found) == 2
    assert float(found[1][0]) < float(found[0][0]), "the loss goes down"
    assert float(found[1][2]) < float(found[1][1]), "and so do the distances"
    net = runpy.run_path(str(FOLDER / "own_training_loop.py"))["Net"]()
    net.load_state_dict(torch.load(tmp_path / "weights.pt"))


def test_train_your_net(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "can_draw", lambda: False)  # seconds
    out = run("train_your_net.py", *SMALL, "--steps", 2, "-o", tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "last.pt",
        "best.pt",
        "log.csv",
        "validation.csv",
    }
    assert "step 2: loss" in out
    # The same line with more steps goes on.
    run("train_your_net.py", *SMALL, "--steps", 3, "-o", tmp_path / "run")
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 4
