"""Series from a CSV file, the splits of the literature, and the windows that a model forecasts."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenstep.errors import EvenstepError, nearest

MONTH = 30 * 24
SPLITS = {
    "ett-hourly": (12 * MONTH, 4 * MONTH, 4 * MONTH),
    "ett-minute": (48 * MONTH, 16 * MONTH, 16 * MONTH),
    "70/10/20": None,
}
"""Rows of the training, validation and test part (for ETT as in Informer, months of 30 days); None: shares of the
rows."""


@dataclass(frozen=True)
class Series:
    """``values``: float64 [rows, columns]. ``digest``: SHA-256 of the file, shortened."""

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    digest: str


# ---- reading ----


def read_csv(path: Path, columns: tuple[str, ...] = (), *, gaps: str = "refuse") -> Series:
    """Read a CSV file with a column ``date`` (ISO 8601) and numbers in the others, one row per time step, oldest first.

    Args:
        columns: the columns to read, in this order; empty for all.
        gaps: "refuse" requires the same time between all rows. "allow" accepts missing rows, as in the literature's
            weather.csv, but no date before the previous one.

    Raises:
        EvenstepError: with the line number, for a file of any other form.
    """
    try:
        data = path.read_bytes()
        rows = csv.reader(data.decode("utf-8-sig").splitlines())
    except OSError as problem:
        raise EvenstepError(f"{path} cannot be read ({problem.strerror}); give a CSV file with a date column") from None
    except UnicodeDecodeError:
        raise EvenstepError(f"{path} is not UTF-8 text; give a CSV file with a date column") from None
    header = [name.strip() for name in next(rows, [])]
    date, taken = _chosen(path, header, columns)
    times: list[datetime] = []
    values: list[list[float]] = []
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) != len(header):
            raise EvenstepError(
                f"{path} line {line}: {len(row)} cells, but the header has {len(header)}; correct the line"
            )
        times.append(_time(path, line, row[date]))
        _check_order(path, line, times, gaps)
        values.append([_number(path, line, header[i], row[i]) for i in taken])
    if len(values) < 2:
        raise EvenstepError(f"{path} has {len(values)} rows; a series needs at least 2")
    names = tuple(header[i] for i in taken)
    return Series(path.stem, names, np.array(values), hashlib.sha256(data).hexdigest()[:16])


def _chosen(path: Path, header: list[str], columns: tuple[str, ...]) -> tuple[int, list[int]]:
    """Index of the date column, and indices of the columns to read."""
    if "date" not in header:
        shown = ", ".join(header[:8]) or "nothing"
        raise EvenstepError(f"{path} line 1: no column 'date' (available: {shown}); rename the column of the dates")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise EvenstepError(f"{path} line 1: two columns are named '{twice}'; rename one")
    others = [name for name in header if name != "date"]
    for name in columns:
        if name not in others:
            raise EvenstepError(
                f"data.columns: {path} has no column '{name}'{nearest(name, others)} (available: {', '.join(others)})"
            )
    if not others:
        raise EvenstepError(f"{path} line 1: no column besides 'date'; a series needs at least one")
    return header.index("date"), [header.index(name) for name in columns or others]


def _time(path: Path, line: int, cell: str) -> datetime:
    try:
        return datetime.fromisoformat(cell.strip())
    except ValueError:
        raise EvenstepError(
            f"{path} line {line}: '{cell}' is not a date; write it as 2016-07-01 13:00:00 (ISO 8601)"
        ) from None


def _check_order(path: Path, line: int, times: list[datetime], gaps: str) -> None:
    if len(times) < 2:
        return
    try:
        step, first = times[-1] - times[-2], times[1] - times[0]
    except TypeError:
        raise EvenstepError(
            f"{path} line {line}: only some dates have a time zone; give one to all dates or to none"
        ) from None
    if step < timedelta(0) or (gaps == "refuse" and not step):
        raise EvenstepError(f"{path} line {line}: {times[-1]} does not come after {times[-2]}; sort the rows by date")
    if gaps == "refuse" and step != first:
        raise EvenstepError(
            f"{path} line {line}: {times[-1]} is {step} after the previous row, but the first two are {first} apart; "
            'fill the gap, or set data.gaps = "allow"'
        )


def _number(path: Path, line: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        what = f"'{cell.strip()}' is not a finite number" if cell.strip() else "the cell is empty"
        raise EvenstepError(
            f"{path} line {line}, column '{column}': {what}; fill the gap, or leave the column out of data.columns"
        )
    return value


# ---- parts and windows ----


@dataclass(frozen=True)
class Windows:
    """The windows of a part: every ``lookback`` rows of inputs with the ``horizon`` rows after them as targets.

    ``rows``, float32 [rows, channels], begins ``lookback`` rows before the part itself (except for the training part),
    so that each row of a validation or test part is forecast.
    """

    rows: Tensor
    lookback: int
    horizon: int

    def __len__(self) -> int:
        return max(0, len(self.rows) - self.lookback - self.horizon + 1)

    def at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [n, lookback, channels] and targets [n, horizon, channels] of the windows at ``starts``, int64 [n]."""
        windows = self.rows.unfold(0, self.lookback + self.horizon, 1)[starts].transpose(1, 2)
        return windows[:, : self.lookback], windows[:, self.lookback :]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All windows in order, each once; the last batch may be smaller and is not dropped."""
        for starts in torch.arange(len(self)).split(size):
            yield self.at(starts)

    def to(self, device: torch.device) -> Windows:
        return Windows(self.rows.to(device), self.lookback, self.horizon)


@dataclass(frozen=True)
class Parts:
    train: Windows
    val: Windows
    test: Windows


def split(series: Series, how: str, lookback: int, horizon: int) -> Parts:
    """Split ``series`` into parts, each column standardised by its mean and standard deviation in the training part.

    Raises:
        EvenstepError: if a part has no window.
    """
    rows = len(series.values)
    sizes = SPLITS[how] or _shares(rows)
    if sum(sizes) > rows:
        raise EvenstepError(f"{series.name} has {rows} rows and the split {how} takes {sum(sizes)}; use 70/10/20")
    train = series.values[: sizes[0]]
    deviation = train.std(0)
    scaled = (series.values - train.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    starts = (0, sizes[0] - lookback, sizes[0] + sizes[1] - lookback)
    ends = (sizes[0], sizes[0] + sizes[1], sum(sizes))
    parts = [
        Windows(torch.from_numpy(scaled[max(0, start) : end].astype(np.float32)), lookback, horizon)
        for start, end in zip(starts, ends, strict=True)
    ]
    for name, part, need in zip(
        ("training", "validation", "test"), parts, (lookback + horizon, horizon, horizon), strict=True
    ):
        if not len(part):
            raise EvenstepError(
                f"{series.name}: the {name} part of {rows} rows split {how} has fewer than {need} rows, which a "
                f"lookback of {lookback} and a horizon of {horizon} need; choose a shorter one or more data"
            )
    return Parts(*parts)


def _shares(rows: int) -> tuple[int, int, int]:
    train, test = rows * 7 // 10, rows * 2 // 10
    return train, rows - train - test, test


def corrupted(inputs: Tensor, share: float, severity: float, generator: torch.Generator | None = None) -> Tensor:
    """A copy of ``inputs`` with N(0, severity * max(inputs)) added to each value with probability ``share``.

    This is the rule of arXiv:2502.17055, Figure 9. The paper does not say over which values the maximum is taken, nor
    whether the second argument is a variance: here it is the maximum of the batch, and a standard deviation.
    """
    hit = torch.rand(inputs.shape, generator=generator, device=inputs.device) < share
    noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
    return inputs + hit * noise * (severity * inputs.max())
