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
import html
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

import judge

BUCKETS = {  # name: least requested words, and the paper's column
    "1k-2k": (1000, "1-4k"),
    "2k-3k": (2000, "1-4k"),
    "3k-4k": (3000, "1-4k"),
    "4k-6k": (4000, "4-8k"),
    "6k-8k": (6000, "4-8k"),
    "8k-12k": (8000, "8-12k"),
}


class EvalError(ValueError):
    """A file or folder that cannot be used: says which, why, and what to do."""


def read_jsonl(path: Path, needs: str = "", keep: Callable[[dict], bool] = lambda record: True):
    """(records that `keep` wants, whether the last line was half-written and left out, as a killed run leaves it).

    needs: the fields that each record must have, with spaces between. Raises EvalError for any other broken line.
    """
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:  # no JSON or no UTF-8
                if not line.endswith(b"\n"):
                    return records, True
                raise EvalError(f"{path}:{number}: not a line of JSON ({error}); repair or remove it") from None
            if missing := set(needs.split()) - set(record):
                raise EvalError(f"{path}:{number}: no {', '.join(sorted(missing))} in it; is this the right file?")
            if keep(record):
                records.append(record)
    return records, False


def write(path: Path, content: str) -> None:
    """All of it or nothing: nobody ever reads half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: Path, records: list[dict]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


# ------------------------------------------------------------------------------------------------------------ stories


def stories(model: str, prompts: str, out: str, sampling, thinking: bool, seed: int, rows: int) -> list[dict]:
    """One story per prompt, appended to `out` as each ends; run again, it writes only the missing ones.

    Each story has its own random numbers, from (seed, uid), whatever is written beside it. At the end the file is in
    the order of the prompts. bf16 on a GPU, fp32 on the CPU. Raises EvalError if `out` holds other stories than these.
    """
    import torch  # here, not on top: scoring and reports need no PyTorch and start at once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import data
    import rollout

    path, examples = Path(out), data.load(prompts, anchors=False)
    asked = {example.uid: example.prompt for example in examples}
    settings = {"model": model, "thinking": thinking, "seed": seed, **asdict(sampling)}
    found = read_jsonl(path, "uid prompt settings")[0] if path.exists() else []
    done = {record["uid"]: record for record in found}
    for uid, record in done.items():
        if record["prompt"] != asked.get(uid) or record["settings"] != settings:
            raise EvalError(
                f"{out}: story {uid!r} comes from another prompt file, model, seed or sampling; "
                "give another --out, or the same arguments to go on"
            )
    write_jsonl(path, [*done.values()])  # without a half-written last line
    missing = [example for example in examples if example.uid not in done]
    if missing:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        print(rollout.kernels(lm))
        bar = tqdm(total=len(asked), initial=len(done), unit="story", miniters=0)  # 0: redrawn by time, see tick
        with open(path, "a", encoding="utf-8") as file, bar:
            tokens = 0

            def tick(new: int) -> None:
                nonlocal tokens
                tokens += new
                bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                bar.update(0)

            def keep(rolled: rollout.Rollout) -> None:
                example = missing[rolled.row]
                response = tokenizer.decode(rolled.ids[:-1] if rolled.finished else rolled.ids)
                reasoning, story = data.split_response(response, thinking)
                record = {"uid": example.uid, "prompt": example.prompt, "target_words": example.target_words}
                record |= {"thinking": reasoning, "story": story, "words": judge.word_count(story)}
                record |= {"tokens": len(rolled.ids), "finished": rolled.finished, "settings": settings}
                done[example.uid] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()

            ids = [data.encode_prompt(tokenizer, example.prompt, thinking) for example in missing]
            seeds = [rollout.row_seed(seed, 0, example.uid, 0) for example in missing]
            eos = tokenizer.eos_token_id
            rollout.generate(lm, ids, seeds, sampling, eos, max_rows=rows, on_finish=keep, progress=tick)
    records = [done[example.uid] for example in examples]
    write_jsonl(path, records)
    return records


# ------------------------------------------------------------------------------------------------------------ scoring


def length_bucket(target_words: int) -> str | None:
    """The paper's bucket of a requested length; None outside 1,000 to 12,000 words."""
    inside = [name for name, (least, _) in BUCKETS.items() if least <= target_words <= 12000]
    return inside[-1] if inside else None


def mean(values) -> float | None:
    """Mean of the finite numbers among `values`; None if there is none."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(known) if known else None


def slope(buckets: list[dict]) -> float | None:
    """Least-squares slope of "sq" over the bucket index; None with fewer than two buckets that have one."""
    names = [row["bucket"] for row in buckets]
    places = list(BUCKETS) if set(names) <= set(BUCKETS) else names  # an empty one of the paper's six leaves its gap
    points = [(places.index(row["bucket"]), row["sq"]) for row in buckets if row["sq"] is not None]
    if len(points) < 2:
        return None
    x_mean, y_mean = (fmean(axis) for axis in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)


def length_table(records: list[dict]) -> list[dict]:
    """One row per length bucket, shortest first, then a row "all" that also holds the "slope".

    records: {"words", "target_words", "sq" (None: no verdict)} and, where known, "reward" (a number) and "finished".
        "bucket" names the record's own bucket; else the paper's six apply, and a length outside them is in "all" only.
    rows: {"bucket", "n", "judged", "reward", "sq", "length_error", "length_ratio", "finished"}, None where unknown.
    """
    buckets = {}
    for record in sorted(records, key=lambda record: record["target_words"]):
        if name := record.get("bucket") or length_bucket(record["target_words"]):
            buckets.setdefault(name, []).append(record)
    table = []
    for name, group in [*buckets.items(), ("all", records)]:
        ratios = [record["words"] / record["target_words"] for record in group]
        row = {"bucket": name, "n": len(group), "judged": sum(record["sq"] is not None for record in group)}
        row |= {key: mean(record.get(key) for record in group) for key in ("reward", "sq", "finished")}
        row |= {"length_error": mean(abs(ratio - 1) for ratio in ratios), "length_ratio": mean(ratios)}
        table.append(row)
    table[-1]["slope"] = slope(table[:-1])
    return table


def score(path: str | Path, client: judge.Judge) -> list[dict]:
    """Judge the stories of a file; writes and returns its records with "sq", "length_ratio" and "verdict" added.

    Prints the paper's six buckets, its three columns and the slope. Raises judge.JudgeStop when the judge cannot be
    used; what it has answered by then is in the client's cache, so a second run pays for nothing twice.
    """
    path = Path(path)
    records, partial = read_jsonl(path, "prompt target_words story words")
    if not records or partial:
        problem = "its last line is half-written" if partial else "it holds no story"
        raise EvalError(f"{path}: {problem}; complete it with `python eval.py stories`")
    futures = [client.submit(r["prompt"], r["story"]) if r["words"] else None for r in records]
    for record, future in zip(tqdm(records, unit="story"), futures, strict=True):
        verdict = future.result() if future else None
        record["sq"] = verdict.score if verdict else 0.0
        record["length_ratio"] = record["words"] / record["target_words"]
        record["verdict"] = asdict(verdict) if verdict else None
    write_jsonl(path.with_suffix(".scores.jsonl"), records)

    *buckets, everything = length_table(records)
    inside = [(record, length_bucket(record["target_words"])) for record in records]
    *columns, _ = length_table([record | {"bucket": BUCKETS[name][1]} for record, name in inside if name])
    print(f"{'requested':>9} {'stories':>8} {'judged':>7} {'SQ':>6} {'length ratio':>13}")
    for row in [*buckets, *columns, everything]:
        sizes = f"{row['bucket']:>9} {row['n']:>8} {row['judged']:>7}"
        print(f"{sizes} {show(row['sq'], 1, 100):>6} {show(row['length_ratio']):>13}")
    print(f"slope {show(everything['slope'], 1, 100)} points per bucket\nverdicts: {path.with_suffix('.scores.jsonl')}")
    return records


# --------------------------------------------------------------------------------------------- report: text and charts

# Shown as ⟨code⟩: control characters, lone surrogates (UTF-8 has no form for them), noncharacters, and bidirectional
# overrides and isolates, which could turn the text around them. Plain left-to-right and right-to-left marks pass.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]")


def text(value) -> str:
    """Any value as HTML text or quoted attribute, whatever a policy or a judge wrote into it."""
    visible = UNSAFE.sub(lambda found: f"⟨{ord(found[0]):04X}⟩", str(value).replace("\r\n", "\n"))
    return html.escape(visible, quote=True)


def show(value, digits: int = 2, scale: float = 1.0) -> str:
    """A number for people; an en dash where there is none."""
    return "–" if mean([value]) is None else f"{value * scale:,.{digits}f}".replace("-", "−")


def change(first, last, digits: int = 2, scale: float = 1.0) -> str:
    return f"<em>{show(first, digits, scale)} →</em> {show(last, digits, scale)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """HTML table of ready-made cells; the first one names the row."""
    body = "".join(f"<tr><th>{name}<td>{'<td>'.join(cells)}" for name, *cells in rows)
    return f"<div class=wide><table><tr><th>{'<th>'.join(head)}{body}</table></div>"


def ticks(low: float, high: float) -> list[float]:
    """About four equal round steps that cover [low, high]."""
    if high - low < 1e-9 * max(1, abs(high)):
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = power * min(m for m in (1, 2, 2.5, 5, 10) if m * power >= 0.249 * (high - low))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def smooth(values: list) -> list:
    """Centred running mean over a sixth of the run; None where a window holds no number."""
    half = len(values) // 12
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def chart(title: str, unit: str, rows: list[dict], lines: dict[str, str], scale: float = 1.0) -> str:
    """Figure over the rows' "step": per line {label: key} raw points and a smoothed curve; None and NaN leave gaps."""
    steps = [row["step"] for row in rows]
    lines = {label: [mean([row[key]]) for row in rows] for label, key in lines.items()}
    lines = {label: [v if v is None else v * scale for v in values] for label, values in lines.items() if any(values)}
    known = [value for values in lines.values() for value in values if value is not None]
    levels = ticks(min(known, default=0), max(known, default=0))
    left, right, top, bottom = 44, 350, 22, 174  # the plot, in px of its natural size, 360 x 208
    slot = (right - left) / (steps[-1] - steps[0] + 1)  # px per step

    def x(step):
        return round(left + (step - steps[0] + 0.5) * slot, 1)

    def y(value):
        return round(bottom - (value - levels[0]) / (levels[-1] - levels[0]) * (bottom - top), 1)

    svg = [f"<text x=2 y=10>{text(unit)}</text><text x={right} y=206 class=end>training step</text>"]
    for level in levels:
        name = f"{level:.6g}".replace("-", "−")
        svg.append(f"<path d='M{left} {y(level)}H{right}' class=rule />")
        svg.append(f"<text x=38 y={y(level) + 4} class=end>{name}</text>")
    for step in {steps[0], *(round(tick) for tick in ticks(steps[0], steps[-1]))}:
        if step == steps[0] or step <= steps[-1] and x(step) > x(steps[0]) + 24:
            svg.append(f"<text x={x(step)} y={bottom + 16} class=mid>{step}</text>")
    for color, values in enumerate(lines.values()):
        pen, path = "M", ""
        for step, value, level in zip(steps, values, smooth(values), strict=True):
            if value is not None:
                svg.append(f"<circle cx={x(step)} cy={y(value)} r=1.8 class=c{color} />")
            path += f"{pen}{x(step)} {y(level)}" if level is not None else ""
            pen = "L" if level is not None else "M"
        svg.append(f"<path d='{path}' class='curve c{color}' />")
    for i, step in enumerate(steps):  # an unseen column per step has its numbers as hover title
        numbers = "".join(f"\n{label}: {show(values[i], 3)}" for label, values in lines.items())
        box = f"x={x(step) - slot / 2:.1f} y={top} width={slot:.1f} height={bottom - top}"
        svg.append(f"<rect {box} class=hover><title>step {step}{text(numbers)}</title></rect>")
    legend = "".join(f"<span><i class=c{i}></i>{text(label)}</span>" for i, label in enumerate(lines))
    return (
        f"<figure><figcaption><b>{text(title)}</b>{legend or '<span>not recorded, or always 0</span>'}</figcaption>"
        f"<svg viewBox='0 0 360 208' role=img aria-label='{text(title)} by training step'>{''.join(svg)}</svg></figure>"
    )


# --------------------------------------------------------------------------------------------- report: parts and page


def curves(metrics: list[dict]) -> str:
    """The charts of training, from the lines of metrics.jsonl."""
    penalties = {"repetition": "rep", "length": "len", "blank": "blank", "thinking": "think", "overlong": "overlong"}
    anchor = {"weight": "anchor_weight", "advantage": "anchor_advantage"}
    charts = [
        chart("Reward", "reward", metrics, {"rollouts": "reward_mean", "anchors": "anchor_reward"}),
        chart("Story Quality", "points", metrics, {"rollouts": "sq"}, 100),
        chart("Length error", "% of the requested words", metrics, {"rollouts": "length_error"}, 100),
        chart("Anchor", "weight, and advantage times weight", metrics, anchor),
        chart("Penalties", "before their weights", metrics, penalties),
        chart("Finished stories", "% that end by themselves", metrics, {"rollouts": "finished"}, 100),
        chart("Story length", "words", metrics, {"rollouts": "words"}),
        chart("Entropy", "nats per token", metrics, {"all rows": "entropy"}),
        chart("Gradient norm", "before clipping", metrics, {"all rows": "grad_norm"}),
    ]
    return (
        "<p class=lead>Points are steps, curves running means over a sixth of the run. Hover for the numbers.</p>"
        f"<div class=charts>{''.join(charts)}</div>"
    )


def costs(metrics: list[dict]) -> str:
    """Where the seconds of each step went, and what the judge cost, from the lines of metrics.jsonl."""
    seconds = {part: [line["time"][part] for line in metrics] for part in metrics[0]["time"]}
    total, spent = sum(seconds["step"]) or 1, metrics[-1]["judge"]
    split = [
        ["whole step" if part == "step" else text(part).replace("_", " ")]
        + [show(sum(values), 0), show(fmean(values)), show(sum(values) / total, 0, 100)]
        for part, values in seconds.items()
    ]
    bill = []
    for name, value in spent.items():
        each = value / len(metrics)
        bill.append([text(name).replace("_", " "), show(value, 2 * (name == "dollars")), show(each, 2 * (each < 100))])
    parts = {part.replace("_", " "): part for part in seconds if part != "step"}
    rows = [line["time"] | {"step": line["step"]} for line in metrics]
    return (
        f"<div class=charts>{chart('Time', 'seconds per step', rows, parts)}"
        f"{table(['time', 'seconds', 'per step', '%'], split)}{table(['judge', 'in all', 'per step'], bill)}</div>"
    )


def comparison(evals: list[dict]) -> str:
    """First evaluation against last, from the lines of evals.jsonl: a row per length bucket, and the slopes."""
    begin, end = evals[0]["label"], evals[-1]["label"]
    end = "no later evaluation" if end == begin else end
    first, last = ({row["bucket"]: row for row in evals if row["label"] == label} for label in (begin, end))
    columns = [("sq", 1, 100), ("length_ratio", 2, 1), ("length_error", 0, 100), ("reward", 2, 1), ("finished", 0, 100)]
    head = "requested length|stories|Story Quality, points|length ratio|length error, %|reward|finished, %".split("|")
    rows = []
    for bucket, row in first.items():
        after = last.get(bucket, {})
        rows.append([text(bucket), show(row["n"], 0)])
        rows[-1] += [change(row[key], after.get(key), digits, scale) for key, digits, scale in columns]
    slopes = change(slope([*first.values()]), slope([*last.values()]), 1, 100)
    return (
        f"<p class=lead>{text(begin)} → {text(end)}</p>{table(head, rows)}"
        f"<p class=facts>Slope of Story Quality over the rows: {slopes} points. 1x is up to the longest trained length,"
        " 2x up to twice that.</p>"
    )


def verdict_html(verdict: dict | None) -> str:
    """Every dimension of the rubric as a bar; the reasons and quotes behind a fold."""
    if verdict is None or verdict["score"] is None:
        return f"<p class=none>No verdict. {text(verdict['error'] if verdict else '')}</p>"
    bars, reasons = [], []
    for dimension in judge.RUBRIC:
        if dimension.key in verdict["dimensions"]:
            found = verdict["dimensions"][dimension.key]
            name = f"<b>{dimension.key}</b> {text(dimension.name)}"
            side = "fault" if dimension.key.startswith(("N", "PENALTY")) else "merit"
            bar = f"<i class={side} style='width:{100 * found['score'] / dimension.max:.0f}%'></i>"
            points = f"{show(found['score'], 0)}<small>/{dimension.max}</small>"
            bars.append(f"<tr><th>{name}<td class=bar>{bar}<td>{points}")
            quotes = "".join(f" <q>{text(quote)}</q>" for quote in found["quotes"])
            reasons.append(f"<dt>{name}<dd>{text(found['justification'])}{quotes}")
    totals = ", ".join(f"{name} {show(verdict[name], 0)}" for name in ("positive", "negative", "bonus", "penalty"))
    return (
        f"<p class=facts><b>Story Quality {show(verdict['score'], 0, 100)}</b> points ({totals}), "
        f"quote accuracy {show(verdict['quote_accuracy'])}</p><table class=scores>{''.join(bars)}</table>"
        f"<details><summary>The judge’s reasons and quotes</summary><dl>{''.join(reasons)}</dl></details>"
    )


def story_html(row: dict) -> str:
    """One story with its prompt, reward and verdict."""
    label = row.get("label") or f"step {row['step']}"
    facts = f"{row['words']:,} of {row['target_words']:,} words{'' if row['finished'] else ', cut off'}"
    paragraphs = "".join(f"<p>{text(part)}</p>" for part in re.split(r"\n\s*\n", row["story"].strip()) if part)
    reward = row["reward"] or {"total": None}
    parts = ", ".join(f"{name} {show(value)}" for name, value in reward.items() if name != "total" and value)
    return (
        f"<article><h4>{text(label)} <small>{facts}</small></h4><h3>{text(row['prompt'])}</h3>"
        f"<div class=story tabindex=0 dir=auto>{paragraphs or '<p class=none>(no words)</p>'}</div>"
        f"<p class=facts><b>Reward {show(reward['total'])}</b> {text(parts and f'({parts})')}</p>"
        f"{verdict_html(row['verdict'])}</article>"
    )


def gallery(read: Callable, steps: list[int]) -> str:
    """Side by side: stories of each bucket's first prompts before and after, else of the first and last step."""
    rows, pairs = read("eval_stories.jsonl"), {}
    if rows:
        ends = (rows[0]["label"], rows[-1]["label"])
        for row in rows:
            if row["label"] in ends:
                pairs.setdefault(row["bucket"], {}).setdefault(row["uid"], []).append(row)
        chosen = [pair for bucket in pairs.values() for pair in list(bucket.values())[:2]]
        note = "The first two prompts of every length bucket, in the order of the file."
    else:
        ends = sorted({*steps[:1], *steps[-1:]})
        rows = read("rollouts.jsonl", lambda row: row["step"] in ends and not row["anchor"])
        columns = [[row for row in rows if row["step"] == end][:4] for end in ends]
        chosen = list(zip(*columns, strict=False))
        note = "There are no evaluation stories: the first rollouts of the first and the last step instead."
    cells = "".join(f"<div class=pair>{''.join(map(story_html, pair))}</div>" for pair in chosen)
    return f"<p class=lead>{note}</p>{cells or '<p class=none>No story is recorded.</p>'}"


PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>%s</title><style>
:root { color-scheme: light dark; --paper: light-dark(#fcfbf8, #16181a); --card: light-dark(#fff, #1c1f22);
  --ink: light-dark(#22262a, #dfdcd5); --soft: light-dark(#676e75, #979da3); --rule: light-dark(#e5e2da, #33373b);
  --serif: Charter, "Iowan Old Style", Georgia, "Liberation Serif", serif }
.c0, .merit { color: light-dark(#2c6aa8, #78aee3) } .c1, .fault { color: light-dark(#bf6a1f, #dd9a52) }
.c2 { color: light-dark(#3f8558, #82c297) } .c3 { color: light-dark(#8d5196, #c896d0) } .c4 { color: #8b8f94 }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.7rem; margin: 0 } h1, h2 { font-weight: 600; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 3rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); column-span: all }
h3 { font: italic 1rem/1.45 var(--serif); margin: 0 0 .8rem; overflow-wrap: anywhere; white-space: pre-line }
h4 { font-size: .95rem; margin: 0 0 .3rem }
h3, em, small, th, dt, q, code, summary, figcaption span, .lead, .facts, .none { color: var(--soft); font-weight: 400 }
.lead, .warn { max-width: 44rem; margin: .3rem 0 .9rem } .warn { border-left: 3px solid #c77b30; padding-left: .7rem }
.facts, details, figcaption { font-size: .85rem } .facts b, th b, dt b { color: var(--ink); font-weight: 600 }
.charts, .pair { display: grid; gap: 1.4rem 1.6rem }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%%), 1fr)) }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%%), 1fr)); margin: 1.6rem 0 }
figure { margin: 0; min-width: 0 } figcaption { display: flex; flex-wrap: wrap; gap: 0 .9rem } em { font-style: normal }
i { display: inline-block; height: .7em; background: currentColor } figcaption i { width: .7em; border-radius: 50%%;
  margin-right: .35em } .bar { width: 34%% } .bar i { display: block; height: .5rem; border-radius: 2px }
svg { display: block; width: 100%%; font-size: 11px } svg text { fill: var(--soft) } .end { text-anchor: end }
.mid { text-anchor: middle } .rule { stroke: var(--rule) } circle, rect { fill: currentColor } circle { opacity: .4 }
.curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
.hover { opacity: 0 } .hover:hover { opacity: .08 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem }
th, td { padding: .32rem 0 .32rem 1.1rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 } .scores { width: 100%%; font-size: .8rem; line-height: 1.3 }
.scores th, .scores td { padding: .14rem .6rem .14rem 0; white-space: normal } .scores td + td { padding-right: 0 }
article { min-width: 0; padding: 1.1rem 1.3rem; background: var(--card); border: 1px solid var(--rule) }
.story { font: 1.06rem/1.6 var(--serif); max-width: 31rem; max-height: 34rem; overflow: auto; overflow-wrap: anywhere }
.story p { margin: 0 0 .8em; white-space: pre-line } .story p, h3, dd, q { unicode-bidi: isolate }
summary { cursor: pointer; margin-top: .8rem } dt { margin-top: .7rem } dd { margin: 0; overflow-wrap: anywhere }
q { font: italic .95rem var(--serif) } .configuration { columns: 3 20rem; font-size: .82rem; overflow-wrap: anywhere }
@media print { .story { max-height: none } }
</style></head><body>%s</body></html>
"""  # Content-Security-Policy: no script or outside resource would run even if one slipped through the escaping


def report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html, one page without scripts that loads nothing from elsewhere; returns its path.

    Reads config.json, metrics.jsonl, evals.jsonl, eval_stories.jsonl and rollouts.jsonl. Only the first must be there;
    the page says what is missing, and where a killed run left a half-written last line, which is left out. Raises
    EvalError for a folder that is no run, or a line broken elsewhere.
    """
    run, notes = Path(run_dir), []
    if not (run / "config.json").exists():
        raise EvalError(f"{run}: holds no config.json; give the folder that polaris.py wrote")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))

    def read(name: str, keep: Callable[[dict], bool] = lambda record: True) -> list[dict]:
        if not (run / name).exists():
            notes.append(f"There is no {name}.")
            return []
        records, partial = read_jsonl(run / name, keep=keep)
        if partial:
            notes.append(f"{name} ends in a half-written line, as a killed run leaves it; that line is left out.")
        return records

    metrics, evals = read("metrics.jsonl"), read("evals.jsonl")
    steps = [line["step"] for line in metrics]
    nothing = "<p class=none>Nothing is recorded.</p>"
    parts = {
        "Before and after": comparison(evals) if evals else nothing,
        "Training": curves(metrics) if metrics else nothing,
        "Stories": gallery(read, steps),
        "Time and judge": costs(metrics) if metrics else nothing,
        "Configuration": "".join(f"<div><code>{text(k)}</code> {text(v)}</div>" for k, v in config.items()),
    }
    if len(steps) < (config.get("steps") or 0):
        notes.append(f"{len(steps)} of {config['steps']} steps are recorded: the run was stopped, or still goes on.")
    if config.get("judge_model") == "offline":
        notes.append("The judge was the offline stand-in, made of text statistics: no measure of literary merit.")
    title = text(f"POLARIS run {run.resolve().name}")
    warnings = "".join(f"<p class=warn>{text(note)}</p>" for note in notes)
    body = "".join(
        f"<section class={name.split()[0].lower()}><h2>{name}</h2>{part}</section>" for name, part in parts.items()
    )
    page = run / "report.html"
    write(page, PAGE % (title, f"<h1>{title}</h1><p class=lead>{len(steps)} steps</p>{warnings}{body}"))
    return page


def print_summary(run_dir: str | Path) -> None:
    """What a finished run shows in the terminal: before and after, two stories of each, the bill, where things are."""
    run = Path(run_dir)
    evals, told, metrics = (
        read_jsonl(path)[0] if (path := run / f"{name}.jsonl").exists() else []
        for name in ("evals", "eval_stories", "metrics")
    )
    columns = {
        "reward": "reward",
        "story quality": "sq",
        "length error": "length_error",
        "words / asked": "length_ratio",
    }
    if evals:
        print(f"\n{'before -> after':26}" + "".join(f"{name:>18}" for name in columns))
    for bucket in dict.fromkeys(e["bucket"] for e in evals):
        ends = [e for e in evals if e["bucket"] == bucket and e["label"] in ("before", "after")]
        cells = [" -> ".join("none" if e[key] is None else f"{e[key]:.2f}" for e in ends) for key in columns.values()]
        print(f"{bucket + ' the trained length':26}" + "".join(f"{cell:>18}" for cell in cells))
    for uid in list(dict.fromkeys(s["uid"] for s in told if s["bucket"] == "1x"))[:2]:
        stories = [s for s in told if s["uid"] == uid and s["label"] in ("before", "after")]
        print(f"\n{stories[0]['prompt']}")
        for s in stories:
            print(f"  {s['label']}, {s['words']} words: {s['story'].strip()}")
    bill = metrics[-1]["judge"]
    print(
        f"\n{len(metrics)} steps; judge: {bill['calls']} calls, {bill['cached']} answers from the cache, "
        f"{bill['failures']} failures, ${bill['dollars']:.2f}"
    )
    for name, what in {
        "report.html": "curves, stories and verdicts: open it in a browser",
        "model": "the trained model, for AutoModelForCausalLM.from_pretrained",
        "metrics.jsonl": "one line a step",
        "rollouts.jsonl": "every story with its reward and verdict",
    }.items():
        print(f"  {str(run / name):40} {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("stories", help="write one story per prompt; run again, it goes on")
    command.add_argument("--model", required=True, help="folder or name of a Hugging Face causal language model")
    command.add_argument("--prompts", required=True, help="JSONL as data.py writes it; stories are not needed in it")
    command.add_argument("--out", required=True, help="JSONL of stories to write or complete")
    command.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=True, help="as in training [on]")
    command.add_argument("--seed", type=int, default=3479, help="[3479]")
    command.add_argument("--rows", type=int, default=16, help="stories written at a time [16]")
    command.add_argument("--max-new-tokens", type=int, default=32768, help="thinking included [32768]")
    command = commands.add_parser("score", help="Story Quality and length ratio by requested length")
    command.add_argument("stories", help="JSONL that `stories` wrote")
    command.add_argument("--judge-url", required=True, help="OpenAI-style base URL, e.g. http://localhost:8000/v1")
    command.add_argument("--judge-model", required=True, help="name of the judge model")
    command.add_argument("--judge-key-env", default="JUDGE_API_KEY", help="variable with its key [%(default)s]")
    command = commands.add_parser("report", help="one self-contained HTML page of a training run")
    command.add_argument("run", help="folder that polaris.py wrote")
    args = parser.parse_args()
    if args.command == "stories":
        from rollout import Sampling

        sampling = Sampling(max_new_tokens=args.max_new_tokens)
        written = stories(args.model, args.prompts, args.out, sampling, args.thinking, args.seed, args.rows)
        print(f"{len(written)} stories: {args.out}")
    elif args.command == "score":
        if not Path(args.stories).is_file():
            raise EvalError(f"{args.stories}: there is no such file; write it with `python eval.py stories`")
        key, cache = judge.api_key(args.judge_key_env, args.judge_url), Path(args.stories).with_suffix(".judge.sqlite")
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
    except (ValueError, OSError, judge.JudgeStop) as error:  # what the caller can mend; all else shows its traceback
        sys.exit(f"eval.py: {error}")
