import gc
import itertools
import statistics

import pytest

from evenstep.bench import timing
from evenstep.bench.timing import Sample, Turns, busy_processors, cpu_timer, paired_ratio, spread, take_turns


class Clock:
    """A timer whose steps take what they say, times how slow the machine is in that round."""

    def __init__(self, slowness=lambda round_: 1.0):
        self.slowness = slowness
        self.round = 0

    def __call__(self, step):
        return Sample(step() * self.slowness(self.round), 0.5)

    def on_round(self, round_):
        self.round = round_


def player(name, seconds, turns, **more):
    return Turns(name, lambda: seconds, turns, **more)


def test_ratios_are_of_the_same_round_so_a_slow_machine_does_not_move_them():
    clock = Clock(slowness=lambda round_: 1 + 10 * (round_ % 3 == 0))
    reference = player("reference", 2.0, 30, before=clock.on_round)
    other = player("other", 3.0, 7, before=clock.on_round)
    take_turns([reference, other], 30, clock)
    assert paired_ratio(other.samples, reference.samples) == pytest.approx((1.5, 1.5, 1.5))
    assert len(reference.samples) == 30 and max(s.wall for s in reference.samples.values()) == 22.0


def test_ratio_is_the_median_over_common_rounds_and_none_without_any():
    reference = {r: Sample(1.0, 0) for r in range(5)}
    other = {0: Sample(1.0, 0), 2: Sample(9.0, 0), 4: Sample(2.0, 0), 7: Sample(100.0, 0)}
    ratio = paired_ratio(other, reference)
    assert ratio == spread([1.0, 9.0, 2.0]) and ratio.median == 2.0
    assert paired_ratio({9: Sample(1.0, 0)}, reference) is None


def test_spread_has_the_median_and_the_quartiles():
    assert spread([5.0]) == (5, 5, 5)
    values = [4.0, 1.0, 3.0, 2.0, 100.0]
    assert spread(values) == (2.0, 3.0, 4.0) and spread(values).median == statistics.median(values)


@pytest.mark.parametrize("turns", [1, 3, 7, 24, 25])
def test_turns_are_spread_evenly_over_the_rounds(turns):
    slow = player("slow", 1.0, turns)
    take_turns([player("reference", 1.0, 25), slow], 25, Clock())
    rounds = sorted(slow.samples)
    assert len(rounds) == turns
    gaps = [b - a for a, b in itertools.pairwise(rounds)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_each_round_has_everyone_once_in_an_order_that_changes():
    order = []
    players = [Turns(name, lambda name=name: order.append(name) or 1.0, 20) for name in "abcd"]
    take_turns(players, 20, Clock(), seed=3)
    rounds = ["".join(order[i : i + 4]) for i in range(0, 80, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > 8 and {names[0] for names in rounds} == set("abcd")


def test_one_that_fails_is_out_and_the_others_go_on():
    def fails():
        raise RuntimeError("too much")

    bad, good = Turns("bad", fails, 10), player("good", 1.0, 10)
    take_turns([bad, good], 10, Clock())
    assert str(bad.problem) == "too much" and not bad.samples
    assert good.problem is None and len(good.samples) == 10


def test_what_comes_before_and_after_a_step_gets_the_round_and_is_not_timed():
    calls = []
    one = Turns("one", lambda: calls.append("step"), 2, before=lambda r: calls.append(("before", r)))
    one.after = lambda r: calls.append(("after", r))
    take_turns([one], 2, lambda step: (step(), Sample(1.0, 0))[1])
    assert calls == [("before", 0), "step", ("after", 0), ("before", 1), "step", ("after", 1)]


def test_the_garbage_collector_is_off_while_steps_are_timed_and_on_afterwards():
    seen = []
    take_turns([Turns("one", lambda: seen.append(gc.isenabled()) or 1.0, 3)], 3, Clock())
    assert seen == [False] * 3 and gc.isenabled() and gc.get_freeze_count() == 0


def test_cpu_timer_tells_work_from_waiting():
    import time

    # Threads that other tests left behind may use the processor meanwhile, but not always.
    asleep = min((cpu_timer(lambda: time.sleep(0.05)) for _ in range(5)), key=lambda one: one.cpu)
    assert asleep.wall >= 0.05 > 0.04 > asleep.cpu
    busy = min((cpu_timer(lambda: sum(range(10**6))) for _ in range(5)), key=lambda one: one.cpu / one.wall)
    assert 0 < busy.cpu <= busy.wall * 1.5


def test_busy_processors_are_the_share_of_time_that_was_not_idle(monkeypatch):
    ticks = iter([(100, 1000), (125, 1100), (0, 0), (0, 0), None, None])
    monkeypatch.setattr(timing, "_used_and_total", lambda: next(ticks))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    assert busy_processors(0) == 0.5
    assert busy_processors(0) is None and busy_processors(0) is None
