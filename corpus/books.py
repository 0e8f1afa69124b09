"""A book -> its stories (`read_book`). `data.py build BOOK --show` prints what is found.

    file -> blocks (text.py) -> headings (headings.py) -> stories -> is each one narrative prose?

A story runs from its heading to the next. It loses what is not its prose: at its head the byline,
source, epigraph, dedication and biographical note; at its end date and place, where it appeared,
comments, adverts, the next title page and printer's lines (`cut_story`); notes and licences between
paragraphs (`paragraph`). Numbers and titles of sections become "***", and an opening in SMALL
capitals ordinary letters. What is no English narrative prose is named: verse, play, list, essay
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
    BYLINE as HEADING_BYLINE,
)
from corpus.headings import (
    FURNITURE,
    LAST_LINE,
    NAME,
    NOTE_MARK,
    SOURCE,
    author_key,
    find_headings,
    heading_keys,
    is_title,
    may_be_entry,
    similarity,
    title_case,
    title_of,
)
from corpus.text import NUMBERING, SECTION, SENTENCE_END, Block, blocks_of, is_caps, key, read_text
from data import DataError

FOOTNOTES = re.compile(r"foot ?notes?(?: .{0,40})?")  # may close a section: the story goes on
BYLINE = re.compile(
    r"^[\s_(*\[]*by\b[:\s]+(\S.*)$|^_([A-Z][\w.]*(?: [A-Z][\w.'\u2019-]*){1,3})_(?: \(.*\))?$", re.I
)
DEDICATION = re.compile(r"_?To(?: [A-Z][\w.'\u2019-]*){1,5}_?")
ATTRIBUTION = re.compile(  # "--_Young._", not "so said Suleiman--Solomon."
    r"(?:(?:^|(?<=[\W_]))(?:--|[\u2014\u2013])\s*_?(?!(?:I|It|He|She|We|They|You)\b)"
    r"[A-Z][\w.,'\u2019\" ]{1,60}"
    r"|[ _](?:Proverb|Saying|Song|Ballad|Psalm|Anon))\W*$"
)
CREDIT = re.compile(r"(?:--|[\u2014\u2013])\s*_?[A-Z]")
SCENE_BREAK = re.compile(r"^[\s*.·•+=~#_\-\u2013\u2014\u2015]*$")
NOTE = re.compile(r"^\s*(?:[\[({](?:\*+|\*?(?:\d{1,3}|[A-Z]))[\])}]|\*+\s?[A-Za-z\"\u201c_])")
LIFESPAN = re.compile(  # "(1832-1910)": about an author
    r"\((?:born |b\. )?1\d{3}\s?[-\u2013\u2014]+\s?(?:1\d{3})?\)"
)
PUBLISHED = re.compile(r"\b(?:appeared|published|printed|reprinted)\b.* in .*\b1[789]\d\d\b")
PUBLISHER = re.compile(  # at the end: where and when a story appeared or was written
    rf"[\W_]*(?:(?:{NAME}|\d{{1,2}}(?:st|nd|rd|th)?"
    r"|of|the|in|at|and|from|to|for|vol|no|pp?|[ivxlc]+)[\W_]+){0,14}"
    r"(?:1[5-9]|20)\d\d(?:\s?[-\u2013\u2014/]+\s?\d{2,4})?[\W_]*"
)
CREDITS = re.compile(
    r"\W*(?:first |originally )?(?:published|appeared|printed|reprinted|copyright)\b|"
    r"\W*(?:from|in) [_'\"\u2018\u201c]",
    re.I,
)
DATED = re.compile(r"\b(?:1[5-9]|20)\d\d\b|^\W*[\[(].*[\])]\W*$")
LICENCE = [  # two of them, or one in capitals or <<...>>: no paragraph of a story
    re.compile(text, re.I)
    for text in (
        r"\b(?:electronic|digital) (?:edition|version|text|copy|work)|\be-?(?:text|book)s?\b",
        r"\bthis (?:work|text|edition|copy) ",
        r"\bcopyright|\bcreative commons|\bpublic domain|\blicen[sc]e\b",
        r"\bmay (?:not )?be (?:sold|copied|reproduced|redistributed|distributed|used)\b"
        r"|\ball rights reserved|\bpermission\b|\bpersonal use\b|\bfree(?:ly)? (?:to|of charge)",
        r"\bproject gutenberg|\bdistributed proofread|\bstandard ebooks|\bwikisource"
        r"|\barchive\.org|https?://|\bwww\.",
    )
]
ADVERT = re.compile(r"\b(?:12mo|8vo|16mo)\b|(?:\$\d+\.\d\d|\d+s\.(?: ?\d+d\.)?) net\b", re.I)
ABOUT = re.compile(  # a comment on the story
    r"\b(?:this|the (?:above|foregoing|present|preceding)) (?:short )?(?:story|tale|sketch)\b"
    r"|\bthe (?:author|writer)\b|\bshort[- ]stor(?:y|ies)\b",
    re.I,
)
SPELT_LETTER = re.compile(r"\[(?:[=:^~.)(/'`,]|(?=oe|OE))([A-Za-z]{1,2})\]")  # "[=e]", "[oe]"
CONTENTS = ("contents", "table of contents", "the contents", "list of stories", "the stories")
ENGLISH = "the and to that it with his they she you from were not but this which there"
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
    epigraphs: bool = False  # do its stories have mottoes that name their source?


# --------------------------------------------------------------------------- what a block may be


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def page_of(blocks: list[Block]) -> Page:
    prose = [block.lines for block in blocks if len(block.lines) > 2]
    indents = Counter(indent(lines[0]) for lines in prose)
    margin = max(indents, key=indents.__getitem__, default=0)
    full = [line for lines in prose for line in lines[:-1]]
    capitals = sum(line.strip(" _\"'")[:1].isupper() for line in full)
    if capitals >= 0.8 * len(full) and sum(map(len, full)) <= 60 * len(full):
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


def is_motto(block: Block, page: Page) -> bool:
    """May this be an epigraph: verse, or indented words of another?"""
    inside = min(map(indent, block.lines)) > page.margin + 1
    return is_verse(block, page) or (inside and block.words < 80)


def is_credited(block: Block, following: list[Block], page: Page) -> bool:
    """Does a motto name its source, in its last line or below its last stanza?"""
    last = block.lines[-1].strip(" _")
    deeper = indent(block.lines[-1]) > max(map(indent, block.lines[:-1] or [""])) + 3
    named = len(block.lines) > 2 and (is_caps(last) or (deeper and len(last.split()) < 8))
    if named or ATTRIBUTION.search(block.text):
        return True
    rest = itertools.dropwhile(lambda b: is_verse(b, page) and b.words > 9, following)
    below = next(rest, None)
    if not below or below.words > 9 or not SENTENCE_END.search(below.text):
        return False
    alone = is_motto(below, page) and not re.match(r"\W*[\"'\u2018\u201c]", below.text)
    return bool(CREDIT.match(below.text) or alone or re.fullmatch("_.*_[.]?", below.text))


def is_front(block: Block, following: list[Block], page: Page, signed: bool) -> bool:
    """Is this block, before a story's prose, something else: byline, epigraph, dedication ...?

    Verse, talk and letters that name no source begin the story, unless the book is one of mottoes;
    `signed`: below the byline a magazine announces the story.
    """
    text, words = block.text, block.words
    spoken = bool(re.match(r"\W*[\"'\u2018\u201c]", text)) or is_verse(block, page)
    rest = next(itertools.dropwhile(lambda b: is_verse(b, page), following), None)
    apart = rest is not None and (rest.gap > 1 or is_outside(rest))
    motto = is_motto(block, page) and (
        (signed and not spoken) or page.epigraphs or apart or is_credited(block, following, page)
    )
    below = following[0].text if following and following[0].words < 10 else ""
    credited = CREDIT.match(below) and SENTENCE_END.search(below)
    return bool(
        is_outside(block)
        or motto
        or SOURCE.match(text)
        or DEDICATION.fullmatch(text)
        or text.count("{") > 2  # a table
        or (words <= 12 and not SENTENCE_END.search(text))
        or (words < 15 and BYLINE.match(text))
        or (words < 25 and is_caps(text))
        or (words < 80 and (credited or ATTRIBUTION.search(text)))
        or (words < 100 and re.fullmatch("_.*_", text) and not spoken)
    )


def is_tail(block: Block, above: Block) -> bool:
    """Is this block, after a story's last paragraph, no part of it?"""
    text = block.text
    apart = block.gap > 1 or SCENE_BREAK.match(above.text)
    short = block.words < 20 and (is_caps(text) or not SENTENCE_END.search(text))
    return bool(
        is_outside(block)
        or FOOTNOTES.fullmatch(key(text))
        or (block.words < 40 and (PUBLISHED.search(text) or PUBLISHER.fullmatch(text)))
        or (block.words < 40 and CREDITS.match(text) and (apart or DATED.search(text)))
        or (apart and short)
        or ADVERT.search(text)
        or ((apart or DATED.search(text)) and re.fullmatch(r"\[.*\]", text))
        or not paragraph(block, Page(1000, 0))
    )


def is_comment(blocks: list[Block], author: str) -> bool:
    """Do these last blocks speak about the story that they follow?"""
    text = " ".join(block.text for block in blocks)
    words = re.findall(r"[a-z']+", text.lower())
    present = sum(word in ("is", "are", "has", "have", "may", "will") for word in words)
    past = sum(word in ("was", "were", "had", "said", "did") for word in words)
    about = len(ABOUT.findall(text))
    about += bool(about) and author_key(author) in words
    return len(words) < 400 and present > past and about > 1 and text[:1] not in "\"'\u201c\u2018"


def is_end(blocks: list[Block], above: Block, page: Page, author: str) -> bool:
    """Are the last blocks of a piece no part of it: THE END, the next title page, a poem ...?"""
    first, *others = blocks
    if LAST_LINE.match(first.text):
        return True
    apart = first.gap > 1 or bool(SCENE_BREAK.match(above.text))
    words = [word for block in blocks for word in block.text.split()]
    small = sum(word[0].islower() for word in words)
    if first.gap > 2 and len(words) < 300 and small < 0.3 * len(words):
        return True  # a title page
    open_ends = all(b.words < 20 and not SENTENCE_END.search(b.text) for b in blocks)
    if (SCENE_BREAK.match(above.text) and open_ends) or (apart and is_comment(blocks, author)):
        return True
    if ADVERT.search(first.text) and len(words) < 2000:
        return True
    if first.gap < 2 or not is_title(first):
        return False
    poem = bool(others) and all(is_verse(block, page) for block in others)
    author_of_next = any(LIFESPAN.search(block.text) for block in others[:3])
    return poem or (author_of_next and len(words) < 500)


# ------------------------------------------------------------------------------ blocks -> stories


def cut_story(title: str, blocks: list[Block], page: Page, author: str) -> tuple[list[Block], str]:
    """What follows a heading -> the blocks of the story's own text, and its byline or ""."""
    blocks = cut_notes(cut_half_title(title, blocks))
    byline = ""
    first = 0
    while first < len(blocks) and is_front(blocks[first], blocks[first + 1 :], page, bool(byline)):
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
        if is_end(blocks[i:], blocks[i - 1], page, byline or author):
            blocks = blocks[:i]
            break
    while len(blocks) > 1 and is_tail(blocks[-1], blocks[-2]):
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
        ends = SENTENCE_END.search(block.text.rstrip(":._ "))
        apart = len(block.lines) < 3 and (block.gap > 1 or is_caps(block.text) or not ends)
        name = key(block.text)
        if words > 100 and apart and FURNITURE.fullmatch(name) and not FOOTNOTES.fullmatch(name):
            return blocks[:i]
        words += block.words
    return blocks


def is_licence(text: str) -> bool:
    hits = sum(bool(pattern.search(text)) for pattern in LICENCE)
    loud = is_caps(text) or re.match(r"<<|public domain", text, re.I) or "://" in text
    return hits > 1 or (hits > 0 and bool(loud))


def is_section(block: Block) -> bool:
    """Is this "II", "Part the Second" or "II. THE INN", and nothing that is said or ends?"""
    text = block.text
    if block.words > 11 or re.match(r"\W*[\"'\u2018\u201c]", text):
        return False
    open_end = not SENTENCE_END.search(text)
    numbered = NUMBERING.match(text.strip(" _")) and is_title(block)
    numeral = SECTION.match(text) and (open_end or not re.fullmatch(r"\W*[a-z]+\W*", text, re.I))
    roman = re.fullmatch(r"[\W_]*[IVXLC]+[\W_]*", text)
    return bool(numeral or roman or (open_end and (numbered or SECTION.match(block.lines[0]))))


def paragraph(block: Block, page: Page) -> str:
    """A block as text: lines joined (not of verse), one kind of quotation marks, no notes."""
    text = block.text
    if NOTE.match(text) or FOOTNOTES.fullmatch(key(text)) or is_licence(text):
        return ""
    if SCENE_BREAK.match(text) or block.level or is_section(block):
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


def prose(blocks: list[Block], page: Page, spellings: dict[str, str]) -> str:
    """The paragraphs of a story, between them "***" where a section or scene begins."""
    parts: list[str] = []
    for above, block in itertools.pairwise([Block(0, 0, [""]), *blocks]):
        text = paragraph(block, page)
        titled = SECTION.match(above.text) and is_title(block) and block.words < 12
        if titled and not SENTENCE_END.search(text):
            continue  # the title of a section, below its number
        opens = not parts or parts[-1] == "***"
        if text == "***" and opens:
            continue
        if text:
            parts.append(lower_opening(text, spellings) if opens else text)
    if parts and parts[-1] == "***":
        parts.pop()
    return "\n\n".join(parts)


def spellings_of(blocks: list[Block]) -> dict[str, str]:
    """Words in lower case -> as the book spells them: small if it ever does, else as usual."""
    forms = Counter(
        w for b in blocks for w in re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*", b.text)
    )
    spelt: dict[str, str] = {}
    for form, n in forms.items():
        word = form.lower()
        known = spelt.get(word, "")
        caps = len(form) > 1 and form.isupper()
        if form.islower() or not known or (not caps and known != word and n >= forms[known]):
            spelt[word] = word if form.islower() else form if not (caps and n < 2) else known
        if known and known.isupper() and not caps and known != word:
            spelt[word] = word if form.islower() else form
    return {word: form for word, form in spelt.items() if form}


def lower_opening(text: str, spellings: dict[str, str]) -> str:
    """ "ONCE UPON A time" -> "Once upon a time": an opening in SMALL capitals as elsewhere."""
    words = text.split(" ")
    run = list(itertools.takewhile(lambda w: not re.search(r"[a-zß-öø-ÿ]", w), words))
    cores = re.findall(r"[^\W\d_]+", " ".join(run))
    if not any(len(core) > 1 for core in cores) or len(run) == len(words) > 3:
        mixed = re.match(r"(\W*)([A-Z][A-Z'\u2019]+)(?=\u2014[a-z]|\u2014[A-Z][a-z])", text)
        if not mixed:
            return text
        run, words = [mixed[0]], [mixed[0], text[mixed.end() :]]

    def spell(match: re.Match) -> str:
        word = match[0].lower()
        if word in ("i", "i'm", "i'll", "i've", "i'd") or re.fullmatch(
            "x{0,3}(?:ix|iv|v?i{2,3})", word
        ):
            return match[0] if word.isalpha() else match[0][0] + word[1:]
        return spellings.get(word) or word.capitalize()

    opening = re.sub(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*", spell, " ".join(run))
    opening = re.sub(r"[^\W\d_]", lambda m: m[0].upper(), opening, count=1)
    rest = words[len(run) :]
    joint = "" if len(run) == 1 and text.startswith(run[0] + "\u2014") else " "
    return joint.join([opening, " ".join(rest)]) if rest else opening


def split_book(text: str, whole: str = "") -> tuple[dict[str, str], list[Story]]:
    """An anthology's text -> its header fields and its pieces in order, of any length and kind.

    With `whole` the text is one story, which has this title where it gives none itself.
    """
    fields, blocks = blocks_of(text)
    return fields, split_blocks(fields, blocks, headings_of(fields, blocks, whole), whole)


def headings_of(fields: dict[str, str], blocks: list[Block], whole: str) -> dict[int, str]:
    """Blocks that head stories -> their entry in the contents; -1: the title is `whole`."""
    if not whole:
        return find_headings(blocks)
    return {0: ""} if blocks and is_title(blocks[0]) else {-1: ""}


def split_blocks(
    fields: dict[str, str], blocks: list[Block], headings: dict[int, str], whole: str
) -> list[Story]:
    page = page_of(blocks)
    tops = [blocks[head + 1 : head + 5] for head in headings]
    named = sum(
        any(is_motto(b, page) and is_credited(b, top[i + 1 :], page) for i, b in enumerate(top))
        for top in tops
    )
    verse = sum(any(is_verse(b, page) for b in top[:2]) for top in tops)
    page = page._replace(epigraphs=named > 1 or verse > max(2, len(tops) / 2))
    spellings = spellings_of(blocks)
    book_title, book_author = fields.get("title", ""), fields.get("author", "")
    various = "editor" in fields or not author_key(book_author)
    stories = []
    for head, stop in itertools.pairwise([*headings, len(blocks)]):
        block = blocks[head] if head >= 0 else Block(1, 0, [fields.get("title") or whole])
        title, n = title_of(block, headings[head])
        if FURNITURE.fullmatch(key(title)) or FURNITURE.fullmatch(key(block.lines[0])):
            continue
        under = [Block(block.line + n, 1, block.lines[n:])] if block.lines[n:] else []
        after = blocks[head + 1 : stop]
        if re.search(r" I\W*$", title) and any(b.text.strip(" ._") == "II" for b in after):
            title = re.sub(r"[\s:.,]+I\W*$", "", title)
        body, byline = cut_story(title, under + after, page, book_author)
        text = prose(body, page, spellings)
        if "(1)" in text:  # a note, as are the others
            text = re.sub(r"\s?\(\d{1,2}\)", "", text)
        credit = HEADING_BYLINE.search(block.text)
        byline = byline or (credit[1] if credit else "")
        author = byline if byline and various else book_author
        story = Story(title_case(title, spellings), author, text, block.line)
        written = sum(b.words for b in body if b.words > 24 and SENTENCE_END.search(b.text))
        half_title = similarity(key(block.text), key(book_title)) > 0.85 and written < 80
        if text and not half_title:
            stories.append(story)
    return stories


# ---------------------------------------------------------------------------------------- filters


def kind_of(story: Story, fields: dict[str, str]) -> str:
    """ "" for a piece of English narrative prose, else what it seems to be instead."""
    words = re.findall(r"[a-z']+", story.text.lower())
    counts = Counter(words)

    def share(text: str) -> float:
        return sum(counts[word] for word in text.split()) / max(1, len(words))

    if share(ENGLISH) < 0.03:
        return "not English"
    paragraphs = story.text.split("\n\n")
    entries = re.compile(
        r"[#*]{1,2}[A-Z]|[A-Z][\w ,.'-]{2,40}\. [A-Z][^.]{2,60}\. [A-Z][^.]{2,30}\. "
    )
    if len(paragraphs) > 5 and sum(bool(entries.match(p)) for p in paragraphs) > 0.5 * len(
        paragraphs
    ):
        return "list or table"
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


def doubts(path: str, blocks: list[Block], stories: list[Story], heads: int) -> list[str]:
    """What a result leaves unsaid: most of the book unused, most of its contents list not found."""
    total = sum(block.words for block in blocks)
    used = sum(story.words for story in stories) / max(1, total)
    look = "`--show` prints what was found"
    said = []
    if total > 3000 and used < 0.5:
        said.append(
            f"{path}: only {used:.0%} of its words are in the {len(stories)} pieces; {look}"
        )
    starts = [b for b, block in enumerate(blocks) if key(block.lines[0]) in CONTENTS]
    listed = 0
    for block in blocks[starts[0] :] if starts else []:
        if block.words > 25 and len(block.lines) < block.words / 8:
            break  # prose
        listed += sum(may_be_entry(line) and len(key(line)) > 2 for line in block.lines)
        if block.level and key(block.lines[0]) not in CONTENTS:
            break
    if listed > 5 and heads < listed / 3:
        said.append(f"{path}: {listed} lines in its contents, {heads} found as headings; {look}")
    return said


class Piece(NamedTuple):
    story: Story
    why: str  # it is dropped; "" for a story to keep
    shingles: set[int]  # of a story to keep


class Reading(NamedTuple):
    """What came of a file."""

    problem: str  # why it cannot be used, or ""
    warnings: list[str]
    fields: dict[str, str]
    pieces: list[Piece]


def read_book(path: str, min_words: int, max_words: int, one: bool = False) -> Reading:
    """A file -> what came of it; stories have min_words to max_words when rounded.

    What is wrong with a file is returned, not raised: this runs in a pool of processes, and one bad
    book stops no other. `one`: the whole file is one story.
    """
    warnings: list[str] = []
    try:
        text = read_text(Path(path), warnings)
    except DataError as error:
        return Reading(str(error), [], {}, [])
    fields, blocks = blocks_of(text)
    whole = Path(path).stem if one else ""
    headings = headings_of(fields, blocks, whole)
    heads = len(headings)
    stories = split_blocks(fields, blocks, headings, whole)
    if not stories:
        what = "no list of contents, no story headings; a single work? (one story: --one-per-file)"
        what = f"no story, {heads} pieces of verse" if heads else what
        return Reading(f"{path}: {what}", warnings, fields, [])
    if not one:
        warnings += doubts(path, blocks, stories, heads)
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
    return Reading("", warnings, fields, pieces)
