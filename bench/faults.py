"""Plants faults of disks, files and processes, and counts what is lost or wrong without a word.

    python -m bench.faults [--kind NAME] [--share X] [--store]

Each case runs in a process of its own, forked from this one. It ends "refused" (one line that says why, and what was there before
is as it was), "harmless" (all is right) or "silent" (something is wrong, and nobody is told). Exit status: 1 where one is silent.
--store adds the counts to bench/results/faults.csv; --share 0.1 takes a tenth of the cases.
"""

import argparse
import contextlib
import functools
import io as _io
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from bench import common  # noqa: E402
from fastreg import _exchange, cli, io  # noqa: E402
from fastreg._files import InputError, held, output_folder, remade, replacing, write_json  # noqa: E402
from fastreg.data import phantom  # noqa: E402
from fastreg.data.pairs import find_pairs  # noqa: E402
from fastreg.training import checkpoint  # noqa: E402
from fastreg.training.run import FILES  # noqa: E402

FIELDS = ["date", "commit", "device_name", "simpleitk", "numpy", "torch", "python", "class", "case", "cases", "silent", "refused", "harmless"]  # fmt: skip
SILENT, REFUSED, HARMLESS = "silent", "refused", "harmless"
GRID = io.Geometry.of((14, 18, 16), (1.5, 1.0, 1.25))
LONG = 60  # seconds, then it hangs
STEPS = (
    "os.rename",
    "os.link",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "open",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
)


def forked(function):
    """What the function returns in a process of its own (text), and the status that it ends with."""
    reads, writes = os.pipe()
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 70
        try:
            os.close(reads)
            signal.alarm(LONG)
            os.write(writes, str(function()).encode())
            status = 0
        except BaseException as error:
            os.write(writes, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(writes)
    with os.fdopen(reads, "rb") as stream:
        told = stream.read().decode()
    return told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def blob(shift=0.0, grid=GRID):
    p = np.indices(grid.shape).astype(np.float32)
    middle = np.reshape([(n - 1) / 2 + shift for n in grid.shape], (-1, *[1] * grid.nd))
    noise = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    return (np.exp(-((p - middle) ** 2).sum(0) / 20) + 0.05 * noise).astype(np.float32)


def tree(folder):
    """Path -> content of all that is in a folder, hidden or not."""
    return (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if folder.exists()
        else None
    )


def command(arguments):
    """(status, stderr) of the command line."""
    said = _io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(_io.StringIO()):
        status = cli.main([str(a) for a in arguments])
    return status, said.getvalue().strip()


class Cases:
    """The inputs that all share, and the cases by class and name: each a function of an empty folder that returns one of three words."""

    def __init__(self, work, share):
        self.work, self.share, self.count = work, share, itertools.count()
        # No case is about what a disk has not yet, and it is most of the time.
        _exchange.sync = lambda path: None
        common_ = work / "common"
        common_.mkdir()
        self.at = common_
        for name, shift in (("fixed", 0.0), ("moving", 0.7)):
            io.write_image(common_ / f"{name}.nii.gz", blob(shift), GRID)
        (common_ / "images").mkdir()
        flat = io.Geometry.of((18, 16), (1.0, 1.25))
        for k in range(2):
            io.write_image(common_ / "images" / f"s{k}.nii.gz", blob(k / 2, flat), flat)
        self.u = torch.zeros(1, 3, *GRID.shape)
        io.write_displacement(common_ / "field.nii.gz", self.u, GRID)
        io.write_landmarks(common_ / "points.csv", GRID.to_physical(np.full((40, 3), 5.0)))

    @functools.cached_property
    def weights(self):
        """A checkpoint of a training in `run`."""
        forked(lambda: self.train(self.at / "run"))
        return self.at / "run" / "best.pt"

    def train(self, out, *more):
        net = ("--set", "encoder=(2,2,2,2)", "--set", "decoder=(2,2,2,2,2,2)", "--set", "similarity=mse")
        told = command(
            [
                "train",
                "--method",
                "voxelmorph",
                *net,
                "--pairs",
                self.at,
                "-o",
                out,
                "--steps",
                2,
                "--save-every",
                1,
                "--quiet",
                "--threads",
                1,
                "--device",
                "cpu",
                *more,
            ]
        )
        return told

    def some(self, cases):
        """A share of them, at least three."""
        cases = list(cases)
        wanted = max(3, round(len(cases) * self.share))
        return cases if wanted >= len(cases) else random.Random(0).sample(cases, wanted)

    def run(self, kind, name, cases):
        """Counts of the outcomes of the cases."""
        found = Counter()
        for case in self.some(cases):
            folder = self.work / f"{next(self.count)}"
            folder.mkdir()
            told, status = forked(lambda case=case, folder=folder: case(folder))
            word = told if status == 0 and told in (SILENT, REFUSED, HARMLESS) else SILENT
            if word == SILENT:
                common.say(f"{kind}, {name}: {told or f'ended with status {status}'}"[:300])
            found[word] += 1
            shutil.rmtree(folder)
        return {
            "class": kind,
            "case": name,
            "cases": found.total(),
            **{w: found[w] for w in (SILENT, REFUSED, HARMLESS)},
        }


def judged(kept, status, said, name=""):
    """Of something that must end as refused: one line says why, whatever there was to warn of before."""
    why = [line for line in said.splitlines() if not line.startswith("fastreg: warning: ")]
    if status != 2 or len(why) != 1 or name not in why[0]:
        return f"status {status}, {said!r}"
    return REFUSED if kept else "refused, but something is not as it was"


# A full disk, at each output in turn


def full(name, share):
    """From the moment at which output `name` is begun files cannot grow beyond `share` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def begun(event, arguments):
        made = event == "os.mkdir" and f".{name}." in os.path.basename(os.fspath(arguments[0]))
        logged = (
            event == "open"
            and isinstance(arguments[0], (str, os.PathLike))
            and os.fspath(arguments[0]).endswith("log.csv")
            and name == "log.csv"
        )
        if made or logged:
            resource.setrlimit(resource.RLIMIT_FSIZE, (share, resource.RLIM_INFINITY))

    sys.addaudithook(begun)


def full_disks(c):
    quick = ("--levels", 1, "--iterations", 1, "--quiet", "--threads", 1, "--device", "cpu")
    pair = (c.at / "fixed.nii.gz", c.at / "moving.nii.gz")
    labels = ("--fixed-labels", c.at / "labels.nii.gz", "--moving-labels", c.at / "labels.nii.gz")
    io.write_image(c.at / "labels.nii.gz", (blob() > 0.4).astype(np.uint8), GRID)
    plain = ("--quiet", "--threads", 1, "--device", "cpu")
    flat = [c.at / "images" / f"s{k}.nii.gz" for k in range(2)]
    commands = {
        "register": ["register", *pair, *labels, *quick],
        "apply --field": [
            "apply",
            "--field",
            c.at / "field.nii.gz",
            pair[1],
            "--labels",
            c.at / "labels.nii.gz",
            "--points",
            c.at / "points.csv",
            *plain,
        ],
        "apply --weights": ["apply", "--weights", c.weights, *flat, *plain],
        "demo": ["demo", *quick],
    }
    for title, arguments in commands.items():
        if title == "demo":
            phantom.thorax = functools.partial(phantom.thorax, (28, 28, 40))
        whole = c.at / f"out-{title.replace(' ', '')}"
        forked(lambda a=arguments, o=whole: command([*a, "-o", o]))
        sizes = {p.name: p.stat().st_size for p in whole.iterdir()}

        def case(folder, name, share, before, arguments=arguments, whole=whole):
            out = folder / "out"
            if before:
                shutil.copytree(whole, out)
            was = tree(out)
            full(name, share)
            told = command([*arguments, "-o", out, "--force"])
            return judged(
                tree(out) == was and [p.name for p in folder.iterdir()] in ([], ["out"]), *told, name
            )

        # (name, bytes, whether OUT is there before); a report's size is not the same each time
        shares = [(name, size // 2, title != "demo") for name, size in sizes.items()]
        if title != "demo":
            shares += [(name, 0, False) for name in sizes]
            shares += [(name, size - 1, False) for name, size in sizes.items() if name != "report.json"]
        yield "full disk", title, [lambda f, s=s, case=case: case(f, *s) for s in shares]

    def training(folder, name, share):
        out = folder / "run"
        c.train(out)
        shutil.rmtree(out) if share % 2 else None
        full(name, share)
        status, said = c.train(out, "--force")
        for pt in out.glob("*.pt"):
            checkpoint.load(pt)
        return judged(not [p for p in folder.rglob(".*")], status, said, name)

    sizes = {p.name: p.stat().st_size for p in (c.at / "run").iterdir()}
    shares = [(name, share) for name, size in sizes.items() for share in (0, size // 4 * 2 + 1)]
    yield "full disk", "train", [lambda f, s=s: training(f, *s) for s in shares]


def full_writers(c):
    writers = {f"write_image .{e}": (f"a.{e}", write_as(e)) for e in WRITTEN}
    writers |= {
        "write_displacement": ("u.nii.gz", lambda p: io.write_displacement(p, c.u, GRID)),
        "write_displacement .h5": ("u.h5", lambda p: io.write_displacement(p, c.u, GRID)),
        "write_landmarks": ("p.csv", lambda p: io.write_landmarks(p, np.ones((50, 3)))),
        "checkpoint.save": (
            "c.pt",
            lambda p: checkpoint.save(p, dict.fromkeys(checkpoint.KEYS, torch.ones(500))),
        ),
        "write_json": ("r.json", lambda p: write_json(p, {"a": list(range(99))})),
    }
    for title, (name, write) in writers.items():

        def written(folder, share, name=name, write=write):
            write(folder / name)
            was, size = tree(folder), (folder / name).stat().st_size
            largest = max(p.stat().st_size for p in folder.iterdir())
            full(name, int(share * (largest if share else size)) - (share == 1))
            try:
                write(folder / name)
            except OSError as error:
                same = tree(folder) == was and not [p for p in folder.iterdir() if p.name.startswith(".")]
                return REFUSED if same and name in str(error.filename) else f"{error}, changed: {not same}"
            return SILENT

        yield "full disk", title, [lambda f, s=s, w=written: w(f, s) for s in (0, 0.25, 0.5, 0.9, 1)]


# Files that are not what was written


WRITTEN = ("nii.gz", "nii", "mha", "mhd", "nrrd", "nhdr", "hdr", "img.gz", "gipl", "gipl.gz", "vtk", "mrc", "tif", "png", "bmp", "h5")  # fmt: skip
FLAT = ("png", "bmp", "tif")


def write_as(extension):
    grid = io.Geometry.of((40, 50), (1.0, 1.0)) if extension in FLAT else GRID
    array = (
        np.random.default_rng(1)
        .integers(0, 250, grid.shape)
        .astype(np.uint8 if extension in ("bmp", "vtk") else np.int16)
    )
    return lambda path: io.write_image(
        path, array.astype(np.uint16) if extension in FLAT[::2] else array, grid
    )


def same(one, other):
    if isinstance(one, dict):
        weights = one["weights"], other["weights"]
        return all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]) and {**one, "weights": 0, "optimizer": 0} == {**other, "weights": 0, "optimizer": 0}  # fmt: skip
    return one[1] == other[1] and one[0].dtype == other[0].dtype and np.array_equal(one[0], other[0])


def altered(original, alter, read):
    """The case of a file whose bytes another function changes."""

    def case(folder):
        for path in original.parent.iterdir():
            shutil.copy(path, folder)
        target = folder / original.name
        first = read(original)
        data = max(folder.iterdir(), key=lambda p: p.stat().st_size)
        data.write_bytes(alter(data.read_bytes()))
        try:
            found = read(target)
        except InputError as error:
            return REFUSED if len(str(error).splitlines()) == 1 else str(error)
        return HARMLESS if same(found, first) else SILENT

    return case


def flip(k, start):
    def alter(content):
        content = bytearray(content)
        bit = random.Random(k).randrange(8 * start(content), 8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        return bytes(content)

    return alter


# Where data that a checksum covers begin: a header in plain bytes has none.
STREAMS = {
    "nii.gz": lambda b: 10,
    "mha": lambda b: b.index(b"LOCAL\n") + 6,
    "mhd": lambda b: 0,
    "nrrd": lambda b: b.index(b"\n\n") + 12,
    "nhdr": lambda b: 10,
    "img.gz": lambda b: 10,
    "gipl.gz": lambda b: 10,
    "png": lambda b: 8,
}


def damaged(c):
    for extension in (e for e in WRITTEN if e != "bmp"):  # its greys are read as colours
        folder = c.work / f"whole-{extension}"
        folder.mkdir()
        path = folder / f"a.{extension}"
        write_as(extension)(path)
        if extension in STREAMS:
            flips = [altered(path, flip(k, STREAMS[extension]), io.read_image) for k in range(100)]
            yield "flipped bit", f".{extension}", flips
        size = max(p.stat().st_size for p in folder.iterdir())
        cuts = sorted({0, 1, 100, size // 4, size // 2, size - 1000, size - 9, size - 8, size - 4, size - 1})
        yield "cut short", f".{extension}", [altered(path, lambda b, n=n: b[:n], io.read_image) for n in cuts]
    folder = c.work / "whole-checkpoint"
    folder.mkdir()
    shutil.copy(c.weights, folder / "c.pt")
    yield (
        "flipped bit",
        "checkpoint",
        [altered(folder / "c.pt", flip(k, lambda b: 0), checkpoint.load) for k in range(200)],
    )
    size = (folder / "c.pt").stat().st_size
    yield "cut short", "checkpoint", [altered(folder / "c.pt", lambda b, n=n: b[:n], checkpoint.load) for n in (0, 1, 100, size // 2, size - 100, size - 1)]  # fmt: skip


# Headers that claim what is not there, or more than there is memory


def claims(c):
    side = 3000
    meta = f"ObjectType = Image\nNDims = 3\nDimSize = {side} {side} {side}\nElementType = MET_SHORT\nCompressedData = {{}}\nElementDataFile = {{}}\n"
    nrrd = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {side} {side} {side}\nendian: little\nencoding: {{}}\n{{}}\n"
    sitk = io._sitk.sitk()
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkInt16), str(c.at / "tiny.nii"))
    nifti = bytearray((c.at / "tiny.nii").read_bytes())
    nifti[42:48] = np.array([side] * 3, "<i2").tobytes()

    def packed(content):
        import gzip

        return gzip.compress(bytes(content))

    texts = {
        "a.mha": meta.format(False, "LOCAL").encode() + bytes(100),
        "b.mha": meta.format(True, "LOCAL").encode() + bytes(100),
        "a.nrrd": nrrd.format("raw", "").encode() + bytes(100),
        "b.nrrd": nrrd.format("gzip", "").encode() + packed(bytes(100)),
        "a.nii": bytes(nifti),
        "a.nii.gz": packed(nifti),
        "a.mhd": meta.format(False, "data.raw").encode(),
        "b.mhd": meta.format(True, "data.raw").encode(),
        "a.nhdr": nrrd.format("raw", "data file: data.raw").encode(),
    }

    def claiming(folder, name, grown):
        path = folder / name
        path.write_bytes(texts[name])
        (folder / "data.raw").write_bytes(bytes(100))
        if grown:  # all is there, in a file without blocks, but not as much memory
            data = path if name[2:] in ("mha", "nrrd", "nii") else folder / "data.raw"
            os.truncate(data, 2 * side**3 + 2000)
            resource.setrlimit(resource.RLIMIT_AS, (40 << 30, resource.RLIM_INFINITY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            io.read_image(path)
        except InputError as error:
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
            if grown and "GB of memory" not in str(error):
                return str(error)
            return REFUSED if taken < 100 else f"refused after {taken} MB"
        return SILENT

    yield "claims", "more than the file holds", [lambda f, n=n: claiming(f, n, False) for n in texts]
    whole = [n for n in texts if n[0] == "a" and not n.endswith(".gz")]
    yield "claims", "more than there is memory", [lambda f, n=n: claiming(f, n, True) for n in whole]


# What is no file


def make(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


def no_files(c):
    readers = {
        "image": ("a.nii.gz", io.read_image),
        "field": ("u.nii.gz", io.read_displacement),
        "landmarks": ("p.csv", lambda p: io.read_landmarks(p, 3)),
        "pairs": ("p.csv", find_pairs),
        "checkpoint": ("c.pt", checkpoint.load),
        "image of another suffix": ("a.dcm", io.read_image),
    }
    for title, (name, read) in readers.items():

        def case(folder, kind, name=name, read=read):
            os.chdir(folder)
            make(folder / name, kind)
            signal.alarm(5)
            try:
                read(folder / name)
            except InputError as error:
                return REFUSED if len(str(error).splitlines()) == 1 else str(error)
            return SILENT

        yield (
            "no file",
            title,
            [lambda f, k=k, case=case: case(f, k) for k in ("pipe", "folder", "device", "socket")],
        )

    def beside(folder, extension, kind):
        os.chdir(folder)
        write_as(extension)(folder / f"a.{extension}")
        data = max(folder.iterdir(), key=lambda p: p.stat().st_size)
        data.unlink()
        make(data, kind)
        signal.alarm(5)
        try:
            io.read_image(folder / f"a.{extension}")
        except InputError:
            return REFUSED
        return SILENT

    both = itertools.product(("mhd", "nhdr", "hdr", "img.gz"), ("pipe", "folder", "device", "socket"))
    yield "no file", "data beside a header", [lambda f, b=b: beside(f, *b) for b in both]


# Killed


def dies(kill):
    """Kills this process at its so many-th step, from now on; a list that counts them."""
    steps = [0]

    def hook(event, _):
        if event in STEPS and steps:
            steps[0] += 1
            if steps[0] == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return steps


def replaces(out, journal, kill):
    """The steps that an output folder takes; dies at one of them."""
    if journal:
        _exchange._swap = lambda: None
    steps = dies(kill)
    with output_folder(out, ("a", "b", "c"), replace=True) as folder:
        for name in "ab":
            (folder / name).write_text("new")
    return steps[0]


def writes(path, kill):
    steps = dies(kill)
    with replacing(path) as temporary:
        temporary.write_text("new")
    return steps[0]


def trains(out, kill):
    with held(out):
        steps = dies(kill)
        with remade(out, FILES) as folder:
            (folder / "last.pt").write_text("new")
        return steps[0]


def visible(folder):
    return {
        p.name: p.read_text(encoding="utf-8")
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".")
    }


def killed(folder, act, old, new, again):
    """Whole old or whole new once the next run has begun, with nothing hidden beside or inside."""
    out = folder / "out"
    out.mkdir()
    for name, text in old.items():
        (out / name).write_text(text)
    _, status = forked(lambda: act(out))
    if status != -signal.SIGKILL:
        return f"status {status}"
    again(out)
    hidden = [p.name for p in folder.rglob(".*")]
    found = visible(out)
    if hidden or found not in (old, new):
        return f"{found}, {hidden}"
    return HARMLESS


def kills(c):
    old = {"a": "old", "b": "old", "c": "old", "mine": "kept"}
    new = {"a": "new", "b": "new", "mine": "kept"}

    def refused(out):
        with contextlib.suppress(InputError), output_folder(out, ("a", "b", "c")):
            pass

    runs = {
        "last.pt": "old", "best.pt": "old", "log.csv": "old", "mine": "kept"
    }  # fmt: skip

    def settled(out):
        with held(out):
            pass

    one = {"a": "old"}
    plans = {
        "--force, folders exchanged": (lambda o, k: replaces(o, False, k), old, new, refused),
        "--force, by a journal": (lambda o, k: replaces(o, True, k), old, new, refused),
        "train --force": (trains, runs, {"last.pt": "new", "mine": "kept"}, settled),
        "a file": (lambda o, k: writes(o / "a", k), one, {"a": "new"}, settled),
        "a new folder": (
            lambda o, k: replaces(o / "new", False, k),
            one,
            one,
            lambda o: (refused(o / "new"), shutil.rmtree(o / "new", ignore_errors=True)),
        ),
    }
    for title, (act, before, after, again) in plans.items():
        trial = c.work / f"kill-{title.replace(' ', '')}"
        trial.mkdir()
        for name, text in before.items():
            (trial / name).write_text(text)
        told, _ = forked(lambda act=act, trial=trial: act(trial, 0))
        points = range(1, int(told) + 1)
        yield "killed", title, [lambda f, k=k, p=(act, before, after, again): killed(f, lambda out: p[0](out, k), *p[1:]) for k in points]  # fmt: skip


# Two at once


def twice(c):
    def case(folder, first, second, there):
        out = folder / "out"
        if there:
            out.mkdir()
        reads, writes = os.pipe()
        if not (child := os.fork()):
            try:
                with first(out) as made:
                    os.write(writes, b"x")
                    time.sleep(0.3)
                    (Path(made or out) / "a").write_text("first")
            finally:
                os._exit(0)
        os.read(reads, 1)
        try:
            with second(out):
                word = SILENT
        except InputError as error:
            word = REFUSED if "another run" in str(error) else str(error)
        os.waitpid(child, 0)
        ended = visible(out) == {"a": "first"} and not list(folder.rglob(".*"))
        return word if ended else f"{visible(out)}, {list(folder.rglob('.*'))}"

    @contextlib.contextmanager
    def training(out):
        out.mkdir(exist_ok=True)
        with held(out):
            yield out

    def writing(out):
        return output_folder(out, ("a",), replace=True)

    ways = list(itertools.product((writing, training), (writing, training), (False, True)))
    yield "two at once", "register, train", [lambda f, w=w: case(f, *w) for w in ways]


KINDS = {
    "full": full_disks,
    "writers": full_writers,
    "damaged": damaged,
    "claims": claims,
    "files": no_files,
    "kills": kills,
    "twice": twice,
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", action="append", choices=list(KINDS), help="only this kind; may be repeated"
    )
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the cases (default: all)")
    parser.add_argument("--store", action="store_true", help="add the counts to bench/results/faults.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    import SimpleITK

    versions = {
        "simpleitk": SimpleITK.Version.VersionString(),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastreg-faults-") as temporary:
        # The command line may use threads on its own: in another process.
        cases = Cases(Path(temporary), args.share)
        for kind in args.kind or KINDS:
            for named in KINDS[kind](cases):
                rows.append({**common.environment("cpu"), **versions, **cases.run(*named)})
                r = rows[-1]
                common.say(
                    f"{r['class']:12} {r['case']:28} {r['cases']:4}: {r[SILENT]} silent, {r[REFUSED]} refused, {r[HARMLESS]} harmless"
                )
    bad = sum(r[SILENT] for r in rows)
    common.say(f"{sum(r['cases'] for r in rows)} cases, {bad} silent")
    if args.store:
        common.append_rows(common.RESULTS / "faults.csv", [{k: r[k] for k in FIELDS} for r in rows], FIELDS)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
