"""Anthologies -> prompt–story pairs; the program behind `data.py build` and `data.py gutenberg`.

books -> stories (books.py) -> no near-duplicates, wanted lengths only -> prompts from titles, or by
an LLM with reasoning traces (prompts.py) -> train and test without a common author, and a data card
"""

import argparse
import hashlib
import os
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import rundir
from chat import ChatOptions, ChatStop, add_options, options_from
from corpus import gutenberg
from corpus.books import read_book, round_words
from corpus.check import check, histogram, tokenizer_of
from corpus.headings import author_key
from corpus.pairs import COLUMNS, SHAPES, load_prompts, pairs, write_examples
from corpus.prompts import Writer, length_sentence, template_prompt
from corpus.text import key
from data import DataError, Example

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


class Collected(NamedTuple):
    """What came of the books."""

    examples: list[Example]  # with a prompt from the title
    books: list[Book]
    problems: list[str]  # why others were left out
    warnings: list[str]


def collect(args: argparse.Namespace) -> Collected:
    """Books -> examples, without near-duplicates."""
    found = Collected([], [], [], [])
    owner: dict[int, str] = {}  # hash of a phrase -> uid of a story that has it
    uids: Counter[str] = Counter()
    tales: dict[str, str] = {}  # title -> uid
    authors: dict[str, str] = {}  # uid -> surname
    read = partial(
        read_book, min_words=args.min_words, max_words=args.max_words, one=args.one_per_file
    )
    paths = args.books
    with ProcessPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        results = list(tqdm(pool.map(read, paths), total=len(paths), desc="books", unit="book"))
    for path, reading in zip(map(Path, paths), results, strict=True):
        found.warnings.extend(reading.warnings)
        if reading.problem:
            found.problems.append(reading.problem)
            continue
        fields = reading.fields
        lines = [f"{path}: {fields.get('title', '?')} by {fields.get('author', '?')}"]
        counts = Counter(pieces=len(reading.pieces))
        for story, why, grams in reading.pieces:
            twin, share = twin_of(grams, owner)
            same = share > 0.2
            note = f"  [same tale as {twin}]" if same else f"  [{why}]" if why else ""
            lines.append(f"{story.line:7d} {story.words:6d}  {story.title[:60]}{note}")
            counts["near-duplicate" if same else why or "kept"] += 1
            if note:
                continue
            uid = f"{path.stem}-{key(story.title).replace(' ', '-')[:60].strip('-')}"
            uids[uid] += 1
            if uids[uid] > 1:
                uid += f"-{uids[uid]}"
            tale = re.sub(r"^(?:the|an?) ", "", key(story.title))
            other = twin if share > 0.02 and len(grams) > 40 else tales.get(tale, "")
            tales.setdefault(tale, uid)
            authors[uid] = author_key(story.author)
            if other and (share > 0 or authors[other] == author_key(story.author)):
                found.warnings.append(f"two tellings of one tale? {other} and {uid}; both are kept")
            owner |= dict.fromkeys(grams, uid)
            target = round_words(story.words)
            prompt = template_prompt(uid, story.title, story.author, story.text, target)
            place = f"{fields.get('title', path.name)} | {story.author} | {path.name}:{story.line}"
            source = f"{place} | template prompt"
            found.examples.append(Example(uid, prompt, target, story.text, source=source))
        found.books.append(Book(path, fields, counts))
        if args.show:
            print("\n".join(lines))
    return found


def twin_of(grams: set[int], owner: dict[int, str]) -> tuple[str, float]:
    """The story that shares most of these phrases, and the share; above 0.2 it is the same one."""
    common = Counter(owner[gram] for gram in grams if gram in owner)
    n, twin = max(((n, uid) for uid, n in common.items()), default=(0, ""))
    return twin, n / max(1, len(grams))


def author_of(example: Example) -> str:
    """The author's surname; of an unknown one, the file."""
    _, author, place, *_ = example.source.split(" | ")
    return author_key(author) or place.partition(":")[0]


def cap_authors(examples: list[Example], most: int) -> list[Example]:
    """At most so many stories of each author, drawn by uid, in their order."""
    groups = defaultdict(list)
    for example in sorted(examples, key=lambda e: digest(e.uid)):
        groups[author_of(example)].append(example.uid)
    kept = {uid for group in groups.values() for uid in group[:most]}
    return [example for example in examples if example.uid in kept]


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_authors(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Train examples and test prompts, no author in both.

    Test prompts ask for 1,000 to 12,000 words, the six buckets in turn, and have no story: theirs
    has another length.
    """
    groups = defaultdict(list)
    for example in examples:
        groups[author_of(example)].append(example)
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


# ------------------------------------------------------------------------------------------ output


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
    try:
        llm = options_from(vars(args), "llm")
    except ValueError as error:
        raise DataError(f"an --llm option cannot be used: {error}") from None
    writer = None
    if args.prompts == "llm":
        tokenizer = tokenizer_of(args.tokenizer) if args.tokenizer else None
        writer = Writer(llm, Path(f"{args.out}.llm"), tokenizer, args.max_prompt)

    examples, books, problems, warnings = collect(args)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
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

    if args.per_author:
        every = len(examples)
        examples = cap_authors(examples, args.per_author)
        drops["above --per-author"] = every - len(examples)
        print(f"--per-author {args.per_author}: {len(examples)} of {every} stories")
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
    left_out += [f"- warning: {warning}" for warning in warnings]
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
    add("books", nargs="+", help="text, EPUB, HTML, Markdown (with --prompts-only: see `pairs`)")
    add("--out", default="train.jsonl", help="examples; a data card is put beside it [%(default)s]")
    add("--min-words", type=int, default=1000, help="shortest story kept [%(default)s]")
    add("--max-words", type=int, default=4000, help="longest story kept [%(default)s]")
    add("--one-per-file", action="store_true", help="every file is one story")
    add("--per-author", type=int, metavar="N", help="keep at most N stories of an author")
    add("--tokenizer", help="folder: count the tokens of --prompts llm instead of words")
    add("--max-prompt", type=int, default=256, help="their limit [%(default)s]")
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
    add("--shelf", choices=gutenberg.SHELVES, default="anthologies", help="list [%(default)s]")
    add("--list", action="store_true", help="print the bundled list")

    c = commands.add_parser("pairs", help="read pairs that you have", epilog=SHAPES)
    c.set_defaults(run=pairs)
    add = c.add_argument
    add("files", nargs="+", help="JSONL, JSON, CSV, TSV, parquet, .wp_source; gzip or not")
    for field, names in COLUMNS.items():
        add(f"--{field}", metavar="COLUMN", help=f"column [{names.replace(' ', ', ')}]")
    add("--out", default="train.jsonl", help="examples [%(default)s]")
    add("--min-words", type=int, default=50, help="shortest story kept [%(default)s]")
    add("--max-words", type=int, default=12000, help="longest story kept [%(default)s]")

    c = commands.add_parser("check", help="every problem of a JSONL file, and what is in it")
    c.set_defaults(run=check)
    add = c.add_argument
    add("file", help="JSONL of examples")
    add("--tokenizer", help="folder of a tokenizer with a chat template: count tokens")
    add("--thinking", action="store_true", help="anchors need a reasoning trace")
    add("--prompts-only", action="store_true", help="stories may be missing")
    add("--max-prompt", type=int, default=256, help="limit in tokens [%(default)s]")
    add("--max-response", type=int, default=8192, help="limit of anchors [%(default)s]")
    add("--sample", type=int, default=3, help="examples to show [%(default)s]")

    for option in argv:
        old = option.partition("=")[0]
        if old in RENAMED:
            parser.error(f"{old} is now {RENAMED[old]}")
    args = parser.parse_args(argv)
    if args.command == "build" and args.prompts == "llm" and not (args.llm_url and args.llm_model):
        parser.error("--prompts llm needs --llm-url and --llm-model")
    try:
        status = args.run(args)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    except ChatStop as error:
        parser.exit(3, f"{error}\n")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
