"""`trimkv profiles`: models under short names."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated, Any

import typer

from trimkv_cli.commands.options import JSON, CommandGroup
from trimkv_cli.model.profiles import Profile, list_profiles, load_profile, profile_folders
from trimkv_cli.ui.plain import columns, print_answer

profiles_app = CommandGroup(help="Look at profiles: a model under a short name.", no_args_is_help=True)


@profiles_app.command(name="list")
def list_(*, json: bool = JSON) -> None:
    """List all profiles; your own hide built-in ones of the same name.

    trimkv profiles list
    """
    profiles = list_profiles()
    print_answer(jsonlib.dumps([_facts(profile) for profile in profiles], indent=2) if json else _table(profiles))


@profiles_app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a profile.", metavar="NAME")], *, json: bool = JSON) -> None:
    """Show one profile: its file, or as JSON what trimkv reads in it.

    trimkv profiles show mini > my-mini.toml
    """
    profile = load_profile(name)
    print_answer(jsonlib.dumps(_facts(profile), indent=2) if json else profile.path.read_text(encoding="utf-8"))


@profiles_app.command()
def path() -> None:
    """Print the folder for your own profiles, and the built-in one.

    trimkv profiles path
    """
    print_answer("\n".join(str(folder) for folder in profile_folders()))


def _facts(profile: Profile) -> dict[str, Any]:
    return {**asdict(profile), "path": str(profile.path)}


def _table(profiles: list[Profile]) -> str:
    rows = [(p.name, p.model, p.gates or "-", str(p.kv_budget or "-")) for p in profiles]
    return "\n".join(columns([("NAME", "MODEL", "GATES", "SLOTS"), *rows]))
