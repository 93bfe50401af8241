"""From a source of documents to token shards, once.

    documents -> train or val, by a hash of the text -> tokens, a batch of text at a time -> shards -> renamed in place

Nothing here holds more than one document and one batch of text, whatever the corpus measures.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evenstep.data import shards
from evenstep.data.cache import building, cache_root, check_writable, discard
from evenstep.data.corpora import PREPARED, Corpus, open_corpus, split_source
from evenstep.data.formats import cut
from evenstep.data.progress import PrepareProgress
from evenstep.data.shards import ShardWriter, TokenData, token_dtype, write_manifest
from evenstep.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from evenstep.errors import EvenstepError

BPE = "bpe"
DEFAULT_VOCAB = 4096
SAMPLE_BYTES = 16_000_000  # text the BPE is trained on, at most; the trainer takes about ten times that in memory
PIECE_CHARS = 1 << 17  # longest text handed to the tokenizer at once
BATCH_CHARS = 1 << 20  # text tokenised together; a token costs the tokenizer about 100 bytes, so some 40 MB

ProgressCallback = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class DataSpec:
    """What to train on.

    source: ``stdlib``, ``kjv``, ``text:GLOB``, ``hf:NAME[:CONFIG]`` or ``shards:DIR``.
    tokenizer: ``bpe`` trains a byte-level BPE on the training documents; else a tokenizer.json, a SentencePiece .model
    or their directory.
    vocab_size: tokens of the BPE (None: 4096); with a given tokenizer or shards, the most it may have (None: any).
    val_fraction: share of documents held out, 0 <= val_fraction < 1; 0 holds none out. The default suits corpora
    of megabytes; gigabytes need less.
    text_field: the field (JSON lines, Parquet, hf) that holds a document's text.
    max_tokens: stop after the document that brings the training split to so many tokens; None reads the source to its
    end.
    cache_dir: None means $EVENSTEP_CACHE, else $XDG_CACHE_HOME/evenstep, else ~/.cache/evenstep.
    """

    source: str
    tokenizer: str = BPE
    vocab_size: int | None = None
    val_fraction: float = 0.02
    text_field: str = "text"
    max_tokens: int | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        split_source(self.source)
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
    """The token shards of ``spec``: from the cache, else tokenised now. A damaged or stale cache entry is built anew.

    ``progress`` is called after every batch of documents, and not at all when the cache answers. With several processes
    call it on one first: a second one at the same time is harmless but does the work twice. EvenstepError, one line,
    for every bad input.
    """
    prefix, rest = split_source(spec.source)
    if prefix == PREPARED:
        return _open_shards(Path(rest).expanduser(), spec)
    tell = progress or (lambda _: None)
    corpus = open_corpus(spec.source, spec.text_field)
    root = cache_root(spec.cache_dir)
    tokenizer = _bpe(corpus, spec, root, tell) if spec.tokenizer == BPE else _given(spec.tokenizer, spec.vocab_size)
    options = {"text_field": spec.text_field, "val_fraction": spec.val_fraction, "max_tokens": spec.max_tokens}
    entry = root / "tokens" / _key(corpus, options | {"tokenizer": tokenizer.fingerprint})
    if entry.exists():
        try:
            return TokenData(entry)
        except EvenstepError:
            discard(entry)
    with building(entry) as directory:
        splits = _write(corpus, tokenizer, spec, directory, tell)
        write_manifest(directory, source=spec.source, options=options, tokenizer=tokenizer, splits=splits)
    return TokenData(entry)


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
            f"{spec.vocab_size}; raise or drop it"
        )
    return data


def _given(path: str, vocab_size: int | None) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise EvenstepError(
            f"the tokenizer '{path}' has {tokenizer.vocab_size} tokens, more than data.vocab_size {vocab_size}; "
            "raise or drop it"
        )
    return tokenizer


def _key(corpus: Corpus, options: dict[str, object]) -> str:
    """Name of a cache entry: readable, and different for whatever would change its content."""
    files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in corpus.files]
    facts = json.dumps([shards.VERSION, corpus.name, files, options], sort_keys=True)
    name = "".join(c if c.isalnum() else "-" for c in corpus.name)[-40:].strip("-")
    return f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


# -- documents and their split -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Part of a document, short enough for the tokenizer; the last one of a document carries the document's length in
    bytes."""

    text: str
    split: str
    ends: int | None


def place(content: bytes) -> tuple[float, float]:
    """Two numbers in [0, 1) drawn from the text alone. A document is held out when the first is below ``val_fraction``:
    it never changes sides as the corpus grows, and its duplicates follow it. The second thins the BPE's training
    sample."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    side, sample = (int.from_bytes(half, "big") >> 11 for half in (digest[:8], digest[8:]))
    return side / 2**53, sample / 2**53


def _documents(corpus: Corpus) -> Iterator[tuple[str, bytes, int]]:
    """(text, its UTF-8 bytes, source bytes read), blank documents left out."""
    for text, position in corpus.read():
        if not text or text.isspace():
            continue
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell halves of surrogate pairs: join the pairs, replace the orphans
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            content = text.encode("utf-8")
        yield text, content, position


def _nothing_to_train_on(corpus: Corpus, documents: int, val_fraction: float) -> EvenstepError:
    if not documents:
        first = f" ({corpus.files[0]}{', ...' if len(corpus.files) > 1 else ''})" if corpus.files else ""
        read = f"{count} file{'s' * (count > 1)}{first}" if (count := len(corpus.files)) else "the dataset"
        return EvenstepError(
            f"there is no text in the corpus '{corpus.name}': {read} held none; give another data.source"
        )
    return EvenstepError(
        f"the training split is empty: data.val_fraction {val_fraction} holds out all {documents} documents; lower it"
    )


# -- the BPE -----------------------------------------------------------------------------------------------------------


def _bpe(corpus: Corpus, spec: DataSpec, root: Path, tell: ProgressCallback) -> Tokenizer:
    vocab_size = spec.vocab_size or DEFAULT_VOCAB
    whole = spec.max_tokens is None and corpus.total_bytes is not None
    options = {
        "vocab_size": vocab_size,
        "val_fraction": spec.val_fraction,
        "sample": SAMPLE_BYTES,
        "whole": whole,
        "field": spec.text_field,
    }
    entry = root / "tokenizers" / _key(corpus, options)
    if entry.exists():
        try:
            return load_tokenizer(entry)
        except EvenstepError:
            discard(entry)
    check_writable(entry)
    # Trained outside the cache's error handling: what goes wrong there is the corpus's fault, not the disk's.
    tokenizer = train_bpe(_sample(corpus, spec, whole, tell), vocab_size)
    with building(entry) as directory:
        tokenizer.save(directory)
    return tokenizer


def _sample(corpus: Corpus, spec: DataSpec, whole: bool, tell: ProgressCallback) -> Iterator[str]:
    """Training documents for the BPE, ``SAMPLE_BYTES`` at most: an even sample of a source of known size that is read
    whole, else its first ones (reading the whole of C4 to choose 16 MB of it would take days)."""
    keep = min(1.0, SAMPLE_BYTES / max(corpus.total_bytes or 1, 1)) if whole else 1.0
    documents = taken = used = 0
    for text, content, position in _documents(corpus):
        documents += 1
        side, draw = place(content)
        if side < spec.val_fraction or draw >= keep:
            continue
        taken += len(content)
        used += 1
        yield from cut(text, PIECE_CHARS)
        if used % 256 == 0:
            read = position / corpus.total_bytes if corpus.total_bytes else 0.0
            tell(PrepareProgress("tokenizer", used, taken, 0, max(taken / SAMPLE_BYTES, read)))
        if taken >= SAMPLE_BYTES:
            break
    if not used:
        raise _nothing_to_train_on(corpus, documents, spec.val_fraction)
    tell(PrepareProgress("tokenizer", used, taken, 0, 1.0))


# -- tokens ------------------------------------------------------------------------------------------------------------


def _batches(corpus: Corpus, val_fraction: float, sides: list[float]) -> Iterator[tuple[list[_Piece], int]]:
    """Pieces by the batch, with the source bytes read; ``sides[0]`` becomes the smallest draw met, for the error
    message."""
    batch: list[_Piece] = []
    chars = position = 0
    for text, content, position in _documents(corpus):
        side, _ = place(content)
        sides[0] = min(sides[0], side)
        split = "val" if side < val_fraction else "train"
        left = len(text)
        for piece in cut(text, PIECE_CHARS):
            left -= len(piece)
            batch.append(_Piece(piece, split, None if left else len(content)))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch, position
                batch, chars = [], 0
    if batch:
        yield batch, position


def _write(
    corpus: Corpus, tokenizer: Tokenizer, spec: DataSpec, directory: Path, tell: ProgressCallback
) -> dict[str, dict]:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(directory, split, dtype, shards.SHARD_TOKENS) for split in shards.SPLITS}
    train, val = writers["train"], writers["val"]
    limit, total = spec.max_tokens, corpus.total_bytes
    sides = [1.0]

    def full() -> bool:
        return limit is not None and train.tokens >= limit

    try:
        for batch, position in _batches(corpus, spec.val_fraction, sides):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                writer.append(ids)
                if piece.ends is not None:
                    writer.end_document(tokenizer.eos_id, piece.ends)
                    if full():
                        break
            done = [position / total if total else None, train.tokens / limit if limit else None]
            known = [min(share, 1.0) for share in done if share is not None]
            documents, read = train.documents + val.documents, train.bytes + val.bytes
            tell(PrepareProgress("tokens", documents, read, train.tokens + val.tokens, max(known) if known else None))
            if full():
                break
    finally:
        splits = {split: writer.close() for split, writer in writers.items()}
    if not train.documents:
        raise _nothing_to_train_on(corpus, val.documents, spec.val_fraction)
    if spec.val_fraction > 0 and not val.documents:
        raise EvenstepError(
            f"the validation split is empty: none of {train.documents} documents falls below data.val_fraction "
            f"{spec.val_fraction}; "
            f"give one above {sides[0]:.4f}, or 0 for no validation, or more documents"
        )
    return splits
