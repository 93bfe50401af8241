"""Order and batches: what a run reads, at any position, on any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenstep.data import BatchLoader, TokenStream, eval_batches
from evenstep.data.loader import Permutation
from evenstep.errors import EvenstepError

GOLDEN = [108, 817, 231, 562, 378, 297, 290, 807]
GOLDEN_WIDE = [721569386005, 423644075397, 595208777258]


def stream_of(directory, count, shard=1000, dtype="<u4"):
    """Token k of the stream is the number k, so that every batch shows where it came from."""
    files = []
    for start in range(0, count, shard):
        files.append(directory / f"{count}-{shard}-{start}.bin")
        np.arange(start, min(start + shard, count), dtype=dtype).tofile(files[-1])
    return TokenStream(files, np.dtype(dtype), name="train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_permutation(n, seed, epoch):
    order = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


def test_every_window_is_as_likely_as_any_other_to_come_first():
    n, draws = 13, 3000
    first = np.bincount([int(Permutation(n, seed, 0)(np.array([0]))[0]) for seed in range(draws)], minlength=n)
    chi_square = float((((first - draws / n) ** 2) / (draws / n)).sum())
    assert chi_square < 32.9  # 12 degrees of freedom, p = 0.001


def test_neighbours_in_the_stream_are_not_neighbours_in_the_order():
    order = Permutation(100_000, 0, 0)(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


def test_the_order_of_a_seed_never_changes():
    """A checkpoint stores a position: if these numbers change, every old run resumes in another order."""
    assert Permutation(1000, 0, 0)(np.arange(8)).tolist() == GOLDEN
    assert Permutation(2**40 - 3, 7, 5)(np.array([0, 1, 2**39])).tolist() == GOLDEN_WIDE


def test_targets_are_the_inputs_one_token_later(folder):
    inputs, targets = BatchLoader(stream_of(folder, 2001), seq_len=20, batch_size=4).next_batch()
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 20)
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)  # token k is the number k
    assert torch.equal(inputs - inputs[:, :1], torch.arange(20).expand(4, 20))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_serves_each_window_once_whatever_the_world_size(folder, world_size):
    stream = stream_of(folder, 1201)  # 120 windows of 10, across a shard's end
    loaders = [BatchLoader(stream, 10, 12, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [torch.cat([loader.next_batch()[0] for loader in loaders]) for _ in range(10)]
    alone = BatchLoader(stream, 10, 12, seed=3)
    for batch in together:
        assert torch.equal(batch, alone.next_batch()[0])
    assert sorted(torch.cat(together)[:, 0].tolist()) == list(range(0, 1200, 10))
    assert all(loader.position == 120 for loader in loaders)


@given(position=st.integers(0, 500), steps=st.integers(0, 12), batch=st.sampled_from([1, 3, 6]))
@settings(max_examples=40, deadline=None)
def test_seeking_equals_having_read_up_to_there(folder, position, steps, batch):
    stream = stream_of(folder, 401)
    reading = BatchLoader(stream, 8, batch, seed=1, position=position)
    for _ in range(steps):
        reading.next_batch()
    seeking = BatchLoader(stream, 8, batch, seed=1)
    seeking.position = position + steps * batch
    assert reading.position == seeking.position
    assert all(torch.equal(a, b) for a, b in zip(reading.next_batch(), seeking.next_batch(), strict=True))


def test_sequence_ids_name_what_was_served_across_epochs(folder):
    loader = BatchLoader(stream_of(folder, 401), 8, 7, seed=1)  # 50 windows: the 8th batch spans two epochs
    ids = loader.sequence_ids(0, 28 * 7)
    served = torch.cat([loader.next_batch()[0][:, 0] // 8 for _ in range(28)])
    assert served.tolist() == ids.tolist()
    assert sorted(ids[:50]) == sorted(ids[50:100]) == list(range(50))
    assert ids[:50].tolist() != ids[50:100].tolist()
    assert loader.position == 28 * 7 and loader.sequences_per_epoch == 50
    assert loader.sequence_ids(5, 5).tolist() == []


def test_the_seed_decides_the_order(folder):
    def order(seed):
        return BatchLoader(stream_of(folder, 2001), 10, 4, seed=seed).sequence_ids(0, 200).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2) and sorted(order(1)) == sorted(order(2))


@given(
    count=st.integers(2, 260),
    seq_len=st.integers(1, 30),
    batch=st.integers(1, 5),
    limit=st.none() | st.integers(1, 300),
)
@settings(max_examples=80, deadline=None)
def test_evaluation_predicts_each_token_once_in_order(folder, count, seq_len, batch, limit):
    pairs = list(eval_batches(stream_of(folder, count, shard=50), seq_len, batch, limit))
    wanted = list(range(1, count))[:limit]
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == wanted
    for inputs, targets in pairs:
        assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape[0] <= batch and inputs.shape[1] <= seq_len
        assert torch.equal(targets, inputs + 1)


@given(cuts=st.tuples(st.integers(0, 130), st.integers(0, 130)), shard=st.sampled_from([1, 7, 64, 1000]))
@settings(max_examples=60, deadline=None)
def test_reading_does_not_see_where_shards_end(folder, cuts, shard):
    stream = stream_of(folder, 130, shard=shard, dtype="<u2")
    start, stop = sorted(cuts)
    assert stream.read(start, stop).tolist() == list(range(start, stop))
    assert stream.read(start, stop).dtype == np.uint16 and len(stream) == 130


def test_reading_outside_the_stream_is_refused(folder):
    stream = stream_of(folder, 130)
    for start, stop in ((-1, 5), (0, 131), (6, 5)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"world_size": 3}, "batch_size 8 is not divisible by world_size 3"),
        ({"rank": 2, "world_size": 2}, "rank is 2; allowed is 0 to 1"),
        ({"batch_size": 50}, "the train split has 401 tokens; one batch of 50 x 10 needs 501"),
        ({"seq_len": 500, "batch_size": 1}, "one batch of 1 x 500 needs 501"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"position": -1}, "position is -1"),
    ],
)
def test_a_loader_that_cannot_work_says_why(folder, change, says):
    with pytest.raises(EvenstepError, match=says) as error:
        BatchLoader(stream_of(folder, 401), **({"seq_len": 10, "batch_size": 8} | change))
    assert "\n" not in str(error.value)


def test_the_smallest_corpus_that_fills_a_batch_is_enough(folder):
    assert BatchLoader(stream_of(folder, 81), 10, 8).next_batch()[0].shape == (8, 10)
    with pytest.raises(EvenstepError, match="has 80 tokens"):
        BatchLoader(stream_of(folder, 80), 10, 8)


def test_nothing_to_evaluate_is_said_before_the_first_batch(folder):
    with pytest.raises(EvenstepError, match="too few to evaluate"):
        eval_batches(stream_of(folder, 0), 10, 8)
    with pytest.raises(EvenstepError, match="max_tokens is 0"):
        eval_batches(stream_of(folder, 50), 10, 8, max_tokens=0)


def test_a_randomised_batch_is_the_same_for_any_number_of_ranks_and_after_a_seek(folder):
    def batch(number, rank=0, world_size=1):
        loader = BatchLoader(stream_of(folder, 2001), 20, 4, 3, rank, world_size, position=4 * (number - 1))
        loader.randomise(2, vocab_size=50)
        return loader.next_batch()

    plain = [BatchLoader(stream_of(folder, 2001), 20, 4, 3, position=4 * i).next_batch() for i in range(3)]
    assert all(torch.equal(batch(number)[0], plain[number - 1][0]) for number in (1, 3))
    inputs, targets = batch(2)
    assert int(inputs.max()) < 50 and len(inputs.unique()) > 30 and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(torch.cat([batch(2, rank, 2)[0] for rank in (0, 1)]), inputs)
