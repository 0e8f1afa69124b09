"""Results side by side: the paper's rows, paired differences, and what must not be compared.

The published "all" is the mean of the columns weighted 3:2:1 (six equal buckets of 180 prompts);
`compare --published` shows that for every printed one. Published quality is most likely the *test
composite*, min(100, P - N + BONUS) with the judge's own totals; ours recomputes them.
"""

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

from evals import stats
from evals.files import read_text
from evals.report import show
from rundir import RecordError

Block = tuple[str, str]  # task and number
COLUMNS = ("ID", "near", "far", "all", "slope")
_PRINTED = """
quality/test composite
POLARIS-9B         57.4 48.2  44.1 52.1  -3.0
POLARIS-no-HRI-9B  56.5 47.0  37.7 49.7  -3.8
Qwen3.5-9B         35.1  8.7 -11.8 18.5 -10.8
Qwen3.5-27B        51.5 38.7  24.6 42.8  -5.9
Gemma-4-31B        53.9 49.7  47.1 - -
longform/uniform
POLARIS-9B         63.1 57.5 54.3 59.8 -
POLARIS-no-HRI-9B  62.1 55.7 51.6 58.2 -
Qwen3.5-9B         50.2 37.2 30.3 42.6 -
length/length ratio
POLARIS-9B         0.99 0.87 0.72 0.90 -
POLARIS-no-HRI-9B  0.94 0.86 0.70 0.87 -
Qwen3.5-9B         1.09 0.96 0.88 1.01 -
Qwen3.5-27B        - - 0.82 - -
Gemma-4-31B        - - 0.36 - -
writingbench/score
POLARIS-9B         - - - 7.9 -
POLARIS-no-HRI-9B  - - - 7.8 -
Qwen3.5-9B         - - - 6.8 -
longbench/S_Q or combined, not said
POLARIS-9B         - - - 81.2 -
POLARIS-no-HRI-9B  - - - 82.1 -
Qwen3.5-9B         - - - 67.1 -
creative/score
POLARIS-9B         - - - 70.3 -
POLARIS-no-HRI-9B  - - - 69.7 -
Qwen3.5-9B         - - - 59.2 -
elo/rating
GPT-5.4            - - - 1911 -
Claude-Opus-4.6    - - - 1783 -
POLARIS-9B         - - - 1661 -
Gemini-3.1-Pro     - - - 1627 -
Gemini-3-Flash     - - - 1620 -
Gemma-4-31B        - - - 1514 -
Qwen3.5-27B        - - - 1503 -
Qwen3.5-9B         - - - 1352 -"""


def _published() -> dict[Block, dict[str, tuple[float | None, ...]]]:
    """{(task, number): {model: values by COLUMNS}}; None: not printed."""
    found: dict[Block, dict[str, tuple[float | None, ...]]] = {}
    for line in _PRINTED.strip().splitlines():
        task, slash, number = line.partition("/")
        if slash:
            rows = found[task, number] = {}
        else:
            model, *cells = line.split()
            rows[model] = tuple(None if cell == "-" else float(cell) for cell in cells)
    return found


PUBLISHED = _published()
DIGITS = {"length": 2, "writingbench": 1, "elo": 0}
MUST_AGREE = {
    "judge": "judges",
    "judge_answered": "judges that answered",
    "parameters": "parameters",
    "judge_prompt_sha256": "judge prompts",
    "repeats": "numbers of repeats",
    "prompts_sha256": "prompts",
}


def weighted_all(columns: Sequence[float]) -> float:
    """The mean over six buckets of which three, two and one lie in the columns."""
    return (3 * columns[0] + 2 * columns[1] + columns[2]) / 6


def check_published() -> list[str]:
    """One line for each printed "all": what its columns give."""
    lines = []
    for (task, number), rows in PUBLISHED.items():
        digits = DIGITS.get(task, 1)
        for model, (*columns, printed, _) in rows.items():
            known = [x for x in columns if x is not None]
            if printed is None or len(known) < 3:
                continue
            found = weighted_all(known)
            off = abs(found - printed)
            agrees = off <= 0.5 * 10**-digits + 1e-9
            verdict = "agrees" if agrees else f"OFF by {off:.1f}"
            numbers = f"{show(found, digits + 1)}, printed {show(printed, digits)}"
            lines.append(f"3:2:1 of the columns, {task} {number}, {model}: {numbers}: {verdict}")
    return lines


# ------------------------------------------------------------------------------------------ results


def read_result(path: str) -> dict[str, Any]:
    try:
        result = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: no JSON ({error}); give what `eval.py score` wrote") from None
    if not isinstance(result, dict) or not {"task", "name"} <= set(result):
        raise RecordError(f"{path}: no result of eval.py (score, length, elo)")
    return result


def blocks_of(results: Sequence[dict]) -> dict[Block, dict[str, dict]]:
    """{(task, number): {model: its result}}; models are named by their file of stories."""
    blocks: dict[Block, dict[str, dict]] = {}
    for result in results:
        for number in _numbers(result):
            rows = blocks.setdefault((result["task"], number), {})
            if result["name"] in rows:
                raise RecordError(f"two results of {result['task']} for {result['name']!r}")
            rows[result["name"]] = result
    return blocks


def _numbers(result: dict) -> list[str]:
    if result["task"] == "elo":
        return ["rating"]
    hidden = {"bucket", "n"} | ({"length ratio"} if result["task"] != "length" else set())
    return [name for name in result["table"][0] if name not in hidden]


def mixed(rows: dict[str, dict]) -> list[str]:
    """What differs between the results of a column and must not."""
    found = []
    for name, what in MUST_AGREE.items():
        values = [rows[model].get(name) for model in rows]
        if name == "judge_answered":
            values = [sorted(value or []) for value in values]
        if any(value != values[0] for value in values):
            found.append(f"mixed {what}")
    stories = [rows[model].get("stories_sha256", model) for model in rows]
    if len(set(stories)) < len(stories):
        found.append("the same stories twice")
    return found


def mixed_stories(results: Sequence[dict]) -> list[str]:
    """Names whose quality and length are those of different stories."""
    files: dict[tuple[str, str], set[str]] = {}
    for result in results:
        if "stories_sha256" in result:
            place = (result["name"], result["prompts_sha256"])
            files.setdefault(place, set()).add(result["stories_sha256"])
    return [name for (name, _), found in files.items() if len(found) > 1]


def differences(first: dict, other: dict, number: str) -> stats.Cell:
    """Paired by prompt: mean of (other - first) over the prompts that both have a number for."""
    means = []
    for result in (first, other):
        values: dict[str, list[float]] = {}
        for item in result["items"]:
            if item.get(number) is not None:
                values.setdefault(item["uid"], []).append(item[number])
        means.append({uid: sum(xs) / len(xs) for uid, xs in values.items()})
    bucket = {item["uid"]: item.get("bucket") for item in first["items"]}
    shared = sorted(set(means[0]) & set(means[1]))
    items = [
        {"uid": uid, "bucket": bucket[uid], number: means[1][uid] - means[0][uid]} for uid in shared
    ]
    return stats.Units(items).cell(number)


# ------------------------------------------------------------------------------------------- output


def _lines(block: Block, rows: dict[str, dict], published: bool) -> list[list[str]]:
    """A header and a line for each model, ours first."""
    task, number = block
    digits = DIGITS.get(task, 1)
    if task == "elo":
        lines = [[f"{task}: {number}", "all"]]
        for result in rows.values():
            of_result = sorted(result["ratings"], key=lambda row: row["model"])
            lines += [[row["model"], stats.shown(row, digits)] for row in of_result]
        theirs = {m: [row[3]] for m, row in PUBLISHED[block].items()}
    else:
        tables = {model: {row["bucket"]: row for row in r["table"]} for model, r in rows.items()}
        buckets = list(dict.fromkeys(b for table in tables.values() for b in table))
        columns = [*(b for b in buckets if b not in COLUMNS), *COLUMNS]
        columns = [b for b in columns if b in buckets or (published and b in COLUMNS)]
        lines = [[f"{task}: {number}", "judged", *columns]]
        for model, table in tables.items():
            judged = rows[model].get("judged", rows[model]["stories"])
            cells = [stats.shown(table[b][number], digits) if b in table else "–" for b in columns]
            lines.append([model, f"{judged}/{rows[model]['stories']}", *cells])
        ends = {model: dict(zip(COLUMNS, row, strict=True)) for model, row in _theirs(block)}
        theirs = {m: [None, *(row.get(b) for b in columns)] for m, row in ends.items()}
    if published:
        for model, cells_of in theirs.items():
            lines.append([f"{model} (published)", *(show(x, digits) for x in cells_of)])
    return lines


def _theirs(block: Block) -> list[tuple[str, tuple]]:
    task, number = block
    if task == "longbench":  # which of the two was published is not known
        block = ("longbench", "S_Q or combined, not said") if number != "S_L" else block
    return [*PUBLISHED.get(block, {}).items()]


def _differences(block: Block, rows: dict[str, dict]) -> list[list[str]]:
    task, number = block
    if task == "elo" or len(rows) < 2:
        return []
    first, *others = rows
    lines = [[f"{task}: {number}, paired", "difference", "prompts"]]
    for other in others:
        cell = differences(rows[first], rows[other], number)
        shown = stats.shown(cell, DIGITS.get(task, 1) + 1)
        lines.append([f"{other} − {first}", shown, str(cell["n"])])
    return lines


def _write(lines: list[list[str]], how: str) -> None:
    if how == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    elif how == "markdown":
        rule = ["---"] * len(lines[0])
        for line in [lines[0], rule, *lines[1:]]:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
    else:
        stats.print_columns(lines)
    print()


def compare(paths: Sequence[str], *, published: bool, how: str, strict: bool) -> int:
    """Print a table for each number of the results; ValueError with `strict` for a mixed one."""
    if not paths and not published:
        raise ValueError("compare needs results of score, length or elo, or --published")
    results = [read_result(path) for path in paths]
    blocks = blocks_of(results)
    marks = {block: mixed(rows) for block, rows in blocks.items()}
    others = mixed_stories(results)
    notes = [f"{task}: {', '.join(found)}" for (task, _), found in marks.items() if found]
    notes += [f"{name}: its results are of different files of stories" for name in others]
    notes = list(dict.fromkeys(notes))
    if strict and notes:
        raise ValueError(f"--strict: {'; '.join(notes)}")
    empty: dict[Block, dict] = {} if paths else {block: {} for block in PUBLISHED}
    for block, rows in {**blocks, **empty}.items():
        lines = _lines(block, rows, published)
        if marks.get(block):
            lines[0][0] += " (!)"
        _write(lines, how)
        if paired := _differences(block, rows):
            _write(paired, how)
    for note in notes:
        print(f"(!) not comparable, {note}")
    for line in check_published() if published else []:
        print(line)
    return 0
