"""The length table."""

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
    inside = [name for name, (least, _) in BUCKETS.items() if least <= target_words <= 12000]
    return inside[-1] if inside else None


def slope(buckets: list[dict]) -> float | None:
    """Least-squares slope of "sq" over the bucket index; None with fewer than two buckets that have one."""
    names = [row["bucket"] for row in buckets]
    places = (
        list(BUCKETS) if set(names) <= set(BUCKETS) else names
    )  # an empty one of the paper's six leaves its gap
    points = [(places.index(row["bucket"]), row["sq"]) for row in buckets if row["sq"] is not None]
    if len(points) < 2:
        return None
    x_mean, y_mean = (fmean(axis) for axis in zip(*points, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / sum(
        (x - x_mean) ** 2 for x, _ in points
    )


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
        row = {
            "bucket": name,
            "n": len(group),
            "judged": sum(record["sq"] is not None for record in group),
        }
        row |= {
            key: mean(record.get(key) for record in group) for key in ("reward", "sq", "finished")
        }
        row |= {
            "length_error": mean(abs(ratio - 1) for ratio in ratios),
            "length_ratio": mean(ratios),
        }
        table.append(row)
    table[-1]["slope"] = slope(table[:-1])
    return table
