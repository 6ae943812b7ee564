"""What is never evicted where the user does not say: a default for each kind of scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimkv_cli.events import Notice
from trimkv_cli.model.pins import Amount, Pins
from trimkv_cli.model.spec import TRAINED_VARIANTS, GateSpec, GateVariant

_LONG = 32_000  # tokens of a context from which on Fast KVzip's window is fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """What a scorer protects: a system message, the first tokens, and of a context so long the newest."""

    system: Amount | bool = False
    sinks: int = 0
    recent: Callable[[int], int] = lambda _: 0


def _share(context: int) -> int:
    return 4096 if context >= _LONG else max(1, context // 50)


# A longer one would take the slots of what is said after it.
_SYSTEM = Protection(system=Amount(25, is_share=True))
# One line per kind of scorer; a full cache pins nothing.
DEFAULT_PINS: Mapping[GateVariant, Protection] = {
    **dict.fromkeys((*TRAINED_VARIANTS.values(), "streaming", "keydiff"), _SYSTEM),
    "kvzap": Protection(recent=lambda _: 128),
    "fastkvzip": Protection(sinks=4, recent=_share),
}


def default_pins(gate: GateSpec, *, slots: int, context: int) -> tuple[Pins, tuple[Notice, ...]]:
    """Return what a scorer pins by itself in `slots` per head, at most half of them, and what to tell of that."""
    protection = DEFAULT_PINS.get(gate.variant)
    if protection is None:
        return Pins(), ()
    most, asked = slots // 2, protection.recent(context)
    sinks = min(protection.sinks, most // 2)
    recent = min(asked, most - sinks)
    message = (
        f"the authors of {gate.id} protect the newest {asked} tokens; of {slots} slots per head, {recent} are kept for"
        " those (--pin says otherwise)"
    )
    reduced = (Notice(code="pins_reduced", message=message),) if recent < asked else ()
    return Pins(system=protection.system, sinks=sinks, recent=recent), reduced
