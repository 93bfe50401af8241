"""``--resume RUN@STEP --out NEW``: a run that goes on from a checkpoint of another one, with changed options."""

import json

import pytest
from parallel_support import by_step, silent
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep import cli
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.runs import list_runs, table
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

OPTIONS = {"optim__name": "stable_spam", "train__steps": "12", "checkpoint__keep": "9"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A finished run with checkpoints of the steps 4, 8 and 12."""
    out = tmp_path_factory.mktemp("base") / "run"
    Run(quick(corpus, out, **OPTIONS), say=silent).fit()
    return out


def go_on(base, out, *words, step="@4"):
    return cli.main(["pretrain", "--resume", f"{base}{step}", "--out", str(out), *words])


def test_without_a_change_it_repeats_the_run(base, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    assert go_on(base, tmp_path / "new") == 0
    assert by_step(tmp_path / "new") == by_step(base), "the log has the steps of the other run too"
    assert before == {path: path.stat().st_mtime_ns for path in base.rglob("*")}, "the other run is as it was"
    assert json.loads((tmp_path / "new" / "parent.json").read_text()) == {"run": str(base.resolve()), "step": 4}


def test_a_changed_rate_changes_the_steps_that_follow_and_keeps_the_state(base, tmp_path):
    assert go_on(base, tmp_path / "new", "--optim.lr", "3e-4", "--optim.gamma3", "0.5") == 0
    ours, theirs = by_step(tmp_path / "new"), by_step(base)
    assert {step: ours[step] for step in range(1, 6)} == {step: theirs[step] for step in range(1, 6)}
    assert ours[7] != theirs[7]
    run = Run.resume(tmp_path / "new", say=silent)
    group = run.optimizer.param_groups[0]
    assert group["gamma3"] == 0.5 and group["t"] == 12 and run.config.optim.lr == 3e-4


def test_another_optimizer_starts_with_an_empty_state_and_says_so(base, tmp_path, capsys):
    assert go_on(base, tmp_path / "new", "--optim.name", "adamw") == 0
    assert "empty state: optim.name was stable_spam and is adamw" in capsys.readouterr().out
    run = Run.resume(tmp_path / "new", say=silent)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {8}


def test_a_stored_state_in_another_dtype_starts_anew(base, tmp_path, capsys):
    assert go_on(base, tmp_path / "new", "--optim.state", "bf16") == 0
    assert "empty state: optim.state was none and is bf16" in capsys.readouterr().out


def test_without_a_step_it_goes_on_from_the_newest_with_a_larger_budget(base, tmp_path):
    assert go_on(base, tmp_path / "new", "--train.steps", "14", "--schedule.name", "constant", step="") == 0
    assert list(by_step(tmp_path / "new")) == list(range(1, 15))


def test_other_rows_are_read_from_the_beginning(base, tmp_path, capsys):
    assert go_on(base, tmp_path / "new", "--train.seq_len", "8") == 0
    assert "the data are read from the beginning" in capsys.readouterr().out


def test_a_new_run_that_is_killed_at_once_needs_the_other_no_more(base, corpus, tmp_path):
    from evenstep.train.checkpoint import Parent

    config = quick(corpus, tmp_path / "new", **OPTIONS)
    run = Run(config, say=silent, parent=Parent(base, 8))
    run.lock = None
    assert [path.name for path in list_checkpoints(tmp_path / "new" / "checkpoints")] == ["step-000008"]
    again = Run.resume(tmp_path / "new", say=silent)
    again.fit()
    assert by_step(tmp_path / "new") == by_step(base)


def test_the_list_of_runs_is_a_tree(base, tmp_path):
    top = base.parent
    assert go_on(base, top / "child") == 0 and go_on(top / "child", top / "grandchild", step="@8") == 0
    assert [row.name for row in list_runs(top)] == ["run", "+ child", "  + grandchild"]
    assert "  + grandchild" in table(list_runs(top))


@pytest.mark.parametrize(
    "step, words, says",
    [
        ("@5", [], "has no checkpoint of step 5; it has those of steps 4, 8, 12"),
        ("@8", ["--train.steps", "6"], "ends at step 6"),
        ("@8", ["--model.size", "9m"], "was trained with model.size tiny, and its weights do not fit 9m"),
        ("@8", ["--data.vocab_size", "310"], "was trained with data.vocab_size 300, and its weights do not fit 310"),
    ],
)
def test_what_does_not_fit_leaves_no_directory(base, tmp_path, capsys, step, words, says):
    assert go_on(base, tmp_path / "new", *words, step=step) != 0
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_going_back_needs_a_new_directory(base, corpus, capsys):
    assert cli.main(["pretrain", "--resume", f"{base}@4"]) != 0
    error = capsys.readouterr().err
    assert "which would undo the later ones; give a new directory for it, --out" in error
    # A directory whose name looks like a step of a run is that directory.
    odd = base.parent / "odd@4"
    assert cli.main(["pretrain", *flags(quick_overrides(corpus, odd, train__steps="2"))]) == 0
    assert cli.main(["pretrain", "--resume", str(odd), "--train.steps", "3"]) == 0
