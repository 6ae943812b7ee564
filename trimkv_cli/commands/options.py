"""What a shell may complete: names of models, profiles, gates, sessions and templates; nothing heavy is imported."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from trimkv_cli.commands.outputs import check_outputs
from trimkv_cli.errors import ConfigError, UsageError
from trimkv_cli.files import check_encoding
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.settings import overlay

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


Command = TypeVar("Command", bound=Callable[..., Any])
_MODEL_ARGUMENTS = ("name", "id")  # where a model is an argument and no option


@dataclass(frozen=True, slots=True)
class _Flag:
    declarations: tuple[str, ...]
    help: str
    panel: str
    metavar: str | None = None
    complete: Callable[[str], list[str]] | None = None
    check: Callable[[Any], Any] | None = None


_MODEL, _MEMORY, _SAMPLING, _PROMPT, _OUTPUT = "Model", "Memory", "Sampling", "Prompt", "Output"

FLAGS = {
    "model": _Flag(
        ("-m", "--model"),
        "Profile name, hub id or folder. Without one, the built-in mini.",
        _MODEL,
        "MODEL",
        complete_model,
    ),
    "profile": _Flag(
        ("--profile",), "Take model, gates and defaults from this profile.", _MODEL, "NAME", complete_profile
    ),
    "revision": _Flag(("--revision",), "Branch, tag or commit of a hub model.", _MODEL, "REV"),
    "gates": _Flag(
        ("--gates",),
        "auto, a hub id or folder of trained gates, streaming[:SINKS] (sinks and recent tokens) or none (full cache).",
        _MODEL,
        "GATES",
        complete_gates,
    ),
    "dtype": _Flag(("--dtype",), "auto, bf16, fp16 or fp32. auto on a CPU is fp32.", _MODEL, "TYPE"),
    "quantize": _Flag(
        ("--quantize",),
        "none, int8 or nf4 (bitsandbytes). auto is the highest precision that --budget holds; without one, none.",
        _MODEL,
        "TYPE",
    ),
    "kv_dtype": _Flag(
        ("--kv-dtype",),
        "Type of the cached keys and values: fp32, bf16, fp16 or, on a GPU, fp8; auto = as the weights.",
        _MEMORY,
        "TYPE",
    ),
    "device": _Flag(("--device",), "auto, cuda, cuda:N, mps or cpu.", _MODEL, "DEVICE"),
    "offline": _Flag(("--offline/--no-offline",), "Never use the network; exit 6 when a file is missing.", _MODEL),
    "trust_remote_code": _Flag(
        ("--trust-remote-code/--no-trust-remote-code",), "Run Python code that comes with the model.", _MODEL
    ),
    "budget": _Flag(("-b", "--budget"), "All memory that the process may use, as 8GiB or 80%.", _MEMORY, "SIZE"),
    "kv_budget": _Flag(
        ("--kv-budget",),
        "Slots per KV head (512) or bytes per sequence (256MiB); default: as trained.",
        _MEMORY,
        "M|SIZE",
    ),
    "prefill_chunk": _Flag(
        ("--prefill-chunk",), "Prompt tokens per chunk (default 512); 0 = the whole prompt at once.", _MEMORY, "N"
    ),
    "context": _Flag(
        ("-c", "--context"), "Longest sequence to allow, in tokens; default: the model's own.", _MEMORY, "N"
    ),
    "on_overflow": _Flag(
        ("--on-overflow",),
        "Past the model's positions: error, rebase (new positions for what is kept) or map-reduce (summarize only).",
        _MEMORY,
        "HOW",
    ),
    "max_inflight": _Flag(
        ("--max-inflight", "--rows"), "Sequences that run at the same time; default: from the plan.", _MEMORY, "N"
    ),
    "pin": _Flag(
        ("--pin",),
        "Never evict system, sinks:N (the first) or recent:N (the newest N tokens); commas join.",
        _MEMORY,
        "WHAT",
    ),
    "deterministic": _Flag(
        ("--deterministic/--no-deterministic",),
        "The same tokens for a request whatever runs beside it (CPU, fp32; slower).",
        _MEMORY,
    ),
    "threads": _Flag(("--threads",), "CPU threads; default: all cores.", _MEMORY, "N"),
    "max_tokens": _Flag(("-n", "--max-tokens"), "Most tokens to generate.", _SAMPLING, "N"),
    "temperature": _Flag(("--temperature",), "0 = greedy; default: the model's own.", _SAMPLING, "T"),
    "top_p": _Flag(("--top-p",), "Keep the likeliest tokens up to this probability mass.", _SAMPLING, "P"),
    "top_k": _Flag(("--top-k",), "Keep the K likeliest tokens; 0 = all.", _SAMPLING, "K"),
    "min_p": _Flag(("--min-p",), "Drop tokens below P times the likeliest one's probability.", _SAMPLING, "P"),
    "top_h": _Flag(("--top-h",), "Keep tokens up to this share of the distribution's entropy.", _SAMPLING, "H"),
    "repetition_penalty": _Flag(
        ("--repetition-penalty",), "Above 1: make tokens seen before less likely.", _SAMPLING, "X"
    ),
    "seed": _Flag(("--seed",), "Same seed, same prompt, same tokens.", _SAMPLING, "N"),
    "stop": _Flag(("--stop",), "Stop before this text; may be given several times.", _SAMPLING, "TEXT"),
    "greedy": _Flag(("--greedy/--no-greedy",), "Always take the likeliest token (temperature 0).", _SAMPLING),
    "ignore_eos": _Flag(
        ("--ignore-eos/--no-ignore-eos",), "Go on to --max-tokens even past an end-of-text token.", _SAMPLING
    ),
    "system": _Flag(("-s", "--system"), "System message.", _PROMPT, "TEXT"),
    "system_file": _Flag(("--system-file",), "Read the system message from a file.", _PROMPT, "FILE"),
    "encoding": _Flag(
        ("--encoding",),
        "Encoding of files and stdin, as gb18030; default: UTF-8, what they say, or Western (with a warning).",
        _PROMPT,
        "NAME",
        check=check_encoding,
    ),
    "think": _Flag(("--think/--no-think",), "Let the model reason first, where its template knows how.", _PROMPT),
    "raw": _Flag(("--raw/--no-raw",), "Send the prompt as it is, without the chat template.", _PROMPT),
    "special_tokens": _Flag(
        ("--special-tokens/--no-special-tokens",),
        "Read the model's own special tokens in a raw prompt as such, not as text.",
        _PROMPT,
    ),
    "json": _Flag(("--json/--no-json",), "Print one JSON object instead of text.", _OUTPUT),
    "output": _Flag(("-o", "--output"), "Write to this file instead of stdout.", _OUTPUT, "FILE"),
    "stream": _Flag(("--stream/--no-stream",), "Print the answer as it comes, or when it is complete.", _OUTPUT),
    "quiet": _Flag(("-q", "--quiet/--no-quiet"), "Only warnings and errors on stderr.", _OUTPUT),
    "stats": _Flag(("--stats/--no-stats",), "Print counts, speed and memory to stderr at the end.", _OUTPUT),
    "color": _Flag(("--color",), "Colour on stdout: auto is only on a terminal and without NO_COLOR.", _OUTPUT),
    "ascii": _Flag(("--ascii/--no-ascii",), "Draw with ASCII characters only.", _OUTPUT),
    "live": _Flag(("--live/--no-live",), "Show progress and memory while running (only on a terminal).", _OUTPUT),
}


def check_setting(key: str, value: Any, *, name: str) -> None:
    """Raise when a setting has a value that its option would refuse; `name` says where it stands.

    Raises:
        ConfigError: such a value.
    """
    flag = FLAGS.get(key)
    try:
        for group in (EngineOptions, SamplingOptions):
            if key in {f.name for f in fields(group)}:
                group(**{key: value})
        if flag is not None and flag.check is not None:
            flag.check(value)
    except UsageError as error:
        said = f"{flag.declarations[-1]} {value}: " if flag is not None else ""
        raise ConfigError(f"{name}: {error.message.removeprefix(said)}", hint=error.hint) from None


class SettingsCommand(TyperCommand):
    """A command whose options may come from files and environment, over which what is said on the line wins."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the line; settings that go with another choice than the one said there are left out."""
        if ctx.default_map is not None:
            found, *_ = self.make_parser(ctx).parse_args(args=list(args))
            said = {name: value for name, value in found.items() if value is not None}
            arguments = [said[name] for name in _MODEL_ARGUMENTS if name in said]
            if arguments and said.get("model", arguments[0]) != arguments[0]:
                raise UsageError(
                    f"{arguments[0]} and --model {said['model']} are both given", hint="leave one of them out"
                )
            named = {"model" if key in _MODEL_ARGUMENTS else key: value for key, value in said.items()}
            left = overlay(ctx.default_map, named)
            ctx.default_map = {key: value for key, value in ctx.default_map.items() if key in left}
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, unless it would write over what it reads."""
        check_outputs(self.params, ctx.params)
        return super().invoke(ctx)


class CommandGroup(typer.Typer):
    """A table of such commands."""

    def command(self, name: str | None = None, **how: Any) -> Callable[[Command], Command]:
        """Add a command as Typer does."""
        return super().command(name, **{"cls": SettingsCommand, **how})


def option(name: str) -> Any:
    """Return the Typer option called `name` in the table above."""
    flag = FLAGS[name]
    return typer.Option(
        *flag.declarations,
        help=flag.help,
        rich_help_panel=flag.panel,
        metavar=flag.metavar,
        autocompletion=flag.complete,
        callback=flag.check,
    )


ModelName = Annotated[
    str | None,
    typer.Argument(help="Profile name, hub id or folder.", metavar="MODEL", autocompletion=complete_model),
]
Json = Annotated[bool, option("json")]
Output = Annotated[str | None, option("output")]
Quiet = Annotated[bool, option("quiet")]
Stream = Annotated[bool, option("stream")]
Stats = Annotated[bool, option("stats")]
Live = Annotated[bool | None, option("live")]
Color = Annotated[Literal["auto", "always", "never"], option("color")]
Ascii = Annotated[bool, option("ascii")]
System = Annotated[str | None, option("system")]
SystemFile = Annotated[str | None, option("system_file")]
Encoding = Annotated[str | None, option("encoding")]
Think = Annotated[bool | None, option("think")]
Raw = Annotated[bool, option("raw")]
SpecialTokens = Annotated[bool, option("special_tokens")]
Model = Annotated[str | None, option("model")]
Profile = Annotated[str | None, option("profile")]
Revision = Annotated[str | None, option("revision")]
Gates = Annotated[str, option("gates")]
Offline = Annotated[bool, option("offline")]
Budget = Annotated[str | None, option("budget")]
Context = Annotated[int | None, option("context")]


def with_options(**groups: type) -> Callable[[Command], Command]:
    """Spread dataclasses over a command's options: `with_options(engine=EngineOptions)` fills its parameter `engine`.

    Each field becomes one option with the flag and help of `FLAGS` and the field's own type and default.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name, group in groups.items():
                kwargs[name] = group(**{f.name: kwargs.pop(f.name) for f in fields(group)})
            return command(*args, **kwargs)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in groups]
        spread = [parameter for group in groups.values() for parameter in _parameters(group)]
        wrapper.__signature__ = inspect.Signature([*own, *spread])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *spread]}
        del wrapper.__wrapped__  # or Typer reads the undecorated signature
        return wrapper  # type: ignore[return-value]

    return decorate


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(f),
            annotation=Annotated[hints[f.name], option(f.name)],
        )
        for f in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    assert field.default is not MISSING, f"option {field.name} has no default"
    return field.default
