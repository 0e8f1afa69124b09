"""Books in: the text of an anthology, as Project Gutenberg types it or from an EPUB -> its stories.

A contents list is a stretch of short lines that come back later, in the same order, as headings. That is all that is
asked of it, so no list has to be labelled, numbered, or spelt in any one way:

    text -> blocks (lines between blank ones) -> the longest chain of lines that come back -> headings -> stories

1. Every line that comes back as a heading is tried as the first entry; the list ends before that heading. The longest
   chain of entries whose headings rise with them is the list (`find_list`); an entry that is spelt otherwise takes the
   most similar heading between its neighbours' (`fill_list`). Each volume of a set may have its own list
   (`find_listed`), and a list may have left out a story (`find_forgotten`).
2. Where nothing recurs, headings are the short blocks that share one style (capitals or not, numbered or not) and the
   widest gaps (`find_styled`).
3. Stories start at these headings. Sections (I, II, named parts) stay inside, because no list names them, and so do
   chapters that a list names: a book that has nothing else is a single work (`find_headings`).
4. Each piece loses what is not its prose (`cut_story`): at its head the byline, source, epigraph, dedication,
   biographical note and first section number; at its end the next title page, a poem with a heading of its own and
   printer's lines; and, paragraph by paragraph, notes, page numbers and illustration marks.
5. What is no English narrative prose is named: verse, play, list, essay (`kind_of`). Rules decide; a few slip through.

The method is ours. `read_book` is the way in; `python data.py build BOOK.txt ... --show` prints what it finds.
"""

import bisect
import difflib
import itertools
import posixpath
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from data import DataError

# -------------------------------------------------------------------------------------------------------- files -> text


def read_text(path: Path) -> str:
    """A book as text. DataError for what is no readable text, with what to do."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its files, e.g. {path}/*.txt")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise DataError(
            f"{path}: the file is empty; fetch it again, e.g. with `python data.py gutenberg`"
        )
    if zipfile.is_zipfile(path) or path.suffix.lower() == ".epub":
        return epub_text(path)
    if b"\0" in raw:
        raise DataError(f"{path}: holds binary data; give plain text (UTF-8) or EPUB")
    encoding = re.search(
        rb"(?i)character set encoding:\s*(iso-?8859-1|iso-latin-1|cp1252|windows-1252)", raw[:4000]
    )
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
        if tag in ("i", "em"):
            self.text += "_"
        elif re.fullmatch(r"h[1-6]|p|div|li|tr|blockquote", tag):
            self.text += "\n\n"

    def handle_data(self, data):
        if not self.skip:
            self.text += re.sub(r"\s+", " ", data)


def epub_text(path: Path) -> str:
    """The pages of an EPUB in reading order, with the title and author of its package as header lines."""
    try:
        with zipfile.ZipFile(path) as book:
            package_path = re.search(
                r'full-path="([^"]+)"', book.read("META-INF/container.xml").decode()
            )[1]
            package = ElementTree.fromstring(book.read(package_path))
            files = {item.get("id"): item.get("href") for item in package.findall(".//{*}item")}
            folder = posixpath.dirname(package_path)
            pages = [
                posixpath.join(folder, files[ref.get("idref")])
                for ref in package.findall(".//{*}itemref")
            ]
            text = ""
            for page in pages:
                parser = _Page()
                parser.feed(book.read(unquote(page)).decode("utf-8-sig"))
                text += parser.text + "\n\n\n\n"
    except (
        KeyError,
        TypeError,
        UnicodeDecodeError,
        zipfile.BadZipFile,
        ElementTree.ParseError,
    ) as error:
        raise DataError(
            f"{path}: no EPUB that can be read ({error!r}); give plain text instead"
        ) from None
    names = {"title": "Title", "creator": "Author", "language": "Language"}
    header = [f"{names[name]}: {package.findtext(f'.//{{*}}{name}') or ''}" for name in names]
    return "\n".join([*header, "*** START OF THIS PROJECT GUTENBERG EBOOK ***", "", "", "", text])


# ------------------------------------------------------------------------------------------------------- text -> blocks

START = re.compile(
    r"^\W*START OF (?:THE|THIS) PROJECT GUTENBERG|^\W*END\W*THE SMALL PRINT", re.IGNORECASE
)
END = re.compile(
    r"^\W*END OF (?:THE |THIS )?PROJECT GUTENBERG|^\W*START: FULL LICENSE|^\W*THIS FILE SHOULD BE NAMED",
    re.IGNORECASE,
)
BRACKETED = re.compile(  # [Illustration: ...], [Footnote 1: ... [a] ...], [Pg 9], [* ...]: at most one level inside
    r"\[\s*\W*(?:illustration|picture|image|decoration|footnote|transcriber|p(?:g|age)\.? \d)"
    r"(?:[^\[\]]|\[[^\[\]]*\]){0,3000}\]"
    r"|\[\*+ [^\[\]]{0,1000}\]",
    re.IGNORECASE,
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
    rf"^[\W_]*(?:(?:the )?{DIVISION}\b[\s.]*)?(?:{NUMERAL}\b|(?:the )?{ORDINAL}(?: {DIVISION})?)[\W_]*$",
    re.IGNORECASE,
)
PART = re.compile(
    rf"^[\W_]*(?:the )?{DIVISION}\b|\b{NUMERAL}[\W_]*$", re.IGNORECASE
)  # "PART II: THE SEA", "LETTER 3"
CHAPTER = re.compile(
    rf"\W*chap(?:ter)?\b[\s.]*(?:{NUMERAL}|{ORDINAL})\b", re.IGNORECASE
)  # "CHAPTER I. THE ROAD"
NUMBER = re.compile(
    rf"\W*(?:(?:adventure|story|tale|no|number)\b\.?\s*)?{NUMERAL}\W*$", re.IGNORECASE
)  # above a title
FIRST = re.compile(r"\b(?:I|1)\b")
FURNITURE = re.compile(  # what a book holds besides its stories; on keys
    r"(?:the )?(?:(?:author|editor|translator|publisher|transcriber)s? )?(?:"
    r"(?:preface|foreword|introduction|foot ?notes?|end ?notes|appendix|appendices|index)(?: .*)?"
    r"|(?:introductory|prefatory|biographical|explanatory)(?: (?:note|essay))?|(?:contents|notes?)(?: (?:to|on) .*)?"
    r"|dedication|acknowledge?ments?|glossary|bibliography|errata|addenda|(?:list of )?illustrations|the end|finis|end"
    r"|l ?envoi|by the same author)"
)
# What an entry may have after its title: "_Author_", "By Author", "(1839)", a page, another column, "; or, ..."
CUT = re.compile(r"\s_|[\s.,:]+\(?[Bb][Yy]\b|\s*[\[(]|\s+\d+$|\s{2,}\S|[;:,] [Oo][Rr]\b")
CUT_AT_COMMA = re.compile(CUT.pattern + "|,")
FOOTNOTES = re.compile(
    r"foot ?notes?(?: .{0,40})?"
)  # these may close a section, and the story goes on
BYLINE = re.compile(
    r"^[\s_(*\[]*by\b[:\s]+(\S.*)$|^_([A-Z][\w.]*(?: [A-Z][\w.'\u2019-]*){1,3})_(?: \(.*\))?$",
    re.IGNORECASE,
)
SOURCE = re.compile(
    r"^\s*(?:[\[(].*[\])]\W*$|_?from _|\W*copyright\b|\W*reprinted )", re.IGNORECASE
)
ATTRIBUTION = re.compile(  # "--_Young._", not "so said Suleiman--Solomon."
    r"(?:(?:^|(?<=[\W_]))(?:--|[\u2014\u2013])\s*_?[A-Z][\w.,'\u2019\" ]{1,60}"
    r"|[ _](?:Proverb|Saying|Song|Ballad|Psalm|Anon))\W*$"
)
STARS = re.compile(r"^\s*(?:\*\s*){3,}$")
SCENE_BREAK = re.compile(r"^[\s*.·•+=~#_\-\u2013\u2014\u2015]*$")
NOTE = re.compile(r"^\s*(?:[\[({](?:\*+|\*?(?:\d{1,3}|[A-Z]))[\])}]|\*+\s?[A-Za-z\"\u201c_])")
NOTE_MARK = re.compile(
    r"\s?\[\*?(?:\d{1,3}|[A-Z]|\*+)\]|\{\d{1,3}\}|(?<=\S)\(\d{1,3}\)|\s?\(\*\d{1,3}\)"
    r"|(?<=[\w.,;:!?'\"\u201d\u2019])\*+(?=[\s.,;:!?'\"\u201d\u2019]|$)"
)
LAST_LINE = re.compile(
    r"[\W_]*(?:(?:the end|finis|end of (?:the )?(?:vol|book|first|second).{0,40})[\W_]*$"
    r"|printed (?:in|by|at)(?![^\W_]).{0,80}$)",
    re.IGNORECASE,
)
LIFESPAN = re.compile(
    r"\((?:born |b\. )?1\d{3}\s?[-\u2013\u2014]+\s?(?:1\d{3})?\)"
)  # "(1832-1910)": about an author
PUBLISHED = re.compile(r"\b(?:appeared|published|printed|reprinted)\b.* in .*\b1[789]\d\d\b")
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
    sizes = [len(list(run)) for full, run in itertools.groupby(lines[first:last], bool) if full]
    tight = 2 * sum(n for n in sizes if n > 30) > sum(
        sizes
    )  # no blank lines between paragraphs: an indent starts one
    blocks, gap = [], 0
    for number, line in enumerate(lines[first:last], first + 1):
        if not line:
            gap += 1
            continue
        above = blocks[-1].lines if blocks else []
        alone = (
            len(above) == 1 and NUMBER.match(above[0]) or any(map(STARS.match, [line, *above[-1:]]))
        )
        if gap or not above or alone or (tight and line.startswith("  ")):
            blocks.append(Block(number, gap, [line]))
        else:
            above.append(line)
        gap = 0
    for number, block in itertools.pairwise(blocks):
        if SECTION.match(number.text):  # "IV", then the title: the gap before both counts
            block.gap = max(block.gap, number.gap)
    return fields, blocks


# --------------------------------------------------------------------------------------------------------------- titles


def key(text: str) -> str:
    """What counts when titles are compared: letters and digits, unaccented, in lower case."""
    text = (
        unicodedata.normalize("NFKD", text.replace("æ", "ae").replace("œ", "oe"))
        .encode("ascii", "ignore")
        .decode()
    )
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"['`]", "", text.lower())))


def is_caps(text: str) -> bool:
    # "No. 2--McWILLIAMS" is in capitals too
    text = re.sub(r"\b[Mm]a?c(?=[A-Z])", "", NUMBERING.sub("", text.strip(" _")))
    letters = re.sub(r"[\W\d_]", "", text)
    return len(re.findall(r"[a-zß-öø-ÿ]", letters)) < 0.1 * len(letters)


def clean_title(text: str) -> str:
    """A heading without numbering, italics, note marks and "[Written in 1865]"."""
    bare = NOTE_MARK.sub("", NUMBERING.sub("", text.replace("_", " ").strip()))
    return (
        re.sub(r"[\s\-\u2014]*(?:\[[^\]]*\]|\([^)]{0,6}\))$", "", bare).strip(" .,;:")
        or text.strip()
    )


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


def entry_keys(lines: list[str], cut: re.Pattern = CUT) -> list[str]:
    """Titles that a line of a contents list, with the lines over which it may be wrapped, may stand for."""
    forms: dict[str, None] = {}  # an ordered set
    for n in range(1, len(lines) + 1):
        text = " ".join(
            re.sub(r"(?:\s*\.){3,}.*$|\s{2,}(?:\d+|[ivxlc]+)\.?$", "", line.strip())
            for line in lines[:n]
        )
        bare = NUMBERING.sub("", text)
        if about := re.match(r"([^a-z]{3,}?),.*[a-z]", bare):  # "TITLE, concerning Somebody"
            forms[about[1]] = None
        forms |= dict.fromkeys(
            [text, bare, *(bare[: match.start()] for match in cut.finditer(bare))]
        )
    return list({name: None for name in map(key, forms) if name})


def is_title(block: Block) -> bool:
    """Is this a few words, each of them with a capital, that no comma ends?"""
    line = block.lines[0].strip(" _")
    short = len(block.lines) <= 3 and len(block.text.split()) <= 16 and len(line) <= 80
    capitals = all(
        word[0].isupper() for word in re.findall(r"[^\W\d_]+", block.text) if len(word) > 3
    )
    named = (
        re.search("[A-Za-z]{2}", line)
        and line[-1] not in ",;:"
        and not FURNITURE.fullmatch(key(line))
    )
    return bool(short and capitals and named and not SECTION.match(line) and not SOURCE.match(line))


def title_case(title: str) -> str:
    small = "a an and as at by for from in of on or the to with".split()
    words = [
        w if w in small and i else w[:1].upper() + w[1:]
        for i, w in enumerate(title.lower().split())
    ]
    return " ".join(words) if is_caps(title) else title


def author_key(author: str) -> str:
    """The surname: "Anton P. CHEKHOV" and "Anton Chekhov" are one (and so are two Jameses); "" for various authors."""
    name = key(re.sub(r"[\[(].*?[\])]|\b(?:editor|tr)\b.*", "", author)).split()
    return "" if not name or name[-1] in ("various", "anonymous", "unknown") else name[-1]


# --------------------------------------------------------------------------------------------------- blocks -> headings


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
            if (
                0 < len(later) < 5
            ):  # a title comes again as half-title, heading, in notes; a refrain in every story
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
    gaps = sorted(gap_above(blocks, h) for _, h in best)
    if (
        best and gaps[len(gaps) // 2] < 2
    ):  # headings stand apart; these are phrases that happen to recur
        return []
    upper = 2 * sum(is_caps(blocks[h].lines[0]) for _, h in best) > len(best)
    return [(n, h) for n, h in best if blocks[h].gap > 1 or is_caps(blocks[h].lines[0]) == upper]


def gap_above(blocks: list[Block], h: int) -> int:
    """Blank lines before a heading, or before the short line above it: the author's name."""
    above, title = blocks[h - 1], blocks[h]
    named = h and is_title(title) and is_title(above) and len(above.text.split()) <= 5
    return max(title.gap, above.gap) if named else title.gap


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
            if (
                b >= chain[0][1]
                or len(line.strip()) > 90
                or SECTION.match(line)
                or SOURCE.match(line)
            ):
                continue
            names = entry_keys([line], CUT_AT_COMMA)
            scored = [
                (
                    max(
                        (same_entry(a, b) for a in names for b in heading_keys(blocks[h])),
                        default=0,
                    ),
                    -h,
                )
                for h in range(h1 + 1, h2)
                if blocks[h].gap >= gap
                and len(blocks[h].lines) <= 4
                and is_caps(blocks[h].lines[0]) == upper
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
    if min(len(entry), len(heading)) > 3 and (
        f"{entry} ".startswith(f"{heading} ") or heading.startswith(f"{entry} ")
    ):
        return 0.9
    return similarity(entry, heading)


def find_styled(blocks: list[Block]) -> list[int]:
    """Headings of a book without a list: short blocks of one style after its widest gaps, that share out its words."""
    words = [len(block.text.split()) for block in blocks]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for b, block in enumerate(blocks):
        if block.gap > 1 and is_title(block):
            line = block.lines[0].strip(" _")
            groups.setdefault((bool(NUMBERING.match(line)), is_caps(line)), []).append(b)
    for _, found in sorted(groups.items(), reverse=True):  # numbered titles first, then capitals
        for gap in range(max(blocks[b].gap for b in found), 1, -1):
            heads = [b for b in found if blocks[b].gap >= gap]
            sizes = [sum(words[a:z]) for a, z in itertools.pairwise([*heads, len(blocks)])]
            whole = [size for size in sizes if size >= 300]
            if len(whole) >= 3 and sum(whole) > 0.85 * sum(words) and max(sizes) < 0.6 * sum(words):
                nearly = [
                    b for b in found if blocks[b].gap == gap - 1 > 1
                ]  # gaps are not always typed alike
                return sorted(heads + nearly) if len(nearly) <= 0.25 * len(heads) else heads
    return []


def find_listed(blocks: list[Block]) -> list[tuple[str, int]]:
    """(entry, its heading's block) of every contents list: each volume may have its own, before its stories."""
    chain = find_list(blocks)
    if not chain:
        return []
    start = [b for b, block in enumerate(blocks) for _ in block.lines][chain[0][0]]
    rest = chain[-1][1] + 1
    before, pairs = find_listed(blocks[:start]), fill_list(chain, blocks)
    after = [(entry, rest + h) for entry, h in find_listed(blocks[rest:])]
    enough = usual_words(pairs, blocks) / 4  # the sections of a publisher's catalogue are shorter
    return [
        pair
        for part in (before, pairs, after)
        if usual_words(part, blocks) > enough
        for pair in part
    ]


def usual_words(pairs: list[tuple[str, int]], blocks: list[Block]) -> int:
    """Median length of the pieces between these headings; 0 if there are none."""
    heads = [h for _, h in pairs]
    words = sorted(
        sum(len(b.text.split()) for b in blocks[a:z]) for a, z in itertools.pairwise(heads)
    )
    return words[len(words) // 2] if words else 0


def find_forgotten(heads: list[int], blocks: list[Block]) -> list[int]:
    """Headings that a list leaves out: the one title after another's that stands as they do."""
    words = [0, *itertools.accumulate(len(block.text.split()) for block in blocks)]
    gap = sorted(blocks[h].gap for h in heads)[len(heads) // 2]
    upper = 2 * sum(is_caps(blocks[h].lines[0]) for h in heads) > len(heads)
    forgotten = []
    end = next(
        (b for b in range(heads[-1], len(blocks)) if LAST_LINE.match(blocks[b].text)), len(blocks)
    )
    for a, z in itertools.pairwise([*heads, end]):
        titles = [
            b for b in range(a + 1, z) if blocks[b].gap >= max(gap, 3) and is_title(blocks[b])
        ]
        titles = [
            b
            for b in titles
            if is_caps(blocks[b].lines[0]) == upper and not PART.search(blocks[b].text)
        ]
        # Several are the parts of one story, a title page, or the author's name above the next title.
        if len(titles) == 1 and min(words[titles[0]] - words[a], words[z] - words[titles[0]]) > 300:
            forgotten += titles
    return forgotten


def find_headings(blocks: list[Block]) -> list[int]:
    """Blocks that head a story (or a preface, poem ...: whatever the list names)."""
    listed = find_listed(blocks)
    pairs = listed or [(blocks[h].text, h) for h in find_styled(blocks)]
    heads = [h for _, h in pairs]
    bare = {h for h in heads if SECTION.match(blocks[h].lines[0])}
    bare |= {
        h
        for entry, h in pairs
        if any(map(CHAPTER.match, (entry, blocks[h].text, blocks[max(0, h - 1)].text)))
    }
    numbers = {
        h: NUMBERING.match(blocks[h].text.strip(" _")) or NUMBERING.match(entry.strip())
        for entry, h in pairs
    }
    numbered = {h for h in heads if numbers[h]} - bare
    lengths = [
        sum(len(b.text.split()) for b in blocks[a:z])
        for a, z in itertools.pairwise([*heads, len(blocks)])
    ]
    average = sum(n for h, n in zip(heads, lengths, strict=True) if h in numbered) / max(
        1, len(numbered)
    )
    # A list may name the chapters of its longest story: numbered among titles that are not, and short. Or those of
    # several: then the numbers start again under titles that have none (and are no "PART ONE", which holds stories).
    titles = [
        a
        for a, b in itertools.pairwise(heads)
        if not numbers[a] and numbers[b] and FIRST.search(numbers[b][0])
    ]
    titles = [
        h
        for h in titles
        if not PART.search(blocks[h].text) and not FURNITURE.fullmatch(key(blocks[h].lines[0]))
    ]
    longest = 2000 if len(titles) > 1 else 4000 if len(numbered) < len(heads) / 2 else 0
    chapters = numbered if average < longest else set()
    heads = [h for h in heads if h not in bare | chapters]
    if len(heads) < 2:
        return heads if listed else []
    return sorted(heads + find_forgotten(heads, blocks)) if listed else heads


# -------------------------------------------------------------------------------------------------- headings -> stories


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_verse(block: Block, width: int) -> bool:
    """Do lines start with a capital, and end before the margin at `width`?"""
    starts = [re.sub(r"^[\W_]+", "", line)[:1] for line in block.lines]
    free = sum(
        len(a) + 1 + len(b.split()[0]) < width - 8 for a, b in itertools.pairwise(block.lines)
    )
    capitals = sum(s.isupper() for s in starts) / len(starts)
    return len(starts) > 1 and capitals >= 0.7 and free >= 0.6 * (len(starts) - 1)


def is_front(block: Block, following: list[Block], width: int, margin: int) -> bool:
    """Is this block before the prose of a story something else: byline, source, epigraph, dedication, section ...?"""
    text, words = block.text, len(block.text.split())
    note = following[0].text if following and len(following[0].text.split()) < 10 else ""
    return bool(
        SCENE_BREAK.match(text)
        or SECTION.match(text)
        or NOTE.match(text)
        or SOURCE.match(text)
        or text.count("{") > 2  # a table
        or LIFESPAN.search(text)
        or re.fullmatch(r"_?To(?: [A-Z][\w.'\u2019-]*){1,5}_?", text)
        or is_verse(block, width)
        or (words < 15 and BYLINE.match(text))
        or (words < 25 and is_caps(text))
        or (words <= 12 and not SENTENCE_END.search(text))
        or (words < 100 and text.startswith("_") and text.endswith("_"))
        or (words < 80 and min(map(indent, block.lines)) > margin + 1)
        or (words < 80 and ATTRIBUTION.search(text))
        or (
            words < 80
            and re.match(r"(?:--|[\u2014\u2013])\s*_?[A-Z]", note)
            and SENTENCE_END.search(note)
        )
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
        or LIFESPAN.search(text)
        or (len(text.split()) < 40 and PUBLISHED.search(text))
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
        if (
            apart
            and FURNITURE.fullmatch(key(block.text))
            and not FOOTNOTES.fullmatch(key(block.text))
        ):
            blocks = blocks[:i]
            break
        words += len(block.text.split())
    first, byline = 0, ""
    while first < len(blocks) and is_front(blocks[first], blocks[first + 1 :], width, margin):
        text = blocks[first].text
        match = BYLINE.match(text)
        if match and not byline and len(match[0].split()) < 10:
            byline = re.sub(r"[\d(\[].*$", "", match[1] or match[2]).strip(" _.,*")
        first += 1
        if (
            LIFESPAN.search(text) and len(text.split()) > 15
        ):  # a note on the author may have several paragraphs
            first = next(
                (i for i in range(first, min(first + 3, len(blocks))) if blocks[i].gap > 1), first
            )
    blocks = blocks[first:]
    for i in range(
        max(1, len(blocks) - 40), len(blocks)
    ):  # THE END, the printer, the next title page, a poem ...
        page, apart = blocks[i:], blocks[i].gap > 1 and is_title(blocks[i])
        after = [word for b in page for word in b.text.split()]
        titles = len(after) < 300 and sum(word[0].islower() for word in after) < 0.3 * len(after)
        poem = apart and page[1:] and all(is_verse(b, width) for b in page[1:])
        author = (
            apart and len(after) < 500 and any(LIFESPAN.search(b.text) for b in page[1:4])
        )  # of what follows
        if LAST_LINE.match(page[0].text) or (page[0].gap > 2 and titles) or poem or author:
            blocks = blocks[:i]
            break
    while blocks and is_tail(blocks[-1]):
        blocks = blocks[:-1]
    return blocks, byline


QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "`": "'"}
)


def paragraph(block: Block, width: int) -> str:
    """A block as text: wrapping undone (not of verse), italics, quotation marks and dashes normalised, notes out."""
    if NOTE.match(block.text) or FOOTNOTES.fullmatch(key(block.text)) or "http://" in block.text:
        return ""
    if SCENE_BREAK.match(block.text):
        return "***"
    if is_verse(block, width):
        text = "\n".join(line.strip() for line in block.lines)
    else:
        text = re.sub(r"(?<=[\w-])- (?=[a-z])", "-", block.text)
    text = re.sub(
        r"\[(?:[=:^~.)(/'`,]|(?=oe|OE))([A-Za-z]{1,2})\]", r"\1", NOTE_MARK.sub("", text)
    )  # "[=e]"
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", text).translate(QUOTES)
    text = re.sub(r"-{2,}|\u2014", "\u2014", re.sub(r"(?<=\w)(--|\u2014) (?=\w)", r"\1", text))
    return re.sub(r" {2,}", " ", text).strip()


def split_book(text: str) -> tuple[dict[str, str], list[Story]]:
    """A plain-text anthology -> its header fields and its pieces in order (not filtered by length or kind)."""
    fields, blocks = blocks_of(text)
    heads = find_headings(blocks)
    long = [line for block in blocks if len(block.lines) > 2 for line in block.lines[:-1]]
    width = sorted(map(len, long))[int(0.9 * len(long))] if long else 72
    if sum(line.strip(" _\"'")[:1].isupper() for line in long) > 0.8 * len(
        long
    ):  # all verse: its lines set no margin
        width = 1000
    margin = Counter(
        indent(block.lines[0]) for block in blocks if len(block.lines) > 2
    ).most_common(1)
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
        if "(1)" in text:  # a note, as are the others
            text = re.sub(r"\s?\(\d{1,2}\)", "", text)
        half_title = (
            similarity(key(block.text), key(fields.get("title", ""))) > 0.85
            and len(text.split()) < 300
        )
        if text and not half_title:
            various = author_key(fields.get("author", "")) == "" or "editor" in fields
            author = byline if byline and various else fields.get("author", "")
            stories.append(Story(clean_title(title), author, text, block.line))
    return fields, stories


# -------------------------------------------------------------------------------------------------------------- filters


def kind_of(story: Story, fields: dict[str, str]) -> str:
    """ "" for a piece of English narrative prose, else what it seems to be instead."""
    words = re.findall(r"[a-z']+", story.text.lower())
    count, n = Counter(words), max(1, len(words))
    share = lambda text: sum(count[word] for word in text.split()) / n  # noqa: E731
    paragraphs = story.text.split("\n\n")
    speakers = sum(
        bool(re.match(r"[A-Z][A-Z .'-]{1,30}(?:[.:]|\s*\()|[A-Z][a-z]+\.?:", p)) for p in paragraphs
    )
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
    # An essay speaks of what is, without persons or talk. 20 of 884 pieces of 950 to 4,049 words are such; 3 are tales.
    talk = sum('"' in p or " '" in p for p in paragraphs) / len(paragraphs)
    if (
        past < 0.4 * (past + present)
        and share("he she him her his i me my they") < 0.045
        and talk < 0.6
    ):
        return "essay or sketch"
    return ""


def shingles(text: str) -> set[int]:
    """A sixteenth of the 6-word sequences of a text, by hash: enough to see that two texts are one tale."""
    words = re.findall(r"\w+", text.lower())
    grams = (zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(len(words) - 5))
    return {gram for gram in grams if gram % 16 == 0}


def round_words(words: int) -> int:
    """A length that a person would ask for: to 10 below 300 words, to 50 below 1,000, to 100 above."""
    step = 10 if words < 300 else 50 if words < 1000 else 100
    return max(step, round(words / step) * step)


def read_book(
    path: str, min_words: int, max_words: int
) -> tuple[str, dict, list[tuple[Story, int, str, set[int]]]]:
    """A file -> (problem, header, [(piece, words, why it is dropped, shingles)]).

    The reason is "" for a story of min_words to max_words, rounded as its prompt will ask for them. What is wrong with
    a file is returned, not raised: this runs in a pool of processes, and one bad book stops no other.
    """
    try:
        text = read_text(Path(path))
    except DataError as error:
        return str(error), {}, []
    fields, stories = split_book(text)
    if not stories:
        found = len(find_headings(blocks_of(text)[1]))
        what = (
            f"no story, {found} pieces of verse"
            if found
            else "no list of contents, no story headings; a single work?"
        )
        return f"{path}: {what}", fields, []
    pieces = []
    for story in stories:
        words = len(story.text.split())
        asked = round_words(words)
        why = (
            "too short"
            if asked < min_words
            else "too long"
            if asked > max_words
            else kind_of(story, fields)
        )
        pieces.append((story, words, why, set() if why else shingles(story.text)))
    return "", fields, pieces
