"""Text from fine-tuned models, asked in the format that they learned."""

import json

import pytest
import torch
from finetune_support import write_hub

from evenstep.cli import main
from evenstep.data.tokenizer import train_bpe
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.run import Tuning
from evenstep.train.config_io import build

pytest.importorskip("transformers")

ANSWERS = {"ab": "ba", "bc": "cb", "cd": "dc", "de": "ed"}
FORMS = {
    "plain": lambda q, a: {"prompt": f"{q}:", "response": a},
    "instruction": lambda q, a: {"instruction": q, "output": a},
    "chat": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub"))


def tuned(hub, out, form, library, steps=150, **more):
    out.mkdir(parents=True)
    data = out / "data.jsonl"
    data.write_text("".join(json.dumps(FORMS[form](q, a)) + "\n" for q, a in ANSWERS.items()))
    tables = {
        "model": {"path": str(hub), "library": library},
        "data": {"file": str(data), "val_fraction": 0.0, "pack": "no"},
        "optim": {"name": "adam", "lr": 1e-2},
        "train": {"steps": steps, "batch_size": 4, "seq_len": 64},
        "telemetry": {"enabled": False},
        "log": {"curve": False},
        "out": str(out / "run"),
        **more,
    }
    Tuning(build(tables, FineTuneConfig), say=lambda _: None).fit()
    return out / "run"


def told(capsys, *words):
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize(
    ("form", "library"), [("plain", "evenstep"), ("instruction", "transformers"), ("chat", "evenstep")]
)
def test_generate_asks_in_the_format_that_was_learned(form, library, hub, tmp_path, capsys):
    run = tuned(hub, tmp_path / "x", form, library)
    for question, answer in ANSWERS.items():
        given = f"{question}:" if form == "plain" else question
        expected = f"{given}{answer}" if form == "plain" else answer
        for place in (run, run / "model"):
            assert told(capsys, place, "--prompt", given, "--temperature", 0, "--tokens", 5) == expected
    raw = told(capsys, run, "--prompt", "ab:", "--tokens", 5, "--raw", "--temperature", 0)
    assert raw.startswith("ab:")
    if form != "plain":
        assert main(["generate", str(run)]) == 2 and "--prompt TEXT" in capsys.readouterr().err


def test_the_same_seed_draws_the_same_text(hub, capsys):
    words = (hub, "--prompt", "ab", "--tokens", 12)
    assert told(capsys, *words, "--seed", 1) == told(capsys, *words, "--seed", 1) != told(capsys, *words, "--seed", 2)


def test_a_limit_above_the_models_positions_costs_a_short_prompt_nothing(hub, capsys):
    """The default of ``--tokens`` exceeds the 64 positions of this model."""
    few = told(capsys, hub, "--prompt", "abcd", "--temperature", 0, "--tokens", 12)
    many = told(capsys, hub, "--prompt", "abcd", "--temperature", 0)
    assert len(many) > len(few) and many.startswith(few)
    # A prompt that does not fit loses its beginning, and half of the positions are left for the answer
    long = told(capsys, hub, "--prompt", "x" * 100 + "abcd" * 8, "--temperature", 0)
    assert long.removeprefix("x" * 100 + "abcd" * 8) == told(
        capsys, hub, "--prompt", "abcd" * 8, "--temperature", 0
    ).removeprefix("abcd" * 8)


def test_a_tokenizers_own_chat_template_asks_and_ends_the_answer(hub, tmp_path, capsys):
    """Its last token ends the answer though the tokenizer's end of text is another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(hub)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.save_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(hub)
    net.resize_token_embeddings(len(tokenizer))
    net.save_pretrained(folder)
    run = tuned(folder, tmp_path / "x", "chat", "transformers")
    assert told(capsys, run, "--prompt", "cd", "--temperature", 0, "--tokens", 9) == "dc"


def test_what_fine_tuning_wrote_is_tuned_further_and_exported(hub, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    run = tuned(hub, tmp_path / "1", "plain", "evenstep", steps=2)
    again = tuned(run / "model", tmp_path / "2", "plain", "auto", steps=2, tune={"adapter": "lora", "rank": 2})
    assert json.loads((again / "model" / "evenstep.json").read_text())["library"] == "evenstep"
    theirs = AutoModelForCausalLM.from_pretrained(again / "model")
    for to in ("hf", "safetensors"):
        assert main(["export", str(again), "--to", to, "--out", str(tmp_path / to)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for (name, a), b in zip(theirs.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_writes_no_text_is_refused_in_one_line(hub, tmp_path, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=257, **shape)).save_pretrained(tmp_path / "bert")
    train_bpe(iter(["a"]), 257).save(tmp_path / "bert")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[tune]\n")
    capsys.readouterr()
    for place, message in (("bert", "is a classifier"), ("run", "is not finished")):
        assert main(["generate", str(tmp_path / place), "--prompt", "a"]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
