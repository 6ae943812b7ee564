"""The home of the running conversation: a session that is written after every turn, or memory alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from filelock import BaseFileLock

from trimkv_cli.chat.store import SessionStore, Transcript
from trimkv_cli.chat.talk import Talk
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.request import SamplingParams


class Autosave:
    """Write a conversation after every turn; without `enabled` only once it has been given a name."""

    def __init__(
        self,
        store: SessionStore,
        *,
        options: Mapping[str, Any],
        enabled: bool = True,
        save_cache: bool = True,
        name: str | None = None,
    ) -> None:
        self.store = store
        self.name: str | None = None
        self._wanted = name
        self._enabled = enabled or name is not None
        self._save_cache = save_cache
        self.options = dict(options)  # to open the session again
        self._created = 0.0
        self._lock: BaseFileLock | None = None

    def save(self, conversation: Talk) -> None:
        """Keep the state after the newest turn, and the transcript.

        Raises:
            UsageError: the folder cannot be written.
            TrimkvError: the disk is full.
        """
        if self.name is None and self._enabled and conversation.turns:
            self._create(self._wanted, conversation)
        conversation.save_state()
        self.write(conversation)

    def write(self, conversation: Talk) -> None:
        """Write the transcript alone: turns were taken back, or settings changed.

        Raises:
            UsageError: the folder cannot be written.
            TrimkvError: the disk is full.
        """
        if self.name is None:
            return
        transcript = Transcript(
            name=self.name,
            model=conversation.model_id,
            fingerprint=conversation.fingerprint,
            system=conversation.system,
            think=conversation.think,
            sampling=asdict(conversation.params),
            options=self.options,
            turns=tuple(conversation.turns),
            states=conversation.snapshots.files,
            created=self._created,
            updated=time.time(),
        )
        self.store.write(transcript)

    def save_as(self, name: str, conversation: Talk) -> None:
        """Give the conversation a name of its own: a stored session is renamed, another one stored.

        Raises:
            UsageError: the name is taken.
        """
        if self.name is None:
            self._create(name, conversation)
        else:
            old = self.name
            new_lock = self.store.rename(old, name)
            self._let_go()
            self.name, self._lock = name, new_lock
            if self._save_cache:
                conversation.snapshots.open(self.store.path(name), conversation.snapshots.files)
        self.write(conversation)

    def fork(self, name: str | None, conversation: Talk) -> str:
        """Go on in a copy, and leave the session as it is; returns the copy's name.

        Raises:
            UsageError: nothing is stored, or the name is taken.
        """
        if self.name is None:
            raise UsageError("nothing of this conversation is stored", hint="/save NAME, then /fork")
        self.write(conversation)
        copy = self.store.copy(self.name, name or self.store.free_name(self.name))
        self._take(copy)
        if self._save_cache:
            conversation.snapshots.open(self.store.path(copy), conversation.snapshots.files)
        return copy

    def open(self, name: str, conversation: Talk) -> str | None:
        """Go on with a stored session; returns why its turns have to be read again, or None.

        Raises:
            UsageError: there is none, or it is open elsewhere.
            InputError: its file is damaged.
        """
        transcript = self.store.read(name)
        if name != self.name:
            self._take(name)
        self._created = transcript.created
        conversation.clear()
        conversation.system, conversation.think = transcript.system, transcript.think
        conversation.params = params_of(transcript)
        conversation.snapshots.open(self.store.path(name), transcript.states)
        why = _why_not(conversation, transcript)
        if not self._save_cache:
            conversation.snapshots.move_to(None)
        return why

    def start_anew(self) -> None:
        """Leave the session as it is; the next turn begins another one."""
        self._let_go()
        self.name, self._wanted = None, None

    def close(self) -> None:
        """Let other processes have the session."""
        self._let_go()

    def _create(self, name: str | None, conversation: Talk) -> None:
        name = self.store.create(name)
        self._take(name)
        self._created = time.time()
        if self._save_cache:
            conversation.snapshots.move_to(self.store.path(name))

    def _take(self, name: str) -> None:
        lock = self.store.lock(name)
        self._let_go()
        self.name, self._lock = name, lock

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None


def params_of(transcript: Transcript) -> SamplingParams:
    """Return the sampling parameters of a stored session.

    Raises:
        InputError: they are not what this version knows.
    """
    try:
        values = dict(transcript.sampling)
        lists = {"stop": tuple(values.get("stop", ())), "logit_bias": tuple(map(tuple, values.get("logit_bias", ())))}
        return SamplingParams(**{**values, **lists})
    except TypeError as error:
        raise InputError(f"session {transcript.name}: {error}", hint="it was made by another version") from None


def _why_not(conversation: Talk, transcript: Transcript) -> str | None:
    conversation.load(transcript.turns)
    if conversation.must_reread:
        return conversation.why_lost or "its cache was not saved"
    return None
