"""Examples to rows: what is read, refused, learned, packed."""

import json

import numpy as np
import pytest
import torch

from evenstep.errors import EvenstepError
from evenstep.finetune.data import IGNORED, Document, RowLoader, batches, collate, pack
from evenstep.finetune.examples import read_examples
from evenstep.models import Llama, LlamaConfig

SHAPE = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_seq_len=64)


def documents(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Document.of(draw.integers(0, 64, n + 1).astype(np.int32), np.arange(n + 1) > n // 2) for n in lengths
    ]  # fmt: skip


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_packed_logits_equal_those_of_each_document_alone(norm):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**SHAPE.__dict__, "norm": norm}))
    docs = documents([9, 5, 7, 12, 3])
    rows = pack(docs, 16)
    assert len(rows) == 3 and max(map(len, rows)) > 1
    inputs, _ = collate(rows)
    with torch.no_grad():
        packed = model(inputs[:, 0], inputs[:, 1])
        for i, row in enumerate(rows):
            start = 0
            for document in row:
                alone = model(torch.from_numpy(document.inputs.astype(np.int64))[None])[0]
                torch.testing.assert_close(packed[i, start : start + len(document)], alone, atol=2e-5, rtol=1e-4)
                start += len(document)


def test_packed_gradients_equal_unpacked_ones():
    docs = documents([9, 5, 7])
    found = []
    for rows in (pack(docs, 32), [(document,) for document in docs]):
        torch.manual_seed(0)
        model = Llama(SHAPE)
        inputs, targets = collate(rows)
        model.loss(inputs[:, 0], targets, positions=inputs[:, 1]).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_positions_restart_and_padding_is_minus_one():
    inputs, targets = collate([tuple(documents([3, 2])), tuple(documents([4]))])
    assert inputs[0, 1].tolist() == [0, 1, 2, 0, 1] and inputs[1, 1].tolist() == [0, 1, 2, 3, -1]
    assert targets[1, -1] == IGNORED


def test_only_the_answer_is_learned():
    document = Document.of(np.array([1, 2, 3, 4, 5], np.int32), np.array([False, False, False, True, True]))
    assert document.inputs.tolist() == [1, 2, 3, 4] and document.targets.tolist() == [IGNORED, IGNORED, 4, 5]


def test_packing_loses_nothing_and_fits():
    docs = documents(np.random.default_rng(1).integers(1, 40, 200).tolist())
    rows = pack(docs, 40)
    assert sorted(len(d) for row in rows for d in row) == sorted(map(len, docs))
    assert all(sum(map(len, row)) <= 40 for row in rows)
    assert len(rows) <= 1.1 * sum(map(len, docs)) / 40 + 1


def test_an_epoch_serves_every_row_once_and_seeks():
    rows = [(document,) for document in documents(range(2, 12))]
    loader = RowLoader(rows, 2, seed=3)
    seen = [loader.next_batch()[0] for _ in range(5)]
    lengths = sorted(int((part[:, 1] >= 0).sum()) for x in seen for part in x.split(1))
    assert lengths == list(range(2, 12))
    again = RowLoader(rows, 2, seed=3)
    again.position = 4
    assert torch.equal(again.next_batch()[0], seen[2])
    assert len(list(batches(rows, 4))) == 3


GOOD = {
    "instruction": "Is it? Answer format: true/false",
    "input": "",
    "output": "the answer is true",
    "answer": "true",
}
BAD = {
    "output missing": ({"instruction": "x"}, "line 2: 'output' is missing"),
    "an empty answer": ({"instruction": "x", "output": " "}, "line 2: 'output' is empty"),
    "a wrong choice": ({**GOOD, "answer": "maybe"}, "line 2: 'answer' is 'maybe'"),
    "no object": ([1], "line 2: expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_refused_by_their_number(name, tmp_path):
    bad, message = BAD[name]
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(bad)}\n")
    with pytest.raises(EvenstepError, match=message) as raised:
        read_examples(tmp_path / "x.jsonl")
    assert "\n" not in str(raised.value)


def test_unknown_formats_and_files_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(EvenstepError, match="line 1: unknown format with the fields colour"):
        read_examples(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(EvenstepError, match="line 1: not JSON"):
        read_examples(tmp_path / "x.jsonl")
    with pytest.raises(EvenstepError, match="does not exist"):
        read_examples(tmp_path / "y.jsonl")


def test_commonsense_names_its_choices(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    (example,) = read_examples(tmp_path / "x.json")
    assert example.names == ("true", "false") and example.correct == 0
    assert example.options == ("the answer is true", "the answer is false")


ARC = {"text": ["a", "b"], "label": ["A", "B"]}
TASKS = {
    "BoolQ": ({"question": "is it", "passage": "P", "answer": True}, 2, " yes"),
    "PIQA": ({"goal": "G", "sol1": "a", "sol2": "b", "label": 1}, 2, " b"),
    "SIQA": ({"context": "C", "question": "Q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}, 3, " c"),
    "HellaSwag": ({"ctx": "C", "endings": ["a", "b", "c", "d"], "label": "2"}, 4, " c"),
    "WinoGrande": ({"sentence": "A or B, _ ran.", "option1": "A", "option2": "B", "answer": "2"}, 2, " B ran."),
    "ARC": ({"question": "Q", "choices": ARC, "answerKey": "B"}, 2, " b"),
    "ARC of its authors": (
        {"question": {"stem": "Q", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "A"}, 1, " a",
    ),
    "OpenBookQA": ({"question_stem": "Q", "choices": ARC, "answerKey": "A"}, 2, " a"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_commonsense_tasks_as_published(task, tmp_path):
    item, options, right = TASKS[task]
    (tmp_path / "x.jsonl").write_text(json.dumps(item))
    (example,) = read_examples(tmp_path / "x.jsonl")
    assert len(example.options) == options and example.options[example.correct] == right == example.answer


# ---- chats as OpenAI's files and ShareGPT's have them ----

CALL = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER, ANSWER = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}
PLAIN_CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
CHATS = {
    "a tool is called, answers, and is answered of": (
        {"messages": [USER, CALLING, {"role": "tool", "tool_call_id": "c1", "content": "3"}, ANSWER], "tools": [TOOL]},
        [("user", "1 + 2?"), ("assistant", PLAIN_CALL), ("tool", "3"), ("assistant", "3")],
    ),
    "a call beside words": (
        {"messages": [USER, {**CALLING, "content": "wait"}]},
        [("user", "1 + 2?"), ("assistant", f"wait\n{PLAIN_CALL}")],
    ),
    "a call is the answer": ({"messages": [USER, CALLING]}, [("user", "1 + 2?"), ("assistant", PLAIN_CALL)]),
    "a call without its content": (
        {"messages": [USER, {k: v for k, v in CALLING.items() if k != "content"}]},
        [("user", "1 + 2?"), ("assistant", PLAIN_CALL)],
    ),
    "the older form": (
        {
            "messages": [
                USER, {"role": "assistant", "content": None, "function_call": CALL},
                {"role": "function", "name": "add", "content": ""}, ANSWER,
            ],
            "functions": [TOOL["function"]],
        },
        [("user", "1 + 2?"), ("assistant", PLAIN_CALL), ("tool", ""), ("assistant", "3")],
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": "be short"}, USER, ANSWER]},
        [("developer", "be short"), ("user", "1 + 2?"), ("assistant", "3")],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "3"}]}]},
        [("user", "1 + 2?"), ("assistant", "3")],
    ),
    "a refusal": (
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}]},
        [("user", "1 + 2?"), ("assistant", "no")],
    ),
    "names": (
        {"messages": [{**USER, "name": "ann"}, {**ANSWER, "name": "bot"}]}, [("user", "1 + 2?"), ("assistant", "3")],
    ),
    "a system without a word": (
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, [("user", "1 + 2?"), ("assistant", "3")],
    ),
    "ShareGPT's calls": (
        {
            "conversations": [
                {"from": "human", "value": "1 + 2?"}, {"from": "function_call", "value": PLAIN_CALL},
                {"from": "observation", "value": "3"}, {"from": "gpt", "value": "3"},
            ],
            "system": "be short", "tools": json.dumps([TOOL]),
        },
        [("system", "be short"), ("user", "1 + 2?"), ("assistant", PLAIN_CALL), ("tool", "3"), ("assistant", "3")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats_as_they_are_found(name, tmp_path):
    item, messages = CHATS[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(item))
    (example,) = read_examples(tmp_path / "x.jsonl")
    assert list(example.messages) == messages and example.answer == messages[-1][1]
    assert [dict(tool) for tool in example.tools] == ([TOOL] if {"tools", "functions"} & {*item} else [])


def picture(kind):
    return {"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}


BAD_CHATS = {
    "an empty answer": ([USER, {"role": "assistant", "content": ""}], "line 2: 'content' is empty"),
    "no answer": ([USER, {"role": "assistant", "content": None}], "line 2: 'content' is missing"),
    "an empty list": ([USER, {"role": "assistant", "content": []}], "line 2: 'content' is empty"),
    "no calls": ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "line 2: 'content' is missing"),
    "a picture": ([picture("image_url"), ANSWER], "line 2: 'content' has a part of type 'image_url'"),
    "a system alone": ([{"role": "system", "content": "be short"}], "line 2: the role of the last message is system"),
    "a system without a word": (
        [{"role": "system", "content": ""}],
        "line 2: the role of the last message is system",
    ),
    "the user last": ([USER, ANSWER, USER], "line 2: the role of the last message is user"),
    "a role": ([{"role": "critic", "content": "x"}, ANSWER], "line 2: the role of a message is 'critic'"),
    "a call of nothing": ([USER, {**CALLING, "tool_calls": [{"id": "1"}]}], "line 2: a tool call is"),
    "an answer not to be learned": ([USER, {**ANSWER, "weight": 0}], "line 2: a message has weight 0"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats_are_refused_or_left_out(name, tmp_path):
    turns, message = BAD_CHATS[name]
    good = json.dumps({"messages": [USER, ANSWER]})
    (tmp_path / "x.jsonl").write_text(f"{good}\n{json.dumps({'messages': turns})}\n{good}\n")
    with pytest.raises(EvenstepError, match=message) as raised:
        read_examples(tmp_path / "x.jsonl")
    assert "\n" not in str(raised.value) and "--data.on_bad skip" in str(raised.value)
    bad = []
    assert len(read_examples(tmp_path / "x.jsonl", bad=bad)) == 2
    assert len(bad) == 1 and "on_bad" not in bad[0]


def test_bad_lines_of_every_format_are_left_out(tmp_path):
    lines = ["{", "[1]", '{"colour": 1}', '{"prompt": "a", "response": ""}', '{"prompt": "a", "response": "b"}', "null"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    bad = []
    (example,) = read_examples(tmp_path / "x.jsonl", bad=bad)
    assert example.answer == "b" and len(bad) == 5
    (tmp_path / "x.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(EvenstepError, match=r"all of its 3 examples are invalid, the first: .* line 1: not JSON"):
        read_examples(tmp_path / "x.jsonl", bad=[])
