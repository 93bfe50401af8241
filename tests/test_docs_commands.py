"""The commands of README.md and docs/ run in miniature: each page in a folder of its own, in the order of the page.

The command is the one of the page. Options that make it small come last, where they override those of the page, and the
runs, recipes and files that a reader would have are there before it starts.
"""

import json
import re
import shlex
import shutil

import pytest
from docs_support import ROOT, blocks, commands, namespace, redirected, run
from train_support import flags, quick_overrides

from evenstep import cli

STEPS = {"train.steps": "6", "train.batch_size": "2", "train.micro_batch_size": "2"}
TUNED = STEPS | {"log.curve": "false", "log.report": "false", "eval.max_new_tokens": "2"}
SMALL = STEPS | {
    "train.seq_len": "16",
    "data.source": "text:notes/*.md",
    "data.vocab_size": "300",
    "data.val_fraction": "0.1",
    "model.size": "tiny",
    "train.threads": "1",
    "eval.every": "0",
    "eval.max_tokens": "100",
    "checkpoint.every": "2",
    "log.every": "1",
    "log.curve": "false",
    "log.report": "false",
    "sample.tokens": "4",
}
"""Options of a run of six steps."""

NOT_RUN = {
    r"pretrain (recipe|RECIPE|spam-130m)\.toml": "a recipe of the reader's; its options are checked with another one",
    r"pretrain .*--lowbit nvfp4": "the run of the recipe above it, with another format",
    r".*--parallel\.mode": "needs torchrun, and several processes",
    r"finetune (\./Llama|\./bert)": "needs the weights of a published model",
    r"export .*--push": "needs an account of the Hugging Face Hub",
    r"watch": "serves a page until it is stopped",
    r"study": "trains for minutes",
    r"stability": "trains for ten minutes; make stability-smoke runs every task",
    r"official (?!--print)": "tests/train/test_official.py runs each published command line",
    r"pretrain .*--optim\.name (galore|lion|torch\.optim)": "needs the packages of the extra peers",
}
"""Commands that only the parser reads, by a pattern of their words, and the reason: the one list of them. The tests of
test_docs_examples.py hold all commands to the program's options."""


def why_not(words):
    text = shlex.join(words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, text)), "")


def small(words):
    """The words of a command, and those that make it small."""
    words = [re.sub(r"@\d+$", "@4", word) for word in words]
    if words[0] == "pretrain":
        if "--resume" in words:
            run_on = "@" not in words[words.index("--resume") + 1]
            return [*words, "--log.curve", "false", *(["--train.steps", "8"] if run_on else [])]
        if "--train.tokens" in words:
            del words[words.index("--train.tokens") : words.index("--train.tokens") + 2]
        own = {"data.source"} if any(word.startswith("text:") for word in words) else set()
        return words + flags([(key, value) for key, value in SMALL.items() if key not in own])
    if words[0] == "finetune":
        steps = {"train.steps": "8"} if "--resume" in words else TUNED
        return words + flags([*steps.items()])
    if words[0] == "rows":
        return [*words[:2], "0-4"]
    return words + {"sweep": ["--dry-run"], "compare": ["--dry-run"], "generate": ["--tokens", "4"]}.get(words[0], [])


PAGES = sorted({page for page, _, words in commands() if not why_not(words)})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, a run and the logs of other trainers."""
    place = tmp_path_factory.mktemp("commands")
    for name in ("notes/a.md", "books/a.txt", "books/more/b.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(
            "".join(f"{i} times {i} is {i * i}, said the river to the stone.\n" for i in range(400))
        )
    pairs = [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(40)]
    (place / "examples.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    losses = [{"step": i, "loss": 4 - i / 20, "learning_rate": 1e-3} for i in range(1, 40)]
    state = place / "output" / "checkpoint-500" / "trainer_state.json"
    table = place / "lightning_logs" / "version_0" / "metrics.csv"
    for path in (state, table):
        path.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": losses}))
    table.write_text("step,train_loss\n" + "".join(f"{row['step']},{row['loss']}\n" for row in losses))
    options = dict(quick_overrides(place / "notes" / "a.md", place / "runs" / "NAME")) | SMALL
    options |= {"data.source": f"text:{place}/notes/*.md", "checkpoint.keep": "3"}
    assert cli.main(["pretrain", *flags([*options.items()])]) == 0
    for other in ("out", "RUN"):  # "out": the folder of the examples of the Trainer
        shutil.copytree(place / "runs" / "NAME", place / other)
    return place


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVENSTEP_CACHE", str(place / "cache"))
    shutil.copytree(place, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for source, _, code in blocks(page) if page == "docs/cookbook.md" else ():
        if "tiny-gpt2" in code:
            run(page, source, code, namespace(page, tmp_path))
    if page == "docs/telemetry.md":
        for other in ("a", "b"):
            shutil.copytree(place / "runs" / "NAME", tmp_path / "runs" / other)
    files = redirected()
    failed = []
    for where, line, words in commands():
        if where != page or why_not(words):
            continue
        capsys.readouterr()
        status = cli.main(small(words))
        out, err = capsys.readouterr()
        if status > ("--fail-on" in words):  # its status 1 is the answer
            failed.append(f"{page}:{line}: {shlex.join(small(words))}: {err.splitlines()[-1:]}")
        if (where, line) in files:
            (tmp_path / files[where, line]).write_text(out)
    assert not failed, "\n".join(failed)


def test_every_reason_has_its_command():
    found = [shlex.join(words) for _, _, words in commands()]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, text) for text in found)] == []
    assert len([words for _, _, words in commands() if not why_not(words)]) > 50
