"""The gradient spike study of the SPAM paper (arXiv:2501.06842, section 2) at small sizes: ``python -m lab.spikes``.

Each model is trained with Adam, and |g| of a sample of coordinates of every tensor is kept for every step. So the
score is the paper's own: |g| over its mean over all steps, with a spike where it is above 50. The second part puts a
spike into a steady stream of gradients, next to a twin without it, and measures how long the moments of both differ.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evenstep.data import BatchLoader, DataSpec, prepare
from evenstep.errors import EvenstepError, nearest
from evenstep.models import SIZES, Llama, llama_config, load_pretrained
from evenstep.optim import SPAM, StableSPAM
from evenstep.telemetry.lines import short
from evenstep.telemetry.schema import GSS_THRESHOLD
from evenstep.train.files import replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, SEQ_LEN, LR, WARMUP = 8, 64, 1e-3, 20


# ---- models: LLaMA shapes of evenstep's own, Pythia shapes built by transformers ----

PYTHIA = {
    "14m": (128, 512, 6, 4),
    "31m": (256, 1024, 6, 8),
    "70m": (512, 2048, 6, 8),
    "160m": (768, 3072, 12, 12),
    "410m": (1024, 4096, 24, 16),
    "1b": (2048, 8192, 16, 8),
}
"""hidden_size, intermediate_size, num_layers, num_heads (arXiv:2304.01373, and EleutherAI's later small ones)."""

Loss = Callable[[Tensor, Tensor], Tensor]

PARTS = ("embedding", "norms", "attention", "mlp", "head")


def check_model(name: str) -> None:
    """Raise EvenstepError if `build` does not know the model."""
    known = [*(f"llama-{size}" for size in SIZES), *(f"pythia-{size}" for size in PYTHIA)]
    if name not in known and not (name and Path(name).is_dir()):
        raise EvenstepError(
            f"--models: '{name}' is not a model{nearest(name, known)}; give llama-SIZE ({', '.join(SIZES)}), "
            f"pythia-SIZE ({', '.join(PYTHIA)}) or a directory with a LLaMA in Hugging Face layout"
        )


def build(name: str, vocab_size: int, seq_len: int) -> tuple[nn.Module, Loss]:
    """A model and its loss function: the mean over the targets, from tokens and targets, int64 ``[batch, seq_len]``."""
    if Path(name).is_dir():
        loaded = load_pretrained(Path(name))
        return loaded, loaded.loss
    family, _, size = name.partition("-")
    if family == "llama":
        llama = Llama(llama_config(size, vocab_size, max_seq_len=seq_len))
        return llama, llama.loss
    return _pythia(size, vocab_size, seq_len)


def _pythia(size: str, vocab_size: int, seq_len: int) -> tuple[nn.Module, Loss]:
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        raise EvenstepError("Pythia shapes need the package transformers; pip install 'evenstep[hf]'") from None
    hidden, intermediate, layers, heads = PYTHIA[size]
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=seq_len,
            use_cache=False,
        )
    )

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())

    return model, loss


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to, by its name."""
    rules = {"lm_head": "head", "embed_out": "head", "norm": "norms", "embed": "embedding", "mlp": "mlp"}
    return next((part for word, part in rules.items() if word in name), "attention")


# ---- training ----


@dataclass
class Trained:
    """A trained model: ``losses`` ``[steps]``, and ``scores``, the GSS of each tensor, ``[steps, samples]``."""

    name: str
    losses: NDArray[np.float64]
    scores: dict[str, NDArray[np.float32]]

    def spikes(self) -> NDArray[np.float64]:
        """Share of the sampled coordinates that spike, per step."""
        return np.mean([(score > GSS_THRESHOLD).mean(1) for score in self.scores.values()], axis=0)

    def by_part(self) -> dict[str, float]:
        """Share of coordinates and steps that are spikes, by part of the model."""
        by_part: dict[str, list[float]] = {part: [] for part in PARTS}
        for name, score in self.scores.items():
            by_part[part_of(name)].append(float((score > GSS_THRESHOLD).mean()))
        return {part: float(np.mean(shares)) for part, shares in by_part.items() if shares}

    def largest(self) -> tuple[list[str], NDArray[np.float32]]:
        """Names of the tensors, and the largest GSS of each on each step, ``[tensors, steps]``."""
        return [short(name) for name in self.scores], np.stack([score.max(1) for score in self.scores.values()])


def spike_scores(sizes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The paper's GSS: ``|g|`` ``[steps, coordinates]`` over its mean over all steps; 0 for a coordinate whose gradient
    is always 0."""
    mean = sizes.mean(0, dtype=np.float64)
    return np.divide(sizes, mean, out=np.zeros_like(sizes), where=mean > 0)


def train(name: str, source: str, steps: int, samples: int, seed: int, say: Callable[[str], None]) -> Trained:
    """Train a model with torch's Adam and a warm-up of 20 steps, and return its losses and spike scores."""
    tokenizer = Path(name) / "tokenizer.json" if Path(name).is_dir() else None
    data = prepare(DataSpec(source=source, tokenizer=str(tokenizer) if tokenizer else "bpe"))
    loader = BatchLoader(data.train, SEQ_LEN, BATCH, seed)
    torch.manual_seed(seed)
    model, loss_of = build(name, data.vocab_size, SEQ_LEN)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    draw = torch.Generator().manual_seed(seed)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    where = [torch.randint(p.numel(), (samples,), generator=draw) for p in params]
    sizes = np.zeros((len(params), steps, samples), np.float32)
    losses, began = np.zeros(steps), time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        loss = loss_of(*loader.next_batch())
        optimizer.zero_grad()
        loss.backward()
        for i, (p, at) in enumerate(zip(params, where, strict=True)):
            if p.grad is not None:
                sizes[i, step] = torch.take(p.grad, at).abs().numpy()
        optimizer.step()
        losses[step] = loss.item()
        if (step + 1) % max(1, steps // 4) == 0:
            say(f"{name}  step {step + 1}/{steps}  loss {losses[step]:.3f}  {time.perf_counter() - began:.0f} s")
    return Trained(name, losses, {key: spike_scores(part) for key, part in zip(names, sizes, strict=True)})


# ---- how long a spike stays in the moments ----

Maker = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-5),
    "SPAM": lambda params: SPAM(params, lr=1e-5),
    "Stable-SPAM": lambda params: StableSPAM(params, lr=1e-5),
}

SPIKE_AT, FACTOR, ENTRIES, HIT, FOLLOWED = 1100, 1000.0, 1000, 10, 2500
"""The spike comes at a step without a reset, and is followed past the next resets of SPAM (1500) and Stable-SPAM
(2000)."""

CLEAN = 0.1
"""The moments count as clean again once they differ by less than this share."""


def contamination(seed: int = 0, spike_at: int = SPIKE_AT, followed: int = FOLLOWED) -> dict[str, dict[str, Any]]:
    """Measure how long a spike stays in the moments of each optimizer.

    Gradients are N(0, 1) noise with 1000 entries, of which 10 are multiplied by 1000 once, at step ``spike_at``.

    Returns:
        By optimizer: for ``exp_avg`` and ``exp_avg_sq`` of the 10 entries, the distance from those of a twin without
        the spike, as a share of the twin's mean norm, ``[followed]``; and ``..._steps``, the number of steps until it
        stays below `CLEAN`, None if it does not.
    """
    return {name: _follow(make, seed, spike_at, followed) for name, make in OPTIMIZERS.items()}


def _follow(make: Maker, seed: int, spike_at: int, followed: int) -> dict[str, Any]:
    clean, hit = nn.Parameter(torch.zeros(ENTRIES)), nn.Parameter(torch.zeros(ENTRIES))
    optimizer, draw = make([clean, hit]), torch.Generator().manual_seed(seed)
    away: dict[str, list[float]] = {"exp_avg": [], "exp_avg_sq": []}
    usual: dict[str, list[float]] = {"exp_avg": [], "exp_avg_sq": []}
    for step in range(1, spike_at + followed):
        noise = torch.randn(ENTRIES, generator=draw)
        clean.grad, hit.grad = noise, noise.clone()
        if step == spike_at:
            hit.grad[:HIT] *= FACTOR
        optimizer.step()
        for key in away:
            if step >= spike_at:
                true, other = (optimizer.state[p][key][:HIT] for p in (clean, hit))
                away[key].append(float(torch.linalg.vector_norm(other - true)))
                usual[key].append(float(torch.linalg.vector_norm(true)))
    result: dict[str, Any] = {}
    for key, distances in away.items():
        result[key] = np.array(distances) / np.mean(usual[key])
        dirty = np.flatnonzero(result[key] > CLEAN)
        last = int(dirty[-1]) + 1 if len(dirty) else 0
        result[f"{key}_steps"] = None if last == followed else last
    return result


# ---- pictures ----

COLUMNS = 100
"""Columns of the heat map; each shows the largest value of a stretch of steps."""

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")


def draw_all(out: Path, trained: list[Trained], moments: dict[str, Any]) -> list[Path]:
    """Draw how-often.png, where.png, how-large.png and moments.png; returns their paths."""
    figures = {"how-often": _how_often(trained), "where": _where(trained), "how-large": _how_large(trained)}
    paths = []
    for name, figure in (figures | {"moments": _moments(moments)}).items():
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which has global state

    return Figure(figsize=(width, height), layout="constrained")


def _how_often(trained: list[Trained]) -> Figure:
    figure = _figure(9, 2.7 * len(trained))
    for axes, one in zip(figure.subplots(len(trained), squeeze=False).flat, trained, strict=True):
        steps = np.arange(1, len(one.losses) + 1)
        axes.bar(steps, 100 * one.spikes(), width=1.0, color="tab:red", alpha=0.8)
        axes.set(title=one.name, xlabel="step", ylabel=f"coordinates with GSS > {GSS_THRESHOLD:.0f} (%)")
        beside = axes.twinx()
        beside.plot(steps, one.losses, color="tab:blue", linewidth=1)
        beside.set_ylabel("loss", color="tab:blue")
    return figure


def _where(trained: list[Trained]) -> Figure:
    figure = _figure(10, 4.2 * len(trained))
    grid = figure.subplots(len(trained), 2, squeeze=False, width_ratios=(1, 3))
    from matplotlib.colors import LogNorm

    for (bars, picture), one in zip(grid, trained, strict=True):
        parts = one.by_part()
        drawn = bars.barh(list(parts)[::-1], [100 * share for share in parts.values()][::-1], color="tab:red")
        bars.bar_label(drawn, fmt="%.2g", padding=3, fontsize=8)
        bars.set(title=one.name, xlabel="coordinates and steps\nthat are spikes (%)")
        bars.margins(x=0.25)
        rows, largest = one.largest()
        starts = np.arange(0, largest.shape[1], -(-largest.shape[1] // COLUMNS))
        pooled = np.maximum.reduceat(largest, starts, axis=1)
        scale, extent = LogNorm(1, max(100.0, largest.max())), (0, largest.shape[1], len(rows) - 0.5, -0.5)
        shown = picture.imshow(
            np.maximum(pooled, 1), aspect="auto", norm=scale, cmap="magma_r", extent=extent, interpolation="nearest"
        )
        every = max(1, len(rows) // 12)
        picture.set_yticks(
            range(0, len(rows), every), [row.removeprefix("gpt_neox.") for row in rows[::every]], fontsize=7
        )
        picture.set(xlabel="step", title="largest GSS of each tensor")
        figure.colorbar(shown, ax=picture, label="GSS")
    return figure


def _how_large(trained: list[Trained]) -> Figure:
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    steps = max(len(one.losses) for one in trained)
    edges = np.geomspace(1, steps, 40)
    for one, color in zip(trained, COLORS * len(trained), strict=False):
        scores = np.concatenate([score.ravel() for score in one.scores.values()])
        counts, _ = np.histogram(scores, edges)
        axes.stairs(counts / len(scores), edges, color=color, label=one.name, linewidth=1.6)
    axes.axvline(GSS_THRESHOLD, color="grey", linestyle=":", label=f"GSS {GSS_THRESHOLD:.0f}")
    axes.set(xscale="log", yscale="log", xlabel="GSS", ylabel="share of coordinates and steps")
    axes.legend(frameon=False)
    return figure


def _moments(moments: dict[str, Any]) -> Figure:
    figure = _figure(10, 3.6)
    titles = {"exp_avg": "first moment", "exp_avg_sq": "second moment"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for (name, result), color in zip(moments.items(), COLORS, strict=False):
            axes.plot(np.maximum(result[key], 1e-3), color=color, label=name, linewidth=1.5)
        axes.axhline(0.1, color="grey", linestyle=":")
        axes.set(yscale="log", title=title, xlabel="steps after the spike", ylim=(7e-4, None))
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("difference to the twin\nwithout a spike (share)")
    return figure


# ---- the whole ----


def study(
    out: Path,
    *,
    models: list[str],
    steps: int,
    samples: int,
    source: str,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run both parts and write pictures and ``study.json`` to ``out``; returns the contents of that file."""
    if steps <= GSS_THRESHOLD:
        raise EvenstepError(f"--steps {steps}: a GSS above 50 needs more than 50 steps; give at least 100")
    if samples < 1:
        raise EvenstepError(f"--samples {samples} is out of range; give at least 1")
    for name in models:
        check_model(name)
    if importlib.util.find_spec("matplotlib") is None:
        raise EvenstepError("the study draws with matplotlib; pip install 'evenstep[plots]'")
    out.mkdir(parents=True, exist_ok=True)
    trained = [train(name, source, steps, samples, seed, say) for name in models]
    moments = contamination(seed)
    numbers = {
        "settings": {"steps": steps, "samples": samples, "source": source, "seed": seed, "lr": LR}
        | {"batch_size": BATCH, "seq_len": SEQ_LEN, "torch": str(torch.__version__)},
        "models": {one.name: _numbers(one) for one in trained},
        "moments": {
            name: {key: value for key, value in facts.items() if key.endswith("_steps")}
            for name, facts in moments.items()
        },
    }
    replace_text(out / "study.json", json.dumps(numbers, indent=2) + "\n")
    for line in lines(numbers):
        say(line)
    for path in draw_all(out, trained, moments):
        say(f"written {path}")
    return numbers


def _numbers(one: Trained) -> dict[str, Any]:
    rows, largest = one.largest()
    return {
        "loss": float(one.losses[-20:].mean()),
        "spiking_share": float(one.spikes().mean()),
        "steps_with_spikes": float((largest.max(0) > GSS_THRESHOLD).mean()),
        "largest_gss": float(largest.max()),
        "largest_in": rows[int(largest.max(1).argmax())],
        "by_part": one.by_part(),
    }


def lines(numbers: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    texts = []
    for name, facts in numbers["models"].items():
        parts = ", ".join(f"{part} {share:.2%}" for part, share in facts["by_part"].items())
        texts += [
            f"{name}: {facts['spiking_share']:.3%} of coordinates and steps are spikes, by part {parts};",
            f"  on {facts['steps_with_spikes']:.0%} of the steps there is one; largest {facts['largest_gss']:.0f} "
            f"in {facts['largest_in']}",
        ]
    for name, facts in numbers["moments"].items():
        first, second = (facts[f"{key}_steps"] for key in ("exp_avg", "exp_avg_sq"))
        texts.append(f"{name}: one spike stays {_steps(first)} in the first moment, {_steps(second)} in the second")
    return texts


def _steps(count: int | None) -> str:
    return "longer than was followed" if count is None else f"{count} steps"


if __name__ == "__main__":
    from evenstep.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
