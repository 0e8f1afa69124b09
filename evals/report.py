"""The report of a training run: one self-contained HTML page, by report.html and parts.html.

What a policy or a judge wrote stays text: every value passes `visible`, then Jinja2's escaping.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evals.length import slope
from judge import RUBRIC, judges_part
from rundir import RecordError, mean, read_jsonl, write

# Shown as ⟨code⟩: control characters, lone surrogates (UTF-8 has no form for them), noncharacters,
# and bidirectional overrides and isolates, which could turn the text around them.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]"
)


def visible(value: object) -> str:
    """Any value as text without unseen characters; markup, which our own templates made, passes."""
    if isinstance(value, Markup):
        return value
    lines = str(value).replace("\r\n", "\n")
    return UNSAFE.sub(lambda found: f"⟨{ord(found[0]):04X}⟩", lines)


def show(value: float | None, digits: int = 2, scale: float = 1) -> str:
    """A number for people; an en dash where there is none."""
    known = mean([value])
    return "–" if known is None else f"{known * scale:,.{digits}f}".replace("-", "−")


LEFT, RIGHT = 44, 350  # the plot in a figure of 360 x 208 px
TOP, BOTTOM = 22, 174


def ticks(low: float, high: float) -> list[float]:
    """About four equal round steps that cover [low, high]."""
    if high - low < 1e-9 * max(1, abs(high)):
        low -= 0.1 * abs(low) or 0.5
        high += 0.1 * abs(high) or 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = power * min(m for m in (1, 2, 2.5, 5, 10) if m * power >= 0.249 * (high - low))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def smooth(values: list[float | None]) -> list[float | None]:
    """Centred running mean over a sixth of the run; None where a window holds no number."""
    half = len(values) // 12
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def chart(rows: list[dict], fields: dict[str, str], scale: float = 1) -> dict:
    """What parts.html draws over the rows' "step": dots and a smoothed curve per {label: field}.

    None and NaN leave gaps; a field that is always 0 is left out. Coordinates are px.
    """
    steps = [row["step"] for row in rows]
    every = {label: [mean([row[field]]) for row in rows] for label, field in fields.items()}
    series = {label: values for label, values in every.items() if any(values)}
    known = [v * scale for values in series.values() for v in values if v is not None] or [0]
    levels = ticks(min(known), max(known))
    slot = (RIGHT - LEFT) / (steps[-1] - steps[0] + 1)  # px per step
    height = levels[-1] - levels[0]

    def x(step: int) -> float:
        return round(LEFT + (step - steps[0] + 0.5) * slot, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (value - levels[0]) / height * (BOTTOM - TOP), 1)

    lines = {}
    for label, values in series.items():
        dots = [(x(s), y(v * scale)) for s, v in zip(steps, values, strict=True) if v is not None]
        path = ""
        pen = "M"
        for step, value in zip(steps, smooth(values), strict=True):
            if value is not None:
                path += f"{pen}{x(step)} {y(value * scale)}"
            pen = "M" if value is None else "L"
        lines[label] = (dots, path)
    columns = []  # unseen, one per step: the numbers as a title
    for i, step in enumerate(steps):
        numbers = [f"\n{label}: {show(series[label][i], 3, scale)}" for label in series]
        columns.append((x(step) - slot / 2, f"step {step}{''.join(numbers)}"))
    marks = [round(tick) for tick in ticks(steps[0], steps[-1])]
    apart = [step for step in marks if step <= steps[-1] and x(step) > x(steps[0]) + 24]
    return {
        "lines": lines,
        "levels": [(y(level), f"{level:.6g}".replace("-", "−")) for level in levels],
        "steps": [(x(step), step) for step in [steps[0], *apart]],
        "columns": columns,
        "slot": slot,
    }


PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.globals |= {"show": show, "chart": chart, "slope": slope, "rubric": RUBRIC}
PAGES.filters["paragraphs"] = lambda story: re.split(r"\n\s*\n", story.strip())


def reader(run: Path, notes: list[str]) -> Callable[..., list[dict]]:
    """A function that reads a file of a run; `notes` gets what is missing from it."""

    def read(name: str, keep: Callable[[dict], bool] = lambda record: True) -> list[dict]:
        if not (run / name).exists():
            notes.append(f"There is no {name}.")
            return []
        records, partial = read_jsonl(run / name, keep=keep)
        if partial:
            cut = f"{name} ends in a half-written line, as a killed run leaves it"
            notes.append(f"{cut}; that line is left out.")
        return records

    return read


def gallery(rows: list[dict]) -> list[list[dict]]:
    """First and last story on each bucket's first two prompts, from rows of eval_stories.jsonl."""
    ends = [row["label"] for row in rows[:1] + rows[-1:]]
    buckets: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        if row["label"] in ends:
            buckets.setdefault(row["bucket"], {}).setdefault(row["uid"], []).append(row)
    return [pair for prompts in buckets.values() for pair in [*prompts.values()][:2]]


def judged_twice(evals: list[dict]) -> list[dict]:
    """Story Quality by both judges at each validation, from rows of evals.jsonl."""
    rows = [row for row in evals if row.get("eval_judge_sq") is not None]
    twice = []
    for step in dict.fromkeys(row["step"] for row in rows):
        here = [row for row in rows if row["step"] == step]
        both = {name: mean(row[name] for row in here) for name in ("judge_sq", "eval_judge_sq")}
        twice.append({"step": step, **both})
    return twice


def report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html, a page without scripts that loads nothing; returns its path.

    Only config.json must be there; the page says what else is missing, or ends in the half-written
    line of a killed run. RecordError for a folder that is no run, or a line broken elsewhere.
    """
    run = Path(run_dir)
    notes: list[str] = []
    read = reader(run, notes)
    if not (run / "config.json").exists():
        raise RecordError(f"{run}: holds no config.json; give the folder that polaris.py wrote")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    metrics = read("metrics.jsonl")
    evals = read("evals.jsonl")
    labels = [row["label"] for row in evals]
    ends = [labels[0], labels[-1]] if labels else []
    if len(set(ends)) == 1:
        ends[1] = "no later evaluation"
    pairs = gallery(read("eval_stories.jsonl"))
    choice = "The first two prompts of every length bucket, in the order of the file."
    if not pairs:
        choice = "There are no evaluation stories: rollouts of the first and the last step instead."
        shown = sorted({line["step"] for line in metrics[:1] + metrics[-1:]})
        rows = read("rollouts.jsonl", lambda row: row["step"] in shown and not row["anchor"])
        columns = [[row for row in rows if row["step"] == step][:4] for step in shown]
        pairs = [*zip(*columns, strict=False)]
    if len(metrics) < (config.get("steps") or 0):
        recorded = f"{len(metrics)} of {config['steps']} steps are recorded"
        notes.append(f"{recorded}: the run was stopped, or still goes on.")
    if config.get("judge_model") == "offline":
        stand_in = "The judge was the offline stand-in, made of text statistics"
        notes.append(f"{stand_in}: no measure of literary merit.")
    for line in metrics:
        for name, text in line.get("warnings", {}).items():
            notes.append(f"Warning from step {line['step']} on ({name}): {text}.")
    twice = judged_twice(evals)
    if parted := judges_part([(row["judge_sq"], row["eval_judge_sq"]) for row in twice]):
        notes.append(f"Warning (judges_part): {parted}.")
    parts = [part for part in (metrics[0]["time"] if metrics else ()) if part != "step"]
    page = PAGES.get_template("report.html").render(
        name=run.resolve().name,
        notes=notes,
        ends=ends,
        tables=[{row["bucket"]: row for row in evals if row["label"] == end} for end in ends],
        metrics=metrics,
        twice=twice,
        times=[line["time"] | {"step": line["step"]} for line in metrics],
        parts={part.replace("_", " "): part for part in parts},
        pairs=pairs,
        choice=choice,
        config=config,
    )
    write(run / "report.html", page)
    return run / "report.html"


def print_summary(run_dir: str | Path) -> None:
    """A finished run on the terminal: before and after, two stories of each, the bill, files."""
    run = Path(run_dir)
    read = reader(run, [])
    evals = [row for row in read("evals.jsonl") if row["label"] in ("before", "after")]
    if evals:
        columns = ("reward", "story quality", "length error", "words / asked")
        print(f"\n{'before -> after':26}" + "".join(f"{name:>18}" for name in columns))
    for bucket in dict.fromkeys(row["bucket"] for row in evals):
        line = f"{bucket + ' the trained length':26}"
        for field in ("reward", "sq", "length_error", "length_ratio"):
            values = [row[field] for row in evals if row["bucket"] == bucket]
            shown = ["none" if value is None else f"{value:.2f}" for value in values]
            line += f"{' -> '.join(shown):>18}"
        print(line)
    trained_length = [row for row in read("eval_stories.jsonl") if row["bucket"] == "1x"]
    for pair in gallery(trained_length):
        print(f"\n{pair[0]['prompt']}")
        for row in pair:
            print(f"  {row['label']}, {row['words']} words: {row['story'].strip()}")
    metrics = read("metrics.jsonl")
    bill = metrics[-1]["judge"]
    calls = f"{bill['calls']} calls, {bill['cached']} answers from the cache"
    failures = f"{bill['failures']} failures, ${bill['dollars']:.2f}"
    print(f"\n{len(metrics)} steps; judge: {calls}, {failures}")
    for name, what in {
        "report.html": "curves, stories and verdicts: open it in a browser",
        "model": "the trained model, for AutoModelForCausalLM.from_pretrained",
        "metrics.jsonl": "one line a step",
        "rollouts.jsonl": "every story with its reward and verdict",
    }.items():
        print(f"  {str(run / name):40} {what}")
