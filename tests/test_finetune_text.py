"""Templates: what of a chat or an instruction is learned."""

import json

import pytest

from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.finetune.examples import read_examples
from evenstep.finetune.text import Encoder, HubText, OurText

TURNS = [("system", "be short"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
KEEPS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = KEEPS.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '...' }}")


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in TURNS]}))
    return read_examples(path)[0]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    train_bpe(iter(["a"]), 257).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def learned(text, example):
    ids, flags = Encoder(text).encode(example)
    return text.decode(ids[flags].tolist())


def test_every_answer_of_a_chat_is_learned_and_ends_with_the_end_of_text(chat):
    text = OurText(train_bpe(iter(["a"]), 257))
    assert learned(text, chat) == "hello<|endoftext|>ciao<|endoftext|>"
    prompt = text.decode(Encoder(text).prompt(chat))
    assert prompt.startswith("<|endoftext|>### System:\nbe short\n\n### User:\nhi") and prompt.endswith(
        "### Assistant:\n"
    )


def test_a_tokenizers_own_template_is_used(chat, folder):
    text = HubText(folder)
    text.tokenizer.chat_template = KEEPS
    assert learned(text, chat) == "hello<end>ciao<end>"
    assert text.decode(Encoder(text).prompt(chat)).endswith("<user>bye<end><assistant>")


def test_of_a_template_that_rewrites_earlier_turns_the_last_answer_is_learned(chat, folder):
    text = HubText(folder)
    text.tokenizer.chat_template = FORGETS
    assert learned(text, chat) == "ciao<end>"


def test_a_template_that_refuses_is_told_in_one_line(chat, folder):
    text = HubText(folder)
    text.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(EvenstepError, match=r"line 1: the tokenizer's chat template refuses it: no system"):
        Encoder(text).encode(chat)


def test_instructions_have_a_plain_template_or_the_users_own(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"instruction": "add", "input": "1 2", "output": "3"}))
    (example,) = read_examples(path)
    text = OurText(train_bpe(iter(["a"]), 257))
    whole = text.decode(Encoder(text).prompt(example))
    assert whole == "<|endoftext|>### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
    assert text.decode(Encoder(text, "Q {instruction} {input} A ").prompt(example)) == "<|endoftext|>Q add 1 2 A "
