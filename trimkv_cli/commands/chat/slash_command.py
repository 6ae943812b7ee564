"""One running chat, and the form of a slash command."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from signal import SIGINT
from typing import TYPE_CHECKING, Protocol

from trimkv_cli.chat.conversation import Conversation
from trimkv_cli.errors import UsageError
from trimkv_cli.streams import Interrupts

if TYPE_CHECKING:
    from trimkv_cli.chat.autosave import Autosave
    from trimkv_cli.chat.talk import Steps, Talk
    from trimkv_cli.ui.look import Look


class Display(Protocol):
    """What a command shows on."""

    @property
    def look(self) -> Look: ...
    def print(self, text: str = "") -> None: ...
    def note(self, message: str) -> None: ...
    def copy(self, text: str) -> bool: ...


@dataclass(slots=True)
class Shown:
    """How answers are shown."""

    markdown: bool = True
    thoughts: str = "show"  # or fold


@dataclass(slots=True, kw_only=True)
class Chat:
    """One running conversation with all that belongs to it.

    `run` shows an answer while it is made and saves the turn; it is given what begins one, for which it says whether
    Ctrl-C was pressed.
    """

    conversation: Talk
    autosave: Autosave
    display: Display
    run: Callable[[Callable[[Callable[[], bool]], Steps]], None]
    interrupts: Interrupts = field(default_factory=lambda: Interrupts(SIGINT))
    shown: Shown = field(default_factory=Shown)
    attached: list[tuple[str, str]] = field(default_factory=list)  # name and text of files for the next message
    encoding: str | None = None  # of files; None: as each shows itself
    draft: str = ""  # what the next input line begins with
    ended: bool = False

    @property
    def here(self) -> Conversation | None:
        """Return the conversation with its cache, where that lies in this process and not in a server's."""
        return self.conversation if isinstance(self.conversation, Conversation) else None

    def need_cache(self, command: str) -> Conversation:
        """Return the conversation with its cache.

        Raises:
            UsageError: it lies in a server's process.
        """
        if self.here is None:
            raise UsageError(f"/{command} needs --server off: a server does not hand out its cache")
        return self.here

    def say(self, text: str, *, attempt: int = 0) -> None:
        """Send a message, and whatever files are attached."""
        files, self.attached = self.attached, []
        whole = "\n\n".join([*(content for _, content in files), text])
        try:
            self.run(lambda stopped: self.conversation.say(whole, stopped, attempt=attempt))
        except BaseException:
            self.attached = files
            raise


Handler = Callable[[Chat, str], None]
Completer = Callable[[Chat, str], Iterable[str]]


def _nothing(_: Chat, __: str) -> Iterable[str]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlashCommand:
    """One command; `complete` lists what an argument that begins so could be."""

    name: str
    help: str
    handler: Handler
    arguments: str = ""
    complete: Completer = _nothing
    takes_path: bool = False  # its argument may hold any bytes that the name of a file may


def whole_number(argument: str, default: int) -> int:
    """Read a count of 1 or more.

    Raises:
        UsageError: it is none.
    """
    if not argument:
        return default
    if not argument.isdecimal() or int(argument) < 1:
        raise UsageError(f"{argument!r} is not a number of 1 or more")
    return int(argument)
