"""Models to fine-tune: how a path is resolved, how evenstep or transformers opens the model, with or without adapters,
and evenstep.json, the description in the folder of a fine-tuned model.

Models of transformers are wrapped so that they have the interface of `evenstep.models.Llama` that a run needs,
``loss(tokens, targets, positions=...)``. Their parameters have ``net.`` before their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.errors import EvenstepError, first_line
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.examples import Example
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
    """The library that opens the model, how its prompts were written (``form``, and ``template`` for instructions),
    and the low-bit recipe that it was trained with."""

    library: str
    form: str = "plain"
    template: str | None = None
    lowbit: str | None = None

    def save(self, folder: Path) -> None:
        (folder / NOTE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def question(self, prompt: str) -> Example:
        """``prompt`` as an example whose answer is to be written."""
        if self.form == "chat":
            return Example("the prompt", messages=(("user", prompt),))
        return Example("the prompt", prompt=prompt, instruction=prompt if self.form == "instruction" else None)


def form_of(example: Example) -> str:
    return "chat" if example.messages else "instruction" if example.instruction is not None else "plain"


def read_note(folder: Path) -> Note | None:
    """None where there is no such file; EvenstepError for one that cannot be read."""
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
        raise EvenstepError(f"{path} cannot be read ({problem}); mend it, or take it away") from None
    return note


# ---- models of transformers ----


@contextmanager
def hushed() -> Iterator[None]:
    """Context in which transformers reads and writes models without progress bars and warnings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class HubModel(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    @property
    def config(self) -> Any:
        """The numbers of the shape that a run and the rules of optimizers ask for."""
        own = self.net.config.get_text_config()
        heads = getattr(own, "num_attention_heads", None)
        return SimpleNamespace(
            vocab_size=own.vocab_size, hidden_size=getattr(own, "hidden_size", None), num_heads=heads
        )  # fmt: skip

    def num_parameters(self, embeddings: bool = True) -> int:
        table = self.net.get_input_embeddings()
        without = 0 if embeddings or table is None else table.weight.numel()
        return sum(p.numel() for p in self.parameters()) - without

    def flops_per_token(self, seq_len: int) -> int:
        """6 FLOP for each parameter of a matrix product; the products of attention are not counted."""
        return 6 * self.num_parameters(embeddings=False)


MASKS = ("own", "layers", "one")
"""Ways to keep documents apart, all with positions that restart. own: the model finds them by these positions, as
transformers' own masks do (4.53 and later), each layer with its window or chunk. layers: the same masks made here, for
models that do not pass their positions on to them. one: a mask for all layers, which knows no window."""


class HubCausal(HubModel):
    packs = True
    """Whether several documents may share a row. False: each row is one text, padded at its end."""

    masks = "own"
    """How documents that share a row are kept apart, one of `MASKS`."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab], as `evenstep.models.Llama.forward` gives them."""
        if positions is None:
            return self.net(input_ids=tokens, use_cache=False).logits
        if not self.packs:
            # The model's own positions and masks: a causal model does not look at the padding, which comes last. A
            # padding token would make transformers warn of a mask that is missing; the first token stands there.
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
        lowest = torch.finfo(dtype).min  # eager attention adds its mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """As `evenstep.models.Llama.loss`; ``chunk`` must be None."""
        counts = targets != -100
        return F.cross_entropy(self(tokens, positions)[counts].float(), targets[counts], reduction=reduction)


class HubClassifier(HubModel):
    def pad_with(self, token: int) -> None:
        """Pad with ``token`` where the model has no token of its own for it: a decoder looks for the last token before
        the padding."""
        own = self.net.config.get_text_config()
        if getattr(own, "pad_token_id", None) is None:
            own.pad_token_id = token

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, classes] of one text a row."""
        here = positions >= 0
        padded = tokens.masked_fill(~here, self.net.config.get_text_config().pad_token_id or 0)
        return self.net(input_ids=padded, attention_mask=here.long()).logits

    def loss(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor, reduction: str = "mean", chunk: int | None = None
    ) -> Tensor:
        """Cross entropy of the classes int64 [B]."""
        return F.cross_entropy(self(tokens, positions).float(), targets, reduction=reduction)


# ---- what a model can do, found by trying it ----


@torch.no_grad()
def keeps_documents_apart(model: HubCausal, longest: int | None = None) -> bool:
    """Whether documents that share a row get the logits that each has alone; sets ``model.packs`` and how it is done.

    Not every architecture takes positions or a mask of documents, and some look only at a window or chunk, or carry a
    state along the row. So rows of ``longest`` tokens, the longest that training will see, are compared with the same
    documents alone, at every position. None: rows of up to 512 tokens.
    """
    was_training = model.training
    model.eval()
    try:
        for model.masks in MASKS:
            model.packs = True
            try:
                model.packs = _same_as_alone(model, longest or min(512, positions_of(model.net) or 512))
            except Exception:  # whatever a model raises for an argument that it does not have
                model.packs = False
            if model.packs:
                break
    finally:
        model.train(was_training)
    return model.packs


def _same_as_alone(model: HubCausal, longest: int) -> bool:
    """The trial of `keeps_documents_apart`. Differences are measured by what they would be if documents saw each other,
    which is small where attention changes logits little (in a model whose weights are still small, for one)."""
    few = max(1, min(5, longest // 6))
    layouts = [[longest], [few, longest - 3 * few, 2 * few], [longest // 3, longest // 2]]
    # Rounding: 16-bit logits differ by some percent between two ways to compute the same attention.
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
                # One position may stand out, where rounding sends its token to another expert; a leak is wider.
                worst.append(torch.minimum(off[:-1], off[1:]).max() if length > 1 else off.max())
                sizes.append(alone.norm(dim=-1).median())
                if start:
                    seen.append((mixed[i, part].float() - alone).norm(dim=-1).median())
                start += length
    allowed = share * torch.stack(seen).median() + floor * torch.stack(sizes).median()
    return bool(torch.stack(worst).max() <= allowed)


@torch.no_grad()
def sees_later_tokens(net: Any) -> bool:
    """Whether logits depend on the tokens after them: so do those of an encoder. It is tried: what another second half
    of a row changes in the first is compared with what another first half changes in the second."""
    half = max(1, min(32, (positions_of(net) or 32) // 2) // 2)
    share = 1e-3 if net.dtype == torch.float32 else 0.1
    for seed in range(3):  # rounding may send a token to another expert, but not each time
        drawn = ordinary_tokens(net, 4 * half, seed).view(4, half)
        rows = torch.stack([torch.cat((drawn[a], drawn[b])) for a, b in ((0, 1), (0, 2), (3, 1))])
        logits = net(input_ids=rows, use_cache=False).logits.float()
        backward = (logits[1, :half] - logits[0, :half]).norm(dim=-1).max()
        forward = (logits[2, half:] - logits[0, half:]).norm(dim=-1).max()
        if not backward > share * forward:
            return False
    return True


def positions_of(net: Any) -> int | None:
    """How many positions the model has; None where there is no limit."""
    own = net.config.get_text_config()
    return next((n for n in (getattr(own, name, None) for name in _POSITIONS) if isinstance(n, int) and n > 0), None)


_POSITIONS = ("max_position_embeddings", "max_target_positions")


def ordinary_tokens(net: Any, count: int, seed: int = 0) -> Tensor:
    """Tokens int64 [count] drawn from the vocabulary without those that the configuration names: padding, the end of a
    text or the place of an image may be treated in a way of their own."""
    own, table = net.config.get_text_config(), net.get_input_embeddings()
    named = [{**config.to_dict()} for config in (net.config, own)]
    special = {v for facts in named for k, v in facts.items() if k.endswith(("_token_id", "_token_index"))
               and isinstance(v, int)}  # fmt: skip
    known = torch.tensor([i for i in range(own.vocab_size) if i not in special])
    draw = known[torch.randint(len(known), (count,), generator=torch.Generator().manual_seed(seed))]
    return draw.to(table.weight.device)


# ---- which model, and how it is opened ----


@dataclass(frozen=True)
class Source:
    """A folder with ``config.json``, weights and tokenizer, and the library that opens it."""

    folder: Path
    library: str


def find_source(path: Path, library: str, say: Callable[[str], None]) -> Source:
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


def open_model(config: FineTuneConfig, source: Source, labels: Sequence[str], say: Callable[[str], None]) -> Any:
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
        for line in describe_lora(model, config):
            say(line)
    return model


def _ours(config: FineTuneConfig, source: Source, labels: Sequence[str]) -> Any:
    if labels:
        raise EvenstepError(
            f"{source.folder} is a model of ours, which writes text; put texts into classes with a transformers "
            "classifier, or write the label as an answer (prompt, response)"
        )
    model = load_model(source.folder)
    check_positions(config.train.seq_len, model.config.max_seq_len, source.folder)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def _hub(
    config: FineTuneConfig, source: Source, labels: Sequence[str], dtype: torch.dtype, say: Callable[[str], None]
) -> Any:
    if config.train.compile:
        raise EvenstepError("train.compile is for models of ours; leave it out for one of transformers")
    if isinstance(config.train.loss_chunk, int) and config.train.loss_chunk:
        raise EvenstepError("train.loss_chunk is for models of ours; leave it out for one of transformers")
    net, new = load_hub(source.folder, labels, dtype)
    if new:
        say(f"new weights, drawn from seed {config.seed}: {', '.join(new)}")
    longest = positions_of(net)
    if longest:
        check_positions(config.train.seq_len, longest, source.folder)
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
            raise EvenstepError(f"transformers cannot open {folder}: {first_line(problem)}") from None
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
            raise EvenstepError(f"transformers cannot open {folder}: {first_line(problem)}") from None
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
        raise EvenstepError(f"{folder}: {name} does not run on a row of tokens alone: {first_line(problem)}") from None
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
        raise EvenstepError(f"tune.targets {tune.targets}: {first_line(problem)}") from None
    object.__setattr__(model, "adapted", adapted)


def describe_lora(model: Any, config: FineTuneConfig) -> list[str]:
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
