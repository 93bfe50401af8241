"""The command lines of the papers' programs: what their recipes are, and that they train."""

import json
import math
import shlex
import tomllib

import pytest
from train_support import write_corpus

from evenstep.cli import main
from evenstep.errors import EvenstepError
from evenstep.optim.functional import rewarm_factor
from evenstep.train.config_io import build, load_config
from evenstep.train.official import PROGRAMS, flag_table, parse_line, recipe_text, translated

SPAM = (
    "torchrun --standalone --nproc_per_node 2 torchrun_main.py --model_config configs/llama_130m.json --lr 8e-4 "
    "--density 1.0 --update_gap 500 --batch_size 128 --total_batch_size 512 --num_training_steps 20000 "
    "--warmup_steps 1000 --weight_decay 0 --dtype bfloat16 --eval_every 1000 --threshold 5000 --save_dir saved "
    "--optimizer SPAM --warmup_epoch 150"
)
FP4 = (
    "torchrun --standalone --nproc_per_node 4 main_pretrain.py --model_config configs/llama_350m.json "
    "--eval_every 1000 --save_every 100000 --dtype bfloat16 --batch_size 128 --total_batch_size 512 --lr 0.0004 "
    "--warmup_steps 2000 --num_training_steps 20000 --optimizer stablespam --weight_quant --simulation "
    "--weight_group_size 256 --weight_decay 0 --project stablespam --name N --save_dir saved --restore_optimizer "
    "--fp4 --gamma1 0.7 --gamma2 0.9 --gamma3 0.999 --update_proj_gap 500"
)
BF16 = (
    "torchrun --standalone --nproc_per_node 4 main_pretrain.py --model_config configs/llama_130m.json "
    "--eval_every 1000 --save_every 100000 --dtype bfloat16 --batch_size 128 --total_batch_size 512 --lr 0.0008 "
    "--warmup_steps 2000 --num_training_steps 20000 --optimizer stablespam --weight_decay 0 --project stablespam "
    "--name N --save_dir saved --restore_optimizer --gamma1 0.85 --gamma2 0.99999 --update_proj_gap 1000"
)
PUBLISHED = {
    "spam-130m": SPAM,
    "spam-350m": SPAM.replace("130m", "350m").replace("8e-4", "4e-4").replace("20000", "60000"),
    "stable-spam-fp4": FP4,
    "stable-spam-int4": FP4.replace(
        "--fp4", "--weight_bits 4 --act_quant --act_group_size 64 --act_stochastic"
    ),
    "stable-spam-bf16": BF16,
}  # fmt: skip
SHORT = "main_pretrain.py --model_config configs/llama_60m.json --batch_size 8 --num_training_steps 2000 "


def recipe(text, **how):
    line = parse_line(shlex.split(text))
    tables, remarks = translated(line, **how)
    return build(tables), recipe_text(line, tables, remarks)


def comment(text, flag):
    """The comment of a recipe on one flag, in one line."""
    words = " ".join(" ".join(line[1:].split()) for line in text.splitlines() if line.startswith("#"))
    rest = words.partition(f" --{flag} ")[2]
    return rest[: min(at for at in (rest.find(f" --{name} ") % 10**6 for name in EVERY) if at >= 0)]


EVERY = {name for program in PROGRAMS.values() for name in program.flags}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.mark.filterwarnings("ignore:recipe .* groups of the inputs span tokens")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_line_trains_in_miniature(name, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVENSTEP_CACHE", str(corpus.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    small = (
        f"--data.source text:{corpus} --data.vocab_size 300 --data.val_fraction 0.1 --model.size tiny --train.steps 3 "
        "--schedule.warmup_steps 1 --train.batch_size 4 --train.micro_batch_size 2 --train.seq_len 16 "
        "--train.threads 1 --eval.every 2 --eval.max_tokens 200 --log.every 1 --sample.tokens 0 --telemetry.enabled "
        "false --log.curve false"
    )
    assert main(["official", *small.split(), "--", *shlex.split(PUBLISHED[name])]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "saved/summary.json").read_text())
    assert math.isfinite(summary["val_loss"]) and summary["steps"] == 3
    printed = tomllib.loads(out[out.index("# A command line of") : out.index("[checkpoint]")])
    config = load_config(tmp_path / "saved/config.toml")
    assert printed["optim"]["variant"] == config.optim.options["variant"] == "official"
    assert (printed.get("lowbit"), printed["train"]["steps"]) == (config.lowbit, 3)
    given = parse_line(shlex.split(PUBLISHED[name])).given
    assert config.optim.lr == given["lr"]


def test_the_spam_line_warms_up_as_long_as_the_published_program():
    config, text = recipe(SPAM)
    assert config.model.size == "130m" and config.optim.name == "spam" and config.train.dtype == "bf16"
    assert (config.train.batch_size, config.train.micro_batch_size, config.train.steps) == (512, 128, 20000)
    assert (config.eval.every, config.checkpoint.every, config.out) == (1000, 2000, "saved")
    options = config.optim.options
    assert (options["warmup_steps"], options["reset_interval"], options["clip_start"]) == (1000, 500, 20)
    assert "2 of its 15 flags are ignored by the published program: --update_gap, --warmup_epoch." in text.replace(
        "\n# ", " "
    )
    assert "IGNORED" in comment(text, "update_gap 500") and "IGNORED" in comment(text, "warmup_epoch 150")
    most = max(rewarm_factor(t, 500, 1000) for t in range(500, 20001))
    assert f"never exceeds {most:.3f} of the stated" in comment(text, "warmup_steps 1000") and f"{most:.3f}" == "0.503"

    config, text = recipe(SPAM.replace("gap 500", "gap 400"), as_written=True)
    options = config.optim.options
    assert (options["warmup_steps"], options["reset_interval"], options["clip_start"]) == (150, 400, 20)
    assert "at its word" in comment(text, "warmup_epoch 150")


def test_the_lines_of_stable_spam():
    config, text = recipe(FP4)
    assert config.lowbit == "fp4-official" and config.name == "N" and config.optim.name == "stable_spam"
    expected = {"gamma1": 0.7, "gamma2": 0.9, "gamma3": 0.999, "reset_interval": 500, "total_steps": 20000}
    assert expected.items() <= config.optim.options.items() and config.optim.options["eta_min"] == 0.5
    assert "always on" in comment(text, "total_T 20000")
    for name in ("weight_quant", "simulation"):
        assert "IGNORED by the program: quantises nothing" in text, name
    config, text = recipe(PUBLISHED["stable-spam-int4"])
    assert config.lowbit == "int4-official" and "IGNORED" in comment(text, "act_group_size 64")
    config, text = recipe(BF16)
    assert config.lowbit is None and config.optim.options["reset_interval"] == 1000
    config, text = recipe(BF16 + " --weight_quant --simulation --weight_bits 4")
    assert config.lowbit is None and "no effect" in comment(text, "weight_bits 4")
    config, text = recipe(BF16.replace("20000", "30000"))
    assert config.optim.options["total_steps"] == 20000 and "rises again" in comment(text, "total_T 20000")


def test_every_flag_of_both_programs_is_taken_and_explained():
    values = {"max_train_tokens": "100M", "model_config": "configs/llama_60m.json", "batch_size": "8",
        "optimizer": "adam", "scheduler": "cosine", "dtype": "float32", "weight_group_size": "256",
        "total_batch_size": "16", "gradient_accumulation": "2", "beta1": "0", "continue_from": None,
        "real_fp4": None, "act_quant": None, "warmup_steps": "10", "load_local": ""}  # fmt: skip
    for program in PROGRAMS.values():
        words = [program.name]
        for name, flag in program.flags.items():
            if (value := values.get(name, "0.3" if flag.kind is float else "3")) is not None:
                words += [f"--{name}"] if flag.kind is bool or not value else [f"--{name}", value]
        line = parse_line(words)
        tables, remarks = translated(line)
        text = recipe_text(line, tables, remarks)
        assert build(tables).model.size == "60m"
        for name in line.given:
            assert f"#   --{name}" in text, name
            assert len(comment(text + "\n# --lr ", f"{name} {line.texts.get(name, '')}".strip())) > 8, name
        assert text.count("IGNORED") == sum(flag.ignored and name in line.given for name, flag in program.flags.items())


def test_settings_that_follow_from_several_flags():
    config, text = recipe(SHORT + "--max_train_tokens 1M --total_batch_size 16")
    assert config.train.steps == 62500 and "not by its 4,096 tokens" in comment(text, "max_train_tokens 1M")
    assert recipe(SHORT + "--max_train_tokens 5M --total_batch_size 16", as_written=True)[0].train.steps == 1220
    config, _ = recipe(SHORT + "--gradient_accumulation 4 --scheduler linear --min_lr_ratio 0.3 --grad_clipping 1")
    assert (config.train.batch_size, config.train.micro_batch_size, config.train.clip_norm) == (32, 8, 1)
    assert (config.schedule.name, config.schedule.decay_fraction, config.schedule.min_lr_ratio) == ("wsd", 1, 0)
    config, _ = recipe(SHORT + "--optimizer Sgd --beta1 0.8 --weight_decay 0.1")
    assert config.optim.options == {"momentum": 0.8} and config.optim.decay == "all"
    config, _ = recipe(SHORT + "--optimizer spam --density 0.25")
    assert config.optim.options["density_of"] == "hidden" and config.optim.options["density"] == 0.25
    config, text = recipe(SHORT + "--continue_from old --restore_optimizer --gamma1 0.9")
    assert config.model.init == "old" and config.model.size is None and "no effect with adam" in text
    config, _ = recipe(SHORT + "--optimizer galore_adamw --rank 64 --beta2 0.95")
    assert config.optim.name == "galore" and config.optim.options["rank"] == 64
    assert config.optim.options["betas"] == [0.9, 0.95] and config.optim.options["update_proj_gap"] == 500


REFUSED = {
    "torchrun_mian.py --lr 1": "did you mean 'torchrun_main.py'",
    "train.py": "'train.py' is not a published program",
    "torchrun_main.py --lrr 1": "has no flag --lrr; did you mean '--lr'",
    "torchrun_main.py --gamma1 1": "has no flag --gamma1",
    "torchrun_main.py --lr": "--lr has no value; give --lr FLOAT",
    "torchrun_main.py --lr --seed 1": "--lr has no value",
    "torchrun_main.py --seed 1.5": "--seed 1.5 is not a whole number",
    "torchrun_main.py 5": "'5' belongs to no flag",
    "main_pretrain.py --fp4=1": "--fp4 takes no value",
    "main_pretrain.py --data.source x": "give it in front of --",
    "main_pretrain.py --batch_size 8": "--model_config is missing",
    "main_pretrain.py --model_config configs/llama_60m.json": "--batch_size is missing",
    "torchrun_main.py --model_config llama_60m.json --batch_size 8": "--optimizer is missing; give adam, spam",
    SHORT.replace("60m", "61m"): "configs/llama_61m.json: no such file",
    SHORT + "--optimizer lamb": "--optimizer lamb has no translation",
    SHORT + "--optimizer adafactor": "give --beta1 0",
    SHORT + "--scheduler cosine_restarts": "give cosine or linear",
    SHORT + "--dtype float16": "give bfloat16 or float32",
    SHORT + "--fp4 --act_quant": "give one of them",
    SHORT + "--act_quant --weight_bits 3": "give 4 or 8",
    SHORT + "--fp4 --weight_group_size 64": "evenstep has groups of 256",
    SHORT + "--real_fp4": "--real_fp4 has no translation",
    SHORT + "--total_batch_size 20": "is not --batch_size 8 x 1 processes x a whole number",
    "torchrun --nproc_per_node=4 --nnodes 2 " + SHORT + "--total_batch_size 32": "8 x 8 processes",
    "torchrun --nproc_per_node=4 " + SHORT: "4 processes need --total_batch_size; give --total_batch_size 32",
    SHORT + "--total_batch_size 32 --gradient_accumulation 2": "x --gradient_accumulation 2",
    SHORT + "--max_train_tokens many": "give one such as 100M",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_run_is_one_line(text):
    with pytest.raises(EvenstepError) as raised:
        recipe(text)
    assert REFUSED[text] in str(raised.value) and "\n" not in str(raised.value)


def test_processes_and_options_of_evenstep(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["official", "--print-recipe", "--optim.variant", "paper", "--lowbit", "fp4", "--", *shlex.split(FP4)]
    assert main(words) == 0
    out = capsys.readouterr().out
    tables = tomllib.loads(out)
    assert tables["lowbit"] == "fp4" and tables["optim"]["variant"] == "paper" and "parallel" not in tables
    assert "#   --optim.variant paper" in out and "The line starts 4 processes" in out
    again = next(line for line in out.splitlines() if "-m evenstep official --" in line).removeprefix("#")
    launcher, _, rest = again.partition(" -m evenstep official ")
    own, _, rest = rest.partition(" -- ")
    assert own == "--lowbit=fp4 --optim.variant=paper"
    assert launcher.split() == FP4.split()[:4] and parse_line(shlex.split(rest)).given == parse_line(FP4.split()).given
    # The printed command has the options in front of --, so that a copy of it is the same run.
    given = ["--data.source", "text:books/*.txt", "--train.steps", "3000", "--as-written"]
    assert main(["official", "--print-recipe", *given, "--", *shlex.split(SPAM)]) == 0
    again = next(line for line in capsys.readouterr().out.splitlines() if "-m evenstep official --" in line)
    assert " official --as-written '--data.source=text:books/*.txt' --train.steps=3000 -- torchrun_main.py" in again
    assert main(["official", "--print-recipe", *shlex.split(again.partition(" official ")[2])]) == 0
    tables = tomllib.loads(capsys.readouterr().out)
    assert (tables["data"]["source"], tables["train"]["steps"]) == (given[1], 3000)
    assert tables["optim"]["warmup_steps"] == 150
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["official", "--print-recipe", "--", *shlex.split(rest)]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["parallel"]["mode"] == "ddp" and "The line starts" not in out

    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["official", "--print-recipe", "--optim.name", "adamw", "--", *shlex.split(rest)]) == 0
    out, err = capsys.readouterr()
    assert set(tomllib.loads(out)["optim"]) == {"name", "lr", "weight_decay"} and "that adamw does not have" in err
    for words, why in (
        (["official", "--print-recipe", "--optim.gama1", "1", "--", *SHORT.split()], "optim.gama1"),
        (["official", "--print", "--", *SHORT.split()], "unknown argument '--print'"),
        (["official"], "names no published program"),
    ):
        assert main(words) == 2
        assert why in capsys.readouterr().err


def test_another_optimizer_takes_the_place_of_one_without_translation():
    for words in (
        "--optimizer q_galore_adamw8bit --queue_size 3",
        "--optimizer adafactor",
        "--optimizer lamb --rank 3",
    ):
        line = parse_line(shlex.split(SHORT + words))
        tables, remarks = translated(line, [("optim.name", "lion")])
        text = recipe_text(line, tables, remarks, [("optim.name", "lion")])
        assert build(tables).optim.name == "lion" and not build(tables).optim.options, words
        for flag in words.split()[2:3]:
            assert "no effect: --optim.name lion replaces" in comment(text, flag.removeprefix("--"))
    with pytest.raises(EvenstepError, match="give --beta1 0"):  # the same optimizer is no replacement
        translated(parse_line(shlex.split(SHORT + "--optimizer adafactor")), [("optim.name", "adafactor")])
    [*words] = shlex.split(SPAM.replace("--optimizer SPAM", ""))
    tables, _ = translated(parse_line(words), [("optim.name", "adamw")])
    assert (tables["optim"]["name"], tables["name"]) == ("adamw", "official-130m-adamw")


def test_the_text_is_as_long_as_the_run():
    line = parse_line(shlex.split(SPAM))
    assert translated(line)[0]["data"]["max_tokens"] == "2.7B"
    short = [("train.steps", "2000"), ("train.batch_size", "128")]
    assert translated(line, short)[0]["data"]["max_tokens"] == "67M"
    assert translated(line, [*short, ("data.max_tokens", "1M")])[0]["data"]["max_tokens"] == 1_000_000


def test_adafactor_has_no_first_moment():
    config, text = recipe(SHORT + "--optimizer adafactor --beta1 0")
    assert config.optim.options == {}
    assert "no first moment" in comment(text, "beta1 0") and "optim.betas" not in comment(text, "beta1 0")


def test_a_recipe_is_checked_before_it_is_printed(capsys):
    assert main(["official", "--print-recipe", "--", *shlex.split(SPAM + " --DeltaT -1")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "reset_interval" in err


def test_the_shape_may_be_a_file(tmp_path):
    shape = tmp_path / "llama_own.json"
    shape.write_text("{}")
    config, _ = recipe(SHORT.replace("configs/llama_60m.json", str(shape)))
    assert config.model.config == str(shape) and config.model.size is None


def test_the_page_has_the_tables_of_the_flags():
    from docs_support import ROOT

    page = (ROOT / "docs/official.md").read_text()
    for program in PROGRAMS.values():
        assert flag_table(program) in page, "python -m evenstep.train.official prints the tables"
