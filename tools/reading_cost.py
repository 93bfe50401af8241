"""The cost of reading evenstep: ``python tools/reading_cost.py`` prints a Markdown table.

The lines and files that a reader needs for an optimizer step or a training run are those whose functions run in it. A
small step or run is traced, and each file of the package with a function that was called counts whole, with the
``__init__.py`` files above it; a second line counts only the functions that were called. A fused step on a CPU also
counts the C++ files that hold it. CUDA kernels cannot run on every machine, so their files are counted by what they
import. Of a training run only the files of ``train`` and of the root count: the optimizer, the model, the data and the
telemetry are read on their own.
"""

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
PACKAGE = ROOT / "evenstep"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# ---- files that run ----


def called(run: Callable[[], object]) -> dict[Path, set[int]]:
    """The files of the package with a function that ``run`` calls, and the lines of those functions, with their
    docstrings and comments."""
    codes = set()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_name != "<module>":
            codes.add(frame.f_code)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    found: dict[Path, set[int]] = {}
    for code in codes:
        if code.co_filename.startswith(str(PACKAGE)):
            last = max(line for _, _, line in code.co_lines() if line)
            found.setdefault(Path(code.co_filename), set()).update(range(code.co_firstlineno, last + 1))
    return found


def with_parents(files: Iterable[Path]) -> set[Path]:
    """``files``, and the ``__init__.py`` files above them that are not empty."""
    found = set(files)
    parents = {p.parent / "__init__.py" for p in found if p.parent != PACKAGE}
    return found | {p for p in parents if p.stat().st_size}


def a_step(fused: bool | None) -> Callable[[], object]:
    import torch

    from evenstep import StableSPAM

    params = [torch.nn.Parameter(torch.randn(20, 30)), torch.nn.Parameter(torch.randn(20))]

    def run() -> None:
        optimizer = StableSPAM(params, fused=fused)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()

    run()  # imports and checks of a first step are not part of a step
    return run


def included(sources: Iterable[Path]) -> set[Path]:
    """C++ files and every file that they include."""
    found, waiting = set(), list(sources)
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found.add(path)
            waiting += [path.parent / name for name in re.findall(r'#include "(.+?)"', path.read_text())]
    return found


def a_run(command_line: bool) -> Callable[[], object]:
    from train_support import flags, quick, quick_overrides, write_corpus

    from evenstep.cli import main
    from evenstep.train.trainer import Run

    place = Path(tempfile.mkdtemp())
    corpus = write_corpus(place / "corpus.jsonl")
    given = {"checkpoint__every": "2", "eval__every": "2", "train__steps": "4", "log__curve": "true"}
    quietly = Run(quick(corpus, place / "first", **given), say=lambda _: None)  # prepares the tokens
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        quietly.fit()

    def run() -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if command_line:
                main(["pretrain", *flags(quick_overrides(corpus, place / "second", **given))])
            else:
                Run(quick(corpus, place / "third", **given), say=lambda _: None).fit()

    return run


def of_training(files: set[Path]) -> set[Path]:
    return {path for path in files if path.parent in (PACKAGE, PACKAGE / "train")}


# ---- imports ----


def modules() -> dict[str, Path]:
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(PACKAGE.rglob("*.py"))
    }


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, including imports for types only."""
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                deeper = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (deeper & known.keys()) or {node.module}
        found[name] = (names & known.keys()) - {name}
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    sys.setrecursionlimit(10000)
    for name in graph:
        if name not in index:
            visit(name)
    return found


def reached(graph: dict[str, set[str]], known: dict[str, Path], start: Iterable[str]) -> set[Path]:
    found, waiting = set(), list(start)
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting += graph[name]
    return {known[name] for name in found if lines(known[name])}


# ---- comments ----


def comment_share(folders: Iterable[str]) -> float:
    """Comment lines per 100 lines. A line with code and a comment counts; docstrings do not."""
    comments = total = 0
    for folder in folders:
        for path in sorted((PACKAGE / folder).rglob("*")):
            if path.suffix == ".py":
                source = path.read_text(encoding="utf-8")
                tokens = tokenize.generate_tokens(io.StringIO(source).readline)
                comments += len({t.start[0] for t in tokens if t.type == tokenize.COMMENT and "noqa" not in t.string})
            elif path.suffix in (".cpp", ".h"):
                comments += sum("//" in line for line in path.read_text().splitlines())
            else:
                continue
            total += lines(path)
    return 100 * comments / max(total, 1)


def code_lines(patterns: Iterable[str]) -> int:
    files = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return sum(lines(ROOT / name) for name in files.stdout.split("\n") if name.endswith((".py", ".cpp", ".h", ".js")))


def main() -> None:
    known = modules()
    graph = imports(known)
    users = {name: {other for other, used in graph.items() if name in used} for name in known}
    entries = ("__init__", "__main__", "cli", "commands")
    lonely = [name for name in known if len(users[name]) <= 1 and known[name].stem not in entries]

    def cost(files: set[Path]) -> str:
        return f"{sum(map(lines, files)):,} in {len(files)}"

    def functions(found: dict[Path, set[int]], files: set[Path]) -> str:
        return f"{sum(len(found[path]) for path in files & found.keys()):,}"

    kernels = PACKAGE / "kernels"
    plain_lines, fused_lines = called(a_step(False)), called(a_step(None))
    run_lines = called(a_run(False))
    plain = with_parents(plain_lines)
    fused = with_parents(fused_lines) | included(kernels.glob("cpu.cpp"))
    cuda = plain | reached(
        {name: {x for x in used if x.startswith("evenstep.kernels")} for name, used in graph.items()},
        known,
        ["evenstep.kernels.cuda"],
    )
    rows = [
        ("one StableSPAM step, plain: lines and files", cost(plain)),
        ("of these, lines of the functions that run", functions(plain_lines, plain)),
        ("the same, fused on a CPU (C++ included)", cost(fused)),
        ("of these, lines of the Python functions that run", functions(fused_lines, fused)),
        ("the same, fused on CUDA", cost(cuda)),
        ("a training run, from a configuration object", cost(of_training(with_parents(run_lines)))),
        ("of these, lines of the functions that run", functions(run_lines, of_training(set(run_lines)))),
        ("the same, from the command line", cost(of_training(with_parents(called(a_run(True)))))),
        ("lines of Python, C++ and JavaScript in the wheel", f"{code_lines(['evenstep']):,}"),
        ("in the repository's lab", f"{code_lines(['lab', 'benchmarks']):,}"),
        ("in the tests", f"{code_lines(['tests']):,}"),
        ("import cycles", str(len(cycles(graph)))),
        ("modules with at most one importer", f"{len(lonely)} of {len(known)}"),
        (
            "comment lines per 100 lines of optim, transforms, kernels, lowbit",
            f"{comment_share(f for f in ('optim', 'transforms', 'kernels', 'lowbit') if (PACKAGE / f).exists()):.1f}",
        ),
    ]
    print("| | |\n|---|---|")
    for what, value in rows:
        print(f"| {what} | {value} |")
    if "--verbose" in sys.argv:
        print("\ncycles:", *cycles(graph), sep="\n  ")
        print("\nat most one importer:", *(f"{name} ({lines(known[name])})" for name in lonely), sep="\n  ")
        for title, files in (("plain", plain), ("fused", fused), ("cuda", cuda)):
            print(f"\n{title}:", *(f"{path.relative_to(ROOT)} ({lines(path)})" for path in sorted(files)), sep="\n  ")


if __name__ == "__main__":
    main()
