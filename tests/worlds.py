"""Several ranks on one machine, for tests: real processes that meet over gloo, forked from a server
that has imported the trainer once, so that four ranks cost one import."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["polaris"])


def _rank(rank: int, world: int, nodes: int, port: int, log: str, function, args) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % (world // nodes)),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    output = open(log, "ab", buffering=0)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*args))


def leave() -> None:
    """End this rank at once, with status 0: Python's own end sometimes aborts on gloo's threads."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class World:
    """`function(*args)` on `world` ranks, as if on so many nodes; what it returns is each rank's
    exit status."""

    def __init__(self, world: int, function, *args, log: Path, nodes: int = 1):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log = Path(log)
        common = world, nodes, port, str(log), function, args
        ranks = range(world)
        self.ranks = [context.Process(target=_rank, args=(rank, *common)) for rank in ranks]
        for process in self.ranks:
            process.start()

    def kill(self) -> None:
        """kill -9, as a lost machine would."""
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit status of each rank."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        if stuck := [p for p in self.ranks if p.is_alive()]:
            for process in stuck:
                process.kill()
            raise TimeoutError(
                f"{len(stuck)} ranks did not end in {seconds} s:\n{self.text()[-3000:]}"
            )
        return [process.exitcode for process in self.ranks]

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def polaris_main(argv: list[str]) -> int:
    import polaris

    return polaris.main(argv)
