"""Which model ``MODEL`` stands for, and how it is opened: by evenstep or by transformers, whole or with adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.hub import HubCausal, HubClassifier, hushed, positions_of, sees_later_tokens
from evenstep.finetune.note import read_note
from evenstep.optim.groups import HEADS
from evenstep.train import weights
from evenstep.train.checkpoint import MANIFEST
from evenstep.train.hardware import pick_device
from evenstep.train.weights import load_model

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A folder with ``config.json``, weights and tokenizer, and the library that opens it."""

    folder: Path
    library: str


def find_source(path: Path, library: str, say: Say) -> Source:
    """The source that ``path`` stands for, see `evenstep.train.weights.find_source`, and who opens it."""
    folder = weights.find_source(path, say, "model.path")
    if library != "auto":
        return Source(folder, library)
    note = read_note(folder)
    if note is not None:
        return Source(folder, note.library)
    ours = (folder / MANIFEST).is_file() or _facts(folder).get("model_type") == "evenstep_llama"
    return Source(folder, "evenstep" if ours else "transformers")


def classes_of(folder: Path) -> list[str]:
    """The names of the classes that a classifier was trained on, none of what is none."""
    facts = _facts(folder)
    names = facts.get("id2label")
    if not _classifies(facts) or not isinstance(names, dict):
        return []
    try:
        return [str(names[key]) for key in sorted(names, key=int)]
    except ValueError:
        return []


def _classifies(facts: dict[str, Any]) -> bool:
    return any(str(kind).endswith("ForSequenceClassification") for kind in facts.get("architectures") or [])


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise EvenstepError(f"{folder / 'config.json'} cannot be read; it must be a JSON object") from None


def open_model(config: FineTuneConfig, source: Source, labels: Sequence[str], say: Say) -> Any:
    """The model on the CPU, every weight that is to be trained with ``requires_grad``; a classifier's new last layer is
    drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    if source.library == "evenstep":
        model: Any = _ours(config, source, labels).to(dtype)
    else:
        model = _hub(config, source, labels, dtype, say)
    if config.tune.adapter == "lora":
        add_lora(model, config, labels)
        for line in adapted_told(model, config):
            say(line)
    return model


def _ours(config: FineTuneConfig, source: Source, labels: Sequence[str]) -> Any:
    if labels:
        raise EvenstepError(
            f"{source.folder} is a model of ours, which writes text; put texts into classes with a transformers "
            "classifier, or write the label as an answer (prompt, response)"
        )
    model = load_model(source.folder)
    if config.train.seq_len > model.config.max_seq_len:
        raise EvenstepError(
            f"train.seq_len {config.train.seq_len} is longer than the {model.config.max_seq_len} positions of the "
            f"model of {source.folder}; give at most that"
        )
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def _hub(config: FineTuneConfig, source: Source, labels: Sequence[str], dtype: torch.dtype, say: Say) -> Any:
    if config.train.compile:
        raise EvenstepError("train.compile is for models of ours; leave it out for one of transformers")
    if isinstance(config.train.loss_chunk, int) and config.train.loss_chunk:
        raise EvenstepError("train.loss_chunk is for models of ours; leave it out for one of transformers")
    net, new = load_hub(source.folder, labels, dtype)
    if new:
        say(f"new weights, drawn from seed {config.seed}: {', '.join(new)}")
    longest = positions_of(net)
    if longest and config.train.seq_len > longest:
        raise EvenstepError(
            f"train.seq_len {config.train.seq_len} is longer than the {longest} positions of {source.folder}; "
            "give at most that"
        )
    if config.train.activation_checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return HubClassifier(net) if labels else HubCausal(net)


def load_hub(folder: Path, labels: Sequence[str], dtype: torch.dtype | str) -> tuple[Any, list[str]]:
    """The model by transformers, a classifier where there are ``labels``, and the names of its weights that the folder
    lacks, which are drawn: only a classifier may have such. EvenstepError for what cannot be opened."""
    try:
        import transformers
    except ImportError:
        raise EvenstepError(f"{folder} needs the package transformers; pip install 'evenstep[finetune]'") from None
    kind: Any = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    if not labels:
        _check_writes(folder, transformers)
    options: dict[str, Any] = {"local_files_only": True, "dtype": dtype}
    if labels:
        names = dict(enumerate(labels))
        options |= {"num_labels": len(labels), "id2label": names, "label2id": {n: i for i, n in names.items()}}
        options["ignore_mismatched_sizes"] = True
    with hushed():
        try:
            net, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as problem:  # whatever its parsers raise
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise EvenstepError(f"transformers cannot open {folder}: {first}") from None
    new = sorted(report["missing_keys"])
    if new and not labels:
        raise EvenstepError(f"{folder} lacks {new[0]} of a {type(net).__name__}; it is another model")
    if not labels:
        _check_causal(net, folder)
    return net, new


_CLASSIFIES = "give a causal language model, or examples with text and label for a classifier"


def _check_writes(folder: Path, transformers: Any) -> None:
    """EvenstepError for an architecture that is known to write no text of its own, before its weights are read."""
    with hushed():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as problem:  # whatever its parsers raise
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise EvenstepError(f"transformers cannot open {folder}: {first}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise EvenstepError(
            f"{folder} is an encoder-decoder ({config.model_type}), which writes from another text; {_CLASSIFIES}"
        )
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise EvenstepError(f"transformers has no causal language model of type {config.model_type}; {_CLASSIFIES}")


def _check_causal(net: Any, folder: Path) -> None:
    name = type(net).__name__
    was_training = net.training
    try:
        leaks = sees_later_tokens(net.eval())
    except Exception as problem:  # whatever a model raises that wants more than tokens
        first = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise EvenstepError(f"{folder}: {name} does not run on a row of tokens alone: {first}") from None
    finally:
        net.train(was_training)
    if leaks:
        raise EvenstepError(f"{folder} is a {name}, whose outputs see later tokens: it writes no text; {_CLASSIFIES}")


def open_to_write(source: Source) -> Any:
    """The model in eval mode, to write text with. EvenstepError for one that puts texts into classes."""
    if source.library == "evenstep":
        return load_model(source.folder).eval()
    if _classifies(_facts(source.folder)):
        raise EvenstepError(
            f"{source.folder} puts texts into classes and writes none; evenstep finetune {source.folder} --data FILE "
            "--evaluate scores it"
        )
    return HubCausal(load_hub(source.folder, (), "auto")[0]).to(pick_device("auto")).eval()


def add_lora(model: Any, config: FineTuneConfig, labels: Sequence[str]) -> None:
    """Put peft's adapters into the linear layers, in place: they alone are trained then, and a classifier's last
    layer. ``model.adapted`` is peft's model around it, outside of the module tree."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise EvenstepError("tune.adapter lora needs the package peft; pip install 'evenstep[finetune]'") from None
    net = getattr(model, "net", model)
    tune = config.tune
    names = linear_names(net) if tune.targets == "all-linear" else [name.strip() for name in tune.targets.split(",")]
    kind = None if net is model else ("SEQ_CLS" if labels else "CAUSAL_LM")
    options: dict[str, Any] = {"r": tune.rank, "lora_alpha": tune.alpha, "lora_dropout": tune.dropout}
    lora = LoraConfig(**options, target_modules=names, task_type=kind)
    try:
        adapted = get_peft_model(net, lora)
    except ValueError as problem:
        first = next(iter(str(problem).splitlines()), "")
        raise EvenstepError(f"tune.targets {tune.targets}: {first}") from None
    object.__setattr__(model, "adapted", adapted)


def adapted_told(model: Any, config: FineTuneConfig) -> list[str]:
    """What has an adapter, and which matrices are left as they are, with their share of the parameters."""
    net = getattr(model, "net", model)
    adapted = {path: module for path, module in net.named_modules() if hasattr(module, "lora_A")}
    names = sorted({path.rsplit(".", 1)[-1] for path in adapted})
    lines = [f"LoRA of rank {config.tune.rank} in {len(adapted)} layers: {', '.join(names)}"]
    inside = {id(p) for module in adapted.values() for p in module.parameters()}
    total = sum(p.numel() for p in net.parameters())
    frozen: dict[str, int] = {}
    stacked = False
    for path, p in net.named_parameters():
        if p.requires_grad or id(p) in inside or p.dim() < 2:
            continue
        name = re.sub(r"^\d+\.|(?<=\.)\d+\.", "", path).removesuffix(".weight")
        name = ".".join(name.split(".")[-2:])
        experts = p.dim() > 2 and not path.endswith(".weight")
        stacked |= experts
        name += " (stacked)" if experts else ""
        frozen[name] = frozen.get(name, 0) + p.numel()
    if frozen:
        shares = (f"{name} {count / total:.1%}" for name, count in sorted(frozen.items(), key=lambda x: -x[1]))
        lines.append(f"neither adapted nor trained, of all parameters: {', '.join(shares)}")
    if stacked:
        lines.append("stacked: the weights of all experts are one parameter, no linear layers, which adapters go into")
    return lines


def linear_names(net: nn.Module) -> list[str]:
    """The last names of the linear layers, the model's own last layer left out."""
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear) or _transposed(module)]
    return sorted({path.rsplit(".", 1)[-1] for path in linear} - set(HEADS))


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's
