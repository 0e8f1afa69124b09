"""A run directory: one writer, records of one JSON object a line, a status, verified checkpoints.

    lock              held by rank 0 as long as it lives; the kernel lets go, whatever happens
    config.json       the settings, what they were made from (fingerprint), every resume
    status.json       where the run is: written anew at each phase, read by people and supervisors
    *.jsonl           records; a resumed run moves what it takes back to *.dropped.jsonl
    checkpoints/      step-000005/ and so on; each with a manifest of sizes and hashes, written last

A checkpoint counts only if its manifest is there and every byte agrees. Whatever gets its real name
is whole: it is written under a hidden name, flushed to the disk (fsync) and renamed.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any


class RecordError(ValueError):
    """A file or folder that cannot be used: says which, why, and what to do."""


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def write(path: Path, content: str, flush: bool = True) -> None:
    """All of it or nothing: nobody ever reads half a file. flush: survive a loss of power too."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        if flush:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Have a file or folder on the disk and not in its cache only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            if not isinstance(record, dict) or not set(needs.split()) <= set(record):
                fields = needs or "a JSON object"
                raise RecordError(f"{path}:{number}: {fields} expected; is this the right file?")
            if keep(record):
                records.append(record)
    return records, False


def write_jsonl(path: Path, records: list[dict]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, *records: dict) -> None:
    """JSON lines. ASCII escapes keep Unicode line separators in a story from splitting them."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def rewind(path: Path, step: int) -> None:
    """Move the records after `step` to a file of their own; a half-written last line goes."""
    if path.exists():
        records, partial = read_jsonl(path, "step")
        later = [record for record in records if record["step"] > step]
        if later:
            append(path.with_suffix(".dropped.jsonl"), *later)
        if later or partial:
            write_jsonl(path, [record for record in records if record["step"] <= step])


def last_line(path: Path) -> dict | None:
    """The newest whole record of a file; None where there is none."""
    records = read_jsonl(path)[0] if path.exists() else []
    return records[-1] if records else None


def mean(values: Iterable[Any]) -> float | None:
    """Mean of the finite numbers among `values`; None if there is none."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(known) if known else None


# --------------------------------------------------------------------------------------------------
# One writer
# --------------------------------------------------------------------------------------------------

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems


@contextmanager
def lock(out: Path, patience: float = 5.0) -> Iterator[None]:
    """Be the only writer of a run directory. RecordError if somebody else is, and who.

    patience: seconds to wait for a holder that is just ending, such as the ranks of a killed
    launcher. The lock belongs to this process and goes with it, however it ends.
    """
    with open(out / "lock", "a+") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    print(f"{out} cannot be locked ({error.strerror}): see that nothing else runs")
                    break
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RecordError(
                    f"{out} is in use by {holder}: wait for it or stop it, or choose another --out"
                )
            time.sleep(0.2)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

CHECKPOINT = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"


def checkpoints(out: Path) -> dict[int, Path]:
    """Step → folder of what is called a checkpoint, oldest first; `verify` says what is one."""
    folders = (out / "checkpoints").glob("step-*")
    named = [(CHECKPOINT.fullmatch(folder.name), folder) for folder in folders]
    return {int(match[1]): folder for match, folder in sorted(named, key=str) if match}


def digest(path: Path) -> tuple[int, str]:
    """(size, SHA-256) of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
        return file.tell(), total.hexdigest()


def digests(folder: Path, part: int = 0, parts: int = 1) -> dict[str, tuple[int, str]]:
    """Name → (size, SHA-256) of every file of a folder, or of one part of them."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: digest(path) for path in files[part::parts]}


def seal(temporary: Path, folder: Path, contents: dict[str, tuple[int, str]]) -> None:
    """Give a folder that is whole its manifest, then, flushed to the disk, its name."""
    for name in contents:
        sync(temporary / name)
    write(temporary / MANIFEST, json.dumps(contents, indent=1))
    sync(temporary)
    os.replace(temporary, folder)
    sync(folder.parent)


def fault_of(folder: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint, "" if nothing; of its files only one part is read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: tuple(entry) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, AttributeError, TypeError):
        return f"{MANIFEST} is broken"
    for name in sorted(expected)[part::parts]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[name][0]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected[name][0]}"
        if digest(path) != expected[name]:
            return f"{name} has been changed (its SHA-256 differs)"
    return ""


def remove(folder: Path) -> None:
    """Delete a folder; its name is gone first, so that a killed removal leaves no half of it."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Delete what killed runs left half-written or half-removed."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.gone")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def fingerprint(*paths: Path) -> str:
    """SHA-256 of files and of folders' files; of large ones of size, beginning, middle and end."""
    total = hashlib.sha256()
    piece = 1 << 20
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.iterdir()))
    ]
    for path in files:
        if path.is_file():
            size = path.stat().st_size
            total.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for start in sorted({0, size // 2, max(0, size - piece)}):
                    file.seek(start)
                    total.update(file.read(piece))
    return total.hexdigest()
