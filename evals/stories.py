"""Stories out of a model: one on the terminal, or one for each line of a prompt file.

Each story has its own random numbers, from (seed, uid), whatever is written beside it. bf16 on a
GPU, fp32 on a CPU.
"""

import json
import os
import re
import sys
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import data
import ranks
from evals.files import read_prompts
from evals.report import visible
from evals.storyfile import Place, StoryFile
from reward import requested_words, word_count
from rollout import Rollout, Sampling, generate, kernels, row_seed

UNSETTLED = re.compile(r"(\ufffd+|</?t?h?i?n?k?>?)\Z")  # half a character, half a mark


def thinks(model: str, tokenizer: Any) -> bool:
    """Whether to let a model think: as the run trained it, else if its chat template can."""
    run = Path(model).parent / "config.json"  # RUN/model was trained as RUN/config.json says
    if run.is_file() and "thinking" in (config := json.loads(run.read_text(encoding="utf-8"))):
        return config["thinking"]
    on = data.render_prompt(tokenizer, "?", thinking=True)
    off = data.render_prompt(tokenizer, "?", thinking=False)
    return on != off or on.rstrip().endswith("<think>")


class Writer:
    """A model that is asked as its chat template wants it; loaded when it first writes."""

    def __init__(self, model: str, thinking: bool | None = None):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = model
        if not Path(model).is_dir() and (Path(model).is_absolute() or model.count("/") > 1):
            raise ValueError(f"{model}: there is no such folder; give a model that was trained")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{model}: its tokenizer has no chat template; give a chat model")
        self.thinking = thinks(model, self.tokenizer) if thinking is None else thinking

    @cached_property
    def lm(self) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        lm: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        return lm.to(device)

    def write(
        self, prompts: dict[Place, str], sampling: Sampling, seed: int, **more: Any
    ) -> list[Rollout]:
        """One response per {(uid, sample): prompt}; more: arguments of rollout.generate."""
        ids = [data.encode_prompt(self.tokenizer, p, self.thinking) for p in prompts.values()]
        seeds = [row_seed(seed, 0, uid, sample) for uid, sample in prompts]
        return self.go_on(ids, seeds, sampling, **more)

    def go_on(
        self, ids: list[list[int]], seeds: list[int], sampling: Sampling, **more: Any
    ) -> list[Rollout]:
        """What the model writes after these tokens."""
        eos = data.stop_tokens(self.tokenizer, self.lm.generation_config, self.thinking)
        vocab = max(self.tokenizer.get_vocab().values()) + 1
        return generate(self.lm, ids, seeds, sampling, eos, vocab=vocab, **more)

    def read(self, rollout: Rollout) -> tuple[str, str]:
        """(thinking, story) of a response, or of what there is of it."""
        ids = rollout.ids[:-1] if rollout.finished else rollout.ids
        return data.split_response(self.tokenizer.decode(ids), self.thinking)


def put(text: str, stream: TextIO, dim: bool = False) -> None:
    """Print at once; on a terminal without control characters, which could change it."""
    if stream.isatty() and text:
        text = f"\x1b[2m{visible(text)}\x1b[0m" if dim else visible(text)
    print(text, end="", file=stream, flush=True)


def story(writer: Writer, prompt: str, sampling: Sampling, seed: int, show_thinking: bool) -> None:
    """Print a story as it is generated; thinking and facts go to stderr."""
    shown = ("", "")

    def show(thinking: str, text: str) -> None:
        nonlocal shown
        if show_thinking:
            put(thinking[len(shown[0]) :], sys.stderr, dim=True)
            if thinking and text and not shown[1]:
                put("\n\n", sys.stderr)
        put(text[len(shown[1]) :], sys.stdout)
        shown = (thinking, text)

    def on_tokens(rollout: Rollout, new: list[int]) -> None:
        parts = writer.read(rollout)  # from the start: one token is no character
        show(*(UNSETTLED.sub("", part) for part in parts))

    device = writer.lm.device  # loaded before the clock starts
    begin = time.perf_counter()
    [rollout] = writer.write({("", 0): prompt}, sampling, seed, on_tokens=on_tokens)
    speed = len(rollout.ids) / (time.perf_counter() - begin)
    show(*writer.read(rollout))
    asked = requested_words(prompt)
    facts = f"{word_count(shown[1])} words" + (f" of {asked} requested" if asked else "")
    facts += f", {speed:.0f} tokens/s on {device}"
    if not rollout.finished:
        facts += f", cut off after {len(rollout.ids)} tokens"
    if writer.thinking and not shown[1]:
        facts += ": it only thought, try --no-thinking"
    put("\n", sys.stdout)
    put(f"{facts}\n", sys.stderr, dim=True)


def ranks_of() -> tuple[int, int]:
    """This rank and how many there are: as torchrun started them, else one."""
    if "RANK" not in os.environ:
        return 0, 1
    return ranks.join(), dist.get_world_size()


def stories(
    writer: Writer,
    prompts: str,
    out: str,
    sampling: Sampling,
    seed: int,
    rows: int,
    *,
    samples: int = 1,
    domain: str = "",
    lang: str = "",
) -> list[dict]:
    """Stories of each prompt, appended to `out` as each ends; run again, it writes what is missing.

    At the end the file is in the order of the prompts. rows: stories at a time on each rank. Raises
    RecordError for the prompts, and if `out` holds other stories than these.
    """
    rank, world = ranks_of()
    settings = {"model": writer.model, "thinking": writer.thinking, "seed": seed}
    settings |= asdict(sampling)
    wanted = read_prompts(prompts, domain, lang)
    file = StoryFile(out, wanted, samples, settings)
    if rank == 0:
        file.save()
    if world > 1:
        dist.barrier()
    mine = file.waiting[rank::world]
    tokens = 0

    def on_tokens(rollout: Rollout, new: list[int]) -> None:
        nonlocal tokens
        tokens += len(new)
        bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        bar.update(0)

    def on_finish(rollout: Rollout) -> None:
        thinking, text = writer.read(rollout)
        file.add(mine[rollout.row], thinking, text, len(rollout.ids), rollout.finished)
        bar.update()

    if mine:
        if rank == 0:
            print(kernels(writer.lm))
        texts = {place: file.wanted[place].text(place[1]) for place in mine}
        # miniters=0: redrawn by time, also between two stories
        how = dict(unit="story", miniters=0, disable=rank > 0)
        with tqdm(total=len(mine), **how) as bar:
            hooks = dict(on_finish=on_finish, on_tokens=on_tokens)
            writer.write(texts, sampling, seed, max_rows=rows, **hooks)
    if world > 1:
        dist.barrier()
        if rank == 0:
            file.read()
    return file.save() if rank == 0 else []
