"""Every knob of a run with its line of help, presets, and the checks before anything is written or paid for."""

import argparse
import importlib.util
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from reward import RewardConfig
from rollout import Sampling


class ConfigError(ValueError):
    """A setting that cannot work. The message names the option and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the defaults are the published run, MINI is what the miniature changes
# ----------------------------------------------------------------------------------------------------------------------


def opt(default, text: str, free: bool = False):
    """A field with its line of help. `free`: may differ when a run is resumed, since it does not change the numbers."""
    return field(default=default, metadata={"help": text, "free": free})


@dataclass(frozen=True)
class Config(RewardConfig):
    """Every knob of a run. The reward's constants come first, inherited from judge.RewardConfig."""

    preset: str = opt("mini", "mini: the offline miniature | paper: the published run")
    # model and data
    model: str = opt(
        "Qwen/Qwen3.5-9B", "Hugging Face model, name or directory; '' makes the miniature's own"
    )
    data: str = opt(
        "", "JSONL of prompt–story pairs (see data.py); '' writes the miniature's fables"
    )
    eval_data: str = opt(
        "", "JSONL of held-out prompts for validation; '' none (mini: held out from --data)"
    )
    thinking: bool = opt(True, "chat template with thinking; anchors then need a reasoning trace")
    max_prompt: int = opt(256, "tokens; longer prompts are dropped")
    # run
    out: str = opt("", "run directory; '' is runs/PRESET-DATE-TIME", free=True)
    resume: bool = opt(False, "go on from the newest checkpoint in --out", free=True)
    seed: int = opt(3479, "everything random derives from it")
    steps: int = opt(0, "training steps; 0 is one epoch", free=True)
    save_every: int = opt(5, "steps between checkpoints", free=True)
    keep: int = opt(2, "newest checkpoints to keep (of a 9B model, 108 GB each)", free=True)
    eval_every: int = opt(
        20, "steps between validations; before and after training there is always one"
    )
    device: str = opt(
        "auto",
        "auto: a GPU for each rank where there are enough, else the CPU | cpu | cuda",
        free=True,
    )
    tracker: str = opt(
        "none", "none | wandb | tensorboard: where metrics go besides metrics.jsonl", free=True
    )
    # groups and anchors
    prompts: int = opt(8, "prompts per step")
    group: int = opt(6, "rows per prompt, the anchor included")
    anchor: bool = opt(True, "human-reference injection; without it all rows are policy rollouts")
    anchor_peak: float = opt(0.4, "weight of the anchor's advantage after the warm-up")
    anchor_warmup: int = opt(15, "steps over which that weight rises from 0")
    anchor_decay: int = opt(0, "steps over which it then falls to --anchor-final; 0: it stays")
    anchor_final: float = opt(0.0, "weight after the decay")
    anchor_shape: str = opt("linear", "linear | cosine decay")
    anchor_std_floor: float = opt(
        0.05, "least spread that an anchor is measured with; 0: the bare formula"
    )
    anchor_cap: bool = opt(
        True, "clamp the weighted anchor advantage to what the best of K rollouts could have"
    )
    # sampling
    temperature: float = opt(1.0, "of sampling")
    top_p: float = opt(0.95, "nucleus, inside the top k")
    top_k: int = opt(20, "most likely tokens kept; 0: all")
    repetition_penalty: float = opt(1.10, "on tokens the row already holds; 1: none")
    # optimiser
    lr: float = opt(1e-6, "AdamW, constant")
    beta1: float = opt(0.9, "AdamW")
    beta2: float = opt(0.999, "AdamW")
    weight_decay: float = opt(0.01, "AdamW")
    grad_clip: float = opt(1.0, "largest gradient norm")
    recompute: bool = opt(
        True, "keep only each layer's input for the backward pass and compute the rest again"
    )
    micro_tokens: int = opt(
        16384, "padded tokens per forward pass of a rank (always at least one row)"
    )
    # judge
    judge_url: str = opt(
        "",
        "OpenAI-style base URL, e.g. http://localhost:8000/v1; mini: '' starts the offline judge",
        free=True,
    )
    judge_model: str = opt("gemini-3-flash-preview", "name of the judge model")
    judge_key_env: str = opt("JUDGE_API_KEY", "environment variable with the API key", free=True)
    judge_extra: str = opt(
        '{"temperature": 0.2, "top_p": 0.9, "max_tokens": 65536, "reasoning_effort": "medium", "service_tier": "flex"}',
        "JSON added to every judge request",
    )
    judge_concurrency: int = opt(16, "requests in flight per rank", free=True)
    judge_rpm: int = opt(0, "requests per minute and rank; 0: no limit", free=True)
    judge_timeout: float = opt(600.0, "seconds per request, all told", free=True)
    judge_retries: int = opt(4, "tries after the first", free=True)
    judge_price_in: float = opt(0.0, "dollars per million prompt tokens", free=True)
    judge_price_out: float = opt(0.0, "dollars per million answer tokens", free=True)
    max_judge_failures: float = opt(
        0.5, "share of a step's stories; above it the run saves and stops", free=True
    )
    # supervised warm start: the same update with every row an anchor of advantage 1
    warm_steps: int = opt(
        0, "supervised steps before reinforcement learning (mini: on misleading lengths)"
    )
    warm_rows: int = opt(16, "stories per supervised step")
    warm_lr: float = opt(3e-3, "AdamW, falling linearly to a tenth")
    eval_prompts: int = opt(
        40, "mini: prompts held out, at most a fifth; each is asked at 1x, 2x and 3x"
    )


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
    max_response=0,
    # the reward's absolute constants, scaled from 1,000–4,000 words to 25–60
    min_target=5,
    blank_words=5,
    len_below_min=3,
    len_above_min=5,
    overlong_buffer=16,
)
PRESETS = {"mini": MINI, "paper": {}}


def parse(argv: list[str]) -> Config:
    """Command line → Config: the preset's values, then what was given. Unknown options end the program with usage."""
    parser = argparse.ArgumentParser(
        prog="polaris.py",
        usage="polaris.py [--preset mini|paper] [--OPTION VALUE ...]     (--help lists all options)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), type(f.default)
        about = f.metadata.get("help", "constant of the reward, see judge.RewardConfig")
        text = f"{about} [{f.default!r}" + (f"; mini {MINI[f.name]!r}]" if f.name in MINI else "]")
        options = dict(default=MISSING, help=text.replace("%", "%%"))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            choices = list(PRESETS) if f.name == "preset" else None
            parser.add_argument(
                flag, type=kind, metavar=kind.__name__.upper(), choices=choices, **options
            )
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not MISSING}
    base = PRESETS[given.get("preset", "mini")]
    if given.get("resume"):
        base = saved_config(given)
    cfg = Config(**base | given)
    check(cfg)
    return cfg


def saved_config(given: dict) -> dict:
    """The configuration of the run to resume. What was `given` anew may differ only where it changes no number."""
    path = Path(given.get("out", "")) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"--resume: {path} does not exist; name the directory of an earlier run with --out"
        )
    saved = json.loads(path.read_text())
    free = {f.name for f in fields(Config) if f.metadata.get("free")}
    if other := [name for name in given if name not in free and saved.get(name) != given[name]]:
        changes = ", ".join(
            f"{name} {saved.get(name)!r} there and {given[name]!r} here" for name in other
        )
        raise ConfigError(
            f"{path} is of another configuration ({changes}): leave these options out, or start a new run"
        )
    return saved


def check(cfg: Config) -> None:
    """Refuse what cannot work, before anything is written or paid for."""
    for name, choices in {
        "device": ("auto", "cpu", "cuda"),
        "tracker": ("none", "wandb", "tensorboard"),
        "anchor_shape": ("linear", "cosine"),
    }.items():
        if getattr(cfg, name) not in choices:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(cfg, name)!r}: choose from {', '.join(choices)}"
            )
    if cfg.tracker != "none" and not importlib.util.find_spec(cfg.tracker):
        raise ConfigError(
            f"--tracker {cfg.tracker}: the package is not here; pip install {cfg.tracker}"
        )
    for f in fields(cfg):
        if (
            isinstance(value := getattr(cfg, f.name), int | float) and not value >= 0
        ):  # NaN is not either
            raise ConfigError(
                f"--{f.name.replace('_', '-')} {value}: must be a number, and not below 0"
            )
    try:
        Sampling(cfg.temperature, cfg.top_p, cfg.top_k, cfg.repetition_penalty)
    except ValueError as e:
        raise ConfigError(f"sampling {e}") from None
    for name in (
        "prompts",
        "save_every",
        "keep",
        "micro_tokens",
        "warm_rows",
        "judge_concurrency",
        "eval_prompts",
    ):
        if getattr(cfg, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least 1"
            )
    if cfg.group < (3 if cfg.anchor else 2):
        raise ConfigError(
            f"--group {cfg.group}: a group needs two policy rollouts for its statistics, besides its anchor"
        )
    if not cfg.resume and cfg.out and Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
        raise ConfigError(
            f"--out {cfg.out} is not empty: add --resume to go on with that run, or choose another"
        )
    try:
        extra = json.loads(cfg.judge_extra)
    except json.JSONDecodeError as e:
        raise ConfigError(
            f"--judge-extra is no JSON ({e}): give an object such as '{{\"temperature\": 0.2}}'"
        ) from None
    if not isinstance(extra, dict):
        raise ConfigError("--judge-extra must be a JSON object, such as '{\"temperature\": 0.2}'")
    if cfg.model and not cfg.data:
        raise ConfigError(
            "--data is missing: a JSONL of prompts and human stories. "
            "Make one from any anthology with `python data.py build BOOK.txt … --out train.jsonl`"
        )
    if cfg.preset == "paper" and not cfg.judge_url:
        raise ConfigError(
            "--judge-url is missing: an OpenAI-style endpoint of the judge, with its key in the environment variable "
            f"{cfg.judge_key_env} (README, 'Judges', has a recipe per provider)"
        )
    for name in ("data", "eval_data"):
        if (path := getattr(cfg, name)) and not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: there is no such file")
