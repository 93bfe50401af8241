"""Runs on the disk: ``evenstep runs`` lists them, ``evenstep inspect`` describes a checkpoint, and ``evenstep rows``
prints rows of the training data. Listing runs does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError
from evenstep.paths import check_own_file, read_own
from evenstep.toml import parse_toml
from evenstep.train.checkpoint import (
    MANIFEST,
    PARENT,
    TRAINER,
    file_fault,
    list_checkpoints,
    read_manifest,
    read_trainer,
)
from evenstep.train.config import Config, model_label
from evenstep.train.config_io import build, config_file, is_tuned, read_toml
from evenstep.train.files import is_running
from evenstep.train.log import print_nothing, read_metrics

if TYPE_CHECKING:
    from evenstep.data.progress import PrepareProgress


@dataclass(frozen=True)
class RunRow:
    name: str
    when: str
    size: str
    optimizer: str
    steps: int
    val_loss: float | None
    status: str
    parent: Path | None = None
    """The run from whose checkpoint this one went on."""
    path: Path | None = None


def list_runs(directory: Path) -> list[RunRow]:
    """The runs in ``directory``, the newest first; ``directory`` may also be a run itself. EvenstepError when it does
    not exist.

    The status is "running" if a process holds the lock of the run, "finished" if the run has a summary, "unreadable"
    if one of its files is damaged or is a link out of its directory, and "interrupted" otherwise.
    """
    if not directory.is_dir():
        raise EvenstepError(
            f"{directory}: no such directory; give the directory of your runs (evenstep pretrain creates runs/)"
        )
    configs = [path for path in (directory / "config.toml", *directory.glob("*/config.toml")) if os.path.lexists(path)]
    return _as_tree([_row(path) for path in sorted(configs, key=_changed, reverse=True)])


def _as_tree(rows: list[RunRow]) -> list[RunRow]:
    """Each row followed by those of its children, whose names are indented."""
    known = {row.path for row in rows}

    def below(parent: Path | None, depth: int) -> Iterator[RunRow]:
        for row in rows:
            if parent == row.parent or (parent is None and row.parent not in known):
                yield replace(row, name="  " * (depth - 1) + "+ " + row.name) if depth else row
                yield from below(row.path, depth + 1)

    return list(below(None, 0))


def _changed(path: Path) -> float:
    return os.lstat(path).st_mtime


def _row(config: Path) -> RunRow:
    run = config.parent
    when = f"{datetime.fromtimestamp(_changed(config)):%Y-%m-%d %H:%M}"
    try:
        tables = parse_toml(read_own(run, config.name))
        records = []
        if os.path.lexists(run / "metrics.jsonl"):
            check_own_file(run, "metrics.jsonl")
            records = read_metrics(run / "metrics.jsonl")
        size, optimizer = model_label(tables["model"]), tables["optim"]["name"]
        finished = os.path.lexists(run / "summary.json") and bool(json.loads(read_own(run, "summary.json")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RunRow(run.name, when, "", "", 0, None, "unreadable", None, run.resolve())
    status = "running" if is_running(run) else "finished" if finished else "interrupted"
    parent = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        parent = Path(json.loads(read_own(run, PARENT))["run"])
    losses = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    steps = max((record["step"] for record in records), default=0)
    loss = losses[-1] if losses else None
    return RunRow(run.name, when, size, optimizer, steps, loss, status, parent, run.resolve())


def table(rows: list[RunRow]) -> str:
    """The rows as text in aligned columns, with a header line."""
    cells = [("name", "when", "size", "optimizer", "steps", "val loss", "status")]
    for row in rows:
        loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
        cells.append((row.name, row.when, row.size, row.optimizer, str(row.steps), loss, row.status))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        padded = [
            text.rjust(w) if i in (4, 5) else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


# ---- evenstep inspect ----


def inspect(path: Path, *, everything: bool, as_json: bool) -> None:
    """Print the content of the checkpoint ``path``, or of the newest checkpoint of the run ``path``.

    EvenstepError when ``path`` is neither, and, after printing, when a file of the checkpoint is damaged.
    """
    checkpoint, others = _checkpoint(path)
    facts = facts_of_checkpoint(checkpoint)
    print(json.dumps(facts, indent=1) if as_json else "\n".join([*_lines(facts, everything), *others]))
    broken = [f"{name} {fault}" for name, fault in facts["faults"].items()]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise EvenstepError(f"{checkpoint} is damaged: {broken[0]}{more}; a resume skips it")


def _checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint, and lines about the older checkpoints of its run."""
    if not path.is_dir():
        raise EvenstepError(f"{path}: no such directory; give a run or one of its checkpoints")
    if (path / MANIFEST).exists():
        return path, []
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise EvenstepError(
            f"{path} is neither a checkpoint ({MANIFEST} is missing) nor a run with checkpoints; give one of them"
        )
    older = ", ".join(other.name for other in found[1:])
    return found[0], ["", f"older checkpoints of this run: {older}"] if older else []


def facts_of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint as plain values.

    The keys are ``step``, ``tokens``, ``world_size``, ``model``, ``optimizer``, ``files`` (name -> bytes), ``tensors``
    (name -> shape, dtype, bytes) and ``faults`` (file -> description). An entry that cannot be read is None or empty,
    and its file is listed in ``faults``. EvenstepError when the manifest cannot be read.
    """
    manifest = read_manifest(checkpoint)
    faults = {name: file_fault(checkpoint, name, facts) for name, facts in sorted(manifest["files"].items())}
    found: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "tokens": None,
        "world_size": manifest["world_size"],
        "model": None,
        "optimizer": None,
        "files": {name: facts["bytes"] for name, facts in sorted(manifest["files"].items())},
        "tensors": {},
        "faults": {name: fault for name, fault in faults.items() if fault},
    }
    for name, read in ((TRAINER, _read_trainer), ("the shards", _read_shards)):
        try:
            found |= read(checkpoint)
        except Exception as problem:  # a damaged file: the parsers raise exceptions of any type
            found["faults"].setdefault(name, "cannot be read: " + next(iter(str(problem).splitlines()), "no reason"))
    return found


def _read_trainer(checkpoint: Path) -> dict[str, Any]:
    from evenstep.baselines.catalog import allow_known_state

    allow_known_state()
    trainer = read_trainer(checkpoint)
    config = trainer["config"]
    return {
        "tokens": int(trainer["tokens"]),
        "model": model_label(config["model"]),
        "optimizer": {key: value for key, value in config["optim"].items() if isinstance(value, str | int | float)},
    }


def _read_shards(checkpoint: Path) -> dict[str, Any]:
    from evenstep.train.checkpoint import reader

    tensors = {}
    for name, facts in sorted(reader(checkpoint).read_metadata().state_dict_metadata.items()):
        dtype = facts.properties.dtype
        tensors[name] = {
            "shape": list(facts.size),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": facts.size.numel() * dtype.itemsize,
        }
    return {"tensors": tensors}


def _lines(facts: dict[str, Any], everything: bool) -> list[str]:
    count, whole = len(facts["files"]), _size(sum(facts["files"].values()))
    state = f"{len(facts['faults'])} faults" if facts["faults"] else "all checksums match"
    tokens = "unknown" if facts["tokens"] is None else f"{facts['tokens']:,}"
    by = f"{facts['world_size']} process{'es' * (facts['world_size'] > 1)}"
    optimizer = ", ".join(f"{key} {value}" for key, value in (facts["optimizer"] or {"name": "unknown"}).items())
    lines = [
        f"{facts['checkpoint']}: {state}",
        f"step {facts['step']}, {tokens} tokens, written by {by}, {whole} in {count} files",
        f"model {facts['model'] or 'unknown'}; optimizer: {optimizer.removeprefix('name ')}",
        "",
    ]
    for name, size in facts["files"].items():
        lines.append(f"  {name:52} {_size(size):>10}  {facts['faults'].get(name, 'ok')}")
    lines += [f"  {name:52} {'':>10}  {fault}" for name, fault in facts["faults"].items() if name not in facts["files"]]
    return [*lines, "", *_tensor_lines(facts["tensors"], everything)]


def _tensor_lines(tensors: dict[str, Any], everything: bool) -> list[str]:
    lines = []
    entries: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors.items():
        if name.startswith("model.") or everything:
            lines.append(f"  {name:60} {tensor['shape']!s:16} {tensor['dtype']:9} {_size(tensor['bytes']):>10}")
        else:
            entries.setdefault((name.rpartition(".")[2], tensor["dtype"]), []).append(tensor["bytes"])
    for (entry, dtype), sizes in sorted(entries.items()):
        what = f"optimizer: {entry} of {len(sizes)} parameters"
        lines.append(f"  {what:60} {'':16} {dtype:9} {_size(sum(sizes)):>10}")
    return lines


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


# ---- evenstep rows ----


def parse_rows(text: str) -> tuple[int, int]:
    """The first row and one past the last row of A-B, the notation of spike events. A single number is one row.

    >>> parse_rows("264-272"), parse_rows("264")
    ((264, 272), (264, 265))
    """
    first, dash, past = text.partition("-")
    if not (first.isascii() and first.isdigit() and (not dash or (past.isascii() and past.isdigit()))):
        raise EvenstepError(
            f"'{text}' is not a range of rows; give A-B, the first row and one past the last, such as 264-272"
        )
    start, stop = int(first), int(past) if dash else int(first) + 1
    if not start < stop < 2**62:
        raise EvenstepError(f"'{text}' contains no rows: B of A-B is one past the last row; give a B above A")
    return start, stop


def rows_of(directory: Path, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """A header and the text of each of the rows ``start`` to ``stop - 1`` of a pretraining or fine-tuning run.

    Rows are numbered from 0 in the order in which the run reads them, over all epochs. EvenstepError, before the first
    row, when ``directory`` is not a run, or when its data have changed.
    """
    tables = read_toml(config_file(directory))
    if is_tuned(tables):
        return _tuning_rows(tables, start, stop)
    return _training_rows(directory, build(tables))(start, stop)


def prepared_rows(directory: Path) -> Callable[[int, int], Iterator[tuple[str, str]]] | None:
    """`rows_of` for several ranges of rows of one run, where that is cheap: None for a fine-tuning run, whose rows need
    its model, for a source on the network, and where the tokens are not in the cache."""
    tables = read_toml(config_file(directory))
    if is_tuned(tables):
        return None
    config = build(tables)
    if config.data.source.startswith("hf:"):
        return None
    try:
        return _training_rows(directory, config, progress=_refuse_work)
    except _NotPrepared:
        return None


class _NotPrepared(Exception):
    """The tokens of a run are not in the cache."""


def _refuse_work(progress: PrepareProgress) -> None:
    if not progress.note:  # a note is a fact about tokens that are there; anything else is work
        raise _NotPrepared


def _training_rows(
    directory: Path, config: Config, progress: Callable[[PrepareProgress], None] | None = None
) -> Callable[[int, int], Iterator[tuple[str, str]]]:
    from evenstep.data import BatchLoader
    from evenstep.train.task import data_identity, load_data

    data = load_data(config, progress)
    newest = next(iter(list_checkpoints(directory / "checkpoints")), None)
    if newest is not None and read_trainer(newest)["data"] != data_identity(data):
        raise EvenstepError(
            f"{directory} was trained on other tokens than {config.data.source} has now (the text has changed); "
            "restore the text"
        )
    length = config.train.seq_len
    loader = BatchLoader(data.train, length, config.train.batch_size, config.seed)
    if config.data.bad_batch:
        loader.randomise(config.data.bad_batch, data.vocab_size)
    tokenizer = data.tokenizer

    def rows(start: int, stop: int) -> Iterator[tuple[str, str]]:
        for row in range(start, stop):
            [window], [tokens] = loader.sequence_ids(row, row + 1).tolist(), loader.read_rows(row, row + 1).tolist()
            what = f"tokens {window * length:,}-{(window + 1) * length + 1:,}"
            if row in loader.random_rows:
                what = f"random tokens (data.bad_batch {config.data.bad_batch})"
            yield _head(row, loader, what), tokenizer.decode(tokens)

    return rows


def _tuning_rows(tables: dict[str, Any], start: int, stop: int) -> Iterator[tuple[str, str]]:
    import torch

    from evenstep.finetune.config import FineTuneConfig
    from evenstep.finetune.data import RowLoader
    from evenstep.finetune.task import FineTuning
    from evenstep.train.distributed import World

    task = FineTuning(World(torch.device("cpu")), print_nothing)
    config = task.resolve(build(tables, FineTuneConfig))  # loads the model, which decides whether rows are packed
    data = task.data
    loader = RowLoader(data.train, config.train.batch_size, config.seed)

    def rows() -> Iterator[tuple[str, str]]:
        for row in range(start, stop):
            [place] = loader.sequence_ids(row, row + 1).tolist()
            texts = []
            for document in data.train[place]:
                label = "" if document.targets.ndim else f"\nlabel: {data.labels[int(document.targets)]}"
                last = [int(document.targets[-1])] if document.targets.ndim and document.targets[-1] >= 0 else []
                texts.append(data.tokenizer.decode([*document.inputs.tolist(), *last]) + label)
            count = len(texts)
            yield _head(row, loader, f"{count} example{'s' if count > 1 else ''}"), "\n--\n".join(texts)

    return rows()


def _head(row: int, loader: Any, what: str) -> str:
    return f"row {row}: epoch {row // loader.sequences_per_epoch + 1}, {what}"
