"""A base optimizer that writes down the gradients it sees, and gradients with spikes."""

import numpy as np
import torch

SHAPES = [(6, 5), (9,), (2, 3, 4), (), (4, 1)]


class Recorder(torch.optim.Optimizer):
    """SGD that remembers the gradients of each step."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})
        self.seen = []

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append([None if p.grad is None else p.grad.clone() for p in params])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


def parameters(dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype)) for shape in SHAPES]


def gradients(steps, seed=1, scale=0.1):
    """A list of arrays a step; one step in seven is a hundredfold, and now and then an entry alone."""
    rng = np.random.default_rng(seed)
    for t in range(1, steps + 1):
        grads = [rng.normal(size=shape) * scale * (100 if t % 7 == 0 else 1) for shape in SHAPES]
        if t % 5 == 0:
            grads[0][2, 3] *= 1000
        if t == 12:
            grads[1] = grads[1] * 0
        yield grads
