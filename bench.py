"""Benchmarks, each in one run on the same tensors, beside the peers that can be imported.

    python bench.py logprob     log-probs of the vocabulary head, forward and backward
    python bench.py rollout     sampling, beside transformers' generate
    python bench.py step        one rank's share of a published training step, with a slow judge
    python bench.py memory      what a GPU of the published run holds, counted by plan.py

A run prints Markdown tables; its last line is JSON with the same numbers. Times are medians after a
warm-up. The limits are measured too: the matrix rate (best of large square GEMMs) and the copy
bandwidth (bytes read + written).
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5TextConfig, Qwen3Config

import data
import decode
import grpo
import plan
import polaris
import rollout
from config import Config, parse
from judge import Judge, start_stand_in
from mini import world
from policy import load_policy

# --------------------------------- shared by all benchmarks


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} thread(s)"


def seconds(function, device, repeats=5, warmup=2):
    """Median seconds of one call of `function`, the device's queue included."""
    times = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device, dtype):
    """Flops per second of the fastest of some large square GEMMs in `dtype`."""
    rates = []
    for n in (4096, 8192, 12288) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, device, repeats=7))
    return max(rates)


def copy_bandwidth(device):
    """Bytes per second, read and written, of a copy far larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**26  # 4 GiB or 256 MiB
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def extra_memory(function, device):
    """Peak bytes that a call holds beyond those held before: allocator on a GPU, process on a CPU.

    The process peak is Linux's own high-water mark (VmHWM), reset through /proc/self/clear_refs.
    """
    free(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Or the call could fill free pages that the process still holds.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _status(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def table(rows):
    """Print dicts of one set of keys as a Markdown table; None is a dash."""

    def text(x):
        if not isinstance(x, float):
            return "–" if x is None else str(x)
        if 0 < abs(x) < 1e-2:
            return f"{x:.1e}"
        digits = 2 if abs(x) < 10 else 0
        return f"{x:,.{digits}f}"

    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {cells} |")
    print(flush=True)


def progress(text):
    print(f"  {text} …", file=sys.stderr, flush=True)


# -------------------------------------------------- logprob


ERRORS = "error logp", "error d hidden", "error d weight"
HEAD_COLUMNS = "", "GEMMs", "ms", "× GEMM", "extra GB", *ERRORS, "note"


def logprob(args):
    """Time, extra memory and error of sum(coef * logp), its log-probs and both gradients.

    "× GEMM" is the time over that of the scheme's matrix products alone.
    """
    device = default_device()
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    h, v = args.hidden or (4096 if gpu else 256), args.vocab or (248320 if gpu else 32000)
    name, rate, bandwidth = device_name(device), matrix_rate(device, dtype), copy_bandwidth(device)
    result = {"bench": "logprob", "device": name, "torch": torch.__version__, "dtype": str(dtype)}
    result |= {"time": [], "memory": []}

    for n in args.tokens or ([8192, 16384] if gpu else [2048]):
        progress(f"N {n:,}: fp64 reference")
        inputs = head_problem(n, h, v, dtype, device)
        reference = head_reference(*inputs)
        rows, calls = [], []
        for label, (gemms, run) in implementations(gpu).items():
            progress(label)
            rows.append(dict.fromkeys(HEAD_COLUMNS) | {"": label, "GEMMs": gemms})
            calls.append(partial(forward_backward, run, inputs))
            rows[-1]["note"] = check_head(rows[-1], run, calls[-1], reference, device)
        times = [[] for _ in rows]
        for turn in range(args.repeats):  # a busy moment of the machine hits all alike
            progress(f"turn {turn + 1} of {args.repeats}")
            rate = max(rate, matrix_rate(device, dtype))
            for row, call, took in zip(rows, calls, times, strict=True):
                if not row["note"]:
                    took.append(seconds(call, device, repeats=1, warmup=1))
        for row, took in zip(rows, times, strict=True):
            if took:
                row["ms"] = 1e3 * statistics.median(took)
                row["× GEMM"] = row["ms"] / 1e3 / (row["GEMMs"] * 2 * n * h * v / rate)
        print(f"N {n:,}, H {h:,}, V {v:,}, {dtype}: forward and backward, temperature 1\n")
        table(rows)
        result["time"].append({"tokens": n, "hidden": h, "vocab": v, "rows": rows})
        del inputs, reference, calls

    if not gpu:
        h, v = 64, 8192  # a CPU takes minutes for 65,536 tokens at the sizes above
    for label, (_, run) in implementations(gpu).items():
        if isinstance(run, str):
            continue
        row = {"": label}
        for n in (256, 4096, 16384, 65536):
            progress(f"memory, N {n:,}, {label}")
            if not gpu and n > 16384 and run not in OURS:
                row[f"N {n:,}"] = None  # they hold [N, V] in main memory
                continue
            inputs = head_problem(n, h, v, dtype, device)
            call = partial(forward_backward, run, inputs)
            try:
                call()  # kernels compiled, workspaces there
                gradients = sum(x.nbytes for x in inputs[:2])
                row[f"N {n:,}"] = (extra_memory(call, device) - gradients) / 1e9
            except Exception as error:
                row[f"N {n:,}"] = failure(run, error)
        result["memory"].append(row)
    print(f"Extra GB beyond inputs and gradients, H {h:,}, V {v:,}, {dtype}\n")
    table(result["memory"])
    limits = f"{rate / 1e12:.3g} Tflop/s in {dtype}; copy {bandwidth / 1e9:.4g} GB/s"
    print(f"{name}; torch {torch.__version__}; {limits}\n")
    return result | {"matrix_tflops": rate / 1e12, "copy_gb_s": bandwidth / 1e9}


def check_head(row, run, call, reference, device):
    """Fill in errors and memory of one implementation; returns why it cannot be timed, or ""."""
    if isinstance(run, str):
        return run
    try:
        outputs = call()
        if run is not liger_sum:  # which computes another sum
            row |= zip(ERRORS, map(relative_error, outputs, reference), strict=True)
        del outputs
        row["extra GB"] = extra_memory(call, device) / 1e9
    except Exception as error:
        return failure(run, error)
    return ""


def failure(run, error):
    """What the table says of one that failed; an error of ours, except lack of memory, ends all."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if run in OURS:
        raise error
    return f"failed: {type(error).__name__}: {str(error).strip()[:80]}".replace("\n", " ")


def head_problem(n, h, v, dtype, device):
    """hidden [n, h], weight [v, h] (logits: std 3), targets [n], GRPO-like coefficients [n]."""
    r = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, generator=r, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=r, device=device) * 3 / h**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=r, device=device)
    return hidden, weight, targets, torch.randn(n, generator=r, device=device) / n


def forward_backward(run, inputs):
    """logp [N], d hidden, d weight."""
    loss, logp = run(*inputs)
    return logp.detach(), *torch.autograd.grad(loss, inputs[:2])


@torch.no_grad()
def head_reference(hidden, weight, targets, coef, rows=256):
    """The same in fp64 from the definition, a few rows at a time."""
    w = weight.double()
    logp, dh = (torch.empty_like(x, dtype=w.dtype) for x in (coef, hidden))
    dw = torch.zeros_like(w)
    for part in torch.arange(len(hidden), device=w.device).split(rows):
        h, y, c = hidden[part].double(), targets[part, None], coef[part, None].double()
        logps = (h @ w.T).log_softmax(1)
        logp[part] = logps.gather(1, y).squeeze(1)
        g = logps.exp_().mul_(-c).scatter_add_(1, y, c)
        dh[part] = g @ w
        dw.addmm_(g.T, h)
    return logp, dh, dw


def relative_error(got, want):
    """max |got - want| / max |want|, a few rows at a time."""
    pairs = list(zip(got.split(4096), want.split(4096), strict=True))
    error = max(float((a.double() - b).abs().max()) for a, b in pairs)
    return error / max(float(b.abs().max()) for _, b in pairs)


def usual_code(hidden, weight, targets, coef):
    """What a trainer writes without this module; bf16 logits on a GPU."""
    logps = (hidden @ weight.T).float().log_softmax(1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(1)
    logp = logps.gather(1, targets[:, None]).squeeze(1)
    return (coef * logp).sum() + 0 * entropy.sum(), logp


def two_passes(hidden, weight, targets, coef, backend):
    logp, _ = grpo.token_logprobs(hidden, weight, targets, backend=backend)
    return (coef * logp).sum(), logp


def one_sweep(hidden, weight, targets, coef, backend):
    return grpo.onpolicy_loss(hidden, weight, targets, coef, backend=backend)[:2]


BACKENDS = "chunked", "triton"
OURS = [partial(f, backend=b) for f in (two_passes, one_sweep) for b in BACKENDS]


def liger(hidden, weight, targets, coef):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    loss = fused(weight, hidden, targets)
    return -(coef * loss).sum(), -loss


def liger_sum(hidden, weight, targets, coef):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    loss = fused(weight, hidden, targets)
    return loss, loss


def cut_cross_entropy(hidden, weight, targets, coef):
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    return -(coef * loss).sum(), -loss


def implementations(gpu):
    """Label -> (GEMMs, function of a problem -> (loss, logp), or why there is none)."""

    def there(module, *functions):
        if gpu and importlib.util.find_spec(module):
            return functions
        return [f"needs a GPU and {module.replace('_', '-')}"] * len(functions)

    compiled = "needs g++"
    if gpu or shutil.which("g++"):
        compiled = torch.compile(usual_code, dynamic=False)
    chunked_2, triton_2, chunked_1, triton_1 = OURS
    triton_2, triton_1 = there("triton", triton_2, triton_1)
    per_token, summed = there("liger_kernel", liger, liger_sum)
    [cce] = there("cut_cross_entropy", cut_cross_entropy)
    return {
        "naive": (3, usual_code),
        "naive, torch.compile": (3, compiled),
        "token_logprobs, chunked": (4, chunked_2),
        "token_logprobs, triton": (4, triton_2),
        "onpolicy_loss, chunked": (3, chunked_1),
        "onpolicy_loss, triton": (3, triton_1),
        "Liger, per token (no entropy)": (4, per_token),
        "Liger, unweighted sum (no log-probs, no entropy)": (3, summed),
        "cut cross-entropy (no entropy)": (4, cce),
    }


# -------------------------------------------------- rollout

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONFIGS = {
    "tiny": lambda: Qwen3_5TextConfig(**TINY, **DELTA),  # three delta-rule layers to one, as the 9B
    "tiny-attention": lambda: Qwen3Config(**TINY),
    "9b": Qwen3_5TextConfig,  # its defaults are the 9B's shape
}


def random_model(name, device):
    """A model of random weights: of a million parameters in fp32, or Qwen3.5-9B's text in bf16."""
    dtype = torch.bfloat16 if name == "9b" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model.generation_config.eos_token_id = None  # every row generates all its tokens
    return model.eval()


def by_us(decoders, model, prompt, rows, n):
    seeds = [rollout.row_seed(0, 0, "bench", k) for k in range(rows)]
    sampling = rollout.Sampling(max_new_tokens=n)
    out = rollout.generate(model, [prompt] * rows, seeds, sampling, -1, decoders=decoders)
    assert all(len(r.ids) == n for r in out)


def by_transformers(cache, model, prompt, rows, n):
    ids = torch.tensor([prompt] * rows, device=model.device)
    options = dict(do_sample=True, temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.1)
    options |= dict(max_new_tokens=n, cache_implementation=cache, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert out.shape[1] == len(prompt) + n


def decode_table(model, prompt, rows, runs, repeats, bandwidth):
    """A line per run {(label, new tokens): function}: the best of several turns, as load only adds.

    In the first turn caches are made, graphs captured, kernels compiled.
    """
    times = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for (label, n), run in runs.items():
            progress(f"{label}, {n:,} tokens, turn {turn}")
            call = partial(run, model, prompt, rows, n)
            times[label, n].append(seconds(call, model.device, repeats=1, warmup=0))
    lines = []
    for (label, n), took in times.items():
        s = min(took[1:]) / n
        moved = plan.step_bytes(model, rows, len(prompt) + n / 2)
        line = {"": label, "tokens a row": n, "first call, s": took[0]}
        line |= {"tokens/s": rows / s, "ms a step": s * 1e3, "GB a step": moved / 1e9}
        lines.append(line | {"% of the bound": 100 * moved / bandwidth / s})
    return lines


def decoding(args):
    """Tokens per second and bytes per token, beside copy bandwidth and transformers' generate."""
    device = default_device()
    gpu = device.type == "cuda"
    name, bandwidth = device_name(device), copy_bandwidth(device)
    print(f"{name}; torch {torch.__version__}; copy {bandwidth / 1e9:.4g} GB/s\n")
    lengths = args.tokens or ([512, 2048, 8192] if gpu else [128])
    peer, repeats = args.peer_tokens or min(256, max(lengths)), args.repeats or (2 if gpu else 7)
    results = []
    for model_name in args.model or (["9b"] if gpu else ["tiny", "tiny-attention"]):
        progress(f"{model_name}: random weights")
        model = random_model(model_name, device)
        size = sum(p.numel() for p in model.parameters())
        kernels = rollout.kernels(model)
        prompt = list(range(1, args.prompt + 1))
        decoders = rollout.Decoders()
        runs = {("rollout.generate", n): partial(by_us, decoders) for n in lengths}
        runs["transformers generate", peer] = partial(by_transformers, None)
        if args.static:
            label = "transformers generate, static cache"
            runs[label, peer] = partial(by_transformers, "static")
        lines = decode_table(model, prompt, args.rows, runs, repeats, bandwidth)
        if decode.FUSED[device.type]:
            decode.FUSED[device.type] = False
            decoders.free()  # with the graphs of the kernels in Triton
            label = "rollout.generate, decode.py in torch"
            runs = {(label, n): partial(by_us, decoders) for n in lengths}
            lines += decode_table(model, prompt, args.rows, runs, repeats, bandwidth)
            decode.FUSED[device.type] = True
        usual = next(line["tokens/s"] for line in lines if line[""] == "transformers generate")
        lines = [line | {"x generate": line["tokens/s"] / usual} for line in lines]
        sizes = f"{size / 1e6:,.2f} M parameters, {args.rows} rows, prompt {args.prompt}"
        print(f"{model_name}: {sizes}; {kernels}\n")
        table(lines)
        results.append({"model": model_name, "parameters": size, "kernels": kernels, "rows": lines})
        decoders.free()
        del model
        gc.collect()
    head = {"bench": "rollout", "device": name, "torch": torch.__version__}
    head |= {"copy GB/s": bandwidth / 1e9, "rows": args.rows, "prompt": args.prompt}
    return head | {"models": results}


# ----------------------------------------------------- step

PAPER_STEPS, PAPER_HOURS, PAPER_RANKS = 173, 48, 4
# Assumed of an A100-80GB: bytes, flops, bytes a second.
A100 = {"copy": 1.75e12, "matrix": 250e12, "link": 200e9}


class AnyToken:
    """The miniature's tokenizer for a model of any vocabulary: each id decodes to a word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids):
        return " ".join(f"word{i % 997}" for i in ids)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def get_vocab(self):
        return {"any": sys.maxsize - 1}

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


WORDS = 2000, 4000  # targets of the two groups, of the published 1,000 to 4,000
SPREAD = 0.85, 0.925, 1.0, 1.075, 1.15  # lengths of a group's rollouts, as shares of its target's


def planned_tokens(words, limit):
    """Tokens of a response: 2,000 of thinking and 4/3 a word, scaled from a limit of 8,192."""
    return round((2000 + words * 4 / 3) / 8192 * limit)


def end_as_planned(lengths, eos):
    """From now on `generate` ends row r after lengths[r] tokens: random weights know no end."""
    advance = rollout._advance

    def planned(d, places, prompts, limit, stop):
        rows = {r.row: place for place, r in enumerate(places) if r is not None}
        grown = advance(d, places, prompts, limit, ())
        for r, _ in grown:
            if len(r.ids) < limit and len(r.ids) >= lengths[r.row]:
                r.ids[lengths[r.row] - 1 :] = [eos]
                r.finished = True
                places[rows[r.row]], d.pos[rows[r.row]] = None, 0
        return grown

    rollout._advance = planned


def step_run(folder, layers, tokens, url, gpu, mesh, device):
    """A trainer's Run at a rank's share of the published step (2 groups of 6), random weights."""
    world.make_model(folder, world.fables(200, 0), 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if gpu else torch.float32
    config = Qwen3_5TextConfig(**TINY | {"num_hidden_layers": layers}, **DELTA)
    if gpu:
        config = Qwen3_5TextConfig(num_hidden_layers=layers)  # all else as the 9B
    with device:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    options = f"--prompts 2 --group 6 --max-response {tokens} --repetition-penalty 1.1"
    cfg = parse([*options.split(), "--recompute", "--micro-tokens", "16384"])
    model, copy = load_policy(folder, mesh, device, cfg.recompute)
    examples = []
    for e, words in zip(world.fables(2, 1), WORDS, strict=True):
        text = tokenizer(e.story * tokens).input_ids[: planned_tokens(words, tokens)]
        # The whole story: EOS comes on top.
        examples.append(replace(e, story=tokenizer.decode(text), target_words=words))
    # AdamW's moments would not fit beside the uncut head.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    client = Judge(url, "offline", concurrency=16)
    models = AnyToken(tokenizer), model, copy, optimizer
    return polaris.Run(cfg, folder, mesh, device, *models, client, examples, [])


def step(args):
    """One rank's share of a published training step through train_step, and what it projects to.

    "judge hidden" is 1 - (seconds that the rank waited for verdicts with nothing else to do) / (sum
    of the seconds of its judge calls): 1 if decoding and gradient work cover every call, 0 if the
    rank sat through one after the other.
    """
    device = default_device()
    gpu = device.type == "cuda"
    tokens = args.tokens or (8192 if gpu else 192)
    delay = args.delay
    if delay is None:
        delay = 20.0 if gpu else 0.2
    name, rate = device_name(device), matrix_rate(device, torch.bfloat16 if gpu else torch.float32)
    bandwidth = copy_bandwidth(device)
    means = " and ".join(str(planned_tokens(words, tokens)) for words in WORDS)
    limits = f"copy {bandwidth / 1e9:.4g} GB/s, GEMM {rate / 1e12:.4g} Tflop/s"
    print(f"""\
{name}; torch {torch.__version__}; {limits}
2 prompts, 10 rollouts and 2 anchors of up to {tokens} tokens; judge: {delay:g} s a call
Random weights end no story, so lengths are planned: for targets of {WORDS[0]:,} and {WORDS[1]:,}
words, {means} tokens (2,000 of thinking and 4/3 a word, scaled from 8,192 to {tokens:,});
the rollouts have {", ".join(map(str, SPREAD))} times as many, cut off at the limit.
judge hidden = 1 - (seconds the rank waits for verdicts) / (sum of the seconds of its judge calls)
""")
    polaris.join()
    mesh, device = polaris.setup(parse([]))
    process, url = start_stand_in(delay=delay)
    planned, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        for layers in args.layers:
            progress(f"{layers} layers: random weights")
            run = step_run(Path(folder) / str(layers), layers, tokens, url, gpu, mesh, device)
            if not lines:
                end_as_planned(planned, run.tokenizer.eos_token_id)
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
            taken = []
            for number in range(20, 21 + args.repeats):  # the first one captures and compiles
                progress(f"{layers} layers: step {number - 19} of {args.repeats + 1}")
                examples = data.step_examples(run.train, run.cfg.seed, number, len(WORDS))
                targets = [planned_tokens(e.target_words, tokens) for e in examples]
                planned[:] = [round(s * target) for target in targets for s in SPREAD]
                metrics, rows = polaris.train_step(run, number)
                taken.append(step_line(run, layers, metrics, rows, rate))
            # Other work on the machine only adds, so the fastest step stands for all.
            lines.append(min(taken[1:], key=lambda line: line["step, s"]))
            run.judge.close()
            del run
            free(device)
    process.stdin.close()
    table(lines)
    result = {"bench": "step", "device": name, "torch": torch.__version__}
    result |= {"tokens": tokens, "delay": delay, "rows": lines}
    return result | (project(lines, bandwidth, rate) if gpu else arithmetic())


def step_line(run, layers, metrics, rows, rate):
    """A line of the table from what train_step returned."""
    gpu, times = run.device.type == "cuda", metrics["time"]
    seen = sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)
    size = sum(p.numel() for p in run.copy.model.layers.parameters())
    head = run.copy.lm_head.weight.numel()
    flops = 8 * size * seen + 6 * head * metrics["tokens"]
    peak = torch.cuda.max_memory_allocated(run.device) if gpu else _status("VmHWM")
    return {
        "layers": layers,
        "parameters, M": (size + 2 * head) / 1e6,
        "rollout, s": times["rollout"],
        "judge wait, s": times["judge_wait"],
        "update, s": times["update"],
        "sync, s": times["sync"],
        "step, s": times["step"],
        "tokens trained": seen,
        "update, tokens/s": seen / times["update"],
        "update, of matrix rate": flops / times["update"] / rate,
        "judge hidden": 1 - times["judge_wait"] / sum(r.verdict.seconds for r in rows),
        "peak, GB": peak / 1e9,
    }


def project(lines, bandwidth, rate):
    """Two layer counts -> a straight line -> 32 layers -> 173 steps, here and on A100s."""
    first, last = lines[0], lines[-1]

    def at_32(column):
        slope = (last[column] - first[column]) / (last["layers"] - first["layers"])
        return first[column] + slope * (32 - first["layers"])

    write, learn = at_32("rollout, s"), at_32("update, s")
    rest = at_32("sync, s") + last["judge wait, s"]
    here = (write + learn + rest) * PAPER_STEPS / 3600
    faster, stronger = bandwidth / A100["copy"], rate / A100["matrix"]
    there = write * faster + learn * stronger + rest
    hours = there * PAPER_STEPS / 3600
    print(f"""\
32 layers, by a straight line:
rollout {write:.0f} s + update {learn:.0f} s + sync and judge {rest:.0f} s;
x {PAPER_STEPS} steps = {here:.1f} h on four of this device, without FSDP's communication.
On A100-80GB: rollout x {faster:.2f} (bandwidth), update x {stronger:.2f} (matrix rate)
= {there:.0f} s a step, {hours:.1f} h for the run (published: {PAPER_HOURS} h).""")
    return {"hours here": here, "hours on A100": hours}


def arithmetic():
    """The published run on A100s by assumed rates and shares: nothing in it is measured."""
    decode, learn = 0.7, 0.4  # targets: of the bandwidth, of the matrix rate
    delay, limit = 20.0, 8192  # seconds a verdict, tokens a response
    model = plan.meta_model(CONFIGS["9b"]())
    parts = model.model.layers, model.lm_head
    layers, head = (sum(p.numel() for p in part.parameters()) for part in parts)
    means = [planned_tokens(words, limit) for words in WORDS]
    # An anchor and five rollouts.
    groups = [[mean, *(min(limit, round(s * mean)) for s in SPREAD)] for mean in means]
    first, tokens, steps = sum(groups[0]), sum(map(sum, groups)), max(groups[-1])
    moved = plan.step_bytes(model, 10, steps / 2)
    write = steps * moved / (decode * A100["copy"])
    # A token: forward, again, and twice that backward; the head without the second.
    flops = 8 * layers + 6 * head
    update = flops * tokens / (learn * A100["matrix"])
    wait = max(0.0, delay - update * first / tokens)
    sync = 2 * sum(p.numel() for p in model.parameters()) / A100["link"]
    seconds = write + update + wait + sync
    hours, giga = PAPER_STEPS * seconds / 3600, flops / 1e9
    copy, matrix, link = A100["copy"] / 1e12, A100["matrix"] / 1e12, A100["link"] / 1e9
    reached = f"{decode:.0%} and {learn:.0%} of the first two are reached"
    print(f"""\
By arithmetic alone, with no number of this machine: a step of the 9B on four A100-80GB, if one
copies {copy:g} TB/s, multiplies at {matrix:g} Tflop/s and gathers {link:g} GB/s, and {reached}.
  rollout  {steps:,} tokens x {moved / 1e9:.1f} GB / ({decode:g} x {copy:g} TB/s) = {write:.0f} s
  update   {tokens:,} tokens x {giga:.1f} Gflop / ({learn:g} x {matrix:g} Tflop/s) = {update:.0f} s
  judge    {delay:g} s for the last verdict, less the first half of the update = {wait:.0f} s
  sync     {sync:.1f} s
  run      {PAPER_STEPS} x {seconds:.0f} s = {hours:.1f} h (published: {PAPER_HOURS} h)
""")
    return {"arithmetic, hours on A100": hours}


# --------------------------------------------------- memory


def memory(args):
    """What one of four GPUs of the published run holds in the phases of a step, by plan.py."""
    run, config = Config(), CONFIGS["9b"]()
    run = replace(run, micro_tokens=args.micro_tokens or run.micro_tokens)
    parts = plan.memory(config, run, PAPER_RANKS)
    lines, sums = [], dict.fromkeys(plan.PHASES, 0.0)
    for name, size, phases in parts:
        held = {phase: size / 1e9 if phase in phases else None for phase in plan.PHASES}
        lines.append({"part": name} | held)
    for phase in plan.PHASES:
        sums[phase] = sum(size for _, size, phases in parts if phase in phases) / 1e9
    table([*lines, {"part": "all"} | sums])
    model = plan.meta_model(config)
    fused = plan.layer_activations(model, run.micro_tokens, fused=True) / 1e9
    saved = next(line["layers"] for line in lines if "recomputed" in line["part"]) - fused
    print(f"""\
What a layer's gradients take while they are made is not counted.
With flash-linear-attention one layer keeps {fused:.1f} GB: {saved:.1f} GB less in `layers`.
An 80 GB card has 80 GiB: 85.9 of these GB, before CUDA's context and NCCL's buffers.
""")
    return {"bench": "memory", "GB": lines, "sum": sums, "layer with flash-linear-attention": fused}


# ----------------------------------------------------- main


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")

    def benchmark(name, run, text):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        return command.add_argument

    add = benchmark("logprob", logprob, "log-probs of the vocabulary head, forward and backward")
    add("--tokens", type=int, nargs="+", help="default: 8192 16384 on a GPU, 2048 on a CPU")
    add("--hidden", type=int, help="default: 4096 on a GPU, 256 on a CPU")
    add("--vocab", type=int, help="default: 248320 on a GPU, 32000 on a CPU")
    add("--repeats", type=int, default=5, help="timed calls of each [5]")

    add = benchmark("rollout", decoding, "sampling, beside transformers' generate")
    add("--model", nargs="+", choices=CONFIGS, help="default: 9b on a GPU, else the tiny ones")
    add("--rows", type=int, default=10, help="responses at a time [10]")
    add("--prompt", type=int, default=64, help="tokens of the prompt [64]")
    add("--tokens", type=int, nargs="+", help="a row; default: 512 2048 8192 on a GPU, else 128")
    add("--peer-tokens", type=int, help="a row, in transformers' runs; default: at most 256")
    text = "skip generate on a static cache"
    add("--no-static", dest="static", action="store_false", help=text)
    add("--repeats", type=int, help="turns after the first; default: 2 on a GPU, 7 on a CPU")

    text = "one rank's share of a published training step, with a slow judge"
    add = benchmark("step", step, text)
    text = "sizes to measure, multiples of 4 (one in four is attention); the 9B has 32 [4 8]"
    add("--layers", type=int, nargs="+", default=[4, 8], help=text)
    add("--tokens", type=int, help="response limit; default: 8192 on a GPU, 192 on a CPU")
    add("--delay", type=float, help="seconds the judge takes; default: 20 on a GPU, 0.2 on a CPU")
    add("--repeats", type=int, default=1, help="steps after the first; the fastest is shown [1]")

    add = benchmark("memory", memory, "what a GPU of the published run holds, part by part")
    add("--micro-tokens", type=int, help="as in polaris.py; default: the published run's")

    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    main()
