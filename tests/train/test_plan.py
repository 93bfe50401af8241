"""The plan against the code it speaks of: models and optimizers really built on the meta device, messages really sent
among processes that torch's fake backend plays."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from evenstep.errors import EvenstepError
from evenstep.models import Llama, llama_config
from evenstep.train.config_io import load_config
from evenstep.train.memory import dry_run, fake_processes, meta_model, model_shape
from evenstep.train.optimizers import build_optimizer
from evenstep.train.plan import USABLE, advice, make_plan
from tests.test_cli_program import call

ROOT = Path(__file__).parents[2]
MODES = {"none": 1, "ddp": 16, "fsdp": 16, "hsdp": 16, "tp+fsdp": 16}


def count(plan):
    """The bytes of the whole model, block by block."""
    return dry_run(plan.config, plan.shape, plan.grid, blocks=plan.shape.num_layers)


def planned(size="9m", gpus=16, memory=80e9, vocab=32000, **options):
    options = {"model.size": size, "train.batch_size": "64", "train.micro_batch_size": "2", **options}
    config = load_config(None, [(key.replace("__", "."), value) for key, value in options.items()])
    return make_plan(config, model_shape(config, vocab), gpus, 4, memory)


# ---- bytes that stay ----

OPTIMIZERS = [
    ("adamw", {}),
    ("adamw", {"optim.amsgrad": "true", "train.dtype": "bf16"}),
    ("stable_spam", {}),
    ("stable_spam", {"optim.state": "bf16"}),
    ("stable_spam", {"optim.state": "int8"}),
    ("spam", {"train.dtype": "bf16", "optim.rounding": "kahan"}),
    ("scale", {}),
    ("scale", {"optim.state": "int8"}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer, options", OPTIMIZERS)
def test_parameters_and_state_are_those_of_a_dry_run(mode, optimizer, options):
    if mode == "tp+fsdp" and options.get("optim.state") == "int8":
        return
    plan = planned(gpus=MODES[mode], parallel__mode=mode, optim__name=optimizer, **options)
    counted = count(plan)
    assert (counted.parameters, counted.state) == (plan.memory["parameters"], plan.memory["optimizer state"])


@pytest.mark.parametrize("size, gpus", [("60m", 64), ("1b", 8), ("7b", 64)])
def test_large_and_uneven_shards_are_those_of_a_dry_run(size, gpus):
    # 5461 columns of the 1b do not divide by 8, nor 1376 of the 60m by 64.
    plan = planned(size, gpus, parallel__mode="fsdp", optim__state="int8")
    counted = count(plan)
    assert (counted.parameters, counted.state) == (plan.memory["parameters"], plan.memory["optimizer state"])


def test_grouped_queries_and_a_tied_head_are_those_of_a_dry_run():
    variant = {"model.kv_heads": "2", "model.tie_embeddings": "true", "optim.lr_scale.embedding": "3"}
    plan = planned("tiny", 2, parallel__mode="fsdp", **variant)
    counted = count(plan)
    assert (counted.parameters, counted.state) == (plan.memory["parameters"], plan.memory["optimizer state"])
    assert plan.memory["parameters"] < planned("tiny", 2, parallel__mode="fsdp").memory["parameters"]


@pytest.mark.parametrize(("state", "where"), [("fp32", "all"), ("fp32", "hidden"), ("int8", "all")])
def test_sparse_moments_and_masks_are_those_of_a_dry_run(state, where):
    options = {"optim.density": "0.25", "optim.state": state, "optim.density_of": where}
    plan = planned("tiny", vocab=1003, parallel__mode="ddp", optim__name="spam", **options)
    assert count(plan).state == plan.memory["optimizer state"]


def test_sparse_moments_of_shards_are_those_of_a_dry_run():
    options = {"optim.density": "0.25", "optim.density_of": "hidden"}
    plan = planned("tiny", 2, vocab=1003, parallel__mode="fsdp", optim__name="spam", **options)
    assert count(plan).state == plan.memory["optimizer state"]
    dense = planned("tiny", 2, vocab=1003, parallel__mode="fsdp", optim__name="spam")
    assert plan.memory["optimizer state"] < dense.memory["optimizer state"]


# ---- activations ----


class FusedNorm(torch.autograd.Function):
    """Keeps what the norm of a GPU keeps."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1, device=x.device))
        return torch.empty_like(x)


@contextmanager
def kernels_of_a_gpu(monkeypatch):
    def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr("evenstep.models.llama.rms_norm", lambda x, weight, eps: FusedNorm.apply(x, weight.to(x.dtype)))
        yield


def kept(model, tokens):
    """Bytes that a forward pass keeps for the backward pass, the parameters aside."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(tokens)
        model.lm_head(hidden)
    return sum(size for _, size in found.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("size, variant", [("60m", ""), ("1b", ""), ("60m", "softcap"), ("60m", "grouped")])
def test_activations_are_what_autograd_keeps(size, variant, dtype, checkpointing, monkeypatch):
    more = {"train.dtype": dtype, "train.activation_checkpointing": checkpointing}
    more |= {"softcap": {"model.attention_softcap": "50"}, "grouped": {"model.kv_heads": "2"}}.get(variant, {})
    plan = planned(size, 1, **more)
    with torch.device("meta"):
        model = Llama(plan.shape).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        tokens = torch.zeros(2, 256, dtype=torch.int64)
    model.activation_checkpointing = checkpointing == "true"
    with kernels_of_a_gpu(monkeypatch):
        measured = kept(model, tokens)
        if checkpointing == "true":  # one block is computed again in the backward pass
            model.activation_checkpointing = False
            whole, shape = kept(model, tokens), plan.shape
            model.model.layers = model.model.layers[:-1]
            measured += whole - kept(model, tokens)
            assert measured < whole / 3 and shape.num_layers > 4
    # Beside: the tokens and the rotary angles, one for all blocks.
    assert measured == pytest.approx(plan.memory["activations"], rel=0.01)


# ---- messages ----


CALLS = {  # the second name is of PyTorch 2.13
    "all_reduce": ["all_reduce"],
    "all_gather": ["all_gather_into_tensor", "all_gather_single"],
    "reduce_scatter": ["reduce_scatter_tensor", "reduce_scatter_single"],
}


class Spy:
    """Collects what is sent: (kind, bytes, processes)."""

    def __init__(self, patch):
        self.sent = []
        for kind, names in CALLS.items():
            for name in names:
                if hasattr(dist, name):
                    patch.setattr(dist, name, self._spied(kind, getattr(dist, name)))

    def _spied(self, name, real):
        def call(*args, **kwargs):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            group = kwargs.get("group", next((x for x in args if isinstance(x, dist.ProcessGroup)), None))
            op = next((str(x) for x in (*args, *kwargs.values()) if "MAX" in str(x)), "")
            self.sent.append(
                (name + ("-max" if op else ""), max(x.nbytes for x in tensors), dist.get_world_size(group))
            )
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp", "tp+fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw", "stable_spam", "spam", "scale"])
def test_the_optimizers_messages_are_counted(mode, optimizer, monkeypatch):
    plan = planned(parallel__mode=mode, optim__name=optimizer)
    with fake_processes(plan.grid) as world, monkeypatch.context() as patch:
        model = meta_model(plan.config, plan.shape, plan.grid, world)
        made = build_optimizer(model, plan.config.optim)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        spy = Spy(patch)
        made.step()
    kinds = [kind for kind, _, _ in spy.sent]
    assert (kinds.count("all_reduce-max"), kinds.count("all_reduce")) == (plan.messages.maximum, plan.messages.sum)
    assert sum(size for _, size, _ in spy.sent) == plan.messages.bytes
    if mode == "fsdp" and optimizer != "adamw":
        assert kinds == ["all_reduce-max", "all_reduce"]


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_fsdp_sends_what_the_plan_says(reshard, monkeypatch):
    plan = planned(
        "tiny", 4, vocab=1000, **{"parallel.mode": "fsdp", "parallel.reshard": reshard, "train.dtype": "bf16"}
    )
    from evenstep.train.distributed import Parallel

    with fake_processes(plan.grid) as world, monkeypatch.context() as patch:
        model, parallel = Llama(plan.shape).bfloat16(), Parallel(plan.config, world)
        parallel.apply(model)
        spy = Spy(patch)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        with parallel.accumulating(last=True):
            parallel.loss(tokens, tokens).backward()
    by_kind = {}
    for kind, size, among in spy.sent:  # of a ring: each sends all but its own part
        by_kind[kind] = by_kind.get(kind, 0) + size * (among - 1) // among
    weights = sum(wire.bytes for wire in plan.wire if "weights" in wire.what) // plan.passes
    gradients = sum(wire.bytes for wire in plan.wire if "gradients" in wire.what)
    # FSDP pads parts to equal sizes; the shapes of tiny divide by 4.
    assert by_kind == {"all_gather": weights, "reduce_scatter": gradients}


def test_ring_arithmetic():
    ddp, fsdp = (planned(parallel__mode=mode, train__micro_batch_size="4") for mode in ("ddp", "fsdp"))
    numbers = Llama(llama_config("9m", 32000)).num_parameters()
    assert [wire.bytes for wire in ddp.wire] == [2 * numbers * 4 * 15 // 16]
    assert fsdp.passes == 1 and fsdp.wire[0].bytes == fsdp.wire[2].bytes == numbers * 4 * 15 // 16
    assert planned(gpus=1).wire == []


# ---- what it says ----


TIGHT = {
    "1b": ("1b", 8, 12e9, {"parallel.mode": "fsdp"}),
    "7b": ("7b", 8, 20e9, {"parallel.mode": "fsdp", "train.dtype": "bf16-autocast"}),
    "one GPU": ("1b", 1, 24e9, {"optim.name": "adamw"}),
    "copies": ("1b", 4, 24e9, {"parallel.mode": "ddp"}),
}


@pytest.mark.parametrize("size, gpus, memory, options", TIGHT.values(), ids=TIGHT)
def test_what_it_advises_does_fit(size, gpus, memory, options):
    tight = planned(size, gpus, memory, **options)
    assert not tight.fits
    ways = advice(tight, 4)
    assert ways
    for way in ways:
        words = way.split(" and ")
        changes = dict(word.split(" ") for word in words if " GPUs" not in word)
        more = next((int(word.split(" ")[0]) for word in words if " GPUs" in word), gpus)
        assert planned(size, more, memory, **{**options, **changes}).fits, way


def test_no_advice_where_none_is_needed_or_none_helps():
    fine = planned("1b", 8, 80e9, parallel__mode="fsdp")
    assert fine.fits and advice(fine, 4) == []
    assert advice(planned("7b", 1, 1e9), 4) == ["a smaller model.size or train.seq_len, or GPUs with more memory"]


def test_one_change_is_advised_where_one_is_enough():
    tight = planned("1b", 8, 30e9, parallel__mode="fsdp", train__micro_batch_size="8", train__seq_len="1024")
    assert not tight.fits
    assert all(" and " not in way for way in advice(tight, 4)), advice(tight, 4)


def test_the_peak_is_not_below_any_of_its_parts():
    for mode, gpus in MODES.items():
        plan = planned(gpus=gpus, parallel__mode=mode)
        assert max(plan.memory.values()) < plan.peak <= sum(plan.memory.values())
        assert plan.fits == (plan.peak <= USABLE * plan.gpu_memory)


def test_more_micro_batches_keep_whole_gradients_under_fsdp():
    one, four = (planned(parallel__mode="fsdp", train__micro_batch_size=size) for size in ("4", "1"))
    assert (one.passes, four.passes) == (1, 4)
    assert one.memory["gradients between micro batches"] == 0
    assert four.memory["gradients between micro batches"] == 4 * Llama(four.shape).num_parameters()


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(EvenstepError, match="batch_size 64 is not divisible by the 24"):
        planned(gpus=24, parallel__mode="fsdp")
    with pytest.raises(EvenstepError, match=r"int8 with optim\.density 0\.5.*fsdp; give optim\.state bf16"):
        planned(parallel__mode="fsdp", optim__name="spam", **{"optim.density": "0.5", "optim.state": "int8"})
    with pytest.raises(EvenstepError, match=r"model\.qk_norm true cannot be used with parallel\.tensor 2.*fsdp"):
        make_plan(
            load_config(None, [("parallel.mode", "tp+fsdp"), ("parallel.tensor", "2")]),
            llama_config("9m", 32000, qk_norm=True),
            16,
            4,
            80e9,
        )
    with pytest.raises(EvenstepError, match=r"parallel\.tensor 8 does not divide the model's num heads 4"):
        planned(parallel__mode="tp+fsdp", **{"parallel.tensor": "8"})
    with pytest.raises(EvenstepError, match="--gpus is 0"):
        planned(gpus=0)
    assert replace(planned(gpus=1), gpu_memory=1.0).fits is False


def test_the_command(capsys):
    recipe = ROOT / "examples/cluster-7b.toml"
    status, out, err = call(capsys, "plan", recipe, "--gpus", "64")
    assert (status, err) == (0, "") and "7b (6.74B parameters) on 64 GPUs, fsdp" in out and "fits" in out
    status, out, _ = call(capsys, "plan", recipe, "--gpus", "64", "--json", "--optim.state", "int8")
    facts = json.loads(out)
    assert status == 0 and facts["fits"] and facts["memory"]["optimizer state"] < facts["memory"]["parameters"] * 0.6
    assert {row["mode"] for row in facts["modes"]} == {"ddp", "fsdp", "hsdp", "tp+fsdp"}
    status, out, _ = call(capsys, "plan", recipe, "--gpus", "8", "--gpu-memory", "24")
    assert status == 0 and "DOES NOT FIT" in out and "it would fit with" in out
    status, _, err = call(capsys, "plan", recipe, "--gpus", "8", "--optim.stat", "int8")
    assert status == 2 and "optim.stat" in err
    status, _, err = call(capsys, "plan", recipe, "--gpus", "8", "--optim.state", "int4")
    assert status == 2 and "int4" in err
    status, _, err = call(capsys, "plan", recipe, "--gpus", "7")
    assert status == 2 and "not divisible by the 7" in err


def test_the_command_compares_with_a_dry_run():
    words = [sys.executable, "-m", "evenstep", "plan", "--gpus", "4", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "dry run on the meta device" in done.stdout, done.stderr


PAGE = ROOT / "docs/distributed.md"
SHOWN = re.findall(r"^\$ evenstep (plan [^\n]*)\n(.*?)^```", PAGE.read_text() if PAGE.exists() else "", re.M | re.S)
TABLES = re.findall(
    r"^<!-- evenstep (plan [^\n]*) -->\n(.*?)\n\n", PAGE.read_text() if PAGE.exists() else "", re.M | re.S
)


@pytest.mark.parametrize("words, shown", SHOWN + TABLES, ids=[words for words, _ in SHOWN + TABLES])
def test_the_page_shows_what_the_command_prints(words, shown, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, _ = call(capsys, *words.split())
    assert status == 0 and out.strip() == shown.strip(), f"evenstep {words} prints something else than docs show"


def test_the_page_has_its_examples():
    assert len(SHOWN) >= 2 and len(TABLES) >= 2
