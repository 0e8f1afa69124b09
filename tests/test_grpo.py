"""grpo.py: advantages and loss against the release's numbers, log-probs against fp64."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import interpreter
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import leave

import grpo

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden_grpo.json").read_text())
quick = settings(max_examples=60, derandomize=True, deadline=None)
# Kernels run on the CPU, in numpy.
INTERPRETED = grpo.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="runs inside test_kernels_in_the_interpreter"
)
KERNELS = pytest.param("triton", marks=in_interpreter)


# ----------------------------- anchor weight and advantages


@pytest.mark.parametrize("case", GOLDEN["anchor_weight"], ids=lambda c: c["name"])
def test_anchor_weight_equals_the_release(case):
    weights = [
        grpo.anchor_weight(step, **case["settings"]) for step in range(1, len(case["weight"]) + 1)
    ]
    assert weights == pytest.approx(case["weight"], abs=1e-12)
    assert [w > 0 for w in weights] == case["anchor"]


def test_anchor_weight_of_the_recipe():
    assert [grpo.anchor_weight(s) for s in (1, 2, 16, 17, 173)] == pytest.approx(
        [0, 0.4 / 15, 0.4, 0.4, 0.4]
    )
    with pytest.raises(ValueError, match="linear"):
        grpo.anchor_weight(1, shape="exp")


@pytest.mark.parametrize("case", GOLDEN["group_advantages"], ids=lambda c: c["kind"])
def test_bare_advantages_equal_the_release(case):
    rewards, group, is_anchor = (torch.tensor(case[k]) for k in ("rewards", "group", "is_anchor"))
    got = grpo.group_advantages(rewards, group, is_anchor, std_floor=0, cap=False)
    compared = 0
    for g in group.unique():
        policy = rewards[(group == g) & ~is_anchor]
        rows = group == g
        if len(policy) < 2:  # on purpose unlike the release, which takes R itself for A
            assert not got[rows].any()
            continue
        tolerance = (
            {"rtol": 1e-4, "atol": 1e-6} if policy.std() < 1e-5 else {"rtol": 0, "atol": 1e-6}
        )
        torch.testing.assert_close(got[rows], torch.tensor(case["advantage"])[rows], **tolerance)
        compared += 1
    assert compared or case["kind"].startswith("single")


@st.composite
def steps(draw):
    """Rewards, groups, anchors and verdicts of one step."""
    n = draw(st.integers(0, 30))
    score = st.integers(-200, 108).map(lambda x: x / 100)
    rows = draw(
        st.lists(
            st.tuples(score, st.integers(0, 3), st.booleans(), st.booleans()),
            min_size=n,
            max_size=n,
        )
    )
    dtypes = torch.float64, torch.long, torch.bool, torch.bool
    return [torch.tensor([r[i] for r in rows], dtype=dtype) for i, dtype in enumerate(dtypes)]


@quick
@given(steps(), st.floats(0, 2), st.sampled_from([0.0, 0.05, 0.3]), st.booleans())
def test_advantages_are_the_formula_over_judged_policy_rows(step, weight, floor, cap):
    rewards, group, is_anchor, valid = step
    hidden = torch.where(
        valid, rewards, float("nan")
    )  # a row without a verdict has no reward at all
    got = grpo.group_advantages(hidden, group, is_anchor, weight, floor, cap, valid).numpy()
    for i in range(len(got)):
        peers = rewards[(group == group[i]) & valid & ~is_anchor].numpy()
        k = len(peers)
        if k < 2 or not valid[i]:
            assert got[i] == 0
        elif is_anchor[i]:
            bound = (k - 1) / math.sqrt(k) if cap else math.inf
            spread = max(np.std(peers, ddof=1), floor) + 1e-6
            a = weight * (float(rewards[i]) - peers.mean()) / spread
            assert got[i] == pytest.approx(min(bound, max(-bound, a)), rel=1e-4, abs=1e-6)
        else:
            a = (float(rewards[i]) - peers.mean()) / (np.std(peers, ddof=1) + 1e-6)
            assert got[i] == pytest.approx(a, rel=1e-4, abs=1e-6)
            # The bound that the cap lends to anchors.
            assert abs(got[i]) <= (k - 1) / math.sqrt(k) + 1e-6


@quick
@given(steps(), st.floats(-1e6, 1e6), st.randoms(use_true_random=False))
def test_anchors_never_move_policy_rows_and_order_does_not_matter(step, other, random):
    rewards, group, is_anchor, valid = step
    base = grpo.group_advantages(rewards, group, is_anchor, valid=valid)
    moved = grpo.group_advantages(
        torch.where(is_anchor, other, rewards), group, is_anchor, valid=valid
    )
    assert torch.equal(base[~is_anchor], moved[~is_anchor])
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = grpo.group_advantages(
        *(x[order] for x in (rewards, -7 * group, is_anchor)), valid=valid[order]
    )
    torch.testing.assert_close(shuffled, base[order], rtol=1e-6, atol=1e-6)


def test_anchor_guards():
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.75])
    is_anchor = torch.tensor([False] * 5 + [True])

    def anchor(**options):
        return float(grpo.group_advantages(rewards, [0] * 6, is_anchor, 0.4, **options)[-1])

    assert anchor(std_floor=0, cap=False) == pytest.approx(1e5)  # what the guards are for
    assert anchor(cap=False) == pytest.approx(0.4 * 0.25 / 0.05, rel=1e-4)
    assert anchor() == pytest.approx(4 / math.sqrt(5))
    with pytest.raises(ValueError, match=r"\[N\]"):
        grpo.group_advantages(rewards, [0] * 5, is_anchor)


# ----------------------------------------------------- loss


@pytest.mark.parametrize(
    "case", GOLDEN["policy_loss"], ids=lambda c: f"{c['kind']} {c['loss']:.3f}"
)
def test_policy_loss_equals_the_release(case):
    names = "log_prob", "old_log_prob", "advantages", "response_mask"
    logp, old, advantages, mask = (torch.tensor(case[k]) for k in names)
    logp.requires_grad_()
    clips = case["clip_ratio_low"], case["clip_ratio_high"], case["clip_ratio_c"]
    loss, stats = grpo.policy_loss(logp, old, advantages, mask, mask.sum(), *clips)
    if not mask.any():
        assert loss.isnan()  # a step without tokens has no mean
        return
    loss.backward()
    got = [float(x.detach()) for x in (loss, *stats.values())]
    want = [case[k] for k in ("loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")]
    assert got == pytest.approx(want, abs=1e-6, rel=1e-6)
    torch.testing.assert_close(logp.grad, torch.tensor(case["grad_log_prob"]), rtol=1e-5, atol=1e-6)


def test_policy_loss_adds_up_over_micro_batches_and_ignores_masked_rubbish():
    torch.manual_seed(0)
    logp, old, advantages = torch.randn(6, 9), torch.randn(6, 9), torch.randn(6, 9)
    mask = torch.rand(6, 9) < 0.6
    whole, stats = grpo.policy_loss(logp, old, advantages, mask, mask.sum())
    rubbish = logp.masked_fill(~mask, float("nan")).requires_grad_()
    batches = [[x[i : i + 2] for x in (rubbish, old, advantages, mask)] for i in (0, 2, 4)]
    parts = [grpo.policy_loss(*batch, mask.sum()) for batch in batches]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    for name, value in stats.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value)
    (grad,) = torch.autograd.grad(sum(p[0] for p in parts), rubbish)
    assert grad.isfinite().all() and not grad[~mask].any()


# ------------------------------------------ fused log-probs


@contextmanager
def chunk_rows(n):
    before, grpo.CHUNK_ROWS["cpu"] = grpo.CHUNK_ROWS["cpu"], n
    try:
        yield
    finally:
        grpo.CHUNK_ROWS["cpu"] = before


def problem(seed, n, h, v, dtype, spread=1.0):
    r = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=r).to(dtype)
    weight = (torch.randn(v, h, generator=r) * spread).to(dtype)
    targets = torch.randint(0, v, (n,), generator=r)
    targets[:1], targets[1:2] = 0, v - 1
    coef = torch.randn(n, generator=r) * (torch.rand(n, generator=r) < 0.7)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, coef


def both_schemes(hidden, weight, targets, coef, *options):
    """(loss, logp, entropy, d hidden, d weight) of token_logprobs and of onpolicy_loss."""
    logp, entropy = grpo.token_logprobs(hidden, weight, targets, *options)
    loss = (coef.to(logp.dtype) * logp).sum()
    yield loss, logp, entropy, *torch.autograd.grad(loss, (hidden, weight))
    loss, logp, entropy = grpo.onpolicy_loss(hidden, weight, targets, coef, *options)
    yield loss, logp, entropy, *torch.autograd.grad(loss, (hidden, weight))


def definition(hidden, weight, targets, coef, temperature):
    """The same five in fp64, written out once more, with autograd."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    p = torch.softmax(hidden @ weight.T / temperature, 1)
    logp = torch.log_softmax(hidden @ weight.T / temperature, 1)
    loss = (coef.double() * logp[torch.arange(len(targets)), targets]).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return loss, logp[torch.arange(len(targets)), targets], -(p * logp).sum(1), *grads


def assert_near(got, want, tolerance, scale=0.0):
    """max |got - want| <= tolerance times the largest entry, or `scale` where all nearly cancel."""
    assert got.isfinite().all()
    if want.numel():
        size = max(float(want.detach().abs().max()), scale)
        error = (got.detach().double() - want.detach()).abs().amax()
        assert float(error) <= tolerance * size


@pytest.mark.parametrize("backend", ["naive", "chunked", KERNELS])
@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 9999),
    n=st.sampled_from([0, 1, 2, 7, 19]),
    h=st.integers(1, 40),
    v=st.sampled_from([1, 2, 3, 101, 256, 997, 4099]),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.sampled_from([1, 5, 8, 256]),
)
def test_parity_with_fp64(backend, seed, n, h, v, temperature, dtype, rows):
    hidden, weight, targets, coef = problem(seed, n, h, v, dtype)
    want = definition(hidden, weight, targets, coef, temperature)
    largest = lambda x: float(x.detach().abs().max()) if x.numel() else 0.0  # noqa: E731
    unit = largest(coef) / temperature  # of d loss / d logits
    scales = [unit, 1.0, 1.0, unit * largest(weight), unit * largest(hidden)]
    with chunk_rows(rows):
        for got in both_schemes(hidden, weight, targets, coef, temperature, backend):
            assert [x.dtype for x in got] == [torch.float32] * 3 + [dtype] * 2
            assert not got[2].requires_grad
            for i, (a, b, scale) in enumerate(zip(got, want, scales, strict=True)):
                assert a.shape == b.shape
                assert_near(a, b, 1e-2 if dtype == torch.bfloat16 and i > 2 else 1e-5, scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_fp64_on_a_gpu(backend, dtype, monkeypatch):
    """There bf16 operands meet in GEMMs with fp32 results; gradients are written over logits."""
    monkeypatch.setitem(grpo.CHUNK_ROWS, "cuda", 64)
    hidden, weight, targets, coef = (x.detach().cuda() for x in problem(3, 300, 64, 9001, dtype))
    args = hidden.requires_grad_(), weight.requires_grad_(), targets, coef, 0.7
    want = definition(*args)
    for got in both_schemes(*args, backend):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_near(
                a, b, 1e-2 if dtype == torch.bfloat16 and i > 2 else 1e-5, 1.0 if i < 3 else 0.0
            )


@pytest.mark.skipif(grpo.triton is None or INTERPRETED, reason="no Triton here, or inside already")
def test_kernels_in_the_interpreter():
    interpreter.run(__file__, "triton and not gpu")


@in_interpreter
@pytest.mark.parametrize("v", [1, 4095, 4096, 4097, 9001])
def test_triton_writes_bf16_gradients_over_fp32_logits(v):
    """On a GPU, fp32 logits and bf16 gradients share bytes; the CPU's GEMMs never need that."""
    torch.manual_seed(v)
    logits, targets, coef = 4 * torch.randn(3, v), torch.tensor([0, v - 1, v // 2]), torch.randn(3)
    logp, entropy, lse = grpo._statistics_triton(logits, targets)
    for a, b in zip((logp, entropy, lse), grpo._statistics(logits, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    want = grpo._gradient(logits.clone(), targets, lse, coef, torch.bfloat16)
    got = grpo._gradient_triton(logits, targets, lse, coef, torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-7)


@pytest.mark.skipif(grpo.triton is None, reason="no Triton here")
def test_kernels_compile_for_gpus():
    """For A100 and H100; the gradient is stored after a barrier behind the loads it overwrites."""
    code = """
import re, grpo, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = dict(logits="*fp32", targets="*i64", out="*fp32", n="i32")
types |= dict(grad="*bf16", lse="*fp32", scale="*fp32", grad_stride="i32")
for kernel in (grpo._statistics_kernel, grpo._gradient_kernel):
    constants = {(kernel.arg_names.index("V"),): 248320, (kernel.arg_names.index("BLOCK"),): 4096}
    source = ASTSource(kernel, {k: types.get(k, "constexpr") for k in kernel.arg_names}, constants)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": 8})
        assert built.asm["cubin"]
order = re.findall(r"ld\\.global|bar\\.sync|st\\.global", built.asm["ptx"])
first_store, last_load = order.index("st.global"), len(order) - 1 - order[::-1].index("ld.global")
assert "bar.sync" in order[last_load:first_store], order
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=env, check=True, timeout=120)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature):
    hidden, weight, targets, coef = problem(3, 6, 4, 11, torch.float64)
    with chunk_rows(4):

        def logps(h, w):
            return grpo.token_logprobs(h, w, targets, temperature)[0]

        def loss(h, w):
            return 3.7 * grpo.onpolicy_loss(h, w, targets, coef, temperature)[0]

        def tied(w):
            return loss(torch.tanh(w[targets]), w)

        assert torch.autograd.gradcheck(logps, (hidden, weight))
        assert torch.autograd.gradcheck(loss, (hidden, weight))
        assert torch.autograd.gradcheck(tied, (weight,))


@pytest.mark.parametrize("backend", ["chunked", KERNELS])
def test_huge_logits_stay_finite_and_exact(backend):
    hidden, weight, targets, coef = problem(1, 9, 8, 300, torch.float32, spread=3000.0)
    want = definition(hidden, weight, targets, coef, 1.0)
    assert float((hidden @ weight.T).detach().abs().max()) > 1e4
    for got in both_schemes(hidden, weight, targets, coef, 1.0, backend):
        for a, b in zip(got, want, strict=True):
            assert_near(a, b, 1e-5, 1.0)


@pytest.mark.parametrize("backend", ["naive", "chunked", KERNELS])
def test_views_frozen_inputs_and_no_grad(backend):
    hidden, weight, targets, coef = problem(5, 12, 10, 50, torch.float32)
    want = list(both_schemes(hidden, weight, targets, coef, 1.0, backend))
    h = torch.stack([hidden.detach()] * 2, 2)[..., 1].requires_grad_()
    w, y = weight.detach().T.contiguous().T.requires_grad_(), targets.repeat_interleave(2)[::2]
    assert not h.is_contiguous() and not w.is_contiguous() and not y.is_contiguous()
    for got, same in zip(both_schemes(h, w, y, coef, 1.0, backend), want, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-6)
    for frozen in (0, 1):
        for scheme in (0, 1):
            pair = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
            if scheme == 0:
                (coef * grpo.token_logprobs(*pair, targets, 1.0, backend)[0]).sum().backward()
            else:
                grpo.onpolicy_loss(*pair, targets, coef, 1.0, backend)[0].backward()
            assert pair[frozen].grad is None
            torch.testing.assert_close(
                pair[1 - frozen].grad, want[scheme][4 - frozen], rtol=1e-5, atol=1e-6
            )
    with torch.no_grad():
        loss, logp, entropy = grpo.onpolicy_loss(hidden, weight, targets, coef, 1.0, backend)
    assert not loss.requires_grad
    torch.testing.assert_close(
        (loss, logp, entropy), tuple(x.detach() for x in want[1][:3]), rtol=1e-5, atol=1e-6
    )


def test_rows_of_zero_coefficient_touch_no_gradient():
    hidden, weight, targets, coef = problem(11, 60, 16, 70, torch.float32)
    live = coef != 0
    assert 0 < live.sum() < 60
    with chunk_rows(8):
        h = hidden.detach()[live].requires_grad_()
        alone = list(both_schemes(h, weight, targets[live], coef[live], 1.0, "chunked"))
        mixed = list(both_schemes(hidden, weight, targets, coef, 1.0, "chunked"))
        again = list(both_schemes(hidden, weight, targets, coef, 1.0, "chunked"))
    for one, two in zip(mixed, again, strict=True):
        # Runs repeat bit for bit; every row has its log-prob and entropy.
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert one[1].isfinite().all() and (one[2] > 0).all()
        assert not one[3][~live].any()
    torch.testing.assert_close((mixed[0][3][live], mixed[0][4]), alone[0][3:])
    # One sweep: bit for bit, so no such row was in a gradient's chunk.
    assert torch.equal(mixed[1][3][live], alone[1][3])
    assert torch.equal(mixed[1][4], alone[1][4])


def test_weight_gradient_is_summed_in_fp32():
    hidden, weight, targets, coef = problem(2, 2048, 8, 4, torch.bfloat16)
    want = definition(hidden, weight, targets, coef.abs(), 1.0)[4]
    args = hidden, weight, targets, coef.abs(), 1.0
    with chunk_rows(8):
        got = [x[4].double() for x in both_schemes(*args, "chunked")]
    rounded = torch.zeros_like(weight)
    for i in range(0, 2048, 8):  # what a bf16 sum over the same chunks would give
        part = [x[i : i + 8] for x in (hidden, targets, coef.abs())]
        rounded = rounded + definition(part[0], weight, *part[1:], 1.0)[4].bfloat16()
    error = lambda x: float((x.double() - want).abs().max() / want.abs().max())  # noqa: E731
    assert max(error(x) for x in got) < 2**-8 < error(rounded)


def test_onpolicy_loss_is_policy_loss_at_ratio_one_and_the_anchor_reaches_the_gradient():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 5, 4, 6, 2, 7])  # five rollouts of equal reward and one anchor
    rewards, is_anchor = torch.tensor([0.3] * 5 + [0.7]), torch.tensor([False] * 5 + [True])
    row = torch.arange(6).repeat_interleave(lengths)
    hidden, weight, targets, _ = problem(4, int(lengths.sum()), 8, 40, torch.float32)
    advantages = grpo.group_advantages(rewards, [0] * 6, is_anchor, weight=0.1)[row]
    assert not advantages[row < 5].any()
    grads = []
    logp, _ = grpo.token_logprobs(hidden, weight, targets)
    loss, stats = grpo.policy_loss(logp, logp.detach(), advantages, torch.ones_like(row), len(row))
    assert not any(stats.values())
    grads.append(torch.autograd.grad(loss, (hidden, weight)))
    loss, _, _ = grpo.onpolicy_loss(hidden, weight, targets, -advantages / len(row))
    grads.append(torch.autograd.grad(loss, (hidden, weight)))
    logp = torch.log_softmax(hidden @ weight.T, 1)[torch.arange(len(row)), targets]
    # weight (R - mean) / floor, at each token of the anchor
    loss = -0.1 * 0.4 / 0.05 * logp[row == 5].sum() / len(row)
    grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for one in grads[:2]:
        for a, b in zip(one, grads[2], strict=True):
            assert a.abs().max() > 1e-3
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_inputs_that_do_not_fit_are_refused():
    hidden, weight, targets, coef = problem(0, 5, 4, 9, torch.float32)
    for bad in (
        (hidden[:, :3], weight, targets),
        (hidden, weight, targets[:4]),
        (hidden, weight, targets[:, None]),
    ):
        with pytest.raises(ValueError, match=r"\[N, H\]"):
            grpo.token_logprobs(*bad)
    with pytest.raises(ValueError, match="must share"):
        grpo.token_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="must share"):
        grpo.token_logprobs(hidden.half(), weight.half(), targets)
    with pytest.raises(ValueError, match="coef"):
        grpo.onpolicy_loss(hidden, weight, targets, coef[:3])
    with pytest.raises(ValueError, match="backend"):
        grpo.token_logprobs(hidden, weight, targets, backend="cuda")
    with pytest.raises(ValueError, match="backend triton"):
        grpo.token_logprobs(hidden.double(), weight.double(), targets, backend="triton")
    for outside in (targets + 9, targets.index_fill(0, torch.tensor([2]), -100)):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 9\).*-100"):
            grpo.token_logprobs(hidden, weight, outside)
        with pytest.raises(ValueError, match="-100"):
            grpo.onpolicy_loss(hidden, weight, outside, coef)
    with pytest.raises(ValueError, match="int64"):
        grpo.token_logprobs(hidden, weight, targets.int())
    for temperature in (torch.ones((), requires_grad=True), 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            grpo.onpolicy_loss(hidden, weight, targets, coef, temperature)


def test_a_second_derivative_is_refused_and_not_zero():
    hidden, weight, targets, coef = problem(0, 5, 4, 9, torch.float32)
    for loss in (
        grpo.onpolicy_loss(hidden, weight, targets, coef)[0],
        grpo.token_logprobs(hidden, weight, targets)[0].sum(),
    ):
        with pytest.raises(RuntimeError, match="differentiable once only"):
            torch.autograd.grad(loss, hidden, create_graph=True)
    loss = grpo.onpolicy_loss(hidden, weight, targets, coef, backend="naive")[0]
    [grad] = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), hidden)[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["naive", "chunked", "auto"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_soft_cap_is_inside_the_statistics_and_the_gradient(backend, temperature):
    hidden, weight, targets, coef = problem(3, 40, 8, 30, torch.float64, spread=3)
    logits = 5 * torch.tanh(hidden @ weight.T / 5) / temperature
    logps = logits.log_softmax(1)
    logp = logps.gather(1, targets[:, None]).squeeze(1)
    loss = (coef * logp).sum()
    want = loss, logp, -(logps.exp() * logps).sum(1), *torch.autograd.grad(loss, (hidden, weight))
    with chunk_rows(16):
        for got in both_schemes(hidden, weight, targets, coef, temperature, backend, 5.0):
            for a, b in zip(got, want, strict=True):
                assert_near(a, b, 1e-12)


# ----------------------------------------- memory and FSDP2


def test_extra_memory_does_not_grow_with_the_tokens():
    """Process peaks at N = 4k, 16k, 64k. Naive must grow by its logits, or the measure is blind."""
    code = """
import resource, sys, torch, grpo
torch.set_num_threads(1)
for n in (4096, 16384, 65536)[: 2 if "naive" in sys.argv else 3]:
    hidden, weight = (torch.randn(rows, 16, requires_grad=True) for rows in (n, 1024))
    targets, coef = torch.zeros(n, dtype=torch.long), torch.ones(n)
    for backend in sys.argv[1:]:
        grpo.token_logprobs(hidden, weight, targets, backend=backend)[0].sum().backward()
        grpo.onpolicy_loss(hidden, weight, targets, coef, backend=backend)[0].backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

    def peaks(backend):
        command = [sys.executable, "-c", code, backend]
        run = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
        return [int(x) for x in run.stdout.split()]

    naive, chunked = peaks("naive"), peaks("chunked")  # MB
    # Two more sets of logits, at least; one set at 65,536 tokens would be 256 MB.
    assert naive[1] - naive[0] > 2 * (16384 - 4096) * 1024 * 4 / 2**20, naive
    assert max(chunked) - chunked[0] < 48, chunked


class Root(torch.nn.Module):
    """The trainer's shape: layers and head in one forward, which gathers the head for the loss."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(30, 12)
        self.layer = torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 30, bias=False)

    def forward(self, tokens, targets, coef, scheme):
        hidden = torch.tanh(self.layer(self.embed(tokens)))
        if scheme == "onpolicy":
            return grpo.onpolicy_loss(hidden, self.head.weight, targets, coef)[0]
        return (coef * grpo.token_logprobs(hidden, self.head.weight, targets)[0]).sum()


def root_and_rows():
    torch.manual_seed(0)
    return Root(), torch.randint(0, 30, (17,)), torch.randint(0, 30, (17,)), torch.randn(17)


def sharded_gradients(rank, world, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world
    )
    root, *rows = root_and_rows()
    fully_shard(root.layer)
    fully_shard(root)
    for module in (root.layer, root):  # a sum over ranks: the global token count is in `coef`
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Two micro-batches; of the second, rank 1 has no row.
    batches = [slice(rank, 9, world), slice(9, 9 if rank else 17)]
    out = {}
    for scheme in ("onpolicy", "two passes"):
        for batch in batches:
            root(*(x[batch] for x in rows), scheme).backward()
        out[scheme] = {name: p.grad.full_tensor() for name, p in root.named_parameters()}
        root.zero_grad()
    if rank == 0:
        torch.save(out, f"{folder}/world{world}.pt")
    leave()


def test_the_head_inside_an_fsdp2_root(tmp_path):
    root, *rows = root_and_rows()
    root(*rows, "onpolicy").backward()
    for world in (1, 2):
        mp.start_processes(
            sharded_gradients, (world, str(tmp_path)), nprocs=world, start_method="spawn"
        )
        for grads in torch.load(tmp_path / f"world{world}.pt").values():
            for name, p in root.named_parameters():
                torch.testing.assert_close(grads[name], p.grad, rtol=1e-5, atol=1e-6)
