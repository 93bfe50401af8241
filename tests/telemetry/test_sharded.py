"""What the monitor says of sharded and replicated models: the numbers of whole tensors, once."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from evenstep import SpikeMonitor, StableSPAM
from evenstep.models import Llama, LlamaConfig
from evenstep.telemetry.diagnosis import diagnose
from evenstep.telemetry.foreign import load_log
from evenstep.telemetry.schema import read_records
from evenstep.telemetry.sinks import JsonlSink
from tests.optim.test_sharded import Small, run, setup

MAKERS = {
    "stable_spam": lambda m: StableSPAM(m.parameters(), lr=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
}


def gradients(step):
    draw = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=draw) * 0.1 for p in Small().parameters()]
    if step == 33:
        grads[1][0] *= 1000  # a row that one rank alone may hold
    return grads


def watched(model, optimizer, place, path):
    said = []
    monitor = SpikeMonitor(model, optimizer, sinks=[JsonlSink(path)], say=said.append, every=5, parameters_every=5)
    for step in range(1, 41):
        for p, whole in zip(model.parameters(), gradients(step), strict=True):
            p.grad = place(p, whole)
        monitor.observe(torch.tensor(3.0))
        optimizer.step()
    monitor.close()
    return said


def fsdp_worker(rank, world, path, name, out):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    setup(rank, world, path)
    torch.manual_seed(0)
    model = Small()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
    place = lambda p, whole: distribute_tensor(whole, p.device_mesh, p.placements)  # noqa: E731
    said = watched(model, MAKERS[name](model), place, f"{out}/rank{rank}.jsonl")
    assert len(said) == (rank == 0)  # one speaks


@pytest.mark.parametrize("name", ["adamw", pytest.param("stable_spam", marks=pytest.mark.slow)])
def test_fsdp_says_what_a_single_process_says(tmp_path, name):
    torch.manual_seed(0)
    model = Small()
    watched(model, MAKERS[name](model), lambda p, whole: whole, tmp_path / "single.jsonl")
    run(fsdp_worker, tmp_path, name, str(tmp_path))
    single, sharded = (read_records(tmp_path / f"{name}.jsonl") for name in ("single", "rank0"))
    assert not read_records(tmp_path / "rank1.jsonl")
    assert [(r["kind"], r["step"]) for r in single] == [(r["kind"], r["step"]) for r in sharded]
    for one, other in zip(single, sharded, strict=True):
        if one["kind"] == "event":
            assert other["event"] == "spike" and other["step"] == 33
            assert [t["name"] for t in other["tensors"]] == [t["name"] for t in one["tensors"]] == ["hidden.weight"]
        columns = {"window": ["norms", "norms_after"], "parameters": ["ratio", "grad_max", "grad_norm", "weight_rms"]}
        for column in columns.get(one["kind"], []):
            if column in one:
                known = [np.array(r[column], dtype=float) for r in (one, other)]
                np.testing.assert_allclose(*known, rtol=2e-3, equal_nan=True)
        if one["kind"] == "parameters":
            assert all(0 < score < 100 for score in other["gss"])


def ddp_worker(rank, world, path, out):
    setup(rank, world, path)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    monitor = SpikeMonitor(ddp, optimizer, sinks=[JsonlSink(f"{out}/rank{rank}.jsonl")], say=None, every=1)
    for step in range(3):
        x = torch.full((4, 3), float(rank + step))
        with ddp.no_sync():
            ddp(x).sum().backward()
        ddp(x).sum().backward()
        expected = float(model.weight.grad.norm()), float(model.bias.grad.norm())
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    if rank == 0:
        records = read_records(Path(out) / "rank0.jsonl")
        assert records[0]["names"] == ["weight", "bias"]
        norm = [record for record in records if record["kind"] == "window"][-1]["norms"][0]
        assert abs(norm - (expected[0] ** 2 + expected[1] ** 2) ** 0.5) < 1e-2 * norm


@pytest.mark.slow
def test_ddp_with_accumulation_measures_the_averaged_gradient(tmp_path):
    run(ddp_worker, tmp_path, str(tmp_path))
    assert not (tmp_path / "rank1.jsonl").read_text()


# ---- faults of one rank ----

SPIKE, NAN_ROW = 60, 80


def faulty_worker(rank, world, path, out):
    """Text on two ranks, under DDP and then FSDP2. Rank 1 alone has a gradient x1000, later a row with a NaN."""
    from torch.distributed.fsdp import fully_shard

    setup(rank, world, path)
    for mode in ("ddp", "fsdp"):
        torch.manual_seed(0)
        model = Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2))
        down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        now, draw = {"step": 0}, torch.Generator().manual_seed(0)
        if mode == "ddp":
            # Before the reduction, which spreads it over all ranks.
            down.register_hook(lambda g, now=now: g * 1000 if now["step"] == SPIKE and rank == 1 else g)
            forward = nn.parallel.DistributedDataParallel(model)
        else:
            forward = fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
            down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        optimizer = StableSPAM(model.parameters(), lr=3e-3)
        sinks = [JsonlSink(f"{out}/{mode}{rank}.jsonl")]
        with SpikeMonitor(forward, optimizer, sinks=sinks, say=None) as monitor:
            for step in range(1, 91):
                now["step"] = step
                x = torch.randint(8, (8, 17), generator=draw)
                x[:, 1:] = (x[:, 1:] % 4 + x[:, :-1]) % 8
                x = x[rank::world]
                each = F.cross_entropy(forward(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none")  # [b, T]
                if step == NAN_ROW and rank == 1:
                    each = torch.cat([each[:1] * math.nan, each[1:]])
                optimizer.zero_grad()
                each.mean().backward()
                if mode == "fsdp" and step == SPIKE and rank == 1:
                    down.grad.to_local().mul_(1000)  # in the shard of this rank, which no other has
                monitor.observe(each.mean(), rows=(8 * step, 8 * step + 8), step=step)
                optimizer.step()


def test_a_fault_of_one_rank_is_named_and_dated(tmp_path):
    run(faulty_worker, tmp_path, str(tmp_path))
    for mode in ("ddp", "fsdp"):
        findings = diagnose(load_log(tmp_path / f"{mode}0.jsonl"))
        text = "\n".join(finding.text for finding in findings)
        assert "layers.0.mlp.down_proj alone spiked x" in text and f"at step {SPIKE}, rows 480-488" in text, text
        lost = next(finding for finding in findings if finding.step == NAN_ROW)
        assert "not finite at step 80, rows 640-648" in lost.text and "skipped" in lost.text, text
