"""The eight commonsense tasks as their authors publish them: fields to a prompt and texts that may follow it.

BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC (easy and challenge) and OpenBookQA are told apart by their fields. The
form in which LLM-Adapters gives them out (instruction, output, answer) is read by `evenstep.finetune.examples`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evenstep.errors import EvenstepError

Read = tuple[str, list[Any], int]


def task_of(item: dict[str, Any]) -> str | None:
    """The task whose fields ``item`` has, or None."""
    return next((name for name, (fields, _) in _TASKS.items() if fields <= item.keys()), None)


def read(item: dict[str, Any], where: str) -> tuple[str, tuple[str, ...], int]:
    """The prompt, the texts that may follow it, and which is right. EvenstepError for what is missing or empty."""
    task = task_of(item)
    if task is None:
        raise EvenstepError(f"{where}: fields of no known task of choices: {', '.join(map(str, item))}")
    try:
        prompt, options, correct = _TASKS[task][1](item)
        texts = tuple(str(option) for option in options)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
        raise EvenstepError(f"{where}: not an example of {task} ({type(problem).__name__}: {problem})") from None
    if not 0 <= correct < len(texts):
        raise EvenstepError(f"{where}: the right answer is number {correct + 1} of {len(texts)} choices")
    if not prompt.strip() or not all(text.strip() for text in texts):
        raise EvenstepError(f"{where}: an example of {task} with an empty text")
    return prompt, texts, correct


def _boolq(item: dict[str, Any]) -> Read:
    if not isinstance(item["answer"], bool):
        raise ValueError("answer must be true or false")
    question = item["question"].strip().rstrip("?")
    return f"{item['passage']}\nQuestion: {question}?\nAnswer:", [" no", " yes"], int(item["answer"])


def _piqa(item: dict[str, Any]) -> Read:
    return f"Question: {item['goal']}\nAnswer:", [f" {item['sol1']}", f" {item['sol2']}"], int(item["label"])


def _siqa(item: dict[str, Any]) -> Read:
    options = [f" {item[f'answer{letter}']}" for letter in "ABC"]
    return f"{item['context']}\nQuestion: {item['question']}\nAnswer:", options, int(item["label"]) - 1


def _hellaswag(item: dict[str, Any]) -> Read:
    topic = f"{item['activity_label']}: " if item.get("activity_label") else ""
    return f"{topic}{item['ctx']}", [f" {ending}" for ending in item["endings"]], int(item["label"])


def _winogrande(item: dict[str, Any]) -> Read:
    before, blank, after = item["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    space = " " if before.endswith(" ") else ""
    options = [f"{space}{item[f'option{i}']}{after}" for i in (1, 2)]
    return before.rstrip() or " ", options, int(item["answer"]) - 1


def _arc(item: dict[str, Any]) -> Read:
    """ARC and OpenBookQA, as flat as the Hugging Face hub has them, or nested as in the authors' files."""
    question = item.get("question_stem", item.get("question"))
    options: Any = item.get("choices")
    if isinstance(question, dict):
        question, options = question["stem"], question["choices"]
    if isinstance(options, dict):
        labels, texts = options["label"], options["text"]
    else:
        labels, texts = [option["label"] for option in options], [option["text"] for option in options]
    return f"Question: {question}\nAnswer:", [f" {text}" for text in texts], list(labels).index(item["answerKey"])


_TASKS: dict[str, tuple[set[str], Callable[[dict[str, Any]], Read]]] = {
    "BoolQ": ({"question", "passage", "answer"}, _boolq),
    "PIQA": ({"goal", "sol1", "sol2", "label"}, _piqa),
    "SIQA": ({"context", "question", "answerA", "answerB", "answerC", "label"}, _siqa),
    "HellaSwag": ({"ctx", "endings", "label"}, _hellaswag),
    "WinoGrande": ({"sentence", "option1", "option2", "answer"}, _winogrande),
    "OpenBookQA": ({"question_stem", "choices", "answerKey"}, _arc),
    "ARC": ({"question", "answerKey"}, _arc),
}
