"""Tests and measurements on a new GPU: one command, ten minutes, no network.

    python benchmarks/gpu.py --out DIR [--budget 540]
    python benchmarks/gpu.py --out DIR --device cpu --smoke     # every part in miniature, to test this script

It needs a checkout (no installation, no compiled kernels), torch with triton, numpy, tokenizers, safetensors, pytest
and hypothesis. DIR/results.json and DIR/summary.md are rewritten after every part, so an interrupted run keeps its
measurements; DIR/logs has the output of each part. docs/gpu.md explains the numbers.

The parts (gpu_parts.py) run one after the other, the most valuable first, each in its own process group with a time
limit: its share of the remaining budget. A part that hangs is killed, a part that fails is recorded, a part for which
too little time is left is skipped, and the others go on. The exit status is 0 if every part passed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """``share``: its usual seconds, which divide the budget. ``least``: it is skipped with fewer seconds left."""

    name: str
    share: float
    least: float


PARTS = (
    Part("machine", 30, 10),
    Part("tests", 150, 40),
    Part("steps-60m-bf16", 50, 25),
    Part("train-60m", 60, 30),
    Part("steps-1b-bf16", 60, 30),
    Part("lowbit", 70, 30),
    Part("steps-60m-fp32", 40, 20),
    Part("train-130m", 50, 30),
    Part("steps-1b-fp32", 50, 30),
    Part("stability", 60, 40),
)
SMOKE_LEAST = 5.0  # seconds: a part in miniature
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
ERROR_LINES = 15
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal requested the end. Not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Session:
    """``run()`` runs the parts and returns whether all passed; ``document`` is the contents of results.json.

    ``command(part, rows)`` is the command of a part. Its process appends one JSON object per line to the file ``rows``
    as it measures, each with a ``name``, and with an ``error`` if something went wrong. A part passes if its process
    exits with 0.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        parts: Sequence[Part],
        command: Callable[[Part, Path], Sequence[str]],
        say: Callable[[str], object] = print,
        **facts: Any,
    ) -> None:
        self.out, self.budget, self.parts, self.command, self.say = out, budget, parts, command, say
        self.began = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.document: Record = {
            **facts,
            "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "budget": budget,
            "finished": False,
            "parts": {part.name: {"status": "waiting", "rows": []} for part in parts},
        }
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        self.write()
        try:
            for index, part in enumerate(self.parts):
                left = self.budget - (time.monotonic() - self.began)
                if left < part.least:
                    reason = f"{max(0.0, left):.0f} s of the budget were left, and it needs {part.least:.0f}"
                    self._record(part, "skipped", reason=reason)
                    continue
                ahead = sum(other.share for other in self.parts[index:])
                self._run(part, min(left, max(part.least, left * part.share / ahead)))
        except Stopped as stop:
            for part in self.parts:
                if self.document["parts"][part.name]["status"] == "waiting":
                    self._record(part, "skipped", reason=f"stopped by {stop}")
            raise
        self.document["finished"] = True
        self.write()
        return all(record["status"] == "passed" for record in self.document["parts"].values())

    def _run(self, part: Part, limit: float) -> None:
        """Run a part and record it as passed, failed, or cut at its limit. Stopped is raised after the record."""
        rows, log = self.out / "logs" / f"{part.name}.jsonl", self.out / "logs" / f"{part.name}.log"
        rows.unlink(missing_ok=True)
        self.say(f"{part.name}: at most {limit:.0f} s")
        began, status, reason = time.monotonic(), "failed", ""
        try:
            with log.open("wb") as stream:
                self.process = subprocess.Popen(
                    self.command(part, rows),
                    stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                    start_new_session=True, env=environment(), cwd=ROOT,
                )  # fmt: skip
            code = self.process.wait(limit)
            status, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, reason = "cut", f"not done after {limit:.0f} s"
        except OSError as problem:
            reason = f"could not be started: {problem}"
        except Stopped as stop:
            status, reason = "cut", f"stopped by {stop}"
            raise
        finally:
            self._end()
            facts: Record = {"seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1)}
            facts |= {"rows": read_rows(rows), "reason": reason}
            if status != "passed":
                facts["last_lines"] = last_lines(log)
            self._record(part, status, **facts)

    def _end(self) -> None:
        """End all processes of the part: its group gets SIGTERM, then SIGKILL."""
        process, self.process = self.process, None
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 30.0)):
            with suppress(ProcessLookupError, PermissionError):  # the group is empty
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)

    def _record(self, part: Part, status: str, **facts: Any) -> None:
        record = self.document["parts"][part.name]
        record |= {"status": status} | {key: value for key, value in facts.items() if value not in ("", None)}
        self.say(f"{part.name}: {status}{': ' + facts['reason'] if facts.get('reason') else ''}")
        self.write()

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.began, 1)
        replace(self.out / "results.json", json.dumps(self.document, indent=1) + "\n")
        replace(self.out / "summary.md", summary(self.document))


def replace(path: Path, text: str) -> None:
    """Write a file atomically: at any moment it has either the old or the new content."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def read_rows(path: Path) -> list[Record]:
    """The rows that a part has written; an incomplete last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def last_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line[:500] for line in lines if line.strip()][-ERROR_LINES:]


def environment() -> dict[str, str]:
    """The environment of a part, whose modules come from this checkout."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


# ---- the summary ----

STEP_COLUMNS = {
    "ms": "ms",
    "ratio": "/ AdamW",
    "graph_ms": "graph ms",
    "graph_ratio": "/ AdamW",
    "floor_ms": "floor ms",
    "host_ms": "host ms",
    "kernels": "kernels",
    "copies": "copies",
    "syncs": "syncs",
    "state_bytes_per_param": "state B/param",
}
TRAIN_COLUMNS = {
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "ms": "ms",
    "host_ms": "host ms",
    "peak_gb": "peak GB",
    "syncs": "syncs",
    "first_step_s": "first step s",
}
LOWBIT_COLUMNS = {"ms": "ms", "ratio": "/ plain", "peak_gb": "peak GB", "product": "product"}
COLUMNS = {"steps": STEP_COLUMNS, "train": TRAIN_COLUMNS, "lowbit": LOWBIT_COLUMNS}


def summary(document: Record) -> str:
    """The page of Markdown for results.json."""
    lines = ["# evenstep on this device", ""]
    for row in document["parts"].get("machine", {}).get("rows", []):
        lines += [f"- {key}: {shown(value)}" for key, value in row.items() if key != "name"]
    lines += ["", *table("part", {"status": "status", "seconds": "s", "reason": "why"}, overview(document))]
    for name, record in document["parts"].items():
        rows = record["rows"]
        if name == "tests" and rows:
            counts = {o: sum(row["outcome"] == o for row in rows) for o in ("passed", "failed", "skipped")}
            lines += ["", "## tests", "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items())]
        elif columns := COLUMNS.get(name.partition("-")[0]):
            lines += ["", f"## {name}", "", *table("", columns, rows)] if rows else []
        problems = [f"- {row['name']}: {row['error']}" for row in rows if row.get("error")]
        lines += ["", f"Problems in {name}:", "", *problems] if problems else []
        if record["status"] in ("failed", "cut") and not problems and record.get("last_lines"):
            lines += ["", f"The last lines of {name}:", "", *(f"    {line}" for line in record["last_lines"])]
    return "\n".join(lines) + "\n"


def overview(document: Record) -> list[Record]:
    return [{"name": name, **record} for name, record in document["parts"].items()]


def table(first: str, columns: dict[str, str], rows: Sequence[Record]) -> list[str]:
    """A Markdown table whose columns are aligned in the source."""
    cells = [[first, *columns.values()]]
    cells += [[str(row["name"]), *(shown(row.get(key)) for key in columns)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


# ---- the command ----


@contextmanager
def stopping() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stopped, once, unless they are ignored (nohup)."""

    def stop(number: int, _: Any) -> None:
        for other in STOPS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json, summary.md and logs")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="every part in miniature, to test the script")
    parser.add_argument("--only", metavar="PARTS", help=f"separated by commas: {', '.join(p.name for p in PARTS)}")
    args = parser.parse_args()
    wanted = [name.strip() for name in args.only.split(",")] if args.only else [part.name for part in PARTS]
    if unknown := set(wanted) - {part.name for part in PARTS}:
        parser.error(f"--only: unknown part {sorted(unknown)[0]!r}; choose from {', '.join(p.name for p in PARTS)}")
    if not args.budget > 0:
        parser.error(f"--budget: {args.budget:g} is out of range; give seconds above 0")
    parts = [part for part in PARTS if part.name in wanted]
    if args.smoke:
        parts = [Part(part.name, part.share, SMOKE_LEAST) for part in parts]

    def command(part: Part, rows: Path) -> list[str]:
        options = ["--device", args.device, *(["--smoke"] if args.smoke else [])]
        return [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), part.name, str(rows.resolve()), *options]

    session = Session(args.out, args.budget, parts, command, say=_say, device=args.device, smoke=args.smoke)
    try:
        with stopping():
            passed = session.run()
    except Stopped as stop:
        _say(f"stopped by {stop}; what was measured is in {args.out}")
        return 128 + stop.number
    with suppress(BrokenPipeError):
        print("\n" + summary(session.document) + f"\n{args.out / 'results.json'}", flush=True)
    return 0 if passed else 1


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
