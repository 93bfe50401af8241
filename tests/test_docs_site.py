"""The site builds without a warning and every link leads somewhere; notebooks run."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from docs_support import ANY, ROOT, texts

import evenstep

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def check_links():
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "tools" / "check_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_its_links_hold(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    assert check_links().broken(tmp_path / "site") == []
    listed = (tmp_path / "site" / "llms.txt").read_text()
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(page) for page in pages if f"]({page})" not in listed] == []


def test_the_link_check_finds_what_is_broken(tmp_path):
    site = tmp_path.resolve()
    (site / "sub").mkdir()
    (site / "a.html").write_text(
        '<a href="sub/b.html#there">fine</a><a href="sub/b.html#gone">x</a><a href="c.html">x</a>'
        '<a href="https://example.org/">fine</a><script src="https://example.org/x.js"></script><img src="no.png">'
    )
    (site / "sub" / "b.html").write_text('<h1 id="there">b</h1><a href="../a.html">fine</a><a href="#nowhere">x</a>')
    assert check_links().broken(site) == [
        "a.html: sub/b.html#gone has no such place",
        "a.html: c.html leads nowhere",
        "a.html: loads https://example.org/x.js",
        "a.html: no.png leads nowhere",
        "sub/b.html: #nowhere has no such place",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_results(notebook, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    kinds = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})]
    assert "image/png" in kinds and all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    names = {"__name__": "__main__"}
    for i, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {i}", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_an_uploaded_archive_where_evenstep_is_missing(notebook, tmp_path, monkeypatch):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    exec(code, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match=r"upload dist/evenstep-VERSION\.tar\.gz first"):
        exec(code, {})
    (tmp_path / "evenstep-0.1.0.tar.gz").touch()
    exec(code, {})
    [command] = commands
    assert command[1:4] == ["-m", "pip", "install"] and tmp_path / "evenstep-0.1.0.tar.gz" in command


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_jupyter(notebook, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    NotebookClient(nbformat.read(notebook, 4), timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


CODE_WIDTH = 75
"""Columns of a line in a code block that fit on the page of the site and in half a screen."""

RECORDS = ("architecture.md", "configuration.md", "conformance.md", "log.md")
"""Pages that are no guides: the map of the code, generated tables, and the record of measurements."""

PROGRAM_OUTPUT = (r"7b \(6\.74B parameters\) on \d+ GPUs, ", r"\$ evenstep plan ")
"""Lines of a console that another test compares with the program, so that they cannot be wrapped."""


def guides():
    """README.md and the pages of docs/ that explain how to use the library."""
    found = [path for path in texts() if path.name not in RECORDS and not path.name.startswith("results")]
    return [path for path in found if not {"results", "results-rl"} & {*path.parts}]


def wide_lines(text):
    """(line number, line) for each line of a code block that is wider than ``CODE_WIDTH``."""
    found = []
    for block in ANY.finditer(text):
        first = text[: block.start("code")].count("\n") + 1
        for i, line in enumerate(block["code"].splitlines()):
            printed = any(re.match(pattern, line) for pattern in PROGRAM_OUTPUT)
            if len(line) > CODE_WIDTH and not printed:
                found.append((first + i, line))
    return found


@pytest.mark.parametrize("page", guides(), ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_of_a_guide_are_narrow(page):
    assert wide_lines(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", guides(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_guide_describes_today_and_no_commit(page):
    assert re.findall(r"commit [0-9a-f]{7}", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_cells_of_a_notebook_are_narrow(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    assert [line for line in lines if len(line) > CODE_WIDTH] == []


def test_the_width_check_sees_wide_lines_of_code_alone():
    wide = "x" * (CODE_WIDTH + 1)
    assert wide_lines(f"{wide}\n```sh\nshort\n{wide}\n```\n") == [(4, wide)]
    assert wide_lines(f"- in a list\n\n  ```python\n  {wide[2:]}\n  ```\n") == [(4, f"  {wide[2:]}")]
    assert wide_lines(f"```\n7b (6.74B parameters) on 64 GPUs, {wide}\n```\n") == []


def test_an_example_of_a_docstring_is_code_and_a_picture_a_link(monkeypatch):
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import docs_hooks

    # A picture opens at its own size, since its text is tiny on a phone; one that is a link already stays
    linked = '<a href="a.png"><img alt="x" src="a.png" /></a>'
    assert docs_hooks.on_page_content('<img alt="x" src="a.png" />', None, None, None) == linked
    assert docs_hooks.on_page_content('<img src="data:x">' + linked, None, None, None) == '<img src="data:x">' + linked
    page = markdown.markdown('Before\n\n>>> x["a"]["b"]\n3\n\n> after\n', extensions=[docs_hooks.DoctestBlocks()])
    assert '<code>&gt;&gt;&gt; x["a"]["b"]\n3\n</code>' in page and page.count("<blockquote>") == 1


def documented():
    """{identifier: page} of every object whose docstring a page of the site shows."""
    found = {}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        names = re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= dict.fromkeys(names, path.relative_to(ROOT / "docs").as_posix())
    return found


def test_the_index_of_the_api_leads_to_every_documented_object():
    """Each row has the object's identifier as its anchor too, as the page had when it held everything."""
    index = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(.+)`\]\(([^#]+)#(\S+)\)\{ #(\S+) \} \| .+ \|$", index, re.MULTILINE)
    assert {anchor: page for _, page, anchor, _ in rows} == documented() and len(rows) == len(documented())
    assert all(anchor == own and anchor.endswith(f".{name}") for name, _, anchor, own in rows)
    assert {*evenstep.__all__} - {"__version__"} <= {name for name, *_ in rows}
