"""A run that has trained has a result, whatever fails of what is made for show; and output that cannot be written."""

import errno
import io
import json
import sys

import pytest
from train_support import flags, quick, quick_overrides, write_corpus

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.telemetry.schema import read_records
from evenstep.train import summary
from evenstep.train.log import LineProgress, print_line
from evenstep.train.runs import list_runs
from evenstep.train.task import Pretraining
from evenstep.train.trainer import Run

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def short(corpus, out, **more):
    return quick(corpus, out, **{"train__steps": "1", "eval__every": "0", "checkpoint__every": "0", **more})


def broken(*_, **__):
    raise RuntimeError("broken\non two lines")


FAILING = {
    "sample": (Pretraining, "sample", "no sample: broken"),
    "picture": (summary, "draw_curve", "no curve.png: broken"),
    "state": (summary, "state_bytes", "no size of the optimizer's state: broken"),
}


@pytest.mark.parametrize("part", FAILING)
def test_what_is_for_show_fails_no_run(corpus, tmp_path, monkeypatch, part):
    owner, name, words = FAILING[part]
    monkeypatch.setattr(owner, name, broken)
    said = []
    found = Run(short(corpus, tmp_path / "run", log__curve="true"), say=said.append).fit()
    assert words in said and any("continue:" in line for line in said)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"] == found["val_loss"] > 0
    assert list_runs(tmp_path / "run")[0].status == "finished"


def test_closing_lines_that_fail_fail_no_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "closing", staticmethod(broken))
    said = []
    assert Run(short(corpus, tmp_path / "run"), say=said.append).fit()["steps"] == 1
    assert "no closing lines: broken" in said


@pytest.mark.parametrize("problem", [MemoryError(), OSError(errno.ENOSPC, "No space left"), EvenstepError("x")])
def test_the_summary_is_there_before_the_sample(corpus, tmp_path, monkeypatch, problem):
    seen = []

    def look(*_):
        seen.append(json.loads((tmp_path / "run" / "summary.json").read_text())["steps"])
        raise problem

    monkeypatch.setattr(Pretraining, "sample", look)
    Run(short(corpus, tmp_path / "run"), say=lambda _: None).fit()
    assert seen == [1]


def test_without_matplotlib_it_says_so(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    Run(short(corpus, tmp_path / "run", log__curve="true"), say=said.append).fit()
    assert any(line.startswith("no curve.png: matplotlib") and "pip install" in line for line in said)


def test_a_picture_of_any_title_does_not_follow_a_link(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 2.0}\n')
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "curve.png").symlink_to(tmp_path / "mine")
    assert summary.draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "on text:/a/$x_{/$y")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_numbers_that_are_missing_are_left_out_of_the_closing_lines(tmp_path):
    facts = {"val_loss": 2.0, "perplexity": None, "bits_per_byte": None, "tokens": 10, "seconds": 1.0}
    facts |= {"tokens_per_second": None, "prompt": "", "sample": None, "steps": 5}
    lines = summary.closing_lines(tmp_path, facts, ["config.toml"])
    assert "validation loss 2.0000" in lines and any("evenstep report" in line for line in lines)


SPIKES = [
    {"step": 3, "tensors": [{"name": "model.layers.0.mlp.up_proj.weight", "ratio": 12.2}], "rows": [16, 24]},
    {"step": 7, "tensors": [{"name": "model.layers.3.self_attn.q_proj.weight", "ratio": 23.4}], "rows": [48, 56]},
]


@pytest.mark.parametrize("count, words", [(0, "none"), (1, "1 spike, x12 in layers.0.mlp.up_proj at step 3"), (2,
    "2 spikes, the worst x23 in layers.3.self_attn.q_proj at step 7")])  # fmt: skip
def test_the_closing_lines_name_the_largest_spike_and_where_to_read_its_batch(tmp_path, count, words):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"kind": "event", "event": "spike", **spike}) + "\n" for spike in SPIKES[:count]))
    first, *rest = summary.spike_lines(tmp_path, {"spikes": summary.spikes(read_records(log))})
    assert first.startswith(f"spikes:     {words}")
    assert [line.split()[1:] for line in rest] == (
        [["rows", str(tmp_path), ["16-24", "48-56"][count - 1]]] * (count > 0)
    )


def test_the_largest_spike_is_that_of_any_tensor():
    tensors = [{"name": "a", "ratio": 11.0}, {"name": "b", "ratio": 30.0}]
    events = [{"kind": "event", "event": "spike", **spike} for spike in [*SPIKES, {"step": 9, "tensors": tensors}]]
    found = summary.spikes(events)
    assert found == {"count": 3, "actions": 0, "step": 9, "tensor": "b", "ratio": 30.0, "rows": None}


def test_the_closing_lines_tell_of_the_guard(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "event": "guard", "step": 4, "action": "skip"}\n')
    facts = {"spikes": summary.spikes(read_records(tmp_path / "metrics.jsonl")), "skipped_sequences": 8}
    assert summary.spike_lines(tmp_path, facts) == ["guard:      1 action; 8 sequences left out", "spikes:     none"]


# ---- a model whose vocabulary is larger than the tokenizer's ----


def test_no_entry_beyond_the_tokenizer_is_written(corpus, tmp_path):
    import torch

    from evenstep.models import generate
    from evenstep.train.evaluate import sample_text

    run = Run(short(corpus, tmp_path / "run"), say=lambda _: None)
    with torch.no_grad():
        run.model.lm_head.weight[290:] = 0
        run.model.lm_head.weight[:290] = 0
    for temperature, top_k in ((0.0, None), (1.0, None), (1.0, 300), (1.0, 5)):
        draw = torch.Generator().manual_seed(0)
        new = generate(run.model, [0], 40, temperature=temperature, top_k=top_k, generator=draw, vocab_size=7)
        assert len(new) == 40 and max(new) < 7

    class Small:
        """As SentencePiece, which raises for an id that it does not have."""

        eos_id, vocab_size = 0, 50

        def encode(self, text):
            return []

        def decode(self, ids):
            assert max(ids, default=0) < 50
            return "text"

    assert sample_text(run.model, Small(), run.config.sample, 0) == "text"


# ---- output that cannot be written ----


class Narrow(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_character_without_a_code_is_an_escape(encoding):
    out = Narrow(encoding)
    print_line("größe 日本 \udcff", out)
    LineProgress(1, out).say("日")
    text = out.buffer.getvalue().decode(encoding)
    assert text.count("\n") == 2 and "\\udcff" in text and (encoding == "utf-8" or "\\u65e5" in text)


@pytest.mark.parametrize(
    "problem",
    [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "No space"), OSError(errno.EIO, "x"), None],
)
def test_output_that_cannot_be_written_falls_silent(problem, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            if problem is None:
                raise ValueError("I/O operation on closed file.")
            raise problem

    print_line("one", Gone())


def test_a_closed_output_falls_silent():
    out = io.StringIO()
    out.close()
    print_line("one", out)


@pytest.mark.parametrize("device", ["/dev/full", "latin-1", "closed"])
def test_a_run_whose_output_is_lost_ends_well(corpus, tmp_path, monkeypatch, device):
    out = open("/dev/full", "w") if device == "/dev/full" else Narrow("latin-1")  # noqa: SIM115
    if device == "closed":
        out.close()
    monkeypatch.setattr(sys, "stdout", out)
    more = {"train__steps": "1", "sample__prompt": "日本", "name": "größe 日本"}
    assert cli.main(["pretrain", *flags(quick_overrides(corpus, tmp_path / "run", **more))]) == 0
    assert list_runs(tmp_path / "run")[0].status == "finished"


def test_a_full_disk_behind_the_output_is_one_line(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["runs", str(tmp_path)]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == "evenstep: error: the output cannot be written (No space left on device)\n"


def test_memory_that_cannot_be_had_is_one_line():
    for problem in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        message, status = cli.explain(problem)
        assert status == 1 and message.startswith("error: the memory is full; give a smaller")


# ---- paths that are no UTF-8 ----

BYTES = "run\udcff"


def test_a_run_whose_path_is_no_text_is_refused_before_it_starts(corpus, tmp_path, capsys):
    words = flags(quick_overrides(corpus, tmp_path / BYTES))
    assert cli.main(["pretrain", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("evenstep: error: out: ") and "UTF-8" in err and err.count("\n") == 1
    assert not (tmp_path / BYTES).exists()


def test_a_run_that_was_moved_there_is_listed_reported_and_read(corpus, tmp_path, monkeypatch):
    Run(short(corpus, tmp_path / "run"), say=lambda _: None).fit()
    (tmp_path / "run").rename(tmp_path / BYTES)
    for words in (["runs"], ["report"]):
        monkeypatch.setattr(sys, "stdout", out := Narrow("utf-8"))
        assert cli.main([*words, str(tmp_path / BYTES)]) == 0, words
        monkeypatch.undo()
        assert out.buffer.getvalue()
    assert cli.main(["pretrain", "--resume", str(tmp_path / BYTES)]) == 2
