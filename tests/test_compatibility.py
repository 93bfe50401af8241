"""What evenstep 0.1.0 saved still loads and goes on as it did then: tests/data/v0.1.0 was written by that version.

The expected values were computed with torch 2.13 on an AVX-512 machine. Other builds of torch and other instruction
sets round differently, so values are compared to a few units in the last place rather than bit for bit.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from evenstep import SCALE, SPAM, AdaClip, AdaGN, StableSPAM, stabilize

SAVED = Path(__file__).parent / "data" / "v0.1.0"
SHAPES = ((8, 24), (24, 16), (16,), (12, 8))
KINDS = ("embedding", "hidden", "vector", "last")


OPTIMIZERS = {
    "stable_spam": lambda ps, **how: StableSPAM(ps, reset_interval=4, total_steps=20, **how),
    "stable_spam official": lambda ps, **how: StableSPAM(ps, reset_interval=4, variant="official", **how),
    "stable_spam bf16 kahan": lambda ps, **how: StableSPAM(ps, state="bf16", rounding="kahan", **how),
    "stable_spam bf16 stochastic": lambda ps, **how: StableSPAM(ps, rounding="stochastic", weight_decay=0.1, **how),
    "stable_spam int8": lambda ps, **how: StableSPAM(ps, state="int8", **how),
    "spam": lambda ps, **how: SPAM(ps, reset_interval=4, warmup_steps=3, clip_start=1, **how),
    "spam density": lambda ps, **how: SPAM(ps, reset_interval=4, warmup_steps=3, clip_start=1, density=0.25, **how),
    "scale": lambda ps, **how: SCALE(
        [{"params": [ps[i]], "kind": KINDS[i]} for i in (0, 1, 3, 2)], adam_lr=2e-3, **how
    ),
    "stabilize": lambda ps, **how: stabilize(torch.optim.AdamW(ps), AdaClip(), AdaGN(), reset_interval=4, **how),
}


def _gradients(step):
    draw = torch.Generator().manual_seed(100 + step)
    grads = [torch.randn(shape, generator=draw) for shape in SHAPES]
    if step in (3, 9):
        grads[1][2, 3] = 1000.0
    return grads


@pytest.fixture(scope="module")
def saved():
    pytest.importorskip("torchao")  # the 8-bit moments are torchao's tensors
    return torch.load(SAVED / "optimizers.pt", weights_only=False)


@pytest.mark.parametrize("fused", [None, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_0_1_0_goes_on(saved, name, fused):
    entry = saved[name]
    params = [Parameter(p.clone()) for p in entry["params"]]
    optimizer = OPTIMIZERS[name](params, fused=fused)
    optimizer.load_state_dict(entry["state"])
    for step in range(6, 12):
        for p, grad in zip(params, _gradients(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()
    for p, before, after in zip(params, entry["params"], entry["after"], strict=True):
        assert not torch.equal(after, before)
        tolerance = 2e-5 if p.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(p.detach(), after, rtol=tolerance, atol=tolerance / 10)


def test_a_run_of_0_1_0_is_resumed(tmp_path, monkeypatch):
    from evenstep.cli import main

    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--resume", "run", "--train.steps", "8"]) in (0, None)
    expected = json.loads((SAVED / "expected.json").read_text())
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {str(record["step"]): record["loss"] for record in records if "loss" in record and "kind" not in record}
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    assert json.loads(Path("run/summary.json").read_text())["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
