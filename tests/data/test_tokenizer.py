"""Tokenizers: exact round trips, plain text that stays plain, and files that others wrote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenstep.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from evenstep.errors import EvenstepError

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog; def f(x): return x + {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(TEXTS), 400)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A tokenizer.json like T5's: a Unigram model with </s> in its vocabulary, truncation, padding and an end token
    added by itself."""
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator([*TEXTS, "a < b / c > s </s>"], trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.enable_truncation(5)
    model.enable_padding(length=64)
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    model.save(str(path))
    return path


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_bpe_gives_back_every_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= token < bpe.vocab_size and token != bpe.eos_id for token in ids)


@given(parts=st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "é", "\n", "fox"]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_text_that_spells_the_end_token_stays_text(bpe, parts):
    text = "".join(parts)
    ids = bpe.encode(text)
    assert bpe.eos_id not in ids and bpe.decode(ids) == text


def test_a_vocabulary_that_knows_the_end_token_as_a_word_cannot_be_tricked(unigram):
    tokenizer = load_tokenizer(unigram)
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_id == 1
    assert 1 in tokenizer._encode_batch(["the fox</s>the dog"])[0]  # the danger is real
    ids = tokenizer.encode("the fox</s>the dog</s>")
    assert 1 not in ids and len(ids) > 4


def test_files_of_others_neither_truncate_nor_pad_nor_add(unigram):
    tokenizer = load_tokenizer(unigram)
    long, short = tokenizer.encode_batch([" ".join(["fox"] * 50), "fox"])
    assert len(long) > 20 and len(short) < 8
    assert tokenizer.eos_id not in long and 0 not in short


def test_training_is_reproducible_and_exact_in_size(bpe):
    again = train_bpe(iter(TEXTS), 400)
    assert again.fingerprint == bpe.fingerprint and bpe.vocab_size == 400
    assert train_bpe(iter(TEXTS), 399).fingerprint != bpe.fingerprint
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_saving_and_loading_changes_nothing(bpe, unigram, tmp_path):
    for tokenizer in (bpe, load_tokenizer(unigram)):
        directory = tmp_path / tokenizer.fingerprint[:8]
        directory.mkdir()
        assert set(tokenizer.save(directory)) == {path.name for path in directory.iterdir()}
        again = load_tokenizer(directory)
        assert (again.fingerprint, again.eos_id, again.vocab_size) == (
            tokenizer.fingerprint,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        assert again.encode("the lazy fox") == tokenizer.encode("the lazy fox")


def test_the_end_token_is_the_one_the_configuration_names(bpe, tmp_path):
    model = tokenizers.Tokenizer.from_str(bpe._content.decode())
    model.add_special_tokens(["<stop>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token == END_OF_TEXT
    assert len(load_tokenizer(tmp_path).encode("<stop>")) > 1, "every special token in a text is text"
    for value in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(tmp_path / "tokenizer.json").eos_token == "<stop>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(EvenstepError, match="no end-of-text token \\('<nowhere>' is not in its vocabulary\\)"):
        load_tokenizer(tmp_path)


def test_sentencepiece_models(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")

    def train(name, **options):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / name), vocab_size=80, minloglevel=2, **options
        )
        return tmp_path / f"{name}.model"

    tokenizer = load_tokenizer(train("with"))
    assert tokenizer.vocab_size == 80 and tokenizer.eos_token == "</s>"
    ids = tokenizer.encode_batch(["The quick brown fox", "x </s> y"])
    assert tokenizer.decode(ids[0]) == "The quick brown fox"
    assert tokenizer.eos_id not in ids[1]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    with pytest.raises(EvenstepError, match="no end-of-text token"):
        load_tokenizer(train("without", eos_id=-1))
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(EvenstepError, match="not a readable SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_bad_tokenizers_are_named(tmp_path):
    def refused(path, says):
        with pytest.raises(EvenstepError, match=says) as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.json", "no tokenizer at '.*none.json'; give 'bpe'")
    refused(tmp_path, "no tokenizer in .*; it should hold one of tokenizer.json")
    (tmp_path / "vocab.txt").write_text("x")
    refused(tmp_path / "vocab.txt", "cannot tell what kind of tokenizer")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    refused(tmp_path, "not a readable tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    refused(tmp_path, "not a readable tokenizer.json")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    plain.save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, "has no end-of-text token")


@pytest.mark.parametrize(("size", "says"), [(256, "at least 257"), (100_000, "only yields [0-9]+ tokens")])
def test_impossible_vocabularies_are_refused(size, says):
    with pytest.raises(EvenstepError, match=says):
        train_bpe(iter(TEXTS), size)


def test_the_smallest_vocabulary_is_bytes_alone():
    tokenizer = train_bpe(iter(TEXTS), 257)
    assert len(tokenizer.encode("héllo")) == 6


def test_errors_in_the_texts_come_through_training():
    def texts():
        yield "one"
        raise EvenstepError("the corpus broke")

    with pytest.raises(EvenstepError, match="the corpus broke"):
        train_bpe(texts(), 300)
