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
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo import onpolicy_loss


class Policy(nn.Module):
    """Root of the sharded model. Its forward runs head and loss: FSDP gathers the head for both."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm: Any = lm

    def forward(
        self, ids: Tensor, positions: Tensor, targets: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logp [N], entropy [N]) of what `collate` returns."""
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
        hidden = hidden.flatten(0, 1)[positions]  # [N, H]: no prompt, no padding
        return onpolicy_loss(hidden, self.lm.lm_head.weight, targets, coef)


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
    path: Path, mesh: DeviceMesh, device: torch.device, recompute: bool
) -> tuple[Policy, PreTrainedModel]:
    """The sharded fp32 policy, and this rank's whole copy that generates (bf16 on a GPU)."""
    bf16 = device.type == "cuda"
    copy: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    copy.to(device).eval()
    with torch.device("meta"):
        policy = Policy(AutoModelForCausalLM.from_config(copy.config, dtype=torch.float32))
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
) -> Tensor:
    """Add the gradient of some rows of a step: (prompt, response) ids, and an advantage each.

    Every rank gets the same arguments and takes its share. n_tokens counts the whole step. Returns
    this rank's sums [3], fp64, of loss, log-prob and entropy, for `apply`.
    """
    device = next(policy.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    for batch in deal(lengths, mesh.size(), micro_tokens)[mesh.get_rank()]:
        tensors = collate([(*rows[i], -advantages[i] / n_tokens) for i in batch], device)
        loss, logp, entropy = policy(*tensors)
        loss.backward()
        sums += torch.stack([loss.detach().double(), logp.double().sum(), entropy.double().sum()])
    return sums


def apply(
    policy: Policy, optimizer: torch.optim.Optimizer, sums: Tensor, n_tokens: int, grad_clip: float
) -> dict[str, float | None]:
    """One optimiser step with the gradients that `accumulate` left; `sums` [3] is what it returned.

    Rows of zero advantage count in n_tokens, and their log-probs in the metrics. Returns loss,
    gradient norm before clipping, mean log-prob and entropy in nats, tokens; and `skipped`: the
    gradient was not finite (on any rank: the norm is everyone's), so no weight was touched.
    """
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)).item()
    skipped = not math.isfinite(grad_norm)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, logp, entropy = sums.tolist()
    numbers = {
        "loss": loss,
        "grad_norm": grad_norm,
        "logp": logp / n_tokens,
        "entropy": entropy / n_tokens,
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


def export(policy: Policy, source: Path, out: Path, rank: int) -> None:
    """Write `source` again to `out` with the trained tensors in place, file by file, dtypes kept.

    Tensors that the text model lacks (the vision tower of an image–text checkpoint) are copied as
    they are. A text model says `model.…` where such a checkpoint says `model.language_model.…`.
    Collective. Raises ValueError where `source` has no tensor for a trained one.
    """
    trained = dict(policy.lm.named_parameters(remove_duplicate=False))
    written = set()
    tmp = out.with_name(f".{out.name}.tmp")
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.copytree(source, tmp, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt") as f:
            for name in f.keys():
                known = name if name in trained else name.replace("model.language_model.", "model.")
                if known in trained:
                    written.add(known)
                    full = full_tensor(trained[known])  # every rank takes part, in this order
                    if rank == 0:
                        dtype = f.get_tensor(name).dtype
                        tensors[name] = full.to("cpu", dtype).contiguous()
                elif rank == 0:
                    tensors[name] = f.get_tensor(name)
        if rank == 0:
            save_file(tensors, tmp / file.name, metadata={"format": "pt"})
    missing = {name for name, _ in policy.lm.named_parameters()} - written
    if missing:
        raise ValueError(
            f"cannot export: {source} has no tensor for {sorted(missing)[:3]}… "
            "(is it in safetensors format?)"
        )
    if rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        os.replace(tmp, out)
    dist.barrier()
