"""What several test files share."""

import contextlib
import importlib

import pytest
from hypothesis import settings
from lowbit_support import plain_code

from evenstep.optim.fused import Choice

# The same examples each time: whoever changes something else should not meet a new one. No deadline: the machine may be
# busy. For other examples: pytest --hypothesis-profile=default
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.fixture(params=[None, False], ids=["kernels", "plain"])
def either_code(request, monkeypatch):
    """The same test by kernels, where there are any, and by the plain code."""

    def chosen(fused, *rest):
        return Choice(request.param if fused is None else fused, *rest)

    for module in ("evenstep.optim.optimizer", "evenstep.optim.stabilize"):
        monkeypatch.setattr(importlib.import_module(module), "Choice", chosen)


@pytest.fixture(params=["kernel", "plain"])
def either_lowbit_code(request):
    """The same test with the CPU kernel of fake quantisation, where there is one, and with the plain code."""
    with contextlib.nullcontext() if request.param == "kernel" else plain_code():
        yield
