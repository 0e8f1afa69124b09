"""Everything for a finished miniature, before and after training, on the stand-in judge.

Its validation prompts at 1x, 2x and 3x the trained lengths: the stories that the run wrote before
its first step, and new ones by the final model. All five tasks, lengths, ratings, the audit
with the untrained model as control, and the comparison. The stand-in is no critic: the numbers say
that the evaluation works, and that the miniature learnt what it was trained for.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from chat import ChatOptions
from evals import elo
from evals.compare import compare
from evals.judging import AnswerLog, Asker
from evals.memorise import memorise
from evals.score import length, result_path, run_tolerance, score
from evals.stories import Writer, stories
from evals.tasks import TASKS, Task
from judge import start_stand_in
from mini import world
from rollout import Sampling
from rundir import RecordError, read_jsonl, write_jsonl

CHECKLIST = [  # WritingBench's prompts bring their own; the miniature's get these
    {"name": name, "criteria_description": f"{about}.", "1-2": "not at all", "9-10": "throughout"}
    for name, about in (
        ("Premise", "The creature, the thing and the place of the prompt carry the story"),
        ("Order", "Events follow from one another"),
        ("Sentences", "The sentences are whole and correct"),
        ("Freshness", "Nothing is told twice"),
        ("Ending", "The story comes to an end"),
    )
]
HELD_OUT_SEED = 99  # of fables that no run trains on


@contextlib.contextmanager
def stand_in() -> Iterator[ChatOptions]:
    """The stand-in judge as long as it is needed."""
    process, url = start_stand_in()
    try:
        yield ChatOptions(url=url, model="offline")
    finally:
        if process.stdin:
            process.stdin.close()
        process.wait(10)


def prepare(run: Path, out: Path) -> None:
    """As files: prompts, stories of the run before its first step, trained and held-out ones."""
    needs = "label bucket uid prompt target_words story finished"
    found = read_jsonl(run / "eval_stories.jsonl", needs)[0]
    before = [record for record in found if record["label"] == found[0]["label"]]
    fields = ("uid", "prompt", "target_words", "bucket")
    prompts = [{name: record[name] for name in fields} for record in before]
    prompts = [{**prompt, "checklist": CHECKLIST} for prompt in prompts]
    written = [{name: record[name] for name in ("story", "finished")} for record in before]
    write_jsonl(out / "prompts.jsonl", prompts)
    write_jsonl(out / "before.jsonl", [p | w for p, w in zip(prompts, written, strict=True)])

    anchors = read_jsonl(run / "rollouts.jsonl", "anchor", lambda record: record["anchor"])[0]
    trained = {record["uid"]: record for record in anchors}
    fields = ("uid", "prompt", "story", "target_words")
    rows = [{name: record[name] for name in fields} for record in trained.values()]
    fresh = [dataclasses.asdict(example) for example in world.fables(100, HELD_OUT_SEED)]
    known = {row["story"] for row in rows}
    write_jsonl(out / "trained.jsonl", rows)
    write_jsonl(out / "heldout.jsonl", [row for row in fresh if row["story"] not in known])


def suite(run: Path) -> int:
    """Run everything into RUN/suite -> exit status; run again, it goes on where it stopped."""
    for name in ("start", "model", "eval_stories.jsonl", "rollouts.jsonl", "config.json"):
        if not (run / name).exists():
            raise RecordError(f"{run}: no {name} in it; give the folder of a finished miniature")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    if config.get("model") or config.get("data"):
        raise RecordError(f"{run}: no miniature; use the single commands (docs/evaluation.md)")
    out = run / "suite"
    out.mkdir(exist_ok=True)
    prepare(run, out)
    sampling = Sampling(
        config["temperature"], config["top_p"], config["top_k"], config["repetition_penalty"], 512
    )
    paths = [out / "before.jsonl", out / "after.jsonl"]
    writer = Writer(str(run / "model"), thinking=config["thinking"])
    prompts = str(out / "prompts.jsonl")
    stories(writer, prompts, str(paths[1]), sampling, config["seed"], rows=32)

    status = 0
    with stand_in() as judge:

        def asker(task: Task, log: Path) -> Asker:
            return Asker(judge, task.parameters, AnswerLog(log), 1, task.answer_tokens)

        for task in TASKS.values():
            for path in paths:
                log = result_path(path, "judge", ".jsonl")
                status = max(status, score(path, task, asker(task, log)))
        log = out / "elo.judge.jsonl"
        pairs = asker(elo.PAIRWISE, log)
        status = max(status, elo.elo(paths, elo.PAIRWISE, pairs, out / "elo.json"))
    length(paths, run_tolerance(run))
    files = {"data": str(out / "trained.jsonl"), "heldout": str(out / "heldout.jsonl")}
    audited = {"model": str(run / "model"), "control": str(run / "start")}
    memorise(audited, files, out / "memorise.json", rows=100, seed=3479)
    results = [result_path(path, name) for name in [*TASKS, "length"] for path in paths]
    print()
    compare([*map(str, results), str(out / "elo.json")], published=False, how="", strict=False)
    return status
