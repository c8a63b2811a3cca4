"""report.html: one file, that opens anywhere and shows what it says."""

import base64
import html
import io as streams
import json
import re

import numpy as np
import pytest
from browser import chromium

from fastreg import cli, io, report_page
from fastreg.io import Geometry

pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

EVIL = "a<b>&'quote'.nii.gz"
GRID = Geometry.of((20, 24, 28), (2.0, 1.5, 1.0))


def pair(folder, grid=GRID):
    axes = [np.linspace(0, 1, n) for n in grid.shape]
    first = np.meshgrid(*axes, indexing="ij")
    rng = np.random.default_rng(0)
    for name, shift in ((EVIL, 0.0), ("moving.nii.gz", 0.05)):
        image = np.sin(9 * (first[0] + shift)) + np.cos(7 * first[-1]) + 0.1 * rng.random(grid.shape)
        io.write_image(folder / name, image.astype(np.float32), grid)
    return [str(folder / EVIL), str(folder / "moving.nii.gz")]


def page_of(folder, grid=GRID):
    options = ["--html", "--inverse", "--quiet", "--iterations", "2", "--threads", "1"]
    assert cli.main(["register", *pair(folder, grid), "-o", str(folder / "out"), *options]) == 0
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def pixels(uri):
    return np.asarray(Image.open(streams.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_needs_nothing_else_and_escapes_names(tmp_path):
    page = page_of(tmp_path)
    assert "<b>&" not in page.replace("<b></b>", "")
    assert html.escape(EVIL) in page
    assert "<th>inverse</th><td>off by " in page
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == []
    assert "http" not in re.sub("http-equiv", "", page.split('id="data"')[0])
    assert html.unescape(re.search("<pre>(.*?)</pre>", page, re.S)[1]) == (
        tmp_path / "out" / "report.json"
    ).read_text(encoding="utf-8")
    # One that a run before has left does not stay beside another registration.
    again = ["--quiet", "--force", "--iterations", "2", "--threads", "1"]
    assert cli.main(["register", *pair(tmp_path), "-o", str(tmp_path / "out"), *again]) == 0
    assert not (tmp_path / "out" / "report.html").exists()


def test_slices_are_those_of_the_images(tmp_path):
    planes = data_of(page_of(tmp_path))
    assert [(p["name"], p["of"]) for p in planes] == [("axial", 20), ("coronal", 24), ("sagittal", 28)]
    assert planes[0]["letters"] == ["R", "L", "A", "P"]
    assert planes[1]["letters"] == ["R", "L", "S", "I"]
    assert (planes[1]["width"], planes[1]["height"]) == (28.0, 40.0)
    fixed = io.read_image(tmp_path / EVIL)[0]
    low, high = np.percentile(fixed, [0.5, 99.5])
    grey = 255 * np.clip((fixed - low) / (high - low), 0, 1)
    for k in (0, 7, 19):
        assert np.abs(pixels(planes[0]["images"]["fixed"][k]) - grey[k]).mean() < 4
        assert np.abs(pixels(planes[1]["images"]["fixed"][k]) - grey[::-1, k]).mean() < 4
    moved = [np.stack([pixels(u) for u in planes[0]["images"][n]]).astype(float) for n in ("fixed", "before", "after")]  # fmt: skip
    assert np.abs(moved[2] - moved[0]).mean() < np.abs(moved[1] - moved[0]).mean()


def test_stays_small(tmp_path):
    """Noise, which no JPEG makes small, in a large volume."""
    noise = np.random.default_rng(0).random((96, 320, 320), dtype=np.float32)
    planes = report_page.slices(noise, noise, noise, Geometry.of(noise.shape, (1, 1, 1)), 3_000_000)
    assert len(json.dumps(planes)) < 3_100_000
    assert [len(p["slices"]) for p in planes] == [report_page.SLICES] * 3
    assert planes[0]["slices"][-1] == 95
    assert max(pixels(planes[0]["images"]["fixed"][0]).shape) >= 64


# Errors of the page itself; then the slider and the buttons, and what they show.
TRY = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("securitypolicyviolation", e => errors.push(e.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...m) => errors.push(m.join(" "));
addEventListener("load", () => {
  const unseen = e => getComputedStyle(e).display === "none";
  const shown = () => [under.src.length + under.src.slice(-40), unseen(over), over.className, where.textContent];
  const seen = [shown()];
  const press = name => [...document.querySelectorAll("input")].find(i => i.value === name)?.click();
  if (!slice.hidden) { slice.value = slice.value > 3 ? 2 : 5; slice.dispatchEvent(new Event("input")); }
  seen.push(shown());
  for (const name of ["difference", "moved", "coronal"]) { press(name); seen.push(shown()); }
  document.documentElement.style.width = "400px";
  const wide = [...document.querySelectorAll("body *")].map(e => e.getBoundingClientRect().right);
  document.title = JSON.stringify([errors, seen, Math.max(...wide), [...document.images].filter(i => !i.naturalWidth && !i.hidden).length,
    unseen(document.getElementById("planes"))]);
});
</script>"""


@pytest.mark.parametrize("nd", [3, 2])
@pytest.mark.slow
def test_in_a_browser(tmp_path, nd):
    page = page_of(tmp_path, GRID if nd == 3 else Geometry.of((40, 50), (1.0, 1.5)))
    tried = tmp_path / "tried.html"
    tried.write_text(page.replace("<meta charset", f"{TRY}<meta charset", 1), encoding="utf-8")
    dom = chromium("--dump-dom", tried.as_uri(), width=500)
    errors, seen, right, broken, one_plane = json.loads(
        html.unescape(re.search("<title>(.*?)</title>", dom)[1])
    )
    assert errors == []
    assert broken == 0
    assert one_plane == (nd == 2)
    assert right <= 400
    first, slid, difference, moved, coronal = seen
    assert first[1:3] == [False, "checkerboard"]
    if nd == 3:
        assert slid[0] != first[0]
        assert slid[3] == "axial slice 3 of 20"
        assert coronal[3].startswith("coronal slice")
        assert coronal[0] != moved[0]
    assert difference[2] == "difference"
    assert moved[1]
    assert moved[0] != difference[0]
