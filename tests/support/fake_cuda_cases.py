"""What is stepped on fake CUDA tensors: generators of (case, function that returns what was noted), one for each part
of the package.
"""

import atexit
import contextlib
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from fake_cuda import Counter, Watch, watched
from torch import nn

FLOAT, BF16 = torch.float32, torch.bfloat16


def stepped(build, **how):
    """What is noted in the steps that ``build`` gives; what it does itself may wait."""
    try:
        with Watch():
            step = build()
    except Exception as problem:
        if os.environ.get("FAKE_CUDA_RAISE"):
            raise
        return [f"raises {problem!r} when it is built"]
    return watched(step, **how)


def parameters(dtype=BF16):
    """An embedding, two matrices (one that 8-bit blocks fit) and a vector, with gradients."""
    shapes = (40, 16), (64, 64), (24, 8), (17,)
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


# ---- optimizers ----


def _options():
    """Options and the dtype of the parameters."""
    yield from itertools.product([{}], (FLOAT, BF16))
    for rounding, fused in itertools.product(("stochastic", "kahan"), (None, False)):
        yield {"rounding": rounding, "fused": fused}, BF16
    for state, fused in itertools.product(("bf16", "int8"), (None, False)):
        yield {"state": state, "fused": fused}, BF16
    yield {"fused": True}, BF16
    yield {"fused": False}, FLOAT
    for fused in (None, False):
        yield {"capturable": True, "fused": fused}, FLOAT
        yield {"capturable": True, "rounding": "stochastic", "fused": fused}, BF16
        yield {"maximize": True, "weight_decay": 0.1, "fused": fused}, FLOAT
        yield {"lr": "cpu", "weight_decay": 0.1, "fused": fused}, BF16
        yield {"lr": "cuda", "weight_decay": 0.1, "fused": fused}, BF16


def _makers():
    """Each optimizer, and options of its own."""
    from evenstep import SCALE, SPAM, StableSPAM

    def scale(params, **options):
        kinds = ("embedding", "last", "hidden", "vector")
        return SCALE([{"params": [p], "kind": kind} for p, kind in zip(params, kinds, strict=True)], **options)

    yield "StableSPAM", StableSPAM, [{"variant": "official"}, {"total_steps": 9, "reset_interval": 2}]
    sparse = [{"density": 0.5, "reset_interval": 2, "state": state} for state in ("fp32", "bf16", "int8")]
    yield "SPAM", SPAM, [{"variant": "official"}, {"reset_interval": 2, "clip_start": 1}, *sparse]
    yield "SCALE", scale, [{"norm": "l2"}, {"adam_lr": 0.1}]


def _optimizer(build, options, dtype):
    given = dict(options)
    if isinstance(given.get("lr"), str):
        given["lr"] = torch.tensor(0.1, device=given["lr"])
    settles = "density" not in options  # else a reset draws masks, and brings them without waiting
    return stepped(lambda: build(parameters(dtype), **given).step, settles=settles)


def _several_devices(fused):
    from evenstep import StableSPAM

    here = [nn.Parameter(torch.empty(8, 16)), nn.Parameter(torch.empty(16))]
    for p in here:
        p.grad = torch.empty_like(p)
    return stepped(lambda: StableSPAM([here[0], *parameters(), here[1]], fused=fused).step, settles=False)


def optimizers():
    with contextlib.suppress(ImportError):  # torchao makes the table of its 8 bits once, and could not of fake tensors
        from evenstep.kernels.cuda import _usual_map
        from evenstep.optim.state import moment

        for signed in (True, False):
            moment(torch.zeros(4096), "int8", signed=signed)
            _usual_map(signed)
    for name, build, more in _makers():
        for options, dtype in _options():
            yield f"{name} {options} {dtype}", partial(_optimizer, build, options, dtype)
        for options, fused in itertools.product(more, (None, False)):
            yield f"{name} {options} fused={fused}", partial(_optimizer, build, options | {"fused": fused}, BF16)
    for fused in (None, False):
        yield f"StableSPAM on several devices, fused={fused}", partial(_several_devices, fused)


def _stabilized(base, front, **options):
    from evenstep import StableSPAM, stabilize
    from evenstep.baselines.transforms import build_transforms

    bases = {
        "AdamW": lambda ps: torch.optim.AdamW(ps, fused=True),
        "SGD": lambda ps: torch.optim.SGD(ps, momentum=0.9),
        "StableSPAM": lambda ps: StableSPAM(ps),
    }

    def build():
        optimizer = stabilize(bases[base](parameters()), *build_transforms(front), **options)
        loss = torch.empty((), device="cuda")
        return lambda: optimizer.step(lambda: loss)

    return stepped(build)


def stabilized():
    from evenstep.baselines.transforms import TRANSFORMS

    fronts = [*TRANSFORMS, "spike_clip + adaclip + adagn", "skip_step(watch='loss') + autoclip"]
    for front, fused in itertools.product(fronts, (None, False)):
        yield f"{front} fused={fused}", partial(_stabilized, "AdamW", front, fused=fused)
    for base, nonfinite in itertools.product(("AdamW", "SGD", "StableSPAM"), ("restore", "zero")):
        yield f"{base} {nonfinite}", partial(_stabilized, base, "adaclip + zclip", nonfinite=nonfinite)
    for base in ("AdamW", "SGD"):
        yield f"{base} reset", partial(_stabilized, base, "adagn", reset_interval=2)


# ---- launches ----

MOST = {
    "StableSPAM": (lambda ps: _optimizers().StableSPAM(ps), 6),
    "SPAM": (lambda ps: _optimizers().SPAM(ps), 4),
    # Of these the base launches 9 more, which are not counted: 4 turns, one of them with two calls.
    "stabilize(AdamW, AdaClip, AdaGN)": (lambda ps: _in_front("adaclip + adagn", ps), 31),
    "stabilize(AdamW, AdaGN)": (lambda ps: _in_front("adagn", ps), 28),
}
"""Optimizers, and how much a step may launch for the 75 tensors of LLaMA-60M."""


def _optimizers():
    import evenstep

    return evenstep


def _in_front(front, params):
    from evenstep.baselines.transforms import build_transforms

    return _optimizers().stabilize(torch.optim.AdamW(params, fused=True), *build_transforms(front))


def _counted(build, most):
    import evenstep.kernels.cuda as kernels
    from evenstep.bench.measure import outline

    params = [nn.Parameter(torch.empty(p.shape, device="cuda")) for p in outline("60m").parameters()]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = build(params)
    for _ in range(2):  # constants and the base's state
        optimizer.step()
    counter, stand_in = Counter(), kernels.launches
    kernels.launches = counter.launches
    try:
        with counter:
            optimizer.step()
    finally:
        kernels.launches = stand_in
    launched = counter.triton + counter.operators
    return [f"{launched} launches, more than {most}"] if launched > most else []


def counted():
    """What is noted of launches that are too many."""
    for name, (build, most) in MOST.items():
        yield name, partial(_counted, build, most)
    build, most = MOST["stabilize(AdamW, AdaClip, AdaGN)"]
    yield "one too many", partial(_counted, build, most - 1)


def _baseline(one):
    from evenstep.models import Llama, llama_config

    def build():
        with torch.device("cuda"):
            model = Llama(llama_config("tiny", 64))
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        return one.build(model, lr=1e-3, weight_decay=0.1).step

    return stepped(build)


def baselines():
    from evenstep.baselines.catalog import BASELINES

    for name, one in BASELINES.items():
        if one.package == "evenstep" and one.home.startswith("evenstep.baselines"):
            yield name, partial(_baseline, one)


# ---- around them ----


def _monitored(make):
    from evenstep import SpikeMonitor

    def build():
        model = nn.ParameterList(parameters())
        optimizer = make(model.parameters())
        monitor = SpikeMonitor(model, optimizer, every=100, say=None)
        loss = torch.empty((), device="cuda")

        def step():
            monitor.observe(loss, rows=(0, 4))
            optimizer.step()

        return step

    return stepped(build)


def monitored():
    from evenstep import StableSPAM

    yield "AdamW", partial(_monitored, lambda ps: torch.optim.AdamW(ps, fused=True))
    yield "StableSPAM", partial(_monitored, StableSPAM)


def _guarded(make):
    from evenstep import SpikeGuard

    def build():
        model = nn.ParameterList(parameters())
        guard = SpikeGuard(model, make(model.parameters()), ladder=("lower_lr", "stop"), check_every=100)
        loss = torch.empty((), device="cuda")
        return lambda: guard.step(loss, rows=0)

    return stepped(build)


def guarded():
    from evenstep import StableSPAM

    yield "AdamW", partial(_guarded, lambda ps: torch.optim.AdamW(ps, fused=True))
    yield "StableSPAM", partial(_guarded, StableSPAM)


def _lowbit(recipe, autocast):
    from evenstep import quantize_

    def build():
        with torch.device("cuda"):
            model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        quantize_(model, recipe)
        x = torch.empty(4, 16, 64, device="cuda")

        def step():
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(x).square().sum()
            loss.backward()
            model.zero_grad()

        return step

    return stepped(build, steps=2)


def lowbit():
    from evenstep.lowbit.recipes import RECIPES

    for autocast, recipe in itertools.product((False, True), RECIPES):
        yield f"{recipe} autocast={autocast}", partial(_lowbit, recipe, autocast)


# ---- a run ----

RUNS = (
    {"train__dtype": "bf16-autocast", "train__micro_batch_size": "2", "train__clip_norm": "1.0"},
    {},
    {"train__dtype": "bf16", "telemetry__enabled": "false"},
    {"lowbit": "fp4", "optim__name": "spam", "train__clip_norm": "1.0"},
    {"optim__name": "scale", "train__activation_checkpointing": "true"},
    {"optim__name": "adamw", "optim__before": "adaclip + adagn"},
    {"train__loss_chunk": "16", "optim__name": "muon"},
    {"guard__ladder": "lower_lr,rewind,stop", "train__clip_norm": "1.0"},
    {"train__z_loss": "1e-4", "optim__lr_scale.embedding": "10", "model__logit_softcap": "30", "model__kv_heads": "2"},
)


def _trained(corpus, number):
    """Steps of a run, and the start of a checkpoint, of which nothing is written."""
    from train_support import quick

    from evenstep.train.trainer import Run

    given = {"train__device": "cuda", "log__every": "100", "optim__name": "stable_spam", **RUNS[number]}
    config = quick(corpus, corpus.with_name(f"run{number}"), **given)
    made = []

    def build():
        made.append(Run(config, say=lambda text: None))
        return made[0].step

    notes = stepped(build, steps=2, settles=False)
    return notes + (_saved(made[0]) if made else [])


def _saved(run):
    import torch.distributed.checkpoint as dcp

    from evenstep.train.saving import optimizer_tensors

    written, dcp.save = dcp.save, lambda tensors, **_: None
    tensors = run.tensors() | optimizer_tensors(run.model, run.optimizer)[0]
    saver = run.saver
    saver.wait = lambda: None
    steps = itertools.count(1)
    notes = watched(lambda: saver.save(next(steps), tensors, lambda directory: None, None, wait=False), 2)
    saver.close()
    dcp.save = written
    return notes


def trained():
    from train_support import quick, write_corpus

    from evenstep.train.trainer import Run

    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    corpus = write_corpus(Path(home.name, "corpus.jsonl"))
    Run(quick(corpus, Path(home.name, "cpu"), train__device="cpu"), say=lambda text: None)  # prepares the data
    for number, options in enumerate(RUNS):
        yield f"{options}", partial(_trained, corpus, number)


# ---- the watch itself ----


def waiting():
    """What a step must not do, named by a word that must be noted."""
    wrong = {
        "blocking copy": lambda x, flag, host, one: torch.tensor([1.0, 2.0], device="cuda"),
        "blocking copy of": lambda x, flag, host, one: x.copy_(host),
        "not pinned": lambda x, flag, host, one: host.to("cuda", non_blocking=True),
        "at a later step": lambda x, flag, host, one: host.pin_memory().to("cuda", non_blocking=True),
        "from cuda to cpu": lambda x, flag, host, one: x.cpu(),
        "0-d tensor into where": lambda x, flag, host, one: torch.where(flag, one, x),
        "mixed devices into stack": lambda x, flag, host, one: torch.stack([x[0], one]),
        "devices": lambda x, flag, host, one: torch.cat([x, host]),
        "reads the device (_local_scalar_dense)": lambda x, flag, host, one: x[0].item(),
        "reads the device (nonzero)": lambda x, flag, host, one: torch.nonzero(flag),
        "reads the device (equal)": lambda x, flag, host, one: torch.equal(x, x),
        "by a mask": lambda x, flag, host, one: x[flag],
        "raises ValueError": lambda x, flag, host, one: int("x"),
    }

    def waits(work, **how):
        given = torch.empty(4, device="cuda"), torch.ones(4, device="cuda") > 0, torch.ones(4), torch.ones(())
        return watched(lambda: work(*given), 2, **how)

    for kind, work in wrong.items():
        yield kind, partial(waits, work)
    yield "nothing: a number", partial(waits, lambda x, flag, host, one: x.mul_(one) + one)
    yield "nothing: pinned", partial(waits, lambda x, flag, host, one: host.pin_memory().to(x, True), settles=False)
