"""A run directory: its records, one JSON object a line."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any


class RecordError(ValueError):
    """A file or folder that cannot be used: says which, why, and what to do."""


def read_jsonl(
    path: Path, needs: str = "", keep: Callable[[dict], bool] = lambda record: True
) -> tuple[list[dict], bool]:
    """(records that `keep` wants, whether a half-written last line was left out).

    needs: fields that each record must have, with spaces between. A killed run leaves its last
    line half-written; RecordError for any other broken one.
    """
    records: list[dict] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:  # no JSON or no UTF-8
                if not line.endswith(b"\n"):
                    return records, True
                raise RecordError(
                    f"{path}:{number}: not a line of JSON ({error}); repair or remove it"
                ) from None
            if missing := set(needs.split()) - set(record):
                listed = ", ".join(sorted(missing))
                raise RecordError(f"{path}:{number}: no {listed} in it; is this the right file?")
            if keep(record):
                records.append(record)
    return records, False


def write(path: Path, content: str) -> None:
    """All of it or nothing: nobody ever reads half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: Path, records: list[dict]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, line: dict) -> None:
    """One JSON line. ASCII escapes keep Unicode line separators in a story from splitting it."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def rewind(path: Path, step: int) -> None:
    """Drop what a killed run wrote after `step`, a half-written last line included."""
    if path.exists():
        lines, _ = read_jsonl(path)
        write_jsonl(path, [line for line in lines if line["step"] <= step])


def last_line(path: Path) -> dict | None:
    """The newest whole record of a file; None where there is none."""
    records = read_jsonl(path)[0] if path.exists() else []
    return records[-1] if records else None


def mean(values: Iterable[Any]) -> float | None:
    """Mean of the finite numbers among `values`; None if there is none."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(known) if known else None
