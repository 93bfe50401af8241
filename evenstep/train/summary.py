"""The beginning and the end of a run: the header before its first step; summary.json, curve.png and the closing lines
after the last one."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from evenstep.baselines.state_size import state_bytes
from evenstep.console import counted, printable, program
from evenstep.errors import EvenstepError
from evenstep.telemetry.facts import spikes
from evenstep.telemetry.lines import short
from evenstep.telemetry.schema import finite, read_records
from evenstep.train.checkpoint import reason_of
from evenstep.train.config_io import config_hash
from evenstep.train.distributed import World
from evenstep.train.files import replace_bytes, replace_text
from evenstep.train.hardware import commit, describe_hardware, peak_memory, versions
from evenstep.train.log import Metrics, clock, columns_help, line_width, read_metrics, short_count, wrapped

T = TypeVar("T")


def header(
    config: Any, model: Any, trained: int, data: str, world: World, micro_batch_size: int, *, resets: bool
) -> list[str]:
    """The lines printed before the first step: model, optimizer, data, budget, device, directory, and how to read the
    lines that follow. ``trained`` is the number of parameters that are trained, ``data`` a description of the data,
    ``resets`` whether the optimizer will reset its moments. On a terminal the lines are broken between words."""
    train, optim = config.train, config.optim
    size = f"{config.model.label}, {short_count(model.num_parameters())} parameters"
    if trained < model.num_parameters():
        size += f", {short_count(trained)} of them trained"
    lowbit = f", low-bit {config.lowbit}" if config.lowbit else ""
    transforms = f"{optim.before} + " if optim.before else ""
    passes = train.batch_size // world.data_size // micro_batch_size
    split = f" in {passes} passes" if passes > 1 else ""
    processes = f", {world.size} processes ({config.parallel.mode})" if world.size > 1 else ""
    rate = f"lr {optim.lr:g}{optim.scales_in_words}, {config.schedule.name}, {config.warmup_steps:,} warm-up steps"
    lines = {
        "model": size + lowbit,
        "optimizer": f"{transforms}{optim.name}, {rate}",
        "data": data,
        "budget": f"{config.total_steps:,} steps of {train.batch_size} x {train.seq_len} tokens{split}, "
        f"{short_count(config.total_steps * config.tokens_per_step)} tokens in all",
        "device": f"{world.device}, {train.dtype}{processes}",
        "folder": str(config.out),
        "time": f"the time left is shown as eta, from step {min(config.log.every, config.total_steps)} on",
        "columns": columns_help(resets=resets),
    }
    width = line_width(sys.stdout)
    return [wrapped(f"{key:<10} {line}", width, 11) for key, line in lines.items()]


def run_facts(
    config: Any,
    *,
    model: Any,
    optimizer: Optimizer,
    device: torch.device,
    metrics: Metrics,
    say: Callable[[str], None],
    processes: int,
    steps: int,
    tokens: int,
    seconds: float,
    step_seconds: float,
    skipped: list[tuple[int, int]],
) -> dict[str, Any]:
    """The entries of summary.json that every finished run has."""
    train, validation = metrics.last_train or {}, metrics.last_validation or {}
    return {
        "name": config.name,
        "steps": steps,
        "tokens": tokens,
        "train_loss": train.get("loss"),
        "val_loss": validation.get("val_loss"),
        "perplexity": validation.get("perplexity"),
        "bits_per_byte": validation.get("bits_per_byte"),
        "val_tokens": validation.get("val_tokens"),
        "seconds": seconds,
        "tokens_per_second": tokens / step_seconds if step_seconds else None,
        "peak_memory": peak_memory(device),
        "state_bytes": attempt(
            "size of the optimizer's state",
            lambda: state_bytes(optimizer.state_dict()["state"], model.parameters()),
            say,
        ),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "model": config.model.label,
        "parameters": model.num_parameters(),
        "optimizer": config.optim.name,
        "lowbit": config.lowbit,
        "seed": config.seed,
        "processes": processes,
        "skipped_sequences": sum(stop - start for start, stop in skipped),
        "spikes": attempt("count of the spikes", lambda: spikes(read_records(metrics.path)), say)
        if config.telemetry.enabled
        else None,
        "config_hash": config_hash(config),
        "commit": commit(),
        "hardware": describe_hardware(device),
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def finish(
    out: Path,
    summary: dict[str, Any],
    *,
    sample: Callable[[], str],
    curve: str | None,
    report: Callable[[Path], bool] | None,
    closing: Callable[[Path, dict[str, Any], list[str]], list[str]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write summary.json with the sample, plot the losses, and print the closing lines; returns the summary.

    ``sample`` generates the text; ``curve`` is the title of the plot, None for no plot; ``report`` writes
    the page of the directory, report.html, and returns True; ``closing`` makes the lines from the directory, the
    summary and the names of the files.
    """
    files = ["config.toml", "metrics.jsonl", "summary.json", "checkpoints/"]

    def write() -> dict[str, Any]:
        clean = {key: finite(value) for key, value in summary.items()}
        replace_text(out / "summary.json", json.dumps(clean, indent=2, ensure_ascii=False) + "\n")
        return clean

    # The summary is written before the sample and the plot, so that neither an error nor a kill can lose the result.
    clean = write()
    if summary.get("sample", "") is None:
        summary["sample"] = attempt("sample", sample, say)
        clean = write()
    if curve is not None and attempt(
        "curve.png", lambda: draw_curve(out / "metrics.jsonl", out / "curve.png", curve), say
    ):
        files.insert(3, "curve.png")
    if report is not None and attempt(REPORT, partial(report, out), say):
        files.insert(-1, REPORT)
    for line in attempt("closing lines", lambda: closing(out, summary, files), say) or ():
        say(line)
    return clean


REPORT = "report.html"


def attempt(what: str, make: Callable[[], T], say: Callable[[str], None]) -> T | None:
    """The result of ``make``; None, after printing the reason, if it raises. For parts of the output whose failure must
    not end a run."""
    try:
        return make()
    except Exception as problem:
        say(f"no {what}: {reason_of(problem) if str(problem) else type(problem).__name__}")
        return None


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, with bias correction. Up to 20 values stay
    unchanged."""
    # `mass` is the sum of the weights so far, by which the mean is divided: the bias correction of Adam.
    weight = 1 - min(1.0, 20 / max(1, len(values)))
    result, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(mean / mass)
    return result


def draw_curve(metrics: Path, picture: Path, title: str) -> bool:
    """Plot the training loss (raw and smoothed) and the validation loss over the number of tokens, as a PNG.
    EvenstepError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as problem:
        raise EvenstepError(f"{problem.name} is not installed (pip install 'evenstep[train]')") from None
    records = read_metrics(metrics)
    train = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["tokens"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # pyplot would have global state and may need a display
    axes = figure.add_subplot()
    if train:
        tokens, losses = [x for x, _ in train], [y for _, y in train]
        axes.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(
            tokens,
            smoothed(losses),
            color="tab:blue",
            linewidth=1.8,
            label=f"training, last {losses[-1]:.3f}",
        )
    if val:
        axes.plot(
            *zip(*val, strict=True), "o-", color="tab:orange", markersize=4, label=f"validation, last {val[-1][1]:.3f}"
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a path may hold a $
    axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    # Rendered in memory and renamed into place, so that a full disk leaves no half picture.
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    replace_bytes(picture, drawn.getvalue())
    return True


def _validation(summary: dict[str, Any]) -> str:
    if summary["val_loss"] is None:
        return "no validation: the text has no validation split (data.val_fraction 0)"
    shown = {"perplexity": ".2f", "bits_per_byte": ".4f"}
    parts = [
        f"{key.replace('_', ' ')} {summary[key]:{form}}" for key, form in shown.items() if summary[key] is not None
    ]
    return "   ".join([f"validation loss {summary['val_loss']:.4f}", *parts])


def closing_lines(out: Path, summary: dict[str, Any], files: list[str]) -> list[str]:
    """The lines printed after the last step: results, sample, files, and commands to continue with."""
    run = shlex.quote(str(out))
    prompt = f" --prompt {shlex.quote(summary['prompt'])}" if summary["prompt"] else ""
    speed = summary["tokens_per_second"]
    lines = [
        "",
        _validation(summary),
        f"{short_count(summary['tokens'])} tokens in {clock(summary['seconds'])}"
        + (f"   {speed:,.0f} tokens/s" if speed else ""),
    ]
    if summary.get("sample"):
        lines += [
            "",
            "a sample of the model's text:",
            *(f"  {line}" for line in printable(summary["sample"]).split("\n")),
        ]
    return [
        *lines,
        "",
        f"written to {out}: {', '.join(files)}",
        f"generate:   {program()} generate {run}{prompt}",
        *spike_lines(out, summary),
        report_line(out, files),
        f"continue:   {program()} pretrain --resume {run} --train.steps {2 * summary['steps']}",
    ]


def spike_lines(out: Path, summary: dict[str, Any]) -> list[str]:
    """What the guard did, the spikes that telemetry has found, and the command that prints the text of the batch of the
    largest one."""
    found = summary.get("spikes")
    if not found:
        return []
    left_out = f"; {summary['skipped_sequences']} sequences left out" if summary.get("skipped_sequences") else ""
    guard = [f"guard:      {counted(found['actions'], 'action')}{left_out}"] if found["actions"] else []
    if not found["count"]:
        return [*guard, "spikes:     none"]
    worst = f"x{found['ratio']:.0f} in {short(found['tensor'])} at step {found['step']}"
    many = f"{found['count']} spikes, the worst {worst}" if found["count"] > 1 else f"1 spike, {worst}"
    if not (rows := found["rows"]):
        return [*guard, f"spikes:     {many}"]
    return [
        *guard,
        f"spikes:     {many}; the text of that batch:",
        f"            {program()} rows {shlex.quote(str(out))} {rows[0]}-{rows[1]}",
    ]


def report_line(out: Path, files: list[str]) -> str:
    """The address of the report, or the command that writes it."""
    if REPORT in files:
        return f"report:     {(out / REPORT).resolve().as_uri()}"
    return f"report:     {program()} report {shlex.quote(str(out))}"
