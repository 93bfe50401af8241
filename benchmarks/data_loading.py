"""The cost of data: loader time per batch, tokenisation speed, and peak memory of the preparation.

    python benchmarks/data_loading.py [--source stdlib] [--vocab 4096] [--json FILE]

Loader times are medians over many batches of a memory-mapped stream whose pages are in memory, with one thread.
Tokenisation is timed on all cores of the machine, without the training of the tokenizer. Memory is the growth of the
process's peak during the preparation.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from evenstep.data import BatchLoader, DataSpec, PrepareProgress, TokenStream, prepare
from evenstep.errors import EvenstepError


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def time_preparing(source: str, vocab_size: int, cache: str) -> dict[str, object]:
    marks: dict[str, list[float]] = {}

    def note(step: PrepareProgress) -> None:
        marks.setdefault(step.stage, []).append(time.perf_counter())

    before, start = peak_bytes(), time.perf_counter()
    data = prepare(DataSpec(source, vocab_size=vocab_size, cache_dir=cache), note)
    total = time.perf_counter() - start
    # Includes the merges of the BPE training, which follow its last sample.
    tokenising = marks["tokens"][-1] - marks["tokenizer"][-1]
    size = data.train.num_bytes + data.val.num_bytes
    start = time.perf_counter()
    prepare(DataSpec(source, vocab_size=vocab_size, cache_dir=cache))
    return {
        "source": source,
        "vocab_size": vocab_size,
        "prepare_s": round(total, 2),
        "cached_s": round(time.perf_counter() - start, 3),
        "text_mb": round(size / 1e6, 2),
        "train_and_tokenise_mb_per_s": round(size / 1e6 / tokenising, 2),
        "train_tokens": len(data.train),
        "val_tokens": len(data.val),
        "bytes_per_token": round(data.train.num_bytes / len(data.train), 3),
        "peak_growth_mb": round((peak_bytes() - before) / 1e6, 1),
    }


def time_loader(batch_size: int, seq_len: int, tokens: int, batches: int, directory: str) -> dict[str, object]:
    path = Path(directory, f"{tokens}.bin")
    if not path.exists():
        np.random.default_rng(0).integers(0, 4096, tokens, dtype=np.uint16).tofile(path)
    loader = BatchLoader(TokenStream([path], np.dtype("<u2")), seq_len, batch_size)
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        loader.next_batch()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    loader.position = 10**12
    loader.next_batch()
    seek = time.perf_counter() - start
    return {
        "batch": f"{batch_size}x{seq_len}",
        "ms": round(1e3 * statistics.median(times), 3),
        "ms_p99": round(1e3 * sorted(times)[int(0.99 * len(times))], 3),
        "ms_after_seek": round(1e3 * seek, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        rows = [
            time_loader(batch, seq, 20_000_000, 500, directory)
            for batch, seq in ((8, 256), (32, 256), (512, 256), (8, 2048))
        ]
        rows.append(time_preparing(args.source, args.vocab, directory))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        args.json.write_text(json.dumps({"rows": rows, "hardware": hardware}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except EvenstepError as error:
        sys.exit(str(error))
