"""One run: a PatchTST is trained on one part, its best epoch chosen on another, and scored once on the third."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evenstep.baselines.catalog import baseline
from evenstep.baselines.transforms import add_transforms
from evenstep.errors import EvenstepError
from lab.forecast.recipe import Cell, Model, Optimizer, Train
from lab.forecast.series import Parts, Series, Windows, corrupted, read_csv, split

EVAL_BATCH = 512


def work(setting: dict[str, Any], directory: Path, say: Callable[[str], None], csv: str, gaps: str) -> dict[str, Any]:
    """Train the model of ``setting`` on the series in the file ``csv`` and return the results."""
    data, options = setting["data"], setting["optimizer_options"]
    model, training = Model(**setting["model"]), Train(**setting["train"])
    optimizer = Optimizer(setting["optimizer"], **options)
    where = {key: setting[key] for key in ("lr", "horizon", "severity", "share", "seed", "test")}
    parts = split(_series(csv, tuple(data["columns"]), gaps), data["split"], model.lookback, setting["horizon"])
    started = time.process_time()
    results = train(Cell(optimizer, **where), parts, model, training, torch.device(setting["device"]))
    return results | {"core_seconds": round(time.process_time() - started, 1)}


@functools.cache
def _series(csv: str, columns: tuple[str, ...], gaps: str) -> Series:
    return read_csv(Path(csv), columns, gaps=gaps)


def patchtst(model: Model, channels: int, horizon: int) -> nn.Module:
    """PatchTST with channel independence: one set of weights, and each channel is forecast from itself alone."""
    try:
        from transformers import PatchTSTConfig, PatchTSTForPrediction
    except ImportError:
        raise EvenstepError("forecasting needs transformers; pip install 'evenstep[forecast]'") from None
    config = PatchTSTConfig(
        num_input_channels=channels,
        context_length=model.lookback,
        prediction_length=horizon,
        patch_length=model.patch,
        patch_stride=model.stride,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        d_model=model.width,
        ffn_dim=model.ffn,
        # The library's names of the authors' dropouts: of positions, of sublayer outputs, and within the ffn.
        positional_dropout=model.dropout,
        path_dropout=model.dropout,
        ff_dropout=model.dropout,
        # The library's defaults of these two differ from the paper.
        pre_norm=False,
        pooling_type=None,
    )
    return PatchTSTForPrediction(config)


def train(cell: Cell, parts: Parts, model: Model, options: Train, device: torch.device) -> dict[str, Any]:
    """Train one model and return the results. A loss that is not finite ends the run, with scores of None.

    Validation and test inputs are never corrupted. The seed fixes weights, dropout, order and noise, which are the same
    for all optimizers.
    """
    torch.manual_seed(cell.seed)
    order = torch.Generator().manual_seed(cell.seed + 1)
    noise = torch.Generator(device).manual_seed(cell.seed + 2)
    parts = Parts(*(part.to(device) for part in (parts.train, parts.val, parts.test)))
    net = patchtst(model, parts.train.rows.shape[1], cell.horizon).to(device)
    chosen = cell.optimizer
    optimizer = add_transforms(
        baseline(chosen.name).build(net, lr=cell.lr, weight_decay=chosen.weight_decay, **chosen.options), chosen.before
    )
    epochs: list[dict[str, float]] = []
    best, weights = 0, None
    for epoch in range(1, options.epochs + 1):
        rate = cell.lr * options.decay ** max(0, epoch - options.decay_from)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses, norms = _epoch(net, optimizer, _starts(parts.train, options, order), parts.train, cell, noise)
        row = {"lr": rate, "train": sum(losses) / len(losses)}
        row |= {"grad_median": median(norms), "grad_max": max(norms), "val": math.nan}
        epochs.append(row)
        if not math.isfinite(row["train"]):
            break
        row["val"] = score(net, parts.val)["mse"]
        if not best or row["val"] < epochs[best - 1]["val"]:
            best, weights = epoch, copy.deepcopy(net.state_dict())
        if epoch - best >= options.patience:
            break
    diverged = not math.isfinite(epochs[-1]["train"]) or weights is None
    result: dict[str, Any] = {
        "diverged": diverged,
        "parameters": sum(p.numel() for p in net.parameters()),
        "windows": {name: len(getattr(parts, name)) for name in ("train", "val", "test")},
        "best_epoch": best,
        "val_mse": None if diverged else epochs[best - 1]["val"],
        "epochs": {key: [_short(row[key]) for row in epochs] for key in epochs[0]},
    }
    if cell.test:
        test: dict[str, float | None] = {"mse": None, "mae": None}
        if weights is not None and not diverged:
            net.load_state_dict(weights)
            test |= score(net, parts.test)
        result |= {"test_mse": test["mse"], "test_mae": test["mae"]}
    return result


def _starts(windows: Windows, options: Train, order: torch.Generator) -> list[Tensor]:
    """Start positions of the windows of an epoch by batch, in a new order each time; the last batch may be smaller."""
    drawn = torch.randperm(len(windows), generator=order)
    if options.windows_per_epoch:
        drawn = drawn[: options.windows_per_epoch]
    return list(drawn.split(options.batch_size))


def _epoch(
    net: nn.Module, optimizer: Any, starts: list[Tensor], windows: Windows, cell: Cell, noise: torch.Generator
) -> tuple[list[float], list[float]]:
    """Train for one epoch; returns loss and gradient norm (before any clipping) of each step."""
    net.train()
    rows = []
    for batch in starts:
        inputs, targets = windows.at(batch.to(windows.rows.device))
        if cell.severity:
            inputs = corrupted(inputs, cell.share, cell.severity, noise)
        loss = net(past_values=inputs, future_values=targets).loss
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        rows.append(torch.stack([loss.detach(), nn.utils.get_total_norm(gradients)]))
        optimizer.step()
    losses, norms = torch.stack(rows).T.tolist()
    return losses, norms


@torch.no_grad()
def score(net: nn.Module, windows: Windows) -> dict[str, float]:
    """Mean squared and mean absolute error of standardised values over all windows, steps and channels."""
    net.eval()
    squared, absolute, count = 0.0, 0.0, 0
    for inputs, targets in windows.batches(EVAL_BATCH):
        errors = net(past_values=inputs).prediction_outputs - targets
        squared += errors.square().sum(dtype=torch.float64).item()
        absolute += errors.abs().sum(dtype=torch.float64).item()
        count += errors.numel()
    return {"mse": squared / count, "mae": absolute / count}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
