"""Stories in: examples, the chat template, anchors; anthologies -> prompt-story pairs.

An example is one line of JSON:  {"uid", "prompt", "target_words", "story", "reasoning", "source"}.
With human-reference injection (arXiv 2606.04095) the story is the *anchor* of its prompt's group: a teacher-forced row
    prompt tokens | reasoning </think> story EOS
written exactly as the model's own chat template would write it, so that the policy could have sampled it.
"""

from __future__ import annotations

import argparse
import bisect
import difflib
import hashlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from judge import requested_words


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
    rf"{NUMERAL}(?:[.):]+\s*|\s*(?:--+|[\u2013\u2014])\s*|\s{{2,}})(?=\S)",
    re.IGNORECASE,
)
SECTION = re.compile(  # "IV.", "CHAPTER 3", "Part the Second", "FIRST STORY"
    rf"^[\W_]*(?:(?:the )?{DIVISION}\b[\s.]*)?(?:{NUMERAL}\b|(?:the )?{ORDINAL}(?: {DIVISION})?)[\W_]*$", re.IGNORECASE
)
FURNITURE = re.compile(  # what a book holds besides its stories; on keys
    r"(?:the )?(?:(?:author|editor|translator|publisher|transcriber)s? )?(?:(?:preface|foreword|introduction|"
    r"footnotes|end notes|endnotes)(?: .*)?|(?:introductory|prefatory|biographical|explanatory)(?: (?:note|essay))?|"
    r"(?:dedication|acknowledge?ments?|contents|notes?|appendix|appendices|glossary|index|bibliography|errata|addenda|"
    r"list of illustrations|illustrations|the end|finis|end|l ?envoi|by the same author|postscript)"
    r"(?: (?:to|by|from|on|of|for|[a-z0-9])\b.*)?)"
)
BYLINE = re.compile(r"^[\s_(*\[]*by\b[:\s]+(?P<name>\S.*)$", re.IGNORECASE)
SOURCE = re.compile(r"^\s*(?:[\[(].*[\])]\W*$|_?from _|\W*copyright\b|\W*reprinted )", re.IGNORECASE)
ATTRIBUTION = re.compile(
    r"(?:(?:--|[\u2014\u2013])\s*_?[A-Z][\w.,'\u2019\" ]{1,60}|[ _](?:Proverb|Saying|Song|Ballad|Psalm|Anon))\W*$"
)
SCENE_BREAK = re.compile(r"^[\s*.·•+=~#_\-\u2013\u2014]*$")
NOTE = re.compile(r"^\s*(?:[\[({]\*?(?:\d{1,3}|[A-Z])[\])}]|\*+\s?[A-Za-z\"\u201c_])")
NOTE_MARK = re.compile(
    r"\s?\[\*?(?:\d{1,3}|[A-Z]|\*+)\]|\{\d{1,3}\}|(?<=\S)\(\*?\d{1,3}\)"
    r"|(?<=[\w.,;:!?'\"\u201d\u2019])\*+(?=[\s.,;:!?'\"\u201d\u2019]|$)"
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
    letters = re.sub(r"[\W\d_]", "", re.sub(r"\b[Mm]a?c(?=[A-Z])", "", text))  # McWILLIAMS is in capitals too
    return bool(letters) and sum(c.isupper() for c in letters) > 0.9 * len(letters)


def clean_title(text: str) -> str:
    """A heading without numbering, italics, note marks and "[Written in 1865]"."""
    bare = NUMBERING.sub("", text.replace("_", " ").strip())
    return re.sub(r"[\s\-\u2014]*(?:\[[^\]]*\]|\([^)]{0,6}\))$", "", bare).strip(" .") or text.strip()


def heading_keys(block: Block) -> dict[str, int]:
    """Titles that the first lines of a block may spell -> how many lines each takes."""
    keys: dict[str, int] = {}
    for n in range(1, min(4, len(block.lines)) + 1):
        title = " ".join(line.strip(" _") for line in block.lines[:n])
        if len(title) > 120 or SOURCE.match(block.lines[0]):
            break
        for form in (title, clean_title(title)):
            keys.setdefault(key(form), n)
    keys.pop("", None)
    return keys


def entry_keys(lines: list[str], cuts: tuple[str, ...] = ()) -> list[str]:
    """Titles that a line of a contents list, with the lines over which it may be wrapped, may stand for."""
    keys: dict[str, None] = {}
    for n in range(1, len(lines) + 1):
        text = " ".join(re.sub(r"(?:\s*\.){3,}.*$|\s{2,}(?:\d+|[ivxlc]+)\.?$", "", line.strip()) for line in lines[:n])
        bare = NUMBERING.sub("", text)
        # cut off "_Author_", "By Author", "(1839)", a page number
        for cut in (r"\s_.*$", r"[\s.,:]+\(?[Bb][Yy]\b.*$", r"\s*[\[(].*$", r"\s+\d+$", *cuts):
            keys.update({key(form): None for form in (text, bare, re.sub(cut, "", bare))})
    keys.pop("", None)
    return list(keys)


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
            names = entry_keys([text for _, text in lines[n : n + 3]])
            if later := sorted({h for name in names for h in heads.get(name, ()) if h > b}):
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
    return [(n, h) for n, h in best if blocks[h].gap > 1]


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


def fill_list(chain: list[tuple[int, int]], blocks: list[Block]) -> list[int]:
    """Headings of a list, those included whose spelling differs: between the headings of an entry's neighbours, the
    block in the style of the others that is most like it."""
    lines = [(b, line) for b, block in enumerate(blocks) for line in block.lines]
    gap = sorted(blocks[h].gap for _, h in chain)[len(chain) // 10]
    upper = sum(is_caps(blocks[h].lines[0]) for _, h in chain) > len(chain) / 2
    heads = []
    first, last = chain[0][0], chain[-1][0]
    ends = [(max(0, first - 3) - 1, lines[last][0]), *chain, (last + 4, len(blocks))]
    for (n1, h1), (n2, h2) in zip(ends, ends[1:], strict=False):
        heads += [h1] * (n1 >= first)
        for n in range(n1 + 1, min(n2, len(lines))):
            b, line = lines[n]
            if b >= chain[0][1] or len(line.strip()) > 90 or SECTION.match(line) or SOURCE.match(line):
                continue
            names = entry_keys([line], cuts=(r",.*$",))  # "TITLE, concerning somebody"
            scored = [
                (max((similarity(a, b) for a in names for b in heading_keys(blocks[h])), default=0), -h)
                for h in range(h1 + 1, h2)
                if blocks[h].gap >= gap and len(blocks[h].lines) <= 4 and is_caps(blocks[h].lines[0]) == upper
            ]
            score, h = max(scored, default=(0, 0))
            if score > 0.75:
                h1 = -h
                heads.append(h1)
    return heads


def similarity(a: str, b: str) -> float:
    if min(len(a), len(b)) > 3 and (f"{a} ".startswith(f"{b} ") or f"{b} ".startswith(f"{a} ")):
        return 0.9  # one has a subtitle
    return difflib.SequenceMatcher(None, a, b).ratio()


def find_styled(blocks: list[Block]) -> list[int]:
    """Headings of a book without a list: short blocks of one style after its widest gaps, that share out its words."""
    words = [len(block.text.split()) for block in blocks]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for b, block in enumerate(blocks):
        line = block.lines[0].strip(" _")
        short = block.gap > 1 and len(block.lines) <= 3 and len(line) <= 80 and len(line.split()) <= 12
        if short and re.search("[A-Za-z]{2}", line) and not re.search("^[a-z]|[,;:]$", line):
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
    heads = fill_list(chain, blocks) if chain else find_styled(blocks)
    numbered = [h for h in heads if NUMBERING.match(blocks[h].text.strip(" _")) or SECTION.match(blocks[h].lines[0])]
    return heads if len(numbered) > len(heads) / 2 else [h for h in heads if h not in numbered]  # listed sections


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_verse(block: Block, width: int) -> bool:
    """Do lines end before the margin (at `width`), and start with a capital?"""
    starts = [re.sub(r"^[\W_]+", "", line)[:1] for line in block.lines]
    free = sum(len(a) + 1 + len(b.split()[0]) < width - 8 for a, b in itertools.pairwise(block.lines))
    return len(starts) > 1 and sum(s.isupper() for s in starts) >= 0.7 * len(starts) and free >= 0.6 * (len(starts) - 1)


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
        or re.fullmatch(r"\W*(?:the end|finis|end of .{0,60})\W*", text, re.IGNORECASE)
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
    for i, block in enumerate(blocks):  # notes, appendix, the next preface
        if block.gap > 1 and len(block.lines) < 3 and FURNITURE.fullmatch(key(block.text)):
            blocks = blocks[:i]
            break
    first, byline = 0, ""
    while first < len(blocks) and is_front(blocks[first], (blocks[first + 1 :] or [None])[0], width, margin):
        match = BYLINE.match(blocks[first].text)
        if match and not byline and len(match["name"].split()) < 9:
            byline = re.sub(r"[\d(\[].*$", "", match["name"]).strip(" _.,*")
        first += 1
    blocks = blocks[first:]
    for i in range(max(1, len(blocks) - 12), len(blocks)):  # the title page of the next volume
        page = blocks[i:]
        if page[0].gap > 2 and sum(len(b.text.split()) for b in page) < 80:
            if all(is_caps(b.text) or len(b.text.split()) < 12 for b in page):
                blocks = blocks[:i]
                break
    while blocks and is_tail(blocks[-1]):
        blocks = blocks[:-1]
    return blocks, byline


def paragraph(block: Block, width: int) -> str:
    """A block as text: wrapping undone (not of verse), italics, quotation marks and dashes normalised, notes out."""
    if NOTE.match(block.text):
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
        if text:
            stories.append(Story(clean_title(title), byline or fields.get("author", ""), text, block.line))
    return fields, stories


# ------------------------------------------------------------------------------------------------------ command line


def round_words(words: int) -> int:
    """A length that a person would ask for: to 10 below 300, to 50 below 1,000, to 100 above."""
    step = 10 if words < 300 else 50 if words < 1000 else 100
    return max(step, round(words / step) * step)


def build(args) -> None:
    examples, uids = [], set()
    for path in tqdm(args.books, desc="books", unit="book"):
        fields, stories = split_book(Path(path).read_text(encoding="utf-8"))
        if args.show:
            tqdm.write(f"{path}: {fields.get('title', '?')} by {fields.get('author', '?')}")
        for story in stories:
            words = len(story.text.split())
            if args.show:
                tqdm.write(f"  {story.line:6d} {words:6d}  {story.title}")
            if not args.min_words <= words <= args.max_words:
                continue
            uid = f"{Path(path).stem}-{key(story.title).replace(' ', '-')[:60]}"
            while uid in uids:
                uid += "x"
            uids.add(uid)
            target = round_words(words)
            title = story.title.title() if is_caps(story.title) else story.title
            prompt = f'Write a short story with the title "{title}". The story should be {target} words long.'
            source = f"{fields.get('title', '')}; {story.author}; {Path(path).name}:{story.line}; prompt: template"
            examples.append(Example(uid, prompt, target, story.text, "", source))
    if not examples:
        raise DataError("no story between --min-words and --max-words was found; look at the contents with --show")
    temporary = Path(f"{args.out}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
    os.replace(temporary, args.out)
    print(f"{args.out}: {len(examples)} examples from {len(args.books)} books")


def main() -> None:
    parser = argparse.ArgumentParser(description="Stories in: anthologies -> prompt-story pairs for POLARIS.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="split anthologies (plain text) into prompt-story pairs")
    command.add_argument("books", nargs="+", help="plain-text anthologies")
    command.add_argument("--out", default="train.jsonl", help="the JSONL to write (default: %(default)s)")
    command.add_argument("--min-words", type=int, default=1000, help="shortest story kept (default: %(default)s)")
    command.add_argument("--max-words", type=int, default=4000, help="longest story kept (default: %(default)s)")
    command.add_argument("--show", action="store_true", help="print the contents found in each book, with word counts")
    args = parser.parse_args()
    try:
        build(args)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
