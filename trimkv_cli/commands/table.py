"""The table of commands: name, place and help line of each, known without importing what it runs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True, slots=True)
class Entry:
    """A command or a group of them; `place` is `module:name` of its function or `CommandGroup`."""

    name: str
    place: str
    help: str  # the first paragraph of its own help

    def stub(self) -> TyperCommand:
        """Return what lists of commands need to know."""
        return TyperCommand(self.name, help=self.help)

    def load(self) -> Any:
        """Import the command, with its options."""
        from trimkv_cli.commands.options import CommandGroup

        module, _, name = self.place.partition(":")
        found = getattr(import_module(f"trimkv_cli.commands.{module}"), name)
        if not isinstance(found, CommandGroup):
            alone = CommandGroup()
            alone.command(self.name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = self.name
        return command


ENTRIES = (
    Entry("chat", "chat.command:chat", "Talk with a model; the cache stays as large as it is, however long the talk."),
    Entry("ask", "ask:ask", "Answer one prompt; stdout carries the answer and nothing else."),
    Entry(
        "summarize",
        "summarize.command:summarize",
        "Summarize documents in one pass each; memory stays the same however long they are.",
    ),
    Entry("run", "run.command:run", "Answer every line of a file; one bad line never stops the others."),
    Entry("serve", "serve:serve", "Keep a model warm behind OpenAI's HTTP interface, inside the budget."),
    Entry("ps", "servers:ps", "List the running servers: model, memory against the budget, rows."),
    Entry("stop", "servers:stop", "End a running server when its requests in flight are answered."),
    Entry(
        "plan",
        "plan:plan",
        "Say whether a budget will do: every part in bytes, and commands that would fit where it does not (exit 4).",
    ),
    Entry(
        "inspect",
        "inspect:inspect",
        "Show what each layer and KV head still holds when the answer is done, and for how much longer.",
    ),
    Entry(
        "eval",
        "eval:evaluate",
        "Measure accuracy at several budgets, beside a full cache, streaming and random eviction of the same size.",
    ),
    Entry(
        "bench",
        "bench:bench",
        "Measure prefill, decode and peak memory over budgets, contexts and rows; predicted bytes come first.",
    ),
    Entry(
        "doctor",
        "doctor:doctor",
        "Check versions, device, number formats, folders, terminal and the built-in model; exit 1 on a fault.",
    ),
    Entry("gates", "gates:gates_app", "Look at trained retention gates."),
    Entry("models", "models:models_app", "Look at models; they live in the Hugging Face cache."),
    Entry("profiles", "profiles:profiles_app", "Look at profiles: a model under a short name."),
    Entry("sessions", "sessions:sessions_app", "Look at stored conversations, export, copy and delete them."),
)


class CommandTable(TyperGroup):
    """The commands of `ENTRIES`: stubs in every list, and the one that is chosen loaded."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._entries = {entry.name: entry for entry in ENTRIES}
        self.commands = {entry.name: entry.stub() for entry in ENTRIES}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Choose the command that a line begins with, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else self._loaded(name), rest

    def load_all(self) -> CommandTable:
        """Import every command, for what asks about their options."""
        for name in self.commands:
            self._loaded(name)
        return self

    def _loaded(self, name: str) -> Any:
        if name in self._entries:
            self.commands[name] = self._entries.pop(name).load()
        return self.commands[name]
