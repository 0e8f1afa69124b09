"""The policy: sharded fp32 weights that learn, the update, checkpoints and the export.

    loss = - (sum over rows of A_row · sum over the row's response tokens of log p) / n_tokens

n_tokens counts the response tokens of all rows on all ranks, so that the update is the same for any number of ranks and
any micro-batch: gradients are summed over both and never averaged (the release averages means of micro-batches; arXiv
2606.04095 says token-mean). For the same reason a step may `accumulate` its rows in parts, while the judge still reads
the others, before it is `apply`d. Four things make it fit and stay exact:

    master weights   fp32, sharded by FSDP2. At a learning rate of 1e-6 a bf16 weight of 0.02 would never move:
                     its neighbours are 1.2e-4 away.
    head             hidden states meet the vocabulary in grpo.onpolicy_loss inside the root's forward, so that FSDP
                     gathers the head once a micro-batch and reduces its gradient once.
    dealing          rows go to ranks so that tokens balance; all ranks run equally many micro-batches, since FSDP's
                     collectives need everyone. A gap is filled by a row with nothing to learn.
    padding          on the right, where no causal layer can see it, and masked by length, never by token id.

`save` and `load` are torch.distributed.checkpoint (any number of ranks may load what any other wrote), made atomic by a
rename. `export` writes the original checkpoint again with the trained tensors in place.
"""

import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from grpo import onpolicy_loss


class Policy(nn.Module):
    """Root of the sharded model. Head and loss run inside its forward, so that FSDP gathers the head once for both."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, positions: Tensor, targets: Tensor, coef: Tensor):
        """ids [B, T]; positions [N] of the trained tokens' predecessors in the flattened batch; targets, coef [N]."""
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
        hidden = hidden.flatten(0, 1)[
            positions
        ]  # [N, H]: prompt and padding never meet the vocabulary
        return onpolicy_loss(hidden, self.lm.lm_head.weight, targets, coef)


def shard(policy: Policy, mesh: DeviceMesh, bf16: bool) -> None:
    """FSDP2: each decoder layer is a unit, the rest (embedding, head, norm) the root. Master weights stay fp32."""
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # or the coefficients of the loss would be rounded to bf16
    )
    for module in (*policy.lm.model.layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=mixed)
        # Gradients are summed: the loss is already divided by the token count of the whole step. Without the second
        # call gloo would be asked for a pre-multiplied sum, which it does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def load_policy(
    path: Path, mesh: DeviceMesh, device: torch.device, recompute: bool
) -> tuple[Policy, nn.Module]:
    """The sharded fp32 policy and this rank's whole copy in compute precision, from one read of the checkpoint."""
    bf16 = device.type == "cuda"
    copy = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
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
            # Every rank holds the same full tensor, so it cuts out its own shard without any communication.
            p.copy_(distribute_tensor(full[name].float(), mesh, p.placements, src_data_rank=None))
        for name, b in copy.named_buffers():
            policy.lm.get_buffer(name).copy_(b)
    for p in copy.parameters():  # not copy.to(): that would round the rotary frequencies as well
        p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
    return policy.train(), copy.requires_grad_(False)


@torch.no_grad()
def copy_weights(policy: nn.Module, copy: nn.Module) -> None:
    """Write the policy's parameters and buffers into `copy`, in place (captured graphs stay valid), one at a time.

    A parameter sharded by FSDP2 is cast to the copy's dtype first and gathered then: half the traffic of an fp32
    master, and never more than one whole tensor beside the copy. Collective: every rank calls it. Raises ValueError
    when names or shapes differ.
    """
    pairs = []
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (policy, copy))
        if odd := sorted(ours.keys() ^ theirs.keys()):
            raise ValueError(
                f"{len(odd)} {kind[6:]} are in one of policy and copy only, first {odd[0]}"
            )
        pairs += [(name, ours[name], theirs[name]) for name in ours]
    written: dict[int, Tensor] = {}
    for name, source, target in pairs:
        if source.shape != target.shape:
            raise ValueError(
                f"{name} is {tuple(source.shape)} in the policy and {tuple(target.shape)} in the copy"
            )
        if (
            id(target) in written
        ):  # tied in the copy: one gather serves both names, if they are tied in the policy too
            if written[id(target)] is not source:
                raise ValueError(
                    f"{name} is tied to another weight in the copy and is not in the policy"
                )
            continue
        written[id(target)] = source
        source = source.detach().to(target.dtype)
        target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


def full_tensor(p: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank: a collective."""
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def deal(lengths: list[int], world: int, micro_tokens: int) -> list[list[list[int]]]:
    """Rows → [rank][micro-batch][row], so that ranks carry equal tokens and run equally many micro-batches.

    Longest first, each row to the rank with the fewest tokens; then neighbours in length share a micro-batch while
    rows × longest stays within `micro_tokens`. Short ranks get empty micro-batches.
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
    rows: list[tuple[list[int], list[int], float]], device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(prompt, response, coefficient) rows → ids [B, T], positions [N], targets [N], coef [N] of their response tokens.

    EOS is trained like any other token, even where it doubles as padding: only response positions are ever picked.
    """
    width = max([2, *(len(p) + len(r) for p, r, _ in rows)])
    ids = torch.zeros(max(1, len(rows)), width, dtype=torch.long)  # [B, T]
    positions, targets, coef = [], [], []
    for b, (prompt, response, c) in enumerate(rows):
        ids[b, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        start = b * width + len(prompt) - 1  # the hidden state at position t predicts token t + 1
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
    """Add the gradient of some rows of a training step: (prompt, response) token ids, and an advantage each.

    Every rank gets the same arguments and takes its share; n_tokens counts the whole step, so that the parts of a step
    may come one after the other. Returns this rank's sums [3], fp64, of loss, log-prob and entropy, for `apply`.
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
) -> dict[str, float]:
    """One optimiser step with the gradients that `accumulate` left; `sums` [3] are the sum of what it returned.

    Rows of zero advantage count in n_tokens, and their log-probs in the metrics. Returns loss, gradient norm before
    clipping, mean log-prob and entropy in nats, tokens. Raises FloatingPointError, with the weights untouched, if the
    gradient is not finite.
    """
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)).item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient norm is {grad_norm}: no update was made. Go on from the last checkpoint with --resume; "
            "if it happens again, a weight or a reward is broken"
        )
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, logp, entropy = sums.tolist()
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "logp": logp / n_tokens,
        "entropy": entropy / n_tokens,
        "tokens": n_tokens,
    }


def state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint holds, in tensors that the two own."""
    if not optimizer.state:
        # torch fills an optimiser that has made no step by a step at rate 0, which Adam's bias correction would count.
        get_state_dict(policy, optimizer)
        for moments in optimizer.state.values():
            moments["step"].zero_()
    model, optim = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optim}


def save(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Checkpoint of weights and optimiser, sharded over the ranks; it gets its name only when it is whole."""
    tmp = folder.with_name(f".{folder.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)  # what a killed run left
    dist.barrier()
    dcp.save(state(policy, optimizer), checkpoint_id=tmp)
    if dist.get_rank() == 0:
        os.replace(tmp, folder)
    dist.barrier()


def load(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read a checkpoint of `save` into both, in place."""
    read = state(policy, optimizer)
    dcp.load(read, checkpoint_id=folder)
    set_state_dict(
        policy, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"]
    )


def export(policy: Policy, source: Path, out: Path, rank: int) -> None:
    """Write `source` again to `out` with the trained tensors in place of the old ones, file by file, in their dtype.

    Tensors that the text model does not have (the vision tower of an image–text checkpoint) are copied as they are.
    A text model names its layers `model.…` where such a checkpoint says `model.language_model.…`.
    """
    trained = dict(policy.lm.named_parameters(remove_duplicate=False))
    written, tmp = set(), out.with_name(f".{out.name}.tmp")
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
                    full = full_tensor(
                        trained[known]
                    )  # a collective: every rank takes part, in the same order
                    tensors[name] = (
                        full.to("cpu", f.get_tensor(name).dtype).contiguous() if rank == 0 else None
                    )
                elif rank == 0:
                    tensors[name] = f.get_tensor(name)
        if rank == 0:
            save_file(tensors, tmp / file.name, metadata={"format": "pt"})
    missing = {name for name, _ in policy.lm.named_parameters()} - written
    if missing:
        raise ValueError(
            f"{source} has no tensor for {sorted(missing)[:3]}…: cannot export (is it in safetensors format?)"
        )
    if rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        os.replace(tmp, out)
    dist.barrier()
