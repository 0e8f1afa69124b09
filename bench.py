"""Benchmarks: each in one run on the same tensors, beside the peers it can import, in units of the device's limits.

    python bench.py logprob            log-probs of the vocabulary head, forward and backward
    python bench.py rollout            sampling, beside transformers' generate
    python bench.py step               one rank's share of a published training step, with a slow judge
    python bench.py memory             what a GPU of the published run holds, part by part: counted, not measured

A run prints Markdown tables; its last line is JSON with the same numbers. Times are medians after a warm-up.
The limits are measured too: the matrix rate (best of large square GEMMs), the copy bandwidth (bytes read + written).
"""

import argparse
import ctypes
import functools
import gc
import importlib.util
import json
import platform
import re
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

import decode  # noqa: E402
import grpo  # noqa: E402
import rollout  # noqa: E402

# -------------------------------------------------------------------------------------------- shared by all benchmarks


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
        a, b = (
            torch.randn(n, n, device=device).to(dtype),
            torch.randn(n, n, device=device).to(dtype),
        )
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, device, repeats=7))
    return max(rates)


def copy_bandwidth(device):
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.ones(
        2**30 if device.type == "cuda" else 2**26, device=device
    )  # 4 GiB or 256 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def extra_memory(function, device):
    """Peak bytes that a call of `function` holds beyond those held before: allocator on a GPU, process on a CPU.

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
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # or the call could fill free pages that the process still holds
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
    """Print dicts of one set of keys as a Markdown table; numbers keep three digits, None is a dash."""

    def text(x):
        if not isinstance(x, float):
            return "–" if x is None else str(x)
        return (
            f"{x:.1e}"
            if 0 < abs(x) < 1e-2
            else f"{x:,.{max(0, 2 - len(str(int(abs(x)))) + (abs(x) < 10))}f}"
        )

    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for i, line in enumerate(lines):
        print(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
        )
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def progress(text):
    print(f"  {text} …", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- logprob


HEAD_COLUMNS = (
    "",
    "GEMMs",
    "ms",
    "x its GEMMs",
    "extra GB",
    "error logp",
    "error d hidden",
    "error d weight",
    "note",
)


def logprob(args):
    """Time, extra memory and error of sum(coef * logp), its log-probs and both gradients, per implementation."""
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
        for turn in range(
            args.repeats
        ):  # in turns, so that a busy moment of the machine hits all alike
            progress(f"turn {turn + 1} of {args.repeats}")
            rate = max(rate, matrix_rate(device, dtype))
            for row, call, took in zip(rows, calls, times, strict=True):
                if not row["note"]:
                    took.append(seconds(call, device, repeats=1, warmup=1))
        for row, took in zip(rows, times, strict=True):
            if took:
                row["ms"] = 1e3 * statistics.median(took)
                row["x its GEMMs"] = row["ms"] / 1e3 / (row["GEMMs"] * 2 * n * h * v / rate)
        print(f"N {n:,}, H {h:,}, V {v:,}, {dtype}: forward and backward, temperature 1\n")
        table(rows)
        result["time"].append({"tokens": n, "hidden": h, "vocab": v, "rows": rows})
        del inputs, reference, calls

    h, v = (h, v) if gpu else (64, 8192)  # a CPU takes minutes for 65,536 tokens at the sizes above
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
                row[f"N {n:,}"] = (
                    extra_memory(call, device) - sum(x.nbytes for x in inputs[:2])
                ) / 1e9
            except Exception as error:
                row[f"N {n:,}"] = failure(run, error)
        result["memory"].append(row)
    print(f"Extra GB beyond inputs and gradients, H {h:,}, V {v:,}, {dtype}\n")
    table(result["memory"])
    print(
        f"{name}; torch {torch.__version__}; {rate / 1e12:.3g} Tflop/s in {dtype}; copy {bandwidth / 1e9:.4g} GB/s\n"
    )
    return result | {"matrix_tflops": rate / 1e12, "copy_gb_s": bandwidth / 1e9}


def check_head(row, run, call, reference, device):
    """Fill in errors and memory of one implementation. Returns why it cannot be timed, or nothing."""
    if isinstance(run, str):
        return run
    try:
        outputs = call()
        if run is not liger_sum:  # which computes another sum
            row |= zip(HEAD_COLUMNS[5:8], map(relative_error, outputs, reference), strict=True)
        del outputs
        row["extra GB"] = extra_memory(call, device) / 1e9
    except Exception as error:
        return failure(run, error)
    return ""


def failure(run, error):
    """What the table says of an implementation that failed; an error of our own, but lack of memory, ends the run."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if run in OURS:
        raise error
    return f"failed: {type(error).__name__}: {str(error).strip()[:80]}".replace("\n", " ")


def head_problem(n, h, v, dtype, device):
    """hidden [n, h], weight [v, h] with logits of standard deviation 3, targets [n], GRPO-like coefficients [n]."""
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
    logp, dh, dw = (
        torch.empty_like(coef, dtype=w.dtype),
        torch.empty_like(hidden, dtype=w.dtype),
        torch.zeros_like(w),
    )
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
    return max(float((a.double() - b).abs().max()) for a, b in pairs) / max(
        float(b.abs().max()) for _, b in pairs
    )


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


OURS = [
    partial(f, backend=backend)
    for f in (two_passes, one_sweep)
    for backend in ("chunked", "triton")
]


def liger(hidden, weight, targets, coef):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)(
        weight, hidden, targets
    )
    return -(coef * loss).sum(), -loss


def liger_sum(hidden, weight, targets, coef):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(
        weight, hidden, targets
    )
    return loss, loss


def cut_cross_entropy(hidden, weight, targets, coef):
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    return -(coef * loss).sum(), -loss


def implementations(gpu):
    """Label -> (GEMMs of the scheme, function(hidden, weight, targets, coef) -> (loss, logp) or why there is none)."""
    have = {
        module: importlib.util.find_spec(module)
        for module in ("triton", "liger_kernel", "cut_cross_entropy")
    }
    compiled = (
        torch.compile(usual_code, dynamic=False) if gpu or shutil.which("g++") else "needs g++"
    )
    chunked_2, triton_2, chunked_1, triton_1 = OURS
    if not (gpu and have["triton"]):
        triton_2 = triton_1 = "needs a GPU and Triton"
    ligers = (
        [liger, liger_sum] if gpu and have["liger_kernel"] else ["needs a GPU and liger-kernel"] * 2
    )
    cce = (
        cut_cross_entropy
        if gpu and have["cut_cross_entropy"]
        else "needs a GPU and cut-cross-entropy"
    )
    return {
        "naive": (3, usual_code),
        "naive, torch.compile": (3, compiled),
        "token_logprobs, chunked": (4, chunked_2),
        "token_logprobs, triton": (4, triton_2),
        "onpolicy_loss, chunked": (3, chunked_1),
        "onpolicy_loss, triton": (3, triton_1),
        "Liger, per token (no entropy)": (4, ligers[0]),
        "Liger, unweighted sum (no log-probs, no entropy)": (3, ligers[1]),
        "cut cross-entropy (no entropy)": (4, cce),
    }


# -------------------------------------------------------------------------------------------------------------- rollout

TINY = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
DELTA = dict(
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)


def random_model(name, device):
    """A model of random weights: two of a million parameters in fp32, or Qwen3.5-9B's language part in bf16."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

    config = {
        "tiny": lambda: Qwen3_5TextConfig(
            **TINY, **DELTA
        ),  # three delta-rule layers to one of attention, as the 9B
        "tiny-attention": lambda: Qwen3Config(**TINY),
        "9b": lambda: Qwen3_5TextConfig(),  # its defaults are the 9B's shape
    }[name]()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if name == "9b" else torch.float32
        )
    model.generation_config.eos_token_id = None  # every row writes all its tokens
    return model.eval()


def step_bytes(model, rows, length):
    """Bytes that a decode step must move: weights, keys and values read once; recurrent states read and written."""
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # a few rows of it are looked up
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    cache = (
        kinds.count("full_attention")
        * 2
        * config.num_key_value_heads
        * config.head_dim
        * length
        * size
    )
    if delta := kinds.count("linear_attention"):
        k, v = config.linear_key_head_dim, config.linear_value_head_dim
        heads_k, heads_v = config.linear_num_key_heads, config.linear_num_value_heads
        convolution = (2 * heads_k * k + heads_v * v) * config.linear_conv_kernel_dim * size
        cache += delta * 2 * (heads_v * k * v * 4 + convolution)  # the recurrent state is fp32
    return weights + rows * cache


def write(model, prompt, rows, n):
    seeds = [rollout.row_seed(0, 0, "bench", k) for k in range(rows)]
    out = rollout.generate(model, [prompt] * rows, seeds, rollout.Sampling(max_new_tokens=n), ())
    assert all(len(r.ids) == n for r in out)


def write_by_transformers(cache, model, prompt, rows, n):
    ids = torch.tensor([prompt] * rows, device=model.device)
    sampling = dict(do_sample=True, temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.1)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        cache_implementation=cache,
        pad_token_id=0,
        **sampling,
    )
    assert out.shape[1] == len(prompt) + n


def decode_table(model, prompt, rows, runs, repeats, bandwidth):
    """A line per run {(label, new tokens): function}: the best of several turns in rotation, as load only adds.

    In the first turn caches are made, graphs captured, kernels compiled.
    """
    times = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for (label, n), run in runs.items():
            progress(f"{label}, {n:,} tokens, turn {turn}")
            call = functools.partial(run, model, prompt, rows, n)
            times[label, n].append(seconds(call, model.device, repeats=1, warmup=0))
    lines = []
    for (label, n), took in times.items():
        s, moved = min(took[1:]) / n, step_bytes(model, rows, len(prompt) + n / 2)
        line = {
            "": label,
            "tokens a row": n,
            "first call, s": took[0],
            "tokens/s": rows / s,
            "ms a step": s * 1e3,
        }
        lines.append(
            line | {"GB a step": moved / 1e9, "% of the floor": 100 * moved / bandwidth / s}
        )
    return lines


def decoding(args):
    """Tokens per second and bytes per token, against the copy bandwidth and transformers' generate."""
    device = default_device()
    gpu = device.type == "cuda"
    name, bandwidth = device_name(device), copy_bandwidth(device)
    print(f"{name}; torch {torch.__version__}; copy {bandwidth / 1e9:.4g} GB/s\n")
    lengths = args.tokens or ([512, 2048, 8192] if gpu else [128])
    peer, repeats = args.peer_tokens or min(256, max(lengths)), args.repeats or (2 if gpu else 7)
    results = []
    for label in args.model or (["9b"] if gpu else ["tiny", "tiny-attention"]):
        progress(f"{label}: random weights")
        model = random_model(label, device)
        size = sum(p.numel() for p in model.parameters())
        kernels = rollout.kernels(model)
        prompt = list(range(1, args.prompt + 1))
        runs = {("rollout.generate", n): write for n in lengths}
        runs["transformers generate", peer] = functools.partial(write_by_transformers, None)
        if args.static:
            runs["transformers generate, static cache", peer] = functools.partial(
                write_by_transformers, "static"
            )
        lines = decode_table(model, prompt, args.rows, runs, repeats, bandwidth)
        if decode.FUSED[device.type]:
            decode.FUSED[device.type] = False
            rollout._decoders.clear()  # with the graphs of the kernels in Triton
            runs = {("rollout.generate, decode.py in torch", n): write for n in lengths}
            lines += decode_table(model, prompt, args.rows, runs, repeats, bandwidth)
            decode.FUSED[device.type] = True
        usual = next(line["tokens/s"] for line in lines if line[""] == "transformers generate")
        lines = [line | {"x generate": line["tokens/s"] / usual} for line in lines]
        print(
            f"{label}: {size / 1e6:,.2f} M parameters, {args.rows} rows, prompt {args.prompt}; {kernels}\n"
        )
        table(lines)
        results.append({"model": label, "parameters": size, "kernels": kernels, "rows": lines})
        del model
        gc.collect()
    head = {
        "bench": "rollout",
        "device": name,
        "torch": torch.__version__,
        "copy GB/s": bandwidth / 1e9,
    }
    return head | {"rows": args.rows, "prompt": args.prompt, "models": results}


# --------------------------------------------------------------------------------------------------------------- step

PAPER_STEPS, PAPER_HOURS, PAPER_RANKS = 173, 48, 4
A100 = {
    "copy": 1.75e12,
    "matrix": 250e12,
    "link": 200e9,
}  # bytes, flops, bytes a second: assumed of an A100-80GB


class AnyToken:
    """The miniature's tokenizer for a model of any vocabulary: each id decodes to a word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids):
        return " ".join(f"word{i % 997}" for i in ids)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


WORDS = 2000, 4000  # targets of the two groups, of the published 1,000 to 4,000
SPREAD = 0.85, 0.925, 1.0, 1.075, 1.15  # lengths of one group's drafts, as shares of its target's


def planned_tokens(words, limit):
    """Tokens of a response: 2,000 of thinking and 4/3 a word, scaled from the published limit of 8,192 to `limit`."""
    return round((2000 + words * 4 / 3) / 8192 * limit)


def end_as_planned(lengths, eos):
    """Random weights know no end: from now on `generate` ends row r with EOS after lengths[r] tokens, never before."""
    advance = rollout._advance

    def planned(d, places, prompts, limit, stop, on_tokens):
        rows = list(enumerate(places))
        ended = advance(d, places, prompts, limit, (), on_tokens)
        for place, r in rows:
            if places[place] is not None and len(r.ids) >= lengths[r.row]:
                r.ids[lengths[r.row] - 1 :] = [eos]
                r.finished, places[place], d.pos[place] = True, None, 0
                ended.append(r)
        return ended

    rollout._advance = planned


def step_run(folder, layers, tokens, url, gpu, mesh, device):
    """A trainer's Run at one rank's share of the published step (2 prompts, groups of 6), with random weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5TextConfig

    import polaris
    from mini import world

    world.make_model(folder, world.fables(200, 0), 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if gpu:
        config = Qwen3_5TextConfig(
            num_hidden_layers=layers
        )  # all else at its defaults: the 9B's shape
        with device:
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    else:
        config = Qwen3_5TextConfig(**TINY | {"num_hidden_layers": layers}, **DELTA)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    options = f"--prompts 2 --group 6 --max-response {tokens} --repetition-penalty 1.1 --recompute --micro-tokens 16384"
    cfg = polaris.parse(options.split())
    model, copy = polaris.load_policy(folder, mesh, device, cfg.recompute)
    examples = []
    for e, words in zip(world.fables(2, 1), WORDS, strict=True):
        text = tokenizer(e.story * tokens).input_ids[
            : planned_tokens(words, tokens)
        ]  # whole story: EOS comes on top
        examples.append(polaris.replace(e, story=tokenizer.decode(text), target_words=words))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-6
    )  # AdamW's moments would not fit beside the uncut head
    client = polaris.Judge(url, "offline", concurrency=16)
    return polaris.Run(
        cfg, folder, mesh, device, AnyToken(tokenizer), model, copy, optimizer, client, examples, []
    )


def step(args):
    """One rank's share of a published training step through the trainer's own train_step, and what it projects to.

    "judge hidden" is 1 - (seconds that the rank waited for verdicts with nothing else to do) / (sum of the seconds of
    its judge calls): 1 if decoding and gradient work cover every call, 0 if the rank sat through one after the other.
    """
    import tempfile

    import data
    import polaris
    from judge import start_stand_in

    device = default_device()
    gpu = device.type == "cuda"
    tokens, delay = (
        args.tokens or (8192 if gpu else 192),
        20.0 if args.delay is None and gpu else args.delay or 0.2,
    )
    name, rate = device_name(device), matrix_rate(device, torch.bfloat16 if gpu else torch.float32)
    bandwidth = copy_bandwidth(device)
    print(
        f"{name}; torch {torch.__version__}; copy {bandwidth / 1e9:.4g} GB/s, GEMM {rate / 1e12:.4g} Tflop/s"
    )
    print(
        f"2 prompts, 10 rollouts and 2 anchors of up to {tokens} tokens; judge: {delay:g} s a call"
    )
    means = " and ".join(str(planned_tokens(words, tokens)) for words in WORDS)
    print(
        f"Random weights end no story, so lengths are planned: for targets of {WORDS[0]:,} and {WORDS[1]:,} words,"
    )
    print(
        f"{means} tokens (2,000 of thinking and 4/3 a word, scaled from 8,192 to {tokens:,}); the drafts have"
    )
    print(f"{', '.join(map(str, SPREAD))} times as many, and the longest is cut off at the limit.")
    print(
        "judge hidden = 1 - (seconds the rank waits for verdicts) / (sum of the seconds of its judge calls)\n"
    )
    polaris.join()
    mesh, device = polaris.setup(polaris.parse([]))
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
                planned[:] = [
                    round(s * planned_tokens(e.target_words, tokens))
                    for e in examples
                    for s in SPREAD
                ]
                metrics, rows = polaris.train_step(run, number)
                taken.append(step_line(run, layers, metrics, rows, rate))
            # Other work on the machine only adds, so the fastest step stands for all.
            lines.append(min(taken[1:], key=lambda line: line["step, s"]))
            run.judge.close()
            del run
            free(device)
    process.stdin.close()
    table(lines)
    result = {
        "bench": "step",
        "device": name,
        "torch": torch.__version__,
        "tokens": tokens,
        "delay": delay,
    }
    result["rows"] = lines
    return result | (project(lines, bandwidth, rate) if gpu else arithmetic())


def step_line(run, layers, metrics, rows, rate):
    """A line of the table from what train_step returned."""
    gpu, times = run.device.type == "cuda", metrics["time"]
    seen = sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)
    size = sum(p.numel() for p in run.copy.model.layers.parameters())
    flops = 8 * size * seen + 6 * run.copy.lm_head.weight.numel() * metrics["tokens"]
    return {
        "layers": layers,
        "parameters, M": (size + 2 * run.copy.lm_head.weight.numel()) / 1e6,
        "rollout, s": times["rollout"],
        "judge wait, s": times["judge_wait"],
        "update, s": times["update"],
        "sync, s": times["sync"],
        "step, s": times["step"],
        "tokens trained": seen,
        "update, tokens/s": seen / times["update"],
        "update, of matrix rate": flops / times["update"] / rate,
        "judge hidden": 1 - times["judge_wait"] / sum(r.verdict.seconds for r in rows),
        "peak, GB": (torch.cuda.max_memory_allocated(run.device) if gpu else _status("VmHWM"))
        / 1e9,
    }


def project(lines, bandwidth, rate):
    """Two layer counts -> a straight line in the layers -> 32 layers -> 173 steps, here and on A100s."""
    first, last = lines[0], lines[-1]

    def at_32(column):
        slope = (last[column] - first[column]) / (last["layers"] - first["layers"])
        return first[column] + slope * (32 - first["layers"])

    write, learn, rest = (
        at_32("rollout, s"),
        at_32("update, s"),
        at_32("sync, s") + last["judge wait, s"],
    )
    here = (write + learn + rest) * PAPER_STEPS / 3600
    there = write * bandwidth / A100["copy"] + learn * rate / A100["matrix"] + rest
    print(
        f"32 layers, by a straight line: rollout {write:.0f} s + update {learn:.0f} s + sync and judge {rest:.0f} s; "
        f"x {PAPER_STEPS} steps = {here:.1f} h on four of this device, without FSDP's communication.\n"
        f"On A100-80GB: rollout x {bandwidth / A100['copy']:.2f} (bandwidth), update x {rate / A100['matrix']:.2f} "
        f"(matrix rate) = {there:.0f} s a step, {there * PAPER_STEPS / 3600:.1f} h for the run "
        f"(published: {PAPER_HOURS} h)."
    )
    return {"hours here": here, "hours on A100": there * PAPER_STEPS / 3600}


def arithmetic():
    """The published run on A100s from rates and shares that are assumed: nothing in it is measured, and it says so."""
    decode, learn, delay, limit = (
        0.7,
        0.4,
        20.0,
        8192,
    )  # targets: of the bandwidth, of the matrix rate; s a verdict
    model = random_model("9b", torch.device("meta"))
    layers, head = (
        sum(p.numel() for p in m.parameters()) for m in (model.model.layers, model.lm_head)
    )
    means = [planned_tokens(words, limit) for words in WORDS]
    groups = [
        [mean, *(min(limit, round(s * mean)) for s in SPREAD)] for mean in means
    ]  # an anchor and five drafts
    first, tokens, steps = sum(groups[0]), sum(map(sum, groups)), max(groups[-1])
    moved = step_bytes(model, 10, steps / 2)
    write = steps * moved / (decode * A100["copy"])
    flops = (
        8 * layers + 6 * head
    )  # a token: forward, again, and twice that backward; the head without the second
    update = flops * tokens / (learn * A100["matrix"])
    wait = max(0.0, delay - update * first / tokens)
    sync = 2 * sum(p.numel() for p in model.parameters()) / A100["link"]
    seconds = write + update + wait + sync
    hours = PAPER_STEPS * seconds / 3600
    copy, matrix, link = A100["copy"] / 1e12, A100["matrix"] / 1e12, A100["link"] / 1e9
    reached = f"{decode:.0%} and {learn:.0%} of the first two are reached"
    print(f"""\
By arithmetic alone, with no number of this machine in it: a step of the 9B on four A100-80GB, if one copies
{copy:g} TB/s, multiplies at {matrix:g} Tflop/s and gathers {link:g} GB/s, and {reached}.
  rollout  {steps:,} tokens x {moved / 1e9:.1f} GB / ({decode:g} x {copy:g} TB/s) = {write:.0f} s
  update   {tokens:,} tokens x {flops / 1e9:.1f} Gflop / ({learn:g} x {matrix:g} Tflop/s) = {update:.0f} s
  judge    {delay:g} s for the last verdict, less the update of the first wave = {wait:.0f} s of waiting
  sync     {sync:.1f} s
  run      {PAPER_STEPS} x {seconds:.0f} s = {hours:.1f} h (published: {PAPER_HOURS} h)
""")
    return {"arithmetic, hours on A100": hours}


# -------------------------------------------------------------------------------------------------------------- memory

PHASES = "writing", "head", "layers", "root", "optimiser"


def memory(args):
    """What one of four GPUs of the published run holds, from the configuration and the model's shape.

    Phases: writing; the head's sweep; the backward pass through the layers; the reduction of the root's gradients
    (embedding and head); the optimiser's step. Not counted: CUDA's context, NCCL's buffers, fragmentation.
    """
    import polaris

    cfg, ranks = polaris.Config(), PAPER_RANKS
    model = random_model("9b", torch.device("meta"))
    config, total = model.config, sum(p.numel() for p in model.parameters())
    width, depth = config.hidden_size, config.num_hidden_layers
    layer, ends = (
        max(sum(p.numel() for p in m.parameters()) for m in model.model.layers),
        config.vocab_size * width,
    )
    rows = -(-cfg.prompts * cfg.group // ranks)
    length = (
        -(-(cfg.max_prompt + cfg.max_response) // rollout.BUCKET["cuda"]) * rollout.BUCKET["cuda"]
    )
    states = step_bytes(model, rows, length) - step_bytes(
        model, 0, length
    )  # counts recurrent states twice
    states -= rows * (step_bytes(model, 1, 0) - step_bytes(model, 0, 0)) / 2
    tokens, chunk = (
        args.micro_tokens or cfg.micro_tokens,
        grpo.CHUNK_ROWS["cuda"] * config.vocab_size * 4,
    )
    update = PHASES[1:]
    parts = [
        (f"fp32 master weights, 1/{ranks}", 4 * total / ranks, PHASES),
        (f"AdamW moments, 1/{ranks}", 8 * total / ranks, PHASES),
        ("whole bf16 copy that writes", 2 * total, PHASES),
        (f"its cache: {rows} rows of {length:,} tokens", states, PHASES),
        (f"fp32 gradients, 1/{ranks}", 4 * total / ranks, update),
        ("embedding and head, gathered, bf16", 2 * 2 * ends, ("head", "layers", "root")),
        (
            f"inputs of {depth} layers, {tokens:,} tokens, bf16",
            2 * depth * tokens * width,
            ("head", "layers"),
        ),
        ("head's gradient, fp32 sum", 4 * ends, ("head",)),
        ("logits of a chunk, fp32; then that sum in bf16", max(chunk, 2 * ends), ("head",)),
        ("head's gradient, bf16", 2 * ends, ("layers", "root")),
        (
            "one layer recomputed, delta rule in torch",
            layer_activations(model, tokens, fused=False),
            ("layers",),
        ),
        (
            "two layers gathered, bf16; a gradient, bf16 and fp32",
            (2 * 2 + 2 + 4 + 4 / ranks) * layer,
            ("layers",),
        ),
        ("embedding's gradient, bf16", 2 * ends, ("root",)),
        ("both reduced in fp32, in and out", 2 * (4 + 4 / ranks) * ends, ("root",)),
        (f"AdamW's own square roots, fp32, 1/{ranks}", 4 * total / ranks, ("optimiser",)),
    ]
    lines = [
        {"part": name} | {p: size / 1e9 if p in when else None for p in PHASES}
        for name, size, when in parts
    ]
    sums = {phase: sum(size for _, size, when in parts if phase in when) / 1e9 for phase in PHASES}
    table([*lines, {"part": "all"} | sums])
    fused = layer_activations(model, tokens, fused=True) / 1e9
    saved = next(line["layers"] for line in lines if "recomputed" in line["part"]) - fused
    print("What a layer's gradients take while they are made is not counted.")
    print(
        f"With flash-linear-attention one layer keeps {fused:.1f} GB, so the phase `layers` is {saved:.1f} GB less."
    )
    print(
        "An 80 GB card has 80 GiB, which are 85.9 of these GB, before CUDA's context and NCCL's buffers.\n"
    )
    return {"bench": "memory", "GB": lines, "sum": sums, "layer with flash-linear-attention": fused}


def layer_activations(model, tokens, fused):
    """Bytes that a decoder layer keeps for its backward pass at [1, tokens], counted on meta tensors; the larger kind.

    Attention counts as a fused kernel. So does the delta rule if `fused`: inputs and output; else torch keeps all.
    """
    code = sys.modules[type(model).__module__]
    unfused = torch.nn.functional.scaled_dot_product_attention, code.torch_chunk_gated_delta_rule
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: _Kept.apply(q, q, k, v)
    if fused:
        code.torch_chunk_gated_delta_rule = lambda q, k, v, g, beta, **_: (
            _Kept.apply(v, q, k, v, g, beta),
            None,
        )
    x = torch.empty(
        1, tokens, model.config.hidden_size, dtype=model.dtype, device="meta", requires_grad=True
    )
    positions, most = torch.zeros(1, tokens, dtype=torch.long, device="meta"), 0
    angles = model.model.rotary_emb(x, positions.expand(3, 1, tokens))
    for kind in ("linear_attention", "full_attention"):
        layer = model.model.layers[model.config.layer_types.index(kind)]
        weights, kept = {p.untyped_storage()._cdata for p in layer.parameters()}, {}

        def keep(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # alive, so that no other takes its number
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x, position_embeddings=angles, attention_mask=None, position_ids=positions)
        most = max(most, sum(storage.nbytes() for storage in kept.values()))
    torch.nn.functional.scaled_dot_product_attention, code.torch_chunk_gated_delta_rule = unfused
    return most


class _Kept(torch.autograd.Function):
    """A kernel that keeps its inputs and an output like `out`, for counting."""

    @staticmethod
    def forward(ctx, out, *inputs):
        result = torch.empty_like(out)
        ctx.save_for_backward(*inputs, result)
        return result


# ---------------------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")

    command = commands.add_parser(
        "logprob", help="log-probs of the vocabulary head, forward and backward"
    )
    command.add_argument(
        "--tokens", type=int, nargs="+", help="default: 8192 16384 on a GPU, 2048 on a CPU"
    )
    command.add_argument("--hidden", type=int, help="default: 4096 on a GPU, 256 on a CPU")
    command.add_argument("--vocab", type=int, help="default: 248320 on a GPU, 32000 on a CPU")
    command.add_argument("--repeats", type=int, default=5)
    command.set_defaults(run=logprob)

    command = commands.add_parser("rollout", help="sampling, beside transformers' generate")
    command.add_argument(
        "--model", nargs="+", choices=["tiny", "tiny-attention", "9b"], help="default: 9b on a GPU"
    )
    command.add_argument("--rows", type=int, default=10)
    command.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    command.add_argument(
        "--tokens", type=int, nargs="+", help="a row; default: 512 2048 8192 on a GPU, 128 on a CPU"
    )
    command.add_argument(
        "--peer-tokens", type=int, help="a row, in transformers' runs; default: at most 256"
    )
    command.add_argument(
        "--no-static", dest="static", action="store_false", help="skip generate on a static cache"
    )
    command.add_argument(
        "--repeats", type=int, help="turns after the first; default: 2 on a GPU, 7 on a CPU"
    )
    command.set_defaults(run=decoding)

    command = commands.add_parser(
        "step", help="one rank's share of a published training step, with a slow judge"
    )
    command.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[4, 8],
        help="sizes to measure, multiples of 4 (one in four is attention); the 9B has 32 [4 8]",
    )
    command.add_argument(
        "--tokens", type=int, help="response limit; default: 8192 on a GPU, 192 on a CPU"
    )
    command.add_argument(
        "--delay", type=float, help="seconds the judge takes; default: 20 on a GPU, 0.2 on a CPU"
    )
    command.add_argument(
        "--repeats", type=int, default=1, help="steps after the first; the fastest is shown"
    )
    command.set_defaults(run=step)

    command = commands.add_parser(
        "memory", help="what a GPU of the published run holds, part by part"
    )
    command.add_argument(
        "--micro-tokens", type=int, help="as in polaris.py; default: the published run's"
    )
    command.set_defaults(run=memory)

    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    main()
