#!/usr/bin/env python3
"""Writes the stored rows as pages of docs/results/ and as the README's ten rows; measures nothing.

python bench/tables.py              write them
python bench/tables.py --check      exit status 1 where one is not what the stored rows say
python bench/tables.py --show speed print this page
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, fuzz, models, presets, robustness, settings
from bench.common import say
from bench.experiments import tables as experiments
from bench.markdown import grouped, measured, number, page, replaced, table
from bench.registrars import tables as registrars

DOCS = common.ROOT.parent / "docs" / "results"
README = common.ROOT.parent / "README.md"
EMPTY = "No rows stored yet."

# op, case: the README's rows.
HEADLINES = (
    ("warp", "both"),
    ("lcc_loss", "w9"),
    ("mind_loss", "ssc r2 d2"),
    ("local_correlation", "c16-96"),
    ("register", "iteration"),
)


def stored(results):
    return [r for device in ("cpu", "cuda") for r in common.read_rows(results / f"{device}.csv")]


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


def speed(results):
    """op -> a table per device, then nanoseconds per voxel over sizes."""
    rows = common.newest(stored(results))
    sections, scaling = {}, []
    # isa: CUDA C++ and Triton are runs of their own, and CPUs of one name are not one CPU.
    for mine in grouped(rows, "device", "device_name", "threads", "isa").values():
        alone = [r for r in mine if is_scaling(r, mine)]
        for (op,), group in grouped([r for r in mine if r not in alone], "op").items():
            copy = statistics.median(float(r["copy_gbs"]) for r in group)
            parts = [measured(group, f"copy bandwidth {copy:.3g} GB/s"), op_table(group)]
            if marked := [r for r in group if r["gate"].startswith("deviates")]:
                notes = dict.fromkeys(f"{r['case']} {label(r)} ({r['gate']})" for r in marked)
                parts.append("¹ Not the numbers of the formula it states: " + "; ".join(notes) + ".")
            sections.setdefault(op, []).extend(parts)
        if text := scaling_table(alone):
            scaling += [measured(alone), text]
    sections = {op: sections[op] for op in sorted(sections)}
    if scaling:
        text = "Nanoseconds per voxel of fastreg, forward and backward; r: radius, c: channels (16), d: dilation."
        sections["by size"] = [text, *scaling]
    return {name: "\n\n".join(parts) for name, parts in sections.items()}


def op_table(rows):
    header = ["case", "shape", "", "fwd ms", "fwd+bwd ms", "p20 to p80", "x fastreg", "copy floor"]
    header += ["peak, volumes", "saved, volumes"]
    lines = []
    for (case, shape, dtype), group in grouped(rows, "case", "shape", "dtype").items():
        for (provider,), both in grouped(group, "provider").items():
            by_mode = {r["mode"]: r for r in both}
            full = by_mode.get("fwd+bwd") or by_mode.get(common.ITERATION)
            forward = by_mode.get("fwd")
            shown = full or forward
            cells = [case, shape if dtype == "float32" else f"{shape} {dtype}", label(shown)]
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


def headlines(results):
    """ "speed", "memory" -> the README's rows: of each case the newest run, against its faster stock form and the fastest peer."""
    rows = stored(results)
    lines = {"speed": [], "memory": []}
    for op, case in HEADLINES:
        mine = [r for r in rows if (r["op"], r["case"]) == (op, case) and r["mode"] != "fwd"]
        if not mine:
            continue
        last = max(mine, key=lambda r: r["date"])
        machine = ("device_name", "threads", "isa")
        same = [r for r in common.newest(mine) if all(r[k] == last[k] for k in machine)]
        by = {r["provider"]: r for r in same if not r["gate"].startswith("deviates")}
        ours = by["fastreg"]
        stock = min((by[n] for n in ("torch", "compile") if n in by), key=lambda r: float(r["p50_ms"]))
        peers = [r for r in by.values() if r["version"].partition(" ")[0] not in ("fastreg", "torch")]
        peer = min(peers, key=lambda r: float(r["p50_ms"]), default=None)
        size = ours["shape"].partition("x")[2]
        where = f"{ours['device_name'].removesuffix(' Processor')}, {ours['threads']} threads, {ours['isa']}"
        for name, key, unit in (("speed", "p50_ms", " ms"), ("memory", "peak_volumes", "")):
            other = f"{number(peer[key])}{unit} ({label(peer)})" if peer else "not measured"
            compiled = " (compiled)" if stock["provider"] == "compile" else ""
            lines[name].append(
                [
                    f"`{op}` {case}, {size}",
                    f"{number(ours[key])}{unit}",
                    f"{number(stock[key])}{unit}{compiled}",
                    other,
                    where,
                ]
            )
    header = ["", "fastreg", "PyTorch, best stock form", "fastest peer", "measured on"]
    heads = {"speed": "forward and backward", "memory": "peak beyond inputs and results, in images"}
    return {
        name: table([heads[name], *header[1:]], cells) if cells else EMPTY for name, cells in lines.items()
    }


def kernels():
    """Implementation -> the ops that have a kernel: bound in csrc/cpu/ and csrc/cuda/, launched from kernels/."""
    import fastreg.kernels

    def bound(folder):
        texts = [p.read_text(encoding="utf-8") for p in (common.ROOT.parent / "csrc" / folder).glob("*.c*")]
        return {op for text in texts for op in re.findall(r'm\.impl\("(\w+)"', text)}

    return {"cpu": bound("cpu"), "CUDA C++": bound("cuda"), "Triton": set(fastreg.kernels.LAUNCHERS)}


# What tests do with kernels where no GPU is.
PROOF = {"CUDA C++": "emulated, compiled", "Triton": "interpreted, compiled"}


def where(results):
    """Op x implementation: where it has really run (a row that passed the gate), or how else it was checked."""
    import fastreg.ops

    executed = {}
    for r in stored(results):
        if r["provider"] == "fastreg":
            kind = "cpu" if r["device"] == "cpu" else r["isa"]
            isa = f" ({r['isa']})" if r["device"] == "cpu" and r["isa"] else ""
            executed[r["op"], kind] = f"executed on {r['device_name']}{isa}, {r['date'][:10]}"
    there = kernels()

    def cpu(op):
        return f"{'C++' if op in there['cpu'] else 'reference'}; {executed.get((op, 'cpu'), 'tests alone')}"

    def gpu(op, kind):
        if op not in there[kind]:
            return "reference"
        return executed.get((op, kind), f"{PROOF[kind]}; never run on a GPU")

    lines = [[f"`{op}`", cpu(op), *(gpu(op, kind) for kind in PROOF)] for op in sorted(fastreg.ops.__all__)]
    return {"": table(["op", "cpu", *PROOF], lines)}


def tools(results):
    """Other tools' transforms beside ours: .ci/tools."""
    header = ["tool", "version", "", "transform", "median", "99th percentile", "largest", "", "measured on"]
    lines = []
    for r in common.read_rows(results / "tools.csv"):
        figures = [number(r[k], 2) for k in ("median", "p99", "largest")]
        about = [r["tool"], r["version"], r["direction"], r["transform"]]
        lines.append([*about, *figures, r["status"], f"{r['commit']}, {r['date']}"])
    text = (
        "Each tool made its transform and moved an image by it, and `fastreg apply --field` moved the same image by the same file; and "
        "the tool moved the image by what `fastreg convert` wrote for it. Two oblique scans on unlike grids; differences of the moved "
        "images in shares of the image's range, over the voxels that both see."
    )
    return {"": f"{text}\n\n{table(header, lines)}"} if lines else {}


def applied(results):
    """`fastreg apply --field` beside SimpleITK: bench/apply.py."""
    header = ["", "volume", "", "seconds", "p20 to p80", "x fastreg", "peak MB", "measured on"]
    names = {"step": "in memory", "process": "a process, reading and writing {files}"}
    key = ["what", "files", "shape", "provider", "device_name", "threads", "isa"]
    lines = []
    for r in common.newest(common.read_rows(results / "apply.csv"), key):
        between = f"{number(r['p20_s'])} to {number(r['p80_s'])}"
        about = [names[r["what"]].format(**r), r["shape"], r["provider"], number(r["p50_s"]), between]
        on = f"{r['device_name']}, {r['threads']} threads, {r['isa']}, {r['commit']}, {r['date'][:10]}"
        lines.append([*about, number(r["ratio"]), r["peak_mb"], on])
    text = (
        "An int16 volume moved by a displacement field, by `fastreg apply` and by SimpleITK's Resample with a "
        "DisplacementFieldTransform, in rounds that alternate; the results differ by the rounding of whole numbers alone."
    )
    return {"": f"{text}\n\n{table(header, lines)}"} if lines else {}


def faults(results):
    """What happened to planted faults, the newest run of each case."""
    rows = common.newest(common.read_rows(results / "faults.csv"), ("class", "case"))
    lines = []
    for (kind,), group in grouped(rows, "class").items():
        counts = [str(sum(int(r[k]) for r in group)) for k in ("cases", "silent", "refused", "harmless")]
        lines.append([kind, ", ".join(r["case"] for r in group), *counts])
    if not rows:
        return {}
    last = rows[-1]
    where = f"{last['device_name']}, {last['commit']}, {last['date'][:10]}; SimpleITK {last['simpleitk']}, torch {last['torch']}, Python {last['python']}."
    header = [
        "fault",
        "where",
        "cases",
        "wrong or lost without a word",
        "refused, all as before",
        "no harm done",
    ]
    return {"": f"{table(header, lines)}\n\n{where}"}


# Page of docs/results -> its title, what its sections are made of, and the command that adds rows.
PAGES = {
    "speed": ("Speed and memory of the ops", speed, "python bench/run.py"),
    "models": ("Speed and memory of the methods", models.tables, "python bench/models.py"),
    "experiments": (
        "What the papers claim, tried",
        experiments.sections,
        "python -m bench.experiments.<name>",
    ),
    "real": ("Real scans, registered", registrars.sections, "python -m bench.real"),
    "robustness": ("Random pairs, registered", robustness.sections, "python -m bench.robustness"),
    "settings": ("What the settings of register change", settings.sections, "python -m bench.settings"),
    "presets": ("What the presets of register take and give", presets.sections, "python -m bench.presets"),
    "apply": ("Moving a volume by a field", applied, "python bench/apply.py"),
    "tools": ("Other tools' transforms, both ways", tools, ".ci/tools"),
    "fuzz": ("Ops on random inputs", fuzz.sections, ".ci/fuzz --store"),
    "faults": ("Planted faults of disks, files and processes", faults, ".ci/faults --store"),
    "where": ("Which implementation ran where", where, "python bench/run.py"),
}


def written(results):
    """Name of a page -> its text."""
    return {
        name: page(title, sections(results) or {"": EMPTY}, command)
        for name, (title, sections, command) in PAGES.items()
    }


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 where one is stale")
    p.add_argument("--show", choices=list(PAGES), help="print this page")
    p.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the stored rows")
    p.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    p.add_argument("--readme", type=Path, default=README)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.show:
        title, sections, command = PAGES[args.show]
        say(page(title, sections(args.results) or {"": EMPTY}, command))
        return 0
    files = {args.docs / f"{name}.md": text for name, text in written(args.results).items()}
    try:
        files[args.readme] = replaced(args.readme, headlines(args.results))
    except ValueError as error:
        say(error)
        return 1
    stale = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if args.check:
        for path in stale:
            say(f"{path.name} is not what the stored rows say: python bench/tables.py writes it")
        return 1 if stale else 0
    args.docs.mkdir(parents=True, exist_ok=True)
    for path in stale:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(files[path], encoding="utf-8")
        temporary.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
