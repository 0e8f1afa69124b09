"""Rollouts: text out of a Hugging Face causal language model, near the speed of memory (POLARIS, arXiv 2606.04095).

A decoded token reads every weight once and the cache of every row once, so its floor is bytes / bandwidth. This module
spends little besides: static tensors, one step that never waits for the host, captured on a GPU as a CUDA graph. It
takes the place of the release's vLLM, a second framework with names and kernels of its own for every weight.

    rows        a prompt and its growing response each; every row has its own position, so nothing is ever padded
    prefill     once per distinct prompt; the state is copied to all rows of its group
    step        cache read up to a bucket -> logits -> sample -> token, position, `seen`: all on the device
    look        every LOOK steps the host reads the new tokens, hands out ended stories, refills or drops rows

A token x is drawn from the logits z of its row in the order of transformers' processors (`sample`):
    z_v <- z_v / r if z_v > 0 else z_v * r, for v in the row's prompt and response (repetition penalty r)
    p = softmax(z / temperature) over the top k;  keep the likeliest while the mass before them is < top_p
    x = inverse CDF of the kept at u;   u = hash(seed of the row, index of the token) in [0, 1)
u knows neither batch nor rank, so a row tells the same story in any company, up to the arithmetic of the model. At
temperature 0 it takes the likeliest token. (Where tokens tie for the k-th place, exactly k stay.)

While it decodes, a model's attention, RMS norms and Qwen3.5's Gated DeltaNet run as the functions of `decode.py`: the
same arithmetic for one token in fewer kernels, rounded where the model rounds.
Full attention (any number of key heads) and linear attention are decoded; sliding windows are refused.

    rollouts = generate(model, prompts, seeds, Sampling(max_new_tokens=1024), eos=tokenizer.eos_token_id)
    python bench.py rollout      # tokens per second against the floor, beside transformers' generate
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from decode import FUSED, decoding

# A GPU runs captured steps; every (rows, bucket) costs a capture and every look drains the queue: both are rare there.
CAPTURE = {"cuda": True, "cpu": False}
LOOK = {"cuda": 16, "cpu": 1}  # steps between two looks of the host at the new tokens
BUCKET = {
    "cuda": 512,
    "cpu": 32,
}  # positions by which the part of the cache that attention reads grows
WARM_UP = 2  # eager steps before a capture: cuBLAS makes its work space, Triton tunes; real steps, nothing is wasted


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the defaults are the paper's."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 0.95  # 1: off
    top_k: int = 20  # 0: off
    repetition_penalty: float = 1.10  # 1: off
    max_new_tokens: int = 8192

    def __post_init__(self):
        if (
            self.temperature < 0
            or not 0 < self.top_p <= 1
            or self.top_k < 0
            or self.repetition_penalty <= 0
        ):
            raise ValueError(
                f"needs temperature >= 0, 0 < top_p <= 1, top_k >= 0, repetition_penalty > 0: {self}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}: there is nothing to generate"
            )


@dataclass
class Rollout:
    row: int  # index into the prompts
    ids: list[int]  # response tokens, with EOS if finished
    finished: bool  # ended with EOS; False: cut at max_new_tokens


# ----------------------------------------------------------------------------------------------------------------------
# One token from its logits


def row_seed(seed: int, step: int, uid: str, k: int) -> int:
    """63-bit seed of rollout k of prompt `uid` at `step`: the same on every machine and in every Python."""
    return (
        int.from_bytes(
            hashlib.blake2b(repr((seed, step, uid, k)).encode(), digest_size=8).digest(), "big"
        )
        >> 1
    )


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: products wrap, and `>>` copies the sign, so the copied bits are masked off."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] fp32 in [0, 1): splitmix64 started at a hash of `seed`. Integers only, so every device draws the same."""
    counter = torch.arange(1, n + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    bits = _mix(_mix(torch.tensor(seed, device=device)) + counter)
    return ((bits >> 40) & (2**24 - 1)).float() * 2.0**-24  # 24 bits: all that fp32 holds exactly


def sample(logits: Tensor, seen: Tensor, u: Tensor, s: Sampling) -> Tensor:
    """Draw one token a row: logits [R, V], seen [R, V] bool (tokens to penalise), u [R, 1] in [0, 1) -> [R, 1]."""
    logits = logits.float()
    if s.repetition_penalty != 1:
        penalised = torch.where(
            logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if s.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    vocab = logits.shape[-1]
    top, token = logits.topk(min(s.top_k, vocab) or vocab)  # [R, k], likeliest first
    prob = (top / s.temperature).softmax(-1)
    cdf = prob.cumsum(-1)
    kept = (
        (cdf - prob < s.top_p).sum(-1, keepdim=True).clamp(min=1)
    )  # 0 for NaN logits only: `Decoder.finite` tells
    mass = cdf.gather(-1, kept - 1)
    choice = (cdf <= u * mass).sum(-1, keepdim=True)
    return token.gather(-1, choice.minimum(kept - 1))  # minimum: u * mass may round up to mass


# ----------------------------------------------------------------------------------------------------------------------
# The cache that a step reads and writes


class _Slots(DynamicLayer):
    """Cache of one attention layer for the first rows of static keys and values [R, KV, L, D]."""

    def __init__(self, decoder: Decoder, keys: Tensor, values: Tensor):
        super().__init__()
        # A proxy, since the decoder holds this: in a cycle, gigabytes would wait for Python's garbage collector.
        self.decoder, self.is_initialized = weakref.proxy(decoder), True
        self.keys, self.values = keys.flatten(0, 1), values.flatten(0, 1)  # views [R * KV, L, D]

    def update(self, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write key, value [R, KV, 1, D] at each row's own position; return the bucket [R, KV, S, D] as views."""
        lane, at, bucket = self.decoder.lane, self.decoder.lane_pos, self.decoder.bucket
        self.keys[lane, at], self.values[lane, at] = key.flatten(0, 2), value.flatten(0, 2)
        shape = key.shape[:2]
        return self.keys[:, :bucket].unflatten(0, shape), self.values[:, :bucket].unflatten(
            0, shape
        )


# ----------------------------------------------------------------------------------------------------------------------
# All rows, one step


@cache
def _side_stream() -> torch.cuda.Stream:
    """CUDA graphs want warm-up and capture off the default stream; one stream keeps one pool of work space."""
    return torch.cuda.Stream()


def _warm_up(step: Callable[[], None]) -> None:
    _side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_side_stream()):
        step()
    torch.cuda.current_stream().wait_stream(_side_stream())


def _capture(step: Callable[[], None], pool) -> torch.cuda.CUDAGraph:
    """Record a step. `thread_local`: other threads, such as NCCL's watchdog, may touch CUDA meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, pool=pool, stream=_side_stream(), capture_error_mode="thread_local"
    ):
        step()
    return graph


class Decoder:
    """The static tensors of `rows` texts of up to `length` tokens, and the step that adds one token to each.

    Row r has its tokens in ids[r], the newest at pos[r]; a step feeds that one and writes its successor at pos[r] + 1.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, sampling: Sampling):
        self.model = weakref.proxy(
            model
        )  # `_decoders` keeps a decoder while its model lives: no reference back
        self.rows, self.length, self.device = rows, length, model.device
        self.sampling = replace(sampling, max_new_tokens=length)  # the step knows no other limit
        self.weights = [p.data_ptr() for p in model.parameters()]  # what captured graphs read
        self.ids = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        self.noise = torch.zeros(
            rows, length, device=self.device
        )  # the u that draws the token of that position
        self.seen = torch.zeros(
            rows, model.config.get_text_config().vocab_size, dtype=torch.bool, device=self.device
        )
        self.pos = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.finite = torch.ones(
            (), dtype=torch.bool, device=self.device
        )  # so far, the largest logits
        self.slots = torch.arange(length, device=self.device)
        self.states: list[
            tuple[Tensor, Tensor]
        ] = []  # per layer: keys and values, or convolution and recurrence
        for layer in self.prefill(
            [0]
        ).layers:  # one token through the model tells every shape and dtype
            if type(layer) is DynamicLayer:
                pair = [
                    t.new_zeros(rows, t.shape[1], length, t.shape[3])
                    for t in (layer.keys, layer.values)
                ]
                self.kv_heads, self.dtype = layer.keys.shape[1], layer.keys.dtype
            elif type(layer) is LinearAttentionLayer:
                pair = [
                    t.new_zeros(rows, *t.shape[1:])
                    for t in (layer.conv_states[0], layer.recurrent_states[0])
                ]
            else:
                raise ValueError(
                    f"rollout.py decodes full and linear attention, and not a {type(layer).__name__}"
                )
            self.states.append(tuple(pair))
        self.lanes = torch.arange(rows * self.kv_heads, device=self.device)
        self.caches: dict[
            int, DynamicCache
        ] = {}  # rows -> a cache that reads and writes the first rows
        self.warm: Counter[tuple[int, int]] = Counter()  # (rows, bucket) -> eager steps so far
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def prefill(self, tokens: list[int]) -> DynamicCache:
        """The state of the model after `tokens`, for one row, by the model's own code."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([tokens], device=self.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def admit(self, row: int, prompt: list[int], cache: DynamicCache | None, seed: int) -> None:
        """Start a text in `row` from the state after all but the last prompt token (None: that was the only one)."""
        last = len(prompt) - 1
        for i, (a, b) in enumerate(self.states):
            if cache is None:
                a[row], b[row] = 0, 0
            elif type(layer := cache.layers[i]) is DynamicLayer:
                a[row, :, :last], b[row, :, :last] = layer.keys[0], layer.values[0]
            else:
                a[row], b[row] = layer.conv_states[0][0], layer.recurrent_states[0][0]
        self.ids[row, : last + 1] = torch.tensor(prompt, device=self.device)
        self.noise[row, last + 1 :] = uniforms(seed, self.length - last - 1, self.device)
        self.seen[row] = False
        self.seen[row, self.ids[row, : last + 1]] = True
        self.pos[row] = last

    def move(self, source: int, target: int) -> None:
        """Copy all that belongs to one row over another."""
        for tensor in (
            self.ids,
            self.noise,
            self.seen,
            self.pos,
            *(t for pair in self.states for t in pair),
        ):
            tensor[target].copy_(tensor[source])

    def cache(self, rows: int) -> DynamicCache:
        """A cache over the first `rows` rows of the static tensors, made once."""
        if rows not in self.caches:
            cache = self.caches[rows] = DynamicCache(config=self.model.config)
            for i, (a, b) in enumerate(self.states):
                if type(layer := cache.layers[i]) is DynamicLayer:
                    cache.layers[i] = _Slots(self, a[:rows], b[:rows])
                else:
                    layer.lazy_initialization(conv_states=a[:rows], recurrent_states=b[:rows])
                    layer.conv_states[0], layer.recurrent_states[0] = a[:rows], b[:rows]
                    layer.has_previous_state[0] = True
        return self.caches[rows]

    def step(self, rows: int, bucket: int) -> None:
        """One more token for the first `rows` rows, none of which is at `bucket` or beyond. Waits for nothing."""
        cache, pos, ids, seen = self.cache(rows), self.pos[:rows], self.ids[:rows], self.seen[:rows]
        at = pos[:, None]  # [R, 1], a view: it moves with pos
        # What `_Slots.update` needs; one lane per (row, key head).
        self.bucket, self.lane, self.lane_pos = (
            bucket,
            self.lanes[: rows * self.kv_heads],
            at.expand(-1, self.kv_heads),
        )
        self.lane_pos = self.lane_pos.flatten()
        mask = torch.zeros(rows, 1, 1, bucket, dtype=self.dtype, device=self.device)
        mask.masked_fill_(self.slots[:bucket] > at[:, :, None, None], float("-inf"))
        if any(type(layer) is LinearAttentionLayer for layer in cache.layers):
            mask = {"full_attention": mask, "linear_attention": None}
        logits = self.model(
            input_ids=ids.gather(1, at),
            position_ids=at,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]  # [R, V]
        self.finite.logical_and_(logits.amax(-1).isfinite().all())
        pos.add_(1)
        token = sample(logits, seen, self.noise[:rows].gather(1, at), self.sampling)
        ids.scatter_(1, at, token)
        seen.scatter_(1, token, True)

    def run(self, rows: int, bucket: int) -> None:
        """`step`, on a GPU as the replay of a graph captured for this (rows, bucket)."""
        key, step = (rows, bucket), partial(self.step, rows, bucket)
        if not CAPTURE[self.device.type]:
            step()
        elif key in self.graphs:
            self.graphs[key].replay()
        elif self.warm[key] < WARM_UP:
            self.warm[key] += 1
            _warm_up(step)
        else:
            # One memory pool for all: graphs run one after the other, and what they leave lies in the static tensors.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            self.graphs[key] = _capture(step, pool)
            self.graphs[key].replay()  # a capture records and does not run


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def _decoder(model: nn.Module, rows: int, length: int, sampling: Sampling) -> Decoder:
    """The model's decoder of the last call where it still fits: a training step then finds its graphs captured.

    One more than twice too large does not: after a validation with long stories an update needs the room.
    """
    bucket = BUCKET[model.device.type]
    length = -(-length // bucket) * bucket
    d = _decoders.get(model)
    fits = d and rows <= d.rows and length <= d.length and d.rows * d.length <= 2 * rows * length
    fits = fits and d.sampling == replace(sampling, max_new_tokens=d.length)
    if not fits or d.weights != [p.data_ptr() for p in model.parameters()]:
        _decoders.pop(model, None)  # free the old tensors before the new ones are made
        del d
        d = _decoders[model] = Decoder(model, rows, length, sampling)
    return d


# ----------------------------------------------------------------------------------------------------------------------
# Many texts


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
    eos: int | Collection[int],
    *,
    max_rows: int = 0,
    on_finish: Callable[[Rollout], None] | None = None,
    on_tokens: Callable[[Rollout, list[int]], None] | None = None,
) -> list[Rollout]:
    """Write one response per prompt (token ids, any lengths), in the order of the prompts.

    seeds: one 63-bit integer a prompt (`row_seed`).  eos: the id, or several, that end a response.
    max_rows: decode at most so many at a time; the others wait for a place (0: all at once).
    on_tokens(rollout, new tokens) is called as a response grows, on_finish(rollout) as it ends, both
    in the calling thread. The model is put into eval mode and back. Raises ValueError for an empty prompt, a wrong
    number of seeds, or a model whose layers are neither full nor linear attention.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, and there are {len(seeds)}")
    if [] in prompts:
        raise ValueError(
            f"prompt {prompts.index([])} is empty: give it at least one token to continue"
        )
    if not prompts:
        return []
    stop = {eos} if isinstance(eos, int) else set(eos)
    training = model.training
    model.eval()
    try:
        capacity = min(max_rows or len(prompts), len(prompts))
        d = _decoder(model, capacity, max(map(len, prompts)) + sampling.max_new_tokens, sampling)
        d.finite.fill_(True)
        rollouts = [Rollout(i, [], False) for i in range(len(prompts))]
        waiting = deque(rollouts)
        unplaced = Counter(map(tuple, prompts))  # how many rows still need the state of a prompt
        prefilled: dict[tuple[int, ...], DynamicCache | None] = {}
        places: list[Rollout | None] = [None] * capacity  # row of the decoder -> who lives there
        while True:
            for row in range(len(places)):
                if places[row] is None and waiting:
                    r = places[row] = waiting.popleft()
                    prompt = tuple(prompts[r.row])
                    if prompt not in prefilled:
                        prefilled[prompt] = (
                            d.prefill(prompts[r.row][:-1]) if len(prompt) > 1 else None
                        )
                    d.admit(row, prompts[r.row], prefilled[prompt], seeds[r.row])
                    unplaced[prompt] -= 1
                    if not unplaced[prompt]:
                        del prefilled[prompt]
            if not any(places):
                return rollouts
            with decoding(model):
                while any(places) and not (waiting and None in places):
                    places = _compact(d, places)
                    for r in _advance(d, places, prompts, sampling.max_new_tokens, stop, on_tokens):
                        if on_finish:
                            on_finish(r)
    finally:
        model.train(training)


def _compact(d: Decoder, places: list[Rollout | None]) -> list[Rollout | None]:
    """Shrink the batch once enough rows have ended; rows that live beyond its new end move into the holes."""
    alive, rows = sum(r is not None for r in places), len(places)
    if CAPTURE[d.device.type]:  # few sizes, few captures: 10, 5, 3, 2, 1
        while alive <= (rows + 1) // 2 < rows:
            rows = (rows + 1) // 2
    else:
        rows = alive
    holes = (i for i in range(rows) if places[i] is None)
    for source in range(rows, len(places)):
        if places[source] is not None:
            target = next(holes)
            d.move(source, target)
            places[target] = places[source]
    return places[:rows]


def _advance(
    d: Decoder, places: list[Rollout | None], prompts, limit: int, stop: set[int], on_tokens
) -> list[Rollout]:
    """Decode up to the next look; empty the places of the rows that ended, and return those."""
    live = [r for r in places if r is not None]
    rows, bucket = len(places), BUCKET[d.device.type]
    steps = min(LOOK[d.device.type], limit - max(len(r.ids) for r in live))
    filled = max(
        len(prompts[r.row]) + len(r.ids) for r in live
    )  # positions that the longest row reads
    for i in range(steps):
        d.run(rows, -(-(filled + i) // bucket) * bucket)
    back = torch.arange(1 - steps, 1, device=d.device)
    new = (
        d.ids[:rows].gather(1, d.pos[:rows, None] + back).tolist()
    )  # the only place that waits for the device
    if not d.finite:
        raise FloatingPointError(
            "the model's logits are not finite: its weights or its inputs are broken"
        )
    ended = []
    for row, r in enumerate(places):
        if r is None:
            continue
        known = len(r.ids)
        for token in new[row]:
            r.ids.append(token)
            r.finished = token in stop
            if r.finished or len(r.ids) == limit:
                ended.append(r)
                places[row] = None
                d.pos[row] = 0  # it may stay in the batch: let it write over itself from the start
                break
        if on_tokens:
            on_tokens(r, r.ids[known:])
    return ended


# ----------------------------------------------------------------------------------------------------------------------
# What runs underneath


def kernels(model: nn.Module) -> str:
    """One line: which kernels train and prefill this model, and what a slow fallback among them costs."""
    line = f"attention: {model.config.get_text_config(decoder=True)._attn_implementation}"
    code = sys.modules[type(model).__module__]
    for name, function in (
        ("delta rule", "torch_chunk_gated_delta_rule"),
        ("convolution", "causal_conv1d_fn"),
    ):
        if hasattr(code, function):
            # transformers wraps the reference and keeps what it really calls in the closure
            wrapper = getattr(code, function)
            used = (
                inspect.getclosurevars(wrapper)
                .nonlocals.get("implementation", wrapper)
                .__module__.split(".")[0]
            )
            line += f"; {name}: {used if used != 'transformers' else 'torch fallback'}"
    if "torch fallback" in line and model.device.type == "cuda":
        line += " (slow: it can take half of a Qwen3.5-9B update; pip install flash-linear-attention causal-conv1d)"
    return (
        f"{line}; decoding: decode.py's own, in {'Triton' if FUSED[model.device.type] else 'torch'}"
    )
