"""The csv files of a run: a row a step, complete or absent, also where a run was killed."""

import contextlib
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fastreg._files import InputError, replacing


def _rows(path: Path) -> list[dict[str, str]]:
    """Of a table, but those that a killed run left half-written."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of fastreg train") from error
    return [r for r in rows if (r.get("step") or "").isdigit() and None not in (*r, *r.values())]


def steps(path: Path) -> list[int]:
    """Those the table has a row of."""
    return [int(row["step"]) for row in _rows(path)] if path.exists() else []


def append(path: Path, row: Mapping[str, Any]) -> None:
    """A row more, whose columns the table may not have yet."""
    rows = _rows(path) if path.exists() else []
    _write(path, [*(r for r in rows if int(r["step"]) < int(row["step"])), row])


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


class Log:
    """log.csv, a row a step; steps after `step`, which a run that was killed had not saved, are taken out."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.stream: IO[str] | None = None
        self.writer: csv.DictWriter[str] | None = None
        if path.exists() and (rows := [r for r in _rows(path) if int(r["step"]) <= step]):
            _write(path, rows)
            self._open(list(rows[0]), "a")

    def _open(self, names: Sequence[str], mode: str) -> tuple[IO[str], "csv.DictWriter[str]"]:
        stream = open(self.path, mode, newline="", encoding="utf-8")
        writer = csv.DictWriter(stream, names, restval="")
        self.stream, self.writer = stream, writer
        if mode == "w":
            writer.writeheader()
        return stream, writer

    def write(self, row: Mapping[str, Any]) -> None:
        row = {**row, "names": json.dumps(row["names"], ensure_ascii=False)}
        stream, writer = self.stream, self.writer
        if stream is None or writer is None:
            stream, writer = self._open(list(row), "w")
        writer.writerow({k: row.get(k, "") for k in writer.fieldnames})
        try:
            stream.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError):  # what could not be flushed is known
                self.stream.close()
