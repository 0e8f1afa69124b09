"""The evaluation as a program: official look-alikes, faults, kills, bad inputs, ratings, tables."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

import eval as evaluation
from evals import elo, files, stats, tasks
from evals.answers import PAIRWISE_KEYS
from judge import start_stand_in
from mini import world as mini

ROOT = Path(__file__).parents[1]
STORY = "One morning a grey wren came to the {} to find a bell. Rain fell. The wren went home."
FAULTS = "429:0.06,truncate:0.06,prose:0.06,half:0.04,array:0.04,empty:0.04"
CHECKLIST = [
    {"name": f"C{i}", "criteria_description": f"about {{braces}} {i}", "1-2": "bad", "9-10": "good"}
    for i in range(5)
]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def story_lines(n: int, seed: int = 0, **more) -> list[dict]:
    rng = random.Random(seed)
    places = "river mill hill harbour forest tower garden bridge".split()
    lines = []
    for i in range(n):
        text = " ".join(STORY.format(rng.choice(places)) for _ in range(rng.randint(1, 4)))
        target = (1500, 2500, 3500, 5000, 7000, 9000)[i % 6]
        lines.append({"uid": f"p{i}", "prompt": f"Write of a wren, {i}.", "story": text})
        lines[-1] |= {"target_words": target, "checklist": CHECKLIST, **more}
    return lines


@contextlib.contextmanager
def server(**options):
    process, url = start_stand_in(**options)
    try:
        yield ["--judge-url", url, "--judge-model", "offline"]
    finally:
        process.stdin.close()
        process.wait(10)


@pytest.fixture(scope="module")
def judge_server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    with server(log=log) as options:
        yield options, log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def run(*arguments) -> int:
    return evaluation.main([*map(str, arguments)])


def result(path: Path) -> dict:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------ every task, repeats


@pytest.mark.parametrize("task", tasks.TASKS)
def test_each_task_is_judged_once_and_read_from_its_files(task, tmp_path, judge_server):
    options, log = judge_server
    stories = write(tmp_path / "s.jsonl", story_lines(12))
    before = calls(log)
    assert run("score", stories, "--task", task, *options, "--dry-run") == 0
    assert calls(log) == before and not (tmp_path / f"s.{task}.json").exists()
    assert run("score", stories, "--task", task, *options, "--repeats", 2) == 0
    each = 5 if task == "writingbench" else 1
    assert calls(log) - before == 2 * 12 * each
    first = (tmp_path / f"s.{task}.json").read_bytes()
    assert run("score", stories, "--task", task, *options, "--repeats", 2) == 0
    assert calls(log) - before == 2 * 12 * each
    assert (tmp_path / f"s.{task}.json").read_bytes() == first
    found = result(tmp_path / f"s.{task}.json")
    assert found["judged"] == found["stories"] == 12 and found["retest_spread"] == 0
    assert found["judge_answered"] == {"offline": 24 * each} and not found["failures"]
    name = found["score"]
    everything = next(row for row in found["table"] if row["bucket"] == "all")[name]
    assert everything["mean"] == pytest.approx(fmean(item[name] for item in found["items"]))
    assert everything["low"] <= everything["mean"] <= everything["high"]
    lines = [json.loads(line) for line in open(tmp_path / f"s.{task}.jsonl")]
    assert len(lines) == 24 * each and all(line["raw"] and line["scores"] for line in lines)


def test_faults_leave_the_mean_of_the_judged_rest(tmp_path, judge_server):
    options, _ = judge_server
    lines = story_lines(24)
    for task in ("longform", "writingbench"):
        clean = write(tmp_path / f"clean-{task}.jsonl", lines)
        spoilt = write(tmp_path / f"spoilt-{task}.jsonl", lines)
        run("score", clean, "--task", task, *options)
        with server(faults=FAULTS) as bad:
            status = run("score", spoilt, "--task", task, *bad, "--judge-retries", 1)
        truth = {i["uid"]: i for i in result(tmp_path / f"clean-{task}.{task}.json")["items"]}
        found = result(tmp_path / f"spoilt-{task}.{task}.json")
        name = found["score"]
        judged = [item for item in found["items"] if item["repeats_judged"]]
        assert found["judged"] == len(judged) < 24 and sum(found["failures"].values()) > 0
        assert status == (0 if len(judged) >= 23 else 3)
        for item in judged:
            assert item[name] == truth[item["uid"]][name]
        everything = next(row for row in found["table"] if row["bucket"] == "all")[name]
        assert everything["mean"] == pytest.approx(fmean(truth[i["uid"]][name] for i in judged))
        # a failure is not kept: asked again of a good judge, it is judged
        assert run("score", spoilt, "--task", task, *options) == 0
        assert result(tmp_path / f"spoilt-{task}.{task}.json")["judged"] == 24


def test_no_verdict_at_all_is_said(tmp_path, capsys):
    stories = write(tmp_path / "s.jsonl", story_lines(3))
    with server(faults="prose:1") as options:
        assert run("score", stories, "--task", "creative", *options) == 3
    assert "judged 0/3" in capsys.readouterr().out
    assert result(tmp_path / "s.creative.json")["failures"] == {"no scores in the answer": 3}


# ----------------------------------------------------------------------------- official look-alikes


def look_alikes(folder: Path) -> dict[str, Path]:
    """Files in the official formats, in words of our own."""
    criteria = [f"Merit number {i}" for i in range(9)] + [f"Flaw number {i}" for i in range(7)]
    texts = {
        "longform.txt": "Prompt {writing_prompt}\nText {full_story}\n{creative_writing_criteria}\n"
        "low: {lower_is_better_criteria}\n[Analysis] then [Scores]",
        "creative.txt": "Prompt {writing_prompt}\n{test_model_response}\n"
        "{creative_writing_criteria}\nlow: {lower_is_better_criteria}\n[Scores]",
        "prompt.py": 'evaluate_system = """\nBe fair.\n""".strip()\n'
        'evaluate_prompt = """\n{criteria}\n{query}\n{response}\n{criteria}\n'
        '{{"score": 1, "reason": "…"}}\n""".strip()\nraise SystemExit("never run")\n',
        "judge.txt": 'Request: $INST$\nAnswer: $RESPONSE$\n{"Breadth and Depth": 1}',
        "pairwise.txt": "{writing_prompt}\nA0493: {model_a_analysis}\nA0488: {model_b_analysis}\n"
        '{"avoids_poetic_overload": "A0493++"}',
        "criteria.txt": "\n".join(criteria),
        "negative.txt": "\n".join(criteria[9:]),
        "weights.json": '{"flaw number 0": 5}',
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    longform = {"1": {"category": "c", "title": "t", "writing_prompt": "A saga."}}
    creative = {
        str(i): {"writing_prompt": "A tale. <SEED> 1000 words", "seed_modifiers": ["in rain", "x"]}
        for i in range(3)
    }
    (folder / "longform.json").write_text(json.dumps(longform))
    (folder / "creative.json").write_text(json.dumps(creative))
    both = [("Literature & Arts", "en"), ("Finance", "en"), ("Literature & Arts", "zh")]
    rows = [
        {"index": i, "domain1": d, "lang": g, "query": f"Query {i}", "checklist": CHECKLIST}
        for i, (d, g) in enumerate(both, 1)
    ]
    write(folder / "bench.jsonl", rows)
    write(folder / "length.jsonl", [{"prompt": "An essay", "type": "o", "length": 900}] * 2)
    return {path.name: path for path in folder.iterdir()}


def test_prompt_files_of_every_kind(tmp_path):
    at = look_alikes(tmp_path)
    seeded = files.read_prompts(at["creative.json"])[0]
    assert (seeded.text(1), seeded.prompt) == ("A tale. x 1000 words", "A tale. <SEED> 1000 words")
    assert [p.uid for p in files.read_prompts(at["longform.json"])] == ["1"]
    bench = files.read_prompts(at["bench.jsonl"], "D4", "en")
    assert [p.uid for p in bench] == ["1"] and bench[0].more["checklist"] == CHECKLIST
    length = files.read_prompts(at["length.jsonl"])
    assert [(p.uid, p.target_words) for p in length] == [("1", 900), ("2", 900)]
    authors = write(tmp_path / "a.jsonl", [{"uid": "a", "prompt": "x", "target_word_count": 1500}])
    assert files.read_prompts(authors)[0].target_words == 1500
    with pytest.raises(ValueError, match="no lang in it"):
        files.read_prompts(authors, lang="en")


def test_templates_are_filled_in_one_pass(tmp_path):
    at = look_alikes(tmp_path)
    hostile = "story {prompt} {full_story} $INST$ {{x}} {query}"
    for name, values in (
        ("judge.txt", {"prompt": "P $RESPONSE$", "story": hostile}),
        (
            "longform.txt",
            {"prompt": "P {full_story}", "story": hostile, "criteria": "-", "lower": ""},
        ),
        ("prompt.py", {"prompt": "P {response}", "story": hostile, "criterion": "{'1-2': '{x}'}"}),
    ):
        shown = files.read_template(at[name]).messages(values)[-1]["content"]
        assert hostile in shown and values["prompt"] in shown, name
    shown = files.read_template(at["prompt.py"]).messages(
        {"prompt": "P", "story": "S", "criterion": "C"}
    )
    assert shown[0] == {"role": "system", "content": "Be fair."}
    assert shown[1]["content"] == 'C\nP\nS\nC\n{"score": 1, "reason": "…"}'


@pytest.mark.parametrize(
    "task, template, lists",
    [
        ("longform", "longform.txt", True),
        ("creative", "creative.txt", True),
        ("writingbench", "prompt.py", False),
        ("longbench", "judge.txt", False),
    ],
)
def test_look_alikes_are_judged(task, template, lists, tmp_path, judge_server):
    options, _ = judge_server
    at = look_alikes(tmp_path)
    stories = write(tmp_path / "s.jsonl", story_lines(3))
    given = ["--judge-prompt", at[template]]
    if lists:
        given += ["--criteria", at["criteria.txt"], "--lower-is-better", at["negative.txt"]]
        given += ["--weights", at["weights.json"]]
    assert run("score", stories, "--task", task, *given, *options) == 0
    found = result(tmp_path / f"s.{task}.json")
    assert found["judged"] == 3
    ours = tasks.TASKS[task]
    assert found["judge_prompt_sha256"] != ours.sha256
    if lists:
        assert len(found["dimensions"]) == 16


def test_responses_without_prompts_take_them_from_the_official_file(tmp_path, judge_server):
    options, _ = judge_server
    at = look_alikes(tmp_path)
    answers = [{"index": i, "response": STORY.format(i)} for i in (1, 2, 3)]
    responses = write(tmp_path / "r.jsonl", answers)
    given = ["--task", "writingbench", "--prompts", at["bench.jsonl"], *options]
    assert run("score", responses, *given) == 0
    assert result(tmp_path / "r.writingbench.json")["judged"] == 3


def test_stories_of_a_server_for_every_prompt_file(tmp_path, judge_server):
    """The stand-in answers anything: enough to see prompts, seeds and resumption."""
    (_, url, *_), log = judge_server
    at = look_alikes(tmp_path)
    for name, n in (("creative.json", 6), ("longform.json", 2), ("bench.jsonl", 6)):
        out = tmp_path / f"out-{name}l"
        command = ["stories", "some", "--url", url, "--prompts", at[name], "--out", out]
        assert run(*command, "--samples", 2, "--min-p", 0.1) == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == n and {line["settings"]["min_p"] for line in lines} == {0.1}
        before = calls(log)
        assert run(*command, "--samples", 2, "--min-p", 0.1) == 0 and calls(log) == before
    seeds = [
        line["seed_modifier"] for line in map(json.loads, open(tmp_path / "out-creative.jsonl"))
    ]
    assert seeds == ["in rain", "x"] * 3


# ---------------------------------------------------------------------------------------------- elo


def test_simulated_games_recover_ratings_and_order_changes_nothing():
    truth = np.array([1650.0, 1500.0, 1350.0])
    rng = random.Random(1)
    games = []
    for n in range(200):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = 1 / (1 + 10 ** ((truth[j] - truth[i]) / 400))
            games.append((f"p{n}", i, j, 1.0 if rng.random() < p else 0.0))
    rows = {row["model"]: row for row in elo.rate(["a", "b", "c"], games)}
    for model, rating in zip("abc", truth, strict=True):
        assert rows[model]["low"] <= rating <= rows[model]["high"]
    swapped = [(p, 2 - i, 2 - j, s) for p, i, j, s in rng.sample(games, len(games))]
    again = {row["model"]: row for row in elo.rate(["c", "b", "a"], swapped)}
    for model in "abc":
        assert again[model]["mean"] == pytest.approx(rows[model]["mean"], abs=1e-6)
    with_all_won = elo.rate(["a", "b"], [("p", 0, 1, 1.0)] * 9)
    assert with_all_won[0]["mean"] < 2500  # the virtual draw


def first_shown(monkeypatch):
    """A judge that gives all plusses to the story shown first."""
    answer = json.dumps({key: "A+++++" for key in PAIRWISE_KEYS})

    def ask(self, requests, what):
        from evals.judging import Judgement

        return [[Judgement(r.parse(answer), raw=answer, model="first")] for r in requests]

    monkeypatch.setattr("evals.judging.Asker.ask", ask)


def test_the_first_shown_wins_nothing(tmp_path, monkeypatch, capsys):
    first_shown(monkeypatch)
    names = [write(tmp_path / f"{m}.jsonl", story_lines(5, seed)) for seed, m in enumerate("abc")]
    out = tmp_path / "elo.json"
    options = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x", "--out", out]
    assert run("elo", *names, *options) == 0
    found = result(out)
    assert all(row["mean"] == pytest.approx(1500) for row in found["ratings"])
    assert found["first shown"]["mean"] == 1 and found["orders agree"]["mean"] == 0
    assert "first-shown share 1.00" in capsys.readouterr().out


def test_elo_ranks_and_the_order_of_files_changes_nothing(tmp_path, judge_server):
    options, log = judge_server
    good = write(tmp_path / "good.jsonl", story_lines(6))
    broken = [{**line, "story": line["story"][::-1]} for line in story_lines(6)]
    bad = write(tmp_path / "bad.jsonl", broken)
    at = look_alikes(tmp_path)
    for i, more in enumerate(([], ["--judge-prompt", at["pairwise.txt"]])):
        out = tmp_path / f"elo{i}.json"
        assert run("elo", good, bad, "--out", out, *options, *more) == 0
        first, before = out.read_bytes(), calls(log)
        assert run("elo", bad, good, "--out", out, *options, *more) == 0
        assert (out.read_bytes(), calls(log)) == (first, before)
        if not more:
            assert [row["model"] for row in result(out)["ratings"]] == ["good", "bad"]


# ----------------------------------------------------------------------------- tables and intervals


def test_intervals_draw_prompts_inside_buckets():
    items = [
        {"uid": str(i), "sample": s, "bucket": ("1k-2k", "3k-4k")[i % 2], "x": 10.0 * (i % 2) + i}
        for i in range(20)
        for s in range(4)
    ]
    rows = {row["bucket"]: row["x"] for row in stats.table(items, ["x"])}
    one = stats.table([item for item in items if item["sample"] == 0], ["x"])
    alone = {row["bucket"]: row["x"] for row in one}
    for name in ("1k-2k", "ID", "all", "slope"):  # four samples of a prompt are no four prompts
        for end in ("mean", "low", "high"):
            assert rows[name][end] == pytest.approx(alone[name][end])
    assert rows["all"]["high"] - rows["all"]["low"] < 6  # between the buckets nothing varies
    assert rows["slope"]["mean"] == pytest.approx((10 + 1) / 2)  # a gap at 2-3k
    lone = stats.table(items[:4], ["x"])
    assert lone[-2]["x"]["low"] is None and lone[-2]["x"]["mean"] == 0.0


def test_published_columns_give_the_printed_totals(capsys):
    assert run("compare", "--published") == 0
    lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("3:2:1")]
    assert len(lines) == 10
    off = [line for line in lines if "OFF" in line]
    assert len(off) == 1 and "no-HRI" in off[0] and "quality" in off[0] and "OFF by 0.5" in off[0]


def test_compare_pairs_and_marks_what_is_mixed(tmp_path, judge_server, capsys):
    options, _ = judge_server
    a = write(tmp_path / "a.jsonl", story_lines(12))
    b = write(tmp_path / "b.jsonl", story_lines(12, seed=5))
    for path in (a, b):
        assert run("score", path, "--task", "longform", *options) == 0
    results = [tmp_path / f"{name}.longform.json" for name in "ab"]
    assert run("compare", *results, "--strict", "--published") == 0
    shown = capsys.readouterr().out
    items = [{i["uid"]: i["uniform"] for i in result(path)["items"]} for path in results]
    difference = fmean(items[1][uid] - items[0][uid] for uid in items[0])
    assert f"{difference:.2f}".replace("-", "−") in shown and "POLARIS-9B (published)" in shown
    for form in ("--csv", "--markdown"):
        assert run("compare", *results, form) == 0
    run("score", b, "--task", "longform", *options, "--judge-extra", '{"temperature": 1}')
    assert run("compare", *results) == 0
    assert "mixed parameters" in capsys.readouterr().out
    assert run("compare", *results, "--strict") == 2


def test_length_needs_no_judge(tmp_path, capsys):
    lines = [{**line, "finished": i % 2 == 0} for i, line in enumerate(story_lines(12))]
    assert run("length", write(tmp_path / "s.jsonl", lines)) == 0
    table = {row["bucket"]: row for row in result(tmp_path / "s.length.json")["table"]}
    assert table["all"]["cut off"]["mean"] == 0.5 and table["all"]["in tolerance"]["mean"] == 0
    assert [*table][-5:] == ["ID", "near", "far", "all", "slope"]


# --------------------------------------------------------------------------------------- bad inputs


def test_bad_inputs_are_one_line_and_nothing_is_paid(tmp_path, judge_server, capsys):
    options, log = judge_server
    at = look_alikes(tmp_path)
    good = story_lines(2)

    def of(name: str, lines: list[dict] | str) -> Path:
        path = tmp_path / f"bad-{name}.jsonl"
        if isinstance(lines, str):
            path.write_text(lines)
            return path
        return write(path, lines)

    no_list = [{k: v for k, v in line.items() if k != "checklist"} for line in good]
    fine = of("fine", good)
    cases = {
        "missing file": (["score", tmp_path / "none.jsonl"], "none.jsonl"),
        "missing field": (["score", of("field", [{"uid": "a", "prompt": "x"}])], "no story"),
        "no JSON": (["score", of("json", "prose\n")], "json.jsonl:1"),
        "no object": (["score", of("array", "[1]\n")], "a JSON object is needed"),
        "target 0": (["score", of("zero", [good[0] | {"target_words": 0}])], "target_words is 0"),
        "NaN": (["score", of("nan", json.dumps(good[0] | {"target_words": float("nan")}))], "NaN"),
        "twice": (["score", of("twice", [good[0], good[0]])], "is in line 1 too"),
        "two models": (
            ["score", of("two", [good[0] | {"model": "a"}, good[1] | {"model": "b"}])],
            "stories of two models",
        ),
        "no checklist": (
            ["score", of("list", no_list), "--task", "writingbench"],
            "no checklist",
        ),
        "wrong official file": (
            ["score", fine, "--task", "longform", "--judge-prompt", at["pairwise.txt"]],
            "nothing fills",
        ),
        "wrong Python": (
            ["score", fine, "--task", "writingbench", "--judge-prompt", at["judge.txt"]],
            "no place for the criterion",
        ),
        "official lists": (
            ["score", fine, "--task", "longform", "--judge-prompt", at["longform.txt"]],
            "--criteria",
        ),
        "empty file": (["score", of("empty", "")], "the file is empty"),
        "not shared": (
            ["elo", fine, of("other", [good[0] | {"uid": "z"}]), "--out", tmp_path / "e.json"],
            "share no prompt",
        ),
        "length": (["length", of("nolength", [good[0] | {"target_words": None}])], "length"),
        "result": (["compare", at["weights.json"]], "no result of eval.py"),
    }
    before = calls(log)
    for name, (command, message) in cases.items():
        judged = options if command[0] in ("score", "elo") else []
        assert run(*command, *judged) == 2, name
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("eval.py: ") and message in line, (name, line)
    assert calls(log) == before


# ------------------------------------------------------------------------------------------ kill -9


def killed_and_resumed(command: list, outputs: list[Path], moments: list[float]) -> None:
    """Kill the command at these moments after its start, then let it end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(ROOT / "eval.py"), *map(str, command)]
    how = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for moment in moments:
        process = subprocess.Popen(call, **how)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(*command) == 0  # in this process: it starts at once
    assert all(path.exists() for path in outputs)


def without_times(path: Path) -> str:
    return "".join(
        json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"})
        for line in path.read_text().splitlines()
    ) if path.suffix == ".jsonl" else path.read_text()  # fmt: skip


@pytest.mark.slow
def test_score_and_elo_killed_ten_times_are_the_same_files(tmp_path):
    kills = int(os.environ.get("KILLS", 2))  # KILLS=10 is the whole check
    moments = [1.2 + 1.2 * i / kills for i in range(kills)]
    for command in ("score", "elo"):
        log = tmp_path / f"{command}.log"
        with server(delay=0.05, log=log) as options:
            whole, cut = tmp_path / "whole", tmp_path / f"cut-{command}"
            for folder in (whole, cut):
                folder.mkdir(exist_ok=True)
                paths = [
                    write(folder / f"{m}.jsonl", story_lines(40, s)) for s, m in enumerate("ab")
                ]
                given = ["--judge-concurrency", 2, *options]
                if command == "score":
                    outputs = [folder / f"a.longform.{end}" for end in ("json", "jsonl")]
                    line = ["score", paths[0], "--task", "longform", *given]
                else:
                    outputs = [folder / f"elo.{end}" for end in ("json", "jsonl")]
                    line = ["elo", *paths, "--out", outputs[0], *given]
                if folder == whole:
                    assert run(*line) == 0
                    once, reference = calls(log), [without_times(path) for path in outputs]
                else:
                    killed_and_resumed(line, outputs, moments)
            assert [without_times(path) for path in outputs] == reference
            again = calls(log) - 2 * once
            assert 0 <= again <= 2 * len(moments), again  # those under way


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    examples = mini.fables(12, seed=0)
    mini.make_model(folder / "model", examples, seed=0, hidden=32)
    lines = [{name: getattr(e, name) for name in ("uid", "prompt", "story")} for e in examples]
    lines = [
        line | {"target_words": e.target_words} for line, e in zip(lines, examples, strict=True)
    ]
    return folder / "model", write(folder / "data.jsonl", lines)


@pytest.mark.slow
def test_stories_and_memorise_killed_are_the_same_files(tiny, tmp_path):
    model, rows = tiny
    kills = int(os.environ.get("KILLS", 1))
    for command in ("stories", "memorise"):
        found = []
        for name, moments in (("whole", []), ("cut", [3 + 1.5 * i / kills for i in range(kills)])):
            out = tmp_path / f"{command}-{name}.json"
            if command == "stories":
                out = out.with_suffix(".jsonl")
                line = ["stories", model, "--prompts", rows, "--out", out, "--rows", 2]
                line += ["--samples", 2, "--max-new-tokens", 120]
            else:
                line = ["memorise", model, "--data", rows, "--out", out, "--rows", 2]
            killed_and_resumed(line, [out], moments)
            found.append(out.read_text())
        assert found[0] == found[1]


def test_the_audit_finds_what_is_copied(tiny, tmp_path, capsys):
    """A control is missing: said. A rollout that is the story itself is all copy."""
    from evals import memorise
    from evals.stories import Writer
    from rollout import Rollout

    model, rows = tiny
    writer = Writer(str(model), thinking=False)
    [(_, example), *_] = memorise.draw_rows(str(rows), 3, 3479)
    gold = writer.tokenizer.encode(example.story, add_special_tokens=False)
    found = memorise.compared(writer, Rollout(0, gold, False), gold, {})
    assert found["prefix"] == found["span"] == len(gold)
    assert found["generated"][1] == found["story"][1] == writer.tokenizer.decode(gold)
    assert memorise.summary([found])["copied 50"] == float(len(gold) >= 50)
    lines = [(i, {}) for i in range(500)]
    assert random.Random(3479).sample(lines, 3) == random.Random(3479).sample(lines, 3)
    out = tmp_path / "m.json"
    with contextlib.redirect_stderr(io.StringIO()):
        assert run("memorise", model, "--data", rows, "--rows", 1, "--out", out) == 0
    assert "No control" in capsys.readouterr().out
