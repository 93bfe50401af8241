"""From examples to tokens: one interface for the tokenizers of both libraries, the templates, and the choice of the
tokens that are learned.

The built-in templates, used for instructions, and for chats if the tokenizer has no chat template:

    ### Instruction:        ### System:
    ...                     ...

    ### Input:              ### User:
    ...                     ...

    ### Response:           ### Assistant:
    the answer              the answer

An empty input is left out, and an end-of-text token follows each answer. The message of a developer has the title of a
system message, that of a tool the title "### Tool:". The available tools are listed under "### Tools:" at the
beginning, one line of JSON each, and so are the tool calls in an answer. If the chat template of a tokenizer has no
role "developer", it gets a system message. A chat template that omits the message of a tool, a tool call or the tools
is an error. A document starts as in pretraining: after an end-of-text token for models of evenstep, and after the first
token that the tokenizer adds for other models.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evenstep.data import Tokenizer, load_tokenizer
from evenstep.errors import EvenstepError, first_line
from evenstep.finetune.examples import Example

Part = tuple[str, bool]
"""A text, and whether its tokens are learned."""


class Text(ABC):
    """The interface of a tokenizer. ``start`` has the first tokens of a document, ``ends`` the tokens that end an
    answer."""

    start: list[int]
    ends: set[int]
    eos_id: int
    vocab_size: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of ``text``, without added tokens. With ``special``, the text of a special token becomes this
        token; else it is encoded as text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @abstractmethod
    def save(self, directory: str | Path) -> Any: ...

    def chat(self, example: Example) -> list[Part] | None:
        """The parts of a chat by the chat template of the tokenizer; None if it has no template."""
        return None

    def whole(self, text: str, most: int) -> list[int]:
        """At most ``most`` tokens of a text for classification, with the special tokens that the model expects."""
        return (self.start + self.encode(text))[:most]


class OurText(Text):
    """A tokenizer of evenstep."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.ends, self.eos_id = [tokenizer.eos_id], {tokenizer.eos_id}, tokenizer.eos_id
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def save(self, directory: str | Path) -> Any:
        return self.tokenizer.save(directory)


class HubText(Text):
    """A tokenizer of transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as problem:  # whatever its parsers raise
            raise EvenstepError(f"transformers finds no tokenizer in {folder}: {first_line(problem)}") from None
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise EvenstepError(f"the tokenizer in {folder} has no end-of-text token; set its eos_token")
        first = tokenizer("a")["input_ids"][:1]
        self.start = first if first == [tokenizer.bos_token_id] else []
        self.eos_id, self.ends, self.vocab_size = eos, {eos}, len(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        told = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.fingerprint = hashlib.sha256(f"{told}\0{tokenizer.chat_template}\0{eos}".encode()).hexdigest()
        self.ends |= self._turn_ends()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: str | Path) -> Any:
        return self.tokenizer.save_pretrained(directory)

    def chat(self, example: Example) -> list[Part] | None:
        if not self.tokenizer.chat_template:
            return None
        turns = list(example.turns) or [{"role": role, "content": content} for role, content in example.messages]
        if "developer" not in str(self.tokenizer.chat_template):
            turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
        self._check_kept(turns, example)
        parts, done = [], ""
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before, after = self._rendered(turns[:i], example, ask=True), self._rendered(turns[: i + 1], example)
            if not before.startswith(done) or not after.startswith(before):
                break  # the template changes earlier turns when later ones follow
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        else:
            if turns[-1]["role"] != "assistant":  # a prompt without its answer
                parts.append((self._rendered(turns, example, ask=True).removeprefix(done), False))
            return parts
        before, after = self._rendered(turns[:-1], example, ask=True), self._rendered(turns, example)
        if not after.startswith(before):
            raise EvenstepError(
                f"{example.where}: the chat template changes the messages before the last answer, so the tokens to "
                "learn are unknown; give the tokenizer another template"
            )
        return [(before, False), (after[len(before) :], True)]

    def _check_kept(self, turns: list[dict[str, Any]], example: Example) -> None:
        """EvenstepError if the chat template omits the message of a tool, a tool call, or the tools. Not every template
        supports them, and the model would be trained on a conversation from which they are missing."""
        for i, turn in enumerate(turns):
            if turn["role"] == "tool" and turn["content"].strip():
                what, without = "the messages of tools", {**turn, "content": ""}
            elif turn.get("tool_calls"):
                what, without = "the calls of tools", {k: v for k, v in turn.items() if k != "tool_calls"}
            else:
                continue
            if self._same(turns[: i + 1], [*turns[:i], without], example, example):
                raise self._leaves_out(what, example)
        if example.tools and self._same(turns, turns, example, replace(example, tools=())):
            raise self._leaves_out("the tools", example)

    def _same(self, turns: list[Any], others: list[Any], example: Example, other: Example) -> bool:
        said = self._rendered(turns, example)
        try:
            return said == self._rendered(others, other)
        except EvenstepError:  # the template uses the missing part
            return False

    def _leaves_out(self, what: str, example: Example) -> EvenstepError:
        return EvenstepError(
            f"{example.where}: the tokenizer's chat template leaves out {what}; give it one that supports them"
        )

    def _turn_ends(self) -> set[int]:
        """The special token that ends an answer in the chat template of the tokenizer, if there is one."""
        answer = "evenstep"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            whole = self._rendered(turns, Example("")) if self.tokenizer.chat_template else ""
        except EvenstepError:
            return set()
        after = self.encode(whole.rpartition(answer)[2], special=True)[:1]
        return {*after} & {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def _rendered(self, turns: list[Any], example: Example, ask: bool = False) -> str:
        given: dict[str, Any] = {"tools": list(example.tools)} if example.tools else {}
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **given))
        except Exception as problem:  # jinja's own
            raise EvenstepError(
                f"{example.where}: the tokenizer's chat template refuses it: {first_line(problem)}"
            ) from None

    def whole(self, text: str, most: int) -> list[int]:
        found = self.tokenizer(text, truncation=True, max_length=most, split_special_tokens=True)
        return list(found["input_ids"])


def load_text(folder: Path, library: str) -> Text:
    return OurText(load_tokenizer(folder)) if library == "evenstep" else HubText(folder)


def read_template(path: str | None) -> str | None:
    """The template in the file ``path``, None for None. EvenstepError when it cannot be read or has no
    ``{instruction}``."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise EvenstepError(f"data.template: {path} cannot be read ({problem})") from None
    if "{instruction}" not in text:
        raise EvenstepError(
            f"data.template: {path} has no {{instruction}}; write {{instruction}} and {{input}} where they belong"
        )
    return text


class Encoder:
    """Converts examples to tokens with one tokenizer and one template."""

    def __init__(self, text: Text, template: str | None = None) -> None:
        self.text, self.template = text, template

    def parts(self, example: Example) -> tuple[list[Part], bool]:
        """The parts of an example, and whether their texts contain special tokens, as those of a chat template do."""
        if example.messages:
            own = self.text.chat(example)
            return (own, True) if own is not None else (_plain_chat(example), False)
        prompt = example.prompt if example.instruction is None else self._instruction(example)
        return [(prompt, False), (example.answer, True)], False

    def _instruction(self, example: Example) -> str:
        instruction = str(example.instruction)
        if self.template is not None:
            return self.template.replace("{instruction}", instruction).replace("{input}", example.input)
        given = f"### Input:\n{example.input}\n\n" if example.input.strip() else ""
        return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"

    def encode(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an example, int32 [n], and whether each of them is learned, bool [n]."""
        parts, special = self.parts(example)
        ids = [] if special else list(self.text.start)
        learned = [False] * len(ids)
        for part, learn in parts:
            # Parts are encoded one by one, so that no token spans the border between prompt and answer. The text of a
            # chat template has its own end of an answer.
            tokens = self.text.encode(part, special=special)
            if learn and not special:
                tokens = [*tokens, self.text.eos_id]
            ids += tokens
            learned += [learn] * len(tokens)
        return np.array(ids, np.int32), np.array(learned, bool)

    def prompt(self, example: Example) -> list[int]:
        """The tokens from which an answer is generated: all tokens before the last answer."""
        parts, special = self.parts(example)
        ids = [] if special else list(self.text.start)
        for part, learn in parts[:-1] if parts[-1][1] else parts:
            ids += self.text.encode(part, special=special)
            if learn and not special:
                ids.append(self.text.eos_id)
        return ids

    def expected(self, example: Example) -> str:
        """The answer as a model generates it: with tool calls, in the form of the chat template."""
        if not (example.turns and example.turns[-1].get("tool_calls")):
            return example.answer
        parts, special = self.parts(example)
        return self.text.decode(self.text.encode(parts[-1][0], special=special))

    def option(self, option: str) -> list[int]:
        """The tokens of one of the options of an example."""
        return self.text.encode(option)


def _plain_chat(example: Example) -> list[Part]:
    parts: list[Part] = []
    tools = "".join(f"{json.dumps(tool, ensure_ascii=False)}\n" for tool in example.tools)
    before = f"### Tools:\n{tools}\n" if tools else ""
    for role, content in example.messages:
        if role == "assistant":
            parts += [(f"{before}### Assistant:\n", False), (content, True)]
            before = ""
        else:
            title = "System" if role == "developer" else role.capitalize()
            before += f"### {title}:\n{content}\n\n"
    return [*parts, (f"{before}### Assistant:\n", False)] if before else parts
