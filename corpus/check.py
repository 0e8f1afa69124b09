"""`data.py check`: every bad line of a file of examples, and what would spoil training."""

import argparse
import hashlib
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus.headings import author_key
from corpus.pairs import examples_of
from data import DataError, Example, encode_anchor, encode_prompt, read_examples
from reward import requested_words

TEXTS = [  # field, what spoils it, what to do
    ("story", r"<newline>", "`data.py pairs` writes line breaks"),
    ("prompt", r"\[\s*(?:WP|EU|CW|SP|TT|PI|IP|MP|OT|RF|PM|CC)\s*\]", "`data.py pairs` removes it"),
    (
        "story",
        r"</?(?:p|br|div|span|i|em|b|strong)\b[^>]*>|&(?:amp|nbsp|quot|lt|gt|#\d+);",
        "remove HTML",
    ),
    ("story", r"\u00e2\u20ac.|\u00c3[\u0080-\u00bf]|\ufffd", "it was read in the wrong encoding"),
    (
        "story",
        r"(?i)project gutenberg|\ball rights reserved|https?://\S+",
        "remove what is no story",
    ),
    (
        "story",
        r"^\W*[A-Z]{2,}[ ,]+[A-Z]{2,}(?=.*[a-z])|^\W*[A-Z][A-Z']+ [a-z]",
        "an opening in capitals",
    ),
    ("story", r"^\s*(?:[a-z]|[,;:)\u2026]|\.{2,})", "is its start cut off?"),
    ("story", r"[\w,;:\u2013]{1,20}[\s_*\"')\]]*$", "is its end cut off?"),
    ("story", r"(?s)^(?:.{0,400} [.,] ){4}", "words and marks are written apart; `data.py pairs`"),
]


def histogram(lengths: list[int]) -> str:
    """A line for each 500 words, at most 40 # long."""
    counts = Counter(words // 500 * 500 for words in lengths)
    top = max(counts.values(), default=1)
    lines = []
    for low, n in sorted(counts.items()):
        bar = "#" * math.ceil(40 * n / top)
        lines.append(f"{low:>6}-{low + 499:<6} {n:>5}  {bar}")
    return "\n".join(lines)


def findings(examples: list[Example], max_response: int, tokens: dict[str, int]) -> list[str]:
    """What would spoil training, each kind once with its count and an example."""
    found = []

    def report(hits: list[tuple[Example, str]], what: str, of: int = len(examples)) -> None:
        if hits:
            example, shown = hits[0]
            found.append(f"{len(hits)} of {of} {what}; e.g. {example.uid}: {shown}")

    stories = [example for example in examples if example.story]
    for field, pattern, how in TEXTS:
        spoilt = re.compile(pattern)
        matches = [(e, spoilt.search(getattr(e, field).strip())) for e in examples]
        hits = [(e, m[0].strip()[:40]) for e, m in matches if m and getattr(e, field)]
        name = "stories" if field == "story" else "prompts"
        shown = Counter(text for _, text in hits).most_common(1)
        label = f'"{shown[0][0]}"' if shown and len({text for _, text in hits}) < 4 else "this"
        near = [
            (e, repr(e.story[-60:] if "end" in how else getattr(e, field)[:60])) for e, _ in hits
        ]
        report(near, f"{name} have {label} ({how})")
    lengths = {e.uid: len(e.story.split()) for e in stories}
    far = [e for e in stories if not 0.5 <= lengths[e.uid] / e.target_words <= 2]
    report(
        [(e, f"asked {e.target_words:,} words, story {lengths[e.uid]:,}") for e in far],
        "targets are far from the story's length (half of it, or twice)",
    )
    bare = [e for e in examples if requested_words(e.prompt) is None]
    report(
        [(e, repr(e.prompt[-60:])) for e in bare],
        'prompts name no length ("… 1500 words long."), so the policy cannot know target_words',
    )
    same = defaultdict(list)
    for e in stories:
        same[" ".join(re.findall(r"\w+", e.story.lower()))[:2000]].append(e)
    report(
        [(group[1], f"same as {group[0].uid}") for group in same.values() if len(group) > 1],
        "stories are in the file more than once",
    )
    size = tokens or {uid: int(1.35 * n) for uid, n in lengths.items()}
    over = [e for e in stories if size.get(e.uid, 0) > max_response]
    about = "" if tokens else "about "
    report(
        [(e, f"{about}{size[e.uid]:,} tokens") for e in over],
        f"anchors are over {max_response:,} tokens and will be left out",
    )
    authors = Counter(e.source.split(" | ")[1] for e in stories if e.source.count(" | ") > 1)
    for author, n in authors.most_common(1):
        if author_key(author) and len(stories) > 9 and n > 0.2 * len(stories):
            how = "`build --per-author N` limits it"
            found.append(
                f"{n} of {len(stories)} stories are by {author} ({n / len(stories):.0%}); {how}"
            )
    return found


def pairs_hint(path: str) -> str:
    """What a file of other columns is, and the command that reads it; "" if it is none."""
    try:
        _, _, columns = examples_of(Path(path), {})
    except DataError:
        return ""
    seen = ", ".join(f"{column} ({field})" for field, column in columns.items())
    command = f"python data.py pairs {path} --prompt {columns['prompt']} --story {columns['story']}"
    return f"{path}: no examples yet, but pairs; columns seen: {seen}; run `{command}`"


def grouped(problems: list[str]) -> list[str]:
    """One message for many lines that have the same fault."""
    places = defaultdict(list)
    for problem in problems:
        place, _, what = problem.partition(": ")
        places[what].append(place)
    lines = []
    for what, where in places.items():
        if len(where) < 4:
            lines += [f"{place}: {what}" for place in where]
        else:
            others = ", ".join(place.rpartition(":")[2] for place in where[1:6])
            more = ", …" if len(where) > 6 else ""
            lines.append(f"{where[0]}: {what} ({len(where)} lines: also {others}{more})")
    return lines


def tokenizer_of(folder: str) -> Any:
    """The tokenizer of a model's folder. DataError where there is none."""
    from transformers import AutoTokenizer  # seconds, which no other command needs

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        what = f"no tokenizer ({str(error).splitlines()[0]}); give a model's folder"
        raise DataError(f"--tokenizer {folder}: {what}") from None


def count_tokens(examples: list[Example], args: argparse.Namespace) -> dict[str, int]:
    """Tokens of each anchor; prints the lengths of prompts and anchors beside the limits."""
    tokenizer = tokenizer_of(args.tokenizer)
    prompts, anchors = [], {}
    for example in tqdm(examples):
        prompts.append(len(encode_prompt(tokenizer, example.prompt, args.thinking)))
        if example.story:
            anchor = encode_anchor(tokenizer, example, args.thinking, sys.maxsize)
            anchors[example.uid] = len(anchor or [])
    over = sum(n > args.max_prompt for n in prompts)
    print(f"prompts: up to {max(prompts)} tokens; {over} over {args.max_prompt}")
    if anchors:
        mean = sum(anchors.values()) / len(anchors)
        fit = sum(n <= args.max_response for n in anchors.values()) / len(anchors)
        share = f"{fit:.1%} fit {args.max_response}"
        print(f"anchors: {mean:.0f} tokens on average, up to {max(anchors.values())}; {share}")
    return anchors


def check(args: argparse.Namespace) -> int:
    """Print every problem of a file, then what is in it. Exit status 2 if there is a problem."""
    examples, problems = read_examples(args.file, not args.prompts_only, args.thinking)
    hint = pairs_hint(args.file) if problems and not examples else ""
    for line in [hint] if hint else grouped(problems):
        print(line)
    words = [len(example.story.split()) for example in examples if example.story]
    traces = sum(bool(example.reasoning) for example in examples)
    what = f"{len(words)} stories, {traces} reasoning traces"
    print(f"{len(examples)} good examples, {len(problems)} bad lines; {what}")
    if words:
        mean = sum(words) / len(words)
        print(f"words of the stories: {min(words)} to {max(words)}, mean {mean:.0f}")
        print(histogram(words))
    tokens = count_tokens(examples, args) if args.tokenizer and examples else {}
    for warning in findings(examples, args.max_response, tokens):
        print(f"warning: {warning}")
    by_chance = sorted(examples, key=lambda e: hashlib.sha256(e.uid.encode()).digest())
    for example in by_chance[: args.sample]:
        print(f"sample {example.uid}: {example.prompt[:200]!r}")
        if example.story:
            print(f"    {example.story[:90]!r} … {example.story[-90:]!r}")
    return 2 if problems else 0
