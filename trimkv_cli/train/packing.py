"""Packing of documents into sequences of a fixed length, in an order that a seed gives and a cursor resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimkv_cli.train.documents import Tokens
from trimkv_cli.train.options import Border
from trimkv_cli.train.training_pass import TeacherStates, TrainingPass

PADDING = -1
MOST_GAPS = 4
MOST_WATCHED = 256  # answers' queries whose attention is learnt from, of a sequence
WATCHED_BEFORE, BEFORE = 20, 0.5  # tokens before an answer: what asks for it; and their weight
WATCHED_ANYWHERE, ANYWHERE = 48, 0.25


@dataclass(slots=True, kw_only=True)
class Cursor:
    """Where a run is in its data; the counts are over the whole run."""

    epoch: int = 0
    document: int = 0  # in this epoch's order
    piece: int = 0  # of that document
    sequences: int = 0
    tokens: int = 0
    cut_documents: int = 0  # longer than a sequence, and so trained on in pieces
    cut_pieces: int = 0
    unasked_sequences: int = 0  # without an answer in them, which teach nothing


class PackedSequence(NamedTuple):
    """One sequence `[T]`; `wanted` marks the tokens that the loss asks for, never a document's first.

    `watched` weighs the queries whose attention is learnt from: 1 where the next token is wanted, less just before an
    answer and at a few random places, 0 elsewhere.
    """

    ids: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]  # −1 = padding
    watched: NDArray[np.float32]


class _Pieces(NamedTuple):
    pieces: list[Tokens]
    cut: bool


class Batch(NamedTuple):
    """Sequences of one forward, all tensors `[B, T]`; `one_document` says that no row holds more than one."""

    ids: Tensor
    wanted: Tensor
    positions: Tensor
    documents: Tensor
    watched: Tensor
    one_document: bool = False

    def make_pass(
        self,
        *,
        gated: bool,
        border: Border | None = None,
        teacher: TeacherStates | None = None,
        columns: Tensor | None = None,
    ) -> TrainingPass:
        return TrainingPass(
            positions=self.positions,
            documents=self.documents,
            gated=gated,
            border=border,
            one_document=self.one_document,
            teacher=teacher,
            columns=columns,
        )

    def asked(self) -> tuple[Tensor, Tensor]:
        """Return the columns `[B, N]` of the tokens whose next one is wanted, and which of them are no padding."""
        return _columns(self.wanted[:, 1:])

    def watching(self) -> tuple[Tensor, Tensor]:
        """Return the columns `[B, N]` of the queries whose attention is learnt from, and weights, 0 in padding."""
        columns, _ = _columns(self.watched > 0)
        return columns, self.watched.gather(1, columns)


def _columns(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns `[B, N]` that are marked in `[B, T]`, in order, and which of them are no padding."""
    order = marked.int().sort(dim=1, descending=True, stable=True).indices
    most = max(1, int(marked.sum(dim=1).max()))
    return order[:, :most], marked.gather(1, order[:, :most])


class Packer:
    """Give sequence after sequence, for ever; each epoch shuffles the documents anew.

    A document that is longer than a sequence is cut into pieces, and counted; none is cut to fill a sequence up.
    """

    def __init__(
        self,
        count: int,
        load: Callable[[int], Sequence[Tokens]],
        *,
        context: int,
        seed: int,
        position_gap: int = 0,
        cursor: Cursor | None = None,
    ) -> None:
        self.cursor = cursor or Cursor()
        self._count, self._context, self._seed, self._gap = count, context, seed, position_gap
        self._load = load
        self._pieces = lru_cache(maxsize=2)(self._cut)
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def next(self) -> PackedSequence:
        """Fill the next sequence: pieces follow one another until one does not fit."""
        room, pieces = self._context, list[Tokens]()
        while len((piece := self._peek()).ids) <= room:
            pieces.append(piece)
            self._count_cut()
            room -= len(piece.ids)
            self.cursor.piece += 1
        packed = self._pack(pieces)
        self.cursor.sequences += 1
        self.cursor.unasked_sequences += not packed.wanted.any()
        self.cursor.tokens += self._context - room
        return packed

    def _peek(self) -> Tokens:
        """Return the piece at the cursor, moved on to the next document where one has ended."""
        cursor = self.cursor
        while cursor.piece >= len(pieces := self._pieces(cursor.epoch, cursor.document).pieces):
            cursor.document, cursor.piece = cursor.document + 1, 0
            if cursor.document == self._count:
                cursor.epoch, cursor.document = cursor.epoch + 1, 0
        return pieces[cursor.piece]

    def _cut(self, epoch: int, document: int) -> _Pieces:
        whole = [tokens for tokens in self._load(int(self._order(epoch)[document])) if len(tokens.ids)]
        pieces = [
            Tokens(tokens.ids[start : start + self._context], tokens.wanted[start : start + self._context])
            for tokens in whole
            for start in range(0, len(tokens.ids), self._context)
        ]
        return _Pieces(pieces, cut=len(pieces) > len(whole))

    def _count_cut(self) -> None:
        cursor = self.cursor
        document = self._pieces(cursor.epoch, cursor.document)
        if cursor.epoch == 0 and cursor.piece == 0 and document.cut:
            cursor.cut_documents += 1
            cursor.cut_pieces += len(document.pieces)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(self._count)

    def _pack(self, pieces: Sequence[Tokens]) -> PackedSequence:
        rng = np.random.default_rng([self._seed, 1, self.cursor.sequences])
        ids = np.zeros(self._context, dtype=np.int64)
        wanted = np.zeros(self._context, dtype=np.bool_)
        positions = np.arange(self._context, dtype=np.int64)
        documents = np.full(self._context, PADDING, dtype=np.int64)
        start = 0
        for number, piece in enumerate(pieces):
            span = slice(start, start + len(piece.ids))
            ids[span], wanted[span], documents[span] = piece.ids, piece.wanted, number
            wanted[start] = False
            positions[span] = stretched(len(piece.ids), self._gap, rng)
            start = span.stop
        return PackedSequence(ids, wanted, positions, documents, watch(wanted, documents, rng))


def watch(wanted: NDArray[np.bool_], documents: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Choose the queries of a sequence to learn attention from, and weigh them."""
    weights = np.zeros(len(wanted), dtype=np.float32)
    asks = np.append(wanted[1:], False)
    anywhere = np.flatnonzero(documents != PADDING)
    weights[rng.choice(anywhere, min(WATCHED_ANYWHERE, len(anywhere)), replace=False)] = ANYWHERE
    for start in np.flatnonzero(asks & ~np.append(False, asks[:-1])):
        weights[max(0, start - WATCHED_BEFORE) : start] = BEFORE
    weights[documents == PADDING] = 0
    weights[asks] = 0
    weights[rng.permutation(np.flatnonzero(asks))[:MOST_WATCHED]] = 1
    return weights


def stretched(length: int, gap: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return strictly increasing positions from 0, with up to four gaps at random places.

    Three sequences of four have gaps. Together these are between a 64th of `gap` and all of it long, evenly in
    logarithm; short distances are in every sequence anyway.
    """
    positions = np.arange(length, dtype=np.int64)
    if gap == 0 or length < 2 or rng.random() < 0.25:
        return positions
    total = max(1, round(gap * 64 ** -rng.random()))
    count = int(rng.integers(1, MOST_GAPS + 1))
    jumps = np.zeros(length, dtype=np.int64)
    np.add.at(jumps, rng.integers(1, length, size=count), rng.multinomial(total, rng.dirichlet(np.ones(count))))
    return positions + np.cumsum(jumps)


def stack(sequences: Sequence[PackedSequence], device: torch.device) -> Batch:
    """Put sequences into one batch, without the columns that are padding in all of them."""
    longest = max(int((packed.documents != PADDING).sum()) for packed in sequences)
    columns = [torch.from_numpy(np.stack(field)[:, :longest]).to(device) for field in zip(*sequences, strict=True)]
    ids, wanted, positions, documents, watched = columns
    one_document = all(packed.documents.max() <= 0 for packed in sequences)
    return Batch(ids, wanted, positions, documents, watched, one_document)
