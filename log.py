"""What a run records and shows of each step: metrics.jsonl, rollouts.jsonl, a bar, a tracker."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config import Config, flatten
from health import warnings
from rows import Row, record
from rundir import append, read_jsonl
from watch import read_json, set_phase


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
        set_phase(phase)
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
        self.spent = read_json(out / "bill.json")  # on the judge, before this start
        self.track = open_tracker(cfg, out)
        self.metrics = read_jsonl(out / "metrics.jsonl")[0] if done else []
        self.warned = {name for line in self.metrics for name in line.get("warnings", {})}
        self.live = sys.stderr.isatty()  # a log gets a line a step in place of a bar
        self.bar = tqdm(
            total=steps, initial=done, desc="steps", dynamic_ncols=True, disable=not self.live
        )

    def step(
        self, metrics: dict[str, Any], rows: list[Row], stats: list[dict[str, float]]
    ) -> dict[str, str]:
        """Record one step; stats: of each rank's judge client. Returns its new warnings."""
        bill = {name: self.spent.get(name, 0) + sum(s[name] for s in stats) for name in stats[0]}
        bill["dollars_projected"] = bill["dollars"] * self.steps / metrics["step"]
        metrics["judge"] = bill
        metrics["wall"] = time.time()
        self.metrics.append(metrics)
        found = warnings(self.metrics)
        new = {name: text for name, text in found.items() if name not in self.warned}
        self.warned |= set(new)
        metrics["warnings"] = new
        step = metrics["step"]
        lines = [{"step": step, **record(row), "advantage": row.advantage} for row in rows]
        append(self.out / "rollouts.jsonl", *lines)
        append(self.out / "metrics.jsonl", metrics)
        if self.track:
            self.track(metrics, step)
        shown = {
            "reward": metrics["reward_mean"],
            "length error": metrics["length_error"],
            "words": metrics["words"],
            "$": bill["dollars"],
        }
        values = {name: f"{value:.2f}" for name, value in shown.items() if value}
        self.bar.set_postfix(values)
        self.bar.update()
        seconds = metrics["time"]["step"]
        line = ", ".join(f"{name} {value}" for name, value in values.items())
        say(self.out, f"step {step}/{self.steps}: {line}; {seconds:.1f} s", show=not self.live)
        for name, text in new.items():
            say(self.out, f"warning ({name}): {text}")
        return new


def say(out: Path, text: str, show: bool = True) -> None:
    """Print, and keep in run.log."""
    if show:
        tqdm.write(text)
    with open(out / "run.log", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")


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
