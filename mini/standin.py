"""The offline judge: a server on this machine that answers a judge's protocol with verdicts from text statistics.

A stand-in, and no critic: it sees whether a text has the form of English prose (sentences that begin and end, words
that exist, nothing told twice) and takes up its prompt, and it answers with all 16 dimensions, justifications and
quotes, as an LLM would. That is enough to train the miniature, to test a client against, and for nothing else. It can
be slow and fail on demand; which request fails depends on the seed, the story and how often it was asked for.

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from judge import POSITIVE, RUBRIC
from reward import strip_length_sentence

# A stand-in that needs no key and no network: the same protocol, scores from text statistics. It sees whether a text
# has the form of English prose and takes up its prompt. It does not understand a story.

_ARTICLES = set("the a an my your our their its every".split())
_SUBJECTS = set("he she they we i".split())
_JOINERS = set("and or but nor".split())
_LINKS = set("of from with into at".split())
_VERBS = set("was were is are had has have did does do would could should been be am".split())
_FUNCTION = _ARTICLES | _SUBJECTS | _JOINERS | _LINKS | _VERBS | set(
    "that this these those it him her them us me you his hers who whom whose which what when where why how there here "
    "then than to in on by for as so if not no yes up down out over under off about after before again through while "
    "until though because all any some each both such only own very too just now still even more most much many other "
    "another one two never ever once said upon between against without within around along across behind beyond near "
    "toward towards yet nothing something can will shall might must may s t d ll ve re m".split()
)  # fmt: skip
# What cannot follow directly in English ("the of", "she the", "with and"): shuffled or broken text is full of it.
_IMPOSSIBLE = {
    **dict.fromkeys(_ARTICLES, _ARTICLES | _VERBS | _JOINERS | _LINKS | _SUBJECTS),
    **dict.fromkeys(_SUBJECTS, _ARTICLES | _SUBJECTS | _LINKS),
    **dict.fromkeys(_LINKS, _VERBS | _JOINERS | _LINKS),
    **dict.fromkeys(_JOINERS, set()),
}
_TASK = set(
    "write story tell tale short about words long include feature make create should titled called".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP = re.compile(
    r"[.!?…]+[\"'”’)\]*_]*|\n\s*\n|\Z"
)  # looks at nothing behind it: that would be quadratic
_ODD_WORD = re.compile(
    r"[bcdfghjklmnpqrstvwxz]{6}|(.)\1\1|\d[a-z]|[a-z]\d|^[^\W\daeiouyà-ÿ]{3,}$|^[b-hj-np-z]$|.{19}"
)


def _ramp(value, zero, one):
    """0 at `zero`, 1 at `one`, linear between and constant outside."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def _stem(word):
    return (word[:-2] if word.endswith(("ed", "es", "'s")) else word.rstrip("s"))[:6]


def measure(prompt, story):
    """-> ({measure: 0 bad to 1 good}, {measure: index of a word where it shows}, word spans); empty without words.

    All measures are shares or means over windows, so that length as such has no influence.
    """
    spans, sentences, start, at = (
        [],
        [],
        0,
        {},
    )  # sentences: (index of first word, number of words, well formed)
    for stop in _STOP.finditer(story):
        follows = story[stop.end() : stop.end() + 2].lstrip()[:1]
        glued = story[stop.end() : stop.end() + 1].strip() or (
            follows.islower() and stop[0] != "."
        )  # "Go!" he said.
        if glued and stop[0].strip():
            continue
        here = [match.span() for match in _WORD.finditer(story, start, stop.end())]
        if here:
            head = story[start : here[0][1]].lstrip().lstrip("\"'“‘(—–-*_[")[:1]
            closed = stop[0][:1] in set(".!?…") or story[start : stop.end()].rstrip()[-1:] == ":"
            sentences.append(
                (len(spans), len(here), closed and not head.islower() and len(here) <= 70)
            )
            spans += here
        start = stop.end()
    words = [story[a:b].lower().replace("’", "'") for a, b in spans]
    if not words:
        return {}, {}, []
    n, stems, function = (
        len(words),
        [*map(_stem, words)],
        [word in _FUNCTION or "'" in word for word in words],
    )

    task = _FUNCTION | _TASK
    asked = {
        _stem(w)
        for w in _WORD.findall(strip_length_sentence(prompt).lower())
        if len(w) > 2 and w not in task
    }
    hits = [i for i, stem in enumerate(stems) if stem in asked]
    taken_up = len({stems[i] for i in hits}) / max(1, len(asked))
    uptake = (
        0.7 * taken_up + 0.3 * len({4 * i // n for i in hits}) / 4 if asked else 0.6
    )  # named, and all along
    at["uptake"] = hits[0] if hits else 0

    broken = [i for i, _, good in sentences if not good]
    at["complete"], at["ending"] = broken[0] if broken else 0, sentences[-1][0]
    sizes = [size for _, size, _ in sentences]
    mean = n / len(sizes)
    wrong, chances = [], 1
    for i, word in enumerate(words):
        gap = story[spans[i][1] : spans[i + 1][0]] if i + 1 < n else "."
        after = words[i + 1] if not gap.strip() else gap.strip()[0]
        chances += word in _IMPOSSIBLE
        hangs = after in ".!?" and (word in _ARTICLES or word in _JOINERS)
        if (
            hangs
            or after in _IMPOSSIBLE.get(word, ())
            or (after == word and word not in ("had", "that", "very", "so"))
        ):
            wrong.append(i)
    odd = [
        i
        for i, word in enumerate(words)
        if not function[i] and not word.isdigit() and _ODD_WORD.search(word)
    ]
    at["grammar"], at["shape"] = wrong[0] if wrong else 0, odd[0] if odd else 0
    strange = sum(
        not (c.isalnum() or c.isspace() or c in ".,;:!?'\"“”‘’—–-…()*_") for c in story
    ) / len(story)

    window = min(n, 50)
    distinct = [len({*words[i : i + window]}) / window for i in range(0, n - window + 1, window)]
    usual = 1 - 0.0042 * window  # share of distinct words in a window of English prose
    repeated = (
        1 - len({*zip(words, words[1:], words[2:], words[3:], strict=False)}) / (n - 3)
        if n > 3
        else 0.0
    )
    said, again = set(), []
    for i, size, _ in sentences:
        sentence = tuple(words[i : i + size])
        again += [(i, size)] if sentence in said and size > 2 else []
        said.add(sentence)
    at["fresh"] = again[0][0] if again else 0

    speech = [p for p in re.split(r"\n\s*\n", story) if any(mark in p for mark in '"“”')]
    unpaired = sum(p.count('"') % 2 or p.count("“") != p.count("”") for p in speech)
    paired = 1 - unpaired / max(1, len(speech))
    quoted = sum(len(match[0].split()) for match in re.finditer(r'["“][^"“”]*["”]', story)) / n
    at["talk"] = at["paired"] = next(
        (i for i, (a, _) in enumerate(spans) if story[a - 1 : a] in ('"', "“")), 0
    )
    plain = [i for i in range(n) if not function[i]]
    abstract = [
        i
        for i in plain
        if words[i].endswith(("tion", "tions", "ness", "ity", "ment", "ism", "ance", "ence"))
    ]
    at["concrete"] = abstract[0] if abstract else 0
    early = {stems[i] for i in plain if i < n / 2}
    late = [stems[i] in early for i in plain if i >= n / 2]
    whole, twice = sum(size for _, size, good in sentences if good), sum(size for _, size in again)
    spread = statistics.pstdev(sizes) / mean
    values = {
        "uptake": uptake,  # of the prompt's content words
        "complete": whole / n,  # words in sentences with a capital and an end
        "ending": float(sentences[-1][2] and sentences[-1][1] > 1),
        "several": min(1.0, len(sizes) / 2),  # one sentence is no story
        "sized": min(_ramp(mean, 1.5, 6), _ramp(mean, 60, 32)),  # words in a sentence
        "variety": _ramp(spread, 0.05, 0.45) if len(sizes) > 2 else 0.5,
        "grammar": 1 - _ramp(len(wrong) / chances, 0.02, 0.3),
        "balance": min(
            _ramp(sum(function) / n, 0.15, 0.38), _ramp(sum(function) / n, 0.85, 0.65)
        ),  # function words
        "shape": 1 - _ramp(len(odd) / n, 0.01, 0.2),  # words that could be words
        "clean": 1 - _ramp(strange, 0.005, 0.08),  # characters of prose
        "diversity": _ramp(statistics.fmean(distinct), usual - 0.35, usual),
        "fresh": max(0.0, 1 - 2.5 * max(0.0, repeated - 0.04)) * (1 - twice / n),
        "paired": paired,  # quotation marks
        "talk": min(_ramp(quoted, 0, 0.08), _ramp(quoted, 1, 0.85)) * paired,
        "concrete": 1 - _ramp(len(abstract) / max(1, len(plain)), 0.04, 0.25),
        "cohesion": _ramp(
            statistics.fmean(late or [0]), 0, 0.15
        ),  # what the second half takes up of the first
    }
    return values, at, spans


# Dimension -> measures and weights. A positive scores its weighted measures, times how much this is prose at all; a
# negative scores what they lack.
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


def offline_verdict(prompt, story):
    """A complete verdict (a dict, as an LLM judge would answer) from text statistics; equal texts, equal verdicts."""
    values, at, spans = measure(prompt, story)
    prose = (1 + values.get("several", 0.0)) / 2
    for name in ("grammar", "balance", "shape", "clean", "fresh"):
        prose *= values.get(name, 0.0)
    verdict = {}
    for d in RUBRIC:
        weights = _OFFLINE.get(d.key, {})
        parts = {name: weight * values.get(name, 0.0) for name, weight in weights.items()}
        gain, lack = sum(parts.values()), sum(weights.values()) - sum(parts.values())
        score, quotes = (
            round(d.max * (0.85 * gain * prose if d.key in POSITIVE else 0.7 * lack)),
            [],
        )
        if score and spans:  # quote where the measure shows that gives, or costs, the most
            given = (
                parts
                if d.key in POSITIVE
                else {name: weights[name] - parts[name] for name in parts}
            )
            i = at.get(max(given, key=given.get), 0)
            quotes = [story[spans[i][0] : spans[min(i + 7, len(spans) - 1)][1]]]
        said = (
            ", ".join(f"{name} {values.get(name, 0.0):.2f}" for name in weights)
            or "nothing beyond the dimensions"
        )
        justification = f"Text statistics, 0 bad to 1 good: {said}."
        verdict[d.key] = {"justification": justification, "quotes": quotes, "score": score}
    return verdict


def row_digest(prompt, story):
    """The name of a story and its prompt in the server's log."""
    return hashlib.sha256(json.dumps([strip_length_sentence(prompt), story]).encode()).hexdigest()[
        :16
    ]


def _read_messages(messages):
    """-> (prompt, story) out of `judge_messages`; the last of other messages counts as a story without a prompt."""
    text = messages[-1]["content"]
    if isinstance(text, list):
        text = "".join(part["text"] for part in text)
    marker = re.match(r"The marker is (\w+)\.", text)
    if not marker:
        return "", text
    fences = [
        (f"[{name} {marker[1]}]\n", f"\n[END OF {name} {marker[1]}]")
        for name in ("PROMPT", "STORY")
    ]
    return tuple(text.partition(before)[2].partition(after)[0] for before, after in fences)


class _Handler(BaseHTTPRequestHandler):
    """POST .../chat/completions in the form of OpenAI's API, with faults on demand."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are two writes, which would wait 40 ms for each other
    )

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            request = json.loads(body)
            prompt, story = _read_messages(request["messages"])
        except (ValueError, LookupError, TypeError):
            return self._reply(
                400, {"error": {"message": "the body must be JSON with a list of messages"}}
            )
        if not self.path.endswith("/chat/completions"):
            return self._reply(
                404, {"error": {"message": f"POST to /v1/chat/completions, not {self.path}"}}
            )
        digest = row_digest(prompt, story)
        fault, attempt = self.server.draw(digest)
        time.sleep(self.server.delay)
        self.server.write_log(
            {"digest": digest, "attempt": attempt, "outcome": fault or "ok", "time": time.time()}
        )
        if fault.isdigit():
            return self._reply(int(fault), {"error": {"message": f"{fault} on demand"}})
        if fault == "silent":
            self.close_connection = True
            return self.rfile.read(1)  # returns when the client hangs up
        content = json.dumps(offline_verdict(prompt, story), ensure_ascii=False)
        if fault == "truncate":
            content = content[: len(content) // 2]
        sizes = len(body) // 4, len(content) // 4
        answer = {
            "id": f"offline-{digest}",
            "object": "chat.completion",
            "created": int(time.time()),
        }
        answer |= {"model": str(request.get("model")), "usage": {}}
        answer["usage"] = {
            "prompt_tokens": sizes[0],
            "completion_tokens": sizes[1],
            "total_tokens": sum(sizes),
        }
        message = {"role": "assistant", "content": content}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return self._reply(200, answer, reset=fault == "reset")

    def _reply(self, status, answer, reset=False):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if reset else data)
        if reset:  # closing a socket that lingers for 0 s sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def log_message(self, *args):
        """Nothing on stderr for each request."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that arrive together

    def __init__(self, port, delay, faults, seed, log):
        super().__init__(("127.0.0.1", port), _Handler)
        self.delay, self.faults, self.seed, self.log = delay, _parse_faults(faults), seed, log
        self.lock, self.attempts = threading.Lock(), Counter()
        if log:
            open(log, "a").close()  # a path that cannot be written to fails now

    def draw(self, digest):
        """-> (fault or "", attempt): depends on the seed, the story and how often it was asked for, on nothing else."""
        with self.lock:
            self.attempts[digest] += 1
            attempt = self.attempts[digest]
        x = random.Random(f"{self.seed} {digest} {attempt}").random()
        for name, share in self.faults.items():
            x -= share
            if x < 0:
                return name, attempt
        return "", attempt

    def write_log(self, record):
        if self.log:
            with self.lock, open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


_FAULT_NAMES = "an HTTP status (429, 500, ...), reset, truncate or silent"


def _parse_faults(spec):
    """'429:0.1,reset:0.05' -> {"429": 0.1, "reset": 0.05}"""
    faults = {}
    for item in filter(None, spec.split(",")):
        name, _, share = item.strip().partition(":")
        if not re.fullmatch(r"[45]\d\d|reset|truncate|silent", name) or not re.fullmatch(
            r"[01]|[01]?\.\d+", share
        ):
            raise ValueError(
                f"fault {item!r}: write NAME:SHARE, as in 429:0.1,reset:0.05; NAME is {_FAULT_NAMES}"
            )
        faults[name] = float(share)
    if sum(faults.values()) > 1:
        raise ValueError(f"faults {spec!r}: the shares add up to more than 1")
    return faults


def serve(args):
    """Serve until stopped. The first line on stdout is the base URL."""
    server = _Server(args.port, args.delay, args.faults, args.seed, args.log)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    if args.until_stdin_closes:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8600, help="0: any free one [%(default)s]")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--faults", default="", help=f"NAME:SHARE,...; NAME is {_FAULT_NAMES}")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--log", default="", help="file that gets one JSON line a request")
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end with the process that holds our stdin",
    )
    try:
        serve(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"judge.py serve: {error}")


if __name__ == "__main__":
    main()
