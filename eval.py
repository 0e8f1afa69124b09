"""Evaluation: stories from a model, their quality by requested length, the report of a run.

    python eval.py story RUN/model "Write about a lantern. The story should be 60 words long."
    python eval.py stories --model RUN/model --prompts test.jsonl --out stories.jsonl
    python eval.py score stories.jsonl --judge-url https://HOST/v1 --judge-model NAME
    python eval.py report RUN

Quality is in points (SQ x 100). A story that the judge failed on is counted, never scored 0.
One of no words is not sent: nothing is on the page, SQ = 0, as in training.

Exit status: 0 done; 2 settings or input; 3 the judge failed, or judged under 95% of the
stories; 4 interrupted, `stories` and `score` go on where they stopped.
"""

import argparse
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from chat import ChatOptions, ChatStop, add_options, options_from
from evals.length import BUCKETS, length_bucket, length_table
from evals.report import report, show
from judge import Judge
from rundir import RecordError, read_jsonl, write_jsonl

SAMPLING = {  # the defaults of rollout.Sampling, and room for thinking and 12,000 words
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "max_new_tokens": 32768,
}


def score(path: Path, client: Judge) -> list[dict]:
    """Judge the stories of a file and print the length table (evals/length.py).

    Writes and returns its records with "sq", "length_ratio" and "verdict" added. RecordError
    for a broken file. ChatStop when the judge cannot be used; its answers so far are cached.
    """
    records, partial = read_jsonl(path, "prompt target_words story words")
    if not records or partial:
        problem = "its last line is half-written" if partial else "it holds no story"
        raise RecordError(f"{path}: {problem}; complete it with `python eval.py stories`")
    if not all(record["target_words"] for record in records):
        raise RecordError(f"{path}: target_words is 0; write the length that was asked for")
    futures = [client.submit(r["prompt"], r["story"]) if r["words"] else None for r in records]
    for record, future in zip(tqdm(records, unit="story"), futures, strict=True):
        verdict = future.result() if future else None
        record["sq"] = verdict.score if verdict else 0.0
        record["length_ratio"] = record["words"] / record["target_words"]
        record["verdict"] = asdict(verdict) if verdict else None
    verdicts = path.with_suffix(".scores.jsonl")
    write_jsonl(verdicts, records)

    *buckets, everything = length_table(records)
    inside = [(record, length_bucket(record["target_words"])) for record in records]
    *columns, _ = length_table([r | {"bucket": BUCKETS[name][1]} for r, name in inside if name])
    print(f"{'requested':>9} {'stories':>8} {'judged':>7} {'SQ':>6} {'length ratio':>13}")
    for row in [*buckets, *columns, everything]:
        sizes = f"{row['bucket']:>9} {row['n']:>8} {row['judged']:>7}"
        print(f"{sizes} {show(row['sq'], 1, 100):>6} {show(row['length_ratio']):>13}")
    print(f"slope {show(everything['slope'], 1, 100)} points per bucket\nverdicts: {verdicts}")
    return records


def score_command(args: argparse.Namespace) -> int:
    options = options_from(vars(args), "judge")
    if not options.url or not options.model:
        raise ValueError("score needs --judge-url and --judge-model")
    path = Path(args.stories)
    with closing(options.open(Judge, cache=path.with_suffix(".judge.sqlite"))) as client:
        records = score(path, client)
    bill = client.stats()
    judged = len([record for record in records if record["sq"] is not None])
    print(f"judged {judged}/{len(records)}: {bill['calls']} calls, ${bill['dollars']:.2f}")
    return 0 if judged >= 0.95 * len(records) else 3


def write_command(args: argparse.Namespace) -> int:
    # Here, not on top: it loads PyTorch, for which the other commands need not wait.
    from evals.stories import Sampling, Writer, stories, story

    writer = Writer(args.model, args.thinking)
    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING})
    if args.command == "story":
        story(writer, args.prompt, sampling, args.seed, not args.hide_thinking)
    else:
        written = stories(writer, args.prompts, args.out, sampling, args.seed, args.rows)
        print(f"{len(written)} stories: {args.out}")
    return 0


def command_line() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    model = "folder or name of a Hugging Face causal language model"

    story = commands.add_parser("story", help="one story on the terminal, as it is generated")
    add = story.add_argument
    add("model", help=model)
    add("prompt", help="what to write, with a sentence like: The story should be 900 words long.")
    add("--hide-thinking", action="store_true", help="print the story only")

    stories = commands.add_parser("stories", help="one story per prompt; run again, it goes on")
    add = stories.add_argument
    add("--model", required=True, help=model)
    add("--prompts", required=True, help="JSONL as data.py writes it; stories may be missing")
    add("--out", required=True, help="JSONL of stories to write or complete")
    add("--rows", type=int, default=16, help="stories written at a time [16]")

    derived = "[as the run trained it, else as the chat template allows]"
    for command in (story, stories):
        add = command.add_argument
        add("--thinking", action=argparse.BooleanOptionalAction, help=derived)
        for name, default in {"seed": 3479, **SAMPLING}.items():
            flag = "--" + name.replace("_", "-")
            add(flag, type=type(default), default=default, help=f"[{default}]")

    scores = commands.add_parser("score", help="Story Quality and length by requested length")
    scores.add_argument("stories", help="JSONL that `stories` wrote")
    add_options(scores, "judge", ChatOptions(key_env="JUDGE_API_KEY"))

    page = commands.add_parser("report", help="one self-contained HTML page of a training run")
    page.add_argument("run", help="folder that polaris.py wrote")
    return parser


def main(argv: list[str]) -> int:
    args = command_line().parse_args(argv)
    try:
        if args.command == "report":
            print(report(args.run))
            return 0
        return score_command(args) if args.command == "score" else write_command(args)
    except (ValueError, OSError, FloatingPointError, ChatStop) as error:
        # what the caller can mend, in one line; all else shows its traceback
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, ChatStop) else 2
    except KeyboardInterrupt:
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
