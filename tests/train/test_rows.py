"""``evenstep rows``: the text of the rows that events name is the text that was trained on."""

import json
import shutil

import pytest
from train_support import quick, write_corpus

from evenstep import cli
from evenstep.errors import EvenstepError
from evenstep.train.runs import parse_rows, prepared_rows, rows_of
from evenstep.train.trainer import Run


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and the batches that it has read."""
    folder = tmp_path_factory.mktemp("rows")
    corpus = write_corpus(folder / "corpus.jsonl")
    run = Run(quick(corpus, folder / "run", train__steps="3", eval__every="0"), say=quiet)
    batches, read = [], run.loader.next_batch
    run.loader.next_batch = lambda: batches.append(read()) or batches[-1]
    run.fit()
    texts = [run.tokenizer.decode(row.tolist()) for inputs, _ in batches for row in inputs]
    return folder, corpus, texts


def test_rows_are_what_was_trained_on(trained, capsys):
    folder, _, texts = trained
    assert len(texts) == 12
    found = [*rows_of(folder / "run", 0, 12)]
    assert all(text.startswith(seen) for (_, text), seen in zip(found, texts, strict=True))
    assert cli.main(["rows", str(folder / "run"), "5-7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("== row 5: epoch 1, tokens ") and texts[5] in out and texts[6] in out and texts[7] not in out


def test_the_rows_of_a_bad_batch_are_random_tokens(trained):
    folder, corpus, texts = trained
    config = quick(corpus, folder / "bad", train__steps="3", eval__every="0", data__bad_batch="2", log__report="true")
    said = []
    run = Run(config, say=said.append)
    assert any("the batch of step 2 is random tokens" in line for line in run.header())
    run.fit()
    found = [*rows_of(folder / "bad", 0, 12)]
    random = ["random tokens (data.bad_batch 2)" in head for head, _ in found]
    assert random == 4 * [False] + 4 * [True] + 4 * [False]
    assert [text.startswith(seen) for (_, text), seen in zip(found, texts, strict=True)] == [not x for x in random]
    log = [json.loads(line) for line in (folder / "bad" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in log if "loss" in record and "kind" not in record}
    assert losses[2] > losses[1] and losses[2] > losses[3]
    assert (folder / "bad" / "report.html").stat().st_size > 50_000
    assert f"report:     {(folder / 'bad' / 'report.html').resolve().as_uri()}" in said and "spikes:     none" in said


def test_a_report_shows_rows_only_where_their_tokens_are_in_the_cache(trained, capsys):
    folder, _, texts = trained
    run = folder / "run"
    spike = {"kind": "event", "event": "spike", "step": 3, "count": 1, "tensors": [{"name": "a", "ratio": 400.0}]}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(spike | {"rows": [8, 12]}) + "\n")
    assert cli.main(["report", str(run)]) == 0
    assert json.dumps(texts[9][:20])[1:-1] in (run / "report.html").read_text()
    read = prepared_rows(run)
    assert [text for _, text in read(8, 10)] == [text for _, text in rows_of(run, 8, 10)]
    cache = folder / "cache"
    cache.rename(folder / "away")
    try:
        assert prepared_rows(run) is None and not (cache / "tokens").exists()
        assert cli.main(["report", str(run)]) == 0
        assert texts[9][:20] not in (run / "report.html").read_text()
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        (folder / "away").rename(cache)


def test_rows_of_later_epochs_are_found_too(trained):
    folder, _, _ = trained
    [(head, text)] = rows_of(folder / "run", 10**6, 10**6 + 1)
    assert head.startswith("row 1000000: epoch ") and text


@pytest.mark.parametrize(
    "words", ["", "x", "3-", "-3", "3-3", "8-6", "1-2-3", "1.5-3", "٣-٤", "0-99999999999999999999"]
)
def test_rows_that_are_none_are_one_line(trained, capsys, words):
    assert cli.main(["rows", str(trained[0] / "run"), words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("evenstep: error: ") and err.count("\n") == 1


def test_a_single_row_needs_no_dash():
    assert parse_rows("7") == (7, 8) and parse_rows("264-272") == (264, 272)


def test_no_run_and_another_text_are_refused(trained, tmp_path):
    with pytest.raises(EvenstepError, match="not a run"):
        rows_of(tmp_path, 0, 1)
    folder, corpus, _ = trained
    kept = corpus.read_text()
    try:
        corpus.write_text("".join(line + "\n" for line in reversed(kept.splitlines())))
        with pytest.raises(EvenstepError, match=r"other tokens than .* has now"):
            rows_of(folder / "run", 0, 1)
    finally:
        corpus.write_text(kept)


@pytest.mark.slow
def test_rows_of_a_tuned_run_are_its_examples(trained, tmp_path):
    examples = [{"prompt": f"say {i}", "completion": f"the {i}"} for i in range(20)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    words = ["finetune", str(trained[0] / "run"), "--data", str(tmp_path / "e.jsonl"), "--out", str(tmp_path / "tuned")]
    assert cli.main([*words, "--train.steps", "2", "--train.batch_size", "2", "--train.seq_len", "16"]) == 0
    found = [text for _, text in rows_of(tmp_path / "tuned", 0, 4)]
    assert len(found) == 4 and all("say" in text and "the" in text for text in found)
