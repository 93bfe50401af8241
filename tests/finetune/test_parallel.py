"""Fine-tuning on two processes: what one process computes, written once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_support import free_port, losses, silent
from process_support import keep_groups, run_processes

from evenstep.data.tokenizer import train_bpe
from evenstep.errors import EvenstepError
from evenstep.finetune.config import FineTuneConfig
from evenstep.finetune.run import Tuning
from evenstep.models import Llama, LlamaConfig, load_pretrained, save_pretrained
from evenstep.train.checkpoint import list_checkpoints, read_manifest
from evenstep.train.config_io import build
from evenstep.train.distributed import open_world

SHAPE = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_seq_len=64)
WORDS = ["abc", "bcd", "cde", "def", "ace", "bdf", "a", "bb", "fedcbaa"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_pretrained(Llama(SHAPE), folder)
    train_bpe(iter(["a"]), 257).save(folder)
    rows = [{"prompt": f"{word}{i}:", "response": word[::-1] * (i % 3 + 1)} for i, word in enumerate(WORDS * 6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))  # uneven over two
    return folder


def config(model, out, mode, **more):
    tables = {
        "model": {"path": str(model), "library": more.pop("library", "evenstep")},
        "data": {"file": str(model / "data.jsonl")},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 1, "seq_len": 48, "clip_norm": 1.0, "threads": 1},
        "optim": {"name": "adamw", "lr": 1e-2},
        "eval": {"every": 2, "max_new_tokens": 4, "data": str(model / "val.jsonl")},
        "checkpoint": {"every": 2, "keep": 9},
        "parallel": {"mode": mode},
        "log": {"curve": False, "every": 1},
        "out": str(out),
    }
    for key, value in more.items():
        tables[key] = {**tables.get(key, {}), **value}
    return build(tables, FineTuneConfig)


def half_of(run, out):
    """A copy of a run of four steps, as it was after two."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    return out


def _worker(rank, size, jobs):
    torch.set_num_threads(1)
    for port, settings, begun in jobs:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        if begun and rank == 0:
            half_of(begun, Path(settings.out))
        with open_world(settings) as world:
            keep_groups()
            if begun:
                dist.barrier()
                Tuning.resume(settings.out, settings, world=world, say=silent).fit()
            else:
                Tuning(settings, world=world, say=silent).fit()


LORA = {"tune": {"adapter": "lora", "rank": 2}}
CASES = {
    "full": {},
    "lora": LORA,
    "a model of transformers": {"library": "transformers", "optim": {"name": "spam", "density": 0.05}},
}


@pytest.mark.parametrize(
    "names", [("full", "lora"), pytest.param(("a model of transformers",), marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_and_write_once(names, model, tmp_path):
    """Losses, validation, scores, weights; then they go on from half of it."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    cases = {name: CASES[name] for name in names}
    for name, more in cases.items():
        Tuning(config(model, tmp_path / "one" / name, "none", **more), say=silent).fit()
    jobs = []
    for name, more in cases.items():
        two = tmp_path / "two" / name
        jobs.append((free_port(), config(model, two, "ddp", **more), None))
        jobs.append((free_port(), config(model, tmp_path / "again" / name, "ddp", **more), two))
    run_processes(_worker, 2, jobs, count=2)
    for name, more in cases.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert losses(two) == pytest.approx(losses(one), rel=1e-5), name
        facts = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
        assert facts[1]["processes"] == 2
        for key in ("score", "tokens", "val_tokens", "trained_parameters", "state_bytes"):
            assert facts[0][key] == facts[1][key], (name, key)
        weights = load_pretrained(one / "model").state_dict()
        for key, tensor in load_pretrained(two / "model").state_dict().items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-4)
        assert (two / "adapter").exists() == (more is LORA)
        assert [path.name for path in list_checkpoints(two / "checkpoints")] == ["step-000004", "step-000002"]
        assert read_manifest(two / "checkpoints" / "step-000002")["world_size"] == 2

        assert losses(tmp_path / "again" / name) == losses(two), name
        alone = half_of(two, tmp_path / "alone" / name)
        Tuning.resume(alone, config(model, alone, "none", **more), say=silent).fit()
        assert losses(alone) == pytest.approx(losses(one), rel=1e-5), name


@pytest.mark.parametrize("mode", ["fsdp", "hsdp", "tp+fsdp"])
def test_a_model_is_not_cut_over_processes(mode, model, tmp_path):
    with pytest.raises(EvenstepError, match="cannot be used for fine-tuning; give none or ddp"):
        config(model, tmp_path / "run", mode)
