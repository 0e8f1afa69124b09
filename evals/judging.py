"""The judging loop: every question once, every answer kept, every failure counted.

An answer is appended to a log as it comes, one JSON line, under a key of model, parameters,
messages and repeat number; asked again, it is read from there. What could not be read, was cut off
or never came is retried once by the client, counted by its reason, and not kept.
"""

import dataclasses
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chat import Answer, Chat, ChatOptions, Unusable
from evals.answers import Scores
from evals.storyfile import append_line
from evals.tasks import Request
from rundir import read_jsonl, write_jsonl

ENOUGH = 0.95  # share of stories that must be judged for a status of 0


@dataclass(frozen=True)
class Judgement:
    """One answer of the judge. `scores` is None for a failure; `error` says why."""

    scores: Scores | None
    error: str = ""
    raw: str = ""
    model: str = ""  # that answered
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class AnswerLog:
    """Answers that were paid for, in a JSONL file that several processes may append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.lines: dict[str, dict] = {}
        if path.exists():
            records, partial = read_jsonl(path, "key raw model")
            self.lines = {record["key"]: record for record in records}
            if partial:  # the line under way when a run was killed
                write_jsonl(path, records)

    def add(self, line: dict) -> None:
        with self.lock:
            self.lines[line["key"]] = line
            append_line(self.path, line)


@dataclass(frozen=True)
class Asker:
    """A judge: where it is, how it is asked, and the answers it gave before."""

    options: ChatOptions
    parameters: dict[str, Any]  # of the task; the judge's own --judge-extra goes over them
    log: AnswerLog
    repeats: int = 1
    answer_tokens: int = 600

    @property
    def body(self) -> dict[str, Any]:
        body = {**self.parameters, **self.options.extra_body}
        return {name: value for name, value in body.items() if value is not None}

    def key(self, request: Request, repeat: int) -> str:
        call = [self.options.model, self.body, request.key or request.messages, repeat]
        return hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()

    def known(self, request: Request, repeat: int) -> Judgement | None:
        """The answer that the log holds, if it can be read."""
        line = self.log.lines.get(self.key(request, repeat))
        if not line:
            return None
        try:
            return _judgement(request.parse(line["raw"]), line)
        except Unusable:  # kept by an older parser
            return None

    def ask(self, requests: Sequence[Request], what: str) -> list[list[Judgement]]:
        """The answers to each request, `repeats` of each. ChatStop where no call can succeed."""
        found = {}
        missing: dict[str, tuple[Request, int]] = {}  # equal questions are asked once
        for request in requests:
            for repeat in range(self.repeats):
                key = self.key(request, repeat)
                if (known := self.known(request, repeat)) is None:
                    missing[key] = request, repeat
                else:
                    found[key] = known
        if missing:
            extra = json.dumps({**self.parameters, **self.options.extra_body})
            options = dataclasses.replace(self.options, extra=extra)
            with options.open(Chat, prefix="judge") as client:
                futures = {}
                for key, one in missing.items():
                    futures[key] = self._submit(client, *one)
                    if len(futures) == 1:  # a probe: a server that refuses us is asked once
                        futures[key].result()
                for key, future in tqdm(futures.items(), unit=what):
                    found[key] = future.result()
        return [[found[self.key(r, i)] for i in range(self.repeats)] for r in requests]

    def _submit(self, client: Chat, request: Request, repeat: int) -> Future[Judgement]:
        def keep(answer: Answer) -> Judgement:
            tokens_in, tokens_out = answer.usage
            line = {"raw": answer.raw, "model": answer.model, "seconds": answer.seconds}
            line |= {"tokens_in": tokens_in, "tokens_out": tokens_out}
            if answer.value is None:
                return dataclasses.replace(_judgement(None, line), error=answer.error or "empty")
            self.log.add({"key": self.key(request, repeat), **line})
            return _judgement(answer.value, line)

        return client.request(request.messages, request.parse, into=keep)

    def estimate(self, requests: Sequence[Request]) -> str:
        """Calls, tokens and dollars that `ask` would take; nothing is asked."""
        pairs = [(request, i) for request in requests for i in range(self.repeats)]
        missing = [request for request, i in pairs if not self.known(request, i)]
        tokens_in = sum(len(m["content"]) for r in missing for m in r.messages) // 4
        tokens_out = self.answer_tokens * len(missing)
        dollars = tokens_in * self.options.price_in + tokens_out * self.options.price_out
        calls = f"{len(missing)} calls ({len(pairs) - len(missing)} answered before)"
        tokens = f"about {tokens_in:,} tokens in and {tokens_out:,} out"
        price = "" if dollars else " (give --judge-price-in and --judge-price-out)"
        return f"{calls}, {tokens}, ${dollars / 1e6:.2f}{price}; nothing was asked"

    def facts(self, judgements: Sequence[Judgement], prompt_sha256: str) -> dict[str, Any]:
        """What a result file says about the judge, its failures and its cost."""
        tokens_in = sum(judgement.tokens_in for judgement in judgements)
        tokens_out = sum(judgement.tokens_out for judgement in judgements)
        dollars = tokens_in * self.options.price_in + tokens_out * self.options.price_out
        answered = Counter(j.model or "unknown" for j in judgements if j.scores is not None)
        failed = Counter(reason(j.error) for j in judgements if j.scores is None)
        cost = {"tokens_in": tokens_in, "tokens_out": tokens_out, "dollars": dollars / 1e6}
        return {
            "judge": self.options.model,
            "judge_answered": dict(sorted(answered.items())),
            "parameters": self.body,
            "judge_prompt_sha256": prompt_sha256,
            "repeats": self.repeats,
            "failures": dict(sorted(failed.items())),
            "cost": {"judgements": len(judgements), **cost},
        }


def _judgement(scores: Scores | None, line: dict) -> Judgement:
    known = {f.name for f in dataclasses.fields(Judgement)}
    return Judgement(scores, **{name: x for name, x in line.items() if name in known})


def reason(error: str) -> str:
    """The kind of a failure, without what differs from call to call."""
    if error.startswith("no answer within"):
        return "time-out"
    return re.split(r"[:(]", error)[0].strip() or "unknown"


def report(facts: dict[str, Any], judged: int, of: int, what: str) -> int:
    """Print how much was judged, why not all, and the cost -> the exit status, 0 or 3."""
    cost = facts["cost"]
    dollars = f"${cost['dollars']:.2f}"
    print(f"judged {judged}/{of} {what}: {cost['judgements']} judgements, {dollars}")
    for name, n in facts["failures"].items():
        print(f"  {n} failed: {name}")
    if judged >= ENOUGH * of:
        return 0
    print(f"only {judged / of:.0%} judged: too little to stand for all")
    return 3
