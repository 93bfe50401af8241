import codecs
import dataclasses
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenstep.errors import EvenstepError
from evenstep.train.config import (
    SIZE_NAMES,
    Config,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    kinds,
    options,
    parse_count,
)
from evenstep.train.config_io import (
    build,
    changed_options,
    config_hash,
    expanded,
    literal,
    load_config,
    override,
    to_toml,
)

ROOT = Path(__file__).parents[2]

# The stable names. A name may be added here, never changed or taken away.
OPTION_NAMES = """
data.source data.tokenizer data.vocab_size data.val_fraction data.text_field data.max_tokens data.cache_dir
data.exclude data.on_bad data.bad_batch
model.size model.config model.hf model.norm model.norm_alpha model.qk_norm model.attention_softcap model.logit_softcap
model.kv_heads model.tie_embeddings model.init
optim.name optim.before optim.lr optim.lr_scale.embedding optim.lr_scale.last optim.weight_decay optim.decay
optim.decay_correction optim.cautious_decay optim.hyperball
schedule.name schedule.warmup_steps schedule.min_lr_ratio schedule.decay_fraction
train.steps train.tokens train.batch_size train.micro_batch_size train.seq_len train.dtype train.device train.compile
train.activation_checkpointing train.loss_chunk train.clip_norm train.z_loss train.on_nan
train.deterministic train.threads
parallel.mode parallel.tensor parallel.replicate parallel.reshard parallel.timeout
eval.every eval.max_tokens eval.batch_size
checkpoint.every checkpoint.background checkpoint.keep
log.every log.curve log.report
telemetry.enabled telemetry.every telemetry.samples telemetry.ratio telemetry.sigma telemetry.window
telemetry.activations
telemetry.tensorboard telemetry.wandb telemetry.trackio telemetry.mlflow
guard.ladder guard.sigma guard.norm_ratio guard.loss_rise guard.budget guard.snapshot_every
sample.prompt sample.tokens sample.temperature sample.top_k
seed lowbit out name
""".split()  # noqa: SIM905


def test_option_names_are_frozen():
    assert list(options()) == OPTION_NAMES


def test_every_option_has_help_and_a_default_in_its_range():
    Config()
    assert all(len(field.metadata["help"]) > 5 for field, _ in options().values())


def test_the_configuration_needs_no_torch():
    code = "import sys, evenstep.train.config_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "text, value",
    [("20K", 20_000), ("100M", 10**8), ("1.5B", 1_500_000_000), ("7", 7), ("1e6", 10**6), ("2_000", 2000)],
)
def test_counts(text, value):
    assert parse_count(text) == value
    assert load_config(None, [("train.tokens", text)]).train.tokens == value


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('seed = 5\n[train]\nsteps = 10\nbatch_size = 4\n[optim]\nname = "spam"\nthreshold = 10.0\n')
    config = load_config(recipe, [("train.batch_size", "6"), ("optim.threshold", "20"), ("optim.betas", "0.9,0.95")])
    assert (config.seed, config.train.steps, config.train.batch_size, config.name) == (5, 10, 6, "mine")
    assert config.optim.options == {"threshold": 20, "betas": [0.9, 0.95]}


def test_a_budget_on_the_command_line_replaces_the_other_kind_in_the_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nsteps = 10\n")
    config = load_config(recipe, [("train.tokens", "1M")])
    assert (config.train.steps, config.train.tokens) == (None, 10**6)
    assert config.total_steps == 489  # 1e6 / (8 * 256) = 488.3


def test_none_on_the_command_line_clears_a_recipes_value(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nsteps = 10\nmicro_batch_size = 2\n[optim]\ntotal_steps = 40\n")
    config = load_config(recipe, [("train.micro_batch_size", "none"), ("optim.total_steps", "none")])
    assert config.train.micro_batch_size is None and config.optim.options == {}


BAD = [
    (("train.stesp", "5"), ["train.stesp", "did you mean 'train.steps'"]),
    (("sede", "5"), ["sede", "did you mean 'seed'"]),
    (("nothing.like_this_at_all_xyz", "5"), ["nothing.like_this_at_all_xyz", "--help"]),
    (("optim.lr", "-1"), ["optim.lr", "-1", "above 0"]),
    (("optim.lr", "0"), ["optim.lr", "0", "above 0"]),
    (("optim.lr", "nan"), ["optim.lr", "nan", "above 0"]),
    (("optim.lr", "fast"), ["optim.lr", "fast", "float"]),
    (("train.batch_size", "7.5"), ["train.batch_size", "7.5", "int"]),
    (("train.batch_size", "0"), ["train.batch_size", "0", "at least 1"]),
    (("train.compile", "yes"), ["train.compile", "yes", "true or false"]),
    (("train.tokens", "12Q"), ["train.tokens", "12Q", "1.5B"]),
    (("train.loss_chunk", "few"), ["train.loss_chunk", "few", "auto"]),
    (("schedule.name", "cosin"), ["schedule.name", "cosin", "did you mean 'cosine'"]),
    (("data.val_fraction", "0.9"), ["data.val_fraction", "0.9", "at most 0.5"]),
    (("train.micro_batch_size", "3"), ["batch_size 8", "not divisible", "micro_batch_size 3"]),
    (("schedule.warmup_steps", "200"), ["warmup_steps 200", "200 steps"]),
]


@pytest.mark.parametrize("override, words", BAD, ids=[bad[0][0] + "=" + bad[0][1] for bad in BAD])
def test_a_mistake_is_one_clear_line(override, words):
    with pytest.raises(EvenstepError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def numbers():
    from evenstep.finetune.config import FineTuneConfig

    for kind in (Config, FineTuneConfig):
        for key, (field, hint) in options(kind).items():
            if {int, float} & set(kinds(hint)):
                yield pytest.param(kind, key, field.metadata["high"], kinds(hint), id=f"{kind.COMMAND} {key}")


FINETUNE = [("model.path", "m"), ("data.file", "f")]


@pytest.mark.parametrize("kind, key, high, types", [*numbers()])
def test_every_number_has_a_largest_value(kind, key, high, types):
    """What nobody means is refused, from the command line and from a file, before anything is made of it."""
    given = FINETUNE if kind is not Config else []
    assert high is not None, key
    whole = int in types
    for text in (
        str(math.ceil(high) * 2),
        "9" * 45,
        "9" * 450,
        "9" * 5000,
        *([] if whole else ["1e400", "inf", "nan"]),
    ):
        with pytest.raises(EvenstepError) as caught:
            load_config(None, [*given, (key, text)], kind)
        message = str(caught.value)
        assert key in message and "\n" not in message and len(message) < 400, message
        section, _, name = key.rpartition(".")
        value = text if text in ("inf", "nan") else "inf" if text == "1e400" else text
        tables = tomllib.loads(f"[{section}]\n{name} = {value}\n" if section else f"{name} = {value}\n") if (
            len(text) < 1000) else {}  # fmt: skip
        if tables:
            with pytest.raises(EvenstepError, match=key.replace(".", r"\.")):
                build(override(tables, given, kind), kind, quick_budget=True)


@pytest.mark.parametrize("kind, key, high, types", [*numbers()])
def test_the_largest_value_itself_is_taken_or_refused_in_one_line(kind, key, high, types):
    given = FINETUNE if kind is not Config else []
    try:
        load_config(None, [*given, (key, str(high))], kind)
    except EvenstepError as problem:  # a batch that is not divisible, no steps left after the warm-up, ...
        assert "out of range" not in str(problem) and "\n" not in str(problem)


SAVED = "[train]\r\nsteps = 3\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
def test_a_recipe_as_windows_saves_it(tmp_path, encoding):
    bom = {"utf-16-le-bom": codecs.BOM_UTF16_LE, "utf-16-be-bom": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / "r.toml").write_bytes(bom + SAVED.encode(encoding.removesuffix("-bom")))
    assert load_config(tmp_path / "r.toml").train.steps == 3


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "neither is given"),
        (b"\xef\xbb\xbf", "neither is given"),
        (b"\xff\xfe", "neither is given"),
        (SAVED.encode("utf-16-le"), "TOML"),
        (b"\xff\xfe[", "UTF-8"),
        (b"[train]\nsteps = 3 # gr\xf6sse\n", "save it in UTF-8"),
        (b"\x1f\x8b\x08", "UTF-8"),
        (b"x = " + b"[" * 5000, "TOML"),
        (b"x = " + b"1" * 5000, "TOML"),
        (b"\x00", "TOML"),
        (None, "Is a directory"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, words):
    path = tmp_path / "r.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(EvenstepError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_no_unicode_is_one_line():
    for key in ("out", "name", "data.source", "sample.prompt"):
        with pytest.raises(EvenstepError, match=f"{key}: .*is not valid UTF-8"):
            load_config(None, [(key, "a\udcffb")])


# ---- another optimizer than the recipe's ----

OF_STABLE_SPAM = "[train]\nsteps = 3\n[optim]\nname = 'stable_spam'\nlr = 0.004\ngamma1 = 0.85\neps = 1e-6\n"


@pytest.mark.parametrize(
    "text, name, kept, told",
    [
        (OF_STABLE_SPAM, "adamw", {"eps": 1e-6}, "gamma1"),
        (OF_STABLE_SPAM, "torch.optim:NAdam", {"eps": 1e-6}, "gamma1"),
        (OF_STABLE_SPAM, "lora", {"eps": 1e-6}, "gamma1"),
        (OF_STABLE_SPAM, "sgd", {}, "eps, gamma1"),
        (OF_STABLE_SPAM, "stable_spam", {"gamma1": 0.85, "eps": 1e-6}, ""),
        ("[train]\nsteps = 3\n[optim]\ngamma1 = 0.5\n", "scale", {}, "gamma1"),
        ("[train]\nsteps = 3\n[optim]\nname = 'adamw'\namsgrad = true\n", "stable_spam", {}, "amsgrad"),
        ("[train]\nsteps = 3\n", "adamw", {}, ""),
    ],
)
def test_what_the_new_optimizer_lacks_is_left_out_and_named(tmp_path, capsys, text, name, kept, told):
    (tmp_path / "r.toml").write_text(text)
    config = load_config(tmp_path / "r.toml", [("optim.name", name)])
    assert (config.optim.name, config.optim.options) == (name, kept)
    err = capsys.readouterr().err
    assert err.endswith(f"{name} does not have: {told}\n") if told else err == ""


def test_what_the_command_line_gives_is_not_left_out(tmp_path, capsys):
    from evenstep.train.optimizers import check_optimizer

    (tmp_path / "r.toml").write_text(OF_STABLE_SPAM)
    config = load_config(tmp_path / "r.toml", [("optim.name", "adamw"), ("optim.gamma2", "0.5")])
    with pytest.raises(EvenstepError, match=r"optim\.gamma2: adamw has no such"):
        check_optimizer(config.optim)
    (tmp_path / "r.toml").write_text(OF_STABLE_SPAM.replace("gamma1", "gama1"))
    with pytest.raises(EvenstepError, match="gama1"):
        check_optimizer(load_config(tmp_path / "r.toml").optim)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[train]\nsteps = 5\nbatchsize = 4\n", ["train.batchsize", "did you mean 'train.batch_size'"]),
        ("[trian]\nsteps = 5\n", ["trian", "did you mean 'train'"]),
        ("[train]\nsteps = '5'\nseq_len = '8'\n", ["train.seq_len", "'8'", "int"]),
        ("[train]\nsteps = true\n", ["train.steps", "bool", "int"]),
        ("train = 5\n", ["train", "section"]),
        ("[train]\nseq_len = 8\n", ["train.steps", "train.tokens", "neither"]),
        ("[train]\nsteps = 5\ntokens = 5\n", ["train.steps", "train.tokens", "both"]),
        ("[train\n", ["TOML"]),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_line(tmp_path, text, words):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(EvenstepError) as caught:
        load_config(recipe)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_missing_recipe_is_one_clear_line(tmp_path):
    with pytest.raises(EvenstepError, match="no such file"):
        load_config(tmp_path / "none.toml")


def test_evensteps_own_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("recipes/demo.toml")).name == "demo"
    assert {path.stem for path in expanded(Path("recipes/tables/*.toml"))} >= {"scale-1", "stable-spam-1"}
    assert expanded(Path("recipes/demo.toml")) == [Path("recipes/demo.toml")]
    for wrong, meant in (("start-4bits", "start-4bit"), ("tables/spam-thets", "tables/spam-theta")):
        with pytest.raises(EvenstepError, match=rf"no such file.*did you mean 'recipes/{meant}.toml'"):
            load_config(Path(f"recipes/{wrong}.toml"))
    Path("recipes").mkdir()
    Path("recipes/demo.toml").write_text("[train]\nsteps = 3\n")
    assert load_config(Path("recipes/demo.toml")).train.steps == 3, "a file of the working directory goes first"


def test_types_are_checked_from_python_too():
    with pytest.raises(EvenstepError, match=r"train\.batch_size"):
        TrainConfig(steps=3, batch_size="4")  # type: ignore[arg-type]
    assert OptimConfig(lr=1).lr == 1.0


@given(
    prompt=st.text(st.characters(exclude_categories=("Cs",))),
    lr=st.floats(1e-12, 1e12),
    seed=st.integers(0, 2**31 - 1),
    extra=st.lists(st.floats(0, 1) | st.booleans() | st.integers() | st.text('ab"\\\n\x7f')),
)
def test_written_and_read_back_is_the_same_configuration(prompt, lr, seed, extra):
    config = Config(sample=SampleConfig(prompt=prompt), optim=OptimConfig(lr=lr, options={"x": extra}), seed=seed)
    assert build(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    "text, value",
    [
        (".3", 0.3), ("5.", 5.0), ("1e-8", 1e-8), ("-2", -2), ("7", 7), ("5K", 5000), ("1.5M", 1_500_000),
        ("0.9,0.95", [0.9, 0.95]), (".9,.95", [0.9, 0.95]), ("[.9, .95]", [0.9, 0.95]), ("0.9,", [0.9]),
        ("true", True), ("none", None), ("official", "official"), ("K", "K"),
    ],
)  # fmt: skip
def test_an_optimizers_option_is_read_as_what_it_looks_like(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


def test_a_table_in_the_optimizers_section_is_named():
    with pytest.raises(EvenstepError, match=r"optim\.x: .*cannot be written"):
        to_toml(build({"optim": {"x": {"a": 1}}, "train": {"steps": 1}}))


def test_an_option_with_a_dot_in_its_name(tmp_path):
    text = "[train]\nsteps = 1\n[optim.lr_scale]\nembedding = 10\n"
    (tmp_path / "r.toml").write_text(text)
    config = load_config(tmp_path / "r.toml", [("optim.lr_scale.last", "0.5"), ("optim.name", "adamw")])
    assert config.optim.lr_scales == {"embedding": 10.0, "last": 0.5}
    assert "\nlr_scale.embedding = 10.0\nlr_scale.last = 0.5\n" in to_toml(config)
    assert build(tomllib.loads(to_toml(config))) == config
    with pytest.raises(
        EvenstepError, match=r"unknown option 'optim\.lr_scale\.las'; did you mean 'optim\.lr_scale\.last'"
    ):
        load_config(None, [("optim.lr_scale.las", "2")])
    with pytest.raises(EvenstepError, match=r"optim\.lr_scale\.last: 0\.0 is out of range; it must be above 0"):
        load_config(None, [("optim.lr_scale.last", "0")])


def test_scales_of_one_change_nothing():
    assert OptimConfig(lr_scale_last=1.0).lr_scales == {}
    assert config_hash(Config()) == config_hash(Config(optim=OptimConfig(lr_scale_last=None)))


def test_the_model_is_tiny_unless_one_is_given():
    assert (ModelConfig().size, ModelConfig().norm, ModelConfig().norm_alpha) == ("tiny", "pre", 0.25)
    assert (ModelConfig(init="x").size, ModelConfig(init="x").norm, ModelConfig(init="x").label) == (
        None,
        None,
        "custom",
    )


def test_the_names_of_sizes_are_those_of_the_models():
    from evenstep.models import SIZES

    assert list(SIZE_NAMES) == list(SIZES)


def test_nobody_is_asked_whether_he_meant_what_he_said():
    from evenstep.errors import nearest

    assert nearest("--debug", ["--debug", "--out"]) == "" and nearest("--bogus", ["--out", "--seed"]) == ""
    assert nearest("--sede", ["--seed", "--out"]) == "; did you mean '--seed'?"
    options = ["model.size", "train.seq_len", "optim.lr", "train.loss", "data.loss"]
    for word in ("model.seq_len", "--seq_len"):
        assert nearest(word, options) == "; did you mean 'train.seq_len'?"
    assert nearest("train.lr", options) == "; did you mean 'optim.lr'?"
    assert "loss" not in nearest("optim.loss", options)  # two sections have it


def test_hash_tells_what_decides_the_result():
    config = Config()
    assert config_hash(config) == config_hash(dataclasses.replace(config, name="other", out="elsewhere"))
    assert config_hash(config) != config_hash(dataclasses.replace(config, seed=1))
    newer = dataclasses.replace(config, guard=dataclasses.replace(config.guard, sigma=9.0))
    assert config_hash(newer) != config_hash(config)


def test_what_may_change_on_resume():
    def changed(*overrides):
        return list(changed_options(load_config(None, []), load_config(None, list(overrides))))

    assert changed(("train.steps", "900"), ("eval.every", "7"), ("checkpoint.keep", "9"), ("train.threads", "1")) == []
    assert changed(("optim.lr", "0.5"), ("train.seq_len", "8"), ("seed", "3")) == ["seed", "optim.lr", "train.seq_len"]
    assert changed(("optim.gamma1", "0.5")) == ["optim.gamma1"]


TUNING = sorted((ROOT / "recipes").glob("finetune-*.toml"))
RECIPES = sorted({*(ROOT / "recipes").glob("*.toml")} - {*TUNING})


@pytest.mark.parametrize("recipe", TUNING, ids=[path.stem for path in TUNING])
def test_recipes_of_fine_tuning_are_valid(recipe):
    from evenstep.finetune.config import FineTuneConfig
    from evenstep.train.optimizers import check_optimizer

    config = load_config(recipe, kind=FineTuneConfig)
    assert (config.optim.name, config.optim.options["density"]) == ("spam", 0.0025)
    check_optimizer(config.optim)


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_are_valid(recipe):
    from evenstep.train.optimizers import check_optimizer

    config = load_config(recipe)
    if recipe.stem.startswith("slimpajama"):
        assert config.data.source == "hf:cerebras/SlimPajama-627B" and config.tokens_per_step == 131072
    elif recipe.stem != "demo" and not recipe.stem.startswith(("lowbit", "start")):
        _, size, name = recipe.stem.split("-")
        assert (config.model.size, config.optim.name) == (size, name)
        assert config.tokens_per_step == 131072 and "Published perplexity" in recipe.read_text()
    check_optimizer(config.optim)


def test_there_is_a_recipe_for_every_published_row():
    wanted = {
        f"c4-{size}-{name}"
        for size in ("60m", "130m", "350m", "1b")
        for name in ("stable_spam", "spam", "scale", "adam")
    }
    assert {path.stem for path in RECIPES if not path.stem.startswith(("lowbit", "start"))} == wanted | {
        "demo",
        "slimpajama-60m-stable_spam",
    }


def test_the_reference_page_is_up_to_date():
    from evenstep.train.flags import configuration_page

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m evenstep.train.flags > docs/configuration.md"
