"""The constant state of a linear attention layer: one per row, and what the last decode of each row displaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

BLOCK = 64  # tokens that transformers turns at a time

Forward = Callable[[Tensor, "State"], Tensor]  # hidden states `[B, T, hidden]`, state of the same rows, made the next


class State(NamedTuple):
    """What some rows remember, in float32: `conv` `[B, channels, kernel]`, `recurrent` `[B, heads, key, value]`."""

    conv: Tensor
    recurrent: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def at(self, rows: slice | Tensor) -> State:
        """Return some of the rows: a view of a slice, a copy of those that a tensor names."""
        return State(*(tensor[rows] for tensor in self))

    def to(self, device: torch.device | str) -> State:
        """Copy it to a device."""
        return State(*(tensor.to(device, copy=True) for tensor in self))


@dataclass(frozen=True, slots=True)
class LinearState:
    """The states of all rows in one layer; `before` and `position` are those of each row's last decode, −1 = none."""

    now: State
    before: State
    position: Tensor  # [rows] int32

    @classmethod
    def empty(cls, *, rows: int, conv: tuple[int, int], recurrent: tuple[int, int, int], device: torch.device) -> Self:
        """Allocate the state of rows that have seen nothing."""
        shapes = (rows, *conv), (rows, *recurrent)
        now, before = (State(*(torch.zeros(shape, device=device) for shape in shapes)) for _ in range(2))
        return cls(now, before, torch.full((rows,), -1, dtype=torch.int32, device=device))

    @property
    def journal_nbytes(self) -> int:
        return self.before.nbytes + self.position.nbytes

    def prefill(self, hidden: Tensor, forward: Forward, *, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """Feed row `rows[i]` the last `lengths[i]` of `hidden[i]`; the padding before them touches nothing.

        Rows with as many tokens go together, as nothing masks padding in a recurrence: so many that the blocks which
        they are turned into are no more than those of all tokens in one row.
        """
        output = torch.zeros_like(hidden)
        for length, same in _groups(lengths):
            chosen = torch.tensor(same, device=hidden.device)
            at = rows[chosen]
            state = self.now.at(at)
            output[chosen, -length:] = forward(hidden[chosen, -length:], state)
            for tensor, new in zip(self.now, state, strict=True):
                tensor[at] = new
        return output

    def decode(self, hidden: Tensor, forward: Forward, *, position: Tensor) -> Tensor:
        """Feed the first B rows one token each, `[B, 1, hidden]`; those at position −1 stay as they are."""
        first = slice(len(position))
        state = State(*(tensor.clone() for tensor in self.now.at(first)))
        output = forward(hidden, state)
        fed = position >= 0
        for before, now in zip(self.before.at(first), self.now.at(first), strict=True):
            _put(now, before, where=fed)
        torch.where(fed, position, self.position[first], out=self.position[first])
        for now, new in zip(self.now.at(first), state, strict=True):
            _put(new, now, where=fed)
        return output

    def undo(self, position: Tensor) -> None:
        """Take back the last decode of row i where that was at `position[i]`; −1 = leave it alone."""
        first = slice(len(position))
        undone = (position >= 0) & (self.position[first] == position)
        for now, before in zip(self.now.at(first), self.before.at(first), strict=True):
            _put(before, now, where=undone)
        self.position[first].masked_fill_(undone, -1)

    def clear(self, row: int) -> None:
        """Forget what a row has seen."""
        for tensor in self.now:
            tensor[row].zero_()
        self.position[row] = -1

    def copy(self, source: int, target: int) -> None:
        """Make a row an exact copy of another, down to what its last decode displaced."""
        for tensor in (*self.now, *self.before, self.position):
            tensor[target].copy_(tensor[source])

    def load(self, row: int, saved: State) -> None:
        """Put a saved state `[1, …]` into a row."""
        self.position[row] = -1
        for tensor, kept in zip(self.now, saved, strict=True):
            tensor[row].copy_(kept[0])


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield a length and the rows to feed so many tokens at once, until all have theirs."""
    blocks = -(-sum(lengths) // BLOCK)
    for length in sorted(set(lengths) - {0}):
        same = [index for index, other in enumerate(lengths) if other == length]
        most = max(1, blocks // -(-length // BLOCK))
        yield from ((length, same[start : start + most]) for start in range(0, len(same), most))


def _put(new: Tensor, old: Tensor, *, where: Tensor) -> None:
    """Overwrite the rows `where` says, in place and with nothing read on the host."""
    torch.where(where.view(-1, *(1,) * (old.dim() - 1)), new, old, out=old)
