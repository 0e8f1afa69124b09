"""What a run records and shows of each step: metrics.jsonl, rollouts.jsonl, a bar, a tracker."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import Config, flatten
from rows import Row, record
from rundir import append, last_line


class Stopwatch:
    """Seconds of each phase of a step. A GPU finishes what it was asked for before it is read."""

    def __init__(self, device: torch.device):
        self.device = device
        self.phases: dict[str, float] = {}
        self.started = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + self.now() - begin

    def seconds(self) -> dict[str, float]:
        return self.phases | {"step": self.now() - self.started}


class Log:
    """What rank 0 records and shows of each step."""

    def __init__(self, out: Path, cfg: Config, steps: int, done: int):
        self.out = out
        self.steps = steps
        # Spent on the judge before an interruption: the newest line's running totals.
        last = last_line(out / "metrics.jsonl")
        self.spent = last["judge"] if last else {}
        self.track = open_tracker(cfg, out)
        self.bar = tqdm(total=steps, initial=done, desc="steps", dynamic_ncols=True)

    def step(self, metrics: dict[str, Any], rows: list[Row], stats: list[dict[str, float]]) -> None:
        """Record one step. stats: of each rank's judge client."""
        bill = {name: self.spent.get(name, 0) + sum(s[name] for s in stats) for name in stats[0]}
        bill["dollars_projected"] = bill["dollars"] * self.steps / metrics["step"]
        for row in rows:
            line = {"step": metrics["step"], **record(row), "advantage": row.advantage}
            append(self.out / "rollouts.jsonl", line)
        append(self.out / "metrics.jsonl", metrics | {"judge": bill})
        if self.track:
            self.track(metrics | {"judge": bill}, metrics["step"])
        shown = {
            "reward": metrics["reward_mean"],
            "length error": metrics["length_error"],
            "words": metrics["words"],
            "$": bill["dollars"],
        }
        self.bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value})
        self.bar.update()


def open_tracker(cfg: Config, out: Path) -> Callable[[dict[str, Any], int], None] | None:
    """A function (metrics, step) for wandb or TensorBoard; None without one."""
    if cfg.tracker == "wandb":
        import wandb

        wandb.init(project="polaris", name=out.name, config=flatten(cfg), dir=out)
        return lambda metrics, step: wandb.log(metrics, step=step)
    if cfg.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out))

        def log(metrics: dict[str, Any], step: int) -> None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        return log
    return None
