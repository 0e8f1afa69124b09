"""The policy is the model: each architecture is trained and sampled exactly, or refused in a line.

Tiny random checkpoints. Trained: loss and gradient equal plain autograd through the model's own
forward, and greedy text equals transformers' generate, beyond any sliding window. Refused: exit
status 2, one line, no file.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_policy import updates_in_world
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import World

import polaris
import policy as policy_file
import start
from checkpoint import best_step
from policy import (
    accumulate,
    check_checkpoint,
    check_policy,
    copy_weights,
    export,
    full_tensor,
    load_policy,
)
from rollout import Sampling, generate

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,  # far from the uniform distribution that a usual initialisation gives
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
WINDOW = dict(sliding_window=7)
DELTA = dict(
    num_hidden_layers=4,
    linear_key_head_dim=8,
    linear_value_head_dim=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
LONG |= {"long_factor": [2.0] * 4}
LONG = dict(rope_parameters=LONG, original_max_position_embeddings=64)

# name: class, settings, and what is done to the checkpoint
TRAINED = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama, tied, only the head stored": ("Llama", dict(tie_word_embeddings=True)),
    "llama, tied, both stored": ("Llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, one key head": ("Llama", dict(num_key_value_heads=1)),
    "llama, bf16": ("Llama", dict(dtype="bfloat16")),
    "llama, fp16": ("Llama", dict(dtype="float16")),
    "llama, dropout": ("Llama", dict(attention_dropout=0.5)),
    "llama, sharded": ("Llama", {}),
    "llama, padded vocabulary": ("Llama", dict(padded=64)),
    "llama, consolidated beside": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", WINDOW),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("Qwen3", {}),
    "qwen3.5": ("Qwen3_5", DELTA),
    "qwen3.5, image-text": ("Qwen3_5", DELTA),
    "gemma3": ("Gemma3", WINDOW | dict(layer_types=MIXED, query_pre_attn_scalar=8)),
    "gemma3, soft cap": ("Gemma3", WINDOW | dict(layer_types=MIXED, final_logit_softcapping=5.0)),
    "phi3": ("Phi3", dict(sliding_window=None, num_key_value_heads=4)),
    "phi3, window": ("Phi3", WINDOW),
    "phi, bias of the head": ("Phi", dict(num_key_value_heads=4)),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 1, 0])),
    "granite": ("Granite", dict(logits_scaling=8.0, residual_multiplier=0.5)),
    "cohere": ("Cohere", dict(logit_scale=0.0625)),
    "cohere2, windows": ("Cohere2", WINDOW | dict(layer_types=MIXED, logit_scale=0.25)),
    "olmo3, windows": ("Olmo3", WINDOW | dict(layer_types=MIXED)),
    "phi3, long RoPE not reached": ("Phi3", dict(sliding_window=None) | LONG),
}


# name: class, settings, what is done to the checkpoint, and what the one line says
def drop(*names):
    return lambda path: rewrite(path, lambda t: [t.pop(name) for name in names])


def put(**tensors):
    return lambda path: rewrite(path, lambda t: t.update(tensors))


def configured(**changes):
    return lambda path: edit_config(path, **changes)


def as_bin(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def tie_on_top(path):
    drop("lm_head.weight")(path)
    edit_config(path, tie_word_embeddings=True)


def no_template(path):
    (path / "chat_template.jinja").unlink()


def no_end(path):
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{ m.content }}\n{%- endfor %}"
    )


LAYER = "model.layers.1.mlp.down_proj.weight"
REFUSED = {
    "gpt2": ("GPT2", dict(n_embd=32, n_head=4, n_layer=2), None, "model.layers"),
    "neox": ("GPTNeoX", {}, None, "model.layers"),
    "mamba": ("Mamba", dict(state_size=4), None, "model.layers"),
    "qwen3 moe": ("Qwen3Moe", MOE, None, "experts one by one"),
    "mixtral": ("Mixtral", dict(num_local_experts=4), None, "experts one by one"),
    "gemma2": ("Gemma2", dict(sliding_window=64), None, "caps its attention"),
    "chunked": ("Llama", {}, configured(attention_chunk_size=8), "chunked_attention"),
    "an unknown scale": ("Granite", dict(logits_scaling=2.0), "unscaled", "of its largest logit"),
    "both tied": (
        "Llama",
        dict(tie_word_embeddings=True),
        lambda path: put(**{"lm_head.weight": torch.ones(512, 32)})(path),
        "are tied and differ",
    ),
    "missing": ("Llama", {}, drop(LAYER), LAYER),
    "missing head": ("Llama", {}, drop("lm_head.weight"), "lm_head.weight"),
    "mismatched": ("Llama", {}, put(**{LAYER: torch.ones(32, 47)}), f"{LAYER} is [32, 47]"),
    "int8": ("Llama", {}, put(**{LAYER: torch.ones(32, 48).char()}), "is I8"),
    "fp8": (
        "Llama",
        {},
        configured(quantization_config={"quant_method": "fp8"}),
        "quantised",
    ),
    "tie on the outer config": ("Qwen3_5", DELTA, tie_on_top, "say so in text_config"),
    "bin only": ("Llama", {}, as_bin, "holds no .safetensors"),
    "shard gone": ("Llama", {}, lambda path: next(path.glob("*-of-*")).unlink(), "not there"),
    "adapter": (
        "Llama",
        {},
        lambda path: (path / "adapter_config.json").write_text("{}"),
        "adapter",
    ),
    "dynamic RoPE": ("Llama", dict(rope_parameters=DYNAMIC), None, "dynamic RoPE"),
    "long RoPE reached": ("Phi3", LONG, None, "knows 64 positions"),
    "too few positions": ("Llama", dict(max_position_embeddings=100), None, "knows 100 positions"),
    "no template": ("Llama", {}, no_template, "no chat template"),
    "no end of turn": ("Llama", {}, no_end, "ends a turn"),
    "not a number": ("Llama", {}, put(**{LAYER: torch.full((32, 48), torch.nan)}), ""),
    "encoder-decoder": ("T5", {}, None, "no causal language model"),
}


@pytest.fixture(scope="module")
def tokenizer(mini_model):
    return AutoTokenizer.from_pretrained(mini_model[0])


def save(out: Path, tokenizer, family: str, settings: dict, name: str = "") -> Path:
    """A checkpoint of `family` with all weights away from the constants they start at."""
    settings = SMALL | dict(vocab_size=len(tokenizer) + settings.get("padded", 0)) | settings
    settings.pop("padded", None)
    dtype = settings.pop("dtype", "float32")
    torch.manual_seed(0)
    if family == "Qwen3_5":
        text = hf.Qwen3_5TextConfig(**settings)
        lm = hf.Qwen3_5ForCausalLM(text)
        if "image-text" in name:
            eye = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2)
            eye |= dict(out_hidden_size=32, num_position_embeddings=16)
            config = hf.Qwen3_5Config(text_config=text.to_dict(), vision_config=eye)
            lm = hf.Qwen3_5ForConditionalGeneration(config)
    elif family == "Gemma3":
        lm = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**settings))
    elif family == "T5":
        lm = hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, num_layers=1, vocab_size=512))
    elif family == "GPT2":
        lm = hf.GPT2LMHeadModel(hf.GPT2Config(**settings))
    else:
        lm = getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**settings))
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    lm.to(getattr(torch, dtype)).save_pretrained(
        out, max_shard_size="60KB" if "sharded" in name else "5GB"
    )
    tokenizer.save_pretrained(out)
    return out


def rewrite(path: Path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def rank():
    polaris.join()
    yield polaris.setup(polaris.parse(["--device", "cpu"]))
    torch.distributed.destroy_process_group()


def plain(path: Path, rows, coefficients, temperature: float):
    """(loss, gradients by name) of the definition, through the model's own forward, row by row."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loss = torch.zeros(())
    for (prompt, response), c in zip(rows, coefficients, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        loss = loss + c * logps[range(len(response)), response].sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_loss_gradient_text_and_export_are_those_of_the_model(name, tokenizer, rank, tmp_path):
    mesh, device = rank
    family, settings = TRAINED[name]
    path = save(tmp_path / "model", tokenizer, family, settings, name)
    if "only the head" in name:
        rewrite(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    if "both stored" in name:
        rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    if "consolidated" in name:
        save_file({"other.name": torch.ones(3)}, path / "consolidated.safetensors")
    check_checkpoint(path, reach=60)

    temperature = 0.7 if len(name) % 2 else 1.0
    policy, copy = load_policy(path, mesh, device, len(name) % 3 == 0, temperature)
    rows = [([5, 9, 11], list(range(20, 50))), ([7], [3, 7]), (list(range(30)), [8, 8, 2, 1])]
    assert check_policy(policy, copy, sum(rows[0], [])) < 1e-5
    advantages, n_tokens = [1.0, -0.5, 0.3], 36
    for micro_tokens in (1, 1000):
        policy.zero_grad()
        sums = accumulate(policy, rows, advantages, n_tokens, mesh, micro_tokens, [0.0, None, -1.0])
        loss, wanted = plain(path, rows, [-a / n_tokens for a in advantages], temperature)
        assert sums[0].item() == pytest.approx(loss, rel=1e-5)
        grads = {name: full_tensor(p.grad) for name, p in policy.lm.named_parameters()}
        assert grads.keys() == wanted.keys()
        ours = torch.cat([grads[key].flatten() for key in wanted])
        theirs = torch.cat([g.flatten() for g in wanted.values()])
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    greedy = Sampling(temperature=0, repetition_penalty=1.1, max_new_tokens=24)
    prompts = [[5, 9, 2, 44, 7], [3], list(range(20, 50))]  # the last is longer than any window
    for r, prompt in zip(generate(copy, prompts, [0] * 3, greedy, -1), prompts, strict=True):
        text = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=1.1,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert r.ids == text[0, len(prompt) :].tolist()

    with torch.no_grad():  # a change that is seen in bf16, too
        for p in policy.parameters():
            p.mul_(1.25)
    copy_weights(policy.lm, copy)
    export(policy, path, tmp_path / "out", 0)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    for key, p in again.named_parameters():
        assert torch.equal(p, full_tensor(policy.lm.get_parameter(key)).to(p.dtype)), key
    before, after = ({f.name for f in p.iterdir()} for p in (path, tmp_path / "out"))
    assert after == before - {"consolidated.safetensors"}


def test_a_bias_column_a_scale_and_a_cap_are_summed_over_ranks(tokenizer, tmp_path):
    for name in ("phi, bias of the head", "granite", "gemma3, soft cap"):
        path = save(tmp_path / name, tokenizer, *TRAINED[name])
        rows = [([5, 9, 11], list(range(20, 50))), ([7], [3, 7]), ([1, 2], [8, 8, 2, 1])]
        [(weights, _)] = updates_in_world(2, tmp_path, path, rows, [1.0, -0.5, 0.3], [(1, 0)])
        _, wanted = plain(path, rows, [-1 / 36, 0.5 / 36, -0.3 / 36], 1.0)
        before = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for key, gradient in wanted.items():
            step = (before[key] - weights[key]) / 1000
            assert (step - gradient).norm() <= 3e-5 * max(1, gradient.norm()), key


def lines(examples) -> str:
    keys = ("uid", "prompt", "target_words", "story")
    return "".join(json.dumps({k: getattr(e, k) for k in keys}) + "\n" for e in examples)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_in_one_line(
    name, mini_model, tokenizer, tmp_path, capsys, monkeypatch
):
    family, settings, change, told = REFUSED[name]
    if name == "tie on the outer config":
        name = "image-text"
    if name == "shard gone":
        name = "sharded"
    path = save(tmp_path / "model", tokenizer, family, settings, name)
    if change == "unscaled":
        monkeypatch.setattr(policy_file, "logit_options", lambda config: (1.0, 0.0))
    elif change:
        change(path)
    (tmp_path / "d.jsonl").write_text(lines(mini_model[1][:8]))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    argv = (
        f"--preset mini --model {path} --data {tmp_path}/d.jsonl --out {tmp_path}/run --prompts 2"
    )
    argv += " --device cpu --warm-steps 0 --max-prompt 64 --max-response 64"
    asked = []
    monkeypatch.setattr(start, "start_stand_in", lambda: asked.append(1))
    assert polaris.main(argv.split()) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and error.startswith("polaris: ") and "\n" not in error, error
    assert sorted(tmp_path.rglob("*")) == before and not asked


def test_a_real_model_needs_a_preset_and_a_temperature(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text("{}")
    argv = ["--model", str(tmp_path), "--data", f"{tmp_path}/d.jsonl"]
    assert polaris.main(argv) == 2
    assert "--preset paper" in capsys.readouterr().err
    assert polaris.main(["--temperature", "0"]) == 2
    assert "--temperature 0" in capsys.readouterr().err


def main_on_unequal_nodes(argv: list[str]) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = "1" if os.environ["RANK"] == "2" else "2"
    return polaris.main(argv)


def test_nodes_with_unequal_ranks_are_refused(tmp_path):
    argv = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    run = World(3, main_on_unequal_nodes, argv, log=tmp_path / "log")
    assert run.wait() == [2] * 3, run.text()
    assert run.text().count("nodes have 1 and 2 ranks") == 1
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_by_mean_validation_reward(tmp_path):
    assert best_step(tmp_path) is None
    rewards = {0: [(0.9, 1), (0.1, 9)], 20: [(0.4, 5), (0.3, 5)], 40: [(None, 0), (0.2, 4)]}
    records = [
        {"step": step, "reward": reward, "n": n}
        for step, buckets in rewards.items()
        for reward, n in buckets
    ]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for step, best in ((40, 40), (0, 40), (20, 20)):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        assert best_step(tmp_path) == best


def test_a_plan_says_what_fits_and_what_would(tokenizer, tmp_path, capsys):
    path = save(tmp_path / "model", tokenizer, *TRAINED["gemma3"])
    argv = ["--plan", "--preset", "paper", "--model", str(path), "--ranks", "2", "--card-gb"]
    assert polaris.main([*argv, "80"]) == 0
    text = capsys.readouterr().out
    assert "It fits." in text and "173 steps" in text and "8,304 rows" in text
    assert polaris.main([*argv, "1.6", "--micro-tokens", "60000", "--no-recompute"]) == 2
    assert "It does not fit. It does with --" in capsys.readouterr().out
    assert polaris.main(["--plan", "--preset", "paper", "--model", str(tmp_path)]) == 2
