"""A book -> its stories (`read_book`). `data.py build BOOK --show` prints what is found.

    file -> blocks (text.py) -> headings (headings.py) -> stories -> is each one narrative prose?

A story runs from its heading to the next. It loses what is not its prose: at its head the byline,
source, epigraph, dedication, biographical note and first section number; at its end the next title
page, a poem with a heading of its own and printer's lines (`cut_story`); and notes in and between
paragraphs (`paragraph`). What is no English narrative prose is named: verse, play, list, essay
(`kind_of`). Rules decide, so a few slip through. The method is ours.
"""

import itertools
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from corpus.headings import (
    FURNITURE,
    LAST_LINE,
    NOTE_MARK,
    SOURCE,
    author_key,
    clean_title,
    find_headings,
    heading_keys,
    is_title,
    similarity,
)
from corpus.text import SECTION, Block, blocks_of, is_caps, key, read_text
from data import DataError

FOOTNOTES = re.compile(r"foot ?notes?(?: .{0,40})?")  # may close a section: the story goes on
BYLINE = re.compile(
    r"^[\s_(*\[]*by\b[:\s]+(\S.*)$|^_([A-Z][\w.]*(?: [A-Z][\w.'\u2019-]*){1,3})_(?: \(.*\))?$", re.I
)
DEDICATION = re.compile(r"_?To(?: [A-Z][\w.'\u2019-]*){1,5}_?")
ATTRIBUTION = re.compile(  # "--_Young._", not "so said Suleiman--Solomon."
    r"(?:(?:^|(?<=[\W_]))(?:--|[\u2014\u2013])\s*_?[A-Z][\w.,'\u2019\" ]{1,60}"
    r"|[ _](?:Proverb|Saying|Song|Ballad|Psalm|Anon))\W*$"
)
CREDIT = re.compile(r"(?:--|[\u2014\u2013])\s*_?[A-Z]")
SCENE_BREAK = re.compile(r"^[\s*.·•+=~#_\-\u2013\u2014\u2015]*$")
NOTE = re.compile(r"^\s*(?:[\[({](?:\*+|\*?(?:\d{1,3}|[A-Z]))[\])}]|\*+\s?[A-Za-z\"\u201c_])")
LIFESPAN = re.compile(  # "(1832-1910)": about an author
    r"\((?:born |b\. )?1\d{3}\s?[-\u2013\u2014]+\s?(?:1\d{3})?\)"
)
PUBLISHED = re.compile(r"\b(?:appeared|published|printed|reprinted)\b.* in .*\b1[789]\d\d\b")
SENTENCE_END = re.compile(r"[.!?:,;'\"\u2019\u201d\u2014-][)_]*$")
SPELT_LETTER = re.compile(r"\[(?:[=:^~.)(/'`,]|(?=oe|OE))([A-Za-z]{1,2})\]")  # "[=e]", "[oe]"
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u00a0`", "''\"\" '")


@dataclass
class Story:
    title: str
    author: str
    text: str
    line: int  # of its heading in the file, from 1

    @property
    def words(self) -> int:
        return len(self.text.split())


class Page(NamedTuple):
    """How a book is typed."""

    width: float  # columns of prose; verse ends its lines before
    margin: int  # usual indent of a paragraph


# --------------------------------------------------------------------------- what a block may be


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def page_of(blocks: list[Block]) -> Page:
    prose = [block.lines for block in blocks if len(block.lines) > 2]
    indents = Counter(indent(lines[0]) for lines in prose)
    margin = max(indents, key=indents.__getitem__, default=0)
    full = [line for lines in prose for line in lines[:-1]]
    capitals = sum(line.strip(" _\"'")[:1].isupper() for line in full)
    if capitals >= 0.8 * len(full):
        return Page(1000, margin)  # all verse: its lines set no width
    return Page(sorted(map(len, full))[int(0.9 * len(full))], margin)


def is_verse(block: Block, page: Page) -> bool:
    """Do lines start with a capital, and end though the next word would have fitted?"""
    if len(block.lines) < 2:
        return False
    starts = [re.sub(r"^[\W_]+", "", line)[:1] for line in block.lines]
    capitals = sum(start.isupper() for start in starts)
    joined = [len(a) + 1 + len(b.split()[0]) for a, b in itertools.pairwise(block.lines)]
    early = sum(columns < page.width - 8 for columns in joined)
    return capitals / len(starts) >= 0.7 and early >= 0.6 * len(joined)


def is_outside(block: Block) -> bool:
    """Is this, at either end of a story, no text: a break, a section number, a note, a life?"""
    text = block.text
    marked = SCENE_BREAK.match(text) or SECTION.match(text) or NOTE.match(text)
    return bool(marked or LIFESPAN.search(text))


def is_front(block: Block, following: list[Block], page: Page) -> bool:
    """Is this block, before a story's prose, something else: byline, epigraph, dedication ...?"""
    text, words = block.text, block.words
    below = following[0].text if following and following[0].words < 10 else ""
    credited = CREDIT.match(below) and SENTENCE_END.search(below)
    return bool(
        is_outside(block)
        or is_verse(block, page)
        or SOURCE.match(text)
        or DEDICATION.fullmatch(text)
        or text.count("{") > 2  # a table
        or (words <= 12 and not SENTENCE_END.search(text))
        or (words < 15 and BYLINE.match(text))
        or (words < 25 and is_caps(text))
        or (words < 80 and min(map(indent, block.lines)) > page.margin + 1)
        or (words < 80 and (credited or ATTRIBUTION.search(text)))
        or (words < 100 and text.startswith("_") and text.endswith("_"))
    )


def is_tail(block: Block) -> bool:
    """Is this block, after a story's last paragraph, no part of it?"""
    text = block.text
    short = block.words < 20 and (is_caps(text) or not SENTENCE_END.search(text))
    return bool(
        is_outside(block)
        or FOOTNOTES.fullmatch(key(text))
        or (block.words < 40 and PUBLISHED.search(text))
        or (block.gap > 1 and short)
    )


def is_end(blocks: list[Block], page: Page) -> bool:
    """Are the last blocks of a piece no part of it: THE END, the next title page, a poem ...?"""
    first, *others = blocks
    if LAST_LINE.match(first.text):
        return True
    words = [word for block in blocks for word in block.text.split()]
    small = sum(word[0].islower() for word in words)
    if first.gap > 2 and len(words) < 300 and small < 0.3 * len(words):
        return True  # a title page
    if first.gap < 2 or not is_title(first):
        return False
    poem = bool(others) and all(is_verse(block, page) for block in others)
    author = any(LIFESPAN.search(block.text) for block in others[:3])  # of what follows
    return poem or (author and len(words) < 500)


# ------------------------------------------------------------------------------ blocks -> stories


def cut_story(title: str, blocks: list[Block], page: Page) -> tuple[list[Block], str]:
    """What follows a heading -> the blocks of the story's own text, and its byline or ""."""
    blocks = cut_notes(cut_half_title(title, blocks))
    byline = ""
    first = 0
    while first < len(blocks) and is_front(blocks[first], blocks[first + 1 :], page):
        block = blocks[first]
        match = BYLINE.match(block.text)
        if match and not byline and block.words < 10:
            byline = re.sub(r"[\d(\[].*$", "", match[1] or match[2]).strip(" _.,*")
        first += 1
        if LIFESPAN.search(block.text) and block.words > 15:  # may have several paragraphs
            near = range(first, min(first + 3, len(blocks)))
            first = next((i for i in near if blocks[i].gap > 1), first)
    blocks = blocks[first:]
    for i in range(max(1, len(blocks) - 40), len(blocks)):
        if is_end(blocks[i:], page):
            blocks = blocks[:i]
            break
    while blocks and is_tail(blocks[-1]):
        blocks = blocks[:-1]
    return blocks, byline


def cut_half_title(title: str, blocks: list[Block]) -> list[Block]:
    """What follows where the heading comes again within 250 words: below a half-title."""
    words = 0
    for i, block in enumerate(blocks):
        if block.gap > 1 and len(block.lines) < 7:
            for name, n in heading_keys(block).items():
                if similarity(name, key(title)) > 0.85:
                    rest = block.lines[n:]
                    kept = [Block(block.line, 1, rest)] if rest else []
                    return kept + blocks[i + 1 :]
        words += block.words
        if words > 250:
            break
    return blocks


def cut_notes(blocks: list[Block]) -> list[Block]:
    """What comes before the notes, an appendix or the next preface."""
    words = 0
    for i, block in enumerate(blocks):
        apart = len(block.lines) < 3 and (block.gap > 1 or is_caps(block.text))
        name = key(block.text)
        if words > 100 and apart and FURNITURE.fullmatch(name) and not FOOTNOTES.fullmatch(name):
            return blocks[:i]
        words += block.words
    return blocks


def paragraph(block: Block, page: Page) -> str:
    """A block as text: lines joined (not of verse), one kind of quotation marks, no notes."""
    text = block.text
    if NOTE.match(text) or FOOTNOTES.fullmatch(key(text)) or "http://" in text:
        return ""
    if SCENE_BREAK.match(text):
        return "***"
    if is_verse(block, page):
        text = "\n".join(line.strip() for line in block.lines)
    else:
        text = re.sub(r"(?<=[\w-])- (?=[a-z])", "-", text)  # a word divided at a line's end
    text = SPELT_LETTER.sub(r"\1", NOTE_MARK.sub("", text))
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", text).translate(QUOTES)  # italics
    text = re.sub(r"(?<=\w)(--|\u2014) (?=\w)", r"\1", text)
    text = re.sub(r"-{2,}", "\u2014", text)
    return re.sub(r" {2,}", " ", text).strip()


def split_book(text: str) -> tuple[dict[str, str], list[Story]]:
    """An anthology's text -> its header fields and its pieces in order, of any length and kind."""
    fields, blocks = blocks_of(text)
    page = page_of(blocks)
    book_title, book_author = fields.get("title", ""), fields.get("author", "")
    various = "editor" in fields or not author_key(book_author)
    stories = []
    for head, stop in itertools.pairwise([*find_headings(blocks), len(blocks)]):
        block = blocks[head]
        heading = block.lines[0].strip(" _")
        if FURNITURE.fullmatch(key(heading)):
            continue
        under = [Block(block.line + 1, 1, block.lines[1:])] if block.lines[1:] else []
        title = clean_title(heading)
        body, byline = cut_story(title, under + blocks[head + 1 : stop], page)
        text = "\n\n".join(filter(None, (paragraph(b, page) for b in body)))
        if "(1)" in text:  # a note, as are the others
            text = re.sub(r"\s?\(\d{1,2}\)", "", text)
        author = byline if byline and various else book_author
        story = Story(title, author, text, block.line)
        half_title = similarity(key(block.text), key(book_title)) > 0.85 and story.words < 300
        if text and not half_title:
            stories.append(story)
    return fields, stories


# ---------------------------------------------------------------------------------------- filters


def kind_of(story: Story, fields: dict[str, str]) -> str:
    """ "" for a piece of English narrative prose, else what it seems to be instead."""
    words = re.findall(r"[a-z']+", story.text.lower())
    counts = Counter(words)

    def share(text: str) -> float:
        return sum(counts[word] for word in text.split()) / max(1, len(words))

    language = fields.get("language", "English").lower()
    if language not in ("english", "en", "en-us", "en-gb"):
        return "not English"
    if share("the and of to that it with for") < 0.02:
        return "not English"
    paragraphs = story.text.split("\n\n")
    if sum(len(p.split()) for p in paragraphs if "\n" in p) > 0.4 * story.words:
        return "verse"
    speaker = re.compile(r"[A-Z][A-Z .'-]{1,30}(?:[.:]|\s*\()|[A-Z][a-z]+\.?:")
    if sum(bool(speaker.match(p)) for p in paragraphs) > 0.5 * len(paragraphs):
        return "play"
    if len(re.findall(r"\d", story.text)) > 0.1 * max(1, len(words)):
        return "list or table"
    author = key(re.sub(r"\(.*?\)", "", fields.get("author", "")))
    if " " in author and author in key(story.title):
        return "about the author"
    # An essay speaks of what is, without persons or talk: 20 of 884 pieces are, 3 of them tales.
    past = share("was were had did said went came could would saw looked asked cried told took")
    present = share("is are has have does do can may will be must shall")
    persons = share("he she him her his i me my they")
    talk = sum('"' in p or " '" in p for p in paragraphs) / len(paragraphs)
    if past < 0.4 * (past + present) and persons < 0.045 and talk < 0.6:
        return "essay or sketch"
    return ""


def shingles(text: str) -> set[int]:
    """A sixteenth of the 6-word sequences of a text, by hash: enough to recognise a tale."""
    words = re.findall(r"\w+", text.lower())
    grams = (zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(len(words) - 5))
    return {gram for gram in grams if gram % 16 == 0}


def round_words(words: int) -> int:
    """A length that a person would ask for: to 10 below 300 words, to 50 below 1,000, to 100."""
    step = 10 if words < 300 else 50 if words < 1000 else 100
    return max(step, round(words / step) * step)


class Piece(NamedTuple):
    story: Story
    why: str  # it is dropped; "" for a story to keep
    shingles: set[int]  # of a story to keep


def read_book(path: str, min_words: int, max_words: int) -> tuple[str, dict[str, str], list[Piece]]:
    """A file -> (problem, header, pieces); stories have min_words to max_words when rounded.

    What is wrong with a file is returned, not raised: this runs in a pool of processes, and one bad
    book stops no other.
    """
    try:
        text = read_text(Path(path))
    except DataError as error:
        return str(error), {}, []
    fields, stories = split_book(text)
    if not stories:
        verse = len(find_headings(blocks_of(text)[1]))
        what = "no list of contents, no story headings; a single work?"
        return f"{path}: {f'no story, {verse} pieces of verse' if verse else what}", fields, []
    pieces = []
    for story in stories:
        asked = round_words(story.words)
        if asked < min_words:
            why = "too short"
        elif asked > max_words:
            why = "too long"
        else:
            why = kind_of(story, fields)
        pieces.append(Piece(story, why, set() if why else shingles(story.text)))
    return "", fields, pieces
