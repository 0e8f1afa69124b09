"""What fits: the bytes of a run, part by part, from configurations alone: no weights, no GPU.

    a decode step moves   weights + rows · (keys and values + 2 · recurrent states)
    a GPU holds           the sum of the `Part`s of the fullest phase of a step

Not counted: CUDA's context, NCCL's buffers, fragmentation, and what a layer's gradients take while
they are made.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from config import Config
from grpo import CHUNK_ROWS
from rollout import prefill, tensors_of, whole_buckets

# Generation; loss head; backward through the layers; reduction of the root's gradients; optimiser.
PHASES = "generation head layers root optimiser".split()


class Part(NamedTuple):
    name: str
    size: float  # bytes
    phases: list[str]  # of PHASES: when a GPU holds it


def meta_model(config: PretrainedConfig) -> Any:
    """The model in bf16 without weights: every tensor has a shape and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


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


def memory(config: PretrainedConfig, run: Config, ranks: int, fused: bool = False) -> list[Part]:
    """What one of `ranks` GPUs holds in a run. `fused`: as in `layer_activations`."""
    model = meta_model(config)
    layer = max(sum(p.numel() for p in module.parameters()) for module in model.model.layers)
    width, depth, tokens = config.hidden_size, config.num_hidden_layers, run.micro_tokens
    ends = config.vocab_size * width  # parameters of the embedding, or of the head
    rows = math.ceil(run.prompts * run.group / ranks)
    length = whole_buckets(run.max_prompt + run.reward.max_response, "cuda")
    cache = rows * sum(row_bytes(model, length))
    logits = CHUNK_ROWS["cuda"] * config.vocab_size * 4
    whole = model.num_parameters()
    share, always = whole / ranks, " ".join(PHASES)
    rule = "fused" if fused else "in torch"
    kept = layer_activations(model, tokens, fused)
    inputs, gathered = 2 * depth * tokens * width, (2 * 2 + 2 + 4 + 4 / ranks) * layer
    parts = [
        (f"fp32 master weights, 1/{ranks}", 4 * share, always),
        (f"AdamW moments, 1/{ranks}", 8 * share, always),
        ("full bf16 copy used for generation", 2 * whole, always),
        (f"its KV cache and states: {rows} rows of {length:,} tokens", cache, always),
        (f"fp32 gradients, 1/{ranks}", 4 * share, "head layers root optimiser"),
        ("embedding and head, gathered, bf16", 2 * 2 * ends, "head layers root"),
        (f"inputs of {depth} layers, {tokens:,} tokens, bf16", inputs, "head layers"),
        ("head's gradient, fp32 sum", 4 * ends, "head"),
        ("logits of a chunk, fp32; then that sum in bf16", max(logits, 2 * ends), "head"),
        ("head's gradient, bf16", 2 * ends, "layers root"),
        (f"one layer recomputed, delta rule {rule}", kept, "layers"),
        ("two layers gathered, bf16; a gradient, bf16 and fp32", gathered, "layers"),
        ("embedding's gradient, bf16", 2 * ends, "root"),
        ("both reduced in fp32, in and out", 2 * (4 + 4 / ranks) * ends, "root"),
        (f"AdamW's own square roots, fp32, 1/{ranks}", 4 * share, "optimiser"),
    ]
    return [Part(name, size, phases.split()) for name, size, phases in parts]


def layer_activations(model: Any, tokens: int, fused: bool) -> int:
    """Bytes that a decoder layer keeps for its backward pass at [1, tokens]: the largest kind's.

    Attention keeps inputs and output, as in a kernel; with `fused` (flash-linear-attention) so does
    the delta rule, else all that it makes.
    """
    kinds, shape = model.config.layer_types, (1, tokens, model.config.hidden_size)
    x = torch.empty(shape, dtype=model.dtype, device="meta", requires_grad=True)
    positions = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    angles = model.model.rotary_emb(x, positions.expand(3, 1, tokens))
    most = 0
    for kind in set(kinds):
        layer = model.model.layers[kinds.index(kind)]
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor, weights=weights, kept=kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # alive, so that no other takes its number
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with _fused_kernels(model, fused), hooks:
            layer(x, position_embeddings=angles, attention_mask=None, position_ids=positions)
        most = max(most, sum(storage.nbytes() for storage in kept.values()))
    return most


@contextmanager
def _fused_kernels(model: Any, delta_rule: bool) -> Iterator[None]:
    """Attention, perhaps the delta rule, as kernels that keep inputs and output."""
    code: Any = sys.modules[type(model).__module__]
    attention, delta = F.scaled_dot_product_attention, code.torch_chunk_gated_delta_rule
    F.scaled_dot_product_attention = lambda q, k, v, **_: _Kept.apply(q, q, k, v)
    if delta_rule:
        code.torch_chunk_gated_delta_rule = _kept_delta_rule
    try:
        yield
    finally:
        F.scaled_dot_product_attention, code.torch_chunk_gated_delta_rule = attention, delta


def _kept_delta_rule(q, k, v, g, beta, **_):
    return _Kept.apply(v, q, k, v, g, beta), None


class _Kept(torch.autograd.Function):
    """A kernel that keeps its inputs and an output like `out`, for counting."""

    @staticmethod
    def forward(ctx, out, *inputs):
        result = torch.empty_like(out)
        ctx.save_for_backward(*inputs, result)
        return result
