"""Book files -> blocks: plain text, Markdown, HTML or EPUB.

A block is a run of lines between blank ones. In plain text a heading is known by the blank lines
above it. What has headings of its own (EPUB, HTML, Markdown) is written as plain text first, each
heading behind a mark with its level (pages.py), so that nothing has to be guessed there.
"""

import codecs
import itertools
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from corpus.pages import MARK, epub_text, html_text, markdown_text
from data import DataError

# ----------------------------------------------------------------------------------- files -> text

DECLARED = re.compile(rb"(?i)(?:character set )?encoding\W{1,4}([\w-]+)|charset\W{1,3}([\w-]+)")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HTML = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype html|html)\b", re.I | re.S
)


def decode(raw: bytes) -> tuple[str, str]:
    """Bytes -> text, and a warning or "". What declares nothing and is no UTF-8: Windows-1252."""
    for bom, encoding in BOMS.items():
        if raw.startswith(bom):
            return raw.decode(encoding, "replace"), ""
    zeros = [raw[:4000:2].count(0), raw[1:4000:2].count(0)]
    if (
        len(raw) > 9
        and max(zeros) > 0.6 * len(raw[:4000:2])
        and min(zeros) < 0.1 * len(raw[:4000:2])
    ):
        return raw.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "replace"), ""
    if b"\0" in raw:
        raise DataError("holds binary data; give plain text, Markdown, HTML or EPUB")
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
    text = raw.decode("utf-8", "ignore")
    if 2 * sum(ord(c) > 127 for c in text) > len(raw) - len(text.encode()):
        how = "bytes that are none were left out; fetch the file again"
        return text, f"line {line} is not UTF-8, the most is; {how}"
    declared = DECLARED.search(raw[:4000])
    name = (declared[1] or declared[2]).decode() if declared else ""
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        codec = ""
    if codec in ("ascii", "iso8859-1", "utf-8"):  # all that such files hold beyond is Windows-1252
        codec = "" if codec == "utf-8" else "cp1252"
    text = raw.decode(codec or "cp1252", "replace")
    how = "read as Windows-1252; if that is wrong, convert it: iconv -f ENCODING -t UTF-8"
    return text, "" if codec else f"line {line} is not UTF-8 and no encoding is declared; {how}"


def read_bytes(path: Path) -> bytes:
    """What a file holds. DataError says why not."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its files, e.g. {path}/*.txt")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        what = "the file is empty; fetch it again, e.g. with `python data.py gutenberg`"
        raise DataError(f"{path}: {what}")
    return raw


def read_text(path: Path, warnings: list[str] | None = None) -> str:
    """A book as text with marked headings. DataError for what is no readable text."""
    raw = read_bytes(path)
    try:
        if zipfile.is_zipfile(path) or path.suffix.lower() == ".epub":
            return epub_text(path)
        text, warning = decode(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if warning and warnings is not None:
        warnings.append(f"{path}: {warning}")
    text = re.sub(r"\r\n?", "\n", text).replace("\f", "\n").replace(MARK, "")
    if HTML.match(text):
        return html_text(text)
    headings = len(re.findall(r"(?m)^#{1,6} \S", text))
    if path.suffix.lower() in (".md", ".markdown") or headings > 1:
        return markdown_text(text)
    return text


# --------------------------------------------------------------------------------- lines and titles

NUMERAL = r"(?:(?=[IVXLC])(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})|\d+)"
NUMBER_WORD = (
    "(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen"
    "|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty)(?:-(?:one|two|three|four|five|six"
    "|seven|eight|nine))?"
)
ORDINAL = f"(?:{NUMBER_WORD}|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last)"
DIVISION = "(?:chap(?:ter)?|part|book|vol(?:ume)?|section|canto|letter|scene|act|story|episode)"
NUMBERING = re.compile(  # "IV. ", "3 -- ", "ONE: ", "ADVENTURE I. ", "No. 1--", "II     "
    r"^(?:(?:the )?(?:adventure|chap(?:ter)?|story|tale|no|number)\b\.?\s*(?:the )?)?"
    rf"(?:{NUMERAL}(?:[.):]+\s*|\s*(?:--+|[\u2013\u2014])\s*|\s+-\s+|\s{{2,}})|(?-i:[IVX]{{2,}}) "
    rf"|{ORDINAL}(?:\s*(?:--+|[\u2013\u2014:])\s*|\s+-\s+|\.\s+))(?=\S)",
    re.I,
)
NUMBER = re.compile(  # a numeral above a title
    rf"\W*(?:(?:adventure|story|tale|no|number)\b\.?\s*)?(?:{NUMERAL}|{NUMBER_WORD})\W*$", re.I
)
SECTION = re.compile(  # "IV.", "CHAPTER 3", "Part the Second", "FIRST STORY"
    rf"^[\W_]*(?:(?:the )?{DIVISION}\b[\s.]*)?"
    rf"(?:{NUMERAL}\b|(?:the )?{ORDINAL}(?: {DIVISION})?)[\W_]*$",
    re.I,
)
STARS = re.compile(r"^\s*(?:\*\s*){3,}$")
SENTENCE_END = re.compile(r"[.!?:,;'\"\u2019\u201d\u2014-][)_\]]*$")


def key(text: str) -> str:
    """What counts when titles are compared: letters and digits, unaccented, in lower case."""
    text = unicodedata.normalize("NFKD", text.replace("æ", "ae").replace("œ", "oe"))
    text = re.sub(r"['`\u2019]", "", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", text))


def is_caps(text: str) -> bool:
    """Is a line in capitals, its numbering apart? "No. 2--McWILLIAMS" is."""
    text = re.sub(r"\b[Mm]a?c(?=[A-Z])", "", NUMBERING.sub("", text.strip(" _")))
    letters = re.sub(r"[\W\d_]", "", text)
    return len(re.findall(r"[a-zß-öø-ÿ]", letters)) < 0.1 * len(letters)


# ---------------------------------------------------------------------------------- text -> blocks

START = re.compile(r"^\W*START OF (?:THE|THIS) PROJECT GUTENBERG|^\W*END\W*THE SMALL PRINT", re.I)
END = re.compile(
    r"^\W*(?:END OF (?:THE |THIS )?PROJECT GUTENBERG|START: FULL LICENSE"
    r"|THIS FILE SHOULD BE NAMED)",
    re.I,
)
BRACKETED = re.compile(  # [Illustration: ...], [Footnote 1: ... [a] ...], [Pg 9], [* ...]
    r"\[\s*\W*(?:illustration|picture|image|decoration|footnote|transcriber|p(?:g|age)\.? \d)"
    r"(?:[^\[\]]|\[[^\[\]]*\]){0,3000}\]"  # brackets inside: one level
    r"|\[\*+ [^\[\]]{0,1000}\]",
    re.I,
)
PAGED = re.compile(
    r"^\W*(?:(?:page|p\.|pg\.?) ?)?(\d{1,4})(?:\W+(.*))?$|^(.*?)\W+(\d{1,4})\W*$", re.I
)


@dataclass
class Block:
    """Consecutive non-blank lines of a book."""

    line: int  # number of the first one in the file, from 1
    gap: int  # blank lines above it
    lines: list[str]
    level: int = 0  # of a heading that is marked as one, from 1

    @cached_property
    def text(self) -> str:
        return " ".join(line.strip() for line in self.lines)

    @cached_property
    def words(self) -> int:
        return len(self.text.split())

    @cached_property
    def caps(self) -> bool:
        return is_caps(self.lines[0])


def blocks_of(text: str) -> tuple[dict[str, str], list[Block]]:
    """Header fields (title, author ...) and the blocks between Gutenberg's header and footer."""
    wide = len(re.findall(r"\n[ \t]*\n[ \t]*\n\s*", text))
    text = BRACKETED.sub(lambda match: "\n" * match[0].count("\n"), text.replace("\t", "    "))
    lines = [line.rstrip() for line in text.split("\n")]
    starts = [i for i, line in enumerate(lines[: len(lines) // 2]) if START.search(line)]
    first = starts[-1] + 1 if starts else 0
    fields: dict[str, str] = {}
    for line in lines[: first or 60]:
        name, colon, value = line.partition(":")
        if colon and name in ("Title", "Author", "Editor"):
            fields.setdefault(name.lower(), value.strip())
    last = next((i for i in range(first, len(lines)) if END.search(lines[i])), len(lines))
    body = dict(enumerate(lines[first:last], first + 1))
    for number in find_pages(body):
        del body[number]

    begins_block = paragraphs_of([*body.values()])
    blocks: list[Block] = []
    gap = 0
    for number, line in body.items():
        if not line:
            gap += 1
            continue
        if line.startswith(MARK):
            level, _, line = line[1:].partition(" ")
            blocks.append(Block(number, gap, [line], int(level)))
        elif gap > 0 or not blocks or begins_block(line, blocks[-1].lines):
            blocks.append(Block(number, gap, [line]))
        else:
            blocks[-1].lines.append(line)
        gap = 0
    if wide <= max(5, 0.005 * len(blocks)):
        widen_gaps(blocks)
    for above, block in itertools.pairwise(blocks):
        if SECTION.match(above.text):  # "IV", then the title: the gap before both counts
            block.gap = max(block.gap, above.gap)
    return fields, blocks


def find_pages(body: dict[int, str]) -> set[int]:
    """Lines that are page numbers or running heads, and the blank ones in a sentence they cut."""
    found = []
    for number, line in body.items():
        if (match := PAGED.match(line)) and len(line) < 70:
            head = key(match[2] or match[3] or "")
            found.append((number, int(match[1] or match[4]), head))
    often = Counter(head for _, _, head in found)
    pages = [(n, page) for n, page, head in found if not head or often[head] > 3]
    rising = sum(a < b < a + 30 for (_, a), (_, b) in itertools.pairwise(pages))
    if len(pages) < 4 or rising < 0.8 * (len(pages) - 1) or pages[0][1] == 1:
        return set()  # numbers of sections begin again
    drop = {n for n, _ in pages}
    heads = {head for head, n in often.items() if head and n > 3}
    drop |= {n for n, line in body.items() if line and key(line) in heads and len(line) < 70}
    for n in sorted(drop):
        above, below = n - 1, n + 1
        while above in body and (not body[above] or above in drop):
            above -= 1
        while below in body and (not body[below] or below in drop):
            below += 1
        if above in body and below in body and len(body[above]) > 40:
            if not re.search(r"[.!?:'\"\u2019\u201d]_*$", body[above]):
                drop |= set(range(above + 1, below))
    return drop


def paragraphs_of(lines: list[str]) -> Callable[[str, list[str]], bool]:
    """What tells whether a line without a blank one above it begins a block.

    A line below a numeral, at or below stars always does. In a book without blank lines between
    paragraphs an indent does, or where nothing is indented a line above that ends early.
    """
    full = [line for line in lines if line]
    runs = [len(list(run)) for full_run, run in itertools.groupby(lines, bool) if full_run]
    run_on = 2 * sum(n for n in runs if n > 30) > sum(runs)
    indented = run_on and sum(line.startswith("  ") for line in full) > 0.06 * len(full)
    lengths = sorted(map(len, full)) or [0]
    width = lengths[int(0.97 * len(lengths))] if run_on and not indented else 0
    often = Counter(key(line) for line in full if len(line) < 60) if width else Counter()

    def begins(line: str, above: list[str]) -> bool:
        if (
            (len(above) == 1 and NUMBER.match(above[0]))
            or STARS.match(line)
            or STARS.match(above[-1])
        ):
            return True
        if not width:
            return indented and line.startswith("  ")
        title = len(line) < 60 and (often[key(line)] > 1 or is_caps(line))
        was_title = len(above[-1]) < 60 and (often[key(above[-1])] > 1 or is_caps(above[-1]))
        early = len(above[-1]) + 1 + len(line.split()[0]) <= width
        ended = SENTENCE_END.search(above[-1]) or len(above[-1]) < width / 2
        return width > 150 or title or was_title or bool(early and ended)

    return begins


def widen_gaps(blocks: list[Block]) -> None:
    """Where one blank line is everywhere, give titles the gap that they would have been typed with.

    Titles: short blocks of capitalised words that end no sentence, or that the book has twice.
    """

    def bare(line: str) -> str:
        return key(re.sub(r"[\s.]*\d+$", "", NUMBERING.sub("", line.strip(" _*"))))

    often = Counter(bare(line) for block in blocks for line in block.lines if len(line) < 90)
    for block in blocks:
        line = block.lines[0].strip(" _*")
        words = [w for w in re.findall(r"[^\W\d_]{4,}", block.text)]
        if len(block.lines) > 3 or block.words > 16 or not words:
            continue
        capitals = sum(word[0].isupper() for word in words) >= 0.7 * len(words)
        listed = 1 < often[bare(line)] < 5 and line[-1:] not in ',;"\u201d'
        ends = SENTENCE_END.search(line.rstrip(".!?") if block.caps else line)
        if (capitals and not ends) or listed:
            block.gap = max(block.gap, 4)
