"""Sixty random combinations of features against the plain path; ``make fuzz`` runs as many as one likes."""

import dataclasses
import math

import pytest
from differential import PAIR, Case, NetworkCase, campaign, difference, draw_case, outcome

from evenstep.optim import StableSPAM


@pytest.fixture(scope="module", autouse=True)
def _processes():
    """Those of the cases with a wrapper serve all tests of the module."""
    yield
    PAIR.close()


@pytest.mark.parametrize("seed", range(0, 40, 10))
def test_combinations_agree_with_the_plain_path(seed):
    said = []
    assert campaign(10, seed, report=said.append) == 0, "\n".join(said)


ROUNDED = {"rounding": "stochastic"}
SHARDED = [
    Case(((24, 40), (16, 256)), "SPAM", ROUNDED | {"betas": (0.5, 0.5)}, dtype="bf16", seed=99),
    Case(
        ((4, 3, 2, 2), (33,), (1, 17)), options=ROUNDED | {"betas": (0.0, 0.99), "gamma1": 0.0}, dtype="bf16", seed=207
    ),
]


@pytest.mark.parametrize("case", SHARDED, ids=["SPAM", "StableSPAM"])
def test_shards_are_rounded_as_the_whole_tensor(case):
    """Stochastic rounding draws the noise of an entry by its number in the whole tensor."""
    assert difference(dataclasses.replace(case, wrapper="fsdp2", processes=2)) is None


def test_every_feature_is_drawn():
    cases = [draw_case(seed) for seed in range(400)]
    for f in dataclasses.fields(Case):
        assert len({repr(getattr(case, f.name)) for case in cases}) > 1, f.name
    assert any(isinstance(case, NetworkCase) and case.recipe for case in cases)


def test_a_wrong_step_is_found(monkeypatch):
    """Each time one thing is broken on purpose; the comparison must say so."""
    case = Case(
        shapes=((24, 40), (5,)), options={"reset_interval": 3}, fused=None, reload=4, spikes=((2, 0, math.nan),)
    )
    assert outcome(case) == ("same", "")
    original = StableSPAM.load_state_dict

    def forgets(self, state):
        original(self, state)
        for kept in self.state.values():
            kept["exp_avg"].zero_()

    monkeypatch.setattr(StableSPAM, "load_state_dict", forgets)
    assert "differs" in difference(case)
    monkeypatch.setattr(StableSPAM, "load_state_dict", lambda self, state: None)
    assert "n is 2.0, expected 5.0" in difference(case)


def test_a_difference_is_printed_as_a_script_that_shows_it():
    case = Case(shapes=((6, 8),), options={"lr": 0.01}, fused=None, spikes=((1, 0, math.inf),))
    script = case.script()
    assert len(script.splitlines()) < 20
    said = []
    exec(script, {"__name__": "__main__", "print": said.append})
    assert said == [None]
