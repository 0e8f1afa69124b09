"""Nothing lost: one writer, verified checkpoints, signals, full disks, silent ranks, NaN."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import ROOT, World, polaris_main

import health
import polaris
import rundir
import watch
from rundir import RecordError, fault_of, seal

TINY = "--steps 6 --prompts 2 --group 4 --save-every 2 --eval-prompts 1 --anchor-warmup 2".split()
TINY += "--warm-steps 0 --device cpu".split()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def torchrun(*argv: str, ranks: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(ROOT / "polaris.py"), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=env, **pipe, **options)


def test_a_rank_whose_launcher_went_while_it_was_loading_ends():
    code = "import watch; watch.follow_launcher(); print('goes on')"
    command = ["sh", "-c", f'{sys.executable} -c "{code}"; true']  # its parent is a shell
    env = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout == "" and "the launcher is gone" in run.stderr


def parent(pid: str) -> str:
    """Parent of a living process; "" for one that is gone."""
    try:
        state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state == "Z" else ppid


def alive(pid: str) -> bool:
    return bool(parent(pid))


def descendants(pid: int) -> list[str]:
    """Living processes that this one started, and so on."""
    parents = {p.name: parent(p.name) for p in Path("/proc").glob("[0-9]*")}
    found = [str(pid)]
    for one in found:
        found += [child for child, of in parents.items() if of == one]
    return found[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing happened to: (directory, its weights)."""
    folder = tmp_path_factory.mktemp("whole")
    run = World(2, polaris_main, [*TINY, "--out", str(folder / "run")], log=folder / "log")
    assert run.wait() == [0, 0], run.text()
    return folder / "run", load_file(folder / "run" / "model" / "model.safetensors")


def equals(out: Path, whole) -> None:
    """The run in `out` ended as the whole one: the same steps, stories and weights."""
    directory, weights = whole
    assert [m["step"] for m in read(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    for name in ("rollouts", "eval_stories"):
        stories = [[r["story"] for r in read(d / f"{name}.jsonl")] for d in (out, directory)]
        assert stories[0] == stories[1]
    mine = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(mine[name], weights[name]) for name in weights)
    assert status(out)["state"] == "done" and status(out)["exit"] == 0


def resume(out: Path, tmp_path: Path, ranks: int = 2) -> str:
    run = World(ranks, polaris_main, ["--out", str(out), "--resume"], log=tmp_path / "again")
    assert run.wait() == [0] * ranks, run.text()
    return run.text()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_and_their_judge_along(tmp_path):
    out = tmp_path / "run"
    launcher = torchrun(*TINY, "--out", str(out), start_new_session=True)
    wait_until(lambda: lines(out / "metrics.jsonl") >= 1)
    family = descendants(launcher.pid)
    assert len(family) >= 3  # two ranks and the stand-in judge
    launcher.kill()
    wait_until(lambda: not any(map(alive, family)), 10)
    with rundir.lock(out, 0.1):  # nobody holds it any more
        pass


@pytest.mark.slow
def test_a_signal_saves_what_is_whole_and_ends_with_4(whole, tmp_path):
    out = tmp_path / "run"
    run = World(2, polaris_main, [*TINY, "--out", str(out)], log=tmp_path / "log")
    wait_until(lambda: lines(out / "metrics.jsonl") >= 3)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert run.wait(60) == [4, 4], run.text()
    assert "Traceback" not in run.text() and f"--out {out} --resume" in run.text()
    now = status(out)
    assert (now["state"], now["exit"]) == ("interrupted", 4) and "SIGTERM" in now["reason"]
    done = len(read(out / "metrics.jsonl"))
    assert fault_of(out / "checkpoints" / f"step-{done:06d}") == ""
    resume(out, tmp_path)
    equals(out, whole)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_for_a_place_where_it_may_interrupt(sent):
    code = f"""
import os, watch
watch.catch_signals()
os.kill(os.getpid(), {int(sent)})
print("the update went on to its end")
try:
    with watch.may_interrupt():
        print("not reached")
except watch.Interrupted as e:
    print(e)
os.kill(os.getpid(), {int(sent)})  # what torchrun repeats at once counts as the first
print("still here")
watch._Signals.first -= 3
os.kill(os.getpid(), {int(sent)})
print("not reached")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    told = ["the update went on to its end", f"{sent.name} received", "still here"]
    assert run.stdout.splitlines() == told[: len(run.stdout.splitlines())] and run.returncode == 4


def test_two_runs_cannot_write_to_one_directory(tmp_path, capsys):
    out = tmp_path / "run"
    first = World(1, polaris_main, [*TINY, "--out", str(out)], log=tmp_path / "log")
    wait_until(lambda: lines(out / "metrics.jsonl") >= 1)
    second = World(1, polaris_main, ["--out", str(out), "--resume"], log=tmp_path / "second")
    assert second.wait(60) == [2], second.text()
    assert f"in use by process {first.ranks[0].pid} on" in second.text()
    third = World(1, polaris_main, [*TINY, "--out", str(out)], log=tmp_path / "third")
    assert third.wait(60) == [2] and "--resume" in third.text()
    first.kill()
    with rundir.lock(out):  # it went with its holder
        with pytest.raises(RecordError, match=f"process {os.getpid()} on"), rundir.lock(out, 0.1):
            pass


def spoil(path: Path, how: str) -> None:
    if how == "one bit flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut in half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("how", ["one bit flipped", "cut in half", "empty", "missing"])
def test_every_damage_to_a_checkpoint_is_seen(file, how, tmp_path, whole):
    import shutil

    folder = tmp_path / "step-000006"
    shutil.copytree(whole[0] / "checkpoints" / "step-000006", folder)
    assert fault_of(folder) == ""
    spoil(folder / file, how)
    if file == "manifest.json" and how == "one bit flipped":
        return  # a digit of a size or of a hash, or no JSON: whichever, the next line may not pass
    assert file in fault_of(folder)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    folders = out / "checkpoints"
    (folders / "step-000006.bak").mkdir()  # somebody's copy is no checkpoint
    (folders / ".step-000008.tmp").mkdir()
    spoil(folders / "step-000006" / "__1_0.distcp", "one bit flipped")
    told = resume(out, tmp_path)
    assert "checkpoint not used: step-000006: __1_0.distcp has been changed" in told
    equals(out, whole)
    names = {path.name for path in folders.iterdir()}
    assert {"broken-step-000006", "step-000006", "step-000004", "step-000006.bak"} <= names
    assert ".step-000008.tmp" not in names
    assert [r["step"] for r in read(out / "metrics.dropped.jsonl")] == [5, 6]

    for folder in ("step-000004", "step-000006"):
        spoil(folders / folder / ".metadata", "empty")

    def kept() -> list[Path]:
        own = ("lock", "bill.json", "ranks")  # of the new process
        return sorted(p for p in out.rglob("*") if not set(own) & set(p.relative_to(out).parts))

    before = kept()
    run = World(1, polaris_main, ["--out", str(out), "--resume"], log=tmp_path / "third")
    assert run.wait() == [2] and "no checkpoint that can be used" in run.text()
    assert kept() == before


def main_with_broken_gradients(argv: list[str], steps: list[int], rank: int) -> int:
    """polaris.main; on one rank the gradient of some steps holds a NaN."""
    accumulate, step = polaris.accumulate, polaris.train_step
    now = []

    def spoiled(policy, *args):
        sums = accumulate(policy, *args)
        if now[-1] in steps and int(os.environ["RANK"]) == rank:
            next(p for p in policy.parameters() if p.grad is not None).grad.to_local().fill_(
                float("nan")
            )
        return sums

    polaris.accumulate = spoiled
    polaris.train_step = lambda run, number: now.append(number) or step(run, number)
    return polaris.main(argv)


def test_a_gradient_that_is_not_finite_is_skipped_and_three_in_a_row_stop_the_run(tmp_path):
    out = tmp_path / "run"
    argv = [*TINY, "--out", str(out)]
    run = World(2, main_with_broken_gradients, argv, [2, 4, 5, 6], 1, log=tmp_path / "log")
    assert run.wait() == [5, 5], run.text()
    metrics = read(out / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [False, True, False, True, True, True]
    assert metrics[1]["grad_norm"] is None and metrics[2]["grad_norm"] > 0
    kept = read(out / "skipped.jsonl")
    assert {r["step"] for r in kept} == {2, 4, 5, 6} and all(r["response_ids"] for r in kept)
    assert status(out)["exit"] == 5 and "not finite in three steps" in status(out)["reason"]
    assert "Traceback" not in run.text()


def main_that_freezes(argv: list[str], rank: int) -> int:
    """polaris.main; one rank stops moving in step 2, without a word."""
    watch.Heartbeat.EVERY, watch.Heartbeat.SILENCE = 0.2, 3.0
    accumulate, calls = polaris.accumulate, []

    def frozen(*args):
        calls.append(1)
        if len(calls) == 3 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return accumulate(*args)

    polaris.accumulate = frozen
    return polaris.main(argv)


def test_a_frozen_rank_is_named_with_its_phase(tmp_path):
    out, rank = tmp_path / "run", 1
    argv = [*TINY, "--out", str(out)]
    run = World(2, main_that_freezes, argv, rank, log=tmp_path / "log")
    run.ranks[1 - rank].join(60)
    assert run.ranks[1 - rank].exitcode == 5, run.text()
    assert f"rank {rank} (" in run.text() and "fell silent" in run.text()
    assert "'update' of step 2" in run.text()
    run.kill()


@pytest.mark.slow
def test_a_disk_without_room_stops_the_run_with_one_line_and_leaves_nothing_half_written(
    tmp_path,
):
    out = tmp_path / "run"
    run = World(1, main_on_a_small_disk, [*TINY, "--out", str(out)], log=tmp_path / "log")
    assert run.wait() == [5], run.text()
    assert "could not be written" in run.text() and "Traceback" not in run.text()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert status(out)["exit"] == 5


def main_on_a_small_disk(argv: list[str]) -> int:
    """polaris.main; the second checkpoint finds no room, in the middle of its writing."""
    import checkpoint

    save = checkpoint.save

    def full(policy, optimizer, folder):
        save(policy, optimizer, folder)
        if "step-000004" in str(folder):
            raise OSError(28, "No space left on device")

    checkpoint.save = full
    return polaris.main(argv)


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"preset": "mi', "is broken"),
        ('{"preset": "mini", "warp": 9}', "'warp'"),
        ("[]", "is broken"),
    ],
)
def test_a_broken_config_is_named(content, told, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert polaris.main(["--out", str(tmp_path), "--resume"]) == 2
    message = capsys.readouterr().err
    assert told in message and str(tmp_path) in message and "Traceback" not in message


def test_records_with_a_broken_middle_or_a_tail_of_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\0\0')
    assert rundir.read_jsonl(path) == ([{"step": 1}], True)
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RecordError, match=":2: not a line of JSON"):
        rundir.read_jsonl(path)


def test_a_folder_gets_its_name_only_when_it_is_whole(tmp_path):
    temporary = tmp_path / ".step-000001.tmp"
    temporary.mkdir()
    (temporary / "a").write_text("weights")
    seal(temporary, tmp_path / "step-000001", rundir.digests(temporary))
    assert fault_of(tmp_path / "step-000001") == "" and not temporary.exists()
    rundir.remove(tmp_path / "step-000001")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_first_record_may_be_begun_again(tmp_path):
    for name in ("start", "ranks", ".start.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "status.json").write_text("{}")
    polaris.parse(["--out", str(tmp_path)])
    (tmp_path / "letters.txt").write_text("somebody's")
    with pytest.raises(polaris.ConfigError, match="not empty"):
        polaris.parse(["--out", str(tmp_path)])


def line(step: int, **numbers) -> dict:
    usual = dict(entropy=0.3, grad_norm=1.0, rep=0.0, length_error=0.2, finished=1.0, n=40)
    usual |= dict(reward_mean=0.4, anchor_reward=0.6, judge_failures=0)
    return {"step": step, **usual, **numbers}


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("entropy", {"entropy": 4.0}),
        ("entropy", {"entropy": 0.01}),
        ("gradient", {"grad_norm": 30.0}),
        ("repetition", {"rep": 0.5}),
        ("length", {"length_error": 0.9}),
        ("cut off", {"finished": 0.2}),
        ("anchor", {"reward_mean": 0.7}),
        ("judge", {"judge_failures": 9, "n": 31}),
    ],
)
def test_each_sign_of_trouble_is_seen_and_a_steady_run_has_none(name, numbers):
    steady = [line(i) for i in range(1, 31)]
    assert health.warnings(steady) == {} and health.warnings(steady[:3]) == {}
    assert list(health.warnings([*steady, *(line(i, **numbers) for i in range(31, 37))])) == [name]


def test_status_of_a_run_that_is_gone(tmp_path, capsys):
    assert polaris.main(["--status", str(tmp_path)]) == 2
    (tmp_path / "status.json").write_text(json.dumps({"state": "training", "heartbeat": 1.0}))
    assert polaris.main(["--status", str(tmp_path)]) == 0
    assert "lost" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_run_goes_on_only_with_what_it_began_with(what, tmp_path, monkeypatch):
    from config import parse

    data, model, out = tmp_path / "data.jsonl", tmp_path / "model", tmp_path / "run"
    data.write_text('{"uid": "a"}\n')
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(5000000))
    out.mkdir()
    argv = ["--preset", "paper", "--data", str(data), "--model", str(model), "--out", str(out)]
    cfg = parse([*argv, "--judge-url", "http://localhost:1/v1"])
    examples = polaris.Examples([], [], [])
    polaris.begin(cfg, out, examples)
    again = parse(["--out", str(out), "--resume", "--save-every", "7"])
    polaris.begin(again, out, examples)
    assert json.loads((out / "config.json").read_text())["resumed"][0]["save_every"] == 7
    if what == "data":
        data.write_text('{"uid": "b"}\n')
    else:
        with open(model / "model.safetensors", "r+b") as file:
            file.seek(2600000)
            file.write(b"1")
    with pytest.raises(RecordError, match=f"{what}.* is not what this run began with"):
        polaris.begin(again, out, examples)


def test_the_bill_counts_what_killed_processes_have_paid(tmp_path):
    spent = {"calls": 3, "dollars": 0.5}
    with watch.Heartbeat(tmp_path, 0, 1, 60, lambda: spent):
        spent["calls"] = 5  # the process is killed after its next beat
        watch.set_phase("rollout")
    assert watch.settle_bill(tmp_path) == {"calls": 5, "dollars": 0.5}
    with watch.Heartbeat(tmp_path, 0, 1, 60, lambda: {"calls": 2, "dollars": 0.1}):
        pass
    assert watch.settle_bill(tmp_path) == {"calls": 7, "dollars": 0.6}
    assert watch.settle_bill(tmp_path) == {"calls": 7, "dollars": 0.6}
