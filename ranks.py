"""The ranks of a run: how they meet, which device each has, and how they agree.

One process per GPU, or a few on a CPU, as torchrun starts them. Over several nodes the weights are
sharded inside a node and replicated across (HSDP).
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from chat import ChatStop
from config import Config, ConfigError
from data import DataError
from policy import ModelError
from rundir import RecordError, lock
from watch import PHASE, Interrupted, TrainingStop, may_interrupt, set_phase


def join() -> int:
    """Join the other ranks; outside torchrun, stand alone. Returns the rank."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Ranks wait for each other's judge calls, which may take several time-outs.
    patience = timedelta(hours=6)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)
    return dist.get_rank()


def setup(cfg: Config) -> tuple[DeviceMesh, torch.device]:
    """Mesh and this rank's device. Over several nodes: shards inside a node, replicas across."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if len(sizes := set(gather(local_world))) > 1:
        counts = " and ".join(map(str, sorted(sizes)))
        raise ConfigError(f"nodes have {counts} ranks: start as many on each (--nproc_per_node)")
    gpus = torch.cuda.device_count()
    if cfg.device == "cuda" and gpus < local_world:
        raise ConfigError(
            f"--device cuda: {local_world} ranks but {gpus} GPUs here; "
            f"start {gpus} with --nproc_per_node"
        )
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and gpus >= local_world)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        with suppress(OSError):  # glibc alone: a freed layer goes back to the system at once
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 4 << 20)
    shape: tuple[int, ...] = (local_world,)
    names: tuple[str, ...] = ("shard",)
    nodes = dist.get_world_size() // local_world
    if nodes > 1:
        shape = (nodes, local_world)
        names = ("replicate", "shard")
    return init_device_mesh(device.type, shape, mesh_dim_names=names), device


M_MMAP_THRESHOLD = -3  # of malloc.h

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Each rank's value, on all of them. A rank gets its own back with what cannot travel."""
    values: list[Any] = [None] * dist.get_world_size()
    phase = PHASE["phase"]
    set_phase("waiting for the other ranks")
    dist.all_gather_object(values, value)
    set_phase(phase)
    values[dist.get_rank()] = value
    return values


def on_all_ranks(function: Callable[[], T], interruptible: bool = True) -> list[T]:
    """What `function` returns on each rank, on all of them.

    What stops it on one rank stops it on all, at the same place: ChatStop, Interrupted (only where
    it is `interruptible`), TrainingStop, RecordError, ModelError, DataError.
    """
    mine: T | None = None
    error: Exception | None = None
    try:
        with may_interrupt() if interruptible else nullcontext():
            mine = function()
    except (ChatStop, Interrupted, TrainingStop, RecordError, ModelError, DataError) as e:
        error = e
    results = gather((mine, error))
    for _, other in results:
        if other:
            raise other
    return [result for result, _ in results]  # type: ignore[misc]


def stop_if_asked() -> None:
    """A place where all ranks may stop together: Interrupted, if a signal came to one."""
    on_all_ranks(lambda: None)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Rank 0 holds the run directory's lock; all ranks stop where it is taken."""
    with ExitStack() as stack:
        on_all_ranks(lambda: None if dist.get_rank() else stack.enter_context(lock(out)))
        yield
