"""Small synthetic anthologies in the heading styles of real ones, and their true stories."""

import random
import textwrap

HEADER = """The Project Gutenberg eBook of {title}

This eBook is for the use of anyone anywhere at no cost.

Title: {title}

Author: {author}

Language: English

*** START OF THE PROJECT GUTENBERG EBOOK {upper} ***




Produced by A. Volunteer




{upper}

by

{author}



"""
FOOTER = """



End of the Project Gutenberg EBook of {title}, by {author}

*** END OF THE PROJECT GUTENBERG EBOOK {upper} ***

START: FULL LICENSE. Please read this before you distribute or use this work.
"""
TITLES = [
    "The Lamp in the Mill",
    "A Debt of Honour",
    "Mrs. Pell's Lodger",
    "The Ferryman",
    "Three Black Hens",
    "Sorrow",
]
SUBJECTS = [
    "he",
    "she",
    "they",
    "the miller",
    "the widow",
    "an old sailor",
    "her brother",
    "the doctor",
    "the clerk",
]
VERBS = [
    "saw",
    "told",
    "asked",
    "followed",
    "had met",
    "was afraid of",
    "remembered",
    "forgot",
    "left",
]
OBJECTS = ["the grey horse", "a stranger", "the letters", "the house", "that winter"]
ENDS = [
    "before the rain came",
    "and said nothing",
    "with a lantern",
    "for the second time",
    "in the morning",
]
VERSE = [
    "O bring the lamp, the night is long,",
    "And bring the bread and wine;",
    "I lost my way, I lost my song,",
]


def sentence(rng):
    syllables = ["bar", "den", "lo", "mi", "ras", "tok", "vel", "wyn", "shu", "ger"]
    first, second = ("".join(rng.choices(syllables, k=3)).title() for _ in range(2))
    subject, verb, thing, end = map(rng.choice, (SUBJECTS, VERBS, OBJECTS, ENDS))
    text = f"{subject} {verb} {thing} of {first} {end} at {second}."  # no two are alike
    return text[0].upper() + text[1:]


def paragraphs(rng, words):
    """Narrative paragraphs of about that many words in all."""
    result, count = [], 0
    while count < words:
        text = " ".join(sentence(rng) for _ in range(rng.randrange(2, 6)))
        result.append(f'"{text}"' if rng.random() < 0.2 else text)
        count += len(text.split())
    return result


def stories(seed, words=400, titles=TITLES):
    rng = random.Random(seed)
    return [(title, paragraphs(rng, words + rng.randrange(80))) for title in titles]


def fill(text, width=72):
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def body(parts, width=72):
    return "\n\n".join(fill(part, width) for part in parts)


ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII"]
# style -> (contents entry, heading) of story i
STYLES = {
    "capitals": (lambda i, t: f"     {t}", lambda i, t: t.upper()),
    "page numbers": (lambda i, t: f"{t.upper():40}{10 * i + 7:4}", lambda i, t: t.upper()),
    "dot leaders": (lambda i, t: f"{t} " + ". " * 12 + str(10 * i + 7), lambda i, t: t),
    "title case": (lambda i, t: f"  {t}", lambda i, t: t),
    "italics": (lambda i, t: f"{ROMAN[i]}    _{t}_", lambda i, t: f"_{t.upper()}._"),
    "numbered": (
        lambda i, t: f"{ROMAN[i]:>5}. {t}",
        lambda i, t: f"ADVENTURE {ROMAN[i]}. {t.upper()}",
    ),
    "numeral above": (
        lambda i, t: f"{ROMAN[i]}. {t.upper()}",
        lambda i, t: f"{ROMAN[i]}\n\n{t.upper()}",
    ),
    "arabic": (lambda i, t: f"{i + 1}. {t}", lambda i, t: f"{i + 1}. {t.upper()}"),
    "byline": (
        lambda i, t: f"{t.upper()}\n    ANN AUTHOR",
        lambda i, t: f"{t.upper()}\nBY ANN AUTHOR",
    ),
    "author in list": (
        lambda i, t: f"{t.upper()}   _Ann Author_  {i + 3}",
        lambda i, t: f"{t.upper()}\n\n_Ann Author_ (1801-1870)",
    ),
    "author and page in list": (
        lambda i, t: f"{t.upper():30}Ann Author      {10 * i + 7:4}",
        lambda i, t: f"{t.upper()}\n\nBy Ann Author",
    ),
    "author above": (lambda i, t: f"  {t}  Ann Author", lambda i, t: f"ANN AUTHOR\n\n{t.upper()}"),
    "lower case": (lambda i, t: f"{t.lower()}  {10 * i + 7}", lambda i, t: t.upper()),
    "page first": (lambda i, t: f"{10 * i + 7:4}  {t}", lambda i, t: t),
    "number in the heading": (
        lambda i, t: f"{ROMAN[i]}. {t}",
        lambda i, t: f"{ROMAN[i]}\n{t.upper()}",
    ),
    "other title": (
        lambda i, t: f"  {t}; or, The Clerk's Mistake",
        lambda i, t: f"{t.upper()};\n\nOR,\n\nTHE CLERK'S MISTAKE",
    ),
    "misspelt": (lambda i, t: t.replace("l", "ll"), lambda i, t: t.upper() + "."),
    "subtitle": (lambda i, t: f"{t.upper()}, concerning Somebody", lambda i, t: t.upper()),
    "noted": (lambda i, t: f"  {t}", lambda i, t: f"{t.upper()}({i + 1})"),
    "half-titles": (lambda i, t: f"  {t}", lambda i, t: f"{t.upper()}\n\n\n\n{t.upper()}"),
    "no list, capitals": (None, lambda i, t: t.upper()),
    "no list, title case": (None, lambda i, t: t),
    "no list, italics": (None, lambda i, t: f"_{t}_"),
    "no list, number in the heading": (None, lambda i, t: f"STORY {ROMAN[i]}\n{t.upper()}"),
    "no list, numbered": (None, lambda i, t: f"No. {i + 1}--{t.upper()}"),
}


def anthology(
    style,
    seed=0,
    width=72,
    words=400,
    title="Night Pieces",
    author="Jane Doe",
    front="",
    decorate=body,
):
    """-> (text of the book, [(title, paragraphs)]). decorate: paragraphs, width -> text below."""
    entry, heading = STYLES[style]
    truth = stories(seed, words)
    names = {"title": title, "author": author, "upper": title.upper()}
    text = HEADER.format(**names)
    if entry:
        text += (
            "CONTENTS\n\n" + "\n".join(entry(i, t) for i, (t, _) in enumerate(truth)) + "\n\n\n\n"
        )
    text += front
    for i, (name, parts) in enumerate(truth):
        text += f"\n\n\n{heading(i, name)}\n\n\n{decorate(parts, width)}\n\n\n"
    return text + FOOTER.format(**names), truth


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;")


def markdown(truth, title="Night Pieces", author="Jane Doe"):
    parts = [f"# {title}", f"By {author}"]
    for name, story in truth:
        parts += [f"## {name}", *story]
    return "\n\n".join(parts) + "\n"


def page(name, story, level=2):
    """A story as HTML, with a page number and a note as publishers mark them."""
    first, *others = map(escaped, story)
    marked = f'<span class="pagenum">[12]</span>{first}<a class="fnanchor" href="#n">[1]</a>'
    text = "".join(f"<p>{part}</p>" for part in (marked, *others))
    return f'<section id="s"><h{level}>{escaped(name)}</h{level}>{text}</section>'


def html(truth, title="Night Pieces"):
    pages = "".join(page(name, story) for name, story in truth)
    head = f"<!DOCTYPE html><html><head><title>{title}</title></head>"
    return f"{head}<body><h1>{title}</h1>{pages}</body></html>"


def epub(path, truth, contents="nav", headings=True, parts=0, language="en"):
    """An EPUB. contents: "nav" or "ncx", in a folder of its own and out of the reading order.

    Without headings the titles are plain paragraphs; with parts the stories lie in that many.
    """
    import zipfile

    entries, pages = [], []
    for i, (name, story) in enumerate(truth):
        if parts and i % (len(truth) // parts) == 0:
            entries.append((1, f"p{i}.xhtml", f"Volume the {i}th"))
            pages.append((f"p{i}.xhtml", f"<h2>Volume the {i}th</h2>"))
        text = page(name, story, 3)
        if not headings:
            text = text.replace("<h3>", '<p class="t">').replace("</h3>", "</p>")
        entries.append((2 if parts else 1, f"s%20{i}.xhtml#s", name))
        pages.append((f"s {i}.xhtml", text))
    if contents == "nav":
        lines, depth = "", 0
        for level, address, name in entries:
            lines += "<ol>" * (level - depth) + "</ol>" * (depth - level)
            lines += f'<li><a href="../O/{address}">{escaped(name)}</a></li>'
            depth = level
        toc = (
            "t/nav.xhtml",
            f"<html><body><nav epub:type='toc'>{lines}{'</ol>' * depth}</nav></body></html>",
        )
    else:
        lines, depth = "", 0
        for level, address, name in entries:
            lines += "</navPoint>" * (depth - level + 1 if depth else 0)
            lines += f"<navPoint><navLabel><text>{escaped(name)}</text></navLabel>"
            lines += f"<content src='../O/{address}'/>"
            depth = level
        toc = ("t/toc.ncx", f"<ncx><navMap>{lines}{'</navPoint>' * depth}</navMap></ncx>")
    items = "".join(
        f'<item id="i{n}" href="O/{name.replace(" ", "%20")}"/>'
        for n, (name, _) in enumerate(pages)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(pages)))
    with zipfile.ZipFile(path, "w") as book:
        container = '<container><rootfiles><rootfile full-path="p.opf"/></rootfiles></container>'
        book.writestr("META-INF/container.xml", container)
        said = f"<dc:language>{language}</dc:language>" if language is not None else ""
        book.writestr(
            "p.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata '
            'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Night Pieces</dc:title>'
            f"<dc:creator>Jane Doe</dc:creator>{said}</metadata>"
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
        )
        for name, text in pages:
            shell = "<html><head><title>x</title></head><body>{}</body></html>"
            book.writestr(f"O/{name}", shell.format(text))
        book.writestr(*toc)


def gutenberg_html(truth):
    """A book as Project Gutenberg's HTML: boilerplate, contents, sections, page numbers."""
    text = "<!DOCTYPE html><html><head><title>The Project Gutenberg eBook of Night Pieces, by Jane "
    text += "Doe</title></head><body><section class='pg-boilerplate pgheader'><h2>The Project "
    text += "Gutenberg eBook</h2><p>*** START OF THE PROJECT GUTENBERG EBOOK X ***</p></section>"
    text += "<h1>Night Pieces</h1><h2>by Jane Doe</h2><hr><h2>CONTENTS</h2><table>"
    text += "".join(f"<tr><td><a href='#c'>{name}</a></td><td>9</td></tr>" for name, _ in truth)
    text += "</table>"
    for i, (name, parts) in enumerate(truth):
        text += f"<div class='chapter'><h2><a id='c{i}'></a>{i + 1}.<br>{name.upper()}</h2></div>"
        text += f"<h3>I</h3><p>{parts[0]}<span class='pagenum'>[Pg {i}]</span><h3>II</h3>"
        text += "".join(f"<p>\n{fill(part)}\n</p>" for part in parts[1:])
    text += "<h2>FOOTNOTES</h2><p>[1] A note.</p><section class='pg-boilerplate pgfooter'>"
    return text + "<h2>THE FULL PROJECT GUTENBERG LICENSE</h2></section></body></html>"


def standard_ebook(path, truth):
    """An EPUB as Standard Ebooks makes it: front and back matter, numbers and titles in hgroups."""
    import zipfile

    pages = [("imprint", "frontmatter", "<section epub:type='imprint'><h2>Imprint</h2></section>")]
    for i, (name, parts) in enumerate(truth):
        text = f"<hgroup><h2>{ROMAN[i]}</h2><p epub:type='title'>{name}</p></hgroup><h3>I</h3>"
        text += f"<p>{parts[0]}<a epub:type='noteref' href='e#n'>1</a></p><p>“Yes.”</p><h3>II</h3>"
        pages.append((f"s{i}", "bodymatter", text + "".join(f"<p>{p}</p>" for p in parts[1:])))
    pages.append(("colophon", "backmatter", "<h2>Colophon</h2><p>It was published in 1900.</p>"))
    entries = "".join(
        f"<li><a href='text/s{i}'>{ROMAN[i]}: {name}</a>"
        f"<ol><li><a href='text/s{i}'>I</a></li></ol></li>"
        for i, (name, _) in enumerate(truth)
    )
    nav = "<html><body><nav epub:type='toc'><ol><li><a href='text/imprint'>Imprint</a></li>"
    nav += f"{entries}</ol></nav><nav epub:type='landmarks'><ol></ol></nav></body></html>"
    items = "".join(f"<item id='{n}' href='text/{n}'/>" for n, _, _ in pages)
    spine = "".join(f"<itemref idref='{n}'/>" for n, _, _ in pages)
    with zipfile.ZipFile(path, "w") as book:
        container = (
            "<container><rootfiles><rootfile full-path='epub/p.opf'/></rootfiles></container>"
        )
        book.writestr("META-INF/container.xml", container)
        book.writestr(
            "epub/p.opf",
            "<package><metadata><title>Night Pieces</title><creator>Jane Doe</creator></metadata>"
            f"<manifest><item id='n' href='toc.xhtml' properties='nav'/>{items}</manifest>"
            f"<spine>{spine}</spine></package>",
        )
        book.writestr("epub/toc.xhtml", nav)
        for name, kind, text in pages:
            shell = (
                f"<html><head><title>x</title></head><body epub:type='{kind}'>{text}</body></html>"
            )
            book.writestr(f"epub/text/{name}", shell)
