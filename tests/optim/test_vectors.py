"""Step by step against recorded trajectories of the published code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evenstep import SCALE, SPAM, StableSPAM

pytestmark = pytest.mark.usefixtures("either_code")

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
OPTIONS = {
    "StableSPAM": [
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "gamma1",
        "gamma2",
        "gamma3",
        "total_T",
        "eta_min",
        "update_proj_gap",
    ],
    "SPAM": ["lr", "betas", "eps", "weight_decay", "warmup_steps", "threshold", "DeltaT", "grad_accu_steps"],
}


def replay(name: str, variant: str) -> list[float]:
    """Distance to the recording after each step, relative to how far the recording has moved (worst tensor)."""
    with np.load(VECTORS / f"{name}.npz") as recorded:
        z = {key: recorded[key] for key in recorded.files}
    meta = json.loads(bytes(z["meta"]))
    given, names = meta["hyper"], list(meta["shapes"])
    params = {n: torch.nn.Parameter(torch.tensor(z[f"init/{n}"])) for n in names}
    if meta["algo"] == "SCALE":
        kinds = {"emb": "embedding", "w": "hidden", "head": "last", "g": "vector"}
        optimizer = SCALE(
            [{"params": [(n, p)], "kind": kinds[n]} for n, p in params.items()],
            **{key: given[key] for key in ("lr", "wd", "momentum", "adam_lr", "adamw_betas", "adamw_eps")},
        )
    else:
        options = {key: given[key] for key in OPTIONS[meta["algo"]]}
        if given.get("density") is not None:
            options["density"] = given["density"]
        cls = {"StableSPAM": StableSPAM, "SPAM": SPAM}[meta["algo"]]
        optimizer = cls(params.items(), variant=variant, **options)
    errors = []
    for t in range(meta["T"]):
        for n, p in params.items():
            p.grad = torch.tensor(z[f"grads/{n}"][t])
            if f"mask/{n}/{t}" in z:
                optimizer.set_mask(p, torch.tensor(z[f"mask/{n}/{t}"]))
        optimizer.step()
        moved = {n: (p.detach().numpy(), z[f"params/{n}"][t], z[f"init/{n}"]) for n, p in params.items()}
        errors.append(max(np.linalg.norm(p - ref) / np.linalg.norm(ref - start) for p, ref, start in moved.values()))
    return errors


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("name", ["stablespam_default", "stablespam_spikes", "stablespam_totalT40"])
def test_stable_spam_follows_the_recording_before_a_reset(name, variant):
    assert max(replay(name, variant)) <= 2e-5


def test_stable_spam_official_follows_the_recording_through_resets():
    assert max(replay("stablespam_gap7", "official")) <= 1e-4


def test_stable_spam_paper_leaves_the_official_resets_behind():
    errors = replay("stablespam_gap7", "paper")
    assert max(errors[:6]) <= 2e-5
    assert errors[-1] > 0.1


@pytest.mark.parametrize("name", ["spam_d30_w10", "spam_d30_w10_thr50_spikes", "spam_density025"])
def test_spam_official_follows_the_recording(name):
    assert max(replay(name, "official")) <= 1e-4


@pytest.mark.parametrize("name", ["spam_d30_w10", "spam_d30_w10_thr50_spikes", "spam_density025"])
def test_spam_paper_differs_by_eps_before_a_reset_and_by_more_after(name):
    errors = replay(name, "paper")
    assert errors[0] <= 5.1e-2
    assert errors[28] <= 5e-3
    assert errors[-1] > 1e-3


def test_scale_follows_the_recording():
    assert max(replay("scale_default", "official")) <= 1e-4
