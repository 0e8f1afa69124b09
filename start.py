"""What stands before the first step: examples, the judge, the model and its self-check.

All of it comes before anything is paid for, and what cannot work is refused here with its reason.
The model that is trained, that samples and that is exported has to be one function: `open_model`
compares their log-probs on a real text at every start.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download  # comes with transformers
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import data
from config import Config, ConfigError, flatten
from data import Example
from judge import Judge, start_stand_in
from mini import world
from policy import (
    ModelError,
    Policy,
    check_checkpoint,
    check_policy,
    load_policy,
    model_logps,
)
from ranks import from_rank_0, on_all_ranks
from rollout import Sampling, generate, row_seed
from rows import (
    anchor_rows,
)
from rundir import RecordError, fingerprint, sweep, write
from watch import (
    settle_bill,
)


@dataclass
class Examples:
    train: list[Example]
    evals: list[Example]
    warm: list[Example]  # of the supervised warm start


def load_examples(cfg: Config) -> Examples:
    """What a run reads, or makes for the miniature. Raises DataError; writes nothing."""
    evals = data.load(cfg.eval_data, anchors=False) if cfg.eval_data else []
    if cfg.model:
        train = data.load(cfg.data, anchors=cfg.anchor, thinking=cfg.thinking)
        return Examples(train, evals, train if cfg.warm_steps else [])
    if cfg.data:
        train = data.load(cfg.data, thinking=cfg.thinking)
    else:
        train = world.fables(1000, cfg.seed)
    if not evals:
        n_evals = max(1, min(cfg.eval_prompts, len(train) // 5))
        if len(train) - n_evals < cfg.prompts:
            raise ConfigError(
                f"--data {cfg.data}: of {len(train)} stories {n_evals} are held out; the rest is "
                f"too few for {cfg.prompts} prompts a step: give more stories (`data.py build` "
                "with more books or a wider window of --min-words to --max-words) or a smaller "
                "--prompts"
            )
        held_out = data.step_examples(train, cfg.seed, 1, n_evals)
        train = [e for e in train if e not in held_out]
        evals = world.stretch(held_out, max(e.target_words for e in train))
    return Examples(train, evals, world.mislead(train, cfg.seed) if cfg.warm_steps else [])


@contextmanager
def open_judges(cfg: Config, out: Path) -> Iterator[tuple[Judge, Judge | None]]:
    """This rank's judge clients; the stand-in judge runs beside it where no other is named.

    Makes `out` once the judges have answered. ChatStop, on all ranks, if one cannot be reached.
    """
    url, process = cfg.judge.url, None
    if not url and dist.get_rank() == 0:
        process, url = start_stand_in()
    named = {"judge": replace(cfg.judge, url=from_rank_0(url))}
    if cfg.eval_judge.url:
        named["eval-judge"] = cfg.eval_judge

    def probe() -> None:  # one rank asks for all
        for name, options in named.items() if dist.get_rank() == 0 else ():
            with options.open(Judge, prefix=name) as judge:
                judge.check()

    try:
        on_all_ranks(probe)
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            kept = {"cache": out / "verdicts.sqlite"}
            opened = [o.open(Judge, prefix=name, **kept) for name, o in named.items()]
            judge, *second = [stack.enter_context(judge) for judge in opened]
            yield judge, second[0] if second else None
    finally:
        if process and process.stdin:
            process.stdin.close()  # it ends with it, as it does when this process is killed
            process.wait()


def find_model(name: str) -> Path:
    """A local directory, or a snapshot from the Hugging Face Hub, fetched once per machine."""
    if Path(name).is_dir():
        return Path(name)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf"])
    dist.barrier()
    return Path(snapshot_download(name, local_files_only=True))


@dataclass
class Model:
    """What `open_model` makes of a checkpoint, and the settings and examples that fit it."""

    cfg: Config
    examples: Examples
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    copy: PreTrainedModel
    checked: str  # what the self-check found, in a line


def open_model(
    cfg: Config, source: Path, mesh: DeviceMesh, device: torch.device, examples: Examples
) -> Model:
    """Load a checkpoint and check that what is trained, sampled and exported is one function.

    Writes and pays for nothing. ConfigError, DataError or ModelError where that cannot be.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    cfg, fitting = fit(cfg, tokenizer, examples)
    limit = cfg.reward.max_response
    positions = check_checkpoint(source, cfg.max_prompt + limit)
    longest = max(e.target_words for e in fitting)
    most = min(3, (positions - cfg.max_prompt) // limit)  # of the validation's buckets
    evals = [e for e in examples.evals if e.target_words <= most * longest]
    examples = Examples(fitting, evals, examples.warm)
    temperature = cfg.temperature
    policy, copy = load_policy(source, mesh, device, cfg.recompute, temperature)

    def self_check() -> float:
        example = next((e for e in fitting if e.story), fitting[0])
        prompt = data.encode_prompt(tokenizer, example.prompt, cfg.thinking)
        anchor = data.check_anchor(tokenizer, example, cfg.thinking) if example.story else []
        difference = check_policy(policy, copy, [*prompt, *anchor[:200], *prompt[:1]])
        sampling = Sampling(temperature, 1.0, 0, 1.0, 8)  # log q is the model's own log-prob
        try:
            [r] = generate(copy, [prompt], [row_seed(cfg.seed, 0, "", 0)], sampling, -1)
        except Exception as e:  # whatever a model's own code says of how it is decoded
            raise ModelError(f"{source}: {type(copy).__name__} cannot be sampled from: {e}") from e
        logp = model_logps(copy, prompt + r.ids, temperature)[0][-8:].sum().item()
        if not abs(r.logq - logp) < (1e-2 if copy.dtype == torch.float32 else 1.0):
            what = f"log-probs of {r.logq:.3f} in sampling and {logp:.3f} in training"
            raise ModelError(f"{source}: {type(copy).__name__} gives a text {what}")
        return difference

    difference = max(on_all_ranks(self_check))
    end = tokenizer.decode(data.turn_end(tokenizer, cfg.thinking)[-1:])
    same = f"policy and sampler are the model (log-probs equal to {difference:.0e})"
    checked = f"checked: {same}, it can be exported, turns end with {end}"
    return Model(cfg, examples, tokenizer, policy, copy, checked)


def begin(cfg: Config, out: Path, examples: Examples) -> None:
    """config.json and the miniature's model; of a resumed run, check what it was made from."""
    sweep(out)
    settle_bill(out)
    paths = [Path(path) for path in (cfg.data, cfg.eval_data, cfg.model) if path]
    prints = {str(path): fingerprint(path) for path in paths if path.exists()}
    saved = out / "config.json"
    record = {**flatten(cfg), "fingerprint": prints, "resumed": []}
    if cfg.resume:
        old = json.loads(saved.read_text())
        before = old.get("fingerprint", {})
        if changed := [path for path in prints if before.get(path, prints[path]) != prints[path]]:
            raise RecordError(
                f"{changed[0]} is not what this run began with: bring the old one back, or start a "
                "new run"
            )
        now = {"at": time.strftime("%Y-%m-%d %H:%M:%S")}
        now |= {k: v for k, v in flatten(cfg).items() if k in old and old[k] != v and k != "resume"}
        record = {**old, "resumed": [*old.get("resumed", []), now]}
    write(saved, json.dumps(record, indent=1) + "\n")
    if not cfg.model and not (out / "start").exists():
        # Real prose has more words than the fables do: longer tokens keep stories short.
        vocab_size = 2048 if cfg.data else 512
        world.make_model(out / ".start.tmp", examples.train, cfg.seed, vocab_size)
        (out / ".start.tmp").rename(out / "start")


def fit(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> tuple[Config, list[Example]]:
    """The examples whose prompts fit, and the settings with a response limit for their anchors."""
    fitting = [
        e
        for e in examples.train
        if len(data.encode_prompt(tokenizer, e.prompt, cfg.thinking)) <= cfg.max_prompt
    ]
    if len(fitting) < cfg.prompts:
        raise ConfigError(
            f"{len(fitting)} prompts of --data are within --max-prompt {cfg.max_prompt} tokens: "
            "too few for a step"
        )
    if not cfg.reward.max_response:
        unlimited = sys.maxsize
        anchors = [data.encode_anchor(tokenizer, e, cfg.thinking, unlimited) for e in fitting]
        longest = max(len(ids) for ids in anchors if ids)
        limit = math.ceil(longest * 3 // 2 / 32) * 32
        cfg = replace(cfg, reward=replace(cfg.reward, max_response=limit))
    if examples.warm and not anchor_rows(tokenizer, examples.warm, cfg):
        raise ConfigError(
            f"no story of --data is within --max-response {cfg.reward.max_response} tokens: the "
            "warm start has nothing to train on"
        )
    return cfg, fitting
