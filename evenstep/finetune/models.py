"""Models to fine-tune: resolving a path, loading the model by evenstep or transformers, adapters, and evenstep.json,
the description of a fine-tuned model in its directory.

A wrapper gives models of transformers the interface of `evenstep.models.Llama` that a run needs, ``loss(tokens,
targets, positions=...)``. It adds the prefix ``net.`` to the names of their parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.errors import EvenstepError, first_line
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.examples import Example
from evenstep.models.hub import (
    HubLM,
    HubModel,
    hushed,
    ordinary_tokens,
    positions_of,
    recompute_blocks,
    sees_later_tokens,
)
from evenstep.models.ops import document_mask
from evenstep.optim.groups import HEADS
from evenstep.train import weights
from evenstep.train.checkpoint import MANIFEST
from evenstep.train.hardware import pick_device
from evenstep.train.weights import check_positions, load_model

# ---- evenstep.json ----

NOTE = "evenstep.json"
FORMS = ("chat", "instruction", "plain")


@dataclass(frozen=True)
class Note:
    """The content of evenstep.json: the library that loads the model, the format of its prompts (``form``, and
    ``template`` for instructions), and the low-bit recipe with which it was trained."""

    library: str
    form: str = "plain"
    template: str | None = None
    lowbit: str | None = None

    def save(self, folder: Path) -> None:
        (folder / NOTE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def question(self, prompt: str) -> Example:
        """``prompt`` as an example without an answer, which the model generates."""
        if self.form == "chat":
            return Example("the prompt", messages=(("user", prompt),))
        return Example("the prompt", prompt=prompt, instruction=prompt if self.form == "instruction" else None)


def form_of(example: Example) -> str:
    return "chat" if example.messages else "instruction" if example.instruction is not None else "plain"


def read_note(folder: Path) -> Note | None:
    """The content of evenstep.json; None if there is no such file. EvenstepError when it cannot be read."""
    path = folder / NOTE
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
        raise EvenstepError(f"{path} cannot be read ({problem}); correct or delete it") from None
    return note


# ---- models of transformers ----


MASKS = ("own", "layers", "one")
"""Ways to separate documents in a row; the positions restart in each document in all of them.

* own: the model derives its masks from the positions (transformers 4.53 and later), per layer with window or chunk.
* layers: the same masks, created here, for models that do not pass their positions to the creation of masks.
* one: one mask for all layers, for models without windows.
"""


class HubCausal(HubModel):
    packs = True
    """Whether several documents may share a row. False: each row is one document, padded at its end."""

    masks = "own"
    """How documents in a row are separated, one of `MASKS`."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab], as from `evenstep.models.Llama.forward`. ``tokens`` and ``positions`` are int64 [B, T];
        position -1 is padding."""
        if positions is None:
            return self.net(input_ids=tokens, use_cache=False).logits
        if not self.packs:
            # The model uses its own positions and masks: in a causal model the padding at the end of a row cannot
            # influence the tokens before it. Padding is replaced by the first token, because transformers warns about
            # a missing mask when it sees a padding token.
            return self.net(input_ids=torch.where(positions < 0, tokens[:, :1], tokens), use_cache=False).logits
        return self.net(
            input_ids=tokens, attention_mask=self._mask(positions), position_ids=positions.clamp(min=0), use_cache=False
        ).logits

    def _mask(self, positions: Tensor) -> Any:
        if self.masks == "own":
            return None
        dtype = self.net.dtype
        if self.masks == "layers":
            from transformers.masking_utils import create_masks_for_generate

            like = torch.empty(*positions.shape, 1, dtype=dtype, device=positions.device)
            return create_masks_for_generate(
                config=self.net.config, inputs_embeds=like, attention_mask=None, cache=None,
                position_ids=positions.clamp(min=0),
            )  # fmt: skip
        mask = document_mask(positions)
        if self.net.config._attn_implementation == "sdpa":
            return mask
        lowest = torch.finfo(dtype).min  # eager attention adds the mask to its scores
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """Like `evenstep.models.Llama.loss`; ``chunk`` must be None."""
        counts = targets != -100  # bool [B, T]; [counts] keeps the rows of logits [number of learned targets, vocab]
        return F.cross_entropy(self(tokens, positions)[counts].float(), targets[counts], reduction=reduction)


class HubClassifier(HubModel):
    """A sequence classifier of transformers."""

    def pad_with(self, token: int) -> None:
        """Use ``token`` as padding if the model has no padding token. A decoder classifies by the last token before the
        padding, which it finds by the padding token."""
        own = self.net.config.get_text_config()
        if getattr(own, "pad_token_id", None) is None:
            own.pad_token_id = token

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, classes] for one text per row. ``tokens`` and ``positions`` are int64 [B, T]."""
        here = positions >= 0
        padded = tokens.masked_fill(~here, self.net.config.get_text_config().pad_token_id or 0)
        return self.net(input_ids=padded, attention_mask=here.long()).logits

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """Cross entropy of the classes int64 [B]."""
        return F.cross_entropy(self(tokens, positions).float(), targets, reduction=reduction)


# ---- abilities of a model, found by tests ----


@torch.no_grad()
def keeps_documents_apart(model: HubCausal, longest: int | None = None) -> bool:
    """Whether documents that share a row have the same logits as in separate rows. Sets ``model.packs`` and
    ``model.masks``.

    Not every architecture accepts positions or a mask of documents; some attend to a window or a chunk only, and some
    carry a state along the row. Therefore the logits are compared at every position, in rows of ``longest`` tokens, the
    length of rows in training. None: rows of up to 512 tokens.
    """
    was_training = model.training
    model.eval()
    try:
        for model.masks in MASKS:
            model.packs = True
            try:
                model.packs = _same_as_alone(model, longest or min(512, positions_of(model.net.config) or 512))
            except Exception:  # an argument that the model does not have: any type of exception
                model.packs = False
            if model.packs:
                break
    finally:
        model.train(was_training)
    return model.packs


def _same_as_alone(model: HubCausal, longest: int) -> bool:
    """The test of `keeps_documents_apart`. The scale of the allowed difference is the difference that attention between
    documents would make, which is small if attention has little influence, as in a model with small weights."""
    few = max(1, min(5, longest // 6))
    layouts = [[longest], [few, longest - 3 * few, 2 * few], [longest // 3, longest // 2]]
    # Rounding: 16-bit logits differ by a few percent between two ways to compute the same attention.
    share, floor = (1e-3, 1e-5) if model.net.dtype == torch.float32 else (0.2, 0.0)
    ids = ordinary_tokens(model.net, len(layouts) * longest).view(len(layouts), longest)
    positions = torch.full_like(ids, -1)
    for row, lengths in zip(positions, layouts, strict=True):
        row[: sum(lengths)] = torch.cat([torch.arange(n, device=row.device) for n in lengths])
    worst, seen, sizes = [], [], []
    for rows in ([0], [1, 2]):
        packed, mixed = model(ids[rows], positions[rows]), model(ids[rows])
        for i, row in enumerate(rows):
            start = 0
            for length in layouts[row]:
                part = slice(start, start + length)
                alone = model(ids[row : row + 1, part])[0].float()
                off = (packed[i, part].float() - alone).norm(dim=-1)
                # The smaller of two neighbours: rounding may send one token to another expert of a mixture, which
                # changes one position; attention between documents changes many.
                worst.append(torch.minimum(off[:-1], off[1:]).max() if length > 1 else off.max())
                sizes.append(alone.norm(dim=-1).median())
                if start:
                    seen.append((mixed[i, part].float() - alone).norm(dim=-1).median())
                start += length
    allowed = share * torch.stack(seen).median() + floor * torch.stack(sizes).median()
    return bool(torch.stack(worst).max() <= allowed)


# ---- finding and loading a model ----


@dataclass(frozen=True)
class Source:
    """A directory with ``config.json``, weights and tokenizer, and the library that loads it."""

    folder: Path
    library: str


def find_source(path: Path, library: str, say: Callable[[str], None]) -> Source:
    """The directory that ``path`` stands for (see `evenstep.train.weights.find_source`), and the library that loads
    it."""
    folder = weights.find_source(path, say, "model.path")
    if library != "auto":
        return Source(folder, library)
    note = read_note(folder)
    if note is not None:
        return Source(folder, note.library)
    ours = (folder / MANIFEST).is_file() or _facts(folder).get("model_type") == "evenstep_llama"
    return Source(folder, "evenstep" if ours else "transformers")


def classes_of(folder: Path) -> list[str]:
    """The names of the classes of a classifier; empty for other models."""
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
        raise EvenstepError(f"{folder / 'config.json'} cannot be read; it has to be a JSON object") from None


def open_model(config: FineTuneConfig, source: Source, labels: Sequence[str], say: Callable[[str], None]) -> Any:
    """The model on the CPU; the weights to train have ``requires_grad``. A new last layer of a classifier is drawn from
    ``config.seed``."""
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    if source.library == "evenstep":
        model: Any = _ours(config, source, labels).to(dtype)
    else:
        model = _hub(config, source, labels, dtype, say)
    if config.tune.adapter == "lora":
        add_lora(model, config, labels)
        for line in describe_lora(model, config):
            say(line)
    return model


def fit_length(config: FineTuneConfig, folder: Path, say: Callable[[str], None]) -> FineTuneConfig:
    """``config`` with ``train.seq_len`` shortened to the positions of the model in ``folder``, if it is the default.
    Another length stays, and `check_positions` refuses it."""
    [default] = [field.default for field in fields(config.train) if field.name == "seq_len"]
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # reported when the model is loaded
        return config
    found = [shape.get(name) for name in ("max_position_embeddings", "n_positions")] if isinstance(shape, dict) else []
    positions = next((n for n in found if isinstance(n, int) and n > 1), config.train.seq_len)
    if config.train.seq_len != default or positions >= config.train.seq_len:
        return config
    say(f"train.seq_len is {positions} instead of {default}: the model of {folder} has no more positions")
    return replace(config, train=replace(config.train, seq_len=positions))


def _ours(config: FineTuneConfig, source: Source, labels: Sequence[str]) -> Any:
    if labels:
        raise EvenstepError(
            f"{source.folder} is a model of evenstep, which generates text; classify with a model of transformers, or "
            "give the label as an answer (prompt, response)"
        )
    model = load_model(source.folder)
    if isinstance(model, HubLM):
        raise EvenstepError(
            f"{source.folder} has a model of transformers; export it with evenstep export RUN --to hf --out DIR, and "
            "fine-tune DIR"
        )
    check_positions(config.train.seq_len, model.config.max_seq_len, source.folder)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def _hub(
    config: FineTuneConfig, source: Source, labels: Sequence[str], dtype: torch.dtype, say: Callable[[str], None]
) -> Any:
    if config.train.compile:
        raise EvenstepError("train.compile is only for models of evenstep; leave it out for a model of transformers")
    if isinstance(config.train.loss_chunk, int) and config.train.loss_chunk:
        raise EvenstepError("train.loss_chunk is only for models of evenstep; leave it out for a model of transformers")
    net, new = load_hub(source.folder, labels, dtype)
    if new:
        say(f"new weights, drawn from seed {config.seed}: {', '.join(new)}")
    longest = positions_of(net.config)
    if longest:
        check_positions(config.train.seq_len, longest, source.folder)
    if config.train.activation_checkpointing:
        recompute_blocks(net)
    return HubClassifier(net) if labels else HubCausal(net)


def load_hub(folder: Path, labels: Sequence[str], dtype: torch.dtype | str) -> tuple[Any, list[str]]:
    """A model of transformers, a classifier if there are ``labels``, and the names of its weights that the directory
    does not have, which are drawn. Only a classifier may have such weights. EvenstepError when it cannot be loaded."""
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
            raise EvenstepError(f"transformers cannot open {folder}: {first_line(problem)}") from None
    new = sorted(report["missing_keys"])
    if new and not labels:
        raise EvenstepError(f"{folder} has no {new[0]}, which a {type(net).__name__} needs; give another model")
    if not labels:
        _check_causal(net, folder)
    return net, new


_CLASSIFIES = "give a causal language model, or examples with text and label for a classifier"


def _check_writes(folder: Path, transformers: Any) -> None:
    """EvenstepError for an architecture that is no causal language model, before its weights are read."""
    with hushed():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as problem:  # whatever its parsers raise
            raise EvenstepError(f"transformers cannot open {folder}: {first_line(problem)}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise EvenstepError(
            f"{folder} is an encoder-decoder ({config.model_type}), not a causal language model; {_CLASSIFIES}"
        )
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise EvenstepError(f"transformers has no causal language model of type {config.model_type}; {_CLASSIFIES}")


def _check_causal(net: Any, folder: Path) -> None:
    name = type(net).__name__
    was_training = net.training
    try:
        leaks = sees_later_tokens(net.eval())
    except Exception as problem:  # a model that needs more than tokens: any type
        raise EvenstepError(f"{folder}: {name} does not run on a row of tokens alone: {first_line(problem)}") from None
    finally:
        net.train(was_training)
    if leaks:
        raise EvenstepError(f"{folder} is a {name}, whose outputs depend on later tokens; {_CLASSIFIES}")


def open_to_write(source: Source) -> Any:
    """The model in eval mode, for generation. EvenstepError for a classifier."""
    if source.library == "evenstep":
        return load_model(source.folder).eval()
    if _classifies(_facts(source.folder)):
        raise EvenstepError(
            f"{source.folder} is a classifier and generates no text; score it with: evenstep finetune {source.folder} "
            "--data FILE --evaluate"
        )
    return HubCausal(load_hub(source.folder, (), "auto")[0]).to(pick_device("auto")).eval()


def add_lora(model: Any, config: FineTuneConfig, labels: Sequence[str]) -> None:
    """Add peft's adapters to the linear layers, in place. Only the adapters and the last layer of a classifier are
    trained then. ``model.adapted`` is peft's wrapper of the model, outside of the module tree."""
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
        raise EvenstepError(f"tune.targets {tune.targets}: {first_line(problem)}") from None
    # Not `model.adapted = ...`, which would register the module a second time and double the names of parameters.
    object.__setattr__(model, "adapted", adapted)


def describe_lora(model: Any, config: FineTuneConfig) -> list[str]:
    """Lines for the user: the layers with an adapter, and the frozen matrices with their share of the parameters."""
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
        lines.append(f"frozen, without an adapter, as a share of all parameters: {', '.join(shares)}")
    if stacked:
        lines.append("stacked: the weights of all experts are one parameter; only linear layers have adapters")
    return lines


def linear_names(net: nn.Module) -> list[str]:
    """The last names of the linear layers, without the last layer of the model."""
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear) or _transposed(module)]
    return sorted({path.rsplit(".", 1)[-1] for path in linear} - set(HEADS))


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's
