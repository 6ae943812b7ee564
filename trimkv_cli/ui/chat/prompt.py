"""The input line of a conversation, with its keys, history and completion."""

from __future__ import annotations

import codecs
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth, Output, create_output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from trimkv_cli.ui.look import Look

_QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Typed:
    """A message or command; what was pasted into an empty line is literal, whatever it begins with."""

    text: str
    literal: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion of the last `replaces` characters."""

    text: str
    replaces: int
    help: str = ""


Complete = Callable[[str], Iterable[Candidate]]


class ChatPrompt:
    """Ask for one input after the other: Enter sends, Alt-Enter and Ctrl-J begin a new line, as does `\"\"\"`."""

    def __init__(
        self,
        *,
        history: Path | None,
        complete: Complete,
        look: Look,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._pasted = False
        self.erases = not is_dumb_terminal()  # what was typed is gone from the screen once it is sent
        self._session: PromptSession[str] = PromptSession(
            history=_open_history(history),
            completer=_Adapter(complete),
            complete_style=CompleteStyle.COLUMN,
            complete_while_typing=False,
            enable_open_in_editor=False,
            enable_suspend=True,
            erase_when_done=True,  # the caller prints what was sent: whole, however long it is
            multiline=True,
            key_bindings=self._bindings(),
            prompt_continuation="  ",
            color_depth=None if look.colour else ColorDepth.DEPTH_1_BIT,
            reserve_space_for_menu=8,
            input=input or create_input(_in_utf8(sys.stdin)),
            output=output or create_output(_in_utf8(sys.stdout)),
        )
        # A terminal that does not say where its cursor is shows no toolbar; that is no reason for a warning.
        self._session.app.renderer.cpr_not_supported_callback = lambda: None
        self._session.default_buffer.on_text_changed += self._forget_paste

    def ask(self, draft: str, toolbar: Callable[[], str]) -> Typed:
        """Return what was sent; `draft` stands in the line to begin with, `toolbar()` below it.

        Raises:
            EOFError: Ctrl-D in an empty line.
            KeyboardInterrupt: Ctrl-C in an empty line; in another one it empties it.
        """
        self._pasted = False
        text = self._session.prompt("> ", default=draft, bottom_toolbar=toolbar)
        if text.startswith(_QUOTES):
            return Typed(text.strip().removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n"), literal=True)
        return Typed(text, literal=self._pasted)

    def _forget_paste(self, buffer: Buffer) -> None:
        if not buffer.text:
            self._pasted = False

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
                buffer.complete_state = None  # the chosen completion stands; what follows it can be typed
            elif _is_open(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("c-j")
        def begin_line(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add(Keys.BracketedPaste)
        def paste(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            into_nothing = not buffer.text
            buffer.insert_text(event.data.replace("\r\n", "\n").replace("\r", "\n"))
            self._pasted = self._pasted or (into_nothing and bool(buffer.text))

        @keys.add("c-c")
        def give_up(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
                self._pasted = False
            else:
                event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-x", "c-e")
        def edit(event: KeyPressEvent) -> None:
            event.app.create_background_task(edit_outside(event.current_buffer))

        return keys


async def edit_outside(buffer: Buffer) -> None:
    """Let an editor change the text; one that is not there, or gives up, leaves it as it is."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "message.md"
        path.write_bytes(buffer.text.encode("utf-8", "surrogateescape"))
        if await run_in_terminal(lambda: _run_editor(path), in_executor=True):
            text = path.read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n")
            buffer.document = Document(text, len(text))


def _run_editor(path: Path) -> bool:
    chosen = (os.environ.get("VISUAL"), os.environ.get("EDITOR"), "editor", "nano", "vim", "vi")
    for editor in filter(None, chosen):
        try:
            return subprocess.call([*shlex.split(editor), str(path)]) == 0
        except OSError:
            continue  # it is not there
    return False


def _in_utf8(stream: TextIO) -> TextIO:
    """Return a terminal's stream, in UTF-8 where the locale says ASCII: terminals send and show UTF-8 all the same."""
    if codecs.lookup(stream.encoding or "ascii").name != "ascii":
        return stream
    opened = open(stream.fileno(), stream.mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    return cast("TextIO", opened)


class _Adapter(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:  # noqa: ARG002
        for candidate in self._complete(document.text_before_cursor):
            yield Completion(candidate.text, start_position=-candidate.replaces, display_meta=candidate.help or None)


def _is_open(text: str) -> bool:
    """Say whether a text begins with three quotes that are not closed yet."""
    return text.startswith(_QUOTES) and (len(text) < 2 * len(_QUOTES) or not text.rstrip().endswith(_QUOTES))


def _open_history(path: Path | None) -> History:
    """Open the history file, which only its owner may read."""
    if path is None:
        return InMemoryHistory()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return FileHistory(path)
