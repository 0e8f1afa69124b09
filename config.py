"""Every knob of a run with its line of help, in the order of a step; presets; checks.

The defaults are the published run (arXiv 2606.04095), so `--preset paper` changes none of them;
`--preset mini` is the offline miniature. A run keeps its settings in config.json, flat, under the
names of the options.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from chat import ChatOptions
from reward import RewardConfig
from rollout import Sampling


class ConfigError(ValueError):
    """A setting that cannot work. The message names the option and what to do."""


def knob(default: Any, text: str, *, choices: tuple[str, ...] = (), may_change: bool = False):
    """A field with its line of help. may_change: on resume, since it does not affect results."""
    return field(default=default, metadata=dict(help=text, choices=choices, may_change=may_change))


JUDGE_EXTRA = (
    '{"temperature": 0.2, "top_p": 0.9, "max_tokens": 65536, '
    '"reasoning_effort": "medium", "service_tier": "flex"}'
)


@dataclass(frozen=True)
class Config:
    """Every knob of a run; those of the judges and `reward` stand in chat.py and reward.py."""

    # run
    preset: str = knob(
        "mini", "mini: the offline miniature | paper: the published run", choices=("mini", "paper")
    )
    out: str = knob("", "run directory; '' is runs/PRESET-DATE-TIME", may_change=True)
    resume: bool = knob(False, "go on from the newest checkpoint in --out", may_change=True)
    seed: int = knob(3479, "everything random derives from it")
    steps: int = knob(0, "training steps; 0: one epoch", may_change=True)
    save_every: int = knob(5, "steps between checkpoints", may_change=True)
    keep: int = knob(
        2, "newest checkpoints to keep, beside the best (at 9B, 108 GB each)", may_change=True
    )
    device: str = knob(
        "auto",
        "auto: a GPU for each rank where there are enough, else the CPU",
        choices=("auto", "cpu", "cuda"),
        may_change=True,
    )
    stop_on_collapse: bool = knob(
        False, "stop where a run falls apart (health.py)", may_change=True
    )
    rank_patience: float = knob(1800.0, "seconds without progress of a rank", may_change=True)
    tracker: str = knob(
        "none",
        "where metrics go besides metrics.jsonl",
        choices=("none", "wandb", "tensorboard"),
        may_change=True,
    )

    # model and data
    model: str = knob("Qwen/Qwen3.5-9B", "name or directory; '': the miniature's own")
    data: str = knob("", "JSONL of prompt–story pairs (data.py); '': the miniature's fables")
    prompts: int = knob(8, "prompts per step")
    max_prompt: int = knob(256, "tokens; longer prompts are dropped")
    thinking: bool = knob(True, "chat template with thinking; anchors need a reasoning trace")

    # groups and anchors
    group: int = knob(6, "rows per prompt, the anchor included")
    anchor: bool = knob(True, "human-reference injection; without it every row is a rollout")
    anchor_peak: float = knob(0.4, "weight of the anchor's advantage after the warm-up")
    anchor_warmup: int = knob(15, "steps over which that weight rises from 0")
    anchor_decay: int = knob(0, "steps of its fall to --anchor-final; 0: none (as in the paper)")
    anchor_final: float = knob(0.0, "weight after the decay, which only the release's code has")
    anchor_shape: str = knob("linear", "of the decay", choices=("linear", "cosine"))
    anchor_std_floor: float = knob(
        0.05, "lower bound on the group's std in the anchor's advantage; 0: the paper's formula"
    )
    anchor_cap: bool = knob(
        True, "clamp the anchor's advantage to ±(K−1)/√K, the largest a rollout can get"
    )

    # rollouts
    temperature: float = knob(1.0, "of sampling, and of what is trained")
    top_p: float = knob(0.95, "nucleus, inside the top k; 1: off")
    top_k: int = knob(20, "most likely tokens kept; 0: all")
    repetition_penalty: float = knob(1.10, "on tokens already in prompt or response; 1: off")

    # judge
    judge: ChatOptions = ChatOptions(
        model="gemini-3-flash-preview", key_env="JUDGE_API_KEY", extra=JUDGE_EXTRA
    )
    max_judge_failures: float = knob(
        0.5, "share of a step's stories; above it the run saves and stops", may_change=True
    )

    # reward
    reward: RewardConfig = RewardConfig()

    # update
    lr: float = knob(1e-6, "learning rate of AdamW, constant")
    beta1: float = knob(0.9, "AdamW: decay of the gradient's mean")
    beta2: float = knob(0.999, "AdamW: decay of the gradient's square")
    weight_decay: float = knob(0.01, "AdamW")
    grad_clip: float = knob(1.0, "largest gradient norm")
    recompute: bool = knob(True, "keep only each layer's input and compute the rest again")
    micro_tokens: int = knob(16384, "padded tokens per forward pass of a rank (at least one row)")

    # supervised warm start
    warm_steps: int = knob(0, "supervised steps before the first (mini: on misleading lengths)")
    warm_rows: int = knob(16, "stories per supervised step")
    warm_lr: float = knob(3e-3, "learning rate, falling linearly to a tenth")

    # validation
    eval_data: str = knob("", "JSONL of held-out prompts; '': none (mini: held out of --data)")
    eval_every: int = knob(20, "steps between validations; one before and one after are certain")
    eval_prompts: int = knob(40, "mini: prompts held out of --data, each used at 1×, 2×, 3× length")

    # second judge
    eval_judge: ChatOptions = ChatOptions(key_env="EVAL_JUDGE_API_KEY")


# The groups of --help, each by its first field.
GROUPS = {
    "preset": "run",
    "model": "model and data",
    "group": "groups and anchors",
    "temperature": "rollouts",
    "judge": "judge (any server that speaks OpenAI's chat completions)",
    "reward": "reward",
    "lr": "update",
    "warm_steps": "supervised warm start",
    "eval_data": "validation",
    "eval_judge": "second judge, which scores the validations too (none without its URL)",
}

MINI = dict(
    model="",
    thinking=False,
    seed=0,
    steps=40,
    save_every=20,
    eval_every=0,
    repetition_penalty=1.0,
    anchor_warmup=5,
    lr=2e-4,
    beta2=0.95,
    recompute=False,
    micro_tokens=8192,
    judge_model="offline",
    judge_extra="{}",
    judge_timeout=30.0,
    warm_steps=160,
    # The reward's absolute constants, scaled from 1,000–4,000 words to 25–60.
    max_response=0,  # 0: half as long again as the longest anchor
    min_target=5,
    blank_words=5,
    len_below_min=3,
    len_above_min=5,
    overlong_buffer=16,
)
PRESETS = {"mini": MINI, "paper": {}}


# What a run killed in its first seconds leaves: a new one may take its place.
BEGUN = {
    "lock",
    "ranks",
    "bill.json",
    "status.json",
    "run.log",
    "start",
    ".start.tmp",
    "verdicts.sqlite",
}


# What polaris.py does besides training; it looks for these before it reads the options of a run.
INSTEAD = {
    "--status": ("RUN", "print where a run is"),
    "--plan": (None, "print what the run of these options would hold, take and cost"),
    "--card-gb": ("GIB", "with --plan: of a GPU [the one that is here]"),
    "--ranks": ("N", "with --plan: ranks [torchrun's, or 4]"),
    "--export": ("CHECKPOINT", "write the model of RUN/checkpoints/step-N to the new folder --out"),
}


@dataclass(frozen=True)
class Option:
    """A knob as the command line and config.json know it."""

    name: str
    default: Any
    group: str
    help: str
    choices: tuple[str, ...] = ()
    may_change: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options() -> Iterator[Option]:
    """All knobs, flat: of a judge as judge_url or eval_judge_url, …, of `reward` by their names."""
    group = ""
    for f in fields(Config):
        group = GROUPS.get(f.name, group)
        if f.name in ("judge", "eval_judge"):
            for part in fields(ChatOptions):
                default = getattr(f.default, part.name)
                may_change = part.name not in ("model", "extra")  # which decide what it answers
                name = f"{f.name}_{part.name}"
                yield Option(name, default, group, part.metadata["help"], (), may_change)
        elif f.name == "reward":
            for part in fields(RewardConfig):
                yield Option(part.name, part.default, group, part.metadata["help"])
        else:
            yield Option(f.name, f.default, group, **f.metadata)


def flatten(cfg: Config) -> dict[str, Any]:
    """Option name → value, as in config.json."""
    flat = asdict(cfg)
    for judge in ("judge", "eval_judge"):
        flat |= {f"{judge}_{name}": value for name, value in flat.pop(judge).items()}
    return flat.pop("reward") | flat


def unflatten(values: dict[str, Any]) -> Config:
    """The Config with these values under option names, and its defaults otherwise."""
    known = {o.name: values.get(o.name, o.default) for o in options()}
    reward = RewardConfig(**{f.name: known.pop(f.name) for f in fields(RewardConfig)})
    judges: dict[str, Any] = {
        judge: ChatOptions(**{f.name: known.pop(f"{judge}_{f.name}") for f in fields(ChatOptions)})
        for judge in ("judge", "eval_judge")
    }
    return Config(**known, **judges, reward=reward)


def parse(argv: list[str], complete: bool = True) -> Config:
    """Command line → Config: the preset's values, then what was given; checked if `complete`.

    Unknown options end the program with its usage; ConfigError for settings that cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="polaris",
        usage="polaris.py [--preset mini|paper] [--OPTION VALUE ...]     (--help: all options)",
        description="Train a model to write stories. A default of the miniature stands after '|'.",
        argument_default=argparse.SUPPRESS,  # only what was given comes back
        allow_abbrev=False,
    )
    instead = parser.add_argument_group("instead of a run")
    for flag, (metavar, text) in INSTEAD.items():
        instead.add_argument(flag, nargs="?", metavar=metavar, help=text)
    groups: dict[str, Any] = {}
    for o in options():
        if o.group not in groups:
            groups[o.group] = parser.add_argument_group(o.group)
        mini = f" | {MINI[o.name]!r}" if o.name in MINI else ""
        text = f"{o.help} [{o.default!r}{mini}]".replace("%", "%%")
        add = groups[o.group].add_argument
        if isinstance(o.default, bool):
            add(o.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = type(o.default)
            add(
                o.flag,
                type=kind,
                metavar=kind.__name__.upper(),
                choices=o.choices or None,
                help=text,
            )
    given = vars(parser.parse_args(argv))
    if stray := [flag for flag in INSTEAD if flag.strip("-").replace("-", "_") in given]:
        parser.error(f"{stray[0]} does not go with these options")
    if given.get("model") and not given.get("resume") and "preset" not in given:
        raise ConfigError(
            f"--model {given['model']}: name the preset, too: --preset paper for a real model "
            "(the default, mini, has the learning rates and the judge of the miniature)"
        )
    base = saved_values(given) if given.get("resume") else PRESETS[given.get("preset", "mini")]
    cfg = unflatten(base | given)
    if complete:
        check(cfg)
    return cfg


def saved_values(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run to resume. `given` anew may only be what does not affect results."""
    path = Path(given.get("out", "")) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"--resume: {path} does not exist; name the directory of an earlier run with --out"
        )
    try:
        saved = dict(json.loads(path.read_text()).items())
        extra = sorted(set(saved) - {o.name for o in options()} - {"fingerprint", "resumed"})
    except (ValueError, AttributeError) as e:
        raise ConfigError(f"{path} is broken ({e}): bring it back, or start a new run") from None
    if extra:
        raise ConfigError(
            f"{path} has the option {extra[0]!r}, which this version does not know: go on with the "
            "version that wrote it, or start a new run"
        )
    may_change = {o.name for o in options() if o.may_change}
    changed = [n for n in given if n not in may_change and saved.get(n) != given[n]]
    if changed:
        listed = ", ".join(f"{n} {saved.get(n)!r} there and {given[n]!r} here" for n in changed)
        raise ConfigError(
            f"{path} is of another configuration ({listed}): leave these options out, "
            "or start a new run"
        )
    return saved


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is written or paid for."""
    if cfg.tracker != "none" and not importlib.util.find_spec(cfg.tracker):
        raise ConfigError(
            f"--tracker {cfg.tracker}: the package is not here; pip install {cfg.tracker}"
        )
    values = flatten(cfg)
    at_least_1 = "prompts save_every keep micro_tokens warm_rows eval_prompts"
    at_least_1 += " judge_concurrency eval_judge_concurrency"
    for o in options():
        value = values[o.name]
        if isinstance(value, int | float) and not value >= 0:  # NaN is not either
            raise ConfigError(f"{o.flag} {value}: must be a number, and not below 0")
        if o.name in at_least_1.split() and value < 1:
            raise ConfigError(f"{o.flag} {value}: must be at least 1")
    try:
        Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.repetition_penalty)
    except ValueError as e:
        raise ConfigError(f"sampling {e}") from None
    if cfg.temperature == 0:
        raise ConfigError("--temperature 0: greedy text has nothing to learn from; take 1")
    try:
        cfg.judge.check("judge")
        cfg.eval_judge.check("eval-judge")
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if cfg.group < (3 if cfg.anchor else 2):
        raise ConfigError(
            f"--group {cfg.group}: a group needs two rollouts for its statistics, "
            "besides its anchor"
        )
    out = Path(cfg.out)
    if cfg.out and not cfg.resume and out.exists() and {p.name for p in out.iterdir()} - BEGUN:
        raise ConfigError(
            f"--out {out} is not empty: add --resume to go on with that run, or choose another"
        )
    if cfg.model and not cfg.data:
        raise ConfigError(
            "--data is missing: a JSONL of prompts and human stories. Make one from any anthology "
            "with `python data.py build BOOK.txt … --out train.jsonl`"
        )
    if bool(cfg.eval_judge.url) != bool(cfg.eval_judge.model):
        raise ConfigError("a second judge needs both --eval-judge-url and --eval-judge-model")
    if cfg.preset == "paper" and not cfg.judge.url:
        raise ConfigError(
            "--judge-url is missing: an OpenAI-style endpoint of the judge, with its key in the "
            f"environment variable {cfg.judge.key_env} (docs/judges.md has a recipe per provider)"
        )
    for flag, path in (("--data", cfg.data), ("--eval-data", cfg.eval_data)):
        if path and not Path(path).is_file():
            raise ConfigError(f"{flag} {path}: there is no such file")
