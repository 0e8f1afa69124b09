"""The mathematics of one POLARIS step: group advantages with a human anchor, clipped loss, log-probs without logits.

POLARIS (arXiv 2606.04095) is GRPO (arXiv 2402.03300) in which one human story, the anchor, joins each group:

    A_i = (R_i - mean) / (std + 1e-6)            mean, unbiased std over the group's policy rows; anchors: times weight
    L   = -1/n_tokens sum_i A_i sum_t ratio_it   clipped as in PPO, with the token mean and clip-higher of DAPO (arXiv
                                                 2503.14476) and the dual clip of arXiv 1912.09729; one update: ratio 1

Departures from the release, on purpose: rows without a verdict are outside the statistics and get advantage 0; a
group with fewer than two judged policy rows gives no signal; the anchor's spread has a floor and its weighted
advantage a cap.

The fused log-probs. Let h be a hidden state [H], W the head [V, H], y the target, T the temperature:

    z = W h / T;   lse = log sum_v exp z_v;   logp = z_y - lse;   p = exp(z - lse);   entropy = lse - sum_v p_v z_v
    d logp / d z = onehot(y) - p
    d loss / d (W h) = g = c/T (onehot(y) - p), where c = d loss / d logp of this token
    d loss / d h = W' g;   d loss / d W = g h', summed over tokens

Every quantity needs one whole row of logits, and no two rows need each other: a chunk of rows is all that ever exists.
(A loop over blocks of V instead would need no sum of weight gradients over chunks, but a token's lse is known only
after its last block: each logit would have to be made twice.)

Flops and bytes for N tokens (a GEMM is 2 N H V flops: 16.7 Tflop at N = 8,192, H = 4,096, V = 248,320):

    scheme           GEMMs   bytes moved per logit, GEMMs aside                      extra memory, gradients aside
    naive              3     about 70: cast, log_softmax, exp, products, gradients   several N V (8.1 GB each in fp32)
    token_logprobs     4     4 read forward; 4 read + 2 written backward             n V and V H in fp32, n rows a chunk
    onpolicy_loss      3     4 read, 4 read + 2 written                              the same
    (bf16 operands and Triton; fp32 ones write 4. "chunked" moves about 70 as well: one torch call, one pass.)

At Qwen3.5's shape the 10 bytes of `onpolicy_loss` are 20 GB, 5 ms at 4 TB/s, beside 70 ms of GEMMs at 700 Tflop/s.

Why it is written so:
- One sweep when the step is on-policy: with one update per step c = -A / n_tokens is known before the forward pass,
  so each chunk's logits are made once, serve both directions and are forgotten. Otherwise the backward pass makes
  them again: the fourth GEMM.
- GEMMs stay with cuBLAS, which is near the matrix rate at these sizes; Triton fuses what is bound by memory, and
  writes the gradient over the logits. (Cut cross-entropy, arXiv 2411.09009, keeps tiles in registers: no logits, but
  its own GEMMs.)
- Precision: logits leave the GEMM in fp32 with 1/T applied there, all that is per row is fp32, and the weight
  gradient is summed over chunks in fp32 inside the GEMM. That is one fp32 [V, H] buffer, 4.07 GB at Qwen3.5's shape,
  rounded once to the weight's dtype at the end. A bf16 sum loses every addend below 1/512 of it; Liger (arXiv
  2410.10989) lets its user choose.
- 2,048 rows per chunk on a GPU: a chunk adds 2 n V H flops to that buffer and moves 8 V H bytes of it, so 512 flops
  per byte, twice what an H100 needs to stay busy. The logits are then 2.03 GB, and the peak (4.07 + 2.03) is that of
  the last rounding.
- Rows of coefficient 0 get their log-prob and entropy (metrics: one GEMM) and no gradient GEMM. Rows that should cost
  nothing, prompt and padding, are not passed at all: the caller selects the rows.

Measure it: python bench.py logprob
"""

import math
import os

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the chunked backend does the same in torch
    triton = None

CHUNK_ROWS = {
    "cuda": 2048,
    "cpu": 256,
}  # rows of logits that exist at once; the module docstring counts why


# --------------------------------------------------------------------------------------------------------- advantages


def anchor_weight(step, peak=0.4, warmup=15, decay=0, final=0.0, shape="linear"):
    """Weight of the anchor's advantage at `step` (from 1): up to `peak` in `warmup` steps, to `final` in `decay` more.

    The first step of a warm-up has weight 0: no anchor joins, its place goes to one more policy rollout. `decay=0`
    holds `peak`. `shape` is that of the decay: "linear" or "cosine".
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f'anchor_weight: shape is "linear" or "cosine", got {shape!r}')
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    if decay == 0:
        return peak
    x = min(1.0, (done - warmup) / decay)
    if shape == "cosine":
        x = (1 - math.cos(math.pi * x)) / 2
    return peak + (final - peak) * x


def group_advantages(rewards, group, is_anchor, weight=1.0, std_floor=0.05, cap=True, valid=None):
    """Advantages [N], fp32, of rows with `rewards` [N] in groups `group` [N] (any integers), some of them anchors [N].

    A policy row: (R - mean) / (std + 1e-6), statistics over the group's valid policy rows alone. An anchor: the same
    formula with std at least `std_floor`, times `weight`, then clamped to +-(K-1)/sqrt(K) for K such rows if `cap`.
    No row inside the statistics can pass that bound; nothing else bounds one outside (equal scores would give it
    1e5). `std_floor=0, cap=False` is the bare formula. Rows with `valid` False (no verdict) get 0 and touch nothing,
    whatever their reward says. Groups with fewer than two valid policy rows are all 0.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    group = torch.as_tensor(group, device=rewards.device)
    is_anchor = torch.as_tensor(is_anchor, dtype=torch.bool, device=rewards.device)
    valid = (
        torch.ones_like(is_anchor)
        if valid is None
        else torch.as_tensor(valid, device=rewards.device).bool()
    )
    if not rewards.shape == group.shape == is_anchor.shape == valid.shape or rewards.dim() != 1:
        shapes = [tuple(x.shape) for x in (rewards, group, is_anchor, valid)]
        raise ValueError(
            f"group_advantages: rewards, group, is_anchor, valid must all be [N], got {shapes}"
        )
    advantages = torch.zeros_like(rewards)
    for g in group.unique():
        judged = (group == g) & valid
        policy, anchors = judged & ~is_anchor, judged & is_anchor
        k = int(policy.sum())
        if k < 2:
            continue
        mean, std = rewards[policy].mean(), rewards[policy].std()
        advantages[policy] = (rewards[policy] - mean) / (std + 1e-6)
        a = weight * (rewards[anchors] - mean) / (std.clamp_min(std_floor) + 1e-6)
        bound = (k - 1) / math.sqrt(k) if cap else math.inf
        advantages[anchors] = a.clamp(-bound, bound)
    return advantages.float()


# ---------------------------------------------------------------------------------------------------------------- loss


def policy_loss(
    logp, old_logp, advantages, mask, n_tokens, clip_low=0.2, clip_high=0.28, dual_clip=3.0
):
    """Clipped surrogate, summed over tokens where `mask` is set and divided by `n_tokens`. All tensors of one shape.

    Per token max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and at most -A dual_clip where A < 0; r = exp(logp -
    old_logp). `n_tokens` counts the whole step, all micro-batches and ranks, so that the losses of its parts add up
    to the token mean. So do the stats, of which (loss, stats) are returned: `clip_fraction` and `dual_clip_fraction`
    of the tokens, and `kl`, the mean of old_logp - logp, an estimate of KL(old || new).
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0).clamp(
        -20, 20
    )  # e^20 is beyond any clip, and finite
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(plain, clipped)
    bound = -advantages * dual_clip
    loss = torch.where(advantages < 0, surrogate.minimum(bound), surrogate)
    with torch.no_grad():
        stats = {
            "clip_fraction": (clipped > plain).sum() / n_tokens,
            "dual_clip_fraction": ((surrogate > bound) & (advantages < 0)).sum() / n_tokens,
            "kl": -log_ratio.sum() / n_tokens,
        }
    return loss.sum() / n_tokens, stats


# ----------------------------------------------------------------------------------------------------- fused log-probs


def token_logprobs(hidden, weight, targets, temperature=1.0, backend="auto"):
    """Log-probs [N] of `targets` [N] under softmax(hidden [N, H] @ weight [V, H]' / temperature), entropies [N]; nats.

    Both come in fp32 (fp64 for fp64 inputs). The log-probs are differentiable once in hidden and weight, with
    gradients in their dtype; the entropies are metrics and not differentiable. Backends: "naive" (the definition,
    holds [N, V]), "chunked" (any device), "triton" (GPU), "auto" (triton where it can run, else chunked). Under FSDP2
    call this inside the forward of the module that owns `weight`. ValueError for shapes, dtypes or backends that do
    not fit.
    """
    backend = _backend(hidden, weight, targets, backend)
    if backend == "naive":
        acc = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(acc) @ weight.to(acc).T / temperature  # [N, V]
        logps = logits.log_softmax(1)
        entropy = -(logps.exp() * logps).sum(1).detach()
        return logps.gather(1, targets[:, None]).squeeze(1), entropy
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, backend)


def onpolicy_loss(hidden, weight, targets, coef, temperature=1.0, backend="auto"):
    """sum(coef * logp) with its gradients from one sweep over the logits, for `coef` [N] known beforehand.

    On-policy GRPO has coef = -A / n_tokens. Returns (loss, logp [N], entropy [N]), the last two without gradient.
    Other arguments as in `token_logprobs`; the gradients are those of its log-probs. Nothing flows into `coef`.
    """
    backend = _backend(hidden, weight, targets, backend)
    if coef.shape != targets.shape:
        raise ValueError(
            f"onpolicy_loss: coef must be {tuple(targets.shape)} like targets, got {tuple(coef.shape)}"
        )
    if backend == "naive":
        logp, entropy = token_logprobs(hidden, weight, targets, temperature, backend)
        return (coef.detach() * logp).sum(), logp.detach(), entropy
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    return _OnPolicyLoss.apply(hidden, weight, targets, coef, temperature, backend, need)


def _backend(hidden, weight, targets, backend):
    shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
    if (
        [len(x) for x in shapes] != [2, 2, 1]
        or hidden.shape[1] != weight.shape[1]
        or len(hidden) != len(targets)
    ):
        raise ValueError(f"hidden [N, H], weight [V, H] and targets [N] are needed, got {shapes}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise ValueError(
            f"hidden and weight must share bf16, fp32 or fp64, got {hidden.dtype} and {weight.dtype}"
        )
    fits = triton is not None and hidden.dtype != torch.float64
    if backend == "auto":
        return "triton" if fits and hidden.is_cuda else "chunked"
    if backend not in ("naive", "chunked", "triton"):
        raise ValueError(f'backend is "auto", "naive", "chunked" or "triton", got {backend!r}')
    if backend == "triton" and not (
        fits and (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    ):
        raise ValueError(
            "backend triton needs Triton, bf16 or fp32, and a GPU (or TRITON_INTERPRET=1 from the start)"
        )
    return backend


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, backend):
        logp, entropy, lse, _, _ = _sweep(hidden, weight, targets, temperature, backend)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.backend = temperature, backend
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        *_, dh, dw = _sweep(
            hidden, weight, targets, ctx.temperature, ctx.backend, grad_logp, lse, need
        )
        return dh, dw, None, None, None


class _OnPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, coef, temperature, backend, need):
        coef = coef.to(torch.promote_types(hidden.dtype, torch.float32))
        logp, entropy, _, *grads = _sweep(
            hidden, weight, targets, temperature, backend, coef, need=need
        )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp, entropy)
        return (coef * logp).sum(), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        dh, dw = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return dh, dw, None, None, None, None, None


def _sweep(hidden, weight, targets, temperature, backend, coef=None, lse=None, need=(False, False)):
    """The loop over chunks of rows: logp, entropy, lse [N] (two None if `lse` is given), d hidden, d weight.

    Makes the statistics unless `lse` brings them, and the gradients of sum(coef * logp) that `need` asks for (else
    None).
    """
    statistics, gradient = (
        (_statistics_triton, _gradient_triton) if backend == "triton" else (_statistics, _gradient)
    )
    dtype, acc = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    if not hidden.is_cuda:  # the CPU has no bf16 GEMM with an fp32 result: multiply in fp32
        hidden, weight = hidden.to(acc), weight.to(acc)
    forward = lse is None
    logp, entropy, lse = (
        hidden.new_empty(3, len(hidden), dtype=acc) if forward else (None, None, lse)
    )
    dh = hidden.new_zeros(hidden.shape, dtype=dtype) if need[0] else None  # [N, H]
    dw = (
        weight.new_zeros(weight.shape, dtype=acc) if need[1] else None
    )  # [V, H], the sum over chunks

    live = coef != 0 if any(need) else torch.zeros_like(targets, dtype=torch.bool)
    size = CHUNK_ROWS["cuda" if hidden.is_cuda else "cpu"]
    chunks = [(rows, True) for rows in live.nonzero().squeeze(1).split(size)]
    chunks += [(rows, False) for rows in (~live).nonzero().squeeze(1).split(size) if forward]
    buffer = hidden.new_empty(
        min(len(hidden), size), len(weight), dtype=acc
    )  # the only logits that ever exist
    for rows, has_gradient in chunks:
        if len(rows) == 0:
            continue
        h, y = hidden[rows], targets[rows]  # [n, H], [n]
        logits = _addmm(buffer[: len(rows)], h, weight.T, beta=0, alpha=1 / temperature)  # [n, V]
        if forward:
            logp[rows], entropy[rows], lse[rows] = statistics(logits, y)
        if has_gradient:
            g = gradient(logits, y, lse[rows], coef[rows] / temperature, hidden.dtype)  # [n, V]
            if need[0]:
                dh[rows] = (g @ weight).to(dtype)
            if need[1]:
                _addmm(dw, g.T, h)
    del buffer  # before the copy that rounds dw
    return logp, entropy, lse, dh, dw.to(dtype) if need[1] else None


def _addmm(out, a, b, beta=1, alpha=1):
    """out = beta out + alpha a @ b, in place; an fp32 `out` takes the fp32 sums of bf16 operands unrounded."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    return torch.addmm(
        out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out
    )  # on a GPU only


def _statistics(logits, targets):
    """logits [n, V] -> logp of targets [n], entropy, lse [n]."""
    top = logits.amax(1)
    d = logits - top[:, None]
    logp = d.gather(1, targets[:, None]).squeeze(1)
    e = d.exp()
    total = e.sum(1)
    log_total = total.log()
    return logp - log_total, log_total - e.mul_(d).sum(1) / total, top + log_total


def _gradient(logits, targets, lse, scale, dtype):
    """g [n, V] = scale (onehot(targets) - softmax(logits)) in `dtype`; overwrites the logits."""
    scale = scale.to(logits.dtype)[:, None]
    logits.sub_(lse[:, None]).exp_().mul_(-scale)
    return logits.scatter_add_(1, targets[:, None], scale).to(dtype)


def _statistics_triton(logits, targets):
    """As `_statistics`, reading each logit once."""
    out = logits.new_empty(3, len(logits))
    _statistics_kernel[(len(logits),)](
        logits, targets, out, len(logits), V=logits.shape[1], BLOCK=4096, num_warps=8
    )
    return out


def _gradient_triton(logits, targets, lse, scale, dtype):
    """As `_gradient`, reading each logit once; a bf16 gradient takes the first half of its row's bytes."""
    n, v = logits.shape
    g = logits.view(dtype)[:, :v]  # [n, V]
    _gradient_kernel[(n,)](
        logits, g, targets, lse, scale.float(), g.stride(0), V=v, BLOCK=4096, num_warps=8
    )
    return g


if triton is not None:
    # One program per row of a contiguous [n, V] chunk, 16 logits per thread and turn: bound by memory, nothing to tune.
    # V is a constant: one compilation per vocabulary.

    @triton.jit
    def _statistics_kernel(logits, targets, out, n, V: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        top, total, moment = (
            -3.0e38,
            0.0,
            0.0,
        )  # max, sum of e = exp(z - max), sum of e (z - max), of the blocks so far
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(
                logits + row * V + col, mask=col < V, other=-3.0e38
            )  # finite, so that 0 times it is 0
            new_top = tl.maximum(top, tl.max(z, 0))
            shift, d = top - new_top, z - new_top
            e = tl.exp(d)
            moment = (moment + shift * total) * tl.exp(shift) + tl.sum(e * d, 0)
            total = total * tl.exp(shift) + tl.sum(e, 0)
            top = new_top
        y = tl.load(targets + row)
        z_y = tl.load(
            logits + row * V + y, mask=(y >= 0) & (y < V), other=float("nan")
        )  # no such target: not a number
        tl.store(out + row, z_y - top - tl.log(total))
        tl.store(
            out + n + row, tl.log(total) - moment / total
        )  # lse - mean of z, the max taken out of both
        tl.store(out + 2 * n + row, top + tl.log(total))

    @triton.jit
    def _gradient_kernel(
        logits, grad, targets, lse, scale, grad_stride, V: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        y, row_lse, c = tl.load(targets + row), tl.load(lse + row), tl.load(scale + row)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * V + col, mask=col < V, other=-float("inf"))
            g = c * (tl.where(col == y, 1.0, 0.0) - tl.exp(z - row_lse))
            # `grad` lies over `logits`: block k goes where blocks <= k were, so every thread must have read
            tl.debug_barrier()
            tl.store(grad + row * grad_stride + col, g.to(grad.dtype.element_ty), mask=col < V)
