"""The rows of a step: what becomes of a prompt, from token ids to an advantage and a line on disk.

Advantages are grpo.group_advantages over whole groups. Everything else here is bookkeeping that
`train_step` should not have to show: how a row is made and summed up.
"""

import math
import statistics
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import data
from config import Config
from data import Example
from grpo import group_advantages
from judge import Verdict
from reward import Reward, reward, word_count
from rollout import Rollout
from rundir import mean


@dataclass
class Row:
    """One row of a group, the anchor or a rollout; it grows as the step goes on.

    Without a verdict there is no reward, and the advantage is 0.
    """

    example: Example
    k: int  # number within the group; the anchor is the last
    anchor: bool
    prompt_ids: list[int]
    response_ids: list[int]  # thinking, story and EOS; no EOS if it was cut off
    finished: bool
    thinking: str
    story: str
    pending: Future[Verdict] | None = None  # on the rank that asked the judge, and there alone
    verdict: Verdict | None = None
    reward: Reward | None = None
    advantage: float = 0.0
    logq: float | None = None  # log-probability with which the sampler drew the response

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pending": None}


def anchor_rows(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], cfg: Config
) -> list[Row]:
    """The human row of each example, but for those over the response limit: cut, it has no end."""
    rows = []
    for e in examples:
        response = data.encode_anchor(tokenizer, e, cfg.thinking, cfg.reward.max_response)
        if response is not None:
            prompt = data.encode_prompt(tokenizer, e.prompt, cfg.thinking)
            rows.append(Row(e, cfg.group - 1, True, prompt, response, True, e.reasoning, e.story))
    return rows


def rollout_row(
    tokenizer: PreTrainedTokenizerBase,
    job: tuple[Example, int],
    prompt_ids: list[int],
    rollout: Rollout,
    thinking: bool,
) -> Row:
    """The row of a finished rollout of `job`: (example, number within the group)."""
    ids = rollout.ids[:-1] if rollout.finished else rollout.ids
    # Special tokens stay visible: a policy that puts them into its story is seen doing so.
    thought, story = data.split_response(str(tokenizer.decode(ids)), thinking)
    ids, logq = rollout.ids, rollout.logq
    return Row(*job, False, prompt_ids, ids, rollout.finished, thought, story, logq=logq)


def set_reward(
    row: Row, verdict: Verdict, tokenizer: PreTrainedTokenizerBase, cfg: Config, limit: int
) -> None:
    """Verdict and reward of a row; `limit`: response tokens. No reward if the judge failed."""
    row.verdict = verdict
    if verdict.score is not None:
        row.reward = reward(
            verdict.score,
            row.story,
            row.example.target_words,
            n_tokens=len(row.response_ids),
            n_thinking=len(tokenizer.encode(row.thinking, add_special_tokens=False)),
            finished=row.finished,
            config=replace(cfg.reward, max_response=limit),
        )


def set_advantages(rows: list[Row], weight: float, cfg: Config) -> None:
    """Advantages of whole groups in any order; a group is the rows of one prompt's uid."""
    uids = {uid: i for i, uid in enumerate(dict.fromkeys(row.example.uid for row in rows))}
    advantages = group_advantages(
        torch.tensor([row.reward.total if row.reward else math.nan for row in rows]),  # [N]
        torch.tensor([uids[row.example.uid] for row in rows]),
        torch.tensor([row.anchor for row in rows]),
        weight,
        std_floor=cfg.anchor_std_floor,
        cap=cfg.anchor_cap,
        valid=torch.tensor([row.reward is not None for row in rows]),
    )
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        row.advantage = advantage


def halves(rows: list[Row]) -> list[list[Row]]:
    """The rows in two parts of whole groups, about half of the tokens each.

    All rows are decoded in step, so a group has ended when its longest rollout has. Groups that
    ended first come first. Only lengths decide, never the time at which a verdict comes, so that
    runs repeat bit for bit.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.example.uid, []).append(row)

    def end(group: list[Row]) -> int:
        return max(len(row.response_ids) for row in group if not row.anchor)

    order = sorted(groups.values(), key=end)
    tokens = [sum(len(row.response_ids) for row in group) for group in order]
    total = sum(tokens)
    cut = min(range(len(order)), key=lambda n: abs(sum(tokens[:n]) - total / 2))
    return [sum(part, []) for part in (order[:cut], order[cut:]) if part]


# --------------------------------------------------------------------------------------------------
# Numbers and records
# --------------------------------------------------------------------------------------------------

PARTS = ("sq", "rep", "len", "blank", "think", "overlong")


def summary(rows: list[Row]) -> dict[str, Any]:
    """Means over the rows that have a reward; None where there is none."""
    judged = [(row, row.reward) for row in rows if row.reward]
    totals = [r.total for _, r in judged]
    words = [word_count(row.story) for row, _ in judged]
    ratios = [n / row.example.target_words for n, (row, _) in zip(words, judged, strict=True)]
    return {
        "n": len(judged),
        "reward_mean": mean(totals),
        "reward_std": statistics.pstdev(totals) if totals else None,
        **{part: mean(getattr(r, part) for _, r in judged) for part in PARTS},
        "length_error": mean(abs(ratio - 1) for ratio in ratios),
        "length_ratio": mean(ratios),
        "words": mean(words),
        "finished": mean(row.finished for row, _ in judged),
    }


def step_metrics(rows: list[Row], weight: float, n_examples: int) -> dict[str, Any]:
    """What metrics.jsonl says of the rows of a step whose anchors have `weight`."""
    anchors = [row for row in rows if row.anchor]
    judged = [row for row in anchors if row.reward]
    return summary([row for row in rows if not row.anchor]) | {
        "anchor_weight": weight,
        "anchors": len(anchors),
        "anchors_left_out": n_examples - len(anchors) if weight > 0 else 0,
        "anchor_reward": mean(row.reward.total for row in judged if row.reward),
        "anchor_advantage": mean(row.advantage for row in judged),
        "judge_failures": sum(row.reward is None for row in rows),
    }


def record(row: Row) -> dict[str, Any]:
    """A row as it goes to disk."""
    return {
        "uid": row.example.uid,
        "row": row.k,
        "anchor": row.anchor,
        "prompt": row.example.prompt,
        "target_words": row.example.target_words,
        "thinking": row.thinking,
        "story": row.story,
        "words": word_count(row.story),
        "tokens": len(row.response_ids),
        "finished": row.finished,
        "reward": asdict(row.reward) if row.reward else None,
        "verdict": asdict(row.verdict) if row.verdict else None,
    }
