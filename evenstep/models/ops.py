"""Operations of the model that plain PyTorch runs slowly, each with a faster form that computes the same.

In eager mode on a CPU, autograd records a chain of small operations for a norm or a rotation, and writes, saves and
reads every intermediate result, which takes longer than the arithmetic. An explicit backward pass takes a norm from 4.4
to 1.4 ms and a rotation from 2.1 to 1.4 ms at 8 x 256 x 128 on one core, and saves only its inputs. Under torch.compile
and on a GPU the plain formula is left to the compiler or to PyTorch's own fused kernel.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evenstep.kernels import cpu_loss


def _eager_cpu(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D], weight [D]; statistics in fp32."""
    if _eager_cpu(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # scale [..., 1] = (mean(x^2) + eps)^-1/2, one value per row; the backward pass needs only it, x and weight.
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = x s w with s = (mean(x^2) + eps)^-1/2, so dx = s w g - x s^3 mean(x w g) and dw = sum over rows of g x s.
        # Both sums over g x [N, D] are matrix-vector products, which a CPU runs far faster than a product and a
        # reduction.
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        # grad is a transposed view where attention is written out, as with a soft-cap.
        gx = (grad * x).reshape(-1, size)
        dweight = torch.mv(gx.t(), scale.reshape(-1))
        slope = torch.mv(gx, weight).view_as(scale).mul_(scale**3).div_(-size)
        dx = torch.mul(grad, weight, out=gx.view_as(x)).mul_(scale).addcmul_(x, slope)
        return dx, dweight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): x [B, T, heads, D] rotated by the angle of each position, in x's dtype.

    Coordinates i and i + D/2 of a head form a plane (Hugging Face's convention). ``cos`` and ``sin`` are fp32
    [T, 1, D], and the first half of ``sin`` is negated, so that the rotation is x * cos + (x with its halves swapped) *
    sin. The arithmetic is fp32.
    """
    return _Rotate.apply(x, cos, sin) if _eager_cpu(x) else _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # roll by D/2 swaps the halves of each head. In 16 bits cos and sin promote the products to fp32.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # the transpose of a rotation is the rotation by the opposite angle
        return _rotate(grad, cos, -sin), None, None


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), which bounds ``x`` smoothly (Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(x / cap)


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, cap: float, mask: Tensor | None) -> Tensor:
    """Attention whose logits q k^T / sqrt(D) are soft-capped before the mask and the softmax, as in Gemma 2.

    ``q`` is [B, heads, Tq, D], ``k`` and ``v`` are [B, groups, Tk, D], each for heads / groups heads. ``mask``, bool,
    broadcasts to [B, heads, Tq, Tk] and is True where a query sees a key; None: every query sees every key. PyTorch's
    fused attention has no soft-cap, so the logits are materialised: 8 bytes each are kept for the backward pass.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = softcap(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def largest_logits(q: Tensor, k: Tensor, queries: int) -> Tensor:
    """The largest causal attention logit q k / sqrt(D) of each head, fp32 [heads], over ``queries`` evenly spaced
    positions. ``q`` is [B, heads, T, D], ``k`` [B, groups, T, D]; the work is queries / T of that of attention."""
    length = q.shape[2]
    # The last position is among them: it sees all keys.
    rows = torch.linspace(length - 1, 0, min(queries, length), device=q.device).round().long()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q[:, :, rows] @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])  # [B, heads, queries, T]
    hidden = torch.arange(length, device=q.device) > rows[:, None]
    return logits.masked_fill(hidden, -math.inf).amax((0, 2, 3))


def document_mask(positions: Tensor) -> Tensor:
    """The attention mask of packed rows, bool [B, 1, T, T]: True where a query (third dimension) sees a key (fourth).

    ``positions``, int64 [B, T], count from 0 in each document and are -1 for padding. A token sees itself and the
    tokens before it in its document; a padding token sees itself alone.

    Example:
        >>> document_mask(torch.tensor([[0, 1, 0]]))[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    # A position of 0 or -1 starts a new document, so that the running count numbers the documents of a row.
    documents = (positions <= 0).cumsum(1)[:, None]
    ones = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device)
    return (documents[..., :, None] == documents[..., None, :]) & ones.tril()


def cross_entropy_and_z_loss(logits: Tensor, targets: Tensor, z_loss: float, reduction: str) -> Tensor:
    """The cross entropy of ``logits`` [N, V] (in fp32) and the z-loss z * logsumexp(logits)^2 of PaLM
    (arXiv:2204.02311, section 5), fp32 [2]. ``targets`` are int64 [N]; -100 does not count.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> cross_entropy_and_z_loss(logits, torch.tensor([1]), z_loss=0.1, reduction="mean")  # log 2, 0.1 (log 2)^2
        tensor([0.6931, 0.0480])
    """
    sums = _CrossEntropyAndZLoss.apply(logits.float(), targets, z_loss)
    return sums if reduction == "sum" else sums / (targets != -100).sum()


class _CrossEntropyAndZLoss(torch.autograd.Function):
    """One backward pass for both sums, so that their gradient is the only tensor [N, V] beside the logits: autograd
    would keep a softmax for each."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        lse = logits.logsumexp(1)  # [N], the log of the softmax's normaliser Z
        counts = (targets != -100).to(lse.dtype)  # a product: selecting rows would wait for a GPU
        # Only -100 is replaced, so that another negative target is an error and not the token 0.
        picked = logits.gather(1, targets.masked_fill(targets == -100, 0)[:, None]).squeeze(1)
        ctx.save_for_backward(logits, targets, lse)
        ctx.z_loss = z_loss
        return torch.stack((((lse - picked) * counts).sum(), z_loss * (lse.square() * counts).sum()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # With p = softmax(x): d lse / dx = p, so dx = (g0 + 2 z g1 lse) p - g0 onehot(target), in rows that count.
        logits, targets, lse = ctx.saved_tensors
        counts = (targets != -100).to(lse.dtype)
        scale = (grad[0] + 2 * ctx.z_loss * grad[1] * lse) * counts
        dx = torch.sub(logits, lse[:, None]).exp_().mul_(scale[:, None])
        dx.scatter_add_(1, targets.masked_fill(targets == -100, 0)[:, None], (-grad[0] * counts)[:, None])
        return dx, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    reduction: str,
    rows: int,
    z_loss: float | None = None,
    cap: float | None = None,
    compiled: bool = False,
) -> Tensor:
    """Cross entropy of ``head(hidden)``, 0-d fp32, with at most ``rows`` rows of logits in memory at once. With
    ``z_loss`` the result has the z-loss too, as in `cross_entropy_and_z_loss`; ``cap`` is the soft-cap of the logits.

    ``hidden`` is [N, D], ``targets`` int64 [N]. With a plain ``nn.Linear`` without a bias, the forward pass computes
    the gradients of each chunk while its logits exist, so that no logit is computed twice (`_LinearCrossEntropy`). Any
    other head, such as a low-bit layer or a sharded weight, and a call under torch.compile have their chunks recomputed
    in the backward pass, at the cost of one more product with the head. ``compiled``: compile the arithmetic of a chunk
    between its products, which halves the memory traffic of a GPU; a CPU's own kernels are faster than compiled ones.
    """
    if torch.compiler.is_compiling() or not _is_plain(hidden, head):
        return _checkpointed_cross_entropy(hidden, head, targets, reduction, rows, z_loss, cap)
    weight: Tensor = head.weight  # type: ignore[attr-defined]
    sums: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, targets, rows, z_loss or 0.0, cap, compiled, torch.is_grad_enabled()
    )
    if z_loss is None:
        sums = sums[0]
    return sums if reduction == "sum" else sums / (targets != -100).sum()


def _is_plain(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``head`` is a product with a weight that this process has whole: no subclass, and no DTensor. Hooks of
    the head are not called, so that a measurement of the last layer does not change the training."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and type(hidden) is Tensor
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Sums of cross entropy and z-loss, fp32 [2], of hidden [N, D] with the weight [V, D] of the head.

    The derivative by the logits is known up to a factor as soon as the logits are: the forward pass multiplies it with
    the weight and with hidden at once, and keeps two gradients [N, D] and [V, D] instead of logits [N, V] (as in Liger
    Kernel, arXiv:2410.10989, section 3.2). The factor, which is known in the backward pass only, has to be the same for
    both sums, as in a loss that adds them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        z_loss: float,
        cap: float | None,
        compiled: bool,
        gradients: bool,  # in here gradients are always off
    ) -> Tensor:
        of_hidden, of_weight = (needed and gradients for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # 16 bits would lose what many chunks add: their sum is fp32.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = max(1, -(-len(hidden) // rows))
        size = max(1, -(-len(hidden) // count))  # equal chunks, so that a compiled function sees one shape
        sums = hidden.new_zeros(2, dtype=wide)
        dhidden = torch.empty_like(hidden) if of_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        terms = _terms
        if hidden.is_cpu and dtype in cpu_loss.DTYPES and cap is None and _kernel_serves():
            terms = cpu_loss.terms
        elif compiled and not hidden.is_cpu:
            terms = _compiled_terms()
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            memory = head.new_empty(size, len(head))  # one buffer for the logits of all chunks
            part = torch.empty_like(head) if dweight is not None and dtype != wide else None
            for start in range(0, len(hidden), size):
                h = hidden[start : start + size].to(dtype)  # [n, D]
                counts = targets[start : start + size, None] != -100  # [n, 1]
                logits = torch.mm(h, head.t(), out=memory[: len(h)])
                # Only -100 is replaced, so that another negative target is an error and not the token 0.
                picked = targets[start : start + size, None].masked_fill(~counts, 0)
                chunk, dlogits = terms(logits, picked, counts, z_loss, cap, of_hidden or of_weight)
                sums += chunk
                # Rows that do not count are left out here, in [n, D], and not in dlogits [n, V].
                if dhidden is not None:
                    torch.mul(dlogits @ head, counts, out=dhidden[start : start + size])
                if dweight is None:
                    continue
                if part is None:
                    dweight.addmm_(dlogits.t(), h * counts)
                else:
                    _add(dweight, torch.mm(dlogits.t(), h * counts, out=part))
        ctx.gradients, ctx.dtype, ctx.z_loss = (dhidden, dweight), weight.dtype, z_loss
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss allows one backward(): call model.loss again, or leave out its chunk")
        # Taken out of ctx, so that they are scaled in place, and that the parameter keeps the tensor without a copy.
        dhidden, dweight = ctx.gradients
        ctx.gradients = None
        if not ctx.z_loss:
            factor = grad[0]
        else:
            # A branch on the values would wait for a GPU: unequal factors become NaN there.
            factor = torch.where(grad[0] == grad[1], grad[0], math.nan)
            if grad.is_cpu and grad[0] != grad[1]:
                raise RuntimeError("the gradients of cross entropy and z-loss differ: add both, or leave out the chunk")
        if dhidden is not None:
            dhidden.mul_(factor)
        if dweight is not None:
            dweight = dweight.mul_(factor).to(ctx.dtype)
        return dhidden, dweight, *[None] * 6


def _add(to: Tensor, x: Tensor) -> None:
    """``to += x`` for ``x`` [n, D] in fewer bits. On a CPU torch would convert all of ``x`` into new memory, whose
    pages take longer to get than the sum takes; here pieces of 2,048 rows share memory."""
    if not to.is_cpu:
        to += x
        return
    wide = torch.empty_like(to[:2048])
    for piece, addend in zip(to.split(2048), x.split(2048), strict=True):
        piece += wide[: len(addend)].copy_(addend)


def _terms(
    logits: Tensor, picked: Tensor, counts: Tensor, z_loss: float, cap: float | None, gradients: bool
) -> tuple[Tensor, Tensor]:
    """Sums of cross entropy and z-loss [2] of a chunk, and their derivative by its logits [n, V], in the dtype of
    ``logits``, which are overwritten. ``picked`` are the targets [n, 1] and ``counts`` whether a row counts [n, 1]; the
    derivative is that of a row that counts."""
    wide, slope = torch.promote_types(logits.dtype, torch.float32), None
    if cap is not None:
        tanh = torch.tanh(logits.to(wide) / cap)
        slope, x = 1 - tanh.square(), cap * tanh  # d (c tanh(x / c)) / dx = 1 - tanh^2
    else:
        x = logits
    peak, target = x.amax(1, keepdim=True).to(wide), x.gather(1, picked).to(wide)
    # In place where the dtype allows it: the kernel writes a row after its last read of it.
    p = torch.softmax(x, 1, out=x) if x.dtype == wide else torch.softmax(x, 1, dtype=wide)
    # The largest probability is exp(peak - lse), so that lse = peak - log(max p): one pass instead of a second exp.
    lse = peak - p.amax(1, keepdim=True).log()
    sums = torch.stack((((lse - target) * counts).sum(), z_loss * (lse.square() * counts).sum()))
    if gradients:
        # With p = softmax(x): d lse / dx = p, so d (lse - x_t + z lse^2) / dx = (1 + 2 z lse) p - onehot(t).
        if z_loss:
            p.mul_(1 + 2 * z_loss * lse)
        p.scatter_add_(1, picked, torch.full_like(lse, -1.0))
        if slope is not None:
            p.mul_(slope)
    return sums, p.to(logits.dtype)


@functools.cache
def _kernel_serves() -> bool:
    """Whether there is a CPU kernel that agrees with `_terms`. A difference warns once, and the plain code serves."""
    if not cpu_loss.ready():
        return False
    problems = [problem for _, problem in kernel_differences().values() if problem]
    for problem in problems[:1]:
        warnings.warn(
            f"the CPU kernel of the loss {problem}; the plain code serves instead (see evenstep doctor --check)",
            stacklevel=2,
        )
    return not problems


def kernel_differences() -> dict[str, tuple[float, str | None]]:
    """The largest difference between the CPU kernel of the loss and `_terms` on a small example, by dtype, and the
    problem in words, None where all is well."""
    found: dict[str, tuple[float, str | None]] = {}
    for dtype, most in zip(cpu_loss.DTYPES, (1e-5, 2**-8), strict=True):
        # Values without the random generator, whose state belongs to the user; one row does not count.
        x = torch.arange(4 * 65, dtype=torch.float32, device="cpu").square().mul(0.7).sin().mul(5).view(4, 65).to(dtype)
        picked = torch.arange(4, device="cpu")[:, None] * 21
        counts = picked != 21
        try:
            sums, slope = _terms(x.clone(), picked, counts, 0.01, None, True)
            ours, our_slope = cpu_loss.terms(x.clone(), picked, counts, 0.01, None, True)
            apart = max(
                ((ours - sums) / sums).abs().max().item(), (our_slope - slope)[counts[:, 0]].float().abs().max().item()
            )
            problem = None if apart <= most else f"differs from the plain code by {apart:.2g}"
        except Exception as error:  # whatever it is, the plain code can serve
            apart, problem = math.inf, f"raises {type(error).__name__}: {error}"
        found[str(dtype).removeprefix("torch.")] = apart, problem
    return found


@functools.cache
def _compiled_terms() -> Callable[..., tuple[Tensor, Tensor]]:
    """The same formulas in a form that a compiler fuses into two passes over the logits."""

    def terms(
        logits: Tensor, picked: Tensor, counts: Tensor, z_loss: float, cap: float | None, gradients: bool
    ) -> tuple[Tensor, Tensor]:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        x = x if cap is None else softcap(x, cap)
        lse = x.logsumexp(1, keepdim=True)
        sums = torch.stack(
            (((lse - x.gather(1, picked)) * counts).sum(), z_loss * (lse.square() * counts).sum()),
        )
        if not gradients:
            return sums, logits
        # A comparison instead of a scattered -1, which would be a kernel of its own.
        hot = torch.arange(x.shape[1], device=x.device) == picked
        dx = (1 + 2 * z_loss * lse) * (x - lse).exp() - hot.to(x.dtype)
        if cap is not None:
            dx = dx * (1 - (x / cap).square())
        return sums, dx.to(logits.dtype)

    return torch.compile(terms)


def _checkpointed_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    reduction: str,
    rows: int,
    z_loss: float | None,
    cap: float | None,
) -> Tensor:
    def part(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h) if cap is None else softcap(head(h), cap)
        if z_loss is not None:
            return cross_entropy_and_z_loss(logits, t, z_loss, "sum")
        return F.cross_entropy(logits.float(), t, reduction="sum")

    if len(hidden) <= rows:  # nothing is saved by computing all logits twice
        total = part(hidden, targets)
        return total if reduction == "sum" else total / (targets != -100).sum()
    parts = [
        checkpoint(part, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    # Sums, not means: chunks may have different numbers of targets that count.
    total = torch.stack(parts).sum(0)
    return total if reduction == "sum" else total / (targets != -100).sum()


# ---- the loss under tensor parallelism ----
#
# The processes of a tensor-parallel group have the same hidden states. Each one computes the logits of its own rows, so
# that the products with the head are shared out, and the sums are added up. The head is gathered whole anyway, because
# FSDP shards it over all processes, and FSDP averages its gradient over them. That of one process therefore counts
# size-fold (`sum_over`), and the gradient of the hidden states is divided by the size again (`own_rows`).


def own_rows(hidden: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The part of hidden [N, D] and of targets [N] whose loss this process of ``group`` computes: N / size rows, or
    one more. The backward pass gives all processes the gradient of all rows, by one all-reduce of [N, D]."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    start, end = len(hidden) * rank // size, len(hidden) * (rank + 1) // size
    rows: Tensor = _OwnRows.apply(hidden, start, end, group)
    return rows, targets[start:end]


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, start: int, end: int, group: dist.ProcessGroup) -> Tensor:
        ctx.given = hidden.shape, start, end, group
        return hidden[start:end].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        shape, start, end, group = ctx.given
        whole = grad.new_zeros(shape)  # no two processes have the same row, so that the sum is exact in 16 bits too
        whole[start:end] = grad / dist.get_world_size(group)
        dist.all_reduce(whole, group=group)
        return whole, None, None, None


def sum_over(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``sums`` over the processes of ``group``; its gradient counts size-fold, as described above."""
    total: Tensor = _SumOver.apply(sums, group)
    return total


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None
