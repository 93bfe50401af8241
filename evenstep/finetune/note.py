"""What a fine-tuned model's folder says of itself beside Hugging Face's files: ``evenstep.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from evenstep.errors import EvenstepError
from evenstep.finetune.examples import Example

FILE = "evenstep.json"
FORMS = ("chat", "instruction", "plain")


@dataclass(frozen=True)
class Note:
    """The library that opens the model, how its prompts were written (``form``, and ``template`` for instructions),
    and the low-bit recipe that it was trained with."""

    library: str
    form: str = "plain"
    template: str | None = None
    lowbit: str | None = None

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def question(self, prompt: str) -> Example:
        """``prompt`` as an example whose answer is to be written."""
        if self.form == "chat":
            return Example("the prompt", messages=(("user", prompt),))
        return Example("the prompt", prompt=prompt, instruction=prompt if self.form == "instruction" else None)


def form_of(example: Example) -> str:
    return "chat" if example.messages else "instruction" if example.instruction is not None else "plain"


def read_note(folder: Path) -> Note | None:
    """None where there is no such file; EvenstepError for one that cannot be read."""
    path = folder / FILE
    try:
        note = Note(**json.loads(path.read_text(encoding="utf-8")))
        texts = (note.template, note.lowbit)
        if note.library not in ("evenstep", "transformers") or note.form not in FORMS:
            raise ValueError(f"library {note.library!r}, form {note.form!r}")
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError("template and lowbit must be texts")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise EvenstepError(f"{path} cannot be read ({problem}); mend it, or take it away") from None
    return note
