"""A file of stories that is written one story at a time: killed, it goes on where it stopped."""

import dataclasses
import json
import os
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chat import Answer, Chat, ChatOptions
from evals.files import Prompt, strip_thinking
from reward import word_count
from rundir import RecordError, read_jsonl, write_jsonl

Place = tuple[str, int]  # uid and sample


def append_line(path: Path, record: dict) -> None:
    """One line in one write, so that several processes may append to a file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(record) + "\n").encode())
    finally:
        os.close(file)


class StoryFile:
    """The stories of `prompts`, `samples` of each, written with `settings`."""

    def __init__(self, out: str | Path, prompts: list[Prompt], samples: int, settings: dict):
        self.path = Path(out)
        self.settings = settings
        if samples < 1:
            raise ValueError(f"--samples {samples}: at least one story a prompt is needed")
        for prompt in prompts:
            if prompt.seeds and samples > len(prompt.seeds):
                what = f"--samples {samples}: prompt {prompt.uid!r} has {len(prompt.seeds)} seeds"
                raise ValueError(f"{what}, one a sample")
        self.wanted = {(prompt.uid, i): prompt for prompt in prompts for i in range(samples)}
        self.read()

    def read(self) -> None:
        """What the file holds; RecordError where it holds other stories than these."""
        found = read_jsonl(self.path, "uid prompt settings")[0] if self.path.exists() else []
        self.done = {(record["uid"], record.get("sample", 0)): record for record in found}
        for place, record in self.done.items():
            prompt = self.wanted.get(place)
            same = prompt is not None and prompt.prompt == record["prompt"]
            if not same or record["settings"] != self.settings:
                raise RecordError(
                    f"{self.path}: story {place[0]!r} comes from another prompt file, model, seed "
                    "or sampling; give another --out, or the same arguments to go on"
                )

    @property
    def waiting(self) -> list[Place]:
        return [place for place in self.wanted if place not in self.done]

    def add(self, place: Place, thinking: str, story: str, tokens: int, finished: bool) -> None:
        prompt = self.wanted[place]
        seed = {"seed_modifier": prompt.seeds[place[1]]} if prompt.seeds else {}
        self.done[place] = {
            "uid": prompt.uid,
            "sample": place[1],
            "prompt": prompt.prompt,
            "target_words": prompt.target_words,
            **prompt.more,
            **seed,
            "thinking": thinking,
            "story": story,
            "words": word_count(story),
            "tokens": tokens,
            "finished": finished,
            "settings": self.settings,
        }
        append_line(self.path, self.done[place])

    def save(self) -> list[dict]:
        """The file in the order of the prompts, without a half-written last line."""
        records = [self.done[place] for place in self.wanted if place in self.done]
        write_jsonl(self.path, records)
        return records


def serve_stories(
    options: ChatOptions, sampling: dict[str, Any], seed: int, prompts: list[Prompt], out: str,
    samples: int,
) -> int:  # fmt: skip
    """Stories from a server of OpenAI's chat completions -> exit status 0, or 3 if some failed.

    sampling: fields of the request. A story that the server cut off counts as failed.
    """
    settings = {"model": options.model, "seed": seed, **sampling, **options.extra_body}
    file = StoryFile(out, prompts, samples, settings)
    file.save()
    missing = file.waiting
    clients = {}
    for sample in sorted({sample for _, sample in missing}):
        extra = json.dumps({**sampling, "seed": seed + sample, **options.extra_body})
        clients[sample] = dataclasses.replace(options, extra=extra).open(Chat)
    errors = []
    try:
        futures: dict[Future[Answer], Place] = {}
        for place in missing:
            text = file.wanted[place].text(place[1])
            messages = [{"role": "user", "content": text}]
            futures[clients[place[1]].request(messages)] = place
        for future in tqdm(as_completed(futures), total=len(futures), unit="story"):
            answer = future.result()
            if answer.value is None:
                errors.append(answer.error)
                continue
            story = strip_thinking(answer.value)
            thinking = answer.value.removesuffix(story).strip()
            thinking = thinking.removeprefix("<think>").removesuffix("</think>").strip()
            file.add(futures[future], thinking, story, answer.usage[1], True)
    finally:
        for client in clients.values():
            client.close()
    records = file.save()
    print(f"{len(records)}/{len(file.wanted)} stories: {out}")
    for error in sorted(set(errors)):
        print(f"  {errors.count(error)} failed: {error}")
    return 3 if errors else 0
