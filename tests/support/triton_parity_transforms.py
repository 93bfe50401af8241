"""Parity of the Triton kernels with the plain code: transforms before another optimizer; run by
test_triton.py."""

from dataclasses import replace

import pytest
import torch
from triton_support import (
    BF16,
    DEVICE,
    FLOAT,
    KERNELS,
    NUMBERS,
    randn,
    run,
    same,
    sample,
    seeded,  # noqa: F401 for pytest
    vector,
)

from evenstep import AdaClip, AdaGN, GradientStabilizer, NormClip, ZClip, stabilize
from evenstep.optim import base_optimizer, fused
from evenstep.optim.functional import Gradients, adaclip, adagn
from evenstep.optim.transforms import Transform, ValueClip

CLOSE = {"rtol": 3e-6, "atol": 1e-37}  # the plain code computes in fp32, the kernels in fp64


def both(tensors):
    """The gradients as measured by the plain code and by the kernels, which have to be equal so far."""
    plain, found = run(Gradients.measure(tensors, FLOAT)), run(Gradients.measure(tensors, FLOAT, kernels=KERNELS))
    assert torch.equal(plain.finite, found.finite) and torch.equal(plain.peak, found.peak)
    return plain, found


def equal(found, plain, usable):
    """Whether two vectors agree where the tensors are usable; of others nothing is kept."""
    same(found[usable], plain[usable], **CLOSE)


def counts(k):
    """Numbers of updates, this one included: first ones, and on both sides of the start of `robust`."""
    return torch.randint(0, 30, (k,), generator=NUMBERS).to(DEVICE).float() * vector(k, 0, 1).round() + 1


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("gamma3", [0.0, 0.5, 0.999])
def test_adaclip_limits(gamma3, robust):
    plain, found = both(sample())
    k = len(plain.tensors)
    n, gain = counts(k), plain.gain * vector(k, 0.5, 2)
    gain[3] = 0.0  # a gain of 0 leaves nothing to clip
    ema = plain.largest.nan_to_num() * vector(k, 0, 1.5) * (n > 1)
    plain, expected = adaclip(replace(plain, gain=gain), ema, n, gamma3, robust)
    found, new = adaclip(replace(found, gain=gain), ema, n, gamma3, robust)
    usable = plain.finite
    equal(new, expected, usable)
    assert torch.equal(found.limit.isinf(), plain.limit.isinf())
    for name in ("limit", "rescale"):
        equal(getattr(found, name), getattr(plain, name), ~plain.limit.isinf())
    assert (found.rescale[plain.limit.isinf()] == 1).all()
    with pytest.raises(ValueError, match="clipped already"):
        adaclip(found, ema, n, gamma3, robust)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.7, 0.9), (0.85, 0.99999)])
def test_adagn_gains(gammas, robust):
    plain, found = both([*sample(), randn(1200, scale=1e38), torch.full((3,), 3e38, device=DEVICE)])
    k = len(plain.tensors)
    limit = plain.peak * vector(k, 0.5, 1.5)
    plain, found = (run(x.clipped(limit).with_norms()) for x in (plain, found))
    equal(found.norms.raw, plain.norms.raw, plain.finite)
    equal(found.norms.clipped, plain.norms.clipped, plain.finite)
    assert torch.equal(found.norms.count, plain.norms.count)
    assert found.norms.raw[~plain.finite].isnan().all()
    n, norm = counts(k), plain.norm.nan_to_num(posinf=1e38)
    ema, rms = norm * vector(k, 0, 1.5) * (n > 1), norm * vector(k, 0, 1.5) * (n > 1)
    plain, *expected = adagn(plain, ema, rms, n, *gammas, 1e-8, robust)
    found, *new = adagn(found, ema, rms, n, *gammas, 1e-8, robust)
    assert torch.equal(found.finite, plain.finite)
    assert (~plain.finite).sum() == 4  # NaN, Inf, and two norms that are out of range
    equal(found.gain, plain.gain, plain.finite)
    assert not found.gain[~plain.finite].any()
    for mine, other in zip(new, expected, strict=True):
        equal(mine, other, plain.finite)


@pytest.mark.parametrize("k", [1, 3, 130, 400])
def test_scalars_are_read_and_kept_where_gradients_are_finite(k):
    rows = 3
    tensors = [randn() for _ in range((1 + rows) * k)]
    before, new, finite = torch.stack(tensors).view(-1, k), randn(rows, k), vector(k, 0, 1) > 0.3
    at = KERNELS.scalars(tensors)
    assert torch.equal(KERNELS.read(at), before.view(-1))
    KERNELS.keep(at, list(new), finite)
    skipped, *after = torch.stack(tensors).view(-1, k)
    assert torch.equal(skipped, before[0] + (~finite).float())
    assert torch.equal(torch.stack(after), torch.where(finite, new, before[1:]))
    KERNELS.keep(at[:k], [], ~finite)  # the counts alone
    assert torch.equal(torch.stack(tensors[:k]), before[0] + 1)


def test_scalars_that_kernels_do_not_serve():
    good = torch.zeros((), device=DEVICE)
    assert KERNELS.scalars([good, torch.zeros((), device=DEVICE, dtype=torch.float64)]) is None
    assert KERNELS.scalars([good, good]) is not None


class Halve(Transform):
    """A transform of a user's own, which returns a statistic that is no fp32 vector."""

    name = "halve"
    scalars = ("count",)

    def __call__(self, grads, state, step):
        yield from ()
        return grads.amplified(torch.full_like(grads.peak, 0.5)), {"count": state["count"].double().amax() + 1}


CHAINS = {
    "adaclip, adagn": lambda: [AdaClip(gamma3=0.5), AdaGN()],
    "robust": lambda: [AdaClip(gamma3=0.5, robust=True), AdaGN(robust=True)],
    "adagn, adaclip": lambda: [AdaGN(), AdaClip(gamma3=0.5)],
    "of the user": lambda: [Halve(), AdaClip(gamma3=0.5), GradientStabilizer()],
    "of the whole model": lambda: [AdaClip(gamma3=0.5), NormClip(0.5), AdaGN(), ZClip(warmup_steps=2)],
    "replaced": lambda: [AdaClip(gamma3=0.5), ValueClip(0.4), AdaGN()],
    "none": list,
}


class Replacing(torch.optim.Optimizer):
    """A base that makes new tensors in each step: the memory of its parameters, and one of its two moments."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state["momentum"] = state["momentum"] * 0.9 + p.grad if "momentum" in state else p.grad.clone()
            state.setdefault("m", torch.zeros_like(p)).data = state.get("m", p) * 0.5 + p.grad
            p.data = p - 0.1 * state["momentum"] - 0.1 * state["m"]


BASES = {
    "Replacing": Replacing,
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
}


def trained(make, base, option, steps, nonfinite="restore", dtype=FLOAT):
    """Parameters, base, result of `stabilize` after some steps on gradients that are the same for every option."""
    NUMBERS.manual_seed(1)
    shapes = (40, 9), (5, 300), (), (33,), (0, 3)
    params = [torch.nn.Parameter(randn(*shape, dtype=dtype)) for shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = stabilize(BASES[base](groups), *make(), fused=option, nonfinite=nonfinite, reset_interval=4)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, dtype=dtype, scale=30 if step == 2 else 1)
            if i == 3 and step < 2:
                p.grad.zero_()
        if step in (0, 3):
            params[1].grad[0, 0] = torch.nan
        if step == 4:
            params[3].grad[5] = -torch.inf
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("base", "nonfinite"), [("AdamW", "restore"), ("AdamW", "zero"), ("SGD", "skip"), ("Replacing", "restore")]
)
@pytest.mark.parametrize("chain", CHAINS)
def test_stabilised_steps_by_kernels_are_those_of_the_plain_code(chain, base, nonfinite, monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    monkeypatch.setattr(base_optimizer, "on_host", lambda x: False)  # as on a GPU, where no flag may be read
    monkeypatch.setattr(base_optimizer, "MIN_TURN_BYTES", 2000)  # several turns
    ways = [trained(CHAINS[chain], base, option, 7, nonfinite) for option in (None, False)]
    (mine, found), (plain, expected) = ways
    for p, q in zip(mine, plain, strict=True):
        same(p, q, rtol=1e-4, atol=1e-5)
        assert found.statistics[p].keys() == expected.statistics[q].keys()
        for name, value in expected.statistics[q].items():
            other = found.statistics[p][name]
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7, msg=name)
    for name, values in expected.stats.items():
        torch.testing.assert_close(found.stats[name], values, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    assert [found.statistics[p]["skipped"].item() for p in mine] == [0, 2, 0, 1, 0]


def test_bf16_gradients(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    ways = [trained(CHAINS["adaclip, adagn"], "SGD", option, 5, dtype=BF16) for option in (None, False)]
    for p, q in zip(*(params for params, _ in ways), strict=True):
        same(p, q, rtol=0.02, atol=0.02)


def test_a_step_of_the_base_that_fails_leaves_the_statistics(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    params, optimizer = trained(CHAINS["adaclip, adagn"], "AdamW", None, 2)
    before = {p: {name: x.clone() for name, x in optimizer.statistics[p].items()} for p in params}
    given = [p.grad for p in params]

    def failing(*args):
        raise RuntimeError("the base fails")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the base fails"):
        patch.setattr(optimizer.base, "step", failing)
        optimizer.step()
    for p, grad in zip(params, given, strict=True):
        assert p.grad is grad
        assert all(torch.equal(optimizer.statistics[p][name], x) for name, x in before[p].items())
    optimizer.step()
    assert not torch.equal(optimizer.statistics[params[0]]["adagn.n"], before[params[0]]["adagn.n"])


def test_statistics_that_move_or_are_replaced_are_followed(monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device_type: KERNELS)
    (p, *_), optimizer = trained(CHAINS["adaclip, adagn"], "SGD", None, 3)
    n = optimizer.statistics[p]["adaclip.n"]
    optimizer.statistics[p]["adaclip.n"] = n + 10  # other memory
    optimizer.step()
    assert optimizer.statistics[p]["adaclip.n"] == n + 11
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.statistics[p]["adaclip.n"] == n + 12
    optimizer.statistics[p]["adaclip.n"] = optimizer.statistics[p]["adaclip.n"].double()  # the plain code takes over
    optimizer.step()
    assert (
        optimizer.statistics[p]["adaclip.n"] == n + 13 and optimizer.statistics[p]["adaclip.n"].dtype == torch.float64
    )
