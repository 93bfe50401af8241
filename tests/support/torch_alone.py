"""Run by test_packaging.py: what a user does with evenstep where torch and NumPy, and what they need, are all there is.

The other packages of this environment are hidden from the import system, as if they had never been installed.
"""

# ruff: noqa: E402
import re
import sys
from importlib import metadata


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names):
    """The distributions that ``names`` need, themselves included, extras left out."""
    found, left = set(), list(names)
    while left:
        name = normal(left.pop())
        if name not in found:
            found.add(name)
            try:
                wanted = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            left += [re.match(r"[\w.-]+", each)[0] for each in wanted if "extra ==" not in each]
    return found


allowed = needed(["torch", "numpy"])
hidden = {
    module
    for module, owners in metadata.packages_distributions().items()
    if module != "evenstep" and not allowed & {normal(owner) for owner in owners}
}
assert {"transformers", "pytest"} <= hidden, "nothing is hidden: this test would prove nothing"


class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Finder(x) if getattr(x, "__name__", "") == "PathFinder" else x for x in sys.meta_path]

import evenstep

assert "torch" not in sys.modules

import torch

from evenstep.cli import main
from evenstep.telemetry.sinks import JsonlSink

for public in evenstep.__all__:
    getattr(evenstep, public)
model = evenstep.quantize_(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 2)), "fp4")
for optimizer in (
    evenstep.StableSPAM(model.parameters()),
    evenstep.SPAM(model.parameters(), density=0.5),
    evenstep.SCALE(evenstep.scale_groups(model, hidden="0.weight", last="1.weight")),
    evenstep.stabilize(torch.optim.AdamW(model.parameters()), evenstep.GradientStabilizer()),
):
    with evenstep.SpikeMonitor(model, optimizer, sinks=[JsonlSink("metrics.jsonl")], say=None):
        model(torch.ones(1, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
assert main(["doctor"]) == 0
assert main(["report", "metrics.jsonl"]) == 0
assert not hidden & {name.partition(".")[0] for name in sys.modules}
