"""Evaluation: what the paper measures, for any model or file of stories. docs/evaluation.md

    python eval.py story RUN/model "Write about a lantern. The story should be 60 words long."
    python eval.py stories MODEL --prompts test.jsonl --out stories.jsonl
    python eval.py score stories.jsonl --task quality --judge-url https://HOST/v1 --judge-model NAME
    python eval.py length stories.jsonl
    python eval.py elo one.jsonl other.jsonl --judge-url https://HOST/v1 --judge-model NAME
    python eval.py memorise MODEL --data train.jsonl --control BASE
    python eval.py compare stories.quality.json stories.length.json --published
    python eval.py suite RUN
    python eval.py report RUN

A judgement that failed is counted, never a number. Means have 95% intervals over prompts. Nothing
is paid twice: run a command again and it goes on. One without words has a quality of 0, unasked.

Exit status: 0 done; 2 settings or input; 3 the judge failed, or judged under 95% of the
stories; 4 interrupted, it goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from chat import ChatOptions, ChatStop, add_options, options_from
from evals import elo as rating
from evals import files
from evals.compare import compare
from evals.judging import AnswerLog, Asker
from evals.report import report
from evals.score import length, result_path, run_tolerance, score
from evals.storyfile import serve_stories
from evals.tasks import TASKS, Task
from reward import PUBLISHED

SAMPLING = {  # the defaults of rollout.Sampling, and room for thinking and 12,000 words
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "max_new_tokens": 32768,
    "min_p": 0.0,
}
JUDGE = ChatOptions(key_env="JUDGE_API_KEY")

# ------------------------------------------------------------------------------------------ judging


def asker_of(args: argparse.Namespace, task: Task, log: Path) -> Asker:
    options = options_from(vars(args), "judge")
    if not args.dry_run and not (options.url and options.model):
        raise ValueError(f"{args.command} needs --judge-url and --judge-model")
    repeats = getattr(args, "repeats", 1)
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: at least one judgement is needed")
    answers = AnswerLog(log)
    return Asker(options, task.parameters, answers, repeats, task.answer_tokens)


def task_of(args: argparse.Namespace, task: Task) -> Task:
    """The task with the files of the command line in place of ours."""
    template = files.read_template(args.judge_prompt) if args.judge_prompt else None
    if task.name == "pairwise":
        return task.with_files(template)
    criteria = files.read_names(args.criteria) if args.criteria else ()
    lower = files.read_names(args.lower_is_better) if args.lower_is_better else ()
    weights = files.read_weights(args.weights) if args.weights else None
    return task.with_files(template, criteria, lower, weights)


def score_command(args: argparse.Namespace) -> int:
    task = task_of(args, TASKS[args.task])
    path = Path(args.stories)
    asker = asker_of(args, task, result_path(path, "judge", ".jsonl"))
    return score(path, task, asker, prompts=args.prompts, dry_run=args.dry_run)


def elo_command(args: argparse.Namespace) -> int:
    task = task_of(args, rating.PAIRWISE)
    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: give a name that ends with .json")
    asker = asker_of(args, task, out.with_suffix(".judge.jsonl"))
    paths = [Path(path) for path in args.stories]
    return rating.elo(paths, task, asker, out, chars=args.chars, dry_run=args.dry_run)


# ------------------------------------------------------------------------------------------ writing


def stories_command(args: argparse.Namespace) -> int:
    from evals.stories import Sampling, Writer, stories

    given = {name: x for name in SAMPLING if (x := getattr(args, name)) is not None}
    sampling = {**SAMPLING, **given}
    chosen = {"samples": args.samples, "domain": args.domain, "lang": args.lang}
    if not args.url:
        writer = Writer(args.model, args.thinking)
        how = Sampling(**sampling)
        written = stories(writer, args.prompts, args.out, how, args.seed, args.rows, **chosen)
        if written:  # on rank 0
            print(f"{len(written)} stories: {args.out}")
        return 0
    body = {name: sampling[name] for name in ("temperature", "top_p")}
    body["max_tokens"] = sampling["max_new_tokens"]
    # OpenAI's own servers refuse these, others know them: sent where they were asked for
    body |= {n: given[n] for n in ("top_k", "repetition_penalty", "min_p") if n in given}
    options = ChatOptions(args.url, args.model, args.key_env, args.extra, args.rows)
    prompts = files.read_prompts(args.prompts, args.domain, args.lang)
    return serve_stories(options, body, args.seed, prompts, args.out, args.samples)


def story_command(args: argparse.Namespace) -> int:
    from evals.stories import Sampling, Writer, story

    given = {name: x for name in SAMPLING if (x := getattr(args, name)) is not None}
    writer = Writer(args.model, args.thinking)
    sampling = Sampling(**{**SAMPLING, **given})
    story(writer, args.prompt, sampling, args.seed, not args.hide_thinking)
    return 0


def memorise_command(args: argparse.Namespace) -> int:
    from evals.memorise import memorise

    models = {"model": args.model} | ({"control": args.control} if args.control else {})
    data = {"data": args.data} | ({"heldout": args.heldout} if args.heldout else {})
    return memorise(models, data, Path(args.out), rows=args.rows, seed=args.seed)


def suite_command(args: argparse.Namespace) -> int:
    from evals.suite import suite

    return suite(Path(args.run))


def length_command(args: argparse.Namespace) -> int:
    config = run_tolerance(Path(args.run)) if args.run else PUBLISHED
    return length([Path(path) for path in args.stories], config)


def compare_command(args: argparse.Namespace) -> int:
    how = "csv" if args.csv else "markdown" if args.markdown else ""
    return compare(args.results, published=args.published, how=how, strict=args.strict)


def report_command(args: argparse.Namespace) -> int:
    print(report(args.run))
    return 0


# ------------------------------------------------------------------------------------- command line

MODEL = "folder or name of a Hugging Face causal language model"
STORIES = "JSONL of stories: ours, or any with a uid, a prompt and a story in each line"


def command_line() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about)
        added.set_defaults(function=run)
        return added

    story = command("story", story_command, "one story on the terminal, as it is generated")
    story.add_argument("model", help=MODEL)
    length_example = "The story should be 900 words long."
    story.add_argument("prompt", help=f"what to write, with a sentence like: {length_example}")
    story.add_argument("--hide-thinking", action="store_true", help="print the story only")

    stories = command("stories", stories_command, "stories for a file of prompts; resumable")
    add = stories.add_argument
    add("model", help=f"{MODEL}; with --url its name at that server")
    add("--prompts", required=True, help="ours, the authors', or a benchmark's own file")
    add("--out", required=True, help="JSONL of stories to write or complete")
    add("--samples", type=int, default=1, help="stories a prompt [1]")
    add("--rows", type=int, default=16, help="stories written at a time, on each rank [16]")
    add("--domain", default="", help="of WritingBench: its domain1; D4: Literature & Arts")
    add("--lang", default="", help="of WritingBench: lines in this language")
    add("--url", default="", help="OpenAI-style base URL of a server that writes")
    add("--key-env", default="WRITER_API_KEY", help="environment variable of its key")
    add("--extra", default="{}", help="JSON object added to every request to it")
    _writing_options(story)
    _writing_options(stories)

    scores = command("score", score_command, "judge the stories of one model")
    add = scores.add_argument
    add("stories", help=STORIES)
    add("--task", choices=TASKS, default="quality", help="[quality]")
    add("--prompts", default="", help="their prompts, where the stories do not hold them")
    add("--repeats", type=int, default=1, help="judgements of each story [1]")
    add("--criteria", default="", help="file of criteria, one a line, in place of ours")
    add("--lower-is-better", default="", help="file of those where 0 is best")
    add("--weights", default="", help="JSON of {lower-case name: weight}")
    _judging_options(scores)

    lengths = command("length", length_command, "length ratio, error, tolerance, cut-off share")
    lengths.add_argument("stories", nargs="+", help=STORIES)
    lengths.add_argument("--run", default="", help="run whose tolerance counts [the published one]")

    pairs = command("elo", elo_command, "ratings from pairwise comparisons, both orders")
    add = pairs.add_argument
    add("stories", nargs="+", help=STORIES)
    add("--out", default="elo.json", help="result to write [elo.json]")
    add("--chars", type=int, default=0, help="cut both texts here (EQ-Bench: 4000) [whole]")
    _judging_options(pairs)

    audit = command("memorise", memorise_command, "does a model repeat its training stories?")
    add = audit.add_argument
    add("model", help=MODEL)
    add("--data", required=True, help="JSONL that it was trained on")
    add("--control", default="", help="the model before training")
    add("--heldout", default="", help="JSONL of stories that it never saw")
    add("--out", default="memorise.json", help="result to write [memorise.json]")
    add("--rows", type=int, default=100, help="rows drawn of each file [100]")
    add("--seed", type=int, default=3479, help="[3479]")

    table = command("compare", compare_command, "results side by side, with paired differences")
    add = table.add_argument
    add("results", nargs="*", help="JSON that score, length or elo wrote")
    add("--published", action="store_true", help="the paper's rows too, and their arithmetic")
    add("--strict", action="store_true", help="refuse mixed judges, prompts or stories")
    form = table.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true")
    form.add_argument("--markdown", action="store_true")

    whole = command("suite", suite_command, "everything for a miniature, on the stand-in judge")
    whole.add_argument("run", help="folder of a finished miniature")
    page = command("report", report_command, "one self-contained HTML page of a training run")
    page.add_argument("run", help="folder that polaris.py wrote")
    return parser


def _writing_options(parser: argparse.ArgumentParser) -> None:
    derived = "[as the run trained it, else as the chat template allows]"
    add = parser.add_argument
    add("--thinking", action=argparse.BooleanOptionalAction, help=derived)
    add("--seed", type=int, default=3479, help="[3479]")
    for name, default in SAMPLING.items():
        add(f"--{name.replace('_', '-')}", type=type(default), help=f"[{default}]")


def _judging_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--judge-prompt", default="", help="another's judge prompt, e.g. the official file")
    add("--dry-run", action="store_true", help="print calls, tokens and dollars; ask nothing")
    add_options(parser, "judge", JUDGE)


def main(argv: list[str]) -> int:
    args = command_line().parse_args(argv)
    try:
        return args.function(args)
    except (ValueError, OSError, FloatingPointError, ChatStop) as error:
        # what the caller can mend, in one line; all else shows its traceback
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, ChatStop) else 2
    except KeyboardInterrupt:
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
