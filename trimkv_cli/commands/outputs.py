"""Files that a command writes: never over something that it reads, and no two things into one."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_path


@dataclass(frozen=True, slots=True)
class _Place:
    """A file that the command line names."""

    label: str
    path: Path


def check_outputs(parameters: Iterable[Any], values: Mapping[str, Any]) -> None:
    """Refuse a command line that would have a file overwritten which it reads, or written twice.

    Links of all kinds are followed; devices and pipes may be named as often as one likes.

    Raises:
        UsageError: naming both.
    """
    known = list(parameters)
    outputs = list(_places(known, values, _OUTPUTS))
    if not outputs:
        return
    for first, second in combinations(outputs, 2):
        if _same(first.path, second.path):
            raise UsageError(
                f"{first.label} and {second.label} are the same file", hint="give one of them another name"
            )
    for read in (*_places(known, values, _INPUTS), *_stdin()):
        for output in outputs:
            if _same(read.path, output.path):
                raise UsageError(
                    f"{output.label} would overwrite what is read: {read.label} is the same file",
                    hint=f"give {output.label.partition(' ')[0]} another name",
                )


def _one(name: str | Path) -> Iterator[Path]:
    yield Path(as_path(str(name)))


def _each(names: Iterable[str | Path]) -> Iterator[Path]:
    for name in names:
        yield from _one(name)


def _expanded(names: list[str]) -> Iterator[Path]:
    from trimkv_cli.commands.documents import expand

    yield from _each(expand(names))


def _template(name: str) -> Iterator[Path]:
    from trimkv_cli.commands.prompts import find_template

    yield find_template(name)


def _with_sidecar(name: str) -> Iterator[Path]:
    from trimkv_cli.jobs.resuming import path_beside

    for path in _one(name):
        yield from (path, path_beside(path))


# By their names, the options and arguments of all commands that stand for a file; the others are values.
_INPUTS: Mapping[str, Callable[[Any], Iterator[Path]]] = {
    "file": _each,
    "files": _expanded,
    "source": _one,
    "data": lambda names: _one(names) if isinstance(names, str) else _each(names),
    "cache": _one,
    "prompt_token_ids": _one,
    "system_file": _one,
    "template": _template,
}
_OUTPUTS: Mapping[str, Callable[[Any], Iterator[Path]]] = {
    "output": _one,
    "save_cache": _one,
    "html": _one,
    "png": _one,
    "svg": _one,
    "plot": _one,
    "summary_json": _one,
}


def _places(
    parameters: Iterable[Any], values: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], Iterator[Path]]]
) -> Iterator[_Place]:
    resumes = any(parameter.name == "source" for parameter in parameters)
    for parameter in parameters:
        value = values.get(parameter.name)
        if parameter.name not in kinds or value in (None, "-") or isinstance(value, bool):
            continue
        read = _with_sidecar if resumes and parameter.name == "output" else kinds[parameter.name]
        for path in read(value):
            if str(path) != "-":
                yield _Place(f"{_label(parameter)} {path}", path)


def _label(parameter: Any) -> str:
    flag = parameter.opts[0]
    return str(flag) if flag.startswith("-") else str(parameter.metavar or flag)


def _stdin() -> Iterator[_Place]:
    path = Path("/dev/stdin")
    try:
        if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
            yield _Place("stdin", path)
    except (OSError, ValueError):
        return


def _same(first: Path, second: Path) -> bool:
    try:
        one, other = first.stat(), second.stat()
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)
