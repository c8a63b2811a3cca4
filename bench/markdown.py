"""Stored rows as Markdown tables, sections and pages."""

import math
import re


def number(text, digits=3):
    """So many digits; what is a whole number already, or no number, as it is."""
    if text in ("", None):
        return ""
    try:
        value = float(text)
    except ValueError:
        return text
    if value == 0 or not math.isfinite(value) or str(text).lstrip("-").isdigit():
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{decimals}f}"


def table(header, rows):
    """header and rows: cells, text. Columns of numbers are aligned to the right."""
    columns = [[c for c in column if c] for column in zip(*rows, strict=True)] or [[]] * len(header)
    rule = [
        "---:" if cells and all(re.match(r"-?[\d.]+($| )", c) for c in cells) else "---" for cells in columns
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def page(title, sections, command):
    """sections: name -> text; a named one has a heading, and markers by which other pages include it."""
    lines = [
        f"<!-- Written by bench/tables.py from bench/results; `{command}` adds rows. Do not edit. -->",
        f"# {title}",
    ]
    for name, text in sections.items():
        lines += [f"## {name}", f"<!-- {name}:start -->", text, f"<!-- {name}:end -->"] if name else [text]
    return "\n\n".join(lines) + "\n"


def replaced(path, sections):
    """The text of a file with what stands between <!-- NAME:start --> and <!-- NAME:end --> replaced; both must be there."""
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(f"{path.name} must hold {start} and {end} once, in this order")
        head, rest = text.split(start)
        text = f"{head}{start}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def grouped(rows, *keys):
    """(value of each key) -> rows, in their order."""
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return groups


def measured(rows, *more):
    """Where and when: device, threads, instruction sets, torch, what else there is to say, commits, dates."""
    first = rows[0]
    where = f"**{first['device_name']}**"
    if first["device"] == "cpu":
        where += f", {first['threads']} thread{'s' * (str(first['threads']) != '1')}"
    if isas := ", ".join(_each(rows, "isa")):
        where += f", {isas}"
    dates = sorted({r["date"][:10] for r in rows})
    about = [f"torch {' / '.join(sorted(_each(rows, 'torch')))}", *more]
    about.append("fastreg at " + ", ".join(_each(rows, "commit")))
    about.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return f"{where}; {'; '.join(about)}."


def _each(rows, key):
    return [v for v in dict.fromkeys(r[key] for r in rows) if v]
