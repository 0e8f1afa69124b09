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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

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

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


class Signals:
    """SIGINT, SIGTERM, SIGHUP raise Interrupted, but only where that leaves nothing half-done."""

    def __init__(self) -> None:
        self.reason = ""
        self.allowed = False
        self.first = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.reason:
            self.reason = f"{signal.Signals(number).name} received"
            self.first = time.monotonic()
            if self.allowed:
                raise Interrupted(self.reason)
        elif time.monotonic() - self.first > 2:  # torchrun passes on what the terminal sent us too
            os._exit(4)

    @contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Code that may be left anywhere: the step it belongs to is dropped."""
        self.allowed = True
        try:
            if self.reason:
                raise Interrupted(self.reason)
            yield
        finally:
            self.allowed = False


class Heartbeat:
    """This rank's phase on disk, every few seconds; and a look at the next rank's.

    patience: seconds for which a rank may stay silent, or in one phase. Waiting for the judge has
    a patience of its own, the judge client's.
    """

    EVERY = 5.0
    SILENCE = 60.0  # a process that does not write for so long is stopped, or its machine is lost

    def __init__(self, out: Path, rank: int, n_ranks: int, patience: float):
        self.folder = out / "ranks"
        self.folder.mkdir(exist_ok=True)
        self.rank = rank
        self.n_ranks = n_ranks
        self.patience = patience
        self.ended = threading.Event()
        self.phase("starting")
        threading.Thread(target=self.run, daemon=True).start()

    def phase(self, name: str, step: int = 0) -> None:
        self.now = {"rank": self.rank, "phase": name, "step": step, "since": time.time()}

    def beat(self) -> None:
        host = {"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}
        write(self.folder / f"{self.rank}.json", json.dumps(self.now | host) + "\n", flush=False)

    def run(self) -> None:
        started = time.time()
        while not self.ended.wait(self.EVERY):
            self.beat()
            other = read(self.folder / f"{(self.rank + 1) % self.n_ranks}.json")
            if self.n_ranks > 1 and other.get("beat", 0) > started and (fault := self.fault(other)):
                print(f"\npolaris: {fault}\n{self.table()}", file=sys.stderr, flush=True)
                os._exit(5)

    def fault(self, other: dict[str, Any]) -> str:
        """What is wrong with another rank, "" if nothing."""
        where = "rank {rank} ({host}, process {pid}) in phase '{phase}' of step {step}".format(
            **other
        )
        silent = time.time() - other["beat"]
        if silent > self.SILENCE:
            return f"{where} has been silent for {silent:.0f} s: the run stops; go on with --resume"
        waits = other["phase"] in ("judge_wait", "waiting", "done")
        if not waits and time.time() - other["since"] > self.patience:
            return (
                f"{where} has not moved for {self.patience:.0f} s: the run stops; go on with "
                "--resume, and with a larger --rank-patience if it was only slow"
            )
        return ""

    def table(self) -> str:
        ranks = [read(path) for path in sorted(self.folder.glob("*.json"))]
        lines = []
        for r in ranks:
            seconds = time.time() - r["since"]
            lines.append(f"  rank {r['rank']}: {r['phase']}, step {r['step']}, for {seconds:.0f} s")
        return "\n".join(lines)

    def close(self) -> None:
        self.ended.set()
        self.phase("done")
        self.beat()


def read(path: Path) -> dict[str, Any]:
    """A heartbeat; empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}
