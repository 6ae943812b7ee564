"""What a shell may complete: names of models, profiles, gates, sessions and templates; nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_REPOSITORY = "models--"


def complete_model(incomplete: str) -> list[str]:
    """Return profiles and the models in the hub's cache that begin with what was typed."""
    return _starting([*_profiles(), *_cached(gates=False)], incomplete)


def complete_profile(incomplete: str) -> list[str]:
    """Return the profiles that begin with what was typed."""
    return _starting(_profiles(), incomplete)


def complete_gates(incomplete: str) -> list[str]:
    """Return the ways to name gates."""
    return _starting(["auto", "streaming", "none", *_cached(gates=True)], incomplete)


def complete_session(incomplete: str) -> list[str]:
    """Return the stored conversations."""
    from trimkv_cli.chat.store import SessionStore

    return _starting(SessionStore.default().names(), incomplete)


def complete_template(incomplete: str) -> list[str]:
    """Return the user's templates."""
    from trimkv_cli.commands.templates import template_names

    return _starting(template_names(), incomplete)


def _starting(names: list[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _profiles() -> list[str]:
    from trimkv_cli.errors import TrimkvError
    from trimkv_cli.profiles import list_profiles

    try:
        return [profile.name for profile in list_profiles()]
    except TrimkvError:  # a broken file is for `trimkv profiles list` to name
        return []


def _cached(*, gates: bool) -> Iterator[str]:
    """Yield the hub ids in the cache; gate folders of the released kind are known by their names."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in folder.glob(f"{_REPOSITORY}*") if folder.is_dir() else ():
        name = path.name.removeprefix(_REPOSITORY).replace("--", "/")
        if ("TrimKV" in name) == gates:
            yield name
