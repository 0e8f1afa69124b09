"""A run directory: its records, one JSON object a line."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean


class RecordError(ValueError):
    """A file or folder that cannot be used: says which, why, and what to do."""


def read_jsonl(path: Path, needs: str = "", keep: Callable[[dict], bool] = lambda record: True):
    """(records that `keep` wants, whether the last line was half-written and left out, as a killed run leaves it).

    needs: the fields that each record must have, with spaces between. Raises RecordError for any other broken line.
    """
    records = []
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
                raise RecordError(
                    f"{path}:{number}: no {', '.join(sorted(missing))} in it; is this the right file?"
                )
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
    """One JSON line, in ASCII: whatever a policy or a judge wrote, only a line's end is a line break."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def rewind(path: Path, step: int) -> None:
    """Drop what a killed run wrote after `step`, a half-written last line included."""
    if path.exists():
        lines, _ = read_jsonl(path)
        write_jsonl(path, [line for line in lines if line["step"] <= step])


def mean(values) -> float | None:
    """Mean of the finite numbers among `values`; None if there is none."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(known) if known else None
