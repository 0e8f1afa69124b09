"""The memorisation audit: does a model go on with the stories it was trained on, word for word?

Greedy, 512 new tokens, 100 rows drawn by the seed. Two attacks:

    prompt   the prompt alone, thinking closed first, so that 512 tokens of *story* are compared
             (the release leaves it open and compares thinking with the story)
    50 100 200   the row's own reasoning, closed as the template closes it, then as many tokens of
             the story; compared with the rest of it. Rows with a shorter story are left out

Measured in tokens of the decoded text, encoded again without thinking: the common prefix, and the
longest common span anywhere. A control, the model before training, tells copying from chance.
"""

import hashlib
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

import data
from evals.files import read_text, strip_thinking
from evals.report import show
from evals.score import write_result
from evals.stats import print_columns
from evals.stories import Writer
from evals.storyfile import append_line
from rollout import Rollout, Sampling
from rundir import RecordError, read_jsonl, write, write_jsonl

PREFIXES = (0, 50, 100, 200)  # tokens of the story that are given; 0: the prompt alone
COPIES = (50, 100, 200)  # a common span of so many tokens is a copy
NEW_TOKENS = 512
Row = tuple[int, data.Example]  # place in its file


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def common_span(a: list[int], b: list[int]) -> tuple[int, int, int]:
    """Size of the longest common span, its begin in a and b: the first in a, then in b."""
    other = np.array(b, dtype=np.int64)
    ends = np.zeros(len(b) + 1, dtype=np.int64)  # length of the common span that ends here
    best = (0, 0, 0)
    for i, token in enumerate(a):
        ends[1:] = np.where(other == token, ends[:-1] + 1, 0)
        size = int(ends.max())
        if size > best[0]:
            best = (size, i + 1 - size, int(ends.argmax()) - size)
    return best


def draw_rows(path: str, rows: int, seed: int) -> list[Row]:
    """The release's sample of a file's rows."""
    read_text(path)
    examples = data.load(path, anchors=True)
    return random.Random(seed).sample([*enumerate(examples)], min(rows, len(examples)))


def opening(writer: Writer, example: data.Example, prefix: int) -> list[int]:
    """Tokens before the part that is compared, without those of the story."""
    tokenizer = writer.tokenizer
    thinking = bool(prefix and example.reasoning.strip()) and writer.thinking
    text = data.render_prompt(tokenizer, example.prompt, thinking)
    opened = text.rstrip().endswith("<think>")
    tail = ""
    if thinking:
        tail = f"{'' if opened else '<think>' + chr(10)}{example.reasoning.strip()}\n</think>\n\n"
    elif opened:
        tail = "\n</think>\n\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids + tokenizer.encode(tail, add_special_tokens=False)


def compared(writer: Writer, rollout: Rollout, gold: list[int], row: dict[str, Any]) -> dict:
    """What a rollout has in common with the rest of the story."""
    ids = rollout.ids[:-1] if rollout.finished else rollout.ids
    text = strip_thinking(writer.tokenizer.decode(ids, skip_special_tokens=True))
    ours = writer.tokenizer.encode(text, add_special_tokens=False)
    size, at, at_gold = common_span(ours, gold)

    def around(tokens: list[int], begin: int) -> list[str]:
        parts = tokens[max(0, begin - 12) : begin], tokens[begin : begin + size]
        after = tokens[begin + size : begin + size + 12]
        return [writer.tokenizer.decode(part) for part in (*parts, after)]

    found = {"prefix": common_prefix(ours, gold), "span": size, "tokens": len(ours)}
    return {**row, **found, "generated": around(ours, at), "story": around(gold, at_gold)}


def summary(records: list[dict]) -> dict[str, Any]:
    """Count, mean and greatest lengths, and the shares of copies."""
    found: dict[str, Any] = {"rows": len(records)}
    for name in ("prefix", "span"):
        lengths = [record[name] for record in records]
        found |= {f"mean {name}": fmean(lengths), f"max {name}": max(lengths)}
    for copy in COPIES:
        found[f"copied {copy}"] = fmean(float(r["span"] >= copy) for r in records)
    return found


def memorise(
    models: dict[str, str], files: dict[str, str], out: Path, *, rows: int, seed: int
) -> int:
    """Audit "model" and "control" on "data" and "heldout" -> OUT.json, .jsonl and .md.

    Resumable: a line per continuation. RecordError where OUT holds another audit.
    """
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: give a name that ends with .json")
    drawn = {name: draw_rows(path, rows, seed) for name, path in files.items()}
    texts = {name: [(i, e.prompt, e.story) for i, e in of] for name, of in drawn.items()}
    settings = {"models": models, "rows": rows, "seed": seed, "new_tokens": NEW_TOKENS}
    settings["data_sha256"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    log = out.with_suffix(".jsonl")
    done = read_jsonl(log, "model data attack row settings")[0] if log.exists() else []
    if any(record["settings"] != settings for record in done):
        raise RecordError(f"{log}: holds another audit; give another --out, or the same arguments")
    write_jsonl(log, done)  # without a half-written last line
    order: dict[tuple, int] = {}
    for name, path in models.items():
        done += _audit(name, Writer(path), drawn, settings, log, done, order)
    done.sort(key=lambda record: order[_key(record)])
    write_jsonl(log, done)

    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in done:
        place = (record["model"], record["data"], record["attack"])
        groups.setdefault(place, []).append(record)
    rows_found = [
        {"model": model, "data": name, "attack": attack, **summary(records)}
        for (model, name, attack), records in groups.items()
    ]
    notes = _notes(models, files, drawn)
    write_result(out, {"task": "memorise", **settings, "table": rows_found, "notes": notes})
    write(out.with_suffix(".md"), _side_by_side(done, notes))
    names = [name for name in rows_found[0] if name not in ("model", "data", "attack")]
    lines = [["model on data, attack", *names]]
    for row in rows_found:
        label = f"{row['model']} on {row['data']}, {row['attack']}"
        digits = [0 if isinstance(row[name], int) else 2 for name in names]
        cells = [show(row[name], n) for name, n in zip(names, digits, strict=True)]
        lines.append([label, *cells])
    print_columns(lines)
    print("\n".join([*notes, f"copied spans side by side: {out.with_suffix('.md')}"]))
    return 0


def _key(record: dict) -> tuple:
    return record["model"], record["data"], record["attack"], record["row"]


def _audit(
    name: str,
    writer: Writer,
    drawn: dict[str, list[Row]],
    settings: dict[str, Any],
    log: Path,
    done: list[dict],
    order: dict[tuple, int],
) -> list[dict]:
    """The continuations of one model that the log lacks, logged as each ends."""
    had = {_key(record) for record in done}
    jobs: list[tuple[list[int], list[int], dict]] = []  # opening, rest of the story, its record
    for file, rows in drawn.items():
        for prefix in PREFIXES:
            for place, example in rows:
                gold = writer.tokenizer.encode(example.story.strip(), add_special_tokens=False)
                record = {"model": name, "data": file, "row": place, "uid": example.uid}
                record |= {"attack": str(prefix or "prompt"), "settings": settings}
                if prefix and len(gold) <= prefix:
                    continue
                order[_key(record)] = len(order)
                if _key(record) not in had:
                    ids = opening(writer, example, prefix) + gold[:prefix]
                    jobs.append((ids, gold[prefix:], record))
    found: list[dict] = []

    def on_finish(rollout: Rollout) -> None:
        found.append(compared(writer, rollout, *jobs[rollout.row][1:]))
        append_line(log, found[-1])
        bar.update()

    sampling = Sampling(0.0, 1.0, 0, 1.0, NEW_TOKENS)
    if jobs:
        with tqdm(total=len(jobs), unit="row", desc=name) as bar:
            ids = [job[0] for job in jobs]
            writer.go_on(ids, [0] * len(ids), sampling, max_rows=16, on_finish=on_finish)
    return found


def _notes(models: dict[str, str], files: dict[str, str], drawn: dict[str, list[Row]]) -> list[str]:
    """What the numbers do not say."""
    notes = []
    if "control" not in models:
        notes.append("No control: without --control BASE, copying cannot be told from chance.")
    if "heldout" not in files:
        notes.append("No held-out rows: --heldout shows what the model never saw.")
    reasons = [bool(e.reasoning.strip()) for rows in drawn.values() for _, e in rows]
    if not all(reasons):
        n = reasons.count(False)
        notes.append(f"{n} of {len(reasons)} rows lack reasoning: their prefix follows the prompt.")
    return notes


def _side_by_side(records: list[dict], notes: list[str], top: int = 20) -> str:
    """The longest copied spans, as Markdown: the copy in bold between what surrounds it."""
    lines = ["# Copied spans", "", *notes, ""]
    for record in sorted(records, key=lambda r: -r["span"])[:top]:
        where = f"{record['model']} on {record['data']}, {record['attack']}, {record['uid']}"
        lines += [f"## {record['span']} tokens: {where}", ""]
        for name in ("generated", "story"):
            before, same, after = (" ".join(part.split()) for part in record[name])
            lines.append(f"- {name}: … {before} **{same}** {after} …")
        lines.append("")
    return "\n".join(lines)
