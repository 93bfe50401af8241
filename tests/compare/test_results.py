"""What comes out of a comparison: verdicts, tables, pictures, the page."""

import copy
import csv
import io
import json
import math

import pytest
from compare_support import TABLE, plan_of
from compare_support import settled as settled_outcomes

from evenstep.cli import main
from evenstep.compare import report
from evenstep.compare.cells import DIVERGED, HOPELESS, Outcome
from evenstep.compare.claims import (
    ALPHA,
    FLOOR,
    LEVEL,
    RULES,
    STUDENT,
    below_the_false_discovery_rate,
    difference,
    judge,
    judged,
    paired,
    settled,
    student,
)
from evenstep.compare.report import draw, overview, write_page
from evenstep.compare.results import document_of, sensitivity, stopped_early
from evenstep.errors import EvenstepError


def line(losses, *, name="a/high", tokens=1000, model=400, state=800, excess=0.1):
    finals = [{"seed": i, "status": "finished", "loss": loss} for i, loss in enumerate(losses)]
    facts = {"name": name, "size": "tiny", "finals": finals, "tokens": tokens, "sensitivity": excess, "sweep": []}
    return facts | {"mean": sum(losses) / len(losses) if losses else None, "model_bytes": model, "state_bytes": state}


def verdict(rule, better, than, **more):
    better["name"], than["name"] = "x/high", "y/high"
    found = judged({"text": "", "rule": rule, "better": "x/high", "than": "y/high", **more}, [better, than])
    return found["verdict"]


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    first, second = {0: 3.00, 1: 3.11, 2: 3.22, 7: 9.0}, {2: 3.20, 1: 3.10, 0: 3.00, 5: 1.0}
    found = paired(first, second)
    assert found.seeds == 3 and found.mean == pytest.approx(0.01)
    assert (found.first, found.second) == (pytest.approx(3.11), pytest.approx(3.10))
    # Of differences 0, 0.01, 0.02: standard deviation 0.01, and 4.303 is Student's with two degrees of freedom.
    assert found.within == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert paired({0: 1.0}, {0: 2.0}).within == math.inf and paired({0: 1.0}, {1: 1.0}) is None
    many = {seed: float(seed % 2) for seed in range(40)}
    assert paired(many, dict.fromkeys(many, 0.0)).within == pytest.approx(2.228 * 0.5 * (40 / 39) ** 0.5 / 40**0.5)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), "confirmed"),
        ((1.0, 1.0, 1.0), (None, math.inf, math.nan), "confirmed"),
        ((None, None, None), (1.0, 1.0, 1.0), "opposite"),
        ((1.0, 1.0, None), (2.0, 2.0, 2.0), "not confirmed"),
        ((2.0, 2.0, 2.0), (1.0, 1.0, None), "not confirmed"),
        ((None, None, None), (None, None, None), "not confirmed"),
        ((1.0,), (2.0, 2.0, 2.0), "open"),
        ((None,), (2.0, 2.0, 2.0), "open"),
        ((), (), "open"),
    ],
)
def test_a_verdict_needs_two_seeds_and_runs_that_ended(first, second, expected):
    first, second = dict(enumerate(first)), dict(enumerate(second))
    assert judge(first, second)[0] == expected
    mirrored = {"confirmed": "opposite", "opposite": "confirmed"}.get(expected, expected)
    assert judge(second, first)[0] == mirrored
    assert judge(first, second, floor=1.1)[0] != "confirmed" or None in second.values()


def test_lower_is_confirmed_where_the_whole_interval_is_on_the_papers_side():
    low, high = [3.0, 3.1, 3.2], [3.05, 3.15, 3.26]
    assert verdict("lower", line(low), line(high)) == "confirmed", "each seed alone differs more between seeds"
    assert verdict("lower", line(high), line(low)) == "opposite"
    assert verdict("lower", line([3.0, 3.1, 3.3]), line(high)) == "not confirmed"
    assert difference(line([3.1, 3.2, 3.3]), line([3.0, 3.1, 3.2]))[1].within == FLOOR
    assert difference(line([3.0]), line(high)) == ("open", None)
    assert verdict("lower", line([3.0]), line(high)) == "not tested", "one seed decides nothing"
    assert difference(line([3.0, 3.0]), line([3.1] * 3))[1].seeds == 2, "over the seeds that both have"


def test_a_side_that_diverged_has_lost():
    lost = line([])
    lost["finals"] = [{"seed": seed, "status": "diverged", "loss": None} for seed in (0, 1)]
    assert verdict("lower", line([3.0, 3.0]), copy.deepcopy(lost)) == "confirmed"
    assert verdict("lower", copy.deepcopy(lost), line([3.0, 3.0])) == "opposite"
    assert verdict("lower", copy.deepcopy(lost), copy.deepcopy(lost)) == "not confirmed"
    partly = line([2.9, 2.9, 2.9])
    partly["finals"][1].update(status="diverged", loss=None)
    assert verdict("lower", partly, line([3.0, 3.1, 3.2])) == "not confirmed"
    assert verdict("lower", line([]), line([3.0])) == "not measured"


def test_reaches_allows_a_little_and_says_with_how_many_tokens():
    half, whole = line([3.001, 3.003, 3.001], tokens=500), line([3.0, 3.002, 3.0])
    assert verdict("reaches", half, whole) == "confirmed"
    assert verdict("reaches", line([3.1, 3.1, 3.1], tokens=500), whole) == "opposite"
    assert verdict("reaches", line([3.0 + LEVEL] * 3, tokens=500), whole) == "not confirmed"
    claim = {"text": "", "rule": "reaches", "better": "x/high", "than": "y/high"}
    assert "50% of the tokens" in judged(claim, [half, whole])["ours"]


def test_level_asks_for_the_loss_and_the_memory():
    adam = line([3.0, 3.002, 3.001])
    low, level, high = [2.9, 2.902, 2.901], [3.0, 3.002, 3.001], [3.1, 3.102, 3.101]
    assert verdict("level", line(low, state=80), adam, memory=[0.35, 0.45]) == "confirmed"
    assert verdict("level", line(level, state=400), adam, memory=[0.35, 0.45]) == "not confirmed"
    assert verdict("level", line(high, state=80), adam, memory=[0.35, 0.45]) == "opposite"
    assert verdict("level", line([3.0, 3.04, 2.97], state=80), adam, memory=[0.35, 0.45]) == "not confirmed"
    assert verdict("level", line([], state=80), adam, memory=[0.35, 0.45]) == "not measured"
    assert verdict("memory", line([9.0], state=80), adam, memory=[0.35, 0.45]) == "confirmed"


def test_flatter_shows_the_excess_over_the_best_rate_without_a_verdict():
    found = judged({"text": "", "rule": "flatter", "better": "a/high", "than": "a/high"}, [line([], excess=0.1)])
    assert (found["verdict"], found["p"]) == ("not tested", None) and "0.100 against 0.100 nats; one seed" in found[
        "ours"
    ]
    assert verdict("flatter", line([], excess=None), line([], excess=0.2)) == "not measured"
    other = line([], excess=0.2) | {"sweep": [{"lr": 1e-3, "seed": 0, "status": "finished", "loss": 3.0}]}
    found = judged(
        {"text": "", "rule": "flatter", "better": "a/high", "than": "b/high"}, [line([]), other | {"name": "b/high"}]
    )
    assert "different rates" in found["ours"]
    sweep = [{"status": "finished", "loss": loss} for loss in (3.0, 3.1, 3.2)]
    assert sensitivity(sweep) == pytest.approx(0.1)
    assert sensitivity([*sweep, {"status": "diverged", "loss": None}]) == pytest.approx((0.3 + 1.0) / 4)
    assert sensitivity(sweep[:2]) is None
    assert sensitivity([*sweep, {"status": "hopeless", "loss": 5.0}]) is None, "5.0 is a loss of training"


def test_p_values_are_students():
    for degrees, quantile in enumerate(STUDENT, 1):
        assert student(quantile, degrees) == pytest.approx(ALPHA, abs=1e-4)
        assert student(-quantile, degrees) == student(quantile, degrees)
    assert [student(0.0, n) for n in (1, 2, 3, 4)] == [1.0] * 4 and student(1e9, 2) < 1e-12
    # Differences 0.1, 0.2, 0.3: t = 0.2 / (0.1 / sqrt(3)), and p = 1 - t / sqrt(2 + t^2) with two degrees of freedom.
    t = 2 * 3**0.5
    found = judge({0: 3.1, 1: 3.2, 2: 3.3}, dict.fromkeys(range(3), 3.0))
    assert found[0] == "not confirmed" and found[1].p == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    level = dict.fromkeys(range(3), 3.0)
    assert judge(level, level)[1].p == 1.0, "no difference at all"
    floored = judge(level, dict.fromkeys(range(3), 3.001), floor=FLOOR)
    assert floored[0] == "not confirmed" and floored[1].p > ALPHA, "the floor of the interval is one of p, too"


def single(p, verdict="confirmed"):
    return {"p": p, "verdict": verdict}


def verdicts(claims):
    return [claim["verdict"] for claim in settled(claims)]


def test_verdicts_are_corrected_over_all_claims_of_a_page():
    p = [0.001, 0.012, 0.02, 0.04]
    found = settled([single(one) for one in p])
    assert [claim["holm"] for claim in found] == pytest.approx([0.004, 0.036, 0.04, 0.04])
    assert {claim["verdict"] for claim in found} == {"confirmed"}
    # One more claim, and the second is at 0.012 x 4; those after it are held by it, whatever their own product is.
    found = settled([*(single(one) for one in p), single(0.03)])
    assert [round(claim["holm"], 4) for claim in found] == [0.005, 0.048, 0.06, 0.06, 0.06]
    assert [claim["verdict"] for claim in found] == ["confirmed", "confirmed", *["not confirmed"] * 3]
    assert verdicts([single(0.04), single(0.04, "opposite")]) == ["not confirmed"] * 2
    assert verdicts([single(0.04, "opposite")]) == ["opposite"], "one claim alone needs no correction"
    assert verdicts([single(0.03), single(None, "opposite")]) == ["confirmed", "opposite"], "bytes are not a test"


def test_a_claim_that_is_not_measured_makes_no_other_one_easier():
    missing = single(1.0, "not measured")
    assert verdicts([single(0.03), missing]) == ["not confirmed", "not measured"]
    assert settled([missing])[0]["holm"] is None
    assert verdict("lower", line([]), line([3.0, 3.1])) == "not measured"
    there, gone = line([3.0, 3.0, 3.0]), line([], name="b/high")
    claim = {"text": "", "rule": "lower", "better": "a/high", "than": "b/high"}
    assert judged(claim, [there, gone])["p"] == 1.0


def test_a_claim_that_this_size_cannot_test_has_no_verdict():
    claim = {"text": "", "rule": "lower", "better": "a/high", "than": "b/high", "untestable": "too short"}
    found = judged(claim, [line([3.0, 3.0, 3.0]), line([4.0, 4.0, 4.0], name="b/high")])
    assert (found["verdict"], found["p"]) == ("not testable here", None) and found["ours"].endswith("; too short")
    assert verdicts([single(0.04), found]) == ["confirmed", "not testable here"]


def test_false_discoveries_are_counted_by_the_step_up_rule():
    assert below_the_false_discovery_rate([single(p) for p in (0.04, 0.03, 0.01, 0.5)]) == 1
    assert below_the_false_discovery_rate([single(p) for p in (0.03, 0.03, 0.03, 0.5)]) == 3, "the largest that passes"
    assert below_the_false_discovery_rate([single(None), single(0.2)]) == 0


def test_every_rule_is_described():
    import evenstep.compare.claims as claims

    assert all(f"``{name}``" in claims.__doc__ for name in RULES)


# ---- documents ----


def loss_of(cell):
    """Adam is best at 2e-3 with 3.0, SPAM 0.1 below it; each tested seed is 0.01 more."""
    best = {"adam": 2e-3, "spam": 1e-3}[cell.group.row]
    away = abs(cell.lr - best) * 100
    return (3.0 if cell.group.row == "adam" else 2.9) + away + 0.01 * (cell.seed % 100)


@pytest.fixture
def document(tmp_path):
    plan = plan_of(tmp_path)
    return document_of(plan, settled_outcomes(plan, loss_of))


def test_a_line_has_mean_spread_best_rate_curve_and_bytes(document):
    adam, spam = document["lines"]
    assert adam["best_lr"] == 2e-3 and spam["best_lr"] == 1e-3
    assert adam["mean"] == pytest.approx(3.005) and adam["spread"] == pytest.approx(0.01)
    assert adam["curve"]["tokens"] == [1000, 2000, 4000]
    assert adam["curve"]["low"][-1] == 3.0 and adam["curve"]["high"][-1] == pytest.approx(3.01)
    assert adam["state_bytes"] == 800 and adam["published"] == {"60m": 34.09}
    # The mean curve goes from 3.405 at 2000 to 2.905 at 4000: at Adam's 3.005 after four fifths of that.
    assert spam["tokens_to_reference"] == pytest.approx(2000 + 0.8 * 2000) and adam["tokens_to_reference"] is None
    [claim] = document["claims"]
    assert (claim["verdict"], claim["seeds"], claim["size"]) == ("confirmed", 2, "tiny")
    assert document["commit"] == ["c" * 40] and document["hardware"][0]["cpu"] == "a CPU"
    json.dumps(document)


def test_the_table_in_markdown_and_csv(document):
    rows = report.rows(document)
    assert rows[1][:8] == ["spam", "high", "tiny", "0.001", "2.9050", "0.0100", "18.27", "-"] and rows[1][8] == "90%"
    assert rows[0][7] == "34.09" and rows[0][10] == "100%"
    assert report.markdown(document).count("\n") == 4
    cells = list(csv.DictReader(io.StringIO(report.comma_separated(document))))
    assert {cell["stage"] for cell in cells} == {"sweep", "final"} and {c["seed"] for c in cells} == {"0", "1", "100"}
    assert "claim (tiny): SPAM beats Adam: confirmed" in report.below(document)


def test_what_was_stopped_early_is_said_and_an_edge_too(tmp_path):
    plan = plan_of(tmp_path, TABLE.replace("extend = 1", "extend = 0"))
    outcomes = settled_outcomes(plan, lambda cell: 3.0 + cell.lr)
    spam = plan.sweep(plan.groups[1], {})
    outcomes[spam[-1].name] = Outcome(HOPELESS, 5.0, "training loss 5.0", 400)
    finals = plan.finals(plan.groups[1], outcomes)
    outcomes[finals[0].name] = Outcome(DIVERGED, None, "the loss is nan at step 3", 30)
    document = document_of(plan, outcomes)
    told = stopped_early(document)
    assert len(told) == 2 and "hopeless, training loss 5.0" in told[0] and "diverged, the loss is nan" in told[1]
    assert "lowest tried" in report.rows(document)[0][3] and report.rows(document)[1][-1] == "1 (1 diverged)"
    assert "stopped early" in report.below(document)


def test_without_seeds_the_loss_is_the_sweeps_in_brackets(tmp_path):
    plan = plan_of(tmp_path, TABLE.replace("seeds = [0, 1]", "seeds = []"))
    row = report.rows(document_of(plan, settled_outcomes(plan, loss_of)))[0]
    assert row[4] == "(3.0000)" and row[5] == "-" and row[-1] == "0"


def test_claims_are_judged_for_each_size(tmp_path):
    text = TABLE.replace('sizes = ["tiny"]', 'sizes = ["tiny", "9m"]') + "\n[size.9m]\nset.model.size = '9m'\n"
    plan = plan_of(tmp_path, text)
    document = document_of(plan, settled_outcomes(plan, lambda c: loss_of(c) + (1 if c.group == plan.groups[3] else 0)))
    assert [(c["size"], c["verdict"]) for c in document["claims"]] == [("tiny", "confirmed"), ("9m", "opposite")]
    assert [line["tokens_to_reference"] is None for line in document["lines"]] == [True, False, True, True]


def test_pictures(document, tmp_path):
    pytest.importorskip("matplotlib")
    assert [path.name for path in draw(document, tmp_path)] == ["mine-curves.png", "mine-rates.png", "mine-memory.png"]
    empty = {**document, "lines": []}
    assert draw(empty, tmp_path) == []


def test_the_page_says_claim_numbers_direction_and_the_flaw(document, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    stored, page = tmp_path / "stored", tmp_path / "docs" / "results.md"
    stored.mkdir()
    page.parent.mkdir()
    (stored / "mine.json").write_text(json.dumps(document))
    assert main(["results", str(stored), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    own = page.parent / "results" / "mine.md"
    text = page.read_text() + own.read_text()
    row = "| SPAM beats Adam | **confirmed** | 2.9050 against 3.0050 (-0.1000 ± 0.0050) | 0.003 | 2 | - | 30.46 against"
    assert (
        row in text and "over all 1 claims of this page" in text and "0 are not measured and 1 have a verdict" in text
    )
    assert "N/(N+1)" in text and "commit cccccccccc" in text and "a CPU" in text and "4K tokens" in text
    for picture in ("curves", "rates", "memory"):
        assert f"](mine-{picture}.png)" in own.read_text() and own.with_name(f"mine-{picture}.png").exists()
    assert "](#" not in page.read_text() and page.read_text().count("](results/mine.md)") == 2
    assert "](../results.md)" in own.read_text() and "# " not in page.read_text().split("## The tables")[1]
    assert "## Notes" not in text
    (stored / "notes.md").write_text("## Notes\n\nof somebody\n")
    (stored / "mine.json").write_text(json.dumps({**document, "scale": "smoke"}))
    write_page(stored, page)
    assert "every direction below is an\naccident" in page.read_text()
    assert "Not measured again" not in page.read_text()
    assert page.read_text().index("\n## Claims") < page.read_text().index("\n## Notes\n\nof somebody\n")


def test_a_page_corrects_over_the_claims_of_all_its_tables(document, tmp_path, monkeypatch):
    """Each table's own correction has one claim, the page's has 25."""
    monkeypatch.setattr(report, "draw", lambda document, directory: [])
    for number in range(25):
        here = copy.deepcopy(document) | {"table": f"t{number:02d}"}
        (tmp_path / f"t{number:02d}.json").write_text(json.dumps(here))
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "over all 25 claims" in text and text.count("| **not confirmed** |") == 25 and "| 0.063 | 2 |" in text
    assert "0 are not measured and 0 have a verdict" in text and "25 would have one" in text


def test_a_line_whose_setting_was_corrected_shows_its_old_number_nowhere_else(document, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda document, directory: [])
    spam = document["lines"][1]
    old = {
        "table": "mine",
        "line": spam["name"],
        "label": "spam, high",
        "changed": "clip_start",
        "loss": 3.4567,
        "lr": 1e-3,
    }
    (tmp_path / "superseded.jsonl").write_text(json.dumps(old | {"seeds": 3}) + "\n")
    (tmp_path / "mine.json").write_text(json.dumps(document))
    write_page(tmp_path, tmp_path / "page.md")
    assert "3.4567" not in (tmp_path / "page.md").read_text(), "measured again: the old number is gone"
    spam.update(mean=None, finals=[], sweep=[], best_lr=None)
    (tmp_path / "mine.json").write_text(json.dumps(document))
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| **not measured** | not measured again since the correction of spam, high | - | " in text
    assert text.count("3.4567") == 1
    assert (
        "| spam, high | clip_start | 3.4567 | 0.001 | 3 | [mine](page/mine.md) |"
        in text.split("## Not measured again")[1]
    )


def test_what_a_rate_was_chosen_on_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda document, directory: [])
    plan = plan_of(tmp_path, TABLE.replace("extend = 1", "extend = 0\nseed = 0\nall = true"))
    document = document_of(plan, settled_outcomes(plan, lambda cell: loss_of(cell) - (cell.lr > 3e-3)))
    rows = report.rows(document)
    assert [row[3] for row in rows] == ["0.004†", "0.004† (highest tried)"]
    assert "† the rate was chosen on a seed that is also tested" in report.below(document)
    (tmp_path / "mine.json").write_text(json.dumps(document))
    write_page(tmp_path, tmp_path / "page.md")
    assert "| 2 | tested seed, edge | 30.46" in (tmp_path / "page.md").read_text()
    fresh = document_of(plan_of(tmp_path), settled_outcomes(plan_of(tmp_path), loss_of))
    assert "†" not in report.markdown(fresh) + report.below(fresh)


def test_a_picture_that_has_nothing_to_show_any_more_goes(document, tmp_path):
    drawn = draw(document, tmp_path)
    curves = tmp_path / f"{document['table']}-curves.png"
    assert curves in drawn and {*tmp_path.glob("*.png")} == {*drawn}
    for here in document["lines"]:
        here["curve"] = {"tokens": [], "mean": [], "low": [], "high": []}
    draw(document, tmp_path)
    assert {*tmp_path.glob("*.png")} == {*drawn} - {curves}


def test_a_page_of_nothing_or_of_something_else_is_refused(tmp_path):
    with pytest.raises(EvenstepError, match=r"no stored results; evenstep compare TABLE\.toml --store"):
        write_page(tmp_path / "none", tmp_path / "page.md")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(EvenstepError, match=r"x.json: not a result of evenstep compare"):
        write_page(tmp_path, tmp_path / "page.md")


def test_the_overview_ranks_the_lines_of_all_tables_at_one_setting(document):
    other = copy.deepcopy(document) | {"table": "other"}
    for here in other["lines"]:
        here["label"] = f"{here['label']} again"
    spam, adam = copy.deepcopy(other["lines"][1]), copy.deepcopy(other["lines"][0])
    spam.update(label="better", mean=2.0, spread=0.0, finals=[{**spam["finals"][0], "loss": 2.0}], state_bytes=200)
    adam.update(label="half", tokens=2000)
    other["lines"] += [spam, adam]
    elsewhere = copy.deepcopy(document) | {"table": "elsewhere", "setting": {**document["setting"], "tokens": 9}}
    text = overview([document, other, elsewhere])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["better", "spam, spam again", "Adam, Adam again"]
    assert rows[2][1:6] == ["(2.0000)", "-", "0.0000", "0.001", "50%"]
    assert rows[3][1] == "2.9050" and rows[3][3] == "0.9050" and rows[3][5] == "100%"
    assert rows[3][-1] == "[mine](#mine), [other](#other)"
    assert overview([document, elsewhere]) == ""
