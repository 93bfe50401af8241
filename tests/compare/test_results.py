"""What comes out of a comparison: verdicts, tables, pictures, the page."""

import copy
import csv
import io
import json
import math

import pytest
from compare_support import TABLE, plan_of, settled

from evenstep.cli import main
from evenstep.compare import report
from evenstep.compare.cells import DIVERGED, HOPELESS, Outcome
from evenstep.compare.claims import FEW, FLOOR, LEVEL, RULES, difference, judge, judged, paired
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
    alone = difference(line([3.0]), line(high))[1]
    assert (alone.mean, alone.second, alone.within) == (pytest.approx(-0.05), 3.05, FEW), "over the seed that both have"
    assert verdict("lower", line([3.0, 3.0]), line([3.0 + FEW * 0.9] * 3)) == "not confirmed"


def test_a_side_that_diverged_has_lost():
    lost = line([])
    lost["finals"] = [{"seed": 0, "status": "diverged", "loss": None}]
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
    assert (
        "50% of the tokens" in judged({"rule": "reaches", "better": "x/high", "than": "y/high"}, [half, whole])["ours"]
    )


def test_level_asks_for_the_loss_and_the_memory():
    adam = line([3.0, 3.002, 3.001])
    low, level, high = [2.9, 2.902, 2.901], [3.0, 3.002, 3.001], [3.1, 3.102, 3.101]
    assert verdict("level", line(low, state=80), adam, memory=[0.35, 0.45]) == "confirmed"
    assert verdict("level", line(level, state=400), adam, memory=[0.35, 0.45]) == "not confirmed"
    assert verdict("level", line(high, state=80), adam, memory=[0.35, 0.45]) == "opposite"
    assert verdict("level", line([3.0, 3.04, 2.97], state=80), adam, memory=[0.35, 0.45]) == "not confirmed"
    assert verdict("level", line([], state=80), adam, memory=[0.35, 0.45]) == "not measured"
    assert verdict("memory", line([9.0], state=80), adam, memory=[0.35, 0.45]) == "confirmed"


def test_flatter_is_about_the_excess_over_the_best_rate():
    assert verdict("flatter", line([], excess=0.1), line([], excess=0.2)) == "confirmed"
    assert verdict("flatter", line([], excess=0.2), line([], excess=0.1)) == "opposite"
    assert verdict("flatter", line([], excess=0.19), line([], excess=0.2)) == "not confirmed"
    assert verdict("flatter", line([], excess=None), line([], excess=0.2)) == "not measured"
    sweep = [{"status": "finished", "loss": loss} for loss in (3.0, 3.1, 3.2)]
    assert sensitivity(sweep) == pytest.approx(0.1)
    assert sensitivity([*sweep, {"status": "diverged", "loss": None}]) == pytest.approx((0.3 + 1.0) / 4)
    assert sensitivity(sweep[:2]) is None


def test_every_rule_is_described():
    import evenstep.compare.claims as claims

    assert all(f"``{name}``" in claims.__doc__ for name in RULES)


# ---- documents ----


def loss_of(cell):
    """Adam is best at 2e-3 with 3.0, SPAM 0.1 below it; each seed is 0.01 more."""
    best = {"adam": 2e-3, "spam": 1e-3}[cell.group.row]
    away = abs(cell.lr - best) * 100
    return (3.0 if cell.group.row == "adam" else 2.9) + away + 0.01 * cell.seed


@pytest.fixture
def document(tmp_path):
    plan = plan_of(tmp_path)
    return document_of(plan, settled(plan, loss_of))


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
    assert {cell["stage"] for cell in cells} == {"sweep", "final"} and {c["seed"] for c in cells} == {"0", "1"}
    assert "claim (tiny): SPAM beats Adam: confirmed" in report.below(document)


def test_what_was_stopped_early_is_said_and_an_edge_too(tmp_path):
    plan = plan_of(tmp_path, TABLE.replace("extend = 1", "extend = 0"))
    outcomes = settled(plan, lambda cell: 3.0 + cell.lr)
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
    row = report.rows(document_of(plan, settled(plan, loss_of)))[0]
    assert row[4] == "(3.0000)" and row[5] == "-" and row[-1] == "0"


def test_claims_are_judged_for_each_size(tmp_path):
    text = TABLE.replace('sizes = ["tiny"]', 'sizes = ["tiny", "9m"]') + "\n[size.9m]\nset.model.size = '9m'\n"
    plan = plan_of(tmp_path, text)
    document = document_of(plan, settled(plan, lambda c: loss_of(c) + (1 if c.group == plan.groups[3] else 0)))
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
    text = page.read_text()
    assert "| SPAM beats Adam | **confirmed** | 2.9050 against 3.0050 (-0.1000 ± 0.0800) | 2 | 30.46 against" in text
    assert "N/(N+1)" in text and "commit cccccccccc" in text and "a CPU" in text and "4K tokens" in text
    for picture in ("curves", "rates", "memory"):
        assert f"](results/mine-{picture}.png)" in text and (page.parent / "results" / f"mine-{picture}.png").exists()
    assert "## Notes" not in text
    (stored / "notes.md").write_text("## Notes\n\nof somebody\n")
    (stored / "mine.json").write_text(json.dumps({**document, "scale": "smoke"}))
    write_page(stored, page)
    assert "every direction below is an\naccident" in page.read_text()
    assert page.read_text().index("\n## Claims") < page.read_text().index("\n## Notes\n\nof somebody\n")


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
