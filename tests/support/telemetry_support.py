"""Runs made of numbers alone, for the tests of the report: quick to write, as long as wanted."""

import json
from pathlib import Path

import numpy as np

from evenstep.telemetry.records import digits
from evenstep.telemetry.schema import to_line

PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]

CONFIG = """name = "{name}"
seed = 0

[optim]
name = "{optimizer}"
lr = {lr}
"""


def parameter_names(count: int) -> list[str]:
    layers = [f"model.layers.{i // len(PARTS)}.{PARTS[i % len(PARTS)]}.weight" for i in range(count - 1)]
    return ["model.embed_tokens.weight", *layers]


def write_run(
    out: Path,
    *,
    steps: int = 400,
    names: list[str] | None = None,
    every: int = 10,
    lr: float = 1e-3,
    lowbit: bool = False,
) -> Path:
    """A run that falls from 9 to 3 nats, with one spike a quarter of the way, x143 in the parameter in the middle."""
    names = names or parameter_names(40)
    draw = np.random.default_rng(0)
    k, spike, hit = len(names), steps // 4 // every * every + 2, len(names) // 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(CONFIG.format(name=out.name, optimizer="stable_spam", lr=lr))
    facts = {"hardware": {"device": "cpu", "cpu": "test", "threads": 1}, "versions": {"torch": "2"}, "commit": "abc"}
    (out / "summary.json").write_text(json.dumps({"steps": steps, **facts}))
    rules = {"ratio": 10.0, "sigma": 7.0, "window": 1000}
    head = {"kind": "start", "step": 0, "version": 1, "optimizer": "StableSPAM", "names": names, "rules": rules}
    with open(out / "metrics.jsonl", "w") as file:
        file.write(to_line(head))
        for first in range(1, steps + 1, every):
            last = min(first + every - 1, steps)
            at = np.arange(first, last + 1)
            losses = 3 + 6 * np.exp(-3 * at / steps) + draw.normal(0, 0.05, len(at))
            norms = np.exp(draw.normal(0, 0.1, len(at)))
            norms[at == spike] *= 90
            window = {"kind": "window", "step": last, "first": first, "lr": lr, "spike_rate": 0.001 * (last >= spike)}
            series = {"losses": losses, "norms": norms, "norms_after": norms.clip(max=1.2)}
            file.write(to_line(window | {name: digits(values) for name, values in series.items()}))
            columns = {
                "ratio": np.exp(draw.normal(0, 0.3, k)),
                "grad_max": np.exp(draw.normal(-5, 0.3, k)),
                "grad_norm": np.exp(draw.normal(-2, 0.3, k)),
                "norm_after": np.exp(draw.normal(-2, 0.1, k)),
                "clip_limit": np.exp(draw.normal(-5, 0.1, k)),
                "clipped": draw.uniform(0, 1e-3, k),
                "gain": np.exp(draw.normal(0, 0.1, k)),
                "update_rms": np.full(k, 1e-3),
                "skipped": np.zeros(k),
                "gss": np.exp(draw.normal(1, 0.5, k)),
                "weight_rms": np.full(k, 0.02),
                "spike_rate": np.zeros(k),
            }
            if first <= spike <= last:
                columns["ratio"][hit] = 143.0
                tensor = {"name": names[hit], "ratio": 143.0, "clipped": 0.00012}
                where = {"step": spike, "rows": [32 * spike, 32 * spike + 32], "count": 1, "tensors": [tensor]}
                event = {"kind": "event", "event": "spike", **where, "loss_before": 5.4, "loss_after": 5.4}
                file.write(to_line(event))
                where = {"step": last, "rows": [32 * last, 32 * last + 32], "loss_before": 5.4, "loss_after": 6.2}
                file.write(to_line({"kind": "event", "event": "loss_spike", **where}))
                event = {"kind": "event", "event": "recovered", "step": last, "since": last - 3, "steps": 3}
                file.write(to_line(event))
            record = {"kind": "parameters", "step": last, "first": first}
            file.write(to_line(record | {name: digits(values) for name, values in columns.items()}))
            if lowbit:
                layers = {name: {"error": 0.1, "saturation": 0.01, "gradient_error": 0.3} for name in names[:6]}
                file.write(to_line({"kind": "lowbit", "step": last, "layers": layers}))
            speed = {"tokens_per_second": 900.0, "grad_norm": float(norms[-1])}
            file.write(to_line({"step": last, "tokens": last * 8192, "loss": float(losses.mean()), "lr": lr, **speed}))
        validation = {"val_loss": 3.1, "perplexity": 22.2, "bits_per_byte": 1.1}
        file.write(to_line({"step": steps, "tokens": steps * 8192, **validation}))
    return out
