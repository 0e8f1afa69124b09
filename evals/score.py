"""Stories of one model, judged: S.TASK.jsonl holds every judgement, S.TASK.json the numbers.

A story counts when all its questions are answered; with repeats it is the mean of those answered
whole, and the test-retest spread is the root of the mean variance between them.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import stats
from evals.answers import Scores
from evals.files import Story, digest, read_prompts, read_stories, read_text
from evals.judging import Asker, Judgement, report
from evals.report import show
from evals.tasks import Request, Task
from reward import PUBLISHED, RewardConfig, length_penalty
from rundir import write, write_jsonl

LENGTH_FIELDS = ("length ratio", "length error", "in tolerance", "cut off")


def length_facts(story: Story, config: RewardConfig = PUBLISHED) -> dict[str, Any]:
    """What a story's length says, without a judge; None where nothing is known."""
    facts: dict[str, Any] = {"words": story.words, "target_words": story.target_words}
    target = story.target_words
    if target:
        miss = length_penalty(story.words, target, config)
        share = story.words / target
        facts |= {"length ratio": share, "length error": abs(share - 1)}
        facts["in tolerance"] = 0.0 if miss else 1.0
    if isinstance(story.finished, bool):
        facts["cut off"] = 0.0 if story.finished else 1.0
    return facts


def run_tolerance(run: Path) -> RewardConfig:
    """The tolerance band that a run was trained with, of its config.json."""
    config = json.loads(read_text(run / "config.json"))
    names = {f.name for f in dataclasses.fields(RewardConfig)}
    return RewardConfig(**{name: x for name, x in config.items() if name in names})


def item_of(story: Story, config: RewardConfig = PUBLISHED) -> dict[str, Any]:
    """A story in a result file: which it is, and its length."""
    bucket = stats.bucket_of({"bucket": story.bucket, "target_words": story.target_words})
    head = {"uid": story.uid, "sample": story.sample, "bucket": bucket}
    return head | length_facts(story, config)


def head_of(task: str, path: Path, stories: Sequence[Story]) -> dict[str, Any]:
    """What every result file begins with."""
    prompts = sorted({(story.uid, story.prompt) for story in stories})
    return {
        "task": task,
        "name": path.stem,
        "model": stories[0].model,
        "stories": len(stories),
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
        "stories_sha256": digest([(s.uid, s.sample, s.text) for s in stories]),
    }


def result_path(path: Path, task: str, suffix: str = ".json") -> Path:
    """S.jsonl, quality -> S.quality.json"""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{task}{suffix}")


def write_result(path: Path, result: dict[str, Any]) -> None:
    write(path, json.dumps(result, indent=1) + "\n")


def print_table(rows: Sequence[dict[str, Any]], names: Sequence[str], digits: int = 1) -> None:
    lines = [["requested", "stories", *names]]
    for row in rows:
        cells = [stats.shown(row[name], digits) for name in names]
        lines.append([row["bucket"], "" if row["bucket"] == "slope" else str(row["n"]), *cells])
    stats.print_columns(lines)


# ------------------------------------------------------------------------------------------ judged


def _mean(found: Sequence[Scores]) -> Scores:
    """Mean of each number over the repeats that have it."""
    names = {name: None for scores in found for name in scores}
    every = {name: [s[name] for s in found if name in s] for name in names}
    return {name: statistics.fmean(values) for name, values in every.items()}


def _retest(repeated: Sequence[Sequence[float]]) -> float | None:
    """Spread of one story's score when it is judged again; None without repeats."""
    variances = [statistics.variance(scores) for scores in repeated if len(scores) > 1]
    return statistics.fmean(variances) ** 0.5 if variances else None


def _story_numbers(
    task: Task, story: Story, answers: Sequence[Sequence[Judgement]], repeats: int
) -> list[Scores]:
    """A story's numbers from each repeat that was answered whole."""
    if not answers:
        return [task.numbers(task, story, [])]
    whole = []
    for repeat in range(repeats):
        found = [row[repeat].scores for row in answers]
        if all(scores is not None for scores in found):
            whole.append(task.numbers(task, story, [s for s in found if s is not None]))
    return whole


def score(
    path: Path,
    task: Task,
    asker: Asker,
    *,
    prompts: str = "",
    dry_run: bool = False,
) -> int:
    """Judge the stories of a file, print the tables, write both files -> exit status 0 or 3.

    RecordError for a file that cannot be judged, ChatStop for a judge that cannot be used.
    """
    stories = read_stories(path, read_prompts(prompts) if prompts else ())
    blank = [task.blank_is_0 and not story.words for story in stories]
    asked: list[list[Request]] = [
        [] if empty else task.requests(task, story)
        for story, empty in zip(stories, blank, strict=True)
    ]
    flat = [request for requests in asked for request in requests]
    if dry_run:
        print(f"{task.name}: {asker.estimate(flat)}")
        return 0

    rows = iter(asker.ask(flat, "judgement"))
    answers = [[next(rows) for _ in requests] for requests in asked]
    records, items, repeated = [], [], []
    for story, requests, found in zip(stories, asked, answers, strict=True):
        head = {"uid": story.uid, "sample": story.sample}
        for request, row in zip(requests, found, strict=True):
            name = {"criterion": request.name} if request.name else {}
            for repeat, judgement in enumerate(row):
                records.append({**head, **name, "repeat": repeat, **vars(judgement)})
        numbers = _story_numbers(task, story, found, asker.repeats)
        repeated.append([scores[task.scores[0]] for scores in numbers])
        items.append({**item_of(story), **_mean(numbers), "repeats_judged": len(numbers)})
    judgements = [judgement for rows in answers for row in rows for judgement in row]
    facts = asker.facts(judgements, task.sha256)
    judged = len([item for item in items if item["repeats_judged"]])
    names = [*task.scores, "length ratio"]
    rows_shown = stats.table(items, names)
    units = stats.Units(items)
    result = head_of(task.name, path, stories) | {
        "score": task.scores[0],
        "judged": judged,
        "blank": blank.count(True),
        "cut_off": len([story for story in stories if story.finished is False]),
        **facts,
        "retest_spread": _retest(repeated),
        "table": rows_shown,
        "dimensions": {name: units.cell(name) for name in _dimensions(items, task)},
        "items": items,
    }
    write_jsonl(result_path(path, task.name, ".jsonl"), records)
    write_result(result_path(path, task.name), result)

    print(f"{task.name}: {path.name}, judge {asker.options.model}")
    print_table(rows_shown, names, digits=2 if task.name == "writingbench" else 1)
    if result["retest_spread"] is not None:
        print(f"test-retest spread {show(result['retest_spread'], 2)} over {asker.repeats} repeats")
    if result["cut_off"]:
        print(f"{result['cut_off']} of {len(stories)} stories were cut off by their token limit")
    return report(facts, judged, len(stories), "stories")


def _dimensions(items: Sequence[dict], task: Task) -> list[str]:
    """The criteria among the fields of the items, in the order of the task."""
    every = [name for item in items for name in item]
    kept = {"uid", "sample", "bucket", "words", "target_words", "repeats_judged"}
    kept |= {*task.scores, *LENGTH_FIELDS}
    return list(dict.fromkeys(name for name in every if name not in kept))


# ------------------------------------------------------------------------------------------ length


def length(paths: Sequence[Path], config: RewardConfig = PUBLISHED) -> int:
    """The length table of each file, and S.length.json. No judge."""
    files = [(path, read_stories(path)) for path in paths]
    for path, stories in files:
        if not any(story.target_words for story in stories):
            raise ValueError(f"{path}: no story has a requested length; add target_words")
        items = [item_of(story, config) for story in stories]
        rows = stats.table(items, LENGTH_FIELDS)
        cut_off = len([story for story in stories if story.finished is False])
        head = head_of("length", path, stories)
        result = head | {"score": "length ratio", "cut_off": cut_off, "table": rows}
        write_result(result_path(path, "length"), {**result, "items": items})
        print(f"length: {path.name}")
        print_table(rows, LENGTH_FIELDS, digits=2)
    return 0
