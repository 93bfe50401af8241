"""The model card of an exported run, and its upload to the Hugging Face Hub.

A card is the README.md of a model directory: the front matter that the Hub indexes, and what a reader has to know to
judge the model: data, tokens, losses, spikes and configuration. Every number is read from the files of the run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError, first_line
from evenstep.telemetry.facts import spikes
from evenstep.telemetry.schema import iter_records
from evenstep.train.checkpoint import read_manifest, read_trainer
from evenstep.train.config_io import is_tuned, read_toml
from evenstep.train.log import short_count

CARD = "README.md"
CURVE = "loss.png"
VALIDATIONS = 10
"""Largest number of validation losses in a card."""

FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [evenstep, {optimizer}]
---
"""

LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
```
"""


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The directory of the run of `evenstep pretrain` that a checkpoint belongs to. None for one of `evenstep
    finetune`, whose data and losses are of another kind than those of a card, and for a directory without a run."""
    run = checkpoint.parent.parent
    config = run / "config.toml"
    if checkpoint.parent.name != "checkpoints" or not config.is_file() or is_tuned(read_toml(config)):
        return None
    return run


def write_card(run: Path, checkpoint: Path, parameters: int, directory: Path) -> None:
    """Write the card of ``checkpoint`` of ``run`` into ``directory``, with the picture of the losses if there is one.

    Args:
        run: a directory of `evenstep pretrain`.
        checkpoint: what is exported, with intact files. Losses and events of later steps are left out.
        parameters: number of parameters of the model.
        directory: receives README.md and loss.png.

    Raises:
        OSError: a file that cannot be read or written.
    """
    # Not `facts_of_checkpoint`, which reads the whole checkpoint again for its checksums
    step, tokens = read_manifest(checkpoint)["step"], read_trainer(checkpoint)["tokens"]
    picture = run / "curve.png"
    # The picture is of the whole run, so it belongs to the last checkpoint only
    shown = picture.is_file() and step >= _last_step(run)
    if shown:
        shutil.copyfile(picture, directory / CURVE)
    toml = (run / "config.toml").read_text(encoding="utf-8")
    text = card(read_toml(run / "config.toml"), _until(run, step), step, tokens, parameters, toml)
    if shown:
        text = text.replace("## Losses\n", f"## Losses\n\n![Loss over steps]({CURVE})\n", 1)
    (directory / CARD).write_text(text, encoding="utf-8")


def _until(run: Path, step: int) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [one for one in iter_records(path) if one and one.get("step", 0) <= step] if path.is_file() else []


def _last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    records = iter_records(path, telemetry=False) if path.is_file() else ()
    return max((one["step"] for one in records if one), default=0)


def card(
    config: dict[str, Any], records: list[dict[str, Any]], step: int, tokens: int, parameters: int, toml: str
) -> str:
    """The text of a card from the configuration of a run, its log up to ``step``, the tokens seen by then, and the
    recipe."""
    optim, train, data = config["optim"], config["train"], config["data"]
    precision, init = config.get("lowbit") or train.get("dtype", "fp32"), config["model"].get("init")
    rows = [
        ("parameters", f"{parameters:,}"),
        ("data", f"`{data['source']}`"),
        ("tokens seen", short_count(tokens)),
        ("steps", f"{step:,}"),
        ("tokens per step", f"{train['batch_size']} x {train['seq_len']}"),
        ("optimizer", f"{optim['name']}, learning rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}"),
        ("precision", str(precision)),
        ("seed", str(config.get("seed", 0))),
    ]
    parts = [
        FRONT_MATTER.format(optimizer=optim["name"].replace(":", "-")),
        f"# {config['name']}\n",
        f"A language model trained with evenstep from {f'the weights of `{init}`' if init else 'random weights'}. It "
        "continues text, and has not been tested for any use.\n",
        _table(("", ""), rows),
        "## Losses\n",
        _losses(records),
        "## Spikes\n",
        _spikes(records),
        "## How to load it\n",
        LOAD,
        "## Configuration\n",
        f"```toml\n{toml.strip()}\n```\n",
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _losses(records: list[dict[str, Any]]) -> str:
    found = [one for one in records if one.get("val_loss") is not None]
    if not found:
        return "There was no validation.\n"
    every = -(-len(found) // VALIDATIONS)  # rounded up
    chosen = found[::-1][::every][::-1]  # the last one is among them
    rows = [(f"{one['step']:,}", f"{one['val_loss']:.4f}", f"{one['perplexity']:.2f}") for one in chosen]
    return _table(("step", "validation loss (nats per token)", "perplexity"), rows)


def _spikes(records: list[dict[str, Any]]) -> str:
    """What the telemetry recorded: spikes of gradients and losses, and the actions of a guard."""
    if not any(one.get("kind") == "start" for one in records):
        return "The run was not monitored.\n"
    found = spikes(records)
    largest = "{ratio:.0f} times the usual size, `{tensor}`, step {step:,}".format(**found) if "ratio" in found else "-"
    rows = [
        ("steps on which a gradient spiked", f"{found['count']}"),
        ("largest", largest),
        ("steps on which the loss spiked", f"{sum(one.get('event') == 'loss_spike' for one in records)}"),
        ("actions of the guard", f"{found['actions']}"),
    ]
    return _table(("", ""), rows)


# ---- upload ----


def manifest(directory: Path) -> list[str]:
    """A line for each file that an upload of ``directory`` would send, with its size, and a line with the sum."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    lines = [f"  {size:>15,}  {path.relative_to(directory)}" for size, path in zip(sizes, files, strict=True)]
    return [*lines, f"  {sum(sizes):>15,}  bytes in {len(files)} files"]


def check_repository(name: str) -> None:
    """EvenstepError if ``name`` is no name of a repository on the Hub, or huggingface_hub is not installed."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise EvenstepError(f"--push {name}: not the name of a repository; give OWNER/NAME")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise EvenstepError("--push needs huggingface_hub; pip install 'evenstep[hf]'") from None


def push(directory: Path, repository: str, public: bool, say: Callable[[str], None]) -> None:
    """Upload ``directory`` to the Hub, into a private repository unless ``public``. The token is that of
    ``hf auth login`` or HF_TOKEN. EvenstepError if the upload fails; the directory stays as it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as problem:  # of the network, the token or the Hub
        raise EvenstepError(
            f"could not upload to {repository}: {first_line(problem)}; {directory} is complete, and "
            f"`hf upload {repository} {directory}` tries again"
        ) from None
    say(f"uploaded to https://huggingface.co/{repository}")
