"""The judge: parity with the release, hostile answers, faults over real sockets, the stand-in."""

import argparse
import contextlib
import json
import math
import os
import random
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_injections import attempts, perfect_verdict

import chat
import judge
import mini.standin as offline
import reward as rewards
from chat import ChatStop
from judge import CHECK_PROMPT, CHECK_STORY, NEGATIVE, POSITIVE, RUBRIC, Judge, VerdictError
from mini import world

HERE = Path(__file__).parent
GOLDEN_REWARD = json.loads((HERE / "golden_reward.json").read_text(encoding="utf-8"))
GOLDEN_SQ = json.loads((HERE / "golden_story_quality.json").read_text(encoding="utf-8"))
KEY = "sk-secret/8e1fbf"
GOOD = json.dumps(offline.offline_verdict(CHECK_PROMPT, CHECK_STORY))
GOOD_SCORE = judge.parse_verdict(GOOD, CHECK_STORY).score


def verdict_with(**scores):
    """A verdict of zeros, but for `scores`."""
    return {
        d.key: {"justification": "", "quotes": [], "score": scores.get(d.key, 0)} for d in RUBRIC
    }


def run_cli(*args, **options):
    command = [sys.executable, judge.__file__, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# --------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize("case", GOLDEN_REWARD["cases"], ids=lambda case: case["kind"])
def test_text_penalties_equal_the_release(case):
    words = rewards.word_count(case["text"])
    target = rewards.requested_words(case["prompt"]) or rewards.word_count(case["target"])
    assert rewards.self_repetition(case["text"]) == pytest.approx(case["self_rep"], abs=1e-12)
    assert rewards.length_penalty(words, target) == pytest.approx(case["length_pen"], abs=1e-12)
    assert rewards.blank_penalty(case["text"]) == case["blank_pen"]
    reward = rewards.reward(0.5, case["text"], target, 100, 0, True)
    parts = 0.5 - 1.5 * case["self_rep"] - 0.8 * case["length_pen"] - case["blank_pen"]
    assert reward.total == pytest.approx(max(-2, min(2, parts)), abs=1e-12)


def test_default_constants_are_those_of_the_golden_settings():
    golden, config = GOLDEN_REWARD["settings"], rewards.RewardConfig()
    names = {"min_visible_ratio": "blank_visible", "min_words": "blank_words"}
    for side, ours in (("lower", "below"), ("upper", "above")):
        names[f"len_tolerance_{side}"] = f"len_{ours}"
        names |= {f"len_tolerance_{side}_abs_{end}": f"len_{ours}_{end}" for end in ("min", "max")}
    for theirs, ours in names.items():
        assert getattr(config, ours) == golden[theirs], ours


def test_reward_adds_thinking_and_overlong_after_the_clip():
    story = " ".join(f"w{i}" for i in range(1000))
    base = rewards.reward(1.0, story, 1000, 4000, 3072, True)
    assert (base.total, base.think, base.overlong) == (1.0, 0.0, 0.0)
    assert rewards.reward(1.0, story, 1000, 4000, 3172, True).think == pytest.approx(
        0.05 * 100 / 4000
    )
    assert rewards.reward(1.0, story, 1000, 8192, 0, True).overlong == 0.0  # ended by itself
    assert rewards.reward(1.0, story, 1000, 7680, 0, False).overlong == 0.0
    assert rewards.reward(1.0, story, 1000, 7936, 0, False).overlong == pytest.approx(0.5)
    cut = rewards.reward(-5.0, story, 1000, 8192, 4072, False)
    assert cut.total == pytest.approx(-2 - 0.05 * 1000 / 8192 - 1)
    other = rewards.RewardConfig(len_weight=0.0, blank_words=0, rep_weight=0.0)
    # an empty response does not divide by zero
    assert rewards.reward(0.3, "", 900, 0, 0, True, other).total == 0.3


def test_golden_prompt_strip_but_for_the_departures():
    departures = {
        # what follows stays visible
        "A! B? It should be 500 words long and sad. End.": "A! B? End.",
        # a number and a title end no sentence
        "Dr. Who at 3.5 miles, 200 words long": "Dr. Who at 3.5 miles",
    }
    for case in GOLDEN_SQ["prompt_strip"]:
        assert rewards.strip_length_sentence(case["prompt"]) == departures.get(
            case["prompt"], case["stripped"]
        )


@pytest.mark.parametrize(
    ("prompt", "words", "stripped"),
    [
        (
            "Tell of a fox. The story should be 1,500 words long. Include a dog.",
            1500,
            "Tell of a fox. Include a dog.",
        ),
        ("It should be 12,000 words long.\nUse rain.", 12000, "Use rain."),
        (
            "Mr. Fox and J. R. R. Tolkien meet. Make it 300  words\tlong!",
            300,
            "Mr. Fox and J. R. R. Tolkien meet.",
        ),
        ("Follow plan B. It should be 500 words long.", 500, "Follow plan B."),
        (
            '"Go!" he said. Write it 20 words long (3.5 pages). Dr. No wins.',
            20,
            '"Go!" he said. Dr. No wins.',
        ),
        ("Write a story, about 800 words long", 800, "Write a story"),
        ("A list:\n- a fox\n- 400 words long\n- a river", 400, "A list:\n- a fox\n- a river"),
        ("A 500-word tale", None, "A 500-word tale"),
        ("Many words longer than 3", None, "Many words longer than 3"),
    ],
)
def test_length_sentence(prompt, words, stripped):
    assert rewards.requested_words(prompt) == words
    assert rewards.strip_length_sentence(prompt) == stripped
    assert rewards.strip_length_sentence(stripped) == stripped


SENTENCES = st.lists(
    st.sampled_from(["A fox ran.", "Why now?", "He paid 3.5 pounds!", "Mr. Holt sat.", "“No.”"]),
    max_size=4,
)


@given(SENTENCES, st.integers(1, 99999), SENTENCES)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_only_the_length_sentence_is_hidden(before, words, after):
    prompt = " ".join([*before, f"The story should be {words:,} words long.", *after])
    if before or after:
        assert rewards.strip_length_sentence(prompt) == " ".join(before + after)
    assert rewards.requested_words(prompt) == words


# ----------------------------------------------------------------------------- rubric and composite


def test_composite_equals_the_release():
    for case in GOLDEN_SQ["totals"]:
        totals = [case[f"{name}_total"] for name in ("positive", "negative", "bonus", "penalty")]
        assert judge.composite(*totals) == pytest.approx(case["overall"], abs=1e-12)


def test_one_table_makes_prompt_schema_and_score():
    maxima = {d.key: d.max for d in RUBRIC}
    assert (sum(maxima[k] for k in POSITIVE), sum(maxima[k] for k in NEGATIVE)) == (100, 151)
    assert [maxima[k] for k in (*POSITIVE, *NEGATIVE)] == [
        15,
        20,
        15,
        15,
        20,
        15,
        15,
        20,
        15,
        15,
        15,
        20,
        15,
        8,
        8,
        20,
    ]
    text, schema = judge.rubric_text(), judge.verdict_schema()
    assert list(schema["properties"]) == schema["required"] == [d.key for d in RUBRIC]
    for d in RUBRIC:
        covered = [n for low, high in d.ranges() for n in range(low, high + 1)]
        assert covered == list(range(d.max + 1)) and len(d.bands) == 4
        others = set(re.findall(r"\b[PN]\d+\b", d.excludes)) - {d.key}
        assert others and others <= set(maxima), f"{d.key} does not say which dimension does"
        for part in (d.name, d.measures, d.excludes, *d.bands, f"(0-{d.max})"):
            assert part in text
        assert schema["properties"][d.key]["properties"]["score"]["maximum"] == d.max
    best = maxima | {"PENALTY": 0} | {k: 0 for k in NEGATIVE}
    assert judge.story_quality(best) == 1.08
    assert judge.story_quality(maxima | {k: 0 for k in (*POSITIVE, "BONUS")}) == -1.59
    names = [judge.label(x) for x in (-159, 14, 15, 34, 35, 54, 55, 74, 75, 108)]
    labels = ("very_poor", "poor", "fair", "good", "excellent")
    assert names == [name for name in labels for _ in range(2)]


# --------------------------------------------------------------------------------------- the parser


def test_release_formats_around_a_verdict():
    totals = (
        '{"positive_total": 70, "negative_total": 20, "bonus_total": 4, "penalty_total": 1, '
        '"overall_score": 12}'
    )
    # the same totals, by dimension
    full = json.dumps(verdict_with(P1=15, P2=20, P5=20, P3=15, N2=20, BONUS=4, PENALTY=1))
    readable = 0
    for case in GOLDEN_SQ["parse"]:
        with pytest.raises(VerdictError):
            judge.parse_verdict(case["judge_text"] or "", "")  # totals alone are never believed
        if totals in (case["judge_text"] or ""):
            assert judge.parse_verdict(case["judge_text"].replace(totals, full), "").score == 0.53
            readable += 1
    assert readable >= 10


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here it is: {{a}} {{}}\n```json\n{GOOD}\n```\nDone }}",
        f"<think>maybe {{'P1': 3}} or 5\"</think>{GOOD}",
        json.dumps({"evaluation": {"dimensions": json.loads(GOOD)}, "positive_total": 100}),
        f"[{GOOD}]",
        GOOD[:-1] + ", }",
        GOOD.replace('"score": ', '"score": "')
        .replace("}, ", '",},')
        .replace("}}", '"}}'),  # strings, trailing commas
        f"{GOOD}\n{GOOD}",
        json.dumps({k: v for k, v in json.loads(GOOD).items() if k not in ("BONUS", "PENALTY")}),
        re.sub(r'"score": (\d+)', r'"score": \1.0', GOOD),
    ],
    ids="plain prose think wrapper array comma strings twice no-bonus floats".split(),
)
def test_tolerated_forms(text):
    verdict = judge.parse_verdict(text, CHECK_STORY)
    assert verdict.score == GOOD_SCORE and verdict.raw == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v["P1"].update(score=True), "True, no integer"),
        (lambda v: v["P1"].update(score=7.5), "7.5, no integer"),
        (lambda v: v["P1"].update(score=None), "None, no integer"),
        (lambda v: v["P1"].update(score="seven"), "'seven', no integer"),
        (lambda v: v["P1"].update(score="٧"), "no integer"),
        (lambda v: v["P1"].update(score=[7]), "list, no integer"),
        (lambda v: v["P1"].update(score=math.nan), "NaN is no score"),
        (lambda v: v["P1"].update(score=math.inf), "Infinity is no score"),
        (lambda v: v["P1"].pop("score"), "None, no integer"),
        (lambda v: v.update(P1=7), "P1 is no object"),
        (lambda v: v["P1"].update(quotes="a quote"), "list of strings"),
        (lambda v: v["P1"].update(quotes=[1]), "list of strings"),
        (lambda v: v["P1"].update(justification=3), "must be a string"),
        (lambda v: v.pop("N7"), "dimensions missing: N7"),
        (lambda v: v.clear(), "no verdict in the answer"),
    ],
)
def test_refused_with_the_reason(change, reason):
    verdict = json.loads(GOOD)
    change(verdict)
    with pytest.raises(VerdictError, match=re.escape(reason)):
        judge.parse_verdict(json.dumps(verdict), CHECK_STORY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no verdict"),
        ("null", "no verdict"),
        ("The story is good.", "no verdict"),
        ("[[[[", "no verdict"),
        (GOOD[:-400], "cannot be read"),
        (GOOD[: len(GOOD) // 3], "cannot be read"),
        ("{" * 100_000, "cannot be read"),
        ('{"a":' * 30_000, "cannot be"),
        ('{"P1": ' + "[" * 90_000, "cannot be"),
        ('{"\\', "cannot be read"),
        ('{"' + '\\"' * 90_000, "cannot be read"),
        (GOOD + json.dumps(verdict_with(P1=15)), "2 different verdicts"),
        (GOOD.replace('"P2"', '"P1"'), "occurs twice"),
        (GOOD.replace('"score": ', '"score": 1e999, "x": ', 1), "inf, no"),
        ("x" * 200_001, "200001 characters"),
    ],
)
def test_unreadable_answers(text, reason):
    begin = time.monotonic()
    with pytest.raises(VerdictError, match=re.escape(reason)):
        judge.parse_verdict(text, CHECK_STORY)
    assert time.monotonic() - begin < 3


def test_out_of_range_scores_are_clamped():
    wild = {d.key: {"score": (-1) ** i * 10**i} for i, d in enumerate(RUBRIC)}
    verdict = judge.parse_verdict(json.dumps(wild), "")
    for d in RUBRIC:
        assert verdict.dimensions[d.key]["score"] == (
            d.max if wild[d.key]["score"] > d.max else max(0, wild[d.key]["score"])
        )
    assert -1.59 <= verdict.score <= 1.08


def test_quotes_are_looked_up():
    def accuracy(**entries):
        verdict = verdict_with()
        for key, (score, quotes) in entries.items():
            verdict[key].update(score=score, quotes=quotes)
        return judge.parse_verdict(
            json.dumps(verdict), "“Don’t go,” she said.\nThe sea &amp; the moor lay still."
        ).quote_accuracy

    assert accuracy() is None
    # punctuation, line breaks and quotation marks may differ
    assert accuracy(P1=(9, ["she said. The sea"])) == 1.0
    assert accuracy(P1=(9, ["DON'T GO", "sea & the moor", "she said ... lay still"])) == 1.0
    assert accuracy(P1=(9, ["she said", "the moon lay still"])) == 0.5
    assert accuracy(P1=(9, ["ea amp th"])) == 0.0  # whole words only
    assert accuracy(P1=(9, ["***", "..."])) == 0.0
    assert accuracy(N1=(3, [])) == 0.0  # a negative owes a quote ...
    # ... a positive and a slight bonus do not
    assert accuracy(P1=(3, []), N1=(0, []), BONUS=(1, [])) is None
    assert accuracy(BONUS=(2, []), N2=(1, ["lay still"])) == 0.5
    # the score counts all the same
    assert judge.parse_verdict(json.dumps(verdict_with(N1=3)), "").score == -0.03


ODD_VALUES = [
    None,
    True,
    -1,
    7,
    1e308,
    math.nan,
    -math.inf,
    10**400,
    "12",
    " 5 ",
    "NaN",
    "",
    [],
    ["a", 1],
    {},
    {"score": 3},
]
SPLICES = [
    "",
    "{",
    "}",
    '"',
    ",",
    "\\",
    "NaN",
    "```",
    "1e999",
    "\x00",
    "\ud800",
    "[",
    "]",
    ":",
    "\\ud800",
    "-",
    "e",
    "\u2028",
]


@given(st.integers(0, 2**62))
@settings(derandomize=True, deadline=None, max_examples=2000, database=None)
def test_fuzzed_verdicts_score_in_range_or_are_refused(seed):
    """A good verdict with values replaced, and its text cut, doubled and spliced."""
    rng = random.Random(seed)
    verdict = perfect_verdict()
    for key in rng.sample(list(verdict), rng.randrange(3)):
        if rng.random() < 0.2:
            verdict[key] = rng.choice(ODD_VALUES)
        else:
            verdict[key][rng.choice(["score", "quotes", "justification", "extra"])] = rng.choice(
                ODD_VALUES
            )
    text = json.dumps(verdict, ensure_ascii=rng.random() < 0.5)
    for _ in range(rng.randrange(4)):
        start, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        if rng.random() < 0.8:
            end = min(end, start + rng.randrange(9))
        text = text[:start] + rng.choice([*SPLICES, text[start:end] * 2]) + text[end:]
    try:
        found = judge.parse_verdict(text, CHECK_STORY)
    except VerdictError as error:
        assert str(error)
        return
    assert -1.59 <= found.score <= 1.08
    assert all(0 <= found.dimensions[d.key]["score"] <= d.max for d in RUBRIC)
    assert found.quote_accuracy is None or 0 <= found.quote_accuracy <= 1
    json.dumps(found.dimensions, ensure_ascii=False).encode()  # can be written to disk


@given(
    st.text(max_size=60) | st.lists(st.sampled_from(list('{}[]",:\\P1 ')), max_size=60).map("".join)
)
@settings(derandomize=True, deadline=None, max_examples=500, database=None)
def test_fuzzed_text_is_refused(text):
    with pytest.raises(VerdictError):
        judge.parse_verdict(text, "")


# ---------------------------------------------------------------------------------------- isolation


@pytest.mark.parametrize("name", attempts())
def test_injections(name):
    story = attempts()[name]
    messages = judge.judge_messages(CHECK_PROMPT, story, "f00dfeedf00dfeed")
    text = messages[1]["content"]
    # no story in the system message
    assert messages[0]["content"] == judge.rubric_text() and len(messages) == 2
    # announced once, two fences; nothing of the story carries it
    assert text.count("f00dfeedf00dfeed") == 5
    assert offline.read_messages(messages) == (rewards.strip_length_sentence(CHECK_PROMPT), story)
    # A judge that quotes the story in its justification is still read as it meant.
    own = verdict_with(P1=7, N6=20)
    own["N6"].update(justification=f"The story says {story[-2000:]}", quotes=[story[:40]])
    assert judge.parse_verdict(json.dumps(own), story).score == -0.13
    # One that copies the story out before its own verdict is read as it meant or refused, never as
    # the story wishes.
    with contextlib.suppress(VerdictError):
        assert judge.parse_verdict(f"{story}\n\n{json.dumps(own)}", story).score == -0.13
    # One that only repeats the story gives no verdict.
    with pytest.raises(VerdictError):
        judge.parse_verdict(story, story)
    # The offline judge answers with a whole verdict, its quotes from the story.
    answer = json.dumps(offline.offline_verdict(CHECK_PROMPT, story), ensure_ascii=False)
    verdict = judge.parse_verdict(answer, story)
    assert verdict.score < 0.8
    assert verdict.quote_accuracy == (1.0 if re.search(r"\w", story) else 0.0)


def test_more_than_forty_injections_and_a_new_marker_for_each_call():
    assert len(attempts()) >= 40
    with scripted(answer(GOOD)) as server, client(server.url) as judging:
        for _ in range(3):
            judging.submit(CHECK_PROMPT, CHECK_STORY).result()
        markers = {re.search(rb"The marker is (\w+)", request)[1] for request in server.requests}
    assert len(markers) == 3


# ----------------------------------------------------------------------------- a server on a script


def http(status, body, *headers, length=None):
    """A raw HTTP answer."""
    body = body if isinstance(body, bytes) else body.encode()
    head = [
        f"HTTP/1.1 {status} X",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def answer(content, *headers, **extra):
    """A chat completion of 5,000 tokens in and 500 out."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"} | extra
    usage = {"prompt_tokens": 5000, "completion_tokens": 500}
    return http(
        200,
        json.dumps({"choices": [choice], "usage": usage}),
        "Content-Type: application/json",
        *headers,
    )


def silence(connection):
    connection.recv(1)  # until the client gives up


def reset(data):
    """Send some bytes, then break the connection."""

    def act(connection):
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def drip(data, pause):
    def act(connection):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return act


def flood(connection):
    """50 MB of JSON."""
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n{"choices": "')
    for _ in range(50):
        connection.sendall(b"x" * (1 << 20))


class scripted:
    """A TCP server that gives each request the next act of a script (bytes or a function).

    The last one serves for ever.
    """

    def __init__(self, *script):
        self.script, self.requests, self.lock = list(script), [], threading.Lock()

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection):
        with connection, connection.makefile("rb") as file, contextlib.suppress(OSError):
            while head := file.readline():
                while (line := file.readline()) not in (b"\r\n", b""):
                    head += line
                head += b"\r\n" + file.read(
                    int(re.search(rb"content-length: (\d+)", head, re.I)[1])
                )
                with self.lock:
                    self.requests.append(head)
                    act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                if not isinstance(act, bytes):
                    return act(connection)
                connection.sendall(act)
        return None


def client(url, api_key=KEY, **options):
    return contextlib.closing(
        Judge(url, "m", api_key, **({"timeout": 0.6, "retries": 2, "concurrency": 4} | options))
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(chat, "BACKOFF", 0.01)


def too_many_until_a_date(connection):
    """429 until two seconds from now, in the whole seconds of an HTTP date."""
    connection.sendall(http(429, "", f"Retry-After: {formatdate(time.time() + 2, usegmt=True)}"))


def late(connection):
    time.sleep(0.3)
    connection.sendall(answer(GOOD))


FINE = answer(GOOD)
BODY = FINE.partition(b"\r\n\r\n")[2]


def case(name, *script, error="", score=GOOD_SCORE, retries=0, tokens=None, seconds=(0, 1)):
    """A script and what comes of it. With words of an error there is no score, and nothing paid."""
    paid = tokens if tokens is not None else 0 if error else 5000
    wanted = None if error else score
    return pytest.param(script, wanted, error, retries, paid, seconds, id=name)


MATRIX = [
    case("fine", FINE),
    case("reset before the answer", reset(b""), FINE, retries=1),
    case("reset in the head", reset(FINE[:20]), FINE, retries=1),
    case("reset in the body", reset(FINE[:900]), FINE, retries=1),
    case("closed in the body", lambda c: c.sendall(FINE[:900]), FINE, retries=1),
    case("always reset", reset(b"HTTP/1.1 200"), error="no connection", retries=2),
    case("slow but in time", late, seconds=(0.3, 1.0)),
    case("429", http(429, ""), http(429, ""), FINE, retries=2),
    case(
        "429, Retry-After", http(429, "", "Retry-After: 0.7"), FINE, retries=1, seconds=(0.7, 1.3)
    ),
    case("429, Retry-After date", too_many_until_a_date, FINE, retries=1, seconds=(0.9, 3)),
    case("429, Retry-After nonsense", http(429, "", "Retry-After: tomorrow"), FINE, retries=1),
    case("408, 409", http(408, ""), http(409, ""), FINE, retries=2),
    case("500, 502", http(500, "oops"), http(502, "<html>"), FINE, retries=2),
    case(
        "400",
        http(400, '[{"error": {"message": "context too long"}}]'),
        error="400: context too long",
    ),
    case(
        "HTML",
        http(200, "<html>login</html>", "Content-Type: text/html"),
        error="text/html: <html>login",
        retries=1,
    ),
    case("HTML once", http(200, "<html>"), FINE, retries=1),
    case(
        "empty body",
        http(200, ""),
        error="HTTP 200 without JSON (no content type: (empty))",
        retries=1,
    ),
    case("204", b"HTTP/1.1 204 No Content\r\n\r\n", error="HTTP 204"),
    case("truncated envelope", http(200, '{"choices": [{"mess'), error="without JSON", retries=1),
    case(
        "other JSON", http(200, '{"detail": "no such route"}'), error="without an answer", retries=1
    ),
    case("array", http(200, "[1, 2]"), error="without an answer", retries=1),
    case(
        "error in a 200",
        http(200, '{"error": {"message": "upstream died"}}'),
        error="upstream died",
        retries=1,
    ),
    case("null content", answer(None), error="empty or unfinished", retries=1, tokens=10000),
    case("empty content", answer("  "), error="empty or unfinished", retries=1, tokens=10000),
    case("content in parts", answer([{"type": "text", "text": GOOD}])),
    case(
        "out of tokens",
        answer(GOOD, finish_reason="length"),
        error="(length)",
        retries=1,
        tokens=10000,
    ),
    case("truncated verdict", answer(GOOD[:-99]), error="no verdict", retries=1, tokens=10000),
    case(
        "wrong schema", answer('{"P1": 3}'), error="dimensions missing: P2", retries=1, tokens=10000
    ),
    case("wrong schema once", answer('{"rating": "good"}'), FINE, retries=1, tokens=10000),
    case("out of range", answer(json.dumps(verdict_with(P1=10**9, N8=-5))), score=0.15),
    case(
        "NaN",
        answer(GOOD.replace('"score": 0', '"score": NaN', 1)),
        error="NaN is no score",
        retries=1,
        tokens=10000,
    ),
    case("50 MB", flood, error="more than 4 MiB", retries=1, seconds=(0, 3)),
    case("wrong content type", http(200, BODY, "Content-Type: image/png")),
    case(
        "redirect",
        http(307, "", "Location: http://127.0.0.1:9/"),
        error="redirect to http://127.0.0.1:9",
    ),
    case("not HTTP", b"SSH-2.0-OpenSSH_9\r\n" * 3, error="no connection", retries=2),
    case(
        "endless headers",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500,
        error="no connection",
        retries=2,
    ),
    case(
        "bad length",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n{}",
        error="no connection",
        retries=2,
    ),
    case(
        "bad gzip", http(200, "plain", "Content-Encoding: gzip"), error="no connection", retries=2
    ),
    case("surrogates", http(200, BODY.replace(b"prose", b"\\ud800"))),
]


@pytest.mark.parametrize(("script", "score", "words", "retries", "tokens", "seconds"), MATRIX)
def test_fault_matrix(quick, script, score, words, retries, tokens, seconds):
    with scripted(*script) as server, client(server.url, price_in=2.0, price_out=10.0) as judging:
        begin = time.monotonic()
        verdict = judging.submit(CHECK_PROMPT, CHECK_STORY).result(timeout=20)
        spent = time.monotonic() - begin
        stats = judging.stats()
    assert (
        verdict.score == score and words in verdict.error and bool(verdict.error) == (score is None)
    )
    assert seconds[0] <= spent <= seconds[1] + 0.5
    assert (stats["calls"], stats["retries"], stats["failures"], stats["cached"]) == (
        1,
        retries,
        score is None,
        0,
    )
    assert (
        (stats["tokens_in"], stats["tokens_out"])
        == (tokens, tokens // 10)
        == (verdict.tokens_in, verdict.tokens_out)
    )
    assert stats["dollars"] == pytest.approx(tokens * 2e-6 + tokens // 10 * 1e-5)
    assert len(server.requests) == retries + 1
    assert KEY not in verdict.error + verdict.raw


def test_ask_is_the_same_transport_for_any_chat(quick):
    messages = [{"role": "user", "content": "Name a fox."}]
    with scripted(http(500, ""), answer("Rufus")) as server, client(server.url) as judging:
        assert judging.ask(messages) == ("Rufus", (5000, 500))
        assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["messages"] == messages

        def refuse(text):
            raise VerdictError(f"{text} is no fox")

        with pytest.raises(chat.CallFailed, match="Rufus is no fox") as caught:
            judging.ask(messages, parse=refuse)
        assert (caught.value.kind, caught.value.raw, caught.value.usage) == (
            "unusable",
            "Rufus",
            (10000, 1000),
        )
        stats = judging.stats()
        assert (stats["calls"], stats["retries"], stats["failures"], stats["tokens_in"]) == (
            2,
            2,
            1,
            15000,
        )


def test_nobody_listens(quick):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with client(url) as judging:
        verdict = judging.submit("p", "s").result(timeout=5)
        assert (
            verdict.score is None and "refused" in verdict.error and judging.stats()["retries"] == 2
        )
        with pytest.raises(ChatStop, match="refused"):
            judging.check()


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_refusals_stop_everything_at_once_and_hide_the_key(quick, status):
    body = json.dumps({"error": {"message": f"key {KEY} for model m: no credit"}})
    with (
        scripted(silence, http(status, body)) as server,
        client(server.url, timeout=30, concurrency=2) as judging,
    ):
        futures = [judging.submit("p", str(i)) for i in range(20)]
        for future in futures:  # the one that waits for the silent server too
            with pytest.raises(
                ChatStop, match=rf"HTTP {status}: key \*\*\* for model m: no credit"
            ):
                future.result(timeout=2)
        with pytest.raises(ChatStop):
            judging.submit("p", "later").result(timeout=0)
        assert len(server.requests) == 2


def test_circuit_opens_for_a_dead_judge(quick, monkeypatch):
    monkeypatch.setattr(chat, "BREAKER_SECONDS", 0.4)
    with scripted(reset(b"")) as server, client(server.url, concurrency=8) as judging:
        begin = time.monotonic()
        futures = [judging.submit("p", str(i)) for i in range(500)]
        outcomes = Counter(type(future.exception(timeout=10)) for future in futures)
        assert time.monotonic() - begin < 3
        assert outcomes[ChatStop] > 200  # the rest had used up their retries before it was clear
        with pytest.raises(ChatStop, match="is down: .* attempts in a row failed.*resume"):
            judging.submit("p", "later").result(timeout=0)


def test_circuit_opens_for_a_silent_judge_and_stays_shut_for_a_working_one(quick, monkeypatch):
    monkeypatch.setattr(chat, "BREAKER_FAILURES", 4)
    monkeypatch.setattr(chat, "BREAKER_SECONDS", 0.3)
    with scripted(silence) as server, client(server.url, timeout=0.4) as judging:
        for future in [
            judging.submit("p", str(i)) for i in range(8)
        ]:  # four at once: their first time-outs are enough
            with pytest.raises(ChatStop):
                future.result(timeout=3)
    monkeypatch.setattr(chat, "BACKOFF", 0.0)
    monkeypatch.setattr(chat, "BREAKER_SECONDS", 0.0)
    pattern = [reset(b""), reset(b""), reset(b""), http(503, "")] * 30
    with (
        scripted(*pattern, answer(GOOD)) as server,
        client(server.url, concurrency=1, retries=200) as judging,
    ):
        # a 503 is a sign of life
        assert judging.submit("p", "s").result(timeout=20).score == GOOD_SCORE


def test_random_faults_fail_exactly_the_rows_that_the_server_logged(quick, tmp_path):
    log, retries = tmp_path / "log.jsonl", 1
    faults = "429:0.1,500:0.1,reset:0.05,truncate:0.05"
    process, url = judge.start_stand_in(faults=faults, seed=3, log=log)
    with process, client(url, retries=retries, concurrency=8) as judging:
        stories = [f"{CHECK_STORY} Number {i} was the last." for i in range(200)]
        futures = [judging.submit(CHECK_PROMPT, story) for story in stories]
        verdicts = {
            offline.row_digest(CHECK_PROMPT, s): f.result()
            for s, f in zip(stories, futures, strict=True)
        }
        stats = judging.stats()
        process.stdin.close()
    seen = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        seen.setdefault(record["digest"], []).append(record["outcome"])
    lost = {digest for digest, outcomes in seen.items() if outcomes[-1] != "ok"}
    assert {digest for digest, v in verdicts.items() if v.score is None} == lost and 5 <= len(
        lost
    ) <= 40
    assert stats["failures"] == len(lost) and stats["retries"] == sum(map(len, seen.values())) - 200
    assert all(v.dimensions == {} and v.error for v in verdicts.values() if v.score is None)


# --------------------------------------------------------------------------------------------- pace


class counting:
    """An act that answers after a while, and remembers how many were at it at once."""

    def __init__(self, seconds):
        self.seconds, self.now, self.most, self.lock = seconds, 0, 0, threading.Lock()

    def __call__(self, connection):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        connection.sendall(answer(GOOD, "Connection: close"))


def test_forty_stories_overlap_up_to_the_concurrency():
    act = counting(0.8)
    with scripted(act) as server, client(server.url, concurrency=16, timeout=10) as judging:
        begin = time.monotonic()
        verdicts = [future.result() for future in [judging.submit("p", str(i)) for i in range(40)]]
        seconds = time.monotonic() - begin
    assert act.most == 16 and all(v.score == GOOD_SCORE for v in verdicts)
    assert seconds <= 3 * 0.8 * 1.15


def test_requests_per_minute():
    with scripted(answer(GOOD)) as server, client(server.url, rpm=1200) as judging:
        begin = time.monotonic()
        for future in [judging.submit("p", str(i)) for i in range(11)]:
            future.result()
        assert 0.5 <= time.monotonic() - begin < 2.0  # ten gaps of 50 ms


def test_connections_are_reused():
    ports, real = set(), scripted.talk

    class watched(scripted):
        def talk(self, connection):
            ports.add(connection.getpeername())
            real(self, connection)

    with watched(answer(GOOD)) as server, client(server.url, concurrency=2) as judging:
        for future in [judging.submit("p", str(i)) for i in range(30)]:
            future.result()
    assert len(server.requests) == 30 and len(ports) <= 2


def test_a_process_ends_though_its_judge_is_silent():
    with scripted(silence) as server:
        code = (
            f"import judge; j = judge.Judge({server.url!r}, 'm'); j.submit('p', 's'); "
            "import time; time.sleep(0.3)"
        )
        begin = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(judge.__file__).parent, check=True, timeout=20
        )
        assert time.monotonic() - begin < 5


def test_close_fails_what_is_pending():
    with scripted(silence) as server, client(server.url, timeout=30) as judging:
        future = judging.submit("p", "s")
        judging.close()
        with pytest.raises(ChatStop, match="closed"):
            future.result(timeout=0)


def test_close_leaves_no_idle_thread():
    with scripted(answer(GOOD)) as server:
        with client(server.url) as judging:
            for future in [judging.submit("p", str(i)) for i in range(8)]:
                future.result()
            threads = judging._threads
            assert len(threads) == 4
        assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------------------------ cache and key


def test_nothing_is_paid_twice(quick, tmp_path):
    cache = tmp_path / "cache.sqlite"
    script = [answer("{}"), answer("{}"), answer(GOOD)]
    with scripted(*script) as server:
        with client(server.url, cache=cache) as judging:
            prompt = "Write. It should be 90 words long."
            assert judging.submit(prompt, "s").result().score is None  # failures are not kept
            first = judging.submit(prompt, "s").result()
        with client(server.url, cache=cache) as judging:
            # the judge sees the same
            again = judging.submit("Write. It should be 1,200 words long.", "s").result()
            assert (again.score, again.raw, again.cached) == (first.score, first.raw, True)
            assert judging.stats()["calls"] == 0 and judging.stats()["cached"] == 1
            assert len(server.requests) == 3
            judging.submit("Write!", "s").result()
            judging.submit("Write.", "t").result()
        for changes in ({"extra_body": {"top_k": 3}}, {"extra_body": {"temperature": None}}):
            with client(server.url, cache=cache, **changes) as judging:
                assert not judging.submit("Write.", "s").result().cached
        assert len(server.requests) == 7
        request = json.loads(server.requests[-1].partition(b"\r\n\r\n")[2])
        assert "temperature" not in request and request["top_p"] == 0.9
        with sqlite3.connect(cache) as db:
            db.execute("UPDATE verdicts SET raw = 'stored by another version'")
        with client(server.url, cache=cache) as judging:
            assert (
                judging.submit("Write.", "s").result().score == GOOD_SCORE
                and len(server.requests) == 8
            )
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_the_cache_is_safe_for_four_processes(tmp_path):
    cache = tmp_path / "cache.sqlite"
    with scripted(answer(GOOD)) as server:
        code = (
            f"import judge; j = judge.Judge({server.url!r}, 'm', cache={str(cache)!r})\n"
            "futures = [j.submit('p', str(i % 60)) for i in range(120)]\n"
            "v = [f.result() for f in futures]; j.close()\n"
            "print(sum(x.score is not None for x in v))"
        )
        command = [sys.executable, "-c", code]
        options = {"cwd": Path(judge.__file__).parent, "stdout": subprocess.PIPE, "text": True}
        workers = [subprocess.Popen(command, **options) for _ in range(4)]
        assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["120"] * 4
    with sqlite3.connect(cache) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT COUNT(*) FROM verdicts").fetchone() == (60,)


def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "bad").write_text("no database " * 100)
    for path in (tmp_path / "bad", tmp_path / "missing" / "cache"):
        with pytest.raises(ChatStop, match=re.escape(str(path))):
            Judge("http://127.0.0.1:1/v1", "m", cache=path)


def test_keys(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    for url in (
        "http://localhost:8000/v1",
        "http://127.0.0.1:1/v1",
        "http://10.0.0.7/v1",
        "http://[::1]:80/v1",
        "http://gpu7/v1",
    ):
        assert chat.api_key("JUDGE_API_KEY", url) is None
    for url in ("https://api.openai.com/v1", "https://8.8.8.8/v1"):
        with pytest.raises(ChatStop, match="export JUDGE_API_KEY"):
            chat.api_key("JUDGE_API_KEY", url)
    monkeypatch.setenv("JUDGE_API_KEY", KEY + "\n")
    assert chat.api_key("JUDGE_API_KEY", "https://api.openai.com/v1") == KEY
    judging = Judge("https://api.openai.com/v1", "m", KEY)
    assert KEY not in repr(judging) + str(judging.stats())
    for bad in ("two words", "line\nbreak", "ключ"):
        with pytest.raises(ValueError, match="not shown") as caught:
            Judge("https://api.openai.com/v1", "m", bad)
        assert bad not in str(caught.value)
    for url in (
        "api.openai.com/v1",
        "ftp://x/v1",
        f"https://me:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
    ):
        with pytest.raises(ValueError) as caught:
            Judge(url, "m")
        assert KEY not in str(caught.value)


def test_the_key_travels_in_one_header_and_comes_back_nowhere(quick, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setattr(chat, "is_local", lambda url: False)
    own = verdict_with(P1=3)
    own["P1"]["justification"] = f"Your key is {KEY}."
    with (
        scripted(answer(json.dumps(own))) as server,
        client(server.url, cache=tmp_path / "c.sqlite") as judging,
    ):
        verdict = judging.submit("p", "s").result()
        assert (
            verdict.dimensions["P1"]["justification"] == "Your key is ***."
            and KEY not in verdict.raw
        )
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert f"Authorization: Bearer {KEY}".encode() in head and KEY.encode() not in body
    with scripted(answer(GOOD)) as server, client(server.url, api_key=None) as judging:
        judging.submit("p", "s").result()
        assert b"uthorization" not in server.requests[0]  # not even one from .netrc


# ------------------------------------------------------------------- what providers answer instead


@contextlib.contextmanager
def stand_in(**options):
    process, url = judge.start_stand_in(**options)
    with process:
        yield url
        process.stdin.close()


def error(status, message="no", **more):
    body = json.dumps({"error": {"message": message, **more}})
    return http(status, body, "Content-Type: application/json")


@pytest.mark.parametrize("name", ["moderation", "context", "safety", "refusal"])
def test_a_refused_story_is_final_and_others_go_on(quick, tmp_path, name):
    log = tmp_path / "log"
    with stand_in(faults=f"{name}:0.3", log=log) as url, client(url) as judging:
        stories = [f"{CHECK_STORY} {i}." for i in range(20)]
        found = [judging.submit(CHECK_PROMPT, story).result() for story in stories]
        again = [judging.submit(CHECK_PROMPT, story).result() for story in stories]
    lost = [v.score is None for v in found]
    assert 2 <= sum(lost) <= 12 and [v.score is None for v in again] == lost
    assert all("this text is refused" in v.error for v in found if v.error)
    assert len(log.read_text().splitlines()) == 40  # nothing was asked twice by the client


@pytest.mark.parametrize(
    ("status", "more"),
    [
        (403, {"metadata": {"reasons": ["hate"], "flagged_input": "API key not valid"}}),
        (400, {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        (400, {"message": "Your request was rejected by our safety system."}),
        (400, {"code": "data_inspection_failed"}),
        (400, {"code": "invalid_prompt", "message": "Your prompt was flagged."}),
        (400, {"message": "This model's maximum context length is 8192 tokens. However, ..."}),
        (400, {"message": "prompt is too long: 210000 tokens > 200000 maximum"}),
        (400, {"message": "The input token count (1200000) exceeds the maximum of 1048576."}),
        (413, {"message": "Request too large"}),
        (422, {"message": "Input data may contain inappropriate content."}),
        (200, {"code": 403, "metadata": {"reasons": ["x"]}, "message": "flagged"}),
    ],
)
def test_errors_of_a_story(quick, status, more):
    with scripted(error(status, **more), FINE) as server, client(server.url) as judging:
        verdict = judging.submit("p", "s").result(timeout=5)
        assert verdict.score is None and "this text is refused" in verdict.error
        assert judging.submit("p", "t").result().score == GOOD_SCORE and len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "more", "option"),
    [
        (400, {"message": "Unsupported parameter: 'top_p'", "param": "top_p"}, "extra"),
        (400, {"message": "`temperature` is deprecated for this model."}, "extra"),
        (400, {"message": "temperature and top_p cannot both be specified"}, "extra"),
        (422, {"message": "Extra inputs are not permitted: response_format"}, "extra"),
        (400, {"message": "Invalid value: 'json_object'. Supported values are: text"}, "extra"),
        (400, {"message": "API key not valid.", "type": "INVALID_ARGUMENT"}, "key-env"),
        (400, {"message": "Your credit balance is too low to access the API."}, "key-env"),
        (400, {"message": "User location is not supported for the API use."}, "key-env"),
        (403, {"message": "Your account was flagged and suspended."}, "key-env"),
        (403, {"message": "Permission denied on resource project x"}, "key-env"),
        (400, {"message": "The model `gemini-9` does not exist."}, "model"),
        (404, {"message": "no such model"}, "model"),
        (429, {"message": "You exceeded your quota.", "code": "insufficient_quota"}, "key-env"),
        (429, {"message": "Rate limit: requests per day (RPD). Try again in 7m12s"}, "key-env"),
        (200, {"code": 402, "message": "Insufficient credits"}, "key-env"),
        (200, {"code": "401", "message": "User not found."}, "key-env"),
    ],
)
def test_errors_of_settings_stop_everything_and_name_the_option(quick, status, more, option):
    with scripted(error(status, **more)) as server, client(server.url, concurrency=1) as judging:
        futures = [judging.submit("p", str(i)) for i in range(9)]
        for future in futures:
            with pytest.raises(ChatStop, match=f"--judge-{option}"):
                future.result(timeout=5)
        assert len(server.requests) == 1
        if option == "extra":
            assert "'{\"FIELD\": null}' leaves" in str(future.exception())


def test_an_unknown_400_is_one_storys_at_first_and_ends_the_run_in_the_end(quick):
    with scripted(error(400, "odd")) as server, client(server.url, concurrency=1) as judging:
        futures = [judging.submit("p", str(i)) for i in range(60)]
        first = futures[0].result(timeout=5)
        assert first.score is None and "--judge-extra" in first.error
        with pytest.raises(ChatStop, match="12 calls in a row .* HTTP 400: odd"):
            futures[-1].result(timeout=5)
        assert len(server.requests) == 12
    # Once others were accepted, words about parameters are about this call alone.
    script = [FINE, error(400, "unsupported parameter: top_p"), FINE]
    with scripted(*script) as server, client(server.url, concurrency=1) as judging:
        scores = [judging.submit("p", str(i)).result().score for i in range(3)]
        assert scores == [GOOD_SCORE, None, GOOD_SCORE]


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ("Retry-After: 48", "", 48),
        ("retry-after-ms: 1500", "", 1.5),
        ("", '{"error": {"details": [{"@type": "RetryInfo", "retryDelay": "48s"}]}}', 48),
        ("", '{"retry_delay": {"seconds": 31, "nanos": 5}}', 31),
        ("", '{"error": {"message": "Please retry in 48.326172s."}}', 48.326172),
        ("", "Rate limit reached. Please try again in 6m0s.", 360),
        ("", "Please try again in 20ms.", 0.02),
        ("", "Please retry after 7 seconds.", 7),
        ("", "Please wait 12 seconds before the next request", 12),
        ("", "try again in 1 hour", 3600),
        ("", '{"retry_after": 2.5}', 2.5),
        ("", '{"retryAfterMs": 700}', 0.7),
        ("", "limit resets in 30s", 30),
        ("Retry-After: 2", '{"retryDelay": "5s"}', 5),
        ("Retry-After: tomorrow", "the model is overloaded; 3000 requests", 0),
    ],
)
def test_delays_are_read_wherever_they_stand(headers, body, seconds):
    assert chat.stated_delay(f"{headers}\n{body}") == pytest.approx(seconds)


def test_a_limit_per_minute_loses_no_story(quick, tmp_path):
    with stand_in(limit=6, window=0.8) as url, client(url, concurrency=16) as judging:
        begin = time.monotonic()
        verdicts = [f.result(30) for f in [judging.submit("p", str(i)) for i in range(24)]]
        seconds = time.monotonic() - begin
        stats = judging.stats()
    assert all(v.score is not None for v in verdicts) and stats["failures"] == 0
    assert 2.2 <= seconds < 9
    assert stats["requests"] == 24 + stats["retries"] <= 24 + 4 * 18  # all wait together


@pytest.mark.parametrize("status", [429, 498, 503, 529, 200])
def test_a_busy_server_has_a_time_budget_and_no_count(quick, status):
    busy = error(status, "slow down", code=429, retryDelay="0.1s")
    with scripted(*[busy] * 6, FINE) as server, client(server.url, retries=0) as judging:
        assert judging.submit("p", "s").result(timeout=9).score == GOOD_SCORE
    with scripted(busy) as server, client(server.url, patience=0.5) as judging:
        begin = time.monotonic()
        verdict = judging.submit("p", "s").result(timeout=9)
        assert "slow down" in verdict.error and "--judge-rpm" in verdict.error
        assert 0.3 <= time.monotonic() - begin < 2 and 2 <= len(server.requests) <= 8


def test_a_delay_beyond_the_budget_is_not_waited_for(quick):
    busy = error(429, "Please try again in 3h")
    with scripted(busy) as server, client(server.url, concurrency=2) as judging:
        futures = [judging.submit("p", str(i)) for i in range(40)]
        assert "try again in 3h" in futures[0].result(timeout=5).error
        with pytest.raises(ChatStop, match="in a row"):
            futures[-1].result(timeout=5)
        assert len(server.requests) <= 13


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 502, "message": "upstream died"}},
        {"choices": [{"error": {"code": 502, "message": "x"}, "message": {"content": GOOD}}]},
        {"choices": [{"finish_reason": "error", "message": {"content": GOOD}}]},
        {"error": {"message": "overloaded", "type": "overloaded_error"}},
    ],
)
def test_errors_inside_a_200(quick, body):
    wrong = http(200, json.dumps(body))
    with scripted(wrong, FINE) as server, client(server.url) as judging:
        assert judging.submit("p", "s").result().score == GOOD_SCORE and len(server.requests) == 2
    with scripted(wrong) as server, client(server.url, patience=0.1) as judging:
        assert judging.submit("p", "s").result().score is None


ASKED = len(
    chat._RUN.sub(r"\1", "".join(m["content"] for m in judge.judge_messages("p", "s", "m")))
)


@pytest.mark.parametrize(
    "act",
    [silence, drip(FINE, 0.05), drip(http(200, b"{}" * 999, length=9999), 0.02)],
    ids=["silent", "dripping head", "dripping body"],
)
def test_a_time_out_is_asked_once_more_closed_and_counted(quick, act):
    closed = []

    def watched(connection):
        with contextlib.suppress(OSError):
            act(connection)
            connection.recv(1)
        closed.append(time.monotonic())

    with scripted(watched) as server, client(server.url) as judging:
        begin = time.monotonic()
        verdict = judging.submit("p", "s").result(timeout=9)
        spent = time.monotonic() - begin
        assert "no answer within 0.6 s" in verdict.error and 1.2 <= spent < 2.2
        assert len(server.requests) == judging.stats()["requests"] == 2
        assert verdict.tokens_in == pytest.approx(2 * ASKED / 4, rel=0.01)  # most likely paid
        time.sleep(0.3)
        assert len(closed) == 2  # the server saw both connections end
    with scripted(act, FINE) as server, client(server.url) as judging:
        assert judging.submit("p", "s").result().score == GOOD_SCORE


def test_blanks_that_keep_a_connection_alive(quick):
    with stand_in(faults="drip:1") as url, client(url, timeout=5) as judging:
        assert judging.submit(CHECK_PROMPT, CHECK_STORY).result().score == GOOD_SCORE
    with stand_in(faults="blanks:1") as url, client(url) as judging:
        begin = time.monotonic()
        assert "no answer within" in judging.submit("p", "s").result(timeout=9).error
        assert time.monotonic() - begin < 2.5


def test_flex_tiers_get_more_time():
    def seconds(tier, **limits):
        with Judge("http://h/v1", "m", extra_body={"service_tier": tier}, **limits) as judging:
            return judging._timeout

    assert seconds("flex") >= 900 > seconds("auto") and seconds("flex", timeout=30.0) == 30.0


def test_what_is_paid_and_what_was_read():
    with stand_in(faults="hidden:1") as url, client(url) as judging:
        verdict = judging.submit(CHECK_PROMPT, CHECK_STORY).result()
        wrote = len(json.dumps(offline.offline_verdict(CHECK_PROMPT, CHECK_STORY))) // 4
        assert verdict.score == GOOD_SCORE and verdict.tokens_out >= 1000 + 0.9 * wrote
    with stand_in(faults="cut:1") as url, client(url) as judging:
        verdict = judging.submit(CHECK_PROMPT, CHECK_STORY).result()
        assert verdict.score is None and "it cut the prompt" in verdict.error
        assert judging.stats()["requests"] == 1
        # A text of blanks or dashes has few tokens: its verdict is no sign of a cut prompt.
    dashes = "A fox. " + "-" * 90_000 + " " * 90_000
    with scripted(FINE) as server, client(server.url) as judging:
        assert judging.submit("p", dashes).result().score == GOOD_SCORE


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"finish_reason": "RECITATION", "message": {"content": ""}}, "RECITATION"),
        ({"finish_reason": "content_filter", "message": {"content": GOOD}}, "content_filter"),
        ({"finish_reason": "stop", "message": {"content": "", "refusal": "No."}}, "No."),
        ({"finish_reason": None, "native_finish_reason": "SAFETY", "message": {}}, "SAFETY"),
    ],
)
def test_reasons_reach_the_user_and_are_not_paid_twice(quick, choice, words):
    reply = http(200, json.dumps({"choices": [choice]}))
    with scripted(reply) as server, client(server.url) as judging:
        verdict = judging.submit("p", "s").result()
        assert verdict.score is None and words in verdict.error and len(server.requests) == 1
    blocked = http(200, json.dumps({"promptFeedback": {"blockReason": "SAFETY"}}))
    with scripted(blocked) as server, client(server.url) as judging:
        assert "SAFETY" in judging.submit("p", "s").result().error and len(server.requests) == 1


def test_the_probe_speaks_and_hardly_retries(quick):
    said = []
    with scripted(silence) as server, client(server.url, retries=4) as judging:
        begin = time.monotonic()
        with pytest.raises(ChatStop, match="no answer within"):
            judging.check(said.append)
        assert time.monotonic() - begin < 1.5 and len(server.requests) == 1
        assert "for up to 1 s" in said[0] or "0.6" in said[0]
    said.clear()
    with scripted(error(429, "try again in 0.2s"), FINE) as server, client(server.url) as judging:
        judging.check(said.append)
        assert len(said) == 2 and "again in" in said[1]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (f"<think>Perhaps {json.dumps(perfect_verdict())}?</think>\n{GOOD}", GOOD_SCORE),
        (f"<thinking>{json.dumps(perfect_verdict())}</thinking>{GOOD}", GOOD_SCORE),
        (f"Let me see. {json.dumps(perfect_verdict())}\n</think>\n{GOOD}", GOOD_SCORE),
        (f"<think>{json.dumps(perfect_verdict())}", None),  # cut off while thinking
        (GOOD.replace("Text statistics", "It says </think>"), GOOD_SCORE),  # quoted
    ],
)
def test_thinking_is_no_verdict(quick, text, score):
    with scripted(answer(text)) as server, client(server.url) as judging:
        verdict = judging.submit(CHECK_PROMPT, CHECK_STORY).result()
        assert verdict.score == score and verdict.raw == text
    with contextlib.suppress(VerdictError):
        assert judge.parse_verdict(text, CHECK_STORY).score == score


def test_private_certificates_count_for_local_names_and_proxies_do_not(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/my/ca.pem")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    with Judge("https://gpu7/v1", "m") as judging:
        session = judging._session()
        settings = session.merge_environment_settings(judging.url, {}, True, None, None)
        assert settings["verify"] == "/my/ca.pem" and not settings["proxies"]
    with Judge("https://host.org/v1", "m") as judging:
        settings = judging._session().merge_environment_settings(judging.url, {}, True, None, None)
        assert settings["verify"] == "/my/ca.pem" and settings["proxies"]["https"]


def test_short_keys_are_dummies_and_long_ones_are_found_in_any_spelling(quick, monkeypatch):
    with scripted(FINE) as server, client(server.url, api_key="0") as judging:
        assert judging.submit(CHECK_PROMPT, CHECK_STORY).result().raw == GOOD
    spelt = "".join(f"\\u{ord(c):04x}" for c in KEY)
    for text in ("x" * 290 + KEY, KEY.replace("/", "\\/"), spelt, "%73k-secret%2f8e1fbf"):
        for body in (json.dumps({"error": {"message": text}}), f"<p>{text}</p>", text):
            with scripted(http(400, body)) as server, client(server.url) as judging:
                reason = judging.submit("p", "s").result().error
            assert "***" in reason and "sk-s" not in reason and "8e1f" not in reason, reason
    monkeypatch.setenv("HTTP_PROXY", "http://me:swordfish@127.0.0.1:1")
    monkeypatch.setattr(chat, "is_local", lambda url: False)
    for text in ("swordfish", "proxy http://me:pw@host:1 refused"):
        with client("http://host.org/v1") as judging:
            assert "swordfish" not in judging._said(text) and ":pw@" not in judging._said(text)


@pytest.mark.parametrize(
    "name", ["sk-or-v1-0123456789abcdef", "gsk_0aB1cD2eF3gH4", "AIzaSyD0aB1cD2"]
)
def test_a_key_in_place_of_its_name_is_not_shown(name):
    for url in ("https://host.org/v1", "http://localhost:1/v1"):
        run = run_cli("check", "--judge-url", url, "--judge-key-env", name)
        assert run.returncode == 2 and "--judge-key-env" in run.stderr
        assert name not in run.stdout + run.stderr


def test_no_worker_dies_in_silence(tmp_path):
    for url in ("http://[::1/v1", "http://h:99999/v1", "http://:80/v1"):
        with pytest.raises(ValueError, match="url: write http"):
            Judge(url, "m")
    with contextlib.closing(chat.Chat("http://localhost:1/v1", "m", concurrency=1)) as talking:
        with pytest.raises(SystemExit):
            talking.start(sys.exit, 1).result(timeout=5)
        assert talking.start(max, 3, 4).result(timeout=5) == 4
    cache = tmp_path / "c.sqlite"
    with scripted(FINE) as server, client(server.url, cache=cache) as judging:
        judging.submit("p", "s").result()
        with sqlite3.connect(cache) as db:
            db.execute("UPDATE verdicts SET raw = NULL")
        assert judging.submit("p", "s").result(timeout=5).score == GOOD_SCORE
        assert len(server.requests) == 2


def test_any_messages_and_parser_share_the_loop_and_the_cache(quick, tmp_path):
    messages = [{"role": "user", "content": "Rate it."}]

    def rating(text):
        if not text.isdigit():
            raise chat.Unusable("no number")
        return int(text)

    script = [answer("prose"), answer("prose"), answer("prose"), answer("7"), answer("8")]
    with scripted(*script) as server, client(server.url, cache=tmp_path / "c.sqlite") as asking:
        lost = asking.request(messages, rating).result()
        assert (lost.value, lost.error, lost.kind, lost.usage) == (
            *(None, "no number", "unusable"),
            (10000, 1000),
        )
        found = [asking.request(messages, rating, repeat=n).result() for n in (0, 1, 0, 1)]
        assert [a.value for a in found] == [7, 8, 7, 8] and len(server.requests) == 5
        assert [a.cached for a in found] == [False, False, True, True]
        assert (
            asking.request(messages, str).result().value == "7"
        )  # the answer, read in another way


# ---------------------------------------------------------------------------- a rubric of one's own


def test_another_rubric_has_its_own_prompt_schema_clamps_and_report(quick, capsys):
    page = (Path(judge.__file__).parent / "docs" / "judges.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(from judge import.*?)```", page, re.S)[1]
    assert len(example.splitlines()) <= 40
    names = {}
    exec(example.partition("with Judge(")[0], names)
    rubric = names["ESSAY"]
    text, schema = rubric.text(), rubric.schema()
    assert list(schema["properties"]) == [d.key for d in rubric.dimensions]
    for d in rubric.dimensions:
        assert f"## {d.key}. {d.name} ({d.min}-{d.max})" in text
        assert schema["properties"][d.key]["properties"]["score"]["maximum"] == d.max
    assert "story" not in text.lower() and "BONUS" not in text
    wild = {d.key: {"justification": "", "quotes": [], "score": 99} for d in rubric.dimensions}
    merits = sum(d.max for d in rubric.dimensions if d.sign > 0)
    faults = sum(d.max for d in rubric.dimensions if d.sign < 0)
    verdict = judge.parse_verdict(json.dumps(wild), "", rubric)
    assert verdict.score == pytest.approx((merits - faults) / merits)
    assert (verdict.positive, verdict.negative) == (merits, faults) and verdict.quote_accuracy == 0
    with pytest.raises(VerdictError, match="no verdict"):
        judge.parse_verdict(GOOD, "", rubric)
    with scripted(answer(json.dumps(wild))) as server:
        exec(example.replace("http://localhost:8000/v1", server.url), {})
        sent = json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["messages"]
    assert sent[0]["content"] == text and "[ESSAY " in sent[1]["content"]
    assert rubric.name in capsys.readouterr().out


def test_a_rubric_that_cannot_work_is_refused():
    one = judge.Dimension("A", "a", 5)
    for dimensions in ((one, one), (judge.Dimension("A", "a", 0),)):
        with pytest.raises(ValueError, match="rubric 'x'"):
            judge.Rubric("x", "poem", "You judge.", "1. Fair.", dimensions)


# -------------------------------------------------------------------------------- a second judge


def test_a_second_judge_sees_what_a_policy_exploits():
    """Ever more words of the prompt in stories on something else: the reader likes it."""
    fables = world.fables(20, 0)
    plain = offline._FUNCTION | offline._TASK

    def stories(share):
        for i, e in enumerate(fables):
            rng = random.Random(i)
            asked = rewards.strip_length_sentence(e.prompt).lower()
            words = [w for w in re.findall(r"[a-z]{3,}", asked) if w not in plain]

            def word(match, rng=rng, words=words):
                keep = match[0] in plain or rng.random() >= share
                return match[0] if keep else rng.choice(words)

            yield e.prompt, re.sub(r"\b[a-z]{3,}\b", word, fables[(i + 7) % 20].story)

    with stand_in() as first, stand_in(personality="skeptic") as second:
        with Judge(first, "reader") as reader, Judge(second, "skeptic") as skeptic:
            history, agreed = [], []
            for share in (0.0, 0.15, 0.3):
                tales = list(stories(share))
                scores = [[j.submit(*t).result().score for t in tales] for j in (reader, skeptic)]
                history.append(tuple(sum(s) / len(s) for s in scores))
                agreed.append(judge.agreement(*scores))
    assert judge.judges_part(history).startswith("JUDGES PART: over 3 validations the training")
    assert all(-1 <= r <= 1 for r in agreed)
    for calm in (history[::-1], history[:2], [(a, a) for a, _ in history]):
        assert judge.judges_part(calm) == ""


def test_agreement():
    assert judge.agreement([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx(1)
    assert judge.agreement([0.1, 0.2, 0.3], [3, 2, 1]) == pytest.approx(-1)
    assert judge.agreement([0.1, 0.1, 0.1], [1, 2, 3]) is judge.agreement([1, 2], [1, 2]) is None


def test_a_run_with_flagged_stories_limits_and_blanks_leaves_out_just_those_rows(tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "run"
    options = "--steps 3 --prompts 2 --group 5 --eval-prompts 1 --anchor-warmup 1 --warm-steps 20"
    options += " --device cpu --judge-timeout 20"
    faults = "moderation:0.08,drip:0.5"
    with (
        stand_in(faults=faults, limit=12, window=1.0, log=log, seed=2) as url,
        stand_in(personality="skeptic") as second,
    ):
        argv = [*options.split(), "--out", str(out), "--judge-url", url]
        argv += ["--eval-judge-url", second, "--eval-judge-model", "skeptic"]
        command = [sys.executable, str(Path(judge.__file__).parent / "polaris.py"), *argv]
        run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    flagged = {line["digest"] for line in lines if line["outcome"] == "moderation"}
    assert len({line["digest"] for line in lines}) == len(lines)  # nothing was asked twice
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").open()]
    left_out = {offline.row_digest(r["prompt"], r["story"]) for r in rows if r["reward"] is None}
    assert left_out and left_out <= flagged
    asked = {offline.row_digest(r["prompt"], r["story"]) for r in rows if r["story"].strip()}
    assert left_out == flagged & asked
    assert len(left_out) < len(asked) / 2, (len(left_out), len(asked))
    evals = [json.loads(line) for line in (out / "evals.jsonl").open()]
    assert all(line["judge_sq"] is not None for line in evals if line["n"])
    assert all(-1.59 <= line["eval_judge_sq"] <= 1.08 for line in evals if line["n"])


# ------------------------------------------------------------------------------------------ options


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    chat.add_options(parser, "llm", chat.ChatOptions(model="m", key_env="LLM_KEY"))
    return chat.options_from(vars(parser.parse_args(arguments)), "llm")


def test_every_option_reaches_the_request(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    extra = '{"top_k": 3, "stop": null}'
    with scripted(answer("Rufus", "Connection: close")) as server:
        options = parsed(
            *("--llm-url", server.url, "--llm-model", "fox", "--llm-key-env", "OTHER_KEY"),
            *("--llm-extra", extra, "--llm-price-in", "2", "--llm-price-out", "10"),
        )
        with contextlib.closing(options.open(chat.Chat)) as talking:
            assert talking.ask([])[0] == "Rufus"
            assert talking.stats()["dollars"] == pytest.approx(5000 * 2e-6 + 500 * 1e-5)
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert f"Bearer {KEY}".encode() in head
    assert json.loads(body) == {"model": "fox", "top_k": 3, "messages": []}
    with scripted(silence, silence, http(503, "")) as server:
        limits = ("--llm-timeout", "0.2", "--llm-retries", "1", "--llm-concurrency", "2")
        limits += ("--llm-patience", "0.1")
        with contextlib.closing(parsed("--llm-url", server.url, *limits).open(Judge)) as judging:
            for future in [judging.submit("p", str(i)) for i in range(5)]:
                assert future.result(timeout=20).score is None
            assert len(judging._threads) == 2 and len(server.requests) >= 7


@pytest.mark.parametrize("extra", ["", "{", "[1]", "null", '{"a": }'])
def test_extra_fields_that_are_no_object_are_refused_by_name(extra):
    with pytest.raises(ValueError, match=re.escape(f"--llm-extra {extra!r}: write a JSON object")):
        parsed("--llm-extra", extra)


def test_nobody_but_the_judge_speaks_of_a_judge(quick, monkeypatch):
    monkeypatch.setattr(chat, "BREAKER_FAILURES", 1)
    monkeypatch.setattr(chat, "BREAKER_SECONDS", 0.0)
    said = []
    for act in (http(401, "no"), reset(b"")):
        with scripted(act) as server, contextlib.closing(chat.Chat(server.url, "m")) as talking:
            with pytest.raises(ChatStop) as caught:
                talking.ask([])
            said.append(str(caught.value))
    for url, env in (("https://host.org/v1", "NO_SUCH_KEY"), ("host", "NO_SUCH_KEY")):
        with pytest.raises((ChatStop, ValueError)) as caught:
            chat.ChatOptions(url, "m", env).open(chat.Chat)
        said.append(str(caught.value))
    assert len(said) == 4 and "judge" not in " ".join(said).lower()


def test_errors_of_background_work_reach_the_result():
    with contextlib.closing(chat.Chat("http://localhost:1/v1", "m", concurrency=1)) as talking:
        with pytest.raises(ZeroDivisionError):
            talking.start(lambda: 1 // 0).result(timeout=5)
        assert talking.start(max, 3, 4).result(timeout=5) == 4  # its thread lives on


# -------------------------------------------------------------------------------- the offline judge

PROMPT = "Write a story about a fox, a lantern and the mill. The story should be 60 words long."
TALE = (
    "A young fox lived by the old mill and had never seen a lantern. One night a light shone on "
    'the river. "Who is there?" asked the fox. An owl held up the lantern and said, "Only a '
    'friend." They walked home together along the water, and the mill was not so dark again.'
)


def sq(story, prompt=PROMPT):
    return judge.parse_verdict(json.dumps(offline.offline_verdict(prompt, story)), story).score


def test_the_offline_judge_orders_drafts():
    rng = random.Random(5)
    words = TALE.split()
    shuffled = " ".join(rng.sample(words, len(words)))
    letters = " ".join(
        "".join(rng.choices("bcdfghjkqxzvw", k=rng.randint(2, 9))) for _ in range(60)
    )
    sentences = re.split(r"(?<=[.?]) (?=[A-Z])", TALE)
    assert 0.55 <= sq(TALE) <= 0.85
    assert 0.55 <= sq(CHECK_STORY, CHECK_PROMPT) <= 0.85
    assert sq(TALE) > sq(shuffled) + 0.3 > sq(letters) + 0.3
    assert sq(letters) < -0.2 and sq("") < -0.5 and sq("?!… — ...") < -0.5
    assert sq(TALE[: len(TALE) * 2 // 3]) < sq(TALE) - 0.05
    off_the_prompt = TALE.replace("lantern", "book").replace("mill", "sea").replace("fox", "man")
    assert sq(off_the_prompt) < sq(TALE) - 0.1
    assert sq(TALE.lower().replace(".", "")) < sq(TALE) - 0.15
    assert sq(TALE.replace('"', "", 1)) < sq(TALE) - 0.03  # an unpaired quotation mark
    assert sq(f"{TALE} {TALE}") < sq(TALE) - 0.3
    assert sq(" ".join([*sentences[:3], sentences[2], *sentences[3:]])) < sq(TALE)
    assert sq(" ".join([sentences[0]] * 6)) < 0.1
    assert sq("fox lantern mill " * 20) < 0 and sq("Fox, lantern, mill.") < sq(TALE) - 0.2
    thirds = {0: "zorp", 1: "brrk"}
    nonsense = [thirds.get(i % 3, word) for i, word in enumerate(words)]
    assert sq(" ".join(nonsense)) < 0.2


def test_the_offline_judge_does_not_pay_for_length():
    parts = CHECK_STORY.split("\n\n")
    # 55 to 250 words
    stories = [TALE, "\n\n".join(parts[:4]), CHECK_STORY, f"{CHECK_STORY}\n\n{TALE}"]
    scores = [sq(story, prompt="") for story in stories]
    assert max(scores) - min(scores) < 0.1


def test_the_offline_judge_is_linear_in_hostile_text():
    begin = time.monotonic()
    for text in (
        "!" * 50_000 + "z",
        '."' * 50_000 + "x",
        "\n " * 50_000,
        "a" * 200_000,
        "“" * 50_000,
        "&" * 50_000,
        "." * 99_999,
    ):
        offline.offline_verdict(PROMPT, "A fox. " + text + " b")
        rewards.reward(0.0, text, 100, 10, 0, True)
        judge.parse_verdict(GOOD, text)
    assert time.monotonic() - begin < 8


def test_an_offline_verdict_fits_the_schema_and_quotes_the_story():
    schema, verdict = (
        judge.verdict_schema(),
        offline.offline_verdict(PROMPT, TALE + " The the the of."),
    )
    assert list(verdict) == schema["required"]
    for key, entry in verdict.items():
        inner = schema["properties"][key]
        assert (
            set(entry) == set(inner["required"]) == set(inner["properties"])
            and entry["justification"]
        )
        assert 0 <= entry["score"] <= inner["properties"]["score"]["maximum"]
        assert all(
            quote in TALE + " The the the of." and len(quote.split()) <= 12
            for quote in entry["quotes"]
        )
        assert entry["quotes"] or not entry["score"] or key in POSITIVE


def test_serve_with_the_openai_client():
    openai = pytest.importorskip("openai")
    process, url = judge.start_stand_in()
    with process:
        api = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        messages = judge.judge_messages(PROMPT, TALE, "m4rk")
        reply = api.chat.completions.create(
            model="offline", messages=messages, response_format={"type": "json_object"}
        )
        assert judge.parse_verdict(reply.choices[0].message.content, TALE).score == sq(TALE)
        assert (
            reply.usage.prompt_tokens > 1000
            and reply.choices[0].finish_reason == "stop"
            and reply.model == "offline"
        )
        assert [model.id for model in api.models.list()]
        pieces = api.chat.completions.create(model="offline", messages=messages, stream=True)
        streamed = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert judge.parse_verdict(streamed, TALE).score == sq(TALE)
        # 64 calls at once
        with ThreadPoolExecutor(64) as pool:
            ask = partial(api.chat.completions.create, model="offline", messages=messages)
            replies = [future.result() for future in [pool.submit(ask) for _ in range(64)]]
        assert len({r.choices[0].message.content for r in replies}) == 1
        # a story on its own, in parts
        parts = [{"role": "user", "content": [{"type": "text", "text": TALE}]}]
        reply = api.chat.completions.create(model="offline", messages=parts)
        assert judge.parse_verdict(reply.choices[0].message.content, TALE).score == sq(TALE, "")
        for bad in ({"messages": []}, {"messages": "text"}):
            with pytest.raises(openai.BadRequestError, match="list of messages"):
                api.post("/chat/completions", body=bad, cast_to=object)
        with pytest.raises(openai.NotFoundError):
            api.post("/elsewhere", body={"messages": messages}, cast_to=object)
        process.stdin.close()
        assert process.wait(timeout=5) == 0


def test_the_server_goes_with_a_killed_parent():
    code = (
        "import judge, os; p, url = judge.start_stand_in(); "
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(judge.__file__).parent,
        capture_output=True,
        text=True,
        timeout=20,
    )
    pid = int(run.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        ):
            return  # ended; nobody has fetched its status yet
        time.sleep(0.05)
    pytest.fail(f"the server {pid} is still there")


# ----------------------------------------------------------------------------------------- commands


def test_check_prints_what_a_judge_is_worth():
    run = run_cli("check", "--times", "2", "--judge-price-in", "0.5", "--judge-price-out", "3")
    assert run.returncode == 0 and not run.stderr
    for words in (
        "10 of 10",
        "quotes found     100%",
        "0.000 when one draft",
        "Yes; it ranks the tale first",
        "$0.00",
    ):
        assert words in run.stdout, run.stdout


def test_check_sees_a_judge_that_cannot_tell():
    texts = iter(random.Random(1).choices(range(16), k=99))
    noise = [answer(json.dumps(verdict_with(P1=next(texts)))) for _ in range(40)]
    with scripted(*noise) as server:
        run = run_cli("check", "--judge-url", server.url, "--judge-model", "dice")
    assert run.returncode == 0 and "five drafts apart? No" in run.stdout


def test_score_prints_a_verdict(tmp_path):
    (tmp_path / "story.txt").write_text(TALE)
    run = run_cli("score", str(tmp_path / "story.txt"), "--prompt", PROMPT)
    assert (
        run.returncode == 0
        and all(d.name in run.stdout for d in RUBRIC)
        and "Story Quality" in run.stdout
    )
    run = run_cli("score", "-", "--prompt", PROMPT, "--json", input=TALE)
    assert json.loads(run.stdout)["score"] == sq(TALE)


def test_bad_input_is_explained(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    for args, status, words in (
        (["check", "--judge-url", "https://api.openai.com/v1"], 3, "export JUDGE_API_KEY"),
        (["check", "--judge-url", dead], 3, "refused"),
        (["check", "--judge-url", "localhost:1"], 2, "http(s)://host"),
        (["check", "--judge-url", "http://[::1/v1"], 2, "http(s)://host"),
        (["score", str(tmp_path / "none.txt")], 2, "none.txt"),
    ):
        monkeypatch.setattr(sys, "argv", ["judge.py", *args])
        with pytest.raises(SystemExit) as caught:
            judge.main()
        assert caught.value.code == status and words in capsys.readouterr().err
    for faults, words in (("fire:0.5", "NAME:SHARE"), ("500:0.9,429:0.9", "more than 1")):
        run = run_cli("serve", "--faults", faults)
        assert run.returncode == 2 and words in run.stderr


def test_no_key_in_what_a_command_prints():
    body = json.dumps({"error": {"message": f"bad key {KEY}"}})
    with scripted(http(401, body)) as server:
        run = run_cli("check", "--judge-url", server.url, env=os.environ | {"JUDGE_API_KEY": KEY})
        assert (
            run.returncode != 0
            and "bad key ***" in run.stderr
            and KEY not in run.stdout + run.stderr
        )
        assert f"Bearer {KEY}".encode() in server.requests[0]


def test_schema_is_an_extra_body():
    body = json.loads(run_cli("schema").stdout)
    assert body["response_format"]["json_schema"]["schema"] == judge.verdict_schema()
