"""The mathematics of one POLARIS step: advantages with a human anchor, the loss, fused log-probs.

POLARIS (arXiv 2606.04095) is GRPO (arXiv 2402.03300) in which one human story, the anchor, joins
each group of rollouts:

    A_i = (R_i - mean) / (std + 1e-6)     over the group's policy rows; anchors: times a weight
    L   = -1/n_tokens sum_i A_i sum_t ratio_it

Clipped as in PPO, with DAPO's token mean and clip-higher (arXiv 2503.14476) and the dual clip of
arXiv 1912.09729. With one update a step, as in polaris.py, every ratio is 1.

Departures from the release: rows without a verdict are outside the statistics and get advantage 0;
fewer than two judged policy rows give no signal; an anchor's std has a floor, its advantage a cap.

Log-probs, for a hidden state h [H], the head W [V, H], a target y and the temperature T:

    z = W h / T;   lse = log sum_v exp z_v;   p = exp(z - lse)
    logp = z_y - lse;   entropy = lse - sum_v p_v z_v
    d loss / d (W h) = g = c/T (onehot(y) - p), with c = d loss / d logp
    d loss / d h = W' g;   d loss / d W = g h', summed over tokens

A soft cap c as in Gemma: z = c tanh(W h / c) / T, and g is multiplied by 1 - tanh^2.

Each needs one row of logits and no other, so only a chunk of n rows ever exists. For N tokens, with
GEMMs of 2 N H V flops:

    scheme           GEMMs   logits in memory
    naive              3     several [N, V]
    token_logprobs     4     one [n, V]; the backward pass makes each chunk again
    onpolicy_loss      3     one [n, V]; needs c before the forward pass: -A / n_tokens at ratio 1

Bytes, rates and reasons: docs/performance.md. Measure it: python bench.py logprob
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the chunked backend does the same in torch
    triton = None

CHUNK_ROWS = {"cuda": 2048, "cpu": 256}  # rows of logits that exist at once


# ------ advantages


def anchor_weight(
    step: int,
    peak: float = 0.4,
    warmup: int = 15,
    decay: int = 0,
    final: float = 0.0,
    shape: str = "linear",
) -> float:
    """Weight of the anchor's advantage at `step`, which counts from 1.

    It rises from 0 to `peak` in `warmup` steps and falls to `final` in `decay` more, along a line
    or a cosine (`shape`); `decay=0` holds `peak`. ValueError for another shape.
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f'the shape of the decay is "linear" or "cosine", got {shape!r}')
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    if decay == 0:
        return peak
    share = min(1.0, (done - warmup) / decay)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return peak + (final - peak) * share


def group_advantages(
    rewards: Tensor | Sequence[float],
    group: Tensor | Sequence[int],
    is_anchor: Tensor | Sequence[bool],
    weight: float = 1.0,
    std_floor: float = 0.05,
    cap: bool = True,
    valid: Tensor | Sequence[bool] | None = None,
) -> Tensor:
    """Advantages [N], fp32, from [N] rewards, groups (any integers), and which rows are anchors.

    A policy row: (R - mean) / (std + 1e-6), statistics over the group's K valid policy rows. An
    anchor: the same with std at least `std_floor`, times `weight`, clamped to +-(K-1)/sqrt(K) if
    `cap`. A rollout cannot exceed that, being part of the mean; an anchor can (up to 1e5 where
    rewards are equal). `std_floor=0, cap=False` is the paper's formula.

    Rows that are not `valid` (no verdict) get 0 and touch nothing; so do groups with K < 2.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    group = torch.as_tensor(group, device=rewards.device)
    is_anchor = torch.as_tensor(is_anchor, device=rewards.device).bool()
    if valid is None:
        valid = torch.ones_like(is_anchor)
    valid = torch.as_tensor(valid, device=rewards.device).bool()
    shapes = [tuple(x.shape) for x in (rewards, group, is_anchor, valid)]
    if set(shapes) != {(rewards.numel(),)}:
        raise ValueError(f"rewards, group, is_anchor, valid must all be [N], got {shapes}")

    advantages = torch.zeros_like(rewards)  # [N]
    for g in group.unique():
        judged = (group == g) & valid
        policy, anchors = judged & ~is_anchor, judged & is_anchor
        k = int(policy.sum())
        if k < 2:
            continue
        mean, std = rewards[policy].mean(), rewards[policy].std()
        advantages[policy] = (rewards[policy] - mean) / (std + 1e-6)
        scaled = weight * (rewards[anchors] - mean) / (std.clamp_min(std_floor) + 1e-6)
        bound = (k - 1) / math.sqrt(k) if cap else math.inf
        advantages[anchors] = scaled.clamp(-bound, bound)
    return advantages.float()


# ------ loss


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    n_tokens: int | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats): the clipped surrogate, summed where `mask` is set, divided by `n_tokens`.

    Not called by polaris.py, whose ratio is always 1; here for several updates a step.

    All tensors of one shape. Per token max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most
    -A dual_clip where A < 0; r = exp(logp - old_logp). `n_tokens` counts the whole step, so that
    the parts of a step add up to its token means. Stats: shares of clipped tokens, and `kl`, the
    mean of old_logp - logp, which estimates KL(old || new) in nats.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    log_ratio = log_ratio.clamp(-20, 20)  # e^20 is beyond any clip, and finite
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(plain, clipped)
    bound = -advantages * dual_clip
    loss = torch.where(advantages < 0, surrogate.minimum(bound), surrogate)
    with torch.no_grad():
        beyond = (surrogate > bound) & (advantages < 0)
        stats = {
            "clip_fraction": (clipped > plain).sum() / n_tokens,
            "dual_clip_fraction": beyond.sum() / n_tokens,
            "kl": -log_ratio.sum() / n_tokens,
        }
    return loss.sum() / n_tokens, stats


# ------ fused log-probs


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    backend: str = "auto",
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] of `targets` [N] under softmax(hidden [N, H] @ weight [V, H]' / temperature).

    Not called by polaris.py, whose ratio is always 1; here for several updates a step.

    Returns (log-probs, entropies) [N] in nats, fp32 (fp64 for fp64 inputs). The log-probs can be
    differentiated once, in hidden and weight; the entropies are metrics. Backends: "naive" (the
    definition, holds [N, V]), "chunked" (any device), "triton" (GPU), "auto" (the best that runs).
    Under FSDP2 call it inside the forward of the module that owns `weight`. `softcap`: 0 is none;
    with one, "triton" is "chunked". ValueError for shapes, dtypes, targets or backends that do not
    fit; RuntimeError for a second derivative, except of "naive".
    """
    backend = _backend(hidden, weight, targets, temperature, backend, softcap)
    if backend == "naive":
        acc = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(acc) @ weight.to(acc).T  # [N, V]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        logps = logits.log_softmax(1)
        entropy = -(logps.exp() * logps).sum(1).detach()  # [N]
        return logps.gather(1, targets[:, None]).squeeze(1), entropy
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, backend, softcap)


def onpolicy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coef: Tensor,
    temperature: float = 1.0,
    backend: str = "auto",
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum(coef * logp), logp [N], entropy [N]): loss and gradients from one sweep over the logits.

    `coef` [N] is -A / n_tokens in on-policy GRPO; nothing flows into it. Only the loss has a
    gradient. All else as in `token_logprobs`.
    """
    backend = _backend(hidden, weight, targets, temperature, backend, softcap)
    if coef.shape != targets.shape:
        raise ValueError(f"coef must be [N] like targets, {len(targets)}, got {tuple(coef.shape)}")
    if backend == "naive":
        logp, entropy = token_logprobs(hidden, weight, targets, temperature, backend, softcap)
        return (coef.detach() * logp).sum(), logp.detach(), entropy
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    options = temperature, backend, softcap
    return _OnPolicyLoss.apply(hidden, weight, targets, coef, *options, need)


def _backend(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    backend: str,
    softcap: float,
) -> str:
    """The backend that runs, once all arguments are known to fit."""
    for name, value in {"temperature": temperature, "softcap": softcap}.items():
        if isinstance(value, Tensor) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a plain number, nothing flows into it: got {value!r}")
    if temperature == 0:
        raise ValueError("temperature 0 has no log-probs: it must be above 0")
    n, h = hidden.shape[:1], hidden.shape[1:]
    if hidden.dim() != 2 or weight.shape[1:] != h or targets.shape != n:
        shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
        raise ValueError(f"hidden [N, H], weight [V, H] and targets [N] are needed, got {shapes}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 token ids, got {targets.dtype}")
    if len(targets) and not 0 <= (low := int(targets.min())) <= int(targets.max()) < len(weight):
        what = f"targets must be in [0, {len(weight)}), got {low} to {int(targets.max())}"
        raise ValueError(f"{what}; leave ignored positions (-100) out before the call")
    dtypes = {hidden.dtype, weight.dtype}
    if dtypes not in ({torch.bfloat16}, {torch.float32}, {torch.float64}):
        raise ValueError(f"hidden and weight must share bf16, fp32 or fp64, got {dtypes}")
    if backend not in ("auto", "naive", "chunked", "triton"):
        raise ValueError(f'backend is "auto", "naive", "chunked" or "triton", got {backend!r}')
    if softcap and backend != "naive":
        return "chunked"
    fits = triton is not None and hidden.dtype != torch.float64
    if backend == "auto":
        return "triton" if fits and hidden.is_cuda else "chunked"
    runs = hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (fits and runs):
        raise ValueError("backend triton needs Triton, bf16 or fp32, and a GPU or its interpreter")
    return backend


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, *options):
        logp, entropy, lse, _, _ = _sweep(hidden, weight, targets, *options)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        _refuse_second_derivative()
        *inputs, lse = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        *_, dh, dw = _sweep(*inputs, *ctx.options, grad_logp, lse, need)
        return dh, dw, None, None, None, None


class _OnPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, coef, temperature, backend, softcap, need):
        coef = coef.to(torch.promote_types(hidden.dtype, torch.float32))
        inputs = hidden, weight, targets, temperature, backend, softcap
        logp, entropy, _, *grads = _sweep(*inputs, coef, need=need)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logp, entropy)
        return (coef * logp).sum(), logp, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        _refuse_second_derivative()
        dh, dw = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return dh, dw, None, None, None, None, None, None


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True: the result would be a constant
        raise RuntimeError('differentiable once only: use backend="naive" with create_graph=True')


def _sweep(
    hidden, weight, targets, temperature, backend, softcap, coef=None, lse=None, need=(False, False)
):
    """The loop over chunks of rows -> logp, entropy, lse [N], d hidden [N, H], d weight [V, H].

    logp and entropy are None when `lse` is passed in. The gradients are those of sum(coef * logp),
    None where `need` does not ask for them.
    """
    statistics, gradient = _statistics, _gradient
    if backend == "triton":
        statistics, gradient = _statistics_triton, _gradient_triton
    dtype = hidden.dtype
    acc = torch.promote_types(dtype, torch.float32)
    if not hidden.is_cuda:  # the CPU has no bf16 GEMM with an fp32 result: multiply in fp32
        hidden, weight = hidden.to(acc), weight.to(acc)
    forward = lse is None
    logp = entropy = None
    if forward:
        logp, entropy, lse = hidden.new_empty(3, len(hidden), dtype=acc)  # [N] each
    dh = hidden.new_zeros(hidden.shape, dtype=dtype) if need[0] else None  # [N, H]
    dw = weight.new_zeros(weight.shape, dtype=acc) if need[1] else None  # [V, H], a sum

    # Rows of coefficient 0 come in chunks of their own: log-prob and entropy, no gradient.
    live = coef != 0 if any(need) else torch.zeros_like(targets, dtype=torch.bool)
    size = CHUNK_ROWS["cuda" if hidden.is_cuda else "cpu"]
    chunks = [(rows, True) for rows in live.nonzero().squeeze(1).split(size)]
    if forward:
        chunks += [(rows, False) for rows in (~live).nonzero().squeeze(1).split(size)]
    n = min(len(hidden), size)
    buffer = hidden.new_empty(n, len(weight), dtype=acc)  # [n, V]: the only logits that ever exist
    for rows, has_gradient in chunks:
        if len(rows) == 0:
            continue
        h, y = hidden[rows], targets[rows]  # [n, H], [n]
        alpha = 1 / (softcap or temperature)
        logits = _addmm(buffer[: len(rows)], h, weight.T, beta=0, alpha=alpha)
        if softcap:
            logits.tanh_()
            slope = 1 - logits.square() if has_gradient else None  # [n, V]
            logits.mul_(softcap / temperature)
        if forward:
            logp[rows], entropy[rows], lse[rows] = statistics(logits, y)
        if has_gradient:
            g = gradient(logits, y, lse[rows], coef[rows] / temperature, hidden.dtype)  # [n, V]
            if softcap:
                g = g.mul_(slope)
            if need[0]:
                dh[rows] = (g @ weight).to(dtype)
            if need[1]:
                _addmm(dw, g.T, h)
    del buffer  # before the copy that rounds dw
    return logp, entropy, lse, dh, dw.to(dtype) if need[1] else None


def _addmm(out: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """out = beta out + alpha a @ b, in place; fp32 `out` takes the sums of bf16 a, b unrounded."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}  # on a GPU only
    return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out, **wider)


def _statistics(logits, targets):
    """logits [n, V] -> logp of targets, entropy, lse: [n] each."""
    top = logits.amax(1)
    d = logits - top[:, None]
    logp = d.gather(1, targets[:, None]).squeeze(1)
    e = d.exp()
    total = e.sum(1)
    log_total = total.log()
    entropy = log_total - e.mul_(d).sum(1) / total
    return logp - log_total, entropy, top + log_total


def _gradient(logits, targets, lse, scale, dtype):
    """g [n, V] = scale (onehot(targets) - softmax(logits)) in `dtype`; overwrites the logits."""
    scale = scale.to(logits.dtype)[:, None]
    logits.sub_(lse[:, None]).exp_().mul_(-scale)
    return logits.scatter_add_(1, targets[:, None], scale).to(dtype)


def _statistics_triton(logits, targets):
    """As `_statistics`, reading each logit once."""
    n, v = logits.shape
    out = logits.new_empty(3, n)
    _statistics_kernel[(n,)](logits, targets, out, n, V=v, BLOCK=4096, num_warps=8)
    return out


def _gradient_triton(logits, targets, lse, scale, dtype):
    """As `_gradient`, reading each logit once; a bf16 gradient takes half of its row's bytes."""
    n, v = logits.shape
    g = logits.view(dtype)[:, :v]  # [n, V], over the logits
    rows = targets, lse, scale.float()
    _gradient_kernel[(n,)](logits, g, *rows, g.stride(0), V=v, BLOCK=4096, num_warps=8)
    return g


if triton is not None:
    # One program a row of a contiguous [n, V] chunk; V is a constant: one compilation a vocabulary.

    @triton.jit
    def _statistics_kernel(logits, targets, out, n, V: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        # Of the blocks so far: the maximum, sum of e = exp(z - top), sum of e (z - top).
        top, total, moment = -3.0e38, 0.0, 0.0
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * V + col, mask=col < V, other=-3.0e38)  # times 0 it is 0
            new_top = tl.maximum(top, tl.max(z, 0))
            shift, d = top - new_top, z - new_top
            e = tl.exp(d)
            moment = (moment + shift * total) * tl.exp(shift) + tl.sum(e * d, 0)
            total = total * tl.exp(shift) + tl.sum(e, 0)
            top = new_top
        y = tl.load(targets + row)
        z_y = tl.load(logits + row * V + y)
        log_total = tl.log(total)
        tl.store(out + row, z_y - top - log_total)
        tl.store(out + n + row, log_total - moment / total)  # lse - mean of z, both less top
        tl.store(out + 2 * n + row, top + log_total)

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
            # `grad` lies over `logits`: block k goes where blocks <= k were; all must have read.
            tl.debug_barrier()
            tl.store(grad + row * grad_stride + col, g.to(grad.dtype.element_ty), mask=col < V)
