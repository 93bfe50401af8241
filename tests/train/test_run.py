import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep.errors import EvenstepError
from evenstep.train.checkpoint import list_checkpoints
from evenstep.train.evaluate import evaluate
from evenstep.train.interrupts import Interrupted
from evenstep.train.log import read_metrics
from evenstep.train.trainer import Run
from evenstep.train.weights import load_model

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def silent(_: str) -> None:
    pass


def train(config, steps):
    run = Run(config, say=silent)
    return run, [run.step().loss.item() for _ in range(steps)]


def assert_same_tensors(one, other, where="state"):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_tensors(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_tensors(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


# ---- resume ----

RESUMES = [
    ("adamw", {"train__clip_norm": "1"}, 4),
    ("adam", {"schedule__name": "wsd"}, 4),
    ("stable_spam", {"optim__reset_interval": "5", "optim__total_steps": "12"}, 7),
    ("spam", {"optim__reset_interval": "5", "optim__warmup_steps": "4", "optim__density": "0.25"}, 6),
    ("scale", {"train__micro_batch_size": "2"}, 4),
    ("stable_spam", {"optim__lr_scale__embedding": "10", "optim__lr_scale__last": "0.5"}, 5),
    ("muon", {"optim__lr_scale__embedding": "3", "optim__weight_decay": "0.1"}, 5),
]


@pytest.mark.parametrize("name, options, stop", RESUMES, ids=[case[0] for case in RESUMES])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(corpus, tmp_path, name, options, stop):
    steps = 12
    options = {"optim__name": name, "train__steps": str(steps), **options}
    if name == "muon":  # it computes in bf16, which takes minutes for size tiny on a processor without AVX-512
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320, **shape}))
        options |= {"model__config": str(tmp_path / "config.json")}
    whole, losses = train(quick(corpus, tmp_path / "whole", **options), steps)
    first, head = train(quick(corpus, tmp_path / "cut", **options), stop)
    first.save()
    torch.manual_seed(99)  # whatever the process did meanwhile
    second = Run.resume(tmp_path / "cut", say=silent)
    tail = [second.step().loss.item() for _ in range(steps - stop)]
    assert head + tail == losses
    assert_same_tensors(dict(whole.model.named_parameters()), dict(second.model.named_parameters()), "model")
    assert_same_tensors(whole.optimizer.state_dict(), second.optimizer.state_dict(), "optimizer")
    assert whole.loader.position == second.loader.position == steps * 4


def test_random_states_are_restored(corpus, tmp_path):
    import random

    import numpy as np

    run, _ = train(quick(corpus, tmp_path / "run"), 1)
    run.save()
    drawn = [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]
    random.seed(8), torch.manual_seed(8), np.random.seed(8)
    Run.resume(tmp_path / "run", say=silent)
    assert [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()] == drawn


def test_fit_after_resume_writes_the_same_log(corpus, tmp_path):
    """Also when the checkpoint lies between two log lines and between two validations."""
    options = {"train__steps": "14", "log__every": "4", "eval__every": "6", "checkpoint__every": "5"}
    whole = Run(quick(corpus, tmp_path / "whole", **options), say=silent).fit()
    Run(quick(corpus, tmp_path / "cut", **options), say=silent).fit()
    for path in list_checkpoints(tmp_path / "cut" / "checkpoints"):
        if path.name not in ("step-000010",):
            shutil.rmtree(path)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "tok')  # torn by a kill
    again = Run.resume(tmp_path / "cut", say=silent).fit()

    def facts(out):
        keys = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "perplexity", "bits_per_byte")
        return [{key: record.get(key) for key in keys} for record in read_metrics(out / "metrics.jsonl")]

    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    assert [(r["step"], r["loss"] is None) for r in facts(tmp_path / "cut")] == [
        (4, False), (6, True), (8, False), (12, False), (12, True), (14, False), (14, True),
    ]  # fmt: skip
    for key in ("val_loss", "train_loss", "sample", "tokens", "steps"):
        assert again[key] == whole[key]


def test_resuming_a_finished_run_repeats_nothing(corpus, tmp_path):
    first = Run(quick(corpus, tmp_path / "run"), say=silent).fit()
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = Run.resume(tmp_path / "run", say=silent).fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    assert (again["val_loss"], again["sample"]) == (first["val_loss"], first["sample"])
    assert again["seconds"] >= read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["seconds"]


def test_a_longer_budget_trains_on(corpus, tmp_path):
    from evenstep.train.config_io import load_config

    Run(quick(corpus, tmp_path / "run", train__steps="4", schedule__name="constant"), say=silent).fit()
    longer = quick_overrides(corpus, tmp_path / "run", train__steps="6", schedule__name="constant")
    run = Run.resume(tmp_path / "run", load_config(None, longer), say=silent)
    assert run.fit()["steps"] == 6
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optim__name": "adam"}, ["optim.name (it was adamw, given is adam)"]),
        ({"model__norm": "post"}, ["model.norm (it was pre"]),
        ({"train__batch_size": "8"}, ["train.batch_size (it was 4, given is 8)"]),
        ({"data__vocab_size": "310"}, ["data.vocab_size (it was 300"]),
        ({"optim__lr": "0.5", "train__seq_len": "8"}, ["optim.lr (it was 0.003", "train.seq_len"]),
    ],
)
def test_resuming_another_run_is_refused_by_name_and_value(corpus, tmp_path, change, words):
    run, _ = train(quick(corpus, tmp_path / "run"), 1)
    run.save()
    with pytest.raises(EvenstepError) as caught:
        Run.resume(tmp_path / "run", quick(corpus, tmp_path / "run", **change), say=silent)
    assert all(word in str(caught.value) for word in ["another", *words])


def test_resuming_on_changed_text_is_refused(tmp_path):
    own = write_corpus(tmp_path / "own.jsonl")
    run, _ = train(quick(own, tmp_path / "run", data__tokenizer="bpe"), 1)
    run.save()
    write_corpus(own, seed=1)
    with pytest.raises(EvenstepError, match=r"another tokenizer|other tokens"):
        Run.resume(tmp_path / "run", say=silent)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(corpus, tmp_path):
    run, _ = train(quick(corpus, tmp_path / "run"), 2)
    run.save()
    run.step()
    newest = next(run.save().glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    assert Run.resume(tmp_path / "run", say=said.append).step_number == 2
    assert "step-000003" in said[0] and newest.name in said[0]


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(EvenstepError, match="not a run"):
        Run.resume(tmp_path, say=silent)


def test_a_run_that_trains_elsewhere_is_left_alone(corpus, tmp_path):
    from evenstep.train.files import is_running, locked

    run, _ = train(quick(corpus, tmp_path / "run"), 1)
    run.save()
    with locked(tmp_path / "run"):
        assert is_running(tmp_path / "run")
        with pytest.raises(EvenstepError, match="another process"):
            Run.resume(tmp_path / "run", say=silent)
    assert not is_running(tmp_path / "run")


# ---- the step ----


@pytest.mark.parametrize("micro", ["1", "2"])
def test_accumulation_gives_the_step_of_the_whole_batch(corpus, tmp_path, micro):
    one, losses = train(quick(corpus, tmp_path / "one", optim__eps="1e-3"), 4)
    other, others = train(quick(corpus, tmp_path / "other", optim__eps="1e-3", train__micro_batch_size=micro), 4)
    assert others == pytest.approx(losses, rel=1e-5)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ragged_micro_batches_weigh_by_tokens(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)
    inputs, targets = run.loader.next_batch()
    whole = run._accumulate(inputs, targets)
    expected = [p.grad.clone() for p in run.parameters]
    run.optimizer.zero_grad()
    run.micro_batch_size = 3  # 4 sequences come as 3 + 1
    ragged = run._accumulate(inputs, targets)
    torch.testing.assert_close(ragged, whole)
    for p, grad in zip(run.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_norm_and_reports_the_one_before(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", train__clip_norm="0.01"), say=silent)
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in run.parameters]).item())
    )
    assert run.step().grad_norm.item() > 0.1
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_the_rate_follows_the_schedule(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", schedule__warmup_steps="4"), say=silent)
    rates = []
    for _ in range(8):
        run.step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:4] == pytest.approx([0.00075, 0.0015, 0.00225, 0.003])
    assert rates[-1] == pytest.approx(0.0003)


def test_loss_falls_and_seeds_decide(corpus, tmp_path):
    _, first = train(quick(corpus, tmp_path / "a", train__steps="40", schedule__name="constant"), 40)
    _, again = train(quick(corpus, tmp_path / "b", train__steps="40", schedule__name="constant"), 3)
    _, other = train(quick(corpus, tmp_path / "c", seed="1"), 1)
    assert first[-1] < first[0] - 1.5
    assert first[:3] == again and first[0] != other[0]


@pytest.mark.parametrize(
    "options",
    [
        {"train__dtype": "bf16-autocast"},
        {"train__dtype": "bf16"},
        {"train__activation_checkpointing": "true"},
        {"train__loss_chunk": "16"},
        {"train__deterministic": "true"},
        {"model__norm": "mix"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_way_to_train_gives_a_close_first_loss(corpus, tmp_path, options):
    _, plain = train(quick(corpus, tmp_path / "plain"), 1)
    try:
        run, losses = train(quick(corpus, tmp_path / "other", **options), 2)
        run.save()
        resumed = Run.resume(tmp_path / "other", say=silent)
        assert_same_tensors(dict(run.model.named_parameters()), dict(resumed.model.named_parameters()), "model")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == pytest.approx(plain[0], abs=0.3 if "model__norm" in options else 0.02) and losses[1] < losses[0]


def test_a_nan_loss_stops_before_the_weights_are_touched(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run", checkpoint__every="2", log__every="100"), say=silent)
    real, calls = run.model.loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) == 4 else 1.0)

    run.model.loss = poisoned
    with pytest.raises(EvenstepError) as caught:
        run.fit()
    message = str(caught.value)
    assert "nan at step 4" in message and "step-000003" in message and "--resume" in message and "\n" not in message
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert sorted(kept) == ["step-000002", "step-000003"], "the third step is saved, so nothing is lost"
    _, plain = train(quick(corpus, tmp_path / "plain"), 4)
    assert Run.resume(tmp_path / "run", say=silent).step().loss.item() == plain[3], "the batch is read again"


def test_weights_that_one_update_destroyed_are_never_saved(corpus, tmp_path):
    """The loss of that step was still finite; keeping such a checkpoint would push out the good one."""
    run = Run(quick(corpus, tmp_path / "run", checkpoint__every="1", checkpoint__keep="1"), say=silent)
    hook = lambda *_: run.parameters[3].data.fill_(math.nan) if run.step_number == 2 else None  # noqa: E731
    run.optimizer.register_step_post_hook(hook)
    with pytest.raises(EvenstepError, match=r"weights is not finite at step 3.*step-000002"):
        run.fit()
    assert Run.resume(tmp_path / "run", say=silent).step_number == 2


def test_a_nan_that_nobody_looked_at_is_never_saved(corpus, tmp_path):
    run, _ = train(quick(corpus, tmp_path / "run"), 2)
    run.window.loss += math.nan  # as on a GPU between two log steps
    with pytest.raises(EvenstepError, match="nan"):
        run.save_finite(wait=True)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.slow
def test_a_compiled_run_trains_and_resumes(corpus, tmp_path):
    _, plain = train(quick(corpus, tmp_path / "plain"), 3)
    run, losses = train(quick(corpus, tmp_path / "run", train__compile="true"), 2)
    run.save()
    again = Run.resume(tmp_path / "run", say=silent)
    assert [*losses, again.step().loss.item()] == pytest.approx(plain, rel=1e-4)
    assert run.evaluate().loss > 0


# ---- evaluation ----


def test_validation_weighs_every_token_the_same(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)
    inputs, targets = run.loader.next_batch()
    ragged = [(inputs[:3], targets[:3]), (inputs[3:, :5], targets[3:, :5])]
    result = evaluate(run.model, ragged, 2.5, device=run.device, autocast=run.autocast, chunk=None)
    with torch.no_grad():
        logits = [run.model(x).double().log_softmax(-1).gather(-1, y[..., None]).flatten() for x, y in ragged]
    expected = -torch.cat(logits).mean().item()
    assert result.tokens == 3 * 16 + 5
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 2.5, rel=1e-6)
    assert run.model.training


def test_validation_does_not_depend_on_its_batch_size_and_changes_nothing(corpus, tmp_path):
    results = []
    for size in ("1", "5", "64"):
        run = Run(quick(corpus, tmp_path / size, eval__batch_size=size, eval__max_tokens="0"), say=silent)
        before = torch.get_rng_state()
        results.append(run.evaluate())
        assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in run.parameters)
        assert results[-1].tokens == len(run.data.val) - 1
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6) == pytest.approx(results[2].loss, rel=1e-6)


def test_the_model_is_in_eval_mode_while_validated(corpus, tmp_path):
    run = Run(quick(corpus, tmp_path / "run"), say=silent)
    modes = []
    real = run.model.loss
    run.model.loss = lambda *a, **k: (
        modes.append((run.model.training, torch.is_inference_mode_enabled())) or real(*a, **k)
    )
    run.evaluate()
    assert set(modes) == {(False, True)}


# ---- the loop and its files ----


def test_fit_leaves_a_complete_run(corpus, tmp_path):
    pytest.importorskip("matplotlib")
    said: list[str] = []
    summary = Run(quick(corpus, tmp_path / "run", optim__name="stable_spam", log__curve="true"), say=said.append).fit()
    out = tmp_path / "run"
    assert {"config.toml", "metrics.jsonl", "summary.json", "curve.png", "checkpoints"} <= {
        p.name for p in out.iterdir()
    }
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in training] == list(range(1, 9))
    assert [record["step"] for record in validation] == [4, 8]
    wanted = {
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "data_share",
        "memory",
        "seconds",
        "steps_to_reset",
    }
    assert wanted == set(training[0])
    assert {"step", "tokens", "val_loss", "perplexity", "bits_per_byte", "val_tokens", "seconds"} == set(validation[0])
    assert training[2]["tokens"] == 3 * 4 * 16 and training[2]["steps_to_reset"] == 997
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["val_loss"] == validation[-1]["val_loss"] and summary["train_loss"] == training[-1]["loss"]
    assert summary["tokens"] == 8 * 64 and summary["tokens_per_second"] > 0 and summary["sample"]
    assert {"perplexity", "bits_per_byte", "seconds", "commit", "hardware", "versions", "config_hash"} <= set(summary)
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert any("evenstep generate" in line for line in said) and any("--resume" in line for line in said)
    saved = list_checkpoints(out / "checkpoints")
    assert [path.name for path in saved] == ["step-000008", "step-000004"]
    assert load_model(saved[0]).config.hidden_size == 128


def test_the_log_holds_the_mean_loss_since_the_last_line(corpus, tmp_path):
    _, losses = train(quick(corpus, tmp_path / "one", train__steps="7"), 7)
    Run(quick(corpus, tmp_path / "two", train__steps="7", log__every="3"), say=silent).fit()
    logged = [r["loss"] for r in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in r]
    assert logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]], rel=1e-6)


def test_an_existing_run_is_not_overwritten(corpus, tmp_path):
    Run(quick(corpus, tmp_path / "run"), say=silent).save()
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(EvenstepError, match=r"already has a run.*--resume.*--out"):
        Run(quick(corpus, tmp_path / "run", seed="7"), say=silent)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(EvenstepError, match="not an empty directory"):
        Run(quick(corpus, tmp_path / "mine"), say=silent)


def test_a_run_that_cannot_start_leaves_no_directory(corpus, tmp_path):
    with pytest.raises(EvenstepError):
        Run(quick(corpus, tmp_path / "run", optim__gammma="1"), say=silent)
    with pytest.raises(EvenstepError):
        Run(quick(corpus, tmp_path / "run", train__batch_size="100000"), say=silent)
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_given_model(corpus, tmp_path):
    first, _ = train(quick(corpus, tmp_path / "first"), 3)
    where = first.save()
    second = Run(quick(corpus, tmp_path / "second", model__init=str(where)), say=silent)
    assert_same_tensors(dict(first.model.named_parameters()), dict(second.model.named_parameters()), "model")
    assert second.step_number == 0
    with pytest.raises(EvenstepError, match=r"tokenizer has 320 entries, but the model .* only 300"):
        Run(quick(corpus, tmp_path / "third", model__init=str(where), data__vocab_size="320"), say=silent)


def test_the_chunk_rule(monkeypatch):
    from evenstep.train import task
    from evenstep.train.config import Config, TrainConfig

    monkeypatch.setattr(task, "total_memory", lambda device: 80e9)

    def rows(vocab, device="cpu", **options):
        return task.loss_chunk(Config(train=TrainConfig(steps=1, **options)), vocab, torch.device(device))

    assert rows(2048) == rows(2048, dtype="bf16") == rows(32000, batch_size=65536) == 256
    assert rows(2048, batch_size=1, seq_len=200) is None
    assert rows(32000, loss_chunk=0, batch_size=4096) is None
    assert rows(2048, loss_chunk=128) == 128
    assert rows(32000, "cuda") == 8 * 256  # all: also there the gradients are computed in the forward pass
    assert rows(32000, "cuda", batch_size=512) == 8384  # 1 GiB / (4 * 32000) = 8388, down to a multiple of 64


@pytest.fixture
def hangups_count():
    """SIGHUP as a terminal delivers it, also when the suite itself runs under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(corpus, tmp_path, number):
    run = Run(quick(corpus, tmp_path / "run", checkpoint__every="0"), say=silent)
    real = run.loader.next_batch
    run.loader.next_batch = lambda: (os.kill(os.getpid(), number) if run.step_number == 2 else None, real())[1]
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted) as caught:
        run.fit()
    assert caught.value.exit_status == 128 + number and "--resume" in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000003"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.01)


def test_sigterm_then_resume_of_the_program_is_bitwise_the_whole_run(corpus, tmp_path):
    """Two real processes: one is stopped by SIGTERM wherever it is, the other goes on."""
    options = {"train__steps": "40", "optim__name": "stable_spam", "optim__reset_interval": "25"}
    options |= {"checkpoint__every": "0", "eval__every": "0"}
    program = [sys.executable, "-m", "evenstep", "pretrain"]
    out = tmp_path / "run"
    first = subprocess.Popen(
        [*program, *flags(quick_overrides(corpus, out, **options))], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = out / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3, first)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 143, errors
    assert f"--resume {out}" in errors and "Traceback" not in errors
    stopped = max(record["step"] for record in read_metrics(log))
    assert stopped < 40
    done = subprocess.run([*program, "--resume", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = Run(quick(corpus, tmp_path / "whole", **options), say=silent)
    whole.fit()

    def losses(where):
        return [(r["step"], r["loss"]) for r in read_metrics(where / "metrics.jsonl") if "loss" in r]

    assert losses(out) == losses(tmp_path / "whole")
    final = load_model(out / "checkpoints" / "step-000040")
    assert_same_tensors(dict(whole.model.named_parameters()), dict(final.named_parameters()), "model")


def test_kill_while_saving_then_resume(corpus, tmp_path):
    """SIGKILL between the shards and the manifest: the next process goes on from the checkpoint before."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests/support")!r})
from pathlib import Path
from train_support import quick
from evenstep.train import saving
from evenstep.train.trainer import Run
from evenstep.train.weights import load_model
run = Run(quick(Path({str(corpus)!r}), Path({str(tmp_path / "run")!r})))
real = saving.commit
def killed(partial, step, *rest):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    real(partial, step, *rest)
saving.commit = killed
run.fit()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "run" / "checkpoints" / ".step-000008.partial").glob("shard-*.safetensors"))
    run = Run.resume(tmp_path / "run", say=silent)
    assert run.step_number == 4
    summary = run.fit()
    whole = Run(quick(corpus, tmp_path / "whole"), say=silent).fit()
    assert (summary["val_loss"], summary["train_loss"]) == (whole["val_loss"], whole["train_loss"])
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000008", "step-000004"]


@pytest.mark.parametrize(
    ("name", "fp32", "tf32", "bf16"),
    [
        ("NVIDIA H100 NVL", 60e12, 418e12, 835e12),
        ("NVIDIA H100 80GB HBM3", 67e12, 494e12, 989e12),
        ("NVIDIA GH200 480GB", 67e12, 494e12, 989e12),
        ("NVIDIA H20", 44e12, 74e12, 148e12),
        ("NVIDIA L40S", 91.6e12, 183e12, 362e12),
        ("NVIDIA L40", 90.5e12, 90.5e12, 181e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 156e12, 312e12),
        ("NVIDIA B300 SXM6 AC", 75e12, 1125e12, 2250e12),
        ("NVIDIA GB300", None, None, None),  # its peak is not that of a B300
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_whole_name(name, fp32, tf32, bf16, monkeypatch):
    from evenstep.train.hardware import peak_flops

    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops(device, "fp32") == fp32 and peak_flops(device, "bf16-autocast") == bf16
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(device, "fp32") == tf32 and peak_flops(device, "bf16") == bf16


def test_fp32_products_use_tf32_on_a_gpu_alone(monkeypatch):
    from evenstep.train.hardware import set_up_torch

    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_up_torch(0, False, torch.device("cpu"))
    assert asked == []
    set_up_torch(0, False, torch.device("cuda"))
    assert asked == ["high"]
