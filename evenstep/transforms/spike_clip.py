"""SPAM's spike-aware clipping (arXiv:2501.06842): an entry is judged by the history of its own square."""

import torch
from torch import Tensor


class EntryClip:
    """Entries with ``g**2 > threshold * v`` become ``sign(g) * sqrt(threshold * v)``, for the tensors of one step, and
    are counted.

    ``active`` and ``forget`` are 0-d tensors, 1 or 0: whether to clip on this step, and whether the history is
    forgotten on it. An entry with ``v == 0`` has no history and stays as it is, unless ``zero_history`` (the official
    code's rule) makes it zero.
    """

    def __init__(self, threshold: float, active: Tensor, *, forget: Tensor, zero_history: bool):
        self.factor = threshold * (1 - forget)
        self.spread = torch.where(active > 0, 0.0, torch.inf)
        self.zero_history = zero_history
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, i: int, g: Tensor, v: Tensor) -> Tensor:
        """Clip a piece ``g`` of tensor ``i``, with ``v`` its second moment before this step."""
        cap = torch.mul(v, self.factor).sqrt_().add_(self.spread)
        if not self.zero_history:
            cap.add_(cap.clone().eq_(0), alpha=torch.finfo(v.dtype).max)
        clipped = torch.clamp(g, -cap, cap)
        self.parts.setdefault(i, []).append((torch.linalg.vector_norm(clipped), torch.ne(clipped, g).sum()))
        return clipped

    def found(self, norms: Tensor, counts: Tensor) -> None:
        """Take over what a kernel found, vectors ``[k]``."""
        self.parts = {i: [pair] for i, pair in enumerate(zip(norms.unbind(), counts.unbind(), strict=True))}

    def norms(self) -> Tensor:
        """2-norm of each tensor after clipping, ``[k]``."""
        return torch.stack(
            [torch.linalg.vector_norm(torch.stack([norm for norm, _ in self.parts[i]])) for i in sorted(self.parts)]
        )

    def counts(self) -> Tensor:
        """Number of entries clipped in each tensor, ``[k]``."""
        return torch.stack([torch.stack([count for _, count in self.parts[i]]).sum() for i in sorted(self.parts)])
