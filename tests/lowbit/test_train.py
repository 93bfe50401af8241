"""Low bits in a training run: the option, validation of the quantised model, resume, recipe files; DDP and FSDP2."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_support import run_processes
from torch import nn
from train_support import quick, write_corpus

from evenstep.errors import EvenstepError
from evenstep.lowbit import RECIPES, LowBitLinear, quantize_
from evenstep.lowbit.metrics import lowbit_metrics
from evenstep.models import Llama, LlamaConfig
from evenstep.train.config import LOWBIT_NAMES
from evenstep.train.config_io import load_config
from evenstep.train.trainer import Run
from evenstep.train.weights import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl")


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_option_names_every_recipe():
    assert set(LOWBIT_NAMES) == set(RECIPES)
    assert load_config(None, [("lowbit", "fp4")]).lowbit == "fp4" and load_config(None, []).lowbit is None
    with pytest.raises(EvenstepError, match=r"lowbit: 'nvfp' is not one of.*did you mean 'nvfp4'"):
        load_config(None, [("lowbit", "nvfp")])


def test_a_run_trains_validates_and_resumes_in_low_bits_to_the_bit(corpus, tmp_path):
    lines: list[str] = []
    for recipe in ("fp4", "nvfp4-train"):
        whole, parts = tmp_path / f"whole-{recipe}", tmp_path / f"parts-{recipe}"
        run = Run(quick(corpus, whole, lowbit=recipe), say=lines.append)
        assert any(f"low-bit recipe {recipe}" in line and "bits per weight" in line for line in lines)
        assert any(isinstance(m, LowBitLinear) for m in run.model.modules())
        summary = run.fit()
        assert summary["lowbit"] == recipe
        first = Run(quick(corpus, parts, lowbit=recipe), say=lines.append)
        for _ in range(4):
            first.step()
        first.save()
        resumed = Run.resume(parts, say=lines.append)
        resumed.fit()
        for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(p, q)
        saved = load_model(whole / "checkpoints" / "step-000008")
        assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), run.model.parameters(), strict=True))
        # Validation is of the quantised model: the plain one with the same weights has another loss.
        low = run.evaluate().loss
        assert low == [r["val_loss"] for r in records(whole) if "val_loss" in r][-1]
        run.model = saved
        assert run.evaluate().loss != low


def test_telemetry_tells_of_every_low_bit_weight_and_changes_nothing(corpus, tmp_path):
    few = {"lowbit": "fp4", "log__every": "2"}
    watched = Run(quick(corpus, tmp_path / "watched", **few), say=lambda line: None)
    watched.fit()
    written = [record for record in records(watched.out) if record.get("kind") == "lowbit"]
    assert [record["step"] for record in written] == [2, 4, 6, 8]
    expected = lowbit_metrics(watched.model)
    assert expected.keys() == written[-1]["layers"].keys() == written[0]["layers"].keys()
    for name, found in expected.items():
        layer = written[-1]["layers"][name]
        assert layer.keys() == {"saturation", "underflow", "error"}
        assert layer["error"] == pytest.approx(float(found["relative_error"]), rel=1e-3) != 0
        assert layer["underflow"] == pytest.approx(float(found["underflow"]), rel=1e-3) != 0
        assert layer["saturation"] == pytest.approx(float(found["saturation"]), rel=1e-3)
    assert written[0]["layers"] != written[-1]["layers"]

    silent = Run(quick(corpus, tmp_path / "silent", telemetry__enabled="false", **few), say=lambda line: None)
    silent.fit()
    assert not any(record.get("kind") == "lowbit" for record in records(silent.out))
    for p, q in zip(watched.model.parameters(), silent.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_telemetry_tells_how_gradients_are_held_and_changes_nothing(corpus, tmp_path):
    few = {"lowbit": "nvfp4-train", "log__every": "4"}
    watched = Run(quick(corpus, tmp_path / "watched", **few), say=lambda line: None)
    watched.fit()
    written = [record["layers"] for record in records(watched.out) if record.get("kind") == "lowbit"]
    low = [name for name, m in watched.model.named_modules() if isinstance(m, LowBitLinear)]
    for layers in written:
        assert set(layers) == set(low)
        assert all(0.01 < layer["gradient_error"] < 0.3 for layer in layers.values())  # of 4 bits, stochastic
    silent = Run(quick(corpus, tmp_path / "silent", telemetry__enabled="false", **few), say=lambda line: None)
    silent.fit()
    for p, q in zip(watched.model.parameters(), silent.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_named_recipes_round_weights_without_random_numbers():
    """So telemetry may quantise them between two steps."""
    assert all(recipe.weight is None or recipe.weight.rounding == "nearest" for recipe in RECIPES.values())


def test_generated_text_comes_from_the_quantised_model(corpus, tmp_path, monkeypatch):
    from evenstep.train import evaluate
    from evenstep.train.config import SampleConfig

    Run(quick(corpus, tmp_path / "run", lowbit="int2"), say=lambda line: None).fit()
    seen = []
    monkeypatch.setattr(evaluate, "sample_text", lambda model, *rest: seen.append(model) or "")
    evaluate.generate_from(tmp_path / "run", SampleConfig(), 0, say=print)
    assert any(isinstance(m, LowBitLinear) for m in seen[0].modules())


def test_the_recipe_files_hold_the_published_low_bit_settings():
    rates = {"130m": 1e-3, "350m": 4e-4, "1b": 2e-4}
    files = sorted((ROOT / "recipes").glob("lowbit-*.toml"))
    assert {f"lowbit-c4-{size}-{low}" for size in rates for low in ("fp4", "int4")} < {path.stem for path in files}
    for path in files:
        config = load_config(path)
        assert config.lowbit in RECIPES and path.stem.endswith(config.lowbit)
        if config.model.size in rates:
            assert config.optim.lr == rates[config.model.size] and config.tokens_per_step == 131072
        assert {config.optim.options[key] for key in ("gamma1", "gamma2", "gamma3")} == {0.7, 0.9, 0.999}


# ---- several processes ----


def small() -> Llama:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, init_std=0.2)
    return quantize_(Llama(shape), "fp4")


def data() -> torch.Tensor:
    return torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    mine = data()[2 * rank : 2 * rank + 2]
    ddp = nn.parallel.DistributedDataParallel(small())
    train(ddp, mine)

    from torch.distributed.fsdp import fully_shard

    sharded = small()
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    train(sharded, mine)
    full = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    if rank == 0:
        torch.save({"ddp": ddp.module.state_dict(), "fsdp": full}, f"{place}/weights.pt")


def test_two_processes_with_ddp_or_fsdp2_train_like_one(tmp_path):
    run_processes(worker, str(tmp_path), count=2)
    found = torch.load(tmp_path / "weights.pt")
    model = small()
    train(model, data())
    for kind in ("ddp", "fsdp"):
        for name, p in model.state_dict().items():
            # Another order of summing may move an entry across a rounding boundary of the second step.
            assert (found[kind][name] - p).norm() <= 2e-2 * (p - small().state_dict()[name]).norm() + 1e-7, (kind, name)


def test_the_table_of_recipes_in_the_docs_is_up_to_date():
    from evenstep.lowbit.recipes import table

    page = (ROOT / "docs" / "lowbit.md").read_text(encoding="utf-8")
    assert table() in page, (
        'put there what python -c "from evenstep.lowbit.recipes import table; print(table())" prints'
    )
