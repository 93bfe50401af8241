"""From a source of documents to token shards, which are cached.

    documents -> train or val, by a hash of the text -> tokens, one batch of text at a time -> shards -> the cache

In a small corpus the hash may leave no text for validation, or none for training. `prepare` then starts again with a
split derived from the sizes of the documents (`split.Draws`), and stores that split in the cache.

Memory holds one document and one batch of text, for a corpus of any size.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenstep.data import shards
from evenstep.data.cache import building, cache_root, check_writable, discard
from evenstep.data.corpora import PREPARED, Corpus, open_corpus, split_source
from evenstep.data.formats import cut
from evenstep.data.left_out import ON_BAD, LeftOut, printable, shown
from evenstep.data.progress import PrepareProgress
from evenstep.data.shards import ShardWriter, TokenData, token_dtype, write_manifest
from evenstep.data.split import Draws, Split, place
from evenstep.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, load_tokenizer, train_bpe
from evenstep.errors import EvenstepError

BPE = "bpe"
DEFAULT_VOCAB = 4096
SAMPLE_BYTES = 16_000_000  # most text on which the BPE is trained; the trainer needs about ten times that in memory
PIECE_CHARS = 1 << 17  # longest text that the tokenizer gets at once
SHORT_CHARS = 1 << 20  # a shorter training text may be too short for its vocabulary
LEAST_TOKENS = 2100  # least number of tokens of a short text: a batch of the default options takes 8 x 256 + 1
BATCH_CHARS = 1 << 20  # characters tokenised together; the tokenizer needs about 100 bytes for a token, so 40 MB

ProgressCallback = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class DataSpec:
    """A corpus, its tokenizer and its split. Checked when it is made: EvenstepError for a value out of range.

    Args:
        source: ``stdlib``, ``kjv``, ``text:GLOB``, ``hf:NAME[:CONFIG]`` or ``shards:DIR``.
        tokenizer: ``bpe`` trains a byte-level BPE on the training documents; otherwise the path of a tokenizer.json, a
            SentencePiece .model, or a directory that holds one.
        vocab_size: number of tokens of the BPE (None: 4096), fewer if the text is too short for so many. For a given
            tokenizer or shards, the largest number that is accepted (None: any).
        val_fraction: share of the text held out for validation, 0 <= val_fraction < 1. The default suits corpora of
            megabytes; gigabytes need less.
        text_field: the field (of JSON, CSV, Parquet, hf) that holds the text of a document, or several names separated
            by commas, of which the first that a row has counts.
        max_tokens: stop after the document with which the training split reaches this number of tokens. None reads the
            whole source.
        cache_dir: folder of the cache. None: $EVENSTEP_CACHE, or $XDG_CACHE_HOME/evenstep, or ~/.cache/evenstep.
        exclude: globs, separated by commas, of files and archive members that ``text`` leaves out.
        on_bad: "stop" at files and rows that cannot be used, or "skip" and count them.
    """

    source: str
    tokenizer: str = BPE
    vocab_size: int | None = None
    val_fraction: float = 0.02
    text_field: str = "text"
    max_tokens: int | None = None
    cache_dir: str | Path | None = None
    exclude: str = ""
    on_bad: str = "stop"

    @property
    def excluded(self) -> tuple[str, ...]:
        return tuple(filter(None, (pattern.strip() for pattern in self.exclude.split(","))))

    def __post_init__(self) -> None:
        prefix, _ = split_source(self.source)
        if self.excluded and prefix != "text":
            raise EvenstepError(f"data.exclude applies to text: sources only, not to '{self.source}'; leave it out")
        if self.on_bad not in ON_BAD:
            raise EvenstepError(f"data.on_bad is {self.on_bad!r}; allowed are {' and '.join(ON_BAD)}")
        if not self.text_field.strip(" ,"):
            raise EvenstepError("data.text_field names no field; give one, such as text")
        if not 0 <= self.val_fraction < 1:
            raise EvenstepError(
                f"data.val_fraction is {self.val_fraction}; it must be at least 0 and below 1, such as 0.02"
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise EvenstepError(f"data.vocab_size is {self.vocab_size}; it must be positive")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise EvenstepError(
                f"data.max_tokens is {self.max_tokens}; it must be positive (leave it out to read the whole source)"
            )


def prepare(spec: DataSpec, progress: ProgressCallback | None = None) -> TokenData:
    """The token shards of a corpus, from the cache if it holds them. A damaged or stale entry is built again.

    Args:
        spec: the corpus.
        progress: called after every batch of documents and, also if the cache holds the shards, with a ``note`` for
            each fact that the user should know: a smaller vocabulary, a split by size, input that was left out.

    Raises:
        EvenstepError: for every bad input, with a message of one line.

    With several processes, call it on one of them first: concurrent calls are safe, but each does the whole work.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 200)
    >>> data = prepare(DataSpec(f"text:{folder}", vocab_size=260, cache_dir=folder / "cache"))
    >>> data.vocab_size, len(data.train) > len(data.val) > 0
    (260, True)
    """
    prefix, rest = split_source(spec.source)
    if prefix == PREPARED:
        return _open_shards(Path(rest).expanduser(), spec)
    tell = progress or (lambda _: None)
    corpus = open_corpus(spec.source, spec.text_field, spec.excluded, spec.on_bad)
    root = cache_root(spec.cache_dir)
    remembered = root / "splits" / _key(corpus, _options(spec))
    split = Split.load(remembered) or Split(spec.val_fraction)
    try:
        data = _prepared(corpus, spec, split, root, tell)
    except _PoorSplit as found:
        discard(remembered)
        with building(remembered) as directory:
            found.better.save(directory)
        data = _prepared(corpus, spec, found.better, root, tell)
    for note in _notes(data, spec):
        counts = (data.train.num_documents + data.val.num_documents, data.train.num_bytes + data.val.num_bytes)
        tell(PrepareProgress("tokens", *counts, len(data.train) + len(data.val), 1.0, note))
    return data


class _PoorSplit(Exception):
    """The split by hash leaves one side without its share; ``better`` does not."""

    def __init__(self, better: Split):
        super().__init__("a poor split")
        self.better = better


def _poor(draws: Draws, spec: DataSpec, split: Split) -> Exception:
    if split == Split(spec.val_fraction):
        return _PoorSplit(draws.split(spec.val_fraction))
    return EvenstepError(
        f"the text has {draws.bytes} bytes, too few for training and validation; give more text, or data.val_fraction 0"
    )


def _options(spec: DataSpec) -> dict[str, Any]:
    """The options on which the documents depend. Options that 0.1.0 did not have appear only if they are set, so that
    cache entries of 0.1.0 are found."""
    options = {"text_field": spec.text_field, "val_fraction": spec.val_fraction, "max_tokens": spec.max_tokens}
    return options | _later(spec)


def _later(spec: DataSpec) -> dict[str, Any]:
    given = {"exclude": list(spec.excluded), "on_bad": spec.on_bad}
    return {name: value for name, value in given.items() if value not in ([], "stop")}


def _of(split: Split, spec: DataSpec) -> dict[str, Any]:
    """The split as a part of a cache key; empty for the split by hash."""
    return {} if split == Split(spec.val_fraction) else {"split": [split.below, split.tail]}


def _prepared(corpus: Corpus, spec: DataSpec, split: Split, root: Path, tell: ProgressCallback) -> TokenData:
    own = spec.tokenizer == BPE
    tokenizer = _bpe(corpus, spec, split, root, tell) if own else _given(spec.tokenizer, spec.vocab_size)
    options = _options(spec)
    entry = root / "tokens" / _key(corpus, options | _of(split, spec) | {"tokenizer": tokenizer.fingerprint})
    if entry.exists():
        try:
            return TokenData(entry)
        except EvenstepError:
            discard(entry)
    left_out = _left_out(spec)
    with building(entry) as directory:
        splits = _write(corpus, tokenizer, spec, split, directory, tell, left_out)
        left_out.include(corpus.left_out)
        facts = {"left_out": left_out.entries()} if left_out.entries() else {}
        write_manifest(
            directory,
            source=spec.source,
            options=options | _of(split, spec),
            tokenizer=tokenizer,
            splits=splits,
            **facts,
        )
    return TokenData(entry)


def _notes(data: TokenData, spec: DataSpec) -> Iterator[str]:
    wanted = spec.vocab_size or DEFAULT_VOCAB
    if spec.tokenizer == BPE and data.vocab_size < wanted:
        yield f"vocabulary: {data.vocab_size:,} tokens instead of {wanted:,}, as the text is too short for more"
    if "split" in data.manifest.get("options", {}):
        size, whole = data.val.num_bytes, data.train.num_bytes + data.val.num_bytes
        yield (
            f"validation: {size:,} bytes ({size / whole:.1%}), chosen by size: the hash of so few documents does not "
            f"hold out {spec.val_fraction:.1%}"
        )
    for entry in data.manifest.get("left_out", []):
        yield f"left out: {shown(entry)}"


def _open_shards(directory: Path, spec: DataSpec) -> TokenData:
    data = TokenData(directory)
    if spec.tokenizer != BPE:
        given = _given(spec.tokenizer, spec.vocab_size)
        if given.fingerprint != data.manifest["tokenizer"]["fingerprint"]:
            raise EvenstepError(
                f"the shards in {directory} were not made with the tokenizer '{spec.tokenizer}'; leave it out to "
                "use theirs"
            )
    if spec.vocab_size is not None and data.vocab_size > spec.vocab_size:
        raise EvenstepError(
            f"the shards in {directory} have {data.vocab_size} tokens, more than data.vocab_size "
            f"{spec.vocab_size}; increase it or leave it out"
        )
    return data


def _given(path: str, vocab_size: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise EvenstepError(
            f"the tokenizer '{path}' has {tokenizer.vocab_size} tokens, more than data.vocab_size {vocab_size}; "
            "increase it or leave it out"
        )
    return tokenizer


def _key(corpus: Corpus, options: dict[str, object]) -> str:
    """Name of a cache entry: readable, and with a hash of everything on which its content depends."""
    files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in corpus.files]
    facts = json.dumps([shards.VERSION, corpus.name, files, options], sort_keys=True)
    name = "".join(c if c.isalnum() else "-" for c in corpus.name)[-40:].strip("-")
    return f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


# -- documents and their split -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A part of a document that is short enough for the tokenizer. ``ends`` is the size of the document (of its part
    on this side of the split) in bytes in its last piece, None in the others."""

    text: str
    split: str
    ends: int | None
    draw: float


def _documents(corpus: Corpus, left_out: LeftOut) -> Iterator[tuple[str, bytes, int]]:
    """(text, its UTF-8 bytes, source bytes read) of every document that is not blank."""
    for text, position in corpus.read(left_out):
        if not text or text.isspace():
            continue
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can contain halves of surrogate pairs: join pairs, replace single halves
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            content = text.encode("utf-8")
        yield text, content, position


def _left_out(spec: DataSpec) -> LeftOut:
    if spec.source.startswith("text:"):
        return LeftOut(spec.on_bad, advice="; --data.exclude PATTERN or --data.on_bad skip leaves it out")
    return LeftOut(spec.on_bad)


def _no_text(corpus: Corpus, left_out: LeftOut) -> EvenstepError:
    first = f" ({printable(corpus.files[0])}{', ...' if len(corpus.files) > 1 else ''})" if corpus.files else ""
    read = f"{count} file{'s' * (count > 1)}{first}" if (count := len(corpus.files)) else "the dataset"
    left_out.include(corpus.left_out)
    out = f"; left out: {left_out}" if left_out.entries() else ""
    return EvenstepError(
        f"there is no text in the corpus '{corpus.name}': {read} held none; give another data.source{out}"
    )


# -- the BPE -----------------------------------------------------------------------------------------------------------


def _bpe(corpus: Corpus, spec: DataSpec, split: Split, root: Path, tell: ProgressCallback) -> Tokenizer:
    whole = spec.max_tokens is None and corpus.total_bytes is not None
    options = {
        "vocab_size": spec.vocab_size or DEFAULT_VOCAB,
        "val_fraction": spec.val_fraction,
        "sample": SAMPLE_BYTES,
        "whole": whole,
        "field": spec.text_field,
    }
    entry = root / "tokenizers" / _key(corpus, options | _later(spec) | _of(split, spec))
    if entry.exists():
        try:
            return load_tokenizer(entry)
        except EvenstepError:
            discard(entry)
    check_writable(entry)
    # Training is outside the block `building`, which reports an OSError as a failure to write the cache.
    tokenizer = _trained(_sample(corpus, spec, split, whole, tell), spec.vocab_size)
    with building(entry) as directory:
        tokenizer.save(directory)
    return tokenizer


def _trained(sample: Iterator[str], vocab_size: int | None) -> Tokenizer:
    """A BPE of ``vocab_size`` tokens, or of fewer if the text is too short.

    Trained without a limit, the BPE of a short text has one token for each word, few of which occur twice. For a short
    text only pairs that occur twice become tokens, and fewer of them where the text would be less than a batch long.
    """
    wanted = vocab_size or DEFAULT_VOCAB
    short: list[str] = []
    size = 0

    def remembered() -> Iterator[str]:
        nonlocal size
        for text in sample:
            size += len(text)
            if size <= SHORT_CHARS:
                short.append(text)
            yield text

    def are_enough(tokenizer: Tokenizer) -> bool:
        return sum(map(len, tokenizer.encode_batch(short))) >= LEAST_TOKENS

    tokenizer = train_bpe(remembered(), wanted, exact=False)
    if size > SHORT_CHARS:
        return tokenizer
    if tokenizer.vocab_size == wanted and (vocab_size is not None or are_enough(tokenizer)):
        return tokenizer
    tokenizer = train_bpe(iter(short), wanted, exact=False, min_frequency=2)
    while tokenizer.vocab_size > SMALLEST_VOCABULARY and not are_enough(tokenizer):
        half = (tokenizer.vocab_size + SMALLEST_VOCABULARY) // 2
        tokenizer = train_bpe(iter(short), half, exact=False, min_frequency=2)
    return tokenizer


def _sample(corpus: Corpus, spec: DataSpec, split: Split, whole: bool, tell: ProgressCallback) -> Iterator[str]:
    """Training documents for the BPE, at most ``SAMPLE_BYTES``. From a source of known size that is read ``whole`` they
    are an even sample; from others they are the first ones, since reading all of C4 for 16 MB would take days."""
    keep = min(1.0, SAMPLE_BYTES / max(corpus.total_bytes or 1, 1)) if whole else 1.0
    draws, left_out = Draws(), _left_out(spec)
    taken = used = 0
    for text, content, position in _documents(corpus, left_out):
        side, draw = place(content)
        parts = [part for name, part in split.sides(text, content, side) if name == "train"]
        draws.add(side, len(content), 0 if parts else len(content))
        if not parts or draw >= keep:
            continue
        taken += len(content)
        used += 1
        for part in parts:
            yield from cut(part, PIECE_CHARS)
        if used % 256 == 0:
            read = position / corpus.total_bytes if corpus.total_bytes else 0.0
            tell(PrepareProgress("tokenizer", used, taken, 0, max(taken / SAMPLE_BYTES, read)))
        if taken >= SAMPLE_BYTES:
            break
    if not draws.documents:
        raise _no_text(corpus, left_out)
    if draws.held_out == draws.bytes:
        raise _poor(draws, spec, split)
    if not used:  # the corpus has only a few long documents, none of which is in the sample
        yield from _sample(corpus, spec, split, False, tell)
        return
    tell(PrepareProgress("tokenizer", used, taken, 0, 1.0))


# -- tokens ------------------------------------------------------------------------------------------------------------


def _batches(corpus: Corpus, split: Split, left_out: LeftOut) -> Iterator[tuple[list[_Piece], int]]:
    """Batches of pieces, with the number of source bytes read."""
    batch: list[_Piece] = []
    chars = position = 0
    for text, content, position in _documents(corpus, left_out):
        side, _ = place(content)
        for name, part in split.sides(text, content, side):
            size = len(content) if part is text else len(part.encode("utf-8"))
            left = len(part)
            for piece in cut(part, PIECE_CHARS):
                left -= len(piece)
                batch.append(_Piece(piece, name, None if left else size, side))
                chars += len(piece)
                if chars >= BATCH_CHARS:
                    yield batch, position
                    batch, chars = [], 0
    if batch:
        yield batch, position


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: DataSpec,
    split: Split,
    directory: Path,
    tell: ProgressCallback,
    left_out: LeftOut,
) -> dict[str, dict]:
    """Write the shards of both splits into ``directory``; returns their parts of the manifest."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {name: ShardWriter(directory, name, dtype, shards.SHARD_TOKENS) for name in shards.SPLITS}
    train, val = writers["train"], writers["val"]
    limit, total = spec.max_tokens, corpus.total_bytes
    draws = Draws()

    by_hash = split == Split(spec.val_fraction)

    def full() -> bool:
        return limit is not None and train.tokens >= limit and (by_hash or val.documents > 0)

    try:
        for batch, position in _batches(corpus, split, left_out):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                writer.append(ids)
                if piece.ends is not None:
                    writer.end_document(tokenizer.eos_id, piece.ends)
                    draws.add(piece.draw, piece.ends, piece.ends if writer is val else 0)
                    if full():
                        break
            done = [position / total if total else None, train.tokens / limit if limit else None]
            known = [min(share, 1.0) for share in done if share is not None]
            documents, read = train.documents + val.documents, train.bytes + val.bytes
            tell(PrepareProgress("tokens", documents, read, train.tokens + val.tokens, max(known) if known else None))
            if full():
                break
    finally:
        splits = {name: writer.close() for name, writer in writers.items()}
    if not train.documents and not val.documents:
        raise _no_text(corpus, left_out)
    one_sided = not train.documents or not val.documents
    if not draws.is_sane(spec.val_fraction) if by_hash else one_sided:
        raise _poor(draws, spec, split)
    return splits
