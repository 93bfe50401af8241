"""What a run does when something fails, stops it or contradicts it: nothing is lost, and the way on works."""

import errno
import math
import os
import shlex
import signal
import sys
import tomllib

import pytest
import torch
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.train import checkpoint
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.config_io import load_config
from evenstep.train.interrupts import Interrupted
from evenstep.train.log import read_metrics
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def silent(_: str) -> None:
    pass


def kept(out):
    return sorted(path.name for path in list_checkpoints(out / "checkpoints"))


def poison(run, at):
    """The loss of step ``at`` is NaN."""
    real, calls = run.model.loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == at else 1.0)

    run.model.loss = loss


def advised(message):
    """The arguments of the last command in a message."""
    return shlex.split(message.rpartition("evenstep pretrain ")[2].rstrip("."))


def trains(*words):
    return cli.main(["pretrain", *words, "--train.steps", "2", "--checkpoint.every", "0"]) == 0


# ---- budgets ----


def test_a_budget_below_the_steps_done_is_refused_and_nothing_is_written(corpus, tmp_path):
    out = tmp_path / "run"
    Run(quick(corpus, out), say=silent).fit()
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for change, word in ({"train__steps": "4"}, "train.steps 4"), ({"train__tokens": "256"}, "train.tokens 256"):
        overrides = dict(quick_overrides(corpus, out, **change))
        if "train.tokens" in overrides:
            del overrides["train.steps"]
        with pytest.raises(EvenstepError, match=f"{word} ends at step 4.*has already done 8"):
            Run.resume(out, load_config(None, list(overrides.items())), say=silent)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_run_at_its_end_says_so(corpus, tmp_path):
    Run(quick(corpus, tmp_path / "run"), say=silent).fit()
    said: list[str] = []
    Run.resume(tmp_path / "run", say=said.append).fit()
    assert "nothing left to do" in "\n".join(said) and (tmp_path / "run" / "summary.json").exists()


# ---- divergence ----


def test_the_rescue_before_a_nan_deletes_nothing_and_the_advice_works(corpus, tmp_path):
    out = tmp_path / "run"
    run = Run(quick(corpus, out, checkpoint__every="2", checkpoint__keep="1"), say=silent)
    poison(run, 4)
    with pytest.raises(EvenstepError) as caught:
        run.fit()
    message = str(caught.value)
    assert kept(out) == ["step-000002", "step-000003"]
    assert "step-000003, but may already be ruined" in message and "good" not in message
    assert "the checkpoint before is" in message and "step-000002" in message
    words = advised(message)
    assert words[words.index("--model.init") + 1].endswith("step-000002") and float(words[4]) == 0.0003
    assert trains(*words) and (tmp_path / "run-2" / "summary.json").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_a_nan_before_any_checkpoint_has_a_way_on_too(corpus, tmp_path, at):
    out = tmp_path / "run"
    run = Run(quick(corpus, out), say=silent)
    poison(run, at)
    with pytest.raises(EvenstepError) as caught:
        run.fit()
    assert ("--resume" in str(caught.value)) == (at == 2) == bool(kept(out))
    assert "--model.init" not in str(caught.value) and trains(*advised(str(caught.value)))


# ---- a run without checkpoints ----


def test_a_run_that_saved_nothing_can_be_started_again(corpus, tmp_path):
    out = tmp_path / "run"
    run = Run(quick(corpus, out), say=silent)
    poison(run, 1)
    with pytest.raises(EvenstepError):
        run.fit()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    with pytest.raises(EvenstepError, match="no checkpoint yet; start it again with") as caught:
        Run.resume(out, say=silent)
    assert trains(*advised(str(caught.value)))
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record] == [1, 2]
    for path in list_checkpoints(out / "checkpoints"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(EvenstepError, match="finished run"):
        Run(quick(corpus, out), say=silent)


def test_a_full_disk_at_the_first_save_promises_no_checkpoint(corpus, tmp_path, monkeypatch):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)

    def full(*_):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")  # noqa: B904 - as torch does

    monkeypatch.setattr("evenstep.train.trainer.write_tensors", full)
    with pytest.raises(EvenstepError) as caught:
        run.fit()
    message = str(caught.value)
    assert "No space left on device" in message and "enforce" not in message
    assert "intact" not in message and "--resume" not in message
    monkeypatch.undo()
    assert trains(*advised(message))


def test_an_error_without_words_is_told_by_its_type(tmp_path):
    assert "RuntimeError" in str(checkpoint.could_not_save(tmp_path / "checkpoints", 1, RuntimeError()))


# ---- signals and readers that go away ----


def test_a_signal_ends_a_validation_and_the_resumed_log_is_the_same(corpus, tmp_path):
    options = {"eval__every": "2", "eval__batch_size": "1", "checkpoint__every": "0"}
    run = Run(quick(corpus, tmp_path / "run", **options), say=silent)
    real, batches = run.model.loss, []

    def loss(*args, **kwargs):
        if not run.model.training:
            batches.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    run.model.loss = loss
    with pytest.raises(Interrupted, match="after step 2 of 8"):
        run.fit()
    assert len(batches) == 1 and kept(tmp_path / "run") == ["step-000002"]
    Run.resume(tmp_path / "run", say=silent).fit()
    Run(quick(corpus, tmp_path / "whole", **options), say=silent).fit()

    def facts(out):
        return [(r["step"], r.get("loss"), r.get("val_loss")) for r in read_metrics(out / "metrics.jsonl")]

    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_a_signal_before_the_first_step_loses_nothing(corpus, tmp_path, monkeypatch):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)
    real = Run.train
    monkeypatch.setattr(Run, "train", lambda *parts: (os.kill(os.getpid(), signal.SIGTERM), real(*parts)))
    with pytest.raises(Interrupted, match="after step 0"):
        run.fit()
    monkeypatch.undo()
    assert Run.resume(tmp_path / "run", say=silent).fit()["steps"] == 8


def test_the_second_interrupt_says_what_there_is(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run.loader.next_batch = twice
    with pytest.raises(Interrupted, match="without saving; start it again with") as caught:
        run.fit()
    assert caught.value.exit_status == 130


def test_a_reader_that_goes_away_does_not_end_the_run(corpus, tmp_path, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert Run(quick(corpus, tmp_path / "run")).fit()["steps"] == 8
        monkeypatch.undo()
    assert kept(tmp_path / "run") == ["step-000004", "step-000008"]


# ---- a given model ----


def test_a_given_model_is_recorded_and_not_contradicted(corpus, tmp_path):
    first = Run(quick(corpus, tmp_path / "first", model__norm="mix", model__norm_alpha="0.5"), say=silent)
    where = str(first.save())
    asked = dict(quick_overrides(corpus, tmp_path / "second", model__init=where))
    del asked["model.size"]
    second = Run(load_config(None, list(asked.items())), say=silent)
    written = tomllib.loads((tmp_path / "second" / "config.toml").read_text())["model"]
    assert written == {"size": "tiny", "norm": "mix", "norm_alpha": 0.5, "init": where}
    assert second.config.name == "tiny-adamw"
    for change in (
        {"model__size": "9m"},
        {"model__norm": "post"},
        {"model__norm_alpha": "0.25"},
        {"model__qk_norm": "true"},
    ):
        name = next(iter(change)).replace("__", ".")
        with pytest.raises(EvenstepError, match=f"{name} .* contradicts the model in .*leave it out"):
            Run(quick(corpus, tmp_path / "third", model__init=where, **change), say=silent)
    second.save()
    for path in sorted(first.out.rglob("*"), reverse=True):  # a resume needs the checkpoint alone
        path.rmdir() if path.is_dir() else path.unlink()
    assert Run.resume(tmp_path / "second", say=silent).config.model == second.config.model


def test_qk_norm_is_trained_saved_and_exported(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", model__qk_norm="true"), say=silent)
    norms = [p for name, p in run.model.named_parameters() if "q_norm" in name or "k_norm" in name]
    before = [p.detach().clone() for p in norms]
    run.fit()
    assert len(norms) == 2 * run.model.config.num_layers
    assert not any(torch.equal(p, q) for p, q in zip(norms, before, strict=True))
    resumed = Run.resume(tmp_path / "run", say=silent)
    assert resumed.model.config.qk_norm
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True))


# ---- what is checked before the long work ----


@pytest.mark.parametrize("fault", ["out", "safetensors"])
def test_what_would_fail_late_fails_before_the_text_is_read(corpus, tmp_path, monkeypatch, fault):
    (tmp_path / "file").write_text("")
    out = tmp_path / ("file/run" if fault == "out" else "run")
    if fault == "safetensors":
        for name in ("safetensors", "safetensors.torch"):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EvenstepError, match="cannot be created" if fault == "out" else "pip install"):
        Run(quick(corpus, out, data__cache_dir=str(tmp_path / "cache")), say=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# ---- without validation, and the text at the end ----


def test_a_run_without_validation(corpus, tmp_path, capsys):
    assert cli.main(["pretrain", *flags(quick_overrides(corpus, tmp_path / "run", data__val_fraction="0"))]) == 0
    assert "no validation" in capsys.readouterr().out
    assert not [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in r]


def test_a_models_text_cannot_command_the_terminal():
    from evenstep.console import printable

    assert printable("a\x1b[2J\tb\nc\x9b\x7f\r\u00e9") == "a\\x1b[2J\tb\nc\\x9b\\x7f\\r\u00e9"
