import os
import sys

import pytest

from evenstep import console

ROWS = [["evenstep stable_spam", "1.23456789e-04", "12,345,678", "a long remark of several words"] for _ in range(3)]
HEADS = ["optimizer", "time", "tokens", "remark"]


@pytest.mark.parametrize("width", [20, 30, 40, 60, 100])
def test_a_narrow_terminal_shows_fewer_columns_and_whole_numbers(capsys, monkeypatch, width):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.print_table("", HEADS, ROWS)
    text = capsys.readouterr().out
    for head, cell in (("time", ROWS[0][1]), ("tokens", ROWS[0][2])):
        named = text.partition("not shown")[2]
        assert (text.count(cell) == 3) != (head in named), text
    assert "\u2026" not in text or width == 20


def executable(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="needs executable files")
@pytest.mark.parametrize(
    "script, on_path, expected",
    [
        (True, None, ".venv/bin/evenstep"),
        (True, "own", "evenstep"),
        (True, "link", "evenstep"),
        (True, "other", ".venv/bin/evenstep"),
        (False, "other", "evenstep"),
        (False, None, "{python} -m evenstep"),
    ],
)
def test_a_command_is_printed_as_it_can_be_pasted(tmp_path, monkeypatch, script, on_path, expected):
    monkeypatch.chdir(tmp_path)
    own = executable(tmp_path / ".venv/bin/python")
    monkeypatch.setattr(sys, "executable", str(own))
    if script:
        executable(own.with_name("evenstep"))
    places = {None: tmp_path / "empty", "own": own.parent}
    place = places.get(on_path, tmp_path / "bin")
    place.mkdir(exist_ok=True)
    if on_path == "link":
        (place / "evenstep").symlink_to(own.with_name("evenstep"))
    elif on_path == "other":
        executable(place / "evenstep")
    monkeypatch.setenv("PATH", str(place))
    assert console.program() == expected.format(python=own)


@pytest.mark.skipif(os.name != "posix", reason="needs executable files")
def test_a_program_elsewhere_is_named_by_its_whole_path(tmp_path, monkeypatch):
    own = executable(tmp_path / "my venv/bin/python")
    executable(own.with_name("evenstep"))
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", "")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert console.program() == f"'{own.with_name('evenstep')}'"
