"""Decides which lines of an input are run: not those of other shards, past the limit, or answered before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.earlier import Earlier, IdIndex
from trimkv_cli.jobs.lines import BadLine, Item, Rules, duplicate, id_of, parse_line
from trimkv_cli.jobs.reading import Line
from trimkv_cli.jobs.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Every `of`-th line, from the `index`-th on (from 1)."""

    index: int = 1
    of: int = 1

    def __contains__(self, number: int) -> bool:
        return (number - self.index) % self.of == 0


def parse_shard(text: str) -> Shard:
    """Read `--shard`: `2/4` is the second of four.

    Raises:
        UsageError: no such thing.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text} is no part of a whole", hint="write it like 1/4, 2/4, 3/4 and 4/4")
    return Shard(index=int(match[1]), of=int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Say which lines are left to run."""

    limit: int | None = None  # lines that are not blank
    shard: Shard = Shard()
    earlier: Earlier = field(default_factory=Earlier)
    retry_errors: bool = False
    in_order: bool = False  # the output has to stay in the input's order


def parse_lines(
    lines: Iterable[Line], rules: Rules, selection: Selection | None = None, summary: Summary | None = None
) -> Iterator[Item | BadLine]:
    """Parse the lines that are left; the second line with an id is a bad one, whichever of them are left.

    Raises:
        UsageError: a line that is left comes before one that is written, and the output has to stay in order.
    """
    selection, summary = selection or Selection(), summary or Summary()
    ids = IdIndex() if rules.has_ids else None
    for line in islice(lines, selection.limit):
        if _is_left(line, rules, selection, summary):
            if selection.in_order and line.number < selection.earlier.last_line:
                raise UsageError(
                    f"the output is not in the input's order: line {line.number} is missing before later ones",
                    hint="--order completion goes on all the same",
                )
            parsed = parse_line(line, rules)
            yield parsed if _is_new(ids, parsed.custom_id) else duplicate(line.number, parsed.custom_id or "")
        elif ids is not None and (custom_id := id_of(line, rules)) is not None:
            ids.note(custom_id)


def _is_new(ids: IdIndex | None, custom_id: str | None) -> bool:
    return ids is None or custom_id is None or ids.add(custom_id)


def _is_left(line: Line, rules: Rules, selection: Selection, summary: Summary) -> bool:
    if line.number not in selection.shard:
        return False
    earlier, retry = selection.earlier, selection.retry_errors
    answered = earlier.answered(line.number, retry_errors=retry)
    if not answered and earlier.has_ids and (custom_id := id_of(line, rules)) is not None:
        answered = earlier.answered_id(custom_id, retry_errors=retry)
    if not answered:
        return True
    if line.number in earlier.failed and line.number not in earlier.done:
        summary.failed_before += 1
    else:
        summary.skipped += 1
    return False
