"""python -m lab.corpus OUT: a corpus of English prose, manuals and source code from Debian packages.

For runs of hundreds of millions of tokens on a machine that cannot download a dataset. The packages come from the
machine's own mirror (``apt-get download``, without root) and are not installed. Train on it with
``--data.source text:OUT``.

OUT/corpus.jsonl    one document a line: "text", and "source", PACKAGE/FILE
OUT/manifest.json   packages with their versions, documents and bytes, and the SHA-256 of the corpus
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from evenstep.errors import EvenstepError
from evenstep.train.files import replace_text
from lab.common import status
from lab.corpus_texts import texts

PACKAGES = (
    *("anarchism", "jargon-text", "debian-handbook", "debian-reference-en", "dict-gcide"),  # prose
    *("python3.11-doc", "git-doc", "perl-doc", "postgresql-doc-15", "apache2-doc", "bind9-doc", "vim-doc"),  # manuals
    *("emacs-el", "sbcl-source"),  # sources
    *("linux-doc-6.1", "octave-doc", "nodejs-doc", "python-django-doc", "python-sympy-doc", "qtbase5-doc-html"),
    *("rust-doc", "libboost1.74-doc", "erlang-doc", "cppreference-doc-en-html", "openjdk-17-doc"),
)
"""Packages of Debian 12, in the order in which they are read: a small corpus is mostly prose, one of 250 MB ends among
the last packages."""

MEGABYTES = 250
SHORTEST = 400
"""Documents with fewer characters are left out."""

REPEATED = 60
"""Paragraphs with at least this many characters are written only once: licences, navigation and notices are in every
file."""

PIECE = 200_000
"""Characters after which a document is split at the end of a paragraph: a dictionary is a single file."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m lab.corpus", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a directory, created if missing")
    parser.add_argument("--packages", default=",".join(PACKAGES), help="names, with commas (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="size of the text (default: %(default)s)")
    parser.add_argument("--debs", type=Path, help="directory of .deb files, instead of the mirror")
    options = parser.parse_args(arguments)
    return status(lambda: build(options.out, options.packages.split(","), options.megabytes, options.debs))


def build(out: Path, packages: list[str], megabytes: float = MEGABYTES, debs: Path | None = None) -> dict[str, Any]:
    """Write the corpus and return its manifest.

    Args:
        out: directory. An earlier corpus in it is replaced once the new one is complete.
        packages: names, in the order in which they are read. A package that is missing from the mirror is reported and
            left out.
        megabytes: largest size of the UTF-8 text.
        debs: directory of .deb files, instead of the mirror.

    Raises:
        EvenstepError: on a system without Debian's tools, or if no package has any text.
    """
    for tool in ("dpkg-deb", *(() if debs else ("apt-get",))):
        if shutil.which(tool) is None:
            raise EvenstepError(f"{tool} is not installed; run this on Debian or a system derived from it")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "corpus.partial"
    try:
        with partial.open("wb") as file:
            taken = list(_written(file, packages, int(megabytes * 1e6), debs))
        total = sum(each["bytes"] for each in taken)
        if not total:
            raise EvenstepError(f"no text in {', '.join(packages)}; update the list of packages with apt-get update")
        with partial.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        partial.replace(out / "corpus.jsonl")
    finally:
        partial.unlink(missing_ok=True)
    manifest = {"packages": taken, "bytes": total, "sha256": sha256}
    replace_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    print(f"{total / 1e6:.1f} MB in {out / 'corpus.jsonl'}")
    return manifest


def _written(file: BinaryIO, packages: list[str], room: int, debs: Path | None) -> Iterator[dict[str, Any]]:
    """Write the documents of each package, up to ``room`` bytes in total; yields the facts of each package."""
    seen: set[bytes] = set()
    for package in packages:
        documents = size = 0
        with tempfile.TemporaryDirectory() as place:
            deb = _deb(package, Path(place), debs) if room > 0 else None
            if deb is None:
                continue
            for name, text in texts(_unpacked(deb, Path(place))):
                for piece in _pieces(_once(text, seen)):
                    length = len(piece.encode())
                    if len(piece) < SHORTEST or length > room:
                        continue
                    line = json.dumps({"text": piece, "source": f"{package}/{name}"}, ensure_ascii=False)
                    file.write(line.encode() + b"\n")
                    documents, size, room = documents + 1, size + length, room - length
        version = deb.name.split("_")[1].replace("%3a", ":")
        print(f"{package} {version}: {documents:,} documents, {size / 1e6:.1f} MB", flush=True)
        yield {"package": package, "version": version, "documents": documents, "bytes": size}


def _pieces(text: str) -> Iterator[str]:
    while len(text) > PIECE:
        end = text.find("\n\n", PIECE)
        if end < 0:
            break
        yield text[:end].rstrip() + "\n"
        text = text[end:].lstrip("\n")
    yield text


def _once(text: str, seen: set[bytes]) -> str:
    """``text`` without the paragraphs that were written before."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= REPEATED:
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip() + "\n"


# ---- packages ----


def _deb(package: str, place: Path, debs: Path | None) -> Path | None:
    """The file of the package; None, with a line on stderr, if there is none."""
    if debs is None:
        fetched = subprocess.run(
            ["apt-get", "-qq", "download", package], cwd=place, capture_output=True, text=True, check=False
        )
        why = fetched.stderr.strip().splitlines()
    else:
        why = [f"no file {package}_*.deb in {debs}"]
    files = sorted((debs or place).glob(f"{package}_*.deb"))
    if not files:
        print(f"{package}: left out, {why[-1] if why else 'not files'}", file=sys.stderr)
    return files[-1] if files else None


def _unpacked(deb: Path, place: Path) -> Path:
    inside = place / "inside"
    done = subprocess.run(["dpkg-deb", "-x", str(deb), str(inside)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EvenstepError(f"{deb} cannot be unpacked: {done.stderr.strip()}; delete it and download it again")
    return inside


if __name__ == "__main__":
    raise SystemExit(main())
