"""Models in the Hugging Face layout: ``model.safetensors`` and ``config.json`` of a ``LlamaForCausalLM``, or, with
QK-norm, of a ``Qwen3ForCausalLM``, which is a LLaMA with this norm.

Post-LN and Mix-LN models and those with a soft-cap have no Hugging Face equivalent. They are saved with ``model_type``
"evenstep_llama", keys such as ``evenstep_norm``, and the weights in ``evenstep.safetensors``. With the usual file name,
``LlamaForCausalLM.from_pretrained`` would only warn, load them as a LLaMA and compute something else.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.models.llama import Llama, LlamaConfig
from evenstep.paths import is_plain_name

_WEIGHTS, _OWN_WEIGHTS, _INDEX, _CONFIG = (
    "model.safetensors",
    "evenstep.safetensors",
    "model.safetensors.index.json",
    "config.json",
)

_NAMES = {  # ours -> Hugging Face's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}


_READ = {
    *_NAMES.values(),
    *("model_type", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "max_sequence_length"),
}
_WITHOUT_EFFECT = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version"),
    *("use_cache", "pretraining_tp", "_name_or_path", "sliding_window", "max_window_layers", "layer_types"),
}
"""Keys of a config.json that `read_shape` uses, and those that do not change what a new model computes."""

_OWN = ("norm", "norm_alpha", "qk_norm", "attention_softcap", "logit_softcap", "tie_embeddings")
"""Fields that are saved as ``evenstep_NAME`` for a model that transformers does not have."""


def missing_in_transformers(config: LlamaConfig) -> str | None:
    """The part of the architecture that no LLaMA of transformers has, in words; None for a model that it can load.

    >>> missing_in_transformers(LlamaConfig(64, 16, 32, 2, 2, norm="post"))
    "norm 'post'"
    """
    if config.norm != "pre":
        return f"norm '{config.norm}'"
    caps = [name for name in ("attention_softcap", "logit_softcap") if getattr(config, name) is not None]
    return f"{caps[0]} {getattr(config, caps[0]):g}" if caps else None


def require_safetensors() -> Any:
    """``safetensors.torch``; EvenstepError when it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise EvenstepError(
            "reading and writing model weights needs the package safetensors: pip install 'evenstep[train]'"
        ) from None
    return safetensors.torch


def save_pretrained(model: Llama, directory: str | Path) -> None:
    """Write a model into a directory, in the layout of Hugging Face.

    The usual model can be loaded by ``transformers``; see the head of this file for the others. Tensors keep their
    dtype. The weights are written first and ``config.json`` last, without protection against a killed process: a caller
    that needs it writes into a new directory and renames that.

    Args:
        model: the model.
        directory: created if missing; a model that is there is replaced.

    Raises:
        EvenstepError: safetensors is not installed.
        OSError: the disk is full or refuses.

    Example:
        >>> import tempfile
        >>> from evenstep.models import llama_config
        >>> model = Llama(llama_config("tiny", vocab_size=64, num_layers=1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(model, directory)
        ...     copy = load_pretrained(directory)
        >>> torch.equal(copy.lm_head.weight, model.lm_head.weight)
        True
    """
    directory = Path(directory)
    save_file = require_safetensors().save_file
    own = missing_in_transformers(model.config) is not None
    directory.mkdir(parents=True, exist_ok=True)
    for name in (_CONFIG, _WEIGHTS, _OWN_WEIGHTS, _INDEX):
        (directory / name).unlink(missing_ok=True)
    # config.json is written last: a directory with it has its weights.
    save_file(own_tensors(model), directory / (_OWN_WEIGHTS if own else _WEIGHTS), metadata={"format": "pt"})
    save_config(model, directory)


def own_tensors(model: Llama) -> dict[str, Tensor]:
    """The contiguous tensors of a model by name; a tied head is left out, since safetensors refuses shared memory."""
    left_out = {"lm_head.weight"} if model.config.tie_embeddings else set()
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in left_out}


def save_config(model: Llama, directory: str | Path) -> None:
    """Write only ``config.json``, which describes the shape of ``model``."""
    (Path(directory) / _CONFIG).write_text(json.dumps(_to_hf(model), indent=2) + "\n", encoding="utf-8")


def _to_hf(model: Llama) -> dict[str, Any]:
    config = model.config
    kind: dict[str, Any]
    if missing_in_transformers(config) is not None:
        own = {f"evenstep_{name}": getattr(config, name) for name in _OWN}
        kind = {"architectures": ["EvenstepLlama"], "model_type": "evenstep_llama", **own}
    elif config.qk_norm:  # without head_dim, transformers assumes 128 for this type
        head = config.hidden_size // config.num_heads
        kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": head}
    else:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {
        **kind,
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        "num_key_value_heads": config.kv_heads or config.num_heads,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        # A tied model of other programs is loaded with a head of its own.
        **({"evenstep_tie_embeddings": True} if config.tie_embeddings else {}),
        "bos_token_id": None,  # without these keys transformers assumes 1 and 2
        "eos_token_id": None,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }


def read_config(directory: str | Path) -> LlamaConfig:
    """The shape of the model in ``directory``, without reading its weights; EvenstepError as `load_pretrained`."""
    directory = Path(directory)
    return _from_hf(_read_json(directory / _CONFIG), directory / _CONFIG, directory)


def read_shape(path: str | Path) -> LlamaConfig:
    """The shape that a configuration file of transformers describes, for a new model.

    The maximal length is ``max_position_embeddings``, or else ``max_sequence_length`` (GaLore's files). A tied output
    layer stays tied.

    Raises:
        EvenstepError: a file that cannot be read, another architecture, or a key that would have an effect in
            transformers and has none here.
    """
    path = Path(path)
    if not path.is_file():
        raise EvenstepError(f"there is no file {path}: give a configuration of transformers, such as llama_130m.json")
    hf = _read_json(path)
    known = {*_READ, *_WITHOUT_EFFECT, *(f"evenstep_{name}" for name in _OWN)}
    for key, value in hf.items():
        if key not in known and value not in (0, None, False):  # such as attention_dropout 0.0
            raise EvenstepError(
                f"{path} sets {key} to {_short(value)}, which this LLaMA does not have; remove the line to train "
                "without it"
            )
    if "max_sequence_length" in hf:
        hf = {"max_position_embeddings": hf["max_sequence_length"], **hf}
    return replace(_from_hf(hf, path, path), tie_embeddings=bool(hf.get("tie_word_embeddings", False)))


def load_pretrained(directory: str | Path, weights: dict[str, Tensor] | None = None) -> Llama:
    """Load a model that `save_pretrained` or ``transformers`` saved, on the CPU, in the saved dtype.

    The weights may be in one file or in shards with an index. A tied head becomes a copy of the token table, unless
    evenstep has trained the model with a tied head.

    Args:
        directory: contains ``config.json`` and the weights.
        weights: tensors by parameter name, used instead of the files; then only ``config.json`` is read.

    Raises:
        EvenstepError: missing, unreadable or mismatched files, or a model with biases, scaled rotary positions, another
            activation or another architecture.
    """
    directory = Path(directory)
    hf = _read_json(directory / _CONFIG)
    config = _from_hf(hf, directory / _CONFIG, directory)
    if weights is None:
        weights = _read_weights(directory, _OWN_WEIGHTS if missing_in_transformers(config) else _WEIGHTS)
    if hf.get("tie_word_embeddings") and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    # A config.json may claim millions of layers, which would take very long to build.
    if config.num_layers > len(weights):
        raise EvenstepError(
            f"the weights in {directory} do not fit its config.json: {len(weights)} tensors for {config.num_layers} "
            "layers"
        )
    # On meta no weights are drawn or allocated; load_state_dict(assign=True) puts the loaded tensors in their place.
    with torch.device("meta"):
        model = Llama(config)
    wanted = model.state_dict()
    # Old exports contain the rotary frequencies, which follow from the configuration.
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in wanted]
    problems += [
        f"{name} has shape {list(weights[name].shape)} where config.json asks for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EvenstepError(f"the weights in {directory} do not fit its config.json: {problems[0]}{more}")
    model.load_state_dict(weights, assign=True)
    model.tie()
    return model


def _from_hf(hf: dict[str, Any], path: Path, model: Path) -> LlamaConfig:
    """The configuration that the content ``hf`` of the file ``path`` describes; EvenstepError for a part that this
    LLaMA does not have. ``model`` is the model in errors."""
    if hf.get("model_type") not in ("llama", "qwen3", "evenstep_llama"):
        given = _short(hf.get("model_type"))
        raise EvenstepError(
            f"{model} holds a model of type {given}: only 'llama' can be loaded, and 'qwen3' of its shape"
        )
    qwen = hf["model_type"] == "qwen3"
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in sizes if name not in hf]
    if missing:
        raise EvenstepError(f"{path} has no {missing[0]!r}: it is not the configuration of a LLaMA")
    for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = hf.get(name)
        if value is None and name not in sizes:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise EvenstepError(f"{path}: {name} is {_short(value)}; it must be a positive whole number")
    heads = hf["num_attention_heads"]
    # transformers 5 has all rotary settings in rope_parameters; earlier versions have rope_theta and rope_scaling.
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise EvenstepError(f"{path}: rope_scaling and rope_parameters must be objects")
    rope = new or {"rope_theta": hf.get("rope_theta", 10000.0), **old}
    unsupported = {
        "a head_dim other than hidden_size / num_attention_heads": (
            hf.get("head_dim") or (128 if qwen else hf["hidden_size"] // heads)
        )
        * heads
        != hf["hidden_size"],
        "sliding-window attention (use_sliding_window)": hf.get("use_sliding_window", False),
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "scaled rotary positions (rope_scaling)": rope.get("rope_type", rope.get("type", "default")) != "default",
        f"hidden_act {_short(hf.get('hidden_act'))}": hf.get("hidden_act", "silu") != "silu",
    }
    if found := [name for name, there in unsupported.items() if there]:
        raise EvenstepError(
            f"the model in {model} uses {found[0]}, which this LLaMA does not have: choose a model without it"
        )
    kv_heads = hf.get("num_key_value_heads") or heads
    return LlamaConfig(
        kv_heads=None if kv_heads == heads else kv_heads,
        **{ours: hf[theirs] for ours, theirs in _NAMES.items() if theirs in hf},
        rope_theta=rope.get("rope_theta", 10000.0),
        **{"qk_norm": qwen, **{name: hf[f"evenstep_{name}"] for name in _OWN if f"evenstep_{name}" in hf}},
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvenstepError(f"there is no {path}: give a directory with config.json and safetensors weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EvenstepError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise EvenstepError(f"{path} is not a JSON object")
    return content


def _indexed(index: Path) -> list[str]:
    """The files that an index lists. They have to be in its directory: an index may come from anywhere."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(map(is_plain_name, places.values())):
        raise EvenstepError(f"{index} has no weight_map of files in its own directory; do not trust it")
    return sorted(set(places.values()))


def _read_weights(directory: Path, name: str) -> dict[str, Tensor]:
    load_file = require_safetensors().load_file
    index = directory / _INDEX
    files = [name] if (directory / name).exists() or not index.exists() else _indexed(index)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(directory / file))
        except FileNotFoundError:
            raise EvenstepError(f"there is no {directory / file}: the model in {directory} is incomplete") from None
        except Exception as error:  # safetensors raises its own type, which is no subclass of a common one
            raise EvenstepError(f"cannot read {directory / file}: {error}") from None
    return weights
