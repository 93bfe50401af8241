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


# ---- tools ----

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add"}}
TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def example_of(tmp_path, messages, **more):
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": messages, **more}))
    return read_examples(path)[0]


def turns_of_tools():
    return [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]


def test_tools_are_written_plainly_where_no_template_knows_them(tmp_path):
    text = OurText(train_bpe(iter(["a"]), 257))
    example = example_of(tmp_path, turns_of_tools(), tools=[TOOL])
    ids, _ = Encoder(text).encode(example)
    assert text.decode(ids.tolist()) == (
        f"<|endoftext|>### Tools:\n{json.dumps(TOOL)}\n\n### System:\nbe short\n\n### User:\n?\n\n### Assistant:\n"
        '{"name": "add", "arguments": {"a": 1}}<|endoftext|>### Tool:\n2\n\n### Assistant:\ntwo<|endoftext|>'
    )
    assert learned(text, example) == '{"name": "add", "arguments": {"a": 1}}<|endoftext|>two<|endoftext|>'


def test_a_template_writes_tools_calls_and_a_developer_as_the_system(tmp_path, folder):
    text = HubText(folder)
    text.tokenizer.chat_template = TOOLS
    example = example_of(tmp_path, turns_of_tools(), tools=[TOOL])
    ids, _ = Encoder(text).encode(example)
    assert text.decode(ids.tolist()) == (
        '[add]<system>be short<end><user>?<end><assistant>add({"a": 1})<end><tool>2<end><assistant>two<end>'
    )
    assert learned(text, example) == 'add({"a": 1})<end>two<end>'
    text.tokenizer.chat_template = TOOLS + "{# developer #}"
    assert "<developer>be short" in text.decode(Encoder(text).encode(example)[0].tolist())
    call = example_of(tmp_path, turns_of_tools()[:3])
    assert Encoder(text).expected(call) == 'add({"a": 1})<end>' and Encoder(text).expected(example) == "two"


LOSES = {
    "the calls of tools": TOOLS.replace("m.tool_calls or []", "[]"),
    "the messages of tools": TOOLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"),
    "the tools": TOOLS.replace("tools or []", "[]"),
}


@pytest.mark.parametrize("what", LOSES)
def test_a_template_that_leaves_tools_out_is_told_in_one_line(what, tmp_path, folder):
    text = HubText(folder)
    text.tokenizer.chat_template = LOSES[what]
    with pytest.raises(EvenstepError, match=f"line 1: the tokenizer's chat template leaves out {what};"):
        Encoder(text).encode(example_of(tmp_path, turns_of_tools(), tools=[TOOL]))
