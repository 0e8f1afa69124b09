"""Checkpoints that are whole: written aside, given a manifest, verified before they are believed.

Weights and optimiser go through torch.distributed.checkpoint (policy.save, policy.load): any
number of ranks may load what any other wrote. Each rank reads a part of the files to verify them.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import rundir
from policy import Policy, load, save
from ranks import gather, on_all_ranks
from rundir import RecordError, checkpoints, last_line, rewind
from watch import Interrupted, TrainingStop, set_phase


def save_step(
    policy: Policy, optimizer: torch.optim.Optimizer, out: Path, step: int, keep: int
) -> None:
    """Checkpoint after `step`, unless it is there; the newest `keep` stay, and the best.

    A collective. TrainingStop, on all ranks and with nothing half-written left, where the disk has
    no room for it.
    """
    folder = out / "checkpoints" / f"step-{step:06d}"
    if folder.exists():
        return
    set_phase("checkpoint")
    temporary = folder.with_name(f".{folder.name}.tmp")
    main = dist.get_rank() == 0

    def prepare() -> None:
        if main:
            folder.parent.mkdir(exist_ok=True)
            rundir.sweep(folder.parent)
            need = 12 * sum(p.numel() for p in policy.parameters())  # a weight, two moments, fp32
            free = shutil.disk_usage(out).free
            if free < need:
                raise no_room(
                    out, f"{need / 1e9:.1f} GB are needed and {free / 1e9:.1f} free", keep
                )

    on_all_ranks(prepare, interruptible=False)
    try:
        save(policy, optimizer, temporary)
        set_phase("checkpoint")
        parts = gather(rundir.digests(temporary, dist.get_rank(), dist.get_world_size()))
    except (CheckpointException, OSError) as error:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise no_room(out, reason, keep) from None

    def finish() -> None:
        if main:
            contents = {name: entry for part in parts for name, entry in part.items()}
            rundir.seal(temporary, folder, contents)
            best = best_step(out)
            for old in list(checkpoints(out))[:-keep]:
                if old != best:
                    rundir.remove(checkpoints(out)[old])

    on_all_ranks(finish, interruptible=False)
    set_phase("checkpoint", checkpoint=step)


def best_step(out: Path) -> int | None:
    """The step whose checkpoint had the best mean reward in validation; None without any."""
    path = out / "evals.jsonl"
    rewards: dict[int, list[tuple[float, int]]] = {}
    for line in rundir.read_jsonl(path)[0] if path.exists() else ():
        if line["step"] in checkpoints(out) and line["reward"] is not None:
            rewards.setdefault(line["step"], []).append((line["reward"], line["n"]))
    means = {
        s: sum(r * n for r, n in all_) / sum(n for _, n in all_) for s, all_ in rewards.items()
    }
    return max(means, key=lambda step: means[step], default=None)


SPEED = 0.7e9  # bytes a second that a disk takes, to be safe
GRACE = 30.0  # seconds that torchrun leaves its ranks; train.sh asks for more


def save_before_stop(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    out: Path,
    step: int,
    keep: int,
    error: Exception,
) -> None:
    """A checkpoint of the last whole step, if the launcher's patience lasts for one."""
    size = 12 * sum(p.numel() for p in policy.parameters())
    grace = float(os.environ.get("POLARIS_GRACE", GRACE))
    if isinstance(error, Interrupted) and size > SPEED * grace:
        if dist.get_rank() == 0:
            print(
                f"a checkpoint of {size / 1e9:.0f} GB would outlast the launcher's {grace:.0f} s: "
                "the last one stays the newest"
            )
        return
    try:
        save_step(policy, optimizer, out, step, keep)
    except TrainingStop as full:  # the first reason is the one that counts
        if dist.get_rank() == 0:
            print(full, file=sys.stderr)


def no_room(out: Path, reason: str, keep: int) -> TrainingStop:
    return TrainingStop(
        f"a checkpoint in {out} could not be written ({reason}): free disk space, {keep + 1} "
        "checkpoints have to fit (--keep), then go on with --resume"
    )


def resume(
    policy: Policy, optimizer: torch.optim.Optimizer, out: Path, save_every: int
) -> int | None:
    """Load the newest checkpoint that is whole; move what was recorded after it aside.

    Returns its step; None where none was ever written. RecordError if there were some and none can
    be used.
    """
    faults = []
    found: int | None = None
    for step, folder in reversed(checkpoints(out).items()):
        parts = gather(rundir.fault_of(folder, dist.get_rank(), dist.get_world_size()))
        fault = next(filter(None, parts), "")
        if not fault:
            found = step
            load(policy, optimizer, folder)
            break
        faults.append(f"{folder.name}: {fault}")

    def reconcile() -> None:
        if dist.get_rank() > 0:
            return
        for fault in faults:
            print(f"checkpoint not used: {fault}", flush=True)
        last = last_line(out / "metrics.jsonl")
        if found is None and (faults or (last and last["step"] >= save_every)):
            raise RecordError(
                f"{out}/checkpoints holds no checkpoint that can be used "
                f"({'; '.join(faults) or 'there is none'}): bring one back, or start anew in "
                "another --out; nothing here was changed"
            )
        for step, folder in checkpoints(out).items():
            if found is None or step > found:
                folder.rename(folder.with_name(f"broken-{folder.name}"))
        newest = -1 if found is None else found
        # A validation comes after its checkpoint, so one that was cut short is done again.
        kept = {"metrics": newest, "rollouts": newest, "evals": newest - 1}
        for name, step in (kept | {"eval_stories": newest - 1}).items():
            rewind(out / f"{name}.jsonl", step)

    on_all_ranks(reconcile, interruptible=False)
    return found
