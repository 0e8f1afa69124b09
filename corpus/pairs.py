"""Prompt–story pairs that people have -> examples: WritingPrompts, LitBench, chats, tables.

One reader for `data.py pairs`, for prompts without stories (`build --prompts-only`) and for the
prompt files of evaluations: a file -> rows (`read_rows`) -> fields by column (`field_of`).
"""

import argparse
import csv
import gzip
import io
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rundir
from corpus.books import round_words
from corpus.prompts import length_sentence
from corpus.text import decode, read_bytes
from data import MARKUP, DataError, Example
from reward import requested_words

SHAPES = (
    "accepted: JSONL, a JSON list, CSV or TSV with a header, parquet, WritingPrompts' .wp_source "
    'beside .wp_target; a row has a prompt and a story column, or "messages" or "conversations"'
)
COLUMNS = {  # field -> names of columns that hold it, the likeliest first
    "prompt": "prompt writing_prompt instruction question query input title",
    "story": "story chosen_story completion response chosen output answer text",
    "words": "target_words target_word_count word_count num_words length",
    "reasoning": "reasoning reasoning_content thinking plan",
    "uid": "uid id prompt_id",
    "source": "source author",
}
CHATS = ("messages", "conversations", "conversation", "dialogue")
ROLES = {
    "user": "prompt",
    "human": "prompt",
    "assistant": "story",
    "gpt": "story",
    "model": "story",
}
TAG = re.compile(r"^\W*\[\s*[A-Za-z]{2,3}\s*\]\s*:?\s*")  # "[WP]", "[ EU ]"
NEWLINES = re.compile(r"\s*<newline>\s*(?:<newline>\s*)*")
SPACED = [  # tokens written apart, as in WritingPrompts
    (r"`` ?| ?''", '"'),
    (r" (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
    (r" ([.,!?;:%)\]])", r"\1"),
    (r"([(\[$]) ", r"\1"),
    (r'(^|[\s(])" ', r'\1"'),
    (r' "(?=[\s.,!?]|$)', '"'),
]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table or list, null left out. DataError says what shape is accepted."""
    raw = read_bytes(path)
    if raw.startswith(b"\x1f\x8b"):
        raw = gzip.decompress(raw)
    if raw.startswith(b"PAR1"):
        try:
            import pyarrow.parquet
        except ImportError:
            how = "`pip install pyarrow`, or write it as JSONL (`to_json` of a dataset)"
            raise DataError(f"{path}: parquet needs pyarrow; {how}") from None
        rows: Any = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    else:
        try:
            text = decode(raw)[0].lstrip("\ufeff")
        except DataError as error:
            raise DataError(f"{path}: {error}; {SHAPES}") from None
        rows = rows_of_text(path, text)
    if isinstance(rows, dict):  # {"data": [...]}, or a list for each column
        lists = {name: value for name, value in rows.items() if isinstance(value, list)}
        nested = [value for value in lists.values() if value and isinstance(value[0], dict)]
        if len(lists) > 1 and not nested and len({*map(len, lists.values())}) == 1:
            rows = [
                dict(zip(lists, values, strict=True))
                for values in zip(*lists.values(), strict=True)
            ]
        else:
            rows = (
                nested[0] if len(lists) == len(nested) == 1 and not turns_of(nested[0]) else [rows]
            )
    rows = [row.get("row", row) if isinstance(row, dict) else row for row in rows]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: no rows with named columns; {SHAPES}")
    return [{k: v for k, v in row.items() if v is not None and v == v} for row in rows]


def rows_of_text(path: Path, text: str) -> Any:
    """JSON, JSONL, CSV or TSV, or one of WritingPrompts' two files -> rows."""
    if path.suffix == ".wp_source" or path.suffix == ".wp_target":
        both = [path.with_suffix(s) for s in (".wp_source", ".wp_target")]
        sides = [decode(read_bytes(file))[0].strip("\n").split("\n") for file in both]
        if len(sides[0]) != len(sides[1]):
            raise DataError(f"{both[0]} and {both[1]} have different numbers of lines")
        return [{"prompt": p, "story": s} for p, s in zip(*sides, strict=True)]
    if text.lstrip()[:1] in ("[", "{") and not re.match(r"\s*\[ ?\w", text):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: broken JSON ({error}); {SHAPES}") from None
        return rows
    csv.field_size_limit(10**9)
    head = text.lstrip("\n").split("\n")[0]
    delimiter = max("\t,;", key=head.count)
    if not head.count(delimiter):
        raise DataError(f"{path}: no table and no JSON; {SHAPES}")
    return list(csv.DictReader(io.StringIO(text.lstrip("\n"), newline=""), delimiter=delimiter))


def said(content: Any) -> Any:
    """The text of a message: of its parts where it has parts."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def turns_of(value: Any) -> dict[str, str]:
    """A chat -> its first prompt, the story that answers it, and the reasoning between."""
    found: dict[str, str] = {}
    for turn in value if isinstance(value, list) else []:
        if not isinstance(turn, dict):
            return {}
        field = ROLES.get(str(turn.get("role", turn.get("from", ""))).lower(), "")
        if field == "prompt" or (field == "story" and "prompt" in found):
            found.setdefault(field, said(turn.get("content", turn.get("value", ""))))
            if field == "story" and isinstance(turn.get("reasoning_content"), str):
                found.setdefault("reasoning", turn["reasoning_content"])
        if "story" in found:
            break
    return found


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose chats are columns."""
    flat = dict(row)
    for name, value in row.items():
        if isinstance(value, str) and name in CHATS and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                continue
        turns = turns_of(value)
        if name in CHATS:
            flat |= turns
        elif turns:
            flat[name] = turns.get("story" if name in ("chosen", "completion") else "prompt", "")
            flat.setdefault("prompt", turns.get("prompt", ""))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat[name] = said(value[0].get("content", ""))
    return flat


def guess(rows: list[dict[str, Any]], given: dict[str, str | None]) -> dict[str, str]:
    """Field -> column: as given, else the first name that the rows know."""
    seen = {name: None for row in rows[:100] for name in row}
    by_name = {re.sub(r"\W+", "_", name.strip().lower()): name for name in reversed([*seen])}
    chosen: dict[str, str] = {}
    for field, names in COLUMNS.items():
        column = given.get(field)
        if column and column not in seen:
            raise DataError(f'no column "{column}"; there are: {", ".join(seen)}')
        column = column or next((by_name[n] for n in names.split() if n in by_name), None)
        if column and column not in chosen.values():
            chosen[field] = column
    return chosen


def number_of(value: Any) -> int | None:
    """A whole number above 0 as it may be written: 1000, 1000.0, "1,000"; else None."""
    try:
        number = float(str(value).replace(",", ""))
        return int(number) if number == int(number) and number >= 1 else None
    except (ValueError, OverflowError):
        return None


def tidy(text: str) -> str:
    """A text without the tokens of a data set: <newline>, words and marks written apart."""
    text = NEWLINES.sub("\n\n", text.replace("\r\n", "\n")).strip()
    if text.count(" .") + text.count(" ,") > len(text.split()) / 60:
        for pattern, new in SPACED:
            text = re.sub(pattern, new, text)
    return text


def examples_of(
    path: Path, given: dict[str, str | None], stories: bool = True
) -> tuple[list[Example], Counter[str], dict[str, str]]:
    """A file -> examples, how many rows were left out for what, and the columns used."""
    rows = [flatten(row) for row in read_rows(path)]
    try:
        columns = guess(rows, given)
        for field in ("prompt", "story") if stories else ("prompt",):
            if field not in columns:
                seen = ", ".join({name: None for row in rows[:100] for name in row})
                what = f'has no "{field}"; columns seen: {seen}; name one with --{field}'
                raise DataError(f"row 1 {what}; {SHAPES}")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    examples = []
    dropped: Counter[str] = Counter()
    uids: Counter[str] = Counter()
    first: dict[str, int] = {}  # of each story
    for number, row in enumerate(rows, 1):
        texts = {f: row.get(c) for f, c in columns.items()}
        prompt, story = (tidy(str(said(texts.get(f)) or "")) for f in ("prompt", "story"))
        prompt = TAG.sub("", prompt)
        reasoning = str(texts.get("reasoning") or "").strip()
        if "</think>" in story and stories:
            reasoning, _, story = (part.strip() for part in story.partition("</think>"))
            reasoning = reasoning.removeprefix("<think>").strip()
        if not prompt:
            if not stories:
                raise DataError(f'{path}: row {number} has no "{columns["prompt"]}"; {SHAPES}')
            dropped["no prompt"] += 1
            continue
        asked = requested_words(prompt)
        words = asked or number_of(texts.get("words"))
        if stories:
            why = ""
            if not story or re.fullmatch(r"\W*(?:deleted|removed)\W*", story):
                why = "no story"
            elif first.setdefault(story, number) != number:
                why = "same story twice"
            elif MARKUP.search(prompt + story):
                why = "control tokens"
            if why:
                dropped[why] += 1
                continue
            words = words or round_words(len(story.split()))
        if words is None:
            what = f'asks for no length; end it with "{length_sentence(1500)}"'
            raise DataError(f"{path}: row {number} {what}, or add target_words")
        if stories and asked is None:
            stop = "" if re.search(r"[.!?:\"'\u201d)*_]$", prompt) else "."
            prompt = f"{prompt}{stop} {length_sentence(words)}"
        uid = str(texts.get("uid") or f"{path.stem}-{number}")
        uids[uid] += 1
        uid += f"-{uids[uid]}" if uids[uid] > 1 else ""
        source = str(texts.get("source") or f"{path.name}:{number}")
        examples.append(
            Example(
                uid, prompt, words, story if stories else "", reasoning if stories else "", source
            )
        )
    return examples, dropped, columns


def write_examples(path: str, examples: list[Example]) -> None:
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rundir.write(Path(path), "".join(lines))


def load_prompts(path: Path) -> list[Example]:
    """Prompts without stories, for training without anchors or for an evaluation."""
    return examples_of(path, {}, stories=False)[0]


def pairs(args: argparse.Namespace) -> None:
    """`data.py pairs`. DataError, and nothing written, where no pair is left."""
    examples = []
    dropped: Counter[str] = Counter()
    for path in map(Path, args.files):
        given = {field: getattr(args, field) for field in COLUMNS}
        found, left_out, columns = examples_of(path, given)
        print(f"{path}: {', '.join(f'{field} = {column}' for field, column in columns.items())}")
        dropped += left_out
        for example in found:
            words = len(example.story.split())
            why = (
                "too short"
                if words < args.min_words
                else "too long"
                if words > args.max_words
                else ""
            )
            dropped[why] += 1
            examples += [] if why else [example]
    del dropped[""]
    listed = ", ".join(f"{n} {why}" for why, n in dropped.most_common()) or "nothing"
    if not examples:
        raise DataError(f"no pair is left; left out: {listed}; see --min-words, --max-words")
    uids = Counter(example.uid for example in examples)
    if len(uids) < len(examples):
        raise DataError(f'uid "{uids.most_common(1)[0][0]}" is in two files; rename one file')
    write_examples(args.out, examples)
    print(f"{args.out}: {len(examples)} examples; left out: {listed}")
    print(f"next: python data.py check {args.out}")
