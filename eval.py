"""Evaluation: stories for a list of prompts, Story Quality by requested length, and the report of a training run.

    python eval.py stories --model RUN/model --prompts test.jsonl --out stories.jsonl
    python eval.py score stories.jsonl --judge-url https://HOST/v1 --judge-model NAME --judge-key-env JUDGE_API_KEY
    python eval.py report RUN

The length table (arXiv 2606.04095) asks how quality holds as the requested length T grows from 1,000 to 12,000 words:

    length ratio = mean of words / T        length error = mean of |words / T - 1|        over the stories of a bucket
    slope = sum_b (b - mean b) (SQ_b - mean SQ) / sum_b (b - mean b)^2

SQ_b is the mean Story Quality of bucket b. The slope is the least-squares line through these means over the bucket's
index b = 0..5, so every bucket counts alike; an empty one leaves a gap. "all" is the mean over stories.
Open in the paper, and inferred here from its numbers: with weights 3, 2, 1 its columns 1-4k, 4-8k, 8-12k give "all" in
quality (52.1, 18.5, 42.8; only the run without anchors is 0.5 off) and in length ratio (0.90, 0.87, 1.01). So the
columns hold three, two and one equally filled buckets, and the ratio is a mean of ratios. The slopes fit the index and
are too steep for words. The edges inside a column are our choice. A bucket includes its lower edge, the last both.
Tables show Story Quality in points (SQ x 100), as the paper does; files hold SQ.

A story that the judge failed on leaves the quality means and is counted; it is never scored 0. A story of no words is
not sent to the judge: nothing is on the page, SQ = 0, as in training.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import judge
import rollout
from chat import ChatStop, api_key
from evals.length import BUCKETS, length_bucket, length_table
from evals.report import report, show
from reward import word_count
from rollout import Sampling
from rundir import RecordError, read_jsonl, write_jsonl

# ------------------------------------------------------------------------------------------------------------ stories


def stories(
    model: str, prompts: str, out: str, sampling, thinking: bool, seed: int, rows: int
) -> list[dict]:
    """One story per prompt, appended to `out` as each ends; run again, it writes only the missing ones.

    Each story has its own random numbers, from (seed, uid), whatever is written beside it. At the end the file is in
    the order of the prompts. bf16 on a GPU, fp32 on the CPU. Raises RecordError if `out` holds other stories than these.
    """
    path, examples = Path(out), data.load(prompts, anchors=False)
    asked = {example.uid: example.prompt for example in examples}
    settings = {"model": model, "thinking": thinking, "seed": seed, **asdict(sampling)}
    found = read_jsonl(path, "uid prompt settings")[0] if path.exists() else []
    done = {record["uid"]: record for record in found}
    for uid, record in done.items():
        if record["prompt"] != asked.get(uid) or record["settings"] != settings:
            raise RecordError(
                f"{out}: story {uid!r} comes from another prompt file, model, seed or sampling; "
                "give another --out, or the same arguments to go on"
            )
    write_jsonl(path, [*done.values()])  # without a half-written last line
    missing = [example for example in examples if example.uid not in done]
    if missing:
        device, dtype = (
            ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        print(rollout.kernels(lm))
        bar = tqdm(
            total=len(asked), initial=len(done), unit="story", miniters=0
        )  # 0: redrawn by time, see tick
        with open(path, "a", encoding="utf-8") as file, bar:
            tokens = 0

            def tick(rolled: rollout.Rollout, new: list[int]) -> None:
                nonlocal tokens
                tokens += len(new)
                bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                bar.update(0)

            def keep(rolled: rollout.Rollout) -> None:
                example = missing[rolled.row]
                response = tokenizer.decode(rolled.ids[:-1] if rolled.finished else rolled.ids)
                reasoning, story = data.split_response(response, thinking)
                record = {
                    "uid": example.uid,
                    "prompt": example.prompt,
                    "target_words": example.target_words,
                }
                record |= {"thinking": reasoning, "story": story, "words": word_count(story)}
                record |= {
                    "tokens": len(rolled.ids),
                    "finished": rolled.finished,
                    "settings": settings,
                }
                done[example.uid] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()

            ids = [data.encode_prompt(tokenizer, example.prompt, thinking) for example in missing]
            seeds = [rollout.row_seed(seed, 0, example.uid, 0) for example in missing]
            eos = tokenizer.eos_token_id
            rollout.generate(
                lm, ids, seeds, sampling, eos, max_rows=rows, on_finish=keep, on_tokens=tick
            )
    records = [done[example.uid] for example in examples]
    write_jsonl(path, records)
    return records


def score(path: str | Path, client: judge.Judge) -> list[dict]:
    """Judge the stories of a file; writes and returns its records with "sq", "length_ratio" and "verdict" added.

    Prints the paper's six buckets, its three columns and the slope. Raises ChatStop when the judge cannot be
    used; what it has answered by then is in the client's cache, so a second run pays for nothing twice.
    """
    path = Path(path)
    records, partial = read_jsonl(path, "prompt target_words story words")
    if not records or partial:
        problem = "its last line is half-written" if partial else "it holds no story"
        raise RecordError(f"{path}: {problem}; complete it with `python eval.py stories`")
    futures = [client.submit(r["prompt"], r["story"]) if r["words"] else None for r in records]
    for record, future in zip(tqdm(records, unit="story"), futures, strict=True):
        verdict = future.result() if future else None
        record["sq"] = verdict.score if verdict else 0.0
        record["length_ratio"] = record["words"] / record["target_words"]
        record["verdict"] = asdict(verdict) if verdict else None
    write_jsonl(path.with_suffix(".scores.jsonl"), records)

    *buckets, everything = length_table(records)
    inside = [(record, length_bucket(record["target_words"])) for record in records]
    *columns, _ = length_table(
        [record | {"bucket": BUCKETS[name][1]} for record, name in inside if name]
    )
    print(f"{'requested':>9} {'stories':>8} {'judged':>7} {'SQ':>6} {'length ratio':>13}")
    for row in [*buckets, *columns, everything]:
        sizes = f"{row['bucket']:>9} {row['n']:>8} {row['judged']:>7}"
        print(f"{sizes} {show(row['sq'], 1, 100):>6} {show(row['length_ratio']):>13}")
    print(
        f"slope {show(everything['slope'], 1, 100)} points per bucket\nverdicts: {path.with_suffix('.scores.jsonl')}"
    )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "stories", help="write one story per prompt; run again, it goes on"
    )
    command.add_argument(
        "--model", required=True, help="folder or name of a Hugging Face causal language model"
    )
    command.add_argument(
        "--prompts", required=True, help="JSONL as data.py writes it; stories are not needed in it"
    )
    command.add_argument("--out", required=True, help="JSONL of stories to write or complete")
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as in training [on]",
    )
    command.add_argument("--seed", type=int, default=3479, help="[3479]")
    command.add_argument("--rows", type=int, default=16, help="stories written at a time [16]")
    command.add_argument(
        "--max-new-tokens", type=int, default=32768, help="thinking included [32768]"
    )
    command = commands.add_parser(
        "score", help="Story Quality and length ratio by requested length"
    )
    command.add_argument("stories", help="JSONL that `stories` wrote")
    command.add_argument(
        "--judge-url", required=True, help="OpenAI-style base URL, e.g. http://localhost:8000/v1"
    )
    command.add_argument("--judge-model", required=True, help="name of the judge model")
    command.add_argument(
        "--judge-key-env", default="JUDGE_API_KEY", help="variable with its key [%(default)s]"
    )
    command = commands.add_parser("report", help="one self-contained HTML page of a training run")
    command.add_argument("run", help="folder that polaris.py wrote")
    args = parser.parse_args()
    if args.command == "stories":
        sampling = Sampling(max_new_tokens=args.max_new_tokens)
        written = stories(
            args.model, args.prompts, args.out, sampling, args.thinking, args.seed, args.rows
        )
        print(f"{len(written)} stories: {args.out}")
    elif args.command == "score":
        if not Path(args.stories).is_file():
            raise RecordError(
                f"{args.stories}: there is no such file; write it with `python eval.py stories`"
            )
        key, cache = (
            api_key(args.judge_key_env, args.judge_url),
            Path(args.stories).with_suffix(".judge.sqlite"),
        )
        client = judge.Judge(args.judge_url, args.judge_model, key, cache=cache)
        try:
            score(args.stories, client)
        finally:
            client.close()
    else:
        print(report(args.run))


if __name__ == "__main__":
    try:
        main()
    except (
        ValueError,
        OSError,
        ChatStop,
    ) as error:  # what the caller can mend; all else shows its traceback
        sys.exit(f"eval.py: {error}")
