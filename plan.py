"""What fits: the bytes of a run, part by part, from configurations alone: no weights, no GPU.

    a decode step moves   weights + rows · (keys and values + 2 · recurrent states)
    a rank holds          the sum of the `Part`s of the fullest phase of a step

    python polaris.py --plan --preset paper --data train.jsonl --ranks 4 --card-gb 80

Not counted: CUDA's context, NCCL's buffers, fragmentation, and what a layer's gradients take while
they are made; on a CPU Python and its libraries, about 0.5 GB a rank.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from config import Config, ConfigError, parse
from grpo import CHUNK_ROWS
from judge import judge_messages
from rollout import empty_cache, prefill, tensors_of, whole_buckets

# Generation; loss head; backward through the layers; reduction of the root's gradients; optimiser.
PHASES = "generation head layers root optimiser".split()


class Part(NamedTuple):
    name: str
    size: float  # bytes
    phases: list[str]  # of PHASES: when a rank holds it


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model without weights: every tensor has a shape and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def row_bytes(model: Any, length: float) -> tuple[float, float]:
    """Bytes that one row of `length` tokens holds: (keys and values, recurrent states)."""
    keys = states = 0
    for layer in prefill(model, [0]).layers:  # one token tells every shape
        size = sum(t.nbytes for t in tensors_of(layer))
        if type(layer) is DynamicLayer:
            keys += size
        else:
            states += size
    return keys * length, states


def step_bytes(model: Any, rows: int, length: float) -> float:
    """Bytes that a decode step must move for `rows` rows of `length` tokens."""
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.get_text_config().tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # a few rows of it are looked up
    cache, states = row_bytes(model, length)
    return weights + rows * (cache + 2 * states)


def memory(
    config: PretrainedConfig, run: Config, ranks: int, fused: bool = False, device: str = "cuda"
) -> list[Part]:
    """What one of `ranks` holds in a run. `fused`: as in `layer_activations`."""
    cuda = device == "cuda"
    dtype, wide = (torch.bfloat16, 2) if cuda else (torch.float32, 4)  # wide: bytes of a number
    name = "bf16" if cuda else "fp32"
    model = meta_model(config, dtype)
    config = model.config.get_text_config(decoder=True)
    layer = max(sum(p.numel() for p in module.parameters()) for module in model.model.layers)
    width, depth = config.hidden_size, config.num_hidden_layers
    table = config.vocab_size * width  # parameters of the embedding, or of the head
    ends = table if config.tie_word_embeddings else 2 * table
    rows = math.ceil(run.prompts * run.group / ranks)
    row = run.max_prompt + run.reward.max_response
    # A step is trained on in two parts.
    tokens = max(row, min(run.micro_tokens, math.ceil(rows / 2) * row))
    length = whole_buckets(row, device)
    cache = rows * sum(row_bytes(model, length))
    logits = CHUNK_ROWS[device] * config.vocab_size * 4
    whole = model.num_parameters()
    share, always = whole / ranks, " ".join(PHASES)
    rule = "fused" if fused else "in torch"
    kept = layer_activations(model, tokens, fused)
    inputs = wide * depth * tokens * width
    gathered = (2 * wide + wide + 4 + 4 / ranks) * layer
    # Triton reads a chunk of logits where it lies; torch makes two more of it.
    head = [max(logits, 2 * table), 2 * table] if cuda else [3 * logits, 4 * table]
    parts = [
        (f"fp32 master weights, 1/{ranks}", 4 * share, always),
        (f"AdamW moments, 1/{ranks}", 8 * share, always),
        (f"full {name} copy used for generation", wide * whole, always),
        (f"its KV cache and states: {rows} rows of {length:,} tokens", cache, always),
        (f"fp32 gradients, 1/{ranks}", 4 * share, "head layers root optimiser"),
        (f"embedding and head, gathered, {name}", wide * ends, "head layers root"),
        (f"inputs of {depth} layers, {tokens:,} tokens, {name}", inputs, "head layers"),
        ("head's gradient, fp32 sum", 4 * table, "head"),
        (f"logits of a chunk, fp32; then that sum in {name}", head[0], "head"),
        (f"head's gradient, {name}", head[1], "layers root"),
        (f"one layer recomputed, delta rule {rule}", kept, "layers"),
        (f"two layers gathered, {name}; a gradient, {name} and fp32", gathered, "layers"),
        (f"embedding's gradient, {name}", wide * table, "root"),
        ("both reduced in fp32, in and out", (4 + 4 / ranks) * ends, "root"),
        (f"AdamW's own square roots, fp32, 1/{ranks}", 4 * share, "optimiser"),
    ]
    if not run.recompute:
        parts.append(
            (f"the other {depth - 1} layers' activations", kept * (depth - 1), "head layers")
        )
    return [Part(name, size, phases.split()) for name, size, phases in parts]


def peak(parts: list[Part]) -> tuple[float, str]:
    """(bytes, phase) of the fullest phase."""
    held = {phase: sum(p.size for p in parts if phase in p.phases) for phase in PHASES}
    phase = max(held, key=lambda name: held[name])
    return held[phase], phase


@torch.no_grad()
def layer_activations(model: Any, tokens: int, fused: bool) -> int:
    """Bytes that a decoder layer keeps for its backward pass at [1, tokens]: the largest kind's.

    Attention keeps inputs and output, as in a kernel; with `fused` (flash-linear-attention) so does
    the delta rule, else all that it makes.
    """
    layers = model.model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    calls: dict[str, Any] = {}  # what the model gives to the first layer of each kind
    hooks: Any = []
    for kind in set(kinds):

        def note(module, args, kwargs, kind=kind):
            calls[kind] = module, args, kwargs

        layer = layers[kinds.index(kind)]
        hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    model.model(ids, past_key_values=empty_cache(model))  # with a cache no mask asks what ids are
    for hook in hooks:
        hook.remove()
    most = 0
    for layer, (x, *args), options in calls.values():
        x = torch.empty_like(x, requires_grad=True)
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor, weights=weights, kept=kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # alive, so that no other takes its number
            return tensor

        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), _fused_kernels(model, fused), saved:
            layer(x, *args, **{**options, "past_key_values": None})
        most = max(most, sum(storage.nbytes() for storage in kept.values()))
    return most


@contextmanager
def _fused_kernels(model: Any, delta_rule: bool) -> Iterator[None]:
    """Attention, perhaps the delta rule, as kernels that keep inputs and output."""
    code: Any = sys.modules[type(model).__module__]
    attention = F.scaled_dot_product_attention
    delta = getattr(code, "torch_chunk_gated_delta_rule", None)
    F.scaled_dot_product_attention = lambda q, k, v, **_: _Kept.apply(q, q, k, v)
    if delta_rule and delta:
        code.torch_chunk_gated_delta_rule = _kept_delta_rule
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        if delta:
            code.torch_chunk_gated_delta_rule = delta


def _kept_delta_rule(q, k, v, g, beta, **_):
    return _Kept.apply(v, q, k, v, g, beta), None


class _Kept(torch.autograd.Function):
    """A kernel that keeps its inputs and an output like `out`, for counting."""

    @staticmethod
    def forward(ctx, out, *inputs):
        result = torch.empty_like(out)
        ctx.save_for_backward(*inputs, result)
        return result


# ------ polaris.py --plan

PAIRS = 1388  # of the paper, where no --data is named
ANSWER = 5000  # tokens of a verdict and the thinking before it, about


def main(argv: list[str]) -> int:
    """Print what a run would hold, take and cost. Exit status 0, or 2 where it does not fit."""
    parser = argparse.ArgumentParser(prog="polaris.py --plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true")
    world = int(os.environ.get("WORLD_SIZE", 4))
    parser.add_argument("--ranks", type=int, default=world, help="ranks [torchrun's, or 4]")
    parser.add_argument(
        "--card-gb", type=float, default=0, help="GiB of a GPU [the one that is here]"
    )
    args, rest = parser.parse_known_args(argv)
    cfg = parse(rest, complete=False)
    if not cfg.model:
        raise ConfigError("--plan is for real models: name one with --model, and a --preset")
    cuda = bool(args.card_gb or torch.cuda.is_available()) and cfg.device != "cpu"
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    memory_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = (args.card_gb * 2**30 or here) - 1.5e9 if cuda else memory_here / args.ranks - 0.5e9
    device = "cuda" if cuda else "cpu"
    model = AutoConfig.from_pretrained(cfg.model)
    parts = memory(model, cfg, args.ranks, device=device)
    size, phase = peak(parts)
    what = "GPU" if cuda else "CPU rank"
    print(f"{cfg.model}: one of {args.ranks} {what}s, in GB, fullest in the phase `{phase}`\n")
    for part in sorted(parts, key=lambda part: -part.size):
        if phase in part.phases:
            print(f"{part.size / 1e9:9.2f}  {part.name}")
    print(f"{size / 1e9:9.2f}  in all; {room / 1e9:.2f} are there\n")
    fits = size <= room
    print(
        "It fits." if fits else f"It does not fit. {remedy(model, cfg, args.ranks, device, room)}"
    )
    print(costs(cfg))
    return 0 if fits else 2


def remedy(model: PretrainedConfig, cfg: Config, ranks: int, device: str, room: float) -> str:
    """The first change that makes a run fit, in a sentence."""
    row = cfg.max_prompt + cfg.reward.max_response
    lean = replace(cfg, recompute=True, micro_tokens=row)
    tries = [("--recompute", replace(cfg, recompute=True), ranks)]
    tries.append((f"--recompute --micro-tokens {row}", lean, ranks))
    for n in (2, 4, 8) if device == "cuda" else ():
        tries.append((f"--micro-tokens {row} on {ranks * n} GPUs", lean, ranks * n))
    for n in (2, 4, 8):
        limit = cfg.reward.max_response // n
        short = replace(lean, micro_tokens=1, reward=replace(cfg.reward, max_response=limit))
        tries.append((f"--recompute --micro-tokens 1 --max-response {limit}", short, ranks))
    for text, changed, n in tries:
        if peak(memory(model, changed, n, device=device))[0] <= room:
            return f"It does with {text}."
    return "No option makes it fit: take a smaller model or a larger card."


def costs(cfg: Config) -> str:
    """Steps, tokens, judge calls and dollars of a run, in lines."""
    path, words = Path(cfg.data), [2500.0]
    n_pairs, source = PAIRS, "as in the paper"
    if cfg.data and path.is_file():
        lines = [json.loads(line) for line in path.open(encoding="utf-8") if line.strip()]
        n_pairs, source = len(lines), str(path)
        words = [len(line.get("story", "").split()) for line in lines] or words
    n_evals = 0
    if cfg.eval_data and Path(cfg.eval_data).is_file():
        n_evals = sum(bool(line.strip()) for line in open(cfg.eval_data, encoding="utf-8"))
    steps = cfg.steps or n_pairs // cfg.prompts
    rows = steps * cfg.prompts * cfg.group
    human = steps * cfg.prompts if cfg.anchor else 0  # of these rows
    validations = 2 + ((steps - 1) // cfg.eval_every if cfg.eval_every else 0)
    # Anchors are judged once, however often they are met.
    calls = rows - human + min(n_pairs, human) + n_evals * validations
    story = sum(words) / len(words) * 4 / 3  # tokens
    asked = sum(len(m["content"]) for m in judge_messages("", "", "")) / 4 + story
    dollars = calls * (asked * cfg.judge.price_in + ANSWER * cfg.judge.price_out) / 1e6
    bill = f"about ${dollars:,.0f}" if dollars else "free, or name --judge-price-in and -out"
    tokens = rows * cfg.reward.max_response / 1e6
    return (
        f"{steps:,} steps of {cfg.prompts} prompts ({n_pairs:,} pairs, {source}), {rows:,} rows of "
        f"at most {cfg.reward.max_response:,} tokens: {tokens:,.1f} million tokens\n"
        f"{calls:,} judge calls of about {asked:,.0f} tokens and {ANSWER:,} in answer: {bill}"
    )
