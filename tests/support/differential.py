"""Differential fuzzing: random combinations of features against the plain path, ``make fuzz`` (or
``python tests/support/differential.py --count 1000 --seed 0``).

A `Case` draws a problem (tensor shapes, gradients, an optimizer with its options, a precision) and a way to run it
(fused or plain, compiled, wrapped, accumulated, saved and loaded in the middle, one or two processes). The result is
compared to that of the same problem run eagerly in one process by the plain code; for reduced precision also, loosely,
to fp32. A difference beyond rounding is reduced to the fewest features that still show it and printed as a script.

Gradients do not come from a network. The loss is ``sum(p * G)`` for given tensors G, whose gradient is exactly G,
however the sum is split over micro batches and processes, so that tolerances can be a few units in the last place.
Networks take part in `NetworkCase`, where tolerances are wider.
"""

import argparse
import copy
import dataclasses
import io
import math
import multiprocessing
import os
import pickle
import random
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import evenstep
from evenstep import SCALE, SPAM, StableSPAM, stabilize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SHAPES = [(6, 8), (24, 40), (300, 7), (5,), (33,), (1,), (4, 3, 2, 2), (1, 17), (17, 1), (512,), (16, 256)]
REFUSED = (ValueError, TypeError, RuntimeError)
"""What evenstep raises for a combination that it does not serve; counted, and shown by ``--verbose``."""


@dataclass(frozen=True)
class Case:
    """One problem and one way to run it. The defaults of the second half are the reference's."""

    # The problem.
    shapes: tuple[tuple[int, ...], ...] = ((6, 8), (5,))
    optimizer: str = "StableSPAM"
    options: dict[str, Any] = field(default_factory=dict)
    transforms: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Of ``stabilize``, whose base is ``optimizer``, then a class of torch.optim."""
    dtype: str = "fp32"
    steps: int = 6
    seed: int = 0
    spikes: tuple[tuple[int, int, float], ...] = ()
    """(step, tensor, factor of one entry); the factor may be inf or nan."""
    absent: tuple[tuple[int, int], ...] = ()
    """(step, tensor) without a gradient."""
    frozen: tuple[int, ...] = ()
    thaw: int | None = None
    """The step before which the frozen tensors begin to require gradients."""
    new_lr: tuple[int, float] | None = None
    """The step before which the learning rate changes, and what it is multiplied by."""

    # The way to run it.
    fused: bool | None = False
    backend: str | None = None
    accumulate: int = 1
    reload: int | None = None
    """The step before which all is saved and loaded into new objects."""
    step_by: str = "step"
    """Or ``"closure"``, or ``"release"``: `step_parameter` for each tensor in the backward pass."""
    reload_by: str = "torch.save"
    """Or ``"deepcopy"``, ``"pickle"``."""
    wrapper: str | None = None
    """``"ddp"``, ``"fsdp2"``."""
    processes: int = 1
    capturable: bool = False
    tensor_lr: bool = False
    transposed: bool = False
    """Whether matrices are stored as the transposes of contiguous ones."""
    groups: int = 1
    monitor: bool = False
    """Whether a SpikeMonitor watches."""

    def reference(self) -> "Case":
        return dataclasses.replace(self, **REFERENCE)

    def script(self) -> str:
        """Ten lines or so that show the difference, run from the root of a checkout."""
        given = [
            f"    {f.name}={getattr(self, f.name)!r},"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default_factory() if callable(f.default_factory) else f.default)
        ]
        head = ["import sys", 'sys.path[:0] = [".", "tests/support"]', "from math import inf, nan", ""]
        head += [f"from differential import {type(self).__name__}, difference", "", 'if __name__ == "__main__":']
        body = [f"    case = {type(self).__name__}(", *[f"    {line}" for line in given], "    )"]
        return "\n".join([*head, *body, "    print(difference(case))"])


WAY = (
    *("fused", "backend", "accumulate", "reload", "step_by", "reload_by", "wrapper", "processes"),
    *("capturable", "tensor_lr", "transposed", "groups", "monitor"),
)
REFERENCE: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Case) if f.name in WAY}


class Products(nn.Module):
    """Parameters of given shapes; ``forward`` is the sum of their products with the tensors that it is given."""

    def __init__(self, shapes: Any, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=draw).mul_(0.2).to(dtype) for shape in shapes]
        self.p = nn.ParameterList(nn.Parameter(value) for value in values)

    def forward(self, given: list[Tensor | None]) -> Tensor:
        terms = [(p * g).sum() for p, g in zip(self.p, given, strict=True) if g is not None and p.requires_grad]
        # Every parameter takes part, as DistributedDataParallel wants it.
        return torch.stack([term.double() for term in terms]).sum()


def gradients(case: Case, step: int) -> list[Tensor | None]:
    """The gradients of one step, with few enough bits that halves and sums of them are exact in any dtype."""
    draw = torch.Generator().manual_seed(1000 * case.seed + step)
    found: list[Tensor | None] = []
    for i, shape in enumerate(case.shapes):
        g = torch.randn(shape, generator=draw).mul_(10.0 ** ((i % 3) - 1))
        g = torch.ldexp(torch.round(torch.ldexp(g, torch.tensor(5))), torch.tensor(-5))
        for at, tensor, factor in case.spikes:
            if (at, tensor) == (step, i) and g.numel():
                entry = (7 * step) % g.numel()
                value = factor if not math.isfinite(factor) else (abs(float(g.flatten()[entry])) + 1) * factor
                g.view(-1)[entry] = value
        found.append(None if (step, i) in case.absent else g.to(DTYPES[case.dtype]))
    return found


def build(case: Case, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    options = dict(case.options)
    if case.tensor_lr:
        options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
    if case.capturable:
        options["capturable"] = True
    if case.transforms:
        own = {key: options.pop(key) for key in ("reset_interval", "nonfinite") if key in options}
        base = getattr(torch.optim, case.optimizer)(params, **options)
        return stabilize(base, *(getattr(evenstep, name)(**how) for name, how in case.transforms), **own)
    if case.optimizer == "SCALE":
        matrices = [i for i, p in enumerate(params) if p.dim() > 1]
        kinds = dict.fromkeys(matrices, "hidden") | dict.fromkeys(matrices[-1:], "last")
        kinds |= dict.fromkeys(matrices[: len(matrices) > 1], "embedding")
        groups = [{"params": [p], "kind": kinds.get(i, "vector")} for i, p in enumerate(params)]
        return SCALE(groups, fused=case.fused, **options)
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:]}] if case.groups == 2 and half else params
    return {"StableSPAM": StableSPAM, "SPAM": SPAM}[case.optimizer](groups, fused=case.fused, **options)


SHARES = {1: (1.0,), 2: (0.5, 0.5), 3: (0.25, 0.25, 0.5), 4: (0.25, 0.25, 0.25, 0.25)}


def run(case: Case, rank: int = 0) -> dict[str, Any]:
    """Train; returns parameters, what was skipped, and the counters of the state, as plain tensors on every rank."""
    torch._dynamo.reset()
    model: nn.Module = Products(case.shapes, DTYPES[case.dtype], case.seed)
    model, optimizer, step = _assembled(case, model)
    bare = _bare(model)
    skipped = torch.zeros(len(case.shapes), dtype=torch.float64)
    for number in range(case.steps):
        if case.thaw == number:
            for i in case.frozen:
                bare.p[i].requires_grad_(True)
        if case.reload == number:
            model, optimizer, step = _reloaded(case, model, optimizer)
            bare = _bare(model)
        if case.new_lr and case.new_lr[0] == number:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * case.new_lr[1]
        given = gradients(case, number)
        # Rank 0 has twice the gradient and rank 1 none of it, so that the mean is exact.
        factor = 1.0 if case.processes == 1 else 2.0 - 2.0 * rank
        for i, share in enumerate(SHARES[case.accumulate]):
            parts = [None if g is None else _times(g, factor * share) for g in given]
            if hasattr(model, "no_sync"):
                model.require_backward_grad_sync = i == case.accumulate - 1
            if any(g is not None and p.requires_grad for g, p in zip(parts, bare.p, strict=True)):
                model(parts).backward()
        if case.step_by == "release":
            for p in bare.p:
                if p.grad is not None:
                    optimizer.step_parameter(p)
                    p.grad = None
        step()
        stats = getattr(optimizer, "stats", {})
        if "skipped" in stats and case.step_by != "release":
            skipped += torch.nan_to_num(stats["skipped"].double().cpu())
        optimizer.zero_grad(set_to_none=True)
    return {
        "params": [_whole(p).detach().clone() for p in bare.p],
        "skipped": skipped if case.step_by != "release" else None,
        "counts": {
            f"{i}.{name}": _whole(value).detach().double().clone()
            for i, p in enumerate(bare.p)
            for name, value in optimizer.state.get(p, {}).items()
            if name in ("n", "age") and isinstance(value, Tensor)
        },
    }


def _times(g: Tensor, factor: float) -> Tensor:
    """``g`` times ``factor``; an Inf or NaN stays what it is (0 times Inf would be another NaN)."""
    return torch.where(torch.isfinite(g), g * factor, g)


def _assembled(case: Case, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    for i in case.frozen:
        if case.thaw is None or case.thaw > 0:
            model.p[i].requires_grad_(False)
    if case.wrapper == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        model = DistributedDataParallel(model, find_unused_parameters=bool(case.absent))
    elif case.wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    if case.transposed:
        for p in model.p:
            p.data = p.data.mT.contiguous().mT if p.dim() > 1 else p.data
    optimizer = build(case, list(_bare(model).p))
    if case.monitor:
        evenstep.SpikeMonitor(_bare(model), optimizer, say=None)
    return model, optimizer, _stepper(case, optimizer)


def _stepper(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    if case.backend is not None:
        return torch.compile(optimizer.step, backend=case.backend)
    if case.step_by == "closure":
        return lambda: optimizer.step(lambda: torch.zeros(()))
    return optimizer.step


def _through_a_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _bare(model: nn.Module) -> Any:
    return getattr(model, "module", model)


def _whole(x: Tensor) -> Tensor:
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.dequantize() if hasattr(x, "codes") else x


def _reloaded(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, Any]:
    """Save, and load into a model and an optimizer made anew from other weights."""
    if case.wrapper == "fsdp2":
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        weights, state = get_state_dict(model, optimizer)
        weights, state = copy.deepcopy(weights), copy.deepcopy(state)
    elif case.reload_by == "torch.save":
        weights, state = _through_a_file([_bare(model).state_dict(), optimizer.state_dict()])
    else:  # the objects themselves
        pair = (model, optimizer)
        model, optimizer = copy.deepcopy(pair) if case.reload_by == "deepcopy" else pickle.loads(pickle.dumps(pair))
        return model, optimizer, _stepper(case, optimizer)
    now = dataclasses.replace(case, frozen=() if case.thaw is not None and case.thaw <= case.reload else case.frozen)
    new, fresh, step = _assembled(now, Products(case.shapes, DTYPES[case.dtype], case.seed + 77))
    if case.wrapper == "fsdp2":
        set_state_dict(new, fresh, model_state_dict=weights, optim_state_dict=state)
    else:
        _bare(new).load_state_dict(weights)
        fresh.load_state_dict(state)
    return new, fresh, step


# ---- networks ----


@dataclass(frozen=True)
class NetworkCase(Case):
    """A small network under AdamW whose low-bit recipe, compilation, checkpointing and micro batches vary. Only
    ``seed``, ``steps``, ``backend``, ``accumulate``, ``reload`` and the fields here mean anything."""

    recipe: str | None = None
    checkpointing: bool = False
    autocast: bool = False

    def reference(self) -> "Case":
        return dataclasses.replace(super().reference(), checkpointing=False)  # type: ignore[return-value]


class Network(nn.Module):
    def __init__(self, case: NetworkCase) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        sizes = [(32, 48), (48, 48), (48, 32)]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=i != 1) for i, (a, b) in enumerate(sizes))
        self.norm = nn.LayerNorm(48)
        self.checkpointing = case.checkpointing

    def block(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.nn.functional.silu(self.norm(self.layers[0](x))))

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(self.block, x, use_reentrant=False) if self.checkpointing else self.block(x)
        return self.layers[2](torch.nn.functional.silu(y))


def run_network(case: NetworkCase) -> dict[str, Any]:
    torch._dynamo.reset()

    def made(seed: int) -> tuple[Network, Any, Any]:
        model = Network(dataclasses.replace(case, seed=seed))
        if case.recipe:
            evenstep.quantize_(model, case.recipe)
        optimizer = StableSPAM(model.parameters(), lr=1e-3, fused=case.fused)
        return model, optimizer, torch.compile(model, backend=case.backend) if case.backend else model

    model, optimizer, call = made(case.seed)
    draw = torch.Generator().manual_seed(case.seed)
    for number in range(case.steps):
        if case.reload == number:
            weights, state = _through_a_file([model.state_dict(), optimizer.state_dict()])
            model, optimizer, call = made(case.seed + 5)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        x, y = torch.randn(8, 32, generator=draw), torch.randn(8, 32, generator=draw)
        pieces = {1: 1, 2: 2, 3: 4, 4: 4}[case.accumulate]
        for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                loss = torch.nn.functional.mse_loss(call(a).float(), b) / pieces
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"params": [p.detach().clone() for p in model.parameters()], "skipped": None, "counts": {}}


# ---- comparing ----


def difference(case: Case) -> str | None:
    """What is wrong, in one line; None if nothing is. Raises what the case raises, unless its reference does too."""
    if isinstance(case, NetworkCase):
        return _compare_networks(run_network(case), run_network(case.reference()), case)  # type: ignore[arg-type]
    expected = run(case.reference())
    found = PAIR.run(case) if case.processes > 1 or case.wrapper else run(case)
    wrong = _compare(found, expected, case)
    if wrong is None and (case.dtype == "bf16" or case.options.get("state", "fp32") != "fp32"):
        wrong = _compare_loosely(found, case)
    return wrong


def _lr(case: Case) -> float:
    lr = case.options.get("lr", 1e-3)
    lr = max(lr, case.options.get("adam_lr") or 0.0)
    return lr * max(1.0, case.new_lr[1] if case.new_lr else 1.0)


def _compare(found: dict[str, Any], expected: dict[str, Any], case: Case) -> str | None:
    for name, value in expected["counts"].items():
        if name not in found["counts"]:
            return f"the state lacks {name}"
        if not torch.equal(found["counts"][name], value):
            return f"{name} is {found['counts'][name].tolist()}, expected {value.tolist()}"
    if found["skipped"] is not None and not torch.equal(found["skipped"], expected["skipped"]):
        return f"skipped is {found['skipped'].tolist()}, expected {expected['skipped'].tolist()}"
    coarse = case.options.get("state", "fp32")
    for i, (a, b) in enumerate(zip(found["params"], expected["params"], strict=True)):
        if not bool(torch.isfinite(a).all()):
            return f"parameter {i} of shape {tuple(a.shape)} is not finite"
        gap, ulp = (a.double() - b.double()).abs(), torch.finfo(a.dtype).eps * b.double().abs()
        reach = _reach(b, case)
        fine = {"fp32": 3e-4, "bf16": 2e-2, "int8": 2e-2}[coarse]
        allowed = fine * reach * case.steps + (2 if a.dtype == torch.bfloat16 else 4 * case.steps) * ulp + 1e-30
        bad = gap > allowed
        # A number that lies between two codes may fall to either side: some entries of coarse formats may differ more.
        share = {"fp32": 0.0, "bf16": 0.02, "int8": 0.05}[coarse] + (0.02 if a.dtype == torch.bfloat16 else 0.0)
        if int(bad.sum()) > max(share * a.numel(), 2 if share and a.numel() > 8 else 0):
            worst = float((gap / allowed).max())
            return (
                f"parameter {i} of shape {tuple(a.shape)} differs by up to {float(gap.max()):.3g} in {int(bad.sum())} "
                f"entries, {worst:.3g} times what rounding allows"
            )
    return None


def _reach(p: Tensor, case: Case) -> float:
    """How far one step moves an entry, about."""
    if case.optimizer == "SGD":
        return _lr(case) * 10
    if case.optimizer == "SCALE" and p.dim() > 1:
        return _lr(case) * (1.0 if case.options.get("norm") == "l2" else math.sqrt(p[0].numel()))
    return _lr(case)


def _compare_loosely(found: dict[str, Any], case: Case) -> str | None:
    """Against fp32 parameters and state: reduced precision may be coarse, but it must train alike."""
    if case.dtype == "bf16" and case.options.get("rounding", "nearest") == "nearest":
        return None  # nearest rounding loses updates below half a unit in the last place, as it should
    options = {key: value for key, value in case.options.items() if key not in ("state", "rounding")}
    # The same weights and gradients, rounded to bf16 where the case has them so.
    exact = dataclasses.replace(case.reference(), options=options, dtype="fp32")
    start = Products(case.shapes, DTYPES[case.dtype], case.seed)
    expected = _run_from(exact, [p.detach().float() for p in start.p])
    for i, (a, b, p) in enumerate(zip(found["params"], expected["params"], start.p, strict=True)):
        moved = (b.double() - p.detach().double()).abs().mean()
        gap = (a.double() - b.double()).abs().mean()
        ulp = torch.finfo(a.dtype).eps * p.detach().double().abs().mean()
        if a.numel() >= 32 and gap > 0.5 * moved + ulp:
            return f"parameter {i} is {float(gap):.3g} away from its value in fp32, which moved by {float(moved):.3g}"
    return None


def _run_from(case: Case, values: list[Tensor]) -> dict[str, Any]:
    global Products
    original = Products

    class Given(original):  # type: ignore[misc, valid-type]
        def __init__(self, *how: Any) -> None:
            super().__init__(*how)
            with torch.no_grad():
                for p, value in zip(self.p, values, strict=True):
                    p.copy_(value)

    Products = Given  # type: ignore[misc]
    try:
        return run(case)
    finally:
        Products = original  # type: ignore[misc]


def _compare_networks(found: dict[str, Any], expected: dict[str, Any], case: NetworkCase) -> str | None:
    for i, (a, b) in enumerate(zip(found["params"], expected["params"], strict=True)):
        gap = (a - b).abs()
        coarse = case.recipe is not None or case.autocast
        # Low bits turn a difference in the last place into one of a whole code here and there.
        bad = gap > (0.05 if coarse else 2e-3) * 1e-3 * case.steps + 1e-6
        if not bool(torch.isfinite(a).all()) or float(bad.double().mean()) > (0.25 if coarse else 0.01):
            return f"parameter {i} differs by up to {float(gap.max()):.3g} in {int(bad.sum())} of {a.numel()} entries"
    return None


# ---- two processes ----


def _serve(rank: int, size: int, port: int, inbox: Any, outbox: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    while (case := inbox.get()) is not None:
        try:
            result: Any = run(case, rank)
            # A tensor would travel as a file descriptor, of which a long campaign runs out; NumPy has no bf16.
            params = [p.double() if p.dtype == torch.bfloat16 else p for p in result["params"]]
            result["params"] = [p.numpy() for p in params]
        except Exception as problem:
            where = traceback.extract_tb(problem.__traceback__)[-1]
            result = (_ours(problem), f"{type(problem).__name__}: {problem} ({where.filename}:{where.lineno})")
        outbox.put(result)
    os._exit(0)


class Refused(ValueError):
    """What evenstep refused in another process."""


class Pair:
    """Processes that run cases together: one for a wrapper alone, two for two. They are started on first use and again
    after a case that ended or hung one of them.
    """

    def __init__(self) -> None:
        self.groups: dict[int, list[tuple[Any, Any, Any]]] = {}

    def run(self, case: Case) -> dict[str, Any]:
        size = case.processes
        group = self.groups.get(size) or self._start(size)
        for _, inbox, _ in group:
            inbox.put(case)
        results = []
        try:
            for process, _, outbox in group:
                for _ in range(120):
                    try:
                        results.append(outbox.get(timeout=1))
                        break
                    except Exception:
                        if not process.is_alive():
                            raise RuntimeError("a process died") from None
                else:
                    raise TimeoutError("a process hangs: no answer in 120 s")
        except (RuntimeError, TimeoutError):
            self.close(size)
            raise
        for result in results:
            if isinstance(result, tuple):
                refused, text = result
                if not (refused and all(isinstance(other, tuple) for other in results)):
                    self.close(size)  # the others may be waiting for the one that failed
                raise Refused(text) if refused else RuntimeError(text)
        dtype = DTYPES[case.dtype]
        for result in results:
            result["params"] = [torch.from_numpy(p).to(dtype) for p in result["params"]]
        for a, b in zip(results[0]["params"], results[-1]["params"], strict=True):
            assert torch.equal(a, b), "the ranks hold different parameters"
        return results[0]

    def _start(self, size: int) -> list[tuple[Any, Any, Any]]:
        from parallel_support import free_port

        context, port = multiprocessing.get_context("spawn"), free_port()
        group = []
        for rank in range(size):
            inbox, outbox = context.Queue(), context.Queue()
            process = context.Process(target=_serve, args=(rank, size, port, inbox, outbox), daemon=True)
            process.start()
            group.append((process, inbox, outbox))
        self.groups[size] = group
        return group

    def close(self, *sizes: int) -> None:
        for size in sizes or list(self.groups):
            for process, _, _ in self.groups.pop(size, []):
                process.kill()
                process.join()


PAIR = Pair()

# ---- drawing ----


def draw_case(seed: int) -> Case:
    """The case of a seed: the same on every machine."""
    draw = random.Random(seed)
    if draw.random() < 0.12:
        return _draw_network(draw, seed)
    pick, chance = draw.choice, lambda p: draw.random() < p
    shapes = tuple(pick(SHAPES) for _ in range(draw.randint(1, 5)))
    steps = draw.randint(3, 9)
    optimizer = pick(["StableSPAM", "StableSPAM", "SPAM", "SPAM", "SCALE", "AdamW", "SGD", "RMSprop", "Adam"])
    options: dict[str, Any] = {"lr": pick([1e-3, 3e-3, 1e-2])}
    transforms: tuple[tuple[str, dict[str, Any]], ...] = ()
    ours = optimizer in ("StableSPAM", "SPAM", "SCALE")
    if ours:
        if chance(0.4):
            options["weight_decay"] = pick([0.0, 0.1])
        if chance(0.2):
            options["maximize"] = True
        if chance(0.3):
            options["state"] = pick(["bf16", "int8"])
    dtype = pick(["fp32", "fp32", "fp32", "bf16", "bf16", "fp64"])
    if ours and dtype == "bf16" and chance(0.7):
        options["rounding"] = pick(["stochastic", "kahan"])
    if optimizer != "SCALE" and ours:
        if chance(0.5):
            options["reset_interval"] = pick([0, 2, 3, 5])
        if chance(0.3):
            options["variant"] = "official"
        if chance(0.2):
            options["betas"] = pick([(0.9, 0.95), (0.0, 0.99), (0.5, 0.5)])
    if optimizer == "StableSPAM":
        if chance(0.4):
            options |= pick([{"gamma1": 0.85, "gamma2": 0.99999}, {"gamma1": 0.0, "gamma2": 0.5, "gamma3": 0.9}])
            options |= pick([{}, {"robust": True}])
        if chance(0.3):
            options["total_steps"] = draw.randint(3, 12)
    if optimizer == "SPAM":
        options |= {"warmup_steps": pick([0, 1, 3]), "clip_start": pick([0, 1, 2])}
        if chance(0.3):
            options["threshold"] = pick([0, 2.0, 50.0])
        if chance(0.35):
            options["density"] = pick([0.25, 0.5])
    if optimizer == "SCALE":
        options |= {"norm": pick(["rms", "l2"]), "momentum": pick([0.0, 0.9])}
        if chance(0.3):
            options["adam_lr"] = 2e-3
    if not ours:
        units = ["AdaClip", "AdaGN", "GradientStabilizer", "ValueClip", "AGC", "NormClip", "SpikeClip", "ZClip"]
        units += ["AutoClip", "AdaGC"]
        names = draw.sample(units, draw.randint(1, 2))
        if "AdaGN" in names and "GradientStabilizer" in names:
            names.remove("AdaGN")
        transforms = tuple((name, {}) for name in names)
        if chance(0.3):
            options["reset_interval"] = pick([2, 3])
        if chance(0.3):
            options["nonfinite"] = pick(["skip", "zero"])
    tensor = lambda: draw.randrange(len(shapes))  # noqa: E731
    spikes = tuple(
        (draw.randrange(steps), tensor(), pick([100.0, 1000.0, math.inf, math.nan])) for _ in range(pick([0, 0, 1, 2]))
    )
    frozen = (tensor(),) if len(shapes) > 1 and chance(0.15) else ()
    case = Case(
        shapes=shapes, optimizer=optimizer, options=options, transforms=transforms, dtype=dtype, steps=steps,
        seed=draw.randrange(1000), spikes=spikes,
        absent=tuple({(draw.randrange(steps), tensor()) for _ in range(2)}) if chance(0.15) else (),
        frozen=frozen, thaw=draw.randrange(steps) if frozen and chance(0.6) else None,
        new_lr=(draw.randrange(steps), pick([0.5, 2.0])) if chance(0.2) else None,
        fused=pick([None, None, False]) if ours else False,
        backend=pick(["eager", "aot_eager", "aot_eager_decomp_partition"]) if chance(0.12) else None,
        accumulate=draw.randint(1, 4), reload=draw.randrange(steps) if chance(0.35) else None,
        step_by=pick(["step", "step", "step", "closure", "release"]),
        reload_by=pick(["torch.save", "torch.save", "deepcopy", "pickle"]),
        capturable=ours and chance(0.15), tensor_lr=chance(0.15), transposed=chance(0.15), monitor=chance(0.15),
        groups=pick([1, 1, 2]),
    )  # fmt: skip
    if chance(0.25):
        case = dataclasses.replace(case, wrapper=pick(["ddp", "fsdp2"]), processes=pick([1, 2, 2]))
    return _sensible(case)


def _draw_network(draw: random.Random, seed: int) -> NetworkCase:
    steps = draw.randint(2, 5)
    return NetworkCase(
        seed=seed, steps=steps, recipe=draw.choice([None, "fp4", "int4", "nvfp4", "int8", "mxfp4", "e1m2", "fp8"]),
        checkpointing=draw.random() < 0.5, autocast=draw.random() < 0.3,
        backend=draw.choice([None, None, "eager", "aot_eager"]), accumulate=draw.randint(1, 4),
        reload=draw.randrange(steps) if draw.random() < 0.4 else None, fused=draw.choice([None, False]),
    )  # fmt: skip


def _sensible(case: Case) -> Case:
    """Without combinations that torch itself does not have."""
    changes: dict[str, Any] = {}
    if case.wrapper:
        # DDP wants every parameter in every backward pass; FSDP2 shards along dimension 0 and wants floats of one kind.
        changes |= {"absent": (), "frozen": (), "thaw": None, "step_by": "step", "transposed": False, "monitor": False}
        changes |= {"reload_by": "torch.save"}
    if case.backend or case.transforms:
        changes |= {"step_by": "step"}
    if case.step_by == "release":
        changes |= {"absent": (), "capturable": False}
    if case.options.get("rounding") == "stochastic" or "density" in case.options or case.optimizer == "SCALE":
        changes |= {"groups": 1}  # random numbers are drawn by a parameter's place in the groups
    if case.backend:
        changes |= {"reload_by": "torch.save"}
    if case.frozen and len(set(range(len(case.shapes))) - set(case.frozen)) == 0:
        changes |= {"frozen": (), "thaw": None}
    return dataclasses.replace(case, **changes)


# ---- a campaign ----


def outcome(case: Case) -> tuple[str, str]:
    """("same", ""), ("refused", why), ("differs", how) or ("raises", what)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrong = difference(case)
        except REFUSED as problem:
            text = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            if isinstance(problem, Refused) or _ours(problem):
                return "refused", text
            return "raises", f"{type(problem).__name__}: {text}"
        except Exception as problem:
            return "raises", f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"
    return ("differs", wrong) if wrong else ("same", "")


def _ours(problem: BaseException) -> bool:
    """Whether evenstep itself raised it, as the refusal of what it does not serve."""
    frames = traceback.extract_tb(problem.__traceback__)
    return bool(frames) and "/evenstep/" in frames[-1].filename and "\n" not in str(problem)


def reduced(case: Case, kind: str) -> Case:
    """The case with as many fields as possible at their defaults, still with an outcome of this kind."""
    for f in dataclasses.fields(case):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if f.name in ("optimizer", "options", "transforms", "shapes", "seed") or getattr(case, f.name) == default:
            continue
        smaller = dataclasses.replace(case, **{f.name: default})
        if smaller.processes > 1 and not smaller.wrapper:
            continue
        if outcome(smaller)[0] == kind:
            case = smaller
    for key in list(case.options):
        smaller = dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != key})
        if outcome(smaller)[0] == kind:
            case = smaller
    return case


def campaign(count: int, seed: int = 0, *, verbose: bool = False, report: Any = print) -> int:
    """Run ``count`` cases; returns how many differ or raise. `PAIR` keeps its processes for the next campaign."""
    totals = {"same": 0, "refused": 0, "differs": 0, "raises": 0}
    for number in range(seed, seed + count):
        case = draw_case(number)
        kind, text = outcome(case)
        totals[kind] += 1
        if kind in ("differs", "raises"):
            small = reduced(case, kind)
            report(f"# seed {number}: {outcome(small)[1] or text}\n{small.script()}\n")
        elif verbose and kind == "refused":
            report(f"seed {number}: refused: {text}")
        if (number - seed + 1) % 100 == 0 and verbose:
            report(f"{number - seed + 1} cases: {totals}")
    report(f"{count} combinations from seed {seed}: " + ", ".join(f"{n} {kind}" for kind, n in totals.items()))
    return totals["differs"] + totals["raises"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="random combinations of features against the plain path")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first combination; the next ones follow")
    parser.add_argument("--verbose", action="store_true", help="say what is refused, and count as it goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = campaign(arguments.count, arguments.seed, verbose=arguments.verbose)
    PAIR.close()
    sys.exit(failed > 0)
