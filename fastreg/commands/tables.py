"""The csv files of a run: a row a step, complete or absent, also where a run was killed."""

import contextlib
import csv
import json

from fastreg import io
from fastreg.io import InputError


def _rows(path):
    """Of a table, but those that a killed run left half-written."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of fastreg train") from error
    return [r for r in rows if (r.get("step") or "").isdigit() and None not in (*r, *r.values())]


def steps(path):
    """Those the table has a row of."""
    return [int(row["step"]) for row in _rows(path)] if path.exists() else []


def append(path, row):
    """A row more, whose columns the table may not have yet."""
    rows = _rows(path) if path.exists() else []
    _write(path, [*(r for r in rows if int(r["step"]) < int(row["step"])), row])


def _write(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with io.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


class Log:
    """log.csv, a row a step; steps after `step`, which a run that was killed had not saved, are taken out."""

    def __init__(self, path, step):
        self.path, self.stream, self.writer = path, None, None
        if path.exists() and (rows := [r for r in _rows(path) if int(r["step"]) <= step]):
            _write(path, rows)
            self._open(list(rows[0]), "a")

    def _open(self, names, mode):
        self.stream = open(self.path, mode, newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.stream, names, restval="")
        if mode == "w":
            self.writer.writeheader()

    def write(self, row):
        row = {**row, "names": json.dumps(row["names"], ensure_ascii=False)}
        if self.writer is None:
            self._open(list(row), "w")
        self.writer.writerow({k: row.get(k, "") for k in self.writer.fieldnames})
        try:
            self.stream.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self):
        if self.stream is not None:
            with contextlib.suppress(OSError):  # what could not be flushed is known
                self.stream.close()
