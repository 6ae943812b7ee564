"""Prompts from arguments, files, stdin and templates, as messages or as plain text."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from trimkv_cli.commands.documents import Reader
from trimkv_cli.errors import InputError, UnsupportedModel, UsageError
from trimkv_cli.events import Notice
from trimkv_cli.files import as_text, writing
from trimkv_cli.loading.options import SamplingOptions
from trimkv_cli.ui.plain import AnswerWriter, print_warning

if TYPE_CHECKING:
    from trimkv_cli.engine.text import Message, Prompt, Text


def draw_seed(sampling: SamplingOptions) -> SamplingOptions:
    """Fix a seed where the user gave none: a new one each time, to be found in the record."""
    return sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbelow(2**32))


@contextmanager
def open_answer(output: str | None) -> Iterator[AnswerWriter]:
    """Open stdout, or the file that `-o` names, for an answer.

    Raises:
        UsageError: a file that cannot be written.
    """
    if output is None:
        yield AnswerWriter()
        return
    with writing(output, hint="check the path given to -o"):
        stream = Path(output).open("wb", buffering=0)  # noqa: SIM115
    with stream:
        yield AnswerWriter(stream, output)


def gather(prompt: str | None, files: Sequence[str], reader: Reader, *, may_be_empty: bool = False) -> str:
    """Join the prompt, the files and what is piped into stdin; these may be PDF, HTML or text.

    Raises:
        UsageError: none of them holds anything, unless that may be.
        NotUtf8: the prompt is not UTF-8.
    """
    parts = [as_text(prompt or "", "the prompt"), *(reader.document(path).text for path in files), reader.piped()]
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not text and not may_be_empty:
        raise UsageError("there is no prompt", hint='trimkv ask "why is the sky blue?", or pipe text into it')
    return text


def read_system(system: str | None, system_file: str | None, reader: Reader) -> str | None:
    """Return the system message from one of the two options.

    Raises:
        UsageError: both are given.
        NotUtf8: the message is not UTF-8.
    """
    if system is not None and system_file is not None:
        raise UsageError("--system and --system-file are both given", hint="give one of them")
    if system_file is not None:
        return reader.text(system_file)
    return as_text(system, "the system message") if system is not None else None


def to_messages(user: str, system: str | None) -> list[Message]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": user}]


def check_raw(*, raw: bool, system: str | None, special_tokens: bool) -> None:
    """Refuse flags that a prompt has no use for.

    Raises:
        UsageError: a system message with `raw`, which has no place for it; special tokens without it.
    """
    if raw and system is not None:
        raise UsageError("--raw sends the prompt alone, without a system message", hint="leave out --system or --raw")
    if special_tokens and not raw:
        raise UsageError(
            "--special-tokens reads a raw prompt; what is said in messages is taken literally", hint="--raw as well"
        )


def render(
    text: Text | None, user: str, *, system: str | None, raw: bool, think: bool | None, special_tokens: bool = False
) -> Prompt:
    """Render a first turn through the chat template, or encode it as it is with `raw`.

    Raises:
        UnsupportedModel: the model has no tokenizer, or no chat template.
    """
    text = need_text(text)
    if not raw:
        return text.render_chat(to_messages(user, system), think=think)

    from trimkv_cli.engine.text import Prompt

    return Prompt(token_ids=tuple(text.encode(user, special=special_tokens)))


def names_tokens(text: Text | None, user: str, *, raw: bool, special_tokens: bool) -> tuple[Notice, ...]:
    """Warn, on stderr and in the record, of a raw prompt whose special tokens are read as text."""
    if not raw or special_tokens or not (named := need_text(text).named_tokens(user)):
        return ()
    message = f"the prompt holds {', '.join(named[:4])}, read as text: --special-tokens reads them as tokens"
    print_warning(message)
    return (Notice(code="special_tokens_as_text", message=message),)


def needs(
    *, raw: bool, thinks: bool = False, instead: str = "--raw continues a text as it stands"
) -> Callable[[Text | None], object]:
    """Return what finds out whether a model's tokenizer will do, unless `raw` its template, and whether it `thinks`."""

    def check(found: Text | None) -> None:
        text = need_text(found)
        if not raw:
            text.template.check(instead=instead)
        if thinks:
            text.check_thinking()

    return check


def need_text(text: Text | None) -> Text:
    """Return the tokenizer of a model that must have one.

    Raises:
        UnsupportedModel: it has none.
    """
    if text is None:
        raise UnsupportedModel(
            "the model folder has no tokenizer", hint='trimkv run with lines like {"prompt_token_ids": [1, 2, 3]}'
        )
    return text


_SUFFIXES = (".txt", ".md")


def templates_folder() -> Path:
    """Return where templates lie; the folder may not exist."""
    from platformdirs import user_config_path

    return user_config_path("trimkv") / "templates"


def template_names() -> list[str]:
    folder = templates_folder()
    return sorted({path.stem for path in folder.iterdir() if path.suffix in _SUFFIXES}) if folder.is_dir() else []


def read_template(name: str, reader: Reader) -> Template:
    """Read a template by its name, or a file by its path.

    Raises:
        InputError: there is none, or its places cannot be read.
    """
    path = find_template(name)
    template = Template(reader.text(str(path)))
    if not template.is_valid():
        raise InputError(
            f"{path} has a $ that names no place", hint="write $$ for a dollar sign, $input for the prompt"
        )
    return template


def fill(template: Template, *, name: str, user: str, parameters: Sequence[str]) -> str:
    """Put the prompt and `name=value` parameters into a template.

    Raises:
        UsageError: a place without a value, or a value without a place.
    """
    values = dict(_parameter(as_text(text, "a value of -p")) for text in parameters)
    places = set(template.get_identifiers())
    if unknown := sorted(values.keys() - places):
        raise UsageError(f"template {name} has no ${unknown[0]}", hint=f"its places: {_listed(places)}")
    if user:
        if "input" not in places:
            raise UsageError(
                f"template {name} has no $input for the prompt", hint="give no prompt, or add $input to it"
            )
        values["input"] = user
    if missing := sorted(places - values.keys()):
        hint = "give a prompt or pipe text in" if missing[0] == "input" else f"-p {missing[0]}=VALUE"
        raise UsageError(f"template {name} needs ${missing[0]}", hint=hint)
    return template.substitute(values)


def find_template(name: str) -> Path:
    """Return the file of a template.

    Raises:
        InputError: there is none of this name.
    """
    if Path(name).suffix in _SUFFIXES or "/" in name or "\\" in name:
        return Path(name)
    for suffix in _SUFFIXES:
        path = templates_folder() / f"{name}{suffix}"
        if path.is_file():
            return path
    known = template_names()
    hint = (
        f"there are {', '.join(known)}" if known else f"write it to {templates_folder() / name}.txt, with $input in it"
    )
    raise InputError(f"there is no template {name!r}", hint=hint)


def _parameter(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise UsageError(f"-p {text} is not name=value", hint="-p language=German")
    return key, value


def _listed(names: set[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names)) or "none"
