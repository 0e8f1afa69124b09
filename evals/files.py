"""Prompts, stories and judge prompts out of files: ours, the authors' and the benchmarks' own.

    field     any of these names
    uid       uid, id, index; LongBench-Write has none: the number of the line
    prompt    prompt, query, input, writing_prompt
    story     story, response, output
    target    target_words, target_word_count, target_length, length; else "N words long"

Each file is checked whole before anything is paid for: RecordError says file, line and what to do.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward import requested_words, word_count
from rundir import RecordError

ALIASES = {
    "uid": ("uid", "id", "index"),
    "prompt": ("prompt", "query", "input", "writing_prompt"),
    "story": ("story", "response", "output"),
    "target": ("target_words", "target_word_count", "target_length", "length"),
}
DOMAINS = {"d4": "literature & arts"}  # the paper's name for the fourth of WritingBench's six
SEED = "<SEED>"  # stands in EQ-Bench's creative prompts for one of their seed modifiers


@dataclass(frozen=True)
class Prompt:
    """What to write. The judge sees `prompt` as it is; the writer sees `text(sample)`."""

    uid: str
    prompt: str
    target_words: int | None = None
    seeds: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # checklist, bucket: kept in the stories

    def text(self, sample: int) -> str:
        return self.prompt.replace(SEED, self.seeds[sample]) if self.seeds else self.prompt


@dataclass(frozen=True)
class Story:
    uid: str
    sample: int
    prompt: str
    text: str  # without thinking
    words: int
    target_words: int | None
    finished: bool | None  # False: cut off at the limit of tokens; None: not known
    model: str
    bucket: str | None
    checklist: list[dict]


def strip_thinking(text: str) -> str:
    """The text after <think>…</think>; the opening may have been the template's."""
    text = re.sub(r"\A\s*<think>.*?</think>", "", text, count=1, flags=re.S)
    before, closed, after = text.partition("</think>")
    return (after if closed and "<think>" not in before else text).strip()


def digest(value: Any) -> str:
    """SHA-256 of a text, or of a value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --------------------------------------------------------------------------------------------- rows


def _loads(text: str) -> Any:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=constant)


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 (byte {error.start}); convert it") from None


def _rows(path: str | Path) -> list[tuple[str, dict]]:
    """("file:line", record) of each line of a JSONL file."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not a line of JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise RecordError(f"{where}: a JSON object is needed, this is a {type(row).__name__}")
        rows.append((where, row))
    if not rows:
        raise RecordError(f"{path}: the file is empty; write one JSON object a line")
    return rows


def _find(row: dict, name: str) -> Any:
    return next((row[alias] for alias in ALIASES[name] if row.get(alias) is not None), None)


def _text(row: dict, name: str, where: str) -> str:
    value = _find(row, name)
    if isinstance(value, str):
        return value
    names = ", ".join(ALIASES[name])
    what = f"no {name} in it" if value is None else f"its {name} is no text"
    raise RecordError(f"{where}: {what} (one of: {names}); is this the right file?")


def _uid(row: dict, where: str) -> str:
    value = _find(row, "uid")
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise RecordError(f"{where}: no uid in it (one of: uid, id, index); is this the right file?")


def _target(row: dict, prompt: str, where: str) -> int | None:
    value = _find(row, "target")
    if value is None:
        return requested_words(prompt)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value < 1e9 or value != int(value):
        what = f"target_words is {value!r:.40}"
        raise RecordError(f"{where}: {what}; write the length that was asked for, or leave it out")
    return int(value)


def _once(uid: Any, where: str, seen: dict[Any, str]) -> None:
    if uid in seen:
        shown = f"{uid[0]}, sample {uid[1]}" if isinstance(uid, tuple) else uid
        first = seen[uid].rpartition(":")[2]
        raise RecordError(f"{where}: {shown} is in line {first} too; remove one of them")
    seen[uid] = where


# ------------------------------------------------------------------------------------------ prompts


def read_prompts(path: str | Path, domain: str = "", lang: str = "") -> list[Prompt]:
    """The prompts of a file of any kind, each uid once.

    domain, lang: keep those lines of WritingBench ("D4" is Literature & Arts, as in the paper).
    """
    prompts = []
    seen: dict[Any, str] = {}
    for where, row in _prompt_rows(path):
        if not _wanted(row, "domain1", domain, where) or not _wanted(row, "lang", lang, where):
            continue
        longbench = {"prompt", "type", "length"} <= set(row) and _find(row, "uid") is None
        uid = where.rpartition(":")[2] if longbench else _uid(row, where)
        _once(uid, where, seen)
        prompt = _text(row, "prompt", where)
        seeds = row.get("seed_modifiers") if SEED in prompt else []
        if not (isinstance(seeds, list) and all(isinstance(seed, str) for seed in seeds)):
            raise RecordError(f"{where}: it has {SEED} and no seed_modifiers, a list of texts")
        more = {name: row[name] for name in ("checklist", "bucket") if row.get(name)}
        prompts.append(Prompt(uid, prompt, _target(row, prompt, where), seeds, more))
    if not prompts:
        raise RecordError(f"{path}: no line has --domain {domain!r} and --lang {lang!r}")
    return prompts


def _prompt_rows(path: str | Path) -> list[tuple[str, dict]]:
    """Lines of JSONL, or the entries of EQ-Bench's one object."""
    try:
        whole = _loads(read_text(path))
    except (ValueError, RecursionError):
        return _rows(path)
    if not (isinstance(whole, dict) and whole):
        raise RecordError(f"{path}: one JSON object a line is needed, or EQ-Bench's one object")
    if not all(isinstance(entry, dict) and "writing_prompt" in entry for entry in whole.values()):
        return _rows(path)
    return [(f"{path}:{uid}", {**entry, "uid": uid}) for uid, entry in whole.items()]


def _wanted(row: dict, name: str, value: str, where: str) -> bool:
    if value and name not in row:
        option = "--lang" if name == "lang" else "--domain"
        raise RecordError(f"{where}: no {name} in it; this file cannot be cut by {option}")
    asked = DOMAINS.get(value.lower(), value.lower())
    return not value or str(row[name]).lower() == asked


# ------------------------------------------------------------------------------------------ stories


def read_stories(path: str | Path, prompts: Iterable[Prompt] = ()) -> list[Story]:
    """The stories of a JSONL file, each (uid, sample) once, by one model.

    prompts: where a line has no prompt, length or checklist of its own, these have it.
    """
    known = {prompt.uid: prompt for prompt in prompts}
    stories: list[Story] = []
    seen: dict[Any, str] = {}
    for where, row in _rows(path):
        uid = _uid(row, where)
        prompt = known.get(uid)
        if _find(row, "prompt") is None and prompt:
            row = {**row, "prompt": prompt.prompt}
        text = _text(row, "story", where)
        asked = _text(row, "prompt", where)
        sample = row.get("sample", 0)
        if type(sample) is not int:
            raise RecordError(f"{where}: sample is {sample!r:.40}, no whole number")
        _once((uid, sample), where, seen)
        more = {**(prompt.more if prompt else {}), **row}
        target = _target(row, asked, where)
        settings = row.get("settings")
        by = settings.get("model") if isinstance(settings, dict) else row.get("model")
        text = strip_thinking(text)
        story = Story(
            uid,
            sample,
            asked,
            text,
            word_count(text),
            prompt.target_words if target is None and prompt else target,
            row.get("finished"),
            str(by or ""),
            str(more["bucket"]) if more.get("bucket") else None,
            _checklist(more.get("checklist"), where),
        )
        if stories and stories[0].model != story.model:
            models = f"{stories[0].model!r} and {story.model!r}"
            raise RecordError(f"{where}: stories of two models, {models}; one file for each")
        stories.append(story)
    return stories


def _checklist(value: Any, where: str) -> list[dict]:
    entries = [] if value is None else value
    if isinstance(entries, list) and all(isinstance(e, dict) and "name" in e for e in entries):
        return entries
    raise RecordError(f"{where}: checklist is no list of criteria with names")


# ---------------------------------------------------------------------------------------- templates

PLACES = {  # name in a judge prompt, ours or another's -> what stands there
    "prompt": ("writing_prompt", "prompt", "query", "INST"),
    "story": ("full_story", "test_model_response", "story_text", "response", "RESPONSE"),
    "criteria": ("creative_writing_criteria", "dimensions_list"),
    "lower": ("lower_is_better_criteria",),
    "criterion": ("criteria", "criteria_block"),
    "first": ("model_a_analysis", "story_a"),
    "second": ("model_b_analysis", "story_b"),
}
_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}|\$([A-Z]+)\$")


@dataclass(frozen=True)
class Template:
    """A judge prompt with places to fill, all in one pass: what is filled in stays text."""

    text: str
    system: str = ""
    style: str = "{}"  # or "$$"; "format": as {}, and doubled braces are literal

    @property
    def sha256(self) -> str:
        return digest([self.system, self.text])

    def names(self) -> list[str]:
        found: list[str] = []
        self._each(found.append)
        return found

    def check(self, needs: Iterable[str], knows: Iterable[str], name: str) -> None:
        """ValueError for a place that is missing or that nothing fills."""
        places = {place: what for what in knows for place in PLACES[what]}
        found = self.names()
        if unknown := sorted({place for place in found if place not in places}):
            listed = ", ".join(sorted(places))
            raise ValueError(f"{name}: nothing fills {unknown[0]!r}; known here: {listed}")
        filled = {places[place] for place in found}
        for what in needs:
            if what not in filled:
                listed = " or ".join(PLACES[what])
                raise ValueError(f"{name}: no place for the {what} ({listed}); the right file?")

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """Chat messages; values: by the names on the left of PLACES."""
        what = {place: key for key, places in PLACES.items() for place in places}
        user = self._each(lambda place: values[what[place]])
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    def _each(self, value: Callable[[str], Any]) -> str:
        def put(match: re.Match) -> str:
            name = match[2] if self.style == "$$" else match[1]
            if name:
                return str(value(name))
            doubled = self.style == "format" and match[0] in ("{{", "}}")
            return match[0][0] if doubled else match[0]

        return _PLACE.sub(put, self.text)


def read_template(path: str | Path) -> Template:
    """A judge prompt as it is; of WritingBench's prompt.py the two texts, never run."""
    text = read_text(path)
    if not text.strip():
        raise RecordError(f"{path}: the file is empty")
    if Path(path).suffix != ".py":
        return Template(text, style="$$" if re.search(r"\$(INST|RESPONSE)\$", text) else "{}")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise RecordError(f"{path}: not Python ({error})") from None
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            strip = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)
            inner = value.func.value if strip else value  # type: ignore[attr-defined]
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                found[node.targets[0].id] = inner.value.strip() if strip else inner.value
    if "evaluate_prompt" not in found:
        raise RecordError(f"{path}: no text evaluate_prompt in it; the right prompt.py?")
    return Template(found["evaluate_prompt"], found.get("evaluate_system", ""), "format")


def read_names(path: str | Path) -> tuple[str, ...]:
    """One name a line."""
    lines = (re.sub(r"^[-*•]\s+", "", line.strip()) for line in read_text(path).split("\n"))
    names = tuple(line for line in lines if line)
    if not names:
        raise RecordError(f"{path}: the file is empty; write one name a line")
    return names


def read_weights(path: str | Path) -> dict[str, float]:
    """{lower-cased name: weight}"""
    try:
        weights = _loads(read_text(path))
        return {str(name).lower(): float(weight) for name, weight in weights.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError(f'{path}: not JSON such as {{"purple prose": 1}} ({error})') from None
