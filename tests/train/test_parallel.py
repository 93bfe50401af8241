"""The same run on one process and on several, and checkpoints that move between them."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from parallel_support import by_step, free_port, losses, silent, train
from process_support import run_processes
from train_support import quick, write_corpus

from evenstep.telemetry.schema import read_records
from evenstep.train.checkpoint import list_checkpoints, read_manifest
from evenstep.train.trainer import Run
from evenstep.train.weights import load_model

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

# Clipping, accumulation and an uneven validation are in all of them. 12 sequences come out even on 1, 2, 3 and 4.
COMMON = {
    "train__batch_size": "12",
    "train__micro_batch_size": "2",
    "train__clip_norm": "1",
    "eval__max_tokens": "410",
    "train__steps": "8",
    "checkpoint__keep": "9",
    "telemetry__every": "1",
    "log__every": "1",
}


def options(mode, **more):
    return COMMON | {"parallel__mode": mode} | ({"parallel__tensor": "2"} if mode == "tp+fsdp" else {}) | more


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Directories of whole runs on one process, by optimizer, as they are asked for."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("whole") / name
            Run(quick(corpus, found[name], **COMMON, optim__name=name), say=silent).fit()
        return found[name]

    return run


def cut(out, step):
    """The run as if it had ended after the checkpoint of ``step``."""
    for path in list_checkpoints(out / "checkpoints"):
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path)
    return out


def copied(out, name):
    return shutil.copytree(out, out.parent / name)


SPAM = options("fsdp", optim__name="stable_spam", train__activation_checkpointing="true")
FP4 = {"lowbit": "fp4", "train__steps": "2"}
TENSOR = options("tp+fsdp", optim__name="adamw")
BF16 = {"train__dtype": "bf16", "train__steps": "3", "optim__name": "adamw"}


def assert_the_low_bit_weights_are_those_of_one_process(corpus, sharded, alone, options):
    """Sharded weights are measured in the forward pass: those of step 2 are the weights after step 1."""
    Run(quick(corpus, alone, **COMMON | options, optim__name="stable_spam"), say=silent).fit()
    low = [[r for r in read_records(out / "metrics.jsonl") if r.get("kind") == "lowbit"] for out in (sharded, alone)]
    (_, two), (one, _) = low
    assert two["layers"].keys() == one["layers"].keys() != set()
    for name, layer in one["layers"].items():
        assert two["layers"][name] == pytest.approx(layer, rel=2e-3)


def _fit_and_cut(run):
    """Leaves a copy that ends with step 4 beside the run, for the next job."""
    run.fit()
    if run.world.rank == 0:
        cut(copied(run.out, "again"), 4)


def _save_initial(run):
    """The initial weights as a whole, and the random state after they were drawn."""
    assert run.task._shape_of_shards(False) is not None  # no process has had the whole model
    weights = {name: p.full_tensor() for name, p in run.model.named_parameters()}
    if run.world.rank == 0:
        torch.save((weights, torch.get_rng_state()), run.out / "initial.pt")


def _fit_and_count(run):
    """Leaves the number of rows whose logits each process has computed in a pass."""
    loss_of, seen = run.model._loss_of, set()
    run.model._loss_of = lambda hidden, *rest: (seen.add(len(hidden)), loss_of(hidden, *rest))[1]
    run.fit()
    (run.out / f"rows-{run.world.rank}.json").write_text(json.dumps(sorted(seen)))


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """The runs of two processes, which are started once: ddp, fsdp, again (fsdp from its step 4), bf16,
    low (fsdp in 4 bits)."""
    out = tmp_path_factory.mktemp("two")
    train(
        2,
        corpus,
        (out / "ddp", options("ddp", optim__name="adamw"), False, None),
        (out / "fsdp", SPAM, False, _fit_and_cut),
        (out / "again", SPAM, True, None),
        (out / "bf16", options("ddp", **BF16), False, None),
        (out / "low", SPAM | FP4, False, None),
        (out / "drawn", SPAM, False, _save_initial),
        (out / "tensor", TENSOR, False, _fit_and_count),
    )
    return out


def test_tensor_parallel_processes_share_out_the_rows_of_the_loss(two, whole):
    assert losses(two / "tensor") == pytest.approx(losses(whole("adamw")), rel=1e-5)
    first, second = (json.loads((two / "tensor" / f"rows-{rank}.json").read_text()) for rank in range(2))
    assert max(first) == max(second) == 2 * 16 // 2  # two sequences of 16 tokens are a micro batch


def test_shards_drawn_alone_are_those_of_the_whole_model_bit_for_bit(corpus, two, tmp_path):
    weights, random_state = torch.load(two / "drawn" / "initial.pt")
    run = Run(quick(corpus, tmp_path / "one", **SPAM | {"parallel__mode": "none"}), say=silent)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert weights.keys() == dict(run.model.named_parameters()).keys()
    assert all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters())


def _build_1b(rank, size, port, out):
    from evenstep.models import Llama, llama_config
    from evenstep.train.config import Config, ParallelConfig, TrainConfig
    from evenstep.train.distributed import Parallel, open_world

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    config = Config(train=TrainConfig(steps=1), parallel=ParallelConfig(mode="fsdp"))

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    with open_world(config) as world:
        with torch.device("meta"):
            model = Llama(llama_config("1b", 32000))
        parallel = Parallel(config, world)
        parallel.apply(model)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        parallel.materialise(draw=True)
        shard = sum(p.to_local().nbytes for p in model.parameters())
        Path(out, str(rank)).write_text(str((resident("VmHWM") - before) / shard))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_a_process_of_two_builds_1b_in_the_memory_of_its_shard(tmp_path):
    run_processes(_build_1b, 2, free_port(), str(tmp_path), count=2)
    for rank in range(2):
        assert 0.95 < float((tmp_path / str(rank)).read_text()) < 1.2


def test_two_processes_give_the_losses_of_one_and_resume_bit_for_bit(corpus, whole, two, tmp_path):
    """ddp with AdamW, fsdp with Stable-SPAM; then the checkpoint of two goes on in two and in one."""
    ddp, fsdp = two / "ddp", two / "fsdp"
    assert losses(ddp) == pytest.approx(losses(whole("adamw")), rel=1e-5)
    assert losses(fsdp) == pytest.approx(losses(whole("stable_spam")), rel=1e-5)
    assert_the_low_bit_weights_are_those_of_one_process(corpus, two / "low", tmp_path / "low", FP4)
    manifest = read_manifest(fsdp / "checkpoints" / "step-000004")
    assert manifest["world_size"] == 2 and sum(name.startswith("shard-") for name in manifest["files"]) == 2

    one = cut(copied(fsdp, "one"), 4)
    assert losses(two / "again") == losses(fsdp)
    Run.resume(one, quick(corpus, one, **options("none", optim__name="stable_spam")), say=silent).fit()
    assert losses(one) == pytest.approx(losses(fsdp), rel=1e-5)
    for name, tensor in load_model(fsdp / "checkpoints" / "step-000008").state_dict().items():
        other = load_model(one / "checkpoints" / "step-000008").state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-5)


def test_copies_in_bf16_train_together(corpus, tmp_path, two):
    """DDP with 16-bit parameters, whose gradients are averaged in fp32."""
    Run(quick(corpus, tmp_path / "one", **options("none", **BF16)), say=silent).fit()
    assert losses(two / "bf16") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "stable_spam", "spam", "scale"])
def test_a_checkpoint_goes_from_two_to_one_to_three(corpus, tmp_path, name):
    first, mode = tmp_path / "run", options("fsdp", optim__name=name, checkpoint__every="2")
    train(2, corpus, (first, mode, False, None))
    expected = losses(first)
    run = cut(copied(first, "moved"), 2)
    single = quick(corpus, run, **options("none", optim__name=name, checkpoint__every="2"))
    Run.resume(run, single, say=silent).fit()
    assert losses(run) == pytest.approx(expected, rel=2e-5)
    cut(run, 4)
    train(3, corpus, (run, mode, True, None))
    assert losses(run) == pytest.approx(expected, rel=2e-5)
    cut(run, 6)
    train(2, corpus, (run, mode | {"parallel__mode": "ddp"}, True, None))
    assert losses(run) == pytest.approx(expected, rel=2e-5)


@pytest.mark.slow
def test_four_processes_in_a_square_give_the_losses_of_one(corpus, whole, tmp_path):
    """Tensor parallelism over two, FSDP over the other two; its checkpoint goes on in one."""
    square = tmp_path / "square"
    train(4, corpus, (square, options("tp+fsdp", optim__name="adamw"), False, None))
    assert losses(square) == pytest.approx(losses(whole("adamw")), rel=1e-5)
    cut(square, 4)
    Run.resume(square, quick(corpus, square, **options("none", optim__name="adamw")), say=silent).fit()
    assert losses(square) == pytest.approx(losses(whole("adamw")), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_spam", "spam", "scale", "adam"])
def test_every_mode_gives_the_losses_of_one(corpus, whole, tmp_path, name):
    three = {"train__micro_batch_size": "1"}  # of the three sequences that each of four has
    jobs = {
        "ddp": options("ddp", **three),
        "fsdp": options("fsdp", parallel__reshard="false", **three),
        "hsdp": options("hsdp", parallel__replicate="2", **three),
        "tp+fsdp": options("tp+fsdp"),
    }
    train(4, corpus, *((tmp_path / mode, more | {"optim__name": name}, False, None) for mode, more in jobs.items()))
    for mode in jobs:
        assert losses(tmp_path / mode) == pytest.approx(losses(whole(name)), rel=1e-5), mode


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16-autocast", "bf16"])
def test_bf16_and_compiled_blocks_train_in_every_mode(corpus, tmp_path, dtype):
    def mode(name):
        return options(name, train__dtype=dtype, train__steps="3") | {"train__micro_batch_size": "6"}

    Run(quick(corpus, tmp_path / "one", **mode("none")), say=silent).fit()
    compiled = mode("fsdp") | {"train__compile": "true", "train__dtype": "fp32"}
    train(
        2,
        corpus,
        (tmp_path / "ddp", mode("ddp"), False, None),
        (tmp_path / "fsdp", mode("fsdp"), False, None),
        (tmp_path / "compiled", compiled, False, None),
    )
    for name in ("ddp", "fsdp", "compiled"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-2), name
    assert len(by_step(tmp_path / "compiled")) == 3
