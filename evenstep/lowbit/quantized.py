"""A quantised tensor in memory: codes and scales, packed and unpacked, and back to the original dtype.

``dequantize(quantize(x, f))`` equals ``fake_quantize(x, f)`` to the last bit: both run the arithmetic of formats.py,
and the stored parts (codes, scales in their own dtype, zero points, outliers) lose nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from evenstep.errors import EvenstepError
from evenstep.lowbit.fake_quant import as_dtype, as_rows, as_rows_shape, check, in_blocks, noise_like, split, spread
from evenstep.lowbit.formats import Blocks, Format, dequantize_blocks, quantize_blocks, tensor_scale

# PyTorch's dtypes of the stored scales; e4m3fn is OCP's E4M3 (finite: it has NaN, but no infinity).
SCALE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}


# Frozen, and every tensor of it is new: a Quantized never aliases the tensor that it was made from.
@dataclass(frozen=True)
class Quantized:
    """A tensor in a low-bit format, as R rows of C entries along the format's axis, with G groups in each row.

    Attributes:
        format: the format.
        shape, dtype: of the original tensor, with the format's axis moved to the end; `dequantize` restores both.
        codes: uint8 [R, C], one code per entry; packed: uint8 [R, ceil(C * bits / 8)], the first in the lowest bits.
        scale: [R, G], in the scale's own dtype; with two-dimensional blocks one row per ``block_rows`` rows.
        zero: uint8 zero points of the shape of ``scale``; None for symmetric formats.
        tensor_scale: fp32, 0-d or [R, 1]; None for formats without one.
        positions: int16 or int32 [R, G, k], the position of each kept outlier in its group; None without outliers.
        kept: fp32 [R, G, k], the values of the kept outliers.
        packed: whether codes lie side by side without gaps.
    """

    format: Format
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    tensor_scale: Tensor | None = None
    positions: Tensor | None = None
    kept: Tensor | None = None
    packed: bool = False

    def pack(self) -> Quantized:
        """The same with codes side by side without gaps: two of 4 bits in a byte, four of 6 bits in three bytes."""
        if self.packed:
            return self
        return dataclasses.replace(self, codes=pack_bits(self.codes, self.format.spec.bits), packed=True)

    def unpack(self) -> Quantized:
        """The inverse of ``pack``."""
        if not self.packed:
            return self
        width = as_rows_shape(self.shape, self.format)[1]
        return dataclasses.replace(self, codes=unpack_bits(self.codes, self.format.spec.bits, width), packed=False)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have to be stored, by attribute name."""
        named = {name: getattr(self, name) for name in ("codes", "scale", "zero", "tensor_scale", "positions", "kept")}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [R, C] of ``bits`` bits into uint8 [R, ceil(C * bits / 8)].

    Code i starts at bit i * bits of its row, counted from the lowest bit of the first byte. The unused bits of the last
    byte are zero.
    """
    if bits == 8:
        return codes
    rows, width = codes.shape
    # Whole bytes: eight codes of any width fill a whole number of them.
    codes = torch.nn.functional.pad(codes, (0, -width % 8))
    if bits == 4:
        packed = codes[:, ::2] | codes[:, 1::2] << 4  # the first code in the low half of the byte
    else:
        # Any width: write each code as single bits [R, C, bits], then read eight bits at a time [R, bytes, 8].
        place = torch.arange(8, dtype=torch.uint8, device=codes.device)
        ones = (codes.unsqueeze(-1) >> place[:bits]) & 1
        packed = (ones.reshape(rows, -1, 8) << place).sum(-1, dtype=torch.uint8)
    return packed[:, : -(-width * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of ``pack_bits`` for rows of ``width`` codes."""
    if bits == 8:
        return packed
    # The low half of each byte first, then the high half: [R, bytes] -> [R, bytes, 2] -> [R, 2 * bytes].
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[:, :width]
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    ones = ((packed.unsqueeze(-1) >> place) & 1).flatten(-2)[:, : width * bits]
    return (ones.reshape(len(packed), width, bits) << place[:bits]).sum(-1, dtype=torch.uint8)


def quantize(x: Tensor, format: Format | str, generator: torch.Generator | None = None) -> Quantized:
    """Quantise ``x`` to codes and scales.

    Args:
        x: a tensor of any floating dtype with at least one entry.
        format: a ``Format``, or a name in ``FORMATS``.
        generator: as for ``fake_quantize``.

    Returns:
        An unpacked ``Quantized``; its method ``pack`` removes the gaps between the codes.

    Raises:
        EvenstepError: as ``fake_quantize``, and for an empty tensor.

    Example:
        >>> q = quantize(torch.tensor([[0.5, -1.0, 3.0, 7.0]]), "int4")
        >>> q.codes  # 15 is -1 in two's complement
        tensor([[ 0, 15,  3,  7]], dtype=torch.uint8)
        >>> q.pack().codes.shape, q.scale.shape
        (torch.Size([1, 2]), torch.Size([1, 1]))
        >>> dequantize(q)
        tensor([[ 0., -1.,  3.,  7.]])
    """
    fmt = check(x, format)
    if not x.numel():
        raise EvenstepError(f"a tensor of shape {list(x.shape)} holds nothing to quantise")
    with torch.no_grad():
        # The format's axis last, then rows [R, C] in fp32.
        along = x.movedim(fmt.axis, -1) if x.dim() else x
        rows = as_rows(along, fmt)
        total = tensor_scale(rows, fmt)
        strips = []
        # The tensor is cut into strips of whole row blocks, and each strip into whole groups and the shorter last one;
        # the parts of the pieces are joined in the same order.
        for strip in split(rows, -2, fmt.block_rows):
            columns = [_encode_piece(piece, fmt, total, generator) for piece in split(strip, -1, fmt.group)]
            strips.append({name: torch.cat([part[name] for part in columns], 1) for name in columns[0]})
        parts = {name: torch.cat([strip[name] for strip in strips], 0) for name in strips[0]}
    return Quantized(fmt, along.shape, x.dtype, packed=False, tensor_scale=total, **parts)


def _encode_piece(
    piece: Tensor, fmt: Format, total: Tensor | None, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The parts of one piece: codes [R, C], scale [R / block_rows, G], and, depending on the format, zero (as scale),
    positions and kept [R, G, k]."""
    x, dims = in_blocks(piece, fmt)  # [R, G, group]
    coded = quantize_blocks(x, fmt, dims, spread(total), noise_like(x, fmt, generator))
    parts: dict[str, Tensor] = {}
    # The sign comes from x, since the rounding may have lost that of a zero.
    if coded.zero is None:
        codes = fmt.spec.encode(coded.values, x.signbit())
    else:
        codes = (coded.values + coded.zero).to(torch.uint8)
        parts["zero"] = _flat(coded.zero, dims).to(torch.uint8)
    # As many positions and values for every group, so that both are rectangular [R, G, k].
    if coded.limit is not None and coded.bits is not None:
        count = min(fmt.outliers, x.shape[-1])
        found = coded.bits.topk(count, -1)
        # k positions are stored for every group. An entry that ties with the limit is quantised like the others, so its
        # dequantised value is stored: putting it back then changes nothing.
        # Hazard: dequantize_blocks overwrites the values, so that the codes have to be computed before.
        plain = dequantize_blocks(coded, fmt, spread(total)).gather(-1, found.indices)
        kept = torch.where(found.values > coded.limit, x.gather(-1, found.indices), plain)
        missing = fmt.outliers - count  # a group smaller than k repeats its last one
        kept, where = (torch.cat((t, t[..., -1:].expand(*t.shape[:-1], missing)), -1) for t in (kept, found.indices))
        parts["kept"] = kept
        # int16 is enough for positions in a group of at most 2 ** 15 entries; a whole row (group 0) may be longer.
        parts["positions"] = where.to(torch.int16 if fmt.group <= 2**15 and fmt.group else torch.int32)
    scale = _flat(coded.scale, dims)
    if fmt.scale == "e8m0":  # the biased exponent is the bit pattern; a cast would convert its value instead
        scale = scale.to(torch.uint8).view(torch.float8_e8m0fnu)
    return {"codes": codes.reshape(piece.shape), "scale": scale.to(SCALE_DTYPES[fmt.scale]), **parts}


def _flat(scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    """[R, G, 1] or [R / block_rows, 1, G, 1] -> [rows, G]."""
    return scale.squeeze(-1) if dims == (-1,) else scale.squeeze(-1).squeeze(-2)


def dequantize(q: Quantized) -> Tensor:
    """The tensor that ``q`` represents, in its original dtype and shape; equal to ``fake_quantize`` to the bit.

    Example:
        >>> from evenstep.lowbit import fake_quantize
        >>> x = torch.randn(3, 40)
        >>> torch.equal(dequantize(quantize(x, "mxfp4")), fake_quantize(x, "mxfp4"))
        True
    """
    q, fmt = q.unpack(), q.format
    with torch.no_grad():
        # `row` counts rows of entries, `line` rows of scales: one for every `block_rows` rows.
        strips, row, line = [], 0, 0
        for strip in split(q.codes, -2, fmt.block_rows):
            height, lines = strip.shape[0], -(-strip.shape[0] // fmt.block_rows)
            parts, column = [], 0
            for piece in split(strip, -1, fmt.group):
                # The scales of this piece are [line : line + lines, column : column + groups]; outliers have a row of
                # positions per row of entries.
                groups = in_blocks(piece, fmt)[0].shape[-2]
                at = (slice(line, line + lines), slice(column, column + groups))
                rows_at = (slice(row, row + height), at[1])
                parts.append(_decode_piece(piece, q, at, rows_at))
                column += groups
            strips.append(torch.cat(parts, -1))
            row, line = row + height, line + lines
        out = as_dtype(torch.cat(strips, -2), q.dtype).view(q.shape)
    return out.movedim(-1, fmt.axis) if q.shape else out


def _decode_piece(piece: Tensor, q: Quantized, at: tuple[slice, slice], rows_at: tuple[slice, slice]) -> Tensor:
    fmt = q.format
    codes, dims = in_blocks(piece, fmt)

    # [rows, G] -> the part of this piece, with 1 in the place of the dimensions that share a scale: [R, G, 1], or
    # [R / block_rows, 1, G, 1].
    def shaped(t: Tensor) -> Tensor:
        t = t[at].unsqueeze(-1)
        return t if dims == (-1,) else t.unsqueeze(1)

    # As `Blocks` has it: E8M0 as a biased exponent in int32, every other scale in fp32.
    scale = shaped(q.scale.view(torch.uint8)).to(torch.int32) if fmt.scale == "e8m0" else shaped(q.scale).float()
    # A table lookup by code, [2 ** bits] -> [R, G, group]; asymmetric codes are the values themselves.
    grid = fmt.spec.values(piece.device)
    values = grid[codes.long()] if q.zero is None else codes.float() - shaped(q.zero).float()
    out = dequantize_blocks(Blocks(values, scale), fmt, spread(q.tensor_scale))
    if q.positions is not None and q.kept is not None:
        out = out.scatter(-1, q.positions[rows_at].long(), q.kept[rows_at])
    return out.reshape(piece.shape)
