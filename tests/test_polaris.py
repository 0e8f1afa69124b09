"""polaris.py over real processes, sockets and kills: resume is exact, a failed verdict trains
nothing, errors help."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from worlds import ROOT, World, polaris_main

import data
import judge
import mini.standin as offline
import mini.world as mini  # noqa: E402
import polaris
from chat import ChatStop
from config import flatten, options, parse
from policy import full_tensor
from reward import strip_length_sentence
from rows import Row, halves

TINY = "--steps 6 --prompts 2 --group 4 --save-every 2 --eval-prompts 2 --anchor-warmup 2".split()
TINY += "--warm-steps 2 --warm-rows 4 --device cpu".split()


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Twelve fables with reasoning traces."""

    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    lines = [
        dict(
            uid=e.uid,
            prompt=e.prompt,
            target_words=e.target_words,
            story=e.story,
            reasoning="Begin, try, end.",
        )
        for e in mini.fables(12, seed=0)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open() if line.endswith("\n")]


def numbers(out: Path) -> dict:
    """All that a run wrote, without the clock and the bill."""
    metrics = [
        {k: v for k, v in line.items() if k not in ("time", "judge", "wall")}
        for line in read(out / "metrics.jsonl")
    ]
    rows = read(out / "rollouts.jsonl") + read(out / "eval_stories.jsonl")
    for row in rows:
        row["verdict"] = {
            k: v
            for k, v in row["verdict"].items()
            if k not in ("cached", "seconds", "tokens_in", "tokens_out")
        }
    return {"metrics": metrics, "rows": rows, "evals": read(out / "evals.jsonl")}


def checked_main(argv: list[str]) -> int:
    """polaris.main, asserting after every step that it trained on every row whole, anchors
    included, and that the copy which generates equals the policy which is trained."""
    step, accumulate, taught = polaris.train_step, polaris.accumulate, []

    def noted(policy, ids, advantages, *rest):
        taught.extend(zip(ids, advantages, strict=True))
        return accumulate(policy, ids, advantages, *rest)

    def checked_step(run, number):
        before = {name: p.clone() for name, p in run.copy.named_parameters()}
        taught.clear()
        result = step(run, number)
        assert sorted(taught) == sorted(
            ((r.prompt_ids, r.response_ids), r.advantage) for r in result[1]
        )
        for anchor in [r for r in result[1] if r.anchor]:
            whole = data.encode_anchor(
                run.tokenizer, anchor.example, run.cfg.thinking, max_response=10**9
            )
            assert anchor.response_ids == whole and anchor.advantage != 0
        for (name, p), written in zip(
            run.policy.lm.named_parameters(), run.copy.parameters(), strict=True
        ):
            assert torch.equal(full_tensor(p), written), (
                f"{name} of the copy is stale at step {number}"
            )
        assert any(not torch.equal(before[name], p) for name, p in run.copy.named_parameters())
        return result

    polaris.train_step, polaris.accumulate = checked_step, noted
    return polaris.main(argv)


def main_killed_in_checkpoint(argv: list[str], folder: str) -> int:
    """polaris.main, killed by -9 when a checkpoint is written but does not have its name yet."""
    import rundir

    def replace(tmp, target):
        if Path(target).name == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(tmp, target)

    rundir.os = SimpleNamespace(**vars(os) | {"replace": replace})
    return polaris.main(argv)


def wait_for_lines(path: Path, n: int, run: World) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert all(rank.is_alive() for rank in run.ranks) and time.monotonic() < deadline, (
            run.text()
        )
        time.sleep(0.02)


def test_killed_anywhere_and_resumed_equals_never_killed_bit_for_bit(stories, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = [*TINY, "--data", str(stories), "--thinking"]
    run = World(2, checked_main, [*argv, "--out", str(whole)], log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()
    metrics = read(whole / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert (
        metrics[0]["anchors"] == 0
        and metrics[1]["anchors"] == 2
        and metrics[5]["anchor_weight"] == 0.4
    )

    # Killed in step 4 or so, then while the checkpoint of step 4 is written, then left alone.
    run = World(2, polaris_main, [*argv, "--out", str(broken)], log=tmp_path / "log")
    wait_for_lines(broken / "metrics.jsonl", 3, run)
    run.kill()
    with (broken / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "half a li')
    again = ["--out", str(broken), "--resume"]
    run = World(2, main_killed_in_checkpoint, again, "step-000004", log=tmp_path / "log")
    run.ranks[0].join(200)
    run.kill()
    assert run.ranks[0].exitcode == -signal.SIGKILL
    assert (broken / "checkpoints" / ".step-000004.tmp").exists()
    assert not (broken / "checkpoints" / "step-000004").exists()
    run = World(2, polaris_main, again, log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()

    assert numbers(broken) == numbers(whole)
    one, other = (
        load_file(whole / "model" / "model.safetensors"),
        load_file(broken / "model" / "model.safetensors"),
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kept = {p.name for p in (broken / "checkpoints").iterdir()}
    assert kept - {"step-000000"} == {"step-000004", "step-000006"}  # 0: while it is the best

    # Ranks see the same prompts and write the same stories, however many they are.
    run = World(
        1,
        polaris_main,
        [*argv, "--out", str(tmp_path / "alone"), "--steps", "1"],
        log=tmp_path / "log",
    )
    assert run.wait() == [0], run.text()
    first = [r for r in read(whole / "rollouts.jsonl") if r["step"] == 1]
    alone = read(tmp_path / "alone" / "rollouts.jsonl")
    assert [(r["uid"], r["row"]) for r in alone] == [(r["uid"], r["row"]) for r in first]
    assert (
        sum(a["story"] == b["story"] for a, b in zip(alone, first, strict=True)) >= len(first) - 1
    )


def group(uid: str, lengths: list[int], anchor: int = 0) -> list[Row]:
    """A group of rollouts of so many tokens, and an anchor if it has any."""
    example = data.Example(uid, f"Write about {uid}.", 30, "It rained.")
    drafts = [
        Row(example, k, False, [1], [2] * n, True, "", "It rained.") for k, n in enumerate(lengths)
    ]
    return drafts + [
        Row(example, len(lengths), True, [1], [2] * anchor, True, "", "It rained.")
    ] * (anchor > 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 8192), min_size=2, max_size=6), st.integers(0, 8192)),
        min_size=1,
    )
)
def test_halves_are_whole_groups_those_that_ended_first_first_and_half_of_the_tokens_each(groups):
    rollouts = [group(str(i), lengths, 0) for i, (lengths, _) in enumerate(groups)]
    anchors = [
        row
        for i, (lengths, anchor) in enumerate(groups)
        for row in group(str(i), lengths, anchor)[len(lengths) :]
    ]
    rows = [row for group in rollouts for row in group] + anchors  # as `generate_rows` returns them
    parts = halves(rows)
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    uids = [{row.example.uid for row in part} for part in parts]
    assert len(parts) == min(2, len(groups)) and sum(map(len, uids)) == len(groups)
    if len(parts) == 2:
        # when a group has ended
        early, late = ([max(groups[int(uid)][0]) for uid in part] for part in uids)
        assert max(early) <= min(late)
        tokens = [sum(len(row.response_ids) for row in part) for part in parts]
        largest = max(sum(lengths) + anchor for lengths, anchor in groups)
        assert abs(tokens[0] - tokens[1]) <= largest


class Pending(Future):
    """A verdict to come; nobody may wait for one before there has been some gradient work."""

    def result(self, timeout=None):
        assert self.done(), "the step waits for a verdict while it could train on other groups"
        return super().result(timeout)


@pytest.fixture
def stubbed_step(monkeypatch):
    """train_step with everything but its order taken out: stories are there, the verdicts on the
    longest group are not until gradient work has begun, and `log` tells what happened."""
    polaris.join()
    mesh, device = polaris.setup(parse(["--device", "cpu"]))
    rows = group("short", [3, 5, 4]) + group("long", [7, 20, 4]) + group("middle", [9, 2, 8])
    verdicts, log = [Pending() for _ in rows], []
    for row, verdict in zip(rows, verdicts, strict=True):
        row.pending = verdict

    def accumulate(policy, ids, advantages, n_tokens, *_):
        log.append(
            ([len(response) for _, response in ids], [round(a, 3) for a in advantages], n_tokens)
        )
        for i in late:
            verdicts[i].set_result(scores[i])
        late.clear()
        return torch.zeros(5)

    scores, late = {}, []
    monkeypatch.setattr(polaris, "generate_rows", lambda *args: rows)
    monkeypatch.setattr(polaris, "accumulate", accumulate)
    monkeypatch.setattr(polaris, "apply", lambda *args: log.append("apply") or {})
    monkeypatch.setattr(polaris, "copy_weights", lambda *args: log.append("sync"))
    cfg = parse(["--no-anchor", "--prompts", "3", "--group", "3"])
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [])
    run = SimpleNamespace(
        cfg=cfg, mesh=mesh, device=device, tokenizer=tokenizer, optimizer=None, copy=None
    )
    run.judge = SimpleNamespace(url="URL")
    run.policy, run.train = SimpleNamespace(lm=None), [rows[i].example for i in (0, 3, 6)]

    def step(answers: list, arrival: list[int]):
        scores.update(
            {
                i: judge.Verdict(score=score, error="" if score else "lost")
                for i, score in enumerate(answers)
            }
        )
        late.extend(i for i in arrival if 3 <= i < 6)
        for i in arrival:
            if i not in late:
                verdicts[i].set_result(scores[i])
        return polaris.train_step(run, 1)

    yield step, log
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("arrival", [range(9), range(8, -1, -1), [4, 8, 0, 6, 5, 2, 7, 1, 3]])
def test_the_group_that_ended_last_is_judged_while_the_step_learns_from_the_others(
    stubbed_step, arrival
):
    step, log = stubbed_step
    metrics, rows = step([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.5, 0.4], arrival)
    assert log == [  # whatever order verdicts come in
        ([3, 5, 4, 9, 2, 8], [-1, 0, 1, 1, 0, -1], 62),
        ([7, 20, 4], [-1, 0, 1], 62),
        "apply",
        "sync",
    ]
    assert [row.advantage for row in rows] == pytest.approx(
        [-1, 0, 1, -1, 0, 1, 1, 0, -1], abs=1e-3
    )
    assert metrics["n"] == 9 and metrics["judge_failures"] == 0


def test_failed_verdicts_are_counted_over_the_whole_step_and_stop_it_before_the_optimiser(
    stubbed_step,
):
    step, log = stubbed_step
    with pytest.raises(ChatStop, match="5 of 9 stories of step 1 got no verdict.*lost"):
        step([0.1, None, 0.3, None, None, None, 0.6, None, 0.4], range(9))
    assert len(log) == 2 and "apply" not in log


def test_as_many_failures_as_allowed_in_one_wave_do_not_stop_the_step(stubbed_step):
    step, log = stubbed_step
    _, rows = step(
        [None, None, 0.3, 0.4, 0.5, 0.6, None, 0.7, None], range(9)
    )  # four of six, and four of nine
    assert log[-2:] == ["apply", "sync"] and log[0][1] == [0] * 6
    assert [row.reward is None for row in rows] == [
        True,
        True,
        False,
        False,
        False,
        False,
        True,
        False,
        True,
    ]


def main_whose_judge_goes_in_the_second_half(argv: list[str]) -> int:
    """polaris.main; the verdicts that are due after the first gradient work never come, on the rank
    that waits."""
    accumulate, collect, begun = polaris.accumulate, polaris.collect_verdicts, []

    def collects(run, rows, limit):
        for row in rows if begun else ():
            if row.pending:
                row.pending = Future()
                row.pending.set_exception(ChatStop("the judge is gone"))
        return collect(run, rows, limit)

    polaris.collect_verdicts = collects
    polaris.accumulate = lambda *args: begun.append(1) or accumulate(*args)
    return polaris.main(argv)


def test_a_judge_that_goes_in_the_middle_of_an_update_leaves_nothing_of_it(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = [*TINY, "--steps", "1", "--warm-steps", "0", "--eval-prompts", "1"]
    run = World(
        2,
        main_whose_judge_goes_in_the_second_half,
        [*argv, "--out", str(broken)],
        log=tmp_path / "log",
    )
    assert run.wait() == [3, 3], run.text()
    assert "the judge is gone" in run.text()
    assert [p.name for p in (broken / "checkpoints").iterdir()] == ["step-000000"]
    run = World(2, polaris_main, ["--out", str(broken), "--resume"], log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()
    run = World(2, polaris_main, [*argv, "--out", str(whole)], log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()
    assert numbers(broken) == numbers(whole)
    one, other = (
        load_file(whole / "model" / "model.safetensors"),
        load_file(broken / "model" / "model.safetensors"),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_story_whose_judge_call_failed_is_never_scored_and_trains_nothing(tmp_path):
    log, out = tmp_path / "judge.jsonl", tmp_path / "run"
    process, url = judge.start_stand_in(
        faults="500:0.15,reset:0.1,truncate:0.05", seed=1, log=str(log)
    )
    argv = [*TINY, "--out", str(out), "--steps", "4", "--judge-url", url, "--judge-retries", "0"]
    argv += ["--max-judge-failures", "1"]  # in steps of 8 rows, 30% faults may well take half
    run = World(4, polaris_main, argv, log=tmp_path / "log")
    assert run.wait() == [0] * 4, run.text()
    process.stdin.close()

    answered = {entry["digest"] for entry in read(log) if entry["outcome"] == "ok"}
    rows = read(out / "rollouts.jsonl")
    masked = 0
    for row in rows:
        if not row["story"].strip():
            continue  # nothing to judge
        judged = offline.row_digest(strip_length_sentence(row["prompt"]), row["story"]) in answered
        assert (row["reward"] is not None) == judged
        assert (row["verdict"]["score"] is not None) == judged
        if not judged:
            assert row["advantage"] == 0
            masked += 1
    assert masked > 3
    assert sum(m["judge_failures"] for m in read(out / "metrics.jsonl")) == masked


def test_a_judge_that_dies_stops_the_run_in_time_and_is_paid_once_when_it_is_back(tmp_path):
    log, out = tmp_path / "judge.jsonl", tmp_path / "run"
    process, url = judge.start_stand_in(log=str(log))
    argv = [*TINY, "--out", str(out), "--judge-url", url, "--steps", "4", "--save-every", "10"]
    run = World(2, polaris_main, argv, log=tmp_path / "log")
    wait_for_lines(out / "metrics.jsonl", 2, run)
    process.kill()
    died = time.monotonic()
    assert run.wait() == [3, 3], run.text()
    assert time.monotonic() - died < 60
    assert "polaris: " in run.text() and url in run.text() and "--resume" in run.text()
    done = len(read(out / "metrics.jsonl"))
    assert 2 <= done < 4
    assert (out / "checkpoints" / f"step-{done:06d}").exists()

    def paid() -> list[str]:
        ok = [entry["digest"] for entry in read(log) if entry["outcome"] == "ok"]
        return [
            digest for digest in ok if digest != ok[0]
        ]  # the first is the check that every start makes

    with closing(sqlite3.connect(out / "verdicts.sqlite")) as kept:
        [[heard]] = kept.execute("SELECT COUNT(*) FROM verdicts")
    lost = len(paid()) - heard  # paid for, but still on their way when the judge died

    command = [
        sys.executable,
        str(ROOT / "judge.py"),
        "serve",
        "--port",
        re.search(r":(\d+)", url)[1],
        "--log",
        str(log),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    run = World(2, polaris_main, ["--out", str(out), "--resume"], log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()
    process.kill()
    assert [m["step"] for m in read(out / "metrics.jsonl")] == [1, 2, 3, 4]
    stories = {
        offline.row_digest(strip_length_sentence(r["prompt"]), r["story"])
        for r in read(out / "rollouts.jsonl")
    }
    assert sum(max(0, paid().count(digest) - 1) for digest in stories) <= lost


def test_torchrun_without_anchors_leaves_all_that_the_readme_promises(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
        ROOT / "polaris.py",
    ]
    command += [*TINY, "--steps", "2", "--no-anchor", "--out", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "words / asked" in done.stdout and str(out / "report.html") in done.stdout
    metrics = read(out / "metrics.jsonl")
    assert all(
        m["anchors"] == 0 and m["anchor_weight"] == 0 and m["anchor_reward"] is None
        for m in metrics
    )
    rows = read(out / "rollouts.jsonl")
    assert len(rows) == 2 * 2 * 4 and not any(r["anchor"] for r in rows)
    assert {e["bucket"] for e in read(out / "evals.jsonl")} == {"1x", "2x", "3x"}
    assert json.loads((out / "config.json").read_text())["anchor"] is False
    assert "<svg" in (out / "report.html").read_text()
    assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() > 100_000
    assert not [p for p in out.rglob("*") if ".tmp" in p.name]


GOOD = dict(
    uid="a",
    prompt="Write a story about rain. The story should be 30 words long.",
    target_words=30,
    story="It rained.",
)


@pytest.mark.parametrize(
    "lines, argv, status, told",
    [
        (None, "--data nowhere.jsonl", 2, "nowhere.jsonl"),
        (['{"uid": "a"'], "--data d.jsonl", 2, "d.jsonl:1"),
        (
            [json.dumps({k: v for k, v in GOOD.items() if k != "story"})],
            "--data d.jsonl",
            2,
            "story",
        ),
        ([json.dumps(GOOD | {"story": "<think>no</think> Rain."})], "--data d.jsonl", 2, "<think>"),
        ([json.dumps(GOOD | {"story": " "})], "--data d.jsonl", 2, "d.jsonl:1"),
        ([json.dumps(GOOD), json.dumps(GOOD)], "--data d.jsonl", 2, "d.jsonl:2"),
        ([json.dumps(GOOD)], "--data d.jsonl --thinking", 2, "reasoning"),
        (
            [json.dumps({"uid": "a", "prompt": "Rain.", "story": "A."})],
            "--data d.jsonl",
            2,
            "d.jsonl:1: the prompt",
        ),
        ([json.dumps(GOOD)], "--data d.jsonl", 2, "too few"),
        (None, "--preset paper", 2, "--data is missing"),
        (None, "--preset paper --data d.jsonl", 2, "--judge-url is missing"),
        (None, "--group 2", 2, "--group 2"),
        (None, "--lr -1", 2, "--lr -1.0"),
        (None, "--top-p 1.5", 2, "0 < top_p <= 1"),
        (None, "--judge-extra nonsense", 2, "--judge-extra"),
        (None, "--tracker disk", 2, "--tracker"),
        (None, "--tracker wandb", 2, "pip install wandb"),
        (None, "--resume --out gone", 2, "gone/config.json does not exist"),
        (None, "--judge-url http://127.0.0.1:9/v1", 3, "127.0.0.1:9"),
        (None, "--judge-url https://judge.example/v1", 3, "JUDGE_API_KEY"),
    ],
)
def test_bad_input_says_what_and_where_and_changes_nothing_on_disk(
    lines, argv, status, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    if lines is not None:
        Path("d.jsonl").write_text("\n".join(lines) + "\n")
    before = sorted(tmp_path.rglob("*"))
    assert polaris.main(argv.split()) == status
    message = capsys.readouterr().err
    assert told in message and "polaris: " in message and "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_on_four_ranks_what_is_wrong_is_said_once(tmp_path):
    for argv, told in (
        (["--data", "nowhere.jsonl"], "there is no such file"),
        (["--learning-rate", "1"], "usage:"),
    ):
        run = World(4, polaris_main, argv, log=tmp_path / argv[0])
        assert run.wait() == [2] * 4
        assert run.text().count(told) == 1 and "Traceback" not in run.text()


def test_an_unknown_option_and_a_run_of_another_configuration_are_refused(tmp_path, capsys):
    assert polaris.main(["--learning-rate", "1"]) == 2
    assert "--learning-rate" in capsys.readouterr().err
    saved = flatten(parse(["--lr", "0.002"]))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert polaris.main(["--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert polaris.main(["--out", str(tmp_path), "--resume", "--lr", "0.001"]) == 2
    assert "lr 0.002 there and 0.001 here" in capsys.readouterr().err
    assert parse(["--out", str(tmp_path), "--resume", "--save-every", "9"]).lr == 0.002


def test_every_option_is_in_the_help_with_its_default(capsys):
    assert polaris.main(["--help"]) == 0
    text = capsys.readouterr().out
    for option in options():
        assert option.flag in text and option.help and repr(option.default).replace("%", "%%")


def main_with_key(argv: list[str]) -> int:
    os.environ["JUDGE_API_KEY"] = "sk-very-secret-0123456789"
    return polaris.main(argv)


def test_the_key_is_in_no_file_that_a_run_leaves(tmp_path):
    out = tmp_path / "run"
    run = World(1, main_with_key, [*TINY, "--steps", "1", "--out", str(out)], log=tmp_path / "log")
    assert run.wait() == [0], run.text()
    for path in [*out.rglob("*"), tmp_path / "log"]:
        assert path.is_dir() or b"very-secret" not in path.read_bytes(), path
