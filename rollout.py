"""Rollouts: text out of a Hugging Face causal language model, near the speed of memory.

A decoded token reads every weight and the cache of every row once, so its lower bound is bytes /
bandwidth. This module stays close to it: static tensors, and one step that never waits for the
host, which a GPU replays as a CUDA graph. (The release of POLARIS, arXiv 2606.04095, uses vLLM.)

    rows        a prompt and its growing response each, at its own position: nothing is padded
    prefill     once per distinct prompt; the state is copied to all rows of its group
    step        cache read up to a bucket -> logits -> sample -> token, position, `seen`
    look        every LOOK steps the host reads the new tokens, hands out what ended, refills rows

A token x is drawn from a row's logits z in the order of transformers' processors (`sample`):

    z_v <- z_v / r if z_v > 0 else z_v * r, for v in the row's prompt and response (penalty r)
    p = softmax(z / temperature) over the top k; keep the likeliest while the mass before is < top_p
    x = inverse CDF of the kept at u;   u = hash(seed of the row, index of the token) in [0, 1)

u depends on nothing else: the same story for any batch size or rank, up to the model's arithmetic.
Temperature 0 takes the likeliest token. Of tokens that tie for the k-th place, exactly k stay.

Full and linear attention are decoded, by the functions of `decode.py`, and sliding windows, from a
cache of all positions: the mask of a layer's kind hides what its window has left.

    rollouts = generate(model, prompts, seeds, Sampling(), eos=tokenizer.eos_token_id)
    python bench.py rollout      # tokens per second beside the bound and transformers' generate
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from decode import FUSED, decoding

# Each (rows, bucket) costs a GPU one capture, and each look empties its queue: both are rare there.
CAPTURE = {"cuda": True, "cpu": False}
LOOK = {"cuda": 16, "cpu": 1}  # decode steps between host checks for finished rows
BUCKET = {"cuda": 512, "cpu": 32}  # positions by which the part of the cache that is read grows
WARM_UP = 2  # eager steps before a capture: cuBLAS makes its work space, Triton compiles


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the defaults are the paper's."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 0.95  # 1: off
    top_k: int = 20  # 0: off
    repetition_penalty: float = 1.10  # 1: off
    max_new_tokens: int = 8192
    min_p: float = 0.0  # least share of the likeliest token's probability; 0: off

    def __post_init__(self) -> None:
        at_least_0 = self.temperature >= 0 and self.top_k >= 0
        shares = 0 < self.top_p <= 1 and 0 <= self.min_p < 1
        if not (at_least_0 and shares and self.repetition_penalty > 0):
            needs = "temperature >= 0, 0 < top_p <= 1, top_k >= 0, repetition_penalty > 0"
            needs += ", 0 <= min_p < 1"
            raise ValueError(f"needs {needs}: {self}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: nothing to generate")


@dataclass
class Rollout:
    row: int  # index into the prompts
    ids: list[int]  # response tokens, with EOS if finished
    finished: bool  # ended with EOS; False: cut at max_new_tokens
    logq: float = 0.0  # sum over its tokens of the log-probability with which each was drawn


Places = list[Rollout | None]  # row of the decoder -> whose it is

# ------ one token from its logits


def row_seed(seed: int, step: int, uid: str, k: int) -> int:
    """63-bit seed of rollout k of prompt `uid` at `step`: the same on every machine and Python."""
    digest = hashlib.blake2b(repr((seed, step, uid, k)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: products wrap; `>>` copies the sign, which is masked off."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] fp32 in [0, 1): splitmix64 from a hash of `seed`, in integers: equal on every device."""
    counter = torch.arange(1, n + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    bits = _mix(_mix(torch.tensor(seed, device=device)) + counter)
    return ((bits >> 40) & (2**24 - 1)).float() * 2.0**-24  # 24 bits: all that fp32 holds exactly


def sample(logits: Tensor, seen: Tensor, u: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """logits [R, V], seen [R, V] bool (to penalise), u [R, 1] in [0, 1) -> tokens [R, 1], log q.

    log q [R, 1]: of the token, under what it was drawn from.
    """
    logits = logits.float()
    penalty = s.repetition_penalty
    if penalty != 1:
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalised, logits)
    if s.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token, torch.zeros_like(u)
    vocab = logits.shape[-1]
    top, token = logits.topk(min(s.top_k, vocab) or vocab)  # [R, k], likeliest first
    prob = (top / s.temperature).softmax(-1)
    cdf = prob.cumsum(-1)
    kept = (cdf - prob < s.top_p).sum(-1, keepdim=True)
    if s.min_p:
        kept = kept.minimum((prob >= s.min_p * prob[:, :1]).sum(-1, keepdim=True))
    kept = kept.clamp(min=1)  # 0 only if the logits are NaN, which `Decoder.finite` reports
    mass = cdf.gather(-1, kept - 1)
    choice = (cdf <= u * mass).sum(-1, keepdim=True)
    choice = choice.minimum(kept - 1)  # u * mass may round up to mass
    return token.gather(-1, choice), (prob.gather(-1, choice) / mass).log()


# ------ all rows, one step


KINDS = {"full_attention", "sliding_attention", "linear_attention"}


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that keeps all positions. ValueError for a kind of layer that is not decoded."""
    config = model.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ()) - KINDS
    if getattr(config, "attention_chunk_size", None):
        others.add("chunked_attention")
    if others:
        decoded = "full, sliding and linear attention"
        raise ValueError(f"rollout.py decodes {decoded}, not {', '.join(sorted(others))}")
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = DynamicLayer()
    return cache


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: list[int]) -> DynamicCache:
    """The state of the model after `tokens`, for one row, by the model's own code."""
    cache = empty_cache(model)
    ids = torch.tensor([tokens], device=model.device)  # [1, T]
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def tensors_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache's attention layer; convolution and recurrent state of a linear."""
    kind = type(layer)
    if kind is DynamicLayer:
        return layer.keys, layer.values
    if kind is LinearAttentionLayer:
        return layer.conv_states[0], layer.recurrent_states[0]
    raise ValueError(f"rollout.py does not decode layers with a {kind.__name__}")


class _Slots(DynamicLayer):
    """Cache of one attention layer: the first rows of static keys and values [R, KV, L, D]."""

    keys: Tensor
    values: Tensor

    def __init__(self, decoder: Decoder, keys: Tensor, values: Tensor):
        super().__init__()
        self.decoder = weakref.proxy(decoder)  # which holds this: no cycle may keep gigabytes
        self.is_initialized = True
        self.keys, self.values = keys.flatten(0, 1), values.flatten(0, 1)  # views [R * KV, L, D]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Write [R, KV, 1, D] at each row's position -> the bucket's keys, values [R, KV, S, D]."""
        d, shape = self.decoder, key_states.shape[:2]
        self.keys[d.lane, d.lane_pos] = key_states.flatten(0, 2)
        self.values[d.lane, d.lane_pos] = value_states.flatten(0, 2)
        keys, values = self.keys[:, : d.bucket], self.values[:, : d.bucket]
        return keys.unflatten(0, shape), values.unflatten(0, shape)


@cache
def _side_stream() -> torch.cuda.Stream:
    """For warm-ups and captures, which must be off the default stream."""
    return torch.cuda.Stream()


def _warm_up(step: Callable[[], None]) -> None:
    _side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_side_stream()):
        step()
    torch.cuda.current_stream().wait_stream(_side_stream())


def _capture(step: Callable[[], None], pool) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    mode = "thread_local"  # other threads, such as NCCL's watchdog, may touch CUDA meanwhile
    with torch.cuda.graph(graph, pool, _side_stream(), mode):
        step()
    return graph


class Decoder:
    """The static tensors of `rows` texts of up to `length` tokens, and the step that adds a token.

    Row r has its tokens in ids[r], the newest at pos[r]; a step writes the next at pos[r] + 1.
    Ids from `vocab` on, which pad a head and mean no text, are never drawn (0: there are none).
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, length: int, sampling: Sampling, vocab: int = 0
    ):
        self.model = model
        self.rows, self.length = rows, length
        self.sampling = replace(sampling, max_new_tokens=length)  # the step knows no other limit
        self.weights = [p.data_ptr() for p in model.parameters()]  # what captured graphs read
        self.device = device = model.device
        config: Any = model.config.get_text_config(decoder=True)
        self.head = config.vocab_size
        self.vocab = min(vocab or self.head, self.head)
        # Where all layers have windows, a model takes one mask, else one for each kind of layer.
        kinds = getattr(config, "layer_types", None) or ()
        self.window = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self.window = None
        self.by_kind = bool({"sliding_attention", "linear_attention"} & set(kinds))
        self.ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        # The u of each position's token, and once that is drawn its log q
        self.noise = torch.zeros(rows, length, device=device)
        self.seen = torch.zeros(rows, self.vocab, dtype=torch.bool, device=device)
        self.pos = torch.zeros(rows, dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # of all logits so far
        self.slots = torch.arange(length, device=device)
        self.states: list[list[Tensor]] = []  # per layer the two of `tensors_of`, for all rows
        for layer in prefill(model, [0]).layers:  # one token tells every shape and dtype
            like = tensors_of(layer)
            shapes = [[rows, *t.shape[1:]] for t in like]
            if type(layer) is DynamicLayer:
                self.kv_heads, self.dtype = like[0].shape[1], like[0].dtype
                shapes = [[rows, heads, length, dim] for _, heads, _, dim in shapes]
            self.states.append([t.new_zeros(n) for t, n in zip(like, shapes, strict=True)])
        self.lanes = torch.arange(rows * self.kv_heads, device=device)  # one per (row, key head)
        self.caches: dict[int, DynamicCache] = {}  # rows -> a cache over the first rows
        self.warm: Counter[tuple[int, int]] = Counter()  # (rows, bucket) -> eager steps so far
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def admit(self, row: int, prompt: list[int], cache: DynamicCache | None, seed: int) -> None:
        """Start a text in `row`, from the state before the last token of its prompt, if any."""
        n = len(prompt)
        for i, (a, b) in enumerate(self.states):
            if cache is None:
                a[row], b[row] = 0, 0
                continue
            layer = cache.layers[i]
            if type(layer) is DynamicLayer:
                a, b = a[:, :, : n - 1], b[:, :, : n - 1]
            new_a, new_b = tensors_of(layer)
            a[row], b[row] = new_a[0], new_b[0]
        self.ids[row, :n] = torch.tensor(prompt, device=self.device)
        self.noise[row, n:] = uniforms(seed, self.length - n, self.device)
        self.seen[row] = False
        self.seen[row, self.ids[row, :n]] = True
        self.pos[row] = n - 1

    def move(self, source: int, target: int) -> None:
        """Copy all that belongs to one row over another."""
        states = (t for pair in self.states for t in pair)
        for tensor in (self.ids, self.noise, self.seen, self.pos, *states):
            tensor[target].copy_(tensor[source])

    def cache(self, rows: int) -> DynamicCache:
        """A cache over the first `rows` rows of the static tensors, made once."""
        if rows not in self.caches:
            cache = self.caches[rows] = empty_cache(self.model)
            for i, (a, b) in enumerate(self.states):
                layer: Any = cache.layers[i]
                if type(layer) is DynamicLayer:
                    cache.layers[i] = _Slots(self, a[:rows], b[:rows])
                else:
                    layer.lazy_initialization(conv_states=a[:rows], recurrent_states=b[:rows])
                    layer.conv_states[0], layer.recurrent_states[0] = a[:rows], b[:rows]
                    layer.has_previous_state[0] = True
        return self.caches[rows]

    def step(self, rows: int, bucket: int) -> None:
        """One more token for the first `rows` rows, all before `bucket`. Waits for nothing."""
        cache = self.cache(rows)
        pos, ids, seen = self.pos[:rows], self.ids[:rows], self.seen[:rows]
        at = pos[:, None]  # [R, 1], a view: it moves with pos
        self.bucket = bucket
        self.lane = self.lanes[: rows * self.kv_heads]  # [R * KV]
        self.lane_pos = at.expand(-1, self.kv_heads).flatten()  # [R * KV]
        mask: Any = torch.zeros(rows, 1, 1, bucket, dtype=self.dtype, device=self.device)
        mask.masked_fill_(self.slots[:bucket] > at[:, :, None, None], float("-inf"))
        if self.window:
            left = self.slots[:bucket] <= (at - self.window)[:, :, None, None]
            windowed = mask.masked_fill(left, float("-inf"))
            by_kind = {"full_attention": mask, "sliding_attention": windowed}
            mask = by_kind if self.by_kind else windowed
        elif self.by_kind:
            mask = {"full_attention": mask, "linear_attention": None}
        inputs = {"input_ids": ids.gather(1, at), "position_ids": at, "attention_mask": mask}
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1, : self.vocab]  # [R, V]
        self.finite.logical_and_(logits.amax(-1).isfinite().all())
        pos.add_(1)
        noise = self.noise[:rows]
        token, logq = sample(logits, seen, noise.gather(1, at), self.sampling)
        ids.scatter_(1, at, token)
        noise.scatter_(1, at, logq)
        seen.scatter_(1, token, True)

    def run(self, rows: int, bucket: int) -> None:
        """`step`, on a GPU as the replay of a graph captured for this (rows, bucket)."""
        key = rows, bucket
        step = partial(self.step, *key)
        if not CAPTURE[self.device.type]:
            step()
        elif key in self.graphs:
            self.graphs[key].replay()
        elif self.warm[key] < WARM_UP:
            self.warm[key] += 1
            _warm_up(step)
        else:
            # Graphs run one after another and leave all in static tensors: they share one pool.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            self.graphs[key] = _capture(step, pool)
            self.graphs[key].replay()  # a capture records and does not run


class Decoders:
    """Keeps the decoder of one `generate` for the next, which then finds its graphs captured."""

    def __init__(self) -> None:
        self.held: Decoder | None = None

    def free(self) -> None:
        """Let go of the decoder: its model, caches and graphs, on a GPU gigabytes."""
        self.held = None

    def get(
        self, model: PreTrainedModel, rows: int, length: int, sampling: Sampling, vocab: int = 0
    ) -> Decoder:
        """The decoder held; a new one if that is another model's or sampling's, too small, or more
        than twice too large: its cache would take memory from the update."""
        length = whole_buckets(length, model.device.type)
        if d := self.held:
            fits = rows <= d.rows and length <= d.length
            fits = fits and d.rows * d.length <= 2 * rows * length
            same = d.model is model and d.weights == [p.data_ptr() for p in model.parameters()]
            same = same and d.vocab == min(vocab or d.head, d.head)
            if fits and same and d.sampling == replace(sampling, max_new_tokens=d.length):
                return d
        self.held = d = None  # frees the old tensors before the new ones are made
        self.held = Decoder(model, rows, length, sampling, vocab)
        return self.held


def whole_buckets(positions: int, device: str) -> int:
    bucket = BUCKET[device]
    return math.ceil(positions / bucket) * bucket


# ------ many texts


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
    eos: int | Collection[int],
    *,
    vocab: int = 0,
    max_rows: int = 0,
    on_finish: Callable[[Rollout], None] | None = None,
    on_tokens: Callable[[Rollout, list[int]], None] | None = None,
    decoders: Decoders | None = None,
) -> list[Rollout]:
    """One response per prompt (token ids, any lengths), in the order of the prompts.

    seeds: one 63-bit integer a prompt (`row_seed`).  eos: the id, or several, that end a response;
    -1: none does.  vocab: ids from here on are never drawn (0: all may be).
    max_rows: decode at most so many at a time; the others wait for a place (0: all at once).
    on_tokens(rollout, new tokens) is called as a response grows, on_finish(rollout) as it ends,
    in the calling thread.  decoders: what to reuse and keep (None: all is freed at the end).

    The model is put into eval mode and back. ValueError for prompts that are no lists of ids or
    empty, a wrong number of seeds, no EOS or an unknown kind of layer; FloatingPointError for
    logits that are not finite.
    """
    if not isinstance(prompts, list) or not all(isinstance(prompt, list) for prompt in prompts):
        raise ValueError('prompts must be lists of token ids: tokenizer(texts)["input_ids"]')
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, and there are {len(seeds)}")
    if [] in prompts:
        raise ValueError(f"prompt {prompts.index([])} is empty: give it a token to continue")
    if not prompts:
        return []
    stop = stop_ids(eos)
    limit = sampling.max_new_tokens
    capacity = min(max_rows or len(prompts), len(prompts))
    training = model.training
    model.eval()
    try:
        decoders = Decoders() if decoders is None else decoders
        d = decoders.get(model, capacity, max(map(len, prompts)) + limit, sampling, vocab)
        d.finite.fill_(True)
        rollouts = [Rollout(i, [], False) for i in range(len(prompts))]
        waiting = deque(rollouts)
        last_use = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        prefilled: dict[tuple[int, ...], DynamicCache | None] = {}
        places: Places = [None] * capacity
        while True:
            for row in range(len(places)):
                if places[row] is None and waiting:
                    r = places[row] = waiting.popleft()
                    prompt = prompts[r.row]
                    key = tuple(prompt)
                    if key not in prefilled:
                        prefilled[key] = prefill(model, prompt[:-1]) if len(prompt) > 1 else None
                    d.admit(row, prompt, prefilled[key], seeds[r.row])
                    if last_use[key] == r.row:
                        del prefilled[key]
            if not any(places):
                return rollouts
            with decoding(model):
                while any(places) and not (waiting and None in places):
                    places = _compact(d, places)
                    grown = _advance(d, places, prompts, limit, stop)
                    for r, new in grown:
                        if on_tokens:
                            on_tokens(r, new)
                    for r, _ in grown:
                        if on_finish and (r.finished or len(r.ids) == limit):
                            on_finish(r)
    finally:
        model.train(training)


def stop_ids(eos: int | Collection[int]) -> set[int]:
    """The ids that end a response. ValueError for anything but token ids, and for none at all."""
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    if not ids or not all(isinstance(i, int) for i in ids):
        how = "give tokenizer.eos_token_id, several such ids, or -1 where none ends a response"
        raise ValueError(f"eos is {eos!r}, no token id: {how}")
    return set(ids)


def _compact(d: Decoder, places: Places) -> Places:
    """Shrink the batch once enough rows have ended; rows beyond its end move into the holes."""
    rows = len(places)
    alive = sum(r is not None for r in places)
    if CAPTURE[d.device.type]:  # few sizes, few captures: 10, 5, 3, 2, 1
        while alive <= (half := (rows + 1) // 2) < rows:
            rows = half
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
    d: Decoder, places: Places, prompts: list[list[int]], limit: int, stop: set[int]
) -> list[tuple[Rollout, list[int]]]:
    """Decode up to the next look -> each live rollout and its new tokens; empties ended places."""
    rows, live = len(places), [r for r in places if r is not None]
    steps = min(LOOK[d.device.type], limit - max(len(r.ids) for r in live))
    filled = max(len(prompts[r.row]) + len(r.ids) for r in live)  # what the longest row reads
    for i in range(steps):
        d.run(rows, whole_buckets(filled + i, d.device.type))
    newest = d.pos[:rows, None] + torch.arange(1 - steps, 1, device=d.device)  # [R, steps]
    tokens = d.ids[:rows].gather(1, newest).tolist()  # the only place that waits for the device
    logq = d.noise[:rows].gather(1, newest).tolist()
    if not d.finite:
        raise FloatingPointError("the model's logits are not finite: broken weights or inputs")
    grown = []
    for row, r in enumerate(places):
        if r is None:
            continue
        end = next((i for i, token in enumerate(tokens[row], 1) if token in stop), steps)
        new = tokens[row][:end]
        r.ids += new
        r.logq += sum(logq[row][:end])
        r.finished = new[-1] in stop
        grown.append((r, new))
        if r.finished or len(r.ids) == limit:
            places[row] = None
            d.pos[row] = 0  # it may stay in the batch until compaction: this keeps it in bounds
    return grown


# ------ what runs underneath


def kernels(model: PreTrainedModel) -> str:
    """One line: the kernels that train, prefill and decode this model; a slow one is named so."""
    line = f"attention: {model.config.get_text_config(decoder=True)._attn_implementation}"
    code = sys.modules[type(model).__module__]
    known = {"delta rule": "torch_chunk_gated_delta_rule", "convolution": "causal_conv1d_fn"}
    for name, function in known.items():
        if wrapper := getattr(code, function, None):
            # transformers wraps its reference and keeps what it really calls in the closure.
            used = inspect.getclosurevars(wrapper).nonlocals.get("implementation", wrapper)
            package = used.__module__.split(".")[0]
            line += f"; {name}: {'torch fallback' if package == 'transformers' else package}"
    if "torch fallback" in line and model.device.type == "cuda":
        line += " (slow: it can take half of a Qwen3.5-9B update; "
        line += "pip install flash-linear-attention causal-conv1d)"
    language = "Triton" if FUSED[model.device.type] else "torch"
    return f"{line}; decoding: decode.py's own, in {language}"
