"""The house: floors of imports, pieces that work when copied, documents that say what is there."""

import ast
import contextlib
import difflib
import functools
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS, ROOMS, LEAVES = 2, 1, 0
FLOORS = {
    **dict.fromkeys("polaris eval walkthrough bench corpus".split(), PROGRAMS),
    **dict.fromkeys("config data rollout rows judge policy plan evals mini".split(), ROOMS),
    **dict.fromkeys("ranks watch log health rundir checkpoint start".split(), ROOMS),
    **dict.fromkeys("reward chat grpo decode".split(), LEAVES),
}
PIECES = {  # what README.md calls copyable: a piece, and all files that it takes
    "reward": ["reward.py"],
    "chat": ["chat.py"],
    "grpo": ["grpo.py"],
    "decode": ["decode.py"],
    "rollout": ["rollout.py", "decode.py"],
    "policy": ["policy.py", "grpo.py"],
    "data": ["data.py", "reward.py"],
    "judge": ["judge.py", "chat.py", "reward.py"],
}
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all Python that is neither a test nor a tool of docs/."""
    files = [
        *ROOT.glob("*.py"),
        *(p for d in ("corpus", "evals", "mini") for p in ROOT.glob(f"{d}/**/*.py")),
    ]
    names = {p: p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(name: str, tree: ast.AST, known: dict[str, Path]) -> dict[str, list[ast.AST]]:
    """Our modules that `name` imports, anywhere in it -> the statements that do so."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
            wanted = [w if w in known else base for w in wanted]
        else:
            continue
        for w in wanted:
            while w and w not in known:  # `import a.b.name`: the module is what exists of it
                w = w.rpartition(".")[0]
            if w and w != name:
                found.setdefault(w, []).append(node)
    return found


@functools.cache
def graph() -> dict[str, dict[str, list[ast.AST]]]:
    known = modules()
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in known.items()}
    return {name: imports(name, tree, known) for name, tree in trees.items()}


def floor(name: str) -> int:
    root = name.partition(".")[0]
    assert root in FLOORS, (
        f"{root} has no floor: add it here, and to the tables of README and CONTRIBUTING"
    )
    return FLOORS[root]


# ----------------------------------------------------------------------------------------- imports


def test_no_import_points_up_and_leaves_import_none_of_ours():
    up = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if floor(other) > floor(name) or floor(name) == LEAVES
    ]
    assert not up, up


def test_imports_go_in_no_circle():
    def path(name: str, seen: tuple[str, ...]) -> tuple[str, ...]:
        """Names from the first of `seen` back to it; () where no way leads there."""
        for other in graph()[name]:
            if other == seen[0]:
                return (*seen, other)
            if other not in visited:
                visited.add(other)
                if way := path(other, (*seen, other)):
                    return way
        return ()

    for name in graph():
        visited: set[str] = set()
        way = path(name, (name,))
        assert not way, " -> ".join(way)


def test_no_function_imports_a_module_of_ours_but_where_pytorch_can_wait():
    late = []
    for name, path in modules().items():
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                late += [f"{name}: {other}" for other in imports(name, function, modules())]
    heavy = ["eval: evals.stories", "eval: evals.memorise", "eval: evals.suite"]
    assert sorted(set(late)) == sorted(heavy), late


# ------------------------------------------------------------------------------------------- pieces


def lone(folder: Path, files: list[str], *command: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND` in a folder that holds these files and nothing else of ours."""
    for file in files:
        (folder / file).write_bytes((ROOT / file).read_bytes())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return subprocess.run([sys.executable, *command], **options)


def test_readme_names_the_files_of_every_piece():
    rows = re.findall(r"^\|[^|]+\|((?: `\w+\.py`)+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [re.findall(r"\w+\.py", row) for row in rows] == [*PIECES.values()]


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_a_copied_piece_can_be_imported_and_its_examples_run(piece, tmp_path):
    code = f"import doctest, sys, {piece}; sys.exit(doctest.testmod({piece}).failed)"
    run = lone(tmp_path, PIECES[piece], "-c", code)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", [p for p in PIECES if "__main__" in (ROOT / f"{p}.py").read_text()]
)
def test_a_copied_program_shows_its_help(piece, tmp_path):
    run = lone(tmp_path, PIECES[piece], f"{piece}.py", "--help")
    assert run.returncode == 0 and "usage" in run.stdout, run.stderr


@pytest.mark.parametrize(
    "command", ["judge.py check", "judge.py serve", "data.py build BOOK.txt", "data.py gutenberg"]
)
def test_a_copied_program_says_in_one_line_what_is_missing(command, tmp_path):
    program, *arguments = command.split()
    run = lone(tmp_path, PIECES[program.removesuffix(".py")], program, *arguments)
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "mini/" in run.stderr or "corpus/" in run.stderr


def test_reading_data_loads_neither_a_client_nor_the_splitter():
    code = "import data, sys; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "reward" in loaded, run.stderr
    assert not loaded & {"requests", "urllib3", "corpus", "torch", "transformers", "judge", "chat"}


# --------------------------------------------------------------------------------------- documents


def text(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def code(document: str) -> list[str]:
    """The lines of a document's code blocks, comments aside, and its inline code."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text(document), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text(document), flags=re.M | re.S)
    return [re.split(r"(?:^|\s)#", line)[0] for line in lines] + re.findall(r"`([^`\n]+)`", prose)


@functools.cache
def help_of(program: str, command: str = "") -> str:
    """What `python PROGRAM COMMAND --help` prints."""
    elsewhere = {  # commands that hand over: another program answers --help for them
        ("data.py", "build"): "corpus/build.py",
        ("data.py", "gutenberg"): "corpus/build.py",
        ("judge.py", "serve"): "mini/standin.py",
    }
    file = elsewhere.get((program, command), program)
    arguments = [*filter(None, [command if file != "mini/standin.py" else ""]), "--help"]
    if file == "polaris.py":  # it joins a process group first: in a process of its own
        return subprocess.run(
            [sys.executable, file, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [file, *arguments])
        patch.syspath_prepend(str(ROOT))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / file), run_name="__main__")
    assert not end.value.code, f"python {file} {' '.join(arguments)}: exit status {end.value.code}"
    return out.getvalue()


def commands_of(program: str) -> list[str]:
    """The commands that a program's --help lists; none for one without."""
    listed = help_of(program).partition("\npositional arguments:\n")[2].partition("\n\n")[0]
    return re.findall(r"^    ([a-z]+)(?:  |$)", listed, re.M)


def options_in(words: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", words))


def test_the_readme_is_short():
    assert len(text("README.md").splitlines()) <= 160


def test_every_file_and_name_in_the_documents_exists():
    lost = []
    suffixes = ("py", "md", "txt", "json", "jsonl", "sqlite")
    for document in [*DOCUMENTS, "docs/walkthrough.txt"]:
        words = text(document)
        links = re.findall(r"\]\(([^)#]+)\)", words)
        places = [(ROOT / document).parent / link for link in links if "://" not in link]
        lost += [f"{document}: {place}" for place in places if not place.exists()]
        files = re.findall(r"(?<![\w./:-])([\w./-]+\.(?:py|sh|md|toml|cff|svg))\b", words)
        here = [(ROOT / document).parent / file for file in files]
        lost += [
            f"{document}: {file}"
            for file, beside in zip(files, here, strict=True)
            if not ((ROOT / file).exists() or beside.exists() or file == "OUT.md")
        ]
        for module, name in re.findall(r"\b([a-z]+)\.([A-Za-z]\w+)", words):
            file = ROOT / f"{module}.py"
            if file.exists() and name not in suffixes and not defines(file, name):
                lost.append(f"{document}: {module}.{name}")
    assert not lost, lost


def defines(file: Path, name: str) -> bool:
    body = ast.parse(file.read_text("utf-8")).body
    values = [ast.unparse(t) for n in body if isinstance(n, ast.Assign) for t in n.targets]
    return name in values or any(getattr(n, "name", "") == name for n in body)


@pytest.mark.slow
def test_every_command_and_option_in_the_documents_exists():
    programs = ["polaris.py", "eval.py", "judge.py", "data.py", "bench.py"]
    everything = "".join(
        help_of(program, command) for program in programs for command in ["", *commands_of(program)]
    )
    wrong = []
    for document in DOCUMENTS:
        for line in code(document):
            call = re.match(r"\s*(?:python |bash |torchrun .*)?(\w+\.(?:py|sh))(?: (.*))?$", line)
            if not call:
                options = options_in(line) if line.startswith("--") else set()
                wrong += [f"{document}: {o}" for o in options if o not in options_in(everything)]
                continue
            program = call[1].replace("train.sh", "polaris.py")
            arguments = call[2] or ""
            word = re.match(r"[a-z]*(?![\w./])", arguments)
            command = word[0] if word else ""
            if program not in programs or not arguments:
                continue
            if commands_of(program) and command not in [*commands_of(program), ""]:
                wrong.append(f"{document}: {program} {arguments}")
                continue
            known = options_in(help_of(program, command if commands_of(program) else ""))
            strange = options_in(re.sub(r"'[^']*'", "", arguments)) - known - {"--help"}
            wrong += [f"{document}: {program} {command} {option}" for option in strange]
    assert not wrong, wrong


def test_no_line_of_code_is_over_100_columns():
    files = [p for p in ROOT.glob("**/*.py") if not {".venv", "runs"} & set(p.parts)]
    wide = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert files and not wide, wide


# --------------------------------------------------------------------------------- the walkthrough


@pytest.mark.slow
def test_the_walkthrough_prints_what_the_documents_show():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "walkthrough.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    number = r"-?\d+\.\d+"
    shown, printed = text("docs/walkthrough.txt"), run.stdout
    shapes = [re.sub(rf" *{number}", " #", words).splitlines() for words in (shown, printed)]
    assert shapes[0] == shapes[1], "\n".join(difflib.unified_diff(*shapes, lineterm=""))
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    far = [pair for pair in pairs if abs(float(pair[0]) - float(pair[1])) > 1e-3]
    assert not far, far


def test_the_walkthrough_teaches_what_the_recipe_says():
    rows = re.findall(r"^(rollout \d|anchor) +(.*)$", text("docs/walkthrough.txt"), re.M)
    tables = [dict(rows[i : i + 6]) for i in range(0, len(rows), 6)]
    advantages = next(t for t in tables if len(t["anchor"].split()) == 3 and "." in t["anchor"])
    for name, row in advantages.items():
        without, ours, inside = map(float, row.split())
        if name == "anchor":
            assert without == 0.0 < ours
        elif name == "rollout 5":  # without a verdict
            assert without == ours == inside == 0.0
        else:
            assert without == ours, "the anchor changed an advantage of a rollout"
            assert inside < ours, "inside the statistics it would push rollouts down"
    norms = re.findall(r"gradient norm of the \w+ +([\d.]+)", text("docs/walkthrough.txt"))
    assert len(norms) == 3 and all(float(norm) > 0.1 for norm in norms)
