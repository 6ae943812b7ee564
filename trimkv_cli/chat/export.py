"""A conversation as a document: Markdown, JSON, JSONL or a page of HTML that loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from trimkv_cli.chat.store import Transcript
from trimkv_cli.chat.turns import split_thought, to_messages
from trimkv_cli.errors import UsageError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
section { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid; }
.system { border-color: #888; } .user { border-color: #36c; } .assistant { border-color: #284; }
h2 { font-size: .8rem; margin: 0 0 .3rem; } details { color: #777; } @media (prefers-color-scheme: dark) {
body { background: #181818; color: #ddd; } }
"""


def export(transcript: Transcript, form: str) -> str:
    """Return the conversation in one of the forms of `FORMS`, ended by a newline.

    Raises:
        UsageError: an unknown form.
    """
    if form not in FORMS:
        raise UsageError(f"{form!r} is no form of a conversation", hint=f"one of {', '.join(FORMS)}")
    return FORMS[form](transcript)


def form_of(path: str) -> str:
    """Return the form that a file's name stands for.

    Raises:
        UsageError: none.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    form = {"markdown": "md", "htm": "html", "ndjson": "jsonl"}.get(suffix, suffix)
    if form not in FORMS:
        raise UsageError(f"{path} does not say in which form", hint=f"end it with .{', .'.join(FORMS)}")
    return form


def _markdown(transcript: Transcript) -> str:
    parts = [f"# {transcript.name}\n\nModel: {transcript.model}\n"]
    if transcript.system is not None:
        parts.append(f"## System\n\n{transcript.system}\n")
    for turn in transcript.turns:
        thought, answer = split_thought(turn.answer)
        quoted = "".join(f"> {line}\n" for line in thought.splitlines())
        parts.append(
            f"## You\n\n{turn.user}\n\n## {transcript.model}\n\n{quoted}{'' if not quoted else chr(10)}{answer}\n"
        )
    return "\n".join(parts)


def _json(transcript: Transcript) -> str:
    record = {
        "name": transcript.name,
        "model": transcript.model,
        "created": transcript.created,
        "updated": transcript.updated,
        "sampling": dict(transcript.sampling),
        "messages": to_messages(transcript.system, transcript.turns),
        "turns": [turn.to_json() for turn in transcript.turns],
    }
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def _jsonl(transcript: Transcript) -> str:
    """Return one line, as training sets have them: {"messages": […]}."""
    return json.dumps({"messages": to_messages(transcript.system, transcript.turns)}, ensure_ascii=False) + "\n"


def _html(transcript: Transcript) -> str:
    sections = []
    for message in to_messages(transcript.system, transcript.turns):
        role = message["role"]
        thought, text = split_thought(message["content"]) if role == "assistant" else ("", message["content"])
        folded = f"<details><summary>reasoning</summary>{html.escape(thought)}</details>" if thought else ""
        speaker = {"user": "You", "system": "System"}.get(role, transcript.model)
        sections.append(f'<section class="{role}"><h2>{html.escape(speaker)}</h2>{folded}{html.escape(text)}</section>')
    title = html.escape(transcript.name)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n{chr(10).join(sections)}\n</html>\n"
    )


FORMS: Mapping[str, Callable[[Transcript], str]] = {"md": _markdown, "json": _json, "jsonl": _jsonl, "html": _html}
