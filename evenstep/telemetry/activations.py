"""Measures one forward pass in every so many steps: attention, activations and output logits.

An instability is visible inside the forward pass before it reaches the loss: attention logits grow until each query
sees one key only, or a few entries of the residual stream grow far beyond the others. `ActivationProbe` measures a
sample of one sequence of one pass, without autograd and without any host synchronisation.

**How.** Hooks surround each block of the model. Between them a ``TorchFunctionMode`` shows the calls of
``scaled_dot_product_attention``, of a softmax over attention logits and of an activation function, whichever module
makes them. The mode is active in the sampled pass only; in all others a hook costs one comparison.

**What is not seen.** Blocks under torch.compile: a hook would break their graph and so change the rounding. Attention
that calls neither function by itself, such as ``nn.MultiheadAttention``, FlexAttention or the package flash-attn.
Blocks under a ``TorchDispatchMode``, such as selective activation checkpointing, which records every operation and
would record those of the probe. Backward passes, and passes in evaluation mode.

Shapes: ``H`` heads, ``T`` queries, ``S`` keys, ``D`` coordinates of a head, ``R`` sampled queries or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from evenstep.optim.distributed import is_sharded
from evenstep.telemetry.subject import plain_names
from evenstep.telemetry.trouble import Troubles

ROWS = 64
"""Largest number of sampled queries and tokens."""

MOST_LOGITS = 2**21
"""Largest number of attention logits in memory at once, 8 MiB in fp32. Long sequences have fewer samples."""

LOGIT_ROWS = 16
"""Sampled tokens whose output logits are computed where the model computes them in chunks."""

STUCK = 0.01
"""A unit is dead if its gate passes less than this share of its input on all sampled tokens, and saturated if it passes
more than one minus this share on all of them. The gate is act(z) / z: 0 or 1 for ReLU, sigmoid(z) for SiLU, and the
normal distribution function of z for GELU."""

EDGES: dict[Callable[..., Any], float] = {
    F.relu: 0.0,
    torch.relu: 0.0,
    F.silu: math.log((1 - STUCK) / STUCK),  # sigmoid(z) = 1 - STUCK
    F.gelu: 2.3263,  # the quantile 1 - STUCK of the normal distribution
}
"""Activation function -> the input above which its gate is open; it is closed below the negative of it."""

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)

HEADS = ("lm_head", "embed_out", "output", "head")
"""Names of the linear layer that computes the output logits."""

Numbers = dict[str, Tensor]
"""Key -> a vector of numbers in fp32: one for each head, or a single one."""

Layout = list[tuple[str, str, int]]
"""Module, key and length of each vector of a sample, in order."""

Sample = tuple[Layout, Tensor]
"""The numbers of a pass, all vectors one after the other, on the device."""


class ActivationProbe:
    """Measures the first training pass of each block after `arm`, until `take`.

    Args:
        model: the model, with or without wrappers.
        troubles: reports what cannot be measured, once.

    >>> from evenstep.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2))
    >>> probe = ActivationProbe(model, Troubles("example"))
    >>> probe.arm()
    >>> _ = model(torch.randint(64, (3, 8)))
    >>> layout, numbers = probe.take()
    >>> [key for module, key, n in layout if module == "model.layers.1"]
    ['attention_max', 'attention_logsumexp', 'attention_entropy', 'dead', 'saturated', 'rms', 'kurtosis']
    """

    def __init__(self, model: nn.Module, troubles: Troubles) -> None:
        self.troubles = troubles
        self.armed = False
        self.found: dict[str, Numbers] = {}
        self._done: set[str] = set()  # modules whose pass has been measured since `arm`
        self._handles: list[Any] = []
        blocks = find_blocks(model)
        self._watched = {name for name, block in blocks.items() if not _is_compiled(block)}
        for name in self._watched:
            block = blocks[name]
            watch = _BlockWatch(self, name)
            self._handles += [
                block.register_forward_pre_hook(_Hook(watch.enter)),
                # Also after an exception: the mode must not stay active.
                block.register_forward_hook(_Hook(watch.leave), always_call=True),
            ]
        if len(self._watched) < len(blocks):
            troubles.tell("compiled", "blocks under torch.compile are not measured in the forward pass")
        head_name, head, body = _find_head(model)
        if head is not None and not _is_compiled(head):
            output = _HeadWatch(self, head_name, head)
            self._handles.append(head.register_forward_hook(_Hook(output.called)))
            if body is not None:
                self._handles.append(body.register_forward_hook(_Hook(output.passed)))
        if not self._handles:
            troubles.tell("no blocks", "the model has no blocks that can be measured in the forward pass")

    def arm(self, on: bool = True) -> None:
        """Measure the next pass, or none; what has been measured since the last `take` is forgotten."""
        self.armed = on
        self.found, self._done = {}, set()

    def take(self) -> Sample | None:
        """The numbers measured since `arm`, None if there are none; then no pass is measured until the next `arm`."""
        was_armed, self.armed = self.armed, False
        found, self.found = self.found, {}
        vectors = [(module, key, x) for module, numbers in found.items() for key, x in numbers.items()]
        if was_armed and self._watched and not self._watched & self._done:
            self.troubles.tell(
                "nothing seen",
                "the forward pass called no block that can be measured (torch.compile and CUDA graphs run no hooks, "
                "and evaluation mode is left out)",
            )
        if not vectors:
            return None
        device = vectors[0][2].device
        flat = torch.cat([x.reshape(-1).to(device, torch.float32) for _, _, x in vectors])
        return [(module, key, x.numel()) for module, key, x in vectors], flat

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.armed = [], False

    # ---- called by the hooks ----

    def wants(self, name: str, module: nn.Module) -> bool:
        """Whether this pass of a module is to be measured, which is decided once for each `arm`."""
        if not self.armed or name in self._done or not module.training:
            return False
        if _is_recorded():
            self.troubles.tell(
                "recorded", "passes under a TorchDispatchMode (selective activation checkpointing) are not measured"
            )
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def done(self, name: str) -> None:
        """The pass of this module is measured."""
        self._done.add(name)

    def measure(self, name: str, what: str, numbers: Callable[..., Numbers], *given: Any, **options: Any) -> None:
        """Add ``numbers(...)`` to those of module ``name``; a failure is reported once and stops nothing. A key that is
        known already stays as it is."""
        try:
            # Under autocast the products would be rounded to 16 bits.
            device = next(x.device.type for x in (*given, *options.values()) if isinstance(x, Tensor))
            with torch.no_grad(), torch.autocast(device, enabled=False):
                mine = self.found.setdefault(name, {})
                for key, value in numbers(*given, **options).items():
                    mine.setdefault(key, value)
        except Exception as problem:
            self.troubles.failed(f"measure {what} in the forward pass", problem)


class _BlockWatch:
    """The two hooks of a block, and the mode between them."""

    def __init__(self, probe: ActivationProbe, name: str) -> None:
        self.probe, self.name = probe, name
        self.mode: _Calls | None = None

    def enter(self, block: nn.Module, _: Any) -> None:
        if self.mode is None and self.probe.wants(self.name, block):
            self.probe.done(self.name)
            self.mode = _Calls(self.probe, self.name)
            self.mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.mode is None:
            return
        mode, self.mode = self.mode, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if (x := _first_tensor(output)) is not None:
            self.probe.measure(self.name, "activations", activation_numbers, x)


class _Calls(TorchFunctionMode):
    """Shows the functions that a block calls. Inside ``__torch_function__`` the mode is inactive, so that it does not
    see its own measurements."""

    def __init__(self, probe: ActivationProbe, name: str) -> None:
        super().__init__()
        self.probe, self.name = probe, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Before the call: an activation function may overwrite its input.
        if func is F.scaled_dot_product_attention:
            self.probe.measure(self.name, "attention", attention_numbers, *args, **kwargs)
        elif func in SOFTMAXES and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            self.probe.measure(self.name, "attention", softmax_numbers, args[0])
        elif func in EDGES and args and isinstance(args[0], Tensor) and args[0].dim() in (2, 3):
            self.probe.measure(self.name, "units", unit_numbers, args[0], EDGES[func])
        return func(*args, **kwargs)


class _HeadWatch:
    """The hooks of the output head and of the body before it. A chunked loss may compute the logits without a call of
    the head; a few of them are then computed here, from the output of the body."""

    def __init__(self, probe: ActivationProbe, name: str, head: nn.Module) -> None:
        self.probe, self.name, self.head = probe, name, head

    def passed(self, body: nn.Module, _: Any, output: Any) -> None:
        weight = getattr(self.head, "weight", None)
        x = _first_tensor(output)
        # A head of another class (low-bit, LoRA) computes more than this product, and a shard is only a part of it.
        plain = isinstance(self.head, nn.Linear) and type(self.head).forward is nn.Linear.forward
        if x is None or not plain or type(weight) not in (Tensor, nn.Parameter):
            return
        if self.probe.wants(self.name, body):
            self.probe.done(self.name)
            self.probe.measure(self.name, "output logits", _projected_logits, x, weight)

    def called(self, head: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and self.probe.wants(self.name, head):
            self.probe.done(self.name)
            self.probe.measure(self.name, "output logits", logit_numbers, output)


class _Hook:
    """A hook that a copy of the model leaves behind: the copy, as of an EMA of the weights, must not be measured."""

    def __init__(self, act: Callable[..., None]) -> None:
        self.act = act

    def __call__(self, *given: Any) -> None:
        # Traced by torch.compile, the hook is empty and leaves the graph as it would be without it.
        if not torch.compiler.is_compiling():
            self.act(*given)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


# ---- numbers ----


def attention_numbers(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Numbers:  # fmt: skip
    """Largest logit, mean logsumexp and mean entropy of each head, ``[H]``, over sampled queries of the first sequence.

    The arguments are those of ``scaled_dot_product_attention``: ``query`` [B, H, T, D], ``key`` [B, H or fewer, S, D].
    """
    q, k = query.detach(), key.detach()
    while q.dim() > 3:
        q, k = q[0], k[0]
    at = _stride(q.shape[-2], q.shape[-3] * k.shape[-2])
    q, k = q[:, at].float(), k.float()  # [H, R, D], [H, S, D]
    if k.shape[0] != q.shape[0]:  # grouped queries: each key serves several heads
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (q * scale) @ k.transpose(-1, -2)  # [H, R, S]
    if is_causal:
        # Query t sees the keys 0 to t, as in scaled_dot_product_attention.
        queries = torch.arange(query.shape[-2], device=q.device)[at]
        logits = logits.masked_fill(torch.arange(k.shape[-2], device=q.device) > queries[:, None], -math.inf)
    if attn_mask is not None:
        mask = attn_mask.detach().expand(*attn_mask.shape[:-2], query.shape[-2], k.shape[-2])[..., at, :]
        while mask.dim() > 3:
            mask = mask[0]
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return _of_logits(logits)


def softmax_numbers(logits: Tensor) -> Numbers:
    """The same from the input [B, H, T, S] of a softmax, whose mask has been added already."""
    x = logits.detach()[0]
    return _of_logits(x[:, _stride(x.shape[-2], x.shape[0] * x.shape[-1])].float())


def _of_logits(logits: Tensor) -> Numbers:
    """``logits`` [H, R, S], -inf or a very low number where a key is masked. Queries that see no key do not count."""
    visible = logits > -1e30
    logits = logits.masked_fill(~visible, -math.inf)
    total = logits.logsumexp(-1)  # [H, R]
    # The entropy of a query is -sum p ln p = logsumexp - sum p l with p = exp(l - logsumexp).
    log_p = torch.where(visible, logits - total[..., None], 0.0)
    entropy = -(log_p.exp() * log_p * visible).sum(-1)
    sees = visible.any(-1)
    count = sees.sum(-1)
    mean = [torch.where(sees, x, 0.0).sum(-1) / count for x in (total, entropy)]
    return {"attention_max": logits.amax((-2, -1)), "attention_logsumexp": mean[0], "attention_entropy": mean[1]}


def unit_numbers(z: Tensor, edge: float) -> Numbers:
    """Shares of dead and of saturated units, ``[1]``, over sampled tokens of the first sequence: see `STUCK`.

    ``z`` [B, T, units] or [T, units] is the input of an activation function, ``edge`` its entry of `EDGES`.
    """
    z = _sampled(z)
    low, high = z.amin(0), z.amax(0)
    return {"dead": (high <= -edge).float().mean().reshape(1), "saturated": (low >= edge).float().mean().reshape(1)}


def activation_numbers(x: Tensor) -> Numbers:
    """Root mean square and kurtosis, ``[1]``, of sampled tokens of the output of a block, [B, T, hidden].

    The kurtosis is mean(x^4) / mean(x^2)^2: 3 for a normal distribution, and the number of entries if a single one
    holds everything.
    """
    squares = _sampled(x).square()
    mean = squares.mean()
    kurtosis = squares.square().mean() / mean.square()
    return {"rms": mean.sqrt().reshape(1), "kurtosis": kurtosis.reshape(1)}


def logit_numbers(logits: Tensor) -> Numbers:
    """Root mean square, largest absolute value and mean logsumexp, ``[1]``, of the output logits [..., vocabulary] of
    sampled tokens. The logsumexp is the quantity that a z-loss keeps near zero."""
    x = _sampled(logits, LOGIT_ROWS)
    return {
        "logit_rms": x.square().mean().sqrt().reshape(1),
        "logit_max": x.abs().amax().reshape(1),
        "logsumexp": x.logsumexp(-1).mean().reshape(1),
    }


def _projected_logits(hidden: Tensor, weight: Tensor) -> Numbers:
    # In the dtype of the weights: a copy of them in fp32 could take gigabytes.
    return logit_numbers(_sampled(hidden, LOGIT_ROWS).to(weight.dtype) @ weight.detach().T)


def _sampled(x: Tensor, rows: int = ROWS) -> Tensor:
    """Tokens of the first sequence of ``x`` [..., T, width], in fp32 [R, width]."""
    x = x.detach()
    while x.dim() > 2:
        x = x[0]
    return x[_stride(x.shape[0], 1, rows)].float()


def _stride(tokens: int, logits: int, rows: int = ROWS) -> slice:
    """Evenly spaced rows that end with the last one, whose query sees the most keys. ``logits`` is the number of
    entries of a row."""
    rows = max(1, min(rows, MOST_LOGITS // max(logits, 1)))
    step = max(1, math.ceil(tokens / rows))
    return slice((tokens - 1) % step, None, step)


# ---- modules ----


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by name: the entries of its outermost lists of modules that consist of parts.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    >>> list(find_blocks(nn.ModuleDict({"layers": layers})))
    ['layers.0', 'layers.1']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in found)
        if inside or not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):  # it is never called
                continue
            if next(child.children(), None) is not None and next(child.parameters(), None) is not None:
                found[f"{name}.{child_name}" if name else child_name] = child
    return dict(zip(plain_names([*found]), found.values(), strict=True))


def _find_head(model: nn.Module) -> tuple[str, nn.Module | None, nn.Module | None]:
    """Name and module of the output head, and the module ``model`` beside it, which computes its input."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if last in HEADS and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            return plain_names([name])[0], module, modules.get(f"{parent}.model" if parent else "model")
    return "", None, None


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile replaces the call of the module or of one of its parts."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )


def _is_recorded() -> bool:
    """Whether a TorchDispatchMode records the operations of this thread."""
    depth: int = torch._C._len_torch_dispatch_stack()
    return depth > 0


def _first_tensor(output: Any) -> Tensor | None:
    """The tensor that a module returned: its output, or the first entry of it."""
    while isinstance(output, tuple | list | dict) and output:
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    usable = isinstance(output, Tensor) and output.dim() >= 2 and output.is_floating_point() and output.numel() > 0
    return output if usable and not is_sharded(output) else None
