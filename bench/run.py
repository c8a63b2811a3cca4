#!/usr/bin/env python3
"""Measures the ops against what people run today, and writes the README's tables.

    python bench/run.py                         every op, 2 threads; rows go to bench/results/cpu.csv
    python bench/run.py lcc_loss warp           these ops
    python bench/run.py --check                 only the correctness gate
    python bench/run.py --table                 Markdown tables of the newest stored rows
    python bench/run.py --write-readme          the same, between the markers in README.md
    python bench/run.py --device cuda --headline        the headline cases of a GPU; FASTREG_CUDA_BACKEND=triton: of Triton

For each case: first the gate (fastreg must agree with fp64, or none of the case's rows are stored and the
exit status is 1; a peer that deviates from the formula it claims is timed and marked), then peak memory in
fresh processes (bench/memory.py), then times in one process, in rounds that alternate over the providers. A
ratio is the median over rounds of provider time / fastreg time. "Copy floor" is the time of moving the
bytes that nobody can avoid, at the bandwidth of a plain copy measured in the same rounds, as a fraction of
the time taken. Peers that are not installed are left out, with the reason.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import common, memory, models
from bench.common import say
from bench.experiments import tables as experiments
from bench.markdown import grouped, measured, number, table

QUICK = (48, 48, 48)
REAL = "real.csv"


def chosen_providers(module, case, args):
    names, skipped = [], {}
    for name in common.providers(module, case):
        if args.provider and name not in (*args.provider, "fastreg"):
            continue
        if args.quick and (name == "compile" or module.PROVIDERS[name].slow):
            skipped[name] = "left out by --quick"
        elif why := common.missing(module.PROVIDERS[name].package):
            skipped[name] = why
        else:
            names.append(name)
    return names, skipped


def run_case(module, case, args):
    """Gate, memory, times. Returns rows, or None where fastreg is red."""
    names, skipped = chosen_providers(module, case, args)
    title = f"{common.op_of(module)} {case} ({'x'.join(map(str, case.shape))})"
    verdicts = {}
    for name in list(names):
        verdicts[name] = verdict = common.gate(module, case, name, args.device)
        if module.PROVIDERS[name].package == "fastreg":
            if not verdict.ok:
                say(f"{title}: RED, {name} {verdict.text}; no row of this case is stored")
                return None
        elif verdict.text.startswith("fails"):
            skipped[name] = verdict.text
            names.remove(name)
    say(f"{title}: gate passed; " + "; ".join(f"{n}: {v.text}" for n, v in verdicts.items() if n in names))
    for name, why in skipped.items():
        say(f"  {name}: skipped, {why}")
    if args.check:
        return []
    volumes = {n: measured_memory(module, case, n, args) for n in names} if wants_memory(case, args) else {}
    rows = []
    for mode in dict.fromkeys(m for n in names for m in module.PROVIDERS[n].modes):
        timed = [n for n in names if mode in module.PROVIDERS[n].modes]
        copies = common.copies_of(module, case, args.device)
        runners = {n: common.Runner(module, case, n, mode, args.device, copies) for n in timed}
        slow = [n for n in timed if module.PROVIDERS[n].slow]
        most, budget = (3, 0.5) if args.quick else (args.rounds, args.budget)
        timings = common.measure(runners, args.device, budget=budget, most=most, slow=slow)
        for name, timing in timings.items():
            row = common.row(module, case, mode, name, timing, verdicts[name], args.device)
            if mode == module.PROVIDERS[name].modes[-1] and name in volumes:
                row.update(volumes[name])
            rows.append(row)
            say(
                f"  {mode:9} {name:28} {row['p50_ms']:>8} ms  [{row['p20_ms']}, {row['p80_ms']}]  "
                f"{row['rounds']} rounds  x{row['ratio']}  copy floor {row['floor']}"
                + (
                    f"  peak {row['peak_volumes']} volumes"
                    if row.get("peak_volumes") not in (None, "")
                    else ""
                )
            )
        del runners
    return rows


def wants_memory(case, args):
    return not args.no_memory and not args.quick and case.only != ("fastreg",)


def measured_memory(module, case, name, args):
    try:
        result = memory.fresh(
            [common.op_of(module), "--case", case.name, "--provider", name, "--device", args.device,
             "--threads", args.threads]
        )  # fmt: skip
    except RuntimeError as error:
        say(f"  memory of {name}: {error}")
        return {}
    return {
        "peak_volumes": f"{result['peak_volumes']:.3g}",
        "saved_volumes": f"{result['saved_volumes']:.3g}",
    }


def run_ops(args):
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    common.quiet()
    path = args.results / f"{args.device}.csv"
    red = []
    for op in args.op or common.ops():
        module = common.load(op)
        for case in module.CASES:
            if args.device not in case.on or (args.case and case.name not in args.case):
                continue
            if args.headline and case not in headline(module, args.device):
                continue
            if args.quick:
                if case.only == ("fastreg",):
                    continue
                case = common.shrunk(case, QUICK)
            rows = run_case(module, case, args)
            if rows is None:
                red.append(f"{op} {case}")
            elif rows and (args.store or not args.quick):
                common.append_rows(path, rows)
    if red:
        say(f"refused, because the gate is red: {', '.join(red)}")
    return 1 if red else 0


def headline(module, device):
    """The cases of this device alone, else the first."""
    cases = [c for c in module.CASES if device in c.on]
    return [c for c in cases if c.on == (device,)] or cases[:1]


# Tables


def label(row):
    package, _, version = row["version"].partition(" ")
    version = version.split("+")[0]
    names = {"torch": "PyTorch, best stock form", "compile": "the same under torch.compile"}
    name = names.get(row["provider"], row["provider"])
    return f"{name} {version}" if name == package and name != "fastreg" else name


def is_scaling(row, rows):
    """Whether fastreg is alone in the row's case."""
    case = [r for r in rows if all(r[k] == row[k] for k in ("op", "case", "shape", "dtype"))]
    return {r["provider"] for r in case} == {"fastreg"}


def speed_tables(rows):
    """One section per device: a table per op, then nanoseconds per voxel over sizes."""
    sections = []
    # On a GPU one section per implementation: CUDA C++ and Triton are separate runs.
    rows = [r | {"kernels": r["isa"] if r["device"] == "cuda" else ""} for r in common.newest(rows)]
    for mine in grouped(rows, "device", "device_name", "threads", "kernels").values():
        copy = statistics.median(float(r["copy_gbs"]) for r in mine)
        sections.append(measured(mine, f"copy bandwidth {copy:.3g} GB/s"))
        sections.append(op_table([r for r in mine if not is_scaling(r, mine)]))
        if scaling := scaling_table([r for r in mine if is_scaling(r, mine)]):
            text = "Nanoseconds per voxel of fastreg (forward and backward), by size; r: radius, c: channels (16), d: dilation:"
            sections += [text, scaling]
        marked = [r for r in mine if r["gate"].startswith("deviates")]
        if marked:
            notes = dict.fromkeys(f"{r['op']} {r['case']} {label(r)} ({r['gate']})" for r in marked)
            sections.append("¹ Not the numbers of the formula it states: " + "; ".join(notes) + ".")
    return "\n\n".join(sections) if sections else "No rows stored yet."


def op_table(rows):
    header = ["op, case", "shape", "", "fwd ms", "fwd+bwd ms", "p20 to p80", "x fastreg", "copy floor"]
    header += ["peak, volumes", "saved, volumes"]
    lines = []
    for (op, case, shape, dtype), group in grouped(rows, "op", "case", "shape", "dtype").items():
        for (provider,), both in grouped(group, "provider").items():
            by_mode = {r["mode"]: r for r in both}
            full = by_mode.get("fwd+bwd") or by_mode.get(common.ITERATION)
            forward = by_mode.get("fwd")
            shown = full or forward
            cells = [f"{op}, {case}", shape if dtype == "float32" else f"{shape} {dtype}", label(shown)]
            if shown["gate"].startswith("deviates"):
                cells[2] += " ¹"
            cells.append(number(forward["p50_ms"]) if forward else "")
            cells.append(number(full["p50_ms"]) if full else "")
            cells.append(f"{number(shown['p20_ms'])} to {number(shown['p80_ms'])}")
            cells.append("1" if provider == "fastreg" else number(shown["ratio"]))
            cells.append(number(shown["floor"], 2))
            cells += [number(shown.get(k), 3) for k in ("peak_volumes", "saved_volumes")]
            lines.append(cells)
    return table(header, lines)


def scaling_table(rows):
    series = {}
    for r in rows:
        if r["mode"] in ("fwd+bwd", common.ITERATION):
            spatial = [int(s) for s in r["shape"].split("x")[2:]]
            size = f"{spatial[-1]}{'²³'[len(spatial) - 2]}"
            name = ", ".join(filter(None, (r["op"], r["case"].removesuffix(str(spatial[-1])).rstrip("-"))))
            series.setdefault(name, {})[size] = float(r["p50_ms"]) * 1e6 / math.prod(spatial)
    if not series:
        return ""
    sizes = sorted({s for values in series.values() for s in values}, key=lambda s: (s[-1], int(s[:-1])))
    lines = [[name, *(number(v.get(s, "")) for s in sizes)] for name, v in series.items()]
    return table(["op, case", *sizes], lines)


def gpu_kernels():
    """Ops that have a kernel: those bound in csrc/cuda/, those launched from kernels/."""
    import fastreg.kernels

    sources = [p.read_text(encoding="utf-8") for p in (common.ROOT.parent / "csrc" / "cuda").glob("*.cu")]
    return {
        "CUDA C++": {op for text in sources for op in re.findall(r'm\.impl\("(\w+)"', text)},
        "Triton": set(fastreg.kernels.LAUNCHERS),
    }


# What tests do with kernels where no GPU is.
PROOF = {"CUDA C++": "emulated, compiled", "Triton": "interpreted, compiled"}


def ops_table(results):
    """Op x implementation: where it has really run (a row that passed the gate), or how else it was checked."""
    import fastreg
    import fastreg.ops

    executed = {}
    for device in ("cpu", "cuda"):
        for r in common.read_rows(results / f"{device}.csv"):
            if r["provider"] == "fastreg":
                kind = "cpu" if device == "cpu" else r["isa"]
                on = f"{r['device_name']} ({r['isa']})" if device == "cpu" and r["isa"] else r["device_name"]
                executed[r["op"], kind] = f"executed on {on}, {r['date'][:10]}"
    backends, kernels = fastreg.backends(), gpu_kernels()

    def cpu(op):
        if op not in backends:
            return "composed of others"
        what = "reference" if backends[op]["cpu"].startswith("PyTorch") else "C++"
        return f"{what}; {executed.get((op, 'cpu'), 'not executed')}"

    def gpu(op, kind):
        if op not in kernels[kind]:
            return "reference"
        return executed.get((op, kind), f"{PROOF[kind]}; never run on a GPU")

    lines = [[f"`{op}`", cpu(op), *(gpu(op, kind) for kind in PROOF)] for op in sorted(fastreg.ops.__all__)]
    return table(["op", "cpu", *PROOF], lines).replace("---:", "---")


def real_table(results):
    """Real scans registered as bench/real.py sets out, without further arguments, the newest of each pair."""
    rows = [r for r in common.read_rows(results / REAL) if not r.get("arguments")]
    rows = common.newest(rows, ("device_name", "threads", "pair", "score"))
    if not rows:
        return "No rows stored yet."
    units, names = (
        {"tre": " mm"},
        {"tre": "mean TRE", "dice": "mean Dice", "dice of all": "Dice of all labels"},
    )
    lines = []
    for r in rows:
        unit = units.get(r["score"], "")
        lines.append(
            [
                r["pair"],
                r.get("preset") or "defaults",
                names.get(r["score"], r["score"]),
                f"{number(r['before'])}{unit}",
                f"{number(r['after'])}{unit}",
                f"{r['goal']}{unit}" if r["goal"] else "",
                f"{r['seconds']} (of {number(r['limit'])})",
                f"{100 * float(r['folding']):.2g} %",
                r["met"],
                f"{r['device_name']}, {r['threads']} threads, {r['commit']}, {r['date'][:10]}",
            ]
        )
    header = [
        "pair",
        "options",
        "score",
        "before",
        "after",
        "goal",
        "seconds",
        "folding",
        "goals met",
        "measured on",
    ]
    return table(header, lines)


def tables(results):
    rows = [r for device in ("cpu", "cuda") for r in common.read_rows(results / f"{device}.csv")]
    return {
        "ops": ops_table(results),
        "bench": speed_tables(rows),
        "models": models.tables(results),
        "experiments": experiments.markdown(results),
        "real": real_table(results),
    }


def write_readme(path, results):
    """Replaces what stands between <!-- NAME:start --> and <!-- NAME:end -->; both must be there."""
    old = text = path.read_text(encoding="utf-8")
    for name, content in tables(results).items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            say(f"{path.name} must hold {start} and {end} once, in this order")
            return 1
        head, rest = text.split(start)
        text = f"{head}{start}\n{content}\n{end}{rest.split(end)[1]}"
    if text != old:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return 0


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("op", nargs="*", help=f"of {', '.join(common.ops())} (default: all)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    p.add_argument("--case", action="append", help="only cases of this name (repeatable)")
    p.add_argument("--provider", action="append", help="fastreg and only these (repeatable)")
    p.add_argument(
        "--budget", type=float, default=8.0, help="seconds per provider, case and mode (default 8)"
    )
    p.add_argument("--rounds", type=int, default=25, help="at most so many rounds (default 25)")
    p.add_argument(
        "--no-memory", action="store_true", help="no peak memory (it runs each provider in fresh processes)"
    )
    p.add_argument(
        "--quick", action="store_true", help="48^3, three rounds, no compilation; stored only with --store"
    )
    p.add_argument("--headline", action="store_true", help="only the headline cases of the device")
    p.add_argument("--store", action="store_true", help="store rows of --quick too")
    p.add_argument("--check", action="store_true", help="only the correctness gate")
    p.add_argument("--table", action="store_true", help="print tables from stored rows, measure nothing")
    p.add_argument(
        "--write-readme", action="store_true", help="put the tables into the README, measure nothing"
    )
    p.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the stored rows")
    p.add_argument("--readme", type=Path, default=common.ROOT.parent / "README.md")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if unknown := set(args.op) - set(common.ops()):
        p.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(common.ops())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("no CUDA device")
    if args.table or args.write_readme:
        if args.table:
            say("\n\n".join(f"<!-- {k} -->\n{v}" for k, v in tables(args.results).items()))
        return write_readme(args.readme, args.results) if args.write_readme else 0
    return run_ops(args)


if __name__ == "__main__":
    sys.exit(main())
