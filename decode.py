"""One token through the layers of a model, in few kernels: what `rollout.py` decodes with.

With few rows a token costs what it takes to read weights and states once, if kernels are few. A
step of Qwen3.5-9B (32 layers, 10 rows, with sampling), counted:

                                kernels   sweeps over a state   programs a head's cache
    transformers' own modules     2,232            13                      1
    here, in torch                1,573             5                      1
    here, in Triton, on a GPU       747             2            1 per 256 positions

Attention of one token over the S positions of a row's cache, in parts P of 256 positions, so that
ten rows still fill a GPU (as flash-decoding does):

    z_s = scale q.k_s + mask_s;   o_P = softmax(z over P) v,   lse_P = log sum_P exp z_s
    o = softmax(lse over P) o_P

Gated DeltaNet (arXiv 2412.06464): a state S [K, V] a value head, fp32; decay a, write strength b:

    S <- a S + k (b (v - a S'k))',   o = S'q

All of it rounds where the model rounds: in bf16, too, what is sampled is what is trained. Layers
are known by class name (`LEAN`); others stay as they are.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the same in torch
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED = {"cuda": triton is not None, "cpu": triton is not None and INTERPRETED}
PART = 256  # positions of a cache that one program reads


def fused(x: Tensor) -> bool:
    """Whether the kernels in Triton can take `x`."""
    return FUSED[x.device.type] and x.dtype != torch.float64


# ------ attention


def _attend(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **_):
    """query [R, H, 1, D]; key, value [R, KV, S, D]; additive mask [R, 1, 1, S] -> [R, 1, H, D].

    The query heads of a key head are H / KV queries to it: the cache is never repeated.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("rollout.py decodes attention without a soft cap and without sinks")
    (rows, heads, _, dim), kv = query.shape, key.shape[1]
    query = query.reshape(rows, kv, heads // kv, dim)
    if fused(query) and key.shape == value.shape:
        out = _attend_triton(query, key, value, attention_mask, scaling)
    else:
        options = {"attn_mask": attention_mask, "scale": scaling}
        out = F.scaled_dot_product_attention(query, key, value, **options)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register("rollout_decode", _attend)


def _attend_triton(query, key, value, mask, scaling):
    """query [R, KV, G, D]; key, value [R, KV, S, D], rows of one static tensor -> [R, KV, G, D]."""
    rows, kv, group, dim = query.shape
    positions, lanes = key.shape[2], rows * kv
    parts = triton.cdiv(positions, PART)
    out = query.new_empty(lanes, parts, group, dim, dtype=torch.float32)
    lse = query.new_empty(lanes, parts, group, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(dim))
    block_g = max(16, triton.next_power_of_2(group))
    block = max(16, min(64, 16384 // (block_d * key.itemsize)))  # 16 KB of keys a turn
    tensors = query.contiguous(), key, value, mask, out, lse
    sizes = {"KV": kv, "G": group, "D": dim, "PART": PART}
    sizes |= {"BLOCK_D": block_d, "BLOCK_G": block_g, "BLOCK": block}
    _attend_kernel[lanes, parts](*tensors, scaling, key.stride(0) // kv, positions, **sizes)
    return (lse.softmax(1)[..., None] * out).sum(1).type_as(query).view(query.shape)


# ------ norms


def _rms_norm(module, x):
    """w * round(x / rms): Qwen2, Qwen3, Llama."""
    if fused(x):
        return _norm_triton(x, module.weight, module.variance_epsilon)
    if x.dtype == torch.float32:  # nothing to round in between
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return F.rms_norm(x, module.weight.shape, eps=module.variance_epsilon) * module.weight


def _rms_norm_about_one(module, x):
    """round((1 + w) * x / rms): Qwen3.5."""
    if fused(x):
        return _norm_triton(x, module.weight, module.eps, about_one=True)
    weight = module.weight.float() + 1
    return F.rms_norm(x.float(), weight.shape, weight, module.eps).type_as(x)


def _norm_triton(x, weight, eps, about_one=False, gate=None):
    """x [..., D] with one stride between its rows; gate [..., D] contiguous."""
    rows, dim = x.flatten(0, -2), x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    gated = gate is not None
    block = triton.next_power_of_2(dim)
    options = {"ABOUT_ONE": about_one, "GATED": gated, "num_warps": max(1, min(8, block // 256))}
    tensors = rows, weight, gate if gated else x, out
    _norm_kernel[(len(rows),)](*tensors, eps, rows.stride(0), D=dim, BLOCK=block, **options)
    return out


# ------ Gated DeltaNet


def _delta_net(module, hidden_states, cache_params, **kwargs):
    """Gated DeltaNet for one token a row [R, 1, E] -> [R, 1, E]; updates its states in place."""
    layer = cache_params.layers[module.layer_idx]
    project = module.in_proj_qkv, module.in_proj_z, module.in_proj_a, module.in_proj_b
    inputs = [p(hidden_states) for p in project]  # [R, 1, C], [R, 1, HV V], [R, 1, HV] twice
    step = _delta_step_triton if fused(hidden_states) else _delta_step
    return module.out_proj(step(module, *inputs, layer.conv_states[0], layer.recurrent_states[0]))


def _delta_step(module, x, z, a, b, conv, state):
    """conv [R, C, 4] with C = 2 HK K + HV V, state [R, HV, K, V] -> [R, 1, HV V].

    S'k and S'q are one product with the old S, as S_new'q = a S'q + (k.q) b (v - a S'k).
    """
    rows, heads, dim_k, dim_v = state.shape
    wide_v = heads * dim_v
    conv.copy_(torch.cat((conv[:, :, 1:], x.transpose(1, 2)), -1))
    x = (conv.float() * module.conv1d.weight.squeeze(1)).sum(-1).type_as(x)  # [R, C]
    qk, v = F.silu(x).float().split((conv.shape[1] - wide_v, wide_v), -1)
    # x / |x| is an RMS norm over sqrt(K); one 1 / sqrt(K) more belongs to q and comes at the end.
    qk = qk.reshape(rows, 2, -1, dim_k)  # [R, 2, HK, K]
    qk = F.rms_norm(qk, (dim_k,), eps=1e-6 / dim_k) * dim_k**-0.5
    qk = qk.transpose(1, 2).repeat_interleave(heads // qk.shape[2], 1)  # [R, HV, 2, K]
    qk = qk.flatten(0, 1)
    decay = (-module.A_log.float().exp() * F.softplus(a.float() + module.dt_bias)).exp()
    write = b.sigmoid().float()  # [R, 1, HV], as is the decay
    state = state.view(rows * heads, dim_k, dim_v).mul_(decay.view(-1, 1, 1))
    read = torch.bmm(qk, state)  # [R * HV, 2, V]: a S'q, a S'k
    q, k = qk.split(1, 1)
    delta = (v.reshape(rows * heads, 1, dim_v) - read[:, 1:]) * write.view(-1, 1, 1)
    state.baddbmm_(k.transpose(1, 2), delta)
    out = (read[:, :1] + (q * k).sum(-1, keepdim=True) * delta) * dim_k**-0.5
    gate = F.silu(z.float()).view(rows * heads, 1, dim_v)
    out = _rms_norm(module.norm, out.type_as(x)) * gate
    return out.type_as(x).view(rows, 1, -1)


def _delta_step_triton(module, x, z, a, b, conv, state):
    """As `_delta_step`, in three kernels, reading and writing each state once."""
    rows, channels, taps = conv.shape
    heads, dim_k, dim_v = state.shape[1:]
    heads_k = (channels - heads * dim_v) // (2 * dim_k)
    mixed, out = torch.empty_like(x), x.new_empty(rows, 1, heads, dim_v)
    grid = rows, triton.cdiv(channels, 256)
    tensors = x, conv, module.conv1d.weight, mixed
    _convolution_kernel[grid](*tensors, channels, TAPS=taps, BLOCK=256, num_warps=4)
    block = min(32, dim_v)
    tensors = mixed, a, b, module.A_log, module.dt_bias, state, out
    sizes = {"HV": heads, "HK": heads_k, "K": dim_k, "V": dim_v, "BLOCK": block}
    _delta_kernel[rows * heads, dim_v // block](*tensors, **sizes)
    return _norm_triton(out, module.norm.weight, module.norm.variance_epsilon, gate=z).flatten(2)


# ------ a model's

LEAN: dict[str, Callable[..., Tensor]] = {
    "Qwen2RMSNorm": _rms_norm,
    "Qwen3RMSNorm": _rms_norm,
    "LlamaRMSNorm": _rms_norm,
    "Qwen3_5RMSNorm": _rms_norm_about_one,
    "Qwen3_5GatedDeltaNet": _delta_net,
}


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Decode with the functions above."""
    config = model.config.get_text_config(decoder=True)
    attention = config._attn_implementation
    # A forward set on the instance is somebody's (accelerate's, a kernel hub's): theirs is kept.
    lean = [m for m in model.modules() if type(m).__name__ in LEAN and "forward" not in vars(m)]
    config._attn_implementation = "rollout_decode"
    for module in lean:
        module.forward = partial(LEAN[type(module).__name__], module)
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in lean:
            del module.forward


# ------ kernels

if triton is not None:

    @triton.jit
    def _attend_kernel(
        query, keys, values, mask, out, lse, scale, lane_stride, S,
        KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
        PART: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One part of one lane (row and key head), for its G queries: o_P [G, D], lse_P [G]."""
        lane, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        g, d = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_D)[None]
        at = g * D + d
        q = tl.load(query + lane * G * D + at, mask=(g < G) & (d < D), other=0.0)  # [G, D]
        top = tl.full([BLOCK_G], -1e30, tl.float32)  # finite: no inf - inf
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(0, PART, BLOCK):
            s = part * PART + start + tl.arange(0, BLOCK)
            here = lane * lane_stride + s[:, None] * D + d
            inside = (s[:, None] < S) & (d < D)
            k = tl.load(keys + here, mask=inside, other=0.0)  # [S, D]
            v = tl.load(values + here, mask=inside, other=0.0)
            bias = tl.load(mask + lane // KV * S + s, mask=s < S, other=-float("inf"))
            z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G, S]
            z += bias.to(tl.float32)[None]
            new_top = tl.maximum(top, tl.max(z, 1))
            p = tl.exp(z - new_top[:, None])
            kept = tl.exp(top - new_top)
            total = total * kept + tl.sum(p, 1)
            acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = new_top
        place = lane * tl.num_programs(1) + part
        o = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + place * G * D + at, o, mask=(g < G) & (d < D))
        row = tl.arange(0, BLOCK_G)
        # -inf where nothing may be read
        tl.store(lse + place * G + row, top + tl.log(total), mask=row < G)

    @triton.jit
    def _norm_kernel(
        x, weight, gate, out, eps, x_stride,
        D: tl.constexpr, BLOCK: tl.constexpr, ABOUT_ONE: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """One row: x / rms, times w or 1 + w, times silu(gate)."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        y = tl.load(x + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps)
        if ABOUT_ONE:
            y = y * (1 + w)
        else:
            y = y.to(out.dtype.element_ty).to(tl.float32) * w
            y = y.to(out.dtype.element_ty).to(tl.float32)
        if GATED:
            z = tl.load(gate + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            y = y * z * tl.sigmoid(z)
        tl.store(out + row * D + d, y.to(out.dtype.element_ty), mask=d < D)

    @triton.jit
    def _convolution_kernel(x, state, weight, out, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
        """The convolution's last position and silu, for some channels of a row; moves the state."""
        row, tap = tl.program_id(0).to(tl.int64), tl.arange(0, TAPS)[None]
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = (row * C + c[:, None]) * TAPS + tap
        inside = c[:, None] < C
        old = tl.load(state + at + 1, mask=inside & (tap < TAPS - 1), other=0.0)
        new = tl.load(x + row * C + c, mask=c < C, other=0.0)
        moved = tl.where(tap < TAPS - 1, old, new[:, None])  # [C, taps]
        w = tl.load(weight + c[:, None] * TAPS + tap, mask=inside, other=0.0)
        y = tl.sum(moved.to(tl.float32) * w.to(tl.float32), 1)
        y = y.to(x.dtype.element_ty).to(tl.float32)
        tl.debug_barrier()  # a thread may store what another has yet to read
        tl.store(state + at, moved, mask=inside)
        tl.store(out + row * C + c, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=c < C)

    @triton.jit
    def _delta_kernel(
        x, a, b, A_log, dt_bias, state, out,
        HV: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK columns of a state S [K, V] of one row and value head; a row of x: q, k, v."""
        lane = tl.program_id(0).to(tl.int64)
        row, head = lane // HV, lane % HV
        i, j = tl.arange(0, K), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = x + row * (2 * HK * K + HV * V)
        at = first + head // (HV // HK) * K + i
        q, k = tl.load(at).to(tl.float32), tl.load(at + HK * K).to(tl.float32)
        v = tl.load(first + 2 * HK * K + head * V + j).to(tl.float32)
        q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * K**-0.5
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        t = tl.load(a + lane).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        softplus = tl.where(t > 20, t, tl.log(1 + tl.exp(t)))
        decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * softplus)
        write = tl.sigmoid(tl.load(b + lane).to(tl.float32))
        write = write.to(b.dtype.element_ty).to(tl.float32)
        where = state + lane * K * V + i[:, None] * V + j[None]
        s = tl.load(where) * decay  # [K, BLOCK]
        delta = (v - tl.sum(s * k[:, None], 0)) * write
        s += k[:, None] * delta[None]
        tl.store(where, s)
        tl.store(out + lane * V + j, tl.sum(s * q[:, None], 0).to(out.dtype.element_ty))
