"""The policy: sharded fp32 weights that are trained, the update, checkpoints and the export.

    loss = - (sum over rows of A_row · sum over the row's response tokens of log p) / n_tokens

n_tokens counts the response tokens of all rows on all ranks, so the update is the same for any
number of ranks and any micro-batch: gradients are summed over both and never averaged (the release
averages means of micro-batches; arXiv 2606.04095 says token-mean). So a step may also `accumulate`
its rows in parts, while the judge still reads the others, before it is `apply`d.

    master weights   fp32, sharded by FSDP2: at a learning rate of 1e-6 a bf16 weight of 0.02 would
                     never move, since its neighbours are 1.2e-4 away
    head             hidden states meet the vocabulary in grpo.onpolicy_loss inside the root's
                     forward: FSDP gathers the head and reduces its gradient once a micro-batch
    dealing          rows go to ranks so that tokens balance; all ranks run equally many
                     micro-batches, since FSDP's collectives need everyone; empty ones fill gaps
    padding          on the right, where no causal layer sees it, masked by length, never by id

`save` and `load` are torch.distributed.checkpoint, for any number of ranks, atomic by a rename;
`export` writes the original checkpoint again with the trained tensors in place.

The policy is the model: what its forward leaves out or cannot know is refused by `check_checkpoint`
(from config.json and the headers of the weights) or by `check_policy` (log-probs beside the model's
own, on a text). What a model does to z = W h + b before its softmax: a scale, a soft cap.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grpo import onpolicy_loss


class ModelError(ValueError):
    """A checkpoint that cannot be trained as it is: says why and what to do."""


class Policy(nn.Module):
    """Root of the sharded model. Its forward runs head and loss: FSDP gathers the head for both.

    temperature: of the sampler; what it divides logits by is what is trained.
    """

    def __init__(self, lm: PreTrainedModel, temperature: float = 1.0):
        super().__init__()
        self.lm: Any = lm
        self.temperature = temperature

    def forward(
        self, ids: Tensor, positions: Tensor, targets: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logp [N], entropy [N]) of what `collate` returns."""
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
        hidden = hidden.flatten(0, 1)[positions]  # [N, H]: no prompt, no padding
        head = self.lm.lm_head
        return self.loss(hidden, head.weight, head.bias, targets, coef)

    def loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grpo.onpolicy_loss with all that the model does around its head."""
        scale, softcap = logit_options(self.lm.config)
        if bias is not None:  # a column of the head, which always meets a 1
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
            weight = torch.cat([weight, bias[:, None]], 1)
        temperature = self.temperature / scale
        return onpolicy_loss(hidden, weight, targets, coef, temperature, softcap=softcap)


def logit_options(config: PretrainedConfig) -> tuple[float, float]:
    """(scale, soft cap) of a model's logits; a soft cap of 0 is none."""
    text = config.get_text_config(decoder=True)
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(text, "final_logit_softcapping", None) or 0.0  # Gemma


def shard(policy: Policy, mesh: DeviceMesh, bf16: bool) -> None:
    """FSDP2: each decoder layer is a unit, the rest is the root's. Master weights stay fp32."""
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # or the coefficients of the loss would be rounded to bf16
    )
    for module in (*policy.lm.model.layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=mixed)
        # Gradients are summed: the loss is divided by the whole step's token count already. Without
        # the second call gloo would be asked for a pre-multiplied sum, which it does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def load_policy(
    path: Path,
    mesh: DeviceMesh,
    device: torch.device,
    recompute: bool,
    temperature: float = 1.0,
) -> tuple[Policy, PreTrainedModel]:
    """The sharded fp32 policy, and this rank's whole copy that generates (bf16 on a GPU).

    ModelError where a tensor of the model is not in its files.
    """
    bf16 = device.type == "cuda"
    load: Any = AutoModelForCausalLM.from_pretrained
    copy, info = load(path, dtype="auto", output_loading_info=True)
    if absent := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ModelError(f"{path}: these tensors would be random: {some(absent)}")
    without_dropout(copy.config)
    copy.to(device).eval()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.config, dtype=torch.float32)
        policy = Policy(lm, temperature)
    if recompute:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    shard(policy, mesh, bf16)
    policy.to_empty(device=device)
    policy.lm.tie_weights()
    full = dict(copy.named_parameters())
    with torch.no_grad():
        for name, p in policy.lm.named_parameters():
            # Every rank holds the full tensor and cuts out its own shard: no communication.
            whole = full[name].float()
            p.copy_(distribute_tensor(whole, mesh, p.placements, src_data_rank=None))
        for name, b in copy.named_buffers():
            policy.lm.get_buffer(name).copy_(b)
    for p in copy.parameters():  # not copy.to(): that would round the rotary frequencies as well
        p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
    return policy.train(), copy.requires_grad_(False)


def without_dropout(config: PretrainedConfig) -> None:
    """Turn off all that is random in training: the text is a sample already."""
    text = config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if isinstance(value, float) and re.search("drop|jitter", name):
            setattr(text, name, 0.0)


# ------ the policy is the model


def check_checkpoint(path: Path, reach: int) -> int:
    """Refuse what cannot be trained exactly, or not be exported, from config and headers alone.

    reach: tokens of the longest text of training. Returns the positions that the model knows.
    Raises ModelError, in one line.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as e:  # whatever transformers says of a model that it cannot make
        reason = str(e).strip().split("\n")[0]
        raise ModelError(
            f"{path}: transformers makes no causal language model of it: {reason}"
        ) from e
    text = lm.config.get_text_config(decoder=True)
    if reason := unfit(config, text, lm, reach):
        raise ModelError(f"{path}: {type(lm).__name__} {reason}")
    stored = stored_tensors(path)
    named = list(lm.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}  # of each tensor; a tied one has two
    for name, p in named:
        names.setdefault(id(p), []).append(name)
    homes = {source_name(name): (name, shape, dtype) for name, (shape, dtype) in stored.items()}
    absent = [same[0] for same in names.values() if not any(name in homes for name in same)]
    if absent:
        why = "its files hold no such tensors, so they could be neither loaded nor exported"
        if any("experts" in name for name in absent):
            why = "its files hold experts one by one, which are one tensor in memory"
        raise ModelError(f"{path}: {why}: {some(absent)}{tie_hint(config, text, absent)}")
    for name, p in named:
        stored_name, shape, dtype = homes.get(name, (name, list(p.shape), "F32"))
        if shape != list(p.shape):
            what = f"{stored_name} is {shape} in its files and {list(p.shape)} in its config.json"
            raise ModelError(f"{path}: {what}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(f"{path}: {stored_name} is {dtype}: a checkpoint in bf16 is needed")
    for same in names.values():
        held = [homes[name][0] for name in same if name in homes]
        if len(held) > 1 and not equal_tensors(path, held):
            how = 'set "tie_word_embeddings": false in its config.json, or remove one'
            raise ModelError(f"{path}: {some(held)} are tied and differ: {how}")
    return positions_of(text)


def unfit(config: Any, text: Any, lm: Any, reach: int) -> str:
    """Why a model cannot be trained here, from its config; "" if nothing speaks against it."""
    layers, head = getattr(getattr(lm, "model", None), "layers", None), getattr(lm, "lm_head", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Linear):
        return (
            "does not keep its layers in model.layers and its head in lm_head: polaris needs both"
        )
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        return "is quantised (quantization_config): take the checkpoint in bf16"
    if getattr(text, "attn_logit_softcapping", None):
        return "caps its attention logits, which neither training nor sampling does here"
    scale, softcap = logit_options(text)
    if softcap and scale != 1:
        return "both scales and caps its logits: only one of them is exact here"
    if any(part.get("rope_type") == "dynamic" for part in rope_parts(text)):
        return "has dynamic RoPE: a row would depend on the others of its micro-batch"
    positions = positions_of(text)
    if reach > positions:
        how = f"keep --max-prompt and --max-response within {positions} together"
        return f"knows {positions} positions, and texts may have {reach}: {how}"
    return ""


def rope_parts(text: Any) -> list[dict[str, Any]]:
    """The RoPE settings of a model, or those of each kind of its layers."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def positions_of(text: Any) -> int:
    """The longest text that a model knows and that means the same in every batch."""
    known = [getattr(text, "max_position_embeddings", None)]
    for part in rope_parts(text):
        if part.get("rope_type") == "longrope":  # beyond, a batch turns to other frequencies
            known.append(part.get("original_max_position_embeddings"))
    return min((n for n in known if n), default=sys.maxsize)


def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def tie_hint(config: Any, text: Any, absent: list[str]) -> str:
    tied = getattr(config, "tie_word_embeddings", False)
    if "lm_head.weight" in absent and tied and not text.tie_word_embeddings:
        return '; only the outer config says "tie_word_embeddings": say so in text_config as well'
    return ""


def source_name(name: str) -> str:
    """The model's name of a stored tensor: an image–text checkpoint says model.language_model.…"""
    return name.replace("model.language_model.", "model.")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint: what its index names, else all."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    found = sorted(path.glob("*.safetensors"))
    return [f for f in found if f.name == "model.safetensors"] or found


def stored_tensors(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name → (shape, dtype) of what the files of a checkpoint hold, read from their headers."""
    files = weight_files(path)
    if not files or (path / "adapter_config.json").exists():
        what = "holds an adapter" if files else "holds no .safetensors file"
        how = "save it whole with model.save_pretrained(…, safe_serialization=True)"
        raise ModelError(f"{path}: {what}, so it could not be exported: {how}")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{path}: its index names {file.name}, which is not there")
        with safe_open(file, "pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                tensors[name] = part.get_shape(), part.get_dtype()
    return tensors


def equal_tensors(path: Path, names: list[str]) -> bool:
    found: dict[str, Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name) for name in set(names) & set(f.keys())}
    first, *others = found.values()
    return all(torch.equal(first, other) for other in others)


@torch.no_grad()
def model_logps(copy: Any, ids: list[int], temperature: float) -> tuple[Tensor, Tensor, float]:
    """A model's own log-probs [T-1] of a text [T], its head in fp32.

    Also the hidden states [T-1, H] that the head was given, and the largest logit.
    """
    text = torch.tensor([ids], device=copy.device)  # [1, T]
    seen = {}

    def in_fp32(head: Any, args: Any, output: Tensor) -> Tensor:
        seen["hidden"] = args[0][0, -len(ids) : -1].float()
        return F.linear(args[0].float(), *(p.float() for p in head.parameters()))

    hook = copy.lm_head.register_forward_hook(in_fp32)
    try:
        logits = copy(input_ids=text, use_cache=False).logits[0, :-1].float() / temperature
    finally:
        hook.remove()
    logps = logits.log_softmax(-1).gather(1, text[0, 1:, None]).squeeze(1)
    return logps, seen["hidden"], max(1.0, logits.abs().max().item())


@torch.no_grad()
def check_policy(policy: Policy, copy: Any, ids: list[int]) -> float:
    """The largest difference of the policy's log-probs from the model's own, over a text.

    Relative to the largest logit. On a GPU both heads run in fp32 on the same hidden states, and
    what comes before them is compared in bf16. Collective. Raises ModelError if they are not one.
    """
    wanted, hidden, size = model_logps(copy, ids, policy.temperature)
    text = torch.tensor([ids], device=copy.device)  # [1, T]
    positions = torch.arange(len(ids) - 1, device=copy.device)
    rows = text[0, 1:], torch.zeros(len(ids) - 1, device=copy.device)
    weight, bias = copy.lm_head.weight.float(), copy.lm_head.bias
    bias = None if bias is None else bias.float()
    fp32 = copy.dtype == torch.float32
    heads = (policy.loss(hidden, weight, bias, *rows)[1] - wanted).abs().max().item()
    worst = heads / (1 if fp32 else 10)  # 1e-5, and 1e-4 of what started in bf16
    for _ in range(2):  # what is random differs between the two
        difference = (policy(text, positions, *rows)[1] - wanted).abs()
        worst = max(worst, (difference.max() if fp32 else difference.mean() / 2000).item())
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the root would stay gathered
    if not worst / size <= 1e-5:
        how = f"its log-probs and the policy's differ by {worst / size:.0e} of its largest logit"
        raise ModelError(f"{type(copy).__name__} does what is unknown here: {how}")
    return worst / size


# ------ weights


@torch.no_grad()
def copy_weights(policy: nn.Module, copy: nn.Module) -> None:
    """Write the policy's parameters and buffers into `copy`, in place, one at a time.

    In place, so captured graphs stay valid. A shard is cast to the copy's dtype before it is
    gathered: half the traffic. Collective. Raises ValueError when names, shapes or ties differ.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (policy, copy))
        if odd := sorted(ours.keys() ^ theirs.keys()):
            kind = f"{len(odd)} {kind[6:]}"
            raise ValueError(f"{kind} are in one of policy and copy only, first {odd[0]}")
        pairs += [(name, ours[name], theirs[name]) for name in ours]
    written: dict[int, Any] = {}
    for name, source, target in pairs:
        if source.shape != target.shape:
            shapes = f"{tuple(source.shape)} in the policy and {tuple(target.shape)} in the copy"
            raise ValueError(f"{name} is {shapes}")
        if written.get(id(target), source) is not source:
            raise ValueError(f"{name} is tied to another weight in the copy, not in the policy")
        if id(target) in written:  # tied: one gather serves both names
            continue
        written[id(target)] = source
        target.copy_(full_tensor(source.to(target.dtype)))


def full_tensor(p: Any) -> Tensor:
    """A tensor whole, on every rank: a collective if it is sharded."""
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def deal(lengths: list[int], world: int, micro_tokens: int) -> list[list[list[int]]]:
    """Rows → [rank][micro-batch][row]: equal tokens and equally many micro-batches a rank.

    Longest first, each row to the rank with the fewest tokens; then neighbours in length share a
    micro-batch while rows × longest stays within `micro_tokens`. Short ranks get empty ones.
    """
    ranks: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = load.index(min(load))
        ranks[rank].append(row)
        load[rank] += lengths[row]
    dealt = []
    for rows in ranks:
        batches: list[list[int]] = []
        for row in rows:
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= micro_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        dealt.append(batches)
    most = max(len(batches) for batches in dealt)
    return [batches + [[]] * (most - len(batches)) for batches in dealt]


def collate(
    rows: list[tuple[list[int], list[int], float]], device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(prompt, response, coefficient) rows → ids [B, T]; positions, targets, coef [N].

    N counts the response tokens; positions are those of their predecessors in the flattened batch.
    EOS is trained like any other token, even where it doubles as padding.
    """
    width = max([2, *(len(p) + len(r) for p, r, _ in rows)])
    ids = torch.zeros(max(1, len(rows)), width, dtype=torch.long)  # [B, T]
    positions: list[int] = []
    targets: list[int] = []
    coef: list[float] = []
    for b, (prompt, response, c) in enumerate(rows):
        ids[b, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        start = b * width + len(prompt) - 1
        positions += range(start, start + len(response))
        targets += response
        coef += [c] * len(response)
    return (
        ids.to(device),
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        torch.tensor(coef, dtype=torch.float32, device=device),
    )


def accumulate(
    policy: Policy,
    rows: list[tuple[list[int], list[int]]],
    advantages: list[float],
    n_tokens: int,
    mesh: DeviceMesh,
    micro_tokens: int,
    logq: list[float | None] | None = None,
) -> Tensor:
    """Add the gradient of some rows of a step: (prompt, response) ids, and an advantage each.

    Every rank gets the same arguments and takes its share. n_tokens counts the whole step. logq:
    the log-probability with which the sampler drew each row's tokens; None for a human row.
    Returns this rank's sums [5], fp64, for `apply`: loss, log-prob, entropy; log q - log p and
    tokens of the sampled rows.
    """
    device = next(policy.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    for batch in deal(lengths, mesh.size(), micro_tokens)[mesh.get_rank()]:
        tensors = collate([(*rows[i], -advantages[i] / n_tokens) for i in batch], device)
        loss, logp, entropy = policy(*tensors)
        loss.backward()
        means = [loss.detach().double(), logp.double().sum(), entropy.double().sum()]
        sums[:3] += torch.stack(means)
        for i, part in zip(batch, logp.split([len(rows[i][1]) for i in batch]), strict=True):
            if logq and (drawn := logq[i]) is not None:
                sums[3] += drawn - part.double().sum()
                sums[4] += len(part)
    return sums


def apply(
    policy: Policy, optimizer: torch.optim.Optimizer, sums: Tensor, n_tokens: int, grad_clip: float
) -> dict[str, float | None]:
    """One optimiser step with the gradients of `accumulate`; `sums` [5] add up what it returned.

    Rows of zero advantage count in n_tokens, and their log-probs in the metrics. Returns loss,
    gradient norm before clipping, mean log-prob and entropy in nats, tokens; how far the sampler is
    from the policy: the mean of log q - log p over sampled tokens; and `skipped`: the gradient was
    not finite (on any rank: the norm is everyone's), so no weight was touched.
    """
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)).item()
    skipped = not math.isfinite(grad_norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, logp, entropy, gap, sampled = sums.tolist()
    numbers = {
        "loss": loss,
        "grad_norm": grad_norm,
        "logp": logp / n_tokens,
        "entropy": entropy / n_tokens,
        "sampler_gap": gap / sampled if sampled else math.nan,
    }
    finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    return finite | {"tokens": n_tokens, "skipped": skipped}


def state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, in tensors that the two own."""
    if not optimizer.state:
        # get_state_dict fills an empty optimiser by a step at rate 0: reset its count, or Adam's
        # bias correction would include it.
        get_state_dict(policy, optimizer)
        for moments in optimizer.state.values():
            moments["step"].zero_()
    model, optim = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optim}


def save(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write weights and optimiser, sharded over the ranks."""
    dcp.save(state(policy, optimizer), checkpoint_id=folder)


def load(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read a checkpoint of `save` into both, in place."""
    read = state(policy, optimizer)
    dcp.load(read, checkpoint_id=folder)
    model, optim = read["model"], read["optimizer"]
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)


def load_weights(policy: Policy, folder: Path) -> None:
    """Read the weights of a checkpoint of `save`, in place, without its optimiser."""
    read = {"model": get_model_state_dict(policy)}
    dcp.load(read, checkpoint_id=folder)
    set_model_state_dict(policy, read["model"])


# Copies of the weights that would go stale beside the new ones
STALE = "*.safetensors *.bin *.bin.index.json *.pt *.pth *.gguf *.onnx *.msgpack *.h5 .*".split()


def export(policy: Policy, source: Path, out: Path, rank: int) -> None:
    """Write `source` again to `out` with the trained tensors in place, file by file, dtypes kept.

    Tensors that the text model lacks (the vision tower of an image–text checkpoint) are copied as
    they are. Weights in other formats are left behind. Collective. Raises ModelError where `source`
    has no tensor for a trained one (`check_checkpoint` finds that before).
    """
    trained = dict(policy.lm.named_parameters(remove_duplicate=False))
    written = set()
    tmp = out.with_name(f".{out.name}.tmp")
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.copytree(source, tmp, ignore=shutil.ignore_patterns(*STALE))
    for file in weight_files(source):
        tensors = {}
        with safe_open(file, "pt") as f:
            for name in f.keys():
                known = name if name in trained else source_name(name)
                if known in trained:
                    written.add(id(trained[known]))
                    full = full_tensor(trained[known])  # every rank takes part, in this order
                    if rank == 0:
                        dtype = f.get_tensor(name).dtype
                        tensors[name] = full.to("cpu", dtype, copy=True).contiguous()
                elif rank == 0:
                    tensors[name] = f.get_tensor(name)
        if rank == 0:
            save_file(tensors, tmp / file.name, metadata={"format": "pt"})
    missing = sorted(name for name, p in trained.items() if id(p) not in written)
    if missing:
        raise ModelError(f"{source} has no tensor for {some(missing)}, which cannot be exported")
    if rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        os.replace(tmp, out)
    dist.barrier()
