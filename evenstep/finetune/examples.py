"""Files of examples: rows of whatever file pretraining reads but text, in one of a few formats. What is wrong is told
with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenstep.data.formats import read_rows
from evenstep.data.left_out import BadInput, LeftOut
from evenstep.errors import EvenstepError
from evenstep.finetune import choices as tasks
from evenstep.finetune.config import FORMATS

ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
_NAMED = re.compile(r"Answer format:\s*(\S+)")
"""How Commonsense170K and its test sets name the choices: ``Answer format: true/false``."""


@dataclass(frozen=True)
class Example:
    """``instruction`` and ``input`` go through the template of instructions, ``prompt`` is taken as it is, ``messages``
    (role, content) go through that of chats; ``answer`` is what is learned. ``options`` are texts that could stand in
    its place, ``correct`` which of them is right; ``names`` the words that stand for them in a generated answer."""

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


def read_examples(path: Path, form: str = "auto", most: int | None = None) -> list[Example]:
    """The examples of a file, the first ``most`` of them. EvenstepError for a file that is missing, no JSON, or empty,
    and for an example that lacks something, with its line (or number, in a .json list)."""
    found: list[Example] = []
    for where, item in _items(path):
        if form == "auto":
            form = format_of(item, where)
        found.append(_READERS[form](item, where))
        if most is not None and len(found) == most:
            break
    if not found:
        raise EvenstepError(f"{path} holds no examples; give a file with one JSON object a line")
    return found


def format_of(item: dict[str, Any], where: str) -> str:
    """The format whose fields ``item`` has."""
    if tasks.task_of(item):
        return "choices"
    for name, fields in _MARKS.items():
        if any(field <= item.keys() for field in fields):
            return name
    raise EvenstepError(
        f"{where}: unknown format, its fields are {', '.join(map(str, item)) or 'none'}; docs/finetuning.md shows what "
        f"{', '.join(FORMATS)} have"
    )


_MARKS: dict[str, tuple[set[str], ...]] = {
    "chat": ({"messages"}, {"conversations"}),
    "instruction": ({"instruction"},),
    "classification": ({"text", "label"},),
    "prompt": ({"prompt"},),
}


def _items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise EvenstepError(f"there is no {path}; give a file of rows, such as .jsonl, .json or .csv")
    try:
        for row in read_rows(path, LeftOut(advice="")):
            yield f"{row.name} {'item' if row.in_list else 'line'} {row.number}", row.value
    except BadInput as problem:
        name = str(problem.where).rpartition(":")[0]
        if problem.reason == "rows that are not JSON":
            raise EvenstepError(f"{name} line {problem.number}: no JSON ({problem.found})") from None
        if problem.reason == "rows that are not JSON objects":
            raise EvenstepError(
                f"{name} line {problem.number}: expected a JSON object, got {problem.found!r}"
            ) from None
        raise


def _text(item: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = item.get(key)
    if value is None:
        raise EvenstepError(f"{where}: '{key}' is missing; there are {', '.join(map(str, item))}")
    if not isinstance(value, str):
        raise EvenstepError(f"{where}: '{key}' is {type(value).__name__}, expected a text")
    if not value.strip() and not empty:
        raise EvenstepError(f"{where}: '{key}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise EvenstepError(f"{where}: '{key}' holds half of a surrogate pair, which is no text") from None
    return value


def _instruction(item: dict[str, Any], where: str) -> Example:
    instruction, answer = _text(item, "instruction", where), _text(item, "output", where)
    given = _text(item, "input", where, empty=True) if item.get("input") is not None else ""
    named = _NAMED.search(instruction)
    names = tuple(named[1].split("/")) if named and "answer" in item else ()
    right: Any = item.get("answer")
    if names and right not in names:
        raise EvenstepError(f"{where}: 'answer' is {right!r}, which is none of {', '.join(names)}")
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
    turns = item.get("messages", item.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise EvenstepError(f"{where}: 'messages' must be a list of turns with role and content")
    messages: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise EvenstepError(f"{where}: a message is {str(turn)[:40]!r}, expected role and content")
        key, content = ("role", "content") if "role" in turn else ("from", "value")
        role = _SHAREGPT.get(str(turn.get(key)), turn.get(key))
        if role not in ROLES:
            raise EvenstepError(f"{where}: a message's role is {role!r}, expected {', '.join(ROLES)}")
        messages.append((str(role), _text(turn, content, where)))
    if messages[-1][0] != "assistant":
        raise EvenstepError(f"{where}: the last message is of the {messages[-1][0]}; it must be the assistant's")
    return Example(where, messages=tuple(messages), answer=messages[-1][1])


def _classification(item: dict[str, Any], where: str) -> Example:
    label = item.get("label")
    if label is None or isinstance(label, float | list | dict) or label == "":
        raise EvenstepError(f"{where}: 'label' is {label!r}, expected a text or a whole number")
    return Example(where, prompt=_text(item, "text", where), label=str(label))


def _choices(item: dict[str, Any], where: str) -> Example:
    prompt, options, correct = tasks.read(item, where)
    return Example(where, prompt=prompt, answer=options[correct], options=options, correct=correct)


_READERS: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "instruction": _instruction,
    "prompt": _prompt,
    "chat": _chat,
    "choices": _choices,
    "classification": _classification,
}
