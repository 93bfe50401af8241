import math

import pytest

from evenstep.train.config import ScheduleConfig
from evenstep.train.optimizers import lr_factor


def factors(total, warmup, **options):
    schedule = ScheduleConfig(**options)
    return [lr_factor(schedule, step, total, warmup) for step in range(1, total + 1)]


def test_warm_up_is_linear_from_the_first_step_to_the_full_rate():
    for name in ("cosine", "wsd", "constant"):
        assert factors(100, 4, name=name)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_values():
    got = factors(10, 2, name="cosine", min_lr_ratio=0.1)
    assert got[2] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 8)) / 2, rel=1e-15)
    assert got[5] == pytest.approx(0.55, rel=1e-15)  # half way between 1 and 0.1
    assert got[9] == 0.1


def test_wsd_is_flat_then_linear_to_the_minimum():
    got = factors(20, 2, name="wsd", min_lr_ratio=0.2, decay_fraction=0.25)
    assert got[2:15] == [1.0] * 13
    assert got[15:] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2], rel=1e-12)


def test_wsd_decay_never_reaches_into_the_warm_up():
    got = factors(10, 4, name="wsd", min_lr_ratio=0.0, decay_fraction=1.0)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_constant_stays_and_steps_beyond_the_end_keep_the_last_value():
    assert set(factors(9, 0, name="constant")) == {1.0}
    assert lr_factor(ScheduleConfig(name="cosine", min_lr_ratio=0.3), 50, 10, 2) == pytest.approx(0.3, rel=1e-15)
