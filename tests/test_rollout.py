"""rollout.py: tokens are transformers' own; a story depends on prompt, seed and weights alone."""

import copy
import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BatchEncoding,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from worlds import leave

import rollout
from policy import copy_weights
from rollout import Decoders, Rollout, Sampling, generate, kernels, row_seed, sample, uniforms

VOCAB = 61
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # far from the uniform distribution that a usual initialisation gives
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
DELTA = dict(
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
MODELS = {
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**COMMON | dict(num_hidden_layers=2) | kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(
        Qwen3Config(**COMMON | dict(num_hidden_layers=2, head_dim=16) | kw)
    ),
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**COMMON | dict(num_hidden_layers=2) | kw)),
    "qwen3.5": lambda **kw: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(**COMMON | DELTA | dict(num_hidden_layers=4) | kw)
    ),
}
PROMPTS = [
    [5, 9, 2, 44, 7],
    [3],
    [5, 9, 2, 44, 7],
    [8, 8],
    list(range(20, 59)),
    [5, 9, 2, 44, 7],
    [60, 0, 1],
]
GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=40)


def make(name, seed=0, **kw):
    torch.manual_seed(seed)
    model = MODELS[name](**kw).eval()
    with torch.no_grad():  # norms and biases start at constants: make every weight count
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return make("qwen3.5")


def reference(model, prompt, sampling, eos):
    """Greedy tokens by transformers' generate, for one unpadded prompt."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def ids(rollouts):
    return [r.ids for r in rollouts]


def seeds(n):
    return [row_seed(3479, 1, "tale", k) for k in range(n)]


# --------------------------------- Parity with transformers


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_generates_token_for_token(model, penalty):
    sampling = Sampling(temperature=0, repetition_penalty=penalty, max_new_tokens=40)
    free = {tuple(p): reference(model, p, sampling, None) for p in PROMPTS}

    def ends(eos):
        return {next((i for i, t in enumerate(text) if t in eos), None) for text in free.values()}

    # the two ids at which the texts end at as many different times as can be
    eos = max(([a, b] for a in range(VOCAB) for b in range(a)), key=lambda e: len(ends(e)))
    assert len(ends(eos)) >= 3
    for r, prompt in zip(generate(model, PROMPTS, [0] * 7, sampling, eos), PROMPTS, strict=True):
        want = reference(model, prompt, sampling, eos)
        assert (r.ids, r.finished) == (want, want[-1] in eos)
    bare = generate(model, PROMPTS, [0] * 7, sampling, eos[0])
    for r, prompt in zip(bare, PROMPTS, strict=True):
        text = free[tuple(prompt)]
        assert r.ids == (text[: text.index(eos[0]) + 1] if eos[0] in text else text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_decode_step_are_the_models_own(model, dtype):
    """Over 100 tokens and several buckets: as near to one plain forward pass, on which the policy
    is trained, as transformers' own cached decoding.

    In bf16 that holds only because the step rounds where the model rounds.
    """
    model, logits = copy.deepcopy(model).to(dtype), []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: logits.append(out[:, -1]))
    [r] = generate(model, PROMPTS[:1], [7], Sampling(max_new_tokens=100), -1)
    got = torch.cat(logits[-100:])
    logits.clear()
    text = torch.tensor([PROMPTS[0] + r.ids])
    with torch.no_grad():
        cache = model(text[:, :4], use_cache=True).past_key_values
        logits.clear()
        for i in range(4, 104):
            model(text[:, i : i + 1], past_key_values=cache, use_cache=True)
        hook.remove()
        want = model(text).logits[0, 4:104]
    assert got.dtype == dtype and got.shape == want.shape
    error, usual = ((x.double() - want.double()).abs().mean() for x in (got, torch.cat(logits)))
    assert error <= 2 * usual + 1e-6 * want.abs().max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.floats(0.3, 3),
    st.sampled_from([0, 1, 2, 5, 40, 1000]),
    st.sampled_from([0.05, 0.3, 0.9, 0.95, 1.0]),
    st.sampled_from([0.8, 1.0, 1.1, 2.0]),
)
def test_sample_has_the_distribution_of_transformers_processors(
    seed, temperature, top_k, top_p, penalty
):
    """Over n equally spaced u, a token of probability p comes up n p times, up to its two ends."""
    g = torch.Generator().manual_seed(seed)
    n, vocab = 2048, 40
    logits = torch.randn(1, vocab, generator=g) * 3
    history = torch.randint(0, vocab, (1, 12), generator=g)
    want = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    want = TemperatureLogitsWarper(temperature)(history, want)
    if top_k:
        want = TopKLogitsWarper(top_k)(history, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(history, want)
    want = want.softmax(-1)[0]
    seen = torch.zeros(1, vocab, dtype=torch.bool).scatter_(1, history, True)
    u = (torch.arange(n)[:, None] + 0.5) / n
    s = Sampling(temperature, top_p, top_k, penalty)
    tokens, logq = sample(logits.expand(n, -1), seen.expand(n, -1), u, s)
    torch.testing.assert_close(logq.exp(), want[tokens], rtol=1e-4, atol=1e-6)
    freq = tokens.flatten().bincount(minlength=vocab) / n
    assert (freq - want).abs().max() <= 1.01 / n
    assert not freq[want == 0].any()


def test_padded_ids_are_never_drawn_and_log_q_is_the_models_own_log_prob(model):
    s = Sampling(top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=30)
    for vocab, limit in ((0, VOCAB), (40, 40)):
        for r, prompt in zip(
            generate(model, [[5, 9], [3]], [1, 2], s, 7, vocab=vocab), [[5, 9], [3]], strict=True
        ):
            assert max(r.ids) < limit and (r.finished or len(r.ids) == 30)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits[:, :limit].log_softmax(-1)[range(len(r.ids)), r.ids].sum()
            assert r.logq == pytest.approx(logp.item(), abs=1e-3)


def test_sampled_texts_have_the_models_distribution(hybrid):
    """Chi-square of 3,000 two-token texts against the exact joint probabilities."""
    s = Sampling(temperature=1.3, top_p=0.9, top_k=5, repetition_penalty=1.2, max_new_tokens=2)
    n, prompt = 3000, PROMPTS[0]

    def next_token(text):
        with torch.no_grad():
            z, history = hybrid(torch.tensor([text])).logits[:, -1], torch.tensor([text])
        z = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(history, z)
        z = TemperatureLogitsWarper(s.temperature)(history, z)
        z = TopPLogitsWarper(s.top_p)(history, TopKLogitsWarper(s.top_k)(history, z))
        return {t: p for t, p in enumerate(z.softmax(-1)[0].tolist()) if p}

    want = {
        (a, b): pa * pb
        for a, pa in next_token(prompt).items()
        for b, pb in next_token([*prompt, a]).items()
    }
    got = [tuple(r.ids) for r in generate(hybrid, [prompt] * n, seeds(n), s, -1)]
    assert set(got) <= set(want)
    common = [k for k, p in want.items() if n * p >= 5]
    cells = [(got.count(k), n * want[k]) for k in common]
    rest = sum(k not in common for k in got), n - sum(e for _, e in cells)
    chi2 = sum((o - e) ** 2 / e for o, e in [*cells, rest] if e > 1)
    df = len(cells)
    assert df >= 8
    assert chi2 < df + 4 * (2 * df) ** 0.5  # four standard deviations


def test_uniforms_are_splitmix64():
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for seed in (0, 1, 2**63 - 1, row_seed(1, 2, "a", 3)):
        want = [mix((mix(seed) + i * 0x9E3779B97F4A7C15) % 2**64) >> 40 for i in range(1, 65)]
        assert (uniforms(seed, 64).double() * 2**24).tolist() == want
    many = torch.stack([uniforms(s, 1000) for s in seeds(50)]).double()
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
    # Rows know nothing of each other.
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.2


def test_row_seed_is_stable_and_tells_every_argument_apart():
    assert row_seed(3479, 1, "uid", 0) == 4439019260433141266
    args = [(a, b, c, d) for a in (0, 1) for b in (1, 11) for c in ("x", "1") for d in (0, 1)]
    assert len({row_seed(*a) for a in args}) == len(args)
    assert all(0 <= row_seed(*a) < 2**63 for a in args)


# ----------------- Invariance: company, order, places, pace


def stories(model, order, **kw):
    """The sampled texts of PROMPTS, computed in the given order, returned by prompt."""
    s = Sampling(max_new_tokens=60)
    out = generate(
        model, [PROMPTS[i] for i in order], [seeds(9)[i] for i in order], s, (11, 12), **kw
    )
    return {i: r.ids for i, r in zip(order, out, strict=True)}


@pytest.fixture(scope="module")
def expected(model):
    return stories(model, range(len(PROMPTS)))


def test_a_story_does_not_depend_on_its_company(model, expected):
    n = len(PROMPTS)
    assert len({len(t) for t in expected.values()}) > 2, (
        "rows must end at different times for this to test anything"
    )
    assert expected[0] != expected[2], "two seeds, one prompt"
    assert stories(model, range(n)) == expected
    assert stories(model, range(n)[::-1]) == expected
    assert stories(model, range(n), max_rows=3) == expected
    assert {i: stories(model, [i])[i] for i in range(n)} == expected


BREAK_A_CAPTURE = {
    torch.ops.aten.item.default,  # also float() and int(), in inference mode
    torch.ops.aten.is_nonzero.default,  # bool()
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,  # torch.tensor(host data)
    torch.ops.aten.nonzero.default,
    torch.ops.aten.where.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the operations of one step on the very tensors that it used."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        d = step.func.__self__
        static = [d.ids, d.noise, d.seen, d.pos, d.finite, *(t for pair in d.states for t in pair)]
        before = [t.clone() for t in static]
        with self:
            step()
        for t, old in zip(static, before, strict=True):  # a capture records and does not run
            t.copy_(old)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in BREAK_A_CAPTURE, (
            f"{func}: the step reads from the device, or brings host data to it"
        )
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                "how many are True only the device knows"
            )
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # Neither a view nor in place.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self):
        return "the pool"


def as_on_a_gpu(monkeypatch):
    """As a GPU: looks every 7 steps, halving, warm-up, captures per (rows, bucket), replays."""
    captured = []

    def capture(step, pool):
        assert (pool is None) == (
            not step.func.__self__.graphs
        )  # one pool for all graphs of a decoder
        captured.append(step.args)
        return Tape(step)

    monkeypatch.setitem(rollout.CAPTURE, "cpu", True)
    monkeypatch.setitem(rollout.LOOK, "cpu", 7)
    monkeypatch.setitem(rollout.BUCKET, "cpu", 16)
    monkeypatch.setattr(rollout, "_warm_up", lambda step: step())
    monkeypatch.setattr(rollout, "_capture", capture)
    return captured


@pytest.mark.parametrize("max_rows", [0, 3])
def test_a_story_does_not_depend_on_the_pace(model, expected, monkeypatch, max_rows):
    captured = as_on_a_gpu(monkeypatch)
    options = dict(max_rows=max_rows, decoders=Decoders())
    assert stories(model, range(len(PROMPTS)), **options) == expected
    assert len(captured) == len(set(captured)) > 2
    assert {rows for rows, _ in captured} <= {7, 4, 3, 2, 1} and all(
        bucket % 16 == 0 for _, bucket in captured
    )
    n = len(captured)
    assert stories(model, range(len(PROMPTS)), **options) == expected
    # The second call finds its graphs; a shape seen fewer than 3 times has none yet.
    assert len(captured) - n <= 2


def test_no_row_runs_over_its_end(hybrid, monkeypatch):
    """The longest text fills the cache to its end; its place stays empty beside late starters."""
    order, s = [0, 1, 2, 4, 3, 5, 6], Sampling(max_new_tokens=25)
    prompts = [PROMPTS[i] for i in order]
    assert len(PROMPTS[4]) + 25 == 64
    want = ids(generate(hybrid, prompts, seeds(7), s, -1))
    as_on_a_gpu(monkeypatch)
    assert ids(generate(hybrid, prompts, seeds(7), s, -1, max_rows=4)) == want


def test_equal_prompts_are_prefilled_once(hybrid, monkeypatch):
    calls, prefill = [], rollout.prefill
    spy = lambda model, tokens: calls.append(tokens) or prefill(model, tokens)  # noqa: E731
    monkeypatch.setattr(rollout, "prefill", spy)
    stories(hybrid, range(len(PROMPTS)), max_rows=2)
    distinct = [p[:-1] for i, p in enumerate(PROMPTS) if p not in PROMPTS[:i] and len(p) > 1]
    assert calls == [[0], *distinct]  # [0]: the shapes


def test_a_decoder_is_kept_for_the_next_call_and_gone_at_once_when_it_is_too_small_or_far_too_large(
    monkeypatch,
):
    """On a GPU it holds gigabytes: two do not fit, and a large one left by a validation would
    starve the update."""
    model, decoders, held = make("qwen3.5"), Decoders(), []

    def write(rows, limit, model=model, **sampling):
        s = Sampling(max_new_tokens=limit, **sampling)
        generate(model, [[1, 2]] * rows, [0] * rows, s, -1, decoders=decoders)
        if not held or held[-1]() is not decoders.held:
            held.append(weakref.ref(decoders.held))
        return len(held)

    as_on_a_gpu(monkeypatch)
    gc.disable()
    try:
        made = [write(4, 60), write(4, 50), write(3, 60), write(4, 200), write(4, 60), write(5, 60)]
        assert made == [1, 1, 1, 2, 3, 4]
        assert [write(5, 60, top_k=3), write(5, 60, copy.deepcopy(model), top_k=3)] == [5, 6]
        assert [ref() is None for ref in held] == [True] * 5 + [False]
        decoders.free()
        assert held[-1]() is None
    finally:
        gc.enable()


def test_without_decoders_nothing_stays(hybrid, monkeypatch):
    made, get = [], Decoders.get

    def spied(self, *args):
        decoder = get(self, *args)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(Decoders, "get", spied)
    gc.disable()
    try:
        generate(hybrid, [[1, 2]], [0], Sampling(max_new_tokens=3), -1)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


# --------------------------------- The contract of generate


def test_on_finish_and_on_tokens(hybrid):
    seen, counts, lengths = [], [], []

    def on_finish(r):
        seen.append(r.row)
        lengths.append(len(r.ids))
        assert r.finished == (r.ids[-1] in (11, 12)) and not set(r.ids[:-1]) & {11, 12}

    s = Sampling(max_new_tokens=60)
    out = generate(
        hybrid,
        PROMPTS,
        seeds(len(PROMPTS)),
        s,
        (11, 12),
        on_finish=on_finish,
        on_tokens=lambda rollout, new: counts.append(len(new)),
        max_rows=0,
    )
    assert sorted(seen) == [r.row for r in out] == list(range(len(PROMPTS)))
    assert lengths == sorted(lengths), "all started together, so the shorter ended earlier"
    assert lengths == [len(out[i].ids) for i in seen], "a story is whole when it is handed out"
    assert sum(counts) == sum(lengths)
    assert all(r.finished or len(r.ids) == 60 for r in out)


def test_min_p_leaves_tokens_out_by_their_share_of_the_likeliest():
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) * 2
    u = torch.rand(400, 1, generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(400, 50, dtype=torch.bool)
    prob = logits.softmax(-1)
    for share in (0.1, 0.5, 0.9):
        s = Sampling(1.0, 1.0, 0, 1.0, min_p=share)
        token, logq = sample(logits, seen, u, s)
        kept = prob >= share * prob.amax(-1, keepdim=True)
        drawn = prob.gather(-1, token)
        assert kept.gather(-1, token).all()
        mass = (prob * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(logq.exp(), drawn / mass)
    assert len(sample(logits, seen, u, Sampling(1.0, 1.0, 0, 1.0, min_p=0.1))[0].unique()) > 10
    with pytest.raises(ValueError, match="min_p"):
        Sampling(min_p=1.0)


def test_small_cases(hybrid):
    assert generate(hybrid, [], [], GREEDY, 1) == []
    one = Sampling(max_new_tokens=1)
    out = generate(hybrid, PROMPTS, seeds(len(PROMPTS)), one, -1)
    assert [len(r.ids) for r in out] == [1] * len(PROMPTS) and not any(r.finished for r in out)
    again = generate(hybrid, PROMPTS, seeds(len(PROMPTS)), one, {r.ids[0] for r in out})
    assert again == [Rollout(r.row, r.ids, True, r.logq) for r in out]


def test_errors_say_what_is_wrong(hybrid):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(hybrid, [[1], []], [0, 0], GREEDY, 1)
    with pytest.raises(ValueError, match="2 prompts need as many seeds"):
        generate(hybrid, [[1], [2]], [0], GREEDY, 1)
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(repetition_penalty=0)):
        with pytest.raises(ValueError, match="top_p"):
            Sampling(**bad)
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)
    for eos in ("</s>", "", None, [], (), [None], [1, "2"]):
        with pytest.raises(ValueError, match="eos is .*no token id"):
            generate(hybrid, [[1, 2]], [0], GREEDY, eos)
    for prompts in (torch.tensor([[1, 2]]), [torch.tensor([1, 2])], BatchEncoding({"a": [[1]]})):
        with pytest.raises(ValueError, match="lists of token ids"):
            generate(hybrid, prompts, [0], GREEDY, 1)
    chunked = make("llama", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="not chunked_attention"):
        generate(chunked, [[1, 2]], [0], GREEDY, 1)
    broken = copy.deepcopy(hybrid)
    for s in (GREEDY, Sampling(max_new_tokens=4)):
        with torch.no_grad():
            broken.lm_head.weight[3] = float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(broken, [[1, 2]], [0], s, 1)
        copy_weights(hybrid, broken)
        assert generate(broken, [[1, 2]], [0], s, 1) == generate(hybrid, [[1, 2]], [0], s, 1)


def test_the_model_is_left_as_it_was(hybrid):
    model = copy.deepcopy(hybrid).train()
    before = model.config._attn_implementation

    def stop(_):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1, 2]], [0], GREEDY, -1, on_finish=stop)
    assert model.training and model.config._attn_implementation == before
    assert not any("forward" in vars(m) for m in model.modules())
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # nothing that decoding made is in the way of training
    assert all(p.grad is not None for p in model.parameters())
    assert ids(generate(model, [[1, 2]], [0], GREEDY, -1)) == [
        reference(model.eval(), [1, 2], GREEDY, None)
    ]


def test_kernels_line(hybrid):
    line = kernels(hybrid)
    assert "sdpa" in line and "delta rule" in line and "convolution" in line and "\n" not in line
    assert "delta" not in kernels(make("llama"))


# -------------------------------------------------- Weights


def perturb(model, scale=0.05):
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).add_(scale)


@pytest.mark.parametrize("captures", [False, True])
def test_rollouts_follow_the_policy(captures, monkeypatch):
    """Stale weights are the classic silent bug: after each update the copy is the policy."""
    if captures:
        as_on_a_gpu(monkeypatch)
    policy, twin = make("qwen3.5"), make("qwen3.5", seed=1)
    where, previous = [p.data_ptr() for p in twin.parameters()], None
    s, decoders = Sampling(temperature=0, max_new_tokens=20), Decoders()

    def stories():
        return ids(generate(twin, PROMPTS[:4], [0] * 4, s, -1, decoders=decoders))

    for _ in range(3):
        copy_weights(policy, twin)
        got = stories()
        assert got == [reference(policy, p, s, None) for p in PROMPTS[:4]] != previous
        previous = got
        perturb(policy)
    assert where == [p.data_ptr() for p in twin.parameters()]
    # Other tensors: a decoder that reads the old ones must not be used.
    twin, policy = twin.double(), policy.double()
    copy_weights(policy, twin)
    assert stories() == [reference(policy, p, s, None) for p in PROMPTS[:4]]


def test_copy_weights_refuses_what_does_not_match():
    policy = make("llama")
    with pytest.raises(ValueError, match="layers.2"):
        copy_weights(policy, make("llama", num_hidden_layers=3))
    with pytest.raises(
        ValueError, match="embed_tokens.weight is .61, 32. in the policy and .62, 32. in the copy"
    ):
        copy_weights(policy, make("llama", vocab_size=62))
    tied = make("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight is tied"):
        copy_weights(policy, tied)
    copy_weights(tied, policy)
    assert torch.equal(policy.lm_head.weight, tied.model.embed_tokens.weight)


def _shards_to_copies(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    for tie, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        whole = make("qwen3.5", tie_word_embeddings=tie)
        policy, twin = (make("qwen3.5", seed, tie_word_embeddings=tie) for seed in (0, 1))
        twin.to(dtype)
        root = nn.Sequential(policy)  # a trainer's wrapper; the policy inside is what is copied
        for layer in policy.model.layers:
            fully_shard(layer)
        fully_shard(root)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        for _ in range(2):
            perturb(policy)
            perturb(whole)
            copy_weights(policy, twin)
            for (name, ours), theirs in zip(
                whole.named_parameters(), twin.parameters(), strict=True
            ):
                assert torch.equal(ours.to(dtype), theirs), (rank, name)
    leave()


def test_shards_reach_every_copy(tmp_path):
    """FSDP2 over gloo: two ranks hold half of each weight, and both end with the whole policy."""
    mp.spawn(_shards_to_copies, args=(2, os.fspath(tmp_path / "store")), nprocs=2)
