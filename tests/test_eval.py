"""eval.py: the length table against its definition, stories and scores with real parts, reports of
hostile runs."""

import contextlib
import html
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import judge
from evals import stories as writing
from evals.length import BUCKETS, length_bucket, length_table, slope
from evals.report import PAGES, report, ticks, visible
from evals.stories import Writer, stories
from mini import world as mini
from reward import requested_words, word_count
from rollout import Rollout, Sampling
from rundir import RecordError, read_jsonl

ROOT = Path(__file__).parents[1]
FAST = settings(derandomize=True, deadline=None, max_examples=60)
OPENING = (
    "A tired bear came to the cave and could not find a drum. "
    "By the hill a mouse sat mending a net."
)
HOSTILE = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=alert(1)> </article></div></style><!-- ",
    "' onmouseover='alert(1)' \" onfocus=\"alert(1)\" `${x}`",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f form \x0c",
    "lone \ud800 surrogate \udfff, noncharacter \uffff",
    "override \u202e detcerid \u2066 isolate, plain mark \u200f stays",
    "&lt;b&gt; &#60;script&#62; ]]> {title} {0} %s",
    "<svg onload=alert(1)><title>x</title><a href=javascript:alert(1)>",
]


# ---------------------------------------------------------------------------------- a synthetic run


def make_verdict(rng: random.Random, level: float, quote: str) -> dict:
    dimensions = {}
    for d in judge.RUBRIC:
        share = level if d.key[0] == "P" else 1 - level
        points = min(d.max, max(0, round(d.max * share * rng.uniform(0.5, 1.2))))
        reason = f"{quote} The page earns this score by what it shows, not by what it claims."
        dimensions[d.key] = {
            "score": points,
            "justification": reason,
            "quotes": [quote[:40]] if points else [],
        }
    scores = {key: found["score"] for key, found in dimensions.items()}
    return {
        "score": judge.story_quality(scores | {"BONUS": 0, "PENALTY": 0}),
        "positive": sum(v for k, v in scores.items() if k[0] == "P"),
        "negative": sum(v for k, v in scores.items() if k[0] == "N"),
        "bonus": 0,
        "penalty": 0,
        "dimensions": dimensions,
        "quote_accuracy": 0.875,
        "error": "",
        "raw": "{}",
    }


def make_story(rng: random.Random, words: int, hostile: bool) -> str:
    extra = "\n\n".join(HOSTILE) + "\n\n" if hostile else ""
    pool = OPENING.split()
    lines = [
        " ".join(rng.choices(pool, k=rng.randint(5, 14))).capitalize() + "."
        for _ in range(max(1, words // 9))
    ]
    return extra + "\n\n".join(" ".join(lines[i : i + 6]) for i in range(0, len(lines), 6))


def make_row(
    rng: random.Random, level: float, target: int, ratio: float, hostile: bool = False
) -> dict:
    """What rollouts.jsonl and eval_stories.jsonl have in common."""
    story = make_story(rng, int(target * ratio), hostile)
    verdict, words = (
        make_verdict(rng, level, HOSTILE[0] if hostile else OPENING[:60]),
        word_count(story),
    )
    parts = {
        "total": 0.0,
        "sq": verdict["score"],
        "rep": 0.03,
        "len": abs(ratio - 1),
        "blank": 0.0,
        "think": 0.0,
    }
    parts |= {"overlong": 0.0, "total": verdict["score"] - 0.8 * parts["len"] - 0.045}
    name = HOSTILE[1] if hostile else "a shy duck, a lantern and the river"
    prompt = f"Write a story about {name}. The story should be {target} words long."
    row = {
        "uid": f"p{target}",
        "prompt": prompt,
        "target_words": target,
        "story": story,
        "words": words,
    }
    return row | {"finished": ratio < 1.4, "reward": parts, "verdict": verdict}


def make_run(
    run: Path, steps: int = 60, evals: bool = True, hostile: bool = False, seed: int = 0
) -> Path:
    """A run directory in the trainer's format."""
    rng, run = random.Random(seed), Path(run)
    run.mkdir(parents=True, exist_ok=True)
    config = {
        "preset": "mini",
        "model": "",
        "steps": steps,
        "lr": 1e-3,
        "judge_model": "offline",
        "out": HOSTILE[0],
    }
    (run / "config.json").write_text(json.dumps(config))
    metrics, rollouts = [], []
    for step in range(1, steps + 1):
        level = 0.45 + 0.35 * (1 - math.exp(-step / 20))
        noise = rng.gauss(0, 0.05)
        line = {
            "step": step,
            "reward_mean": level - 0.5 + noise,
            "reward_std": 0.2,
            "sq": level - 0.2 + noise,
        }
        line |= {
            "rep": 0.02,
            "len": 0.5 * math.exp(-step / 15),
            "blank": 0.0,
            "think": 0.0,
            "overlong": 0.01,
        }
        line |= {
            "length_error": 0.1 + 0.6 * math.exp(-step / 15) * rng.uniform(0.8, 1.2),
            "words": 40 + noise * 20,
        }
        line |= {
            "finished": 0.95,
            "anchor_weight": 0.4 * min(1, (step - 1) / 15),
            "anchors": 8 if step > 1 else 0,
        }
        line |= {"anchors_left_out": 0, "anchor_reward": 0.4 + noise / 2 if step > 1 else None}
        line |= {
            "anchor_advantage": 0.4 * min(1, (step - 1) / 15) * rng.uniform(1, 2)
            if step > 1
            else None
        }
        line |= {
            "judge_failures": 0,
            "loss": noise / 10,
            "grad_norm": rng.uniform(0.3, 0.6),
            "entropy": 0.9 - level / 2,
        }
        line |= {"logp": -0.8, "tokens": 3100, "lr": 1e-3}
        seconds = {
            "rollout": rng.uniform(1.5, 2),
            "judge_wait": rng.uniform(0, 0.2),
            "update": 0.8,
            "sync": 0.05,
        }
        line["time"] = seconds | {"step": sum(seconds.values()) + 0.1}
        line["judge"] = {
            "calls": 48 * step,
            "cached": 8 * (step - 1),
            "retries": step // 9,
            "failures": 0,
        }
        line["judge"] |= {
            "tokens_in": 90000 * step,
            "tokens_out": 70000 * step,
            "dollars": 0.013 * step,
        }
        metrics.append(line)
        for row in range(6):
            rolled = make_row(rng, level, 40, 1 + rng.gauss(0, 0.2), hostile)
            rolled |= {
                "step": step,
                "row": row,
                "anchor": row == 5,
                "thinking": "",
                "tokens": 60,
                "advantage": noise,
            }
            rollouts.append(rolled)
    write(run / "metrics.jsonl", metrics)
    write(run / "rollouts.jsonl", rollouts)
    if evals:
        lines, stories = [], []
        for label, level in ("before", 0.5), ("after", 0.8):
            for times in 1, 2, 3:
                rows = [
                    make_row(
                        rng,
                        level - 0.05 * times,
                        40 * times,
                        rng.uniform(0.9, 1.1) / times**0.5,
                        hostile and i == 0,
                    )
                    | {"label": label, "bucket": f"{times}x", "uid": f"test{i}"}
                    for i in range(4)
                ]
                flat = [
                    row | {"sq": row["reward"]["sq"], "reward": row["reward"]["total"]}
                    for row in rows
                ]
                stories += rows
                lines += [
                    {"label": label} | row for row in length_table(flat) if row["bucket"] != "all"
                ]
        write(run / "evals.jsonl", lines)
        write(run / "eval_stories.jsonl", stories)
    return run


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------- length table


def record(target: int, words: int, sq: float | None) -> dict:
    return {"target_words": target, "words": words, "sq": sq}


def test_bucket_edges():
    edges = {
        999: None,
        1000: "1k-2k",
        1999: "1k-2k",
        2000: "2k-3k",
        3000: "3k-4k",
        4000: "4k-6k",
        6000: "6k-8k",
    }
    edges |= {7999: "6k-8k", 8000: "8k-12k", 12000: "8k-12k", 12001: None}
    assert {target: length_bucket(target) for target in edges} == edges


def test_the_published_columns_give_the_published_total():
    """30 stories in each of six buckets with the paper's column means: "all" is as printed."""
    columns = {1500: 0, 2500: 0, 3500: 0, 5000: 1, 7000: 1, 10000: 2}
    for quality, ratio, all_quality, all_ratio in [
        ((57.4, 48.2, 44.1), (0.99, 0.87, 0.72), 52.1, 0.90),
        ((35.1, 8.7, -11.8), (1.09, 0.96, 0.88), 18.5, 1.01),
    ]:
        records = [
            record(target, round(target * ratio[column]), quality[column] / 100)
            for target, column in columns.items()
            for _ in range(30)
        ]
        *buckets, everything = length_table(records)
        assert [row["bucket"] for row in buckets] == list(BUCKETS)
        assert 100 * everything["sq"] == pytest.approx(all_quality, abs=0.06)
        assert everything["length_ratio"] == pytest.approx(all_ratio, abs=0.006)


RECORDS = st.builds(
    record,
    st.integers(500, 14000),
    st.integers(0, 20000),
    st.none() | st.floats(-1.59, 1.08),
)


@FAST
@given(st.lists(RECORDS, min_size=1, max_size=40))
def test_table_is_its_definition(records):
    *buckets, everything = length_table(records)
    assert everything["n"] == len(records)
    assert sum(row["n"] for row in buckets) == sum(
        length_bucket(r["target_words"]) is not None for r in records
    )
    xs, ys = [], []
    for row in [*buckets, everything]:
        group = [
            r
            for r in records
            if row is everything or length_bucket(r["target_words"]) == row["bucket"]
        ]
        ratios = np.array([r["words"] / r["target_words"] for r in group])
        scores = [r["sq"] for r in group if r["sq"] is not None]
        assert row["n"] == len(group) and row["judged"] == len(scores)
        assert row["length_ratio"] == pytest.approx(ratios.mean())
        assert row["length_error"] == pytest.approx(np.abs(ratios - 1).mean())
        assert row["sq"] == (pytest.approx(np.mean(scores)) if scores else None)
        if scores and row is not everything:
            xs.append(list(BUCKETS).index(row["bucket"]))
            ys.append(np.mean(scores))
    expected = np.polyfit(xs, ys, 1)[0] if len(xs) > 1 else None
    assert everything["slope"] == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_slope_counts_buckets_not_stories_and_keeps_gaps():
    counts = {1500: 1, 2500: 50, 7000: 3, 10000: 7}  # indices 0, 1, 4, 5; 2 and 3 are empty
    places = {1500: 0, 2500: 1, 7000: 4, 10000: 5}
    records = [record(t, t, 0.6 - 0.07 * places[t]) for t, n in counts.items() for _ in range(n)]
    records += [record(1500, 1500, None)] * 5  # without verdict: in n, not in any mean
    table = length_table(records)
    assert table[-1]["slope"] == pytest.approx(-0.07)
    assert (table[0]["n"], table[0]["judged"], table[0]["sq"]) == (6, 1, pytest.approx(0.6))


def test_own_buckets_are_ordered_by_length():
    records = [
        record(90, 60, 0.1) | {"bucket": "3x"},
        record(30, 30, 0.5) | {"bucket": "1x", "finished": True},
    ]
    records += [record(60, 50, 0.3) | {"bucket": "2x", "reward": -0.4}]
    table = length_table(records)
    assert [row["bucket"] for row in table] == ["1x", "2x", "3x", "all"]
    assert table[-1]["slope"] == pytest.approx(-0.2)
    assert (table[0]["finished"], table[1]["reward"], table[2]["reward"]) == (1.0, -0.4, None)
    assert slope(table[:1]) is None


# ------------------------------------------------------------------------------- stories and scores


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model and five prompts."""
    folder = tmp_path_factory.mktemp("world")
    examples = mini.fables(20, seed=0)
    mini.make_model(folder / "model", examples, seed=0, hidden=32)
    lines = [
        {"uid": e.uid, "prompt": e.prompt, "target_words": e.target_words} for e in examples[:5]
    ]
    write(folder / "prompts.jsonl", lines)
    return folder


def write_stories(world: Path, out: Path, seed: int = 7) -> list[dict]:
    writer = Writer(str(world / "model"), thinking=False)
    sampling = Sampling(max_new_tokens=24)
    return stories(writer, str(world / "prompts.jsonl"), str(out), sampling, seed, rows=1)


def test_stories_killed_and_resumed_are_the_same_file(world, tmp_path):
    records = write_stories(world, tmp_path / "whole.jsonl")
    assert [r["uid"] for r in records] == [
        json.loads(line)["uid"] for line in open(world / "prompts.jsonl")
    ]
    for r in records:
        assert r["words"] == word_count(r["story"]) and 0 < r["tokens"] <= 24
        assert r["finished"] or r["tokens"] == 24
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_bytes(
        lines[3] + lines[1] + lines[0][: len(lines[0]) // 2]
    )  # out of order, the last one half-written
    marked = json.loads(lines[3]) | {"words": 12345}
    killed.write_bytes(json.dumps(marked).encode() + b"\n" + killed.read_bytes()[len(lines[3]) :])
    again = write_stories(world, killed)
    assert again[3] == marked  # kept, not written anew
    assert [r for i, r in enumerate(again) if i != 3] == [
        r for i, r in enumerate(records) if i != 3
    ]
    assert read_jsonl(killed) == (again, False)
    with pytest.raises(RecordError, match="another prompt file, model, seed"):
        write_stories(world, killed, seed=8)


def run_eval(*args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "eval.py", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_story_on_the_command_line(world):
    """A file gets the story that `generate` gives for that seed, and nothing else."""
    prompt = json.loads(open(world / "prompts.jsonl").readline())["prompt"]
    options = ("--no-thinking", "--seed", "5", "--max-new-tokens", "24", "--top-k", "0")
    done = run_eval("story", world / "model", prompt, *options)
    writer = Writer(str(world / "model"), thinking=False)
    [rollout] = writer.write({("", 0): prompt}, Sampling(max_new_tokens=24, top_k=0), seed=5)
    text = writer.read(rollout)[1]
    assert (done.returncode, done.stdout) == (0, text + "\n")
    facts = done.stderr.splitlines()[-1]
    asked = requested_words(prompt)
    assert facts.startswith(f"{word_count(text)} words of {asked} requested, ")
    assert "tokens/s on cpu" in facts and ("cut off" in facts) == (not rollout.finished)


class Screen(io.StringIO):
    """A terminal that remembers its pieces."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.pieces += [text] if text else []
        return super().write(text)


class Bytes:
    """A model that answers with a fixed text, one byte at a time, and its tokenizer."""

    lm = type("Model", (), {"device": "cpu"})
    decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", "replace"))
    read = Writer.read

    def __init__(self, answer: str, thinking: bool):
        self.answer = answer
        self.thinking = thinking
        self.tokenizer = self

    def write(self, prompts, sampling, seed, on_tokens):
        rollout = Rollout(0, [], False)
        for byte in [*self.answer.encode(), 255]:  # 255: EOS
            rollout.ids.append(byte)
            rollout.finished = byte == 255
            on_tokens(rollout, [byte])
        return [rollout]


@FAST
@given(
    st.text("aé€😀 \n<>", max_size=30),
    st.text("aé€😀 \n</thinkt>", max_size=30),
    st.booleans(),
    st.booleans(),
)
def test_a_streamed_story_is_the_whole_story(reasoning, body, opened, terminal):
    """No broken character, no half of a mark, nothing twice and nothing left out."""
    answer = f"{'<think>' * opened}{reasoning}</think>\n\n{body}"
    writer = Bytes(answer, thinking=True)
    out, err = Screen(terminal), Screen(terminal)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        writing.story(writer, "A fable, 20 words long.", Sampling(), 0, show_thinking=True)
    thinking, text = data.split_response(answer, thinking=True)
    shown = [re.sub("\x1b\\[\\d*m", "", "".join(screen.pieces)) for screen in (out, err)]
    assert shown[0] == text + "\n"
    assert shown[1].startswith(thinking) and "\ufffd" not in shown[0] + shown[1]
    assert len(out.pieces) > len(set(text) & set("aé€😀"))  # it came in pieces
    assert ("\x1b[2m" in err.getvalue()) == terminal and "\x1b" not in out.getvalue()
    hidden = Screen(terminal)
    with contextlib.redirect_stdout(Screen(terminal)), contextlib.redirect_stderr(hidden):
        writing.story(writer, "A fable, 20 words long.", Sampling(), 0, show_thinking=False)
    words = f"{word_count(text)} words of 20 requested, "
    assert re.sub("\x1b\\[\\d*m", "", hidden.getvalue()).startswith(words)
    assert ("it only thought" in hidden.getvalue()) == (not text)


def test_a_terminal_is_not_changed_by_a_story():
    out = Screen(terminal=True)
    writer = Bytes("Red \x1b[31m and \x07 bell", thinking=False)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Screen(True)):
        writing.story(writer, "?", Sampling(), 0, show_thinking=True)
    assert out.getvalue() == "Red ⟨001B⟩[31m and ⟨0007⟩ bell\n"


TEMPLATES = {  # chat template: whether its model thinks
    "{{ messages[0].content }}:": False,
    "{{ messages[0].content }}:{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}": True,
    "{{ messages[0].content }}:<think>\n": True,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_thinking_follows_the_template_and_the_run(world, tmp_path, template):
    model = tmp_path / "run" / "model"
    shutil.copytree(world / "model", model)
    (model / "chat_template.jinja").write_text(template)
    assert Writer(str(model)).thinking == TEMPLATES[template]
    assert Writer(str(model), thinking=True).thinking
    for trained in (True, False):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"thinking": trained}))
        assert Writer(str(model)).thinking == trained
    assert Writer(str(model), thinking=True).thinking


def test_sampling_options_are_those_of_rollout():
    defaults = asdict(Sampling(max_new_tokens=32768))
    assert evaluation.SAMPLING == defaults


def test_scores_from_a_real_server_and_nothing_paid_twice(tmp_path, capsys):
    rng = random.Random(3)
    rows = [
        make_row(rng, 0.5, target, ratio)
        for target, ratio in [(1000, 1.0), (2500, 0.8), (9000, 0.5)]
    ]
    rows.append(rows[0] | {"uid": "empty", "story": "", "words": 0})
    fields = ("uid", "prompt", "target_words", "story", "words", "finished")
    write(tmp_path / "stories.jsonl", [{key: row[key] for key in fields} for row in rows])
    log = tmp_path / "server.jsonl"
    process, url = judge.start_stand_in(log=log)
    try:
        command = ["score", str(tmp_path / "stories.jsonl"), "--judge-model", "offline"]
        for _ in range(2):
            assert evaluation.main([*command, "--judge-url", url]) == 0
            assert len(log.read_text().splitlines()) == 3
    finally:
        process.stdin.close()
        process.wait(10)
    result = json.loads((tmp_path / "stories.quality.json").read_text())
    for item in result["items"][:3]:
        points = {d.key: int(item[d.key]) for d in judge.RUBRIC}
        assert item["quality"] == pytest.approx(100 * judge.story_quality(points))
        assert item["length ratio"] == item["words"] / item["target_words"]
    assert result["items"][3]["quality"] == 0.0 and result["blank"] == 1
    shown = capsys.readouterr().out
    expected = {"1k-2k": 2, "2k-3k": 1, "8k-12k": 1, "ID": 3, "far": 1, "all": 4}
    found = re.findall(r"^(\S+) +(\d+) ", shown, re.M)
    assert {name: int(n) for name, n in found[-6:]} == expected
    assert re.search(r"^slope +", shown, re.M)


# ------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Collects what a browser would make of a page: tags, attributes and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.attributes, self.pieces = (
            path.read_text(encoding="utf-8"),
            set(),
            [],
            [],
        )
        self.feed(self.source)
        self.words = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.pieces.append(data)


def check_safe(page: Page) -> None:
    tags = (
        "html head meta title style body section h1 h2 h3 h4 p b em i small span div table tr th td"
    )
    tags += " figure figcaption svg path text circle rect article details summary dl dt dd q code"
    names = "lang charset name content http-equiv class style viewbox role aria-label tabindex dir"
    names += " x y r cx cy d width"
    assert page.tags <= set(tags.split())
    assert {name for name, _ in page.attributes} <= {*names.split(), "height"}
    assert "url(" not in page.source and "@import" not in page.source
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
    assert "default-src 'none'" in page.source


def text(value: str) -> str:
    """A value as the pages' templates write it."""
    return PAGES.from_string("{{ value }}").render(value=value)


def test_hostile_stories_are_only_text(tmp_path):
    page = Page(report(make_run(tmp_path / "run", steps=3, hostile=True)))
    check_safe(page)
    for hostile in HOSTILE:
        assert visible(hostile).strip() in page.words
    assert "lone ⟨D800⟩ surrogate ⟨DFFF⟩" in page.words and "override ⟨202E⟩" in page.words
    assert "plain mark \u200f stays" in page.words
    for where in "label", "bucket":  # file contents that are no stories are not trusted either
        rows = [
            json.loads(line) | {where: HOSTILE[0]}
            for line in open(tmp_path / "run" / "evals.jsonl")
        ]
        write(tmp_path / "run" / "evals.jsonl", rows)
        check_safe(Page(report(tmp_path / "run")))


@FAST
@given(st.text(st.characters(exclude_categories=[]), max_size=60))
def test_text_is_inert_and_loses_nothing_printable(value):
    safe = text(value)
    safe.encode("utf-8")
    assert not set("<>\"'") & set(safe)
    back = re.sub("⟨([0-9A-F]{4,6})⟩", lambda code: chr(int(code[1], 16)), html.unescape(safe))
    assert back == re.sub(
        "⟨([0-9A-F]{4,6})⟩", lambda code: chr(int(code[1], 16)), value.replace("\r\n", "\n")
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 90])
@pytest.mark.parametrize("evals", [True, False])
def test_any_length_of_run(tmp_path, steps, evals):
    page = Page(report(make_run(tmp_path / "run", steps=steps, evals=evals)))
    check_safe(page)
    assert f"{steps} steps" in page.words
    assert ("1x" in page.words) == evals
    assert ("There is no evals.jsonl" in page.words) == (not evals)
    assert ("Write a story about a shy duck" in page.words) == (evals or steps > 0)
    assert page.words.count("Nothing is recorded.") == (not evals) + 2 * (steps == 0)


def test_before_and_after_are_the_numbers_of_the_file(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    rows = [json.loads(line) for line in open(run / "evals.jsonl")]
    page = Page(report(run))
    for first, last in zip(rows[:3], rows[3:], strict=True):
        for key, digits, scale in ("sq", 1, 100), ("length_ratio", 2, 1), ("reward", 2, 1):
            cells = [f"{row[key] * scale:.{digits}f}".replace("-", "−") for row in (first, last)]
            assert f"<td><em>{cells[0]} →</em> {cells[1]}" in page.source
    stories = [json.loads(line) for line in open(run / "eval_stories.jsonl")]
    shown = [story for story in stories if story["uid"] in ("test0", "test1")]
    assert page.source.count("<article>") == len(shown) == 12
    for story in shown:
        assert all(part in page.words for part in story["story"].split("\n\n"))
        assert (
            f"Story Quality {round(100 * story['verdict']['score'])} points".replace("-", "−")
            in page.words
        )
    for dimension in judge.RUBRIC:
        assert f"<b>{dimension.key}</b> {text(dimension.name)}" in page.source
    write(run / "evals.jsonl", rows[:3])
    assert "before → no later evaluation" in Page(report(run)).words


def test_rows_without_reward_and_numbers_that_are_none(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    metrics = [json.loads(line) for line in open(run / "metrics.jsonl")]
    for name in (
        "reward_mean",
        "sq",
        "rep",
        "len",
        "blank",
        "think",
        "overlong",
        "length_error",
        "words",
        "finished",
    ):
        metrics[1][name] = None  # a step where no row was judged
    metrics[2] |= {
        "loss": math.nan,
        "grad_norm": math.inf,
        "entropy": math.nan,
        "anchor_advantage": None,
    }
    write(run / "metrics.jsonl", metrics)
    stories = [json.loads(line) for line in open(run / "eval_stories.jsonl")]
    for story in stories[::2]:
        story["reward"] = None
        story["verdict"] |= {
            "score": None,
            "dimensions": {},
            "quote_accuracy": None,
            "error": "time-out <b>",
        }
    stories[1] |= {"story": "", "words": 0}
    write(run / "eval_stories.jsonl", stories)
    evals = [
        json.loads(line) | dict.fromkeys(("reward", "sq", "length_error"))
        for line in open(run / "evals.jsonl")
    ]
    write(run / "evals.jsonl", evals)
    page = Page(report(run))
    check_safe(page)
    assert (
        "No verdict. time-out <b>" in page.words
        and "(no words)" in page.words
        and "Reward –" in page.words
    )
    assert "nan" not in page.words and not re.search(
        r"(cx|cy|d|x|y)='?[^' >]*(nan|inf)", page.source
    )


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "evals.jsonl", "eval_stories.jsonl", "rollouts.jsonl"]
)
def test_a_half_written_last_line_is_left_out(tmp_path, name):
    run = make_run(tmp_path / "run", steps=3, evals=name != "rollouts.jsonl")
    whole = Page(report(run))
    data = (run / name).read_bytes()
    cut = json.dumps({"step": 4, "label": "é" * 9}, ensure_ascii=False).encode()[:29]
    with pytest.raises(UnicodeDecodeError):
        cut.decode()  # the kill fell inside a character
    (run / name).write_bytes(data + cut)
    page = Page(report(run))
    note = f"{name} ends in a half-written line, as a killed run leaves it; that line is left out."
    assert page.words.count(note) == 1 and page.words.replace(note, "") == whole.words
    (run / name).write_bytes(cut + b"\n" + data)  # anywhere else it is damage
    with pytest.raises(RecordError, match=f"{name}:1: not a line of JSON"):
        report(run)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        RecordError, match="holds no config.json; give the folder that polaris.py wrote"
    ):
        report(tmp_path)


NUMBERS = st.none() | st.just(math.nan) | st.floats(-1e9, 1e9)


@FAST
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40), st.integers(1, 500))
def test_charts_stay_inside_their_frame(values, start):
    rows = [{"step": start + i, "a": a, "b": b} for i, (a, b) in enumerate(values)]
    parts = PAGES.get_template("parts.html").module
    drawn = str(parts.figure("A", "unit", rows, {"a": "a", "b": "b"}))
    points = [(float(x), float(y)) for x, y in re.findall(r"circle cx=(\S+) cy=(\S+) ", drawn)]
    for path in re.findall('<path d="([^"]*)" class="curve', drawn):
        points += [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([^ML]+)", path)]
    assert all(43.9 <= x <= 350.1 and 21.9 <= y <= 174.1 for x, y in points)
    assert drawn.count("class=hover") == len(rows)


@FAST
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_are_round_and_cover(a, b):
    low, high = sorted((a, b))
    found = ticks(low, high)
    step = found[1] - found[0]
    assert (
        found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step and 2 <= len(found) <= 7
    )
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


# ------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path):
    done = run_eval("report", str(make_run(tmp_path / "run", steps=1)))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "run" / "report.html"))
    failed = run_eval("report", str(tmp_path))
    assert (
        failed.returncode == 2
        and failed.stderr.startswith("eval.py: ")
        and "Traceback" not in failed.stderr
    )
    loaded = "import eval, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert (
        subprocess.run([sys.executable, "-c", loaded], cwd=ROOT).returncode == 0
    )  # reports start at once


def test_scoring_ends_with_what_happened(tmp_path, capsys):
    """0: judged; 2: nothing was asked; 3: the judge failed, or judged too little."""
    rows = [make_row(random.Random(i), 0.5, 1500, 1.0) | {"uid": str(i)} for i in range(4)]
    file = tmp_path / "s.jsonl"
    write(file, rows)
    judge_options = ("--judge-model", "offline", "--judge-price-in", "100", "--judge-retries", "0")
    for faults, status in (("", 0), ("500:1", 3), ("404:1", 3)):
        for cache in tmp_path.glob("*.judge.jsonl"):
            cache.unlink()
        process, url = judge.start_stand_in(faults=faults)
        try:
            ended = evaluation.main(["score", str(file), "--judge-url", url, *judge_options])
        finally:
            process.stdin.close()
            process.wait(10)
        assert ended == status
        shown = capsys.readouterr().out
        if faults != "404:1":
            assert f"judged {0 if faults else 4}/4 stories: 4 judgements, $" in shown
            assert ("$0.00" in shown) == bool(faults)  # a price that reached the client
    url = ("--judge-url", "http://127.0.0.1:9/v1")
    write(tmp_path / "zero.jsonl", [rows[0] | {"target_words": 0}])
    refused = {
        ("score", file): "needs --judge-url and --judge-model",
        ("score", tmp_path / "none.jsonl", *url, *judge_options): "none.jsonl",
        ("score", tmp_path / "zero.jsonl", *url, *judge_options): "target_words is 0",
        ("score", file, *url, *judge_options, "--judge-extra", "[]"): "extra",
        ("story", tmp_path / "none", "A fable"): "none: there is no such folder",
        ("stories", tmp_path, "--prompts", "p", "--out", "o"): "",
    }
    for command, message in refused.items():
        assert evaluation.main([*map(str, command)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("eval.py: ") and message in line
