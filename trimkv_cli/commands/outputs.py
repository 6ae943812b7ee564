"""Outputs of a command: never over something that it reads, and no two things into one file."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_path

# By their names, the options and arguments of all commands that stand for a file; the others are values.
READ = ("file", "files", "source", "data", "cache", "prompt_token_ids", "system_file", "template")
WRITTEN = ("output", "save_cache", "html", "png", "svg", "plot", "summary_json")


def check_outputs(parameters: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Refuse a command line that would have a file overwritten which it reads, or written twice.

    Links of all kinds are followed; devices and pipes may be named as often as one likes.

    Raises:
        UsageError: naming both.
    """
    outputs = list(_places(parameters, values, WRITTEN))
    if not outputs:
        return
    for (first, one), (second, other) in combinations(outputs, 2):
        if _same(one, other):
            raise UsageError(f"{first} and {second} are the same file", hint="give one of them another name")
    for read, source in (*_places(parameters, values, READ), *_stdin()):
        for output, path in outputs:
            if _same(source, path):
                raise UsageError(
                    f"{output} would overwrite what is read: {read} is the same file",
                    hint=f"give {output.partition(' ')[0]} another name",
                )


def _places(parameters: Sequence[Any], values: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield files that the line names, each with the option or argument that names it."""
    resumes = any(parameter.name == "source" for parameter in parameters)
    for parameter in parameters:
        value = values.get(parameter.name)
        if parameter.name in names and value not in (None, "-") and not isinstance(value, bool):
            for path in _paths(parameter.name, value, resumes=resumes):
                if str(path) != "-":
                    yield f"{_label(parameter)} {path}", path


def _paths(name: str, value: Any, *, resumes: bool) -> Iterator[Path]:
    if name == "template":
        from trimkv_cli.commands.prompts import find_template

        yield find_template(value)
        return
    if name == "files":
        from trimkv_cli.commands.documents import expand

        value = expand(list(value))
    for word in value if isinstance(value, list | tuple) else [value]:
        path = Path(as_path(str(word)))
        yield path
        if resumes and name == "output":
            from trimkv_cli.jobs.resuming import path_beside

            yield path_beside(path)


def _label(parameter: Any) -> str:
    flag = parameter.opts[0]
    return str(flag) if flag.startswith("-") else str(parameter.metavar or flag)


def _stdin() -> Iterator[tuple[str, Path]]:
    path = Path("/dev/stdin")
    try:
        if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
            yield "stdin", path
    except (OSError, ValueError):
        return


def _same(first: Path, second: Path) -> bool:
    try:
        one, other = first.stat(), second.stat()
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)
