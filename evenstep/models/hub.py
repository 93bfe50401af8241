"""Causal language models of transformers with the interface of `evenstep.models.Llama`, for pretraining from random
weights.

`HubShape` reads a configuration file and builds the model that it describes; `HubLM` wraps that model and adds
``loss``, ``config`` and ``num_parameters``, so that the trainer does not know which library computes the logits. The
model of transformers is the attribute ``net``; names of parameters therefore begin with ``net.``.

transformers is imported where a model is built, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenstep.errors import EvenstepError, first_line, nearest
from evenstep.models.ops import cross_entropy_and_z_loss

PREFIX = "net."
"""The beginning of the name of every parameter of a model of transformers."""

ALLOWED = "a causal language model, such as llama, gpt2, gpt_neox, mistral, qwen3, gemma2, mamba or mixtral"

UNLIMITED = 2**31
"""The maximal length of a model without positions, such as Mamba."""

# ---- the interface of a model ----


class HubModel(nn.Module):
    """A wrapper around a model of transformers, ``net``."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    @property
    def config(self) -> Any:
        """The values of the shape that a run and the grouping rules of optimizers use."""
        own = self.net.config.get_text_config()
        return SimpleNamespace(
            vocab_size=own.vocab_size,
            hidden_size=getattr(own, "hidden_size", None),
            num_heads=getattr(own, "num_attention_heads", None),
            max_seq_len=positions_of(self.net.config) or UNLIMITED,
        )

    def num_parameters(self, embeddings: bool = True) -> int:
        table = self.net.get_input_embeddings()
        without = 0 if embeddings or table is None else table.weight.numel()
        return sum(p.numel() for p in self.parameters()) - without

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of a forward and backward pass per token, as in `evenstep.models.Llama`. Of the
        stacked weights of experts, those of the experts of one token count."""
        own = self.net.config.get_text_config()
        table, head = self.net.get_input_embeddings(), self.net.get_output_embeddings()
        # The token table is no matrix product, except as the weight of a tied last layer.
        tied = table is None or (head is not None and head.weight is table.weight)
        matrices = 0 if tied else -table.weight.numel()
        for name, p in self.named_parameters():
            size = p.numel()
            if p.dim() == 3 and ".experts." in name:  # [experts, ...]
                size = size * (getattr(own, "num_experts_per_tok", None) or len(p)) // len(p)
            matrices += size
        width = (self.config.hidden_size or 0) if self.config.num_heads else 0
        return 6 * matrices + 12 * getattr(own, "num_hidden_layers", 0) * width * seq_len


class HubLM(HubModel):
    """A causal language model that is pretrained. Rows are whole documents or parts of them, without padding.

    A mixture of experts whose configuration sets ``output_router_logits`` is trained with the load-balancing loss of
    transformers, times ``router_aux_loss_coef``; the value of the loss stays the cross entropy.

    transformers reads one value from a GPU in each forward pass, to find out whether a row has several documents.
    """

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self._checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits [B, T, vocab] for int64 ``tokens`` [B, T]."""
        logits: Tensor = self.net(input_ids=tokens, use_cache=False).logits
        return logits

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        reduction: str = "mean",
        chunk: int | None = None,
        z_loss: float | None = None,
    ) -> Tensor:
        """As `evenstep.models.Llama.loss`: the cross entropy, 0-d fp32, and with ``z_loss`` the z-loss too, [2].

        ``tokens`` and ``targets`` are int64 [B, T]. ``chunk`` must be None: what a model computes between its last
        hidden state and the logits differs between architectures, so that all logits are computed at once.
        """
        assert chunk is None, "a model of transformers computes all logits at once"
        out = self.net(input_ids=tokens, use_cache=False)
        logits, targets = out.logits.flatten(0, 1), targets.flatten()
        if z_loss is not None:
            loss, z_loss_value = cross_entropy_and_z_loss(logits, targets, z_loss, reduction).unbind()
            return torch.stack((loss + self._balance(out), z_loss_value))
        return F.cross_entropy(logits.float(), targets, reduction=reduction) + self._balance(out)

    def _balance(self, out: Any) -> Tensor | float:
        """A tensor of the value 0 whose gradient is that of the load-balancing loss; 0 without one."""
        aux = getattr(out, "aux_loss", None)
        if aux is None or not self.training or not torch.is_grad_enabled():
            return 0.0
        scaled = aux.float() * getattr(self.net.config.get_text_config(), "router_aux_loss_coef", 0.0)
        balance: Tensor = scaled - scaled.detach()
        return balance

    @property
    def activation_checkpointing(self) -> bool:
        """Whether each block is computed again in the backward pass. Setting it raises EvenstepError for an
        architecture that transformers cannot recompute."""
        return self._checkpoints

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on and not self.net.supports_gradient_checkpointing:
            raise EvenstepError(
                f"train.activation_checkpointing true cannot be used with a {type(self.net).__name__} of transformers; "
                "leave it out"
            )
        if on != self._checkpoints:
            recompute_blocks(self.net, on)
        self._checkpoints = on

    def save_config(self, directory: Path) -> None:
        """Write ``config.json``."""
        self.net.config.save_pretrained(directory)

    def save_pretrained(self, directory: Path) -> None:
        """Write weights and ``config.json`` in the layout that ``AutoModelForCausalLM.from_pretrained`` loads."""
        with hushed():
            self.net.save_pretrained(directory)


# ---- the shape, from a configuration file ----


@dataclass(frozen=True)
class HubShape:
    """The configuration of a model of transformers: ``text``, the content of its config.json, and ``source``, the file,
    which errors name.

    Example:
        >>> config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
        >>> shape = HubShape("config.json", json.dumps(config)).with_vocabulary(100)
        >>> shape.vocab_size
        100
    """

    source: str
    text: str

    @classmethod
    def read(cls, path: Path | str) -> HubShape:
        """The shape in a config.json, or in a directory that has one. EvenstepError for a file that cannot be read, and
        for a model that is not a causal language model of transformers, without importing its code."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EvenstepError(
                f"model.hf: there is no file {file}; give the config.json of a model of transformers, or its directory"
            ) from None
        except (OSError, ValueError, RecursionError) as problem:
            raise EvenstepError(f"model.hf: {file} cannot be read: {first_line(problem)}") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
            raise EvenstepError(f"model.hf: {file} has no model_type; give the config.json of {ALLOWED}")
        # The weights of a published model may be quantised; new ones are not.
        facts.pop("quantization_config", None)
        shape = cls(str(file), json.dumps(facts))
        shape._check_kind(facts["model_type"])
        return shape

    def _check_kind(self, kind: str) -> None:
        transformers = require_transformers(self.source)
        mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if kind not in mapping:
            raise EvenstepError(
                f"model.hf: transformers {transformers.__version__} has no model of type '{kind}' ({self.source}); "
                f"give {ALLOWED}{nearest(kind, list(mapping.keys()))}"
            )
        config = self.config
        if getattr(config, "is_encoder_decoder", False):
            raise EvenstepError(f"model.hf: {self.source} is an encoder-decoder ({kind}); give {ALLOWED}")
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise EvenstepError(
                f"model.hf: {self.source} is a model of type {kind}, which generates no text; give {ALLOWED}"
            )
        if config.get_text_config() is not config:
            raise EvenstepError(
                f"model.hf: {self.source} is a model of type {kind}, which has more parts than a language model; give "
                "a file with its text_config alone"
            )

    @cached_property
    def config(self) -> Any:
        """The configuration as an object of transformers."""
        facts = json.loads(self.text)
        transformers = require_transformers(self.source)
        kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        with hushed():
            try:
                return kinds[facts["model_type"]].from_dict(facts)
            except Exception as problem:  # the checks of each class: any type
                raise EvenstepError(f"model.hf: transformers refuses {self.source}: {first_line(problem)}") from None

    def with_vocabulary(self, size: int) -> HubShape:
        """The same shape for a tokenizer of ``size`` entries. The special tokens of the file are those of another
        tokenizer, so they are removed: the embedding of a padding token would get no gradient."""
        facts = json.loads(self.text)
        special = {key: None for key in (*facts, *_SPECIAL) if key.endswith("_token_id")}
        return HubShape(self.source, json.dumps(facts | special | {"vocab_size": size}))

    @property
    def kind(self) -> str:
        """The ``model_type``, such as "gpt2"."""
        return str(self.config.model_type)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def num_layers(self) -> int:
        return int(getattr(self.config, "num_hidden_layers", 1))

    @property
    def max_seq_len(self) -> int:
        return positions_of(self.config) or UNLIMITED

    def build(self, dtype: torch.dtype = torch.float32) -> HubLM:
        """A new model, whose weights are drawn from torch's global generator by the rule of transformers. Under
        ``torch.device("meta")`` it has no memory. EvenstepError for values that do not fit together."""
        transformers = require_transformers(self.source)
        with hushed():
            try:
                # Not model.to(dtype) afterwards, which would round the rotary frequencies.
                net = transformers.AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=dtype)
            except Exception as problem:  # the code of each architecture: any type
                raise EvenstepError(
                    f"model.hf: transformers cannot build {self.source}: {first_line(problem)}"
                ) from None
        net.config.architectures = [type(net).__name__]
        return HubLM(net).train()


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_causal(model: HubLM, source: str) -> None:
    """EvenstepError for a model whose logits depend on later tokens, or that needs more than tokens."""
    name, was_training = type(model.net).__name__, model.training
    try:
        with hushed():
            leaks = sees_later_tokens(model.net.eval())
    except Exception as problem:  # a model that needs more than tokens: any type
        raise EvenstepError(
            f"model.hf: the {name} of {source} does not run on a row of tokens alone ({first_line(problem)}); "
            f"give {ALLOWED}"
        ) from None
    finally:
        model.net.train(was_training)
    if leaks:
        raise EvenstepError(
            f"model.hf: {source} is a {name}, an encoder: its outputs depend on later tokens; give {ALLOWED}"
        )


def load_weights(model: HubLM, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy ``weights`` by parameter name into ``model``; a tied weight is given under one of its names. EvenstepError
    when they do not fit."""
    try:
        missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    except RuntimeError as problem:  # the first line is a title, the others name the shapes
        lines = str(problem).splitlines()
        raise EvenstepError(f"the weights in {source} do not fit its config.json: {lines[-1].strip()}") from None
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    wrong = [f"{name} is missing" for name in missing if name not in tied]
    wrong += [f"{name} is not part of the model" for name in unexpected]
    if wrong:
        raise EvenstepError(f"the weights in {source} do not fit its config.json: {wrong[0]}")


# ---- helpers for models of transformers ----


def require_transformers(source: Path | str) -> Any:
    """The package transformers; EvenstepError when it is not installed."""
    try:
        import transformers
    except ImportError:
        raise EvenstepError(f"model.hf {source} needs the package transformers; pip install 'evenstep[hf]'") from None
    return transformers


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


def recompute_blocks(net: Any, on: bool = True) -> None:
    """Turn activation checkpointing of a model of transformers on or off."""
    word = "enable" if on else "disable"
    # transformers 5 renames the methods.
    change = getattr(net, f"activation_checkpointing_{word}", None) or getattr(net, f"gradient_checkpointing_{word}")
    change(*([{"use_reentrant": False}] if on else []))


def positions_of(config: Any) -> int | None:
    """The number of positions of a model with this configuration of transformers; None if there is no limit."""
    own = config.get_text_config()
    return next((n for n in (getattr(own, name, None) for name in _POSITIONS) if isinstance(n, int) and n > 0), None)


_POSITIONS = ("max_position_embeddings", "max_target_positions")


@torch.no_grad()
def sees_later_tokens(net: Any) -> bool:
    """Whether logits depend on later tokens, as in an encoder. The test compares the change in the first half of a row
    when the second half is replaced with the change in the second half when the first half is replaced."""
    half = max(1, min(32, (positions_of(net.config) or 32) // 2) // 2)
    share = 1e-3 if net.dtype == torch.float32 else 0.1
    for seed in range(3):  # rounding may send a token to another expert, but not with every seed
        drawn = ordinary_tokens(net, 4 * half, seed).view(4, half)
        rows = torch.stack([torch.cat((drawn[a], drawn[b])) for a, b in ((0, 1), (0, 2), (3, 1))])
        logits = net(input_ids=rows, use_cache=False).logits.float()
        backward = (logits[1, :half] - logits[0, :half]).norm(dim=-1).max()
        forward = (logits[2, half:] - logits[0, half:]).norm(dim=-1).max()
        if not backward > share * forward:
            return False
    return True


def ordinary_tokens(net: Any, count: int, seed: int = 0) -> Tensor:
    """Random tokens int64 [count] without those that the configuration names: a model may treat padding, the end of a
    text or the place of an image differently."""
    own, table = net.config.get_text_config(), net.get_input_embeddings()
    named = [{**config.to_dict()} for config in (net.config, own)]
    special = {v for facts in named for k, v in facts.items() if k.endswith(("_token_id", "_token_index"))
               and isinstance(v, int)}  # fmt: skip
    known = torch.tensor([i for i in range(own.vocab_size) if i not in special])
    draw = known[torch.randint(len(known), (count,), generator=torch.Generator().manual_seed(seed))]
    return draw.to(table.weight.device)
