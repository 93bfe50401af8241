"""``evenstep sweep``, and tables of the user's own."""

import copy
import csv
import re
import tomllib
from pathlib import Path

import pytest
from compare_support import ended, write_table
from train_support import write_corpus

from evenstep.cli import main
from evenstep.compare.cells import DIVERGED, Outcome
from evenstep.compare.engines import Inline
from evenstep.compare.grid import Plan
from evenstep.compare.sweep import HEADS, below, rows_of, sweep_of
from evenstep.compare.table import _KEYS, EXAMPLE, load_table
from evenstep.errors import EvenstepError

ROOT = Path(__file__).parents[2]

RECIPE = """
[data]
source = "text:{corpus}"
cache_dir = "{cache}"
vocab_size = 300
val_fraction = 0.1
[optim]
name = "stable_spam"
gamma1 = 0.8
total_steps = "run"
[train]
steps = 2
batch_size = 4
seq_len = 16
threads = 1
device = "cpu"
[eval]
every = 1
max_tokens = 200
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
    path = corpus.parent / "mine.toml"
    path.write_text(RECIPE.format(corpus=corpus, cache=corpus.parent / "cache"))
    return path


def test_a_sweep_is_trained_tabled_and_not_trained_again(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", str(recipe), "--optimizers", "adamw,stable_spam", "--rates", "1e-3,3e-3", "--jobs", "0"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.count("validation loss") == 4 and "4 runs of 128 tokens" in out
    assert "left out options of stable_spam" in err and "does not have: gamma1, total_steps" in err
    lines = out.splitlines()
    heads = next(i for i, line in enumerate(lines) if line.startswith("optimizer"))
    assert lines[heads].split() == [*" ".join(HEADS).split()] and len(HEADS) <= 6
    rows = [line.split() for line in lines[heads + 1 : heads + 5]]
    assert {tuple(row[:2]) for row in rows} == {(o, r) for o in ("adamw", "stable_spam") for r in ("0.001", "0.003")}
    assert [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)
    assert all(len(line) <= 80 for line in lines[heads:][:5])
    where = Path("runs/sweep-mine")
    assert "picture: runs/sweep-mine/sweep.png" in out and (where / "sweep.png").read_bytes()[1:4] == b"PNG"
    assert "| adamw | 0.003 |" in (where / "table.md").read_text()
    runs = list(csv.DictReader((where / "runs.csv").open()))
    assert len(runs) == 4 and all((where / run["run"] / "summary.json").exists() for run in runs)
    config = tomllib.loads((where / runs[0]["run"] / "config.toml").read_text())
    assert (config["optim"]["name"], config["optim"]["lr"], config["seed"]) == ("adamw", 1e-3, 0)
    assert config["telemetry"]["enabled"] is False and "total_steps" not in config["optim"]

    trained, submit = [], Inline.submit
    monkeypatch.setattr(Inline, "submit", lambda self, job: trained.append(job.name) or submit(self, job))
    assert main(words) == 0 and trained == []
    again = capsys.readouterr().out
    assert again[again.index("optimizer ") :] == out[out.index("optimizer ") :]
    assert main([*words[:3], "adamw", "--rates", "3e-3", "--seeds", "0,1", "--jobs", "0"]) == 0
    assert len(trained) == 1 and "seed1" in trained[0]
    assert "one seed" not in capsys.readouterr().out.split("optimizer ")[1]


def test_the_order_of_the_runs_and_what_the_recipe_gives(recipe):
    sweep = sweep_of(recipe, [("train.steps", "5")], "stable_spam,spam", "1e-3,2e-3", "3,4")
    assert [cell.seed for cell in sweep.cells] == [3] * 4 + [4] * 4
    assert all(cell.config.train.steps == 5 and cell.tokens == 320 for cell in sweep.cells)
    assert sweep.cells[0].config.optim.options == {"gamma1": 0.8, "total_steps": 5}
    assert len({cell.name for cell in sweep.cells}) == 8
    [cell] = sweep_of(recipe, []).cells
    assert (cell.config.optim.name, cell.config.optim.lr, cell.seed) == ("stable_spam", 1e-3, 0)
    [loud] = sweep_of(recipe, [("telemetry.enabled", "true")]).cells
    assert loud.config.telemetry.enabled and not cell.config.telemetry.enabled
    [loud], [cell] = (sweep_of(Path("recipes/start.toml"), given).cells for given in ([("log.report", "true")], []))
    assert loud.config.log.report and not cell.config.log.report and cell.config.data.bad_batch is None


def test_rows_are_the_best_first_and_lines_that_diverged_come_last(recipe):
    sweep = sweep_of(recipe, [], "adamw,stable_spam", "1e-3,2e-3,4e-3", "0,1")
    losses = {("adamw", 1e-3): 3.2, ("adamw", 2e-3): 3.1, ("adamw", 4e-3): 2.0, ("stable_spam", 1e-3): 3.0}
    outcomes = {
        cell.name: ended(losses.get((cell.group.row, cell.lr), 3.5) + cell.seed / 10 + (cell.group.row == "adamw") / 99)
        for cell in sweep.cells
    }
    lost = sweep.lines["adamw", 4e-3][1].name
    outcomes[lost] = Outcome(DIVERGED, None, "the loss is nan", 64)
    rows = rows_of(sweep, outcomes)
    assert [(row.optimizer, row.rate) for row in rows[:2]] == [("stable_spam", 1e-3), ("adamw", 2e-3)]
    assert (rows[-1].optimizer, rows[-1].rate) == ("adamw", 4e-3) and rows[-1].cells()[4] == "1 (1 diverged)"
    assert rows[0].cells()[2:5] == ["3.0500", "0.1000", "2"]
    text = "\n".join(below(rows))
    assert "the best rate of stable_spam is the lowest that was tried" in text and "best rate of adamw is" not in text
    found = re.search(r"adamw at its best rate is (\S+) above stable_spam, ± (\S+) \(95 %, paired by 2 seeds\)", text)
    assert float(found[1]) == pytest.approx(0.1 + 1 / 99, abs=1e-4) and float(found[2]) < 1e-3
    # A line that lost a seed comes last, and the differences of its other seeds may be in its favour.
    sweep = sweep_of(recipe, [], "adamw,stable_spam", "1e-3", "0,1,2")
    again = {cell.name: ended(3.0 + cell.seed - (cell.group.row == "adamw") / 4) for cell in sweep.cells}
    again[sweep.lines["adamw", 1e-3][1].name] = outcomes[lost]
    text = "\n".join(below(rows_of(sweep, again)))
    assert "adamw at its best rate is 0.2500 below stable_spam, ± " in text and "paired by 2 seeds" in text
    assert "adamw at its best rate diverged with seed 1; its loss leaves that out" in text
    sweep = sweep_of(recipe, [], "adamw,stable_spam", "1e-3,2e-3,4e-3", "0,1")
    outcomes[sweep.lines["adamw", 4e-3][0].name] = outcomes[lost]
    assert rows_of(sweep, outcomes)[-1].cells()[2] == "diverged"


MISTAKES = {
    ("--rates", "1e-3,x"): "--rates 1e-3,x: not a list of this form; give one such as --rates 1e-3,3e-3",
    ("--rates", "-1"): "optim.lr: -1.0 is out of range",
    ("--seeds", "1,,2"): "--seeds 1,,2: not a list",
    ("--seeds", "1.5"): "--seeds 1.5: not a list",
    ("--optimizers", "adamw,stable-spam"): "did you mean 'stable_spam'",
    ("--optimizers", "adamw", "--optim.gamma1", "0.3"): "optim.gamma1: adamw has no such hyperparameter",
    ("--optim.lr", "1"): "--optim.lr is an option with a list here; give --rates A,B,...",
    ("--data.val_fraction", "0"): "data.val_fraction is 0",
    ("--train.stepz", "3"): "did you mean 'train.steps'",
    ("--rate", "3"): "did you mean '--rates'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_trained(words, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(recipe), *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert MISTAKES[words] in err[-1] and err[-1].startswith("evenstep: error: ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_the_runs(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(recipe), "--seeds", "0,1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("stable_spam/fp32/tiny lr 0.001 seed") == 2 and "2 runs, 256 tokens" in out
    assert not list(tmp_path.iterdir())


# ---- tables of one's own ----


def test_the_example_is_a_table_that_runs(recipe, tmp_path, capsys):
    assert main(["compare", "--example"]) == 0
    text = capsys.readouterr().out
    assert text == EXAMPLE
    plan = Plan(load_table(write_table(tmp_path, text), "small"))
    assert len(plan.wanted({})) == 6 and plan.table.scale == "own"
    # The same file with fewer tokens and another text.
    small = text.replace("60K", "256").replace("200K", "512").replace("seq_len = 128", "seq_len = 16")
    small = small.replace('"stdlib"', tomllib.loads(recipe.read_text())["data"]["source"].join('""'))
    small = small.replace("vocab_size = 2048", "vocab_size = 300").replace("extend = 1", "extend = 0")
    small = small.replace("1e-3, 2e-3, 4e-3", "2e-3").replace("20K", "200")
    path = write_table(tmp_path, small, "own.toml")
    assert main(["compare", str(path), "--jobs", "0", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "claim (tiny): Stable-SPAM beats AdamW:" in out and (tmp_path / "out/tables/own/table.md").exists()
    assert f"table:   {tmp_path / 'out/tables/own/table.md'}" in out


def test_every_key_of_a_table_is_documented():
    page = (ROOT / "docs/comparisons.md").read_text()
    section = page[page.index("## Your own table") : page.index("## Tables of the papers")]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("|")]
    found, current = {}, ""
    for head, keys in rows[2:]:
        current = head or current
        found.setdefault(current.strip("`[]").split(".")[0], set()).update(re.findall(r"`(\w+)`", keys))
    top = set(_KEYS[""].split())
    assert found["(top)"] | {name for name in found if name != "(top)"} == top
    for name in ("grid", "sweep", "final", "row", "precision", "size", "claim"):
        assert found[name] == set(_KEYS[name].split()), name
    assert set(_KEYS["size's row"].split()) == {"rates", "set"}


OWN_MISTAKES = [
    ('title = "', 'titel = "', "unknown key 'titel'; did you mean 'title'? (allowed: about, base, claim, final, grid"),
    ("[sweep]", "[sweeep]", "unknown key 'sweeep'; did you mean 'sweep'?"),
    ("extend = 1", "extent = 1", "unknown key 'sweep.extent'; did you mean 'extend'? (allowed: all, extend, rates"),
    ("[precision.fp32]\n", "", "names the precision 'fp32'; write [precision.fp32] with its"),
    ('rows = ["adamw", "stable_spam"]', 'rows = ["adamw", "lamb"]', "grid names the row 'lamb'; write [row.lamb]"),
    ('rule = "lower"', 'rule = "below"', "has the rule 'below'; did you mean 'lower'? (allowed: lower, reaches"),
    ('rule = "lower"\n', "", "claim 'Stable-SPAM beats AdamW' has no 'rule'"),
    ('better = "stable_spam/fp32"', 'better = "lion/fp8"', "'lion/fp8' is not a line of this table (lines: adamw/fp32"),
    ("seeds = [0, 1]", "seeds = 2", "final.seeds = 2 is not a list of whole numbers"),
    ("rates = [1e-3, 2e-3, 4e-3]", 'rates = ["1e-3"]', "sweep.rates = ['1e-3'] is not a list of numbers"),
    ("rates = [1e-3, 2e-3, 4e-3]", "rates = []", "sweep.rates is empty; give a list of learning rates"),
    ('rule = "lower"', 'rule = "level"', "has the rule level, which needs memory = [least, greatest]"),
    ('source = "stdlib"', 'sorce = "stdlib"', "unknown option 'data.sorce'; did you mean 'data.source'"),
]  # fmt: skip


@pytest.mark.parametrize("before, after, why", OWN_MISTAKES, ids=[str(why)[:30] for _, _, why in OWN_MISTAKES])
def test_a_mistake_in_a_table_of_ones_own_is_one_line(tmp_path, before, after, why):
    text = EXAMPLE.replace(before, after)
    assert text != EXAMPLE
    with pytest.raises(EvenstepError) as caught:
        Plan(load_table(write_table(tmp_path, text), "small"))
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["row", "precision", "size", "base", "published", "grid", "sweep", "final", "claim", "scale"]
)
def test_a_section_that_is_no_table_is_one_line(tmp_path, key):
    text = f'{key} = 3\ntitle = "a test"\n' + ("" if key == "grid" else '[grid]\nrows = ["a"]\n')
    with pytest.raises(EvenstepError, match=f"{key} = 3 is not a|scale is not a table") as caught:
        load_table(write_table(tmp_path, text), "small")
    assert "\n" not in str(caught.value)


def places(table, at=()):
    """The keys of every value in nested tables and lists."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def test_a_value_of_a_wrong_type_is_one_line_wherever_it_stands(monkeypatch):
    whole = tomllib.loads(EXAMPLE)
    whole["grid"]["more"] = [{"rows": ["adamw"]}]
    whole["row"]["adamw"] |= {"factor": 1, "budget": 1, "rates": [1e-3]}
    whole["precision"]["fp32"] = {"row": {"adamw": {"optim": {"lr": 1}}}}
    whole["size"]["tiny"] |= {"tokens": 5000, "row": {"adamw": {"rates": [1e-3], "set": {"seed": 1}}}}
    whole |= {"published": {"60m": {"fp32": {"adamw": 34.09}}}, "include": [], "about": "", "paper": ""}
    whole["claim"][0] |= {"memory": [0, 1], "untestable": "", "paper": ""}
    whole["final"]["cells"], whole["sweep"]["seed"], whole["sweep"]["all"] = ["all"], 3, True
    changed = {}
    monkeypatch.setattr("evenstep.compare.table.read_toml", lambda path: copy.deepcopy(changed))
    for place in places(whole):
        for wrong in ("x", -3.5, [3], [[]], [{}], {"a": {"b": {"c": 3}}}, True):
            changed.clear()
            changed |= copy.deepcopy(whole)
            part = changed
            for key in place[:-1]:
                part = part[key]
            former, part[place[-1]] = part[place[-1]], wrong
            if type(wrong) is type(former) or {"base", "set", "optim", "memory", "published"} & {*place[:-1]}:
                continue  # it may fit, or the configuration refuses it where the run is built
            with pytest.raises(EvenstepError) as caught:
                Plan(load_table(Path("own.toml"), "small"))
            assert "\n" not in str(caught.value), place


@pytest.mark.parametrize(
    "text, why",
    [
        ("[size]\ntiny = 3", "size.tiny = 3 is not a table"),
        ("reference = 3", "reference = 3 is not a text"),
        ("[[claim]]\nrule = ['lower']", "claim.rule = ['lower'] is not a text"),
        ("grid.more = [3]", "grid.more = [3] is not a list of tables"),
        ("include = 3", "include = 3 is not a list of texts"),
        ("include = ['mine.toml']", "the file includes itself"),
        ("base.optim = 3", "base.optim = 3 is not a table"),
        ("sweep.rates = [0]", "sweep.rates = [0] is not a list of numbers above 0"),
        ("final.tokens = '2X'", "final.tokens = '2X' is not a count of tokens; give one such as"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, text, why):
    head = "title = 'a test'\n" + ("" if "grid" in text else "grid.rows = ['a']\n")
    with pytest.raises(EvenstepError) as caught:
        load_table(write_table(tmp_path, head + text), "small")
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_without_scales_has_no_other_one(tmp_path, capsys):
    with pytest.raises(EvenstepError, match="no scale 'paper'"):
        load_table(write_table(tmp_path, EXAMPLE), "paper")
    assert main(["compare"]) == 2
    assert "evenstep compare --example > my.toml" in capsys.readouterr().err
