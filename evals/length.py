"""The length table (arXiv 2606.04095): how quality holds as the requested length T grows.

    length ratio = mean of words / T        length error = mean of |words / T - 1|
    slope = sum_b (b - mean b) (SQ_b - mean SQ) / sum_b (b - mean b)^2

SQ_b is the mean Story Quality of bucket b = 0..5, so that every bucket counts alike; an empty one
leaves a gap. "all" is the mean over stories. The paper does not define its columns. Its totals fit
if 1-4k, 4-8k and 8-12k hold three, two and one equal buckets; the edges inside are our choice.
"""

from collections.abc import Collection
from statistics import fmean

from rundir import mean

BUCKETS = {  # name: least requested words, and the paper's column
    "1k-2k": (1000, "1-4k"),
    "2k-3k": (2000, "1-4k"),
    "3k-4k": (3000, "1-4k"),
    "4k-6k": (4000, "4-8k"),
    "6k-8k": (6000, "4-8k"),
    "8k-12k": (8000, "8-12k"),
}


def length_bucket(target_words: int) -> str | None:
    """The paper's bucket of a requested length; None outside 1,000 to 12,000 words."""
    reached = [name for name, (least, _) in BUCKETS.items() if least <= target_words]
    return reached[-1] if reached and target_words <= 12000 else None


def slope(buckets: Collection[dict]) -> float | None:
    """Least-squares slope of "sq" over the bucket index; None where fewer than two have one."""
    names = [row["bucket"] for row in buckets]
    if set(names) <= set(BUCKETS):
        names = list(BUCKETS)  # an empty one of the paper's six leaves its gap
    known = [row for row in buckets if row["sq"] is not None]
    if len(known) < 2:
        return None
    xs = [names.index(row["bucket"]) for row in known]
    away = [x - fmean(xs) for x in xs]  # sums to 0, so that mean SQ drops out
    rise = sum(x * row["sq"] for x, row in zip(away, known, strict=True))
    return rise / sum(x * x for x in away)


def length_table(records: list[dict]) -> list[dict]:
    """One row per length bucket, shortest first, then a row "all" that also holds the "slope".

    records: {"words", "target_words" > 0, "sq" (None: no verdict, left out of the mean)} and, where
    known, "reward", "finished", and a "bucket" in place of the paper's. None: unknown.
    """
    buckets: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda record: record["target_words"]):
        if name := record.get("bucket") or length_bucket(record["target_words"]):
            buckets.setdefault(name, []).append(record)
    table = []
    for name, group in [*buckets.items(), ("all", records)]:
        ratios = [record["words"] / record["target_words"] for record in group]
        row = {"bucket": name, "n": len(group)}
        row["judged"] = len([record for record in group if record["sq"] is not None])
        for field in ("reward", "sq", "finished"):
            row[field] = mean(record.get(field) for record in group)
        row["length_error"] = mean(abs(ratio - 1) for ratio in ratios)
        row["length_ratio"] = mean(ratios)
        table.append(row)
    table[-1]["slope"] = slope(table[:-1])
    return table
