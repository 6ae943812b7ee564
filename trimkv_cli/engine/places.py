"""What the user's name for a model or for gates stands for: a profile, the built-in mini, a folder or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.errors import GateMismatch, UsageError
from trimkv_cli.mini import GATES_FOLDER, MODEL_FOLDER
from trimkv_cli.profiles import BUILT_IN, find_profile

if TYPE_CHECKING:
    from trimkv_cli.engine.hub import Kind

MINI = "mini"
BUILT_IN_FOLDERS: dict[Kind, Path] = {"model": MODEL_FOLDER, "config": MODEL_FOLDER, "gates": GATES_FOLDER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model or gates: the name to report, and the revision to take when it is a hub id."""

    id: str
    revision: str | None = None

    def folder(self, kind: Kind, *, offline: bool, refresh: bool = False) -> Path:
        """Return the folder with the files; raises as `hub.resolve` does."""
        from trimkv_cli.engine.hub import resolve

        if self.id == MINI and self.revision is not None:
            raise UsageError("the built-in mini has no revisions", hint="leave out --revision")
        if self.id == MINI:
            return BUILT_IN_FOLDERS[kind]
        return resolve(self.id, kind=kind, revision=self.revision, offline=offline, refresh=refresh)


def model_place(name: str | None, revision: str | None = None) -> Place:
    """Return the model that a name stands for; without a name the built-in one."""
    profile = find_profile(name or MINI)
    if profile is None:
        return Place(id=name or MINI, revision=revision)
    return Place(id=shown_id(profile.model), revision=revision or profile.revision)


def gates_place(name: str, revision: str | None = None) -> Place:
    """Return the gates that a name stands for: a profile's own, or the folder or hub id itself.

    Raises:
        GateMismatch: a profile without trained gates, or a constant gate, which has no files.
    """
    if name in ("streaming", "none", "auto"):
        raise GateMismatch(f"{name!r} is not a gate folder", hint="give a folder, a hub id or a profile")
    profile = find_profile(name)
    if profile is None:
        return Place(id=name, revision=revision)
    if profile.gates is None:
        raise GateMismatch(f"the profile {name} has no trained gates", hint="try --gates streaming with its model")
    return Place(id=shown_id(profile.gates), revision=revision or profile.gates_revision)


def shown_id(id: str) -> str:
    """Return the id that a user sees and may type: `mini` for what a profile calls `builtin:mini`."""
    return id.removeprefix(BUILT_IN)
