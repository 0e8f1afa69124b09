"""policy.py: the anchor reaches the weights; every split gives one update; exports are whole."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from worlds import World, leave

import data
from grpo import group_advantages
from policy import collate, deal


def rows_of(path: Path, examples, n: int):
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        (
            data.encode_prompt(tokenizer, e.prompt, False),
            data.encode_anchor(tokenizer, e, False, 999),
        )
        for e in examples[:n]
    ]


# Of plain SGD: so long that (before - after) / STEP is the gradient to float32's last digits.
STEP = 1000.0


def updates(path, rows, advantages, splits, out):
    """On every rank, for each (micro-batch budget, cut): load, one update with SGD, the rows before
    and from the cut in parts of their own; rank 0 saves the weights and metrics."""
    import polaris
    from policy import accumulate, apply, full_tensor, load_policy

    polaris.join()
    mesh, device = polaris.setup(polaris.parse(["--device", "cpu"]))
    n_tokens, results = sum(len(response) for _, response in rows), []
    for micro_tokens, cut in splits:
        policy, _ = load_policy(path, mesh, device, recompute=micro_tokens == 1)
        optimizer = torch.optim.SGD(policy.parameters(), lr=STEP)
        sums = sum(
            accumulate(policy, rows[part], advantages[part], n_tokens, mesh, micro_tokens)
            for part in (slice(cut), slice(cut, None))
        )
        metrics = apply(policy, optimizer, sums, n_tokens, grad_clip=1e9)
        results.append(
            ({name: full_tensor(p).clone() for name, p in policy.lm.named_parameters()}, metrics)
        )
    if mesh.get_rank() == 0:
        torch.save(results, out)
    leave()


def updates_in_world(world, tmp_path, path, rows, advantages, splits, nodes=1):
    out = tmp_path / "updates.pt"
    run = World(
        world, updates, path, rows, advantages, splits, out, log=tmp_path / "log", nodes=nodes
    )
    assert run.wait() == [0] * world, run.text()
    return torch.load(out)


def reference_gradient(path, rows, coefficients):
    """The definition, row by row without padding: the gradient of the sum of c · log p."""
    model = AutoModelForCausalLM.from_pretrained(path)
    total = 0.0
    for (prompt, response), c in zip(rows, coefficients, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        total = total + c * logp.sum()
    total.backward()
    return dict(model.named_parameters())


def test_with_equal_rewards_the_update_is_the_weighted_gradient_of_the_anchor_alone(
    mini_model, tmp_path
):
    path, examples = mini_model
    rows = rows_of(path, examples, 6)
    rewards = torch.tensor(
        [0.25] * 5 + [0.5]
    )  # five equal rollouts: no policy row has any advantage
    is_anchor = torch.tensor([False] * 5 + [True])
    advantages = group_advantages(rewards, torch.zeros(6, dtype=torch.long), is_anchor, weight=0.4)
    assert advantages[:5].abs().max() == 0 and advantages[5] > 0

    [(weights, _)] = updates_in_world(2, tmp_path, path, rows, advantages.tolist(), [(400, 2)])
    n_tokens = sum(len(response) for _, response in rows)
    wanted = reference_gradient(path, rows[5:], [-advantages[5].item() / n_tokens])
    before = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert_is_gradient(before, weights, wanted)
    changed = sum((weights[name] != before[name]).sum().item() for name in wanted)
    assert changed > 10_000, "the anchor's gradient did not reach the weights"


def assert_is_gradient(before, after, wanted):
    steps = torch.cat([((before[name] - after[name]) / STEP).flatten() for name in wanted])
    gradients = torch.cat([p.grad.flatten() for p in wanted.values()])
    assert (steps - gradients).norm() <= 1e-5 * gradients.norm()


def test_the_update_is_the_token_mean_of_the_step_for_any_ranks_nodes_micro_batches_and_parts(
    mini_model, tmp_path
):
    path, examples = mini_model
    rows = rows_of(path, examples, 11)  # no multiple of anything: some ranks have gaps to fill
    advantages = [(-1) ** i * (0.3 + 0.1 * i) for i in range(11)]
    advantages[4] = 0.0
    n_tokens = sum(len(response) for _, response in rows)
    wanted = reference_gradient(path, rows, [-a / n_tokens for a in advantages])
    before = AutoModelForCausalLM.from_pretrained(path).state_dict()
    norm = torch.stack([p.grad.norm() for p in wanted.values()]).norm().item()

    # Budgets: one row (and with recomputed layers), two, all of a rank's rows. All rows at once, or
    # 5 and 6 of them, or 1 and 10, when some ranks have nothing to do in the first part.
    splits = [(1, 0), (1, 5), (250, 0), (250, 5), (100_000, 0), (100_000, 1)]
    for world, nodes in ((1, 1), (2, 1), (4, 1), (4, 2)):
        results = updates_in_world(world, tmp_path, path, rows, advantages, splits, nodes)
        for weights, metrics in results:
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert metrics["tokens"] == n_tokens
            assert metrics["logp"] == pytest.approx(results[0][1]["logp"], rel=1e-6)
            assert metrics["loss"] == pytest.approx(results[0][1]["loss"], rel=1e-5)
            assert_is_gradient(before, weights, wanted)


def test_a_gradient_that_is_not_finite_changes_no_weight(mini_model, tmp_path):
    path, examples = mini_model
    rows = rows_of(path, examples, 2)
    [(weights, metrics)] = updates_in_world(
        2, tmp_path, path, rows, [float("nan"), 1.0], [(999, 0)]
    )
    assert metrics["skipped"] and metrics["grad_norm"] is None
    before = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(2, 9000), min_size=1, max_size=60),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 40000),
)
def test_dealing_takes_every_row_once_gives_equal_numbers_of_micro_batches_and_balances_tokens(
    lengths, world, budget
):
    dealt = deal(lengths, world, budget)
    assert sorted(i for rank in dealt for batch in rank for i in batch) == list(range(len(lengths)))
    assert len({len(rank) for rank in dealt}) == 1 and len(dealt) == world
    for rank in dealt:
        for batch in rank:
            assert len(batch) <= 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in dealt]
    # Longest-first dealing never differs by more than one row.
    assert max(loads) - min(loads) <= max(lengths)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=6),
            st.lists(st.integers(0, 9), min_size=1, max_size=9),
            st.floats(-2, 2, width=32),
        ),
        max_size=5,
    )
)
def test_every_response_token_is_trained_once_with_its_rows_coefficient_and_nothing_else_is(rows):
    # Token ids overlap on purpose: EOS may equal the padding id 0, or a token of the prompt.
    ids, positions, targets, coef = collate(rows, "cpu")
    assert targets.tolist() == [t for _, response, _ in rows for t in response]
    assert coef.tolist() == [c for _, response, c in rows for _ in response]
    width = ids.shape[1]
    predicted = [(p // width, p % width + 1) for p in positions.tolist()]
    assert [ids[b, t].item() for b, t in predicted] == targets.tolist()
    assert predicted == [
        (b, t) for b, (p, r, _) in enumerate(rows) for t in range(len(p), len(p) + len(r))
    ], "prompt or padding is trained, or a response token (EOS, the last) is not"


def image_text_checkpoint(path: Path, tokenizer_from: Path) -> None:
    """A tiny random checkpoint of Qwen3.5's image–text class, in two files as large ones are."""
    text = json.loads((tokenizer_from / "config.json").read_text())
    config = Qwen3_5Config(
        text_config={
            k: v
            for k, v in text.items()
            if k not in ("architectures", "transformers_version", "dtype")
        },
        vision_config=dict(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=16,
        ),
    )
    torch.manual_seed(5)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(path, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(path)


def tensors_of(path: Path) -> dict:
    return {
        name: t
        for file in sorted(path.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def test_an_image_text_checkpoint_comes_back_whole_with_only_its_language_tensors_changed(
    mini_model, tmp_path
):
    from worlds import polaris_main

    start, examples = mini_model
    source, out, stories = tmp_path / "vl", tmp_path / "run", tmp_path / "data.jsonl"
    image_text_checkpoint(source, start)
    assert len(list(source.glob("*.safetensors"))) > 1
    lines = [
        dict(uid=e.uid, prompt=e.prompt, target_words=e.target_words, story=e.story)
        for e in examples[:8]
    ]
    stories.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--preset", "mini", "--model", str(source), "--data", str(stories), "--out", str(out)]
    argv += "--steps 2 --prompts 2 --group 3 --warm-steps 0 --max-response 24".split()
    # Validation prompts for 1, 3 and 12 times the longest story: the last would grow without bound.
    longest, held_out = max(e.target_words for e in examples[:8]), tmp_path / "eval.jsonl"
    asked = [dict(uid=f"e{n}", prompt="Rain.", target_words=n * longest) for n in (1, 3, 12)]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in asked))
    argv += ["--eval-data", str(held_out)]
    run = World(2, polaris_main, argv, log=tmp_path / "log")
    assert run.wait() == [0, 0], run.text()
    assert "2 for validation (1 left out" in run.text()
    told = [json.loads(line)["bucket"] for line in (out / "evals.jsonl").open()]
    assert told == ["1x", "3x"] * 2
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert all(m["sampler_gap"] > 0 for m in metrics)  # top-p and top-k leave something out

    again = tmp_path / "again"
    command = ["--export", str(out / "checkpoints/step-000002"), "--out", str(again)]
    run = World(1, polaris_main, command, log=tmp_path / "log")
    assert run.wait() == [0], run.text()
    exported = tensors_of(again)
    assert all(torch.equal(t, exported[name]) for name, t in tensors_of(out / "model").items())

    before, after = tensors_of(source), tensors_of(out / "model")
    assert before.keys() == after.keys()
    assert all(
        before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        for name in before
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    language = {name for name in before if "language_model" in name or name == "lm_head.weight"}
    assert changed <= language and len(changed) > len(language) / 2
    loaded, info = Qwen3_5ForConditionalGeneration.from_pretrained(
        out / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.state_dict()["lm_head.weight"], after["lm_head.weight"])
    assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() > 0
    files = {f.name for f in source.iterdir()}
    assert files == {f.name for f in (out / "model").iterdir()}
