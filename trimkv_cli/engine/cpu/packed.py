"""Matrices of 4 and 8 bits, multiplied as they lie by torch's own products for CPUs.

Four bits have a scale and a zero point for each `GROUP` weights of a row, and are multiplied by numbers in bfloat16;
for many tokens they are first unpacked. Eight bits have a scale for each row, and are multiplied by numbers of twice
eight bits: such products are exact, and as fast as those of eight times eight bits where memory is the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.engine.together import make_parts
from trimkv_cli.model.packing import GROUP, INT8_TOKENS, Packed

_MIDDLE = 8  # the code of four bits that stands for a zero point
_BLOCK = 64  # rows that any processor packs together
_VECTORS = 6  # of eight bits that are multiplied one after the other, where rows are as long as this
_LONG = 1024
_KEPT_BYTES = 1 << 20  # of a matrix that stay in a cache from one vector to the next
_STEPS = 127  # of eight bits, to either side of 0
_FINE = 2 * _STEPS  # what a step is divided into by the second eight bits
_SHRINKS = (1.0, 0.95, 0.9, 0.85)  # of a group's range, of which the one of least error is taken


def quantise_int4(full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix `[N, K]` to 16 levels per group.

    Returns:
        Codes `[N, K]` uint8, and scales and zero points `[N, K / GROUP]`, of which `(code − 8) · scale + zero` is the
        weight.
    """
    groups = full.float().view(len(full), -1, GROUP)
    low, high = groups.aminmax(dim=-1)
    best: tuple[Tensor, ...] | None = None
    for shrink in _SHRINKS:
        scale = ((high - low) * (shrink / 15)).bfloat16()
        zero = ((high + low) / 2 + scale.float() / 2).bfloat16()
        steps = torch.where(scale == 0, torch.inf, scale.float())[..., None]
        codes = ((groups - zero.float()[..., None]) / steps).round_().clamp_(-_MIDDLE, _MIDDLE - 1)
        made = torch.addcmul(zero.float()[..., None], codes, scale.float()[..., None])
        error = made.sub_(groups).square_().sum(dim=-1)
        found = (error, codes.to(torch.int8), scale, zero)
        best = found if best is None else _closer(best, found)
    assert best is not None
    codes = best[1].add_(_MIDDLE).view(torch.uint8)
    return codes.flatten(1), best[2], best[3]


def _closer(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take of each group what has the smaller error, which comes first in both."""
    wins = second[0] < first[0]
    return tuple(
        torch.where(wins[..., None] if a.dim() > wins.dim() else wins, b, a) for a, b in zip(first, second, strict=True)
    )


def pack_int4(levels: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Lay codes `[N, K]`, scales and zero points `[N, K / GROUP]` of some rows after the other out for the product.

    All but the last have `rows_at_once` or another multiple of 64 rows.

    Returns:
        `[N, K / 2]` uint8, in an order of the processor's own, and `[K / GROUP, N, 2]` bfloat16.
    """
    parts = [
        (_lay_out(codes), torch.stack((scale.bfloat16(), zero.bfloat16()), dim=-1).transpose(0, 1))
        for codes, scale, zero in levels
    ]
    packed, scales = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(scales, dim=1).contiguous()


def _lay_out(codes: Tensor) -> Tensor:
    """Put codes `[N, K]` uint8 into the processor's order; torch's own way takes several times as long."""
    block = _packed_together()
    if block is None:
        return _lay_out_by_torch(codes.to(torch.int32))
    first, second = codes.view(-1, 2, block // 2, codes.shape[1]).unbind(1)
    return (first | second << 4).transpose(1, 2).reshape(len(codes), -1)


def _lay_out_by_torch(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


@cache
def _packed_together() -> int | None:
    """Return how many rows lie in one block, each byte a row of its first half and one of its second; None = neither.

    The order is the processor's: with AVX-512 64 rows, with AVX2 32.
    """
    row = torch.arange(_BLOCK, dtype=torch.int32)[:, None].expand(_BLOCK, GROUP).contiguous()
    packed = torch.stack((_lay_out_by_torch(row & 15), _lay_out_by_torch(row >> 4))).view(2, -1)
    for size in (64, 32, 16):
        first = torch.arange(_BLOCK).view(-1, 1, size)[..., : size // 2].expand(-1, GROUP, -1).reshape(-1)
        second = first + size // 2
        expected = torch.stack(((first & 15) | (second & 15) << 4, (first >> 4) | (second >> 4) << 4))
        if torch.equal(packed.long(), expected):
            return size
    return None


def unpack_int4(packed: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Write the weights of a packed matrix into `out` `[K, N]`: the transpose of what a linear layer has."""
    block = _packed_together()
    assert block is not None, "where the order is not known nothing asks for it"
    columns, rows = out.shape
    pairs = packed.view(rows // block, columns, block // 2)
    halves = out.view(columns, rows // block, 2, block // 2).transpose(0, 1)
    halves[:, :, 0].copy_((pairs & 15).view(torch.int8).sub_(_MIDDLE))
    halves[:, :, 1].copy_((pairs >> 4).view(torch.int8).sub_(_MIDDLE))
    groups = out.view(-1, GROUP, rows)
    scale, zero = (scales[..., index].contiguous()[:, None].to(out.dtype) for index in (0, 1))
    torch.addcmul(zero, groups, scale, out=groups)
    return out


def multiply_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Multiply `[B, K]` by a packed matrix: `[B, N]` bfloat16."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, scales)
    return product


def quantise_int8(full: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix `[N, K]` to 255 levels per row: codes int8 and scales `[N]` float32."""
    scale = full.abs().amax(dim=1).float() / _STEPS
    codes = (full / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
    return codes.to(torch.int8), scale


def column_factors(rows: Tensor) -> Tensor:
    """Return what some rows `[N, K]` of a vocabulary are divided by, `[K]`: its columns differ more than its rows do.

    The root of each column's norm halves the error of eight bits per row, on two models that were tried.
    """
    sizes = rows.float().square().mean(dim=0).sqrt_().sqrt_()
    return torch.where(sizes > 0, sizes, 1.0)


def multiply_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply `[B, K]` by a matrix of eight bits: `[B, N]` float32."""
    if len(x) <= INT8_TOKENS:
        return _multiply_int8(x, codes, scale)
    product = torch.empty(len(x), len(codes))
    for some, of_some in zip(torch.split(x, INT8_TOKENS), torch.split(product, INT8_TOKENS), strict=True):
        of_some.copy_(_multiply_int8(some, codes, scale))
    return product


def _multiply_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    planes, step = _in_planes(x.float())
    coarse, fine = _sums(planes, codes).chunk(2)
    return coarse.float().add_(fine, alpha=1 / _FINE).mul_(step).mul_(scale)


def _in_planes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return steps `[2B, K]` int8, whole ones and then what is left in finer ones, and their sizes `[B, 1]`."""
    step = x.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / _STEPS
    steps = x / step
    whole = steps.round()
    rest = steps.sub_(whole).mul_(_FINE).round_()
    return torch.cat((whole, rest)).to(torch.int8), step


def _sums(planes: Tensor, codes: Tensor) -> Tensor:
    """Multiply `[P, K]` by `[N, K]`, both int8: `[P, N]` int32."""
    if len(planes) > _VECTORS or codes.shape[1] < _LONG:
        many: Tensor = torch._int_mm(planes, codes.t())
        return many
    # A product of one vector reads the matrix as it lies; one of several lays it out anew first, which with long rows
    # takes up to ten times as long. The next vector finds what the first one read in the cache.
    sums = torch.empty(len(planes), len(codes), dtype=torch.int32)
    rows = max(1, _KEPT_BYTES // codes.shape[1])
    for part, out in zip(torch.split(codes, rows), torch.split(sums, rows, dim=1), strict=True):
        for vector, row in zip(torch.split(planes, 1), torch.split(out, 1), strict=True):
            torch._int_mm(vector, part.t(), out=row)
    return sums


class Scratch:
    """Hold one matrix of four bits at a time, unpacked, for forwards of `from_tokens` or more."""

    def __init__(self, dtype: torch.dtype, from_tokens: int) -> None:
        self.dtype = dtype
        self.from_tokens = from_tokens if _packed_together() is not None else 1 << 62
        self._buffer = torch.empty(0, dtype=dtype)

    def hold(self, columns: int, rows: int) -> Tensor:
        """Return room for `[columns, rows]`; whatever was here is overwritten."""
        if self._buffer.numel() < columns * rows:
            self._buffer = torch.empty(0, dtype=self.dtype)  # the smaller one goes first
            self._buffer = torch.empty(columns * rows, dtype=self.dtype)
        return self._buffer[: columns * rows].view(columns, rows)


class PackedLinear(nn.Module):
    """Do what `nn.Linear` does, with weights of 4 or 8 bits."""

    def __init__(self, linear: nn.Linear, form: Packed, scratch: Scratch) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        self.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8, device="meta"), False)
        self.scales: Tensor
        self.columns: Tensor | None
        self.bias: Tensor | None = linear.bias
        self._scratch = scratch

    def forward(self, x: Tensor) -> Tensor:
        """Return `[…, out_features]` for `[…, in_features]`."""
        flat = x.reshape(-1, self.in_features)
        if self.form == "int8":
            product = multiply_int8(flat if self.columns is None else flat * self.columns, self.weight, self.scales)
        elif len(flat) < self._scratch.from_tokens:
            product = multiply_int4(flat, self.weight, self.scales.contiguous())
        else:
            room = self._scratch.hold(self.in_features, self.out_features)
            product = flat.to(self._scratch.dtype) @ unpack_int4(self.weight, self.scales, room)
        product = product.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class PackedEmbedding(nn.Module):
    """Do what `nn.Embedding` does, and a module that scales it, with rows of eight bits."""

    form: Packed = "int8"

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embedding.weight.shape, dtype=torch.int8, device="meta"), False)
        self.scales: Tensor
        self.dtype = dtype
        self.columns: Tensor
        self._factor = float(getattr(embedding, "scalar_embed_scale", 1.0))  # Gemma's

    def forward(self, ids: Tensor) -> Tensor:
        """Return `[…, embedding_dim]` for ids `[…]`."""
        rows = self.weight[ids] * self.scales[ids][..., None] * self.columns
        return (rows * self._factor).to(self.dtype)


def settle(module: PackedLinear | PackedEmbedding, scales: Tensor, columns: Tensor | None) -> None:
    """Give a module whose weight was loaded its scales; earlier transformers would take them for missing weights."""
    module.register_buffer("scales", scales, persistent=False)
    module.register_buffer("columns", columns, persistent=False)


def pack(parts: Iterable[Tensor], form: Packed) -> tuple[Tensor, Tensor]:
    """Return a matrix, given some rows at a time, as a module of that form holds it: its weight and its scales."""
    if form == "int4":
        return pack_int4(map(quantise_int4, parts))
    codes, scales = zip(*map(quantise_int8, parts), strict=True)
    return torch.cat(codes), torch.cat(scales)


def pack_vocabulary(parts: Iterable[Tensor], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix with a row for each token, given some rows at a time, in eight bits: codes, scales, columns."""
    columns = codes = torch.empty(0)
    scales = torch.empty(tokens)
    start = 0
    for part in parts:
        if start == 0:
            columns = column_factors(part)
            codes = torch.empty(tokens, part.shape[1], dtype=torch.int8)
        these = slice(start, start + len(part))
        codes[these], scales[these] = quantise_int8(part / columns)
        start += len(part)
    return codes, scales, columns


def lay_together(linears: Sequence[PackedLinear], undo: ExitStack) -> tuple[Tensor, Tensor]:
    """Return weights and scales of linear layers of one form as one, and make each layer's own parts until `undo`."""
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].scales
    by = 1 if linears[0].form == "int4" else 0
    sizes = [linear.out_features for linear in linears]
    weights, scales = [linear.weight for linear in linears], [linear.scales for linear in linears]
    weight, scale = torch.cat([each.detach() for each in weights]), torch.cat(scales, dim=by)
    make_parts(weights, torch.split(weight, sizes), undo)
    make_parts(scales, torch.split(scale, sizes, dim=by), undo)
    return weight, scale


_SIZE = 1536  # of the matrix that is measured with
_MANY = 512  # tokens
_CALLS = 5
_CACHED = 1 << 24  # numbers that are touched in between: more than a processor's caches hold


def measure_products() -> dict[str, float]:
    """Return the microseconds that products of one matrix take here, by form and number of tokens; takes a second."""
    measured = {}
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        full, others = torch.randn(_SIZE, _SIZE), torch.zeros(_CACHED)
        half, four, eight = full.bfloat16(), pack([full], "int4"), pack([full], "int8")
        room = torch.empty(_SIZE, _SIZE, dtype=torch.bfloat16)
        products: dict[str, Callable[[Tensor], Tensor]] = {
            "fp32": lambda x: functional.linear(x, full),
            "bf16": lambda x: functional.linear(x.bfloat16(), half),
            "int4": lambda x: multiply_int4(x, *four),
            "int8": lambda x: multiply_int8(x, *eight),
        }
        if _packed_together() is not None:
            measured["unpack"] = _time(lambda _: unpack_int4(*four, room), full, others)
        for tokens in (1, _MANY):
            x = torch.randn(tokens, _SIZE)
            measured |= {f"{form}@{tokens}": _time(product, x, others) for form, product in products.items()}
    return measured


def _time(product: Callable[[Tensor], Tensor], x: Tensor, others: Tensor) -> float:
    """Return what the fastest of some calls takes, in microseconds, the matrix in no cache."""
    product(x)
    seconds = []
    for _ in range(_CALLS if len(x) == 1 else 2):
        others.add_(1)
        started = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1e6
