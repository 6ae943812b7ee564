"""What is said on the command line wins over files and environment, and settings reach every command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trimkv_cli import app
from trimkv_cli.commands.options import settings_of
from trimkv_cli.settings import overlay


def commands(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command of the tree with its full name."""
    for each, command in getattr(tree, "commands", {}).items():
        yield from commands(command, f"{name} {each}".strip())
    if not hasattr(tree, "commands"):
        yield name, tree


TREE = app.command_tree()
ALL = dict(commands(TREE))
KINDS = {name: option.kind for name, option in settings_of(TREE).items()}


def parsed(name: str, *line: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command gets of a line, over settings."""
    with ALL[name].make_context(name, list(line), obj=lambda _: settings) as context:
        return dict(context.params)


@pytest.mark.parametrize("name", ALL)
def test_every_boolean_can_be_turned_off_on_the_line(name: str) -> None:
    """Catches a flag that a file turns on for good."""
    flags = [p for p in ALL[name].params if getattr(p, "is_flag", False) and p.name not in ("help", "version")]
    assert all(p.secondary_opts for p in flags), [p.opts for p in flags if not p.secondary_opts]


@pytest.mark.parametrize("name", ALL)
def test_settings_reach_every_option_of_their_name(name: str) -> None:
    """Catches commands in a group that never hear of a setting, and options of another kind that do."""
    settings: dict[str, Any] = {key: {str: "x", bool: True, list: ["x"]}.get(kind, 1) for key, kind in KINDS.items()}
    reached = ALL[name].settings(settings)
    own = {
        p.name for p in ALL[name].params if p.name in KINDS and (KINDS[p.name] is bool) == getattr(p, "is_flag", False)
    }
    assert own - ({"context"} if name == "gates train" else set()) <= reached.keys()
    assert name.split(maxsplit=1)[0] != "gates" or "revision" not in reached or name == "gates train"
    assert name != "gates train" or "context" not in reached


@pytest.mark.parametrize(
    ("settings", "line", "expected"),
    [
        ({"profile": "qwen3-4b-math"}, ["-m", "mini"], {"model": "mini", "profile": None}),
        ({"model": "mini", "revision": "abc"}, ["--profile", "x"], {"model": None, "revision": None, "profile": "x"}),
        ({"model": "a/b", "gates": "c/d"}, ["-m", "mini"], {"model": "mini", "gates": "auto"}),
        ({"model": "a/b", "gates": "streaming:8"}, ["-m", "mini"], {"gates": "streaming:8"}),
        ({"model": "mini", "gates": "c/d"}, ["-m", "mini"], {"gates": "c/d"}),
        ({"greedy": True}, ["--temperature", "0.7"], {"greedy": False, "temperature": 0.7}),
        ({"temperature": 0.7, "top_p": 0.5}, ["--greedy"], {"greedy": True, "temperature": None, "top_p": None}),
        ({"temperature": 0.7}, ["--no-greedy"], {"greedy": False, "temperature": 0.7}),
        ({"system": "Be short."}, ["--system-file", "f"], {"system": None, "system_file": "f"}),
        ({"system": "Be short."}, ["--raw"], {"system": None, "raw": True}),
        ({"system": "Be short."}, ["--no-raw"], {"system": "Be short."}),
        ({"system": "Be short."}, ["--cache", "f.kv"], {"system": None}),
        ({"temperature": 0.0}, ["--no-greedy"], {"greedy": False, "temperature": None}),
        ({"temperature": 0.0}, ["--top-k", "4"], {"temperature": None, "top_k": 4}),
        ({"deterministic": True}, ["--device", "cuda:0"], {"deterministic": False, "device": "cuda:0"}),
        ({"deterministic": True}, ["--device", "cpu"], {"deterministic": True}),
        ({"dtype": "bf16"}, ["--deterministic"], {"deterministic": True, "dtype": "auto"}),
        ({"kv_dtype": "fp8"}, ["--device", "cpu"], {"kv_dtype": "auto"}),
        ({"quantize": "int4"}, ["--device", "cuda"], {"quantize": "auto"}),
        ({"device": "cuda"}, ["--quantize", "stored"], {"device": "auto"}),
        ({"offline": True, "quiet": True}, ["--no-offline", "--no-quiet"], {"offline": False, "quiet": False}),
        ({"stream": False}, ["--stream"], {"stream": True}),
        ({"budget": "8GiB", "pin": "system"}, ["--budget", "", "--pin="], {"budget": None, "pin": None}),
        ({"threads": 2, "top_p": 0.5}, ["--threads", "", "--top-p", ""], {"threads": None, "top_p": None}),
        ({"model": "a/b", "stop": ["END"]}, ["-m", "", "--stop", ""], {"model": None, "stop": ()}),
        ({"system": "Be short."}, ["--system", ""], {"system": ""}),
        ({"stream": False}, [], {"stream": False}),
    ],
)
def test_the_line_wins(settings: Mapping[str, Any], line: list[str], expected: dict[str, Any]) -> None:
    """Catches a file that forbids what the line says, or that silently wins over it."""
    got = parsed("ask", *line, settings=settings)
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "line", "settings", "expected"),
    [
        ("bench", ["--shape", "10m"], {"model": "a", "profile": "b"}, {"model": None}),
        ("bench", [], {"profile": "mini"}, {"model": "mini"}),
        ("gates verify", ["x/y"], {"profile": "mini"}, {"model": "mini"}),
        ("eval", ["--budgets", "32"], {"kv_budget": "64"}, {"kv_budget": None}),
        ("summarize", ["f", "--save-cache", "f.kv"], {"on_overflow": "map-reduce"}, {"on_overflow": "error"}),
    ],
)
def test_the_line_wins_in_other_commands(
    name: str, line: list[str], settings: Mapping[str, Any], expected: dict[str, Any]
) -> None:
    """Catches pairs of options, of which one is on the line alone, that a file makes an error."""
    got = parsed(name, *line, settings=settings)
    assert {key: got[key] for key in expected} == expected


def test_a_model_that_is_an_argument_wins_as_well() -> None:
    """Catches `trimkv plan MODEL` that a profile in a file contradicts."""
    got = parsed("plan", "mini", settings={"profile": "qwen3-4b-math", "revision": "abc"})
    assert (got["name"], got["profile"], got["revision"]) == ("mini", None, None)


def test_a_higher_layer_takes_rivals_of_a_lower_one_with_it() -> None:
    """Catches TRIMKV_PROFILE beside a model in the user's file."""
    assert overlay({"model": "a", "seed": 1}, {"profile": "b"}) == {"profile": "b", "seed": 1}


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.chdir(folder)
    return app._exit_code(arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_budget", "abc"), ("budget", "8GX"), ("dtype", "int4"), ("device", "gpu"), ("pin", "all"),
        ("temperature", "-1"), ("on_overflow", "cut"), ("threads", "0"), ("max_inflight", "0"),
        ("encoding", "utf-9"), ("quantize", "q4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_bad_value_is_named_with_its_place(
    key: str,
    value: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches "'abc' is not a size" after the model is loaded, with no word about whose value that is."""
    if place == "environment":
        monkeypatch.setenv(f"TRIMKV_{key.upper()}", value)
    else:
        text = value if KINDS[key] in (int, float) else f'"{value}"'
        (tmp_path / "trimkv.toml").write_text(f"{key} = {text}\n")
    assert run(["ask", "hi"], monkeypatch, tmp_path) == 2
    said = capsys.readouterr().err
    assert (f"TRIMKV_{key.upper()}={value}" if place == "environment" else f"trimkv.toml: {key}") in said


@pytest.mark.parametrize(
    "line", [["--kv-budget", "abc"], ["--budget", "8GX"], ["--dtype", "int4"], ["--device", "gpu"]]
)
def test_a_bad_flag_is_named(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistyped value that is told only once the model is found, without its flag."""
    assert run(["ask", "hi", *line], monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {line[0]} {line[1]}: ")


@pytest.mark.parametrize(
    "line",
    [
        "run x.jsonl --timeout soon", "run x.jsonl --grace soon", "run x.jsonl --max-time soon",
        "run x.jsonl --max-line wide", "run x.jsonl --max-errors few", "run x.jsonl --shard 3/2",
        "eval mini --budgets abc", "bench --kv-budget abc", "plan mini --model other",
    ],
)  # fmt: skip
def test_a_bad_flag_of_one_command_is_named_before_a_model_is_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches sizes and times that are refused without their flag, or hours later."""
    monkeypatch.setattr("trimkv_cli.loading.sources.find_source", None)
    assert run(line.split(), monkeypatch, tmp_path) == 2
    assert next(word for word in line.split() if word.startswith("--")) in capsys.readouterr().err.splitlines()[0]
