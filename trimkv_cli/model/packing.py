"""Packed matrices on a CPU: which form each one takes, and its bytes. Plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Literal, Self

Packed = Literal["int4", "int8"]
Form = Packed | Literal["plain"]

GROUP = 32  # weights of a row that share a scale and a zero point in int4
_INT4_ROWS = 64  # outputs that any processor's int4 product takes together
EXACT_INT4 = ("Q4_0", "Q4_1", "Q4_K")  # block types whose blocks of 32 are groups: codes of 4 bits, scale and minimum
_PLAIN = ("F32", "F16", "BF16")
_HALF = 2  # bytes of a scale, and of a zero point, in int4
_WHOLE = 4  # of a scale in int8, and of a column's factor
INT8_TOKENS = 128  # that a product of 8 bits takes at a time: its sums stay in a processor's caches
_AT_ONCE = 1 << 19  # weights that are in transit in wider forms
# What was seen to be there per such weight: as it is read, unpacked, compared and rounded.
_TRANSIT: Mapping[Form, int] = {"int4": 28, "int8": 14, "plain": 14}
_VOCABULARY_TRANSIT = 40
_EXACT_TRANSIT = 20  # of blocks that become groups


def packs_int4(rows: int, columns: int) -> bool:
    """Say whether a matrix of so many outputs and inputs can be int4."""
    return rows % _INT4_ROWS == 0 and columns % GROUP == 0


def form_of(type: str, shape: Sequence[int], *, is_vocab: bool) -> Form:
    """Say what a tensor of a GGUF block type is held as; `is_vocab`: the embedding or the output head.

    What is no matrix stays plain, experts of three dimensions as well.
    """
    if len(shape) != 2 or type in _PLAIN:
        return "plain"
    exact = type in EXACT_INT4 and not is_vocab and packs_int4(*shape)
    return "int4" if exact else "int8"


def packed_bytes(rows: int, columns: int, form: Packed) -> int:
    """Count a packed matrix: int4 has a scale and a zero point for each group, int8 a scale for each output."""
    if form == "int8":
        return rows * (columns + _WHOLE)
    return rows * columns // 2 + rows * columns // GROUP * 2 * _HALF


def rows_at_once(columns: int, multiple: int = 1) -> int:
    """Return how many rows of a matrix are packed at a time, a multiple of 64 and of another number."""
    step = lcm(_INT4_ROWS, multiple)
    return max(1, _AT_ONCE // (columns * step)) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Some tensors of one shape and form."""

    label: str  # the block type, or what they are
    shape: tuple[int, ...]
    form: Form
    count: int = 1
    is_vocab: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, packed; 0 where they stay plain. A vocabulary has a factor for each column."""
        if self.form == "plain":
            return 0
        factors = self.shape[1] * _WHOLE if self.is_vocab else 0
        return self.count * (packed_bytes(self.shape[0], self.shape[1], self.form) + factors)

    @property
    def transit_bytes(self) -> int:
        """What is there beside the result while one is read and packed: some rows, and the parts they became."""
        at_once = min(prod(self.shape), rows_at_once(self.shape[-1]) * self.shape[-1])
        if self.is_vocab and self.form != "plain":
            return at_once * _VOCABULARY_TRANSIT
        exact = self.form == "int4" and self.label in EXACT_INT4
        return at_once * (_EXACT_TRANSIT if exact else _TRANSIT[self.form]) + self.nbytes // self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What of a model is packed; everything else is held in the dtype of the run."""

    numel: int = 0  # weights that are packed
    bytes: int = 0
    shapes: tuple[tuple[Packed, int, int], ...] = ()  # form, outputs and inputs of the decoder layers' packed matrices
    head: bool = False  # the output head is packed
    unpacked: int = 0  # matrices of decoder layers that stay plain
    transit_bytes: int = 0  # of what is there while one tensor is packed
    account: str = ""

    @classmethod
    def of(cls, tensors: Iterable[Tensors]) -> Self:
        """Count tensors by what they are held as; the last vocabulary matrix is the head."""
        tensors = list(tensors)
        packed = [each for each in tensors if each.form != "plain"]
        shapes = ((e.form, e.shape[0], e.shape[1]) for e in tensors if e.form != "plain" and not e.is_vocab)
        vocab = [each.form for each in tensors if each.is_vocab]
        return cls(
            numel=sum(each.count * prod(each.shape) for each in packed),
            bytes=sum(each.nbytes for each in packed),
            shapes=tuple(sorted(set(shapes))),
            head=bool(vocab) and vocab[-1] != "plain",
            unpacked=sum(e.count for e in tensors if e.form == "plain" and len(e.shape) == 2 and not e.is_vocab),
            transit_bytes=max((each.transit_bytes for each in tensors), default=0),
            account=_account(tensors),
        )

    @property
    def largest(self) -> int:
        """Weights of the largest matrix that is unpacked for many tokens: one of the decoder layers, in int4."""
        return max((rows * columns for form, rows, columns in self.shapes if form == "int4"), default=0)


def _account(tensors: Sequence[Tensors]) -> str:
    """Write how many tensors become what: "int4: Q4_1 ×210; int8: Q8_0 ×1; plain: F32 ×61"."""
    counts: dict[Form, Counter[str]] = {"int4": Counter(), "int8": Counter(), "plain": Counter()}
    for each in tensors:
        counts[each.form][each.label] += each.count
    said = {form: ", ".join(f"{label} ×{n}" for label, n in found.items()) for form, found in counts.items()}
    return "; ".join(f"{form}: {labels}" for form, labels in said.items() if labels)
