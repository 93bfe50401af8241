"""The rules of the papers in NumPy float64, one tensor at a time, written to be read beside them and not to be fast."""

import math
from dataclasses import dataclass, field

import numpy as np


def cosine(t: int, total: int, eta_min: float) -> float:
    return eta_min + (1 - eta_min) * (1 + math.cos(math.pi * t / (total + 1))) / 2


@dataclass
class StableSPAM:
    """One tensor under Stable-SPAM. ``step(g)`` moves ``p``; ``t`` is the optimizer's clock, ``skip()`` a step without
    a gradient.
    """

    p: np.ndarray
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    total_steps: int | None = None
    eta_min: float = 0.5
    reset_interval: int = 1000
    variant: str = "paper"
    robust: bool = False
    t: int = 0
    n: int = 0
    age: int = 0
    peak: float = 0.0
    mu: float = 0.0
    nu: float = 0.0
    seen: dict = field(default_factory=dict)

    def __post_init__(self):
        self.p = np.array(self.p, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)

    def skip(self):
        self.t += 1

    def step(self, g):
        self.t += 1
        g = np.array(g, dtype=np.float64)
        if not np.isfinite(g).all():
            return
        b1, b2 = self.betas
        g1 = self.gamma1
        if self.total_steps is not None:
            held = self.t if self.variant == "official" else min(self.t, self.total_steps + 1)
            b1, g1 = (
                b1 * cosine(held, self.total_steps, self.eta_min),
                g1 * cosine(held, self.total_steps, self.eta_min),
            )
        reset = self.reset_interval > 0 and self.t % self.reset_interval == 0
        self.n += 1
        self.p = self.p * (1 - self.lr * self.weight_decay)
        # AdaClip
        gmax = np.abs(g).max()
        entering = self._entering(gmax, self.peak, self.gamma3)
        self.peak = self.gamma3 * self.peak + (1 - self.gamma3) * entering
        limit = self.peak / (1 - self.gamma3**self.n)
        over = np.abs(g) > limit
        g = np.where(over, g / max(gmax, 1e-300) * limit, g)
        # AdaGN
        r = float(np.sqrt((g * g).sum()))
        entering = self._entering(r, self.mu, g1)
        self.mu = g1 * self.mu + (1 - g1) * entering
        self.nu = self.gamma2 * self.nu + (1 - self.gamma2) * entering**2
        mu_hat, nu_hat = self.mu / (1 - g1**self.n), self.nu / (1 - self.gamma2**self.n)
        if r > 0:
            g = g / r * mu_hat / (math.sqrt(nu_hat) + self.eps)
        self.seen = {
            "clip_limit": limit,
            "clipped": over.mean(),
            "grad_max": gmax,
            "norm_after": float(np.sqrt((g * g).sum())),
        }
        # MoRet and Adam
        if self.variant == "paper":
            if reset:
                self.m, self.v, self.age = self.m * 0, self.v * 0, 0
            self.age += 1
            self._adam(g, b1, b2, self.age)
        else:
            if reset:
                self.n = 1
            self._adam(g, b1, b2, self.n)
            if reset:
                self.m, self.v = self.m * 0, self.v * 0

    def _entering(self, x, mean, gamma):
        if not self.robust or self.n <= 10 or mean == 0:
            return x
        share = (1 - gamma) / (1 - gamma**self.n)  # of the newest value in the corrected mean
        return min(x, max(2.0, 1 + 0.1 / share) * mean / (1 - gamma ** (self.n - 1)))

    def _adam(self, g, b1, b2, age):
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        self.p = self.p - self.lr * (self.m / (1 - b1**age)) / (np.sqrt(self.v / (1 - b2**age)) + self.eps)


@dataclass
class SPAM:
    """One tensor under SPAM; ``mask`` (bool, the tensor's shape) holds the entries that are trained, None for all."""

    p: np.ndarray
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    threshold: float = 5000.0
    reset_interval: int = 500
    warmup_steps: int = 150
    clip_start: int = 20
    variant: str = "paper"
    mask: np.ndarray | None = None
    t: int = 0
    age: int = 0
    clipped: float = 0.0

    def __post_init__(self):
        self.p = np.array(self.p, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)

    def skip(self):
        self.t += 1

    def step(self, g, new_mask=None):
        self.t += 1
        g = np.array(g, dtype=np.float64)
        if not np.isfinite(g).all():
            return
        b1, b2 = self.betas
        every, since = self.reset_interval, self.t % self.reset_interval if self.reset_interval else self.t
        if every and since == 0:
            self.m, self.v = self.m * 0, self.v * 0
            self.age = self.age if self.variant == "official" else 0
            self.mask = self.mask if new_mask is None else new_mask
        self.age += 1
        warm = 1.0
        if every and self.t >= every and since < self.warmup_steps:
            warm = 1 - 0.99 * (1 + math.cos(math.pi * since / (self.warmup_steps + 1))) / 2
        on = np.ones(self.p.shape, bool) if self.mask is None else self.mask
        if self.variant == "paper":
            self.p = np.where(on, self.p * (1 - self.lr * self.weight_decay), self.p)
        if self.threshold and self.t >= self.clip_start and (not every or since >= self.clip_start):
            spike = g * g > self.threshold * self.v
            if self.variant == "paper":
                spike &= self.v != 0
            self.clipped = (spike & on).sum() / on.sum()
            g = np.where(spike, np.sign(g) * np.sqrt(self.threshold * self.v), g)
        self.m = np.where(on, b1 * self.m + (1 - b1) * g, self.m)
        self.v = np.where(on, b2 * self.v + (1 - b2) * g * g, self.v)
        bias1, bias2 = 1 - b1**self.age, 1 - b2**self.age
        if self.variant == "paper":
            update = (self.m / bias1) / (np.sqrt(self.v / bias2) + self.eps)
        else:
            update = math.sqrt(bias2) / bias1 * self.m / (np.sqrt(self.v) + self.eps)
        self.p = np.where(on, self.p - self.lr * warm * update, self.p)
        if self.variant == "official" and self.mask is None:
            self.p = self.p - self.lr * self.weight_decay * self.p


@dataclass
class SCALE:
    """One tensor under SCALE, of a given kind."""

    p: np.ndarray
    kind: str
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    norm: str = "rms"
    t: int = 0

    def __post_init__(self):
        self.p = np.array(self.p, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)

    def skip(self):
        pass

    def step(self, g):
        g = np.array(g, dtype=np.float64)
        if not np.isfinite(g).all():
            return
        self.t += 1
        self.p = self.p * (1 - self.lr * self.weight_decay)
        if self.kind == "vector":
            b1, b2 = self.betas
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g * g
            root = np.sqrt(self.v / (1 - b2**self.t)) + self.eps
            self.p = self.p - self.lr * self.m / (1 - b1**self.t) / root
            return
        if self.kind == "last":
            self.m = self.momentum * self.m + (1 - self.momentum) * g
            g = self.m
        flat = g.reshape(len(g), -1)
        axis = 0 if self.kind == "embedding" else 1
        reduce = np.mean if self.norm == "rms" else np.sum
        size = np.maximum(np.sqrt(reduce(flat * flat, axis=axis, keepdims=True)), 1e-8)
        self.p = self.p - self.lr * (flat / size).reshape(self.p.shape)
