"""POLARIS: reinforcement learning that teaches a small language model to write long stories.

    torchrun --nproc_per_node=4 polaris.py                       the miniature: offline, in minutes
    torchrun --nproc_per_node=4 polaris.py --preset paper --data train.jsonl --judge-url URL
                                                                 the published run: four 80 GB GPUs
    torchrun --nproc_per_node=4 polaris.py --out RUN --resume    go on after an interruption

One step of GRPO with an online judge and human-reference injection (arXiv 2606.04095), as
`train_step` runs it:

    1. data      8 prompts, the same on every rank, from (seed, step) alone
    2. rollout   5 stories a prompt by whole copies of the policy; row 6 is a human one, the anchor
    3. judge     each story goes to the judge the moment it ends, while others are still generated
    4. grpo      A = (R - mean) / (std + 1e-6) over the group's rollouts; the anchor is measured
                 against them, outside their statistics, and weighted
    5. update    loss = - (sum over all response tokens of A · log p) / (number of these tokens)
    6. records   metrics, stories and verdicts to disk; now and then a checkpoint, a validation

    glossary     rollout: a story sampled from the policy     group: all rows of one prompt
                 anchor: the group's human row                verdict: the judge's scores of a story
                 advantage: how much better than its group's rollouts a row is

Departures from the paper and its release (docs/departures.md has all of them):
  - The anchor reaches the gradient. In the release its response mask is empty, so its advantage
    multiplies nothing.
  - One token-mean over the step, whatever the number of ranks and micro-batches.
  - No pass for old log-probs: with one update a step the ratio is 1 and clipping is idle. So the
    coefficient -A/n_tokens of each token is known before the forward pass, and head and loss run
    in one sweep (grpo.onpolicy_loss).
  - A story without a verdict has no reward: it leaves the statistics and gets no gradient. It is
    never scored 0. (A story of no words is not sent: nothing is on the page, so SQ = 0.)

Notably absent: a reference model and KL term, a value model, several updates a step, asynchronous
rollouts, LoRA.
"""

import argparse
import math
import os
import sys
import time
import traceback
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import data
import plan
from chat import ChatStop
from checkpoint import resume, save_before_stop, save_step
from config import Config, ConfigError, parse, saved_values, unflatten
from data import DataError, Example
from evals.report import judged_twice, print_summary, report
from grpo import anchor_weight
from health import COLLAPSE
from judge import Judge, Verdict, agreement, judges_part
from log import Log, Stopwatch, say
from policy import (
    ModelError,
    Policy,
    accumulate,
    apply,
    check_checkpoint,
    copy_weights,
    export,
    load_policy,
    load_weights,
)
from ranks import from_rank_0, gather, join, on_all_ranks, only_writer, setup, stop_if_asked
from rollout import Decoders, Rollout, Sampling, generate, kernels, row_seed
from rows import (
    Row,
    anchor_rows,
    halves,
    record,
    rollout_row,
    set_advantages,
    set_reward,
    step_metrics,
    summary,
)
from rundir import RecordError, append, checkpoints, fault_of, mean, read_jsonl
from start import Examples, begin, find_model, load_examples, open_judges, open_model
from watch import (
    STATUS,
    Heartbeat,
    Interrupted,
    TrainingStop,
    catch_signals,
    follow_launcher,
    leave,
    set_phase,
    show_status,
)


def train_step(run: "Run", step: int) -> tuple[dict[str, Any], list[Row]]:
    """One step of the recipe, from prompts to new weights. Returns its metrics and its rows.

    Raises ChatStop, on every rank, before the optimiser's step. Gradients may already be
    accumulated by then: whoever goes on calls zero_grad.
    """
    cfg, limit = run.cfg, run.cfg.reward.max_response
    watch = Stopwatch(run.device)

    # 1. data: the same prompts on every rank. While the anchors' weight is 0, there are none.
    examples = data.step_examples(run.train, cfg.seed, step, cfg.prompts)
    decay = (cfg.anchor_decay, cfg.anchor_final, cfg.anchor_shape)
    weight = anchor_weight(step, cfg.anchor_peak, cfg.anchor_warmup, *decay) if cfg.anchor else 0.0
    anchors = anchor_rows(run.tokenizer, examples, cfg) if weight > 0 else []
    n_rollouts = cfg.group - 1 if weight > 0 else cfg.group
    jobs = [(example, k) for example in examples for k in range(n_rollouts)]

    # 2. rollout: each rank generates its share. 3. judge: a story is submitted as it ends.
    with watch("rollout"):
        rows = generate_rows(run, step, jobs, anchors, limit)
    n_tokens = sum(len(row.response_ids) for row in rows)

    # The groups that ended first are trained on first, while the judge still reads the others.
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)  # [5], see `accumulate`
    for part in halves(rows):
        with watch("judge_wait"):
            collect_verdicts(run, part, limit)

        # 4. grpo: each row against the rollouts of its group
        set_advantages(part, weight, cfg)

        # 5. update: one token-mean over the step, whatever the split
        with watch("update"):
            ids = [(row.prompt_ids, row.response_ids) for row in part]
            advantages = [row.advantage for row in part]
            logq = [row.logq for row in part]
            share = (n_tokens, run.mesh, cfg.micro_tokens)
            sums += accumulate(run.policy, ids, advantages, *share, logq)
    stop_if_too_many_failed(run, step, rows)
    with watch("update"):
        update = apply(run.policy, run.optimizer, sums, n_tokens, cfg.grad_clip)
    with watch("sync"):
        copy_weights(run.policy.lm, run.copy)

    # 6. records
    metrics = {"step": step, **step_metrics(rows, weight, len(examples)), "lr": cfg.lr, **update}
    return metrics | {"time": watch.seconds()}, rows


def generate_rows(
    run: "Run", step: int, jobs: list[tuple[Example, int]], anchors: list[Row], limit: int
) -> list[Row]:
    """A rollout of up to `limit` tokens for each (example, k) of `jobs`, and then the anchors.

    Returns all rows on every rank, submitted to the judge. ChatStop on all ranks if on any.
    """
    cfg, rank, n_ranks = run.cfg, run.rank, run.mesh.size()
    mine = jobs[len(jobs) * rank // n_ranks : len(jobs) * (rank + 1) // n_ranks]
    prompts = [data.encode_prompt(run.tokenizer, e.prompt, cfg.thinking) for e, _ in mine]
    seeds = [row_seed(cfg.seed, step, e.uid, k) for e, k in mine]
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.repetition_penalty, limit)
    # The same limit in validation: its stories are longer, more rows would not fit.
    most = math.ceil(cfg.prompts * cfg.group / n_ranks)

    def generate_share() -> list[Row]:
        rows: dict[int, Row] = {}

        def on_finish(r: Rollout) -> None:
            row = rollout_row(run.tokenizer, mine[r.row], prompts[r.row], r, cfg.thinking)
            rows[r.row] = row
            submit(run, row)
            bar.update()

        for anchor in anchors[rank::n_ranks]:
            submit(run, anchor)
        with run.bar(len(mine), "  generating (rank 0)") as bar:
            generate(
                run.copy, prompts, seeds, sampling, run.eos,
                vocab=run.vocab, max_rows=most, on_finish=on_finish, decoders=run.decoders,
            )  # fmt: skip
        return [rows[i] for i in range(len(mine))]

    return sum(on_all_ranks(generate_share), []) + anchors


def submit(run: "Run", row: Row) -> None:
    """Send a story to the judge. One of no words is not sent: nothing is on the page, so SQ = 0."""
    if row.story.strip():
        row.pending = run.judge.submit(row.example.prompt, row.story)
    else:
        row.pending = Future()
        row.pending.set_result(Verdict(score=0.0))
    if row.pending.done():
        row.pending.result()  # ChatStop, where the judge is gone for good: no use in going on


def collect_verdicts(run: "Run", rows: list[Row], limit: int) -> None:
    """Wait for the verdicts on these rows, on whatever rank; then each has its reward, or none."""

    def mine() -> dict[int, Verdict]:
        return {i: row.pending.result() for i, row in enumerate(rows) if row.pending}

    for verdicts in on_all_ranks(mine):
        for i, verdict in verdicts.items():
            set_reward(rows[i], verdict, run.tokenizer, run.cfg, limit)


def stop_if_too_many_failed(run: "Run", step: int, rows: list[Row]) -> None:
    """ChatStop if the judge failed on more of a step's stories than the run allows."""
    failed = [row.verdict.error for row in rows if row.verdict and row.reward is None]
    if len(failed) > run.cfg.max_judge_failures * len(rows):
        raise ChatStop(
            f"{len(failed)} of {len(rows)} stories of step {step} got no verdict from "
            f"{run.judge.url}, more than --max-judge-failures {run.cfg.max_judge_failures:g} "
            f"allows; the last reason: {failed[-1]}"
        )


# --------------------------------------------------------------------------------------------------
# Validation, checkpoints, warm start
# --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the parts of a run need.

    Identical on all ranks except mesh coordinates, judge client and generation model.
    """

    cfg: Config  # its response limit resolved
    out: Path
    mesh: DeviceMesh
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # sharded, trained
    copy: PreTrainedModel  # whole, generates
    optimizer: torch.optim.Optimizer
    judge: Judge
    train: list[Example]
    evals: list[Example]
    eval_judge: Judge | None = None  # the second one, of validations
    decoders: Decoders = field(default_factory=Decoders)
    skipped: int = 0  # steps in a row whose gradient was not finite

    @property
    def rank(self) -> int:
        return self.mesh.get_rank()

    @property
    def eos(self) -> set[int]:
        """Tokens that end a response: the template's, the tokenizer's, the generation settings'."""
        return data.stop_tokens(self.tokenizer, self.copy.generation_config, self.cfg.thinking)

    @property
    def vocab(self) -> int:
        """Ids from here on are none of the tokenizer's: they pad the model's head."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def save(self, step: int) -> None:
        save_step(self.policy, self.optimizer, self.out, step, self.cfg.keep)

    def bar(self, total: int, what: str) -> tqdm:
        hidden = self.rank != 0 or not sys.stderr.isatty()
        return tqdm(
            total=total, desc=what, leave=False, position=1, disable=hidden, dynamic_ncols=True
        )


def validate(run: Run, step: int, label: str) -> None:
    """A story for each validation prompt, judged; the same random numbers whenever it is called.

    Buckets say how many times the longest training story a prompt asks for: 1x, 2x, 3x of 4,000
    words are the paper's 1–4k, 4–8k and 8–12k. The response limit grows with the bucket.
    """
    if not run.evals:
        return
    longest = max(e.target_words for e in run.train)
    buckets: dict[int, list[Example]] = {}
    for e in run.evals:
        buckets.setdefault(math.ceil(e.target_words / longest), []).append(e)
    for factor, examples in sorted(buckets.items()):
        limit = factor * run.cfg.reward.max_response
        rows = generate_rows(run, 0, [(e, 0) for e in examples], [], limit)
        collect_verdicts(run, rows, limit)
        second = second_opinion(run.eval_judge, run, rows) if run.eval_judge else {}
        if run.rank == 0:
            numbers = summary(rows)
            head = {"step": step, "label": label, "bucket": f"{factor}x"}
            reward = {"reward": numbers.pop("reward_mean")}
            append(run.out / "evals.jsonl", head | reward | numbers | second)
            for row in rows:
                append(run.out / "eval_stories.jsonl", head | record(row))

    if run.rank == 0 and run.eval_judge:
        twice = judged_twice(read_jsonl(run.out / "evals.jsonl")[0])
        history = [(row["judge_sq"], row["eval_judge_sq"]) for row in twice]
        if warning := judges_part(history):
            say(run.out, f"warning (judges_part): {warning}")


def second_opinion(judge: Judge, run: Run, rows: list[Row]) -> dict[str, float | None]:
    """SQ of a validation's stories by both judges, where both have scored, and its correlation."""

    def mine() -> dict[int, float | None]:
        share = [i for i, row in enumerate(rows) if row.story.strip()]
        asked = {
            i: judge.submit(rows[i].example.prompt, rows[i].story)
            for i in share[run.rank :: run.mesh.size()]
        }
        return {i: future.result().score for i, future in asked.items()}

    pairs = [
        (reward.sq, score)
        for scores in on_all_ranks(mine)
        for i, score in scores.items()
        if score is not None and (reward := rows[i].reward)
    ]
    first = [sq for sq, _ in pairs]
    second = [sq for _, sq in pairs]
    numbers = {"judge_sq": mean(first), "eval_judge_sq": mean(second)}
    return numbers | {"judges_agree": agreement(first, second)}


def make_optimizer(policy: Policy, cfg: Config, lr: float) -> torch.optim.Optimizer:
    betas = (cfg.beta1, cfg.beta2)
    parameters = policy.parameters()
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=cfg.weight_decay)


def warm_start(run: Run, examples: list[Example]) -> None:
    """Supervised steps: the same update with human rows only, each of advantage 1."""
    cfg = run.cfg
    optimizer = make_optimizer(run.policy, cfg, cfg.warm_lr)
    n_rows = min(cfg.warm_rows, len(examples))
    with run.bar(cfg.warm_steps, "warm start") as bar:
        for step in range(1, cfg.warm_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = cfg.warm_lr * (1 - 0.9 * (step - 1) / cfg.warm_steps)
            stop_if_asked()
            chosen = data.step_examples(examples, cfg.seed, step, n_rows)
            rows = anchor_rows(run.tokenizer, chosen, cfg)
            ids = [(row.prompt_ids, row.response_ids) for row in rows]
            n_tokens = sum(len(row.response_ids) for row in rows)
            ones = [1.0] * len(rows)
            sums = accumulate(run.policy, ids, ones, n_tokens, run.mesh, cfg.micro_tokens)
            metrics = apply(run.policy, optimizer, sums, n_tokens, cfg.grad_clip)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            bar.update()
    copy_weights(run.policy.lm, run.copy)


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


def train(run: Run, warm_examples: list[Example]) -> None:
    """Warm start if there is one, then steps; validation before, in between and after.

    Whatever stops the run stops it between two steps, with a checkpoint of the last whole one.
    """
    cfg = run.cfg
    steps = cfg.steps or len(run.train) // cfg.prompts
    done = resume(run.policy, run.optimizer, run.out, cfg.save_every) if cfg.resume else None
    if done is not None:
        copy_weights(run.policy.lm, run.copy)
    elif warm_examples:
        warm_start(run, warm_examples)
        run.save(0)
    done = done or 0
    log = Log(run.out, cfg, steps, done) if run.rank == 0 else None
    set_phase("starting", done, state="training", steps=steps)

    def validate_if_due(step: int) -> None:
        label = {0: "before", steps: "after"}.get(step, f"step {step}")
        if step in (0, steps) or (cfg.eval_every and step % cfg.eval_every == 0):
            if step > 0:  # a validation that is cut short is done again, from here
                run.save(step)
            set_phase("validation", step)
            validate(run, step, label)

    try:
        validate_if_due(done)
        for step in range(done + 1, steps + 1):
            set_phase("data", step)
            metrics, rows = train_step(run, step)
            done = step
            warned = record_step(run, log, metrics, rows)
            if step % cfg.save_every == 0:
                run.save(step)
            validate_if_due(step)
            collapsed = [name for name in warned if name in COLLAPSE]
            if cfg.stop_on_collapse and collapsed:
                raise TrainingStop(f"{warned[collapsed[0]]} (--stop-on-collapse)")
    except (ChatStop, Interrupted, TrainingStop) as error:
        run.optimizer.zero_grad()  # what the step had begun is no part of the checkpoint
        save_before_stop(run.policy, run.optimizer, run.out, done, cfg.keep, error)
        raise


def record_step(
    run: Run, log: Log | None, metrics: dict[str, Any], rows: list[Row]
) -> dict[str, str]:
    """Records of a step, on rank 0; its new warnings, on all. TrainingStop after three bad ones."""
    stats = gather(run.judge.stats())
    warned = from_rank_0(log.step(metrics, rows, stats) if log else None)
    if warned:
        set_phase("records", warnings=STATUS.get("warnings", {}) | warned)
    run.skipped = run.skipped + 1 if metrics["skipped"] else 0
    if run.rank == 0 and metrics["skipped"]:
        step = {"step": metrics["step"]}
        ids = [{"prompt_ids": row.prompt_ids, "response_ids": row.response_ids} for row in rows]
        append(run.out / "skipped.jsonl", *[step | line for line in ids])
    if run.skipped == 3:
        raise TrainingStop(
            "the gradient was not finite in three steps in a row: a weight or a reward is broken. "
            f"Their rows are in {run.out}/skipped.jsonl; lower --lr, or go on from an earlier "
            "checkpoint (move the newer ones away)"
        )
    return warned


# --------------------------------------------------------------------------------------------------
# A run, from the command line to the report
# --------------------------------------------------------------------------------------------------


def run(cfg: Config, mesh: DeviceMesh, device: torch.device, examples: Examples) -> None:
    """A whole run, from an open process group to the report."""
    started = time.perf_counter()
    rank, main = mesh.get_rank(), mesh.get_rank() == 0
    out = Path(cfg.out)
    source = find_model(cfg.model) if cfg.model else out / "start"
    model = open_model(cfg, source, mesh, device, examples) if cfg.model else None
    with open_judges(cfg, out) as (judge, second), only_writer(out), ExitStack() as stack:
        on_all_ranks(lambda: begin(cfg, out, examples) if main else None)
        beat = Heartbeat(out, rank, mesh.size(), cfg.rank_patience, judge.stats)
        stack.enter_context(beat)
        model = model or open_model(cfg, source, mesh, device, examples)
        cfg, policy, copy = model.cfg, model.policy, model.copy
        train_on, evals = model.examples.train, model.examples.evals
        if main:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            n_long = len(examples.train) - len(train_on)
            left_out = len(examples.evals) - len(evals)
            beyond = f" ({left_out} left out: beyond 3×, or the model)" if left_out else ""
            say(
                out,
                f"{cfg.preset}: {copy.num_parameters() / 1e6:,.1f}M parameters "
                f"on {mesh.size()} × {where}\n{kernels(copy)}\n{model.checked}\n"
                f"{len(train_on)} prompts ({n_long} too long), {len(evals)} for validation{beyond}"
                f"\nresponses of up to {cfg.reward.max_response} tokens; "
                f"judge: {cfg.judge.model}\nwriting to {out}",
            )
        parts = (model.tokenizer, policy, copy, make_optimizer(policy, cfg, cfg.lr))
        state = Run(cfg, out, mesh, device, *parts, judge, train_on, evals, second)
        train(state, examples.warm)
        set_phase("export")
        export(policy, source, out / "model", rank)
        if main:
            report(out)
            print_summary(out)
            say(out, f"{(time.perf_counter() - started) / 60:.1f} minutes")


def prepare(argv: list[str]) -> tuple[Config, Examples] | int:
    """(settings, examples); or the exit status where there is nothing to run, after saying why."""
    try:
        cfg = parse(argv)
        if not cfg.out:
            cfg = replace(cfg, out=f"runs/{cfg.preset}-{datetime.now():%Y%m%d-%H%M%S}")
        return cfg, load_examples(cfg)
    except SystemExit as e:  # --help, or an option that does not exist
        return int(e.code or 0)
    except (ConfigError, DataError) as e:
        print(f"\npolaris: {e}", file=sys.stderr)
        return 2


def show_plan(argv: list[str]) -> int:
    """What a run would hold, take and cost (plan.py), said once."""
    try:
        return plan.main(argv) if int(os.environ.get("RANK", 0)) == 0 else 0
    except (ConfigError, OSError, ValueError) as e:
        print(f"\npolaris: {e}", file=sys.stderr)
        return 2


def export_checkpoint(argv: list[str]) -> None:
    """--export CHECKPOINT --out DIR: a checkpoint of a run as a model."""
    parser = argparse.ArgumentParser(prog="polaris.py", allow_abbrev=False)
    parser.add_argument("--export", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    folder = args.export.resolve()
    out = folder.parents[1]  # RUN/checkpoints/step-000020
    cfg = unflatten(saved_values({"out": str(out)}))
    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists: choose another")
    if not folder.is_dir() or (fault := fault_of(folder, 0, 1)):
        reason = fault if folder.is_dir() else "there is no such folder"
        raise RecordError(f"--export {folder}: {reason}; {out} has {list(checkpoints(out))}")
    mesh, device = setup(cfg)
    source = find_model(cfg.model) if cfg.model else out / "start"
    check_checkpoint(source, 0)
    policy, _ = load_policy(source, mesh, device, cfg.recompute)
    load_weights(policy, folder)
    export(policy, source, args.out, mesh.get_rank())
    if mesh.get_rank() == 0:
        print(f"{args.out}: the model of {folder}")


def main(argv: list[str]) -> int:
    """Exit status: 0 done; 2 settings or data; 3 the judge; 4 interrupted; 5 stopped by itself.

    1, with a traceback, is a fault of ours. 3, 4 and 5 can be resumed.
    """
    if argv[:1] == ["--status"]:
        return show_status(Path(*argv[1:2]))
    if "--plan" in argv:
        return show_plan(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    follow_launcher()
    catch_signals()
    rank = join()
    out = ""
    try:
        # Rank 0 reads settings and data for all. What is wrong with them is said once, and before
        # any rank ends: torchrun kills the others as soon as one has failed.
        if "--export" in argv:
            export_checkpoint(argv)
            return leave(0)
        prepared = from_rank_0(prepare(argv) if rank == 0 else None)
        if isinstance(prepared, int):
            return leave(prepared)
        cfg, examples = prepared
        out = cfg.out
        mesh, device = setup(cfg)
        run(cfg, mesh, device, examples)
        return leave(0, out)
    except (ConfigError, DataError, ModelError, RecordError) as e:
        return leave(2, reason=str(e))
    except (ChatStop, Interrupted, TrainingStop, FloatingPointError) as e:
        statuses: dict[type, int] = {ChatStop: 3, Interrupted: 4}
        return leave(statuses.get(type(e), 5), out, str(e))
    except Exception:
        leave(1, out, traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    # train.sh has it from a file; torchrun would drown our message in thirty lines of its own.
    sys.exit(0 if status > 1 and "POLARIS_EXIT_STATUS" in os.environ else status)
