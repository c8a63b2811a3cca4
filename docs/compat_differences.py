"""Writes the tables of docs/compat.md from the DIFFERENCES of fastreg.compat's modules: python docs/compat_differences.py"""

import importlib
import pkgutil
from pathlib import Path

from fastreg import compat

PAGE = Path(__file__).resolve().parent / "compat.md"
START, END = "<!-- differences:start -->\n", "<!-- differences:end -->\n"


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(compat.__path__) if not m.name.startswith("_"))


def table(name: str) -> str:
    """Of one module, as Markdown."""
    module = importlib.import_module(f"fastreg.compat.{name}")
    title = module.__doc__.split(":")[0]
    rows = [f"### {title}\n", "| what | theirs | fastreg | why |", "|---|---|---|---|"]
    for d in module.DIFFERENCES:
        names = ", ".join(f"`{n}`" for n in d.name.split(", "))
        rows.append(f"| {names} | {d.theirs} | {d.ours} | {d.why} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the tables in their place."""
    before, rest = text.split(START)
    return before + START + "\n".join(map(table, modules())) + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
