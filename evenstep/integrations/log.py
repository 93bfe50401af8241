"""metrics.jsonl of a trainer that is not ours: opened anew, or cut where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evenstep.telemetry.schema import read_records, to_line
from evenstep.telemetry.sinks import JsonlSink, Record, Sink
from evenstep.train.files import replace_text
from evenstep.train.metrics import up_to


def open_log(path: Path, step: int) -> JsonlSink:
    """A sink that appends to ``path``, which a run that starts at ``step`` owns: at step 0 an older file goes; later
    its lines up to that step stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = up_to(step, read_records(path)) if step else []
        replace_text(path, "".join(to_line(record) for record in kept))
    return JsonlSink(path)


def write_line(sinks: Iterable[Sink], step: int, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """A line of training or validation: of ``values`` those that ``names`` gives a name of ours, if there are any."""
    found = {ours: float(values[theirs]) for theirs, ours in names.items() if values.get(theirs) is not None}
    if found:
        for sink in sinks:
            sink.write({"step": step, **found})


class Tally:
    """A sink that counts: spikes since `take` was last called, and the newest spike rate."""

    def __init__(self) -> None:
        self.spikes, self.spike_rate = 0, 0.0

    def write(self, record: Record) -> None:
        self.spikes += record.get("event") == "spike"
        if record.get("kind") == "window":
            self.spike_rate = record["spike_rate"]

    def close(self) -> None:
        """Nothing is held."""

    def take(self) -> dict[str, float]:
        found = {"spikes": float(self.spikes), "spike_rate": float(self.spike_rate)}
        self.spikes = 0
        return found
