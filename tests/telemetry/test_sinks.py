import os
import subprocess
import sys
import types
import warnings

import pytest
from telemetry_support import write_run
from train_support import quick, write_corpus

from evenstep.errors import EvenstepError
from evenstep.telemetry.schema import read_records, to_line
from evenstep.telemetry.sinks import MLFLOW_PENDING, Guarded, JsonlSink, MlflowSink, TensorBoardSink, opened, scalars
from evenstep.train.trainer import Run


@pytest.fixture
def records(tmp_path):
    return read_records(write_run(tmp_path / "given", steps=40, lowbit=True) / "metrics.jsonl")


def test_jsonl_holds_what_was_written(tmp_path, records):
    sink = JsonlSink(tmp_path / "log.jsonl")
    for record in records:
        sink.write(record)
    assert read_records(tmp_path / "log.jsonl") == records  # each line is there at once
    sink.close()


def test_scalars_of_every_kind(records):
    found = {}
    for record in records:
        found |= scalars(record)
    assert found["train/loss"] > 0 and found["validation/val_loss"] == 3.1
    assert found["telemetry/spike_rate"] == 0.001 and found["telemetry/norm_after"] > 0
    assert max(scalars(r).get("telemetry/max_ratio", 0) for r in records) == 143.0
    assert found["lowbit/model.embed_tokens.weight/gradient_error"] == 0.3
    assert not any(name.endswith("/step") for name in found)


def test_tensorboard_can_read_its_files(tmp_path, records):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path / "tb")
    for record in records:
        sink.write(record)
    sink.close()
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    expected = [(r["step"], pytest.approx(r["loss"])) for r in records if "loss" in r]
    assert losses == expected
    assert "events/spike/text_summary" in found.Tags()["tensors"]


# What a background process or thread writes is whole when the program has ended: the sinks of others run in one of
# their own, beside a run that the program has opened itself.
PROGRAM = """
import sys
from pathlib import Path
import {package}
from evenstep.telemetry.schema import read_records
from evenstep.telemetry import sinks
{package}.init(project="own", **{options})
sink = sinks.{sink}
for record in read_records(Path(sys.argv[1])):
    sink.write(record)
sink.close()
{package}.log({{"still/mine": 1.0}})
{package}.finish()
"""


def written_by(tmp_path, package, sink, options):
    pytest.importorskip(package)
    write_run(tmp_path / "given", steps=40)
    names = ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_DIR", "TRACKIO_DIR")
    words = [sys.executable, "-c", PROGRAM.format(package=package, sink=sink, options=options)]
    words.append(str(tmp_path / "given" / "metrics.jsonl"))
    place = {name: str(tmp_path) for name in names}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | place, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


def test_wandb_offline_writes_a_run_that_can_be_synced(tmp_path):
    sink = f"WandbSink({str(tmp_path / 'run')!r}, 'run', config={{'seed': 3}})"
    (tmp_path / "run").mkdir()
    written_by(tmp_path, "wandb", sink, {"mode": "offline"})
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    (own,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"telemetry/max_ratio" in log.read_bytes() and b"train/loss" in log.read_bytes()
    assert b"still/mine" in own.read_bytes() and b"train/loss" not in own.read_bytes()


def test_trackio_keeps_the_numbers(tmp_path):
    written_by(tmp_path, "trackio", "TrackioSink('run', config={'seed': 3})", {"embed": False})
    stored = {path.stem: path.read_bytes() for path in tmp_path.rglob("*.db*")}
    assert b"train/loss" in stored["evenstep"] and b"telemetry/max_ratio" in stored["evenstep"]
    assert b"still/mine" in stored["own"] and b"train/loss" not in stored["own"]


MLFLOW = """
import sys
from pathlib import Path
import mlflow
from evenstep.telemetry.schema import read_records
from evenstep.telemetry.sinks import MlflowSink
with mlflow.start_run() as own:
    sink = MlflowSink("run", config={"seed": 3, "optim": {"lr": 0.1}})
    for record in read_records(Path(sys.argv[1])):
        sink.write(record)
    sink.close()
    mlflow.log_metric("still/mine", 1.0)
client = mlflow.MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("evenstep").experiment_id])
assert run.info.status == "FINISHED" and run.data.params == {"seed": "3", "optim.lr": "0.1"}
losses = client.get_metric_history(run.info.run_id, "train/loss")
print(sorted((one.step, one.value) for one in losses))
assert "telemetry/max_ratio" in run.data.metrics and "still/mine" not in run.data.metrics
assert [*client.get_run(own.info.run_id).data.metrics] == ["still/mine"]
"""


def test_mlflow_keeps_the_numbers_in_a_run_of_its_own(tmp_path):
    pytest.importorskip("mlflow")
    write_run(tmp_path / "given", steps=40)
    log = tmp_path / "given" / "metrics.jsonl"
    # Files, because a data base needs a package that mlflow-skinny leaves out
    place = {"MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    words = [sys.executable, "-c", MLFLOW, str(log)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | place, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [(record["step"], record["loss"]) for record in read_records(log) if "loss" in record]
    assert done.stdout.strip() == str(expected)


class Client:
    """In place of mlflow's client. The request of number ``failing`` fails."""

    failing = 0

    def __init__(self):
        self.sent, self.ended = 0, []

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="1")

    def create_run(self, experiment, run_name):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))

    def log_batch(self, run, metrics):
        self.sent += 1
        if self.sent == self.failing:
            raise ConnectionError("no network")

    def set_terminated(self, run):
        self.ended.append(run)


@pytest.fixture
def mlflow_sink(monkeypatch):
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.MlflowClient, entities.Param, entities.Metric = Client, tuple, lambda *values: values
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return MlflowSink("run")


def test_mlflow_tells_of_an_early_failure_and_ends_the_run_all_the_same(mlflow_sink, monkeypatch):
    monkeypatch.setattr(Client, "failing", 1)
    for step in range(3):
        mlflow_sink.write({"step": step, "loss": 1.0})
    with pytest.raises(ConnectionError):
        mlflow_sink.close()
    assert mlflow_sink._client.ended == ["7"]


def test_mlflow_looks_at_each_request_after_a_bounded_number_of_others(mlflow_sink, monkeypatch):
    monkeypatch.setattr(Client, "failing", 2)
    with pytest.raises(ConnectionError):
        for step in range(MLFLOW_PENDING + 2):
            mlflow_sink.write({"step": step, "loss": 1.0})
    assert len(mlflow_sink._sent) == MLFLOW_PENDING  # of 102, two have been looked at
    mlflow_sink.close()
    assert mlflow_sink._client.sent == MLFLOW_PENDING + 2


class Failing:
    def __init__(self):
        self.calls = 0

    def write(self, record):
        self.calls += 1
        raise ConnectionError("no network\nand more")

    def close(self):
        raise AssertionError("it was dropped")


def test_a_sink_that_fails_warns_once_and_is_left_alone():
    sink = Failing()
    guarded = Guarded(sink)
    with pytest.warns(UserWarning, match=r"Failing could not write \(no network\); training goes on"):
        guarded.write({"step": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded.write({"step": 2})
        guarded.close()
    assert sink.calls == 1


def test_a_sink_that_cannot_start_warns_and_one_not_installed_is_an_error():
    def offline():
        raise OSError("no route to host")

    def missing():
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

    with pytest.warns(UserWarning, match="wandb could not be started .no route to host"):
        assert opened(offline, "wandb") is None
    with pytest.raises(EvenstepError, match="pip install 'wandb'"):
        opened(missing, "wandb")


def test_a_run_feeds_the_sinks_it_was_told_to(tmp_path, monkeypatch):
    made = []

    class Keeper:
        def __init__(self, directory):
            self.directory, self.records, self.open = directory, [], True
            made.append(self)

        def write(self, record):
            self.records.append(record)

        def close(self):
            self.open = False

    monkeypatch.setattr("evenstep.train.telemetry.TensorBoardSink", Keeper)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    Run(quick(corpus, tmp_path / "run", telemetry__tensorboard="true"), say=lambda *_: None).fit()
    (sink,) = made
    assert sink.directory == tmp_path / "run" / "tensorboard" and not sink.open
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "".join(map(to_line, sink.records)) == log
