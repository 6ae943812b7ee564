"""Batches of a step, from rows, chunks and shared prefixes. Plain Python, no tensors."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimkv_cli.events import TokenLogprob
from trimkv_cli.model.pins import PromptSpan
from trimkv_cli.request import Request

_WINDOW = 64  # waiting requests among which those with the same prefix are found
_PATIENCE, _MOST_PATIENCE = 32, 4096  # good steps before one row more is tried


@dataclass(slots=True, kw_only=True)
class Row:
    """One request on its way through row `index` of the cache.

    `base` tokens were in the row before this request (a chat's earlier turns); chunk boundaries count from there. `fed`
    counts the prompt tokens fed since, `shared` those of them that were copied from another row. `long_rope` picks the
    factor set of long-RoPE models for the whole sequence.
    """

    index: int
    request: Request
    base: int = 0
    history: tuple[int, ...] = ()  # the tokens behind `base`
    prompt: PromptSpan = PromptSpan()
    prefix: tuple[int, ...] = ()  # what other requests may share
    fed: int = 0
    shared: int = 0
    output: list[int] = field(default_factory=list)
    logprob: TokenLogprob | None = None  # of the newest token, when the request asks for it
    long_rope: bool = False
    chunk: int | None = None  # prompt tokens per chunk where memory forces fewer than for the others
    failures: int = 0  # steps of this row alone that ran out of memory
    before: Row | None = None  # what the request continues
    saved: Any = None  # what the cache held of that, until the first token is out

    @property
    def seen(self) -> int:
        """Tokens fed into the row so far; an output token counts once it is fed."""
        return self.base + self.fed + max(0, len(self.output) - 1)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens fed into the row so far."""
        return (*self.history, *self.request.prompt_token_ids[: self.fed], *self.output[:-1])

    @property
    def unread(self) -> tuple[int, ...]:
        """Prompt tokens not fed yet."""
        return self.request.prompt_token_ids[self.fed :]

    def restart(self) -> None:
        """Begin the request anew, as if nothing of it had been fed."""
        self.fed = self.shared = 0
        self.output.clear()
        self.logprob = None

    @property
    def prefilling(self) -> bool:
        return self.fed < len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Feed `token_ids` to a row that is still in its prompt; `last` when the first output token follows.

    `twins` are rows that become copies of `row` then: with the same prompt, or the prefix that the chunk completes.
    """

    row: Row
    token_ids: tuple[int, ...]
    last: bool
    twins: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One forward over a chunk each of some rows, with copies (source, target) of whole rows before and after it."""

    chunks: tuple[Chunk, ...]
    copy_before: tuple[tuple[int, int], ...] = ()
    copy_after: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """One forward over one token each of some rows, in ascending order."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Fix what batches look like.

    `prefill_tokens` bounds rows × longest chunk of one prefill (padding counts); one row alone may exceed it.
    `prefix_row` is the cache row that keeps the last shared prefix, None to share nothing. Sequences that may grow past
    `long_rope_from` tokens use the long factors.
    """

    max_rows: int
    prefill_chunk: int  # 0 = the whole prompt at once
    prefill_tokens: int
    prefill_rows: int
    prefix_row: int | None = None
    long_rope_from: int | None = None


@dataclass(slots=True)
class Limit:
    """How many rows go through the model together: fewer after a shortage of memory, one more when it has passed.

    That is tried after `patience` good steps, and twice as many after each try that failed.
    """

    most: int
    now: int = field(init=False)
    patience: int = _PATIENCE
    _good: int = 0
    _tried: bool = False  # since it was narrowed

    def __post_init__(self) -> None:
        self.now = self.most

    def narrow(self, rows: int) -> None:
        """Let at most `rows` go together, as more ran out of memory."""
        if self._tried:
            self.patience = min(2 * self.patience, _MOST_PATIENCE)
        self.now, self._good, self._tried = max(1, rows), 0, False

    def passed(self) -> None:
        """Count a step that went well."""
        if self.now == self.most and self.patience == _PATIENCE:
            return
        self._good += 1
        if self._good < self.patience:
            return
        self._good = 0
        if self.now < self.most:
            self.now, self._tried = self.now + 1, True
        else:  # it has held at full width for as long as a try takes: forget
            self.patience, self._tried = _PATIENCE, False


class Scheduler:
    """Give rows to waiting requests, first come first served but for shared prefixes, and cut the work into batches.

    A step is at most one prefill batch and one decode batch per RoPE factor set: a long prompt stalls the others for no
    longer than a chunk.
    """

    def __init__(self, options: SchedulerOptions) -> None:
        self.options = options
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Row] = {}
        self.parked: dict[str, Row] = {}  # kept for a continuation, by request id
        self.suspended: deque[Row] = deque()  # begun, waiting for a row below the limit
        self.row_limit = Limit(options.max_rows)
        self.prefill_rows = Limit(options.prefill_rows)
        self._stored_prefix: tuple[int, ...] = ()
        self._prefix_hashes: dict[str, int] = {}  # of the waiting requests
        self._passed_over = 0  # how often the first waiting request was

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.suspended)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._prefix_hashes[request.id] = hash(self._prefix(request))

    def narrow(self, rows: int) -> None:
        """Run at most `rows` rows for now; those beyond wait where they are, with all that they have."""
        self.row_limit.narrow(rows)
        beyond = [row for index, row in sorted(self.running.items()) if index >= self.row_limit.now]
        self.suspended.extend(beyond)
        for row in beyond:
            del self.running[row.index]

    def narrow_prefill(self, rows: int) -> None:
        """Read the prompts of at most `rows` rows together for now."""
        self.prefill_rows.narrow(rows)

    def passed(self, batch: Prefill | Decode) -> None:
        """Note that a batch went well: after a number of them there may be memory for one row more."""
        (self.row_limit if isinstance(batch, Decode) else self.prefill_rows).passed()

    def forget_prefix(self) -> None:
        """Share the stored prefix with no later request."""
        self._stored_prefix = ()

    @property
    def begun(self) -> list[Row]:
        """All rows that hold something of a request: running, suspended or kept."""
        return [*self.running.values(), *self.suspended, *self.parked.values()]

    def resume(self) -> list[tuple[int, int]]:
        """Let suspended rows run again while there are places; return how they move, as (source, target)."""
        moves = []
        if self.suspended and not self.running and self._free_index() is None:
            self.row_limit.now = self.suspended[0].index + 1  # kept rows hold all lower places
        for row in tuple(self.suspended):
            index = row.index if row.index < self.row_limit.now else self._free_index()
            if index is None:
                continue
            self.suspended.remove(row)
            if index != row.index:
                moves.append((row.index, index))
            row.index = index
            self.running[index] = row
        return moves

    def admit(self) -> list[Row]:
        """Move waiting requests into rows while there are any, and return those rows."""
        admitted = []
        while self.waiting:
            place = self._choose()
            request = self.waiting[place]
            row = self._continue(request) if request.continues is not None else self._start(request)
            if row is None:
                break
            del self.waiting[place], self._prefix_hashes[request.id]
            self._passed_over = self._passed_over + 1 if place else 0
            self.running[row.index] = row
            admitted.append(row)
        return admitted

    def _choose(self) -> int:
        """Choose the waiting request that comes next: one that shares a prefix that is there, else the first.

        The first one is passed over at most as often as the window is long.
        """
        first = self.waiting[0]
        if first.continues is not None or self._passed_over >= _WINDOW or self._free_index() is None:
            return 0
        prefixes = {row.prefix for row in self.running.values() if row.prefilling} | {self._stored_prefix}
        ready = {hash(prefix) for prefix in prefixes if prefix}
        window = itertools.islice(self.waiting, _WINDOW)
        shares = (
            place
            for place, request in enumerate(window)
            if request.continues is None and self._prefix_hashes[request.id] in ready
        )
        return next(shares, 0)

    def _prefix(self, request: Request) -> tuple[int, ...]:
        """Return what a request may share with others."""
        shares = self.options.prefix_row is not None and self.options.prefill_chunk > 0
        return request.prompt_token_ids[: request.shared_len] if shares else ()

    def schedule(self) -> Iterator[Prefill | Decode]:
        """Yield the batches of one step; each must have been run before the next is taken."""
        for long_rope in (False, True):
            prefill = self._next_prefill(long_rope)
            if prefill is not None:
                yield prefill
                break
        for long_rope in (False, True):
            rows = tuple(r for _, r in sorted(self.running.items()) if r.output and r.long_rope is long_rope)
            if rows:
                yield Decode(rows)

    def finish(self, row: Row) -> None:
        """Free the row, or keep it when its request asks for that."""
        self._remove(row)
        row.saved = row.before = None
        if row.request.keep:
            self.parked[row.request.id] = row

    def give_up(self, row: Row) -> None:
        """Free the row of a request that failed before its first token; what it continues can be continued again."""
        self._remove(row)
        if row.before is not None and row.request.continues is not None:
            row.before.index = row.index
            self.parked[row.request.continues] = row.before

    def park(
        self,
        request: Request,
        *,
        history: tuple[int, ...],
        prompt: PromptSpan,
        last_token: int | None,
        long_rope: bool,
    ) -> Row:
        """Give a request that has ended elsewhere a free row: `history` was fed, its prompt was not."""
        index = self._free_index()
        assert index is not None, "no row is free: release one first"
        output = [] if last_token is None else [last_token]
        row = Row(
            index=index,
            request=request,
            base=len(history),
            history=history,
            prompt=prompt,
            output=output,
            long_rope=long_rope,
        )
        self.parked[request.id] = row
        return row

    def find(self, request_id: str) -> Row | None:
        """Return the row in which a request runs."""
        begun = (*self.running.values(), *self.suspended)
        return next((row for row in begun if row.request.id == request_id), None)

    def drop(self, request_id: str) -> None:
        """Forget a request wherever it is."""
        self.waiting = deque(request for request in self.waiting if request.id != request_id)
        self._prefix_hashes.pop(request_id, None)
        self.parked.pop(request_id, None)
        row = self.find(request_id)
        if row is not None:
            self._remove(row)

    def compact(self) -> tuple[int, int] | None:
        """Move the highest row to a free lower place when nothing waits for that; return (source, target)."""
        free, top = self._free_index(), max(self.running, default=-1)
        if self.waiting or self.parked or self.suspended or free is None or free > top:
            return None
        row = self.running.pop(top)
        row.index = free
        self.running[free] = row
        return top, free

    def _start(self, request: Request) -> Row | None:
        index = self._free_index()
        if index is None:
            return None
        length = request.context or len(request.prompt_token_ids) + request.params.max_tokens
        limit = self.options.long_rope_from
        return Row(
            index=index,
            request=request,
            prompt=_prompt_of(request),
            prefix=self._prefix(request),
            long_rope=limit is not None and length > limit,
        )

    def _continue(self, request: Request) -> Row:
        assert request.continues is not None
        before = self.parked.pop(request.continues)
        # What a stopped request had not read yet is read first.
        whole = replace(request, prompt_token_ids=(*before.unread, *request.prompt_token_ids))
        return Row(
            index=before.index,
            request=whole,
            base=before.seen,
            history=before.token_ids,
            prompt=before.prompt if request.goes_on else _prompt_of(whole, before),
            long_rope=before.long_rope,
            before=before,
        )

    def _remove(self, row: Row) -> None:
        if self.running.get(row.index) is row:
            del self.running[row.index]
        else:
            self.suspended.remove(row)

    @property
    def free_rows(self) -> int:
        """Count the places below the limit that hold nothing and that no waiting request will take."""
        free = len(set(range(self.row_limit.now)) - self._taken)
        return max(0, free - sum(request.continues is None for request in self.waiting))

    @property
    def _taken(self) -> set[int]:
        return {*self.running, *(row.index for row in (*self.parked.values(), *self.suspended))}

    def _free_index(self) -> int | None:
        taken = self._taken
        return next((index for index in range(self.row_limit.now) if index not in taken), None)

    def _next_prefill(self, long_rope: bool) -> Prefill | None:
        chunks: list[Chunk] = []
        reused: list[tuple[int, int]] = []
        computing: set[tuple[int, ...]] = set()
        begun = {row.prefix for row in self.running.values() if 0 < row.fed < len(row.prefix)}
        twins = self._twins()
        for row in (r for r in self.running.values() if r.prefilling and r.long_rope is long_rope):
            if any(row is twin for group in twins.values() for twin in group):
                continue  # the first row of its group reads the prompt for it
            reuse = row.fed == 0 and row.prefix != () and row.prefix == self._stored_prefix
            if (row.prefix in computing or (row.fed == 0 and row.prefix in begun)) and not reuse:
                continue  # another row computes the prefix: this one will copy it
            if row.fed < len(row.prefix) and not reuse:
                computing.add(row.prefix)
            start = len(row.prefix) if reuse else row.fed
            chunk = self.cut(row, start)
            if chunk.last:
                chunk = replace(chunk, twins=twins.get(row.index, ()))
            elif start + len(chunk.token_ids) == len(row.prefix):
                chunk = replace(chunk, twins=self._heirs(row, twins))
            if not self._has_room(chunks, chunk):
                continue
            if reuse:
                assert self.options.prefix_row is not None
                reused.append((self.options.prefix_row, row.index))
                row.shared = row.fed = start
            chunks.append(chunk)
        if not chunks:
            return None
        return Prefill(chunks=tuple(chunks), copy_before=tuple(reused), copy_after=self._store_prefix(chunks))

    def _twins(self) -> dict[int, tuple[Row, ...]]:
        """Find, by the index of the row that reads for them, rows that wait for a whole prompt."""
        groups: dict[str, list[Row]] = {}
        for row in self.running.values():
            if row.prefilling and row.request.same_prompt is not None:
                groups.setdefault(row.request.same_prompt, []).append(row)
        ordered = (sorted(rows, key=lambda row: row.fed == 0) for rows in groups.values())  # one that has begun leads
        return {rows[0].index: tuple(row for row in rows[1:] if row.fed == 0) for rows in ordered}

    def _heirs(self, row: Row, twins: Mapping[int, tuple[Row, ...]]) -> tuple[Row, ...]:
        """Find the other rows that wait for the prefix of `row`, but for those that wait for a whole prompt."""
        waiting = (other for other in self.running.values() if other is not row and other.prefilling and other.fed == 0)
        heirs = (other for other in waiting if other.prefix == row.prefix and other.long_rope is row.long_rope)
        return tuple(heir for heir in heirs if not any(heir is twin for group in twins.values() for twin in group))

    def cut(self, row: Row, start: int) -> Chunk:
        """Cut the chunk that begins at prompt token `start`, to the next multiple of C, the prefix's end or the end."""
        prompt, size = row.request.prompt_token_ids, row.chunk or self.options.prefill_chunk
        ends = [len(prompt)]
        if size:
            ends.append((start // size + 1) * size)
            ends += [end for end in (row.request.prefix_len, row.request.document_len) if start < end]
        end = min(ends)
        return Chunk(row, prompt[start:end], last=end == len(prompt))

    def _has_room(self, chunks: Sequence[Chunk], chunk: Chunk) -> bool:
        longest = max(len(c.token_ids) for c in (*chunks, chunk))
        count = len(chunks) + 1
        return not chunks or (count <= self.prefill_rows.now and count * longest <= self.options.prefill_tokens)

    def _store_prefix(self, chunks: Sequence[Chunk]) -> tuple[tuple[int, int], ...]:
        """Keep one prefix that these chunks complete, for rows that come later."""
        for chunk in chunks:
            row = chunk.row
            if row.prefix and row.fed + len(chunk.token_ids) == len(row.prefix):
                assert self.options.prefix_row is not None
                self._stored_prefix = row.prefix
                return ((row.index, self.options.prefix_row),)
        return ()


def _prompt_of(request: Request, before: Row | None = None) -> PromptSpan:
    """Return where a request's prompt stands, behind what it continues."""
    start = 0 if before is None else before.seen
    stop = start + len(request.prompt_token_ids)
    if before is None or start == 0:
        return PromptSpan(start, stop, first=stop, system=request.prefix_len, shared=request.shared_len)
    return replace(before.prompt, start=start, stop=stop)
