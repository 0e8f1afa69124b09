"""Blocks of a book -> the blocks that head its stories.

A contents list (the title list at the front of a book) is a stretch of short lines that come back
later, in the same order, as headings. No other property of the list is used, so it need not be
labelled, numbered, or spelt in any one way:

1. The longest chain of lines whose headings rise with them is the list (`find_list`). An entry
   spelt otherwise takes the most similar heading between its neighbours' (`fill_list`). A volume
   may have a list of its own (`find_listed`), a list may leave out a story (`find_forgotten`).
2. Where nothing recurs, headings are short blocks that share a style and the widest gaps
   (`find_styled`). Where they are marked (EPUB, HTML, Markdown), the marks decide (`find_marked`).
3. Sections (I, II, named parts) stay inside their story, because no list names them, and so do
   chapters that a list names: a book that has nothing else is a single work (`find_chapters`).
"""

import bisect
import difflib
import itertools
import re
from collections import defaultdict
from statistics import median_high
from typing import NamedTuple

from corpus.text import (
    DIVISION,
    NUMBER,
    NUMBERING,
    NUMERAL,
    ORDINAL,
    SECTION,
    Block,
    is_caps,
    key,
)

Chain = list[tuple[int, int]]  # (line of an entry, block of its heading), both rising
Pairs = list[tuple[str, int]]  # (entry, block of its heading)

# ------------------------------------------------------------------------------------------ titles

PART = re.compile(  # "PART II: THE SEA", "LETTER 3"
    rf"^[\W_]*(?:the )?{DIVISION}\b|\b{NUMERAL}[\W_]*$", re.I
)
CHAPTER = re.compile(  # "CHAPTER I. THE ROAD"
    rf"\W*chap(?:ter)?\b[\s.]*(?:{NUMERAL}|{ORDINAL})\b", re.I
)
FURNITURE = re.compile(  # what a book holds besides its stories; on keys
    r"(?:the |an? )?(?:(?:author|editor|translator|publisher|transcriber|producer)s? )?(?:"
    r"(?:preface|foreword|introduction|afterword|foot ?notes?|end ?notes|appendix|appendices|index)"
    r"(?: .*)?|(?:introductory|prefatory|biographical|explanatory)(?: (?:note|essay))?"
    r"|(?:contents|notes?)(?: (?:to|on) .*)?|table of contents|dedication|acknowledge?ments?"
    r"|glossary|errata|addenda|(?:list of )?illustrations|the end|finis|end|l ?envoi|copyright.*"
    r"|title ?page|half ?title|cover|imprint|colophon|uncopyright|landmarks|credits"
    r"|about (?:the|this) (?:\w+ )?(?:author|edition|e ?book|book|text|copy|publisher|translator)"
    r"|(?:other )?(?:books|works|novels|volumes) by .*|by the same author.*|advertisements?"
    r"|(?:some )?(?:new|recent|latest|other) (?:books|fiction|novels|publications|works)(?: .*)?"
    r"|(?:a )?catalogue of .*|(?:some )?(?:press )?(?:notices|opinions)(?: of the press)?"
    r"|(?:select(?:ed)? )?bibliograph.*|books of .*summary|(?:critical )?summary"
    r"|(?:biographical )?roll of hono.*|year ?book of .*|magazine averages"
    r"|(?:best )?(?:books|volumes|articles) (?:of|on|about) (?:the )?(?:short )?stor(?:y|ies).*"
    r"|(?:the )?full (?:project gutenberg )?license)"
)
SOURCE = re.compile(r"^\s*(?:[\[(].*[\])]\W*$|_?from _|\W*copyright\b|\W*reprinted )", re.I)
NOTE_MARK = re.compile(
    r"\s?\[\*?(?:\d{1,3}|[A-Z]|\*+)\]|\{\d{1,3}\}|(?<=\S)\(\d{1,3}\)|\s?\(\*\d{1,3}\)"
    r"|(?<=[\w.,;:!?'\"\u201d\u2019])\*+(?=[\s.,;:!?'\"\u201d\u2019]|$)"
)
LAST_LINE = re.compile(
    r"[\W_]*(?:(?:the end|finis|end of (?:the )?(?:text|vol|book|first|second).{0,40})[\W_]*$"
    r"|printed (?:in|by|at)(?![^\W_]).{0,80}$)",
    re.I,
)
# What may follow a title: "_Author_", "By Author", "(1839)", a page, "; or, ...", ", a tale"
CUT = re.compile(r"\s_|[\s.:]+\(?[Bb][Yy]\b|\s*[\[(]|\s+\d+$|\s{2,}\S|[;:] [Oo][Rr]\b|,")
LEADER = re.compile(r"(?:\s*\.){3,}.*$|\s{2,}(?:\d+|[ivxlc]+)\.?$")  # "Title . . . . 12"


NAME = r"[A-Z][\w.'\u2019-]*"
BYLINE = re.compile(  # "By Walter De La Mare" at the end of a heading or on a line of its own
    r"[\s_(*\[]*\b[Bb][Yy][:\s]+_?(?!(?i:the|an?|my|his|her|our|their|your|its|no|.* and)\b)"
    rf"({NAME}(?:\s+(?:{NAME}|de|la|le|du|der|den|van|von|of))+)[\s_)*\].,]*$"
)


def clean_title(text: str) -> str:
    """A heading without numbering, byline, italics, note marks and "[Written in 1865]"."""
    bare = BYLINE.sub("", NUMBERING.sub("", re.sub(r"[_#*]+", " ", text).strip()))
    bare = re.sub(r"[\s\-\u2014]*(?:\[[^\]]*\]|\([^)]{0,6}\))$", "", NOTE_MARK.sub("", bare))
    return re.sub(r"\s+", " ", bare).strip(" .,;:") or text.strip()


def title_of(block: Block, entry: str) -> tuple[str, int]:
    """The title that a heading spells, and on how many lines; `entry`: its line in the contents."""
    lines = [line.strip(" _") for line in block.lines]
    first = int(len(lines) > 1 and bool(NUMBER.match(lines[0])))
    listed = entry_keys([entry]) if entry else set()
    n = first + 1
    while block.level and n < len(lines) and not re.match(r"(?i)\W*by\b", lines[n]):
        n += 1
    for m, name in enumerate(itertools.accumulate(lines[first : first + 4], "{} {}".format), 1):
        if key(clean_title(name)) in listed:
            n = first + m
            break
    title = clean_title(" ".join(lines[first:n]))
    bare = re.sub(r"[\s:.,\u2014-]+(?:I|1)\W*$", "", title)
    return (bare if key(bare) in listed and key(title) not in listed else title), n


def title_case(title: str, names: dict[str, str] | None = None) -> str:
    """A title in capitals as it would be written in a sentence; `names`: spellings of words."""
    if not is_caps(title):
        return title
    small = "a an and as at but by for from in of on or the to with".split()

    def spell(match: re.Match) -> str:
        word = match[0].lower()
        known = (names or {}).get(word, "")
        if word in small or re.search("[a-z][A-Z]", known):
            return word if word in small else known
        if match[0] != "I" and re.fullmatch("x{0,3}(?:ix|iv|v?i{2,3}|vi)", word):
            return word.upper()
        scots = re.sub("^mc(.)", lambda m: "Mc" + m[1].upper(), word)
        irish = re.sub(
            "^([od])(['\u2019])(.)(?=.)", lambda m: m[1].upper() + m[2] + m[3].upper(), scots
        )
        if re.match("[Mm]a?c[A-Z]", match[0]):
            irish = (
                match[0][: match[0].index("c") + 2] + match[0][match[0].index("c") + 2 :].lower()
            )
        return irish[:1].upper() + irish[1:]

    text = re.sub(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*", spell, title)
    return re.sub(r"^(\W*)(.)", lambda m: m[1] + m[2].upper(), text)


def author_key(author: str) -> str:
    """The surname, as "Anton P. CHEKHOV" and "Anton Chekhov" are one; "" for various authors."""
    name = key(re.sub(r"[\[(].*?[\])]|\b(?:editor|tr)\b.*", "", author)).split()
    return "" if not name or name[-1] in ("various", "anonymous", "unknown") else name[-1]


def heading_keys(block: Block) -> dict[str, int]:
    """Titles that the first lines of a block may spell -> how many lines each takes."""
    keys: dict[str, int] = {}
    if SOURCE.match(block.lines[0]):
        return keys
    bare = [line.strip(" _") for line in block.lines[:4]]
    for n, title in enumerate(itertools.accumulate(bare, "{} {}".format), 1):
        if len(title) <= 120:
            keys.setdefault(key(title), n)
            keys.setdefault(key(clean_title(title)), n)
    keys.pop("", None)
    return keys


def entry_keys(lines: list[str]) -> set[str]:
    """Titles that a line of a list, with the lines over which it may be wrapped, may stand for."""
    forms = set()
    bare_lines = [LEADER.sub("", line.strip()) for line in lines]
    for text in itertools.accumulate(bare_lines, "{} {}".format):
        bare = NUMBERING.sub("", text)
        forms |= {text, bare, *(bare[: match.start()] for match in CUT.finditer(bare))}
    return set(map(key, forms)) - {""}


def is_title(block: Block) -> bool:
    """Is this a few words, each of them with a capital, that no comma ends?"""
    line = block.lines[0].strip(" _")
    if len(block.lines) > 3 or block.words > 16 or len(line) > 80:
        return False
    if not re.search("[A-Za-z]{2}", line) or line[-1] in ",;:":
        return False
    if any(word[0].islower() for word in re.findall(r"[^\W\d_]{4,}", block.text)):
        return False
    return not (FURNITURE.fullmatch(key(line)) or SECTION.match(line) or SOURCE.match(line))


def similarity(a: str, b: str) -> float:
    """Of two keys, from 0 to 1."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


# -------------------------------------------------------------------------------- a list's headings


def find_listed(blocks: list[Block]) -> Pairs:
    """The entries of every contents list: each volume may have its own, before its stories."""
    lines = [(b, line) for b, block in enumerate(blocks) for line in block.lines]
    chain = find_list(lines, blocks)
    if not chain:
        return []
    start = lines[chain[0][0]][0]
    rest = chain[-1][1] + 1
    before = find_listed(blocks[:start])
    pairs = fill_list(chain, lines, blocks)
    after = [(entry, rest + h) for entry, h in find_listed(blocks[rest:])]
    enough = usual_words(pairs, blocks) / 4  # sections of a publisher's catalogue are shorter
    lists = [part for part in (before, pairs, after) if usual_words(part, blocks) > enough]
    return list(itertools.chain(*lists))


def find_list(lines: list[tuple[int, str]], blocks: list[Block]) -> Chain:
    """The contents list among the lines (block, text); [] if there is none.

    For every line that comes back as a heading, suppose that it is the first entry: then the list
    ends before that heading. The longest chain wins, the denser of two equal ones.
    """
    recurring = find_recurring(lines, blocks)
    best: Chain = []
    most = 2.0  # entries, less 2% for each line between them that is none
    for start, (end, *_) in recurring.items():
        options = []
        previous = start
        for n, later in recurring.items():
            if start <= n < previous + 40 and lines[n][0] < end:
                options.append((n, [h for h in later if h >= end]))
                previous = n
        if len(options) <= most:
            continue
        chain = rising_chain(options)
        others = chain[-1][0] - chain[0][0] - len(chain)
        worth = len(chain) - 0.02 * others
        if worth > most:
            best, most = chain, worth
    heads = [h for _, h in best]
    if not best or median_high(gap_above(blocks, h) for h in heads) < 2:
        return []  # headings stand apart; these are phrases that happen to recur
    upper = mostly_caps(heads, blocks)
    titles: Chain = []
    for n, h in best:
        near = bool(titles) and h < titles[-1][1] + 6
        teaser = near and blocks[h].gap < 2 and not is_title(blocks[h])  # below a title
        if not teaser and (blocks[h].gap > 1 or blocks[h].caps == upper):
            titles.append((n, h))
    return titles


def find_recurring(lines: list[tuple[int, str]], blocks: list[Block]) -> dict[int, list[int]]:
    """Lines in the first quarter that may be entries -> later blocks that may be their headings."""
    named = defaultdict(list)
    for b, block in enumerate(blocks):
        for name in heading_keys(block):
            named[name].append(b)
    recurring = {}
    for n, (b, line) in enumerate(lines[: max(600, len(lines) // 4)]):
        if may_be_entry(line):
            names = entry_keys([text for c, text in lines[n : n + 3] if c == b])
            later = {h for name in names for h in named.get(name, ()) if h > b}
            if 0 < len(later) < 5:  # half-title, heading, notes; more often: a refrain
                recurring[n] = sorted(later)
    return recurring


def may_be_entry(line: str) -> bool:
    return len(line.strip()) <= 90 and not SECTION.match(line) and not SOURCE.match(line)


def gap_above(blocks: list[Block], h: int) -> int:
    """Blank lines above a heading, or above the short line before it: the author's name."""
    above, title = blocks[h - 1], blocks[h]
    named = h and is_title(title) and is_title(above) and above.words <= 5
    return max(title.gap, above.gap) if named else title.gap


def mostly_caps(heads: list[int], blocks: list[Block]) -> bool:
    return sum(blocks[h].caps for h in heads) > len(heads) / 2


def rising_chain(options: list[tuple[int, list[int]]]) -> Chain:
    """The longest chain out of [(entry, headings that it may name)]."""
    last: list[int] = []  # smallest last heading of a chain of each length
    nodes: list[tuple] = []  # that chain: (entry, heading, chain before it)
    for entry, headings in options:
        for h in reversed(headings):  # falling, so that an entry is used once
            i = bisect.bisect_left(last, h)
            last[i : i + 1] = [h]
            nodes[i : i + 1] = [(entry, h, nodes[i - 1] if i else None)]
    chain = []
    node = nodes[-1]
    while node:
        *pair, node = node
        chain.append(tuple(pair))
    return chain[::-1]


def fill_list(chain: Chain, lines: list[tuple[int, str]], blocks: list[Block]) -> Pairs:
    """The entries of a list, those included whose spelling differs from their heading's: the block
    between its neighbours' headings, in the style of all, that is most like it.
    """
    heads = [h for _, h in chain]
    first, last = chain[0][0], chain[-1][0]
    gap = sorted(blocks[h].gap for h in heads)[len(heads) // 10]
    upper = mostly_caps(heads, blocks)
    styled = [
        h
        for h, block in enumerate(blocks)
        if block.gap >= gap and len(block.lines) <= 4 and block.caps == upper
    ]
    exact = dict(chain)
    above = lines[last][0]  # the heading before; at first the end of the list
    pairs: Pairs = []
    for n in range(max(0, first - 3), min(last + 40, len(lines))):
        b, line = lines[n]
        if n not in exact and b < heads[0] and may_be_entry(line):
            below = min((h for m, h in chain if m > n), default=len(blocks))
            scores = [
                (similarity(name, title), -h)
                for h in styled
                if above < h < below
                for name in entry_keys([line])
                for title in heading_keys(blocks[h])
            ]
            score, likest = max(scores, default=(0, 0))
            if score > 0.75:
                exact[n] = -likest
        if n in exact:
            above = exact[n]
            pairs.append((line, above))
    return pairs


def piece_words(heads: list[int], blocks: list[Block]) -> list[int]:
    """Words from each of these blocks up to the next one."""
    return [sum(b.words for b in blocks[a:z]) for a, z in itertools.pairwise(heads)]


def usual_words(pairs: Pairs, blocks: list[Block]) -> int:
    """Median length of the pieces between these headings; 0 if there are none."""
    return median_high(piece_words([h for _, h in pairs], blocks) or [0])


def find_forgotten(heads: list[int], blocks: list[Block]) -> list[int]:
    """Headings that a list leaves out: the one title after another's that stands as they do."""
    gap = max(3, median_high(blocks[h].gap for h in heads))
    upper = mostly_caps(heads, blocks)

    def is_like_them(block: Block) -> bool:
        styled = block.gap >= gap and block.caps == upper
        return styled and is_title(block) and not PART.search(block.text)

    ends = (b for b in range(heads[-1], len(blocks)) if LAST_LINE.match(blocks[b].text))
    forgotten = []
    for a, z in itertools.pairwise([*heads, next(ends, len(blocks))]):
        titles = [b for b in range(a + 1, z) if is_like_them(blocks[b])]
        # Several are the parts of one story, a title page, or the author above the next title.
        if len(titles) == 1 and min(piece_words([a, titles[0], z], blocks)) > 300:
            forgotten += titles
    return forgotten


# ---------------------------------------------------------------------------- headings of any book


def find_headings(blocks: list[Block]) -> dict[int, str]:
    """Blocks that head a story (or a preface, poem ...: whatever the list names) -> their entry."""
    marked = find_marked(blocks)
    listed = [] if marked else find_listed(blocks)
    pairs = marked or listed or [(blocks[h].text, h) for h in find_styled(blocks)]
    chapters = find_chapters(pairs, blocks)
    entries = {h: entry for entry, h in pairs if h not in chapters}
    if len(entries) < 2:
        return (entries if listed else {}) or find_single(blocks)
    if listed:
        entries |= {h: "" for h in find_forgotten(list(entries), blocks)}
    return dict(sorted(entries.items()))


def find_single(blocks: list[Block]) -> dict[int, str]:
    """The heading of a file that is one story: the only title, first, of a few thousand words."""
    words = sum(block.words for block in blocks)
    titles = [b for b, block in enumerate(blocks) if is_title(block) and (block.gap > 1 or not b)]
    parts = any(CHAPTER.match(block.lines[0]) for block in blocks)
    prose = [block for block in blocks if block.words > 30]
    if titles == [0] and prose and not parts and 150 < words < 12_000:
        return {0: ""}
    return {}


class Node(NamedTuple):
    """A marked heading and those below it."""

    level: int
    block: int
    words: int  # of its own, before the first heading below it
    below: list["Node"]


def find_marked(blocks: list[Block]) -> Pairs:
    """The marked headings that head stories; [] where fewer than two are.

    A heading with titles below it holds stories if it stands alone, says "part", or if most of its
    neighbours have titles below them too. Otherwise the titles divide one story.
    """
    heads = [b for b, block in enumerate(blocks) if block.level]
    words = piece_words([*heads, len(blocks)], blocks)
    root = Node(0, -1, 0, [])
    path = [root]
    for b, n in zip(heads, words, strict=True):
        node = Node(blocks[b].level, b, n - blocks[b].words, [])
        while path[-1].level >= node.level:
            path.pop()
        path[-1].below.append(node)
        path.append(node)

    def titles(node: Node) -> list[Node]:
        texts = [(blocks[n.block].lines[0].strip(" _"), n) for n in node.below]
        kinds = (FURNITURE.fullmatch, SECTION.match, CHAPTER.match, NUMBERING.match)
        return [
            n
            for t, n in texts
            if n.level < 99 and not (kinds[0](key(t)) or any(k(t) for k in kinds[1:]))
        ]

    def stories(nodes: list[Node]) -> list[int]:
        full = [n for n in nodes if not FURNITURE.fullmatch(key(blocks[n.block].lines[0]))]
        holders = [n for n in full if len(titles(n)) > 1]
        leaves = [n for n in full if n not in holders and (n.words > 20 or n.below)]
        found = []
        for node in full:
            part = PART.search(blocks[node.block].text)
            few = node.words < 150 and (len(holders) > len(leaves) or part)
            if node in holders and (len(full) == 1 or not leaves or few):
                found += stories(node.below)
            elif node in holders or node in leaves:
                found.append(node.block)
        return found

    alone = root
    while len(alone.below) == 1:
        alone = alone.below[0]
    found = stories(alone.below)
    return [(blocks[h].text, h) for h in sorted(found)] if len(found) > 1 else []


def find_styled(blocks: list[Block]) -> list[int]:
    """Headings of a book without a list: titles of one style, after its widest gaps."""
    groups = defaultdict(list)
    for b, block in enumerate(blocks):
        if block.gap > 1 and is_title(block):
            numbered = bool(NUMBERING.match(block.lines[0].strip(" _")))
            groups[numbered, block.caps].append(b)
    total = sum(block.words for block in blocks)
    for _, titles in sorted(groups.items(), reverse=True):  # numbered ones first, then capitals
        for gap in range(max(blocks[b].gap for b in titles), 1, -1):
            heads = [b for b in titles if blocks[b].gap >= gap]
            words = piece_words([*heads, len(blocks)], blocks)
            pieces = [n for n in words if n >= 300]
            shared_out = sum(pieces) > 0.85 * total and max(words) < 0.6 * total
            two = len(heads) == 2 and heads[0] < 3 and min(words) >= 300
            if (len(pieces) >= 3 and shared_out) or (two and sum(words) > 0.95 * total):
                # Gaps are not always typed alike.
                nearly = [b for b in titles if blocks[b].gap == gap - 1 > 1]
                return sorted(heads + nearly) if len(nearly) <= 0.25 * len(heads) else heads
    return []


def find_chapters(pairs: Pairs, blocks: list[Block]) -> set[int]:
    """Headings among these that divide a story.

    "CHAPTER I" always does. A number before a title does where the pieces are short: a list may
    name the chapters of its longest story, among titles without numbers; or those of several, and
    then the numbers start again under titles that have none (and are no "PART ONE", which holds
    stories).
    """
    heads = [h for _, h in pairs]
    bare = set()
    numbers = {}
    for entry, h in pairs:
        text = blocks[h].text
        places = (entry, text, blocks[max(0, h - 1)].text)
        if SECTION.match(blocks[h].lines[0]) or any(map(CHAPTER.match, places)):
            bare.add(h)
        if number := NUMBERING.match(text.strip(" _")) or NUMBERING.match(entry.strip()):
            numbers[h] = number[0]
    numbered = numbers.keys() - bare
    parents = [
        a
        for a, b in itertools.pairwise(heads)
        if a not in numbers
        and re.search(r"\b(?:I|1)\b", numbers.get(b, ""))
        and not PART.search(blocks[a].text)
        and not FURNITURE.fullmatch(key(blocks[a].lines[0]))
    ]
    if len(parents) > 1:
        longest = 2000
    elif len(numbered) < len(heads) / 2:
        longest = 4000
    else:
        return bare
    words = dict(zip(heads, piece_words([*heads, len(blocks)], blocks), strict=True))
    average = sum(words[h] for h in numbered) / max(1, len(numbered))
    return bare | numbered if average < longest else bare
