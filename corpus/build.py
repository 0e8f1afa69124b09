"""Anthologies -> prompt-story pairs."""

import argparse
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import requests
from tqdm import tqdm

from chat import CallFailed, ChatStop, api_key
from corpus.books import author_key, key, read_book, read_text, round_words, title_case
from data import MARKUP, DataError, Example, histogram
from judge import Judge
from reward import requested_words

# ---------------------------------------------------------------------------------------------------- books -> examples


def length_sentence(words: int) -> str:
    return f"The story should be {words} words long."


def collect(args) -> tuple[list[Example], list[tuple[str, dict, Counter]], list[str]]:
    """Books -> examples with a prompt from the title, (path, header, counts) per book, and the books left out."""
    examples, report, problems, owner, uids = [], [], [], {}, Counter()
    work = partial(read_book, min_words=args.min_words, max_words=args.max_words)
    with ProcessPoolExecutor(min(len(args.books), os.cpu_count() or 1)) as pool:
        results = zip(args.books, pool.map(work, args.books), strict=True)
        for path, (problem, fields, pieces) in tqdm(
            results, total=len(args.books), desc="books", unit="book"
        ):
            if problem:
                problems.append(problem)
                continue
            counts = Counter(pieces=len(pieces))
            if args.show:
                tqdm.write(f"{path}: {fields.get('title', '?')} by {fields.get('author', '?')}")
            for story, words, why, grams in pieces:
                if not why:
                    shared = Counter(owner[gram] for gram in grams if gram in owner)
                    twin, common = max(
                        shared.items(), key=lambda item: (item[1], item[0]), default=("", 0)
                    )
                    why = f"same tale as {twin}" if common > 0.2 * len(grams) else ""
                if args.show:
                    tqdm.write(
                        f"{story.line:7d} {words:6d}  {story.title[:60]}{f'  [{why}]' if why else ''}"
                    )
                counts["near-duplicate" if why.startswith("same") else why or "kept"] += 1
                if why:
                    continue
                uid = f"{Path(path).stem}-{key(story.title).replace(' ', '-')[:60].strip('-')}"
                uids[uid] += 1
                uid += f"-{uids[uid]}" * (uids[uid] > 1)
                owner |= dict.fromkeys(grams, uid)
                target = round_words(words)
                prompt = f'Write a short story with the title "{title_case(story.title)}". {length_sentence(target)}'
                source = f"{fields.get('title', Path(path).name)} | {story.author} | {Path(path).name}:{story.line}"
                examples.append(
                    Example(uid, prompt, target, story.text, "", f"{source} | template prompt")
                )
            report.append((path, fields, counts))
    return examples, report, problems


# ----------------------------------------------------------------------------------- prompts and traces by an LLM

PROMPT_TASK = """Below is a short story by a human writer. Write the assignment to which it could be the answer: what an
editor might have asked this writer for, in one paragraph of 40 to 120 words. Give the situation, the kind of people in
it, the setting, the point of view and the tone; leave the writer free in everything else. Use no name that occurs in
the story, take over no phrase from it, do not reveal how it ends, and say nothing about its length. Answer with the
paragraph alone.

STORY

{story}"""
TRACE_TASK = """Below are a writing assignment and the story that a human writer made of it. Write down what the writer
may have thought before the first sentence: what the assignment asks for, whom the story is about and what they want,
the voice, where it starts, the scenes in order with what each one changes, how it ends and why that ending, what to
avoid. Think in the first person and the present tense, as a plan for a story not yet written; quote nothing from it.
200 to 900 words of plain prose without headings. Answer with the plan alone.

ASSIGNMENT

{prompt}

STORY

{story}"""
NO_PROSE = re.compile(r"(?m)^\s*(?:#|\*\*|```|[-*] |\d+\. )|^(?:here is|sure|certainly)\b", re.I)
COMMON_NAMES = set(
    "i god lord christmas english french american german sunday monday mr mrs miss sir".split()
)


def names_in(story: str) -> set[str]:
    """Words that the story writes with a capital inside sentences, several times, and never without."""
    inside = Counter(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", story))
    return (
        {name.lower() for name, n in inside.items() if n > 2}
        - set(re.findall(r"\b[a-z]+\b", story))
        - COMMON_NAMES
    )


def copied(text: str, story: str, n: int) -> str:
    """The first n words in a row that text shares with story, or ""."""
    words, there = re.findall(r"\w+", text.lower()), re.findall(r"\w+", story.lower())
    grams = {tuple(there[i : i + n]) for i in range(len(there) - n + 1)}
    return next(
        (
            " ".join(words[i : i + n])
            for i in range(len(words) - n + 1)
            if tuple(words[i : i + n]) in grams
        ),
        "",
    )


def fault_of_text(text: str, low: int, high: int, story: str, n: int) -> str:
    words = len(text.split())
    if not low <= words <= high:
        return f"it has {words} words; write {low} to {high}"
    if MARKUP.search(text) or NO_PROSE.search(text):
        return "plain prose is needed, without headings, lists, marks or introductory remarks"
    if phrase := copied(text, story, n):
        return f'it copies "{phrase}" from the story; use your own words'
    return ""


def fault_of_prompt(text: str, story: str) -> str:
    """What is wrong with a back-translated prompt, "" if nothing. At most 150 words: with its length sentence and the
    chat template that stays under 256 tokens."""
    if names := sorted(names_in(story) & set(re.findall(r"[a-z]+", text.lower()))):
        return f"it uses names of the story ({', '.join(names)}); leave them out"
    if requested_words(text) is not None or "\n\n" in text:
        return "one paragraph is needed that says nothing about length"
    return fault_of_text(text, 20, 150, story, 6)


def fault_of_trace(text: str, story: str) -> str:
    """The same for a reasoning trace. At most 1,500 words: well under the 3,072 tokens that thinking is free for."""
    return fault_of_text(text, 100, 1500, story, 12)


class Writer:
    """Asks an LLM with judge.py's client; every answer is kept in a file at once, so that nothing is paid twice."""

    def __init__(self, args):
        self.body = {"model": args.llm_model, "temperature": 0.7, **json.loads(args.llm_body)}
        extra = {
            "top_p": None,
            "response_format": None,
            **self.body,
        }  # no sampling or JSON mode of a judge
        prices = {"price_in": args.price_in, "price_out": args.price_out}
        secret = api_key(args.llm_key_env, args.llm_url)
        self.client = Judge(
            args.llm_url, args.llm_model, secret, rpm=args.llm_rpm, extra_body=extra, **prices
        )
        self.cache = Path(f"{args.out}.llm")
        self.lock, self.answers, self.cached = threading.Lock(), {}, 0
        for line in self.cache.read_bytes().split(b"\n") if self.cache.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the line that a killed run was writing
                continue
            self.answers[row["key"]] = row["answer"]

    def key(self, messages: list[dict]) -> str:
        return hashlib.sha256(
            json.dumps([self.body, messages], sort_keys=True).encode()
        ).hexdigest()

    def ask(self, messages: list[dict]) -> str:
        """The answer's text. ChatStop when the server refuses or stays away; DataError when it gives no answer."""
        name = self.key(messages)
        with self.lock:
            if name in self.answers:
                self.cached += 1
                return self.answers[name]
        try:
            answer, _ = self.client.ask(messages)
        except CallFailed as error:
            raise DataError(str(error)) from None
        with self.lock:
            self.answers[name] = answer
            with self.cache.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": name, "answer": answer}))
        return answer

    def good(self, task: str, fault_of: Callable[[str], str]) -> str:
        """An answer without fault, of up to three tries in which the model is told what was wrong; else ""."""
        messages = [{"role": "user", "content": task}]
        for _ in range(3):
            answer = self.ask(messages).strip()
            if not (fault := fault_of(answer)):
                return answer
            retry = {"role": "user", "content": f"That cannot be used: {fault}. Write it again."}
            messages = [messages[0], {"role": "assistant", "content": answer}, retry]
        return ""


def back_translate(examples: list[Example], args) -> tuple[list[Example], Counter]:
    """Template prompts -> prompts and reasoning traces by the LLM, and how many examples were dropped for what."""
    writer, new = Writer(args), []
    for example in examples:
        first = [{"role": "user", "content": PROMPT_TASK.format(story=example.story)}]
        if writer.key(first) not in writer.answers:
            new.append(len(example.story.split()))
    tokens_in, tokens_out = int(sum(2 * words * 1.35 + 500 for words in new)), 1100 * len(new)
    dollars = (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6
    print(
        f"{len(examples)} stories, {len(examples) - len(new)} of them begun already: about {2 * len(new)} calls, "
        f"{tokens_in:,} tokens in, {tokens_out:,} out, ${dollars:.2f} (retries apart)"
    )
    if args.dry_run:
        return [], Counter()

    def work(example: Example) -> Example | str:
        fault = partial(fault_of_prompt, story=example.story)
        if not (prompt := writer.good(PROMPT_TASK.format(story=example.story), fault)):
            return "no usable prompt"
        task = TRACE_TASK.format(prompt=prompt, story=example.story)
        if not (reasoning := writer.good(task, partial(fault_of_trace, story=example.story))):
            return "no usable trace"
        source = example.source.replace("template prompt", f"prompt and trace by {args.llm_model}")
        prompt = f"{prompt} {length_sentence(example.target_words)}"
        return replace(example, prompt=prompt, reasoning=reasoning, source=source)

    results: list[Example | str | Exception] = []
    with ThreadPoolExecutor(args.llm_concurrency) as pool:
        futures = [pool.submit(work, example) for example in examples]
        for future in tqdm(futures, desc="prompts", unit="story"):
            results.append(future.exception() or future.result())
            if isinstance(results[-1], Exception) and not isinstance(results[-1], DataError):
                pool.shutdown(wait=False, cancel_futures=True)
                raise results[-1]
    stats = writer.client.stats()
    print(
        f"{stats['calls']} calls ({writer.cached} answers were there already), {stats['tokens_in']:,} tokens in, "
        f"{stats['tokens_out']:,} out, ${stats['dollars']:.2f}"
    )
    if failed := [r for r in results if isinstance(r, DataError)]:
        raise DataError(
            f"{len(failed)} of {len(examples)} stories got no answer ({failed[0]}); run the same command again: "
            f"the answers so far are in {writer.cache} and are not paid again"
        )
    return [r for r in results if isinstance(r, Example)], Counter(
        r for r in results if isinstance(r, str)
    )


# ------------------------------------------------------------------------------------------------------ command line

BUCKETS = (
    (1000, 2000),
    (2000, 3000),
    (3000, 4000),
    (4000, 6000),
    (6000, 8000),
    (8000, 12000),
)  # words of test prompts


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_authors(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Train and test examples, no author in both. Test prompts ask for 1,000 to 12,000 words, the six buckets in turn,
    and have no story: theirs has another length."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        _, author, place, *_ = example.source.split(" | ")
        groups.setdefault(author_key(author) or place.partition(":")[0], []).append(example)
    train, test = [], []
    for name in sorted(groups, key=digest):  # whole authors until the share is reached
        (test if len(test) + len(groups[name]) <= share * len(examples) else train).extend(
            groups[name]
        )
    order = {example.uid: i for i, example in enumerate(examples)}
    prompts = []
    for i, example in enumerate(sorted(test, key=lambda e: digest(e.uid))):
        low, high = BUCKETS[i % len(BUCKETS)]
        words = low + digest(example.uid) % ((high - low) // 100) * 100
        prompt = example.prompt.replace(
            length_sentence(example.target_words), length_sentence(words)
        )
        prompts.append(replace(example, prompt=prompt, target_words=words, story="", reasoning=""))
    return sorted(train, key=lambda e: order[e.uid]), prompts


def write_file(path: Path, text: str) -> None:
    """All of the text or nothing: a temporary file, moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_examples(path: Path, examples: list[Example]) -> None:
    write_file(
        path,
        "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples),
    )


def data_card(
    args, report, problems, drops: Counter, train: list[Example], test: list[Example]
) -> str:
    """A Markdown page on where the examples come from and what was left out."""
    rows = "\n".join(
        f"| {Path(path).name} | {fields.get('title', '')} | {fields.get('author', '')} | {n['pieces']} | {n['kept']} |"
        for path, fields, n in report
    )
    dropped = "\n".join(
        f"- {why}: {n}" for why, n in sorted(drops.items(), key=lambda item: (-item[1], item[0]))
    )
    method = (
        "titles" if args.prompts == "template" else f"{args.llm_model}, as are the reasoning traces"
    )
    return f"""# Data card: {Path(args.out).name}

{len(train)} training examples (prompt, human story, reasoning trace or "") and {len(test)} test prompts from
{len(report)} anthologies. Stories of {args.min_words} to {args.max_words} words; prompts come from {method}.

Made by `data.py build`: each book is split at the headings that its contents list names (or, without a list, at its
headings of one style); front matter, notes, epigraphs and bylines are taken off; verse, plays, lists, essays and
near-duplicates are left out, by rules, so a few of either kind will have slipped through. Test authors are in no
training example.

Licence: the texts of Project Gutenberg are in the public domain in the USA; elsewhere the law of the country decides.
Its header, footer and licence are not part of the stories. Of any other book the user must know the rights.

## Left out
{dropped or "- nothing"}
{"".join(f"- book not used: {problem}" + chr(10) for problem in problems)}
## Lengths of the stories, in words
```
{histogram([len(example.story.split()) for example in train])}
```

## Sources
| file | title | author | pieces | kept |
|---|---|---|---|---|
{rows}
"""


def build(args) -> None:
    if args.min_words > args.max_words:
        raise DataError(
            f"--min-words {args.min_words} is above --max-words {args.max_words}; swap them"
        )
    if args.prompts_only:
        examples = [example for path in args.books for example in load_prompts(path)]
        write_examples(Path(args.out), examples)
        print(
            f"{args.out}: {len(examples)} prompts without stories; train with --no-anchor, or use them to evaluate"
        )
        return
    examples, report, problems = collect(args)
    if not report:
        raise DataError("\n".join(problems))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    drops = sum((counts for _, _, counts in report), Counter())
    pieces, kept = drops.pop("pieces", 0), drops.pop("kept", 0)
    print(
        f"{len(report)} books, {pieces} pieces, {kept} stories kept; left out: "
        + (_list_counts(drops) or "nothing")
    )
    if not examples:
        raise DataError(
            f"none of the {pieces} pieces is a story of --min-words to --max-words: {_list_counts(drops)}"
        )
    if args.prompts == "llm":
        examples, lost = back_translate(examples, args)
        drops += lost
        if args.dry_run:
            return
    train, test = split_authors(examples, args.test_share) if args.test else (examples, [])
    write_examples(Path(args.out), train)
    if args.test:
        write_examples(Path(args.test), test)
    card = Path(args.out).with_suffix(".card.md")
    write_file(card, data_card(args, report, problems, drops, train, test))
    held_out = f"; {args.test}: {len(test)} prompts" if args.test else ""
    print(f"{args.out}: {len(train)} examples{held_out}; {card}")


def _list_counts(counts: Counter) -> str:
    return ", ".join(f"{n} {why}" for why, n in counts.most_common())


def load_prompts(path: str) -> list[Example]:
    """Prompts without stories from JSON or JSONL: objects whose "prompt" is text or a list of chat messages (as in the
    datasets that verl reads). Raises DataError where there is none, or no length."""
    text = read_text(Path(path))
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        what = (
            f"broken JSON ({error}); give a JSON list or JSONL (`to_json` of a dataset writes it)"
        )
        raise DataError(f"{path}: {what}") from None
    examples = []
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if isinstance(prompt, list):
            prompt = next((m.get("content") for m in prompt if m.get("role") == "user"), None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f'{path}: row {number} has no "prompt" (text, or a list with a user message); add it'
            )
        words = requested_words(prompt) or row.get("target_words")
        if not isinstance(words, int):
            raise DataError(
                f'{path}: row {number} asks for no length; end it with "{length_sentence(1500)}"'
            )
        examples.append(
            Example(f"{Path(path).stem}-{number}", prompt.strip(), words, source=Path(path).name)
        )
    return examples


def gutenberg(args) -> None:
    """Download books one at a time into a folder; those that are there already are not fetched again."""
    catalog = Path(__file__).with_name("gutenberg.tsv").read_text("utf-8").splitlines()[1:]
    titles = {
        book: f"{title}, {author}"
        for book, title, author, *_ in (line.split("\t") for line in catalog)
    }
    if args.list:
        print("\n".join(f"{book:>6}  {title}" for book, title in titles.items()))
        return
    out, failed, session = Path(args.out), [], requests.Session()
    session.headers["User-Agent"] = "polaris-data/1.0 (one request at a time)"
    for book in (bar := tqdm(args.ids or list(titles), desc="books", unit="book")):
        path = out / f"{book}.txt"
        if path.exists():
            continue
        bar.set_postfix_str(titles.get(book, book)[:40])
        if problem := fetch(
            session, args.mirror.rstrip("/") + f"/cache/epub/{book}/pg{book}.txt", path, args.pause
        ):
            failed.append(f"{book}: {problem}")
    if failed:
        raise DataError(
            "\n".join([*failed, "run the same command again for these; the others are there"])
        )
    print(
        f"{out}: {len(list(out.glob('*.txt')))} books; next: python data.py build {out}/*.txt --out train.jsonl"
    )


def fetch(session: requests.Session, url: str, path: Path, pause: float) -> str:
    """Download one text; "" or what went wrong after three tries."""
    for attempt in range(3):
        time.sleep(pause * 2**attempt)
        try:
            reply = session.get(url, timeout=(10, 60))
        except requests.RequestException as error:
            problem = f"{url} cannot be reached ({type(error).__name__}); check the network, or give another --mirror"
            continue
        if reply.status_code == 200:
            text = reply.content.decode("utf-8", "replace")
            if "project gutenberg" not in text[:5000].lower() or "<html" in text[:500].lower():
                return f"{url} is no Gutenberg text; give another --mirror"
            write_file(path, text.replace("\r\n", "\n"))
            return ""
        problem = f"{url} answers {reply.status_code}"
        if reply.status_code < 500 and reply.status_code != 429:
            return f"{problem}; check the number, or give another --mirror"
        if (wait := reply.headers.get("Retry-After", "")).isdigit():
            time.sleep(min(int(wait), 120))
    return problem


def main(argv: list[str] | None = None) -> None:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Stories in: anthologies -> prompt-story pairs for POLARIS."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    c = commands.add_parser(
        "build", help="split anthologies into prompt-story pairs", formatter_class=defaults
    )
    c.set_defaults(run=build)
    c.add_argument(
        "books",
        nargs="+",
        help="anthologies as plain text or EPUB (with --prompts-only: JSON or JSONL)",
    )
    c.add_argument(
        "--out", default="train.jsonl", help="examples to write; a data card is put beside it"
    )
    c.add_argument("--min-words", type=int, default=1000, help="shortest story kept")
    c.add_argument("--max-words", type=int, default=4000, help="longest story kept")
    c.add_argument(
        "--show",
        action="store_true",
        help="print the contents found in each book, with word counts",
    )
    c.add_argument(
        "--test", help="write prompts of held-out authors here, asking for 1,000 to 12,000 words"
    )
    c.add_argument(
        "--test-share",
        type=float,
        default=0.1,
        help="share of the stories that --test holds out, at most",
    )
    c.add_argument(
        "--prompts-only",
        action="store_true",
        help="read prompts without stories: no anchors from these",
    )
    c.add_argument(
        "--prompts",
        choices=["template", "llm"],
        default="template",
        help="from titles, or by an LLM",
    )
    c.add_argument("--llm-url", help="OpenAI-style endpoint, e.g. http://127.0.0.1:8000/v1")
    c.add_argument("--llm-model", help="model name at that endpoint")
    c.add_argument(
        "--llm-key-env", default="LLM_API_KEY", help="environment variable that holds the key"
    )
    c.add_argument("--llm-body", default="{}", help="JSON with further fields of every request")
    c.add_argument("--llm-concurrency", type=int, default=8, help="requests at a time")
    c.add_argument("--llm-rpm", type=int, default=0, help="requests per minute (0: no limit)")
    c.add_argument("--price-in", type=float, default=0.0, help="dollars per million tokens in")
    c.add_argument("--price-out", type=float, default=0.0, help="dollars per million tokens out")
    c.add_argument(
        "--dry-run", action="store_true", help="with --prompts llm: only say what it would cost"
    )

    c = commands.add_parser(
        "gutenberg", help="download anthologies from Project Gutenberg", formatter_class=defaults
    )
    c.set_defaults(run=gutenberg)
    c.add_argument("ids", nargs="*", help="book numbers; none: the bundled list of anthologies")
    c.add_argument("--out", default="books", help="folder to fill")
    c.add_argument(
        "--mirror", default="https://www.gutenberg.org", help="server with /cache/epub/ID/pgID.txt"
    )
    c.add_argument("--pause", type=float, default=2.0, help="seconds between requests")
    c.add_argument("--list", action="store_true", help="print the bundled list")

    args = parser.parse_args(argv)
    if args.command == "build" and args.prompts == "llm" and not (args.llm_url and args.llm_model):
        parser.error("--prompts llm needs --llm-url and --llm-model")
    try:
        args.run(args)
    except (DataError, ChatStop) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
