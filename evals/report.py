"""The report of a training run: one self-contained HTML page."""

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import judge
from evals.length import slope
from rundir import RecordError, mean, read_jsonl, write

# --------------------------------------------------------------------------------------------- report: text and charts

# Shown as ⟨code⟩: control characters, lone surrogates (UTF-8 has no form for them), noncharacters, and bidirectional
# overrides and isolates, which could turn the text around them. Plain left-to-right and right-to-left marks pass.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]"
)


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
    return [
        i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


def smooth(values: list) -> list:
    """Centred running mean over a sixth of the run; None where a window holds no number."""
    half = len(values) // 12
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def chart(
    title: str, unit: str, rows: list[dict], lines: dict[str, str], scale: float = 1.0
) -> str:
    """Figure over the rows' "step": per line {label: key} raw points and a smoothed curve; None and NaN leave gaps."""
    steps = [row["step"] for row in rows]
    lines = {label: [mean([row[key]]) for row in rows] for label, key in lines.items()}
    lines = {
        label: [v if v is None else v * scale for v in values]
        for label, values in lines.items()
        if any(values)
    }
    known = [value for values in lines.values() for value in values if value is not None]
    levels = ticks(min(known, default=0), max(known, default=0))
    left, right, top, bottom = 44, 350, 22, 174  # the plot, in px of its natural size, 360 x 208
    slot = (right - left) / (steps[-1] - steps[0] + 1)  # px per step

    def x(step):
        return round(left + (step - steps[0] + 0.5) * slot, 1)

    def y(value):
        return round(bottom - (value - levels[0]) / (levels[-1] - levels[0]) * (bottom - top), 1)

    svg = [
        f"<text x=2 y=10>{text(unit)}</text><text x={right} y=206 class=end>training step</text>"
    ]
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
    legend = "".join(
        f"<span><i class=c{i}></i>{text(label)}</span>" for i, label in enumerate(lines)
    )
    return (
        f"<figure><figcaption><b>{text(title)}</b>{legend or '<span>not recorded, or always 0</span>'}</figcaption>"
        f"<svg viewBox='0 0 360 208' role=img aria-label='{text(title)} by training step'>{''.join(svg)}</svg></figure>"
    )


# --------------------------------------------------------------------------------------------- report: parts and page


def curves(metrics: list[dict]) -> str:
    """The charts of training, from the lines of metrics.jsonl."""
    penalties = {
        "repetition": "rep",
        "length": "len",
        "blank": "blank",
        "thinking": "think",
        "overlong": "overlong",
    }
    anchor = {"weight": "anchor_weight", "advantage": "anchor_advantage"}
    charts = [
        chart("Reward", "reward", metrics, {"rollouts": "reward_mean", "anchors": "anchor_reward"}),
        chart("Story Quality", "points", metrics, {"rollouts": "sq"}, 100),
        chart(
            "Length error", "% of the requested words", metrics, {"rollouts": "length_error"}, 100
        ),
        chart("Anchor", "weight, and advantage times weight", metrics, anchor),
        chart("Penalties", "before their weights", metrics, penalties),
        chart(
            "Finished stories", "% that end by themselves", metrics, {"rollouts": "finished"}, 100
        ),
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
        bill.append(
            [
                text(name).replace("_", " "),
                show(value, 2 * (name == "dollars")),
                show(each, 2 * (each < 100)),
            ]
        )
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
    first, last = (
        {row["bucket"]: row for row in evals if row["label"] == label} for label in (begin, end)
    )
    columns = [
        ("sq", 1, 100),
        ("length_ratio", 2, 1),
        ("length_error", 0, 100),
        ("reward", 2, 1),
        ("finished", 0, 100),
    ]
    head = "requested length|stories|Story Quality, points|length ratio|length error, %|reward|finished, %".split(
        "|"
    )
    rows = []
    for bucket, row in first.items():
        after = last.get(bucket, {})
        rows.append([text(bucket), show(row["n"], 0)])
        rows[-1] += [
            change(row[key], after.get(key), digits, scale) for key, digits, scale in columns
        ]
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
    totals = ", ".join(
        f"{name} {show(verdict[name], 0)}" for name in ("positive", "negative", "bonus", "penalty")
    )
    return (
        f"<p class=facts><b>Story Quality {show(verdict['score'], 0, 100)}</b> points ({totals}), "
        f"quote accuracy {show(verdict['quote_accuracy'])}</p><table class=scores>{''.join(bars)}</table>"
        f"<details><summary>The judge’s reasons and quotes</summary><dl>{''.join(reasons)}</dl></details>"
    )


def story_html(row: dict) -> str:
    """One story with its prompt, reward and verdict."""
    label = row.get("label") or f"step {row['step']}"
    facts = (
        f"{row['words']:,} of {row['target_words']:,} words{'' if row['finished'] else ', cut off'}"
    )
    paragraphs = "".join(
        f"<p>{text(part)}</p>" for part in re.split(r"\n\s*\n", row["story"].strip()) if part
    )
    reward = row["reward"] or {"total": None}
    parts = ", ".join(
        f"{name} {show(value)}" for name, value in reward.items() if name != "total" and value
    )
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
    RecordError for a folder that is no run, or a line broken elsewhere.
    """
    run, notes = Path(run_dir), []
    if not (run / "config.json").exists():
        raise RecordError(f"{run}: holds no config.json; give the folder that polaris.py wrote")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))

    def read(name: str, keep: Callable[[dict], bool] = lambda record: True) -> list[dict]:
        if not (run / name).exists():
            notes.append(f"There is no {name}.")
            return []
        records, partial = read_jsonl(run / name, keep=keep)
        if partial:
            notes.append(
                f"{name} ends in a half-written line, as a killed run leaves it; that line is left out."
            )
        return records

    metrics, evals = read("metrics.jsonl"), read("evals.jsonl")
    steps = [line["step"] for line in metrics]
    nothing = "<p class=none>Nothing is recorded.</p>"
    parts = {
        "Before and after": comparison(evals) if evals else nothing,
        "Training": curves(metrics) if metrics else nothing,
        "Stories": gallery(read, steps),
        "Time and judge": costs(metrics) if metrics else nothing,
        "Configuration": "".join(
            f"<div><code>{text(k)}</code> {text(v)}</div>" for k, v in config.items()
        ),
    }
    if len(steps) < (config.get("steps") or 0):
        notes.append(
            f"{len(steps)} of {config['steps']} steps are recorded: the run was stopped, or still goes on."
        )
    if config.get("judge_model") == "offline":
        notes.append(
            "The judge was the offline stand-in, made of text statistics: no measure of literary merit."
        )
    title = text(f"POLARIS run {run.resolve().name}")
    warnings = "".join(f"<p class=warn>{text(note)}</p>" for note in notes)
    body = "".join(
        f"<section class={name.split()[0].lower()}><h2>{name}</h2>{part}</section>"
        for name, part in parts.items()
    )
    page = run / "report.html"
    write(
        page,
        PAGE % (title, f"<h1>{title}</h1><p class=lead>{len(steps)} steps</p>{warnings}{body}"),
    )
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
        cells = [
            " -> ".join("none" if e[key] is None else f"{e[key]:.2f}" for e in ends)
            for key in columns.values()
        ]
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
