"""What a server runs, and whether a command means the same: its options beside the server's, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimkv_cli import __version__
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.units import parse_budget

_AS_SAID = ("revision", "context", "on_overflow", "deterministic", "trust_remote_code")
_PRECISION = ("dtype", "quantize", "kv_dtype")
_SIZES = ("kv_budget", "prefill_chunk")
_DEFAULT_MODEL = "mini"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a server runs, as far as it decides answers.

    `said` are its options as they were given, `resolved` the sizes and formats that came of them, `reduced` those of
    them that its budget made other than they are without one. `defaults` are the model's own of sampling; `fixed` is
    what a request cannot take back: `max_tokens`, `top_h` and `think_budget` where the server was started with them,
    and `think`. `thinks` says whether the model knows reasoning, `in_thought` whether its template begins answers
    inside of it, for `on`, `off` and `auto`; it is empty where the model cannot chat.
    `stamps` say when the files that were loaded had last changed.
    """

    model: str
    said: Mapping[str, Any]
    resolved: Mapping[str, Any]
    budget_bytes: int | None = None
    reduced: list[str] = field(default_factory=list)
    gates: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    thinks: bool = False
    in_thought: Mapping[str, bool] = field(default_factory=dict)
    version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> About | None:
        """Read what `to_json` wrote; None for anything else."""
        if not isinstance(data, dict) or data.get("version") != __version__:
            return None  # another release may name or mean things otherwise
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        if not {"model", "said", "resolved"} <= known.keys():
            return None
        return cls(**known) if all(isinstance(value, _KINDS[name]) for name, value in known.items()) else None

    def differences(self, options: EngineOptions) -> Iterator[tuple[str, str]]:
        """Yield what would be other here than a command with these options means: the option, and a sentence about it.

        Where a model runs does not count (threads, device auto, offline); a budget has to hold the server's.
        """
        here = said_by(options)
        for flag in ("model", "gates", "pin", *_AS_SAID):
            if here[flag] != self.said.get(flag):
                yield self._beside(flag, here[flag], self.said.get(flag))
        yield from self._other_precision(here)
        for flag in _SIZES:
            said, there = here[flag], self.resolved.get(flag)
            if (flag in self.reduced or said != self.said.get(flag)) and str(said) != str(there):
                yield self._beside(flag, said, there)
        if here["device"] not in ("auto", self.said.get("device"), self.resolved.get("device")):
            yield self._beside("device", here["device"], self.resolved.get("device"))
        if not self._holds(options.budget):
            yield self._beside("budget", options.budget, self.said.get("budget") or "no budget")
        if any(stamp(path) != changed for path, changed in self.stamps.items()):
            yield "model", "the model's files have changed since the server started"

    def _other_precision(self, here: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """What is chosen for one of them depends on the others: they are the same together."""
        other = [flag for flag in _PRECISION if here[flag] != self.said.get(flag) or flag in self.reduced]
        named = "auto" not in (here["dtype"], here["quantize"])
        if not other or (named and all(here[flag] in ("auto", self.resolved.get(flag)) for flag in _PRECISION)):
            return
        yield self._beside(other[0], here[other[0]], self.resolved.get(other[0]))

    def _holds(self, budget: str | None) -> bool:
        if budget is None or budget == self.said.get("budget"):
            return True
        asked = parse_budget(budget)
        return asked.kind == "bytes" and self.budget_bytes is not None and asked.amount >= self.budget_bytes

    @staticmethod
    def _beside(name: str, here: object, there: object) -> tuple[str, str]:
        shown = ["not said" if each is None else str(each) for each in (here, there)]
        return name, f"--{name.replace('_', '-')} is {shown[0]} here, and {shown[1]} at the server"


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "model": str,
    "version": str,
    "thinks": bool,
    "budget_bytes": (int, type(None)),
    **dict.fromkeys(("said", "resolved", "gates", "defaults", "fixed", "stamps", "in_thought"), dict),
    **dict.fromkeys(("reduced", "notes", "warnings"), list),
}


def said_by(options: EngineOptions) -> dict[str, Any]:
    """Return what options say, in one form for all ways to say the same; paths as they are from anywhere."""
    gates = "streaming:4" if options.gates == "streaming" else options.gates
    return {
        "model": absolute(options.profile or options.model or _DEFAULT_MODEL),
        "gates": absolute(gates),
        "pin": None if options.pin is None else ",".join(sorted(part.strip() for part in options.pin.split(","))),
        "device": options.device,
        "budget": options.budget,
        **{name: getattr(options, name) for name in (*_AS_SAID, *_PRECISION, *_SIZES)},
    }


def absolute(name: str) -> str:
    """Return the path that a name is, if it is one."""
    path = Path(name).expanduser()
    try:
        return str(path.resolve()) if path.exists() else name
    except (OSError, RuntimeError):
        return name


def stamp(path: str) -> int:
    """Return when a file, or one in a folder, was last changed, in nanoseconds; 0 when there is none."""
    place = Path(path)
    try:
        paths = [place, *place.iterdir()] if place.is_dir() else [place]
        return max(each.stat().st_mtime_ns for each in paths)
    except OSError:
        return 0


def check_server(text: str) -> str:
    """Return what says a server.

    Raises:
        UsageError: neither auto nor off nor a URL.
    """
    if text not in ("auto", "off") and not text.startswith(("http://", "https://")):
        raise UsageError(f"--server {text} is unknown", hint="auto, off, or a URL as http://127.0.0.1:8012")
    return text
