"""Counts of .ci/fuzz: stored, and as a page."""

import time

from bench import common
from bench.markdown import table

# Why a result of finite input may lie beyond the tolerance (tests/fuzz/fuzz.py sees to it that it is so).
RULES = {
    "conditioning": "The kernel gives what the formula gives of inputs 4e-6 (all fp64: 1e-14; MIND: also of their largest value) away: kinks of the interpolant at faces "
    "of cells and of |x| at 0, ties, clamps, windows about to be flat, differences of nearly equal numbers.",
    "cancellation": "MI and MIND where the true result is 0: what is left is at most 64 roundings of terms of the size bins / contrast, "
    "or a millionth of it where the same is computed in fp64.",
    "range": "Squares of the values leave the arithmetic type (fp32 unless all inputs are fp64).",
    "not finite": "Inputs that are not finite: values are NaN and infinite where they have to be; of gradients it is not promised.",
}
FIELDS = ("date", "commit", "fastreg", "torch", "isa", "seed", "op", "cases", "ok", *RULES, "wrong", "crash")


def store(counts, seed):
    """counts: op -> {verdict: how many}."""
    import torch

    import fastreg

    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": common.commit(),
        "fastreg": fastreg.__version__,
        "torch": torch.__version__,
        "isa": fastreg._ext.build_info().get("isa", "reference"),
        "seed": seed,
    }
    rows = [
        about | {"op": op, "cases": sum(c.values())} | {k: c[k] for k in FIELDS[8:]}
        for op, c in sorted(counts.items())
    ]
    common.append_rows(common.RESULTS / "fuzz.csv", rows, FIELDS)


def sections(results):
    """The newest run: an op a row; below it why results may deviate."""
    rows = common.read_rows(results / "fuzz.csv")
    if not rows:
        return {}
    last = rows[-1]
    run = [r for r in rows if all(r[k] == last[k] for k in ("date", "commit", "isa", "seed"))]
    kinds = FIELDS[7:]
    lines = [[f"`{r['op']}`", *(r[k] for k in kinds)] for r in run]
    lines.append(["all", *(str(sum(int(r[k]) for r in run)) for k in kinds)])
    about = f"Seed {last['seed']}, {last['isa']}, torch {last['torch']}; fastreg at {last['commit']}, {last['date']}."
    text = (
        "Random sizes (from 1 voxel an axis), layouts, dtypes, options and values (offsets of 1000, scales from 1e-30 to 1e30, constants, "
        "denormals, ties, displacements of up to 1e12 voxels, NaN and infinities), each op's value and every gradient against its "
        f"fp64 reference within the tolerances of the tests. {about}"
    )
    rules = table(["counted apart", "why"], [[name, why] for name, why in RULES.items()])
    return {"": "\n\n".join([text, table(["op", *kinds], lines), rules])}
