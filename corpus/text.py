"""Book files -> blocks: plain text as Project Gutenberg types it, or EPUB.

A block is a run of lines between blank ones. The number of blank lines above it is what a heading
is known by, so an EPUB is first written as the text that Gutenberg would have typed.
"""

import itertools
import posixpath
import re
import unicodedata
import zipfile
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from data import DataError

# ----------------------------------------------------------------------------------- files -> text

ENCODING = re.compile(
    rb"(?i)character set encoding:\s*(?:iso-?8859-1|iso-latin-1|cp1252|windows-1252)"
)


def read_text(path: Path) -> str:
    """A book as text. DataError for what is no readable text, with what to do."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its files, e.g. {path}/*.txt")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw.strip():
        what = "the file is empty; fetch it again, e.g. with `python data.py gutenberg`"
        raise DataError(f"{path}: {what}")
    if zipfile.is_zipfile(path) or path.suffix.lower() == ".epub":
        return epub_text(path)
    if b"\0" in raw:
        raise DataError(f"{path}: holds binary data; give plain text (UTF-8) or EPUB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not ENCODING.search(raw[:4000]):  # older Gutenberg files say what they are
            line = raw.count(b"\n", 0, error.start) + 1
            how = f"convert it, e.g. `iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new.txt`"
            raise DataError(f"{path}:{line}: not UTF-8; {how}") from None
        text = raw.decode("cp1252", "replace")
    return text.replace("\r\n", "\n")


HIDDEN = ("head", "script", "style")
ITALICS = {"i": "_", "em": "_"}
HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
PARAGRAPHS = ["p", "div", "li", "tr", "blockquote"]
BEFORE = dict.fromkeys([*PARAGRAPHS, "pre", "section"], "\n\n") | ITALICS
BEFORE |= dict.fromkeys(HEADINGS, "\n\n\n\n\n") | {"br": "\n", "hr": "\n\n* * *\n\n"}
AFTER = dict.fromkeys(HEADINGS + PARAGRAPHS, "\n\n") | ITALICS


class _Page(HTMLParser):
    """A page of an EPUB as Gutenberg would have typed it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.hidden = 0  # open tags whose content is not shown

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.text += BEFORE.get(tag, "")
        if tag in HIDDEN:
            self.hidden += 1

    def handle_endtag(self, tag: str) -> None:
        self.text += AFTER.get(tag, "")
        if tag in HIDDEN:
            self.hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += re.sub(r"\s+", " ", data)


def epub_text(path: Path) -> str:
    """The pages of an EPUB in reading order, below header lines with its title and author."""
    try:
        with zipfile.ZipFile(path) as book:
            container = ElementTree.fromstring(book.read("META-INF/container.xml"))
            place = container.findall(".//{*}rootfile")[0].attrib["full-path"]
            package = ElementTree.fromstring(book.read(place))
            items = [item.attrib for item in package.findall(".//{*}item")]
            files = {item["id"]: item["href"] for item in items}
            text = ""
            for ref in package.findall(".//{*}itemref"):
                name = posixpath.join(posixpath.dirname(place), files[ref.attrib["idref"]])
                page = _Page()
                page.feed(book.read(unquote(name)).decode("utf-8-sig"))
                text += page.text + "\n\n\n\n"
    except (LookupError, UnicodeDecodeError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        what = f"no EPUB that can be read ({error!r}); give plain text instead"
        raise DataError(f"{path}: {what}") from None
    names = {"title": "Title", "creator": "Author", "language": "Language"}
    header = [f"{names[name]}: {package.findtext(f'.//{{*}}{name}') or ''}" for name in names]
    return "\n".join([*header, "*** START OF THIS PROJECT GUTENBERG EBOOK ***", "", "", "", text])


# --------------------------------------------------------------------------------- lines and titles

NUMERAL = r"(?:(?=[IVXLC])(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})|\d+)"
ORDINAL = (
    "(?:one|two|three|four|five|six|seven|eight|nine|ten"
    "|first|second|third|fourth|fifth|sixth|seventh|last)"
)
DIVISION = "(?:chap(?:ter)?|part|book|vol(?:ume)?|section|canto|letter|scene|act|story|episode)"
NUMBERING = re.compile(  # "IV. ", "3 -- ", "ADVENTURE I. ", "No. 1--", "II     "
    r"^(?:(?:adventure|chap(?:ter)?|story|tale|no|number)\b\.?\s*)?"
    rf"(?:{NUMERAL}(?:[.):]+\s*|\s*(?:--+|[\u2013\u2014])\s*|\s{{2,}})|(?-i:[IVX]{{2,}}) )(?=\S)",
    re.I,
)
NUMBER = re.compile(  # a numeral above a title
    rf"\W*(?:(?:adventure|story|tale|no|number)\b\.?\s*)?{NUMERAL}\W*$", re.I
)
SECTION = re.compile(  # "IV.", "CHAPTER 3", "Part the Second", "FIRST STORY"
    rf"^[\W_]*(?:(?:the )?{DIVISION}\b[\s.]*)?"
    rf"(?:{NUMERAL}\b|(?:the )?{ORDINAL}(?: {DIVISION})?)[\W_]*$",
    re.I,
)
STARS = re.compile(r"^\s*(?:\*\s*){3,}$")


def key(text: str) -> str:
    """What counts when titles are compared: letters and digits, unaccented, in lower case."""
    text = unicodedata.normalize("NFKD", text.replace("æ", "ae").replace("œ", "oe"))
    text = re.sub(r"['`]", "", text.encode("ascii", "ignore").decode().lower())
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


@dataclass
class Block:
    """Consecutive non-blank lines of a book."""

    line: int  # number of the first one in the file, from 1
    gap: int  # blank lines above it
    lines: list[str]

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
    text = BRACKETED.sub(lambda match: "\n" * match[0].count("\n"), text.replace("\t", "    "))
    lines = [line.rstrip() for line in text.split("\n")]
    starts = [i for i, line in enumerate(lines[: len(lines) // 2]) if START.search(line)]
    first = starts[-1] + 1 if starts else 0
    fields: dict[str, str] = {}
    for line in lines[: first or 60]:
        name, colon, value = line.partition(":")
        if colon and name in ("Title", "Author", "Editor", "Language"):
            fields.setdefault(name.lower(), value.strip())
    last = next((i for i in range(first, len(lines)) if END.search(lines[i])), len(lines))

    indented = is_run_on(lines[first:last])
    blocks: list[Block] = []
    gap = 0
    for number, line in enumerate(lines[first:last], first + 1):
        if not line:
            gap += 1
            continue
        begins = gap > 0 or not blocks or stands_alone(line, blocks[-1].lines)
        if begins or (indented and line.startswith("  ")):
            blocks.append(Block(number, gap, [line]))
        else:
            blocks[-1].lines.append(line)
        gap = 0
    for above, block in itertools.pairwise(blocks):
        if SECTION.match(above.text):  # "IV", then the title: the gap before both counts
            block.gap = max(block.gap, above.gap)
    return fields, blocks


def is_run_on(lines: list[str]) -> bool:
    """Are there no blank lines between paragraphs, so that an indent has to start one?"""
    runs = [len(list(run)) for full, run in itertools.groupby(lines, bool) if full]
    return 2 * sum(n for n in runs if n > 30) > sum(runs)


def stands_alone(line: str, above: list[str]) -> bool:
    """Does a line start a block without a blank line: below a numeral, at or below stars?"""
    below_number = len(above) == 1 and NUMBER.match(above[0])
    return bool(below_number or STARS.match(line) or STARS.match(above[-1]))
