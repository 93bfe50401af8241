"""Breaks the examples of `fuzz_support` at random: ``python tests/support/fuzz_by_hand.py NAME SECONDS [SEED]``
(NAME all: every one), or guided by coverage with atheris:
``python tests/support/fuzz_by_hand.py --atheris NAME [libFuzzer options]``.

Prints each new kind of failure once, with its input in a file; native code that ends the process leaves its input
behind.
"""

import random
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

GUIDED = __name__ == "__main__" and sys.argv[1:2] == ["--atheris"]
if GUIDED:
    import atheris

with atheris.instrument_imports(include=["evenstep"]) if GUIDED else nullcontext():
    from fuzz_support import TARGETS, broken

    from evenstep.errors import EvenstepError


def attempt(name, place, content):
    """What came out: None when it was read, or refused as it should be, else the failure's place and text."""
    target = TARGETS[name]
    (place / target.file).write_bytes(content)
    try:
        target.read(place)
    except EvenstepError as problem:
        return None if "\n" not in str(problem) else f"EvenstepError of several lines: {problem}"
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(problem.__traceback__)
        ours = [frame for frame in frames if "/evenstep/" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{where} {type(problem).__name__}: {str(problem)[:150]}"
    return None


def campaign(name, seconds, seed=0):
    draw, seen, count, end = random.Random(seed), set(), 0, time.time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        TARGETS[name].prepare(place)
        good = (place / TARGETS[name].file).read_bytes()
        assert attempt(name, place, good) is None, (name, attempt(name, place, good))
        last = Path(tempfile.gettempdir(), f"fuzz-last-{name.replace(' ', '-')}")
        while time.time() < end:
            content = broken(good, draw)
            last.write_bytes(content)
            failure = attempt(name, place, content)
            count += 1
            key = failure and failure.split(":")[0:2]
            if failure and str(key) not in seen:
                seen.add(str(key))
                kept = last.with_name(f"{last.name}-{len(seen)}")
                kept.write_bytes(content)
                print(f"{name}: {failure} ({kept})", flush=True)
        last.unlink()
    print(f"{name}: {count} inputs, {len(seen)} kinds of failure", flush=True)
    return len(seen)


def guided(name, options):
    folder = Path(tempfile.mkdtemp())
    TARGETS[name].prepare(folder)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "good").write_bytes((folder / TARGETS[name].file).read_bytes())

    def once(content):
        failure = attempt(name, folder, content)
        if failure:
            raise AssertionError(failure)

    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], once)
    atheris.Fuzz()


if __name__ == "__main__":
    if GUIDED:
        guided(sys.argv[2], sys.argv[3:])
    else:
        names = list(TARGETS) if sys.argv[1] == "all" else [sys.argv[1]]
        sys.exit(sum(campaign(name, float(sys.argv[2]), *map(int, sys.argv[3:])) for name in names) > 0)
