"""The transforms' rules in NumPy float64, from the papers: each takes the gradients of one step as a list of arrays and
returns what reaches the optimizer. None of them sees a gradient that is not finite.
"""

import math

import numpy as np


def norm_of(grads):
    return math.sqrt(sum(float((g * g).sum()) for g in grads))


def scaled(grads, limit):
    norm = norm_of(grads)
    return [g * limit / norm for g in grads] if norm > limit else grads


class AdaClip:
    def __init__(self, gamma3=0.999):
        self.gamma3, self.n, self.peak = gamma3, 0, {}

    def __call__(self, grads, params, t):
        self.n += 1
        out = []
        for i, g in enumerate(grads):
            gmax = np.abs(g).max()
            self.peak[i] = self.gamma3 * self.peak.get(i, 0.0) + (1 - self.gamma3) * gmax
            limit = self.peak[i] / (1 - self.gamma3**self.n)
            out.append(np.where(np.abs(g) > limit, g / max(gmax, 1e-300) * limit, g))
        return out


class AdaGN:
    def __init__(self, gamma1=0.7, gamma2=0.9, eps=1e-8, skips_zeros=False):
        self.g1, self.g2, self.eps, self.n, self.mu, self.nu = gamma1, gamma2, eps, {}, {}, {}
        self.skips_zeros = skips_zeros

    def __call__(self, grads, params, t):
        out = []
        for i, g in enumerate(grads):
            r = norm_of([g])
            if r == 0 and self.skips_zeros:
                out.append(g)
                continue
            n = self.n[i] = self.n.get(i, 0) + 1
            self.mu[i] = self.g1 * self.mu.get(i, 0.0) + (1 - self.g1) * r
            self.nu[i] = self.g2 * self.nu.get(i, 0.0) + (1 - self.g2) * r * r
            mean, square = self.mu[i] / (1 - self.g1**n), self.nu[i] / (1 - self.g2**n)
            out.append(g / r * mean / (math.sqrt(square) + self.eps) if r > 0 else g)
        return out


class SpikeClip:
    def __init__(self, threshold=5000.0, beta2=0.999, clip_start=20, every=0):
        self.threshold, self.beta2, self.start, self.every, self.v = threshold, beta2, clip_start, every, {}

    def __call__(self, grads, params, t):
        since = t % self.every if self.every else t
        out = []
        for i, g in enumerate(grads):
            v = self.v.get(i, np.zeros_like(g))
            if self.every and since == 0:
                v = v * 0
            if t >= self.start and since >= self.start:
                spike = (g * g > self.threshold * v) & (v != 0)
                g = np.where(spike, np.sign(g) * np.sqrt(self.threshold * v), g)
            self.v[i] = self.beta2 * v + (1 - self.beta2) * g * g
            out.append(g)
        return out


class ValueClip:
    def __init__(self, limit=0.1):
        self.limit = limit

    def __call__(self, grads, params, t):
        return [np.clip(g, -self.limit, self.limit) for g in grads]


class AGC:
    def __init__(self, clipping=0.01, eps=1e-3):
        self.clipping, self.eps = clipping, eps

    def __call__(self, grads, params, t):
        return [self.one(g, p) for g, p in zip(grads, params, strict=True)]

    def one(self, g, p):
        if g.ndim < 2:
            largest, size = self.clipping * max(np.linalg.norm(p), self.eps), np.linalg.norm(g)
            return g * largest / size if size > largest else g
        return np.stack([self.one(rg.reshape(-1), rp.reshape(-1)) for rg, rp in zip(g, p, strict=True)]).reshape(
            g.shape
        )


class NormClip:
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def __call__(self, grads, params, t):
        return scaled(grads, self.max_norm)


class ZClip:
    def __init__(self, alpha=0.97, threshold=2.5, warmup_steps=25, eps=1e-6):
        self.alpha, self.threshold, self.warmup, self.eps = alpha, threshold, warmup_steps, eps
        self.first, self.mean, self.var = [], None, None

    def __call__(self, grads, params, t):
        norm = norm_of(grads)
        if self.mean is None:
            self.first.append(norm)
            if len(self.first) == self.warmup:
                self.mean, self.var = np.mean(self.first), np.var(self.first)
            return grads
        z = (norm - self.mean) / (math.sqrt(self.var) + self.eps)
        kept = self.mean + self.threshold**2 / z * math.sqrt(self.var) if z > self.threshold else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * kept
        self.var = self.alpha * self.var + (1 - self.alpha) * (kept - self.mean) ** 2
        return scaled(grads, kept)


class AdaGC:
    def __init__(self, ratio=1.05, beta=0.98, max_norm=1.0, warmup_steps=100):
        self.ratio, self.beta, self.max_norm, self.warmup, self.n, self.gamma = (
            ratio,
            beta,
            max_norm,
            warmup_steps,
            0,
            {},
        )

    def __call__(self, grads, params, t):
        self.n += 1
        if self.n <= self.warmup:
            out = scaled(grads, self.max_norm)
            for i, g in enumerate(out):
                sizes = [x for x in (self.gamma.get(i, 0.0), norm_of([g])) if x > 0]
                self.gamma[i] = min(sizes, default=0.0)
            return out
        out = []
        for i, g in enumerate(grads):
            gamma = self.gamma.get(i, 0.0)
            g = scaled([g], self.ratio * gamma)[0] if gamma > 0 else g
            self.gamma[i] = self.beta * gamma + (1 - self.beta) * norm_of([g]) if gamma > 0 else norm_of([g])
            out.append(g)
        return out


class AutoClip:
    def __init__(self, percentile=10.0, window=1000):
        self.percentile, self.window, self.history = percentile, window, []

    def __call__(self, grads, params, t):
        self.history = [*self.history, norm_of(grads)][-self.window :]
        return scaled(grads, np.percentile(self.history, self.percentile))


class SkipStep:
    """Returns None for a step that is skipped."""

    def __init__(self, window=128, sigma=6.0):
        self.window, self.sigma, self.history = window, sigma, []

    def __call__(self, grads, params, t):
        norm, past = norm_of(grads), self.history[-self.window :]
        self.history.append(norm)
        if len(past) + 1 >= max(3, self.window // 2) and norm - np.mean(past) > self.sigma * np.std(past, ddof=1):
            return None
        return grads
