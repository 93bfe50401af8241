"""Every check of the conformance table, for our optimizers, and the page that shows it."""

import pytest
from conformance_report import CHECKS, PAGE, SIGNS, cells, titles, verdict
from conformance_subjects import OTHERS, OURS, Check, outcome

SHOWN = cells(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("subject", OURS, ids=lambda s: s.name)
@pytest.mark.parametrize("entry", CHECKS, ids=lambda c: c.title)
def test_ours_pass_and_the_page_says_so(entry, subject):
    found, said = verdict(entry, subject)
    assert found != "fails", said
    shown = SHOWN[entry.title][subject.name]
    # The page was written with the newest PyTorch; an older one may fail a check itself, as `stabilize` then does.
    assert shown == SIGNS[found] or found == "base", "run python benchmarks/conformance.py --write docs/..."


def test_the_page_has_every_check_and_every_optimizer():
    assert list(SHOWN) == titles()
    assert len(set(titles())) == len(titles())
    assert all(list(row) == [s.name for s in OTHERS + OURS] for row in SHOWN.values())


def test_a_check_that_breaks_is_a_failure_and_a_refusal_is_told_apart():
    def broken(subject):
        raise KeyError("exp_avg")

    assert outcome(Check("", "", broken), OURS[0]) == ("fails", "KeyError: 'exp_avg'")
    assert outcome(Check("", "", lambda subject: "no"), OURS[0]) == ("refuses", "no")
    assert outcome(Check("", "", lambda subject: None), OURS[0]) == ("passes", "")
