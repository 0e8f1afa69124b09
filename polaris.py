"""POLARIS: reinforcement learning that teaches a small language model to write long stories.

    torchrun --nproc_per_node=4 polaris.py                              the miniature: offline, minutes, any machine
    torchrun --nproc_per_node=4 polaris.py --preset paper --data train.jsonl --judge-url URL
                                                                        the published run: four 80 GB GPUs
    torchrun --nproc_per_node=4 polaris.py --out runs/NAME --resume     go on after an interruption

One step of GRPO with an online judge and human-reference injection (arXiv 2606.04095), as `train_step` runs it:

    1. data      8 prompts, the same on every rank, from (seed, step) alone
    2. rollout   5 drafts a prompt, written by whole copies of the policy; the human story is the 6th row, the anchor
    3. judge     every story, anchors too, goes to the judge the moment it ends, while the others still decode
    4. grpo      A = (R - mean) / (std + 1e-6) over the group's drafts; the anchor is measured against them and weighted
    5. update    loss = - (sum over all response tokens of A · log p) / (number of response tokens in the step);
                 the groups that ended first come first, while the judge still reads the others
    6. records   metrics, stories and verdicts to disk; now and then a checkpoint and a validation

    glossary     rollout: a story written by the policy      group: the rows of one prompt      anchor: its human row
                 verdict: what the judge says of a story     advantage: how much better than its group a row did

Departures from the paper and its release (the README has the whole table):
  - The anchor reaches the gradient. In the release its response mask is empty, so its advantage multiplies nothing.
  - One token-mean over the step, whatever the number of ranks and the micro-batches. The release takes means of means.
  - No pass for old log-probs: one update a step means that the ratio is 1 and that clipping is idle. The coefficient
    -A/n_tokens of each token is known before the forward pass, so head and loss run in one sweep (grpo.onpolicy_loss).
  - A story without a verdict has no reward: it leaves the statistics and gets no gradient. It is never scored 0.
  - A story of no words is not sent to the judge: nothing is on the page, so SQ = 0, and the other terms apply.

Notably absent: a reference model and KL term, a value model, several updates a step, asynchronous rollouts, LoRA.
"""

import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import data
import reward as rewards
from chat import ChatStop, api_key
from config import Config, ConfigError, parse
from data import DataError, Example
from evals.report import print_summary, report
from grpo import anchor_weight, group_advantages
from judge import Judge, Verdict, start_stand_in
from mini import world
from policy import Policy, accumulate, apply, copy_weights, export, load, load_policy, save
from reward import Reward
from rollout import Rollout, Sampling, generate, kernels, row_seed
from rundir import append, mean, read_jsonl, rewind

# ----------------------------------------------------------------------------------------------------------------------
# A step: write, judge, compare, update
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row of a group: a rollout or the anchor. Without a verdict there is no reward, and the advantage is 0."""

    example: Example
    k: int  # number within the group; the anchor is the last
    anchor: bool
    prompt_ids: list[int]
    response_ids: list[int]  # thinking, story and EOS; no EOS if the row was cut off
    finished: bool
    thinking: str
    story: str
    verdict: Verdict | None = None
    reward: Reward | None = None
    advantage: float = 0.0


@dataclass
class Run:
    """What every part of a step needs. The same on every rank but for `mesh`'s view, `judge` and `copy`."""

    cfg: Config  # max_response resolved
    out: Path
    mesh: DeviceMesh
    device: torch.device
    tokenizer: object
    policy: Policy
    copy: nn.Module
    optimizer: torch.optim.Optimizer
    judge: Judge
    train: list[Example]
    evals: list[Example]

    @property
    def rank(self) -> int:
        return self.mesh.get_rank()

    @property
    def eos(self) -> set[int]:
        """Every token that ends a response: the tokenizer's, and those that the model's generation settings name."""
        also = self.copy.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *([also] if isinstance(also, int) else also or [])}

    def bar(self, total: int, what: str) -> tqdm:
        return tqdm(
            total=total,
            desc=what,
            leave=False,
            position=1,
            disable=self.rank != 0,
            dynamic_ncols=True,
        )


EMPTY_PAGE = Verdict(score=0.0)


def write(run: Run, step: int, jobs: list[tuple[Example, int]], anchors: list[Row], limit: int):
    """Write a story for each (example, k) of `jobs`. It goes to the judge the moment it ends; the anchors go at once.

    Returns (on every rank all rows, in the order of `jobs` then `anchors`, without verdicts; the verdicts to come on
    the rows that this rank sent, by row number). Raises ChatStop on every rank if it happened on any.
    """
    cfg, rank, world = run.cfg, run.rank, run.mesh.size()
    sampling = Sampling(
        cfg.temperature, cfg.top_p, cfg.top_k, cfg.repetition_penalty, max_new_tokens=limit
    )
    first, end = (len(jobs) * r // world for r in (rank, rank + 1))
    mine = jobs[first:end]  # neighbours share a prompt, and so its prefill
    prompts = [data.encode_prompt(run.tokenizer, e.prompt, cfg.thinking) for e, _ in mine]
    written: dict[int, Row] = {}
    verdicts: dict[int, Future] = {}

    def send(number: int, row: Row) -> None:
        if row.story.strip():
            verdicts[number] = run.judge.submit(row.example.prompt, row.story)
        else:
            verdicts[number] = Future()
            verdicts[number].set_result(EMPTY_PAGE)

    def on_finish(r: Rollout) -> None:
        body = r.ids[:-1] if r.finished else r.ids
        # Special tokens stay visible: a policy that writes them into its story is seen doing so.
        thinking, story = data.split_response(run.tokenizer.decode(body), cfg.thinking)
        example, k = mine[r.row]
        written[r.row] = Row(example, k, False, prompts[r.row], r.ids, r.finished, thinking, story)
        send(first + r.row, written[r.row])
        bar.update()
        for verdict in verdicts.values():
            if verdict.done() and verdict.exception():
                raise verdict.exception()  # the judge is gone for good: no use in writing on

    stop = ""
    with run.bar(len(mine), "  writing (rank 0)") as bar:
        try:
            for i in range(rank, len(anchors), world):
                send(len(jobs) + i, anchors[i])
            seeds = [row_seed(cfg.seed, step, e.uid, k) for e, k in mine]
            most = -(
                -cfg.prompts * cfg.group // world
            )  # also in a validation, whose stories are longer
            generate(
                run.copy, prompts, seeds, sampling, run.eos, max_rows=most, on_finish=on_finish
            )
        except ChatStop as e:
            stop = str(e)
    parts = share([written[i] for i in sorted(written)], stop)
    return [row for part in parts for row in part] + anchors, verdicts


def share(mine, stop: str) -> list:
    """What each rank has, on all ranks. Raises ChatStop on all of them if one has a reason to stop."""
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (mine, stop))
    for _, reason in everything:
        if reason:
            raise ChatStop(reason)
    return [part for part, _ in everything]


def hear(
    run: Run, rows: list[Row], wave: list[int], verdicts: dict[int, Future], limit: int
) -> None:
    """Wait for the verdicts on the rows numbered in `wave`, on every rank, and give these rows verdict and reward.

    Raises ChatStop on every rank if it happened on any.
    """
    mine, stop, cfg = {}, "", replace(run.cfg, max_response=limit)
    try:
        mine = {i: verdicts[i].result() for i in wave if i in verdicts}
    except ChatStop as e:
        stop = str(e)
    for part in share(mine, stop):
        for i, verdict in part.items():
            rows[i].verdict = verdict
            rows[i].reward = reward_of(rows[i], run.tokenizer, cfg)


def waves(rows: list[Row]) -> list[list[int]]:
    """Row numbers in two waves of whole groups: the second is judged while the first is learnt from.

    All rows decode in step, so a group has ended when its longest draft has. Those that ended first come first, up to
    about half of the tokens. The rows alone decide, never when a verdict comes: runs repeat bit for bit.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.example.uid, []).append(i)
    order = sorted(
        groups.values(),
        key=lambda g: max(len(rows[i].response_ids) for i in g if not rows[i].anchor),
    )
    tokens = [sum(len(rows[i].response_ids) for i in group) for group in order]
    cut = min(range(len(order)), key=lambda n: abs(sum(tokens[:n]) - sum(tokens) / 2))
    return [sum(part, []) for part in (order[:cut], order[cut:]) if part]


def reward_of(row: Row, tokenizer, cfg: Config) -> Reward | None:
    """The reward of a judged row; None without a verdict."""
    if row.verdict.score is None:
        return None
    n_thinking = (
        len(tokenizer(row.thinking, add_special_tokens=False).input_ids) if row.thinking else 0
    )
    n_tokens, target = len(row.response_ids), row.example.target_words
    return rewards.reward(
        row.verdict.score, row.story, target, n_tokens, n_thinking, row.finished, cfg
    )


def make_anchors(run: Run, examples: list[Example]) -> list[Row]:
    """The human row of each example, but for those longer than the response limit: cut, it would lose its ending."""
    rows = []
    for e in examples:
        response = data.encode_anchor(run.tokenizer, e, run.cfg.thinking, run.cfg.max_response)
        if response is not None:
            prompt = data.encode_prompt(run.tokenizer, e.prompt, run.cfg.thinking)
            rows.append(
                Row(e, run.cfg.group - 1, True, prompt, response, True, e.reasoning, e.story)
            )
    return rows


def advantages_of(rows: list[Row], cfg: Config, weight: float) -> Tensor:
    """Rows of whole groups, in any order → advantages [N]. Groups are told apart by their example's uid."""
    uids = {uid: i for i, uid in enumerate(dict.fromkeys(r.example.uid for r in rows))}
    return group_advantages(
        torch.tensor([r.reward.total if r.reward else float("nan") for r in rows]),
        torch.tensor([uids[r.example.uid] for r in rows]),
        torch.tensor([r.anchor for r in rows]),
        weight,
        std_floor=cfg.anchor_std_floor,
        cap=cfg.anchor_cap,
        valid=torch.tensor([r.reward is not None for r in rows]),
    )


def train_step(run: Run, step: int) -> tuple[dict, list[Row]]:
    """One step of the recipe, the six parts of the module's docstring. Returns its metrics and its rows.

    ChatStop comes before the optimiser's step, but gradients may be there: whoever goes on has to drop them.
    """
    cfg, started = run.cfg, clock(run)

    examples = data.step_examples(run.train, cfg.seed, step, cfg.prompts)
    weight = 0.0
    if cfg.anchor:
        weight = anchor_weight(
            step,
            cfg.anchor_peak,
            cfg.anchor_warmup,
            cfg.anchor_decay,
            cfg.anchor_final,
            cfg.anchor_shape,
        )
    anchors = make_anchors(run, examples) if weight > 0 else []
    drafts = cfg.group - (weight > 0)

    jobs = [(e, k) for e in examples for k in range(drafts)]
    rows, verdicts = write(run, step, jobs, anchors, cfg.max_response)
    n_tokens = sum(len(r.response_ids) for r in rows)

    written, waited, sums = clock(run), 0.0, 0.0
    for wave in waves(rows):
        asked = clock(run)
        hear(run, rows, wave, verdicts, cfg.max_response)
        waited += clock(run) - asked
        part = [rows[i] for i in wave]
        for row, advantage in zip(part, advantages_of(part, cfg, weight).tolist(), strict=True):
            row.advantage = advantage
        ids = [(r.prompt_ids, r.response_ids) for r in part]
        sums += accumulate(
            run.policy, ids, [r.advantage for r in part], n_tokens, run.mesh, cfg.micro_tokens
        )

    failed = [r for r in rows if r.reward is None]
    if len(failed) > cfg.max_judge_failures * len(rows):
        raise ChatStop(
            f"{len(failed)} of {len(rows)} stories of step {step} got no verdict from {run.judge.url}, more than "
            f"--max-judge-failures {cfg.max_judge_failures:g} allows; the last reason: {failed[-1].verdict.error}"
        )
    update_metrics = apply(run.policy, run.optimizer, sums, n_tokens, cfg.grad_clip)
    updated = clock(run)
    copy_weights(run.policy.lm, run.copy)
    done = clock(run)

    seconds = {
        "rollout": written - started,
        "judge_wait": waited,
        "update": updated - written - waited,
    }
    metrics = {"step": step, **summary([r for r in rows if not r.anchor])}
    judged = [r for r in rows if r.anchor and r.reward]
    metrics |= {
        "anchor_weight": weight,
        "anchors": len(anchors),
        "anchors_left_out": len(examples) - len(anchors) if weight > 0 else 0,
        "anchor_reward": mean(r.reward.total for r in judged),
        "anchor_advantage": mean(r.advantage for r in judged),
        "judge_failures": len(failed),
        "lr": cfg.lr,
        **update_metrics,
        "time": seconds | {"sync": done - updated, "step": done - started},
    }
    return metrics, rows


def clock(run: Run) -> float:
    """Seconds, read when a GPU has done all that was asked of it, so that its work counts where it belongs."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(rows: list[Row]) -> dict:
    """Means over the rows that have a reward; None where there is none."""
    judged = [r for r in rows if r.reward]
    words = [rewards.word_count(r.story) for r in judged]
    rewards = [r.reward.total for r in judged]
    return {
        "n": len(judged),
        "reward_mean": mean(rewards),
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        **{part: mean(getattr(r.reward, part) for r in judged) for part in PARTS},
        "length_error": mean(
            abs(w / r.example.target_words - 1) for w, r in zip(words, judged, strict=True)
        ),
        "length_ratio": mean(
            w / r.example.target_words for w, r in zip(words, judged, strict=True)
        ),
        "words": mean(words),
        "finished": mean(r.finished for r in judged),
    }


PARTS = ("sq", "rep", "len", "blank", "think", "overlong")


def validate(run: Run, step: int, label: str) -> None:
    """Write and judge a story for each validation prompt, with the same random numbers whenever it is called.

    Prompts are put into buckets by how many times the longest trained story they ask for: 1x, 2x, 3x of 4,000 words
    are the paper's 1–4k, 4–8k and 8–12k. The response limit grows with the bucket.
    """
    if not run.evals:
        return
    longest = max(e.target_words for e in run.train)
    buckets: dict[int, list[Example]] = {}
    for e in run.evals:
        buckets.setdefault(-(-e.target_words // longest), []).append(e)
    for factor, examples in sorted(buckets.items()):
        limit = factor * run.cfg.max_response
        rows, verdicts = write(run, 0, [(e, 0) for e in examples], [], limit)
        hear(run, rows, list(range(len(rows))), verdicts, limit)
        s = summary(rows)
        line = {
            "step": step,
            "label": label,
            "bucket": f"{factor}x",
            "reward": s.pop("reward_mean"),
            **s,
        }
        if run.rank == 0:
            append(run.out / "evals.jsonl", line)
            for row in rows:
                append(
                    run.out / "eval_stories.jsonl",
                    {"step": step, "label": label, "bucket": f"{factor}x", **record(row)},
                )


# ----------------------------------------------------------------------------------------------------------------------
# Records and checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def record(row: Row) -> dict:
    """A row as it goes to disk."""
    return {
        "uid": row.example.uid,
        "row": row.k,
        "anchor": row.anchor,
        "prompt": row.example.prompt,
        "target_words": row.example.target_words,
        "thinking": row.thinking,
        "story": row.story,
        "words": rewards.word_count(row.story),
        "tokens": len(row.response_ids),
        "finished": row.finished,
        "reward": asdict(row.reward) if row.reward else None,
        "verdict": asdict(row.verdict),
    }


def save_step(run: Run, step: int) -> None:
    """Checkpoint after `step`, unless it is there; only the newest `keep` stay."""
    folder = run.out / "checkpoints" / f"step-{step:06d}"
    if folder.exists():
        return
    save(run.policy, run.optimizer, folder)
    if run.rank == 0:
        for old in sorted(folder.parent.glob("step-*"))[: -run.cfg.keep]:
            shutil.rmtree(old)


def resume(run: Run) -> int | None:
    """Load the newest checkpoint, drop what a killed run recorded after it. Returns its step; None without one."""
    folders = sorted((run.out / "checkpoints").glob("step-*"))
    step = int(folders[-1].name.removeprefix("step-")) if folders else None
    dist.barrier()
    if folders:
        load(run.policy, run.optimizer, folders[-1])
        copy_weights(run.policy.lm, run.copy)
    if run.rank == 0:
        last = -1 if step is None else step
        for name, kept in {
            "metrics": last,
            "rollouts": last,
            "evals": last - 1,
            "eval_stories": last - 1,
        }.items():
            rewind(run.out / f"{name}.jsonl", kept)
    return step


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def warm_start(run: Run, examples: list[Example]) -> None:
    """Supervised steps: the same update with human rows only, each of advantage 1."""
    cfg = run.cfg
    optimizer, n_rows = (
        make_optimizer(run.policy, cfg, cfg.warm_lr),
        min(cfg.warm_rows, len(examples)),
    )
    with run.bar(cfg.warm_steps, "warm start") as bar:
        for step in range(1, cfg.warm_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = cfg.warm_lr * (1 - 0.9 * (step - 1) / cfg.warm_steps)
            rows = make_anchors(run, data.step_examples(examples, cfg.seed, step, n_rows))
            pairs = [(r.prompt_ids, r.response_ids) for r in rows]
            n_tokens = sum(len(response) for _, response in pairs)
            sums = accumulate(
                run.policy, pairs, [1.0] * len(rows), n_tokens, run.mesh, cfg.micro_tokens
            )
            metrics = apply(run.policy, optimizer, sums, n_tokens, cfg.grad_clip)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            bar.update()
    copy_weights(run.policy.lm, run.copy)


def make_optimizer(policy: Policy, cfg: Config, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        policy.parameters(), lr=lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )


def train(run: Run, warm_examples: list[Example]) -> None:
    """Warm start if there is one, then steps; validation before, in between and after.

    A validation comes after the checkpoint of its step, so one that was cut short is simply done again.
    """
    cfg, out, main = run.cfg, run.out, run.rank == 0
    steps = cfg.steps or len(run.train) // cfg.prompts
    done = resume(run) if cfg.resume else None
    if done is None:
        done = 0
        if warm_examples:
            warm_start(run, warm_examples)
            save_step(run, 0)

    def validation_due(step: int) -> str:
        if step in (0, steps):
            return "after" if step else "before"
        return f"step {step}" if cfg.eval_every and step % cfg.eval_every == 0 else ""

    if label := validation_due(done):
        validate(run, done, label)
    spent = last_judge_stats(out / "metrics.jsonl") if main else {}
    tracker = open_tracker(cfg, out) if main else None
    bar = tqdm(total=steps, initial=done, desc="steps", disable=not main, dynamic_ncols=True)
    for step in range(done + 1, steps + 1):
        try:
            metrics, rows = train_step(run, step)
        except ChatStop:
            run.optimizer.zero_grad()  # what the step had begun is no part of the checkpoint
            save_step(run, step - 1)
            raise
        stats: list = [None] * run.mesh.size()
        dist.all_gather_object(stats, run.judge.stats())
        if main:
            bill = metrics["judge"] = {
                k: spent.get(k, 0) + sum(s[k] for s in stats) for k in stats[0]
            }
            bill["dollars_projected"] = bill["dollars"] * steps / step
            for row in rows:
                append(
                    out / "rollouts.jsonl",
                    {"step": step, **record(row), "advantage": row.advantage},
                )
            append(out / "metrics.jsonl", metrics)
            if tracker:
                tracker(metrics, step)
            shown = {
                "reward": "reward_mean",
                "length error": "length_error",
                "words": "words",
                "$": "dollars",
            }
            values = {name: (metrics | bill)[key] for name, key in shown.items()}
            bar.set_postfix({name: f"{value:.2f}" for name, value in values.items() if value})
            bar.update()
        label = validation_due(step)
        if label or step % cfg.save_every == 0:
            save_step(run, step)
        if label:
            validate(run, step, label)
    bar.close()


def last_judge_stats(path: Path) -> dict:
    """What the run has spent on its judge before it was interrupted: the newest line's running totals."""
    lines = read_jsonl(path)[0] if path.exists() else []
    return lines[-1]["judge"] if lines else {}


def open_tracker(cfg: Config, out: Path):
    """A function (metrics, step) for wandb or TensorBoard; None without one."""
    if cfg.tracker == "wandb":
        import wandb

        wandb.init(project="polaris", name=out.name, config=asdict(cfg), dir=out)
        return lambda metrics, step: wandb.log(metrics, step=step)
    if cfg.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out))

        def log(metrics, step):
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        return log
    return None


def join() -> int:
    """Join the other ranks; outside torchrun, stand alone. Returns the rank."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Ranks wait for each other's judge calls, which may take several time-outs.
    patience = timedelta(hours=6)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience
        )
    return dist.get_rank()


def setup(cfg: Config) -> tuple[DeviceMesh, torch.device]:
    """Device of this rank, and the mesh: on one node one dimension; over nodes, shards inside and replicas across."""
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if cfg.device == "cuda" and gpus < local_world:
        raise ConfigError(
            f"--device cuda: {local_world} ranks but {gpus} GPUs here; start {gpus} with --nproc_per_node"
        )
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and gpus >= local_world)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    nodes = dist.get_world_size() // local_world
    if nodes > 1:
        return init_device_mesh(
            device.type, (nodes, local_world), mesh_dim_names=("replicate", "shard")
        ), device
    return init_device_mesh(device.type, (local_world,), mesh_dim_names=("shard",)), device


def load_examples(cfg: Config) -> tuple[list[Example], list[Example], list[Example]]:
    """(training, validation, warm-start) examples. Raises DataError; writes nothing."""
    if cfg.model:
        train = data.load(cfg.data, anchors=cfg.anchor, thinking=cfg.thinking)
        evals = data.load(cfg.eval_data, anchors=False) if cfg.eval_data else []
        return train, evals, train if cfg.warm_steps else []
    train = data.load(cfg.data, thinking=cfg.thinking) if cfg.data else world.fables(1000, cfg.seed)
    evals = data.load(cfg.eval_data, anchors=False) if cfg.eval_data else []
    if not evals:
        n_evals = max(1, min(cfg.eval_prompts, len(train) // 5))
        if len(train) - n_evals < cfg.prompts:
            raise ConfigError(
                f"--data {cfg.data}: of {len(train)} stories {n_evals} are held out; the rest is too few for "
                f"{cfg.prompts} prompts a step: give more stories (`data.py build` with more books or a wider window "
                "of --min-words to --max-words) or a smaller --prompts"
            )
        held_out = data.step_examples(train, cfg.seed, 1, n_evals)
        train = [e for e in train if e not in held_out]
        evals = world.stretch(held_out, max(e.target_words for e in train))
    return train, evals, world.mislead(train, cfg.seed) if cfg.warm_steps else []


def open_judge(cfg: Config, out: Path):
    """(judge client of this rank, offline judge process or None). Makes `out` once the judge has answered.

    Raises ChatStop if it cannot be reached, with nothing written.
    """
    url, process = [cfg.judge_url], None
    if not cfg.judge_url and dist.get_rank() == 0:
        process, url[0] = start_stand_in()
    dist.broadcast_object_list(url, src=0)
    key = api_key(cfg.judge_key_env, url[0])
    settings = dict(
        concurrency=cfg.judge_concurrency,
        rpm=cfg.judge_rpm,
        timeout=cfg.judge_timeout,
        retries=cfg.judge_retries,
        extra_body=json.loads(cfg.judge_extra),
        price_in=cfg.judge_price_in,
        price_out=cfg.judge_price_out,
    )
    reason = [""]
    if dist.get_rank() == 0:  # one rank asks for all, so that all of them stop together
        probe = Judge(url[0], cfg.judge_model, key, **settings)
        try:
            probe.check()
        except ChatStop as e:
            reason[0] = str(e)
        probe.close()
    dist.broadcast_object_list(reason, src=0)
    if reason[0]:
        raise ChatStop(reason[0])
    out.mkdir(parents=True, exist_ok=True)
    return Judge(url[0], cfg.judge_model, key, cache=out / "verdicts.sqlite", **settings), process


def run(cfg: Config, out: Path, mesh: DeviceMesh, device: torch.device, examples: tuple) -> None:
    """A whole run, from an open process group to the report."""
    main, started = mesh.get_rank() == 0, time.perf_counter()
    train_examples, evals, warm = examples
    client, process = open_judge(cfg, out)
    try:
        if main:
            if not cfg.resume:
                (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
            if not cfg.model and not (out / "start" / "config.json").exists():
                # Real prose has more words than the fables do; longer tokens keep its stories short.
                world.make_model(
                    out / "start", train_examples, cfg.seed, vocab_size=2048 if cfg.data else 512
                )
        dist.barrier()
        source = find_model(cfg.model) if cfg.model else out / "start"
        tokenizer = AutoTokenizer.from_pretrained(source)
        policy, copy = load_policy(source, mesh, device, cfg.recompute)
        fits = [
            e
            for e in train_examples
            if len(data.encode_prompt(tokenizer, e.prompt, cfg.thinking)) <= cfg.max_prompt
        ]
        if len(fits) < cfg.prompts:
            raise ConfigError(
                f"{len(fits)} prompts of --data are within --max-prompt {cfg.max_prompt} tokens: too few for a step"
            )
        if not cfg.max_response:
            longest = max(
                len(data.encode_anchor(tokenizer, e, cfg.thinking, 1 << 30)) for e in fits
            )
            cfg = replace(cfg, max_response=-(-longest * 3 // 2 // 32) * 32)
        if main:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            print(
                f"{cfg.preset}: {copy.num_parameters() / 1e6:,.1f}M parameters on {mesh.size()} × {where}\n"
                f"{kernels(copy)}\n"
                f"{len(fits)} prompts ({len(train_examples) - len(fits)} too long), {len(evals)} for validation\n"
                f"responses of up to {cfg.max_response} tokens; judge: {cfg.judge_model}\n"
                f"writing to {out}"
            )
        optimizer = make_optimizer(policy, cfg, cfg.lr)
        state = Run(cfg, out, mesh, device, tokenizer, policy, copy, optimizer, client, fits, evals)
        train(state, warm)
        export(policy, source, out / "model", mesh.get_rank())
        if main:
            report(out)
            print_summary(out)
            print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    finally:
        client.close()
        if process:
            process.stdin.close()  # the offline judge ends with it, as it does when this process is killed
            process.wait()


def find_model(name: str) -> Path:
    """A local directory, or a snapshot of a repository on the Hugging Face Hub, fetched once per machine."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # comes with transformers

    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf"])
    dist.barrier()
    return Path(snapshot_download(name, local_files_only=True))


def prepare(argv: list[str]) -> tuple[Config, tuple] | int:
    """(configuration, examples); or the exit status where there is nothing to run, after saying why."""
    try:
        cfg = parse(argv)
        cfg = replace(cfg, out=cfg.out or f"runs/{cfg.preset}-{datetime.now():%Y%m%d-%H%M%S}")
        return cfg, load_examples(cfg)
    except SystemExit as e:  # --help, or an option that does not exist
        return e.code
    except (ConfigError, DataError) as e:
        print(f"\npolaris: {e}", file=sys.stderr)
        return 2


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 a setting or the data cannot work, 3 the judge failed (go on with --resume)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rank = join()
    try:
        # Rank 0 reads settings and data for all. What is wrong with them is said once, and before any rank ends:
        # torchrun kills the others as soon as one has failed.
        plan = [prepare(argv) if rank == 0 else None]
        dist.broadcast_object_list(plan, src=0)
        if isinstance(plan[0], int):
            return plan[0]
        cfg, examples = plan[0]
        mesh, device = setup(cfg)
        run(cfg, Path(cfg.out), mesh, device, examples)
    except (ConfigError, DataError, ChatStop) as e:
        if rank == 0:
            print(f"\npolaris: {e}", file=sys.stderr)
            if isinstance(e, ChatStop) and (Path(cfg.out) / "config.json").exists():
                print(
                    f"Nothing is lost: go on with --out {cfg.out} --resume once the judge is back.",
                    file=sys.stderr,
                )
        return 3 if isinstance(e, ChatStop) else 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
