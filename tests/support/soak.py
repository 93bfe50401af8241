"""Kills, stops and spoils a run of two processes for as long as one likes: ``make soak``.

    python tests/support/soak.py [--minutes 20] [--seed 0] [--only kill_in_save] [--json FILE]

A run of 40 steps on two processes (FSDP, Stable-SPAM, fp32, gloo) is taken up again and again, each time with another
fault of tests/support/faults.py. When it has reached its end, its losses must be those of a run that nothing happened
to, bit for bit, and a new one begins. Half of the rounds are a kill -9 of everything while a checkpoint is
being written.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults import FAULTS, OPTIONS, all_whole, job, newest
from parallel_support import ROOT, by_step
from train_support import write_corpus

NEED_TWO = ("flip_a_byte", "lose_a_shard")
"""Faults that spoil the newest of two checkpoints."""


def whole(corpus: Path, out: Path) -> dict[int, float]:
    with job(corpus, out) as running:
        assert running.end() == 0, running.said()[-3000:]
    return by_step(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="how long (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order of faults (default: 0)")
    alone = [name for name in FAULTS if name not in NEED_TWO]
    parser.add_argument("--only", choices=alone, help="this fault again and again (default: all, by chance)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    place = Path(tempfile.mkdtemp(prefix="evenstep-soak-"))
    corpus = write_corpus(place / "corpus.jsonl")
    began = time.monotonic()
    expected = whole(corpus, place / "whole")
    survived: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    runs, out = 0, place / "run-0"
    while time.monotonic() - began < args.minutes * 60:
        if newest(out) >= int(OPTIONS["train__steps"]) - 12:
            finish(corpus, out, expected)
            runs += 1
            out = place / f"run-{runs}"
        saved = len(list((out / "checkpoints").glob("step-*"))) if out.exists() else 0
        names = [args.only] if args.only else ["kill_in_save"] * 6 + list(FAULTS)
        name = draw.choice([name for name in names if saved >= 2 or name not in NEED_TWO])
        try:
            steps = FAULTS[name](corpus, out, draw)
        except AssertionError:
            print(f"{name} was not survived; the run is in {out}", flush=True)
            raise
        survived[name] += 1
        lost[name] += steps
        minutes = (time.monotonic() - began) / 60
        print(f"{minutes:5.1f} min  run {runs}  {name}: {steps} steps lost, saved {newest(out)}", flush=True)
    finish(corpus, out, expected)
    runs += 1
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "commit": commit.stdout.strip(),
        "seed": args.seed,
        "faults": {name: {"survived": survived[name], "steps_lost": lost[name]} for name in FAULTS},
        "faults_survived": sum(survived.values()),
        "steps_lost": sum(lost.values()),
        "checkpoint_every": int(OPTIONS["checkpoint__every"]),
        "runs_with_the_losses_of_an_undisturbed_one": runs,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(place)


def finish(corpus: Path, out: Path, expected: dict[int, float]) -> None:
    """Let the run come to its end, and compare."""
    with job(corpus, out) as running:
        assert running.end() == 0, running.said()[-3000:]
    all_whole(out)
    found = by_step(out)
    assert found == expected, [(step, found.get(step), expected[step]) for step in expected][:99]


if __name__ == "__main__":
    sys.exit(main())
