import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evenstep.train.log import LineProgress, LiveProgress, Metrics, clock, make_progress, read_metrics

ROOT = Path(__file__).parents[2]
RECORD = {
    "step": 20, "tokens": 40960, "loss": 5.43219, "lr": 0.00098, "grad_norm": 1.2345, "tokens_per_second": 12345.6,
    "steps_to_reset": 80,
}  # fmt: skip


def test_a_training_record_is_exactly_one_line():
    out = io.StringIO()
    with LineProgress(120, out) as progress:
        progress.step(20, 5.4)
        progress.train(RECORD)
    assert out.getvalue() == (
        "step  20/120  loss 5.4322  lr 9.80e-04  grad 1.234  12,346 tok/s  eta 0:00:17  reset in 80\n"
    )


def test_no_reset_no_word_of_it():
    out = io.StringIO()
    LineProgress(120, out).train({key: value for key, value in RECORD.items() if key != "steps_to_reset"})
    assert "reset" not in out.getvalue()


@pytest.mark.parametrize("left, shown", [(100, True), (101, False), (380, False)])
def test_a_reset_that_this_run_does_not_reach_is_not_spoken_of(left, shown):
    out = io.StringIO()
    LineProgress(120, out).train(RECORD | {"steps_to_reset": left})
    assert (f"reset in {left}" in out.getvalue()) == shown


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120])
def test_a_narrow_terminal_leaves_numbers_out_and_cuts_none(width):
    pytest.importorskip("rich")
    from rich.console import Console

    progress = LiveProgress(120, io.StringIO())
    progress._console = Console(file=progress.out, width=width)
    progress.train(RECORD)
    shown = progress._bar.tasks[0].description.split("  ")
    everything = ["loss 5.4322", "eta 0:00:17", "12,346 tok/s", "lr 9.80e-04", "reset in 80"]
    assert shown == everything[: len(shown)] and (len(shown) == 5) == (width == 120)
    assert len("  ".join(shown)) + len("step 20/120  ") <= width
    names, many = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(5)], 5 * [0.5]
    record = {"first": 1, "step": 20} | dict.fromkeys(("ratio", "gss", "grad_norm", "norm_after", "clipped"), many)
    progress.parameters(names, record)
    progress._console.print(progress._bar.summary)
    text = progress.out.getvalue()
    numbers = {"x0.5", "0", "5.00e-01", "50.00%"}
    rows = [line.split() for line in text.splitlines()[1:]]
    assert all({word for word in row if word[-1] in "%0123456789"} <= numbers for row in rows), text
    assert ("clipped" in text) == (width >= 80)


def test_clock():
    assert [clock(x) for x in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_not_a_terminal_means_plain_lines():
    assert type(make_progress(3)) is LineProgress


EVENT = "step 20 spike x143 in layers.3.mlp.down_proj and 13 more tensors, 0.012 % clipped, loss 5.432 -> 5.441, "
COMMAND = "go on with: .venv/bin/evenstep pretrain --resume runs/2026-11-29-120000-demo --train.steps 800 --seed 7"


def on_a_terminal(width, *, rich=True):
    """What a progress writes on a pseudo-terminal of that width."""
    import pty

    code = f"""
import sys, time
if not {rich}:
    sys.modules["rich"] = sys.modules["rich.console"] = None
from evenstep.train.log import make_progress, print_line
record = {RECORD!r}
with make_progress(120, 10) as progress:
    for step in range(11, 31):
        progress.step(step, 5.0 + step / 100)
        time.sleep(0.03)
        if step == 20:
            progress.train(record)
            progress.validation({{"step": 20, "val_loss": 5.5, "perplexity": 244.7, "bits_per_byte": 2.1}})
            progress.event({EVENT!r} + "data rows 51968-52000")
            progress.event("step 21 loss spike, loss 5.43 -> 9.1")
            print_line({COMMAND!r})  # as the guard and the closing lines do, past the progress
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(width), "LINES": "30"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                break
            seen += chunk
        elif process.poll() is not None:
            break
    assert process.wait(10) == 0
    return seen.decode()


def screen(text, width):
    """The lines that a terminal of that width shows in the end."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", text):
        if piece == "\n" or (column == width and not piece.startswith("\x1b") and piece != "\r"):
            row, column = row + 1, column if piece == "\n" else 0
            lines += [""] * (row == len(lines))
        if piece == "\r":
            column = 0
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece != "\n" and not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return lines


needs_terminal = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


@needs_terminal
@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_gets_a_live_bar(width):
    pytest.importorskip("rich")
    text = on_a_terminal(width)
    assert "\x1b[" in text and "\r" in text  # it redraws in place
    assert "step 30/120" in text and "loss 5.30" in text
    assert "eta 0:00:17" in text and "12,346 tok/s" in text
    assert ("lr 9.80e-04" in text) == (width >= 80) and ("reset in 80" in text) == (width == 120)
    assert text.count("validation loss 5.5000") == 1
    assert "grad" not in text  # the line of the log belongs to metrics.jsonl here
    lines = screen(text, width)
    shown = " ".join(" ".join(lines).split())
    # Nothing is written over: each message is there once, whole, above the bar, and broken between words.
    assert shown.count(EVENT + "data rows 51968-52000") == 1
    assert shown.count("step 21 loss spike, loss 5.43 -> 9.1") == 1
    assert COMMAND.replace(" ", "") in "".join(lines).replace(" ", "")
    assert "\x1b[33mstep 20 spike" in text and "\x1b[31mstep 21 loss spike" in text


@needs_terminal
@pytest.mark.parametrize("width, left_out", [(60, "12,346 tok/s"), (80, "reset"), (100, "nothing")])
def test_a_terminal_without_rich_gets_lines_that_fit(width, left_out):
    lines = on_a_terminal(width, rich=False).replace("\r", "").splitlines()
    assert max(len(line) for line in lines if line != COMMAND) <= width and COMMAND in lines
    [line] = [line for line in lines if line.startswith("step  20/120  loss")]
    whole = "step  20/120  loss 5.4322  lr 9.80e-04  grad 1.234  12,346 tok/s  eta 0:00:17  reset in 80"
    assert whole.startswith(line) and line == whole.partition("  " + left_out)[0]
    assert "step 20  validation loss 5.5000  perplexity 244.70  bits per byte 2.1000"[: len(lines[1])] == lines[1]


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for record in (
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "val_loss": 2.5},
        {"step": 3, "loss": float("nan")},
    ):
        first.write(record)
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    again = Metrics(path, last_step=2)
    assert (again.validated, again.last_train) == (2, {"step": 2, "loss": 2.0})
    again.write({"step": 3, "loss": 1.5})
    assert read_metrics(path) == [
        {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}, {"step": 3, "loss": 1.5},
    ]  # fmt: skip


def test_metrics_are_valid_json_even_when_a_number_is_not(tmp_path):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "grad_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null}\n'
