"""Faults with real processes, each once; the soak repeats them at random moments. And what is done about a bad loss."""

import math
import random
import sys

import pytest
from faults import FAULTS, OPTIONS, all_whole, job, lose_one, newest
from parallel_support import ROOT, Job, by_step, losses, silent, train
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import facts_of, list_checkpoints, load_model_state
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def whole(corpus, out, **options):
    train(2, corpus, (out, OPTIONS | options, False, None))
    return by_step(out)


@linux
@pytest.mark.slow
def test_a_run_survives_a_kill_while_saving_one_process_less_and_a_sigterm(corpus, tmp_path):
    """Three faults in a row on one run; then it ends with the losses of a run that nothing happened to."""
    options, out, draw = {"train__steps": "30"}, tmp_path / "run", random.Random(0)
    for name in ("kill_in_save", "terminate"):
        FAULTS[name](corpus, out, draw, **options)
    assert 0 < newest(out) < 25
    with job(corpus, out, restarts=2, **options) as running:
        lose_one(running, out, draw)
        assert running.end() == 0, running.said()[-3000:]
        assert running.said().count("step 30/30") == 1, "one process writes"
    all_whole(out)
    assert by_step(out) == whole(corpus, tmp_path / "whole", **options)


@linux
def test_a_run_survives_a_kill_while_saving_and_one_process_less(corpus, tmp_path):
    """Two faults in a row on one run; then it ends with the losses of a run that nothing happened to."""
    options, out, draw = {"train__steps": "20"}, tmp_path / "run", random.Random(0)
    FAULTS["kill_in_save"](corpus, out, draw, **options)
    assert newest(out) < 15
    with job(corpus, out, restarts=2, **options) as running:
        lose_one(running, out, draw)
        assert running.end() == 0, running.said()[-3000:]
        assert running.said().count("step 20/20") == 1, "one process writes"
    all_whole(out)
    assert by_step(out) == whole(corpus, tmp_path / "whole", **options)


@linux
@pytest.mark.slow
def test_who_is_missing_is_named(corpus, tmp_path):
    FAULTS["stand_still"](corpus, tmp_path / "run", random.Random(0))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_survived(corpus, tmp_path, name):
    out, draw = tmp_path / "run", random.Random(0)
    FAULTS["terminate"](corpus, out, draw)
    FAULTS["kill_all"](corpus, out, draw)
    FAULTS[name](corpus, out, draw)
    with job(corpus, out) as running:
        assert running.end() == 0, running.said()[-3000:]
    assert by_step(out) == whole(corpus, tmp_path / "whole")


@linux
@pytest.mark.slow
def test_torchrun_starts_a_run_anew_without_being_told_to_resume(corpus, tmp_path):
    out = tmp_path / "run"
    with Job(2, corpus, out, restarts=1, **OPTIONS) as running:
        running.wait_for(lambda: newest(out) > 0)
        running.signal(1, 9)
        assert running.end() == 0, running.said()[-3000:]
    assert by_step(out) == whole(corpus, tmp_path / "whole")


# ---- a save in the background ----


def full(*_):
    raise OSError(28, "No space left on device")


def test_an_error_in_the_background_ends_the_run_with_one_line(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run = Run(quick(corpus, out, checkpoint__every="2", train__steps="40"), say=silent)
    monkeypatch.setattr(
        "evenstep.train.saving.facts_of", lambda path: full() if run.saver.last == 4 else facts_of(path)
    )
    with pytest.raises(EvenstepError, match=r"could not save the checkpoint of step 4 .*No space left"):
        run.fit()
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-000002"]
    assert not list((out / "checkpoints").glob(".step-*"))
    assert run.step_number < 40, "it was noticed while the training went on"


def test_a_save_is_of_its_moment_though_training_goes_on(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)
    run.step()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    path = run.save(wait=False)
    for _ in range(3):
        run.step()
    run.saver.wait()
    saved = load_model_state(path)
    assert all((saved[name] == before[name]).all() for name in before)


# ---- a loss that is not finite ----


def poisoned(run, positions):
    """The loss is NaN on the batches that start there."""
    real, loader = run.model.loss, run.loader
    size = run.config.train.batch_size

    def loss(*args, **options):
        bad = loader.position - size in positions and run.model.training
        return real(*args, **options) * (math.nan if bad else 1.0)

    run.model.loss = loss
    return run


def test_skip_leaves_the_batch_out_and_does_the_step_with_the_next(corpus, tmp_path):
    said: list[str] = []
    run = poisoned(Run(quick(corpus, tmp_path / "run", train__on_nan="skip"), say=said.append), {8, 12})
    summary = run.fit()
    assert run.skipped == [(8, 12), (12, 16)] and summary["skipped_sequences"] == 8 and summary["steps"] == 8
    assert run.loader.position == 10 * 4 and "sequences 8 to 11 are skipped" in "\n".join(said)
    plain = Run(quick(corpus, tmp_path / "plain"), say=silent)
    expected = [plain.step().loss.item() for _ in range(2)]
    plain.loader.position = 16
    expected += [plain.step().loss.item() for _ in range(6)]
    assert list(by_step(tmp_path / "run").values()) == expected
    again = Run.resume(tmp_path / "run", say=silent)
    assert again.skipped == run.skipped


def test_rewind_goes_back_and_leaves_the_batch_out_then(corpus, tmp_path):
    said: list[str] = []
    options = {"checkpoint__every": "2", "optim__name": "stable_spam", "train__steps": "9"}
    run = poisoned(Run(quick(corpus, tmp_path / "run", train__on_nan="rewind", **options), say=said.append), {20})
    run.fit()
    assert run.skipped == [(20, 24)] and run.loader.position == 10 * 4
    assert any("step 6: the loss is not finite; back to" in line and "step-000004" in line for line in said)
    assert list(by_step(tmp_path / "run")) == list(range(1, 10))
    plain = Run(quick(corpus, tmp_path / "plain", **options), say=silent)
    expected = []
    for step in range(1, 10):
        plain.loader.position += 4 * (step == 6)
        expected.append(plain.step().loss.item())
    assert list(by_step(tmp_path / "run").values()) == expected


@pytest.mark.parametrize("policy, words", [("skip", "11th time"), ("rewind", "no checkpoint to go back to")])
def test_a_policy_that_does_not_help_ends_the_run(corpus, tmp_path, policy, words):
    run = Run(quick(corpus, tmp_path / "run", train__on_nan=policy), say=silent)
    poisoned(run, set(range(0, 1000, 4)))
    with pytest.raises(EvenstepError, match=words):
        run.fit()


def _skips(run):
    if run.world.rank == 1:  # it alone sees the bad number
        poisoned(run, {16})
    run.fit()
    assert run.skipped == [(16, 20)], run.skipped


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_processes_skip_together(corpus, tmp_path, mode):
    options = {"parallel__mode": mode, "train__on_nan": "skip"}
    train(2, corpus, (tmp_path / "run", options, False, _skips))
    assert len(losses(tmp_path / "run")) == 10


# ---- what is refused before any work ----

REFUSED = [
    ({"RANK": "0"}, {"parallel.mode": "ddp"}, "WORLD_SIZE is not in the environment"),
    ({}, {"parallel.mode": "fsdp"}, "needs several processes; start them with torchrun"),
    ({"WORLD": "2"}, {}, "parallel.mode is none, but there are 2 processes"),
    ({"WORLD": "3"}, {"parallel.mode": "ddp"}, "batch_size 4 is not divisible by the 3 processes"),
    (
        {"WORLD": "2"},
        {"parallel.mode": "ddp", "train.batch_size": "6", "train.micro_batch_size": "2"},
        "3 sequences each",
    ),
    ({"WORLD": "4"}, {"parallel.mode": "tp+fsdp", "parallel.tensor": "3"}, "parallel.tensor 3 does not divide"),
    ({"WORLD": "4"}, {"parallel.mode": "hsdp", "parallel.replicate": "3"}, "parallel.replicate 3 does not divide"),
    ({}, {"parallel.mode": "ddp", "parallel.tensor": "2"}, "parallel.tensor 2 has no effect with parallel.mode ddp"),
    (
        {"WORLD": "2"},
        {"parallel.mode": "tp+fsdp", "parallel.tensor": "2", "lowbit": "fp4"},
        "lowbit fp4 cannot be used with",
    ),
    ({"RANK": "x", "WORLD": "2"}, {"parallel.mode": "ddp"}, "torchrun's environment is not a number"),
    ({"TORCHELASTIC_MAX_RESTARTS": "3", "WORLD": "2"}, {"parallel.mode": "ddp", "out": None}, "needs --out"),
]


@pytest.mark.parametrize("environment, options, words", REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_does_not_fit_is_one_line_before_anyone_waits(
    corpus, tmp_path, monkeypatch, capsys, environment, options, words
):
    environment = dict(environment)
    if world := environment.pop("WORLD", None):
        rank = environment.get("RANK", "0")
        place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        environment = environment | place | {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = dict(quick_overrides(corpus, tmp_path / "run")) | options
    arguments = flags([(key, value) for key, value in given.items() if value is not None])
    monkeypatch.chdir(ROOT)
    status = cli.main(["pretrain", *arguments])
    err = capsys.readouterr().err
    assert status == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
