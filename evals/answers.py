"""What judges answer in the benchmarks, read strictly, and the formulas that make it a score.

Three forms: lines `name: 0-20` (EQ-Bench longform, creative), a JSON object of numbers
(LongBench-Write, WritingBench), a JSON object of marks with plusses (pairwise). An answer that is
not all there is `Unusable`: a failure, never a number. Here the release of POLARIS believes 1 of 22
criteria, takes the score of another criterion for a missing one, and calls an unreadable pairwise
answer a tie; scores of 20 - x and the formulas are its own, to the digit.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from chat import Unusable

Scores = dict[str, float]

LONGBENCH_KEYS = "Relevance|Accuracy|Coherence|Clarity|Breadth and Depth|Reading Experience".split(
    "|"
)
PAIRWISE_KEYS = (
    "character_authenticity_insight interesting_original writing_quality coherence "
    "instruction_following world_and_atmosphere avoids_cliches avoids_verbosity "
    "avoids_poetic_overload"
).split()
FORCED_POETRY = "forced poetry or metaphor"

# ------------------------------------------------------------------------------------- score lines

_MARKUP = r"[\s*_#>`|~•\[\]()-]"  # Markdown, bullets and brackets around a name or a number
_LINE = re.compile(rf"{_MARKUP}*(?:\d+[.)]{_MARKUP}*)?([^\s*:\"{{}}][^:\"{{}}]*?){_MARKUP}*:(.*)")
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?![\d.,]*\d)(?:\s*/\s*(\d+))?")
_RANGE = re.compile(r"\s*(?:[-–—]|to\b)\s*\d")


def plain_name(name: str) -> str:
    """Letters and digits of a criterion's name, lower-cased: how names are compared."""
    return re.sub(r"[\W_]+", "", name.lower())


def _criterion(name: str, criteria: Mapping[str, str]) -> str | None:
    """Which of {plain name: name} is meant; a prefix counts if it fits exactly one."""
    plain = plain_name(re.sub(r"\(.*", "", name))
    if plain in criteria:
        return criteria[plain]
    ends = [(c, min(len(c), len(plain))) for c in criteria]
    fits = [c for c, n in ends if n >= 10 and c[:n] == plain[:n]]
    return criteria[fits[0]] if len(fits) == 1 else None


def _rating(text: str, top: float) -> float | None | str:
    """The number at the start of what follows a name; None: not rated; "" : no rating at all."""
    text = re.sub(r"^[\s*_`\[(]*(score[\s*_]*:)?[\s*_`\[(]*", "", text, flags=re.I)
    if re.match(r"n\s*/?\s*a\b", text, re.I):
        return None
    found = _NUMBER.match(text)
    if not found or (found[2] and float(found[2]) != top):
        return ""
    if found[1].startswith("-") or _RANGE.match(text, found.end()):
        return None
    return min(top, float(found[1]))


def parse_scores(text: str, criteria: Sequence[str], top: float = 20) -> Scores:
    """`name: number` lines after the last [Scores], else of all of it -> {criterion: 0..top}.

    The last line of a name wins. At least three in four criteria must be rated.
    """
    block = re.split(r"\[scores\]", text, flags=re.I)[-1]
    known = {plain_name(name): name for name in criteria}
    found: dict[str, float | None] = {}
    for line in block.splitlines():
        match = _LINE.match(line)
        name = _criterion(match[1], known) if match else None
        rating = _rating(match[2], top) if match and name else ""
        if name and not isinstance(rating, str):
            found[name] = rating
    rated = {name: found[name] for name in criteria if found.get(name) is not None}
    if not rated:
        raise Unusable("no scores in the answer")
    if 4 * len(rated) < 3 * len(criteria):
        raise Unusable(f"criteria missing: {len(rated)} of {len(criteria)} rated")
    return rated  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------- JSON


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no score")


def last_object(text: str) -> dict[str, Any]:
    """The last complete JSON object in a text, wherever it stands."""
    decoder = json.JSONDecoder(strict=False, parse_constant=_no_constant)
    values: list[Any] = []
    end = broken = 0
    for opening in re.finditer(r"[{\[]", text):
        if opening.start() < end or broken > 64:  # each broken one takes time
            continue
        try:
            value, end = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            broken += 1
        else:
            values.append(value)
    objects = [value for value in values if isinstance(value, dict)]
    if not objects:
        raise Unusable("an array in place of an object" if values else "no JSON object")
    return objects[-1]


def _number(value: Any, low: float, high: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high


def parse_longbench(text: str) -> Scores:
    """Six numbers of 1 to 5."""
    found = last_object(text)
    scores = {}
    for key in LONGBENCH_KEYS:
        value = found.get(key.replace(" ", "_"), found.get(key))
        if not _number(value, 1, 5):
            raise Unusable(f"criteria missing: {key} is no number from 1 to 5")
        scores[key] = float(value)  # type: ignore[arg-type]
    return scores


def parse_writingbench(text: str) -> Scores:
    """A whole number of 1 to 10."""
    value = last_object(text).get("score")
    if not _number(value, 1, 10) or value != int(value):  # type: ignore[arg-type]
        raise Unusable("no score: a whole number from 1 to 10 is needed")
    return {"score": float(value)}  # type: ignore[arg-type]


def parse_pairwise(text: str, marks: tuple[str, str] = ("A", "B")) -> Scores:
    """Plusses of the first and of the second story: {"first", "second"}; 7 of 9 keys needed."""
    found = last_object(text)
    plusses = dict.fromkeys(("first", "second"), 0.0)
    read = 0
    for key in PAIRWISE_KEYS:
        value = found.get(key)
        for side, mark in zip(plusses, marks, strict=True):
            if isinstance(value, str) and re.match(rf"\W*{mark}\W*?\+", value):
                plusses[side] += min(5, value.count("+"))
                read += 1
    if read < 7:
        raise Unusable(f"criteria missing: {read} of {len(PAIRWISE_KEYS)} compared")
    return plusses


# ---------------------------------------------------------------------------------------- formulas


def adjusted(name: str, x: float, negative: Collection[str], exponent: float = 1.0) -> float:
    """x of 0..20 so that more is better; the exponent is that of Forced Poetry or Metaphor."""
    if name not in negative:
        return x
    if exponent != 1 and plain_name(name) == plain_name(FORCED_POETRY):
        return 20 * ((20 - x) / 20) ** exponent
    return 20 - x


def longform_score(
    scores: Scores,
    negative: Collection[str],
    weights: Mapping[str, float],
    exponent: float = 1.7,
) -> float:
    """0..100 from rated criteria; weights by lower-cased name, 1 where there is none.

    No weights and exponent 1: the uniform score, our reading of the paper's.
    """
    kept = [(weights.get(name.lower(), 1.0), name, x) for name, x in scores.items()]
    parts = [w * round(adjusted(name, x, negative, exponent), 4) for w, name, x in kept]
    return 5 * sum(parts) / sum(weight for weight, _, _ in kept)


def creative_score(scores: Scores, negative: Collection[str]) -> float:
    """0..100: five times the mean criterion."""
    return 5 * round(fmean(adjusted(name, x, negative) for name, x in scores.items()), 4)


def longbench_quality(scores: Scores) -> float:
    """S_Q of 0..100."""
    return fmean((x - 1) * 25 for x in scores.values())


def longbench_length(words: int, target: int) -> float:
    """S_L of 0..100; 0 for no words."""
    if words > target:
        return 100 * max(0.0, 1 - (words / target - 1) / 3)
    return 100 * max(0.0, 1 - (target / words - 1) / 2) if words else 0.0


def verdict_score(difference: float) -> float:
    """Score of the first story from plusses first − second: A>>B 1, A>B .75, tie .5, …"""
    size = 0.5 if abs(difference) >= 10 else 0.25 if difference else 0.0
    return 0.5 + (size if difference > 0 else -size)


def test_composite(positive: float, negative: float, bonus: float) -> float:
    """Story Quality as the release computes it at test time: no penalty, no composite rules."""
    return min(100.0, positive - negative + bonus)
