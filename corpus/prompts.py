"""Prompts and reasoning traces by an LLM: for each story the assignment that it could answer.

Every answer is kept in a file at once: nothing is paid twice. An answer that copies from the
story, names its people or is no plain prose goes back with the reason, up to twice.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from chat import CallFailed, Chat, ChatOptions, ChatStop
from data import MARKUP, DataError, Example
from reward import requested_words

HERE = Path(__file__).parent
PROMPT_TASK = (HERE / "task_prompt.txt").read_text("utf-8").strip()
TRACE_TASK = (HERE / "task_trace.txt").read_text("utf-8").strip()
NO_PROSE = re.compile(r"(?m)^\s*(?:#|\*\*|```|[-*] |\d+\. )|^(?:here is|sure|certainly)\b", re.I)
COMMON_NAMES = "i god lord christmas english french american german sunday monday mr mrs miss sir"


def length_sentence(words: int) -> str:
    return f"The story should be {words} words long."


# ------------------------------------------------------------------------- what an answer must be


def names_in(story: str) -> set[str]:
    """Words that the story writes with a capital inside sentences, several times, never without."""
    inside = Counter(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", story))
    names = {name.lower() for name, n in inside.items() if n > 2}
    return names - set(re.findall(r"\b[a-z]+\b", story)) - set(COMMON_NAMES.split())


def copied(text: str, story: str, n: int) -> str:
    """The first n words in a row that text shares with story, or ""."""
    words = re.findall(r"\w+", text.lower())
    there = " ".join(["", *re.findall(r"\w+", story.lower()), ""])
    phrases = (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return next((phrase for phrase in phrases if f" {phrase} " in there), "")


def fault_of_text(text: str, low: int, high: int, story: str, n: int) -> str:
    """What is wrong with plain prose of low to high words that shares no n words with the story."""
    words = len(text.split())
    if not low <= words <= high:
        return f"it has {words} words; write {low} to {high}"
    if MARKUP.search(text) or NO_PROSE.search(text):
        return "plain prose is needed, without headings, lists, marks or introductory remarks"
    if phrase := copied(text, story, n):
        return f'it copies "{phrase}" from the story; use your own words'
    return ""


def fault_of_prompt(text: str, story: str) -> str:
    """What is wrong with a prompt; "" if nothing. 150 words stay under 256 tokens."""
    if names := sorted(names_in(story) & set(re.findall(r"[a-z]+", text.lower()))):
        return f"it uses names of the story ({', '.join(names)}); leave them out"
    if requested_words(text) is not None or "\n\n" in text:
        return "one paragraph is needed that says nothing about length"
    return fault_of_text(text, 20, 150, story, 6)


def fault_of_trace(text: str, story: str) -> str:
    """The same for a trace. 1,500 words stay under the 3,072 tokens that thinking is free for."""
    return fault_of_text(text, 100, 1500, story, 12)


# ----------------------------------------------------------------------------------------- the LLM


class Unfit(ValueError):
    """An example for which the LLM gives no usable prompt or trace."""


class Writer:
    """An LLM, and the file of the answers that it has given."""

    def __init__(self, options: ChatOptions, cache: Path) -> None:
        try:
            extra = {"temperature": 0.7, **options.extra_body}
            self.client = replace(options, extra=json.dumps(extra)).open(Chat, prefix="llm")
        except ValueError as error:
            raise DataError(f"an --llm option cannot be used: {error}") from None
        self.options = options
        self.body = {"model": options.model, **extra}  # a part of each answer's key
        self.cache = cache
        self.lock = threading.Lock()
        self.answers: dict[str, str] = {}
        self.cached = 0  # answers that were there already
        for line in cache.read_bytes().split(b"\n") if cache.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the line that a killed run was writing
                continue
            self.answers[row["key"]] = row["answer"]

    def key(self, messages: list[dict]) -> str:
        request = json.dumps([self.body, messages], sort_keys=True)
        return hashlib.sha256(request.encode()).hexdigest()

    def ask(self, messages: list[dict]) -> str:
        """The answer. CallFailed without one; ChatStop when the server refuses or is down."""
        name = self.key(messages)
        with self.lock:
            if name in self.answers:
                self.cached += 1
                return self.answers[name]
        answer, _ = self.client.ask(messages)
        with self.lock:
            self.answers[name] = answer
            with self.cache.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": name, "answer": answer}))
        return answer

    def good(self, what: str, task: str, fault_of: Callable[[str], str]) -> str:
        """An answer without fault, of up to three tries that name the fault. Unfit without one."""
        messages = question = [{"role": "user", "content": task}]
        for _ in range(3):
            answer = self.ask(messages).strip()
            fault = fault_of(answer)
            if not fault:
                return answer
            retry = {"role": "user", "content": f"That cannot be used: {fault}. Write it again."}
            messages = [*question, {"role": "assistant", "content": answer}, retry]
        raise Unfit(f"no usable {what}")

    def rewrite(self, example: Example) -> Example:
        """The example with a prompt and a reasoning trace by the LLM."""
        story = example.story
        task = PROMPT_TASK.format(story=story)
        prompt = self.good("prompt", task, partial(fault_of_prompt, story=story))
        task = TRACE_TASK.format(prompt=prompt, story=story)
        reasoning = self.good("trace", task, partial(fault_of_trace, story=story))
        author = f"prompt and trace by {self.options.model}"
        source = example.source.replace("template prompt", author)
        prompt = f"{prompt} {length_sentence(example.target_words)}"
        return replace(example, prompt=prompt, reasoning=reasoning, source=source)

    def print_estimate(self, examples: list[Example]) -> None:
        """Calls, tokens and dollars that `back_translate` will take, without retries."""
        new = []
        for example in examples:
            task = PROMPT_TASK.format(story=example.story)
            if self.key([{"role": "user", "content": task}]) not in self.answers:
                new.append(len(example.story.split()))
        tokens_in = int(sum(2 * words * 1.35 + 500 for words in new))
        tokens_out = 1100 * len(new)
        dollars = tokens_in * self.options.price_in + tokens_out * self.options.price_out
        begun = len(examples) - len(new)
        print(
            f"{len(examples)} stories, {begun} of them begun already: about {2 * len(new)} calls, "
            f"{tokens_in:,} tokens in, {tokens_out:,} out, ${dollars / 1e6:.2f} (retries apart)"
        )

    def back_translate(self, examples: list[Example]) -> tuple[list[Example], Counter[str]]:
        """Examples with prompts and traces by the LLM, and how many were dropped for what."""
        made = []
        dropped: Counter[str] = Counter()
        failed = []
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            first = [pool.submit(self.rewrite, example) for example in examples[:1]]
            wait(first)  # a probe: a server that refuses us is asked once
            futures = first + [pool.submit(self.rewrite, example) for example in examples[1:]]
            for future in tqdm(futures, desc="prompts", unit="story"):
                try:
                    made.append(future.result())
                except Unfit as why:
                    dropped[str(why)] += 1
                except CallFailed as error:
                    failed.append(error)
                except BaseException:  # the others would end like this one
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        stats = self.client.stats()
        tokens = f"{stats['tokens_in']:,} tokens in, {stats['tokens_out']:,} out"
        calls = f"{stats['calls']} calls ({self.cached} answers were there already)"
        print(f"{calls}, {tokens}, ${stats['dollars']:.2f}")
        if failed:
            what = f"{len(failed)} of {len(examples)} stories got no answer ({failed[0]})"
            kept = f"the answers so far are in {self.cache} and are not paid again"
            raise ChatStop(f"{what}; run the same command again: {kept}")
        return made, dropped
