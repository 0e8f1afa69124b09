"""Long fault trials, outside the test suite: kill, damage, starve and stop a run again and again.

    python tests/soak.py kills --times 30      a random rank or the launcher, at random moments
    python tests/soak.py damage --times 10     bits flipped in and bytes cut from checkpoints
    python tests/soak.py steps --steps 2000    memory, files, threads and step time of a long run
    python tests/soak.py ranks                 loss curves of 1, 2, 3 and 4 ranks and of 2 x 2 nodes

Each prints a table; the last line says whether all was well. Everything is drawn from --seed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TINY = "--prompts 2 --group 4 --save-every 2 --eval-prompts 1 --anchor-warmup 2".split()
TINY += "--warm-steps 0 --device cpu".split()


def start(out: Path, *argv: str, ranks: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(ROOT / "polaris.py"), "--out", str(out), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def go_on(out: Path, *argv: str, ranks: int = 2) -> subprocess.Popen:
    begun = (out / "config.json").exists()
    return start(out, "--resume", ranks=ranks) if begun else start(out, *argv, ranks=ranks)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open() if line.endswith("\n")]


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if sid == str(leader) and state != "Z":
            found.append(int(stat.parent.name))
    return found


def ranks_of(launcher: int) -> list[int]:
    children = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in children.stdout.split()]


def difference(one: Path, other: Path) -> str:
    """ "" where two finished runs hold the same stories and weights."""
    for name in ("rollouts", "evals", "eval_stories"):
        a, b = (read(out / f"{name}.jsonl") for out in (one, other))
        keep = ("story", "reward", "advantage", "bucket", "step")
        if [{k: r.get(k) for k in keep} for r in a] != [{k: r.get(k) for k in keep} for r in b]:
            return f"{name}.jsonl differs"
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    return "" if all(torch.equal(a[name], b[name]) for name in a) else "weights differ"


def kills(args: argparse.Namespace, folder: Path) -> bool:
    argv = [*TINY, "--steps", str(args.steps)]
    assert start(folder / "whole", *argv).wait() == 0
    rng = random.Random(args.seed)
    out = folder / "killed"
    print(f"| {'kill':>4} | {'whom':10} | {'after':>6} | {'steps before':>12} | left running |")
    for number in range(args.times):
        run = go_on(out, *argv)
        after = rng.uniform(4, 22)
        time.sleep(after)
        ranks = ranks_of(run.pid)
        victims = [("launcher", run.pid), *((f"rank {i}", pid) for i, pid in enumerate(ranks))]
        whom, pid = rng.choice(victims)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            whom += " (gone)"
        run.wait()
        deadline = time.monotonic() + 40
        while session(run.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = len(session(run.pid))
        steps = len(read(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else 0
        print(
            f"| {number + 1:4} | {whom:10} | {after:4.1f} s | {steps:12} | {left:12} |", flush=True
        )
        if (out / "model").exists():
            shutil.move(out, folder / f"ended-{number}")  # it got through: from the beginning again
            if fault := difference(folder / "whole", folder / f"ended-{number}"):
                print(fault)
                return False
        if left:
            return False
    assert go_on(out, *argv).wait() == 0
    fault = difference(folder / "whole", out)
    print(fault or "stories and weights equal those of the run that nothing happened to")
    return not fault


def damage(args: argparse.Namespace, folder: Path) -> bool:
    argv = [*TINY, "--steps", str(args.steps)]
    whole = folder / "whole"
    assert start(whole, *argv).wait() == 0
    rng = random.Random(args.seed)
    ok = True
    print(f"| {'damage':40} | {'exit':>4} | what it said")
    for number in range(args.times):
        out = folder / f"damaged-{number}"
        shutil.copytree(whole, out)
        newest = max((out / "checkpoints").glob("step-*"))
        path = rng.choice(sorted(p for p in newest.iterdir()))
        content = bytearray(path.read_bytes())
        where = rng.randrange(len(content))
        if number % 2:
            content = content[:where]
            what = f"{path.name} cut at byte {where}"
        else:
            content[where] ^= 1 << rng.randrange(8)
            what = f"{path.name} bit of byte {where}"
        path.write_bytes(content)
        status = start(out, "--resume").wait()
        log = Path(f"{out}.log").read_text()
        said = [line for line in log.splitlines() if "checkpoint not used" in line]
        fault = "" if status == 0 and said and not difference(whole, out) else "NOT SEEN"
        ok = ok and not fault
        print(f"| {what:40} | {status:4} | {said[:1] or fault}", flush=True)
    return ok


def steps(args: argparse.Namespace, folder: Path) -> bool:
    """Memory, open files, threads and step time, over a long run of the tiniest settings."""
    out = folder / "long"
    tiny = "--warm-steps 0 --prompts 1 --group 3 --max-response 16 --eval-prompts 1 --device cpu"
    argv = [*tiny.split(), "--save-every", "100", "--steps", str(args.steps)]
    run = start(out, *argv)
    seen = []
    while run.poll() is None:
        time.sleep(args.every)
        status = out / "ranks" / "0.json"
        try:
            pid = json.loads(status.read_text())["pid"]
            memory = Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            metrics = read(out / "metrics.jsonl")
        except (OSError, ValueError, IndexError):
            continue
        recent = statistics.median(m["time"]["step"] for m in metrics[-50:])
        seen.append((len(metrics), int(memory) / 1e3, files, threads, recent))
        print("step {} PSS {:.0f} MB, {} files, {} threads, {:.3f} s".format(*seen[-1]), flush=True)
    early = [row for row in seen if row[0] > args.steps / 10]
    first, last = early[0], early[-1]
    growth = last[1] / first[1]
    slower = last[4] / first[4]
    print(f"memory × {growth:.2f}, files {first[2]} → {last[2]}, threads {first[3]} → {last[3]}")
    print(f"step time × {slower:.2f}; exit status {run.returncode}")
    flat = last[2] <= first[2] + 2 and last[3] <= first[3] + 2
    return run.returncode == 0 and growth < 1.1 and flat and slower < 1.25


def curves(args: argparse.Namespace, folder: Path) -> bool:
    """The same rows, update by update, on other numbers of ranks and on two nodes."""
    losses = {}
    for name in ("1", "2", "3", "4", "2x2"):
        out = folder / name
        command = [sys.executable, str(ROOT / "tests" / "fixed_rows.py"), str(out), str(args.steps)]
        run = [sys.executable, "-m", "torch.distributed.run"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if name == "2x2":
            agents = []
            for node in (0, 1):
                where = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2"]
                where += ["--master_addr=127.0.0.1", "--master_port=29631"]
                agents.append(subprocess.Popen([*run, *where, *command[1:]], env=env))
            assert [agent.wait() for agent in agents] == [0, 0]
        else:
            where = ["--standalone", f"--nproc_per_node={name}"]
            subprocess.run([*run, *where, *command[1:]], env=env, check=True)
        losses[name] = json.loads(out.read_text())
    worst = 0.0
    print(f"| ranks | loss after {args.steps} steps | largest difference to one rank |")
    for name, curve in losses.items():
        apart = max(abs(a - b) for a, b in zip(curve, losses["1"], strict=True))
        worst = max(worst, apart)
        print(f"| {name:5} | {curve[-1]:.8f} | {apart:.1e} |")
    return worst < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trials = {"kills": kills, "damage": damage, "steps": steps, "ranks": curves}
    parser.add_argument("trial", choices=list(trials))
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two looks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ok = trials[args.trial](args, Path(folder))
    print("all was well" if ok else "FAILED")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
