"""Many series at once, on the host: running means, and numbers short enough to write."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class Rolling:
    """Mean and standard deviation of the newest ``size`` values of ``k`` series, a missing value (NaN) left out."""

    def __init__(self, k: int, size: int) -> None:
        self.values = np.full((size, k), np.nan)
        self.at = 0
        self._sum()

    def _sum(self) -> None:
        self.count = np.isfinite(self.values).sum(0).astype(float)
        self.sum, self.squares = np.nansum(self.values, 0), np.nansum(self.values**2, 0)

    def push(self, values: Vector) -> None:
        """The newest value of each series, ``[k]``, in the place of the oldest."""
        old = self.values[self.at]
        for vector, sign in ((old, -1.0), (values, 1.0)):
            there = np.isfinite(vector)
            known = np.where(there, vector, 0.0)
            self.count += sign * there
            self.sum += sign * known
            self.squares += sign * known * known
        self.values[self.at] = values
        self.at = (self.at + 1) % len(self.values)
        if self.at == 0:  # sums that are added to and taken from for ever would drift
            self._sum()

    def mean(self) -> Vector:
        """``[k]``, NaN for a series without values."""
        return np.divide(self.sum, self.count, out=np.full_like(self.sum, np.nan), where=self.count > 0)

    def deviation(self) -> Vector:
        """Standard deviation ``[k]``, NaN for a series without values."""
        mean = self.mean()
        squares = np.divide(self.squares, self.count, out=np.full_like(self.sum, np.nan), where=self.count > 0)
        return np.sqrt(np.maximum(squares - mean * mean, 0.0))

    def state(self) -> dict[str, Any]:
        return {"values": self.values.copy(), "at": self.at, "sums": np.stack([self.count, self.sum, self.squares])}

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave; of another size it starts anew."""
        if state["values"].shape != self.values.shape:
            return
        self.values[:] = state["values"]
        self.at = int(state["at"])
        self.count, self.sum, self.squares = np.array(state["sums"])


def digits(values: Any) -> list[float | None]:
    """Numbers with four significant digits, as JSON has them: None for what is not finite."""
    x = np.asarray(values, dtype=np.float64)
    there = np.isfinite(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.clip(3 - np.floor(np.log10(np.abs(np.where(there & (x != 0), x, 1.0)))), -300, 300)
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)  # powers of ten are exact up to 22
    short = np.round(np.where(there, x, 0.0) * up / down) / up * down
    return [value if known else None for value, known in zip(short.tolist(), there.tolist(), strict=True)]
