"""EPUB, HTML and Markdown -> plain text with marked headings.

A heading is a line that begins with MARK and its level: the depth in the book's own contents (the
nav document or NCX of an EPUB, wherever it lies), then the level of its tag. Headings that the
contents do not name get level 99, below all others: they divide a story.
"""

import difflib
import html
import posixpath
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from data import DataError

MARK = "\x1f"
BLOCKS = set(
    "p div li tr dt dd ul ol table section article header footer body center address figure "
    "h1 h2 h3 h4 h5 h6 hgroup blockquote pre hr".split()
)
HIDDEN_TAGS = {"head", "script", "style", "nav", "figcaption", "svg"}
HIDDEN = re.compile(  # in class, epub:type and role
    r"(?<![\w-])(?:page-?(?:num|no|number|break)s?|pg-?boilerplate"
    r"|doc-(?:pagebreak|noteref|footnotes?"
    r"|endnotes?)|noteref|fnanchor|footnotes?|endnotes?|rearnotes?|caption|transnote|pgheader"
    r"|pgfooter|frontmatter|backmatter|titlepage|halftitlepage|imprint|colophon|copyright-page)"
    r"(?![\w-])",
    re.I,
)
VERSE = re.compile(r"(?<![\w-])(?:verse|line|l|i\d+)(?![\w-])")  # a line of a poem


class _Page(HTMLParser):
    """An HTML page -> blocks [level of the heading or 0, text], and where its ids are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.blocks: list[list] = []
        self.ids = {"": 0}
        self.meta: dict[str, str] = {}
        self.text = ""
        self.level = 0
        self.quoted = 0
        self.verbatim = False
        self.group = False
        self.hidden = ("", 0)  # a tag whose content is not shown, and how many of it are open
        self.feed(page)
        self.close()
        self.flush()

    def flush(self) -> None:
        text = re.sub(r" *\n *", "\n", self.text) if not self.verbatim else self.text
        text = text.strip("\n" if self.verbatim else None)
        if self.level:  # "I", then the title
            text = re.sub(r"^(\W*(?:[IVXLC]+|\d+))\W*\n", r"\1. ", text)
        if self.quoted and not self.level:
            text = re.sub("(?m)^", "    ", text)
        if text.strip(" _\n"):
            self.blocks.append([self.level, text])
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        name, depth = self.hidden
        if tag == "meta" and values.get("name") and values.get("content"):
            self.meta.setdefault(values["name"].lower(), values["content"])
        if tag == "title":
            self.text = ""
        if depth:
            self.hidden = (name, depth + (tag == name))
            return
        kind = " ".join(filter(None, map(values.get, ("class", "epub:type", "role"))))
        verse = tag in BLOCKS and VERSE.search(kind)
        if tag in BLOCKS and not verse and not self.group:
            self.flush()
        elif verse or tag == "br" or (self.group and tag in BLOCKS):
            self.text += "\n"
        for place in (values.get("id"), values.get("name")):
            if place:
                self.ids.setdefault(place, len(self.blocks))
        if tag in HIDDEN_TAGS or HIDDEN.search(kind):
            if tag not in ("br", "hr", "img", "meta", "link"):
                self.hidden = (tag, 1)
        elif tag == "hr":
            self.blocks.append([0, "* * *"])
        elif re.fullmatch("h[1-6]", tag):
            self.level = self.level or int(tag[1])
        elif tag == "hgroup":
            self.group = True
        elif tag in ("i", "em"):
            self.text += "_"
        elif tag in ("td", "th"):
            self.text += "   "
        self.quoted += tag == "blockquote"
        self.verbatim |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        name, depth = self.hidden
        if tag == "title" and depth:
            self.meta.setdefault("title", " ".join(self.text.split()))
            self.text = ""
        if depth:
            self.hidden = (name, depth - (tag == name))
            return
        if tag == "hgroup":
            self.group = False
        if tag in BLOCKS and not self.group and not (self.level and tag in ("p", "div", "span")):
            self.flush()
        if not self.group and re.fullmatch("h[1-6]|hgroup", tag):
            self.level = 0
        if tag in ("i", "em"):
            self.text += "_"
        self.quoted = max(0, self.quoted - (tag == "blockquote"))
        self.verbatim &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if not self.hidden[1] or self.lasttag == "title":
            self.text += data if self.verbatim else re.sub(r"[ \t\r\n]+", " ", data)


def written(blocks: list[list], title: str, author: str) -> str:
    """Blocks as text, below header lines."""
    lines = [f"Title: {title}", f"Author: {author}"]
    text = "\n".join([*lines, "*** START OF THIS PROJECT GUTENBERG EBOOK ***", "", ""])
    for level, block in blocks:
        text += f"\n\n\n\n{MARK}{level} {block}\n\n" if level else f"\n{block}\n"
    return text


def html_text(text: str) -> str:
    page = _Page(text)
    names = {name.rpartition(".")[2]: value for name, value in page.meta.items()}
    title = re.sub(
        r"\s*(?:\||[\u2014-]+ ?(?:a|the) project gutenberg).*",
        "",
        names.get("title", ""),
        flags=re.I,
    )
    title = re.sub(r"^the project gutenberg e-?(?:book|text) (?:of )?", "", title, flags=re.I)
    title, _, author = title.partition(", by ")
    return written(page.blocks, title, names.get("creator") or names.get("author") or author)


# -------------------------------------------------------------------------------------------- EPUB


class _Nav(HTMLParser):
    """A nav document or NCX -> [(depth, address, title)] of its contents."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.entries: list[list] = []
        self.depth = 0
        self.on = "<nav" not in page
        self.label = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag == "nav":
            kind = values.get("epub:type") or values.get("role") or "toc"
            self.on = "toc" in kind and not self.entries
        self.depth += tag in ("ol", "navpoint")
        if tag == "navpoint":
            self.entries.append([self.depth, "", ""])
        elif tag == "content" and self.entries:
            self.entries[-1][1] = values.get("src") or ""
        elif tag == "a" and self.on and self.depth and values.get("href"):
            self.entries.append([self.depth, values["href"], ""])
        self.label |= tag in ("text", "a")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in ("ol", "navpoint")
        self.label &= tag not in ("text", "a")
        self.on &= tag != "nav"

    def handle_data(self, data: str) -> None:
        if self.label and self.entries and self.depth:
            self.entries[-1][2] += data


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def mark_headings(blocks: list[list], marks: list[tuple[int, int, str]]) -> list[list]:
    """Blocks, the headings among them on the levels of the contents: [(block, depth, title)]."""
    below = [[99 if level else 0, text] for level, text in blocks]
    added = []
    for place, depth, title in marks:
        near = range(place, min(place + 4, len(blocks)))

        def alike(i: int, name: str = plain(title)) -> float:
            bare = plain(blocks[i][1][:200])
            whole = f" {name} " in f" {bare} " and len(bare) < 3 * len(name) + 20
            return 1 if whole else difflib.SequenceMatcher(None, name, bare).ratio()

        best = max(near, key=alike, default=-1)
        if best >= 0 and alike(best) > 0.6:
            below[best][0] = 10 * depth + (blocks[best][0] or 7)
        elif place < len(blocks) and blocks[place][0]:
            below[place][0] = 10 * depth + blocks[place][0]
        else:
            added.append((place, [10 * depth + 7, title]))  # its heading is a picture
    for place, block in reversed(added):
        below.insert(place, block)
    return below


def read_contents(book: zipfile.ZipFile, items: list[dict], base: str) -> list[tuple]:
    """[(depth, path in the book, id, title)]: the longest of the nav documents and NCXs there."""
    listed = [posixpath.normpath(posixpath.join(base, unquote(i.get("href", "")))) for i in items]
    pages = [n for n in {*listed, *book.namelist()} if re.search(r"(?i)\.(?:ncx|x?html?|xml)$", n)]
    best: list[tuple] = []
    for name in sorted(pages):
        text = book.read(name).decode("utf-8-sig", "replace") if name in book.namelist() else ""
        if "<nav" in text or "<navMap" in text:
            entries = []
            for depth, address, title in _Nav(text).entries:
                file, _, place = unquote(address).partition("#")
                here = posixpath.join(posixpath.dirname(name), file) if file else name
                entries.append((depth, posixpath.normpath(here), place, " ".join(title.split())))
            best = entries if len(entries) > len(best) else best
    return best


def epub_text(path: Path) -> str:
    """The pages of an EPUB in reading order, below header lines with its title and author."""
    try:
        with zipfile.ZipFile(path) as book:
            container = ElementTree.fromstring(book.read("META-INF/container.xml"))
            place = container.findall(".//{*}rootfile")[0].attrib["full-path"]
            package = ElementTree.fromstring(book.read(place))
            items = [item.attrib for item in package.findall(".//{*}manifest/{*}item")]
            files = {item["id"]: item for item in items}
            base = posixpath.dirname(place)
            contents = read_contents(book, items, base)
            blocks: list[list] = []
            marks = []
            for ref in package.findall(".//{*}itemref"):
                item = files[ref.attrib["idref"]]
                name = posixpath.normpath(posixpath.join(base, unquote(item["href"])))
                if "nav" in item.get("properties", "").split():
                    continue
                page = _Page(book.read(name).decode("utf-8-sig", "replace"))
                for depth, file, fragment, title in contents:
                    known = fragment in page.ids and not re.fullmatch(r"[IVXLC\d\W]*", title)
                    if file == name and known:
                        marks.append((len(blocks) + page.ids[fragment], depth, title))
                blocks += page.blocks
    except (LookupError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise DataError(f"no EPUB that can be read ({error!r}); give plain text instead") from None
    if len(marks) > 2:
        blocks = mark_headings(blocks, marks)
    title, author = (package.findtext(f".//{{*}}{name}") or "" for name in ("title", "creator"))
    return written(blocks, title, author)


# ---------------------------------------------------------------------------------------- Markdown

INLINE = [
    (r"<!--.*?-->", "", re.S),
    (r"!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?", "", 0),
    (r"\[\^[^\]]+\]:.*(?:\n(?: {2,}|\t).*)*", "", 0),  # the text of a note
    (r"\[\^[^\]]+\]", "", 0),
    (r"\[([^\]]*)\]\([^)\s]*\)(?:\{[^}]*\})?", r"\1", 0),
    (r"\[([^\]]*)\]\{[^}]*\}", r"\1", 0),
    (r"^:{3,}.*$", "", re.M),
    (r"(?<![\w*\\])\*{1,3}(?=[^\s*])([^*]+?)(?<=\S)\*{1,3}(?![\w*])", r"_\1_", 0),
    (r"^\|(?: (.*))?$", r"\1", re.M),
    (r"\\$", "", re.M),
    (r"\\([^\w\s])", r"\1", 0),
]


def markdown_text(text: str) -> str:
    """Markdown, as people and pandoc write it: # Title, or Title above === or ---."""
    fields: dict[str, str] = {}
    front = re.match(r"---\n(.*?)\n(?:---|\.\.\.)\n", text, re.S)
    if front:
        fields = dict(re.findall(r"(?m)^(\w+): *[\"']?(.*?)[\"']?$", front[1]))
        text = text[front.end() :]
    for name, value in re.findall(r"(?m)^(Title|Author): (.+)$", text[:3000]):
        fields.setdefault(name.lower(), value)
    text = re.sub(r"(?m)^(?P<title>\S.*)\n=+$", r"# \g<title>", text)
    text = re.sub(r"(?m)(?<![^\n]\n)^(?P<title>[^\s>#*-].*)\n-{3,}$", r"## \g<title>", text)
    for pattern, new, flags in INLINE:
        text = re.sub(pattern, new, text, flags=flags)
    text = html.unescape(text)
    text = re.sub(r"(?m)^> ?", "    ", text)
    heading = re.compile(r"(?m)^(#{1,6}) +(.*?)(?: +#+)?(?: *\{[^}]*\})? *$")
    body = heading.sub(lambda m: f"\n\n\n\n{MARK}{len(m[1])} {m[2]}\n", text)
    return written([[0, body]], fields.get("title", ""), fields.get("author", ""))
