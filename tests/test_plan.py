"""plan.py: bytes counted on meta tensors equal the formulas, and counting leaves nothing behind."""

import pytest
from test_rollout import make
from torch.nn import functional as F
from transformers import Qwen3_5TextConfig

import plan
from config import Config


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3.5"])
def test_a_decode_step_moves_weights_caches_and_states(name):
    model = make(name)
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attention, delta = (kinds.count(kind) for kind in ("full_attention", "linear_attention"))
    keys = attention * 2 * config.num_key_value_heads * config.head_dim * 4
    states = 0
    if delta:
        k, v = config.linear_key_head_dim, config.linear_value_head_dim
        heads_k, heads_v = config.linear_num_key_heads, config.linear_num_value_heads
        taps = (2 * heads_k * k + heads_v * v) * config.linear_conv_kernel_dim
        states = delta * 4 * (heads_v * k * v + taps)
    assert plan.row_bytes(model, 100) == (100 * keys, states)
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    assert plan.step_bytes(model, 3, 100) == weights + 3 * (100 * keys + 2 * states)
    assert plan.step_bytes(plan.meta_model(config), 0, 0) == weights / 2  # bf16


def test_the_published_run_on_four_gpus():
    before = F.scaled_dot_product_attention
    parts = plan.memory(Qwen3_5TextConfig(), Config(), ranks=4)
    assert F.scaled_dot_product_attention is before
    held = {p: sum(part.size for part in parts if p in part.phases) / 1e9 for p in plan.PHASES}
    known = {"generation": 48.8, "head": 72.2, "layers": 79.4, "root": 76.1, "optimiser": 66.7}
    assert held == pytest.approx(known, abs=0.06)
    fused = plan.memory(Qwen3_5TextConfig(), Config(), ranks=4, fused=True)
    saved = sum(part.size for part in parts) - sum(part.size for part in fused)
    assert saved / 1e9 == pytest.approx(3.77, abs=0.01)
