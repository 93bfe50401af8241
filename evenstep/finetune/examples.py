"""Reading files of examples, in one of the formats `evenstep.finetune.config.FORMATS`. The files have the row formats
of pretraining (.jsonl, .csv, ...). Errors name the file and the line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenstep.data.formats import read_rows
from evenstep.data.left_out import BadInput, LeftOut
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FORMATS

ROLES = ("system", "developer", "user", "assistant", "tool")
_SAME_ROLE = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function": "tool",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Names of roles in ShareGPT's files, in OpenAI's older function calls and in some templates, and the role of each."""
_NAMED = re.compile(r"Answer format:\s*(\S+)")
"""The line with the names of the choices in Commonsense170K and its test sets: ``Answer format: true/false``."""


@dataclass(frozen=True)
class Example:
    """One example, with the fields of its format.

    Attributes:
        where: the file and the line, for errors.
        prompt: the text before the answer, used without a template; in classification the text.
        answer: the text that is learned.
        instruction, input: the fields of the template of instructions.
        messages: (role, content) of each message of a chat.
        options: the texts among which the answer is chosen.
        correct: the index of the correct option.
        names: the words that stand for the options in a generated answer.
        label: the class.
        turns: the messages with the further fields that a chat template may use (tool_calls, name, tool_call_id); empty
            if the messages have only roles and contents.
        tools: descriptions of the tools that the assistant may call.
    """

    where: str
    prompt: str = ""
    answer: str = ""
    instruction: str | None = None
    input: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()
    correct: int | None = None
    names: tuple[str, ...] = ()
    label: str | None = None
    turns: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


Bad = dict[str, list[str]]
"""Name of file -> the error of each example that was left out."""

SKIP = "; --data.on_bad skip leaves such examples out"


def read_examples(
    path: Path, form: str = "auto", most: int | None = None, bad: list[str] | None = None
) -> list[Example]:
    """The first ``most`` examples of a file (None: all).

    EvenstepError for a missing, unreadable or empty file, and for an invalid example, with its line, or its index in a
    .json list. If ``bad`` is a list, invalid examples are left out and their errors are appended to it.
    """
    found: list[Example] = []
    for where, item in _items(path, bad):
        try:
            found.append(_READERS[format_of(item, where) if form == "auto" else form](item, where))
        except EvenstepError as problem:
            if bad is None:
                raise EvenstepError(f"{problem}{SKIP}") from None
            bad.append(str(problem))
            continue
        if form == "auto":
            form = format_of(item, where)
        if most is not None and len(found) == most:
            break
    if not found and bad:
        raise EvenstepError(f"{path}: all of its {len(bad):,} examples are invalid, the first: {bad[0]}")
    if not found:
        raise EvenstepError(f"{path} has no examples; give a file with one JSON object per line")
    return found


def format_of(item: dict[str, Any], where: str) -> str:
    """The format of an example, by the names of its fields. EvenstepError for unknown fields."""
    if choice_task(item):
        return "choices"
    for name, fields in _MARKS.items():
        if any(field <= item.keys() for field in fields):
            return name
    raise EvenstepError(
        f"{where}: unknown format with the fields {', '.join(map(str, item)) or 'none'}; docs/finetuning.md lists the "
        f"fields of {', '.join(FORMATS)}"
    )


_MARKS: dict[str, tuple[set[str], ...]] = {
    "chat": ({"messages"}, {"conversations"}),
    "instruction": ({"instruction"},),
    "classification": ({"text", "label"},),
    "prompt": ({"prompt"},),
}


class _BadRows(LeftOut):
    """Rows that the reader cannot use, as invalid examples: an error, or appended to ``bad``."""

    def __init__(self, bad: list[str] | None):
        super().__init__()
        self._bad = bad

    def bad(self, error: BadInput) -> None:
        where = f"{error.where.rpartition(':')[0]} line {error.number}"
        words = {
            "rows that are not JSON": f"{where}: not JSON ({error.found})",
            "rows that are not JSON objects": f"{where}: expected a JSON object, got {error.found!r}",
        }
        problem = words.get(error.reason, str(error))
        if self._bad is None:
            raise EvenstepError(f"{problem}{SKIP}") from None
        self._bad.append(problem)


def _items(path: Path, bad: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise EvenstepError(f"{path} does not exist; give a file of examples, such as .jsonl, .json or .csv")
    for row in read_rows(path, _BadRows(bad)):
        yield f"{row.name} {'item' if row.in_list else 'line'} {row.number}", row.value


def _text(item: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = item.get(key)
    if value is None:
        raise EvenstepError(f"{where}: '{key}' is missing; the fields are {', '.join(map(str, item))}")
    if not isinstance(value, str):
        raise EvenstepError(f"{where}: '{key}' is {type(value).__name__}, expected a text")
    if not value.strip() and not empty:
        raise EvenstepError(f"{where}: '{key}' is empty")
    return _encodable(value, key, where)


def _encodable(value: str, key: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EvenstepError(f"{where}: '{key}' contains half of a surrogate pair, which is not valid text") from None
    return value


def _instruction(item: dict[str, Any], where: str) -> Example:
    instruction, answer = _text(item, "instruction", where), _text(item, "output", where)
    given = _text(item, "input", where, empty=True) if item.get("input") is not None else ""
    named = _NAMED.search(instruction)
    names = tuple(named[1].split("/")) if named and "answer" in item else ()
    right: Any = item.get("answer")
    if names and right not in names:
        raise EvenstepError(f"{where}: 'answer' is {right!r}, expected one of {', '.join(names)}")
    options: tuple[str, ...] = ()
    if names and right in answer:
        before, _, after = answer.rpartition(str(right))
        options = tuple(f"{before}{name}{after}" for name in names)
    correct = names.index(str(right)) if names else None
    return Example(
        where, answer=answer, instruction=instruction, input=given, options=options, correct=correct, names=names
    )


def _prompt(item: dict[str, Any], where: str) -> Example:
    key = next((key for key in ("response", "completion", "answer") if key in item), "response")
    return Example(where, prompt=_text(item, "prompt", where), answer=_text(item, key, where))


def _chat(item: dict[str, Any], where: str) -> Example:
    given = item["messages"] if item.get("messages") is not None else item.get("conversations")
    given = _parsed(given)
    if not isinstance(given, list) or not given:
        raise EvenstepError(f"{where}: 'messages' must be a list of turns with role and content")
    turns = [turn for turn in (_turn(turn, where) for turn in given) if turn is not None]
    if isinstance(item.get("system"), str) and item["system"].strip() and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _text(item, "system", where)})
    last = turns[-1]["role"] if turns else "system"
    if last != "assistant":
        raise EvenstepError(f"{where}: the role of the last message is {last}; it has to be assistant")
    messages = tuple((turn["role"], _plain_turn(turn)) for turn in turns)
    more = any(len(turn) > 2 for turn in turns)
    return Example(
        where, messages=messages, answer=messages[-1][1], turns=tuple(turns) if more else (), tools=_tools(item, where)
    )


def _turn(turn: Any, where: str) -> dict[str, Any] | None:
    """A message in the form that chat templates expect; None for an empty system message."""
    if not isinstance(turn, dict):
        raise EvenstepError(f"{where}: a message is {str(turn)[:40]!r}, expected role and content")
    key, content = ("role", "content") if "role" in turn else ("from", "value")
    said = turn.get(key)
    role = _SAME_ROLE.get(str(said), said)
    if role not in ROLES:
        raise EvenstepError(f"{where}: the role of a message is {said!r}, expected {', '.join(ROLES)}")
    if turn.get("weight") not in (None, 1):
        raise EvenstepError(
            f"{where}: a message has weight {turn['weight']!r}; all answers are learned, remove the weight"
        )
    calls = _calls(turn, where) if role == "assistant" else []
    text = _content(turn, content, where, empty=bool(calls) or role not in ("user", "assistant"))
    if role == "system" and not text.strip():
        return None
    made: dict[str, Any] = {"role": role, "content": text}
    if calls:
        made["tool_calls"] = calls
    return made | {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}


def _content(turn: dict[str, Any], key: str, where: str, *, empty: bool) -> str:
    """The text of a message, whose content is a text or a list of parts that are texts. A refusal takes the place of a
    missing content."""
    value = turn.get(key)
    if value is None and isinstance(turn.get("refusal"), str):
        value = turn["refusal"]
    if value is None and empty:
        return ""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        texts = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
            if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
                raise EvenstepError(f"{where}: '{key}' has a part of type {kind!r}, expected only texts")
            texts.append(text)
        value = "".join(texts)
    return _text({**turn, key: value}, key, where, empty=empty)


def _calls(turn: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The tool calls of a message in OpenAI's form, with arguments as objects, as chat templates expect them."""
    given = _parsed(turn.get("tool_calls")) or []
    if turn.get("function_call"):  # the older form
        given = [{"type": "function", "function": _parsed(turn["function_call"])}]
    if not isinstance(given, list):
        raise EvenstepError(f"{where}: 'tool_calls' is {type(given).__name__}, expected a list")
    calls = []
    for call in given:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise EvenstepError(
                f"{where}: a tool call is {str(call)[:40]!r}, expected a function with name and arguments"
            )
        arguments = _parsed(function.get("arguments"))
        _encodable(json.dumps([function["name"], arguments], ensure_ascii=False), "tool_calls", where)
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        calls.append({"id": call["id"], **made} if isinstance(call.get("id"), str) else made)
    return calls


def _tools(item: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    given = _parsed(item.get("tools")) or []
    if not given and item.get("functions"):  # the older form
        given = [{"type": "function", "function": function} for function in _parsed(item["functions"])]
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise EvenstepError(f"{where}: 'tools' must be a list of objects")
    _encodable(json.dumps(given, ensure_ascii=False), "tools", where)
    return tuple(given)


def _parsed(value: Any) -> Any:
    """``value``, or its content if it is a JSON text of an object or a list, as in the cells of a table."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict | list) else value
    return value


def _plain_turn(turn: dict[str, Any]) -> str:
    """The text of a message for the plain template, which writes each tool call as a line of JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join([*([turn["content"]] if turn["content"].strip() or not calls else []), *calls])


def _classification(item: dict[str, Any], where: str) -> Example:
    label = item.get("label")
    if label is None or isinstance(label, float | list | dict) or label == "":
        raise EvenstepError(f"{where}: 'label' is {label!r}, expected a text or a whole number")
    return Example(where, prompt=_text(item, "text", where), label=str(label))


def _choices(item: dict[str, Any], where: str) -> Example:
    prompt, options, correct = read_choices(item, where)
    return Example(where, prompt=prompt, answer=options[correct], options=options, correct=correct)


_READERS: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "instruction": _instruction,
    "prompt": _prompt,
    "chat": _chat,
    "choices": _choices,
    "classification": _classification,
}


# ---- commonsense tasks with choices ----
#
# The eight commonsense tasks in the files of their authors: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC (easy and
# challenge) and OpenBookQA, recognised by their fields. `_instruction` reads the form in which LLM-Adapters distributes
# them (instruction, output, answer).

Choices = tuple[str, list[Any], int]


def choice_task(item: dict[str, Any]) -> str | None:
    """The task whose fields ``item`` has, or None."""
    return next((name for name, (fields, _) in _TASKS.items() if fields <= item.keys()), None)


def read_choices(item: dict[str, Any], where: str) -> tuple[str, tuple[str, ...], int]:
    """The prompt, the texts that may follow it, and the index of the correct one. EvenstepError for a missing or empty
    field."""
    task = choice_task(item)
    if task is None:
        raise EvenstepError(f"{where}: no task of choices has the fields {', '.join(map(str, item))}")
    try:
        prompt, options, correct = _TASKS[task][1](item)
        texts = tuple(str(option) for option in options)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
        raise EvenstepError(f"{where}: not an example of {task} ({type(problem).__name__}: {problem})") from None
    if not 0 <= correct < len(texts):
        raise EvenstepError(f"{where}: the correct answer is number {correct + 1} of {len(texts)} choices")
    if not prompt.strip() or not all(text.strip() for text in texts):
        raise EvenstepError(f"{where}: an example of {task} with an empty text")
    return prompt, texts, correct


def _boolq(item: dict[str, Any]) -> Choices:
    if not isinstance(item["answer"], bool):
        raise ValueError("answer must be true or false")
    question = item["question"].strip().rstrip("?")
    return f"{item['passage']}\nQuestion: {question}?\nAnswer:", [" no", " yes"], int(item["answer"])


def _piqa(item: dict[str, Any]) -> Choices:
    return f"Question: {item['goal']}\nAnswer:", [f" {item['sol1']}", f" {item['sol2']}"], int(item["label"])


def _siqa(item: dict[str, Any]) -> Choices:
    options = [f" {item[f'answer{letter}']}" for letter in "ABC"]
    return f"{item['context']}\nQuestion: {item['question']}\nAnswer:", options, int(item["label"]) - 1


def _hellaswag(item: dict[str, Any]) -> Choices:
    topic = f"{item['activity_label']}: " if item.get("activity_label") else ""
    return f"{topic}{item['ctx']}", [f" {ending}" for ending in item["endings"]], int(item["label"])


def _winogrande(item: dict[str, Any]) -> Choices:
    before, blank, after = item["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    space = " " if before.endswith(" ") else ""
    options = [f"{space}{item[f'option{i}']}{after}" for i in (1, 2)]
    return before.rstrip() or " ", options, int(item["answer"]) - 1


def _arc(item: dict[str, Any]) -> Choices:
    """ARC and OpenBookQA, in the flat form of the Hugging Face hub or nested as in the files of the authors."""
    question = item.get("question_stem", item.get("question"))
    options: Any = item.get("choices")
    if isinstance(question, dict):
        question, options = question["stem"], question["choices"]
    if isinstance(options, dict):
        labels, texts = options["label"], options["text"]
    else:
        labels, texts = [option["label"] for option in options], [option["text"] for option in options]
    return f"Question: {question}\nAnswer:", [f" {text}" for text in texts], list(labels).index(item["answerKey"])


_TASKS: dict[str, tuple[set[str], Callable[[dict[str, Any]], Choices]]] = {
    "BoolQ": ({"question", "passage", "answer"}, _boolq),
    "PIQA": ({"goal", "sol1", "sol2", "label"}, _piqa),
    "SIQA": ({"context", "question", "answerA", "answerB", "answerC", "label"}, _siqa),
    "HellaSwag": ({"ctx", "endings", "label"}, _hellaswag),
    "WinoGrande": ({"sentence", "option1", "option2", "answer"}, _winogrande),
    "OpenBookQA": ({"question_stem", "choices", "answerKey"}, _arc),
    "ARC": ({"question", "answerKey"}, _arc),
}
