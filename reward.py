"""The reward of one story: its Story Quality, less repetition, a missed length and blankness.

    R = clip(SQ - 1.5 rep - 0.8 len - 1.0 blank, -2, 2) - think - overlong     (arXiv 2606.04095)

SQ is the judge's overall score / 100; each other term stands at its function or constant.
Departure from the release: in "1,500 words long" it reads 500, and it hides all text after that
sentence from the judge; here it is 1500, and only that sentence is hidden.

>>> story = " ".join(f"word{i}" for i in range(400))
>>> reward(0.7, story, target=500, n_tokens=600, n_thinking=0, finished=True).total
0.7
"""

import html
import re
from dataclasses import dataclass, field
from typing import Any

# ---------------------------------------------------------------------------------- text and length

# Bounds and look-behinds keep the search linear in runs of digits and blanks.
_LENGTH = re.compile(r"(\d{1,3}(?:,\d{3}){1,5}|(?<!\d)\d+)\s+words\s+long\b", re.I)
# A sentence ends at . ! ? before white space or at a line break ...
_BREAK = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
# ... but not after a title, "e.g." or an initial,
_TITLE = re.compile(
    r"(?:\b(?:Dr|Mrs?|Ms|St|Prof|Capt|Lt|Col|Gen|Sgt|Rev|Jr|Sr|No|vs|approx|ca|e\.g|i\.e)"
    r"|(?:^|\s)[A-Z])\. *\Z"
)
# unless such a word follows: in "plan B. It …" the B ends a sentence, it is no initial.
_OPENER = re.compile(r"(?:The|It|Its|Your|This|Make|Write|Aim|Please|Keep)\b")
_LENGTH_PHRASE = re.compile(
    r"(?:[,;(]|(?<!\s))\s*(?:\b(?:about|around|roughly|approximately)\s+)?" + _LENGTH.pattern, re.I
)


def requested_words(prompt: str) -> int | None:
    """The N of "N words long" in a prompt (thousands may carry commas), or None."""
    match = _LENGTH.search(prompt)
    return int(match[1].replace(",", "")) if match else None


def strip_length_sentence(prompt: str) -> str:
    """The prompt without sentences that say "N words long"; if none is left, without the phrase."""
    kept = []
    start = 0
    for end in [*(match.end() for match in _BREAK.finditer(prompt)), len(prompt)]:
        title = _TITLE.search(prompt[max(start, end - 20) : end])
        if end < len(prompt) and title and not _OPENER.match(prompt, end):
            continue  # the sentence goes on
        if not _LENGTH.search(prompt, start, end):
            kept.append(prompt[start:end])
        start = end
    return "".join(kept).strip() or _LENGTH_PHRASE.sub("", prompt).strip()


def unescape(text: str) -> str:
    """HTML entities undone."""
    try:
        return html.unescape(text)
    except ValueError:  # "&#" and more digits than int() reads: a policy can write that
        return text


def word_count(text: str) -> int:
    r"""Words as the reward counts them: runs of \w after HTML entities are undone."""
    return len(re.findall(r"\w+", unescape(text)))


def self_repetition(text: str) -> float:
    """rep in [0, 1.155]: repeated 4-grams, 4-grams at most 63 positions apart, repeated lines."""
    tokens = [token.lower() for token in re.findall(r"\w+|[^\s]", text)]
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    newest: dict[tuple[str, ...], int] = {}  # 4-gram -> its newest position
    near = 0
    for i, gram in enumerate(grams):
        if gram in newest and i - newest[gram] <= 63:
            near += 1
        newest[gram] = i
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    same_lines = (len(lines) - len(set(lines))) / max(1, len(lines))
    repeated = (len(grams) - len(newest)) / max(1, len(grams))
    near_share = near / max(1, len(grams))
    same_grams = 0.7 * max(0.0, repeated - 0.08) + 0.3 * near_share
    return min(1.5, 0.8 * same_grams + 0.4 * same_lines)


# --------------------------------------------------------------------------------------- the reward


def _constant(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RewardConfig:
    """The constants of the reward; the defaults are the published ones."""

    rep_weight: float = _constant(1.5, "weight of repetition in the reward")
    len_weight: float = _constant(0.8, "weight of a missed length")
    blank_weight: float = _constant(1.0, "what a blank story costs")
    min_target: int = _constant(150, "words; a smaller requested length counts as this")
    len_below: float = _constant(0.15, "shortfall without penalty, as a share of the request …")
    len_below_min: int = _constant(350, "… but at least so many words")
    len_below_max: int = _constant(1000, "… and at most so many")
    len_above: float = _constant(0.25, "excess without penalty, as a share of the request …")
    len_above_min: int = _constant(600, "… but at least so many words")
    len_above_max: int = _constant(1500, "… and at most so many")
    blank_words: int = _constant(150, "a story of fewer words is blank")
    blank_visible: float = _constant(0.10, "so is one with a smaller share of visible characters")
    think_budget: int = _constant(3072, "thinking tokens without penalty")
    think_cost: float = _constant(0.05, "per thinking token over it / tokens of the response")
    overlong_buffer: int = _constant(
        512, "penalty 0 to 1 over the last so many tokens before --max-response, without EOS"
    )
    max_response: int = _constant(8192, "tokens of a response, thinking included")


@dataclass(frozen=True)
class Reward:
    """One story's reward and its parts; the penalties are positive amounts before their weights."""

    total: float
    sq: float
    rep: float
    len: float
    blank: float
    think: float
    overlong: float


PUBLISHED = RewardConfig()


def length_penalty(words: int, target: int, config: RewardConfig = PUBLISHED) -> float:
    """0 inside the tolerance band around the target (words), then linear up to 1."""
    c = config
    target = max(c.min_target, target)
    below = min(c.len_below_max, max(c.len_below_min, c.len_below * target))
    above = min(c.len_above_max, max(c.len_above_min, c.len_above * target))
    low = target - int(below)
    high = target + int(above)
    if words < low:
        return min(1.0, 1 - words / low)
    return min(1.0, words / high - 1) if words > high else 0.0


def blank_penalty(text: str, config: RewardConfig = PUBLISHED) -> float:
    """1 for a text that is hardly there (few visible characters or few words), else 0."""
    plain = unescape(text)
    visible = len(re.findall(r"\S", plain))
    hardly_visible = visible < config.blank_visible * len(plain)
    return 1.0 if hardly_visible or word_count(text) < config.blank_words else 0.0


def reward(
    sq: float,
    story: str,
    target: int,
    n_tokens: int,
    n_thinking: int,
    finished: bool,
    config: RewardConfig = PUBLISHED,
) -> Reward:
    """The reward of one story.

    sq: overall / 100 of its verdict.  target: words.  n_tokens, n_thinking: tokens of the response
    and of its thinking.  finished: the response ended with EOS.
    """
    c = config
    rep = self_repetition(story)
    length = length_penalty(word_count(story), target, c)
    blank = blank_penalty(story, c)
    think = c.think_cost * max(0, n_thinking - c.think_budget) / max(1, n_tokens)
    over = n_tokens - (c.max_response - c.overlong_buffer)
    overlong = 0.0 if finished or over <= 0 else min(1.0, over / c.overlong_buffer)
    quality = sq - c.rep_weight * rep - c.len_weight * length - c.blank_weight * blank
    total = min(2.0, max(-2.0, quality)) - think - overlong
    return Reward(total, sq, rep, length, blank, think, overlong)
