"""The stand-in judge: a server that answers a judge's protocol with verdicts from text statistics.

It is no critic. It sees whether a text has the form of English prose (sentences that begin and end,
words that exist, nothing told twice) and takes up its prompt, and answers with all dimensions,
justifications and quotes, as an LLM would: enough to train the miniature and to test a client. It
can be slow and fail on demand, by the seed, the story and how often that was asked for.

    python judge.py serve [--port N] [--delay S] [--faults 429:0.1,reset:0.05,...] [--log FILE]
"""

import argparse
import hashlib
import json
import os
import random
import re
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from judge import POSITIVE, RUBRIC
from mini import formats
from reward import strip_length_sentence

# ---------------------------------------------------------------------------------------- measures

_ARTICLES = set("a an every its my our the their your".split())
_SUBJECTS = set("he i she they we".split())
_JOINERS = set("and but nor or".split())
_LINKS = set("at from into of with".split())
_VERBS = set("am are be been could did do does had has have is should was were would".split())
_FUNCTION = _ARTICLES | _SUBJECTS | _JOINERS | _LINKS | _VERBS | set(
    "that this these those it him her them us me you his hers who whom whose which what when where "
    "why how there here then than to in on by for as so if not no yes up down out over under off "
    "about after before again through while until though because all any some each both such only "
    "own very too just now still even more most much many other another one two never ever once "
    "said upon between against without within around along across behind beyond near toward "
    "towards yet nothing something can will shall might must may s t d ll ve re m".split()
)  # fmt: skip
_TASK = set("write story tell tale short about words long include feature make create".split())
_TASK |= {"should", "titled", "called"}
# What cannot follow directly in English ("the of", "she the"): broken text is full of it.
_IMPOSSIBLE = {
    **dict.fromkeys(_ARTICLES, _ARTICLES | _VERBS | _JOINERS | _LINKS | _SUBJECTS),
    **dict.fromkeys(_SUBJECTS, _ARTICLES | _SUBJECTS | _LINKS),
    **dict.fromkeys(_LINKS, _VERBS | _JOINERS | _LINKS),
    **dict.fromkeys(_JOINERS, set()),
}
_ABSTRACT = ("tion", "tions", "ness", "ity", "ment", "ism", "ance", "ence")
_PROSE = ".,;:!?'\"“”‘’—–-…()*_"  # what prose has besides letters, digits and spaces
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# It looks at nothing behind it: that would be quadratic.
_STOP = re.compile(r"[.!?…]+[\"'”’)\]*_]*|\n\s*\n|\Z")
_ODD_WORD = re.compile(
    r"[bcdfghjklmnpqrstvwxz]{6}|(.)\1\1|\d[a-z]|[a-z]\d|^[^\W\daeiouyà-ÿ]{3,}$|^[b-hj-np-z]$|.{19}"
)


Spans = list[tuple[int, int]]  # begin and end of each word


class Sentence(NamedTuple):
    first: int  # index of its first word
    size: int  # words
    whole: bool  # begins and ends as sentences do


def _ramp(value: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, linear between and constant outside."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def _stem(word: str) -> str:
    return (word[:-2] if word.endswith(("ed", "es", "'s")) else word.rstrip("s"))[:6]


def _first(indices: list[int]) -> int:
    return indices[0] if indices else 0


def _sentences(story: str) -> tuple[Spans, list[Sentence]]:
    spans: Spans = []
    sentences = []
    start = 0
    for stop in _STOP.finditer(story):
        end = stop.end()
        glued = story[end : end + 1].strip() != ""  # 3.5
        goes_on = story[end : end + 2].lstrip()[:1].islower() and stop[0] != "."  # "Go!" he said.
        if stop[0].strip() and (glued or goes_on):
            continue
        words = [match.span() for match in _WORD.finditer(story, start, end)]
        if words:
            opening = story[start : words[0][1]].lstrip().lstrip("\"'“‘(—–-*_[")[:1]
            ended = stop[0].startswith((".", "!", "?", "…"))
            closed = ended or story[start:end].rstrip().endswith(":")
            whole = closed and not opening.islower() and len(words) <= 70
            sentences.append(Sentence(len(spans), len(words), whole))
            spans += words
        start = end
    return spans, sentences


def _slips(story: str, words: list[str], spans: Spans) -> list[int]:
    """Words that cannot stand before what follows them."""
    slips = []
    for i, word in enumerate(words):
        gap = story[spans[i][1] : spans[i + 1][0]] if i + 1 < len(words) else "."
        follows = words[i + 1] if not gap.strip() else gap.strip()[0]
        hangs = follows in ".!?" and (word in _ARTICLES or word in _JOINERS)
        doubled = follows == word and word not in ("had", "that", "very", "so")
        if hangs or doubled or follows in _IMPOSSIBLE.get(word, ()):
            slips.append(i)
    return slips


def measure(prompt: str, story: str) -> tuple[dict[str, float], dict[str, int], Spans]:
    """-> {measure: 0 bad to 1 good}, {measure: a word where it shows}, spans of all words.

    All measures are shares or means over windows, so that length as such has no influence. Without
    words there are none.
    """
    spans, sentences = _sentences(story)
    words = [story[a:b].lower().replace("’", "'") for a, b in spans]
    if not words:
        return {}, {}, []
    n = len(words)
    stems = [_stem(word) for word in words]
    content = [i for i, word in enumerate(words) if word not in _FUNCTION and "'" not in word]
    function = (n - len(content)) / n
    at = {}

    asked_words = _WORD.findall(strip_length_sentence(prompt).lower())
    asked = {_stem(w) for w in asked_words if len(w) > 2 and w not in _FUNCTION | _TASK}
    hits = [i for i, stem in enumerate(stems) if stem in asked]
    named = len({stems[i] for i in hits}) / max(1, len(asked))
    all_along = len({4 * i // n for i in hits})  # quarters of the story
    at["uptake"] = _first(hits)

    sizes = [sentence.size for sentence in sentences]
    mean = n / len(sizes)
    spread = statistics.pstdev(sizes) / mean
    whole = sum(sentence.size for sentence in sentences if sentence.whole)
    at["complete"] = _first([sentence.first for sentence in sentences if not sentence.whole])
    last = sentences[-1]
    at["ending"] = last.first

    slips = _slips(story, words, spans)
    chances = 1 + sum(word in _IMPOSSIBLE for word in words)
    odd = [i for i in content if not words[i].isdigit() and _ODD_WORD.search(words[i])]
    strange = [c for c in story if not (c.isalnum() or c.isspace() or c in _PROSE)]
    at["grammar"] = _first(slips)
    at["shape"] = _first(odd)

    window = min(n, 50)
    starts = range(0, n - window + 1, window)
    distinct = statistics.fmean(len({*words[i : i + window]}) / window for i in starts)
    usual = 1 - 0.0042 * window  # share of distinct words in a window of English prose
    grams = {*zip(words, words[1:], words[2:], words[3:], strict=False)}
    repeated = 1 - len(grams) / (n - 3) if n > 3 else 0.0
    seen = set()
    again = []
    for sentence in sentences:
        text = tuple(words[sentence.first : sentence.first + sentence.size])
        if text in seen and sentence.size > 2:
            again.append(sentence)
        seen.add(text)
    twice = sum(sentence.size for sentence in again)
    at["fresh"] = _first([sentence.first for sentence in again])

    speech = [p for p in re.split(r"\n\s*\n", story) if re.search('["“”]', p)]
    unpaired = [p for p in speech if p.count('"') % 2 or p.count("“") != p.count("”")]
    paired = 1 - len(unpaired) / max(1, len(speech))
    quoted = sum(len(match[0].split()) for match in re.finditer(r'["“][^"“”]*["”]', story)) / n
    spoken = [i for i, (start, _) in enumerate(spans) if story[start - 1 : start] in ('"', "“")]
    at["talk"] = at["paired"] = _first(spoken)
    abstract = [i for i in content if words[i].endswith(_ABSTRACT)]
    at["concrete"] = _first(abstract)
    early = {stems[i] for i in content if i < n / 2}
    late = [stems[i] in early for i in content if i >= n / 2]
    values = {
        "echo": 1 - _ramp(len(hits) / max(1, len(content)), 0.35, 0.7),
        "uptake": 0.7 * named + 0.3 * all_along / 4 if asked else 0.6,  # of the prompt's words
        "complete": whole / n,  # words in sentences with a capital and an end
        "ending": 1.0 if last.whole and last.size > 1 else 0.0,
        "several": min(1.0, len(sizes) / 2),  # one sentence is no story
        "sized": min(_ramp(mean, 1.5, 6), _ramp(mean, 60, 32)),  # words in a sentence
        "variety": _ramp(spread, 0.05, 0.45) if len(sizes) > 2 else 0.5,
        "grammar": 1 - _ramp(len(slips) / chances, 0.02, 0.3),
        "balance": min(_ramp(function, 0.15, 0.38), _ramp(function, 0.85, 0.65)),
        "shape": 1 - _ramp(len(odd) / n, 0.01, 0.2),  # words that could be words
        "clean": 1 - _ramp(len(strange) / len(story), 0.005, 0.08),  # characters of prose
        "diversity": _ramp(distinct, usual - 0.35, usual),
        "fresh": max(0.0, 1 - 2.5 * max(0.0, repeated - 0.04)) * (1 - twice / n),
        "paired": paired,  # quotation marks
        "talk": min(_ramp(quoted, 0, 0.08), _ramp(quoted, 1, 0.85)) * paired,
        "concrete": 1 - _ramp(len(abstract) / max(1, len(content)), 0.04, 0.25),
        "cohesion": _ramp(statistics.fmean(late or [0]), 0, 0.15),  # what the second half takes up
    }
    return values, at, spans


# Dimension -> measures and weights. A positive scores its weighted measures, times how much this is
# prose at all; a negative scores what they lack.
_OFFLINE = {
    "P1": {"uptake": 0.8, "complete": 0.2},
    "P2": {"ending": 0.4, "complete": 0.3, "cohesion": 0.3},
    "P3": {"talk": 0.4, "cohesion": 0.3, "concrete": 0.3},
    "P4": {"diversity": 0.5, "variety": 0.5},
    "P5": {"concrete": 0.4, "diversity": 0.4, "sized": 0.2},
    "P6": {"cohesion": 0.4, "uptake": 0.3, "ending": 0.3},
    "N1": {"uptake": 1.0},
    "N2": {"grammar": 0.6, "balance": 0.4},
    "N3": {"variety": 0.6, "diversity": 0.4},
    "N4": {"concrete": 0.7, "several": 0.3},
    "N5": {"fresh": 1.0},
    "N6": {"ending": 0.35, "complete": 0.35, "fresh": 0.3},
    "N7": {"paired": 1.0},
    "N8": {"complete": 0.4, "clean": 0.3, "shape": 0.3},
    "N9": {"diversity": 0.6, "fresh": 0.4},
    "N10": {"shape": 0.4, "grammar": 0.3, "balance": 0.2, "clean": 0.1},
}
# The skeptic sees what the reader does not: words of the prompt that are merely repeated.
_SKEPTIC = {"P1": {"echo": 1.0}, "P6": {"echo": 1.0}, "N1": {"echo": 1.0}, "N5": {"echo": 1.0}}
PERSONALITIES = {"reader": _OFFLINE, "skeptic": _OFFLINE | _SKEPTIC}


def offline_verdict(
    prompt: str, story: str, personality: str = "reader"
) -> dict[str, dict[str, Any]]:
    """A complete verdict, as an LLM would answer, from text statistics; equal for equal texts."""
    values, at, spans = measure(prompt, story)
    prose = (1 + values.get("several", 0.0)) / 2
    for name in ("grammar", "balance", "shape", "clean", "fresh"):
        prose *= values.get(name, 0.0)
    verdict = {}
    for d in RUBRIC:
        weights = PERSONALITIES[personality].get(d.key, {})
        parts = {name: weight * values.get(name, 0.0) for name, weight in weights.items()}
        gain = sum(parts.values())
        if d.key in POSITIVE:
            score = round(d.max * (0.85 * gain * prose))
        else:
            score = round(d.max * (0.7 * (sum(weights.values()) - gain)))
            parts = {name: weights[name] - part for name, part in parts.items()}
        quotes = []
        if score and spans:  # quote where the measure shows that gives, or costs, the most
            first = at.get(max(parts, key=lambda name: parts[name]), 0)
            last = min(first + 7, len(spans) - 1)
            quotes = [story[spans[first][0] : spans[last][1]]]
        found = ", ".join(f"{name} {values.get(name, 0.0):.2f}" for name in weights)
        why = f"Text statistics, 0 bad to 1 good: {found or 'nothing beyond the dimensions'}."
        verdict[d.key] = {"justification": why, "quotes": quotes, "score": score}
    return verdict


# ------------------------------------------------------------------------------------------ server


def _error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def _minute(seconds: float) -> dict[str, Any]:
    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds:.2f}s"}
    return _error("Too many requests per minute.", status="RESOURCE_EXHAUSTED", details=[delay])


_FLAGGED = {"reasons": ["violence"], "flagged_input": "..."}
# What providers answer in place of a verdict.
_REFUSALS = {
    "moderation": (403, _error("no", metadata=_FLAGGED)),
    "context": (400, _error("no", code="context_length_exceeded")),
    "parameter": (400, _error("Unsupported parameter.", param="top_p")),
    "quota": (429, _error("no", code="insufficient_quota")),
    "minute": (429, _minute(0.5)),
    "upstream": (200, _error("died", code=502)),
    "choice": (200, {"choices": [_error("slow down", code=429)]}),
}
_CHOICES: dict[str, Any] = {
    "safety": {"finish_reason": "SAFETY", "message": {"content": None}},
    "refusal": {"finish_reason": "stop", "message": {"content": None, "refusal": "I cannot."}},
    "broken": {"finish_reason": "error", "message": {"content": ""}},
}
_SPOILT = "reset truncate silent blanks drip think cut hidden".split()
_OF_THE_STORY = ("moderation", "context", "safety", "refusal")  # whenever that is asked for
_FAULTS = [*_REFUSALS, *_CHOICES, *_SPOILT, *formats.SPOILS]
_FAULT_NAMES = f"an HTTP status (429, 500, ...), {', '.join(_FAULTS)}"


def row_digest(prompt: str, story: str) -> str:
    """The name of a story and its prompt in the server's log."""
    pair = json.dumps([strip_length_sentence(prompt), story])
    return hashlib.sha256(pair.encode()).hexdigest()[:16]


def read_messages(messages: list[dict]) -> tuple[str, str]:
    """-> (prompt, story) of `judge_messages`; the last of other messages is a story on its own."""
    text = messages[-1]["content"]
    if isinstance(text, list):
        text = "".join(part["text"] for part in text)
    marker = re.match(r"The marker is (\w+)\.", text)
    if not marker:
        return "", text
    fenced = []
    for name in (f"PROMPT {marker[1]}]", f"STORY {marker[1]}]"):
        inside = text.partition(f"[{name}\n")[2]
        fenced.append(inside.partition(f"\n[END OF {name}")[0])
    return fenced[0], fenced[1]


def _parse_faults(spec: str) -> dict[str, float]:
    """'429:0.1,reset:0.05' -> {"429": 0.1, "reset": 0.05}"""
    faults = {}
    for item in filter(None, spec.split(",")):
        match = re.fullmatch(r"([45]\d\d|[a-z]+):([01]|[01]?\.\d+)", item.strip())
        if not match or not (match[1].isdigit() or match[1] in _FAULTS):
            form = f"write NAME:SHARE, as in 429:0.1,reset:0.05; NAME is {_FAULT_NAMES}"
            raise ValueError(f"fault {item!r}: {form}")
        faults[match[1]] = float(match[2])
    if sum(faults.values()) > 1:
        raise ValueError(f"faults {spec!r}: the shares add up to more than 1")
    return faults


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that arrive together

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", args.port), _Handler)
        self.args = args
        self.faults = _parse_faults(args.faults)
        self.lock = threading.Lock()
        self.attempts: Counter[str] = Counter()
        self.times: list[float] = []  # of the requests that the limit let through
        self.write_log("")  # a path that cannot be written to fails now

    def draw(self, digest: str) -> tuple[str, int]:
        """-> (fault or "", attempt)"""
        with self.lock:
            self.attempts[digest] += 1
            attempt = self.attempts[digest]
        x = random.Random(f"{self.args.seed} {digest} {attempt}").random()
        same = random.Random(f"{self.args.seed} {digest}").random()
        for name, share in self.faults.items():
            if name in _OF_THE_STORY:
                same -= share
            else:
                x -= share
            if min(x, same) < 0:
                return name, attempt
        return "", attempt

    def too_early(self) -> float:
        """Seconds until the limit lets a request through; 0: now, and it is counted."""
        with self.lock:
            now = time.monotonic()
            self.times = [t for t in self.times if t > now - self.args.window]
            if self.args.limit and len(self.times) >= self.args.limit:
                return self.times[0] + self.args.window - now
            self.times.append(now)
            return 0.0

    def write_log(self, line: str) -> None:
        if self.args.log:
            with self.lock, open(self.args.log, "a", encoding="utf-8") as file:
                file.write(line)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """POST .../chat/completions in the form of OpenAI's API, with faults on demand."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body, two writes, wait 40 ms for each other

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            prompt, story = read_messages(request["messages"])
        except (ValueError, LookupError, TypeError):
            return self._reply(400, _error("the body must be JSON with a list of messages"))
        if not self.path.endswith("/chat/completions"):
            return self._reply(404, _error(f"POST to /v1/chat/completions, not {self.path}"))
        if wait := self.server.too_early():
            return self._reply(429, _minute(wait))
        digest = row_digest(prompt, story)
        fault, attempt = self.server.draw(digest)
        time.sleep(self.server.args.delay)
        record = {"digest": digest, "attempt": attempt, "outcome": fault or "ok"}
        self.server.write_log(json.dumps(record | {"time": time.time()}) + "\n")
        if fault.isdigit():
            return self._reply(int(fault), _error(f"{fault} on demand"))
        if fault in _REFUSALS:
            return self._reply(*_REFUSALS[fault])
        if fault == "silent":
            self.close_connection = True
            self.rfile.read(1)  # returns when the client hangs up
            return None
        known = formats.answer(story, measure) if not prompt else None  # a benchmark's question
        verdict = known or offline_verdict(prompt, story, self.server.args.personality)
        content = verdict if isinstance(verdict, str) else json.dumps(verdict, ensure_ascii=False)
        content = formats.spoil(fault, content)
        if fault == "think":  # a draft, which must not count
            content = f"<think>{content.replace('0', '1')}</think>\n{content}"
        read = len(body) // 4 if fault != "cut" else len(body) // 40
        wrote = len(content) // 4
        total = read + wrote + 1000 * (fault == "hidden")
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": total}
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {
            "id": f"offline-{digest}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": str(request.get("model")),
            "usage": usage,
            "choices": [_CHOICES.get(fault, choice)],
        }
        if request.get("stream"):
            delta = {"index": 0, "delta": message, "finish_reason": "stop"}
            chunk = answer | {"object": "chat.completion.chunk", "choices": [delta]}
            return self._slowly(
                f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", "text/event-stream"
            )
        if fault in ("drip", "blanks"):
            blanks = 20 if fault == "drip" else 10**6
            return self._slowly(json.dumps(answer), "application/json", blanks)
        return self._reply(200, answer, reset=fault == "reset")

    def do_GET(self) -> None:
        if not self.path.endswith("/models"):
            return self._reply(404, _error(f"GET /v1/models, not {self.path}"))
        return self._reply(200, {"object": "list", "data": [{"id": "offline", "object": "model"}]})

    def _slowly(self, text: str, kind: str, blanks: int = 0) -> None:
        """An answer without length, after lines that keep the connection alive."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(blanks):
            self.wfile.write(b"\n")
            time.sleep(0.05)
        self.wfile.write(text.encode())

    def _reply(self, status: int, answer: Mapping[str, Any], reset: bool = False) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if reset else data)
        if reset:  # closing a socket that lingers for 0 s sends RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr for each request."""


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("judge.py serve", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--port", type=int, default=8600, help="0: any free one [%(default)s]")
    add("--delay", type=float, default=0.0, help="seconds before each answer")
    add("--faults", default="", help=f"NAME:SHARE,...; NAME is {_FAULT_NAMES}")
    add("--limit", type=int, default=0, help="requests in a window; more get 429 and the delay")
    add("--window", type=float, default=60.0, help="seconds of that window [%(default)s]")
    add("--personality", default="reader", choices=PERSONALITIES, help="[%(default)s]")
    add("--seed", type=int, default=0, help="of the faults")
    add("--log", default="", help="file that gets one JSON line a request")
    add("--until-stdin-closes", action="store_true", help="end with the program that started it")
    args = parser.parse_args()
    try:
        server = _Server(args)
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        if args.until_stdin_closes:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as error:
        parser.exit(2, f"judge.py serve: {error}\n")


if __name__ == "__main__":
    main()
