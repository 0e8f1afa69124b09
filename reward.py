"""The reward of one story: Story Quality, less repetition, a missed length, blankness (arXiv 2606.04095).

R = clip(SQ - 1.5 rep - 0.8 len - 1.0 blank, -2, 2) - think - overlong
"""

import html
import re
from dataclasses import dataclass

# -------------------------------------------------------------------------------------------------- text and length

_LENGTH = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)\s+words\s+long\b", re.I)
# A sentence ends at . ! ? before white space or at a line break, but not after a title, "e.g." or an initial.
_BREAK = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_TITLE = re.compile(
    r"(?:\b(?:Dr|Mrs?|Ms|St|Prof|Capt|Lt|Col|Gen|Sgt|Rev|Jr|Sr|No|vs|approx|ca|e\.g|i\.e)|(?:^|\s)[A-Z])\. *\Z"
)
_OPENER = re.compile(
    r"(?:The|It|Its|Your|This|Make|Write|Aim|Please|Keep)\b"
)  # "plan B. It ...": no initial, no title


def requested_words(prompt):
    """The N of "N words long" in a prompt (thousands may carry commas), or None."""
    match = _LENGTH.search(prompt)
    return int(match[1].replace(",", "")) if match else None


def strip_length_sentence(prompt):
    """The prompt without the sentences that say "N words long"; if that leaves nothing, without that phrase."""
    kept, start = [], 0
    for end in [match.end() for match in _BREAK.finditer(prompt)] + [len(prompt)]:
        if (
            end < len(prompt)
            and _TITLE.search(prompt[max(start, end - 20) : end])
            and not _OPENER.match(prompt, end)
        ):
            continue
        if not _LENGTH.search(prompt, start, end):
            kept.append(prompt[start:end])
        start = end
    phrase = r"[,;(]?\s*(?:\b(?:about|around|roughly|approximately)\s+)?" + _LENGTH.pattern
    return "".join(kept).strip() or re.sub(phrase, "", prompt, flags=re.I).strip()


def _unescape(text):
    try:
        return html.unescape(text)
    except ValueError:  # "&#" and more digits than int() reads: a policy can write that
        return text


def word_count(text):
    r"""Words as the reward counts them: runs of \w after HTML entities are undone."""
    return len(re.findall(r"\w+", _unescape(text)))


def self_repetition(text):
    """rep in [0, 1.155]: repeated 4-grams, 4-grams seen within the previous 63 positions, repeated lines."""
    tokens = [token.lower() for token in re.findall(r"\w+|[^\s]", text)]
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last, near = {}, 0
    for i, gram in enumerate(grams):
        near += gram in last and i - last[gram] <= 63
        last[gram] = i
    repeated, near = (len(grams) - len(last)) / max(1, len(grams)), near / max(1, len(grams))
    same_lines = (len(lines) - len(set(lines))) / max(1, len(lines))
    return min(1.5, 0.8 * (0.7 * max(0.0, repeated - 0.08) + 0.3 * near) + 0.4 * same_lines)


@dataclass(frozen=True)
class RewardConfig:
    """The constants of the reward; the defaults are the published ones."""

    rep_weight: float = 1.5
    len_weight: float = 0.8
    blank_weight: float = 1.0
    min_target: int = 150  # words; a smaller target counts as this
    len_below: float = 0.15  # tolerated shortfall, as a share of the target ...
    len_below_min: int = 350  # ... but at least and at most this many words
    len_below_max: int = 1000
    len_above: float = 0.25  # tolerated excess
    len_above_min: int = 600
    len_above_max: int = 1500
    blank_words: int = 150  # a story of fewer words is blank
    blank_visible: float = 0.10  # so is one with a smaller share of visible characters
    think_budget: int = 3072  # free thinking tokens
    think_cost: float = 0.05  # per token over it, averaged over the response
    overlong_buffer: int = (
        512  # a response without EOS pays for what it takes of the last tokens before the limit
    )
    max_response: int = 8192  # tokens


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


def length_penalty(words, target, config=RewardConfig()):
    """0 inside the tolerance band around the target (words), then linear up to 1."""
    c, target = config, max(config.min_target, target)
    low = target - int(min(c.len_below_max, max(c.len_below_min, c.len_below * target)))
    high = target + int(min(c.len_above_max, max(c.len_above_min, c.len_above * target)))
    if words < low:
        return min(1.0, 1 - words / low)
    return min(1.0, words / high - 1) if words > high else 0.0


def blank_penalty(text, config=RewardConfig()):
    """1 for a text that is hardly there (few visible characters or few words), else 0."""
    plain = _unescape(text)
    visible = sum(not char.isspace() for char in plain)
    return float(
        visible < config.blank_visible * len(plain) or word_count(text) < config.blank_words
    )


def reward(sq, story, target, n_tokens, n_thinking, finished, config=RewardConfig()):
    """The reward of one story.

    sq: overall / 100 of its verdict.  target: words.  n_tokens, n_thinking: tokens of the response and of its thinking.
    finished: the response ended with EOS.
    """
    c = config
    rep, length = self_repetition(story), length_penalty(word_count(story), target, c)
    blank = blank_penalty(story, c)
    think = c.think_cost * max(0, n_thinking - c.think_budget) / max(1, n_tokens)
    over = 0 if finished else max(0, n_tokens - (c.max_response - c.overlong_buffer))
    overlong = min(1.0, over / c.overlong_buffer) if over else 0.0
    total = min(
        2.0, max(-2.0, sq - c.rep_weight * rep - c.len_weight * length - c.blank_weight * blank)
    )
    return Reward(total - think - overlong, sq, rep, length, blank, think, overlong)
