"""The miniature's data and model: the whole recipe in minutes, offline, on two CPU cores.

What the published run downloads, made from one seed:

    fables()       prompt–story pairs from a small story grammar, of 25 or 60 words
    make_model()   a byte-level BPE tokenizer and a random hybrid model in the style of Qwen3.5
    mislead()      the same pairs, three in five of them asking for the length of another story
    stretch()      validation prompts for 1x, 2x and 3x the trained length

The warm start on misleading prompts leaves a model that writes fluently and often ignores the
requested length. Reinforcement learning then teaches it to write as long as was asked.
"""

import random
import re
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from data import Example
from reward import word_count

LENGTHS = (25, 60)  # words: a million parameters can tell these apart within minutes
HEROES = "fox badger hare goat crow toad mole wren".split()
TRAITS = "small proud shy grey brave quiet hungry clever".split()
THINGS = "lantern bell key kite drum ring boat map".split()
PLACES = "river mill hill harbour forest tower garden bridge".split()
OPENINGS = [
    "A {trait} {hero} lived near the {place} and dreamed of a {thing}.",
    "Near the {place} there lived a {trait} {hero} who had lost a {thing}.",
    "One morning a {trait} {hero} came to the {place} to find a {thing}.",
    "The {trait} {hero} of the {place} had never owned a {thing}.",
]
MIDDLES = [
    "Rain fell all night, and the road turned to mud.",
    "The {hero} walked until the moon was high.",
    "By the {other_place} a {friend} sat mending a net.",
    '"Have you seen a {thing}?" asked the {hero}.',
    '"Look under the stones," said the {friend}.',
    "The {hero} looked under every stone and found only dust.",
    "Nobody at the {other_place} would answer the door.",
    "The {friend} shared some bread and a dry place by the fire.",
    "Something shone in the grass, but it was only glass.",
    '"I will not turn back," said the {hero}.',
    "Wind shook the trees, and the {hero} was afraid.",
    "They crossed the cold water together, step by step.",
    "A door stood open, and warm light spilled over the path.",
    "The {hero} called out, and only the hills replied.",
]
ENDINGS = [
    "At last the {thing} lay there in the dark, and the {hero} carried it home.",
    "In the end the {hero} gave the {thing} to the {friend} and went home smiling.",
    "The {thing} was broken, but the {hero} had found a friend.",
    "So the {hero} came back to the {place}, and the {thing} never left the house again.",
]
PROMPT = (
    "Write a story about a {trait} {hero}, a {thing} and the {place}. "
    "The story should be {words} words long."
)
# Written for this project after the protocol of Qwen3.5's template: the generation prompt opens the
# think block itself, and closes it at once where thinking is off.
CHAT_TEMPLATE = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}\
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}\
{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


def fable(rng: random.Random, words: int) -> tuple[str, dict[str, str]]:
    """One story of about `words` words, and what its prompt has to name."""
    hero, friend = rng.sample(HEROES, 2)
    place, other_place = rng.sample(PLACES, 2)
    slots = dict(hero=hero, friend=friend, place=place, other_place=other_place)
    slots |= dict(trait=rng.choice(TRAITS), thing=rng.choice(THINGS))
    opening = rng.choice(OPENINGS)
    middles = rng.sample(MIDDLES, len(MIDDLES))
    ending = rng.choice(ENDINGS)
    lengths = range(len(middles) + 1)
    stories = [" ".join([opening, *middles[:n], ending]).format(**slots) for n in lengths]
    return min(stories, key=lambda story: abs(word_count(story) - words)), slots


def fables(n: int, seed: int) -> list[Example]:
    """`n` examples, each of about one of LENGTHS words. Pure in its arguments."""
    rng = random.Random(f"fables-{seed}")
    examples = []
    for i in range(n):
        words = rng.choice(LENGTHS)
        story, slots = fable(rng, words)
        prompt = PROMPT.format(words=words, **slots)
        examples.append(Example(f"fable-{i:05d}", prompt, words, story, source="mini grammar"))
    return examples


def ask_for(example: Example, words: int) -> Example:
    """The example with another length in its prompt, and no other change to it."""
    prompt = re.sub(r"[\d,]+(?=\s+words\s+long)", str(words), example.prompt)
    return replace(example, prompt=prompt, target_words=words)


def mislead(examples: list[Example], seed: int, share: float = 0.6) -> list[Example]:
    """The same pairs, but `share` of the prompts ask for the length of a story drawn at random."""
    rng = random.Random(f"mislead-{seed}")
    lengths = [example.target_words for example in examples]
    return [ask_for(e, rng.choice(lengths)) if rng.random() < share else e for e in examples]


def stretch(examples: list[Example], longest: int) -> list[Example]:
    """Each example as three validation prompts: at its own length, and 1 and 2 x `longest` above.

    With `longest` the longest trained story these are the thirds of the paper's 1–4k, 4–8k and
    8–12k words.
    """
    prompts = []
    for extra in (0, 1, 2):
        for e in examples:
            longer = ask_for(e, e.target_words + extra * longest)
            prompts.append(replace(longer, uid=f"{e.uid}+{extra}", story="", reasoning=""))
    return prompts


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens; digits stand alone: 35 and 36 share their 3."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s+"), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    out: Path, examples: list[Example], seed: int, vocab_size: int = 512, hidden: int = 128
) -> None:
    """Write a tokenizer trained on the examples, and a random model of a million parameters."""
    tokenizer = make_tokenizer([f"{e.prompt}\n{e.story}" for e in examples], vocab_size)
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3_5ForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
