"""Token shards: a prepared corpus as a directory of flat files.

    manifest.json        the files of the directory, with counts; written last, so its presence means completeness
    train-00000.bin ...  token ids, one after the other, little-endian uint16 (up to 65536 ids) or uint32; no header
    val-00000.bin ...
    tokenizer.json ...   the tokenizer that produced them

One end-of-text token follows every document; a document may continue in the next shard. The files are memory-mapped:
opening them is free, and only the pages that a batch needs are read.
"""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from evenstep.data.tokenizer import Tokenizer, load_tokenizer
from evenstep.errors import EvenstepError
from evenstep.paths import is_plain_name, leaves

FORMAT, VERSION = "evenstep-tokens", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids: uint16 for up to 65536 ids, else uint32; little-endian on every machine.

    >>> token_dtype(4096)
    dtype('uint16')
    """
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


class TokenStream:
    """The tokens of one split, as one array over all its shards.

    ``len()`` is the number of tokens, ``num_documents`` that of documents, ``num_bytes`` the size of their text in
    UTF-8.
    """

    def __init__(
        self, files: list[Path], dtype: np.dtype, num_bytes: int = 0, num_documents: int = 0, name: str = "tokens"
    ):
        # Plain arrays slice faster than np.memmap.
        # Opened read-only, so that no caller can change the corpus through a view.
        self._shards = [np.memmap(file, dtype=dtype, mode="r").view(np.ndarray) for file in files]
        self._ends = list(accumulate(len(shard) for shard in self._shards))
        self.dtype, self.num_bytes, self.num_documents, self.name = dtype, num_bytes, num_documents, name

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start:stop`` as a read-only array [stop - start] of ``dtype``; IndexError outside 0..len."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")
        parts = []
        # The first shard that ends beyond `start`: a binary search, since a corpus may have thousands of shards.
        shard = bisect_right(self._ends, start)
        while start < stop:
            begins = self._ends[shard] - len(self._shards[shard])
            ends = min(stop, self._ends[shard])
            parts.append(self._shards[shard][start - begins : ends - begins])
            start, shard = ends, shard + 1
        # Nearly every read lies in one shard and is a view of the mapped file: no copy is made here.
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


class TokenData:
    """A directory of token shards. Opening it checks the manifest, the size of every shard and the tokenizer's files.

    Attributes:
        train, val: the splits, as ``TokenStream``s; ``val`` is empty if nothing was held out.
        manifest: the manifest, as a dict.
        vocab_size: the largest token id + 1.
        tokenizer: the tokenizer that produced the shards.

    Raises:
        EvenstepError: the directory is not a complete and unchanged set of shards.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = _checked_manifest(self.path)
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        dtype = np.dtype(self.manifest["dtype"])
        self.train, self.val = (self._stream(name, dtype) for name in SPLITS)

    def _stream(self, name: str, dtype: np.dtype) -> TokenStream:
        split = self.manifest["splits"][name]
        files = [self.path / shard["file"] for shard in split["shards"]]
        return TokenStream(files, dtype, split["bytes"], split["documents"], name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)


def _checked_manifest(directory: Path) -> dict[str, Any]:
    again = "; prepare it again from its source"
    if not directory.is_dir():
        raise EvenstepError(
            f"no such directory of token shards: '{directory}' (looked from {Path.cwd()}); give shards:DIR an entry of "
            "tokens/ in a data cache"
        )
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvenstepError(
            f"{directory} holds no {MANIFEST}, so it is not a directory of prepared token shards; give shards:DIR "
            "an entry of tokens/ in a data cache"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise EvenstepError(f"{directory / MANIFEST} is not readable ({error}){again}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EvenstepError(f"{directory / MANIFEST} is not a manifest of {FORMAT}{again}")
    if manifest.get("version") != VERSION:
        raise EvenstepError(
            f"{directory} has format version {manifest.get('version')}, this evenstep reads version {VERSION}{again}"
        )
    try:
        tokens = [(shard["file"], shard["tokens"]) for name in SPLITS for shard in manifest["splits"][name]["shards"]]
        counts = [manifest["splits"][name][count] for name in SPLITS for count in ("tokens", "documents", "bytes")]
        counts += [count for _, count in tokens] + [manifest["tokenizer"]["vocab_size"]]
        hashes = dict(manifest["tokenizer"]["files"])
        fingerprint, dtype = manifest["tokenizer"]["fingerprint"], manifest["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise EvenstepError(f"{directory / MANIFEST} lacks {error}{again}") from error
    # A bool is an int in Python, but no count.
    whole = all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**62 for count in counts)
    if not whole or dtype not in ("<u2", "<u4") or not isinstance(fingerprint, str) or not counts[-1]:
        raise EvenstepError(f"{directory / MANIFEST} has counts or a dtype that make no sense{again}")
    # A manifest may come from a stranger: its names must not lead to files outside of the directory.
    for file in (*(file for file, _ in tokens), *hashes):
        if not is_plain_name(file) or leaves(directory, file):
            raise EvenstepError(f"{directory / MANIFEST} lists {file!r:.80}: a file outside of it; do not trust it")
    # Sizes are compared instead of hashes, which would read the whole corpus at every start. A truncated shard would
    # otherwise fail as a bus error when a page beyond its end is read.
    shards = [(file, count * np.dtype(dtype).itemsize) for file, count in tokens]
    for file, bytes_wanted in shards:
        there = (directory / file).stat().st_size if (directory / file).is_file() else None
        if there != bytes_wanted:
            what = "is missing" if there is None else f"has {there} bytes where the manifest says {bytes_wanted}"
            raise EvenstepError(f"shard {directory / file} {what}{again}")
    for file, sha256 in hashes.items():
        if not (directory / file).is_file() or hashlib.sha256((directory / file).read_bytes()).hexdigest() != sha256:
            raise EvenstepError(f"{directory / file} is not the tokenizer that made these shards{again}")
    return manifest


class ShardWriter:
    """Writes the tokens of one split into files of at most ``shard_tokens`` tokens each."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS):
        self._directory, self._split, self._dtype, self._shard_tokens = directory, split, dtype, shard_tokens
        self._file: Any = None
        self._shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.bytes = 0

    def append(self, ids: list[int]) -> None:
        tokens = np.asarray(ids, dtype=self._dtype)
        while len(tokens):
            if self._file is None:
                self._shards.append({"file": f"{self._split}-{len(self._shards):05d}.bin", "tokens": 0})
                self._file = (self._directory / self._shards[-1]["file"]).open("wb")
            part = tokens[: self._shard_tokens - self._shards[-1]["tokens"]]
            self._file.write(part.tobytes())
            self._shards[-1]["tokens"] += len(part)
            self.tokens += len(part)
            tokens = tokens[len(part) :]
            if self._shards[-1]["tokens"] == self._shard_tokens:
                self._close_file()

    def end_document(self, eos_id: int, num_bytes: int) -> None:
        self.append([eos_id])
        self.documents += 1
        self.bytes += num_bytes

    def _close_file(self) -> None:
        if self._file is not None:
            # Forgotten first: closing flushes and may raise on a full disk, and must not be tried again by `close`.
            file, self._file = self._file, None
            file.close()

    def close(self) -> dict[str, Any]:
        """Close the last file; returns the split's part of the manifest."""
        self._close_file()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self._shards}


def write_manifest(
    directory: Path,
    *,
    source: str,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    splits: dict[str, dict[str, Any]],
    **facts: Any,
) -> None:
    """Save the tokenizer and, as the last file, the manifest. ``facts`` are further keys of the manifest."""
    files = tokenizer.save(directory)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "options": options,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "files": {file: hashlib.sha256((directory / file).read_bytes()).hexdigest() for file in files},
        },
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "splits": splits,
        **facts,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
