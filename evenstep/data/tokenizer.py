"""Conversion of text to tokens and back.

Two kinds of tokenizer have one interface: a ``tokenizer.json`` (the byte-level BPE that `train_bpe` trains, or any of
Hugging Face's) and a SentencePiece ``.model``. Both encode documents as *plain text*: the characters of the end-of-text
token within a document are encoded as characters and never as the token. Otherwise a web page that quotes
"<|endoftext|>" would become two documents.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evenstep.errors import EvenstepError, first_line

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
_USUAL_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


class Tokenizer(ABC):
    """The interface of a tokenizer.

    Attributes:
        vocab_size: the largest id + 1.
        eos_id: id of the end-of-text token.
        eos_token: its text.
        fingerprint: a hash of everything on which the ids depend.
    """

    vocab_size: int
    eos_id: int
    eos_token: str
    fingerprint: str

    @abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. For a byte-level BPE, ``decode(encode(text)) == text`` for every text."""

    @abstractmethod
    def save(self, directory: str | Path) -> list[str]:
        """Write the files that ``load_tokenizer(directory)`` reads; returns their names."""

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The token ids of many texts, computed on all cores."""
        rows = self._encode_batch(texts)
        return [self._spelt_out(text) if self.eos_id in row else row for text, row in zip(texts, rows, strict=True)]

    def _spelt_out(self, text: str) -> list[int]:
        # Some models (such as Unigram) find the text of the special token in their vocabulary. Each occurrence is cut
        # in its middle, so that it is encoded as two pieces of plain text.
        half = len(self.eos_token) // 2
        parts = text.split(self.eos_token)
        heads = ["", *([self.eos_token[half:]] * (len(parts) - 1))]
        tails = [*([self.eos_token[:half]] * (len(parts) - 1)), ""]
        rows = self._encode_batch([head + part + tail for head, part, tail in zip(heads, parts, tails, strict=True)])
        return [token for row in rows for token in row if token != self.eos_id]


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library. `save` writes the bytes of the file unchanged, so that its
    fingerprint stays the same."""

    FILE = "tokenizer.json"

    def __init__(self, content: bytes, eos_token: str | None = None, where: str = "tokenizer.json"):
        """``eos_token``: text of the end-of-text token. None: an added token with one of the usual names."""
        tokenizers = _tokenizers()
        with _native(f"{where} is not a readable tokenizer.json"):
            self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        # A file may configure truncation, padding and <bos>, none of which belong into packed training data.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that looks like a special token is text
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._model.get_added_tokens_decoder().values()}
        eos = eos_token or next((name for name in _USUAL_NAMES if name in added), None)
        if eos is None or eos not in vocabulary:
            missing = f"'{eos}' is not in its vocabulary" if eos else f"it has none of {', '.join(_USUAL_NAMES)}"
            raise EvenstepError(
                f"{where} has no end-of-text token ({missing}); "
                'name one in a tokenizer_config.json beside it: {"eos_token": "..."}'
            )
        self._content = content
        self.eos_token, self.eos_id = eos, vocabulary[eos]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(content + b"\0" + eos.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "JsonTokenizer":
        return cls(_read(path), _configured_eos(path.parent), str(path))

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        with _native(f"the {self.FILE} cannot encode this text"):
            return [row.ids for row in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        with _native(f"the {self.FILE} cannot decode these tokens"):
            return self._model.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: str | Path) -> list[str]:
        Path(directory, self.FILE).write_bytes(self._content)
        Path(directory, "tokenizer_config.json").write_text(
            json.dumps({"eos_token": self.eos_token}) + "\n", encoding="utf-8"
        )
        return [self.FILE, "tokenizer_config.json"]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``."""

    FILE = "tokenizer.model"

    def __init__(self, content: bytes, where: str = "tokenizer.model"):
        try:
            import sentencepiece
        except ImportError as error:
            raise EvenstepError(f"{where} needs the sentencepiece package; pip install 'evenstep[train]'") from error
        with _native(f"{where} is not a readable SentencePiece model"):
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        if self.vocab_size < 1:
            raise EvenstepError(f"{where} is not a readable SentencePiece model: it holds no pieces")
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise EvenstepError(f"{where} has no end-of-text token (eos_id is -1); train it with --eos_id")
        self.eos_token = self._model.id_to_piece(self.eos_id)
        self._content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        return cls(_read(path), str(path))

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        with _native(f"the {self.FILE} cannot encode this text"):
            return self._model.encode(texts, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Iterable[int]) -> str:
        with _native(f"the {self.FILE} cannot decode these tokens"):
            return self._model.decode([int(token) for token in ids])

    def save(self, directory: str | Path) -> list[str]:
        Path(directory, self.FILE).write_bytes(self._content)
        return [self.FILE]


_LOADERS: dict[str, Callable[[Path], Tokenizer]] = {".json": JsonTokenizer.load, ".model": SentencePieceTokenizer.load}
_IN_A_DIRECTORY = ("tokenizer.json", "tokenizer.model", "spiece.model")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json``, a SentencePiece ``.model``, or the one that a directory holds.

    The end-of-text token is the ``eos_token`` of a ``tokenizer_config.json`` in the same directory or, without it, an
    added token with a usual name; for SentencePiece it is the model's ``eos_id``.

    Raises:
        EvenstepError: the file is missing or unreadable, or the tokenizer has no end-of-text token.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> _ = train_bpe(iter(["to be or not to be"]), 260).save(directory)
    >>> load_tokenizer(directory).vocab_size
    260
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in _IN_A_DIRECTORY if (path / name).is_file()]
        if not found:
            raise EvenstepError(f"no tokenizer in {path}; it should hold one of {', '.join(_IN_A_DIRECTORY)}")
        path = found[0]
    if not path.exists():
        raise EvenstepError(
            f"no tokenizer at '{path}'; give 'bpe' to train one, or a tokenizer.json, a SentencePiece .model or "
            "their directory"
        )
    if path.suffix not in _LOADERS:
        raise EvenstepError(
            f"cannot tell what kind of tokenizer '{path}' is; allowed are files ending in {' or '.join(_LOADERS)}"
        )
    return _LOADERS[path.suffix](path)


def train_bpe(texts: Iterator[str], vocab_size: int, *, exact: bool = True, min_frequency: int = 0) -> Tokenizer:
    """Train a byte-level BPE. The same texts result in the same tokenizer.

    Args:
        texts: the training text.
        vocab_size: number of tokens, at least 257 (256 bytes and the end of text).
        exact: whether a text that is too short for ``vocab_size`` tokens is an error. False: the tokenizer has fewer.
        min_frequency: number of times that a pair must occur to become a token.

    Raises:
        EvenstepError: ``vocab_size`` is too small, or too large for ``texts``.

    >>> tokenizer = train_bpe(iter(["to be or not to be"]), 260)
    >>> tokenizer.decode(tokenizer.encode("to be"))
    'to be'
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise EvenstepError(
            f"vocab_size is {vocab_size}; a byte-level BPE needs at least {SMALLEST_VOCABULARY} (256 bytes + end of "
            "text)"
        )
    tokenizers = _tokenizers()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    size = model.get_vocab_size()
    if exact and size < vocab_size:
        raise EvenstepError(
            f"vocab_size is {vocab_size}, but this corpus only yields {size} tokens; give at most {size}, or more text"
        )
    return JsonTokenizer(model.to_str().encode("utf-8"), END_OF_TEXT)


@contextmanager
def _native(what: str) -> Iterator[None]:
    """Convert errors of native libraries into EvenstepError. A panic of Rust is a BaseException and no Exception."""
    try:
        yield
    except (EvenstepError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise EvenstepError(f"{what}: {first_line(error)}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise EvenstepError("tokenizing needs the tokenizers package; pip install 'evenstep[train]'") from error
    return tokenizers


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvenstepError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _configured_eos(directory: Path) -> str | None:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        eos = json.loads(_read(path)).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise EvenstepError(f"{path} is not a JSON object; correct or delete it") from error
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos is not None and not isinstance(eos, str):
        raise EvenstepError(f"{path}: eos_token is not a text; correct or delete it")
    return eos
