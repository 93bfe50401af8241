"""CSV files from the data inside installed packages, without a download: weather from pvlib, electricity from simbench.

The files are read directly and neither package is imported: `pip install --no-deps pvlib simbench` is enough.

- weather: a typical meteorological year (TMY3, NREL) of Greensboro, North Carolina, 8760 hours of 10 quantities. Each
  month was measured in a different year. The dates written are those of one year, 2001, and the series has small jumps
  between months.
- electricity: SimBench's load profiles of 2016 of 27 households, businesses and farms, hourly means over 8784 hours.
  Their clock follows summer time; the dates written do not.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from evenstep.errors import EvenstepError

HOUR = timedelta(hours=1)
Prepared = tuple[datetime, list[str], list[list[float]]]

WEATHER = {
    "GHI (W/m^2)": "global_irradiance",
    "DNI (W/m^2)": "direct_irradiance",
    "DHI (W/m^2)": "diffuse_irradiance",
    "TotCld (tenths)": "cloud_cover",
    "Dry-bulb (C)": "temperature",
    "Dew-point (C)": "dew_point",
    "RHum (%)": "humidity",
    "Pressure (mbar)": "pressure",
    "Wspd (m/s)": "wind_speed",
    "Pwat (cm)": "precipitable_water",
}
CONSUMER = re.compile(r"(BL|WB|[GHL]\d)-[A-Z]_pload")
"""Profiles of active power of consumers, as opposed to whole grids, charging points and heat pumps."""


def weather(package: Path) -> Prepared:
    rows = _rows(package / "data" / "723170TYA.CSV", ",")[1:]  # the first line names the station
    header, hours = rows[0], rows[1:]
    where = [header.index(name) for name in WEATHER]
    return datetime(2001, 1, 1), [*WEATHER.values()], [[float(row[i]) for i in where] for row in hours]


def electricity(package: Path) -> Prepared:
    header, *quarters = _rows(package / "networks" / "1-complete_data-mixed-all-0-sw" / "LoadProfile.csv", ";")
    where = [i for i, name in enumerate(header) if CONSUMER.fullmatch(name)]
    values = [[float(row[i]) for i in where] for row in quarters]
    hours = [
        [sum(column) / 4 for column in zip(*values[i : i + 4], strict=True)] for i in range(0, len(values) // 4 * 4, 4)
    ]
    return datetime(2016, 1, 1), [header[i].removesuffix("_pload") for i in where], hours


SOURCES: dict[str, tuple[Callable[[Path], Prepared], str, str]] = {
    "weather": (weather, "pvlib", "a year of hourly weather, from pvlib"),
    "electricity": (electricity, "simbench", "a year of hourly loads, from simbench"),
}
"""Name -> reader, package, description."""


def prepare(source: str, path: Path) -> tuple[int, int]:
    """Write ``source`` to a CSV file and return its numbers of rows and columns. Raises EvenstepError if the package is
    not installed."""
    read, package, _ = SOURCES[source]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EvenstepError(f"{source} comes with {package}, which is not installed; pip install --no-deps {package}")
    try:
        start, columns, values = read(Path(next(iter(spec.submodule_search_locations))))
    except (OSError, ValueError, IndexError) as problem:
        raise EvenstepError(
            f"the files of {source} in the installed {package} have another format ({problem}); install pvlib 0.16 "
            "or simbench 1.6"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        for hour, row in enumerate(values):
            writer.writerow([start + hour * HOUR, *(f"{value:.6g}" for value in row)])
    return len(values), len(columns)


def _rows(path: Path, delimiter: str) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.reader(file, delimiter=delimiter) if row]
