"""Means with 95% intervals: percentile bootstrap over prompts.

The unit that is drawn is the prompt: its samples, repeats, orders and criteria move together. Draws
stay inside length buckets, so that every draw has the mixture of lengths that was measured.

    table: one row per bucket, per column of the paper (ID 1-4k, near 4-8k, far 8-12k), and "all"
    slope = least squares of the buckets' means over their index
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evals.length import BUCKETS, length_bucket
from evals.report import show

DRAWS = 1000
SEED = 3479
COLUMNS = {"ID": "1-4k", "near": "4-8k", "far": "8-12k"}  # names of the paper's columns
Cell = dict[str, Any]  # mean, low, high (None: fewer than two prompts), n: numbers in it


def resample(strata: Sequence[Any], draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each unit is drawn: [draws, units]; as many as there are, inside each stratum."""
    counts = np.zeros((draws, len(strata)), dtype=np.int64)
    rng = np.random.default_rng(seed)
    names = np.array([str(name) for name in strata])
    for name in sorted(set(names)):
        inside = np.flatnonzero(names == name)
        share = np.full(len(inside), 1 / len(inside))
        counts[:, inside] = rng.multinomial(len(inside), share, size=draws)
    return counts


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95% of the draws; None where they hold no number."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None, None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where there is nothing to divide by."""
    nothing = np.full(np.shape(bottom), np.nan)
    return np.divide(top, bottom, out=nothing, where=np.asarray(bottom) > 0)


class Units:
    """Numbers of stories, gathered by prompt, and the draws of these prompts."""

    def __init__(self, items: Iterable[dict]) -> None:
        """items: {"uid", "bucket" or None, ...}, one per story."""
        self.items = list(items)
        self.uids = sorted({str(item["uid"]) for item in self.items})
        place = {uid: i for i, uid in enumerate(self.uids)}
        self.at = [place[str(item["uid"])] for item in self.items]
        bucket = {str(item["uid"]): item.get("bucket") for item in self.items}
        self.counts = resample([bucket[uid] for uid in self.uids])

    def sums(self, name: str, buckets: set[str] | None) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of a field's values, per prompt [units]."""
        total = np.zeros(len(self.uids))
        known = np.zeros(len(self.uids))
        for i, item in zip(self.at, self.items, strict=True):
            value = item.get(name)
            if value is not None and (buckets is None or item.get("bucket") in buckets):
                total[i] += value
                known[i] += 1
        return total, known

    def cell(self, name: str, buckets: set[str] | None = None) -> Cell:
        """Mean of a field over all stories, or over those of some buckets."""
        total, known = self.sums(name, buckets)
        n = int(known.sum())
        mean = float(total.sum() / n) if n else None
        low = high = None
        if np.count_nonzero(known) >= 2:
            low, high = interval(ratio(self.counts @ total, self.counts @ known))
        return {"mean": mean, "low": low, "high": high, "n": n}

    def slope(self, name: str, buckets: Sequence[str]) -> Cell:
        """Change per bucket, over the index of the buckets; one without numbers leaves a gap."""
        xs, means, drawn, n = [], [], [], 0
        for x, bucket in enumerate(buckets):
            total, known = self.sums(name, {bucket})
            if known.sum():
                n += int(known.sum())
                xs.append(x)
                means.append(total.sum() / known.sum())
                drawn.append(ratio(self.counts @ total, self.counts @ known))
        if len(xs) < 2:
            return {"mean": None, "low": None, "high": None, "n": n}
        away = np.array(xs) - np.mean(xs)
        rise = away / (away**2).sum()
        low, high = interval(rise @ np.array(drawn))
        return {"mean": float(rise @ np.array(means)), "low": low, "high": high, "n": n}


def bucket_of(record: dict) -> str | None:
    """A record's own bucket (1x, 2x, 3x), else the paper's for its requested length."""
    target = record.get("target_words")
    return record.get("bucket") or (length_bucket(target) if target else None)


def table(items: list[dict], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows {"bucket", "n", name: Cell ...}: each bucket, each column, "all", "slope"."""
    units = Units(items)
    present = [str(item["bucket"]) for item in items if item.get("bucket")]
    theirs = [name for name in BUCKETS if name in present]
    own = sorted(set(present) - set(theirs))
    order = list(BUCKETS) if theirs and not own else own + theirs
    groups: dict[str, set[str] | None] = {name: {name} for name in [*own, *theirs]}
    for column, of_paper in COLUMNS.items():
        inside = {name for name in theirs if BUCKETS[name][1] == of_paper}
        if inside:
            groups[column] = inside
    groups["all"] = None
    rows = []
    for group, buckets in groups.items():
        members = [i for i in items if buckets is None or i.get("bucket") in buckets]
        cells = {name: units.cell(name, buckets) for name in names}
        rows.append({"bucket": group, "n": len(members), **cells})
    slopes = {name: units.slope(name, order) for name in names}
    return [*rows, {"bucket": "slope", "n": len(items), **slopes}]


def shown(cell: Cell, digits: int = 1) -> str:
    """mean [low, high]"""
    text = show(cell["mean"], digits)
    if cell["low"] is None:
        return text
    return f"{text} [{show(cell['low'], digits)}, {show(cell['high'], digits)}]"


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of text, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
