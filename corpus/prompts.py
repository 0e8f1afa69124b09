"""Prompts: from titles, in a dozen patterns, or by an LLM with reasoning traces.

The LLM writes for each story the assignment that it could answer ("back-translation").

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
from typing import Any

from tqdm import tqdm

from chat import CallFailed, Chat, ChatOptions, ChatStop
from data import MARKUP, DataError, Example, encode_prompt
from reward import requested_words

HERE = Path(__file__).parent
PROMPT_TASK = (HERE / "task_prompt.txt").read_text("utf-8").strip()
TRACE_TASK = (HERE / "task_trace.txt").read_text("utf-8").strip()
NO_PROSE = re.compile(r"(?m)^\s*(?:#|\*\*|```|[-*] |\d+\. )|^(?:here is|sure|certainly)\b", re.I)
PATTERNS = [  # chosen by uid among those whose fields are known
    'Write a short story with the title "{title}".',
    'Write a story called "{title}".',
    '"{title}": write the short story that belongs under this title.',
    'Tell a complete story under the title "{title}".',
    'I need a piece of short fiction entitled "{title}", from its first scene to its end.',
    'Write "{title}", a short story told in the {person} person.',
    'Tell the story "{title}" in the {person} person.',
    'Write a short story, "{title}", that opens with the words "{opening}".',
    'Begin a story with "{opening}" and bring it to its end. The title is "{title}".',
    'A story called "{title}" begins like this: "{opening} ..." Write the whole story.',
    'Write a story in the manner of {author}. Its title is "{title}".',
    'Imagine that {author} had been asked for a story called "{title}". Write that story.',
    'Write "{title}", a short story as {author} might have told it in the {person} person.',
]
TITLES = "mr mrs miss dr sir lady lord captain colonel major master madame monsieur uncle aunt"
TITLES += " king queen prince princess duke count baron saint father mother brother sister doctor"
NO_NAMES = f"""{TITLES} god heaven christ christmas easter bible church new old north south east
west great monday tuesday wednesday thursday friday saturday sunday january february march april
may june july august september october november december england english london paris france
french america american germany german italy italian rome roman russia russian spain spanish
ireland irish scotland scotch india indian china chinese greek turk jew christian street road
river house general judge professor president emperor empress bishop governor sergeant lieutenant
sultan rajah""".split()
DOES = "said|asked|cried|replied|answered|was|had|were|saw|went|came|looked|took|thought|knew|would"
DOES += r"|could|did|ran|stood|sat|told|made|felt|\w+ed"


def length_sentence(words: int) -> str:
    return f"The story should be {words} words long."


# ------------------------------------------------------------------------- what an answer must be


def template_prompt(uid: str, title: str, author: str, story: str, words: int) -> str:
    """A prompt that is true to the story, with its length, in one of PATTERNS."""
    told = re.sub(r'"[^"]*"', "", story)
    first = len(re.findall(r"\b(?:I|my|me)\b", told)) > 0.015 * len(told.split())
    opening = " ".join(story.split()[:8]).strip(",;:")
    fields = {"title": title, "person": "first" if first else "third"}
    if not re.search(r'["*\u2014]', opening) and len(opening) < 80:
        fields["opening"] = opening.rstrip(".")
    if " " in author and not re.search(r"(?i)various|anonymous|unknown|editor|,|;", author):
        fields["author"] = author
    known = [p for p in PATTERNS if set(re.findall(r"{(\w+)}", p)) <= fields.keys()]
    place = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:4], "big")
    return f"{known[place % len(known)].format(**fields)} {length_sentence(words)}"


def names_in(story: str) -> set[str]:
    """Persons of a story: words with a capital inside sentences that act, speak or have a title.

    Words that it also writes small, that follow "the" or mostly "in", "at", "from" are none.
    """
    inside = Counter(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", story))
    small = set(re.findall(r"\b[a-z]+\b", story))
    titled = Counter(
        re.findall(
            rf"(?i:\b(?:{'|'.join(TITLES.split())}|(?:mr|mrs|dr|st)\.)) ([A-Z][a-z]{{2,}})", story
        )
    )
    acting = Counter(re.findall(rf"\b([A-Z][a-z]{{2,}}) (?:{DOES})\b", story))
    acting += Counter(
        re.findall(r"\b(?:said|asked|cried|replied|answered) ([A-Z][a-z]{2,})", story)
    )
    placed = Counter(re.findall(r"\b(?:in|at|from|near|of the|the|an?) ([A-Z][a-z]{2,})", story))

    def is_person(name: str, n: int) -> bool:
        known = titled[name] + acting[name]
        return n + known > 2 and known > 0 and 2 * placed[name] < n + known

    names = {name for name in {*inside, *titled} if is_person(name, inside[name])}
    return {name for name in names if name.lower() not in {*small, *NO_NAMES}}


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


def fault_of_prompt(text: str, story: str, over: Callable[[str], str] = lambda _: "") -> str:
    """What is wrong with a prompt; "" if nothing. `over`: the fault of one with too many tokens.

    160 words, the length sentence and a chat template stay under 256 tokens.
    """
    if names := sorted(names_in(story) & set(re.findall(r"[A-Z][a-z]+", text))):
        return f"it uses names of the story ({', '.join(names)}); leave them out"
    if requested_words(text) is not None or "\n\n" in text:
        return "one paragraph is needed that says nothing about length"
    return over(text) or fault_of_text(text, 20, 160, story, 6)


def fault_of_trace(text: str, story: str) -> str:
    """The same for a trace. 1,500 words stay under the 3,072 tokens that thinking is free for."""
    return fault_of_text(text, 100, 1500, story, 12)


# ----------------------------------------------------------------------------------------- the LLM


class Unfit(ValueError):
    """An example for which the LLM gives no usable prompt or trace."""


class Writer:
    """An LLM, and the file of the answers that it has given."""

    def __init__(self, options: ChatOptions, cache: Path, tokenizer: Any, limit: int) -> None:
        self.tokenizer = tokenizer  # or None: words are counted instead
        self.limit = limit
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

        def over(text: str) -> str:
            if not self.tokenizer:
                return ""
            whole = f"{text} {length_sentence(example.target_words)}"
            n = len(encode_prompt(self.tokenizer, whole, thinking=True))
            excess = n - self.limit
            return f"it is {excess} tokens too long; shorten it" if excess > 0 else ""

        prompt = self.good("prompt", task, partial(fault_of_prompt, story=story, over=over))
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
