"""Stories in: examples, the chat template, anchors.

An example is a line of JSON:  {"uid", "prompt", "target_words", "story", "reasoning", "source"}.
With human-reference injection (arXiv 2606.04095) its story is the *anchor* of the prompt's group, a
teacher-forced row
    prompt tokens | reasoning </think> story EOS
as the model's own chat template would write it, so that the policy could have sampled it. The
length target is the N of the prompt's "N words long", else target_words, in runs of non-space. The
paper's 1,388 pairs cannot be shared; `build` makes such pairs from any anthology, by our method.

    python data.py gutenberg --out books/                 85 public-domain anthologies
    python data.py build books/*.txt --out train.jsonl    (--help: prompts by an LLM, a test set)
    python data.py pairs wp.csv --prompt PROMPT --story STORY       pairs that you have
    python data.py check train.jsonl [--tokenizer DIR --thinking]
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward import requested_words

# ---------------------------------------------------------------------------------------- examples


class DataError(ValueError):
    """Input that cannot be used. The message says where (file:line), what is wrong, what to do."""


@dataclass(frozen=True)
class Example:
    uid: str
    prompt: str
    target_words: int  # requested length of the story, in words
    story: str = ""  # the human story: the anchor
    reasoning: str = ""  # the plan inside the anchor's <think> block
    source: str = ""


TEXTS = ("uid", "prompt", "story", "reasoning", "source")
HINTS = {  # what to do where a field is missing
    "story": "add it, or train without anchors (--no-anchor)",
    "reasoning": "thinking is on: add one (`data.py build --prompts llm`) or turn it off",
}
# Control tokens of a chat template: in the data they would end the turn or open a second block.
MARKUP = re.compile(r"</?think>|<\|[\w ]+\|>")


def parse_example(line: str, anchors: bool, thinking: bool) -> Example:
    """One line of JSON -> Example. ValueError with what is wrong and what to do, not where."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        how = "every line must hold one JSON object, see `data.py check`"
        raise ValueError(f"broken JSON ({error}); {how}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")

    row = {field: value for field, value in row.items() if value is not None}
    required = ["uid", "prompt"]
    if anchors:
        required += ["story", "reasoning"] if thinking else ["story"]
    for field in required:
        if field not in row:
            raise ValueError(f'field "{field}" is missing; {HINTS.get(field, "add it")}')
    texts = {name: row[name] for name in TEXTS if name in row}
    for field, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f'"{field}" must be text, this is {text!r:.40}; put it in quotes')
        markup = MARKUP.search(text)
        if markup and field not in ("uid", "source"):
            what = f"contains {markup[0]}, which the chat template writes itself; remove it"
            raise ValueError(f'"{field}" {what}')
        if field in required and not text.strip():
            raise ValueError(f'"{field}" is empty; fill it in or remove the line')

    asked = requested_words(row["prompt"])
    target = row.get("target_words", asked)
    if isinstance(target, float) and target.is_integer():
        target = int(target)
    if target is None:
        how = 'end it with "The story should be 1500 words long." or add "target_words": 1500'
        raise ValueError(f"the prompt asks for no length and there is no target_words; {how}")
    if type(target) is not int or target < 1:
        raise ValueError(f'"target_words" must be a whole number above 0, this is {target!r:.40}')
    if asked not in (None, target):
        what = f'the prompt asks for {asked} words but "target_words" is {target}'
        raise ValueError(f"{what}; make them agree")
    return Example(target_words=target, **texts)


def read_examples(
    path: str | Path, anchors: bool, thinking: bool
) -> tuple[list[Example], list[str]]:
    """The good examples of a JSONL file, and "file:line: what; what to do" of each bad line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        how = "give a JSONL file, e.g. from `python data.py build`"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {how}") from None
    examples, problems = [], []
    first_line: dict[str, int] = {}  # of each uid
    for number, data in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            example = parse_example(data.decode("utf-8"), anchors, thinking)
            first = first_line.setdefault(example.uid, number)
            if first != number:
                what = f'uid "{example.uid}" is used by line {first} too'
                raise ValueError(f"{what}; make it unique")
            examples.append(example)
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.start}); convert the file to UTF-8"
            problems.append(f"{path}:{number}: {what}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if not examples and not problems:
        problems.append(f"{path}:1: the file holds no example; write one JSON object a line")
    return examples, problems


def load(path: str | Path, *, anchors: bool = True, thinking: bool = False) -> list[Example]:
    """Examples of a JSONL file; anchors need stories, and with thinking reasoning too.

    DataError for the first bad line says how many more there are.
    """
    examples, problems = read_examples(path, anchors, thinking)
    if problems:
        first, *others = problems
        more = f"\n({len(others)} more: `python data.py check {path}` lists them)"
        raise DataError(first + (more if others else ""))
    return examples


def step_examples(examples: list[Example], seed: int, step: int, n: int) -> list[Example]:
    """The n examples of a training step, counted from 1.

    A pure function of its arguments: a resumed run sees what it would have seen. Every epoch is a
    fresh permutation; its last len(examples) % n examples are skipped: a step across two epochs
    could contain one prompt twice.
    """
    epoch, place = divmod(step - 1, len(examples) // n)

    def rank(example: Example) -> bytes:  # unlike random.shuffle the same in every version
        return hashlib.sha256(f"{seed}/{epoch}/{example.uid}".encode()).digest()

    return sorted(examples, key=rank)[place * n : (place + 1) * n]


# ----------------------------------------------------------------------------------- chat template


def render_prompt(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """The user's turn and the opening of the assistant's, as the model's template writes them."""
    if not tokenizer.chat_template:
        how = "take the instruction-tuned model, or set the tokenizer's chat_template"
        raise DataError(f"the model's tokenizer has no chat template; {how}")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def encode_prompt(tokenizer: Any, prompt: str, thinking: bool) -> list[int]:
    """Prompt tokens, up to where the policy starts to write."""
    return tokenizer.encode(render_prompt(tokenizer, prompt, thinking), add_special_tokens=False)


def turn_end(tokenizer: Any, thinking: bool) -> list[int]:
    """The tokens with which the template ends the assistant's turn; the last is a special one.

    That is what generation stops at. It need not be the tokenizer's EOS, which is the answer only
    where the template ends with no special token. DataError where there is neither.
    """
    said = "The end of a story."
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=thinking)
    _, found, tail = text.rpartition(said)
    ids = tokenizer.encode(tail, add_special_tokens=False) if found else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    for n, token in enumerate(ids, 1):
        if token in special:
            return ids[:n]
    if tokenizer.eos_token_id is None:
        how = "set the tokenizer's eos_token, or end the assistant's turn with a special token"
        raise DataError(f"neither the chat template nor the tokenizer ends a turn; {how}")
    return [tokenizer.eos_token_id]


def stop_tokens(tokenizer: Any, settings: Any, thinking: bool) -> set[int]:
    """What ends a response: the template's token, the tokenizer's EOS, the generation settings'."""
    also = settings.eos_token_id
    ids = {turn_end(tokenizer, thinking)[-1], tokenizer.eos_token_id}
    return {*ids, *(also if isinstance(also, list) else [also])} - {None}


def encode_anchor(
    tokenizer: Any, example: Example, thinking: bool, max_response: int
) -> list[int] | None:
    """Response tokens of the human story, end of turn included; None if longer than max_response.

    Some templates open the block in the generation prompt (Qwen3.5), others leave it to the model
    (Qwen3): what the prompt ends with decides, so that there is exactly one <think>. Prompt and
    response are tokenised apart, as when the policy writes: no token may straddle the border.
    DataError without reasoning to think, or where thinking cannot be off.
    """
    opened = render_prompt(tokenizer, example.prompt, thinking).rstrip().endswith("<think>")
    response = example.story.strip()
    if thinking:
        reasoning = example.reasoning.strip()
        if not reasoning:
            what = 'thinking is on but "reasoning" is empty; add it or turn thinking off'
            raise DataError(f'example "{example.uid}": {what}')
        response = f"{reasoning}\n</think>\n\n{response}"
        if not opened:
            response = f"<think>\n{response}"
    elif opened:
        what = "this model's template opens <think> even with enable_thinking=False"
        raise DataError(f"{what}; turn thinking on")
    ids = tokenizer.encode(response, add_special_tokens=False) + turn_end(tokenizer, thinking)
    return ids if len(ids) <= max_response else None


def check_anchor(tokenizer: Any, example: Example, thinking: bool) -> list[int]:
    """The anchor's tokens. DataError if they do not read as the story that they were made from."""
    ids = encode_anchor(tokenizer, example, thinking, sys.maxsize) or []
    text = tokenizer.decode(ids[: -len(turn_end(tokenizer, thinking))])
    reasoning, story = split_response(text, thinking)
    for got, wanted in ((story, example.story), (reasoning, example.reasoning if thinking else "")):
        if got.split() != wanted.split():
            what = f"the tokenizer gives {wanted.strip()!r:.60} back as {got!r:.60}"
            raise DataError(f'example "{example.uid}": {what}; take a model that knows its letters')
    return ids


def split_response(text: str, thinking: bool) -> tuple[str, str]:
    """Decoded policy text -> (reasoning, story). An unclosed block is all reasoning."""
    if not thinking:
        return "", text.strip()
    reasoning, _, story = text.partition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), story.strip()


# ------------------------------------------------------------------------------------ command line


COMMANDS = {
    "gutenberg": "download anthologies, or fables, from Project Gutenberg",
    "build": "split books into prompt–story pairs",
    "pairs": "read pairs that you have: tables, lists, chats",
    "check": "every problem of a JSONL file, what is in it, and what would spoil training",
}


def hand_over(argv: list[str]) -> int:
    """Run a command, which corpus/ holds, as a program; print what it prints; its exit status."""
    here = Path(__file__).parent
    if not (here / "corpus").is_dir():
        raise DataError(f"`data.py {argv[0]}` needs the folder corpus/ beside data.py; copy it too")
    # `python -m corpus.build` would first look for our modules in the current folder.
    start = f"import sys; sys.path[0] = {str(here)!r}; from corpus.build import main; main()"
    command = [sys.executable, "-u", "-c", start, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as program:
        for line in program.stdout or []:
            print(line, end="", flush=True)
    return program.returncode


def main(argv: list[str] | None = None) -> None:
    """Exit status: 0 done; 2 settings or input; 3 the LLM of `build` failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description="Prompt–story pairs for POLARIS.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    if argv[:1] not in [[name] for name in COMMANDS]:
        parser.parse_args(argv)
    try:
        status = hand_over(argv)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    if status or "--help" in argv:
        sys.exit(status)


if __name__ == "__main__":
    main()
