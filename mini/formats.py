"""The stand-in judge's answers to the benchmarks' questions, and ways to spoil an answer.

It knows a question by what any wording of it must contain: pairwise keys, `[Scores]`, the six
aspects, or "score" and "reason". Its ratings follow the text statistics of standin.py and a little
noise that depends on nothing but the text and the criterion.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

from evals.answers import LONGBENCH_KEYS, PAIRWISE_KEYS

SPOILS = ("prose", "half", "array", "empty")

Measure = Callable[[str, str], tuple[dict[str, float], Any, Any]]


def _inside(text: str, name: str) -> str | None:
    found = re.search(rf"\[{name}\]\n(.*?)\n\[END OF {name}\]", text, re.S)
    return found[1] if found else None


def _noise(*parts: str) -> float:
    """-1 to 1, from the texts alone."""
    seed = hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).digest()
    return random.Random(seed).uniform(-1, 1)


def answer(text: str, measure: Measure) -> str | None:
    """What a judge would answer to this user message; None where it is none of the four forms."""
    prompt = _inside(text, "PROMPT") or ""

    def level(story: str) -> float:
        return fmean(measure(prompt, story)[0].values() or [0.0])

    if "avoids_poetic_overload" in text:
        marks = ("A0493", "A0488") if "A0493" in text else ("A", "B")
        stories = [_inside(text, f"STORY OF {letter}") or "" for letter in "AB"]
        better = level(stories[0]) - level(stories[1])
        verdict: dict[str, Any] = {"chain_of_thought_reasoning": "Text statistics."}
        for key in PAIRWISE_KEYS:  # antisymmetric: the order shown changes nothing
            tilt = _noise(key, stories[0]) - _noise(key, stories[1])
            points = 20 * better + tilt
            verdict[key] = marks[0 if points >= 0 else 1] + "+" * min(5, 1 + int(abs(points)))
        return json.dumps(verdict)
    story = _inside(text, "STORY") or text
    if "[Scores]" in text:
        head = text.partition("[PROMPT]")[0]
        lines = []
        for name in re.findall(r"^- (.+)$", head, re.M):
            share = min(1.0, max(0.0, level(story) + 0.1 * _noise(name, story)))
            if head.count(name) > 1:  # named again among those where lower is better
                share = 1 - share
            lines.append(f"{name}: {20 * share:.1f}")
        return "[Analysis]\nText statistics.\n\n[Scores]\n" + "\n".join(lines)
    if "Breadth and Depth" in text or "Breadth_and_Depth" in text:
        ratings = {}
        for name in LONGBENCH_KEYS:
            share = level(story) + 0.1 * _noise(name, story)
            ratings[name] = min(5, max(1, round(1 + 4 * share)))
        return json.dumps({"Analysis": "Text statistics.", **ratings})
    if '"score"' in text and '"reason"' in text:
        share = level(story) + 0.1 * _noise(text)
        score = min(10, max(1, round(1 + 9 * share)))
        return json.dumps({"score": score, "reason": "Text statistics."})
    return None


def spoil(fault: str, content: str) -> str:
    """An answer as a bad judge gives it: cut, prose, half the criteria, an array, empty."""
    if fault == "truncate":
        return content[: len(content) // 2]
    if fault == "prose":
        return "I would rather talk about it than put numbers to it."
    if fault == "empty":
        return ""
    if fault == "array":
        return json.dumps([1, 2, 3])
    if fault != "half":
        return content
    if content.startswith("{"):
        verdict = json.loads(content)
        kept = list(verdict)[: len(verdict) // 2]
        return json.dumps({key: verdict[key] for key in kept if key != "score"})
    head, _, lines = content.partition("[Scores]\n")
    half = lines.splitlines()[: lines.count("\n") // 2]
    return "\n".join([head, "[Scores]", *half])
