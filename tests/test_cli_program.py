import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from train_support import flags, quick_overrides, write_corpus

from evenstep import __version__, cli
from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.train.config import Config, options
from evenstep.train.config_io import load_config
from evenstep.train.optimizers import try_optimizer

ROOT = Path(__file__).parents[1]


def program(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "evenstep", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def call(capsys, *words):
    """The program in this process: exit status, stdout, stderr."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    return status, out, err


def test_version_and_help(capsys):
    assert call(capsys, "--version") == (0, f"evenstep {__version__}\n", "")
    status, out, _ = call(capsys, "--help")
    assert status == 0 and "examples:" in out and "pretrain" in out and "completion" in out
    assert call(capsys)[1] == out


def test_pretrain_help_shows_every_option_in_its_group(capsys):
    status, out, _ = call(capsys, "pretrain", "--help")
    assert status == 0
    for key in options():
        assert f"--{key} " in out, key
    assert "[optim]" in out and "default: 0.001" in out and "examples:" in out
    assert "(pre | post | mix)" in out and "--optim.gamma1 VALUE" in out and "stable_spam 1000, spam 500" in out


def parsers():
    """(words, parser) of the program, its commands and their subcommands."""
    found = [([], cli.build_parser()[0])]
    for words, parser in found:
        for action in parser._actions:
            for name, each in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
                found.append(([*words, name], each))
    return found


@pytest.mark.parametrize("width", [80, 120])
def test_every_help_fits_the_terminal_and_has_what_a_manual_page_has(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    texts = {" ".join(words): (parser, parser.format_help()) for words, parser in parsers()}
    assert len(texts) > 22
    for name, (parser, text) in texts.items():
        assert [line for line in text.splitlines() if len(line) > width] == [], name
        assert text.startswith("usage: ") and "exit status:" in text, name
        if " " not in name:  # the examples of a group of commands are those of the group
            assert parser.description and "examples:" in text, name
    for name in ("", "pretrain", "finetune", "sweep", "compare"):
        assert "EVENSTEP_CACHE" in texts[name][1], name


def test_a_wide_example_is_a_command_that_a_shell_continues():
    from evenstep.help import HelpFormatter

    text = "one\ntwo\n\nexamples:\n  evenstep pretrain --out x --seed 5    what it does\n"
    drawn = HelpFormatter("evenstep", width=30)._fill_text(text, 30, "").splitlines()
    assert drawn == [
        "one two",
        "",
        "examples:",
        "  evenstep pretrain --out x \\",
        "      --seed 5",
        "      # what it does",
    ]


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["runs", "/"], ["completion", "bash"]])
def test_quick_commands_do_not_load_torch_or_any_extra(words):
    blocked = "torch matplotlib rich tokenizers safetensors numpy transformers".split()  # noqa: SIM905
    blocked += ["shtab"] if words[0] != "completion" else []
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it now fails
from evenstep.cli import main
sys.exit(main({words!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "shell, word",
    [("bash", "--train.batch_size"), ("zsh", "--train.batch_size"), ("tcsh", "pretrain"), ("fish", "train.dtype")],
)
def test_completion(capsys, shell, word):
    status, out, _ = call(capsys, "completion", shell)
    assert status == 0 and word in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(capsys, tmp_path):
    (tmp_path / "completion").write_text(call(capsys, "completion", "bash")[1])

    def complete(*words):
        typed = " ".join(f"'{word}'" for word in words)
        script = f"""source {tmp_path}/completion; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
            $(complete -p evenstep | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("evenstep", "pre") == ["pretrain"]
    assert complete("evenstep", "pretrain", "--train.st") == ["--train.steps"]
    assert complete("evenstep", "pretrain", "--train.dtype", "bf16-") == ["bf16-autocast"]
    assert complete("evenstep", "pretrain", "--optim.name", "st") == ["stable_spam"]
    assert complete("evenstep", "pretrain", "--model.size", "6") == ["60m"]
    assert complete("evenstep", "pretrain", "--model.norm", "p") == ["pre", "post"]
    assert complete("evenstep", "pretrain", "--optim.gam") == ["--optim.gamma1", "--optim.gamma2", "--optim.gamma3"]
    assert complete("evenstep", "pretrain", "--optim.variant", "o") == ["official"]


def test_print_config_is_a_recipe(capsys, tmp_path):
    words = ["--train.steps=7", "--optim.betas", "0.9,0.95", "--compile", "--seed", "3"]
    status, out, _ = call(capsys, "pretrain", *words, "--print-config")
    tables = tomllib.loads(out)
    assert status == 0 and tables["seed"] == 3 and tables["optim"]["betas"] == [0.9, 0.95]
    assert tables["train"]["steps"] == 7 and tables["train"]["compile"] is True
    (tmp_path / "again.toml").write_text(out)
    assert tomllib.loads(call(capsys, "pretrain", tmp_path / "again.toml", "--print-config")[1]) == tables | {
        "name": "again"
    }


def test_an_optimizers_option_before_the_recipe_is_no_recipe(capsys, tmp_path):
    (tmp_path / "r.toml").write_text("[train]\nsteps = 3\n")
    _, out, _ = call(capsys, "pretrain", "--optim.gamma1", "0.5", tmp_path / "r.toml", "--print-config")
    assert tomllib.loads(out)["optim"]["gamma1"] == 0.5 and tomllib.loads(out)["train"]["steps"] == 3


BAD = [
    (["pretrain", "--trian.steps", "5"], ["trian.steps", "did you mean 'train.steps'"]),
    (["pretrain", "--sede", "5"], ["--sede", "did you mean '--seed'"]),
    (["pretrain", "--optim.lr", "-1"], ["optim.lr", "-1", "above 0"]),
    (["pretrain", "--optim.gamma1"], ["optim.gamma1", "expected one argument"]),
    (["pretrain", "--optim.gamma1", "--out", "x"], ["optim.gamma1", "expected one argument"]),
    (["pretrain", "--optim.update_proj_gap", "--out", "x"], ["optim.update_proj_gap", "has no value"]),
    (["runs", "--resume"], ["'--resume'", "see evenstep runs --help"]),
    (["pretrain", "--bogus"], ["'--bogus'; see evenstep pretrain --help"]),
    (["generate", "{tmp}", "--seed", "99999999999999999999"], ["--seed", "at most"]),
    (["generate", "{tmp}", "--tokens", "0"], ["--tokens", "at least 1"]),
    (["pretrain", "--train.steps"], ["--train.steps", "expected one argument"]),
    (["pretrain", "--optim.name", "stable-spam"], ["stable-spam", "did you mean 'stable_spam'"]),
    (["pretrain", "--optim.gama1", "0.5"], ["optim.gama1", "did you mean 'gamma1'"]),
    (["pretrain", "--model.size", "60mm"], ["60mm", "'60m'"]),
    (["pretrain", "--model.init", "{tmp}/no"], ["model.init", "{tmp}/no"]),
    (["pretrain", "nosuch.toml"], ["nosuch.toml", "no such file"]),
    (["pretrain", "--resume"], ["--resume", "names no run"]),
    (["pretrain", "--resume", "{tmp}"], ["{tmp}", "not a run"]),
    (["finetune", "--resume", "{tmp}/no"], ["{tmp}/no", "not a run"]),
    (["pretrain", "--data.source", "text:{tmp}/none-*.txt"], ["none-*.txt"]),
    (["generate", "{tmp}/nowhere"], ["nowhere", "no such directory"]),
    (["generate", "{tmp}"], ["{tmp}", "no checkpoint"]),
    (["generate", "{tmp}", "--temperature", "-1"], ["temperature", "-1", "at least 0"]),
    (["runs", "{tmp}/nowhere"], ["nowhere", "no such directory"]),
    (["pretend"], ["pretend", "pretrain"]),
    (["completion", "cmd"], ["cmd", "bash"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.mark.parametrize("words, expected", BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_a_mistake_is_one_line_and_a_status(capsys, monkeypatch, tmp_path, corpus, words, expected):
    monkeypatch.setenv("EVENSTEP_CACHE", str(corpus.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    places = {"tmp": tmp_path, "corpus": corpus}
    status, out, err = call(capsys, *[word.format(**places) for word in words])
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.startswith("evenstep: ")]
    assert len(lines) == 1 and lines[0].startswith("evenstep: error: ") and out == ""
    assert all(word.format(**places) in lines[0] for word in expected), lines[0]
    assert not (tmp_path / "runs").exists()


REFUSED_CONFIG = [
    (["--optim.gamma2", "0.5", "--optim.name", "adamw"], ["optim.gamma2: adamw has no such hyperparameter"]),
    (["--optim.betas", "7"], ["optim: stable_spam refuses its options"]),
    (["--optim.before", "nonsense"], ["nonsense"]),
    (["--model.init", "{tmp}/no"], ["model.init", "no directory"]),
    (["--resume", "{tmp}/no"], ["not a run"]),
    (["--data.source", "text:{tmp}/*.none"], ["no file matches"]),
    (["--data.source", "shards:{tmp}/none"], ["data.source", "no directory"]),
    (["--data.tokenizer", "{tmp}/none.json"], ["no tokenizer at"]),
    (["--model.config", "{tmp}/none.json"], ["none.json"]),
    (["--out", __file__], ["is not an empty directory"]),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", REFUSED_CONFIG, ids=[words[0] for words, _ in REFUSED_CONFIG])
def test_print_config_refuses_what_the_run_would(capsys, tmp_path, words, expected):
    words = [word.format(tmp=tmp_path) for word in words]
    status, out, err = call(capsys, "pretrain", *words, "--print-config")
    assert (status, out) == (2, "") and all(word in err for word in expected), err


def test_print_config_says_what_this_machine_lacks(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = call(capsys, "pretrain", "--train.device", "cuda", "--print-config")
    assert status == 0 and tomllib.loads(out)["train"]["device"] == "cuda" and "torch sees no GPU" in err
    monkeypatch.setattr("evenstep.train.hardware.memory_limit", lambda: 10**6)
    status, out, err = call(capsys, "pretrain", "--data.source", "stdlib", "--train.device", "cpu", "--print-config")
    assert status == 0 and "[data]" in out and "GB of memory, the machine has 0.0 GB" in err


def test_print_config_takes_the_size_of_the_vocabulary_from_the_tokenizer(capsys, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"model_type": "llama", "vocab_size": 300, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    train_bpe(iter(["abc bcd cde " * 50]), 280, exact=False).save(tmp_path)
    options = ["--model.size", "none", "--model.config", str(tmp_path / "config.json"), "--train.device", "cpu"]
    given = ["--data.tokenizer", str(tmp_path)]
    status, out, err = call(capsys, "pretrain", *options, *given, "--data.source", "stdlib", "--print-config")
    assert (status, err) == (0, "") and "[model]" in out
    status, out, err = call(capsys, "pretrain", *options, "--data.source", "stdlib", "--print-config")
    assert status == 0 and "[model]" in out and "would be refused on this machine: the tokenizer has 4096" in err


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.toml")))
def test_any_recipe_takes_another_optimizer(recipe):
    """Options of the former optimizer are left out, and named in one line."""
    kind = FineTuneConfig if recipe.startswith("finetune") else Config
    for name in ("adamw", "scale", "spam", "stable_spam", "muon"):
        config = load_config(ROOT / "recipes" / recipe, [("optim.name", name)], kind)
        assert config.optim.name == name
        try_optimizer(config.optim)


PAGE = (ROOT / "docs/comparisons.md").read_text().replace("\\\n", " ")
COMMANDS = [line.strip() for line in PAGE.splitlines() if "--optim.name" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_on_comparisons_are_valid(capsys, monkeypatch, command):
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(command)
    status, out, err = call(capsys, *words, "--print-config")
    assert status == 0 and "gamma1 =" not in out and "does not have: gamma1, gamma2" in err, err


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for its memory")
@pytest.mark.parametrize(
    "options", [{"model__size": "7b"}, {"train__batch_size": "1000", "model__size": "100m"}], ids=["model", "batch"]
)
def test_a_run_that_memory_cannot_hold_is_refused_before_it_is_built(capsys, tmp_path, corpus, monkeypatch, options):
    monkeypatch.setattr("evenstep.train.task.memory_limit", lambda: 3 * 10**9)
    status, _, err = call(capsys, "pretrain", *flags(quick_overrides(corpus, tmp_path / "run", **options)))
    assert status == 2 and "the run needs at least" in err and "the machine has 3.0 GB" in err
    assert err.splitlines()[-1].startswith("evenstep: error: ") and not (tmp_path / "run").exists()


def test_debug_shows_the_stack_trace(tmp_path):
    done = program("pretrain", tmp_path / "nosuch.toml", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "EvenstepError" in done.stderr
    assert "Traceback" not in program("pretrain", tmp_path / "nosuch.toml").stderr


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, _, err = call(capsys, "completion", "bash")
    assert status == 2 and "pip install 'evenstep[train]'" in err


def test_debug_may_stand_before_the_command(capsys, tmp_path):
    assert call(capsys, "--debug", "runs", tmp_path)[0] == 0
    with pytest.raises(EvenstepError):
        cli.main(["--debug", "pretrain", "--optim.update_proj_gap", "5", str(tmp_path / "no.toml")])


def test_a_bare_boolean_is_true(capsys):
    out = call(capsys, "pretrain", "--train.compile", "--seed", "1", "--print-config")[1]
    assert tomllib.loads(out)["train"]["compile"] is True


def test_a_closed_stdout_is_no_error(tmp_path):
    command = f"'{sys.executable}' -m evenstep runs '{tmp_path}' >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_extra_names_what_to_install():
    assert cli.explain(ModuleNotFoundError("No module named 'rich'", name="rich"))[0] == (
        "error: the package rich is not installed; pip install 'evenstep[train]'"
    )


def test_unexpected_problems_and_full_disks_are_one_line_too():
    message, status = cli.explain(OSError(28, "No space left on device"))
    assert status == 1 and "No space left on device" in message and "\n" not in message
    assert "\n" not in cli.explain(RuntimeError("a\nb\nc"))[0]


def test_train_list_generate_resume(capsys, tmp_path, corpus):
    """The whole way of a user, through the program's own door."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    out = tmp_path / "runs" / "first"
    words = flags(quick_overrides(corpus, out, optim__name="stable_spam"))
    status, text, err = call(capsys, "pretrain", *words)
    assert status == 0, err
    assert text.count("\nstep ") + text.startswith("step ") == 8 + 2  # one line a log step, one a validation
    assert f"evenstep generate {out}" in text and "validation loss" in text and f"evenstep report {out}" in text
    head = text.partition("step 1/8")[0].splitlines()
    head = [line for line in head if not line.startswith("matrix products")]  # advice on a CPU that is fast in bf16
    assert [line.split()[0] for line in head] == [
        "model",
        "optimizer",
        "data",
        "budget",
        "device",
        "folder",
        "time",
        "columns",
    ]
    assert "tiny" in head[0] and "stable_spam" in head[1] and str(corpus) in head[2] and "8 steps" in head[3]

    assert call(capsys, "pretrain", *words)[2].startswith(f"evenstep: error: {out} already has a run")

    status, text, _ = call(capsys, "runs", tmp_path / "runs")
    head, row = text.splitlines()
    assert head.split() == ["name", "when", "size", "optimizer", "steps", "val", "loss", "status"]
    cells = row.split()
    assert cells[0] == "first" and cells[3:6] == ["tiny", "stable_spam", "8"] and cells[-1] == "finished"

    first = call(capsys, "generate", out, "--prompt", "light and", "--tokens", "12", "--seed", "3")
    assert first == call(capsys, "generate", out, "--prompt", "light and", "--tokens", "12", "--seed", "3")
    assert first[0] == 0 and first[1].startswith("light and") and len(first[1]) > 12

    where = out / "checkpoints" / "step-000008"
    assert call(capsys, "generate", where, "--prompt", "light and", "--tokens", "12", "--seed", "3") == first

    status, text, err = call(capsys, "pretrain", "--resume", out, "--train.steps", "10")
    assert status == 0, err
    assert "resumed from" in text and "step 10/10" in text
    assert "the learning rate rises from" in text and "now has 10 steps instead of 8" in text
    status, _, err = call(capsys, "pretrain", "--resume", "--out", out, "--optim.lr", "0.5")
    assert status == 2 and "another optim.lr" in err and f"--optim.lr 0.5 --out {out}-2" in err
    command = shlex.split(err.rpartition("with: ")[2])
    status, text, err = call(capsys, *command[command.index("pretrain") :], "--train.steps", "9")
    assert status == 0 and f"folder     {out}-2" in text and "lr 0.5" in text, err

    words = ("--resume", f"{out}@8", "--out", tmp_path / "runs" / "new", "--optim.lr", "0.001")
    status, text, err = call(capsys, "pretrain", *words)
    assert status == 0 and "goes on from" in text and "2 steps to go" in text, err
    assert "\n+ new" in call(capsys, "runs", tmp_path / "runs")[1]

    (out / "summary.json").unlink()
    assert call(capsys, "runs", out)[1].splitlines()[1].endswith("interrupted")
    (out / "config.toml").write_text("[")
    assert call(capsys, "runs", out)[1].splitlines()[1].endswith("unreadable")
