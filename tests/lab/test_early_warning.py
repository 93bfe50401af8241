"""The study of early warnings: a miniature, and one seed of the real one."""

import pytest
from train_support import write_corpus

from evenstep.data import DataSpec
from lab.early_warning import AHEAD, SLOW, Result, Setting, passed, rise, study


def test_a_rise_is_a_mean_above_the_lowest_so_far():
    falling = [5.0 - 0.01 * i for i in range(200)]
    assert rise(Result(losses=falling), SLOW) is None
    moved = rise(Result(losses=[*falling, *[4.0] * 60]), SLOW)
    assert moved is not None and 200 < moved < 260


def test_a_miniature_has_a_row_of_numbers(tmp_path):
    corpus = DataSpec(source=f"text:{write_corpus(tmp_path / 'c.jsonl')}", vocab_size=300, cache_dir=str(tmp_path))
    shape = {"warmup": 2, "batch_size": 2, "seq_len": 16, "activations": 1}
    raised = Setting(steps=25, start=8, ramp=5, factor=1000.0, **shape)
    (row,) = study([0], Setting(steps=25, **shape), raised, corpus)
    assert not row["calm_warnings"] and row["warning"] is not None and 8 < row["warning"] <= 25
    assert passed(row | {"rise": row["warning"] + AHEAD}) and not passed(row | {"rise": row["warning"] + AHEAD - 1})


@pytest.mark.slow
def test_the_warning_comes_before_the_loss_moves():
    corpus = DataSpec(source="kjv", vocab_size=2048)
    (row,) = study([0], Setting(steps=200), Setting(steps=400, factor=1000.0), corpus)
    assert passed(row) and row["warning"] <= 350 and row["rise"] is None  # the loss rises at 483
