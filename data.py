"""Stories in: examples, the chat template, anchors; anthologies -> prompt-story pairs.

An example is one line of JSON:  {"uid", "prompt", "target_words", "story", "reasoning", "source"}.
With human-reference injection (arXiv 2606.04095) its story is the *anchor* of the prompt's group, a teacher-forced row
    prompt tokens | reasoning </think> story EOS
exactly as the model's own chat template would write it, so that the policy could have sampled it. The length target is
the N of the prompt's "N words long", else target_words; words here are runs of non-space.

The paper's 1,388 pairs come from 100 anthologies and cannot be shared. `build` makes such pairs from any anthology:
books -> pieces (split by recurrence, see below) -> stories (filters, no near-duplicates) -> prompts (from the title, or
by an LLM together with a reasoning trace) -> train and test, split by author. The method and the checks are ours.

    python data.py gutenberg --out books/                     85 public-domain anthologies, one request at a time
    python data.py build books/*.txt --out train.jsonl --test test.jsonl [--show]
    python data.py build books/*.txt --prompts llm --llm-url URL --llm-model NAME [--dry-run]
    python data.py check train.jsonl [--tokenizer DIR --thinking]
"""

from __future__ import annotations

import argparse
import bisect
import difflib
import hashlib
import itertools
import json
import os
import posixpath
import re
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import requests
from tqdm import tqdm

from judge import Judge, JudgeStop, _Fault, api_key, requested_words


class DataError(ValueError):
    """Input that cannot be used. The message says where (file:line), what is wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    uid: str
    prompt: str
    target_words: int  # requested length of the story, in words
    story: str = ""  # the human story: the anchor
    reasoning: str = ""  # the plan inside the anchor's <think> block
    source: str = ""


# What a chat template gives a meaning to may not come from the data: it would end the turn or open a second block.
MARKUP = re.compile(r"</?think>|<\|[\w ]+\|>")


def parse_example(line: str, anchors: bool, thinking: bool) -> Example:
    """One JSONL line -> Example. ValueError with what is wrong and what to do, without the place."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error}); every line must hold one JSON object, see `data.py check`") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")
    for field in ("uid", "prompt") + ("story",) * anchors + ("reasoning",) * (anchors and thinking):
        if field not in row:
            hint = {
                "story": "add it, or train without anchors (--no-anchor)",
                "reasoning": "thinking is on: add a trace (`data.py build --prompts llm` writes them) or turn it off",
            }.get(field, "add it")
            raise ValueError(f'field "{field}" is missing; {hint}')
    for field in ("uid", "prompt", "story", "reasoning", "source"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f'"{field}" must be text, this is {json.dumps(row[field])[:40]}; put it in quotes')
        found = field not in ("uid", "source") and MARKUP.search(row.get(field, ""))
        if found:
            raise ValueError(f'"{field}" contains {found[0]}, which the chat template writes itself; remove it')
    for field in ("uid", "prompt") + ("story",) * anchors + ("reasoning",) * (anchors and thinking):
        if not row[field].strip():
            raise ValueError(f'"{field}" is empty; fill it in or remove the line')

    asked, target = requested_words(row["prompt"]), row.get("target_words")
    if target is None and asked is None:
        raise ValueError(
            "the prompt asks for no length and there is no target_words; "
            'end the prompt with "The story should be 1500 words long." or add "target_words": 1500'
        )
    if target is not None and (isinstance(target, bool) or not isinstance(target, int) or target < 1):
        raise ValueError(f'"target_words" must be a whole number above 0, this is {json.dumps(target)[:40]}')
    if None not in (asked, target) and asked != target:
        raise ValueError(f'the prompt asks for {asked} words but "target_words" is {target}; make them agree')
    known = {name: row[name] for name in ("uid", "prompt", "story", "reasoning", "source") if name in row}
    return Example(target_words=target or asked, **known)


def read_examples(path: str | Path, anchors: bool, thinking: bool) -> tuple[list[Example], list[str]]:
    """All good examples of a JSONL file and one message ("file:line: what; what to do") per bad line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a JSONL file, e.g. from `python data.py build`"
        ) from None
    examples, problems, first_line = [], [], {}
    for number, data in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            example = parse_example(data.decode("utf-8"), anchors, thinking)
            if example.uid in first_line:
                raise ValueError(f'uid "{example.uid}" is used by line {first_line[example.uid]} too; make it unique')
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8 (byte {error.start}); convert the file to UTF-8")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            first_line[example.uid] = number
            examples.append(example)
    if not examples and not problems:
        problems.append(f"{path}:1: the file holds no example; write one JSON object a line")
    return examples, problems


def load(path: str | Path, *, anchors: bool = True, thinking: bool = False) -> list[Example]:
    """Examples of a JSONL file. anchors: stories are required; with thinking as well, reasoning too.

    The length target is the prompt's "N words long", else the field target_words. Raises DataError for the first bad
    line and says how many more there are.
    """
    examples, problems = read_examples(path, anchors, thinking)
    if problems:
        more = f"\n({len(problems) - 1} more: `python data.py check {path}` lists them)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return examples


def step_examples(examples: list[Example], seed: int, step: int, n: int) -> list[Example]:
    """The n examples of training step `step` (from 1): a pure function of (examples, seed, step), so a resumed run sees
    what it would have seen. Every epoch is a fresh permutation; a step may straddle two epochs."""
    order, chosen = {}, []
    for position in range((step - 1) * n, step * n):
        epoch, place = divmod(position, len(examples))
        if (
            epoch not in order
        ):  # sorting by hash: the same on every platform and in every version, unlike random.shuffle
            order[epoch] = sorted(
                examples, key=lambda e, epoch=epoch: hashlib.sha256(f"{seed}/{epoch}/{e.uid}".encode()).digest()
            )
        chosen.append(order[epoch][place])
    return chosen


# ----------------------------------------------------------------------------------------------------- chat template


def render_prompt(tokenizer, prompt: str, thinking: bool) -> str:
    """The user turn and the opening of the assistant's, as the model's chat template writes them."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def encode_prompt(tokenizer, prompt: str, thinking: bool) -> list[int]:
    """Prompt tokens, up to where the policy starts to write."""
    return tokenizer.encode(render_prompt(tokenizer, prompt, thinking), add_special_tokens=False)


def encode_anchor(tokenizer, example: Example, thinking: bool, max_response: int) -> list[int] | None:
    """Response tokens of the human story, EOS included; None when longer than max_response.

    Templates differ in whether the generation prompt opens the block (Qwen3.5: "<think>\\n"; Qwen3: nothing, and an
    empty block when thinking is off). What the rendered prompt ends with decides, so that there is exactly one <think>.
    Prompt and response are tokenised apart, as they are when the policy writes: no token may straddle the border.
    """
    opened = render_prompt(tokenizer, example.prompt, thinking).rstrip().endswith("<think>")
    story = example.story.strip()
    if thinking:
        if not example.reasoning.strip():
            raise DataError(
                f'example "{example.uid}": thinking is on but "reasoning" is empty; add it or turn thinking off'
            )
        story = ("" if opened else "<think>\n") + example.reasoning.strip() + "\n</think>\n\n" + story
    elif opened:
        raise DataError("this model's template opens <think> even with enable_thinking=False; turn thinking on")
    ids = tokenizer.encode(story, add_special_tokens=False) + [tokenizer.eos_token_id]
    return ids if len(ids) <= max_response else None


def split_response(text: str, thinking: bool) -> tuple[str, str]:
    """Decoded policy text -> (reasoning, story). With thinking on and the block never closed all is reasoning."""
    if not thinking:
        return "", text.strip()
    reasoning, _, story = text.partition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), story.strip()


# -------------------------------------------------------------------------------------------------- books -> stories
#
# A contents list is a stretch of short lines that come back later, in the same order, as headings. That is all that
# is asked of it, so no list has to be labelled, numbered, or spelt in any one way. The headings that it names are
# where stories start; sections (I, II, CHAPTER, named parts) stay inside because no list names them. Where nothing
# recurs, headings are the short blocks that share one style (capitals or not, numbered or not) and the widest gaps.
# Then each piece loses what is not its prose: at its head the byline, source, epigraph, dedication, biographical note
# and first section number; inside it notes and illustration marks; at its end the next title page and printer's lines.

START = re.compile(r"^\W*START OF (?:THE|THIS) PROJECT GUTENBERG|^\W*END\W*THE SMALL PRINT", re.IGNORECASE)
END = re.compile(
    r"^\W*END OF (?:THE |THIS )?PROJECT GUTENBERG|^\W*START: FULL LICENSE|^\W*THIS FILE SHOULD BE NAMED", re.IGNORECASE
)
BRACKETED = re.compile(  # [Illustration: ...], [Footnote 1: ...], with at most one level of brackets inside
    r"\[\s*\W*(?:illustration|picture|image|footnote|transcriber)(?:[^\[\]]|\[[^\[\]]*\]){0,3000}\]", re.IGNORECASE
)
NUMERAL = r"(?:(?=[IVXLC])(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})|\d+)"
ORDINAL = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|first|second|third|fourth|fifth|sixth|seventh|last)"
DIVISION = r"(?:chap(?:ter)?|part|book|vol(?:ume)?|section|canto|letter|scene|act|story|episode)"
NUMBERING = re.compile(  # "IV. ", "3 -- ", "ADVENTURE I. ", "No. 1--", "II     "
    rf"^(?:(?:adventure|chap(?:ter)?|story|tale|no|number)\b\.?\s*)?"
    rf"(?:{NUMERAL}(?:[.):]+\s*|\s*(?:--+|[\u2013\u2014])\s*|\s{{2,}})|(?-i:[IVX]{{2,}}) )(?=\S)",
    re.IGNORECASE,
)
SECTION = re.compile(  # "IV.", "CHAPTER 3", "Part the Second", "FIRST STORY"
    rf"^[\W_]*(?:(?:the )?{DIVISION}\b[\s.]*)?(?:{NUMERAL}\b|(?:the )?{ORDINAL}(?: {DIVISION})?)[\W_]*$", re.IGNORECASE
)
FURNITURE = re.compile(  # what a book holds besides its stories; on keys
    r"(?:the )?(?:(?:author|editor|translator|publisher|transcriber)s? )?(?:"
    r"(?:preface|foreword|introduction|foot ?notes?|end ?notes|appendix|appendices|index)(?: .*)?"
    r"|(?:introductory|prefatory|biographical|explanatory)(?: (?:note|essay))?|(?:contents|notes?)(?: (?:to|on) .*)?"
    r"|dedication|acknowledge?ments?|glossary|bibliography|errata|addenda|(?:list of )?illustrations|the end|finis|end"
    r"|l ?envoi|by the same author)"
)
FOOTNOTES = re.compile(r"foot ?notes?(?: .{0,40})?")  # these may close a section, and the story goes on
BYLINE = re.compile(
    r"^[\s_(*\[]*by\b[:\s]+(\S.*)$|^_([A-Z][\w.]*(?: [A-Z][\w.'\u2019-]*){1,3})_(?: \(.*\))?$", re.IGNORECASE
)
SOURCE = re.compile(r"^\s*(?:[\[(].*[\])]\W*$|_?from _|\W*copyright\b|\W*reprinted )", re.IGNORECASE)
ATTRIBUTION = re.compile(
    r"(?:(?:--|[\u2014\u2013])\s*_?[A-Z][\w.,'\u2019\" ]{1,60}|[ _](?:Proverb|Saying|Song|Ballad|Psalm|Anon))\W*$"
)
SCENE_BREAK = re.compile(r"^[\s*.·•+=~#_\-\u2013\u2014\u2015]*$")
NOTE = re.compile(r"^\s*(?:[\[({]\*?(?:\d{1,3}|[A-Z])[\])}]|\*+\s?[A-Za-z\"\u201c_])")
NOTE_MARK = re.compile(
    r"\s?\[\*?(?:\d{1,3}|[A-Z]|\*+)\]|\{\d{1,3}\}|(?<=\S)\(\*?\d{1,3}\)"
    r"|(?<=[\w.,;:!?'\"\u201d\u2019])\*+(?=[\s.,;:!?'\"\u201d\u2019]|$)"
)
LAST_LINE = re.compile(
    r"[\W_]*(?:(?:the end|finis|end of (?:the )?(?:vol|book|first|second).{0,40})[\W_]*$|printed (?:in|by|at)\b)", re.I
)
SENTENCE_END = re.compile(r"[.!?:,;'\"\u2019\u201d\u2014-][)_]*$")


@dataclass
class Block:
    """Consecutive non-blank lines of a book."""

    line: int  # number of the first one in the file, from 1
    gap: int  # blank lines before it
    lines: list[str]

    @property
    def text(self) -> str:
        return " ".join(line.strip() for line in self.lines)


@dataclass
class Story:
    title: str
    author: str
    text: str
    line: int  # of its heading in the file, from 1


def blocks_of(text: str) -> tuple[dict[str, str], list[Block]]:
    """Header fields (title, author ...) and the blocks between the Gutenberg header and footer, where there are any."""
    text = BRACKETED.sub(lambda match: "\n" * match[0].count("\n"), text.replace("\t", "    "))
    lines = [line.rstrip() for line in text.split("\n")]
    starts = [i for i, line in enumerate(lines[: len(lines) // 2]) if START.search(line)]
    first = starts[-1] + 1 if starts else 0
    last = next((i for i in range(first, len(lines)) if END.search(lines[i])), len(lines))
    fields: dict[str, str] = {}
    for line in lines[: first or 60]:
        name, colon, value = line.partition(":")
        if colon and name in ("Title", "Author", "Editor", "Language"):
            fields.setdefault(name.lower(), value.strip())
    blocks, gap = [], 0
    for number, line in enumerate(lines[first:last], first + 1):
        if not line:
            gap += 1
        elif gap or not blocks:
            blocks.append(Block(number, gap, [line]))
            gap = 0
        else:
            blocks[-1].lines.append(line)
    for number, block in itertools.pairwise(blocks):
        if SECTION.match(number.text):  # "IV", then the title: the gap before both counts
            block.gap = max(block.gap, number.gap)
    return fields, blocks


def key(text: str) -> str:
    """What counts when titles are compared: letters and digits, unaccented, in lower case."""
    text = unicodedata.normalize("NFKD", text.replace("æ", "ae").replace("œ", "oe")).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"['`]", "", text.lower())))


def is_caps(text: str) -> bool:
    text = re.sub(
        r"\b[Mm]a?c(?=[A-Z])", "", NUMBERING.sub("", text.strip(" _"))
    )  # "No. 2--McWILLIAMS" is in capitals too
    letters = re.sub(r"[\W\d_]", "", text)
    return len(re.findall(r"[a-zß-öø-ÿ]", letters)) < 0.1 * len(letters)


def clean_title(text: str) -> str:
    """A heading without numbering, italics, note marks and "[Written in 1865]"."""
    bare = NOTE_MARK.sub("", NUMBERING.sub("", text.replace("_", " ").strip()))
    return re.sub(r"[\s\-\u2014]*(?:\[[^\]]*\]|\([^)]{0,6}\))$", "", bare).strip(" .") or text.strip()


def heading_keys(block: Block) -> dict[str, int]:
    """Titles that the first lines of a block may spell -> how many lines each takes."""
    keys: dict[str, int] = {}
    for n in range(1, min(4, len(block.lines)) + 1):
        title = " ".join(line.strip(" _") for line in block.lines[:n])
        if len(title) > 120 or SOURCE.match(block.lines[0]):
            break
        for form in {title, clean_title(title)}:
            keys.setdefault(key(form), n)
    keys.pop("", None)
    return keys


def entry_keys(lines: list[str], cuts: tuple[str, ...] = ()) -> list[str]:
    """Titles that a line of a contents list, with the lines over which it may be wrapped, may stand for."""
    forms: dict[str, None] = {}  # an ordered set
    for n in range(1, len(lines) + 1):
        text = " ".join(re.sub(r"(?:\s*\.){3,}.*$|\s{2,}(?:\d+|[ivxlc]+)\.?$", "", line.strip()) for line in lines[:n])
        bare = NUMBERING.sub("", text)
        if about := re.match(r"([^a-z]{3,}?),.*[a-z]", bare):  # "TITLE, concerning Somebody"
            forms[about[1]] = None
        # cut off "_Author_", "By Author", "(1839)", a page number
        for cut in (r"\s_.*$", r"[\s.,:]+\(?[Bb][Yy]\b.*$", r"\s*[\[(].*$", r"\s+\d+$", *cuts):
            forms.update({text: None, bare: None, re.sub(cut, "", bare): None})
    return list({name: None for name in map(key, forms) if name})


def find_list(blocks: list[Block]) -> list[tuple[int, int]]:
    """The contents list as pairs (number of its line, block of the heading it names), both rising; [] if there is none.

    For every line that comes back as a heading, suppose that it is the first entry: then the list ends before that
    heading. The longest chain of lines whose headings follow in the same order wins, the denser of two equal ones.
    """
    heads: dict[str, list[int]] = {}
    for b, block in enumerate(blocks):
        for name in heading_keys(block):
            heads.setdefault(name, []).append(b)
    lines = [(b, line) for b, block in enumerate(blocks) for line in block.lines]
    first_line: dict[int, int] = {}
    for n, (b, _) in enumerate(lines):
        first_line.setdefault(b, n)
    hits = {}  # line -> later blocks whose title it may be
    for n, (b, line) in enumerate(lines[: max(600, len(lines) // 4)]):
        if len(line.strip()) <= 90 and not SECTION.match(line) and not SOURCE.match(line):
            names = entry_keys([text for c, text in lines[n : n + 3] if c == b])
            later = sorted({h for name in names for h in heads.get(name, ()) if h > b})
            if 0 < len(later) < 5:  # a title comes again as half-title, heading, in notes; a refrain in every story
                hits[n] = later
    best, most = [], 2.0
    for start, later in hits.items():
        options, previous = [], start
        for n, found in hits.items():
            if start <= n < first_line[later[0]] and n < previous + 40:
                options.append((n, [h for h in found if h >= later[0]]))
                previous = n
        if len(options) > most:
            chain = rising_chain(options)
            worth = len(chain) - 0.02 * (chain[-1][0] - chain[0][0] - len(chain))
            if worth > most:
                best, most = chain, worth
    gaps = sorted(blocks[h].gap for _, h in best)
    if best and gaps[len(gaps) // 2] < 2:  # headings stand apart; these are phrases that happen to recur
        return []
    upper = 2 * sum(is_caps(blocks[h].lines[0]) for _, h in best) > len(best)
    return [(n, h) for n, h in best if blocks[h].gap > 1 or is_caps(blocks[h].lines[0]) == upper]


def rising_chain(options: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    """The longest chain (entry, heading), both rising, out of [(entry, headings it may name)]."""
    last: list[int] = []  # smallest last heading of a chain of each length
    nodes: list[tuple] = []
    for entry, headings in options:
        for h in reversed(headings):  # falling, so that an entry is used once
            i = bisect.bisect_left(last, h)
            last[i : i + 1], nodes[i : i + 1] = [h], [(entry, h, nodes[i - 1] if i else None)]
    chain, node = [], nodes[-1]
    while node:
        chain.append(node[:2])
        node = node[2]
    return chain[::-1]


def fill_list(chain: list[tuple[int, int]], blocks: list[Block]) -> list[tuple[str, int]]:
    """(entry, its heading's block) of a list, those included whose spelling differs: between the headings of an entry's
    neighbours, the block in the style of the others that is most like it."""
    lines = [(b, line) for b, block in enumerate(blocks) for line in block.lines]
    gap = sorted(blocks[h].gap for _, h in chain)[len(chain) // 10]
    upper = sum(is_caps(blocks[h].lines[0]) for _, h in chain) > len(chain) / 2
    pairs = []
    first, last = chain[0][0], chain[-1][0]
    ends = [(max(0, first - 3) - 1, lines[last][0]), *chain, (last + 40, len(blocks))]
    for (n1, h1), (n2, h2) in zip(ends, ends[1:], strict=False):
        pairs += [(lines[n1][1], h1)] * (n1 >= first)
        for n in range(n1 + 1, min(n2, len(lines))):
            b, line = lines[n]
            if b >= chain[0][1] or len(line.strip()) > 90 or SECTION.match(line) or SOURCE.match(line):
                continue
            names = entry_keys([line], cuts=(r",.*$",))
            scored = [
                (max((same_entry(a, b) for a in names for b in heading_keys(blocks[h])), default=0), -h)
                for h in range(h1 + 1, h2)
                if blocks[h].gap >= gap and len(blocks[h].lines) <= 4 and is_caps(blocks[h].lines[0]) == upper
            ]
            score, h = max(scored, default=(0, 0))
            if score > 0.75:
                h1 = -h
                pairs.append((line, h1))
    return pairs


def similarity(a: str, b: str) -> float:
    """Of two keys, from 0 to 1."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def same_entry(entry: str, heading: str) -> float:
    """How surely two keys name one story; either may add a subtitle."""
    if min(len(entry), len(heading)) > 3 and (f"{entry} ".startswith(f"{heading} ") or heading.startswith(f"{entry} ")):
        return 0.9
    return similarity(entry, heading)


def find_styled(blocks: list[Block]) -> list[int]:
    """Headings of a book without a list: short blocks of one style after its widest gaps, that share out its words."""
    words = [len(block.text.split()) for block in blocks]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for b, block in enumerate(blocks):
        line, names = block.lines[0].strip(" _"), [w for w in re.findall(r"[^\W\d_]+", block.text) if len(w) > 3]
        short = block.gap > 1 and len(block.lines) <= 3 and len(block.text.split()) <= 16 and len(line) <= 80
        if (
            short
            and re.search("[A-Za-z]{2}", line)
            and line[-1] not in ",;:"
            and all(name[0].isupper() for name in names)
        ):
            if not (SECTION.match(line) or SOURCE.match(line) or FURNITURE.fullmatch(key(line))):
                groups.setdefault((bool(NUMBERING.match(line)), is_caps(line)), []).append(b)
    for _, found in sorted(groups.items(), reverse=True):  # numbered titles first, then capitals
        for gap in range(max(blocks[b].gap for b in found), 1, -1):
            heads = [b for b in found if blocks[b].gap >= gap]
            sizes = [sum(words[a:z]) for a, z in itertools.pairwise([*heads, len(blocks)])]
            whole = [size for size in sizes if size >= 300]
            if len(whole) >= 3 and sum(whole) > 0.85 * sum(words) and max(sizes) < 0.6 * sum(words):
                nearly = [b for b in found if blocks[b].gap == gap - 1 > 1]  # gaps are not always typed alike
                return sorted(heads + nearly) if len(nearly) <= 0.25 * len(heads) else heads
    return []


def find_headings(blocks: list[Block]) -> list[int]:
    """Blocks that head a story (or a preface, poem ...: whatever the list names)."""
    chain = find_list(blocks)
    pairs = fill_list(chain, blocks) if chain else [(blocks[h].text, h) for h in find_styled(blocks)]
    bare = {h for _, h in pairs if SECTION.match(blocks[h].lines[0])}
    numbered = {h for entry, h in pairs if any(NUMBERING.match(x.strip(" _")) for x in (entry, blocks[h].text))} - bare
    heads = [h for _, h in pairs]
    lengths = [sum(len(b.text.split()) for b in blocks[a:z]) for a, z in itertools.pairwise([*heads, len(blocks)])]
    average = sum(n for h, n in zip(heads, lengths, strict=True) if h in numbered) / max(1, len(numbered))
    # A list may name the chapters of its longest story: numbered among titles that are not, and short.
    chapters = numbered if len(numbered) < len(heads) / 2 and average < 4000 else set()
    return [h for h in heads if h not in bare | chapters]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_verse(block: Block, width: int) -> bool:
    """Do lines start with a capital, and end before the margin at `width`?"""
    starts = [re.sub(r"^[\W_]+", "", line)[:1] for line in block.lines]
    free = sum(len(a) + 1 + len(b.split()[0]) < width - 8 for a, b in itertools.pairwise(block.lines))
    capitals = sum(s.isupper() for s in starts) / len(starts)
    return len(starts) > 1 and capitals >= 0.7 and free >= 0.6 * (len(starts) - 1)


def is_front(block: Block, following: Block | None, width: int, margin: int) -> bool:
    """Is this block before the prose of a story something else: byline, source, epigraph, dedication, section ...?"""
    text, words = block.text, len(block.text.split())
    note = following.text if following and len(following.text.split()) < 10 else ""
    return bool(
        SCENE_BREAK.match(text)
        or SECTION.match(text)
        or NOTE.match(text)
        or SOURCE.match(text)
        or text.count("{") > 2  # a table
        or is_verse(block, width)
        or (words < 15 and BYLINE.match(text))
        or (words < 25 and is_caps(text))
        or (words <= 12 and not SENTENCE_END.search(text))
        or (words < 100 and text.startswith("_") and text.endswith("_"))
        or (words < 80 and min(map(indent, block.lines)) > margin + 1)
        or (words < 80 and ATTRIBUTION.search(text))
        or (words < 80 and re.match(r"(?:--|[\u2014\u2013])\s*_?[A-Z]", note) and SENTENCE_END.search(note))
    )


def is_tail(block: Block) -> bool:
    """Is this block, after the last paragraph, no part of the story: a section number, THE END, a printer's line?"""
    text = block.text
    short = len(text.split()) < 20 and (is_caps(text) or not SENTENCE_END.search(text))
    return bool(
        SCENE_BREAK.match(text)
        or SECTION.match(text)
        or NOTE.match(text)
        or FOOTNOTES.fullmatch(key(text))
        or (block.gap > 1 and short)
    )


def cut_story(title: str, blocks: list[Block], width: int, margin: int) -> tuple[list[Block], str]:
    """What follows a heading -> the blocks of the story's own text, and its byline ("" without one)."""
    words = 0
    for i, block in enumerate(blocks):  # a half-title, a title page: the heading comes again
        same = [n for name, n in heading_keys(block).items() if similarity(name, key(title)) > 0.85]
        if same and block.gap > 1 and len(block.lines) < 7:
            rest = block.lines[same[0] :]
            blocks = [Block(block.line, 1, rest)] * bool(rest) + blocks[i + 1 :]
            break
        words += len(block.text.split())
        if words > 250:
            break
    words = 0
    for i, block in enumerate(blocks):  # notes, appendix, the next preface
        apart = words > 100 and len(block.lines) < 3 and (block.gap > 1 or is_caps(block.text))
        if apart and FURNITURE.fullmatch(key(block.text)) and not FOOTNOTES.fullmatch(key(block.text)):
            blocks = blocks[:i]
            break
        words += len(block.text.split())
    first, byline = 0, ""
    while first < len(blocks) and is_front(blocks[first], (blocks[first + 1 :] or [None])[0], width, margin):
        match = BYLINE.match(blocks[first].text)
        if match and not byline and len(match[0].split()) < 10:
            byline = re.sub(r"[\d(\[].*$", "", match[1] or match[2]).strip(" _.,*")
        first += 1
    blocks = blocks[first:]
    for i in range(max(1, len(blocks) - 12), len(blocks)):  # THE END, the printer, the title page of the next volume
        page = blocks[i:]
        after = [word for b in page for word in b.text.split()]
        titles = len(after) < 80 and sum(word[0].islower() for word in after) < 0.3 * len(after)
        if LAST_LINE.match(page[0].text) or (page[0].gap > 2 and titles):
            blocks = blocks[:i]
            break
    while blocks and is_tail(blocks[-1]):
        blocks = blocks[:-1]
    return blocks, byline


def paragraph(block: Block, width: int) -> str:
    """A block as text: wrapping undone (not of verse), italics, quotation marks and dashes normalised, notes out."""
    if NOTE.match(block.text) or FOOTNOTES.fullmatch(key(block.text)):
        return ""
    if SCENE_BREAK.match(block.text):
        return "***"
    if is_verse(block, width):
        text = "\n".join(line.strip() for line in block.lines)
    else:
        text = re.sub(r"(?<=[\w-])- (?=[a-z])", "-", block.text)
    text = NOTE_MARK.sub("", text)
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", text).translate(QUOTES)
    text = re.sub(r"-{2,}|\u2014", "\u2014", re.sub(r"(?<=\w)(--|\u2014) (?=\w)", r"\1", text))
    return re.sub(r" {2,}", " ", text).strip()


QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "`": "'"})


def split_book(text: str) -> tuple[dict[str, str], list[Story]]:
    """A plain-text anthology -> its header fields and its pieces in order (not filtered by length or kind)."""
    fields, blocks = blocks_of(text)
    heads = find_headings(blocks)
    long = [line for block in blocks if len(block.lines) > 2 for line in block.lines[:-1]]
    width = sorted(map(len, long))[int(0.9 * len(long))] if long else 72
    if sum(line.strip(" _\"'")[:1].isupper() for line in long) > 0.8 * len(long):  # all verse: its lines set no margin
        width = 1000
    margin = Counter(indent(block.lines[0]) for block in blocks if len(block.lines) > 2).most_common(1)
    margin = margin[0][0] if margin else 0
    stories = []
    for head, stop in itertools.pairwise([*heads, len(blocks)]):
        block = blocks[head]
        title = block.lines[0].strip(" _")
        if FURNITURE.fullmatch(key(title)):
            continue
        under = [Block(block.line + 1, 1, block.lines[1:])] if block.lines[1:] else []
        body, byline = cut_story(clean_title(title), under + blocks[head + 1 : stop], width, margin)
        text = "\n\n".join(filter(None, (paragraph(b, width) for b in body)))
        half_title = similarity(key(block.text), key(fields.get("title", ""))) > 0.85 and len(text.split()) < 300
        if text and not half_title:
            various = author_key(fields.get("author", "")) == "" or "editor" in fields
            author = byline if byline and various else fields.get("author", "")
            stories.append(Story(clean_title(title), author, text, block.line))
    return fields, stories


# ------------------------------------------------------------------------------------------------- stories -> examples


def read_text(path: Path) -> str:
    """A book as text. DataError for what is no readable text, with what to do."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its files, e.g. {path}/*.txt")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise DataError(f"{path}: the file is empty; fetch it again, e.g. with `python data.py gutenberg`")
    if zipfile.is_zipfile(path):
        return epub_text(path)
    if b"\0" in raw:
        raise DataError(f"{path}: holds binary data; give plain text (UTF-8) or EPUB")
    encoding = re.search(rb"(?i)character set encoding:\s*(iso-?8859-1|iso-latin-1|cp1252|windows-1252)", raw[:4000])
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        if encoding:  # older Gutenberg files, which say so
            return raw.decode("cp1252", "replace").replace("\r\n", "\n")
        where = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{where}: not UTF-8; convert it, e.g. `iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new.txt`"
        ) from None


class _Page(HTMLParser):
    """One page of an EPUB as the plain text that Gutenberg would have typed: headings apart, italics in underscores."""

    def __init__(self):
        super().__init__()
        self.text, self.skip = "", 0

    def handle_starttag(self, tag, attributes):
        self.skip += tag in ("head", "script", "style")
        if re.fullmatch(r"h[1-6]", tag):
            self.text += "\n\n\n\n\n"
        elif tag in ("p", "div", "li", "tr", "blockquote", "pre", "section"):
            self.text += "\n\n"
        self.text += {"br": "\n", "hr": "\n\n* * *\n\n", "i": "_", "em": "_"}.get(tag, "")

    def handle_endtag(self, tag):
        self.skip -= tag in ("head", "script", "style")
        self.text += (
            "_" if tag in ("i", "em") else "\n\n" if re.fullmatch(r"h[1-6]|p|div|li|tr|blockquote", tag) else ""
        )

    def handle_data(self, data):
        if not self.skip:
            self.text += re.sub(r"\s+", " ", data)


def epub_text(path: Path) -> str:
    """The pages of an EPUB in reading order, with the title and author of its package as header lines."""
    try:
        with zipfile.ZipFile(path) as book:
            package_path = re.search(r'full-path="([^"]+)"', book.read("META-INF/container.xml").decode())[1]
            package = ElementTree.fromstring(book.read(package_path))
            files = {item.get("id"): item.get("href") for item in package.findall(".//{*}item")}
            folder = posixpath.dirname(package_path)
            pages = [posixpath.join(folder, files[ref.get("idref")]) for ref in package.findall(".//{*}itemref")]
            text = ""
            for page in pages:
                parser = _Page()
                parser.feed(book.read(unquote(page)).decode("utf-8-sig"))
                text += parser.text + "\n\n\n\n"
    except (KeyError, TypeError, UnicodeDecodeError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise DataError(f"{path}: no EPUB that can be read ({error!r}); give plain text instead") from None
    names = {"title": "Title", "creator": "Author", "language": "Language"}
    header = [f"{names[name]}: {package.findtext(f'.//{{*}}{name}') or ''}" for name in names]
    return "\n".join([*header, "*** START OF THIS PROJECT GUTENBERG EBOOK ***", "", "", "", text])


def kind_of(story: Story, fields: dict[str, str]) -> str:
    """ "" for a piece of English narrative prose, else what it seems to be instead."""
    words = re.findall(r"[a-z']+", story.text.lower())
    count, n = Counter(words), max(1, len(words))
    share = lambda text: sum(count[word] for word in text.split()) / n  # noqa: E731
    paragraphs = story.text.split("\n\n")
    speakers = sum(bool(re.match(r"[A-Z][A-Z .'-]{1,30}(?:[.:]|\s*\()|[A-Z][a-z]+:", p)) for p in paragraphs)
    past = share("was were had did said went came could would saw looked asked cried told took")
    present = share("is are has have does do can may will be must shall")
    author = key(re.sub(r"\(.*?\)", "", fields.get("author", "")))
    if fields.get("language", "English").lower() not in ("english", "en", "en-us", "en-gb") or (
        share("the and of to that it with for") < 0.02
    ):
        return "not English"
    if sum(len(p.split()) for p in paragraphs if "\n" in p) > 0.4 * len(story.text.split()):
        return "verse"
    if speakers > 0.5 * len(paragraphs):
        return "play"
    if len(re.findall(r"\d", story.text)) > 0.1 * n:
        return "list or table"
    if " " in author and author in key(story.title):
        return "about the author"
    # An essay speaks of what is, without persons or talk. Of 1,304 pieces looked at, few narrative ones fall here.
    talk = sum('"' in p or " '" in p for p in paragraphs) / len(paragraphs)
    if past < 0.4 * (past + present) and share("he she him her his i me my they") < 0.045 and talk < 0.6:
        return "essay or sketch"
    return ""


def shingles(text: str) -> set[int]:
    """A sixteenth of the 6-word sequences of a text, by hash: enough to see that two texts are one tale."""
    words = re.findall(r"\w+", text.lower())
    grams = (zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(len(words) - 5))
    return {gram for gram in grams if gram % 16 == 0}


def title_case(title: str) -> str:
    small = "a an and as at by for from in of on or the to with".split()
    words = [w if w in small and i else w[:1].upper() + w[1:] for i, w in enumerate(title.lower().split())]
    return " ".join(words) if is_caps(title) else title


def round_words(words: int) -> int:
    """A length that a person would ask for: to 10 below 300 words, to 50 below 1,000, to 100 above."""
    step = 10 if words < 300 else 50 if words < 1000 else 100
    return max(step, round(words / step) * step)


def length_sentence(words: int) -> str:
    return f"The story should be {words} words long."


def author_key(author: str) -> str:
    """Of "Saki (H. H. Munro)" and "SAKI" alike; "" for various authors."""
    name = key(re.sub(r"[\[(].*?[\])]|\b(?:editor|tr)\b.*", "", author))
    return "" if name in ("various", "anonymous", "unknown") else name


def read_book(path: str, min_words: int, max_words: int) -> tuple[str, dict, list[tuple[Story, int, str, set[int]]]]:
    """One book in a worker process -> (problem, header, [(piece, words, why it is dropped, shingles)])."""
    try:
        text = read_text(Path(path))
        fields, stories = split_book(text)
    except DataError as error:
        return str(error), {}, []
    pieces = []
    for story in stories:
        words = len(story.text.split())
        why = "too short" if round_words(words) < min_words else "too long" if round_words(words) > max_words else ""
        why = why or kind_of(story, fields)
        pieces.append((story, words, why, set() if why else shingles(story.text)))
    if not pieces:
        found = len(find_headings(blocks_of(text)[1]))
        what = f"{found} pieces of verse" if found else "no list of contents and no story headings; one single work?"
        return f"{path}: {what}", fields, []
    return "", fields, pieces


def collect(args) -> tuple[list[Example], list[tuple[str, dict, Counter]], list[str]]:
    """Books -> examples with a prompt from the title, (path, header, counts) per book, and the books left out."""
    examples, report, problems, owner, uids = [], [], [], {}, Counter()
    work = partial(read_book, min_words=args.min_words, max_words=args.max_words)
    with ProcessPoolExecutor(min(len(args.books), os.cpu_count() or 1)) as pool:
        results = zip(args.books, pool.map(work, args.books), strict=True)
        for path, (problem, fields, pieces) in tqdm(results, total=len(args.books), desc="books", unit="book"):
            if problem:
                problems.append(problem)
                continue
            counts = Counter(pieces=len(pieces))
            if args.show:
                tqdm.write(f"{path}: {fields.get('title', '?')} by {fields.get('author', '?')}")
            for story, words, why, grams in pieces:
                if not why:
                    shared = Counter(owner[gram] for gram in grams if gram in owner)
                    twin, common = max(shared.items(), key=lambda item: (item[1], item[0]), default=("", 0))
                    why = f"same tale as {twin}" if common > 0.2 * len(grams) else ""
                if args.show:
                    tqdm.write(f"{story.line:7d} {words:6d}  {story.title[:60]}{f'  [{why}]' if why else ''}")
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
                examples.append(Example(uid, prompt, target, story.text, "", f"{source} | template prompt"))
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
COMMON_NAMES = set("i god lord christmas english french american german sunday monday mr mrs miss sir".split())


def names_in(story: str) -> set[str]:
    """Words that the story writes with a capital inside sentences, several times, and never without."""
    inside = Counter(re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{2,}", story))
    return {name.lower() for name, n in inside.items() if n > 2} - set(re.findall(r"\b[a-z]+\b", story)) - COMMON_NAMES


def copied(text: str, story: str, n: int) -> str:
    """The first n words in a row that text shares with story, or ""."""
    words, there = re.findall(r"\w+", text.lower()), re.findall(r"\w+", story.lower())
    grams = {tuple(there[i : i + n]) for i in range(len(there) - n + 1)}
    return next((" ".join(words[i : i + n]) for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in grams), "")


def fault_of_text(text: str, low: int, high: int, story: str, n: int) -> str:
    words = len(text.split())
    if not low <= words <= high:
        return f"it has {words} words; write {low} to {high}"
    if MARKUP.search(text) or re.search(
        r"(?m)^\s*(?:#|\*\*|```|[-*] |\d+\. )|^(?:here is|sure|certainly)\b", text, re.I
    ):
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
    """Asks an LLM; every answer is kept in a file at once, so that nothing is paid twice.

    One attempt (time-outs, rate limit, circuit breaker, keys) is judge.py's own, used from below its verdicts.
    """

    def __init__(self, url: str, model: str, key_env: str, cache: Path, extra_body: dict, rpm: int):
        self.client = Judge(url, model, api_key(key_env, url), rpm=rpm)
        self.body = {"model": model, "temperature": 0.7, **extra_body}
        self.lock, self.cache, self.answers, self.stats = threading.Lock(), cache, {}, Counter()
        for line in cache.read_bytes().split(b"\n") if cache.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the line that a killed run was writing
                continue
            self.answers[row["key"]] = row["answer"]
        self.sessions = threading.local()

    def key(self, messages: list[dict]) -> str:
        return hashlib.sha256(json.dumps([self.body, messages], sort_keys=True).encode()).hexdigest()

    def ask(self, messages: list[dict]) -> str:
        """The answer's text. judge.JudgeStop when the server refuses or stays away; DataError after five failures."""
        name = self.key(messages)
        if name in self.answers:
            self.stats["cached"] += 1
            return self.answers[name]
        self.sessions.http = getattr(self.sessions, "http", None) or self.client._session()
        for attempt in range(5):
            try:
                answer, usage = self.client._attempt(
                    self.sessions.http, json.dumps({**self.body, "messages": messages}).encode()
                )
                break
            except _Fault as fault:
                if fault.kind == "final" or attempt == 4:
                    raise DataError(str(fault)) from None
                self.client._pause((fault.wait or 0) + 0.5 * 2**attempt)
        with self.lock:
            self.stats.update(calls=1, tokens_in=usage[0], tokens_out=usage[1])
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
    writer = Writer(
        args.llm_url, args.llm_model, args.llm_key_env, Path(f"{args.out}.llm"), json.loads(args.llm_body), args.llm_rpm
    )
    first = [[{"role": "user", "content": PROMPT_TASK.format(story=e.story)}] for e in examples]
    new = [
        len(e.story.split())
        for e, messages in zip(examples, first, strict=True)
        if writer.key(messages) not in writer.answers
    ]
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
    stats = writer.stats
    dollars = (stats["tokens_in"] * args.price_in + stats["tokens_out"] * args.price_out) / 1e6
    print(
        f"{stats['calls']} calls ({stats['cached']} answers were there already), {stats['tokens_in']:,} tokens in, "
        f"{stats['tokens_out']:,} out, ${dollars:.2f}"
    )
    if failed := [r for r in results if isinstance(r, DataError)]:
        raise DataError(
            f"{len(failed)} of {len(examples)} stories got no answer ({failed[0]}); run the same command again: "
            f"the answers so far are in {writer.cache} and are not paid again"
        )
    return [r for r in results if isinstance(r, Example)], Counter(r for r in results if isinstance(r, str))


# ------------------------------------------------------------------------------------------------------ command line

BUCKETS = ((1000, 2000), (2000, 3000), (3000, 4000), (4000, 6000), (6000, 8000), (8000, 12000))  # words of test prompts


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
        (test if len(test) + len(groups[name]) <= share * len(examples) else train).extend(groups[name])
    order = {example.uid: i for i, example in enumerate(examples)}
    prompts = []
    for i, example in enumerate(sorted(test, key=lambda e: digest(e.uid))):
        low, high = BUCKETS[i % len(BUCKETS)]
        words = low + digest(example.uid) % ((high - low) // 100) * 100
        prompt = example.prompt.replace(length_sentence(example.target_words), length_sentence(words))
        prompts.append(replace(example, prompt=prompt, target_words=words, story="", reasoning=""))
    return sorted(train, key=lambda e: order[e.uid]), prompts


def write_file(path: Path, text: str) -> None:
    """All of the text or nothing: a temporary file, moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_examples(path: Path, examples: list[Example]) -> None:
    write_file(path, "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples))


def histogram(lengths: list[int]) -> str:
    counts = Counter(words // 500 * 500 for words in lengths)
    top = max(counts.values(), default=1)
    return "\n".join(f"{low:>6}-{low + 499:<6} {n:>5}  {'#' * -(-40 * n // top)}" for low, n in sorted(counts.items()))


def data_card(args, report, problems, drops: Counter, train: list[Example], test: list[Example]) -> str:
    """A Markdown page on where the examples come from and what was left out."""
    rows = "\n".join(
        f"| {Path(path).name} | {fields.get('title', '')} | {fields.get('author', '')} | {n['pieces']} | {n['kept']} |"
        for path, fields, n in report
    )
    dropped = "\n".join(f"- {why}: {n}" for why, n in sorted(drops.items(), key=lambda item: (-item[1], item[0])))
    method = "titles" if args.prompts == "template" else f"{args.llm_model}, as are the reasoning traces"
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
        raise DataError(f"--min-words {args.min_words} is above --max-words {args.max_words}; swap them")
    if args.prompts_only:
        examples = [example for path in args.books for example in load_prompts(path)]
        write_examples(Path(args.out), examples)
        print(f"{args.out}: {len(examples)} prompts without stories; train with --no-anchor, or use them to evaluate")
        return
    examples, report, problems = collect(args)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    drops = sum((counts for _, _, counts in report), Counter())
    pieces, kept = drops.pop("pieces", 0), drops.pop("kept", 0)
    print(f"{len(report)} books, {pieces} pieces, {kept} stories kept; left out: " + (_list_counts(drops) or "nothing"))
    if not examples:
        if problems:
            raise DataError(f"no book could be used; the first: {problems[0]}")
        raise DataError(f"none of the {pieces} pieces is a story of --min-words to --max-words: {_list_counts(drops)}")
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
    print(
        f"{args.out}: {len(train)} examples"
        + (f"; {args.test}: {len(test)} prompts" if args.test else "")
        + f"; {card}"
    )


def _list_counts(counts: Counter) -> str:
    return ", ".join(f"{n} {why}" for why, n in counts.most_common())


def load_prompts(path: str) -> list[Example]:
    """Prompts without stories from JSON or JSONL: objects whose "prompt" is text or a list of chat messages (as in the
    datasets that verl reads). Raises DataError where there is none, or no length."""
    text = read_text(Path(path))
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x.strip()]
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: broken JSON ({error}); give a JSON list or JSONL (`to_json` of a dataset writes it)"
        ) from None
    examples = []
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if isinstance(prompt, list):
            prompt = next((m.get("content") for m in prompt if m.get("role") == "user"), None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f'{path}: row {number} has no "prompt" (text, or a list with a user message); add it')
        words = requested_words(prompt) or row.get("target_words")
        if not isinstance(words, int):
            raise DataError(f'{path}: row {number} asks for no length; end it with "{length_sentence(1500)}"')
        examples.append(Example(f"{Path(path).stem}-{number}", prompt.strip(), words, source=Path(path).name))
    return examples


def check(args) -> None:
    """Print every problem of a file, then what is in it; exit status 1 if there is a problem."""
    examples, problems = read_examples(args.file, anchors=not args.prompts_only, thinking=args.thinking)
    for problem in problems:
        print(problem)
    stories = [len(example.story.split()) for example in examples if example.story]
    traces = sum(bool(example.reasoning) for example in examples)
    print(
        f"{len(examples)} good examples, {len(problems)} bad lines; {len(stories)} stories, {traces} reasoning traces"
    )
    if stories:
        print(f"words of the stories: {min(stories)} to {max(stories)}, mean {sum(stories) / len(stories):.0f}")
        print(histogram(stories))
    if args.tokenizer and examples:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        prompts = [
            len(encode_prompt(tokenizer, example.prompt, args.thinking)) for example in tqdm(examples, desc="prompts")
        ]
        print(
            f"prompts: up to {max(prompts)} tokens; {sum(n > args.max_prompt for n in prompts)} over {args.max_prompt}"
        )
        anchors = [
            len(encode_anchor(tokenizer, example, args.thinking, sys.maxsize))
            for example in tqdm([e for e in examples if e.story], desc="anchors")
        ]
        if anchors:
            fit = sum(n <= args.max_response for n in anchors)
            mean = sum(anchors) / len(anchors)
            print(f"anchors: {mean:.0f} tokens on average, up to {max(anchors)}; {fit / len(anchors):.1%} fit", end=" ")
            print(args.max_response)
    if problems or not examples:
        sys.exit(1)


def gutenberg(args) -> None:
    """Download books one at a time into a folder; those that are there already are not fetched again."""
    catalog = [
        line.split("\t") for line in Path(__file__).with_name("gutenberg.tsv").read_text("utf-8").splitlines()[1:]
    ]
    titles = {row[0]: f"{row[1]}, {row[2]}" for row in catalog}
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
        if problem := fetch(session, args.mirror.rstrip("/") + f"/cache/epub/{book}/pg{book}.txt", path, args.pause):
            failed.append(f"{book}: {problem}")
    if failed:
        raise DataError("\n".join([*failed, "run the same command again for these; the others are there"]))
    print(f"{out}: {len(list(out.glob('*.txt')))} books; next: python data.py build {out}/*.txt --out train.jsonl")


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
    parser = argparse.ArgumentParser(description="Stories in: anthologies -> prompt-story pairs for POLARIS.")
    commands = parser.add_subparsers(dest="command", required=True)

    c = commands.add_parser("build", help="split anthologies into prompt-story pairs", formatter_class=defaults)
    c.set_defaults(run=build)
    c.add_argument("books", nargs="+", help="anthologies as plain text or EPUB (with --prompts-only: JSON or JSONL)")
    c.add_argument("--out", default="train.jsonl", help="examples to write; a data card is put beside it")
    c.add_argument("--min-words", type=int, default=1000, help="shortest story kept")
    c.add_argument("--max-words", type=int, default=4000, help="longest story kept")
    c.add_argument("--show", action="store_true", help="print the contents found in each book, with word counts")
    c.add_argument("--test", help="write prompts of held-out authors here, asking for 1,000 to 12,000 words")
    c.add_argument("--test-share", type=float, default=0.1, help="share of the stories that --test holds out, at most")
    c.add_argument("--prompts-only", action="store_true", help="read prompts without stories: no anchors from these")
    c.add_argument(
        "--prompts", choices=["template", "llm"], default="template", help="prompts from titles, or by an LLM"
    )
    c.add_argument("--llm-url", help="OpenAI-style endpoint, e.g. http://127.0.0.1:8000/v1")
    c.add_argument("--llm-model", help="model name at that endpoint")
    c.add_argument("--llm-key-env", default="LLM_API_KEY", help="environment variable that holds the key")
    c.add_argument("--llm-body", default="{}", help="JSON with further fields of every request")
    c.add_argument("--llm-concurrency", type=int, default=8, help="requests at a time")
    c.add_argument("--llm-rpm", type=int, default=0, help="requests per minute (0: no limit)")
    c.add_argument("--price-in", type=float, default=0.0, help="dollars per million tokens in")
    c.add_argument("--price-out", type=float, default=0.0, help="dollars per million tokens out")
    c.add_argument("--dry-run", action="store_true", help="with --prompts llm: only say what it would cost")

    c = commands.add_parser("check", help="every problem of a JSONL file, and what is in it", formatter_class=defaults)
    c.set_defaults(run=check)
    c.add_argument("file", help="JSONL of examples")
    c.add_argument("--tokenizer", help="folder of a tokenizer with a chat template: count tokens")
    c.add_argument("--thinking", action="store_true", help="anchors need a reasoning trace")
    c.add_argument("--prompts-only", action="store_true", help="stories may be missing")
    c.add_argument("--max-prompt", type=int, default=256, help="limit for prompts, in tokens")
    c.add_argument("--max-response", type=int, default=8192, help="limit for anchors, in tokens")

    c = commands.add_parser("gutenberg", help="download anthologies from Project Gutenberg", formatter_class=defaults)
    c.set_defaults(run=gutenberg)
    c.add_argument("ids", nargs="*", help="book numbers; none: the bundled list of anthologies")
    c.add_argument("--out", default="books", help="folder to fill")
    c.add_argument("--mirror", default="https://www.gutenberg.org", help="server with /cache/epub/ID/pgID.txt")
    c.add_argument("--pause", type=float, default=2.0, help="seconds between requests")
    c.add_argument("--list", action="store_true", help="print the bundled list")

    args = parser.parse_args(argv)
    if args.command == "build" and args.prompts == "llm" and not (args.llm_url and args.llm_model):
        parser.error("--prompts llm needs --llm-url and --llm-model")
    try:
        args.run(args)
    except (DataError, JudgeStop) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
