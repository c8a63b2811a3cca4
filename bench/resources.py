#!/usr/bin/env python3
"""What ptxas says of the CUDA kernels of the last build: registers, shared memory, spills.

FASTREG_CUDA=1 FASTREG_CUDA_ARCHS=90 python setup.py build_ext --inplace
python bench/resources.py                 a table of the kernels
python bench/resources.py --check         exit status 1 where an fp32 kernel of a headline op spills
python bench/resources.py --write         bench/results/cuda_resources.csv
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADLINE = ("warp", "lcc_loss", "local_correlation", "mind")
# A few words that spill for an occupancy worth more: MIND of radius 3.
ALLOWED = re.compile(r"mind_\w+<float, (true|false), 3>")
FIELDS = ["op", "kernel", "arch", "registers", "shared_bytes", "stack_bytes", "spill_stores", "spill_loads"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def readable(symbols):
    """Demangled, without namespaces and parameters, where c++filt is."""
    try:
        run = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return symbols
    names = []
    for name in run.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|fastreg::|^void ", "", name)
        names.append(re.sub(r"\([A-Za-z_][\w:<>, ]*\)(?=\d|true|false)", "", name).split("(")[0])
    return names


def kernels(folder):
    rows = []
    for report in sorted(folder.glob("cuda-*/*.ptxas")):
        found = [m.groupdict() for m in ENTRY.finditer(report.read_text(encoding="utf-8"))]
        for m, name in zip(found, readable([m["symbol"] for m in found]), strict=True):
            shared = re.search(r"(\d+) bytes smem", m["rest"])
            values = [report.stem, name, f"sm_{m['arch']}", m["registers"], shared[1] if shared else "0"]
            rows.append(dict(zip(FIELDS, [*values, m["stack"], m["stores"], m["loads"]], strict=True)))
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--objects",
        type=Path,
        default=Path(os.environ.get("FASTREG_OBJECTS") or ROOT / "build" / "objects"),
        help="folder of the build's objects",
    )
    p.add_argument("--check", action="store_true", help="fail where an fp32 kernel of a headline op spills")
    p.add_argument("--write", action="store_true", help="store the table under bench/results/")
    args = p.parse_args(argv)
    rows = kernels(args.objects)
    if not rows:
        print(f"resources: no report under {args.objects}: build with FASTREG_CUDA=1 first", file=sys.stderr)
        return 1
    for r in rows:
        spills = f"  SPILLS {r['spill_stores']}+{r['spill_loads']}" if r["spill_stores"] != "0" else ""
        print(
            f"{r['op']:20} {r['arch']:7} {r['registers']:>3} registers {r['shared_bytes']:>6} B shared  {r['kernel']}{spills}"
        )
    if args.write:
        with (ROOT / "bench" / "results" / "cuda_resources.csv").open(
            "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    bad = [
        r for r in rows
        if r["op"] in HEADLINE and int(r["spill_stores"]) and "<float" in r["kernel"] and not ALLOWED.match(r["kernel"])
    ]  # fmt: skip
    if args.check and bad:
        print(f"{len(bad)} kernels spill: {', '.join(r['kernel'] for r in bad)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
