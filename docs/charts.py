"""Draw docs/miniature.svg: one row of charts from the metrics of some runs.

python docs/charts.py runs/s0 runs/s1 runs/s2 > docs/miniature.svg
"""

import json
import sys
from pathlib import Path
from statistics import fmean

WIDTH, HEIGHT, GAP, TOP = 270, 150, 50, 40  # of a chart, the space left of it and above; pixels
COLOURS = ["#2a66a8", "#bf6a1f", "#3f8a5a", "#8a5aa8"]  # one a run
CHARTS = [  # title, field of metrics.jsonl (solid), another (dotted), values of the grid's lines
    (
        "Reward: rollouts (anchors dotted)",
        "reward_mean",
        "anchor_reward",
        [0.3, 0.4, 0.5, 0.6, 0.7],
    ),
    ("Length error of rollouts", "length_error", "", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    ("Anchor's weighted advantage", "anchor_advantage", "", [-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4]),
]


def smooth(values: list) -> list[float]:
    """Means of up to five neighbouring steps, those without a value (no anchor) left out."""
    windows = [values[max(0, i - 2) : i + 3] for i in range(len(values))]
    return [fmean(v for v in window if v is not None) for window in windows]


def label(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{words}</text>'


def chart(left: int, title: str, fields: list[str], grid: list[float], runs: list) -> list[str]:
    """The elements of one chart, whose plot begins `left` pixels from the left."""

    def height(value: float) -> float:
        return TOP + HEIGHT * (grid[-1] - value) / (grid[-1] - grid[0])

    parts = [label(left, TOP - 16, title, 'font-weight="bold"')]
    for value in grid:
        y = height(value)
        parts.append(f'<path d="M{left},{y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(label(left - 8, y + 4, f"{value:.1f}", 'text-anchor="end" fill="#666"'))
    for colour, run in zip(COLOURS, runs, strict=False):
        x = [left + WIDTH * i / (len(run) - 1) for i in range(len(run))]
        for field, dash in zip(fields, ("", "2 3"), strict=False):
            y = map(height, smooth([line[field] for line in run]))
            places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
            style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{places}" {style}/>')
    below = TOP + HEIGHT + 18
    return [
        *parts,
        label(left, below, "step 1"),
        label(left + WIDTH - 14, below, str(len(runs[0]))),
    ]


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    texts = [(folder / "metrics.jsonl").read_text() for folder in folders]
    runs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    width, height = len(CHARTS) * (WIDTH + GAP) + 20, TOP + HEIGHT + 30
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"')
    print('font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>')
    for i, (title, solid, dotted, grid) in enumerate(CHARTS):
        left = GAP + i * (WIDTH + GAP)
        print("\n".join(chart(left, title, [f for f in (solid, dotted) if f], grid, runs)))
    for i, (colour, folder) in enumerate(zip(COLOURS, folders, strict=False)):
        name = label(GAP + 90 + 50 * i, height - 12, folder.name)
        print(name.replace("<text", f'<text fill="{colour}"'))
    print("</svg>")


if __name__ == "__main__":
    main()
