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
