"""A corpus from Debian packages: what of a package becomes text."""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.corpus import build, main
from lab.corpus_texts import page_text

LONG = "A paragraph that is long enough to be counted as one that must not be written twice, whatever file it is in."
PROSE = "\n\n".join(f"{LONG} This is number {i} of its kind." for i in range(8))
PAGE = """<html><head><title>no</title><script>no()</script></head><body><nav><a>no</a></nav>
<h1>Heads &amp; tails</h1><p>one
   <b>two</b>three</p><ul><li>four<li>five</ul><pre>  kept
    as it is</pre><footer>no</footer></body></html>"""


def test_a_page_gives_what_it_says():
    assert page_text(PAGE) == "Heads & tails\n\none twothree\n\nfour\nfive\n\n  kept\n    as it is\n"


def test_a_page_whose_navigation_is_never_closed_gives_the_rest():
    assert page_text("<nav><div><form>no</nav><p>yes</p></form>") == "yes\n"


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


@pytest.fixture
def debs(tmp_path):
    """One package with a file of every kind."""
    doc = tmp_path / "tree" / "usr" / "share" / "doc" / "tales"
    control = tmp_path / "tree" / "DEBIAN"
    for directory in (doc / "html" / "_sources", control):
        directory.mkdir(parents=True)
    (control / "control").write_text(
        "Package: tales\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: tales\n"
    )
    (doc / "html" / "first.html").write_text(f"<p>{PROSE.replace('kind', 'page')}</p>")
    (doc / "first.txt").write_text(PROSE.replace("kind", "source"))  # the page says the same
    (doc / "html" / "stub.html").write_text(f"<p>See stub.txt.</p><p>{'Word. ' * 80}</p>")
    (doc / "stub.txt").write_text(PROSE.replace("kind", "tale"))  # a page with less than its text
    # Translations: of manual/en/, and of first.html. The directory pt has no English beside it.
    for place in ("manual/en/a.txt", "manual/it/a.txt", "manual/pt-BR/deep/b.html", "html/first.fr.html", "pt/c.txt"):
        (doc / place).parent.mkdir(parents=True, exist_ok=True)
        (doc / place).write_text(PROSE.replace("kind", place))
    for place in "abc":  # many pages of one name are no stubs of a text that has it, too
        (doc / "book" / place).mkdir(parents=True)
        (doc / "book" / place / "index.html").write_text(f"<p>{PROSE.replace('kind', f'page {place}')[:700]}</p>")
    (doc / "index.txt").write_text(PROSE.replace("kind", "index") * 9)
    (doc / "html" / "_sources" / "other.rst").write_text(PROSE)
    (doc / "second.md.gz").write_bytes(gzip.compress(PROSE.encode()))
    (doc / "third.txt").write_text(PROSE + "\n\n" + PROSE.replace("kind", "third"))  # half of it is known by then
    (doc / "short.txt").write_text("too short")
    (doc / "changelog.gz").write_bytes(gzip.compress(PROSE.encode()))
    (doc / "stained.txt").write_bytes(PROSE.replace("kind", "stain").encode() + b"\x92")
    (doc / "latin.txt").write_bytes("é".encode("latin-1") * 1000)
    (doc / "picture.png").write_bytes(b"\0" * 1000)
    (doc / "broken.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:12] + b"no stream")
    (doc / "link.txt").symlink_to("third.txt")
    debs = tmp_path / "debs"
    debs.mkdir()
    deb = debs / "tales_1%3a2.0-1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "tree"), str(deb)], check=True, capture_output=True)
    return debs


@needs_dpkg
def test_texts_of_a_package_each_once(tmp_path, debs, capsys):
    assert main([str(tmp_path / "out"), "--debs", str(debs), "--packages", "missing,tales"]) == 0
    assert "missing: left out, no file missing_*.deb" in capsys.readouterr().err
    raw = (tmp_path / "out" / "corpus.jsonl").read_bytes()
    found = {line["source"].partition("/tales/")[2]: line["text"] for line in map(json.loads, raw.splitlines())}
    books = [f"book/{place}/index.html" for place in "abc"]
    more = ["manual/en/a.txt", "pt/c.txt", "second.md.gz", "stained.txt", "stub.txt", "third.txt"]
    assert list(found) == [*books, "html/first.html", *more]
    assert found["stained.txt"] == PROSE.replace("kind", "stain") + "\n"
    assert found["second.md.gz"] == PROSE + "\n"
    assert found["third.txt"] == PROSE.replace("kind", "third") + "\n"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    size = sum(len(text.encode()) for text in found.values())
    assert manifest["packages"] == [{"package": "tales", "version": "1:2.0-1", "documents": 10, "bytes": size}]
    assert (manifest["bytes"], manifest["sha256"]) == (size, hashlib.sha256(raw).hexdigest())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus.jsonl", "manifest.json"]


@needs_dpkg
def test_a_long_text_is_documents_of_whole_paragraphs(tmp_path, debs, monkeypatch):
    monkeypatch.setattr("lab.corpus.PIECE", 450)
    build(tmp_path / "out", ["tales"], debs=debs)
    lines = [json.loads(line) for line in (tmp_path / "out" / "corpus.jsonl").read_bytes().splitlines()]
    pieces = [line["text"] for line in lines if line["source"].endswith("second.md.gz")]
    assert len(pieces) == 2 and "\n".join(pieces) == PROSE + "\n"


@needs_dpkg
def test_no_more_than_asked_for(tmp_path, debs):
    room = len(PROSE.encode()) * 1.5 / 1e6
    assert build(tmp_path / "out", ["tales"], room, debs)["bytes"] <= room * 1e6


@needs_dpkg
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda debs: [path.unlink() for path in debs.iterdir()], "no text in tales"),
        (lambda debs: next(debs.iterdir()).write_bytes(b"no package"), "cannot be unpacked"),
    ],
)
def test_a_failure_says_so_and_leaves_an_earlier_corpus(tmp_path, debs, break_it, message, capsys):
    out = tmp_path / "out"
    build(out, ["tales"], debs=debs)
    before = (out / "corpus.jsonl").read_bytes()
    break_it(debs)
    assert main([str(out), "--debs", str(debs), "--packages", "tales"]) == 2
    assert message in capsys.readouterr().err
    assert (out / "corpus.jsonl").read_bytes() == before
    assert not list(out.glob("*.partial"))


def test_elsewhere_than_on_debian_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main([str(tmp_path / "out")]) == 2
    assert "dpkg-deb is not installed" in capsys.readouterr().err


def test_it_is_a_program():
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-m", "lab.corpus", "--help"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0 and "--megabytes" in ran.stdout
