"""What a fine-tuning run leaves for other programs: ``model/`` in Hugging Face layout, adapters merged, and of adapters
``adapter/`` as peft writes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evenstep.errors import EvenstepError
from evenstep.finetune.hub import hushed
from evenstep.models import Llama
from evenstep.train.weights import PRODUCT, write_hf

if TYPE_CHECKING:
    from evenstep.finetune.run import Tuning


def write_products(run: Tuning) -> None:
    """Each folder is the old one or the new one, never half of one. Merging changes the model, whose run is over.
    EvenstepError on a full disk."""
    adapted = getattr(run.model, "adapted", None)
    if adapted is not None:
        _replace(run.out / "adapter", lambda folder: adapted.save_pretrained(folder))
        adapted.merge_and_unload()
    _replace(run.out / PRODUCT, lambda folder: _write_model(run, folder))


def _write_model(run: Tuning, folder: Path) -> None:
    if isinstance(run.model, Llama):
        write_hf(run.model, run.task.tokenizer, folder)
    else:
        with hushed():
            run.model.net.save_pretrained(folder)
        run.task.tokenizer.save(folder)
    run.note().save(folder)


def _replace(place: Path, write: Callable[[Path], None]) -> None:
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise EvenstepError(f"could not write {place}: {problem.strerror or problem}; make room there") from problem
