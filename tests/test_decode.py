"""decode.py's kernels: the arithmetic of their torch twins, which test_rollout.py checks.

On a GPU they run as they are; elsewhere in Triton's interpreter, in a process of their own.
"""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import interpreter
import pytest
import torch
import torch.nn.functional as F
from test_rollout import GREEDY, MODELS, PROMPTS, ids, make, reference
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import rollout
from rollout import Sampling, generate

GPU = torch.cuda.is_available()
INTERPRETED = decode.triton is not None and os.environ.get("TRITON_INTERPRET") == "1" and not GPU
DEVICE = "cuda" if GPU else "cpu"
in_triton = pytest.mark.skipif(
    not decode.FUSED[DEVICE], reason="needs a GPU or Triton's interpreter"
)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
if INTERPRETED:
    interpreter.mend()


@pytest.mark.skipif(
    decode.triton is None or decode.FUSED[DEVICE], reason="no Triton here, or inside already"
)
def test_kernels_in_the_interpreter():
    interpreter.run(__file__, "triton")


def normal(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def assert_same(got, want):
    """Equal in bf16, but for the odd value that a last bit of fp32 tips over; near in fp32."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.dtype == torch.bfloat16:
        assert (got != want).float().mean() <= 0.01
    tolerance = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-5)


@in_triton
@FLOATS
@pytest.mark.parametrize(
    ("dim", "kv", "group", "bucket"),
    [(8, 2, 1, 32), (20, 1, 3, 256), (64, 2, 4, 300), (128, 1, 17, 544)],
)
def test_attention_in_triton(dim, kv, group, bucket, dtype):
    """Ragged rows, parts with nothing to read, padded sizes; never a look behind the bucket."""
    rows = 3
    query = normal(rows, kv * group, 1, dim, dtype=dtype)
    keys, values = (normal(rows * kv, bucket + 32, dim, dtype=dtype, seed=s) for s in (1, 2))
    keys[:, bucket:] = values[:, bucket:] = float("nan")
    mask = torch.zeros(rows, 1, 1, bucket, dtype=dtype, device=DEVICE)
    for row, last in enumerate((0, bucket // 2, bucket - 1)):
        mask[row, ..., last + 1 :] = float("-inf")
    key, value = (t[:, :bucket].unflatten(0, (rows, kv)) for t in (keys, values))
    got, _ = decode._attend(None, query, key, value, mask, 0.3)
    whole = [t.repeat_interleave(group, 1) for t in (key, value)]
    double = [t.double() for t in (query, *whole, mask)]
    want = F.scaled_dot_product_attention(*double[:3], attn_mask=double[3], scale=0.3)
    want = want.transpose(1, 2)
    assert got.dtype == dtype and got.shape == (rows, 1, kv * group, dim)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@in_triton
@FLOATS
@pytest.mark.parametrize("dim", [1, 48, 128, 1000])
def test_norms_in_triton(dim, dtype):
    x = normal(5, 1, 3, 2 * dim, dtype=dtype)
    x = x[..., :dim]  # rows with a gap between them, as Qwen3.5's queries have
    for kind in ("qwen3", "qwen3.5"):
        module = type(make(kind).model.norm)(dim).to(DEVICE, dtype)
        with torch.no_grad():
            module.weight.copy_(normal(dim, seed=1))
            assert_same(decode.LEAN[type(module).__name__](module, x), module(x))


@in_triton
@FLOATS
@pytest.mark.parametrize(
    ("k", "v", "heads_k", "heads_v"), [(8, 4, 2, 4), (16, 64, 1, 3), (32, 32, 2, 2)]
)
def test_delta_step_in_triton(k, v, heads_k, heads_v, dtype):
    """Five tokens: outputs and both states, which change in place, for the rows asked for only."""
    sizes = dict(linear_key_head_dim=k, linear_value_head_dim=v)
    sizes |= dict(linear_num_key_heads=heads_k, linear_num_value_heads=heads_v)
    net = make("qwen3.5", **sizes).model.layers[0].linear_attn.to(DEVICE, dtype)
    rows, channels = 3, net.in_proj_qkv.out_features
    states = normal(rows + 1, channels, 4, dtype=dtype), normal(rows + 1, heads_v, k, v, seed=1)
    twins = [t.clone() for t in states]
    with torch.no_grad():
        for token in range(5):
            outs = channels, net.in_proj_z.out_features, heads_v, heads_v
            noise = partial(normal, rows, 1, dtype=dtype)
            inputs = [3 * noise(n, seed=10 * token + i) for i, n in enumerate(outs)]
            got = decode._delta_step_triton(net, *inputs, *(t[:rows] for t in states))
            want = decode._delta_step(net, *inputs, *(t[:rows] for t in twins))
            assert_same(got, want)
            for state, twin in zip(states, twins, strict=True):
                torch.testing.assert_close(state, twin, rtol=1e-5, atol=1e-5)


@in_triton
@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_in_triton_is_generates_token_for_token(name):
    """On a GPU through captured graphs over several buckets; the slow interpreter: a few tokens."""
    model = make(name)
    sampling = Sampling(temperature=0, repetition_penalty=1.1, max_new_tokens=5)
    sampling = GREEDY if GPU else sampling
    prompts = PROMPTS if GPU else PROMPTS[:2] + PROMPTS[4:6]
    want = [reference(model, prompt, sampling, None) for prompt in prompts]
    got = generate(model.to(DEVICE), prompts, [0] * len(prompts), sampling, -1, max_rows=3)
    assert ids(got) == want


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        self.n += not view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not INTERPRETED, reason="counts calls of the interpreter")
@torch.inference_mode()
def test_a_step_in_triton_launches_what_the_docstring_counts(monkeypatch):
    """32 layers as in Qwen3.5-9B. Nothing is computed: kernels are counted and do not run."""
    model, kernels = make("qwen3.5", num_hidden_layers=32).bfloat16(), Counter()

    def counted(fused):
        monkeypatch.setitem(decode.FUSED, "cpu", fused)
        d = rollout.Decoder(model, 10, 64, Sampling(max_new_tokens=32))
        with decode.decoding(model):
            d.step(10, 32)
            kernels.clear()
            with Launches() as launches:
                d.step(10, 32)
        return launches.n + kernels.total()

    call = "triton.runtime.interpreter.GridExecutor.__call__"
    monkeypatch.setattr(call, lambda grid, *args, **kwargs: kernels.update([grid.fn.__name__]))
    in_torch, in_kernels = counted(False), counted(True)
    text = decode.__doc__
    assert f" {in_torch:,} " in text and f" {in_kernels} " in text, (in_torch, in_kernels)


@pytest.mark.skipif(decode.triton is None, reason="no Triton here")
def test_kernels_compile_for_gpus():
    """Through ptxas, for A100 and H100, at Qwen3.5-9B's sizes: no spilled register, bf16 rounded to
    nearest, shared memory for two programs a multiprocessor, states stored after a barrier."""
    code = """
import re, subprocess, sys, tempfile
from pathlib import Path
import decode, triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = dict(S="i32", C="i32", lane_stride="i32", x_stride="i32")
types |= dict(eps="fp32", scale="fp32", lse="*fp32")
attention = dict(G=4, PART=decode.PART, BLOCK_G=16)
kernels = [
    (decode._attend_kernel, attention | dict(KV=4, D=256, BLOCK_D=256, BLOCK=32), 4),
    (decode._attend_kernel, attention | dict(KV=8, D=128, BLOCK_D=128, BLOCK=64), 4),
    (decode._norm_kernel, dict(D=4096, BLOCK=4096, ABOUT_ONE=True, GATED=False), 8),
    (decode._norm_kernel, dict(D=128, BLOCK=128, ABOUT_ONE=False, GATED=True), 1),
    (decode._convolution_kernel, dict(TAPS=4, BLOCK=256), 4),
    (decode._delta_kernel, dict(HV=32, HK=16, K=128, V=128, BLOCK=32), 4),
]
tool = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
for kernel, constants, warps in kernels:
    of = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in kernel.arg_names}
    if kernel is decode._attend_kernel:
        of["out"] = "*fp32"
    if kernel is decode._delta_kernel:
        of["state"] = "*fp32"
    # pointers, strides and sizes are multiples of 16 there
    aligned = [i for i, n in enumerate(of) if of[n] == "i32" or of[n][0] == "*"]
    even = {(i,): [["tt.divisibility", 16]] for i in aligned}
    values = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, of, values, even)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        registers, stack = (int(re.search(rf"{key}:(\\d+)", usage)[1]) for key in ("REG", "STACK"))
        assert stack == 0 and registers * 32 * warps * 2 <= 65536, usage
        assert built.metadata.shared * 2 <= 160 * 1024
        assert "cvt.rn.bf16" in built.asm["ptx"]
        if "state" in of:
            order = re.findall(r"ld\\.global|bar\\.sync|st\\.global", built.asm["ptx"])
            first_store = order.index("st.global")
            last_load = len(order) - 1 - order[::-1].index("ld.global")
            assert "bar.sync" in order[last_load:first_store], order
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True, timeout=300)
