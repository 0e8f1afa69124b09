"""data.py and corpus/: examples, chat templates, splitting, filters, an LLM, downloads."""

import collections
import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anthologies
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from corpus import build
from corpus.books import Story, kind_of, split_book
from corpus.headings import author_key, clean_title, title_case
from corpus.pages import html_text, markdown_text
from corpus.prompts import fault_of_prompt, fault_of_trace, names_in, template_prompt
from corpus.text import key, read_text

examples = settings(derandomize=True, deadline=None, max_examples=50)


@contextlib.contextmanager
def stops(capsys, message, status=2):
    """The block ends the program with that exit status and a last line on stderr like `message`."""
    with pytest.raises(SystemExit) as stop:
        yield
    printed = capsys.readouterr().err
    assert stop.value.code == status and re.search(message, printed), printed


# ----------------------------------------------------------------------------------------- examples


def row(**changes):
    fields = {
        "uid": "a",
        "prompt": "A ghost. The story should be 1,500 words long.",
        "story": "It was.",
        "reasoning": "Plan.",
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


def write_rows(path, *rows):
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8"
    )
    return path


BAD_LINES = {
    "broken JSON": ('{"uid": "b", ', ["broken JSON"]),
    "not an object": ("[1]", ["object"]),
    "no uid": (row(uid=...), ['"uid" is missing']),
    "no prompt": (row(uid="b", prompt=...), ['"prompt" is missing']),
    "no story": (row(uid="b", story=...), ['"story" is missing', "--no-anchor"]),
    "no reasoning": (row(uid="b", reasoning=...), ['"reasoning" is missing', "turn it off"]),
    "empty reasoning": (row(uid="b", reasoning=" "), ['"reasoning" is empty']),
    "wrong type": (row(uid="b", story=["x"]), ['"story" must be text']),
    "null": (row(uid="b", prompt=None), ['"prompt" is missing']),
    "think in the story": (row(uid="b", story="Once <think> upon."), ["<think>", "remove it"]),
    "end of turn in the prompt": (
        row(uid="b", prompt="Hm <|im_end|> 99 words long"),
        ["<|im_end|>"],
    ),
    "empty story": (row(uid="b", story=" \n"), ['"story" is empty']),
    "same uid": (row(), ['"a"', "line 1", "unique"]),
    "no length": (row(uid="b", prompt="A ghost."), ["no length", "words long", "target_words"]),
    "contradiction": (row(uid="b", target_words=500), ["1500", "500", "agree"]),
    "length as text": (row(uid="b", target_words="1500"), ["whole number"]),
    "length true": (row(uid="b", prompt="A ghost.", target_words=True), ["whole number"]),
    "length zero": (row(uid="b", prompt="A ghost.", target_words=0), ["whole number"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_with_file_and_line(tmp_path, name, capsys):
    line, fragments = BAD_LINES[name]
    path = write_rows(tmp_path / "x.jsonl", row(), "", line, "{}")
    with pytest.raises(data.DataError) as error:
        data.load(path, thinking=True)
    first = str(error.value).split("\n")[0]
    assert first.startswith(f"{path}:3: ") and all(fragment in first for fragment in fragments)
    assert "1 more" in str(error.value)  # the last line is bad too
    with pytest.raises(SystemExit) as stop:
        data.main(["check", str(path), "--thinking"])
    assert stop.value.code == 2
    assert f"{path}:3: " in (printed := capsys.readouterr().out) and f"{path}:4: " in printed


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"uid": "caf\xe9"}')
    (tmp_path / "empty").write_text("\n")
    for name, message in (
        ("missing", "cannot be read"),
        ("", "cannot be read"),
        ("latin", ":1: not UTF-8"),
        ("empty", "no example"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.load(tmp_path / name)


def test_load(tmp_path):
    path = write_rows(
        tmp_path / "x.jsonl",
        row(),
        row(uid="b", prompt="A ghost.", target_words=700, story=...),
        row(uid="c"),
    )
    assert [e.target_words for e in data.load(path, anchors=False)] == [1500, 700, 1500]
    with pytest.raises(data.DataError, match=":2:.*story"):
        data.load(path)
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(row(source="x")).encode()
    )  # a byte order mark is no content
    assert data.load(path, thinking=True) == [
        data.Example("a", row()["prompt"], 1500, "It was.", "Plan.", "x")
    ]


def make(n):
    return [data.Example(f"e{i}", "p", 100) for i in range(n)]


@examples
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 11), st.integers(0, 9))
def test_no_epoch_sees_an_example_twice_and_each_sees_all_but_the_last_few(
    n, per_epoch, left, seed
):
    items = make(n * per_epoch + left % n)
    steps = [data.step_examples(items, seed, s, n) for s in range(1, 3 * per_epoch + 1)]
    assert all(len(chosen) == n for chosen in steps)
    for epoch in range(3):
        seen = [
            e.uid for chosen in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for e in chosen
        ]
        assert len(set(seen)) == len(seen) == n * per_epoch
    assert (
        data.step_examples(items[::-1], seed, 1, n) == steps[0]
    )  # the order of the file does not matter


def test_order_of_examples_is_fixed_for_good_and_fresh_each_epoch():
    items = make(8)

    def order(seed, step):
        return " ".join(e.uid for e in data.step_examples(items, seed, step, 8))

    assert order(3479, 1) == "e5 e7 e6 e2 e1 e4 e3 e0"
    assert len({order(seed, step) for seed in (1, 2) for step in (1, 2, 3)}) == 6


# ------------------------------------------------------------------------------------ chat template

TURNS = """{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if m.reasoning_content is defined %}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
{%- elif EMPTY %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- m.content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"""
EMPTY_BLOCK = "{{- '<think>\\n\\n</think>\\n\\n' }}"
TEMPLATES = {  # what follows in the generation prompt, with thinking on and off
    "opens": TURNS
    + "{%- if enable_thinking %}{{- '<think>\\n' }}{%- else %}"
    + EMPTY_BLOCK
    + "{%- endif %}{%- endif %}",
    "does not open": TURNS
    + "{%- if not enable_thinking %}"
    + EMPTY_BLOCK
    + "{%- endif %}{%- endif %}",
    "never thinks": TURNS + "{%- endif %}",
    "always opens": TURNS + "{{- '<think>\\n' }}{%- endif %}",
}


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["".join(t[0]) for t in anthologies.TITLES] + [anthologies.anthology("capitals")[0]]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    bpe.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    result = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    empty = "true" if request.param in ("opens", "does not open") else "false"
    result.chat_template, result.kind = (
        TEMPLATES[request.param].replace("EMPTY", empty),
        request.param,
    )
    return result


EXAMPLE = data.Example(
    "a", "Write about a lamp.", 100, "\nThe lamp\n\nwas out.\n", " First a lamp.\nThen none. "
)


@pytest.mark.parametrize("thinking", [True, False])
def test_anchor_is_what_the_template_writes(tokenizer, thinking):
    if tokenizer.kind == "always opens" and not thinking:
        with pytest.raises(data.DataError, match="turn thinking on"):
            data.encode_anchor(tokenizer, EXAMPLE, thinking, 500)
        return
    prompt = data.encode_prompt(tokenizer, EXAMPLE.prompt, thinking)
    response = data.encode_anchor(tokenizer, EXAMPLE, thinking, 500)
    answer = {"role": "assistant", "content": EXAMPLE.story.strip()}
    answer |= {"reasoning_content": EXAMPLE.reasoning.strip()} if thinking else {}
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": EXAMPLE.prompt}, answer],
        tokenize=False,
        enable_thinking=thinking,
    )
    text = tokenizer.decode(prompt + response)
    assert text + "\n" == whole
    assert (
        text.count("<think>")
        == text.count("</think>")
        == (thinking or tokenizer.kind in ("opens", "does not open"))
    )
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
    if thinking:
        assert "\n</think>\n\nThe lamp" in text
    # the policy's own text splits back into the same two parts
    parts = data.split_response(tokenizer.decode(response[:-1]), thinking)
    assert parts == (EXAMPLE.reasoning.strip() if thinking else "", EXAMPLE.story.strip())
    assert data.encode_anchor(tokenizer, EXAMPLE, thinking, len(response)) == response
    assert data.encode_anchor(tokenizer, EXAMPLE, thinking, len(response) - 1) is None


def test_anchor_without_reasoning_cannot_think(tokenizer):
    with pytest.raises(data.DataError, match="reasoning"):
        data.encode_anchor(tokenizer, dataclasses.replace(EXAMPLE, reasoning=""), True, 500)


def test_check_counts_tokens(tokenizer, tmp_path, capsys):
    if tokenizer.kind == "opens":
        tokenizer.save_pretrained(tmp_path / "tok")
        path = write_rows(tmp_path / "x.jsonl", row(), row(uid="b", story="word " * 400))
        options = ["--thinking", "--tokenizer", str(tmp_path / "tok"), "--max-response", "300"]
        data.main(["check", str(path), *options])
        printed = capsys.readouterr().out
        assert "50.0% fit 300" in printed and "2 good examples, 0 bad lines" in printed


def test_split_response():
    assert data.split_response("plan\n</think>\n\nOnce.\n", True) == ("plan", "Once.")
    assert data.split_response("<think>\nplan\n</think>\n\nOnce.", True) == ("plan", "Once.")
    assert data.split_response("still thinking", True) == ("still thinking", "")
    assert data.split_response(" Once </think>. ", False) == ("", "Once </think>.")


# ---------------------------------------------------------------------------------------- splitting


def found(text):
    return [(key(s.title), s.text) for s in split_book(text)[1]]


def truth_of(truth):
    return [(key(title), "\n\n".join(parts)) for title, parts in truth]


@pytest.mark.parametrize("style", anthologies.STYLES)
def test_every_heading_style_is_split_exactly(style):
    for seed in range(3):
        text, truth = anthologies.anthology(style, seed)
        assert found(text) == truth_of(truth)


@examples
@given(st.integers(0, 99), st.sampled_from(list(anthologies.STYLES)), st.integers(48, 100))
def test_wrapping_does_not_matter(seed, style, width):
    text, truth = anthologies.anthology(style, seed, width)
    assert found(text) == truth_of(truth)


def around(head="", tail=""):
    return lambda parts, width: head + anthologies.body(parts, width) + tail


POEM = "\n".join(f"     {line}" for line in anthologies.VERSE)
NOT_PROSE = {
    "epigraph": around(f"{POEM}\n                    --_Old Song._\n\n\n"),
    "prose epigraph": around('    "Who is the happy man?"\n\n                 Munichandra.\n\n\n'),
    "byline and source": around(
        "BY ANN AUTHOR\n\n[From _Tales of the Times_ (1839), by Ann Author.]\n\n"
    ),
    "first section": around("\nI\n\n\n"),
    "illustration": around("[Illustration: A lamp,\nand a man [in black] beside it.]\n\n"),
    "footnote block": around("[Footnote: Copyright, 1891, by MACMILLAN\n& CO.]\n\n\n"),
    "dedication": around("TO MARGARET\n\n"),
    "dedication in small letters": around("To Georges Legrand.\n\n"),
    "life of the author": around(
        "Ann Author (1832-1910) was born at Dover and wrote for the papers. Her tales fill\n"
        "nine volumes.\n\n"
        "This one is from the second, and the best of them.\n\n\n\n"
    ),
    "note with a star": around(tail="\n\n     [*] An old word."),
    "where it appeared": around(
        tail="\n\nThis story appeared in _The Argosy_ of May 17, 1889, under another name."
    ),
    "poem with a heading": around(tail=f"\n\n\nThe Song of the Mill\n\n{POEM}\n\n{POEM}"),
    "ornament": around(tail="\n\n[Decoration]\n\n  *       *       *"),
    "notes at the end": around(
        tail="\n\n\nNOTES\n\n[1] An old word.\n\n[2] Another of them, longer than the first."
    ),
    "next volume": around(
        tail="\n\n\n\n\nNIGHT PIECES, Vol. 2.\n\n\n"
        "      Translated by\n      A. B. Clark and Others"
    ),
    "printer": around(
        tail="\n\n          _Printed by_\n     MORRISON & GIBB LIMITED\n          _Edinburgh_"
    ),
    "the end": around(tail="\n\n\nTHE END\n\n* * * * *\n\nPrinted by BLACK & CO.\nEdinburgh"),
}


@pytest.mark.parametrize("name", NOT_PROSE)
@pytest.mark.parametrize("style", ["capitals", "no list, capitals"])
def test_what_is_no_prose_goes(name, style):
    text, truth = anthologies.anthology(style, decorate=NOT_PROSE[name])
    assert found(text) == truth_of(truth)


@pytest.mark.parametrize("style", ["capitals", "no list, capitals"])
def test_sections_verse_and_breaks_stay_inside_and_marks_are_normalised(style):
    end = [
        ("II", "***"),
        ("* * * * *", ""),  # one break is enough
        ("All slept.\n  *   *   *   *\nAll woke.", "All slept.\n\n***\n\nAll woke."),
        (
            "The B[=a]n[s]hee [oe] sang,[Pg 12] and (*2) [* A spirit.] went.",
            "The Ban[s]hee oe sang, and went.",
        ),
        (
            "“It’s _her_ lamp,”[1] he said--and stopped.*",
            '"It\'s her lamp," he said\u2014and stopped.',
        ),
        (POEM, "\n".join(anthologies.VERSE)),
        ("FOOTNOTES:", ""),
        ("[1] A note.", ""),
        ("CHAPTER III\nTHE THIRD", "***"),
        (
            "She shut the door behind her, and\nwent down to the mill-\npond.",
            "She shut the door behind her, and went down to the mill-pond.",
        ),
    ]
    _, truth = anthologies.anthology(style)

    def decorate(parts, width):
        text = anthologies.body(parts, width)
        return (
            "\n\n\n".join(["I", text, *(typed for typed, _ in end)])
            if parts == truth[1][1]
            else text
        )

    expected = truth_of(truth)
    expected[1] = (
        expected[1][0],
        "\n\n".join([expected[1][1], *(clean for _, clean in end if clean)]),
    )
    assert found(anthologies.anthology(style, decorate=decorate)[0]) == expected


def test_front_and_back_matter_is_no_story():
    front = (
        "\n\n\nPREFACE\n\n\n"
        + anthologies.body(anthologies.paragraphs(__import__("random").Random(5), 300))
        + "\n\n\n"
    )
    text, truth = anthologies.anthology("capitals", front=front)
    text = text.replace("CONTENTS\n\n", "CONTENTS\n\n     Preface\n").replace(
        "\n\n\n\nEnd of the Project",
        "\n\n\nAPPENDIX\n\n"
        + "\n\n".join(f"{t}\n\n  Note on it." for t, _ in truth)
        + "\n\nEnd of the Project",
    )
    assert found(text) == truth_of(truth)


def test_chapters_that_a_list_names_belong_to_their_story():
    text, truth = anthologies.anthology("capitals", words=800)
    name, parts = truth[2]
    half, upper = len(parts) // 2, name.upper()
    text = text.replace(
        f"     {name}\n", f"     {name}:\n          I. The Road\n         II. The Inn\n"
    )
    first, second = anthologies.body(parts[:half]), anthologies.body(parts[half:])
    split = f"{upper}\n\n\nI.\n\nTHE ROAD\n\n\n{first}\n\n\n\nII.\n\nTHE INN\n\n\n{second}"
    text = text.replace(f"{upper}\n\n\n{anthologies.body(parts)}", split)
    stories = found(text)
    assert [title for title, _ in stories] == [title for title, _ in truth_of(truth)]
    assert stories[2][1] == "\n\n".join([*parts[:half], "***", *parts[half:]])


def test_chapters_that_a_list_names_under_every_story_belong_to_it():
    text, truth = anthologies.anthology("capitals", words=800)
    for name, parts in truth:
        upper, half = name.upper(), len(parts) // 2
        chapters = f"CHAPTER I. BEFORE {upper}", f"CHAPTER II. AFTER {upper}"
        text = text.replace(
            f"     {name}\n", f"     {name}\n        {chapters[0]}\n        {chapters[1]}\n"
        )
        first, second = anthologies.body(parts[:half]), anthologies.body(parts[half:])
        split = f"{upper}\n\n\n{chapters[0]}\n\n\n{first}\n\n\n\n{chapters[1]}\n\n\n{second}"
        text = text.replace(f"{upper}\n\n\n{anthologies.body(parts)}", split)
    assert [title for title, _ in found(text)] == [title for title, _ in truth_of(truth)]


def test_volumes_with_a_list_each():
    first, truth = anthologies.anthology("page numbers", 1)
    second, more = anthologies.anthology("numbered", 2, title="More Night Pieces")
    for name, _ in more:
        second = second.replace(name, f"{name} Again").replace(
            name.upper(), f"{name.upper()} AGAIN"
        )
    more = [(f"{name} Again", parts) for name, parts in more]
    volumes = [
        text.split("*** END")[0].split("*** START")[1].split("\n", 1)[1] for text in (first, second)
    ]
    volumes = [re.sub(r"\n+End of the Project.*\n", "", text) for text in volumes]
    assert found("\n\n\n\n".join(volumes)) == truth_of(truth) + truth_of(more)


def test_a_heading_that_the_list_forgets_and_a_catalogue_with_a_list_of_its_own():
    text, truth = anthologies.anthology("capitals")
    text = text.replace(f"     {truth[2][0]}\n", "")
    assert found(text) == truth_of(truth)
    subjects = ["Poetry", "History", "Travel", "Sermons"]
    catalogue = (
        "\n".join(subjects)
        + "\n\n\n"
        + "".join(f"\n\n\n{s.upper()}\n\nA book, 2s. 6d.\n" for s in subjects)
    )
    end = "\n\n\n\nTHE END\n\n\n\nA LIST OF NEW BOOKS\n\n\nCONTENTS\n\n" + catalogue
    assert found(
        text.replace("\n\n\n\nEnd of the Project", end + "\n\n\n\nEnd of the Project")
    ) == truth_of(truth)


def test_paragraphs_without_blank_lines_between():
    text, truth = anthologies.anthology(
        "capitals",
        decorate=lambda parts, width: "\n".join(
            "    " + anthologies.fill(part, width) for part in parts
        ),
    )
    assert found(text) == truth_of(truth)


SHARED = next((p / "shared" for p in Path(__file__).parents if (p / "shared").is_dir()), Path())
REAL = SHARED / "anthologies"
ODD = SHARED / "books-odd"


@pytest.mark.skipif(
    not (REAL / "gold_toc.json").exists(), reason="needs real books with a list of contents by hand"
)
def test_real_books_are_split_as_their_contents_were_listed_by_hand():
    for book, gold in json.loads((REAL / "gold_toc.json").read_text("utf-8")).items():
        stories = split_book(read_text(REAL / f"{book}.txt"))[1]
        starts = [
            key(re.sub("_|--|\u2014", " ", text)).split()[:4] for text in (s.text for s in stories)
        ]
        assert starts == [
            key(re.sub("_|--|\u2014", " ", truth["first6"])).split()[:4]
            for truth in gold["stories"]
        ]
        for story, truth in zip(stories, gold["stories"], strict=True):
            assert abs(len(story.text.split()) / truth["words_body"] - 1) < 0.003
            others = {key(other.title) for other in stories} - {key(story.title)}
            assert not others & set(map(key, story.text.split("\n\n")))


def test_no_gutenberg_text_survives_any_marker_spelling():
    text, truth = anthologies.anthology("capitals")
    for start, end in (
        (
            "***START OF THE PROJECT GUTENBERG EBOOK X***",
            "***END OF THE PROJECT GUTENBERG EBOOK X***",
        ),
        (
            "*** START OF THIS PROJECT GUTENBERG EBOOK A LONG\nTITLE ***",
            "End of Project Gutenberg's X, by Y",
        ),
        (
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
            "End of the Project Gutenberg Etext of X",
        ),
    ):
        new = re.sub(r"\*\*\* START.*", start, text)
        new = re.sub(r"End of the Project(?:.|\n)*", f"{end}\n\nGutenberg licence text\n", new)
        assert found(new) == truth_of(truth)


# -------------------------------------------------------------------------------------------- build


def run_build(tmp_path, *arguments, name="train.jsonl"):
    out = ["--out", str(tmp_path / name), "--min-words", "300", "--max-words", "600"]
    build.main(["build", *map(str, arguments), *out])
    return data.load(tmp_path / name)


@pytest.fixture
def books(tmp_path):
    paths = []
    for i, style in enumerate(["capitals", "dot leaders", "no list, numbered", "italics"]):
        paths.append(tmp_path / f"book{i}.txt")
        text, _ = anthologies.anthology(
            style, seed=i, title=f"Volume {i}", author=f"Author {'ABCA'[i]}"
        )
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def test_build_writes_examples_a_card_and_the_same_bytes_again(tmp_path, books, capsys):
    first = run_build(tmp_path, *books, "--show")
    assert len(first) == 24 and len({e.uid for e in first}) == 24
    for e in first:
        assert abs(e.target_words / len(e.story.split()) - 1) < 0.06 and e.target_words % 10 == 0
        assert (
            e.prompt.endswith(f"The story should be {e.target_words} words long.")
            and "template" in e.source
        )
    assert "Three Black Hens" in first[4].prompt
    printed = capsys.readouterr()
    assert "Volume 2" in printed.out + printed.err and "24 stories kept" in printed.out
    card = (tmp_path / "train.card.md").read_text("utf-8")
    assert "| book1.txt | Volume 1 | Author B | 6 | 6 |" in card and "public domain" in card
    before = (tmp_path / "train.jsonl").read_bytes(), card
    run_build(tmp_path, *books)
    assert before == (
        (tmp_path / "train.jsonl").read_bytes(),
        (tmp_path / "train.card.md").read_text("utf-8"),
    )


def test_near_duplicates_across_books_go(tmp_path, books, capsys):
    text, truth = anthologies.anthology(
        "byline", seed=1, width=60, title="Another", author="Various"
    )
    words = text.split("A DEBT OF HONOUR")[-1]
    text = text.replace(
        words, words.replace("rain", "snow").replace("lantern", "candle")
    )  # an edition with other words
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    kept = run_build(tmp_path, *books, tmp_path / "other.txt")
    assert len(kept) == 24 and not any("other.txt" in e.source for e in kept)
    assert "6 near-duplicate" in capsys.readouterr().out


def test_split_by_author_with_length_buckets(tmp_path, books):
    train = run_build(tmp_path, *books, "--test", tmp_path / "test.jsonl", "--test-share", "0.3")
    test = data.load(tmp_path / "test.jsonl", anchors=False)
    authors = [{e.source.split(" | ")[1] for e in part} for part in (train, test)]
    assert not authors[0] & authors[1] and len(train) + len(test) == 24 and len(test) == 6
    assert [sum(low <= e.target_words < high for e in test) for low, high in build.BUCKETS] == [
        1
    ] * 6
    assert all(not e.story and e.prompt.endswith(f"{e.target_words} words long.") for e in test)


def test_one_author_in_several_spellings_is_one():
    same = ["Anton Chekhov", "ANTON P. CHEKHOV", "Chekhov", "Anton Chekhov (tr. Constance Garnett)"]
    assert {author_key(name) for name in same} == {"chekhov"}
    assert (
        author_key("Various")
        == author_key("Various; J. L. French (editor)".split(";")[0])
        == author_key("")
        == ""
    )


def test_kinds_that_are_no_stories(tmp_path):
    def kind(text, **fields):
        return kind_of(Story("Title", "", text, 1), fields)

    prose = "\n\n".join(anthologies.stories(0)[0][1])
    assert kind(prose) == ""
    for language in ("en-AU", "eng", "und", "C", "", "French"):  # the text decides
        assert kind(prose, language=language) == ""
    dutch = (
        "De oude man had een huis in de stad, en hij was met haar naar de kerk gegaan, of niet. "
    )
    assert kind(dutch * 30) == "not English"
    assert (
        kind("Es war einmal ein alter Mann, der hatte drei Kinder und ein Pferd. " * 30)
        == "not English"
    )
    assert kind("\n\n".join(["\n".join(anthologies.VERSE)] * 20)) == "verse"
    assert (
        kind(
            "\n\n".join(
                ["PETER: And where was he?", "ANN (aside): He was there, and I saw it."] * 20
            )
        )
        == "play"
    )
    assert (
        kind(
            "The weight of the ant is to that of the stone as one is to two; such is its law. " * 30
        )
        == "essay or sketch"
    )
    assert kind("The 1901 27 15 33 and 1902 28 16 34 of it. " * 30) == "list or table"
    assert (
        kind_of(Story("JANE DOE: A Study", "", prose, 1), {"author": "Jane Doe"})
        == "about the author"
    )


def novel():
    chapters = [
        f"\n\n\nCHAPTER {n}\n\n\n{anthologies.body(p)}"
        for n, (_, p) in zip(anthologies.ROMAN, anthologies.stories(3), strict=False)
    ]
    return anthologies.HEADER.format(title="One", author="A", upper="ONE") + "".join(chapters)


def titled_novel():
    """A novel whose chapters have titles, all of them in its list of contents."""
    text, truth = anthologies.anthology("capitals")
    for i, (name, _) in enumerate(truth):
        number = f"CHAPTER {anthologies.ROMAN[i]}"
        text = text.replace(f"     {name}\n", f"{number}. {name}\n").replace(
            name.upper(), f"{number}\n\n{name.upper()}"
        )
    return text


def poems():
    text, _ = anthologies.anthology(
        "capitals", decorate=lambda parts, width: "\n\n".join([POEM] * 20)
    )
    return text


BAD_BOOKS = {
    "empty": (b"", "is empty"),
    "binary": (b"\x7fELF\0\0\1" * 99, "binary"),
    "encoding": (
        "Stories\n\nCaf\xe9 stories\n".encode("latin-1"),
        "a single work",
    ),
    "broken EPUB": (None, "no EPUB"),
    "novel": (novel().encode(), "a single work"),
    "novel with titled chapters": (titled_novel().encode(), "a single work"),
    "poems": (poems().encode(), "6 pieces of verse"),
}


@pytest.mark.parametrize("name", BAD_BOOKS)
def test_bad_books_get_a_clear_message(tmp_path, name, capsys):
    content, message = BAD_BOOKS[name]
    if content is None:
        with zipfile.ZipFile(tmp_path / "book.txt", "w") as book:
            book.writestr("page.xhtml", "<p>Once.</p>")
    else:
        (tmp_path / "book.txt").write_bytes(content)
    with stops(capsys, f"(^|\n){re.escape(str(tmp_path))}/.*{message}.*\n$"):  # one line
        run_build(tmp_path, tmp_path / "book.txt")
    assert not (tmp_path / "train.jsonl").exists()


def test_folder_missing_file_and_one_bad_book_among_good(tmp_path, books, capsys):
    with stops(capsys, "is a folder; give its files"):
        run_build(tmp_path, tmp_path)
    with stops(capsys, "cannot be read"):
        run_build(tmp_path, tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\0")
    assert len(run_build(tmp_path, tmp_path / "bad.txt", *books)) == 24
    assert "bad.txt: holds binary data" in capsys.readouterr().err
    assert "bad.txt: holds binary data" in (tmp_path / "train.card.md").read_text("utf-8")


def test_old_encodings_that_say_so_are_read(tmp_path):
    text, truth = anthologies.anthology("capitals")
    text = text.replace("Language: English", "Character set encoding: ISO-8859-1").replace(
        "The widow", "The fianc\xe9e"
    )
    (tmp_path / "old.txt").write_bytes(text.replace("\n", "\r\n").encode("latin-1"))
    stories = run_build(tmp_path, tmp_path / "old.txt")
    assert (
        len(stories) == 6
        and any("The fianc\xe9e" in e.story for e in stories)
        and "\r" not in stories[0].story
    )


def test_epub(tmp_path):
    truth = anthologies.stories(9)
    page = "<html><head><title>x</title></head><body>{}</body></html>"
    contents = page.format(
        "<h2>Contents</h2>" + "".join(f"<p><a href='#'>{t}</a></p>" for t, _ in truth)
    )
    with zipfile.ZipFile(tmp_path / "book.epub", "w") as book:
        book.writestr(
            "META-INF/container.xml",
            '<container><rootfiles><rootfile full-path="O/p.opf"/></rootfiles></container>',
        )
        ids = ["c", *(f"s{i}" for i in range(len(truth)))]
        items = "".join(f'<item id="{i}" href="{i}%20x.xhtml"/>' for i in ids)
        spine = "".join(f'<itemref idref="{i}"/>' for i in ids)
        book.writestr(
            "O/p.opf",
            '<package xmlns="http://www.idpf.org/2007/opf">'
            '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
            "<dc:title>Night &amp; Day</dc:title>"
            "<dc:creator>Jane Doe</dc:creator><dc:language>en</dc:language></metadata>"
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
        )
        book.writestr("O/c x.xhtml", contents)
        for i, (title, parts) in enumerate(truth):
            body = f"<h2>{title}</h2>" + "".join(
                f"<p>{p.replace('widow', '<i>widow</i>')}</p>" for p in parts
            )
            book.writestr(f"O/s{i} x.xhtml", page.format(body))
    kept = run_build(tmp_path, tmp_path / "book.epub")
    assert [e.story for e in kept] == ["\n\n".join(parts) for _, parts in truth]
    assert kept[0].source.startswith("Night & Day | Jane Doe | book.epub:")


def test_prompts_only(tmp_path, capsys):
    files = [str(tmp_path / "p.json"), "--out", str(tmp_path / "o.jsonl")]
    command = ["build", "--prompts-only", *files]
    chat = {
        "prompt": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": "A fox. 2,000 words long."},
        ]
    }
    for text in (json.dumps([chat, row()]), "\n".join(map(json.dumps, [chat, row()]))):
        (tmp_path / "p.json").write_text(text)
        build.main(command)
        prompts = data.load(tmp_path / "o.jsonl", anchors=False)
        assert [e.target_words for e in prompts] == [2000, 1500]
    for bad, message in (
        ('{"x": 1}', "row 1 has no"),
        ('{"prompt": "A fox."}', "no length"),
        ("{", "broken JSON"),
    ):
        (tmp_path / "p.json").write_text(bad)
        with stops(capsys, message):
            build.main(command)


# ------------------------------------------------------------------------------------ local servers


def serve(handler):
    """A server on 127.0.0.1; handler(path, body) -> (status, headers, body) answers requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, answer = handler(self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


class FakeLLM:
    """Writes assignments and plans, after `faults` failures; each bad answer once per story."""

    def __init__(self, faults=0, bad=(), stop_after=10**9):
        self.faults = faults
        self.bad = bad
        self.stop_after = stop_after
        self.paid = []
        self.lock = threading.Lock()

    def __call__(self, path, body):
        messages = json.loads(body)["messages"]
        with self.lock:
            if self.faults > 0:
                self.faults -= 1
                return 503, {}, b"{}"
            if len(self.paid) >= self.stop_after:
                return 401, {}, b'{"error": {"message": "credit is used up"}}'
            self.paid.append(json.dumps(messages))
        plan, tries = "ASSIGNMENT" in messages[0]["content"], len(messages) // 2
        if tries < len(self.bad):
            answer = self.bad[tries](messages[0]["content"])
        elif plan:
            answer = " ".join(
                f"First I think of scene {i} and of what it must change for them."
                for i in range(12)
            )
        else:
            answer = "Write a quiet tale, in the third person, of two people who meet by chance in "
            answer += "bad weather and must decide whom they trust."
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        reply = {
            "choices": [
                {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
            ],
            "usage": usage,
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


def llm_build(tmp_path, books, llm, *arguments, name="train.jsonl"):
    server, url = serve(llm)
    try:
        llm_arguments = ["--prompts", "llm", "--llm-url", f"{url}/v1", "--llm-model", "m"]
        llm_arguments += ["--llm-price-in", "1", "--llm-concurrency", "3", *arguments]
        run_build(tmp_path, *books, *llm_arguments, name=name)
    finally:
        server.shutdown()
        server.server_close()
    return data.load(tmp_path / name, thinking=True)


def test_llm_prompts_with_faults_then_cut_off_and_resumed_pay_nothing_twice(
    tmp_path, books, capsys
):
    whole = FakeLLM(faults=3)
    made = llm_build(tmp_path, books[:2], whole, name="whole.jsonl")
    assert len(made) == 12 and len(whole.paid) == len(set(whole.paid)) == 24
    assert all(
        e.prompt.endswith(f" The story should be {e.target_words} words long.") for e in made
    )
    assert (
        "24 calls" in (printed := capsys.readouterr().out)
        and "$0.02" in printed
        and "by m" in made[0].source
    )

    cut = FakeLLM(stop_after=11)
    with stops(capsys, "credit is used up", status=3):
        llm_build(tmp_path, books[:2], cut)
    assert not (tmp_path / "train.jsonl").exists()
    with (tmp_path / "train.jsonl.llm").open("a") as file:
        file.write('\n{"key": "half a li')  # as a kill leaves it
    rest = FakeLLM()
    llm_build(tmp_path, books[:2], rest)
    assert len(cut.paid) == 11 and len(rest.paid) == 13 and not set(cut.paid) & set(rest.paid)
    assert (tmp_path / "train.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    capsys.readouterr()
    again = FakeLLM()
    llm_build(tmp_path, books[:2], again)
    assert not again.paid and "24 answers were there already" in capsys.readouterr().out


def test_a_killed_run_is_resumed_and_pays_nothing_twice(tmp_path, books):
    made, first, waiting, killed = FakeLLM(), FakeLLM(faults=2), [], threading.Event()

    def stalls(
        path, body
    ):  # after five answers: when all three workers wait, what was paid is on the disk
        if len(first.paid) < 5:
            return first(path, body)
        waiting.append(path)
        killed.wait(60)
        return 503, {}, b""

    server, url = serve(stalls)
    llm = ["--prompts", "llm", "--llm-url", f"{url}/v1", "--llm-model", "m"]
    llm += ["--llm-concurrency", "3"]
    words = ["--min-words", "300", "--max-words", "600", "--out", str(tmp_path / "train.jsonl")]
    process = subprocess.Popen(
        [sys.executable, data.__file__, "build", str(books[0]), *words, *llm]
    )
    while len(waiting) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed.set()
    paid = set(first.paid)
    server.shutdown()
    server.server_close()
    assert not (tmp_path / "train.jsonl").exists()
    rest = FakeLLM()
    llm_build(tmp_path, books[:1], rest)
    llm_build(tmp_path, books[:1], made, name="whole.jsonl")
    assert not paid & set(rest.paid) and len(paid) + len(rest.paid) == len(made.paid) == 12
    assert (tmp_path / "train.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_llm_dry_run_asks_nothing(tmp_path, books, capsys):
    llm = FakeLLM()
    with pytest.raises(data.DataError):  # there is no file to load
        llm_build(tmp_path, books[:1], llm, "--dry-run")
    assert (
        not llm.paid and "about 12 calls" in (printed := capsys.readouterr().out) and "$" in printed
    )


def test_bad_answers_are_sent_back_with_the_reason_and_dropped_when_they_stay_bad(tmp_path, books):
    def copy(task):
        return "Tell this: " + " ".join(task.split("STORY")[1].split()[:40])

    llm = FakeLLM(bad=[copy])
    assert len(llm_build(tmp_path, books[:1], llm)) == 6
    second = [json.loads(p) for p in llm.paid if len(json.loads(p)) == 3]
    assert len(second) == 12 and all("cannot be used" in m[2]["content"] for m in second)
    with pytest.raises(data.DataError, match="no example"):
        llm_build(tmp_path, books[:1], FakeLLM(bad=[copy, copy, copy]), name="none.jsonl")
    assert "no usable prompt: 6" in (tmp_path / "none.card.md").read_text("utf-8")


def test_an_llm_that_is_not_there_stops_with_the_reason(tmp_path, books, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    llm = ["--prompts", "llm", "--llm-url", url, "--llm-model", "m", "--llm-concurrency", "12"]
    with stops(capsys, "(?s)got no answer.*run the same command again|is down", status=3):
        run_build(tmp_path, books[0], *llm)


@pytest.mark.parametrize("old", build.RENAMED)
def test_a_renamed_option_is_refused_by_a_line_that_names_the_new_one(old, tmp_path, capsys):
    for arguments in ([old, "1"], [f"{old}=1"]):
        with stops(capsys, f"{old} is now {build.RENAMED[old]}"):
            run_build(tmp_path, tmp_path / "book.txt", *arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--llm-url", "http://user:pass@127.0.0.1/v1"], "without user, key or query"),
        (["--llm-extra", "[1]"], "extra.*write a JSON object"),
    ],
)
def test_llm_options_are_checked_before_a_book_is_read(tmp_path, books, capsys, options, message):
    llm = ["--prompts", "llm", "--llm-url", "http://127.0.0.1/v1", "--llm-model", "m", *options]
    with stops(capsys, f"^an --llm option.*{message}"):
        run_build(tmp_path, *books, *llm)


def test_llm_options_reach_every_request(tmp_path, books):
    asked = []
    llm = FakeLLM()

    def keep(path, body):
        asked.append(json.loads(body))
        return llm(path, body)

    llm_build(tmp_path, books[:1], keep, "--llm-extra", '{"top_k": 5, "temperature": null}')
    assert all(body["top_k"] == 5 and body["model"] == "m" for body in asked) and len(asked) == 12
    assert not any("temperature" in body for body in asked)


def test_importing_data_loads_neither_the_splitter_nor_an_http_client_nor_torch():
    code = (
        "import sys, data; print(*sorted({'requests', 'torch', 'corpus', 'chat'} & {*sys.modules}))"
    )
    folder = Path(data.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("\n", "")


def test_data_hands_over_to_the_builder_and_gives_its_exit_status(tmp_path, books):
    (tmp_path / "data.py").write_text("raise SystemExit('a module of the current folder')")
    command = [sys.executable, data.__file__, "build", str(books[0]), "--min-words", "300"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert len(data.load(tmp_path / "train.jsonl")) == 6
    (tmp_path / "bad.txt").write_bytes(b"")
    command = [sys.executable, data.__file__, "build", str(tmp_path / "bad.txt")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "the file is empty" in result.stderr


def test_data_without_corpus_says_what_it_needs(tmp_path):
    for name in ("data.py", "reward.py"):
        (tmp_path / name).write_text((Path(data.__file__).parent / name).read_text("utf-8"))
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    assert run([sys.executable, "data.py", "--help"]).returncode == 0
    result = run([sys.executable, "data.py", "build", "x.txt"])
    assert result.returncode == 2 and "needs the folder corpus/" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_wrong_with_a_prompt():
    story = "There was Ann, and then Ann saw it, so Ann ran, while Ann was glad of "
    story += "the very old grey horse behind the mill."
    good = "Write about a woman who finds an animal that nobody else can see, "
    good += "and must choose whether to tell of it."
    assert fault_of_prompt(good, story) == ""
    assert "names" in fault_of_prompt(good + " Call her Ann.", story)
    assert "copies" in fault_of_prompt(
        good + " It is the very old grey horse behind the mill.", story
    )
    assert "length" in fault_of_prompt(good + " Make it 900 words long.", story)
    assert "words; write" in fault_of_prompt(
        "A horse.", story
    ) and "words; write" in fault_of_prompt(good * 9, story)
    assert "plain prose" in fault_of_prompt("# Prompt\n" + good, story)
    assert "plain prose" in fault_of_trace("<think> " + "I plan. " * 100, story)


def test_gutenberg_is_polite_cached_and_resumable(tmp_path, capsys):
    asked, down = collections.Counter(), {"2"}

    def handler(path, _):
        book = path.split("/")[3]
        asked[path] += 1
        if book == "3":
            return 404, {}, b""
        if book == "4":
            return 200, {}, b"<html><body>Project Gutenberg: wait</body></html>"
        if book in down:
            down.discard(book)
            return 503, {"Retry-After": "0"}, b""
        return 200, {}, f"The Project Gutenberg eBook\r\nof {book}\r\n".encode()

    server, url = serve(handler)
    folder = str(tmp_path / "books")
    command = ["gutenberg", "--out", folder, "--mirror", f"{url}/", "--pause", "0.01"]
    build.main([*command, "1", "2"])
    assert (tmp_path / "books/2.txt").read_text() == "The Project Gutenberg eBook\nof 2\n"
    assert asked == {"/cache/epub/1/pg1.txt": 1, "/cache/epub/2/pg2.txt": 2}
    with stops(capsys, "(?s)3: .*404.*4: .*no Gutenberg text.*run the same command again"):
        build.main([*command, "1", "3", "4", "5"])
    assert asked["/cache/epub/1/pg1.txt"] == 1
    assert sorted(p.name for p in (tmp_path / "books").iterdir()) == ["1.txt", "2.txt", "5.txt"]
    server.shutdown()
    server.server_close()
    with stops(capsys, "cannot be reached"):
        build.main([*command, "6"])
    capsys.readouterr()
    build.main(["gutenberg", "--list"])
    titles = capsys.readouterr().out.splitlines()
    assert len(titles) >= 80 and any(
        "Sherlock Holmes, Arthur Conan Doyle" in title for title in titles
    )


# ------------------------------------------------------------------ any book: kinds made up here


def odd_books():
    return json.loads((ODD / "expected.json").read_text("utf-8")) if ODD.is_dir() else {"split": {}}


@pytest.mark.parametrize("name", odd_books()["split"])
def test_odd_books_are_split_as_expected(name):
    expected = odd_books()["split"][name]
    if isinstance(expected, str):  # refused, or read with a warning: as its UTF-8 twin
        expected = odd_books()["split"]["a01-one-blank-line-everywhere.txt"]
    stories = split_book(read_text(ODD / name))[1]
    assert [s.title.lower() for s in stories] == [e["title"].lower() for e in expected]
    for story, truth in zip(stories, expected, strict=True):
        words = story.text.replace("Adèle", "Adela").split()
        assert " ".join(words[:6]) == truth["first6"]
        if not name.startswith("a25"):  # whose last words are not those that its file ends with
            assert " ".join(words[-6:]) == truth["last6"]
        assert not name.startswith("a15") or not re.search(r"\d|THE QUAY", story.text)


@pytest.mark.parametrize("style", ["capitals", "title case", "no list, capitals", "arabic"])
@pytest.mark.parametrize("blank", ["\n\n", "\n"])
def test_one_blank_line_everywhere_or_none(style, blank):
    for seed in range(3):
        text, truth = anthologies.anthology(style, seed)
        if blank == "\n" and "no list" in style:
            continue
        head, body = text.split("*** START", 1)
        body = re.sub(r"\n{2,}", blank, body)
        stories = found(f"{head}*** START{body}")
        if blank == "\n\n":
            assert stories == truth_of(truth)
        else:  # a paragraph whose last line is full cannot be told from the next
            words = [(title, text.split()) for title, text in truth_of(truth)]
            assert [(title, text.split()) for title, text in stories] == words


@pytest.mark.parametrize("contents", ["nav", "ncx"])
@pytest.mark.parametrize("headings", [True, False])
@pytest.mark.parametrize("parts", [0, 2])
def test_epubs_are_split_by_their_own_contents(tmp_path, contents, headings, parts):
    truth = anthologies.stories(4)
    talk = ['"Precisely."', '"Yes."', '"What then?"', *truth[1][1]]
    truth = [(name, [*story[:2], *talk[:3], *story[2:]]) for name, story in truth]
    anthologies.epub(tmp_path / "b.epub", truth, contents, headings, parts)
    assert found(read_text(tmp_path / "b.epub")) == truth_of(truth)


@pytest.mark.parametrize("language", ["en-AU", "eng", "und", "", None])
def test_the_language_field_does_not_matter(tmp_path, language):
    anthologies.epub(tmp_path / "b.epub", anthologies.stories(5), language=language)
    assert len(run_build(tmp_path, tmp_path / "b.epub")) == 6


def test_html_and_markdown_give_the_stories_of_the_text(tmp_path):
    text, truth = anthologies.anthology("capitals", 6)

    def underlined(match):
        return f"{match[2]}\n{('=' if match[1] == '#' else '-') * len(match[2])}"

    setext = re.sub(r"(?m)^(#{1,2}) (.*)$", underlined, anthologies.markdown(truth))
    forms = {
        "a.md": anthologies.markdown(truth),
        "b.markdown": setext,
        "c.txt": anthologies.markdown(truth),
        "d.html": anthologies.html(truth),
        "e.txt": anthologies.html(truth),
    }
    for name, form in forms.items():
        (tmp_path / name).write_text(form, encoding="utf-8")
        assert found(read_text(tmp_path / name)) == truth_of(truth) == found(text), name


def test_html_and_epub_as_publishers_make_them(tmp_path):
    truth = anthologies.stories(8)
    cut = [(key(n), "\n\n".join([p[0], "***", *p[1:]])) for n, p in truth]
    assert found(html_text(anthologies.gutenberg_html(truth))) == cut
    anthologies.standard_ebook(tmp_path / "s.epub", truth)
    cut = [(key(n), "\n\n".join([p[0], '"Yes."', "***", *p[1:]])) for n, p in truth]
    assert found(read_text(tmp_path / "s.epub")) == cut


OPENINGS = [
    '    "Tell us a tale."\n\n    "Which one?" said he.',
    "    Ride a cock horse to the mill,\n    Ride it down and up the hill,",
    "    Dear Ann,--I write to you tonight from the mill.",
    "    _Ride a cock horse to the mill,_\n    _Ride it down and up the hill._",
]


@pytest.mark.parametrize("opening", OPENINGS)
def test_rhymes_talk_and_letters_begin_a_story(opening):
    _, truth = anthologies.anthology("capitals")

    def decorate(parts, width):
        lead = f"{opening}\n\n" if parts == truth[1][1] else ""
        return lead + anthologies.body(parts, width)

    story = found(anthologies.anthology("capitals", decorate=decorate)[0])[1][1]
    words = re.findall(r"\w+", opening.replace("_", ""))
    assert re.findall(r"\w+", story)[: len(words)] == words
    assert story.endswith("\n\n".join(truth[1][1]))


def test_marked_headings_parts_hold_stories_and_stories_hold_sections():
    truth = anthologies.stories(7)
    text = "# Night Pieces\n\n"
    for i, (name, story) in enumerate(truth):
        text += f"## PART {i // 3 + 1}: THE SEA\n\n" if i % 3 == 0 else ""
        text += f"### {name}\n\n#### I\n\n{story[0]}\n\n#### II. The Inn\n\n" + "\n\n".join(
            story[1:]
        )
        text += "\n\n"
    expected = [(key(n), "\n\n".join([s[0], "***", *s[1:]])) for n, s in truth]
    assert found(markdown_text(text)) == expected
    novel = "# One\n\n" + "".join(
        f"## Chapter {i}: {name}\n\n" + "\n\n".join(story) + "\n\n"
        for i, (name, story) in enumerate(truth)
    )
    assert found(markdown_text(novel)) == []


TAILS = [
    "March 1883.", "('The Lantern,' January 1888.)", "Modern Lantern, May 1901.", "1884.",
    "Christmas 1882.", "Quayside, 1899", "PARIS, 3rd of May, 1888.", "London, 1914-1918.",
    "First published in The Lantern, 1902.", "From _The Lantern_, June 1899.",
    "[Reprinted by permission of the publishers.]",
    "<<THIS DIGITAL COPY IS COPYRIGHT BY NOBODY AND MAY NOT BE SOLD.>>",
    "This electronic edition was made by volunteers. It is in the public domain.",
    "About this edition\n\nThis copy was made from a free library.\n\nUse it as you like.",
    "ROME, 1900.", "Oct., 1899", "(Paris, 1881)", "_London, May 1890._", "(1902)",
    "[This story was written in 1850. ED.]", "Public domainPublic domainfalsefalse",
    "This work is in the public domain in the USA because it was published long ago.",
    "--The Lantern, vol. ii. 1888.", "Copyright, 1910, by Ann Author.",
    "Transcriber's Notes:\n\nObvious errors were corrected.",
    "BOOKS BY ANN AUTHOR\n\nOTHER NIGHT PIECES. 12mo. $1.50 net.\n\nA SECOND BOOK. Crown 8vo.",
    "* * * * *\n\nThis story is a fine example of the short story. The author is at his best here, "
    "and the reader will see that this tale is worth study; it has unity and is brief.",
    "* * * * *\n\nRemember\n\nODD TALES\n\nOn sale everywhere",
]  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("style", ["capitals", "no list, capitals"])
def test_what_follows_a_story_goes(tail, style):
    text, truth = anthologies.anthology(style, decorate=around(tail=f"\n\n{tail}"))
    assert found(text) == truth_of(truth)


@examples
@given(st.integers(0, 50), st.sampled_from(["{} {}", "{}"]), st.integers(3, 90))
def test_running_heads_and_page_numbers_go(seed, form, first):
    pages = iter(range(first, 999, 2))

    def decorate(parts, width):
        text = ""
        for part in parts:
            n = next(pages)
            text += (
                anthologies.fill(part, width)
                + "\n\n"
                + form.format(*(["NIGHT PIECES", n] if form == "{} {}" else [n]))
                + "\n\n"
            )
        return text

    text, truth = anthologies.anthology("capitals", seed, decorate=decorate)
    assert found(text) == truth_of(truth)


@pytest.mark.parametrize(
    "heading, title",
    [
        ("ONE -- The Lamp", "The Lamp"),
        ("Twelve: The Lamp", "The Lamp"),
        ("XII. THE LAMP", "The Lamp"),
        ("THE LAMP  By ANN AUTHOR", "The Lamp"),
        ("The Lamp by Walter De La Mare", "The Lamp"),
        ("NOTES BY FLOOD AND FIELD", "Notes by Flood and Field"),
        ("A DAY BY THE SEA", "A Day by the Sea"),
        ("MCGOGGIN'S \u201cDOWN PENS\u201d", "McGoggin's \u201cDown Pens\u201d"),
        ("HENRY IV", "Henry IV"),
        ("O'HARA'S MILL", "O'Hara's Mill"),
        ("The King and I", "The King and I"),
    ],
)
def test_titles_have_no_rubbish(heading, title):
    assert title_case(clean_title(heading)) == title


@examples
@given(st.integers(0, 99), st.integers(1, 6))
def test_small_capitals_at_the_start_become_ordinary_letters(seed, n):
    def decorate(parts, width):
        words = parts[0].split()
        return anthologies.body(
            [" ".join([*map(str.upper, words[:n]), *words[n:]]), *parts[1:]], width
        )

    text, truth = anthologies.anthology("capitals", seed, decorate=decorate)
    assert found(text) == truth_of(truth)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize(
    "declared", ["", "Character set encoding: Latin-1", "Character set encoding: ASCII"]
)
def test_encodings(tmp_path, codec, declared):
    text, truth = anthologies.anthology("capitals", 3)
    text = text.replace("Language: English", declared).replace("The widow", "The fianc\xe9e")
    (tmp_path / "b.txt").write_bytes(text.encode(codec))
    warnings = []
    stories = split_book(read_text(tmp_path / "b.txt", warnings))[1]
    assert [s.title for s in stories] == [title for title, _ in truth]
    assert any("The fianc\xe9e" in s.text for s in stories)
    assert bool(warnings) == (codec == "cp1252" and not declared)
    assert all(re.search(r"b.txt: line \d+ is not UTF-8.*iconv", warning) for warning in warnings)


def test_a_result_that_leaves_most_of_a_book_unused_says_so(tmp_path, capsys):
    text, truth = anthologies.anthology("capitals", words=900)
    for name, _ in truth[2:]:
        text = text.replace(f"\n{name.upper()}\n", "\n")
    words = text.replace(truth[0][0].upper(), "X " * 900 + "\n\n\n" + truth[0][0].upper(), 1)
    (tmp_path / "b.txt").write_text(words)
    with contextlib.suppress(SystemExit, data.DataError):
        run_build(tmp_path, tmp_path / "b.txt")
    assert re.search(
        r"\d+ lines in its contents|only \d+% of its words|single work", capsys.readouterr().err
    )


def test_one_story_a_file(tmp_path):
    paths = []
    for name, parts in anthologies.stories(2):
        paths.append(tmp_path / f"{key(name)}.txt")
        paths[-1].write_text(f"{name}\n\n{anthologies.body(parts)}\n")
    kept = run_build(tmp_path, *paths, "--one-per-file")
    assert [e.story for e in kept] == ["\n\n".join(parts) for _, parts in anthologies.stories(2)]
    assert all(name in e.prompt for e, (name, _) in zip(kept, anthologies.stories(2), strict=True))


def test_prompts_have_a_dozen_patterns_and_are_true(tmp_path):
    story = "I went to the mill before the rain came, and my brother followed me."
    made = {
        template_prompt(f"u{i}", "The Lamp", "Jane Doe", story, 900).replace("The Lamp", "T")
        for i in range(300)
    }
    assert len(made) >= 12 and all(p.endswith(" The story should be 900 words long.") for p in made)
    assert not any("third person" in p for p in made) and any("first person" in p for p in made)
    assert any("I went to the mill before the rain" in p for p in made)
    assert not any(
        "Various" in template_prompt(f"u{i}", "T", "Various", story, 900) for i in range(99)
    )


def test_no_author_is_above_the_cap(tmp_path, books, capsys):
    kept = run_build(tmp_path, *books, "--per-author", "5")
    count = collections.Counter(e.source.split(" | ")[1] for e in kept)
    assert count == {"Author A": 5, "Author B": 5, "Author C": 5}
    assert [e.uid for e in kept] == [
        e.uid for e in run_build(tmp_path, *books, "--per-author", "5")
    ]


def test_only_persons_are_names():
    story = (
        "Ivan came to Paris, and Ivan said it to the King. Then Mr. Brown saw Ivan in Paris, and "
    )
    story += (
        "Mr. Brown was glad, for Mr. Brown had been to New Harbour. The Colonel told Ivan of it. "
    )
    assert names_in(story * 3) == {"Ivan", "Brown"}
    prompt = "Write about a king in Paris and a new colonel who must choose between a lady and the "
    prompt += "truth, in the third person, and plainly."
    assert fault_of_prompt(prompt, story * 3) == ""
    assert "Ivan" in fault_of_prompt(prompt + " Call him Ivan.", story * 3)


# ------------------------------------------------------------------------------------ pairs, check

TALE = " ".join(anthologies.stories(1)[0][1])
CHAT = [{"role": "user", "content": "A lamp."}, {"role": "assistant", "content": TALE}]
GPT = [{"from": "human", "value": "A lamp."}, {"from": "gpt", "value": TALE}]
PAIRS = {
    "a.jsonl": json.dumps({"prompt": "[WP] A lamp.", "story": TALE, "reasoning": None}),
    "b.json": json.dumps([{"instruction": "A lamp.", "output": TALE}]),
    "c.csv": f'title,text\nA lamp.,"{TALE.replace(chr(34), chr(34) * 2)}"\n',
    "d.tsv": "writing_prompt\tchosen_story\nA lamp.\t" + TALE.replace('"', "'") + "\n",
    "e.json": json.dumps([{"conversations": GPT}]),
    "f.jsonl": json.dumps({"messages": CHAT}),
    "g.jsonl": json.dumps({"prompt": CHAT[:1], "completion": CHAT[1:]}),
    "h.json": json.dumps({"prompt": ["A lamp."], "story": [TALE]}),
    "i.json": json.dumps({"rows": [{"row": {"prompt": "A lamp.", "chosen": TALE}}]}),
    "j.jsonl": json.dumps(
        {"prompt": "[ WP ] A lamp.", "story": TALE[:50] + " <newline> <newline> " + TALE[50:]}
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_people_have(tmp_path, name, capsys):
    (tmp_path / name).write_text(PAIRS[name], encoding="utf-8")
    build.main(["pairs", str(tmp_path / name), "--out", str(tmp_path / "o.jsonl")])
    (example,) = data.load(tmp_path / "o.jsonl")
    words = example.target_words
    assert example.prompt == f"A lamp. The story should be {words} words long."
    assert (
        example.story.replace("\n\n", "").replace("'", '"').split()[-9:]
        == TALE.replace("'", '"').split()[-9:]
    )
    assert abs(words / len(example.story.split()) - 1) < 0.06
    assert "prompt = " in capsys.readouterr().out


def test_writingprompts_files_columns_and_parquet(tmp_path, capsys):
    (tmp_path / "x.wp_source").write_text("[ WP ] A lamp .\n[ EU ] A mill .\n")
    told = "It was n't late , and `` no '' was said . <newline> <newline> She left . " * 9
    (tmp_path / "x.wp_target").write_text(f"{told}\n{told[20:]}\n")
    build.main(["pairs", str(tmp_path / "x.wp_source"), "--out", str(tmp_path / "o.jsonl")])
    first = data.load(tmp_path / "o.jsonl")[0]
    assert (
        first.prompt.startswith("A lamp. The story")
        and 'It wasn\'t late, and "no" was said.\n\nShe left.' in first.story
    )
    write_rows(tmp_path / "y.jsonl", {"a": "A lamp.", "b": TALE, "n": 300.0, "x": "A mill."})
    command = ["pairs", str(tmp_path / "y.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    with stops(
        capsys, 'has no "prompt"; columns seen: a, b, n, x; name one with --prompt.*accepted'
    ):
        build.main(command)
    with stops(capsys, 'no column "z"; there are: a, b, n, x'):
        build.main([*command, "--prompt", "z"])
    build.main([*command, "--prompt", "x", "--story", "b", "--words", "n"])
    assert (
        data.load(tmp_path / "o.jsonl")[0].prompt == "A mill. The story should be 300 words long."
    )
    (tmp_path / "p.parquet").write_bytes(b"PAR1" + b"\0" * 20)
    if "pyarrow" not in sys.modules:
        with pytest.raises((SystemExit, Exception), match="pyarrow|2|Parquet"):
            build.main(["pairs", str(tmp_path / "p.parquet")])


def test_prompt_files_of_the_authors(tmp_path):
    rows = [{"uid": "x1", "prompt": "A lamp.", "target_word_count": 1500.0}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    build.main(
        ["build", "--prompts-only", str(tmp_path / "p.json"), "--out", str(tmp_path / "o.jsonl")]
    )
    (example,) = data.load(tmp_path / "o.jsonl", anchors=False)
    assert (example.uid, example.target_words) == ("x1", 1500)


def test_null_is_absent_and_a_float_may_be_whole(tmp_path):
    path = write_rows(
        tmp_path / "x.jsonl", row(prompt="A ghost.", target_words=1000.0, source=None)
    )
    assert data.load(path)[0].target_words == 1000
    path = write_rows(tmp_path / "x.jsonl", row(prompt="A ghost.", target_words=1000.5))
    with pytest.raises(data.DataError, match="whole number"):
        data.load(path)


def test_check_says_once_what_a_file_of_pairs_is(tmp_path, capsys):
    path = write_rows(
        tmp_path / "x.jsonl", *[{"prompt": f"p{i}", "story": f"{TALE} {i}."} for i in range(9)]
    )
    with pytest.raises(SystemExit):
        data.main(["check", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("data.py pairs") == 1 and "prompt, story" not in printed.splitlines()[1:]
    assert len(printed.splitlines()) < 4


def test_check_finds_what_would_spoil_training(tmp_path, capsys):
    good = {"prompt": "A lamp. The story should be 400 words long.", "story": TALE}
    rows = [
        row(uid="w", **{**good, "prompt": "[ WP ] A lamp. The story should be 400 words long."}),
        row(uid="n", **{**good, "story": f"{TALE} <newline> Then it rained."}),
        row(uid="f", prompt="A lamp. The story should be 9000 words long.", story=TALE + " So."),
        row(uid="s", **{**good, "story": "and then " + TALE}),
        row(uid="e", **{**good, "story": TALE + " And then the"}),
        row(uid="d", **good),
        row(uid="d2", **good),
        row(uid="c", **{**good, "story": "ONCE UPON a time. " + TALE}),
        row(uid="h", **{**good, "story": TALE + " Tom &amp; Ann."}),
        row(uid="l", prompt="A mill. 8000 words long.", story="One word. " * 4000),
        *[
            row(uid=f"a{i}", **{**good, "story": f"{TALE} {i}."}, source=f"B | Jane Doe | b:{i}")
            for i in range(5)
        ],
    ]  # fmt: skip
    path = write_rows(tmp_path / "x.jsonl", *rows)
    data.main(["check", str(path), "--sample", "2"])
    printed = capsys.readouterr().out
    for fragment in (
        '"<newline>"', '"[ WP ]"', "e.g. f: asked 9,000 words, story", "start cut off?",
        "e.g. e: ", "same as w",
        "opening in capitals", "remove HTML", "over 8,192 tokens", "Jane Doe (33%)",
    ):  # fmt: skip
        assert printed.count(fragment) == 1, (fragment, printed)
    assert printed.count("sample ") == 2


def test_many_lines_with_one_fault_get_one_message(tmp_path, capsys):
    path = write_rows(
        tmp_path / "x.jsonl", row(), *[row(uid=f"b{i}", story=" ") for i in range(500)]
    )
    with pytest.raises(SystemExit):
        data.main(["check", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert "(500 lines: also 3, 4" in lines[0] and len(lines) < 9
