"""Plants each mutant in a copy of the tree, builds what it changed and runs the tests of its ops: `.ci/mutants --help`.

A test that found a mutant is run once on the unmutated copy at the end, and must pass there.
"""

import argparse
import csv
import datetime
import hashlib
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads OpenMP

import numpy  # noqa: F401
import pytest
import torch._inductor.config  # noqa: F401
from incremental import build
from mutants import MUTANTS, ROOT, chosen, place

HERE = Path(__file__).resolve().parent
TABLE = HERE / "kills.csv"
FIELDS = [
    "mutant",
    "file",
    "kind",
    *(f"{t}_{what}" for t in ("full", "quick") for what in ("killed_by", "cpu_s", "commit", "date")),
]
# What pytest is told beside pyproject.toml's options, which choose the quick tier.
TIERS = {"quick": [], "full": ["-m", ""]}


def git(tree, *command):
    return subprocess.run(["git", *command], cwd=tree, capture_output=True, text=True, check=True).stdout


def copied(tree, to):
    """Sources and what is built; a mutant never meets the checkout."""
    for name in git(tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source = tree / name
        if name and (source.is_file() or source.is_symlink()):  # fastreg/kernels is a link to a folder
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name, follow_symlinks=False)
    extensions = list((tree / "fastreg").glob("_C.*.so"))
    if not extensions:
        raise SystemExit(f"{tree} has no compiled extension: build it first")
    for built in extensions:
        shutil.copy2(built, to / "fastreg")
    shutil.copytree(os.environ.get("FASTREG_OBJECTS", tree / "build" / "objects"), to / "build" / "objects")


def forked(tree, function):
    """(exit code, output) of the function in a copy of the tree.

    In a fork of this process, which has imported torch but nothing of fastreg: half the time of a mutant else.
    """
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
                os.chdir(tree)
                os.environ.update(PYTHONPATH=str(tree), FASTREG_CUDA="0", MAX_JOBS="1")
                os.environ.update(FASTREG_ISAS="native", FASTREG_OBJECTS="")
                others = [p for p in sys.path if Path(p) != HERE and not Path(p, "fastreg").is_dir()]
                sys.path[:] = [str(tree), *others]
                signal.alarm(900)
                code = function()
                sys.stdout.flush(), sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return code, out.read()


def tested(arguments):
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    extension = sys.modules["fastreg"]._ext._state["extension"] if "fastreg" in sys.modules else "loaded"
    if extension != "loaded":
        print(f"NOT LOADED: {extension}")
    return code


def first_failure(tree, arguments):
    """What a run of pytest ended with: None if all passed, else the first test that did not."""
    code, out = forked(tree, lambda: tested(arguments))
    if "NOT LOADED" in out:  # and the reference answered, in which no mutant is
        raise SystemExit(out[out.index("NOT LOADED") :])
    if code in (0, 5) or "ERROR: not found:" in out:  # 5: none chosen
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", out, re.MULTILINE)
    if failed:
        return failed[1]
    if code < 0:
        return f"ends by {signal.Signals(-code).name}"
    raise SystemExit(f"pytest {' '.join(arguments)} ended with {code}:\n{out[-3000:]}")


def test_files(tree, names):
    found = [
        str(p.relative_to(tree)) for n in names.split() for p in sorted(tree.glob(f"tests/**/test_{n}.py"))
    ]
    if not found:
        raise SystemExit(f"no test file is called after {names}")
    contract = "tests/ops/test_contract.py"  # and what it says of them
    return [*found, contract] if (tree / contract).exists() else found


def cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def built(tree, path, line, isa):
    """Compiles and links what the line changes; what was built of the same sources before is taken from build/mutants."""
    (extension,) = (tree / "fastreg").glob("_C.*.so")
    key = hashlib.sha1(isa.encode())
    for source in ["setup.py", *sorted(str(p.relative_to(tree)) for p in tree.glob("csrc/c[op]*/*"))]:
        key.update((tree / source).read_bytes())
    kept = ROOT / "build" / "mutants" / f"{key.hexdigest()}.so"
    if not kept.exists():
        code, out = forked(tree, lambda: build(isa, path, line))
        if code or "compiles" not in out:
            raise SystemExit(f"{path} does not build, or line {line + 1} changes no object:\n{out[-3000:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(extension, kept)
    extension.unlink()
    shutil.copy(kept, extension)


def tried(mutant, pristine, isa, tier, known):
    """(file, first test that finds the mutant or None); `known` have found it before."""
    path, text = place(mutant, pristine)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(pristine, tree)
        before = (tree / path).read_text(encoding="utf-8").splitlines()
        (tree / path).write_text(text, encoding="utf-8")
        line = next(i for i, (a, b) in enumerate(zip(before, text.splitlines(), strict=False)) if a != b)
        if path.suffix != ".py":
            built(tree, path, line, isa)
        files, options = test_files(tree, mutant.tests), TIERS[tier]
        killers = [f"{f}::{k.split('::', 1)[1]}" for f in files for k in known if f"/{Path(f).name}::" in k]
        its = " or ".join(mutant.tests.split())
        attempts = [killers] * bool(killers) + [
            [*files, "-k", f"({its}) and ({mutant.first})"],
            [*files, "-k", its],
        ]
        attempts += [[]] * (tier == "quick")
        return path, next(filter(None, (first_failure(tree, [*options, *some]) for some in attempts)), None)


def recorded():
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["mutant"]: row for row in csv.DictReader(file)}


def record(rows):
    """In the order of the list, without mutants that are there no more."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[m.name] for m in MUTANTS if m.name in rows)


def main():
    parser = argparse.ArgumentParser(
        prog=".ci/mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="mutants, or globs of their names; all without any")
    parser.add_argument(
        "--full", action="store_true", help="the complete test files of the ops, not the quick tier's tests"
    )
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="a built checkout to plant them in; this one by default"
    )
    parser.add_argument(
        "--missing", action="store_true", help="only mutants that the table has nothing of for this tier"
    )
    a = parser.parse_args()
    tier = "full" if a.full else "quick"
    rows, survivors, killers = recorded(), [], {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        pristine = Path(folder)
        copied(a.tree.resolve(), pristine)
        code, isa = forked(
            pristine, lambda: print(importlib.import_module("fastreg._ext").build_info()["isa"]) or 0
        )
        if code:
            raise SystemExit(f"the unmutated tree does not load its extension:\n{isa}")
        commit, date = git(a.tree, "rev-parse", "--short", "HEAD").strip(), datetime.date.today().isoformat()
        for mutant in chosen(a.names):
            if a.missing and rows.get(mutant.name, {}).get(f"{tier}_killed_by"):
                continue
            begun = cpu()
            row = dict.fromkeys(FIELDS, "") | rows.get(mutant.name, {})
            known = {row[f"{t}_killed_by"] for t in TIERS} - {""}
            path, killer = tried(mutant, pristine, isa.split()[-1], tier, known)
            seconds = f"{cpu() - begun:.0f}"
            print(f"{mutant.name:44} {seconds:>4} s  {killer or 'SURVIVES'}", flush=True)
            if killer is None:
                survivors.append(mutant.name)
            elif "::" in killer:
                killers[killer] = mutant.name
            row |= {"mutant": mutant.name, "file": str(path), "kind": mutant.kind}
            row |= {
                f"{tier}_killed_by": killer or "",
                f"{tier}_cpu_s": seconds,
                f"{tier}_commit": commit,
                f"{tier}_date": date,
            }
            rows[mutant.name] = row
            record(rows)
        false = first_failure(pristine, [*TIERS[tier], *killers]) if killers else None
    if false:
        raise SystemExit(
            f"{false} fails without a mutant too: that {killers.get(false, 'one')} is found says nothing"
        )
    print(f"{len(killers)} tests found mutants and pass without; survivors: {', '.join(survivors) or 'none'}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
