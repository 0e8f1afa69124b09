"""One group through one step of POLARIS, printed as it changes shape: five rollouts and an anchor.

    python walkthrough.py        seconds on a CPU, offline; docs/walkthrough.txt is its output

The functions named in brackets are those of the trainer. A run has eight groups a step, shards on
several ranks, an LLM as the judge, and rollouts that the policy samples: here they are fixed, so
that each shows one thing.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import data
from grpo import anchor_weight, group_advantages
from judge import Verdict, VerdictError, parse_verdict
from mini import world
from mini.standin import offline_verdict
from policy import Policy, collate
from reward import RewardConfig, reward, word_count

ROLLOUTS = """\
Near the river there lived a shy toad who had lost a drum. So the toad came back to the river, and \
the drum never left the house again.
A shy toad lived near the river and dreamed of a drum. The toad walked until the moon was high. \
The toad walked until the moon was high. The drum was broken, but the toad had found a friend.
A proud crow lived near the mill and dreamed of a key. The key was broken, but the crow was not.
One morning a shy toad came to the hill and looked under
The shy toad of the river had never owned a drum. In the end the toad gave it to the wren."""
NAMES = ["rollout 1", "rollout 2", "rollout 3", "rollout 4", "rollout 5", "anchor"]
IS_ANCHOR = [False] * 5 + [True]
# The reward's published constants are for 1,000 to 4,000 words; these are scaled down to 25.
CONFIG = RewardConfig(min_target=5, blank_words=5, len_below_min=3, len_above_min=5)


def table(**columns: list) -> None:
    """Print a line for each row of the group, with its number from each of the columns."""
    print("\n" + " " * 12 + "".join(f"{head:>16}" for head in columns))
    for name, *cells in zip(NAMES, *columns.values(), strict=True):
        shown = [f"{x + 0.0:.4f}" if isinstance(x, float) else str(x) for x in cells]
        print(f"{name:12}" + "".join(f"{cell:>16}" for cell in shown))


def read(answer: str, story: str) -> Verdict | None:
    """The verdict in a judge's answer; None if there is none."""
    try:
        return parse_verdict(answer, story)
    except VerdictError as error:
        print(f"Rollout 5: {str(error)[:70]} ...")
        return None


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    examples = world.fables(12, seed=0)
    example = examples[3]
    with tempfile.TemporaryDirectory() as folder:
        world.make_model(Path(folder), examples, seed=0)  # a tokenizer, and random weights
        tokenizer = AutoTokenizer.from_pretrained(folder)
        policy = Policy(AutoModelForCausalLM.from_pretrained(folder))

    print("1. PROMPT: text to token ids, in the model's chat template (data.encode_prompt)\n")
    prompt = data.encode_prompt(tokenizer, example.prompt, thinking=False)
    print(f"{example.prompt}\nprompt ids [{len(prompt)}]: {str(prompt[:12])[:-1]}, ...]")

    print("""
2. GROUP: all rows that answer one prompt (rollout.generate, data.encode_anchor)

A row is one story as token ids. A rollout is a story sampled from the policy, the model that is
trained. The anchor is the human story for the same prompt, as token ids that the policy could have
sampled. These rows end with EOS; a rollout that hits the length limit does not.
""")
    stories = [*ROLLOUTS.split("\n"), example.story]
    rows = [tokenizer.encode(story) + [tokenizer.eos_token_id] for story in stories[:5]]
    rows.append(data.encode_anchor(tokenizer, example, thinking=False, max_response=256))
    for name, story in zip(NAMES, stories, strict=True):
        print(f"{name:12}{story[:75]}{' ...' if len(story) > 75 else ''}")
    sizes = [len(row) for row in rows]
    table(words=[word_count(story) for story in stories], tokens=sizes)

    print("""
3. VERDICT: a judge's text to 16 scores to Story Quality, SQ (judge.parse_verdict)

positive: the sum of P1 to P6; negative: of N1 to N10. SQ = (positive - negative + bonus' -
penalty') / 100: the bonus counts only if negative <= positive / 2, and the penalty at most 3 if
positive > 1.5 negative. We add the scores up: totals that a judge states are ignored. Rollout 5
shows a judge that fails: its answer is cut in half, also when it is asked again.
""")
    answers = [json.dumps(offline_verdict(example.prompt, story)) for story in stories]
    answers[4] = answers[4][: len(answers[4]) // 2]
    verdicts = [read(*pair) for pair in zip(answers, stories, strict=True)]
    points = ("positive", "negative", "bonus", "penalty", "score")
    table(**{name: [getattr(v, name, "-") for v in verdicts] for name in points})

    print("""
4. REWARD: R = clip(SQ - 1.5 rep - 0.8 len - 1.0 blank, -2, 2) - think - overlong (reward.reward)

rep: repetition. len: how far the words lie outside a tolerance around the 25 that were asked for,
here 22 to 31, as a share of its nearer edge. Without a verdict there is no reward. It is never 0
instead: that would punish a story for the judge's failure.""")
    rewards = [
        reward(v.score, story, example.target_words, size, 0, True, CONFIG)
        if v and v.score is not None
        else None
        for v, story, size in zip(verdicts, stories, sizes, strict=True)
    ]
    parts = ("sq", "rep", "len", "blank", "total")
    table(**{name: [getattr(r, name, "-") for r in rewards] for name in parts})

    print("""
5. ADVANTAGE: how much better a row is than the rollouts of its group (grpo.group_advantages)

A = (R - mean) / (std + 1e-6), where mean and std are those of the rollouts with a verdict: what the
policy earns on this prompt by itself. The anchor is measured with them and changes neither. That is
"outside the statistics". Its A is then multiplied by a weight, which rises from 0 in step 1 (no
anchor) to 0.4 in step 16. Were it inside (last column, where its A has no weight), a good human
story would raise the mean, and rollouts would be pushed down for not being it. Rollout 5 has no
verdict: it is outside too, with A = 0.""")
    weight = anchor_weight(16)
    valid = [v is not None for v in verdicts]
    totals = [getattr(r, "total", float("nan")) for r in rewards]

    def advantages(rewards: list, anchor: list, valid: list, **bounds: Any) -> list[float]:
        return group_advantages(rewards, [0] * 6, anchor, weight, valid=valid, **bounds).tolist()

    ours = advantages(totals, IS_ANCHOR, valid)
    without = advantages(totals, IS_ANCHOR, [*valid[:5], False])
    inside = advantages(totals, [False] * 6, valid)
    table(without_anchor=without, with_anchor=ours, if_inside=inside)
    equal = [0.5] * 5 + [0.67]
    bare = advantages(equal, IS_ANCHOR, valid, std_floor=0, cap=False)[5]
    bounded = advantages(equal, IS_ANCHOR, valid)[5]
    print(f"""
The formula does not bound a row outside the statistics: if all rollouts scored 0.5 and the anchor
0.67, its A would be {bare:.0f}. So its std is at least 0.05, which makes that {bounded:.4f}. And it
is capped at (K - 1) / sqrt(K), the largest A that one of K rollouts can have, 1.5 for four.""")

    print("""
6. LOSS: L = - (sum of A log p) / n over all n response tokens of a step (grpo.onpolicy_loss)

Rollouts come from the current weights, and there is one update per step. So the ratio of new to old
probability is 1, PPO's clipping never acts, and no old log-probs are needed: what remains is a log-
likelihood in which every token of a row carries the row's A. For the anchor, which the policy did
not sample, that is weighted supervised training. Each token's coefficient, -A/n, is known before
the forward pass. Prompt tokens have none. Those of rollout 5 count in n and have coefficient 0.""")
    n = sum(sizes)
    table(tokens=sizes, A=ours, coefficient=[-a / n for a in ours])

    def batch(advantages: list[float]) -> tuple[torch.Tensor, ...]:
        pairs = zip(rows, advantages, strict=True)
        return collate([(prompt, row, -a / n) for row, a in pairs], "cpu")

    ids, positions, targets, coef = batch(ours)
    loss, logp, _ = policy(ids, positions, targets, coef)
    print(f"""
ids {[*ids.shape]}: six rows, padded on the right
logp {[*logp.shape]}: log-probabilities of the n = {n} response tokens
loss: {loss.item():.4f}""")

    print("\n7. GRADIENT: what each part of the group asks of the weights (policy.accumulate)\n")
    alone = {"anchor": [0.0] * 5 + ours[5:], "rollouts": [*ours[:5], 0.0], "group": ours}
    for part, part_advantages in alone.items():
        policy.zero_grad()
        policy(*batch(part_advantages))[0].backward()
        norm = get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        print(f"gradient norm of the {part:9}{norm.item():.4f}")
    print("""
In the public release the first is 0: the anchor's loss mask is empty, so the human story never
reaches the weights. Here it does.""")

    print("\n8. UPDATE: one step of AdamW; mean log-probability of a row's tokens (policy.apply)")
    torch.optim.AdamW(policy.parameters(), lr=1e-4).step()
    with torch.no_grad():
        _, new_logp, _ = policy(ids, positions, targets, coef)
    before, after = ([x.mean().item() for x in both.split(sizes)] for both in (logp, new_logp))
    change = [b - a for a, b in zip(before, after, strict=True)]
    table(A=ours, before=before, after=after, change=change)
    print("""
Rows with A > 0 became likelier, rows with A < 0 less likely. Rollout 5 has A = 0 and moved all the
same: it begins with the anchor's first sentence, and all rows share the weights.""")


if __name__ == "__main__":
    main()
