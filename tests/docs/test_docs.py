"""README, CONTRIBUTING and docs/: every block runs as it is printed, every relative link leads somewhere, the site builds and looks like one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from browser import chromium

import fastreg
from fastreg import lcc_loss, mi_loss

ROOT = Path(fastreg.__file__).parents[1]
if not (ROOT / "docs").exists():
    pytest.skip("not in a checkout", allow_module_level=True)
PAGES = sorted(
    p
    for p in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("findings/**/*.md"),
    )
    if "_build" not in p.parts
)
ELSEWHERE = {"docs/interoperability.md"}  # run by tests/commands/test_interoperability.py
SMALL = (48, 48, 64)  # the demo meets its goals at this size too, in a quarter of the time


def name(path):
    return path.relative_to(ROOT).as_posix()


# Blocks


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The environment of a shell that has `fastreg` and `python`, with a small thorax."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = {
        "fastreg": f"import sys; from fastreg.data import phantom; f = phantom.thorax; f.__defaults__ = ({SMALL}, *f.__defaults__[1:])\n"
        # Four steps of a training say as much as a hundred.
        "sys.argv = ['4' if before == '--steps' else text for before, text in zip(['', *sys.argv], sys.argv)]\n"
        "from fastreg.cli import main; sys.exit(main())",
        "python": "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
    }
    for script, code in scripts.items():
        (folder / script).write_text(f"#!{sys.executable}\n{code}\n", encoding="utf-8")
        (folder / script).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def demo(commands, tmp_path_factory):
    """What `fastreg demo -o demo` leaves, for pages that begin with it."""
    folder = tmp_path_factory.mktemp("thorax")
    done = subprocess.run(
        ["fastreg", "demo", "-o", "demo"],
        cwd=folder,
        env=commands,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "demo"


def parsed(path, environment):
    pytest.importorskip("sybil")
    from sybil import Sybil
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

    def shell(example):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", example.parsed],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{example.parsed}\n{done.stdout}{done.stderr}"

    parsers = [PythonCodeBlockParser(), CodeBlockParser("bash", shell), SkipParser()]
    return Sybil(parsers=parsers, encoding="utf-8").parse(path)


def test_blocks_are_of_a_known_kind_and_say_why_they_do_not_run():
    """A block without a language would not run, nor would one of a language that nothing here runs."""
    kinds = {"python", "bash", "text", "diff", "csv", "toml", "cpp"}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        opened = [m[1] for m in re.finditer(r"^ *```+ *(.*?)$", text, re.M)][::2]
        assert {o for o in opened if not o.startswith("{")} <= kinds, name(path)
        for line in text.splitlines():
            if "skip:" in line and line.startswith("<!--"):
                assert re.fullmatch(r'<!--- skip: next "[^"]{4,}" -->', line), f"{name(path)}: {line}"


def with_blocks():
    """Pages whose blocks run; those with commands are slow."""
    for path in PAGES:
        kinds = set(re.findall("^```(python|bash)", path.read_text(encoding="utf-8"), re.M))
        if kinds and name(path) not in ELSEWHERE:
            yield pytest.param(path, marks=pytest.mark.slow if "bash" in kinds else (), id=name(path))


@pytest.mark.parametrize("path", list(with_blocks()))
def test_blocks_run(path, commands, demo, tmp_path, monkeypatch):
    pytest.importorskip("SimpleITK")
    monkeypatch.chdir(tmp_path)
    document = parsed(path, commands)
    if not re.search("^fastreg demo -o demo", document.text, re.M):
        shutil.copytree(demo, tmp_path / "demo")
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest:
            continue
        except Exception as error:
            raise AssertionError(
                f"{name(path)}, line {example.line}: {type(error).__name__}: {error}"
            ) from error


def hunks(text):
    """(before, after) of each run of removed and added lines."""
    for block in re.findall(r"```diff\n(.*?)```", text, re.S):
        for part in re.split(r"^ .*$", block, flags=re.M):
            before, after = (re.findall(rf"^\{sign}(.*)$", part, re.M) for sign in "-+")
            if before:
                yield "\n".join(before), "\n".join(after)


def test_swaps_keep_the_numbers():
    """The README's diff: what is removed and what is added compute the same."""
    swaps = list(hunks((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(swaps) == 3
    compared = 0
    for before, after in swaps:
        results = []
        for code in (before, after):
            space = {
                "torch": torch,
                "F": torch.nn.functional,
                "fastreg": fastreg,
                "fixed": torch.rand(1, 1, 12, 13, 14, generator=torch.Generator().manual_seed(1)),
                "moving": torch.rand(1, 1, 12, 13, 14, generator=torch.Generator().manual_seed(2)),
                "displacement": torch.randn(1, 3, 12, 13, 14, generator=torch.Generator().manual_seed(3)),
            }
            space["moved"] = 0.5 * space["fixed"] + 0.5 * space["moving"]
            given = dict(space)
            if any(importlib.util.find_spec(m) is None for m in re.findall(r"^from (\w+)", code, re.M)):
                break  # a peer that is not installed
            exec(code, space)
            results.append({k: v for k, v in space.items() if given.get(k) is not v and torch.is_tensor(v)})
        else:
            for key, value in results[1].items():
                torch.testing.assert_close(results[0][key], value, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared >= 1


def monai_lncc(kernel):
    from monai.losses import LocalNormalizedCrossCorrelationLoss as LNCC

    return lambda fixed, moved: LNCC(kernel_size=7, kernel_type=kernel)(moved, fixed)


def monai_mi():
    from monai.losses import GlobalMutualInformationLoss

    return lambda fixed, moved: GlobalMutualInformationLoss("gaussian", num_bins=16)(moved, fixed)


def neurite_ncc():
    from neurite.nn.modules import NCC

    return lambda fixed, moved: NCC(7)(fixed, moved)


SAME = {
    "MONAI, rectangular": (
        lambda: monai_lncc("rectangular"),
        lambda f, m: lcc_loss(f, m, 7, denominator="clamp"),
    ),
    "MONAI, triangular": (
        lambda: monai_lncc("triangular"),
        lambda f, m: lcc_loss(f, m, 7, denominator="clamp", kernel="triangular"),
    ),
    "MONAI, gaussian": (
        lambda: monai_lncc("gaussian"),
        lambda f, m: lcc_loss(f, m, 7, denominator="clamp", kernel="gaussian"),
    ),
    "MONAI, mutual information": (monai_mi, lambda f, m: mi_loss(f, m, bins=16)),
    "neurite": (neurite_ncc, lambda f, m: -lcc_loss(f, m, 7)),
}


@pytest.mark.parametrize("name", SAME)
def test_numbers_of_other_packages(name):
    """The table of docs/ops/similarity.md."""
    pytest.importorskip(name.partition(",")[0].lower())
    theirs, ours = SAME[name]
    fixed, moved = torch.rand(2, 1, 1, 16, 17, 18)
    torch.testing.assert_close(theirs()(fixed, moved).squeeze(), ours(fixed, moved), rtol=1e-5, atol=1e-6)


# Links


def anchors(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), f"{name(path)}: {target}"
        assert goal.is_relative_to(ROOT), f"{name(path)}: {target} is outside of the repository"
        if anchor:
            assert anchor in anchors(goal), f"{name(path)}: {target}"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    tables = "\n".join("|" if line.startswith("|") else "" for line in lines).split("\n\n")
    assert max(t.count("|") for t in tables) <= 12  # head, rule, ten rows


# What the pages say of the code


def sources():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the list of files that git has")
    for file in listed.stdout.splitlines():
        path = ROOT / file
        if (
            path.suffix in (".py", ".cpp", ".h", ".cu", ".sh", "")
            and path.is_file()
            and not path.is_symlink()
        ):
            yield path.read_text(encoding="utf-8", errors="replace")


READ = r"""environ(?:\.get\(|\[)"(FASTREG_\w+)"|getenv\("(FASTREG_\w+)"|\$\{?(FASTREG_\w+)|getenv\(\s*"(FASTREG_\w+)"|\$\((FASTREG_\w+)\)"""


def test_environment_variables_are_all_in_the_table():
    read = {found for text in sources() for groups in re.findall(READ, text) for found in groups if found}
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(FASTREG_\w+)`", page, re.M)) == read


def test_git_ignores_what_the_commands_write():
    written = set()
    for path in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
            written |= set(re.findall(r"(?:^cat >|\s-o) ([\w.-]+)", block, re.M))
    assert {"demo", "registered", "runs"} <= written
    # Without the trailing slash a rule for folders does not hold.
    names = [n if "." in n else f"{n}/" for n in sorted(written)]
    run = subprocess.run(
        ["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode == 128:
        pytest.skip("needs git")
    assert run.stdout.split() == names


def test_every_op_has_a_place():
    pages = {p: p.read_text(encoding="utf-8") for p in (ROOT / "docs/ops").glob("*.md")}
    for op in fastreg.ops.__all__:
        assert sum(f".. autofunction:: fastreg.{op}\n" in text for text in pages.values()) == 1, op


def test_every_method_has_a_page():
    assert {p.stem for p in (ROOT / "docs/methods").glob("*.md")} - {"index"} == set(fastreg.models.MODELS)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_argparse_cli", "sphinx_copybutton"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "trees"), "docs", str(out / "html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_page_of_the_command_line_says_what_help_says(site):
    page = re.sub("<[^>]*>", "", (site / "command_line.html").read_text(encoding="utf-8"))
    assert "from coarse to fine (default: 100,100,60,30)" in page
    assert "control point spacing (default: automatic)" in page
    assert "fastreg register FIXED MOVING -o OUT [...]\nfastreg register FIXED MOVING" in page


# What a browser made of a page, in its title.
MEASURE = """<script>addEventListener("load", () => document.title = JSON.stringify([
    document.documentElement.scrollWidth, document.querySelectorAll("main table, article table").length,
    [...document.images].filter(i => !i.naturalWidth).length, document.images.length,
    document.querySelector("article").innerText.length]))</script>"""


@pytest.mark.parametrize(("page", "text", "tables", "images"), [
    ("index", "deformable image registration", 0, 1),
    ("results/speed", "best stock form", 10, 0),
])  # fmt: skip
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.slow
def test_pages_in_a_browser(site, page, text, tables, images, width, tmp_path):
    source = site / f"{page}.html"
    measured = source.with_name(f"{source.stem}-measured-{width}.html")
    measured.write_text(
        source.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8"
    )
    dom = chromium("--dump-dom", measured.as_uri(), width=width)
    assert text in dom
    across, n_tables, broken, n_images, letters = map(
        int, re.search(r"<title>\[([^<]*)\]</title>", dom)[1].split(",")
    )
    # Chromium's least width is 500.
    assert across <= max(width, 500), "the page scrolls sideways"
    assert n_tables >= tables
    assert broken == 0
    assert n_images >= images
    assert letters > 400
    shot = tmp_path / "page.png"
    chromium(f"--screenshot={shot}", source.as_uri(), width=width)
    image = pytest.importorskip("PIL.Image").open(shot)
    assert image.size == (width, 1400)
    assert len(image.convert("L").getcolors(256)) > 20, "nothing is drawn"
