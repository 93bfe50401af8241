"""What a StableSPAM step in fp32 on a CUDA device launches, and how many bytes it moves: counted without a GPU.

    python benchmarks/launches.py [--shapes 60m] [--compiled]
    python benchmarks/launches.py --loss            # the loss of a chunk between its products instead

Counted are the fused step (Triton), the plain code, and with ``--compiled`` (four minutes or more) the plain code
through torch.compile.

Tensors are fake: they have shapes and a CUDA device, but no data (tests/support/fake_cuda.py). An ATen operator that
makes or changes a tensor counts as one launch, which reads its arguments and writes its results; caches do not count.
Inductor only generates its Triton code, for an H100; bytes are its own count.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests/support")]
import fake_cuda  # noqa: E402  before torch, which asks for a driver when it is imported

fake_cuda.pretend()
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import evenstep.kernels.cuda as kernels  # noqa: E402
from evenstep import StableSPAM  # noqa: E402
from evenstep.bench.measure import outline  # noqa: E402
from evenstep.models import ops  # noqa: E402


class Counter(fake_cuda.Counter):
    def _launched(self, name, tensors, *given):
        found = super()._launched(name, tensors, *given)
        if name == "adam_step_":
            stable, rest = given[1], [*tensors.params, *tensors.exp_avg, *tensors.exp_avg_sq]
            # Clipping reads at most all gradients: chunks without a clipped entry are not read.
            self.moved += fake_cuda.size(tensors.grads) * (2 + stable) + 2 * fake_cuda.size(rest)
        return found


def counted(optimizer):
    """Triton kernels, operators and bytes of the second step; the first one uploads constants."""
    optimizer.step()
    counter = Counter()
    kernels.launches = counter.launches
    with counter:
        optimizer.step()
    return counter.triton, counter.operators, counter.moved


def compiled(optimizer):
    """The same of the code that Inductor generates for the step, which is not run."""
    StableSPAM._compiles = lambda self: True  # which fake tensors, a subclass, would not be asked for
    return generated(lambda: torch.compile(optimizer.step)())


def generated(run):
    """Triton kernels, operators and bytes of the first graph that ``run`` compiles."""
    import torch._inductor.config
    import torch._inductor.graph
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Generated(BaseException): ...

    def stop(graph):
        source = graph.codegen()[0].value.split("def call(")[-1]
        calls = source.count(".run("), source.count("extern_kernels.") + source.count("torch.ops.")
        raise Generated(*calls, graph.count_bytes()[0])

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    torch._inductor.config.fx_graph_cache = torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.graph.GraphLowering.compile_to_module = stop
    try:
        with torch.no_grad():
            run()
    except Generated as found:
        return found.args


def loss():
    """The arithmetic of 8,384 rows of 32,000 bf16 logits: their loss, and their gradient."""
    rows, words = 8384, 32000
    logits = torch.empty(rows, words, device="cuda", dtype=torch.bfloat16)
    targets = torch.empty(rows, device="cuda", dtype=torch.int64)
    given = logits, targets[:, None], torch.empty(rows, 1, device="cuda", dtype=torch.bool), 0.0, None, True

    def autograd():
        of = logits.detach().requires_grad_()
        torch.nn.functional.cross_entropy(of.float(), targets, reduction="sum").backward()

    print("| loss and gradient by | Triton kernels | ATen operators | bytes per logit |\n|---|---|---|---|")
    for name, work in (("F.cross_entropy and autograd", autograd), ("evenstep, eager", lambda: ops._terms(*given))):
        with Counter() as counter:
            work()
        print(f"| {name} | 0 | {counter.operators} | {counter.moved / rows / words:.1f} |", flush=True)
    triton, operators, moved = generated(lambda: ops._compiled_terms()(*given))
    print(f"| evenstep, compiled | {triton} | {operators} | {moved / rows / words:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="60m")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--loss", action="store_true")
    given = parser.parse_args()
    if given.loss:
        with FakeTensorMode(allow_non_fake_inputs=True):
            loss()
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(p.shape, device="cuda")) for p in outline(given.shapes).parameters()]
        for p in params:
            p.grad = torch.empty_like(p)
        entries = sum(p.numel() for p in params)
        print(f"{given.shapes}: {len(params)} tensors, {entries:,} entries\n")
        print("| a step by | Triton kernels | ATen operators | MB moved | bytes per entry |\n|---|---|---|---|---|")
        rows = [("the fused step", counted, None), ("the plain code, eager", counted, False)]
        for name, count, fused in rows + [("the plain code, compiled", compiled, False)] * given.compiled:
            triton, operators, moved = count(StableSPAM(params, fused=fused))
            print(f"| {name} | {triton} | {operators} | {moved / 1e6:,.0f} | {moved / entries:.1f} |", flush=True)


if __name__ == "__main__":
    main()
