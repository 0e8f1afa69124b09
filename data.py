"""Stories in: examples, the chat template, anchors; anthologies -> prompt-story pairs.

An example is one line of JSON:  {"uid", "prompt", "target_words", "story", "reasoning", "source"}.
With human-reference injection (arXiv 2606.04095) its story is the *anchor* of the prompt's group, a teacher-forced row
    prompt tokens | reasoning </think> story EOS
exactly as the model's own chat template would write it, so that the policy could have sampled it. The length target is
the N of the prompt's "N words long", else target_words; words here are runs of non-space.

The paper's 1,388 pairs come from 100 anthologies and cannot be shared. `build` makes such pairs from any anthology:
books -> stories (books.py) -> no near-duplicates, wanted lengths only -> prompts (from the title, or by an LLM together
with a reasoning trace) -> train and test, split by author. The method and the checks are ours.

    python data.py gutenberg --out books/                     85 public-domain anthologies, one request at a time
    python data.py build books/*.txt --out train.jsonl --test test.jsonl [--show]
    python data.py build books/*.txt --prompts llm --llm-url URL --llm-model NAME [--dry-run]
    python data.py check train.jsonl [--tokenizer DIR --thinking]
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reward import requested_words

# ---------------------------------------------------------------------------------------------------------- examples


class DataError(ValueError):
    """Input that cannot be used. The message says where (file:line), what is wrong, and what to do."""


@dataclass(frozen=True)
class Example:
    uid: str
    prompt: str
    target_words: int  # requested length of the story, in words
    story: str = ""  # the human story: the anchor
    reasoning: str = ""  # the plan inside the anchor's <think> block
    source: str = ""


# What a chat template gives a meaning to may not come from the data: it would end the turn or open a second block.
MARKUP = re.compile(r"</?think>|<\|[\w ]+\|>")


def parse_example(line: str, anchors: bool, thinking: bool) -> Example:
    """One JSONL line -> Example. ValueError with what is wrong and what to do, without the place."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error}); every line must hold one JSON object, see `data.py check`"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")
    required = ("uid", "prompt") + ("story",) * anchors + ("reasoning",) * (anchors and thinking)
    for field in required:
        if field not in row:
            hint = {
                "story": "add it, or train without anchors (--no-anchor)",
                "reasoning": "thinking is on: add a trace (`data.py build --prompts llm` writes them) or turn it off",
            }.get(field, "add it")
            raise ValueError(f'field "{field}" is missing; {hint}')
    for field in ("uid", "prompt", "story", "reasoning", "source"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(
                f'"{field}" must be text, this is {json.dumps(row[field])[:40]}; put it in quotes'
            )
        if field not in ("uid", "source") and (found := MARKUP.search(row.get(field, ""))):
            raise ValueError(
                f'"{field}" contains {found[0]}, which the chat template writes itself; remove it'
            )
    for field in required:
        if not row[field].strip():
            raise ValueError(f'"{field}" is empty; fill it in or remove the line')

    asked, target = requested_words(row["prompt"]), row.get("target_words")
    if target is None and asked is None:
        raise ValueError(
            "the prompt asks for no length and there is no target_words; "
            'end the prompt with "The story should be 1500 words long." or add "target_words": 1500'
        )
    if target is not None and (
        isinstance(target, bool) or not isinstance(target, int) or target < 1
    ):
        raise ValueError(
            f'"target_words" must be a whole number above 0, this is {json.dumps(target)[:40]}'
        )
    if None not in (asked, target) and asked != target:
        raise ValueError(
            f'the prompt asks for {asked} words but "target_words" is {target}; make them agree'
        )
    known = {
        name: row[name] for name in ("uid", "prompt", "story", "reasoning", "source") if name in row
    }
    return Example(target_words=target or asked, **known)


def read_examples(
    path: str | Path, anchors: bool, thinking: bool
) -> tuple[list[Example], list[str]]:
    """All good examples of a JSONL file and one message ("file:line: what; what to do") per bad line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        what = f"cannot be read ({error.strerror}); give a JSONL file, e.g. from `python data.py build`"
        raise DataError(f"{path}: {what}") from None
    examples, problems, first_line = [], [], {}
    for number, data in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            example = parse_example(data.decode("utf-8"), anchors, thinking)
            if example.uid in first_line:
                raise ValueError(
                    f'uid "{example.uid}" is used by line {first_line[example.uid]} too; make it unique'
                )
        except UnicodeDecodeError as error:
            problems.append(
                f"{path}:{number}: not UTF-8 (byte {error.start}); convert the file to UTF-8"
            )
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            first_line[example.uid] = number
            examples.append(example)
    if not examples and not problems:
        problems.append(f"{path}:1: the file holds no example; write one JSON object a line")
    return examples, problems


def load(path: str | Path, *, anchors: bool = True, thinking: bool = False) -> list[Example]:
    """Examples of a JSONL file. anchors: stories are required; with thinking as well, reasoning too.

    The length target is the prompt's "N words long", else the field target_words. Raises DataError for the first bad
    line and says how many more there are.
    """
    examples, problems = read_examples(path, anchors, thinking)
    if problems:
        more = (
            f"\n({len(problems) - 1} more: `python data.py check {path}` lists them)"
            if len(problems) > 1
            else ""
        )
        raise DataError(problems[0] + more)
    return examples


def step_examples(examples: list[Example], seed: int, step: int, n: int) -> list[Example]:
    """The n examples of training step `step` (from 1): a pure function of (examples, seed, step), so a resumed run sees
    what it would have seen. Every epoch is a fresh permutation; its last len(examples) % n examples sit that epoch out,
    since in a step that straddled two epochs one prompt could be two groups."""
    epoch, place = divmod(step - 1, len(examples) // n)
    # Sorting by hash: unlike random.shuffle the same on every platform, in every version.
    order = sorted(
        examples, key=lambda e: hashlib.sha256(f"{seed}/{epoch}/{e.uid}".encode()).digest()
    )
    return order[place * n : (place + 1) * n]


# ----------------------------------------------------------------------------------------------------- chat template


def render_prompt(tokenizer, prompt: str, thinking: bool) -> str:
    """The user turn and the opening of the assistant's, as the model's chat template writes them."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )


def encode_prompt(tokenizer, prompt: str, thinking: bool) -> list[int]:
    """Prompt tokens, up to where the policy starts to write."""
    return tokenizer.encode(render_prompt(tokenizer, prompt, thinking), add_special_tokens=False)


def encode_anchor(
    tokenizer, example: Example, thinking: bool, max_response: int
) -> list[int] | None:
    """Response tokens of the human story, EOS included; None when longer than max_response.

    Templates differ in whether the generation prompt opens the block (Qwen3.5: "<think>\\n"; Qwen3: nothing, and an
    empty block when thinking is off). What the rendered prompt ends with decides, so that there is exactly one <think>.
    Prompt and response are tokenised apart, as they are when the policy writes: no token may straddle the border.
    """
    opened = render_prompt(tokenizer, example.prompt, thinking).rstrip().endswith("<think>")
    story = example.story.strip()
    if thinking:
        if not example.reasoning.strip():
            what = 'thinking is on but "reasoning" is empty; add it or turn thinking off'
            raise DataError(f'example "{example.uid}": {what}')
        story = (
            ("" if opened else "<think>\n") + example.reasoning.strip() + "\n</think>\n\n" + story
        )
    elif opened:
        raise DataError(
            "this model's template opens <think> even with enable_thinking=False; turn thinking on"
        )
    ids = tokenizer.encode(story, add_special_tokens=False) + [tokenizer.eos_token_id]
    return ids if len(ids) <= max_response else None


def split_response(text: str, thinking: bool) -> tuple[str, str]:
    """Decoded policy text -> (reasoning, story). With thinking on and the block never closed all is reasoning."""
    if not thinking:
        return "", text.strip()
    reasoning, _, story = text.partition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), story.strip()


# ------------------------------------------------------------------------------------------------------ command line


def histogram(lengths: list[int]) -> str:
    counts = Counter(words // 500 * 500 for words in lengths)
    top = max(counts.values(), default=1)
    return "\n".join(
        f"{low:>6}-{low + 499:<6} {n:>5}  {'#' * -(-40 * n // top)}"
        for low, n in sorted(counts.items())
    )


def check(args) -> None:
    """Print every problem of a file, then what is in it; exit status 1 if there is a problem."""
    examples, problems = read_examples(
        args.file, anchors=not args.prompts_only, thinking=args.thinking
    )
    for problem in problems:
        print(problem)
    stories = [len(example.story.split()) for example in examples if example.story]
    traces = sum(bool(example.reasoning) for example in examples)
    print(f"{len(examples)} good examples, {len(problems)} bad lines", end="; ")
    print(f"{len(stories)} stories, {traces} reasoning traces")
    if stories:
        print(
            f"words of the stories: {min(stories)} to {max(stories)}, mean {sum(stories) / len(stories):.0f}"
        )
        print(histogram(stories))
    if args.tokenizer and examples:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        prompts = [
            len(encode_prompt(tokenizer, e.prompt, args.thinking))
            for e in tqdm(examples, desc="prompts")
        ]
        over = sum(n > args.max_prompt for n in prompts)
        print(f"prompts: up to {max(prompts)} tokens; {over} over {args.max_prompt}")
        told = tqdm([e for e in examples if e.story], desc="anchors")
        if anchors := [len(encode_anchor(tokenizer, e, args.thinking, sys.maxsize)) for e in told]:
            mean, fit = (
                sum(anchors) / len(anchors),
                sum(n <= args.max_response for n in anchors) / len(anchors),
            )
            print(
                f"anchors: {mean:.0f} tokens on average, up to {max(anchors)}; {fit:.1%} fit {args.max_response}"
            )
    if problems or not examples:
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["build"], ["gutenberg"]):
        path = os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        )
        command = [sys.executable, "-m", "corpus.build", *argv]
        sys.exit(subprocess.call(command, env={**os.environ, "PYTHONPATH": path}))
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Stories in: anthologies -> prompt-story pairs for POLARIS."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser(
        "check", help="every problem of a JSONL file, and what is in it", formatter_class=defaults
    )
    c.set_defaults(run=check)
    c.add_argument("file", help="JSONL of examples")
    c.add_argument("--tokenizer", help="folder of a tokenizer with a chat template: count tokens")
    c.add_argument("--thinking", action="store_true", help="anchors need a reasoning trace")
    c.add_argument("--prompts-only", action="store_true", help="stories may be missing")
    c.add_argument("--max-prompt", type=int, default=256, help="limit for prompts, in tokens")
    c.add_argument("--max-response", type=int, default=8192, help="limit for anchors, in tokens")

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
