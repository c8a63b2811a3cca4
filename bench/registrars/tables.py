"""The rows of bench/real.py as tables, and as a picture of accuracy against CPU seconds.

python -m bench.registrars.tables       writes docs/images/accuracy.svg
"""

import statistics
import sys
from pathlib import Path

from bench import common, real
from bench.markdown import number, table
from bench.registrars import REGISTRARS

PICTURE = common.ROOT.parent / "docs" / "images" / "accuracy.svg"
TOOLS = ("fastreg", *REGISTRARS)
NAMES = {
    "tre": "mean TRE, mm",
    "tre refined": "mean TRE, refined points, mm",
    "tre dense": "mean TRE, automatic points, mm",
    "dice": "mean Dice",
    "dice of all": "Dice of all labels",
}
KEY = ("device_name", "threads", "pair", "tool", "score", "arguments")


def means(results):
    """(set, score) -> tool -> mean of each column over the pairs of the set, of which all must be stored; and the rows."""
    rows = [r for r in common.read_rows(results / "real.csv") if r.get("cpu_seconds") and not r["arguments"]]
    rows = common.newest(rows, KEY)
    if not rows:
        return {}, []
    machine = rows[-1]["device_name"], rows[-1]["threads"]
    rows = [r for r in rows if (r["device_name"], r["threads"]) == machine]
    out = {}
    for name, group in real.SETS.items():
        for score in group.goals:
            tools = {}
            for tool in TOOLS:
                these = [r for r in rows if (r["set"], r["tool"], r["score"]) == (name, tool, score)]
                if len(these) < len(group.pairs):
                    continue
                mean = {
                    k: statistics.fmean(float(r[k]) for r in these)
                    for k in ("before", "after", "cpu_seconds", "seconds")
                }
                worst = {k: max(float(r[k]) for r in these) for k in ("folding", "peak_mb")}
                tools[tool] = {**mean, **worst}
            if tools:
                out[name, score] = tools
    return out, rows


def _cell(figures, best):
    if figures is None:
        return ""
    value = f"{figures['after']:.3f}"
    folds = f" ({100 * figures['folding']:.2g} % folds)" if figures["folding"] >= real.FOLDING else ""
    return (f"**{value}**" if figures["after"] == best else value) + folds


def sections(results):
    """Heading -> text."""
    found, rows = means(results)
    if not found:
        return {}
    tools = [tool for tool in TOOLS if any(tool in of for of in found.values())]
    lines = []
    for (name, score), of in found.items():
        values = [f["after"] for f in of.values()]
        best = min(values) if score.startswith("tre") else max(values)
        before = next(iter(of.values()))["before"]
        goal = real.SETS[name].goals[score]
        lines.append(
            [
                name,
                str(len(real.SETS[name].pairs)),
                NAMES[score],
                f"{before:.3f}",
                f"{goal:.3f}",
                *(_cell(of.get(tool), best) for tool in tools),
            ]
        )
    accuracy = table(["set", "pairs", "score", "before", "goal", *tools], lines)
    cost = {}
    for name in real.SETS:
        of = next((of for (group, _), of in found.items() if group == name), None)
        if of:
            cost[name] = [
                f"{number(of[t]['cpu_seconds'])} / {number(of[t]['peak_mb'])}" if t in of else ""
                for t in tools
            ]
    spent = table(["set, CPU s / MB", *tools], [[name, *cells] for name, cells in cost.items()])
    newest = {r["tool"]: r for r in rows}
    versions = "; ".join(
        f"{t} {newest[t]['version']}" + (f" ({newest[t]['how']})" if newest[t]["how"] else "") for t in tools
    )
    dates = sorted({r["date"][:10] for r in rows})
    loads = [float(r["load"]) for r in rows]
    last = newest["fastreg"]
    where = (
        f"{last['device_name']}, {last['threads']} threads, fastreg at {last['commit']}, {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; load "
        f"of the machine {min(loads):.1f} to {max(loads):.1f}. {versions}. One setting a tool for all sets, none tuned to these pairs; fastreg's defaults "
        "were chosen with these sets in view, but for hippocampi 8 to 14."
    )
    return {
        "Accuracy": f"{accuracy}\n\nMeans over the pairs of a set; folds are named where a pair has 0.1 % or more.",
        "Cost": f"{spent}\n\nOf a process, mean CPU seconds a pair and the largest peak: starting, reading and writing included.\n\n{where}",
    }


def _label(axes, tools):
    """Names beside the points, on the first of four sides where none lies already. tools: name -> figures."""
    points = {
        name: axes.transData.transform((of["cpu_seconds"], of["after"])) * 72 / axes.figure.dpi
        for name, of in tools.items()
    }
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in points.values()]
    for name, (x, y) in points.items():
        width = 4.0 * len(name)
        for dx, dy in ((5, 2), (5, -9), (-width - 5, 2), (-width - 5, -9)):
            box = (x + dx, y + dy, x + dx + width, y + dy + 7)
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        at = tools[name]["cpu_seconds"], tools[name]["after"]
        axes.annotate(name, at, xytext=(box[0] - x, box[1] - y), textcoords="offset points", size=7)


def draw(results):
    """The figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    found, _ = means(results)
    shown = [(name, next(iter(real.SETS[name].goals))) for name in real.SETS]
    shown = [key for key in shown if key in found]
    figure = Figure((3.1 * len(shown), 3.0), dpi=150, layout="constrained")
    panels = list(zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True))
    for axes, (name, score) in panels:
        for tool, of in found[name, score].items():
            own = tool == "fastreg"
            axes.plot(
                of["cpu_seconds"], of["after"], "o", ms=7 if own else 5, color="#c8401c" if own else "#1b6fd0"
            )
        axes.set(xscale="log", title=name, xlabel="CPU seconds", ylabel=NAMES[score])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(0.25)
        if score.startswith("tre"):
            axes.invert_yaxis()
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # which settles where the points are
    for axes, key in panels:
        _label(axes, found[key])
    return figure


def main():
    import matplotlib

    matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "fastreg", "svg.fonttype": "none"})
    draw(common.RESULTS).savefig(Path(PICTURE), format="svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
