"""What several test files share."""

import importlib

import pytest

from evenstep.optim.fused import Choice


@pytest.fixture(params=[None, False], ids=["kernels", "plain"])
def either_code(request, monkeypatch):
    """The same test by kernels, where there are any, and by the plain code."""

    def chosen(fused):
        return Choice(request.param if fused is None else fused)

    for module in ("evenstep.optim.base", "evenstep.optim.stabilize"):
        monkeypatch.setattr(importlib.import_module(module), "Choice", chosen)
