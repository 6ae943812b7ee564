"""Summaries as they are written: in the order of the inputs, each as soon as it and all before it are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimkv_cli.commands.summarize.texts import as_json
from trimkv_cli.errors import TrimkvError
from trimkv_cli.ui.plain import AnswerWriter, print_error, to_json

if TYPE_CHECKING:
    from trimkv_cli.commands.summarize.command import SummaryOptions
    from trimkv_cli.commands.summarize.inputs import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """A summary that is there: its text, its record for --json, and what says on stderr how it went."""

    text: str
    record: Callable[[], dict[str, Any]]
    say: Callable[[], None]
    tokens: tuple[int, int]  # read and written, over all requests for it
    parts: int = 1
    rounds: int = 1


class Sheet:
    """Take summaries in any order and write them in that of the inputs; faults are said and gathered."""

    def __init__(self, inputs: Inputs, writer: AnswerWriter, asked: SummaryOptions, *, as_points: bool) -> None:
        self.alone = len(inputs.names) == 1
        self.streams = self.alone and not (asked.json or not asked.stream or as_points)
        self.writer = writer
        self.faults = list(inputs.faults)
        self._inputs = inputs
        self._json = asked.json
        self._as_points = as_points
        self._done: dict[int, Summed | TrimkvError] = {}
        self._next = 0

    @property
    def ended(self) -> int:
        """Count the inputs that have a summary or a fault."""
        return self._next + len(self._done)

    @property
    def failed(self) -> int:
        """Count the faults, also of what was not an input any more."""
        return len(self.faults) + sum(isinstance(outcome, TrimkvError) for outcome in self._done.values())

    def put(self, index: int, outcome: Summed | TrimkvError) -> None:
        """Take the outcome of an input, and write what can be written now."""
        self._done[index] = outcome
        while self._next in self._done:
            self._write(self._next, self._done.pop(self._next))
            self._next += 1

    def _write(self, index: int, outcome: Summed | TrimkvError) -> None:
        name = self._inputs.names[index]
        if isinstance(outcome, TrimkvError):
            self.faults.append(outcome)
            if self._inputs.total > 1:
                print_error(named(name, outcome), outcome.hint)
            return
        if self._json:
            self.writer.push(to_json(_record(outcome, name)))
        elif self._as_points:
            self.writer.push(as_json(name, outcome.text))
        elif not self.streams:
            title = "" if self.alone else f"## {name}\n\n"
            self.writer.push(f"{title}{outcome.text}")
        self.writer.close()
        outcome.say()


def _record(summed: Summed, name: str) -> dict[str, Any]:
    """Add to a completion where it comes from; its usage counts all that was sent for it."""
    record, (read, written) = summed.record(), summed.tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    ours = {**record["trimkv"], "input": name, "parts": summed.parts, "rounds": summed.rounds}
    return {**record, "usage": usage, "trimkv": ours}


def named(name: str, error: TrimkvError) -> str:
    """Say whose error it is, unless its message does."""
    return error.message if name in error.message else f"{name}: {error.message}"
