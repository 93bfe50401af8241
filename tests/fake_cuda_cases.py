"""What is stepped on fake CUDA tensors: generators of (case, notes), one for each part of the package."""

import contextlib
import itertools
import os

import torch
from fake_cuda import Watch, faking, watched
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


def groups(params, **options):
    embedding, last, hidden, vector = params
    kinds = {"embedding": embedding, "last": last, "hidden": hidden, "vector": vector}
    return [{"params": [p], "kind": kind, **options} for kind, p in kinds.items()]


def _options():
    """Options as (name, options, dtype of the parameters); each alone, the ones that meet together."""
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
    from evenstep import SCALE, SPAM, StableSPAM

    yield (
        "StableSPAM",
        lambda ps, **o: StableSPAM(ps, **o),
        [{"variant": "official"}, {"total_steps": 9, "reset_interval": 2}],
    )
    sparse = [{"density": 0.5, "reset_interval": 2, "state": state} for state in ("fp32", "bf16", "int8")]
    yield (
        "SPAM",
        lambda ps, **o: SPAM(ps, **o),
        [{"variant": "official"}, {"reset_interval": 2, "clip_start": 1}, *sparse],
    )
    yield "SCALE", lambda ps, **o: SCALE(groups(ps), **o), [{"norm": "l2"}, {"adam_lr": 0.1}]


def _steps(name, build, options, dtype=BF16):
    given = dict(options)
    with faking():
        if isinstance(given.get("lr"), str):
            given["lr"] = torch.tensor(0.1, device=given["lr"])
        settles = "density" not in options  # else a reset draws masks, and brings them without waiting
        return f"{name} {options} {dtype}", stepped(lambda: build(parameters(dtype), **given).step, settles=settles)


def optimizers():
    with contextlib.suppress(ImportError):  # torchao makes the table of its 8 bits once, and could not of fake tensors
        from evenstep.kernels.cuda import _usual_map
        from evenstep.optim.state import moment

        for signed in (True, False):
            moment(torch.zeros(4096), "int8", signed=signed)
            _usual_map(signed)
    for name, build, more in _makers():
        for options, dtype in _options():
            yield _steps(name, build, options, dtype)
        for options, fused in itertools.product(more, (None, False)):
            yield _steps(name, build, options | {"fused": fused})
    with faking():  # parameters of several devices in one group
        from evenstep import StableSPAM

        here = [nn.Parameter(torch.empty(8, 16, device="cpu")), nn.Parameter(torch.empty(16, device="cpu"))]
        for p in here:
            p.grad = torch.empty_like(p)
        for fused in (None, False):
            params = [here[0], *parameters(), here[1]]
            optimizer = StableSPAM(params, fused=fused)
            yield f"StableSPAM on several devices, fused={fused}", watched(optimizer.step, settles=False)


def stabilized():
    from evenstep import stabilize
    from evenstep.baselines.fronts import FRONTS, transforms

    bases = {
        "AdamW": lambda ps: torch.optim.AdamW(ps, fused=True),
        "SGD": lambda ps: torch.optim.SGD(ps, momentum=0.9),
        "StableSPAM": lambda ps: StableSPAM(ps),
    }
    from evenstep import StableSPAM

    def build(base, front, fused, **options):
        optimizer = stabilize(bases[base](parameters()), *transforms(front), fused=fused, **options)
        loss = torch.empty((), device="cuda")
        return lambda: optimizer.step(lambda: loss)

    fronts = [*FRONTS, "spike_clip + adaclip + adagn", "skip_step(watch='loss') + autoclip"]
    for front, fused in itertools.product(fronts, (None, False)):
        with faking():
            yield f"{front} fused={fused}", stepped(lambda front=front, fused=fused: build("AdamW", front, fused))
    for base, nonfinite, reset in itertools.product(bases, ("restore", "zero"), (0, 2)):
        if base == "StableSPAM" and reset:  # which resets by itself
            continue
        options = {"nonfinite": nonfinite, "reset_interval": reset}
        with faking():
            how = stepped(lambda base=base, options=options: build(base, "adaclip + zclip", None, **options))
            yield f"{base} {options}", how


def baselines():
    from evenstep.baselines.catalog import BASELINES
    from evenstep.models import Llama, llama_config

    for name, one in BASELINES.items():
        if one.package != "evenstep":
            continue

        def build(one=one):
            with torch.device("cuda"):
                model = Llama(llama_config("tiny", 64))
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            return one.build(model, lr=1e-3, weight_decay=0.1).step

        with faking():
            yield name, stepped(build)


def monitored():
    from evenstep import SpikeMonitor, StableSPAM

    makers = {
        "StableSPAM": StableSPAM,
        "AdamW": lambda ps: torch.optim.AdamW(ps, fused=True),
    }
    for name, make in makers.items():

        def build(make=make):
            model = nn.ParameterList(parameters())
            optimizer = make(model.parameters())
            monitor = SpikeMonitor(model, optimizer, every=100, say=None)
            loss = torch.empty((), device="cuda")

            def step():
                monitor.observe(loss, rows=(0, 4))
                optimizer.step()

            return step

        with faking():
            yield name, stepped(build)


def lowbit():
    from evenstep import quantize_
    from evenstep.lowbit.recipes import RECIPES

    for recipe, autocast in itertools.product(RECIPES, (False, True)):

        def build(recipe=recipe, autocast=autocast):
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

        with faking():
            yield f"{recipe} autocast={autocast}", stepped(build)


def trained():
    """Steps of a run, and a checkpoint that is written while it goes on."""
    import tempfile
    from pathlib import Path

    from train_support import quick, write_corpus

    from evenstep.train.run import Run

    with tempfile.TemporaryDirectory() as home:
        corpus = write_corpus(Path(home, "corpus.jsonl"))
        Run(quick(corpus, Path(home, "cpu"), train__device="cpu"), say=lambda text: None)  # prepares the data
        plain = {"train__device": "cuda", "log__every": "100", "optim__name": "stable_spam"}
        for i, more in enumerate(
            (
                {},
                {"train__dtype": "bf16", "train__clip_norm": "1.0"},
                {"train__dtype": "bf16-autocast", "train__micro_batch_size": "2", "telemetry__enabled": "false"},
                {"lowbit": "fp4", "optim__name": "spam", "train__clip_norm": "1.0"},
                {"optim__name": "scale", "train__activation_checkpointing": "true"},
                {"optim__name": "adamw", "optim__before": "adaclip + adagn"},
                {"train__loss_chunk": "16", "optim__name": "muon"},
            )
        ):
            with faking():
                config = quick(corpus, Path(home, f"run{i}"), **(plain | more))
                made = []

                def build(config=config, made=made):
                    made.append(Run(config, say=lambda text: None))
                    return made[0].step

                yield f"{more}", stepped(build, settles=False)
                yield f"saving {more}", saved(made[0]) if made else []


def saved(run):
    """What is noted while a checkpoint of a run is begun; nothing is written."""
    import torch.distributed.checkpoint as dcp

    from evenstep.train.tensors import optimizer_tensors

    written, dcp.save = dcp.save, lambda tensors, **_: None
    tensors = run.tensors() | optimizer_tensors(run.model, run.optimizer)[0]
    saver = run.saver
    saver.wait = lambda: None
    steps = itertools.count(1)
    notes = watched(lambda: saver.save(next(steps), tensors, lambda directory: None, None, wait=False))
    saver.close()
    dcp.save = written
    return notes


def waiting():
    """What a step must not do, and the word that must be noted."""
    with faking():
        x, flag = torch.empty(4, device="cuda"), torch.ones(4, dtype=torch.bool, device="cuda")
        host, number = torch.ones(4), torch.ones(())
        wrong = {
            "blocking copy": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "blocking copy of": lambda: x.copy_(host),
            "not pinned": lambda: host.to("cuda", non_blocking=True),
            "0-d tensor into where": lambda: torch.where(flag, number, x),
            "mixed devices into cat": lambda: torch.cat([x, host]),
            "mixed devices into stack": lambda: torch.stack([x[0], number]),
            "reads the device (_local_scalar_dense)": lambda: x[0].item(),
            "reads the device (is_nonzero)": lambda: bool(flag[0]),
            "reads the device (nonzero)": lambda: torch.nonzero(flag),
            "by a mask": lambda: x[flag],
            "reads the device (equal)": lambda: torch.equal(x, x),
            "from cuda to cpu": lambda: x.cpu(),
            "raises ValueError": lambda: int("x"),
            "at a later step": lambda: host.pin_memory().to("cuda", non_blocking=True),
        }
        for kind, work in wrong.items():
            yield kind, watched(work, 2)
        allowed = {
            "pinned": lambda: host.pin_memory().to("cuda", non_blocking=True),
            "an argument of a kernel": lambda: x.mul_(number) + number,
        }
        assert not any(watched(work, 2, settles=False) for work in allowed.values())
