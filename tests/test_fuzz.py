"""Files of others, broken at random: they are read, or refused in one line, and nothing else happens."""

import random
import re
from pathlib import Path

import pytest
from fuzz_by_hand import attempt
from fuzz_support import TARGETS, VALUES, broken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", params=TARGETS)
def target(request, tmp_path_factory):
    name = request.param
    place = tmp_path_factory.mktemp("fuzz")
    TARGETS[name].prepare(place)
    return name, place, (place / TARGETS[name].file).read_bytes()


def test_the_good_one_is_read(target):
    name, place, good = target
    assert TARGETS[name].read(place) is not Ellipsis
    assert attempt(name, place, good) is None


@SETTINGS
@given(seed=st.integers(0, 2**32))
def test_broken_in_a_few_places(target, seed):
    name, place, good = target
    assert attempt(name, place, broken(good, random.Random(seed))) is None


@settings(SETTINGS, max_examples=15)
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")))
def test_anything_at_all(target, content):
    name, place, _ = target
    assert attempt(name, place, content) is None


def test_every_value_in_every_place(target):
    """JSON and TOML: each value in turn by each of the odd ones."""
    name, place, good = target
    spots = [match.span(1) for match in re.finditer(rb"[:=] *([^,\n}\]\[{]+)", good)]
    if not TARGETS[name].file.endswith((".json", ".toml")) or len(spots) > 120:
        return
    for start, end in spots:
        for value in (b"null", b"-1", b"1e999", b'"../x"', b"[]", b"9" * 30):
            failure = attempt(name, place, good[:start] + value + good[end:])
            assert failure is None, f"{good[max(0, start - 30) : start]!r} {value!r}: {failure}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_for_longer(name, tmp_path):
    from fuzz_by_hand import campaign

    assert campaign(name, 20, seed=1) == 0 and len(VALUES) > 10
