"""Options as Typer's parameters, over settings; completion of models, profiles, gates, sessions and templates."""

from __future__ import annotations

import functools
import inspect
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from trimkv_cli.errors import ConfigError, UsageError
from trimkv_cli.files import as_path, check_encoding
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.serve.about import check_server
from trimkv_cli.settings import option, overlay

Command = TypeVar("Command", bound=Callable[..., Any])
_MODEL_ARGUMENTS = ("name", "id")  # where a model is an argument and no option
_REPOSITORY = "models--"
# By their names, the options and arguments of all commands that stand for a file; the others are values.
READ = (
    "answers",
    "api_key_file",
    "cache",
    "data",
    "file",
    "files",
    "prompt_token_ids",
    "source",
    "system_file",
    "template",
    "text",
)
WRITTEN = ("output", "save_cache", "html", "png", "svg", "plot", "export", "summary_json")


def complete_model(incomplete: str) -> list[str]:
    """Return profiles and the models in the hub's cache that begin with what was typed."""
    return _starting([*_profiles(), *_cached(gates=False)], incomplete)


def complete_profile(incomplete: str) -> list[str]:
    """Return the profiles that begin with what was typed."""
    return _starting(_profiles(), incomplete)


def complete_gates(incomplete: str) -> list[str]:
    """Return the ways to name gates."""
    return _starting(["auto", "streaming", "keydiff", "none", *_cached(gates=True)], incomplete)


def complete_session(incomplete: str) -> list[str]:
    """Return the stored conversations."""
    from trimkv_cli.chat.store import SessionStore

    return _starting(SessionStore.default().names(), incomplete)


def complete_template(incomplete: str) -> list[str]:
    """Return the user's templates."""
    from trimkv_cli.commands.prompts import template_names

    return _starting(template_names(), incomplete)


def _starting(names: list[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _profiles() -> list[str]:
    from trimkv_cli.errors import TrimkvError
    from trimkv_cli.model.profiles import list_profiles

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


# Options of several commands: default of a parameter, or field of a command's own options, of the same name.
_prompt, _output = functools.partial(option, panel="Prompt"), functools.partial(option, panel="Output")
SYSTEM = _prompt(None, "System message.", "TEXT", short="-s", setting=True)
SYSTEM_FILE = _prompt(None, "Read the system message from a file.", "FILE")
ENCODING = _prompt(
    None,
    "Encoding of files and stdin, as gb18030; default: UTF-8, what they say, or Western (with a warning).",
    "NAME",
    setting=True,
    check=check_encoding,
)
THINK = _prompt(None, "Let the model reason first, where its template knows how.", setting=True)
RAW = _prompt(False, "Send the prompt as it is, without the chat template.")
SPECIAL_TOKENS = _prompt(False, "Read the model's own special tokens in a raw prompt as such, not as text.")
JSON = _output(False, "Print one JSON object instead of text.")
OUTPUT = _output(None, "Write to this file instead of stdout.", "FILE", short="-o")
STREAM = _output(True, "Print the answer as it comes, or when it is complete.", setting=True)
QUIET = _output(False, "Only warnings and errors on stderr.", short="-q", setting=True)
STATS = _output(False, "Print counts, speed and memory to stderr at the end.", setting=True)
COLOR = _output("auto", "Colour on stdout: auto is only on a terminal and without NO_COLOR.")
ASCII = _output(False, "Draw with ASCII characters only.")
SERVER = option(
    "auto",
    "Ask a running server: auto is one that was started with the same model, gates and settings; off, or a URL.",
    "auto|off|URL",
    panel="Server",
    setting=True,
    check=check_server,
)
API_KEY = option(None, "Key of the server; better: TRIMKV_API_KEY.", "KEY", panel="Server", setting=True)
LIVE = _output(None, "Show progress and memory while running (only on a terminal).", setting=True)

ModelName = Annotated[
    str | None,
    typer.Argument(help="Profile name, hub id, folder or GGUF file.", metavar="MODEL", autocompletion=complete_model),
]
_COMPLETIONS = {
    "model": complete_model,
    "profile": complete_profile,
    "gates": complete_gates,
    "session": complete_session,
    "template": complete_template,
}


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a command that is an option, and what its field says about it."""

    name: str
    kind: type  # without None
    default: Any
    about: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, hint: Any, field: Field[Any]) -> Option:
        """Read a field, or a parameter whose default is one."""
        kind = get_args(hint)[0] if NoneType in get_args(hint) else hint
        return cls(name, get_origin(kind) or kind, field.default, field.metadata)

    @property
    def flags(self) -> list[str]:
        """List its names: the short one first, and what turns it off behind a slash."""
        own = self.name.replace("_", "-")
        long = self.about["flag"] or (f"--{own}/--no-{own}" if self.kind is bool else f"--{own}")
        return [*filter(None, [self.about["short"]]), *long.split()]

    def parameter(self, hint: Any) -> inspect.Parameter:
        """Return what Typer makes an option of."""
        shown = typer.Option(
            *self.flags,
            help=self.about["help"],
            rich_help_panel=self.about["panel"],
            metavar=self.about["metavar"],
            min=self.about["least"],
            callback=self.about["check"],
            autocompletion=_COMPLETIONS.get(self.name),
        )
        default = inspect.Parameter.empty if self.default is MISSING else self.default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, shown]
        )

    def is_unset_by(self, said: Any) -> bool:
        """Tell whether the line takes a setting back: `--pin ""`; an empty system message is one."""
        return said in ("", [""]) and self.default is None and self.name != "system"

    def check(self, value: Any, place: str) -> None:
        """Raise when a setting has a value that this option would refuse; `place` says where it stands.

        Raises:
            ConfigError: such a value.
        """
        least, check = self.about["least"], self.about["check"]
        try:
            if least is not None and value < least:
                raise UsageError(f"{value} is too small", hint=f"it takes {least} or more")
            if check is not None:
                check(value)
            for group in (EngineOptions, SamplingOptions):
                if self.name in {f.name for f in fields(group)}:
                    group(**{self.name: value})
        except UsageError as error:
            said = f"{self.flags[-1]} {value}: "
            raise ConfigError(f"{place}: {error.message.removeprefix(said)}", hint=error.hint) from None


def settings_of(command: Any) -> dict[str, Option]:
    """Return the options of a command, or of all in a group, that files and environment may say."""
    own = {each.name: each for each in getattr(command.callback, "options", ()) if each.about["setting"]}
    for inner in getattr(command, "commands", {}).values():
        own = {**settings_of(inner), **own}
    return own


class KnownSettings(Mapping[str, type]):
    """The settings there are, with their types: a command's own, and behind them those of the whole `tree`."""

    def __init__(self, command: Any, tree: Callable[[], Any]) -> None:
        self._own = settings_of(command)
        self._all = functools.cache(lambda: settings_of(tree()))

    def __getitem__(self, name: str) -> type:
        """Return the type of a setting."""
        return self._option(name).kind

    def __iter__(self) -> Iterator[str]:
        """Name all settings."""
        return iter(self._all())

    def __len__(self) -> int:
        """Count all settings."""
        return len(self._all())

    def check(self, name: str, value: Any, place: str) -> None:
        """Raise when a setting has a value that its option would refuse."""
        self._option(name).check(value, place)

    def _option(self, name: str) -> Option:
        return self._own[name] if name in self._own else self._all()[name]


class SettingsCommand(TyperCommand):
    """A command whose options may come from files and environment, over which what is said on the line wins."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the line over the settings that `ctx.obj` reads; those that go with another choice are left out."""
        if ctx.obj is None:  # completion, which runs nothing
            return super().parse_args(ctx, args)
        found, *_ = self.make_parser(ctx).parse_args(args=list(args))
        unset = {name for name, each in settings_of(self).items() if each.is_unset_by(found.get(name))}
        said = {name: value for name, value in found.items() if value is not None and name not in unset}
        arguments = [said[name] for name in _MODEL_ARGUMENTS if name in said]
        if arguments and said.get("model", arguments[0]) != arguments[0]:
            raise UsageError(f"{arguments[0]} and --model {said['model']} are both given", hint="leave one of them out")
        named = {"model" if key in _MODEL_ARGUMENTS else key: value for key, value in said.items()}
        left = overlay(self.settings(ctx.obj(self)), named)
        ctx.default_map = {key: value for key, value in left.items() if key not in named.keys() | unset}
        args = _without(args, {flag for name in unset for flag in settings_of(self)[name].flags})
        return super().parse_args(ctx, args)

    def settings(self, all_: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of all settings that are for this command."""
        own = settings_of(self).keys() | {p.name for p in self.params if p.param_type_name == "argument"}
        if "profile" in all_ and "profile" not in own:
            all_ = {"model": all_["profile"], **all_}  # a profile's name is a model's name as well
        return {key: value for key, value in all_.items() if key in own}

    def invoke(self, ctx: Any) -> Any:
        """Run the command, unless it would write over what it reads."""
        check_outputs(self.params, ctx.params)
        return super().invoke(ctx)


def _without(args: list[str], flags: set[str]) -> list[str]:
    """Leave out flags with an empty value."""
    empty = {i for i, word in enumerate(args[:-1]) if word in flags and not args[i + 1]}
    left = [word for i, word in enumerate(args) if i not in empty and i - 1 not in empty]
    return [word for word in left if not (word.endswith("=") and word[:-1] in flags)]


class CommandGroup(typer.Typer):
    """A group of such commands."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"add_completion": False, "rich_markup_mode": "markdown", **how})

    def command(self, name: str | None = None, **how: Any) -> Callable[[Command], Command]:
        """Add a command as Typer does, with options from the fields of its parameters."""
        add = super().command(name, **{"cls": SettingsCommand, **how})
        return lambda command: add(_spread(command))


def _spread(command: Command) -> Command:
    """Give a command Typer's parameters for its options: defaults that are fields, and fields of its dataclasses.

    `Annotated[Group, "field", …]` takes these fields alone, in this order.
    """
    groups: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    options: list[Option] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        hint, *only = get_args(parameter.annotation) if _annotated(parameter) else [parameter.annotation]
        if isinstance(hint, type) and is_dataclass(hint):
            own = _fields(hint)
            groups[parameter.name] = (hint, only or list(own))
            found = [(name, *own[name]) for name in only or own]
        elif isinstance(parameter.default, Field):
            found = [(parameter.name, hint, parameter.default)]
        else:
            parameters.append(parameter)
            continue
        for name, kind, field in found:
            options.append(Option.of(name, kind, field))
            parameters.append(options[-1].parameter(kind))

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        made = {name: group(**{key: values.pop(key) for key in keys}) for name, (group, keys) in groups.items()}
        return command(**values, **made)

    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__dict__.update(__signature__=inspect.Signature(parameters), options=options)
    del run.__dict__["__wrapped__"]  # or Typer reads the signature of that
    return run  # type: ignore[return-value]


def _annotated(parameter: inspect.Parameter) -> bool:
    return get_origin(parameter.annotation) is Annotated


@functools.cache
def _fields(group: type) -> dict[str, tuple[Any, Field[Any]]]:
    hints = get_type_hints(group)
    return {f.name: (hints[f.name], f) for f in fields(group)}


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
