"""Updates of a tiny random model on fixed rows, for soak.py: the loss of each step, to a file."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import data
from config import parse
from mini import world
from policy import accumulate, apply, load_policy
from ranks import from_rank_0, join, setup

join()
mesh, device = setup(parse(["--device", "cpu"]))
examples = world.fables(24, 0)
folder = from_rank_0(tempfile.mkdtemp() if dist.get_rank() == 0 else None)
if dist.get_rank() == 0:
    world.make_model(Path(folder), examples, 0, hidden=32)
dist.barrier()
tokenizer = AutoTokenizer.from_pretrained(folder)
policy, _ = load_policy(Path(folder), mesh, device, recompute=False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
losses = []
for step in range(1, int(sys.argv[2]) + 1):
    chosen = data.step_examples(examples, 0, step, 6)
    prompts = [data.encode_prompt(tokenizer, e.prompt, False) for e in chosen]
    responses = [data.encode_anchor(tokenizer, e, False, 10**6) for e in chosen]
    rows = list(zip(prompts, responses, strict=True))
    advantages = [0.3 * (i - 2) for i in range(len(rows))]
    n_tokens = sum(map(len, responses))
    sums = accumulate(policy, rows, advantages, n_tokens, mesh, 256)
    losses.append(apply(policy, optimizer, sums, n_tokens, 1.0)["loss"])
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(losses))
dist.barrier()
dist.destroy_process_group()
