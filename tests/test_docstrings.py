"""The examples in docstrings run and print what they show."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import evenstep

PACKAGE = Path(evenstep.__file__).parent


def modules_with_examples():
    """Names of the modules of which a docstring holds ``>>>``. Nothing is imported to find them."""
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if any(">>>" in (ast.get_docstring(node) or "") for node in nodes if isinstance(node, documented)):
            yield ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_in_docstrings_print_what_they_show(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example may write files
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        if (missing.name or "").startswith("evenstep"):
            raise
        pytest.skip(str(missing))  # it needs an optional extra
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
