"""Signs that a run is going wrong, each against the run's own first ten steps.

A warning is named, said once, and stands in metrics, status and report. `COLLAPSE` are those after
which a run does not come back: --stop-on-collapse ends it there (exit status 5).

Reasons to worry, and where they come from:
    entropy      over 2 nats and tripled, or under a fifth: in long runs of the miniature 0.23 rose
                 to 4 within 60 steps, and stories fell apart (docs/notes.md)
    gradient     ten times its norm: an update of that size undoes many
    repetition   a penalty of 0.3 more: a third of the four-grams are repeats
    length       error doubled and over 0.5: stories no longer follow the length they were asked for
    cut off      half of the stories, and twice as many as at first, hit the response limit
    anchor       rollouts pass the anchors' reward: their advantage is now negative, and training
                 lowers the probability of human text
    judge        a tenth of the stories without a verdict
"""

from typing import Any

from rundir import mean

FIRST = 10  # steps that a run is compared with
LAST = 5  # steps that are compared

COLLAPSE = ("entropy", "repetition", "cut off")

ADVICE = {
    "entropy": "sample from what is trained (--top-p 1 --top-k 0), or lower --lr",
    "gradient": "lower --lr",
    "repetition": "look at rollouts.jsonl; lower --lr or raise --rep-weight",
    "length": "look at rollouts.jsonl; lower --lr",
    "cut off": "look whether stories end at all; raise --max-response or lower --lr",
    "anchor": "lower --anchor-peak, or let it decay (--anchor-decay)",
    "judge": "see judge_failures and the verdicts' errors in rollouts.jsonl; --judge-rpm may help",
}


def warnings(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Name → what is wrong, with numbers, from the lines of metrics.jsonl so far."""
    if len(metrics) < FIRST + LAST:
        return {}

    def ends(key: str) -> tuple[float, float]:
        """Means over the first ten and the last five steps; 0 where nothing is known."""
        first = mean(line.get(key) for line in metrics[:FIRST])
        last = mean(line.get(key) for line in metrics[-LAST:])
        return first or 0.0, last or 0.0

    found = {}
    a, b = ends("entropy")
    if (b > 2 and b > 3 * a) or b < a / 5:
        found["entropy"] = f"entropy went from {a:.2f} to {b:.2f} nats a token"
    a, b = ends("grad_norm")
    if b > 10 * a:
        found["gradient"] = f"the gradient norm went from {a:.3g} to {b:.3g}"
    a, b = ends("rep")
    if b > a + 0.3:
        found["repetition"] = f"the repetition penalty went from {a:.2f} to {b:.2f}"
    a, b = ends("length_error")
    if b > 0.5 and b > 2 * a:
        found["length"] = f"the length error went from {a:.2f} to {b:.2f}"
    a, b = ends("finished")
    if b < 0.5 and 1 - b > 2 * (1 - a):
        found["cut off"] = f"stories that end by themselves went from {a:.0%} to {b:.0%}"
    recent = [line for line in metrics[-LAST:] if line.get("anchor_reward") is not None]
    margin = mean(line["reward_mean"] - line["anchor_reward"] for line in recent)
    if len(recent) == LAST and margin is not None and margin > 0:
        found["anchor"] = (
            f"rollouts score {margin:.2f} above their anchors, which training now lowers"
        )
    a, b = ends("judge_failures")
    rows = mean(line["n"] + line["judge_failures"] for line in metrics[-LAST:]) or 1
    if b > 0.1 * rows:
        found["judge"] = f"the judge failed on {b / rows:.0%} of the stories"
    return {name: f"{what}; {ADVICE[name]}" for name, what in found.items()}
