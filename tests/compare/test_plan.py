"""Table files, and which of their runs are wanted in which order."""

import functools
import math
from pathlib import Path

import pytest
from compare_support import TABLE, ended, plan_of, settled, write_table

from evenstep.compare.cells import DIVERGED, HOPELESS, Outcome, Store
from evenstep.compare.grid import MARGIN, OLD_TUNING_SEED, PATIENCE, TUNING_SEED, Plan, hopeless
from evenstep.compare.table import Group, load_table, merged
from evenstep.errors import EvenstepError
from evenstep.train.config_io import load_config

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "recipes" / "tables").glob("*.toml"))
ADAM, SPAM = Group("adam", "high", "tiny"), Group("spam", "high", "tiny")


@functools.cache
def plan_at(path, scale):
    return Plan(load_table(path, scale))


SCALES = ["small", "gpu", "paper", "slimpajama", "smoke"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_every_table_of_the_papers_is_valid_at_every_scale(path, scale):
    plan = plan_at(path, scale)
    document = plan.table.document
    assert document["about"] and document["paper"] and plan.groups
    for group in plan.groups:
        assert plan.tuning_seed[group] not in document["final"].get("seeds", [0]), "a rate is chosen by the test"
        for lr in plan.table.rates(group):
            assert plan.cell(group, "final", lr, 0).config.optim.lr == pytest.approx(lr)
    if scale == "small":
        assert all(c.config.train.device == "cpu" and c.config.data.source == "kjv" for _, c in plan.wanted({}))


def test_every_table_and_figure_has_its_file():
    wanted = "spam-1 spam-memory spam-mitigation spam-theta spam-interval spam-warmup spam-density stable-spam-1"
    wanted += " stable-spam-2 stable-spam-3 stable-spam-4 stable-spam-lr stable-spam-bits stable-spam-half"
    wanted += " stable-spam-variants gradient-stabilizer-1 scale-1 scale-norm mix-ln-1 mix-ln-alpha equal-tokens"
    assert {path.stem for path in TABLES} == set(wanted.split())


def test_published_numbers_are_of_lines_that_the_paper_scale_trains():
    for path in TABLES:
        table = load_table(path, "paper")
        lines = {(group.size, group.precision, group.row) for group in table.groups()}
        for size, precisions in table.document.get("published", {}).items():
            for precision, rows in precisions.items():
                assert {(size, precision, row) for row in rows} <= lines, path.stem


def test_options_are_merged_base_size_row_precision(tmp_path):
    text = TABLE.replace(
        "[precision.high]", "[precision.high]\nset.train.batch_size = 4\nrow.spam.optim.threshold = 7.0"
    )
    text += "\n[base]\ntrain = { batch_size = 2, seq_len = 32 }\n[size.tiny]\nset.train.seq_len = 64\n"
    plan = plan_of(tmp_path, text)
    config = plan.cell(SPAM, "sweep", 1e-3, 5).config
    assert (config.train.batch_size, config.train.seq_len, config.seed) == (4, 64, 5)
    assert config.optim.options == {"reset_interval": 100, "threshold": 7.0}
    assert plan.cell(ADAM, "sweep", 1e-3, 0).config.optim.options == {}


def test_a_row_may_have_its_own_rates_and_options_at_one_size(tmp_path):
    text = TABLE + "\n[size.tiny.row.spam]\nrates = [3e-4]\nset.optim.reset_interval = 7\n"
    plan = plan_of(tmp_path, text)
    assert plan.table.rates(SPAM) == [3e-4] and len(plan.table.rates(ADAM)) == 4, "as they are, without the factor"
    assert plan.cell(SPAM, "final", 3e-4, 0).config.optim.options == {"reset_interval": 7}
    with pytest.raises(EvenstepError, match=r"unknown key 'size\.tiny\.row\.spam\.rate'"):
        plan_of(tmp_path, text.replace("rates = [3e-4]", "rate = 3e-4"))


# ---- the settings of the published runs ----


def cells_of(*scales):
    for path in TABLES:
        for scale in scales:
            plan = plan_at(path, scale)
            for group in plan.groups:
                yield path.stem, group, plan.cell(group, "final", plan.table.rates(group)[0], 0).config


def test_stable_spam_in_16_bits_has_the_published_schedule():
    count = 0
    for table, group, config in cells_of(*SCALES):
        if config.optim.name == "stable_spam" and config.lowbit is None:
            count += 1
            assert config.optim.options.get("total_steps") == config.total_steps, (table, group)
            assert (config.optim.options["gamma1"], config.optim.options["gamma2"]) == (0.85, 0.99999), (table, group)
    assert count >= 20
    sweep = plan_at(ROOT / "recipes/tables/stable-spam-2.toml", "small").cell(
        Group("stable_spam", "bf16", "tiny"), "sweep", 1e-3, TUNING_SEED
    )
    assert sweep.config.optim.options["total_steps"] == 245, "as long as this run, not as the longer one"
    recipes = [load_config(path) for path in sorted((ROOT / "recipes").glob("*.toml")) if "finetune" not in path.name]
    # Robust statistics are not published: that recipe has the gammas that the stability suite measured.
    published = [each for each in recipes if not each.optim.options.get("preset")]
    ours = [each for each in published if each.optim.name == "stable_spam" and each.lowbit is None]
    assert len(ours) >= 7 and all(each.optim.options.get("total_steps") == each.total_steps for each in ours)


def test_spam_leaves_no_more_steps_unclipped_after_a_short_interval_than_the_paper():
    for table, group, config in cells_of("small", "smoke"):
        given = config.optim.options
        if config.optim.name == "spam" and 0 < given.get("reset_interval", 500) < 500:
            assert given["clip_start"] <= 20 / 500 * given["reset_interval"], (table, group)


def test_rates_gammas_and_intervals_that_the_papers_scripts_have():
    scale = plan_at(ROOT / "recipes/tables/scale-1.toml", "paper").table
    rates = {group.size: scale.rates(group) for group in scale.groups() if group.row == "scale"}
    assert rates == {"60m": [1e-3], "130m": [1e-3], "350m": [1e-3], "1b": [2e-4]}
    assert scale.options(Group("scale", "bf16", "1b"))["optim"]["adam_lr"] == 1e-3
    recipe = load_config(ROOT / "recipes/c4-1b-scale.toml").optim
    assert (recipe.lr, recipe.options["adam_lr"]) == (2e-4, 1e-3)
    fronts = plan_at(ROOT / "recipes/tables/stable-spam-3.toml", "small").table
    for row in ("lion_ada", "adam_mini_ada"):
        assert "gamma1=0.85, gamma2=0.999)" in fronts.options(Group(row, "fp4", "tiny"))["optim"]["before"]
    bits = plan_at(ROOT / "recipes/tables/stable-spam-1.toml", "paper").table
    intervals = [
        bits.options(Group("stable_spam", "fp4", size))["optim"].get("reset_interval") for size in ("130m", "350m")
    ]
    assert intervals == [None, 500]
    for name in ("fp4", "int4"):
        assert load_config(ROOT / f"recipes/lowbit-c4-350m-{name}.toml").optim.options["reset_interval"] == 500


def test_a_scale_is_laid_over_the_table_and_includes_under_it(tmp_path):
    write_table(tmp_path, "title = 'below'\npaper = 'kept'\n[scale.small]\n", "below.toml")
    text = "include = ['below.toml']\n" + TABLE.replace('paper = "none"\n', "")
    table = load_table(write_table(tmp_path, text), "other")
    assert (table.title, table.document["paper"]) == ("a test", "kept")
    assert table.document["final"] == {"tokens": 4000, "seeds": [7]}
    first = {"a": {"b": 1, "c": [1]}}
    assert merged(first, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}} and first == {"a": {"b": 1, "c": [1]}}


MISTAKES = [
    (("paper", "papre"), "unknown key 'papre'; did you mean 'paper'"),
    (("rows =", "rwos ="), "unknown key 'grid.rwos'; did you mean 'rows'"),
    (("factor", "faktor"), "unknown key 'row.spam.faktor'"),
    (('rows = ["adam", "spam"]', 'rows = ["adm"]'), "row 'adm'; did you mean 'adam'"),
    (('precisions = ["high"]', 'precisions = ["hihg"]'), "precision 'hihg'; did you mean 'high'"),
    (('than = "adam/high"', 'than = "adam/hgih"'), "'adam/hgih' is not a line of this table; did you mean 'adam/high'"),
    (('name = "adam"', 'name = "adamm"'), "adam/high/tiny: optim.name: 'adamm'"),
    (('sizes = ["tiny"]', "sizes = []"), "grid.sizes is missing or empty"),
    (("tokens = 4000", ""), "size tiny has no budget"),
]


@pytest.mark.parametrize("change, why", MISTAKES, ids=[why[:30] for _, why in MISTAKES])
def test_a_mistake_in_a_table_is_one_line(tmp_path, change, why):
    text = TABLE.replace("tokens = 1000\n", "") if change[0] == "tokens = 4000" else TABLE
    text = text.replace(*change)
    with pytest.raises(EvenstepError) as caught:
        plan_of(tmp_path, text)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EvenstepError, match=r"no scale 'smal'; did you mean 'small'"):
        load_table(write_table(tmp_path), "smal")


# ---- order, rates, seeds ----


def test_rates_go_from_the_middle_outwards_and_rows_have_their_own(tmp_path):
    plan = plan_of(tmp_path)
    assert [cell.lr for cell in plan.sweep(ADAM, {})] == [2e-3, 4e-3, 1e-3, 8e-3]
    assert [cell.lr for cell in plan.sweep(SPAM, {})] == [1e-3, 2e-3, 5e-4, 4e-3]
    assert all(cell.tokens == 1000 and cell.seed == TUNING_SEED for cell in plan.sweep(ADAM, {}))


def test_a_stored_sweep_of_the_old_seed_is_used_until_there_is_one_of_the_new(tmp_path):
    def swept(seed):
        plan = plan_of(tmp_path, TABLE.replace("extend = 1", f"extend = 0\nseed = {seed}"))
        return {cell.name: ended(3.0) for cell in plan.sweep(ADAM, {})}

    def chosen(stored, text=None):
        text = text or TABLE.replace("extend = 1", "extend = 0")
        plan = Plan(load_table(write_table(tmp_path, text), "small"), stored)
        assert plan.tuning_seed[SPAM] != OLD_TUNING_SEED, "a line without stored runs"
        assert {cell.seed for cell in plan.sweep(ADAM, {})} == {plan.tuning_seed[ADAM]}
        return plan.tuning_seed[ADAM]

    old, new = swept(OLD_TUNING_SEED), swept(TUNING_SEED)
    assert (chosen({}), chosen(old), chosen(new), chosen({**old, **new})) == (100, 0, 100, 100)
    half = dict([*new.items()][:2])
    assert chosen({**old, **half}) == 0 and chosen(half) == 100, "half a sweep chooses no rate"
    assert chosen(old, TABLE.replace("extend = 1", "extend = 0\nseed = 101")) == 101


def test_stored_outcomes_are_found_under_the_hash_of_their_configuration():
    """A new option must not change the names of stored runs, see `config_hash`."""
    stored = Store(ROOT / "benchmarks" / "results" / "tables").outcomes
    plan = Plan(load_table(ROOT / "recipes" / "tables" / "mix-ln-1.toml", "small"), stored)
    for row in ("pre", "mix"):
        group = Group(row, "bf16", "tiny")
        assert [cell.name in stored for cell in plan.finals(group, stored)] == [True] * 3


def test_seeds_are_trained_at_the_best_rate_once_the_sweep_is_done(tmp_path):
    plan = plan_of(tmp_path)
    valley = {1e-3: 3.2, 2e-3: 3.0, 4e-3: 2.9, 8e-3: 3.1}
    outcomes = {}
    for cell in plan.sweep(ADAM, {}):
        assert plan.finals(ADAM, outcomes) == []
        outcomes[cell.name] = ended(valley[cell.lr])
    finals = plan.finals(ADAM, outcomes)
    assert [(cell.lr, cell.seed, cell.tokens) for cell in finals] == [(4e-3, 0, 4000), (4e-3, 1, 4000)]


def test_a_rate_beyond_a_worse_one_is_left_out(tmp_path):
    plan = plan_of(tmp_path)
    losses = {2e-3: 3.0, 4e-3: 3.1}
    outcomes = {c.name: ended(losses[c.lr]) for c in plan.sweep(ADAM, {}) if c.lr in losses}
    assert sorted(cell.lr for cell in plan.sweep(ADAM, outcomes)) == [1e-3, 2e-3, 4e-3]
    losses[4e-3] = 3.01  # within what a seed does
    outcomes = {c.name: ended(losses[c.lr]) for c in plan.sweep(ADAM, {}) if c.lr in losses}
    assert 8e-3 in [cell.lr for cell in plan.sweep(ADAM, outcomes)]
    everything = plan_of(tmp_path, TABLE.replace("extend = 1", "extend = 0\nall = true"))
    assert len(everything.sweep(ADAM, {c.name: ended(9.0 * c.lr) for c in everything.sweep(ADAM, {})})) == 4


@pytest.mark.parametrize("falls, rate", [(True, 1.6e-2), (False, 5e-4)])
def test_beyond_an_outermost_best_rate_one_more_is_tried(tmp_path, falls, rate):
    plan = plan_of(tmp_path)
    outcomes = settled(plan, lambda cell: 3.0 - (1 if falls else -1) * math.log(cell.lr) / 10)
    found = sorted(cell.lr for cell in plan.sweep(ADAM, outcomes))
    assert found[-1 if falls else 0] == pytest.approx(rate)
    assert plan.best_rate(ADAM, outcomes) == pytest.approx(rate)  # extend = 1: no further


def test_a_rate_that_was_given_up_is_never_the_best(tmp_path):
    plan = plan_of(tmp_path)
    cells = plan.sweep(ADAM, {})
    outcomes = {cell.name: ended(3.0 + cell.lr) for cell in cells}
    outcomes[cells[2].name] = Outcome(HOPELESS, 0.1, "why", 500)
    outcomes[cells[0].name] = Outcome(DIVERGED, None, "why", 500)
    assert plan.best_rate(ADAM, outcomes) == 4e-3
    assert plan.best_rate(ADAM, {c.name: Outcome(DIVERGED, None, "", 0) for c in cells}) is None
    assert plan.finals(ADAM, {c.name: Outcome(DIVERGED, None, "", 0) for c in cells}) == []


def test_lines_of_a_claim_are_settled_before_the_rest(tmp_path):
    text = TABLE.replace('rows = ["adam", "spam"]', 'rows = ["lion", "adam", "spam"]')
    text = text.replace("[precision.high]", "[row.lion]\nset.optim.name = 'lion'\n[precision.high]")
    plan = plan_of(tmp_path, text)
    outcomes: dict = {}
    order = []
    while waiting := [cell for _, cell in plan.wanted(outcomes) if cell.name not in outcomes]:
        order.append(waiting[0])
        outcomes[waiting[0].name] = ended(3.0 + abs(math.log(waiting[0].lr / 2e-3)))
    rows = [cell.group.row for cell in order]
    assert rows.index("lion") == rows.count("adam") + rows.count("spam")
    assert [cell.stage for cell in order[:2]] == ["sweep", "sweep"] and {c.group.row for c in order[:2]} == {
        "adam",
        "spam",
    }


def test_final_cells_may_be_the_claimed_ones(tmp_path):
    text = TABLE.replace('rows = ["adam", "spam"]', 'rows = ["adam", "spam", "other"]')
    text = text.replace("[precision.high]", "[row.other]\nset.optim.name = 'adam'\n[precision.high]")
    for cells, expected in (('["claimed"]', [True, True, False]), ('["other/high"]', [False, False, True])):
        table = load_table(
            write_table(tmp_path, text.replace("seeds = [0, 1]", f"seeds = [0, 1]\ncells = {cells}")), "small"
        )
        assert [table.has_final(group) for group in table.groups()] == expected


def test_two_tables_share_a_run_that_is_the_same(tmp_path):
    first = plan_of(tmp_path)
    text = (
        TABLE.replace("[row.adam]", "[row.plain]")
        .replace('rows = ["adam"', 'rows = ["plain"')
        .replace("adam/", "plain/")
    )
    text = text.replace("\n[published.60m.high]\nadam = 34.09\n", "")
    second = plan_of(tmp_path, text)
    a = first.cell(ADAM, "sweep", 1e-3, 0)
    assert a.name == second.cell(Group("plain", "high", "tiny"), "sweep", 1e-3, 0).name
    assert a.name != first.cell(ADAM, "final", 1e-3, 0).name != first.cell(ADAM, "final", 1e-3, 1).name


# ---- hopeless cells ----


def test_a_cell_is_hopeless_far_above_another_rate_at_the_same_tokens():
    good = [(at, 4.0 - at / 1000) for at in range(100, 1100, 100)]
    late = int(1000 * PATIENCE)
    bad = [(at, 4.0 + MARGIN) for at in range(100, late + 1, 100)]
    assert "another rate had" in (hopeless(bad, [good], 1000) or "")
    assert hopeless(bad[:-1], [good], 1000) is None  # too early to say
    assert hopeless(bad, [], 1000) is None
    assert hopeless(bad, [good[:2]], 1000) is None  # the other one is not as far
    near = [(at, loss + MARGIN * 0.9) for at, loss in good[: late // 100]]
    assert hopeless(near, [good], 1000) is None


def test_rivals_are_the_other_rates_of_the_line_and_none_of_a_seed(tmp_path):
    plan = plan_of(tmp_path)
    cells = plan.sweep(ADAM, {})
    plan.sweep(SPAM, {})
    assert {cell.lr for cell in plan.rivals(cells[0])} == {1e-3, 4e-3, 8e-3}
    assert plan.rivals(plan.cell(ADAM, "final", 2e-3, 0)) == []
