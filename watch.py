"""The processes of a run: they end with their launcher, stop when asked, and notice a silent one.

launcher      torchrun killed by -9 can tell its ranks nothing: each looks whether it is gone
signals       the first one stops the run where all ranks agree on it, saved; a second one at once
heartbeats    each rank writes its phase to RUN/ranks/; its neighbour reads it, and stops the run
              with the name of the rank and its phase when nothing moves for too long
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from rundir import write


class Interrupted(RuntimeError):
    """The run was asked to stop."""


class TrainingStop(RuntimeError):
    """The run stopped itself; the message says why and what to do."""


def follow_launcher() -> None:
    """End this process within a second of its launcher, where torchrun is one."""
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    command = Path(f"/proc/{launcher}/cmdline")
    if command.exists() and b"python" not in command.read_bytes().split(b"\0")[0]:
        sys.exit("polaris: the launcher is gone")  # while we were still loading

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


class _Signals:
    """Process-wide, as signal handlers are."""

    reason = ""
    allowed = False
    first = 0.0


def catch_signals() -> None:
    """SIGINT, SIGTERM, SIGHUP raise Interrupted, but only inside `may_interrupt`."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not _Signals.reason:
            _Signals.reason = f"{signal.Signals(number).name} received"
            _Signals.first = time.monotonic()
            if _Signals.allowed:
                raise Interrupted(_Signals.reason)
        elif time.monotonic() - _Signals.first > 2:  # torchrun repeats what the terminal sends
            os._exit(4)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)


@contextmanager
def may_interrupt() -> Iterator[None]:
    """Around work that may be left anywhere, since the step it belongs to is dropped."""
    _Signals.allowed = True
    try:
        if _Signals.reason:
            raise Interrupted(_Signals.reason)
        yield
    finally:
        _Signals.allowed = False


# --------------------------------------------------------------------------------------------------
# Status and heartbeats
# --------------------------------------------------------------------------------------------------

PHASE: dict[str, Any] = {"phase": "starting", "step": 0, "since": time.time()}
STATUS: dict[str, Any] = {"state": "starting"}  # of the run; rank 0's counts
_heartbeats: list["Heartbeat"] = []  # this process's, once it has one


def set_phase(name: str, step: int | None = None, **status: Any) -> None:
    """What this process is doing; `step` stays where it is None. status: of the run."""
    step = PHASE["step"] if step is None else step
    PHASE.update(phase=name, step=step, since=time.time())
    STATUS.update(status)
    for heartbeat in _heartbeats:
        heartbeat.beat()


class Heartbeat:
    """This rank's phase on disk, at each change and every few seconds; a look at the next rank's.

    patience: seconds for which another rank may stay in one phase; waiting for the judge has a
    patience of its own, the judge client's. spent: what this process has paid for so far, kept so
    that a killed run's bill is known. Use it in a `with`.
    """

    EVERY = 5.0
    SILENCE = 60.0  # a process that writes nothing for so long is frozen, or its machine is lost
    PATIENT = ("judge_wait", "waiting for the other ranks", "done")

    def __init__(
        self,
        out: Path,
        rank: int,
        n_ranks: int,
        patience: float,
        spent: Callable[[], dict[str, float]] = dict,
    ):
        self.out = out
        self.rank = rank
        self.n_ranks = n_ranks
        self.patience = patience
        self.spent = spent
        self.started = time.time()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        (out / "ranks").mkdir(exist_ok=True)

    def __enter__(self) -> "Heartbeat":
        _heartbeats.append(self)
        self.beat()
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        set_phase("done")
        _heartbeats.remove(self)

    def file(self, rank: int) -> Path:
        return self.out / "ranks" / f"{rank}.json"

    def beat(self) -> None:
        now = time.time()
        me = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "beat": now}
        me["spent"] = self.spent()
        with self.lock:
            write(self.file(self.rank), json.dumps(me | PHASE) + "\n", flush=False)
            if self.rank == 0:
                status = STATUS | {"phase": PHASE["phase"], "step": PHASE["step"]}
                status |= {"heartbeat": now, "host": me["host"], "pid": me["pid"]}
                write(self.out / "status.json", json.dumps(status, indent=1) + "\n", flush=False)

    def run(self) -> None:
        while not self.ended.wait(self.EVERY):
            self.beat()
            other = read_json(self.file((self.rank + 1) % self.n_ranks))
            known = self.n_ranks > 1 and other.get("beat", 0) > self.started
            if known and (fault := self.fault(other)):
                print(f"\npolaris: {fault}\n{self.table()}", file=sys.stderr, flush=True)
                if self.rank == 0:
                    set_phase(PHASE["phase"], state="stopped", reason=fault, exit=5)
                os._exit(5)

    def fault(self, other: dict[str, Any]) -> str:
        """What is wrong with another rank, "" if nothing."""
        where = f"rank {other['rank']} ({other['host']}, process {other['pid']})"
        doing = f"in phase {other['phase']!r} of step {other['step']}"
        silent = time.time() - other["beat"]
        if silent > self.SILENCE and other["phase"] != "done":
            return f"{where} fell silent {silent:.0f} s ago {doing}; go on with --resume"
        stuck = time.time() - other["since"]
        if stuck > self.patience and other["phase"] not in self.PATIENT:
            return (
                f"{where} has been {doing} for {stuck:.0f} s; go on with --resume, and with a "
                "larger --rank-patience if it was only slow"
            )
        return ""

    def table(self) -> str:
        """All ranks, a line each."""
        lines = []
        for rank in range(self.n_ranks):
            r = read_json(self.file(rank))
            if r:
                seconds = time.time() - r["since"]
                lines.append(f"  rank {rank}: {r['phase']}, step {r['step']}, for {seconds:.0f} s")
        return "\n".join(lines)


def settle_bill(out: Path) -> dict[str, float]:
    """What all earlier processes of a run have spent on its judge, killed ones too."""
    bill = read_json(out / "bill.json")
    for path in sorted((out / "ranks").glob("*.json")):
        for name, amount in read_json(path).get("spent", {}).items():
            bill[name] = bill.get(name, 0) + amount
    write(out / "bill.json", json.dumps(bill) + "\n")
    for path in (out / "ranks").glob("*.json"):
        path.unlink()
    return bill


def read_json(path: Path) -> dict[str, Any]:
    """What is in a file of one JSON object; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


STATES = {0: "done", 1: "failed", 2: "refused", 3: "stopped", 4: "interrupted", 5: "stopped"}
WHEN = {3: " once the judge is back", 4: "", 5: " once that is mended"}


def leave(status: int, out: str = "", reason: str = "") -> int:
    """Say, on rank 0, why a run ends; keep it in its status.json, and for train.sh. -> status"""
    if dist.get_rank() > 0:
        return status
    if file := os.environ.get("POLARIS_EXIT_STATUS"):  # torchrun returns 1, whatever we return
        Path(file).write_text(str(status))
    if reason and status != 1:  # 1 comes with a traceback
        print(f"\npolaris: {reason}", file=sys.stderr)
    if out and (Path(out) / "status.json").exists():
        again = f"--out {out} --resume"
        if status in WHEN:
            print(f"Nothing is lost: go on with {again}{WHEN[status]}.", file=sys.stderr)
        facts = STATUS | {"state": STATES[status], "exit": status, "reason": reason}
        facts |= {"phase": PHASE["phase"], "step": PHASE["step"], "heartbeat": time.time()}
        facts |= {"resume": again} if status else {}
        write(Path(out) / "status.json", json.dumps(facts, indent=1) + "\n")
    return status


def show_status(out: Path) -> int:
    """Print the status of a run, alive or not."""
    path = out / "status.json"
    if not path.exists():
        print(f"polaris: {path} does not exist; give the directory of a run", file=sys.stderr)
        return 2
    status = read_json(path)
    age = time.time() - status["heartbeat"]
    if "exit" not in status and age > Heartbeat.SILENCE:
        status["state"] = "lost: killed without a word; go on with --resume"
    for name, value in (status | {"heartbeat": f"{age:.0f} s ago"}).items():
        print(f"{name:12} {value}")
    return 0
