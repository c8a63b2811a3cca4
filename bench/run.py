#!/usr/bin/env python3
"""Measures the ops against what people run today; bench/tables.py writes the tables.

    python bench/run.py                         every op, 2 threads; rows go to bench/results/cpu.csv
    python bench/run.py lcc_loss warp           these ops
    python bench/run.py --check                 only the correctness gate
    python bench/run.py --memory-only           peak memory alone, into the rows of this commit that have none
    python bench/run.py --device cuda --headline        the headline cases of a GPU; FASTREG_CUDA_BACKEND=triton: of Triton

For each case: first the gate (fastreg must agree with fp64, or none of the case's rows are stored and the
exit status is 1; a peer that deviates from the formula it claims is timed and marked), then peak memory in
fresh processes (bench/memory.py), then times in one process, in rounds that alternate over the providers. A
ratio is the median over rounds of provider time / fastreg time. "Copy floor" is the time of moving the
bytes that nobody can avoid, at the bandwidth of a plain copy measured in the same rounds, as a fraction of
the time taken. Peers that are not installed are left out, with the reason.
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import common, memory
from bench.common import say

QUICK = (48, 48, 48)


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


def add_memory(module, case, args, path):
    """Peak memory into the newest rows of this case and commit that have none; whether fastreg has a row."""
    op, ours = common.op_of(module), True
    for name in chosen_providers(module, case, args)[0]:
        mode = module.PROVIDERS[name].modes[-1]
        wanted = common.identity(module, case, mode, name, args.device)
        del wanted["date"]

        def newest(rows, wanted=wanted):
            return next((r for r in reversed(rows) if all(r[k] == str(v) for k, v in wanted.items())), None)

        row = newest(common.read_rows(path))
        if row is None:
            say(f"{op} {case}: no row of {name} at {wanted['commit']}; measure its time first")
            ours = ours and module.PROVIDERS[name].package != "fastreg"
        elif not row["peak_volumes"]:
            volumes = measured_memory(module, case, name, args)
            common.rewrite_rows(path, lambda rows, v=volumes, f=newest: f(rows).update(v) or rows)
            say(f"{op} {case} {name}: peak {volumes.get('peak_volumes', 'unknown')} volumes")
    return ours


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
            if args.memory_only:
                if wants_memory(case, args) and not add_memory(module, case, args, path):
                    red.append(f"{op} {case}")
                continue
            rows = run_case(module, case, args)
            if rows is None:
                red.append(f"{op} {case}")
            elif rows and (args.store or not args.quick):
                common.append_rows(path, rows)
    if red:
        why = "without a time" if args.memory_only else "refused, because the gate is red"
        say(f"{why}: {', '.join(red)}")
    return 1 if red else 0


def headline(module, device):
    """The cases of this device alone, else the first."""
    cases = [c for c in module.CASES if device in c.on]
    return [c for c in cases if c.on == (device,)] or cases[:1]


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
    memory = p.add_mutually_exclusive_group()
    memory.add_argument(
        "--no-memory", action="store_true", help="no peak memory (it runs each provider in fresh processes)"
    )
    memory.add_argument(
        "--memory-only",
        action="store_true",
        help="peak memory alone, into the rows of this commit that have none",
    )
    p.add_argument(
        "--quick", action="store_true", help="48^3, three rounds, no compilation; stored only with --store"
    )
    p.add_argument("--headline", action="store_true", help="only the headline cases of the device")
    p.add_argument("--store", action="store_true", help="store rows of --quick too")
    p.add_argument("--check", action="store_true", help="only the correctness gate")
    p.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the stored rows")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if unknown := set(args.op) - set(common.ops()):
        p.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(common.ops())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("no CUDA device")
    return run_ops(args)


if __name__ == "__main__":
    sys.exit(main())
