"""Anthologies -> prompt–story pairs; the program behind `data.py build` and `data.py gutenberg`.

books -> stories (books.py) -> no near-duplicates, wanted lengths only -> prompts from titles, or by
an LLM with reasoning traces (prompts.py) -> train and test without a common author, and a data card
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import rundir
from chat import ChatOptions, ChatStop, add_options, options_from
from corpus import gutenberg
from corpus.books import read_book, round_words
from corpus.headings import author_key, title_case
from corpus.prompts import Writer, length_sentence
from corpus.text import key, read_text
from data import DataError, Example, histogram
from reward import requested_words

RENAMED = {
    "--llm-body": "--llm-extra",
    "--price-in": "--llm-price-in",
    "--price-out": "--llm-price-out",
}
BUCKETS = [  # words of test prompts
    (1000, 2000), (2000, 3000), (3000, 4000), (4000, 6000), (6000, 8000), (8000, 12000),
]  # fmt: skip


class Book(NamedTuple):
    path: Path
    fields: dict[str, str]  # title, author ...
    counts: Counter[str]  # pieces; kept; the others by the reason why they were dropped


# ------------------------------------------------------------------------------- books -> examples


def collect(
    paths: list[str], min_words: int, max_words: int, show: bool
) -> tuple[list[Example], list[Book], list[str]]:
    """Books -> examples with a prompt from the title, the books, and why others were left out."""
    examples = []
    books = []
    problems = []
    owner: dict[int, str] = {}  # hash of a phrase -> uid of a story that has it
    uids: Counter[str] = Counter()
    read = partial(read_book, min_words=min_words, max_words=max_words)
    with ProcessPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        results = list(tqdm(pool.map(read, paths), total=len(paths), desc="books", unit="book"))
    for path, (problem, warnings, fields, pieces) in zip(map(Path, paths), results, strict=True):
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if problem:
            problems.append(problem)
            continue
        lines = [f"{path}: {fields.get('title', '?')} by {fields.get('author', '?')}"]
        counts = Counter(pieces=len(pieces))
        for story, why, grams in pieces:
            twin = twin_of(grams, owner)
            note = f"  [same tale as {twin}]" if twin else f"  [{why}]" if why else ""
            lines.append(f"{story.line:7d} {story.words:6d}  {story.title[:60]}{note}")
            counts["near-duplicate" if twin else why or "kept"] += 1
            if note:
                continue
            uid = f"{path.stem}-{key(story.title).replace(' ', '-')[:60].strip('-')}"
            uids[uid] += 1
            if uids[uid] > 1:
                uid += f"-{uids[uid]}"
            owner |= dict.fromkeys(grams, uid)
            target = round_words(story.words)
            title = f'"{title_case(story.title)}"'
            prompt = f"Write a short story with the title {title}. {length_sentence(target)}"
            place = f"{fields.get('title', path.name)} | {story.author} | {path.name}:{story.line}"
            source = f"{place} | template prompt"
            examples.append(Example(uid, prompt, target, story.text, source=source))
        books.append(Book(path, fields, counts))
        if show:
            print("\n".join(lines))
    return examples, books, problems


def twin_of(grams: set[int], owner: dict[int, str]) -> str:
    """The uid of a story that shares more than a fifth of these phrases, or ""."""
    shared = Counter(owner[gram] for gram in grams if gram in owner)
    common, twin = max(((n, uid) for uid, n in shared.items()), default=(0, ""))
    return twin if common > 0.2 * len(grams) else ""


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_authors(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Train examples and test prompts, no author in both.

    Test prompts ask for 1,000 to 12,000 words, the six buckets in turn, and have no story: theirs
    has another length.
    """
    groups = defaultdict(list)
    for example in examples:
        _, author, place, *_ = example.source.split(" | ")
        groups[author_key(author) or place.partition(":")[0]].append(example)
    test: list[Example] = []
    for name in sorted(groups, key=digest):  # whole authors until the share is reached
        if len(test) + len(groups[name]) <= share * len(examples):
            test += groups[name]
    held_out = {example.uid for example in test}
    prompts = []
    for i, example in enumerate(sorted(test, key=lambda e: digest(e.uid))):
        low, high = BUCKETS[i % len(BUCKETS)]
        words = low + digest(example.uid) % ((high - low) // 100) * 100
        old, new = length_sentence(example.target_words), length_sentence(words)
        prompt = example.prompt.replace(old, new)
        prompts.append(replace(example, prompt=prompt, target_words=words, story="", reasoning=""))
    return [example for example in examples if example.uid not in held_out], prompts


def load_prompts(path: Path) -> list[Example]:
    """Prompts without stories from JSON or JSONL, one in each object: text or chat messages."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        how = "give a JSON list or JSONL (`to_json` of a dataset writes it)"
        raise DataError(f"{path}: broken JSON ({error}); {how}") from None
    examples = []
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if isinstance(prompt, list):
            prompt = next((m.get("content") for m in prompt if m.get("role") == "user"), None)
        if not isinstance(prompt, str) or not prompt.strip():
            what = 'has no "prompt" (text, or a list with a user message); add it'
            raise DataError(f"{path}: row {number} {what}")
        words = requested_words(prompt) or row.get("target_words")
        if not isinstance(words, int):
            what = f'asks for no length; end it with "{length_sentence(1500)}"'
            raise DataError(f"{path}: row {number} {what}")
        uid = f"{path.stem}-{number}"
        examples.append(Example(uid, prompt.strip(), words, source=path.name))
    return examples


# ------------------------------------------------------------------------------------------ output


def write_examples(path: str, examples: list[Example]) -> None:
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rundir.write(Path(path), "".join(lines))


def build(args: argparse.Namespace) -> None:
    """`data.py build`. DataError or ChatStop, and no example written, where it fails."""
    if args.min_words > args.max_words:
        limits = f"--min-words {args.min_words} is above --max-words {args.max_words}"
        raise DataError(f"{limits}; swap them")
    if args.prompts_only:
        examples = [example for path in args.books for example in load_prompts(Path(path))]
        write_examples(args.out, examples)
        use = "train with --no-anchor, or use them to evaluate"
        print(f"{args.out}: {len(examples)} prompts without stories; {use}")
        return
    llm = options_from(vars(args), "llm")
    writer = Writer(llm, Path(f"{args.out}.llm")) if args.prompts == "llm" else None

    examples, books, problems = collect(args.books, args.min_words, args.max_words, args.show)
    if not books:
        raise DataError("\n".join(problems))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    drops = sum((book.counts for book in books), Counter())
    pieces, kept = drops.pop("pieces", 0), drops.pop("kept", 0)
    listed = ", ".join(f"{n} {why}" for why, n in drops.most_common())
    found = f"{len(books)} books, {pieces} pieces, {kept} stories kept"
    print(f"{found}; left out: {listed or 'nothing'}")
    if not examples:
        wanted = "a story of --min-words to --max-words"
        raise DataError(f"none of the {pieces} pieces is {wanted}: {listed}")

    method = "titles"
    if writer:
        writer.print_estimate(examples)
        if args.dry_run:
            return
        examples, lost = writer.back_translate(examples)
        drops += lost
        method = f"{llm.model}, as are the reasoning traces"
    train, test = split_authors(examples, args.test_share) if args.test else (examples, [])
    write_examples(args.out, train)
    if args.test:
        write_examples(args.test, test)

    dropped = sorted(drops.items(), key=lambda item: (-item[1], item[0]))
    left_out = [f"- {why}: {n}" for why, n in dropped] or ["- nothing"]
    left_out += [f"- book not used: {problem}" for problem in problems]
    rows = [
        f"| {path.name} | {fields.get('title', '')} | {fields.get('author', '')} "
        f"| {counts['pieces']} | {counts['kept']} |"
        for path, fields, counts in books
    ]
    card = Path(args.out).with_suffix(".card.md")
    template = Path(__file__).with_name("card.md").read_text("utf-8")
    text = template.format(
        name=Path(args.out).name,
        args=args,
        train=len(train),
        test=len(test),
        books=len(books),
        method=method,
        dropped="\n".join(left_out),
        lengths=histogram([len(example.story.split()) for example in train]),
        rows="\n".join(rows),
    )
    rundir.write(card, text)
    held_out = f"; {args.test}: {len(test)} prompts" if args.test else ""
    print(f"{args.out}: {len(train)} examples{held_out}; {card}")


# ------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> None:
    """Exit status: 0 done; 2 settings or input; 3 the LLM failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="data.py", description="books -> prompt–story pairs")
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("build", help="split anthologies into prompt–story pairs")
    c.set_defaults(run=build)
    add = c.add_argument
    add("books", nargs="+", help="plain text or EPUB (with --prompts-only: JSON or JSONL)")
    add("--out", default="train.jsonl", help="examples; a data card is put beside it [%(default)s]")
    add("--min-words", type=int, default=1000, help="shortest story kept [%(default)s]")
    add("--max-words", type=int, default=4000, help="longest story kept [%(default)s]")
    add("--show", action="store_true", help="print the contents found in each book, with words")
    add("--test", help="write prompts of held-out authors here, asking for 1,000 to 12,000 words")
    add("--test-share", type=float, default=0.1, help="held out with --test, at most [%(default)s]")
    add("--prompts-only", action="store_true", help="read prompts without stories: no anchors")
    add("--prompts", choices=["template", "llm"], default="template", help="from titles or an LLM")
    add("--dry-run", action="store_true", help="with --prompts llm: only say what it would cost")
    add_options(c, "llm", ChatOptions(key_env="LLM_API_KEY", concurrency=8))

    c = commands.add_parser("gutenberg", help="download anthologies from Project Gutenberg")
    c.set_defaults(run=gutenberg.download)
    add = c.add_argument
    add("ids", nargs="*", help="book numbers; none: the bundled list of anthologies")
    add("--out", default="books", help="folder to fill [%(default)s]")
    add("--mirror", default="https://www.gutenberg.org", help="server with /cache/epub/ID/pgID.txt")
    add("--pause", type=float, default=2.0, help="seconds between requests [%(default)s]")
    add("--list", action="store_true", help="print the bundled list")

    for option in argv:
        old = option.partition("=")[0]
        if old in RENAMED:
            parser.error(f"{old} is now {RENAMED[old]}")
    args = parser.parse_args(argv)
    if args.command == "build" and args.prompts == "llm" and not (args.llm_url and args.llm_model):
        parser.error("--prompts llm needs --llm-url and --llm-model")
    try:
        args.run(args)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    except ChatStop as error:
        parser.exit(3, f"{error}\n")


if __name__ == "__main__":
    main()
