"""Preparing a corpus takes memory for a batch of it, not for the whole."""

import subprocess
import sys

import pytest

from evenstep.data.tokenizer import train_bpe

pytest.importorskip("tokenizers")

# Peak memory of a process that has imported everything, before and after preparing. VmHWM is the peak of resident
# pages; the shards, which prepare writes through files and maps only when opened, count where they are touched.
PROGRAM = """
import sys
import numpy, torch, tokenizers
from evenstep.data import DataSpec, prepare
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
source, cache, tokenizer = sys.argv[1:]
before = peak()
data = prepare(DataSpec(source, tokenizer=tokenizer, vocab_size=None if tokenizer != "bpe" else 2048, cache_dir=cache))
print(peak() - before, data.train.num_bytes + data.val.num_bytes)
"""


def grown(source, cache, tokenizer="bpe"):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    out = subprocess.check_output([sys.executable, "-c", PROGRAM, source, str(cache), tokenizer], text=True)
    return tuple(map(int, out.split()))


def write_text(path, size):
    """Text of ``size`` bytes whose words do not repeat as a whole."""
    with open(path, "w") as file:
        line = 0
        while file.tell() < size:
            for _ in range(1000):
                line += 1
                file.write(
                    f"Line {line} of the chronicle tells of house {line * 7919 % 10007} and its {line % 97} sons.\n"
                )
            file.write("\n")


@pytest.mark.slow
def test_a_larger_file_takes_no_more_memory_than_a_small_one(tmp_path):
    train_bpe(iter(["Line 12 of the chronicle tells of house and its sons."] * 9), 280).save(tmp_path)
    peaks = []
    for size in (1_500_000, 4_500_000):
        write_text(tmp_path / f"{size}.txt", size)
        peak, read = grown(f"text:{tmp_path}/{size}.txt", tmp_path / "c", str(tmp_path))
        assert read >= size
        peaks.append(peak)
    # All of the larger text tokenised at once would add some 200 MB.
    assert peaks[1] - peaks[0] < 40_000_000
    assert peaks[1] < 150_000_000


@pytest.mark.slow
def test_300_megabytes_take_less_memory_than_they_measure_even_with_the_tokenizer_to_train(tmp_path):
    write_text(tmp_path / "large.txt", 300_000_000)
    peak, read = grown(f"text:{tmp_path}/large.txt", tmp_path / "c")
    print(f"peak memory beyond the imports: {peak / 1e6:.0f} MB for {read / 1e6:.0f} MB of text")
    assert read >= 300_000_000
    assert peak < 260_000_000  # the trainer keeps a table of 16 MB of text's words; the rest takes some 80 MB
