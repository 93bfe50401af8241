"""Training throughput and peak memory of our LLaMA against a plain loop around transformers' of the same shape.

    python benchmarks/throughput.py [--compile] [--autocast] [--sizes tiny 9m] [--optim adamw] [--json FILE]

One step is a forward pass, a backward pass and an optimizer step on 8 x 256 tokens in fp32, or with ``--autocast`` also
with matrix products in bf16. The reference is the usual
loop: ``model(input_ids, labels=...)`` with ``torch.optim.AdamW(fused=True)``. All contestants of a size run in one
process and take turns, so that a busy machine slows all of them alike; the ratio is that of the medians. Peak memory is
the resident set of a separate process for each contestant, also without the part from before the model was built
(Python, torch and, for the reference, transformers). With ``--compile``, our model is compiled block by block and the
reference as a whole.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from evenstep.models import Llama, llama_config
from evenstep.train.hardware import commit, describe_hardware, short_commit

BATCH, LENGTH = 8, 256
VOCABULARY = {"tiny": 2048}  # every other size: 32000
WARMUP_STEPS = 2


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def stable_spam(model: torch.nn.Module) -> torch.optim.Optimizer:
    from evenstep import StableSPAM

    return StableSPAM(model.parameters(), lr=1e-3)


def spam(model: torch.nn.Module) -> torch.optim.Optimizer:
    from evenstep import SPAM

    return SPAM(model.parameters(), lr=1e-3)


def scale(model: torch.nn.Module) -> torch.optim.Optimizer:
    from evenstep import SCALE, scale_groups

    return SCALE(scale_groups(model), lr=1e-3)


OPTIMIZERS = {build.__name__: build for build in (adamw, stable_spam, spam, scale)}


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless sequence of random batches, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(2048, (BATCH, LENGTH + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(size: str, compiled: bool, autocast: bool, args: argparse.Namespace) -> Callable[[], None]:
    model = Llama(llama_config(size, VOCABULARY.get(size, 32000), max_seq_len=LENGTH))
    optimizer, data = OPTIMIZERS[args.optim](model), batches()
    if compiled:
        for block in model.model.layers:
            block.compile()

    def step() -> None:
        tokens, targets = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(tokens, targets, chunk=args.chunk or None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reference(size: str, compiled: bool, autocast: bool, args: argparse.Namespace) -> Callable[[], None]:
    import transformers

    config = llama_config(size, VOCABULARY.get(size, 32000))
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=LENGTH,
        )
    )
    optimizer, data = adamw(model), batches()
    if compiled:
        model.compile()

    def step() -> None:
        tokens, _ = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Name -> (its builder, whether the model is compiled, whether products are in bf16).
CONTESTANTS = {
    f"{name}{' compiled' * compiled}{' bf16' * autocast}": (build, compiled, autocast)
    for autocast in (False, True)
    for compiled in (False, True)
    for name, build in (("transformers", reference), ("evenstep", ours))
}


def time_steps(size: str, names: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step of each contestant over interleaved rounds."""
    steps = {
        name: build(size, compiled, autocast, args)
        for name in names
        for build, compiled, autocast in [CONTESTANTS[name]]
    }
    for step in steps.values():
        for _ in range(WARMUP_STEPS):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(size: str, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak resident MiB of three steps in a new process, and the same without the part from before the model exists."""
    options = ["--optim", args.optim, "--chunk", str(args.chunk), "--threads", str(args.threads)]
    command = [sys.executable, __file__, "--sizes", size, "--measure-memory-of", name, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def resident(key: str) -> float:
    """Resident MiB of this process: now (VmRSS), or its peak (VmHWM). Linux only; getrusage's peak includes the
    parent's."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key)) / 1024


def measure_memory_here(size: str, name: str, args: argparse.Namespace) -> None:
    build, compiled, autocast = CONTESTANTS[name]
    if build is reference:
        importlib.import_module("transformers.models.llama.modeling_llama")  # so that its import is not counted
    before = resident("VmRSS")
    step = build(size, compiled, autocast, args)
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    print(json.dumps({"peak_mib": round(peak), "peak_mib_of_training": round(peak - before)}))


def surroundings(threads: int) -> dict[str, object]:
    """Date, commit, hardware and versions of a measurement."""
    cpu = describe_hardware(torch.device("cpu"))["cpu"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": short_commit(commit()),
        "hardware": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "9m"], help="named sizes (default: tiny 9m)")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled models")
    parser.add_argument("--autocast", action="store_true", help="also measure with matrix products in bf16")
    parser.add_argument("--optim", choices=list(OPTIMIZERS), default="adamw", help="our optimizer (default: adamw)")
    parser.add_argument(
        "--chunk", type=int, default=256, help="rows of logits at once in our loss; 0: all (default: 256)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contestant (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--measure-memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure_memory_of:
        measure_memory_here(args.sizes[0], args.measure_memory_of, args)
        return

    import transformers

    result = {**surroundings(args.threads), "transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    print(f"{BATCH} x {LENGTH} tokens; evenstep with {args.optim}, loss chunks of {args.chunk}; reference: adamw")
    print(f"{'size':6}{'':28}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'of training':>13}", flush=True)
    names = [
        name
        for name, (_, compiled, autocast) in CONTESTANTS.items()
        if (args.compile or not compiled) and (args.autocast or not autocast)
    ]
    rows = []
    for size in args.sizes:
        memory = {name: peak_memory(size, name, args) for name in names}
        seconds = time_steps(size, names, args)
        for name in names:
            row = {
                "size": size,
                "name": name,
                "optim": args.optim if name.startswith("evenstep") else "adamw",
                "tokens_per_second": round(BATCH * LENGTH / seconds[name]),
                "ratio_to_transformers": round(seconds["transformers"] / seconds[name], 3),
                **memory[name],
            }
            rows.append(row)
            print(
                f"{size:6}{name:28}{row['tokens_per_second']:>10}{row['ratio_to_transformers']:>8}"
                f"{row['peak_mib']:>10}{row['peak_mib_of_training']:>13}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({**result, "chunk": args.chunk, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
