"""Writes the table of docs/report.md from fastreg/report.schema.json: python docs/report_keys.py"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "fastreg" / "report.schema.json").read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "report.md"
START, END = "<!-- keys:start -->\n", "<!-- keys:end -->\n"


def resolved(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with what it refers to; its own description stands."""
    if "$ref" not in node:
        return dict(node)
    return {**SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]], **node}


def kind(node: Mapping[str, Any]) -> str:
    """Its type, in words."""
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return " or ".join(f"`{v}`" for v in node["enum"])
    if "anyOf" in node:
        return " or ".join(map(kind, node["anyOf"]))
    names = node["type"] if isinstance(node["type"], list) else [node["type"]]
    if names == ["array"] and "items" in node:
        return f"list of {kind(node['items'])}"
    return " or ".join(names)


def keys(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, node) of all keys below a node; `[]` stands for the entries of a list, `*` for names that are data."""
    node = resolved(node)
    if node.get("type") == "array":
        yield from keys(node["items"], path + "[]")
    names = [
        *node.get("properties", {}).items(),
        *(("*", v) for v in node.get("patternProperties", {}).values()),
    ]
    for name, child in names:
        here = f"{path}.{name}" if path else name
        yield here, resolved(child)
        yield from keys(child, here)


def table() -> str:
    """Of all keys, as Markdown."""
    rows = ["| key | type | unit | meaning |", "|---|---|---|---|"]
    for path, node in keys(SCHEMA):
        rows.append(f"| `{path}` | {kind(node)} | {node.get('unit', '')} | {node['description']} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
