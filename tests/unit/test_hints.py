"""Mistakes in error messages that can be found without making them: an error that does not say what to try."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from trimkv_cli import errors

PACKAGE = Path(errors.__file__).parent
ERRORS = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TrimkvError)}
# What these say becomes part of a line's error record, or of an answer inside a chat: without a hint.
RECORDED = {"jobs", "grammars.py", "sampler.py", "chat", "slash"}


def raised() -> Iterator[tuple[str, ast.Call]]:
    for path in PACKAGE.rglob("*.py"):
        if RECORDED & {*path.relative_to(PACKAGE).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                yield f"{path.name}:{node.lineno}", node


def test_every_error_says_what_to_try() -> None:
    """Catches an error line without a hint."""
    calls = list(raised())
    assert len(calls) > 50
    assert [place for place, call in calls if "hint" not in {keyword.arg for keyword in call.keywords}] == []
